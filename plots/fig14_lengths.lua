--- Figure 14: what the lengths of prompts and answers make of a format's gain.
local labels = require("labels")
local lengths = require("lengths")
local stats = require("lib_stats")

--- Served conversations over those in 16 bits, of the same models: gain and prompt tokens an
--- answer token; nil without rows.
local function served(data, precision, models)
  local gains, ratio = {}, nil
  for _, model in ipairs(models) do
    local function metrics(of)
      local row = data:row("e10", { device = "cuda", tp = 1, model = model, precision = of })
      return row and row.metrics
    end
    local own, base = metrics(precision), metrics(labels.base)
    if own and base then
      gains[#gains + 1] = own.output_tokens_per_s / base.output_tokens_per_s
      ratio = own.prompt_tokens / own.output_tokens -- the workload's, of all models
    end
  end
  if #gains > 0 then return stats.geomean(gains), ratio end
end

return {
  experiment = "e06_steps",
  title = "Gain of a format against prompt tokens an answer token",
  caption = "Speed-up over 16 bits on one H200, computed from the measured steps of Table 11 for "
    .. "conversations of so many prompt tokens an answer token: prefill at the rate of 8192 "
    .. "tokens, decoding with 16 (left) or 64 (right) sequences of 4096 tokens, nothing "
    .. "overlapping; geometric mean over the models measured in all of these formats. Open "
    .. "markers: 200 short conversations of Table 12 as served, same models, of up to 200 "
    .. "sequences a step and short contexts.",
  build = function(data)
    local rows = {}
    for _, batch in ipairs(lengths.batches) do
      local models = lengths.models(data, batch)
      for _, precision in ipairs(#models > 0 and lengths.formats or {}) do
        local name = labels.format_title[precision] or precision
        for step = -8, 16 do
          local ratio = 2 ^ (step / 2)
          rows[#rows + 1] = { name, batch, #models, "steps", ratio,
            lengths.gain(data, precision, batch, ratio) }
        end
        local gain, ratio = served(data, precision, models)
        if gain and batch == 64 then
          rows[#rows + 1] = { name, batch, #models, "served", ratio, gain }
        end
      end
    end
    return { "name", "batch", "models", "kind", "ratio", "gain" }, rows
  end,
}
