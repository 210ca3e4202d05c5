# Figure 14: decode bandwidth by shape, prefill rate by length.
width = 960
height = 380
load plots."/common.gp"
set datafile missing NaN
series = "KV16 KV8 KVFP8 K8V4 KV4"
pick(p, i, x) = strcol("phase") eq p && column("series") == i ? x : NaN
set multiplot layout 1,2
set ylabel "share of read bandwidth (%)"
set yrange [0:105]
set xrange [0.5:6.5]
set xtics ("1x4096" 1, "8x4096" 2, "64x1024" 3, "64x4096" 4, "256x4096" 5, \
           "256x16k" 6) rotate by -20
set key bottom right
plot for [n=1:words(series)] data \
    using (column("x")):(pick("decode", n, column("value"))) \
    with linespoints lt n title word(series, n)
set ylabel "TFLOP/s"
set yrange [0:*]
set logscale x 2
set xrange [900:18500]
set xtics norotate ("1k" 1024, "2k" 2048, "4k" 4096, "8k" 8192, "16k" 16384)
set xlabel "tokens"
set key bottom right
plot for [n=1:words(series)] data \
    using (column("x")):(pick("prefill", n, column("value"))) \
    with linespoints lt n title word(series, n), \
    data using (column("x")):(pick("prefill", 6, column("value"))) with lines lt 7 dt 3 \
    title "cuDNN", \
    data using (column("x")):(pick("prefill", 7, column("value"))) with lines lt 8 dt 3 \
    title "TurboMind"
unset multiplot
