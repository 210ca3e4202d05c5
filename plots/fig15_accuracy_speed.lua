--- Figure 15: what a format gains beside what it costs, and which ones another beats in both.
local accuracy = require("accuracy")
local labels = require("labels")
local lengths = require("lengths")
local stats = require("lib_stats")

--- Panels: name, formats, and the gains of one over 16 bits by model.
local PANELS = {
  { "decode", lengths.formats, function(data, precision)
    return lengths.gains(data, precision, 64, 0)
  end },
  { "prefill", lengths.formats, function(data, precision)
    return lengths.gains(data, precision, 64, math.huge)
  end },
  { "offline", labels.formats, function(data, precision)
    return (data:ratios("e03", "model", { gpu = "h100-sxm", baseline = "none",
      precision = precision }, { gpu = "h100-sxm", baseline = "none", precision = labels.base },
      "output_tokens_per_s_per_gpu"))
  end },
}

--- Marks rows {..., kl, gain, front} that no other row of the panel beats in both.
local function mark_front(rows)
  for _, row in ipairs(rows) do
    row[6] = 1
    for _, other in ipairs(rows) do
      if other[4] <= row[4] and other[5] > row[5] or other[4] < row[4] and other[5] >= row[5] then
        row[6] = 0
      end
    end
  end
end

return {
  experiment = "e06_steps",
  title = "Accuracy against speed by format",
  caption = "Speed-up over 16 bits (geometric mean over the models) against the KL divergence from "
    .. "16 bits of the tiny checkpoint in the same format (cpu reference): a decode step of 64 "
    .. "sequences of 4096 tokens and a prefill of 8192 tokens, measured on one H200 over the "
    .. "models that were measured in all of these formats, and offline throughput per GPU on "
    .. "H100-SXM, predicted. Grey steps: formats that no other one beats in both. The checkpoint "
    .. "gives the order of formats, not what one costs a large model.",
  build = function(data)
    local rows = {}
    for _, panel in ipairs(PANELS) do
      local mine = { { "W16A16KV16", panel[1], 0, 0, 1 } }
      for _, precision in ipairs(panel[2]) do
        local gains, kl = panel[3](data, precision), accuracy.kl(data, precision)
        if #gains > 0 and kl then
          mine[#mine + 1] = { labels.format_title[precision] or precision, panel[1], #gains,
            1000 * kl, stats.geomean(gains) }
        end
      end
      mark_front(mine)
      table.sort(mine, function(a, b) return a[4] < b[4] end)
      if #mine > 1 then table.move(mine, 1, #mine, #rows + 1, rows) end
    end
    return { "name", "panel", "models", "kl_millinats", "gain", "front" }, rows
  end,
}
