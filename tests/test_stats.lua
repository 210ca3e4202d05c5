--- Statistics against known answers, and twins that must come out different.

local stats = require("lib_stats")
local test = require("lib_test")

test.case("percentiles interpolate as numpy does", function()
  test.near(stats.percentile({ 4, 1, 3, 2 }, 0.5), 2.5, 1e-12)
  test.near(stats.percentile({ 1, 2, 3, 4 }, 0.9), 3.7, 1e-12) -- numpy.percentile(_, 90)
  test.near(stats.percentile({ 15, 20, 35, 40, 50 }, 0.4), 29, 1e-12)
  test.near(stats.percentile({ 7 }, 0.99), 7, 0)
  test.equal(stats.percentile({}, 0.5) == stats.percentile({}, 0.5), false, "NaN for no values")
end)

test.case("sorting leaves the caller's list alone", function()
  local values = { 3, 1, 2 }
  stats.median(values)
  test.equal(table.concat(values, " "), "3 1 2")
end)

test.case("geometric mean", function()
  test.near(stats.geomean({ 1, 4 }), 2, 1e-12)
  test.near(stats.geomean({ 2, 0.5 }), 1, 1e-12)
  test.equal(stats.geomean({ 1, 0 }) == stats.geomean({ 1, 0 }), false, "NaN for a zero")
end)

test.case("Mann-Whitney, exact, small samples", function()
  -- Complete separation of n and m values: two of choose(n + m, n) arrangements are as extreme.
  local p, u = stats.mann_whitney({ 1, 2, 3, 4, 5 }, { 6, 7, 8, 9, 10 })
  test.near(p, 2 / 252, 1e-12)
  test.equal(u, 0)
  test.near((stats.mann_whitney({ 1, 2, 3 }, { 4, 5, 6 })), 2 / 20, 1e-12)
  -- Mann & Whitney 1947, n = m = 4: P(U <= 3) = 7 / 70.
  test.near((stats.mann_whitney({ 1, 2, 3, 7 }, { 4, 5, 6, 8 })), 2 * 7 / 70, 1e-12)
end)

test.case("Mann-Whitney is symmetric and indifferent to monotone changes", function()
  local a, b = { 1.5, 2.5, 9, 4 }, { 3, 5, 6, 7, 11 }
  local p = stats.mann_whitney(a, b)
  test.near((stats.mann_whitney(b, a)), p, 1e-12)
  local function exp_all(v)
    local out = {}
    for i, x in ipairs(v) do out[i] = math.exp(x) end
    return out
  end
  test.near((stats.mann_whitney(exp_all(a), exp_all(b))), p, 1e-12)
end)

test.case("Mann-Whitney with ties uses the corrected normal approximation", function()
  -- By hand: U = 6 of mean 15; ties 2,2,2 and 3,3,3 give sum t^3 - t = 48, so the variance is
  -- 30 / 12 * (12 - 48 / 110) = 28.909 and z = 8.5 / 5.3767 = 1.5809: p = 0.1139.
  local p, u = stats.mann_whitney({ 1, 2, 2, 3, 4 }, { 2, 3, 3, 5, 6, 7 })
  test.equal(u, 6.0)
  test.near(p, 0.1139, 2e-4)
  test.equal((stats.mann_whitney({ 1, 1 }, { 1, 1, 1 })), 1, "all equal")
  test.equal((stats.mann_whitney({}, { 1 })), 1, "empty")
end)

test.case("exact and approximate tests agree for larger samples", function()
  local a, b = {}, {}
  for i = 1, 20 do a[i], b[i] = i * 1.01, i * 1.02 + 4.5 end
  local exact = stats.mann_whitney(a, b)
  a[21], b[21] = 40, 41 -- more than 20: the approximation
  local approximate = stats.mann_whitney(a, b)
  test.near(approximate, exact, 0.03)
end)

test.case("Benjamini-Hochberg", function()
  -- The example of Benjamini & Hochberg 1995, section 3.2: at 5 % the first four are rejected.
  local p = { 0.0001, 0.0004, 0.0019, 0.0095, 0.0201, 0.0278, 0.0298, 0.0344, 0.0459, 0.3240,
    0.4262, 0.5719, 0.6528, 0.7590, 1.0 }
  local rejected = 0
  for _, q in ipairs(stats.benjamini_hochberg(p)) do
    if q <= 0.05 then rejected = rejected + 1 end
  end
  test.equal(rejected, 4)
  local q = stats.benjamini_hochberg({ 0.04, 0.01, 0.03 })
  test.near(q[1], 0.04, 1e-12)
  test.near(q[2], 0.03, 1e-12)
  test.near(q[3], 0.04, 1e-12)
  test.equal(#stats.benjamini_hochberg({}), 0)
end)

test.case("the generator is uniform and repeats itself", function()
  local draw, again, counts = stats.generator(7), stats.generator(7), {}
  for _ = 1, 50000 do
    local x = draw(5)
    test.equal(again(5), x)
    counts[x] = (counts[x] or 0) + 1
  end
  for x = 1, 5 do test.near(counts[x], 10000, 400) end -- 4.5 sigma
  test.equal(#counts, 5)
  test.equal(stats.generator(8)(1000000 % 1024) == stats.generator(7)(1000000 % 1024), false)
end)

test.case("bootstrap intervals of a median cover it about as often as they say", function()
  local draw, covered, rounds = stats.generator(42), 0, 200
  for round = 1, rounds do
    local values = {}
    for i = 1, 15 do values[i] = draw(1000) end -- median 500.5
    local interval = stats.median_interval(values, { rounds = 300, seed = round })
    if interval.lo <= 500.5 and interval.hi >= 500.5 then covered = covered + 1 end
  end
  test.near(covered / rounds, 0.94, 0.05)
end)

test.case("a ratio of medians finds a planted 5 % and its twin finds none", function()
  local base, head, twin = {}, {}, {}
  for i = 1, 8 do
    base[i] = 100 + 0.3 * ((i * 5) % 8 - 3.5)
    head[i] = 105 + 0.3 * ((i * 3) % 8 - 3.5)
    twin[i] = 100 + 0.3 * ((i * 3) % 8 - 3.5)
  end
  local r = stats.ratio_of_medians(base, head)
  test.near(r.estimate, 1.05, 0.005)
  test.equal(r.lo > 1.02, true, "interval leaves 1 out")
  local same = stats.ratio_of_medians(base, twin)
  test.equal(same.lo <= 1 and same.hi >= 1, true, "interval of A/A holds 1")
end)

test.case("the Wilson interval is that of the textbook, and stays open at no failure", function()
  -- 10 of 20: p = 0.5, z = 1.96: 0.2993 and 0.7007.
  local p, lo, hi = stats.wrong_percent(0.5, 20)
  test.near(p, 50, 1e-9)
  test.near(lo, 29.93, 0.01)
  test.near(hi, 70.07, 0.01)
  p, lo, hi = stats.wrong_percent(1, 24)
  test.equal(p == 0 and lo == 0 and hi > 10, true)
  p = stats.wrong_percent(nil, 5)
  test.equal(p ~= p, true)
end)

test.finish()
