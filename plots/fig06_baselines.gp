# Figure 6: gains over baselines, a cluster for each GPU.
width = 860
height = 360
load plots."/common.gp"
set style data histogram
set ylabel "throughput over the baseline\n(predicted)"
set yrange [0:*]
set xtics scale 0 noenhanced
set key outside top center horizontal Left reverse
set arrow 1 from graph 0, first 1 to graph 1, first 1 nohead lc rgb "#000000" lw 0.8 dt 2 front
plot data using "w4kv16_dequant_first":xtic(1) lt format_lt("W4A16KV16") \
         title "W4A16KV16 over dequantise, then GEMM", \
     data using "w4kv4_dequant_first" lt format_lt("W4A16KV4") \
         title "W4A16KV4 over dequantise, then GEMM", \
     data using "w4kv4_static" lt 8 title "W4A16KV4 over static batching"
