// linear_hopper.cu - y^T = W x^T through wgmma with the dequantised weights as the A operand in registers.
//
// Two warpgroups compute, one loads (a single thread of it unless rows are gathered). Weights arrive by bulk copies as they lie packed (a
// block's bytes are contiguous along K, so one copy brings a block's step), x by the tensor copy engine or,
// where rows are gathered, by cp.async in the same swizzle. A warpgroup converts one unit of one block to
// 16 registers of A fragments while the wgmmas of the previous one run, and each waits only for the one
// before the last: conversion, tensor cores and loads overlap, and the other warpgroup fills what is left.
//
// The weights do not depend on the kernel before this one, so the first stages of them are asked for before
// waiting for it (programmatic dependent launch); x and everything written come after. With at most half
// of an SM's shared memory a CTA starts loading while one of the launch before still computes.
#include "linear_common.cuh"
#include "linear_launch.h"
#include "ptx_sm90.cuh"
#include <cuda.h>

// The explicit list: format, type, x rows of a tile (N of the wgmma), blocks of a warpgroup, units of a step,
// scale granules of a unit (0: none), KB of shared memory for the stages, CTAs that fit an SM.
#define HOPPER_TILES_4(X, F, T, S)                                                                 \
    X(F, T, 8, 1, 2, S, 100, 2)                                                                    \
    X(F, T, 8, 2, 2, S, 100, 2)                                                                    \
    X(F, T, 16, 1, 2, S, 100, 2)                                                                   \
    X(F, T, 16, 2, 2, S, 100, 2)                                                                   \
    X(F, T, 32, 2, 2, S, 210, 1)                                                                   \
    X(F, T, 64, 2, 2, S, 210, 1)                                                                   \
    X(F, T, 64, 4, 1, S, 210, 1)                                                                   \
    X(F, T, 128, 2, 1, S, 210, 1)                                                                  \
    X(F, T, 256, 1, 2, S, 210, 1)
#define HOPPER_TILES_8(X, F, T, S)                                                                 \
    X(F, T, 8, 2, 1, S, 100, 2)                                                                    \
    X(F, T, 16, 2, 1, S, 100, 2)                                                                   \
    X(F, T, 32, 2, 1, S, 210, 1)                                                                   \
    X(F, T, 64, 2, 1, S, 210, 1)                                                                   \
    X(F, T, 64, 4, 1, S, 210, 1)                                                                   \
    X(F, T, 128, 2, 1, S, 210, 1)                                                                  \
    X(F, T, 256, 1, 2, S, 210, 1)
#define HOPPER_TILES_16(X, F, T, S)                                                                \
    X(F, T, 8, 2, 1, S, 100, 2)                                                                    \
    X(F, T, 16, 2, 1, S, 100, 2)                                                                   \
    X(F, T, 32, 2, 1, S, 210, 1)                                                                   \
    X(F, T, 64, 2, 1, S, 210, 1)                                                                   \
    X(F, T, 128, 2, 1, S, 210, 1)                                                                  \
    X(F, T, 256, 1, 2, S, 210, 1)
#ifndef HOPPER_INSTANCES
#define HOPPER_INSTANCES(X)                                                                        \
    HOPPER_TILES_4(X, INT4, F16, 1)                                                                \
    HOPPER_TILES_4(X, INT4, BF16, 1)                                                               \
    HOPPER_TILES_4(X, INT4, F16, 2)                                                                \
    HOPPER_TILES_4(X, INT4, BF16, 2)                                                               \
    HOPPER_TILES_4(X, MXFP4, F16, 2)                                                               \
    HOPPER_TILES_4(X, MXFP4, BF16, 2)                                                              \
    HOPPER_TILES_8(X, INT8, F16, 0)                                                                \
    HOPPER_TILES_8(X, INT8, BF16, 0)                                                               \
    HOPPER_TILES_8(X, FP8, F16, 0)                                                                 \
    HOPPER_TILES_8(X, FP8, BF16, 0)                                                                \
    HOPPER_TILES_8(X, FP8B, F16, 1)                                                                \
    HOPPER_TILES_8(X, FP8B, BF16, 1)                                                               \
    HOPPER_TILES_16(X, 16, F16, 0)                                                                 \
    HOPPER_TILES_16(X, 16, BF16, 0)
