--- Figure 5: mean gain in throughput by precision across GPUs.
local labels = require("labels")
local stats = require("lib_stats")

return {
  experiment = "e03_throughput",
  predicted = true,
  title = "Throughput gain across GPUs (predicted)",
  caption = "Geometric mean over the models of output tokens per second and GPU relative to "
    .. "W16A16KV16 on the same kind of GPU, over models where both fit. FP8 needs matrix units "
    .. "that the A100 does not have; " .. labels.eight_bit_units .. " Predicted.",
  build = function(data)
    local rows = {}
    for _, gpu in ipairs(data.ordered(labels.gpus, data:distinct("e03", "gpu"))) do
      local row, any = { labels.gpu_title[gpu] or gpu }, false
      for _, precision in ipairs(labels.formats) do
        local ratios = data:ratios("e03", "model",
          { gpu = gpu, baseline = "none", precision = precision },
          { gpu = gpu, baseline = "none", precision = labels.base }, "output_tokens_per_s_per_gpu")
        any = any or #ratios > 0
        row[#row + 1] = #ratios > 0 and stats.geomean(ratios) or 0 / 0
      end
      if any then rows[#rows + 1] = row end
    end
    return { "gpu", table.unpack(labels.formats) }, rows
  end,
}
