// norm.cu - one block a row, the row in registers: it is read once and written once, as codes too
// where the linear behind it takes 8 bits, or as the values of codes.
//
// Over ranks a block first sends its row of `add` to all others, then adds theirs as they come: a
// pair of values and the number of the call in one word of 64 bits, so that no word has to wait for
// another. Inboxes have two halves in turn. A rank writes to a half for call c + 2 after it has had
// all of call c + 1, which the others sent when they were through with call c.
#include "norm.h"
#include "quantize.cuh"

#define NORM_INSTANCES(X) X(F16) X(BF16)

namespace {

constexpr int kThreadsMax = 1024;

__device__ __forceinline__ void send(ulonglong2 *to, const uint4 &v, uint32_t call) {
    const uint64_t tag = uint64_t{call} << 32;
    asm volatile("st.relaxed.sys.global.v2.u64 [%0], {%1, %2};" ::"l"(to), "l"(tag | v.x),
                 "l"(tag | v.y)
                 : "memory");
    asm volatile("st.relaxed.sys.global.v2.u64 [%0], {%1, %2};" ::"l"(to + 1), "l"(tag | v.z),
                 "l"(tag | v.w)
                 : "memory");
}

// Once all four words are of this call, or the others are gone.
__device__ __forceinline__ uint4 receive(const ulonglong2 *from, uint32_t call, const int *gone) {
    uint64_t a, b, c, d;
    for (uint32_t tries = 1;; tries++) {
        asm volatile("ld.relaxed.sys.global.v2.u64 {%0, %1}, [%2];"
                     : "=l"(a), "=l"(b)
                     : "l"(from)
                     : "memory");
        asm volatile("ld.relaxed.sys.global.v2.u64 {%0, %1}, [%2];"
                     : "=l"(c), "=l"(d)
                     : "l"(from + 1)
                     : "memory");
        const bool here = uint32_t(a >> 32) == call && uint32_t(b >> 32) == call &&
                          uint32_t(c >> 32) == call && uint32_t(d >> 32) == call;
        if (here) break;
        if (tries % 65536 == 0) { // now and then: this reads over the bus
            int left;
            asm volatile("ld.relaxed.sys.global.s32 %0, [%1];" : "=r"(left) : "l"(gone) : "memory");
            if (left) break;
        }
    }
    return {uint32_t(a), uint32_t(b), uint32_t(c), uint32_t(d)};
}

// Where rank `to` gets a row of rank `from`, in pairs of words.
__device__ __forceinline__ ulonglong2 *row_of(const norm_ranks &ranks, int to, int from, int row,
                                              uint32_t call) {
    const int64_t at = (int64_t{call & 1} * ranks.n + from) * NORM_RANK_ROWS + row;
    return static_cast<ulonglong2 *>(ranks.inbox[to]) + at * (ranks.cols_max / 4);
}

// A piece of 16 bytes as it was loaded. As elements (pack) the compiler would take it apart right
// behind its load, and whatever is asked for next would have to wait.
struct alignas(16) piece {
    uint32_t word[4];
};
template <typename T> __device__ __forceinline__ piece load_piece(const T *p) {
    const uint4 v = *reinterpret_cast<const uint4 *>(p);
    return {v.x, v.y, v.z, v.w};
}
template <typename T> __device__ __forceinline__ void store_piece(T *p, const piece &v) {
    *reinterpret_cast<uint4 *>(p) = make_uint4(v.word[0], v.word[1], v.word[2], v.word[3]);
}

// Piece `at` of a row: what was there and what all ranks add to it, in their order; `own` of this
// one.
template <typename T, bool RANKS>
__device__ __forceinline__ piece sum_of(const piece &there, const piece &own, int at, uint32_t call,
                                        const norm_ranks &ranks) {
    float2 sum[4] = {};
    for (int from = 0; from < (RANKS ? ranks.n : 1); from++) {
        piece a = own;
        if (RANKS && from != ranks.rank) {
            const ulonglong2 *inbox = row_of(ranks, ranks.rank, from, blockIdx.x, call) + at * 2;
            const uint4 v = receive(inbox, call, ranks.gone);
            a = {v.x, v.y, v.z, v.w};
        }
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const float2 x = pair_of<T>(a.word[i]);
            sum[i].x += x.x, sum[i].y += x.y;
        }
    }
    piece r;
#pragma unroll
    for (int i = 0; i < 4; i++) {
        const float2 x = pair_of<T>(there.word[i]);
        r.word[i] = pack2<T>(x.x + sum[i].x, x.y + sum[i].y);
    }
    return r;
}

template <typename T> __device__ __forceinline__ void add_squares(float2 &sum, const piece &r) {
#pragma unroll
    for (int i = 0; i < 4; i++) {
        const float2 x = pair_of<T>(r.word[i]);
        sum.x += x.x * x.x, sum.y += x.y * x.y;
    }
}

