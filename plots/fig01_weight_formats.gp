# Figure 1: perplexity and accuracy by weight format.
width = 860
height = 340
load plots."/common.gp"
set multiplot layout 1,2
set style data histogram
set xtics rotate by -35 scale 0 noenhanced
set ylabel "perplexity over W16 (%)"
unset key
set xzeroaxis lw 0.8
plot data using "perplexity_increase_percent":xtic(1) lt 1 notitle
unset xzeroaxis
set ylabel "exact answers (%)"
set yrange [0:118]
set ytics 0,20,100
set key top right horizontal
plot data using "arithmetic_percent":xtic(1) lt 1 title "arithmetic", \
     data using "recall_percent" lt 2 title "recall"
unset multiplot
