// attention_prefill_sm90.cu - prefill chunks straight from the paged cache, on Hopper.
//
// A block is a producer warpgroup and two consumer warpgroups of 64 query rows each. Rows are heads
// of a group times tokens, so that one reading (and one conversion) of K and V serves all heads of
// the group. The producer fills two stages of K [BN, D] and V [BN, D] in the 128-byte swizzle:
// 16-bit pages are in that order already and are copied as they lie; codes are copied to a raw
// buffer, converted by one fused multiply-add in fp16 (one rounding), and written in that order.
// With codes q is made fp16 as well, times a power of two of its row, which is exact. Consumers run
//
//     S = Q K_j^T  |  O += P_{j-1} V_{j-1}      both in flight, then the softmax of S
//
// and take turns, so that one warpgroup's softmax runs under the other's products.
#include "attention_wgmma.cuh"

namespace {

constexpr int kRows = ATTENTION_TILE_ROWS, kThreads = 384, kStages = 2;

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
    float scale;                                                     // times log2(e)
    int raw_at, raw_bytes, raw_v_at, raw_k_param_at, raw_v_param_at; // raw stages in block memory
};

// Block memory: q, K stages, V stages, raw stages (from raw_at), then this.
struct control {
    float row_factor[kRows]; // of q
    uint64_t k_full[kStages], v_full[kStages], k_empty[kStages], v_empty[kStages];
    uint64_t raw_full[2][kStages], landed, pad; // raw: of K, of V
};

template <int ID, int N> __device__ __forceinline__ void named_sync() {
    asm volatile("bar.sync %0, %1;" ::"n"(ID), "n"(N) : "memory");
}
__device__ __forceinline__ void turn_wait(int group) {
    asm volatile("bar.sync %0, 256;" ::"r"(4 + group) : "memory");
}
__device__ __forceinline__ void turn_give(int group) {
    asm volatile("bar.arrive %0, 256;" ::"r"(4 + (group ^ 1)) : "memory");
}

// One work item: which rows, and the blocks of tokens they see.
struct tile_work {
    attention_tile t;
    int g, first, last; // blocks of BN tokens
};

template <int BN>
__device__ __forceinline__ tile_work work_of(const prefill_arguments &a, int item) {
    tile_work w;
    w.t =
        ((const attention_tile *)((const uint8_t *)a.plan + a.plan->tiles_at))[item / a.n_kv_heads];
    w.g = item % a.n_kv_heads;
    const int row_last = min(w.t.row0 + kRows, w.t.n_rows) - 1;
    const int p_first = w.t.position + w.t.row0 / a.ratio;
    w.last = (w.t.position + row_last / a.ratio) / BN;
    w.first = a.window > 0 ? max(0, p_first - a.window + 1) / BN : 0;
    return w;
}

// --- Producer
// --------------------------------------------------------------------------------------------

// 1024 + code in both halves to code * s + m, rounded once.
__device__ __forceinline__ uint32_t scaled(uint32_t magic, __half2 s, __half2 m) {
    const __half2 base = __half2half2(__ushort_as_half(0x6400)); // 1024
    const __half2 c = __hsub2(*reinterpret_cast<const __half2 *>(&magic), base);
    const __half2 v = __hfma2(c, s, m);
    return *reinterpret_cast<const uint32_t *>(&v);
}
__device__ __forceinline__ void bytes_to_half(uint32_t (&out)[2], uint32_t w, __half2 s,
                                              __half2 m) {
    out[0] = scaled(__byte_perm(w, 0x64646464u, 0x4140), s, m);
    out[1] = scaled(__byte_perm(w, 0x64646464u, 0x4342), s, m);
}
__device__ __forceinline__ void e4m3_to_half(uint32_t (&out)[2], uint32_t w, __half2 s) {
#pragma unroll
    for (int i = 0; i < 2; i++) {
        const uint16_t pair = (uint16_t)(w >> 16 * i);
        uint32_t h;
        asm("cvt.rn.f16x2.e4m3x2 %0, %1;" : "=r"(h) : "h"(pair));
        const __half2 v = __hmul2(*reinterpret_cast<const __half2 *>(&h), s);
        out[i] = *reinterpret_cast<const uint32_t *>(&v);
    }
}
// Neighbours (0, 1), (2, 3), (4, 5), (6, 7) of a word of nibbles.
__device__ __forceinline__ void nibbles_to_half(uint32_t (&out)[4], uint32_t w, __half2 s,
                                                __half2 m) {
    const uint32_t even = w & 0x0f0f0f0fu, odd = w >> 4 & 0x0f0f0f0fu;
    const uint32_t lo = __byte_perm(even, odd, 0x5140), hi = __byte_perm(even, odd, 0x7362);
    uint32_t o[2];
    bytes_to_half(o, lo, s, m);
    out[0] = o[0], out[1] = o[1];
    bytes_to_half(o, hi, s, m);
    out[2] = o[0], out[3] = o[1];
}

