--- Stored rows: finding them, choosing among versions, and what a metric's name says of it.

local amalgam = require("amalgam")

local M = {}

---@class Row
---@field experiment string
---@field definition string
---@field machine string
---@field commit string
---@field diff string
---@field version string file name without .jsonl
---@field time string
---@field key table<string, any>
---@field origin? "measured"|"predicted"|"reference"
---@field status string
---@field reason? string
---@field metrics table<string, number>
---@field provenance table

--- All rows under a results folder, in file order.
---@param dir string
---@param keep? fun(experiment: string, machine: string, version: string): boolean
---@return Row[] rows
---@return string[] broken "FILE: 2 lines" of each file with lines that cannot be read
function M.read(dir, keep)
  local rows, broken = {}, {}
  for _, experiment in ipairs(amalgam.list(dir)) do
    local e = experiment:match("^(.*)/$")
    for _, machine in ipairs(e and amalgam.list(dir .. "/" .. e) or {}) do
      local m = machine:match("^(.*)/$")
      for _, file in ipairs(m and amalgam.list(dir .. "/" .. e .. "/" .. m) or {}) do
        local version = file:match("^(.*)%.jsonl$")
        if version and (not keep or keep(e, m, version)) then
          local path = ("%s/%s/%s/%s"):format(dir, e, m, file)
          M.read_file(path, rows, version, broken)
        end
      end
    end
  end
  return rows, broken
end

--- Append the rows of one file to `rows`.
---@param path string
---@param rows Row[]
---@param version string
---@param broken string[] gets "FILE: 2 lines" when it has lines that cannot be read
function M.read_file(path, rows, version, broken)
  local found, n = amalgam.rows(path)
  if n > 0 then
    broken[#broken + 1] = ("%s: %d %s"):format(path, n, n == 1 and "line" or "lines")
  end
  for _, row in ipairs(found) do
    row.version = version
    row.metrics = row.metrics or {}
    row.key = row.key or {}
    -- Lines of `amalgam bench` (e07, e08) are no rows: they have no experiment and no key.
    if row.experiment then rows[#rows + 1] = row end
  end
end

--- The natural key as text; equal points have equal texts.
---@param row Row
---@param without? table<string, boolean> parts that are left out
---@return string
function M.key_text(row, without)
  local words = {}
  for name in pairs(row.key) do
    if not (without and without[name]) then words[#words + 1] = name end
  end
  table.sort(words)
  for i, name in ipairs(words) do
    local value = row.key[name]
    -- A float without fraction and the integer of the same value are one value.
    if type(value) == "number" then value = math.tointeger(value) or value end
    words[i] = name .. "=" .. tostring(value)
  end
  return table.concat(words, " ")
end

--- The GPU that a row was measured on, as NVML describes it; nil when on none.
---@param row Row
---@return table|nil
function M.gpu(row)
  return row.key.device == "cuda" and row.provenance and row.provenance.gpu or nil
end

--- Which of its kind that was, by the beginning of its UUID; nil when that is not known.
---@param row Row
---@return string|nil "GPU-d9bedd35"
function M.gpu_id(row)
  local gpu = M.gpu(row)
  return gpu and gpu.uuid and gpu.uuid:match("^%u+%-%x+") or nil
end

--- Those of some rows, in order.
---@param rows Row[]
---@return string[]
function M.gpu_ids(rows)
  local seen, ids = {}, {}
  for _, row in ipairs(rows) do
    local id = M.gpu_id(row)
    if id and not seen[id] then
      seen[id] = true
      ids[#ids + 1] = id
    end
  end
  table.sort(ids)
  return ids
end

--- The newest finished row of each point: of `version` if it has one, else the latest by time.
--- With `parts`, a point is the values of those parts of the key: of two definitions that differ in
--- a fixed fact, say the number of requests, only the later one's rows are left.
---@param rows Row[]
---@param version? string
---@param parts? fun(experiment: string): table<string, boolean>|nil nil: all but checkpoint and tp
---@return Row[] in the order in which points first appear in time: those of an older definition,
---  whose keys have other parts, come before those that replace them, whatever files they are in
function M.newest(rows, version, parts)
  local chosen, order, by_time = {}, {}, {}
  for i, row in ipairs(rows) do by_time[i] = { row = row, time = row.time or "", place = i } end
  table.sort(by_time, function(a, b)
    if a.time ~= b.time then return a.time < b.time end
    return a.place < b.place
  end)
  for _, entry in ipairs(by_time) do
    local row = entry.row
    local wanted, without = parts and parts(row.experiment), { checkpoint = true, tp = true }
    if wanted then
      without = {}
      for name in pairs(row.key) do without[name] = not wanted[name] end
    end
    local id = row.experiment .. " " .. M.key_text(row, without)
    local old = chosen[id]
    if not old then order[#order + 1] = id end
    local function rank(r)
      return (r.status ~= "failed" and "1" or "0") .. (r.version == version and "1" or "0")
        .. (r.time or "")
    end
    if not old or rank(row) >= rank(old) then chosen[id] = row end
  end
  local out = {}
  for i, id in ipairs(order) do out[i] = chosen[id] end
  return out
end

--- What a row says beside its results: the load generator's lag, the load, and what the hardware
--- can do (ceilings, and times at them).
local FACTS = { lag_p99_ms = true, rate_per_s = true, reference_requests_per_s = true,
  matrix_tflops = true, read_gb_per_s = true, read_gbs = true }

--- Whether less of a metric is better (-1), more (1) or neither (0), by its name.
---@param name string
---@return integer
function M.direction(name)
  if FACTS[name] or name:find("_roofline_us$") or name:find("_serial_us$") then return 0 end
  if name:find("accuracy$") or name:find("per_s$") or name:find("per_s_per_gpu$")
    or name:find("speedup$") or name:find("_gbs$") or name:find("tflops$")
    or name:find("agreement$") or name == "kv_tokens" or name == "batch_limit" then
    return 1
  end
  if name:find("perplexity$") or name:find("_nats$") or name == "rel_err" or name:find("_ms$")
    or name:find("_us$")
    or name:find("_ns$") or name:find("_s$") then
    return -1
  end
  return 0
end

--- Metrics about what comes out rather than how soon: better and worse, not faster and slower.
---@param name string
---@return boolean
function M.is_quality(name)
  return name:find("accuracy$") ~= nil or name:find("perplexity$") ~= nil
    or name:find("_nats$") ~= nil or name:find("agreement$") ~= nil or name == "rel_err"
end

return M
