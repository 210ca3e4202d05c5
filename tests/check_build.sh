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
echo "$count passed, 0 failed"
