--- E3: how much throughput does each precision give, and on how few GPUs does it fit?
---
--- Offline: all requests are there at once. Each format runs on the smallest tensor-parallel degree
--- on which it fits (or is `oom` on 8 GPUs, and says so); throughput is compared per GPU. Two
--- baselines run beside it: dequantise-then-GEMM and static batching. Numbers are predicted by
--- the simulator; with `--device cuda` they are measured on the GPU at hand.

local serving = require("lib_serving")

local BASELINE_FORMATS = {
  dequant_first = { W4A16KV16 = true, W4A16KV8 = true, W4A16KV4 = true },
  static_batching = { W16A16KV16 = true, W4A16KV4 = true },
}

---@type Experiment
return {
  id = "e03_throughput",
  title = "Offline throughput by precision, 16 models on 5 GPUs",
  question = "How much throughput per GPU does each precision give, and where does it fit?",
  cost = "about 1 minute on 2 cores; --quick 5 s",
  axes = {
    { name = "gpu", values = serving.GPUS },
    { name = "model", values = serving.MODELS },
    { name = "precision", values = serving.FORMATS },
    { name = "baseline", values = { "none", "dequant_first", "static_batching" } },
  },
  fixed = { device = "sim", workload = "sharegpt", n_requests = 1000, seed = 1 },
  quick = {
    gpu = { "h100-sxm", "rtx4090" }, model = { "Llama-3.1-8B", "Qwen3-30B-A3B" },
    precision = { "W16A16KV16", "W4A16KV16", "W4A16KV4" }, n_requests = { 200 },
  },
  where = function(point)
    if point.baseline == "none" then return true end
    return BASELINE_FORMATS[point.baseline][point.precision] or false
  end,
  jobs = "parallel",
  timeout_s = 120,
  run = function(amalgam, point)
    local chosen = serving.choose_tp(amalgam, point, point.precision)
    if chosen.status ~= "ok" then return chosen end
    local result = amalgam.serve(serving.with_baseline({
      model = point.model, weights = "synthetic", precision = point.precision,
      device = point.device, gpu = point.gpu, tp = chosen.tp,
      workload = { preset = point.workload, n_requests = point.n_requests, seed = point.seed },
    }, point.baseline))
    if result.status ~= "ok" then return result end
    local metrics = serving.kept(result.metrics)
    metrics.output_tokens_per_s_per_gpu = metrics.output_tokens_per_s / chosen.tp
    metrics.requests_per_s_per_gpu = metrics.requests_per_s / chosen.tp
    return { status = "ok", origin = result.origin, tp = chosen.tp, metrics = metrics }
  end,
}
