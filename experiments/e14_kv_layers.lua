--- E14: which layers' keys and values need their bits?
---
--- A KV format may be a list with one entry a layer, a question of which KVTuner (arXiv 2502.04420)
--- makes a search. Here each half of a layer's cache, keys or values, is first put into 4 bits
--- alone, everything else in 16: how far that moves the output from 16 bits is what the half costs.
--- Then n halves are in 4 bits and the others in 8: the n that cost least, or the n that cost most.
--- The order comes from a text of its own (`rank_seed`), so that the choice has not seen what
--- judges it. The cpu device defines what each format means.

--- The cache as a list: half h of `layers` layers has `bits(h)`; 1 is K of layer 0, 2 its V.
local function list_of(layers, bits)
  local items = {}
  for layer = 0, layers - 1 do
    items[layer + 1] = ("K%dV%d"):format(bits(2 * layer + 1), bits(2 * layer + 2))
  end
  return "KV[" .. table.concat(items, ",") .. "]"
end

local function one_alone(layers, half)
  return list_of(layers, function(h) return h == half and 4 or 16 end)
end

local function folder_of(amalgam, point)
  return amalgam.identity().root .. "/workloads/" .. point.model
end

--- The output in this cache beside that in 16 bits, over `bytes` of the text of a seed.
local function beside(amalgam, point, cache, seed, bytes)
  local folder = folder_of(amalgam, point)
  return amalgam.evaluate {
    model = folder, against = folder, precision = "W16A16" .. cache, device = point.device,
    threads = 1, window = point.window, stride = point.stride,
    text = { seed = seed, bytes = bytes },
  }
end

--- Halves by what each costs alone, the cheapest first: once for all points.
local function ranked(amalgam, point)
  local layers = amalgam.model(folder_of(amalgam, point)).layers
  local order, cost = {}, {}
  for half = 1, 2 * layers do
    local result = beside(amalgam, point, one_alone(layers, half), point.rank_seed,
      point.rank_bytes)
    if result.status ~= "ok" then return result end
    order[half], cost[half] = half, result.metrics.kl_nats
  end
  table.sort(order, function(a, b)
    if cost[a] ~= cost[b] then return cost[a] < cost[b] end
    return a < b
  end)
  return { status = "ok", layers = layers, order = order }
end

---@type Experiment
return {
  id = "e14_kv_layers",
  title = "KV precision by layer, keys and values apart, on the tiny checkpoint",
  question = "Which layers' keys and values need their bits?",
  cost = "about 2 minutes on 2 cores; --quick 10 s",
  origin = "reference",
  axes = {
    { name = "choice", values = { "alone", "least", "most" } },
    { name = "n", values = { 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12 } }, -- tiny has six layers
  },
  fixed = {
    model = "tiny", device = "cpu", text_seed = 0, text_bytes = 8192, rank_seed = 1,
    rank_bytes = 4096, window = 512, stride = 384,
  },
  quick = { n = { 6 }, text_bytes = { 1024 }, rank_bytes = { 512 } },
  -- All of them are the same whatever the order.
  where = function(point) return not (point.choice == "most" and point.n == 12) end,
  jobs = "parallel",
  timeout_s = 300,
  shared = { by = {}, run = ranked },
  run = function(amalgam, point, base)
    if base.status ~= "ok" then return base end
    local cache
    if point.choice == "alone" then -- half n, in 4 bits
      cache = one_alone(base.layers, point.n)
    else -- n of them
      local narrow = {}
      for i = 1, point.n do
        narrow[base.order[point.choice == "least" and i or #base.order + 1 - i]] = true
      end
      cache = list_of(base.layers, function(h) return narrow[h] and 4 or 8 end)
    end
    local result = beside(amalgam, point, cache, point.text_seed, point.text_bytes)
    if result.status ~= "ok" then return result end
    local m = result.metrics
    result.precision = amalgam.precision("W16A16" .. cache)
    result.metrics = {
      kl_nats = m.kl_nats, kl_nats_max = m.kl_nats_max, greedy_agreement = m.greedy_agreement,
      perplexity = m.perplexity, scored_tokens = m.scored_tokens,
      kv_bits = point.choice == "alone" and 16 - 12 / #base.order
        or 8 - 4 * point.n / #base.order,
    }
    return result
  end,
}
