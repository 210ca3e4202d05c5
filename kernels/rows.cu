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

struct copies {
    rows_copy of[ROWS_COPIES_MAX];
};

// blockIdx.y: which copy. Ids stand at the beginning of copy 0.
__global__ void __launch_bounds__(kThreads)
    upload(copies list, const draw_result *drawn, int32_t n_tokens) {
    const rows_copy c = list.of[blockIdx.y];
    const int64_t n = c.bytes / 16;
    for (int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x; i < n;
         i += int64_t{gridDim.x} * kThreads) {
        int4 v = static_cast<const int4 *>(c.from)[i];
        if (blockIdx.y == 0 && 4 * i < n_tokens) {
            int *id[] = {&v.x, &v.y, &v.z, &v.w};
#pragma unroll
            for (int k = 0; k < 4; k++)
                if (4 * i + k < n_tokens && *id[k] < 0) *id[k] = drawn[-1 - *id[k]].token;
        }
        static_cast<int4 *>(c.to)[i] = v;
    }
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

extern "C" status kernel_rows_upload(const rows_copy *copy, int32_t n, int32_t n_tokens,
                                     const draw_result *drawn, kernel_stream stream) {
    if (n < 1 || n > ROWS_COPIES_MAX) return FAIL(ST_SHAPE, "rows: %d copies", n);
    copies list = {};
    int64_t most = 0;
    for (int32_t i = 0; i < n; i++) {
        list.of[i] = copy[i];
        if (copy[i].bytes % 16) return FAIL(ST_SHAPE, "rows: a copy is no multiple of 16 bytes");
        most = copy[i].bytes > most ? copy[i].bytes : most;
    }
    const int64_t blocks = div_up(most, 16 * kThreads); // enough of the bus is busy with 64
    const dim3 grid((unsigned)(blocks < 1 ? 1 : blocks < 64 ? blocks : 64), (unsigned)n);
    upload<<<grid, kThreads, 0, stream>>>(list, drawn, n_tokens);
    return launched("rows");
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
