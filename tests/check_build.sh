#!/bin/sh
# House rule: whoever includes a generated file is compiled after it is made, also by `make -j` on a
# clean clone: asked of make itself, for a build folder that does not exist.
set -eu
count=0
folder=build/none
for name in $(sed -n 's/^\$(B)\/generated\/\(.*\.\(h\|def\)\):.*/\1/p' Makefile); do
    for source in $(grep -l "#include \"$name\"" engine/*.c kernels/*.c); do
        recipes=$(make -n INNER=1 B=$folder O=$folder "$folder/${source%.c}.o")
        case $recipes in
            *"generated/$name.new"*"-c $source"*) count=$((count + 1)) ;;
            *)
                echo "$source: $name need not be there when it is compiled"
                exit 1
                ;;
        esac
    done
done
[ "$count" -gt 3 ]

# What cannot be built is said before anything is compiled.
said() {
    if words=$(make -n "$@" 2>&1); then
        echo "make $*: not refused"
        exit 1
    fi
    case $words in
        *"$wanted"*) count=$((count + 1)) ;;
        *)
            echo "make $*: $words"
            exit 1
            ;;
    esac
}
wanted='there is no /no/toolkit/bin/nvcc: CUDA=DIR names the toolkit' said CUDA_ARCH=90a CUDA=/no/toolkit build
wanted='MODE=foo is none of release debug asan tsan' said MODE=foo build
make -n CUDA_ARCH= CUDA=/no/toolkit help > /dev/null
echo "$count passed, 0 failed"
