--- `amalgam rows`: what an experiment has in store, as a table. For looking; the paper's tables are
--- plots/tabNN_*.lua.

local amalgam = require("amalgam")
local experiment = require("lib_experiment")
local library = require("lib_rows")

local M = {}

local USAGE = [[
usage: amalgam rows EXPERIMENT [options]

The stored rows of an experiment ("e03": the beginning of its name) as a table, one line a point:
the parts of the key in which rows differ, which GPU it was where they are of several of a kind, and
metrics.

  --metric NAME     metrics whose name begins so; may be repeated (default: the first six)
  --only KEY=VALUE  only rows with this value in the key; may be repeated
  --version NAME    rows of this version alone (default: of each point the newest)
  --results DIR     where rows are kept (default: results)
  --json            whole rows, one object a line

Exit status: 0 done, 2 usage, or no such rows.]]

local function gathered(pattern, what)
  return function(value, flag, before)
    local found = { value:match(pattern) }
    if not found[1] then experiment.refuse("%s %s is not %s", flag, value, what) end
    local list = before or {}
    list[#list + 1] = found
    return list
  end
end

local OPTIONS = {
  json = "flag", results = "word", version = "word", metric = gathered("^([%w_]+)$", "a name"),
  only = gathered("^([%w_]+)=(.+)$", "KEY=VALUE"),
}

local METRICS = 6 -- shown where none is named

--- A part of a key as it is written: a whole number without ".0".
local function word(value)
  if type(value) == "number" then value = math.tointeger(value) or value end
  return tostring(value)
end

---@param rows Row[]
---@param o table
---@return Row[]
local function kept(rows, o)
  local out, parts = {}, {}
  for _, row in ipairs(rows) do
    for name in pairs(row.key) do parts[name] = true end
  end
  for _, pair in ipairs(#rows > 0 and o.only or {}) do
    if not parts[pair[1]] then
      experiment.refuse("rows: no row has '%s': the nearest is '%s'", pair[1],
        amalgam.nearest(pair[1], experiment.sorted_keys(parts)))
    end
  end
  for _, row in ipairs(rows) do
    local keep = not o.version or row.version:sub(1, #o.version) == o.version
    for _, pair in ipairs(o.only or {}) do
      keep = keep and row.key[pair[1]] ~= nil and word(row.key[pair[1]]) == pair[2]
    end
    if keep then out[#out + 1] = row end
  end
  return out
end

--- Names of key parts that are not the same in all rows, and of all metrics, both in order.
---@param rows Row[]
---@return string[] parts
---@return string[] metrics
local function columns(rows)
  local first, differs, metrics = {}, {}, {}
  for at, row in ipairs(rows) do
    for name, value in pairs(row.key) do
      if at == 1 then first[name] = word(value) end
      differs[name] = differs[name] or first[name] ~= word(value) or nil
    end
    for name in pairs(first) do differs[name] = differs[name] or row.key[name] == nil or nil end
    for name in pairs(row.metrics) do metrics[name] = true end
  end
  return experiment.sorted_keys(differs), experiment.sorted_keys(metrics)
end

--- Those metrics that were asked for, in the order in which they were.
---@param all string[]
---@param wanted? string[][]
---@return string[]
local function chosen(all, wanted)
  if not wanted then return { table.unpack(all, 1, METRICS) } end
  local out, taken = {}, {}
  for _, pair in ipairs(wanted) do
    local n = #out
    for _, name in ipairs(all) do
      if name:sub(1, #pair[1]) == pair[1] and not taken[name] then
        out[#out + 1], taken[name] = name, true
      end
    end
    if #out == n and not taken[pair[1]] then
      experiment.refuse("rows: no metric begins with '%s': the nearest is '%s'", pair[1],
        amalgam.nearest(pair[1], all) or "")
    end
  end
  return out
end

--- Columns as wide as their widest cell.
---@param lines string[][]
local function print_aligned(lines)
  local width = {}
  for _, line in ipairs(lines) do
    for i, cell in ipairs(line) do width[i] = math.max(width[i] or 0, #cell) end
  end
  for _, line in ipairs(lines) do
    local cells = {}
    for i, cell in ipairs(line) do cells[i] = cell .. (" "):rep(width[i] - #cell) end
    print((table.concat(cells, "  "):gsub("%s+$", "")))
  end
end

---@param o table
---@return integer
local function run(o)
  local name = o.names[1] or experiment.refuse("rows: which experiment? (amalgam rows --help)")
  local dir = o.results or amalgam.identity().root .. "/results"
  local all, broken = library.read(dir, function(e) return e:sub(1, #name) == name end)
  for _, file in ipairs(broken) do
    io.stderr:write(("amalgam: rows: left out, cannot be read: %s\n"):format(file))
  end
  local rows = library.newest(kept(all, o), nil, experiment.parts_of_points())
  if #rows == 0 then
    experiment.refuse("rows: %s in %s", #all == 0 and ("no rows of '%s'"):format(name)
      or ("none of the %d rows of '%s' is one of these"):format(#all, name), dir)
  end
  if o.json then
    for _, row in ipairs(rows) do print(amalgam.json_encode(row)) end
    return 0
  end
  local parts, metrics = columns(rows)
  local shown = chosen(metrics, o.metric)
  local head, many = { table.unpack(parts) }, #library.gpu_ids(rows) > 1
  table.move({ "version", "status" }, 1, 2, #head + 1, head)
  if many then table.insert(head, #parts + 2, "gpu_uuid") end
  table.move(shown, 1, #shown, #head + 1, head)
  local lines = { head }
  for _, row in ipairs(rows) do
    local line = {}
    for i, part in ipairs(parts) do
      line[i] = row.key[part] == nil and "-" or word(row.key[part])
    end
    line[#line + 1] = row.version
    if many then line[#line + 1] = library.gpu_id(row) or "-" end
    line[#line + 1] = row.status == "ok" and row.origin or row.status
    for _, metric in ipairs(shown) do
      local x = row.metrics[metric]
      line[#line + 1] = x and ("%.6g"):format(x) or "-"
    end
    line[#line + 1] = row.reason -- beside the table: no column is as wide
    lines[#lines + 1] = line
  end
  print_aligned(lines)
  if #shown < #metrics and not o.metric then
    print("\nnot shown (--metric NAME): " .. table.concat(metrics, " ", #shown + 1))
  end
  return 0
end

M.main = experiment.command("rows", USAGE, OPTIONS, 1, run)

return M
