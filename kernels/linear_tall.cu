// linear_tall.cu - y^T = W x^T for tall batches on Hopper: tiles of 256 rows of W x 128 rows of x.
//
// Four warpgroups compute, each one block of 64 rows of W, one warp loads. A warpgroup converts a
// unit of its block to 16 registers of A fragments, has the tensor cores multiply them, and waits:
// nothing overlaps within it. The other three keep the tensor cores busy meanwhile, as long as to
// convert a unit takes a warp less than three times what the tensor cores need for it (256 cycles).
//
// Many tiles are walked as in linear_common.cuh. Few tiles (S CTAs each or fewer would fill the
// GPU) are cut along K over the S CTAs of a cluster, whose sums meet in distributed shared memory:
// each CTA leaves its own where the stages were, and adds up every S-th group of 8 x rows of all,
// in ascending order of K.
#include "linear_common.cuh"
#include "linear_launch.h"
#include "ptx_sm90.cuh"
#include <cuda.h>

// The explicit list: format, type, scale granule (0: none).
#ifndef TALL_INSTANCES
#define TALL_TYPES(X, F, G) X(F, F16, G) X(F, BF16, G)
#define TALL_INSTANCES(X)                                                                          \
    TALL_TYPES(X, INT4, 128)                                                                       \
    TALL_TYPES(X, INT4, 64)                                                                        \
    TALL_TYPES(X, INT4, 32)                                                                        \
    TALL_TYPES(X, MXFP4, 32)                                                                       \
    TALL_TYPES(X, INT8, 0)                                                                         \
    TALL_TYPES(X, FP8, 0)                                                                          \
    TALL_TYPES(X, FP8B, 128)                                                                       \
    TALL_TYPES(X, 16, 0)
#endif

namespace {

constexpr int kRows = 128, kGroups = kRows / 8; // of x; and what they are dealt out in
constexpr int kBlocks = 4, kUnits = 2;          // of a tile, of a step
constexpr int kWarps = 4 * kBlocks, kMath = 32 * kWarps;
constexpr int kThreads = kMath + 128; // a whole warpgroup, which can hand registers to the others
constexpr int kClusterMax = 8;
constexpr int kMathRegisters = 112, kLoadRegisters = 32;
// A CTA has what it is launched with: multiples of 8, of the 16384 of an SM's quarter.
static_assert(kMath * kMathRegisters + 128 * kLoadRegisters <=
                  kThreads * (65536 / kThreads / 8 * 8),
              "registers_up would wait for ever");
// Named barriers: 0 is __syncthreads.
enum { BAR_MATH = 1, BAR_PAIR = 2 };

__host__ __device__ constexpr int code_bits(int f) {
    return f == WF_16 ? 16 : f == WF_INT4 || f == WF_MXFP4 || f == WF_NVFP4 ? 4 : 8;
}
// Largest bytes of a granule of one block.
__host__ __device__ constexpr int granule_bytes(int f) {
    return f == WF_INT4 ? 192 : f == WF_MXFP4 || f == WF_NVFP4 ? 64 : 16;
}

// Shared memory: stages of codes and x, then stages of scales, the turning places, what warps of
// gate and up exchange, barriers, row ids. The sums of a cluster lie where the stages were.
template <int F, int G> struct tile {
    static constexpr int unit = 512 * code_bits(F); // bytes of a block
    static constexpr int code = kBlocks * kUnits * unit, x = kUnits * kRows * 128;
    static constexpr int rows = G ? kUnits * 64 / G : 0; // granules of a step
    static constexpr int scale_block = rows * granule_bytes(F), scale = kBlocks * scale_block;
    static constexpr int turn = kWarps * LINEAR_STAGE_FLOATS * 4, pair = kWarps * 512;
    static constexpr int fixed =
        turn + pair + 256 + kRows * 4 + 1024; // 1024: alignment of the base
    static constexpr int stages = (224 * 1024 - fixed) / (code + x + scale + 16);
    static_assert(stages >= 2 && stages * (code + x) >= kWarps * kGroups * 512, "tile too large");
    static constexpr int at_scale = stages * (code + x), at_turn = at_scale + stages * scale;
    static constexpr int at_pair = at_turn + turn, at_bars = at_pair + pair;
    static constexpr int at_rows = at_bars + 256, bytes = at_rows + kRows * 4 + 1024;
};

// --- Clusters -----------------------------------------------------------------------------------

__device__ __forceinline__ void cluster_sync() { // all threads of all its CTAs
    asm volatile("barrier.cluster.arrive.release;\nbarrier.cluster.wait.acquire;" ::: "memory");
}
__device__ __forceinline__ float4 cluster_load(uint32_t at, int rank) {
    float4 v;
    asm volatile("{\n.reg .u32 there;\n"
                 "mapa.shared::cluster.u32 there, %4, %5;\n"
                 "ld.shared::cluster.v4.f32 {%0, %1, %2, %3}, [there];\n}"
                 : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w)
                 : "r"(at), "r"(rank)
                 : "memory");
    return v;
}
__device__ __forceinline__ void shared_put(uint32_t at, float4 v) {
    asm volatile("st.shared.v4.f32 [%0], {%1, %2, %3, %4};" ::"r"(at), "f"(v.x), "f"(v.y), "f"(v.z),
                 "f"(v.w)
                 : "memory");
}
__device__ __forceinline__ float4 shared_get(uint32_t at) {
    float4 v;
    asm volatile("ld.shared.v4.f32 {%0, %1, %2, %3}, [%4];"
                 : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w)
                 : "r"(at)
                 : "memory");
    return v;
}
template <int kThreads> __device__ __forceinline__ void sync_some(int barrier) {
    asm volatile("bar.sync %0, %1;" ::"r"(barrier), "n"(kThreads) : "memory");
}

