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
    const V *from = table + int64_t{row[blockIdx.x]} * units; // [units]; `row` is of the step
    follow_previous();
    for (int i = (int)threadIdx.x; i < units; i += kThreads) to[i] = from[i];
}

template <typename V>
status copy(void *out, const void *table, const int32_t *row, int64_t n, int32_t units,
            cudaStream_t stream) {
    V *to = static_cast<V *>(out);
    const V *from = static_cast<const V *>(table);
    return launch_early("rows", copy_rows<V>, (unsigned)n, kThreads, stream, to, from, row, units);
}

// blockIdx.y: row, blockIdx.z: part.
__global__ void __launch_bounds__(kThreads) join(float *out, const float *part, int32_t width) {
    const int64_t rows = gridDim.y, r = blockIdx.y, p = blockIdx.z;
    float *to = out + (r * gridDim.z + p) * width;
    const float *from = part + (p * rows + r) * width;
    for (int i = (int)(blockIdx.x * kThreads + threadIdx.x); i < width;
         i += (int)(gridDim.x * kThreads))
        to[i] = from[i];
}

} // namespace

extern "C" status kernel_rows(void *out, const void *table, const int32_t *row, int64_t n,
                              int32_t cols, kernel_stream stream) {
    if (n < 0 || n > INT32_MAX || cols <= 0)
        return FAIL(ST_SHAPE, "rows: %lld x %d", (long long)n, cols);
    if (n == 0) return ST_OK;
    if (cols % 8 == 0) return copy<uint4>(out, table, row, n, cols / 8, stream);
    return copy<unsigned short>(out, table, row, n, cols, stream);
}

extern "C" status kernel_rows_join(float *out, const float *part, int32_t n_parts, int64_t rows,
                                   int32_t width, kernel_stream stream) {
    if (rows < 0 || rows > 65535 || width < 1 || n_parts < 1)
        return FAIL(ST_SHAPE, "rows: %d parts of %lld x %d", n_parts, (long long)rows, width);
    if (rows == 0) return ST_OK;
    const int64_t blocks = div_up(width, 8 * kThreads); // eight elements a thread
    join<<<dim3((unsigned)blocks, (unsigned)rows, (unsigned)n_parts), kThreads, 0, stream>>>(
        out, part, width);
    return launched("rows");
}