// Rows [BN, D] of codes (as they lie in pages) to fp16 in the swizzle; rows from n_valid on become
// zero. A thread keeps its piece and goes down the tokens; eight neighbours take the eight tokens
// of a group, whose pieces lie in different banks. BATCH loads are under way before the first is
// used.
template <int D, int BN, kv_format F>
__device__ __forceinline__ void convert(uint32_t to, const uint8_t *code, const uint8_t *param,
                                        int n_valid, int thread) {
    constexpr int ROW = F == KF_4 ? D / 2 : D, PIECES = ROW / 16, DIMS = F == KF_4 ? 32 : 16;
    constexpr int STEP = 128 / PIECES, STEPS = BN / STEP, BATCH = STEPS < 4 ? STEPS : 4;
    const int first = thread / (8 * PIECES) * 8 + thread % 8, piece = thread / 8 % PIECES;
    const uint8_t *from = code + code_at(ROW, first, piece * 16);
    uint32_t put[DIMS / 8];
#pragma unroll
    for (int j = 0; j < DIMS / 8; j++)
        put[j] = to + code_at(2 * D, first, piece * DIMS * 2 + j * 16);
#pragma unroll 1
    for (int k0 = 0; k0 < STEPS; k0 += BATCH) {
        uint4 w[BATCH];
        __half2 s[BATCH], m[BATCH];
#pragma unroll
        for (int k = 0; k < BATCH; k++) {
            const int token = first + (k0 + k) * STEP;
            w[k] = *(const uint4 *)(from + (k0 + k) * STEP * ROW);
            const __half2 zero = __float2half2_rn(0.f);
            if (F == KF_FP8) {
                s[k] = __half2half2(((const __half *)param)[token]);
                m[k] = zero;
            } else {
                const __half2 both = ((const __half2 *)param)[token];
                s[k] = __low2half2(both), m[k] = __high2half2(both);
            }
            if (token >= n_valid) {
                s[k] = m[k] = zero;
                if (F == KF_FP8) w[k] = make_uint4(0, 0, 0, 0); // e4m3 has NaN, integers have not
            }
        }
#pragma unroll
        for (int k = 0; k < BATCH; k++) {
            const uint32_t word[4] = {w[k].x, w[k].y, w[k].z, w[k].w};
#pragma unroll
            for (int j = 0; j < DIMS / 8; j++) { // eight dims, 16 bytes
                uint32_t o[4];
                if (F == KF_4) {
                    nibbles_to_half(o, word[j], s[k], m[k]);
                } else {
                    uint32_t x[2], y[2];
                    if (F == KF_8) {
                        bytes_to_half(x, word[2 * j], s[k], m[k]);
                        bytes_to_half(y, word[2 * j + 1], s[k], m[k]);
                    } else {
                        e4m3_to_half(x, word[2 * j], s[k]);
                        e4m3_to_half(y, word[2 * j + 1], s[k]);
                    }
                    o[0] = x[0], o[1] = x[1], o[2] = y[0], o[3] = y[1];
                }
                asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(
                                 put[j] + (k0 + k) * STEP * 2 * D),
                             "r"(o[0]), "r"(o[1]), "r"(o[2]), "r"(o[3])
                             : "memory");
            }
        }
    }
}