#endif

namespace {

// With one CTA an SM the loaders are a whole warpgroup, which can hand registers to the others; with two,
// one warp.
__host__ __device__ constexpr int loaders(int ctas) { return ctas == 1 ? 128 : 32; }

__host__ __device__ constexpr int code_bits(int f) {
    return f == WF_16 ? 16 : f == WF_INT4 || f == WF_MXFP4 || f == WF_NVFP4 ? 4 : 8;
}
// Largest bytes of a granule of one block.
__host__ __device__ constexpr int granule_bytes(int f) {
    return f == WF_INT4 ? 192 : f == WF_MXFP4 || f == WF_NVFP4 ? 64 : 16;
}

// Shared memory: stages of codes and x, then stages of scales, the turning places, barriers, row ids.
template <int F, int NT, int R, int KU, int S, int KB> struct tile {
    static constexpr int unit = 512 * code_bits(F); // bytes of a block
    static constexpr int code = 2 * R * KU * unit, x = KU * NT * 128;
    static constexpr int scale_block = S * KU * granule_bytes(F), scale = 2 * R * scale_block;
    static constexpr int turn = LINEAR_WARPS * LINEAR_STAGE_FLOATS * 4;
    static constexpr int fixed = turn + 1024 + 256 + NT * 4;
    static constexpr int fit = (KB * 1024 - fixed) / (code + x + scale + 16);
    static constexpr int stages = fit > 16 ? 16 : fit;
    static_assert(stages >= 2, "tile too large");
    static_assert(R * KU % 2 == 0, "fragments alternate between two sets of registers");
    static constexpr int at_scale = stages * (code + x), at_turn = at_scale + stages * scale;
    static constexpr int at_bars = at_turn + turn, at_rows = at_bars + 256;
    static constexpr int bytes = at_rows + NT * 4 + 1024; // 1024: alignment of the base
};

template <typename T, int F, int NT, int R, int KU, int S, int KB, int kLoaders> struct producer {
    using L = tile<F, NT, R, KU, S, KB>;
    const linear_args &p;
    const CUtensorMap *map;
    uint8_t *base;
    uint32_t full, empty;
    uint64_t policy;
    int thread; // of the loading warpgroup

    __device__ int units(int step) const { return min(KU, p.units - step * KU); }

    // Codes and scales of a step; all bytes of the step are announced here.
    __device__ void weights(const linear_segment &s, int step, int stage) const {
        if (thread != 0) return;
        const int n = units(step), unit0 = step * KU;
        const int row0 = S ? unit0 * 64 / p.granule : 0;
        const int scale = S ? ((unit0 + n) * 64 + p.granule - 1) / p.granule - row0 : 0;
        const int scale_bytes = scale * p.granule_bytes;
        int blocks = 0;
#pragma unroll
        for (int i = 0; i < 2 * R; i++) blocks += linear_block<R>(p, s.tile_n, i / R, i % R) < p.blocks;
        barrier_arrive_expect(full + stage * 8, blocks * (n * L::unit + scale_bytes) +
                                                    (p.x_row ? 0 : n * NT * 128));
        const uint32_t code_to = shared_address(base) + stage * (L::code + L::x);
        const uint32_t scale_to = shared_address(base) + L::at_scale + stage * L::scale;
#pragma unroll
        for (int i = 0; i < 2 * R; i++) {
            const int32_t b = linear_block<R>(p, s.tile_n, i / R, i % R);
            if (b >= p.blocks) continue;
            copy_bulk(code_to + i * KU * L::unit,
                      p.code + s.expert * p.code_bytes + ((int64_t)b * p.units + unit0) * L::unit,
                      n * L::unit, full + stage * 8, policy);
            if (S)
                copy_bulk(scale_to + i * L::scale_block,
                          p.scale + s.expert * p.scale_bytes +
                              ((int64_t)b * p.granules + row0) * p.granule_bytes,
                          scale_bytes, full + stage * 8, policy);
        }
    }

    __device__ void inputs(const linear_segment &s, int step, int stage) const {
        const uint32_t to = shared_address(base) + stage * (L::code + L::x) + L::code;
        const int n = units(step);
        if (!p.x_row) {
            for (int u = 0; u < n; u++)
                copy_tile(to + u * NT * 128, map, (step * KU + u) * 64, s.m0, full + stage * 8);
            return;
        }
        const int32_t *rows = reinterpret_cast<const int32_t *>(base + L::at_rows);
        for (int u = 0; u < n; u++)
            for (int row = thread / 8; row < NT; row += kLoaders / 8) {
                const int chunk = thread % 8;
                const int k = (step * KU + u) * 64 + chunk * 8;
                const int32_t from = rows[row];
                const bool there = from >= 0 && k < p.k;
                asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(
                                 to + u * NT * 128 + row * 128 + ((chunk ^ row % 8) << 4)),
                             "l"(static_cast<const T *>(p.x) + (there ? from * p.ldx + k : 0)),
                             "r"(there ? 16 : 0)
                             : "memory");
            }
        barrier_arrive_copies(full + stage * 8);
    }

