# Figure 13: prefill rate by length.
width = 760
height = 380
load plots."/common.gp"
set datafile missing NaN
series = "KV16 KV8 KVFP8 K8V4 KV4"
pick(i, x) = column("series") == i ? x : NaN
set xlabel "prompt (tokens)"
set ylabel "TFLOP/s"
set yrange [0:*]
set logscale x 2
set xrange [900:18500]
set xtics ("1k" 1024, "2k" 2048, "4k" 4096, "8k" 8192, "16k" 16384)
set key outside right top vertical Left reverse
plot for [n=1:words(series)] data using (column("x")):(pick(n, column("value"))) \
         with linespoints lt format_lt(word(series, n)) title word(series, n), \
     data using (column("x")):(pick(6, column("value"))) with lines lt 8 dt 2 title "cuDNN KV16", \
     data using (column("x")):(pick(7, column("value"))) with lines lt 1 dt 3 title "TurboMind KV16"
