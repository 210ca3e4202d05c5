// linear_hopper.cu - y^T = W x^T through wgmma with the dequantised weights as the A operand in
// registers.
//
// Two warpgroups compute, one loads (a single thread of it unless rows are gathered). Weights
// arrive by bulk copies as they lie packed (a block's bytes are contiguous along K, so one copy
// brings a block's step), x by the tensor copy engine or, where rows are gathered, by cp.async in
// the same swizzle. A warpgroup converts one unit of one block to 16 registers of A fragments
// while the wgmmas of the previous one run, and each waits only for the one before the last:
// conversion, tensor cores and loads overlap, and the other warpgroup fills what is left.
//
// The weights do not depend on the kernel before this one, so the first stages of them are asked
// for before waiting for it (programmatic dependent launch); x and everything written come after.
// With at most half of an SM's shared memory a CTA starts loading while one of the launch before
// still computes.
#include "linear_common.cuh"
#include "linear_launch.h"
#include "mma_sync.cuh"
#include "ptx_sm90.cuh"
#include "tensor_map.cuh"

// The explicit list, of codes what linear_mid.cu does not have: format, type, x rows of a tile (N
// of the wgmma), blocks of a warpgroup, units of a step, scale granule (0: none), KB of shared
// memory, CTAs that must fit an SM, CTAs of the grid an SM.
#define HOPPER_TILES(X, F, T, KU, G)                                                               \
    X(F, T, 8, 2, KU, G, 100, 2, 2) X(F, T, 16, 2, KU, G, 100, 2, 2)
#define HOPPER_TILES_16(X, T)                                                                      \
    HOPPER_TILES(X, 16, T, 1, 0)                                                                   \
    X(16, T, 32, 2, 1, 0, 210, 1, 1)                                                               \
    X(16, T, 64, 2, 1, 0, 210, 1, 1)
#ifndef HOPPER_INSTANCES
#define HOPPER_INSTANCES(X)                                                                        \
    HOPPER_TILES(X, INT4, F16, 2, 128)                                                             \
    HOPPER_TILES(X, INT4, BF16, 2, 128)                                                            \
    HOPPER_TILES(X, INT4, F16, 2, 64)                                                              \
    HOPPER_TILES(X, INT4, BF16, 2, 64)                                                             \
    HOPPER_TILES(X, INT4, F16, 2, 32)                                                              \
    HOPPER_TILES(X, INT4, BF16, 2, 32)                                                             \
    HOPPER_TILES(X, MXFP4, F16, 2, 32)                                                             \
    HOPPER_TILES(X, MXFP4, BF16, 2, 32)                                                            \
    HOPPER_TILES(X, INT8, F16, 1, 0)                                                               \
    HOPPER_TILES(X, INT8, BF16, 1, 0)                                                              \
    HOPPER_TILES(X, FP8, F16, 1, 0)                                                                \
    HOPPER_TILES(X, FP8, BF16, 1, 0)                                                               \
    HOPPER_TILES(X, FP8B, F16, 1, 128)                                                             \
    HOPPER_TILES(X, FP8B, BF16, 1, 128)                                                            \
    HOPPER_TILES_16(X, F16)                                                                        \
    HOPPER_TILES_16(X, BF16)
#endif

