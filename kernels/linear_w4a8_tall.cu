// linear_w4a8_tall.cu - W4 by 8-bit x for many rows on Hopper: y^T = W x^T by int8 wgmma, W's codes
// unpacked to bytes in registers, x by the copy engine.
//
//   tile     256 rows of W by P of x, by the two CTAs of a cluster: each has half of the rows of
//            W and brings half of those of x to both. A warpgroup has a block of 64 rows of W;
//            where W is gate and up, one that of gate and the other that of up
//   stage    128 inputs
//   team     clusters that have a part of the inputs of a tile each, where tiles are fewer than
//            clusters, or of the last wave. Each finishes every size-th 16 rows of x, and leaves
//            its sums of the others for those
//
// With S_g the sum of codes up to granule g, s_g its scale, sum_g s_g (S_g - S_(g-1)) is
// sum_g (s_g - s_(g+1)) S_g: so int32 sums run on from granule to granule, and f32 sums take one
// multiply-add of each a granule. The int32 sums begin at a number whose bits, read as f32, are the
// sum plus NIBBLE_START_VALUE; what that adds to f32 sums depends on the row of W alone, is counted
// beside them, and taken away after kSegment stages, when sums of codes begin anew. Until then it
// is at most the change of the scale since, times 12582912, and makes f32 sums round to less than a
// unit of code times code times scale: in all below a fiftieth of what rounding x to codes did. The
// order of additions is that of K, in a team that of its clusters, and who does what depends on the
// shape and the number of SMs alone: bits are the same in every run.
#include "linear_launch.h"
#include "linear_lines.cuh"
#include "linear_pairs.cuh"
#include "linear_w4a8.cuh"
#include "tensor_map.cuh"

