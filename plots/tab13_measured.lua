--- Table 13: points of the predicted experiments that were measured too, beside the prediction.
local labels = require("labels")
local library = require("lib_rows")

local METRIC = {
  e02_serving_latency = "tpot_p50_ms", e03_throughput = "output_tokens_per_s_per_gpu",
  e04_kv_precision = "steady_output_tokens_per_s",
}
local DEVICE = { device = true }

---@param key table of a row
---@return string what distinguishes points of its experiment
local function point_of(key)
  if key.load then return ("load %g"):format(key.load) end
  if key.context then return ("context %d"):format(key.context) end
  local mode = key.baseline == "none" and "as it is" or labels.baseline_title[key.baseline]
  return "offline, " .. mode
end

return {
  experiment = "a run of e02 to e04 with --device cuda",
  title = "Predictions that were measured",
  caption = "Points of sections 6 to 8 that were measured on the GPU at hand, beside the "
    .. "prediction of the same point. A load of e02 is a share of what 16 bits sustain on the same "
    .. "device, so that measured and predicted requests come at rates of their own.",
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
          row.key.precision, point_of(row.key), metric, m, p, p and m / p }
      end
    end
    local function place(row)
      return table.concat({ row[1], row[2], row[3], row[5], row[4] }, "\0")
    end
    table.sort(rows, function(a, b) return place(a) < place(b) end)
    return { "experiment", "GPU", "model", "precision", "point", "metric", "measured", "predicted",
      "measured / predicted" }, rows
  end,
}
