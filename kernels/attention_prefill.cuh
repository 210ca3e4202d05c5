// attention_prefill.cuh - what the prefill kernels of every family do alike: work items, codes to
// fp16, rows of q in, the softmax of a block of scores, rows of results out.
//
// Rows are heads of a group times tokens, so that one reading (and one conversion) of K and V
// serves all heads of the group. Codes become fp16 in one of two ways. Values: code * scale +
// minimum, rounded once; q of a bf16 model is made fp16 as well, times a power of two of its row,
// which is exact. FOLD, for fp16 models, whose bound leaves no room for those two roundings: the
// tiles hold the codes themselves, counted from their middle, which are exact, and the parameters
// enter the softmax. With k = s (c - mid) + z, v = s' (c' - mid' + r), s' r = minimum' + mid' s':
//
//     y_j = s_j (q.c_j) + z_j sum(q) + log2 s'_j      (times scale and log2 e where due)
//     p_j = 2^(y_j - m)     l = sum p_j / s'_j     out = (sum p_j c'_j + sum p_j r_j) / l
#ifndef AMALGAM_ATTENTION_PREFILL_CUH
#define AMALGAM_ATTENTION_PREFILL_CUH
#include "attention_device.cuh"

namespace {

constexpr int kRows = ATTENTION_TILE_ROWS;

struct prefill_arguments {
    void *out;       // [T, H D]
    const void *qkv; // [T, (H + 2G) D]
    const void *sinks;
    const uint8_t *base;
    int64_t page_bytes;
    attention_layout layout;
    kv_format k, v;
    const attention_plan *plan;
    const int32_t *page;
    int n_heads, n_kv_heads, ratio, window;
    bool bf16;
    float scale; // times log2(e)
};

// One work item: which rows, and the blocks of tokens they see.
struct tile_work {
    attention_tile t;
    int g, first, last; // blocks of BN tokens; last < first: no more items
};

// Of an item's rows: the scale of their scores (over the power of two that q was multiplied by),
// the sum of q (FOLD), the position.
struct row_facts {
    float scale[kRows], sum[kRows];
    int position[kRows];
};

// FOLD: what a block's tokens bring to the softmax, two neighbours a record.
struct column_block {
    float4 score[64];  // s, s, z, z of K, times scale
    float2 log2_v[64]; // log2 s'
    float4 weight[64]; // 1 / s', 1 / s', r, r
};
struct columns { // from an even token on
    const float4 *score;
    const float2 *log2_v;
    const float4 *weight;
};
__device__ __forceinline__ columns columns_from(const column_block *c, int token) {
    return {c->score + token / 2, c->log2_v + token / 2, c->weight + token / 2};
}

// threadIdx.x read anew: what follows from it is not kept in registers all the time.
__device__ __forceinline__ int thread_anew() {
    uint32_t t;
    asm volatile("mov.u32 %0, %%tid.x;" : "=r"(t));
    return (int)(t % 1024);
}
__device__ __forceinline__ void store_shared(uint32_t at, uint4 x) {
    asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(at), "r"(x.x), "r"(x.y), "r"(x.z),
                 "r"(x.w)
                 : "memory");
}

// Items in order, there and back: they come longest first, so that sums of neighbours are alike.
__device__ __forceinline__ int item_of(int round) {
    const int i = round % 2 ? (int)(gridDim.x - 1 - blockIdx.x) : (int)blockIdx.x;
    return round * (int)gridDim.x + i;
}
template <int BN>
__device__ __forceinline__ tile_work work_of(const prefill_arguments &a, int item) {
    tile_work w = {};
    w.last = -1;
    if (item >= a.plan->n_tiles * a.n_kv_heads) return w;
    w.t =
        ((const attention_tile *)((const uint8_t *)a.plan + a.plan->tiles_at))[item / a.n_kv_heads];
    w.g = item % a.n_kv_heads;
    const int row_last = min(w.t.row0 + kRows, w.t.n_rows) - 1;
    const int p_first = w.t.position + w.t.row0 / a.ratio;
    w.last = (w.t.position + row_last / a.ratio) / BN;
    w.first = a.window > 0 ? max(0, p_first - a.window + 1) / BN : 0;
    return w;
}