// A thread's pieces of a row.
template <int PACKS, typename T>
__device__ __forceinline__ void load_pieces(piece (&to)[PACKS], const T *from, int32_t cols) {
#pragma unroll
    for (int p = 0; p < PACKS; p++) {
        const int col = (p * (int)blockDim.x + (int)threadIdx.x) * 8;
        if (col < cols) to[p] = load_piece(from + col);
    }
}

// A piece of the row times its gain, in f32; y is that by the root's inverse.
struct product {
    float2 of[4];
};
template <typename T> __device__ __forceinline__ product times(const piece &r, const piece &gain) {
    product p;
#pragma unroll
    for (int i = 0; i < 4; i++) {
        const float2 x = pair_of<T>(r.word[i]), g = pair_of<T>(gain.word[i]);
        p.of[i] = make_float2(x.x * g.x, x.y * g.y);
    }
    return p;
}
template <typename T> __device__ __forceinline__ piece scaled(const product &p, float scale) {
    piece y;
#pragma unroll
    for (int i = 0; i < 4; i++) y.word[i] = pack2<T>(p.of[i].x * scale, p.of[i].y * scale);
    return y;
}
__device__ __forceinline__ uint32_t largest(const product &p) { // bits of a magnitude
    uint32_t most = 0;
#pragma unroll
    for (int i = 0; i < 4; i++) {
        most = max(most, __float_as_uint(p.of[i].x) & 0x7fffffffu);
        most = max(most, __float_as_uint(p.of[i].y) & 0x7fffffffu);
    }
    return most;
}

// y of the block's row r, and codes of it, or y as their values, but for A16. Rounding keeps order,
// so the largest of y is the largest product's, and the block meets once for that and for the root.
// shared: 64 words.
template <act_format A, int PACKS, typename T>
__device__ __forceinline__ void
store_scaled(T *y, const piece (&r)[PACKS], float2 squares, const piece (&gain)[PACKS],
             int32_t cols, float per_col, float eps, const activation_codes &codes, float *shared) {
    product p[PACKS];
    uint32_t most = 0;
#pragma unroll
    for (int i = 0; i < PACKS; i++) {
        const int col = (i * (int)blockDim.x + (int)threadIdx.x) * 8;
        p[i] = {};
        if (col < cols) p[i] = times<T>(r[i], gain[i]);
        if (A != AF_16) most = max(most, largest(p[i]));
    }
    uint32_t *const warps = reinterpret_cast<uint32_t *>(shared) + 32;
    const int lane = (int)threadIdx.x % 32;
    if (A != AF_16) {
        most = __reduce_max_sync(~0u, most);
        if (lane == 0) warps[threadIdx.x / 32] = most;
    }
    const float sum = block_sum(squares.x + squares.y, shared);
    if (A != AF_16) most = __reduce_max_sync(~0u, lane < (int)blockDim.x / 32 ? warps[lane] : 0u);
    const float scale = rsqrtf(sum * per_col + eps);
    float s = 0;
    if constexpr (A != AF_16) {
        const T top = from_f32<T>(__uint_as_float(most) * scale);
        s = span_scale<T, A>(*reinterpret_cast<const uint16_t *>(&top));
        if (threadIdx.x == 0 && codes.code) codes.scale[blockIdx.x] = s;
    }
#pragma unroll
    for (int i = 0; i < PACKS; i++) {
        const int col = (i * (int)blockDim.x + (int)threadIdx.x) * 8;
        const piece v = scaled<T>(p[i], scale);
        if (A == AF_16 || codes.code) {
            if (col < cols) store_piece(y + col, v);
        }
        if constexpr (A != AF_16) {
            eight<T, A> e;
            *reinterpret_cast<piece *>(&e.x) = v;
            if (!codes.code) {
                if (col < cols) store_pack(y + col, e.values(s));
                continue;
            }
            uint2 c = e.codes(s);
            if (codes.atoms) c = in_atoms(c);
            uint8_t *to = static_cast<uint8_t *>(codes.code) + int64_t{blockIdx.x} * cols + col;
            if (col < cols) *reinterpret_cast<uint2 *>(to) = c;
        }
    }
}

