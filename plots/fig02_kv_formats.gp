# Figure 2: perplexity and accuracy by KV format.
width = 860
height = 320
load plots."/common.gp"
set multiplot layout 1,2
set style data histogram
set xtics scale 0 noenhanced
set ylabel "perplexity over W16A16KV16 (%)"
set xzeroaxis lw 0.8
set key top left
set offsets 0, 0, graph 0.25, 0
plot data using "w16_perplexity":xtic(1) lt 1 title "W16", \
     data using "w4_perplexity" lt 2 title "W4g128"
unset xzeroaxis
set offsets 0, 0, 0, 0
set ylabel "arithmetic, exact answers (%)"
set yrange [80:104] # exact answers are all above 80 %: a zero base would hide what is asked
set ytics 80,5,100
set key top right horizontal
plot data using "w16_arithmetic":xtic(1) lt 1 title "W16", \
     data using "w4_arithmetic" lt 2 title "W4g128"
unset multiplot
