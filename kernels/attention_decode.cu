// attention_decode.cu - one token a sequence: the cache is read once, at the rate of the memory.
//
// The heads of a group are the 8 columns of the mma tile and tokens its 16 rows:
//
//     S^T [16 tokens, 8 heads] = K [16, D] q^T [D, 8]
//     O^T [16 dims, 8 heads] += V^T [16, 16] P^T [16, 8]
//
// so that a group of up to 8 heads costs one pass over the cache. K and V stay codes. What remains
// of value = c * s + z is per token and goes into the scores (q.K = s (q.c) + z sum(q)) and into
// the weights (p.V = (p s).c + sum(p z)). Integer codes of K are multiplied as bytes, by a q of two
// signed bytes. Those of V are placed in the low bits of an fp16, the subnormal c * 2^-24, exactly,
// so that "conversion" is one AND, and counted from their middle (p s).(c - m) through one further
// mma with a constant row, since (p s) rounds to fp16 and its error would otherwise be multiplied
// by m. For e4m3 q is multiplied by a power of two so that it is exact in fp16 whatever the model's
// type.
//
// Rows of K and columns of V come from shared memory by ldmatrix on raw bytes. A lane then holds 2
// or 4 neighbouring codes; which dims those are is undone by permuting q once, and the result at
// the end.
//
// A block is four warps, two blocks an SM. Each warp decodes pages of its own through its own ring
// in shared memory. A unit of UT tokens lies there in R entries of K and parameters and R of V, or,
// at 4 bit, in one of both; whoever has read an entry fills it again with what comes `stages`
// entries later, across leaves, runs and sequences (attention_plan.h). The four meet at the end of
// a leaf, add up their results, a quarter of the dims each, and join the sum to the run's so far. A
// tile whose leaves are all of one run goes to `out` from registers. Otherwise the run that has
// leaf 0 leaves its sum, and the others leave every leaf, as records; the block that completes the
// count joins them in order. So a result is ((leaf 0 + leaf 1) + leaf 2) + ... however the leaves
// fell to blocks. Tiles of short sequences are not shared: a warp does one alone (`lone`).
#include "attention_device.cuh"
#include <cstddef>

