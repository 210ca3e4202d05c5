--- Foreign server: vLLM. Prompts go as token ids. Without the variable there is no way to empty the
--- prefix cache between points. (Options, paths and events compared with the source of 0.33.0; not run.)
return {
  name = "vllm",
  title = "vLLM",
  version = "0.11 or later",
  url = "http://127.0.0.1:8000",
  ready = "/health",
  reset = "/reset_prefix_cache",
  env = { VLLM_SERVER_DEV_MODE = "1" },
  -- {model}, {tp} and {ctx} are replaced; one row a precision, "base" always.
  command = {
    base = {
      "vllm", "serve", "{model}", "--host", "127.0.0.1", "--port", "8000",
      "--tensor-parallel-size", "{tp}", "--max-model-len", "{ctx}",
      "--max-num-seqs", "256", "--max-num-batched-tokens", "8192",
      "--gpu-memory-utilization", "0.9",
    },
    W16A16KV16 = {},
    W4A16KV16 = { "--quantization", "awq_marlin" },
    WFP8AFP8KV16 = { "--quantization", "fp8" },
    W16A16KVFP8 = { "--kv-cache-dtype", "fp8" },
    W4A16KVFP8 = { "--quantization", "awq_marlin", "--kv-cache-dtype", "fp8" },
  },
  request = { path = "/v1/completions", prompts = "ids" },
}
