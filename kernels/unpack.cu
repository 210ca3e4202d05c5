// unpack.cu - fields of words to rows of codes, or to values. Runs at load.
//
// A block takes 64 rows x 32 words of the result through shared memory: it reads with lanes along n
// or along k, whichever way the file's words lie (packed along n, as AWQ, or stored by k, as GPTQ;
// along k, as the others), and writes with lanes along k.
#include "quantize.cuh"
#include "unpack.h"

namespace {

constexpr int kThreads = 256, kRows = 64, kWords = 32;

__device__ __forceinline__ uint32_t word_at(const unpack_fields &f, int64_t i) {
    return f.word_bits == 32 ? static_cast<const uint32_t *>(f.word)[i]
                             : static_cast<const uint8_t *>(f.word)[i];
}

// Column 8 c + j of AWQ lies in slot 0 4 1 5 2 6 3 7 [j].
__device__ __forceinline__ int slot_of(const unpack_fields &f, int j) {
    return f.awq_order ? j / 2 + j % 2 * 4 : j;
}

__device__ __forceinline__ uint32_t field_at(const unpack_fields &f, int n, int k) {
    const int slot = f.k_per > 1 ? k % f.k_per : slot_of(f, n % f.n_per);
    const int64_t at = n / f.n_per * f.n_stride + k / f.k_per * f.k_stride;
    return word_at(f, at) >> (f.bits * slot) & ((1u << f.bits) - 1);
}

// Rows lie one after the other, a whole number of 32-bit words apart.
__device__ __forceinline__ bool lies_along_k(const unpack_fields &f) {
    return f.n_per == 1 && f.k_stride == 1 && f.k_per * f.bits == f.word_bits &&
           f.n_stride * f.word_bits % 32 == 0;
}

// Codes of a block, in 32-bit words as they lie in the result.
struct code_tile {
    uint32_t word[kRows][kWords + 1];
};

__device__ __forceinline__ bool inside(int rows, int words, int r, int w) {
    return (int)blockIdx.y * kRows + r < rows && (int)blockIdx.x * kWords + w < words;
}

// PER: fields of 32 bits. The word that begins at (n, k0), of k fields in all.
template <int PER>
__device__ __forceinline__ uint32_t word_of_fields(const unpack_fields &f, int n, int k0, int k) {
    if (f.k_per == PER) return word_at(f, n * f.n_stride + k0 / PER * f.k_stride);
    uint32_t word = 0;
    for (int j = 0; j < PER && k0 + j < k; j++) word |= field_at(f, n, k0 + j) << (32 / PER * j);
    return word;
}

// Rows n to n + PER - 1, where a word of the file holds a column of them.
template <int PER>
__device__ __forceinline__ void words_of_columns(uint32_t (&word)[PER], const unpack_fields &f,
                                                 int n, int k0, int k) {
    constexpr int kBits = 32 / PER;
    const int64_t at = n / PER * f.n_stride;
#pragma unroll
    for (int r = 0; r < PER; r++) word[r] = 0;
#pragma unroll
    for (int j = 0; j < PER; j++) {
        const uint32_t column = k0 + j < k ? word_at(f, at + (k0 + j) * f.k_stride) : 0;
#pragma unroll
        for (int r = 0; r < PER; r++)
            word[r] |= (column >> (kBits * slot_of(f, r)) & ((1u << kBits) - 1)) << (kBits * j);
    }
}

template <int PER>
__device__ __forceinline__ void read_tile(code_tile *t, const unpack_fields &f, int rows, int words,
                                          int k) {
    const int row0 = (int)blockIdx.y * kRows, word0 = (int)blockIdx.x * kWords;
    const int64_t stride = f.n_stride * f.word_bits / 32;
    if (f.n_per == PER && f.row_step == 1 && f.row % PER == 0) {
        for (int i = (int)threadIdx.x; i < kRows / PER * kWords; i += kThreads) {
            const int r = i % (kRows / PER) * PER, w = i / (kRows / PER);
            uint32_t word[PER];
            if (!inside(rows, words, r, w)) continue;
            words_of_columns<PER>(word, f, f.row + row0 + r, (word0 + w) * PER, k);
            for (int j = 0; j < PER; j++) t->word[r + j][w] = word[j];
        }
    } else if (lies_along_k(f)) {
        for (int i = (int)threadIdx.x; i < kRows * kWords; i += kThreads) {
            const int r = i / kWords, w = i % kWords, n = f.row + (row0 + r) * f.row_step;
            if (inside(rows, words, r, w))
                t->word[r][w] = static_cast<const uint32_t *>(f.word)[n * stride + word0 + w];
        }
    } else {
        for (int i = (int)threadIdx.x; i < kRows * kWords; i += kThreads) {
            const int r = i % kRows, w = i / kRows, n = f.row + (row0 + r) * f.row_step;
            if (inside(rows, words, r, w))
                t->word[r][w] = word_of_fields<PER>(f, n, (word0 + w) * PER, k);
        }
    }
    __syncthreads();
}

// words: of a row of the result; flip: of a code, four times.
template <int PER>
__global__ void __launch_bounds__(kThreads)
    unpack_codes(uint32_t *out, unpack_fields f, int rows, int words, int k, uint32_t flip) {
    __shared__ code_tile t;
    read_tile<PER>(&t, f, rows, words, k);
    for (int i = (int)threadIdx.x; i < kRows * kWords; i += kThreads) {
        const int r = i / kWords, w = i % kWords;
        if (!inside(rows, words, r, w)) continue;
        const int64_t row = (int)blockIdx.y * kRows + r;
        out[row * words + (int)blockIdx.x * kWords + w] = t.word[r][w] ^ flip;
    }
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

// Scale and zero point of group g in row r of the result.
struct group_scale {
    float scale, zero;
};
__device__ __forceinline__ group_scale scale_of_group(const unpack_matrix &m, int r, int g) {
    const unpack_scales &s = m.scale;
    const int64_t block = (s.row + r * s.row_step) / s.block_n;
    int zero = m.middle;
    if (m.zero.word)
        zero = (int)(field_at(m.zero, m.zero.row + r * m.zero.row_step, g) + m.zero_add) &
               ((1 << m.zero.bits) - 1);
    return {scale_at(s, block * s.n_stride + g * s.g_stride), (float)zero};
}

// PER: codes of a word. A thread takes a word at a time and looks a scale up where the group
// changes.
template <typename T, int PER>
__global__ void __launch_bounds__(kThreads)
    unpack_values(T *out, unpack_matrix m, int rows, int words, int k) {
    using vector = std::conditional_t<PER * sizeof(T) % 16 == 0, uint4, uint2>;
    constexpr int kBits = 32 / PER, kVectors = PER * sizeof(T) / sizeof(vector);
    __shared__ code_tile t;
    read_tile<PER>(&t, m.code, rows, words, k);
    for (int i = (int)threadIdx.x; i < kRows * kWords; i += kThreads) {
        const int r = i / kWords, w = i % kWords;
        if (!inside(rows, words, r, w)) continue;
        const int row = (int)blockIdx.y * kRows + r, k0 = ((int)blockIdx.x * kWords + w) * PER;
        alignas(16) T value[PER];
        group_scale s = {};
        int last = -1;
#pragma unroll
        for (int j = 0; j < PER; j++) {
            const int c = min(k0 + j, k - 1), g = m.group_of ? m.group_of[c] : c / m.group;
            if (g != last) s = scale_of_group(m, row, g);
            last = g;
            const uint32_t code = t.word[r][w] >> (j * kBits) & ((1u << kBits) - 1);
            const float x = code_value(m.code_type, code) - s.zero;
            value[j] = from_f32<T>(__fmul_rn(__fmul_rn(x, s.scale), m.global_scale));
        }
        T *to = out + int64_t{row} * k + k0;
        if (k % PER == 0)
            for (int j = 0; j < kVectors; j++)
                reinterpret_cast<vector *>(to)[j] = reinterpret_cast<const vector *>(value)[j];
        else
            for (int j = 0; j < PER && k0 + j < k; j++) to[j] = value[j];
    }
}

status grid_of(dim3 *grid, int rows, int words) {
    *grid = dim3((unsigned)div_up(words, kWords), (unsigned)div_up(rows, kRows));
    return grid->y <= 65535 ? ST_OK : FAIL(ST_SHAPE, "unpack: %d rows", rows);
}

template <typename T>
status launch_values(T *out, const unpack_matrix &m, int rows, int k, cudaStream_t stream) {
    const int words = (int)div_up(k, 32 / m.code.bits);
    dim3 grid;
    TRY(grid_of(&grid, rows, words));
    if (m.code.bits == 4)
        unpack_values<T, 8><<<grid, kThreads, 0, stream>>>(out, m, rows, words, k);
    else
        unpack_values<T, 4><<<grid, kThreads, 0, stream>>>(out, m, rows, words, k);
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
    dim3 grid;
    TRY(grid_of(&grid, rows, words));
    const uint32_t flips = flip * 0x01010101u;
    uint32_t *to = reinterpret_cast<uint32_t *>(out);
    if (f->bits == 4)
        unpack_codes<8><<<grid, kThreads, 0, stream>>>(to, *f, rows, words, k, flips);
    else
        unpack_codes<4><<<grid, kThreads, 0, stream>>>(to, *f, rows, words, k, flips);
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
