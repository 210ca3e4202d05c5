// attention_prefill_sm90.cu - prefill chunks straight from the paged cache, on Hopper.
//
// A block is four warpgroups: one brings K, one V and q, and two consume 64 query rows each.
// Stages of K [BN, D] and V [BN, D] are in the 128-byte swizzle: 16-bit pages are in that order
// already and are copied as they lie; codes are read into registers a block ahead and written in
// that order as fp16. Consumers run
//
//     S = Q K_j^T  |  O += P_{j-1} V_{j-1}      both in flight, then the softmax of S
//
// and take turns, so that one warpgroup's softmax runs under the other's products.
//
// Codes become values of fp16 on the way, exactly but for KV8's largest (ref_kv_quantize), so that
// the consumers' work is the same for all formats; for chunks of many rows attention_widen has
// written them out before, with the same bits. q of a bf16 model becomes fp16 where K is codes:
// exact for elements of 2^-14 to 65504, and to 2^-25 below.
#include "attention_codes.cuh"
#include "attention_prefill.cuh"
#include "attention_wgmma.cuh"

namespace {

constexpr int kThreads = 512, kStages = 2;

// Block memory: q [kQ], K stages, V stages, then this.
struct alignas(16) control {
    int position[2][kRows];
    tile_work work[2];
    uint64_t q_full[2], q_empty[2];
    uint64_t full[2][kStages], empty[2][kStages]; // of K, of V
    uint64_t landed;
};

// Where K and V come from: pages of 16 bits as they lie, or of codes, or of codes that have been
// written out at 16 bit, in order: each once instead of once for every 128 rows.
enum source_kind { PLAIN, CODES, WIDE };
template <source_kind> struct arguments : prefill_arguments {};
// One load after another less before the first copy.
template <> struct arguments<WIDE> : prefill_arguments {
    const attention_tile *tile;
    int n_tiles;
};
__device__ __forceinline__ int count_of(const arguments<WIDE> &a) { return a.n_tiles; }
__device__ __forceinline__ const attention_tile *tiles_of(const arguments<WIDE> &a) {
    return a.tile;
}

// Tokens of a block, and items whose q is in memory.
template <int D> constexpr int kBlock = D == 256 ? 64 : 128;
template <int D> constexpr int kQ = D == 256 ? 1 : 2;

template <int D> __device__ __forceinline__ control *control_of(uint8_t *memory) {
    return (control *)(memory + kQ<D> * kRows * 2 * D + 2 * kStages * kBlock<D> * 2 * D);
}
template <int N> __device__ __forceinline__ void group_sync(int id) {
    asm volatile("bar.sync %0, %1;" ::"r"(id), "n"(N) : "memory");
}
__device__ __forceinline__ void turn_wait(int group) {
    asm volatile("bar.sync %0, 256;" ::"r"(5 + group) : "memory");
}
__device__ __forceinline__ void turn_give(int group) {
    asm volatile("bar.arrive %0, 256;" ::"r"(5 + (group ^ 1)) : "memory");
}
// A load that stays where it stands: 32 registers of codes must not be under way any earlier.
__device__ __forceinline__ uint4 load_now(const void *p) {
    uint4 x;
    asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w)
                 : "l"(p)
                 : "memory");
    return x;
}

__device__ __forceinline__ uint4 load_shared(uint32_t at) {
    uint4 x;
    asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w)
                 : "r"(at)
                 : "memory");
    return x;
}
// 16 bytes, which do not come if not `any`: then they are zero.
__device__ __forceinline__ void copy_async_or_zero(uint32_t to, const void *from, bool any) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from),
                 "r"(any ? 16 : 0)
                 : "memory");
}

