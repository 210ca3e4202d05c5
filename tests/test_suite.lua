--- The runner, compare and report, through their command lines, on experiments made here.

local amalgam = require("amalgam")
local compare = require("lib_compare")
local experiment = require("lib_experiment")
local report = require("lib_report")
local runner = require("lib_run")
local test = require("lib_test")

local dir = test.folder()
local binary = experiment.quoted(os.getenv("AMALGAM_BINARY") or "build/amalgam")
local identity = amalgam.identity()

local HEAD = [[
return {
  id = "e90_toy", title = "toy", question = "?", cost = "none", jobs = "parallel",
  origin = "predicted", timeout_s = 20,
]]
local BODY = [[
  axes = { { name = "a", values = { 1, 2, 3 } }, { name = "b", values = { "x", "y" } } },
  fixed = { device = "sim", n = 10 },
  quick = { a = { 1 }, n = { 2 } },
  where = function(point) return not (point.a == 3 and point.b == "y") end,
]]
local RUN = [[
  run = function(_, point)
    return { status = "ok", metrics = { time_ms = point.a * 10, answer_accuracy = 0.5 } }
  end,
}
]]

local n_files = 0
local function write(text)
  n_files = n_files + 1
  local path = ("%s/e90_toy_%d.lua"):format(dir, n_files)
  amalgam.write_file(path, text)
  return path
end

local function run(path, results, ...)
  local args = { path, "--results", dir .. "/" .. results, ... }
  return test.captured(function() return runner.main(args) end)
end

local function file_of(results, id)
  return ("%s/%s/%s/%s/%s.jsonl"):format(dir, results, id or "e90_toy", identity.machine,
    identity.version)
end

test.case("a file is replaced whole; a link and a pipe stay what they are", function()
  local real, link, pipe = dir .. "/real", dir .. "/link", dir .. "/pipe"
  amalgam.write_file(real, "first")
  amalgam.write_file(real, "second")
  test.equal(amalgam.read_file(real), "second")
  assert(os.execute(("ln -s real '%s'"):format(link)))
  amalgam.write_file(link, "through it")
  test.equal(amalgam.read_file(real), "through it")
  test.equal(os.execute(("test -h '%s'"):format(link)), true, "still a link")
  local reader = assert(io.popen(("mkfifo '%s'; timeout 10 cat '%s'"):format(pipe, pipe)))
  assert(os.execute(("while ! test -p '%s'; do sleep 0.01; done"):format(pipe)))
  amalgam.write_file(pipe, "as it comes")
  test.equal(reader:read("a"), "as it comes")
  reader:close()
  test.equal(os.execute(("test -p '%s'"):format(pipe)), true, "still a pipe")
  local ok, why = pcall(amalgam.write_file, dir, "text")
  test.equal(ok, false)
  test.contains(why, dir .. ": Is a directory")
  for _, name in ipairs(amalgam.list(dir)) do test.equal(name:find("%.tmp$"), nil, name) end
end)

test.case("what JSON has no words for is refused", function()
  for key, why in pairs({ ["a\0b"] = "zero byte", ["\xff"] = "no UTF-8", [1.5] = "no string" }) do
    local ok, said = pcall(amalgam.json_encode, { [key] = 1, good = 2 })
    test.equal(ok, false, why)
    test.contains(said, why)
  end
  test.equal(amalgam.json_encode({ ["\u{e9}"] = "\0" }), '{"\u{e9}":"\\u0000"}')
end)

