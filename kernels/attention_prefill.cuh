// attention_prefill.cuh - what the prefill kernels of every family do alike: work items, rows of q
// in, the maxima of the softmax, rows of results out.
//
// Rows are heads of a group times tokens, so that one reading (and one conversion) of K and V
// serves all heads of the group. How codes become values in fp16 is each kernel's own.
#ifndef AMALGAM_ATTENTION_PREFILL_CUH
#define AMALGAM_ATTENTION_PREFILL_CUH
#include "attention_device.cuh"

namespace {

constexpr int kRows = ATTENTION_TILE_ROWS;

struct prefill_arguments {
    void *out;       // [T, H D]
    const void *qkv; // [T, (H + 2G) D]
    const void *sinks;
    const uint8_t *base; // with page_bytes and layout of the cache, or of pages written out
    int64_t page_bytes;
    attention_layout layout;
    kv_format k, v; // of the cache
    const attention_tile_list *tiles;
    const int32_t *page;
    int n_heads, n_kv_heads, ratio, window;
    bool bf16;
    float scale; // times log2(e)
};

// Which tiles, from memory: as arguments they would take registers that codes need.
__device__ __forceinline__ int count_of(const prefill_arguments &a) { return a.tiles->n; }
__device__ __forceinline__ const attention_tile *tiles_of(const prefill_arguments &a) {
    return (const attention_tile *)((const uint8_t *)a.tiles + a.tiles->at);
}

// One work item: which rows, and the blocks of tokens they see.
struct tile_work {
    attention_tile t;
    int g, first, last; // blocks of BN tokens; last < first: no more items
};

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
template <int BN, int ROWS = kRows, typename A>
__device__ __forceinline__ tile_work work_of(const A &a, int item) {
    tile_work w = {};
    w.t.kv_len = 1; // of no item: whoever looks ahead finds page 0
    w.last = -1;
    if (item >= count_of(a) * a.n_kv_heads) return w;
    w.t = tiles_of(a)[item / a.n_kv_heads];
    w.g = item % a.n_kv_heads;
    const int row_last = min(w.t.row0 + ROWS, w.t.n_rows) - 1;
    const int p_first = w.t.position + w.t.row0 / a.ratio;
    w.last = (w.t.position + row_last / a.ratio) / BN;
    w.first = a.window > 0 ? max(0, p_first - a.window + 1) / BN : 0;
    return w;
}

// --- Rows ---------------------------------------------------------------------------------------

// A warp's 16 rows of q of an item, from r0 on, to q_at in the swizzle, AT_ONCE loads under way;
// rows past the chunk's end are zero. A row is D / 8 lanes: make(x, r) makes of a lane's piece of
// row r what the product wants. position: of these rows.
template <int D, int AT_ONCE, typename F>
__device__ __forceinline__ void load_rows(const prefill_arguments &a, const tile_work &w,
                                          uint32_t q_at, int *position, int r0, int lane,
                                          const F &make) {
    constexpr int LANES = D / 8;
    const int own = w.t.row0 + r0 + lane % 16; // the row whose place in qkv this lane computes
    const int own_at = own < w.t.n_rows
                           ? (w.t.token0 + own / a.ratio) * (a.n_heads + 2 * a.n_kv_heads) +
                                 w.g * a.ratio + own % a.ratio
                           : -1;
    if (lane < 16) position[lane] = w.t.position + min(own, w.t.n_rows - 1) / a.ratio;
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
            make(x[i], r);
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

// This lane's two rows, r and r + 8 of its warp's 16: the largest score, and the sum of its tokens'
// weights.
struct row_state {
    float m[2], l[2];
};

// Scores of BN tokens, `token` and on, that a row does not see. position: of the lane's first row,
// which is not behind its second one.
template <int BN>
__device__ __forceinline__ void hide(float (&s)[BN / 2], const int *position, int token, int window,
                                     int lane) {
    const int ahead[2] = {position[0] - token, position[8] - token};
    const int own = 2 * (lane % 4);
    if (__any_sync(~0u, ahead[0] < BN - 1)) {
        const int last[2] = {ahead[0] - own, ahead[1] - own};
#pragma unroll
        for (int i = 0; i < BN / 2; i++)
            if (i / 4 * 8 + i % 2 > last[i / 2 % 2]) s[i] = -INFINITY;
    }
    if (window > 0 && __any_sync(~0u, ahead[1] >= window)) {
        const int before[2] = {ahead[0] - window - own, ahead[1] - window - own};
#pragma unroll
        for (int i = 0; i < BN / 2; i++)
            if (i / 4 * 8 + i % 2 <= before[i / 2 % 2]) s[i] = -INFINITY;
    }
}
// Rows' maxima after these scores, times `unit`; true when results so far must shrink.
template <int BN>
__device__ __forceinline__ bool raise_max(const float (&s)[BN / 2], row_state &r,
                                          float (&shrink)[2], const float (&unit)[2]) {
    float top[2];
#pragma unroll
    for (int h = 0; h < 2; h++) {
        top[h] = fmaxf(s[2 * h], s[2 * h + 1]);
#pragma unroll
        for (int i = 1; i < BN / 8; i++)
            top[h] = fmaxf(top[h], fmaxf(s[4 * i + 2 * h], s[4 * i + 2 * h + 1]));
        top[h] *= unit[h];
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
            }
        }
    }
    return moved;
}
// What scores are taken from: nothing may be visible yet.
__device__ __forceinline__ float reference_of(float m) { return m == -INFINITY ? 0.f : m; }