    __device__ void rows(const linear_segment &s) const {
        if (!p.x_row) return;
        int32_t *rows = reinterpret_cast<int32_t *>(base + L::at_rows);
        asm volatile("bar.sync 1, %0;" ::"n"(kLoaders) : "memory");
        for (int i = thread; i < NT; i += kLoaders)
            rows[i] = s.m0 + i < s.m_end ? p.x_row[s.m0 + i] : -1;
        asm volatile("bar.sync 1, %0;" ::"n"(kLoaders) : "memory");
    }

    __device__ void run(const int32_t *tile_start) const {
        linear_segment s;
        int ahead = 0;
        if (!tile_start) { // the expert table is the work of the kernel before
            linear_walk<NT> walk(p, tile_start);
            while (ahead < L::stages && walk.next(s))
                for (int step = s.step0; step < s.step1 && ahead < L::stages; step++)
                    weights(s, step, ahead++);
        }
        wait_for_previous();
        linear_walk<NT> walk(p, tile_start);
        int stage = 0, parity = 1, at = 0;
        while (walk.next(s)) {
            rows(s);
            for (int step = s.step0; step < s.step1; step++, at++) {
                if (at >= ahead) {
                    barrier_wait(empty + stage * 8, parity);
                    weights(s, step, stage);
                }
                inputs(s, step, stage);
                if (++stage == L::stages) stage = 0, parity ^= 1;
            }
        }
    }
};

// One block's unit: A fragments of a warp's strip, [16, 64].
template <typename T, int F, int S>
__device__ __forceinline__ void fragments(uint32_t (&a)[4][4], const uint8_t *code,
                                          const uint8_t *scale, const linear_args &p, int strip,
                                          int lane) {
    constexpr int bits = code_bits(F), unit = 512 * bits;
    dequant_scales scales;
    uint4 chunk;
#pragma unroll
    for (int j = 0; j < 4; j++) {
        if (j * bits % 16 == 0)
            chunk = *reinterpret_cast<const uint4 *>(code + strip * (unit / 4) +
                                                     j * bits / 16 * 512 + lane * 16);
        if (S && j * S % 4 == 0)
            dequant_load_scales<T, F>(scales, scale + j * S / 4 * p.granule_bytes,
                                      strip * 16 + lane / 4 * 2, p.sym);
        dequant_word<T, F>(a[j], &reinterpret_cast<const uint32_t *>(&chunk)[j * bits % 16 / 4],
                           scales);
    }
}

