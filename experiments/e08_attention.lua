--- E8: how near is attention to the memory bandwidth (decode) and to the matrix units (prefill)?
---
--- `amalgam bench attention` with the heads of Llama-3.1-8B (32 query, 8 KV, head dim 128),
--- straight from the paged cache in each KV format: microseconds of one layer, KV sets taken in
--- turn from more than 512 MB, error against float64 over the dequantised cache. `plain` is the
--- kernel that every other is compared with; `ampere` what GPUs before Hopper run; `expand_first`
--- the baseline that writes the cache out at 16 bit before each launch.

local SHAPES = {
  decode = { "1x4096", "8x4096", "64x1024", "64x4096", "256x4096", "256x16384", "1x131072",
    "63x128+131072" },
  prefill = { "1x1024", "1x2048", "1x4096", "1x8192", "1x16384" },
}
local PLAIN = { decode = { "1x4096", "64x1024" }, prefill = { "1x1024" } }

---@type Experiment
return {
  id = "e08_attention",
  title = "Attention by KV format, batch and context (measured)",
  question = "How near is attention to the limits of the hardware in each KV format?",
  cost = "about 4 minutes on an H200; --quick 20 s",
  origin = "measured",
  needs = "gpu",
  axes = {
    { name = "variant", values = { "best", "ampere", "plain", "expand_first" } },
    { name = "phase", values = { "decode", "prefill" } },
    { name = "kv", values = { "KV16", "KVFP8", "KV8", "K8V4", "KV4" } },
    { name = "dtype", values = { "fp16", "bf16" } },
  },
  fixed = { device = "cuda", heads = "32/8", head_dim = 128 },
  quick = { kv = { "KV16", "KV4" }, dtype = { "fp16" } },
  where = function(point)
    if point.variant == "expand_first" and point.kv == "KV16" then return false end
    return point.variant == "best" or point.dtype == "fp16"
  end,
  jobs = "alone",
  timeout_s = 180,
  run = function(amalgam, point)
    local plain = point.variant == "plain"
    local options = { phase = point.phase, kv = point.kv:lower(), dtype = point.dtype,
      heads = point.heads, head_dim = point.head_dim,
      shapes = (plain and PLAIN or SHAPES)[point.phase] }
    if point.variant == "ampere" then options.kernel_family = "ampere" end
    if plain then options.kernel = "plain" end
    if point.variant == "expand_first" then options.expand_first = true end
    local lines, status, reason = amalgam.bench("attention", options)
    if not lines then return { status = status, reason = reason } end
    local metrics = { rel_err = 0 }
    for _, line in ipairs(lines) do
      if line.kind == "ceiling" then
        metrics.read_gbs = line.read_gbs
      else
        local ragged = line.last ~= line.ctx
        local shape = ragged and "ragged" or ("b%d_c%d"):format(line.batch, line.ctx)
        metrics[shape .. "_us"] = line.us
        metrics[shape .. "_gbs"] = line.gbs
        metrics[shape .. "_tflops"] = line.tflops
        metrics.rel_err = math.max(metrics.rel_err, line.rel_err)
      end
    end
    return { status = "ok", metrics = metrics }
  end,
}
