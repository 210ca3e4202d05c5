--- Foreign server: `transformers serve`, the reference implementation as a server, also on a CPU. It
--- refuses fields that it does not know, ignore_eos among them, so outputs end where the model ends
--- them. (Run with transformers 5.23 on the tiny checkpoint: 4 of 4 requests, usage counted.)
return {
  name = "transformers",
  title = "Hugging Face transformers",
  version = "5.23 or later",
  url = "http://127.0.0.1:8002",
  ready = "/health",
  -- {model} is replaced; one row a precision, "base" always.
  command = {
    base = {
      "transformers", "serve", "{model}", "--host", "127.0.0.1", "--port", "8002",
    },
    W16A16KV16 = {},
  },
  request = { path = "/v1/completions", prompts = "text", model = true, natural_end = true },
}
