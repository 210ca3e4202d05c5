// ladder_linear.cu - see ladder_linear.h. Plain on purpose: each kernel shows one idea, for f16,
// 4-bit weights in groups of 128 with zero points.
#include "ladder_linear.h"

#include "linear_dequant.cuh"
#include "linear_layout.h"
#include "mma_sync.cuh"
#include "traits.cuh"

#include <cstring>
#include <cublas_v2.h>

namespace {

constexpr int kRows = 64, kUnit = 64, kGroup = 128; // rows of W in a tile, inputs of a step
constexpr int kSplitMax = 16;

struct ladder_args {
    const uint8_t *code;  // packed, or checkpoint order [n, k / 2], low nibble first
    const uint8_t *scale; // packed granules
    const __half *scales; // checkpoint order [n, k / 128]
    const uint8_t *zeros;
    const __half *x;
    __half *y;
    float *partial; // [split][m][n]
    int64_t ldx, ldy;
    int32_t m, n, k, splits;
};

__device__ __forceinline__ float weight_of(const ladder_args &a, int32_t n, int32_t k, int code) {
    const int64_t s = (int64_t)n * (a.k / kGroup) + k / kGroup;
    return (float)(code - a.zeros[s]) * __half2float(a.scales[s]);
}

// --- One warp an output ------------------------------------------------------------------------

__global__ void scalar(const ladder_args a) {
    const int64_t i = ((int64_t)blockIdx.x * blockDim.x + threadIdx.x) / 32;
    const int32_t n = (int32_t)(i % a.n), m = (int32_t)(i / a.n);
    if (m >= a.m) return;
    float sum = 0;
    for (int32_t k = threadIdx.x % 32 * 2; k < a.k; k += 64) {
        const uint8_t byte = a.code[((int64_t)n * a.k + k) / 2];
        sum += weight_of(a, n, k, byte & 15) * __half2float(a.x[m * a.ldx + k]);
        sum += weight_of(a, n, k, byte >> 4) * __half2float(a.x[m * a.ldx + k + 1]);
    }
    sum = warp_sum(sum);
    if (threadIdx.x % 32 == 0) a.y[m * a.ldy + n] = __float2half_rn(sum);
}

// --- Tensor cores ------------------------------------------------------------------------------

// One step in shared memory: codes of 64 rows x 64 inputs, x [NT, 64] with its 16-byte chunks
// swapped by row, the packed granule of scales.
template <int NT> struct step {
    static constexpr int code = kRows * kUnit / 2, x = NT * 128, scale = 192;
    static constexpr int bytes = code + x + scale + 64;
};

__device__ __forceinline__ void copy16(uint32_t to, const void *from, bool there) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from),
                 "r"(there ? 16 : 0)
                 : "memory");
}

// Bring step `unit` of tile (tile_n, tile_m): by cp.async when kAsync, else through registers.
template <int NT, bool kPacked, bool kAsync>
__device__ __forceinline__ void load_step(const ladder_args &a, int tile_n, int tile_m, int unit,
                                          uint8_t *to) {
    using S = step<NT>;
    const uint32_t at = (uint32_t)__cvta_generic_to_shared(to);
    const auto copy = [&](uint32_t offset, const void *from, bool there) {
        if (kAsync) {
            copy16(at + offset, from, there);
            return;
        }
        const uint4 v = there ? *static_cast<const uint4 *>(from) : make_uint4(0, 0, 0, 0);
        *reinterpret_cast<uint4 *>(to + offset) = v;
    };
    const int tid = threadIdx.x, units = a.k / kUnit;
    if (kPacked) { // the 2 KB of a block's unit lie together
        const uint8_t *from = a.code + ((int64_t)tile_n * units + unit) * S::code;
        copy(tid * 16, from + tid * 16, true);
        const int64_t granule = (int64_t)tile_n * (a.k / kGroup) + unit * kUnit / kGroup;
        if (tid < 12) copy(S::code + S::x + tid * 16, a.scale + granule * 192 + tid * 16, true);
    } else { // 32 bytes of each row
        const int32_t row = tile_n * kRows + tid / 2;
        copy(tid * 16, a.code + ((int64_t)row * a.k + unit * kUnit) / 2 + tid % 2 * 16, row < a.n);
    }
#pragma unroll
    for (int c = tid; c < NT * 8; c += 128) {
        const int row = c / 8, chunk = c % 8, m = tile_m * NT + row;
        copy(S::code + row * 128 + ((chunk ^ row % 8) << 4),
             a.x + (m < a.m ? m : 0) * a.ldx + unit * kUnit + chunk * 8, m < a.m);
    }
}

