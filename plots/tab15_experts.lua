--- Table 15: layers of experts against their bytes and arithmetic.
local SHOWN = { 1, 4, 16, 32, 64, 128, 256, 512, 1024, 4096 }
local PRODUCTS = { gate_up = "gate, up", down = "down" }

return {
  experiment = "e12_experts",
  title = "Layers of experts against their bound",
  caption = "Measured time of one layer's experts over its bound, by tokens: gate and up of all "
    .. "experts in one launch with the gated activation, and down, in bf16, tokens to experts at "
    .. "random. The bound is the longer of bytes (of experts that are hit, of rows in and out) and "
    .. "arithmetic, at the read ceiling and cuBLAS's matrix rate of the same process; error is "
    .. "the largest of ||y - ref|| / ||ref|| against float64. \"-\": not measured.",
  build = function(data)
    local columns, rows = { "model", "product", "format" }, {}
    for _, m in ipairs(SHOWN) do columns[#columns + 1] = tostring(m) end
    columns[#columns + 1] = "us at 1"
    columns[#columns + 1] = "us at 1024"
    columns[#columns + 1] = "error"
    for _, model in ipairs(data:distinct("e12", "model")) do
      for _, precision in ipairs({ "W4A16", "WMXFP4A16", "W16A16" }) do
        for _, product in ipairs({ "gate_up", "down" }) do
          local found = data:row("e12",
            { model = model, product = product, precision = precision })
          if found then
            local row = { model, PRODUCTS[product], precision }
            for _, m in ipairs(SHOWN) do
              local ratio = found.metrics[("m%d_ratio"):format(m)]
              row[#row + 1] = ratio and ("%.2f"):format(ratio) or "-"
            end
            row[#row + 1] = ("%.1f"):format(found.metrics.m1_us)
            row[#row + 1] = ("%.0f"):format(found.metrics.m1024_us)
            row[#row + 1] = ("%.1e"):format(found.metrics.rel_err)
            rows[#rows + 1] = row
          end
        end
      end
    end
    return columns, rows
  end,
}
