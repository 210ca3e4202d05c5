// linear_tall.cu - y^T = W x^T for tall batches on Hopper, and for experts: tiles of 256 rows of W,
// or 128 of a small matrix, x up to 128 rows of x.
//
// Four warpgroups compute, each one block of 64 rows of W. A warpgroup converts a unit of its block
// to 16 registers of A fragments, has the tensor cores multiply them, and waits: nothing overlaps
// within it. The other three keep the tensor cores busy meanwhile, as long as to convert a unit
// takes a warp less than three times what the tensor cores need for it (256 cycles at 128 rows).
// Tiles have no more rows than there are, rounded up to 16: the main loop is there for every N of
// wgmma. One warp loads, one walks the tiles and tells the others of them.
//
// Many tiles are walked as in linear_common.cuh, those of experts always whole. Few tiles are cut
// along K over teams of CTAs, whose sums meet in the workspace: each CTA adds up every so-many-th
// group of 8 x rows of all, in ascending order of K. (Clusters and their shared memory are slower:
// 13 bytes a cycle and SM, and not all find a place.) Of 128 rows of W two warpgroups have a block,
// every second unit of it each, and add their sums up within the CTA: teams of half the size then
// exchange less than half of the bytes, for twice as many of x.
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
constexpr int kUnits = 2;                       // of a step
constexpr int kWarps = 16, kMath = 32 * kWarps;
constexpr int kThreads = kMath + 128; // a whole warpgroup, which can hand registers to the others
template <int B> constexpr int kTeamMax = 2 * B;
constexpr int kTeamCost = 8, kCutCost = 5;
constexpr int kHalfParts = 32, kHalfStep = 18, kHalfTeamCost = 173;
constexpr int kMathRegisters = 112, kLoadRegisters = 32;
// A CTA has what it is launched with: multiples of 8, of the 16384 of an SM's quarter.
static_assert(kMath * kMathRegisters + 128 * kLoadRegisters <=
                  kThreads * (65536 / kThreads / 8 * 8),
              "registers_up would wait for ever");
// Named barriers: 0 is __syncthreads.
enum { BAR_MATH = 1, BAR_PAIR = 2, BAR_PART = 10 };

// B: blocks of a tile, 4 or 2. Warpgroups that share a block: warpgroup wg has block wg % B and,
// of every kParts units, number wg / B. Groups of x rows that a warp finishes: all of its strip's,
// or two in turn with the other part's warp.
template <int B> constexpr int kParts = 4 / B;
template <int B> constexpr int kOwn = kGroups / kParts<B>;
template <int B> __device__ __forceinline__ int group_of(int i, int part) {
    return B == 4 ? i : (i / 2 * kParts<B> + part) * 2 + i % 2;
}

// What a warp turns sums around in, see place_put; behind it scales and biases of its 16 outputs
// and of those of up.
constexpr int kPlaceRows = 16, kPlaceOutputs = kPlaceRows * 20 * 4;
constexpr int kPlaceBytes = kPlaceOutputs + 2 * 2 * 16 * 4;

// Shared memory: stages of codes and x, then stages of scales, the turning places, barriers, where
// gathered rows of x lie.
template <int F, int G, int B = 4> struct tile {
    static constexpr int unit = 512 * linear_code_bits(F); // bytes of a block
    static constexpr int code = B * kUnits * unit, x = kUnits * kRows * 128;
    static constexpr int rows = G ? kUnits * 64 / G : 0; // granules of a step
    static constexpr int scale_block = rows * linear_granule_bytes(F), scale = B * scale_block;
    static constexpr int fixed =
        kWarps * kPlaceBytes + 256 + kRows * 4 + 1024; // 1024: alignment of the base
    static constexpr int stages = (224 * 1024 - fixed) / (code + x + scale + 16);
    static_assert(stages >= 2, "tile too large");
    static constexpr int at_scale = stages * (code + x), at_places = at_scale + stages * scale;
    static constexpr int at_bars = at_places + kWarps * kPlaceBytes;
    static constexpr int at_rows = at_bars + 256, bytes = at_rows + kRows * 4 + 1024;
};

// --- Shared memory ------------------------------------------------------------------------------

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
    __syncwarp();
    asm volatile("barrier.sync %0, %1;" ::"r"(barrier), "n"(kThreads) : "memory");
}

// --- The walk: linear_walk's, or one tile's part for each CTA of a team -------------------------

// What a warp that walks tells those that load and compute, a few segments ahead; no steps: the
// end. Their registers are few.
struct tall_work {
    linear_segment s;
    int32_t owner, sharers; // CTAs of this tile, of which `owner` is the first
};
constexpr int kWorks = 4, kTold = 128; // kTold: their barriers, from the first of all

// This CTA's part of a team's tile.
__device__ __forceinline__ void team_work(const linear_args &p, tall_work &w) {
    const int32_t t = (int32_t)blockIdx.x / p.team, m_tiles = (p.m + kRows - 1) / kRows;
    const int rank = (int)blockIdx.x - t * p.team;
    w.s.expert = 0;
    w.s.tile_n = t / m_tiles;
    const int32_t rows = linear_even_rows(p.m, m_tiles);
    w.s.m0 = (t - w.s.tile_n * m_tiles) * rows;
    w.s.m_end = min(p.m, w.s.m0 + rows);
    w.s.line = -1;
    w.s.step0 = rank * p.part + min(rank, p.part_rest);
    w.s.step1 = w.s.step0 + p.part + (rank < p.part_rest ? 1 : 0);
    w.owner = (int32_t)blockIdx.x - rank;
    w.sharers = p.team;
}

// Tell of segment i. `told` is its place's barrier, the one behind it that of its readers.
__device__ __forceinline__ void tell(int i, const tall_work &w, tall_work *works, uint32_t told) {
    told += i % kWorks * 16;
    barrier_wait(told + 8, ~(i / kWorks) & 1);
    if (threadIdx.x % 32 == 0) {
        works[i % kWorks] = w;
        barrier_arrive(told);
    }
    __syncwarp();
}