template <int D, int BN>
__device__ __forceinline__ void convert_any(uint32_t to, const uint8_t *code, const uint8_t *param,
                                            kv_format f, int n_valid, int thread) {
    if (f == KF_8)
        convert<D, BN, KF_8>(to, code, param, n_valid, thread);
    else if (f == KF_4)
        convert<D, BN, KF_4>(to, code, param, n_valid, thread);
    else
        convert<D, BN, KF_FP8>(to, code, param, n_valid, thread);
}

// A cursor over the blocks of tokens of all this thread block's items.
struct walk {
    int item, block, last, page_at, kv_len, g;
};
template <int BN>
__device__ __forceinline__ void open_item(walk &w, const prefill_arguments &a, int n_items) {
    if (w.item >= n_items) return;
    const tile_work t = work_of<BN>(a, w.item);
    w.block = t.first, w.last = t.last, w.page_at = t.t.page_at, w.kv_len = t.t.kv_len, w.g = t.g;
}
template <int BN>
__device__ __forceinline__ void advance(walk &w, const prefill_arguments &a, int n_items) {
    if (++w.block <= w.last) return;
    w.item += gridDim.x;
    open_item<BN>(w, a, n_items);
}

// Physical pages of a block; past the end of the sequence the last one again.
template <int BN>
__device__ __forceinline__ void look_up(int (&id)[BN / kPage], const prefill_arguments &a,
                                        const walk &w) {
    const int last = (w.kv_len - 1) / kPage;
#pragma unroll
    for (int i = 0; i < BN / kPage; i++)
        id[i] = a.page[w.page_at + min(w.block * (BN / kPage) + i, last)];
}

// One thread: start the copies of a block's K or V, parameters to `param_to`.
template <int D, int BN>
__device__ __forceinline__ void copy_pages(const prefill_arguments &a, const walk &w,
                                           const int (&id)[BN / kPage], bool value, uint32_t to,
                                           uint32_t param_to, uint32_t barrier) {
    constexpr int PAGES = BN / kPage;
    const kv_format f = value ? a.v : a.k;
    const uint32_t bytes = kPage * row_bytes_of(f, D);
    const uint32_t params = f == KF_16 ? 0 : f == KF_FP8 ? 2 * kPage : 4 * kPage;
    const int n_pages = min(PAGES, (w.kv_len + kPage - 1) / kPage - w.block * PAGES);
    barrier_expect(barrier, n_pages * (bytes + params));
#pragma unroll
    for (int i = 0; i < PAGES; i++) {
        if (i >= n_pages) break;
        const uint8_t *page = a.base + id[i] * a.page_bytes;
        copy_bulk(to + i * bytes, page + w.g * a.layout.head_bytes + (value ? a.layout.v_code : 0),
                  bytes, barrier);
        if (params)
            copy_bulk(param_to + i * params,
                      page + a.layout.param_base + (int64_t)w.g * a.layout.param_bytes +
                          (value ? a.layout.v_param : 0),
                      params, barrier);
    }
}

