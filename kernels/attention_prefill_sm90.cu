// attention_prefill_sm90.cu - prefill chunks straight from the paged cache, on Hopper.
//
// A block is four warpgroups: one brings K, one V, both q, and two consume 64 query rows each. Rows
// are heads of a group times tokens, so that one reading (and one conversion) of K and V serves all
// heads of the group. Stages of K [BN, D] and V [BN, D] are in the 128-byte swizzle: 16-bit pages
// are in that order already and are copied as they lie; codes are read into registers a block ahead
// and written in that order as fp16. Consumers run
//
//     S = Q K_j^T  |  O += P_{j-1} V_{j-1}      both in flight, then the softmax of S
//
// and take turns, so that one warpgroup's softmax runs under the other's products.
#include "attention_prefill.cuh"
#include "attention_wgmma.cuh"

namespace {

constexpr int kThreads = 512, kStages = 2;
constexpr int kColumnStages = 4; // of a block's parameters: read until its softmax is done

// Block memory: q [kQ], K stages, V stages, then this.
struct control {
    column_block column[kColumnStages];
    row_facts facts[2]; // by item
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
// threadIdx.x % 128, read anew.
__device__ __forceinline__ int group_thread() { return thread_anew() % 128; }

// A load that stays where it stands: 32 registers of codes must not be under way any earlier.
__device__ __forceinline__ uint4 load_now(const void *p) {
    uint4 x;
    asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w)
                 : "l"(p)
                 : "memory");
    return x;
}

// A thread's share of a block [BN, D] of codes: pieces of 16 bytes. A thread keeps its place in the
// row and goes down the tokens, STEP at a time; eight neighbours take the eight tokens of a group,
// whose pieces lie in different banks.
template <int D, kv_format F> struct share {
    static constexpr int BN = kBlock<D>, ROW = F == KF_4 ? D / 2 : D, PIECES = ROW / 16;
    static constexpr int DIMS = F == KF_4 ? 32 : 16; // of a piece
    static constexpr int STEP = 128 / PIECES, STEPS = BN / STEP;
    // Tokens of a warp: 8 of each step, of one group or two.
    static constexpr int GROUPS = PIECES < 4 ? 4 / PIECES : 1, PARAMS = GROUPS * STEPS / 4;
    int first, piece, lane;
    __device__ __forceinline__ explicit share(int thread)
        : first(thread / (8 * PIECES) * 8 + thread % 8), piece(thread / 8 % PIECES),
          lane(thread % 32) {}
    // Of parameters, lane l of the warp brings numbers l and l + 32; step k needs `number(k)`.
    __device__ __forceinline__ int number(int k) const {
        return lane / (32 / GROUPS) * (8 * STEPS) + 8 * k + lane % 8;
    }
    __device__ __forceinline__ int token_of(int i) const {
        return (first - first % (8 * GROUPS) + i / (8 * STEPS) * 8) + i / 8 % STEPS * STEP + i % 8;
    }
};
template <int D> constexpr int kPieces = D == 256 ? 4 : 8; // under way to a thread at a time

// What is on its way to this thread: its pieces of a block and its share of the parameters.
template <int D> struct in_flight {
    uint4 raw[kPieces<D>];
    uint32_t param[2];
};

