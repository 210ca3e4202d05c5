// linear_mid.cu - y^T = W x^T for 17 to 64 rows of x, on sm_90, by wgmma.
//
// Work is counted in steps: some units of 64 inputs of a tile (B blocks of 64 rows of W; with gate
// and up half of them each). All steps of all tiles are one line, of which each CTA has an equal
// part: the end of a tile, whole ones, the beginning of another, or a piece in the middle of one.
//
// Where there are blocks enough, work is dealt out in rounds instead: of each tile all blocks but
// one (with gate and up, all pairs but one) are the CTA's own, whole, and only what takes the last
// place is cut as such a line. Then few sums travel, and while their CTA multiplies.
//
// Of a CTA's warps
//
//   4 B P multiply: a warpgroup has a block of the tile and, of every step, one of P parts, whose
//       sums meet in shared memory. It turns codes of 32 inputs into A fragments while wgmma
//       multiplies those before with x from shared memory
//   1   has codes and scales brought into a ring. Weights depend on no kernel before this one and
//       are asked for before waiting for it (programmatic dependent launch); at last it asks for
//       what a later launch reads (linear_problem.ahead)
//   1   has x brought into a ring of its own
//
// Everything comes as boxes of the tensor copy engine, as few as can be: a copy costs its thread a
// few hundred cycles beside warps that multiply. What lies past K or the last block comes as zeros,
// so that all steps are alike.
//
// Of a tile that several CTAs share, those whose part of the line ends in it finish it, some groups
// of 8 rows of x each: the others have more to do. Sums travel through L2, in places of the
// workspace that are zero but between a sum's sending and its reading: a sum of zero is sent as -0,
// so each says by itself that it is there. They are added in order of K, so the bits are the same
// on every run. All CTAs of a launch must fit the GPU at once.
//
// x is as many bytes to an SM as W, or twice as many. So where a CTA takes an SM, two are a
// cluster: they go through the same steps of K of two tiles, and each has half of what they need of
// x brought to both. The line is then one of pairs of tiles, cut among pairs of CTAs.
//
// x may be int8 codes in the order of atoms (linear_byte_input) beside W4: A fragments are then
// bytes, code less zero point, and their sums exact int32, which meet the scales of W in f32 and,
// at a tile's end, those of x.
#include "linear_ahead.cuh"
#include "linear_launch.h"
#include "linear_w4a8.cuh"
#include "tensor_map.cuh"

// With four warpgroups a CTA has an SM, with two half of one, so that the next launch's can load
// its weights beside it: for small matrices. Two blocks in two parts are for those of middle size:
// half the sums of four blocks travel, for twice the x.
//
// The explicit lists: format, type, x rows (NT), scale granule (0: none). Of each there are tiles
// of B x P = 2 x 1, 4 x 1 and, of 4 bits, 2 x 2, of some 3 x 1, of which mid_NT takes what should
// be the fastest.
#define MID_ROWS(X, F, T, G) X(F, T, 32, G) X(F, T, 64, G)
#define MID_TYPES(X, F, G)   MID_ROWS(X, F, F16, G) MID_ROWS(X, F, BF16, G)
#ifndef MID_INSTANCES
#define MID_INSTANCES(X)                                                                           \
    MID_TYPES(X, INT4, 128)                                                                        \
    MID_TYPES(X, INT4, 64)                                                                         \
    MID_TYPES(X, INT4, 32)                                                                         \
    MID_TYPES(X, MXFP4, 32)                                                                        \
    MID_TYPES(X, NVFP4, 16)
#endif
#ifndef MID_INSTANCES_3
#define MID_INSTANCES_3(X)                                                                         \
    X(INT4, F16, 64, 128) X(INT4, BF16, 64, 128) X(MXFP4, F16, 64, 32) X(MXFP4, BF16, 64, 32)
#endif
#ifndef MID_INSTANCES_8
#define MID_INSTANCES_8(X)                                                                         \
    MID_TYPES(X, INT8, 0)                                                                          \
    MID_TYPES(X, FP8, 0)                                                                           \
    MID_TYPES(X, FP8B, 128)
#endif

// x as codes.
#ifndef MID_INSTANCES_CODES
#define MID_INSTANCES_CODES(X) MID_TYPES(X, INT4, 128) MID_TYPES(X, INT4, 64)
#endif
#ifndef MID_INSTANCES_CODES_3
#define MID_INSTANCES_CODES_3(X)                                                                   \
    X(INT4, F16, 64, 128) X(INT4, BF16, 64, 128) X(INT4, F16, 64, 64) X(INT4, BF16, 64, 64)
#endif

// For racecheck, which lets nobody past a cluster's barrier before all of its threads wait there.
#ifndef MID_RACECHECK
#define MID_RACECHECK false
#endif

