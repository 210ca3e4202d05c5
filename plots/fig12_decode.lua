--- Figure 12: decode bandwidth by KV format and shape.
local SHAPES = { "1x4096", "8x4096", "64x1024", "64x4096", "256x4096", "256x16384",
  "1x131072" }
local KVS = { "KV16", "KV8", "KVFP8", "K8V4", "KV4" }

return {
  experiment = "e08_attention",
  title = "Decode attention by KV format (measured)",
  caption = "Decode attention of one layer straight from the paged cache (32 query and 8 KV heads, "
    .. "head dim 128, fp16): bytes of K, V and their parameters a second, as a share of the read "
    .. "bandwidth measured in the same process, by batch x context. 100 % is a plain read of "
    .. "2 GiB, which a kernel may pass.",
  build = function(data)
    local rows = {}
    for at, kv in ipairs(KVS) do
      local found = data:row("e08", { variant = "best", phase = "decode", kv = kv, dtype = "fp16" })
      for i, shape in ipairs(SHAPES) do
        local batch, ctx = shape:match("(%d+)x(%d+)")
        local gbs = found and found.metrics[("b%s_c%s_gbs"):format(batch, ctx)]
        if gbs then rows[#rows + 1] = { kv, at, i, shape, 100 * gbs / found.metrics.read_gbs } end
      end
    end
    return { "name", "series", "x", "shape", "value" }, rows
  end,
}