namespace {

constexpr int kWarps = 4;
constexpr int kThreads = 32 * kWarps;
constexpr int kStride = kWarps * kPage; // tokens from a warp's page to its next
constexpr int kFold = 4;                // of how many pages the last folds: move_state

// Heads of a tile, H: 4, 8 or 16. They are the columns of NT mma tiles, of each of which a lane has
// two neighbours: NJ heads, two, or where there are four at most one, so that no lane is without.
template <int H> constexpr int NT = H > 8 ? 2 : 1;
template <int H> constexpr int NJ = H > 4 ? 2 : 1;

// What K and V may be in an instance. The common pairs of formats are constants there: the code of
// the others costs time even where it is jumped over.
enum kv_class { KV_4, KV_8, KV_FP8, K8_V4, CODES, KV_16, ANY };
__host__ __device__ constexpr bool has_16(kv_class c) { return c == KV_16 || c == ANY; }

// Tokens of a ring entry: 8 KB of codes, or 4 KB where more tokens at once take the registers, but
// 16 tokens or more; half as many where two tiles of heads share the registers.
constexpr int clamp_tokens(int n) { return n > kPage ? kPage : n < 16 ? 16 : n; }
template <int D, int H, kv_class C>
constexpr int entry_tokens = clamp_tokens((C == KV_4 || (C < CODES && D <= 128 && H <= 8) ? 8192
                                           : C == ANY                                     ? 2048
                                                                                          : 4096) /
                                          (D * NT<H>));
// Entries of K, and as many of V, that are attended at once, a unit: its chain of latencies is
// nearly as long as that of one. Each is filled again as soon as it has been read.
template <int D, int H, kv_class C>
constexpr int unit_entries = D <= 128 && NT<H> == 1 && entry_tokens<D, H, C> < kPage ? 2 : 1;
template <int D, int H, kv_class C>
constexpr int unit_tokens = entry_tokens<D, H, C> *unit_entries<D, H, C>;

// Entries of V are half as long as those of K: slots are of either in turn, where that makes room
// for more.
template <int D, int H, kv_class C> constexpr bool in_turn = C == K8_V4 &&D == 128 && H == 4;

// Bytes of a ring entry's parts and of a page's, and where things are in block memory.
struct decode_layout {
    int k_bytes, v_bytes, k_param, v_param_bytes;     // of an entry
    int head_bytes, param_bytes, v_code, v_param;     // attention_layout
    int stages, slot_bytes;                           // of a warp's ring
    int odd_bytes;                                    // in turn: an odd slot, of V, begins later
    int q_slots, q_bytes;                             // of tiles to come
    int q_at, joint_at, sums_at, all_at, barriers_at; // after the rings
    int bytes;                                        // of all
};

struct decode_arguments {
    void *out;       // [T, H D]
    const void *qkv; // [T, (H + 2G) D]
    const void *sinks;
    const uint8_t *base;
    int64_t page_bytes;
    int param_base; // attention_layout
    kv_format k, v;
    const attention_run *runs;
    float *partial; // see attention_plan.h
    const int32_t *page;
    int n_heads, n_kv_heads, ratio, n_tiles; // n_tiles: of a group
    bool bf16;                               // q, out and sinks; fp16 otherwise
    float scale;                             // times log2(e)
    float odd;    // 16 where V has 4 bits, else 1: what codes at rows 8 .. 15 of a tile come times
    int quarters; // of the lanes of four whose columns are heads
    decode_layout at;
};

// Formats of an instance, constants where there is one; may they be f?
constexpr int kOpen = -1;
__host__ __device__ constexpr int only_k(kv_class c) {
    return c == KV_4     ? KF_4
           : c == KV_8   ? KF_8
           : c == KV_FP8 ? KF_FP8
           : c == K8_V4  ? KF_8
           : c == KV_16  ? KF_16
                         : kOpen;
}
__host__ __device__ constexpr int only_v(kv_class c) { return c == K8_V4 ? KF_4 : only_k(c); }
__host__ __device__ constexpr bool may_be(kv_class c, int only, kv_format f) {
    return only == kOpen ? c == ANY || f != KF_16 : only == f;
}
// Codes that are integers have a minimum beside the scale.
__host__ __device__ constexpr bool is_integer(kv_format f) { return f == KF_8 || f == KF_4; }
__host__ __device__ constexpr bool may_be_integer(kv_class c, int only) {
    return may_be(c, only, KF_8) || may_be(c, only, KF_4);
}
template <kv_class C> __device__ __forceinline__ kv_format k_format(const decode_arguments &a) {
    return only_k(C) == kOpen ? a.k : (kv_format)only_k(C);
}
template <kv_class C> __device__ __forceinline__ kv_format v_format(const decode_arguments &a) {
    return only_v(C) == kOpen ? a.v : (kv_format)only_v(C);
}

__device__ __forceinline__ float load16(const void *p, int64_t at, bool bf16) {
    return bf16 ? __bfloat162float(((const __nv_bfloat16 *)p)[at])
                : __half2float(((const __half *)p)[at]);
}

// --- Codes to fp16 pairs ------------------------------------------------------------------------

#if __CUDA_ARCH__ >= 890
// Two e4m3 in neighbouring bytes to fp16.
__device__ __forceinline__ uint32_t e4m3_neighbours(uint32_t x) {
    uint32_t y;
    asm("cvt.rn.f16x2.e4m3x2 %0, %1;" : "=r"(y) : "h"((uint16_t)x));
    return y;
}
#else
// Two e4m3 in bytes 1 and 3 to fp16 * 2^-8.
__device__ __forceinline__ uint32_t e4m3_pair(uint32_t x) {
    return (x & 0x80008000u) | (x >> 1 & 0x3f803f80u);
}
#endif
// Bytes 0, 2 and 1, 3 of x to fp16 pairs.
template <kv_format F>
__device__ __forceinline__ void bytes_apart(uint32_t &even, uint32_t &odd, uint32_t x) {
    if (F == KF_8) {
        even = x & 0x00ff00ffu;
        odd = __byte_perm(x, 0, 0x4341);
    } else {
#if __CUDA_ARCH__ >= 890
        const uint32_t y = __byte_perm(x, 0, 0x3120);
        even = e4m3_neighbours(y);
        odd = e4m3_neighbours(y >> 16);
#else
        even = e4m3_pair(x << 8);
        odd = e4m3_pair(x);
#endif
    }
}
// The same where the order is free: for e4m3 bytes 0, 1 and 2, 3.
template <kv_format F>
__device__ __forceinline__ void bytes_to_pairs(uint32_t &first, uint32_t &second, uint32_t x) {
#if __CUDA_ARCH__ >= 890
    if (F == KF_FP8) {
        first = e4m3_neighbours(x);
        second = e4m3_neighbours(x >> 16);
        return;
    }
#endif
    bytes_apart<F>(first, second, x);
}

#if __CUDA_ARCH__ >= 890
constexpr bool kNeighbours = true; // e4m3 is converted by neighbours, to its own value
#else
constexpr bool kNeighbours = false;
#endif

// What a pair in a register stands for, over its fp16 value.
__device__ __forceinline__ float code_unit(kv_format f) {
    return f == KF_16 ? 1.f : f == KF_FP8 ? (kNeighbours ? 1.f : 256.f) : 16777216.f;
}

// --- Addresses ----------------------------------------------------------------------------------

// Lane's offset for ldmatrix over 16 tokens and a pair of 16-byte pieces, 8 tokens by one piece a
// matrix. TOKENS_FIRST: matrices 0, 1 are the token halves of the first piece (rows of K); else the
// two pieces of the first token half (columns of V).
template <int ROW, bool TOKENS_FIRST> __device__ __forceinline__ uint32_t lane_offset(int lane) {
    constexpr int PANEL = ROW < 128 ? ROW : 128, PIECES = PANEL / 16, SHARE = 128 / PANEL;
    const int matrix = lane / 8, r = lane % 8;
    const int half = TOKENS_FIRST ? matrix & 1 : matrix >> 1;
    const int piece = TOKENS_FIRST ? matrix >> 1 : matrix & 1;
    return half * 8 * ROW + r * PANEL + ((piece ^ (r / SHARE % PIECES)) * 16);
}
template <int ROW> __device__ __forceinline__ uint32_t pair_offset(uint32_t lane_at, int pair) {
    constexpr int PANEL = ROW < 128 ? ROW : 128, PAIRS = PANEL / 32;
    return (lane_at ^ (pair % PAIRS * 32)) + pair / PAIRS * 8 * PANEL;
}

// --- q -------------------------------------------------------------------------------------------

// One warp's q^T fragments in the order in which format K's rows come: of f16 [D / 16][NT][2], of
// digits [D / 32][NT * NJ][2]. For codes the scale and what the sums over q are.
template <int D, int H> struct query {
    uint32_t b[D / 8 * NT<H>];
    // Of this lane's columns, a head each, so that no head's bits hang on another's q:
    float scale[NT<H>][NJ<H>]; // of a product of codes, to a score in base 2
    float sum[NT<H>][NJ<H>];   // times the factor of scores
};

// Two 16-bit values of the model's type.
__device__ __forceinline__ float2 pair16(uint32_t x, bool bf16) {
    if (bf16) return make_float2(__uint_as_float(x << 16), __uint_as_float(x & 0xffff0000u));
    return __half22float2(*reinterpret_cast<const __half2 *>(&x));
}

// Codes that are integers meet a q of integers: 16 bits, two signed digits q = 256 hi + lo in
// neighbouring columns. Their products are exact.
constexpr float kLargestInteger = 127 * 256 + 127, kRounder = 12582912.f; // 3 * 2^22

// Words of 8 or 16 bytes of this lane's row of q, two dims to a word, at `at` dims.
template <int WORDS>
__device__ __forceinline__ void load_dims(uint32_t *to, const uint16_t *row, int at,
                                          uint32_t keep) {
    if (WORDS == 4) {
        const uint4 x = *(const uint4 *)(row + at);
        to[0] = x.x & keep, to[1] = x.y & keep, to[2] = x.z & keep, to[3] = x.w & keep;
    } else {
        const uint2 x = *(const uint2 *)(row + at);
        to[0] = x.x & keep, to[1] = x.y & keep;
    }
}
// The largest magnitude of a column's 16-bit values, given those of each of its four lanes' words:
// as integers magnitudes of either type are in order, a NaN above all.
__device__ __forceinline__ float column_largest16(uint32_t words, bool bf16) {
    uint32_t top = max(words & 0xffffu, words >> 16);
    top = max(top, __shfl_xor_sync(~0u, top, 1));
    top = max(top, __shfl_xor_sync(~0u, top, 2));
    return pair16(top, bf16).x;
}
// Column c of digits tile t of mma tile n is digit c % 2 of head 8 n + NJ (c / 2) + t, so that a
// lane's two columns are one head's. A k-step of 32 has dims 32 i + 4 quarter .. + 3 and, 16 on,
// four more; or of nibbles the even and the odd ones of 32 i + 8 quarter .. + 7.
template <int D, int H, kv_format F>
__device__ __forceinline__ void load_digits(query<D, H> &q, const decode_arguments &a,
                                            const uint8_t *from, int row_bytes, int n_heads,
                                            int lane) {
    const int column = lane / 4, quarter = lane % 4;
    const float rounder = kRounder + (column % 2 ? 0.f : 128.f); // the high digit is rounded
    const uint32_t digit = column % 2 ? 0x0040u : 0x0051u;       // byte 0 or 1 of two words
    uint32_t raw[NT<H> * NJ<H>][D / 8];
    float f[NT<H> * NJ<H>];
    const auto load = [&](int t) {
        if (H > 8) asm volatile("" ::: "memory"); // one after the other
        const int h = t / NJ<H> * 8 + column / 2 * NJ<H> + t % NJ<H>;
        const uint16_t *row = (const uint16_t *)(from + min(h, n_heads - 1) * row_bytes);
        const uint32_t keep = h < n_heads ? ~0u : 0u;
#pragma unroll
        for (int i = 0; i < D / 32; i++)
            if (F == KF_4) {
                load_dims<4>(&raw[t][4 * i], row, 32 * i + 8 * quarter, keep);
            } else {
                load_dims<2>(&raw[t][4 * i], row, 32 * i + 4 * quarter, keep);
                load_dims<2>(&raw[t][4 * i + 2], row, 32 * i + 16 + 4 * quarter, keep);
            }
    };
#pragma unroll
    for (int t = 0; t < NT<H> * NJ<H>; t++) {
        load(t);
        uint32_t top = 0;
#pragma unroll
        for (int i = 0; i < D / 8; i++) top = __vmaxu2(top, raw[t][i] & 0x7fff7fffu);
        const float largest = column_largest16(top, a.bf16);
        const float amax = largest < 1e-30f ? 1e-30f : largest; // a NaN stays, and shows
        f[t] = __fdividef(kLargestInteger, amax);
        const float scale = a.scale * (1 / kLargestInteger) * amax;
        q.scale[t / NJ<H>][t % NJ<H>] = __shfl_sync(~0u, scale, 8 * quarter);
    }
#pragma unroll
    for (int t = 0; t < NT<H> * NJ<H>; t++) {
        if (H > 8) load(t); // once more, which takes fewer registers
        float2 v[D / 8];
        if (a.bf16) { // once, not for each pair
#pragma unroll
            for (int i = 0; i < D / 8; i++) v[i] = pair16(raw[t][i], true);
        } else {
#pragma unroll
            for (int i = 0; i < D / 8; i++) v[i] = pair16(raw[t][i], false);
        }
        int sum[4] = {}; // of digits, a column each: the product with ones
#pragma unroll
        for (int i = 0; i < D / 32; i++) {
            uint32_t x[8];
#pragma unroll
            for (int k = 0; k < 8; k++) {
                const float2 y = v[4 * i + k / 2];
                x[k] = __float_as_uint(__fmaf_rn(k % 2 ? y.y : y.x, f[t], rounder));
            }
#pragma unroll
            for (int half = 0; half < 2; half++) {
                constexpr int APART = F == KF_4 ? 2 : 1;
                const uint32_t *y = x + half * (F == KF_4 ? 1 : 4);
                q.b[(i * NT<H> * NJ<H> + t) * 2 + half] =
                    __byte_perm(__byte_perm(y[0], y[APART], digit),
                                __byte_perm(y[2 * APART], y[3 * APART], digit), 0x5410);
            }
            const uint32_t *b = &q.b[(i * NT<H> * NJ<H> + t) * 2];
            const uint32_t ones[4] = {0x01010101u, 0x01010101u, 0x01010101u, 0x01010101u};
            mma_integers(sum, ones, b[0], b[1]);
        }
        q.sum[t / NJ<H>][t % NJ<H>] =
            __int2float_rn(sum[0] * 256 + sum[1]) * q.scale[t / NJ<H>][t % NJ<H>];
    }
}

// 16-bit q: column c of tile n is head 8 n + c NJ / 2.
template <int D, int H, kv_format F>
__device__ __forceinline__ void load_halves(query<D, H> &q, const decode_arguments &a,
                                            const uint8_t *from, int row_bytes, int n_heads,
                                            int lane) {
    const int column = lane / 4, quarter = lane % 4;
    uint32_t raw[NT<H>][D / 8];
#pragma unroll
    for (int n = 0; n < NT<H>; n++) {
        const int h = n * 8 + column * NJ<H> / 2;
        const uint16_t *row = (const uint16_t *)(from + min(h, n_heads - 1) * row_bytes);
        const uint32_t keep = h < n_heads ? ~0u : 0u;
#pragma unroll
        for (int i = 0; i < D / 16; i++)
            if (F == KF_16) {
                uint32_t *b = &q.b[(i * NT<H> + n) * 2];
                b[0] = *(const uint32_t *)(row + 16 * i + 2 * quarter) & keep;
                b[1] = *(const uint32_t *)(row + 16 * i + 8 + 2 * quarter) & keep;
            } else {
                load_dims<2>(&raw[n][2 * i], row, 16 * i + 4 * quarter, keep);
            }
    }
    if constexpr (F != KF_16) {
#pragma unroll
        for (int n = 0; n < NT<H>; n++) {
            uint32_t top = 0;
#pragma unroll
            for (int i = 0; i < D / 8; i++) top = __vmaxu2(top, raw[n][i] & 0x7fff7fffu);
            const float amax = column_largest16(top, a.bf16);
            // The power of two that brings the largest to [2^11, 2^12).
            const uint32_t bits = (265u << 23) - (__float_as_uint(amax) & 0x7f800000u);
            const float f = amax < 1e-18f ? 1.f : __uint_as_float(bits);
            const float scale = a.scale * code_unit(F) / f;
#pragma unroll
            for (int j = 0; j < NJ<H>; j++) {
                q.scale[n][j] = __shfl_sync(~0u, scale, 8 * quarter + 4 * j);
                q.sum[n][j] = 0.f;
            }
#pragma unroll
            for (int i = 0; i < D / 16; i++) { // dims 0, 2 | 1, 3 of four, or 0, 1 | 2, 3
                const float2 x = pair16(raw[n][2 * i], a.bf16),
                             y = pair16(raw[n][2 * i + 1], a.bf16);
                uint32_t *b = &q.b[(i * NT<H> + n) * 2];
                b[0] = pack2<__half>(x.x * f, (kNeighbours ? x.y : y.x) * f);
                b[1] = pack2<__half>((kNeighbours ? y.x : x.y) * f, y.y * f);
            }
        }
    }
}

// --- The two products ----------------------------------------------------------------------------

// Where tile m of 16 tokens of a unit begins; `at`: of the unit's R entries.
template <int UT, int R, int ROW>
__device__ __forceinline__ uint32_t tile_at(const uint32_t (&at)[R], int m) {
    constexpr int TILES = UT / R / 16;
    return at[m / TILES] + m % TILES * 16 * ROW;
}

// Scores of a unit: of each tile of 16 tokens the lane's NJ heads at rows r = lane / 4 and r + 8.
template <int H, int UT> using scores = float[UT / 16][NT<H>][2 * NJ<H>];

// s = K [UT, D] q^T
template <int D, int H, int UT, int R, kv_format F, typename T>
__device__ __forceinline__ void multiply_k(scores<H, UT> &s, const query<D, H> &q,
                                           const uint32_t (&k_at)[R], int lane, bool bf16) {
    constexpr int ROW = F == KF_16 ? 2 * D : D;
    constexpr int STEPS = F == KF_16 ? 1 : 2; // k-steps of a pair of pieces
    const uint32_t lane_at = lane_offset<ROW, true>(lane);
    float c[UT / 16][NT<H>][4] = {};
#pragma unroll
    for (int pair = 0; pair < ROW / 32; pair++) {
        uint32_t r[UT / 16][4]; // tiles side by side: their products do not wait for each other
#pragma unroll
        for (int m = 0; m < UT / 16; m++)
            load_matrices(r[m], tile_at<UT, R, ROW>(k_at, m) + pair_offset<ROW>(lane_at, pair));
#pragma unroll
        for (int i = 0; i < STEPS; i++)
#pragma unroll
            for (int m = 0; m < UT / 16; m++) {
                uint32_t x[4];
                if (F == KF_16) {
                    x[0] = r[m][0], x[1] = r[m][1], x[2] = r[m][2], x[3] = r[m][3];
                } else {
                    bytes_to_pairs<F>(x[0], x[2], r[m][i * 2]);
                    bytes_to_pairs<F>(x[1], x[3], r[m][i * 2 + 1]);
                }
#pragma unroll
                for (int n = 0; n < NT<H>; n++) {
                    const uint32_t *b = &q.b[((pair * STEPS + i) * NT<H> + n) * 2];
                    mma_of<T>(c[m][n], x[0], x[1], x[2], x[3], b[0], b[1], bf16);
                }
            }
    }
#pragma unroll
    for (int m = 0; m < UT / 16; m++)
#pragma unroll
        for (int n = 0; n < NT<H>; n++)
#pragma unroll
            for (int e = 0; e < 2 * NJ<H>; e++) s[m][n][e] = c[m][n][NJ<H> == 1 ? 2 * e : e];
}

// The same of integers.
template <int D, int H, int UT, int R, kv_format F, kv_class C>
__device__ __forceinline__ void multiply_k_integers(scores<H, UT> &s, const query<D, H> &q,
                                                    const uint32_t (&k_at)[R], int lane) {
    constexpr int ROW = F == KF_4 ? D / 2 : D;
    constexpr int STEPS = F == KF_4 ? 2 : 1; // k-steps of a pair of pieces
    const uint32_t lane_at = lane_offset<ROW, true>(lane);
    // Tiles of tokens and of columns at once; more take the registers.
    constexpr int SIDE = NT<H> == 1 ? UT / 16 : 1, COLUMNS = C == ANY || C == CODES ? 1 : NT<H>;
#pragma unroll
    for (int m0 = 0; m0 < UT / 16; m0 += SIDE)
#pragma unroll
        for (int n0 = 0; n0 < NT<H>; n0 += COLUMNS) {
            int c[SIDE][COLUMNS * NJ<H>][4] = {};
#pragma unroll
            for (int pair = 0; pair < ROW / 32; pair++) {
                uint32_t r[SIDE][4];
#pragma unroll
                for (int m = 0; m < SIDE; m++)
                    load_matrices(r[m], tile_at<UT, R, ROW>(k_at, m0 + m) +
                                            pair_offset<ROW>(lane_at, pair));
#pragma unroll
                for (int i = 0; i < STEPS; i++)
#pragma unroll
                    for (int m = 0; m < SIDE; m++) {
                        uint32_t x[4] = {r[m][0], r[m][1], r[m][2], r[m][3]};
                        if (F == KF_4)
#pragma unroll
                            for (int k = 0; k < 4; k++)
                                x[k] = r[m][2 * i + k % 2] >> k / 2 * 4 & 0x0f0f0f0fu;
#pragma unroll
                        for (int t = 0; t < COLUMNS * NJ<H>; t++) {
                            const int step = pair * STEPS + i, tile = step * NT<H> + n0;
                            const uint32_t *b = &q.b[(tile * NJ<H> + t) * 2];
                            mma_integers(c[m][t], x, b[0], b[1]);
                        }
                    }
            }
#pragma unroll
            for (int m = 0; m < SIDE; m++)
#pragma unroll
                for (int n = 0; n < COLUMNS; n++)
#pragma unroll
                    for (int e = 0; e < 2 * NJ<H>; e++) {
                        const int *x = &c[m][n * NJ<H> + e % NJ<H>][e / NJ<H> * 2];
                        s[m0 + m][n0 + n][e] = __int2float_rn(x[0] * 256 + x[1]);
                    }
        }
}

// acc[D / 16][NT<H>][4] += V^T [D, UT] p^T; middle[NT<H>][4] += -m * sum of p over tokens.
template <int D, int H, int UT, int R, kv_format F, typename T>
__device__ __forceinline__ void
multiply_v(float (&acc)[D / 16][NT<H>][4], float (&middle)[NT<H>][4],
           const uint32_t (&p)[UT / 16][NT<H>][2], const uint32_t (&v_at)[R], int lane, bool bf16) {
    constexpr int ROW = F == KF_16 ? 2 * D : F == KF_4 ? D / 2 : D;
    constexpr uint32_t MIDDLE = F == KF_8 ? 0x80808080u : 0x80088008u; // -128, -8 times 2^-24
    const uint32_t lane_at = lane_offset<ROW, false>(lane);
#pragma unroll
    for (int m = 0; m < UT / 16; m++) {
        if (F == KF_8 || F == KF_4)
#pragma unroll
            for (int n = 0; n < NT<H>; n++)
                mma<__half>(middle[n], MIDDLE, MIDDLE, MIDDLE, MIDDLE, p[m][n][0], p[m][n][1]);
#pragma unroll
        for (int pair = 0; pair < ROW / 32; pair++) {
            uint32_t r[4]; // pieces 0, 1 of tokens 0..7, then of tokens 8..15
            load_matrices_turned(r, tile_at<UT, R, ROW>(v_at, m) + pair_offset<ROW>(lane_at, pair));
            if (F == KF_16) {
#pragma unroll
                for (int n = 0; n < NT<H>; n++)
                    mma_of<T>(acc[pair][n], r[0], r[1], r[2], r[3], p[m][n][0], p[m][n][1], bf16);
            }
#pragma unroll
            for (int piece = 0; piece < (F == KF_16 ? 0 : 2); piece++) {
                const uint32_t lo = r[piece], hi = r[piece + 2];
                if (F == KF_4) {
#pragma unroll
                    for (int i = 0; i < 2; i++) {
                        const uint32_t x = i ? lo >> 8 : lo, y = i ? hi >> 8 : hi;
#pragma unroll
                        for (int n = 0; n < NT<H>; n++)
                            mma_of<T>(acc[pair * 4 + piece * 2 + i][n], x & 0x000f000fu,
                                      x & 0x00f000f0u, y & 0x000f000fu, y & 0x00f000f0u, p[m][n][0],
                                      p[m][n][1], bf16);
                    }
                } else {
                    uint32_t x[4];
                    bytes_apart<F>(x[0], x[1], lo);
                    bytes_apart<F>(x[2], x[3], hi);
#pragma unroll
                    for (int n = 0; n < NT<H>; n++)
                        mma_of<T>(acc[pair * 2 + piece][n], x[0], x[1], x[2], x[3], p[m][n][0],
                                  p[m][n][1], bf16);
                }
            }
        }
    }
}

// The two dims (rows r and r + 8 of tile i) that acc[i] holds in this lane, r = lane / 4.
__device__ __forceinline__ void rows_of(kv_format f, int i, int r, int *d0, int *d1) {
    if (f == KF_16) {
        *d0 = 16 * i + r, *d1 = *d0 + 8;
    } else if (f == KF_4) {
        *d0 = i / 2 * 32 + 4 * r + i % 2 * 2, *d1 = *d0 + 1;
    } else {
        *d0 = 16 * i + 2 * r, *d1 = *d0 + 1;
    }
}

// --- Softmax -------------------------------------------------------------------------------------

// A warp's running result of a leaf. Columns (heads) 2 * (lane % 4) and the next one of each tile.
template <int D, int H> struct state {
    float acc[D / 16][NT<H>][4];
    float middle[NT<H>][4];
    float m[NT<H>][NJ<H>], l[NT<H>][NJ<H>], z[NT<H>][NJ<H>]; // l, z: this lane's tokens only
    float unit; // power of two that the scales of V are divided by
};

template <int D, int H> __device__ __forceinline__ void clear(state<D, H> &st) {
#pragma unroll
    for (int n = 0; n < NT<H>; n++) {
#pragma unroll
        for (int i = 0; i < D / 16; i++)
#pragma unroll
            for (int e = 0; e < 4; e++) st.acc[i][n][e] = 0.f;
#pragma unroll
        for (int e = 0; e < 4; e++) st.middle[n][e] = 0.f;
#pragma unroll
        for (int j = 0; j < NJ<H>; j++) st.m[n][j] = -INFINITY, st.l[n][j] = st.z[n][j] = 0.f;
    }
    st.unit = 0x1p-24f;
}

__device__ __forceinline__ float column_max(float x) {
    x = fmaxf(x, __shfl_xor_sync(~0u, x, 4));
    x = fmaxf(x, __shfl_xor_sync(~0u, x, 8));
    return fmaxf(x, __shfl_xor_sync(~0u, x, 16));
}
__device__ __forceinline__ float column_sum(float x) {
    x += __shfl_xor_sync(~0u, x, 4);
    x += __shfl_xor_sync(~0u, x, 8);
    return x + __shfl_xor_sync(~0u, x, 16);
}

// Parameters of this lane's tokens, as they lie in memory: f16 scale, and f16 minimum above it.
// They are `offset` bytes into each of the unit's entries.
template <int UT, int R>
__device__ __forceinline__ void load_params(uint32_t (&p)[UT / 16][2], const uint32_t (&at)[R],
                                            int offset, kv_format f, int row) {
    constexpr int TILES = UT / R / 16;
#pragma unroll
    for (int m = 0; m < UT / 16; m++)
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const int token = m % TILES * 16 + half * 8 + row;
            const uint32_t from = at[m / TILES] + offset;
            if (f == KF_FP8) {
                uint16_t scale;
                asm volatile("ld.shared.u16 %0, [%1];" : "=h"(scale) : "r"(from + 2 * token));
                p[m][half] = scale;
            } else {
                asm volatile("ld.shared.u32 %0, [%1];" : "=r"(p[m][half]) : "r"(from + 4 * token));
            }
        }
}
__device__ __forceinline__ float2 halves(uint32_t x) {
    return __half22float2(*reinterpret_cast<const __half2 *>(&x));
}

