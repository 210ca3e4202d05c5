--- Table 5: capacity and throughput by KV format, over the 16-bit cache.
local accuracy = require("accuracy")
local labels = require("labels")
local stats = require("lib_stats")

return {
  experiment = "e04_kv_precision",
  predicted = true,
  title = "KV formats",
  caption = "Predicted gains of KV formats over KV16 with the same weights: cache capacity in "
    .. "tokens, requests run at a time, and output tokens/s; geometric mean over the contexts that "
    .. "both can hold." .. accuracy.note,
  build = function(data)
    local rows = {}
    for _, gpu in ipairs(data.ordered(labels.gpus, data:distinct("e04", "gpu"))) do
      for _, model in ipairs(data.ordered(labels.models, data:distinct("e04", "model"))) do
        for _, weight in ipairs({ "W16A16", "W4A16" }) do
          for at = 2, #labels.kvs do
            local row = { labels.gpu_title[gpu] or gpu, model, weight, labels.kvs[at] }
            for i, metric in ipairs({ "kv_tokens", "batch_mean", "output_tokens_per_s" }) do
              local ratios = data:ratios("e04", "context",
                { gpu = gpu, model = model, weight = weight, kv = labels.kvs[at] },
                { gpu = gpu, model = model, weight = weight, kv = "KV16" }, metric)
              row[i + 4] = #ratios > 0 and ("%.2f"):format(stats.geomean(ratios))
                or "-"
            end
            row[8] = accuracy.of(data, weight .. labels.kvs[at])
            if row[5] ~= "-" then rows[#rows + 1] = row end
          end
        end
      end
    end
    return { "GPU", "model", "weights", "cache", "capacity", "mean batch", "throughput",
      accuracy.title }, rows
  end,
}
