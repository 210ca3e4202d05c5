// linear_short.cu - y^T = W x^T for few rows of x, on sm_90, by wgmma.
//
// A cluster of C CTAs shares a tile (a block of 64 rows of W; with gate and up 64 of each; or two
// blocks) along K. Cluster c takes tiles c, c + clusters, ... Of a CTA's warps
//
//   4 P multiply: a warpgroup has a part of the CTA's inputs (of two blocks two have the same, for
//       a block each). It turns codes of 128 inputs into A fragments, which wgmma multiplies
//       with x from shared memory while other warpgroups convert
//   P   load, one for each warpgroup, or for two that share x: codes and scales through a ring of
//       steps, by bulk copies that are asked for before the launch before has ended (programmatic
//       dependent launch), since weights depend on no kernel; x once, or where it finds no room
//       with every step; at last they ask for what a later launch reads (linear_problem.ahead)
//   P   help: they sum x over granules (by_x_sums), and finish all tiles of the CTA but the last
//
// Sums of a tile go to the CTA that finishes them (st.async into its shared memory, whose barrier
// counts the bytes), and are added there in order of K, the last tile's by the warps that multiply.
// Where the last round of tiles would leave clusters idle, the tiles are one line of steps that is
// cut evenly over the clusters: each ends the tile that the one before began. What it has of that
// tile it does first of all, and leaves the sums in the workspace, where they have lain for long
// when the other comes to them. Nobody waits, and the bits are the same on every run.
//
// Where a CTA takes half of an SM (P = 2), the CTAs of the next launch find room beside those that
// still work and fill their rings. For that every launch has a CTA for each SM, if some have
// nothing to do: they wait like all others for the launch before to end, so that no SM comes to
// hold two of one launch. With many tiles two of one launch may share an SM on purpose. Where other
// kernels run between linears an SM may be empty and would come to hold two: there such a CTA takes
// more than half of the shared memory (linear_problem.apart).
//
// Problems with experts have a kernel of their own here, which multiplies in the same way.
#include "linear_ahead.cuh"
#include "linear_experts.cuh"
#include "linear_launch.h"
#include "mma_sync.cuh"
#include "ptx_sm90.cuh"
#include "tensor_map.cuh"

// The explicit lists: format, type, x rows (NT), scale granule (0: none). Those of 32 rows are
// linear_short_32.cu's (SHORT_OF_32).
#define SHORT_ROWS(X, F, T, G) X(F, T, 8, G) X(F, T, 16, G)
#define SHORT_TYPES(X, F, G)   SHORT_ROWS(X, F, F16, G) SHORT_ROWS(X, F, BF16, G)
#ifdef SHORT_OF_32
#define SHORT_TABLE linear_short_32_table
#else
#define SHORT_TABLE linear_short_table
#define SHORT_INSTANCES_32(X)
#define SHORT_INSTANCES_32_DENSE(X)
#endif
#ifndef SHORT_INSTANCES
#define SHORT_INSTANCES(X)                                                                         \
    SHORT_TYPES(X, INT4, 128)                                                                      \
    SHORT_TYPES(X, INT4, 64)                                                                       \
    SHORT_TYPES(X, INT4, 32)                                                                       \
    SHORT_TYPES(X, MXFP4, 32)                                                                      \
    SHORT_TYPES(X, NVFP4, 16)                                                                      \
    SHORT_TYPES(X, INT8, 0)                                                                        \
    SHORT_TYPES(X, FP8, 0)                                                                         \
    SHORT_TYPES(X, FP8B, 128)                                                                      \
    SHORT_TYPES(X, 16, 0)
#endif

// For racecheck, which lets nobody past a cluster's barrier before all its threads wait there, and
// does not follow what a lane arrives for its warp: warps that load wait for the cluster before
// they wait for a stage, and every lane tells that it has read one. 1 to 2 % slower.
#ifndef SHORT_RACECHECK
#define SHORT_RACECHECK false
#endif

