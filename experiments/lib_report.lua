--- `amalgam report`: tables, figures and PAPER.md, made from the rows that exist and nothing else.
---
--- plots/figNN_*.lua gives the numbers of a figure (a TSV), plots/figNN_*.gp draws them;
--- plots/tabNN_*.lua gives a Markdown table; plots/paper.md is the text around them, with every
--- number an expression. What has no rows is said to be missing.

local amalgam = require("amalgam")
local experiment = require("lib_experiment")
local library = require("lib_rows")
local stats = require("lib_stats")

local quoted = experiment.quoted

local M = {}

local USAGE = [[
usage: amalgam report [options]

  --results DIR   where rows are kept (default: results)
  --out DIR       where PAPER.md and plots/out/ go (default: the checkout)
  --no-figures    write tables and numbers, draw nothing

Exit status: 0 done, 1 a figure could not be drawn, 2 usage.]]

---@class Data rows of all experiments, with the questions that tables and figures ask
---@field identity table
---@field rows Row[] newest row of each point
---@field all Row[] those that it was chosen from
---@field bucket table<string, Row[]> rows of an experiment, GPU and model, found once
---@field others table<string, integer> rows that are left out, by the GPU they were measured on
---@field predicts table<string, boolean> experiments that have rows of other devices than cuda
---@field used? table<Row, boolean> those that the table or figure at work has taken
local Data = {}
Data.__index = Data

