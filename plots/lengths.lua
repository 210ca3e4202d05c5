--- What prompts and answers of given lengths gain by a format, from the measured steps of e06: a
--- conversation of r prompt tokens an answer token takes r times a token's share of a prefill and
--- once its share of a decode step. Nothing overlaps, and batches are those of the steps.
local labels = require("labels")
local stats = require("lib_stats")

local M = {
  formats = { "W4A16KV8", "W4A8KV8", "W8A8KV8", "WFP8AFP8KVFP8" },
  batches = { 16, 64 },
}

--- Steps of a model in a format on one H200: metrics, or nil where prefill or batch is missing.
local function steps(data, model, precision, batch)
  local row = data:row("e06", { gpu = "h200", tp = 1, device = "cuda", model = model,
    precision = precision })
  local m = row and row.metrics
  return m and m.prefill_us and m.prefill_tokens and m[("b%d_us"):format(batch)] and m
end

--- Models that were measured in 16 bits and in every format, with this batch: all curves are of
--- the same models.
---@return string[]
function M.models(data, batch)
  local out = {}
  for _, model in ipairs(data.ordered(labels.models, data:distinct("e06", "model"))) do
    local all = steps(data, model, labels.base, batch)
    for _, precision in ipairs(M.formats) do all = all and steps(data, model, precision, batch) end
    if all then out[#out + 1] = model end
  end
  return out
end

--- Speed-ups over 16 bits at `ratio` prompt tokens an answer token, of each of the models;
--- math.huge: of a prompt alone.
---@return number[]
function M.gains(data, precision, batch, ratio)
  local gains = {}
  for _, model in ipairs(M.models(data, batch)) do
    local function us(of) -- of one answer token and its share of a prompt
      local m = steps(data, model, of, batch)
      local prompt = m.prefill_us / m.prefill_tokens
      if ratio == math.huge then return prompt end
      return ratio * prompt + m[("b%d_us"):format(batch)] / batch
    end
    gains[#gains + 1] = us(labels.base) / us(precision)
  end
  return gains
end

--- Their geometric mean; nil where there are no models.
---@return number|nil
function M.gain(data, precision, batch, ratio)
  local gains = M.gains(data, precision, batch, ratio)
  return #gains > 0 and stats.geomean(gains) or nil
end

--- The ratio from which on a format is the faster one of two, to a percent: 0 where it is so from
--- 1/64 on, nil where it is not up to 1024. 16 bits (labels.base) may be either.
---@return number|nil
function M.even(data, first, second, batch)
  local function speed(precision, ratio)
    return precision == labels.base and 1 or M.gain(data, precision, batch, ratio) or 0 / 0
  end
  local function ahead(ratio) return speed(first, ratio) > speed(second, ratio) end
  local low, high = 1 / 64, 1024
  if ahead(low) then return 0 end
  if not ahead(high) then return nil end
  while high / low > 1.01 do
    local middle = math.sqrt(low * high)
    if ahead(middle) then high = middle else low = middle end
  end
  return high
end

return M
