// linear_mid.cu - y^T = W x^T for 17 to 64 rows of x, on sm_90, by wgmma.
//
// A cluster of S CTAs shares a tile (B blocks of 64 rows of W; with gate and up half of them each)
// along K: CTA r has the r-th part of the steps. Cluster c takes tiles c, c + clusters, ...
//
// Or CTAs have shares of W instead, which fill more SMs: each so many halves of blocks, a half
// being a block with half of the inputs. CTA c has those from c * share on, in tiles of B blocks;
// the first and the last block may be a half. Of a block that two CTAs have, which are a cluster,
// the first sends its sums as soon as it has them, and the second adds them to its own and
// finishes. Warpgroups without a block or this half of it let the steps pass. That costs copies of
// the part of a tile that is not multiplied, so it is for 4 bits; with gate and up it was slower.
//
// Of a CTA's warps
//
//   4 B P multiply: warpgroup w has block w % B, and of every step the (w / B)-th of P parts. It
//       turns codes of 32 inputs into A fragments while wgmma multiplies those before with x from
//       shared memory
//   1   has codes and scales brought into a ring. Weights depend on no kernel before this one and
//       are asked for before waiting for it (programmatic dependent launch)
//   1   has x brought into a ring of its own
//
// Everything comes as boxes of the tensor copy engine, as few as can be: a copy costs its thread a
// few hundred cycles beside warps that multiply. What lies past K or the last block comes as zeros,
// so that all steps are alike.
//
// Sums that must meet (of the CTAs of a cluster, of parts, of gate and up) go to the CTA that
// finishes them, dealt out by 8 rows of x (st.async into its shared memory, whose barrier counts
// the bytes), and are added there in a fixed order. Clusters do not wait for each other, and there
// is no workspace: the bits are the same on every run.
#include "linear_common.cuh"
#include "linear_launch.h"
#include "ptx_sm90.cuh"
#include "tensor_map.cuh"

// With four warpgroups a CTA has an SM (B P = 4), with two half of one, so that the next launch's
// can load its weights beside it: for small matrices.
//
// The explicit list: format, type, x rows (NT), scale granule (0: none). Of each there are tiles of
// B x P = 2 x 1, 2 x 2 and 4 x 1, of which mid_NT takes what should be the fastest.
#ifndef MID_INSTANCES
#define MID_ROWS(X, F, T, G) X(F, T, 32, G) X(F, T, 64, G)
#define MID_TYPES(X, F, G)   MID_ROWS(X, F, F16, G) MID_ROWS(X, F, BF16, G)
#define MID_INSTANCES(X)                                                                           \
    MID_TYPES(X, INT4, 128)                                                                        \
    MID_TYPES(X, INT4, 64)                                                                         \
    MID_TYPES(X, INT4, 32)                                                                         \
    MID_TYPES(X, MXFP4, 32)                                                                        \
    MID_TYPES(X, NVFP4, 16)                                                                        \
    MID_TYPES(X, INT8, 0)                                                                          \
    MID_TYPES(X, FP8, 0)                                                                           \
    MID_TYPES(X, FP8B, 128)
#endif