__device__ __forceinline__ void walk_all(const linear_args &p, const int32_t *tile_start,
                                         tall_work *works, uint32_t told) {
    tall_work w = {};
    int i = 0;
    if (p.team > 1) {
        team_work(p, w);
        tell(i++, w, works, told);
    } else {
        linear_walk<kRows, false, true> walk(p, tile_start);
        while (walk.next(w.s)) {
            w.owner = w.s.line < 0 ? walk.cta : walk.holder(w.s.line);
            w.sharers = w.s.line < 0 ? 1 : walk.holder(w.s.line + p.steps - 1) - w.owner + 1;
            tell(i++, w, works, told);
        }
    }
    w.s.step1 = w.s.step0;
    tell(i, w, works, told);
}

// --- Loading ------------------------------------------------------------------------------------

// One warp: lane i < B copies the codes of block i, lane B + i its scales, lanes from 2 B on the
// boxes of x unless its rows are gathered. The weights of the first stage are asked for before the
// kernel before has ended; more of them would stand in the way of the first rows of x.
template <typename T, int F, int G, int B> struct producer {
    using L = tile<F, G, B>;
    const linear_args &p;
    const CUtensorMap *map;
    const tall_work *works;
    uint32_t base, full, empty;
    int lane;

    const uint8_t *from; // what this lane copies: its block's start
    uint32_t to;         // in the first stage
    bool valid;
    int blocks; // of the tile
    int boxes;  // of x

    __device__ __forceinline__ void begin(const linear_segment &s) {
        const int slot = lane % B;
        const int32_t b = linear_block<2, B / 2>(p, s.tile_n, slot / 2, slot % 2);
        blocks = __popc(__ballot_sync(~0u, lane < B && b < p.blocks));
        valid = lane < (G ? 2 : 1) * B && b < p.blocks;
        from = lane < B
                   ? p.code + s.expert * p.code_bytes + (int64_t)b * p.units * L::unit
                   : p.scale + s.expert * p.scale_bytes + (int64_t)b * p.granules * p.granule_bytes;
        boxes = p.x_row ? 0 : (s.m_end - s.m0 + p.x_box - 1) / p.x_box;
        to = base + (lane < B ? slot * kUnits * L::unit : L::at_scale + slot * L::scale_block);
    }
    __device__ int units(int step) const { return min(kUnits, p.units - step * kUnits); }
    static __device__ int granules(int n) { return G ? (n * 64 + G - 1) / (G ? G : 64) : 0; }

    // Codes and scales of a step; all its bytes are announced here.
    __device__ __forceinline__ void weights(int step, int stage) const {
        const int n = units(step), rows_n = granules(n);
        if (lane == 0)
            barrier_arrive_expect(full + stage * 8,
                                  blocks * (n * L::unit + rows_n * p.granule_bytes) +
                                      n * boxes * p.x_box * 128);
        __syncwarp();
        const bool code = lane < B;
        if (valid)
            copy_bulk(to + stage * (code ? L::code + L::x : L::scale),
                      from +
                          (uint32_t)(step * (code ? kUnits * L::unit : L::rows * p.granule_bytes)),
                      code ? n * L::unit : rows_n * p.granule_bytes, full + stage * 8,
                      policy_evict_normal());
    }

    __device__ __forceinline__ void inputs(const linear_segment &s, int step, int stage) const {
        const uint32_t at = base + stage * (L::code + L::x) + L::code;
        const int box = lane - 2 * B;
        if (box >= 0 && box < units(step) * boxes) {
            const int u = box >= boxes, row = (box - u * boxes) * p.x_box;
            copy_tile(at + u * kRows * 128 + row * 128, map, (step * kUnits + u) * 64, s.m0 + row,
                      full + stage * 8);
        }
        __syncwarp();
    }

    __device__ __forceinline__ void run() {
        int stage = 0, parity = 1;
        for (int i = 0;; i++) {
            const uint32_t told = base + L::at_bars + kTold + i % kWorks * 16;
            barrier_wait(told, i / kWorks & 1);
            const linear_segment s = works[i % kWorks].s;
            if (s.step0 == s.step1) break;
            begin(s);
            if (i == 0) {
                weights(s.step0, 0);
                wait_for_previous();
            }
            __syncwarp();
            if (lane == 0) barrier_arrive(told + 8);
            for (int step = s.step0; step < s.step1; step++) {
                // Nothing is waited for by the first: others may have gathered its rows, and it
                // may be read already, whose phase this parity would not stand for.
                if (i > 0 || step > s.step0) {
                    barrier_wait(empty + stage * 8, parity);
                    weights(step, stage);
                }
                inputs(s, step, stage);
                if (++stage == L::stages) stage = 0, parity ^= 1;
            }
        }
    }
};