// Which tokens of a unit count.
struct extent {
    int token0, lo, end;
    bool edge; // some do not
    __device__ bool out(int token) const { return token0 + token < lo || token0 + token >= end; }
};

// Parameters of tokens that do not count may be anything: they become zero.
template <int UT>
__device__ __forceinline__ void clear_params(uint32_t (&p)[UT / 16][2], const extent &x, int row) {
#pragma unroll
    for (int m = 0; m < UT / 16; m++)
#pragma unroll
        for (int half = 0; half < 2; half++)
            if (x.out(m * 16 + half * 8 + row)) p[m][half] = 0;
}
// Nor do their scores.
template <int H, int UT>
__device__ __forceinline__ void clear_scores(scores<H, UT> &s, const extent &x, int row) {
#pragma unroll
    for (int m = 0; m < UT / 16; m++)
#pragma unroll
        for (int e = 0; e < 2 * NJ<H>; e++)
            if (x.out(m * 16 + e / NJ<H> * 8 + row))
#pragma unroll
                for (int n = 0; n < NT<H>; n++) s[m][n][e] = -INFINITY;
}

// Products to scores in base 2.
template <int D, int H, int UT, kv_class C>
__device__ __forceinline__ void scale_scores(scores<H, UT> &s, const query<D, H> &q,
                                             const decode_arguments &a,
                                             const uint32_t (&params)[UT / 16][2]) {
    const bool codes = !has_16(C) || k_format<C>(a) != KF_16;
    constexpr bool MINIMUM = may_be_integer(C, only_k(C));
#pragma unroll
    for (int m = 0; m < UT / 16; m++)
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const float2 p = halves(params[m][half]);
#pragma unroll
            for (int n = 0; n < NT<H>; n++)
#pragma unroll
                for (int j = 0; j < NJ<H>; j++) {
                    float &y = s[m][n][half * NJ<H> + j];
                    y *= codes ? p.x * q.scale[n][j] : a.scale;
                    if (MINIMUM && codes) y += p.y * q.sum[n][j];
                }
        }
}

// The state to new maxima and another unit of V's scales; `fold`: even if neither is new. What
// codes of V were counted from goes into the sums then: while it has not, they are of one sign, and
// the mma's truncation of each makes them drift.
template <int D, int H, kv_class C>
__device__ __forceinline__ void
move_state(state<D, H> &st, const decode_arguments &a, const float (&top)[NT<H>][NJ<H>],
           float (&from)[NT<H>][NJ<H>], float unit, float per_unit, bool fold) {
    constexpr bool MIDDLE = may_be_integer(C, only_v(C));
    const float odd = only_v(C) == kOpen ? a.odd : only_v(C) == KF_4 ? 16.f : 1.f;
    float shrink[NT<H>][NJ<H>];
    bool moved = fold;
#pragma unroll
    for (int n = 0; n < NT<H>; n++)
#pragma unroll
        for (int j = 0; j < NJ<H>; j++) {
            const float next = fmaxf(st.m[n][j], column_max(top[n][j]));
            from[n][j] = next == -INFINITY ? 0.f : next; // nothing seen yet
            const float f = exp2_approx(st.m[n][j] - from[n][j]);
            st.l[n][j] *= f;
            st.z[n][j] *= f;
            shrink[n][j] = f * (st.unit * per_unit);
            moved = moved || shrink[n][j] != 1.f;
            st.m[n][j] = next;
        }
    st.unit = unit;
    if (!__any_sync(~0u, moved)) return;
#pragma unroll
    for (int n = 0; n < NT<H>; n++)
#pragma unroll
        for (int e = 0; e < 4; e++) {
            if (e % 2 >= NJ<H>) continue; // a column of zeros
            const float f = shrink[n][e % 2 % NJ<H>];
            float &middle = st.middle[n][e];
            const float m = MIDDLE ? middle * f * (e < 2 ? 1.f : odd) : 0.f;
#pragma unroll
            for (int i = 0; i < D / 16; i++)
                st.acc[i][n][e] = MIDDLE ? st.acc[i][n][e] * f + m : st.acc[i][n][e] * f;
            middle = 0.f;
        }
}