namespace {

enum { kStagesMost = 16, kGiveBytes = 1024 }; // kGiveBytes: of a warp, see exchange

// Beside a weight format (F, f): x is codes.
enum { kCodes = 1 << 8 };
__host__ __device__ constexpr bool of_codes(int f) { return (f & kCodes) != 0; }
__host__ __device__ constexpr int bits_of(int f) { return linear_code_bits(f & ~kCodes); }
// Units of a line of x, which is 128 bytes of a row.
__host__ __device__ constexpr int line_units(int f) { return of_codes(f) ? 2 : 1; }

// Units of K in a step, at least what a scale covers, and in a stage of x: the longer, the fewer
// instructions; the shorter, the sooner is one free.
__host__ __device__ constexpr int step_units(int f, int blocks, int parts) {
    return bits_of(f) == 4 && blocks * parts > 2 ? 4 : 2;
}
__host__ __device__ constexpr int x_units(int f, int rows, int blocks, int parts) {
    return blocks * parts > 2 ? step_units(f, blocks, parts) : rows == 32 || of_codes(f) ? 2 : 1;
}
__host__ __device__ constexpr int x_lines(int f, int rows, int blocks, int parts) { // of a stage
    return x_units(f, rows, blocks, parts) / line_units(f);
}
// Scales meet the sums of a granule, not each weight: fewer instructions, and for 64 rows more
// registers than warps that load leave, so that those give some of theirs.
__host__ __device__ constexpr bool scaled_later(int f, int rows, int blocks, int g) {
    return of_codes(f) || (f == WF_INT4 && g == 128 && (rows == 32 || blocks > 2));
}
__host__ __device__ constexpr bool registers_given(int f, int rows, int blocks, int g) {
    return scaled_later(f, rows, blocks, g) && rows == 64 &&
           (blocks == 4 || (of_codes(f) && blocks == 2));
}
__host__ __device__ constexpr int threads(int f, int rows, int blocks, int parts, int g) {
    return 128 * blocks * parts + (registers_given(f, rows, blocks, g) ? 128 : 64);
}
// Two parts of K in a CTA: of 8 bits they have not been timed.
constexpr bool has_parts(int f) { return bits_of(f) == 4; }
// Tiles of three blocks. Gate and up have none: a block would be without its other.
constexpr bool has_three(int f, int rows, int g) {
    return rows == 64 && (f == WF_MXFP4 || of_codes(f) || (f == WF_INT4 && g == 128));
}
// Granules of a step.
__host__ __device__ constexpr int step_granules(int f, int blocks, int parts, int g) {
    return g ? step_units(f, blocks, parts) * 64 / g : 0;
}

// Plain problems have kernels of their own: K is whole lines of x, halves of W are whole blocks, W
// has no scales but its granules', and sums are what y is, of x's type, or gated by LINEAR_GATED.
// Code that is jumped over costs time: a step of Llama-3.1-8B in W4 at batch 64 2 %. Few: of up to
// kFewRows rows of x, which are multiplied by fewer columns at once; what follows a tile's last
// product is as for 64 of them.
enum kind { kAny, kPlain, kPlainPaired, kFew, kFewPaired };
enum { kFewRows = 48 };
template <int NT, kind kKind> constexpr int kColumns = kKind >= kFew ? kFewRows : NT;
constexpr bool may_be_plain(int f, int g) { return f == WF_INT4 && g == 128; }
constexpr bool may_be_few(int f, int rows, int blocks, int parts, int g) {
    return may_be_plain(f, g) && rows == 64 && blocks * parts > 2;
}
// Whether a tile is of gate and up.
template <kind kKind> __device__ __forceinline__ bool paired_in(const linear_args &p) {
    return kKind == kAny ? p.paired != 0 : kKind == kPlainPaired || kKind == kFewPaired;
}

// How a problem is cut, and where things lie in shared memory (bytes from a multiple of 1024; x
// lies at 0).
struct division {
    int32_t doubled;                     // 1: CTAs are clusters of two; 0: they are not
    int32_t ctas, each, more;            // with steps; of each, one more of the first so many
    int32_t steps;                       // of a tile
    uint32_t by_steps, by_each, by_more; // 2^31 over steps, each and each + 1, rounded up
    int32_t per, all;                    // blocks, or pairs: of a tile; all
    int32_t rounds;                      // tiles that each CTA has whole; 0: all are of the line
    int32_t x_whole;                     // K is whole lines of x: it comes as boxes of several
    int32_t x_rows;                      // of x: those there are, in eights
    int32_t w_stages, x_stages, w_stage; // w_stage: bytes, codes and then scales
    int32_t groups;                      // of 8 rows of x
    int32_t at_w, at_turn, at_bars, at_x_scale, bytes;
    int64_t cost; // about, ns
};

// --- What a CTA has to do -----------------------------------------------------------------------

// Whether CTAs may be clusters of two. What is said of CTAs and tiles of the line is of two of each
// then. W: warps that multiply.
template <int W> constexpr bool kClusters = W > 8;

// This CTA, or its cluster.
template <int W> __device__ __forceinline__ int cta_of(const division &d) {
    if constexpr (!kClusters<W>) return (int)blockIdx.x;
    int cta; // read anew: ptxas makes a slower main loop of one that is kept
    asm volatile("mov.u32 %0, %%ctaid.x;" : "=r"(cta));
    return cta >> d.doubled;
}
// Of the CTAs of cluster i, or of two tiles i, the one that is with this CTA.
template <int W> __device__ __forceinline__ int own_of(const division &d, int i) {
    return kClusters<W> && d.doubled ? i * 2 + (int)blockIdx.x % 2 : i;
}

// The first of a CTA's steps.
__device__ __forceinline__ int first_step(const division &d, int cta) {
    return cta * d.each + min(cta, d.more);
}

// n over what `inverse` is of (division), rounded down: exact while their product is below 2^30.
__device__ __forceinline__ int over(int n, uint32_t inverse) {
    return (int)__umulhi((unsigned)(2 * n + 1), inverse);
}
// The CTA that has a step of the line.
__device__ __forceinline__ int holder(const division &d, int step) {
    const int longer = d.more * (d.each + 1);
    return step < longer ? over(step, d.by_more) : d.more + over(step - longer, d.by_each);
}

// Whether tiles may be dealt out in rounds. (Of FP8B scales of three blocks would lie where no copy
// can go.)
template <int F, int B> constexpr bool kRounds = B == 4 && F != WF_FP8B;

// Where a CTA is, or, with rounds, those of its warps that have whole tiles: the steps left, the
// tile and the step of it.
template <int W> struct place {
    int left, tile, step;
    __device__ __forceinline__ explicit place(const division &d, bool whole = false) {
        const int cta = whole ? (int)blockIdx.x : cta_of<W>(d);
        const int begin = whole ? cta * d.rounds * d.steps : first_step(d, cta);
        left = whole ? d.rounds * d.steps : cta < d.ctas ? first_step(d, cta + 1) - begin : 0;
        tile = over(begin, d.by_steps);
        step = begin - tile * d.steps;
    }
    __device__ __forceinline__ int piece(const division &d) const { // steps of the tile at hand
        return min(left, d.steps - step);
    }
    __device__ __forceinline__ void next(const division &d, int steps) {
        left -= steps, step += steps;
        if (step == d.steps) step = 0, tile++;
    }
};

// The CTAs that share this CTA's last tile: `n` from `first` on, of which the first `ends` have
// their last step in it. `finish` of these finish it: 1, 2 or 4.
struct sharers {
    int first, n, ends, finish;
    __device__ __forceinline__ sharers(const division &d, int cta, int most) {
        const int begin = over(first_step(d, cta + 1) - 1, d.by_steps) * d.steps;
        const int end = begin + d.steps, last = holder(d, end - 1);
        first = holder(d, begin);
        n = last - first + 1;
        ends = first_step(d, last + 1) == end ? n : n - 1;
        finish = ends >= 4 && most >= 4 ? 4 : ends >= 2 && most >= 2 ? 2 : 1;
    }
};

// With rounds: whether a warpgroup has whole tiles, not a part of the line.
template <kind kKind>
__device__ __forceinline__ bool has_whole(const linear_args &p, const division &d, int wg) {
    return (paired_in<kKind>(p) ? wg / 2 : wg) < d.per;
}

// With rounds: the first block of the line, or pair of blocks.
__device__ __forceinline__ int line_of(const division &d) {
    return (d.ctas << d.doubled) * d.rounds * d.per;
}

// Block of warpgroup wg, or one past the last. With rounds those of the line come after the others.
template <int W, bool kMay, kind kKind>
__device__ __forceinline__ int32_t block_of(const linear_args &p, const division &d, int tile,
                                            int wg) {
    const int32_t v =
        !kMay || !d.rounds ? own_of<W>(d, tile) * d.per + (paired_in<kKind>(p) ? wg / 2 : wg)
        : has_whole<kKind>(p, d, wg) ? tile * d.per + (paired_in<kKind>(p) ? wg / 2 : wg)
                                     : line_of(d) + own_of<W>(d, tile);
    if (v >= d.all) return p.blocks;
    return paired_in<kKind>(p) ? v + wg % 2 * p.half_blocks : v;
}

// A ring of stages: where the next one is, and how often the ring went round.
struct ring {
    uint32_t full, empty; // barriers, one a stage; with rounds, those who have whole tiles
    int stages, stage, parity;
    __device__ __forceinline__ void next() {
        if (++stage == stages) stage = 0, parity ^= 1;
    }
    __device__ __forceinline__ void wait_full() const { barrier_wait(full + stage * 8, parity); }
    __device__ __forceinline__ void wait_empty() const {
        barrier_wait(empty + stage * 8, parity ^ 1);
    }
    // With rounds, those who have parts of the line.
    __device__ __forceinline__ uint32_t others() const { return empty + stages * 8; }
    __device__ __forceinline__ void wait_others() const {
        barrier_wait(others() + stage * 8, parity ^ 1);
    }
    // With clusters: whether a stage of the other CTA is free.
    __device__ __forceinline__ uint32_t free() const { return empty + stages * 16; }
};

// With more than two blocks a stage of W and one of x are a step each, and one ring: fewer
// instructions.
template <int B> constexpr bool kOneRing = B > 2;
struct barriers {
    ring w, x;
};
template <int B> __device__ __forceinline__ barriers barriers_of(const division &d, uint32_t base) {
    const uint32_t at = base + d.at_bars, at_x = at + (kOneRing<B> ? 0 : d.w_stages * 16);
    return barriers{{at, at + d.w_stages * 8, d.w_stages, 0, 0},
                    {at_x, at_x + d.x_stages * 8, d.x_stages, 0, 0}};
}

// --- Loading ------------------------------------------------------------------------------------

// Tensor maps: codes [half][block][unit, in rows of 2 KB][2 KB], scales [half][block][granule]
// [bytes], x [lines][rows][128 bytes] or, where K ends within a line, [rows][K].
struct maps {
    CUtensorMap code, scale, x, code_one, scale_one; // with rounds, also of one block or pair
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

// A box of x to the same place of both CTAs of a cluster; each has its barrier told.
__device__ __forceinline__ void copy_box_twice(uint32_t to, const CUtensorMap *map, int x, int y,
                                               int z, uint32_t bar, uint64_t policy) {
    asm volatile(
        "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes"
        ".multicast::cluster.L2::cache_hint [%0], [%1, {%2, %3, %4}], [%5], %6, %7;" ::"r"(to),
        "l"(map), "r"(x), "r"(y), "r"(z), "r"(bar), "h"((uint16_t)3), "l"(policy)
        : "memory");
}

// With rounds: of all blocks a CTA goes through K from where its part of the line begins, so that
// the part is multiplied first.
template <int W> struct walk {
    place<W> whole, part; // part.step: that of both
    int more;             // steps of the part whose stages are not known to be free again
    __device__ __forceinline__ explicit walk(const division &d, const ring &to)
        : whole(d, true), part(d), more(part.left + to.stages) {}
    __device__ __forceinline__ void wait(const ring &to) {
        to.wait_empty();
        if (more-- > 0) to.wait_others();
    }
    __device__ __forceinline__ void next(const division &d) {
        whole.left--;
        part.next(d, 1);
        if (whole.left % d.steps == 0) whole.tile++;
    }
};

// Stages of W that are asked for and not there, until the ring is full for once: with all of them
// the first of x would come last.
__host__ __device__ constexpr int asked_at_once(int f, int blocks) {
    return blocks > 2 && bits_of(f) == 4 ? 1 : 2;
}

// With rounds: codes and scales of all steps, by one thread.
template <int F, int B, int P, int G, kind kKind>
__device__ __forceinline__ void load_rounds(const linear_args &p, const division &d, const maps &m,
                                            ring to, uint32_t base) {
    constexpr int W = 4 * B * P, U = step_units(F, B, P), unit = 512 * bits_of(F);
    constexpr int kRows = U * bits_of(F) / 4, kGranules = step_granules(F, B, P, G);
    const int scales = kGranules * p.granule_bytes, halves = paired_in<kKind>(p) ? 2 : 1;
    const uint64_t policy = policy_evict_first();
    const int line = line_of(d);
    constexpr int kAsked = asked_at_once(F, B);
    int asked = 0;
#pragma unroll 1
    for (walk<W> i(d, to); i.whole.left > 0; i.next(d), to.next()) {
        const uint32_t full = to.full + to.stage * 8, stage = base + d.at_w + to.stage * d.w_stage;
        const bool part = i.part.left > 0;
        i.wait(to);
        if (asked >= kAsked && asked < to.stages) barrier_wait(full - kAsked * 8, 0);
        asked++;
        barrier_arrive_expect(full, (part ? B : d.per * halves) * (U * unit + scales));
        const int at = i.part.step;
        copy_box<4>(stage, &m.code, 0, at * kRows, i.whole.tile * d.per, 0, full, policy);
        if (G)
            copy_box<4>(stage + B * U * unit, &m.scale, 0, at * kGranules, i.whole.tile * d.per, 0,
                        full, policy);
        if (!part) continue;
        const int behind = d.per * halves;
        copy_box<4>(stage + behind * U * unit, &m.code_one, 0, at * kRows,
                    line + own_of<W>(d, i.part.tile), 0, full, policy);
        if (G)
            copy_box<4>(stage + B * U * unit + behind * scales, &m.scale_one, 0, at * kGranules,
                        line + own_of<W>(d, i.part.tile), 0, full, policy);
    }
}

// Codes and scales of all steps, by one thread.
template <int F, int B, int P, int G, kind kKind>
__device__ __forceinline__ void load_weights(const linear_args &p, const division &d, const maps &m,
                                             ring to, uint32_t base) {
    constexpr int W = 4 * B * P, U = step_units(F, B, P);
    constexpr int code = B * U * 512 * bits_of(F);
    constexpr int kRows = U * bits_of(F) / 4, kGranules = step_granules(F, B, P, G);
    constexpr int kAsked = asked_at_once(F, B);
    const int bytes = code + B * kGranules * p.granule_bytes;
    const uint64_t policy = policy_evict_first();
    int asked = 0;
#pragma unroll kClusters < W> || kKind != kAny ? 1 : 4
    for (place<W> i(d); i.left > 0; i.next(d, 1), to.next()) {
        const uint32_t full = to.full + to.stage * 8, stage = base + d.at_w + to.stage * d.w_stage;
        const int v = own_of<W>(d, i.tile) * d.per;
        to.wait_empty();
        if (asked >= kAsked && asked < to.stages) barrier_wait(full - kAsked * 8, 0);
        asked++;
        barrier_arrive_expect(full, bytes);
        copy_box<4>(stage, &m.code, 0, i.step * kRows, v, 0, full, policy);
        if (G) copy_box<4>(stage + code, &m.scale, 0, i.step * kGranules, v, 0, full, policy);
    }
}

// x of all steps, by one thread; scales of codes beside the first.
template <int F, int NT, int B, int P, kind kKind>
__device__ __forceinline__ void load_inputs(const linear_args &p, const division &d, const maps &m,
                                            ring to, uint32_t base) {
    constexpr int W = 4 * B * P, L = x_lines(F, NT, B, P);
    constexpr int kBoxes = step_units(F, B, P) / x_units(F, NT, B, P), kStage = L * NT * 128;
    const bool doubled = kClusters<W> && d.doubled;
    const uint64_t policy = policy_evict_normal();
    place<W> i(d);
    // Of a cluster each has half of a stage brought to both, when it is free in both.
    const uint32_t own = doubled ? blockIdx.x % 2 : 0;
    const uint32_t others_free = doubled ? remote_address(to.free(), own ^ 1) : 0;
    bool first = of_codes(F);
    const auto expect = [&](uint32_t full) {
        const int scales = first ? d.x_rows * 4 : 0;
        barrier_arrive_expect(full, L * d.x_rows * 128 + scales);
        if (first) copy_bulk(base + d.at_x_scale, p.x_scale, scales, full, policy);
        first = false;
    };
    const auto bring = [&](int at, uint32_t stage, uint32_t full) {
        if (!doubled) {
            copy_box<3>(stage, &m.x, 0, 0, at, 0, full, policy);
            return;
        }
        remote_arrive(others_free + to.stage * 8);
        barrier_wait(to.free() + to.stage * 8, to.parity);
        copy_box_twice(stage + own * (L / 2 * d.x_rows * 128), &m.x, 0, 0, at + own * (L / 2), full,
                       policy);
    };
    wait_for_previous();
    if (kRounds<F, B> && d.rounds) {
#pragma unroll 1
        for (walk<W> j(d, to); j.whole.left > 0; j.next(d), to.next()) {
            const uint32_t full = to.full + to.stage * 8;
            j.wait(to);
            expect(full);
            bring(j.part.step * L, base + to.stage * kStage, full);
        }
        return;
    }
    for (; i.left > 0; i.next(d, 1))
        for (int box = i.step * kBoxes; box < (i.step + 1) * kBoxes; box++, to.next()) {
            const uint32_t full = to.full + to.stage * 8, stage = base + to.stage * kStage;
            to.wait_empty();
            expect(full);
            if (kKind != kAny || d.x_whole)
                bring(box * L, stage, full);
            else
                for (int u = 0; u < L; u++)
                    copy_tile(stage + u * d.x_rows * 128, &m.x,
                              (box * L + u) * (of_codes(F) ? 128 : 64), 0, full);
        }
}

// Threads 0 and 32 of those that load.
template <int F, int NT, int B, int P, int G, kind kKind>
__device__ __forceinline__ void load(const linear_args &p, const division &d, const maps &m,
                                     const barriers &bar, uint32_t base, int thread) {
    if (kClusters<4 * B * P> && !MID_RACECHECK && d.doubled && thread / 32 == 1)
        cluster_wait(); // the other's barriers are there
    if (kRounds<F, B> && d.rounds && thread == 0)
        load_rounds<F, B, P, G, kKind>(p, d, m, bar.w, base);
    else if (thread == 0)
        load_weights<F, B, P, G, kKind>(p, d, m, bar.w, base);
    else if (thread == 32)
        load_inputs<F, NT, B, P, kKind>(p, d, m, bar.x, base);
}

// --- Multiplying --------------------------------------------------------------------------------

template <typename T, int F, int NT, int B, int P, int G, kind kKind> struct multiplier {
    static constexpr int U = step_units(F, B, P), bits = bits_of(F), unit = 512 * bits;
    static constexpr int Q = kColumns<NT, kKind>; // of a product, and of acc those that are not 0
    static constexpr bool wide = bits == 8;       // two chunks of 16 bytes a unit, not one
    static constexpr bool kLater = scaled_later(F, NT, B, G), kOne = kOneRing<B>;
    static constexpr bool folded = dequant_unfold<T, F>() != 1.f;
    // What sums are too small by.
    static constexpr float mend = kLater ? dequant_factor<T, F>() : dequant_unfold<T, F>();
    const linear_args &p;
    const division &d;
    barriers &bar;
    uint32_t code, scale, x; // this lane's places in the first stages; x: low half of a descriptor
    int at_scale;

    __device__ __forceinline__ void begin(uint32_t base) {
        const int wg = threadIdx.x / 128, strip = threadIdx.x / 32 % 4, lane = threadIdx.x % 32;
        const int b = wg % B, at = paired_in<kKind>(p) && !(kRounds<F, B> && d.rounds)
                                       ? b % 2 * (B / 2) + b / 2
                                       : b; // place in a stage
        const int first = wg / B * (U / P); // unit of a step
        code = base + d.at_w + (at * U + first) * unit + strip * (unit / 4) + lane * 16;
        scale =
            base + d.at_w + B * U * unit +
            (at * step_granules(F, B, P, G) + (G ? first * 64 / (G ? G : 1) : 0)) * p.granule_bytes;
        at_scale = strip * 16 + lane / 4 * 2;
        // From one lane, so that the compiler knows it for uniform: descriptors are.
        x = __shfl_sync(~0u, (base + first / line_units(F) * d.x_rows * 128) >> 4 | 1u << 16, 0);
        // Opaque, lest they be computed anew for every unit.
        asm volatile("" : "+r"(code), "+r"(scale), "+r"(at_scale));
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
                    at_scale, p.sym);
                if (kLater) dequant_unpack<F>(later, raw);
                rows = dequant_rows_of<T, F, folded>(raw);
            }
            dequant_word<T, F, !kLater, folded>(
                a[i], reinterpret_cast<const uint32_t *>(&chunk) + (wide ? i : j) * (bits / 4),
                dequant_scales_of(rows));
        }
    }

    // This warpgroup's sums: 32 inputs, or 64 where there are registers for it, are converted while
    // those before are multiplied.
    __device__ __forceinline__ void tile(float (&acc)[NT / 2], int steps) {
        constexpr int N = U / P, XU = P > 1 ? N : x_units(F, NT, B, P);
        constexpr int x_stage = x_lines(F, NT, B, P) * NT * 128;
        const bool leader = threadIdx.x % 32 == 0;
        constexpr int H = kLater && NT == 32 && B == 4 ? 2 : 1; // of 32
        uint32_t a[2][H][2][4];
        float part[kLater ? Q / 2 : 1] = {}, scale_of[2] = {}, later[2]; // of a granule
        const auto add_part = [&]() {
            group_wait<0>();
            group_pin(part);
#pragma unroll
            for (int i = 0; i < Q / 2 && kLater; i++)
                acc[i] = fmaf(part[i], scale_of[i / 2 % 2], acc[i]);
        };
        ring &from = kOne ? bar.w : bar.x;
        int last = -1; // stage of x that a wgmma in flight may read
        for (; steps > 0; steps--) {
            bar.w.wait_full();
            const uint32_t code_at = code + bar.w.stage * d.w_stage;
            const uint32_t scale_at = scale + bar.w.stage * d.w_stage;
            uint64_t x_at = 0; // of the unit at hand
            dequant_rows rows;
            uint4 chunk;
            const auto load = [&](int u, int h) {
                chunk = shared_u128(code_at + u * unit + (wide ? h * 512 : 0));
            };
            load(0, 0);
#pragma unroll
            for (int u = 0; u < N; u++)
#pragma unroll
                for (int h = 0; h < 2; h += H) {
                    uint32_t(&of)[H][2][4] = a[H == 1 ? h : u % 2];
#pragma unroll
                    for (int i = 0; i < H; i++)
                        convert(of[i], rows, later, u, h + i, chunk, scale_at);
                    if (h + H == 2 && u + 1 < N) load(u + 1, 0);
                    if (h == 0 && wide) load(u, 1);
                    if (!kOne && u == N - 1 && h + H == 2) { // the stage has been read
                        __syncwarp();
                        if (leader) barrier_arrive(bar.w.empty + bar.w.stage * 8);
                        bar.w.next();
                    }
                    const bool fresh = h == 0 && u % XU == 0;
                    if (fresh) {
                        if (!kOne) from.wait_full();
                        x_at = group_descriptor_low(
                            __shfl_sync(~0u, x + from.stage * (x_stage / 16), 0));
                    } else if (h == 0) {
                        x_at += (uint32_t)d.x_rows * 8;
                    }
                    if (kLater && u % 2 == 0 && h == 0) {
                        add_part();
                        scale_of[0] = later[0], scale_of[1] = later[1];
                    }
                    group_fence();
#pragma unroll
                    for (int i = 0; i < 2 * H; i++) {
                        const uint64_t to = x_at + (2 * h + i) * 2;
                        if constexpr (!kLater)
                            multiply_group<T, Q>::run(acc, of[i / 2][i % 2], to);
                        else if (u % 2 == 0 && h == 0 && i == 0)
                            multiply_group<T, Q>::run_fresh(part, of[i / 2][i % 2], to);
                        else
                            multiply_group<T, Q>::run(part, of[i / 2][i % 2], to);
                    }
                    group_commit();
                    group_wait<1>();
                    if (fresh) {
                        if (last >= 0 && leader) barrier_arrive(from.empty + last * 8);
                        last = from.stage;
                        from.next();
                    }
                }
        }
        if (kLater) add_part();
        group_wait<0>();
        group_pin(reinterpret_cast<float(&)[Q / 2]>(acc));
#pragma unroll
        for (int i = 0; i < Q / 2 && mend != 1.f; i++) acc[i] *= mend;
        if (last >= 0 && leader) barrier_arrive(from.empty + last * 8);
    }

    // The same where x is codes: 32 or 64 inputs become bytes while those before are multiplied.
    //
    // Sums T_g of granules 1 .. g, of kChain inputs at most, are int32 that begin at M = 1.5 2^23
    // as float bits: below 2^22 either way the register is the float M + T_g without a conversion.
    // Granule g adds (s_g - s_g+1) (M + T_g), where s of what lies before the first and behind the
    // last is zero. That leaves sum s_g (T_g - T_g-1), and of M, - M s_g+1 behind granule g, which
    // is exact, and nothing at last. Sums round to half of s_g beside M s_g: an error of 0.3 s_g a
    // granule (rms), where rounding x to codes made one of 0.3 s_g root(sum of (code - zero)^2).
    __device__ __forceinline__ void tile_of_codes(float (&acc)[NT / 2], int steps) {
        constexpr int N = U / P, XU = P > 1 ? N : x_units(F, NT, B, P), kUnits = G / 64;
        constexpr int x_stage = x_lines(F, NT, B, P) * NT * 128;
        constexpr int kChain = 2048, kOf = kChain / 64 / N;     // |code - zero| < 16: kOf steps
        constexpr int H = NT == 64 && P == 1 && B != 3 ? 1 : 2; // of 32 inputs, as registers go
        const bool leader = threadIdx.x % 32 == 0;
        uint32_t a[2][H][4];
        int32_t part[NT / 2];
        dequant_packed scales = {}, later; // of the granule being multiplied, of that at hand
        const auto add_part = [&](const dequant_packed &next) {
            float scale[2], then[2];
            dequant_unpack<WF_INT4>(scale, scales);
            dequant_unpack<WF_INT4>(then, next);
            scale[0] -= then[0], scale[1] -= then[1];
            group_wait<0>();
            group_pin(part);
#pragma unroll
            for (int i = 0; i < NT / 2; i++)
                acc[i] = fmaf(__int_as_float(part[i]), scale[i / 2 % 2], acc[i]);
        };
        ring &from = kOne ? bar.w : bar.x;
        int last = -1; // stage of x that a wgmma in flight may read
        while (steps > 0) {
            const int end = steps > kOf ? steps - kOf : 0;
#pragma unroll
            for (int i = 0; i < NT / 2; i++) part[i] = NIBBLE_START;
            scales.scale = 0;
            for (; steps > end; steps--) {
                bar.w.wait_full();
                const uint32_t code_at = code + bar.w.stage * d.w_stage;
                const uint32_t scale_at = scale + bar.w.stage * d.w_stage;
                uint64_t x_at = 0; // of the line at hand
                uint32_t offset[2];
                uint4 chunk = shared_u128(code_at);
#pragma unroll
                for (int u = 0; u < N; u++)
#pragma unroll
                    for (int h = 0; h < 2; h += H) {
                        uint32_t(&of)[H][4] = a[H == 1 ? h : u % 2];
                        const bool granule = h == 0 && u % kUnits == 0;
                        if (granule) {
                            dequant_load_packed<WF_INT4>(
                                later, scale_at + u / kUnits * p.granule_bytes, at_scale, p.sym);
                            nibble_offsets(offset, later);
                        }
#pragma unroll
                        for (int i = 0; i < H; i++) {
                            nibble_codes(of[i][0], of[i][1], h + i ? chunk.z : chunk.x, offset);
                            nibble_codes(of[i][2], of[i][3], h + i ? chunk.w : chunk.y, offset);
                        }
                        if (h + H == 2 && u + 1 < N) chunk = shared_u128(code_at + (u + 1) * unit);
                        const bool fresh = h == 0 && u % XU == 0;
                        if (fresh) {
                            if (!kOne) from.wait_full();
                            x_at = group_descriptor_low(
                                __shfl_sync(~0u, x + from.stage * (x_stage / 16), 0));
                        } else if (h == 0 && u % 2 == 0) {
                            x_at += (uint32_t)d.x_rows * 8;
                        }
                        if (granule) {
                            add_part(later);
                            scales = later;
                        }
                        group_fence();
#pragma unroll
                        for (int i = 0; i < H; i++)
                            multiply_nibbles<NT>::run(part, of[i], x_at + (u % 2 * 2 + h + i) * 2);
                        group_commit();
                        if (!kOne && u == N - 1 && h + H == 2) { // read; sooner, ptxas would take
                            __syncwarp();                        // wgmma apart
                            if (leader) barrier_arrive(bar.w.empty + bar.w.stage * 8);
                            bar.w.next();
                        }
                        group_wait<1>();
                        if (fresh) {
                            if (last >= 0 && leader) barrier_arrive(from.empty + last * 8);
                            last = from.stage;
                            from.next();
                        }
                    }
            }
            add_part(dequant_packed{});
        }
        if (last >= 0 && leader) barrier_arrive(from.empty + last * 8);
    }
};