// Gathered rows of x in the swizzle of the copy engine, by two warps: `half` takes four rows of
// each eight. A row past the tile's last is the last again: nobody looks at what it gives. A step
// is announced kBehind steps later, when its copies have landed: so this warp makes them visible to
// the tensor cores, and none of those that multiply has to.
template <typename T, int F, int G>
__device__ __forceinline__ void gather(const linear_args &p, const tall_work *works, int32_t *rows,
                                       uint32_t base, int half) {
    using L = tile<F, G>;
    constexpr int kBehind = L::stages > 3 ? 2 : 1;
    const uint32_t full = base + L::at_bars, empty = full + L::stages * 8;
    const int lane = threadIdx.x % 32, chunk = lane % 8, row = half * 4 + lane / 8;
    const uint32_t to_in = L::code + row * 128 + ((chunk ^ row) << 4);
    int stage = 0, parity = 1, under_way = 0, landed = 0; // landed: the stage to announce next
    const auto announce = [&] {
        proxy_fence();
        __syncwarp();
        if (lane == 0) barrier_arrive(full + landed * 8);
        if (++landed == L::stages) landed = 0;
        under_way--;
    };
    wait_for_previous();
    for (int i = 0;; i++) {
        const uint32_t told = full + kTold + i % kWorks * 16;
        barrier_wait(told, i / kWorks & 1);
        const linear_segment s = works[i % kWorks].s;
        if (s.step0 == s.step1) break;
        const int eights = (s.m_end - s.m0 + 7) / 8;
        __syncwarp();
        // In pieces of 16 bytes: 16 eights of the first of this warp's rows, of the second, ..
        for (int r = lane; r < 64; r += 32)
            rows[r] = (int32_t)(p.x_row[min(s.m0 + r % 16 * 8 + half * 4 + r / 16, s.m_end - 1)] *
                                (p.ldx / 8));
        __syncwarp();
        if (lane == 0) barrier_arrive(told + 8);
        for (int step = s.step0; step < s.step1; step++) {
            const int k = step * kUnits * 64 + chunk * 8;
            const uint4 *from = static_cast<const uint4 *>(p.x) + min(k, p.k - 8) / 8;
            const int first = k < p.k ? 16 : 0, second = k + 64 < p.k ? 16 : 0, on = second / 2;
            uint32_t to = base + stage * (L::code + L::x) + to_in;
            barrier_wait(empty + stage * 8, parity);
#pragma unroll 2
            for (int e = 0; e < eights; e += 2, to += 2048) {
                const uint2 at = *reinterpret_cast<const uint2 *>(rows + lane / 8 * 16 + e);
                copy_some(to, from + at.x, first);
                copy_some(to + kRows * 128, from + at.x + on, second);
                copy_some(to + 1024, from + at.y, first);
                copy_some(to + 1024 + kRows * 128, from + at.y + on, second);
            }
            asm volatile("cp.async.commit_group;" ::: "memory");
            if (++under_way > kBehind) {
                asm volatile("cp.async.wait_group %0;" ::"n"(kBehind) : "memory");
                announce();
            }
            if (++stage == L::stages) stage = 0, parity ^= 1;
        }
    }
    asm volatile("cp.async.wait_group 0;" ::: "memory");
    while (under_way > 0) announce();
}

// --- Epilogue -----------------------------------------------------------------------------------

// Where this warp's block goes; of a pair, the place of the gate.
template <int B = 4>
__device__ __forceinline__ linear_place place_of(const linear_args &p, const linear_segment &s,
                                                 int thread) {
    const int b = thread / 128 % B, strip = thread / 32 % 4;
    linear_place at;
    at.block = linear_block<2, B / 2>(p, s.tile_n, b / 2, p.paired ? 0 : b % 2);
    const int32_t half = at.block >= p.half_blocks ? 1 : 0;
    const int32_t in_half = (at.block - half * p.half_blocks) * 64 + strip * 16;
    at.there = at.block < p.blocks && in_half < p.half_rows;
    at.col = half * p.half_rows + in_half + thread % 4 * 4;
    return at;
}

// Scales and biases of a warp's outputs (1: of up's) into its place.
template <typename T, int F>
__device__ __forceinline__ void outputs_put(uint32_t place, const linear_args &p, int32_t expert,
                                            const linear_place &at, int up, int lane) {
    linear_outputs o =
        linear_outputs_of<T>(p, expert, at.block + up * p.half_blocks, at.col + up * p.half_rows);
    constexpr float unfold = dequant_unfold<T, F>();
    if (unfold != 1.f) // such formats have no other scale here
        o.scale = make_float4(unfold, unfold, unfold, unfold);
    const uint32_t to = place + kPlaceOutputs + up * 128 + lane % 4 * 16;
    shared_put(to, o.scale);
    shared_put(to + 64, o.bias);
}
__device__ __forceinline__ float4 affine(uint32_t place, float4 v, int up, int lane) {
    const uint32_t from = place + kPlaceOutputs + up * 128 + lane % 4 * 16;
    const linear_outputs o = {shared_get(from), shared_get(from + 64)};
    return linear_affine(v, o);
}

// Sums pass through a place of this warp's own: kPlaceRows x rows of its 16 outputs, rows padded by
// one vector.
__device__ __forceinline__ void place_put(uint32_t place, int row0, const float *c, int lane) {
    const int g = lane / 4, t = lane % 4;
    const uint32_t at = place + ((row0 + 2 * t) * 20 + g) * 4;
    asm volatile("st.shared.f32 [%0], %1;\nst.shared.f32 [%0+80], %2;\n"
                 "st.shared.f32 [%0+32], %3;\nst.shared.f32 [%0+112], %4;" ::"r"(at),
                 "f"(c[0]), "f"(c[1]), "f"(c[2]), "f"(c[3])
                 : "memory");
}
__device__ __forceinline__ float4 place_get(uint32_t place, int row0, int lane) {
    return shared_get(place + ((row0 + lane / 4) * 20 + lane % 4 * 4) * 4);
}

// A lane's four outputs of an x row, and where those of the row eight further lie. What does not
// change from row to row is found once: issue slots are what an epilogue takes.
template <typename T> struct tall_output {
    const linear_args &p;
    uint8_t *y;
    int64_t step; // bytes of eight rows

    __device__ __forceinline__ tall_output(const linear_args &p, int32_t row, int32_t col) : p(p) {
        const int64_t bytes = p.y_f32 ? 4 : sizeof(T);
        y = static_cast<uint8_t *>(p.y) + (row * p.ldy + col) * bytes;
        step = 8 * p.ldy * bytes;
    }
    __device__ __forceinline__ void put(float4 v) const {
        if (p.y_f32 || p.epilogue == LINEAR_RESIDUAL) {
            linear_args one = {}; // the general way: of one row
            one.y = y;
            one.y_f32 = p.y_f32;
            one.epilogue = p.epilogue;
            linear_put<T>(one, 0, 0, v);
        } else {
            *reinterpret_cast<four<T> *>(y) =
                four<T>{{from_f32<T>(v.x), from_f32<T>(v.y), from_f32<T>(v.z), from_f32<T>(v.w)}};
        }
    }
};