// --- The walk: linear_walk's, or one tile's part for each CTA of a cluster ----------------------

// What a warp that computes knows of its work between two steps; in shared memory, for its
// registers are few.
struct tall_work {
    linear_segment s;
    int32_t at, tile;       // of the walk
    int32_t owner, sharers; // CTAs of this tile, of which `owner` is the first
};

// The next segment; false: there is none.
__device__ __forceinline__ bool next_work(const linear_args &p, const int32_t *tile_start,
                                          bool first, tall_work &w) {
    linear_walk<kRows> walk(p, tile_start);
    const int size = cluster_size(), rank = cluster_rank();
    if (size > 1) {
        walk.locate((int32_t)blockIdx.x / size, w.s);
        w.s.line = -1;
        w.s.step0 = p.steps * rank / size;
        w.s.step1 = p.steps * (rank + 1) / size;
        return first;
    }
    if (!first) walk.at = w.at, walk.tile = w.tile;
    if (!walk.next(w.s)) return false;
    w.at = walk.at;
    w.tile = walk.tile;
    w.owner = w.s.line < 0 ? walk.cta : walk.holder(w.s.line);
    w.sharers = w.s.line < 0 ? 1 : walk.holder(w.s.line + p.steps - 1) - w.owner + 1;
    return true;
}

// --- Loading ------------------------------------------------------------------------------------

