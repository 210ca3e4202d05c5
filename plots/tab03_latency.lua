--- Table 3: latency under load by format and GPU, relative to 16 bits.
local accuracy = require("accuracy")
local labels = require("labels")
local stats = require("lib_stats")

local LOAD = 0.75
local QUICK_LOAD = 0.5
local METRICS = {
  { "ttft_p50_ms", "TTFT P50" }, { "ttft_p90_ms", "TTFT P90" }, { "ttft_p99_ms", "TTFT P99" },
  { "tpot_p50_ms", "TPOT P50" }, { "tpot_p90_ms", "TPOT P90" }, { "tpot_p99_ms", "TPOT P99" },
  { "e2e_p50_ms", "E2E P50" }, { "e2e_p90_ms", "E2E P90" }, { "e2e_p99_ms", "E2E P99" },
}

return {
  experiment = "e02_serving_latency",
  predicted = true,
  title = "Latency by format and GPU",
  caption = "Predicted latency under load, relative to W16A16KV16 on the same GPUs at the same "
    .. "request rate (three quarters of what 16 bits sustain, or half where that was not run): "
    .. "geometric mean over the models for which both have rows. Below 1 is faster; "
    .. labels.eight_bit_units
    .. accuracy.note,
  build = function(data)
    local columns, rows = { "GPU", "format", "models" }, {}
    for _, m in ipairs(METRICS) do columns[#columns + 1] = m[2] end
    columns[#columns + 1] = accuracy.title
    local at = #data:select("e02", { load = LOAD }) > 0 and LOAD or QUICK_LOAD
    for _, gpu in ipairs(data.ordered(labels.gpus, data:distinct("e02", "gpu"))) do
      for _, precision in ipairs(labels.formats) do
        local title = labels.format_title[precision] or precision
        local row, n = { labels.gpu_title[gpu] or gpu, title }, 0
        for i, m in ipairs(METRICS) do
          local ratios = data:ratios("e02", "model",
            { gpu = gpu, load = at, precision = precision },
            { gpu = gpu, load = at, precision = labels.base }, m[1])
          n = math.max(n, #ratios)
          row[i + 3] = #ratios > 0 and ("%.2f"):format(stats.geomean(ratios)) or "-"
        end
        row[3] = n
        row[#row + 1] = accuracy.of(data, precision)
        if n > 0 then rows[#rows + 1] = row end
      end
    end
    return columns, rows
  end,
}
