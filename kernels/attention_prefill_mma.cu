// attention_prefill_mma.cu - prefill chunks straight from the paged cache with mma.sync: the Ampere
// family, and whatever has no wgmma.
//
// A block takes an item of 128 rows, MT tiles of 16 rows a warp, and goes over the pages that they
// see. A page's 16-bit K and V are copied as they lie, by cp.async, into tiles [64, D] that
// ldmatrix reads without conflicts; codes are copied to a raw buffer a page ahead and all
// threads write the tiles from there. Where memory holds two tiles of what is 16-bit, those come a
// page ahead too; else, in time:
//
//     V_j starts | convert | S = Q K_j^T | K_{j+1} starts | softmax, O += P V_j
//
// Two blocks share an SM where its memory allows, and run under each other's waits.
//
// Codes become their values, which are numbers of fp16 by how they are quantised; q of a bf16 model
// is made fp16 as well, times a power of two of its row, which is exact. For chunks of many rows
// attention_widen has written those values out: they are copied like any cache of 16 bits, with the
// same result.
#include "attention_codes.cuh"
#include "attention_prefill.cuh"

namespace {

// Warps of a block; MT is the tiles of 16 rows a warp. A warp's two tiles share what it reads of K
// and V, but at D = 256 their results would not fit its registers; and where there are few items,
// halves of them are done sooner.
template <int D> constexpr int kWarps = D == 256 ? 8 : 4;
template <int D> constexpr int kTilesMost = D == 256 ? 1 : 2;
// Tokens whose scores a warp has at a time; all of a page's would not fit beside its results.
template <int D> constexpr int kTokens = D == 128 ? 32 : kPage;

struct mma_layout {
    int raw_k_at, raw_v_at, param_k_at, param_v_at; // raw codes and parameters, in block memory
    int facts_at, bytes;
    int turn_k, turn_v; // bytes from a page's tile to the next page's; 0: there is one tile
};

// Of an item's rows: the scale of their scores (over the power of two that q was multiplied by)
// and the position.
struct row_facts {
    float scale[kRows];
    int position[kRows];
};

// 16 bytes, or zeros.
__device__ __forceinline__ void copy_or_zero(uint32_t to, const void *from, bool exists) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from),
                 "r"(exists ? 16 : 0)
                 : "memory");
}
__device__ __forceinline__ void copies_wait() { asm volatile("cp.async.wait_all;" ::: "memory"); }

// A page's K or V as it lies; at 16 bit, rows of tokens from n_valid on become zero.
template <int D>
__device__ __forceinline__ void copy_page(const prefill_arguments &a, int page, int g, bool value,
                                          uint32_t to, uint32_t param_to, int n_valid) {
    constexpr int THREADS = 32 * kWarps<D>;
    const kv_format f = value ? a.v : a.k;
    const uint8_t *base = a.base + page * a.page_bytes;
    const uint8_t *code = base + g * a.layout.head_bytes + (value ? a.layout.v_code : 0);
    const int thread = thread_anew();
    if (f == KF_16) {
        constexpr int N = kPage * 2 * D / 16;
#pragma unroll 4
        for (int i = 0; i < N / THREADS; i++) {
            const int at = (i * THREADS + thread) * 16; // token: see attention_code_at
            const int token = at / (16 * D) * 8 + at % 1024 / 128;
            copy_or_zero(to + at, code + at, token < n_valid);
        }
        return;
    }
    const int n = kPage * row_bytes_of(f, D) / 16;
    for (int i = thread; i < n; i += THREADS) copy_async(to + i * 16, code + i * 16);
    const uint8_t *param = base + a.layout.param_base + (int64_t)g * a.layout.param_bytes +
                           (value ? a.layout.v_param : 0);
    if (thread < (f == KF_FP8 ? 2 : 4) * kPage / 16)
        copy_async(param_to + thread * 16, param + thread * 16);
}

// --- Codes to fp16 ------------------------------------------------------------------------------