// code, param: of the head in a block's first page and, `second` further on, in its second.
template <int D, kv_format F>
__device__ __forceinline__ void read_codes(uint4 (&raw)[kPieces<D>], const uint8_t *code,
                                           int64_t second, int part) {
    using S = share<D, F>;
    constexpr int A_PAGE = kPage / S::STEP < S::STEPS ? kPage / S::STEP : S::STEPS;
    const S at(group_thread());
    code += code_at(S::ROW, at.first, at.piece * 16);
#pragma unroll
    for (int i = 0; i < S::STEPS && i < kPieces<D>; i++) {
        const int k = part * kPieces<D> + i;
        raw[i] = load_now(code + (k < A_PAGE ? 0 : second) + k % A_PAGE * S::STEP * S::ROW);
    }
}
template <int D, kv_format F>
__device__ __forceinline__ void read_params(uint32_t (&param)[2], const uint8_t *from,
                                            int64_t second) {
    using S = share<D, F>;
    const S at(group_thread());
#pragma unroll
    for (int i = 0; i < S::PARAMS; i++) {
        const int token = at.token_of(i * 32 + at.lane);
        const uint8_t *p = from + (token < kPage ? 0 : second);
        param[i] = F == KF_FP8 ? __ldg((const uint16_t *)p + token % kPage)
                               : __ldg((const uint32_t *)p + token % kPage);
    }
}