// One warp: lane i < 4 copies the codes of block i, lane 4 + i its scales, lane 8 the tiles of x;
// gathered rows are copied by all lanes. The weights of the first stages are asked for before the
// kernel before has ended.
template <typename T, int F, int G> struct producer {
    using L = tile<F, G>;
    const linear_args &p;
    const CUtensorMap *map;
    int32_t *rows;
    uint32_t base, full, empty;
    int lane;

    const uint8_t *from; // what this lane copies: its block's start
    uint32_t to;         // in the first stage
    bool valid;
    int blocks; // of the tile

    __device__ __forceinline__ void begin(const linear_segment &s) {
        const int slot = lane % kBlocks;
        const int32_t b = linear_block<2>(p, s.tile_n, slot / 2, slot % 2);
        blocks = __popc(__ballot_sync(~0u, lane < kBlocks && b < p.blocks));
        valid = lane < (G ? 2 : 1) * kBlocks && b < p.blocks;
        from = lane < kBlocks
                   ? p.code + s.expert * p.code_bytes + (int64_t)b * p.units * L::unit
                   : p.scale + s.expert * p.scale_bytes + (int64_t)b * p.granules * p.granule_bytes;
        to =
            base + (lane < kBlocks ? slot * kUnits * L::unit : L::at_scale + slot * L::scale_block);
    }
    __device__ __forceinline__ void find_rows(const linear_segment &s) {
        __syncwarp();
        for (int i = lane; i < kRows; i += 32)
            rows[i] = s.m0 + i < s.m_end ? p.x_row[s.m0 + i] : -1;
        __syncwarp();
    }

    __device__ int units(int step) const { return min(kUnits, p.units - step * kUnits); }
    static __device__ int granules(int n) { return G ? (n * 64 + G - 1) / (G ? G : 64) : 0; }

    // Codes and scales of a step; all its bytes are announced here.
    __device__ __forceinline__ void weights(int step, int stage) const {
        const int n = units(step), rows_n = granules(n);
        if (lane == 0)
            barrier_arrive_expect(full + stage * 8,
                                  blocks * (n * L::unit + rows_n * p.granule_bytes) +
                                      (p.x_row ? 0 : n * kRows * 128));
        __syncwarp();
        const bool code = lane < kBlocks;
        if (valid)
            copy_bulk(to + stage * (code ? L::code + L::x : L::scale),
                      from +
                          (uint32_t)(step * (code ? kUnits * L::unit : L::rows * p.granule_bytes)),
                      code ? n * L::unit : rows_n * p.granule_bytes, full + stage * 8,
                      policy_evict_normal());
    }

    __device__ __forceinline__ void inputs(const linear_segment &s, int step, int stage) const {
        const uint32_t at = base + stage * (L::code + L::x) + L::code;
        const int n = units(step);
        if (!p.x_row) {
            if (lane == 2 * kBlocks)
                for (int u = 0; u < n; u++)
                    copy_tile(at + u * kRows * 128, map, (step * kUnits + u) * 64, s.m0,
                              full + stage * 8);
            return;
        }
        const int chunk = lane % 8;
        for (int u = 0; u < n; u++) {
            const int k = (step * kUnits + u) * 64 + chunk * 8;
#pragma unroll 4
            for (int row = lane / 8; row < kRows; row += 4) {
                const int32_t m = rows[row];
                const bool there = m >= 0 && k < p.k;
                asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(
                                 at + u * kRows * 128 + row * 128 + ((chunk ^ row % 8) << 4)),
                             "l"(static_cast<const T *>(p.x) + (there ? m * p.ldx + k : 0)),
                             "r"(there ? 16 : 0)
                             : "memory");
            }
        }
        barrier_arrive_copies(full + stage * 8);
    }

    __device__ __forceinline__ void run(const int32_t *tile_start) {
        tall_work w;
        const linear_segment &s = w.s;
        int stage = 0, parity = 1, early = 0;
        for (bool first = true; next_work(p, tile_start, first, w); first = false) {
            begin(s);
            if (first) {
                for (; early < L::stages && s.step0 + early < s.step1; early++)
                    weights(s.step0 + early, early);
                wait_for_previous();
            }
            if (p.x_row) find_rows(s);
            for (int step = s.step0; step < s.step1; step++) {
                barrier_wait(empty + stage * 8, parity);
                if (early > 0)
                    early--;
                else
                    weights(step, stage);
                inputs(s, step, stage);
                if (++stage == L::stages) stage = 0, parity ^= 1;
            }
        }
    }
};

// --- Epilogue -----------------------------------------------------------------------------------

