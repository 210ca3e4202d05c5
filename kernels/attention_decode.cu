// attention_decode.cu - one token a sequence: the cache is read once, at the rate of the memory.
//
// The heads of a group are the 8 columns of the mma tile and tokens its 16 rows:
//
//     S^T [16 tokens, 8 heads] = K [16, D] q^T [D, 8]
//     O^T [16 dims, 8 heads] += V^T [16, 16] P^T [16, 8]
//
// so that a group of up to 8 heads costs one pass over the cache. K and V stay codes: an integer
// code c placed in the low bits of an fp16 is the subnormal c * 2^-24, exactly, so "conversion" is
// one AND. What remains of value = c * s + z is per token and goes into the scores (q.K = s (q.c) +
// z sum(q)) and into the weights (p.V = (p s).c + sum(p z)). q is multiplied by a power of two so
// that it is exact in fp16 whatever the model's type. Codes of V are counted from their middle (p
// s).(c - m) through one further mma with a constant row, since (p s) rounds to fp16 and its error
// would otherwise be multiplied by m.
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

// What K and V may be in an instance. The common pairs of formats are constants there: the code of
// the others costs time even where it is jumped over.
enum kv_class { KV_4, KV_8, KV_FP8, K8_V4, CODES, KV_16, ANY };
__host__ __device__ constexpr bool has_16(kv_class c) { return c == KV_16 || c == ANY; }

// Tokens of a ring entry: 4 KB of codes where that is 16 or more, and half as many where two tiles
// of heads share the registers.
constexpr int clamp_tokens(int n) { return n > kPage ? kPage : n < 16 ? 16 : n; }
template <int D, int NT, kv_class C>
constexpr int entry_tokens = clamp_tokens((C == KV_4   ? 8192
                                           : has_16(C) ? 2048
                                                       : 4096) /
                                          (D * NT));
// Entries of K, and as many of V, that are attended at once, a unit: its chain of latencies is
// nearly as long as that of one. Each is filled again as soon as it has been read.
template <int D, int NT, kv_class C>
constexpr int unit_entries = D <= 128 && NT == 1 && entry_tokens<D, NT, C> < kPage ? 2 : 1;
template <int D, int NT, kv_class C>
constexpr int unit_tokens = entry_tokens<D, NT, C> *unit_entries<D, NT, C>;

