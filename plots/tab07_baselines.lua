--- Table 7: gains over the baselines by GPU.
local accuracy = require("accuracy")
local labels = require("labels")
local stats = require("lib_stats")

return {
  experiment = "e03_throughput",
  predicted = true,
  title = "Gains over the baselines",
  caption = "Predicted offline throughput over the same format under a baseline: geometric mean "
    .. "over the models, and the largest gain with its model." .. accuracy.note,
  build = function(data)
    local rows = {}
    for _, gpu in ipairs(data.ordered(labels.gpus, data:distinct("e03", "gpu"))) do
      for _, baseline in ipairs({ "dequant_first", "static_batching" }) do
        for _, precision in ipairs(data:distinct("e03", "precision", { baseline = baseline })) do
          local ratios, which = data:ratios("e03", "model",
            { gpu = gpu, precision = precision, baseline = "none" },
            { gpu = gpu, precision = precision, baseline = baseline },
            "output_tokens_per_s_per_gpu")
          local most = 1
          for i, r in ipairs(ratios) do
            if r > ratios[most] then most = i end
          end
          if #ratios > 0 then
            rows[#rows + 1] = { labels.gpu_title[gpu] or gpu, labels.baseline_title[baseline],
              precision, #ratios, ("%.2f"):format(stats.geomean(ratios)),
              ("%.2f (%s)"):format(ratios[most], which[most]),
              accuracy.of(data, precision) }
          end
        end
      end
    end
    return { "GPU", "baseline", "format", "models", "mean gain", "largest gain",
      accuracy.title }, rows
  end,
}
