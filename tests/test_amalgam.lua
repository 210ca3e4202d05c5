--- What experiments call: serving in real time and in a closed loop, mixtures, accuracy, traces.

local amalgam = require("amalgam")
local experiment = require("lib_experiment")
local test = require("lib_test")

local dir = test.folder()
local binary = experiment.quoted(os.getenv("AMALGAM_BINARY") or "build/amalgam")
local tiny = amalgam.identity().root .. "/workloads/tiny"

--- Serve requests of `prompt` and `output` tokens; options over those of the tiny checkpoint.
local function served(options, workload)
  workload.preset = "fixed"
  workload.prompt = workload.prompt or { fixed = 8 }
  workload.output = workload.output or { fixed = 4 }
  local o = { model = tiny, precision = "W16", device = "cpu", threads = 1, ctx_max = 64,
    workload = workload, scheduler = { max_seqs = 8, token_budget = 64 } }
  for key, value in pairs(options) do o[key] = value end
  local result = amalgam.serve(o)
  test.equal(result.status, "ok", result.reason)
  return result.metrics
end

test.case("on a device with a clock of its own requests arrive when they are due", function()
  local m = served({}, { n_requests = 6, arrival = "constant", rate_per_s = 20 })
  test.equal(m.n_completed, 6)
  test.equal(m.output_tokens, 24)
  test.equal(m.duration_s >= 5 / 20, true, "five gaps of 50 ms")
  test.equal(m.lag_p99_ms >= 0, true)
  test.equal(m.ttft_p50_ms <= m.e2e_p50_ms, true)
end)

test.case("users of a closed loop wait for their answers", function()
  for users = 3, 5, 2 do
    local m = served({ device = "null" }, { n_requests = 15, arrival = "closed", users = users })
    test.equal(m.n_completed, 15)
    test.equal(m.max_concurrency, users)
  end
  -- A user whose request is refused sends the next one.
  local m = served({ device = "null" }, { n_requests = 40, arrival = "closed", users = 4,
    prompt = { lo = 8, hi = 100 } })
  test.equal(m.n_completed + m.n_refused, 40)
  test.equal(m.n_refused > 0 and m.n_completed > 0, true)
end)

test.case("a mixture reads more experts for more users", function()
  local function tpot(users, precision)
    return served({ model = "Qwen3-30B-A3B", weights = "synthetic", precision = precision,
      device = "sim", gpu = "h200" }, { n_requests = users }).tpot_mean_ms
  end
  local one, eight = tpot(1, "W16A16KV16"), tpot(8, "W16A16KV16")
  test.equal(eight > 2 * one, true, "eight tokens touch 52 experts of 128, one touches 8")
  test.equal(tpot(8, "W4A16KV16") < eight / 2, true, "their weights are most of what is read")
  test.equal(served({ model = "Qwen3-30B-A3B", weights = "synthetic", device = "null" },
    { n_requests = 8 }).n_completed, 8)
end)

test.case("prompts of the corpus share their prefixes, others are random", function()
  local workload = { n_requests = 12, prompt = { lo = 72, hi = 90 }, prefix = 64, n_prefixes = 2,
    contents = "corpus", output = { mu = 1.5, sigma = 0.5, min = 2, max = 8 } }
  local options = { ctx_max = 128, scheduler = { max_seqs = 2, token_budget = 128 } }
  local m = served(options, workload)
  test.equal(m.cached_tokens, 10 * 64, "all but the first two find a page")
  test.equal(m.output_tokens >= 24 and m.output_tokens <= 96, true)
  options.scheduler.prefix_cache = false
  test.equal(served(options, workload).cached_tokens, 0)
  workload.contents = "poetry"
  local ok, why = pcall(served, options, workload)
  test.equal(ok, false)
  test.contains(why, "contents = 'poetry' is neither 'random' nor 'corpus'")
end)