struct decode_arguments {
    void *out;       // [T, H D]
    const void *qkv; // [T, (H + 2G) D]
    const void *sinks;
    const uint8_t *base;
    int64_t page_bytes;
    int head_bytes, param_base, param_bytes, v_code, v_param; // attention_layout
    kv_format k, v;
    const attention_run *runs;
    float *partial; // see attention_plan.h
    const int32_t *page;
    int n_heads, n_kv_heads, ratio, n_tiles;      // n_tiles: of a group
    bool bf16;                                    // q, out and sinks; fp16 otherwise
    float scale;                                  // times log2(e)
    int k_bytes, v_bytes, k_param, v_param_bytes; // of an entry
    int stages, slot_bytes, q_slots, q_bytes;
    int quarters; // of the lanes of four whose columns are heads
    int q_at, joint_at, sums_at, all_at, barriers_at; // in block memory, after the rings
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

// One warp's q^T fragments [D / 16][NT][2] in the order in which format F's rows come, and for
// codes what the sums over q of this lane's two columns are, and the scale.
template <int D, int NT> struct query {
    uint32_t b[D / 16][NT][2];
    float scale;      // of a product of codes, to a score in base 2
    float sum[NT][2]; // times the factor of scores
};

// Two 16-bit values of the model's type.
__device__ __forceinline__ float2 pair16(uint32_t x, bool bf16) {
    if (bf16) return make_float2(__uint_as_float(x << 16), __uint_as_float(x & 0xffff0000u));
    return __half22float2(*reinterpret_cast<const __half2 *>(&x));
}

// This lane's dims of q, two to a word: of k-step i words 2 i and 2 i + 1, or with nibbles eight
// neighbours of two k-steps in words 4 (i / 2) .. + 3.
template <int D, int NT, kv_format F>
__device__ __forceinline__ void load_words(uint32_t (&raw)[NT][D / 8], const uint8_t *from,
                                           int row_bytes, int n_heads, int lane) {
    const int column = lane / 4, quarter = lane % 4;
#pragma unroll
    for (int n = 0; n < NT; n++) {
        const int h = n * 8 + column;
        const uint16_t *row = (const uint16_t *)(from + min(h, n_heads - 1) * row_bytes);
        const uint32_t keep = h < n_heads ? ~0u : 0u;
#pragma unroll
        for (int i = 0; i < D / 16; i++) {
            if (F == KF_16) {
                raw[n][2 * i] = *(const uint32_t *)(row + 16 * i + 2 * quarter) & keep;
                raw[n][2 * i + 1] = *(const uint32_t *)(row + 16 * i + 8 + 2 * quarter) & keep;
            } else if (F == KF_4) {
                if (i % 2) continue;
                const uint4 x = *(const uint4 *)(row + 16 * i + 8 * quarter);
                raw[n][2 * i] = x.x & keep, raw[n][2 * i + 1] = x.y & keep;
                raw[n][2 * i + 2] = x.z & keep, raw[n][2 * i + 3] = x.w & keep;
            } else {
                const uint2 x = *(const uint2 *)(row + 16 * i + 4 * quarter);
                raw[n][2 * i] = x.x & keep, raw[n][2 * i + 1] = x.y & keep;
            }
        }
    }
}

template <int D, int NT, kv_format F, typename T>
__device__ __forceinline__ void load_query(query<D, NT> &q, const decode_arguments &a,
                                           const uint8_t *from, int row_bytes, int n_heads,
                                           int lane) {
    const int quarter = lane % 4;
    uint32_t raw[NT][D / 8];
    load_words<D, NT, F>(raw, from, row_bytes, n_heads, lane);
    if (F == KF_16) {
#pragma unroll
        for (int n = 0; n < NT; n++)
#pragma unroll
            for (int i = 0; i < D / 16; i++)
                q.b[i][n][0] = raw[n][2 * i], q.b[i][n][1] = raw[n][2 * i + 1];
        return;
    }
    float amax = 0.f;
#pragma unroll
    for (int n = 0; n < NT; n++) {
        float sum = 0.f;
#pragma unroll
        for (int i = 0; i < D / 8; i++) {
            const float2 x = pair16(raw[n][i], a.bf16);
            amax = fmaxf(amax, fmaxf(fabsf(x.x), fabsf(x.y)));
            sum += x.x + x.y;
        }
        sum += __shfl_xor_sync(~0u, sum, 1);
        sum += __shfl_xor_sync(~0u, sum, 2);
        q.sum[n][0] = __shfl_sync(~0u, sum, quarter * 8) * a.scale;
        q.sum[n][1] = __shfl_sync(~0u, sum, quarter * 8 + 4) * a.scale;
    }
    amax = warp_max(amax);
    // The power of two that brings the largest to [2^11, 2^12).
    const float f =
        amax < 1e-18f ? 1.f : __uint_as_float((265u << 23) - (__float_as_uint(amax) & 0x7f800000u));
    const float odd = F == KF_4 ? f / 16 : f; // odd nibbles come times 16
    q.scale = a.scale * code_unit(F) / f;
#pragma unroll
    for (int n = 0; n < NT; n++)
#pragma unroll
        for (int i = 0; i < D / 16; i++) {
            if (F == KF_4) { // dims 0, 4 | 1, 5 of eight, then 2, 6 | 3, 7
                const int w = i / 2 * 4 + i % 2;
                const float2 x = pair16(raw[n][w], a.bf16), y = pair16(raw[n][w + 2], a.bf16);
                q.b[i][n][0] = pack2<__half>(x.x * f, y.x * f);
                q.b[i][n][1] = pack2<__half>(x.y * odd, y.y * odd);
            } else { // dims 0, 2 | 1, 3 of four, or 0, 1 | 2, 3
                const float2 x = pair16(raw[n][2 * i], a.bf16),
                             y = pair16(raw[n][2 * i + 1], a.bf16);
                const bool near = F == KF_FP8 && kNeighbours;
                q.b[i][n][0] = pack2<__half>(x.x * f, (near ? x.y : y.x) * f);
                q.b[i][n][1] = pack2<__half>((near ? y.x : x.y) * f, y.y * f);
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

// s[UT / 16][NT][4] = K [UT, D] q^T
template <int D, int NT, int UT, int R, kv_format F, typename T>
__device__ __forceinline__ void multiply_k(float (&s)[UT / 16][NT][4], const query<D, NT> &q,
                                           const uint32_t (&k_at)[R], int lane) {
    constexpr int ROW = F == KF_16 ? 2 * D : F == KF_4 ? D / 2 : D;
    constexpr int STEPS = F == KF_16 ? 1 : F == KF_4 ? 4 : 2; // k-steps of a pair of pieces
    const uint32_t lane_at = lane_offset<ROW, true>(lane);
#pragma unroll
    for (int m = 0; m < UT / 16; m++)
#pragma unroll
        for (int n = 0; n < NT; n++)
#pragma unroll
            for (int i = 0; i < 4; i++) s[m][n][i] = 0.f;
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
                } else if (F == KF_4) {
                    const uint32_t lo = i % 2 ? r[m][i / 2 * 2] >> 8 : r[m][i / 2 * 2];
                    const uint32_t hi = i % 2 ? r[m][i / 2 * 2 + 1] >> 8 : r[m][i / 2 * 2 + 1];
                    x[0] = lo & 0x000f000fu, x[1] = hi & 0x000f000fu;
                    x[2] = lo & 0x00f000f0u, x[3] = hi & 0x00f000f0u;
                } else {
                    bytes_to_pairs<F>(x[0], x[2], r[m][i * 2]);
                    bytes_to_pairs<F>(x[1], x[3], r[m][i * 2 + 1]);
                }
#pragma unroll
                for (int n = 0; n < NT; n++) {
                    const uint32_t *b = q.b[pair * STEPS + i][n];
                    mma<T>(s[m][n], x[0], x[1], x[2], x[3], b[0], b[1]);
                }
            }
    }
}

// acc[D / 16][NT][4] += V^T [D, UT] p^T; middle[NT][4] += -m * sum of p over tokens.
template <int D, int NT, int UT, int R, kv_format F, typename T>
__device__ __forceinline__ void multiply_v(float (&acc)[D / 16][NT][4], float (&middle)[NT][4],
                                           const uint32_t (&p)[UT / 16][NT][2],
                                           const uint32_t (&v_at)[R], int lane) {
    constexpr int ROW = F == KF_16 ? 2 * D : F == KF_4 ? D / 2 : D;
    constexpr uint32_t MIDDLE = F == KF_8 ? 0x80808080u : 0x80088008u; // -128, -8 times 2^-24
    const uint32_t lane_at = lane_offset<ROW, false>(lane);
#pragma unroll
    for (int m = 0; m < UT / 16; m++) {
        if (F == KF_8 || F == KF_4)
#pragma unroll
            for (int n = 0; n < NT; n++)
                mma<__half>(middle[n], MIDDLE, MIDDLE, MIDDLE, MIDDLE, p[m][n][0], p[m][n][1]);
#pragma unroll
        for (int pair = 0; pair < ROW / 32; pair++) {
            uint32_t r[4]; // pieces 0, 1 of tokens 0..7, then of tokens 8..15
            load_matrices_turned(r, tile_at<UT, R, ROW>(v_at, m) + pair_offset<ROW>(lane_at, pair));
            if (F == KF_16) {
#pragma unroll
                for (int n = 0; n < NT; n++)
                    mma<T>(acc[pair][n], r[0], r[1], r[2], r[3], p[m][n][0], p[m][n][1]);
            }
#pragma unroll
            for (int piece = 0; piece < (F == KF_16 ? 0 : 2); piece++) {
                const uint32_t lo = r[piece], hi = r[piece + 2];
                if (F == KF_4) {
#pragma unroll
                    for (int i = 0; i < 2; i++) {
                        const uint32_t x = i ? lo >> 8 : lo, y = i ? hi >> 8 : hi;
#pragma unroll
                        for (int n = 0; n < NT; n++)
                            mma<T>(acc[pair * 4 + piece * 2 + i][n], x & 0x000f000fu,
                                   x & 0x00f000f0u, y & 0x000f000fu, y & 0x00f000f0u, p[m][n][0],
                                   p[m][n][1]);
                    }
                } else {
                    uint32_t x[4];
                    bytes_apart<F>(x[0], x[1], lo);
                    bytes_apart<F>(x[2], x[3], hi);
#pragma unroll
                    for (int n = 0; n < NT; n++)
                        mma<T>(acc[pair * 2 + piece][n], x[0], x[1], x[2], x[3], p[m][n][0],
                               p[m][n][1]);
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
template <int D, int NT> struct state {
    float acc[D / 16][NT][4];
    float middle[NT][4];
    float m[NT][2], l[NT][2], z[NT][2]; // l, z: this lane's tokens only
    float unit;                         // power of two that the scales of V are divided by
};

template <int D, int NT> __device__ __forceinline__ void clear(state<D, NT> &st) {
#pragma unroll
    for (int n = 0; n < NT; n++) {
#pragma unroll
        for (int i = 0; i < D / 16; i++)
#pragma unroll
            for (int e = 0; e < 4; e++) st.acc[i][n][e] = 0.f;
#pragma unroll
        for (int e = 0; e < 4; e++) st.middle[n][e] = 0.f;
#pragma unroll
        for (int j = 0; j < 2; j++) st.m[n][j] = -INFINITY, st.l[n][j] = st.z[n][j] = 0.f;
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
template <int NT, int UT>
__device__ __forceinline__ void clear_scores(float (&s)[UT / 16][NT][4], const extent &x, int row) {
#pragma unroll
    for (int m = 0; m < UT / 16; m++)
#pragma unroll
        for (int e = 0; e < 4; e++)
            if (x.out(m * 16 + e / 2 * 8 + row))
#pragma unroll
                for (int n = 0; n < NT; n++) s[m][n][e] = -INFINITY;
}

// Products to scores in base 2.
template <int D, int NT, int UT, kv_class C>
__device__ __forceinline__ void scale_scores(float (&s)[UT / 16][NT][4], const query<D, NT> &q,
                                             const decode_arguments &a,
                                             const uint32_t (&params)[UT / 16][2]) {
    const bool codes = !has_16(C) || k_format<C>(a) != KF_16;
#pragma unroll
    for (int m = 0; m < UT / 16; m++)
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const float2 p = halves(params[m][half]);
            const float f = codes ? p.x * q.scale : a.scale;
#pragma unroll
            for (int n = 0; n < NT; n++)
#pragma unroll
                for (int j = 0; j < 2; j++) {
                    float &y = s[m][n][half * 2 + j];
                    y = codes ? y * f + p.y * q.sum[n][j] : y * f;
                }
        }
}

// The state to new maxima and another unit of V's scales.
template <int D, int NT>
__device__ __forceinline__ void move_state(state<D, NT> &st, const float (&top)[NT][2],
                                           float (&from)[NT][2], float unit, float per_unit) {
    float shrink[NT][2];
    bool moved = false;
#pragma unroll
    for (int n = 0; n < NT; n++)
#pragma unroll
        for (int j = 0; j < 2; j++) {
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
    for (int n = 0; n < NT; n++) {
#pragma unroll
        for (int i = 0; i < D / 16; i++)
#pragma unroll
            for (int e = 0; e < 4; e++) st.acc[i][n][e] *= shrink[n][e % 2];
#pragma unroll
        for (int e = 0; e < 4; e++) st.middle[n][e] *= shrink[n][e % 2];
    }
}

// Scores of a unit to weights p as multiply_v wants them; moves the state to the new maximum, and
// to a power of two near the largest scale of V so far: scales are divided by it, so that p * scale
// stays in fp16's range.
template <int D, int NT, int UT, kv_class C, typename T>
__device__ __forceinline__ void weigh(uint32_t (&p)[UT / 16][NT][2], float (&s)[UT / 16][NT][4],
                                      state<D, NT> &st, const decode_arguments &a,
                                      const uint32_t (&params)[UT / 16][2]) {
    const kv_format v = v_format<C>(a);
    const bool codes = !has_16(C) || v != KF_16;
    float top[NT][2], from[NT][2], unit = st.unit;
#pragma unroll
    for (int n = 0; n < NT; n++)
#pragma unroll
        for (int j = 0; j < 2; j++) {
            top[n][j] = s[0][n][j];
#pragma unroll
            for (int m = 0; m < UT / 16; m++)
                top[n][j] = fmaxf(top[n][j], fmaxf(s[m][n][j], s[m][n][j + 2]));
        }
    if (codes) {
#pragma unroll
        for (int m = 0; m < UT / 16; m++)
            unit = fmaxf(unit, fmaxf(halves(params[m][0]).x, halves(params[m][1]).x));
        unit = __uint_as_float(__float_as_uint(column_max(unit)) & 0x7f800000u);
    }
    const float per_unit = __uint_as_float(0x7f000000u - __float_as_uint(unit));
    move_state(st, top, from, unit, per_unit);
    const float middle = v == KF_8 ? 128.f : v == KF_4 ? 8.f : 0.f;
#pragma unroll
    for (int m = 0; m < UT / 16; m++)
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const float2 vp = halves(params[m][half]);
            const float vs = vp.x * per_unit, vz = vp.y + middle * vp.x;
#pragma unroll
            for (int n = 0; n < NT; n++) {
                float w[2];
#pragma unroll
                for (int j = 0; j < 2; j++) {
                    w[j] = exp2_approx(s[m][n][half * 2 + j] - from[n][j]);
                    st.l[n][j] += w[j];
                    if (codes) {
                        st.z[n][j] += w[j] * vz;
                        w[j] *= vs;
                    }
                }
                const uint32_t packed = codes ? pack2<__half>(w[0], w[1]) : pack2<T>(w[0], w[1]);
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
// this lane's columns the largest score and the sum of weights.
template <int D, int NT> struct sum {
    float x[D / 64][NT][4];
    float m[NT][2], l[NT][2];
};

// a f + b g, rounded the same wherever two sums are joined.
__device__ __forceinline__ float join2(float a, float f, float b, float g) {
    return __fmaf_rn(a, f, __fmul_rn(b, g));
}

// Two tiles of heads take the registers, and so do 256 dims, or the code of any format, beside the
// addresses of copies: a thread's sum is in block memory then, a word further on than the one
// before needs, for the banks' sake.
template <int D, int NT, kv_class C, bool BULK>
constexpr int all_bytes = NT == 1 && D <= 128 && (BULK || C != ANY) ? 0
                                                                    : (int)sizeof(sum<D, NT>) + 4;

template <int D, int NT>
__device__ __forceinline__ void add_leaf(sum<D, NT> &to, const sum<D, NT> &leaf) {
#pragma unroll
    for (int n = 0; n < NT; n++) {
        float f[2], g[2];
#pragma unroll
        for (int j = 0; j < 2; j++) {
            const float m = fmaxf(to.m[n][j], leaf.m[n][j]);
            f[j] = exp2_approx(to.m[n][j] - m), g[j] = exp2_approx(leaf.m[n][j] - m);
            to.m[n][j] = m;
            to.l[n][j] = join2(to.l[n][j], f[j], leaf.l[n][j], g[j]);
        }
#pragma unroll
        for (int k = 0; k < D / 64; k++)
#pragma unroll
            for (int e = 0; e < 4; e++)
                to.x[k][n][e] = join2(to.x[k][n][e], f[e % 2], leaf.x[k][n][e], g[e % 2]);
    }
}

// Results of two leaves at a time where that leaves enough memory for the rings.
template <int D, int NT, kv_class C>
constexpr int joints = D <= 128 && NT == 1 && !has_16(C) ? 2 : 1;

// Block memory of the warps' results, [joints] of each: acc [4 warps, D / 16, NT, 8 rows, quarters]
// float4, and (m, l) [4 warps, NT, 4 quarters] float4.
template <int D, int NT> __host__ __device__ constexpr int joint_bytes(int quarters) {
    return kWarps * (D / 16) * NT * 8 * quarters * 16;
}
template <int D, int NT>
__device__ __forceinline__ int joint_tile(const decode_arguments &a, int warp, int i, int n) {
    return ((warp * (D / 16) + i) * NT + n) * 8 * a.quarters;
}

template <int D, int NT, kv_class C>
__device__ __forceinline__ void put_joint(uint8_t *memory, const state<D, NT> &st,
                                          const decode_arguments &a, int at, int warp, int lane) {
    const kv_format v = v_format<C>(a);
    const bool codes = !has_16(C) || v != KF_16;
    const int row = lane / 4, quarter = lane % 4;
    const float unit = st.unit * code_unit(v), odd = v == KF_4 ? unit / 16 : unit;
    float4 *acc = (float4 *)(memory + a.joint_at) + joint_tile<D, NT>(a, at * kWarps, 0, 0) +
                  row * a.quarters + quarter;
    float4 *ml = (float4 *)(memory + a.sums_at) + (at * kWarps + warp) * NT * 4;
#pragma unroll
    for (int n = 0; n < NT; n++) {
        const float l0 = column_sum(st.l[n][0]), l1 = column_sum(st.l[n][1]);
        float z[2] = {0.f, 0.f};
#pragma unroll
        for (int j = 0; j < 2; j++)
            if (codes) z[j] = column_sum(st.z[n][j]) + st.middle[n][j] * unit;
        if (row == 0) ml[n * 4 + quarter] = make_float4(st.m[n][0], l0, st.m[n][1], l1);
        if (quarter >= a.quarters) continue;
#pragma unroll
        for (int i = 0; i < D / 16; i++) {
            const float *x = st.acc[i][n];
            acc[joint_tile<D, NT>(a, warp, i, n)] =
                codes ? make_float4(x[0] * unit + z[0], x[1] * unit + z[1], x[2] * odd + z[0],
                                    x[3] * odd + z[1])
                      : make_float4(x[0], x[1], x[2], x[3]);
        }
    }
}

// The warps' results, in order; those without a page have none, at a score of -inf.
template <int D, int NT>
__device__ __forceinline__ void take_joint(sum<D, NT> &s, const uint8_t *memory,
                                           const decode_arguments &a, int at, int warp, int lane) {
    const int row = lane / 4, quarter = lane % 4;
    const float4 *acc = (const float4 *)(memory + a.joint_at) +
                        joint_tile<D, NT>(a, at * kWarps, 0, 0) + row * a.quarters +
                        min(quarter, a.quarters - 1);
    const float4 *ml = (const float4 *)(memory + a.sums_at) + at * kWarps * NT * 4 + quarter;
#pragma unroll
    for (int n = 0; n < NT; n++) {
        float4 w[kWarps];
        float m[2] = {-INFINITY, -INFINITY};
#pragma unroll
        for (int k = 0; k < kWarps; k++) {
            w[k] = ml[(k * NT + n) * 4];
            m[0] = fmaxf(m[0], w[k].x), m[1] = fmaxf(m[1], w[k].z);
        }
        s.l[n][0] = s.l[n][1] = 0.f;
#pragma unroll
        for (int i = 0; i < D / 64; i++)
#pragma unroll
            for (int e = 0; e < 4; e++) s.x[i][n][e] = 0.f;
#pragma unroll
        for (int k = 0; k < kWarps; k++) {
            const float f = exp2_approx(w[k].x - m[0]), g = exp2_approx(w[k].z - m[1]);
            s.l[n][0] += w[k].y * f, s.l[n][1] += w[k].w * g;
#pragma unroll
            for (int i = 0; i < D / 64; i++) {
                const float4 y = acc[joint_tile<D, NT>(a, k, warp * (D / 64) + i, n)];
                float *x = s.x[i][n];
                x[0] += y.x * f, x[1] += y.y * g, x[2] += y.z * f, x[3] += y.w * g;
            }
        }
        s.m[n][0] = m[0], s.m[n][1] = m[1];
    }
}

// --- Results -------------------------------------------------------------------------------------

// The heads of a tile, and where they are.
struct tile_place {
    int head0, n_heads;
};
template <int NT>
__device__ __forceinline__ tile_place place_of(const decode_arguments &a, int tile) {
    const int g = a.n_tiles == 1 ? tile : tile / a.n_tiles;
    const int first = (tile - g * a.n_tiles) * 8 * NT;
    return {g * a.ratio + first, min(8 * NT, a.ratio - first)};
}

// 1 / (l + sink)
__device__ __forceinline__ float normal_of(const decode_arguments &a, int head, float m, float l) {
    if (a.sinks) l += exp2_approx(load16(a.sinks, head, a.bf16) * kLog2E - m);
    return 1.f / l;
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

template <int D, int NT, kv_class C>
__device__ __forceinline__ void put_out(const sum<D, NT> &s, const decode_arguments &a, int row,
                                        const tile_place &p, int warp, int lane) {
    const kv_format v = v_format<C>(a);
#pragma unroll
    for (int n = 0; n < NT; n++)
#pragma unroll
        for (int j = 0; j < 2; j++) {
            const int h = n * 8 + lane % 4 * 2 + j, head = p.head0 + h;
            if (h >= p.n_heads) continue;
            const float f = normal_of(a, head, s.m[n][j], s.l[n][j]);
            uint16_t *to = (uint16_t *)a.out + ((int64_t)row * a.n_heads + head) * D;
#pragma unroll
            for (int k = 0; k < D / 64; k++)
                put_pair<C>(to, v, warp * (D / 64) + k, lane / 4,
                            pack_out(a, s.x[k][n][j] * f, s.x[k][n][j + 2] * f));
        }
}

// The same of a warp that has the tile alone.
template <int D, int NT, kv_class C>
__device__ __forceinline__ void put_lone(const state<D, NT> &st, const decode_arguments &a, int row,
                                         const tile_place &p, int lane) {
    const kv_format v = v_format<C>(a);
    const bool codes = !has_16(C) || v != KF_16;
    const float unit = st.unit * code_unit(v), odd = v == KF_4 ? unit / 16 : unit;
#pragma unroll
    for (int n = 0; n < NT; n++)
#pragma unroll
        for (int j = 0; j < 2; j++) {
            const int h = n * 8 + lane % 4 * 2 + j, head = p.head0 + h;
            const float l = column_sum(st.l[n][j]);
            const float z = codes ? column_sum(st.z[n][j]) + st.middle[n][j] * unit : 0.f;
            if (h >= p.n_heads) continue;
            const float f = normal_of(a, head, st.m[n][j], l);
            uint16_t *to = (uint16_t *)a.out + ((int64_t)row * a.n_heads + head) * D;
#pragma unroll
            for (int i = 0; i < D / 16; i++) {
                const float x = st.acc[i][n][j], y = st.acc[i][n][j + 2];
                put_pair<C>(to, v, i, lane / 4,
                            codes ? pack_out(a, (x * unit + z) * f, (y * odd + z) * f)
                                  : pack_out(a, x * f, y * f));
            }
        }
}

template <int D>
__device__ __forceinline__ float *record_of(const decode_arguments &a, int slot, int head) {
    return a.partial + ((int64_t)slot * a.n_heads + head) * (D + ATTENTION_PARTIAL_EXTRA);
}

template <int D, int NT, kv_class C>
__device__ __forceinline__ void put_record(const sum<D, NT> &s, const decode_arguments &a, int slot,
                                           const tile_place &p, int warp, int lane) {
    const kv_format v = v_format<C>(a);
#pragma unroll
    for (int n = 0; n < NT; n++)
#pragma unroll
        for (int j = 0; j < 2; j++) {
            const int h = n * 8 + lane % 4 * 2 + j;
            if (h >= p.n_heads) continue;
            float *to = record_of<D>(a, slot, p.head0 + h);
            if (warp == 0 && lane < 4) *(float2 *)(to + D) = make_float2(s.m[n][j], s.l[n][j]);
#pragma unroll
            for (int k = 0; k < D / 64; k++) {
                int d0, d1;
                rows_of(v, warp * (D / 64) + k, lane / 4, &d0, &d1);
                to[d0] = s.x[k][n][j];
                to[d1] = s.x[k][n][j + 2];
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

// Records of a tile in order: leaves 0 .. prefix - 1 in the first slot, then one a leaf.
template <int D, int NT>
__device__ __forceinline__ void join_records(const decode_arguments &a, const attention_run &run,
                                             const tile_place &p, int prefix) {
    constexpr int BATCH = NT == 1 ? 16 : 8;
    const int64_t step = (int64_t)a.n_heads * (D + ATTENTION_PARTIAL_EXTRA); // from slot to slot
    const int n = run.n - prefix + 1;                                        // records
    for (int i = threadIdx.x; i < p.n_heads * (D / 4); i += kThreads) {
        const int head = p.head0 + i / (D / 4), d = i % (D / 4) * 4;
        const float *first = record_of<D>(a, run.slot, head);
        float m = -INFINITY, l = 0.f;
        float4 x = make_float4(0.f, 0.f, 0.f, 0.f);
        for (int k0 = 0; k0 < n; k0 += BATCH) {
            float2 w[BATCH];
            float4 y[BATCH];
#pragma unroll
            for (int k = 0; k < BATCH; k++) {
                const int at = min(k0 + k, n - 1);
                const float *from = first + (at ? at + prefix - 1 : 0) * step;
                w[k] = __ldcg((const float2 *)(from + D));
                y[k] = __ldcg((const float4 *)(from + d));
            }
#pragma unroll
            for (int k = 0; k < BATCH; k++) { // without branches: the factors do not wait for x
                const bool start = k0 + k == 0, there = k0 + k < n;
                const float next = there ? fmaxf(m, w[k].x) : m;
                const float f = exp2_approx(m - next), g = exp2_approx(w[k].x - next);
                m = next;
                l = start ? w[k].y : there ? join2(l, f, w[k].y, g) : l;
                x.x = start ? y[k].x : there ? join2(x.x, f, y[k].x, g) : x.x;
                x.y = start ? y[k].y : there ? join2(x.y, f, y[k].y, g) : x.y;
                x.z = start ? y[k].z : there ? join2(x.z, f, y[k].z, g) : x.z;
                x.w = start ? y[k].w : there ? join2(x.w, f, y[k].w, g) : x.w;
            }
        }
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

template <int D> __host__ __device__ constexpr int q_row_bytes() { return 2 * D + 16; }

// The next entry to fetch, and where: the warp's cursor over its block's work. Leaves are multiples
// of kStride, so that the warp's pages of a tile are kStride apart across them.
// WHOLE: an entry is K and V of a unit, else one of them.
template <int D, int NT, int UT, int R, bool WHOLE, bool BULK> struct feeder {
    static constexpr int ET = UT / R, ENTRIES = WHOLE ? 1 : 2 * R; // of an entry; of a unit
    const decode_arguments &a;
    uint32_t memory;     // the block's
    uint32_t ring, full; // this warp's entries and their barriers
    int warp, lane;
    // This lane's word of the run at hand and of the two after it, and the first page of the next:
    // loaded long before they are wanted, since a warp that waits for one does nothing else.
    int run, next_run, third_run, next_page;
    const int32_t *pages;
    int leaf, next_tile, first; // after the tile at hand: leaf of the run, tile, leaf of the tile
    int stride;                 // tokens from this warp's page to its next
    int token, stop;            // of the unit; the end of the run's part of the tile
    int page;
    int code_at, param_at; // of the tile's head in a page
    int q_slot;            // of the next q
    int entry;             // of the unit, comes next
    bool fresh;            // a new tile: its q is wanted
    bool done;

    __device__ __forceinline__ uint32_t q_full(int at) const {
        return memory + a.barriers_at + 8 * (kWarps * a.stages + at);
    }
    __device__ __forceinline__ int load_run(int at) const {
        const int words = (int)(sizeof(attention_run) / sizeof(int32_t));
        return at < 0 ? 0 : ((const int32_t *)(a.runs + at))[min(lane, words - 1)];
    }
    // A member of a run that the lanes hold.
#define RUN(words, member)                                                                         \
    __shfl_sync(~0u, words, (int)(offsetof(attention_run, member) / sizeof(int32_t)))
    __device__ __forceinline__ void load_next_page() {
        if (RUN(run, next) < 0) return;
        const int first = RUN(next_run, first), end = RUN(next_run, end);
        const int at = RUN(next_run, lone) >= 0
                           ? RUN(next_run, begin)
                           : RUN(next_run, begin) + first * RUN(next_run, leaf) + warp * kPage;
        next_page = a.page[RUN(next_run, page_at) + min(at, end - 1) / kPage];
    }
    __device__ __forceinline__ void enter_block() {
        run = load_run(blockIdx.x);
        next_run = load_run(RUN(run, next));
        third_run = load_run(RUN(run, third));
        pages = a.page + RUN(run, page_at);
        enter_run();
        done = false;
        const bool lone = stride == kPage;
        load_next_page();
        seek();
        if (!lone) fresh = false; // q of the first tile is read where it is
    }
    __device__ __forceinline__ void enter_run() {
        pages = a.page + RUN(run, page_at);
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
        page = next_page;
        enter_run();
        load_next_page();
    }
    __device__ __forceinline__ void enter_tile() {
        const bool lone = stride == kPage;
        const int to = min(RUN(run, n), first + RUN(run, to) - leaf), tile = next_tile,
                  g = a.n_tiles == 1 ? tile : tile / a.n_tiles;
        code_at = g * a.head_bytes;
        param_at = a.param_base + g * a.param_bytes;
        const int begin = RUN(run, begin), tokens = RUN(run, leaf);
        token = lone ? begin : begin + first * tokens + warp * kPage;
        stop = min(begin + to * tokens, RUN(run, end));
        leaf += lone ? kWarps : to - first;
        next_tile += lone ? kWarps : 1;
        first = 0;
        fresh = !lone;
    }
    __device__ __forceinline__ void load_page() { page = pages[token / kPage]; }
    // To the next tile in which this warp has a page.
    __device__ __forceinline__ void seek() {
        bool entered;
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
        if (!entered) load_page();
    }
    __device__ __forceinline__ void next_unit() {
        token += UT;
        if (UT < kPage && token % kPage != 0 && token < stop) return;
        token += stride - (UT < kPage ? (token - 1) % kPage + 1 : kPage);
        if (token < stop)
            load_page();
        else
            seek();
    }
    // q of a tile, a row of 2 D bytes a head.
    __device__ __forceinline__ const uint8_t *q_rows(int row, const tile_place &p) const {
        return (const uint8_t *)a.qkv +
               ((int64_t)row * (a.n_heads + 2 * a.n_kv_heads) + p.head0) * 2 * D;
    }
    __device__ __forceinline__ void fetch_q(int row, int of) {
        const int at = q_slot;
        if (++q_slot == a.q_slots) q_slot = 0;
        const uint32_t to = memory + a.q_at + at * a.q_bytes, bar = q_full(at);
        const tile_place p = place_of<NT>(a, of);
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
    __device__ __forceinline__ void copy_part(uint32_t to, uint32_t bar, int part, bool k, bool v) {
        const int at = ET == kPage ? 0 : (UT == kPage ? 0 : token % kPage / ET) + part;
        const uint8_t *base = a.base + (int64_t)page * a.page_bytes;
        const uint8_t *code = base + code_at, *param = base + param_at;
        const int params = a.k_param + a.v_param_bytes;
        if (BULK) barrier_expect(bar, (k ? a.k_bytes + params : 0) + (v ? a.v_bytes : 0));
        if (k && v && ET == kPage)
            copy(to, code, a.k_bytes + a.v_bytes, bar);
        else if (k)
            copy(to, code + at * a.k_bytes, a.k_bytes, bar);
        if (v && !(k && ET == kPage))
            copy(to + (k ? a.k_bytes : 0), code + a.v_code + at * a.v_bytes, a.v_bytes, bar);
        if (k) {
            const uint32_t to_param = to + a.k_bytes + (v ? a.v_bytes : 0);
            if (ET == kPage) {
                copy(to_param, param, params, bar);
            } else {
                copy(to_param, param + at * a.k_param, a.k_param, bar);
                copy(to_param + a.k_param, param + a.v_param + at * a.v_param_bytes,
                     a.v_param_bytes, bar);
            }
        }
        if (!BULK) copy_async_arrive(bar);
    }
    // Fill a slot, which every lane has done with, with the next entry.
    __device__ __forceinline__ void fetch(int slot) {
        if (done) return;
        if (fresh && warp == 0) fetch_q(RUN(run, row), next_tile - 1);
        fresh = false;
        const uint32_t to = ring + slot * a.slot_bytes, bar = full + 8 * slot;
        if (!BULK || lane == 0) {
            if (WHOLE)
                copy_part(to, bar, 0, true, true);
            else if (entry < R)
                copy_part(to, bar, entry, true, false);
            else
                copy_part(to, bar, entry - R, false, true);
        }
        if (++entry == ENTRIES) entry = 0, next_unit();
    }
    // Is the entry free of the newest token, which the kernel before this one may be writing?
    __device__ __forceinline__ bool old() const {
        return token + (WHOLE ? UT : (entry % R + 1) * ET) < RUN(run, end);
    }
};

// --- The kernel ----------------------------------------------------------------------------------

template <int D, int NT, int UT, int R, kv_class C, typename T>
__device__ __forceinline__ void multiply_k_of(float (&s)[UT / 16][NT][4], const query<D, NT> &q,
                                              kv_format k, const uint32_t (&at)[R], int lane) {
    if (may_be(C, only_k(C), KF_16) && k == KF_16)
        multiply_k<D, NT, UT, R, KF_16, T>(s, q, at, lane);
    else if (may_be(C, only_k(C), KF_4) && k == KF_4)
        multiply_k<D, NT, UT, R, KF_4, __half>(s, q, at, lane);
    else if (may_be(C, only_k(C), KF_8) && k == KF_8)
        multiply_k<D, NT, UT, R, KF_8, __half>(s, q, at, lane);
    else if (may_be(C, only_k(C), KF_FP8))
        multiply_k<D, NT, UT, R, KF_FP8, __half>(s, q, at, lane);
}

template <int D, int NT, int UT, int R, kv_class C, typename T>
__device__ __forceinline__ void multiply_v_of(state<D, NT> &st, const uint32_t (&p)[UT / 16][NT][2],
                                              kv_format v, const extent &x, const uint32_t (&at)[R],
                                              int lane) {
    if (may_be(C, only_v(C), KF_16) && v == KF_16) {
        if (x.edge) clear_v<2 * D, UT, R>(at, x, lane);
        multiply_v<D, NT, UT, R, KF_16, T>(st.acc, st.middle, p, at, lane);
    } else if (may_be(C, only_v(C), KF_4) && v == KF_4) {
        multiply_v<D, NT, UT, R, KF_4, __half>(st.acc, st.middle, p, at, lane);
    } else if (may_be(C, only_v(C), KF_8) && v == KF_8) {
        multiply_v<D, NT, UT, R, KF_8, __half>(st.acc, st.middle, p, at, lane);
    } else if (may_be(C, only_v(C), KF_FP8)) {
        if (x.edge) clear_v<D, UT, R>(at, x, lane);
        multiply_v<D, NT, UT, R, KF_FP8, __half>(st.acc, st.middle, p, at, lane);
    }
}

template <int D, int NT, kv_class C, typename T>
__device__ __forceinline__ void load_query_of(query<D, NT> &q, const decode_arguments &a,
                                              const uint8_t *from, int row_bytes, int n_heads,
                                              int lane) {
    const kv_format k = k_format<C>(a);
    if (may_be(C, only_k(C), KF_16) && k == KF_16)
        load_query<D, NT, KF_16, T>(q, a, from, row_bytes, n_heads, lane);
    else if (may_be(C, only_k(C), KF_4) && k == KF_4)
        load_query<D, NT, KF_4, T>(q, a, from, row_bytes, n_heads, lane);
    else if (may_be(C, only_k(C), KF_8) && k == KF_8)
        load_query<D, NT, KF_8, T>(q, a, from, row_bytes, n_heads, lane);
    else if (may_be(C, only_k(C), KF_FP8))
        load_query<D, NT, KF_FP8, T>(q, a, from, row_bytes, n_heads, lane);
}

template <int D, int NT, kv_class C, typename T, bool BULK> struct worker {
    static constexpr int UT = unit_tokens<D, NT, C>, R = unit_entries<D, NT, C>;
    static constexpr int JOINTS = joints<D, NT, C>;
    static constexpr bool WHOLE = C == KV_4;
    const decode_arguments &a;
    uint8_t *memory;
    feeder<D, NT, UT, R, WHOLE, BULK> feed;
    int slot = 0;
    uint32_t parity = 0;
    int n_put = 0;

    // Barriers of a joint: all warps have put, all have taken.
    __device__ __forceinline__ uint32_t put_bar(int at) const {
        return feed.q_full(a.q_slots + at);
    }
    __device__ __forceinline__ uint32_t taken_bar(int at) const { return put_bar(JOINTS + at); }

    // The next R entries have landed; their addresses.
    __device__ __forceinline__ void wait(uint32_t (&at)[R]) {
#pragma unroll
        for (int r = 0; r < R; r++) {
            const bool around = slot + r >= a.stages;
            const int i = around ? slot + r - a.stages : slot + r;
            barrier_wait(feed.full + 8 * i, parity ^ around);
            at[r] = feed.ring + i * a.slot_bytes;
        }
    }
    // They have been read.
    __device__ __forceinline__ void release() {
        __syncwarp();
#pragma unroll
        for (int r = 0; r < R; r++) {
            feed.fetch(slot);
            if (++slot == a.stages) slot = 0, parity ^= 1;
        }
    }
    __device__ __forceinline__ void attend(state<D, NT> &st, const query<D, NT> &q,
                                           const attention_run &run, int token0, int stop) {
        const extent x = {token0, run.lo, stop, token0 < run.lo || token0 + UT > stop};
        const int lane = feed.lane;
        float s[UT / 16][NT][4];
        uint32_t p[UT / 16][NT][2], k_param[UT / 16][2] = {}, v_param[UT / 16][2] = {}, at[R];
        wait(at);
        multiply_k_of<D, NT, UT, R, C, T>(s, q, k_format<C>(a), at, lane);
        const int param = a.k_bytes + (WHOLE ? a.v_bytes : 0);
        if (!has_16(C) || k_format<C>(a) != KF_16)
            load_params<UT, R>(k_param, at, param, k_format<C>(a), lane / 4);
        if (!has_16(C) || v_format<C>(a) != KF_16)
            load_params<UT, R>(v_param, at, param + a.k_param, v_format<C>(a), lane / 4);
        if (!WHOLE) release();
        scale_scores<D, NT, UT, C>(s, q, a, k_param);
        if (x.edge) {
            clear_scores<NT, UT>(s, x, lane / 4);
            clear_params<UT>(v_param, x, lane / 4);
        }
        weigh<D, NT, UT, C, T>(p, s, st, a, v_param);
        if (WHOLE)
            at[0] += a.k_bytes;
        else
            wait(at);
        multiply_v_of<D, NT, UT, R, C, T>(st, p, v_format<C>(a), x, at, lane);
        release();
    }
    // This warp's pages of a leaf, or all of them.
    __device__ __forceinline__ void attend_leaf(state<D, NT> &st, const query<D, NT> &q,
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
    __device__ __forceinline__ void put(const state<D, NT> &st) {
        const int at = n_put % JOINTS;
        barrier_wait(taken_bar(at), n_put / JOINTS & 1 ^ 1);
        put_joint<D, NT, C>(memory, st, a, at, feed.warp, feed.lane);
        barrier_arrive(put_bar(at));
        n_put++;
    }
    // All warps' results of leaf `part`, which was `back` leaves ago, together; then where they go.
    __device__ __forceinline__ void take(sum<D, NT> &all, const attention_run &run, int tile,
                                         int part, int back, bool head) {
        const int n = n_put - 1 - back, at = n % JOINTS;
        sum<D, NT> leaf;
        barrier_wait(put_bar(at), n / JOINTS & 1);
        take_joint<D, NT>(leaf, memory, a, at, feed.warp, feed.lane);
        barrier_arrive(taken_bar(at));
        if (!head)
            put_record<D, NT, C>(leaf, a, run.slot + part, place_of<NT>(a, tile), feed.warp,
                                 feed.lane);
        else if (part == 0)
            all = leaf;
        else
            add_leaf(all, leaf);
    }
    // q of tile n_q of the block after the first. That and a lone warp's (n_q < 0) are read where
    // they are, which takes less time.
    __device__ __forceinline__ void get_query(query<D, NT> &q, int row, const tile_place &p,
                                              int n_q) {
        const int at = n_q % a.q_slots;
        const uint8_t *there = feed.q_rows(row, p), *copy = memory + a.q_at + at * a.q_bytes;
        const bool first = n_q < 0;
        if (!first) barrier_wait(feed.q_full(at), n_q / a.q_slots & 1);
        if (D <= 128)
            load_query_of<D, NT, C, T>(q, a, first ? there : copy, first ? 2 * D : q_row_bytes<D>(),
                                       p.n_heads, feed.lane);
        else if (first) // an address that may be either would cost registers
            load_query_of<D, NT, C, T>(q, a, there, 2 * D, p.n_heads, feed.lane);
        else
            load_query_of<D, NT, C, T>(q, a, copy, q_row_bytes<D>(), p.n_heads, feed.lane);
    }
    // Leaves from .. to of one tile.
    __device__ __forceinline__ void attend_tile(const attention_run &run, int tile, int from,
                                                int to, int n_q) {
        const bool head = from == 0, whole = head && to == run.n;
        query<D, NT> q;
        get_query(q, run.row, place_of<NT>(a, tile), n_q);
        sum<D, NT> here;
        sum<D, NT> &all =
            all_bytes<D, NT, C, BULK> == 0
                ? here
                : *(sum<D, NT> *)(memory + a.all_at + threadIdx.x * all_bytes<D, NT, C, BULK>);
        for (int part = from; part < to; part++) {
            state<D, NT> st;
            attend_leaf(st, q, run, part);
            if (run.lone >= 0) {
                put_lone<D, NT, C>(st, a, run.row, place_of<NT>(a, tile), feed.lane);
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
        const tile_place place = place_of<NT>(a, tile);
        if (whole) {
            put_out<D, NT, C>(all, a, run.row, place, feed.warp, feed.lane);
            return;
        }
        if (head) put_record<D, NT, C>(all, a, run.slot, place, feed.warp, feed.lane);
        int *flag = (int *)(memory + a.barriers_at - 16);
        if (count_leaves<D>(a, run, place.head0, to - from, flag))
            join_records<D, NT>(a, run, place, head ? to : run.prefix);
    }
};

template <int D, int NT, kv_class C, typename T, bool BULK>
__global__ void __launch_bounds__(kThreads, 2)
    attend_decode(const __grid_constant__ decode_arguments a) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
    if (BULK) return; // no such copies, and no such launch
#endif
    extern __shared__ __align__(1024) uint8_t memory[];
    const int lane = threadIdx.x % 32, warp = __shfl_sync(~0u, threadIdx.x / 32, 0);
    const uint32_t bars = shared_at(memory) + a.barriers_at;
    worker<D, NT, C, T, BULK> w = {a, memory, {a, shared_at(memory)}};
    auto &feed = w.feed;
    feed.warp = warp;
    feed.lane = lane;
    feed.ring = shared_at(memory) + warp * a.stages * a.slot_bytes;
    feed.full = bars + 8 * warp * a.stages;
    feed.q_slot = 0;
    feed.entry = 0;
    feed.enter_block();
    if (threadIdx.x == 0) {
        for (int i = 0; i < kWarps * a.stages + a.q_slots; i++)
            barrier_init(bars + 8 * i, BULK ? 1 : 32);
        for (int i = 0; i < 2 * joints<D, NT, C>; i++) barrier_init(w.put_bar(i), kThreads);
        fence_async_proxy();
    }
    __syncthreads();
    // A run is read where it is by instances whose registers are all taken.
    const attention_run *at = a.runs + blockIdx.x;
    attention_run copy = *at;
    // What this step has not written needs no waiting for the kernel before this one.
    int slot = 0;
    if (BULK)
        while (slot < a.stages && !feed.done && !feed.fresh && feed.old()) feed.fetch(slot++);
    wait_for_previous();
    launch_dependents();
    while (slot < a.stages) feed.fetch(slot++);

    int n_q = copy.lone < 0 ? -1 : 0;
    for (;;) {
        const attention_run &run = C == ANY ? *at : copy;
        const bool lone = run.lone >= 0;
        const int skip = lone ? lone_first(run.lone, warp) : 0;
        int tile = run.tile + skip, first = run.first;
        for (int leaf = run.from + skip; leaf < run.to; tile += lone ? kWarps : 1) {
            const int to = min(run.n, first + run.to - leaf);
            w.attend_tile(run, tile, first, to, lone ? -1 : n_q++);
            leaf += lone ? kWarps : to - first;
            first = 0;
        }
        if (run.next < 0) break;
        at = a.runs + run.next;
        copy = *at;
    }
}

// --- Launch --------------------------------------------------------------------------------------

template <int D, int NT, kv_class C, typename T, bool BULK>
status launch(const attention_problem *p) {
    constexpr int ET = entry_tokens<D, NT, C>;
    constexpr int ENTRIES = C == KV_4 ? 1 : 2 * unit_entries<D, NT, C>; // of a unit
    const attention_layer_params *l = &p->l;
    decode_arguments a = {};
    a.out = p->out;
    a.qkv = p->qkv;
    a.sinks = l->sinks;
    a.base = (const uint8_t *)p->c.base;
    a.page_bytes = p->c.page_bytes;
    a.head_bytes = (int)p->layout.head_bytes;
    a.param_base = (int)p->layout.param_base;
    a.param_bytes = p->layout.param_bytes;
    a.v_code = p->layout.v_code;
    a.v_param = p->layout.v_param;
    a.k = p->c.k;
    a.v = p->c.v;
    a.runs = (const attention_run *)(p->plan + 1);
    a.partial = (float *)p->workspace;
    a.page = p->b.page;
    a.n_heads = l->n_heads;
    a.n_kv_heads = l->n_kv_heads;
    a.ratio = l->n_heads / l->n_kv_heads;
    a.n_tiles = (a.ratio + 8 * NT - 1) / (8 * NT);
    a.bf16 = l->type == DT_BF16;
    a.scale = l->scale * kLog2E;
    a.k_bytes = ET * attention_row_bytes(a.k, D);
    a.v_bytes = ET * attention_row_bytes(a.v, D);
    a.k_param = ET * attention_param_bytes(a.k);
    a.v_param_bytes = ET * attention_param_bytes(a.v);
    const int k_entry = a.k_bytes + a.k_param + a.v_param_bytes;
    const int entry = C == KV_4 ? k_entry + a.v_bytes : k_entry > a.v_bytes ? k_entry : a.v_bytes;
    a.slot_bytes = (int)div_up(entry, 128) * 128;
    a.quarters = a.ratio >= 8 ? 4 : (a.ratio + 1) / 2;

    // As many stages as half an SM's memory holds. q of a tile is fetched as many units ahead as
    // they hold, and read by the slowest warp.
    a.q_bytes = (a.ratio < 8 * NT ? a.ratio : 8 * NT) * q_row_bytes<D>();
    const int joint = joints<D, NT, C> * joint_bytes<D, NT>(a.quarters),
              sums = joints<D, NT, C> * kWarps * NT * 64;
    const int room = p->shared_bytes_sm / 2 - 1024;
    int bytes = room + 1;
    for (a.stages = 17; bytes > room && a.stages > 1;) {
        a.stages--;
        a.q_slots = (int)div_up(a.stages, ENTRIES) + 1;
        a.q_at = kWarps * a.stages * a.slot_bytes;
        a.joint_at = a.q_at + a.q_slots * a.q_bytes;
        a.sums_at = a.joint_at + joint;
        a.all_at = a.sums_at + sums;
        a.barriers_at = a.all_at + kThreads * all_bytes<D, NT, C, BULK> + 16; // a flag before them
        bytes = a.barriers_at + 8 * (kWarps * a.stages + a.q_slots + 2 * joints<D, NT, C>);
    }
    const auto kernel = attend_decode<D, NT, C, T, BULK>;
    cudaError_t e =
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
    if (e != cudaSuccess) return FAIL(ST_DEVICE, "attention_decode: %s", cudaGetErrorString(e));
    cudaLaunchAttribute early;
    early.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    early.val.programmaticStreamSerializationAllowed = 1;
    cudaLaunchConfig_t config = {};
    config.gridDim = dim3((unsigned)attention_decode_blocks(p->n_sms));
    config.blockDim = dim3(kThreads);
    config.dynamicSmemBytes = (size_t)bytes;
    config.stream = (cudaStream_t)p->stream;
    config.attrs = &early;
    config.numAttrs = BULK ? 1 : 0;
    e = cudaLaunchKernelEx(&config, kernel, a);
    return e == cudaSuccess ? ST_OK
                            : FAIL(ST_DEVICE, "attention_decode: %s", cudaGetErrorString(e));
}

template <int D, int NT, bool BULK> status launch_formats(const attention_problem *p) {
    const kv_format k = p->c.k, v = p->c.v;
    const bool half = p->l.type == DT_F16;
    if (k == KF_4 && v == KF_4) return launch<D, NT, KV_4, __half, BULK>(p);
    if (k == KF_8 && v == KF_8) return launch<D, NT, KV_8, __half, BULK>(p);
    if (k == KF_FP8 && v == KF_FP8) return launch<D, NT, KV_FP8, __half, BULK>(p);
    if (k == KF_8 && v == KF_4) return launch<D, NT, K8_V4, __half, BULK>(p);
    if (k != KF_16 && v != KF_16) return launch<D, NT, CODES, __half, BULK>(p);
    if (k == KF_16 && v == KF_16)
        return half ? launch<D, NT, KV_16, __half, BULK>(p)
                    : launch<D, NT, KV_16, __nv_bfloat16, BULK>(p);
    return half ? launch<D, NT, ANY, __half, BULK>(p) : launch<D, NT, ANY, __nv_bfloat16, BULK>(p);
}

template <bool BULK> status launch_sizes(const attention_problem *p) {
    const bool wide = attention_tile_heads(p->l.n_heads / p->l.n_kv_heads, p->l.head_dim) > 8;
    switch (p->l.head_dim) {
    case 64: return wide ? launch_formats<64, 2, BULK>(p) : launch_formats<64, 1, BULK>(p);
    case 128: return wide ? launch_formats<128, 2, BULK>(p) : launch_formats<128, 1, BULK>(p);
    default: return launch_formats<256, 1, BULK>(p);
    }
}

} // namespace

extern "C" status attention_decode_bulk_launch(const attention_problem *p, bool, bool) {
    return launch_sizes<true>(p);
}
extern "C" status attention_decode_async_launch(const attention_problem *p, bool, bool) {
    return launch_sizes<false>(p);
}