// Scores of a unit to weights p as multiply_v wants them; moves the state to the new maximum, and
// to a power of two near the largest scale of V so far: scales are divided by it, so that p * scale
// stays in fp16's range.
template <int D, int H, int UT, kv_class C, typename T>
__device__ __forceinline__ void weigh(uint32_t (&p)[UT / 16][NT<H>][2], scores<H, UT> &s,
                                      state<D, H> &st, const decode_arguments &a,
                                      const uint32_t (&params)[UT / 16][2], bool fold) {
    constexpr bool MINIMUM = may_be_integer(C, only_v(C));
    const kv_format v = v_format<C>(a);
    const bool codes = !has_16(C) || v != KF_16;
    float top[NT<H>][NJ<H>], from[NT<H>][NJ<H>], unit = st.unit;
#pragma unroll
    for (int n = 0; n < NT<H>; n++)
#pragma unroll
        for (int j = 0; j < NJ<H>; j++) {
            top[n][j] = s[0][n][j];
#pragma unroll
            for (int m = 0; m < UT / 16; m++)
                top[n][j] = fmaxf(top[n][j], fmaxf(s[m][n][j], s[m][n][NJ<H> + j]));
        }
    if (codes) {
#pragma unroll
        for (int m = 0; m < UT / 16; m++)
            unit = fmaxf(unit, fmaxf(halves(params[m][0]).x, halves(params[m][1]).x));
        unit = __uint_as_float(__float_as_uint(column_max(unit)) & 0x7f800000u);
    }
    const float per_unit = __uint_as_float(0x7f000000u - __float_as_uint(unit));
    move_state<D, H, C>(st, a, top, from, unit, per_unit, MINIMUM && fold);
    const float middle = v == KF_8 ? 128.f : v == KF_4 ? 8.f : 0.f;
#pragma unroll
    for (int m = 0; m < UT / 16; m++)
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const float2 vp = halves(params[m][half]);
            const float vs = vp.x * per_unit, vz = vp.y + middle * vp.x;
#pragma unroll
            for (int n = 0; n < NT<H>; n++) {
                float w[2] = {};
#pragma unroll
                for (int j = 0; j < NJ<H>; j++) {
                    w[j] = exp2_approx(s[m][n][half * NJ<H> + j] - from[n][j]);
                    st.l[n][j] += w[j];
                    if (codes && MINIMUM) st.z[n][j] += w[j] * vz;
                    if (codes) w[j] *= vs;
                }
                const uint32_t packed =
                    codes ? pack2<__half>(w[0], w[1]) : pack2_of<T>(w[0], w[1], a.bf16);
                p[m][n][half] = turn_matrix(packed);
            }
        }
}

// V of tokens that must not count: zero where it can be NaN, since 0 * NaN is NaN.
template <int ROW, int UT, int R>
__device__ __forceinline__ void clear_v(const uint32_t (&v_at)[R], const extent &x, int lane) {
    for (int t = 0; t < UT; t++)
        if (x.out(t))
            for (int at = lane * 16; at < ROW; at += 512)
                asm volatile("st.shared.v4.u32 [%0], {%1, %1, %1, %1};" ::"r"(
                                 (R > 1 && t >= UT / R ? v_at[R - 1] : v_at[0]) +
                                 code_at(ROW, t % (UT / R), at)),
                             "r"(0)
                             : "memory");
    fence_async_proxy();
    __syncwarp();
}

// --- Joining -------------------------------------------------------------------------------------

// A sum over tokens: this warp's dims (tiles of 16 from D / 64 * warp on) in mma's order, and for
// this lane's columns the largest score, to the next integer, and the sum of weights.
template <int D, int H> struct sum {
    float x[D / 64][NT<H>][2 * NJ<H>];
    float m[NT<H>][NJ<H>], l[NT<H>][NJ<H>];
};

// a f + b g, rounded the same wherever two sums are joined.
__device__ __forceinline__ float join2(float a, float f, float b, float g) {
    return __fmaf_rn(a, f, __fmul_rn(b, g));
}

// Two tiles of heads take the registers, and so do 256 dims, or the code of any format, beside the
// addresses of copies: a thread's sum is in block memory then, a word further on than the one
// before needs, for the banks' sake.
template <int D, int H, kv_class C, bool BULK>
constexpr int all_bytes = NT<H> == 1 && D <= 128 && (BULK || C != ANY) ? 0
                                                                       : (int)sizeof(sum<D, H>) + 4;

template <int D, int H>
__device__ __forceinline__ void add_leaf(sum<D, H> &to, const sum<D, H> &leaf) {
#pragma unroll
    for (int n = 0; n < NT<H>; n++) {
        float f[NJ<H>], g[NJ<H>];
#pragma unroll
        for (int j = 0; j < NJ<H>; j++) {
            const float m = fmaxf(to.m[n][j], leaf.m[n][j]);
            f[j] = exp2_approx(to.m[n][j] - m), g[j] = exp2_approx(leaf.m[n][j] - m);
            to.m[n][j] = m;
            to.l[n][j] = join2(to.l[n][j], f[j], leaf.l[n][j], g[j]);
        }
#pragma unroll
        for (int k = 0; k < D / 64; k++)
#pragma unroll
            for (int e = 0; e < 2 * NJ<H>; e++)
                to.x[k][n][e] = join2(to.x[k][n][e], f[e % NJ<H>], leaf.x[k][n][e], g[e % NJ<H>]);
    }
}

// Results of two leaves at a time where that leaves enough memory for the rings.
template <int D, int H, kv_class C>
constexpr int joints = D <= 128 && NT<H> == 1 && !has_16(C) && C != K8_V4 ? 2 : 1;

// Block memory of the warps' results, [joints] of each: of a lane's heads and rows r, r + 8 of a
// tile of dims [4 warps, D / 16, NT, 8 rows, quarters], and (m, l) [4 warps, NT, 4 quarters].
template <int H> struct __align__(8 * NJ<H>) joint_cell { float x[2 * NJ<H>]; };
template <int D, int H> __host__ __device__ constexpr int joint_bytes(int quarters) {
    return kWarps * (D / 16) * NT<H> * 8 * quarters * (int)sizeof(joint_cell<H>);
}
template <int D, int H>
__device__ __forceinline__ int joint_tile(const decode_arguments &a, int warp, int i, int n) {
    return ((warp * (D / 16) + i) * NT<H> + n) * 8 * a.quarters;
}

// --- Block memory --------------------------------------------------------------------------------

template <int D> constexpr bool kCopied = D <= 128; // q, to block memory
template <int D> __host__ __device__ constexpr int q_row_bytes() { return 2 * D + 16; }

constexpr int round_up(int n, int to) { return (n + to - 1) / to * to; }

// Is a unit a page, of one entry or of one of K and one of V? Then the place in the code says which
// comes next.
template <int D, int H, kv_class C, bool BULK>
constexpr bool by_pages = BULK &&unit_tokens<D, H, C> == kPage &&unit_entries<D, H, C> == 1;

// As many stages as `room` holds, and where things are in block memory. q of a tile, `heads` rows,
// is fetched as many units ahead as the stages hold, and read by the slowest warp.
template <int D, int H, kv_class C, bool BULK>
constexpr decode_layout lay_out(kv_format k, kv_format v, int heads, int quarters, int room) {
    constexpr int ET = entry_tokens<D, H, C>;
    constexpr int ENTRIES = C == KV_4 ? 1 : 2 * unit_entries<D, H, C>; // of a unit
    constexpr int SOME = in_turn<D, H, C> || (by_pages<D, H, C, BULK> && ENTRIES == 2) ? 2 : 1;
    const attention_layout page = attention_layout_of(k, v, 1, D);
    decode_layout a = {};
    a.k_bytes = ET * attention_row_bytes(k, D);
    a.v_bytes = ET * attention_row_bytes(v, D);
    a.k_param = ET * attention_param_bytes(k);
    a.v_param_bytes = ET * attention_param_bytes(v);
    a.head_bytes = (int)page.head_bytes;
    a.param_bytes = page.param_bytes;
    a.v_code = page.v_code;
    a.v_param = page.v_param;
    const int k_entry = a.k_bytes + a.k_param + a.v_param_bytes;
    const int entry = C == KV_4 ? k_entry + a.v_bytes : k_entry > a.v_bytes ? k_entry : a.v_bytes;
    a.slot_bytes = round_up(entry, 128);
    if (in_turn<D, H, C>) {
        a.odd_bytes = round_up(k_entry - a.v_bytes, 256) / 2;
        a.slot_bytes = round_up(a.v_bytes, 128) + a.odd_bytes;
    }
    a.q_bytes = heads * q_row_bytes<D>();
    const int joint = joints<D, H, C> * joint_bytes<D, H>(quarters),
              sums = joints<D, H, C> * kWarps * NT<H> * 4 * (int)sizeof(joint_cell<H>);
    a.bytes = room + 1;
    for (a.stages = 16 + SOME; a.bytes > room && a.stages > SOME;) {
        a.stages -= SOME;
        a.q_slots = kCopied<D> ? (a.stages + ENTRIES - 1) / ENTRIES + 1 : 0;
        a.q_at = kWarps * a.stages * a.slot_bytes;
        a.joint_at = a.q_at + a.q_slots * a.q_bytes;
        a.sums_at = a.joint_at + joint;
        a.all_at = a.sums_at + sums;
        a.barriers_at = a.all_at + kThreads * all_bytes<D, H, C, BULK> + 16; // a flag before them
        a.bytes = a.barriers_at + 8 * (kWarps * a.stages + a.q_slots + 2 * joints<D, H, C>);
    }
    return a;
}

// Two blocks an SM.
constexpr int kHopperShared = 228 * 1024;
constexpr int half_room(int shared_bytes_sm) { return shared_bytes_sm / 2 - 1024; }

// Of an instance of one pair of codes, on the one GPU that has bulk copies, the layout is a
// constant: loads of it, and tests of what is zero, take time. It has room for as many heads as the
// instance; of 16 bits those would cost groups of five or six a stage.
template <int D, int H, kv_class C, bool BULK> struct layout {
    static constexpr bool FIXED = BULK && only_k(C) != kOpen && C != KV_16;
    static constexpr kv_format K = FIXED ? (kv_format)only_k(C) : KF_8,
                               V = FIXED ? (kv_format)only_v(C) : KF_8;
    static constexpr decode_layout CONSTANT = lay_out<D, H, C, BULK>(
        K, V, D == 128 && H == 4 ? 4 : 8 * NT<H>, 4, half_room(kHopperShared));
    static_assert(!FIXED || (CONSTANT.bytes <= half_room(kHopperShared) &&
                             CONSTANT.stages >= unit_entries<D, H, C>));
#define MEMBER(name)                                                                               \
    static __device__ __forceinline__ int name(const decode_arguments &a) {                        \
        constexpr int constant = CONSTANT.name;                                                    \
        return FIXED ? constant : a.at.name;                                                       \
    }
    MEMBER(k_bytes)
    MEMBER(v_bytes)
    MEMBER(k_param)
    MEMBER(v_param_bytes)
    MEMBER(head_bytes)
    MEMBER(param_bytes)
    MEMBER(v_code)
    MEMBER(v_param)
    MEMBER(stages)
    MEMBER(slot_bytes)
    MEMBER(odd_bytes)
    MEMBER(q_slots)
    MEMBER(q_bytes)
    MEMBER(q_at)
    MEMBER(all_at)
    MEMBER(barriers_at)
#undef MEMBER
};

// --- Putting and taking --------------------------------------------------------------------------