// The stream of K, or of V: blocks in order through kStages stages, codes through RAW raw stages
// before. Thread 0 keeps the raw copies ahead; the pages of the block at that cursor were looked up
// a block earlier.
template <int D, int BN, int RAW, bool VALUE> struct stream {
    walk at, ahead;
    uint32_t count, started;
    int id[BN / kPage];

    __device__ __forceinline__ void start(const prefill_arguments &a, uint32_t memory, control *c,
                                          int n_items) {
        if (ahead.item >= n_items) return;
        const uint32_t raw = memory + a.raw_at + started % RAW * a.raw_bytes;
        copy_pages<D, BN>(a, ahead, id, VALUE, raw + (VALUE ? a.raw_v_at : 0),
                          raw + (VALUE ? a.raw_v_param_at : a.raw_k_param_at),
                          shared_at(&c->raw_full[VALUE][started % RAW]));
        started++;
        advance<BN>(ahead, a, n_items);
        if (ahead.item < n_items) look_up<BN>(id, a, ahead);
    }

    __device__ __forceinline__ void open(const prefill_arguments &a, uint8_t *memory, control *c,
                                         int n_items, int thread) {
        at.item = blockIdx.x;
        open_item<BN>(at, a, n_items);
        ahead = at;
        count = started = 0;
        if (thread != 0 || at.item >= n_items) return;
        look_up<BN>(id, a, ahead);
        if ((VALUE ? a.v : a.k) != KF_16)
            for (int i = 0; i < RAW; i++) start(a, shared_at(memory), c, n_items);
    }

    // The block at the cursor into its stage.
    __device__ __forceinline__ void fill(const prefill_arguments &a, uint8_t *memory, control *c,
                                         uint32_t *n_landed, int n_items, int thread) {
        constexpr int TILE = BN * 2 * D;
        const kv_format f = VALUE ? a.v : a.k;
        const uint32_t s = count % kStages,
                       empty = shared_at(VALUE ? &c->v_empty[s] : &c->k_empty[s]);
        const uint32_t full = shared_at(VALUE ? &c->v_full[s] : &c->k_full[s]);
        const uint32_t to =
            shared_at(memory) + kRows * 2 * D + (VALUE ? kStages * TILE : 0) + s * TILE;
        const int n_valid = min(BN, at.kv_len - at.block * BN);
        if (f != KF_16) {
            const uint8_t *raw = memory + a.raw_at + count % RAW * a.raw_bytes;
            barrier_wait(shared_at(&c->raw_full[VALUE][count % RAW]), count / RAW & 1);
            barrier_wait(empty, count / kStages & 1 ^ 1);
            convert_any<D, BN>(to, raw + (VALUE ? a.raw_v_at : 0),
                               raw + (VALUE ? a.raw_v_param_at : a.raw_k_param_at), f, n_valid,
                               thread);
            fence_async_proxy();
            barrier_arrive(full);
            named_sync<1, 128>(); // the raw stage has been read by all
            if (thread == 0) start(a, shared_at(memory), c, n_items);
        } else {
            barrier_wait(empty, count / kStages & 1 ^ 1);
            const bool tail = VALUE && n_valid < BN;
            if (thread == 0)
                copy_pages<D, BN>(a, at, id, VALUE, to, 0, tail ? shared_at(&c->landed) : full);
            if (tail) { // the end of the sequence: what lies behind it must become zero
                barrier_wait(shared_at(&c->landed), (*n_landed)++ & 1);
                for (int i = n_valid * (D / 8) + thread; i < BN * (D / 8); i += 128)
                    asm volatile("st.shared.v4.u32 [%0], {%1, %1, %1, %1};" ::"r"(
                                     to + code_at(2 * D, i / (D / 8), i % (D / 8) * 16)),
                                 "r"(0)
                                 : "memory");
                fence_async_proxy();
                named_sync<1, 128>();
                if (thread == 0) barrier_arrive(full);
            }
        }
        count++;
        advance<BN>(at, a, n_items);
        if (f == KF_16 && thread == 0 && at.item < n_items) look_up<BN>(id, a, at);
    }
};