namespace {

constexpr bool kRacecheck = SHORT_RACECHECK;

// Shared memory of a CTA: two an SM, or one.
enum { kHalf = 113 * 1024, kRoom = 227 * 1024 };
enum { kStagesMost = 16 };

// Units of K in a step, at least what a scale covers, and fewer where x takes the room.
__host__ __device__ constexpr int step_units(int f, int rows, bool experts = false) {
    return linear_code_bits(f) == 4 && (rows <= 16 || experts) ? 4 : 2;
}
__host__ __device__ constexpr int step_granules(int f, int g, int rows, bool experts = false) {
    return g ? step_units(f, rows, experts) * 64 / g : 0;
}

// May two blocks share x? Of 32 rows that is as many bytes as a block's codes of 8 bits, and L2
// gives both no sooner than memory gives the codes of two. (With 4 bits arithmetic binds.) No CTA
// then has less than an SM: its stages would be too few.
__host__ __device__ constexpr bool may_pair(int f, int rows) {
    return rows == 32 && linear_code_bits(f) == 8;
}

// Are products of a granule summed by themselves, and does the scale meet those sums in f32? Else
// it meets the codes. For granules of 64 experts' kernels have no registers.
__host__ __device__ constexpr bool on_sums(int f, int g, bool experts = false) {
    return f == WF_INT4 && g >= (experts ? 128 : 64);
}
// Are codes multiplied as they lie even, and is what is too much (zero points, 128 in bf16) taken
// from the sums by those of x? Of more rows those who multiply wait for them, where not two blocks
// or four of experts have them in common. (Of granules of 64 both zero points would be kept.)
__host__ __device__ constexpr bool by_x_sums(int f, int g, int rows, bool experts = false) {
    return on_sums(f, g, experts) && (rows <= (g == 128 ? 8 : 16) || experts);
}

// Plain problems have kernels of their own: K is a multiple of a step, a tile has two CTAs or more,
// W has no scales but its granules', and sums are what y is, of x's type, or gated by LINEAR_GATED.
// Code that is jumped over costs time too: a step of Llama-3.1-8B in W4 2.3 % at batch 1.
__host__ __device__ constexpr bool may_be_plain(int f, int rows, bool experts = false) {
    return f == WF_INT4 && (rows <= 16 || experts);
}

// How a problem is cut, and where things lie in shared memory (bytes from a multiple of 1024). A
// stage of W: [x, where it comes anew for each tile][codes][scales]. Else all of x lies at 0.
struct division {
    int32_t cluster, clusters, cluster_log;
    int32_t tiles, steps;         // blocks, with gate and up pairs of them; of a tile
    int32_t stride;               // tiles from one of a cluster to its next
    int32_t line;                 // steps of a tile's longest part, where tiles are one line; or 0
    uint32_t line_inverse;        // 2^31 / line, rounded up
    int32_t share, rest;          // of the line: of each cluster, one more of the first so many
    int32_t groups;               // parts of K in a CTA
    int32_t halves;               // blocks of a tile: gate and up, or two side by side
    int32_t senders, senders_log; // sums of a chunk
    int32_t sums_bytes;           // of all chunks (pairs of them, when gated) that a CTA finishes
    int32_t turns_log;            // of tiles, one or two, whose sums have a place of their own
    int32_t w_stages, slot;       // of a warpgroup; bytes of one
    int32_t early;                // stages asked for before the launch before has ended, and x
    int32_t x_stages, x_again;    // stages of a part's x, when it stays
    int32_t x_part;               // of experts: stages of x that a tile wants
    int32_t chunk;   // of experts: tiles that a CTA takes at once, and the last one by one
    int32_t x_whole; // K is a multiple of 64: x comes as boxes of several units
    uint32_t x_high; // GROUP_DESCRIPTOR_HIGH
    int32_t at_w, at_sums, at_x_sums, at_bars, bytes;
    int32_t x_sums_stride; // bytes from a warpgroup's sums of x to the next's
    int32_t beside; // from a block's codes in a stage to its tile's next; 0: each has its own ring
    int32_t x_rows; // of a box: NT, or those there are, in eights
    int64_t cost;
};

// The chunks of a tile, 16 rows by 8 rows of x, are finished by the CTAs of the cluster in turn:
// chunk q by CTA q / per, or in large clusters by CTA q * apart (no division: clusters are powers
// of two).
template <int NT> struct chunks {
    static constexpr int log = NT == 8 ? 2 : NT == 16 ? 3 : 4; // of all of them
    int per, apart;                                            // logarithms, one of them 0
    __host__ __device__ __forceinline__ explicit chunks(const division &d)
        : per(max(log - d.cluster_log, 0)), apart(max(d.cluster_log - log, 0)) {}
};

// Barriers: of two tiles in turn sums complete and sums read; then of each warpgroup, one a stage,
// W there, W read, x there, sums of x there.
enum { kFull, kEmpty, kX, kXSums, kKind = kStagesMost * 8 }; // kKind: bytes of one
struct barriers {
    uint32_t sums, read, stages;
    __device__ __forceinline__ uint32_t of(int group, int kind) const {
        return stages + (group * 4 + kind) * kKind;
    }
};
__host__ __device__ constexpr int bars_bytes(int p) { return 32 + p * kStagesMost * 32; }

// What a warpgroup and the warps that serve it have to do.
struct duty {
    int rank, group, part, half; // part: of K in the CTA
    int begin, steps, tiles;     // the first step of K
    int ring, x_group;           // whose stages, and whose x
    int tile0;
    int from, to;       // of the first tile its steps from here, of the last those before
    int given, lacking; // 1: the cluster before begins the first tile; the next ends the last
    __device__ __forceinline__ void share(const division &d, int of) {
        tiles = tile0 < of ? (of - tile0 + d.clusters - 1) / d.clusters : 0;
    }
    __device__ __forceinline__ duty(const division &d, int group, bool pairs) : group(group) {
        tile0 = (int)blockIdx.x >> d.cluster_log;
        rank = cluster_rank();
        half = group >= d.groups ? 1 : 0;
        part = group - half * d.groups;
        const int i = rank * d.groups + part;
        begin = d.steps * i >> d.senders_log;
        steps = (d.steps * (i + 1) >> d.senders_log) - begin;
        ring = pairs && d.beside ? part : group;
        x_group = d.x_again ? ring : part;
        from = 0;
        to = steps;
        given = lacking = 0;
        if (!d.line) {
            share(d, d.tiles);
            return;
        }
        const int at = tile0 * d.share + min(tile0, d.rest);
        const auto by_line = [&](int n) { // exact below 2^30 / line
            return (int)__umulhi((unsigned)(2 * n + 1), d.line_inverse);
        };
        const int end = at + d.share + (tile0 < d.rest ? 1 : 0), last = by_line(end - 1);
        tile0 = by_line(at);
        tiles = last - tile0 + 1;
        const int in_first = at - tile0 * d.line, in_last = end - last * d.line;
        from = by_line(steps * in_first);
        to = by_line(steps * in_last);
        given = in_first > 0 ? 1 : 0;
        lacking = in_last < d.line ? 1 : 0;
    }
    // Of tile number `count` of the CTA.
    __device__ __forceinline__ int step0(int count) const { return count == 0 ? from : 0; }
    __device__ __forceinline__ int step1(int count) const {
        return count + 1 == tiles ? to : steps;
    }
};

// Where the next stage of a ring is, and how often the ring went round.
struct place {
    int stage = 0, parity = 0;
    __device__ __forceinline__ void next(int stages) {
        if (++stage == stages) stage = 0, parity ^= 1;
    }
};

// --- Loading ------------------------------------------------------------------------------------

__device__ __forceinline__ void copy_box(uint32_t to, const CUtensorMap *map, int unit,
                                         uint32_t bar) {
    asm volatile("cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes "
                 "[%0], [%1, {%2, %3, %4}], [%5];" ::"r"(to),
                 "l"(map), "r"(0), "r"(0), "r"(unit), "r"(bar)
                 : "memory");
}

// Rows of x that a box has.
template <int F, int NT> __host__ __device__ __forceinline__ int x_rows_of(const division &d) {
    return may_pair(F, NT) ? d.x_rows : NT;
}

// x of one step.
template <int F, int NT, bool kPlain>
__device__ __forceinline__ void load_x(const division &d, const CUtensorMap &map, int step,
                                       uint32_t to, uint32_t bar) {
    constexpr int U = step_units(F, NT);
    if (kPlain || (d.x_whole && x_rows_of<F, NT>(d) == NT))
        copy_box(to, &map, step * U, bar);
    else
        for (int i = 0; i < U; i++)
            if (may_pair(F, NT) && d.x_whole)
                copy_box(to + i * NT * 128, &map, step * U + i, bar);
            else
                copy_tile(to + i * NT * 128, &map, (step * U + i) * 64, 0, bar);
}

// Codes and scales of a step of a block of the matrix at `code` and `scale`.
template <int F, int U, int G, bool kPlain = false>
__device__ __forceinline__ void load_weights(const linear_args &p, const uint8_t *code,
                                             const uint8_t *scale, int block, int step, uint32_t to,
                                             uint32_t there, uint64_t policy) {
    constexpr int unit = 512 * linear_code_bits(F), N = G ? U * 64 / G : 0; // granules
    const int units = kPlain ? U : min(U, p.units - step * U);
    copy_bulk(to, code + ((int64_t)block * p.units + step * U) * unit, units * unit, there, policy);
    // What lies past K meets zeros of x, and may be anything but NaN.
    for (int i = units; i < U; i++) copy_bulk(to + i * unit, code, unit, there, policy);
    if (!G) return;
    const int granules = kPlain ? N : min(N, p.granules - step * N);
    copy_bulk(to + U * unit, scale + ((int64_t)block * p.granules + step * N) * p.granule_bytes,
              granules * p.granule_bytes, there, policy);
    for (int i = granules; i < N; i++)
        copy_bulk(to + U * unit + i * p.granule_bytes, scale, p.granule_bytes, there, policy);
}

// Blocks of a tile that lie side by side.
template <int NT>
__device__ __forceinline__ int blocks_side_by_side(const linear_args &p, const division &d) {
    return NT == 32 && !p.paired ? d.halves : 1;
}

// All steps of a ring, by one thread.
template <int F, int NT, int G, bool kPlain>
__device__ __forceinline__ void load(const linear_args &p, const division &d,
                                     const CUtensorMap &map, const barriers &bar, uint32_t base,
                                     const duty &own) {
    constexpr int U = step_units(F, NT), unit = 512 * linear_code_bits(F),
                  N = step_granules(F, G, NT);
    constexpr int x_bytes = U * NT * 128;
    const bool shared = may_pair(F, NT) && d.beside > 0; // a stage has both blocks of a tile
    const int total = shared && own.half ? 0 : own.steps * (own.tiles - 1) - own.from + own.to;
    const uint64_t policy = policy_evict_first();
    const uint32_t full = bar.of(own.ring, kFull), empty = bar.of(own.ring, kEmpty);
    const uint32_t slots = base + d.at_w + own.ring * d.w_stages * d.slot;
    const int x_there = U * x_rows_of<F, NT>(d) * 128; // of x_bytes
    const int bytes =
        (shared ? 2 : 1) * (U * unit + N * p.granule_bytes) + (d.x_again ? x_there : 0);
    const int per = blocks_side_by_side<NT>(p, d);
    int block = own.tile0 * per + own.half * p.half_blocks, step = own.begin + own.from;
    place at;
    prefetch_map(&map);
    const auto load_w = [&] {
        const uint32_t there = full + at.stage * 8;
        barrier_wait(empty + at.stage * 8, at.parity ^ 1);
        barrier_arrive_expect(there, bytes);
        const uint32_t to = slots + at.stage * d.slot + (d.x_again ? x_bytes : 0);
        load_weights<F, U, G, kPlain>(p, p.code, p.scale, block, step, to, there, policy);
        if (shared) // past the last block any, for nobody asks for its sums
            load_weights<F, U, G, kPlain>(p, p.code, p.scale,
                                          min(block + (per == 2 ? 1 : p.half_blocks), p.blocks - 1),
                                          step, to + d.beside, there, policy);
    };
    const auto next = [&] {
        at.next(d.w_stages);
        if (++step == own.begin + own.steps) step = own.begin, block += d.stride * per;
    };
    const int early = min(total, d.early);
    const bool leader = !kRacecheck || threadIdx.x % 32 == 0;
    for (int i = 0;; i++, next()) {
        if (i == early) { // x, all that stays or that of the stages asked for
            wait_for_previous();
            const int n = d.x_again ? early : own.half == 0 && total > 0 ? own.steps : 0;
#pragma unroll 1
            for (int j = 0, s = own.begin + own.from; leader && j < n; j++) {
                const int index = d.x_again ? j : s - own.begin;
                const uint32_t there = (d.x_again ? full : bar.of(own.group, kX)) + index * 8;
                if (!d.x_again) barrier_arrive_expect(there, x_there);
                load_x<F, NT, kPlain>(d, map, s,
                                      d.x_again ? slots + j * d.slot
                                                : base + (own.group * d.x_stages + index) * x_bytes,
                                      there);
                if (++s == own.begin + own.steps) s = own.begin;
            }
            if (kRacecheck) {
                __syncwarp();
                cluster_wait();
                if (!leader) break;
            }
        }
        if (i == total) break;
        if (leader) load_w();
        if (d.x_again && i >= early)
            load_x<F, NT, kPlain>(d, map, step, slots + at.stage * d.slot, full + at.stage * 8);
    }
}

// --- Sums of x ----------------------------------------------------------------------------------

__device__ __forceinline__ void put_shared(uint32_t to, float v) {
    asm volatile("st.shared.f32 [%0], %1;" ::"r"(to), "f"(v) : "memory");
}

// Of the granules of a step, 128 or 64 inputs each, by one warp: [granule][NT] floats. x times one;
// of 8 rows two blocks of 16 inputs at once.
template <typename T, int NT, int G>
__device__ __forceinline__ void sum_x(uint32_t x, uint32_t to, int rows = NT) {
    constexpr uint32_t one = half_pair<T>::bf16 ? 0x3f803f80u : 0x3c003c00u;
    int lane = threadIdx.x % 32;
    asm volatile("" : "+r"(lane)); // lest what follows from it be kept in registers
    const int m = lane / 8, row = NT == 8 ? lane % 8 : m % 2 * 8 + lane % 8;
    const int chunk = NT == 8 ? m % 2 * 2 + m / 2 : m / 2; // of 16 bytes, where swizzles put it
    constexpr int per = G == 128 ? 2 : 1;                  // units of a granule
#pragma unroll
    for (int row0 = 0; row0 < NT; row0 += 16) {
        if (row0 >= rows) break;
        float c[4][4] = {};
#pragma unroll
        for (int j = 0; j < (NT == 8 ? 2 : 4); j++)
#pragma unroll
            for (int u = 0; u < 4; u++) {
                uint32_t a[4];
                const int in = chunk + j * (NT == 8 ? 4 : 2);
                load_matrices(a, x + u * (NT * 128) + (row0 + row) * 128 + (in ^ row % 8) * 16);
                multiply(c[u], a, one, one, T{});
            }
#pragma unroll
        for (int i = 0; i < 4; i += per) {
            const float low = per == 1 ? c[i][0] : c[i][0] + c[i + per - 1][0];
            const float high = per == 1 ? c[i][2] : c[i][2] + c[i + per - 1][2];
            const uint32_t at = to + (i / per * NT + row0 + lane / 4) * 4;
            if (lane % 4 == 0) {
                put_shared(at, NT == 8 ? low + high : low);
                if (NT > 8) put_shared(at + 32, high);
            }
        }
    }
}
__host__ __device__ constexpr int x_sums_bytes(int f, int g, int rows, bool experts = false) {
    return by_x_sums(f, g, rows, experts) ? 256 / g * rows * 4 : 0;
}

// --- Multiplying --------------------------------------------------------------------------------

template <int N> struct number { static constexpr int value = N; };

// Of experts x comes by copies of threads: it is there when its sums are.
template <typename T, int F, int NT, int G, bool kExperts = false> struct multiplier {
    static constexpr int U = step_units(F, NT, kExperts), bits = linear_code_bits(F),
                         unit = 512 * bits, R = NT / 2;
    static constexpr bool kSums = on_sums(F, G, kExperts), kFolded = dequant_unfold<T, F>() != 1.f;
    static constexpr bool kByXSums = by_x_sums(F, G, NT, kExperts);
    static constexpr bool bf16 = half_pair<T>::bf16;
    static constexpr int per = G > 64 ? G / 64 : 1;    // units of a granule
    static constexpr int kParts = kSums ? 2 / per : 1; // granules that are multiplied at once
    // Rows g + 8 as bytes of both codes, see bytes: of 16 rows that is slower.
    static constexpr bool kBytes = kSums && !kByXSums && NT == 32;
    // By mma.sync: of 8 rows it takes half of wgmma's time on the tensor cores.
    static constexpr bool kSync = NT == 8 && bits == 4 && !kExperts;
    // Of granules of 32, whose x is one load, the scale meets the sums too, where words are even
    // without it: e2m1 is not in bf16.
    static constexpr bool kFine = kSync && G == 32 && !(F == WF_MXFP4 && bf16);
    const linear_args &p;
    const division &d;
    const barriers &bar;
    const duty &own;
    place at;
    uint32_t code, scale, x, x_step; // places in the first stages; x: low half of a descriptor, or
                                     // of this lane's row and chunk
    uint32_t x_sums, full, x_full;   // barriers kFull and kX of the first stages
    uint32_t x_high;                 // of x's descriptors: from memory, lest it be made for each
    int x_first = 0;                 // experts: stage of x of the tile's first step
    int at_scale;

    __device__ __forceinline__ void begin(uint32_t base) {
        constexpr int x_bytes = U * NT * 128;
        const int strip = threadIdx.x / 32 % 4, lane = threadIdx.x % 32;
        const uint32_t slots = base + d.at_w + own.ring * d.w_stages * d.slot;
        const uint32_t codes = slots + (!kExperts && d.x_again ? x_bytes : 0) + own.half * d.beside;
        code = codes + strip * (unit / 4) + dequant_lane_at<F>(lane);
        scale = codes + U * unit;
        at_scale = strip * 16 + lane / 4 * 2;
        const uint32_t first =
            !kExperts && d.x_again ? slots : base + own.part * d.x_stages * x_bytes;
        // From one lane, so that the compiler knows it for uniform: descriptors are.
        x = __shfl_sync(~0u, first >> 4 | 1u << 16, 0);
        x_step = (!kExperts && d.x_again ? d.slot : x_bytes) >> 4;
        if (kSync) {
            x = first + lane % 8 * 128 + (lane / 8 ^ lane % 8) * 16;
            x_step *= 16;
        }
        x_high = __shfl_sync(~0u, d.x_high, 0);
        x_sums = base + d.at_x_sums + own.x_group * d.x_sums_stride + lane % 4 * 8;
        full = __shfl_sync(~0u, bar.of(own.ring, kFull), 0);
        x_full = __shfl_sync(~0u, bar.of(own.x_group, kExperts ? kXSums : kX), 0);
        // Opaque, lest they be computed anew for every step.
        asm volatile(""
                     : "+r"(code), "+r"(scale), "+r"(at_scale), "+r"(x_sums), "+r"(full),
                       "+r"(x_full));
    }

    // Four codes of a row, four of eight rows on, and again: an A fragment.
    static __device__ __forceinline__ void raw(uint32_t (&a)[4], uint32_t word) {
        if (bf16) { // plus 128; of rows g + 8 a quarter of that, for eight bits are a subnormal
            const uint32_t high = word >> 8;
            a[0] = and_or<0x000f000fu>(word, 0x43004300u);
            a[1] = pair_fma<T>(word & 0x00f000f0u, 0x7f007f00u, 0x42004200u);
            a[2] = and_or<0x000f000fu>(high, 0x43004300u);
            a[3] = pair_fma<T>(high & 0x00f000f0u, 0x7f007f00u, 0x42004200u);
        } else { // subnormal: times 2^-24, of rows g + 8 times 2^-20
            const uint32_t high = word >> 8;
            a[0] = word & 0x000f000fu;
            a[1] = word & 0x00f000f0u;
            a[2] = high & 0x000f000fu;
            a[3] = high & 0x00f000f0u;
        }
    }
    // The same less the zero point, times 2^-9 (f16) or 2^-6. Of rows g + 8 it is the byte that
    // ends with row g's code, whose sums are taken from theirs: no mask, no shift.
    static __device__ __forceinline__ void bytes(uint32_t (&a)[4], uint32_t word, uint32_t zero) {
        const uint32_t odd = __byte_perm(word, 0, 0x4341);
        a[0] = pair_fma<T>(word & 0x000f000fu, kPairTop<T>, low_twice(zero));
        a[1] = pair_fma<T>(__byte_perm(word, 0, 0x4240), kPairTop<T>, high_twice(zero));
        a[2] = pair_fma<T>(odd & 0x000f000fu, kPairTop<T>, low_twice(zero));
        a[3] = pair_fma<T>(odd, kPairTop<T>, high_twice(zero));
    }
    // The zero point of row g, and that of the byte.
    static __device__ __forceinline__ uint32_t zero_of_bytes(uint32_t zero) {
        return pair_mul<T>(__byte_perm(zero, 0, 0x4040) + ((zero & 0xff00u) << 12),
                           kPairTop<T, true>);
    }
    // What all sums are to be multiplied with.
    static __device__ __forceinline__ float mend(int e) {
        if (kByXSums && bf16) return e / 2 % 2 ? 4.f : 1.f;
        if (kByXSums && !bf16) return e / 2 % 2 ? 0x1p20f : 0x1p24f;
        if ((kSums && !kByXSums) || (kFine && F == WF_INT4))
            return dequant_factor<T, F>() * (kBytes && e / 2 % 2 ? 0.0625f : 1.f);
        return dequant_unfold<T, F>();
    }

    // Codes of unit u of a stage.
    static __device__ __forceinline__ void load(uint4 (&chunk)[bits / 4], int u, uint32_t code_at) {
#pragma unroll
        for (int c = 0; c < bits / 4; c++) chunk[c] = dequant_load<F>(code_at + u * unit, c);
    }

    // Unit u of a stage: A fragments. `scales` or `rows_of` holds what the unit before had.
    __device__ __forceinline__ void convert(uint32_t (&a)[4][4], const uint4 (&chunk)[bits / 4],
                                            dequant_scales &scales, dequant_rows &rows_of,
                                            dequant_packed &packed, int u, uint32_t scale_at,
                                            dequant_packed (&fine)[4]) const {
        constexpr int rows = G && G < 64 ? 64 / (G ? G : 1) : 1; // granules of a unit
        constexpr int inputs = G ? G : 1 << 20;                  // of a granule
        if (kSums && u % 2 == 0)
            dequant_load_packed<F>(packed, scale_at + u * 64 / inputs * p.granule_bytes, at_scale,
                                   p.sym);
        for (int i = 0; i < 2 && kFine; i++)
            dequant_load_packed<F>(fine[u % 2 * 2 + i], scale_at + (2 * u + i) * p.granule_bytes,
                                   at_scale, p.sym);
#pragma unroll
        for (int j = 0; j < 4; j++) {
            const uint32_t *word = reinterpret_cast<const uint32_t *>(chunk) + j * (bits / 4);
            if (kFine) {
                if (F == WF_INT4 && j % 2 == 0)
                    rows_of = dequant_rows_of<T, F, kFolded>(fine[u % 2 * 2 + j / 2]);
                dequant_word<T, F, false, kFolded>(a[j], word, dequant_scales_of(rows_of));
                continue;
            }
            if (kByXSums) {
                raw(a[j], *word);
                continue;
            }
            if (kBytes) {
                if (u * 64 % inputs == 0 && j == 0) rows_of.zero = zero_of_bytes(packed.zero);
                bytes(a[j], *word, rows_of.zero);
                continue;
            }
            if (kSums) {
                if (u * 64 % inputs == 0 && j == 0) rows_of = dequant_rows_of<T, F, false>(packed);
                dequant_word<T, F, false>(a[j], word, dequant_scales_of(rows_of));
                continue;
            }
            if (G && j * rows % 4 == 0 && (G <= 64 || u * 64 % inputs == 0)) {
                const int g = G <= 64 ? u * rows + j * rows / 4 : u * 64 / inputs;
                dequant_load_packed<F>(packed, scale_at + g * p.granule_bytes, at_scale, p.sym);
                dequant_scales_of<T, F, kFolded>(scales, packed);
            }
            dequant_word<T, F, true, kFolded>(a[j], word, scales);
        }
    }

    // Keeps the compiler from converting later.
    static __device__ __forceinline__ void pin(uint32_t (&a)[4][4]) {
#pragma unroll
        for (int i = 0; i < 16; i++) asm volatile("" : "+r"(a[i / 4][i % 4])::"memory");
    }

    template <int N>
    static __device__ __forceinline__ void load_x_sums(float (&of_x)[N / 4], uint32_t from) {
#pragma unroll
        for (int t = 0; t < N / 8; t++)
            asm volatile("ld.shared.v2.f32 {%0, %1}, [%2];"
                         : "=f"(of_x[2 * t]), "=f"(of_x[2 * t + 1])
                         : "r"(from + t * 32)
                         : "memory");
    }

    // A granule whose sums are there, and those of its x.
    template <int N>
    static __device__ __forceinline__ void scaled(float (&acc)[R], const float (&sums)[N / 2],
                                                  const dequant_packed &packed,
                                                  const float (&of_x)[N / 4]) {
        float s[2], z[2];
        dequant_unpack<F>(s, packed);
        if (!kByXSums) {
#pragma unroll
            for (int e = 0; e < N / 2; e++) {
                const bool byte = kBytes && e / 2 % 2;
                acc[e] = fmaf(s[e / 2 % 2], byte ? sums[e] - sums[e - 2] : sums[e], acc[e]);
            }
            return;
        }
        if (bf16) { // 128 + z, a quarter of that
            z[0] = __uint_as_float(__byte_perm(packed.zero, 0x43000000u, 0x7055));
            z[1] = __uint_as_float(__byte_perm(packed.zero, 0x42000000u, 0x7155));
        } else { // subnormal too
            const uint32_t pair = __byte_perm(packed.zero, 0, 0x4140);
            const __half2 h = *reinterpret_cast<const __half2 *>(&pair);
            z[0] = __low2float(h);
            z[1] = __high2float(h) * 16.f;
        }
#pragma unroll
        for (int e = 0; e < N / 2; e++)
            acc[e] =
                fmaf(s[e / 2 % 2], fmaf(-z[e / 2 % 2], of_x[e / 4 * 2 + e % 2], sums[e]), acc[e]);
    }

    // Two units, whose sums are two chains, so that few products wait for each other. x_at: of this
    // lane's row and chunk.
    template <int N>
    static __device__ __forceinline__ void
    multiply_by_warps(float (&sums)[kParts][N / 2], const uint32_t (&a)[2][4][4], uint32_t x_at) {
        float c[2][N / 2] = {};
#pragma unroll
        for (int i = 0; i < 4; i++)
#pragma unroll
            for (int t = 0; t < N / 8; t++) {
                uint32_t b[4];
                load_matrices(b, (x_at ^ i % 2 * 64) + i / 2 * (NT * 128) + t * 1024);
#pragma unroll
                for (int j = 0; j < 2; j++)
                    multiply(c[i / 2] + 4 * t, a[i / 2][i % 2 * 2 + j], b[2 * j], b[2 * j + 1],
                             T{});
            }
#pragma unroll
        for (int e = 0; e < N / 2; e++) {
            sums[0][e] = kParts == 1 ? c[0][e] + c[1][e] : c[0][e];
            if (kParts > 1) sums[kParts - 1][e] = c[1][e];
        }
    }

    // Two units, onto two chains of sums.
    template <int N>
    static __device__ __forceinline__ void
    multiply_onto(float (&acc)[N / 2], float (&beside)[N / 2], const uint32_t (&a)[2][4][4],
                  uint32_t x_at) {
#pragma unroll
        for (int i = 0; i < 4; i++) {
            uint32_t b[4];
            load_matrices(b, (x_at ^ i % 2 * 64) + i / 2 * (NT * 128));
            multiply(acc, a[i / 2][i % 2 * 2], b[0], b[1], T{});
            multiply(beside, a[i / 2][i % 2 * 2 + 1], b[2], b[3], T{});
        }
    }
    // Two units of granules of 32, whose scales are halves in all that come here.
    template <int N>
    static __device__ __forceinline__ void
    multiply_fine(float (&acc)[N / 2], const uint32_t (&a)[2][4][4], uint32_t x_at,
                  const dequant_packed (&fine)[4]) {
        float c[4][N / 2] = {};
#pragma unroll
        for (int i = 0; i < 4; i++) {
            uint32_t b[4];
            load_matrices(b, (x_at ^ i % 2 * 64) + i / 2 * (NT * 128));
#pragma unroll
            for (int j = 0; j < 2; j++)
                multiply(c[i], a[i / 2][i % 2 * 2 + j], b[2 * j], b[2 * j + 1], T{});
        }
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const uint32_t pair =
                F == WF_INT4 ? fine[i].scale : dequant_scale_pair<__half, F, kFolded>(fine[i]);
            const __half2 h = *reinterpret_cast<const __half2 *>(&pair);
            const float s[2] = {__low2float(h), __high2float(h)};
#pragma unroll
            for (int e = 0; e < N / 2; e++) acc[e] = fmaf(s[e / 2 % 2], c[i][e], acc[e]);
        }
    }