// A thread's share of a block [BN, D] of codes: pieces of 16 bytes. A thread keeps its place in the
// row and goes down the tokens, STEP at a time. Eight neighbours write to different banks: they
// have a piece of the eight tokens of a group, or, where a row is a line of 128 bytes, half the
// pieces of two tokens, so that a warp reads whole lines.
template <int D, kv_format F> struct share {
    static constexpr int BN = kBlock<D>, ROW = F == KF_4 ? D / 2 : D, PIECES = ROW / 16;
    static constexpr int DIMS = F == KF_4 ? 32 : 16; // of a piece
    static constexpr int STEP = 128 / PIECES, STEPS = BN / STEP;
    // A warp has TOKENS tokens a step; its lanes bring the parameters of all steps.
    static constexpr int TOKENS = PIECES == 16 ? 8 : 32 / PIECES;
    static constexpr int PARAMS = (TOKENS * STEPS + 31) / 32; // a lane
    int first, piece, own;                                    // `own` of the warp's of a step
    __device__ __forceinline__ explicit share(int thread)
        : first(PIECES == 8 ? thread % 2 + thread / 16 * 2
                            : thread / (8 * PIECES) * 8 + thread % 8),
          piece(PIECES == 8 ? thread / 2 % 8 : thread / 8 % PIECES),
          own(PIECES == 8   ? thread % 2 + thread % 32 / 16 * 2
              : PIECES == 2 ? thread % 32 / 16 * 8 + thread % 8
                            : thread % 8) {}
    // Of whose parameters a lane brings the first: the warp's tokens in order, so that the upper
    // half of a warp has those of the block's second page.
    __device__ __forceinline__ int token(int lane) const {
        return first - own + lane % TOKENS + lane / TOKENS % STEPS * STEP;
    }
};
template <int D> constexpr int kPieces = D == 256 ? 4 : 8; // under way to a thread at a time

// What is on its way to this thread: its pieces of a block, and parameters.
template <int D> struct in_flight {
    uint4 raw[kPieces<D>];
    uint32_t param[2];
};

// This thread's first codes and parameters in a page, of page 0.
struct source {
    const uint8_t *code, *param;
};
template <int D, kv_format F>
__device__ __forceinline__ source source_of(const prefill_arguments &a, int g, bool value,
                                            int thread) {
    using S = share<D, F>;
    const S at(thread);
    const int token = at.token(thread % 32) % kPage;
    return {a.base + (int64_t)g * a.layout.head_bytes + (value ? a.layout.v_code : 0) +
                code_at(S::ROW, at.first, at.piece * 16),
            a.base + a.layout.param_base + (int64_t)g * a.layout.param_bytes +
                (value ? a.layout.v_param : 0) + token * (F == KF_FP8 ? 2 : 4)};
}
// The same of another page: one instruction.
__device__ __forceinline__ const uint8_t *page_of(const uint8_t *p, int page, uint32_t bytes) {
    asm("mad.wide.u32 %0, %1, %2, %0;" : "+l"(p) : "r"(page), "r"(bytes));
    return p;
}
// page: as look_up has it.
template <int D, kv_format F>
__device__ __forceinline__ void read_block(in_flight<D> &x, const source &from, int page,
                                           uint32_t page_bytes, int part) {
    using S = share<D, F>;
    if (F == KF_16) return;
    constexpr int A_PAGE = kPage / S::STEP < S::STEPS ? kPage / S::STEP : S::STEPS;
    const uint8_t *code[2];
    for (int i = 0; i < 2; i++)
        code[i] = page_of(from.code, __shfl_sync(~0u, page, i * 16), page_bytes);
#pragma unroll
    for (int i = 0; i < S::STEPS && i < kPieces<D>; i++) {
        const int k = part * kPieces<D> + i;
        x.raw[i] = load_now(code[k / A_PAGE] + k % A_PAGE * S::STEP * S::ROW);
    }
    const uint8_t *param = page_of(from.param, page, page_bytes);
#pragma unroll
    for (int i = 0; i < S::PARAMS && part == 0; i++) {
        constexpr int NEXT = 32 / S::TOKENS * S::STEP;
        x.param[i] = F == KF_FP8 ? __ldg((const uint16_t *)param + i * NEXT)
                                 : __ldg((const uint32_t *)param + i * NEXT);
    }
}
template <int D, kv_format F, bool LARGE>
__device__ __forceinline__ void convert_pieces(uint32_t put, const in_flight<D> &x, int own,
                                               int part) {
    using S = share<D, F>;
    constexpr int N = S::STEPS < kPieces<D> ? S::STEPS : kPieces<D>;
    uint32_t param[S::PARAMS];
#pragma unroll
    for (int i = 0; i < S::PARAMS; i++) param[i] = multipliers_of<F, LARGE>(x.param[i]);
    asm volatile("" : "+r"(own)); // what follows from it is not kept from block to block
#pragma unroll
    for (int i = 0; i < N; i++) {
        const int k = part * N + i;
        const __half2 both = half2_of(__shfl_sync(
            ~0u, param[S::PARAMS > 1 ? k * S::TOKENS / 32 : 0], k * S::TOKENS % 32 + own));
        const __half2 s = __low2half2(both), m = __high2half2(both);
        const uint32_t w[4] = {x.raw[i].x, x.raw[i].y, x.raw[i].z, x.raw[i].w};
#pragma unroll
        for (int j = 0; j < S::DIMS / 8; j++) {
            uint4 y;
            if (F == KF_4) {
                y = eight_of<LARGE>(w[j], s, m);
            } else {
                const uint2 lo = four_of<F, LARGE>(w[2 * j % 4], s, m);
                const uint2 hi = four_of<F, LARGE>(w[(2 * j + 1) % 4], s, m);
                y = make_uint4(lo.x, lo.y, hi.x, hi.y);
            }
            store_shared((put ^ j * 16) + k * S::STEP * 2 * D, y);
        }
    }
}
// To the swizzle, this thread's first piece at `put`. Rows from n_valid on, which may be NaN,
// become zero.
template <int D, kv_format F>
__device__ __forceinline__ void convert(uint32_t put, int own, const in_flight<D> &x, int n_valid,
                                        int part) {
    using S = share<D, F>;
    constexpr int N = S::STEPS < kPieces<D> ? S::STEPS : kPieces<D>;
    bool large = is_large<F>(x.param[0]);
    if (S::PARAMS > 1) large = large || is_large<F>(x.param[1]);
    // Also where parameters may be of no token: they must not decide how others round.
    if (F != KF_FP8 && (n_valid < S::BN || __any_sync(~0u, large)))
        convert_pieces<D, F, true>(put, x, own, part);
    else
        convert_pieces<D, F, false>(put, x, own, part);
    if (n_valid < S::BN)
#pragma unroll 1
        for (int k = part * N; k < part * N + N; k++)
            for (int j = 0; j < S::DIMS / 8; j++)
                if (S(thread_anew() % 128).first + k * S::STEP >= n_valid)
                    store_shared((put ^ j * 16) + k * S::STEP * 2 * D, make_uint4(0, 0, 0, 0));
}