namespace {

enum { kClusterMost = 6, kStagesMost = 16 }; // larger clusters find too few places

// Units of K in a stage of W, at least what a scale covers, and in one of x: the longer, the fewer
// instructions; the shorter, the sooner is one free.
__host__ __device__ constexpr int step_units(int f, int blocks, int parts) {
    return linear_code_bits(f) == 4 && blocks * parts == 4 ? 4 : 2;
}
__host__ __device__ constexpr int x_units(int f, int rows, int blocks, int parts) {
    if (parts > 1 || (blocks == 4 && rows == 32)) return step_units(f, blocks, parts);
    return rows == 32 || (blocks == 4 && linear_code_bits(f) == 4) ? 2 : 1;
}
// Can CTAs have shares?
__host__ __device__ constexpr bool has_shares(int f, int blocks, int parts) {
    return blocks == 4 && parts == 1 && linear_code_bits(f) == 4;
}
// Granules of a step.
__host__ __device__ constexpr int step_granules(int f, int blocks, int parts, int g) {
    return g ? step_units(f, blocks, parts) * 64 / g : 0;
}

// How a problem is cut, and where things lie in shared memory (bytes from a multiple of 1024; x
// lies at 0).
struct division {
    int32_t cluster, clusters, tiles, steps; // steps of a tile
    int32_t per, stride,
        all;         // blocks, or pairs: of a tile; from one tile of a CTA to its next; all
    int32_t share;   // 0, or halves of blocks that a CTA has
    int32_t x_whole; // K is a multiple of 64: x comes as boxes of several units
    int32_t x_rows;  // of a unit of x: those there are, in eights
    int32_t w_stages, x_stages, w_stage; // w_stage: bytes, codes and then scales
    int32_t meet;                        // sums travel
    int32_t groups;                      // of 8 rows of x
    int32_t sums[kClusterMost]; // bytes of them that each CTA of a cluster receives for a tile
    int32_t at_w, at_sums, at_half, at_turn, at_bars, bytes;
    int64_t cost; // about, ns
};

// --- What a CTA has to do -----------------------------------------------------------------------

struct part {
    int32_t first, last; // block or pair: where the first tile begins, and the last of all tiles
    int32_t begin, end;  // steps of K
    int32_t share;       // as in division; the compiler knows where it is 0
};
__device__ __forceinline__ part part_of(const division &d, int rank, int share) {
    const int32_t cta = blockIdx.x;
    if (share)
        return part{cta * share / 2, min(((cta + 1) * share - 1) / 2, d.all - 1), 0, d.steps,
                    share};
    return part{cta / d.cluster * d.per, d.all - 1, d.steps * rank / d.cluster,
                d.steps * (rank + 1) / d.cluster, 0};
}

// Steps of block (or pair) v that this CTA has, and whether a half of it is another's.
struct span {
    int32_t begin, end;
    bool no_first, no_second;
};
__device__ __forceinline__ span span_of(const division &d, const part &k, int v) {
    span s = {k.begin, k.end, false, false};
    if (k.share) {
        s.no_first = 2 * v < (int)blockIdx.x * k.share;
        s.no_second = 2 * v + 2 > ((int)blockIdx.x + 1) * k.share;
        if (s.no_first) s.begin = d.steps / 2;
        if (s.no_second) s.end = d.steps / 2;
    }
    return s;
}
// Of a tile.
__device__ __forceinline__ span span_of_tile(const division &d, const part &k, int at) {
    return k.share && at == k.last ? span_of(d, k, at) : span{k.begin, k.end, false, false};
}

// Block of warpgroup wg, or one past the last, where it finishes none.
template <int B>
__device__ __forceinline__ int32_t block_of(const linear_args &p, const division &d, const part &k,
                                            int at, int wg) {
    const int32_t v = at + (p.paired ? wg / 2 : wg);
    if (v > k.last || span_of(d, k, v).no_second) return p.blocks;
    return p.paired ? v + wg % 2 * p.half_blocks : v;
}

// A ring of stages: where the next one is, and how often the ring went round.
struct ring {
    uint32_t full, empty; // barriers, one a stage
    int stages, stage, parity;
    __device__ __forceinline__ void next() {
        if (++stage == stages) stage = 0, parity ^= 1;
    }
    __device__ __forceinline__ void wait_full() const { barrier_wait(full + stage * 8, parity); }
    __device__ __forceinline__ void wait_empty() const {
        barrier_wait(empty + stage * 8, parity ^ 1);
    }
};

struct barriers {
    ring w, x;
    uint32_t sums, read; // sums complete; sums read by everybody
    uint32_t half;       // sums of the other half of a block complete
};
__device__ __forceinline__ barriers barriers_of(const division &d, uint32_t base) {
    barriers b;
    const uint32_t at = base + d.at_bars;
    b.w = ring{at, at + d.w_stages * 8, d.w_stages, 0, 0};
    b.x = ring{at + d.w_stages * 16, at + d.w_stages * 16 + d.x_stages * 8, d.x_stages, 0, 0};
    b.sums = at + (d.w_stages + d.x_stages) * 16;
    b.read = b.sums + 8;
    b.half = b.sums + 16;
    return b;
}

// --- Loading ------------------------------------------------------------------------------------

// Tensor maps: codes [half][block][unit, in rows of 2 KB][2 KB], scales [half][block][granule]
// [bytes], x [units][rows][64] or, where K ends within a unit, [rows][K].
struct maps {
    CUtensorMap code, scale, x;
};

template <int D>
__device__ __forceinline__ void copy_box(uint32_t to, const CUtensorMap *map, int x, int y, int z,
                                         int w, uint32_t bar, uint64_t policy) {
    if (D == 4)
        asm volatile("cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes"
                     ".L2::cache_hint [%0], [%1, {%2, %3, %4, %5}], [%6], %7;" ::"r"(to),
                     "l"(map), "r"(x), "r"(y), "r"(z), "r"(w), "r"(bar), "l"(policy)
                     : "memory");
    else
        asm volatile("cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes"
                     ".L2::cache_hint [%0], [%1, {%2, %3, %4}], [%5], %6;" ::"r"(to),
                     "l"(map), "r"(x), "r"(y), "r"(z), "r"(bar), "l"(policy)
                     : "memory");
}
__device__ __forceinline__ void prefetch_map(const CUtensorMap *map) {
    asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}

// The steps of a CTA, of its tiles one after the other.
struct place {
    int at, step, end;
    __device__ __forceinline__ place(const division &d, const part &k) { go(d, k, k.first); }
    __device__ __forceinline__ void go(const division &d, const part &k, int to) {
        at = to;
        if (at > k.last) return;
        const span s = span_of_tile(d, k, at);
        step = s.begin, end = s.end;
    }
    __device__ __forceinline__ void next(const division &d, const part &k) {
        if (++step == end) go(d, k, at + d.stride);
    }
};

// Codes and scales of all steps, by one thread.
template <int F, int B, int P, int G>
__device__ __forceinline__ void load_weights(const linear_args &p, const division &d, const maps &m,
                                             ring to, uint32_t base, const part &k) {
    constexpr int U = step_units(F, B, P), code = B * U * 512 * linear_code_bits(F);
    constexpr int kRows = U * linear_code_bits(F) / 4, kGranules = step_granules(F, B, P, G);
    const int bytes = code + B * kGranules * p.granule_bytes;
    const uint64_t policy = policy_evict_first();
    for (place i(d, k); i.at <= k.last; i.next(d, k), to.next()) {
        const uint32_t full = to.full + to.stage * 8, stage = base + d.at_w + to.stage * d.w_stage;
        to.wait_empty();
        barrier_arrive_expect(full, bytes);
        copy_box<4>(stage, &m.code, 0, i.step * kRows, i.at, 0, full, policy);
        if (G) copy_box<4>(stage + code, &m.scale, 0, i.step * kGranules, i.at, 0, full, policy);
    }
}

// x of all steps, by one thread.
template <int F, int NT, int B, int P>
__device__ __forceinline__ void load_inputs(const division &d, const maps &m, ring to,
                                            uint32_t base, const part &k) {
    constexpr int U = x_units(F, NT, B, P), kBoxes = step_units(F, B, P) / U;
    const uint64_t policy = policy_evict_normal();
    wait_for_previous();
    for (place i(d, k); i.at <= k.last; i.next(d, k))
        for (int box = i.step * kBoxes; box < (i.step + 1) * kBoxes; box++, to.next()) {
            const uint32_t full = to.full + to.stage * 8, stage = base + to.stage * (U * NT * 128);
            to.wait_empty();
            barrier_arrive_expect(full, U * d.x_rows * 128);
            if (d.x_whole)
                copy_box<3>(stage, &m.x, 0, 0, box * U, 0, full, policy);
            else
                for (int u = 0; u < U; u++)
                    copy_tile(stage + u * d.x_rows * 128, &m.x, (box * U + u) * 64, 0, full);
        }
}

// --- Multiplying --------------------------------------------------------------------------------

template <typename T, int F, int NT, int B, int P, int G> struct multiplier {
    static constexpr int U = step_units(F, B, P), bits = linear_code_bits(F), unit = 512 * bits;
    static constexpr bool wide = bits == 8; // two chunks of 16 bytes a unit, not one
    // Scales meet the sums of a granule, not each weight: fewer instructions.
    static constexpr bool kLater = F == WF_INT4 && G == 128 && NT == 32;
    static constexpr bool folded = dequant_unfold<T, F>() != 1.f; // of sums too small by that
    const linear_args &p;
    const division &d;
    barriers &bar;
    uint32_t code, scale, x; // this lane's places in the first stages; x: low half of a descriptor
    int place, first;        // first: of the units of a step

    __device__ __forceinline__ void begin(uint32_t base) {
        const int wg = threadIdx.x / 128, strip = threadIdx.x / 32 % 4, lane = threadIdx.x % 32;
        const int b = wg % B, at = p.paired ? b % 2 * (B / 2) + b / 2 : b; // place in a stage
        first = wg / B * (U / P);
        code = base + d.at_w + (at * U + first) * unit + strip * (unit / 4) + lane * 16;
        scale =
            base + d.at_w + B * U * unit +
            (at * step_granules(F, B, P, G) + (G ? first * 64 / (G ? G : 1) : 0)) * p.granule_bytes;
        place = strip * 16 + lane / 4 * 2;
        // From one lane, so that the compiler knows it for uniform: descriptors are.
        x = __shfl_sync(~0u, (base + first * d.x_rows * 128) >> 4 | 1u << 16, 0);
        // Opaque, lest they be computed anew for every unit.
        asm volatile("" : "+r"(code), "+r"(scale), "+r"(place));
    }

    // Inputs 32 h .. 32 h + 31 of unit u: A fragments, from the codes in `chunk`.
    __device__ __forceinline__ void convert(uint32_t (&a)[2][4], dequant_rows &rows,
                                            float (&later)[2], int u, int h, const uint4 &chunk,
                                            uint32_t scale_at) const {
        constexpr int kRows = G && G < 64 ? 64 / (G ? G : 1) : 1; // granules of a unit
#pragma unroll
        for (int i = 0; i < 2; i++) {
            const int j = 2 * h + i;
            if (G && j * kRows % 4 == 0 && (G < 128 || u % 2 == 0)) {
                dequant_packed raw;
                dequant_load_packed<F>(
                    raw, scale_at + (G < 128 ? u * kRows + j * kRows / 4 : u / 2) * p.granule_bytes,
                    place, p.sym);
                if (kLater) dequant_unpack<F>(later, raw);
                rows = dequant_rows_of<T, F, folded>(raw);
            }
            dequant_word<T, F, !kLater, folded>(
                a[i], reinterpret_cast<const uint32_t *>(&chunk) + (wide ? i : j) * (bits / 4),
                dequant_scales_of(rows));
        }
    }

    // Steps in which this warpgroup has no part.
    __device__ __forceinline__ void skip(int steps) {
        constexpr int kBoxes = U / x_units(F, NT, B, P);
        const bool leader = threadIdx.x % 32 == 0;
        for (; steps > 0; steps--, bar.w.next()) {
            bar.w.wait_full();
            if (leader) barrier_arrive(bar.w.empty + bar.w.stage * 8);
            for (int i = 0; i < kBoxes; i++, bar.x.next()) {
                bar.x.wait_full();
                if (leader) barrier_arrive(bar.x.empty + bar.x.stage * 8);
            }
        }
    }

    // This warpgroup's sums: 32 inputs are converted while the 32 before are multiplied.
    __device__ __forceinline__ void tile(float (&acc)[NT / 2], const span &k) {
        constexpr int N = U / P, XU = P > 1 ? N : x_units(F, NT, B, P);
        constexpr int x_stage = x_units(F, NT, B, P) * NT * 128;
        constexpr bool kAhead = NT * P < 128; // codes are loaded ahead, where registers suffice
        const bool leader = threadIdx.x % 32 == 0;
        uint32_t a[2][2][4];
        float part[kLater ? NT / 2 : 1] = {}, scale_of[2] = {}, later[2]; // of a granule
        const auto add_part = [&]() {
            group_wait<0>();
            group_pin(part);
#pragma unroll
            for (int i = 0; i < NT / 2 && kLater; i++)
                acc[i] = fmaf(part[i], scale_of[i / 2 % 2], acc[i]);
        };
        int last = -1; // stage of x that a wgmma in flight may read
        for (int step = k.begin; step < k.end; step++) {
            bar.w.wait_full();
            const uint32_t code_at = code + bar.w.stage * d.w_stage;
            const uint32_t scale_at = scale + bar.w.stage * d.w_stage;
            uint32_t x_at = 0;
            dequant_rows rows;
            uint4 chunk;
            const auto load = [&](int u, int h) {
                chunk = shared_u128(code_at + u * unit + (wide ? h * 512 : 0));
            };
            load(0, 0);
#pragma unroll
            for (int u = 0; u < N; u++)
#pragma unroll
                for (int h = 0; h < 2; h++) {
                    if (!kAhead && u + h > 0 && (h == 0 || wide)) load(u, h);
                    convert(a[h], rows, later, u, h, chunk, scale_at);
                    if (kAhead && h == 1 && u + 1 < N) load(u + 1, 0);
                    if (kAhead && h == 0 && wide) load(u, 1);
                    if (u == N - 1 && h == 1) { // the stage has been read
                        __syncwarp();
                        if (leader) barrier_arrive(bar.w.empty + bar.w.stage * 8);
                        bar.w.next();
                    }
                    const bool fresh = h == 0 && u % XU == 0;
                    if (fresh) {
                        bar.x.wait_full();
                        x_at = __shfl_sync(~0u, x + bar.x.stage * (x_stage / 16), 0);
                    }
                    if (kLater && u % 2 == 0 && h == 0) {
                        add_part();
                        scale_of[0] = later[0], scale_of[1] = later[1];
                    }
                    group_fence();
#pragma unroll
                    for (int i = 0; i < 2; i++) {
                        const uint64_t to =
                            group_descriptor_low(x_at + u % XU * d.x_rows * 8 + (2 * h + i) * 2);
                        if constexpr (!kLater)
                            multiply_group<T, NT>::run(acc, a[h][i], to);
                        else if (u % 2 == 0 && h == 0 && i == 0)
                            multiply_group<T, NT>::run_fresh(part, a[h][i], to);
                        else
                            multiply_group<T, NT>::run(part, a[h][i], to);
                    }
                    group_commit();
                    group_wait<1>();
                    if (fresh) {
                        if (last >= 0 && leader) barrier_arrive(bar.x.empty + last * 8);
                        last = bar.x.stage;
                        bar.x.next();
                    }
                }
        }
        if (kLater) add_part();
        group_wait<0>();
        group_pin(acc);
#pragma unroll
        for (int i = 0; i < NT / 2 && folded; i++) acc[i] *= dequant_unfold<T, F>();
        if (last >= 0 && leader) barrier_arrive(bar.x.empty + last * 8);
    }
};

// --- Sums of a tile -----------------------------------------------------------------------------

// The groups of all rows (a row is a strip of a block; of two blocks with gate and up), row after
// row, are dealt out: the t-th is finished by CTA t % S, as its number t / S. There:
// [number][gate, up][sender][lane][4].
struct row_of_sums {
    int half, halves, part, owner, number; // the last two: of its first group
};
template <int B> __device__ __forceinline__ row_of_sums my_row(bool paired, const division &d) {
    const int wg = threadIdx.x / 128, b = wg % B, strip = threadIdx.x / 32 % 4;
    const int first = ((paired ? b / 2 : b) * 4 + strip) * d.groups, number = first / d.cluster;
    return row_of_sums{paired ? b % 2 : 0, paired ? 2 : 1, wg / B, first - number * d.cluster,
                       number};
}

template <int NT, int P>
__device__ __forceinline__ void send(const float (&acc)[NT / 2], const division &d,
                                     const barriers &bar, uint32_t base, int rank, int self,
                                     const row_of_sums &r) {
    const int lane = threadIdx.x % 32;
    int owner = r.owner, number = r.number;
#pragma unroll
    for (int j = 0; j < NT / 8; j++) {
        if (j < d.groups) {
            const int at = ((number * r.halves + r.half) * d.cluster + rank) * P + r.part;
            remote_store(remote_address(base + d.at_sums + at * 512 + lane * 16, self + owner),
                         &acc[4 * j], remote_address(bar.sums, self + owner));
        }
        if (++owner == d.cluster) owner = 0, number++;
    }
}

// The sums of the first half of a block's inputs, to the CTA that has the second: [strip][group]
// [lane][4].
template <int NT>
__device__ __forceinline__ uint32_t place_of_half(const division &d, uint32_t base) {
    return base + d.at_half + threadIdx.x / 32 % 4 * (NT / 8 * 512) + threadIdx.x % 32 * 16;
}
template <int NT>
__device__ __forceinline__ void send_half(const float (&acc)[NT / 2], const division &d,
                                          const barriers &bar, uint32_t base, int to) {
    const uint32_t at = place_of_half<NT>(d, base);
#pragma unroll
    for (int j = 0; j < NT / 8; j++)
        if (j < d.groups)
            remote_store(remote_address(at + j * 512, to), &acc[4 * j],
                         remote_address(bar.half, to));
}
template <int NT>
__device__ __forceinline__ void add_half(float (&acc)[NT / 2], const division &d,
                                         const barriers &bar, uint32_t base) {
    const uint32_t at = place_of_half<NT>(d, base);
    barrier_wait(bar.half, 0);
#pragma unroll
    for (int j = 0; j < NT / 8; j++)
        if (j < d.groups) {
            const uint4 v = shared_u128(at + j * 512);
            acc[4 * j] += __uint_as_float(v.x), acc[4 * j + 1] += __uint_as_float(v.y);
            acc[4 * j + 2] += __uint_as_float(v.z), acc[4 * j + 3] += __uint_as_float(v.w);
        }
}

__device__ __forceinline__ void add_up(float (&c)[4], uint32_t from, int senders) {
    c[0] = c[1] = c[2] = c[3] = 0.f;
#pragma unroll 4
    for (int i = 0; i < senders; i++) {
        const uint4 v = shared_u128(from + i * 512);
        c[0] += __uint_as_float(v.x), c[1] += __uint_as_float(v.y);
        c[2] += __uint_as_float(v.z), c[3] += __uint_as_float(v.w);
    }
}

// Where the block of this warp goes; of a pair, that of gate.
struct place_of_block {
    int32_t block, col;
    bool there;
};
template <int B>
__device__ __forceinline__ place_of_block place_of(const linear_args &p, const division &d,
                                                   const part &k, int tile) {
    const int wg = threadIdx.x / 128 % B, strip = threadIdx.x / 32 % 4;
    place_of_block at;
    at.block = block_of<B>(p, d, k, tile, p.paired ? wg & ~1 : wg);
    const int32_t half = !p.paired && at.block >= p.half_blocks ? 1 : 0;
    const int32_t in_half = (at.block - half * p.half_blocks) * 64 + strip * 16;
    at.there = at.block < p.blocks && in_half < p.half_rows;
    at.col = half * p.half_rows + in_half + threadIdx.x % 4 * 4;
    return at;
}

// The groups of this warp's row that this CTA finishes. Of a pair, the warps of gate and of up take
// turns.
template <typename T, int B, int P>
__device__ __forceinline__ void finish(const linear_args &p, const division &d, const barriers &bar,
                                       const part &k, uint32_t base, int rank, int tile, int count,
                                       const row_of_sums &r, float *turn) {
    const place_of_block at = place_of<B>(p, d, k, tile);
    linear_outputs o = {}, o_up = {};
    if (at.there) o = linear_outputs_of<T>(p, 0, at.block, at.col);
    if (at.there && p.paired)
        o_up = linear_outputs_of<T>(p, 0, at.block + p.half_blocks, at.col + p.half_rows);
    int j = rank - r.owner, number = r.number; // of the first group here
    if (j < 0) j += d.cluster, number++;
    barrier_wait(bar.sums, count % 2);
    if (threadIdx.x == 0 && tile + d.stride <= k.last)
        barrier_arrive_expect(bar.sums, d.sums[rank]);
    if (!at.there) return;
    for (; j < d.groups; j += d.cluster, number++) {
        if ((number & (r.halves * P - 1)) != r.part * r.halves + r.half) continue;
        const uint32_t from =
            base + d.at_sums + threadIdx.x % 32 * 16 + number * r.halves * d.cluster * P * 512;
        float c[4], up[4];
        add_up(c, from, d.cluster * P);
        if (p.paired) {
            add_up(up, from + d.cluster * P * 512, d.cluster * P);
            linear_emit<T, true>(p, 8 * j, p.m, at.col, c, up, o, o_up, turn);
        } else {
            linear_emit<T, false>(p, 8 * j, p.m, at.col, c, c, o, o, turn);
        }
    }
}

// A tile that is nobody else's.
template <typename T, int NT, int B>
__device__ __forceinline__ void finish_alone(float (&acc)[NT / 2], const linear_args &p,
                                             const division &d, const part &k, int tile,
                                             float *turn) {
    const place_of_block at = place_of<B>(p, d, k, tile);
    if (!at.there) return;
    const linear_outputs o = linear_outputs_of<T>(p, 0, at.block, at.col);
#pragma unroll
    for (int j = 0; j < NT / 8; j++)
        if (8 * j < p.m)
            linear_emit<T, false>(p, 8 * j, p.m, at.col, &acc[4 * j], &acc[4 * j], o, o, turn);
}

// --- The kernel ---------------------------------------------------------------------------------

template <int B, int P>
__device__ __forceinline__ void init(const barriers &bar, const division &d, int rank) {
    for (int i = 0; i < d.w_stages; i++) {
        barrier_init(bar.w.full + i * 8, 1);
        barrier_init(bar.w.empty + i * 8, 4 * B * P);
    }
    for (int i = 0; i < d.x_stages; i++) {
        barrier_init(bar.x.full + i * 8, 1);
        barrier_init(bar.x.empty + i * 8, 4 * B * P);
    }
    barrier_init(bar.sums, 1);
    barrier_init(bar.read, 4 * B * P * d.cluster);
    if (d.meet) barrier_arrive_expect(bar.sums, d.sums[rank]);
    barrier_init(bar.half, 1);
    barrier_arrive_expect(bar.half, 4 * d.groups * 512);
    barrier_init_fence();
}

template <typename T, int F, int NT, int B, int P, int G>
__global__ void __launch_bounds__(128 * B * P + 64, B *P == 2 ? 2 : 1)
    linear_mid(const __grid_constant__ linear_args p, const __grid_constant__ division d,
               const __grid_constant__ maps m) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL) // never launched, and empty, on other architectures
    extern __shared__ uint8_t shared[];
    uint8_t *start = shared + ((1024 - (shared_address(shared) & 1023)) & 1023);
    const uint32_t base = shared_address(start);
    // Of those that share a tile; where they begin in the cluster.
    constexpr bool kShares = has_shares(F, B, P);
    const int share = kShares ? d.share : 0;
    const int rank = share ? 0 : cluster_rank(), self = kShares ? cluster_rank() - rank : 0;
    const int warp = __shfl_sync(~0u, threadIdx.x / 32, 0);
    barriers bar = barriers_of(d, base);
    launch_dependents();
    if (threadIdx.x == 128 * B * P) {
        prefetch_map(&m.code);
        if (G) prefetch_map(&m.scale);
        init<B, P>(bar, d, rank);
    } else if (threadIdx.x == 128 * B * P + 32) {
        prefetch_map(&m.x);
    }
    __syncthreads();
    cluster_arrive();
    const part k = part_of(d, rank, share);
    if (warp >= 4 * B * P) {
        if (threadIdx.x == 128 * B * P)
            load_weights<F, B, P, G>(p, d, m, bar.w, base, k);
        else if (threadIdx.x == 128 * B * P + 32)
            load_inputs<F, NT, B, P>(d, m, bar.x, base, k);
        __syncwarp();
        cluster_wait();
        return;
    }
    float *turn = reinterpret_cast<float *>(start + d.at_turn) + warp * LINEAR_STAGE_FLOATS;
    multiplier<T, F, NT, B, P, G> work = {p, d, bar, 0, 0, 0, 0};
    work.begin(base);
    wait_for_previous();
    int count = 0;
    for (int at = k.first; at <= k.last; at += d.stride, count++) {
        float acc[NT / 2] = {};
        const int v = at + (p.paired ? warp / 4 % B / 2 : warp / 4 % B);
        const bool none = kShares && v > k.last;
        const span all = span_of_tile(d, k, at), own = none ? span{} : span_of(d, k, v);
        if (kShares) work.skip(none ? all.end - all.begin : own.begin - all.begin);
        if (!none) work.tile(acc, own);
        if (count == 0) cluster_wait(); // all barriers of the cluster are there
        if (own.no_second) send_half<NT>(acc, d, bar, base, self + 1);
        if (own.no_first) add_half<NT>(acc, d, bar, base);
        if (kShares && !none) work.skip(all.end - own.end);
        if (!d.meet) {
            finish_alone<T, NT, B>(acc, p, d, k, at, turn);
            continue;
        }
        const row_of_sums row = my_row<B>(p.paired, d);
        if (count > 0) barrier_wait(bar.read, (count - 1) % 2);
        send<NT, P>(acc, d, bar, base, rank, self, row);
        finish<T, B, P>(p, d, bar, k, base, rank, at, count, row, turn);
        __syncwarp();
        if (at + d.stride <= k.last && threadIdx.x % 32 < d.cluster)
            remote_arrive(remote_address(bar.read, self + threadIdx.x % 32));
    }
    if (kShares && count == 0) cluster_wait();
