--- Figure 18: a server under load, measured on one GPU beside its prediction.
local labels = require("labels")

local MODEL = "Llama-3.1-8B"

--- Metrics of one row as they are drawn; "-" stands for none.
local function drawn(row, panel, kind)
  local title = labels.format_title[row.key.precision] or row.key.precision
  local m = row.metrics
  return { panel, title, kind, m.rate_per_s or "-", m.ttft_p99_ms, m.tpot_p50_ms,
    m.output_tokens_per_s }
end

return {
  experiment = "a run of e02 and e03 with --device cuda",
  title = "Latency under load and offline throughput, measured and predicted",
  caption = "Llama-3.1-8B on one H200, conversations of the sharegpt shape. Left and middle: P99 "
    .. "time to first token (logarithmic) and median time per output token of 700 of them against "
    .. "the rate of their Poisson arrivals, which is a share (0.5 to 1.5) of what 16 bits sustain "
    .. "on the same device: lines measured, dashes predicted. Right: output tokens per second of "
    .. "1000 that are there at once; bars measured, open circles predicted.",
  build = function(data)
    local rows = {}
    for _, precision in ipairs({ labels.base, table.unpack(labels.formats) }) do
      for panel, experiment in ipairs({ "e02", "e03" }) do
        local key = { model = MODEL, precision = precision, device = "cuda", baseline = "none" }
        local found = data:select(experiment, key)
        table.sort(found, function(a, b) return (a.key.load or 0) < (b.key.load or 0) end)
        for _, row in ipairs(found) do rows[#rows + 1] = drawn(row, panel, "measured") end
        for _, row in ipairs(found) do
          local other = data:row(experiment, {
            model = MODEL, precision = precision, device = "sim", baseline = "none",
            gpu = row.key.gpu, load = row.key.load,
          })
          if other then rows[#rows + 1] = drawn(other, panel, "predicted") end
        end
      end
    end
    return { "panel", "precision", "kind", "rate_per_s", "ttft_p99_ms", "tpot_p50_ms",
      "output_tokens_per_s" }, rows
  end,
}
