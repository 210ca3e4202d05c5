--- Experiments as data: loading, checking, expansion to points, and the hash of a definition.
---
--- An experiment file returns a table of the class Experiment. Nothing in it may be misspelt: an
--- unknown key, an axis that is not declared and a global are errors that name file and line.

local amalgam = require("amalgam")

local M = {}

---@class Axis
---@field name string
---@field values (string|number|boolean)[]

---@alias Point table<string, string|number|boolean>

---@class Experiment
---@field id string file name without ".lua"
---@field title string
---@field question string
---@field cost string time it takes, for people
---@field origin? "measured"|"predicted"|"reference" every row must have it
---@field axes Axis[] the sweep; the last axis changes first
---@field fixed? Point facts that do not vary and belong to the natural key
---@field where? fun(point: Point): boolean points for which it is false are left out
---@field quick? table<string, any[]> values under --quick, by axis or fixed fact
---@field jobs "parallel"|"alone" alone: measured, one at a time under the device lock
---@field timeout_s? number of a point (600)
---@field needs? "gpu" where there is none, or no CUDA in the build, nothing runs and no row is made
---@field shared? Shared what several points need, and what must be the same for all of them
---@field run fun(amalgam: table, point: Point, shared?: table): Result

---@class Shared
---@field by string[] axes: run once for each combination of their values, before its points
---@field run fun(amalgam: table, point: Point): table the point has these axes and the fixed facts

---@class Loaded
---@field spec Experiment
---@field file string as it is named in messages
---@field text string
---@field definition string hash over the file and every module that it requires
---@field modules string[]

local FIELDS = {
  id = "string", title = "string", question = "string", cost = "string", origin = "string",
  axes = "table", fixed = "table", where = "function", quick = "table", jobs = "string",
  timeout_s = "number", needs = "string", shared = "table", run = "function",
}
local SHARED_FIELDS = { by = "table", run = "function" }
local AXIS_FIELDS = { name = "string", values = "table" }
local REQUIRED = { "id", "title", "question", "cost", "axes", "jobs", "run" }
local ORIGINS = { measured = true, predicted = true, reference = true }

--- Stop with a message for the user; `command` makes it one line and status 2.
---@param format string
function M.refuse(format, ...)
  error({ exit = 2, message = format:format(...) }, 0)
end

--- Is `key` one of `known`? nil, or what is wrong with it.
---@param key any
---@param known table<string, any>
---@return string|nil
function M.key_problem(key, known)
  if known[key] ~= nil then return nil end
  local nearest = amalgam.nearest(tostring(key), M.sorted_keys(known))
  return ("unknown key '%s': the nearest is '%s'"):format(tostring(key), nearest)
end

--- What the word after an option must be: a whole number from 1 to `most`.
---@param most integer
---@return fun(value: string, flag: string): integer
function M.whole(most)
  return function(value, flag)
    local n = math.tointeger(tonumber(value))
    if not n or n < 1 or n > most then
      M.refuse("%s %s is no number from 1 to %d", flag, value, most)
    end
    return n
  end
end

---@alias OptionKind "flag"|"word"|fun(value: string, flag: string, before: any): any