// A whole tile in registers, which is used up.
template <typename T, int F>
__device__ __forceinline__ void finish(float (&acc)[1][kRows / 2], const linear_args &p,
                                       const linear_segment &s, uint32_t places) {
    const int thread = linear_thread_anew(), warp = thread / 32, lane = thread % 32;
    const linear_place at = place_of(p, s, thread);
    const uint32_t mine = places + warp * kPlaceBytes;
    if (!at.there) return;
    outputs_put<T, F>(mine, p, s.expert, at, 0, lane);
    int32_t row = s.m0 + lane / 4;
    tall_output<T> out(p, row, at.col);
#pragma unroll 1
    for (int m0 = s.m0; m0 < min(s.m0 + kRows, s.m_end); m0 += 16) {
#pragma unroll
        for (int j = 0; j < 2; j++) {
            place_put(mine, j * 8, &acc[0][4 * j], lane); // two in turn: one barrier each
            __syncwarp();
            const float4 v = affine(mine, place_get(mine, j * 8, lane), 0, lane);
            if (row < s.m_end) out.put(v);
            row += 8;
            out.y += out.step;
        }
        linear_move_down<8>(acc[0]);
    }
}

// The same of a pair: the warp of the gate finishes the first half of each place and that of up the
// second.
template <typename T, int F>
__device__ __forceinline__ void finish_pair(float (&acc)[1][kRows / 2], const linear_args &p,
                                            const linear_segment &s, uint32_t places) {
    const int thread = linear_thread_anew(), warp = thread / 32, lane = thread % 32;
    const linear_place at = place_of(p, s, thread);
    const uint32_t mine = places + warp * kPlaceBytes, gate = places + (warp & ~4) * kPlaceBytes;
    const int barrier = BAR_PAIR + warp / 8 * 4 + warp % 4, half = warp / 4 % 2 * 8;
    if (!at.there) return;
    outputs_put<T, F>(mine, p, s.expert, at, 0, lane);
    outputs_put<T, F>(mine, p, s.expert, at, 1, lane);
    int32_t row = s.m0 + half + lane / 4;
    tall_output<T> out(p, row, at.col);
#pragma unroll
    for (int q = 0; q < kRows / kPlaceRows; q++) {
        if (s.m0 + q * kPlaceRows >= s.m_end) break;
        place_put(mine, 0, &acc[0][8 * q], lane);
        place_put(mine, 8, &acc[0][8 * q + 4], lane);
        sync_some<64>(barrier);
        const float4 g = affine(mine, place_get(gate, half, lane), 0, lane);
        const float4 u = affine(mine, place_get(gate + 4 * kPlaceBytes, half, lane), 1, lane);
        sync_some<64>(barrier);
        if (row < s.m_end) out.put(linear_gate_all(g, u, p));
        row += kPlaceRows;
        out.y += 2 * out.step;
    }
}

// A whole tile in registers, of plain outputs of 16 bits.
template <typename T, int F>
__device__ __forceinline__ void finish_16(float (&acc)[1][kRows / 2], const linear_args &p,
                                          const linear_segment &s, uint32_t places) {
    const int thread = linear_thread_anew(), warp = thread / 32, lane = thread % 32;
    linear_place at = place_of(p, s, thread);
    if (!at.there) return;
    at.col -= thread % 4 * 4;
    float scale[2], bias[2]; // of outputs g and g + 8
#pragma unroll
    for (int i = 0; i < 2; i++) {
        const int of = lane / 4 + 8 * i;
        scale[i] = dequant_unfold<T, F>();
        bias[i] = 0.f;
        if (p.channel)
            scale[i] =
                p.channel[((int64_t)s.expert * p.blocks + at.block) * 64 + warp % 4 * 16 + of];
        if (p.global_scale) scale[i] = p.global_scale[s.expert];
        if (p.bias)
            bias[i] = to_f32(static_cast<const T *>(p.bias)[(int64_t)s.expert * p.n + at.col + of]);
    }
    const uint32_t mine = places + warp * kPlaceBytes;
    const uint32_t put = mine + linear_place_at(lane / 16 * 8 + lane % 8, lane / 8 % 2);
    const uint32_t get = mine + linear_place_at(lane / 2, lane % 2);
    int32_t row = s.m0 + lane / 2;
    T *y = static_cast<T *>(p.y) + row * p.ldy + at.col + lane % 2 * 8;
    const bool wide = linear_wide(p);
    const int32_t end = s.m_end, last = end - s.m0;
#pragma unroll
    for (int q = 0; q < kRows / 16; q++) {
        if (q * 16 >= last) break;
        uint32_t v[4];
#pragma unroll
        for (int i = 0; i < 4; i++)
            v[i] = pack2<T>(fmaf(acc[0][8 * q + 2 * i], scale[i % 2], bias[i % 2]),
                            fmaf(acc[0][8 * q + 2 * i + 1], scale[i % 2], bias[i % 2]));
        linear_place_16(put + q % 2 * 512, v); // two in turn: one barrier each
        __syncwarp();
        const uint4 out = shared_u128(get + q % 2 * 512);
        if (row < end) linear_store_16(y, out, wide);
        row += 16;
        y += 16 * p.ldy;
    }
}

// Part i of n: *from, or what lies at `own` in shared memory where it is this CTA's, or -0 where
// there is no such part. (As C it is a predicate of each load that lives on.)
__device__ __forceinline__ float4 load_part(const float4 *from, uint32_t own, int i, int rank,
                                            int n) {
    float4 v;
    asm volatile("{\n.reg .pred mine, there;\nsetp.eq.s32 mine, %6, %7;\n"
                 "setp.lt.and.s32 there, %6, %8, !mine;\n"
                 "mov.f32 %0, 0f80000000;\nmov.f32 %1, 0f80000000;\n"
                 "mov.f32 %2, 0f80000000;\nmov.f32 %3, 0f80000000;\n"
                 "@mine ld.shared.v4.f32 {%0, %1, %2, %3}, [%5];\n"
                 "@there ld.relaxed.gpu.global.v4.f32 {%0, %1, %2, %3}, [%4];\n}"
                 : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w)
                 : "l"(from), "r"(own), "r"(i), "r"(rank), "r"(n)
                 : "memory");
    return v;
}

// Where the stages were: what two parts exchange, 512 bytes a group, and behind it, by warp, a
// CTA's own sums of the groups that it finishes, in the groups' order.
template <int B> constexpr int kKept = kOwn<B> / 2 * 512;
template <int B> constexpr int kMerged = B == 4 ? 0 : kWarps *kOwn<B> * 512;

