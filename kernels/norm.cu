// norm.cu - one block a row, the row in registers: it is read once and written once.
#include "norm.h"
#include "traits.cuh"

#define NORM_INSTANCES(X) X(F16) X(BF16)

namespace {

constexpr int kThreadsMax = 1024;

// PACKS: 16-byte pieces that a thread holds. 1 up to 8192 columns, which is every model here.
template <typename T, int PACKS>
__global__ void __launch_bounds__(kThreadsMax)
    norm_add(T *y, T *residual, const T *add, const T *w, int32_t cols, float eps) {
    __shared__ float shared[32];
    const int64_t row = int64_t{blockIdx.x} * cols;
    pack<T> r[PACKS], gain[PACKS];
    float squares = 0.f;
#pragma unroll
    for (int p = 0; p < PACKS; p++) {
        const int col = (p * (int)blockDim.x + (int)threadIdx.x) * pack<T>::n;
        if (col < cols) gain[p] = load_pack(w + col);
    }
    follow_previous();
#pragma unroll
    for (int p = 0; p < PACKS; p++) {
        const int col = (p * (int)blockDim.x + (int)threadIdx.x) * pack<T>::n;
        if (col >= cols) continue;
        r[p] = load_pack(residual + row + col); // [8]
        if (add) {
            const pack<T> a = load_pack(add + row + col);
#pragma unroll
            for (int i = 0; i < pack<T>::n; i++)
                r[p].v[i] = from_f32<T>(to_f32(r[p].v[i]) + to_f32(a.v[i]));
            store_pack(residual + row + col, r[p]);
        }
#pragma unroll
        for (int i = 0; i < pack<T>::n; i++) squares += to_f32(r[p].v[i]) * to_f32(r[p].v[i]);
    }
    const float scale = 1.f / sqrtf(block_sum(squares, shared) / (float)cols + eps);
#pragma unroll
    for (int p = 0; p < PACKS; p++) {
        const int col = (p * (int)blockDim.x + (int)threadIdx.x) * pack<T>::n;
        if (col >= cols) continue;
#pragma unroll
        for (int i = 0; i < pack<T>::n; i++)
            r[p].v[i] = from_f32<T>(to_f32(r[p].v[i]) * scale * to_f32(gain[p].v[i]));
        store_pack(y + row + col, r[p]);
    }
}

template <dtype dt>
status launch(void *y, void *residual, const void *add, const void *w, int64_t rows, int32_t cols,
              float eps, cudaStream_t s) {
    using T = typename element<dt>::type;
    const int packs = cols / pack<T>::n;
    const int each = packs <= kThreadsMax ? 1 : packs <= 2 * kThreadsMax ? 2 : 4;
    const int threads = (packs + each * 32 - 1) / (each * 32) * 32;
    auto *const kernel = each == 1 ? norm_add<T, 1> : each == 2 ? norm_add<T, 2> : norm_add<T, 4>;
    return launch_early("norm_add", kernel, (unsigned)rows, threads, s, static_cast<T *>(y),
                        static_cast<T *>(residual), static_cast<const T *>(add),
                        static_cast<const T *>(w), cols, eps);
}

} // namespace

extern "C" status kernel_norm_add(void *y, void *residual, const void *add, const void *w,
                                  int64_t rows, int32_t cols, float eps, dtype type,
                                  kernel_stream stream) {
    if (rows < 0 || rows > INT32_MAX || cols <= 0 || cols % 8 || cols > 4 * 8 * kThreadsMax)
        return FAIL(ST_SHAPE, "norm_add [%lld, %d]", (long long)rows, cols);
    if (rows == 0) return ST_OK;
    switch (type) {
#define X(name)                                                                                    \
    case DT_##name: return launch<DT_##name>(y, residual, add, w, rows, cols, eps, stream);
        NORM_INSTANCES(X)
#undef X
    default: return FAIL(ST_UNSUPPORTED, "norm_add: elements of %s", dtype_text(type));
    }
}
