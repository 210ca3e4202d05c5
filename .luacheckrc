-- luacheck settings: the suite's Lua is 5.4, has no globals of its own and stays within 100 columns.
std = "lua54"
max_line_length = 100
include_files = {
  "experiments/*.lua", "baselines/*.lua", "plots/*.lua", "tests/*.lua", "workloads/*.lua",
}
exclude_files = { "experiments/amalgam.meta.lua" }