    // This warpgroup's sums of steps [step0, step1) of a tile, two units at a time: converted, then
    // multiplied, while other warpgroups convert theirs. `fresh`: x may not have been waited for;
    // x_parity: of its barriers. N: rows of x that are multiplied. kThere: all of x is there and
    // stays, and was waited for.
    template <int N = NT, bool kThere = false>
    __device__ __forceinline__ void tile(float (&acc)[R], bool fresh, int step0, int step1,
                                         int x_parity = 0) {
        constexpr bool kAhead = bits == 4; // codes are read while those before are multiplied
        const bool leader = (kRacecheck && !kExperts) || threadIdx.x % 32 == 0;
        uint32_t a[2][4][4], code_at = code + at.stage * d.slot;
        uint4 chunk[2][bits / 4];
        float granule[kParts][N / 2], of_x[N / 4]; // sums
        float beside[R] = {};
        dequant_packed packed, fine[4];
        dequant_scales scales;
        dequant_rows rows_of;
        if (step0 < step1) barrier_wait(full + at.stage * 8, at.parity);
        for (int i = 0; i < 2 && kAhead && step0 < step1; i++) load(chunk[i], i, code_at);
        for (int step = step0; step < step1; step++) {
            const int stage = at.stage, parity = at.parity;
            const int index = !kThere && d.x_again ? stage : kExperts ? x_first + step : step;
            const int parity_x = d.x_again ? parity : x_parity;
            const uint32_t x_at = x + index * x_step, scale_at = scale + stage * d.slot;
            const uint32_t of_x_at = x_sums + index * x_sums_bytes(F, G, NT, kExperts);
            const uint32_t x_bar = x_full + index * 8, sums_bar = x_bar + (kXSums - kX) * kKind;
            // What is asked for ahead need not be waited for, which takes 50 cycles even where it
            // is there. With wgmma, and of W in bf16, the instructions cost more.
            if (kSync) at.next(d.w_stages);
            const bool last = step + 1 == step1;
            const bool w_there =
                kSync && !bf16 && !last && barrier_test(full + at.stage * 8, at.parity);
            const bool sums_wanted = !kThere && kByXSums && !kExperts && (fresh || d.x_again);
            const bool sums_there = kSync && sums_wanted && barrier_test(sums_bar, parity_x);
            // Of 16 rows a stage without x is free when all of it is in registers: there are few.
            constexpr bool early = kThere && NT == 16 && kParts == 1;
            const auto release = [&] {
                __syncwarp();
                if (leader) barrier_arrive(full + (kEmpty - kFull) * kKind + stage * 8);
            };
            const auto two_units = [&](auto first) { // a loop over u would not be unrolled
                constexpr int u = decltype(first)::value;
#pragma unroll
                for (int i = 0; i < 2; i++) {
                    if (!kAhead) load(chunk[i], u + i, code_at);
                    convert(a[i], chunk[i], scales, rows_of, packed, u + i, scale_at, fine);
                    if (!kSync) pin(a[i]);
                }
                if (u + 2 == U && early) release();
                if (!kThere && u == 0 && fresh && (kExperts || !d.x_again))
                    barrier_wait(x_bar, parity_x);
                if constexpr (kFine)
                    multiply_fine<N>(acc, a, x_at + u * (NT * 128), fine);
                else if constexpr (kSync && !kSums)
                    multiply_onto<N>(acc, beside, a, x_at + u * (NT * 128));
                else if constexpr (kSync)
                    multiply_by_warps<N>(granule, a, x_at + u * (NT * 128));
                if (!kSync) group_fence();
#pragma unroll
                for (int j = 0; j < 8 && !kSync; j++) {
                    const uint64_t b =
                        group_descriptor_of(x_at + (u + j / 4) * (NT * 8) + j % 4 * 2, x_high);
                    float *sums = kSums ? granule[j * kParts / 8] : acc;
                    if (kSums && j % (8 / kParts) == 0)
                        multiply_group<T, N>::run_fresh(sums, a[j / 4][j % 4], b);
                    else
                        multiply_group<T, N>::run(sums, a[j / 4][j % 4], b);
                }
                if (!kSync) group_commit();
                if (u + 2 == U) {
                    if (!kSync) at.next(d.w_stages);
                    code_at = code + at.stage * d.slot;
                    if (!last && !w_there) barrier_wait(full + at.stage * 8, at.parity);
                }
                for (int i = 0; i < 2 && kAhead && (u + 2 < U || !last); i++)
                    load(chunk[i], (u + 2 + i) % U, code_at);
                if (u == 0 && sums_wanted && !sums_there) barrier_wait(sums_bar, parity_x);
                if (kByXSums) load_x_sums<N>(of_x, of_x_at + u / per * (NT * 4));
                if (!kSync) group_wait<0>();
                if (!kSums && !kSync) group_pin(acc);
                for (int i = 0; i < kParts && kSums && !kSync; i++) group_pin(granule[i]);
                for (int i = 0; i < kParts && kSums; i++) {
                    if (i > 0) {
                        load_x_sums<N>(of_x, of_x_at + (u / per + i) * (NT * 4));
                        dequant_load_packed<F>(packed, scale_at + (u / per + i) * p.granule_bytes,
                                               at_scale, p.sym);
                    }
                    scaled<N>(acc, granule[i], packed, of_x);
                }
            };
            two_units(number<0>{});
            if constexpr (U > 2) two_units(number<2>{});
            if (!early) release();
        }
        if (kSync && !kSums && !kFine)
#pragma unroll
            for (int e = 0; e < R; e++) acc[e] += beside[e];
    }
};