// Of the groups that this warp finishes the sums of both parts.
template <int kPart>
__device__ __forceinline__ void merge_parts(float (&own)[kOwn<2> * 4],
                                            const float (&acc)[kRows / 2], uint32_t mine,
                                            uint32_t other, int strip) {
#pragma unroll
    for (int i = 0; i < kOwn<2>; i++) {
        const float *c = acc + 4 * ((i / 2 * 2 + 1 - kPart) * 2 + i % 2);
        shared_put(mine + i * 512, make_float4(c[0], c[1], c[2], c[3]));
    }
    sync_some<128>(BAR_PART + strip);
#pragma unroll
    for (int i = 0; i < kOwn<2>; i++) {
        const float *c = acc + 4 * ((i / 2 * 2 + kPart) * 2 + i % 2);
        const float4 v = shared_get(other + i * 512);
        own[4 * i] = c[0] + v.x, own[4 * i + 1] = c[1] + v.y;
        own[4 * i + 2] = c[2] + v.z, own[4 * i + 3] = c[3] + v.w;
    }
}
__device__ __forceinline__ void merge(float (&own)[1][kOwn<2> * 4],
                                      const float (&acc)[1][kRows / 2], uint32_t stages) {
    const int warp = linear_thread_anew() / 32, lane = linear_thread_anew() % 32;
    const uint32_t at = stages + lane * 16, mine = at + warp * kOwn<2> * 512,
                   other = at + (warp ^ 8) * kOwn<2> * 512;
    if (warp < 8)
        merge_parts<0>(own[0], acc[0], mine, other, warp % 4);
    else
        merge_parts<1>(own[0], acc[0], mine, other, warp % 4);
}

// Sums of a team's CTAs in the workspace: part i of group j of warp `from`, from slot + i kSlot on.
// CTAs of tiles of 256 rows count there what has arrived. For tiles of 128 rows it lies where zeros
// were, as in linear_common.cuh; reading again is too much of larger sums.
template <int B>
__device__ __forceinline__ float4 *team_slot(const linear_args &p, int32_t cta, bool tail) {
    if (B == 4) return linear_slot<8 * kOwn<B>, 1, kWarps>(p, cta, tail);
    const int thread = linear_thread_anew();
    return reinterpret_cast<float4 *>(p.sums) + (cta * kWarps + thread / 32) * kOwn<B> * 32 +
           thread % 32;
}
template <int B> struct team_group {
    static constexpr int64_t kSlot = (int64_t)kWarps * kOwn<B> * 32; // of a CTA; B = 4: it has two
    float4 *slot;                                                    // of the first CTA
    uint32_t own;                                                    // this CTA's part

    __device__ __forceinline__ float4 *part(int i) const {
        return slot + (B == 4 ? i ? 2 * i - 1 : 0 : i) * kSlot;
    }
    __device__ __forceinline__ void load(float4 (&v)[kTeamMax<B>], int rank, int size) const {
#pragma unroll
        for (int i = 0; i < kTeamMax<B>; i++) v[i] = load_part(part(i), own, i, rank, size);
    }
    __device__ __forceinline__ void clear(int rank, int size) const {
#pragma unroll
        for (int i = 0; i < kTeamMax<B>; i++)
            if (i < size && i != rank) __stcg(part(i), make_float4(0, 0, 0, 0));
    }
};
template <int MOST> __device__ __forceinline__ bool all_there(const float4 (&v)[MOST]) {
    uint32_t least = ~0u;
#pragma unroll
    for (int i = 0; i < MOST; i++)
        least = min(min(least, min(__float_as_uint(v[i].x), __float_as_uint(v[i].y))),
                    min(__float_as_uint(v[i].z), __float_as_uint(v[i].w)));
    return least != 0;
}
// Two groups at once, or the same twice.
template <int B>
__device__ __forceinline__ void team_load(float4 (&v)[kTeamMax<B>], float4 (&w)[kTeamMax<B>],
                                          const team_group<B> &one, const team_group<B> &other,
                                          int rank, int size) {
    bool there = true;
    do {
        one.load(v, rank, size);
        other.load(w, rank, size);
        if (B == 2) there = all_there(v) && all_there(w);
    } while (B == 2 && !__all_sync(~0u, there));
    if (B == 4) return;
    one.clear(rank, size);
    other.clear(rank, size);
}
template <int MOST>
__device__ __forceinline__ void team_sum(uint32_t place, int row0, const float4 (&v)[MOST],
                                         int lane) {
    float c[4] = {};
#pragma unroll
    for (int i = 0; i < MOST; i++) c[0] += v[i].x, c[1] += v[i].y, c[2] += v[i].z, c[3] += v[i].w;
    place_put(place, row0, c, lane);
}

// Whether a row is there need not be asked for where sums only pass.
__device__ __forceinline__ linear_segment all_rows(const linear_segment &s) {
    return linear_segment{s.expert, 0, kRows, s.tile_n, s.step0, s.step1, s.line};
}
__device__ __forceinline__ void deposit(float (&acc)[1][kRows / 2], const linear_args &p,
                                        int32_t cta, int32_t owner, const linear_segment &s) {
    linear_deposit<kRows, 1, kWarps>(acc, p, cta, owner, all_rows(s));
}
__device__ __forceinline__ void collect(float (&acc)[1][kRows / 2], const linear_args &p,
                                        int32_t owner, int32_t n, const linear_segment &s) {
    linear_collect<kRows, 1, kWarps>(acc, p, all_rows(s), owner, n);
}

// How many of a warp's own groups have rows; of two parts, the last may have none.
template <int B> __device__ __forceinline__ int groups_of(const linear_segment &s, int part) {
    const int rows = s.m_end - s.m0;
    return B == 4 ? (rows + 7) / 8 : ((rows + 15) / 16 + 1 - part) / 2 * 2;
}

