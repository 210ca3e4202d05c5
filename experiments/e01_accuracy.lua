--- E1: what do weight, activation and KV formats cost in accuracy?
---
--- The tiny checkpoint is evaluated on text and tasks that it never saw, on the cpu device, which
--- defines what each format means. Perplexity is over a sliding window; a task counts when the
--- greedy answer is exactly right. Greedy agreement with 16 bit and KL divergence from it are over
--- the beginning of the same text, every position given what the text has before it.

local PRECISION = { ["16"] = "W16", ["8"] = "W8", ["4g128"] = "W4", ["4g64"] = "W4g64",
  ["4g32"] = "W4g32", FP8 = "WFP8", MXFP4 = "WMXFP4" }

---@type Experiment
return {
  id = "e01_accuracy",
  title = "Accuracy of the tiny checkpoint by weight, activation and KV format",
  question = "What do weight, activation and KV formats cost in perplexity and exact answers?",
  cost = "about 4 minutes on 2 cores; --quick 6 s",
  origin = "reference",
  axes = {
    { name = "weight", values = { "16", "8", "FP8", "4g128", "4g64", "4g32", "MXFP4" } },
    { name = "activation", values = { "A16", "A8", "AFP8" } },
    { name = "kv", values = { "KV16", "KV8", "KVFP8", "K8V4", "KV[8x2,4x4]", "KV4" } },
  },
  fixed = {
    model = "tiny", device = "cpu", text_bytes = 32768, text_seed = 0,
    agreement_bytes = 8192, -- two engines read it
    n_arithmetic = 500, n_recall = 24, -- recall reads hundreds of tokens for one answer
    window = 512, stride = 384,
  },
  quick = { weight = { "16", "4g128" }, activation = { "A16" }, kv = { "KV16", "KV4" },
    text_bytes = { 4096 }, agreement_bytes = { 2048 }, n_arithmetic = { 20 },
    n_recall = { 4 } },
  -- 8-bit activations go with 8-bit weights of the same kind, int8 with 4 bits too, and there with
  -- 16 bits and a cache of that kind, or one of the weights' bits; a list by layer (the tiny model
  -- has six) goes with two weight formats.
  where = function(point)
    if point.activation == "A16" then
      return not point.kv:find("[", 1, true) or point.weight == "16" or point.weight == "4g128"
    end
    local fp8 = point.activation == "AFP8"
    local four = not fp8 and point.weight == "4g128"
    if not four and point.weight ~= (fp8 and "FP8" or "8") then return false end
    return point.kv == "KV16" or point.kv == "KV8" or (fp8 and point.kv == "KVFP8")
      or (four and point.kv == "KV4")
  end,
  jobs = "parallel",
  timeout_s = 300,
  run = function(amalgam, point)
    local precision = PRECISION[point.weight] .. point.activation .. point.kv
    local source = amalgam.identity().root .. "/workloads/tiny"
    local result = amalgam.evaluate {
      model = source,
      precision = precision, device = point.device, threads = 1,
      text = { seed = point.text_seed, bytes = point.text_bytes },
      tasks = {
        { kind = "arithmetic", n = point.n_arithmetic }, { kind = "recall", n = point.n_recall },
      },
      window = point.window, stride = point.stride,
    }
    local beside = amalgam.evaluate {
      model = source, precision = precision, device = point.device, threads = 1, against = source,
      text = { seed = point.text_seed, bytes = point.agreement_bytes },
      window = point.window, stride = point.stride,
    }
    for _, name in ipairs({ "greedy_agreement", "kl_nats", "kl_nats_max" }) do
      result.metrics[name] = beside.metrics[name]
    end
    result.precision = amalgam.precision(precision)
    return result
  end,
}
