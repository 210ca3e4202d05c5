--- Figure 2: what KV formats cost, with 16-bit and 4-bit weights.
local labels = require("labels")
local stats = require("lib_stats")

return {
  experiment = "e01_accuracy",
  title = "Accuracy by KV format",
  caption = "Cost of KV formats on the tiny checkpoint, cpu reference: increase of held-out "
    .. "perplexity over W16A16KV16 (left) and share of held-out sums whose answer is not exact, "
    .. "with its 95 % Wilson interval (right), with 16-bit and with 4-bit (group 128) weights.",
  build = function(data)
    local rows = {}
    local base = data:value("e01", { weight = "16", activation = "A16", kv = "KV16" }, "perplexity")
    for _, kv in ipairs(labels.kvs) do
      local line, any = { kv }, false
      local wrong = {}
      for i, weight in ipairs({ "16", "4g128" }) do
        local row = data:row("e01", { weight = weight, activation = "A16", kv = kv })
        local m = row and row.metrics or {}
        any = any or row ~= nil
        line[1 + i] = base and m.perplexity and 100 * (m.perplexity / base - 1) or 0 / 0
        wrong[i] = table.pack(stats.wrong_percent(m.arithmetic_accuracy, m.arithmetic_n))
      end
      for _, w in ipairs(wrong) do
        for i = 1, 3 do line[#line + 1] = w[i] end
      end
      if base and any then rows[#rows + 1] = line end
    end
    return { "kv", "w16_perplexity", "w4_perplexity", "w16_wrong", "w16_lo", "w16_hi", "w4_wrong",
      "w4_lo", "w4_hi" }, rows
  end,
}
