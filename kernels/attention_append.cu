// attention_append.cu - QK-norm, RoPE, quantisation and append in one pass: one warp a token and
// head, or of many tokens one warp several heads at a time.
//
// A lane holds D / 64 neighbours of each half of the head, so that both ends of a RoPE pair are its
// own. Where a row goes, its angles and the gains are constants of the step: they are read and
// worked out while the kernel before this one ends, which leaves one round through L2. Products and
// sums are rounded one by one, as the definition does: a fused multiply-add here would move codes
// that lie on a tie.
#include "attention_device.cuh"

#define ATTENTION_APPEND_INSTANCES(X)                                                              \
    X(F16, 32) X(BF16, 32) X(F16, 64) X(F16, 128) X(F16, 256) X(BF16, 64) X(BF16, 128) X(BF16, 256)

namespace {

constexpr int kWarps = 4;

// Of so many tokens blocks find SMs while the kernel before this one still runs: there they go
// through the code for nothing, so that it lies on the SM when they do so behind the wait.
constexpr int kEarlyTokens = 16;

// Neighbours of a lane where a warp has a row. At D = 32 there are values for 16 lanes, and the
// others repeat what these do: their sums count twice (64 E is the number of values a warp holds),
// their stores write the same.
template <int D> constexpr int each = D < 64 ? 1 : D / 64;

// Of so many tokens and more a lane has kMany neighbours, in loads of 16 bytes, and a warp
// kRowsAtOnce rows. A token has so many blocks of two warps that there are kManyBlocks in all, or
// one.
constexpr int kManyTokens = 128, kMany = 8, kManyWarps = 2, kManyBlocks = 2048;
template <int D> constexpr int kRowsAtOnce = 64 * kMany / D;
#if __CUDA_ARCH__ == 900 // blocks of an SM: 72 registers, or 80 where 72 would spill
constexpr int kManyAnSm = 14;
#else
constexpr int kManyAnSm = 12;
#endif
template <int D> __host__ __device__ constexpr int units_of(int n_heads, int n_kv_heads) {
    constexpr int rows = kRowsAtOnce<D>;
    return (n_heads + rows - 1) / rows + 2 * ((n_kv_heads + rows - 1) / rows);
}

// Lanes that a row's extremes lie in.
template <int D, int E> constexpr int lanes = E == each<D> ? 32 : D / 2 / E;

// A lane's part of a row, past L1: what is read before the wait is not what is read after it.
template <typename P> __device__ __forceinline__ P from_l2(const P *at) {
    static_assert(sizeof(P) == 2 || sizeof(P) == 4 || sizeof(P) == 8, "a load");
    P v;
    if constexpr (sizeof(P) == 2) {
        const unsigned short w = __ldcg((const unsigned short *)at);
        memcpy(&v, &w, 2);
    } else if constexpr (sizeof(P) == 4) {
        const uint32_t w = __ldcg((const uint32_t *)at);
        memcpy(&v, &w, 4);
    } else {
        const uint2 w = __ldcg((const uint2 *)at);
        memcpy(&v, &w, 8);
    }
    return v;
}

template <typename T> struct append_arguments {
    T *qkv;                   // [T, (H + 2G) D]
    const T *q_norm, *k_norm; // [D] or NULL
    const float *rope;        // [ctx, D / 2, 2]
    uint8_t *base;
    int64_t page_bytes;
    attention_layout layout;
    kv_format k, v;
    int n_tokens, n_heads, n_kv_heads;
    float eps;
    const int32_t *position, *token_seq, *page_start, *page;
};

// Floats as integers of the same order, for which a warp has one instruction, and back.
__device__ __forceinline__ int32_t in_order(float x) {
    const int32_t i = __float_as_int(x);
    return i ^ (i >> 31 & 0x7fffffff);
}
__device__ __forceinline__ float out_of_order(int32_t i) {
    return __int_as_float(i ^ (i >> 31 & 0x7fffffff));
}

// x / by, rounded as a division is (to 0 what would be subnormal), |x / by| < 2^127: without its
// branches, so that a lane's quotients are worked out side by side.
struct divisor {
    float by, inverse; // inverse: to an ulp
};
__device__ __forceinline__ divisor divisor_of(float by) {
    float r;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(by));
    return {by, fmaf(fmaf(-by, r, 1.f), r, r)};
}
__device__ __forceinline__ float quotient(float x, const divisor &d) {
    float q = __fmul_rn(x, d.inverse);
    q = fmaf(fmaf(-d.by, q, x), d.inverse, q);
    return fmaf(fmaf(-d.by, q, x), d.inverse, q);
}