// Where this warp's block goes; of a pair, the place of the gate.
__device__ __forceinline__ linear_place place_of(const linear_args &p, const linear_segment &s) {
    const int wg = threadIdx.x / 128, strip = threadIdx.x / 32 % 4;
    linear_place at;
    at.block = linear_block<2>(p, s.tile_n, wg / 2, p.paired ? 0 : wg % 2);
    const int32_t half = at.block >= p.half_blocks ? 1 : 0;
    const int32_t in_half = (at.block - half * p.half_blocks) * 64 + strip * 16;
    at.there = at.block < p.blocks && in_half < p.half_rows;
    at.col = half * p.half_rows + in_half + threadIdx.x % 4 * 4;
    return at;
}

struct both_outputs {
    linear_outputs gate, up;
};

// Formats that unfold have no other scale here.
template <typename T, int F>
__device__ __forceinline__ both_outputs outputs_of(const linear_args &p, const linear_segment &s,
                                                   const linear_place &at) {
    both_outputs o = {};
    if (at.there) o.gate = linear_outputs_of<T>(p, s.expert, at.block, at.col);
    if (at.there && p.paired)
        o.up = linear_outputs_of<T>(p, s.expert, at.block + p.half_blocks, at.col + p.half_rows);
    constexpr float unfold = dequant_unfold<T, F>();
    if (unfold != 1.f) o.gate.scale = o.up.scale = make_float4(unfold, unfold, unfold, unfold);
    return o;
}

// A whole tile in registers. Of a pair, the warp of the gate finishes the first half of the x rows
// and that of up the second: one group each way at a time.
template <typename T, int F>
__device__ __forceinline__ void finish(float (&acc)[1][kRows / 2], const linear_args &p,
                                       const linear_segment &s, float *stage, uint32_t pair_at) {
    const linear_place at = place_of(p, s);
    const both_outputs o = outputs_of<T, F>(p, s, at);
    if (!p.paired) {
        if (!at.there) return;
#pragma unroll
        for (int j = 0; j < kGroups; j++)
            if (s.m0 + 8 * j < s.m_end)
                linear_emit<T, false>(p, s.m0 + 8 * j, s.m_end, at.col, &acc[0][4 * j],
                                      &acc[0][4 * j], o.gate, o.gate, stage);
        return;
    }
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const bool up = warp / 4 % 2;
    const int barrier = BAR_PAIR + warp / 8 * 4 + warp % 4;
#pragma unroll
    for (int j = 0; j < kGroups / 2; j++) {
        float mine[4], other[4];
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const float low = acc[0][4 * j + i], high = acc[0][4 * (j + kGroups / 2) + i];
            mine[i] = up ? high : low;
            other[i] = up ? low : high;
        }
        shared_put(pair_at + warp * 512 + lane * 16,
                   make_float4(other[0], other[1], other[2], other[3]));
        sync_some<64>(barrier);
        const float4 v = shared_get(pair_at + (warp ^ 4) * 512 + lane * 16);
        sync_some<64>(barrier);
        const float got[4] = {v.x, v.y, v.z, v.w};
        float gate[4], c[4];
#pragma unroll
        for (int i = 0; i < 4; i++) {
            gate[i] = up ? got[i] : mine[i];
            c[i] = up ? mine[i] : got[i];
        }
        const int32_t m0 = s.m0 + 8 * (j + up * kGroups / 2);
        if (at.there && m0 < s.m_end)
            linear_emit<T, true>(p, m0, s.m_end, at.col, gate, c, o.gate, o.up, stage);
    }
}

// The sums of all CTAs of the cluster for one group of one warp.
__device__ __forceinline__ void cluster_sum(float (&c)[4], uint32_t sums, int warp, int group,
                                            int size) {
    const uint32_t at = sums + ((warp * kGroups + group) * 32 + threadIdx.x % 32) * 16;
    float4 v[kClusterMax];
#pragma unroll
    for (int i = 0; i < kClusterMax; i++)
        v[i] = i < size ? cluster_load(at, i) : make_float4(0.f, 0.f, 0.f, 0.f);
#pragma unroll
    for (int i = 0; i < kClusterMax; i++)
        c[0] += v[i].x, c[1] += v[i].y, c[2] += v[i].z, c[3] += v[i].w;
}

