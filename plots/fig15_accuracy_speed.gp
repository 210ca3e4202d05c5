# Figure 15: speed-up against KL divergence, three panels; steps along what no format beats.
width = 980
height = 380
load plots."/common.gp"
set datafile missing NaN
series = awk("NR > 1 && !seen[$1]++ { printf \"%s \", $1 }")
in(p, x) = strcol("panel") eq p ? x : NaN
pick(s, p, x) = strcol("name") eq s ? in(p, x) : NaN
# The markers of the line types; W4A16KV16, which shares the colour of W4A8KV8, hollow.
shape(s) = s eq "W4A16KV16" ? 12 : word("7 2 9 11 13 15 5 7", format_lt(s)) + 0
models(p) = awk(sprintf("$2 == \"%s\" && $3 > n { n = $3 } END { print n + 0 }", p))
set multiplot layout 1,3 margins 0.065,0.985,0.28,0.9 spacing 0.06,0.1
set key off
set xrange [-0.15:3.5]
set yrange [0.8:2.2]
set format y "%.1f"
set xlabel "KL from 16 bits (millinats)"
set arrow 1 from graph 0, first 1 to graph 1, first 1 nohead lc rgb "#000000" lw 0.8 dt 2
title_of(p) = p eq "decode" ? "decode, 64 sequences (H200, %s models)" \
    : p eq "prefill" ? "prefill (H200, %s models)" : "offline (H100, up to %s models, predicted)"
do for [p in "decode prefill offline"] {
    set title sprintf(title_of(p), models(p))
    set ylabel p eq "decode" ? "speed-up over 16 bits" : ""
    plot data using (column("kl_millinats")):(column("front") == 1 ? in(p, column("gain")) : NaN) \
            with steps lc rgb "#bbbbbb" lw 3 notitle, \
        for [s in series] data using (column("kl_millinats")):(pick(s, p, column("gain"))) \
            with points lt format_lt(s) pt shape(s) ps 1.3 notitle
}
load plots."/legend.gp"
set size 1, 0.12
set key maxrows 2
plot for [s in series] NaN with points lt format_lt(s) pt shape(s) ps 1.3 title s
unset multiplot