__device__ __forceinline__ float clamp_f16(float x) { return fminf(fmaxf(x, -65504.f), 65504.f); }

// Parameters as ref_kv_quantize has them: x >= 0 up to the next number of so many bits, and lo to a
// multiple of the power of two in the scale, or of two of them.
__device__ __forceinline__ __half scale_up(float x, int bits) {
    const uint32_t below = (1u << (24 - bits)) - 1;
    return __float2half_rn(clamp_f16(__uint_as_float((__float_as_uint(x) + below) & ~below)));
}
__device__ __forceinline__ __half minimum_of(float lo, float scale, kv_format f) {
    const uint32_t power = (__float_as_uint(scale) & 0x7f800000u) + (f == KF_8 ? 1u << 23 : 0);
    const float unit = __uint_as_float(power), inverse = __uint_as_float((254u << 23) - power);
    const float n = floorf(__fadd_rn(__fmul_rn(lo, inverse), f == KF_8 ? 0.f : 0.5f));
    const bool near = scale > 0.f && fabsf(lo) < 2048 * unit;
    const float whole = near ? __fmul_rn(n, unit) : lo;
    return __float2half_rn(clamp_f16(whole));
}

// A code in the lowest byte: at 2^23 a float's steps are whole.
__device__ __forceinline__ uint32_t code_of(float x, float lo, const divisor &scale, float top) {
    const float q = quotient(__fsub_rn(x, lo), scale);
    return __float_as_uint(__fadd_rn(fminf(fmaxf(q, 0.f), top), 0x1p23f));
}

// e4m3 of a finite x, to nearest even, saturating. The fp16-like steps are done in f32 integers.
__device__ __forceinline__ uint32_t e4m3_code(float x) {
    const uint32_t bits = __float_as_uint(x), sign = bits >> 31 << 7;
    const float a = fabsf(x);
    if (!(a < 464.f)) return sign | 0x7eu; // 464: halfway between 448 and the next step
    if (a < 0.015625f) return sign | (uint32_t)rintf(a * 512.f); // subnormal, in units of 2^-9
    const uint32_t m = bits & 0x7fffffffu;
    const uint32_t rounded = m + 0x7ffffu + (m >> 20 & 1u); // to 3 bits of mantissa
    return min(sign | ((rounded >> 20) - (120u << 3)), sign | 0x7eu);
}

// Two elements of 16 bits, the first in the lower half, as floats.
template <typename T> __device__ __forceinline__ float2 unpack2(uint32_t word);
template <> __device__ __forceinline__ float2 unpack2<__half>(uint32_t word) {
    return __half22float2(*reinterpret_cast<const __half2 *>(&word));
}
template <> __device__ __forceinline__ float2 unpack2<__nv_bfloat16>(uint32_t word) {
    return make_float2(__uint_as_float(word << 16), __uint_as_float(word & 0xffff0000u));
}
template <typename T> __device__ __forceinline__ void unpack8(float *x, const uint4 &words) {
    const uint32_t w[4] = {words.x, words.y, words.z, words.w};
#pragma unroll
    for (int i = 0; i < 4; i++) {
        const float2 two = unpack2<T>(w[i]);
        x[2 * i] = two.x, x[2 * i + 1] = two.y;
    }
}
template <typename T> __device__ __forceinline__ uint4 pack8(const float *x) {
    return make_uint4(pack2<T>(x[0], x[1]), pack2<T>(x[2], x[3]), pack2<T>(x[4], x[5]),
                      pack2<T>(x[6], x[7]));
}

