--- The smallest test harness: cases are functions that raise, `finish` prints the counts.

local M = { passed = 0, failed = 0, folders = {} }

---@param name string a sentence
---@param body fun()
function M.case(name, body)
  local ok, why = xpcall(body, function(err)
    return type(err) == "table" and (err.message or "error") or debug.traceback(tostring(err), 2)
  end)
  if ok then
    M.passed = M.passed + 1
  else
    M.failed = M.failed + 1
    print("FAILED: " .. name .. "\n  " .. tostring(why))
  end
end

function M.equal(got, expected, what)
  if got ~= expected then
    error(("%s: got %s, expected %s"):format(what or "value", tostring(got), tostring(expected)), 2)
  end
end

--- Written so that NaN fails.
function M.near(got, expected, tolerance, what)
  local close = got and math.abs(got - expected) <= tolerance
  if not close then
    error(("%s: got %s, expected %s within %s"):format(what or "value", tostring(got),
      tostring(expected), tostring(tolerance)), 2)
  end
end

function M.contains(text, part)
  if not tostring(text):find(part, 1, true) then
    error(("'%s' is not in: %s"):format(part, tostring(text)), 2)
  end
end

--- The name of a folder that does not exist yet, among the system's temporary files; `finish`
--- removes what was made in it.
---@return string
function M.folder()
  local name = os.tmpname()
  os.remove(name)
  table.insert(M.folders, name .. ".d")
  return name .. ".d"
end

--- Run with print and standard error kept: status, everything that was said.
---@param run fun(): integer
---@return integer status
---@return string text
function M.captured(run)
  local lines = {}
  local real_print, real_io = print, io.stderr
  local fake = { write = function(_, ...) lines[#lines + 1] = table.concat({ ... }) end }
  _G.print = function(...) lines[#lines + 1] = table.concat({ ... }, "\t") end
  io.stderr = fake -- luacheck: ignore 122
  local ok, status = pcall(run)
  _G.print = real_print
  io.stderr = real_io -- luacheck: ignore 122
  if not ok then error(status, 0) end
  return status, table.concat(lines, "\n")
end

--- Print the counts; call last. A failure ends the program with status 1.
function M.finish()
  for _, folder in ipairs(M.folders) do os.execute("rm -rf -- '" .. folder .. "'") end
  print(("%d passed, %d failed"):format(M.passed, M.failed))
  if M.failed > 0 then os.exit(1, true) end
end

return M