// CTA `rank` of a team finishes every size-th group, of gate and up every size-th two. It keeps its
// own sums of those at `kept` and deposits the others.
template <int B>
__device__ __forceinline__ void team_deposit(const float (&acc)[1][kOwn<B> * 4],
                                             const linear_args &p, int32_t owner, int groups,
                                             uint32_t kept, int rank, int size) {
    float4 *slot = team_slot<B>(p, (int32_t)blockIdx.x, rank == 0);
    int finisher = 0;
#pragma unroll
    for (int j = 0; j < kOwn<B>; j++) {
        float4 v =
            make_float4(acc[0][4 * j], acc[0][4 * j + 1], acc[0][4 * j + 2], acc[0][4 * j + 3]);
        if (B == 2)
            v = make_float4(linear_never_zero(v.x), linear_never_zero(v.y), linear_never_zero(v.z),
                            linear_never_zero(v.w));
        if (j < groups && finisher == rank) {
            shared_put(kept, v);
            kept += 512;
        } else if (j < groups) {
            linear_store_part(slot + j * 32, v);
        }
        if (!p.paired || j % 2) finisher = finisher + 1 == size ? 0 : finisher + 1;
    }
    if (B == 4) __threadfence();
    __syncwarp();
    if (B == 4 && linear_thread_anew() % 32 == 0) atomicAdd(linear_counter<kWarps>(p, owner), 1);
}

// A tile of which `size` CTAs have summed a part of K each, and of which each finishes every
// size-th group; two groups, or gate and up of one, are asked for at once.
template <typename T, int F, int B>
__device__ __forceinline__ void finish_team(float (&acc)[1][kRows / 2], const linear_args &p,
                                            const linear_segment &s, uint32_t places,
                                            uint32_t stages, int rank, int size) {
    const int thread = linear_thread_anew(), warp = thread / 32, lane = thread % 32;
    const int32_t owner = (int32_t)blockIdx.x - rank;
    sync_some<kMath>(BAR_MATH); // all stages have been read
    const linear_place at = place_of<B>(p, s, thread);
    const int part = thread / (128 * B);
    const int groups = at.there ? groups_of<B>(s, part) : 0;
    const uint32_t kept = stages + kMerged<B> + lane * 16;
    if constexpr (B == 4) {
        team_deposit<B>(acc, p, owner, groups, kept + warp * kKept<B>, rank, size);
    } else {
        float merged[1][kOwn<B> * 4];
        merge(merged, acc, stages);
        team_deposit<B>(merged, p, owner, groups, kept + warp * kKept<B>, rank, size);
    }
    if (B == 4) linear_await(linear_counter<kWarps>(p, owner), size);
    const bool up = warp / 4 % 2;
    const uint32_t mine = places + warp * kPlaceBytes;
    const int first = p.paired ? rank * 2 + up : rank, step = 2 * size;
    // Of a pair: the gate's and up's sums of group j. Else: of groups j and j + size.
    const int from = p.paired ? warp & ~4 : warp, other = p.paired ? warp | 4 : warp;
    uint32_t own = kept + from * kKept<B> + (p.paired && up ? 512 : 0);
    const uint32_t to_other = p.paired ? 4 * kKept<B> : 512;
    if (p.paired) // gate's sums are all there, and up's
        sync_some<64>(BAR_PAIR + warp / 8 * 4 + warp % 4);
#pragma unroll 1
    for (int u = 0; u <= p.paired && groups > 0; u++)
        outputs_put<T, F>(mine, p, s.expert, at, u, lane);
    float4 *slot = team_slot<B>(p, owner, true);
#pragma unroll 1
    for (int j = first; j < groups; j += step, own += 1024) {
        const int next = p.paired ? j : j + size;
        const bool two = p.paired || next < groups;
        const team_group<B> one = {slot + (from - warp) * kOwn<B> * 32 + j * 32, own};
        const team_group<B> second = {slot + (other - warp) * kOwn<B> * 32 + (two ? next : j) * 32,
                                      own + (two ? to_other : 0)};
        float4 v[kTeamMax<B>], w[kTeamMax<B>];
        team_load<B>(v, w, one, second, rank, size);
        team_sum(mine, 0, v, lane);
        team_sum(mine, 8, w, lane);
        __syncwarp();
        float4 c = place_get(mine, 0, lane), d = place_get(mine, 8, lane);
        __syncwarp();
        const int32_t row = s.m0 + 8 * group_of<B>(j, part) + lane / 4;
        const int32_t row2 = s.m0 + 8 * group_of<B>(next, part) + lane / 4;
        c = affine(mine, c, 0, lane);
        if (p.paired) c = linear_gate_all(c, affine(mine, d, 1, lane), p);
        if (row < s.m_end) tall_output<T>(p, row, at.col).put(c);
        if (!p.paired && next < groups && row2 < s.m_end)
            tall_output<T>(p, row2, at.col).put(affine(mine, d, 0, lane));
    }
    if (B == 2) return;
    int32_t *counter = linear_counter<kWarps>(p, owner);
    if (lane == 0 && atomicAdd(counter + 1, 1) == size - 1) {
        counter[0] = 0; // for the next launch, which writes after this one has ended
        counter[1] = 0;
    }
}

// --- The kernel ---------------------------------------------------------------------------------

#if defined(__CUDA_ARCH_FEAT_SM90_ALL) // empty on other architectures
// A step of this warp's strip: `code` and `scale_at` are its own places in the stage, x_at is the
// low half of the descriptor of x. (Halves of a unit, one converted while the other is multiplied,
// are slower: groups of two wgmmas instead of four.)
template <typename T, int F, int G, int B, int N>
__device__ __forceinline__ void multiply_step(float (&acc)[1][kRows / 2], const linear_args &p,
                                              int units, uint32_t code, uint32_t scale_at,
                                              int place, uint32_t x_at) {
    using L = tile<F, G, B>;
    constexpr int bits = linear_code_bits(F);
    dequant_scales scales;
#pragma unroll
    for (int u = 0; u < kUnits; u += kParts<B>) {
        if (u >= units) break;
        uint4 raw[bits == 16 ? 1 : bits / 4];
        dequant_packed packed;
        uint32_t f[4][4]; // of the four atoms of 16 inputs
        if (bits <= 8)
#pragma unroll
            for (int i = 0; i < bits / 4; i++) raw[i] = shared_u128(code + u * L::unit + i * 512);
        constexpr int kGranule = G ? G : 64;
        const uint32_t granule = scale_at + u * 64 / kGranule * p.granule_bytes;
        if (G && u * 64 % kGranule == 0) dequant_load_packed<F>(packed, granule, place, p.sym);
#pragma unroll
        for (int j = 0; j < 4; j++) {
            if (G && (u * 64 + j * 16) % kGranule == 0)
                dequant_scales_of<T, F, true>(scales, packed);
            if (G == 32 && j == 0)
                dequant_load_packed<F>(packed, granule + p.granule_bytes, place, p.sym);
            uint4 direct;
            if (bits == 16) direct = dequant_load<F>(code + u * L::unit, j);
            dequant_word<T, F, true, true>(f[j],
                                           bits == 16 ? reinterpret_cast<uint32_t *>(&direct)
                                                      : reinterpret_cast<const uint32_t *>(raw) +
                                                            j * (bits / 4),
                                           scales);
        }
        group_fence();
#pragma unroll
        for (int j = 0; j < 4; j++)
            multiply_group<T, N>::run(acc[0], f[j],
                                      group_descriptor_low(x_at + (u * kRows * 128 + j * 32) / 16));
        group_commit();
        group_wait<0>();
    }
}