// E neighbours: what a lane moves at a time.
template <typename T, int E> struct alignas(sizeof(T) * E) few { T v[E]; };

// Where a lane's part of one token's row goes: codes of both halves, and the row's parameters.
struct row_place {
    uint8_t *code[2];
    __half *param;
};

// code_at by shifts: row_bytes is a power of two, but not known here.
__device__ __forceinline__ int place_at(int row_bytes, int token, int at) {
    const int log = min(31 - __clz(row_bytes), 7), pieces = 1 << (log - 4), r = token % 8;
    const int turned = (at / 16 & (pieces - 1)) ^ (r >> (7 - log) & (pieces - 1));
    return token / 8 * 8 * row_bytes + (at >> log << (log + 3)) + (r << log) + turned * 16 +
           at % 16;
}

template <int D, int E>
__device__ __forceinline__ row_place place_row(uint8_t *codes, uint8_t *params, kv_format f,
                                               int token, int lane) {
    const int row_bytes = row_bytes_of(f, D);
    row_place p;
#pragma unroll
    for (int half = 0; half < 2; half++) {
        const int d = half * (D / 2) + lane * E;
        const int at = f == KF_16 ? 2 * d : f == KF_4 ? d / 2 : d;
        p.code[half] = codes + place_at(row_bytes, token, at);
    }
    p.param = (__half *)params + (f == KF_FP8 ? token : 2 * token);
    return p;
}

// The least and the largest of all lanes of a row.
template <int LANES> __device__ __forceinline__ void extremes(int32_t &least, int32_t &most) {
    if constexpr (LANES == 32) {
        least = __reduce_min_sync(~0u, least);
        most = __reduce_max_sync(~0u, most);
    } else {
#pragma unroll
        for (int d = LANES / 2; d > 0; d >>= 1) {
            least = min(least, __shfl_xor_sync(~0u, least, d));
            most = max(most, __shfl_xor_sync(~0u, most, d));
        }
    }
}

// Scale and minimum of a row in format F, of which this lane has n values; whether all are finite.
template <kv_format F, int LANES>
__device__ __forceinline__ bool row_params(__half &scale, __half &minimum, const float *x, int n) {
    int32_t least = in_order(x[0]), most = least;
#pragma unroll
    for (int e = 1; e < n; e++) {
        least = min(least, in_order(x[e]));
        most = max(most, in_order(x[e]));
    }
    extremes<LANES>(least, most);
    const float lo = out_of_order(least), hi = out_of_order(most);
    const bool finite = most < in_order(INFINITY) && least > in_order(-INFINITY); // NaN lies beyond
    // What is more than f16 holds is the most that it does.
    const float range = fminf(F == KF_FP8 ? fmaxf(fabsf(lo), fabsf(hi)) : __fsub_rn(hi, lo), 1e38f);
    constexpr float steps = F == KF_8 ? KV8_STEPS : F == KF_4 ? 15 : 448;
    constexpr int bits = F == KF_8 ? KV8_SCALE_BITS : F == KF_4 ? KV4_SCALE_BITS : KVFP8_SCALE_BITS;
    scale = scale_up(quotient(range, divisor{steps, 1.f / steps}), bits);
    minimum = minimum_of(lo, __half2float(scale), F);
    if (!finite) scale = minimum = __ushort_as_half(0x7e00);
    return finite;
}

// N codes, each in its word's lowest byte, as bytes.
template <int N> __device__ __forceinline__ few<uint8_t, N> bytes_of(const uint32_t *code) {
    few<uint8_t, N> part;
    if constexpr (N % 4 == 0) {
        uint32_t word[N / 4];
#pragma unroll
        for (int i = 0; i < N / 4; i++)
            word[i] = __byte_perm(__byte_perm(code[4 * i], code[4 * i + 1], 0x0040),
                                  __byte_perm(code[4 * i + 2], code[4 * i + 3], 0x0040), 0x5410);
        memcpy(&part, word, N);
    } else {
#pragma unroll
        for (int e = 0; e < N; e++) part.v[e] = (uint8_t)code[e];
    }
    return part;
}

