--- `amalgam run`: every point of an experiment in a child process of its own, one row for each.
---
--- A row is written the moment its point is done, by one append, so a killed run has lost nothing
--- that was finished and the next one goes on from there. A crash, an error or a time-out of one
--- point is a row with status `failed`; a mistake of the experiment itself (unknown key, misspelt
--- axis) stops everything with one line and exit status 2.

local amalgam = require("amalgam")
local experiment = require("lib_experiment")

local M = {}

local USAGE = [[
usage: amalgam run EXPERIMENT... [options]

EXPERIMENT is a Lua file, or the beginning of a name in experiments/ ("e03", "e03_throughput").

  --quick             few points, each small; rows go to build/quick/results
  --only KEY=VALUE    only points with this value (or one of VALUE,VALUE...); may be repeated
  --device NAME       cuda, cpu or sim: as --only device=NAME, also where the experiment fixes one
  --gpu NAME          the same for gpu: any that has a data sheet
  --jobs N            points at a time, for experiments that allow it (default: all cores)
  --seconds N         start no point later than that; the same command goes on from there
  --results DIR       where rows are kept (default: results)
  --resume            skip finished points and say so: the default, for those who like to write it
  --retry-failed      only points whose last row says failed
  --again             run finished points once more: rows are added, none is replaced
  --list              print the points and their state, run nothing

Exit status: 0 done, 1 a point failed or a row could not be written, 2 usage, bad experiment, 4 the
build has no CUDA, 130 interrupted.]]

---@class RunOptions
---@field names string[]
---@field quick? boolean
---@field only? { key: string, value: string }[]
---@field device? string
---@field gpu? string
---@field jobs? integer
---@field seconds? integer
---@field results? string
---@field again? boolean
---@field retry_failed? boolean
---@field list? boolean
local OPTIONS = {
  quick = "flag", resume = "flag", retry_failed = "flag", again = "flag", list = "flag",
  results = "word", device = "word", gpu = "word",
  jobs = experiment.whole(64), seconds = experiment.whole(1000000),
  only = function(value, flag, before)
    local key, wanted = value:match("^([%w_]+)=(.+)$")
    if not key then experiment.refuse("%s %s is not KEY=VALUE", flag, value) end
    local list = before or {}
    table.insert(list, { key = key, value = wanted })
    return list
  end,
}

---@param o RunOptions
---@param root string
---@return string
local function results_root(o, root)
  if o.results then return o.results end
  return root .. (o.quick and "/build/quick/results" or "/results")
end

local FINISHED = { ok = true, skipped = true, oom = true }
local STATUSES = { ok = true, skipped = true, oom = true, invalid = true, failed = true }

--- The latest row of each point in a results file that was made by the same definition.
---@param path string
---@param definition string
---@return table<string, table> rows by point id
---@return integer n_other rows of another definition
---@return integer n_broken lines that are no rows
local function rows_before(path, definition)
  local latest, n_other = {}, 0
  local rows, n_broken = amalgam.rows(path)
  for _, row in ipairs(rows) do
    if row.definition ~= definition then
      n_other = n_other + 1
    elseif row.point then
      latest[row.point] = row
    end
  end
  return latest, n_other, n_broken
end

--- Numbers are stored with nine significant digits: more is noise, and rows stay readable.
---@param x number
---@return number
local function rounded(x)
  if math.type(x) == "integer" or x ~= x or x == math.huge or x == -math.huge then return x end
  return tonumber(("%.9g"):format(x)) + 0.0
end

local RESULT_KEYS = {
  status = "string", reason = "string", origin = "string", checkpoint = "string",
  precision = "string", tp = "number",
  metrics = "table", gpu = "table",
}