// To the swizzle at `to`. Rows from n_valid on, which may be NaN, become zero.
template <int D, kv_format F, bool FOLD>
__device__ __forceinline__ void convert(uint32_t to, const in_flight<D> &x, int n_valid, int part) {
    using S = share<D, F>;
    const S at(group_thread());
    const uint32_t put = to + code_at(2 * D, at.first, at.piece * S::DIMS * 2);
    uint32_t both = 0, both_next = 0; // of step k, and asked for a step ahead
    constexpr int N = S::STEPS < kPieces<D> ? S::STEPS : kPieces<D>;
    if (!FOLD) both_next = __shfl_sync(~0u, x.param[part * N / 4], at.number(part * N) % 32);
#pragma unroll
    for (int i = 0; i < N; i++) {
        const int k = part * N + i;
        code_scale<FOLD> c;
        if (!FOLD) {
            both = both_next;
            if (i + 1 < N)
                both_next = __shfl_sync(~0u, x.param[S::PARAMS > 1 ? (k + 1) / 4 : 0],
                                        at.number(k + 1) % 32);
            c.s = __low2half2(*reinterpret_cast<const __half2 *>(&both));
            c.m = __high2half2(*reinterpret_cast<const __half2 *>(&both));
        }
        const uint32_t w[4] = {x.raw[i].x, x.raw[i].y, x.raw[i].z, x.raw[i].w};
#pragma unroll
        for (int j = 0; j < S::DIMS / 8; j++)
            store_shared((put ^ j * 16) + k * S::STEP * 2 * D,
                         F == KF_4 ? eight_of<F>(w[j], 0, c)
                                   : eight_of<F>(w[2 * j % 4], w[(2 * j + 1) % 4], c));
    }
    if (n_valid >= S::BN) return;
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
    const int page = block * PAGES + group_thread() % PAGES;
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

// This producer's half of an item's q to its slot, and the item itself.
template <int D, bool FOLD>
__device__ __forceinline__ void fill_rows(const prefill_arguments &a, uint8_t *memory, control *c,
                                          int round, int half) {
    constexpr int Q = kQ<D>;
    const int slot = round % Q, thread = group_thread();
    barrier_wait(shared_at(&c->q_empty[slot]), round / Q & 1 ^ 1);
    const tile_work w = work_of<kBlock<D>>(a, item_of(round));
    if (half == 0 && thread == 0) c->work[slot] = w;
    if (w.last >= w.first)
        load_rows<D, FOLD>(a, w, shared_at(memory) + slot * kRows * 2 * D, &c->facts[slot],
                           half * 64 + thread / 32 * 16, thread % 32);
    fence_async_proxy();
    barrier_arrive(shared_at(&c->q_full[slot]));
}

// FOLD: scale and minimum of K and of V of a block's token (0 for fp8; 1 and 0 at 16 bit).
__device__ __forceinline__ void read_token(uint32_t (&param)[2], const prefill_arguments &a, int g,
                                           const int (&id)[2], int token) {
#pragma unroll
    for (int value = 0; value < 2; value++) {
        const kv_format f = value ? a.v : a.k;
        const uint8_t *p = a.base + (token < kPage ? id[0] : id[1]) * a.page_bytes +
                           a.layout.param_base + (int64_t)g * a.layout.param_bytes +
                           (value ? a.layout.v_param : 0);
        param[value] = 0x3c00u;
        if (f == KF_FP8)
            param[value] = __ldg((const uint16_t *)p + token % kPage);
        else if (f != KF_16)
            param[value] = __ldg((const uint32_t *)p + token % kPage);
    }
}

template <int D, kv_format F, bool VALUE, bool FOLD>
__device__ __forceinline__ void read_block(in_flight<D> &x, const prefill_arguments &a, int g,
                                           const int (&id)[2], int part, int thread) {
    const uint8_t *page = a.base + id[0] * a.page_bytes;
    const int64_t second = (id[1] - id[0]) * a.page_bytes;
    if (F != KF_16) {
        read_codes<D, F>(x.raw, page + g * a.layout.head_bytes + (VALUE ? a.layout.v_code : 0),
                         second, part);
        if (!FOLD && part == 0)
            read_params<D, F>(x.param,
                              page + a.layout.param_base + (int64_t)g * a.layout.param_bytes +
                                  (VALUE ? a.layout.v_param : 0),
                              second);
    }
    if (FOLD && !VALUE && part == 0 && thread < kBlock<D>) read_token(x.param, a, g, id, thread);
}

// The stream of K or of V, each with half of q before an item's first block: blocks in order
// through kStages stages. Pages are looked up two blocks ahead, codes and parameters read one
// ahead.
template <int D, kv_format F, bool VALUE, bool FOLD>
__device__ __forceinline__ void produce(const prefill_arguments &a, uint8_t *memory, control *c,
                                        int thread) {
    constexpr int BN = kBlock<D>, TILE = BN * 2 * D;
    uint32_t count = 0, n_landed = 0;
    for (int round = 0;; round++) {
        fill_rows<D, FOLD>(a, memory, c, round, VALUE);
        const tile_work w = work_of<BN>(a, item_of(round));
        if (w.last < w.first) break;
        const int page = look_up<BN>(a, w.t, w.first);
        int ahead = look_up<BN>(a, w.t, w.first + 1);
        int id[2] = {__shfl_sync(~0u, page, 0), __shfl_sync(~0u, page, 1)};
        in_flight<D> x;
        read_block<D, F, VALUE, FOLD>(x, a, w.g, id, 0, thread);
        for (int block = w.first; block <= w.last; block++, count++) {
            const uint32_t s = count % kStages;
            const uint32_t empty = shared_at(VALUE ? &c->v_empty[s] : &c->k_empty[s]);
            const uint32_t full = shared_at(VALUE ? &c->v_full[s] : &c->k_full[s]);
            const uint32_t to =
                shared_at(memory) + kQ<D> * kRows * 2 * D + (VALUE ? kStages * TILE : 0) + s * TILE;
            const int n_valid = min(BN, w.t.kv_len - block * BN);
            barrier_wait(empty, count / kStages & 1 ^ 1);
            if (FOLD && !VALUE && thread < BN)
                write_column(&c->column[count % kColumnStages], a, thread, x.param[0], x.param[1],
                             thread < n_valid);
            if (F != KF_16) {
                convert<D, F, FOLD>(to, x, n_valid, 0);
                if (share<D, F>::STEPS > kPieces<D>) {
                    read_block<D, F, VALUE, FOLD>(x, a, w.g, id, 1, thread);
                    convert<D, F, FOLD>(to, x, n_valid, 1);
                }
                fence_async_proxy();
                barrier_arrive(full);
            } else if (!VALUE) {
                if (thread == 0)
                    copy_pages<D>(a, w, block, id, VALUE, to, full);
                else
                    barrier_arrive(full);
            } else {
                const bool tail = n_valid < BN;
                if (thread == 0)
                    copy_pages<D>(a, w, block, id, VALUE, to, tail ? shared_at(&c->landed) : full);
                if (tail) { // the end of the sequence: what lies behind it must become zero
                    barrier_wait(shared_at(&c->landed), n_landed++ & 1);
                    for (int i = n_valid * (D / 8) + thread; i < BN * (D / 8); i += 128)
                        store_shared(to + code_at(2 * D, i / (D / 8), i % (D / 8) * 16),
                                     make_uint4(0, 0, 0, 0));
                    fence_async_proxy();
                }
                if (tail || thread > 0) barrier_arrive(full);
            }
            id[0] = __shfl_sync(~0u, ahead, 0), id[1] = __shfl_sync(~0u, ahead, 1);
            if (block < w.last) read_block<D, F, VALUE, FOLD>(x, a, w.g, id, 0, thread);
            ahead = look_up<BN>(a, w.t, block + 2);
        }
    }
}

template <int D, bool VALUE, bool FOLD>
__device__ __forceinline__ void produce_any(const prefill_arguments &a, uint8_t *memory, control *c,
                                            int thread) {
    switch (VALUE ? a.v : a.k) {
    case KF_16: return produce<D, KF_16, VALUE, FOLD>(a, memory, c, thread);
    case KF_8: return produce<D, KF_8, VALUE, FOLD>(a, memory, c, thread);
    case KF_4: return produce<D, KF_4, VALUE, FOLD>(a, memory, c, thread);
    default: return produce<D, KF_FP8, VALUE, FOLD>(a, memory, c, thread);
    }
}

// --- Consumers ----------------------------------------------------------------------------------

// The half of a matrix descriptor that moves with the address: 16-byte units.
__device__ __forceinline__ uint32_t place_of(uint32_t at) { return (at & 0x3ffff) >> 4; }
template <int D, int PANEL> __device__ __forceinline__ uint64_t matrix_at(uint32_t place) {
    return (uint64_t)(1u << 30 | (uint32_t)(16 * D >> 4)) << 32 |
           (place + ((uint32_t)(PANEL >> 4) << 16));
}

// s[64, BN] = q[64, D] K^T
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

template <int D, typename TK, typename TV, bool FOLD>
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
        row_state r;
#pragma unroll
        for (int h = 0; h < 2; h++) {
            r.m[h] = -INFINITY, r.l[h] = r.z[h] = 0.f;
        }
        // Positions of this warpgroup's rows: of the first, of the last, and of this lane's two.
        const int *position = c->facts[slot].position + group * 64;
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
                multiply_v<D, BN, TV, R, N>(o, p, v_place + before * (TILE / 16));
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
            const bool moved =
                weigh<BN, FOLD>(s, r, shrink, columns_from(&c->column[count % kColumnStages], 0),
                                &c->facts[slot], r0 + lane / 4, token, a.window, edge, lane);
            if (block != first) {
                wgmma_wait<0>();
#pragma unroll
                for (int n = 0; n < N; n++) settle(o[n]);
                if (thread == 0) barrier_arrive(shared_at(&c->v_empty[before]));
                if (moved) {
#pragma unroll
                    for (int n = 0; n < N; n++)
#pragma unroll
                        for (int i = 0; i < R; i++) o[n][i] *= shrink[i / 2 % 2];
                }
            }
#pragma unroll
            for (int i = 0; i < BN / 4; i++) p[i] = pack2<TV>(s[2 * i], s[2 * i + 1]);
        }
        const uint32_t before = (count - 1) % kStages, parity_before = (count - 1) / kStages & 1;
        barrier_wait(shared_at(&c->v_full[before]), parity_before);