// Write one token's row, or only find what it is: x[0..E) are dims at.., x[E..2E) dims at + D/2..,
// in format F.
template <kv_format F, typename T, int D, int E>
__device__ __forceinline__ void store_row(const row_place &p, int lane, const float *x,
                                          bool write) {
    if constexpr (F == KF_16) {
#pragma unroll
        for (int half = 0; half < 2; half++) {
            if constexpr (E == 8) {
                if (write) *(uint4 *)p.code[half] = pack8<T>(x + half * E);
            } else {
                few<T, E> part;
#pragma unroll
                for (int e = 0; e < E; e++) part.v[e] = from_f32<T>(x[half * E + e]);
                if (write) *(few<T, E> *)p.code[half] = part;
            }
        }
        return;
    }
    __half scale, minimum;
    const bool finite = row_params<F, lanes<D, E>>(scale, minimum, x, 2 * E);
    const float s = __half2float(scale), m = __half2float(minimum);
    const bool live = finite && s > 0.f;

    uint32_t code[2 * E];
    if constexpr (F == KF_FP8) {
#pragma unroll
        for (int e = 0; e < 2 * E; e++) code[e] = live ? e4m3_code(__fdiv_rn(x[e], s)) : 0u;
    } else {
        constexpr float top = F == KF_8 ? 255 : 15;
        const uint32_t mask = live ? ~0u : 0u;
        const divisor by_scale = divisor_of(s);
#pragma unroll
        for (int e = 0; e < 2 * E; e++) code[e] = code_of(x[e], m, by_scale, top) & mask;
    }
    if (!write) return;
#pragma unroll
    for (int half = 0; half < 2; half++) {
        if constexpr (F == KF_4 && E == 1) { // an even dim's lane takes its neighbour's nibble
            const uint32_t other = __shfl_down_sync(~0u, code[half], 1);
            if (lane % 2 == 0) *p.code[half] = (uint8_t)(code[half] | other << 4);
        } else if constexpr (F == KF_4) {
            uint32_t pair[E / 2];
#pragma unroll
            for (int e = 0; e + 1 < E; e += 2)
                pair[e / 2] = code[half * E + e] | code[half * E + e + 1] << 4;
            *(few<uint8_t, E / 2> *)p.code[half] = bytes_of<E / 2>(pair);
        } else {
            *(few<uint8_t, E> *)p.code[half] = bytes_of<E>(code + half * E);
        }
    }
    if (lane == 0) {
        if constexpr (F == KF_FP8)
            *p.param = scale;
        else
            *(__half2 *)p.param = __halves2half2(scale, minimum);
    }
}

// The sum of a row's squares, of which this lane has 2 E: added up in the same order whatever E is.
template <int D, int E> __device__ __forceinline__ float sum_of_squares(const float *x) {
    constexpr int S = each<D>, PARTS = E / S; // what PARTS lanes of a row a warp have
    float sum[PARTS];
#pragma unroll
    for (int p = 0; p < PARTS; p++) {
        sum[p] = 0.f;
#pragma unroll
        for (int half = 0; half < 2; half++)
#pragma unroll
            for (int e = 0; e < S; e++) {
                const float y = x[half * E + p * S + e];
                sum[p] += y * y;
            }
#pragma unroll
        for (int d = 16; d >= PARTS; d >>= 1) sum[p] += __shfl_xor_sync(~0u, sum[p], d / PARTS);
    }
#pragma unroll
    for (int d = PARTS / 2; d > 0; d >>= 1)
#pragma unroll
        for (int p = 0; p < d; p++) sum[p] += sum[p + d];
    return sum[0];
}

template <int D, int E> __device__ __forceinline__ float root_of(const float *x, float eps) {
    return 1.f / sqrtf(sum_of_squares<D, E>(x) / (64 * each<D>)+eps);
}

