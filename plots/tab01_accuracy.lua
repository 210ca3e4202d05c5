--- Table 1: perplexity and task accuracy of every format of e01.
local labels = require("labels")

local ACTIVATIONS = { "A16", "A8", "AFP8" }

return {
  experiment = "e01_accuracy",
  title = "Accuracy",
  caption = "Held-out perplexity of the tiny checkpoint by weight and activation format (rows) and "
    .. "KV format (columns; the list has its first third of layers in 8 bits), with greedy "
    .. "agreement with 16 bit in percent, KL divergence from it in millinats, and exact answers in "
    .. "percent to the arithmetic / recall tasks; cpu reference. Where the generated text chooses "
    .. "at random, tokens are nearly tied: agreement falls there first, and KL says more. \"-\": "
    .. "not run (8-bit activations go with two or three caches, the list with two weight formats).",
  build = function(data)
    local columns, rows = { "weights, activations" }, {}
    for _, kv in ipairs(labels.kv_all) do columns[#columns + 1] = kv end
    for _, weight in ipairs(labels.weights) do
      for _, activation in ipairs(ACTIVATIONS) do
        local row, any = { labels.weight_title[weight] .. activation }, false
        for _, kv in ipairs(labels.kv_all) do
          local found = data:row("e01", { weight = weight, activation = activation, kv = kv })
          any = any or found ~= nil
          local m = found and found.metrics
          row[#row + 1] = m and ("%.3f, %.1f, %.2f (%.0f / %.0f)"):format(m.perplexity,
            100 * (m.greedy_agreement or 0), 1000 * (m.kl_nats or 0),
            100 * (m.arithmetic_accuracy or 0), 100 * (m.recall_accuracy or 0)) or "-"
        end
        if any then rows[#rows + 1] = row end
      end
    end
    return columns, rows
  end,
}