template <typename T, int F, int NT, int R, int KU, int S, int KB, int kCtas>
__global__ void __launch_bounds__(32 * LINEAR_WARPS + loaders(kCtas), kCtas)
    linear_hopper(const __grid_constant__ linear_args p, const __grid_constant__ CUtensorMap map) {
    using L = tile<F, NT, R, KU, S, KB>;
    extern __shared__ uint8_t shared[];
    __shared__ int32_t tile_start_of[LINEAR_EXPERTS_MAX + 1];
    uint8_t *base = shared + ((1024 - (shared_address(shared) & 1023)) & 1023);
    const uint32_t full = shared_address(base + L::at_bars), empty = full + L::stages * 8;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;

    launch_dependents();
    if (threadIdx.x == 0) {
        for (int i = 0; i < L::stages; i++) {
            barrier_init(full + i * 8, p.x_row ? 1 + loaders(kCtas) : 1);
            barrier_init(empty + i * 8, LINEAR_WARPS);
        }
        barrier_init_fence();
    }
    __syncthreads();
    const int32_t *tile_start = nullptr;
    if (p.expert_start) {
        wait_for_previous();
        linear_tile_starts<NT>(tile_start_of, p);
        tile_start = tile_start_of;
    }

    if (warp >= LINEAR_WARPS) {
        if (kCtas == 1) registers_down<88>();
        const int thread = threadIdx.x - 32 * LINEAR_WARPS;
        if (thread > 0 && !p.x_row) return;
        const producer<T, F, NT, R, KU, S, KB, loaders(kCtas)> load = {
            p,    &map, base, full, empty,
            NT <= 64 ? policy_evict_first() : policy_evict_normal(), thread};
        load.run(tile_start);
        return;
    }

    if (kCtas == 1) registers_up<208>();
    wait_for_previous();
    linear_walk<NT> walk(p, tile_start);
    linear_segment s;
    const int wg = warp / 4, strip = warp % 4;
    int stage = 0, parity = 0;
    while (walk.next(s)) {
        float acc[R][NT / 2];
#pragma unroll
        for (int r = 0; r < R; r++)
#pragma unroll
            for (int i = 0; i < NT / 2; i++) acc[r][i] = 0.f;
        uint32_t a[2][4][4];
        int last = -1; // the stage that the wgmmas in flight may still read
        for (int step = s.step0; step < s.step1; step++) {
            const int units = min(KU, p.units - step * KU);
            barrier_wait(full + stage * 8, parity);
            if (p.x_row) proxy_fence();
            const uint8_t *code = base + stage * (L::code + L::x) + wg * R * KU * L::unit;
            const uint8_t *scale = base + L::at_scale + stage * L::scale + wg * R * L::scale_block;
            const uint64_t x =
                group_descriptor(shared_address(base + stage * (L::code + L::x) + L::code));
#pragma unroll
            for (int u = 0; u < KU; u++) {
                if (u < units) {
                    const int row = S == 0 ? 0 : S == 1 ? (u * 64 / p.granule) : u * S;
#pragma unroll
                    for (int r = 0; r < R; r++) {
                        constexpr int kBuffers = 2;
                        uint32_t(&f)[4][4] = a[(u * R + r) % kBuffers];
                        fragments<T, F, S>(f, code + (r * KU + u) * L::unit,
                                           scale + r * L::scale_block + row * p.granule_bytes, p,
                                           strip, lane);
                        group_fence();
#pragma unroll
                        for (int j = 0; j < 4; j++)
                            multiply_group<T, NT>::run(acc[r], f[j], x + u * NT * 8 + 2 * j);
                        group_commit();
                        group_wait<1>();
                        if (u == 0 && r == 0 && last >= 0 && lane == 0)
                            barrier_arrive(empty + last * 8);
                    }
                }
            }
            last = stage;
            if (++stage == L::stages) stage = 0, parity ^= 1;
        }
        group_wait<0>();
#pragma unroll
        for (int r = 0; r < R; r++) group_pin(acc[r]);
        if (last >= 0 && lane == 0) barrier_arrive(empty + last * 8);
        if (linear_exchange<NT, R>(acc, p, walk, s))
            linear_finish<T, NT, R>(
                acc, p, s,
                reinterpret_cast<float *>(base + L::at_turn) + warp * LINEAR_STAGE_FLOATS);
    }
}