// RoPE of pairs x[e], x[E + e].
template <int E> __device__ __forceinline__ void turn_pairs(float *x, const few<float2, E> &turn) {
#pragma unroll
    for (int e = 0; e < E; e++) {
        const float2 t = turn.v[e];
        const float a = x[e], b = x[E + e];
        x[e] = __fsub_rn(__fmul_rn(a, t.x), __fmul_rn(b, t.y));
        x[E + e] = __fadd_rn(__fmul_rn(b, t.x), __fmul_rn(a, t.y));
    }
}

// Head norm, where there are gains, and RoPE in registers.
template <typename T, int D, int E>
__device__ __forceinline__ void norm_and_turn(float *x, bool normed, const few<T, E> *gain,
                                              float eps, const few<float2, E> &turn) {
    if (normed) {
        const float root = root_of<D, E>(x, eps);
#pragma unroll
        for (int i = 0; i < 2 * E; i++)
            x[i] = __fmul_rn(__fmul_rn(x[i], root), to_f32(gain[i / E].v[i % E]));
    }
    turn_pairs<E>(x, turn);
}

// F: the format of K and of V, so that code of no other stands between; KF_COUNT: each has its own.
template <typename T, int D, kv_format F>
__global__ void __launch_bounds__(32 * kWarps) rope_append(append_arguments<T> a) {
    constexpr int E = each<D>;
    using part = few<T, E>;
    const int lane = (int)threadIdx.x % (D / 2 / E), heads = a.n_heads + 2 * a.n_kv_heads;
    const int t = (int)(blockIdx.z * gridDim.y + blockIdx.y);
    const int h = (int)(blockIdx.x * kWarps + threadIdx.y);
    if (h >= heads || t >= a.n_tokens) return;
    launch_dependents();
    const int seq = a.token_seq[t], position = a.position[t]; // of padding, position is 0
    const bool is_q = h < a.n_heads, is_v = h >= a.n_heads + a.n_kv_heads;
    const T *norm = is_v ? nullptr : is_q ? a.q_norm : a.k_norm;
    part gain[2] = {};
    if (norm)
        for (int half = 0; half < 2; half++)
            gain[half] = *(const part *)(norm + half * (D / 2) + lane * E);
    few<float2, E> turn = {};
    if (!is_v)
        turn = *(const few<float2, E> *)((const float2 *)a.rope + (int64_t)position * (D / 2) +
                                         lane * E);
    // The page itself is asked for with the row: where blocks find no SM before the kernel before
    // this one ends, each read here delays that. The rest of the addresses is worked out now, as if
    // in page 0.
    const bool stored = !is_q && seq >= 0;
    const int32_t first_page = stored ? a.page_start[seq] : 0;
    T *row = a.qkv + ((int64_t)t * heads + h) * D + lane * E;
    asm volatile("" : "+l"(row)); // lest it be worked out after the wait
    const kv_format f = F != KF_COUNT ? F : is_v ? a.v : a.k;
    const int g = is_v ? h - a.n_heads - a.n_kv_heads : h - a.n_heads;
    uint8_t *codes = a.base + g * a.layout.head_bytes + (is_v ? a.layout.v_code : 0);
    uint8_t *params = a.base + a.layout.param_base + (int64_t)g * a.layout.param_bytes +
                      (is_v ? a.layout.v_param : 0);
    const row_place first = place_row<D, E>(codes, params, f, position % kPage, lane);
#pragma unroll 1
    for (int pass = a.n_tokens <= kEarlyTokens ? 0 : 1; pass < 2; pass++) {
        if (pass) {
            wait_for_previous();
            if (seq < 0) return;
        }
        part in[2];
#pragma unroll
        for (int half = 0; half < 2; half++)
            in[half] = from_l2((const part *)(row + half * (D / 2)));
        const int64_t page =
            stored ? a.page[first_page + position / kPage] * a.page_bytes : 0; // bytes from page 0
        float x[2 * E];
#pragma unroll
        for (int i = 0; i < 2 * E; i++) x[i] = to_f32(in[i / E].v[i % E]);
        if (!is_v) norm_and_turn<T, D, E>(x, norm != nullptr, gain, a.eps, turn);
        if (!is_q) {
            const row_place place = {{first.code[0] + page, first.code[1] + page},
                                     (__half *)((uint8_t *)first.param + page)};
            switch (f) {
#define KV(name, ...)                                                                              \
    case KF_##name:                                                                                \
        store_row<KF_##name, T, D, E>(place, lane, x, pass);                                       \
        break;
#include "precision.def"
            default: break;
            }
            continue;
        }
#pragma unroll
        for (int half = 0; half < 2; half++) {
            part out;
#pragma unroll
            for (int e = 0; e < E; e++) out.v[e] = from_f32<T>(x[half * E + e]);
            if (pass) *(part *)(row + half * (D / 2)) = out;
        }
    }
}

