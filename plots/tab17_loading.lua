--- Table 17: loading by layout, in bytes of the file per second.
return {
  experiment = "e11_loading",
  title = "Loading checkpoints onto a GPU",
  caption = "Measured GB of the file per second, layers of Llama-3.1-8B from the page cache: into "
    .. "pinned memory by all cores, over the bus, and kernels that pack, each by its own clock; "
    .. "then all of it, where these overlap. \"failed\" is the status of that point.",
  build = function(data)
    local rows = {}
    for _, layout in ipairs(data:distinct("e11", "layout")) do
      for _, format in ipairs(data:distinct("e11", "format", { layout = layout })) do
        local key, row = { layout = layout, format = format }, { layout, format }
        local any = data:row("e11", key, "any")
        for _, metric in ipairs({ "host", "copy", "pack", "load" }) do
          local x = data:value("e11", key, metric .. "_gb_per_s")
          row[#row + 1] = x and ("%.1f"):format(x) or any and any.status or "-"
        end
        rows[#rows + 1] = row
      end
    end
    return { "layout", "format", "host", "copy", "pack", "load" }, rows
  end,
}
