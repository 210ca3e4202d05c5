-- luacheck settings: the suite's Lua is 5.4, has no globals of its own and stays within 100 columns.
std = "lua54"
max_line_length = 100
include_files = { "experiments", "baselines", "plots", "tests", "workloads" }
exclude_files = { "plots/out", "experiments/amalgam.meta.lua" }
