--- House rule: files that README.md and HACKING.md name are there, and so are the functions that
--- HACKING.md's table finds in them. Ladders keep to 100 columns and list their sections; the
--- sections that one names of another are there.
-- Run from the root: build/amalgam lua tests/check_docs.lua
local amalgam = require "amalgam"

local FOLDERS = { "", "engine/", "kernels/", "experiments/", "plots/", "tests/", "workloads/",
  "workloads/models/", "baselines/", "tests/interop/", "tests/vectors/" }
local ENDS = { c = true, h = true, cu = true, cuh = true, def = true, lua = true, gp = true,
  md = true, sh = true, txt = true, py = true }

--- Path of a file by the name that a text gives it; nil when there is none.
local function find(name)
  for _, folder in ipairs(FOLDERS) do
    local file = io.open(folder .. name)
    if file then
      file:close()
      return folder .. name
    end
  end
end

--- Is this word the name of a file that must exist? Not of a kind of files, nor of one to be made.
local function is_name(word)
  return word:match("^[%w_./]+$") and ENDS[word:match("%.(%a+)$")] and not word:match("NN_")
    and not word:match("NAME") and not word:match("^build/")
end

--- What is wrong with a text: {"HACKING.md:3: no file engine/x.c", ...}, and how many names it has.
local function problems_of(text, where)
  local problems, n, at = {}, 0, 0
  for line in (text .. "\n"):gmatch("(.-)\n") do
    at = at + 1
    local file
    for word in line:gmatch("`([^`]+)`") do
      if is_name(word) then
        n, file = n + 1, find(word)
        if not file then
          problems[#problems + 1] = ("%s:%d: no file %s"):format(where, at, word)
        end
      elseif file and line:match("^|.*`: `") and word:match("^[%w_:]+$") then
        n = n + 1
        if not amalgam.read_file(file):find("%f[%w_]" .. word .. "%(") then
          problems[#problems + 1] = ("%s:%d: no %s in %s"):format(where, at, word, file)
        end
      end
    end
  end
  return problems, n
end

--- Headings of a text below its title: {"Where it stands", ...}; of all levels, and the second's.
local function headings_of(text)
  local all, second = {}, {}
  for marks, title in ("\n" .. text):gmatch("\n(##+) ([^\n]+)") do
    all[#all + 1] = title
    if marks == "##" then second[#second + 1] = title end
  end
  return all, second
end

--- What is wrong with ladders' shape; texts: {LADDER = text, ...} by name. Prose beyond 100 columns
--- (a table's row is as wide as it must be), a section that "Contents" leave out or that is not
--- there, and a section, or a paragraph that begins so, of another ladder that is not.
local function shape_of(texts)
  local problems, n = {}, 0
  local function problem(...) problems[#problems + 1] = string.format(...) end
  local function is_section(name, title)
    for _, heading in ipairs(headings_of(texts[name] or "")) do
      if heading:sub(1, #title) == title then return true end
    end
    return (texts[name] or ""):find("\n\n" .. title, 1, true)
  end
  local function expect(where, at, name, title)
    n = n + 1
    if not is_section(name, title) then
      problem('%s.md:%d: no section "%s" in %s.md', where, at, title, name)
    end
  end
  for name, text in pairs(texts) do
    local at = 0
    for line in (text .. "\n"):gmatch("(.-)\n") do
      at = at + 1
      if utf8.len(line) > 100 and not line:find("^|[^|]") then
        problem("%s.md:%d: over 100 columns", name, at)
      end
    end
    local before, contents = text:match("^(.-\n)(Contents[^\n]*:\n.-)\n## ")
    at = select(2, (before or text):gsub("\n", "")) + 1
    local listed = {}
    for title in (contents or ""):gsub("^[^\n]*", ""):gmatch('"([^"]+)"') do
      listed[#listed + 1] = title
      expect(name, at, name, title)
    end
    local _, sections = headings_of(text)
    for _, heading in ipairs(sections) do
      local found = false
      for _, title in ipairs(listed) do found = found or heading:sub(1, #title) == title end
      n = n + 1
      if not found then problem('%s.md:%d: contents leave out "%s"', name, at, heading) end
    end
    local words = text:gsub("%s+", " ")
    for other, title in words:gmatch('(LADDER[%l_]*)%.md, "([^"]+)"') do
      expect(name, 0, other, title)
    end
    for title, other in words:gmatch('"([^"]+)" of (LADDER[%l_]*)%.md') do
      expect(name, 0, other, title)
    end
  end
  table.sort(problems)
  return problems, n
end

-- The rule itself: what is there passes, a file and a function that are not are told.
local twin, n_twin = problems_of("see `engine/sched.h`\n| x | `engine/sched.c`: `sched_pick` |\n"
  .. "see `engine/schedule.h`\n| x | `engine/sched.c`: `sched_choose` |", "twin")
assert(n_twin == 6 and #twin == 2, "check_docs does not tell")
assert(twin[1] == "twin:3: no file engine/schedule.h", twin[1])
assert(twin[2] == "twin:4: no sched_choose in engine/sched.c", twin[2])

-- And that of ladders: one in order; one with a line too long, whose contents name a section that
-- is not there and leave one out, and that refers to a section which the other has not.
local shape, n_shape = shape_of {
  LADDER = '# A\nContents:\n\n- "Terms": words.\n\n## Terms\n',
  LADDER_x = '# B\nContents:\n- "Bits": no.\n\n## Terms\n' .. ("long "):rep(21)
    .. '\nsee LADDER.md,\n"Terms" and "Words" of LADDER.md',
}
assert(n_shape == 6 and #shape == 4, "check_docs does not tell of ladders")
assert(shape[1] == 'LADDER_x.md:0: no section "Words" in LADDER.md', shape[1])
assert(shape[2] == 'LADDER_x.md:2: contents leave out "Terms"', shape[2])
assert(shape[3] == 'LADDER_x.md:2: no section "Bits" in LADDER_x.md', shape[3])
assert(shape[4] == "LADDER_x.md:6: over 100 columns", shape[4])

local problems, n = {}, 0
for _, name in ipairs { "README.md", "HACKING.md" } do
  local found, looked = problems_of(amalgam.read_file(name), name)
  table.move(found, 1, #found, #problems + 1, problems)
  n = n + looked
end
local ladders = {}
for _, file in ipairs(amalgam.list("kernels")) do
  local name = file:match("^(LADDER[%l_]*)%.md$")
  if name then ladders[name] = amalgam.read_file("kernels/" .. file) end
end
local found, looked = shape_of(ladders)
table.move(found, 1, #found, #problems + 1, problems)
n = n + looked
for _, text in ipairs(problems) do print(text) end
print(("%d names: %d passed, %d failed"):format(n, n - #problems, #problems))
return #problems == 0 and 0 or 1
