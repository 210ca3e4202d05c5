--- Figure 14: decode bandwidth by KV format and shape; prefill rate by length.
local peers = require("peers")

local SHAPES = { "1x4096", "8x4096", "64x1024", "64x4096", "256x4096", "256x16384" }
local LENGTHS = { 1024, 2048, 4096, 8192, 16384 }
local KVS = { "KV16", "KV8", "KVFP8", "K8V4", "KV4" }

return {
  experiment = "e08_attention",
  title = "Attention by KV format",
  caption = "Attention of one layer straight from the paged cache (32 query and 8 KV heads, head "
    .. "dim 128). Left: decode, share of the read bandwidth measured in the same process, fp16, "
    .. "batch x context. Right: causal prefill of one sequence, bf16; dashed: cuDNN and TurboMind "
    .. "on 16-bit caches, measured once on another H200 (plots/peers.lua).",
  build = function(data)
    local rows = {}
    for at, kv in ipairs(KVS) do
      local decode = data:row("e08",
        { variant = "best", phase = "decode", kv = kv, dtype = "fp16" })
      for i, shape in ipairs(SHAPES) do
        local batch, ctx = shape:match("(%d+)x(%d+)")
        local gbs = decode and decode.metrics[("b%s_c%s_gbs"):format(batch, ctx)]
        if gbs then
          rows[#rows + 1] = { "decode", kv, at, i, shape, 100 * gbs / decode.metrics.read_gbs }
        end
      end
      local prefill = data:row("e08",
        { variant = "best", phase = "prefill", kv = kv, dtype = "bf16" })
      for _, n in ipairs(LENGTHS) do
        local rate = prefill and prefill.metrics[("b1_c%d_tflops"):format(n)]
        if rate then rows[#rows + 1] = { "prefill", kv, at, n, tostring(n), rate } end
      end
    end
    if #rows > 0 then
      for _, n in ipairs(LENGTHS) do
        rows[#rows + 1] = { "prefill", "cuDNN", 6, n, tostring(n), peers.prefill_cudnn[n] }
        rows[#rows + 1] = { "prefill", "TurboMind", 7, n, tostring(n), peers.prefill_turbomind[n] }
      end
    end
    return { "phase", "name", "series", "x", "shape", "value" }, rows
  end,
}
