// unpack.cu - fields of words to rows of codes. Runs at load.
//
// A block makes 32 rows x 64 words of the result. Lanes go along n when they read, which is how
// words lie that are packed along n (AWQ) or stored by k (GPTQ), and along k when they write; rows
// that lie along k already are copied.
#include "quantize.cuh"
#include "unpack.h"

namespace {

constexpr int kThreads = 256, kRows = 32, kWords = 64;

__device__ __forceinline__ uint32_t word_at(const unpack_fields &f, int64_t i) {
    return f.word_bits == 32 ? static_cast<const uint32_t *>(f.word)[i]
                             : static_cast<const uint8_t *>(f.word)[i];
}

// Column 8 c + j of AWQ lies in slot 0 4 1 5 2 6 3 7 [j].
__device__ __forceinline__ int slot_of(const unpack_fields &f, int n) {
    const int j = n % f.n_per;
    return f.awq_order ? j / 2 + j % 2 * 4 : j;
}

__device__ __forceinline__ uint32_t field_at(const unpack_fields &f, int n, int k) {
    const int slot = f.k_per > 1 ? k % f.k_per : slot_of(f, n);
    const int64_t at = n / f.n_per * f.n_stride + k / f.k_per * f.k_stride;
    return word_at(f, at) >> (f.bits * slot) & ((1u << f.bits) - 1);
}

// words: of a row of the result, 32 bits each; flip: four times.
__global__ void __launch_bounds__(kThreads)
    unpack(uint32_t *out, unpack_fields f, int rows, int words, uint32_t flip) {
    __shared__ uint32_t tile[kRows][kWords + 1];
    const int row0 = (int)blockIdx.y * kRows, word0 = (int)blockIdx.x * kWords;
    const int lane = (int)threadIdx.x % 32, warp = (int)threadIdx.x / 32, per = 32 / f.bits;
    const int n = f.row + (row0 + lane) * f.row_step;
    if (row0 + lane < rows) {
        for (int w = warp; w < kWords && word0 + w < words; w += kThreads / 32) {
            const int k = (word0 + w) * per;
            uint32_t word = 0;
            if (f.k_per == per)
                word = word_at(f, n * f.n_stride + k / per * f.k_stride);
            else
                for (int i = 0; i < per; i++) word |= field_at(f, n, k + i) << (i * f.bits);
            tile[lane][w] = word ^ flip;
        }
    }
    __syncthreads();
    for (int i = (int)threadIdx.x; i < kRows * kWords; i += kThreads) {
        const int r = i / kWords, w = i % kWords;
        if (row0 + r < rows && word0 + w < words)
            out[int64_t{row0 + r} * words + word0 + w] = tile[r][w];
    }
}

// Rows of `words` 32-bit words that lie `stride` words apart.
__global__ void __launch_bounds__(kThreads)
    copy_rows(uint32_t *out, const uint32_t *from, int64_t stride, int rows, int words,
              uint32_t flip) {
    const int w = (int)(blockIdx.x * kThreads + threadIdx.x);
    for (int r = (int)blockIdx.y; r < rows && w < words; r += (int)gridDim.y)
        out[int64_t{r} * words + w] = from[r * stride + w] ^ flip;
}

__global__ void __launch_bounds__(kThreads)
    unpack_zeros(uint8_t *out, unpack_fields f, int64_t n, int groups, int add) {
    const int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x;
    if (i >= n) return;
    const int row = f.row + (int)(i / groups) * f.row_step;
    out[i] = (uint8_t)((field_at(f, row, (int)(i % groups)) + add) & ((1u << f.bits) - 1));
}

template <typename S> __device__ __forceinline__ void store_scale(__half *to, S x) {
    const float s = to_f32(x);
    *to = __float2half_rn(s > 65504.f ? 65504.f : s);
}
template <typename S> __device__ __forceinline__ void store_scale(float *to, S x) {
    *to = to_f32(x);
}
__device__ __forceinline__ void store_scale(uint8_t *to, uint8_t code) { *to = code; }

template <typename T, typename S>
__global__ void __launch_bounds__(kThreads)
    convert_scales(T *out, unpack_scales s, int64_t n, int groups) {
    const int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x;
    if (i >= n) return;
    const int64_t block = (s.row + i / groups * s.row_step) / s.block_n;
    const int64_t at = block * s.n_stride + i % groups * s.g_stride;
    store_scale(out + i, static_cast<const S *>(s.scale)[at]);
}

template <typename T>
status launch_scales(T *out, const unpack_scales &s, int rows, int groups, cudaStream_t stream) {
    const int64_t n = int64_t{rows} * groups;
    const unsigned blocks = (unsigned)div_up(n, kThreads);
    switch (s.type) {
    case DT_F32:
        convert_scales<T, float><<<blocks, kThreads, 0, stream>>>(out, s, n, groups);
        break;
    case DT_F16:
        convert_scales<T, __half><<<blocks, kThreads, 0, stream>>>(out, s, n, groups);
        break;
    case DT_BF16:
        convert_scales<T, __nv_bfloat16><<<blocks, kThreads, 0, stream>>>(out, s, n, groups);
        break;
    default: return FAIL(ST_UNSUPPORTED, "unpack: scales of %s", dtype_text(s.type));
    }
    return launched("unpack");
}

__device__ __forceinline__ float scale_at(const unpack_scales &s, int64_t i) {
    switch (s.type) {
    case DT_F16: return to_f32(static_cast<const __half *>(s.scale)[i]);
    case DT_BF16: return to_f32(static_cast<const __nv_bfloat16 *>(s.scale)[i]);
    case DT_E4M3: return f32_of_e4m3(static_cast<const uint8_t *>(s.scale)[i]);
    case DT_UE8M0: return f32_of_ue8m0(static_cast<const uint8_t *>(s.scale)[i]);
    default: return static_cast<const float *>(s.scale)[i];
    }
}

__device__ __forceinline__ float code_value(dtype type, uint32_t code) {
    switch (type) {
    case DT_I8: return (float)(int8_t)code;
    case DT_E4M3: return f32_of_e4m3((uint8_t)code);
    case DT_E2M1: return f32_of_e2m1((int)code);
    default: return (float)code;
    }
}

template <typename T>
__global__ void __launch_bounds__(kThreads)
    unpack_values(T *out, unpack_matrix m, int64_t n, int k) {
    const int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x;
    if (i >= n) return;
    const int r = (int)(i / k), c = (int)(i % k), g = m.group_of ? m.group_of[c] : c / m.group;
    const unpack_scales &s = m.scale;
    const int64_t block = (s.row + int64_t{r} * s.row_step) / s.block_n;
    const float scale = scale_at(s, block * s.n_stride + g * s.g_stride);
    int zero = m.middle;
    if (m.zero.word)
        zero = (int)(field_at(m.zero, m.zero.row + r * m.zero.row_step, g) + m.zero_add) &
               ((1 << m.zero.bits) - 1);
    const float x = code_value(m.code_type, field_at(m.code, m.code.row + r * m.code.row_step, c));
    out[i] = from_f32<T>(__fmul_rn(__fmul_rn(x - (float)zero, scale), m.global_scale));
}

template <typename T>
status launch_values(T *out, const unpack_matrix &m, int rows, int k, cudaStream_t stream) {
    const int64_t n = int64_t{rows} * k;
    unpack_values<T><<<(unsigned)div_up(n, kThreads), kThreads, 0, stream>>>(out, m, n, k);
    return launched("unpack");
}

} // namespace