--- Read a command line: options by their names with "_" for "-", and the other words in `names`.
---@param args string[]
---@param kinds table<string, OptionKind> "word": as it is; a function makes the value of the word
---@param n_names integer other words at most
---@return table
local function options_of(args, kinds, n_names)
  local o, at = { names = {} }, 1
  while args[at] do
    local flag, value = args[at]:match("^(%-%-[%w-]+)=(.*)$")
    flag = flag or args[at]
    local key = flag:gsub("^%-%-", ""):gsub("-", "_")
    local kind = flag:find("^%-") and (flag == "--help" and "flag" or kinds[key])
    if kind == "flag" and not value then
      o[key] = true
    elseif kind and kind ~= "flag" then
      if not value then at = at + 1 end
      value = value or args[at] or M.refuse("%s needs a value", flag)
      o[key] = kind == "word" and value or kind(value, flag, o[key])
    elseif flag:find("^%-") then
      local names = { "--help" }
      for _, name in ipairs(M.sorted_keys(kinds)) do
        names[#names + 1] = "--" .. name:gsub("_", "-")
      end
      M.refuse("unknown option '%s': the nearest is '%s' (--help lists them)", args[at],
        amalgam.nearest(flag, names))
    elseif #o.names == n_names then
      M.refuse("unexpected argument '%s' (--help says what is taken)", args[at])
    else
      table.insert(o.names, args[at])
    end
    at = at + 1
  end
  return o
end

--- A command of `amalgam` (engine/main.c): its help, or its run with the options that it was given.
--- An error is one line and the exit status.
---@param name string
---@param usage string
---@param kinds table<string, OptionKind>
---@param n_names integer words that are no options, at most
---@param run fun(o: table): integer exit status
---@return fun(args: string[]): integer
function M.command(name, usage, kinds, n_names, run)
  return function(args)
    local read = false
    local ok, result = pcall(function()
      local o = options_of(args, kinds, n_names)
      read = true
      if not o.help then return run(o) end
      print(usage)
      return 0
    end)
    if ok then return result end
    local ours = type(result) == "table" and result.message
    local message = tostring(ours and result.message or result):gsub("%c", " ")
    io.stderr:write("amalgam: ", read and "" or name .. ": ", message, "\n")
    return ours and result.exit or 2
  end
end

--- A word for a shell, whatever is in it.
---@param word string
---@return string
function M.quoted(word)
  if word:find("^[%w%-_./:=@]+$") then return word end
  return "'" .. word:gsub("'", "'\\''") .. "'"
end

--- Keys of a table in order, for messages that must not depend on hashing.
---@param t table
---@return string[]
function M.sorted_keys(t)
  local keys = {}
  for k in pairs(t) do keys[#keys + 1] = tostring(k) end
  table.sort(keys)
  return keys
end

--- "file:line" of the place where `word` is first written as a key or a string.
---@param loaded { file: string, text: string }
---@param word string
---@return string
function M.place(loaded, word)
  local plain = tostring(word):gsub("%p", "%%%0")
  local line, fallback = 0, nil
  for content in (loaded.text .. "\n"):gmatch("(.-)\n") do
    line = line + 1
    local code = content:gsub("%-%-.*", "")
    if code:find("%f[%w_]" .. plain .. "%f[^%w_]%s*=") or code:find('"' .. plain .. '"') then
      return ("%s:%d"):format(loaded.file, line)
    end
    if not fallback and code:find(plain) then fallback = line end
  end
  return ("%s:%d"):format(loaded.file, fallback or 1)
end

--- Path of an experiment: a file as given, or "e03" and "e03_throughput" under experiments/.
---@param name string
---@param root string
---@return string path
---@return string shown
local function find(name, root)
  if name:find("%.lua$") then return name, name end
  local found = {}
  for _, entry in ipairs(amalgam.list(root .. "/experiments")) do
    if entry == name .. ".lua" or entry:find("^" .. name:gsub("%p", "%%%0") .. "_.*%.lua$") then
      found[#found + 1] = entry
    end
  end
  if #found == 0 then
    local names = {}
    for _, entry in ipairs(amalgam.list(root .. "/experiments")) do
      names[#names + 1] = entry:match("^(e%d%d_.*)%.lua$")
    end
    M.refuse("no experiment '%s' in experiments/: the nearest is '%s'", name,
      amalgam.nearest(name, names) or "none")
  end
  if #found > 1 then M.refuse("'%s' is more than one: %s", name, table.concat(found, ", ")) end
  return root .. "/experiments/" .. found[1], "experiments/" .. found[1]
end

--- The environment experiments and their modules run in: no new globals, and a `require` that notes
--- what was loaded, since a change of a module changes the experiment.
---@param sources { name: string, text: string }[]
---@return table
local function environment(sources)
  local cache, env = {}, nil
  local function require_noted(name)
    if name == "amalgam" then return amalgam end
    if cache[name] ~= nil then return cache[name] end
    local path = package.searchpath(name, package.path)
    if not path then error(("module '%s' not found"):format(name), 2) end
    local text = amalgam.read_file(path)
    sources[#sources + 1] = { name = name, text = text }
    local chunk, why = load(text, "@" .. name .. ".lua", "t", env)
    if not chunk then error(why, 0) end
    local value = chunk(name)
    cache[name] = value == nil and true or value
    return cache[name]
  end
  local function refuse_global(_, name)
    error(("'%s' is global: write 'local'"):format(name), 2)
  end
  env = setmetatable({ require = require_noted }, { __index = _G, __newindex = refuse_global })
  return env
end

---@param loaded Loaded
local function check_fields(loaded)
  local spec, file = loaded.spec, loaded.file
  if type(spec) ~= "table" then
    M.refuse("%s:1: an experiment file returns a table, this one a %s", file, type(spec))
  end
  for _, key in ipairs(M.sorted_keys(spec)) do
    local problem = M.key_problem(key, FIELDS)
    if problem then M.refuse("%s: %s", M.place(loaded, key), problem) end
    if type(spec[key]) ~= FIELDS[key] then
      M.refuse("%s: '%s' is a %s, not a %s", M.place(loaded, key), key, type(spec[key]),
        FIELDS[key])
    end
  end
  for _, key in ipairs(REQUIRED) do
    if spec[key] == nil then M.refuse("%s:1: '%s' is missing", file, key) end
  end
  if spec.jobs ~= "parallel" and spec.jobs ~= "alone" then
    M.refuse("%s: jobs = '%s' is neither 'parallel' nor 'alone'", M.place(loaded, "jobs"),
      spec.jobs)
  end
  if spec.needs and spec.needs ~= "gpu" then
    M.refuse("%s: needs = '%s' is not 'gpu'", M.place(loaded, "needs"), spec.needs)
  end
  if spec.origin and not ORIGINS[spec.origin] then
    M.refuse("%s: origin = '%s' is none of measured, predicted, reference",
      M.place(loaded, "origin"), spec.origin)
  end
end

---@param loaded Loaded
---@param what string
---@param values any
local function check_values(loaded, what, values)
  if type(values) ~= "table" or #values == 0 then
    M.refuse("%s: %s has no values", M.place(loaded, what), what)
  end
  local seen = {}
  for i, value in ipairs(values) do
    local kind = type(value)
    if kind ~= "string" and kind ~= "number" and kind ~= "boolean" then
      M.refuse("%s: value %d of %s is a %s", M.place(loaded, what), i, what, kind)
    end
    if seen[value] then
      M.refuse("%s: %s has the value '%s' twice", M.place(loaded, what), what, tostring(value))
    end
    seen[value] = true
  end
end

---@param loaded Loaded
local function check_axes(loaded)
  local spec, names = loaded.spec, {}
  for i, axis in ipairs(spec.axes) do
    if type(axis) ~= "table" or type(axis.name) ~= "string" then
      M.refuse("%s: axis %d has no name", M.place(loaded, "axes"), i)
    end
    for _, key in ipairs(M.sorted_keys(axis)) do
      local problem = M.key_problem(key, AXIS_FIELDS)
      if problem then M.refuse("%s: axis '%s': %s", M.place(loaded, key), axis.name, problem) end
    end
    if names[axis.name] then
      M.refuse("%s: axis '%s' twice", M.place(loaded, axis.name), axis.name)
    end
    names[axis.name] = true
    check_values(loaded, axis.name, axis.values)
  end
  for _, key in ipairs(M.sorted_keys(spec.fixed or {})) do
    check_values(loaded, key, { spec.fixed[key] })
    if names[key] then
      M.refuse("%s: '%s' is an axis and fixed as well", M.place(loaded, key), key)
    end
    names[key] = true
  end
  for _, key in ipairs(M.sorted_keys(spec.quick or {})) do
    if not names[key] then
      M.refuse("%s: quick names '%s', which is no axis (axes and fixed facts: %s)",
        M.place(loaded, key), key, table.concat(M.sorted_keys(names), ", "))
    end
    check_values(loaded, key, spec.quick[key])
  end
end

---@param loaded Loaded
local function check_shared(loaded)
  local spec, is_axis = loaded.spec, {}
  if not spec.shared then return end
  for _, axis in ipairs(spec.axes) do is_axis[axis.name] = true end
  for _, key in ipairs(M.sorted_keys(spec.shared)) do
    local problem = M.key_problem(key, SHARED_FIELDS)
    if problem then M.refuse("%s: shared: %s", M.place(loaded, key), problem) end
  end
  for key, kind in pairs(SHARED_FIELDS) do
    if type(spec.shared[key]) ~= kind then
      M.refuse("%s: shared: '%s' is a %s, not a %s", M.place(loaded, "shared"), key,
        type(spec.shared[key]), kind)
    end
  end
  for _, name in ipairs(spec.shared.by) do
    if not is_axis[name] then
      M.refuse("%s: shared: '%s' is no axis", M.place(loaded, "by"), tostring(name))
    end
  end
end

--- Of a point, what its `shared` may depend on: the axes that it names and the fixed facts.
---@param spec Experiment
---@param key Point
---@return Point
---@return string name the same for all points that share it
function M.shared_key(spec, key)
  local part, apart = {}, {}
  for _, axis in ipairs(spec.axes) do apart[axis.name] = true end
  for _, name in ipairs(spec.shared.by) do apart[name] = nil end
  for name, value in pairs(key) do
    if not apart[name] then part[name] = value end
  end
  return part, amalgam.json_encode(part)
end

--- Load and check an experiment. Raises {exit = 2, message = "file:line: ..."}.
---@param name string "e03", "e03_throughput" or a path ending in ".lua"
---@return Loaded
function M.load(name)
  local path, shown = find(name, amalgam.identity().root)
  local ok, text = pcall(amalgam.read_file, path)
  if not ok then M.refuse("%s", text) end
  local sources = { { name = "experiment", text = text } }
  local chunk, why = load(text, "@" .. shown, "t", environment(sources))
  if not chunk then M.refuse("%s", why) end
  local good, spec = pcall(chunk)
  if not good then
    if type(spec) == "table" then error(spec, 0) end
    M.refuse("%s", tostring(spec))
  end
  local parts, modules = {}, {}
  for i, source in ipairs(sources) do
    parts[#parts + 1] = ("%s %d\n%s"):format(source.name, #source.text, source.text)
    if i > 1 then modules[#modules + 1] = source.name end
  end
  local loaded = {
    spec = spec, file = shown, text = text, modules = modules,
    definition = amalgam.hash(table.concat(parts, "\n")),
  }
  check_fields(loaded)
  check_axes(loaded)
  check_shared(loaded)
  return loaded
end

--- A point for an experiment's functions: reading what is no axis is an error with file:line.
---@param key Point
---@return Point
function M.guard(key)
  local copy = {}
  for name, value in pairs(key) do copy[name] = value end
  return setmetatable(copy, {
    __index = function(_, name)
      error(("the point has no axis '%s' (it has %s)"):format(tostring(name),
        table.concat(M.sorted_keys(key), ", ")), 2)
    end,
  })
end

--- The values of an axis or fixed fact that `wanted` asks for, from the command line.
---@param values any[]
---@param wanted string
---@return any[]|nil
local function choose(values, wanted)
  local function pick(word)
    for _, value in ipairs(values) do
      if tostring(value) == word then return value end
    end
    for _, value in ipairs(values) do
      if type(value) == "number" and tonumber(word) == value then return value end
    end
    return nil
  end
  local whole = pick(wanted) -- a precision with a list of KV formats has commas of its own
  if whole ~= nil then return { whole } end
  local out = {}
  for word in wanted:gmatch("[^,]+") do
    local value = pick(word)
    if value == nil then return nil end
    out[#out + 1] = value
  end
  return #out > 0 and out or nil
end

---@param values any[]
---@return string[]
local function words_of(values)
  local words = {}
  for i, value in ipairs(values) do words[i] = tostring(value) end
  return words
end

---@class Filter
---@field quick? boolean
---@field only? { key: string, value: string }[] restrict an axis or fixed fact to values it has
---@field set? { key: string, value: string, replace?: boolean }[] restrict an axis, or replace a
--- fixed fact (with `replace` an axis too)

--- Axes (declared ones, then each fixed fact as an axis of one value) after quick and filters.
---@param loaded Loaded
---@param filter Filter
---@return Axis[]
local function effective_axes(loaded, filter)
  local spec, axes, by_name = loaded.spec, {}, {}
  local quick = filter.quick and spec.quick or {}
  local function add(name, values, fixed)
    local axis = { name = name, values = quick[name] or values, fixed = fixed }
    axes[#axes + 1] = axis
    by_name[name] = axis
  end
  for _, axis in ipairs(spec.axes) do add(axis.name, axis.values, false) end
  for _, key in ipairs(M.sorted_keys(spec.fixed or {})) do add(key, { spec.fixed[key] }, true) end

  local function restrict(o, may_replace)
    local axis = by_name[o.key]
    if not axis then
      local names = M.sorted_keys(by_name)
      M.refuse("%s has no axis '%s': the nearest is '%s' (axes: %s)", spec.id, o.key,
        amalgam.nearest(o.key, names), table.concat(names, ", "))
    end
    local values = choose(axis.values, o.value)
    if not values and may_replace and (axis.fixed or o.replace) then values = { o.value } end
    if not values then
      local words = words_of(axis.values)
      M.refuse("%s: '%s' is no value of %s: the nearest is '%s' (values: %s)", spec.id, o.value,
        o.key, amalgam.nearest(o.value, words) or "none", table.concat(words, ", "))
    end
    axis.values = values
  end
  for _, o in ipairs(filter.only or {}) do restrict(o, false) end
  for _, o in ipairs(filter.set or {}) do restrict(o, true) end
  return axes
end

---@class PointEntry
---@field key Point axes and fixed facts: the natural key before the run adds what it found out
---@field id string hash of experiment and key

--- All points in order: the last declared axis changes first.
---@param loaded Loaded
---@param filter? Filter
---@return PointEntry[]
function M.expand(loaded, filter)
  local spec = loaded.spec
  local axes = effective_axes(loaded, filter or {})
  local points = {}
  local function walk(depth, key)
    local axis = axes[depth]
    if axis then
      for _, value in ipairs(axis.values) do
        key[axis.name] = value
        walk(depth + 1, key)
      end
      return
    end
    if spec.where then
      local ok, keep = pcall(spec.where, M.guard(key))
      if not ok then M.refuse("%s", tostring(keep)) end
      if not keep then return end
    end
    local copy = {}
    for name, value in pairs(key) do copy[name] = value end
    points[#points + 1] =
      { key = copy, id = amalgam.hash(spec.id .. " " .. amalgam.json_encode(copy)) }
  end
  walk(1, {})
  return points
end

--- "gpu=h100 model=Qwen3-8B ...": the declared axes of a point, for people.
---@param loaded Loaded
---@param key Point
---@return string
function M.describe(loaded, key)
  local words = {}
  for _, axis in ipairs(loaded.spec.axes) do
    words[#words + 1] = ("%s=%s"):format(axis.name, tostring(key[axis.name]))
  end
  return table.concat(words, " ")
end

--- What makes a point of an experiment: its axes, and what is chosen on the command line. nil for
--- one whose file is gone.
---@return fun(experiment: string): table<string, boolean>|nil
function M.parts_of_points()
  local known = {}
  return function(name)
    if known[name] == nil then
      local ok, loaded = pcall(M.load, name)
      local parts = ok and { device = true, gpu = true }
      for _, axis in ipairs(ok and loaded.spec.axes or {}) do parts[axis.name] = true end
      if ok and loaded.spec.fixed and loaded.spec.fixed.tp then parts.tp = true end
      known[name] = parts
    end
    return known[name] or nil
  end
end

return M
