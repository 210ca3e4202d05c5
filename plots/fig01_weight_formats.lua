--- Figure 1: what weight formats cost, with 16-bit activations and cache.
local labels = require("labels")

return {
  experiment = "e01_accuracy",
  title = "Accuracy by weight format",
  caption = "Cost of weight formats at A16KV16 on the tiny checkpoint, cpu reference: increase "
    .. "of held-out perplexity over 16-bit weights (left) and exact answers to held-out tasks "
    .. "(right).",
  build = function(data)
    local rows = {}
    local base = data:value("e01", { weight = "16", activation = "A16", kv = "KV16" }, "perplexity")
    for _, weight in ipairs(labels.weights) do
      local row = data:row("e01", { weight = weight, activation = "A16", kv = "KV16" })
      if row and base then
        local m = row.metrics
        rows[#rows + 1] = { labels.weight_title[weight], 100 * (m.perplexity / base - 1),
          m.arithmetic_accuracy and 100 * m.arithmetic_accuracy,
          m.recall_accuracy and 100 * m.recall_accuracy }
      end
    end
    return { "format", "perplexity_increase_percent", "arithmetic_percent", "recall_percent" }, rows
  end,
}
