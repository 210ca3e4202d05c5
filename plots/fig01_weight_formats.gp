# Figure 1: perplexity and wrong answers by weight format.
width = 860
height = 340
load plots."/common.gp"
set multiplot layout 1,2
set style data histogram
set xtics rotate by -35 scale 0 noenhanced
set key off
set ylabel "perplexity over W16 (%)"
set yrange [0:*]
plot data using "perplexity_increase_percent":xtic(1) lt 8
set style histogram errorbars gap 1 lw 1
set errorbars 0.6 lc rgb "#555555"
set ylabel "wrong sums (%)"
plot data using "wrong_percent":"wrong_lo":"wrong_hi":xtic(1) lt 8
unset multiplot