// --- Codes to fp16 ------------------------------------------------------------------------------

__device__ __forceinline__ uint32_t bits_of(__half2 x) {
    return *reinterpret_cast<const uint32_t *>(&x);
}

// How a code's value comes about: its middle (FOLD), or one fused multiply-add.
template <bool FOLD> struct code_scale {
    __half2 s, m;
    // 1024 + code in both halves to the code less MID, or to code * s + m.
    template <int MID> __device__ __forceinline__ uint32_t of_magic(uint32_t magic) const {
        const __half2 c = __hsub2(*reinterpret_cast<const __half2 *>(&magic),
                                  __float2half2_rn(1024.f + (FOLD ? MID : 0)));
        return bits_of(FOLD ? c : __hfma2(c, s, m));
    }
    __device__ __forceinline__ uint32_t of_e4m3(uint16_t pair) const {
        uint32_t h;
#if __CUDA_ARCH__ >= 890
        asm("cvt.rn.f16x2.e4m3x2 %0, %1;" : "=r"(h) : "h"(pair));
#else
        const uint32_t x = __byte_perm(pair, 0, 0x1404); // e4m3_value, two at a time
        h = (x & 0x80008000u) | (x >> 1 & 0x3f803f80u);
        h = bits_of(__hmul2(*reinterpret_cast<const __half2 *>(&h), __float2half2_rn(256.f)));
#endif
        return FOLD ? h : bits_of(__hmul2(*reinterpret_cast<const __half2 *>(&h), s));
    }
};

// Eight codes to 16 bytes: `lo` and `hi` are their bytes, or `lo` alone their nibbles.
template <kv_format F, bool FOLD>
__device__ __forceinline__ uint4 eight_of(uint32_t lo, uint32_t hi, const code_scale<FOLD> &c) {
    if (F == KF_FP8)
        return make_uint4(c.of_e4m3((uint16_t)lo), c.of_e4m3((uint16_t)(lo >> 16)),
                          c.of_e4m3((uint16_t)hi), c.of_e4m3((uint16_t)(hi >> 16)));
    constexpr int MID = F == KF_8 ? 128 : 8;
    if (F == KF_4) {
        const uint32_t even = lo & 0x0f0f0f0fu, odd = lo >> 4 & 0x0f0f0f0fu;
        lo = __byte_perm(even, odd, 0x5140), hi = __byte_perm(even, odd, 0x7362);
    }
    const uint32_t top = 0x64646464u;
    return make_uint4(c.template of_magic<MID>(__byte_perm(lo, top, 0x4140)),
                      c.template of_magic<MID>(__byte_perm(lo, top, 0x4342)),
                      c.template of_magic<MID>(__byte_perm(hi, top, 0x4140)),
                      c.template of_magic<MID>(__byte_perm(hi, top, 0x4342)));
}

// FOLD: one token's record for the softmax; zeros where there is no token.
__device__ __forceinline__ void write_column(column_block *c, const prefill_arguments &a, int token,
                                             uint32_t k_param, uint32_t v_param, bool exists) {
    const float2 k = __half22float2(*reinterpret_cast<const __half2 *>(&k_param));
    const float2 v = __half22float2(*reinterpret_cast<const __half2 *>(&v_param));
    const float k_mid = a.k == KF_8 ? 128.f : a.k == KF_4 ? 8.f : 0.f;
    const float v_mid = a.v == KF_8 ? 128.f : a.v == KF_4 ? 8.f : 0.f;
    float s = v.x; // a vector of one value has scale 0 and codes 0: any scale will do
    if (s == 0.f) s = v.y == 0.f ? 0x1p-24f : fabsf(v.y) * 0x1p-8f;
    float log2_s;
    asm("lg2.approx.f32 %0, %1;" : "=f"(log2_s) : "f"(s));
    const float inverse = __fdividef(1.f, s);
    const int i = token / 2, j = token % 2;
    float *score = (float *)&c->score[i], *weight = (float *)&c->weight[i];
    score[j] = exists ? k.x * a.scale : 0.f;
    score[2 + j] = exists ? (k.y + k_mid * k.x) * a.scale : 0.f;
    ((float *)&c->log2_v[i])[j] = exists ? log2_s : 0.f;
    weight[j] = exists ? inverse : 0.f;
    weight[2 + j] = exists ? v.y * inverse + v_mid : 0.f;
}