#endif
}

// --- Launch -------------------------------------------------------------------------------------

__host__ __device__ constexpr int room(int groups) { return (groups == 2 ? 113 : 226) * 1024; }

// About how many ns a problem takes: `rounds` tiles a cluster, of each a CTA multiplies so many
// units of 64 rows of W. Measured on an H200 with W4. Of CTAs that have half an SM two find a
// place there before other SMs are used. Sums and the ends of a tile come on top.
template <int F, int NT, int B, int P> int64_t cost(const division &d, int rounds, int64_t units) {
    constexpr bool half = B * P == 2;
    int64_t unit = half ? NT == 64 ? 118 : 90 : NT == 64 ? 108 : 88;
    if (unit < 512 * linear_code_bits(F) / 30)
        unit = 512 * linear_code_bits(F) / 30; // 30 bytes a ns and SM
    if (half) unit *= 2;
    const int64_t meet = half ? NT == 64 ? 5000 : 4200 : NT == 64 ? 6500 : 5000;
    return units * unit + rounds * (d.meet ? meet : 3000);
}

// Among clusters of `size`, at most `most` of them at once, or with `share` halves of blocks a CTA;
// no stages when there is no room.
template <int F, int NT, int B, int P, int G>
division divide(const linear_args *a, int size, int most, int share) {
    constexpr int U = step_units(F, B, P), code = B * U * 512 * linear_code_bits(F);
    division d = {};
    d.cluster = size;
    d.per = a->paired ? B / 2 : B;
    d.all = a->paired ? a->half_blocks : a->blocks;
    d.tiles = (d.all + d.per - 1) / d.per;
    d.steps = (a->units + U - 1) / U;
    d.x_whole = a->k % 64 == 0;
    d.x_rows = (a->m + 7) / 8 * 8;
    d.share = share;
    const int rounds = share ? (share + 2 * d.per - 1) / (2 * d.per) : (d.tiles + most - 1) / most;
    d.clusters = share ? (2 * d.all + share - 1) / share : (d.tiles + rounds - 1) / rounds;
    d.stride = share ? d.per : d.clusters * d.per;
    d.meet = size > 1 || P > 1 || a->paired;
    d.groups = (a->m + 7) / 8;
    d.w_stage = (code + B * step_granules(F, B, P, G) * a->granule_bytes + 127) / 128 * 128;
    const int x_stage = x_units(F, NT, B, P) * NT * 128,
              dealt = 4 * B / (a->paired ? 2 : 1) * d.groups, each = (dealt + size - 1) / size,
              sums = d.meet ? each * (a->paired ? 2 : 1) * size * P * 512 : 0;
    const int turn = 4 * B * P * LINEAR_STAGE_FLOATS * 4, bars = 2 * kStagesMost * 16 + 24;
    const int half = share % 2 ? 4 * (NT / 8) * 512 : 0;
    const int left = room(B * P) - 1024 - sums - half - turn - bars;
    const int steps = (d.steps + size - 1) / size;
    // As many steps of x as of W; of what half an SM has room for x gets less, since W comes from
    // further away.
    constexpr int kBoxes = U / x_units(F, NT, B, P);
    const int both = d.w_stage + kBoxes * x_stage;
    d.x_stages = B * P == 2 ? left * 45 / 100 / x_stage : left / both * kBoxes;
    if (d.x_stages < 2) d.x_stages = 2;
    if (d.x_stages > 8) d.x_stages = 8;
    d.w_stages = (left - d.x_stages * x_stage) / d.w_stage;
    if (d.w_stages > kStagesMost) d.w_stages = kStagesMost;
    if (d.w_stages > rounds * steps) d.w_stages = rounds * steps;
    if (left - d.x_stages * x_stage < d.w_stage) d.w_stages = 0;
    if (B * P == 4 && d.x_stages < 8) d.x_stages = (left - d.w_stages * d.w_stage) / x_stage;
    if (d.x_stages > 8) d.x_stages = 8;
    for (int i = 0; i < dealt; i++) d.sums[i % size] += (a->paired ? 2 : 1) * size * P * 512;
    d.at_w = d.x_stages * x_stage;
    d.at_sums = d.at_w + d.w_stages * d.w_stage;
    d.at_half = d.at_sums + sums;
    d.at_turn = d.at_half + half;
    d.at_bars = d.at_turn + turn;
    d.bytes = d.at_bars + bars + 1024;
    const int64_t halves = share ? share : 2 * rounds * B;
    d.cost = cost<F, NT, B, P>(d, rounds, steps * U * halves / 2);
    if (share && (!has_shares(F, B, P) || a->paired || d.steps < 2 || d.w_stages < 2))
        d.w_stages = 0;
    return d;
}