// K runs a block ahead of V: K_{j+1} is wanted before V_j, and its stage is free earlier.
template <int D, int BN, int RAW>
__device__ __forceinline__ void produce(const prefill_arguments &a, uint8_t *memory, control *c,
                                        int thread) {
    const int n_items = a.plan->n_tiles * a.n_kv_heads;
    uint32_t n_landed = 0;
    stream<D, BN, RAW, false> k;
    stream<D, BN, RAW, true> v;
    k.open(a, memory, c, n_items, thread);
    v.open(a, memory, c, n_items, thread);
    if (k.at.item >= n_items) return;
    k.fill(a, memory, c, &n_landed, n_items, thread);
    while (v.at.item < n_items) {
        if (k.at.item < n_items) k.fill(a, memory, c, &n_landed, n_items, thread);
        v.fill(a, memory, c, &n_landed, n_items, thread);
    }
}

// --- Consumers
// --------------------------------------------------------------------------------------------

// This warpgroup's 64 rows of q to shared memory, in TK; rows past the chunk's end are zero.
template <int D, typename TK>
__device__ __forceinline__ void load_rows(const prefill_arguments &a, const tile_work &w,
                                          uint32_t q_at, float *factor, bool to_half, int group,
                                          int thread) {
    const int r = group * 64 + thread / 2, row = w.t.row0 + r, half = thread % 2;
    constexpr int PIECES = D / 16; // 16-byte pieces of half a row
    uint4 x[PIECES];
#pragma unroll
    for (int i = 0; i < PIECES; i++) x[i] = make_uint4(0, 0, 0, 0);
    if (row < w.t.n_rows) {
        const int64_t at = (int64_t)(w.t.token0 + row / a.ratio) * (a.n_heads + 2 * a.n_kv_heads) +
                           w.g * a.ratio + row % a.ratio;
        const uint4 *from = (const uint4 *)((const uint16_t *)a.qkv + at * D) + half * PIECES;
#pragma unroll
        for (int i = 0; i < PIECES; i++) x[i] = from[i];
    }
    float f = 1.f;
    if (to_half) { // bf16 q, K of codes
        float amax = 0.f;
#pragma unroll
        for (int i = 0; i < PIECES; i++) {
            const __nv_bfloat162 *v = (const __nv_bfloat162 *)&x[i];
#pragma unroll
            for (int e = 0; e < 4; e++) {
                const float2 y = __bfloat1622float2(v[e]);
                amax = fmaxf(amax, fmaxf(fabsf(y.x), fabsf(y.y)));
            }
        }
        amax = fmaxf(amax, __shfl_xor_sync(~0u, amax, 1));
        // The power of two that brings the largest to [2, 4): products stay far inside f32 and
        // fp16.
        if (amax > 1e-18f)
            f = __uint_as_float((255u << 23) - (__float_as_uint(amax) & 0x7f800000u));
#pragma unroll
        for (int i = 0; i < PIECES; i++) {
            const __nv_bfloat162 *v = (const __nv_bfloat162 *)&x[i];
            uint32_t y[4];
#pragma unroll
            for (int e = 0; e < 4; e++) {
                const float2 z = __bfloat1622float2(v[e]);
                y[e] = pack2<__half>(z.x * f, z.y * f);
            }
            x[i] = make_uint4(y[0], y[1], y[2], y[3]);
        }
    }
    if (half == 0) factor[r] = f;
#pragma unroll
    for (int i = 0; i < PIECES; i++)
        asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(
                         q_at + code_at(2 * D, r, (half * PIECES + i) * 16)),
                     "r"(x[i].x), "r"(x[i].y), "r"(x[i].z), "r"(x[i].w)
                     : "memory");
    fence_async_proxy();
}

// s[64, BN] = q[64, D] K^T
template <int D, int BN, typename TK>
__device__ __forceinline__ void multiply_k(float (&s)[BN / 2], uint32_t q_at, uint32_t k_at) {
    constexpr int GROUP = 16 * D;
#pragma unroll
    for (int i = 0; i < D / 16; i++) {
        const int at = i / 4 * 1024 + i % 4 * 32;
        wgmma_rows<TK>(s, matrix_of(q_at + at, GROUP, 16), matrix_of(k_at + at, GROUP, 16), i > 0);
    }
}

