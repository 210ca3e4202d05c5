--- Baseline: expand low-bit weights to 16 bits in memory first, then run the 16-bit kernels.
---
--- What a framework does that has no fused mixed-precision kernels: the low-bit form saves memory,
--- and every use of it pays one write and one read of the expanded form.
return {
  name = "dequant_first",
  title = "dequantise, then GEMM",
  options = { dequant_first = true },
}
