// attention_prefill_sm90.cu - prefill chunks straight from the paged cache, on Hopper.
//
// A block is four warpgroups: one brings K, one V, both q, and two consume 64 query rows each.
// Stages of K [BN, D] and V [BN, D] are in the 128-byte swizzle: 16-bit pages are in that order
// already and are copied as they lie; codes are read into registers a block ahead and written in
// that order as fp16. Consumers run
//
//     S = Q K_j^T  |  O += P_{j-1} V_{j-1}      both in flight, then the softmax of S
//
// and take turns, so that one warpgroup's softmax runs under the other's products.
//
// Codes become values of fp16 on the way, exactly but for KV8's largest (ref_kv_quantize), so that
// the consumers' work is the same for all formats. q of a bf16 model becomes fp16 where K is codes:
// exact for elements of 2^-14 to 65504, and to 2^-25 below.
#include "attention_prefill.cuh"
#include "attention_wgmma.cuh"

namespace {

constexpr int kThreads = 512, kStages = 2;

// Block memory: q [kQ], K stages, V stages, then this.
struct alignas(16) control {
    int position[2][kRows];
    tile_work work[2];
    uint64_t q_full[2], q_empty[2];
    uint64_t k_full[kStages], v_full[kStages], k_empty[kStages], v_empty[kStages];
    uint64_t landed;
};

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
// `thread` where there are registers to keep what follows from it from block to block.
template <int D> __device__ __forceinline__ int thread_of(int thread) {
    return D == 256 ? thread_anew() % 128 : thread;
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

// --- Codes to fp16 ------------------------------------------------------------------------------

__device__ __forceinline__ __half2 half2_of(uint32_t x) {
    return *reinterpret_cast<const __half2 *>(&x);
}
__device__ __forceinline__ uint32_t bits_of(__half2 x) {
    return *reinterpret_cast<const uint32_t *>(&x);
}
// The two multipliers of a token's codes: scale and minimum as they are stored, or the minimum less
// 1024 scales for codes that come as 1024 + code. LARGE: of scales so large that this is no number
// of fp16.
template <kv_format F> __device__ __forceinline__ bool is_large(uint32_t param) {
    return F != KF_FP8 && !__hle(__low2half(half2_of(param)), __float2half(32.f));
}
template <kv_format F, bool LARGE>
__device__ __forceinline__ uint32_t multipliers_of(uint32_t param) {
    if (F == KF_FP8 || LARGE) return param;
    const __half2 x = half2_of(param);
    const __half s = __low2half(x);
    return bits_of(__halves2half2(s, __hfma(s, __float2half(-1024.f), __high2half(x))));
}
// Eight codes to 16 bytes of values: `lo` and `hi` are their bytes, or `lo` alone their nibbles.
// Nibbles of K come in the order 0 4 1 5 2 6 3 7, which q's elements take.
template <kv_format F, bool VALUE, bool LARGE>
__device__ __forceinline__ uint4 eight_of(uint32_t lo, uint32_t hi, __half2 s, __half2 m) {
    uint32_t x[4];
    if (F == KF_4 && VALUE) {
        const uint32_t even = lo & 0x0f0f0f0fu, odd = lo >> 4 & 0x0f0f0f0fu;
        lo = __byte_perm(even, odd, 0x5140), hi = __byte_perm(even, odd, 0x7362);
    }
#pragma unroll
    for (int i = 0; i < 4; i++) {
        const uint32_t w = i < 2 ? lo : hi;
        if (F == KF_FP8)
            asm("cvt.rn.f16x2.e4m3x2 %0, %1;" : "=r"(x[i]) : "h"((uint16_t)(w >> i % 2 * 16)));
        else if (F == KF_4 && !VALUE)
            x[i] = (lo >> 4 * i & 0x000f000fu) | 0x64006400u; // 1024 + code
        else
            x[i] = __byte_perm(w, 0x64u, i % 2 ? 0x4342 : 0x4140);
        const __half2 c =
            LARGE ? __hsub2(half2_of(x[i]), __float2half2_rn(1024.f)) : half2_of(x[i]);
        x[i] = bits_of(F == KF_FP8 ? __hmul2(c, s) : __hfma2(c, s, m));
    }
    return make_uint4(x[0], x[1], x[2], x[3]);
}
// 16 bytes to that order of nibbles.
__device__ __forceinline__ uint4 to_nibbles(uint4 x) {
    return make_uint4(__byte_perm(x.x, x.z, 0x5410), __byte_perm(x.x, x.z, 0x7632),
                      __byte_perm(x.y, x.w, 0x5410), __byte_perm(x.y, x.w, 0x7632));
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
    // Whose parameters come number i of the warp's.
    __device__ __forceinline__ int token_of(int i) const {
        return first - own + i % TOKENS + i / TOKENS % STEPS * STEP;
    }
};
template <int D> constexpr int kPieces = D == 256 ? 4 : 8; // under way to a thread at a time

// What is on its way to this thread: its pieces of a block, and parameters.
template <int D> struct in_flight {
    uint4 raw[kPieces<D>];
    uint32_t param[2];
};

// code: of the head in a block's first page and, `second` further on, in its second.
template <int D, kv_format F>
__device__ __forceinline__ void read_codes(uint4 (&raw)[kPieces<D>], const uint8_t *code,
                                           int64_t second, int part) {
    using S = share<D, F>;
    constexpr int A_PAGE = kPage / S::STEP < S::STEPS ? kPage / S::STEP : S::STEPS;
#pragma unroll
    for (int i = 0; i < S::STEPS && i < kPieces<D>; i++) {
        const int k = part * kPieces<D> + i;
        raw[i] = load_now(code + (k < A_PAGE ? 0 : second) + k % A_PAGE * S::STEP * S::ROW);
    }
}
template <int D, kv_format F, bool VALUE, bool LARGE>
__device__ __forceinline__ void convert_pieces(uint32_t put, const in_flight<D> &x, int own,
                                               int part) {
    using S = share<D, F>;
    constexpr int N = S::STEPS < kPieces<D> ? S::STEPS : kPieces<D>;
    uint32_t param[S::PARAMS];
#pragma unroll
    for (int i = 0; i < S::PARAMS; i++) param[i] = multipliers_of<F, LARGE>(x.param[i]);
#pragma unroll
    for (int i = 0; i < N; i++) {
        const int k = part * N + i;
        const __half2 both = half2_of(__shfl_sync(
            ~0u, param[S::PARAMS > 1 ? k * S::TOKENS / 32 : 0], (k * S::TOKENS + own) % 32));
        const __half2 s = __low2half2(both), m = __high2half2(both);
        const uint32_t w[4] = {x.raw[i].x, x.raw[i].y, x.raw[i].z, x.raw[i].w};
#pragma unroll
        for (int j = 0; j < S::DIMS / 8; j++)
            store_shared((put ^ j * 16) + k * S::STEP * 2 * D,
                         eight_of<F, VALUE, LARGE>(w[F == KF_4 ? j : 2 * j % 4],
                                                   w[F == KF_4 ? j : (2 * j + 1) % 4], s, m));
    }
}
// To the swizzle at `to`. Rows from n_valid on, which may be NaN, become zero.
template <int D, kv_format F, bool VALUE>
__device__ __forceinline__ void convert(uint32_t to, const in_flight<D> &x, int n_valid, int part,
                                        int thread) {
    using S = share<D, F>;
    const S at(thread_of<D>(thread));
    const uint32_t put = to + code_at(2 * D, at.first, at.piece * S::DIMS * 2);
    constexpr int N = S::STEPS < kPieces<D> ? S::STEPS : kPieces<D>;
    bool large = is_large<F>(x.param[0]);
    if (S::PARAMS > 1) large = large || is_large<F>(x.param[1]);
    // Also where parameters may be of no token: they must not decide how others round.
    if (F != KF_FP8 && (n_valid < S::BN || __any_sync(~0u, large)))
        convert_pieces<D, F, VALUE, true>(put, x, at.own, part);
    else
        convert_pieces<D, F, VALUE, false>(put, x, at.own, part);
    if (n_valid < S::BN)
#pragma unroll 1
        for (int k = part * N; k < part * N + N; k++)
            for (int j = 0; j < S::DIMS / 8 && at.first + k * S::STEP >= n_valid; j++)
                store_shared((put ^ j * 16) + k * S::STEP * 2 * D, make_uint4(0, 0, 0, 0));
}

// --- Producers ----------------------------------------------------------------------------------

// Physical page of a block, the first in even lanes and the second in odd ones; past the end of the
// sequence the last one again. One load a lane, and not one value a warp: that would be waited for.
template <int BN>
__device__ __forceinline__ int look_up(const prefill_arguments &a, const attention_tile &t,
                                       int block) {
    constexpr int PAGES = BN / kPage;
    const int page = block * PAGES + thread_anew() % PAGES;
    return a.page[t.page_at + min(page, (t.kv_len - 1) / kPage)];
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

// 64 rows of q of an item to its slot. CODES: as fp16 and in the order of the nibbles, where K is
// such.
template <int D, bool CODES>
__device__ __forceinline__ void load_q(const prefill_arguments &a, const tile_work &w,
                                       uint32_t q_at, int *position, int half, int thread) {
    const int lane = thread % 32, r0 = half * 64 + thread / 32 * 16;
    const auto make = [&](uint4 &x, int) {
        uint32_t *word = (uint32_t *)&x;
        if (CODES && a.bf16 && a.k != KF_16)
#pragma unroll
            for (int e = 0; e < 4; e++) {
                const float2 y = __bfloat1622float2(*(const __nv_bfloat162 *)&word[e]);
                word[e] = pack2<__half>(y.x, y.y);
            }
        if (CODES && a.k == KF_4) x = to_nibbles(x);
    };
    load_rows<D, D == 128 && !CODES ? 8 : 4>(a, w, q_at, position + r0, r0, lane, make);
}

// This producer's half of an item's q to its slot, and the item itself; false when there is none.
// Pages of its first two blocks are looked up meanwhile.
template <int D, bool CODES>
__device__ __forceinline__ bool fill_rows(const prefill_arguments &a, uint8_t *memory, control *c,
                                          int round, int half, int &page, int &ahead) {
    constexpr int Q = kQ<D>, BN = kBlock<D>;
    const int slot = round % Q, thread = thread_anew() % 128;
    const tile_work w = work_of<BN>(a, item_of(round));
    const bool any = w.last >= w.first;
    if (any) page = look_up<BN>(a, w.t, w.first), ahead = look_up<BN>(a, w.t, w.first + 1);
    barrier_wait(shared_at(&c->q_empty[slot]), round / Q & 1 ^ 1);
    if (half == 0 && thread == 0) c->work[slot] = w;
    if (any)
        load_q<D, CODES>(a, w, shared_at(memory) + slot * kRows * 2 * D, c->position[slot], half,
                         thread);
    fence_async_proxy();
    barrier_arrive(shared_at(&c->q_full[slot]));
    return any;
}

template <int D, kv_format F, bool VALUE>
__device__ __forceinline__ void read_block(in_flight<D> &x, const prefill_arguments &a, int g,
                                           const int (&id)[2], int part, int thread) {
    using S = share<D, F>;
    if (F == KF_16) return;
    const S at(thread_anew() % 128);
    read_codes<D, F>(x.raw,
                     a.base + id[0] * a.page_bytes + g * a.layout.head_bytes +
                         (VALUE ? a.layout.v_code : 0) + code_at(S::ROW, at.first, at.piece * 16),
                     (id[1] - id[0]) * a.page_bytes, part);
#pragma unroll
    for (int i = 0; i < S::PARAMS && part == 0; i++) {
        const int token = at.token_of(i * 32 + thread % 32);
        const uint8_t *p = a.base + (token < kPage ? id[0] : id[1]) * a.page_bytes +
                           a.layout.param_base + (int64_t)g * a.layout.param_bytes +
                           (VALUE ? a.layout.v_param : 0);
        x.param[i] = F == KF_FP8 ? __ldg((const uint16_t *)p + token % kPage)
                                 : __ldg((const uint32_t *)p + token % kPage);
    }
}

// A stage is written: every thread says so, or where there are codes a lane of each warp, since
// registers are few there.
template <bool CODES> constexpr int kArrivals = CODES ? 4 : 128;
template <bool CODES> __device__ __forceinline__ void arrive(uint32_t full, int thread) {
    if (CODES) __syncwarp();
    if (!CODES || thread % 32 == 0) barrier_arrive(full);
}

// A 16-bit block, of V with zeros behind the end of the sequence.
template <int D, bool VALUE, bool CODES>
__device__ __forceinline__ void bring_pages(const prefill_arguments &a, const tile_work &w,
                                            control *c, int block, const int (&id)[2], uint32_t to,
                                            uint32_t full, uint32_t &n_landed, int thread) {
    constexpr int BN = kBlock<D>;
    const int n_valid = min(BN, w.t.kv_len - block * BN);
    const bool tail = VALUE && n_valid < BN;
    if (thread == 0) copy_pages<D>(a, w, block, id, VALUE, to, tail ? shared_at(&c->landed) : full);
    if (tail) {
        barrier_wait(shared_at(&c->landed), n_landed++ & 1);
        for (int i = n_valid * (D / 8) + thread; i < BN * (D / 8); i += 128)
            store_shared(to + code_at(2 * D, i / (D / 8), i % (D / 8) * 16),
                         make_uint4(0, 0, 0, 0));
        fence_async_proxy();
    }
    if (tail || thread >= 128 / kArrivals<CODES>) arrive<CODES>(full, thread);
}

// The stream of K or of V, each with half of q before an item's first block: blocks in order
// through kStages stages. Pages are looked up two blocks ahead, codes and parameters read one
// ahead.
template <int D, kv_format F, bool VALUE, bool CODES>
__device__ __forceinline__ void produce(const prefill_arguments &a, uint8_t *memory, control *c,
                                        int thread) {
    using S = share<D, F>;
    constexpr int BN = kBlock<D>, TILE = BN * 2 * D;
    uint32_t count = 0, n_landed = 0;
    for (int round = 0;; round++) {
        int page = 0, ahead = 0; // on their way while q is brought
        if (!fill_rows<D, CODES>(a, memory, c, round, VALUE, page, ahead)) break;
        const tile_work w = work_of<BN>(a, item_of(round)); // anew: it takes many registers
        int id[2] = {__shfl_sync(~0u, page, 0), __shfl_sync(~0u, page, 1)};
        in_flight<D> x;
        read_block<D, F, VALUE>(x, a, w.g, id, 0, thread);
        for (int block = w.first; block <= w.last; block++, count++) {
            const uint32_t s = count % kStages;
            const uint32_t empty = shared_at(VALUE ? &c->v_empty[s] : &c->k_empty[s]);
            const uint32_t full = shared_at(VALUE ? &c->v_full[s] : &c->k_full[s]);
            const uint32_t to =
                shared_at(memory) + kQ<D> * kRows * 2 * D + (VALUE ? kStages * TILE : 0) + s * TILE;
            barrier_wait(empty, count / kStages & 1 ^ 1);
            if (F == KF_16) {
                bring_pages<D, VALUE, CODES>(a, w, c, block, id, to, full, n_landed, thread);
            } else {
                const int n_valid = w.t.kv_len - block * BN;
                convert<D, F, VALUE>(to, x, n_valid, 0, thread);
                if (S::STEPS > kPieces<D>) {
                    read_block<D, F, VALUE>(x, a, w.g, id, 1, thread);
                    convert<D, F, VALUE>(to, x, n_valid, 1, thread);
                }
                fence_async_proxy();
                arrive<CODES>(full, thread);
            }
            id[0] = __shfl_sync(~0u, ahead, 0), id[1] = __shfl_sync(~0u, ahead, 1);
            // After the last block for nothing: so that no register is kept for a block not read.
            read_block<D, F, VALUE>(x, a, w.g, id, 0, thread);
            ahead = look_up<BN>(a, w.t, block + 2);
        }
    }
}

template <int D, bool VALUE, bool CODES>
__device__ __forceinline__ void produce_any(const prefill_arguments &a, uint8_t *memory, control *c,
                                            int thread) {
    if (!CODES) return produce<D, KF_16, VALUE, CODES>(a, memory, c, thread);
    switch (VALUE ? a.v : a.k) {
    case KF_16: return produce<D, KF_16, VALUE, CODES>(a, memory, c, thread);
    case KF_8: return produce<D, KF_8, VALUE, CODES>(a, memory, c, thread);
    case KF_4: return produce<D, KF_4, VALUE, CODES>(a, memory, c, thread);
    default: return produce<D, KF_FP8, VALUE, CODES>(a, memory, c, thread);
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

template <int D, typename TK, typename TV, bool CODES>
__device__ __forceinline__ void consume(const prefill_arguments &a, uint8_t *memory, control *c,
                                        int group, int thread) {
    constexpr int BN = kBlock<D>, TILE = BN * 2 * D, R = D < 128 ? 32 : 64, N = D == 256 ? 2 : 1;
    constexpr int Q = kQ<D>;
    const uint32_t q_at = shared_at(memory) + group * 64 * 2 * D;
    const uint32_t k_place = place_of(shared_at(memory) + Q * kRows * 2 * D);
    const uint32_t v_place = k_place + kStages * TILE / 16;
    const int lane = thread % 32, r0 = group * 64 + thread / 32 * 16;
    uint32_t count = 0;
    if (group == 1) turn_give(1); // group 0 begins
    for (int round = 0;; round++) {
        const int slot = round % Q;
        barrier_wait(shared_at(&c->q_full[slot]), round / Q & 1);
        // The same in all lanes, which the compiler cannot see.
        const int first = __shfl_sync(~0u, c->work[slot].first, 0);
        const int last = __shfl_sync(~0u, c->work[slot].last, 0);
        if (last < first) break;
        const uint32_t q_place = place_of(q_at + slot * kRows * 2 * D);
        row_state r = {{-INFINITY, -INFINITY}, {0.f, 0.f}, {0.f, 0.f}};
        // Positions of this warpgroup's rows: of the first, of the last, and of this lane's two.
        const int *position = c->position[slot] + group * 64;
        const int p_first = __shfl_sync(~0u, position[0], 0);
        const int p_last = __shfl_sync(~0u, position[63], 0);
        float s[BN / 2], o[N][R], shrink[2];
        uint32_t p[BN / 4];
#pragma unroll
        for (int n = 0; n < N; n++)
#pragma unroll
            for (int i = 0; i < R; i++) o[n][i] = 0.f;
        for (int block = first; block <= last; block++, count++) {
            const uint32_t st = count % kStages, parity = count / kStages & 1;
            const uint32_t before = (count - 1) % kStages,
                           parity_before = (count - 1) / kStages & 1;
            barrier_wait(shared_at(&c->k_full[st]), parity);
            turn_wait(group);
            settle(s);
            wgmma_fence();
            multiply_k<D, BN, TK>(s, q_place, k_place + st * (TILE / 16));
            wgmma_commit();
            if (block != first) {
                barrier_wait(shared_at(&c->v_full[before]), parity_before);
                multiply_v<D, BN, TV>(o, p, v_place + before * (TILE / 16));
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
            const bool edge =
                token + BN - 1 > p_first || (a.window > 0 && token <= p_last - a.window);
            const bool moved = weigh<BN>(s, r, shrink, a.scale, c->position[slot] + r0 + lane / 4,
                                         token, a.window, edge, lane);
            if (block != first) {
                wgmma_wait<0>();
                settle_all(o);
                if (thread == 0) barrier_arrive(shared_at(&c->v_empty[before]));
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
        barrier_wait(shared_at(&c->v_full[before]), parity_before);
        settle_all(o);
        wgmma_fence();
        multiply_v<D, BN, TV>(o, p, v_place + before * (TILE / 16));
        wgmma_commit();
        group_sync<128>(3 + group); // all warps' products with q are done
        wgmma_wait<0>();
        settle_all(o);
        if (thread == 0) barrier_arrive(shared_at(&c->v_empty[before]));
        const auto sums = [&](int h) { return row_sums{quad_sum(r.l[h]), 0.f}; };
        store_rows<D>(a, c->work[slot], o, r,
                      q_at + slot * kRows * 2 * D + thread / 32 * 16 * 2 * D, r0, lane, 1.f, sums,
                      [](uint4 &) {});
        fence_async_proxy(); // q of a later item follows what was written and read here
        barrier_arrive(shared_at(&c->q_empty[slot]));
    }
    if (group == 0) turn_wait(0); // what group 1 gave last
}

template <int D, typename TK, typename TV, bool CODES>
__global__ void __launch_bounds__(kThreads, 1) attend_prefill(const prefill_arguments a) {
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
            barrier_init(shared_at(&c->k_full[i]), kArrivals<CODES>);
            barrier_init(shared_at(&c->v_full[i]), kArrivals<CODES>);
            barrier_init(shared_at(&c->k_empty[i]), 2);
            barrier_init(shared_at(&c->v_empty[i]), 2);
        }
        barrier_init(shared_at(&c->landed), 1);
    }
    fence_async_proxy();
    __syncthreads();
    if (group < 2) {
        if (D == 256)
            asm volatile("setmaxnreg.dec.sync.aligned.u32 40;");
        else
            asm volatile("setmaxnreg.dec.sync.aligned.u32 56;");
        if (group == 0)
            produce_any<D, false, CODES>(a, memory, c, thread);
        else
            produce_any<D, true, CODES>(a, memory, c, thread);
    } else {
        if (D == 256)
            asm volatile("setmaxnreg.inc.sync.aligned.u32 216;");
        else
            asm volatile("setmaxnreg.inc.sync.aligned.u32 200;");
        consume<D, TK, TV, CODES>(a, memory, c, group - 2, thread);
    }
#endif
}

template <int D, typename TK, typename TV, bool CODES = true>
status launch(const attention_problem *p) {
    const int bytes =
        kQ<D> * kRows * 2 * D + 2 * kStages * kBlock<D> * 2 * D + (int)sizeof(control);
    const auto kernel = attend_prefill<D, TK, TV, CODES>;
    const cudaError_t e =
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
    if (e != cudaSuccess)
        return FAIL(ST_DEVICE, "attention_prefill, %d bytes: %s", bytes, cudaGetErrorString(e));
    kernel<<<p->n_sms, kThreads, bytes, p->stream>>>(prefill_arguments_of(p));
    return launched("attention_prefill");
}

template <int D> status launch_types(const attention_problem *p) {
    const bool k = p->c.k == KF_16, v = p->c.v == KF_16; // else codes, which become fp16
    const bool f16 = p->l.type == DT_F16;
    if (k && v)
        return f16 ? launch<D, __half, __half, false>(p)
                   : launch<D, __nv_bfloat16, __nv_bfloat16, false>(p);
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
