# Figure 11: bars of speed-up over cuBLAS, a cluster for each step.
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
# Rows of x are ordered: shades of one colour.
shades = "#C6DBEF #9ECAE1 #6BAED6 #2171B5 #08306B"
columns = "m1 m16 m64 m256 m1024"
names = "'1 row of x' '16 rows' '64 rows' '256 rows' '1024 rows'"
plot for [n=1:5] data using word(columns, n):xtic(1) lc rgb word(shades, n) title word(names, n)
