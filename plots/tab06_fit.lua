--- Table 6: on how few GPUs does a model fit?
local labels = require("labels")

local FORMATS = { "W16A16KV16", "WFP8AFP8KVFP8", "WMXFP4A16KV8", "W4A16KV4" }

return {
  experiment = "e03_throughput",
  predicted = true,
  title = "Where models fit",
  caption = "Predicted smallest tensor-parallel degree on which a model fits with room for 32768 "
    .. "KV tokens, for W16A16KV16 / FP8 / MXFP4-A16KV8 / W4A16KV4. \"oom\": not on 8 GPUs; \"x\": "
    .. "refused, by the GPU or by shapes that cannot be split into whole groups.",
  build = function(data)
    local gpus = data.ordered(labels.gpus, data:distinct("e03", "gpu"))
    local columns, rows = { "model" }, {}
    for _, gpu in ipairs(gpus) do columns[#columns + 1] = labels.gpu_title[gpu] or gpu end
    for _, model in ipairs(data.ordered(labels.models, data:distinct("e03", "model"))) do
      local row = { model }
      for _, gpu in ipairs(gpus) do
        local words = {}
        for i, precision in ipairs(FORMATS) do
          local found = data:row("e03",
            { gpu = gpu, model = model, baseline = "none", precision = precision }, "any")
          words[i] = not found and "-" or found.status == "ok" and tostring(found.key.tp)
            or found.status == "oom" and "oom" or found.status == "skipped" and "x" or "failed"
        end
        row[#row + 1] = table.concat(words, " / ")
      end
      rows[#rows + 1] = row
    end
    return columns, rows
  end,
}
