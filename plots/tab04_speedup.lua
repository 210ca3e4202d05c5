--- Table 4: throughput of each format over 16 bits on one GPU, with the geometric mean.
local accuracy = require("accuracy")
local labels = require("labels")
local stats = require("lib_stats")

local GPU = "h100-sxm"

return {
  experiment = "e03_throughput",
  predicted = true,
  title = "Speed-up by model and format",
  caption = "Predicted offline throughput on H100-SXM: output tokens/s per GPU of W16A16KV16, and "
    .. "the other formats relative to it, with the tensor-parallel degree after \"@\"; "
    .. "\"-\": refused, since groups of 128 do not divide its widths; " .. labels.eight_bit_units
    .. accuracy.note,
  build = function(data)
    local columns, rows = { "model", labels.base .. " (tokens/s)" }, {}
    local ratios = {}
    for _, f in ipairs(labels.formats) do columns[#columns + 1] = labels.format_title[f] or f end
    for _, model in ipairs(data.ordered(labels.models, data:distinct("e03", "model"))) do
      local function of(precision)
        return data:row("e03",
          { gpu = GPU, model = model, baseline = "none", precision = precision })
      end
      local base = of(labels.base)
      local b = base and base.metrics.output_tokens_per_s_per_gpu
      local row, any = { model, base and ("%.0f @%d"):format(b, base.key.tp) or "-" }, base ~= nil
      for i, precision in ipairs(labels.formats) do
        local found = of(precision)
        local x = found and found.metrics.output_tokens_per_s_per_gpu
        any = any or found ~= nil
        if x and b then
          ratios[i] = ratios[i] or {}
          table.insert(ratios[i], x / b)
          row[#row + 1] = ("%.2f @%d"):format(x / b, found.key.tp)
        else
          row[#row + 1] = x and ("%.0f tokens/s @%d"):format(x, found.key.tp) or "-"
        end
      end
      if any then rows[#rows + 1] = row end
    end
    if #rows > 0 then
      local mean = { "**geometric mean**", "" }
      for i = 1, #labels.formats do
        mean[i + 2] = ratios[i] and ("**%.2f**"):format(stats.geomean(ratios[i])) or "-"
      end
      rows[#rows + 1] = mean
      rows[#rows + 1] = accuracy.row(data, { accuracy.title, accuracy.of(data, labels.base) })
    end
    return columns, rows
  end,
}
