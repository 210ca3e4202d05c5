// linear_ampere.cu - y^T = W x^T through mma.sync m16n8k16 with a cp.async pipeline; any format,
// any GPU from sm_80. Weights go from shared memory to registers as they lie there (16 bytes a
// lane), x through ldmatrix from rows of 128 bytes whose 16-byte chunks are swapped by row.
//
//   tiles    eight warps share a tile of W and walk along K together; CTAs may share one. Where it
//            is small, four warps take every second unit each (UNITS): so an SM has one, of all of
//            K or half, and fewer sums travel
//   split    the warps of a CTA share out K; CTAs may share a tile
//   strips   the same, and a tile is so narrow that a CTA has all of K: small matrices, few rows
//
// What a thread copies of every step, and where a lane reads, is found once a tile: to find it anew
// for every unit is more work than what is then done with it. Fragments of the next 16 inputs are
// read before those at hand are multiplied, across steps too: the barrier that a step ends in comes
// before its last products. From sm_90 on weights are asked for before the launch before has ended
// (programmatic dependent launch), x and everything written come after.
#include "linear_common.cuh"
#include "linear_launch.h"
#include "mma_sync.cuh"
#include "traits.cuh"

// The explicit lists. Tiles: name, format, type, x rows, blocks of a warp, what the two groups of
// four warps share out, units of a step (at 4 bits), stages and CTAs an SM at most, granules of
// less than 64 inputs. A tile is 128, 192 or 256 rows of W; of weights of 16 bits 128x2 would not
// fit 100 KB an SM. Split: name, format, type, x rows, blocks, stages, CTAs, fine, first and last
// GPU. Strips: name, format, type, x rows of a tile, warps, x rows of a problem at most, fine,
// first and last GPU. Split and strips are for formats that dense models of 4 bits come in, SMALL
// for the commonest of them.
#define AMPERE_TILES(X, F, T, FINE)                                                                \
    X("ampere_8x1", F, T, 8, 1, BLOCKS, 4, 4, 2, FINE)                                             \
    X("ampere_16x2", F, T, 16, 2, BLOCKS, 1, 6, 2, FINE)                                           \
    X("ampere_32x2", F, T, 32, 2, BLOCKS, 1, 5, 2, FINE)                                           \
    X("ampere_64x2", F, T, 64, 2, BLOCKS, 1, 4, 1, FINE)
#define AMPERE_CODES(X, F, T, FINE)                                                                \
    AMPERE_TILES(X, F, T, FINE) X("ampere_128x2", F, T, 128, 2, BLOCKS, 1, 4, 1, FINE)
#define AMPERE_VALUES(X, F, T, FINE)                                                               \
    AMPERE_TILES(X, F, T, FINE) X("ampere_128x1", F, T, 128, 2, ROWS, 1, 5, 1, FINE)
#define AMPERE_SMALL(X, F, T, FINE)                                                                \
    X("ampere_units_64x128", F, T, 64, 2, UNITS, 2, 4, 1, FINE)                                    \
    X("ampere_units_64x192", F, T, 64, 3, UNITS, 2, 4, 1, FINE)                                    \
    X("ampere_units_128x128", F, T, 128, 2, UNITS, 2, 4, 1, FINE)
#define AMPERE_SPLIT(X, F, T, FINE) X("ampere_split_16x2", F, T, 16, 2, 4, 1, FINE, 90, 103)
#define AMPERE_STRIPS(X, F, T, FINE)                                                               \
    X("ampere_strips_8", F, T, 8, 16, 8, FINE, 80, SM_ANY)                                         \
    X("ampere_strips_16", F, T, 16, 8, 16, FINE, 80, SM_ANY)                                       \
    X("ampere_strips_32", F, T, 32, 8, 64, FINE, 80, 80)                                           \
    X("ampere_strips_32", F, T, 32, 8, 64, FINE, 90, 103)
#define AMPERE_TYPES(M, X, F, FINE) M(X, F, F16, FINE) M(X, F, BF16, FINE)
#ifndef AMPERE_INSTANCES
#define AMPERE_INSTANCES(X)                                                                        \
    AMPERE_TYPES(AMPERE_CODES, X, INT4, false)                                                     \
    AMPERE_TYPES(AMPERE_SMALL, X, INT4, false)                                                     \
    AMPERE_TYPES(AMPERE_CODES, X, INT4, true)                                                      \
    AMPERE_TYPES(AMPERE_CODES, X, INT8, false)                                                     \
    AMPERE_TYPES(AMPERE_CODES, X, FP8, false)                                                      \
    AMPERE_TYPES(AMPERE_CODES, X, FP8B, false)                                                     \
    AMPERE_TYPES(AMPERE_CODES, X, MXFP4, true)                                                     \
    AMPERE_TYPES(AMPERE_CODES, X, NVFP4, true)                                                     \
    AMPERE_TYPES(AMPERE_VALUES, X, 16, false)
#define AMPERE_SPLIT_INSTANCES(X)                                                                  \
    AMPERE_TYPES(AMPERE_SPLIT, X, INT4, false)                                                     \
    AMPERE_TYPES(AMPERE_SPLIT, X, INT4, true)                                                      \
    AMPERE_TYPES(AMPERE_SPLIT, X, MXFP4, true)
#define AMPERE_STRIPS_INSTANCES(X)                                                                 \
    AMPERE_TYPES(AMPERE_STRIPS, X, INT4, false)                                                    \
    AMPERE_TYPES(AMPERE_STRIPS, X, INT4, true)                                                     \
    AMPERE_TYPES(AMPERE_STRIPS, X, MXFP4, true)
#endif

namespace {

constexpr int kThreads = 32 * LINEAR_WARPS;

// Scales of one block and unit, at their finest granule.
__host__ __device__ constexpr int unit_scale_bytes(int f, bool fine) {
    return f == WF_INT4    ? (fine ? 768 : 192)
           : f == WF_MXFP4 ? 128
           : f == WF_NVFP4 ? 256
           : f == WF_FP8B  ? 16
                           : 0;
}

// 16 bytes, zeros unless `there`, nothing unless `wanted`.
__device__ __forceinline__ void copy16(uint32_t to, const void *from, bool there, bool wanted) {
    asm volatile("{ .reg .pred p; setp.ne.b32 p, %3, 0; "
                 "@p cp.async.cg.shared.global [%0], [%1], 16, %2; }" ::"r"(to),
                 "l"(from), "r"(there ? 16 : 0), "r"((int)wanted)
                 : "memory");
}
__device__ __forceinline__ void copy_commit() {
    asm volatile("cp.async.commit_group;" ::: "memory");
}
template <int N> __device__ __forceinline__ void copy_wait() {
    asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
}

// What the two groups of four warps of a CTA share out: blocks of W, rows of x, or units of a step,
// whose sums meet in shared memory at a tile's end.
enum share { BLOCKS, ROWS, UNITS };

// One stage: code [blocks][KU units], x [KU units][NT][128 bytes], scale [blocks][granules].
template <int F, int NT, int R, share SH, int KU, bool FINE> struct tile {
    static constexpr int groups = SH == BLOCKS ? 2 : 1, blocks = R * groups;
    static constexpr int rows = SH == ROWS ? NT / 2 : NT;   // of x, that a warp multiplies
    static constexpr int own = SH == BLOCKS ? NT : NT / 2;  // and finishes
    static constexpr int units = SH == UNITS ? KU / 2 : KU; // of a step, that a warp multiplies
    static_assert(units > 0, "nothing to share out");
    static constexpr int unit = 512 * linear_code_bits(F); // bytes of a block
    static constexpr int code = blocks * KU * unit, x = KU * NT * 128;
    static constexpr int scale_block = KU * unit_scale_bytes(F, FINE);
    static constexpr int scale = (blocks * scale_block + 127) / 128 * 128;
    static constexpr int bytes = code + x + scale;
};

// What a thread copies of every step, N threads together: KU units out of STRIDE. Places are in 16
// bytes from the matrix's start.
template <typename T, int F, int NT, int R, share SH, int KU, bool FINE, int N = kThreads,
          int STRIDE = KU>
struct loader {
    using S = tile<F, NT, R, SH, KU, FINE>;
    static constexpr int kCode = (S::code / 16 + N - 1) / N;
    static constexpr int kX = (S::x / 16 + N - 1) / N;
    static constexpr int kScale = (S::blocks * S::scale_block / 16 + N - 1) / N;
    // What follows from the thread is found anew at each tile's end, lest it take registers of the
    // main loop; of few rows and of 16 bits that was slower.
    static constexpr bool kAnew = NT >= 32 && N == kThreads && F != WF_16;
    static constexpr int kChunks = KU * S::unit / 16; // of a block
    static constexpr uint32_t kNone = ~0u;
    // Tall tiles copy blocks and rows past the end too, others in their place, since nobody writes
    // their products: so no copy needs a predicate of its own. And places are counted from pointers
    // that move on, not from the matrix's start.
    static constexpr bool kAll =
        NT == 128 && KU == 1 && N == kThreads && F != WF_INT8 && F != WF_16; // slower there
    static_assert(!kAll || (S::code / 16 % N == 0 && S::x / 16 % N == 0), "predicates needed");
    const linear_args &p;
    const uint8_t *code, *x; // kAll: code_of and x_of the step that comes next
    uint32_t code_at[kCode], x_at[kX], x_to, scale_at[kScale + 1], scale_to[kScale + 1];
    int unit, scale_row[kScale + 1]; // unit: the first of the step that comes next