test.case("points are expanded in order, the last axis first", function()
  local loaded = experiment.load(write(HEAD .. BODY .. RUN))
  local words = {}
  for i, entry in ipairs(experiment.expand(loaded)) do
    words[i] = entry.key.a .. entry.key.b
  end
  test.equal(table.concat(words, " "), "1x 1y 2x 2y 3x")
  test.equal(#experiment.expand(loaded, { quick = true }), 2)
  test.equal(experiment.expand(loaded, { quick = true })[1].key.n, 2, "quick replaces a fact")
end)

test.case("options are read alike by all commands", function()
  local path = write(HEAD .. BODY .. RUN)
  local code, text = run(path, "alike", "--only=a=1", "--jobs=2", "--quick")
  test.equal(code, 0, text)
  test.contains(text, "2 ok")
  for words, said in pairs({ ["--jobs 0"] = "run: --jobs 0 is no number from 1 to 64",
    ["--jobs"] = "run: --jobs needs a value", ["--only a"] = "run: --only a is not KEY=VALUE",
    ["--quick=1"] = "run: unknown option '--quick=1'", ["-x"] = "run: unknown option '-x'",
    ["--job 2"] = "run: unknown option '--job': the nearest is '--jobs'" }) do
    local args = { path }
    for word in words:gmatch("%S+") do args[#args + 1] = word end
    code, text = test.captured(function() return runner.main(args) end)
    test.equal(code, 2, words)
    test.contains(text, said)
  end
  code, text = test.captured(function() return report.main({ "more" }) end)
  test.equal(code, 2)
  test.contains(text, "report: unexpected argument 'more'")
  test.equal((test.captured(function() return compare.main({ "--help" }) end)), 0)
end)

test.case("--gpu takes a data sheet that the experiment does not name", function()
  local axis = [[
  axes = { { name = "gpu", values = { "h200" } } }, fixed = { device = "sim" },
]]
  local path = write((HEAD .. axis .. RUN:gsub("point%.a %* 10", "1")):gsub("e90_toy", "e90_sheet"))
  local code, text = run(path, "sheet", "--gpu", "l40s")
  test.equal(code, 0, text)
  test.equal(amalgam.rows(file_of("sheet", "e90_sheet"))[1].key.gpu, "l40s")
  code, text = run(path, "sheet", "--gpu", "l40")
  test.equal(code, 2)
  test.contains(text, "'l40' is no value of gpu: the nearest is 'h200' (values: h200)")
end)

--- Points of a = 1, and no others, know what the GPU did.
local function knows_of_gpu(name)
  for _, row in ipairs(amalgam.rows(file_of(name))) do
    local gpu = row.provenance.gpu_during
    test.equal(gpu and gpu.sm_clock_mhz, row.key.a == 1 and 1725 or nil)
    test.equal(gpu and gpu.kind, nil)
    test.equal(row.metrics.time_ms, 1)
  end
end

test.case("a row says what the GPU did while it served, whatever the experiment keeps", function()
  local path = write((HEAD:gsub("predicted", "measured") .. BODY .. [[
  run = function(amalgam, point)
    local result = point.a == 1 and amalgam.serve({}) or {}
    return { status = "ok", metrics = { time_ms = (result.metrics or { time_ms = 1 }).time_ms } }
  end,
}
]]))
  local serve = amalgam.serve
  amalgam.serve = function()
    return { status = "ok", metrics = { time_ms = 1 }, gpu = { sm_clock_mhz = 1725 } }
  end
  local code, text = run(path, "during")
  amalgam.serve = serve
  test.equal(code, 0, text)
  knows_of_gpu("during")
end)

test.case("a row says what the GPU did after its benchmark, on no line of its point", function()
  local path = write((HEAD:gsub("predicted", "measured") .. BODY .. [[
  run = function(amalgam, point)
    local lines = amalgam.bench("linear", { m = point.a })
    return { status = "ok", metrics = { time_ms = #lines } }
  end,
}
]]))
  local bench = amalgam.bench
  amalgam.bench = function(_, options)
    local gpu = { kind = "gpu", sm_clock_mhz = 1725 }
    return { { kind = "linear", us = 1 }, options.m == 1 and gpu or nil }
  end
  local code, text = run(path, "benched")
  amalgam.bench = bench
  test.equal(code, 0, text)
  knows_of_gpu("benched")
end)

test.case("what a benchmark fails of is placed in the experiment", function()
  local path = write(HEAD .. BODY .. [[
  run = function(amalgam, point)
    if point.a == 1 then amalgam.bench("harness", { no_such_option = 1 }) end
    return { status = "ok", metrics = { time_ms = 1 } }
  end,
}
]])
  test.equal((run(path, "unbenched")), 1)
  for _, row in ipairs(amalgam.rows(file_of("unbenched"))) do
    if row.key.a == 1 then test.contains(row.reason, path .. ":9: bench harness: unknown") end
  end
end)

test.case("a GPU has the data sheet of its own kind, or none", function()
  for _, case in ipairs({ -- names and MiB as nvidia-smi prints them
    { "NVIDIA H200", 143771, "h200" }, { "NVIDIA H100 80GB HBM3", 81559, "h100-sxm" },
    { "NVIDIA H100 PCIe", 81559 }, { "NVIDIA H100 NVL", 95830 },
    { "NVIDIA GH200 144G HBM3e", 147456 },
    { "NVIDIA A100-SXM4-80GB", 81920, "a100-80gb" }, { "NVIDIA A100-SXM4-40GB", 40960 },
    { "NVIDIA L40S", 46068, "l40s" }, { "NVIDIA L40", 46068 }, { "NVIDIA L4", 23034 },
    { "NVIDIA GeForce RTX 4090", 24564, "rtx4090" }, { "NVIDIA GeForce RTX 3090", 24576 },
    { "NVIDIA RTX 6000 Ada Generation", 49140 },
  }) do
    local gpu = { name = case[1], memory_bytes = case[2] * 2 ^ 20 }
    test.equal(runner.sheet_of(gpu), case[3], gpu.name)
  end
  test.equal(runner.sheet_of(nil), nil)
end)

test.case("an experiment that needs a GPU makes no rows without one", function()
  local path = write((HEAD .. 'needs = "gpu",\n' .. BODY .. RUN):gsub("e90_toy", "e90_gpu"))
  local code, text = run(path, "needs")
  test.equal(code, 0)
  if identity.provenance.gpu then return end
  test.contains(text, "not run: ")
  test.equal(#amalgam.rows(file_of("needs", "e90_gpu")), 0)
  code, text = run(write(HEAD .. 'needs = "luck",\n' .. BODY .. RUN), "needs")
  test.equal(code, 2)
  test.contains(text, "needs = 'luck' is not 'gpu'")
end)

test.case("bench runs a benchmark of this program and says what cannot be done", function()
  local ok, why = pcall(amalgam.bench, "nothing", {})
  test.equal(ok, false)
  test.contains(why, "exit status 2")
  ok, why = pcall(amalgam.bench, "load", { model = dir .. "/none" })
  test.equal(ok, false)
  test.contains(why, "none")
  local built = table.concat(amalgam.devices(), " "):find("cuda", 1, true) ~= nil
  local good, lines, status, reason = pcall(amalgam.bench, "linear", { no_such_option = true })
  test.equal(good, not built, "an unknown option is refused where the benchmark exists")
  if not built then
    test.equal(lines, nil)
    test.equal(status, "skipped")
    test.contains(reason, "no CUDA")
  end
end)

test.case("a finished point is skipped and the reason is said", function()
  local path = write(HEAD .. BODY .. RUN)
  local status, text = run(path, "resume")
  test.equal(status, 0)
  test.contains(text, "5 ok, 0 oom, 0 skipped, 0 failed")
  status, text = run(path, "resume")
  test.equal(status, 0)
  test.contains(text, "5 of 5 points finished in")
  test.equal(#amalgam.rows(file_of("resume")), 5, "rows")
  run(path, "resume", "--again")
  test.equal(#amalgam.rows(file_of("resume")), 10, "rows after --again")
end)

test.case("rows hold what DESIGN says", function()
  local row = amalgam.rows(file_of("resume"))[1]
  for _, key in ipairs({ "schema", "run", "time", "commit", "diff", "experiment", "definition",
    "machine", "point", "key", "origin", "status", "metrics", "provenance", "wall_s" }) do
    if row[key] == nil then error("no " .. key) end
  end
  test.equal(row.origin, "predicted")
  test.equal(row.key.device, "sim")
  test.equal(row.metrics.time_ms, row.key.a * 10)
end)

test.case("two runs at once do each point once", function()
  local path = write(HEAD .. BODY .. [[
  run = function(_, point)
    local until_s = os.clock() + 0.2
    while os.clock() < until_s do end
    return { status = "ok", metrics = { x = point.a } }
  end }]])
  local command = ("%s --root %s run %s --results %s/both --jobs 1 2>&1"):format(
    binary, experiment.quoted(identity.root), path, dir)
  os.execute(("%s > %s/said1 & %s > %s/said2; wait"):format(command, dir, command, dir))
  test.equal(#amalgam.rows(file_of("both")), 5, "rows")
  test.contains(amalgam.read_file(dir .. "/said1") .. amalgam.read_file(dir .. "/said2"),
    "another run adds to these rows")
end)

test.case("an interrupted run keeps its rows, says so by its status, and goes on", function()
  local path = write(HEAD .. BODY .. [[
  run = function(_, point)
    while point.a == 2 and not io.open("]] .. dir .. [[/go") do end
    return { status = "ok", metrics = { x = point.a } }
  end }]])
  local rows = file_of("stopped")
  assert(os.execute(([[%s --root %s run %s --results %s/stopped --jobs 1 >%s/said 2>&1 & run=$!
    n=0
    until [ "$(cat '%s' 2>/dev/null | wc -l)" -eq 2 ] || [ $((n += 1)) -gt 2000 ]
    do sleep 0.01; done
    kill -INT $run; wait $run; [ $? -eq 130 ]
  ]]):format(binary, experiment.quoted(identity.root), path, dir, dir, rows)), "status 130")
  test.contains(amalgam.read_file(dir .. "/said"), "interrupted; 2 rows of this run kept")
  test.equal(#amalgam.rows(rows), 2, "rows")
  amalgam.write_file(dir .. "/go", "")
  local status, said = run(path, "stopped")
  test.equal(status, 0)
  test.contains(said, "2 of 5 points finished")
  test.equal(#amalgam.rows(rows), 5, "rows")
end)

test.case("a torn last line costs its own point only", function()
  local path = write(HEAD .. BODY .. RUN)
  run(path, "torn")
  local text = amalgam.read_file(file_of("torn"))
  amalgam.write_file(file_of("torn"), text:sub(1, -40)) -- as a kill in mid-write leaves it
  local status, said = run(path, "torn")
  test.equal(status, 0)
  test.contains(said, "1 line of")
  test.contains(said, "4 of 5 points finished")
  local rows, broken = amalgam.rows(file_of("torn"))
  test.equal(#rows, 5, "rows")
  test.equal(broken, 1, "broken lines")
end)

test.case("a changed definition runs again", function()
  local path = write(HEAD .. BODY .. RUN)
  run(path, "changed")
  amalgam.write_file(path, HEAD .. BODY .. "-- a comment\n" .. RUN)
  local _, said = run(path, "changed")
  test.contains(said, "another definition")
  test.contains(said, "5 ok")
end)

test.case("a module that is required belongs to the definition", function()
  local plain = experiment.load(write(HEAD .. BODY .. RUN))
  local with = experiment.load(write("local _ = require('fp16')\n" .. HEAD .. BODY .. RUN))
  test.equal(with.modules[1], "fp16")
  test.equal(plain.definition == with.definition, false)
end)

test.case("what points share is run once for each of its values", function()
  local path = write(HEAD .. BODY .. ([[
  shared = { by = { "a" }, run = function(_, point)
    local f = io.open("%s/times", "a")
    f:write("once\n")
    f:close()
    if point.a == 2 then error("no luck") end
    return { status = "ok", x = point.a / 7, n = point.n }
  end },
  run = function(_, point, base)
    return { status = "ok", metrics = { same = base.x == point.a / 7 and 1 or 0, n = base.n } }
  end }]]):format(dir))
  local code, text = run(path, "shared")
  test.equal(code, 1)
  test.contains(text, "3 ok, 0 oom, 0 skipped, 2 failed")
  test.equal(amalgam.read_file(dir .. "/times"), ("once\n"):rep(3))
  for _, row in ipairs(amalgam.rows(file_of("shared"))) do
    test.equal(row.status, row.key.a == 2 and "failed" or "ok")
    if row.key.a == 2 then test.contains(row.reason, "no luck") end
    if row.key.a ~= 2 then test.equal(row.metrics.same + row.metrics.n, 11.0) end
  end
  run(path, "shared", "--only", "a=1") -- all is there: nothing is shared either
  test.equal(amalgam.read_file(dir .. "/times"), ("once\n"):rep(3))
end)

-- Each: what is wrong, text, part of the message.
local MISTAKES = {
  { "unknown key", HEAD .. "  tittle = 'x',\n" .. BODY .. RUN,
    ":4: unknown key 'tittle': the nearest is 'title'" },
  { "unknown key of an axis", HEAD .. BODY:gsub("values = ", "value = ", 1) .. RUN,
    "axis 'a': unknown key 'value': the nearest is 'values'" },
  { "missing key", "return { id = 'x' }", ":1: 'title' is missing" },
  { "wrong type", HEAD:gsub('title = "toy"', "title = 3") .. BODY .. RUN, "'title' is a number" },
  { "misspelt axis in quick", HEAD .. BODY:gsub("quick = { a", "quick = { aa") .. RUN,
    ":6: quick names 'aa'" },
  { "misspelt axis in where", HEAD .. BODY:gsub("point%.a ==", "point.aa ==") .. RUN,
    ":7: the point has no axis 'aa'" },
  { "misspelt axis in run", HEAD .. BODY .. RUN:gsub("point%.a %*", "point.aa *"),
    ":9: the point has no axis 'aa'" },
  { "shared by no axis", HEAD .. BODY .. "shared = { by = { 'n' }, run = print },\n" .. RUN,
    ":8: shared: 'n' is no axis" },
  { "unknown key of shared", HEAD .. BODY .. "shared = { bye = {}, run = print },\n" .. RUN,
    "shared: unknown key 'bye': the nearest is 'by'" },
  { "another axis in shared", HEAD .. BODY .. [[
  shared = { by = { "a" }, run = function(_, point) return { x = point.b } end },
]] .. RUN, "the point has no axis 'b'" },
  { "value twice", HEAD .. BODY:gsub("1, 2, 3", "1, 2, 2") .. RUN, "value '2' twice" },
  { "no values", HEAD .. BODY:gsub("{ 1, 2, 3 }", "{}") .. RUN, "a has no values" },
  { "syntax", HEAD .. BODY .. "run = = 3 }", ":8: unexpected symbol" },
  { "global", "x = 3\n" .. HEAD .. BODY .. RUN, ":1: 'x' is global" },
  { "error while loading", "error('boo')", ":1: boo" },
  { "unknown module", "require('lib_nothing')", ":1: module 'lib_nothing' not found" },
  { "no table", "return 3", "returns a table" },
  { "unknown key of the engine", HEAD .. BODY .. [[
  run = function(amalgam) return amalgam.serve { modle = "x" } end }]],
    "serve: unknown key 'modle': the nearest is 'model'" },
  { "unknown key of a result", HEAD .. BODY .. [[
  run = function() return { status = "ok", metric = {} } end }]],
    "result: unknown key 'metric': the nearest is 'metrics'" },
}
for _, mistake in ipairs(MISTAKES) do
  test.case("refused in one line with status 2: " .. mistake[1], function()
    local path = write(mistake[2])
    local status, said = run(path, "mistakes")
    test.equal(status, 2)
    local line = said:match("amalgam: [^\n]*")
    test.contains(line, mistake[3])
  end)
end

-- One key more than a call reads, which another call may read. The twin: without it, the table is
-- read.
test.case("a key that a call does not read is refused, and the nearest is named", function()
  local tiny = identity.root .. "/workloads/tiny"
  local base = { model = "Llama-3.1-8B", weights = "synthetic", device = "null", gpu = "h200" }
  local function refused(call, options, said)
    for key, value in pairs(base) do options[key] = value end
    local ok, why = pcall(call, options)
    test.equal(ok, false, said)
    test.contains(why, said)
  end
  local w = { n_requests = 1, prompt = { fixed = 4 }, output = { fixed = 2 },
    sampling = { presence_penalty = 1, min_tokens = 1 } }
  for _, case in ipairs({
    { { presicion = "W4" }, "serve: unknown key 'presicion': the nearest is 'precision'" },
    { { window = 5 }, "serve: unknown key 'window': the nearest is" },
    { { scheduler = { max_seq = 2 } },
      "scheduler: unknown key 'max_seq': the nearest is 'max_seqs'" },
    { { workload = { n_request = 3 } },
      "workload: unknown key 'n_request': the nearest is 'n_requests'" },
    { { workload = { prompt = { fix = 3 } } },
      "prompt: unknown key 'fix': the nearest is 'fixed'" },
    { { workload = { sampling = { topk = 3 } } },
      "sampling: unknown key 'topk': the nearest is 'top_k'" },
    { { workload = w, limits = { ttft = 3 } },
      "limits: unknown key 'ttft': the nearest is 'ttft_ms'" },
  }) do refused(amalgam.serve, case[1], case[2]) end
  refused(amalgam.capacity, { workload = w }, "capacity: unknown key 'workload'")
  refused(amalgam.evaluate, { workload = w }, "evaluate: unknown key 'workload'")
  for _, case in ipairs({
    { amalgam.bench_serve, { ulr = "x" }, "bench_serve: unknown key 'ulr': the nearest is 'url'" },
    { amalgam.quantize, { methods = "x" },
      "quantize: unknown key 'methods': the nearest is 'method'" },
    { amalgam.quantize, { model = "x", out = "y", calibration = { sed = 1 } },
      "calibration: unknown key 'sed': the nearest is 'seed'" },
    { amalgam.evaluate, { model = tiny, text = { byte = 3 } },
      "text: unknown key 'byte': the nearest is 'bytes'" },
    { amalgam.evaluate, { model = tiny, tasks = { { kinds = "recall" } } },
      "tasks: unknown key 'kinds': the nearest is 'kind'" },
    { amalgam.evaluate, { model = tiny, tasks = { kind = "recall" } },
      "tasks: a list" },
  }) do
    local ok, why = pcall(case[1], case[2])
    test.equal(ok, false, case[3])
    test.contains(why, case[3])
  end
  base.workload, base.scheduler, base.limits = w, { max_seqs = 2 }, { ttft_ms = 3 }
  test.equal(amalgam.serve(base).status, "ok")
end)

test.case("the nearest name takes the fewest letters", function()
  local names = { "top_k", "top_p", "min_p" }
  test.equal(amalgam.nearest("top-p", names), "top_p")
  test.equal(amalgam.nearest("top", names), "top_k", "the first of several")
  test.equal(amalgam.nearest("mn_p", names), "min_p")
  test.equal(amalgam.nearest(("top_p"):rep(40), names), "top_p")
  test.equal(amalgam.nearest("x", {}), nil)
end)

test.case("options that name nothing are refused", function()
  local path = write(HEAD .. BODY .. RUN)
  for _, wrong in ipairs({ { "--only", "c=1" }, { "--only", "a=7" }, { "--only", "a" },
    { "--jobs", "0" }, { "--what" }, { "--gpu", "h100-sxm" } }) do
    test.equal((run(path, "options", table.unpack(wrong))), 2, table.concat(wrong, " "))
  end
  test.equal(#amalgam.rows(file_of("options")), 0, "rows")
end)

test.case("--only restricts axes, also to several values", function()
  local path = write(HEAD .. BODY .. RUN)
  local _, said = run(path, "only", "--only", "a=1,3", "--only", "b=x")
  test.contains(said, "2 ok")
  _, said = run(path, "only")
  test.contains(said, "2 of 5 points finished")
end)

local CRASHES = HEAD .. BODY .. [[
  run = function(amalgam, point)
    if point.a == 1 and point.b == "x" then os.exit(7) end
    if point.a == 1 and point.b == "y" then error("bad luck") end
    if point.a == 2 and point.b == "x" then amalgam.json_encode(0 / 0) end
    if point.a == 2 and point.b == "y" then return { status = "ok", metrics = { x = 0 / 0 } } end
    return { status = "oom", reason = "too large" }
  end,
}
]]

test.case("a crashing point is a failed row and the sweep goes on", function()
  local path = write(CRASHES)
  local status, said = run(path, "crash")
  test.equal(status, 1)
  test.contains(said, "0 ok, 1 oom, 0 skipped, 4 failed")
  local reasons = {}
  for _, row in ipairs(amalgam.rows(file_of("crash"))) do
    reasons[row.key.a .. row.key.b] = row.status .. " " .. row.reason
  end
  test.contains(reasons["1x"], "failed left with status 7")
  test.contains(reasons["1y"], "bad luck")
  test.contains(reasons["2x"], "failed")
  test.contains(reasons["2y"], "failed")
  test.equal(reasons["3x"], "oom too large")
  status, said = run(path, "crash")
  test.equal(status, 1)
  test.contains(said, "4 points failed before: tried again")
  test.contains(said, "1 of 5 points finished")
end)

-- The program that a point has started is a benchmark, or the shell of os.execute: it goes with the
-- point, and does not keep the run waiting for it.
test.case("a point past its time is killed, and what it has started", function()
  local path = write((HEAD:gsub("timeout_s = 20", "timeout_s = 1")) .. BODY .. ([[
  run = function(_, point)
    while point.a == 1 and point.b == "x" do end
    if point.a == 2 and point.b == "x" then os.execute("sleep 4; echo >'%s/after'") end
    return { status = "ok", metrics = {} }
  end }]]):format(dir))
  local started = os.time()
  local status, n = run(path, "late"), 0
  test.equal(status, 1)
  for _, row in ipairs(amalgam.rows(file_of("late"))) do
    if row.status == "failed" then
      test.contains(row.reason, "timed out after 1 s")
      n = n + 1
    end
  end
  test.equal(n, 2)
  os.execute(("sleep %d"):format(math.max(0, started + 6 - os.time())))
  test.equal(io.open(dir .. "/after"), nil, "what the shell writes")
end)

test.case("one Lua error at every point is an error of the experiment", function()
  local status, said = run(write(HEAD .. BODY .. "run = function() error('wrong') end }"), "every")
  test.equal(status, 2)
  test.contains(said, "wrong (every point)")
end)

test.case("rows that cannot be written stop the run with one line", function()
  local path = write(HEAD .. BODY .. RUN)
  local status, said = test.captured(function()
    return runner.main({ path, "--results", "/dev/null/nowhere" })
  end)
  test.equal(status, 1)
  test.contains(said, "0 rows of this run kept")
end)

-- --- compare -------------------------------------------------------------------------------------

--- Five repetitions of two points, `factor` times as slow as the first version's, with 1 % noise.
local function measured(path, factor, noise_seed, definition)
  local draw = require("lib_stats").generator(noise_seed)
  local lines = {}
  for point = 1, 2 do
    for repetition = 1, 8 do
      local noise = 1 + (draw(1000) - 500) / 1000 * 0.01
      lines[#lines + 1] = amalgam.json_encode({
        experiment = "e91", definition = definition or "d", machine = "m", origin = "measured",
        status = "ok", time = "t", commit = "c", key = { point = point, repetition = repetition },
        metrics = { ttft_p50_ms = 20 * point * factor * noise, requests_per_s = 50 / noise },
      })
    end
  end
  amalgam.write_file(path, table.concat(lines, "\n") .. "\n")
  return path
end

local function compared(...)
  local args = { ... }
  return test.captured(function() return compare.main(args) end)
end

test.case("compare finds a planted 5 % and calls A/A the same", function()
  local base = measured(dir .. "/base.jsonl", 1, 1)
  local slow = measured(dir .. "/slow.jsonl", 1.05, 2)
  local twin = measured(dir .. "/twin.jsonl", 1, 3)
  local status, said = compared(base, slow)
  test.equal(status, 1)
  test.contains(said, "2 slower, 2 same")
  status, said = compared(slow, base)
  test.equal(status, 0)
  test.contains(said, "2 faster, 2 same")
  status, said = compared(base, twin)
  test.equal(status, 0)
  test.contains(said, "4 same")
end)

test.case("compare refuses another definition and names what is missing", function()
  local base = dir .. "/base.jsonl"
  local status, said = compared(base, measured(dir .. "/other.jsonl", 2, 1, "e"))
  test.equal(status, 0)
  test.contains(said, "2 not comparable")
  test.contains(said, "the definition changed")
  status, said = compared(base, dir .. "/nothing.jsonl")
  test.equal(status, 2)
  test.contains(said, "No such file")
  test.equal((compared(base)), 2)
end)

test.case("compare names a metric that one side alone has, and lines that are no rows", function()
  local function one(path, metrics, more)
    amalgam.write_file(path, (more or "") .. amalgam.json_encode({ experiment = "e91",
      definition = "d", machine = "m", origin = "predicted", status = "ok", time = "t",
      commit = "c", key = { point = 1 }, metrics = metrics }) .. "\n")
    return path
  end
  local base = one(dir .. "/n1.jsonl", { output_per_s = 5, ttft_ms = 4, steps = 3 })
  local head = one(dir .. "/n2.jsonl", { output_tokens_per_s = 5, ttft_ms = "none", other = 3 },
    '{"experiment":"e9\n')
  local status, said = compared(base, head)
  test.equal(status, 0)
  test.contains(said, "output_per_s is in BASE alone")
  test.contains(said, "output_tokens_per_s is in HEAD alone")
  test.contains(said, "ttft_ms is in BASE alone") -- it has no value
  test.contains(said, "3 not comparable")
  test.contains(said, "left out, cannot be read: " .. head .. ": 1 line")
  test.contains(select(2, compared(base, base)), "2 same")
end)

test.case("compare takes git's names for versions, and names those that there are", function()
  local git = io.popen("git rev-parse --short=12 HEAD 2>/dev/null")
  local head = git and git:read("l")
  if git then git:close() end
  local row = amalgam.json_encode({ experiment = "e95", definition = "d", machine = "m", time = "1",
    origin = "predicted", status = "ok", key = { p = 1 }, metrics = { x_ms = 1 } }) .. "\n"
  amalgam.write_file(dir .. "/versions/e95/m/0123abcd0123.jsonl", row)
  if head then
    amalgam.write_file(("%s/versions/e95/m/%s.jsonl"):format(dir, head), row)
    local status, said = compared("HEAD", "0123", "--results", dir .. "/versions")
    test.equal(status, 0)
    test.contains(said, "1 same")
  end
  local status, said = compared("0123", "nothing", "--results", dir .. "/versions")
  test.equal(status, 2)
  test.contains(said, "no rows of 'nothing'")
  test.contains(said, "0123abcd0123")
  test.equal((compared("0123", "'; echo", "--results", dir .. "/versions")), 2)
  for i = 1, 9 do
    amalgam.write_file(("%s/versions/e95/m/ffff%08d.jsonl"):format(dir, i), row)
  end
  status, said = compared("0123", "ffff", "--results", dir .. "/versions")
  test.equal(status, 2)
  test.contains(said, "'ffff' is more than one version: ffff00000001, ")
  test.contains(said, "ffff00000006 and 3 more")
end)

test.case("compare takes predictions exactly", function()
  local function predicted(path, x)
    amalgam.write_file(path, amalgam.json_encode({ experiment = "e92", definition = "d",
      machine = "m", origin = "predicted", status = "ok", key = { p = 1 },
      metrics = { ttft_p50_ms = x, text_perplexity = x } }) .. "\n")
    return path
  end
  local base = predicted(dir .. "/p1.jsonl", 1)
  test.equal((compared(base, predicted(dir .. "/p2.jsonl", 1))), 0)
  local status, said = compared(base, predicted(dir .. "/p3.jsonl", 1.000001))
  test.equal(status, 1)
  test.contains(said, "1 slower, 1 worse")
end)

test.case("compare lists the largest of many changes, and counts the others", function()
  local function predicted(path, factor)
    local lines = {}
    for i = 1, 40 do
      lines[i] = amalgam.json_encode({ experiment = "e96", definition = "d", machine = "m",
        origin = "predicted", status = "ok", key = { p = i }, metrics = { x_ms = factor(i) } })
    end
    amalgam.write_file(path, table.concat(lines, "\n") .. "\n")
    return path
  end
  local base = predicted(dir .. "/many1.jsonl", function() return 100 end)
  local head = predicted(dir .. "/many2.jsonl", function(i) return 100 + i end)
  local status, said = compared(base, head)
  test.equal(status, 1)
  local lines = select(2, said:gsub("x_ms 100 %->", ""))
  test.equal(lines, 20)
  test.contains(said, "x_ms 100 -> 140") -- the largest
  test.equal(said:find("x_ms 100 -> 120 ", 1, true), nil)
  test.contains(said, "slower          e96: 20 more, the largest x1.2000 (--all lists them)")
  said = select(2, compared(base, head, "--all"))
  test.contains(said, "x_ms 100 -> 101 ")
end)

test.case("compare tells too few repetitions apart from no change", function()
  local function two(path, x)
    local lines = {}
    for i = 1, 2 do
      lines[i] = amalgam.json_encode({ experiment = "e93", definition = "d", machine = "m",
        origin = "measured", status = "ok", key = { repetition = i }, metrics = { x_ms = x + i } })
    end
    amalgam.write_file(path, table.concat(lines, "\n") .. "\n")
    return path
  end
  local _, said = compared(two(dir .. "/t1.jsonl", 100), two(dir .. "/t2.jsonl", 200))
  test.contains(said, "1 too few")
end)

--- Measured once each: rows of these values on one machine.
local function once(path, machine, metric, values)
  local lines = {}
  for model, value in pairs(values) do
    lines[#lines + 1] = amalgam.json_encode({ experiment = "e97", definition = "d",
      machine = machine, origin = "measured", status = "ok", time = "1",
      key = { model = model, gpu = "h200" }, metrics = { [metric] = value, other_us = 10 } })
  end
  table.sort(lines)
  amalgam.write_file(path, table.concat(lines, "\n") .. "\n")
  return path
