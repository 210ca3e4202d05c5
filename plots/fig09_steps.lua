--- Figure 9: how much of the roofline a step of each model reaches on one H200, measured.
local labels = require("labels")

local GPU = "h200"
local SERIES = {
  { "W16A16KV16", "b1" }, { "W16A16KV16", "b64" }, { "W4A16KV8", "b1" }, { "W4A16KV8", "b64" },
  { "W16A16KV16", "prefill" }, { "W4A16KV8", "prefill" },
}

return {
  experiment = "e06_steps",
  title = "Share of the roofline that a step reaches",
  caption = "Roofline time over the measured time of one step on one H200: decode steps of 1 and 64"
    .. " sequences of 4096 tokens, and a prefill of 8192 tokens, in 16 bit and in W4A16KV8 (groups "
    .. "of 32 for gpt-oss-120b). Filled: measured; hollow: predicted. 1 is a step that reads each "
    .. "byte once at the read ceiling, or multiplies at the rate of cuBLAS, both measured in the "
    .. "same process.",
  build = function(data)
    local columns, rows = { "model" }, {}
    for _, s in ipairs(SERIES) do columns[#columns + 1] = s[1] .. "_" .. s[2] end
    for _, s in ipairs(SERIES) do columns[#columns + 1] = s[1] .. "_" .. s[2] .. "_predicted" end
    for _, model in ipairs(data.ordered(labels.models, data:distinct("e06", "model"))) do
      local row, any = { model }, false
      for _, device in ipairs({ "cuda", "sim" }) do
        for _, s in ipairs(SERIES) do
          local own = labels.own_format(model, s[1])
          local key = { gpu = GPU, model = model, precision = own, device = device, tp = 1 }
          local x = data:value("e06", key, s[2] .. "_roofline_share")
          any = any or (x ~= nil and device == "cuda")
          row[#row + 1] = x or 0 / 0
        end
      end
      if any then rows[#rows + 1] = row end
    end
    return columns, rows
  end,
}