// Where a row of an item goes, in rows of D; -1 past the chunk's end. sink: its head's, times
// log2(e).
struct row_target {
    int at;
    float sink;
};
// That of row r0 + lane % 16.
__device__ __forceinline__ row_target target_of(const prefill_arguments &a, const tile_work &w,
                                                int r0, int lane) {
    const int own = w.t.row0 + r0 + lane % 16, token = own / a.ratio;
    const int head = w.g * a.ratio + own - token * a.ratio;
    row_target to = {own < w.t.n_rows ? (w.t.token0 + token) * a.n_heads + head : -1, 0.f};
    if (a.sinks)
        to.sink = (a.bf16 ? to_f32(((const __nv_bfloat16 *)a.sinks)[head])
                          : to_f32(((const __half *)a.sinks)[head])) *
                  kLog2E;
    return to;
}

// The warp's 16 rows of the result, o over the sum of weights, through its rows of q to 16-byte
// stores. turn(x) puts 16 bytes' elements in order.
template <int D, int R, int N, typename F>
__device__ __forceinline__ void store_rows(const prefill_arguments &a, const row_target &to,
                                           float (&o)[N][R], const row_state &r, uint32_t q_rows,
                                           int lane, const F &turn) {
    constexpr int LANES = D / 8;
#pragma unroll
    for (int h = 0; h < 2; h++) {
        const float row_sink = __shfl_sync(~0u, to.sink, lane / 4 + 8 * h);
        float l = quad_sum(r.l[h]);
        if (a.sinks) l += exp2_approx(row_sink - r.m[h]);
        const float f = 1.f / l;
        const int row = lane / 4 + 8 * h;
#pragma unroll
        for (int n = 0; n < N; n++)
#pragma unroll
            for (int i = 0; i < R / 4; i++) {
                const float x = o[n][4 * i + 2 * h] * f;
                const float y = o[n][4 * i + 2 * h + 1] * f;
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
        const int at = __shfl_sync(~0u, to.at, row);
        uint4 x;
        asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
                     : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w)
                     : "r"(q_rows + code_at(2 * D, row, lane % LANES * 16))
                     : "memory");
        turn(x);
        if (at >= 0) *(uint4 *)((uint16_t *)a.out + (int64_t)at * D + lane % LANES * 8) = x;
    }
}

inline prefill_arguments prefill_arguments_of(const attention_problem *p) {
    const attention_layer_params *l = &p->l;
    prefill_arguments a = {};
    a.out = p->out;
    a.qkv = p->qkv;
    a.sinks = l->sinks;
    const attention_cache *from = p->tiles == TILES_WIDE ? &p->wide : &p->c;
    a.base = (const uint8_t *)from->base;
    a.page_bytes = from->page_bytes;
    a.layout = attention_layout_of(from->k, from->v, l->n_kv_heads, l->head_dim);
    a.k = p->c.k;
    a.v = p->c.v;
    a.tiles = &p->plan->tiles[p->tiles];
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