end

test.case("compare names the points that moved most where each was measured once", function()
  local base = once(dir .. "/o1.jsonl", "m", "step_us", { A = 100, B = 100, C = 100, D = 100 })
  local head = once(dir .. "/o2.jsonl", "m", "step_us", { A = 101, B = 130, C = 60, D = 105 })
  local status, said = compared(base, head)
  test.equal(status, 0) -- nothing is known to be slower
  test.contains(said, "8 metrics; --all lists them")
  test.contains(said, "model=B: step_us 100 -> 130 x1.3000  n=1/1 slower, if it is not chance")
  test.contains(said, "model=C: step_us 100 -> 60 x0.6000  n=1/1 faster, if it is not chance")
  test.contains(said, "model=D: step_us 100 -> 105")
  test.equal(said:find("model=A:", 1, true), nil) -- less than --effect
  test.equal(select(2, said:gsub("other_us 10", "")), 0)
  test.equal(said:find("model=D.-model=B"), nil) -- the largest comes first
  test.contains(select(2, compared(base, head, "--effect", "0.001")), "model=A: step_us")
end)

test.case("compare shows means for each value of a key", function()
  local base = once(dir .. "/b1.jsonl", "m", "step_us", { A = 100, B = 100 })
  local head = once(dir .. "/b2.jsonl", "m", "step_us", { A = 50, B = 200 })
  local _, said = compared(base, head, "--by", "model")
  test.equal(said:find("\nstep_us +A +1   0%.5000\nstep_us +B +1   2%.0000\n") ~= nil, true, said)
  test.equal(select(2, compared(base, head)):find("\nstep_us +%d"), nil) -- their mean is 1
  local status, why = compared(base, head, "--by", "modle")
  test.equal(status, 2)
  test.contains(why, "no row has it (they have gpu, model)")
end)

