--- Table 10: steps of each model against the roofline, measured and predicted.
local labels = require("labels")

local GPU, FORMATS = "h200", { "W16A16KV16", "W4A16KV8" }
local STEPS = { { "b1", "1" }, { "b16", "16" }, { "b64", "64" }, { "prefill", "prefill" } }

-- Rows of before that figure was kept have none.
local function in_turn(data, model)
  local key = {
    gpu = GPU, model = model, precision = labels.own_format(model, "W4A16KV8"), device = "cuda",
    tp = 1,
  }
  local us, serial = data:value("e06", key, "b64_us"), data:value("e06", key, "b64_serial_us")
  return us and serial and ("%.2f"):format(us / serial)
end

return {
  experiment = "e06_steps",
  title = "Steps against the roofline",
  caption = "Time of a step over its roofline on one H200: decode steps of 1, 16 and 64 sequences "
    .. "of 4096 tokens, and a prefill of 8192 tokens (fewer where a model reads fewer). Measured, "
    .. "and predicted in brackets; \"-\": not measured, \"oom\": does not fit. \"64 in turn\": the "
    .. "W4A16KV8 step of 64 over the sum of its operations, each at the longer of its bytes and "
    .. "its arithmetic. gpt-oss-120b, which groups of 128 do not divide, has groups of 32 for its "
    .. "4-bit weights.",
  build = function(data)
    local columns, rows = { "model" }, {}
    for _, precision in ipairs(FORMATS) do
      for _, step in ipairs(STEPS) do columns[#columns + 1] = precision .. " " .. step[2] end
    end
    columns[#columns + 1] = "64 in turn"
    for _, model in ipairs(data.ordered(labels.models, data:distinct("e06", "model"))) do
      local row, any = { model }, false
      for _, precision in ipairs(FORMATS) do
        local own = labels.own_format(model, precision)
        local function ratio(device, step)
          local key = { gpu = GPU, model = model, precision = own, device = device, tp = 1 }
          local share = data:value("e06", key, step .. "_roofline_share")
          if share then return ("%.2f"):format(1 / share) end
          local point = data:row("e06", key, "any") -- ok: some other step of it fits
          return point and (point.status == "oom" or point.status == "ok") and "oom" or nil
        end
        for _, step in ipairs(STEPS) do
          local measured, predicted = ratio("cuda", step[1]), ratio("sim", step[1])
          any = any or measured ~= nil or predicted ~= nil
          row[#row + 1] = predicted == "oom" and (measured or "oom")
            or (measured or "-") .. (predicted and (" (%s)"):format(predicted) or "")
        end
      end
      row[#row + 1] = in_turn(data, model) or "-"
      if any then rows[#rows + 1] = row end
    end
    return columns, rows
  end,
}