// This lane's heads' result at rows r and r + 8 of tile i; z: what every dim has besides.
template <int D, int H, kv_class C>
__device__ __forceinline__ joint_cell<H> cell_of(const state<D, H> &st, const decode_arguments &a,
                                                 int i, int n, const float (&z)[NJ<H>]) {
    const kv_format v = v_format<C>(a);
    const bool codes = !has_16(C) || v != KF_16;
    const float unit = st.unit * code_unit(v), odd = v == KF_4 ? unit / 16 : unit;
    joint_cell<H> c;
#pragma unroll
    for (int e = 0; e < 2 * NJ<H>; e++) {
        const float x = st.acc[i][n][NJ<H> == 1 ? 2 * e : e];
        c.x[e] = codes ? x * (e / NJ<H> ? odd : unit) + z[e % NJ<H>] : x;
    }
    return c;
}
template <int D, int H, kv_class C>
__device__ __forceinline__ void constants_of(float (&z)[NJ<H>], float (&l)[NJ<H>],
                                             const state<D, H> &st, const decode_arguments &a,
                                             int n) {
    const kv_format v = v_format<C>(a);
#pragma unroll
    for (int j = 0; j < NJ<H>; j++) {
        l[j] = column_sum(st.l[n][j]);
        z[j] = may_be_integer(C, only_v(C)) && is_integer(v)
                   ? column_sum(st.z[n][j]) + st.middle[n][j] * (st.unit * code_unit(v))
                   : 0.f;
    }
}

template <int D, int H, kv_class C>
__device__ __forceinline__ void put_joint(uint8_t *memory, const state<D, H> &st,
                                          const decode_arguments &a, int at, int warp, int lane) {
    const int row = lane / 4, quarter = lane % 4;
    joint_cell<H> *acc = (joint_cell<H> *)(memory + a.at.joint_at) +
                         joint_tile<D, H>(a, at * kWarps, 0, 0) + row * a.quarters + quarter;
    joint_cell<H> *ml = (joint_cell<H> *)(memory + a.at.sums_at) + (at * kWarps + warp) * NT<H> * 4;
#pragma unroll
    for (int n = 0; n < NT<H>; n++) {
        float z[NJ<H>], l[NJ<H>];
        constants_of<D, H, C>(z, l, st, a, n);
        joint_cell<H> sums;
#pragma unroll
        for (int j = 0; j < NJ<H>; j++) sums.x[2 * j] = st.m[n][j], sums.x[2 * j + 1] = l[j];
        if (row == 0) ml[n * 4 + quarter] = sums;
        if (quarter >= a.quarters) continue;
#pragma unroll
        for (int i = 0; i < D / 16; i++)
            acc[joint_tile<D, H>(a, warp, i, n)] = cell_of<D, H, C>(st, a, i, n, z);
    }
}

// The warps' results, in order; those without a page have none, at a score of -inf.
template <int D, int H>
__device__ __forceinline__ void take_joint(sum<D, H> &s, const uint8_t *memory,
                                           const decode_arguments &a, int at, int warp, int lane) {
    const int row = lane / 4, quarter = lane % 4;
    const joint_cell<H> *acc = (const joint_cell<H> *)(memory + a.at.joint_at) +
                               joint_tile<D, H>(a, at * kWarps, 0, 0) + row * a.quarters +
                               min(quarter, a.quarters - 1);
    const joint_cell<H> *ml =
        (const joint_cell<H> *)(memory + a.at.sums_at) + at * kWarps * NT<H> * 4 + quarter;
#pragma unroll
    for (int n = 0; n < NT<H>; n++) {
        joint_cell<H> w[kWarps];
#pragma unroll
        for (int j = 0; j < NJ<H>; j++) s.m[n][j] = -INFINITY, s.l[n][j] = 0.f;
#pragma unroll
        for (int k = 0; k < kWarps; k++) {
            w[k] = ml[(k * NT<H> + n) * 4];
#pragma unroll
            for (int j = 0; j < NJ<H>; j++) s.m[n][j] = fmaxf(s.m[n][j], w[k].x[2 * j]);
        }
#pragma unroll
        for (int j = 0; j < NJ<H>; j++) s.m[n][j] = ceilf(s.m[n][j]);
#pragma unroll
        for (int i = 0; i < D / 64; i++)
#pragma unroll
            for (int e = 0; e < 2 * NJ<H>; e++) s.x[i][n][e] = 0.f;
#pragma unroll
        for (int k = 0; k < kWarps; k++) {
            float f[NJ<H>];
#pragma unroll
            for (int j = 0; j < NJ<H>; j++) {
                f[j] = exp2_approx(w[k].x[2 * j] - s.m[n][j]);
                s.l[n][j] += w[k].x[2 * j + 1] * f[j];
            }
#pragma unroll
            for (int i = 0; i < D / 64; i++) {
                const joint_cell<H> y = acc[joint_tile<D, H>(a, k, warp * (D / 64) + i, n)];
#pragma unroll
                for (int e = 0; e < 2 * NJ<H>; e++) s.x[i][n][e] += y.x[e] * f[e % NJ<H>];
            }
        }
    }
}

// --- Results -------------------------------------------------------------------------------------

// The heads of a tile, and where they are.
struct tile_place {
    int head0, n_heads;
};
template <int D, int H>
__device__ __forceinline__ int group_of(const decode_arguments &a, int tile) {
    return (D == 128 && H <= 8) || a.n_tiles == 1 ? tile : tile / a.n_tiles;
}
template <int D, int H>
__device__ __forceinline__ tile_place place_of(const decode_arguments &a, int tile) {
    const int g = group_of<D, H>(a, tile);
    const int first = D == 128 && H <= 8 ? 0 : (tile - g * a.n_tiles) * 8 * NT<H>;
    return {g * a.ratio + first, min(8 * NT<H>, a.ratio - first)};
}

// 1 / (l + sink)
__device__ __forceinline__ float normal_of(const decode_arguments &a, int head, float m, float l) {
    if (a.sinks) l += exp2_approx(load16(a.sinks, head, a.bf16) * kLog2E - m);
    return __fdividef(1.f, l);
}
__device__ __forceinline__ uint32_t pack_out(const decode_arguments &a, float x, float y) {
    return a.bf16 ? pack2<__nv_bfloat16>(x, y) : pack2<__half>(x, y);
}

// Rows r and r + 8 of tile i of a head's result.
template <kv_class C>
__device__ __forceinline__ void put_pair(uint16_t *head, kv_format v, int i, int r, uint32_t pair) {
    int d0, d1;
    rows_of(v, i, r, &d0, &d1);
    if (!has_16(C) || v != KF_16) {
        *(uint32_t *)(head + d0) = pair;
    } else {
        head[d0] = (uint16_t)pair;
        head[d1] = (uint16_t)(pair >> 16);
    }
}

// The head of a tile that is number j of a lane's in column tile n.
template <int H> __device__ __forceinline__ int head_of(int lane, int n, int j) {
    return n * 8 + lane % 4 * NJ<H> + j;
}

template <int D, int H, kv_class C>
__device__ __forceinline__ void put_out(const sum<D, H> &s, const decode_arguments &a, int row,
                                        const tile_place &p, int warp, int lane) {
    const kv_format v = v_format<C>(a);
#pragma unroll
    for (int n = 0; n < NT<H>; n++)
#pragma unroll
        for (int j = 0; j < NJ<H>; j++) {
            const int h = head_of<H>(lane, n, j), head = p.head0 + h;
            if (h >= p.n_heads) continue;
            const float f = normal_of(a, head, s.m[n][j], s.l[n][j]);
            uint16_t *to = (uint16_t *)a.out + ((int64_t)row * a.n_heads + head) * D;
#pragma unroll
            for (int k = 0; k < D / 64; k++)
                put_pair<C>(to, v, warp * (D / 64) + k, lane / 4,
                            pack_out(a, s.x[k][n][j] * f, s.x[k][n][NJ<H> + j] * f));
        }
}

// The same of a warp that has the tile alone.
template <int D, int H, kv_class C>
__device__ __forceinline__ void put_lone(const state<D, H> &st, const decode_arguments &a, int row,
                                         const tile_place &p, int lane) {
#pragma unroll
    for (int n = 0; n < NT<H>; n++) {
        float z[NJ<H>], l[NJ<H>];
        constants_of<D, H, C>(z, l, st, a, n);
#pragma unroll
        for (int j = 0; j < NJ<H>; j++) {
            const int h = head_of<H>(lane, n, j), head = p.head0 + h;
            if (h >= p.n_heads) continue;
            const float f = normal_of(a, head, st.m[n][j], l[j]);
            uint16_t *to = (uint16_t *)a.out + ((int64_t)row * a.n_heads + head) * D;
#pragma unroll
            for (int i = 0; i < D / 16; i++) {
                const joint_cell<H> c = cell_of<D, H, C>(st, a, i, n, z);
                put_pair<C>(to, v_format<C>(a), i, lane / 4,
                            pack_out(a, c.x[j] * f, c.x[NJ<H> + j] * f));
            }
        }
    }
}

template <int D>
__device__ __forceinline__ float *record_of(const decode_arguments &a, int slot, int head) {
    return a.partial + ((int64_t)slot * a.n_heads + head) * (D + ATTENTION_PARTIAL_EXTRA);
}

template <int D, int H, kv_class C>
__device__ __forceinline__ void put_record(const sum<D, H> &s, const decode_arguments &a, int slot,
                                           const tile_place &p, int warp, int lane) {
    const kv_format v = v_format<C>(a);
#pragma unroll
    for (int n = 0; n < NT<H>; n++)
#pragma unroll
        for (int j = 0; j < NJ<H>; j++) {
            const int h = head_of<H>(lane, n, j);
            if (h >= p.n_heads) continue;
            float *to = record_of<D>(a, slot, p.head0 + h);
            if (warp == 0 && lane < 4) *(float2 *)(to + D) = make_float2(s.m[n][j], s.l[n][j]);
#pragma unroll
            for (int k = 0; k < D / 64; k++) {
                int d0, d1;
                rows_of(v, warp * (D / 64) + k, lane / 4, &d0, &d1);
                to[d0] = s.x[k][n][j];
                to[d1] = s.x[k][n][NJ<H> + j];
            }
        }
}

// The whole block, after its records of a tile are written: has it completed the count?
template <int D>
__device__ __forceinline__ bool count_leaves(const decode_arguments &a, const attention_run &run,
                                             int head0, int n_leaves, int *flag) {
    __syncthreads();
    if (threadIdx.x == 0) {
        int32_t *counter = (int32_t *)(record_of<D>(a, run.slot, head0) + D + 2), before;
        asm volatile("atom.add.acq_rel.gpu.global.s32 %0, [%1], %2;"
                     : "=r"(before)
                     : "l"(counter), "r"(n_leaves)
                     : "memory");
        const bool last = before + n_leaves == run.n;
        if (last) *counter = 0;
        *flag = last;
    }
    __syncthreads();
    return *flag;
}

// The largest over groups of LANES lanes.
template <int LANES> __device__ __forceinline__ float largest_of_lanes(float x) {
    if constexpr (LANES == 32) { // as integers in the same order
        const int bits = __float_as_int(x);
        const int top = __reduce_max_sync(~0u, bits ^ (bits >> 31 & 0x7fffffff));
        return __int_as_float(top ^ (top >> 31 & 0x7fffffff));
    } else {
#pragma unroll
        for (int k = 1; k < LANES; k *= 2) x = fmaxf(x, __shfl_xor_sync(~0u, x, k, LANES));
        return x;
    }
}