// Raw codes of a page to the tile at `to`, 16 bytes a thread at a time; eight neighbours take the
// eight tokens of a group. Rows from n_valid on become zero.
template <int D, kv_format F>
__device__ __forceinline__ void convert_page(uint32_t to, const uint8_t *raw, const uint8_t *param,
                                             int n_valid) {
    constexpr int THREADS = 32 * kWarps<D>, ROW = F == KF_4 ? D / 2 : D, PIECES = ROW / 16;
    constexpr int DIMS = F == KF_4 ? 32 : 16;
#pragma unroll 2
    for (int i = thread_anew(); i < kPage * PIECES; i += THREADS) {
        const int token = i / (8 * PIECES) * 8 + i % 8, piece = i / 8 % PIECES;
        const uint4 x = *(const uint4 *)(raw + code_at(ROW, token, piece * 16));
        const uint32_t w[4] = {x.x, x.y, x.z, x.w};
        const uint32_t both =
            F == KF_FP8 ? ((const uint16_t *)param)[token] : ((const uint32_t *)param)[token];
        const __half2 s = __low2half2(half2_of(both)), m = __high2half2(half2_of(both));
#pragma unroll
        for (int j = 0; j < DIMS / 8; j++) {
            uint4 y;
            if (F == KF_4) {
                y = from_nibbles(eight_of<true>(w[j], s, m));
            } else {
                const uint2 lo = four_of<F, true>(w[2 * j % 4], s, m);
                const uint2 hi = four_of<F, true>(w[(2 * j + 1) % 4], s, m);
                y = make_uint4(lo.x, lo.y, hi.x, hi.y);
            }
            if (token >= n_valid) y = make_uint4(0, 0, 0, 0);
            store_shared(to + code_at(2 * D, token, piece * DIMS * 2 + j * 16), y);
        }
    }
}
template <int D>
__device__ __forceinline__ void convert_any(uint32_t to, const uint8_t *raw, const uint8_t *param,
                                            kv_format f, int n_valid) {
    if (f == KF_8)
        convert_page<D, KF_8>(to, raw, param, n_valid);
    else if (f == KF_4)
        convert_page<D, KF_4>(to, raw, param, n_valid);
    else if (f == KF_FP8)
        convert_page<D, KF_FP8>(to, raw, param, n_valid);
}

// --- Rows and products ---------------------------------------------------------------------------

// A warp's 16 rows of q, and what is kept of them.
template <int D, bool WIDE>
__device__ __forceinline__ void load_q(const prefill_arguments &a, const tile_work &w,
                                       uint32_t q_at, row_facts *facts, int r0, int lane) {
    constexpr int LANES = D / 8; // of a row
    const bool to_half = a.bf16 && (WIDE || a.k != KF_16);
    load_rows<D, 4>(a, w, q_at, facts->position + r0, r0, lane, [&](uint4 &x, int r) {
        float f = 1.f;
        uint32_t *word = (uint32_t *)&x;
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
            // The power of two that brings the largest to [2, 4): products stay far inside f32 and
            // fp16.
            if (amax > 1e-18f)
                f = __uint_as_float((255u << 23) - (__float_as_uint(amax) & 0x7f800000u));
#pragma unroll
            for (int e = 0; e < 4; e++) {
                const float2 y = __bfloat1622float2(*(const __nv_bfloat162 *)&word[e]);
                word[e] = pack2<__half>(y.x * f, y.y * f);
            }
        }
        if (lane % LANES == 0) facts->scale[r] = a.scale / f;
    });
}

// Scores of BN tokens to weights, in place; true when rows' results so far must shrink. `row`: the
// lane's first, of the item's.
template <int BN>
__device__ __forceinline__ bool weigh(float (&s)[BN / 2], row_state &r, float (&shrink)[2],
                                      const row_facts *facts, int row, int token, int window,
                                      bool edge, int lane) {
    if (edge) hide<BN>(s, facts->position + row, token, window, lane);
    const float scale[2] = {facts->scale[row], facts->scale[row + 8]};
    const bool moved = raise_max<BN>(s, r, shrink, scale);
    const float from[2] = {reference_of(r.m[0]), reference_of(r.m[1])};
#pragma unroll
    for (int i = 0; i < BN / 8; i++)
#pragma unroll
        for (int h = 0; h < 2; h++) {
            float &x = s[4 * i + 2 * h], &y = s[4 * i + 2 * h + 1];
            x = exp2_approx(x * scale[h] - from[h]);
            y = exp2_approx(y * scale[h] - from[h]);
            r.l[h] += x + y;
        }
    return moved;
}

