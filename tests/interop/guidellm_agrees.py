"""guidellm and `amalgam bench serve` on the same server, prompts and arrivals: the same figures within 3 %.

    pip install guidellm
    python tests/interop/guidellm_agrees.py build/amalgam workloads/tiny [cpu|sim]

cpu: the tiny checkpoint, one thread. sim: the shape of a 70B model at the speed predicted for it, so that
the server costs next to nothing and is as fast in every turn: only clients differ. Both send the same texts
and take turns; medians over the turns are compared. The server's own histograms are the third witness.

What must be the same for figures to be the same:

  the load      Arrivals at a constant rate, prefix cache off. In a closed loop the pause between an answer
                and the next request is part of the load, and a Python client's is milliseconds: its
                request then comes behind a prefill that has begun. Four users on two shared cores: time to
                first token 452 ms by our client, 526 by guidellm, and the server itself said 450 and 522.
  the machine   Clients share no core with the engine's thread (taskset). On the cpu device the server's
                speed is the machine's: each client is compared through the server's own figures of its
                turns, and directly where those were steady to 1 %.
  the clock     guidellm's starts when headers are written, after the connection is there; ours when the
                request is handed over ("from dispatch"). A connection on one host takes 0.1 ms.
  the event     guidellm's first token is the first event with text in it; ours, as vLLM's, the first with a
                choice, which may hold back an unfinished character. Those that differ are counted.

Prints one line a figure and ends with status 1 when one is further off than 3 %.
"""

import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request

AMALGAM, TINY = sys.argv[1], sys.argv[2]
WHAT = sys.argv[3] if len(sys.argv) > 3 else "cpu"
PORT, TURNS = 8123, 3
URL = f"http://127.0.0.1:{PORT}"
LIMIT, STEADY = 0.03, 0.01
LOAD = {"cpu": {"rate": 1.5, "n": 45, "bytes": 1200, "out": 32},
        "sim": {"rate": 2, "n": 40, "bytes": 2000, "out": 48}}[WHAT]
HELD_OUT = 1 << 40  # seeds of text that the tiny model has not seen

failed = 0


def check(name, ours, theirs):
    global failed
    off = ours / theirs - 1
    failed += not abs(off) <= LIMIT
    print(f"{'ok  ' if abs(off) <= LIMIT else 'FAIL'}  {name:28s} ours {ours:10.3f}  guidellm {theirs:10.3f}"
          f"  {100 * off:+.1f} %", flush=True)


def write_prompts(folder):
    with open(f"{folder}/theirs.jsonl", "w") as theirs, open(f"{folder}/ours.jsonl", "w") as ours:
        for i in range(LOAD["n"]):
            text = subprocess.run([AMALGAM, "corpus", "--bytes", str(LOAD["bytes"]), "--seed",
                                   str(HELD_OUT + i)], capture_output=True, text=True, check=True).stdout
            text = text[:LOAD["bytes"]]
            print(json.dumps({"prompt": text, "output_tokens_count": LOAD["out"]}), file=theirs)
            print(json.dumps({"prompt": text, "max_new": LOAD["out"]}), file=ours)


def large_model(folder):
    """The shape of Llama-3.1-70B with the tiny model's vocabulary and tokenizer."""
    model = f"{folder}/large"
    os.mkdir(model)
    with open("workloads/models/Llama-3.1-70B/config.json") as f:
        config = json.load(f)
    config["vocab_size"] = 2048
    config["bos_token_id"] = config["eos_token_id"] = 0
    with open(f"{model}/config.json", "w") as f:
        json.dump(config, f)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(f"{TINY}/{name}", model)
    return model


def start_server(folder):
    command = ["taskset", "-c", "0", AMALGAM, "serve", "--port", str(PORT), "--no-prefix-cache",
               "--ctx", "2048", "--served-model-name", "m"]
    if WHAT == "cpu":
        command += ["--model", TINY, "--threads", "1"]
    else:
        command += ["--model", large_model(folder), "--device", "sim", "--gpu", "h200", "--precision",
                    "W8A16KV16", "--synthetic"]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    if not server.stdout.readline():
        sys.exit("the server did not start")
    return server


def server_means():
    """Sum and count of the server's histograms."""
    found = {}
    for line in urllib.request.urlopen(URL + "/metrics").read().decode().splitlines():
        for name in ("time_to_first_token_seconds", "e2e_request_latency_seconds"):
            for part in ("sum", "count"):
                if line.startswith(f"vllm:{name}_{part}"):
                    found[name, part] = float(line.split()[-1])
    return found


def between(before, after, name):
    n = after[name, "count"] - before[name, "count"]
    return 1000 * (after[name, "sum"] - before[name, "sum"]) / n


