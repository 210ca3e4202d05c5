--- Statistics of the suite: order statistics, bootstrap, rank test, false-discovery control.
---
--- Repetitions are the unit, never the requests within one run: those are correlated. Everything is
--- deterministic (the bootstrap draws from its own seeded generator), so tables and figures can be
--- compared byte by byte.

local M = {}

---@param values number[]
---@return number[] sorted copy
local function sorted(values)
  local copy = table.move(values, 1, #values, 1, {})
  table.sort(copy)
  return copy
end

--- Percentile with linear interpolation between order statistics (numpy's default).
---@param values number[]
---@param p number in [0, 1]
---@return number # NaN when there are no values
function M.percentile(values, p)
  local v = sorted(values)
  if #v == 0 then return 0 / 0 end
  local at = p * (#v - 1)
  local low = math.floor(at)
  local next_value = v[math.min(low + 2, #v)]
  return v[low + 1] + (at - low) * (next_value - v[low + 1])
end

---@param values number[]
---@return number
function M.median(values) return M.percentile(values, 0.5) end

---@param values number[]
---@return number
function M.mean(values)
  local sum = 0
  for _, x in ipairs(values) do sum = sum + x end
  return sum / #values
end

--- Geometric mean of positive numbers.
---@param values number[]
---@return number # NaN when empty or when a value is not positive
function M.geomean(values)
  local sum = 0
  for _, x in ipairs(values) do
    if x <= 0 or x ~= x then return 0 / 0 end
    sum = sum + math.log(x)
  end
  return #values > 0 and math.exp(sum / #values) or 0 / 0
end

--- Share of failures among n trials in percent, with the Wilson score interval at 95 % (Wilson
--- 1927): it neither leaves 0 to 100 nor closes up at 0.
---@param accuracy number|nil share of successes
---@param n number|nil
---@return number percent NaN, three times, for nothing
---@return number lo
---@return number hi
function M.wrong_percent(accuracy, n)
  if not accuracy or not n or n <= 0 then return 0 / 0, 0 / 0, 0 / 0 end
  local z, p = 1.959964, 1 - accuracy
  local middle = (p + z * z / (2 * n)) / (1 + z * z / n)
  local half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
  return 100 * p, 100 * math.max(middle - half, 0), 100 * math.min(middle + half, 1)
end

--- A seeded stream of numbers: splitmix64 (Steele et al. 2014); math.random is seeded by time.
---@param seed integer
---@return fun(n: integer): integer draw uniform in 1..n
function M.generator(seed)
  local state = seed
  return function(n)
    state = state + 0x9E3779B97F4A7C15
    local z = state
    z = (z ~ (z >> 30)) * 0xBF58476D1CE4E5B9
    z = (z ~ (z >> 27)) * 0x94D049BB133111EB
    z = z ~ (z >> 31)
    return ((z >> 11) * n >> 53) + 1 -- n < 2^10 keeps the product within 63 bits
  end
end

---@param draw fun(n: integer): integer
---@param values number[]
---@return number[] as many values, drawn with replacement
local function resample(draw, values)
  local out = {}
  for i = 1, #values do out[i] = values[draw(#values)] end
  return out
end

---@class Interval
---@field estimate number
---@field lo number
---@field hi number

--- Ratio of medians, head over base, with a percentile bootstrap interval.
---@param base number[]
---@param head number[]
---@param options? { confidence?: number, rounds?: integer, seed?: integer }
---@return Interval
function M.ratio_of_medians(base, head, options)
  local o = options or {}
  local rounds, confidence = o.rounds or 2000, o.confidence or 0.95
  local draw = M.generator(o.seed or 1)
  local ratios = {}
  for i = 1, rounds do
    ratios[i] = M.median(resample(draw, head)) / M.median(resample(draw, base))
  end
  return {
    estimate = M.median(head) / M.median(base),
    lo = M.percentile(ratios, (1 - confidence) / 2),
    hi = M.percentile(ratios, (1 + confidence) / 2),
  }
end

--- Median with a percentile bootstrap interval.
---@param values number[]
---@param options? { confidence?: number, rounds?: integer, seed?: integer }
---@return Interval
function M.median_interval(values, options)
  local o = options or {}
  local rounds, confidence = o.rounds or 2000, o.confidence or 0.95
  local draw = M.generator(o.seed or 1)
  local medians = {}
  for i = 1, rounds do medians[i] = M.median(resample(draw, values)) end
  return {
    estimate = M.median(values),
    lo = M.percentile(medians, (1 - confidence) / 2),
    hi = M.percentile(medians, (1 + confidence) / 2),
  }
end

--- Rank sum of `a` in the pooled values (ties share their mean rank); sum of t^3 - t over ties.
---@param a number[]
---@param b number[]
---@return number rank_sum
---@return number ties
local function rank_sum(a, b)
  local pooled = {}
  for _, x in ipairs(a) do pooled[#pooled + 1] = { x, 1 } end
  for _, x in ipairs(b) do pooled[#pooled + 1] = { x, 0 } end
  table.sort(pooled, function(x, y) return x[1] < y[1] end)
  local sum, ties, i = 0, 0, 1
  while i <= #pooled do
    local j = i
    while j < #pooled and pooled[j + 1][1] == pooled[i][1] do j = j + 1 end
    for k = i, j do sum = sum + pooled[k][2] * (i + j) / 2 end
    local t = j - i + 1
    ties = ties + (t ^ 3 - t)
    i = j + 1
  end
  return sum, ties
end

--- Upper tail of the standard normal: Abramowitz & Stegun 7.1.26 through erfc, |error| < 1.5e-7.
---@param z number
---@return number
local function normal_tail(z)
  local x = math.abs(z) / math.sqrt(2)
  local t = 1 / (1 + 0.3275911 * x)
  local poly = t * (0.254829592 + t * (-0.284496736 + t * (1.421413741
    + t * (-1.453152027 + t * 1.061405429))))
  local tail = poly * math.exp(-x * x) / 2
  return z >= 0 and tail or 1 - tail
end

--- How many of the choose(n + m, n) arrangements give U <= u: Mann & Whitney's recurrence.
---@param n integer
---@param m integer
---@param u number
---@return number share of all arrangements
local function exact_share(n, m, u)
  -- count[i][k]: arrangements of i values among j others with U = k, j growing from 0 to m.
  local count = {}
  for i = 0, n do count[i] = { [0] = 1 } end
  for j = 1, m do
    for i = 1, n do
      local fresh = {}
      for k = 0, i * j do
        fresh[k] = (count[i][k] or 0) + (count[i - 1][k - j] or 0)
      end
      count[i] = fresh
    end
  end
  local below, all = 0, 0
  for k, c in pairs(count[n]) do
    all = all + c
    if k <= u then below = below + c end
  end
  return below / all
end

--- Two-sided Mann-Whitney U test. Exact when there are no ties and neither sample has over 20
--- values; else the normal approximation with tie and continuity correction.
---@param a number[]
---@param b number[]
---@return number p 1 when either is empty or all values are equal
---@return number u of the first sample
function M.mann_whitney(a, b)
  local n, m = #a, #b
  if n == 0 or m == 0 then return 1, 0 end
  local sum, ties = rank_sum(a, b)
  local u = sum - n * (n + 1) / 2
  local least = math.min(u, n * m - u)
  if ties == 0 and n <= 20 and m <= 20 then
    return math.min(1, 2 * exact_share(n, m, least)), u
  end
  local total = n + m
  local variance = n * m / 12 * (total + 1 - ties / (total * (total - 1)))
  if variance <= 0 then return 1, u end
  local z = math.max(0, n * m / 2 - least - 0.5) / math.sqrt(variance)
  return math.min(1, 2 * normal_tail(z)), u
end

--- Benjamini-Hochberg adjusted p-values, in the order given.
---@param p number[]
---@return number[] q
function M.benjamini_hochberg(p)
  local order, q = {}, {}
  for i = 1, #p do order[i] = i end
  table.sort(order, function(x, y)
    if p[x] ~= p[y] then return p[x] > p[y] end
    return x > y
  end)
  local least = 1
  for at, i in ipairs(order) do
    local rank = #p - at + 1
    least = math.min(least, p[i] * #p / rank)
    q[i] = least
  end
  return q
end

return M
