--- E2: how does latency under load depend on the precision?
---
--- 16 models on 5 GPUs serve the same conversations at rates that are the same for all formats of a
--- model and GPU: fractions of what the 16-bit form sustains there. All formats of a pair use the
--- tensor-parallel degree that the 16-bit form needs, so that the hardware is equal; where 16 bits
--- do not fit on 8 GPUs, the form with 4-bit weights is the reference instead. A format that cannot
--- be split to that degree (a rank's share is no multiple of its group) runs on the smallest degree
--- that it allows, which the row's tp shows. Numbers are predicted by the
--- simulator; with `--device cuda` they are measured on the GPU at hand.

local serving = require("lib_serving")
local fp16 = require("fp16")

local REFERENCES = { fp16.options.precision, "W4A16KV16" }

--- Degree and sustained rate of the first reference form that fits: once for all formats and loads,
--- so that those of a measurement come at the same rates, too.
local function reference(amalgam, point)
  local why
  for _, precision in ipairs(REFERENCES) do
    local chosen = serving.choose_tp(amalgam, point, precision)
    if chosen.status == "ok" then
      local run = amalgam.serve {
        model = point.model, weights = "synthetic", precision = precision, device = point.device,
        gpu = point.gpu, tp = chosen.tp,
        workload = { preset = point.workload, n_requests = 600, seed = point.seed },
      }
      if run.status ~= "ok" then return run end
      return { status = "ok", tp = chosen.tp, rate = serving.sustained_requests_per_s(run.metrics) }
    end
    why = chosen
  end
  return why
end

---@type Experiment
return {
  id = "e02_serving_latency",
  title = "Serving latency by precision, 16 models on 5 GPUs",
  question = "How do TTFT, TPOT and end-to-end latency under load depend on the precision?",
  cost = "about 2 minutes on 2 cores; --quick 5 s",
  axes = {
    { name = "gpu", values = serving.GPUS },
    { name = "model", values = serving.MODELS },
    { name = "precision", values = serving.FORMATS },
    { name = "load", values = { 0.25, 0.5, 0.75, 1.0, 1.5 } },
  },
  fixed = { device = "sim", workload = "sharegpt", n_requests = 700, seed = 1, baseline = "none" },
  quick = {
    gpu = { "h100-sxm" }, model = { "Llama-3.1-8B", "Qwen3-30B-A3B" },
    precision = { "W16A16KV16", "W4A16KV16", "W4A16KV4" }, load = { 0.5, 1.0 },
    n_requests = { 100 },
  },
  jobs = "parallel",
  timeout_s = 120,
  shared = { by = { "gpu", "model" }, run = reference },
  run = function(amalgam, point, base)
    if base.status ~= "ok" then return base end
    local rate = point.load * base.rate
    local function serve(tp)
      local result = amalgam.serve {
        model = point.model, weights = "synthetic", precision = point.precision,
        device = point.device, gpu = point.gpu, tp = tp,
        workload = {
          preset = point.workload, n_requests = point.n_requests, seed = point.seed,
          arrival = "poisson", rate_per_s = rate,
        },
      }
      result.tp = tp
      return result
    end
    local result = serve(base.tp)
    if result.status == "skipped" then
      local own = serving.choose_tp(amalgam, point, point.precision)
      if own.status ~= "ok" then return own end
      result = serve(own.tp)
    end
    if result.status ~= "ok" then return result end
    local metrics = serving.kept(result.metrics)
    metrics.rate_per_s = rate
    metrics.reference_requests_per_s = base.rate
    return { status = "ok", origin = result.origin, tp = result.tp, metrics = metrics }
  end,
}