// The A fragment of atom j (16 rows x 16 inputs) of this warp's strip.
template <int NT, bool kPacked, bool kFast>
__device__ __forceinline__ void fragment(uint32_t (&f)[4], const ladder_args &a,
                                         const uint8_t *from, int tile_n, int unit, int j) {
    using S = step<NT>;
    const int strip = threadIdx.x / 32, lane = threadIdx.x % 32;
    const uint32_t at = (uint32_t)__cvta_generic_to_shared(from);
    const int place = strip * 16 + lane / 4 * 2;
    if (kPacked && kFast) {
        dequant_scales s;
        dequant_load_scales<__half, WF_INT4>(s, at + S::code + S::x, place, false);
        const uint32_t word = shared_u32(at + strip * 512 + lane * 16 + j * 4);
        dequant_word<__half, WF_INT4>(f, &word, s);
        return;
    }
    const uint32_t word = kPacked ? shared_u32(at + strip * 512 + lane * 16 + j * 4) : 0;
#pragma unroll
    for (int p = 0; p < 4; p++) { // pairs 0 and 2: row g; 1 and 3: row g + 8
        const int row = strip * 16 + lane / 4 + p % 2 * 8, col = j * 16 + lane % 4 * 2 + p / 2 * 8;
        int lo, hi;
        float scale, zero;
        if (kPacked) {
            lo = word >> (4 * p) & 15;
            hi = word >> (4 * p + 16) & 15;
            const uint8_t *granule = from + S::code + S::x;
            scale = __half2float(reinterpret_cast<const __half *>(granule)[place + p % 2]);
            zero = (float)granule[128 + place + p % 2];
        } else {
            const uint8_t byte = from[row * 32 + col / 2];
            lo = byte & 15;
            hi = byte >> 4;
            const int32_t n = min(tile_n * kRows + row, a.n - 1);
            const int64_t s = (int64_t)n * (a.k / kGroup) + unit * kUnit / kGroup;
            scale = __half2float(a.scales[s]);
            zero = (float)a.zeros[s];
        }
        const __half2 h = __floats2half2_rn(((float)lo - zero) * scale, ((float)hi - zero) * scale);
        f[p] = *reinterpret_cast<const uint32_t *>(&h);
    }
}