#pragma unroll
        for (int n = 0; n < N; n++) settle(o[n]);
        wgmma_fence();
        multiply_v<D, BN, TV, R, N>(o, p, v_place + before * (TILE / 16));
        wgmma_commit();
        group_sync<128>(3 + group); // all warps' products with q are done
        wgmma_wait<0>();
#pragma unroll
        for (int n = 0; n < N; n++) settle(o[n]);
        if (thread == 0) barrier_arrive(shared_at(&c->v_empty[before]));
        store_rows<D, R, N, FOLD>(a, c->work[slot], o, r,
                                  q_at + slot * kRows * 2 * D + thread / 32 * 16 * 2 * D, r0, lane);
        fence_async_proxy(); // q of a later item follows what was written and read here
        __syncwarp();
        if (lane == 0) barrier_arrive(shared_at(&c->q_empty[slot]));
    }
    if (group == 0) turn_wait(0); // what group 1 gave last
}

template <int D, typename TK, typename TV, bool FOLD>
__global__ void __launch_bounds__(kThreads, 1) attend_prefill(const prefill_arguments a) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL // empty where the file is compiled for other architectures
    extern __shared__ __align__(1024) uint8_t memory[];
    control *c = control_of<D>(memory);
    const int group = __shfl_sync(~0u, (int)threadIdx.x / 128, 0), thread = threadIdx.x % 128;
    if (threadIdx.x == 0) {
        for (int i = 0; i < 2; i++) {
            barrier_init(shared_at(&c->q_full[i]), 256);
            barrier_init(shared_at(&c->q_empty[i]), 8); // consumer warps
        }
        for (int i = 0; i < kStages; i++) {
            // All of a producer, also where one thread copies: a warp that fell two uses of a stage
            // behind would take the phase of `empty` for one it has seen, and wait for ever.
            barrier_init(shared_at(&c->k_full[i]), 128);
            barrier_init(shared_at(&c->v_full[i]), 128);
            barrier_init(shared_at(&c->k_empty[i]), 2);
            barrier_init(shared_at(&c->v_empty[i]), 2);
        }
        barrier_init(shared_at(&c->landed), 1);
        fence_async_proxy();
    }
    __syncthreads();
    if (group < 2) {
        if (D == 256)
            asm volatile("setmaxnreg.dec.sync.aligned.u32 48;");
        else
            asm volatile("setmaxnreg.dec.sync.aligned.u32 64;");
        if (group == 0)
            produce_any<D, false, FOLD>(a, memory, c, thread);
        else
            produce_any<D, true, FOLD>(a, memory, c, thread);
    } else {
        if (D == 256)
            asm volatile("setmaxnreg.inc.sync.aligned.u32 208;");
        else
            asm volatile("setmaxnreg.inc.sync.aligned.u32 192;");
        consume<D, TK, TV, FOLD>(a, memory, c, group - 2, thread);
    }
#endif
}

template <int D, typename TK, typename TV, bool FOLD = false>
status launch(const attention_problem *p) {
    const prefill_arguments a = prefill_arguments_of(p);
    const int bytes =
        kQ<D> * kRows * 2 * D + 2 * kStages * kBlock<D> * 2 * D + (int)sizeof(control);
    const auto kernel = attend_prefill<D, TK, TV, FOLD>;
    const cudaError_t e =
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
    if (e != cudaSuccess)
        return FAIL(ST_DEVICE, "attention_prefill, %d bytes: %s", bytes, cudaGetErrorString(e));
    kernel<<<p->n_sms, kThreads, bytes, p->stream>>>(a);
    return launched("attention_prefill");
}

template <int D> status launch_types(const attention_problem *p) {
    const bool k = p->c.k == KF_16, v = p->c.v == KF_16; // else codes, which become fp16
    if (p->l.type == DT_F16)
        return k && v ? launch<D, __half, __half>(p) : launch<D, __half, __half, true>(p);
    if (k)
        return v ? launch<D, __nv_bfloat16, __nv_bfloat16>(p) : launch<D, __nv_bfloat16, __half>(p);
    return v ? launch<D, __half, __nv_bfloat16>(p) : launch<D, __half, __half>(p);
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
