--- E7: how fast are the linear layers, by format and batch, and what did each idea buy?
---
--- `amalgam bench linear` over six matrices of Llama-3.1-8B and -70B: the time of a launch beside
--- that of cuBLAS in fp16 in the same process, weights taken in turn from more than 260 MB. `best`
--- is what the engine launches; `ampere` the kernels for GPUs before Hopper, on the same GPU; the
--- other variants are the steps of kernels/ladder and dequantise-then-cuBLAS, for 4-bit weights.

local FORMATS = { "W4A16", "WMXFP4A16", "W8A16", "WFP8A16", "W16A16", "W4A8", "W8A8", "WFP8AFP8",
  "WFP8bAFP8" }
local LADDER = { ladder_scalar = "1,16", ladder_tensor = "1,16,64,256,1024",
  ladder_packed = "1,16,64,256,1024", ladder_pipelined = "1,16,64,256,1024",
  ladder_convert = "1,16,64,256,1024", dequant_cublas = "1,16,64,256,1024,4096" }
local ROWS = "1,2,4,8,16,32,64,128,256,512,1024,2048,4096"
local ON_AMPERE = { W4A16 = true, WMXFP4A16 = true, W8A16 = true }

---@type Experiment
return {
  id = "e07_linear",
  title = "Linear layers by format and batch, and the steps to them (measured)",
  question = "How fast is a linear layer in each format, and what did each idea buy?",
  cost = "about 5 minutes on an H200; --quick 10 s",
  origin = "measured",
  needs = "gpu",
  axes = {
    { name = "variant", values = { "best", "ampere", "ladder_scalar", "ladder_tensor",
      "ladder_packed", "ladder_pipelined", "ladder_convert", "dequant_cublas" } },
    { name = "precision", values = FORMATS },
    { name = "dtype", values = { "fp16", "bf16" } },
    { name = "shape", values = { "6144x4096", "4096x4096", "28672x4096", "4096x14336",
      "57344x8192", "8192x28672" } },
  },
  fixed = { device = "cuda", replays = 7 },
  quick = { precision = { "W4A16" }, dtype = { "fp16" }, shape = { "4096x4096" } },
  where = function(point)
    if point.variant == "best" then return true end
    if point.dtype ~= "fp16" then return false end
    if point.variant == "ampere" then return ON_AMPERE[point.precision] ~= nil end
    return point.precision == "W4A16"
  end,
  jobs = "alone",
  timeout_s = 120,
  run = function(amalgam, point)
    local weights, act = point.precision:match("^W(.+)A(%w+)$")
    local options = { weights = "w" .. weights, act = "a" .. act, dtype = point.dtype,
      shape = point.shape, m = LADDER[point.variant] or ROWS, replays = point.replays }
    if point.variant == "ampere" then options.kernel_family = "ampere" end
    if LADDER[point.variant] then options.kernel = point.variant end
    local lines, status, reason = amalgam.bench("linear", options)
    if not lines then return { status = status, reason = reason } end
    local metrics = { rel_err = 0 }
    for _, line in ipairs(lines) do
      local m = math.tointeger(line.m)
      metrics[("m%d_us"):format(m)] = line.us
      metrics[("m%d_speedup"):format(m)] = line.speedup
      metrics.rel_err = math.max(metrics.rel_err, line.rel_err)
    end
    return { status = "ok", metrics = metrics }
  end,
}