// Of a token's units, kRowsAtOnce<D> rows of q, of K or of V each: of unit u, the row that lane
// group `own` has.
struct unit_row {
    bool q, v, there; // there: the unit has such a row, else this is the last one
    int head;         // of q, K or V
    int at;           // in the token's row, in heads
};
template <int D, typename T>
__device__ __forceinline__ unit_row row_of(const append_arguments<T> &a, int u, int own) {
    constexpr int ROWS = kRowsAtOnce<D>;
    const int q = (a.n_heads + ROWS - 1) / ROWS, kv = (a.n_kv_heads + ROWS - 1) / ROWS;
    unit_row r;
    r.q = u < q;
    r.v = u >= q + kv;
    const int head = (u - (r.q ? 0 : r.v ? q + kv : q)) * ROWS + own;
    const int heads = r.q ? a.n_heads : a.n_kv_heads;
    r.there = head < heads;
    r.head = min(head, heads - 1);
    r.at = r.head + (r.q ? 0 : r.v ? a.n_heads + a.n_kv_heads : a.n_heads);
    return r;
}

// x of a row of K or V, to where it goes. page: in bytes from page 0.
template <typename T, int D, kv_format F>
__device__ __forceinline__ void append_row(const append_arguments<T> &a, const unit_row &r,
                                           int64_t page, int token, int lane, const float *x) {
    const kv_format f = F != KF_COUNT ? F : r.v ? a.v : a.k;
    uint8_t *codes = a.base + page + r.head * a.layout.head_bytes + (r.v ? a.layout.v_code : 0);
    uint8_t *params = a.base + page + a.layout.param_base + (int64_t)r.head * a.layout.param_bytes +
                      (r.v ? a.layout.v_param : 0);
    const row_place place = place_row<D, kMany>(codes, params, f, token, lane);
    switch (f) {
#define KV(name, ...)                                                                              \
    case KF_##name:                                                                                \
        store_row<KF_##name, T, D, kMany>(place, lane, x, r.there);                                \
        break;
#include "precision.def"
    default: break;
    }
}

// The same of many tokens: a warp has a unit of one token at a time, the next one under way. Bits
// are those of rope_append.
template <typename T, int D, kv_format F>
__global__ void __launch_bounds__(32 * kManyWarps, kManyAnSm)
    rope_append_many(append_arguments<T> a) {
    constexpr int E = kMany, LANES = D / 2 / E;
    const int lane = (int)threadIdx.x % LANES, own = (int)threadIdx.x / LANES;
    const int t = (int)(blockIdx.z * gridDim.y + blockIdx.y);
    if (t >= a.n_tokens) return;
    launch_dependents();
    const int seq = a.token_seq[t], position = a.position[t];
    const auto *rope = (const few<float2, E> *)a.rope;
    const few<float2, E> turn = rope[(int64_t)position * LANES + lane];
    const int first_page = seq < 0 ? 0 : a.page_start[seq];
    wait_for_previous();
    const int units = units_of<D>(a.n_heads, a.n_kv_heads), stride = (int)gridDim.x * kManyWarps;
    int u = (int)(blockIdx.x * kManyWarps + threadIdx.y);
    if (seq < 0 || u >= units) return;
    T *const first = a.qkv + (int64_t)t * (a.n_heads + 2 * a.n_kv_heads) * D + lane * E;
    uint4 next[2];
    const auto read = [&](const unit_row &r) {
        for (int half = 0; half < 2; half++)
            next[half] = __ldcg((const uint4 *)(first + r.at * D + half * (D / 2)));
    };
    read(row_of<D>(a, u, own));
    const int64_t page = a.page[first_page + position / kPage] * a.page_bytes;
#pragma unroll 1
    for (; u < units; u += stride) {
        const unit_row r = row_of<D>(a, u, own);
        float x[2 * E];
        unpack8<T>(x, next[0]);
        unpack8<T>(x + E, next[1]);
        if (u + stride < units) read(row_of<D>(a, u + stride, own));
        const T *norm = r.v ? nullptr : r.q ? a.q_norm : a.k_norm;
        if (norm) {
            const float root = root_of<D, E>(x, a.eps);
#pragma unroll
            for (int half = 0; half < 2; half++) {
                float gain[E];
                unpack8<T>(gain, __ldg((const uint4 *)(norm + half * (D / 2) + lane * E)));
#pragma unroll
                for (int e = half * E; e < half * E + E; e++)
                    x[e] = __fmul_rn(__fmul_rn(x[e], root), gain[e % E]);
            }
        }
        if (!r.v) turn_pairs<E>(x, turn);
        if (!r.q) {
            append_row<T, D, F>(a, r, page, position % kPage, lane, x);
            continue;
        }
        for (int half = 0; half < 2; half++)
            if (r.there) *(uint4 *)(first + r.at * D + half * (D / 2)) = pack8<T>(x + half * E);
    }
}

