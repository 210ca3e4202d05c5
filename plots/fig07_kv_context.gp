# Figure 7: requests held and throughput against context, by KV format.
width = 900
height = 360
load plots."/common.gp"
series = "KV16 KV8 KVFP8 K8V4 KV4"
pick(s, x) = strcol("kv") eq s ? x : NaN
set datafile missing NaN
set multiplot layout 1,2
set logscale x 2
set logscale y 10
set xrange [900:150000]
set format y "%g"
set xlabel "context (tokens)"
set xtics ("1k" 1024, "2k" 2048, "4k" 4096, "8k" 8192, "16k" 16384, "32k" 32768, "64k" 65536, \
           "128k" 131072)
set key bottom left
set ylabel "requests held at a time (predicted)"
plot for [n=1:words(series)] data \
    using (column("context")):(pick(word(series, n), column("requests_held"))) \
    with linespoints lt format_lt(word(series, n)) title word(series, n)
set ylabel "output tokens/s (predicted)"
plot for [n=1:words(series)] data \
    using (column("context")):(pick(word(series, n), column("output_tokens_per_s"))) \
    with linespoints lt format_lt(word(series, n)) title word(series, n)
unset multiplot