// Records of a tile in order: leaves 0 .. prefix - 1 in the first slot, then one a leaf. A thread
// has four dims of a head, the D / 4 lanes of a head a record each to find its factor. AT_ONCE
// records are under way. Factors are powers of two, since scores' maxima are made integers: it does
// not matter to a sum's bits which maximum it is over.
template <int D, int AT_ONCE>
__device__ __forceinline__ void join_records(const decode_arguments &a, const attention_run &run,
                                             const tile_place &p, int prefix) {
    constexpr int LANES = D / 4 < 32 ? D / 4 : 32;
    const int64_t step = (int64_t)a.n_heads * (D + ATTENTION_PARTIAL_EXTRA); // from slot to slot
    const int n = run.n - prefix + 1;                                        // records
    const int thread = threadIdx.x, lane = thread % 32 % LANES;
    const int64_t second = n > 1 ? prefix * step : 0; // from the first
    for (int i0 = thread / 32 * 32; i0 < p.n_heads * (D / 4); i0 += kThreads) {
        const int i = i0 + thread % 32, h = min(i / (D / 4), p.n_heads - 1);
        const int head = p.head0 + h, d = i % (D / 4) * 4;
        const float *first = record_of<D>(a, run.slot, head), *at = first + d;
        float m = -INFINITY, l = 0.f;
        float4 x = make_float4(0.f, 0.f, 0.f, 0.f);
        for (int k0 = 0; k0 < n; k0 += LANES) {
            const int slot = k0 + lane ? min(k0 + lane, n - 1) + prefix - 1 : 0;
            float2 w = __ldcg((const float2 *)(first + slot * step + D));
            float g = 0.f;
#pragma unroll
            for (int k1 = 0; k1 < LANES; k1 += AT_ONCE) {
                float4 y[AT_ONCE];
#pragma unroll
                for (int k = 0; k < AT_ONCE; k++) {
                    y[k] = make_float4(0.f, 0.f, 0.f, 0.f);
                    if (k0 + k1 + k < n) y[k] = __ldcg((const float4 *)at);
                    at += k0 + k1 + k == 0 ? second : step;
                }
                if (k1 == 0) {
                    if (k0 + lane >= n) w = make_float2(-INFINITY, 0.f);
                    const float next = largest_of_lanes<LANES>(fmaxf(m, w.x));
                    const float f = exp2_approx(m - next);
                    x.x *= f, x.y *= f, x.z *= f, x.w *= f, l *= f;
                    g = exp2_approx(w.x - next);
                    w.y *= g;
                    m = next;
                }
#pragma unroll
                for (int k = 0; k < AT_ONCE; k++) {
                    const float gk = __shfl_sync(~0u, g, k1 + k, LANES);
                    l += __shfl_sync(~0u, w.y, k1 + k, LANES);
                    x.x = __fmaf_rn(y[k].x, gk, x.x);
                    x.y = __fmaf_rn(y[k].y, gk, x.y);
                    x.z = __fmaf_rn(y[k].z, gk, x.z);
                    x.w = __fmaf_rn(y[k].w, gk, x.w);
                }
                if (k0 + k1 + AT_ONCE >= n) break;
            }
        }
        if (i / (D / 4) >= p.n_heads) continue;
        const float f = normal_of(a, head, m, l);
        *(uint2 *)((uint16_t *)a.out + ((int64_t)run.row * a.n_heads + head) * D + d) =
            make_uint2(pack_out(a, x.x * f, x.y * f), pack_out(a, x.z * f, x.w * f));
    }
}

// --- A warp's ring -------------------------------------------------------------------------------

// The first tile of a run that warp `warp` has alone, from the run's first on, if the first one is
// warp `lone`'s.
__device__ __forceinline__ int lone_first(int lone, int warp) {
    return (warp + kWarps - lone) % kWarps;
}

// The next entry to fetch, and where: the warp's cursor over its block's work. Leaves are multiples
// of kStride, so that the warp's pages of a tile are kStride apart across them.
// WHOLE: an entry is K and V of a unit, else one of them.
template <int D, int H, kv_class C, bool BULK> struct feeder {
    typedef layout<D, H, C, BULK> L;
    static constexpr int UT = unit_tokens<D, H, C>, R = unit_entries<D, H, C>;
    static constexpr bool WHOLE = C == KV_4;
    static constexpr int ET = UT / R, ENTRIES = WHOLE ? 1 : 2 * R; // of an entry; of a unit
    static constexpr bool PAGES = by_pages<D, H, C, BULK>;
    enum part { K, V, NEXT };
    const decode_arguments &a;
    uint32_t memory;     // the block's
    uint32_t ring, full; // this warp's entries and their barriers
    int warp, lane;
    // This lane's word of the run at hand and of the two after it, and its number of the tile's 32
    // pages around the one at hand and of the next run's first: loaded long before they are wanted,
    // or many at a time, since a warp that waits for one does nothing else.
    int run, next_run, third_run, pages, next_pages;
    int leaf, next_tile, first; // after the tile at hand: leaf of the run, tile, leaf of the tile
    int stride;                 // tokens from this warp's page to its next
    int token, stop;            // of the unit; the end of the run's part of the tile
    int nth;                    // page of the tile
    int code_at, param_at;      // of the tile's head in a page
    int q_slot;                 // of the next q
    int entry;                  // of the unit, comes next
    bool fresh;                 // a new tile: its q is wanted
    bool ended;                 // the tile has no more for this warp
    bool done;                  // nor has the block

    __device__ __forceinline__ uint32_t q_full(int at) const {
        return memory + L::barriers_at(a) + 8 * (kWarps * L::stages(a) + at);
    }
    __device__ __forceinline__ int load_run(int at) const {
        const int words = (int)(sizeof(attention_run) / sizeof(int32_t));
        return at < 0 ? 0 : ((const int32_t *)(a.runs + at))[min(lane, words - 1)];
    }
    // A member of a run that the lanes hold.
#define RUN(words, member)                                                                         \
    __shfl_sync(~0u, words, (int)(offsetof(attention_run, member) / sizeof(int32_t)))
    // Page numbers of a run from a token on, a lane each.
    __device__ __forceinline__ int load_pages(int words, int from) const {
        const int step = RUN(words, lone) < 0 ? kStride : kPage;
        const int at = min(from + lane * step, RUN(words, end) - 1) / kPage;
        return a.page[RUN(words, page_at) + at];
    }
    __device__ __forceinline__ void load_next_pages() {
        if (RUN(run, next) < 0) return;
        const int begin = RUN(next_run, begin), first = RUN(next_run, first),
                  tokens = RUN(next_run, leaf);
        const bool lone = RUN(next_run, lone) >= 0;
        next_pages = load_pages(next_run, lone ? begin : begin + first * tokens + warp * kPage);
    }
    // To the block's first tile. What comes after it is sought later (`ended`), so that little
    // stands before the first copy.
    __device__ __forceinline__ void enter_block() {
        run = load_run(blockIdx.x);
        next_run = load_run(RUN(run, next));
        third_run = load_run(RUN(run, third));
        enter_run();
        done = false;
        ended = true;
        if (leaf < RUN(run, to)) {
            enter_tile();
            ended = token >= stop;
        }
        if (!ended) pages = load_pages(run, token);
        load_next_pages();
        fresh = false; // q of the first tile is read where it is
    }
    __device__ __forceinline__ void enter_run() {
        const int lone = RUN(run, lone), skip = lone < 0 ? 0 : lone_first(lone, warp);
        leaf = RUN(run, from) + skip;
        next_tile = RUN(run, tile) + skip;
        first = RUN(run, first);
        stride = lone < 0 ? kStride : kPage;
    }
    __device__ __forceinline__ void enter_next() {
        run = next_run;
        next_run = third_run;
        third_run = load_run(RUN(run, third));
        pages = next_pages;
        enter_run();
        load_next_pages();
    }
    __device__ __forceinline__ void enter_tile() {
        const bool lone = stride == kPage;
        const int to = min(RUN(run, n), first + RUN(run, to) - leaf), tile = next_tile,
                  g = group_of<D, H>(a, tile);
        code_at = g * L::head_bytes(a);
        param_at = a.param_base + g * L::param_bytes(a);
        const int begin = RUN(run, begin), tokens = RUN(run, leaf);
        token = lone ? begin : begin + first * tokens + warp * kPage;
        stop = min(begin + to * tokens, RUN(run, end));
        leaf += lone ? kWarps : to - first;
        next_tile += lone ? kWarps : 1;
        first = nth = 0;
        fresh = !lone;
    }
    // To the next tile in which this warp has a page.
    __device__ __forceinline__ void seek() {
        bool entered;
        ended = false;
        do {
            entered = false;
            while (leaf >= RUN(run, to)) {
                done = RUN(run, next) < 0;
                if (done) return;
                enter_next();
                entered = true;
            }
            enter_tile();
        } while (token >= stop);
        // Tiles that a warp has alone are of the same pages.
        if (!entered && stride != kPage) pages = load_pages(run, token);
    }
    // To the tile's next unit; is it of another page?
    __device__ __forceinline__ bool next_unit() {
        token += UT;
        if (UT < kPage && token % kPage != 0 && token < stop) return false;
        token += stride - (UT < kPage ? (token - 1) % kPage + 1 : kPage);
        nth++;
        ended = token >= stop;
        return true;
    }
    // What another page may want.
    __device__ __forceinline__ void turn_page() {
        if (ended)
            seek();
        else if (nth % 32 == 0)
            pages = load_pages(run, token);
    }
    // q of a tile, a row of 2 D bytes a head.
    __device__ __forceinline__ const uint8_t *q_rows(int row, const tile_place &p) const {
        return (const uint8_t *)a.qkv +
               ((int64_t)row * (a.n_heads + 2 * a.n_kv_heads) + p.head0) * 2 * D;
    }
    __device__ __forceinline__ void fetch_q(int row, int of) {
        const int at = q_slot;
        if (++q_slot == L::q_slots(a)) q_slot = 0;
        const uint32_t to = memory + L::q_at(a) + at * L::q_bytes(a), bar = q_full(at);
        const tile_place p = place_of<D, H>(a, of);
        const uint8_t *from = q_rows(row, p);
        if (BULK) {
            if (lane == 0) barrier_expect(bar, p.n_heads * 2 * D);
            __syncwarp();
            if (lane < p.n_heads)
                copy_bulk(to + lane * q_row_bytes<D>(), from + lane * 2 * D, 2 * D, bar);
        } else {
            for (int k = lane; k < p.n_heads * (D / 8); k += 32)
                copy_async(to + k / (D / 8) * q_row_bytes<D>() + k % (D / 8) * 16, from + k * 16);
            copy_async_arrive(bar);
        }
    }
    __device__ __forceinline__ void copy(uint32_t to, const uint8_t *from, int bytes,
                                         uint32_t bar) {
        if (BULK) {
            if (bytes) copy_bulk_once(to, from, bytes, bar);
        } else {
#pragma unroll 1 // registers
            for (int b = lane * 16; b < bytes; b += 512) copy_async(to + b, from + b);
        }
    }
    // K and the parameters of part `part` of the unit, or V of it, or all: one copy where they lie
    // together.
    __device__ __forceinline__ void copy_part(uint32_t to, uint32_t bar, int page, int part, bool k,
                                              bool v) {
        const int at = ET == kPage ? 0 : (UT == kPage ? 0 : token % kPage / ET) + part;
        const uint8_t *base = a.base + (int64_t)page * a.page_bytes;
        const uint8_t *code = base + code_at, *param = base + param_at;
        const int params = L::k_param(a) + L::v_param_bytes(a);
        if (BULK) barrier_expect(bar, (k ? L::k_bytes(a) + params : 0) + (v ? L::v_bytes(a) : 0));
        if (k && v && ET == kPage)
            copy(to, code, L::k_bytes(a) + L::v_bytes(a), bar);
        else if (k)
            copy(to, code + at * L::k_bytes(a), L::k_bytes(a), bar);
        if (v && !(k && ET == kPage))
            copy(to + (k ? L::k_bytes(a) : 0), code + L::v_code(a) + at * L::v_bytes(a),
                 L::v_bytes(a), bar);
        if (k) {
            const uint32_t to_param = to + L::k_bytes(a) + (v ? L::v_bytes(a) : 0);
            if (ET == kPage) {
                copy(to_param, param, params, bar);
            } else {
                copy(to_param, param + at * L::k_param(a), L::k_param(a), bar);
                copy(to_param + L::k_param(a), param + L::v_param(a) + at * L::v_param_bytes(a),
                     L::v_param_bytes(a), bar);
            }
        }
        if (!BULK) copy_async_arrive(bar);
    }
    __device__ __forceinline__ uint32_t slot_at(int i) const {
        return ring + i * L::slot_bytes(a) + (in_turn<D, H, C> ? i % 2 * L::odd_bytes(a) : 0);
    }
    // Fill a slot, which every lane has done with, with the next entry, which is a page's K, V, or
    // what `entry` says. Is the one after it of another page?
    template <int PART> __device__ __forceinline__ bool fetch(int slot) {
        if (done) return false;
        if (PART != V) {
            if (kCopied<D> && fresh && warp == 0) fetch_q(RUN(run, row), next_tile - 1);
            fresh = false;
        }
        const uint32_t to = slot_at(slot), bar = full + 8 * slot;
        const int page = __shfl_sync(~0u, pages, nth % 32);
        if (!BULK || lane == 0) {
            if (WHOLE)
                copy_part(to, bar, page, 0, true, true);
            else if (PART == K || (PART == NEXT && entry < R))
                copy_part(to, bar, page, entry, true, false);
            else
                copy_part(to, bar, page, entry - (PART == V ? 0 : R), false, true);
        }
        if (PART == K) return false;
        if (PART == NEXT && ENTRIES > 1) {
            if (++entry < ENTRIES) return false;
            entry = 0;
        }
        return next_unit();
    }
    // The first slots, as many as are filled at once.
    static constexpr int AT_ONCE = PAGES ? ENTRIES : 1;
    __device__ __forceinline__ void fill(int slot) {
        if (PAGES && !WHOLE) {
            fetch<K>(slot);
            fetch<V>(slot + 1);
        } else {
            fetch<NEXT>(slot);
        }
    }
    // The page after those in the ring, or two where they are short, to L2, if the tile is long
    // enough to be paid for by memory.
    __device__ __forceinline__ void look_ahead() {
        for (int k = 0; k < (WHOLE ? 2 : 1); k++) {
            const int page = __shfl_sync(~0u, pages, (nth + k) % 32);
            if (!done && entry == 0 && stop - token > (4 + k) * stride && lane == 0)
                prefetch_bulk(a.base + (int64_t)page * a.page_bytes + code_at, L::head_bytes(a));
        }
    }
    // Is the entry free of the newest token, which the kernel before this one may be writing?
    __device__ __forceinline__ bool old() const {
        return token + (WHOLE ? UT : (entry % R + 1) * ET) < RUN(run, end);
    }
};

