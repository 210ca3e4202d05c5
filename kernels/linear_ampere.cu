// linear_ampere.cu - y^T = W x^T through mma.sync m16n8k16 with a cp.async pipeline; any format,
// any GPU from sm_80. Eight warps load and compute; weights go from shared memory to registers as
// they lie there (16 bytes a lane), x through ldmatrix from rows of 128 bytes whose 16-byte
// chunks are swapped by row.
#include "linear_common.cuh"
#include "linear_launch.h"
#include "mma_sync.cuh"

// The explicit list: format, type, x rows of a tile, blocks of a warp, stages, CTAs an SM.
#define AMPERE_TILES(X, F, T)                                                                      \
    X(F, T, 8, 1, 6, 2) X(F, T, 16, 1, 6, 2) X(F, T, 32, 2, 5, 1) X(F, T, 64, 2, 4, 1)
#define AMPERE_INSTANCES(X)                                                                        \
    AMPERE_TILES(X, INT4, F16)                                                                     \
    AMPERE_TILES(X, INT4, BF16)                                                                    \
    AMPERE_TILES(X, INT8, F16)                                                                     \
    AMPERE_TILES(X, INT8, BF16)                                                                    \
    AMPERE_TILES(X, FP8, F16)                                                                      \
    AMPERE_TILES(X, FP8, BF16)                                                                     \
    AMPERE_TILES(X, FP8B, F16)                                                                     \
    AMPERE_TILES(X, FP8B, BF16)                                                                    \
    AMPERE_TILES(X, MXFP4, F16)                                                                    \
    AMPERE_TILES(X, MXFP4, BF16)                                                                   \
    AMPERE_TILES(X, NVFP4, F16)                                                                    \
    AMPERE_TILES(X, NVFP4, BF16)                                                                   \
    AMPERE_TILES(X, 16, F16)                                                                       \
    AMPERE_TILES(X, 16, BF16)

namespace {

constexpr int kThreads = 32 * LINEAR_WARPS;

__host__ __device__ constexpr int code_bits(int f) {
    return f == WF_16 ? 16 : f == WF_INT4 || f == WF_MXFP4 || f == WF_NVFP4 ? 4 : 8;
}
// Scales of one block and unit, at their finest granule.
__host__ __device__ constexpr int unit_scale_bytes(int f) {
    return f == WF_INT4 ? 768 : f == WF_MXFP4 ? 128 : f == WF_NVFP4 ? 256 : f == WF_FP8B ? 16 : 0;
}

__device__ __forceinline__ void copy16(uint32_t to, const void *from, bool there) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from),
                 "r"(there ? 16 : 0)
                 : "memory");
}
__device__ __forceinline__ void copy_commit() {
    asm volatile("cp.async.commit_group;" ::: "memory");
}
template <int N> __device__ __forceinline__ void copy_wait() {
    asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
}

template <int F, int NT, int R> struct stage {
    static constexpr int unit = 512 * code_bits(F); // bytes of a block
    static constexpr int code = 2 * R * unit, x = NT * 128, scale = 2 * R * unit_scale_bytes(F);
    static constexpr int bytes = code + x + scale;
};