// --- Producers ----------------------------------------------------------------------------------

// Physical page of a block, the first in the lower half of a warp and the second in the upper one;
// past the end of the sequence the last one again. One load a lane, and not one value a warp: that
// would be waited for.
template <int BN, source_kind KIND>
__device__ __forceinline__ int look_up(const prefill_arguments &a, int page_at, int kv_len,
                                       int block) {
    constexpr int PAGES = BN / kPage;
    if (KIND == WIDE) return 0; // bring_pages knows
    const int page = block * PAGES + (PAGES > 1 ? thread_anew() / 16 % 2 : 0);
    return a.page[page_at + min(page, (int)((uint32_t)(kv_len - 1) / kPage))];
}

// Copies of a 16-bit block as it lies, by one thread.
template <int D>
__device__ __forceinline__ void copy_pages(const prefill_arguments &a, const tile_work &w,
                                           int block, const int (&id)[2], bool value, uint32_t to,
                                           uint32_t barrier) {
    constexpr int PAGES = kBlock<D> / kPage, BYTES = kPage * 2 * D;
    const int n_pages = min(PAGES, (w.t.kv_len + kPage - 1) / kPage - block * PAGES);
    barrier_expect(barrier, n_pages * BYTES);
#pragma unroll
    for (int i = 0; i < PAGES; i++)
        if (i < n_pages)
            copy_bulk(to + i * BYTES,
                      a.base + id[i] * a.page_bytes + w.g * a.layout.head_bytes +
                          (value ? a.layout.v_code : 0),
                      BYTES, barrier);
}