// A tensor of `dims` dimensions, the innermost first; strides in bytes, of the second and on.
struct tensor {
    const void *at;
    CUtensorMapDataType type;
    CUtensorMapSwizzle swizzle;
    int dims;
    cuuint64_t size[4], stride[3];
    cuuint32_t box[4];
};

status encode(CUtensorMap *map, const tensor &t) {
    tensor_map_encode function;
    TRY(tensor_map_encoder(&function));
    const cuuint32_t every[4] = {1, 1, 1, 1};
    const CUresult r =
        function(map, t.type, (cuuint32_t)t.dims, const_cast<void *>(t.at), t.size, t.stride, t.box,
                 every, CU_TENSOR_MAP_INTERLEAVE_NONE, t.swizzle,
                 CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
    return r == CUDA_SUCCESS ? ST_OK : FAIL(ST_DEVICE, "tensor map: error %d", (int)r);
}

template <int F, int NT, int B, int P, int G>
status encode_all(maps *m, const linear_args *a, const division &d, bool bf16) {
    constexpr int U = step_units(F, B, P), kRows = linear_code_bits(F) / 4; // rows of 2 KB a unit
    const cuuint64_t halves = a->paired ? 2 : 1, blocks = a->paired ? a->half_blocks : a->blocks;
    const cuuint32_t at_once = a->paired ? B / 2 : B;
    const cuuint64_t block = (cuuint64_t)a->units * kRows * 2048;
    TRY(encode(&m->code, {a->code,
                          CU_TENSOR_MAP_DATA_TYPE_FLOAT64,
                          CU_TENSOR_MAP_SWIZZLE_NONE,
                          4,
                          {256, (cuuint64_t)a->units * kRows, blocks, halves},
                          {2048, block, block * blocks},
                          {256, U * kRows, at_once, (cuuint32_t)halves}}));
    const cuuint64_t granule = (cuuint64_t)a->granule_bytes;
    if (G)
        TRY(encode(&m->scale, {a->scale,
                               CU_TENSOR_MAP_DATA_TYPE_FLOAT64,
                               CU_TENSOR_MAP_SWIZZLE_NONE,
                               4,
                               {granule / 8, (cuuint64_t)a->granules, blocks, halves},
                               {granule, granule * a->granules, granule * a->granules * blocks},
                               {(cuuint32_t)granule / 8, step_granules(F, B, P, G), at_once,
                                (cuuint32_t)halves}}));
    const cuuint64_t row = (cuuint64_t)a->ldx * 2, rows = (cuuint64_t)a->m, k = (cuuint64_t)a->k;
    tensor x = {a->x,
                bf16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16,
                CU_TENSOR_MAP_SWIZZLE_128B,
                3,
                {64, rows, k / 64},
                {row, 128},
                {64, (cuuint32_t)d.x_rows, x_units(F, NT, B, P)}};
    if (k % 64) x.dims = 2, x.size[0] = k;
    return encode(&m->x, x);
}

// One shape of tiles: how it would cut a problem, and its launch.
template <typename T, int F, int NT, int B, int P, int G> struct tiles {
    static cudaLaunchConfig_t config_of(cudaLaunchAttribute *with, int size) {
        with[0].id = cudaLaunchAttributeClusterDimension;
        with[0].val.clusterDim = {(unsigned)size, 1, 1};
        with[1].id = cudaLaunchAttributeProgrammaticStreamSerialization;
        with[1].val.programmaticStreamSerializationAllowed = 1;
        cudaLaunchConfig_t config = {};
        config.blockDim = dim3(128 * B * P + 64);
        config.attrs = with;
        return config;
    }

    static inline int most[kClusterMost + 1]; // clusters that the GPU holds at once

    // No stages in d when nothing fits.
    static status plan(division *d, const linear_args *args, int32_t n_sms) {
        const auto kernel = linear_mid<T, F, NT, B, P, G>;
        cudaError_t e =
            cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, room(B * P));
        *d = {};
        for (int size = 1; size <= kClusterMost && e == cudaSuccess; size++) {
            cudaLaunchAttribute with[2];
            cudaLaunchConfig_t config = config_of(with, size);
            config.gridDim = dim3((unsigned)(n_sms / size * size));
            config.dynamicSmemBytes = room(B * P);
            config.numAttrs = 1;
            if (!most[size]) e = cudaOccupancyMaxActiveClusters(&most[size], kernel, &config);
            if (e != cudaSuccess || !most[size]) break;
            const division other = divide<F, NT, B, P, G>(args, size, most[size], 0);
            if (size > other.steps) break;
            if (other.w_stages && (!d->w_stages || other.cost < d->cost)) *d = other;
        }
        if (e != cudaSuccess) return FAIL(ST_DEVICE, "linear_mid: %s", cudaGetErrorString(e));
        return ST_OK;
    }

    static status run(const division &d, const linear_args *args, kernel_stream stream) {
        maps m = {};
        if (!d.w_stages) return FAIL(ST_UNSUPPORTED, "linear_mid: no room for %d rows", args->m);
        TRY((encode_all<F, NT, B, P, G>(&m, args, d, half_pair<T>::bf16)));
        cudaLaunchAttribute with[2];
        const int size = d.share % 2 ? 2 : d.cluster;
        cudaLaunchConfig_t config = config_of(with, size);
        config.gridDim = dim3((unsigned)((d.clusters * d.cluster + size - 1) / size * size));
        config.dynamicSmemBytes = (size_t)d.bytes;
        config.stream = (cudaStream_t)stream;
        config.numAttrs = 2;
        const cudaError_t e =
            cudaLaunchKernelEx(&config, linear_mid<T, F, NT, B, P, G>, *args, d, m);
        return e == cudaSuccess ? ST_OK : FAIL(ST_DEVICE, "linear_mid: %s", cudaGetErrorString(e));
    }

    // Shares of at least so many halves, as few as all CTAs find a place with at once.
    static status plan_shares(division *d, const linear_args *args, int32_t n_sms, int least) {
        TRY(plan(d, args, n_sms));
        for (int share = least;; share++) {
            *d = divide<F, NT, B, P, G>(args, 1, 1, share);
            if (d->clusters <= (share % 2 ? 2 * most[2] : most[1])) return ST_OK;
        }
    }

    static status launch(const linear_args *args, int32_t n_sms, int32_t, kernel_stream stream) {
        division d;
        TRY(plan(&d, args, n_sms));
        return run(d, args, stream);
    }
    static status launch_shares(const linear_args *args, int32_t n_sms, int32_t,
                                kernel_stream stream) {
        division d;
        TRY(plan_shares(&d, args, n_sms, 1));
        return run(d, args, stream);
    }
};

