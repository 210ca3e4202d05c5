--- What stands beside every speed of a format: its accuracy on the tiny checkpoint, from e01.
local labels = require("labels")

local M = { title = "accuracy (Table 1)" }

M.note = " Accuracy is that of the same format on the tiny checkpoint: change of held-out "
  .. "perplexity, KL divergence from 16 bit in millinats."

--- KL divergence from 16 bit of the tiny checkpoint, in nats; nil when e01 has no such row.
---@param precision string canonical name
---@return number|nil
function M.kl(data, precision)
  return data:value("e01", { precision = precision }, "kl_nats")
end

---@param precision string canonical name
---@return string "+0.39 %, 2.84", or "-" when e01 has no such row
function M.of(data, precision)
  local base = data:row("e01", { precision = labels.base })
  local row = data:row("e01", { precision = precision })
  local m = row and row.metrics
  if not base or not m or not m.kl_nats then return "-" end
  local text = ("%+.2f %%, %.2f"):format(100 * (m.perplexity / base.metrics.perplexity - 1),
    1000 * m.kl_nats)
  return (text:gsub("^%-0%.00 ", "+0.00 ")) -- the sign of nothing
end

--- A row for tables whose columns are formats.
---@param before string[] cells in front of those of labels.formats
---@return string[]
function M.row(data, before)
  local row = { table.unpack(before) }
  for _, precision in ipairs(labels.formats) do row[#row + 1] = M.of(data, precision) end
  return row
end

return M
