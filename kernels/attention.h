/* attention.h - attention over the paged KV cache in any precision of K and V, and the append.
 *
 * Layout of a page (64 tokens) of one layer on one rank, in bytes from the page's base:
 *
 *     for each KV head g:  K codes [64 tokens, D]   V codes [64, D]      in the format's bits
 *     then for each head:  K params [64]   V params [64]
 *                          (f16 scale and f16 minimum for KF_8 and KF_4, f16 scale for KF_FP8)
 *
 * Pages of one layer are contiguous: page p of layer l begins at layer_base[l] + p * page_bytes[l],
 * with page_bytes[l] = 64 * G * (kv_format_bytes(k) + kv_format_bytes(v)), all offsets 64-bit. The
 * order of codes within [64, D] is the kernel family's own business (attention_unpack_page undoes
 * it for tests); it is the same for decode and prefill. Bytes of tokens at or past kv_len may hold
 * anything, NaN included, and never reach a result. */
#ifndef KERNEL_ATTENTION_H
#define KERNEL_ATTENTION_H
#include "ref_quant.h"

#ifdef __cplusplus
extern "C" {
#endif

/* One layer's cache. */
typedef struct {
    void *base;         /* device */
    int64_t page_bytes; /* stride from page to page */
    kv_format k, v;
} attention_cache;

int64_t attention_page_bytes(kv_format k, kv_format v, int32_t n_kv_heads, int32_t head_dim);

/* The batch as attention sees it: device copies of batch.h's arrays, made once a step, and the
 * plan. */
typedef struct {
    int32_t n_seqs, n_tokens, n_decodes;
    const int32_t *position;   /* [T] */
    const int32_t *seq_start;  /* [S + 1] */
    const int32_t *token_seq;  /* [T] sequence of each token */
    const int32_t *kv_len;     /* [S] */
    const int32_t *page_start; /* [S + 1] */
    const int32_t *page;       /* [.] */
} attention_batch;

typedef struct {
    dtype type;                                    /* F16 or BF16: of qkv, out, norms, sinks */
    int32_t n_heads, n_kv_heads, head_dim, window; /* window 0 = all */
    float scale, norm_eps;
    const void *q_norm, *k_norm; /* [D] or NULL */
    const void *sinks;           /* [H] or NULL */
    const float *rope_cos_sin;   /* [ctx_max, D / 2, 2] f32: cos, sin (times the YaRN factor) */
} attention_layer_params;

/* QK-norm, RoPE on q and k (half-split pairs d, d + D/2), quantise and append k and v of all tokens
 * of the batch. q is changed in place in qkv [T, (H + 2G) D]. */
status kernel_rope_append(void *qkv, const attention_layer_params *l, const attention_cache *c,
                          const attention_batch *b, kernel_stream stream);

/* Work split, computed once a step on the host into pinned memory and uploaded, read by every
 * layer. Splits of a sequence depend on its own length alone (batch invariance). */
typedef struct attention_plan attention_plan;
int64_t attention_plan_bytes(int32_t max_seqs, int32_t max_tokens, int64_t max_pages);
int64_t attention_workspace_bytes(int32_t max_tokens, int32_t n_heads, int32_t head_dim,
                                  int32_t n_sms);
/* `host` (pinned) is filled; *used bytes of it are copied to the device by the caller before the
 * run. The kv_len, seq_start of `b` are host pointers here. */
status attention_plan_make(void *host, int64_t *used, const attention_batch *b, int32_t n_heads,
                           int32_t n_kv_heads, int32_t head_dim, int32_t window, int32_t n_sms);

/* out [T, H D] = softmax(scale q K^T + mask, sinks) V for decodes, prefill chunks, and both at
 * once. plan: the device copy. Deterministic and batch-invariant. */
status kernel_attention(void *out, const void *qkv, const attention_layer_params *l,
                        const attention_cache *c, const attention_batch *b, const void *plan,
                        void *workspace, const char *kernel, int32_t sm, int32_t n_sms,
                        kernel_stream stream);

/* Host: codes of page `p` back to plain values, K and V [64, G, D] f32; for tests. */
void attention_unpack_page(float *k, float *v, const void *page, kv_format kf, kv_format vf,
                           int32_t n_kv_heads, int32_t head_dim, int32_t family);

const char *const *attention_variants(int32_t family);

#ifdef __cplusplus
}
#endif
#endif