// --- Sums of a tile -----------------------------------------------------------------------------

// What a barrier of sums waits for: bytes, or, in a CTA that is alone, the arrival of each warp:
// compute-sanitizer wants two CTAs and more for stores as clusters have them.
template <bool kPlain> __device__ __forceinline__ bool alone(const division &d) {
    return !kPlain && d.cluster == 1;
}
template <bool kPlain> __device__ __forceinline__ int bytes_sent(const division &d) {
    return alone<kPlain>(d) ? 0 : d.sums_bytes;
}

// To the CTAs that finish them. There: [turn][chunk][gate, up][sender][lane][4].
template <int NT, bool kPlain = false>
__device__ __forceinline__ void send(const float (&acc)[NT / 2], const division &d,
                                     const barriers &bar, uint32_t base, int turn, int sender,
                                     int half, int halves) {
    const chunks<NT> way(d);
    int lane = threadIdx.x;
    asm volatile("" : "+r"(lane)); // lest places of sums be kept in registers
    const int strip = lane / 32 % 4;
    lane %= 32;
#pragma unroll
    for (int t = 0; t < NT / 8; t++) {
        const int q = strip * (NT / 8) + t, local = q & ((1 << way.per) - 1);
        const uint32_t owner = q >> way.per << way.apart;
        const float c[4] = {acc[4 * t], acc[4 * t + 1], acc[4 * t + 2], acc[4 * t + 3]};
        const uint32_t to = base + d.at_sums + turn * d.sums_bytes +
                            ((local * halves + half) * d.senders + sender) * 512 + lane * 16;
        if (alone<kPlain>(d))
            asm volatile("st.shared.v4.f32 [%0], {%1, %2, %3, %4};" ::"r"(to), "f"(c[0]), "f"(c[1]),
                         "f"(c[2]), "f"(c[3])
                         : "memory");
        else
            remote_store(remote_address(to, owner), c, remote_address(bar.sums + turn * 8, owner));
    }
    if (!alone<kPlain>(d)) return;
    __syncwarp();
    if (lane == 0) barrier_arrive(bar.sums + turn * 8);
}

__device__ __forceinline__ void sum_senders(float (&c)[4], uint32_t from, int senders) {
    c[0] = c[1] = c[2] = c[3] = 0.f;
#pragma unroll 4
    for (int i = 0; i < senders; i++) {
        const uint4 v = shared_u128(from + i * 512);
        c[0] += __uint_as_float(v.x), c[1] += __uint_as_float(v.y);
        c[2] += __uint_as_float(v.z), c[3] += __uint_as_float(v.w);
    }
}

template <int NT>
__device__ __forceinline__ target dense(const linear_args &p, const division &d, const duty &own,
                                        int count) {
    return {0, (own.tile0 + count * d.stride) * blocks_side_by_side<NT>(p, d), 0, p.m};
}

// A tile that two clusters share: one gives its sums to the one before, which had the first part of
// K and adds them to its own. Given first of all and taken last of all, they are not waited for.
enum sharing { kWhole, kGiven, kTaken };

// Where the sums of a chunk lie that a cluster gives: once they are there, nothing of them is zero.
template <int NT>
__device__ __forceinline__ float4 *given_sums(const linear_args &p, const division &d, int cluster,
                                              int chunk) {
    return reinterpret_cast<float4 *>(p.sums) +
           ((cluster << chunks<NT>::log) + chunk) * d.halves * 32 + threadIdx.x % 32;
}
__device__ __forceinline__ void give(float4 *to, const float (&c)[4]) {
    linear_store_part(to, make_float4(linear_never_zero(c[0]), linear_never_zero(c[1]),
                                      linear_never_zero(c[2]), linear_never_zero(c[3])));
}
// v: what was read there some time ago. Leaves zeros.
__device__ __forceinline__ void take(float (&c)[4], float4 v, float4 *from) {
    while (!__all_sync(~0u, linear_is_there(v))) v = linear_load_part(from, true);
    __stcg(from, make_float4(0, 0, 0, 0));
    c[0] += v.x, c[1] += v.y, c[2] += v.z, c[3] += v.w;
}

// A strip of a block and what its sums are multiplied with.
struct output_place {
    int32_t col; // of this lane's four outputs
    bool there;
    linear_outputs o;
};
template <typename T, bool kPlain>
__device__ __forceinline__ output_place output_of(const linear_args &p, int32_t expert,
                                                  int32_t block, int strip, bool wanted) {
    const int half = block >= p.half_blocks ? 1 : 0;
    const int32_t in_half = (block - half * p.half_blocks) * 64 + strip * 16;
    output_place at = {half * p.half_rows + in_half + (int)threadIdx.x % 4 * 4,
                       wanted && block < p.blocks && in_half < p.half_rows,
                       {}};
    if (!kPlain && at.there) at.o = linear_outputs_of<T>(p, expert, block, at.col, strip);
    return at;
}

// Chunk `local` of this CTA's of `tile`, number `count` of the CTA; `more`: there is another whose
// sums come to lie where its do.
template <typename T, int NT, bool kPlain = false, bool kExperts = false>
__device__ __forceinline__ void finish(const linear_args &p, const division &d, const barriers &bar,
                                       uint8_t *shared, int rank, const target &tile, int count,
                                       bool more, int local, sharing how) {
    const chunks<NT> way(d);
    const int lane = threadIdx.x % 32, turn = count & d.turns_log;
    const int cluster = (int)blockIdx.x >> d.cluster_log;
    if (local >= 1 << way.per || rank & ((1 << way.apart) - 1)) return;
    const int q = (rank >> way.apart << way.per) + local, t = q % (NT / 8), strip = q / (NT / 8);
    const int32_t m0 = tile.m0 + 8 * t;
    const output_place to =
        output_of<T, kPlain>(p, tile.expert, tile.block, strip, m0 < tile.m_end);
    const output_place to_other =
        output_of<T, kPlain>(p, tile.expert, tile.block + (p.paired ? p.half_blocks : 1), strip,
                             d.halves == 2 && m0 < tile.m_end);
    const bool wanted = to.there || to_other.there;
    // Of a tile that two clusters share. Read ahead, for that takes as long as sums to come.
    float4 *const shared_sums =
        how == kWhole ? nullptr : given_sums<NT>(p, d, cluster + (how == kTaken ? 1 : 0), q);
    const bool taken = how == kTaken && wanted;
    const float4 given = linear_load_part(shared_sums, taken);
    const float4 given_other = linear_load_part(shared_sums + 32, taken && d.halves == 2);
    barrier_wait(bar.sums + turn * 8, count >> d.turns_log & 1);
    if (local == 0 && lane == 0 && more)
        barrier_arrive_expect(bar.sums + turn * 8, bytes_sent<kPlain>(d));
    // Where the sums lay is free for what turns them.
    uint8_t *at = shared + d.at_sums + turn * d.sums_bytes + local * d.halves * d.senders * 512;
    float *stage = reinterpret_cast<float *>(at);
    const uint32_t from = shared_address(at) + lane * 16;
    // Of two blocks side by side one may end a half of the matrix, with fewer rows.
    if (wanted) {
        float c[4], other[4];
        sum_senders(c, from, d.senders);
        if (d.halves == 2) sum_senders(other, from + d.senders * 512, d.senders);
        if (how == kTaken) {
            take(c, given, shared_sums);
            if (d.halves == 2) take(other, given_other, shared_sums + 32);
        }
        if (how == kGiven) {
            give(shared_sums, c);
            if (d.halves == 2) give(shared_sums + 32, other);
        } else if (p.paired) {
            linear_emit<T, true, kPlain>(p, m0, tile.m_end, to.col, c, other, to.o, to_other.o,
                                         stage);
        } else {
            if (to.there)
                linear_emit<T, false, kPlain>(p, m0, tile.m_end, to.col, c, c, to.o, to.o, stage);
            if ((!kPlain || kExperts) && to_other.there) // of experts, or of 32 rows
                linear_emit<T, false, kPlain>(p, m0, tile.m_end, to_other.col, other, other,
                                              to_other.o, to_other.o, stage);
        }
    }
    __syncwarp();
    if (!more || lane >= d.cluster) return;
    if (alone<kPlain>(d))
        barrier_arrive(bar.read + turn * 8);
    else
        remote_arrive(remote_address(bar.read + turn * 8, lane));
}

// --- The kernel ---------------------------------------------------------------------------------

// Of the sums, by one thread.
template <int NT, int P, bool kPlain = false>
__device__ __forceinline__ void init_sums(const barriers &bar, const division &d) {
    for (int i = 0; i < 2; i++) {
        barrier_init(bar.sums + i * 8, alone<kPlain>(d) ? 1 + 4 * P : 1);
        barrier_init(bar.read + i * 8, NT / 2);
        barrier_arrive_expect(bar.sums + i * 8, bytes_sent<kPlain>(d));
    }
    barrier_init_fence();
}
// Of ring g, by one thread. Arrivals that make a stage full, and empty; and its x.
__device__ __forceinline__ void init_stage(const barriers &bar, int i, int g, int full, int empty,
                                           int x) {
    barrier_init(bar.of(g, kFull) + i * 8, full);
    barrier_init(bar.of(g, kEmpty) + i * 8, empty);
    barrier_init(bar.of(g, kX) + i * 8, x);
    barrier_init(bar.of(g, kXSums) + i * 8, 32);
}
__device__ __forceinline__ void init_ring(const barriers &bar, const division &d, int g, int full,
                                          int empty, int x) {
    for (int i = 0; i < max(d.w_stages, d.x_stages); i++) init_stage(bar, i, g, full, empty, x);
    barrier_init_fence();
}

// A warp that sums x, where that is wanted, and finishes all tiles but the last.
template <typename T, int F, int NT, int P, int G, bool kPlain>
__device__ __forceinline__ void help(const linear_args &p, const division &d, const barriers &bar,
                                     uint8_t *shared, const duty &own) {
    constexpr int U = step_units(F, NT), x_bytes = U * NT * 128, bytes = x_sums_bytes(F, G, NT);
    place at;
    for (int count = 0; count < own.tiles; count++) {
        const int steps = d.x_again ? own.step1(count) - own.step0(count) : own.steps;
        for (int step = 0; step <= steps; step++) {
            // Two steps in which those that multiply need no help.
            if (step == min(steps, 2) && count > 0)
                for (int local = own.group; local < 1 << chunks<NT>(d).per; local += P)
                    finish<T, NT, kPlain>(p, d, bar, shared, own.rank,
                                          dense<NT>(p, d, own, count - 1), count - 1,
                                          count + d.turns_log < own.tiles, local,
                                          count == 1 && own.given ? kGiven : kWhole);
            if (!by_x_sums(F, G, NT) || step == steps) continue;
            if (!(d.x_again || (count == 0 && own.half == 0))) continue;
            const int turned = own.from + step - (own.from + step < own.steps ? 0 : own.steps);
            const int index = d.x_again ? at.stage : turned;
            uint32_t base = shared_address(shared);
            asm volatile("" : "+r"(base)); // lest what follows from it be kept in registers
            const uint32_t x = base + (d.x_again ? d.at_w + own.group * d.w_stages * d.slot
                                                 : own.part * d.x_stages * x_bytes);
            barrier_wait((d.x_again ? bar.of(own.group, kFull) : bar.of(own.group, kX)) + index * 8,
                         d.x_again ? at.parity : 0);
            sum_x<T, NT, G>(x + index * (d.x_again ? d.slot : x_bytes),
                            base + d.at_x_sums + own.x_group * d.x_sums_stride + index * bytes);
            barrier_arrive(bar.of(own.group, kXSums) + index * 8); // every lane
            at.next(d.w_stages);
        }
    }
}

// Of a thread; so few for 8 rows that small kernels of others find room beside two CTAs.
template <int NT, int G> constexpr int kRegisters = NT > 8 ? 80 : G == 64 || G == 16 ? 72 : 64;
template <int NT, int G> constexpr int kFewer = kRegisters<NT, G> - (NT == 32 ? 24 : 16);

