--- Table 13: speed-up of linear layers over cuBLAS by format, type and batch.
local peers = require("peers")
local stats = require("lib_stats")

local MATRICES = 6
local SHOWN = { 1, 8, 16, 32, 64, 128, 256, 512, 1024, 4096 }
local PEERS = { { "TurboMind W4A16", "turbomind_w4a16" }, { "Marlin W4A16", "marlin_w4a16" },
  { "TurboMind MXFP4-A16", "turbomind_mxfp4a16" },
  { "TurboMind WFP8bAFP8, codes given", "turbomind_fp8b" },
  { "cublasLt FP8 by tensor, codes given", "cublaslt_fp8" } }

return {
  experiment = "e07_linear",
  title = "Linear layers over cuBLAS",
  caption = "Measured speed-up of linear layers over cuBLAS fp16 in the same process, geometric "
    .. "mean over six matrices, by rows of x; error is the largest of ||y - ref|| / ||ref|| "
    .. "against float64. Rows in italics: kernels of other systems, measured once by the same "
    .. "method on another H200 (plots/peers.lua); \"codes given\": without the quantisation of "
    .. "activations, which our FP8, W8A8 and W4A8 include. \"-\": not measured.",
  build = function(data)
    local columns, rows = { "format", "type", "kernels" }, {}
    for _, m in ipairs(SHOWN) do columns[#columns + 1] = tostring(m) end
    columns[#columns + 1] = "error"
    for _, variant in ipairs({ "best", "ampere" }) do
      for _, precision in ipairs(data:distinct("e07", "precision")) do
        for _, dtype in ipairs({ "fp16", "bf16" }) do
          local key = { variant = variant, precision = precision, dtype = dtype }
          local row, least = { precision, dtype, variant == "best" and "all" or "Ampere" }, nil
          for _, m in ipairs(SHOWN) do
            local values = data:values("e07", key, ("m%d_speedup"):format(m))
            if #values > 0 then least = math.min(least or MATRICES, #values) end
            row[#row + 1] = #values > 0 and ("%.2f"):format(stats.geomean(values)) or "-"
          end
          local errors = data:values("e07", key, "rel_err")
          row[#row + 1] = #errors > 0 and ("%.1e"):format(math.max(table.unpack(errors))) or "-"
          if least and least < MATRICES then
            row[3] = ("%s, %d of %d"):format(row[3], least, MATRICES)
          end
          if least then rows[#rows + 1] = row end
        end
      end
    end
    if #rows > 0 then
      for _, peer in ipairs(PEERS) do
        local row = { "*" .. peer[1] .. "*", "", "" }
        for _, m in ipairs(SHOWN) do
          for i, x in ipairs(peers.rows_x) do
            local speedup = peers.linear[peer[2]][i]
            if x == m then row[#row + 1] = speedup and ("*%.2f*"):format(speedup) or "-" end
          end
        end
        rows[#rows + 1] = row
      end
    end
    return columns, rows
  end,
}