template <typename T, int D, kv_format F> auto kernel_of(bool many) {
    if constexpr (D >= 64)
        if (many) return rope_append_many<T, D, F>;
    return rope_append<T, D, F>;
}

template <dtype dt, int D>
status launch(void *qkv, const attention_layer_params *l, const attention_cache *c,
              const attention_batch *b, cudaStream_t stream) {
    using T = typename element<dt>::type;
    const append_arguments<T> a = {
        (T *)qkv,
        (const T *)l->q_norm,
        (const T *)l->k_norm,
        l->rope_cos_sin,
        (uint8_t *)c->base,
        c->page_bytes,
        attention_layout_of(c->k, c->v, l->n_kv_heads, D),
        c->k,
        c->v,
        b->n_tokens,
        l->n_heads,
        l->n_kv_heads,
        l->norm_eps,
        b->position,
        b->token_seq,
        b->page_start,
        b->page,
    };
    const bool many = D >= 64 && b->n_tokens >= kManyTokens;
    auto *kernel = kernel_of<T, D, KF_COUNT>(many);
    if (c->k == c->v) switch (c->k) {
#define KV(name, ...)                                                                              \
    case KF_##name:                                                                                \
        kernel = kernel_of<T, D, KF_##name>(many);                                                 \
        break;
#include "precision.def"
        default: break;
        }
    const unsigned tokens = (unsigned)b->n_tokens, most = 32768;
    const int heads = l->n_heads + 2 * l->n_kv_heads;
    const int64_t most_blocks = div_up(units_of<D>(l->n_heads, l->n_kv_heads), kManyWarps);
    const int64_t groups =
        many ? i64_min(most_blocks, div_up(kManyBlocks, b->n_tokens)) : div_up(heads, kWarps);
    const dim3 grid((unsigned)groups, tokens < most ? tokens : most, (tokens + most - 1) / most);
    return launch_early("rope_append", kernel, grid, dim3(32, many ? kManyWarps : kWarps), stream,
                        a);
}

} // namespace

extern "C" status kernel_rope_append(void *qkv, const attention_layer_params *l,
                                     const attention_cache *c, const attention_batch *b,
                                     kernel_stream stream) {
    if (b->n_tokens <= 0) return ST_OK;
#define X(type_name, dim)                                                                          \
    if (l->type == DT_##type_name && l->head_dim == dim)                                           \
        return launch<DT_##type_name, dim>(qkv, l, c, b, stream);
    ATTENTION_APPEND_INSTANCES(X)
#undef X
    return FAIL(ST_UNSUPPORTED, "rope_append of %s, head_dim %d", dtype_text(l->type), l->head_dim);
}
