--- Foreign server: SGLang. Prompts go as token ids. (Options, paths and events compared with the source of
--- 0.5.23; not run.)
return {
  name = "sglang",
  title = "SGLang",
  version = "0.4 or later",
  url = "http://127.0.0.1:30000",
  ready = "/health",
  reset = "/flush_cache",
  -- {model}, {tp} and {ctx} are replaced; one row a precision, "base" always.
  command = {
    base = {
      "python", "-m", "sglang.launch_server", "--model-path", "{model}", "--host", "127.0.0.1",
      "--port", "30000", "--tp-size", "{tp}", "--context-length", "{ctx}",
      "--max-running-requests", "256", "--chunked-prefill-size", "8192",
      "--mem-fraction-static", "0.9",
    },
    W16A16KV16 = {},
    W4A16KV16 = { "--quantization", "awq_marlin" },
    WFP8AFP8KV16 = { "--quantization", "fp8" },
    W16A16KVFP8 = { "--kv-cache-dtype", "fp8_e4m3" },
  },
  request = { path = "/v1/completions", prompts = "ids" },
}
