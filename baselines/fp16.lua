--- Baseline: weights, activations and KV cache of 16 bits, as the checkpoint has them.
return {
  name = "fp16",
  title = "16-bit weights and cache",
  options = { precision = "W16A16KV16" },
}