// o[64, D] += p[64, BN] V, in pieces of 128 (or all 64) dims.
template <int D, int BN, typename TV, int R, int N>
__device__ __forceinline__ void multiply_v(float (&o)[N][R], const uint32_t (&p)[BN / 4],
                                           uint32_t v_at) {
    constexpr int GROUP = 16 * D;
#pragma unroll
    for (int i = 0; i < BN / 16; i++)
#pragma unroll
        for (int n = 0; n < N; n++)
            wgmma_columns<TV>(o[n], p + 4 * i,
                              matrix_of(v_at + i * 2 * GROUP + n * 2048, GROUP, 1024), 1);
}

__device__ __forceinline__ float quad_max(float x) {
    x = fmaxf(x, __shfl_xor_sync(~0u, x, 1));
    return fmaxf(x, __shfl_xor_sync(~0u, x, 2));
}
__device__ __forceinline__ float quad_sum(float x) {
    x += __shfl_xor_sync(~0u, x, 1);
    return x + __shfl_xor_sync(~0u, x, 2);
}

template <int D, typename TK, typename TV>
__device__ __forceinline__ void consume(const prefill_arguments &a, uint8_t *memory, control *c,
                                        int group, int thread) {
    constexpr int BN = D == 256 ? 64 : 128, TILE = BN * 2 * D, R = D < 128 ? 32 : 64,
                  N = D == 256 ? 2 : 1;
    const uint32_t q_all = shared_at(memory), q_at = q_all + group * 64 * 2 * D;
    const uint32_t k_at = q_all + kRows * 2 * D, v_at = k_at + kStages * TILE;
    const int n_items = a.plan->n_tiles * a.n_kv_heads;
    const int lane = thread % 32,
              r0 = group * 64 + thread / 32 * 16 + lane / 4; // rows r0 and r0 + 8
    const int column = 2 * (lane % 4);
    const bool to_half = a.bf16 && sizeof(TK) == 2 && a.k != KF_16;
    uint32_t count = 0;
    if (group == 1) turn_give(1); // group 0 begins
    for (int item = blockIdx.x; item < n_items; item += gridDim.x) {
        const tile_work w = work_of<BN>(a, item);
        load_rows<D, TK>(a, w, q_all, c->row_factor, to_half, group, thread);
        asm volatile("bar.sync %0, 128;" ::"r"(2 + group) : "memory");
        int position[2];
        float scale[2], m[2] = {-INFINITY, -INFINITY}, l[2] = {0.f, 0.f};
#pragma unroll
        for (int i = 0; i < 2; i++) {
            const int row = min(w.t.row0 + r0 + 8 * i, w.t.n_rows - 1);
            position[i] = w.t.position + row / a.ratio;
            scale[i] = a.scale / c->row_factor[r0 + 8 * i];
        }
        const int row_first = min(w.t.row0 + group * 64, w.t.n_rows - 1);
        const int row_last = min(w.t.row0 + group * 64 + 63, w.t.n_rows - 1);
        const int p_first = w.t.position + row_first / a.ratio;
        const int p_last = w.t.position + row_last / a.ratio;
        float s[BN / 2], o[N][R];
        uint32_t p[BN / 4];
#pragma unroll
        for (int n = 0; n < N; n++)
#pragma unroll
            for (int i = 0; i < R; i++) o[n][i] = 0.f;

        for (int block = w.first; block <= w.last; block++, count++) {
            const uint32_t st = count % kStages, parity = count / kStages & 1;
            const uint32_t before = (count - 1) % kStages,
                           parity_before = (count - 1) / kStages & 1;
            const bool first = block == w.first;
            barrier_wait(shared_at(&c->k_full[st]), parity);
            turn_wait(group);
            settle(s);
            wgmma_fence();
            multiply_k<D, BN, TK>(s, q_at, k_at + st * TILE);
            wgmma_commit();
            if (!first) {
                barrier_wait(shared_at(&c->v_full[before]), parity_before);
                multiply_v<D, BN, TV, R, N>(o, p, v_at + before * TILE);
                wgmma_commit();
                turn_give(group);
                wgmma_wait<1>();
            } else {
                turn_give(group);
                wgmma_wait<0>();
            }
            settle(s);
            if (thread == 0) barrier_arrive(shared_at(&c->k_empty[st]));

            const int token = block * BN;
            if (token + BN - 1 > p_first || (a.window > 0 && token <= p_last - a.window)) {
#pragma unroll
                for (int i = 0; i < BN / 2; i++) {
                    const int j = token + i / 4 * 8 + column + i % 2, pos = position[i / 2 % 2];
                    if (j > pos || (a.window > 0 && j <= pos - a.window)) s[i] = -INFINITY;
                }
            }
            float shrink[2], from[2];
#pragma unroll
            for (int h = 0; h < 2; h++) {
                float top = m[h];
#pragma unroll
                for (int i = 0; i < BN / 8; i++)
                    top = fmaxf(top, fmaxf(s[4 * i + 2 * h], s[4 * i + 2 * h + 1]));
                top = quad_max(top);
                const float base = top == -INFINITY ? 0.f : top; // nothing visible yet
                shrink[h] = exp2_approx((m[h] - base) * scale[h]);
                from[h] = base * scale[h];
                m[h] = top;
                l[h] *= shrink[h];
            }
#pragma unroll
            for (int i = 0; i < BN / 2; i++) {
                s[i] = exp2_approx(s[i] * scale[i / 2 % 2] - from[i / 2 % 2]);
                l[i / 2 % 2] += s[i];
            }
            if (!first) {
                wgmma_wait<0>();
#pragma unroll
                for (int n = 0; n < N; n++) settle(o[n]);
                if (thread == 0) barrier_arrive(shared_at(&c->v_empty[before]));
#pragma unroll
                for (int n = 0; n < N; n++)
#pragma unroll
                    for (int i = 0; i < R; i++) o[n][i] *= shrink[i / 2 % 2];
            }
#pragma unroll
            for (int i = 0; i < BN / 4; i++) p[i] = pack2<TV>(s[2 * i], s[2 * i + 1]);
        }
        const uint32_t before = (count - 1) % kStages, parity_before = (count - 1) / kStages & 1;
        barrier_wait(shared_at(&c->v_full[before]), parity_before);
#pragma unroll
        for (int n = 0; n < N; n++) settle(o[n]);
        wgmma_fence();
        multiply_v<D, BN, TV, R, N>(o, p, v_at + before * TILE);
        wgmma_commit();
        wgmma_wait<0>();
#pragma unroll
        for (int n = 0; n < N; n++) settle(o[n]);
        if (thread == 0) barrier_arrive(shared_at(&c->v_empty[before]));

#pragma unroll
        for (int h = 0; h < 2; h++) {
            const int row = w.t.row0 + r0 + 8 * h;
            l[h] = quad_sum(l[h]);
            if (row >= w.t.n_rows) continue;
            const int head = w.g * a.ratio + row % a.ratio;
            if (a.sinks) {
                const float sink = a.bf16 ? to_f32(((const __nv_bfloat16 *)a.sinks)[head])
                                          : to_f32(((const __half *)a.sinks)[head]);
                l[h] += exp2_approx(sink * kLog2E - m[h] * scale[h]);
            }
            const float f = 1.f / l[h];
            const int64_t at =
                ((int64_t)(w.t.token0 + row / a.ratio) * a.n_heads + head) * D + column;
            uint16_t *out = (uint16_t *)a.out + at;
#pragma unroll
            for (int n = 0; n < N; n++)
#pragma unroll
                for (int i = 0; i < R / 4; i++) {
                    const float x = o[n][4 * i + 2 * h] * f, y = o[n][4 * i + 2 * h + 1] * f;
                    *(uint32_t *)(out + n * 128 + i * 8) =
                        a.bf16 ? pack2<__nv_bfloat16>(x, y) : pack2<__half>(x, y);
                }
        }
        asm volatile("bar.sync %0, 128;" ::"r"(2 + group) : "memory"); // q may be overwritten
    }
    if (group == 0) turn_wait(0); // what group 1 gave last
}

