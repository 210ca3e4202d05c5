# Figure 17: cost of each half of a layer's cache in 4 bits, and of choosing halves by it.
width = 900
height = 380
load plots."/common.gp"
set datafile missing NaN
kind(s, x) = strcol("kind") eq s ? x : NaN
uniform = awk("NR > 1 && $1 ~ /^K/ { printf \"%s \", $1 }")
set multiplot layout 1,2 margins 0.085,0.985,0.15,0.95 spacing 0.1,0.1
set key top left
set xrange [-0.6:5.6]
set xtics 0, 1, 5
set yrange [0:*]
set xlabel "layer"
set ylabel "KL from 16 bits (micronats)"
set boxwidth 0.38
plot data using (column("x") - 0.2):(kind("alone K", column("kl_micronats"))) \
        with boxes lt 7 title "keys in 4 bits", \
    data using (column("x") + 0.2):(kind("alone V", column("kl_micronats"))) \
        with boxes lt 6 title "values in 4 bits"
set key bottom left
set xrange [3.8:8.2]
set xtics 4, 1, 8
set logscale y
set yrange [0.05:100]
set format y "%g"
set xlabel "mean bits of the cache"
set ylabel ""
plot data using (column("x")):(kind("most", column("kl_micronats"))) \
        with linespoints lt 8 title "the costliest in 4 bits", \
    data using (column("x")):(kind("least", column("kl_micronats"))) \
        with linespoints lt 7 title "the cheapest in 4 bits", \
    for [s in uniform] data using (column("x")):(kind(s, column("kl_micronats"))) \
        with points lt 2 pt 6 ps 1.3 notitle, \
    for [s in uniform] data using (column("x")):(kind(s, column("kl_micronats"))):("  ".s) \
        with labels left offset (s eq "KV8" ? -5 : 0.4),0.6 noenhanced notitle
unset multiplot
