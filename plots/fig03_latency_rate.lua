--- Figure 3: latency against request rate by precision, three models on one GPU.
local labels = require("labels")

local GPU = "h100-sxm"
local MODELS = { "Llama-3.1-8B", "Qwen2.5-32B", "Qwen3-30B-A3B" }

return {
  experiment = "e02_serving_latency",
  predicted = true,
  title = "Latency against request rate by precision (predicted)",
  caption = "P99 time to first token (top, logarithmic) and median time per output token (bottom) "
    .. "against the request rate: 700 conversations of the sharegpt shape, Poisson arrivals, on as "
    .. "many H100-SXM as 16 bits need; scales differ between the models. Of the experts of "
    .. "Qwen3-30B-A3B, W8A8 and FP8 are of units that no kernel here uses yet. Predicted.",
  build = function(data)
    local rows = {}
    local formats = { labels.base, table.unpack(labels.formats) }
    local panel = 0
    for _, model in ipairs(MODELS) do
      if #data:select("e02", { gpu = GPU, model = model }) > 0 then panel = panel + 1 end
      for _, precision in ipairs(formats) do
        local found = data:select("e02", { gpu = GPU, model = model, precision = precision })
        table.sort(found, function(a, b) return a.key.load < b.key.load end)
        for _, row in ipairs(found) do
          local m = row.metrics
          local title = labels.format_title[precision] or precision
          rows[#rows + 1] = { model, panel, title, m.rate_per_s, m.ttft_p50_ms, m.ttft_p99_ms,
            m.tpot_p50_ms, m.tpot_p99_ms }
        end
      end
    end
    return { "model", "panel", "precision", "rate_per_s", "ttft_p50_ms", "ttft_p99_ms",
      "tpot_p50_ms", "tpot_p99_ms" }, rows
  end,
}
