// linear_experts.cu - y^T = W x^T of experts with many rows each, on sm_90: a tile is four blocks
// of 64 rows of W (of gate and up two each) and all of an expert's rows, or an even part of them
// when they are more than a stage of x holds.
//
// Of a CTA's warps
//
//   16  multiply: a warpgroup has a block. It turns codes of a unit into A fragments, has the
//       tensor cores multiply them with as many rows of x as the tile has, rounded up to eight,
//       and waits: the other three are converting meanwhile
//   1   takes tiles, by a counter, for CTAs are not equally fast, and has their weights brought as
//       boxes of the tensor copy engine
//   2   gather rows of x to where the copy engine would put them
//   1   makes those visible to the tensor cores: a fence waits for all that its warp has under way
//
// Weights and x of a step of 128 inputs, or of 256 codes, are a stage of one ring.
//
// Beside W4 x may be int8 codes in the order of atoms (linear_byte_input): A fragments are then
// bytes, code less zero point, and their sums exact int32, which meet the scales of W in f32 and,
// at a tile's end, those of x.
#include "linear_experts_many.cuh"
#include "linear_launch.h"
#include "linear_lines.cuh"
#include "linear_w4a8.cuh"
#include "tensor_map.cuh"

// The explicit list: format, type, scale granule.
#ifndef EXPERTS_INSTANCES
#define EXPERTS_TYPES(X, F, G) X(F, F16, G) X(F, BF16, G)
#define EXPERTS_INSTANCES(X)                                                                       \
    EXPERTS_TYPES(X, INT4, 128)                                                                    \
    EXPERTS_TYPES(X, MXFP4, 32)
#endif
// x as codes.
#ifndef EXPERTS_INSTANCES_CODES
#define EXPERTS_INSTANCES_CODES(X) EXPERTS_TYPES(X, INT4, 128)
#endif

