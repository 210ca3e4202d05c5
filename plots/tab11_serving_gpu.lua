--- Table 11: 200 conversations on one H200, measured beside predicted.
local labels = require("labels")

local FORMATS = { "W4A16KV8", "W4A8KV8", "W4g32A16KV8", "WMXFP4A16KV8", "W16A16KV16" }
local METRICS = { { "output_tokens_per_s", "tokens/s" }, { "tpot_p50_ms", "TPOT P50 (ms)" },
  { "ttft_p50_ms", "TTFT P50 (ms)" } }

return {
  experiment = "e10_serving_gpu",
  title = "200 conversations on one H200",
  caption = "200 short conversations, all at once, on one H200: measured, and predicted in "
    .. "brackets. A word instead of numbers is the status of the point: \"oom\" does not fit, "
    .. "\"skipped\" is refused for its shapes, \"-\" was not measured.",
  build = function(data, report)
    local columns, rows = { "model", "format", "requests done" }, {}
    for _, metric in ipairs(METRICS) do columns[#columns + 1] = metric[2] end
    for _, model in ipairs(data.ordered(labels.models, data:distinct("e10", "model"))) do
      for _, precision in ipairs(FORMATS) do
        local function of(device)
          return data:row("e10", { model = model, precision = precision, device = device }, "any")
        end
        local measured, predicted = of("cuda"), of("sim")
        local served = measured and measured.metrics.n_completed
        local row = { model, precision, served or measured and measured.status or "-" }
        for _, metric in ipairs(METRICS) do
          local m = measured and measured.metrics[metric[1]]
          local p = predicted and predicted.metrics[metric[1]]
          row[#row + 1] = report.number(m) .. (p and (" (%s)"):format(report.number(p)) or "")
        end
        if measured or predicted and predicted.status == "ok" then rows[#rows + 1] = row end
      end
    end
    return columns, rows
  end,
}