// PACKS: pieces that a thread holds. 1 up to 8192 columns, which is every model here.
// RANKS: add is this rank's part. A: of the codes or values of y; 16 bits: none. per_col: 1 / cols.
template <typename T, int PACKS, bool RANKS, act_format A>
__global__ void __launch_bounds__(kThreadsMax)
    norm_add(T *y, T *residual, const T *add, const T *w, int32_t cols, float per_col, float eps,
             norm_ranks ranks, activation_codes codes) {
    __shared__ float shared[64];
    const int64_t row = int64_t{blockIdx.x} * cols;
    y += row, residual += row, add += row;
    asm volatile("" : "+l"(y), "+l"(residual), "+l"(add)); // lest they be worked out after the wait
    piece r[PACKS], gain[PACKS];
    float2 squares = {};
    load_pieces(gain, w, cols);
    follow_previous();
    uint32_t call = 0;
    if constexpr (RANKS) {
        call = ranks.calls[blockIdx.x] + 1;
#pragma unroll
        for (int p = 0; p < PACKS; p++) {
            const int at = p * (int)blockDim.x + (int)threadIdx.x;
            if (at * 8 >= cols) continue;
            const uint4 v = *reinterpret_cast<const uint4 *>(add + at * 8);
            for (int i = 1; i < ranks.n; i++) { // each begins with another one's inbox
                const int to = (ranks.rank + i) % ranks.n;
                send(row_of(ranks, to, ranks.rank, blockIdx.x, call) + at * 2, v, call);
            }
        }
    }
#pragma unroll
    for (int p = 0; p < PACKS; p++) {
        const int at = p * (int)blockDim.x + (int)threadIdx.x;
        if (at * 8 >= cols) continue;
        r[p] = load_piece(residual + at * 8);
        const piece own = load_piece(add + at * 8);
        r[p] = sum_of<T, RANKS>(r[p], own, at, call, ranks);
        store_piece(residual + at * 8, r[p]);
        add_squares<T>(squares, r[p]);
    }
    store_scaled<A>(y, r, squares, gain, cols, per_col, eps, codes, shared);
    if (RANKS && threadIdx.x == 0) ranks.calls[blockIdx.x] = call; // all have read it: block_sum
}

// The stream of a token is a row of the embedding.
template <typename T, int PACKS, act_format A>
__global__ void __launch_bounds__(kThreadsMax)
    norm_embed(T *y, T *residual, const T *table, const int32_t *token, const draw_result *drawn,
               const T *w, int32_t cols, float per_col, float eps, activation_codes codes) {
    __shared__ float shared[64];
    launch_dependents();
    int id = token[blockIdx.x];
    piece r[PACKS], gain[PACKS];
    float2 squares = {};
    load_pieces(gain, w, cols);
    if (id < 0) id = drawn[-1 - id].token;
    const T *from = table + int64_t{id} * cols;
    y += int64_t{blockIdx.x} * cols, residual += int64_t{blockIdx.x} * cols;
    load_pieces(r, from, cols);
#pragma unroll
    for (int p = 0; p < PACKS; p++) {
        const int col = (p * (int)blockDim.x + (int)threadIdx.x) * 8;
        if (col >= cols) continue;
        store_piece(residual + col, r[p]);
        add_squares<T>(squares, r[p]);
    }
    store_scaled<A>(y, r, squares, gain, cols, per_col, eps, codes, shared);
}

struct shape {
    int each, threads; // pieces of a thread
};
shape shape_of(int32_t cols) {
    const int packs = cols / 8;
    const int each = packs <= kThreadsMax ? 1 : packs <= 2 * kThreadsMax ? 2 : 4;
    return {each, (packs + each * 32 - 1) / (each * 32) * 32};
}

// Of more rows a block has an SM for itself: where up to four come to one that is free before the
// others, their bytes go through it one after another. Fewer rows find SMs enough, and such blocks
// would keep the launch behind this one out of them.
constexpr int kRowsTogether = 16, kRowsApart = 64;

template <typename T, bool RANKS, act_format A>
status launch_add(void *y, void *residual, const void *add, const void *w, int64_t rows,
                  int32_t cols, float eps, const norm_ranks &ranks, const activation_codes &codes,
                  cudaStream_t s) {
    const shape of = shape_of(cols);
    auto *const kernel = of.each == 1            ? norm_add<T, 1, RANKS, A>
                         : RANKS || of.each == 2 ? norm_add<T, 2, RANKS, A>
                                                 : norm_add<T, 4, false, A>;
    const bool apart = !RANKS && rows > kRowsTogether && rows <= kRowsApart;
    return launch_clusters("norm_add", kernel, (unsigned)rows, of.threads, 1,
                           apart ? room_for_fewer(2) : 0, s, static_cast<T *>(y),
                           static_cast<T *>(residual), static_cast<const T *>(add),
                           static_cast<const T *>(w), cols, 1.f / (float)cols, eps, ranks, codes);
}

