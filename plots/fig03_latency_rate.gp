# Figure 3: P99 TTFT and P50 TPOT against rate, a panel for each model.
width = 980
height = 560
load plots."/common.gp"
series = "W16A16KV16 W8A8KV8 FP8 MXFP4-A16KV8 W4A16KV16 W4A16KV8 W4A16KV4"
title_of(i) = awk(sprintf("$2 == %d { print $1; exit }", i))
lt_of(n) = format_lt(word(series, n))
panels = awk("END { print $2 }") + 0
pick(i, s, x) = column("panel") == i && strcol("precision") eq s ? x : NaN
set datafile missing NaN
set multiplot layout 2,panels margins 0.085,0.985,0.17,0.94 spacing 0.065,0.09
set key off
set format y "%g"
set logscale y
set xrange [0:*]
do for [i=1:panels] {
    set title title_of(i)." (predicted)" noenhanced
    set ylabel (i == 1 ? "TTFT P99 (ms)" : "")
    plot for [n=1:words(series)] data \
        using (column("rate_per_s")):(pick(i, word(series, n), column("ttft_p99_ms"))) \
        with linespoints lt lt_of(n) title word(series, n)
}
unset title
unset logscale y
set yrange [0:*]
set xlabel "request rate (1/s)"
do for [i=1:panels] {
    set ylabel (i == 1 ? "TPOT P50 (ms)" : "")
    plot for [n=1:words(series)] data \
        using (column("rate_per_s")):(pick(i, word(series, n), column("tpot_p50_ms"))) \
        with linespoints lt lt_of(n) title word(series, n)
}
# The legend is a plot of its own below the panels: one for all six.
load plots."/legend.gp"
plot for [n=1:words(series)] NaN with linespoints lt lt_of(n) title word(series, n)
unset multiplot
