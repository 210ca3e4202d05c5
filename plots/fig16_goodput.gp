# Figure 16: requests per second and GPU within limits of latency, a panel for each model.
width = 980
height = 320
load plots."/common.gp"
series = "W16A16KV16 FP8 W4A16KV8 W4A8KV8"
title_of(i) = awk(sprintf("$2 == %d { print $1; exit }", i))
lt_of(n) = format_lt(word(series, n))
panels = awk("END { print $2 }") + 0
pick(i, s, x) = column("panel") == i && strcol("precision") eq s ? x : NaN
set datafile missing NaN
set multiplot layout 1,panels margins 0.075,0.985,0.29,0.9 spacing 0.055,0.09
set key off
set xrange [0:55]
set xtics 10, 10, 50
set yrange [0:*]
set xlabel "limit on TPOT (ms)"
do for [i=1:panels] {
    set title title_of(i)." (predicted)" noenhanced
    set ylabel (i == 1 ? "requests/s per GPU" : "")
    plot for [n=1:words(series)] data \
        using (column("tpot_ms")):(pick(i, word(series, n), column("requests_per_s_per_gpu"))) \
        with linespoints lt lt_of(n) title word(series, n)
}
load plots."/legend.gp"
set size 1, 0.14
set key width 2
plot for [n=1:words(series)] NaN with linespoints lt lt_of(n) title word(series, n)
unset multiplot