--- What `run` returned, checked. Raises for a result that is no result.
---@param result any
---@param declared_origin? string of the experiment, or of the device
---@return table
local function check_result(result, declared_origin)
  if type(result) ~= "table" then error("run returned a " .. type(result) .. ", no table", 0) end
  for _, key in ipairs(experiment.sorted_keys(result)) do
    local problem = experiment.key_problem(key, RESULT_KEYS)
    if problem then error("result: " .. problem, 0) end
    if type(result[key]) ~= RESULT_KEYS[key] then
      error(("result: '%s' is a %s"):format(key, type(result[key])), 0)
    end
  end
  if not STATUSES[result.status] then
    error(("result: status '%s' is none of ok, skipped, oom, invalid, failed")
      :format(tostring(result.status)), 0)
  end
  if declared_origin and result.origin and result.origin ~= declared_origin then
    error(("the experiment says %s and the point says %s"):format(declared_origin,
      result.origin), 0)
  end
  if result.status == "ok" and not (result.origin or declared_origin) then
    error("result: origin is missing", 0)
  end

  local metrics = {}
  for _, name in ipairs(experiment.sorted_keys(result.metrics or {})) do
    local value = result.metrics[name]
    if type(value) ~= "number" then error(("metric '%s' is no number"):format(name), 0) end
    metrics[name] = rounded(value)
  end
  result.metrics = metrics
  return result
end

--- Mistakes that no point can escape: they stop the run instead of filling a file with failures.
---@param why string
---@return boolean
local function is_mistake(why)
  return why:find("unknown key '", 1, true) ~= nil or why:find("has no axis '", 1, true) ~= nil
    or why:find("' is global: write 'local'", 1, true) ~= nil
end

--- What numbers are whose origin neither the experiment nor the point says.
local ORIGIN_OF = { cuda = "measured", sim = "predicted", null = "reference" }

--- What went wrong in a point. Errors of amalgam.serve and amalgam.bench, which `watched` calls,
--- are placed where the experiment has their name, or the key that is none.
---@param loaded Loaded
---@param why any
---@return table # a result
local function failure(loaded, why)
  why = tostring(why):gsub("%c", " ")
  local said, name = why:match("lib_run%.lua:%d+: ((%a+).*)")
  if name == "serve" or name == "bench" then
    local key = said:match("^serve: unknown key '([^']+)'")
    why = ("%s: %s"):format(experiment.place(loaded, key or name), said)
  end
  return { status = is_mistake(why) and "mistake" or "failed", reason = why }
end

