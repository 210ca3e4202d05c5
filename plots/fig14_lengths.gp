# Figure 14: speed-up over 16 bits against prompt tokens an answer token, a panel for each batch.
width = 900
height = 400
load plots."/common.gp"
set datafile missing NaN
series = awk("NR > 1 && !seen[$1]++ { printf \"%s \", $1 }")
models(b) = awk(sprintf("$2 == %d { print $3; exit }", b))
pick(s, b, k, x) = strcol("name") eq s && column("batch") == b && strcol("kind") eq k ? x : NaN
set multiplot layout 1,2 margins 0.075,0.975,0.25,0.9 spacing 0.08,0.1
set key off
set logscale x 2
set xrange [0.06:260]
set xtics ("1/16" 0.0625, "1/4" 0.25, "1" 1, "4" 4, "16" 16, "64" 64, "256" 256)
highest = awk("NR > 1 && $6 > m { m = $6 } END { print m }") + 0
set yrange [0.8:ceil(5 * highest) / 5.0]
set format y "%.1f"
set xlabel "prompt tokens an answer token"
set arrow 1 from graph 0, first 1 to graph 1, first 1 nohead lc rgb "#000000" lw 0.8 dt 2
do for [b in "16 64"] {
    set title sprintf("%s sequences (%s models)", b, models(b + 0))
    set ylabel b eq "16" ? "speed-up over 16 bits" : ""
    plot for [s in series] data \
            using (column("ratio")):(pick(s, b + 0, "steps", column("gain"))) \
            with lines lt format_lt(s) notitle, \
        for [s in series] data \
            using (column("ratio")):(pick(s, b + 0, "served", column("gain"))) \
            with points lt format_lt(s) pt 6 ps 1.3 notitle
}
load plots."/legend.gp"
set key maxrows 1
plot for [s in series] NaN with lines lt format_lt(s) title s, \
     NaN with points lt 8 pt 6 ps 1.3 title "as served"
unset multiplot
