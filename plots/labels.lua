--- Names and orders that tables and figures share.
local amalgam = require("amalgam")

--- Titles of baselines are those of their files; nil where there is none.
local baseline_title = setmetatable({ none = "Amalgam" }, {
  __index = function(_, name)
    return package.searchpath(name, package.path) and require(name).title
  end,
})

return {
  --- For captions: where a prediction is of kernels that do not exist.
  eight_bit_units = "before Hopper, and for experts anywhere, W8A8 and FP8 are of units that no "
    .. "kernel here uses yet.",
  models = amalgam.models(),
  gpus = { "rtx4090", "l40s", "a100-80gb", "h100-sxm", "h200" },
  gpu_title = {
    rtx4090 = "RTX 4090", l40s = "L40S", ["a100-80gb"] = "A100-80GB", ["h100-sxm"] = "H100-SXM",
    h200 = "H200",
  },
  base = "W16A16KV16",
  formats = {
    "W8A8KV8", "WFP8AFP8KVFP8", "WMXFP4A16KV8", "W4A16KV16", "W4A16KV8", "W4A16KV4",
  },
  format_title = {
    W16A16KV16 = "W16A16KV16", WFP8AFP8KVFP8 = "FP8", WMXFP4A16KV8 = "MXFP4-A16KV8",
  },
  --- What a model has in the place of a format: groups of 128 do not divide gpt-oss-120b.
  own_format = function(model, precision)
    local narrow = model == "gpt-oss-120b" and precision == "W4A16KV8"
    return narrow and "W4g32A16KV8" or precision
  end,
  weights = { "16", "8", "FP8", "4g32", "4g64", "4g128", "MXFP4" },
  weight_title = {
    ["16"] = "W16", ["8"] = "W8", FP8 = "WFP8", ["4g32"] = "W4g32", ["4g64"] = "W4g64",
    ["4g128"] = "W4g128", MXFP4 = "WMXFP4",
  },
  kvs = { "KV16", "KV8", "KVFP8", "K8V4", "KV4" },
  kv_all = { "KV16", "KV8", "KVFP8", "K8V4", "KV[8x2,4x4]", "KV4" }, -- and one by layer
  baselines = { "none", "static_batching", "no_prefix_cache" },
  baseline_title = baseline_title,
}