    __device__ __forceinline__ explicit loader(const linear_args &p) : p(p) {
        const int chunk = threadIdx.x % 8, row = threadIdx.x % N / 8;
        x_to = S::code + row * 128 + ((chunk ^ row % 8) << 4);
        asm volatile("" : "+r"(x_to)); // opaque, lest it be computed anew for every step
    }

    __device__ __forceinline__ int32_t block(const linear_segment &s, int slot) const {
        return linear_block<R, S::groups>(p, s.tile_n, slot / R, slot % R);
    }

    __device__ __forceinline__ void begin(const linear_segment &s, int unit0) {
        const int tid = (kAnew ? (unsigned)linear_thread_anew() : threadIdx.x) % N;
        unit = unit0;
#pragma unroll
        for (int i = 0; i < kCode; i++) {
            const int c = tid + i * N;
            int32_t b = c < S::code / 16 ? block(s, c / kChunks) : p.blocks;
            if (kAll && b >= p.blocks) b = 0;
            code_at[i] = kAll || b < p.blocks ? (uint32_t)(s.expert * (p.code_bytes / 16)) +
                                                    (uint32_t)(b * p.units) * (S::unit / 16) +
                                                    (kAll ? i * N % kChunks : c % kChunks)
                                              : kNone;
            asm volatile("" : "+r"(code_at[i]));
        }
#pragma unroll
        for (int i = 0; i < kX; i++) {
            const int c = tid + i * N;
            const int32_t m = min(s.m0 + c / 8 % NT, kAll ? s.m_end - 1 : INT32_MAX);
            x_at[i] = kNone;
            if (kAll || (c < S::x / 16 && m < s.m_end))
                x_at[i] = (uint32_t)((p.x_row ? p.x_row[m] : m) * (p.ldx / 8)) + c / 8 / NT * 8 +
                          (kAll ? 0 : c % 8);
            asm volatile("" : "+r"(x_at[i]));
        }
#pragma unroll
        for (int i = 0; i < kScale; i++) { // the granules of a block lie together
            const int chunks = p.granule_bytes / 16,
                      n = max(1, KU * 64 >> p.granule_shift) * chunks;
            const int c = tid + i * N, slot = c / n, in = c % n;
            const int32_t b = slot < S::blocks ? block(s, slot) : p.blocks;
            scale_at[i] = b < p.blocks ? (uint32_t)(s.expert * (p.scale_bytes / 16)) +
                                             (uint32_t)(b * p.granules * chunks + in)
                                       : kNone;
            scale_to[i] = S::code + S::x + slot * S::scale_block + in * 16;
            scale_row[i] = in / chunks;
            asm volatile("" : "+r"(scale_at[i]), "+r"(scale_to[i]), "+r"(scale_row[i]));
        }
    }