namespace {

// With one CTA an SM the loaders are a whole warpgroup, which can hand registers to the others;
// with two, two warps.
__host__ __device__ constexpr int loaders(int ctas) { return ctas == 1 ? 128 : 64; }
// Up to so many x rows mma.sync is quick enough, and wants neither descriptors nor waits.
constexpr int kMmaRows = 16;

// Shared memory: stages of codes and x, then stages of scales, the turning places, barriers, row
// ids.
template <int F, int NT, int R, int KU, int G, int KB> struct tile {
    static constexpr int unit = 512 * linear_code_bits(F); // bytes of a block
    static constexpr int code = 2 * R * KU * unit, x = KU * NT * 128;
    static constexpr int rows = G ? (KU * 64 + G - 1) / G : 0; // granules of a step
    static constexpr int scale_block = rows * linear_granule_bytes(F), scale = 2 * R * scale_block;
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

// The loading warps: lane i < 2 R of the first copies the codes of block i and never waits for
// the kernel before; of the second its scales, and lane 16 the tiles of x. Gathered rows are
// copied by all of them.
template <typename T, int F, int NT, int R, int KU, int G, int KB, int kLoaders> struct producer {
    using L = tile<F, NT, R, KU, G, KB>;
    const linear_args &p;
    const CUtensorMap *map;
    uint8_t *rows_at;
    uint32_t base, full, empty;
    uint64_t policy;
    int thread;

    const uint8_t *from; // what this lane copies: its block's start
    uint32_t to;         // in the first stage
    bool valid;
    int blocks; // of the tile

    __device__ void begin(const linear_segment &s) {
        if (thread < 64) {
            const int lane = thread % 32, slot = lane % (2 * R);
            const int32_t b = linear_block<R>(p, s.tile_n, slot / R, slot % R);
            blocks = __popc(__ballot_sync(~0u, lane < 2 * R && b < p.blocks));
            valid = lane < 2 * R && b < p.blocks && (G || thread < 32);
            from = thread < 32 ? p.code + s.expert * p.code_bytes + (int64_t)b * p.units * L::unit
                               : p.scale + s.expert * p.scale_bytes +
                                     (int64_t)b * p.granules * p.granule_bytes;
            to = base + (thread < 32 ? slot * KU * L::unit : L::at_scale + slot * L::scale_block);
        }
        if (!p.x_row) return;
        int32_t *rows = reinterpret_cast<int32_t *>(rows_at);
        asm volatile("bar.sync 1, %0;" ::"n"(kLoaders) : "memory");
        for (int i = thread; i < NT; i += kLoaders)
            rows[i] = s.m0 + i < s.m_end ? p.x_row[s.m0 + i] : -1;
        asm volatile("bar.sync 1, %0;" ::"n"(kLoaders) : "memory");
    }

    static constexpr int kGranule = G ? G : 64;
    static __device__ int granules(int unit0, int n) {
        if (!G) return 0;
        return ((unit0 + n) * 64 + kGranule - 1) / kGranule - unit0 * 64 / kGranule;
    }

    // Codes of a step; all its bytes are announced here.
    __device__ void codes(int step, int stage) const {
        const int unit0 = step * KU, n = KU == 1 ? 1 : min(KU, p.units - unit0);
        const int rows = granules(unit0, n);
        if (thread == 16)
            barrier_arrive_expect(full + stage * 8,
                                  blocks * (n * L::unit + rows * p.granule_bytes) +
                                      (p.x_row ? 0 : n * NT * 128));
        if (valid)
            copy_bulk(to + stage * (L::code + L::x), from + (uint32_t)unit0 * L::unit, n * L::unit,
                      full + stage * 8, policy);
    }

    __device__ void scales(int step, int stage) const {
        if (!G) return;
        const int unit0 = step * KU, n = KU == 1 ? 1 : min(KU, p.units - unit0);
        const int row0 = unit0 * 64 / kGranule, rows = granules(unit0, n);
        if (valid)
            copy_bulk(to + stage * L::scale, from + (uint32_t)(row0 * p.granule_bytes),
                      rows * p.granule_bytes, full + stage * 8, policy);
    }

    __device__ void inputs(const linear_segment &s, int step, int stage) const {
        const uint32_t to = base + stage * (L::code + L::x) + L::code;
        const int n = KU == 1 ? 1 : min(KU, p.units - step * KU);
        if (!p.x_row) {
            if (thread == 32 + 16)
                for (int u = 0; u < n; u++)
                    copy_tile(to + u * NT * 128, map, (step * KU + u) * 64, s.m0, full + stage * 8);
            return;
        }
        const int32_t *rows = reinterpret_cast<const int32_t *>(rows_at);
        for (int u = 0; u < n; u++)
            for (int row = thread / 8; row < NT; row += kLoaders / 8) {
                const int chunk = thread % 8;
                const int k = (step * KU + u) * 64 + chunk * 8;
                const int32_t m = rows[row];
                const bool there = m >= 0 && k < p.k;
                asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(
                                 to + u * NT * 128 + row * 128 + ((chunk ^ row % 8) << 4)),
                             "l"(static_cast<const T *>(p.x) + (there ? m * p.ldx + k : 0)),
                             "r"(there ? 16 : 0)
                             : "memory");
            }
        barrier_arrive_copies(full + stage * 8);
    }

    __device__ void run(const int32_t *tile_start) {
        linear_segment s;
        int ahead = 0; // steps whose scales were asked for before the kernel before had ended
        if (!p.x_row && !tile_start && G && thread >= 32) {
            linear_walk<NT> walk(p, tile_start);
            while (ahead < L::stages && walk.next(s)) {
                begin(s);
                for (int step = s.step0; step < s.step1 && ahead < L::stages; step++)
                    scales(step, ahead++);
            }
        }
        if (p.x_row || thread >= 32) wait_for_previous();
        linear_walk<NT> walk(p, tile_start);
        int stage = 0, parity = 1, at = 0;
        while (walk.next(s)) {
            begin(s);
            for (int step = s.step0; step < s.step1; step++, at++) {
                barrier_wait(empty + stage * 8, parity);
                if (thread < 32)
                    codes(step, stage);
                else if (thread < 64 && at >= ahead)
                    scales(step, stage);
                if (p.x_row || thread >= 32) inputs(s, step, stage);
                if (++stage == L::stages) stage = 0, parity ^= 1;
            }
        }
    }
};

// B fragments of one unit of x, [NT <= 16, 64], by atom j: two registers for each 8 rows.
template <int NT>
__device__ __forceinline__ void load_inputs(uint32_t (&b)[4][NT / 8][2], uint32_t x, int lane) {
    uint32_t r[4];
    if (NT == 8) {
#pragma unroll
        for (int h = 0; h < 2; h++) { // 32 inputs
            load_matrices(r, x + lane % 8 * 128 + (((4 * h + lane / 8) ^ lane % 8) << 4));
            b[2 * h][0][0] = r[0];
            b[2 * h][0][1] = r[1];
            b[2 * h + 1][0][0] = r[2];
            b[2 * h + 1][0][1] = r[3];
        }
    } else {
        const int row = lane / 16 * 8 + lane % 8;
#pragma unroll
        for (int j = 0; j < 4; j++) {
            load_matrices(r, x + row * 128 + (((2 * j + lane / 8 % 2) ^ row % 8) << 4));
#pragma unroll
            for (int i = 0; i < NT / 8; i++) {
                b[j][i][0] = r[2 * i];
                b[j][i][1] = r[2 * i + 1];
            }
        }
    }
}

template <typename T, int F, int NT, int R, int KU, int G, int KB, int kCtas>
__global__ void __launch_bounds__(32 * LINEAR_WARPS + loaders(kCtas), kCtas)
    linear_hopper(const __grid_constant__ linear_args p, const __grid_constant__ CUtensorMap map) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL) // never launched, and empty, on other architectures
    using L = tile<F, NT, R, KU, G, KB>;
    constexpr int bits = linear_code_bits(F), kChunks = bits / 4; // 16-byte loads a lane and unit
    extern __shared__ uint8_t shared[];
    __shared__ int32_t tile_start_of[LINEAR_EXPERTS_MAX + 1];
    __shared__ linear_shared later_of[LINEAR_WARPS];
    uint8_t *base = shared + ((1024 - (shared_address(shared) & 1023)) & 1023);
    const uint32_t base_at = shared_address(base);
    const uint32_t full = base_at + L::at_bars, empty = full + L::stages * 8;
    const int warp = __shfl_sync(~0u, threadIdx.x / 32, 0), lane = threadIdx.x % 32;

    if (!p.expert_start) launch_dependents();
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
        launch_dependents(); // which may read the routing at once (linear_problem.routed)
        linear_tile_starts<NT>(tile_start_of, p);
        tile_start = tile_start_of;
    }

    if (warp >= LINEAR_WARPS) {
        if (kCtas == 1) registers_down<72>();
        const int thread = threadIdx.x - 32 * LINEAR_WARPS;
        if (thread >= 64 && !p.x_row) return;
        const uint64_t policy = NT <= 64 ? policy_evict_first() : policy_evict_normal();
        producer<T, F, NT, R, KU, G, KB, loaders(kCtas)> load = {
            p, &map, base + L::at_rows, base_at, full, empty, policy, thread};
        load.run(tile_start);
        return;
    }

    if (kCtas == 1) registers_up<216>();
    wait_for_previous();
    linear_walk<NT> walk(p, tile_start);
    linear_segment s;
    float *turn = reinterpret_cast<float *>(base + L::at_turn) + warp * LINEAR_STAGE_FLOATS;
    const int wg = warp / 4, strip = warp % 4;
    linear_shared *later = &later_of[warp];
    linear_shared_init(later);
    // Offsets of this lane within a stage; opaque, lest they be computed anew for every unit.
    uint32_t code_in = wg * R * KU * L::unit + strip * (L::unit / 4) + dequant_lane_at<F>(lane);
    int place = strip * 16 + lane / 4 * 2;
    uint32_t scale_in = base_at + L::at_scale + wg * R * L::scale_block;
    asm volatile("" : "+r"(code_in), "+r"(place), "+r"(scale_in));
    const bool sym = p.sym;
    const int granule_stride = p.granule_bytes;
    int stage = 0, parity = 0;
    uint32_t stage_at = base_at, scale_at = scale_in;
    while (walk.next(s)) {
        constexpr bool kMma = NT <= kMmaRows;
        float acc[R][NT / 2] = {};
        uint32_t a[2][4][4];
        int last = -1; // the stage that the wgmmas in flight may still read
        for (int step = s.step0; step < s.step1; step++) {
            const int units = KU == 1 ? 1 : min(KU, p.units - step * KU);
            barrier_wait(full + stage * 8, parity);
            if (p.x_row) proxy_fence();
            const uint32_t code = stage_at + code_in, x = stage_at + L::code;
            const auto compute = [&](const int n) { // n units, constant but in a tile's last step
                dequant_scales scales[R];
                uint4 chunk[2][kChunks];
                const auto load = [&](int i) { // i = u R + r
#pragma unroll
                    for (int c = 0; c < kChunks; c++)
                        chunk[i % 2][c] = dequant_load<F>(code + (i % R * KU + i / R) * L::unit, c);
                };
                load(0);
#pragma unroll
                for (int u = 0; u < KU; u++) {
                    if (u < n) {
                        uint32_t b[4][kMma ? NT / 8 : 1][2];
                        if constexpr (kMma) load_inputs<NT>(b, x + u * NT * 128, lane);
#pragma unroll
                        for (int r = 0; r < R; r++) {
                            constexpr int kRows = G && G < 64 ? 64 / G : 1; // granules of a unit
                            const int i = u * R + r;
                            uint32_t(&f)[4][4] = a[i % 2];
                            const uint32_t *word = reinterpret_cast<const uint32_t *>(chunk[i % 2]);
#pragma unroll
                            for (int j = 0; j < 4; j++) {
                                if (G && j * kRows % 4 == 0 && (G < 128 || u % 2 == 0))
                                    dequant_load_scales<T, F>(
                                        scales[r],
                                        scale_at + r * L::scale_block +
                                            (G < 128 ? u * kRows + j * kRows / 4 : u / 2) *
                                                granule_stride,
                                        place, sym);
                                dequant_word<T, F>(f[j], word + j * bits / 4, scales[r]);
                                if constexpr (kMma)
#pragma unroll
                                    for (int t = 0; t < NT / 8; t++)
                                        multiply(&acc[r][4 * t], f[j], b[j][t][0], b[j][t][1], T{});
                            }
                            // 16-bit codes are fragments as they are: a load before the wait
                            // would fall on registers that a wgmma in flight still reads.
                            constexpr bool kLate = !kMma && F == WF_16;
                            const bool more = i + 1 < KU * R && (r + 1 < R || u + 1 < n);
                            if (!kLate && more) load(i + 1);
                            if constexpr (!kMma) {
                                group_fence();
#pragma unroll
                                for (int j = 0; j < 4; j++)
                                    multiply_group<T, NT>::run(
                                        acc[r], f[j], group_descriptor(x + u * NT * 128 + 32 * j));
                                group_commit();
                                group_wait<1>();
                                if (kLate && more) load(i + 1);
                                if (i == 0 && last >= 0 && lane == 0)
                                    barrier_arrive(empty + last * 8);
                            }
                        }
                    }
                }
            };
            // Twice for mma.sync, whose code without branches overlaps units; wgmma wants one
            // place.
            if (KU == 1 || (kMma && units == KU))
                compute(KU);
            else
                compute(units);
            if constexpr (kMma) {
                __syncwarp();
                if (lane == 0) barrier_arrive(empty + stage * 8);
            } else {
                last = stage;
            }
            stage_at += L::code + L::x;
            scale_at += L::scale;
            if (++stage == L::stages) {
                stage = 0, parity ^= 1;
                stage_at = base_at;
                scale_at = scale_in;
            }
        }
        if constexpr (!kMma) {
            group_wait<0>();
#pragma unroll
            for (int r = 0; r < R; r++) group_pin(acc[r]);
        }
        if (last >= 0 && lane == 0) barrier_arrive(empty + last * 8);
        if (s.step1 - s.step0 == p.steps || linear_share<NT, R>(acc, p, walk, s, later))
            linear_finish<T, NT, R>(acc, p, s, turn);
    }
    linear_finish_all<T, NT, R>(p, later, turn);
