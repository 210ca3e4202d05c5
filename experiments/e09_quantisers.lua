--- E9: how much of what rounding to 4 bits loses do GPTQ and AWQ win back?
---
--- `amalgam quantize` makes a checkpoint by each method from the tiny one, calibrated on text of a
--- training seed; held-out text is then scored with the codes as they were written, beside the
--- 16-bit model: perplexity, greedy agreement, KL divergence. What a method recovers is the share
--- of the loss in log-likelihood by rtn of the same format that it wins back (tab09).

---@type Experiment
return {
  id = "e09_quantisers",
  title = "Weight quantisers on the tiny checkpoint: rounding, GPTQ, AWQ",
  question = "How much of the perplexity that rounding loses do GPTQ and AWQ recover?",
  cost = "about 2 minutes on 2 cores; --quick 30 s",
  origin = "reference",
  axes = {
    { name = "method", values = { "rtn", "gptq", "awq" } },
    { name = "weight", values = { "W4", "W4gK" } },
  },
  fixed = {
    model = "tiny", device = "cpu", text_bytes = 65536, text_seed = 0, calibration_bytes = 65536,
    calibration_seed = 0, window = 256, stride = 128,
  },
  quick = { weight = { "W4" }, text_bytes = { 4096 }, calibration_bytes = { 8192 } },
  jobs = "parallel",
  timeout_s = 600,
  run = function(amalgam, point)
    local root = amalgam.identity().root
    local source = root .. "/workloads/tiny"
    local out = ("%s/build/quantised/%s_%s"):format(root, point.method, point.weight)
    amalgam.quantize {
      model = source, out = out, method = point.method, precision = point.weight, threads = 1,
      calibration = { seed = point.calibration_seed, bytes = point.calibration_bytes },
    }
    local result = amalgam.evaluate {
      model = out, precision = point.weight, device = point.device, threads = 1,
      text = { seed = point.text_seed, bytes = point.text_bytes }, against = source,
      window = point.window, stride = point.stride,
    }
    result.precision = amalgam.precision(point.weight)
    return result
  end,
}