    // Of a step from `unit` on, if it is wanted. Units and inputs past the end become zero, so that
    // they meet nothing that is not finite. `from`: code_of or x_of the unit.
    __device__ __forceinline__ void load_weights(uint32_t to, bool wanted, int unit,
                                                 const uint8_t *from) const {
        const int tid = threadIdx.x % N;
        if (STRIDE > KU) wanted = wanted && unit < p.units;
#pragma unroll
        for (int i = 0; i < kCode; i++) {
            const int c = tid + i * N;
            copy16(to + c * 16,
                   kAll ? from + (uint64_t)code_at[i] * 16
                        : p.code + (uint64_t)(code_at[i] + unit * (S::unit / 16)) * 16,
                   KU == 1 || unit + c / (S::unit / 16) % KU < p.units,
                   wanted && (kAll || code_at[i] != kNone));
        }
        const int32_t row0 = unit * 64 >> p.granule_shift;
#pragma unroll
        for (int i = 0; i < kScale; i++)
            copy16(to + scale_to[i],
                   p.scale + (uint64_t)(scale_at[i] + row0 * (p.granule_bytes / 16)) * 16,
                   KU == 1 || row0 + scale_row[i] < p.granules, wanted && scale_at[i] != kNone);
    }
    __device__ __forceinline__ void load_x(uint32_t to, bool wanted, int unit,
                                           const uint8_t *from) const {
        const int tid = threadIdx.x % N;
        if (STRIDE > KU) wanted = wanted && unit < p.units;
#pragma unroll
        for (int i = 0; i < kX; i++)
            copy16((to + x_to + i * N * 16) ^ (N / 8 * i % 8 << 4),
                   kAll ? from + (uint64_t)x_at[i] * 16
                        : static_cast<const uint8_t *>(p.x) + (uint64_t)(x_at[i] + unit * 8) * 16,
                   unit * 64 + (tid + i * N) / 8 / NT * 64 + tid % 8 * 8 < p.k,
                   wanted && (kAll || x_at[i] != kNone));
    }
    // What places of tall tiles are counted from: of each thread another, since what is the same of
    // all would be in a uniform register, which costs each copy a move.
    __device__ __forceinline__ const uint8_t *code_of(int unit) const {
        return p.code + (uint64_t)unit * S::unit + threadIdx.x % N % kChunks * 16;
    }
    __device__ __forceinline__ const uint8_t *x_of(int unit) const {
        return static_cast<const uint8_t *>(p.x) + (uint64_t)unit * 128 + threadIdx.x % 8 * 16;
    }
    // The first STEPS of `n`, `bytes` apart: their weights before the launch before this one has
    // ended.
    template <int STEPS> __device__ __forceinline__ void load_first(uint32_t to, int bytes, int n) {
#pragma unroll
        for (int i = 0; i < STEPS; i++)
            load_weights(to + i * bytes, i < n, unit + i * STRIDE, code_of(unit + i * STRIDE));
        wait_for_previous();
#pragma unroll
        for (int i = 0; i < STEPS; i++) {
            load_x(to + i * bytes, i < n, unit + i * STRIDE, x_of(unit + i * STRIDE));
            copy_commit();
        }
        unit += STEPS * STRIDE;
    }
    // Those after the first, each as one group of copies.
    __device__ __forceinline__ void begin_rest() {
        if (!kAll) return;
        code = code_of(unit);
        x = x_of(unit);
    }
    __device__ __forceinline__ void load(uint32_t to, bool wanted) {
        load_weights(to, wanted, unit, code);
        load_x(to, wanted, unit, x);
        copy_commit();
        unit += STRIDE;
        if (!kAll) return;
        code += STRIDE * S::unit;
        x += STRIDE * 128;
    }
};

// --- Sums that are scaled ------------------------------------------------------------------------
// With few rows of x, 4-bit integers are multiplied as they lie: in f16 their bits are subnormals,
// q 2^-24 in the low nibble of a half and q 2^-20 in the next; in bf16 they follow 128. So
//     y = s (sum_k q_k x_k - z sum_k x_k)
// costs five (seven) instructions for 8 weights instead of 13; sum_k x_k comes of one more product,
// with a matrix of ones, for all rows of W.
template <typename T> struct raw_codes {
    static constexpr bool bf16 = half_pair<T>::bf16;
    static constexpr uint32_t one = bf16 ? 0x3f803f80u : 0x3c003c00u;
    static __device__ __forceinline__ void fragment(uint32_t (&a)[4], uint32_t word) {
        if (bf16) {
#pragma unroll
            for (int i = 0; i < 4; i++) a[i] = and_or<0x000f000fu>(word >> 4 * i, 0x43004300u);
        } else {
            a[0] = word & 0x000f000fu;
            a[1] = word & 0x00f000f0u;
            a[2] = word >> 8 & 0x000f000fu;
            a[3] = word >> 8 & 0x00f000f0u;
        }
    }
    // What half h of a lane's rows (g, g + 8) is to be multiplied with in the end.
    static __device__ __forceinline__ float unit(int h) {
        return bf16 ? 1.f : h ? 0x1p20f : 0x1p24f;
    }
    // acc += scale (q - zero x), in these units. `x`: the sums of x, in the order of a product.
    static __device__ __forceinline__ void fold(float *acc, const float *q, const float *x,
                                                const dequant_packed &from) {
        const float2 scale = __half22float2(*reinterpret_cast<const __half2 *>(&from.scale));
        float z[2]; // 2^23 + zero as its bits
        z[0] = __uint_as_float(__byte_perm(from.zero, 0x4b000000u, 0x7440));
        z[1] = __uint_as_float(__byte_perm(from.zero, 0x4b000000u, 0x7441));
#pragma unroll
        for (int h = 0; h < 2; h++) {
            const float f = 1.f / unit(h);
            z[h] = fmaf(z[h], -f, (bf16 ? 8388480.f : 8388608.f) * f);
#pragma unroll
            for (int e = 0; e < 2; e++) {
                const int i = 2 * h + e;
                acc[i] = fmaf(h ? scale.y : scale.x, fmaf(z[h], x[e], q[i]), acc[i]);
            }
        }
    }
};

template <typename T, int R, int N>
__device__ __forceinline__ void finish_units(float (&acc)[R][N]) {
#pragma unroll
    for (int r = 0; r < R; r++)
#pragma unroll
        for (int i = 0; i < N; i++) acc[r][i] *= raw_codes<T>::unit(i / 2 % 2);
}

// c[16, 8] = a b, from zero.
template <typename T>
__device__ __forceinline__ void multiply_anew(float *c, const uint32_t *a, uint32_t b0,
                                              uint32_t b1) {
    c[0] = c[1] = c[2] = c[3] = 0.f;
    multiply(c, a, b0, b1, T{});
}

// What this lane reads of a stage, 16 inputs (an atom, 0 .. 4 KU - 1) at a time.
template <typename T, int F, int NT, int R, share SH, int KU, bool FINE> struct reader {
    using S = tile<F, NT, R, SH, KU, FINE>;
    static constexpr int bits = linear_code_bits(F);
    static constexpr int atoms = S::rows == 8 ? 2 : 1; // of one ldmatrix
    static constexpr int words = S::rows / 4 * atoms;
    uint32_t code, x, scale;
    int place, granule_bytes, granule_shift, granule;
    bool sym;

    __device__ __forceinline__ explicit reader(const linear_args &p) {
        const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, strip = warp % 4;
        const int slot0 = S::groups == 1 ? 0 : warp / 4 * R;
        const int row0 = SH == ROWS ? warp / 4 * S::rows : 0;
        const int unit0 = SH == UNITS ? warp / 4 * S::units : 0;
        code = (slot0 * KU + unit0) * S::unit + strip * (S::unit / 4) + lane * 16;
        const int row = atoms == 2 ? lane % 8 : lane / 16 * 8 + lane % 8;
        const int c = atoms == 2 ? lane / 8 : lane / 8 % 2;
        x = S::code + (unit0 * NT + row0 + row) * 128 + ((c ^ row % 8) << 4);
        scale = S::code + S::x + slot0 * S::scale_block +
                (unit0 * 64 >> p.granule_shift) * p.granule_bytes;
        place = strip * 16 + lane / 4 * 2;
        granule = p.granule;
        granule_shift = p.granule_shift;
        granule_bytes = p.granule_bytes;
        sym = p.sym;
        // Opaque, lest they be computed anew for every unit.
        asm volatile("" : "+r"(code), "+r"(x), "+r"(scale), "+r"(place));
    }
    __device__ __forceinline__ void some_inputs(uint32_t (&b)[words], uint32_t stage, int atom,
                                                int i) const {
        const uint32_t at = (stage + x + atom / 4 * NT * 128) ^ (atom % 4 * 32);
        load_matrices(&b[4 * i], at + i * 2048);
    }
    __device__ __forceinline__ void inputs(uint32_t (&b)[words], uint32_t stage, int atom) const {
#pragma unroll
        for (int i = 0; i < words / 4; i++) some_inputs(b, stage, atom, i);
    }
    // The 16 bytes of the warp's block r that atom begins, if one does.
    __device__ __forceinline__ void codes(uint4 &chunk, uint32_t stage, int atom, int r) const {
        if (atom * bits % 16 == 0)
            chunk = shared_u128(stage + code + (r * KU + atom / 4) * S::unit +
                                atom % 4 * bits / 16 * 512);
    }
    __device__ __forceinline__ uint32_t scales_at(uint32_t stage, int atom, int r) const {
        const int at = FINE || S::units > 1 ? (atom * 16 >> granule_shift) * granule_bytes : 0;
        return stage + scale + r * S::scale_block + at;
    }
    // Its scales over a whole unit, which atom begins.
    __device__ __forceinline__ void packed(dequant_packed &s, uint32_t stage, int atom,
                                           int r) const {
        dequant_load_packed<F>(s, scales_at(stage, atom, r), place, sym);
    }
    // Its scales, where a granule begins.
    __device__ __forceinline__ void scales(dequant_rows &s, uint32_t stage, int atom, int r) const {
        if (!S::scale || (!FINE && atom % 4)) return;
        if (FINE && F == WF_MXFP4 && atom % 2) return;
        if (FINE && F == WF_INT4 && (atom % 4 * 16 & (granule - 1))) return;
        dequant_packed from;
        packed(from, stage, atom, r);
        s = dequant_rows_of<T, F, false>(from);
    }
};

// A warp's operands: fragments in use and next, and what they come from.
template <typename T, int F, int NT, int R, share SH, int KU, bool FINE> struct operands {
    using S = tile<F, NT, R, SH, KU, FINE>;
    using source = reader<T, F, NT, R, SH, KU, FINE>;
    static constexpr int bits = linear_code_bits(F), atoms = 4 * S::units, once = source::atoms;
    static constexpr int n = S::rows / 2;                                // sums of a block
    static constexpr bool sums = F == WF_INT4 && !FINE && S::rows <= 16; // see raw_codes
    static constexpr bool late =
        F == WF_INT4 && !FINE && !sums; // scales unpacked as late as can be
    // Inputs are replaced by the next atom's right after their last use: half the registers, and 4
    // to 8 % faster with 128 x rows a warp, 1 to 2 % with 64, but 3 % slower with three blocks.
    static constexpr bool rolls = S::rows >= 64 && R < 3;
    const source &in;
    uint32_t a[2][4], b[rolls ? 1 : 2][source::words];
    uint4 chunk[R];
    dequant_rows scales[R];
    dequant_packed packed[R];
    float q[sums ? R : 1][sums ? n : 1], x_sum[sums ? n : 1]; // of the unit at hand

    // Of product i: block i % R, atom i / R.
    __device__ __forceinline__ void fragment(int i) {
        const int r = i % R, j = i / R % atoms;
        const uint32_t *word = &reinterpret_cast<const uint32_t *>(&chunk[r])[j * bits % 16 / 4];
        if (sums)
            raw_codes<T>::fragment(a[i % 2], word[0]);
        else
            dequant_word<T, F>(a[i % 2], word, dequant_scales_of(scales[r]));
    }
    __device__ __forceinline__ void begin(uint32_t stage) {
        in.inputs(b[0], stage, 0);
#pragma unroll
        for (int r = 0; r < R; r++) {
            in.codes(chunk[r], stage, 0, r);
            if (!sums) in.scales(scales[r], stage, 0, r);
        }
        fragment(0);
    }
    // Beside product i: what the next atom, of `stage`, needs, and the fragment of i + 1.
    __device__ __forceinline__ void prepare(uint32_t stage, int i) {
        const int r = i % R, next = (i / R + 1) % atoms;
        if (!rolls && r == 0 && next % once == 0) in.inputs(b[next / once % 2], stage, next);
        in.codes(chunk[r], stage, next, r);
        if (late) {
            if (next % 4 == 0) in.packed(packed[r], stage, next, r);
            if (next % 4 == 0 && r == R - 1) { // once the last ones have been used
#pragma unroll
                for (int k = 0; k < R; k++)
                    scales[k] = dequant_rows_of<T, WF_INT4, false>(packed[k]);
            }
        } else if (!sums) {
            in.scales(scales[r], stage, next, r);
        }
        fragment(i + 1);
    }
    __device__ __forceinline__ void multiply_all(float (&acc)[R][n], uint32_t stage, int i) {
        const int r = i % R, j = i / R;
        const uint32_t *x = &b[rolls ? 0 : j / once % 2][j % once * 2];
        const uint32_t one = raw_codes<T>::one, ones[4] = {one, one, one, one};
#pragma unroll
        for (int k = 0; k < S::rows / 8; k++) {
            const uint32_t b0 = x[2 * k], b1 = x[2 * k + 1];
            if constexpr (sums) {
                if (j % 4 == 0) {
                    if (r == 0) multiply_anew<T>(&x_sum[4 * k], ones, b0, b1);
                    multiply_anew<T>(&q[r][4 * k], a[i % 2], b0, b1);
                } else {
                    if (r == 0) multiply(&x_sum[4 * k], ones, b0, b1, T{});
                    multiply(&q[r][4 * k], a[i % 2], b0, b1, T{});
                }
                if (j % 4 == 3)
                    raw_codes<T>::fold(&acc[r][4 * k], &q[r][4 * k], &x_sum[4 * k], packed[r]);
            } else {
                multiply(&acc[r][4 * k], a[i % 2], b0, b1, T{});
            }
            if (rolls && r == R - 1 && k % 2) in.some_inputs(b[0], stage, (j + 1) % atoms, k / 2);
        }
    }
};

// The compiler moves no product over an exit. Steps are not negative, so this one is never taken;
// `less`: below zero, of each another, since it drops what is known to be false.
__device__ __forceinline__ void divide_products(int step, int less) {
    asm volatile("{ .reg .pred p; setp.lt.s32 p, %0, %1; @p exit; }" ::"r"(step), "r"(less));
}

template <typename T, int F, int NT, int R, share SH, int KU, bool FINE, int kStages>
__device__ __forceinline__ void
multiply_segment(float (&acc)[R][NT / (SH == ROWS ? 4 : 2)], const linear_segment &s,
                 loader<T, F, NT, R, SH, KU, FINE> &from,
                 const reader<T, F, NT, R, SH, KU, FINE> &in, uint32_t shared) {
    using S = tile<F, NT, R, SH, KU, FINE>;
    using O = operands<T, F, NT, R, SH, KU, FINE>;
    // The compiler moves no product over a branch, and then has registers enough.
    constexpr bool kApart = S::rows == 128 && (O::bits == 8 || F == WF_NVFP4);
    // Of so many products the compiler puts off the copies until fragments of x that come after
    // them are late, and conversions until they are all in one place.
    constexpr bool kDivided = S::rows == 128 && R > 1 && !kApart;
    uint32_t write = shared + (kStages - 1) * S::bytes, read = shared;
    const auto after = [&](uint32_t stage) {
        return stage == shared + (kStages - 1) * S::bytes ? shared : stage + S::bytes;
    };
    const auto turn = [&] { // the next stage has come, and this one has been read
        copy_wait<kStages - 2>();
        __syncthreads();
        read = after(read);
    };
    O o = {in};
    from.begin_rest();
    copy_wait<kStages - 2>();
    __syncthreads();
    o.begin(read);
#pragma unroll 1
    for (int step = s.step0; step < s.step1; step++) {
        from.load(write, step + kStages - 1 < s.step1);
        write = after(write);
#pragma unroll
        for (int i = 0; i < O::atoms * R; i++) {
            const int r = i % R, j = i / R;
            if (kDivided && (i == 1 || i == 5)) divide_products(step, -1 - i);
            if (O::sums && j % 4 == 0) in.packed(o.packed[r], read, j, r);
            if (r == 0 && j == O::atoms - 1 && (!kApart || step + 1 < s.step1)) turn();
            o.prepare(read, i);
            o.multiply_all(acc, read, i);
        }
    }
    if constexpr (O::sums) finish_units<T>(acc);
    copy_wait<0>();
    __syncthreads();
}

// Sums of what a warp finishes: its own, or, where they are of half of the inputs, those of half of
// the x rows, the first of which the first four warps take: own[r][i] of all inputs.
template <int R, int N, int M>
__device__ __forceinline__ void own_sums(float (&own)[R][M], const float (&acc)[R][N],
                                         float4 *shared) {
    if constexpr (M == N) {
#pragma unroll
        for (int r = 0; r < R; r++)
#pragma unroll
            for (int i = 0; i < N; i++) own[r][i] = acc[r][i];
    } else {
        static_assert(2 * M == N, "");
        const bool second = threadIdx.x >= 128;
        float4 *to = shared + (threadIdx.x ^ 128), *from = shared + threadIdx.x;
#pragma unroll
        for (int r = 0; r < R; r++)
#pragma unroll
            for (int i = 0; i < M; i += 4)
                to[(r * M + i) / 4 * kThreads] =
                    second ? make_float4(acc[r][i], acc[r][i + 1], acc[r][i + 2], acc[r][i + 3])
                           : make_float4(acc[r][M + i], acc[r][M + i + 1], acc[r][M + i + 2],
                                         acc[r][M + i + 3]);
        __syncthreads();
#pragma unroll
        for (int r = 0; r < R; r++)
#pragma unroll
            for (int i = 0; i < M; i += 4) {
                const float4 other = from[(r * M + i) / 4 * kThreads];
                own[r][i] = (second ? acc[r][M + i] : acc[r][i]) + other.x;
                own[r][i + 1] = (second ? acc[r][M + i + 1] : acc[r][i + 1]) + other.y;
                own[r][i + 2] = (second ? acc[r][M + i + 2] : acc[r][i + 2]) + other.z;
                own[r][i + 3] = (second ? acc[r][M + i + 3] : acc[r][i + 3]) + other.w;
            }
        __syncthreads(); // the next tile's first steps come here
    }
}

// Stages of so many bytes in the shared memory of an SM: as many as asked for, with `ctas` CTAs an
// SM if three stages of each fit, else with one. Less than two: not on this GPU.
__host__ __device__ constexpr int stages_of(int bytes, int wanted, int ctas, int sm_bytes) {
    constexpr int others = 10 * 1024; // what is static, and what the system keeps
    const int fit = (sm_bytes / ctas - others) / bytes;
    return fit >= 3 || ctas == 1 ? (fit < wanted ? fit : wanted)
                                 : stages_of(bytes, wanted, 1, sm_bytes);
}
// Shared memory of an SM (CUDA C++ Programming Guide, table of compute capabilities).
constexpr int kSharedLeast = 100 * 1024;
#if !defined(__CUDA_ARCH__) || (__CUDA_ARCH__ >= 900 && __CUDA_ARCH__ < 1200)
constexpr int kSharedBytes = 228 * 1024;
#elif __CUDA_ARCH__ == 800 || __CUDA_ARCH__ == 870
constexpr int kSharedBytes = 164 * 1024;
#else
constexpr int kSharedBytes = kSharedLeast;
#endif
// What the table has from sm_90 on, or where there is more shared memory, needs no code elsewhere.
constexpr bool kSplitHere = kSharedBytes == 228 * 1024, kStrips32Here = kSharedBytes > kSharedLeast;

// The next launch may begin to load its weights; where its tiles and rows come from the launch
// before, this one waits for that. With experts the next may begin only then, since it may read the
// routing at once (linear_problem.routed).
template <int NT>
__device__ __forceinline__ void begin_launch(int32_t *tile_start, const linear_args &p) {
    if (!p.expert_start) launch_dependents();
    if (p.expert_start || p.x_row) wait_for_previous();
    if (p.expert_start) {
        launch_dependents();
        linear_tile_starts<NT>(tile_start, p);
    }
}

template <typename T, int F, int NT, int R, share SH, int KU, int kStages, int kCtas, bool FINE>
__global__ void __launch_bounds__(kThreads, kCtas)
    linear_ampere(const __grid_constant__ linear_args p) {
    using S = tile<F, NT, R, SH, KU, FINE>;
    constexpr int stages = stages_of(S::bytes, kStages, kCtas, kSharedBytes);
    static_assert(linear_part_bytes<S::own, R>(kCtas) <= LINEAR_SUMS_BYTES, "no room for sums");
    static_assert(stages_of(S::bytes, kStages, kCtas, kSharedLeast) >= 2, "not on every GPU");
    static_assert(SH != UNITS || kThreads * R * S::own * 2 <= 2 * S::bytes, "no room for halves");
    extern __shared__ __align__(128) uint8_t shared[];
    __shared__ int32_t tile_start[LINEAR_EXPERTS_MAX + 1];
    __shared__ __align__(16) float turn[LINEAR_WARPS][LINEAR_STAGE_FLOATS];
    __shared__ linear_shared later_of[LINEAR_WARPS];
    begin_launch<NT>(tile_start, p);
    linear_shared_init(&later_of[threadIdx.x / 32]);

    linear_walk<NT, true> walk(p, p.expert_start ? tile_start : nullptr);
    linear_segment s, next;
    loader<T, F, NT, R, SH, KU, FINE> from(p);
    const reader<T, F, NT, R, SH, KU, FINE> in(p);
    const uint32_t ring = (uint32_t)__cvta_generic_to_shared(shared);
    bool more = walk.next(next);
    const auto begin = [&] { // what comes next is on its way while a tile is finished
        from.begin(next, next.step0 * KU);
        from.template load_first<stages - 1>(ring, S::bytes, next.step1 - next.step0);
    };
    if (more) begin();
    while (more) {
        float acc[R][S::rows / 2] = {}, own[R][S::own / 2];
        s = next;
        multiply_segment<T, F, NT, R, SH, KU, FINE, stages>(acc, s, from, in, ring);
        own_sums(own, acc, reinterpret_cast<float4 *>(shared));
        more = walk.next(next);
        if (more) begin();
        const unsigned thread =
            decltype(from)::kAnew ? (unsigned)linear_thread_anew() : threadIdx.x;
        const int warp = thread / 32;
        if (SH != BLOCKS) s.m0 += warp / 4 * S::own; // what is this warp's
        if (s.step1 - s.step0 == p.steps ||
            linear_share<S::own, R>(own, p, walk, s, &later_of[warp]))
            linear_finish<T, S::own, R, S::groups>(own, p, s, turn[warp], thread);
    }
    const int warp = threadIdx.x / 32;
    linear_finish_all<T, S::own, R, S::groups>(p, &later_of[warp], turn[warp]);
}

// Of an SM.
status shared_bytes(int *bytes) {
    int device = 0;
    cudaError_t e = cudaGetDevice(&device);
    if (e == cudaSuccess)
        e = cudaDeviceGetAttribute(bytes, cudaDevAttrMaxSharedMemoryPerMultiprocessor, device);
    return e == cudaSuccess ? ST_OK : FAIL(ST_DEVICE, "linear_ampere: %s", cudaGetErrorString(e));
}

// `bytes` of a stage; `least`: of all.
template <typename K>
status launch_stages(K kernel, int bytes, int least, int wanted, int ctas, const linear_args *args,
                     int32_t n_sms, int32_t per_sm, kernel_stream stream, int threads = kThreads) {
    int sm_bytes = 0, fit = 0;
    TRY(shared_bytes(&sm_bytes));
    const int stages = stages_of(bytes, wanted, ctas, sm_bytes);
    if (stages < 2)
        return FAIL(ST_UNSUPPORTED, "linear_ampere: stages of %d bytes in %d", bytes, sm_bytes);
    const int all = stages * bytes > least ? stages * bytes : least;
    cudaError_t e = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, all);
    if (e == cudaSuccess)
        e = cudaOccupancyMaxActiveBlocksPerMultiprocessor(&fit, kernel, threads, (size_t)all);
    if (e == cudaSuccess) {
        const int grid =
            n_sms * (per_sm < fit ? per_sm : fit); // all at once: they wait for each other
        const launch_config l(dim3((unsigned)grid), dim3((unsigned)threads), (size_t)all, stream,
                              early_launches());
        e = cudaLaunchKernelEx(&l.config, kernel, *args);
    }
    return e == cudaSuccess ? ST_OK : FAIL(ST_DEVICE, "linear_ampere: %s", cudaGetErrorString(e));
}