// --- The kernel ----------------------------------------------------------------------------------

template <int D, int H, int UT, int R, kv_class C, typename T>
__device__ __forceinline__ void multiply_k_of(scores<H, UT> &s, const query<D, H> &q,
                                              const decode_arguments &a, const uint32_t (&at)[R],
                                              int lane) {
    const kv_format k = k_format<C>(a);
    if (may_be(C, only_k(C), KF_16) && k == KF_16)
        multiply_k<D, H, UT, R, KF_16, T>(s, q, at, lane, a.bf16);
    else if (may_be(C, only_k(C), KF_4) && !(C == ANY && H > 8) && k == KF_4)
        multiply_k_integers<D, H, UT, R, KF_4, C>(s, q, at, lane);
    else if (may_be(C, only_k(C), KF_8) && k == KF_8)
        multiply_k_integers<D, H, UT, R, KF_8, C>(s, q, at, lane);
    else if (may_be(C, only_k(C), KF_FP8))
        multiply_k<D, H, UT, R, KF_FP8, __half>(s, q, at, lane, false);
}

template <int D, int H, int UT, int R, kv_class C, typename T>
__device__ __forceinline__ void
multiply_v_of(state<D, H> &st, const uint32_t (&p)[UT / 16][NT<H>][2], const decode_arguments &a,
              const extent &x, const uint32_t (&at)[R], int lane) {
    const kv_format v = v_format<C>(a);
    if (may_be(C, only_v(C), KF_16) && v == KF_16) {
        if (x.edge) clear_v<2 * D, UT, R>(at, x, lane);
        multiply_v<D, H, UT, R, KF_16, T>(st.acc, st.middle, p, at, lane, a.bf16);
    } else if (may_be(C, only_v(C), KF_4) && v == KF_4) {
        multiply_v<D, H, UT, R, KF_4, __half>(st.acc, st.middle, p, at, lane, false);
    } else if (may_be(C, only_v(C), KF_8) && v == KF_8) {
        multiply_v<D, H, UT, R, KF_8, __half>(st.acc, st.middle, p, at, lane, false);
    } else if (may_be(C, only_v(C), KF_FP8)) {
        if (x.edge) clear_v<D, UT, R>(at, x, lane);
        multiply_v<D, H, UT, R, KF_FP8, __half>(st.acc, st.middle, p, at, lane, false);
    }
}

template <int D, int H, kv_class C>
__device__ __forceinline__ void load_query(query<D, H> &q, const decode_arguments &a,
                                           const uint8_t *from, int row_bytes, int n_heads,
                                           int lane) {
    const kv_format k = k_format<C>(a);
    if (may_be(C, only_k(C), KF_16) && k == KF_16)
        load_halves<D, H, KF_16>(q, a, from, row_bytes, n_heads, lane);
    else if (may_be(C, only_k(C), KF_4) && !(C == ANY && H > 8) && k == KF_4)
        load_digits<D, H, KF_4>(q, a, from, row_bytes, n_heads, lane);
    else if (may_be(C, only_k(C), KF_8) && k == KF_8)
        load_digits<D, H, KF_8>(q, a, from, row_bytes, n_heads, lane);
    else if (may_be(C, only_k(C), KF_FP8))
        load_halves<D, H, KF_FP8>(q, a, from, row_bytes, n_heads, lane);
}

// Instances whose registers are all taken read a run where it is.
template <int D, int H, kv_class C>
constexpr bool crowded = C == CODES || C == ANY || D > 128 || H > 8;
// Of 16 heads and any formats or codes more is taken anew, lest sm_86 and sm_89 spill.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
template <int H, kv_class C> constexpr bool tight = H > 8 && (C == ANY || C == CODES);
#else
template <int H, kv_class C> constexpr bool tight = false;
#endif

template <int D, int H, kv_class C, typename T, bool BULK> struct worker {
    typedef layout<D, H, C, BULK> L;
    static constexpr int UT = unit_tokens<D, H, C>, R = unit_entries<D, H, C>;
    static constexpr int JOINTS = joints<D, H, C>;
    static constexpr bool WHOLE = C == KV_4;
    const decode_arguments &a;
    uint8_t *memory;
    feeder<D, H, C, BULK> feed;
    int slot = 0;
    uint32_t parity = 0;
    int n_put = 0;
    bool begun = false; // with its first tile

    // The lane, for what is done once a leaf: what follows from it is not kept for that where
    // registers are all taken, and addresses of copies take more.
    __device__ __forceinline__ int rare_lane() const {
        return crowded<D, H, C> && !BULK ? thread_anew() % 32 : feed.lane;
    }
    __device__ __forceinline__ int rare_warp() const {
        return tight<H, C> ? thread_anew() / 32 : feed.warp;
    }
    // Barriers of a joint: all warps have put, all have taken.
    __device__ __forceinline__ uint32_t put_bar(int at) const {
        return feed.q_full(L::q_slots(a) + at);
    }
    __device__ __forceinline__ uint32_t taken_bar(int at) const { return put_bar(JOINTS + at); }

    // The next R entries have landed; their addresses.
    __device__ __forceinline__ void wait(uint32_t (&at)[R]) {
#pragma unroll
        for (int r = 0; r < R; r++) {
            const bool around = R > 1 && slot + r >= L::stages(a);
            const int i = around ? slot + r - L::stages(a) : slot + r;
            barrier_wait(feed.full + 8 * i, parity ^ around);
            at[r] = feed.slot_at(i);
        }
    }
    // They have been read, of K or of V.
    template <int PART> __device__ __forceinline__ void release() {
        typedef decltype(feed) F;
        __syncwarp();
#pragma unroll
        for (int r = 0; r < R; r++) {
            if (feed.template fetch < F::PAGES && !WHOLE ? PART : F::NEXT > (slot))
                feed.turn_page();
            if (++slot == L::stages(a)) slot = 0, parity ^= 1;
        }
    }
    __device__ __forceinline__ void attend(state<D, H> &st, const query<D, H> &q,
                                           const attention_run &run, int token0, int stop) {
        const extent x = {token0, run.lo, stop, token0 < run.lo || token0 + UT > stop};
        const int lane = tight<H, C> ? thread_anew() % 32 : feed.lane;
        scores<H, UT> s;
        uint32_t p[UT / 16][NT<H>][2], k_param[UT / 16][2] = {}, v_param[UT / 16][2] = {}, at[R];
        wait(at);
        multiply_k_of<D, H, UT, R, C, T>(s, q, a, at, lane);
        const int param = L::k_bytes(a) + (WHOLE ? L::v_bytes(a) : 0);
        if (!has_16(C) || k_format<C>(a) != KF_16)
            load_params<UT, R>(k_param, at, param, k_format<C>(a), lane / 4);
        if (!has_16(C) || v_format<C>(a) != KF_16)
            load_params<UT, R>(v_param, at, param + L::k_param(a), v_format<C>(a), lane / 4);
        if (!WHOLE) release<decltype(feed)::K>();
        scale_scores<D, H, UT, C>(s, q, a, k_param);
        if (x.edge) {
            clear_scores<H, UT>(s, x, lane / 4);
            clear_params<UT>(v_param, x, lane / 4);
        }
        const bool fold = (uint32_t)token0 / kStride % kFold == kFold - 1;
        weigh<D, H, UT, C, T>(p, s, st, a, v_param, fold);
        if (WHOLE)
            at[0] += L::k_bytes(a);
        else
            wait(at);
        multiply_v_of<D, H, UT, R, C, T>(st, p, a, x, at, lane);
        release<decltype(feed)::V>();
    }
    // This warp's pages of a leaf, or all of them.
    __device__ __forceinline__ void attend_leaf(state<D, H> &st, const query<D, H> &q,
                                                const attention_run &run, int part) {
        const int begin = run.begin + part * run.leaf, stop = min(begin + run.leaf, run.end);
        const int first = run.lone < 0 ? begin + feed.warp * kPage : begin,
                  step = run.lone < 0 ? kStride : kPage;
        clear(st);
        for (int page = first; page < stop; page += step)
            for (int u = 0; u < kPage && page + u < stop; u += UT)
                attend(st, q, run, page + u, stop);
    }
    // The result to the others, once they have taken what was in its place.
    __device__ __forceinline__ void put(const state<D, H> &st) {
        const int at = n_put % JOINTS;
        barrier_wait(taken_bar(at), n_put / JOINTS & 1 ^ 1);
        put_joint<D, H, C>(memory, st, a, at, rare_warp(), rare_lane());
        barrier_arrive(put_bar(at));
        n_put++;
    }
    // All warps' results of leaf `part`, which was `back` leaves ago, together; then where they go.
    __device__ __forceinline__ void take(sum<D, H> &all, const attention_run &run, int tile,
                                         int part, int back, bool head) {
        const int n = n_put - 1 - back, at = n % JOINTS;
        sum<D, H> leaf;
        barrier_wait(put_bar(at), n / JOINTS & 1);
        take_joint<D, H>(leaf, memory, a, at, rare_warp(), rare_lane());
        barrier_arrive(taken_bar(at));
        if (!head)
            put_record<D, H, C>(leaf, a, run.slot + part, place_of<D, H>(a, tile), feed.warp,
                                rare_lane());
        else if (part == 0)
            all = leaf;
        else
            add_leaf(all, leaf);
    }
    // q of tile n_q of the block after the first. That and a lone warp's (n_q < 0) are read where
    // they are, which takes less time; those of 256 dims all are, which takes fewer registers.
    __device__ __forceinline__ void get_query(query<D, H> &q, int row, const tile_place &p,
                                              int n_q) {
        const uint8_t *there = feed.q_rows(row, p);
        if (!kCopied<D>) {
            load_query<D, H, C>(q, a, there, 2 * D, p.n_heads, feed.lane);
            return;
        }
        const int at = n_q % L::q_slots(a);
        const uint8_t *copy = memory + L::q_at(a) + at * L::q_bytes(a);
        const bool first = n_q < 0;
        if (!first) barrier_wait(feed.q_full(at), n_q / L::q_slots(a) & 1);
        load_query<D, H, C>(q, a, first ? there : copy, first ? 2 * D : q_row_bytes<D>(), p.n_heads,
                            feed.lane);
    }
    // Leaves from .. to of one tile.
    __device__ __forceinline__ void attend_tile(const attention_run &run, int tile, int from,
                                                int to, int n_q) {
        const bool head = from == 0, whole = head && to == run.n;
        query<D, H> q;
        get_query(q, run.row, place_of<D, H>(a, tile), n_q);
        // Memory has nothing to do until the rings' first units have been read.
        if (BULK && UT == kPage && !begun) feed.look_ahead();
        begun = true;
        sum<D, H> here;
        sum<D, H> &all =
            all_bytes<D, H, C, BULK> == 0
                ? here
                : *(sum<D, H> *)(memory + L::all_at(a) + threadIdx.x * all_bytes<D, H, C, BULK>);
        for (int part = from; part < to; part++) {
            state<D, H> st;
            attend_leaf(st, q, run, part);
            if (run.lone >= 0) {
                put_lone<D, H, C>(st, a, run.row, place_of<D, H>(a, tile), rare_lane());
                return;
            }
            put(st);
            // A leaf late, so that the slowest warp of the leaf is not waited for.
            if (JOINTS == 1)
                take(all, run, tile, part, 0, head);
            else if (part > from)
                take(all, run, tile, part - 1, 1, head);
        }
        if (JOINTS > 1) take(all, run, tile, to - 1, 0, head);
        const tile_place place = place_of<D, H>(a, tile);
        if (whole) {
            put_out<D, H, C>(all, a, run.row, place, rare_warp(), rare_lane());
            return;
        }
        if (head) put_record<D, H, C>(all, a, run.slot, place, rare_warp(), rare_lane());
        int *flag = (int *)(memory + L::barriers_at(a) - 16);
        if (count_leaves<D>(a, run, place.head0, to - from, flag))
            join_records<D, crowded<D, H, C> ? 8 : 16>(a, run, place, head ? to : run.prefix);
    }
};

