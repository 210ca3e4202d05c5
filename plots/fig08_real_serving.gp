# Figure 8: three latencies against rate with intervals over repetitions.
width = 980
height = 340
load plots."/common.gp"
set datafile missing NaN
names = awk("NR > 1 && !seen[$1]++ { printf \"%s|\", $1 }")
count = awk("NR > 1 && !seen[$1]++ { n++ } END { print n }") + 0
name_of(n) = system(sprintf("echo '%s' | cut -d'|' -f%d", names, n))
array title_of[count]
do for [n=1:count] { title_of[n] = name_of(n) }
pick(n, x) = strcol("series") eq title_of[n] ? x : NaN
set multiplot layout 1,3 margins 0.07,0.985,0.25,0.95 spacing 0.075,0.1
set key off
set xlabel "request rate (1/s)"
set yrange [0:*]
set offsets graph 0.05, graph 0.05, 0, 0
metrics = "ttft_p50_ms ttft_p90_ms e2e_p50_ms"
# Intervals at one rate stand beside each other.
aside(n, x) = x + 0.8 * (n - (count + 1) / 2.0)
label_of(i) = i == 1 ? "TTFT P50 (ms)" : i == 2 ? "TTFT P90 (ms)" : "end to end P50 (ms)"
do for [i=1:3] {
    m = word(metrics, i)
    set ylabel label_of(i)
    plot for [n=1:count] data \
        using (aside(n, column("rate_per_s"))):(pick(n, column(m))): \
            (column(m."_lo")):(column(m."_hi")) \
        with yerrorlines lt format_lt(title_of[n]) title title_of[n]
}
load plots."/legend.gp"
plot for [n=1:count] NaN with linespoints lt format_lt(title_of[n]) title title_of[n]
unset multiplot
