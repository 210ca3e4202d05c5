--- Table 5: throughput of each format over 16 bits, GPU by GPU, as a mean over the models.
local accuracy = require("accuracy")
local labels = require("labels")
local stats = require("lib_stats")

local METRIC = "output_tokens_per_s_per_gpu"

return {
  experiment = "e03_throughput",
  predicted = true,
  title = "Speed-up by GPU and format",
  caption = "Predicted offline throughput per GPU over W16A16KV16 (geometric mean over the models "
    .. "that fit in both formats; in brackets their number; means over different numbers are not "
    .. "to be compared); \"-\": that GPU has no FP8 units; " .. labels.eight_bit_units
    .. accuracy.note,
  build = function(data)
    local columns, rows = { "GPU" }, {}
    for _, f in ipairs(labels.formats) do columns[#columns + 1] = labels.format_title[f] or f end
    for _, gpu in ipairs(data.ordered(labels.gpus, data:distinct("e03", "gpu"))) do
      local row = { labels.gpu_title[gpu] or gpu }
      for i, precision in ipairs(labels.formats) do
        local ratios = data:ratios("e03", "model",
          { gpu = gpu, baseline = "none", precision = precision },
          { gpu = gpu, baseline = "none", precision = labels.base }, METRIC)
        row[i + 1] = #ratios > 0 and ("%.2f (%d)"):format(stats.geomean(ratios), #ratios) or "-"
      end
      rows[#rows + 1] = row
    end
    if #rows > 0 then rows[#rows + 1] = accuracy.row(data, { accuracy.title }) end
    return columns, rows
  end,
}
