--- E4: what does a low-bit KV cache buy as the context grows?
---
--- Offline requests of one length: three quarters of the context are prompt, the rest (at most 2048
--- tokens) is output. Three times as many requests as the cache holds are served, so that the batch
--- is as large as memory allows for most of the run. Numbers are predicted by the
--- simulator; with `--device cuda` they are measured on the GPU at hand.

local CONTEXTS = { 1024, 2048, 4096, 8192, 16384, 32768, 65536, 131072 }

---@type Experiment
return {
  id = "e04_kv_precision",
  title = "KV capacity, batch and throughput by KV format against context length",
  question = "What does a low-bit KV cache buy as the context grows?",
  cost = "about 1 minute on 2 cores; --quick 5 s",
  axes = {
    { name = "gpu", values = { "rtx4090", "a100-80gb", "h100-sxm" } },
    { name = "model", values = { "Llama-3.1-8B", "Llama-2-7B", "Qwen2.5-32B" } },
    { name = "weight", values = { "W16A16", "W4A16" } },
    { name = "kv", values = { "KV16", "KV8", "KVFP8", "K8V4", "KV4" } },
    { name = "context", values = CONTEXTS },
  },
  fixed = { device = "sim", seed = 1, tp = 1, max_seqs = 512, baseline = "none" },
  quick = {
    gpu = { "h100-sxm" }, model = { "Llama-3.1-8B" }, weight = { "W4A16" },
    kv = { "KV16", "KV4" }, context = { 4096, 32768 },
  },
  jobs = "parallel",
  timeout_s = 120,
  run = function(amalgam, point)
    local precision = point.weight .. point.kv
    local limit = amalgam.model(point.model).ctx_max
    if point.context > limit then
      local why = ("%s reads at most %d tokens"):format(point.model, limit)
      return { status = "skipped", reason = why }
    end
    local options = {
      model = point.model, weights = "synthetic", precision = precision, device = point.device,
      gpu = point.gpu, tp = point.tp, ctx_max = point.context,
      scheduler = { max_seqs = point.max_seqs, prefix_cache = false },
    }
    local room = amalgam.capacity(options)
    if room.status ~= "ok" then return room end
    local batch_max = math.min(room.metrics.kv_tokens // point.context, point.max_seqs)
    local output = math.min(2048, point.context // 4)
    options.workload = {
      preset = "fixed", name = ("fixed_%d_%d"):format(point.context - output, output),
      n_requests = 3 * batch_max, seed = point.seed,
      prompt = { fixed = point.context - output }, output = { fixed = output },
    }
    local result = amalgam.serve(options)
    if result.status ~= "ok" then return result end
    local m = result.metrics
    return {
      status = "ok", origin = result.origin, precision = precision,
      metrics = {
        kv_tokens = m.kv_tokens, kv_bytes_per_token = m.kv_page_bytes / 64,
        batch_limit = batch_max, batch_mean = m.batch_mean,
        output_tokens_per_s = m.output_tokens_per_s,
        steady_output_tokens_per_s = m.steady_output_tokens_per_s,
        total_tokens_per_s = m.total_tokens_per_s, requests_per_s = m.requests_per_s,
        tpot_p50_ms = m.tpot_p50_ms, tpot_p99_ms = m.tpot_p99_ms,
        n_preemptions = m.n_preemptions, n_completed = m.n_completed,
      },
    }
  end,
}