using encode_fn = CUresult (*)(CUtensorMap *, CUtensorMapDataType, cuuint32_t, void *,
                               const cuuint64_t *, const cuuint64_t *, const cuuint32_t *,
                               const cuuint32_t *, CUtensorMapInterleave, CUtensorMapSwizzle,
                               CUtensorMapL2promotion, CUtensorMapFloatOOBfill);

// x [m, k] in boxes of [NT, 64]; what lies outside reads as zero.
status encode_x(CUtensorMap *map, const linear_args *a, bool bf16, int rows) {
    static encode_fn encode = nullptr;
    if (!encode) {
        void *f = nullptr;
        cudaDriverEntryPointQueryResult found;
        const cudaError_t e =
            cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &f, cudaEnableDefault, &found);
        if (e != cudaSuccess || found != cudaDriverEntryPointSuccess)
            return FAIL(ST_DEVICE, "the driver has no tensor maps");
        encode = reinterpret_cast<encode_fn>(f);
    }
    const cuuint64_t size[2] = {(cuuint64_t)a->k, (cuuint64_t)a->m};
    const cuuint64_t stride[1] = {(cuuint64_t)a->ldx * 2};
    const cuuint32_t box[2] = {64, (cuuint32_t)rows}, step[2] = {1, 1};
    const CUresult r = encode(
        map, bf16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16, 2,
        const_cast<void *>(a->x), size, stride, box, step, CU_TENSOR_MAP_INTERLEAVE_NONE,
        CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_128B,
        CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
    return r == CUDA_SUCCESS ? ST_OK : FAIL(ST_DEVICE, "tensor map of x: error %d", (int)r);
}

template <typename T, int F, int NT, int R, int KU, int S, int KB, int kCtas>
status launch(const linear_args *args, int32_t ctas, kernel_stream stream) {
    const auto kernel = linear_hopper<T, F, NT, R, KU, S, KB, kCtas>;
    CUtensorMap map = {};
    if (!args->x_row) {
        const status st = encode_x(&map, args, half_pair<T>::bf16, NT);
        if (st != ST_OK) return st;
    }
    constexpr int bytes = tile<F, NT, R, KU, S, KB>::bytes;
    cudaError_t e = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
    cudaLaunchAttribute early;
    early.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    early.val.programmaticStreamSerializationAllowed = 1;
    cudaLaunchConfig_t config = {};
    config.gridDim = dim3((unsigned)ctas);
    config.blockDim = dim3(32 * LINEAR_WARPS + loaders(kCtas));
    config.dynamicSmemBytes = bytes;
    config.stream = (cudaStream_t)stream;
    config.attrs = &early;
    config.numAttrs = 1;
    if (e == cudaSuccess) e = cudaLaunchKernelEx(&config, kernel, *args, map);
    return e == cudaSuccess ? ST_OK : FAIL(ST_DEVICE, "linear_hopper: %s", cudaGetErrorString(e));
}

#define T_F16 __half
#define T_BF16 __nv_bfloat16
#define ROW(F, T, NT, R, KU, S, KB, CTAS)                                                          \
    {"hopper_" #NT "x" #R, 90, 90, WF_##F, DT_##T, NT, 2 * R, KU, S ? (S == 1 ? 64 : 64 / S) : 0,  \
     S ? (S == 1 ? 128 : 64 / S) : 0, 1, launch<T_##T, WF_##F, NT, R, KU, S, KB, CTAS>},
const linear_variant rows[] = {HOPPER_INSTANCES(ROW)};

} // namespace

extern "C" linear_table linear_hopper_table(void) {
    return linear_table{rows, (int32_t)(sizeof rows / sizeof rows[0])};
}
