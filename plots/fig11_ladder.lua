--- Figure 11: what each idea of the W4A16 kernels bought.
local stats = require("lib_stats")

local STEPS = {
  { "dequantise, then cuBLAS", "dequant_cublas" }, { "tensor cores", "ladder_tensor" },
  { "+ packed order", "ladder_packed" }, { "+ pipelined copies", "ladder_pipelined" },
  { "+ bitwise conversion", "ladder_convert" }, { "+ even shares of SMs", "ampere" },
  { "+ Hopper", "best" },
}

return {
  experiment = "e07_linear",
  title = "What each idea bought",
  caption = "W4A16 linear layers, steps of kernels/ladder from the plain tensor-core kernel on "
    .. "codes in checkpoint order to the one that runs, and the baseline that expands weights "
    .. "first: speed-up over cuBLAS fp16, geometric mean over six matrices.",
  build = function(data)
    local rows = {}
    for _, step in ipairs(STEPS) do
      local row, any = { step[1] }, false
      for _, m in ipairs({ 1, 16, 64, 256, 1024 }) do
        local values = data:values("e07",
          { variant = step[2], precision = "W4A16", dtype = "fp16" }, ("m%d_speedup"):format(m))
        any = any or #values > 0
        row[#row + 1] = #values > 0 and stats.geomean(values) or 0 / 0
      end
      if any then rows[#rows + 1] = row end
    end
    if #rows < 3 then rows = {} end -- the last two alone are no ladder
    return { "step", "m1", "m16", "m64", "m256", "m1024" }, rows
  end,
}
