--- Table 11: steps of each model in low-bit formats over those in 16 bits, measured.
local labels = require("labels")
local stats = require("lib_stats")

local FORMATS = { "W4A16KV8", "W4A8KV8", "W8A8KV8", "WFP8AFP8KVFP8" }
local STEPS = { { "b16", "16" }, { "b64", "64" }, { "prefill", "prefill" } }

return {
  experiment = "e06_steps",
  title = "Steps over those of 16 bits",
  caption = "Measured time of a step in 16 bits over that of the format, on one H200, where 16 "
    .. "bits fit: decode steps of 16 and 64 sequences of 4096 tokens, and a prefill of 8192 tokens "
    .. "(fewer where a model reads fewer). Experts multiply 8-bit activations as 16-bit values, "
    .. "but W4A8KV8 as codes where they have twelve rows and more each. "
    .. "\"-\": not measured, or refused for the model's shapes.",
  build = function(data)
    local columns, rows, all = { "model" }, {}, {}
    for _, step in ipairs(STEPS) do
      for _, precision in ipairs(FORMATS) do
        columns[#columns + 1] = step[2] .. " " .. (labels.format_title[precision] or precision)
      end
    end
    for _, model in ipairs(data.ordered(labels.models, data:distinct("e06", "model"))) do
      local row, any = { model }, false
      for _, step in ipairs(STEPS) do
        for _, precision in ipairs(FORMATS) do
          local function us(of)
            return data:value("e06",
              { gpu = "h200", model = model, precision = of, device = "cuda", tp = 1 },
              step[1] .. "_us")
          end
          local base, own = us(labels.base), us(labels.own_format(model, precision))
          local gain = base and own and base / own
          if gain then
            local at = #row
            all[at] = all[at] or {}
            table.insert(all[at], gain)
          end
          any = any or gain ~= nil
          row[#row + 1] = gain and ("%.2f"):format(gain) or "-"
        end
      end
      if any then rows[#rows + 1] = row end
    end
    if #rows > 1 then
      local mean = { "*geometric mean (models)*" }
      for at = 1, #columns - 1 do
        local gains = all[at]
        mean[#mean + 1] = gains and ("*%.2f (%d)*"):format(stats.geomean(gains), #gains) or "-"
      end
      rows[#rows + 1] = mean
    end
    return columns, rows
  end,
}