// 16 bytes of q as fp16 and in the order of the nibbles, where K is such.
__device__ __forceinline__ uint4 make_piece(const prefill_arguments &a, uint4 x) {
    uint32_t *word = (uint32_t *)&x;
    if (a.bf16 && a.k != KF_16)
#pragma unroll
        for (int e = 0; e < 4; e++) {
            const float2 y = __bfloat1622float2(*(const __nv_bfloat162 *)&word[e]);
            word[e] = pack2<__half>(y.x, y.y);
        }
    return a.k == KF_4 ? to_nibbles(x) : x;
}

// An item's q is on its way to its slot, once consumers have left it; positions and the item itself
// are there.
template <int D, source_kind KIND>
__device__ __forceinline__ void bring_rows(const arguments<KIND> &a, uint8_t *memory, control *c,
                                           int round) {
    constexpr int Q = kQ<D>, LANES = D / 8;
    const int slot = round % Q, thread = thread_anew() % 128, lane = thread % 32;
    const uint32_t full = shared_at(&c->q_full[slot]);
    const tile_work w = work_of<kBlock<D>>(a, item_of(round)); // anew: it takes many registers
    barrier_wait(shared_at(&c->q_empty[slot]), round / Q & 1 ^ 1);
    if (thread == 0) c->work[slot] = w;
    if (w.last >= w.first) {
        const int r0 = thread / 32 * 32, own = w.t.row0 + r0 + lane;
        const int own_at = own < w.t.n_rows
                               ? (w.t.token0 + own / a.ratio) * (a.n_heads + 2 * a.n_kv_heads) +
                                     w.g * a.ratio + own % a.ratio
                               : -1;
        c->position[slot][r0 + lane] = w.t.position + min(own, w.t.n_rows - 1) / a.ratio;
#pragma unroll 4
        for (int i = 0; i < LANES; i++) {
            const int row = i * (32 / LANES) + lane / LANES;
            const int at = __shfl_sync(~0u, own_at, row);
            copy_async_or_zero(shared_at(memory) + slot * kRows * 2 * D +
                                   code_at(2 * D, r0 + row, lane % LANES * 16),
                               (const uint4 *)a.qkv + (int64_t)max(at, 0) * LANES + lane % LANES,
                               at >= 0);
        }
    }
    copy_async_arrive(full); // when the copies have landed
    barrier_arrive(full);    // for what was written here
}

// A stage is written: every thread says so, or where there are codes a lane of each warp, since
// registers are few there.
template <source_kind KIND> constexpr int kArrivals = KIND == CODES ? 4 : 128;
template <source_kind KIND> __device__ __forceinline__ void arrive(uint32_t full, int thread) {
    if (KIND == CODES) __syncwarp();
    if (KIND != CODES || thread % 32 == 0) barrier_arrive(full);
}

// A 16-bit block, of V with zeros behind the end of the sequence.
template <int D, source_kind KIND>
__device__ __forceinline__ void
bring_pages(const prefill_arguments &a, const tile_work &w, control *c, int block, int page,
            bool value, uint32_t to, uint32_t full, uint32_t &n_landed, int thread) {
    constexpr int BN = kBlock<D>;
    const int wide = w.t.wide_at + block * (BN / kPage);
    const int id[2] = {KIND == WIDE ? wide : __shfl_sync(~0u, page, 0),
                       KIND == WIDE ? wide + 1 : __shfl_sync(~0u, page, 16)};
    const int n_valid = min(BN, w.t.kv_len - block * BN);
    const bool tail = value && n_valid < BN;
    if (thread == 0) copy_pages<D>(a, w, block, id, value, to, tail ? shared_at(&c->landed) : full);
    if (tail) {
        barrier_wait(shared_at(&c->landed), n_landed++ & 1);
        for (int i = n_valid * (D / 8) + thread; i < BN * (D / 8); i += 128)
            store_shared(to + code_at(2 * D, i / (D / 8), i % (D / 8) * 16),
                         make_uint4(0, 0, 0, 0));
        fence_async_proxy();
    }
    if (tail || thread >= 128 / kArrivals<KIND>) arrive<KIND>(full, thread);
}

