/* capacity.c - see capacity.h. Sums of exact terms; nothing here is estimated. */
#include "capacity.h"

#include "attention.h"
#include <math.h>

#define GIB (1.0 / (1 << 30))

int64_t kv_page_bytes(const model_config *c, const precision *p, int32_t tp) {
    return model_kv_token_bytes(c, p, tp) * KV_PAGE_TOKENS;
}

int32_t wide_pages(const model_config *c, const precision *p, int32_t tp, int32_t max_tokens,
                   int32_t ctx_max, int32_t n_pages) {
    bool codes = false;
    for (int32_t i = 0; i < c->n_layers; i++) {
        const kv_pair f = precision_kv(p, i);
        codes |= f.k != KF_16 && f.v != KF_16;
    }
    const int32_t ratio = c->n_heads / tp / model_kv_heads(c, tp);
    return codes ? (int32_t)i64_min(attention_wide_pages(max_tokens, ctx_max, ratio), n_pages) : 0;
}

static int64_t wide_page_bytes(const model_config *c, int32_t tp) {
    return attention_page_bytes(KF_16, KF_16, model_kv_heads(c, tp), c->head_dim);
}

/* The buffers of forward.c (BUFFERS there) at two bytes an element, logits at four; gate_up is
 * counted although a plan with the fused operation does without, so that a plan never changes the
 * number of pages. Then the tables of a batch: ids, positions, two words of the KV append for each
 * token; start, length and some 64 bytes of the sampler for each sequence; experts and their
 * weights for each token. */
int64_t workspace_bytes(const model_config *c, const precision *p, int32_t tp, int32_t max_tokens,
                        int32_t max_seqs, int32_t max_samples, int32_t n_pages) {
    const bool moe = c->n_experts > 0;
    const int64_t k = moe ? c->top_k : 1, ffn = (moe ? c->expert_dim : c->ffn_dim) / tp;
    const int64_t h = c->n_heads / tp, g = model_kv_heads(c, tp), dim = c->dim;
    const int64_t token = 3 * dim                     /* residual, x, y */
                          + (h + 2 * g) * c->head_dim /* qkv */
                          + h * c->head_dim           /* attn */
                          + k * 3 * ffn               /* gate_up, gated */
                          + (moe ? c->n_experts + k * dim : 0) /* router, expert_y */;
    const int64_t wide =
        wide_pages(c, p, tp, max_tokens, c->ctx_max, n_pages) * wide_page_bytes(c, tp);
    const int64_t tables = 16 + (moe ? k * 12 : 0);
    return max_tokens * (2 * token + tables) + max_samples * (2 * dim + 4 * (int64_t)c->vocab) +
           max_seqs * (int64_t)(3 * 4 + 64) + wide;
}

/* "Llama-3.1-70B W16A16KV16 tp 1: weights 131.4 GiB + workspace 2.1 GiB, usable 20.3 GiB (90 % of
 * 22.5 GiB)". */
static status refuse(const capacity *m, const model_config *c, const precision *p, int32_t tp,
                     int64_t usable, double fraction, int32_t pages) {
    char name[PRECISION_NAME_MAX], kv[96] = "";
    if (pages > 0)
        snprintf(kv, sizeof kv, " + %d KV pages of %.2f MiB", pages,
                 (double)m->page_bytes * GIB * 1024);
    return FAIL(ST_OOM,
                "%s %.64s tp %d: weights %.1f GiB + workspace %.1f GiB%s, usable %.1f GiB "
                "(%g %% of %.1f GiB)",
                c->name, precision_name(p, name), tp, (double)m->weight_bytes * GIB,
                (double)m->workspace_bytes * GIB, kv, fraction * (double)usable * GIB,
                fraction * 100, (double)usable * GIB);
}

status capacity_compute(capacity *out, const model_config *c, const precision *p, int32_t tp,
                        int64_t usable, double fraction, int32_t max_tokens, int32_t max_seqs,
                        int32_t pages_wanted, int32_t pages_least) {
    CHECK(tp >= 1);
    CHECK(fraction > 0 && fraction <= 1);
    CHECK(usable >= 0);
    const int64_t weights = model_weight_bytes(c, p, tp);
    capacity m = {.weight_bytes = weights, .page_bytes = kv_page_bytes(c, p, tp)};
    int64_t pages = pages_wanted;
    if (usable > 0) {
        const int64_t room = (int64_t)floor(fraction * (double)usable);
        const int64_t least = i64_max(i64_max(pages_least, pages_wanted), 1);
        m.workspace_bytes = workspace_bytes(c, p, tp, max_tokens, max_seqs, max_seqs, 0);
        const int64_t left = i64_max(room - weights - m.workspace_bytes, 0);
        /* A page brings one at 16 bit with it while there are fewer than a step may write out. */
        const int64_t wide = wide_page_bytes(c, tp);
        const int64_t most = wide_pages(c, p, tp, max_tokens, c->ctx_max, INT32_MAX);
        int64_t fit = left / (m.page_bytes + (most ? wide : 0));
        if (fit > most) fit = (left - most * wide) / m.page_bytes;
        fit = i64_min(fit, INT32_MAX);
        if (fit < least) {
            const bool alone = weights + m.workspace_bytes > room;
            m.workspace_bytes += alone ? 0 : i64_min(most, least) * wide;
            return refuse(&m, c, p, tp, usable, fraction, alone ? 0 : (int32_t)least);
        }
        if (pages_wanted <= 0) pages = fit;
    } else if (pages < i64_max(pages_least, 1)) {
        return FAIL(ST_RANGE, "%d KV pages, at least %d are needed", pages_wanted,
                    pages_least > 1 ? pages_least : 1);
    }
    m.workspace_bytes = workspace_bytes(c, p, tp, max_tokens, max_seqs, max_seqs, (int32_t)pages);
    m.n_pages = (int32_t)pages;
    m.kv_bytes = pages * m.page_bytes;
    m.kv_tokens = pages * KV_PAGE_TOKENS;
    *out = m;
    return ST_OK;
}

status capacity_choose_tp(int32_t *tp, const model_config *c, const precision *p, int64_t usable,
                          double fraction, int32_t max_tokens, int32_t max_seqs,
                          int32_t pages_least) {
    status last = FAIL(ST_OOM, "%s does not fit", c->name);
    for (int32_t n = 1; n <= 8; n *= 2) {
        capacity m;
        status st = model_fits_precision(c, p, n);
        if (st == ST_OK)
            st = capacity_compute(&m, c, p, n, usable, fraction, max_tokens, max_seqs,
                                  usable > 0 ? 0 : pages_least, pages_least);
        if (st == ST_OK) {
            *tp = n;
            return ST_OK;
        }
        last = st;
    }
    return last;
}
