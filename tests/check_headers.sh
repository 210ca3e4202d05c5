#!/bin/sh
# House rule: every header stands alone, and those that .cu files include are valid C++ as well.
set -eu
flags="-Wall -Wextra -fsyntax-only -iquote engine -iquote kernels $(pkg-config --cflags lua5.4 jansson)"
n=0
for header in engine/*.h kernels/*.h kernels/ladder/*.h; do
    # shellcheck disable=SC2086
    echo "#include \"$header\"" | gcc -std=c17 -D_POSIX_C_SOURCE=200809L $flags -I. -x c -
    n=$((n + 1))
done
for header in kernels/*.h kernels/ladder/*.h; do
    # shellcheck disable=SC2086
    echo "#include \"$header\"" | g++ -std=c++17 $flags -I. -x c++ -
    n=$((n + 1))
done
echo "$n passed, 0 failed"