// The stream of K or of V: blocks of all items in order through kStages stages. Pages are looked up
// two blocks ahead, codes and parameters read one ahead, across items. V's producer asks for the
// next item's q after an item's third block, when consumers have left the item before.
template <int D, kv_format F, source_kind KIND>
__device__ __forceinline__ void produce(const arguments<KIND> &a, uint8_t *memory, control *c,
                                        bool value) {
    using S = share<D, F>;
    constexpr int BN = kBlock<D>, TILE = BN * 2 * D;
    const uint32_t page_bytes = (uint32_t)a.page_bytes;
    const uint32_t stages =
        shared_at(memory) + kQ<D> * kRows * 2 * D + (value ? kStages * TILE : 0);
    const S at(thread_anew() % 128);
    const uint32_t put = stages + code_at(2 * D, at.first, at.piece * S::DIMS * 2);
    const int own = at.own;
    uint32_t count = 0, n_landed = 0;
    tile_work w = work_of<BN>(a, item_of(0)), next = {};
    // Where pages are looked up: `look` is in the item of kv_len and page_at.
    int look = w.first, kv_len = w.t.kv_len, page_at = w.t.page_at;
    int page = look_up<BN, KIND>(a, page_at, kv_len, look++);
    int ahead = look_up<BN, KIND>(a, page_at, kv_len, look++);
    if (value) bring_rows<D, KIND>(a, memory, c, 0);
    if (KIND == WIDE) wait_for_previous(); // for pages; q was there before that began
    source from = source_of<D, F>(a, w.g, value, thread_anew() % 128);
    in_flight<D> x;
    read_block<D, F>(x, from, page, page_bytes, 0);
    for (int round = 1; w.last >= w.first; round++) {
        for (int block = w.first; block <= w.last; block++, count++) {
            const uint32_t s = count % kStages, to = stages + s * TILE;
            const uint32_t full = shared_at(&c->full[value][s]);
            barrier_wait(shared_at(&c->empty[value][s]), count / kStages & 1 ^ 1);
            if (F == KF_16) {
                bring_pages<D, KIND>(a, w, c, block, page, value, to, full, n_landed,
                                     thread_anew() % 128);
            } else {
                const int n_valid = w.t.kv_len - block * BN;
                convert<D, F>(put + s * TILE, own, x, n_valid, 0);
                if (S::STEPS > kPieces<D>) {
                    read_block<D, F>(x, from, page, page_bytes, 1);
                    convert<D, F>(put + s * TILE, own, x, n_valid, 1);
                }
                fence_async_proxy();
                arrive<KIND>(full, thread_anew() % 128);
            }
            if (block == w.first) next = work_of<BN>(a, item_of(round));
            if (block == max(w.last - 1, w.first))
                look = next.first, kv_len = next.t.kv_len, page_at = next.t.page_at;
            if (w.first == w.last) ahead = look_up<BN, KIND>(a, page_at, kv_len, look++);
            if (value && block == (kQ<D> == 1 ? w.last : min(w.first + 2, w.last)))
                bring_rows<D, KIND>(a, memory, c, round);
            page = ahead;
            if (block == w.last) from = source_of<D, F>(a, next.g, value, thread_anew() % 128);
            read_block<D, F>(x, from, page, page_bytes, 0);
            ahead = look_up<BN, KIND>(a, page_at, kv_len, look++);
        }
        w = next;
    }
}

template <int D, source_kind KIND>
__device__ __forceinline__ void produce_any(const arguments<KIND> &a, uint8_t *memory, control *c,
                                            bool value) {
    if (KIND != CODES) return produce<D, KF_16, KIND>(a, memory, c, value);
    switch (value ? a.v : a.k) {
    case KF_16: return produce<D, KF_16, KIND>(a, memory, c, value);
    case KF_8: return produce<D, KF_8, KIND>(a, memory, c, value);
    case KF_4: return produce<D, KF_4, KIND>(a, memory, c, value);
    default: return produce<D, KF_FP8, KIND>(a, memory, c, value);
    }
}

// --- Consumers ----------------------------------------------------------------------------------

