# Figure 9: share of the roofline by model, measured (filled) and predicted (hollow).
width = 980
height = 420
load plots."/common.gp"
set ylabel "roofline time / step time"
set yrange [0:1.05]
set xtics rotate by -30 scale 0 noenhanced
set rmargin 9
set key outside top center horizontal Left reverse maxrows 3
set arrow 1 from graph 0, first 1 to graph 1, first 1 nohead lc rgb "#000000" lw 0.8 dt 2 front
formats = "W16A16KV16 W4A16KV8"
steps = "b1 b64 prefill"
names = "'1 sequence' '64 sequences' 'prefill'"
filled(i) = word("7 5 9", i) + 0 # a shape for each step; one less is hollow
format_of(i) = word(formats, i > 3 ? 2 : 1)
step_of(i) = i > 3 ? i - 3 : i
column_of(i) = format_of(i)."_".word(steps, step_of(i))
set xrange [-0.6:*]
set offsets 0, 0.6, 0, 0
plot data using 0:(NaN):xtic(1) with points notitle, \
     for [i=1:6] data using ($0 + (i - 3.5) * 0.12):column_of(i) with points \
         lt format_lt(format_of(i)) pt filled(step_of(i)) ps 1 \
         title format_of(i).", ".word(names, step_of(i)), \
     for [i=1:6] data using ($0 + (i - 3.5) * 0.12):column_of(i)."_predicted" with points \
         lt format_lt(format_of(i)) pt filled(step_of(i))-1 ps 1 \
         title (i == 1 ? "hollow: predicted" : "")