// Where lane's row of an ldmatrix of four 8 x 8 matrices starts in a tile [., D]: rows 8 * (matrix
// & 1) and dims 8 * (matrix >> 1) on, or the other way round.
template <int D> __device__ __forceinline__ uint32_t matrix_row(int lane, bool rows_first) {
    const int matrix = lane / 8, r = rows_first ? matrix & 1 : matrix >> 1;
    return code_at(2 * D, r * 8 + lane % 8, (rows_first ? matrix >> 1 : matrix & 1) * 16);
}
// The same, 16 * i dims further on.
template <int D> __device__ __forceinline__ uint32_t dims_on(uint32_t at, int i) {
    return (at ^ i % 4 * 32) + i / 4 * 1024;
}

// s[MT][BN tokens] = q K^T
template <int D, int MT, int BN, typename T>
__device__ __forceinline__ void multiply_k(float (&s)[MT][BN / 2], uint32_t q_at, uint32_t k_at,
                                           bool bf16) {
    const int lane = thread_anew() % 32;
    const uint32_t q_row = q_at + matrix_row<D>(lane, true);
    const uint32_t k_row = k_at + matrix_row<D>(lane, false);
#pragma unroll
    for (int m = 0; m < MT; m++)
#pragma unroll
        for (int i = 0; i < BN / 2; i++) s[m][i] = 0.f;
#pragma unroll
    for (int i = 0; i < D / 16; i++) {
        uint32_t q[MT][4];
#pragma unroll
        for (int m = 0; m < MT; m++) load_matrices(q[m], dims_on<D>(q_row, i) + m * 32 * D);
#pragma unroll
        for (int n = 0; n < BN / 16; n++) {
            uint32_t k[4];
            load_matrices(k, dims_on<D>(k_row, i) + n * 32 * D);
#pragma unroll
            for (int j = 0; j < 2; j++)
#pragma unroll
                for (int m = 0; m < MT; m++)
                    mma_of<T>(*(float(*)[4]) & s[m][4 * (2 * n + j)], q[m][0], q[m][1], q[m][2],
                              q[m][3], k[2 * j], k[2 * j + 1], bf16);
        }
    }
}

// o[MT][D] += p V, p the weights in s.
template <int D, int MT, int BN, typename T>
__device__ __forceinline__ void multiply_v(float (&o)[MT][1][D / 2], const float (&s)[MT][BN / 2],
                                           uint32_t v_at, bool bf16) {
    const int lane = thread_anew() % 32;
    const uint32_t v_row = v_at + matrix_row<D>(lane, true);
#pragma unroll
    for (int i = 0; i < BN / 16; i++) {
        uint32_t p[MT][4];
#pragma unroll
        for (int m = 0; m < MT; m++)
#pragma unroll
            for (int e = 0; e < 4; e++)
                p[m][e] = pack2_of<T>(s[m][8 * i + 2 * e], s[m][8 * i + 2 * e + 1], bf16);
#pragma unroll
        for (int n = 0; n < D / 16; n++) {
            uint32_t v[4];
            load_matrices_turned(v, dims_on<D>(v_row, n) + i * 32 * D);
#pragma unroll
            for (int j = 0; j < 2; j++)
#pragma unroll
                for (int m = 0; m < MT; m++)
                    mma_of<T>(*(float(*)[4]) & o[m][0][4 * (2 * n + j)], p[m][0], p[m][1], p[m][2],
                              p[m][3], v[2 * j], v[2 * j + 1], bf16);
        }
    }
}