// Sums of codes times the scales of their rows of x, which lie at `at`.
template <int N> __device__ __forceinline__ void scale_rows(float (&acc)[N], uint32_t at) {
    at += linear_thread_anew() % 4 * 8;
#pragma unroll
    for (int j = 0; j < N / 4; j++) {
        const uint2 two = shared_u64(at + j * 32);
#pragma unroll
        for (int e = 0; e < 4; e++) acc[4 * j + e] *= __uint_as_float(e % 2 ? two.y : two.x);
    }
}

// --- Ends of tiles ------------------------------------------------------------------------------

// Where the block of this warp goes; of a pair, that of gate. R: rows of x that a warp has.
struct target {
    int32_t block, col; // col: of its strip's first output
    int32_t group;      // its first of 8 rows of x
    bool there;
};
template <int R, int B, int P, bool kMay, kind kKind>
__device__ __forceinline__ target target_of(const linear_args &p, const division &d, int tile) {
    // Read anew where registers are short; elsewhere ptxas makes a slower main loop of that.
    const int thread = kKind != kAny || P > 1 ? linear_thread_anew() : threadIdx.x;
    const int wg = thread / 128 % B, strip = thread / 32 % 4;
    const int32_t block =
        block_of<4 * B * P, kMay, kKind>(p, d, tile, paired_in<kKind>(p) ? wg & ~1 : wg);
    const int32_t half = kKind == kAny && !paired_in<kKind>(p) && block >= p.half_blocks ? 1 : 0;
    const int32_t in_half = (block - half * p.half_blocks) * 64 + strip * 16;
    return target{block, half * p.half_rows + in_half, P > 1 ? thread / (128 * B) * (R / 8) : 0,
                  block < p.blocks && (kKind != kAny || in_half < p.half_rows)};
}

