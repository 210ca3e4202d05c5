--- Table 18: requests per second and GPU within limits of latency, by model, limit and format.
local accuracy = require("accuracy")
local goodput = require("goodput")
local labels = require("labels")

return {
  experiment = "e13_goodput",
  predicted = true,
  title = "Requests per second within limits of latency",
  caption = "Predicted requests per second and H200, so that of 2800 99 % have the first token "
    .. "within 500 ms and each further one within the limit in the mean (sharegpt shape, Poisson "
    .. "arrivals; rates 4.4 % apart were tried), with the tensor-parallel degree of 1, 2 and 4 "
    .. "that gives most after \"@\". \"=\": as much as it sustains without limits; \"-\": no "
    .. "degree keeps them at a 32nd of that. Of experts, FP8 is of units that no kernel here uses "
    .. "yet, and W4A8KV8 of such as are used from twelve rows each on." .. accuracy.note,
  build = function(data)
    local columns, rows = { "model", "TPOT at most (ms)" }, {}
    for i, f in ipairs(goodput.formats) do columns[i + 2] = labels.format_title[f] or f end
    for _, model in ipairs(goodput.models) do
      for _, limit in ipairs(goodput.limits(data)) do
        local row, any = { model, ("%d"):format(limit) }, false
        for _, precision in ipairs(goodput.formats) do
          local best = goodput.best(data, model, precision, limit)
          local m = best and best.metrics
          any = any or best ~= nil
          if m and m.rate_within_limits_per_s > 0 then
            local whole = m.rate_within_limits_per_s == m.sustained_requests_per_s
            row[#row + 1] = ("%.1f @%d%s"):format(m.rate_within_limits_per_s_per_gpu, best.key.tp,
              whole and " =" or "")
          else
            row[#row + 1] = "-"
          end
        end
        if any then rows[#rows + 1] = row end
      end
    end
    if #rows > 0 then
      local last = { accuracy.title, "" }
      for i, precision in ipairs(goodput.formats) do
        last[i + 2] = accuracy.of(data, precision)
      end
      rows[#rows + 1] = last
    end
    return columns, rows
  end,
}