test.case("what does not fit or cannot run is an outcome, not an error", function()
  local function outcome(model, precision, gpu)
    local result = amalgam.serve({ model = model, weights = "synthetic", precision = precision,
      device = "sim", gpu = gpu, workload = { preset = "fixed", n_requests = 1 } })
    test.equal(result.metrics, nil)
    return result.status, result.reason
  end
  local status, why = outcome("Llama-3.1-70B", "W16A16KV16", "rtx4090")
  test.equal(status, "oom")
  test.contains(why, "Llama-3.1-70B W16A16KV16 tp 1: weights 131.4 GiB")
  status, why = outcome("Llama-3.1-8B", "WFP8AFP8KVFP8", "a100-80gb")
  test.equal(status, "skipped")
  test.contains(why, "FP8")
end)

test.case("a trace is replayed to the same batches, and one digit is seen", function()
  local path = dir .. "/trace.jsonl"
  assert(os.execute("mkdir -p " .. dir))
  served({ trace = path, device = "null" }, { n_requests = 20 })
  local function replayed()
    local pipe = assert(io.popen(("%s inspect trace %s 2>&1"):format(binary, path)))
    local said = pipe:read("a")
    return select(3, pipe:close()), said
  end
  local code, said = replayed()
  test.equal(code, 0, said)
  test.contains(said, " steps replayed, 0 batches differ")
  local text = amalgam.read_file(path)
  amalgam.write_file(path, (text:gsub('"hash":"(%x)', function(digit)
    return '"hash":"' .. (digit == "0" and "1" or "0")
  end, 1)))
  code, said = replayed()
  test.equal(code ~= 0, true)
  test.contains(said, "1 batches differ")
end)

local function evaluated(options)
  local o = { model = tiny, device = "cpu", threads = 1, window = 64, stride = 32 }
  for key, value in pairs(options) do o[key] = value end
  local result = amalgam.evaluate(o)
  test.equal(result.status, "ok", result.reason)
  return result.metrics
end

test.case("a checkpoint beside itself agrees in all, one of 4 bits does not", function()
  local same = evaluated({ text = { bytes = 500 }, against = tiny })
  test.equal(same.greedy_agreement, 1.0)
  test.equal(same.kl_nats, 0.0)
  test.equal(same.kl_nats_max, 0.0)
  test.equal(same.perplexity, same.reference_perplexity)
  local alone = evaluated({ text = { bytes = 500 } })
  test.near(alone.perplexity, same.perplexity, 1e-9)
  test.equal(alone.scored_tokens, same.scored_tokens)
  local four = evaluated({ text = { bytes = 500 }, against = tiny, precision = "W4A16KV4" })
  test.equal(four.reference_perplexity, same.reference_perplexity)
  test.equal(four.perplexity ~= same.perplexity, true)
  test.equal(four.greedy_agreement < 1 and four.kl_nats > 0, true)
  test.equal(four.kl_nats_max > four.kl_nats, true)
end)

test.case("the trained checkpoint answers what random weights do not", function()
  local tasks = { { kind = "arithmetic", n = 10 }, { kind = "recall", n = 1 } }
  local m = evaluated({ tasks = tasks })
  test.equal(m.arithmetic_n, 10)
  test.equal(m.recall_n, 1)
  test.equal(m.arithmetic_accuracy >= 0.8, true, "PAPER.md: 0.98 of 500")
  test.equal(m.recall_accuracy, 1.0)
  local random = evaluated({ tasks = tasks, weights = "synthetic" })
  test.equal(random.arithmetic_accuracy, 0.0)
  test.equal(random.recall_accuracy, 0.0)
  local ok, why = pcall(amalgam.evaluate, { model = tiny, tasks = { { kind = "poetry" } } })
  test.equal(ok, false)
  test.contains(why, "unknown task 'poetry'")
end)

test.case("models and data sheets are tables", function()
  local m = amalgam.model("Qwen3-8B")
  test.equal(m.layers, 36)
  test.equal(m.kv_heads * m.head_dim, 1024)
  test.near(m.parameters / 1e9, 8.191, 1e-3)
  local g = amalgam.gpu("h200")
  test.equal(g.sm, 90)
  test.equal(g.fp8_flops, 2 * g.f16_flops + 1e12, "1979 is no multiple of 989")
end)

test.finish()