template <typename T, int F, int NT, int P, int G, bool kPlain>
__global__ void __maxnreg__((kRegisters<NT, G>))
    linear_short(const __grid_constant__ linear_args p, const __grid_constant__ division d,
                 const __grid_constant__ CUtensorMap map) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL) // never launched, and empty, on other architectures
    extern __shared__ __align__(1024) uint8_t shared[];
    const uint32_t base = shared_address(shared), at = base + d.at_bars;
    const int warp = __shfl_sync(~0u, threadIdx.x / 32, 0);
    const barriers bar = {at, at + 16, at + 32};
    launch_dependents();
    const bool loads = warp >= 4 * P && warp < 5 * P;
    if (threadIdx.x == 160 * P) init_sums<NT, P, kPlain>(bar, d);
    // Rings by the warps that load them. One place in the code is 1 % of a step, but spills where
    // problems need not be plain.
    const int empty = (kRacecheck ? 128 : 4) * (NT == 32 && d.beside ? 2 : 1);
#pragma unroll
    for (int g = 0; g < (kPlain ? 1 : P); g++)
        if (kPlain ? loads && threadIdx.x % 32 == 0 : threadIdx.x == 128 * P + 32 * g)
            init_ring(bar, d, kPlain ? warp - 4 * P : g, 1, empty, 1);
    __syncwarp();
    if (loads) // a ring is all that one needs to ask for W
        asm volatile("barrier.arrive 1, %0;" ::"n"(192 * P) : "memory");
    else
        asm volatile("barrier.sync 1, %0;" ::"n"(192 * P) : "memory");
    cluster_arrive();
    // Those that load and help give 16 registers each to those that multiply, twice as many.
    const duty own(d,
                   warp >= 5 * P   ? warp - 5 * P
                   : warp >= 4 * P ? warp - 4 * P
                                   : warp / 4,
                   NT == 32);
    if (warp >= 4 * P) registers_down<kFewer<NT, G>>();
    if (warp >= 5 * P) {
        wait_for_previous();
        cluster_wait();
        help<T, F, NT, P, G, kPlain>(p, d, bar, shared, own);
        return;
    }
    if (loads) {
        if (kRacecheck || threadIdx.x % 32 == 0) load<F, NT, G, kPlain>(p, d, map, bar, base, own);
        __syncwarp();
        if (!kRacecheck) cluster_wait();
        if (NT > 8) linear_ask_ahead(p.ahead, (int)blockIdx.x * P + own.group, (int)gridDim.x * P);
        return;
    }
    registers_up<kRegisters<NT, G> + 8>();
    multiplier<T, F, NT, G> work = {p, d, bar, own};
    work.begin(base);
    wait_for_previous();
    cluster_wait(); // all barriers of the cluster are there
    for (int count = 0; count < own.tiles; count++) {
        float acc[NT / 2] = {};
        // (With words of 16 bits two loops would want registers that there are not.)
        if (linear_code_bits(F) == 16 || d.x_again || count <= own.given)
            work.tile(acc, count <= own.given, own.step0(count), own.step1(count));
        else
            work.template tile<NT, true>(acc, false, 0, own.step1(count));
#pragma unroll
        for (int e = 0; e < NT / 2; e++) acc[e] *= work.mend(e);
        const int turn = count & d.turns_log;
        if (count > d.turns_log) barrier_wait(bar.read + turn * 8, count >> d.turns_log & 1 ^ 1);
        send<NT, kPlain>(acc, d, bar, base, turn, own.rank * d.groups + own.part, own.half,
                         d.halves);
    }
    if (own.tiles > 0)
        finish<T, NT, kPlain>(p, d, bar, shared, own.rank, dense<NT>(p, d, own, own.tiles - 1),
                              own.tiles - 1, false, warp, own.lacking ? kTaken : kWhole);
#endif
}

// --- Experts ------------------------------------------------------------------------------------

// In shared memory: where the tiles of each expert begin, then where its rows do, [count + 1] each;
// then which rows of x the first kListed rows are, where they are gathered: all that so few tokens
// have, asked for with the rest.
enum { kListed = 128 };
__host__ __device__ constexpr int table_bytes(int count) { return (2 * (count + 1) + kListed) * 4; }

// By a warp. The routing may have been written since it was last read from here.
template <int NT>
__device__ __forceinline__ void fill_table(const linear_args &p, const division &d,
                                           int32_t *table) {
    int32_t *row = table + p.count + 1, *list = row + p.count + 1;
    const int lane = threadIdx.x % 32, each = (p.count + 31) / 32;
    const int e0 = min(lane * each, p.count), e1 = min(e0 + each, p.count);
    int32_t listed[kListed / 32];
#pragma unroll
    for (int i = 0; i < kListed / 32; i++)
        listed[i] = p.x_row ? __ldcg(p.x_row + min(i * 32 + lane, p.m - 1)) : 0;
    int32_t own = 0, sum, from = __ldcg(p.expert_start + e0);
    row[e0] = from;
#pragma unroll 4
    for (int e = e0; e < e1; e++) {
        const int32_t to = __ldcg(p.expert_start + e + 1);
        row[e + 1] = to;
        own += (to - from + NT - 1) / NT;
        from = to;
    }
    sum = own;
#pragma unroll
    for (int i = 1; i < 32; i *= 2) {
        const int32_t before = __shfl_up_sync(~0u, sum, i);
        if (lane >= i) sum += before;
    }
    if (lane == 31) table[p.count] = sum * d.tiles;
    sum -= own;
#pragma unroll 4
    for (int e = e0; e < e1; e++) {
        table[e] = sum * d.tiles;
        sum += (row[e + 1] - row[e] + NT - 1) / NT;
    }
    for (int i = 0; i < kListed / 32; i++) list[i * 32 + lane] = listed[i];
    __syncwarp();
}

// Tile t, by a warp: lane i looks at the experts from i * each on, then lane j at the j-th of them.
// Those that share rows of x are neighbours.
template <int NT, int P>
__device__ __forceinline__ target locate(const linear_args &p, const division &d,
                                         const int32_t *table, int t) {
    const int lane = threadIdx.x % 32, each = (p.count + 31) / 32;
    const int32_t *row = table + p.count + 1;
    int e = __popc(__ballot_sync(~0u, table[min(lane * each, p.count)] <= t)) - 1;
    e *= each;
    e += __popc(__ballot_sync(~0u, lane < each && table[min(e + lane, p.count)] <= t)) - 1;
    // From one lane, so that the compiler knows it for uniform.
    t = __shfl_sync(~0u, t - table[e], 0);
    const int32_t m = t < d.tiles ? 0 : t / d.tiles, n = t - m * d.tiles;
    const int32_t m0 = __shfl_sync(~0u, row[e], 0) + m * NT;
    return {e, p.paired ? n * (P / 2) : n * P, m0, min(__shfl_sync(~0u, row[e + 1], 0), m0 + NT)};
}

// Of the kernel for experts: P warpgroups that multiply, and warps that load and help: of two of
// each. (With one warp more a thread of two CTAs would have 80 registers instead of 96.)
template <int P> constexpr int kExpertsThreads = P == 2 ? 2 * 128 + 2 * 32 : P * 128 + 4 * 32;

// Where x of a CTA's tiles lies: tiles of the same rows are neighbours and find it where it is, for
// others it comes to the next stages. Where it finds no room as a whole (x_again) it comes with
// every step, and its stages are those of W. A stage of x that is free when one of W is, which
// comes with it, has been free as long: there are as many at least.
struct x_place {
    int first = 0, parity = 0; // stage of the first step
    int32_t m0 = -1;           // whose
    // For the next tile: has x to come?
    __device__ __forceinline__ bool next(const division &d, int32_t m) {
        if (m == m0 && !d.x_again) return false;
        if (m0 >= 0 && (first += d.x_part) == d.x_stages) first = 0, parity ^= 1;
        m0 = m;
        return true;
    }
};

// What of `tiles` tiles a CTA takes, now t, -1 when there is none. The counter is zero before and
// after each launch.
template <bool kAlone> struct taker {
    const linear_args &p;
    bool by_count;                       // not in turn
    int tiles, ctas, chunk, chunks, all; // chunk: 1 or 2; chunks: of 2; all: takes that find one
    int t, end, taken;
    __device__ __forceinline__ taker(const linear_args &p, const division &d, const duty &own,
                                     int tiles)
        : p(p), by_count(kAlone || d.cluster == 1), tiles(tiles), ctas(d.clusters) {
        chunk = tiles >= (d.chunk + 1) * ctas ? d.chunk : 1;
        t = own.tile0 * chunk;
        end = min(t + chunk, tiles);
        chunks = max(((tiles - ctas) >> (chunk - 1)) - ctas, 0);
        all = max(tiles - ctas * chunk - chunks * (chunk - 1), 0);
        if (!by_count) t = own.tile0;
        if (t >= tiles || own.steps == 0) t = -1;
    }
    // By one lane, when the launch before has ended, with each tile and where there is none at all:
    // for when those that are taken are used up.
    __device__ __forceinline__ void ask() {
        if (!by_count || (t >= 0 && t + 1 < end)) return;
        taken = atomicAdd(p.counters, 1);
        if (taken == all + ctas - 1) *p.counters = 0; // every CTA asks until it finds nothing
    }
    __device__ __forceinline__ void next() {
        if (!by_count) {
            t = t + ctas < tiles ? t + ctas : -1;
        } else if (++t == end) {
            taken = __shfl_sync(~0u, taken, 0);
            t = ctas * chunk + (taken < chunks ? taken * chunk : taken + chunks * (chunk - 1));
            end = t + (taken < chunks ? chunk : 1);
            if (taken >= all) t = -1;
        }
    }
};

// A reader here keeps a tile in registers.
__device__ __forceinline__ target take_told(const told_tiles &told, int count) {
    const target tile = told.get(count);
    told.done(count);
    return tile;
}

template <int NT, int P, bool kAlone>
__device__ __forceinline__ target tile_of(const linear_args &p, const division &d, const duty &own,
                                          const int32_t *table, const told_tiles &told, int count) {
    if (kAlone || d.cluster == 1) return take_told(told, count);
    if (count >= own.tiles) return {};
    return locate<NT, P>(p, d, table, own.tile0 + count * d.clusters);
}

// Weights of a step of blocks [B0, B1) of a tile, by one thread.
template <int F, int NT, int G, int P, int B0, int B1, bool kPlain>
__device__ __forceinline__ void load_blocks(const linear_args &p, const division &d,
                                            const target &tile, int step, uint32_t to,
                                            uint32_t there, uint64_t policy) {
    constexpr int U = step_units(F, NT, true), unit = 512 * linear_code_bits(F);
    constexpr int N = step_granules(F, G, NT, true);
    const uint8_t *code = p.code + tile.expert * p.code_bytes;
    const uint8_t *scale = p.scale + tile.expert * p.scale_bytes;
    barrier_arrive_expect(there, (B1 - B0) * (U * unit + N * p.granule_bytes));
#pragma unroll
    for (int i = B0; i < B1; i++)
        load_weights<F, U, G, kPlain>(p, code, scale, max(block_of<P>(p, tile, i), 0), step,
                                      to + i * d.beside, there, policy);
}

// A step of a tile's rows of x, by one warp, to where the copy engine would put them. Lane i knows
// where row i begins in x, in pieces of 16 bytes. Rows that a tile has not are whatever lay there:
// nobody looks at what they give.
template <typename T, int F, int NT, bool kPlain>
__device__ __forceinline__ void load_rows(const linear_args &p, uint32_t row, int rows, int step,
                                          uint32_t to, uint32_t there) {
    constexpr int U = step_units(F, NT, true);
    const int lane = threadIdx.x % 32, chunk = lane % 8, in = lane / 8; // four rows at once
    const int k = step * U * 64 + chunk * 8;
    const uint4 *from = static_cast<const uint4 *>(p.x) + k / 8;
    const uint32_t even = to + in * 128 + ((chunk ^ in) << 4);
    const uint32_t odd = to + (in + 4) * 128 + ((chunk ^ (in + 4)) << 4);
#pragma unroll
    for (int r0 = 0; r0 < NT; r0 += 4) {
        const uint32_t at = __shfl_sync(~0u, row, r0 + in);
#pragma unroll
        for (int u = 0; u < U; u++)
            if (r0 + in < rows)
                copy_some((r0 % 8 ? odd : even) + u * (NT * 128) + r0 / 8 * 1024, from + at + u * 8,
                          kPlain || k + u * 64 < p.k ? 16 : 0);
    }
    barrier_arrive_copies(there);
}

// All steps, by one warp: weights of blocks [B0, B1) of a tile, with kRows rows of x; with kTakes
// it takes the tiles.
template <typename T, int F, int NT, int P, int G, int B0, int B1, bool kRows, bool kTakes,
          bool kPlain, bool kAlone>