// Two warps exchange four sums of each lane. `give` is this one's place, `away` bytes from it is
// the other's; `turn` counts exchanges: places are taken in turn, so that one barrier is enough.
__device__ __forceinline__ float4 exchange(const float (&v)[4], uint32_t give, int away, int turn,
                                           int barrier) {
    give += turn % 2 * 512;
    asm volatile("st.shared.v4.f32 [%0], {%1, %2, %3, %4};" ::"r"(give), "f"(v[0]), "f"(v[1]),
                 "f"(v[2]), "f"(v[3])
                 : "memory");
    asm volatile("barrier.sync %0, 64;" ::"r"(barrier) : "memory");
    const uint4 got = shared_u128(give + away);
    return make_float4(__uint_as_float(got.x), __uint_as_float(got.y), __uint_as_float(got.z),
                       __uint_as_float(got.w));
}

// Of two parts of K one warp adds up the first half of the rows, one the second.
template <int NT, int B>
__device__ __forceinline__ void add_parts(float (&sum)[NT / 4], const float (&acc)[NT / 2],
                                          uint32_t give) {
    const int warp = threadIdx.x / 32, part = warp / (4 * B);
#pragma unroll
    for (int j = 0; j < NT / 16; j++) {
        float v[4];
#pragma unroll
        for (int e = 0; e < 4; e++) {
            v[e] = part ? acc[4 * j + e] : acc[4 * j + NT / 4 + e];
            sum[4 * j + e] = part ? acc[4 * j + NT / 4 + e] : acc[4 * j + e];
        }
        const float4 w = exchange(v, give, (part ? -4 : 4) * B * kGiveBytes, j, 8 + warp % (4 * B));
        sum[4 * j] += w.x, sum[4 * j + 1] += w.y, sum[4 * j + 2] += w.z, sum[4 * j + 3] += w.w;
    }
}

