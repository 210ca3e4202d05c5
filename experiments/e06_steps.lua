--- E6: how close to the hardware is one step of a model?
---
--- A decode step of 1, 16 and 64 sequences of 4096 tokens and a prefill of 8192 tokens (of as
--- many as the model reads, if fewer), with random weights made in the format, against the
--- roofline: the bytes that the step must read over the read ceiling, or its operations over the
--- matrix rate, whichever is longer; and beside it the same of each operation by itself, added up
--- (serial_us). On the simulator, the default, step and ceilings are
--- predicted from the data sheet; `amalgam run e06 --device cuda` measures all three in one
--- process on the GPU at hand.

local serving = require("lib_serving")

local BATCHES, CONTEXT, PREFILL = { 1, 16, 64 }, 4096, 8192

---@type Experiment
return {
  id = "e06_steps",
  title = "Decode and prefill steps against the roofline, 16 models",
  question = "How close to the hardware is one step of a model, by format and batch?",
  cost = "about 40 s on 2 cores; with --device cuda about 7 minutes on an H200; --quick 5 s",
  axes = {
    { name = "gpu", values = { "a100-80gb", "h100-sxm", "h200" } },
    { name = "model", values = serving.MODELS },
    { name = "precision", values = { "W16A16KV16", "W8A8KV8", "WFP8AFP8KVFP8", "WMXFP4A16KV8",
      "W4A16KV8", "W4A16KV4", "W4A8KV8", "W4g32A16KV8" } },
  },
  fixed = { device = "sim", tp = 1 },
  quick = {
    gpu = { "h200" }, model = { "Llama-3.1-8B", "Qwen3-30B-A3B" },
    precision = { "W16A16KV16", "W4A16KV8" },
  },
  -- Groups of 32 are for the one model whose widths groups of 128 do not divide.
  where = function(point)
    return point.precision ~= "W4g32A16KV8" or point.model == "gpt-oss-120b"
  end,
  jobs = "parallel",
  timeout_s = 120,
  run = function(amalgam, point)
    local limit = amalgam.model(point.model).ctx_max
    local options = { -- of long steps fewer than 100: bench step stops after 0.4 s
      model = point.model, precision = point.precision, device = point.device, tp = point.tp,
      batch = BATCHES, ctx = math.min(CONTEXT, limit), prefill = math.min(PREFILL, limit),
      steps = 100,
    }
    if point.device == "sim" then options.gpu = point.gpu end
    local lines, status, reason = amalgam.bench("step", options)
    if not lines then return { status = status, reason = reason } end
    local metrics = {}
    for _, line in ipairs(lines) do
      local name = line.new > 1 and "prefill" or ("b%d"):format(math.tointeger(line.batch))
      metrics[name .. "_us"] = line.us
      metrics[name .. "_roofline_us"] = line.roofline_us
      metrics[name .. "_serial_us"] = line.serial_us
      metrics[name .. "_roofline_share"] = line.roofline_us / line.us
      metrics.read_gb_per_s, metrics.matrix_tflops = line.read_gb_per_s, line.matrix_tflops
      if line.new > 1 then metrics.prefill_tokens = line.new end
      if point.device == "cuda" then
        metrics[name .. "_sm_clock_mhz"] = line.sm_clock_mhz
        metrics[name .. "_power_w"] = line.power_w
        metrics[name .. "_throttle_bits"] = line.throttle_bits
      end
    end
    return { status = "ok", metrics = metrics }
  end,
}