// A tile of which every CTA of the cluster has summed a part of K.
template <typename T, int F>
__device__ __forceinline__ void finish_cluster(float (&acc)[1][kRows / 2], const linear_args &p,
                                               const linear_segment &s, float *stage, uint32_t sums,
                                               int rank, int size) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    sync_some<kMath>(BAR_MATH); // nobody reads the stages any more
#pragma unroll
    for (int j = 0; j < kGroups; j++)
        shared_put(
            sums + ((warp * kGroups + j) * 32 + lane) * 16,
            make_float4(acc[0][4 * j], acc[0][4 * j + 1], acc[0][4 * j + 2], acc[0][4 * j + 3]));
    cluster_sync();
    const linear_place at = place_of(p, s);
    const both_outputs o = outputs_of<T, F>(p, s, at);
    const bool up = warp / 4 % 2;
    const int first = p.paired ? rank * 2 + up : rank, step = p.paired ? 2 * size : size;
    const int groups = at.there ? (s.m_end - s.m0 + 7) / 8 : 0;
    for (int j = first; j < groups; j += step) {
        float c[4] = {}, c_up[4] = {};
        const int32_t m0 = s.m0 + 8 * j;
        cluster_sum(c, sums, p.paired ? warp & ~4 : warp, j, size);
        if (p.paired) {
            cluster_sum(c_up, sums, warp | 4, j, size);
            linear_emit<T, true>(p, m0, s.m_end, at.col, c, c_up, o.gate, o.up, stage);
        } else {
            linear_emit<T, false>(p, m0, s.m_end, at.col, c, c, o.gate, o.gate, stage);
        }
    }
}

// --- The kernel ---------------------------------------------------------------------------------

#if defined(__CUDA_ARCH_FEAT_SM90_ALL) // empty on other architectures
// A step of this warp's strip: `code` and `scale_at` are its own places in the stage, x_at is the
// low half of the descriptor of x.
template <typename T, int F, int G>
__device__ __forceinline__ void multiply_step(float (&acc)[1][kRows / 2], const linear_args &p,
                                              int units, uint32_t code, uint32_t scale_at,
                                              int place, uint32_t x_at) {
    using L = tile<F, G>;
    constexpr int bits = code_bits(F);
    uint4 chunk;
    dequant_scales scales;
#pragma unroll
    for (int u = 0; u < kUnits; u++) {
        if (u >= units) break;
        uint32_t f[4][4]; // of the four atoms of 16 inputs
#pragma unroll
        for (int j = 0; j < 4; j++) {
            constexpr int kPerLoad = 16 / bits; // atoms in one load of 16 bytes
            if (j % kPerLoad == 0) chunk = shared_u128(code + u * L::unit + j / kPerLoad * 512);
            if (G && (u * 64 + j * 16) % (G ? G : 64) == 0)
                dequant_load_scales<T, F, true>(
                    scales, scale_at + (u * 64 + j * 16) / (G ? G : 64) * p.granule_bytes, place,
                    p.sym);
            dequant_word<T, F, true, true>(
                f[j], reinterpret_cast<const uint32_t *>(&chunk) + j % kPerLoad * (bits / 4),
                scales);
        }
        group_fence();
#pragma unroll
        for (int j = 0; j < 4; j++)
            multiply_group<T, kRows>::run(
                acc[0], f[j], group_descriptor_low(x_at + (u * kRows * 128 + j * 32) / 16));
        group_commit();
        group_wait<0>();
    }
}