namespace {

constexpr int kCtas = 2, kBlocks = 2;            // of a tile; of a CTA
constexpr int kWarps = 4 * kBlocks, kStep = 128; // inputs of a stage
constexpr int kThreads = 32 * kWarps + 128;
constexpr int kMathRegisters = 240, kLoadRegisters = 24;
static_assert(32 * kWarps * kMathRegisters + 128 * kLoadRegisters <=
                  kThreads * (65536 / kThreads / 8 * 8),
              "registers_up would wait for ever");
constexpr int kRound = 16; // rows of x that are finished at a time
constexpr int kBand = 8;   // tiles along m that are worked on beside each other
// Stages until sums of codes begin anew: 2^22 / (128 inputs x 127 x 16).
constexpr int kSegment = 16;
constexpr int kTeamMost = 8, kAtOnce = 4; // clusters of a team; that are read from at once
enum { BAR_PAIR = 1, BAR_LINES = 5 };     // named barriers; 0 is __syncthreads

struct tall_args : linear_output {
    const uint8_t *code, *scale; // as packed
    const float *x_scale;        // [m]
    int32_t blocks, half_blocks; // of all of W, and of gate or up
    int32_t units, granules, granule_bytes;
    int32_t second, gap;      // W's rows from there on, as packed, are outputs of so many less
    int32_t along_m, along_n; // tiles
    int32_t whole, team;      // tiles of one cluster; of how many clusters the others are
    float4 *sums;             // of each CTA the sums of a tile; zeros between launches
    bool sym, simple;         // simple: y is of 16 bits at 16-byte addresses, and not added to
};

// Shared memory of a CTA: stages of codes of x and W, scales of each, places of 16 rows of y for
// each warpgroup, what warps of gate and up exchange, scales of x for each warpgroup, and barriers.
constexpr int kPitch = LINEAR_BLOCK + 4; // f32 between rows of x: no bank conflicts
constexpr int kPlace = kRound * kPitch * 4, kPlaces = 2 * kBlocks * kPlace;
constexpr int kPairs = 2 * kWarps * 1024;
template <int P, int G> struct tile {
    static constexpr int rows = P, x = rows * kStep;
    static constexpr int codes = LINEAR_BLOCK * kStep / 2, w = kBlocks * codes;
    static constexpr int each = kStep / G; // granules of a stage
    static constexpr int scale_block = each * 3 * LINEAR_BLOCK, scale = kBlocks * scale_block;
    static constexpr int x_scale = P * 4;
    static constexpr int fixed =
        kPlaces + kPairs + kBlocks * x_scale + 256 + 1024; // 1024: alignment of the base
    static constexpr int stages =
        (226 * 1024 - fixed) / (x + w + scale) < 12 ? (226 * 1024 - fixed) / (x + w + scale) : 12;
    static_assert(stages >= 4 && 16 * stages <= 256, "");
    static constexpr int at_scale = stages * (x + w), at_places = at_scale + stages * scale;
    static constexpr int at_pairs = at_places + kPlaces, at_x_scale = at_pairs + kPairs;
    static constexpr int at_bars = at_x_scale + kBlocks * x_scale;
    static constexpr int bytes = at_bars + 256 + 1024;
    static constexpr int rounds = rows / kRound;
};

#if !defined(__CUDA_ARCH__) || defined(__CUDA_ARCH_FEAT_SM90_ALL)

// --- Walk ---------------------------------------------------------------------------------------

struct place {
    int m0, tile_n;
    int step0, step1; // stages
    int owner, rank;  // first cluster of the team, and which of it this is
    int size;         // of the team; 1: the tile is not shared
};

template <int ROWS> struct walk {
    const tall_args &a;
    int unit;
    __device__ __forceinline__ walk(const tall_args &a) : a(a), unit((int)blockIdx.x / kCtas) {}
    __device__ __forceinline__ void again(place &p) { // what next gave
        unit -= (int)gridDim.x / kCtas;
        asm volatile("" : "+r"(unit));
        next(p);
    }
    __device__ __forceinline__ bool next(place &p) {
        const int steps = (a.units + 1) / 2;
        int at = unit;
        p.step0 = 0, p.step1 = steps;
        p.owner = p.rank = 0, p.size = 1;
        if (unit >= a.whole) {
            const int part = unit - a.whole, in = part / a.team;
            at = a.whole + in;
            p.rank = part - in * a.team;
            p.size = a.team;
            p.owner = (int)blockIdx.x / kCtas - p.rank;
            p.step0 = steps * p.rank / a.team;
            p.step1 = steps * (p.rank + 1) / a.team;
        }
        if (at >= a.along_m * a.along_n) return false;
        unit += (int)gridDim.x / kCtas;
        const int band = at / (kBand * a.along_n), in = at - band * kBand * a.along_n;
        const int high = min(kBand, a.along_m - band * kBand), n = in / high;
        p.tile_n = n;
        p.m0 = (band * kBand + in - n * high) * ROWS;
        return true;
    }
};

// The block of a warpgroup, a.blocks or more: none.
__device__ __forceinline__ int block_of(const tall_args &a, int tile_n, int group) {
    const int pair = tile_n * kCtas + cluster_rank();
    if (!a.gated) return pair * kBlocks + group;
    return pair < a.half_blocks ? pair + group * a.half_blocks : a.blocks;
}

// --- Loading ------------------------------------------------------------------------------------

// One warp: lane i < 2 copies the codes of block i, lane 2 + i its scales, lane 4 this CTA's half
// of x. The weights of the first stages are asked for before the kernel before has ended.
template <int P, int G> struct producer {
    using L = tile<P, G>;
    const tall_args &a;
    const CUtensorMap *map;
    uint32_t base, full, empty;
    int lane;

    const uint8_t *from; // what this lane copies: its block's start
    uint32_t to;         // in the first stage
    bool valid;
    int blocks; // of the tile, this CTA's

    __device__ __forceinline__ void begin(const place &p) {
        const int slot = lane % kBlocks, b = block_of(a, p.tile_n, slot);
        blocks = __popc(__ballot_sync(~0u, lane < kBlocks && b < a.blocks));
        valid = lane < 2 * kBlocks && b < a.blocks;
        from = lane < kBlocks ? a.code + (int64_t)b * a.units * (L::codes / 2)
                              : a.scale + (int64_t)b * a.granules * a.granule_bytes;
        to = base + (lane < kBlocks ? L::x + slot * L::codes : L::at_scale + slot * L::scale_block);
    }
    // Codes and scales of a stage; all its bytes are announced here.
    __device__ __forceinline__ void weights(const place &, int step, int stage) const {
        const int codes = min(2, a.units - 2 * step) * (L::codes / 2);
        const int scales = min(L::each, a.granules - step * L::each) * a.granule_bytes;
        const uint32_t bar = full + stage * 8;
        if (lane == 0) barrier_arrive_expect(bar, blocks * (codes + scales) + L::x);
        __syncwarp();
        if (!valid) return;
        if (lane < kBlocks)
            copy_bulk(to + stage * (L::x + L::w), from + (int64_t)step * L::codes, codes, bar,
                      policy_evict_normal());
        else
            copy_bulk(to + stage * L::scale, from + step * L::each * a.granule_bytes, scales, bar,
                      policy_evict_normal());
    }
    __device__ __forceinline__ void inputs(const place &p, int step, int stage) const {
        const int half = L::rows / kCtas * cluster_rank();
        if (lane == 2 * kBlocks)
            copy_tile_to_both(base + stage * (L::x + L::w) + half * kStep, map, step * kStep,
                              p.m0 + half, full + stage * 8);
    }
    __device__ __forceinline__ void run() {
        fill_ring_of_both<L::stages, place>(walk<P>(a), *this, empty);
    }
};

// --- From sums to y -----------------------------------------------------------------------------

// Sums of 16 rows of x that a CTA left, this thread's: two float4, kWarps * 32 apart.
__device__ __forceinline__ float4 *part_of(const tall_args &a, int cta, int round) {
    constexpr int kAll = 2 * 32 * kWarps;
    return a.sums + (int64_t)cta * (LINEAR_SUMS_BYTES / 16) + round * kAll + threadIdx.x;
}

// Where a warpgroup's sums of 16 rows of x become y, of one or two warpgroups.
template <int P, int G, bool GATED> struct finisher {
    using L = tile<P, G>;
    const tall_args &a;
    const place &p;
    const float (&acc)[P / 2];
    uint32_t base, x_scale;
    int group, thread, lane, warp; // of the CTA's two; of the warpgroup's
    int first, outputs;            // where they become y, and how many there are
    float bias[2];

    __device__ __forceinline__ finisher(const tall_args &a, const place &p,
                                        const float (&acc)[P / 2], uint32_t base)
        : a(a), p(p), acc(acc), base(base) {
        group = (int)threadIdx.x / 128;
        thread = linear_thread_anew() % 128;
        lane = thread % 32;
        warp = thread / 32;
        x_scale = base + L::at_x_scale + group * L::x_scale;
        linear_meet(BAR_LINES + group, 128); // the tile before has been finished
#pragma unroll
        for (int i = thread; i < P; i += 128) {
            const float s = p.m0 + i < a.m ? a.x_scale[p.m0 + i] : 0.f;
            asm volatile("st.shared.f32 [%0], %1;" ::"r"(x_scale + i * 4), "f"(s) : "memory");
        }
        linear_meet(BAR_LINES + group, 128);
        const int block = block_of(a, p.tile_n, group);
        const bool second = block >= a.half_blocks && a.half_blocks < a.blocks;
        const int row = block * LINEAR_BLOCK - (second ? a.gap : 0); // of W as it was
        const int end = second ? a.n : a.second - a.gap;
        outputs = block < a.blocks ? end - row : 0;
        first = GATED && second ? row - (a.second - a.gap) : row;
#pragma unroll
        for (int i = 0; i < 2; i++) {
            const int in = warp * 16 + lane / 4 + 8 * i;
            bias[i] =
                a.bias && in < outputs ? linear_element(a.bias, row + in, a.bf16, false) : 0.f;
        }
    }
    // Leaves sums of a round where the member that finishes it finds them.
    __device__ __forceinline__ void leave(int round) const {
        float v[8];
        linear_take<0, L::rounds>(v, acc, round);
#pragma unroll
        for (int i = 0; i < 8; i++) v[i] = linear_never_zero(v[i]);
        float4 *to = part_of(a, (int)blockIdx.x, round);
        linear_store_part(to, make_float4(v[0], v[1], v[2], v[3]));
        linear_store_part(to + 32 * kWarps, make_float4(v[4], v[5], v[6], v[7]));
    }
    // Sums of all of the team, scaled and with bias. Others' are read until they are there, and
    // then are zeros again.
    __device__ __forceinline__ void take(float (&v)[8], int round) const {
        float own[8];
        linear_take<0, L::rounds>(own, acc, round);
#pragma unroll
        for (int i = 0; i < 8; i++) v[i] = p.size == 1 ? own[i] : 0.f;
#pragma unroll 1
        for (int from = 0; p.size > 1 && from < p.size; from += kAtOnce) {
            float4 part[kAtOnce][2];
            float4 *at = part_of(a, kCtas * (p.owner + from) + cluster_rank(), round);
            constexpr int kApart = kCtas * (LINEAR_SUMS_BYTES / 16), kHalf = 32 * kWarps;
            const auto wanted = [&](int i) { return from + i < p.size && from + i != p.rank; };
            bool there;
            do {
                there = true;
#pragma unroll
                for (int i = 0; i < 2 * kAtOnce; i++)
                    part[i / 2][i % 2] =
                        linear_load_part(at + i / 2 * kApart + i % 2 * kHalf, wanted(i / 2));
#pragma unroll
                for (int i = 0; i < 2 * kAtOnce; i++)
                    there = there && linear_is_there(part[i / 2][i % 2]);
            } while (!there);
#pragma unroll
            for (int i = 0; i < kAtOnce; i++) {
                if (from + i >= p.size) break;
                if (wanted(i)) {
                    __stcg(at + i * kApart, make_float4(0, 0, 0, 0));
                    __stcg(at + i * kApart + kHalf, make_float4(0, 0, 0, 0));
                }
                const float other[8] = {part[i][0].x, part[i][0].y, part[i][0].z, part[i][0].w,
                                        part[i][1].x, part[i][1].y, part[i][1].z, part[i][1].w};
#pragma unroll
                for (int e = 0; e < 8; e++) v[e] += wanted(i) ? other[e] : own[e];
            }
        }
#pragma unroll
        for (int h = 0; h < 2; h++) {
            const uint2 s = shared_u64(x_scale + (round * kRound + 8 * h + lane % 4 * 2) * 4);
#pragma unroll
            for (int i = 0; i < 4; i++)
                v[4 * h + i] = fmaf(v[4 * h + i], __uint_as_float(i % 2 ? s.y : s.x), bias[i / 2]);
        }
    }
    // The round's outputs, gated already, by the threads of the warpgroup; `from`: the first one.
    __device__ __forceinline__ void put(const float (&v)[8], int round, int from, int n,
                                        int &turn) const {
        const uint32_t at = base + L::at_places + (turn++ % 2 * kBlocks + group) * kPlace;
        const int m = p.m0 + round * kRound;
        if (a.simple) {
            const int to = lane / 16 * 8 + lane % 8, piece = warp * 2 + lane / 8 % 2;
            place_lines(at + to * 128 + ((piece ^ to % 8) << 4), v);
            linear_meet(BAR_LINES + group, 128);
            const int row = thread / 8, in = thread % 8;
            const uint4 line = shared_u128(at + row * 128 + ((in ^ row % 8) << 4));
            uint16_t *y = static_cast<uint16_t *>(a.y) + (m + row) * a.ldy + from + in * 8;
            if (m + row < a.m && in * 8 < n) linear_store_16(y, line, true);
            return;
        }
#pragma unroll
        for (int i = 0; i < 8; i++) {
            const int row = i / 4 * 8 + lane % 4 * 2 + i % 2,
                      col = warp * 16 + lane / 4 + i / 2 % 2 * 8;
            asm volatile("st.shared.f32 [%0], %1;" ::"r"(at + (row * kPitch + col) * 4), "f"(v[i])
                         : "memory");
        }
        linear_meet(BAR_LINES + group, 128);
        linear_output plain = a;
        plain.gated = false; // that was done
#pragma unroll
        for (int i = 0; i < 2; i++) {
            const int row = thread / 16 + 8 * i, col = thread % 16 * 4;
            float four[4];
            linear_shared_get(four, at + (row * kPitch + col) * 4);
            if (m + row < a.m && col < n)
                linear_put_four(plain, (m + row) * a.ldy + from + col, four, four);
        }
    }
    // Where this thread puts and gets 16 bytes of a place of lines, where those go, and how many of
    // its rows there are, kRound apart.
    struct lines {
        uint32_t put, get;
        uint16_t *y;
        int rows;
    };
    __device__ __forceinline__ lines begin_lines() const {
        const int to = lane / 16 * 8 + lane % 8, piece = warp * 2 + lane / 8 % 2;
        const int row = thread / 8, in = thread % 8;
        lines l;
        l.put = to * 128 + ((piece ^ to % 8) << 4);
        l.get = row * 128 + ((in ^ row % 8) << 4);
        l.y = static_cast<uint16_t *>(a.y) + (p.m0 + row) * a.ldy + first + in * 8;
        l.rows = in * 8 < outputs ? a.m - p.m0 - row : 0;
        return l;
    }
    // The sums of a round, scaled and with bias.
    __device__ __forceinline__ void scaled(float (&v)[8], int round) const {
#pragma unroll
        for (int h = 0; h < 2; h++) {
            const uint2 s = shared_u64(x_scale + (round * kRound + 8 * h + lane % 4 * 2) * 4);
#pragma unroll
            for (int i = 0; i < 4; i++)
                v[4 * h + i] = fmaf(acc[8 * round + 4 * h + i], __uint_as_float(i % 2 ? s.y : s.x),
                                    bias[i / 2]);
        }
    }
    __device__ __forceinline__ void place_lines(uint32_t at, const float (&v)[8]) const {
        uint32_t w[4];
#pragma unroll
        for (int i = 0; i < 4; i++)
            w[i] = a.bf16 ? pack2<__nv_bfloat16>(v[2 * i], v[2 * i + 1])
                          : pack2<__half>(v[2 * i], v[2 * i + 1]);
        linear_place_16(at, w);
    }
    // All outputs of a tile that is not shared, by lines: 32 rows of x meet in a place. As straight
    // code, in which sums have names.
    __device__ __forceinline__ void put_lines(int &turn) const {
        const lines l = begin_lines();
        static_assert(2 * LINEAR_LINES_BYTES <= kPlace, "");
#pragma unroll
        for (int j = 0; j < L::rounds; j += 2) {
            if (p.m0 + j * kRound >= a.m) break;
            const uint32_t at = base + L::at_places + (turn++ % 2 * kBlocks + group) * kPlace;
#pragma unroll
            for (int r = j; r < j + 2 && r < L::rounds; r++) {
                float v[8];
                scaled(v, r);
                place_lines(at + (r - j) * LINEAR_LINES_BYTES + l.put, v);
            }
            linear_meet(BAR_LINES + group, 128);
#pragma unroll
            for (int r = j; r < j + 2 && r < L::rounds; r++) {
                const uint4 line = shared_u128(at + (r - j) * LINEAR_LINES_BYTES + l.get);
                if (r * kRound < l.rows) linear_store_16(l.y + r * kRound * a.ldy, line, true);
            }
        }
    }
    // The same of gate and up: of two rounds the warpgroup of the gate finishes the first, and that
    // of up the second.
    __device__ __forceinline__ void put_gated_lines(int &turn) const {
        const lines l = begin_lines();
        const uint32_t pairs = base + L::at_pairs + thread * 16;
#pragma unroll
        for (int j = 0; j < L::rounds; j += 2) {
            if (p.m0 + j * kRound >= a.m) break;
            const uint32_t at = base + L::at_places + (turn % 2 * kBlocks + group) * kPlace;
            const uint32_t pair = pairs + turn++ % 2 * (kPairs / 2);
            float even[8], odd[8] = {}, v[8], w[8];
            scaled(even, j);
            if (j + 1 < L::rounds) scaled(odd, j + 1);
#pragma unroll
            for (int i = 0; i < 8; i++)
                v[i] = group ? odd[i] : even[i], w[i] = group ? even[i] : odd[i];
            linear_shared_put(pair + group * 4096, &w[0]);
            linear_shared_put(pair + group * 4096 + 2048, &w[4]);
            linear_meet(BAR_PAIR + warp, 64);
            linear_shared_get(&w[0], pair + (1 - group) * 4096);
            linear_shared_get(&w[4], pair + (1 - group) * 4096 + 2048);
#pragma unroll
            for (int i = 0; i < 8; i++)
                v[i] = linear_gate(group ? w[i] : v[i], group ? v[i] : w[i], LINEAR_GATED, 0);
            place_lines(at + l.put, v);
            linear_meet(BAR_LINES + group, 128);
            const int r = j + group;
            const uint4 line = shared_u128(at + l.get);
            if (r < L::rounds && r * kRound < l.rows)
                linear_store_16(l.y + r * kRound * a.ldy, line, true);
        }
    }
    __device__ __forceinline__ void run(int &turn) const {
        if (a.simple && p.size == 1 && (!GATED || a.epilogue == LINEAR_GATED)) {
            if constexpr (GATED)
                put_gated_lines(turn);
            else
                put_lines(turn);
            return;
        }
        for (int round = 0; p.size > 1 && round < L::rounds; round++)
            if (round % p.size != p.rank && p.m0 + round * kRound < a.m) leave(round);
        const int end = min(L::rounds, (a.m - p.m0 + kRound - 1) / kRound);
        if constexpr (!GATED) {
#pragma unroll 1
            for (int round = p.rank; round < end; round += p.size) {
                float v[8];
                take(v, round);
                put(v, round, first, outputs, turn);
            }
            return;
        }
        // The warpgroup of the gate finishes every second round, and that of up the others: each
        // leaves its sums of the other's rounds, warp by warp, in one of two places in turn.
        const uint32_t pairs = base + L::at_pairs + thread * 16;
        const int step = 2 * p.size;
#pragma unroll 1
        for (int round = p.rank; round < end; round += step) {
            const int mine = round + group * p.size, others = round + (1 - group) * p.size;
            const uint32_t at = pairs + turn % 2 * (kPairs / 2);
            float v[8], w[8];
            if (others < end) {
                take(w, others);
                linear_shared_put(at + group * 4096, &w[0]);
                linear_shared_put(at + group * 4096 + 2048, &w[4]);
            }
            if (mine < end) take(v, mine);
            linear_meet(BAR_PAIR + warp, 64);
            if (mine < end) {
                linear_shared_get(&w[0], at + (1 - group) * 4096);
                linear_shared_get(&w[4], at + (1 - group) * 4096 + 2048);
#pragma unroll
                for (int i = 0; i < 8; i++)
                    v[i] =
                        linear_gate(group ? w[i] : v[i], group ? v[i] : w[i], a.epilogue, a.limit);
                put(v, mine, first, outputs, turn);
            } else {
                turn++;
            }
        }
    }
};

// --- Products -----------------------------------------------------------------------------------

template <int P, int G> struct multiplier {
    using L = tile<P, G>;
    static constexpr int kFragments = G / 32; // of a granule

    const tall_args &a;
    uint32_t base, full, empty;
    uint32_t code, scales; // of this lane, within a stage
    int row;               // its place among a granule's scales
    int stage, parity;

    float acc[P / 2];
    int32_t sums[P / 2];
    uint32_t f[4 * kFragments]; // A of a granule
    uint4 raw[G / 64];          // of the next one
    dequant_packed packed;

    // Reads granule `in` of a stage.
    __device__ __forceinline__ void fetch(int in) {
        dequant_load_packed<WF_INT4>(packed, scales + stage * L::scale + in * a.granule_bytes, row,
                                     a.sym);
#pragma unroll
        for (int u = 0; u < G / 64; u++)
            raw[u] = shared_u128(base + stage * (L::x + L::w) + code + (in + u) * (L::codes / 2));
    }
    // What was read as A.
    __device__ __forceinline__ void convert() {
        uint32_t offset[2];
        nibble_offsets(offset, packed);
#pragma unroll
        for (int u = 0; u < G / 64; u++) {
            uint32_t *to = f + 8 * u;
            nibble_codes(to[0], to[1], raw[u].x, offset);
            nibble_codes(to[2], to[3], raw[u].y, offset);
            nibble_codes(to[4], to[5], raw[u].z, offset);
            nibble_codes(to[6], to[7], raw[u].w, offset);
        }
    }
    // The products of a granule; `x` is the low half of a descriptor.
    __device__ __forceinline__ void multiply(uint32_t x) {
#pragma unroll
        for (int k = 0; k < 4 * kFragments; k++)
            asm volatile("" : "+r"(f[k])); // made before the fence
        group_fence();
#pragma unroll
        for (int k = 0; k < kFragments; k++)
            multiply_nibbles<P>::run(sums, f + 4 * k, group_descriptor_low(x + k * 2));
        group_commit();
    }
    // sum_g s_g (S_g - S_(g-1)) = sum_g (s_g - s_(g+1)) S_g, S_g being the sum until granule g, s_g
    // its scale: so sums of codes are not begun anew for each.
    __device__ __forceinline__ void run(int step0, int step1) {
#pragma unroll
        for (int j = 0; j < P / 2; j++) acc[j] = 0.f, nibble_start(sums[j]);
        float scale[2], next[2], carried[2] = {0.f, 0.f};
        barrier_wait(full + stage * 8, parity);
        fetch(0);
        dequant_unpack<WF_INT4>(scale, packed);
        convert();
        multiply(x_at(0));
        int step = step0, in = 0;
#pragma unroll 1
        for (;;) {
            const bool last = L::each == 1 || in == L::each - 1;
            const uint32_t read = empty + stage * 8;
            in = last ? 0 : in + 1;
            if (last) {
                step++;
                stage = stage + 1 == L::stages ? 0 : stage + 1;
                parity ^= stage == 0;
                if (step < step1) barrier_wait(full + stage * 8, parity);
            }
            const bool more = step < step1;
            if (more) fetch(in);
            const uint32_t next_x = x_at(in); // not between sums and products
            dequant_unpack<WF_INT4>(next, packed);
            if (L::each == 2 && in == 1 && 2 * step + 1 >= a.granules) // there is none; x is zeros
                next[0] = next[1] = 0.f;
            group_wait<0>();
            group_pin(sums);
            const int lane = (int)threadIdx.x % 32;
            if (last && lane < kCtas) remote_arrive(remote_address(read, lane));
            if (more && (!last || step % kSegment)) {
#pragma unroll
                for (int i = 0; i < 2; i++) {
                    scale[i] -= next[i];
                    carried[i] += scale[i];
                }
#pragma unroll
                for (int j = 0; j < P / 2; j++)
                    acc[j] = fmaf(__int_as_float(sums[j]), scale[j / 2 % 2], acc[j]);
            } else {
#pragma unroll
                for (int j = 0; j < P / 2; j++) {
                    const float sum = __int_as_float(sums[j]) - NIBBLE_START_VALUE;
                    acc[j] = fmaf(sum, scale[j / 2 % 2], acc[j]);
                    acc[j] = fmaf(carried[j / 2 % 2], -NIBBLE_START_VALUE, acc[j]);
                    nibble_start(sums[j]);
                }
                carried[0] = carried[1] = 0.f;
                if (!more) break;
            }
            scale[0] = next[0], scale[1] = next[1];
            convert();
            multiply(next_x);
        }
    }
    // Low half of the descriptor of x of granule `in` of the stage, the same in all lanes.
    __device__ __forceinline__ uint32_t x_at(int in) const {
        const uint32_t at = (base + stage * (L::x + L::w)) >> 4 | 1u << 16;
        return at + in * (G / 16);
    }
};
#endif

// GATED: of gate and up. Code that is jumped over would change the loop of the others.
template <int P, int G, bool GATED>
__global__ void __launch_bounds__(kThreads, 1)
    linear_w4a8_tall(const __grid_constant__ tall_args a, const __grid_constant__ CUtensorMap map) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL) // never launched, and empty, on other architectures
    using L = tile<P, G>;
    extern __shared__ uint8_t shared[];
    const uint32_t base = (shared_address(shared) + 1023) / 1024 * 1024;
    const uint32_t full = base + L::at_bars, empty = full + L::stages * 8;
    const int warp = __shfl_sync(~0u, (int)threadIdx.x / 32, 0), lane = (int)threadIdx.x % 32;
    begin_ring_of_both<L::stages>(full, empty, kCtas * kWarps);
    if (warp >= kWarps) {
        registers_down<kLoadRegisters>();
        if (warp == kWarps) {
            if (lane == 0) prefetch_map(&map);
            producer<P, G> load = {a, &map, base, full, empty, lane};
            load.run();
        }
    } else {
        registers_up<kMathRegisters>();
        wait_for_previous(); // scales of x, and y
        const int strip = warp % 4, group = warp / 4;
        multiplier<P, G> m = {a, base, full, empty};
        m.code = L::x + group * L::codes + strip * (L::codes / 8) + lane * 16;
        m.scales = base + L::at_scale + group * L::scale_block;
        m.row = strip * 16 + lane / 4 * 2;
        asm volatile("" : "+r"(m.code), "+r"(m.scales), "+r"(m.row));
        m.stage = m.parity = 0;
        walk<P> tiles(a);
        place p;
        int turn = 0;
        while (tiles.next(p)) {
            m.run(p.step0, p.step1);
            tiles.again(p); // not kept in registers meanwhile
            const finisher<P, G, GATED> to(a, p, m.acc, base);
            to.run(turn);
        }
    }
    __syncwarp();
    cluster_arrive(); // until then it may still arrive here
    cluster_wait();
