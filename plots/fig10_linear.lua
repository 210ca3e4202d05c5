--- Figure 10: speed-up of linear layers over cuBLAS by format and batch, beside other systems.
local peers = require("peers")
local stats = require("lib_stats")

local SERIES = {
  { "W4A16", "best", "W4A16", "fp16" }, { "MXFP4-A16", "best", "WMXFP4A16", "bf16" },
  { "W8A16", "best", "W8A16", "fp16" }, { "FP8", "best", "WFP8AFP8", "bf16" },
  { "W4A8", "best", "W4A8", "fp16" },
  { "W4A16, Ampere kernels", "ampere", "W4A16", "fp16" },
}
local OTHERS = {
  { "TurboMind W4A16", "quoted", peers.linear.turbomind_w4a16 },
  { "TurboMind MXFP4-A16", "quoted", peers.linear.turbomind_mxfp4a16 },
  { "Marlin W4A16 (2024)", "quoted", peers.linear.marlin_w4a16 },
  { "limit of W4A16", "limit", peers.linear_limit_w4a16 },
}

return {
  experiment = "e07_linear",
  title = "Linear layers over cuBLAS by format and batch",
  caption = "Measured speed-up of one linear layer over cuBLAS fp16 in the same process, "
    .. "geometric mean over six matrices of Llama-3.1-8B and -70B, against the rows of x; "
    .. "both axes are logarithmic. FP8 is of weights and activations; it and W4A8 include "
    .. "the quantisation of activations. Grey: our kernels for GPUs before Hopper, on the "
    .. "same H200. Dotted and dash-dotted: kernels of other systems, run once by the same "
    .. "method on another H200; dashed: what bytes and arithmetic of W4A16 allow "
    .. "(plots/peers.lua has both).",
  build = function(data)
    local rows = {}
    for at, s in ipairs(SERIES) do
      for _, m in ipairs(peers.rows_x) do
        local values = data:values("e07",
          { variant = s[2], precision = s[3], dtype = s[4] }, ("m%d_speedup"):format(m))
        local name = #values < 6 and ("%s, %d of 6"):format(s[1], #values) or s[1]
        if #values > 0 then rows[#rows + 1] = { name, at, m, stats.geomean(values), "measured" } end
      end
    end
    for at, other in ipairs(#rows > 0 and OTHERS or {}) do
      for i, m in ipairs(peers.rows_x) do
        rows[#rows + 1] = { other[1], #SERIES + at, m, other[3][i], other[2] }
      end
    end
    return { "name", "series", "rows", "speedup", "kind" }, rows
  end,
}