// All that a warp which multiplies does.
template <typename T, int F, int G>
__device__ __forceinline__ void compute(const linear_args &p, const int32_t *tile_start,
                                        uint8_t *base, tall_work &work) {
    using L = tile<F, G>;
    const uint32_t base_at = shared_address(base);
    const uint32_t full = base_at + L::at_bars, empty = full + L::stages * 8;
    const int warp = __shfl_sync(~0u, threadIdx.x / 32, 0), lane = threadIdx.x % 32;
    const int wg = warp / 4, strip = warp % 4;
    // Offsets of this lane within a stage; opaque, lest they be computed anew for every unit.
    uint32_t code_in = wg * kUnits * L::unit + strip * (L::unit / 4) + lane * 16;
    int place = strip * 16 + lane / 4 * 2;
    uint32_t scale_in = base_at + L::at_scale + wg * L::scale_block;
    asm volatile("" : "+r"(code_in), "+r"(place), "+r"(scale_in));
    int stage = 0, parity = 0;
    for (bool first = true;; first = false) {
        int step, step_end;
        {
            tall_work w = work;
            if (!next_work(p, tile_start, first, w)) break;
            __syncwarp();
            if (lane == 0) work = w;
            step = w.s.step0;
            step_end = w.s.step1;
        }
        float acc[1][kRows / 2] = {};
        for (; step < step_end; step++) {
            const int units = min(kUnits, p.units - step * kUnits);
            const uint32_t at = base_at + stage * (L::code + L::x), code = at + code_in;
            const uint32_t scale_at = scale_in + stage * L::scale;
            const uint32_t x_at = (at + L::code) >> 4 | 1u << 16; // low half of a descriptor
            barrier_wait(full + stage * 8, parity);
            if (p.x_row) proxy_fence();
            multiply_step<T, F, G>(acc, p, units, code, scale_at, place, x_at);
            __syncwarp(); // all lanes have read
            if (lane == 0) barrier_arrive(empty + stage * 8);
            if (++stage == L::stages) stage = 0, parity ^= 1;
        }
        group_pin(acc[0]);
        __syncwarp();
        const linear_segment s = work.s;
        float *turn = reinterpret_cast<float *>(base + L::at_turn) + warp * LINEAR_STAGE_FLOATS;
        if (cluster_size() > 1) {
            finish_cluster<T, F>(acc, p, s, turn, base_at, cluster_rank(), cluster_size());
            continue;
        }
        if (s.step0 > 0) {
            linear_deposit<kRows, 1, kWarps>(acc, p, (int32_t)(gridDim.x - 1 - blockIdx.x),
                                             work.owner, s);
            continue;
        }
        if (work.sharers > 1) linear_collect<kRows, 1, kWarps>(acc, p, s, work.owner, work.sharers);
        finish<T, F>(acc, p, s, turn, base_at + L::at_pair);
    }
    if (cluster_size() > 1) cluster_sync(); // others may still read what lies here
}

#endif

template <typename T, int F, int G>
__global__ void __launch_bounds__(kThreads, 1)
    linear_tall(const __grid_constant__ linear_args p, const __grid_constant__ CUtensorMap map) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL) // never launched, and empty, on other architectures
    using L = tile<F, G>;
    extern __shared__ uint8_t shared[];
    __shared__ int32_t tile_start_of[LINEAR_EXPERTS_MAX + 1];
    uint8_t *base = shared + ((1024 - (shared_address(shared) & 1023)) & 1023);
    const uint32_t base_at = shared_address(base);
    const uint32_t full = base_at + L::at_bars, empty = full + L::stages * 8;
    const int warp = __shfl_sync(~0u, threadIdx.x / 32, 0), lane = threadIdx.x % 32;

    launch_dependents();
    if (threadIdx.x == 0) {
        for (int i = 0; i < L::stages; i++) {
            barrier_init(full + i * 8, p.x_row ? 1 + 32 : 1);
            barrier_init(empty + i * 8, kWarps);
        }
        barrier_init_fence();
    }
    __syncthreads();
    const int32_t *tile_start = nullptr;
    if (p.expert_start) {
        wait_for_previous();
        linear_tile_starts<kRows>(tile_start_of, p);
        tile_start = tile_start_of;
    }

    if (warp >= kWarps) {
        registers_down<kLoadRegisters>();
        if (warp == kWarps) {
            producer<T, F, G> load = {p,       &map, reinterpret_cast<int32_t *>(base + L::at_rows),
                                      base_at, full, empty,
                                      lane};
            load.run(tile_start);
        }
        if (cluster_size() > 1) {
            cluster_sync();
            cluster_sync();
        }
        return;
    }

    registers_up<kMathRegisters>();
    wait_for_previous();
    __shared__ tall_work work_of[kWarps];
    compute<T, F, G>(p, tile_start, base, work_of[warp]);
