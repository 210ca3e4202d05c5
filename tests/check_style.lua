--- House rules that a program can see: lines, words, banned calls, length of functions.
-- Run from the root: build/amalgam lua tests/check_style.lua [--update]
--
-- Functions of 72 lines and more stand in tests/long_functions.txt with their length: the list may
-- shrink, a function may not grow past its entry, no new one may appear. --update rewrites it.
local amalgam = require "amalgam"

local LONG = 72
local LIST = "tests/long_functions.txt"

local banned = { -- pattern -> what to use instead; files that may
  { "%f[%w_]sprintf%s*%(", "snprintf" },
  { "%f[%w_]strcat%s*%(", "text_add" },
  { "%f[%w_]gets%s*%(", "fgets" },
  { "%f[%w_]atoi%s*%(", "parse_i64" },
  { "%f[%w_]atof%s*%(", "parse_f64" },
  { "%f[%w_]rand%s*%(", "rng.h" },
  { "%f[%w_]gettimeofday%s*%(", "timeline.h" },
  { "%f[%w_]exit%s*%(", "return a status" },
  -- Newer than the libraries of Ubuntu 22.04 (libcurl 7.81, jansson 2.13, glibc 2.35):
  { "_PROTOCOLS_STR%f[^%w_]", "what libcurl 7.81 has" },
  { "%f[%w_]json_object_[gsd]e[tl]n%f[^%l]", "what jansson 2.13 has" },
  { "%f[%w_]strlc%a+%s*%(", "snprintf" },
  { "%f[%w_]arc4random", "rng.h" },
}

-- The cuda device's streams do not wait for CUDA's default one, nor bench ops's.
local streams_apart = { "^device_cuda%.c$", "^cudev_", "^cmd_bench_ops%.c$" }
local default_stream = { "%f[%w_]cudaMemset%s*%(", "%f[%w_]cudaMemcpy2?D?%s*%(" }

local problems = {}

local function problem(...) problems[#problems + 1] = string.format(...) end

local function files_of(dir, ...)
  local out = {}
  for _, file in ipairs(amalgam.list(dir)) do
    for _, ending in ipairs { ... } do
      if file:sub(-#ending) == ending then out[#out + 1] = dir .. "/" .. file end
    end
  end
  return out
end

--- Words that leave work for nobody; spelt apart so that this file passes its own check.
local leftovers = { "TO" .. "DO", "FIX" .. "ME", "X" .. "XX" }

--- Tables of data (.def) may be as wide as their rows.
local function check_lines(path)
  local at, wide = 0, path:match("%.def$")
  for line in io.lines(path) do
    at = at + 1
    if not wide and (utf8.len(line) or #line) > 100 then
      problem("%s:%d: over 100 columns", path, at)
    end
    if line:match("%s$") then problem("%s:%d: blank at the end of the line", path, at) end
    if line:find("\t", 1, true) then problem("%s:%d: tab", path, at) end
    for _, word in ipairs(leftovers) do
      if line:find("%f[%w]" .. word .. "%f[%W]") then
        problem("%s:%d: leftover '%s'", path, at, word)
      end
    end
  end
end

local function any_of(text, patterns)
  for _, pattern in ipairs(patterns) do
    if text:find(pattern) then return true end
  end
  return false
end

local function check_c(path, lengths)
  local base = path:match("[^/]+$")
  local apart = any_of(base, streams_apart)
  local at, name, start = 0, nil, nil
  local header = path:match("%.h$")
  for line in io.lines(path) do
    at = at + 1
    if at == 1 and not line:match("^/[/*] " .. base:gsub("%p", "%%%0")) then
      problem("%s:1: does not begin with '/* %s - what it is'", path, base)
    end
    for _, rule in ipairs(banned) do
      if line:find(rule[1]) and rule[3] ~= base and not line:match("^%s*[/*]") then
        problem("%s:%d: use %s", path, at, rule[2])
      end
    end
    if apart and any_of(line, default_stream) then
      problem("%s:%d: on a stream: nothing here waits for the default one", path, at)
    end
    -- A function: a line that begins in the first column and a later line that is "}".
    local callee = not header and line:match("^[%w_][%w_%s%*]-([%w_]+)%(")
    if callee and not line:match(";%s*$") and not line:match("^#") then name, start = callee, at end
    if line == "}" and name then
      local n = at - start + 1
      if n >= LONG then lengths[path .. ":" .. name] = n end
      name = nil
    end
  end
end

local lengths, n_files = {}, 0
for _, dir in ipairs { "engine", "kernels", "tests" } do
  for _, path in ipairs(files_of(dir, ".c", ".h", ".def", ".cu", ".cuh")) do
    n_files = n_files + 1
    check_lines(path)
    if not path:match("%.def$") then check_c(path, lengths) end
  end
end
for _, dir in ipairs { "experiments", "baselines", "plots", "tests" } do
  for _, path in ipairs(files_of(dir, ".lua", ".gp")) do
    n_files = n_files + 1
    check_lines(path)
  end
end

local names = {}
for name in pairs(lengths) do names[#names + 1] = name end
table.sort(names)
if arg and arg[1] == "--update" then
  local out = assert(io.open(LIST, "w"))
  for _, name in ipairs(names) do out:write(("%d %s\n"):format(lengths[name], name)) end
  out:close()
end
local allowed = {}
for line in io.lines(LIST) do
  local n, name = line:match("^(%d+) (.+)$")
  allowed[name] = tonumber(n)
end
for _, name in ipairs(names) do
  local limit = allowed[name] or LONG - 1
  if lengths[name] > limit then
    problem("%s: %d lines, at most %d (split it, or say why in the commit and --update)", name,
      lengths[name], limit)
  end
end

for _, text in ipairs(problems) do print(text) end
print(("%d files, %d long functions: %d passed, %d failed"):format(n_files, #names,
  n_files - #problems, #problems))
return #problems == 0 and 0 or 1
