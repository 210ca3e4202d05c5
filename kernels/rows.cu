// rows.cu - one block a row; 16 bytes a thread where rows are aligned to that.
#include "rows.h"
#include "traits.cuh"

namespace {

constexpr int kThreads = 128;

// V: uint4 (eight elements) or unsigned short (one).
template <typename V>
__global__ void __launch_bounds__(kThreads)
    copy_rows(V *out, const V *table, const int32_t *row, int32_t units) {
    V *to = out + int64_t{blockIdx.x} * units;                // [units]
    const V *from = table + int64_t{row[blockIdx.x]} * units; // [units]
    for (int i = (int)threadIdx.x; i < units; i += kThreads) to[i] = from[i];
}

__global__ void __launch_bounds__(kThreads)
    feed_drawn(int32_t *token, const draw_result *drawn, int32_t n) {
    const int i = (int)(blockIdx.x * kThreads + threadIdx.x);
    if (i < n && token[i] < 0) token[i] = drawn[-1 - token[i]].token;
}

} // namespace

extern "C" status kernel_rows(void *out, const void *table, const int32_t *row, int64_t n,
                              int32_t cols, kernel_stream stream) {
    if (n < 0 || n > INT32_MAX || cols <= 0)
        return FAIL(ST_SHAPE, "rows: %lld x %d", (long long)n, cols);
    if (n == 0) return ST_OK;
    if (cols % 8 == 0)
        copy_rows<<<(unsigned)n, kThreads, 0, stream>>>(
            static_cast<uint4 *>(out), static_cast<const uint4 *>(table), row, cols / 8);
    else
        copy_rows<<<(unsigned)n, kThreads, 0, stream>>>(static_cast<unsigned short *>(out),
                                                        static_cast<const unsigned short *>(table),
                                                        row, cols);
    return launched("rows");
}

extern "C" status kernel_rows_feed(int32_t *token, const draw_result *drawn, int64_t n,
                                   kernel_stream stream) {
    if (n < 0 || n > INT32_MAX) return FAIL(ST_SHAPE, "rows: %lld tokens to feed", (long long)n);
    if (n == 0) return ST_OK;
    feed_drawn<<<(unsigned)div_up(n, kThreads), kThreads, 0, stream>>>(token, drawn, (int32_t)n);
    return launched("rows");
}