template <typename T, int F, int NT, int R, share SH, int KU, int kStages, int kCtas, bool FINE>
status launch(const linear_args *args, int32_t n_sms, int32_t per_sm, kernel_stream stream) {
    return launch_stages(linear_ampere<T, F, NT, R, SH, KU, kStages, kCtas, FINE>,
                         tile<F, NT, R, SH, KU, FINE>::bytes, 0, kStages, kCtas, args, n_sms,
                         per_sm, stream);
}

// --- Few rows: the warps of a CTA share out the inputs -----------------------------------------
// A tile is R blocks, a step LINEAR_WARPS units, one a warp, through a ring of the warp's own: no
// barrier but at a tile's end, where the warps' sums meet in shared memory. So a small matrix fills
// the GPU with few CTAs a tile.

// acc[strip] += one unit of so many strips, which lie in `stage` as S has it.
template <typename T, int F, int NT, int STRIPS, bool FINE, typename S>
__device__ __forceinline__ void multiply_unit(float (&acc)[STRIPS][NT / 2], const linear_args &p,
                                              uint32_t stage) {
    constexpr int bits = linear_code_bits(F);
    constexpr bool kSums = F == WF_INT4 && !FINE;
    const int lane = threadIdx.x % 32;
    const int row = NT == 8 ? lane % 8 : lane / 16 * 8 + lane % 8;
    const int chunk_x = NT == 8 ? lane / 8 : lane / 8 % 2;
    const uint32_t x = stage + S::code + row * 128 + ((chunk_x ^ row % 8) << 4);
    uint32_t b[4][NT / 4];
    float x_sum[NT / 2];
    if (NT == 8) {
        load_matrices(&b[0][0], x);
        load_matrices(&b[2][0], x ^ 64);
    }
#pragma unroll
    for (int j = 0; j < 4; j++) {
#pragma unroll
        for (int i = 0; i < NT / 16; i++) load_matrices(&b[j][4 * i], (x ^ j * 32) + i * 2048);
        if (!kSums) continue;
        const uint32_t ones[4] = {raw_codes<T>::one, raw_codes<T>::one, raw_codes<T>::one,
                                  raw_codes<T>::one};
#pragma unroll
        for (int n = 0; n < NT / 8; n++) {
            if (j == 0)
                multiply_anew<T>(&x_sum[4 * n], ones, b[j][2 * n], b[j][2 * n + 1]);
            else
                multiply(&x_sum[4 * n], ones, b[j][2 * n], b[j][2 * n + 1], T{});
        }
    }
#pragma unroll
    for (int i = 0; i < STRIPS; i++) { // block i / 4, strip i % 4
        uint4 chunk;
        dequant_scales scales;
        dequant_packed packed;
        float q[NT / 2];
        const int place = i % 4 * 16 + lane / 4 * 2;
        const uint32_t scale = stage + S::code + S::x + i / 4 * S::scale_block;
        if (kSums) dequant_load_packed<F>(packed, scale, place, p.sym);
#pragma unroll
        for (int j = 0; j < 4; j++) {
            if (j * bits % 16 == 0)
                chunk = shared_u128(stage + i * (S::unit / 4) + j * bits / 16 * 512 + lane * 16);
            const uint32_t *word = &reinterpret_cast<const uint32_t *>(&chunk)[j * bits % 16 / 4];
            uint32_t a[4];
            if (kSums) {
                raw_codes<T>::fragment(a, word[0]);
            } else {
                if (S::scale && (j == 0 || (FINE && (j * 16 & (p.granule - 1)) == 0)))
                    dequant_load_scales<T, F>(
                        scales, scale + (FINE ? (j * 16 >> p.granule_shift) * p.granule_bytes : 0),
                        place, p.sym);
                dequant_word<T, F>(a, word, scales);
            }
#pragma unroll
            for (int n = 0; n < NT / 8; n++) {
                if (kSums && j == 0)
                    multiply_anew<T>(&q[4 * n], a, b[j][2 * n], b[j][2 * n + 1]);
                else
                    multiply(kSums ? &q[4 * n] : &acc[i][4 * n], a, b[j][2 * n], b[j][2 * n + 1],
                             T{});
            }
        }
        if (kSums)
#pragma unroll
            for (int n = 0; n < NT / 8; n++)
                raw_codes<T>::fold(&acc[i][4 * n], &q[4 * n], &x_sum[4 * n], packed);
    }
}

