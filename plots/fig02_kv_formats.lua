--- Figure 2: what KV formats cost, with 16-bit and 4-bit weights.
local labels = require("labels")

return {
  experiment = "e01_accuracy",
  title = "Accuracy by KV format",
  caption = "Cost of KV formats on the tiny checkpoint, cpu reference: increase of held-out "
    .. "perplexity over W16A16KV16 (left) and exact answers to held-out sums (right; the axis "
    .. "begins at 80 %), each with 16-bit and with 4-bit (group 128) weights.",
  build = function(data)
    local rows = {}
    local base = data:value("e01", { weight = "16", activation = "A16", kv = "KV16" }, "perplexity")
    for _, kv in ipairs(labels.kvs) do
      local a = data:row("e01", { weight = "16", activation = "A16", kv = kv })
      local b = data:row("e01", { weight = "4g128", activation = "A16", kv = kv })
      if base and (a or b) then
        local function of(row, name, f)
          return row and row.metrics[name] and f(row.metrics[name])
        end
        local function increase(x) return 100 * (x / base - 1) end
        local function percent(x) return 100 * x end
        rows[#rows + 1] = { kv, of(a, "perplexity", increase), of(b, "perplexity", increase),
          of(a, "arithmetic_accuracy", percent), of(b, "arithmetic_accuracy", percent) }
      end
    end
    return { "kv", "w16_perplexity", "w4_perplexity", "w16_arithmetic", "w4_arithmetic" }, rows
  end,
}
