--- Table 19: what the TurboMind paper claims, and what stands here beside it.
---
--- "abstract": stated in the abstract of arXiv 2508.15601. "quoted": a figure that public notes
--- quote from the paper, not checked against it.
local labels = require("labels")
local peers = require("peers")
local stats = require("lib_stats")

local NONE = "no rows"

--- Ratios of a metric over all models of each GPU.
local function ratios(data, name, filter, base, metric)
  local out = {}
  for _, gpu in ipairs(data:distinct(name, "gpu")) do
    local a, b = { gpu = gpu }, { gpu = gpu }
    for k, v in pairs(filter) do a[k] = v end
    for k, v in pairs(base) do b[k] = v end
    table.move((data:ratios(name, "model", a, b, metric)), 1, 999, #out + 1, out)
  end
  return out
end

---@return string[] cells: what is here, how it was found, how it lies to the claim
local function throughput(data)
  local found = ratios(data, "e03", { baseline = "none", precision = "W4A16KV8" },
    { baseline = "dequant_first", precision = "W4A16KV8" }, "output_tokens_per_s_per_gpu")
  if #found == 0 then return { NONE } end
  local mean, most = 100 * (stats.geomean(found) - 1), 100 * (math.max(table.unpack(found)) - 1)
  return { ("+%.0f %% on average, +%.0f %% at most, W4A16KV8 over the same engine that expands "
    .. "weights to 16 bits first"):format(mean, most), "predicted",
    ("%+.0f and %+.0f points; another baseline"):format(mean - 58, most - 156) }
end

--- The same of the models that were served on a GPU in both modes.
local function throughput_measured(data)
  local found, which = data:ratios("e03", "model",
    { device = "cuda", baseline = "none", precision = "W4A16KV8" },
    { device = "cuda", baseline = "dequant_first", precision = "W4A16KV8" },
    "output_tokens_per_s_per_gpu")
  if #found == 0 then return { NONE } end
  return { ("%+.0f %%: %s on one H200"):format(100 * (stats.geomean(found) - 1),
    table.concat(which, ", ")), "measured", "-" }
end

local function latency(data)
  local found = ratios(data, "e02", { load = 0.75, precision = "W4A16KV8" },
    { load = 0.75, precision = labels.base }, "e2e_p50_ms")
  if #found == 0 then return { NONE } end
  local mean, most = 100 * (1 - stats.geomean(found)), 100 * (1 - math.min(table.unpack(found)))
  return { ("-%.0f %% on average, -%.0f %% at most: median end to end, W4A16KV8 over 16 bits at "
    .. "the same rate"):format(mean, most), "predicted",
    ("%+.0f and %+.0f points; another baseline"):format(30 - mean, 61 - most) }
end

--- On how many GPUs the P99 of the first token, at the same rate, is longer with W4A16KV8 than in
--- 16 bits (geometric mean over the models), and of how many.
local function waits_longer(data)
  local longer, n = 0, 0
  for _, gpu in ipairs(data:distinct("e02", "gpu")) do
    local found = data:ratios("e02", "model", { gpu = gpu, load = 0.75, precision = "W4A16KV8" },
      { gpu = gpu, load = 0.75, precision = labels.base }, "ttft_p99_ms")
    n = n + (#found > 0 and 1 or 0)
    longer = longer + (#found > 0 and stats.geomean(found) > 1 and 1 or 0)
  end
  return longer, n
end

local function everywhere(data)
  local found, slower = ratios(data, "e03", { baseline = "none", precision = "W4A16KV8" },
    { baseline = "none", precision = labels.base }, "output_tokens_per_s_per_gpu"), 0
  if #found == 0 then return { NONE } end
  for _, r in ipairs(found) do slower = slower + (r <= 1 and 1 or 0) end
  local measured, gain = data:ratios("e10", "model", { device = "cuda", precision = "W4A16KV8" },
    { device = "cuda", precision = labels.base }, "output_tokens_per_s"), 0
  for _, r in ipairs(measured) do gain = gain + (r > 1 and 1 or 0) end
  local models, served = {}, 0
  for _, row in ipairs(data:select("e10", { device = "cuda" })) do
    served = served + (models[row.key.model] and 0 or 1)
    models[row.key.model] = true
  end
  local holds = slower == 0 and gain == #measured
  local longer, n = waits_longer(data)
  local agrees = "agrees in throughput"
  if longer > 0 then
    agrees = ("%s; the P99 wait for the first token grows on %d of %d GPUs"):format(agrees, longer,
      n)
  end
  return { ("W4A16KV8 gains over 16 bits in %d of %d pairs of model and GPU; on one H200 in %d of "
    .. "%d models that fit in both, of %d served"):format(#found - slower, #found, gain,
    #measured, served),
    "predicted; H200 measured", holds and agrees or "does not hold everywhere" }
end

local function gpus(data)
  local n, on = #data:distinct("e03", "gpu"), {}
  for _, row in ipairs(data:select("e10", { device = "cuda" })) do on[row.key.gpu] = true end
  local measured = 0
  for _ in pairs(on) do measured = measured + 1 end
  return { ("%d GPUs of three architectures predicted, %d measured"):format(n, measured),
    "predicted; one measured", "not reproduced: no other GPU was at hand" }
end

--- Our W4A16 kernels over a quoted line of speed-ups, by the rows of x.
local function over_line(data, report, line)
  local found = {}
  for i, m in ipairs(peers.rows_x) do
    local x = report.linear_speedup(data, "W4A16", "fp16", m)
    if x then found[#found + 1] = x / line[i] end
  end
  if #found == 0 then return nil end
  return 100 * (stats.geomean(found) - 1), 100 * (math.max(table.unpack(found)) - 1),
    100 * (math.min(table.unpack(found)) - 1)
end

local function marlin(data, report)
  local mean, most, least = over_line(data, report, peers.linear.marlin_w4a16)
  if not mean then return { NONE } end
  return { ("%+.0f %% over Marlin of 2024 on average over 1 to 4096 rows, %+.0f to %+.0f %%")
    :format(mean, least, most), "measured; Marlin once, on another H200",
    ("%+.0f and %+.0f points; another Marlin, and it is made for Ampere"):format(mean - 19.2,
      most - 25.5) }
end

local function turbomind(data, report)
  local mean, most, least = over_line(data, report, peers.linear.turbomind_w4a16)
  if not mean then return { NONE } end
  return { ("%+.0f %% over TurboMind's on average over 1 to 4096 rows, %+.0f to %+.0f %%"):format(
    mean, least, most), "measured; TurboMind once, on another H200", "-" }
end

local function short_batches(data, report)
  local lo, hi = math.huge, 0
  for _, m in ipairs({ 1, 2, 4, 8, 16 }) do
    local x = report.linear_speedup(data, "W4A16", "fp16", m)
    if x then lo, hi = math.min(lo, x), math.max(hi, x) end
  end
  if hi == 0 then return { NONE } end
  return { ("%+.0f to %+.0f %% over cuBLAS, means of six matrices"):format(100 * (lo - 1),
    100 * (hi - 1)), "measured",
    ("%+.0f and %+.0f points"):format(100 * (lo - 1) - 134, 100 * (hi - 1) - 220) }
end

local function bandwidth(data, report)
  local eight, four = report.decode_share(data, "KV8"), report.decode_share(data, "KV4")
  if not eight or not four then return { NONE } end
  return { ("%.0f %% with KV8 and %.0f %% with KV4 of a plain read, best shapes"):format(eight,
    four), "measured", ("%+.0f and %+.0f points"):format(eight - 93, four - 93) }
end

local function overhead(data, report)
  local sixteen, eight = report.decode_share(data, "KV16"), report.decode_share(data, "KV8")
  if not sixteen or not eight then return { NONE } end
  local more = 100 * (sixteen / eight - 1)
  return { ("%+.0f %% time a byte with KV8 over KV16, best shapes; instructions not counted")
    :format(more), "measured", ("%+.0f points"):format(more - 3) }
end

local function operators(data)
  local found = {}
  for shape, us in pairs(peers.decode_turbomind) do
    local batch, ctx = shape:match("(%d+)x(%d+)")
    for _, kv in ipairs({ "KV16", "KV8", "KV4" }) do
      local x = data:value("e08", { variant = "best", phase = "decode", kv = kv, dtype = "fp16" },
        ("b%s_c%s_us"):format(batch, ctx))
      if x then found[#found + 1] = x / us[kv] end
    end
  end
  if #found == 0 then return { NONE } end
  return { ("vLLM not run; decode attention %+.0f %% time over TurboMind's, mean of %d shapes and "
    .. "caches"):format(100 * (stats.geomean(found) - 1), #found),
    "measured; TurboMind once, on another H200", "another comparison" }
end

local function not_run(server)
  return function()
    return { "not run", "-", ("not possible here; baselines/servers/%s.lua"):format(server) }
  end
end

local CLAIMS = {
  { "throughput over mixed-precision frameworks: +58 % on average, +156 % at most", "abstract",
    throughput },
  { "(the same, where it was measured)", "ours", throughput_measured },
  { "serving latency: -30 % on average, -61 % at most", "abstract", latency },
  { "16 models, gains in all configurations", "abstract", everywhere },
  { "four GPU architectures", "abstract", gpus },
  { "4-bit linear layers over vLLM with MARLIN: +19.2 % on average, +25.5 % at most", "quoted",
    marlin },
  { "(the same, over TurboMind's own kernels)", "ours", turbomind },
  { "4-bit linear layers over 16 bits, 1 to 16 rows: +134 to +220 %", "quoted", short_batches },
  { "attention over a low-bit cache uses 93 % of the bandwidth", "quoted", bandwidth },
  { "dequantising in attention: 64 % more instructions, 3 % more time", "quoted", overhead },
  { "decode operators: -7.6 % time over vLLM with MARLIN", "quoted", operators },
  { "end to end over vLLM with MARLIN: 13 to 31 %", "quoted", not_run("vllm") },
  { "over TensorRT-LLM: +118.9 % throughput, -52.2 % TTFT", "quoted", not_run("trtllm") },
}

return {
  experiment = "e02, e03, e07 or e08",
  title = "Claims of the TurboMind paper",
  caption = "Claims of the TurboMind paper and what stands here beside them. Source: its abstract, "
    .. "or \"quoted\", by notes of others, unchecked. Difference: here less there.",
  build = function(data, report)
    local rows = {}
    for _, claim in ipairs(CLAIMS) do
      local cells = claim[3](data, report)
      local difference = (cells[3] or "-"):gsub("%-0 ", "+0 ") -- the sign of nothing
      rows[#rows + 1] = { claim[1], claim[2], cells[1], cells[2] or "-", difference }
    end
    return { "claim", "source", "here", "how", "difference" }, rows
  end,
}