#endif
}

// --- Launch -------------------------------------------------------------------------------------

// ns of a stage; of a tile's end; of what a team exchanges. As timed on an H200.
template <int P> constexpr int kStageTime = P == 176 ? 645 : 560;
template <int P> constexpr int kTileTime = P == 176 ? 1700 : 1000;
constexpr int kExchangeTime = 5200;

// Shares the stages out over the clusters that run at once. About how many ns it takes.
template <int P> int64_t share(tall_args *a, int32_t clusters) {
    const int32_t wide = a->gated ? kCtas : kCtas * kBlocks;
    const int32_t steps = (a->units + 1) / 2;
    a->along_m = (a->m + P - 1) / P;
    a->along_n = ((a->gated ? a->half_blocks : a->blocks) + wide - 1) / wide;
    const int32_t tiles = a->along_m * a->along_n, rest = tiles % clusters;
    const int64_t tile = (int64_t)steps * kStageTime<P> + kTileTime<P>;
    int64_t last = rest ? tile : 0; // of the last wave
    a->whole = tiles;
    a->team = 1;
    for (int32_t s = 2; s <= kTeamMost && s * rest <= clusters && s * 2 <= steps && rest; s++) {
        const int64_t with =
            (int64_t)div_up(steps, s) * kStageTime<P> + kTileTime<P> + kExchangeTime;
        if (with < last) last = with, a->team = s, a->whole = tiles - rest;
    }
    return tiles / clusters * tile + last;
}