// A block's place in its pages, and the tiles of the one at hand.
struct page_turn {
    int block, now, next;            // of tokens; page numbers
    uint32_t k_at, v_at, k_to, v_to; // to: of the next page
};

// Tiles of a page: codes converted, and on their way what the next page needs and has room, or this
// one's 16-bit V.
template <int D>
__device__ __forceinline__ void open_page(const prefill_arguments &a, const mma_layout &at,
                                          uint8_t *memory, const tile_work &w, const page_turn &p) {
    const uint8_t *raw_k = memory + at.raw_k_at, *raw_v = memory + at.raw_v_at;
    const uint8_t *param_k = memory + at.param_k_at, *param_v = memory + at.param_v_at;
    const bool k16 = a.k == KF_16, v16 = a.v == KF_16, more = p.block < w.last;
    const int n_valid = min(kPage, w.t.kv_len - p.block * kPage);
    const int n_next = min(kPage, w.t.kv_len - (p.block + 1) * kPage);
    copies_wait();
    __syncthreads(); // this page has come, and nobody reads the last one any more
    if (at.turn_k && more) copy_page<D>(a, p.next, w.g, false, p.k_to, 0, n_next);
    if (at.turn_v) {
        if (more) copy_page<D>(a, p.next, w.g, true, p.v_to, 0, n_next);
    } else if (v16) {
        copy_page<D>(a, p.now, w.g, true, p.v_at, 0, n_valid);
    }
    if (k16 && v16) return;
    if (!k16) convert_any<D>(p.k_at, raw_k, param_k, a.k, n_valid);
    if (!v16) convert_any<D>(p.v_at, raw_v, param_v, a.v, n_valid);
    __syncthreads();
    if (!more) return;
    if (!k16) copy_page<D>(a, p.next, w.g, false, shared_at(raw_k), shared_at(param_k), 0);
    if (!v16) copy_page<D>(a, p.next, w.g, true, shared_at(raw_v), shared_at(param_v), 0);
}

// Item i of so many rows: the parts of a tile follow each other.
template <int ROWS>
__device__ __forceinline__ tile_work part_of(const prefill_arguments &a, int i) {
    constexpr int PARTS = kRows / ROWS;
    tile_work w = work_of<kPage>(a, i / PARTS);
    w.t.row0 += i % PARTS * ROWS;
    if (w.last < w.first) return w;
    const int end = min(w.t.row0 + ROWS, w.t.n_rows) - 1,
              p_first = w.t.position + w.t.row0 / a.ratio;
    w.last = max(w.first, (w.t.position + end / a.ratio) / kPage); // a part may have no rows
    if (a.window > 0) w.first = min(w.last, max(0, p_first - a.window + 1) / kPage);
    return w;
}

// o and r of this warp's rows over a page.
template <int D, int MT, typename T>
__device__ __forceinline__ void
attend_page(float (&o)[MT][1][D / 2], row_state (&r)[MT], const prefill_arguments &a,
            const mma_layout &at, uint8_t *memory, const tile_work &w, const page_turn &p) {
    constexpr int BN = kTokens<D>;
    const uint32_t q_all = shared_at(memory);
    const row_facts *facts = (const row_facts *)(memory + at.facts_at);
    const int lane = threadIdx.x % 32, r0 = threadIdx.x / 32 * MT * 16;
#pragma unroll 1
    for (int part = 0; part < kPage / BN; part++) {
        float s[MT][BN / 2];
        const uint32_t rows_on = part * BN * 2 * D;
        multiply_k<D, MT, BN, T>(s, q_all + r0 * 2 * D, p.k_at + rows_on, a.bf16 && a.k == KF_16);
        if (part == 0 && a.v == KF_16 && !at.turn_v) {
            copies_wait();
            __syncthreads(); // V has come
        }
        const int token = p.block * kPage + part * BN;
        const bool edge = token + BN - 1 > facts->position[r0] ||
                          (a.window > 0 && token <= facts->position[r0 + MT * 16 - 1] - a.window);
#pragma unroll
        for (int m = 0; m < MT; m++) {
            float shrink[2];
            if (weigh<BN>(s[m], r[m], shrink, facts, r0 + m * 16 + lane / 4, token, a.window, edge,
                          lane)) {
#pragma unroll
                for (int i = 0; i < D / 2; i++) o[m][0][i] *= shrink[i / 2 % 2];
            }
        }
        if (part == kPage / BN - 1 && a.k == KF_16 && !at.turn_k) {
            __syncthreads(); // K has been read
            if (p.block < w.last)
                copy_page<D>(a, p.next, w.g, false, p.k_at, 0,
                             min(kPage, w.t.kv_len - (p.block + 1) * kPage));
        }
        multiply_v<D, MT, BN, T>(o, s, p.v_at + rows_on, a.bf16 && a.v == KF_16);
    }
}