test.case("compare says that rows are of other hardware", function()
  local base = once(dir .. "/h1.jsonl", "node-a", "step_us", { A = 100, B = 100 })
  local head = once(dir .. "/h2.jsonl", "node-b", "step_us", { A = 50, C = 60 })
  local _, said = compared(base, head)
  test.contains(said, "model=A: other hardware: node-a, and node-b in HEAD")
  test.contains(said, "model=B: no such row in HEAD")
  test.contains(said, "model=C: no such row in BASE")
  test.contains(said, "3 not comparable")
  test.contains(select(2, compared(base, base)), "4 too few")
end)

test.case("a slower machine is no slower engine; agreement and divergence are quality", function()
  local library = require("lib_rows")
  for _, name in ipairs({ "b1_roofline_us", "prefill_serial_us", "read_gb_per_s", "read_gbs",
    "matrix_tflops", "rate_per_s", "lag_p99_ms" }) do
    test.equal(library.direction(name), 0, name)
  end
  for name, direction in pairs({ b1_us = -1, output_tokens_per_s = 1, kl_nats = -1,
    greedy_agreement = 1, nll_nats = -1, b1_c1024_gbs = 1, prefill_us = -1 }) do
    test.equal(library.direction(name), direction, name)
  end
  test.equal(library.is_quality("kl_nats") and library.is_quality("greedy_agreement"), true)
  test.equal(library.is_quality("b1_us"), false)
end)