template <dtype dt, bool RANKS>
status launch(void *y, void *residual, const void *add, const void *w, int64_t rows, int32_t cols,
              float eps, const norm_ranks &ranks, const activation_codes &codes, cudaStream_t s) {
    using T = typename element<dt>::type;
    if constexpr (!RANKS) {
        if (codes.act == AF_INT8)
            return launch_add<T, false, AF_INT8>(y, residual, add, w, rows, cols, eps, ranks, codes,
                                                 s);
        if (codes.act == AF_FP8)
            return launch_add<T, false, AF_FP8>(y, residual, add, w, rows, cols, eps, ranks, codes,
                                                s);
    }
    return launch_add<T, RANKS, AF_16>(y, residual, add, w, rows, cols, eps, ranks, codes, s);
}

template <dtype dt, act_format A>
status launch_embed(void *y, void *residual, const void *table, const int32_t *token,
                    const draw_result *drawn, const void *w, int64_t rows, int32_t cols, float eps,
                    const activation_codes &codes, cudaStream_t s) {
    using T = typename element<dt>::type;
    const shape of = shape_of(cols);
    auto *const kernel = of.each == 1   ? norm_embed<T, 1, A>
                         : of.each == 2 ? norm_embed<T, 2, A>
                                        : norm_embed<T, 4, A>;
    kernel<<<(unsigned)rows, of.threads, 0, s>>>(
        static_cast<T *>(y), static_cast<T *>(residual), static_cast<const T *>(table), token,
        drawn, static_cast<const T *>(w), cols, 1.f / (float)cols, eps, codes);
    return launched("norm_embed");
}

status refuse_shape(const char *what, int64_t rows, int32_t cols) {
    if (rows < 0 || rows > INT32_MAX || cols <= 0 || cols % 8 || cols > 4 * 8 * kThreadsMax)
        return FAIL(ST_SHAPE, "%s [%lld, %d]", what, (long long)rows, cols);
    return ST_OK;
}

template <bool RANKS>
status launch_type(void *y, void *residual, const void *add, const void *w, int64_t rows,
                   int32_t cols, float eps, dtype type, const norm_ranks &ranks,
                   const activation_codes &codes, cudaStream_t s) {
    TRY(refuse_shape("norm_add", rows, cols));
    if (rows == 0) return ST_OK;
    switch (type) {
#define X(name)                                                                                    \
    case DT_##name:                                                                                \
        return launch<DT_##name, RANKS>(y, residual, add, w, rows, cols, eps, ranks, codes, s);
        NORM_INSTANCES(X)
#undef X
    default: return FAIL(ST_UNSUPPORTED, "norm_add: elements of %s", dtype_text(type));
    }
}

} // namespace

extern "C" status kernel_norm_add(void *y, void *residual, const void *add, const void *w,
                                  int64_t rows, int32_t cols, float eps, dtype type,
                                  const activation_codes *codes, kernel_stream stream) {
    return launch_type<false>(y, residual, add, w, rows, cols, eps, type, norm_ranks{},
                              codes ? *codes : activation_codes{}, stream);
}

extern "C" status kernel_norm_embed(void *y, void *residual, const void *table,
                                    const int32_t *token, const draw_result *drawn, const void *w,
                                    int64_t rows, int32_t cols, float eps, dtype type,
                                    const activation_codes *codes, kernel_stream stream) {
    TRY(refuse_shape("norm_embed", rows, cols));
    if (rows == 0) return ST_OK;
    const activation_codes to = codes ? *codes : activation_codes{};
    switch (type) {
#define X(name)                                                                                    \
    case DT_##name:                                                                                \
        return (to.act == AF_INT8  ? launch_embed<DT_##name, AF_INT8>                              \
                : to.act == AF_FP8 ? launch_embed<DT_##name, AF_FP8>                               \
                                   : launch_embed<DT_##name, AF_16>)(y, residual, table, token,    \
                                                                     drawn, w, rows, cols, eps,    \
                                                                     to, stream);
        NORM_INSTANCES(X)
#undef X
    default: return FAIL(ST_UNSUPPORTED, "norm_embed: elements of %s", dtype_text(type));
    }
}

extern "C" size_t norm_inbox_bytes(int32_t n_ranks, int32_t cols_max) {
    return sizeof(uint64_t) * 2 * (size_t)n_ranks * NORM_RANK_ROWS * (size_t)(cols_max / 2);
}

extern "C" status kernel_norm_add_ranks(void *y, void *residual, const void *add, const void *w,
                                        int64_t rows, int32_t cols, float eps, dtype type,
                                        const norm_ranks *ranks, kernel_stream stream) {
    if (rows > NORM_RANK_ROWS || cols > ranks->cols_max || cols > NORM_RANK_COLS)
        return FAIL(ST_SHAPE, "norm_add of %d ranks [%lld, %d]", ranks->n, (long long)rows, cols);
    return launch_type<true>(y, residual, add, w, rows, cols, eps, type, *ranks, activation_codes{},
                             stream);
}
