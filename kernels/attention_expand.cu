// attention_expand.cu - pages of a quantised cache written out at 16 bit, codes as their values in
// fp16: before prefill chunks of many rows (attention_widen), and before an attention that knows no
// other formats (the baseline). A block has K or V of one head of a page.
#include "attention_codes.cuh"

namespace {

struct expand_arguments {
    const uint8_t *from;
    uint8_t *to;
    int64_t from_bytes, to_bytes; // of a page
    attention_layout layout;      // of `from`
    kv_format k, v;
    const int32_t *page;
    const attention_chunk *chunk; // [n_chunks] which of them, where there are several;
    int n_chunks, first;          // or pages from `first` on
    bool in_order;                // else eight values of 4 bits are in the order of eight_of
};

constexpr int kThreads = 256;

// A thread's pieces of 16 bytes of K or V of a head of a page, so many tokens apart that all lie
// alike in the swizzle: all its loads are under way at once.
template <int D> struct share {
    static constexpr int ROW = D / 8, STEP = kThreads / ROW, N = kPage / STEP;
    static_assert(STEP % 8 == 0, "groups of eight tokens");
    uint2 code[N];
    uint32_t param[N];
    template <kv_format F>
    __device__ __forceinline__ void load(const uint8_t *codes, const uint8_t *params, int thread) {
        constexpr int BYTES = F == KF_4 ? D / 2 : D, PARAM = F == KF_FP8 ? 2 : 4;
        const int token = thread / ROW, piece = thread % ROW;
        codes += code_at(BYTES, token, BYTES / ROW * piece);
        params += token * PARAM;
#pragma unroll
        for (int n = 0; n < N; n++) {
            if (F == KF_4)
                code[n].x = __ldg((const uint32_t *)(codes + n * STEP * BYTES));
            else
                code[n] = __ldg((const uint2 *)(codes + n * STEP * BYTES));
            param[n] = F == KF_FP8 ? __ldg((const uint16_t *)(params + n * STEP * PARAM))
                                   : __ldg((const uint32_t *)(params + n * STEP * PARAM));
        }
    }
    template <kv_format F>
    __device__ __forceinline__ void store(uint8_t *to, int thread, bool in_order) const {
        to += code_at(2 * D, thread / ROW, thread % ROW * 16);
#pragma unroll
        for (int n = 0; n < N; n++) {
            const __half2 both = half2_of(param[n]);
            const __half2 s = __low2half2(both), m = __high2half2(both);
            uint4 x;
            if (F == KF_4) {
                x = eight_of<true>(code[n].x, s, m);
                if (in_order) x = from_nibbles(x);
            } else {
                const uint2 lo = four_of<F, true>(code[n].x, s, m);
                const uint2 hi = four_of<F, true>(code[n].y, s, m);
                x = make_uint4(lo.x, lo.y, hi.x, hi.y);
            }
            *(uint4 *)(to + n * STEP * 2 * D) = x;
        }
    }
};

template <int D, kv_format F>
__device__ __forceinline__ void expand(uint8_t *to, const uint8_t *codes, const uint8_t *params,
                                       bool in_order) {
    share<D> x;
    x.template load<F>(codes, params, (int)threadIdx.x);
    x.template store<F>(to, (int)threadIdx.x, in_order);
}

template <int D> __global__ void __launch_bounds__(kThreads) expand_pages(expand_arguments a) {
    const int at = (int)blockIdx.x, g = (int)blockIdx.y / 2;
    const bool of_v = blockIdx.y % 2;
    int from = a.first;
    if (a.n_chunks > 1) {
        int chunk = a.n_chunks - 1;
        while (chunk > 0 && a.chunk[chunk].to > at) chunk--;
        from = a.chunk[chunk].from - a.chunk[chunk].to;
    }
    const uint8_t *page = a.from + a.page[from + at] * a.from_bytes;
    const uint8_t *codes = page + g * a.layout.head_bytes + (of_v ? a.layout.v_code : 0);
    const uint8_t *params = page + a.layout.param_base + (int64_t)g * a.layout.param_bytes +
                            (of_v ? a.layout.v_param : 0);
    uint8_t *to = a.to + at * a.to_bytes + (int64_t)blockIdx.y * (2 * D * kPage);
    // In this order: who is launched early may take what came before this kernel as done.
    wait_for_previous();
    launch_dependents();
    switch (of_v ? a.v : a.k) {
    case KF_8: return expand<D, KF_8>(to, codes, params, a.in_order);
    case KF_4: return expand<D, KF_4>(to, codes, params, a.in_order);
    default: return expand<D, KF_FP8>(to, codes, params, a.in_order);
    }
}

status launch(const expand_arguments &a, int32_t n_kv_heads, int32_t head_dim, int32_t n_pages,
              cudaStream_t s) {
    const auto kernel = head_dim == 64    ? expand_pages<64>
                        : head_dim == 128 ? expand_pages<128>
                        : head_dim == 256 ? expand_pages<256>
                                          : nullptr;
    if (!kernel) return FAIL(ST_UNSUPPORTED, "attention_expand with head_dim %d", head_dim);
    return launch_early("attention_expand", kernel,
                        dim3((unsigned)n_pages, 2 * (unsigned)n_kv_heads), dim3(kThreads), s, a);
}

} // namespace

extern "C" status kernel_attention_expand(const attention_cache *to, const attention_cache *from,
                                          int32_t n_kv_heads, int32_t head_dim, const int32_t *page,
                                          int32_t n_pages, kernel_stream stream) {
    if (n_pages == 0) return ST_OK;
    if (from->k == KF_16 || from->v == KF_16)
        return FAIL(ST_UNSUPPORTED, "attention_expand of 16 bit");
    const expand_arguments a = {
        (const uint8_t *)from->base,
        (uint8_t *)to->base,
        from->page_bytes,
        to->page_bytes,
        attention_layout_of(from->k, from->v, n_kv_heads, head_dim),
        from->k,
        from->v,
        page,
        nullptr,
        1,
        0,
        true,
    };
    TRY(launch(a, n_kv_heads, head_dim, n_pages, (cudaStream_t)stream));
    launch_nothing((cudaStream_t)stream); // decodes read pages of former steps early
    return launched("attention_expand");
}

extern "C" status attention_widen(const attention_problem *p, attention_wide order) {
    const attention_counts *c = &p->counts;
    const expand_arguments a = {
        (const uint8_t *)p->c.base,
        (uint8_t *)p->wide.base,
        p->c.page_bytes,
        p->wide.page_bytes,
        p->layout,
        p->c.k,
        p->c.v,
        p->b.page,
        p->plan->chunk,
        c->n_wide_chunks,
        c->first_wide,
        order == WIDE_ORDER,
    };
    return launch(a, p->l.n_kv_heads, p->l.head_dim, c->n_wide_pages, (cudaStream_t)p->stream);
}
