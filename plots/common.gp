# common.gp - loaded first by every plot. Fonts, colours and line styles live here only.
# in: format ("svg" or "png"), data (the TSV, and $DATA for the shell), plots (this folder); width
# and height in pixels.
# All figures are drawn from files, so that nothing is a number typed here.
if (format eq "png") {
    set terminal pngcairo size 2*width,2*height font "DejaVu Sans,20" fontscale 1 linewidth 2 \
        pointscale 1.6 enhanced background rgb "white"
} else {
    set terminal svg size width,height dynamic font "DejaVu Sans,Helvetica,Arial,sans-serif,11" \
        enhanced background rgb "white"
}
# What an awk program says of the data, whose path may hold any character.
awk(program) = system("awk -F'\t' '".program."' \"$DATA\"")
set encoding utf8
set datafile separator tab
set datafile missing "-"
set datafile columnheaders
set key top left Left reverse samplen 2 spacing 1.1 noenhanced
set border 3 lw 0.8
set tics nomirror out scale 0.6
# The default, "% h", has a blank in the place of a sign, and labels stand beside their tics.
set format "%h"
set grid ytics lc rgb "#d0d0d0" lw 0.5
set style fill solid 0.9 noborder
set style histogram clustered gap 1
set boxwidth 0.9
# Okabe-Ito palette: distinguishable in print and by colour-blind readers. A format has one colour
# and one marker in all figures, by format_lt below; vermilion and blue are alike in grey. From 4
# on an odd point type is filled, the one before it hollow.
set linetype 1 lc rgb "#000000" lw 1.8 pt 7 ps 0.6
set linetype 2 lc rgb "#D55E00" lw 1.8 pt 2 ps 1.1
set linetype 3 lc rgb "#009E73" lw 1.8 pt 9 ps 0.7
set linetype 4 lc rgb "#CC79A7" lw 1.8 pt 11 ps 0.7
set linetype 5 lc rgb "#E69F00" lw 1.8 pt 13 ps 0.8
set linetype 6 lc rgb "#56B4E9" lw 1.8 pt 15 ps 0.7
set linetype 7 lc rgb "#0072B2" lw 1.8 pt 5 ps 0.6
set linetype 8 lc rgb "#888888" lw 1.8 pt 7 ps 0.6
set linetype cycle 8
# 16 bits black, int8 vermilion, FP8 green, MXFP4 purple; 4-bit weights or cache orange to blue.
among(s, list) = strstrt(" ".list." ", " ".s." ") > 0
format_lt(s) = among(s, "W16A16KV16 W16 KV16") ? 1 : among(s, "W8A8KV8 W8A16 W8 KV8") ? 2 \
    : among(s, "FP8 WFP8AFP8KVFP8 WFP8AFP8 WFP8 KVFP8") ? 3 \
    : among(s, "MXFP4-A16KV8 WMXFP4A16KV8 MXFP4-A16 WMXFP4") ? 4 \
    : among(s, "W4A16KV16 W4A8 W4A8KV8") ? 5 : among(s, "W4A16KV8 K8V4") ? 6 \
    : among(s, "W4A16KV4 W4A16 W4g128 KV4") ? 7 : 8
