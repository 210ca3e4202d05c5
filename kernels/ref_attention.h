/* ref_attention.h - the definition of attention: over plain K and V, and over the pages of a cache.
 *
 * Causal, grouped-query (query heads h * ratio .. share KV head h), with an optional window and
 * optional sinks. ref_attention is the formula in f64; ref_attention_paged is what the cpu device
 * runs and reads a cache of any KV format through a page table. In both, a query's result depends
 * on that query and the tokens it may see alone: not on other sequences, not on how a prompt is cut
 * into chunks (bit by bit in the paged one). */
#ifndef AMALGAM_REF_ATTENTION_H
#define AMALGAM_REF_ATTENTION_H
#include "kernel.h"

#ifdef __cplusplus
extern "C" {
#endif

/* One query head over one KV head. Query i stands at position `position + i` and sees token j when
 * j <= position + i, and j > position + i - window unless window == 0.
 *
 *   s[i,j]   = scale * sum_d q[i,d] k[j,d]
 *   out[i,d] = sum_j exp(s[i,j]) v[j,d] / (sum_j exp(s[i,j]) + exp(sink))
 *
 *   q, out   [n, head_dim] rows `q_stride`, `out_stride` elements apart, f32
 *   k, v     [position + n, head_dim] f32, row-major
 *   sink     one logit that joins the denominator (gpt-oss), or NULL: no such term
 *
 * f64 throughout, largest exponent subtracted, rounded once. n == 0 does nothing. */
void ref_attention(float *out, int64_t out_stride, const float *q, int64_t q_stride, const float *k,
                   const float *v, int32_t n, int32_t position, int32_t head_dim, int32_t window,
                   float scale, const float *sink);

/* The KV cache of one layer. Codes and parameters of ref_quant.h, KV_16 as f32:
 *
 *   k, v                 [n_pages, G, P, code bytes of D]
 *   k_params, v_params   [n_pages, G, P, 2] f16: scale, minimum; unused for KV_16
 *
 * P = KV_PAGE_TOKENS. Tokens of one page and head are adjacent: an attention kernel streams
 * them. */
typedef struct {
    kv_format k_format, v_format;
    int32_t n_kv_heads, head_dim;
    uint8_t *k, *v;
    uint16_t *k_params, *v_params;
} ref_kv;

/* Bytes of the codes of one token and head (parameters not included; f32 for KV_16). */
int64_t ref_kv_code_bytes(kv_format f, int32_t head_dim);

/* Quantise and write one token, k and v [G, D], to slot `slot` of physical page `page`. */
void ref_kv_store(const ref_kv *kv, int32_t page, int32_t slot, const float *k, const float *v);

/* Queries of consecutive tokens of one sequence that share a KV head: n_tokens * ratio rows. */
typedef struct {
    const ref_kv *kv;
    const int32_t *page;    /* physical pages of the sequence */
    int32_t kv_len;         /* tokens in them; what lies beyond, NaN included, is never read */
    int32_t kv_head, ratio; /* query heads kv_head * ratio .. + ratio - 1 */
    int32_t n_tokens;       /* >= 1 */
    int32_t position;       /* of the first one; position + n_tokens <= kv_len */
    int32_t window;         /* 0 = all */
    float scale;            /* 1 / sqrt(D) */
    const float *q;         /* [n_tokens, H, D], tokens q_stride elements apart, head 0 first */
    float *out;             /* the same, out_stride apart */
    int64_t q_stride, out_stride;
    const float *sinks; /* [H] or NULL */
} ref_attention_rows;

/* Page by page, each dequantised once for all rows, keeping for each row the largest score m, the
 * sum l of exp(s - m) in f64 and the weighted sum of v in f32 (Milakov & Gimelshein 2018, algorithm
 * 3); products as ref_linear_lanes. A sink is where m and l start. `scratch` holds
 * ref_attention_scratch(n_tokens * ratio, D) floats. */
void ref_attention_paged(const ref_attention_rows *r, float *scratch);
int64_t ref_attention_scratch(int32_t rows, int32_t head_dim);

#ifdef __cplusplus
}
#endif
#endif
