--- House rule: files that README.md and HACKING.md name are there, and so are the functions that
--- HACKING.md's table finds in them.
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

-- The rule itself: what is there passes, a file and a function that are not are told.
local twin, n_twin = problems_of("see `engine/sched.h`\n| x | `engine/sched.c`: `sched_pick` |\n"
  .. "see `engine/schedule.h`\n| x | `engine/sched.c`: `sched_choose` |", "twin")
assert(n_twin == 6 and #twin == 2, "check_docs does not tell")
assert(twin[1] == "twin:3: no file engine/schedule.h", twin[1])
assert(twin[2] == "twin:4: no sched_choose in engine/sched.c", twin[2])

local problems, n = {}, 0
for _, name in ipairs { "README.md", "HACKING.md" } do
  local found, looked = problems_of(amalgam.read_file(name), name)
  table.move(found, 1, #found, #problems + 1, problems)
  n = n + looked
end
for _, text in ipairs(problems) do print(text) end
print(("%d names: %d passed, %d failed"):format(n, n - #problems, #problems))
return #problems == 0 and 0 or 1