__device__ __forceinline__ void load_experts(const linear_args &p, const division &d,
                                             const barriers &bar, uint32_t base, const duty &own,
                                             const int32_t *table, const told_tiles &told) {
    const int lane = threadIdx.x % 32;
    const bool tells = kTakes && (kAlone || d.cluster == 1);
    const uint64_t policy = policy_evict_first();
    const uint32_t full = bar.of(0, kFull), empty = bar.of(0, kEmpty);
    const auto weights = [&](const target &tile, int step, int stage) {
        if (B0 < B1)
            load_blocks<F, NT, G, P, B0, B1, kPlain>(p, d, tile, own.begin + step,
                                                     base + d.at_w + stage * d.slot,
                                                     full + stage * 8, policy);
        else // keeps up with the others, for parities tell two rounds
            barrier_arrive(full + stage * 8);
    };
    const int32_t *list = table + 2 * (p.count + 1);
    const auto row_of = [&](const target &tile) { // of x, by lane: where it begins
        if (!kRows || tile.m_end == 0) return 0u;
        const int32_t r = min(tile.m0 + lane, tile.m_end - 1);
        const int32_t of = !p.x_row ? r : P == 2 && r < kListed ? list[r] : __ldcg(p.x_row + r);
        return (uint32_t)(of * (p.ldx / 8));
    };
    taker<kAlone> take(p, d, own, table[p.count]);
    const auto taken = [&] { return take.t < 0 ? target{} : locate<NT, P>(p, d, table, take.t); };
    target next = taken();
    if (tells) told.tell(0, next);
    if (!kTakes) take_told(told, 0);
    // Steps whose weights wait for no kernel. Where the routing was waited for they come with x.
    const int early = p.routed ? min(own.steps, d.w_stages) : 0;
    if (lane == 0 && next.m_end > 0)
        for (int i = 0; i < early; i++) weights(next, i, i);
    wait_for_previous();
    place at;
    x_place x;
    uint32_t row_next = row_of(next);
    for (int count = 0;; count++) {
        const uint32_t row = row_next;
        const target tile = next;
        if (kTakes && lane == 0 && (count == 0 || tile.m_end > 0)) take.ask();
        if (tile.m_end == 0) break;
        const bool fresh = kRows && x.next(d, tile.m0);
        for (int step = 0; step < own.steps; step++, at.next(d.w_stages)) {
            if (step == max(own.steps - 2, 0)) { // time to know what is next
                if (kTakes) take.next();
                next = kTakes ? taken() : take_told(told, count + 1);
                if (tells) told.tell(count + 1, next);
                row_next = row_of(next);
            }
            // Nothing is waited for by those: others may have brought what was missing, and the
            // stage may be read already, whose phase this parity would not stand for.
            if (count > 0 || step >= early) {
                barrier_wait(empty + at.stage * 8, at.parity ^ 1);
                if (lane == 0) weights(tile, step, at.stage);
                __syncwarp();
            }
            const int stage = d.x_again ? at.stage : x.first + step;
            if (fresh)
                load_rows<T, F, NT, kPlain>(p, row, tile.m_end - tile.m0, own.begin + step,
                                            base + stage * (step_units(F, NT, true) * NT * 128),
                                            bar.of(0, kX) + stage * 8);
        }
    }
}

// A warp that makes x visible to the tensor cores (those that multiply would wait for all else they
// have under way), sums it, where that is wanted, and finishes all tiles but the last where a
// cluster shares them.
template <typename T, int F, int NT, int P, int G, bool kPlain, bool kAlone>
__device__ __forceinline__ void help_experts(const linear_args &p, const division &d,
                                             const barriers &bar, uint8_t *shared, const duty &own,
                                             const int32_t *table, const told_tiles &told) {
    constexpr int bytes = x_sums_bytes(F, G, NT, true);
    const uint32_t base = shared_address(shared);
    place at;
    x_place x;
    for (int count = 0;; count++) {
        const target tile = tile_of<NT, P, kAlone>(p, d, own, table, told, count);
        if (tile.m_end == 0) break;
        const bool fresh = x.next(d, tile.m0);
        for (int step = 0; step <= own.steps; step++) {
            // Two steps in which those that multiply need no help.
            if (!kAlone && step == min(own.steps, 2) && count > 0 && d.cluster > 1) {
                const target done =
                    locate<NT, P>(p, d, table, own.tile0 + (count - 1) * d.clusters);
                for (int local = 0; local < 1 << chunks<NT>(d).per; local++)
                    finish<T, NT, kPlain, true>(p, d, bar, shared, own.rank, done, count - 1,
                                                count + 1 < own.tiles, local, kWhole);
            }
            if (step == own.steps) continue;
            const int stage = d.x_again ? at.stage : x.first + step;
            const int parity = d.x_again ? at.parity : x.parity;
            at.next(d.w_stages);
            if (!fresh) continue;
            barrier_wait(bar.of(0, kX) + stage * 8, parity);
            proxy_fence();
            if (by_x_sums(F, G, NT, true))
                sum_x<T, NT, G>(base + stage * (step_units(F, NT, true) * NT * 128),
                                base + d.at_x_sums + stage * bytes, tile.m_end - tile.m0);
            barrier_arrive(bar.of(0, kXSums) + stage * 8); // every lane
        }
    }
}

template <int NT> constexpr int kPlaceRows = NT < 16 ? NT : 16; // of x, finished at once

// A tile whose K is not shared, by the warps that have summed it: 16 bytes of an x row at a time.
// Of gate and up the warp of the gate finishes outputs g and that of up g + 8; what the other needs
// passes through one of two places in turn, PLACE rows at a time. rounds: how often it did. P:
// blocks of a tile, of which this is `number`.
template <typename T, int P, int PLACE, bool kPlain, int R>
__device__ __forceinline__ void finish_own(const float (&acc)[R], const linear_args &p,
                                           const target &tile, int number, uint32_t places,
                                           int &rounds) {
    const int lane = threadIdx.x % 32, g = lane / 4;
    const int warp = __shfl_sync(~0u, threadIdx.x / 32, 0), strip = warp % 4;
    const int block = block_of<P>(p, tile, number), half = number / (P / 2);
    const int upper = block >= p.half_blocks ? 1 : 0, rows = tile.m_end - tile.m0;
    const int32_t in_half = (block - upper * p.half_blocks) * 64 + strip * 16;
    if (block < 0 || in_half >= p.half_rows) return;
    float scale[2] = {1.f, 1.f}, bias[2] = {0.f, 0.f}; // of outputs g and g + 8
#pragma unroll
    for (int i = 0; i < 2; i++) {
        const int of = g + 8 * i;
        if (!kPlain && p.channel)
            scale[i] = p.channel[((int64_t)tile.expert * p.blocks + block) * 64 + strip * 16 + of];
        if (!kPlain && p.global_scale) scale[i] = p.global_scale[tile.expert];
        if (!kPlain && p.bias)
            bias[i] = to_f32(static_cast<const T *>(
                p.bias)[(int64_t)tile.expert * p.n + upper * p.half_rows + in_half + of]);
    }
    const int32_t col = (p.paired ? 8 * half : upper * p.half_rows) + in_half + lane % 4 * 2;
    T *y = static_cast<T *>(p.y) + (tile.m0 + g) * p.ldy + col;
    const auto value = [&](int j, int e) {
        const float sum = acc[4 * j + e];
        return kPlain ? sum : fmaf(sum, scale[e / 2], bias[e / 2]);
    };
    const int epilogue = kPlain ? LINEAR_GATED : p.epilogue;
    if (p.paired) {
        constexpr int J = PLACE / 8;
        const uint32_t mine = (warp * 32 + lane) * 8, other = ((warp ^ 2 * P) * 32 + lane) * 8;
#pragma unroll
        for (int j0 = 0; j0 < R / 4; j0 += J) {
            if (8 * j0 >= rows) break;
            const uint32_t at = places + rounds++ % 2 * (PLACE * P * 128);
#pragma unroll
            for (int j = 0; j < J; j++) // what this warp does not finish
                asm volatile("st.shared.v2.f32 [%0], {%1, %2};" ::"r"(at + mine + j * (P * 1024)),
                             "f"(half ? value(j0 + j, 0) : value(j0 + j, 2)),
                             "f"(half ? value(j0 + j, 1) : value(j0 + j, 3))
                             : "memory");
            asm volatile("barrier.sync %0, 64;" ::"r"(1 + warp % (2 * P)) : "memory");
#pragma unroll
            for (int j = 0; j < J; j++, y += 8 * p.ldy) {
                const int row0 = 8 * (j0 + j);
                if (row0 >= rows) break;
                float v[2], w[2];
                asm volatile("ld.shared.v2.f32 {%0, %1}, [%2];"
                             : "=f"(w[0]), "=f"(w[1])
                             : "r"(at + other + j * (P * 1024))
                             : "memory");
#pragma unroll
                for (int i = 0; i < 2; i++)
                    v[i] = half ? linear_gate(w[i], value(j0 + j, 2 + i), epilogue, p.limit)
                                : linear_gate(value(j0 + j, i), w[i], epilogue, p.limit);
                const uint32_t out = turned(pack2<T>(v[0], v[1]));
                if (row0 + g < rows) *reinterpret_cast<uint32_t *>(y) = out;
            }
        }
    } else {
#pragma unroll
        for (int j = 0; j < R / 4; j++, y += 8 * p.ldy) {
            if (8 * j >= rows) break;
            const uint32_t low = turned(pack2<T>(value(j, 0), value(j, 1)));
            const uint32_t high = turned(pack2<T>(value(j, 2), value(j, 3)));
            if (8 * j + g >= rows) continue;
            *reinterpret_cast<uint32_t *>(y) = low;
            *reinterpret_cast<uint32_t *>(y + 8) = high;
        }
    }
}

// What the warps that multiply do.
template <typename T, int F, int NT, int P, int G, bool kPlain, bool kAlone>
__device__ __forceinline__ void
multiply_experts(const linear_args &p, const division &d, const barriers &bar, uint8_t *shared,
                 const duty &own, const int32_t *table, const told_tiles &told) {
    const uint32_t base = shared_address(shared);
    multiplier<T, F, NT, G, true> work = {p, d, bar, own};
    work.begin(base);
    wait_for_previous();
    if (!kAlone) cluster_wait(); // all barriers of the cluster are there
    x_place x;
    int rounds = 0;
    for (int count = 0;; count++) {
        const target tile = tile_of<NT, P, kAlone>(p, d, own, table, told, count);
        if (tile.m_end == 0) break;
        float acc[NT / 2] = {};
        const bool fresh = x.next(d, tile.m0);
        work.x_first = x.first;
        const auto sum = [&](auto rows) {
            work.template tile<decltype(rows)::value>(acc, fresh, 0, own.steps, x.parity);
        };
        if constexpr (NT <= 16) {
            sum(number<NT>{});
        } else { // products of as many rows as there are, rounded up to eight
            const int rows = tile.m_end - tile.m0;
            if (rows <= 8)
                sum(number<8>{});
            else if (rows <= 16)
                sum(number<16>{});
            else if (rows <= 24)
                sum(number<24>{});
            else
                sum(number<32>{});
        }
#pragma unroll
        for (int e = 0; e < NT / 2; e++) acc[e] *= work.mend(e);
        if (kAlone || d.cluster == 1) {
            finish_own<T, P, kPlaceRows<NT>, kPlain>(acc, p, tile, own.half, base + d.at_sums,
                                                     rounds);
            continue;
        }
        if constexpr (!kAlone) {
            if (count > 1) barrier_wait(bar.read + count % 2 * 8, count / 2 % 2 ^ 1);
            send<NT, kPlain>(acc, d, bar, base, count % 2, own.rank, own.half, d.halves);
        }
    }
    if constexpr (!kAlone)
        if (own.tiles > 0 && d.cluster > 1)
            finish<T, NT, kPlain, true>(
                p, d, bar, shared, own.rank,
                locate<NT, P>(p, d, table, own.tile0 + (own.tiles - 1) * d.clusters), own.tiles - 1,
                false, threadIdx.x / 32, kWhole);
}

