--- Baseline: a batch is filled once and runs until its last request ends (no continuous batching).
return {
  name = "static_batching",
  title = "static batching",
  options = { scheduler = { static_batching = true } },
}