template <int D, typename TK, typename TV>
__global__ void __launch_bounds__(kThreads, 1) attend_prefill(const prefill_arguments a) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL // empty where the file is compiled for other architectures
    constexpr int BN = D == 256 ? 64 : 128, RAW = D == 256 ? 1 : 2;
    extern __shared__ __align__(1024) uint8_t memory[];
    control *c = (control *)(memory + a.raw_at + (a.raw_bytes ? RAW * a.raw_bytes : 0));
    const int group = threadIdx.x / 128, thread = threadIdx.x % 128;
    if (threadIdx.x == 0) {
        for (int i = 0; i < kStages; i++) {
            barrier_init(shared_at(&c->k_full[i]), a.k == KF_16 ? 1 : 128);
            barrier_init(shared_at(&c->v_full[i]), a.v == KF_16 ? 1 : 128);
            barrier_init(shared_at(&c->k_empty[i]), 2);
            barrier_init(shared_at(&c->v_empty[i]), 2);
            barrier_init(shared_at(&c->raw_full[0][i]), 1);
            barrier_init(shared_at(&c->raw_full[1][i]), 1);
        }
        barrier_init(shared_at(&c->landed), 1);
        fence_async_proxy();
    }
    __syncthreads();
    if (group == 0) {
        asm volatile("setmaxnreg.dec.sync.aligned.u32 88;");
        produce<D, BN, RAW>(a, memory, c, thread);
    } else {
        asm volatile("setmaxnreg.inc.sync.aligned.u32 208;");
        consume<D, TK, TV>(a, memory, c, group - 1, thread);
    }
