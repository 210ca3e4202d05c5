--- `amalgam compare`: did it get faster? Two versions by their stored rows.
---
--- Rows are joined on the natural key. Repetitions are the unit: a measured metric of one point is
--- two samples of repetitions, judged by the ratio of medians with a bootstrap interval and by a
--- Mann-Whitney test whose p-values are controlled for false discoveries over the whole comparison.
--- Predicted and reference rows have no noise and are compared exactly.

local amalgam = require("amalgam")
local experiment = require("lib_experiment")
local library = require("lib_rows")
local stats = require("lib_stats")

local M = {}

local USAGE = [[
usage: amalgam compare BASE HEAD [options]

BASE and HEAD are versions as results/ names its files (the beginning of a commit is enough, a
"-dirty-" form is taken only when written out), what git takes for a commit (HEAD~1, a tag), or
.jsonl files.

  --json          one object per metric and point, then one "summary" object
  --all           print unchanged metrics too, all that changed (else, of a class and experiment,
                  the 20 that moved most) and every point that cannot be told
  --only NAME     only experiments whose name begins so, e.g. e05
  --by KEY        the means of metrics at the end for each model, precision, ... apart
  --results DIR   where rows are kept (default: results)
  --effect SHARE  smallest change that counts for measured metrics (default 0.02)

Classes: faster, slower (better, worse for accuracy), same, unstable (too noisy to tell), too few
(repetitions to tell; `amalgam run NAME --again` adds them; of an experiment the 3 points to either
side that moved most are named), not comparable (another definition, another origin, other
hardware). Exit status: 0 nothing slower, 1 something is, 2 usage.]]

local CONFIDENCE, DISCOVERY_RATE, WIDE = 0.95, 0.05, 0.10

local OPTIONS = { json = "flag", all = "flag", results = "word", only = "word", by = "word",
  effect = function(value, flag)
    local effect = tonumber(value)
    if not effect or effect < 0 or effect >= 1 then
      experiment.refuse("%s %s is no share from 0 to 1", flag, value)
    end
    return effect
  end }

--- The commit that git knows by this name, as versions begin with it; nil when it knows none.
---@param name string
---@return string|nil
local function commit_of(name)
  if not name:find("^[%w_][%w_./~^@{}-]*$") then return nil end
  local git = io.popen(("git -C %s rev-parse --verify --quiet --short=12 '%s^{commit}' 2>&1")
    :format(experiment.quoted(amalgam.identity().root), name))
  local commit = git and git:read("l")
  if git then git:close() end
  return commit and commit:match("^%x+$")
end

