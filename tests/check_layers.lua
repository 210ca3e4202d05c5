--- House rule: a file includes its own layer and lower ones, nothing above (engine/LAYERS).
-- Run from the root: build/amalgam lua tests/check_layers.lua
local amalgam = require "amalgam"

local level, problems, n_layers = {}, {}, 0
for line in io.lines("engine/LAYERS") do
  if not line:match("^#") then
    local names = assert(line:match("^%w+:%s*(.*)$"), "engine/LAYERS: " .. line)
    n_layers = n_layers + 1
    for name in names:gmatch("%S+") do level[name] = n_layers end
  end
end

--- Layer of a header or source by its base name; nil when it stands in no line.
local function level_of(name)
  if level[name] then return level[name] end
  for pattern, at in pairs(level) do
    local prefix = pattern:match("^(.*)%*$")
    if prefix and name:sub(1, #prefix) == prefix then return at end
  end
end

--- Kernel headers and their sources count as the layer "kernel".
local kernel = assert(level.kernel)

local n_files = 0
for _, dir in ipairs { "engine", "kernels" } do
  for _, file in ipairs(amalgam.list(dir)) do
    local name = file:match("^(.*)%.[chd]u?e?f?h?$")
    if name and file:match("%.[ch]u?h?$") then
      n_files = n_files + 1
      local own = dir == "kernels" and (level_of(name) or kernel) or level_of(name)
      if not own then
        problems[#problems + 1] = ("%s/%s stands in no line of engine/LAYERS"):format(dir, file)
      else
        local at = 0
        for line in io.lines(dir .. "/" .. file) do
          at = at + 1
          local header = line:match('^#include "([%w_]+)%.h"')
          if header and header ~= "version" then
            local other = level_of(header) or (io.open("kernels/" .. header .. ".h") and kernel)
            if not other then
              problems[#problems + 1] = ("%s/%s:%d: %s.h stands in no line of engine/LAYERS")
                :format(dir, file, at, header)
            elseif other > own then
              problems[#problems + 1] = ("%s/%s:%d: includes %s.h of a layer above its own")
                :format(dir, file, at, header)
            end
          end
        end
      end
    end
  end
end

for _, problem in ipairs(problems) do print(problem) end
print(("%d files checked: %d passed, %d failed"):format(n_files, n_files - #problems, #problems))
return #problems == 0 and 0 or 1
