# Figure 10: speed-up over cuBLAS against the rows of x.
width = 860
height = 420
load plots."/common.gp"
set datafile missing NaN
pick(i, x) = column("series") == i ? x : NaN
field(i, c) = awk(sprintf("$2 == %d { print $%d; exit }", i, c))
count = awk("NR > 1 && $2 > n { n = $2 } END { print n }") + 0
array name[count]
array kind[count]
do for [i=1:count] { name[i] = field(i, 1); kind[i] = field(i, 5) }
ours = ""
others = ""
do for [i=1:count] {
    if (kind[i] eq "measured") { ours = ours." ".i }
    if (kind[i] eq "quoted" || kind[i] eq "limit") { others = others." ".i }
}
colour(i) = kind[i] eq "limit" ? 8 : format_lt(word(name[i], 2))
dash(i) = kind[i] eq "limit" ? 2 : word(name[i], 1) eq "Marlin" ? 4 : 3
set logscale x 2
set logscale y 2
set xrange [0.9:4600]
set yrange [0.4:6]
set ytics (0.5, 0.7, 1, 1.4, 2, 2.8, 4, 5.6)
set xlabel "rows of x"
set ylabel "speed-up over cuBLAS fp16"
set key outside right top vertical Left reverse
set arrow 1 from graph 0, first 1 to graph 1, first 1 nohead lc rgb "#000000" lw 0.8 dt 2
plot for [w in ours] data using (column("rows")):(pick(w + 0, column("speedup"))) \
         with linespoints lt format_lt(name[w + 0]) title name[w + 0], \
     for [w in others] data using (column("rows")):(pick(w + 0, column("speedup"))) \
         with lines lt colour(w + 0) dt dash(w + 0) title name[w + 0]
