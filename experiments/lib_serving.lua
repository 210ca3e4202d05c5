--- What the serving experiments share: baselines, the choice of a tensor-parallel degree, and the
--- metrics that are kept of a run.

local M = {}

--- Room for this many KV tokens must be left when a degree is chosen, or hardly anything can be
--- batched: about 75 conversations of the sharegpt shape at a time.
M.KV_TOKENS_LEAST = 32768

--- The formats that serving is compared for: the weight, activation and cache widths that the fused
--- kernels cover, 16 bit first.
M.FORMATS = {
  "W16A16KV16", "W8A8KV8", "WFP8AFP8KVFP8", "WMXFP4A16KV8", "W4A16KV16", "W4A16KV8", "W4A16KV4",
}

M.MODELS = {
  "Llama-2-7B", "Llama-3.1-8B", "Llama-3.1-70B", "Qwen2.5-7B", "Qwen2.5-14B", "Qwen2.5-32B",
  "Qwen2.5-72B", "Qwen3-8B", "Qwen3-14B", "Qwen3-32B", "Qwen3-30B-A3B", "Qwen3-235B-A22B",
  "Mistral-7B-v0.3", "Mixtral-8x7B", "InternLM2.5-20B", "gpt-oss-120b",
}

M.GPUS = { "rtx4090", "l40s", "a100-80gb", "h100-sxm", "h200" }

--- Options with those of a baseline laid over them. "none" is the engine as it is.
---@param options table
---@param baseline string file name under baselines/
---@return table options the same table
function M.with_baseline(options, baseline)
  if baseline == "none" then return options end
  local function lay_over(to, from)
    for key, value in pairs(from) do
      if type(value) == "table" then
        to[key] = to[key] or {}
        lay_over(to[key], value)
      else
        to[key] = value
      end
    end
  end
  lay_over(options, require(baseline).options)
  return options
end

--- Smallest degree of 1, 2, 4, 8 on which weights, workspace and KV_TOKENS_LEAST fit.
---@param amalgam table
---@param point { model: string, gpu: string }
---@param precision string
---@return table capacity status "ok" with tp and metrics, or "oom"/"skipped" with the reason
function M.choose_tp(amalgam, point, precision)
  return amalgam.capacity {
    model = point.model, weights = "synthetic", precision = precision, device = "sim",
    gpu = point.gpu, ctx_max = M.KV_TOKENS_LEAST,
  }
end

-- Of a request metric these statistics are kept; the rest would triple the size of the rows.
local STATISTICS = { "p50_ms", "p90_ms", "p99_ms", "mean_ms" }
local LATENCIES = { "ttft", "tpot", "itl", "e2e", "queue" }
local NUMBERS = {
  "n_completed", "n_refused", "n_cancelled", "n_preemptions", "prompt_tokens", "output_tokens",
  "cached_tokens", "duration_s", "requests_per_s", "output_tokens_per_s", "total_tokens_per_s",
  "steady_output_tokens_per_s", "goodput_per_s", "mean_concurrency", "batch_mean", "steps",
  "kv_tokens", "kv_pages_peak", "weight_bytes", "step_mean_ms", "lag_p99_ms",
}

--- The part of a run's metrics that is stored.
---@param metrics table<string, number>
---@return table<string, number>
function M.kept(metrics)
  local out = {}
  for _, latency in ipairs(LATENCIES) do
    for _, statistic in ipairs(STATISTICS) do
      local name = latency .. "_" .. statistic
      out[name] = metrics[name]
    end
  end
  for _, name in ipairs(NUMBERS) do out[name] = metrics[name] end
  return out
end

--- Requests per second that a run sustains in its steady part, tails of a finite run left out.
---@param metrics table<string, number>
---@return number
function M.sustained_requests_per_s(metrics)
  return metrics.steady_output_tokens_per_s * metrics.n_completed / metrics.output_tokens
end

return M