// A warp a strip of 16 rows, four warps; k is cut over blockIdx.z.
template <int NT, bool kPacked, bool kFast, int kStages>
__global__ void __launch_bounds__(128) tensor(const ladder_args a) {
    using S = step<NT>;
    __shared__ __align__(128) uint8_t shared[kStages * S::bytes];
    const int lane = threadIdx.x % 32, strip = threadIdx.x / 32;
    const int tile_n = blockIdx.x, tile_m = blockIdx.y, units = a.k / kUnit;
    const int first = (int)((int64_t)units * blockIdx.z / a.splits);
    const int last = (int)((int64_t)units * (blockIdx.z + 1) / a.splits);
    float acc[NT / 8][4] = {};
    if (kStages > 1) {
#pragma unroll
        for (int i = 0; i < kStages - 1; i++) {
            if (first + i < last)
                load_step<NT, kPacked, true>(a, tile_n, tile_m, first + i, shared + i * S::bytes);
            asm volatile("cp.async.commit_group;" ::: "memory");
        }
    }
    for (int unit = first; unit < last; unit++) {
        const uint8_t *from = shared + (unit - first) % kStages * S::bytes;
        if (kStages > 1) {
            asm volatile("cp.async.wait_group %0;" ::"n"(kStages - 2) : "memory");
            __syncthreads();
            const int next = unit + kStages - 1;
            if (next < last)
                load_step<NT, kPacked, true>(a, tile_n, tile_m, next,
                                             shared + (next - first) % kStages * S::bytes);
            asm volatile("cp.async.commit_group;" ::: "memory");
        } else {
            __syncthreads();
            load_step<NT, kPacked, false>(a, tile_n, tile_m, unit, shared);
            __syncthreads();
        }
        const uint32_t x = (uint32_t)__cvta_generic_to_shared(from) + S::code;
#pragma unroll
        for (int j = 0; j < 4; j++) {
            uint32_t f[4], b[4];
            fragment<NT, kPacked, kFast>(f, a, from, tile_n, unit, j);
#pragma unroll
            for (int i = 0; i < NT / 16; i++) {
                const int row = i * 16 + lane / 16 * 8 + lane % 8, c = 2 * j + lane / 8 % 2;
                load_matrices(b, x + row * 128 + ((c ^ row % 8) << 4));
#pragma unroll
                for (int h = 0; h < 2; h++)
                    multiply(acc[2 * i + h], f, b[2 * h], b[2 * h + 1], __half{});
            }
        }
    }
#pragma unroll
    for (int i = 0; i < NT / 8; i++)
#pragma unroll
        for (int e = 0; e < 4; e++) {
            const int32_t n = tile_n * kRows + strip * 16 + lane / 4 + e / 2 * 8;
            const int32_t m = tile_m * NT + i * 8 + lane % 4 * 2 + e % 2;
            if (n < a.n && m < a.m)
                a.partial[((int64_t)blockIdx.z * a.m + m) * a.n + n] = acc[i][e];
        }
}

__global__ void add_splits(const ladder_args a) {
    const int64_t i = (int64_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= (int64_t)a.m * a.n) return;
    float sum = 0;
    for (int s = 0; s < a.splits; s++) sum += a.partial[(int64_t)s * a.m * a.n + i];
    a.y[i / a.n * a.ldy + i % a.n] = __float2half_rn(sum);
}

template <int NT, bool kPacked, bool kFast, int kStages>
status run_tiles(ladder_args a, int32_t n_sms, cudaStream_t stream) {
    const int tiles_n = (a.n + kRows - 1) / kRows, tiles_m = (a.m + NT - 1) / NT;
    const int wanted = 4 * n_sms / (tiles_n * tiles_m);
    a.splits = wanted < 1 ? 1 : wanted > kSplitMax ? kSplitMax : wanted;
    tensor<NT, kPacked, kFast, kStages>
        <<<dim3((unsigned)tiles_n, (unsigned)tiles_m, (unsigned)a.splits), 128, 0, stream>>>(a);
    const int64_t outputs = (int64_t)a.m * a.n;
    add_splits<<<(unsigned)((outputs + 255) / 256), 256, 0, stream>>>(a);
    return launched("ladder");
}

template <bool kPacked, bool kFast, int kStages>
status run_tensor(const ladder_args &a, int32_t n_sms, cudaStream_t stream) {
    return a.m <= 16 ? run_tiles<16, kPacked, kFast, kStages>(a, n_sms, stream)
                     : run_tiles<64, kPacked, kFast, kStages>(a, n_sms, stream);
}

status run_scalar(const ladder_args &a, int32_t, cudaStream_t stream) {
    const int64_t warps = (int64_t)a.m * a.n;
    scalar<<<(unsigned)((warps + 7) / 8), 256, 0, stream>>>(a);
    return launched("ladder");
}

// --- Baseline: expand, then cuBLAS -------------------------------------------------------------

__global__ void expand(const ladder_args a, __half *w) { // eight weights a thread
    const int64_t i = ((int64_t)blockIdx.x * blockDim.x + threadIdx.x) * 8;
    if (i >= (int64_t)a.n * a.k) return;
    const uint32_t codes = *reinterpret_cast<const uint32_t *>(a.code + i / 2);
    const int32_t n = (int32_t)(i / a.k), k = (int32_t)(i % a.k);
    const int64_t s = (int64_t)n * (a.k / kGroup) + k / kGroup;
    const float scale = __half2float(a.scales[s]), zero = (float)a.zeros[s];
    pack<__half> out;
#pragma unroll
    for (int e = 0; e < 8; e++)
        out.v[e] = __float2half_rn(((float)(codes >> (4 * e) & 15) - zero) * scale);
    store_pack(w + i, out);
}

