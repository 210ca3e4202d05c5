// attention_expand.cu - pages of a quantised cache written out at 16 bit: what comes before an
// attention that knows no other formats.
#include "attention_device.cuh"

#define ATTENTION_EXPAND_INSTANCES(X)                                                              \
    X(F16, 32) X(BF16, 32) X(F16, 64) X(F16, 128) X(F16, 256) X(BF16, 64) X(BF16, 128) X(BF16, 256)

namespace {

struct expand_arguments {
    uint8_t *to;
    const uint8_t *from;
    int64_t to_bytes, from_bytes; // of a page
    attention_layout to_layout, from_layout;
    kv_format k, v;
    const int32_t *page;
    int64_t n_pages;
    int n_kv_heads;
};

// Eight neighbours of a token's row, from `at` on.
template <typename T, int D>
__device__ __forceinline__ pack<T> values(const uint8_t *codes, const uint8_t *params, kv_format f,
                                          int token, int at) {
    if (f == KF_16)
        return load_pack(reinterpret_cast<const T *>(codes + code_at(2 * D, token, 2 * at)));
    const uint8_t *from =
        codes + (f == KF_4 ? code_at(D / 2, token, at / 2) : code_at(D, token, at));
    const float s = f == KF_FP8 ? __half2float(((const __half *)params)[token])
                                : __low2float(((const __half2 *)params)[token]);
    const float m = f == KF_FP8 ? 0.f : __high2float(((const __half2 *)params)[token]);
    const uint2 bits = f == KF_4 ? make_uint2(*(const uint32_t *)from, 0) : *(const uint2 *)from;
    pack<T> out;
#pragma unroll
    for (int e = 0; e < 8; e++) {
        const uint32_t eight = (e < 4 ? bits.x : bits.y) >> e % 4 * 8 & 255u;
        const float value = f == KF_FP8 ? e4m3_value(eight) * s
                            : f == KF_8 ? (float)eight * s + m
                                        : (float)(bits.x >> 4 * e & 15u) * s + m;
        out.v[e] = from_f32<T>(value);
    }
    return out;
}

// A thread eight values of K or V of a token and head; a block of pages at a time.
template <typename T, int D>
__global__ void __launch_bounds__(256) expand_pages(expand_arguments a) {
    constexpr int pieces = D / 8;
    const int of_page = 2 * a.n_kv_heads * kPage * pieces;
    for (int64_t p = blockIdx.x; p < a.n_pages; p += gridDim.x) {
        const int64_t page = a.page[p];
        for (int i = (int)threadIdx.x; i < of_page; i += (int)blockDim.x) {
            const int at = i % pieces * 8, token = i / pieces % kPage, part = i / pieces / kPage;
            const int g = part / 2;
            const bool of_v = part % 2;
            const attention_layout &l = a.from_layout;
            const uint8_t *base = a.from + page * a.from_bytes;
            const uint8_t *codes = base + g * l.head_bytes + (of_v ? l.v_code : 0);
            const uint8_t *params =
                base + l.param_base + (int64_t)g * l.param_bytes + (of_v ? l.v_param : 0);
            uint8_t *to = a.to + page * a.to_bytes + g * a.to_layout.head_bytes +
                          (of_v ? a.to_layout.v_code : 0);
            store_pack(reinterpret_cast<T *>(to + code_at(2 * D, token, 2 * at)),
                       values<T, D>(codes, params, of_v ? a.v : a.k, token, at));
        }
    }
}

template <dtype dt, int D> status launch(const expand_arguments &a, int32_t n_sms, cudaStream_t s) {
    const int64_t blocks = a.n_pages < 8 * n_sms ? a.n_pages : 8 * n_sms;
    expand_pages<typename element<dt>::type, D><<<(unsigned)blocks, 256, 0, s>>>(a);
    launch_nothing(s); // attention may read pages of former steps early
    return launched("attention_expand");
}

} // namespace

extern "C" status kernel_attention_expand(const attention_cache *to, const attention_cache *from,
                                          dtype type, int32_t n_kv_heads, int32_t head_dim,
                                          const int32_t *page, int64_t n_pages, int32_t n_sms,
                                          kernel_stream stream) {
    if (n_pages == 0) return ST_OK;
    const expand_arguments a = {
        (uint8_t *)to->base,
        (const uint8_t *)from->base,
        to->page_bytes,
        from->page_bytes,
        attention_layout_of(to->k, to->v, n_kv_heads, head_dim),
        attention_layout_of(from->k, from->v, n_kv_heads, head_dim),
        from->k,
        from->v,
        page,
        n_pages,
        n_kv_heads,
    };
#define X(type_name, dim)                                                                          \
    if (to->k == KF_16 && to->v == KF_16 && type == DT_##type_name && head_dim == dim)             \
        return launch<DT_##type_name, dim>(a, n_sms, (cudaStream_t)stream);
    ATTENTION_EXPAND_INSTANCES(X)
#undef X
    return FAIL(ST_UNSUPPORTED, "attention_expand to K%sV%s of %s, head_dim %d",
                kv_format_text(to->k), kv_format_text(to->v), dtype_text(type), head_dim);
}