namespace {

// Rows of x of a tile at most: of codes, sums of int32 stand beside those of f32.
__host__ __device__ constexpr int rows_most(bool codes) { return codes ? 80 : 128; }
constexpr int kBlocks = 4;                  // of W of a tile
constexpr int kWarps = 4 * kBlocks;         // that multiply
constexpr int kThreads = 32 * kWarps + 128; // a whole warpgroup, which gives registers away
constexpr int kMathRegisters = 112, kLoadRegisters = 32;
static_assert(32 * kWarps * kMathRegisters + 128 * kLoadRegisters <=
                  kThreads * (65536 / kThreads / 8 * 8),
              "registers_up would wait for ever");
// Units of a step; bytes of a stage's codes.
__host__ __device__ constexpr int units_of(bool codes) { return codes ? 4 : 2; }
__host__ __device__ constexpr int code_of(bool codes) { return kBlocks * units_of(codes) * 2048; }
// Bytes of a place of what tiles end in: 16 rows of x, all blocks.
constexpr int kPlace = 16 * kBlocks * 128, kPlaces = 2 * kPlace;
constexpr int kStagesMost = 12;
// Barriers of a stage: full, empty, x has landed.
constexpr int kEmpty = kStagesMost * 8, kLanded = 2 * kEmpty, kBars = 3 * kEmpty;
constexpr int kRowList = 2 * 64 * 4;
constexpr int kRowScales = kTold * rows_most(true) * 4; // of codes: of the rows of tiles told of
constexpr int kRoom = 226 * 1024;

// Rows of products, with and without those that the eight before take too.
#define EXPERTS_SMALL(ONE, TWO) TWO(16) ONE(24) ONE(32) ONE(40) ONE(48) ONE(56) ONE(64)
#define EXPERTS_LARGE(ONE, TWO) ONE(72) ONE(80) TWO(96) TWO(112) TWO(128)
// Of codes: the wider of those are multiples of 16.
#define EXPERTS_CODES_SMALL(ONE, TWO) TWO(16) ONE(24) ONE(32) TWO(48)
#define EXPERTS_CODES_LARGE(ONE, TWO) TWO(64) TWO(80)

// How a problem is cut, and where things lie in shared memory (bytes from a multiple of 1024; x
// lies at 0).
struct division : expert_cut { // rows: of a stage of x
    int32_t steps, stages;
    int32_t x_stage, scale_stage; // bytes
    int32_t at_code, at_scale, at_places, at_bars, bytes;
};

// Tensor maps: codes [expert][half][block][unit][2 KB], scales [expert][half][block][granule][..].
struct maps {
    CUtensorMap code, scale;
};

// --- Loading ------------------------------------------------------------------------------------

__device__ __forceinline__ void copy_box(uint32_t to, const CUtensorMap *map, int y, int z, int e,
                                         uint32_t bar, uint64_t policy) {
    asm volatile("cp.async.bulk.tensor.5d.shared::cluster.global.mbarrier::complete_tx::bytes"
                 ".L2::cache_hint [%0], [%1, {%2, %3, %4, %2, %5}], [%6], %7;" ::"r"(to),
                 "l"(map), "r"(0), "r"(y), "r"(z), "r"(e), "r"(bar), "l"(policy)
                 : "memory");
}

// Where a warp is in the ring.
struct ring {
    uint32_t full; // barriers of the first stage
    int stage, parity;
    __device__ __forceinline__ void next(const division &d) {
        if (++stage == d.stages) stage = 0, parity ^= 1;
    }
    __device__ __forceinline__ void wait_empty() const {
        barrier_wait(full + kEmpty + stage * 8, parity ^ 1);
    }
};

// Takes the tiles and has their weights brought, by one warp. The counter is zero before and after
// each launch.
template <int F, int G, bool kCodes>
__device__ __forceinline__ void load_weights(const linear_args &p, const division &d, const maps &m,
                                             ring to, uint32_t base, const expert_table &table,
                                             const told_tiles &told) {
    constexpr int kUnits = units_of(kCodes), kCode = code_of(kCodes);
    constexpr int kGranules = kUnits * 64 / G;
    const int tiles = table.start[p.count], ctas = (int)gridDim.x, more = max(tiles - ctas, 0);
    const int lane = threadIdx.x % 32, ask_at = max(d.steps - 4, 0);
    const uint64_t policy = policy_evict_first();
    const auto weights = [&](const target &tile, int step, int stage) {
        const uint32_t full = to.full + stage * 8;
        barrier_arrive_expect(full, kCode + kBlocks * kGranules * p.granule_bytes);
        copy_box(base + d.at_code + stage * kCode, &m.code, step * kUnits, tile.block, tile.expert,
                 full, policy);
        copy_box(base + d.at_scale + stage * d.scale_stage, &m.scale, step * kGranules, tile.block,
                 tile.expert, full, policy);
    };
    const auto tile_of = [&](int t) {
        return t < tiles ? locate<kBlocks>(p, d, table, t) : target{};
    };
    target tile = tile_of((int)blockIdx.x);
    told.tell(0, tile);
    // Steps whose weights wait for no kernel, and for no stage.
    const int early = p.routed && tile.m_end > 0 ? min(d.steps, d.stages) : 0;
    if (lane == 0)
        for (int i = 0; i < early; i++) weights(tile, i, i);
    wait_for_previous();
    int taken = 0;
    const auto ask = [&] {
        if (lane == 0) {
            taken = atomicAdd(p.counters, 1);
            if (taken == more + ctas - 1) *p.counters = 0; // every CTA asks until it finds nothing
        }
    };
    if (tile.m_end == 0) ask();
    for (int count = 0; tile.m_end > 0; count++) {
        for (int step = 0; step < d.steps; step++, to.next(d)) {
            if (step == ask_at) ask();
            if (count == 0 && step < early) continue;
            to.wait_empty();
            if (lane == 0) weights(tile, step, to.stage);
            __syncwarp();
        }
        tile = tile_of(ctas + __shfl_sync(~0u, taken, 0));
        told.tell(count + 1, tile);
    }
}

// Rows of x in the swizzle of the copy engine, by two warps: `half` takes four rows of each eight.
// A row past the tile's last is the last again: nobody looks at what it gives.
template <bool kCodes>
__device__ __forceinline__ void gather(const linear_args &p, const division &d, ring to,
                                       uint32_t base, int32_t *rows, int half,
                                       const told_tiles &told) {
    constexpr int kPiece = kCodes ? 16 : 8, kLine = 8 * kPiece; // inputs of 16 and of 128 bytes
    static_assert(units_of(kCodes) * 64 == 2 * kLine, "a step is two lines");
    const int lane = threadIdx.x % 32, chunk = lane % 8, row = half * 4 + lane / 8;
    const uint32_t to_in = base + row * 128 + ((chunk ^ row) << 4), line = d.rows * 128;
    wait_for_previous();
    for (int count = 0;; count++) {
        const target tile = told.get(count);
        if (tile.m_end == 0) break;
        const int eights = (tile.m_end - tile.m0 + 7) / 8;
        __syncwarp();
        // In pieces of 16 bytes: 16 eights of the first of this warp's rows, of the second, ..
        for (int i = lane; i < 64; i += 32) {
            const int r = min(tile.m0 + i % 16 * 8 + half * 4 + i / 16, tile.m_end - 1);
            rows[i] = (int32_t)((p.x_row ? __ldcg(p.x_row + r) : r) * (p.ldx / kPiece));
        }
        __syncwarp();
        told.done(count);
        for (int step = 0; step < d.steps; step++, to.next(d)) {
            const int k = step * 2 * kLine + chunk * kPiece;
            const uint4 *from = static_cast<const uint4 *>(p.x) + min(k, p.k - kPiece) / kPiece;
            const int first = k < p.k ? 16 : 0, second = k + kLine < p.k ? 16 : 0, on = second / 2;
            uint32_t at = to_in + to.stage * d.x_stage;
            to.wait_empty();
#pragma unroll 2
            for (int e = 0; e < eights; e += 2, at += 2048) {
                const uint2 i = *reinterpret_cast<const uint2 *>(rows + lane / 8 * 16 + e);
                copy_some(at, from + i.x, first);
                copy_some(at + line, from + i.x + on, second);
                if (e + 1 == eights) break;
                copy_some(at + 1024, from + i.y, first);
                copy_some(at + 1024 + line, from + i.y + on, second);
            }
            barrier_arrive_copies(to.full + kLanded + to.stage * 8);
        }
    }
}

// The scales of rows of codes, of the tile told of as number `count`, by a warp. What lies past the
// tile's last nobody looks at.
__device__ __forceinline__ void bring_scales(const linear_args &p, const target &tile, int count,
                                             float *scales) {
    constexpr int kEach = (rows_most(true) + 31) / 32;
    const int lane = threadIdx.x % 32, rows = tile.m_end - tile.m0;
    scales += count % kTold * rows_most(true);
    int from[kEach];
    float scale[kEach];
#pragma unroll
    for (int i = 0; i < kEach; i++) { // all at once
        const int r = tile.m0 + min(i * 32 + lane, rows - 1);
        from[i] = p.x_row ? __ldcg(p.x_row + r) : r;
    }
#pragma unroll
    for (int i = 0; i < kEach; i++) scale[i] = __ldcg(p.x_scale + from[i]);
#pragma unroll
    for (int i = 0; i < kEach; i++)
        if (i * 32 + lane < rows) scales[i * 32 + lane] = scale[i];
}

// Makes x visible to the tensor cores, by one warp. Its lanes meet at every step: one that fell two
// uses of a stage behind would take the phase of kLanded for one it has seen, and wait for ever.
template <bool kCodes>
__device__ __forceinline__ void show(const linear_args &p, const division &d, ring to,
                                     const told_tiles &told, float *scales) {
    for (int count = 0;; count++) {
        const target tile = told.get(count);
        if (tile.m_end == 0) break;
        if (kCodes) bring_scales(p, tile, count, scales); // seen by who waits for a stage
        __syncwarp();
        told.done(count);
        for (int step = 0; step < d.steps; step++, to.next(d)) {
            barrier_wait(to.full + kLanded + to.stage * 8, to.parity);
            proxy_fence();
            __syncwarp();
            // Of codes by all lanes: each has brought scales.
            if (kCodes || threadIdx.x % 32 == 0) barrier_arrive(to.full + to.stage * 8);
        }
    }
}

// --- Multiplying --------------------------------------------------------------------------------

// Scales meet the sums of a granule, not each weight, where there are registers for both sums:
// fewer instructions.
__host__ __device__ constexpr bool scaled_later(int f, int n) { return f == WF_INT4 && n <= 64; }

template <typename T, int F, int G, bool kCodes> struct multiplier {
    static constexpr int kUnits = units_of(kCodes), kCode = code_of(kCodes);
    static constexpr bool kFolded = dequant_unfold<T, F>() != 1.f;
    const linear_args &p;
    const division &d;
    ring from;
    uint32_t code, scale, x; // this lane's places in the first stages; x: low half of a descriptor
    int at_scale;

    __device__ __forceinline__ void begin(uint32_t base) {
        const int wg = threadIdx.x / 128, strip = threadIdx.x / 32 % 4, lane = threadIdx.x % 32;
        code = base + d.at_code + wg * (kUnits * 2048) + strip * 512 + lane * 16;
        scale = base + d.at_scale + wg * (kUnits * 64 / G) * p.granule_bytes;
        at_scale = strip * 16 + lane / 4 * 2;
        // From one lane, so that the compiler knows it for uniform: descriptors are.
        x = __shfl_sync(~0u, base >> 4 | 1u << 16, 0);
        // Opaque, lest they be computed anew for every unit.
        asm volatile("" : "+r"(code), "+r"(scale), "+r"(at_scale));
    }

    // Unit u: A fragments of its four atoms of 16 inputs.
    template <bool kLater>
    __device__ __forceinline__ void convert(uint32_t (&a)[4][4], dequant_rows &rows,
                                            float (&later)[2], int u, const uint4 &chunk,
                                            uint32_t scale_at) const {
#pragma unroll
        for (int j = 0; j < 4; j++) {
            const int input = u * 64 + j * 16;
            if (input % G == 0) {
                dequant_packed raw;
                dequant_load_packed<F>(raw, scale_at + input / G * p.granule_bytes, at_scale,
                                       p.sym);
                if (kLater) dequant_unpack<F>(later, raw);
                rows = dequant_rows_of<T, F, kFolded>(raw);
            }
            dequant_word<T, F, !kLater, kFolded>(
                a[j], reinterpret_cast<const uint32_t *>(&chunk) + j, dequant_scales_of(rows));
        }
    }

    // This warpgroup's sums. While it converts a unit the tensor cores are at those of others; the
    // codes of the next are read meanwhile.
    template <int N, int R> __device__ __forceinline__ void tile(float (&acc)[R]) {
        constexpr bool kLater = scaled_later(F, N);
        const bool leader = threadIdx.x % 32 == 0;
        float part[kLater ? N / 2 : 1] = {}, later[2]; // of a granule
#pragma unroll 1
        for (int steps = d.steps; steps > 0; steps--) {
            const uint32_t code_at = code + from.stage * kCode;
            const uint32_t scale_at = scale + from.stage * d.scale_stage;
            const uint32_t x_stage = __shfl_sync(~0u, x + from.stage * (d.x_stage / 16), 0);
            barrier_wait(from.full + from.stage * 8, from.parity);
            dequant_rows rows;
            uint4 chunk = shared_u128(code_at);
#pragma unroll
            for (int u = 0; u < kUnits; u++) {
                uint32_t a[4][4];
                convert<kLater>(a, rows, later, u, chunk, scale_at);
                const uint64_t x_at = group_descriptor_low(x_stage + u * d.rows * 8);
                group_fence();
#pragma unroll
                for (int j = 0; j < 4; j++) {
                    if constexpr (!kLater)
                        multiply_group<T, N>::run(acc, a[j], x_at + j * 2);
                    else if (u == 0 && j == 0)
                        multiply_group<T, N>::run_fresh(part, a[j], x_at + j * 2);
                    else
                        multiply_group<T, N>::run(part, a[j], x_at + j * 2);
                }
                group_commit();
                if (u + 1 < kUnits) chunk = shared_u128(code_at + (u + 1) * 2048);
                group_wait<0>();
            }
            if (leader) barrier_arrive(from.full + kEmpty + from.stage * 8);
            if (kLater)
                group_pin(part);
            else
                group_pin(acc);
#pragma unroll
            for (int i = 0; i < N / 2 && kLater; i++)
                acc[i] = fmaf(part[i], later[i / 2 % 2], acc[i]);
            from.next(d);
        }
    }

    // A fragments of units, of their codes.
    template <int U>
    static __device__ __forceinline__ void
    convert_codes(uint32_t (&a)[2 * U][4], const uint4 (&chunk)[U], const uint32_t (&offset)[2]) {
#pragma unroll
        for (int i = 0; i < 2 * U; i++) {
            const uint4 &c = chunk[i / 2];
            nibble_codes(a[i][0], a[i][1], i % 2 ? c.z : c.x, offset);
            nibble_codes(a[i][2], a[i][3], i % 2 ? c.w : c.y, offset);
        }
#pragma unroll
        for (int i = 0; i < 8 * U; i++) // made before the fence of the product
            asm volatile("" : "+r"(a[i / 4][i % 4]));
    }
    // Their products; x_at: low half of a descriptor.
    template <int N, int U>
    static __device__ __forceinline__ void
    multiply_codes(int32_t (&part)[N / 2], const uint32_t (&a)[2 * U][4], uint32_t x_at) {
        group_fence();
#pragma unroll
        for (int i = 0; i < 2 * U; i++)
            multiply_nibbles<N>::run(part, a[i], group_descriptor_low(x_at + i * 2));
        group_commit();
    }

    // The same where x is codes. Sums T_g of granules 1 .. g, of kChain inputs at most, are int32
    // that begin at M = NIBBLE_START_VALUE as float bits: below 2^22 either way the register is the
    // float M + T_g. Granule g adds (s_g - s_g+1) (M + T_g), s behind the last being zero, and
    // - M s_1 before the first takes M out. See linear_mid.cu for what that rounds to.
    //
    // `sums` are the same registers for every N: of several sets ptxas spills what lies between.
    template <int N> __device__ __forceinline__ void tile_of_codes(float *acc, int32_t *sums) {
        static_assert(G == 128, "two units");
        constexpr int U = N > 48 ? 1 : 2; // units at once, as registers go
        constexpr int kChain = 2048;      // |code - zero| < 16
        const bool leader = threadIdx.x % 32 == 0;
        int32_t(&part)[N / 2] = *reinterpret_cast<int32_t(*)[N / 2]>(sums);
        uint4 chunk[U]; // of what comes next
        dequant_packed packed;
        const auto fetch = [&](int u) {
            const uint32_t scale_at = scale + from.stage * d.scale_stage;
#pragma unroll
            for (int i = 0; i < U; i++)
                chunk[i] = shared_u128(code + from.stage * kCode + (u + i) * 2048);
            if (u % 2 == 0)
                dequant_load_packed<WF_INT4>(packed, scale_at + u / 2 * p.granule_bytes, at_scale,
                                             p.sym);
        };
        barrier_wait(from.full + from.stage * 8, from.parity);
        fetch(0);
        int left = d.steps, chain = 0; // chain: steps of it that were
#pragma unroll 1
        for (bool more = true; more;) {
            const uint32_t x_stage = __shfl_sync(~0u, x + from.stage * (d.x_stage / 16), 0);
            const uint32_t empty = from.full + kEmpty + from.stage * 8;
            float step[2], next[2];
            uint32_t offset[2];
            more = --left > 0;
#pragma unroll
            for (int u = 0; u < kUnits; u += U) {
                const bool last = u + U == kUnits;
                uint32_t a[2 * U][4];
                if (u % 2 == 0) {
                    nibble_offsets(offset, packed);
                    dequant_unpack<WF_INT4>(step, packed);
                }
                if (u == 0 && chain == 0) {
#pragma unroll
                    for (int i = 0; i < N / 2; i++) {
                        acc[i] = fmaf(-NIBBLE_START_VALUE, step[i / 2 % 2], acc[i]);
                        asm volatile("mov.b32 %0, 0x4b400000;" : "+r"(part[i])); // "+": see above
                    }
                }
                convert_codes<U>(a, chunk, offset);
                multiply_codes<N, U>(part, a, x_stage + u / 2 * d.rows * 8 + u % 2 * 4);
                if (last) {
                    from.next(d);
                    if (++chain == kChain / (kUnits * 64)) chain = 0;
                    if (more) barrier_wait(from.full + from.stage * 8, from.parity);
                }
                if (!last || more) fetch(last ? 0 : u + U);
                if ((u + U) % 2) {
                    group_wait<0>();
                    continue;
                }
                dequant_unpack<WF_INT4>(next, packed);
                if (last && (chain == 0 || !more)) next[0] = next[1] = 0.f;
                step[0] -= next[0], step[1] -= next[1];
                group_wait<0>();
                if (last && leader) barrier_arrive(empty);
                group_pin(part);
#pragma unroll
                for (int i = 0; i < N / 2; i++)
                    acc[i] = fmaf(__int_as_float(part[i]), step[i / 2 % 2], acc[i]);
            }
        }
    }
};

// --- The end of a tile --------------------------------------------------------------------------

// What a warp knows of its block when its sums are made. Lines of 64 outputs are written whole, by
// way of one of two places in turn (rounds: how often), 16 rows of x at a time.
template <typename T> struct block_end {
    const linear_args &p;
    int warp, wg, strip, up; // up: whether it is a block of up that a gate waits for
    int32_t in_half;         // the block's first row of its half
    int rows;                // of x
    T *y;                    // at the block's first output of the tile's first row
    float bias[2];           // of outputs g and g + 8

    __device__ __forceinline__ block_end(const linear_args &p, const target &tile, int block)
        : p(p), bias{0.f, 0.f} {
        const int upper = block >= p.half_blocks ? 1 : 0;
        warp = __shfl_sync(~0u, threadIdx.x / 32, 0);
        wg = warp / 4;
        strip = warp % 4;
        up = p.paired ? upper : 0;
        in_half = (block - upper * p.half_blocks) * 64;
        rows = tile.m_end - tile.m0;
        y = static_cast<T *>(p.y) + tile.m0 * p.ldy + (upper - up) * p.half_rows + in_half;
        const int32_t output = in_half + strip * 16;
        if (!p.bias || output >= p.half_rows) return;
        const T *of = static_cast<const T *>(p.bias) + (int64_t)tile.expert * p.n +
                      upper * p.half_rows + output + threadIdx.x % 32 / 4;
        bias[0] = to_f32(of[0]);
        bias[1] = to_f32(of[8]);
    }
    __device__ __forceinline__ float value(float sum, float mend, int e) const {
        return fmaf(sum, mend, bias[e / 2]);
    }
};

template <typename T, int R>
__device__ __forceinline__ void finish_plain(const float (&acc)[R], float mend,
                                             const block_end<T> &end, uint32_t places,
                                             int &rounds) {
    linear_lines<T> to(end.p, end.y, end.p.half_rows - end.in_half, end.rows,
                       places + end.wg * (kPlace / kBlocks), kPlace, 9 + end.wg);
#pragma unroll
    for (int j = 0; j < R / 8; j++) {
        if (16 * j >= end.rows) break;
        float v[8];
#pragma unroll
        for (int i = 0; i < 8; i++) v[i] = end.value(acc[8 * j + i], mend, i % 4);
        to.put(v, rounds);
    }
}

// The test stands outside, so that the four take turns in the pipe.
__device__ __forceinline__ void gate_four(float (&gate)[4], const float (&up)[4],
                                          const linear_args &p) {
    if (p.epilogue == LINEAR_GATED) {
#pragma unroll
        for (int e = 0; e < 4; e++) gate[e] = linear_gate(gate[e], up[e], LINEAR_GATED, 0.f);
    } else {
#pragma unroll
        for (int e = 0; e < 4; e++)
            gate[e] = linear_gate(gate[e], up[e], LINEAR_GATED_OAI, p.limit);
    }
}

// Of gate and up each warp finishes every second eight rows: the other's sums of these come by a
// place, [lane] of 16 bytes, and go back there as results: rows of 32 bytes, turned so that the
// pieces of a line lie in different banks.
template <typename T, int R>
__device__ __forceinline__ void finish_gated(const float (&acc)[R], float mend,
                                             const block_end<T> &end, uint32_t places,
                                             int &rounds) {
    constexpr int kWarpPlace = kPlace / kWarps;
    const int thread = threadIdx.x % 128, lane = thread % 32, other = end.warp ^ 2 * kBlocks;
    const uint32_t mine = places + end.warp * kWarpPlace + lane * 16;
    const uint32_t theirs = places + other * kWarpPlace;
    const auto piece = [](int row, int strip, int half) {
        const int at = (row + strip) % 8;
        return at * 32 + ((half ^ at / 4) << 4);
    };
    const uint32_t put = theirs + piece(lane % 8, end.strip, lane / 8 % 2);
    const int row = thread / 16, strip = thread / 4 % 4, first = 8 * end.up + row;
    const uint32_t get = places + (other / 4 * 4 + strip) * kWarpPlace +
                         piece(row, strip, thread / 2 % 2) + thread % 2 * 8;
    T *y = end.y + first * end.p.ldy + thread % 16 * 4;
    const bool inside = end.in_half + thread % 16 * 4 < end.p.half_rows;
#pragma unroll
    for (int j = 0; j < R / 4; j += 2, y += 16 * end.p.ldy) {
        if (8 * j >= end.rows) break;
        const uint32_t place = rounds++ % 2 * kPlace;
        float own[4], v[4], gate[4], up[4];
#pragma unroll
        for (int e = 0; e < 4; e++) { // v: what this warp does not finish
            const float low = end.value(acc[4 * j + e], mend, e);
            const float high = end.value(acc[4 * j + 4 + e], mend, e);
            own[e] = end.up ? high : low;
            v[e] = end.up ? low : high;
        }
        asm volatile("st.shared.v4.f32 [%0], {%1, %2, %3, %4};" ::"r"(mine + place), "f"(v[0]),
                     "f"(v[1]), "f"(v[2]), "f"(v[3])
                     : "memory");
        linear_meet(1 + end.warp % (2 * kBlocks), 64);
        asm volatile("ld.shared.v4.f32 {%0, %1, %2, %3}, [%4];"
                     : "=f"(v[0]), "=f"(v[1]), "=f"(v[2]), "=f"(v[3])
                     : "r"(theirs + place + lane * 16)
                     : "memory");
#pragma unroll
        for (int e = 0; e < 4; e++) {
            gate[e] = end.up ? v[e] : own[e];
            up[e] = end.up ? own[e] : v[e];
        }
        gate_four(gate, up, end.p);
        __syncwarp();
        asm volatile(
            "stmatrix.sync.aligned.m8n8.x2.trans.shared.b16 [%0], {%1, %2};" ::"r"(put + place),
            "r"(pack2<T>(gate[0], gate[1])), "r"(pack2<T>(gate[2], gate[3]))
            : "memory");
        linear_meet(9 + end.wg, 128);
        uint2 line;
        asm volatile("ld.shared.v2.u32 {%0, %1}, [%2];"
                     : "=r"(line.x), "=r"(line.y)
                     : "r"(get + place)
                     : "memory");
        if (inside && 8 * j + first < end.rows) *reinterpret_cast<uint2 *>(y) = line;
    }
}

// Sums of codes times the scales of their rows of x, which lie at `at`.
template <int N> __device__ __forceinline__ void scale_rows(float (&acc)[N], uint32_t at) {
    at += threadIdx.x % 4 * 8;
#pragma unroll
    for (int j = 0; j < N / 4; j++) {
        const uint2 two = shared_u64(at + j * 32);
#pragma unroll
        for (int e = 0; e < 4; e++) acc[4 * j + e] *= __uint_as_float(e % 2 ? two.y : two.x);
    }
}

// y of a tile, by the warps that have its sums.
template <typename T, int R>
__device__ __forceinline__ void finish(const float (&acc)[R], float mend, const linear_args &p,
                                       const target &tile, uint32_t places, int &rounds) {
    const int block = block_of<kBlocks>(p, tile, __shfl_sync(~0u, threadIdx.x / 128, 0));
    if (block < 0) return;
    const block_end<T> end(p, tile, block);
    if (p.paired)
        finish_gated<T>(acc, mend, end, places, rounds);
    else
        finish_plain<T>(acc, mend, end, places, rounds);
}

// --- The kernel ---------------------------------------------------------------------------------

#if defined(__CUDA_ARCH_FEAT_SM90_ALL) // empty on other architectures
template <typename T, int F, int G, bool kCodes>
__device__ __forceinline__ void multiply(const linear_args &p, const division &d, ring from,
                                         uint32_t base, const told_tiles &told, uint32_t scales) {
    multiplier<T, F, G, kCodes> work = {p, d, from, 0, 0, 0, 0};
    work.begin(base);
    wait_for_previous();
    int rounds = 0;
    int32_t part[kCodes ? rows_most(true) / 2 : 1] = {};
#pragma unroll 1
    for (int count = 0;; count++) {
        const target tile = told.get(count);
        if (tile.m_end == 0) break;
        const int eights = (tile.m_end - tile.m0 + 7) / 8;
        const auto end = [&](const auto &acc, float mend) {
            finish<T>(acc, mend, p, told.again(count), base + d.at_places, rounds);
        };
        // What sums are too small by: with scales on them, or on codes.
        constexpr float kLater = dequant_factor<T, F>(), kOn = dequant_unfold<T, F>();
#define ROWS(n)                                                                                    \
    case (n) / 8:                                                                                  \
        if constexpr (kCodes)                                                                      \
            work.template tile_of_codes<n>(acc, part);                                             \
        else                                                                                       \
            work.template tile<n>(acc);                                                            \
        break;
#define ROWS_16(n)                                                                                 \
    case (n) / 8 - 1: ROWS(n)
        const uint32_t scales_at = scales + count % kTold * (rows_most(true) * 4); // of codes
        if constexpr (kCodes) {
            if (eights <= 6) {
                float acc[24] = {};
                switch (eights) { EXPERTS_CODES_SMALL(ROWS, ROWS_16) }
                scale_rows(acc, scales_at);
                end(acc, 1.f);
            } else {
                float acc[40] = {};
                switch (eights) { EXPERTS_CODES_LARGE(ROWS, ROWS_16) }
                scale_rows(acc, scales_at);
                end(acc, 1.f);
            }
        } else if (eights <= 8) {
            float acc[32] = {};
            switch (eights) { EXPERTS_SMALL(ROWS, ROWS_16) }
            end(acc, scaled_later(F, 64) ? kLater : kOn);
        } else {
            float acc[64] = {};
            switch (eights) { EXPERTS_LARGE(ROWS, ROWS_16) }
            end(acc, scaled_later(F, 128) ? kLater : kOn);
        }
        __syncwarp();
        told.done(count);
#undef ROWS
#undef ROWS_16
    }
}
#endif

template <typename T, int F, int G, bool kCodes>
__global__ void __launch_bounds__(kThreads, 1)
    linear_experts_many(const __grid_constant__ linear_args p, const __grid_constant__ division d,
                        const __grid_constant__ maps m) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL) // never launched, and empty, on other architectures
    extern __shared__ uint8_t shared[];
    uint8_t *start = shared + ((1024 - (shared_address(shared) & 1023)) & 1023);
    const uint32_t base = shared_address(start), bars = base + d.at_bars;
    const ring both = {bars, 0, 0};
    const told_tiles told = {bars + kBars};
    int32_t *rows = reinterpret_cast<int32_t *>(start + d.at_bars + kBars + kToldBytes);
    float *scales = reinterpret_cast<float *>(rows + kRowList / 4); // of codes
    const expert_table table(rows + (kRowList + (kCodes ? kRowScales : 0)) / 4, p.count);
    const int warp = __shfl_sync(~0u, threadIdx.x / 32, 0);
    if (threadIdx.x == 32 * kWarps) {
        prefetch_map(&m.code);
        prefetch_map(&m.scale);
        told.init(kWarps + 3);
        for (int i = 0; i < d.stages; i++) {
            barrier_init(both.full + i * 8, 1 + (kCodes ? 32 : 1));
            barrier_init(both.full + kEmpty + i * 8, kWarps);
            barrier_init(both.full + kLanded + i * 8, 2 * 32);
        }
        barrier_init_fence();
    }
    if (!p.routed) wait_for_previous();
    fill_table<kThreads>(p, d, table);
    if (warp >= kWarps) {
        registers_down<kLoadRegisters>();
        if (warp == kWarps) {
            load_weights<F, G, kCodes>(p, d, m, both, base, table, told);
        } else if (warp == kWarps + 1) {
            wait_for_previous();
            launch_dependents(); // which may read the routing at once (linear_problem.routed)
            show<kCodes>(p, d, both, told, scales);
        } else {
            const int half = warp - kWarps - 2;
            gather<kCodes>(p, d, both, base, rows + half * 64, half, told);
        }
        return;
    }
    registers_up<kMathRegisters>();
    multiply<T, F, G, kCodes>(p, d, both, base, told, shared_address(scales));
