--- Table 9: what was measured on this machine.
local accuracy = require("accuracy")
local labels = require("labels")
local stats = require("lib_stats")

local METRICS = {
  { "ttft_p50_ms", "TTFT P50 (ms)" }, { "ttft_p90_ms", "TTFT P90 (ms)" },
  { "tpot_p50_ms", "TPOT P50 (ms)" }, { "e2e_p50_ms", "E2E P50 (ms)" },
  { "e2e_p90_ms", "E2E P90 (ms)" }, { "output_tokens_per_s", "output tokens/s" },
  { "lag_p99_ms", "generator lag P99 (ms)" },
}

return {
  experiment = "e05_real_serving",
  title = "Measured serving",
  caption = "Measured on cpu with the tiny checkpoint, 40 requests a repetition: median of the "
    .. "repetitions (95 % bootstrap interval for the first column). The generator's lag, a P99 of "
    .. "40, is nearly the largest." .. accuracy.note,
  build = function(data)
    local columns, rows = { "rate (1/s)", "format", "mode", "repetitions" }, {}
    for _, m in ipairs(METRICS) do columns[#columns + 1] = m[2] end
    columns[#columns + 1] = accuracy.title
    for _, rate in ipairs(data:distinct("e05", "rate_per_s")) do
      for _, precision in ipairs(data:distinct("e05", "precision")) do
        for _, baseline in ipairs(data.ordered(labels.baselines, data:distinct("e05", "baseline")))
        do
          local key = { rate_per_s = rate, precision = precision, baseline = baseline }
          local row = { rate, precision, labels.baseline_title[baseline] or baseline,
            #data:select("e05", key) }
          for i, m in ipairs(METRICS) do
            local values = data:values("e05", key, m[1])
            local x = stats.median_interval(values, { rounds = #values > 0 and 2000 or 0 })
            row[i + 4] = #values == 0 and "-" or ("%.4g"):format(x.estimate)
            if i == 1 and #values > 1 then
              row[i + 4] = ("%.3g [%.3g, %.3g]"):format(x.estimate, x.lo, x.hi)
            end
          end
          row[#row + 1] = accuracy.of(data, precision)
          if row[4] > 0 then rows[#rows + 1] = row end
        end
      end
    end
    return columns, rows
  end,
}