// Where sums meet: [CTA][its first piece, its last][warp][group][lane][4].
template <int R, int W>
__device__ __forceinline__ float4 *meeting(const linear_args &p, const division &d, int cta,
                                           int last, int warp) {
    return reinterpret_cast<float4 *>(p.sums) +
           ((own_of<W>(d, cta) * 2 + last) * W + warp) * (R / 8 * 32) + threadIdx.x % 32;
}
__device__ __forceinline__ void put_meeting(float4 *at, const float *v) {
    asm volatile("st.relaxed.gpu.global.v4.f32 [%0], {%1, %2, %3, %4};" ::"l"(at), "f"(v[0]),
                 "f"(v[1]), "f"(v[2]), "f"(v[3])
                 : "memory");
}
__device__ __forceinline__ void get_meeting(float *v, const float4 *at) {
    asm volatile("ld.relaxed.gpu.global.v4.f32 {%0, %1, %2, %3}, [%4];"
                 : "=f"(v[0]), "=f"(v[1]), "=f"(v[2]), "=f"(v[3])
                 : "l"(at)
                 : "memory");
}
__device__ __forceinline__ bool is_there(const float *v) {
    return __float_as_uint(v[0]) && __float_as_uint(v[1]) && __float_as_uint(v[2]) &&
           __float_as_uint(v[3]);
}

// The sums of a piece that are for others to finish: all where the CTA goes on to another tile.
template <int R, int W>
__device__ __forceinline__ void send(const float (&acc)[R / 2], const linear_args &p,
                                     const division &d, int groups, bool last, const sharers &by) {
    const int own = cta_of<W>(d) - by.first, warp = threadIdx.x / 32;
    float4 *to = meeting<R, W>(p, d, cta_of<W>(d), last, warp);
#pragma unroll
    for (int j = 0; j < R / 8; j++) {
        float v[4];
#pragma unroll
        for (int i = 0; i < 4; i++) v[i] = acc[4 * j + i] == 0.f ? -0.f : acc[4 * j + i];
        if (j < groups && !(last && (j & (by.finish - 1)) == own)) put_meeting(to + j * 32, v);
    }
}

// What a lane's sums of outputs g and g + 8 of its strip are multiplied with and what is added; of
// plain problems nothing.
template <kind kKind> struct terms {
    float scale[2], bias[2];
    template <typename T>
    __device__ __forceinline__ void read(const linear_args &p, int32_t block, int32_t col) {
        if (kKind != kAny) return;
        const int thread = linear_thread_anew(), g = thread % 32 / 4, strip = thread / 32 % 4;
#pragma unroll
        for (int i = 0; i < 2; i++) {
            scale[i] = 1.f, bias[i] = 0.f;
            if (p.channel) scale[i] = p.channel[block * 64 + strip * 16 + g + 8 * i];
            if (p.global_scale) scale[i] = p.global_scale[0];
            if (p.bias) bias[i] = to_f32(static_cast<const T *>(p.bias)[col + g + 8 * i]);
        }
    }
    __device__ __forceinline__ float of(float v, int e) const {
        return kKind != kAny ? v : fmaf(v, scale[e / 2], bias[e / 2]);
    }
};

// Outputs of 8 rows of x from m0 on and of 8 from m1 on, from fragments.
template <typename T, kind kKind>
__device__ __forceinline__ void put_groups(const linear_args &p, int m0, int m1, int32_t col,
                                           const float (&v)[2][4], float *turn) {
    const int lane = linear_thread_anew() % 32;
    if (kKind == kAny && (p.y_f32 || p.epilogue == LINEAR_RESIDUAL)) {
#pragma unroll
        for (int i = 0; i < 2; i++) {
            const float4 out = linear_turn(v[i], turn);
            const int row = (i ? m1 : m0) + lane / 4;
            if (row < p.m) linear_put<T>(p, row, col + lane % 4 * 4, out);
        }
        return;
    }
    const uint32_t place = shared_address(turn);
    uint32_t two[4];
#pragma unroll
    for (int i = 0; i < 4; i++) two[i] = pack2<T>(v[i / 2][i % 2 * 2], v[i / 2][i % 2 * 2 + 1]);
    __syncwarp();
    linear_place_16(place + linear_place_at(lane / 16 * 8 + lane % 8, lane / 8 % 2), two);
    __syncwarp();
    const uint4 out = shared_u128(place + linear_place_at(lane / 2, lane % 2));
    const int row = (lane < 16 ? m0 : m1 - 8) + lane / 2;
    if (row < p.m)
        linear_store_16(static_cast<T *>(p.y) + (int64_t)row * p.ldy + col + lane % 2 * 8, out,
                        linear_wide(p));
}

// Groups `own`, own + among, .. of 8 rows of x, whose sums lie at acc of groups 0, among, ..: two
// at a time. Of gate and up one warp finishes the first half, one the second, and each gives the
// other its sums. One place in the code for any `among`: of each half of the groups those that are
// this CTA's come to lie one behind the other.
template <typename T, int R, kind kKind>
__device__ __forceinline__ void emit(float (&acc)[R / 2], const linear_args &p, const target &to,
                                     int own, int among, float *turn, uint32_t give) {
    constexpr int H = R / 16; // groups of a half
    terms<kKind> t, t_up;
    t.template read<T>(p, to.block, to.col);
    if (H == 4 && among == 2)
#pragma unroll
        for (int e = 0; e < 4; e++)
            acc[4 + e] = acc[8 + e], acc[R / 4 + 4 + e] = acc[R / 4 + 8 + e];
    // Of place j of half h the first row, or p.m where there is none.
    const auto row_of = [&](int h, int j) {
        const int row = 8 * (to.group + h * H + j * among + own);
        return j * among < H && (h == 0 || among <= H) ? row : p.m;
    };
    if (!paired_in<kKind>(p)) {
#pragma unroll
        for (int j = 0; j < R / 8; j += 2) {
            const int m0 = row_of(j / H, j % H), m1 = row_of((j + 1) / H, (j + 1) % H);
            if (m0 >= p.m) continue;
            float v[2][4];
#pragma unroll
            for (int e = 0; e < 8; e++) v[e / 4][e % 4] = t.of(acc[4 * j + e], e % 4);
            put_groups<T, kKind>(p, m0, m1, to.col, v, turn);
        }
        return;
    }
    t_up.template read<T>(p, to.block + p.half_blocks, to.col + p.half_rows);
    const int warp = linear_thread_anew() / 32, half = warp / 4 % 2;
#pragma unroll
    for (int j0 = 0; j0 < H; j0 += 2) {
        if (j0 * among >= H) continue;
        float out[2][4] = {};
#pragma unroll
        for (int i = 0; i < 2; i++) {
            const int j = j0 + i;
            if (j >= H || j * among >= H) continue;
            float gate[4], v[4];
#pragma unroll
            for (int e = 0; e < 4; e++) {
                gate[e] = half ? acc[4 * j + R / 4 + e] : acc[4 * j + e]; // or up
                v[e] = half ? acc[4 * j + e] : acc[4 * j + R / 4 + e];
            }
            const float4 got =
                exchange(v, give, (half ? -4 : 4) * kGiveBytes, i, warp / 8 * 4 + warp % 4);
            const float w[4] = {got.x, got.y, got.z, got.w};
#pragma unroll
            for (int e = 0; e < 4; e++)
                out[i][e] =
                    linear_gate(t.of(half ? w[e] : gate[e], e), t_up.of(half ? gate[e] : w[e], e),
                                kKind != kAny ? LINEAR_GATED : p.epilogue, p.limit);
        }
        const int m0 = row_of(0, j0) + half * 8 * H;
        const int m1 = j0 + 1 < H ? row_of(0, j0 + 1) + half * 8 * H : p.m;
        if (m0 < p.m) put_groups<T, kKind>(p, m0, m1, to.col, out, turn);
    }
}

// Until the last sums that each sharer sends to CTA `own` of them are seen to come, by one word:
// beside the next launch's CTA, which asks for its weights, to ask for all again and again takes
// longer than to ask once more.
template <int R, int W>
__device__ __forceinline__ void await(const linear_args &p, const division &d, int groups,
                                      const sharers &by, int own, int warp) {
    const int s = threadIdx.x % 32, last = ((groups - 1 - own) & -by.finish) + own;
    const bool wanted = s < by.n && s != own && groups > own;
    const float4 *at =
        meeting<R, W>(p, d, by.first + s, s < by.ends, warp) - threadIdx.x % 32 + last * 32 + 31;
    float v = -0.f;
    do {
        if (wanted)
            asm volatile("ld.relaxed.gpu.global.f32 %0, [%1];" : "=f"(v) : "l"(at) : "memory");
    } while (!__all_sync(~0u, __float_as_uint(v) != 0));
}

