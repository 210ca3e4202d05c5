// rows.cu - one block a row; 16 bytes a thread where rows are aligned to that.
#include "rows.h"
#include "traits.cuh"

namespace {

constexpr int kThreads = 128;

// V: uint4 (eight elements) or unsigned short (one).
template <typename V>
__global__ void __launch_bounds__(kThreads)
    copy_rows(V *out, const V *table, const int32_t *row, int32_t units) {
    follow_previous();
    V *to = out + int64_t{blockIdx.x} * units;                // [units]
    const V *from = table + int64_t{row[blockIdx.x]} * units; // [units]
    for (int i = (int)threadIdx.x; i < units; i += kThreads) to[i] = from[i];
}

} // namespace

extern "C" status kernel_rows(void *out, const void *table, const int32_t *row, int64_t n,
                              int32_t cols, kernel_stream stream) {
    if (n < 0 || n > INT32_MAX || cols <= 0)
        return FAIL(ST_SHAPE, "rows: %lld x %d", (long long)n, cols);
    if (n == 0) return ST_OK;
    if (cols % 8 == 0)
        return launch_early("rows", copy_rows<uint4>, (unsigned)n, kThreads, stream,
                            static_cast<uint4 *>(out), static_cast<const uint4 *>(table), row,
                            cols / 8);
    return launch_early("rows", copy_rows<unsigned short>, (unsigned)n, kThreads, stream,
                        static_cast<unsigned short *>(out),
                        static_cast<const unsigned short *>(table), row, cols);
}
