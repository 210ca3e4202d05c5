--- Figure 16: requests per second and GPU within limits of latency, a panel for each model.
local goodput = require("goodput")
local labels = require("labels")

return {
  experiment = "e13_goodput",
  predicted = true,
  title = "Requests per second within limits of latency by precision (predicted)",
  caption = "Requests of the sharegpt shape per second and H200, Poisson arrivals, so that of 2800 "
    .. "99 % have the first token within 500 ms and the others within the limit of x each in the "
    .. "mean; each format on that degree of tensor parallelism (1, 2 or 4) which gives most per "
    .. "GPU. Scales differ between the models. Of the experts of Qwen3-30B-A3B, FP8 is of units "
    .. "that no kernel here uses yet. Predicted.",
  build = function(data)
    local rows, panel = {}, 0
    for _, model in ipairs(goodput.models) do
      if #data:distinct("e13", "model", { model = model }) > 0 then panel = panel + 1 end
      for _, precision in ipairs(goodput.formats) do
        for _, limit in ipairs(goodput.limits(data)) do
          local best = goodput.best(data, model, precision, limit)
          if best then
            rows[#rows + 1] = { model, panel, labels.format_title[precision] or precision, limit,
              best.metrics.rate_within_limits_per_s_per_gpu, best.key.tp }
          end
        end
      end
    end
    return { "model", "panel", "precision", "tpot_ms", "requests_per_s_per_gpu", "tp" }, rows
  end,
}