// Of a tile that S CTAs finish, this one's groups of rows: its number, S more, .. Sums of the first
// S sharers take the places of those that have been sent: at acc of group j come those of group
// j / S * S + own, from sharer j % S.
template <typename T, int R, int W, kind kKind>
__device__ __forceinline__ void finish(float (&acc)[R / 2], const linear_args &p, const division &d,
                                       const target &to, const sharers &by, float *turn,
                                       uint32_t give) {
    constexpr int kOnce = R / 8 < 4 ? R / 8 : 4; // groups of a sender asked for at once
    const int warp = threadIdx.x / 32, among = by.finish - 1;
    const int groups = d.groups - to.group; // at most: all of this warp's
    int own = cta_of<W>(d) - by.first;
    if (own > among) return;
    const auto place_of = [&](int j, int s) {
        asm volatile("" : "+r"(own)); // lest all addresses be kept
        return meeting<R, W>(p, d, by.first + s, s < by.ends, warp) + ((j & ~among) + own) * 32;
    };
    const auto wanted = [&](int j) { return (j & among) != own && (j & ~among) + own < groups; };
    await<R, W>(p, d, min(groups, R / 8), by, own, warp);
    bool all;
    do {
        all = true;
#pragma unroll
        for (int j = 0; j < R / 8; j++)
            if (wanted(j)) get_meeting(&acc[4 * j], place_of(j, j & among));
#pragma unroll
        for (int j = 0; j < R / 8; j++)
            if (wanted(j)) all = all && is_there(&acc[4 * j]);
    } while (!all);
#pragma unroll
    for (int apart = 1; apart < R / 8 && apart < 4; apart *= 2)
        if (by.finish > apart)
#pragma unroll
            for (int e = 0; e < R / 2; e++)
                if (e / 4 % (2 * apart) == 0) acc[e] += acc[e + 4 * apart];
#pragma unroll 1
    for (int s = by.finish; s < by.n; s++)
#pragma unroll
        for (int j0 = 0; j0 < R / 8; j0 += kOnce) {
            float v[4 * kOnce];
            do {
                all = true;
#pragma unroll
                for (int j = j0; j < j0 + kOnce; j++)
                    if ((j & among) == 0 && j + own < groups)
                        get_meeting(&v[4 * (j - j0)], place_of(j, s));
#pragma unroll
                for (int j = j0; j < j0 + kOnce; j++)
                    if ((j & among) == 0 && j + own < groups)
                        all = all && is_there(&v[4 * (j - j0)]);
            } while (!all);
#pragma unroll
            for (int e = 0; e < 4 * kOnce; e++)
                if ((e / 4 & among) == 0) acc[4 * j0 + e] += v[e];
        }
    // Zeros first: they are on their way while results are computed.
    for (int s = 0; s < by.n; s++)
        for (int j = own; j < R / 8 && j < groups && s != own; j += by.finish)
            meeting<R, W>(p, d, by.first + s, s < by.ends, warp)[j * 32] =
                make_float4(0.f, 0.f, 0.f, 0.f);
    emit<T, R, kKind>(acc, p, to, own, by.finish, turn, give);
}

// --- The kernel ---------------------------------------------------------------------------------

// Of the ring that W comes through, and x too where it is one. whole: warps that have whole tiles.
template <int B, int W>
__device__ __forceinline__ void init_weights(const barriers &bar, const division &d, int whole) {
#pragma unroll 1
    for (int i = 0; i < d.w_stages; i++) {
        barrier_init(bar.w.full + i * 8, kOneRing<B> ? 2 : 1);
        barrier_init(bar.w.empty + i * 8, whole);
        if (whole < W) barrier_init(bar.w.others() + i * 8, W - whole);
    }
    barrier_init_fence();
}
// Of that of x.
template <int B, int W>
__device__ __forceinline__ void init_inputs(const barriers &bar, const division &d) {
#pragma unroll 1
    for (int i = 0; i < d.x_stages; i++) {
        if (!kOneRing<B>) {
            barrier_init(bar.x.full + i * 8, 1);
            barrier_init(bar.x.empty + i * 8, W);
        }
        if (kClusters<W> && d.doubled) barrier_init(bar.x.free() + i * 8, 1);
    }
    barrier_init_fence();
}

// Barriers of a ring are set up by the warp that loads it, which waits for nobody else: only who
// brings x through W's ring for who has set that up. Those that multiply wait for both, and for
// thread 0, which finds out who shares a tile.
template <int B, int W, int R, int G, kind kKind>
__device__ __forceinline__ void prepare(const linear_args &p, const division &d, const maps &m,
                                        const barriers &bar, sharers *sharing, int warp,
                                        bool rounds) {
    const bool clusters = kClusters<W> && d.doubled;
    if (warp == W) {
        if (threadIdx.x == 32 * W) {
            init_weights<B, W>(bar, d, rounds ? d.per * (paired_in<kKind>(p) ? 8 : 4) : W);
            prefetch_map(&m.code);
            if (G) prefetch_map(&m.scale);
        }
        __syncwarp();
        if (kOneRing<B>) asm volatile("barrier.arrive 14, 64;" ::: "memory");
    } else if (warp == W + 1) {
        if (threadIdx.x == 32 * W + 32) {
            init_inputs<B, W>(bar, d);
            prefetch_map(&m.x);
        }
        __syncwarp();
        if (kOneRing<B>) asm volatile("barrier.sync 14, 64;" ::: "memory");
    }
    if (clusters) {
        cluster_arrive();
        if (MID_RACECHECK) cluster_wait();
    }
    if (threadIdx.x == 0 && cta_of<W>(d) < d.ctas)
        *sharing = sharers(d, cta_of<W>(d), paired_in<kKind>(p) ? R / 16 : R / 8);
    if (warp < W)
        asm volatile("barrier.sync 15, %0;" ::"n"(32 * (W + 2)) : "memory");
    else if (warp < W + 2)
        asm volatile("barrier.arrive 15, %0;" ::"n"(32 * (W + 2)) : "memory");
}

template <typename T, int F, int NT, int B, int P, int G, kind kKind>
__global__ void __launch_bounds__(threads(F, NT, B, P, G), B *P == 2 ? 2 : 1)
    linear_mid(const __grid_constant__ linear_args p, const __grid_constant__ division d,
               const __grid_constant__ maps m) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)       // never launched, and empty, on other architectures
    constexpr int W = 4 * B * P, R = NT / P; // warps that multiply, rows of x that each finishes
    extern __shared__ uint8_t shared[];
    uint8_t *start = shared + ((1024 - (shared_address(shared) & 1023)) & 1023);
    const uint32_t base = shared_address(start);
    const int warp = __shfl_sync(~0u, threadIdx.x / 32, 0);
    barriers bar = barriers_of<B>(d, base);
    sharers *sharing = reinterpret_cast<sharers *>(start + d.at_bars + 2 * kStagesMost * 16);
    const bool rounds = kRounds<F, B> && d.rounds;
    launch_dependents();
    prepare<B, W, R, G, kKind>(p, d, m, bar, sharing, warp, rounds);
    constexpr bool kGiven = registers_given(F, NT, B, G);
    if (warp >= W) {
        if (kGiven) registers_down<32>();
        load<F, NT, B, P, G, kKind>(p, d, m, bar, base, threadIdx.x - 32 * W);
        __syncwarp();
        if (warp == W && cta_of<W>(d) < d.ctas)
            linear_ask_ahead(p.ahead, blockIdx.x, d.ctas << d.doubled);
        return;
    }
    if (kGiven) registers_up<B * P == 2 ? 104 : 112>();
    multiplier<T, F, NT, B, P, G, kKind> work = {p, d, bar, 0, 0, 0, 0};
    work.begin(base);
    const bool whole = rounds && has_whole<kKind>(p, d, warp / 4);
    if (rounds && !whole) bar.w.empty = bar.w.others();
    place<W> i(d, whole);
    wait_for_previous();
    while (i.left > 0) {
        const int steps = i.piece(d), tile = i.tile;
        float acc[NT / 2] = {};
        if constexpr (of_codes(F)) {
            work.tile_of_codes(acc, steps);
            scale_rows(acc, base + d.at_x_scale);
        } else {
            work.tile(acc, steps);
        }
        i.next(d, steps);
        const target to = target_of<R, B, P, kRounds<F, B>, kKind>(p, d, tile);
        if (!to.there) continue;
        const int thread = linear_thread_anew();
        float *turn =
            reinterpret_cast<float *>(start + d.at_turn) + thread / 32 * LINEAR_STAGE_FLOATS;
        const uint32_t give = base + d.at_turn + W * LINEAR_STAGE_FLOATS * 4 +
                              thread / 32 * kGiveBytes + thread % 32 * 16;
        float sum[R / 2];
        if constexpr (P > 1) {
            add_parts<NT, B>(sum, acc, give + (paired_in<kKind>(p) ? W * kGiveBytes : 0));
        } else {
#pragma unroll
            for (int e = 0; e < R / 2; e++) sum[e] = acc[e];
        }
        // Where gate and up meet once a tile, the next tile's are in the other place.
        const uint32_t place_of_pair = give + (R == 16 ? tile % 2 * 512 : 0);
        if (steps == d.steps) {
            emit<T, R, kKind>(sum, p, to, 0, 1, turn, place_of_pair);
            continue;
        }
        const sharers by = *sharing; // once: asm statements may write to memory
        send<R, W>(sum, p, d, d.groups - to.group, i.left == 0, by);
        if (i.left > 0) continue;
        finish<T, R, W, kKind>(sum, p, d, to, by, turn, place_of_pair);
        return;
    }