#endif
}

template <int D, typename TK, typename TV> status launch(const attention_problem *p) {
    constexpr int BN = D == 256 ? 64 : 128, RAW = D == 256 ? 1 : 2;
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
    const bool k = a.k != KF_16, v = a.v != KF_16;
    a.raw_at = kRows * 2 * D + 2 * kStages * BN * 2 * D;
    a.raw_v_at = k ? BN * attention_row_bytes(a.k, D) : 0;
    a.raw_k_param_at = a.raw_v_at + (v ? BN * attention_row_bytes(a.v, D) : 0);
    a.raw_v_param_at = a.raw_k_param_at + BN * attention_param_bytes(a.k);
    a.raw_bytes = (int)div_up(a.raw_v_param_at + BN * attention_param_bytes(a.v), 128) * 128;
    const int bytes = a.raw_at + RAW * a.raw_bytes + (int)sizeof(control);
    const auto kernel = attend_prefill<D, TK, TV>;
    const cudaError_t e =
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
    if (e != cudaSuccess)
        return FAIL(ST_DEVICE, "attention_prefill, %d bytes: %s", bytes, cudaGetErrorString(e));
    kernel<<<p->n_sms, kThreads, bytes, p->stream>>>(a);
    return launched("attention_prefill");
}

template <int D> status launch_types(const attention_problem *p) {
    const bool bf16 = p->l.type == DT_BF16, k = bf16 && p->c.k == KF_16,
               v = bf16 && p->c.v == KF_16;
    if (k)
        return v ? launch<D, __nv_bfloat16, __nv_bfloat16>(p) : launch<D, __nv_bfloat16, __half>(p);
    return v ? launch<D, __half, __nv_bfloat16>(p) : launch<D, __half, __half>(p);
}

} // namespace

extern "C" status attention_prefill_sm90_launch(const attention_problem *p, bool, bool) {
    switch (p->l.head_dim) {
    case 64: return launch_types<64>(p);
    case 128: return launch_types<128>(p);
    default: return launch_types<256>(p);
    }
}
