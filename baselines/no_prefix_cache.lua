--- Baseline: every prompt is computed whole; nothing is taken over from earlier requests.
return {
  name = "no_prefix_cache",
  title = "no prefix cache",
  options = { scheduler = { prefix_cache = false } },
}