// The kernel's launch; clusters: of the grid.
template <int P, int G> struct grid : launch_config {
    grid(int32_t clusters, cudaStream_t stream)
        : launch_config(dim3((unsigned)(clusters * kCtas)), dim3(kThreads), tile<P, G>::bytes,
                        stream, true, kCtas) {}
};

template <int P, int G> int clusters_at_once(int32_t n_sms) {
    static int most = 0;
    const auto kernel = linear_w4a8_tall<P, G, false>;
    const grid<P, G> g(1, nullptr);
    if (most == 0 && (cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                           tile<P, G>::bytes) != cudaSuccess ||
                      cudaOccupancyMaxActiveClusters(&most, kernel, &g.config) != cudaSuccess))
        most = 0;
    return most < n_sms / kCtas ? most : n_sms / kCtas;
}

template <int P, int G, bool GATED>
status launch(const tall_args &a, const void *x, int32_t clusters, cudaStream_t stream) {
    const auto kernel = linear_w4a8_tall<P, G, GATED>;
    CUtensorMap map;
    TRY(tensor_map_codes(&map, x, a.m, a.k, a.k, tile<P, G>::rows / kCtas));
    const int32_t all = a.whole + (a.along_m * a.along_n - a.whole) * a.team;
    cudaError_t e = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                         tile<P, G>::bytes);
    const grid<P, G> g(all < clusters ? all : clusters, stream);
    if (e == cudaSuccess) e = cudaLaunchKernelEx(&g.config, kernel, a, map);
    return e == cudaSuccess ? ST_OK
                            : FAIL(ST_DEVICE, "linear_w4a8_tall: %s", cudaGetErrorString(e));
}

