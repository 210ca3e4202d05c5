--- Figure 1: what weight formats cost, with 16-bit activations and cache.
local labels = require("labels")
local stats = require("lib_stats")

return {
  experiment = "e01_accuracy",
  title = "Accuracy by weight format",
  caption = "Cost of weight formats at A16KV16 on the tiny checkpoint, cpu reference: increase of "
    .. "held-out perplexity over 16-bit weights (left) and share of held-out sums whose answer is "
    .. "not exact, with its 95 % Wilson interval (right).",
  build = function(data)
    local rows = {}
    local base = data:value("e01", { weight = "16", activation = "A16", kv = "KV16" }, "perplexity")
    for _, weight in ipairs(labels.weights) do
      local row = data:row("e01", { weight = weight, activation = "A16", kv = "KV16" })
      if row and base then
        local wrong, lo, hi = stats.wrong_percent(row.metrics.arithmetic_accuracy,
          row.metrics.arithmetic_n)
        rows[#rows + 1] = { labels.weight_title[weight],
          100 * (row.metrics.perplexity / base - 1), wrong, lo, hi }
      end
    end
    return { "format", "perplexity_increase_percent", "wrong_percent", "wrong_lo", "wrong_hi" },
      rows
  end,
}