#endif
}

// --- Launch -------------------------------------------------------------------------------------

__host__ __device__ constexpr int room(int groups) { return (groups == 2 ? 113 : 226) * 1024; }

// ns of a unit of 64 rows of W, of a launch besides, and of sums where tiles are cut anyhow: not
// all alike, into up to four parts. Measured on an H200 with W4. With 8 bits no unit takes less
// than its bytes do, at 30 a ns and SM. Clusters save 3 %, with 8 bits and 64 rows 6 to 9 %.
struct times {
    int32_t unit, launch, cut;
};
template <int F, int NT, int B, int P> times times_of(bool doubled) {
    constexpr bool few = NT == 32;
    if (of_codes(F))
        return B == 4   ? times{few ? 68 : 73, 10000, 2500}
               : B == 3 ? times{72, 9500, 3000}
               : P == 2 ? times{few ? 70 : 92, 8500, 700}
                        : times{few ? 82 : 102, few ? 4000 : 5200, 2000};
    if (bits_of(F) == 8)
        return B != 4    ? times{few ? 140 : 152, few ? 4400 : 5000, 0}
               : doubled ? times{few ? 118 : 130, few ? 8000 : 8500, 0}
                         : times{few ? 136 : 146, few ? 7800 : 7300, 0};
    if (few) return B == 4 ? times{74, 7900, 0} : P == 2 ? times{88, 4900, 0} : times{101, 3600, 0};
    return B == 4   ? times{106, 6500, 2700}
           : B == 3 ? times{110, 5800, 1700}
           : P == 2 ? times{111, 5800, 700}
                    : times{150, 3400, 1400};
}

// About how many ns a problem takes whose steps have so many units of K and of W's blocks.
template <int F, int NT, int B, int P> int64_t cost(const division &d, int units) {
    const times t = times_of<F, NT, B, P>(d.doubled);
    const bool whole = !d.more && d.each % d.steps == 0;
    const bool alike = !d.more && d.steps % d.each == 0 && d.steps / d.each <= 4;
    const int64_t n = (int64_t)(d.each + (d.more > 0)) * units;
    int64_t ns = n * t.unit + t.launch + (whole || alike ? 0 : t.cut);
    // Two parts bring twice as much of x, which tells where there are many units (measured).
    if (P == 2 && NT == 64 && n > 160) ns += (n - 160) * 13;
    if (!d.doubled || bits_of(F) == 8) return ns;
    return ns - ns / 32;
}

// The same of d's rounds and as many more steps of the line.
template <int F, int NT>
int64_t cost_of_rounds(const division &d, int steps, int units, bool paired) {
    const int64_t whole = (int64_t)d.per * d.rounds * d.steps, part = (steps + d.ctas - 1) / d.ctas;
    const int64_t n = (whole + part) * units * (paired ? 2 : 1);
    const int64_t ns = of_codes(F)       ? n * (NT == 32 ? 70 : 76) + (paired ? 7000 : 6000)
                       : bits_of(F) == 8 ? n * 142 + (paired ? 5000 : 4000) - (NT == 32 ? 2000 : 0)
                       : NT == 32        ? n * (paired ? 76 : 74) + (paired ? 6000 : 5000)
                                         : n * (paired ? 116 : 112) + (paired ? 4500 : 3500);
    return d.doubled ? ns - ns / (bits_of(F) == 8 && NT == 64 ? 16 : 32) : ns;
}

// Units of K at most: so many that divide() has a line of steps for any matrix of up to 10 GB.
constexpr int32_t kUnitsMost = 2048;

uint32_t inverse_of(int n) { return (uint32_t)((((int64_t)1 << 31) + n - 1) / n); }

// Among n_sms CTAs, all of the line or in rounds; no stages when there is no room, or no rounds.
template <int F, int NT, int B, int P, int G>
division divide(const linear_args *a, int n_sms, bool in_rounds, int doubled) {
    constexpr int U = step_units(F, B, P), code = B * U * 512 * bits_of(F);
    constexpr bool half = B * P == 2;
    division d = {};
    d.per = a->paired ? B / 2 : B;
    d.all = a->paired ? a->half_blocks : a->blocks;
    d.steps = (a->units + U - 1) / U;
    d.doubled = doubled;
    d.x_whole = a->k % (64 * line_units(F)) == 0;
    const int n = n_sms >> doubled, tile = d.per << doubled; // of a CTA, or of two
    int total = (d.all + tile - 1) / tile * d.steps, most = (total + n - 1) / n;
    d.ctas = (total + most - 1) / most;
    if (a->paired && B % 2) return d;
    if (in_rounds) { // of the line is what is left when all but one of each tile are whole
        d.ctas = n;
        d.rounds = (d.all + tile * n - 1) / (tile * n);
        d.per--;
        const int left = d.all - (n << doubled) * d.rounds * d.per;
        total = (left + doubled) / (1 + doubled) * d.steps;
        most = d.rounds * d.steps;
        if (total < n || !d.x_whole) return division{};
    }
    d.each = total / d.ctas;
    d.more = total % d.ctas;
    if ((int64_t)total * (d.steps > d.each ? d.steps : d.each + 1) >> 30) return division{};
    d.by_steps = inverse_of(d.steps);
    d.by_each = inverse_of(d.each > 0 ? d.each : 1);
    d.by_more = inverse_of(d.each + 1);
    d.x_rows = (a->m + 7) / 8 * 8;
    d.groups = (a->m + 7) / 8;
    d.w_stage = (code + B * step_granules(F, B, P, G) * a->granule_bytes + 127) / 128 * 128;
    const int x_stage = x_lines(F, NT, B, P) * NT * 128;
    const int exchanges = (a->paired ? 1 : 0) + (P > 1 ? 1 : 0);
    const int turn = 4 * B * P * (LINEAR_STAGE_FLOATS * 4 + exchanges * kGiveBytes);
    const int bars = 2 * kStagesMost * 16 + 16 + (of_codes(F) ? NT * 4 : 0);
    const int left = room(B * P) - 1024 - turn - bars;
    // As many steps of x as of W; of what half an SM has room for x gets less, since W comes from
    // further away.
    const int both = left / (d.w_stage + U / x_units(F, NT, B, P) * x_stage);
    d.x_stages = half ? left * 45 / 100 / x_stage : both;
    if (d.x_stages < 2) d.x_stages = 2;
    if (d.x_stages > 8) d.x_stages = 8;
    d.w_stages = kOneRing<B> ? both : (left - d.x_stages * x_stage) / d.w_stage;
    if (d.w_stages > kStagesMost) d.w_stages = kStagesMost;
    if (d.w_stages > most) d.w_stages = most;
    if (kOneRing<B>) d.x_stages = d.w_stages;
    if (left - d.x_stages * x_stage < d.w_stage) d.w_stages = 0;
    if (P > 1 && d.x_stages < 8) d.x_stages = (left - d.w_stages * d.w_stage) / x_stage;
    if (d.x_stages > 8) d.x_stages = 8;
    d.at_w = d.x_stages * x_stage;
    d.at_turn = d.at_w + d.w_stages * d.w_stage;
    d.at_bars = d.at_turn + turn;
    d.at_x_scale = d.at_bars + 2 * kStagesMost * 16 + 16;
    d.bytes = d.at_bars + bars + 1024;
    d.cost =
        in_rounds ? cost_of_rounds<F, NT>(d, total, U, a->paired) : cost<F, NT, B, P>(d, U * B);
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
    constexpr int U = step_units(F, B, P), kRows = bits_of(F) / 4; // rows of 2 KB a unit
    const cuuint64_t halves = a->paired ? 2 : 1, blocks = a->paired ? a->half_blocks : a->blocks;
    const cuuint32_t at_once = d.rounds ? d.per : a->paired ? B / 2 : B;
    const cuuint64_t block = (cuuint64_t)a->units * kRows * 2048;
    tensor code = {a->code,
                   CU_TENSOR_MAP_DATA_TYPE_FLOAT64,
                   CU_TENSOR_MAP_SWIZZLE_NONE,
                   4,
                   {256, (cuuint64_t)a->units * kRows, blocks, halves},
                   {2048, block, block * blocks},
                   {256, U * kRows, at_once, (cuuint32_t)halves}};
    const cuuint64_t granule = (cuuint64_t)a->granule_bytes;
    tensor scale = {
        a->scale,
        CU_TENSOR_MAP_DATA_TYPE_FLOAT64,
        CU_TENSOR_MAP_SWIZZLE_NONE,
        4,
        {granule / 8, (cuuint64_t)a->granules, blocks, halves},
        {granule, granule * a->granules, granule * a->granules * blocks},
        {(cuuint32_t)granule / 8, step_granules(F, B, P, G), at_once, (cuuint32_t)halves}};
    TRY(encode(&m->code, code));
    if (G) TRY(encode(&m->scale, scale));
    code.box[2] = scale.box[2] = 1;
    if (d.rounds) TRY(encode(&m->code_one, code));
    if (d.rounds && G) TRY(encode(&m->scale_one, scale));
    const cuuint64_t rows = (cuuint64_t)a->m, k = (cuuint64_t)a->k, line = of_codes(F) ? 128 : 64;
    tensor x = {
        a->x,
        of_codes(F) ? CU_TENSOR_MAP_DATA_TYPE_UINT8
        : bf16      ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16
                    : CU_TENSOR_MAP_DATA_TYPE_FLOAT16,
        CU_TENSOR_MAP_SWIZZLE_128B,
        3,
        {line, rows, k / line},
        {(cuuint64_t)a->ldx * (128 / line), 128},
        {(cuuint32_t)line, (cuuint32_t)d.x_rows, (cuuint32_t)x_lines(F, NT, B, P) >> d.doubled}};
    if (!d.x_whole) x.dims = 2, x.size[0] = k;
    return encode(&m->x, x);
}