template <typename T, int F, int NT, int R>
__device__ __forceinline__ void load_stage(const linear_args &p, const linear_segment &s, int unit,
                                           uint8_t *to) {
    using S = stage<F, NT, R>;
    const int tid = threadIdx.x;
    const uint32_t at = (uint32_t)__cvta_generic_to_shared(to);
    const uint8_t *code = p.code + s.expert * p.code_bytes;
#pragma unroll
    for (int i = 0; i < S::code / 16 / kThreads; i++) { // [2 R, unit]
        const int c = tid + i * kThreads, slot = c / (S::unit / 16), in = c % (S::unit / 16);
        const int32_t b = linear_block<R>(p, s.tile_n, slot / R, slot % R);
        if (b < p.blocks)
            copy16(at + c * 16, code + ((int64_t)b * p.units + unit) * S::unit + in * 16, true);
    }
    if (S::scale) { // [2 R, rows of granules]
        const int rows = max(1, 64 >> p.granule_shift), chunks = rows * p.granule_bytes / 16;
        if (tid < 2 * R * chunks) {
            const int slot = tid / chunks, in = tid % chunks;
            const int32_t b = linear_block<R>(p, s.tile_n, slot / R, slot % R);
            if (b < p.blocks)
                copy16(at + S::code + S::x + slot * unit_scale_bytes(F) + in * 16,
                       p.scale + s.expert * p.scale_bytes +
                           ((int64_t)b * p.granules + (unit * 64 >> p.granule_shift)) *
                               p.granule_bytes +
                           in * 16,
                       true);
        }
    }
#pragma unroll
    for (int i = 0; i < (NT * 8 + kThreads - 1) / kThreads; i++) { // [NT, 64]
        const int c = tid + i * kThreads, row = c / 8, chunk = c % 8;
        if (NT * 8 % kThreads && c >= NT * 8) break;
        const int32_t m = s.m0 + row, k = unit * 64 + chunk * 8;
        const bool there = m < s.m_end && k < p.k;
        const int64_t from = !there ? 0 : p.x_row ? p.x_row[m] : m;
        copy16(at + S::code + row * 128 + ((chunk ^ row % 8) << 4),
               static_cast<const T *>(p.x) + (there ? from * p.ldx + k : 0), there);
    }
}

template <typename T, int F, int NT, int R>
__device__ __forceinline__ void multiply_stage(float (&acc)[R][NT / 2], const linear_args &p,
                                               const uint8_t *from) {
    using S = stage<F, NT, R>;
    constexpr int bits = code_bits(F);
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int strip = warp % 4, slot0 = warp / 4 * R;
    const uint32_t x = (uint32_t)__cvta_generic_to_shared(from + S::code);
    uint4 chunk[R];
    dequant_scales scales[R];
    uint32_t b[NT / 8][2], k32[4];
#pragma unroll
    for (int j = 0; j < 4; j++) {
        if (NT == 8) { // one x4 covers 32 inputs
            if (j % 2 == 0)
                load_matrices(k32, x + lane % 8 * 128 + (((2 * j + lane / 8) ^ lane % 8) << 4));
            b[0][0] = k32[j % 2 * 2];
            b[0][1] = k32[j % 2 * 2 + 1];
        } else {
#pragma unroll
            for (int i = 0; i < NT / 16; i++) {
                const int row = i * 16 + lane / 16 * 8 + lane % 8, c = 2 * j + lane / 8 % 2;
                uint32_t r[4];
                load_matrices(r, x + row * 128 + ((c ^ row % 8) << 4));
                b[2 * i][0] = r[0];
                b[2 * i][1] = r[1];
                b[2 * i + 1][0] = r[2];
                b[2 * i + 1][1] = r[3];
            }
        }
#pragma unroll
        for (int r = 0; r < R; r++) {
            if (j * bits % 16 == 0)
                chunk[r] = *reinterpret_cast<const uint4 *>(from + (slot0 + r) * S::unit +
                                                            strip * (S::unit / 4) +
                                                            j * bits / 16 * 512 + lane * 16);
            if (S::scale && (j * 16 & (p.granule - 1)) == 0)
                dequant_load_scales<T, F>(scales[r],
                                          x + S::x + (slot0 + r) * unit_scale_bytes(F) +
                                              (j * 16 >> p.granule_shift) * p.granule_bytes,
                                          strip * 16 + lane / 4 * 2, p.sym);
            uint32_t a[4];
            dequant_word<T, F>(a, &reinterpret_cast<const uint32_t *>(&chunk[r])[j * bits % 16 / 4],
                               scales[r]);
#pragma unroll
            for (int i = 0; i < NT / 8; i++) multiply(&acc[r][4 * i], a, b[i][0], b[i][1], T{});
        }
    }
}

// As many stages as asked for, within the shared memory of the smallest GPU (99 KB less what is
// static).
template <int F, int NT, int R, int kWanted> constexpr int stages_of() {
    constexpr int fit = 88 * 1024 / stage<F, NT, R>::bytes;
    static_assert(fit >= 2, "tile too large");
    return fit < kWanted ? fit : kWanted;
}