test.case("compare says when HEAD fails where BASE did not", function()
  local function one(path, status)
    amalgam.write_file(path, amalgam.json_encode({ experiment = "e94", definition = "d",
      machine = "m", origin = "predicted", status = status, key = { p = 1 }, reason = "crash",
      metrics = { x_ms = 1 } }) .. "\n")
    return path
  end
  local status, said = compared(one(dir .. "/f1.jsonl", "ok"), one(dir .. "/f2.jsonl", "failed"))
  test.equal(status, 1)
  test.contains(said, "ok in BASE, failed in HEAD")
end)

test.case("compare --json is one object a line", function()
  local _, said = compared(dir .. "/base.jsonl", dir .. "/slow.jsonl", "--json")
  local n = 0
  for line in said:gmatch("[^\n]+") do
    local object = amalgam.json_decode(line)
    n = n + ((object.class or object.summary) and 1 or 0)
  end
  test.equal(n, 5)
end)

-- --- rows ----------------------------------------------------------------------------------------

test.case("rows are shown as a table: what differs, and the metrics asked for", function()
  local show = require("lib_table")
  local function shown(...)
    local args = { "e98", "--results", dir .. "/shown", ... }
    return test.captured(function() return show.main(args) end)
  end
  local lines = {}
  for at, precision in ipairs({ "W4", "W8", "W16" }) do
    local fits = precision ~= "W16"
    lines[at] = amalgam.json_encode({ experiment = "e98_x", definition = "d", machine = "m",
      origin = "predicted", time = tostring(at), status = fits and "ok" or "oom",
      reason = not fits and "too large" or nil, key = { model = "A", precision = precision, n = 5 },
      metrics = fits and { ttft_ms = at * 10, tpot_ms = at, a1 = 1, a2 = 1, a3 = 1, a4 = 1,
        a5 = 1, a6 = 1 } or {} })
  end
  amalgam.write_file(dir .. "/shown/e98_x/m/0123.jsonl", table.concat(lines, "\n") .. "\n")
  local status, said = shown("--metric", "ttft", "--metric", "tp")
  test.equal(status, 0)
  test.equal(said, [[
precision  version  status     ttft_ms  tpot_ms
W4         0123     predicted  10       1
W8         0123     predicted  20       2
W16        0123     oom        -        -        too large]])
  said = select(2, shown())
  test.contains(said, "not shown (--metric NAME): tpot_ms ttft_ms")
  said = select(2, shown("--only", "precision=W8", "--only", "n=5", "--json"))
  test.equal(amalgam.json_decode(said).metrics.ttft_ms, 20)
  status, said = shown("--only", "precision=W3")
  test.equal(status, 2)
  test.contains(said, "none of the 3 rows")
  test.equal(select(2, shown("--version", "9")):find("none of the 3 rows") ~= nil, true)
  test.contains(select(2, shown("--metric", "ttftt")), "the nearest is 'ttft_ms'")
  test.contains(select(2, shown("--only", "precision")), "is not KEY=VALUE")
end)