--- `amalgam` as a point sees it, and what NVML said during the last run it served, or right after
--- the last benchmark (a line of its own, which the point does not see): many experiments keep but
--- a part of a result.
---@return table view
---@return fun(): table|nil gpu
local function watched()
  local gpu
  local view = {}
  function view.serve(options)
    local result = amalgam.serve(options)
    gpu = result.gpu or gpu
    return result
  end
  function view.bench(name, options)
    local lines, status, reason = amalgam.bench(name, options)
    local last = lines and lines[#lines]
    if last and last.kind == "gpu" then
      gpu, last.kind, lines[#lines] = last, nil, nil
    end
    return lines, status, reason
  end
  return setmetatable(view, { __index = amalgam }), function() return gpu end
end

---@param loaded Loaded
---@param entry PointEntry
---@param shared table<string, { value?: table, status?: string, reason?: string }>
---@return table # crosses the process border as JSON
local function run_point(loaded, entry, shared)
  local spec = loaded.spec
  local ok, result = pcall(function()
    local origin, value = spec.origin or ORIGIN_OF[entry.key.device], nil
    if spec.shared then
      local _, name = experiment.shared_key(spec, entry.key)
      local made = shared[name]
      if made.status then return check_result(made, origin) end
      value = made.value
    end
    local view, gpu_of = watched()
    local made = check_result(spec.run(view, experiment.guard(entry.key), value), origin)
    made.gpu = made.gpu or gpu_of()
    return made
  end)
  return ok and result or failure(loaded, result)
end

--- Numbers that were computed and not clocked do not depend on load or clocks.
local PREDICTED_PROVENANCE = { "cpu", "compiler", "flags" }

---@param origin? string
---@param gpu? table as it was while the point ran
---@return table
local function provenance(origin, gpu)
  local all = amalgam.identity().provenance
  all.gpu_during = gpu
  if origin ~= "predicted" and origin ~= "reference" then return all end
  local some = {}
  for _, key in ipairs(PREDICTED_PROVENANCE) do some[key] = all[key] end
  return some
end

---@param context table id, run, definition, identity, declared origin, GPU where it is needed
---@param entry PointEntry
---@param result table
---@param wall_s number
---@return table
local function make_row(context, entry, result, wall_s)
  local key = {}
  for name, value in pairs(entry.key) do key[name] = value end
  if key.tp == nil then key.tp = result.tp end
  if key.checkpoint == nil then key.checkpoint = result.checkpoint end
  if key.precision == nil then key.precision = result.precision end
  if key.device == "cuda" and key.gpu == nil then key.gpu = context.gpu end
  local origin = result.origin or context.origin or ORIGIN_OF[key.device]
  local id = context.identity
  return {
    schema = id.schema, run = context.run, time = os.date("!%Y-%m-%dT%H:%M:%SZ"),
    commit = id.commit, diff = id.diff, experiment = context.id, definition = context.definition,
    machine = id.machine, point = entry.id, key = key, origin = origin, status = result.status,
    reason = result.reason, metrics = result.metrics or {},
    provenance = provenance(origin, result.gpu), wall_s = rounded(wall_s),
  }
end

--- Which points are left to do, given the rows there are.
---@param points PointEntry[]
---@param latest table<string, table>
---@param o RunOptions
---@return PointEntry[] todo
---@return integer n_finished
---@return integer n_retried
local function remaining(points, latest, o)
  local todo, n_finished, n_retried = {}, 0, 0
  for _, entry in ipairs(points) do
    local row = latest[entry.id]
    local finished = row and FINISHED[row.status]
    if finished then n_finished = n_finished + 1 end
    if row and not finished then n_retried = n_retried + 1 end
    local wanted = not finished or o.again
    if o.retry_failed then wanted = row ~= nil and row.status == "failed" end
    if wanted then todo[#todo + 1] = entry end
  end
  return todo, n_finished, n_retried
end

--- One writer of measurements at a time on a machine; sweeps of predictions keep out of their way.
---@param root string
---@param jobs string
local function take_lock(root, jobs)
  local path, kind = root .. "/build/device.lock", jobs == "alone" and "exclusive" or "shared"
  if amalgam.lock(path, kind, false) then return end
  print("waiting: another run holds the device lock")
  amalgam.lock(path, kind, true)
end

--- One writer of a results file at a time: two runs of an experiment would do every point twice.
--- Taken after the device lock and given back before the next experiment wants that, or else two
--- runs could wait for each other.
---@param root string
---@param path string of the rows
---@return string lock
local function take_rows(root, path)
  local lock = ("%s/build/%s.lock"):format(root, amalgam.hash(path))
  if not amalgam.lock(lock, "exclusive", false) then
    print("waiting: another run adds to these rows")
    amalgam.lock(lock, "exclusive", true)
  end
  return lock
end

---@param n integer
---@param one string
---@return string
local function count(n, one) return ("%d %s%s"):format(n, one, n == 1 and "" or "s") end

---@param device string
---@return boolean
local function is_built(device)
  for _, name in ipairs(amalgam.devices()) do
    if name == device then return true end
  end
  return false
end

--- Why nothing of an experiment can run here, or nil.
---@param spec Experiment
---@param identity table
---@return string|nil
local function missing(spec, identity)
  if spec.needs ~= "gpu" then return nil end
  if not is_built("cuda") then return "this build has no CUDA (make CUDA_ARCH=...)" end
  return not identity.provenance.gpu and "there is no NVIDIA GPU here" or nil
end

--- Is it the GPU of a sheet, by its name and its memory, which is within a tenth? The sheet's first
--- word ("a100" of "a100-80gb", "rtx4090") is a word of the name, or two: a GH200 is no H200. A
--- card for PCIe has another memory and other clocks than the module (SXM) of that number.
---@param gpu { name: string, memory_bytes: integer } as NVML has it
---@param sheet string
---@return boolean
local function is_of(gpu, sheet)
  local name, letters, digits = gpu.name:lower(), sheet:match("^(%a+)(%d%w*)")
  local share = gpu.memory_bytes / amalgam.gpu(sheet).memory_bytes
  return name:find("%f[%w]" .. letters .. "%W?" .. digits .. "%f[%W]") ~= nil
    and share > 0.9 and share < 1.1
    and not (sheet:find("sxm", 1, true) and name:find("pcie", 1, true))
end

--- The data sheet of the GPU at hand; nil when there is none.
---@param gpu? { name: string, memory_bytes: integer } as NVML has it
---@return string|nil
function M.sheet_of(gpu)
  for _, sheet in ipairs(gpu and amalgam.gpus() or {}) do
    if is_of(gpu, sheet) then return sheet end
  end
  return nil
end

---@param name string
---@return boolean
local function is_sheet(name)
  for _, sheet in ipairs(amalgam.gpus()) do
    if sheet == name then return true end
  end
  return false
end

--- `--gpu` takes every GPU that has a data sheet, also one that the experiment does not name.
--- `--device cuda` without it: an experiment that names GPUs runs on the one at hand.
---@param spec Experiment
---@param o RunOptions
---@param identity table
---@return { key: string, value: string }[] set
local function settings(spec, o, identity)
  local set, device, gpu = {}, o.device, o.gpu
  if device then table.insert(set, { key = "device", value = device }) end
  if gpu then set[#set + 1] = { key = "gpu", value = gpu, replace = is_sheet(gpu) } end
  if device and not is_built(device) then -- else every point would leave a row that says so
    error({
      exit = device == "cuda" and 4 or 2,
      message = ("run: --device %s: this build has %s%s"):format(device,
        table.concat(amalgam.devices(), ", "), device == "cuda" and " (make CUDA_ARCH=...)" or ""),
    }, 0)
  end
  local named = spec.fixed and spec.fixed.gpu ~= nil
  for _, axis in ipairs(spec.axes) do named = named or axis.name == "gpu" end
  local here = identity.provenance.gpu
  if device == "cuda" and not gpu and named and here then
    local sheet = M.sheet_of(here)
    if not sheet then
      experiment.refuse("run: no data sheet under workloads/gpus is of the %s: name one by --gpu",
        here.name)
    end
    set[#set + 1] = { key = "gpu", value = sheet, replace = true }
  end
  return set
end

local function new_tally()
  return {
    ok = 0, oom = 0, skipped = 0, invalid = 0, failed = 0, rows = 0, later = 0, reasons = {},
  }
end

--- `amalgam.isolate` with the errors that end a run.
---@param spec Experiment
---@param tally table
local function isolated(spec, tally, n, jobs, run, done)
  local ok, why = pcall(amalgam.isolate, n, jobs, spec.timeout_s or 600, run, done)
  amalgam.progress_end()
  if ok then return end
  if type(why) == "table" then error(why, 0) end
  local reason = tostring(why):gsub("^%S+%.lua:%d+: ", "")
  error({
    exit = reason == "interrupted" and 130 or 1,
    message = ("%s: %s; %s of this run kept, the same command goes on from there"):format(spec.id,
      reason, count(tally.rows, "row")),
  }, 0)
end

--- What points share, by the name of what it depends on: a value, or the result that each gets.
---@param loaded Loaded
---@param todo PointEntry[]
---@param jobs integer
---@param tally table
---@return table<string, { value?: table, status?: string, reason?: string }>
local function run_shared(loaded, todo, jobs, tally)
  local spec, made, list, n_done = loaded.spec, {}, {}, 0
  if not spec.shared then return made end
  for _, entry in ipairs(todo) do
    local part, name = experiment.shared_key(spec, entry.key)
    if not made[name] then
      made[name] = {}
      list[#list + 1] = { part = part, name = name }
    end
  end
  local function run(index)
    local ok, value = pcall(spec.shared.run, amalgam, experiment.guard(list[index].part))
    if ok and type(value) ~= "table" then
      ok, value = false, ("shared.run returned a %s, no table"):format(type(value))
    end
    return ok and { value = value } or failure(loaded, value)
  end
  local function done(index, result, reason)
    result = result or { status = "failed", reason = reason }
    if result.status == "mistake" then
      error({ exit = 2, message = result.reason, rows = tally.rows }, 0)
    end
    made[list[index].name] = result
    n_done = n_done + 1
    amalgam.progress_show(n_done, "what points share")
  end
  amalgam.progress_start(spec.id, #list)
  isolated(spec, tally, #list, jobs, run, done)
  return made
end

--- Run what is left of one experiment.
---@param loaded Loaded
---@param todo PointEntry[]
---@param context table
---@param jobs integer
---@param seconds? integer no point starts later than that
---@return table tally
local function run_all(loaded, todo, context, jobs, seconds)
  local spec = loaded.spec
  local tally = new_tally()
  local n_reasons, started = 0, os.time()
  local shared = run_shared(loaded, todo, jobs, tally)

  local function run(index)
    if seconds and os.time() - started >= seconds then return { status = "later" } end
    return run_point(loaded, todo[index], shared)
  end

  local function done(index, result, reason, wall_s)
    local entry = todo[index]
    if result and result.status == "later" then
      tally.later = tally.later + 1
      return
    end
    result = result or { status = "failed", reason = reason }
    if result.status == "mistake" then
      error({ exit = 2, message = result.reason, rows = tally.rows }, 0)
    end
    local row = make_row(context, entry, result, wall_s)
    amalgam.append(context.path, amalgam.json_encode(row))
    tally.rows = tally.rows + 1
    tally[result.status] = tally[result.status] + 1
    if result.status == "failed" or result.status == "invalid" then
      local why = result.reason or "no reason given"
      if not tally.reasons[why] then
        n_reasons = n_reasons + 1
        tally.first_reason = tally.first_reason or why
        if n_reasons <= 8 then
          amalgam.progress_line(("%s: %s: %s"):format(result.status,
            experiment.describe(loaded, entry.key), why))
        end
      end
      tally.reasons[why] = (tally.reasons[why] or 0) + 1
    end
    amalgam.progress_show(tally.rows, experiment.describe(loaded, entry.key))
  end

  amalgam.progress_start(spec.id, #todo)
  isolated(spec, tally, #todo, jobs, run, done)
  return tally
end

--- An experiment and its points under these options. Refuses what is wrong with either.
---@param name string
---@param o RunOptions
---@return { loaded: Loaded, points: PointEntry[] }
local function chosen(name, o)
  local loaded = experiment.load(name)
  local points = experiment.expand(loaded, {
    quick = o.quick, only = o.only, set = settings(loaded.spec, o, amalgam.identity()),
  })
  if #points == 0 then
    experiment.refuse("%s: no point is left by these options", loaded.spec.id)
  end
  return { loaded = loaded, points = points }
end

---@param loaded Loaded
---@param points PointEntry[]
---@param o RunOptions
---@return boolean all_good
local function run_one(loaded, points, o)
  local identity, spec = amalgam.identity(), loaded.spec
  local dir = results_root(o, identity.root)
  local path = ("%s/%s/%s/%s.jsonl"):format(dir, spec.id, identity.machine, identity.version)
  local shown = path:sub(1, #identity.root + 1) == identity.root .. "/"
    and path:sub(#identity.root + 2) or path

  local latest, n_other, n_broken = rows_before(path, loaded.definition)
  local todo, n_finished, n_retried = remaining(points, latest, o)
  if o.list then
    for _, entry in ipairs(points) do
      local row = latest[entry.id]
      print(("%-8s %s"):format(row and row.status or "to do",
        experiment.describe(loaded, entry.key)))
    end
    return true
  end

  print(("%s: %s"):format(spec.id, spec.title))
  local why = missing(spec, identity)
  if why then
    print(("  not run: %s"):format(why))
    return true
  end
  local alone, rows_lock = spec.jobs == "alone", nil
  for _, entry in ipairs(todo) do alone = alone or entry.key.device == "cuda" end
  if #todo > 0 then
    take_lock(identity.root, alone and "alone" or "parallel")
    rows_lock = take_rows(identity.root, path)
    latest, n_other, n_broken = rows_before(path, loaded.definition) -- what is there by now
    todo, n_finished, n_retried = remaining(points, latest, o)
  end
  if n_broken > 0 then
    print(("  %s of %s cannot be read (a killed run leaves one) and is left out"):format(
      count(n_broken, "line"), shown))
  end
  if n_other > 0 then
    print(("  %s in %s belong to another definition of this experiment: run again"):format(
      count(n_other, "row"), shown))
  end
  if n_finished > 0 and not o.again then
    print(("  %d of %s finished in %s: skipped"):format(n_finished, count(#points, "point"), shown))
  end
  if n_retried > 0 then
    print(("  %s failed before: tried again"):format(count(n_retried, "point")))
  end

  local started = os.time()
  local tally = new_tally()
  if #todo > 0 then
    local jobs = alone and 1 or o.jobs or identity.provenance.cores
    local context = {
      id = spec.id, path = path, definition = loaded.definition, identity = identity,
      gpu = identity.provenance.gpu and identity.provenance.gpu.name or nil,
      origin = spec.origin, run = amalgam.hash(identity.time .. loaded.definition .. os.clock()),
    }
    local ok, result = pcall(run_all, loaded, todo, context, math.min(jobs, 64), o.seconds)
    if not ok then
      amalgam.lock(rows_lock, "none")
      error(result, 0)
    end
    tally = result
  end
  if rows_lock then amalgam.lock(rows_lock, "none") end
  if tally.later > 0 then
    print(("  %s left after %d s: the same command goes on"):format(count(tally.later, "point"),
      o.seconds))
  end
  print(("  %d ok, %d oom, %d skipped, %d failed%s, %d finished before, %d s -> %s"):format(
    tally.ok, tally.oom, tally.skipped, tally.failed,
    tally.invalid > 0 and (", %d invalid"):format(tally.invalid) or "",
    o.again and 0 or n_finished, os.time() - started, shown))

  -- When nothing but one Lua error came out, the experiment is wrong and not a point of it.
  if tally.failed == tally.rows and tally.rows > 1 and tally.reasons[tally.first_reason]
      == tally.rows and tally.first_reason:find("^[^:]+%.lua:%d+:") then
    error({ exit = 2, message = tally.first_reason .. " (every point)" }, 0)
  end
  return tally.failed == 0 and tally.invalid == 0
end

---@param o RunOptions
---@return integer exit status
local function run(o)
  if #o.names == 0 then experiment.refuse("run: which experiment? (amalgam run --help)") end
  local all, status = {}, 0
  for i, name in ipairs(o.names) do all[i] = chosen(name, o) end -- a typo costs no hours
  for _, one in ipairs(all) do
    if not run_one(one.loaded, one.points, o) then status = 1 end
  end
  return status
end

M.main = experiment.command("run", USAGE, OPTIONS, math.huge, run)

return M