// The sums of all warps, added in order: warp w gets strip w % 4 of every block, and the half w / 4
// of the x rows.
template <int NT, int R>
__device__ __forceinline__ void add_warps(float (&sum)[R][NT / 4],
                                          const float (&acc)[R * 4][NT / 2], float4 *shared) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    __syncthreads();
#pragma unroll
    for (int i = 0; i < R * 4; i++)
#pragma unroll
        for (int n = 0; n < NT / 8; n++)
            shared[((warp * R * 4 + i) * (NT / 8) + n) * 32 + lane] =
                make_float4(acc[i][4 * n], acc[i][4 * n + 1], acc[i][4 * n + 2], acc[i][4 * n + 3]);
    __syncthreads();
#pragma unroll
    for (int r = 0; r < R; r++)
#pragma unroll
        for (int n = 0; n < NT / 16; n++) {
            float *to = &sum[r][4 * n];
            to[0] = to[1] = to[2] = to[3] = 0.f;
#pragma unroll
            for (int w = 0; w < LINEAR_WARPS; w++) {
                const float4 v =
                    shared[((w * R * 4 + r * 4 + warp % 4) * (NT / 8) + warp / 4 * (NT / 16) + n) *
                               32 +
                           lane];
                to[0] += v.x, to[1] += v.y, to[2] += v.z, to[3] += v.w;
            }
        }
    __syncthreads();
}

