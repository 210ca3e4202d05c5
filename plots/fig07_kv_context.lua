--- Figure 7: what the KV format does to batch and throughput as the context grows.
local labels = require("labels")

local FIXED = { gpu = "h100-sxm", model = "Llama-3.1-8B", weight = "W4A16" }

return {
  experiment = "e04_kv_precision",
  predicted = true,
  title = "Batch and throughput by KV format against context (predicted)",
  caption = "Llama-3.1-8B with W4A16 weights on one H100-SXM: requests that the cache holds at a "
    .. "time (left, at most 512 are run) and output tokens per second in the steady part (right), "
    .. "against the context length, by KV format. Predicted.",
  build = function(data)
    local rows = {}
    for at, kv in ipairs(labels.kvs) do
      local key = { kv = kv }
      for name, value in pairs(FIXED) do key[name] = value end
      local mine = data:select("e04", key)
      table.sort(mine, function(a, b) return a.key.context < b.key.context end)
      for _, row in ipairs(mine) do
        local m = row.metrics
        rows[#rows + 1] = { kv, at, row.key.context, m.kv_tokens / row.key.context, m.batch_mean,
          m.steady_output_tokens_per_s or m.output_tokens_per_s, m.tpot_p50_ms }
      end
    end
    return { "kv", "series", "context", "requests_held", "batch_mean", "output_tokens_per_s",
      "tpot_p50_ms" }, rows
  end,
}