// --- Rows ---------------------------------------------------------------------------------------

// A warp's 16 rows of q of an item, from r0 on, to q_at in the swizzle; rows past the chunk's end
// are zero. to_half: of a bf16 model whose K is codes. A row is D / 8 lanes.
template <int D, bool FOLD>
__device__ __forceinline__ void load_rows(const prefill_arguments &a, const tile_work &w,
                                          uint32_t q_at, row_facts *facts, int r0, int lane) {
    constexpr int LANES = D / 8, AT_ONCE = 4; // loads under way
    const bool to_half = a.bf16 && a.k != KF_16;
    const int own = w.t.row0 + r0 + lane % 16; // the row whose place in qkv this lane computes
    const int own_at = own < w.t.n_rows
                           ? (w.t.token0 + own / a.ratio) * (a.n_heads + 2 * a.n_kv_heads) +
                                 w.g * a.ratio + own % a.ratio
                           : -1;
    if (lane < 16) facts->position[r0 + lane] = w.t.position + min(own, w.t.n_rows - 1) / a.ratio;
#pragma unroll 1
    for (int i0 = 0; i0 < LANES / 2; i0 += AT_ONCE) {
        uint4 x[AT_ONCE];
#pragma unroll
        for (int i = 0; i < AT_ONCE; i++) {
            const int at = __shfl_sync(~0u, own_at, (i0 + i) * (32 / LANES) + lane / LANES);
            x[i] = make_uint4(0, 0, 0, 0);
            if (at >= 0) x[i] = __ldg((const uint4 *)a.qkv + (int64_t)at * LANES + lane % LANES);
        }
#pragma unroll
        for (int i = 0; i < AT_ONCE; i++) {
            const int r = r0 + (i0 + i) * (32 / LANES) + lane / LANES;
            float f = 1.f, total = 0.f;
            uint32_t *word = (uint32_t *)&x[i];
            if (to_half) {
                float amax = 0.f;
#pragma unroll
                for (int e = 0; e < 4; e++) {
                    const float2 y = __bfloat1622float2(*(const __nv_bfloat162 *)&word[e]);
                    amax = fmaxf(amax, fmaxf(fabsf(y.x), fabsf(y.y)));
                }
#pragma unroll
                for (int d = LANES / 2; d > 0; d /= 2)
                    amax = fmaxf(amax, __shfl_xor_sync(~0u, amax, d));
                // The power of two that brings the largest to [2, 4): products stay far inside f32
                // and fp16.
                if (amax > 1e-18f)
                    f = __uint_as_float((255u << 23) - (__float_as_uint(amax) & 0x7f800000u));
#pragma unroll
                for (int e = 0; e < 4; e++) {
                    const float2 y = __bfloat1622float2(*(const __nv_bfloat162 *)&word[e]);
                    word[e] = pack2<__half>(y.x * f, y.y * f);
                }
            }
            if (FOLD) {
#pragma unroll
                for (int e = 0; e < 4; e++) {
                    const float2 y = __half22float2(*(const __half2 *)&word[e]);
                    total += y.x + y.y;
                }
#pragma unroll
                for (int d = LANES / 2; d > 0; d /= 2) total += __shfl_xor_sync(~0u, total, d);
            }
            if (lane % LANES == 0) facts->scale[r] = a.scale / f, facts->sum[r] = total;
            store_shared(q_at + code_at(2 * D, r, lane % LANES * 16), x[i]);
        }
    }
}

