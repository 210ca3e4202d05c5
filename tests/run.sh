#!/bin/sh
# Run every test under the build folder $1 from the root of the checkout; end with one line of counts.
# Each program's own closing lines are kept in $1/tests/<name>.log.
set -u
out=$1
passed=0
failed=0
CMOCKA_MESSAGE_OUTPUT=STDOUT
OMP_WAIT_POLICY=passive # as main.c has it
AMALGAM_BINARY=$out/amalgam # for tests of the command itself
export CMOCKA_MESSAGE_OUTPUT OMP_WAIT_POLICY AMALGAM_BINARY

one() { # name, command...
    name=$1
    shift
    started=$(date +%s)
    if "$@" >"$out/tests/$name.log" 2>&1; then
        passed=$((passed + 1))
        echo "  ok    $name ($(($(date +%s) - started)) s)"
    else
        failed=$((failed + 1))
        echo "  FAIL  $name (log: $out/tests/$name.log)"
        grep -E 'FAILED|ERROR|error|allowed|expected|is not' "$out/tests/$name.log" | head -20
    fi
}

mkdir -p "$out/tests"
for source in tests/test_*.c; do
    name=$(basename "$source" .c)
    one "$name" "$out/tests/$name"
done
for source in tests/fuzz/fuzz_*.c; do
    name=$(basename "$source" .c)
    one "$name" "$out/tests/$name" "tests/fuzz/corpus/${name#fuzz_}"
done
for script in tests/check_*.lua tests/test_*.lua; do
    [ -e "$script" ] && one "$(basename "$script" .lua)" "$out/amalgam" lua "$script"
done
for script in tests/check_*.sh tests/test_*.sh; do
    [ -e "$script" ] && one "$(basename "$script" .sh)" "$script" "$out"
done
echo "$passed passed, $failed failed"
[ "$failed" -eq 0 ]
