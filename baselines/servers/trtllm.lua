--- Foreign server: TensorRT-LLM's trtllm-serve with the PyTorch backend. Prompts go as token ids. The
--- format is that of the checkpoint; the KV cache's is set in the file of extra options.
return {
  name = "trtllm",
  title = "TensorRT-LLM",
  version = "1.0 or later",
  url = "http://127.0.0.1:8001",
  ready = "/health",
  -- {model}, {tp}, {ctx} and {folder} (for the files below) are replaced.
  command = {
    base = {
      "trtllm-serve", "{model}", "--backend", "pytorch", "--host", "127.0.0.1", "--port", "8001",
      "--tp_size", "{tp}", "--max_seq_len", "{ctx}", "--max_batch_size", "256",
      "--max_num_tokens", "8192", "--kv_cache_free_gpu_memory_fraction", "0.9",
    },
    W16A16KV16 = {},
    W4A16KV16 = {},
    WFP8AFP8KV16 = {},
    WFP8AFP8KVFP8 = { "--extra_llm_api_options", "{folder}/kv_fp8.yaml" },
  },
  files = { ["kv_fp8.yaml"] = "kv_cache_config:\n  dtype: fp8\n" },
  request = { path = "/v1/completions", prompts = "ids" },
}
