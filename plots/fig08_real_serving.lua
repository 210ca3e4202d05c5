--- Figure 8: measured latency of the tiny checkpoint against rate.
local labels = require("labels")
local stats = require("lib_stats")

local SERIES = {
  { "W16A16KV16", "none" }, { "W4A16KV16", "none" }, { "W4A16KV4", "none" },
  { "W16A16KV16", "static_batching" },
}

return {
  experiment = "e05_real_serving",
  title = "Measured latency against request rate",
  caption = "Measured on cpu, tiny checkpoint, Poisson arrivals in real time: median time to first "
    .. "token, P90 time to first token and median end-to-end latency of 40 requests; median of the "
    .. "repetitions with a 95 % bootstrap interval.",
  build = function(data)
    local rows = {}
    for at, s in ipairs(SERIES) do
      local name = s[2] == "none" and s[1] or labels.baseline_title[s[2]] .. ", W16"
      local rates = data:distinct("e05", "rate_per_s")
      table.sort(rates)
      for _, rate in ipairs(rates) do
        local key = { precision = s[1], baseline = s[2], rate_per_s = rate }
        local row = { name, at, rate }
        for _, metric in ipairs({ "ttft_p50_ms", "ttft_p90_ms", "e2e_p50_ms" }) do
          local values = data:values("e05", key, metric)
          local i = #values > 0 and stats.median_interval(values) or {}
          row[#row + 1], row[#row + 2], row[#row + 3] = i.estimate or 0 / 0, i.lo or 0 / 0,
            i.hi or 0 / 0
        end
        if row[4] == row[4] then rows[#rows + 1] = row end
      end
    end
    local columns = { "series", "number", "rate_per_s" }
    for _, metric in ipairs({ "ttft_p50_ms", "ttft_p90_ms", "e2e_p50_ms" }) do
      for _, part in ipairs({ "", "_lo", "_hi" }) do columns[#columns + 1] = metric .. part end
    end
    return columns, rows
  end,
}
