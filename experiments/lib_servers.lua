--- `amalgam servers`: the command that starts a foreign server, and the one that measures it.
---
--- baselines/servers/*.lua say how a server is started for a precision; here they become a line for
--- a shell. Nothing is started: a foreign system lives in an environment of its own.

local amalgam = require("amalgam")
local experiment = require("lib_experiment")

local quoted = experiment.quoted

local M = {}

local USAGE = [==[
usage: amalgam servers [NAME --model DIR [options]]

Without a name, the servers and the precisions that they are set up for. With one, two commands:
that which starts it, and that which measures it.

  --model DIR       checkpoint folder (llama_cpp: a GGUF file)
  --precision NAME  default W16A16KV16
  --tp N            default 1
  --ctx N           prompt and output of a request at most (default 8192)
  --folder DIR      where files that it needs are written (default: .)

Exit status: 0 done, 2 usage.]==]

local KEYS = { name = "string", title = "string", version = "string", url = "string",
  ready = "string", reset = "string", env = "table", command = "table", files = "table",
  request = "table", slots = "number" }
local OPTIONAL = { reset = true, env = true, files = true, slots = true }

---@class Server baselines/servers/NAME.lua
---@return Server
function M.load(name)
  local path = ("%s/baselines/servers/%s.lua"):format(amalgam.identity().root, name)
  local chunk = name:find("^[%w_]+$") and loadfile(path)
  if not chunk then
    experiment.refuse("servers: no server '%s': the nearest is '%s' (`amalgam servers` lists them)",
      name, amalgam.nearest(name, M.names()))
  end
  local server = chunk()
  for key in pairs(server) do
    local problem = experiment.key_problem(key, KEYS)
    if problem then experiment.refuse("%s: %s", path, problem) end
  end
  for key, kind in pairs(KEYS) do
    local value = server[key]
    if type(value) ~= kind and not (value == nil and OPTIONAL[key]) then
      experiment.refuse("%s: '%s' is no %s", path, key, kind)
    end
  end
  return server
end

---@return string[] names of baselines/servers
function M.names()
  local names = {}
  for _, file in ipairs(amalgam.list(amalgam.identity().root .. "/baselines/servers")) do
    names[#names + 1] = file:match("^([%w_]+)%.lua$")
  end
  table.sort(names)
  return names
end

---@return string[] canonical names
function M.precisions(server)
  local out = {}
  for _, key in ipairs(experiment.sorted_keys(server.command)) do
    if key ~= "base" then out[#out + 1] = key end
  end
  return out
end

---@param o { model: string, precision: string, tp: integer, ctx: integer, folder: string }
---@return string start, string measure, table<string, string> files by path
function M.commands(server, o)
  local extra = server.command[o.precision]
  if not extra then
    experiment.refuse("servers: %s is not set up for %s, only for %s", server.name, o.precision,
      table.concat(M.precisions(server), " "))
  end
  local values = { model = o.model, tp = tostring(o.tp), folder = o.folder,
    ctx = tostring(o.ctx * (server.slots or 1)) }
  local words, files = {}, {}
  for _, key in ipairs(experiment.sorted_keys(server.env or {})) do
    words[#words + 1] = key .. "=" .. quoted(server.env[key])
  end
  for _, list in ipairs({ server.command.base, extra }) do
    for _, word in ipairs(list) do
      words[#words + 1] = quoted((word:gsub("{(%w+)}", function(name)
        return values[name] or experiment.refuse("servers: %s: {%s}", server.name, name)
      end)))
    end
  end
  for name, body in pairs(server.files or {}) do files[o.folder .. "/" .. name] = body end
  local measure = { "amalgam bench serve", "--url", server.url, "--path", server.request.path,
    "--backend", server.name }
  -- Ids are drawn below the vocabulary, which most foreign servers do not tell; text needs its
  -- tokenizer.
  if server.request.prompts == "text" then
    measure[#measure + 1] = "--tokenizer " .. quoted(o.model)
  elseif not server.request.tells_vocab then
    measure[#measure + 1] = "--vocab VOCABULARY"
  end
  if server.request.model then measure[#measure + 1] = "--model " .. quoted(o.model) end
  if server.request.natural_end then measure[#measure + 1] = "--natural-end" end
  return table.concat(words, " "), table.concat(measure, " "), files
end

local function list()
  for _, name in ipairs(M.names()) do
    local server = M.load(name)
    print(("%-12s %s, %s: %s"):format(name, server.title, server.version,
      table.concat(M.precisions(server), " ")))
  end
end

---@param o table
---@return integer
local function run(o)
  local name = o.names[1]
  if not name then
    list()
    return 0
  end
  local server = M.load(name)
  if not o.model then experiment.refuse("servers: %s needs --model", name) end
  local precision, why = amalgam.precision(o.precision or "W16A16KV16")
  local start, measure, files = M.commands(server, { model = o.model,
    precision = precision or experiment.refuse("servers: %s", why), tp = o.tp or 1,
    ctx = o.ctx or 8192, folder = o.folder or "." })
  for _, path in ipairs(experiment.sorted_keys(files)) do amalgam.write_file(path, files[path]) end
  print(start)
  print(measure)
  return 0
end

M.main = experiment.command("servers", USAGE, { model = "word", precision = "word",
  folder = "word", tp = experiment.whole(64), ctx = experiment.whole(1 << 24) }, 1, run)

return M