#endif
}

template <typename T, int F, int NT, int R, int KU, int G, int KB, int kCtas>
status launch(const linear_args *args, int32_t n_sms, int32_t per_sm, kernel_stream stream) {
    const auto kernel = linear_hopper<T, F, NT, R, KU, G, KB, kCtas>;
    CUtensorMap map = {};
    if (!args->x_row) {
        TRY(linear_map_x(&map, args, half_pair<T>::bf16, NT));
    }
    constexpr int bytes = tile<F, NT, R, KU, G, KB>::bytes;
    cudaError_t e =
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
    constexpr int threads = 32 * LINEAR_WARPS + loaders(kCtas);
    int fit = 0;
    if (e == cudaSuccess)
        e = cudaOccupancyMaxActiveBlocksPerMultiprocessor(&fit, kernel, threads, bytes);
    // All at once: they wait for each other.
    const launch_config l(dim3((unsigned)(n_sms * (per_sm < fit ? per_sm : fit))), dim3(threads),
                          bytes, stream, true);
    if (e == cudaSuccess) e = cudaLaunchKernelEx(&l.config, kernel, *args, map);
    return e == cudaSuccess ? ST_OK : FAIL(ST_DEVICE, "linear_hopper: %s", cudaGetErrorString(e));
}

#define T_F16  __half
#define T_BF16 __nv_bfloat16
#define ROW(F, T, NT, R, KU, G, KB, CTAS, GRID)                                                    \
    {"hopper_" #NT "x" #R,                                                                         \
     90,                                                                                           \
     90,                                                                                           \
     WF_##F,                                                                                       \
     DT_##T,                                                                                       \
     NT,                                                                                           \
     2 * R,                                                                                        \
     KU,                                                                                           \
     G,                                                                                            \
     G,                                                                                            \
     GRID,                                                                                         \
     launch<T_##T, WF_##F, NT, R, KU, G, KB, CTAS>,                                                \
     0},
const linear_variant rows[] = {HOPPER_INSTANCES(ROW)};

} // namespace

extern "C" status linear_map_x(void *map, const linear_args *a, bool bf16, int32_t rows) {
    tensor_map_encode encode;
    TRY(tensor_map_encoder(&encode));
    const cuuint64_t size[2] = {(cuuint64_t)a->k, (cuuint64_t)a->m};
    const cuuint64_t stride[1] = {(cuuint64_t)a->ldx * 2};
    const cuuint32_t box[2] = {64, (cuuint32_t)rows}, step[2] = {1, 1};
    const CUresult r =
        encode(static_cast<CUtensorMap *>(map),
               bf16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16, 2,
               const_cast<void *>(a->x), size, stride, box, step, CU_TENSOR_MAP_INTERLEAVE_NONE,
               CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_128B,
               CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
    return r == CUDA_SUCCESS ? ST_OK : FAIL(ST_DEVICE, "tensor map of x: error %d", (int)r);
}

extern "C" linear_table linear_hopper_table(void) {
    return linear_table{rows, (int32_t)(sizeof rows / sizeof rows[0])};
}