// The half of a matrix descriptor that moves with the address: 16-byte units.
__device__ __forceinline__ uint32_t place_of(uint32_t at) { return (at & 0x3ffff) >> 4; }
template <int D, int PANEL> __device__ __forceinline__ uint64_t matrix_at(uint32_t place) {
    return (uint64_t)(1u << 30 | (uint32_t)(16 * D >> 4)) << 32 |
           (place + ((uint32_t)(PANEL >> 4) << 16));
}

// s[64, BN] = q[64, D] K^T.
template <int D, int BN, typename TK>
__device__ __forceinline__ void multiply_k(float (&s)[BN / 2], uint32_t q, uint32_t k) {
#pragma unroll
    for (int i = 0; i < D / 16; i++) {
        const int at = (i / 4 * 1024 + i % 4 * 32) / 16;
        wgmma_rows<TK>(s, matrix_at<D, 16>(q + at), matrix_at<D, 16>(k + at), i > 0);
    }
}

// o[64, D] += p[64, BN] V, in pieces of 128 (or all 64) dims.
template <int D, int BN, typename TV, int R, int N>
__device__ __forceinline__ void multiply_v(float (&o)[N][R], const uint32_t (&p)[BN / 4],
                                           uint32_t v) {
#pragma unroll
    for (int i = 0; i < BN / 16; i++)
#pragma unroll
        for (int n = 0; n < N; n++)
            wgmma_columns<TV>(o[n], p + 4 * i, matrix_at<D, 1024>(v + i * 2 * D + n * 128), 1);
}

// Scores to weights, in place; true when rows' results so far must shrink. position: of the lane's
// first row.
template <int BN>
__device__ __forceinline__ bool weigh(float (&s)[BN / 2], row_state &r, float (&shrink)[2],
                                      float unit, const int *position, int token, int window,
                                      bool edge, int lane) {
    if (edge) hide<BN>(s, position, token, window, lane);
    const bool moved = raise_max<BN>(s, r, shrink, {unit, unit});
    const float from[2] = {reference_of(r.m[0]), reference_of(r.m[1])};
#pragma unroll
    for (int i = 0; i < BN / 8; i++)
#pragma unroll
        for (int h = 0; h < 2; h++) {
            float &x = s[4 * i + 2 * h], &y = s[4 * i + 2 * h + 1];
            x = exp2_approx(x * unit - from[h]), y = exp2_approx(y * unit - from[h]);
            r.l[h] += x + y;
        }
    return moved;
}

template <int R, int N> __device__ __forceinline__ void settle_all(float (&o)[N][R]) {
#pragma unroll
    for (int n = 0; n < N; n++) settle(o[n]);
}

// A group's rows of q as the product with K wants them.
template <int D>
__device__ __forceinline__ void make_rows(const prefill_arguments &a, uint32_t q_at, int thread) {
    if (!(a.bf16 && a.k != KF_16) && a.k != KF_4) return;
#pragma unroll 8
    for (int i = 0; i < D / 16; i++) {
        const uint32_t at = q_at + (i * 128 + thread) * 16;
        store_shared(at, make_piece(a, load_shared(at)));
    }
}