template <typename T, int F, int NT, int R, int kStages, int kCtas, bool FINE>
__global__ void __launch_bounds__(kThreads, kCtas)
    linear_ampere_split(const __grid_constant__ linear_args p) {
    using S = tile<F, NT, R, ROWS, 1, FINE>;
    constexpr int fit = stages_of(LINEAR_WARPS * S::bytes, kStages, kCtas, kSharedBytes);
    constexpr int stages = fit < 2 ? 2 : fit; // never launched where two do not fit
    if (!kSplitHere) return;
    extern __shared__ __align__(128) uint8_t shared[];
    __shared__ int32_t tile_start[LINEAR_EXPERTS_MAX + 1];
    __shared__ __align__(16) float turn[LINEAR_WARPS][LINEAR_STAGE_FLOATS];
    __shared__ linear_shared later_of[LINEAR_WARPS];
    begin_launch<NT>(tile_start, p);
    const int warp = threadIdx.x / 32;
    linear_shared *later = &later_of[warp];
    linear_shared_init(later);
    const uint32_t ring = (uint32_t)__cvta_generic_to_shared(shared) + warp * stages * S::bytes;

    linear_walk<NT, true> walk(p, p.expert_start ? tile_start : nullptr);
    linear_segment s;
    loader<T, F, NT, R, ROWS, 1, FINE, 32, LINEAR_WARPS> from(p);
    while (walk.next(s)) {
        float acc[R * 4][NT / 2] = {}, sum[R][NT / 4];
        from.begin(s, s.step0 * LINEAR_WARPS + warp);
        from.template load_first<stages - 1>(ring, S::bytes, s.step1 - s.step0);
        uint32_t read = ring, write = ring + (stages - 1) * S::bytes;
#pragma unroll 1
        for (int step = s.step0; step < s.step1; step++) {
            copy_wait<stages - 2>();
            __syncwarp(); // this unit has come, and the last one has been read
            from.load(write, step + stages - 1 < s.step1);
            write = write == ring + (stages - 1) * S::bytes ? ring : write + S::bytes;
            if (step * LINEAR_WARPS + warp < p.units)
                multiply_unit<T, F, NT, R * 4, FINE, S>(acc, p, read);
            read = read == ring + (stages - 1) * S::bytes ? ring : read + S::bytes;
        }
        copy_wait<0>();
        add_warps<NT, R>(sum, acc, reinterpret_cast<float4 *>(shared));
        if (F == WF_INT4 && !FINE) finish_units<T>(sum);
        s.m0 += warp / 4 * (NT / 2); // what is this warp's
        if (s.step1 - s.step0 == p.steps || linear_share<NT / 2, R>(sum, p, walk, s, later))
            linear_finish<T, NT / 2, R, 1>(sum, p, s, turn[warp]);
    }
    linear_finish_all<T, NT / 2, R, 1>(p, later, turn[warp]);
}

template <typename T, int F, int NT, int R, int kStages, int kCtas, bool FINE>
status launch_split(const linear_args *args, int32_t n_sms, int32_t per_sm, kernel_stream stream) {
    return launch_stages(linear_ampere_split<T, F, NT, R, kStages, kCtas, FINE>,
                         LINEAR_WARPS * tile<F, NT, R, ROWS, 1, FINE>::bytes,
                         LINEAR_WARPS * R * 64 * NT * 4, kStages, kCtas, args, n_sms, per_sm,
                         stream);
}

