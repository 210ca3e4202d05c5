--- E12: how far are the layers of experts from their bytes and arithmetic, by model and batch?
---
--- `amalgam bench linear --experts`: gate and up of all experts of a layer as one launch that
--- gathers its rows and ends in the gated activation, and down as the launch behind it. Tokens go
--- to experts at random; only experts that are hit cost bytes. The bound is the longer of both, at
--- the read ceiling and the matrix rate of the same process.

local TOKENS = "1,2,4,8,16,32,64,128,256,384,512,1024,2048,4096"
local NO_GROUPS_OF_128 = { ["gpt-oss-120b"] = true } -- its widths, 2880, are no multiple

---@type Experiment
return {
  id = "e12_experts",
  title = "Layers of experts against their bytes and arithmetic (measured)",
  question = "How far are layers of experts from the roofline, from 1 to 4096 tokens?",
  cost = "about 1.5 minutes on an H200; --quick 10 s",
  origin = "measured",
  needs = "gpu",
  axes = {
    { name = "model", values = { "Qwen3-30B-A3B", "Qwen3-235B-A22B", "Mixtral-8x7B",
      "gpt-oss-120b" } },
    { name = "product", values = { "gate_up", "down" } },
    { name = "precision", values = { "W4A16", "WMXFP4A16", "W16A16" } },
  },
  fixed = { device = "cuda", dtype = "bf16", replays = 7 },
  quick = { model = { "Qwen3-30B-A3B" }, precision = { "W4A16" } },
  where = function(point)
    return NO_GROUPS_OF_128[point.model] == (point.precision == "WMXFP4A16" or nil)
  end,
  jobs = "alone",
  timeout_s = 120,
  run = function(amalgam, point)
    local model = amalgam.model(point.model)
    local gate_up = point.product == "gate_up"
    local n, k = 2 * model.expert_ffn, model.dim
    if not gate_up then n, k = model.dim, model.expert_ffn end
    local weights, act = point.precision:match("^W(.+)A(%w+)$")
    local lines, status, reason = amalgam.bench("linear", { weights = "w" .. weights,
      act = "a" .. act, dtype = point.dtype, shape = ("%dx%d"):format(n, k), m = TOKENS,
      replays = point.replays, experts = model.experts, topk = model.top_k,
      gather = gate_up or nil, gated = gate_up or nil, routed = not gate_up or nil })
    if not lines then return { status = status, reason = reason } end
    local metrics = { rel_err = 0, read_gb_per_s = lines[1].read_gb_per_s,
      matrix_tflops = lines[1].matrix_tflops }
    for _, line in ipairs(lines) do
      local m = math.tointeger(line.m)
      metrics[("m%d_us"):format(m)] = line.us
      metrics[("m%d_ratio"):format(m)] = line.ratio
      metrics.rel_err = math.max(metrics.rel_err, line.rel_err)
    end
    return { status = "ok", metrics = metrics }
  end,
}