def run_ours(folder):
    path = f"{folder}/ours.json"
    done = subprocess.run(["taskset", "-c", "1", AMALGAM, "bench", "serve", "--url", URL, "--workload",
                    f"{folder}/ours.jsonl", "--format", "jsonl", "--tokenizer", TINY, "--n",
                    str(LOAD["n"]), "--rate", str(LOAD["rate"]), "--burstiness", "inf",
                    "--save-result", path], capture_output=True, text=True)
    if not os.path.exists(path):
        sys.exit(done.stdout + done.stderr)
    with open(path) as f:
        r = json.load(f)
    os.unlink(path)
    if r["completed"] != LOAD["n"]:
        sys.exit(done.stdout)
    if not r["amalgam_valid"]:  # of some use still: the clock is the dispatch's, and turns have a median
        print(f"a request went out {r['amalgam_lag_p99_ms']:.1f} ms late")
    return {"ttft mean ms": r["mean_ttft_ms"], "ttft median ms": r["median_ttft_ms"],
            "itl mean ms": r["mean_tpot_ms"], "e2e mean ms": r["mean_e2el_ms"],
            "e2e median ms": r["median_e2el_ms"], "output tokens": r["total_output_tokens"],
            "prompt tokens": r["total_input_tokens"]}


def run_theirs(folder):
    path = f"{folder}/theirs.json"
    environment = dict(os.environ, HF_HUB_OFFLINE="1", GUIDELLM__MAX_WORKER_PROCESSES="1")
    done = subprocess.run(
        ["taskset", "-c", "1", "guidellm", "run",
         "--backend", f"kind=openai_http,target={URL},request_format=/v1/completions,model=m",
         "--profile", f"kind=constant,rate={LOAD['rate']}",
         "--data", f"kind=json_file,path={folder}/theirs.jsonl",
         "--constraint", f"kind=max_requests,count={LOAD['n']}",
         "--tokenizer", f"kind=hf_auto,model={TINY}", "--output", f"kind=json,path={path}",
         "--disable-console"], env=environment, capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stdout + done.stderr)
    with open(path) as f:
        benchmark = json.load(f)["benchmarks"][0]
    good = benchmark["requests"]["successful"]
    different = sum(q["info"]["timings"]["first_request_iteration"]
                    != q["info"]["timings"]["first_token_iteration"] for q in good)

    def of(name, kind):
        return benchmark["metrics"][name]["successful"][kind]
    return {"ttft mean ms": of("time_to_first_token_ms", "mean"),
            "ttft median ms": of("time_to_first_token_ms", "median"),
            "itl mean ms": of("inter_token_latency_ms", "mean"),
            "e2e mean ms": 1000 * of("request_latency", "mean"),
            "e2e median ms": 1000 * of("request_latency", "median"),
            "output tokens": sum(q["output_metrics"]["total_tokens"] for q in good),
            "prompt tokens": sum(q["input_metrics"]["total_tokens"] for q in good)}, different


def main():
    with tempfile.TemporaryDirectory() as folder:
        write_prompts(folder)
        server = start_server(folder)
        ours, theirs, seen = [], [], {"ours": [], "theirs": []}
        different = 0
        try:
            for turn in range(TURNS + 1):
                before = server_means() if turn else None
                mine = run_ours(folder)
                middle = server_means()
                other, n = run_theirs(folder)
                after = server_means()
                if turn == 0:  # warm-up
                    continue
                different += n
                ours.append(mine)
                theirs.append(other)
                for who, a, b in (("ours", before, middle), ("theirs", middle, after)):
                    seen[who].append((between(a, b, "time_to_first_token_seconds"),
                                      between(a, b, "e2e_request_latency_seconds")))
                print(f"turn {turn}: ttft {mine['ttft mean ms']:.2f} and {other['ttft mean ms']:.2f} ms, "
                      f"the server says {seen['ours'][-1][0]:.2f} and {seen['theirs'][-1][0]:.2f}", flush=True)
        finally:
            server.terminate()
            server.wait()
    print(f"first events without text: {different}")
    mean = {}
    for k, name in enumerate(("ttft", "e2e")):
        for who, runs in (("ours", ours), ("theirs", theirs)):
            mean[who] = statistics.median(r[f"{name} mean ms"] / s[k] for r, s in zip(runs, seen[who]))
        check(f"{name} / the server's", mean["ours"], mean["theirs"])
    server = [statistics.median(s[0] for s in seen[who]) for who in ("ours", "theirs")]
    steady = abs(server[0] / server[1] - 1) <= STEADY
    if not steady:
        print(f"the server itself: {server[0]:.1f} and {server[1]:.1f} ms; times are not compared directly")
    for name in ours[0]:
        if steady or not name.endswith("ms"):
            check(name, statistics.median(r[name] for r in ours), statistics.median(r[name] for r in theirs))
    print(f"{failed} failed")
    return 1 if failed else 0


sys.exit(main())