// Tiles of P blocks (of gate and up half of them each), a warpgroup's each, with x for all. Up to
// 16 rows two CTAs share an SM; where tiles are few, the CTAs of a cluster a tile, with a part of K
// each. The routing that a kernel before the one before has written is read at once, and weights
// asked for; for the next launch to do so, too, it may begin when this one's kernel before has
// ended.
//
// kPlain, as of dense problems: K is a multiple of a step, W has no scales but its granules', and
// sums are what y is, or gated by LINEAR_GATED. kAlone: each CTA has its tiles for itself.
template <typename T, int F, int NT, int P, int G, bool kPlain, bool kAlone>
__global__ void __launch_bounds__(kExpertsThreads<P>, P == 2 ? 2 : 1)
    linear_experts(const __grid_constant__ linear_args p, const __grid_constant__ division d) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL) // never launched, and empty, on other architectures
    extern __shared__ __align__(1024) uint8_t shared[];
    const uint32_t base = shared_address(shared), at = base + d.at_bars;
    int32_t *table = reinterpret_cast<int32_t *>(shared + d.at_bars + bars_bytes(1) + kToldBytes);
    const told_tiles told = {at + bars_bytes(1)};
    const int warp = __shfl_sync(~0u, threadIdx.x / 32, 0);
    const barriers bar = {at, at + 16, at + 32};
    if (warp == 4 * P) {
        if (!p.routed) wait_for_previous();
        fill_table<NT>(p, d, table);
    } else if (warp == 4 * P + 1) {
        static_assert(kStagesMost <= 32, "a lane a stage");
        const int lane = threadIdx.x % 32;
        if (lane == 0) {
            told.init(P == 2 ? 4 * P + 1 : 4 * P + 3);
            if (!kAlone) init_sums<NT, 1, kPlain>(bar, d);
        }
        if (lane < max(d.w_stages, d.x_stages))
            init_stage(bar, lane, 0, P == 2 ? 1 : P / 2 + 1, 4 * P, 32);
        barrier_init_fence();
    }
    __syncthreads();
    if (!kAlone) cluster_arrive();
    duty own(d, 0, false);
    if (!kAlone) own.share(d, table[p.count]);
    if (P > 2 && warp >= 4 * P) registers_down<64>();
    if (warp == 4 * P + 1) {
        wait_for_previous();
        launch_dependents();
        if (!kAlone) cluster_wait();
        help_experts<T, F, NT, P, G, kPlain, kAlone>(p, d, bar, shared, own, table, told);
        return;
    }
    if (warp >= 4 * P) {
        if (P == 2)
            load_experts<T, F, NT, P, G, 0, 2, true, true, kPlain, kAlone>(p, d, bar, base, own,
                                                                           table, told);
        else if (warp == 4 * P)
            load_experts<T, F, NT, P, G, 0, 2, false, true, kPlain, kAlone>(p, d, bar, base, own,
                                                                            table, told);
        else if (warp == 4 * P + 2)
            load_experts<T, F, NT, P, G, 2, 4, false, false, kPlain, kAlone>(p, d, bar, base, own,
                                                                             table, told);
        else
            load_experts<T, F, NT, P, G, 0, 0, true, false, kPlain, kAlone>(p, d, bar, base, own,
                                                                            table, told);
        if (!kAlone) cluster_wait();
        return;
    }
    if (P > 2) registers_up<104>();
    own.half = warp / 4;
    multiply_experts<T, F, NT, P, G, kPlain, kAlone>(p, d, bar, shared, own, table, told);
#endif
}

// --- Launch -------------------------------------------------------------------------------------

// How a CTA lives on its SM: beside one of the next launch, alone, or beside one of its own launch.
enum live { kBeside, kAlone, kTwo };

// About how many ns a problem takes that waits for what all SMs get from memory or, with x, from
// L2: its launch, and rounds of a tile each. `bytes` of codes; `units` of 64 x 64 of a tile on a
// CTA. Rates in bytes a ns and times measured on an H200; a unit takes an SM longer where both SMs
// of a pair are busy.
template <int F, int NT> int64_t cost_of_rounds(const division &d, int units, int64_t bytes) {
    constexpr int64_t memory = 4500, l2 = 8400, unit = 65, unit_of_two = 98;
    const int64_t tile = bytes / d.tiles, blocks = d.beside ? 2 : 1; // of a stage
    const int64_t x =
        d.x_again ? tile * (d.x_rows * 128) / (blocks * 512 * linear_code_bits(F)) : 0;
    const auto round = [&](int64_t tiles) {
        const bool two = tiles * 2 > d.clusters;
        const int64_t work = units * (two ? unit_of_two : unit);
        return max(work, max(tiles * tile / memory, tiles * (tile + x) / l2));
    };
    const int whole = d.tiles / d.clusters, last = d.tiles % d.clusters;
    const int64_t launch = d.cluster == 1               ? d.beside ? 4800 : 3600
                           : d.cluster == 2 && d.beside ? 3600
                                                        : 3400;
    const int64_t end = d.cluster > 2 ? 350 : 0;
    return launch + whole * (round(d.clusters) + end) + (last ? round(last) + end : 0);
}

// About how many ns a problem takes, of which `units` are on a CTA, in `rounds` tiles.
// Measured on an H200: launches, x that stays, ends of tiles, units of 64 x 64 with W4, and what a
// line takes longer than its units.
template <typename T, int F, int NT, int G>
int64_t cost(const division &d, live how, int rounds, int units, int64_t bytes, bool apart) {
    if (may_pair(F, NT)) return cost_of_rounds<F, NT>(d, units / rounds, bytes);
    constexpr bool few = NT == 8, many = NT == 32, bf16 = half_pair<T>::bf16;
    // A CTA beside another of its launch gets half of the SM.
    int64_t unit = how == kTwo          ? few    ? 119
                                          : many ? 178
                                                 : 154
                   : how == kAlone      ? few    ? 55
                                          : many ? 85
                                                 : 62
                   : few                ? 73
                   : rounds > 1 || many ? 106
                                        : 79;
    if (bf16 && !(on_sums(F, G) && !by_x_sums(F, G, NT)))
        unit += how == kTwo ? unit / 10 : how == kBeside ? unit / 16 : unit / 40;
    if (linear_code_bits(F) > 4) unit = unit * linear_code_bits(F) / 5;
    if (linear_code_bits(F) == 4 && !on_sums(F, G)) {
        const int part = (how == kTwo ? 3 : 4) + (few ? 0 : how == kBeside ? 4 : 2);
        unit += F == WF_INT4 && !few ? unit * 3 / 4 : unit / part;
    }
    if (how == kAlone && d.x_again && !many)
        unit += (few ? 7 : 10) * d.halves; // gate and up: x for each
    if (how == kTwo && d.x_again && few) unit += 11;
    int64_t work = units * unit + (how == kAlone ? rounds * (many ? 500 : 300) : 0);
    // In a chain of linears the second CTA on an SM comes to have a tile less, where half of the
    // clusters have.
    const int rest = d.tiles % d.clusters;
    if (few && how == kTwo && !apart && !d.line && rounds > 1 && rest > 0 && rest <= d.clusters / 2)
        work -= work / (2 * rounds);
    const int64_t ctas = d.clusters * d.cluster / (how == kTwo ? 2 : 1);
    const bool bytes_bind = linear_code_bits(F) == 8 && NT == 16;
    // SMs that have no tile of the last round leave the others more of what memory gives.
    if (bytes_bind && how == kAlone && d.cluster == 2 && d.halves == 1 && !d.line && rounds > 1 &&
        d.tiles % d.clusters * 2 <= d.clusters)
        return 3200 + max((int64_t)units * 62, bytes / (34 * ctas));
    // Of many rounds the last, where it is not full: those that are left read slower than all.
    const bool many_tiles = d.tiles >= 8 * ctas;
    const int idle = d.line || !many_tiles ? 0 : rounds * d.clusters - d.tiles;
    const int64_t read = (bytes + bytes / d.tiles * idle / 3) / ((how != kBeside ? 33
                                                                  : bytes_bind   ? 32
                                                                                 : 29) *
                                                                 ctas);
    const int64_t x =
        how == kAlone && !many ? d.x_stages * d.groups * NT * step_units(F, NT) * 128 / 70 : 0;
    const int64_t launch = how == kAlone ? many            ? 3900
                                           : d.cluster > 1 ? 3500
                                                           : 2500
                           : how == kTwo ? few    ? 1800
                                           : many ? 2700
                                                  : 1600
                           : few         ? 1650
                           : many        ? 2200
                                         : 2060;
    const int64_t line = !d.line                   ? 0
                         : !few                    ? how == kAlone && d.cluster > 1 ? 1700 : 3500
                         : how == kAlone           ? 2000
                         : how == kBeside && apart ? 2600
                         : many_tiles && d.cluster > 1 ? 2300
                                                       : 1300;
    return launch + x + line + (work > read ? work : read);
}

// Stages that are asked for before the launch before has ended. x waits behind them, and so do
// stores of the kernel before, where it is another (apart). Best by measurement.
template <int F, int NT, int G> int early_stages(const division &d, live how, int all, bool apart) {
    constexpr bool four = linear_code_bits(F) == 4;
    int early = d.w_stages;
    if (may_pair(F, NT))
        early = apart ? 2 : early;
    else if (d.x_again)
        early = how == kAlone ? 1 : how == kTwo && NT == 32 && !apart ? 3 : 2;
    else if (how == kAlone && four && NT > 8)
        early = 1;
    else if (apart || (how == kTwo && all <= d.w_stages) ||
             (how == kAlone && four && !on_sums(F, G) && d.cluster > 1))
        early = 2;
    return min(early, d.w_stages);
}

// The division among at most `most` clusters of c CTAs; bytes = 0 when there is no room. `pairs`:
// two blocks of a tile, gate and up or side by side, share their stages, and x in them.
template <typename T, int F, int NT, int P, int G>
division divide(const linear_args *a, int c, int most, live how, bool line, bool pairs) {
    constexpr int U = step_units(F, NT), unit = 512 * linear_code_bits(F), x_stage = U * NT * 128;
    const int stage = U * unit + step_granules(F, G, NT) * a->granule_bytes;
    const int x_sum = x_sums_bytes(F, G, NT), room = how == kAlone ? kRoom : kHalf;
    division d = {};
    d.cluster = c;
    d.cluster_log = c == 1 ? 0 : c == 2 ? 1 : c == 4 ? 2 : 3;
    d.clusters = most; // also where there are fewer tiles: each SM then has a CTA of every launch
    d.halves = a->paired || pairs ? 2 : 1;
    d.tiles = a->paired ? a->half_blocks : (a->blocks + d.halves - 1) / d.halves;
    d.steps = (a->units + U - 1) / U;
    d.groups = P / d.halves;
    d.senders = c * d.groups;
    d.senders_log = d.cluster_log + (d.groups == 1 ? 0 : d.groups == 2 ? 1 : 2);
    d.sums_bytes = 512 * d.halves * d.senders << chunks<NT>(d).per;
    d.x_whole = a->k % 64 == 0;
    // Two boxes a step instead of one pay where x is as many bytes as W.
    d.x_rows = may_pair(F, NT) && !pairs ? (a->m + 7) / 8 * 8 : NT;
    d.x_high = GROUP_DESCRIPTOR_HIGH;
    const int rounds = (d.tiles + most - 1) / most, part = (d.steps + d.senders - 1) / d.senders;
    d.stride = most;
    if (line) {
        d.stride = 1;
        d.line = part;
        d.line_inverse = (uint32_t)((((int64_t)1 << 31) + part - 1) / part);
        d.share = d.tiles * part / most;
        d.rest = d.tiles * part % most;
    }
    const int all = line ? d.share + (d.rest > 0) : rounds * part, want = all < 3 ? all : 3;
    // Two tiles' sums have places in turn, or where x then finds no room those of one.
    const int turns_log = NT <= 16 && rounds > 1 ? 1 : 0;
    const int least = how == kAlone && c > 1 && NT == 16 && U == 4 ? min(want, 2) : want;
    const auto left = [&] { return room - bars_bytes(P) - (d.sums_bytes << d.turns_log); };
    d.x_stages = part;
    d.beside = pairs ? (stage + 127) / 128 * 128 : 0;
    const int rings = pairs ? d.groups : P, codes = pairs ? 2 * d.beside : stage;
    d.slot = (codes + 127) / 128 * 128;
    for (d.turns_log = turns_log;; d.turns_log--) {
        d.w_stages = (left() - part * d.groups * (x_stage + x_sum)) / (rings * d.slot);
        if (d.w_stages >= want || d.turns_log == 0) break;
    }
    if (d.w_stages < least || part > kStagesMost) {
        d.turns_log = turns_log;
        d.x_again = 1;
        d.x_stages = 0;
        d.slot = (x_stage + codes + 1023) / 1024 * 1024;
        d.w_stages = left() / (rings * (d.slot + x_sum));
    }
    if (d.w_stages > all) d.w_stages = all;
    if (d.w_stages > kStagesMost) d.w_stages = kStagesMost;
    d.early = early_stages<F, NT, G>(d, how, all, a->apart);
    d.x_sums_stride = (d.x_again ? d.w_stages : part) * x_sum;
    d.at_w = d.x_stages * d.groups * x_stage;
    d.at_sums = d.at_w + d.w_stages * rings * d.slot;
    d.at_x_sums = d.at_sums + (d.sums_bytes << d.turns_log);
    d.at_bars = d.at_x_sums + (d.x_again ? rings : d.groups) * d.x_sums_stride;
    d.bytes = how == kAlone ? kRoom : d.at_bars + bars_bytes(P);
    if (a->apart && how == kBeside && d.bytes < LINEAR_APART_BYTES) d.bytes = LINEAR_APART_BYTES;
    if (d.w_stages < 2 && d.w_stages < all) d.bytes = 0;
    // Of a CTA's last tile every warp that multiplies finishes one chunk at most.
    if (1 << chunks<NT>(d).per > 4 * P) d.bytes = 0;
    d.cost = cost<T, F, NT, G>(d, how, rounds, all * U * P, (int64_t)a->blocks * a->units * unit,
                               a->apart);
    return d;
}

