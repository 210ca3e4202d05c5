--- Requests per second and GPU within limits of latency, from e13: of a model and format the best
--- of its tensor-parallel degrees.
local M = {
  gpu = "h200",
  models = { "Llama-3.1-8B", "Qwen2.5-32B", "Llama-3.1-70B", "Qwen3-30B-A3B" },
  formats = { "W16A16KV16", "WFP8AFP8KVFP8", "W4A16KV8", "W4A8KV8" },
}

--- The degree that serves most per GPU, of equal ones the smallest; nil where none was run.
---@param data table
---@param model string
---@param precision string
---@param tpot_ms number
---@return Row|nil
function M.best(data, model, precision, tpot_ms)
  local best
  local function rate(row) return row.metrics.rate_within_limits_per_s_per_gpu end
  for _, row in ipairs(data:select("e13", { gpu = M.gpu, model = model, precision = precision,
    tpot_ms = tpot_ms })) do
    local more = best and rate(row) - rate(best) or 1
    if more > 0 or more == 0 and row.key.tp < best.key.tp then best = row end
  end
  return best
end

--- Limits on the time of a token that were run, in order.
---@return number[]
function M.limits(data)
  local out = data:distinct("e13", "tpot_ms")
  table.sort(out)
  return out
end

return M
