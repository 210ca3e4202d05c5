--- Table 2: what GPTQ and AWQ win back of the loss by rounding, on the tiny checkpoint.

local METHODS = { "rtn", "gptq", "awq" }
local TITLE = { rtn = "round to nearest", gptq = "GPTQ", awq = "AWQ" }

return {
  experiment = "e09_quantisers",
  title = "Weight quantisers",
  caption = "Weight quantisers on the tiny checkpoint, cpu reference: held-out perplexity, the "
    .. "share of the loss in log-likelihood by rounding that a method wins back, and agreement "
    .. "with the 16-bit model (greedy token of the same context; mean KL divergence). gK: a "
    .. "group is a whole row. Text longer than that of Table 1, in shorter windows: perplexities "
    .. "of the two are not to be compared.",
  build = function(data)
    local columns = { "format", "method", "perplexity", "16 bit", "recovered", "greedy agreement",
      "KL (nats)" }
    local rows = {}
    for _, weight in ipairs(data:distinct("e09", "weight")) do
      local function of(method) return data:row("e09", { weight = weight, method = method }) end
      local rounded = of("rtn")
      for _, method in ipairs(METHODS) do
        local row = of(method)
        if row then
          local m = row.metrics
          local share = "0 % (by definition)"
          if rounded and method ~= "rtn" then
            local base = math.log(m.reference_perplexity)
            local lost = math.log(rounded.metrics.perplexity) - base
            share = ("%.0f %%"):format(100 * (1 - (math.log(m.perplexity) - base) / lost))
          end
          rows[#rows + 1] = { weight, TITLE[method], ("%.4f"):format(m.perplexity),
            ("%.4f"):format(m.reference_perplexity), share,
            ("%.1f %%"):format(100 * m.greedy_agreement), ("%.5f"):format(m.kl_nats) }
        end
      end
    end
    return columns, rows
  end,
}