// One group's part of an item: its rows over blocks first .. last, into o and r. count: of blocks
// so far.
template <int D, typename TK, typename TV, int R, int N>
__device__ __forceinline__ void
attend(const prefill_arguments &a, control *c, int group, int thread, int slot, int first, int last,
       uint32_t q_place, uint32_t k_place, uint32_t &count, float (&o)[N][R], row_state &r) {
    constexpr int BN = kBlock<D>, TILE = BN * 2 * D / 16;
    const uint32_t v_place = k_place + kStages * TILE;
    const int lane = thread % 32, r0 = group * 64 + thread / 32 * 16;
    // Positions of this warpgroup's rows: of the first, of the last, and of this lane's two.
    const int *position = c->position[slot] + group * 64;
    const int p_first = __shfl_sync(~0u, position[0], 0);
    const int p_last = __shfl_sync(~0u, position[63], 0);
    float s[BN / 2], shrink[2];
    uint32_t p[BN / 4];
    for (int block = first; block <= last; block++, count++) {
        const uint32_t st = count % kStages, parity = count / kStages & 1;
        const uint32_t before = (count - 1) % kStages, parity_before = (count - 1) / kStages & 1;
        barrier_wait(shared_at(&c->full[0][st]), parity);
        turn_wait(group);
        settle(s);
        wgmma_fence();
        multiply_k<D, BN, TK>(s, q_place, k_place + st * TILE);
        wgmma_commit();
        if (block != first) {
            barrier_wait(shared_at(&c->full[1][before]), parity_before);
            multiply_v<D, BN, TV>(o, p, v_place + before * TILE);
            wgmma_commit();
            turn_give(group);
            wgmma_wait<1>();
        } else {
            turn_give(group);
            wgmma_wait<0>();
        }
        settle(s);
        if (thread == 0) barrier_arrive(shared_at(&c->empty[0][st]));
        const int token = block * BN;
        const bool edge = token + BN - 1 > p_first || (a.window > 0 && token <= p_last - a.window);
        const bool moved = weigh<BN>(s, r, shrink, a.scale, c->position[slot] + r0 + lane / 4,
                                     token, a.window, edge, lane);
        if (block != first) {
            wgmma_wait<0>();
            settle_all(o);
            if (thread == 0) barrier_arrive(shared_at(&c->empty[1][before]));
            if (moved)
#pragma unroll
                for (int n = 0; n < N; n++)
#pragma unroll
                    for (int i = 0; i < R; i++) o[n][i] *= shrink[i / 2 % 2];
        }
#pragma unroll
        for (int i = 0; i < BN / 4; i++) p[i] = pack2<TV>(s[2 * i], s[2 * i + 1]);
    }
    const uint32_t before = (count - 1) % kStages, parity_before = (count - 1) / kStages & 1;
    barrier_wait(shared_at(&c->full[1][before]), parity_before);
    settle_all(o);
    wgmma_fence();
    multiply_v<D, BN, TV>(o, p, v_place + before * TILE);
    wgmma_commit();
    group_sync<128>(3 + group); // all warps' products with q are done
    wgmma_wait<0>();
    settle_all(o);
    if (thread == 0) barrier_arrive(shared_at(&c->empty[1][before]));
}

template <int D, typename TK, typename TV, source_kind KIND>
__device__ __forceinline__ void consume(const prefill_arguments &a, uint8_t *memory, control *c,
                                        int group, int thread) {
    constexpr int R = D < 128 ? 32 : 64, N = D == 256 ? 2 : 1, Q = kQ<D>;
    const uint32_t k_place = place_of(shared_at(memory) + Q * kRows * 2 * D);
    const int lane = thread % 32, r0 = group * 64 + thread / 32 * 16;
    uint32_t count = 0;
    if (group == 1) turn_give(1); // group 0 begins
    for (int round = 0;; round++) {
        const int slot = round % Q;
        const uint32_t q_at = shared_at(memory) + (slot * kRows + group * 64) * 2 * D;
        barrier_wait(shared_at(&c->q_full[slot]), round / Q & 1);
        // The same in all lanes, which the compiler cannot see.
        const int first = __shfl_sync(~0u, c->work[slot].first, 0);
        const int last = __shfl_sync(~0u, c->work[slot].last, 0);
        if (last < first) break;
        if (KIND != PLAIN) make_rows<D>(a, q_at, thread);
        fence_async_proxy(); // of q
        if (KIND != PLAIN) group_sync<128>(3 + group);
        row_state r = {{-INFINITY, -INFINITY}, {0.f, 0.f}};
        float o[N][R];
#pragma unroll
        for (int n = 0; n < N; n++)
#pragma unroll
            for (int i = 0; i < R; i++) o[n][i] = 0.f;
        attend<D, TK, TV>(a, c, group, thread, slot, first, last, place_of(q_at), k_place, count, o,
                          r);
        store_rows<D>(a, c->work[slot], o, r, q_at + thread / 32 * 16 * 2 * D, r0, lane,
                      [&](uint4 &x) {
                          if (KIND != PLAIN && a.v == KF_4) x = from_nibbles(x);
                      });
        fence_async_proxy(); // q of a later item follows what was written and read here
        barrier_arrive(shared_at(&c->q_empty[slot]));
    }
    if (group == 0) turn_wait(0); // what group 1 gave last
}