template <int D, int MT, typename T, bool WIDE>
__global__ void __launch_bounds__(32 * kWarps<D>, D == 256 ? 1 : 2)
    attend_prefill_mma(const prefill_arguments a, const mma_layout at) {
    constexpr int ROWS = 16 * MT * kWarps<D>;
    extern __shared__ __align__(1024) uint8_t memory[];
    const uint32_t q_all = shared_at(memory);
    row_facts *facts = (row_facts *)(memory + at.facts_at);
    tile_work *work = (tile_work *)(facts + 1);
    const bool k16 = a.k == KF_16, v16 = a.v == KF_16;
    const int lane = threadIdx.x % 32, r0 = threadIdx.x / 32 * MT * 16;
    for (int round = 0;; round++) {
        const tile_work w = part_of<ROWS>(a, item_of(round));
        if (w.last < w.first) break;
        if (threadIdx.x == 0) *work = w;
        const auto page_of = [&](int block) {
            return WIDE ? w.t.wide_at + block : a.page[w.t.page_at + block];
        };
        page_turn p = {w.first, 0, page_of(w.first), q_all + ROWS * 2 * D};
        p.k_to = p.k_at + at.turn_k;
        p.v_at = p.k_to + kPage * 2 * D;
        p.v_to = p.v_at + at.turn_v;
        const auto n_valid = [&](int block) { return min(kPage, w.t.kv_len - block * kPage); };
        const auto first_page = [&] {
            copy_page<D>(a, p.next, w.g, false, k16 ? p.k_at : q_all + at.raw_k_at,
                         q_all + at.param_k_at, n_valid(w.first));
            if (!v16 || at.turn_v)
                copy_page<D>(a, p.next, w.g, true, v16 ? p.v_at : q_all + at.raw_v_at,
                             q_all + at.param_v_at, n_valid(w.first));
        };
        if (!WIDE) first_page();
        float o[MT][1][D / 2];
        row_state r[MT];
#pragma unroll
        for (int m = 0; m < MT; m++) {
            load_q<D, WIDE>(a, w, q_all, facts, r0 + m * 16, lane);
#pragma unroll
            for (int h = 0; h < 2; h++) r[m].m[h] = -INFINITY, r[m].l[h] = 0.f;
#pragma unroll
            for (int i = 0; i < D / 2; i++) o[m][0][i] = 0.f;
        }
        if (WIDE) {
            wait_for_previous(); // for pages; q was there before that began
            first_page();
        }
        for (; p.block <= w.last; p.block++) {
            p.now = p.next;
            if (p.block < w.last) p.next = page_of(p.block + 1);
            open_page<D>(a, at, memory, w, p);
            attend_page<D, MT, T>(o, r, a, at, memory, w, p);
            const uint32_t k_at = p.k_at, v_at = p.v_at;
            p.k_at = p.k_to, p.v_at = p.v_to;
            p.k_to = k_at, p.v_to = v_at;
        }
#pragma unroll
        for (int m = 0; m < MT; m++)
            store_rows<D>(a, *work, o[m], r[m], q_all + (r0 + m * 16) * 2 * D, r0 + m * 16, lane,
                          [](uint4 &) {});
        __syncthreads(); // K and V tiles have been read by all
    }
}

