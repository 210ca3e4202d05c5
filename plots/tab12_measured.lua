--- Table 12: points of the predicted experiments that were measured too, beside the prediction.
local library = require("lib_rows")

local METRIC = {
  e02_serving_latency = "tpot_p50_ms", e03_throughput = "output_tokens_per_s_per_gpu",
  e04_kv_precision = "steady_output_tokens_per_s",
}
local DEVICE = { device = true }

return {
  experiment = "a run of e02 to e04 with --device cuda",
  title = "Predictions that were measured",
  caption = "Points of sections 5 to 7 that were measured on the GPU at hand, beside the "
    .. "prediction of the same point.",
  build = function(data)
    local predicted, rows = {}, {}
    for _, row in ipairs(data.rows) do
      if METRIC[row.experiment] and row.key.device == "sim" and row.status == "ok" then
        predicted[row.experiment .. library.key_text(row, DEVICE)] = row
      end
    end
    for _, row in ipairs(data.rows) do
      local metric = METRIC[row.experiment]
      if metric and row.key.device == "cuda" and row.status == "ok" then
        local other = predicted[row.experiment .. library.key_text(row, DEVICE)]
        local m, p = row.metrics[metric], other and other.metrics[metric]
        data:note({ row, other })
        rows[#rows + 1] = { row.experiment:sub(1, 3), row.key.gpu, row.key.model,
          row.key.precision, row.key.load or row.key.context or row.key.baseline, metric, m, p,
          p and m / p }
      end
    end
    return { "", "GPU", "model", "precision", "load, context or mode", "metric", "measured",
      "predicted", "ratio" }, rows
  end,
}