template <int D, typename TK, typename TV, source_kind KIND>
__global__ void __launch_bounds__(kThreads, 1) attend_prefill(const arguments<KIND> a) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL // empty where the file is compiled for other architectures
    extern __shared__ __align__(1024) uint8_t memory[];
    control *c = control_of<D>(memory);
    const int group = __shfl_sync(~0u, (int)threadIdx.x / 128, 0), thread = threadIdx.x % 128;
    if (threadIdx.x == 0) {
        for (int i = 0; i < 2; i++) {
            barrier_init(shared_at(&c->q_full[i]), 256);
            barrier_init(shared_at(&c->q_empty[i]), 256);
        }
        for (int i = 0; i < kStages; i++) {
            // All warps of a producer, also where one copies: a warp that fell two uses of a stage
            // behind would take the phase of `empty` for one it has seen, and wait for ever.
            barrier_init(shared_at(&c->full[0][i]), kArrivals<KIND>);
            barrier_init(shared_at(&c->full[1][i]), kArrivals<KIND>);
            barrier_init(shared_at(&c->empty[0][i]), 2);
            barrier_init(shared_at(&c->empty[1][i]), 2);
        }
        barrier_init(shared_at(&c->landed), 1);
    }
    fence_async_proxy();
    __syncthreads();
    if (group < 2) {
        if (D == 256)
            asm volatile("setmaxnreg.dec.sync.aligned.u32 48;");
        else
            asm volatile("setmaxnreg.dec.sync.aligned.u32 56;");
        produce_any<D, KIND>(a, memory, c, group == 1);
    } else {
        if (D == 256)
            asm volatile("setmaxnreg.inc.sync.aligned.u32 208;");
        else
            asm volatile("setmaxnreg.inc.sync.aligned.u32 200;");
        consume<D, TK, TV, KIND>(a, memory, c, group - 2, thread);
    }
#endif
}

template <int D, typename TK, typename TV, source_kind KIND = CODES>
status launch(const attention_problem *p) {
    const int bytes =
        kQ<D> * kRows * 2 * D + 2 * kStages * kBlock<D> * 2 * D + (int)sizeof(control);
    const auto kernel = attend_prefill<D, TK, TV, KIND>;
    const cudaError_t e =
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
    if (e != cudaSuccess)
        return FAIL(ST_DEVICE, "attention_prefill, %d bytes: %s", bytes, cudaGetErrorString(e));
    arguments<KIND> a;
    (prefill_arguments &)a = prefill_arguments_of(p);
    if constexpr (KIND == WIDE) {
        a.tile = (const attention_tile *)((const uint8_t *)p->plan + p->counts.tiles_at);
        a.n_tiles = p->counts.n_wide;
    }
    const launch_config l(dim3((unsigned)p->n_sms), dim3(kThreads), (size_t)bytes, p->stream,
                          KIND == WIDE); // the others wait for nothing
    (void)cudaLaunchKernelEx(&l.config, kernel, a);
    return launched("attention_prefill");
}

template <int D> status launch_types(const attention_problem *p) {
    const bool k = p->c.k == KF_16, v = p->c.v == KF_16; // else codes, which become fp16
    const bool f16 = p->l.type == DT_F16;
    if (p->tiles == TILES_WIDE) return launch<D, __half, __half, WIDE>(p);
    if (k && v)
        return f16 ? launch<D, __half, __half, PLAIN>(p)
                   : launch<D, __nv_bfloat16, __nv_bfloat16, PLAIN>(p);
    if (f16 || !(k || v)) return launch<D, __half, __half>(p);
    return k ? launch<D, __nv_bfloat16, __half>(p) : launch<D, __half, __nv_bfloat16>(p);
}

} // namespace

extern "C" status attention_prefill_sm90_launch(const attention_problem *p, bool, bool) {
    switch (p->l.head_dim) {
#ifndef ATTENTION_ONLY_128
    case 64: return launch_types<64>(p);
    case 256: return launch_types<256>(p);
#endif
    default: return launch_types<128>(p);
    }
}