status run_dequant(const ladder_args &a, int32_t, cudaStream_t stream) {
    static cublasHandle_t blas = nullptr;
    if (!blas && cublasCreate(&blas) != CUBLAS_STATUS_SUCCESS)
        return FAIL(ST_DEVICE, "cublasCreate");
    __half *w = reinterpret_cast<__half *>(a.partial);
    const int64_t threads = (int64_t)a.n * a.k / 8;
    expand<<<(unsigned)((threads + 255) / 256), 256, 0, stream>>>(a, w);
    TRY(launched("ladder"));
    const float one = 1, zero = 0;
    const bool good =
        cublasSetStream(blas, stream) == CUBLAS_STATUS_SUCCESS &&
        cublasGemmEx(blas, CUBLAS_OP_T, CUBLAS_OP_N, a.n, a.m, a.k, &one, w, CUDA_R_16F, a.k, a.x,
                     CUDA_R_16F, (int)a.ldx, &zero, a.y, CUDA_R_16F, (int)a.ldy, CUBLAS_COMPUTE_32F,
                     CUBLAS_GEMM_DEFAULT) == CUBLAS_STATUS_SUCCESS;
    return good ? ST_OK : FAIL(ST_DEVICE, "cublasGemmEx failed");
}

// --- The table ---------------------------------------------------------------------------------

const struct {
    const char *name;
    bool packed;
    status (*run)(const ladder_args &a, int32_t n_sms, cudaStream_t stream);
} steps[] = {
    {"ladder_scalar", false, run_scalar},
    {"ladder_tensor", false, run_tensor<false, false, 1>},
    {"ladder_packed", true, run_tensor<true, false, 1>},
    {"ladder_pipelined", true, run_tensor<true, false, 4>},
    {"ladder_convert", true, run_tensor<true, true, 4>},
    {"dequant_cublas", false, run_dequant},
};
constexpr int kSteps = (int)(sizeof steps / sizeof steps[0]);

} // namespace

extern "C" bool ladder_linear_is(const char *name) {
    for (int i = 0; name && i < kSteps; i++)
        if (strcmp(steps[i].name, name) == 0) return true;
    return false;
}

extern "C" int64_t ladder_linear_space(int32_t m, int32_t n, int32_t k) {
    const int64_t sums = (int64_t)kSplitMax * m * n * 4, expanded = (int64_t)n * k * 2;
    return sums > expanded ? sums : expanded;
}

extern "C" status ladder_linear(const char *name, const linear_problem *p, const qmatrix *q,
                                void *space, kernel_stream stream) {
    const linear_weight *w = p->w;
    if (w->format != WF_INT4 || w->type != DT_F16 || w->group != kGroup || w->sym || w->gated ||
        w->count != 1 || w->bias || w->k % kGroup || p->y_type != DT_F16 || p->expert_start ||
        p->x_row || p->epilogue != LINEAR_STORE || p->act != AF_16)
        return FAIL(ST_UNSUPPORTED, "%s: only W4 in groups of 128 with zero points, f16", name);
    for (const auto &s : steps) {
        if (strcmp(s.name, name) != 0) continue;
        ladder_args a = {};
        a.code = s.packed ? static_cast<const uint8_t *>(w->code) : q->code;
        a.scale = static_cast<const uint8_t *>(w->scale);
        a.scales = static_cast<const __half *>(q->scale);
        a.zeros = q->zero;
        a.x = static_cast<const __half *>(p->x);
        a.y = static_cast<__half *>(p->y);
        a.partial = static_cast<float *>(space);
        a.ldx = p->ldx;
        a.ldy = p->ldy;
        a.m = p->m;
        a.n = w->n;
        a.k = w->k;
        a.splits = 1;
        return s.run(a, p->n_sms, (cudaStream_t)stream);
    }
    return FAIL(ST_NOTFOUND, "no step '%s'", name);
}
