--- Figure 17: what each layer's keys and values cost in 4 bits, and what choosing by it gains.

--- Formats of Table 1 with 16-bit weights, as points beside the choices: KV name and mean bits.
local UNIFORM = { { "KV8", 8 }, { "K8V4", 6 }, { "KV[8x2,4x4]", 16 / 3 }, { "KV4", 4 } }

--- The half that stands alone in 4 bits: "K" or "V" and its layer, from 0.
local function half_of(n) return n % 2 == 1 and "K" or "V", (n - 1) // 2 end

return {
  experiment = "e14_kv_layers",
  title = "KV precision by layer",
  caption = "KL divergence from 16 bits of the tiny checkpoint, cpu reference. Left: the keys or "
    .. "the values of one layer in 4 bits, everything else in 16. Right (logarithmic): n of the "
    .. "twelve halves in 4 bits and the others in 8, against the mean bits of an element: those "
    .. "that cost least, or most, by the measure of the left on another text; hollow: formats of "
    .. "Table 1 over the same text.",
  build = function(data)
    local rows = {}
    for _, row in ipairs(data:select("e14")) do
      local k, micro = row.key, row.metrics.kl_nats * 1e6
      if k.choice == "alone" then
        local part, layer = half_of(k.n)
        rows[#rows + 1] = { "alone " .. part, layer, micro }
      else
        rows[#rows + 1] = { k.choice, row.metrics.kv_bits, micro }
        if k.n == 12 then rows[#rows + 1] = { "most", row.metrics.kv_bits, micro } end
      end
    end
    if #rows == 0 then return {}, {} end
    table.sort(rows, function(a, b)
      if a[1] ~= b[1] then return a[1] < b[1] end
      return a[2] < b[2]
    end)
    for _, kv in ipairs(UNIFORM) do
      local kl = data:value("e01", { precision = "W16A16" .. kv[1] }, "kl_nats")
      if kl then rows[#rows + 1] = { kv[1], kv[2], kl * 1e6 } end
    end
    return { "kind", "x", "kl_micronats" }, rows
  end,
}