// What a warp that multiplies needs to find its own in a stage; `turn`: the stage, less `stages`
// the second time round, when the parity is 1.
struct tall_place {
    uint32_t base, code, scale;
    int place, turn, part;
};

// Steps of a tile of up to N rows of x.
template <typename T, int F, int G, int B, int N>
__device__ __forceinline__ void multiply_tile(float (&acc)[1][kRows / 2], const linear_args &p,
                                              tall_place &at, int step, const int32_t *end) {
    using L = tile<F, G, B>;
    const uint32_t full = at.base + L::at_bars, empty = full + L::stages * 8;
#pragma unroll 1
    for (; step < *end; step++) {
        const int units = min(kUnits, p.units - step * kUnits);
        const int stage = at.turn < 0 ? at.turn + L::stages : at.turn;
        const uint32_t stage_at = at.base + stage * (L::code + L::x);
        // Low half of a descriptor.
        const uint32_t x_at = (stage_at + L::code + at.part * kRows * 128) >> 4 | 1u << 16;
        barrier_wait(full + stage * 8, at.turn < 0);
        multiply_step<T, F, G, B, N>(acc, p, units - at.part, stage_at + at.code,
                                     at.scale + stage * L::scale, at.place, x_at);
        barrier_arrive(empty + stage * 8); // every lane, for each has read
        if (++at.turn == L::stages) at.turn = -L::stages;
    }
}

// All that a warp which multiplies does.
template <typename T, int F, int G, int B>
__device__ __forceinline__ void compute(const linear_args &p, uint32_t base_at,
                                        const tall_work *works, volatile int32_t &segment) {
    using L = tile<F, G, B>;
    static_assert(L::at_scale >= kWarps * kKept<B> + kMerged<B>, "no room for kept sums");
    const int warp = __shfl_sync(~0u, threadIdx.x / 32, 0), lane = threadIdx.x % 32;
    const int b = warp / 4 % B, part = warp / 4 / B, strip = warp % 4;
    // Opaque, lest they be computed anew for every unit.
    tall_place at = {
        base_at,
        uint32_t((b * kUnits + part) * L::unit + strip * (L::unit / 4) + dequant_lane_at<F>(lane)),
        base_at + L::at_scale + b * L::scale_block + part * (64 / (G ? G : 128)) * p.granule_bytes,
        strip * 16 + lane / 4 * 2,
        0,
        part};
    asm volatile("" : "+r"(at.code), "+r"(at.place), "+r"(at.scale));
#pragma unroll 1
    for (;;) {
        const int i = segment; // in shared memory, for registers are few
        const tall_work &w = works[i % kWorks];
        barrier_wait(base_at + L::at_bars + kTold + i % kWorks * 16, i / kWorks & 1);
        if (w.s.step0 == w.s.step1) break;
        float acc[1][kRows / 2] = {};
        switch ((w.s.m_end - w.s.m0 + 15) / 16) {
#define ROWS(n)                                                                                    \
    case (n) / 16: multiply_tile<T, F, G, B, n>(acc, p, at, w.s.step0, &w.s.step1); break;
            ROWS(16) ROWS(32) ROWS(48) ROWS(64) ROWS(80) ROWS(96) ROWS(112) ROWS(128)
#undef ROWS
        }
        group_pin(acc[0]);
        const linear_segment &s = w.s;
        if (B < 4 || p.team > 1) {
            finish_team<T, F, B>(acc, p, s, base_at + L::at_places, base_at,
                                 (int)blockIdx.x - w.owner, p.team);
        } else if (s.step0 > 0) {
            deposit(acc, p, (int32_t)(gridDim.x - 1 - blockIdx.x), w.owner, s);
        } else {
            if (w.sharers > 1) collect(acc, p, w.owner, w.sharers, s);
            if (p.paired)
                finish_pair<T, F>(acc, p, s, base_at + L::at_places);
            else if (!p.y_f32 && p.epilogue == LINEAR_STORE)
                finish_16<T, F>(acc, p, s, base_at + L::at_places);
            else
                finish<T, F>(acc, p, s, base_at + L::at_places);
        }
        __syncwarp();
        if (linear_thread_anew() % 32 == 0) {
            const int done = segment;
            segment = done + 1;
            barrier_arrive(base_at + L::at_bars + kTold + done % kWorks * 16 + 8);
        }
        __syncwarp();
    }
}

#endif

