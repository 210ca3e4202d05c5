--- E11: is a checkpoint loaded as fast as its bytes cross the bus?
---
--- `amalgam bench load` on files of Llama-3.1-8B's layers in each layout, which lie in the page
--- cache: out of it into pinned memory, over the bus, and kernels that unpack, convert, round and
--- put into order, each by its own clock; then all of it, where they overlap.
--- `python3 tests/interop/large_checkpoints.py build/large 6` makes the files; build/large may be a
--- link to a RAM disk.

---@type Experiment
return {
  id = "e11_loading",
  title = "Loading checkpoints onto a GPU by layout (measured)",
  question = "Is packing ever slower than the copy to the device?",
  cost = "20 s on an H200, and 10 GB for the files",
  origin = "measured",
  needs = "gpu",
  axes = {
    { name = "layout", values = { "bf16", "awq", "gptq", "compressed_tensors", "fp8_block",
      "mxfp4" } },
    { name = "format", values = { "stored", "W16", "W4", "WFP8" } },
  },
  fixed = { device = "cuda" },
  quick = { layout = { "awq" }, format = { "stored" } },
  where = function(point)
    return point.format == "stored" or (point.layout == "bf16") == (point.format ~= "W16")
  end,
  jobs = "alone",
  timeout_s = 120,
  run = function(amalgam, point)
    local folder = ("%s/build/large/%s"):format(amalgam.identity().root, point.layout)
    if not pcall(amalgam.read_file, folder .. "/config.json") then
      return { status = "skipped", reason = "tests/interop/large_checkpoints.py makes build/large" }
    end
    local lines, status, reason = amalgam.bench("load", { model = folder, device = point.device,
      precision = point.format == "stored" and "auto" or point.format })
    if not lines then return { status = status, reason = reason } end
    local line = lines[1]
    return { status = "ok", precision = line.precision, metrics = { gb = line.gb,
      load_gb_per_s = line.load_gb_per_s, host_gb_per_s = line.host_gb_per_s,
      copy_gb_per_s = line.copy_gb_per_s, pack_gb_per_s = line.pack_gb_per_s } }
  end,
}
