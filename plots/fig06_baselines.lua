--- Figure 6: fused low-bit kernels and continuous batching against the baselines.
local labels = require("labels")
local stats = require("lib_stats")

local SERIES = {
  { "W4A16KV16", "dequant_first" }, { "W4A16KV4", "dequant_first" },
  { "W4A16KV4", "static_batching" },
}

return {
  experiment = "e03_throughput",
  predicted = true,
  title = "Gain over the baselines across GPUs (predicted)",
  caption = "Geometric mean over the models of throughput relative to the same format under a "
    .. "baseline: weights expanded to 16 bits before each product (the cache is read as it is), "
    .. "and static batching. Predicted.",
  build = function(data)
    local rows = {}
    for _, gpu in ipairs(data.ordered(labels.gpus, data:distinct("e03", "gpu"))) do
      local row, any = { labels.gpu_title[gpu] or gpu }, false
      for _, s in ipairs(SERIES) do
        local ratios = data:ratios("e03", "model",
          { gpu = gpu, baseline = "none", precision = s[1] },
          { gpu = gpu, baseline = s[2], precision = s[1] }, "output_tokens_per_s_per_gpu")
        any = any or #ratios > 0
        row[#row + 1] = #ratios > 0 and stats.geomean(ratios) or 0 / 0
      end
      if any then rows[#rows + 1] = row end
    end
    return { "gpu", "w4kv16_dequant_first", "w4kv4_dequant_first", "w4kv4_static" }, rows
  end,
}