--- The rows among which those of a filter are: all of one experiment, GPU and model. What an
--- experiment that is run elsewhere gave with `--device cuda` is seen by those who name the device.
---@return Row[]
function Data:near(name, filter)
  local gpu, model = filter and filter.gpu, filter and filter.model
  local device = filter and filter.device
  local id = table.concat({ name, tostring(gpu), tostring(model), tostring(device) }, " ")
  if not self.bucket[id] then
    local rows = {}
    for _, row in ipairs(self.rows) do
      if row.experiment:sub(1, #name) == name and (not gpu or row.key.gpu == gpu)
        and (not model or row.key.model == model)
        and (device or row.key.device ~= "cuda" or not self.predicts[row.experiment]) then
        rows[#rows + 1] = row
      end
    end
    self.bucket[id] = rows
  end
  return self.bucket[id]
end

--- Note that a table or figure shows these rows: its caption says which they were.
---@param rows Row[]
function Data:note(rows)
  for _, row in ipairs(self.used and rows or {}) do
    if row.status == "ok" then self.used[row] = true end
  end
end

--- Rows of an experiment by the beginning of its name, restricted by key parts.
---@param name string "e03"
---@param filter? table<string, any>
---@param status? string default "ok"; "any" for all
---@return Row[]
function Data:select(name, filter, status)
  local out = self:matching(name, filter, status)
  self:note(out)
  return out
end

--- The same, not noted.
---@return Row[]
function Data:matching(name, filter, status)
  local out = {}
  for _, row in ipairs(self:near(name, filter)) do
    if status == "any" or row.status == (status or "ok") then
      local match = true
      for key, value in pairs(filter or {}) do match = match and row.key[key] == value end
      if match then out[#out + 1] = row end
    end
  end
  return out
end

--- The one row with this key, or nil.
---@return Row|nil
function Data:row(name, filter, status)
  local found = self:matching(name, filter, status)
  self:note({ found[#found] })
  return found[#found]
end

--- A metric of the one row with this key, or nil.
---@return number|nil
function Data:value(name, filter, metric)
  local row = self:row(name, filter)
  return row and row.metrics[metric]
end

--- Values of a metric over the rows with this key.
---@return number[]
function Data:values(name, filter, metric)
  local out = {}
  for _, row in ipairs(self:select(name, filter)) do
    if row.metrics[metric] then out[#out + 1] = row.metrics[metric] end
  end
  return out
end

--- Distinct values of a key part, in the order in which they first appear.
---@return any[]
function Data:distinct(name, part, filter)
  local out, seen = {}, {}
  for _, row in ipairs(self:matching(name, filter, "any")) do
    local value = row.key[part]
    if value ~= nil and not seen[value] then
      seen[value] = true
      out[#out + 1] = value
    end
  end
  return out
end

--- For each value of `over`: metric under `filter` over metric under `base`, where both exist.
---@return number[] ratios
---@return any[] of which values of `over`
---@return integer across of how many both were measured, by different versions of the engine: what
--- changed between them is in the ratio
---@return integer on_two of how many both were measured by one version, on two GPUs of a kind
function Data:ratios(name, over, filter, base, metric)
  local out, which, across, on_two = {}, {}, 0, 0
  for _, value in ipairs(self:distinct(name, over)) do
    local with, against = { [over] = value }, { [over] = value }
    for k, v in pairs(filter) do with[k] = v end
    for k, v in pairs(base) do against[k] = v end
    local above, below = self:row(name, with), self:row(name, against)
    local a, b = above and above.metrics[metric], below and below.metrics[metric]
    if a and b and b > 0 then
      out[#out + 1] = a / b
      which[#which + 1] = value
      if above.origin == "measured" and below.origin == "measured" then
        if above.version ~= below.version then
          across = across + 1
        elseif #library.gpu_ids({ above, below }) > 1 then
          on_two = on_two + 1
        end
      end
    end
  end
  return out, which, across, on_two
end

--- Values in a wanted order, with those that have no rows left out and unknown ones at the end.
---@param wanted any[]
---@param have any[]
---@return any[]
function Data.ordered(wanted, have)
  local out, left = {}, {}
  for _, value in ipairs(have) do left[value] = true end
  for _, value in ipairs(wanted) do
    if left[value] then out[#out + 1] = value end
    left[value] = nil
  end
  for _, value in ipairs(have) do
    if left[value] then out[#out + 1] = value end
  end
  return out
end

--- The GPU that sections 10 to 12 of plots/paper.md, its captions and quoted lines are about.
local PAPER_GPU = "NVIDIA H200"

--- Rows that the paper may show. A mean over two GPUs would be of neither: of those measured on
--- another one than PAPER_GPU none is taken.
---@param rows Row[]
---@return Row[]
---@return table<string, integer> others how many rows of which other GPUs
local function of_paper(rows)
  local kept, others = {}, {}
  for _, row in ipairs(rows) do
    local gpu = library.gpu(row)
    if gpu and gpu.name and gpu.name ~= PAPER_GPU then
      others[gpu.name] = (others[gpu.name] or 0) + 1
    else
      kept[#kept + 1] = row
    end
  end
  return kept, others
end

---@param rows Row[]
---@param identity table
---@return Data
function M.data(rows, identity)
  local kept, others = of_paper(rows)
  local newest = library.newest(kept, identity.version, experiment.parts_of_points())
  local predicts = {}
  for _, row in ipairs(newest) do
    if row.key.device ~= "cuda" then predicts[row.experiment] = true end
  end
  local data = { rows = newest, all = kept, bucket = {}, identity = identity,
    predicts = predicts, others = others }
  return setmetatable(data, Data)
end

--- Times on a GPU of points that one version ran twice and more: of each metric the largest value
--- over the smallest.
---@param data Data
---@param name string beginning of the experiment
---@return number[] ratios
---@return integer n_points
---@return integer n_moved of those whose rows are of several GPUs of a kind
function M.repeated(data, name)
  local groups, order = {}, {}
  for _, row in ipairs(data.all) do
    if library.gpu(row) and row.status == "ok" and row.experiment:sub(1, #name) == name then
      local id = table.concat({ row.experiment, row.version, row.definition,
        library.key_text(row) }, " ")
      if not groups[id] then
        groups[id] = {}
        order[#order + 1] = id
      end
      table.insert(groups[id], row)
    end
  end
  local ratios, n_points, n_moved = {}, 0, 0
  for _, id in ipairs(order) do
    local group = groups[id]
    if #group > 1 then n_points = n_points + 1 end
    if #library.gpu_ids(group) > 1 then n_moved = n_moved + 1 end
    for _, metric in ipairs(#group > 1 and experiment.sorted_keys(group[1].metrics) or {}) do
      local least, most = math.huge, 0
      for _, row in ipairs(group) do
        local x = row.metrics[metric]
        least, most = math.min(least, x or 0), math.max(most, x or 0)
      end
      local timed = metric:find("_us$") and library.direction(metric) ~= 0
      if timed and least > 0 then ratios[#ratios + 1] = most / least end
    end
  end
  return ratios, n_points, n_moved
end

--- Largest share of the read bandwidth over the shapes of decode attention in e08, in percent.
---@param data Data
---@param kv string
---@return number|nil
function M.decode_share(data, kv)
  local row = data:row("e08", { variant = "best", phase = "decode", kv = kv, dtype = "fp16" })
  local most
  for name, x in pairs(row and row.metrics or {}) do
    if name:find("^b%d+_c%d+_gbs$") then
      most = math.max(most or 0, 100 * x / row.metrics.read_gbs)
    end
  end
  return most
end

--- Mean over the shapes of e07 of the speed-up at m rows of x.
---@param data Data
---@return number|nil
function M.linear_speedup(data, precision, dtype, m)
  local values = data:values("e07", { variant = "best", precision = precision, dtype = dtype },
    ("m%d_speedup"):format(m))
  return #values > 0 and stats.geomean(values) or nil
end

-- --- Formatting ----------------------------------------------------------------------------------

--- Three significant digits, thousands as they are; "-" for nothing.
---@param x number|nil
---@return string
function M.number(x)
  if x == nil or x ~= x then return "-" end
  local size = math.abs(x)
  if size >= 1000 or x == math.floor(x) and size < 1e15 then return ("%.0f"):format(x) end
  if size >= 100 then return ("%.0f"):format(x) end
  if size >= 10 then return ("%.1f"):format(x) end
  if size >= 1 then return ("%.2f"):format(x) end
  return ("%.3f"):format(x)
end

--- A Markdown table.
---@param columns string[]
---@param rows any[][] nil cells are "-"
---@return string
function M.markdown(columns, rows)
  local function line(cells)
    local words = {}
    for i = 1, #columns do
      local cell = cells[i]
      words[i] = type(cell) == "number" and M.number(cell) or tostring(cell == nil and "-" or cell)
    end
    return "| " .. table.concat(words, " | ") .. " |"
  end
  local out = { line(columns) }
  local rule = {}
  for i = 1, #columns do
    local numeric = false -- words stand left, numbers and what is with one right
    for _, row in ipairs(rows) do
      local cell = tostring(row[i])
      numeric = numeric or cell:find("^[*+%-]*%d") ~= nil and #cell < 40
    end
    rule[i] = numeric and i > 1 and "--:" or ":--"
  end
  out[2] = "| " .. table.concat(rule, " | ") .. " |"
  for _, row in ipairs(rows) do out[#out + 1] = line(row) end
  return table.concat(out, "\n")
end

---@param columns string[]
---@param rows any[][]
---@return string
function M.tsv(columns, rows)
  local out = { table.concat(columns, "\t") }
  for _, row in ipairs(rows) do
    local words = {}
    for i = 1, #columns do
      local cell = row[i]
      if type(cell) == "number" then
        words[i] = cell ~= cell and "-" or ("%.6g"):format(cell)
      else
        words[i] = cell == nil and "-" or tostring(cell)
      end
    end
    out[#out + 1] = table.concat(words, "\t")
  end
  return table.concat(out, "\n") .. "\n"
end

--- Raises one line of ours: a full disk is no fault of this file.
---@param path string
---@param text string
local function write(path, text)
  local ok, why = pcall(amalgam.write_file, path, text)
  if ok then return end
  error({ exit = 1, message = "report: " .. tostring(why):gsub("^%S+%.lua:%d+: ", "") }, 0)
end

-- --- Figures and tables --------------------------------------------------------------------------

--- The end of a whole file: gnuplot does not say when the disk is full.
local LAST = { svg = "</svg>%s*$", png = "IEND....$" }

--- What gnuplot said but for warnings, of series without rows for example, which are no errors.
local function errors_in(path)
  local said = {}
  local log = io.open(path)
  if not log then return "" end
  for line in log:lines() do
    if line:find("%S") and not line:find("warning:", 1, true) then said[#said + 1] = line end
  end
  log:close()
  return (table.concat(said, " "):gsub("%s+", " "))
end

--- Draw one figure as SVG and PNG. Returns nil or what went wrong.
---@return string|nil
local function draw(plots, gp, tsv, out)
  for _, format in ipairs({ "svg", "png" }) do
    local settings = ("plots='%s'; data='%s'; format='%s'"):format(plots:gsub("'", "''"),
      tsv:gsub("'", "''"), format)
    local target = out .. "." .. format
    local command = ("DATA=%s gnuplot -e %s %s > %s 2> %s"):format(quoted(tsv), quoted(settings),
      quoted(gp), quoted(target .. ".part"), quoted(target .. ".log"))
    local good = os.execute(command)
    local why = errors_in(target .. ".log")
    os.remove(target .. ".log")
    local whole = good and amalgam.read_file(target .. ".part"):sub(-16):find(LAST[format])
    if not whole then
      os.remove(target .. ".part")
      return why ~= "" and why or good and format .. " was cut off" or "gnuplot failed"
    end
    os.rename(target .. ".part", target)
  end
  return nil
end

---@class Figure
---@field experiment string
---@field title string
---@field caption string
---@field predicted? boolean
---@field build fun(data: Data, report: table): string[], any[][]

--- Load plots/<prefix>*.lua in order.
---@return table<string, Figure>
---@return string[] names
local function load_all(plots, prefix)
  local found, names = {}, {}
  for _, entry in ipairs(amalgam.list(plots)) do
    local name = entry:match("^(" .. prefix .. "%d%d_[%w_]+)%.lua$")
    if name then
      names[#names + 1] = name
      found[name] = require(name)
    end
  end
  return found, names
end

--- "Figure 3" for "fig03_latency": files are numbered in the order of the paper.
---@param name string
---@return string
local function numbered(name)
  local kind, number = name:match("^(%a+)0*(%d+)_")
  return (kind == "fig" and "Figure " or "Table ") .. number
end

--- The hardware that a row is of, for a caption.
---@param row Row
---@return string
local function hardware(row)
  if row.origin ~= "measured" then return "" end
  local p, gpu = row.provenance or {}, library.gpu(row)
  if gpu then return " on " .. gpu.name end
  return (" on %s, %s cores"):format(p.cpu or "a CPU", tostring(p.cores or "some"))
end

--- "Rows: e03 predicted at `ee4cf66`; e07 measured on NVIDIA H200 at `720ed99` (2 GPUs)."
---@param used table<Row, boolean>
---@return string
function M.rows_line(used)
  local versions = {} -- of "e07 measured on NVIDIA H200"
  for row in pairs(used) do
    local id = ("%s %s%s"):format(row.experiment:match("^[^_]+"), row.origin or "", hardware(row))
    versions[id] = versions[id] or {}
    local rows = versions[id][row.version] or {}
    rows[#rows + 1] = row
    versions[id][row.version] = rows
  end
  local words = {}
  for _, id in ipairs(experiment.sorted_keys(versions)) do
    local at = {}
    for _, version in ipairs(experiment.sorted_keys(versions[id])) do
      local n = #library.gpu_ids(versions[id][version])
      at[#at + 1] = ("`%s`%s"):format(version, n > 1 and (" (%d GPUs)"):format(n) or "")
    end
    words[#words + 1] = id .. " at " .. table.concat(at, ", ")
  end
  return #words > 0 and " Rows: " .. table.concat(words, "; ") .. "." or ""
end

--- Columns and rows of a table or figure, and its caption with the rows that it was made from.
---@param data Data
---@param spec Figure
---@return string[] columns
---@return any[][] rows
---@return string caption
local function built(data, spec)
  data.used = {}
  local columns, rows = spec.build(data, M)
  local caption = spec.caption
  if spec.predicted and not caption:lower():find("predicted") then
    caption = caption .. " Predicted."
  end
  caption = caption .. M.rows_line(data.used)
  data.used = nil
  return columns, rows, caption
end

--- Markdown of the figures or tables by name: what `show` makes of their rows, or that they have
--- none.
---@param data Data
---@param plots string
---@param kind string "fig" or "tab"
---@param show fun(name: string, spec: Figure, columns: string[], rows: any[][], caption: string)
---@return table<string, string>
local function blocks_of(data, plots, kind, show)
  local blocks = {}
  local specs, names = load_all(plots, kind)
  for _, name in ipairs(names) do
    local spec = specs[name]
    local columns, rows, caption = built(data, spec)
    if #rows > 0 then
      blocks[name] = show(name, spec, columns, rows, caption)
    else
      blocks[name] = ("*%s is missing: %s has no rows for it.*"):format(numbered(name),
        spec.experiment)
      print(("  %-26s no rows for it of %s"):format(name, spec.experiment))
    end
  end
  return blocks
end

---@param data Data
---@param plots string
---@param out string
---@param o table
---@return table<string, string> blocks
---@return integer n_bad
local function figures(data, plots, out, o)
  local n_bad = 0
  local blocks = blocks_of(data, plots, "fig", function(name, spec, columns, rows, caption)
    local tsv = ("%s/plots/out/%s.tsv"):format(out, name)
    write(tsv, M.tsv(columns, rows))
    local why = o.no_figures and "figures were switched off"
      or draw(plots, ("%s/%s.gp"):format(plots, name), tsv, ("%s/plots/out/%s"):format(out, name))
    if not why then
      return ("![%s](plots/out/%s.svg)\n\n**%s.** %s ([data](plots/out/%s.tsv), "
        .. "[png](plots/out/%s.png))"):format(spec.title, name, numbered(name), caption, name, name)
    end
    if not o.no_figures then
      n_bad = n_bad + 1
      io.stderr:write(("amalgam: %s: %s\n"):format(name, why))
    end
    return ("*%s was not drawn (%s); its numbers are in [%s.tsv](plots/out/%s.tsv).*"):format(
      numbered(name), why, name, name)
  end)
  return blocks, n_bad
end

---@param data Data
---@param plots string
---@param out string
---@return table<string, string> blocks
local function tables(data, plots, out)
  return blocks_of(data, plots, "tab", function(name, _, columns, rows, caption)
    local block = ("**%s.** %s\n\n%s"):format(numbered(name), caption, M.markdown(columns, rows))
    write(("%s/plots/out/%s.md"):format(out, name), block .. "\n")
    return block
  end)
end

-- --- The paper -----------------------------------------------------------------------------------

--- Versions, machines and counts of the rows that are used, one line per experiment.
---@param data Data
---@return string
local function sources(data)
  local rows, order, by = {}, {}, {}
  for _, row in ipairs(data.rows) do
    local id = row.experiment .. "\t" .. row.version .. "\t" .. row.machine
    if not by[id] then
      by[id] = { ok = 0, oom = 0, skipped = 0, failed = 0, invalid = 0, row = row, seconds = 0 }
      order[#order + 1] = id
    end
    local entry = by[id]
    entry[row.status] = (entry[row.status] or 0) + 1
    entry.seconds = entry.seconds + (row.wall_s or 0)
    if row.origin then entry.origin = row.origin end
  end
  table.sort(order) -- by experiment
  for _, id in ipairs(order) do
    local e = by[id]
    rows[#rows + 1] = { e.row.experiment, e.origin or "-", "`" .. e.row.version .. "`",
      e.row.machine, e.ok, e.oom, e.skipped, e.failed + e.invalid, ("%.0f"):format(e.seconds) }
  end
  return M.markdown({ "experiment", "origin", "version", "machine", "ok", "oom", "skipped",
    "failed", "time (s)" }, rows)
end

--- Facts of the machines that measured, from the newest measured row of each.
---@param data Data
---@return string
local function machines(data)
  local by = {}
  for _, row in ipairs(data.rows) do
    if row.origin == "measured" or not by[row.machine] then by[row.machine] = row end
  end
  local rows = {}
  for _, machine in ipairs(experiment.sorted_keys(by)) do
    local p = by[machine].provenance or {}
    rows[#rows + 1] = { machine, p.cpu, p.cores,
      p.memory_bytes and ("%.0f GiB"):format(p.memory_bytes / 2 ^ 30), p.kernel, p.governor,
      p.gpu and ("%s, %.0f GiB, SM %d and memory %d MHz at most, %.0f W"):format(p.gpu.name,
        p.gpu.memory_bytes / 2 ^ 30, p.gpu.sm_clock_max_mhz, p.gpu.memory_clock_mhz,
        p.gpu.power_limit_w) or "none",
      p.gpu and ("%s, CUDA %d.%d"):format(p.gpu.driver, p.gpu.cuda_driver // 1000,
        p.gpu.cuda_driver % 1000 // 10) or "none",
      p.compiler, p.flags and "`" .. p.flags .. "`" }
  end
  return M.markdown({ "machine", "cpu", "cores", "memory", "kernel", "governor", "GPU", "driver",
    "compiler", "flags" }, rows)
end

--- One line for each GPU whose rows are left out; nothing when there is none.
---@param data Data
---@return string[]
local function left_out(data)
  local lines = {}
  for _, gpu in ipairs(experiment.sorted_keys(data.others)) do
    lines[#lines + 1] = ("not shown: %d rows measured on %s (the text is about an %s; "
      .. "`amalgam rows` shows them)"):format(data.others[gpu], gpu, PAPER_GPU:match("%S+$"))
  end
  return lines
end

--- What the template may use.
---@param data Data
---@param blocks? table<string, string> tables and figures by name
---@return table
function M.environment(data, blocks)
  blocks = blocks or {}
  local env = { math = math, table = table, ipairs = ipairs, pairs = pairs, string = string,
    tostring = tostring, data = data, stats = stats, number = M.number }
  function env.show(name)
    return blocks[name] or error(("no table or figure '%s'"):format(name), 2)
  end
  --- A metric of one row, formatted; says so when there is none.
  function env.value(name, filter, metric, format)
    local x = data:value(name, filter, metric)
    if not x then return "*(no row)*" end
    return format and format:format(x) or M.number(x)
  end
  --- Geometric mean over `over` of filter / base, and of how many: "1.83 (16)"; of measured rows
  --- "1.83 (16; 12 across commits, 1 across GPUs)" where the two are not of one version, or of two
  --- GPUs of a kind.
  function env.gain(name, over, filter, base, metric)
    local ratios, _, across, on_two = data:ratios(name, over, filter, base, metric)
    if #ratios == 0 then return "*(no rows)*" end
    local notes = {}
    if across > 0 then notes[#notes + 1] = ("%d across commits"):format(across) end
    if on_two > 0 then notes[#notes + 1] = ("%d across GPUs"):format(on_two) end
    return ("%.2f (%d%s%s)"):format(stats.geomean(ratios), #ratios, #notes > 0 and "; " or "",
      table.concat(notes, ", "))
  end
  --- A metric of one row over that of another, which differ in one part of the key; nil where one
  --- of them is missing.
  local function quotient(name, filter, part, value, base, metric)
    local with, against = { [part] = value }, { [part] = base }
    for k, v in pairs(filter) do with[k], against[k] = v, v end
    local a, b = data:value(name, with, metric), data:value(name, against, metric)
    return a and b and b > 0 and a / b or nil
  end
  --- The same, formatted: "1.83".
  function env.ratio(...)
    local x = quotient(...)
    return x and ("%.2f"):format(x) or "*(no rows)*"
  end
  --- By how many percent the first is more than the second: "0.55".
  function env.percent_more(...)
    local x = quotient(...)
    return x and ("%.2f"):format(100 * (x - 1)) or "*(no rows)*"
  end
  --- Largest such ratio and where it is: "2.91 (Qwen3-32B)".
  function env.most(name, over, filter, base, metric)
    local ratios, which = data:ratios(name, over, filter, base, metric)
    local at = 0
    for i, r in ipairs(ratios) do
      if at == 0 or r > ratios[at] then at = i end
    end
    return at > 0 and ("%.2f (%s)"):format(ratios[at], tostring(which[at])) or "*(no rows)*"
  end
  --- Median of a metric over the rows with this key, repetitions mostly.
  function env.median(name, filter, metric)
    local values = data:values(name, filter, metric)
    return #values > 0 and M.number(stats.median(values)) or "*(no rows)*"
  end
  function env.ref(name)
    return blocks[name] and numbered(name) or error(("no table or figure '%s'"):format(name), 2)
  end
  function env.linear(precision, dtype, m)
    local x = M.linear_speedup(data, precision, dtype, m)
    return x and ("%.2f"):format(x) or "*(no row)*"
  end
  --- What points differ by that one version ran more than once; nothing when there are none.
  function env.repeated(name)
    local ratios, n, moved = M.repeated(data, name)
    if #ratios == 0 then return "" end
    local on = moved > 0 and (" (%d of them on two H200s)"):format(moved) or ""
    return ("%d points that one version ran twice%s differ by %.1f %% in the median of their times "
      .. "and by %.1f %% at most."):format(n, on, 100 * (stats.median(ratios) - 1),
      100 * (math.max(table.unpack(ratios)) - 1))
  end
  --- A quoted speed-up over cuBLAS of another system's linear layers (plots/peers.lua).
  function env.peer(line, m)
    local peers = require("peers")
    for i, rows in ipairs(peers.rows_x) do
      if rows == m then return ("%.2f"):format(peers.linear[line][i]) end
    end
    error(("no quoted figure of %s at %d rows"):format(line, m), 2)
  end
  --- Prompt tokens an answer token from which on the first format is the faster, or "never"
  --- (plots/lengths.lua).
  function env.even(first, second, batch)
    local x = require("lengths").even(data, first, second, batch)
    return x and M.number(x) or "never"
  end
  --- Requests per second and GPU within limits of latency (plots/goodput.lua).
  function env.goodput(model, precision, tpot_ms)
    local row = require("goodput").best(data, model, precision, tpot_ms)
    return row and ("%.1f"):format(row.metrics.rate_within_limits_per_s_per_gpu) or "*(no row)*"
  end
  --- KL divergence of one row in millionths of a nat.
  function env.micronats(name, filter)
    local x = data:value(name, filter, "kl_nats")
    return x and M.number(x * 1e6) or "*(no row)*"
  end
  function env.decode_share(kv)
    local x = M.decode_share(data, kv)
    return x and ("%.0f"):format(x) or "*(no row)*"
  end
  function env.count(name, filter, status) return tostring(#data:select(name, filter, status)) end
  function env.many(name, part) return tostring(#data:distinct(name, part)) end
  function env.sources() return sources(data) end
  function env.machines() return machines(data) end
  function env.left_out()
    local lines = left_out(data)
    return #lines > 0 and "- " .. table.concat(lines, "\n- ") .. "\n\n" or ""
  end
  env.version = data.identity.version
  return env
end

--- Fill a template: {{ expression }}, and {{? e03 }} ... {{/}} for parts that need rows of e03,
--- {{? e10 cuda }} of that device. With {{?? nothing is said of what is missing.
---@param text string
---@param file string for messages
---@param env table
---@return string
function M.fill(text, file, env)
  text = text:gsub("{{%?(%??)%s*(%w+)%s*(%w*)%s*}}(.-){{/}}\n?", function(silent, name, on, body)
    local device = on ~= "" and on or nil
    if #env.data:select(name, { device = device }) > 0 then return body end
    return silent == "?" and "" or ("*There are no rows of %s: `amalgam run %s%s` makes them.*\n")
      :format(name, name, device and " --device " .. device or "")
  end)
  return (text:gsub("()({{(.-)}})", function(_, whole, expression)
    local chunk, why = load("return " .. expression, "=" .. file, "t", env)
    if not chunk then experiment.refuse("%s: %s in %s", file, why, whole) end
    local ok, value = pcall(chunk)
    if not ok then experiment.refuse("%s: %s in %s", file, tostring(value), whole) end
    return tostring(value)
  end))
end

--- The text with each part between "<!-- amalgam report: NAME -->" and "<!-- end -->" made anew.
---@param text string
---@param blocks table<string, string>
---@return string
function M.refresh(text, blocks)
  return (text:gsub("(<!%-%- amalgam report: ([%w_]+) %-%->\n).-(<!%-%- end %-%->)",
    function(head, name, tail) return blocks[name] and head .. blocks[name] .. "\n" .. tail end))
end

--- Remove what is left in plots/out of tables and figures that have no rows or no file any more.
---@param out string
---@param blocks table<string, string>
local function remove_others(out, blocks)
  local dir = out .. "/plots/out"
  for _, entry in ipairs(amalgam.list(dir)) do
    local name = entry:match("^(%a%a%a%d%d_[%w_]+)%.%a+$")
    local block = name and blocks[name]
    if name and (not block or block:find(" is missing: ", 1, true)) then
      os.remove(dir .. "/" .. entry)
    end
  end
end

---@param o table
---@return integer
local function run(o)
  local identity = amalgam.identity()
  local root = identity.root
  local dir, out = o.results or root .. "/results", o.out or root
  local rows, broken = library.read(dir)
  if #rows == 0 then
    experiment.refuse("report: no rows in %s (amalgam run e01 ... makes them)", dir)
  end
  local data = M.data(rows, identity)
  print(("report: %d points from %d rows in %s"):format(#data.rows, #rows, dir))
  for _, file in ipairs(broken) do print(("  left out, cannot be read: %s"):format(file)) end
  for _, line in ipairs(left_out(data)) do print("  " .. line) end
  local blocks, n_bad = figures(data, root .. "/plots", out, o)
  for name, block in pairs(tables(data, root .. "/plots", out)) do blocks[name] = block end
  remove_others(out, blocks)
  local paper = M.fill(amalgam.read_file(root .. "/plots/paper.md"), "plots/paper.md",
    M.environment(data, blocks))
  write(out .. "/PAPER.md", paper)
  if not o.out and not o.results then
    local readme = amalgam.read_file(root .. "/README.md")
    write(root .. "/README.md", M.refresh(readme, blocks))
  end
  print(("  -> %s/PAPER.md, %s/plots/out/"):format(out, out))
  return n_bad > 0 and 1 or 0
end

M.main = experiment.command("report", USAGE,
  { results = "word", out = "word", no_figures = "flag" }, 0, run)

return M