template <int D, int H, kv_class C, typename T, bool BULK>
__global__ void __launch_bounds__(kThreads, 2)
    attend_decode(const __grid_constant__ decode_arguments a) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
    if (BULK) return; // no such copies, and no such launch
#endif
    typedef layout<D, H, C, BULK> L;
    extern __shared__ __align__(1024) uint8_t memory[];
    const int lane = threadIdx.x % 32, warp = __shfl_sync(~0u, threadIdx.x / 32, 0);
    const uint32_t bars = shared_at(memory) + L::barriers_at(a);
    worker<D, H, C, T, BULK> w = {a, memory, {a, shared_at(memory)}};
    auto &feed = w.feed;
    feed.warp = warp;
    feed.lane = lane;
    feed.ring = shared_at(memory) + warp * L::stages(a) * L::slot_bytes(a);
    feed.full = bars + 8 * warp * L::stages(a);
    feed.q_slot = 0;
    feed.entry = 0;
    feed.enter_block();
    if (threadIdx.x == 0) {
        for (int i = 0; i < kWarps * L::stages(a) + L::q_slots(a); i++)
            barrier_init(bars + 8 * i, BULK ? 1 : 32);
        for (int i = 0; i < 2 * joints<D, H, C>; i++) barrier_init(w.put_bar(i), kThreads);
        fence_async_proxy();
    }
    __syncthreads();
    const attention_run *at = a.runs + blockIdx.x;
    attention_run copy = *at;
    // What this step has not written needs no waiting for the kernel before this one; but a unit at
    // a time, or the last reads of that one stand in line behind these. Fewer than 32 pages.
    typedef decltype(w.feed) F;
    bool waited = false;
    for (int slot = 0;; slot += F::AT_ONCE) {
        if (feed.ended) feed.seek();
        const bool enough = feed.done || slot >= L::stages(a);
        if (!waited && (enough || feed.fresh || !feed.old())) {
            wait_for_previous();
            launch_dependents();
            waited = true;
        }
        if (enough) break;
        if (BULK && !waited && slot >= F::ENTRIES)
            barrier_wait(feed.full + 8 * (slot - F::ENTRIES), 0);
        feed.fill(slot);
    }

    int n_q = copy.lone < 0 ? -1 : 0;
    for (;;) {
        const attention_run &run = crowded<D, H, C> ? *at : copy;
        const bool lone = run.lone >= 0;
        const int skip = lone ? lone_first(run.lone, warp) : 0;
        int tile = run.tile + skip, first = run.first;
        for (int leaf = run.from + skip; leaf < run.to; tile += lone ? kWarps : 1) {
            const int from = first, to = min(run.n, from + run.to - leaf);
            leaf += lone ? kWarps : to - from;
            first = 0;
            w.attend_tile(run, tile, from, to, lone ? -1 : n_q++);
        }
        if (run.next < 0) break;
        at = a.runs + run.next;
        copy = *at;
    }
}

// --- Launch --------------------------------------------------------------------------------------

template <int D, int H, kv_class C, typename T, bool BULK>
status launch(const attention_problem *p) {
    const attention_layer_params *l = &p->l;
    decode_arguments a = {};
    a.out = p->out;
    a.qkv = p->qkv;
    a.sinks = l->sinks;
    a.base = (const uint8_t *)p->c.base;
    a.page_bytes = p->c.page_bytes;
    a.param_base = (int)p->layout.param_base;
    a.k = p->c.k;
    a.v = p->c.v;
    a.runs = (const attention_run *)(p->plan + 1);
    a.partial = (float *)p->workspace;
    a.page = p->b.page;
    a.n_heads = l->n_heads;
    a.n_kv_heads = l->n_kv_heads;
    a.ratio = l->n_heads / l->n_kv_heads;
    a.n_tiles = (a.ratio + 8 * NT<H> - 1) / (8 * NT<H>);
    a.bf16 = l->type == DT_BF16;
    a.odd = p->c.v == KF_4 ? 16.f : 1.f;
    a.scale = l->scale * kLog2E;
    a.quarters = a.ratio >= 4 * NJ<H> ? 4 : (a.ratio + NJ<H> - 1) / NJ<H>;

    // One block an SM where half of its memory does not hold what is attended at once.
    const int heads = a.ratio < 8 * NT<H> ? a.ratio : 8 * NT<H>;
    int room = half_room(p->shared_bytes_sm);
    const auto fits = [&] { return a.at.bytes <= room && a.at.stages >= unit_entries<D, H, C>; };
    if (layout<D, H, C, BULK>::FIXED) {
        a.at = layout<D, H, C, BULK>::CONSTANT;
    } else {
        a.at = lay_out<D, H, C, BULK>(a.k, a.v, heads, a.quarters, room);
        if (!fits()) {
            room = p->shared_bytes_sm - 1024;
            a.at = lay_out<D, H, C, BULK>(a.k, a.v, heads, a.quarters, room);
        }
    }
    if (!fits())
        return FAIL(ST_UNSUPPORTED, "attention_decode: %d stages in %d bytes", a.at.stages, room);
    const int bytes = a.at.bytes;
    const auto kernel = attend_decode<D, H, C, T, BULK>;
    cudaError_t e =
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
    if (e != cudaSuccess) return FAIL(ST_DEVICE, "attention_decode: %s", cudaGetErrorString(e));
    const launch_config how(dim3((unsigned)attention_decode_blocks(p->n_sms)), dim3(kThreads),
                            (size_t)bytes, p->stream, early_launches());
    e = cudaLaunchKernelEx(&how.config, kernel, a);
    return e == cudaSuccess ? ST_OK
                            : FAIL(ST_DEVICE, "attention_decode: %s", cudaGetErrorString(e));
}

// Pairs of formats, and types of 16 bits, with an instance of their own: two seconds of compiling
// each. The others are served by what takes any codes, or anything: all pairs of codes of 256 dims
// and, of 64 dims or without bulk copies, FP8 and 8 with 4 bits.
template <int D, bool BULK> constexpr bool own_instance(kv_class c) {
    return c >= CODES || (D <= 128 && (c == KV_4 || c == KV_8)) || (D == 128 && BULK);
}
template <int D, bool BULK> constexpr bool own_types = D == 128 || (D == 64 && BULK);

template <int D, int H, bool BULK> status launch_formats(const attention_problem *p) {
    constexpr int ANY_HEADS = H < 8 && !BULK ? 8 : H;
    const kv_format k = p->c.k, v = p->c.v;
    const bool half = p->l.type == DT_F16;
    const kv_class c = k == KF_16 && v == KF_16     ? KV_16
                       : k == KF_16 || v == KF_16   ? ANY
                       : k == KF_4 && v == KF_4     ? KV_4
                       : k == KF_8 && v == KF_8     ? KV_8
                       : k == KF_FP8 && v == KF_FP8 ? KV_FP8
                       : k == KF_8 && v == KF_4     ? K8_V4
                                                    : CODES;
    switch (own_instance<D, BULK>(c) ? c : CODES) {
#define OF(C) own_instance<D, BULK>(C) ? C : CODES
    case KV_4: return launch<D, H, OF(KV_4), __half, BULK>(p);
    case KV_8: return launch<D, H, OF(KV_8), __half, BULK>(p);
    case KV_FP8: return launch<D, H, OF(KV_FP8), __half, BULK>(p);
    case K8_V4: return launch<D, H, OF(K8_V4), __half, BULK>(p);
#undef OF
    case CODES: return launch<D, H, CODES, __half, BULK>(p);
    case KV_16:
        if constexpr (!own_types<D, BULK>)
            return launch<D, H, KV_16, either, BULK>(p);
        else
            return half ? launch<D, H, KV_16, __half, BULK>(p)
                        : launch<D, H, KV_16, __nv_bfloat16, BULK>(p);
    default: return launch<D, ANY_HEADS, ANY, either, BULK>(p);
    }
}

// attention_tile_heads, or 4 where a group has no more and 128 dims.
template <int D, bool BULK> status launch_heads(const attention_problem *p) {
    const int ratio = p->l.n_heads / p->l.n_kv_heads;
    if constexpr (D == 128) {
        if (ratio > 8) return launch_formats<D, 16, BULK>(p);
        if (ratio <= 4) return launch_formats<D, 4, BULK>(p);
    }
    return launch_formats<D, 8, BULK>(p);
}

template <bool BULK> status launch_sizes(const attention_problem *p) {
    switch (p->l.head_dim) {
    case 64: return launch_heads<64, BULK>(p);
    case 128: return launch_heads<128, BULK>(p);
    default: return launch_heads<256, BULK>(p);
    }
}

} // namespace

extern "C" status attention_decode_bulk_launch(const attention_problem *p, bool, bool) {
    return launch_sizes<true>(p);
}
extern "C" status attention_decode_async_launch(const attention_problem *p, bool, bool) {
    return launch_sizes<false>(p);
}