template <typename T, int F, int G, int B>
__global__ void __launch_bounds__(kThreads, 1)
    linear_tall(const __grid_constant__ linear_args p, const __grid_constant__ CUtensorMap map) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL) // never launched, and empty, on other architectures
    using L = tile<F, G, B>;
    extern __shared__ uint8_t shared[];
    __shared__ int32_t tile_start_of[LINEAR_EXPERTS_MAX + 1];
    __shared__ tall_work works[kWorks];
    __shared__ int32_t segments[kWarps];
    uint8_t *base = shared + ((1024 - (shared_address(shared) & 1023)) & 1023);
    const uint32_t base_at = shared_address(base);
    const uint32_t full = base_at + L::at_bars, empty = full + L::stages * 8;
    const int warp = __shfl_sync(~0u, threadIdx.x / 32, 0), lane = threadIdx.x % 32;

    if (!p.expert_start) launch_dependents();
    if (threadIdx.x < kWarps) segments[threadIdx.x] = 0;
    if (linear_thread_anew() == 0) {
        for (int i = 0; i < L::stages; i++) {
            barrier_init(full + i * 8, p.x_row ? 1 + 2 : 1);
            barrier_init(empty + i * 8, kMath);
        }
        for (int i = 0; i < kWorks; i++) {
            barrier_init(full + kTold + i * 16, 1);
            barrier_init(full + kTold + i * 16 + 8, kWarps + (p.x_row ? 3 : 1));
        }
        barrier_init_fence();
    }
    __syncthreads();
    const int32_t *tile_start = nullptr;
    if (p.expert_start) {
        wait_for_previous();
        launch_dependents(); // which may read the routing at once (linear_problem.routed)
        linear_tile_starts<kRows>(tile_start_of, p);
        tile_start = tile_start_of;
    }

    if (warp >= kWarps) {
        registers_down<kLoadRegisters>();
        if (warp == kWarps) {
            producer<T, F, G, B> load = {p, &map, works, base_at, full, empty, lane};
            load.run();
        } else if (warp == kWarps + 1) {
            walk_all(p, tile_start, works, full + kTold);
        } else if (B == 4 && p.x_row) {
            const int half = warp - kWarps - 2;
            int32_t *rows = reinterpret_cast<int32_t *>(base + L::at_rows) + half * kRows / 2;
            gather<T, F, G>(p, works, rows, base_at, half);
        }
        return;
    }
    registers_up<kMathRegisters>();
    wait_for_previous();
    compute<T, F, G, B>(p, base_at, works, segments[warp]);
#endif
}

// How a dense problem is cut. In steps (two units of 128 rows) of about 1.25 us, as timed on an
// H200 (kernels/LADDER.md): what a team costs beside its steps, and a walk that cuts tiles.
int32_t plan(linear_args *a, int32_t n_sms) {
    a->team = 1;
    // Tiles of experts are seldom whole waves, and short: they are not cut.
    a->cut_cost = a->steps;
    if (a->expert_start) return 0;
    const int32_t tiles = a->n_tiles * ((a->m + kRows - 1) / kRows);
    const int32_t waves = (tiles + n_sms - 1) / n_sms;
    const int32_t share = tiles * a->steps / n_sms;
    a->cut_cost = kCutCost + (n_sms + tiles - 1) / tiles + share / 16;
    int32_t cost = share + a->cut_cost;
    cost = cost < waves * a->steps ? cost : waves * a->steps;
    for (int32_t size = 2; size <= kTeamMax<4> && tiles * size <= n_sms; size++) {
        const int32_t with = (a->steps + size - 1) / size + kTeamCost;
        if (with >= cost) continue;
        a->team = size;
        cost = with;
    }
    return cost;
}

// The same of tiles of 128 rows of W, always by teams: whether that costs less than `cost`.
bool plan_halves(linear_args *a, int32_t n_sms, int32_t cost) {
    a->n_tiles = a->paired ? a->half_blocks : (a->blocks + 1) / 2;
    a->team = 1;
    if (a->expert_start || a->x_row) return false;
    const int32_t tiles = a->n_tiles * ((a->m + kRows - 1) / kRows);
    cost *= kHalfParts;
    for (int32_t size = 2; size <= kTeamMax<2> && tiles * size <= n_sms; size++) {
        const int32_t with = (a->steps + size - 1) / size * kHalfStep + kHalfTeamCost;
        if (with >= cost) continue;
        a->team = size;
        cost = with;
    }
    return a->team > 1;
}

template <typename T, int F, int G, int B>
status launch_tiles(linear_args &a, int32_t n_sms, kernel_stream stream) {
    const auto kernel = linear_tall<T, F, G, B>;
    constexpr int bytes = tile<F, G, B>::bytes;
    CUtensorMap map = {};
    a.part = a.steps / a.team;
    a.part_rest = a.steps % a.team;
    // An expert's rows may be few, but each copy has its cost; tiles of a dense problem are alike.
    a.x_box = a.expert_start ? (a.m <= 8 * a.count ? 16 : 32) : min(kRows, (a.m + 15) / 16 * 16);
    if (!a.x_row) TRY(linear_map_x(&map, &a, half_pair<T>::bf16, a.x_box));
    const int32_t tiles = a.n_tiles * ((a.m + kRows - 1) / kRows);
    const launch_config l(dim3((unsigned)(a.team > 1 ? tiles * a.team : n_sms)), // all at once
                          dim3(kThreads), bytes, stream, true);
    cudaError_t e =
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
    if (e == cudaSuccess) e = cudaLaunchKernelEx(&l.config, kernel, a, map);
    return e == cudaSuccess ? ST_OK : FAIL(ST_DEVICE, "linear_tall: %s", cudaGetErrorString(e));
}

template <typename T, int F, int G>
status launch(const linear_args *args, int32_t n_sms, int32_t, kernel_stream stream) {
    linear_args a = *args;
    const int32_t cost = plan(&a, n_sms);
    if constexpr (linear_code_bits(F) == 4) { // of wider weights an SM takes in too many bytes
        linear_args halves = *args;
        if (plan_halves(&halves, n_sms, cost))
            return launch_tiles<T, F, G, 2>(halves, n_sms, stream);
    }
    return launch_tiles<T, F, G, 4>(a, n_sms, stream);
}

#define T_F16  __half
#define T_BF16 __nv_bfloat16
#define ROW(F, T, G)                                                                               \
    {"tall_128", 90, 90, WF_##F, DT_##T, kRows, 4, kUnits, G, G, 1, launch<T_##T, WF_##F, G>},
const linear_variant rows[] = {TALL_INSTANCES(ROW)};

} // namespace

extern "C" linear_table linear_tall_table(void) {
    return linear_table{rows, (int32_t)(sizeof rows / sizeof rows[0])};
}