// In block memory: q [rows, D], tiles of K, of V, raw codes, parameters, what rows and tokens need.
mma_layout layout_of(const attention_problem *p, int rows, bool ahead) {
    const int d = p->l.head_dim, tile = kPage * 2 * d;
    const kv_format k = p->c.k, v = p->c.v;
    mma_layout at;
    at.turn_k = ahead && k == KF_16 ? tile : 0;
    at.turn_v = ahead && v == KF_16 ? tile : 0;
    at.raw_k_at = rows * 2 * d + 2 * tile + at.turn_k + at.turn_v;
    at.raw_v_at = at.raw_k_at + (k == KF_16 ? 0 : kPage * attention_row_bytes(k, d));
    at.param_k_at = at.raw_v_at + (v == KF_16 ? 0 : kPage * attention_row_bytes(v, d));
    at.param_v_at = at.param_k_at + kPage * attention_param_bytes(k);
    at.facts_at = at.param_v_at + kPage * attention_param_bytes(v);
    at.bytes = at.facts_at + (int)sizeof(row_facts) + (int)sizeof(tile_work);
    return at;
}

// Blocks that an SM's memory holds; a block reserves a KB more. Two at D = 256 would have no
// registers.
int blocks_of(const attention_problem *p, const mma_layout &at) {
    const int most = p->l.head_dim == 256 ? 1 : 2, fit = p->shared_bytes_sm / (at.bytes + 1024);
    return fit < most ? fit : most;
}

template <int D, int MT, typename T, bool WIDE> status launch_rows(const attention_problem *p) {
    constexpr int ROWS = 16 * MT * kWarps<D>;
    mma_layout at = layout_of(p, ROWS, true);
    const mma_layout small = layout_of(p, ROWS, false);
    if (blocks_of(p, at) < blocks_of(p, small)) at = small;
    const auto kernel = attend_prefill_mma<D, MT, T, WIDE>;
    const cudaError_t e =
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, at.bytes);
    if (e != cudaSuccess)
        return FAIL(ST_DEVICE, "prefill_mma, %d bytes: %s", at.bytes, cudaGetErrorString(e));
    const launch_config l(dim3((unsigned)(p->n_sms * blocks_of(p, at))), dim3(32 * kWarps<D>),
                          (size_t)at.bytes, p->stream,
                          WIDE && early_launches()); // the others wait for nothing
    (void)cudaLaunchKernelEx(&l.config, kernel, prefill_arguments_of(p), at);
    return launched("prefill_mma");
}

template <int D, typename T, bool WIDE = false> status launch(const attention_problem *p) {
    // Items of whole tiles, as if all chunks were one; half ones where each block has one at most.
    const int64_t rows = (int64_t)p->b.n_tokens * p->l.n_heads;
    if (kTilesMost<D> == 2 && rows <= (int64_t)2 * kRows * p->n_sms)
        return launch_rows<D, 1, T, WIDE>(p);
    return launch_rows<D, kTilesMost<D>, T, WIDE>(p);
}

template <int D> status launch_types(const attention_problem *p) {
    const bool k = p->c.k == KF_16, v = p->c.v == KF_16; // else codes, which become fp16
    if (p->tiles == TILES_WIDE) return launch<D, __half, true>(p);
    if (p->l.type == DT_F16 || !(k || v)) return launch<D, __half>(p);
    return k && v ? launch<D, __nv_bfloat16>(p) : launch<D, either>(p);
}

} // namespace

extern "C" bool attention_prefill_mma_accepts(const attention_problem *p) {
    return p->l.head_dim >= 64 && blocks_of(p, layout_of(p, kRows, false)) > 0;
}

extern "C" status attention_prefill_mma_launch(const attention_problem *problem, bool, bool) {
    attention_problem p = *problem;
    if (p.tiles == TILES_WIDE) p.c = p.wide;
    switch (p.l.head_dim) {
#ifndef ATTENTION_ONLY_128
    case 64: return launch_types<64>(&p);
    case 256: return launch_types<256>(&p);
#endif
    default: return launch_types<128>(&p);
    }
}
