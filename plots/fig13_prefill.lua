--- Figure 13: prefill rate by KV format and length, beside other systems.
local peers = require("peers")

local LENGTHS = { 1024, 2048, 4096, 8192, 16384 }
local KVS = { "KV16", "KV8", "KVFP8", "K8V4", "KV4" }

return {
  experiment = "e08_attention",
  title = "Prefill attention by KV format",
  caption = "Causal prefill attention of one sequence over the paged cache (32 query and 8 KV "
    .. "heads, head dim 128, bf16): arithmetic of the two products a second, measured; where codes "
    .. "are written out at 16 bit first, that is within the time. Dashed and dotted: cuDNN and "
    .. "TurboMind on 16-bit caches, run once by the same method on another H200 (plots/peers.lua).",
  build = function(data)
    local rows = {}
    for at, kv in ipairs(KVS) do
      local found = data:row("e08",
        { variant = "best", phase = "prefill", kv = kv, dtype = "bf16" })
      for _, n in ipairs(LENGTHS) do
        local rate = found and found.metrics[("b1_c%d_tflops"):format(n)]
        if rate then rows[#rows + 1] = { kv, at, n, rate } end
      end
    end
    if #rows > 0 then
      for _, n in ipairs(LENGTHS) do
        rows[#rows + 1] = { "cuDNN", 6, n, peers.prefill_cudnn[n] }
        rows[#rows + 1] = { "TurboMind", 7, n, peers.prefill_turbomind[n] }
      end
    end
    return { "name", "series", "x", "value" }, rows
  end,
}