__device__ __forceinline__ float quad_max(float x) {
    x = fmaxf(x, __shfl_xor_sync(~0u, x, 1));
    return fmaxf(x, __shfl_xor_sync(~0u, x, 2));
}
__device__ __forceinline__ float quad_sum(float x) {
    x += __shfl_xor_sync(~0u, x, 1);
    return x + __shfl_xor_sync(~0u, x, 2);
}

// This lane's two rows, r and r + 8 of its warp's 16.
struct row_state {
    float m[2]; // largest score
    float l[2], z[2];
};

// FOLD: scores of codes to y.
template <int BN>
__device__ __forceinline__ void fold_scores(float (&s)[BN / 2], const columns &c,
                                            const row_facts *facts, int row, int quarter) {
    const float q_sum[2] = {facts->sum[row], facts->sum[row + 8]};
#pragma unroll
    for (int i = 0; i < BN / 8; i++) {
        const float4 k = c.score[4 * i + quarter];
        const float2 v = c.log2_v[4 * i + quarter];
#pragma unroll
        for (int h = 0; h < 2; h++) {
            s[4 * i + 2 * h] = s[4 * i + 2 * h] * k.x + (k.z * q_sum[h] + v.x);
            s[4 * i + 2 * h + 1] = s[4 * i + 2 * h + 1] * k.y + (k.w * q_sum[h] + v.y);
        }
    }
}

// Scores of BN tokens to weights, in place; true when rows' results so far must shrink. `row`: the
// lane's first, of the item's. c: from these tokens on.
template <int BN, bool FOLD>
__device__ __forceinline__ bool weigh(float (&s)[BN / 2], row_state &r, float (&shrink)[2],
                                      const columns &c, const row_facts *facts, int row, int token,
                                      int window, bool edge, int lane) {
    const int quarter = lane % 4;
    if (FOLD) fold_scores<BN>(s, c, facts, row, quarter);
    if (edge) {
        const int p[2] = {facts->position[row], facts->position[row + 8]};
#pragma unroll
        for (int i = 0; i < BN / 2; i++) {
            const int j = token + i / 4 * 8 + 2 * quarter + i % 2, pos = p[i / 2 % 2];
            if (j > pos || (window > 0 && j <= pos - window)) s[i] = -INFINITY;
        }
    }
    const float scale[2] = {facts->scale[row], facts->scale[row + 8]}; // not FOLD
    float top[2], from[2];
#pragma unroll
    for (int h = 0; h < 2; h++) {
        top[h] = fmaxf(s[2 * h], s[2 * h + 1]);
#pragma unroll
        for (int i = 1; i < BN / 8; i++)
            top[h] = fmaxf(top[h], fmaxf(s[4 * i + 2 * h], s[4 * i + 2 * h + 1]));
        if (!FOLD) top[h] *= scale[h];
    }
    // Seldom after a row's first blocks: only then are the row's four lanes asked.
    const bool moved = __any_sync(~0u, top[0] > r.m[0] || top[1] > r.m[1]);
    if (moved) {
#pragma unroll
        for (int h = 0; h < 2; h++) {
            top[h] = quad_max(top[h]);
            shrink[h] = 1.f;
            if (top[h] > r.m[h]) {
                shrink[h] = exp2_approx(r.m[h] - top[h]);
                r.m[h] = top[h];
                r.l[h] *= shrink[h];
                if (FOLD) r.z[h] *= shrink[h];
            }
        }
    }
#pragma unroll
    for (int h = 0; h < 2; h++) from[h] = r.m[h] == -INFINITY ? 0.f : r.m[h]; // nothing visible yet
#pragma unroll
    for (int i = 0; i < BN / 8; i++) {
        float4 v;
        if (FOLD) v = c.weight[4 * i + quarter];
#pragma unroll
        for (int h = 0; h < 2; h++) {
            float &x = s[4 * i + 2 * h], &y = s[4 * i + 2 * h + 1];
            if (FOLD) {
                x = exp2_approx(x - from[h]), y = exp2_approx(y - from[h]);
                r.l[h] = r.l[h] + x * v.x + y * v.y;
                r.z[h] = r.z[h] + x * v.z + y * v.w;
            } else {
                x = exp2_approx(x * scale[h] - from[h]);
                y = exp2_approx(y * scale[h] - from[h]);
                r.l[h] += x + y;
            }
        }
    }
    return moved;
}

