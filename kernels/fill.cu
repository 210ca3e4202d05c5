// fill.cu - element by element: synthetic weights, conversions, angles. Runs at load, never in a
// step.
#include "fill.h"
#include "traits.cuh"

#define FILL_INSTANCES(X) X(F32) X(F16) X(BF16)

namespace {

constexpr int kThreads = 256;

unsigned blocks_for(int64_t n) {
    const int64_t most = 1 << 20; // grid-stride loops take the rest
    return (unsigned)(div_up(n, kThreads) < most ? div_up(n, kThreads) : most);
}

__device__ __forceinline__ int64_t first() { return int64_t{blockIdx.x} * kThreads + threadIdx.x; }
__device__ __forceinline__ int64_t step() { return int64_t{gridDim.x} * kThreads; }

// weights.h: the sum of eight 16-bit halves, centred.
__device__ __forceinline__ float noise(uint64_t seed, uint64_t counter) {
    uint32_t word[4];
    philox_block(seed, counter, word);
    int sum = 0;
#pragma unroll
    for (int i = 0; i < 4; i++) sum += (int)(word[i] & 0xffff) + (int)(word[i] >> 16);
    return __fmul_rn((float)(2 * sum - 8 * 65535), 9.344062e-6f);
}

template <typename T>
__global__ void __launch_bounds__(kThreads)
    fill_noise(T *out, int64_t n, uint64_t seed, uint64_t at, float scale, float mean) {
    for (int64_t i = first(); i < n; i += step())
        out[i] = from_f32<T>(__fmaf_rn(scale, noise(seed, at + (uint64_t)i), mean));
}

__global__ void __launch_bounds__(kThreads) fill_finite(uint4 *out, int64_t n, uint64_t seed) {
    constexpr uint32_t mask = 0xbbbbbbbbu;
    for (int64_t i = first(); i < n; i += step()) {
        uint32_t word[4];
        philox_block(seed, (uint64_t)i, word);
        out[i] = make_uint4(word[0] & mask, word[1] & mask, word[2] & mask, word[3] & mask);
    }
}

template <typename T, typename S>
__global__ void __launch_bounds__(kThreads)
    fill_convert(T *out, const S *in, int64_t n, int32_t cols, int64_t row_stride,
                 int64_t col_stride) {
    for (int64_t i = first(); i < n; i += step())
        out[i] = from_f32<T>(to_f32(in[i / cols * row_stride + i % cols * col_stride]));
}

__global__ void __launch_bounds__(kThreads)
    fill_angles(float2 *cos_sin, const double *inv_freq, double factor, int64_t n, int32_t half) {
    for (int64_t i = first(); i < n; i += step()) {
        double s, c;
        sincos((double)(i / half) * inv_freq[i % half], &s, &c);
        cos_sin[i] = make_float2((float)(factor * c), (float)(factor * s));
    }
}

template <typename T>
status convert_to(T *out, const void *in, dtype in_type, int64_t n, int32_t cols,
                  int64_t row_stride, int64_t col_stride, cudaStream_t s) {
    switch (in_type) {
#define X(name)                                                                                    \
    case DT_##name:                                                                                \
        fill_convert<<<blocks_for(n), kThreads, 0, s>>>(                                           \
            out, static_cast<const element<DT_##name>::type *>(in), n, cols, row_stride,           \
            col_stride);                                                                           \
        return launched("fill_convert");
        FILL_INSTANCES(X)
#undef X
    default: return FAIL(ST_UNSUPPORTED, "fill_convert: elements of %s", dtype_text(in_type));
    }
}

} // namespace

extern "C" status kernel_fill_noise(void *out, dtype type, int64_t n, uint64_t seed, uint64_t at,
                                    float scale, float mean, kernel_stream stream) {
    if (n < 0) return FAIL(ST_SHAPE, "fill_noise: %lld elements", (long long)n);
    if (n == 0) return ST_OK;
    switch (type) {
#define X(name)                                                                                    \
    case DT_##name:                                                                                \
        fill_noise<<<blocks_for(n), kThreads, 0, stream>>>(                                        \
            static_cast<element<DT_##name>::type *>(out), n, seed, at, scale, mean);               \
        return launched("fill_noise");
        FILL_INSTANCES(X)
#undef X
    default: return FAIL(ST_UNSUPPORTED, "fill_noise: elements of %s", dtype_text(type));
    }
}

extern "C" status kernel_fill_finite(void *out, int64_t bytes, uint64_t seed,
                                     kernel_stream stream) {
    if (bytes < 0 || bytes % 16) return FAIL(ST_SHAPE, "fill_finite: %lld bytes", (long long)bytes);
    if (bytes == 0) return ST_OK;
    fill_finite<<<blocks_for(bytes / 16), kThreads, 0, stream>>>(static_cast<uint4 *>(out),
                                                                 bytes / 16, seed);
    return launched("fill_finite");
}

extern "C" status kernel_fill_convert(void *out, dtype type, const void *in, dtype in_type,
                                      int64_t rows, int32_t cols, int64_t row_stride,
                                      int64_t col_stride, kernel_stream stream) {
    if (rows < 0 || cols < 1)
        return FAIL(ST_SHAPE, "fill_convert [%lld, %d]", (long long)rows, cols);
    if (rows == 0) return ST_OK;
    switch (type) {
#define X(name)                                                                                    \
    case DT_##name:                                                                                \
        return convert_to(static_cast<element<DT_##name>::type *>(out), in, in_type, rows * cols,  \
                          cols, row_stride, col_stride, stream);
        FILL_INSTANCES(X)
#undef X
    default: return FAIL(ST_UNSUPPORTED, "fill_convert: elements of %s", dtype_text(type));
    }
}

extern "C" status kernel_fill_angles(float *cos_sin, const double *inv_freq, double factor,
                                     int32_t n, int32_t half, kernel_stream stream) {
    if (n < 0 || half < 1) return FAIL(ST_SHAPE, "fill_angles: %d x %d", n, half);
    if (n == 0) return ST_OK;
    fill_angles<<<blocks_for((int64_t)n * half), kThreads, 0, stream>>>(
        reinterpret_cast<float2 *>(cos_sin), inv_freq, factor, (int64_t)n * half, half);
    return launched("fill_angles");
}
