"""Our adapter for llama.cpp against a llama-server built from its source: every precision it is set up for.

    python3 llama_cpp_server.py AMALGAM LLAMA_SERVER MODEL.gguf

LLAMA_SERVER is the program itself. MODEL.gguf is the tiny checkpoint as llama.cpp's convert_hf_to_gguf.py
writes it (its tokenizer is not one that the converter knows; any pre-tokenizer will do, prompts go as ids).
Starts each command that `amalgam servers llama_cpp` prints, runs the one that measures, and checks that all
requests came back with the tokens asked for.
"""
import json
import os
import shlex
import subprocess
import sys
import tempfile
import time
import urllib.request

REQUESTS, PROMPT, OUTPUT, CTX = 20, 64, 32, 256


def wait_for(url, process):
    for _ in range(300):
        if process.poll() is not None:
            raise SystemExit(f"the server ended with {process.returncode}")
        try:
            with urllib.request.urlopen(url, timeout=1) as answer:
                if answer.status == 200:
                    return
        except OSError:
            time.sleep(0.1)
    raise SystemExit("the server did not become ready")


def run(amalgam, server, model, precision):
    lines = subprocess.run([amalgam, "servers", "llama_cpp", "--model", model, "--precision", precision,
                            "--ctx", str(CTX)], check=True, capture_output=True, text=True).stdout.splitlines()
    start, measure = shlex.split(lines[0]), shlex.split(lines[1])
    assert start[0] == "llama-server" and measure[:3] == ["amalgam", "bench", "serve"], lines
    at = measure.index("--url") + 1
    with tempfile.TemporaryDirectory() as folder:
        result = os.path.join(folder, "result.json")
        process = subprocess.Popen([server] + start[1:], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            wait_for(measure[at] + "/health", process)
            subprocess.run([amalgam] + measure[1:] + ["--workload", "fixed", "--n", str(REQUESTS),
                            "--prompt-tokens", str(PROMPT), "--output-tokens", str(OUTPUT), "--users", "8",
                            "--save-result", result], check=False, stdout=subprocess.DEVNULL)
            with open(result, encoding="utf-8") as f:
                r = json.load(f)
        finally:
            process.terminate()
            process.wait()
    assert r["completed"] == REQUESTS and r["failed"] == 0, r
    assert r["total_input_tokens"] == REQUESTS * PROMPT, r["total_input_tokens"]
    assert r["total_output_tokens"] == REQUESTS * OUTPUT, r["total_output_tokens"]
    print(f"{precision}: {r['output_throughput']:.0f} tokens/s, {r['mean_tpot_ms']:.2f} ms a token")


def main():
    amalgam, server, model = sys.argv[1:4]
    listed = subprocess.run([amalgam, "servers"], check=True, capture_output=True, text=True).stdout
    line = next(x for x in listed.splitlines() if x.startswith("llama_cpp"))
    for precision in line.split(": ", 1)[1].split():
        run(amalgam, server, model, precision)
    print("ok")


if __name__ == "__main__":
    main()