extern "C" status kernel_unpack_values(void *out, dtype type, const unpack_matrix *m, int32_t rows,
                                       int32_t k, kernel_stream stream) {
    if (rows == 0) return ST_OK;
    switch (type) {
    case DT_F32: return launch_values(static_cast<float *>(out), *m, rows, k, stream);
    case DT_F16: return launch_values(static_cast<__half *>(out), *m, rows, k, stream);
    case DT_BF16: return launch_values(static_cast<__nv_bfloat16 *>(out), *m, rows, k, stream);
    default: return FAIL(ST_UNSUPPORTED, "unpack: values of %s", dtype_text(type));
    }
}

extern "C" status kernel_unpack_codes(uint8_t *out, const unpack_fields *f, int32_t rows, int32_t k,
                                      uint8_t flip, kernel_stream stream) {
    if (rows < 0 || k < 8 || k % 8) return FAIL(ST_SHAPE, "unpack: %d x %d codes", rows, k);
    if (rows == 0) return ST_OK;
    const int words = k * f->bits / 32;
    const uint32_t flips = flip * 0x01010101u;
    const int64_t stride = f->n_stride * f->word_bits / 32; // of 32-bit words
    uint32_t *to = reinterpret_cast<uint32_t *>(out);
    const bool along_k = f->n_per == 1 && f->k_stride == 1 && f->k_per * f->bits == f->word_bits &&
                         f->n_stride * f->word_bits % 32 == 0;
    if (along_k) {
        const dim3 grid((unsigned)div_up(words, kThreads), (unsigned)(rows < 65535 ? rows : 65535));
        copy_rows<<<grid, kThreads, 0, stream>>>(
            to, static_cast<const uint32_t *>(f->word) + f->row * stride, f->row_step * stride,
            rows, words, flips);
        return launched("unpack");
    }
    const dim3 grid((unsigned)div_up(words, kWords), (unsigned)div_up(rows, kRows));
    if (grid.y > 65535) return FAIL(ST_SHAPE, "unpack: %d rows", rows);
    unpack<<<grid, kThreads, 0, stream>>>(to, *f, rows, words, flips);
    return launched("unpack");
}

extern "C" status kernel_unpack_zeros(uint8_t *out, const unpack_fields *f, int32_t rows,
                                      int32_t groups, int32_t add, kernel_stream stream) {
    const int64_t n = int64_t{rows} * groups;
    if (n == 0) return ST_OK;
    unpack_zeros<<<(unsigned)div_up(n, kThreads), kThreads, 0, stream>>>(out, *f, n, groups, add);
    return launched("unpack");
}

extern "C" status kernel_unpack_scales(void *out, dtype out_type, const unpack_scales *s,
                                       int32_t rows, int32_t groups, kernel_stream stream) {
    const int64_t n = int64_t{rows} * groups;
    if (n == 0) return ST_OK;
    if (out_type == DT_F16)
        return launch_scales(static_cast<__half *>(out), *s, rows, groups, stream);
    if (out_type == DT_F32)
        return launch_scales(static_cast<float *>(out), *s, rows, groups, stream);
    if (out_type != s->type) return FAIL(ST_UNSUPPORTED, "unpack: scales of another type");
    convert_scales<uint8_t, uint8_t><<<(unsigned)div_up(n, kThreads), kThreads, 0, stream>>>(
        static_cast<uint8_t *>(out), *s, n, groups);
    return launched("unpack");
}
