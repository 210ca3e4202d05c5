/* ref_attention.c - attention by the formula, and page by page over a quantised cache.
 *
 * Easy to get wrong: the window counts the token itself; page tails hold anything; a page in which
 * a row sees nothing must leave the row's state untouched, not multiply it by exp(-inf - -inf). */
#include "ref_attention.h"
#include "ref_linear.h"
#include "ref_quant.h"
#include <math.h>
#include <string.h>

enum { P = KV_PAGE_TOKENS, HEAD_DIM_MAX = 1024 };

static double dot(const float *a, const float *b, int32_t n) {
    double sum = 0;
    for (int32_t i = 0; i < n; i++) sum += (double)a[i] * b[i];
    return sum;
}

/* First token that the query at `position` sees. */
static int32_t first_visible(int32_t position, int32_t window) {
    return window > 0 && position >= window ? position - window + 1 : 0;
}

void ref_attention(float *out, int64_t out_stride, const float *q, int64_t q_stride, const float *k,
                   const float *v, int32_t n, int32_t position, int32_t head_dim, int32_t window,
                   float scale, const float *sink) {
    CHECK(head_dim <= HEAD_DIM_MAX);
    for (int32_t i = 0; i < n; i++) {
        const float *qi = q + i * q_stride;
        float *oi = out + i * out_stride;
        const int32_t last = position + i, first = first_visible(last, window);
        double largest = sink ? (double)*sink : -INFINITY, sum = 0;
        for (int32_t j = first; j <= last; j++) {
            const double s = scale * dot(qi, k + (int64_t)j * head_dim, head_dim);
            if (!(s <= largest)) largest = s; /* NaN wins and shows in the result */
        }
        if (sink) sum = exp(*sink - largest);
        for (int32_t j = first; j <= last; j++)
            sum += exp(scale * dot(qi, k + (int64_t)j * head_dim, head_dim) - largest);
        double acc[HEAD_DIM_MAX] = {0};
        for (int32_t j = first; j <= last; j++) {
            const double p = exp(scale * dot(qi, k + (int64_t)j * head_dim, head_dim) - largest);
            for (int32_t d = 0; d < head_dim; d++) acc[d] += p * v[(int64_t)j * head_dim + d];
        }
        for (int32_t d = 0; d < head_dim; d++) oi[d] = (float)(acc[d] / sum);
    }
}

/* --- The cache -------------------------------------------------------------------------------- */

int64_t ref_kv_code_bytes(kv_format f, int32_t head_dim) {
    return f == KF_16 ? (int64_t)sizeof(float) * head_dim : div_up(kv_format_bits(f) * head_dim, 8);
}

/* Tokens of one head of a page: index of the first, in tokens. */
static int64_t page_at(const ref_kv *kv, int32_t page, int32_t kv_head) {
    return ((int64_t)page * kv->n_kv_heads + kv_head) * P;
}

void ref_kv_store(const ref_kv *kv, int32_t page, int32_t slot, const float *k, const float *v) {
    const int64_t k_bytes = ref_kv_code_bytes(kv->k_format, kv->head_dim);
    const int64_t v_bytes = ref_kv_code_bytes(kv->v_format, kv->head_dim);
    CHECK(slot >= 0);
    CHECK(slot < P);
    for (int32_t g = 0; g < kv->n_kv_heads; g++) {
        const int64_t at = page_at(kv, page, g) + slot, d = (int64_t)g * kv->head_dim;
        ref_kv_quantize(kv->k + at * k_bytes, kv->k_params + at * 2, k + d, kv->head_dim,
                        kv->k_format);
        ref_kv_quantize(kv->v + at * v_bytes, kv->v_params + at * 2, v + d, kv->head_dim,
                        kv->v_format);
    }
}

/* The first n tokens of a page and head as f32 [n, D]: in place for KV_16, else in `buffer`. */
static const float *page_values(float *buffer, kv_format f, const uint8_t *codes,
                                const uint16_t *params, int64_t at, int32_t n, int32_t head_dim) {
    const int64_t bytes = ref_kv_code_bytes(f, head_dim);
    if (f == KF_16) return (const float *)(const void *)(codes + at * bytes);
    for (int32_t j = 0; j < n; j++)
        ref_kv_dequantize(buffer + (int64_t)j * head_dim, codes + (at + j) * bytes,
                          params + (at + j) * 2, head_dim, f);
    return buffer;
}

/* --- Page by page ----------------------------------------------------------------------------- */

/* State of the rows; row = token * ratio + head. Laid into the caller's scratch. */
typedef struct {
    double *l;      /* [rows] sum of exp(s - m), the sink included */
    float *m;       /* [rows] largest score so far */
    float *acc;     /* [rows, D] */
    float *k, *v;   /* [P, D] one dequantised page */
    float *v_t;     /* [D, P] */
    float *score;   /* [ratio, P] of one token, then exp(s - m) */
    float *partial; /* [ratio, D] of one page */
} row_state;

