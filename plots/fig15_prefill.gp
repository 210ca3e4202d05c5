# Figure 15: prefill rate by length.
width = 620
height = 380
load plots."/common.gp"
set datafile missing NaN
series = "KV16 KV8 KVFP8 K8V4 KV4"
pick(i, x) = column("series") == i ? x : NaN
set xlabel "tokens"
set ylabel "TFLOP/s"
set yrange [0:*]
set logscale x 2
set xrange [900:18500]
set xtics ("1k" 1024, "2k" 2048, "4k" 4096, "8k" 8192, "16k" 16384)
set key bottom right
plot for [n=1:words(series)] data using (column("x")):(pick(n, column("value"))) \
         with linespoints lt n title word(series, n), \
     data using (column("x")):(pick(6, column("value"))) with lines lt 7 dt 3 title "cuDNN", \
     data using (column("x")):(pick(7, column("value"))) with lines lt 8 dt 3 title "TurboMind"
