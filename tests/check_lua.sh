#!/bin/sh
# House rule: Lua is clean under luacheck (.luacheckrc).
set -eu
command -v luacheck >/dev/null || { echo "0 passed, 0 failed, 1 skipped: no luacheck"; exit 0; }
luacheck --quiet experiments/*.lua baselines/*.lua plots/*.lua tests/*.lua
echo "1 passed, 0 failed"