template <int G, bool GATED>
status launch_best(const tall_args &args, const void *x, int32_t n_sms, cudaStream_t stream) {
    const int32_t clusters = clusters_at_once<176, G>(n_sms);
    if (clusters == 0) return FAIL(ST_DEVICE, "linear_w4a8_tall: no room for a cluster");
    tall_args a = args, b = args;
    const int64_t with_128 = share<128>(&a, clusters), with_176 = share<176>(&b, clusters);
    return with_128 <= with_176 ? launch<128, G, GATED>(a, x, clusters, stream)
                                : launch<176, G, GATED>(b, x, clusters, stream);
}

} // namespace

extern "C" status linear_w4a8_tall_launch(const linear_problem *p, const void *code,
                                          const float *x_scale, kernel_stream stream) {
    const linear_weight *w = p->w;
    linear_layout l = linear_layout_of(w);
    tall_args a = {};
    static_cast<linear_output &>(a) = linear_output_of(p, 0, p->m);
    if (a.gated && !w->gated) {
        l.half_rows = w->n / 2;
        l.half_blocks = l.blocks / 2;
    }
    a.code = static_cast<const uint8_t *>(w->code);
    a.scale = static_cast<const uint8_t *>(w->scale);
    a.x_scale = x_scale;
    a.blocks = l.blocks;
    a.half_blocks = l.half_blocks;
    a.units = l.units;
    a.granules = l.granules;
    a.granule_bytes = l.granule_bytes;
    a.second = l.half_blocks * LINEAR_BLOCK;
    a.gap = a.second - l.half_rows;
    a.sums = reinterpret_cast<float4 *>(linear_sums(p));
    a.sym = w->sym;
    a.simple = !a.y_f32 && a.epilogue != LINEAR_RESIDUAL &&
               ((uintptr_t)a.y | (uintptr_t)(a.ldy * 2)) % 16 == 0 && l.half_rows % 8 == 0;
    const cudaStream_t s = (cudaStream_t)stream;
    if (l.granule == 128)
        return a.gated ? launch_best<128, true>(a, code, p->n_sms, s)
                       : launch_best<128, false>(a, code, p->n_sms, s);
    return a.gated ? launch_best<64, true>(a, code, p->n_sms, s)
                   : launch_best<64, false>(a, code, p->n_sms, s);
}
