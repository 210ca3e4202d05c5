--- Foreign server: LMDeploy with its TurboMind engine. Its completions take text, so prompts are sent as
--- text of the model's tokenizer. (Options, paths and events compared with the source of 0.18.0; not run.)
return {
  name = "lmdeploy",
  title = "LMDeploy (TurboMind)",
  version = "0.9 or later",
  url = "http://127.0.0.1:23333",
  ready = "/health",
  -- {model}, {tp} and {ctx} are replaced; one row a precision, "base" always.
  command = {
    base = {
      "lmdeploy", "serve", "api_server", "{model}", "--backend", "turbomind",
      "--server-name", "127.0.0.1", "--server-port", "23333", "--tp", "{tp}",
      "--session-len", "{ctx}", "--max-batch-size", "256",
      "--max-prefill-token-num", "8192", "--cache-max-entry-count", "0.9",
    },
    W16A16KV16 = {},
    W4A16KV16 = { "--model-format", "awq" },
    W16A16KV8 = { "--quant-policy", "8" },
    W16A16KV4 = { "--quant-policy", "4" },
    W4A16KV8 = { "--model-format", "awq", "--quant-policy", "8" },
    W4A16KV4 = { "--model-format", "awq", "--quant-policy", "4" },
  },
  request = { path = "/v1/completions", prompts = "text" },
}