template <typename T, int F, int NT, int G>
status launch_best(const linear_args *args, int32_t n_sms, int32_t, kernel_stream stream) {
    using half = tiles<T, F, NT, 2, 1, G>;
    using two = tiles<T, F, NT, 2, 2, G>;
    using four = tiles<T, F, NT, 4, 1, G>;
    division a, b, c, shares;
    TRY(half::plan(&a, args, n_sms));
    TRY(two::plan(&b, args, n_sms));
    TRY(four::plan(&c, args, n_sms));
    TRY(four::plan_shares(&shares, args, n_sms, 5)); // of fewer than three blocks warps are idle
    if (shares.w_stages && (!c.w_stages || shares.cost < c.cost)) c = shares;
    if (!a.w_stages || (c.w_stages && c.cost < a.cost && c.cost <= b.cost))
        return four::run(c, args, stream);
    return b.w_stages && b.cost < a.cost ? two::run(b, args, stream) : half::run(a, args, stream);
}

#define T_F16  __half
#define T_BF16 __nv_bfloat16
#define ROW(NAME, F, T, NT, G, LAUNCH)                                                             \
    { NAME, 90, 90, WF_##F, DT_##T, NT, 4, 1, G, G, 1, LAUNCH, NT }
#define ROWS(F, T, NT, G)                                                                          \
    ROW("mid_" #NT, F, T, NT, G, (launch_best<T_##T, WF_##F, NT, G>)),                             \
        ROW("mid_" #NT "x2x1", F, T, NT, G, (tiles<T_##T, WF_##F, NT, 2, 1, G>::launch)),          \
        ROW("mid_" #NT "x2x2", F, T, NT, G, (tiles<T_##T, WF_##F, NT, 2, 2, G>::launch)),          \
        ROW("mid_" #NT "x4x1", F, T, NT, G, (tiles<T_##T, WF_##F, NT, 4, 1, G>::launch)),          \
        ROW("mid_" #NT "shares", F, T, NT, G, (tiles<T_##T, WF_##F, NT, 4, 1, G>::launch_shares)),
const linear_variant rows[] = {MID_INSTANCES(ROWS)};

} // namespace

extern "C" linear_table linear_mid_table(void) {
    return linear_table{rows, (int32_t)(sizeof rows / sizeof rows[0])};
}