// Larger clusters leave out the SMs of a GPC that make no whole one; where two CTAs fit an SM,
// their CTAs come to lie in pairs on half of the SMs.
constexpr int kClusters[] = {1, 2, 4, 8};

status encode_x(CUtensorMap *map, const linear_args *a, bool bf16, int rows, int units) {
    tensor_map_encode function;
    TRY(tensor_map_encoder(&function));
    const cuuint32_t every[3] = {1, 1, 1};
    const cuuint64_t row = (cuuint64_t)a->ldx * 2, k = (cuuint64_t)a->k;
    const bool whole = k % 64 == 0;
    const cuuint64_t size[3] = {whole ? 64 : k, (cuuint64_t)a->m, k / 64}, stride[2] = {row, 128};
    const cuuint32_t box[3] = {64, (cuuint32_t)rows, (cuuint32_t)units};
    const CUresult r =
        function(map, bf16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16,
                 whole ? 3 : 2, const_cast<void *>(a->x), size, stride, box, every,
                 CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                 CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
    return r == CUDA_SUCCESS ? ST_OK : FAIL(ST_DEVICE, "tensor map: error %d", (int)r);
}

// A kernel of P warpgroups: how it would cut a problem, and its launch.
template <typename T, int F, int NT, int P, int G> struct warpgroups {
    // No bytes in d when nothing fits.
    static status plan(division *best, const linear_args *args, int32_t n_sms) {
        const auto kernel = linear_short<T, F, NT, P, G, false>;
        static int most[2][COUNT_OF(kClusters)]; // clusters that the GPU holds at once, a CTA an
                                                 // SM; two
        cudaError_t e =
            cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kRoom);
        *best = {};
        for (int i = 0; i < (int)COUNT_OF(kClusters) && e == cudaSuccess; i++) {
            const int c = kClusters[i];
            for (int two = 0; two < 2 && e == cudaSuccess; two++) {
                const launch_config l(dim3((unsigned)((1 + two) * n_sms / c * c)), dim3(192 * P),
                                      two ? kHalf : kRoom, nullptr, false, (unsigned)c);
                if (!most[two][i])
                    e = cudaOccupancyMaxActiveClusters(&most[two][i], kernel, &l.config);
            }
            if (e != cudaSuccess || !most[0][i]) break;
            // Four warpgroups have the SM for themselves, two share it.
            for (const live how : {kBeside, kAlone, kTwo}) {
                if ((how == kAlone) != (P == 4) || (how != kAlone && c > 2)) continue;
                const int n = most[how == kTwo][i];
                for (const bool line : {false, true}) {
                    const int tiles = args->paired ? args->half_blocks : args->blocks;
                    if (line && (NT > 16 || tiles < n || tiles % n == 0))
                        continue; // of two clusters
                    for (const bool pairs : {false, true}) {
                        if (pairs && !may_pair(F, NT)) continue;
                        const division d = divide<T, F, NT, P, G>(args, c, n, how, line, pairs);
                        if (d.bytes && (!best->bytes || d.cost <= best->cost)) *best = d;
                    }
                }
            }
        }
        if (e != cudaSuccess) return FAIL(ST_DEVICE, "linear_short: %s", cudaGetErrorString(e));
        return ST_OK;
    }

    static bool plain(const division &d, const linear_args *a) {
        return may_be_plain(F, NT) && d.cluster > 1 && a->k % (64 * step_units(F, NT)) == 0 &&
               !a->bias && !a->channel && !a->global_scale && !a->y_f32 &&
               (a->epilogue == LINEAR_STORE || a->epilogue == LINEAR_GATED);
    }

    static status run(const division &d, const linear_args *args, kernel_stream stream) {
        if (!d.bytes) return FAIL(ST_UNSUPPORTED, "linear_short: no room for %d rows", args->m);
        CUtensorMap map;
        const int rows = x_rows_of<F, NT>(d);
        TRY(encode_x(&map, args, half_pair<T>::bf16, rows, rows == NT ? step_units(F, NT) : 1));
        const launch_config l(dim3((unsigned)(d.clusters * d.cluster)), dim3(192 * P),
                              (size_t)d.bytes, stream, true, (unsigned)d.cluster);
        const auto kernel = plain(d, args) ? linear_short<T, F, NT, P, G, may_be_plain(F, NT)>
                                           : linear_short<T, F, NT, P, G, false>;
        cudaError_t e =
            cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kRoom);
        if (e == cudaSuccess) e = cudaLaunchKernelEx(&l.config, kernel, *args, d, map);
        return e == cudaSuccess ? ST_OK
                                : FAIL(ST_DEVICE, "linear_short: %s", cudaGetErrorString(e));
    }
    static status launch(const linear_args *args, int32_t n_sms, int32_t, kernel_stream stream) {
        division d;
        TRY(plan(&d, args, n_sms));
        return run(d, args, stream);
    }
};

template <typename T, int F, int NT, int G>
status launch(const linear_args *args, int32_t n_sms, int32_t per_sm, kernel_stream stream) {
    using four = warpgroups<T, F, NT, 4, G>;
    if constexpr (may_pair(F, NT)) {
        return four::launch(args, n_sms, per_sm, stream);
    } else {
        using two = warpgroups<T, F, NT, 2, G>;
        division a, b;
        TRY(two::plan(&a, args, n_sms));
        TRY(four::plan(&b, args, n_sms));
        const bool more = b.bytes && (!a.bytes || b.cost < a.cost);
        return more ? four::run(b, args, stream) : two::run(a, args, stream);
    }
}

// Problems of experts: how they are cut, and the launch.
template <typename T, int F, int NT, int P, int G> struct experts {
    // Among `most` clusters of c CTAs; about `tiles` tiles.
    static division divide(const linear_args *a, int c, int most, live how, int tiles) {
        constexpr int U = step_units(F, NT, true), unit = 512 * linear_code_bits(F),
                      x_stage = U * NT * 128;
        const int x_sum = x_sums_bytes(F, G, NT, true), table = kToldBytes + table_bytes(a->count);
        division d = {};
        d.cluster = c;
        d.cluster_log = c == 1 ? 0 : c == 2 ? 1 : 2;
        d.clusters = most;
        // Of an expert's rows.
        d.tiles = a->paired ? (a->half_blocks + P / 2 - 1) / (P / 2) : (a->blocks + P - 1) / P;
        d.steps = (a->units + U - 1) / U;
        d.groups = 1;
        d.halves = 2;
        d.senders = c;
        d.senders_log = d.cluster_log;
        d.turns_log = 1;
        d.sums_bytes =
            c == 1 ? kPlaceRows<NT> * P * 128 : 512 * d.halves * d.senders << chunks<NT>(d).per;
        d.beside = (U * unit + step_granules(F, G, NT, true) * a->granule_bytes + 127) / 128 * 128;
        d.slot = P * d.beside;
        const int left = (P == 2 ? kHalf : kRoom) - bars_bytes(1) - table - 2 * d.sums_bytes;
        d.x_part = (d.steps + c - 1) / c;
        d.x_high = GROUP_DESCRIPTOR_HIGH;
        const int turns = d.x_part < 4 ? 2 : 1, steps_least = max(d.steps / c, 1);
        d.x_stages = turns * d.x_part;
        d.w_stages = min((left - d.x_stages * (x_stage + x_sum)) / d.slot, turns * steps_least);
        if (d.w_stages < min(3, turns * steps_least) || d.x_stages > kStagesMost) {
            d.x_again = 1;
            d.w_stages = min(left / (d.slot + x_stage + x_sum), (int)kStagesMost);
            d.x_stages = d.w_stages;
        }
        d.chunk = d.x_again ? 1 : 2;
        d.at_w = d.x_stages * x_stage;
        d.at_sums = d.at_w + d.w_stages * d.slot;
        d.at_x_sums = d.at_sums + 2 * d.sums_bytes;
        d.at_bars = d.at_x_sums + d.x_stages * x_sum;
        d.bytes = d.at_bars + bars_bytes(1) + table;
        if (how == kBeside && a->apart && d.bytes < LINEAR_APART_BYTES)
            d.bytes = LINEAR_APART_BYTES;
        // About how many ns, but for what all have in common; steps and tiles as timed on an H200.
        const int rounds = (tiles * d.tiles + most - 1) / most, steps = (d.steps + c - 1) / c;
        const int step = how == kTwo ? 1300 : 1150, end = c == 1 ? 1700 : how == kTwo ? 750 : 500;
        d.cost = rounds * (steps * step + end) + (c == 1 ? 0 : 2000);
        return d;
    }

    static bool plain(const linear_args *a) {
        return may_be_plain(F, NT, true) && a->k % (64 * step_units(F, NT, true)) == 0 &&
               !a->bias && !a->channel && !a->global_scale &&
               (a->epilogue == LINEAR_STORE || a->epilogue == LINEAR_GATED);
    }

    static status launch(const linear_args *a, int32_t n_sms, int32_t, kernel_stream stream) {
        constexpr bool kPlain = may_be_plain(F, NT, true);
        constexpr bool kOnly = P > 2, kOne = kPlain || kOnly; // kOnly: there are no clusters
        auto kernel = linear_experts<T, F, NT, P, G, false, kOnly>;
        static int most[2][3]; // clusters of 1, 2, 4 that the GPU holds at once, a CTA an SM; two
        cudaError_t e =
            cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kRoom);
        // Rows past an expert's first are one more each.
        const double hit = linear_experts_hit(a->count, a->m);
        const int tiles = (int)ceil(hit + max(0.0, a->m - hit * NT) / NT);
        division best = {};
        for (int i = 0; i < (P == 2 ? 3 : 1) && e == cudaSuccess; i++)
            for (int two = 0; two < (P == 2 ? 2 : 1) && e == cudaSuccess; two++) {
                const int c = 1 << i;
                const launch_config l(dim3((unsigned)((1 + two) * n_sms / c * c)),
                                      dim3(kExpertsThreads<P>), two ? kHalf : kRoom, nullptr, false,
                                      (unsigned)c);
                if (!most[two][i])
                    e = cudaOccupancyMaxActiveClusters(&most[two][i], kernel, &l.config);
                if (e != cudaSuccess || !most[two][i]) continue;
                const division d = divide(a, c, most[two][i], two ? kTwo : kBeside, tiles);
                if (!best.bytes || d.cost < best.cost) best = d;
            }
        if (plain(a)) {
            kernel = best.cluster > 1 ? linear_experts<T, F, NT, P, G, kPlain, kOnly>
                                      : linear_experts<T, F, NT, P, G, kPlain, kOne>;
            if (e == cudaSuccess)
                e = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                         kRoom);
        }
        if (e == cudaSuccess) {
            const launch_config l(dim3((unsigned)(best.clusters * best.cluster)),
                                  dim3(kExpertsThreads<P>), (size_t)best.bytes, stream, true,
                                  (unsigned)best.cluster);
            e = cudaLaunchKernelEx(&l.config, kernel, *a, best);
        }
        return e == cudaSuccess ? ST_OK
                                : FAIL(ST_DEVICE, "linear_experts: %s", cudaGetErrorString(e));
    }
};

#define T_F16  __half
#define T_BF16 __nv_bfloat16
#define ROW(NAME, F, T, NT, G, LAUNCH, MOST, EXPERTS)                                              \
    { NAME, 90, 90, WF_##F, DT_##T, NT, 4, 1, G, G, 1, LAUNCH, MOST, false, EXPERTS }
#define DENSE(F, T, NT, G)                                                                         \
    ROW("short_" #NT, F, T, NT, G, (launch<T_##T, WF_##F, NT, G>), NT, false),
#define GROUPED(F, T, NT, P, G)                                                                    \
    ROW("experts_" #NT, F, T, NT, G, (experts<T_##T, WF_##F, NT, P, G>::launch), 0, true),
#define ROWS(F, T, NT, G)    DENSE(F, T, NT, G) GROUPED(F, T, NT, 2, G)
#define ROWS_32(F, T, NT, G) DENSE(F, T, NT, G) GROUPED(F, T, NT, 4, G)
const linear_variant rows[] = {SHORT_INSTANCES(ROWS) SHORT_INSTANCES_32(ROWS_32)
                                   SHORT_INSTANCES_32_DENSE(DENSE)};

} // namespace

extern "C" linear_table SHORT_TABLE(void) {
    return linear_table{rows, (int32_t)(sizeof rows / sizeof rows[0])};
}
