--- Table 8: capacity and throughput by KV format, over the 16-bit cache.
local accuracy = require("accuracy")
local labels = require("labels")
local stats = require("lib_stats")

local METRICS = { "kv_tokens", "batch_mean", "output_tokens_per_s" }

return {
  experiment = "e04_kv_precision",
  predicted = true,
  title = "KV formats",
  caption = "Predicted gains of KV formats over KV16 with the same weights: cache capacity in "
    .. "tokens / requests run at a time / output tokens per second, each a geometric mean over the "
    .. "contexts that both can hold. Without a row: 16-bit weights that leave no room on that GPU."
    .. accuracy.note,
  build = function(data)
    local columns, rows = { "GPU", "model", "weights" }, {}
    for at = 2, #labels.kvs do columns[#columns + 1] = labels.kvs[at] end
    for _, gpu in ipairs(data.ordered(labels.gpus, data:distinct("e04", "gpu"))) do
      for _, model in ipairs(data.ordered(labels.models, data:distinct("e04", "model"))) do
        for _, weight in ipairs({ "W16A16", "W4A16" }) do
          local row, any = { labels.gpu_title[gpu] or gpu, model, weight }, false
          for at = 2, #labels.kvs do
            local words = {}
            for i, metric in ipairs(METRICS) do
              local ratios = data:ratios("e04", "context",
                { gpu = gpu, model = model, weight = weight, kv = labels.kvs[at] },
                { gpu = gpu, model = model, weight = weight, kv = "KV16" }, metric)
              any = any or #ratios > 0
              words[i] = #ratios > 0 and ("%.2f"):format(stats.geomean(ratios)) or "-"
            end
            row[#row + 1] = table.concat(words, " / ")
          end
          if any then rows[#rows + 1] = row end
        end
      end
    end
    for _, weight in ipairs(#rows > 0 and { "W16A16", "W4A16" } or {}) do
      local row = { accuracy.title, "", weight }
      for at = 2, #labels.kvs do row[#row + 1] = accuracy.of(data, weight .. labels.kvs[at]) end
      rows[#rows + 1] = row
    end
    return columns, rows
  end,
}
