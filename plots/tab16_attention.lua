--- Table 16: decode times by KV format, batch and context, beside the bytes and another system.
local peers = require("peers")

local RAGGED = "63x128+131072"
local VARIANTS = { { "best", "all" }, { "expand_first", "expanded first" }, { "ampere", "Ampere" } }
local SHAPES = { "1x4096", "8x4096", "64x1024", "64x4096", "256x4096", "256x16384", "1x131072",
  RAGGED }

return {
  experiment = "e08_attention",
  title = "Decode attention",
  caption = "Measured decode attention of one layer in microseconds (32 query and 8 KV heads, head "
    .. "dim 128), by batch x context, the last of 63 sequences of 128 tokens and one of 131072; "
    .. "error is ||out - ref|| / ||ref|| against float64 over the "
    .. "dequantised cache. \"expanded first\": the baseline that writes the cache out at 16 bit "
    .. "before each launch. Rows in italics: TurboMind, measured once by the same method on "
    .. "another H200 (plots/peers.lua); \"-\": not measured.",
  build = function(data)
    local columns, rows = { "cache", "type", "kernels" }, {}
    for _, shape in ipairs(SHAPES) do columns[#columns + 1] = shape end
    columns[#columns + 1] = "error"
    for _, variant in ipairs(VARIANTS) do
      for _, kv in ipairs(data:distinct("e08", "kv")) do
        for _, dtype in ipairs({ "fp16", "bf16" }) do
          local found = data:row("e08",
            { variant = variant[1], phase = "decode", kv = kv, dtype = dtype })
          if found then
            local row = { kv, dtype, variant[2] }
            for _, shape in ipairs(SHAPES) do
              local batch, ctx = shape:match("(%d+)x(%d+)")
              local name = shape == RAGGED and "ragged_us" or ("b%s_c%s_us"):format(batch, ctx)
              row[#row + 1] = found.metrics[name] or 0 / 0
            end
            row[#row + 1] = ("%.1e"):format(found.metrics.rel_err)
            rows[#rows + 1] = row
          end
        end
      end
    end
    if #rows > 0 then
      for _, kv in ipairs({ "KV16", "KV8", "KV4" }) do
        local row = { "*" .. kv .. "*", "*fp16*", "*TurboMind*" }
        for _, shape in ipairs(SHAPES) do
          local us = peers.decode_turbomind[shape]
          row[#row + 1] = us and ("*%.4g*"):format(us[kv]) or "-"
        end
        rows[#rows + 1] = row
      end
    end
    return columns, rows
  end,
}
