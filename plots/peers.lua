--- What kernels of other systems reach on an H200, for the eye to compare with. Not run by this
--- repository: measured once with the same method (random data, weights rotating through more than
--- 260 MB, KV sets through 512 MB, graph replay, medians; speed-up over cublasGemmEx fp16 of the
--- same run, geometric mean over the six matrices of e07). TurboMind: InternLM/lmdeploy at commit
--- 1263d5cd (2026-08-21) with its own packer, dispatch and tuner; Marlin: the kernel of 2024,
--- symmetric, without its L2 eviction hint, which faults on sm_90; cublasLt: FP8 with a scale per
--- tensor; cuDNN: scaled_dot_product_attention of PyTorch 2.11, bf16.
return {
  rows_x = { 1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096 },
  linear = {
    turbomind_w4a16 = { 1.88, 1.95, 1.99, 2.00, 1.92, 1.65, 1.15, 0.78, 0.59, 0.54, 0.56, 0.60,
      0.60 },
    marlin_w4a16 = { 1.57, 1.59, 1.59, 1.65, 1.59, 1.23, 0.90, 0.69, 0.56, 0.50, 0.46, 0.44,
      0.49 },
    turbomind_mxfp4a16 = { 1.51, 1.51, 1.52, 1.36, 1.15, 1.00, 0.75, 0.61, 0.52, 0.53, 0.55, 0.58,
      0.61 },
    -- activations quantised before, outside of the time
    turbomind_fp8b = { 1.10, 1.12, 1.13, 1.15, 1.13, 1.12, 1.05, 1.02, 1.01, 1.26, 1.45, 1.57,
      1.68 },
    cublaslt_fp8 = { false, false, false, false, 1.86, 1.89, 1.84, 1.87, 1.89, 1.93, 1.91, 1.90,
      1.92 },
  },
  -- max(bytes at 4.66 TB/s, arithmetic at 770 TFLOP/s) of W4A16 g128 with scales and zero points
  linear_limit_w4a16 = { 5.25, 5.04, 5.08, 5.19, 5.13, 5.08, 3.59, 1.94, 1.26, 1.08, 1.03, 1.05,
    1.10 },
  -- microseconds, fp16, 32 query and 8 KV heads, head dim 128
  decode_turbomind = {
    ["1x4096"] = { KV16 = 17.4, KV8 = 16.3, KV4 = 16.0 },
    ["8x4096"] = { KV16 = 56.3, KV8 = 33.5, KV4 = 49.6 },
    ["64x1024"] = { KV16 = 68.0, KV8 = 69.3, KV4 = 46.8 },
    ["64x4096"] = { KV16 = 242, KV8 = 176, KV4 = 161 },
    ["256x4096"] = { KV16 = 946, KV8 = 614, KV4 = 587 },
    ["256x16384"] = { KV16 = 3729, KV8 = 2312, KV4 = 2272 },
    ["1x131072"] = { KV16 = 135, KV8 = 89.9, KV4 = 92.4 },
  },
  -- TFLOP/s, causal, batch 1, KV16
  prefill_cudnn = { [1024] = 262, [2048] = 406, [4096] = 532, [8192] = 613, [16384] = 603 },
  prefill_turbomind = { [1024] = 156, [2048] = 226, [4096] = 282, [8192] = 306, [16384] = 324 },
}
