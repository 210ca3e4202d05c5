--- E10: do all 16 models serve on one GPU, and is what the simulator says of it right?
---
--- 200 short conversations at once (prompts of 150 tokens in the median, answers of 67), in 16
--- bit and in 4-bit weights with an 8-bit cache, activations of 16 and of 8 bits, each model on
--- one H200. `amalgam run e10`
--- predicts, `amalgam run e10 --device cuda` measures on the GPU at hand, by the same scheduler,
--- pool and workload, so that the two rows of a point differ in nothing but the device. What does
--- not fit is `oom`, what a format cannot be cut into is `skipped`, with the reason.

local serving = require("lib_serving")

---@type Experiment
return {
  id = "e10_serving_gpu",
  title = "200 conversations on one H200, 16 models: predicted and measured",
  question = "Do all models serve, and how far is the prediction from the measurement?",
  cost = "about 10 s on 2 cores; with --device cuda about 4 minutes on an H200",
  axes = {
    { name = "precision", values = { "W4A16KV8", "W4A8KV8", "W4g32A16KV8", "WMXFP4A16KV8",
      "W16A16KV16" } },
    { name = "model", values = serving.MODELS },
  },
  fixed = {
    gpu = "h200", device = "sim", tp = 1, workload = "short_chat", n_requests = 200, seed = 1,
    ctx_max = 4096,
  },
  quick = { model = { "Llama-3.1-8B", "Qwen3-30B-A3B" }, n_requests = { 50 } },
  -- gpt-oss comes in MXFP4, and groups of 128 do not divide its widths.
  where = function(point)
    local special = point.precision == "WMXFP4A16KV8" or point.precision == "W4g32A16KV8"
    return not special or point.model == "gpt-oss-120b"
  end,
  jobs = "alone",
  timeout_s = 240,
  run = function(amalgam, point)
    local options = {
      model = point.model, weights = "synthetic", precision = point.precision,
      device = point.device, tp = point.tp,
      ctx_max = math.min(point.ctx_max, amalgam.model(point.model).ctx_max),
      workload = {
        preset = "fixed", name = point.workload, n_requests = point.n_requests, seed = point.seed,
        prompt = { mu = 5, sigma = 0.9, min = 8, max = 1024 },
        output = { mu = 4.2, sigma = 0.6, min = 8, max = 128 },
      },
    }
    if point.device == "sim" then options.gpu = point.gpu end
    local result = amalgam.serve(options)
    if result.status ~= "ok" then return result end
    result.metrics = serving.kept(result.metrics)
    return result
  end,
}
