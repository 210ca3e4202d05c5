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
// A block is four consumer warps, a producer warp that keeps a ring of units (UT tokens of K, V and
// parameters) full, running ahead over all the block's work items, and a warp that joins. Each unit
// is consumed by one warp; at the end of an item the four leave their results in shared memory and
// go on to the next, while the joining warp adds them up. Of a sequence in several parts the block
// that finishes last adds the parts, in order. What a consumer needs of an item (q, the part) comes
// through shared memory as well: an item of 256 tokens takes 1.5 us, so no latency of global memory
// may lie in its way.
#include "attention_device.cuh"

namespace {

constexpr int kConsumers = 4;
constexpr int kThreads = 32 * (kConsumers + 2);
constexpr int kItems = 2; // items whose q, or whose results, are in shared memory at a time

struct decode_arguments {
    void *out;       // [T, H D]
    const void *qkv; // [T, (H + 2G) D]
    const void *sinks;
    const uint8_t *base;
    int64_t page_bytes;
    attention_layout layout;
    kv_format k, v;
    const attention_plan *plan;
    float *partial; // see attention_partial
    const int32_t *page;
    int n_heads, n_kv_heads, ratio, n_tiles; // n_tiles: tiles of 8 * NT heads of a group
    bool bf16;                               // q, out and sinks; fp16 otherwise
    float scale;                             // times log2(e)
    int stages, stage_bytes;
    int v_at, k_param_at, v_param_at; // within a stage
    int rows;                         // heads of a tile that exist: min(8 NT, ratio)
    int q_at, joint_at, barriers_at;  // in block memory, after the ring
};

__device__ __forceinline__ float load16(const void *p, int64_t at, bool bf16) {
    return bf16 ? __bfloat162float(((const __nv_bfloat16 *)p)[at])
                : __half2float(((const __half *)p)[at]);
}

// --- Codes to fp16 pairs ------------------------------------------------------------------------

// Two e4m3 in bytes 1 and 3 to fp16 * 2^-8.
__device__ __forceinline__ uint32_t e4m3_pair(uint32_t x) {
    return (x & 0x80008000u) | (x >> 1 & 0x3f803f80u);
}
template <kv_format F> __device__ __forceinline__ uint32_t bytes_even(uint32_t x) {
    return F == KF_FP8 ? e4m3_pair(x << 8) : x & 0x00ff00ffu;
}
template <kv_format F> __device__ __forceinline__ uint32_t bytes_odd(uint32_t x) {
    return F == KF_FP8 ? e4m3_pair(x) : __byte_perm(x, 0, 0x4341);
}

// What a pair in a register stands for, over its fp16 value.
__device__ __forceinline__ float code_unit(kv_format f) {
    return f == KF_16 ? 1.f : f == KF_FP8 ? 256.f : 16777216.f;
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

// --- q
// --------------------------------------------------------------------------------------------

// One warp's q^T fragments [D / 16][NT][2] in the order in which format F's rows come, and for
// codes the factor that was applied and the sums of q of this lane's two columns.
template <int D, int NT> struct query {
    uint32_t b[D / 16][NT][2];
    float factor;
    float sum[NT][2];
};

// Two 16-bit values of the model's type.
__device__ __forceinline__ float2 pair16(uint32_t x, bool bf16) {
    if (bf16) return make_float2(__uint_as_float(x << 16), __uint_as_float(x & 0xffff0000u));
    return __half22float2(*reinterpret_cast<const __half2 *>(&x));
}

template <int D, int NT, kv_format F, typename T>
__device__ __forceinline__ void load_query(query<D, NT> &q, const decode_arguments &a,
                                           const uint8_t *from, int n_heads, int lane) {
    const int column = lane / 4, quarter = lane % 4;
    // This lane's dims, two to a word: of k-step i words 2 i and 2 i + 1, or with nibbles eight
    // neighbours of two k-steps in words 4 (i / 2) .. + 3.
    uint32_t raw[NT][D / 8];
#pragma unroll
    for (int n = 0; n < NT; n++) {
        const int h = n * 8 + column;
        const uint16_t *row = (const uint16_t *)(from + min(h, n_heads - 1) * (2 * D + 16));
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
    if (F == KF_16) {
        q.factor = 1.f;
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
        q.sum[n][0] = __shfl_sync(~0u, sum, quarter * 8);
        q.sum[n][1] = __shfl_sync(~0u, sum, quarter * 8 + 4);
    }
    amax = warp_max(amax);
    // The power of two that brings the largest to [2^11, 2^12).
    q.factor =
        amax < 1e-18f ? 1.f : __uint_as_float((265u << 23) - (__float_as_uint(amax) & 0x7f800000u));
    const float f = q.factor, odd = F == KF_4 ? f / 16 : f; // odd nibbles come times 16
#pragma unroll
    for (int n = 0; n < NT; n++)
#pragma unroll
        for (int i = 0; i < D / 16; i++) {
            if (F == KF_4) { // dims 0, 4 | 1, 5 of eight, then 2, 6 | 3, 7
                const int w = i / 2 * 4 + i % 2;
                const float2 x = pair16(raw[n][w], a.bf16), y = pair16(raw[n][w + 2], a.bf16);
                q.b[i][n][0] = pack2<__half>(x.x * f, y.x * f);
                q.b[i][n][1] = pack2<__half>(x.y * odd, y.y * odd);
            } else { // dims 0, 2 | 1, 3 of four
                const float2 x = pair16(raw[n][2 * i], a.bf16),
                             y = pair16(raw[n][2 * i + 1], a.bf16);
                q.b[i][n][0] = pack2<__half>(x.x * f, y.x * f);
                q.b[i][n][1] = pack2<__half>(x.y * f, y.y * f);
            }
        }
}

// --- The two products
// -------------------------------------------------------------------------------

// s[UT / 16][NT][4] = K [UT, D] q^T
template <int D, int NT, int UT, kv_format F, typename T>
__device__ __forceinline__ void multiply_k(float (&s)[UT / 16][NT][4], const query<D, NT> &q,
                                           uint32_t k_at, int lane) {
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
            load_matrices(r[m], k_at + m * 16 * ROW + pair_offset<ROW>(lane_at, pair));
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
                    x[0] = bytes_even<F>(r[m][i * 2]), x[1] = bytes_even<F>(r[m][i * 2 + 1]);
                    x[2] = bytes_odd<F>(r[m][i * 2]), x[3] = bytes_odd<F>(r[m][i * 2 + 1]);
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
template <int D, int NT, int UT, kv_format F, typename T>
__device__ __forceinline__ void multiply_v(float (&acc)[D / 16][NT][4], float (&middle)[NT][4],
                                           const uint32_t (&p)[UT / 16][NT][2], uint32_t v_at,
                                           int lane) {
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
            load_matrices_turned(r, v_at + m * 16 * ROW + pair_offset<ROW>(lane_at, pair));
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
#pragma unroll
                    for (int n = 0; n < NT; n++)
                        mma<T>(acc[pair * 2 + piece][n], bytes_even<F>(lo), bytes_odd<F>(lo),
                               bytes_even<F>(hi), bytes_odd<F>(hi), p[m][n][0], p[m][n][1]);
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

// --- Softmax
// ----------------------------------------------------------------------------------------

// A warp's running result of an item. Columns (heads) 2 * (lane % 4) and the next one of each tile.
template <int D, int NT> struct state {
    float acc[D / 16][NT][4];
    float middle[NT][4];
    float m[NT][2], l[NT][2], z[NT][2]; // l, z: this lane's tokens only
    float unit;                         // power of two that the scales of V are divided by
};

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

// Scale and minimum of a token; codes of V count from their middle.
__device__ __forceinline__ float2 params_of(uint32_t at, kv_format f, int token) {
    if (f == KF_FP8) {
        uint16_t s;
        asm volatile("ld.shared.u16 %0, [%1];" : "=h"(s) : "r"(at + 2 * token));
        return make_float2(__half2float(__ushort_as_half(s)), 0.f);
    }
    uint32_t x;
    asm volatile("ld.shared.u32 %0, [%1];" : "=r"(x) : "r"(at + 4 * token));
    return __half22float2(*reinterpret_cast<const __half2 *>(&x));
}

// Scores of a unit to weights p of the format that multiply_v wants; moves the state to the new
// maximum. Tokens outside [lo, end) get weight 0, and their parameters are not looked at.
template <int D, int NT, int UT, typename T>
__device__ __forceinline__ void weigh(uint32_t (&p)[UT / 16][NT][2], float (&s)[UT / 16][NT][4],
                                      state<D, NT> &st, const query<D, NT> &q,
                                      const decode_arguments &a, uint32_t stage, int token0, int lo,
                                      int end, int lane) {
    const int row = lane / 4;
    const bool edge = token0 < lo || token0 + UT > end; // uniform
    const float s_scale = a.k == KF_16 ? a.scale : a.scale * code_unit(a.k) / q.factor;
    const bool k_codes = a.k != KF_16, v_codes = a.v != KF_16;
    float top[NT][2];
#pragma unroll
    for (int n = 0; n < NT; n++) top[n][0] = top[n][1] = -INFINITY;
#pragma unroll
    for (int m = 0; m < UT / 16; m++)
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const int token = m * 16 + half * 8 + row;
            float2 kp = make_float2(1.f, 0.f);
            if (k_codes) kp = params_of(stage + a.k_param_at, a.k, token);
            const float f = kp.x * s_scale, z = kp.y * a.scale;
            const bool out = edge && (token0 + token < lo || token0 + token >= end);
#pragma unroll
            for (int n = 0; n < NT; n++)
#pragma unroll
                for (int j = 0; j < 2; j++) {
                    float &x = s[m][n][half * 2 + j];
                    x = k_codes ? x * f + z * q.sum[n][j] : x * f;
                    if (out) x = -INFINITY;
                    top[n][j] = fmaxf(top[n][j], x);
                }
        }

    // V's scales, divided by a power of two near the largest so far: p * scale stays in fp16's
    // range.
    float2 vp[UT / 16][2];
    float unit = st.unit;
    if (v_codes) {
        float largest = unit;
#pragma unroll
        for (int m = 0; m < UT / 16; m++)
#pragma unroll
            for (int half = 0; half < 2; half++) {
                const int token = m * 16 + half * 8 + row;
                vp[m][half] = params_of(stage + a.v_param_at, a.v, token);
                if (edge && (token0 + token < lo || token0 + token >= end))
                    vp[m][half] = make_float2(0.f, 0.f);
                largest = fmaxf(largest, vp[m][half].x);
            }
        unit = __uint_as_float(__float_as_uint(column_max(largest)) & 0x7f800000u);
    }
    const float per_unit = __uint_as_float(0x7f000000u - __float_as_uint(unit));
    const float middle = a.v == KF_8 ? 128.f : a.v == KF_4 ? 8.f : 0.f;

    float shrink[NT][2], from[NT][2];
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
    if (__any_sync(~0u, moved)) {
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

#pragma unroll
    for (int m = 0; m < UT / 16; m++)
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const float vs = vp[m][half].x * per_unit, vz = vp[m][half].y + middle * vp[m][half].x;
#pragma unroll
            for (int n = 0; n < NT; n++) {
                float w[2];
#pragma unroll
                for (int j = 0; j < 2; j++) {
                    w[j] = exp2_approx(s[m][n][half * 2 + j] - from[n][j]);
                    st.l[n][j] += w[j];
                    if (v_codes) {
                        st.z[n][j] += w[j] * vz;
                        w[j] *= vs;
                    }
                }
                const uint32_t packed = v_codes ? pack2<__half>(w[0], w[1]) : pack2<T>(w[0], w[1]);
                p[m][n][half] = turn_matrix(packed);
            }
        }
}

// 16-bit V of tokens that must not count: zero, since 0 * NaN is NaN.
template <int D, int UT>
__device__ __forceinline__ void clear_outside(uint32_t v_at, int token0, int lo, int end,
                                              int lane) {
    for (int t = 0; t < UT; t++)
        if (token0 + t < lo || token0 + t >= end)
            for (int at = lane * 16; at < 2 * D; at += 512)
                asm volatile(
                    "st.shared.v4.u32 [%0], {%1, %1, %1, %1};" ::"r"(v_at + code_at(2 * D, t, at)),
                    "r"(0)
                    : "memory");
    fence_async_proxy();
    __syncwarp();
}

// --- Joining
// ------------------------------------------------------------------------------------------

// Results of the four warps: acc [4, rows, D + 4] (+ 4: the columns of a quarter fall into other
// banks), then (m, l) [4, rows].
template <int D> __host__ __device__ constexpr int joint_floats(int rows) {
    return kConsumers * rows * (D + 4 + 2);
}

template <int D, int NT>
__device__ __forceinline__ void put_joint(float *to, state<D, NT> &st, const decode_arguments &a,
                                          int n_heads, int share, int lane) {
    const int row = lane / 4, quarter = lane % 4;
    const float unit = st.unit * code_unit(a.v), odd = a.v == KF_4 ? unit / 16 : unit;
    float2 *ml = (float2 *)(to + kConsumers * a.rows * (D + 4)) + share * a.rows;
#pragma unroll
    for (int n = 0; n < NT; n++)
#pragma unroll
        for (int j = 0; j < 2; j++) {
            const int h = n * 8 + quarter * 2 + j;
            const float l = column_sum(st.l[n][j]);
            const float z = a.v == KF_16 ? 0.f : column_sum(st.z[n][j]) + st.middle[n][j] * unit;
            if (h >= n_heads) continue;
            if (row == 0) ml[h] = make_float2(st.m[n][j], l);
            float *acc = to + (share * a.rows + h) * (D + 4);
#pragma unroll
            for (int i = 0; i < D / 16; i++) {
                int d0, d1;
                rows_of(a.v, i, row, &d0, &d1);
                acc[d0] = a.v == KF_16 ? st.acc[i][n][j] : st.acc[i][n][j] * unit + z;
                acc[d1] = a.v == KF_16 ? st.acc[i][n][j + 2] : st.acc[i][n][j + 2] * odd + z;
            }
        }
}

// out = acc / (l + sink), four dims of a head.
__device__ __forceinline__ void put_out(const decode_arguments &a, int64_t at, int head, float4 x,
                                        float m, float l) {
    if (a.sinks) l += exp2_approx(load16(a.sinks, head, a.bf16) * kLog2E - m);
    const float f = 1.f / l;
    uint2 packed;
    if (a.bf16)
        packed = make_uint2(pack2<__nv_bfloat16>(x.x * f, x.y * f),
                            pack2<__nv_bfloat16>(x.z * f, x.w * f));
    else
        packed = make_uint2(pack2<__half>(x.x * f, x.y * f), pack2<__half>(x.z * f, x.w * f));
    *(uint2 *)((uint16_t *)a.out + at) = packed;
}

// Four warps' results of an item to one: out, or a partial result. By `threads` threads.
template <int D>
__device__ __forceinline__ void join(const float *from, const decode_arguments &a,
                                     const attention_part &part, int head0, int n_heads,
                                     int n_warps, int thread, int threads) {
    constexpr int STRIDE = D + ATTENTION_PARTIAL_EXTRA;
    const int H = a.n_heads;
    const bool whole = part.n_parts == 1;
    const float2 *ml = (const float2 *)(from + kConsumers * a.rows * (D + 4));
#pragma unroll 2
    for (int i = thread; i < n_heads * (D / 4); i += threads) {
        const int h = i / (D / 4), d = i % (D / 4) * 4, head = head0 + h;
        float2 w[kConsumers];
        float m = -INFINITY, l = 0.f;
#pragma unroll
        for (int k = 0; k < kConsumers; k++) {
            w[k] = k < n_warps ? ml[k * a.rows + h] : make_float2(-INFINITY, 0.f);
            m = fmaxf(m, w[k].x);
        }
        float4 x = make_float4(0.f, 0.f, 0.f, 0.f);
#pragma unroll
        for (int k = 0; k < kConsumers; k++) {
            if (k >= n_warps) continue;
            const float f = exp2_approx(w[k].x - m);
            const float4 y = *(const float4 *)(from + (k * a.rows + h) * (D + 4) + d);
            l += w[k].y * f;
            x.x += y.x * f, x.y += y.y * f, x.z += y.z * f, x.w += y.w * f;
        }
        if (whole) {
            put_out(a, ((int64_t)part.row * H + head) * D + d, head, x, m, l);
        } else {
            float *to = a.partial + ((int64_t)(part.slot + part.part) * H + head) * STRIDE;
            *(float4 *)(to + d) = x;
            if (d == 0) *(float2 *)(to + D) = make_float2(m, l);
        }
    }
}

// One thread, after the partial result is in memory for all to see: is it the last of its sequence?
template <int D>
__device__ __forceinline__ bool count_part(const decode_arguments &a, const attention_part &part,
                                           int head0) {
    constexpr int STRIDE = D + ATTENTION_PARTIAL_EXTRA;
    int32_t *counter =
        (int32_t *)(a.partial + ((int64_t)part.slot * a.n_heads + head0) * STRIDE + D + 2);
    if (atomicAdd(counter, 1) != part.n_parts - 1) return false;
    *counter = 0;
    __threadfence();
    return true;
}

// All parts of a sequence, in order. By `threads` threads, of which one has counted.
template <int D>
__device__ __forceinline__ void sum_parts(const decode_arguments &a, const attention_part &part,
                                          int head0, int n_heads, int thread, int threads) {
    constexpr int STRIDE = D + ATTENTION_PARTIAL_EXTRA, BATCH = 8;
    const int H = a.n_heads;
    __threadfence();
    for (int i = thread; i < n_heads * (D / 4); i += threads) {
        const int h = i / (D / 4), d = i % (D / 4) * 4, head = head0 + h;
        const float *first = a.partial + ((int64_t)part.slot * H + head) * STRIDE;
        const int64_t step = (int64_t)H * STRIDE; // from part to part
        float m = -INFINITY, l = 0.f;
        float4 x = make_float4(0.f, 0.f, 0.f, 0.f);
        for (int k0 = 0; k0 < part.n_parts; k0 += BATCH) {
            float2 w[BATCH];
            float4 y[BATCH];
#pragma unroll
            for (int k = 0; k < BATCH; k++) {
                const float *at = first + min(k0 + k, part.n_parts - 1) * step;
                w[k] = __ldcg((const float2 *)(at + D));
                y[k] = __ldcg((const float4 *)(at + d));
            }
            float next = m;
#pragma unroll
            for (int k = 0; k < BATCH; k++) next = fmaxf(next, w[k].x);
            const float shrink = exp2_approx(m - next);
            m = next;
            l *= shrink;
            x.x *= shrink, x.y *= shrink, x.z *= shrink, x.w *= shrink;
#pragma unroll
            for (int k = 0; k < BATCH; k++) {
                const float f = k0 + k < part.n_parts ? exp2_approx(w[k].x - m) : 0.f;
                l += w[k].y * f;
                x.x += y[k].x * f, x.y += y[k].y * f, x.z += y[k].z * f, x.w += y[k].w * f;
            }
        }
        put_out(a, ((int64_t)part.row * H + head) * D + d, head, x, m, l);
    }
}

// --- The kernel
// -----------------------------------------------------------------------------------------

// Barriers in block memory.
struct barriers {
    uint32_t at;
    int stages;
    __device__ uint32_t full(int i) const { return at + 8 * i; }
    __device__ uint32_t empty(int i) const { return at + 8 * (stages + i); }
    __device__ uint32_t q_full(int i) const { return at + 8 * (2 * stages + i); }
    __device__ uint32_t q_empty(int i) const { return at + 8 * (2 * stages + kItems + i); }
    __device__ uint32_t joint_full(int i) const { return at + 8 * (2 * stages + 2 * kItems + i); }
    __device__ uint32_t joint_empty(int i) const { return at + 8 * (2 * stages + 3 * kItems + i); }
};

// An item: a part, a KV head, a tile of its heads.
struct item_place {
    int part, g, head0; // head0 within the group
};
__device__ __forceinline__ item_place place_of(const decode_arguments &a, int item,
                                               int tile_heads) {
    item_place p;
    p.part = item / a.n_tiles / a.n_kv_heads;
    p.g = item / a.n_tiles % a.n_kv_heads;
    p.head0 = item % a.n_tiles * tile_heads;
    return p;
}
template <int D, int NT> __host__ __device__ constexpr int q_slot_bytes() {
    return 8 * NT * (2 * D + 16) + (int)sizeof(attention_part);
}

// One warp: keep the ring filled with the units of all this block's items, in order.
template <int D, int NT, int UT, bool BULK>
__device__ __forceinline__ void produce(const decode_arguments &a, uint8_t *memory,
                                        const barriers &bar, const attention_part *parts,
                                        int n_items, int lane) {
    const uint32_t ring = shared_at(memory);
    const uint32_t k_bytes = a.v_at, v_bytes = a.k_param_at - a.v_at;
    const uint32_t k_param = UT * (a.k == KF_16 ? 0 : a.k == KF_FP8 ? 2 : 4);
    const uint32_t v_param = UT * (a.v == KF_16 ? 0 : a.v == KF_FP8 ? 2 : 4);
    uint32_t slot = 0, parity = 1, n = 0; // the first round finds every slot empty
    for (int item = blockIdx.x; item < n_items; item += gridDim.x, n++) {
        const item_place at_item = place_of(a, item, 8 * NT);
        const attention_part part = parts[at_item.part];
        const int g = at_item.g, n_units = (part.end - part.begin + UT - 1) / UT;
        const int32_t *page = a.page + part.page_at;
        int mine = lane < n_units ? page[(part.begin + lane * UT) / kPage] : 0;

        { // q of the item, a row a head, and the part
            const uint32_t i = n % kItems, q_bar = bar.q_full(i);
            uint8_t *q = memory + a.q_at + i * q_slot_bytes<D, NT>();
            const int n_heads = min(8 * NT, a.ratio - at_item.head0);
            const uint16_t *from =
                (const uint16_t *)a.qkv +
                ((int64_t)part.row * (a.n_heads + 2 * a.n_kv_heads) + g * a.ratio + at_item.head0) *
                    D;
            barrier_wait(bar.q_empty(i), n / kItems & 1 ^ 1);
            if (lane == 0) *(attention_part *)(q + 8 * NT * (2 * D + 16)) = part;
            if (BULK) {
                if (lane == 0) barrier_expect(q_bar, n_heads * 2 * D);
                __syncwarp();
                if (lane < n_heads)
                    copy_bulk(shared_at(q) + lane * (2 * D + 16), from + lane * D, 2 * D, q_bar);
            } else {
                for (int k = lane; k < n_heads * (D / 8); k += 32)
                    copy_async(shared_at(q) + k / (D / 8) * (2 * D + 16) + k % (D / 8) * 16,
                               from + k * 8);
                copy_async_arrive(q_bar);
                if (lane == 0) barrier_arrive(q_bar);
            }
        }
        for (int u = 0; u < n_units; u++) {
            if (u && u % 32 == 0)
                mine = u + lane < n_units ? page[(part.begin + (u + lane) * UT) / kPage] : 0;
            const int in_page = (part.begin + u * UT) % kPage / UT;
            const uint8_t *base = a.base + __shfl_sync(~0u, mine, u % 32) * a.page_bytes;
            const uint8_t *code = base + g * a.layout.head_bytes;
            const uint8_t *param = base + a.layout.param_base + (int64_t)g * a.layout.param_bytes;
            const uint32_t to = ring + slot * a.stage_bytes, full = bar.full(slot);
            barrier_wait(bar.empty(slot), parity);
            if (BULK) {
                if (lane == 0) {
                    barrier_expect(full, k_bytes + v_bytes + k_param + v_param);
                    copy_bulk(to, code + in_page * k_bytes, k_bytes, full);
                    copy_bulk(to + a.v_at, code + a.layout.v_code + in_page * v_bytes, v_bytes,
                              full);
                    if (k_param)
                        copy_bulk(to + a.k_param_at, param + in_page * k_param, k_param, full);
                    if (v_param)
                        copy_bulk(to + a.v_param_at, param + a.layout.v_param + in_page * v_param,
                                  v_param, full);
                }
            } else {
                for (uint32_t b = lane * 16; b < k_bytes; b += 512)
                    copy_async(to + b, code + in_page * k_bytes + b);
                for (uint32_t b = lane * 16; b < v_bytes; b += 512)
                    copy_async(to + a.v_at + b, code + a.layout.v_code + in_page * v_bytes + b);
                if (lane * 16 < k_param)
                    copy_async(to + a.k_param_at + lane * 16,
                               param + in_page * k_param + lane * 16);
                if (lane * 16 < v_param)
                    copy_async(to + a.v_param_at + lane * 16,
                               param + a.layout.v_param + in_page * v_param + lane * 16);
                copy_async_arrive(full);
            }
            if (++slot == (uint32_t)a.stages) slot = 0, parity ^= 1;
        }
    }
}

template <int D, int NT, int UT, typename T, bool LIGHT>
__device__ __forceinline__ void consume(const decode_arguments &a, uint8_t *memory,
                                        const barriers &bar, int n_items, int warp, int lane) {
    const uint32_t ring = shared_at(memory);
    uint32_t base = 0, n = 0; // units, items before this one
    for (int item = blockIdx.x; item < n_items; item += gridDim.x, n++) {
        const uint32_t at = n % kItems, turn = n / kItems & 1;
        const uint8_t *q_from = memory + a.q_at + at * q_slot_bytes<D, NT>();
        const int head0 = item % a.n_tiles * 8 * NT, n_heads = min(8 * NT, a.ratio - head0);
        barrier_wait(bar.q_full(at), turn);
        const attention_part *part = (const attention_part *)(q_from + 8 * NT * (2 * D + 16));
        const int begin = part->begin, end = part->end, lo = part->lo;
        const int n_units = (end - begin + UT - 1) / UT;
        query<D, NT> q;
        if (!LIGHT && a.k == KF_16)
            load_query<D, NT, KF_16, T>(q, a, q_from, n_heads, lane);
        else if (a.k == KF_4)
            load_query<D, NT, KF_4, T>(q, a, q_from, n_heads, lane);
        else
            load_query<D, NT, KF_8, T>(q, a, q_from, n_heads, lane);
        __syncwarp();
        if (lane == 0) barrier_arrive(bar.q_empty(at));

        state<D, NT> st;
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

        // Stages are a multiple of the consumers, so that a slot is always the same warp's: a
        // parity wait cannot tell a phase from the one before the last. Which share of the item
        // that is turns with base.
        const int share = (warp - base) % kConsumers;
        for (int u = share; u < n_units; u += kConsumers) {
            const uint32_t count = base + u, slot = count % a.stages;
            const uint32_t stage = ring + slot * a.stage_bytes;
            const int token0 = begin + u * UT;
            barrier_wait(bar.full(slot), count / a.stages & 1);
            float s[UT / 16][NT][4];
            if (!LIGHT && a.k == KF_16)
                multiply_k<D, NT, UT, KF_16, T>(s, q, stage, lane);
            else if (a.k == KF_4)
                multiply_k<D, NT, UT, KF_4, __half>(s, q, stage, lane);
            else if (a.k == KF_8)
                multiply_k<D, NT, UT, KF_8, __half>(s, q, stage, lane);
            else
                multiply_k<D, NT, UT, KF_FP8, __half>(s, q, stage, lane);

            uint32_t p[UT / 16][NT][2];
            weigh<D, NT, UT, T>(p, s, st, q, a, stage, token0, lo, end, lane);

            const uint32_t v_at = stage + a.v_at;
            if (!LIGHT && a.v == KF_16) {
                if (token0 < lo || token0 + UT > end)
                    clear_outside<D, UT>(v_at, token0, lo, end, lane);
                multiply_v<D, NT, UT, KF_16, T>(st.acc, st.middle, p, v_at, lane);
            } else if (a.v == KF_4) {
                multiply_v<D, NT, UT, KF_4, __half>(st.acc, st.middle, p, v_at, lane);
            } else if (a.v == KF_8) {
                multiply_v<D, NT, UT, KF_8, __half>(st.acc, st.middle, p, v_at, lane);
            } else {
                multiply_v<D, NT, UT, KF_FP8, __half>(st.acc, st.middle, p, v_at, lane);
            }
            __syncwarp();
            if (lane == 0) barrier_arrive(bar.empty(slot));
        }
        base += n_units;
        barrier_wait(bar.joint_empty(at), turn ^ 1);
        if (share < n_units)
            put_joint<D, NT>((float *)(memory + a.joint_at) + at * joint_floats<D>(a.rows), st, a,
                             n_heads, share, lane);
        __syncwarp();
        if (lane == 0) barrier_arrive(bar.joint_full(at));
    }
}

__device__ __forceinline__ void finish_sync() {
    asm volatile("bar.sync 1, %0;" ::"n"(32 * (kConsumers + 1)) : "memory");
}

// The block's last item: consumers have nothing else to do and help the joining warp.
template <int D, int NT, int UT>
__device__ __forceinline__ void finish(const decode_arguments &a, const uint8_t *memory, int *flag,
                                       const attention_part *parts, int item, uint32_t n,
                                       int thread) {
    constexpr int THREADS = 32 * (kConsumers + 1);
    const item_place p = place_of(a, item, 8 * NT);
    const attention_part part = parts[p.part];
    const int n_units = (part.end - part.begin + UT - 1) / UT;
    const int head0 = p.g * a.ratio + p.head0, n_heads = min(8 * NT, a.ratio - p.head0);
    finish_sync();
    join<D>((const float *)(memory + a.joint_at) + n % kItems * joint_floats<D>(a.rows), a, part,
            head0, n_heads, min(kConsumers, n_units), thread, THREADS);
    if (part.n_parts == 1) return;
    __threadfence();
    finish_sync();
    if (thread == 0) *flag = count_part<D>(a, part, head0);
    finish_sync();
    if (*flag) sum_parts<D>(a, part, head0, n_heads, thread, THREADS);
}

// LIGHT: neither K nor V is 16 bit, and T does not matter.
template <int D, int NT, int UT, typename T, bool LIGHT, bool BULK>
__global__ void __launch_bounds__(kThreads, D == 256 || NT == 2 ? 1 : 2)
    attend_decode(const decode_arguments a) {
    extern __shared__ __align__(1024) uint8_t memory[];
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const barriers bar = {shared_at(memory) + a.barriers_at, a.stages};
    if (threadIdx.x == 0) {
        for (int i = 0; i < a.stages; i++) {
            barrier_init(bar.full(i), BULK ? 1 : 32);
            barrier_init(bar.empty(i), 1);
        }
        for (int i = 0; i < kItems; i++) {
            barrier_init(bar.q_full(i), BULK ? 1 : 33);
            barrier_init(bar.q_empty(i), kConsumers);
            barrier_init(bar.joint_full(i), kConsumers);
            barrier_init(bar.joint_empty(i), 1);
        }
        fence_async_proxy();
    }
    __syncthreads();
    const attention_part *parts =
        (const attention_part *)((const uint8_t *)a.plan + a.plan->parts_at);
    const int n_items = a.plan->n_parts * a.n_kv_heads * a.n_tiles;
    const int mine =
        n_items > (int)blockIdx.x ? (n_items - 1 - (int)blockIdx.x) / (int)gridDim.x + 1 : 0;
    if (mine == 0) return;
    if (warp < kConsumers) {
        consume<D, NT, UT, T, LIGHT>(a, memory, bar, n_items, warp, lane);
    } else if (warp == kConsumers + 1) {
        produce<D, NT, UT, BULK>(a, memory, bar, parts, n_items, lane);
        return;
    } else {
        for (int n = 0; n < mine - 1; n++) {
            const int item = blockIdx.x + n * gridDim.x;
            const item_place p = place_of(a, item, 8 * NT);
            const attention_part part = parts[p.part];
            const int n_units = (part.end - part.begin + UT - 1) / UT;
            const int head0 = p.g * a.ratio + p.head0, n_heads = min(8 * NT, a.ratio - p.head0);
            barrier_wait(bar.joint_full(n % kItems), n / kItems & 1);
            join<D>((const float *)(memory + a.joint_at) + n % kItems * joint_floats<D>(a.rows), a,
                    part, head0, n_heads, min(kConsumers, n_units), lane, 32);
            __syncwarp();
            if (lane == 0) barrier_arrive(bar.joint_empty(n % kItems));
            if (part.n_parts == 1) continue;
            __threadfence();
            __syncwarp();
            const bool last = lane == 0 && count_part<D>(a, part, head0);
            if (__any_sync(~0u, last)) sum_parts<D>(a, part, head0, n_heads, lane, 32);
        }
    }
    finish<D, NT, UT>(a, memory, (int *)(memory + a.barriers_at - 16), parts,
                      blockIdx.x + (mine - 1) * gridDim.x, mine - 1, threadIdx.x);
}

// --- Launch
// ---------------------------------------------------------------------------------------------

template <int D, int NT, int UT, typename T, bool LIGHT, bool BULK>
status launch(const attention_problem *p) {
    const attention_layer_params *l = &p->l;
    decode_arguments a = {};
    a.out = p->out;
    a.qkv = p->qkv;
    a.sinks = l->sinks;
    a.base = (const uint8_t *)p->c.base;
    a.page_bytes = p->c.page_bytes;
    a.layout = p->layout;
    a.k = p->c.k;
    a.v = p->c.v;
    a.plan = p->plan;
    a.partial = (float *)p->workspace;
    a.page = p->b.page;
    a.n_heads = l->n_heads;
    a.n_kv_heads = l->n_kv_heads;
    a.ratio = l->n_heads / l->n_kv_heads;
    a.n_tiles = (a.ratio + 8 * NT - 1) / (8 * NT);
    a.bf16 = l->type == DT_BF16;
    a.scale = l->scale * kLog2E;
    a.v_at = UT * attention_row_bytes(a.k, D);
    a.k_param_at = a.v_at + UT * attention_row_bytes(a.v, D);
    a.v_param_at = a.k_param_at + UT * attention_param_bytes(a.k);
    a.stage_bytes = (int)div_up(a.v_param_at + UT * attention_param_bytes(a.v), 128) * 128;

    a.rows = a.ratio < 8 * NT ? a.ratio : 8 * NT;

    // Two blocks an SM where each then has a ring of a unit for each consumer; else one.
    const int q_bytes = kItems * q_slot_bytes<D, NT>();
    const int joint_bytes =
        (int)div_up(kItems * joint_floats<D>(a.rows) * 4, 16) * 16 + 16; // + flag
    const int fixed = q_bytes + joint_bytes + 4 * kItems * 8, per_sm = p->shared_bytes_sm;
    const int unit = a.stage_bytes + 16; // and its two barriers
    int blocks = 2, room = (per_sm / 2 - 1024 - fixed) / unit;
    if (D == 256 || NT == 2 || room < kConsumers) blocks = 1, room = (per_sm - 1024 - fixed) / unit;
    a.stages = (room < 24 ? room : 24) / kConsumers * kConsumers;
    if (a.stages == 0) return FAIL(ST_UNSUPPORTED, "attention_decode: %d stages", a.stages);
    a.q_at = a.stages * a.stage_bytes;
    a.joint_at = a.q_at + q_bytes;
    a.barriers_at = a.joint_at + joint_bytes;
    const int bytes = a.barriers_at + a.stages * 16 + 4 * kItems * 8;
    const auto kernel = attend_decode<D, NT, UT, T, LIGHT, BULK>;
    const cudaError_t e =
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
    if (e != cudaSuccess) return FAIL(ST_DEVICE, "attention_decode: %s", cudaGetErrorString(e));
    kernel<<<p->n_sms * blocks, kThreads, bytes, p->stream>>>(a);
    return launched("attention_decode");
}

template <int D, int NT, bool BULK> status launch_formats(const attention_problem *p) {
    if (p->c.k != KF_16 && p->c.v != KF_16) return launch<D, NT, 64, __half, true, BULK>(p);
    if (p->l.type == DT_F16) return launch<D, NT, 32, __half, false, BULK>(p);
    return launch<D, NT, 32, __nv_bfloat16, false, BULK>(p);
}

template <bool BULK> status launch_sizes(const attention_problem *p) {
    const bool wide = p->l.n_heads / p->l.n_kv_heads > 8;
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
