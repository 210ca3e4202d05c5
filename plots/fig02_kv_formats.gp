# Figure 2: perplexity and wrong answers by KV format.
width = 860
height = 340
load plots."/common.gp"
set multiplot layout 1,2
set style data histogram
set xtics scale 0 noenhanced
set key outside top center horizontal Left reverse
set ylabel "perplexity over W16A16KV16 (%)"
set xzeroaxis lw 0.8
plot data using "w16_perplexity":xtic(1) lt format_lt("W16") title "W16", \
     data using "w4_perplexity" lt format_lt("W4g128") title "W4g128"
unset xzeroaxis
set style histogram errorbars gap 1 lw 1
set errorbars 0.6 lc rgb "#555555"
set ylabel "wrong sums (%)"
set yrange [0:*]
plot data using "w16_wrong":"w16_lo":"w16_hi":xtic(1) lt format_lt("W16") title "W16", \
     data using "w4_wrong":"w4_lo":"w4_hi" lt format_lt("W4g128") title "W4g128"
unset multiplot