// The warp's 16 rows of the result, divided by l, through its rows of q to 16-byte stores.
template <int D, int R, int N, bool FOLD>
__device__ __forceinline__ void store_rows(const prefill_arguments &a, const tile_work &w,
                                           float (&o)[N][R], row_state &r, uint32_t q_rows, int r0,
                                           int lane) {
    constexpr int LANES = D / 8;
    // Where row r0 + lane % 16 goes, in rows of D; -1 past the chunk's end.
    const int own = w.t.row0 + r0 + lane % 16;
    const int own_head = w.g * a.ratio + own % a.ratio;
    const int own_at = own < w.t.n_rows ? (w.t.token0 + own / a.ratio) * a.n_heads + own_head : -1;
    float sink = 0.f;
    if (a.sinks)
        sink = (a.bf16 ? to_f32(((const __nv_bfloat16 *)a.sinks)[own_head])
                       : to_f32(((const __half *)a.sinks)[own_head])) *
               kLog2E;
#pragma unroll
    for (int h = 0; h < 2; h++) {
        const float row_sink = __shfl_sync(~0u, sink, lane / 4 + 8 * h);
        float l = quad_sum(r.l[h]);
        const float z = FOLD ? quad_sum(r.z[h]) : 0.f;
        if (a.sinks) l += exp2_approx(row_sink - r.m[h]);
        const float f = 1.f / l;
        const int row = lane / 4 + 8 * h;
#pragma unroll
        for (int n = 0; n < N; n++)
#pragma unroll
            for (int i = 0; i < R / 4; i++) {
                const float x = (o[n][4 * i + 2 * h] + z) * f;
                const float y = (o[n][4 * i + 2 * h + 1] + z) * f;
                const uint32_t at = q_rows + code_at(2 * D, row, n * 256 + i * 16);
                asm volatile("st.shared.u32 [%0], %1;" ::"r"(at + lane % 4 * 4),
                             "r"(a.bf16 ? pack2<__nv_bfloat16>(x, y) : pack2<__half>(x, y))
                             : "memory");
            }
    }
    __syncwarp();
#pragma unroll
    for (int i = 0; i < LANES / 2; i++) {
        const int row = i * (32 / LANES) + lane / LANES;
        const int at = __shfl_sync(~0u, own_at, row);
        uint4 x;
        asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
                     : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w)
                     : "r"(q_rows + code_at(2 * D, row, lane % LANES * 16))
                     : "memory");
        if (at >= 0) *(uint4 *)((uint16_t *)a.out + (int64_t)at * D + lane % LANES * 8) = x;
    }
}

inline prefill_arguments prefill_arguments_of(const attention_problem *p) {
    const attention_layer_params *l = &p->l;
    prefill_arguments a = {};
    a.out = p->out;
    a.qkv = p->qkv;
    a.sinks = l->sinks;
    a.base = (const uint8_t *)p->c.base;
    a.page_bytes = p->c.page_bytes;
    a.layout = p->layout;
    a.k = p->c.k;
    a.v = p->c.v;
    a.plan = p->plan;
    a.page = p->b.page;
    a.n_heads = l->n_heads;
    a.n_kv_heads = l->n_kv_heads;
    a.ratio = l->n_heads / l->n_kv_heads;
    a.window = l->window;
    a.bf16 = l->type == DT_BF16;
    a.scale = l->scale * kLog2E;
    return a;
}

} // namespace
#endif