--- The versions that have rows, the newest first.
---@param o table
---@param dir string
---@return string
local function newest(o, dir)
  local time = {}
  for _, row in ipairs(library.read(dir, function(e)
    return not o.only or e:sub(1, #o.only) == o.only
  end)) do
    local before, at = time[row.version] or "", row.time or ""
    time[row.version] = at > before and at or before
  end
  local versions = experiment.sorted_keys(time)
  table.sort(versions, function(x, y) return time[x] > time[y] end)
  return #versions == 0 and "there are none at all"
    or "the newest are of " .. table.concat(versions, ", ", 1, math.min(#versions, 6))
end

--- Rows of the versions that begin with `name`, and those versions.
---@param name string
---@param o table
---@param dir string
---@return Row[]
---@return string[]
---@return string[] broken
local function of_version(name, o, dir)
  local seen = {}
  local rows, broken = library.read(dir, function(e, _, version)
    if o.only and e:sub(1, #o.only) ~= o.only then return false end
    local whole = version == name
    local prefix = version:sub(1, #name) == name
      and (not version:find("-dirty-", 1, true) or name:find("-dirty-", 1, true) ~= nil)
    if whole or prefix then seen[version] = true end
    return whole or prefix
  end)
  return rows, experiment.sorted_keys(seen), broken
end

--- On standard error: --json has nothing but objects.
---@param broken string[]
local function tell_broken(broken)
  for _, file in ipairs(broken) do
    io.stderr:write(("amalgam: compare: left out, cannot be read: %s\n"):format(file))
  end
end

--- Rows of one side, newest last. A name is a .jsonl file, the beginning of a version or git's.
---@param name string
---@param o table
---@param dir string
---@return Row[]
local function side(name, o, dir)
  local rows, broken = {}, {}
  if name:find("%.jsonl$") then
    library.read_file(name, rows, name, broken)
    tell_broken(broken)
    if #rows == 0 then
      local file, why = io.open(name)
      if file then file:close() end
      experiment.refuse("compare: %s", why or "no rows in " .. name)
    end
    return rows
  end
  local versions
  rows, versions, broken = of_version(name, o, dir)
  local commit = #rows == 0 and commit_of(name)
  if commit then rows, versions, broken = of_version(commit, o, dir) end
  tell_broken(broken)
  if #versions > 1 then
    experiment.refuse("compare: '%s' is more than one version: %s%s", name,
      table.concat(versions, ", ", 1, math.min(#versions, 6)),
      #versions > 6 and (" and %d more"):format(#versions - 6) or "")
  end
  if #rows == 0 then
    experiment.refuse("compare: no rows of '%s'%s in %s; %s", name,
      o.only and (" of experiments '%s...'"):format(o.only) or "", dir, newest(o, dir))
  end
  return rows
end

local REPETITION = { repetition = true }

--- Rows by experiment, machine (measured rows only) and key without repetition, of the newest
--- definition: each is a repetition, also those of one seed that "again" adds.
---@param rows Row[]
---@return table<string, table> groups
---@return string[] order
local function grouped(rows)
  local groups, order = {}, {}
  for _, row in ipairs(rows) do
    local where = row.origin == "measured" and row.machine or nil
    local without = { repetition = true, checkpoint = row.status ~= "ok", tp = row.status ~= "ok" }
    without = row.status == "ok" and REPETITION or without
    local point = library.key_text(row, without)
    local id = table.concat({ row.experiment, where or "", point }, " ")
    local group = groups[id]
    if not group then
      group = { experiment = row.experiment, point = point, machine = where, key = row.key,
        rows = {} }
      groups[id] = group
      order[#order + 1] = id
    end
    if group.definition ~= row.definition then group.rows = {} end -- the newest one counts
    table.insert(group.rows, row)
    group.definition, group.origin = row.definition, row.origin
  end
  return groups, order
end

---@param rows Row[]
---@param metric string
---@return number[]
local function sample(rows, metric)
  local out = {}
  for _, row in ipairs(rows) do
    local value = row.status == "ok" and row.metrics[metric]
    if type(value) == "number" then out[#out + 1] = value end
  end
  return out
end

--- Metrics that are better or worse, of the newest row of either side.
---@param b table group of base
---@param h table group of head
---@return string[]
local function directed(b, h)
  local names = {}
  for _, group in ipairs({ b, h }) do
    for metric in pairs(group.rows[#group.rows].metrics) do
      if library.direction(metric) ~= 0 then names[metric] = true end
    end
  end
  return experiment.sorted_keys(names)
end

---@class Verdict
---@field experiment string
---@field point string
---@field key? table<string, any> of the point, beside a metric
---@field metric? string
---@field class string
---@field why? string
---@field base? number median
---@field head? number median
---@field ratio? number head / base
---@field lo? number
---@field hi? number
---@field p? number
---@field q? number
---@field n_base? integer
---@field n_head? integer

local GOOD = { [true] = "better", [false] = "faster" }
local BAD = { [true] = "worse", [false] = "slower" }

--- The word for a change of `metric` to `ratio` times its value.
---@param metric string
---@param change number > 0: more than before
---@return string
local function word_for(metric, change)
  local quality = library.is_quality(metric)
  local improved = change * library.direction(metric) > 0
  return improved and GOOD[quality] or BAD[quality]
end

--- Exact comparison of rows that have no noise.
---@param v Verdict
---@param base number[]
---@param head number[]
local function judge_exact(v, base, head)
  v.base, v.head = base[#base], head[#head]
  v.ratio = v.base ~= 0 and v.head / v.base or nil
  v.class = v.base == v.head and "same" or word_for(v.metric, v.head - v.base)
end

--- The samples of a measured metric; the class waits for the false-discovery control.
---@param v Verdict
---@param base number[]
---@param head number[]
local function measure(v, base, head)
  v.base, v.head = stats.median(base), stats.median(head)
  if v.base == 0 then
    v.class, v.why = v.head == 0 and "same" or "unstable", "the base is 0"
    return
  end
  local r = stats.ratio_of_medians(base, head, { confidence = CONFIDENCE })
  v.ratio, v.lo, v.hi = r.estimate, r.lo, r.hi
  v.p = stats.mann_whitney(base, head)
end

---@param v Verdict
---@param effect number
local function judge_measured(v, effect)
  local outside = v.lo > 1 or v.hi < 1
  if v.q <= DISCOVERY_RATE and outside and math.abs(v.ratio - 1) >= effect then
    v.class = word_for(v.metric, v.ratio - 1)
  elseif v.n_base < 4 or v.n_head < 4 then
    v.class, v.why = "too few", "fewer than 4 repetitions cannot be told from chance"
  elseif v.hi - v.lo > 2 * WIDE then
    v.class, v.why = "unstable", "the interval is wider than 10 % to each side"
  else
    v.class = "same"
  end
end

---@param b table group of base
---@param h table group of head
---@return Verdict|nil # why nothing can be compared
local function obstacle(b, h)
  local v = { experiment = h.experiment, point = h.point, class = "not comparable" }
  local fb, fh = b.rows[#b.rows], h.rows[#h.rows]
  if b.definition ~= h.definition then
    v.why = ("the definition changed (%s, %s)"):format(b.definition, h.definition)
  elseif fb.status ~= "ok" and fh.status ~= "ok" then
    v.why = ("%s on both sides"):format(fh.status)
    v.quiet = fb.status == fh.status
  elseif fb.status ~= "ok" or fh.status ~= "ok" then
    v.why = ("%s in BASE, %s in HEAD: %s"):format(fb.status, fh.status,
      fb.reason or fh.reason or "no reason given")
    v.broken = fb.status == "ok"
  elseif b.origin ~= h.origin then
    v.why = ("%s in BASE, %s in HEAD"):format(tostring(b.origin), tostring(h.origin))
  else
    return nil
  end
  return v
end

--- Why a point of one side is alone: the other side measured it on other hardware, or has it not.
---@param group table
---@param others table<string, table> groups of the other side
---@param side_name string BASE or HEAD: the other side
---@return string
local function alone(group, others, side_name)
  local machines = {}
  for _, other in pairs(others) do
    if group.machine and other.machine and other.experiment == group.experiment
      and other.point == group.point then
      machines[other.machine] = true
    end
  end
  local names = experiment.sorted_keys(machines)
  if #names == 0 then return "no such row in " .. side_name end
  return ("other hardware: %s, and %s in %s"):format(group.machine, table.concat(names, ", "),
    side_name)
end

--- Compare two sets of rows.
---@param base_rows Row[]
---@param head_rows Row[]
---@param effect number
---@return Verdict[]
function M.compare(base_rows, head_rows, effect)
  local base, base_order = grouped(base_rows)
  local head, head_order = grouped(head_rows)
  local verdicts, tested, p = {}, {}, {}
  for _, id in ipairs(base_order) do
    local b, h = base[id], head[id]
    local why = h and obstacle(b, h)
    if not h then
      verdicts[#verdicts + 1] = { experiment = b.experiment, point = b.point,
        class = "not comparable", why = alone(b, head, "HEAD") }
    elseif why then
      verdicts[#verdicts + 1] = why
    else
      local exact = b.origin ~= "measured"
      for _, metric in ipairs(directed(b, h)) do
        local x, y = sample(b.rows, metric), sample(h.rows, metric)
        if (#x > 0) ~= (#y > 0) then
          verdicts[#verdicts + 1] = { experiment = b.experiment, point = b.point,
            class = "not comparable", why = metric .. " is in "
            .. (#x > 0 and "BASE" or "HEAD") .. " alone" }
        elseif #x > 0 then
          local v = { experiment = b.experiment, point = b.point, key = b.key, metric = metric,
            n_base = #x, n_head = #y, origin = b.origin }
          if exact then judge_exact(v, x, y) else measure(v, x, y) end
          verdicts[#verdicts + 1] = v
          if not v.class then
            tested[#tested + 1] = v
            p[#p + 1] = v.p
          end
        end
      end
    end
  end
  for _, id in ipairs(head_order) do
    local h = head[id]
    local why = not base[id] and alone(h, base, "BASE")
    if why and not why:find("^other hardware") then -- which BASE's row has said
      verdicts[#verdicts + 1] = { experiment = h.experiment, point = h.point,
        class = "not comparable", why = why }
    end
  end
  local q = stats.benjamini_hochberg(p)
  for i, v in ipairs(tested) do
    v.q = q[i]
    judge_measured(v, effect)
  end
  return verdicts
end

---@param v Verdict
local function print_verdict(v)
  if not v.metric then
    print(("%-14s  %s %s: %s"):format(v.class, v.experiment, v.point, v.why))
    return
  end
  local noise = ("  (%s, exact)"):format(v.origin or "measured")
  if v.class == "too few" then -- an interval of so few says less than it seems to
    noise = ("  n=%d/%d"):format(v.n_base, v.n_head)
  elseif v.lo then
    noise = ("  [%.3f, %.3f] q=%.3g n=%d/%d"):format(v.lo, v.hi, v.q or 1, v.n_base, v.n_head)
  end
  print(("%-14s  %s %s: %s %.6g -> %.6g%s%s%s"):format(v.class, v.experiment, v.point, v.metric,
    v.base, v.head, v.ratio and (" x%.4f"):format(v.ratio) or "", noise,
    v.why and " " .. v.why or ""))
end

local LISTED, NAMED = 20, 3

--- How far a metric moved, in either direction. What has no ratio comes first.
---@param v Verdict
---@return number
local function distance(v)
  return v.ratio and v.ratio > 0 and math.abs(math.log(v.ratio)) or math.huge
end

--- Those of `group` first that moved most, in place; equal ones in their order.
---@param group { v: Verdict, nth: integer }[]
local function most_first(group)
  table.sort(group, function(x, y)
    local dx, dy = distance(x.v), distance(y.v)
    if dx == dy then return x.nth < y.nth end
    return dx > dy
  end)
end

--- Of metrics with too few repetitions, the points that moved most for the worse and the better,
--- by `effect` at least: each by the metric of its that moved most. They are where to look.
---@param group { v: Verdict, nth: integer }[]
---@param effect number
local function print_moved(group, effect)
  most_first(group)
  for _, way in ipairs({ BAD, GOOD }) do
    local seen, n = {}, 0
    for _, entry in ipairs(group) do
      local v = entry.v
      local moved = v.ratio and math.abs(v.ratio - 1) >= effect
      if moved and n < NAMED and not seen[v.point] and word_for(v.metric, v.ratio - 1)
        == way[library.is_quality(v.metric)] then
        seen[v.point], n = true, n + 1
        v.why = ("%s, if it is not chance"):format(word_for(v.metric, v.ratio - 1))
        print_verdict(v)
      end
    end
  end
end

--- Verdicts that have the same name by `name_of`, each with its place among all.
---@param verdicts Verdict[]
---@param name_of fun(v: Verdict): string
---@return { v: Verdict, nth: integer }[][] groups in the order of their first verdicts
local function groups_of(verdicts, name_of)
  local groups, by_name = {}, {}
  for i, v in ipairs(verdicts) do
    local name = name_of(v)
    if not by_name[name] then
      by_name[name] = {}
      groups[#groups + 1] = by_name[name]
    end
    table.insert(by_name[name], { v = v, nth = i })
  end
  return groups
end

---@param v Verdict
---@return string
local function reason(v) return v.why or "no reason given" end

--- What could not be told, a line for each experiment and reason: a changed definition is one fact,
--- not one of every point.
---@param verdicts Verdict[]
---@param effect number
local function print_folded(verdicts, effect)
  for _, f in ipairs(groups_of(verdicts, function(v)
    return table.concat({ v.class, v.experiment, reason(v) }, "\t")
  end)) do
    local first = f[1].v
    if #f == 1 then
      print_verdict(first)
    else
      print(("%-14s  %s: %s (%d %s; --all lists them)"):format(first.class, first.experiment,
        reason(first), #f, first.metric and "metrics" or "points"))
    end
    if #f > 1 and first.class == "too few" then print_moved(f, effect) end
  end
end

--- What changed: of a class and experiment with many, those that moved most and a line for the
--- rest.
---@param verdicts Verdict[]
local function print_changed(verdicts)
  for _, group in ipairs(groups_of(verdicts, function(v)
    return v.class .. "\t" .. v.experiment
  end)) do
    if #group > LISTED then most_first(group) end
    for i = 1, math.min(#group, LISTED) do print_verdict(group[i].v) end
    if #group > LISTED then
      local v = group[LISTED + 1].v
      print(("%-14s  %s: %d more%s (--all lists them)"):format(v.class, v.experiment,
        #group - LISTED, v.ratio and (", the largest x%.4f"):format(v.ratio) or ""))
    end
  end
end

--- What is folded to a line for each reason: nothing is known of it.
local UNTOLD = { unstable = true, ["too few"] = true, ["not comparable"] = true }
local CLASSES =
  { "faster", "slower", "better", "worse", "same", "unstable", "too few", "not comparable" }

--- One line of each metric that moved (and value of `by` in the key): how often, and the geometric
--- mean of its ratios.
---@param verdicts Verdict[]
---@param by? string
local function print_summary(verdicts, by)
  local counts, ratios, broken = {}, {}, 0
  for _, v in ipairs(verdicts) do
    counts[v.class] = (counts[v.class] or 0) + 1
    if v.broken then broken = broken + 1 end
    if v.metric and v.ratio and v.ratio > 0 then
      local of = by and ("  %-22s"):format(tostring(v.key[by])) or ""
      local line = ("%-34s%s"):format(v.metric, of)
      ratios[line] = ratios[line] or {}
      table.insert(ratios[line], v.ratio)
    end
  end
  print("")
  print(("%-34s%s  points   geometric mean of HEAD / BASE"):format("metric",
    by and ("  %-22s"):format(by) or ""))
  for _, line in ipairs(experiment.sorted_keys(ratios)) do
    local mean = stats.geomean(ratios[line])
    if mean ~= 1 then print(("%s  %6d   %.4f"):format(line, #ratios[line], mean)) end
  end
  local words = {}
  for _, class in ipairs(CLASSES) do
    if counts[class] then words[#words + 1] = ("%d %s"):format(counts[class], class) end
  end
  print(table.concat(words, ", ") .. (broken > 0 and (", %d broken"):format(broken) or ""))
end

--- Which GPUs of a kind the measured rows of each experiment are of, where they are not all of one:
--- what GPUs differ by is then in the ratios.
---@param base_rows Row[]
---@param head_rows Row[]
---@return { experiment: string, base: string[], head: string[] }[]
local function several_gpus(base_rows, head_rows)
  local rows = {}
  for which, list in ipairs({ base_rows, head_rows }) do
    for _, row in ipairs(list) do
      local sides = rows[row.experiment] or { {}, {} }
      rows[row.experiment] = sides
      table.insert(sides[which], row)
    end
  end
  local found = {}
  for _, name in ipairs(experiment.sorted_keys(rows)) do
    local base, head = library.gpu_ids(rows[name][1]), library.gpu_ids(rows[name][2])
    local both = #base > 0 and #head > 0
    if both and (#base > 1 or #head > 1 or base[1] ~= head[1]) then
      found[#found + 1] = { experiment = name, base = base, head = head }
    end
  end
  return found
end

--- Refuse a --by that no compared row has.
---@param verdicts Verdict[]
---@param by string
local function check_by(verdicts, by)
  local names = {}
  for _, v in ipairs(verdicts) do
    for name in pairs(v.key or {}) do names[name] = true end
  end
  if not names[by] and next(names) then
    experiment.refuse("compare: --by %s: no row has it (they have %s)", by,
      table.concat(experiment.sorted_keys(names), ", "))
  end
end

---@param o table
---@return integer
local function run(o)
  if #o.names ~= 2 then
    experiment.refuse("compare: give BASE and HEAD (amalgam compare --help)")
  end
  local dir = o.results or amalgam.identity().root .. "/results"
  local effect = o.effect or 0.02
  local base, head = side(o.names[1], o, dir), side(o.names[2], o, dir)
  local verdicts, gpus = M.compare(base, head, effect), several_gpus(base, head)
  if o.by then check_by(verdicts, o.by) end
  local bad, counts, changed, untold = 0, {}, {}, {}
  for _, v in ipairs(verdicts) do
    if v.class == "slower" or v.class == "worse" or v.broken then bad = bad + 1 end
    counts[v.class] = (counts[v.class] or 0) + 1
    if o.json then
      print(amalgam.json_encode(v))
    elseif o.all then
      print_verdict(v)
    elseif not v.broken and UNTOLD[v.class] then
      if not v.quiet then untold[#untold + 1] = v end
    elseif v.class ~= "same" then
      changed[#changed + 1] = v
    end
  end
  if o.json then
    print(amalgam.json_encode({ summary = counts, base = o.names[1], head = o.names[2],
      gpus = #gpus > 0 and gpus or nil }))
  else
    print_changed(changed)
    print_folded(untold, effect)
    print_summary(verdicts, o.by)
    for _, e in ipairs(gpus) do
      print(("%s: not one GPU but several of a kind, whose differences are in the ratios: %s in "
        .. "BASE, %s in HEAD")
        :format(e.experiment, table.concat(e.base, ", "), table.concat(e.head, ", ")))
    end
  end
  return bad > 0 and 1 or 0
end

M.main = experiment.command("compare", USAGE, OPTIONS, 2, run)

return M
