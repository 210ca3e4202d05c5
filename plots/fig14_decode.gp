# Figure 14: decode bandwidth by shape.
width = 620
height = 380
load plots."/common.gp"
set datafile missing NaN
series = "KV16 KV8 KVFP8 K8V4 KV4"
pick(i, x) = column("series") == i ? x : NaN
set xlabel "batch x context"
set ylabel "share of read bandwidth (%)"
set yrange [0:105]
set xrange [0.7:6.3]
set xtics ("1x4096" 1, "8x4096" 2, "64x1024" 3, "64x4096" 4, "256x4096" 5, "256x16k" 6)
set key bottom right
plot for [n=1:words(series)] data using (column("x")):(pick(n, column("value"))) \
    with linespoints lt n title word(series, n)