#endif
}

// --- Launch -------------------------------------------------------------------------------------

template <int F, int G, bool kCodes> division divide(const linear_args *a) {
    constexpr int kRows = rows_most(kCodes), kUnits = units_of(kCodes), kCode = code_of(kCodes);
    division d = {};
    // Three deviations above the mean, if an expert is as likely as another: so many rows have
    // nearly all of them.
    const double mean = (double)a->m / a->count;
    const int most = (int)(mean + 3 * sqrt(mean)) + 1;
    d.rows = most >= kRows ? kRows : most <= 32 ? 32 : (most + 15) / 16 * 16;
    d.tiles = a->paired ? (a->half_blocks + 1) / 2 : (a->blocks + kBlocks - 1) / kBlocks;
    d.steps = (a->units + kUnits - 1) / kUnits;
    d.x_stage = d.rows * 2 * 128;
    d.scale_stage = (kBlocks * (kUnits * 64 / G) * a->granule_bytes + 127) / 128 * 128;
    const int lists = kRowList + (kCodes ? kRowScales : 0) + table_bytes(a->count);
    const int fixed = kPlaces + kBars + kToldBytes + lists + 1024;
    d.stages = (kRoom - fixed) / (d.x_stage + kCode + d.scale_stage);
    if (d.stages > kStagesMost) d.stages = kStagesMost;
    d.at_code = d.stages * d.x_stage;
    d.at_scale = d.at_code + d.stages * kCode;
    d.at_places = d.at_scale + d.stages * d.scale_stage;
    d.at_bars = d.at_places + kPlaces;
    d.bytes = d.at_bars + kBars + kToldBytes + lists + 1024;
    return d;
}