template <typename T, int F, int NT, int R, int kStages, int kCtas>
__global__ void __launch_bounds__(kThreads, kCtas)
    linear_ampere(const __grid_constant__ linear_args p) {
    using S = stage<F, NT, R>;
    extern __shared__ __align__(128) uint8_t shared[];
    __shared__ int32_t tile_start[LINEAR_EXPERTS_MAX + 1];
    __shared__ __align__(16) float turn[LINEAR_WARPS][LINEAR_STAGE_FLOATS];
    __shared__ linear_shared later_of[LINEAR_WARPS];
    if (p.expert_start) linear_tile_starts<NT>(tile_start, p);
    linear_shared *later = &later_of[threadIdx.x / 32];
    linear_shared_init(later);

    linear_walk<NT> walk(p, p.expert_start ? tile_start : nullptr);
    linear_segment s;
    while (walk.next(s)) {
        float acc[R][NT / 2] = {};
#pragma unroll
        for (int i = 0; i < kStages - 1; i++) {
            if (s.step0 + i < s.step1)
                load_stage<T, F, NT, R>(p, s, s.step0 + i, shared + i * S::bytes);
            copy_commit();
        }
        int read = 0, write = kStages - 1;
        for (int step = s.step0; step < s.step1; step++) {
            copy_wait<kStages - 2>();
            __syncthreads();
            if (step + kStages - 1 < s.step1)
                load_stage<T, F, NT, R>(p, s, step + kStages - 1, shared + write * S::bytes);
            copy_commit();
            multiply_stage<T, F, NT, R>(acc, p, shared + read * S::bytes);
            read = read + 1 == kStages ? 0 : read + 1;
            write = write + 1 == kStages ? 0 : write + 1;
        }
        __syncthreads();
        if (s.step1 - s.step0 == p.steps || linear_share<NT, R>(acc, p, walk, s, later))
            linear_finish<T, NT, R>(acc, p, s, turn[threadIdx.x / 32]);
    }
    linear_finish_all<T, NT, R>(p, walk, later, turn[threadIdx.x / 32]);
}

template <typename T, int F, int NT, int R, int kStages, int kCtas>
status launch(const linear_args *args, int32_t n_sms, int32_t per_sm, kernel_stream stream) {
    const auto kernel = linear_ampere<T, F, NT, R, kStages, kCtas>;
    constexpr int bytes = kStages * stage<F, NT, R>::bytes;
    cudaError_t e =
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
    int fit = 0;
    if (e == cudaSuccess)
        e = cudaOccupancyMaxActiveBlocksPerMultiprocessor(&fit, kernel, kThreads, bytes);
    if (e == cudaSuccess) {
        const int ctas =
            n_sms * (per_sm < fit ? per_sm : fit); // all at once: they wait for each other
        kernel<<<ctas, kThreads, bytes, (cudaStream_t)stream>>>(*args);
        e = cudaGetLastError();
    }
    return e == cudaSuccess ? ST_OK : FAIL(ST_DEVICE, "linear_ampere: %s", cudaGetErrorString(e));
}

#define T_F16  __half
#define T_BF16 __nv_bfloat16
#define ROW(F, T, NT, R, STAGES, CTAS)                                                             \
    {"ampere_" #NT "x" #R,                                                                         \
     80,                                                                                           \
     SM_ANY,                                                                                       \
     WF_##F,                                                                                       \
     DT_##T,                                                                                       \
     NT,                                                                                           \
     2 * R,                                                                                        \
     1,                                                                                            \
     16,                                                                                           \
     128,                                                                                          \
     CTAS,                                                                                         \
     launch<T_##T, WF_##F, NT, R, stages_of<WF_##F, NT, R, STAGES>(), CTAS>,                       \
     0},
enum { SM_ANY = 999 };
const linear_variant rows[] = {AMPERE_INSTANCES(ROW)};

} // namespace

extern "C" linear_table linear_ampere_table(void) {
    return linear_table{rows, (int32_t)(sizeof rows / sizeof rows[0])};
}