// --- Few rows, small matrices: whole tiles of a few strips ---------------------------------------
// A tile is up to four strips of W and all of K, so that every SM has one, or few, and no sums
// travel between CTAs. Warps take units in turn, each through a ring of its own.

enum { kStripStages = 8 }; // at most

template <int F, int NT, int STRIPS, bool FINE> struct strips_stage {
    static constexpr int unit = 512 * linear_code_bits(F), code = STRIPS * unit / 4, x = NT * 128;
    static constexpr int scale_block = unit_scale_bytes(F, FINE), scale = scale_block;
    static constexpr int bytes = (code + x + scale + 127) / 128 * 128;
};

// Strip i of a tile: of gated ones the second half are the up rows of the first half. -1: none.
template <int STRIPS>
__device__ __forceinline__ int32_t strip_of(const linear_args &p, int32_t tile, int i) {
    if (p.paired) {
        const int32_t at = tile * (STRIPS / 2) + i % (STRIPS / 2 ? STRIPS / 2 : 1);
        return at < p.half_blocks * 4 ? at + i / (STRIPS / 2 ? STRIPS / 2 : 1) * p.half_blocks * 4
                                      : -1;
    }
    const int32_t at = tile * STRIPS + i;
    return at < p.blocks * 4 ? at : -1;
}

template <typename T, int F, int NT, int STRIPS, int W, bool FINE> struct strips_loader {
    using S = strips_stage<F, NT, STRIPS, FINE>;
    static constexpr uint32_t kNone = ~0u;
    static constexpr int kParts = F == WF_INT4 ? 3 : 1; // 16 bytes of scales, strip and granule
    static constexpr int kGranules = !FINE ? 1 : F == WF_MXFP4 ? 2 : 4; // of a unit, at most
    static constexpr int kScale = (STRIPS * kParts * kGranules + 31) / 32;
    const linear_args &p;
    uint32_t code_at[STRIPS], x_at, x_to, scale_at[kScale], scale_to[kScale];
    int unit, rows; // rows: of x, from this lane's first on

    __device__ __forceinline__ explicit strips_loader(const linear_args &p) : p(p) {
        const int chunk = threadIdx.x % 8, row = threadIdx.x % 32 / 8;
        x_to = S::code + row * 128 + ((chunk ^ row) << 4);
    }
    __device__ __forceinline__ void begin(int32_t tile, int32_t m0) {
        const int lane = threadIdx.x % 32;
        x_at = (uint32_t)((m0 + lane / 8) * (p.ldx / 8)) + lane % 8;
        rows = p.m - m0 - lane / 8;
        unit = threadIdx.x / 32;
#pragma unroll
        for (int i = 0; i < STRIPS; i++) {
            const int32_t strip = strip_of<STRIPS>(p, tile, i);
            code_at[i] = strip < 0 ? kNone
                                   : (uint32_t)(strip / 4 * p.units) * (S::unit / 16) +
                                         strip % 4 * (S::unit / 64) + lane;
        }
        const int n_granules = max(1, 64 >> p.granule_shift);
#pragma unroll
        for (int k = 0; k < kScale; k++) {
            const int i = lane + 32 * k, part = i % kParts, s = i / kParts % STRIPS,
                      j = i / kParts / STRIPS;
            const int32_t strip = strip_of<STRIPS>(p, tile, s);
            const bool want = strip >= 0 && j < n_granules && !(part == 2 && p.sym);
            const int in = F != WF_INT4 ? 0 : part == 2 ? 8 : part; // 16 bytes
            const int of = F == WF_INT4 && part < 2 ? 2 : 1;        // of a strip
            scale_at[k] = want ? (uint32_t)((strip / 4 * p.granules + j) * (p.granule_bytes / 16)) +
                                     in + strip % 4 * of
                               : kNone;
            scale_to[k] = S::code + S::x + j * p.granule_bytes + (in + s * of) * 16;
        }
    }
    __device__ __forceinline__ void load_weights(uint32_t to, int unit) const {
        const bool wanted = unit < p.units;
#pragma unroll
        for (int i = 0; i < STRIPS; i++)
            copy16(to + i * 512 + threadIdx.x % 32 * 16,
                   p.code + (uint64_t)(code_at[i] + unit * (S::unit / 16)) * 16, true,
                   wanted && code_at[i] != kNone);
        const int32_t row0 = unit * 64 >> p.granule_shift;
#pragma unroll
        for (int k = 0; k < kScale; k++)
            copy16(to + scale_to[k],
                   p.scale + (uint64_t)(scale_at[k] + row0 * (p.granule_bytes / 16)) * 16, true,
                   wanted && scale_at[k] != kNone);
    }
    __device__ __forceinline__ void load_x(uint32_t to, int unit) const {
        const int lane = threadIdx.x % 32;
        const bool there = unit * 64 + lane % 8 * 8 < p.k, wanted = unit < p.units;
#pragma unroll
        for (int i = 0; i < NT / 4; i++)
            copy16((to + x_to + i * 512) ^ (i % 2 * 64),
                   static_cast<const uint8_t *>(p.x) +
                       (uint64_t)(x_at + i * (uint32_t)(p.ldx / 2) + unit * 8) * 16,
                   there, wanted && 4 * i < rows);
    }
    template <int STEPS> __device__ __forceinline__ void load_first(uint32_t to) {
#pragma unroll
        for (int i = 0; i < STEPS; i++) load_weights(to + i * S::bytes, unit + i * W);
        wait_for_previous();
#pragma unroll
        for (int i = 0; i < STEPS; i++) {
            load_x(to + i * S::bytes, unit + i * W);
            copy_commit();
        }
        unit += STEPS * W;
    }
    __device__ __forceinline__ void load(uint32_t to) {
        load_weights(to, unit);
        load_x(to, unit);
        copy_commit();
        unit += W;
    }
};

// Sums of all warps lie in `sums` [W][STRIPS][NT][20], of which 16 are used: added in order,
// finished and written, four outputs of a row of x a thread.
template <typename T, int NT, int STRIPS, int W>
__device__ __forceinline__ void finish_strips(const linear_args &p, int32_t tile, int32_t m0,
                                              const float *sums) {
    const auto sum = [&](int s, int m) {
        float4 v = {0.f, 0.f, 0.f, 0.f};
#pragma unroll
        for (int w = 0; w < W; w++) {
            const float4 u = *reinterpret_cast<const float4 *>(
                sums + ((w * STRIPS + s) * NT + m) * 20 + threadIdx.x % 4 * 4);
            v.x += u.x, v.y += u.y, v.z += u.z, v.w += u.w;
        }
        return v;
    };
    const int n = p.paired ? STRIPS / 2 : STRIPS; // strips of outputs
    for (int i = threadIdx.x; i < n * NT * 4; i += 32 * W) {
        const int s = i / 4 % n, m = i / 4 / n;
        const int32_t strip = strip_of<STRIPS>(p, tile, s);
        if (strip < 0 || m0 + m >= p.m) continue;
        const int32_t half = strip >= p.half_blocks * 4;
        const int32_t in_half = (strip - half * p.half_blocks * 4) * 16;
        if (in_half >= p.half_rows) continue;
        const int32_t col = half * p.half_rows + in_half + threadIdx.x % 4 * 4;
        float4 v = linear_affine(sum(s, m), linear_outputs_of<T>(p, 0, strip / 4, col, strip % 4));
        if (p.paired) {
            const int32_t up = strip + p.half_blocks * 4;
            const float4 u = linear_affine(
                sum(s + n, m), linear_outputs_of<T>(p, 0, up / 4, col + p.half_rows, up % 4));
            v = linear_gate_all(v, u, p);
        }
        linear_put<T>(p, m0 + m, col, v);
    }
}