status encode(CUtensorMap *map, const void *at, const cuuint64_t (&size)[5],
              const cuuint64_t (&stride)[4], const cuuint32_t (&box)[5]) {
    tensor_map_encode function;
    TRY(tensor_map_encoder(&function));
    const cuuint32_t every[5] = {1, 1, 1, 1, 1};
    const CUresult r =
        function(map, CU_TENSOR_MAP_DATA_TYPE_FLOAT64, 5, const_cast<void *>(at), size, stride, box,
                 every, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_NONE,
                 CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
    return r == CUDA_SUCCESS ? ST_OK : FAIL(ST_DEVICE, "tensor map: error %d", (int)r);
}

template <int G, bool kCodes> status encode_all(maps *m, const linear_args *a) {
    constexpr int kUnits = units_of(kCodes);
    const cuuint64_t halves = a->paired ? 2 : 1, blocks = a->paired ? a->half_blocks : a->blocks;
    const cuuint32_t at_once = kBlocks / (cuuint32_t)halves;
    const cuuint64_t block = (cuuint64_t)a->units * 2048, granule = (cuuint64_t)a->granule_bytes;
    const cuuint64_t of_block = granule * a->granules, count = (cuuint64_t)a->count;
    TRY(encode(&m->code, a->code, {256, (cuuint64_t)a->units, blocks, halves, count},
               {2048, block, block * blocks, (cuuint64_t)a->code_bytes},
               {256, kUnits, at_once, (cuuint32_t)halves, 1}));
    return encode(&m->scale, a->scale,
                  {granule / 8, (cuuint64_t)a->granules, blocks, halves, count},
                  {granule, of_block, of_block * blocks, (cuuint64_t)a->scale_bytes},
                  {(cuuint32_t)granule / 8, kUnits * 64 / G, at_once, (cuuint32_t)halves, 1});
}

template <typename T, int F, int G, bool kCodes>
status launch(const linear_args *args, int32_t n_sms, int32_t, kernel_stream stream) {
    const auto kernel = linear_experts_many<T, F, G, kCodes>;
    maps m = {};
    TRY((encode_all<G, kCodes>(&m, args)));
    const division d = divide<F, G, kCodes>(args);
    const launch_config l(dim3((unsigned)n_sms), dim3(kThreads), (size_t)d.bytes, stream, true);
    cudaError_t e =
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kRoom);
    if (e == cudaSuccess) e = cudaLaunchKernelEx(&l.config, kernel, *args, d, m);
    return e == cudaSuccess ? ST_OK : FAIL(ST_DEVICE, "linear_experts: %s", cudaGetErrorString(e));
}

#define T_F16  __half
#define T_BF16 __nv_bfloat16
#define ROW_OF(NAME, CODES, F, T, G)                                                               \
    {NAME,    90,                                                                                  \
     90,      WF_##F,                                                                              \
     DT_##T,  rows_most(CODES),                                                                    \
     kBlocks, units_of(CODES),                                                                     \
     G,       G,                                                                                   \
     1,       launch<T_##T, WF_##F, G, CODES>,                                                     \
     0,       false,                                                                               \
     true},
#define ROW(F, T, G)       ROW_OF("experts_128", false, F, T, G)
#define ROW_CODES(F, T, G) ROW_OF("experts_codes", true, F, T, G)
const linear_variant rows[] = {EXPERTS_INSTANCES(ROW)};
const linear_variant codes[] = {EXPERTS_INSTANCES_CODES(ROW_CODES)};

} // namespace

extern "C" linear_table linear_experts_table(void) {
    return linear_table{rows, (int32_t)(sizeof rows / sizeof rows[0])};
}
extern "C" linear_table linear_experts_codes_table(void) {
    return linear_table{codes, (int32_t)(sizeof codes / sizeof codes[0])};
}
