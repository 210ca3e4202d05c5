# legend.gp - loaded before a last "plot ... NaN": an empty plot below the panels for its key.
unset title
unset xlabel
unset ylabel
unset tics
unset border
unset grid
unset arrow
unset logscale
set offsets 0, 0, 0, 0
set xrange [0:1]
set yrange [0:1]
set margins 0, 0, 0, 0
set origin 0, 0
set size 1, 0.08
set key inside center center horizontal Left reverse samplen 2 maxrows 1 noenhanced
