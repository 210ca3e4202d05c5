--- Figure 4: offline throughput per GPU by precision over that of 16 bits, all models on one GPU.
local labels = require("labels")

local GPU = "h100-sxm"

return {
  experiment = "e03_throughput",
  predicted = true,
  title = "Throughput by precision over 16 bits (predicted)",
  caption = "Output tokens per second and GPU relative to W16A16KV16, offline, on H100-SXM; each "
    .. "format on the smallest tensor-parallel degree on which it fits. A missing bar is a format "
    .. "that the model's shapes or the GPU refuse; " .. labels.eight_bit_units .. " Predicted.",
  build = function(data)
    local rows = {}
    local metric = "output_tokens_per_s_per_gpu"
    for _, model in ipairs(data.ordered(labels.models, data:distinct("e03", "model"))) do
      local key = { gpu = GPU, model = model, baseline = "none", precision = labels.base }
      local base = data:value("e03", key, metric)
      if base then
        local row = { model }
        for _, precision in ipairs(labels.formats) do
          key.precision = precision
          local x = data:value("e03", key, metric)
          row[#row + 1] = x and x / base or 0 / 0
        end
        rows[#rows + 1] = row
      end
    end
    return { "model", table.unpack(labels.formats) }, rows
  end,
}
