# Figure 12: speed-up over cuBLAS against the rows of x.
width = 760
height = 420
load plots."/common.gp"
set datafile missing NaN
pick(i, x) = column("series") == i ? x : NaN
name_of(i) = system(sprintf("awk -F'\t' '$2 == %d { print $1; exit }' '%s'", i, data))
series = system(sprintf("awk -F'\t' 'NR > 1 && $2 > n { n = $2 } END { print n }' '%s'", data)) + 0
set logscale x 2
set xrange [0.9:4600]
set yrange [0:*]
set xlabel "rows of x"
set ylabel "speed-up over cuBLAS fp16"
set key top right
set arrow 1 from graph 0, first 1 to graph 1, first 1 nohead lc rgb "#000000" lw 0.8 dt 2
plot for [n=1:series-2] data using (column("rows")):(pick(n, column("speedup"))) \
         with linespoints lt n title name_of(n), \
     for [n=series-1:series] data using (column("rows")):(pick(n, column("speedup"))) \
         with lines lt (n == series ? 8 : 7) dt 3 title name_of(n)
