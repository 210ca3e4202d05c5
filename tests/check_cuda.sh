#!/bin/sh
# House rule: kernels compile for every architecture that `make` builds where a GPU is, of which a
# developer's CUDA_ARCH=90a is one. Without optimisation, as far as PTX.
set -eu
nvcc=${CUDA:-/usr/local/cuda}/bin/nvcc
[ -x "$nvcc" ] || { echo "0 passed, 0 failed, 1 skipped: no nvcc"; exit 0; }
out=$1/tests/cuda
mkdir -p "$out"
for arch in 80 89; do # 86 takes the branches of 80
    for source in kernels/*.cu kernels/ladder/*.cu; do
        echo "$arch $source $out/$(basename "$source").$arch.ptx"
    done
done >"$out/list"
# shellcheck disable=SC2016
xargs -P "$(nproc)" -L 1 sh -c '"$0" -std=c++17 -Xcicc -O0 -Xcompiler -iquoteengine,-iquotekernels \
    -ptx -arch=compute_"$1" "$2" -o "$3"' "$nvcc" <"$out/list"
echo "$(wc -l <"$out/list") passed, 0 failed"
