/* gpu_run.h - one model on the cuda or the cpu device, stepped by hand: what the tests of the whole
 * transformer share. Every function is static: each test includes it once. */
#ifndef AMALGAM_GPU_RUN_H
#define AMALGAM_GPU_RUN_H
#include "gpu_test.h"

#include "forward.h"
#include "kernel.h"

/* Of a step at most; PAGES is no multiple of 5, so that page_of takes every page once. */
enum { TOKENS = 2048, SEQS = 40, SEQ_PAGES = 3, PAGES = SEQS * SEQ_PAGES + 2 };

typedef struct {
    arena a;
    device *d;
    device_ops ops; /* the device's own, some replaced: load_forced, and what a test replaces */
    forward *f;
    model_config c;
    precision p;
} run;

static dtype forced; /* type that weights of a checkpoint are said to have */
static float moved;  /* added to element 0 of the first quantised linear: the twin */
static bool made;    /* weights are made, of the folder there is but the config */

static status load_forced(device *d, const weight_source *s, const precision *p, weight *out) {
    weight_source t = *s;
    matrix_part part[64];
    static float value[1 << 20];
    t.type = forced;
    if (moved != 0 && s->field == WEIGHT_qkv && s->n_parts > 0 && s->n_parts <= COUNT_OF(part)) {
        for (int32_t r = 0; r < s->shape.n; r++)
            weight_source_row(s, 0, r, value + (int64_t)r * s->shape.k);
        value[0] += moved;
        part[0] = (matrix_part){.data = value,
                                .type = DT_F32,
                                .rows = s->shape.n,
                                .row_stride = s->shape.k,
                                .col_stride = 1};
        t.part = part;
        t.n_parts = 1;
    }
    return device_cuda.weight_load(d, &t, p, out);
}

/* UNSUPPORTED when the device refuses a format; anything else must succeed. */
static status run_open(run *r, const char *name, const char *dir, const char *format,
                       device_options o) {
    const device_ops *ops;
    *r = (run){0};
    o.tp = 1;
    assert_ok(device_find(&ops, name));
    assert_ok(model_config_load(&r->c, dir));
    assert_ok(precision_parse(&r->p, format));
    assert_ok(ops->open(&r->d, &o));
    r->ops = *ops;
    if (!strcmp(name, "cuda")) r->ops.weight_load = load_forced;
    r->d->ops = &r->ops;
    checkpoint *k;
    assert_ok(arena_open(&r->a, 16 << 20));
    assert_ok(checkpoint_open(&k, &r->c, made ? NULL : dir, 1));
    const status st = forward_load(&r->f, &r->a, r->d, k, &r->c, &r->p, NULL, NULL);
    checkpoint_close(k);
    if (st == ST_UNSUPPORTED) return st;
    assert_ok(st);
    const device_setup s = {.config = &r->c,
                            .precision = &r->p,
                            .max_tokens = TOKENS,
                            .max_seqs = SEQS,
                            .max_samples = TOKENS,
                            .n_pages = PAGES};
    const forward_plan plan = forward_plan_default(r->d);
    assert_ok(forward_setup(r->f, &s, &plan));
    return ST_OK;
}

static void run_close(run *r) {
    r->d->ops->close(r->d);
    arena_close(&r->a);
}

/* --- Steps ---------------------------------------------------------------------------------- */

static int32_t page_of(int32_t seq, int32_t i) { return (seq * SEQ_PAGES + i) * 5 % PAGES; }

/* One step: n[s] tokens of sequence s from position at[s] on; decodes come first in `n`. With
 * params the last token of each sequence is sampled; without, every row's logits go to `logits`. */
static status try_step(run *r, int32_t n_seqs, const int32_t *n, const int32_t *at,
                       const int32_t *const *token, const sampling *params, sampled *out,
                       float *logits) {
    int32_t id[TOKENS], position[TOKENS], seq_start[SEQS + 1] = {0}, kv_len[SEQS];
    int32_t page_start[SEQS + 1] = {0}, page[SEQS * SEQ_PAGES];
    int64_t ids[SEQS];
    sample_row sample[TOKENS];
    sampled ignored[TOKENS];
    batch b = {.n_seqs = n_seqs,
               .token = id,
               .position = position,
               .seq_start = seq_start,
               .kv_len = kv_len,
               .page_start = page_start,
               .page = page,
               .id = ids,
               .sample = sample};
    for (int32_t s = 0; s < n_seqs; s++) {
        for (int32_t i = 0; i < n[s]; i++, b.n_tokens++) {
            id[b.n_tokens] = token[s][at[s] + i];
            position[b.n_tokens] = at[s] + i;
            if (!params || i == n[s] - 1)
                sample[b.n_samples++] = (sample_row){
                    .row = b.n_tokens, .seq = s, .params = params, .draw = (uint64_t)(at[s] + i)};
        }
        b.n_decodes += n[s] == 1;
        ids[s] = s;
        kv_len[s] = at[s] + n[s];
        seq_start[s + 1] = b.n_tokens;
        const int32_t pages = (int32_t)div_up(kv_len[s], KV_PAGE_TOKENS);
        for (int32_t i = 0; i < pages; i++) page[page_start[s] + i] = page_of(s, i);
        page_start[s + 1] = page_start[s] + pages;
    }
    int64_t cost;
    TRY(forward_step(r->f, &b, out ? out : ignored, &cost));
    return logits ? forward_logits(r->f, logits) : ST_OK;
}

static void step(run *r, int32_t n_seqs, const int32_t *n, const int32_t *at,
                 const int32_t *const *token, const sampling *params, sampled *out, float *logits) {
    assert_ok(try_step(r, n_seqs, n, at, token, params, out, logits));
}
#endif
