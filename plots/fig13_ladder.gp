# Figure 13: bars of speed-up over cuBLAS, a cluster for each step.
width = 860
height = 400
load plots."/common.gp"
set style data histogram
set ylabel "speed-up over cuBLAS fp16"
set yrange [0:*]
set xtics scale 0 noenhanced rotate by -20
set rmargin 8
set key outside top center horizontal Left reverse
set arrow 1 from graph 0, first 1 to graph 1, first 1 nohead lc rgb "#000000" lw 0.8 dt 2 front
plot data using "m1":xtic(1) lt 1 title "1 row", data using "m16" lt 2 title "16 rows", \
     data using "m64" lt 3 title "64", data using "m256" lt 4 title "256", \
     data using "m1024" lt 5 title "1024"
