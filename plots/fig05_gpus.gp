# Figure 5: bars of the mean gain, a cluster for each GPU.
width = 860
height = 360
load plots."/common.gp"
set style data histogram
set ylabel "mean throughput over W16A16KV16\n(predicted)"
set yrange [0:*]
set xtics scale 0 noenhanced
set key outside top center horizontal Left reverse
set arrow 1 from graph 0, first 1 to graph 1, first 1 nohead lc rgb "#000000" lw 0.8 dt 2 front
plot data using "W8A8KV8":xtic(1) lt 2 title "W8A8KV8", \
     data using "WFP8AFP8KVFP8" lt 3 title "FP8", \
     data using "WMXFP4A16KV8" lt 4 title "MXFP4-A16KV8", \
     data using "W4A16KV16" lt 5 title "W4A16KV16", \
     data using "W4A16KV8" lt 6 title "W4A16KV8", \
     data using "W4A16KV4" lt 1 title "W4A16KV4"
