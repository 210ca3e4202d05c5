# Figure 5: bars of the mean gain, a cluster for each GPU.
width = 860
height = 360
load plots."/common.gp"
set style data histogram
set ylabel "mean throughput over W16A16KV16\n(predicted)"
set yrange [0:*]
set xtics scale 0 noenhanced
set key outside top center horizontal Left reverse width 2
set arrow 1 from graph 0, first 1 to graph 1, first 1 nohead lc rgb "#000000" lw 0.8 dt 2 front
columns = "W8A8KV8 WFP8AFP8KVFP8 WMXFP4A16KV8 W4A16KV16 W4A16KV8 W4A16KV4"
names = "W8A8KV8 FP8 MXFP4-A16KV8 W4A16KV16 W4A16KV8 W4A16KV4"
plot for [n=1:words(columns)] data using word(columns, n):xtic(1) \
    lt format_lt(word(columns, n)) title word(names, n)
