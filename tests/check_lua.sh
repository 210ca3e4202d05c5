#!/bin/sh
# House rule: Lua is clean under luacheck (.luacheckrc).
set -eu
luacheck --quiet experiments/*.lua baselines/*.lua plots/*.lua tests/*.lua
echo "1 passed, 0 failed"