#endif
}

// How many CTAs share a tile's K. In steps of about 1.2 us, as timed for every size on an H200
// (kernels/LADDER.md): sharing costs 6 and one more a sharer through L2, 1 within a cluster. A
// cluster must lie in one GPC, so fewer fit than its CTAs suggest (H200: 39 of three, 30 of four,
// 17 of six, 15 of eight); a second wave would cost more than is won.
int32_t cluster_of(const void *kernel, const linear_args *a, cudaLaunchConfig_t *config,
                   int32_t n_sms) {
    if (a->expert_start) return 1; // the number of tiles is known on the device only
    const int32_t tiles = a->n_tiles * ((a->m + kRows - 1) / kRows);
    const int32_t waves = (tiles + n_sms - 1) / n_sms;
    int32_t best = 1, cost = tiles * a->steps / n_sms + 6 + (n_sms + tiles - 1) / tiles;
    cost = cost < waves * a->steps ? cost : waves * a->steps;
    for (int32_t size = 2; size <= kClusterMax && tiles * size <= n_sms; size++) {
        int fit = 0;
        const int32_t with = (a->steps + size - 1) / size + 1;
        if (with >= cost) continue;
        config->attrs[1].val.clusterDim = {(unsigned)size, 1, 1};
        config->gridDim = dim3((unsigned)(tiles * size));
        if (cudaOccupancyMaxActiveClusters(&fit, kernel, config) != cudaSuccess || fit < tiles)
            continue;
        best = size;
        cost = with;
    }
    return best;
}

template <typename T, int F, int G>
status launch(const linear_args *args, int32_t n_sms, int32_t per_sm, kernel_stream stream) {
    const auto kernel = linear_tall<T, F, G>;
    CUtensorMap map = {};
    if (!args->x_row) TRY(linear_map_x(&map, args, half_pair<T>::bf16, kRows));
    constexpr int bytes = tile<F, G>::bytes;
    cudaLaunchAttribute attrs[2];
    attrs[0].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attrs[0].val.programmaticStreamSerializationAllowed = 1;
    attrs[1].id = cudaLaunchAttributeClusterDimension;
    cudaLaunchConfig_t config = {};
    config.blockDim = dim3(kThreads);
    config.dynamicSmemBytes = bytes;
    config.stream = (cudaStream_t)stream;
    config.attrs = attrs;
    config.numAttrs = 2;
    cudaError_t e =
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
    const int32_t size =
        cluster_of(reinterpret_cast<const void *>(kernel), args, &config, n_sms * per_sm);
    const int32_t tiles = args->n_tiles * ((args->m + kRows - 1) / kRows);
    attrs[1].val.clusterDim = {(unsigned)size, 1, 1};
    // Without clusters all at once: they wait for each other.
    config.gridDim = dim3((unsigned)(size > 1 ? tiles * size : n_sms * per_sm));
    if (e == cudaSuccess) e = cudaLaunchKernelEx(&config, kernel, *args, map);
    return e == cudaSuccess ? ST_OK : FAIL(ST_DEVICE, "linear_tall: %s", cudaGetErrorString(e));
}

#define T_F16  __half
#define T_BF16 __nv_bfloat16
#define ROW(F, T, G)                                                                               \
    {"tall_128", 90, 90, WF_##F, DT_##T, kRows, kBlocks, kUnits, G, G, 1, launch<T_##T, WF_##F, G>},
const linear_variant rows[] = {TALL_INSTANCES(ROW)};

} // namespace

extern "C" linear_table linear_tall_table(void) {
    return linear_table{rows, (int32_t)(sizeof rows / sizeof rows[0])};
}
