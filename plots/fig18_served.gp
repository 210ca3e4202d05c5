# Figure 18: TTFT and TPOT against rate, and throughput by format, measured and predicted.
width = 980
height = 380
load plots."/common.gp"
set datafile missing NaN
loaded = awk("NR > 1 && $1 == 1 && !seen[$2]++ { printf \"%s \", $2 }")
offline = awk("NR > 1 && $1 == 2 && !seen[$2]++ { printf \"%s \", $2 }")
at(s) = 0 + sum [i=1:words(offline)] (word(offline, i) eq s ? i : 0)
pick(p, s, k, x) = column("panel") == p && strcol("precision") eq s && strcol("kind") eq k ? x : NaN
set multiplot layout 1,3 margins 0.085,0.985,0.29,0.95 spacing 0.1,0.1
set key off
set xrange [0:*]
set xlabel "request rate (1/s)"
do for [metric in "ttft_p99_ms tpot_p50_ms"] {
    if (metric eq "ttft_p99_ms") {
        set logscale y
        set format y "%g"
        set ylabel "TTFT P99 (ms)"
    } else {
        unset logscale y
        set yrange [0:*]
        set ylabel "TPOT P50 (ms)"
    }
    if (words(loaded)) {
        plot for [s in loaded] data \
                using (column("rate_per_s")):(pick(1, s, "measured", column(metric))) \
                with linespoints lt format_lt(s), \
            for [s in loaded] data \
                using (column("rate_per_s")):(pick(1, s, "predicted", column(metric))) \
                with lines lt format_lt(s) lw 1 dt 2
    } else {
        set multiplot next
    }
}
set ylabel "output tokens/s, all at once"
set xlabel ""
set xrange [0.4:words(offline) + 0.6]
set boxwidth 0.7
unset xtics
set for [i=1:words(offline)] label i word(offline, i) at first i, graph -0.03 right rotate by 35 \
    noenhanced
if (words(offline)) {
    plot for [s in offline] data \
            using (at(s)):(pick(2, s, "measured", column("output_tokens_per_s"))) \
            with boxes lt format_lt(s), \
        for [s in offline] data \
            using (at(s)):(pick(2, s, "predicted", column("output_tokens_per_s"))) \
            with points lt 1 pt 6 ps 1.2
} else {
    set multiplot next
}
unset label
load plots."/legend.gp"
set key width 2
plot for [s in loaded] NaN with linespoints lt format_lt(s) title s, \
     NaN with lines lt 8 lw 1 dt 2 title "predicted"
unset multiplot
