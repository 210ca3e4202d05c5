--- Foreign server: llama.cpp's llama-server on a GGUF file. Prompts go as token ids, whose number it
--- tells. --ctx-size is divided among the slots. (Run as built from llama-cpp-python 0.3.36 on a CPU, on the
--- tiny checkpoint, by tests/interop/llama_cpp_server.py: all requests, usage counted, in all four.)
return {
  name = "llama_cpp",
  title = "llama.cpp",
  version = "b6400 or later",
  url = "http://127.0.0.1:8080",
  ready = "/health",
  slots = 64, -- of --parallel, which share --ctx-size
  -- {model} is a GGUF file; {ctx} is replaced by slots * context.
  command = {
    base = {
      "llama-server", "--model", "{model}", "--host", "127.0.0.1", "--port", "8080",
      "--ctx-size", "{ctx}", "--parallel", "64", "--cont-batching", "--flash-attn", "on",
      "--n-gpu-layers", "999", "--batch-size", "2048",
    },
    W16A16KV16 = {},
    W4A16KV16 = {},
    W16A16KV8 = { "--cache-type-k", "q8_0", "--cache-type-v", "q8_0" },
    W16A16KV4 = { "--cache-type-k", "q4_0", "--cache-type-v", "q4_0" },
  },
  request = { path = "/v1/completions", prompts = "ids", tells_vocab = true },
}
