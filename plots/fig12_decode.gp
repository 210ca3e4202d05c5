# Figure 12: decode bandwidth by shape.
width = 760
height = 380
load plots."/common.gp"
set datafile missing NaN
series = "KV16 KV8 KVFP8 K8V4 KV4"
pick(i, x) = column("series") == i ? x : NaN
set xlabel "batch x context (tokens)"
set ylabel "share of read bandwidth (%)"
set yrange [0:105]
set xrange [0.7:7.3]
set xtics ("1x4096" 1, "8x4096" 2, "64x1024" 3, "64x4096" 4, "256x4096" 5, "256x16k" 6, "1x128k" 7)
set key outside right top vertical Left reverse
set arrow 1 from graph 0, first 100 to graph 1, first 100 nohead lc rgb "#000000" lw 0.8 dt 2
# Shapes are in no order: points, with a line for the eye only where one follows the other in bytes.
plot for [n=1:words(series)] data \
    using (column("x") <= 6 ? column("x") : NaN):(pick(n, column("value"))) \
    with linespoints lt format_lt(word(series, n)) title word(series, n), \
     for [n=1:words(series)] data \
    using (column("x") > 6 ? column("x") : NaN):(pick(n, column("value"))) \
    with points lt format_lt(word(series, n)) notitle
