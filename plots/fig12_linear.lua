--- Figure 12: speed-up of linear layers over cuBLAS by format and batch, beside another system.
local peers = require("peers")
local stats = require("lib_stats")

local SERIES = {
  { "W4A16", "best", "W4A16", "fp16" }, { "MXFP4-A16", "best", "WMXFP4A16", "bf16" },
  { "W8A16", "best", "W8A16", "fp16" }, { "FP8 (W and A)", "best", "WFP8AFP8", "bf16" },
  { "W4A16, Ampere kernels", "ampere", "W4A16", "fp16" },
}

return {
  experiment = "e07_linear",
  title = "Linear layers over cuBLAS by format and batch",
  caption = "Speed-up of one linear layer over cuBLAS fp16 in the same process, geometric mean "
    .. "over six matrices of Llama-3.1, against the rows of x. Quantisation of activations is "
    .. "included. Dashed: kernels of LMDeploy's TurboMind for W4A16, measured once by the same "
    .. "method on another H200, and the bytes-and-arithmetic limit of W4A16 (plots/peers.lua).",
  build = function(data)
    local rows = {}
    for at, s in ipairs(SERIES) do
      for _, m in ipairs(peers.rows_x) do
        local values = data:values("e07",
          { variant = s[2], precision = s[3], dtype = s[4] }, ("m%d_speedup"):format(m))
        if #values > 0 then rows[#rows + 1] = { s[1], at, m, stats.geomean(values) } end
      end
    end
    if #rows > 0 then
      for i, m in ipairs(peers.rows_x) do
        rows[#rows + 1] = { "TurboMind W4A16", #SERIES + 1, m, peers.linear.turbomind_w4a16[i] }
        rows[#rows + 1] = { "limit of W4A16", #SERIES + 2, m, peers.linear_limit_w4a16[i] }
      end
    end
    return { "name", "series", "rows", "speedup" }, rows
  end,
}
