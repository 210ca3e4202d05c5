# Figure 9: share of the roofline by model, measured (points) and predicted (small squares).
width = 980
height = 420
load plots."/common.gp"
set ylabel "roofline time over step time"
set yrange [0:1.05]
set xtics rotate by -35 scale 0 noenhanced
set key outside top center horizontal Left reverse
set arrow 1 from graph 0, first 1 to graph 1, first 1 nohead lc rgb "#000000" lw 0.8 dt 2 front
series = "W16A16KV16_b1 W16A16KV16_b64 W4A16KV8_b1 W4A16KV8_b64 W16A16KV16_prefill W4A16KV8_prefill"
names = "'W16A16KV16, 1 sequence' 'W16A16KV16, 64' 'W4A16KV8, 1 sequence' 'W4A16KV8, 64' \
'W16A16KV16, prefill' 'W4A16KV8, prefill'"
set xrange [-0.6:*]
set offsets 0, 0.6, 0, 0
plot data using 0:(NaN):xtic(1) with points notitle, \
     for [i=1:6] data using ($0 + (i - 3.5) * 0.12):word(series, i) with points lt i \
         title word(names, i), \
     for [i=1:6] data using ($0 + (i - 3.5) * 0.12):word(series, i)."_predicted" with points \
         lt i pt 1 ps 0.5 notitle