-- --- report --------------------------------------------------------------------------------------

test.case("a ratio of measurements counts those whose rows are of two versions", function()
  local function row(p, model, version, origin)
    return { experiment = "e10_x", status = "ok", time = "1", version = version, origin = origin,
      definition = "d", key = { model = model, p = p }, metrics = { x = p == "4" and 3 or 2 } }
  end
  local function across(below, origin)
    local data = report.data({ row("4", "a", "2", origin), row("16", "a", below, origin),
      row("4", "b", "2", origin), row("16", "b", "2", origin) }, { version = "2" })
    local found, _, n = data:ratios("e10", "model", { p = "4" }, { p = "16" }, "x")
    test.equal(#found, 2)
    test.near(found[1], 1.5, 0)
    return n
  end
  test.equal(across("1", "measured"), 1)
  test.equal(across("2", "measured"), 0)
  test.equal(across("1", "predicted"), 0)
end)

test.case("what lengths make of a format's gain is computed from steps of models", function()
  local lengths = require("lengths")
  local function row(model, precision, prefill_us, b16_us)
    return { experiment = "e06_steps", version = "1", time = "1", machine = "m", point = model
      .. precision, definition = "d", status = "ok", origin = "measured",
      key = { gpu = "h200", tp = 1, device = "cuda", model = model, precision = precision },
      metrics = { prefill_us = prefill_us, prefill_tokens = 1000, b16_us = b16_us } }
  end
  -- A prompt token takes 10 us in 16 bits, an answer token 100; in formats 5 and 100, or 20 and 25.
  local rows = { row("Qwen3-8B", "W16A16KV16", 10000, 1600), row("Qwen3-14B", "W16A16KV16", 1, 1) }
  for _, precision in ipairs(lengths.formats) do
    local short = precision == "W4A16KV8"
    rows[#rows + 1] = row("Qwen3-8B", precision, short and 20000 or 5000, short and 400 or 1600)
  end
  local data = report.data(rows, { version = "1" })
  test.equal(table.concat(lengths.models(data, 16), " "), "Qwen3-8B") -- the other lacks formats
  test.equal(#lengths.models(data, 64), 0)
  test.equal(lengths.gain(data, "W4A16KV8", 16, 0), 4)
  test.equal(lengths.gain(data, "W4A16KV8", 16, math.huge), 0.5)
  test.equal(lengths.gain(data, "W8A8KV8", 16, 10), 200 / 150)
  test.equal(lengths.gain(data, "W8A8KV8", 64, 10), nil)
  -- 10 r + 100 = 20 r + 25 at r = 7.5; 5 r + 100 = 20 r + 25 at 5.
  local even = lengths.even(data, "W16A16KV16", "W4A16KV8", 16)
  test.equal(even >= 7.5 and even < 7.6, true)
  even = lengths.even(data, "W8A8KV8", "W4A16KV8", 16)
  test.equal(even >= 5 and even < 5.1, true)
  test.equal(lengths.even(data, "W8A8KV8", "W16A16KV16", 16), 0) -- never slower
  test.equal(lengths.even(data, "W16A16KV16", "W8A8KV8", 16), nil)
end)

test.case("templates compute their numbers and say what has no rows", function()
  local rows = { { experiment = "e03_x", status = "ok", time = "1", version = "v",
    key = { model = "m" }, metrics = { tokens = 12.345 } } }
  local data = report.data(rows, { version = "v" })
  local env = { data = data, number = report.number }
  local text = report.fill("{{? e03 }}is {{ number(data:value('e03', {}, 'tokens')) }}{{/}}\n"
    .. "{{? e04 }}never{{/}}\n", "here", env)
  test.contains(text, "is 12.3")
  test.contains(text, "There are no rows of e04")
  test.equal(text:find("never"), nil)
  test.equal(report.fill("a {{?? e04 }}never{{/}}b {{?? e03 cuda }}no{{/}}", "here", env), "a b ")
  test.contains(report.fill("{{? e03 cuda }}never{{/}}", "here", env), "run e03 --device cuda")
  local ok, err = pcall(report.fill, "{{ nothing() }}", "here", env)
  test.equal(ok, false)
  test.contains(err.message, "{{ nothing() }}")
end)

test.case("rows of another GPU are in no mean of the paper, and are said to be left out", function()
  local function row(gpu, shape, x, time)
    return { experiment = "e07_linear", status = "ok", origin = "measured", version = "1",
      definition = "d", time = time, machine = gpu, provenance = { gpu = { name = gpu } },
      key = { device = "cuda", variant = "best", precision = "W4A16", dtype = "fp16", shape = shape,
        gpu = gpu }, metrics = { m1_speedup = x } }
  end
  local ours = { row("NVIDIA H200", "a", 2, "1"), row("NVIDIA H200", "b", 8, "1") }
  local function speedup(rows)
    local data = report.data(rows, { version = "1" })
    return report.linear_speedup(data, "W4A16", "fp16", 1), data.others
  end
  test.near(speedup(ours), 4, 1e-12)
  ours[3] = row("NVIDIA A100-SXM4-80GB", "a", 100, "2")
  ours[4] = row("NVIDIA A100-SXM4-80GB", "c", 100, "2")
  local mean, others = speedup(ours)
  test.near(mean, 4, 1e-12)
  test.equal(others["NVIDIA A100-SXM4-80GB"], 2)
  ours[4].provenance.gpu.name = "NVIDIA H200" -- the twin
  test.equal(speedup(ours) > 4, true)
end)

--- Rows of one version, or two, by two GPUs of a kind are told from those of one GPU alone.
test.case("GPUs of one kind are told apart by their UUIDs", function()
  local library = require("lib_rows")
  local function row(version, uuid, precision, x)
    return { experiment = "e10_x", status = "ok", origin = "measured", version = version,
      time = "1", definition = "d", machine = "m", provenance = { gpu = { name = "NVIDIA H200",
        uuid = uuid .. "-0000-1111" } }, metrics = { tokens_per_s = x, step_us = x },
      key = { device = "cuda", model = "a", precision = precision } }
  end
  local rows = { row("1", "GPU-aaaaaaaa", "W4", 3), row("1", "GPU-bbbbbbbb", "W16", 2) }
  local function told()
    local data = report.data(rows, { version = "1" })
    local text = report.fill("{{ gain('e10', 'model', {precision='W4'}, {precision='W16'}, "
      .. "'tokens_per_s') }}", "here", report.environment(data))
    data.used = {}
    data:select("e10")
    return text, report.rows_line(data.used)
  end
  local text, caption = told()
  test.equal(text, "1.50 (1; 1 across GPUs)")
  test.equal(caption, " Rows: e10 measured on NVIDIA H200 at `1` (2 GPUs).")
  rows[2].version = "2"
  text, caption = told()
  test.equal(text, "1.50 (1; 1 across commits)")
  test.equal(caption, " Rows: e10 measured on NVIDIA H200 at `1`, `2`.")
  rows[2] = row("1", "GPU-aaaaaaaa", "W16", 2) -- the twin
  text, caption = told()
  test.equal(text, "1.50 (1)")
  test.equal(caption, " Rows: e10 measured on NVIDIA H200 at `1`.")
  test.equal(library.gpu_id(row("1", "", "W4", 1)), nil)

  rows[3] = row("1", "GPU-bbbbbbbb", "W4", 4) -- again, there
  local _, n, moved = report.repeated(report.data(rows, { version = "1" }), "e10")
  test.equal(n, 1)
  test.equal(moved, 1)

  local function stored(name, list)
    local lines = {}
    for i, r in ipairs(list) do lines[i] = amalgam.json_encode(r) end
    local path = ("%s/gpus/e10_x/m/%s.jsonl"):format(dir, name)
    amalgam.write_file(path, table.concat(lines, "\n") .. "\n")
    return path
  end
  local base, one = stored("aa", rows), stored("bb", { rows[1], rows[2] })
  local note = "several of a kind, whose differences are in the ratios: GPU-aaaaaaaa, "
    .. "GPU-bbbbbbbb in BASE, GPU-aaaaaaaa in HEAD"
  test.contains(select(2, compared(base, one)), note)
  test.contains(select(2, compared(base, one, "--json")), '"gpus":[{"base":["GPU-aaaaaaaa"')
  test.equal(select(2, compared(one, one)):find("several of a kind"), nil)
  local function shown(version)
    return select(2, test.captured(function()
      return require("lib_table").main({ "e10", "--results", dir .. "/gpus", "--version",
        version })
    end))
  end
  test.contains(shown("aa"), "gpu_uuid")
  test.contains(shown("aa"), "GPU-bbbbbbbb")
  test.equal(shown("bb"):find("GPU-", 1, true), nil)
end)

test.case("what a repetition differs by is that of one version and one point", function()
  local function row(version, model, us, more)
    return { experiment = "e06_steps", status = "ok", origin = "measured", version = version,
      definition = "d", time = "1", machine = "m", provenance = { gpu = { name = "NVIDIA H200" } },
      key = { device = more or "cuda", model = model },
      metrics = { b1_us = us, b1_roofline_us = us * us, read_gb_per_s = us, b16_us = 7 } }
  end
  local rows = { row("1", "A", 100), row("1", "A", 110), row("1", "B", 100), row("2", "B", 200),
    row("1", "C", 1, "sim"), row("1", "C", 2, "sim") }
  local ratios, n = report.repeated(report.data(rows, { version = "1" }), "e06")
  test.equal(n, 1)
  table.sort(ratios)
  test.equal(#ratios, 2) -- of b16_us and b1_us: ceilings are none of ours
  test.equal(ratios[1], 1.0)
  test.near(ratios[2], 1.1, 1e-12)
  rows[4].version = "1" -- the twin
  test.equal(select(2, report.repeated(report.data(rows, { version = "1" }), "e06")), 2)
end)

test.case("report takes the newest row of the present version", function()
  local function row(version, time, x)
    return { experiment = "e03", status = "ok", time = time, version = version, key = { m = 1 },
      metrics = { x = x } }
  end
  local data = report.data({ row("old", "3", 1), row("new", "1", 2), row("new", "2", 3) },
    { version = "new" })
  test.equal(data:value("e03", {}, "x"), 3)
  data = report.data({ row("old", "3", 1), row("older", "1", 2) }, { version = "new" })
  test.equal(data:value("e03", {}, "x"), 1)
end)

test.case("report takes the newest definition of a point, however files are ordered", function()
  local function row(time, x, more)
    return { experiment = "e03", status = "ok", time = time, version = time,
      key = { m = 1, more = more }, metrics = { x = x } }
  end
  local before, after = row("1", 1), row("2", 2, "part")
  for _, rows in ipairs({ { before, after }, { after, before } }) do
    test.equal(report.data(rows, { version = "3" }):value("e03", { m = 1 }, "x"), 2)
  end
  -- The twin: were the order that of the list, the second list would give the old one.
  after.time = "0"
  test.equal(report.data({ before, after }, { version = "3" }):value("e03", { m = 1 }, "x"), 1)
end)

test.case("a device that is not built is refused before it leaves rows", function()
  local code, said = run(write((HEAD .. BODY .. RUN):gsub("e90_toy", "e90_nodev")), "device",
    "--device", "tpu")
  test.equal(code, 2)
  test.contains(said, "--device tpu: this build has ")
  test.equal(#amalgam.rows(file_of("device", "e90_nodev")), 0)
end)

test.case("of two definitions with another fixed fact only the later one counts", function()
  local function row(time, replays, x)
    return { experiment = "e07_linear", status = "ok", time = time, version = time,
      key = { variant = "best", precision = "W4A16", dtype = "fp16", shape = "4096x4096",
        device = "cuda", gpu = "g", replays = replays }, metrics = { x = x } }
  end
  local data = report.data({ row("1", 7, 1), row("2", 5, 2) }, { version = "3" })
  test.equal(#data:values("e07", {}, "x"), 1)
  test.equal(data:value("e07", {}, "x"), 2)
  -- The twin: another value of an axis is another point.
  local other = row("2", 5, 2)
  other.key.shape = "6144x4096"
  test.equal(#report.data({ row("1", 7, 1), other }, { version = "3" }):values("e07", {}, "x"), 2)
end)

--- What `amalgam report` says of these rows, and its paper.
local function reported(rows)
  local library, out = require("lib_rows"), dir .. "/partly"
  local read = library.read
  library.read = function() return rows, {} end
  local ok, code, said = pcall(test.captured, function()
    return report.main({ "--no-figures", "--results", out, "--out", out })
  end)
  library.read = read
  return ok and code, ok and said or code, ok and amalgam.read_file(out .. "/PAPER.md")
end

test.case("a paper is made of whatever experiments have rows", function()
  local all = require("lib_rows").read(identity.root .. "/results")
  local names, seen = {}, {}
  for _, row in ipairs(all) do
    if not seen[row.experiment] then names[#names + 1] = row.experiment end
    seen[row.experiment] = true
  end
  test.equal(#names >= 14, true)
  for _, name in ipairs(names) do
    local others, one = {}, {}
    for _, row in ipairs(all) do
      if row.experiment ~= name then
        others[#others + 1] = row
      elseif #one == 0 and row.status == "ok" then
        one[1] = row
      end
    end
    local code, said, paper = reported(others)
    test.equal(code, 0, name .. ": " .. tostring(said))
    test.contains(paper, name:sub(1, 3))
    test.contains(said, "no rows for it of ")
    code, said = reported(one)
    test.equal(code, 0, name .. " alone: " .. tostring(said))
  end
end)

test.case("the paper shows every table and figure, in the order of their numbers", function()
  local paper = amalgam.read_file(identity.root .. "/plots/paper.md")
  local last, files = { fig = 0, tab = 0 }, { fig = 0, tab = 0 }
  for kind, number in paper:gmatch('show%("(%a%a%a)(%d%d)_[%w_]+"%)') do
    test.equal(tonumber(number), last[kind] + 1, kind)
    last[kind] = last[kind] + 1
  end
  for _, file in ipairs(amalgam.list(identity.root .. "/plots")) do
    local kind = file:match("^(%a%a%a)%d%d_[%w_]+%.lua$")
    if kind then files[kind] = files[kind] + 1 end
  end
  test.equal(last.fig, files.fig)
  test.equal(last.tab, files.tab)
end)

test.case("an option of serve that is misspelt is placed in the experiment", function()
  local path = write(HEAD .. BODY .. [[
  run = function(engine)
    return engine.serve { model = "x", devise = "sim" }
  end,
}
]])
  local code, said = test.captured(function()
    return runner.main({ path, "--results", dir .. "/misspelt" })
  end)
  test.equal(code, 2)
  local line = select(2, amalgam.read_file(path):match("^(.-)devise"):gsub("\n", "")) + 1
  test.contains(said, ("%s:%d: serve: unknown key 'devise'"):format(path, line))
end)

test.case("figures are drawn into a folder of any name", function()
  local out = dir .. [[/it's "$HOME" `a`]]
  local rows = identity.root .. "/results/e02_serving_latency"
  os.execute(("mkdir -p %s"):format(experiment.quoted(out .. "/results")))
  os.execute(("ln -s %s %s"):format(experiment.quoted(rows), experiment.quoted(out .. "/results/")))
  local code, text = test.captured(function()
    return report.main({ "--results", out .. "/results", "--out", out })
  end)
  test.equal(code, 0, text)
  test.contains(amalgam.read_file(out .. "/plots/out/fig03_latency_rate.svg"), "Qwen2.5-32B")
end)

test.case("a figure that could not be written whole is said and is no figure", function()
  local out = dir .. "/cut"
  os.execute(("mkdir -p %s/results && ln -s %s/results/e02_serving_latency %s/results/"):format(out,
    experiment.quoted(identity.root), out))
  -- Files of 60 kB at most, which the TSV and PAPER.md are and fig03 is not; a write beyond fails.
  local good = os.execute(("trap '' XFSZ; ulimit -f 120; %s report --results %s/results --out %s "
    .. ">%s/said 2>&1"):format(binary, out, out, out))
  test.equal(good, nil)
  test.contains(amalgam.read_file(out .. "/said"), "fig03_latency_rate: svg was cut off")
  test.contains(amalgam.read_file(out .. "/PAPER.md"), "was not drawn (svg was cut off)")
  test.equal(io.open(out .. "/plots/out/fig03_latency_rate.svg"), nil)
  -- Series without rows, of which gnuplot warns, are not the reason.
  os.execute(("rm -r %s/results; %s run e02 --quick --results %s/results >/dev/null 2>&1; "
    .. "trap '' XFSZ; ulimit -f 40; %s report --results %s/results --out %s >%s/said 2>&1"):format(
    out, binary, out, binary, out, out, out))
  test.contains(amalgam.read_file(out .. "/said"), "fig03_latency_rate: svg was cut off")
end)

test.case("the experiment of HACKING.md runs as it is written", function()
  local text = amalgam.read_file(identity.root .. "/HACKING.md"):match("```lua\n(.-)```")
  local path = dir .. "/e20_chunks.lua"
  amalgam.write_file(path, text)
  local code, said = run(path, "hacking")
  test.equal(code, 0)
  test.contains(said, "4 ok, 0 oom, 0 skipped, 0 failed")
  local rows = amalgam.rows(file_of("hacking", "e20_chunks"))
  test.equal(#rows, 4)
end)

test.case("the table of HACKING.md is made as it is written, of the experiment's rows", function()
  local text = amalgam.read_file(identity.root .. "/HACKING.md"):match("```lua\n.-```lua\n(.-)```")
  local rows = amalgam.rows(file_of("hacking", "e20_chunks"))
  local columns, cells = load(text)().build(report.data(rows, { version = "v" }))
  test.equal(#columns, 3)
  test.equal(#cells, 2)
  for _, row in ipairs(cells) do
    test.equal(#row, 3)
    test.equal(tonumber(row[3]) > 0, true, row[3])
  end
end)

--- An experiment of the suite, whose functions take any table for the module `amalgam`.
local function suite(name)
  return experiment.load(identity.root .. "/experiments/" .. name .. ".lua").spec
end

test.case("e13 finds the rate from which on limits do not hold", function()
  local spec, ran = suite("e13_goodput"), 0
  local function rate(share, knee)
    local engine = { serve = function(o)
      test.equal(o.limits.ttft_ms, 500)
      test.equal(o.limits.tpot_ms, 30)
      ran = ran + 1
      local good = o.workload.rate_per_s <= knee and 700 or 660
      return { status = "ok", origin = "predicted",
        metrics = { goodput_per_s = good / 20, duration_s = 20 } }
    end }
    local point = { model = "m", precision = "p", device = "sim", gpu = "g", tp = 2, seed = 1,
      n_requests = 700, workload = "sharegpt", ttft_ms = 500, tpot_ms = 30, share = share }
    local m = spec.run(engine, point, { status = "ok", rate = 100 }).metrics
    test.equal(m.rate_within_limits_per_s_per_gpu, m.rate_within_limits_per_s / 2)
    return m.rate_within_limits_per_s, m.good_share
  end
  local found, share = rate(0.99, 37)
  test.equal(found <= 37 and found * 2 ^ (1 / 16) > 37, true, found)
  test.equal(share, 1.0)
  test.equal(ran <= 9, true, ran)
  test.equal(rate(0.99, 1000), 100.0) -- what is sustained is the end
  test.equal(rate(0.94, 37), 100.0) -- 660 of 700 are enough
  found, share = rate(0.99, 1) -- not even a 32nd
  test.equal(found, 0)
  test.near(share, 660 / 700, 1e-12)
end)

test.case("e14 narrows the halves that cost least, by a text that does not judge", function()
  local spec = suite("e14_kv_layers")
  local cost = { 5, 1, 4, 2, 9, 3 } -- K and V of three layers
  local texts = {}
  local engine = setmetatable({
    model = function() return { layers = 3 } end,
    evaluate = function(o)
      texts[o.text.seed] = (texts[o.text.seed] or 0) + 1
      local kl, h = 0, 0
      for k, v in o.precision:gmatch("K(%d+)V(%d+)") do
        kl = kl + (k == "4" and cost[h + 1] or 0) + (v == "4" and cost[h + 2] or 0)
        h = h + 2
      end
      test.equal(h, 6)
      return { status = "ok", metrics = { kl_nats = kl } }
    end,
  }, { __index = amalgam })
  local fixed = { model = "tiny", device = "cpu", text_seed = 0, rank_seed = 1 }
  local base = spec.shared.run(engine, fixed)
  test.equal(table.concat(base.order, " "), "2 4 6 3 1 5")
  local function point(choice, n)
    local key = { choice = choice, n = n }
    for name, value in pairs(fixed) do key[name] = value end
    return spec.run(engine, key, base)
  end
  test.equal(texts[0], nil)
  test.equal(point("alone", 5).metrics.kl_nats, 9)
  test.equal(point("least", 3).metrics.kl_nats, 1 + 2 + 3)
  test.equal(point("most", 2).metrics.kl_nats, 9 + 5)
  test.equal(point("least", 3).metrics.kv_bits, 6.0)
  test.equal(point("most", 2).precision, "W16A16KV[K4V8,8,K4V8]")
  test.equal(texts[1], 6)
end)

test.case("experiments of the suite load, and their quick points are few", function()
  for _, file in ipairs(amalgam.list(identity.root .. "/experiments")) do
    if file:find("^e%d%d_") then
      local loaded = experiment.load(identity.root .. "/experiments/" .. file)
      test.equal(loaded.spec.id .. ".lua", file)
      local quick = #experiment.expand(loaded, { quick = true })
      test.equal(quick > 0 and quick <= 40, true, file .. " quick points")
    end
  end
end)

test.case("foreign servers become command lines with nothing left to replace", function()
  local servers = require("lib_servers")
  test.equal(#servers.names() >= 5, true)
  for _, name in ipairs(servers.names()) do
    local server = servers.load(name)
    test.equal(server.name, name)
    for _, precision in ipairs(servers.precisions(server)) do
      test.equal(amalgam.precision(precision), precision, name)
      local start, measure = servers.commands(server, { model = "a model", precision = precision,
        tp = 2, ctx = 4096, folder = dir })
      test.equal(start:find("[{}]"), nil, start)
      test.contains(start, "'a model'")
      test.contains(measure, "--url " .. server.url)
    end
  end
  local ok, err = pcall(servers.commands, servers.load("vllm"), { precision = "W4A8KV4" })
  test.equal(ok, false)
  test.contains(err.message, "not set up for W4A8KV4")
end)

test.finish()
