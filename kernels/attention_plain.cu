// attention_plain.cu - step 1 of the ladder: one warp a token and query head, token after token. It
// reads any format, needs no plan, and is what the other variants are compared with on the device.
#include "attention_device.cuh"

#define ATTENTION_PLAIN_INSTANCES(X)                                                               \
    X(F16, 32) X(BF16, 32) X(F16, 64) X(F16, 128) X(F16, 256) X(BF16, 64) X(BF16, 128) X(BF16, 256)

namespace {

constexpr int kWarps = 4;

template <typename T> struct plain_arguments {
    T *out;         // [T, H D]
    const T *qkv;   // [T, (H + 2G) D]
    const T *sinks; // [H] or NULL
    const uint8_t *base;
    int64_t page_bytes;
    attention_layout layout;
    kv_format k, v;
    int first, n_tokens, n_heads, n_kv_heads, window;
    float scale;
    const int32_t *position, *token_seq, *page_start, *page;
};

// This lane's D / 32 neighbouring values of a token's row.
template <typename T, int D>
__device__ __forceinline__ void load_row(float *x, const uint8_t *codes, const uint8_t *params,
                                         kv_format f, int token, int lane) {
    constexpr int E = D / 32;
    const int row_bytes = row_bytes_of(f, D);
    const float s = f == KF_16    ? 1.f
                    : f == KF_FP8 ? __half2float(((const __half *)params)[token])
                                  : __low2float(((const __half2 *)params)[token]);
    const float m = f == KF_8 || f == KF_4 ? __high2float(((const __half2 *)params)[token]) : 0.f;
#pragma unroll
    for (int e = 0; e < E; e++) {
        const int d = lane * E + e;
        if (f == KF_16)
            x[e] = to_f32(*(const T *)(codes + code_at(row_bytes, token, 2 * d)));
        else if (f == KF_FP8)
            x[e] = e4m3_value(codes[code_at(row_bytes, token, d)]) * s;
        else if (f == KF_8)
            x[e] = (float)codes[code_at(row_bytes, token, d)] * s + m;
        else
            x[e] = (float)(codes[code_at(row_bytes, token, d / 2)] >> d % 2 * 4 & 15) * s + m;
    }
}

template <typename T, int D>
__global__ void __launch_bounds__(32 * kWarps) attend_plain(plain_arguments<T> a) {
    constexpr int E = D / 32;
    const int lane = threadIdx.x;
    const int64_t at = (int64_t)blockIdx.x * kWarps + threadIdx.y;
    const int t = a.first + (int)(at / a.n_heads), h = (int)(at % a.n_heads);
    if (t >= a.n_tokens) return;
    const int seq = a.token_seq[t];
    if (seq < 0) return;
    const int position = a.position[t], g = h / (a.n_heads / a.n_kv_heads);
    const int64_t row = (int64_t)t * (a.n_heads + 2 * a.n_kv_heads) + h;
    const float to_base2 = a.scale * kLog2E;
    float q[E], acc[E];
#pragma unroll
    for (int e = 0; e < E; e++) {
        q[e] = to_f32(a.qkv[row * D + lane * E + e]);
        acc[e] = 0.f;
    }
    float m = -INFINITY, l = 0.f;
    if (a.sinks) {
        m = to_f32(a.sinks[h]) * kLog2E;
        l = 1.f;
    }
    const int32_t *page = a.page + a.page_start[seq];
    const int lo = a.window > 0 ? max(0, position - a.window + 1) : 0;
    for (int j = lo; j <= position; j++) {
        const uint8_t *p = a.base + page[j / kPage] * a.page_bytes;
        const uint8_t *codes = p + g * a.layout.head_bytes;
        const uint8_t *params = p + a.layout.param_base + (int64_t)g * a.layout.param_bytes;
        float x[E], dot = 0.f;
        load_row<T, D>(x, codes, params, a.k, j % kPage, lane);
#pragma unroll
        for (int e = 0; e < E; e++) dot += q[e] * x[e];
        const float s = warp_sum(dot) * to_base2, m_next = fmaxf(m, s);
        const float shrink = exp2f(m - m_next), weight = exp2f(s - m_next);
        load_row<T, D>(x, codes + a.layout.v_code, params + a.layout.v_param, a.v, j % kPage, lane);
        l = l * shrink + weight;
#pragma unroll
        for (int e = 0; e < E; e++) acc[e] = acc[e] * shrink + weight * x[e];
        m = m_next;
    }
#pragma unroll
    for (int e = 0; e < E; e++)
        a.out[((int64_t)t * a.n_heads + h) * D + lane * E + e] = from_f32<T>(acc[e] / l);
}

template <dtype dt, int D> status launch(const attention_problem *p, int first, int end) {
    using T = typename element<dt>::type;
    const plain_arguments<T> a = {
        (T *)p->out,
        (const T *)p->qkv,
        (const T *)p->l.sinks,
        (const uint8_t *)p->c.base,
        p->c.page_bytes,
        p->layout,
        p->c.k,
        p->c.v,
        first,
        end,
        p->l.n_heads,
        p->l.n_kv_heads,
        p->l.window,
        p->l.scale,
        p->b.position,
        p->b.token_seq,
        p->b.page_start,
        p->b.page,
    };
    const int64_t rows = (int64_t)(end - first) * p->l.n_heads;
    attend_plain<T, D><<<(unsigned)div_up(rows, kWarps), dim3(32, kWarps), 0, p->stream>>>(a);
    return launched("attention_plain");
}

} // namespace

extern "C" status attention_plain_launch(const attention_problem *p, bool decode, bool prefill) {
    const int first = decode ? 0 : p->b.n_decodes, end = prefill ? p->b.n_tokens : p->b.n_decodes;
    if (end <= first) return ST_OK;
#define X(type_name, dim)                                                                          \
    if (p->l.type == DT_##type_name && p->l.head_dim == dim)                                       \
        return launch<DT_##type_name, dim>(p, first, end);
    ATTENTION_PLAIN_INSTANCES(X)
#undef X
    return FAIL(ST_UNSUPPORTED, "attention of %s, head_dim %d", dtype_text(p->l.type),
                p->l.head_dim);
}