// Tiles of B blocks and P parts: their launch.
template <typename T, int F, int NT, int B, int P, int G> struct tiles {
    // Whether clusters of two can have all of n_sms SMs, or all but one, at once.
    static bool clusters_fit(int32_t n_sms) {
        if (B * P == 2 || n_sms < 2) return false; // of two blocks both would share an SM
        static int fit;                            // 0: not asked yet
        const launch_config l(dim3((unsigned)n_sms & ~1u), dim3(threads(F, NT, B, P, G)),
                              (size_t)room(B * P), nullptr, false, 2);
        const auto kernel = linear_mid<T, F, NT, B, P, G, kAny>;
        if (fit == 0 && (cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                              room(B * P)) != cudaSuccess ||
                         cudaOccupancyMaxActiveClusters(&fit, kernel, &l.config) != cudaSuccess))
            return false;
        return fit >= n_sms / 2;
    }
    // The way that should be the fastest.
    static division best(const linear_args *a, int32_t n_sms) {
        division d = divide<F, NT, B, P, G>(a, n_sms, false, 0);
        const auto offer = [&](bool in_rounds, int doubled) {
            const division other = divide<F, NT, B, P, G>(a, n_sms, in_rounds, doubled);
            if (other.w_stages && (!d.w_stages || other.cost < d.cost)) d = other;
        };
        const bool doubled = d.x_whole && clusters_fit(n_sms);
        if (doubled) offer(false, 1);
        if (!kRounds<F, B>) return d;
        offer(true, 0);
        if (doubled) offer(true, 1);
        return d;
    }
    static bool plain(const linear_args *a) {
        return may_be_plain(F, G) && a->k % 64 == 0 && a->half_rows % 64 == 0 &&
               (a->paired || a->half_blocks == a->blocks) && !a->bias && !a->channel &&
               !a->global_scale && !a->y_f32 &&
               (a->epilogue == LINEAR_STORE || a->epilogue == LINEAR_GATED);
    }
    template <kind kKind> static constexpr auto kernel = linear_mid<T, F, NT, B, P, G, kKind>;
    static auto kernel_of(const linear_args *a) {
        constexpr bool kMay = may_be_plain(F, G), kMayBeFew = may_be_few(F, NT, B, P, G);
        constexpr kind kOne = kMay ? kPlain : kAny, kFewOne = kMayBeFew ? kFew : kOne;
        constexpr kind kTwo = kMay && B != 3 ? kPlainPaired : kAny;
        constexpr kind kFewTwo = kMayBeFew && B == 4 ? kFewPaired : kTwo;
        const bool few = a->m <= kFewRows;
        if (!plain(a)) return kernel<kAny>;
        if (a->paired) return few ? kernel<kFewTwo> : kernel<kTwo>;
        return few ? kernel<kFewOne> : kernel<kOne>;
    }
    static status run(const division &d, const linear_args *args, int32_t n_sms,
                      kernel_stream stream) {
        const auto chosen = kernel_of(args);
        maps m = {};
        if (!d.w_stages) return FAIL(ST_UNSUPPORTED, "linear_mid: no room for %d rows", args->m);
        TRY((encode_all<F, NT, B, P, G>(&m, args, d, half_pair<T>::bf16)));
        // With half an SM each there is one for every SM, so that the next launch's finds the other
        // half free everywhere.
        const int bytes =
            args->apart && d.bytes < LINEAR_APART_BYTES ? LINEAR_APART_BYTES : d.bytes;
        const launch_config l(dim3((unsigned)(B * P == 2 ? n_sms : d.ctas << d.doubled)),
                              dim3(threads(F, NT, B, P, G)), (size_t)bytes, stream, true,
                              d.doubled ? 2 : 0);
        cudaError_t e = cudaFuncSetAttribute(chosen, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                             room(B * P) < LINEAR_APART_BYTES ? LINEAR_APART_BYTES
                                                                              : room(B * P));
        if (e == cudaSuccess) e = cudaLaunchKernelEx(&l.config, chosen, *args, d, m);
        return e == cudaSuccess ? ST_OK : FAIL(ST_DEVICE, "linear_mid: %s", cudaGetErrorString(e));
    }
    static status launch(const linear_args *args, int32_t n_sms, int32_t, kernel_stream stream) {
        return run(best(args, n_sms), args, n_sms, stream);
    }
};

template <typename T, int F, int NT, int G>
status launch_best(const linear_args *args, int32_t n_sms, int32_t, kernel_stream stream) {
    struct choice {
        division d;
        status (*run)(const division &, const linear_args *, int32_t, kernel_stream);
    } best = {tiles<T, F, NT, 2, 1, G>::best(args, n_sms), tiles<T, F, NT, 2, 1, G>::run};
    const auto offer = [&best](const choice &c) { // no stages: it has no room
        if (c.d.w_stages && (!best.d.w_stages || c.d.cost <= best.d.cost)) best = c;
    };
    // Behind another kernel the sums of halves take longer than in a chain of one (measured).
    if (has_parts(F) && NT == 64 && args->apart) best.d.cost += 1500;
    if constexpr (has_parts(F))
        offer({tiles<T, F, NT, 2, 2, G>::best(args, n_sms), tiles<T, F, NT, 2, 2, G>::run});
    if constexpr (has_three(F, NT, G))
        offer({tiles<T, F, NT, 3, 1, G>::best(args, n_sms), tiles<T, F, NT, 3, 1, G>::run});
    offer({tiles<T, F, NT, 4, 1, G>::best(args, n_sms), tiles<T, F, NT, 4, 1, G>::run});
    return best.run(best.d, args, n_sms, stream);
}

#define T_F16  __half
#define T_BF16 __nv_bfloat16
#define ROW(NAME, F, T, NT, B, G, LAUNCH)                                                          \
    { NAME, 90, 90, WF_##F, DT_##T, NT, B, 1, G, G, 1, LAUNCH, NT, false, false, false, kUnitsMost }
#define ROWS_8(F, T, NT, G)                                                                        \
    ROW("mid_" #NT, F, T, NT, 4, G, (launch_best<T_##T, WF_##F, NT, G>)),                          \
        ROW("mid_" #NT "x2", F, T, NT, 4, G, (tiles<T_##T, WF_##F, NT, 2, 1, G>::launch)),         \
        ROW("mid_" #NT "x4", F, T, NT, 4, G, (tiles<T_##T, WF_##F, NT, 4, 1, G>::launch)),
#define ROWS_3(F, T, NT, G)                                                                        \
    ROW("mid_" #NT "x3", F, T, NT, 3, G, (tiles<T_##T, WF_##F, NT, 3, 1, G>::launch)),
#define ROWS(F, T, NT, G)                                                                          \
    ROWS_8(F, T, NT, G)                                                                            \
    ROW("mid_" #NT "x2x2", F, T, NT, 4, G, (tiles<T_##T, WF_##F, NT, 2, 2, G>::launch)),
const linear_variant rows[] = {MID_INSTANCES(ROWS) MID_INSTANCES_3(ROWS_3) MID_INSTANCES_8(ROWS_8)};

#define CODES_ROW(SUFFIX, F, T, NT, B, G, LAUNCH) ROW("w4a8_" #NT SUFFIX, F, T, NT, B, G, LAUNCH)
#define CODES_ROWS_3(F, T, NT, G)                                                                  \
    CODES_ROW("x3", F, T, NT, 3, G, (tiles<T_##T, WF_##F | kCodes, NT, 3, 1, G>::launch)),
#define CODES_ROWS(F, T, NT, G)                                                                    \
    CODES_ROW("", F, T, NT, 4, G, (launch_best<T_##T, WF_##F | kCodes, NT, G>)),                   \
        CODES_ROW("x2", F, T, NT, 4, G, (tiles<T_##T, WF_##F | kCodes, NT, 2, 1, G>::launch)),     \
        CODES_ROW("x4", F, T, NT, 4, G, (tiles<T_##T, WF_##F | kCodes, NT, 4, 1, G>::launch)),     \
        CODES_ROW("x2x2", F, T, NT, 4, G, (tiles<T_##T, WF_##F | kCodes, NT, 2, 2, G>::launch)),
const linear_variant codes[] = {MID_INSTANCES_CODES(CODES_ROWS)
                                    MID_INSTANCES_CODES_3(CODES_ROWS_3)};

} // namespace

extern "C" linear_table linear_mid_table(void) {
    return linear_table{rows, (int32_t)(sizeof rows / sizeof rows[0])};
}

extern "C" linear_table linear_w4a8_table(void) {
    return linear_table{codes, (int32_t)(sizeof codes / sizeof codes[0])};
}