__host__ __device__ inline int32_t strip_tiles(const linear_args &p, int strips) {
    return p.paired ? (p.half_blocks * 4 + strips / 2 - 1) / (strips / 2)
                    : (p.blocks * 4 + strips - 1) / strips;
}

template <typename T, int F, int NT, int STRIPS, int W, bool FINE>
__global__ void __launch_bounds__(32 * W, 1)
    linear_ampere_strips(const __grid_constant__ linear_args p) {
    using S = strips_stage<F, NT, STRIPS, FINE>;
    constexpr int fit = stages_of(W * S::bytes, kStripStages, 1, kSharedBytes);
    constexpr int stages = fit < 2 ? 2 : fit; // never launched where two do not fit
    if (NT == 32 && !kStrips32Here) return;
    extern __shared__ __align__(128) uint8_t shared[];
    launch_dependents();
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const uint32_t ring = (uint32_t)__cvta_generic_to_shared(shared) + warp * stages * S::bytes;
    float *sums = reinterpret_cast<float *>(shared);
    const int32_t tiles_m = (p.m + NT - 1) / NT, tiles = strip_tiles(p, STRIPS) * tiles_m;
    strips_loader<T, F, NT, STRIPS, W, FINE> from(p);
    for (int32_t at = blockIdx.x; at < tiles; at += gridDim.x) {
        const int32_t tile = at / tiles_m, m0 = at % tiles_m * NT; // neighbours share weights
        float acc[STRIPS][NT / 2] = {};
        from.begin(tile, m0);
        from.template load_first<stages - 1>(ring);
        uint32_t read = ring, write = ring + (stages - 1) * S::bytes;
#pragma unroll 1
        for (int unit = warp; unit < p.units; unit += W) {
            copy_wait<stages - 2>();
            __syncwarp(); // this unit has come, and the last one has been read
            from.load(write);
            write = write == ring + (stages - 1) * S::bytes ? ring : write + S::bytes;
            multiply_unit<T, F, NT, STRIPS, FINE, S>(acc, p, read);
            read = read == ring + (stages - 1) * S::bytes ? ring : read + S::bytes;
        }
        copy_wait<0>();
        if (F == WF_INT4 && !FINE) finish_units<T>(acc);
        __syncthreads();
#pragma unroll
        for (int i = 0; i < STRIPS; i++)
#pragma unroll
            for (int k = 0; k < NT / 2; k++) {
                const int m = k / 4 * 8 + lane % 4 * 2 + k % 2, row = lane / 4 + k / 2 % 2 * 8;
                sums[((warp * STRIPS + i) * NT + m) * 20 + row] = acc[i][k];
            }
        __syncthreads();
        finish_strips<T, NT, STRIPS, W>(p, tile, m0, sums);
        if (at + (int)gridDim.x < tiles) __syncthreads();
    }
}

// Of tiles of two, three or four strips those that keep the SMs busy for the shortest time, the
// larger of equals.
template <typename T, int F, int NT, int W, bool FINE>
status launch_strips(const linear_args *args, int32_t n_sms, int32_t per_sm, kernel_stream stream) {
    static const struct {
        void (*kernel)(linear_args);
        int strips, bytes, sums;
    } sizes[] = {
#define SIZE(STRIPS)                                                                               \
    {linear_ampere_strips<T, F, NT, STRIPS, W, FINE>, STRIPS,                                      \
     W * strips_stage<F, NT, STRIPS, FINE>::bytes, W * STRIPS * NT * 80}
        SIZE(4), SIZE(3), SIZE(2)
#undef SIZE
    };
    static_assert(NT == 32 || stages_of(W * strips_stage<F, NT, 2, FINE>::bytes, kStripStages, 1,
                                        kSharedLeast) >= 2,
                  "not on every GPU");
    int sm_bytes = 0, best = -1, least = 0;
    TRY(shared_bytes(&sm_bytes));
    for (int i = 0; i < 3; i++) {
        const int strips = sizes[i].strips;
        if ((args->paired && strips % 2) ||
            stages_of(sizes[i].bytes, kStripStages, 1, sm_bytes) < 2)
            continue;
        const int tiles = strip_tiles(*args, strips) * ((args->m + NT - 1) / NT);
        const int time = (tiles + n_sms - 1) / n_sms * strips;
        if (best < 0 || time < least) best = i, least = time;
    }
    if (best < 0) return FAIL(ST_UNSUPPORTED, "linear_ampere: strips of %d rows of x", NT);
    return launch_stages(sizes[best].kernel, sizes[best].bytes, sizes[best].sums, kStripStages, 1,
                         args, n_sms, per_sm, stream, 32 * W);
}

constexpr int units_of(int f, int at_4_bits, share sh) {
    const int least = sh == UNITS ? 2 : 1;
    return at_4_bits * 4 > least * linear_code_bits(f) ? at_4_bits * 4 / linear_code_bits(f)
                                                       : least;
}
// What a granule may be; formats that have one granule take any row.
constexpr int granule_least(int f, bool fine) { return f == WF_INT4 ? (fine ? 16 : 64) : 0; }
constexpr int granule_most(int f, bool fine) { return f == WF_INT4 ? (fine ? 32 : 128) : 0; }

#define T_F16  __half
#define T_BF16 __nv_bfloat16
#define ROW(NAME, F, T, NT, R, SH, KU4, STAGES, CTAS, FINE)                                        \
    {NAME,                                                                                         \
     80,                                                                                           \
     SM_ANY,                                                                                       \
     WF_##F,                                                                                       \
     DT_##T,                                                                                       \
     NT,                                                                                           \
     SH == BLOCKS ? R * 2 : R,                                                                     \
     units_of(WF_##F, KU4, SH),                                                                    \
     granule_least(WF_##F, FINE),                                                                  \
     granule_most(WF_##F, FINE),                                                                   \
     CTAS,                                                                                         \
     launch<T_##T, WF_##F, NT, R, SH, units_of(WF_##F, KU4, SH), STAGES, CTAS, FINE>,              \
     0,                                                                                            \
     SH != BLOCKS},
#define SPLIT_ROW(NAME, F, T, NT, R, STAGES, CTAS, FINE, SM_MIN, SM_MAX)                           \
    {NAME,                                                                                         \
     SM_MIN,                                                                                       \
     SM_MAX,                                                                                       \
     WF_##F,                                                                                       \
     DT_##T,                                                                                       \
     NT,                                                                                           \
     R,                                                                                            \
     LINEAR_WARPS,                                                                                 \
     granule_least(WF_##F, FINE),                                                                  \
     granule_most(WF_##F, FINE),                                                                   \
     CTAS,                                                                                         \
     launch_split<T_##T, WF_##F, NT, R, STAGES, CTAS, FINE>,                                       \
     0,                                                                                            \
     true},
#define STRIPS_ROW(NAME, F, T, NT, W, ROWS, FINE, SM_MIN, SM_MAX)                                  \
    {NAME,                                                                                         \
     SM_MIN,                                                                                       \
     SM_MAX,                                                                                       \
     WF_##F,                                                                                       \
     DT_##T,                                                                                       \
     NT,                                                                                           \
     2,                                                                                            \
     W,                                                                                            \
     granule_least(WF_##F, FINE),                                                                  \
     granule_most(WF_##F, FINE),                                                                   \
     1,                                                                                            \
     launch_strips<T_##T, WF_##F, NT, W, FINE>,                                                    \
     ROWS,                                                                                         \
     true},
enum { SM_ANY = 999 };
const linear_variant rows[] = {AMPERE_STRIPS_INSTANCES(STRIPS_ROW) AMPERE_SPLIT_INSTANCES(SPLIT_ROW)
                                   AMPERE_INSTANCES(ROW)};

} // namespace

extern "C" linear_table linear_ampere_table(void) {
    return linear_table{rows, (int32_t)(sizeof rows / sizeof rows[0])};
}
