--- E5: does the engine that is simulated elsewhere also serve, and how fast is it here?
---
--- The tiny checkpoint answers requests that arrive by a Poisson process in real time on the cpu
--- device. Prompts are held-out text that begins in one of two ways, as system prompts do, which is
--- what a prefix cache saves. This is the only experiment whose numbers are clocked, so it
--- runs alone, each point several times. How late the load generator itself was is reported as
--- lag_p99_ms.

local serving = require("lib_serving")

---@type Experiment
return {
  id = "e05_real_serving",
  title = "Real serving of the tiny checkpoint on cpu (measured)",
  question = "How long do requests take when the engine really runs, by precision and baseline?",
  cost = "about 3 minutes on 2 cores, nothing else running; --quick 15 s",
  origin = "measured",
  axes = {
    { name = "repetition", values = { 1, 2, 3, 4, 5 } },
    { name = "rate_per_s", values = { 10, 20, 40 } },
    { name = "precision", values = { "W16A16KV16", "W4A16KV16", "W4A16KV4" } },
    { name = "baseline", values = { "none", "static_batching", "no_prefix_cache" } },
  },
  fixed = { model = "tiny", device = "cpu", workload = "short_chat", n_requests = 40, seed = 1 },
  quick = { repetition = { 1 }, rate_per_s = { 20 }, n_requests = { 10 } },
  where = function(point)
    return point.baseline == "none" or point.precision == "W16A16KV16"
  end,
  jobs = "alone",
  timeout_s = 120,
  run = function(amalgam, point)
    local result = amalgam.serve(serving.with_baseline({
      model = amalgam.identity().root .. "/workloads/tiny",
      precision = point.precision, device = point.device, ctx_max = 256,
      scheduler = { token_budget = 512, max_seqs = 32 },
      workload = {
        preset = "fixed", name = point.workload, contents = "corpus",
        n_requests = point.n_requests, seed = point.seed * 1000 + point.repetition,
        prompt = { lo = 136, hi = 192 }, prefix = 128, n_prefixes = 2,
        output = { mu = 3.0, sigma = 0.5, min = 4, max = 48 },
        arrival = "poisson", rate_per_s = point.rate_per_s,
      },
    }, point.baseline))
    if result.status ~= "ok" then return result end
    result.metrics = serving.kept(result.metrics)
    return result
  end,
}