int64_t ref_attention_scratch(int32_t rows, int32_t head_dim) {
    return (int64_t)rows * (2 + 1 + head_dim + P + head_dim) + (int64_t)3 * P * head_dim;
}

static row_state lay_state(float *scratch, int32_t rows, int32_t ratio, int32_t head_dim) {
    row_state s;
    s.l = (double *)(void *)scratch; /* first: the caller's block is aligned for it */
    s.m = scratch + 2 * (int64_t)rows;
    s.acc = s.m + rows;
    s.k = s.acc + (int64_t)rows * head_dim;
    s.v = s.k + (int64_t)P * head_dim;
    s.v_t = s.v + (int64_t)P * head_dim;
    s.score = s.v_t + (int64_t)P * head_dim;
    s.partial = s.score + (int64_t)ratio * P;
    return s;
}

/* Softmax numerators of one row over n new scores, in place; m, l and acc move to the new
 * maximum. */
static void absorb_scores(float *score, int32_t n, float scale, float *m, double *l, float *acc,
                          int32_t head_dim) {
    float largest = *m;
    for (int32_t j = 0; j < n; j++) {
        score[j] *= scale;
        if (!(score[j] <= largest)) largest = score[j];
    }
    if (largest != *m) {
        const float shrink = expf(*m - largest); /* 0 at first: m is -inf */
        *l *= (double)shrink;
        for (int32_t d = 0; d < head_dim; d++) acc[d] *= shrink;
        *m = largest;
    }
    for (int32_t j = 0; j < n; j++) {
        score[j] = expf(score[j] - largest);
        *l += (double)score[j];
    }
}

/* All query heads of token i over tokens lo .. hi - 1 of the page now in k and v_t. */
static void attend_page(const ref_attention_rows *r, row_state *s, int32_t i, const float *k,
                        int32_t lo, int32_t hi) {
    const int32_t d = r->kv->head_dim, n = hi - lo;
    const float *q = r->q + i * r->q_stride + (int64_t)r->kv_head * r->ratio * d;
    ref_linear_lanes(s->score, P, q, d, k + (int64_t)lo * d, d, NULL, r->ratio, n, d);
    for (int32_t h = 0; h < r->ratio; h++) {
        const int64_t row = (int64_t)i * r->ratio + h;
        absorb_scores(s->score + h * P, n, r->scale, &s->m[row], &s->l[row], s->acc + row * d, d);
    }
    ref_linear_lanes(s->partial, d, s->score, P, s->v_t + lo, P, NULL, r->ratio, d, n);
    float *acc = s->acc + (int64_t)i * r->ratio * d;
    for (int64_t e = 0; e < (int64_t)r->ratio * d; e++) acc[e] += s->partial[e];
}

static void transpose_page(float *v_t, const float *v, int32_t n, int32_t head_dim) {
    for (int32_t e = 0; e < head_dim; e++)
        for (int32_t j = 0; j < n; j++) v_t[e * P + j] = v[(int64_t)j * head_dim + e];
}

void ref_attention_paged(const ref_attention_rows *r, float *scratch) {
    const ref_kv *kv = r->kv;
    const int32_t d = kv->head_dim, rows = r->n_tokens * r->ratio;
    CHECK(r->n_tokens >= 1);
    CHECK(r->position + r->n_tokens <= r->kv_len);
    row_state s = lay_state(scratch, rows, r->ratio, d);
    memset(s.acc, 0, sizeof(float) * (size_t)rows * (size_t)d);
    for (int32_t row = 0; row < rows; row++) {
        s.m[row] = r->sinks ? r->sinks[r->kv_head * r->ratio + row % r->ratio] : -INFINITY;
        s.l[row] = r->sinks ? 1 : 0;
    }

    const int32_t last = r->position + r->n_tokens - 1;
    const int32_t page_last = last / P;
    for (int32_t p = first_visible(r->position, r->window) / P; p <= page_last; p++) {
        const int32_t n = (int32_t)i64_min(P, (int64_t)r->kv_len - (int64_t)p * P);
        const int64_t at = page_at(kv, r->page[p], r->kv_head);
        const float *k = page_values(s.k, kv->k_format, kv->k, kv->k_params, at, n, d);
        transpose_page(s.v_t, page_values(s.v, kv->v_format, kv->v, kv->v_params, at, n, d), n, d);
        for (int32_t i = 0; i < r->n_tokens; i++) {
            const int32_t position = r->position + i;
            const int32_t lo = (int32_t)i64_max(0, first_visible(position, r->window) - p * P);
            const int32_t hi = (int32_t)i64_min(P, position + 1 - p * P);
            if (lo < hi) attend_page(r, &s, i, k, lo, hi);
        }
    }

    for (int32_t row = 0; row < rows; row++) {
        float *out = r->out + row / r->ratio * r->out_stride +
                     ((int64_t)r->kv_head * r->ratio + row % r->ratio) * d;
        for (int32_t e = 0; e < d; e++) out[e] = (float)(s.acc[(int64_t)row * d + e] / s.l[row]);
    }
}
