"""The statistics of a serving benchmark from its own requests, by definitions written down once more.

    build/amalgam bench serve --url URL --rate 5 --n 100 --goodput ttft:60 --goodput tpot:10 \
        --save-result result.json --save-detailed
    python tests/interop/serve_metrics.py result.json --goodput ttft:60 --goodput tpot:10

Needs no package. Reads what `vllm bench serve --save-detailed` writes as well. TTFT and E2EL count
from the dispatch; TPOT is (E2EL - TTFT) / (n - 1) of requests with n > 1; ITL is every gap between
two tokens; percentiles interpolate linearly; std divides by n. Prints one line a number and ends
with status 1 when one is off.
"""

import argparse
import json
import math
import sys

failed = 0


def percentile(values, p):
    values = sorted(values)
    at = (len(values) - 1) * p / 100
    low = math.floor(at)
    high = min(low + 1, len(values) - 1)
    return values[low] + (values[high] - values[low]) * (at - low)


def check(name, said, found, share=1e-9):
    global failed
    good = said is not None and abs(said - found) <= share * max(1, abs(found))
    failed += not good
    print(f"{'ok  ' if good else 'FAIL'}  {name}: {said} and {found:.9g}")


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("file")
    parser.add_argument("--goodput", action="append", default=[])
    options = parser.parse_args()
    with open(options.file, encoding="utf-8") as f:
        r = json.load(f)

    whole = [i for i, error in enumerate(r["errors"]) if not error]
    lens = [r["output_lens"][i] for i in whole]
    gaps = [r["itls"][i] for i in whole]
    ttft = [r["ttfts"][i] for i in whole]
    if "latencies" in r:
        e2el = [r["latencies"][i] for i in whole]
    else:
        e2el = [first + sum(g) for first, g in zip(ttft, gaps)]
    # One token a gap, where a chunk is a token: first and gaps add up to the whole.
    for first, g, all_, n in zip(ttft, gaps, e2el, lens):
        if len(g) == n - 1 and abs(first + sum(g) - all_) > 1e-6:
            check("TTFT and gaps", all_, first + sum(g), 1e-6)
    tpot = {i: (a - t) / (n - 1) for i, (a, t, n) in enumerate(zip(e2el, ttft, lens)) if n > 1}

    check("completed", r["completed"], len(whole))
    check("total_input_tokens", r["total_input_tokens"], sum(r["input_lens"][i] for i in whole))
    check("total_output_tokens", r["total_output_tokens"], sum(lens))
    # Our clock begins with the first arrival, vLLM's with the first dispatch.
    begin = r.get("amalgam_arrivals", r["start_times"])
    duration = max(r["start_times"][i] + a for i, a in zip(whole, e2el)) - min(begin[i] for i in whole)
    check("duration", r["duration"], duration, 1e-9 if "amalgam_arrivals" in r else 0.01)
    duration = r["duration"]
    check("request_throughput", r["request_throughput"], len(whole) / duration)
    check("output_throughput", r["output_throughput"], sum(lens) / duration)

    pooled = [gap for g in gaps for gap in g]
    for name, values in (("ttft", ttft), ("tpot", list(tpot.values())), ("itl", pooled), ("e2el", e2el)):
        mean = math.fsum(values) / len(values)
        found = {
            "mean": mean,
            "median": percentile(values, 50),
            "std": math.sqrt(math.fsum((v - mean) ** 2 for v in values) / len(values)),
        }
        for p in ("90", "99"):
            if f"p{p}_{name}_ms" in r:
                found[f"p{p}"] = percentile(values, float(p))
        for what, value in found.items():
            check(f"{what}_{name}_ms", r.get(f"{what}_{name}_ms"), value * 1e3, 1e-7)

    limits = {}
    for text in options.goodput:
        name, ms = text.split(":")
        limits[name] = float(ms) / 1e3
    if limits:
        def good(i):
            return (ttft[i] <= limits.get("ttft", math.inf)
                    and tpot.get(i, 0) <= limits.get("tpot", math.inf)
                    and e2el[i] <= limits.get("e2el", limits.get("e2e", math.inf)))
        check("request_goodput", r["request_goodput"], sum(map(good, range(len(whole)))) / duration)
    print(f"{failed} failed")
    return 1 if failed else 0


sys.exit(main())
