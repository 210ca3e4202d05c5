/* quantise.c - see quantise.h. A fused weight (q | k | v) is one matrix here, since its parts share
 * their inputs, and is cut into the source's tensors when it is written; NVFP4's global scale is so
 * the same for all of them, as loaders want it.
 *
 * Easy to get wrong: a norm is stored in 16 bit, so what the weights are multiplied with is the
 * ratio of the old norm to the rounded new one, not the scale that was searched for. */
#include "quantise.h"

#include "evaluate.h"

#include <float.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/statvfs.h>

static const char *const method_texts[QUANTISE_COUNT] = {"rtn", "gptq", "awq"};

const char *quantise_method_text(quantise_method m) {
    CHECK((unsigned)m < QUANTISE_COUNT);
    return method_texts[m];
}

status quantise_method_parse(quantise_method *out, const char *name) {
    for (int32_t i = 0; i < QUANTISE_COUNT; i++) {
        if (strcmp(method_texts[i], name) != 0) continue;
        *out = (quantise_method)i;
        return ST_OK;
    }
    return FAIL(ST_NOTFOUND, "method '%s' is none of rtn, gptq, awq", name);
}

/* --- GPTQ ------------------------------------------------------------------------------------- */

static int by_diagonal(const void *a, const void *b) {
    const double *const *x = a, *const *y = b;
    if (**x != **y) return **x > **y ? -1 : 1;
    return *x < *y ? -1 : *x > *y;
}

status quantise_gptq(const calibrate_ops *by, qmatrix *q, float *w, const double *gram, double damp,
                     bool act_order) {
    const int32_t k = q->k;
    const double **at = mem_alloc((size_t)k, sizeof *at);
    int32_t *column = mem_alloc((size_t)k, sizeof *column);
    double mean = 0;
    status st = at && column ? ST_OK : FAIL(ST_NOMEM, "order of %d inputs", k);
    for (int32_t i = 0; i < k && st == ST_OK; i++) {
        at[i] = &gram[(int64_t)i * k + i];
        mean += *at[i] / k;
    }
    if (!(mean > 0)) mean = 1; /* nothing was seen: every input counts the same */
    if (act_order && st == ST_OK) qsort(at, (size_t)k, sizeof *at, by_diagonal);
    for (int32_t i = 0; i < k && st == ST_OK; i++) column[i] = (int32_t)((at[i] - gram) / (k + 1));
    if (st == ST_OK) st = by->gptq(q, w, gram, damp * mean, column);
    mem_free(column);
    mem_free(at);
    return st;
}

/* --- AWQ -------------------------------------------------------------------------------------- */

enum {
    SEARCH_STEPS = 20, /* as AutoAWQ: exponents by 0.05 */
    CLIP_STEPS = 10,   /* down to half */
    END_STEPS = 4      /* 20 % up and down */
};

typedef struct {
    const calibrate_ops *by;
    calibrate_search *at;
    const precision *p;
    int32_t n, k;
    float *gram; /* [k, k] */
} search;

static void end_search(search *s) {
    s->by->search_close(s->at);
    mem_free(s->gram);
}

/* Moments in f32 from here on, so in units of the largest. */
static status begin_search(search *s, const calibrate_ops *by, const float *w, int32_t n, int32_t k,
                           const precision *p, const double *gram) {
    const size_t kk = (size_t)k * (size_t)k;
    double largest = 0;
    *s = (search){.by = by, .p = p, .n = n, .k = k, .gram = mem_alloc(kk, sizeof(float))};
    if (!s->gram) return FAIL(ST_NOMEM, "moments of %d inputs", k);
    for (int32_t i = 0; i < k; i++) largest = fmax(largest, gram[(int64_t)i * k + i]);
#pragma omp parallel for schedule(static) if (k > 1024)
    for (size_t i = 0; i < kk; i++)
        s->gram[i] = (float)(largest > 0 ? gram[i] / largest : i % (size_t)(k + 1) == 0);
    const status st = by->search_open(&s->at, w, n, k, p, s->gram);
    if (st != ST_OK) end_search(s);
    return st;
}

/* Mean over rows of |w| relative to the largest of its group. */
static void relative_magnitude(double *out, const float *w, int32_t n, int32_t k, int32_t group) {
    memset(out, 0, (size_t)k * sizeof *out);
    for (int32_t r = 0; r < n; r++) {
        for (int32_t at = 0; at < k; at += group) {
            const int32_t end = (int32_t)i64_min(at + group, k);
            const float *row = w + (int64_t)r * k;
            float top = 0;
            for (int32_t i = at; i < end; i++) top = fmaxf(top, fabsf(row[i]));
            for (int32_t i = at; i < end && top > 0; i++)
                out[i] += fabs((double)row[i]) / ((double)top * n);
        }
    }
}

/* Values of inputs that are tied become their mean. `sum` is scratch [2 k]. */
static void tie_values(double *v, const int32_t *tie, int32_t k, double *sum) {
    if (!tie) return;
    memset(sum, 0, 2 * (size_t)k * sizeof *sum);
    for (int32_t i = 0; i < k; i++) {
        sum[tie[i]] += v[i];
        sum[k + tie[i]] += 1;
    }
    for (int32_t i = 0; i < k; i++) v[i] = sum[tie[i]] / sum[k + tie[i]];
}

/* s = x^r / w^(1-r) (duo) or x^r, centred so that the largest times the smallest is 1. */
static void candidate(float *s, const double *x, const double *w, int32_t k, double r, bool duo) {
    double lo = DBL_MAX, hi = 0;
    for (int32_t i = 0; i < k; i++) {
        double v = pow(x[i], r);
        if (duo) v /= pow(w[i], 1 - r) + 1e-4;
        v = fmax(v, 1e-4);
        lo = fmin(lo, v);
        hi = fmax(hi, v);
        s[i] = (float)v;
    }
    const float centre = (float)sqrt(lo * hi);
    for (int32_t i = 0; i < k; i++) s[i] = fmaxf(s[i] / centre, 1e-4f);
}

static status search_scales(search *s, float *best, const float *w, const moments *x,
                            const int32_t *tie) {
    const int32_t k = s->k;
    arena a;
    double least;
    TRY(arena_open(&a, (size_t)k * 40 + 4096));
    float *try = arena_array(&a, float, (size_t)k);
    double *xm = arena_array(&a, double, (size_t)k), *wm = arena_array(&a, double, (size_t)k);
    double *sum = arena_array(&a, double, 2 * (size_t)k);
    CHECK(try && xm && wm && sum);
    for (int32_t i = 0; i < k; i++) xm[i] = x->rows ? x->magnitude[i] / (double)x->rows : 1;
    relative_magnitude(wm, w, s->n, k, s->p->group ? s->p->group : k);
    tie_values(xm, tie, k, sum);
    tie_values(wm, tie, k, sum);
    for (int32_t i = 0; i < k; i++) best[i] = 1;
    status st = s->by->search_scaled(s->at, best, &least);
    for (int32_t step = 1; step <= 2 * SEARCH_STEPS && st == ST_OK; step++) {
        double loss;
        const int32_t r = (step - 1) % SEARCH_STEPS + (step <= SEARCH_STEPS);
        candidate(try, xm, wm, k, (double)r / SEARCH_STEPS, step > SEARCH_STEPS);
        st = s->by->search_scaled(s->at, try, &loss);
        if (st != ST_OK || !(loss < least)) continue;
        least = loss;
        memcpy(best, try, (size_t)k * sizeof *best);
    }
    arena_close(&a);
    return st;
}

status quantise_awq_scales(const calibrate_ops *by, float *s, const float *w, int32_t n, int32_t k,
                           const precision *p, const moments *x, const int32_t *tie) {
    search all;
    TRY(begin_search(&all, by, w, n, k, p, x->gram));
    const status st = search_scales(&all, s, w, x, tie);
    end_search(&all);
    return st;
}

/* Of every group, [n, groups]. */
typedef struct {
    double *least, *loss; /* with `best`, with `now` */
    calibrate_cut *best, *base, *now;
} cuts;

/* All groups at their base cuts times `factor`; better ones are kept. */
static status try_cut(search *s, cuts *c, int64_t count, calibrate_cut factor) {
    for (int64_t i = 0; i < count; i++)
        c->now[i] = (calibrate_cut){c->base[i].lo * factor.lo, c->base[i].hi * factor.hi};
    TRY(s->by->search_cut(s->at, c->now, c->loss));
    for (int64_t i = 0; i < count; i++) {
        if (!(c->loss[i] < c->least[i])) continue;
        c->least[i] = c->loss[i];
        c->best[i] = c->now[i];
    }
    return ST_OK;
}

/* Both ends together by halves of a tenth, then each end alone around what that found. */
static status search_cuts(search *s, cuts *c, int64_t count) {
    const size_t bytes = (size_t)count * sizeof(calibrate_cut);
    for (int64_t i = 0; i < count; i++) {
        c->least[i] = DBL_MAX;
        c->best[i] = (calibrate_cut){1, 1};
    }
    memcpy(c->base, c->best, bytes);
    for (int32_t i = 0; i <= CLIP_STEPS; i++) {
        const float f = 1 - 0.5f * (float)i / CLIP_STEPS;
        TRY(try_cut(s, c, count, (calibrate_cut){f, f}));
    }
    for (int32_t end = 0; end < 2; end++) {
        memcpy(c->base, c->best, bytes);
        for (int32_t i = -END_STEPS; i <= END_STEPS; i++) {
            const float f = 1 + 0.05f * (float)i;
            if (i) TRY(try_cut(s, c, count, end ? (calibrate_cut){1, f} : (calibrate_cut){f, 1}));
        }
    }
    return ST_OK;
}

status quantise_clip(const calibrate_ops *by, float *out, const float *w, int32_t n, int32_t k,
                     const precision *p, const double *gram) {
    const int32_t group = p->group ? p->group : k;
    const int64_t groups = div_up(k, group), count = n * groups;
    search s;
    arena a;
    TRY(arena_open(&a, (size_t)count * (2 * sizeof(double) + 3 * sizeof(calibrate_cut)) + 4096));
    cuts c = {.least = arena_array(&a, double, (size_t)count),
              .loss = arena_array(&a, double, (size_t)count),
              .best = arena_array(&a, calibrate_cut, (size_t)count),
              .base = arena_array(&a, calibrate_cut, (size_t)count),
              .now = arena_array(&a, calibrate_cut, (size_t)count)};
    CHECK(c.least && c.loss && c.best && c.base && c.now);
    status st = begin_search(&s, by, w, n, k, p, gram);
    if (st == ST_OK) {
        st = search_cuts(&s, &c, count);
        end_search(&s);
    }
    for (int64_t i = 0; st == ST_OK && i < count; i++) {
        const int64_t col = i % groups * group, at = i / groups * k + col;
        ref_calibrate_cut(out + at, w + at, (int32_t)i64_min(group, k - col), c.best[i]);
    }
    arena_close(&a);
    return st;
}

/* --- A layer ---------------------------------------------------------------------------------- */

typedef struct {
    const quantise_options *o;
    const checkpoint *k;
    const model_config *c;
    save *out;
    observer *seen; /* NULL for rtn, as is: */
    const calibrate_ops *by;
    int32_t layer;
    arena layer_memory; /* values of one layer: [count, n, k] by field */
    float *values[WEIGHT_COUNT];
    weight_source source[WEIGHT_COUNT];
} job;

static float *matrix(job *j, weight_field f, int32_t index) {
    const weight_shape *s = &j->source[f].shape;
    return j->values[f] + (int64_t)index * s->n * s->k;
}

static status read_layer(job *j) {
    arena_reset(&j->layer_memory, 0);
    for (int32_t f = 0; f < WEIGHT_COUNT; f++) {
        if (!weight_field_present(j->c, (weight_field)f)) continue;
        weight_source *s = &j->source[f];
        TRY(checkpoint_source(j->k, (weight_field)f, j->layer, s));
        const size_t n = (size_t)s->shape.count * (size_t)s->shape.n * (size_t)s->shape.k;
        j->values[f] = arena_array(&j->layer_memory, float, n);
        if (!j->values[f]) return FAIL(ST_NOMEM, "%s", s->name);
#pragma omp parallel for schedule(static) if (n > 1 << 20)
        for (int32_t i = 0; i < s->shape.count * s->shape.n; i++)
            weight_source_row(s, i / s->shape.n, i % s->shape.n,
                              j->values[f] + (int64_t)i * s->shape.k);
    }
    return ST_OK;
}

static status write_parts(job *j, weight_field f, int32_t index, const qmatrix *q) {
    const weight_source *s = &j->source[f];
    const int32_t each = s->n_parts / s->shape.count;
    const matrix_part *p = s->part + (int64_t)index * each;
    if (j->o->layout == SAVE_GPT_OSS)
        return save_expert(j->out, p->tensor->name, index, s->shape.count, s->shape.n_fused, q);
    for (int32_t i = 0; i < each; i++, p++) {
        if (!p->tensor || p->tensor->n_dims != 2 || p->tensor->dim[0] != p->rows)
            return FAIL(ST_UNSUPPORTED, "its tensor holds more than one linear");
        if (p->row_at % q->block_n)
            return FAIL(ST_UNSUPPORTED, "tensor '%s' begins inside a block of %d rows",
                        p->tensor->name, q->block_n);
        const qmatrix rows = qmatrix_rows(q, p->row_at, p->rows);
        TRY(save_matrix(j->out, p->tensor->name, &rows, NULL));
    }
    return ST_OK;
}

static status write_matrix(job *j, weight_field f, int32_t index) {
    const weight_shape *s = &j->source[f].shape;
    const precision *p = &j->o->precision;
    float *w = matrix(j, f, index);
    arena a;
    TRY(arena_open(&a, (size_t)precision_weight_bytes(p, s->n, s->k) + 4096 +
                           (size_t)s->n * (size_t)s->k * sizeof(float)));
    qmatrix q;
    status st = qmatrix_alloc(&q, &a, p, s->n, s->k);
    const moments *x = j->seen ? observer_moments(j->seen, f, j->layer, index) : NULL;
    const bool integer = p->weight == WF_INT4 || p->weight == WF_INT8;
    float *clipped = w;
    if (st == ST_OK && x && integer) {
        clipped = arena_array(&a, float, (size_t)s->n *(size_t)s->k);
        st = clipped ? quantise_clip(j->by, clipped, w, s->n, s->k, p, x->gram)
                     : FAIL(ST_NOMEM, "%d x %d", s->n, s->k);
    }
    if (st == ST_OK) st = ref_quantize_weight(&q, clipped);
    if (st == ST_OK && j->o->method == QUANTISE_GPTQ)
        st = quantise_gptq(j->by, &q, w, x->gram, j->o->damp, j->o->act_order);
    if (st == ST_OK) st = write_parts(j, f, index, &q);
    arena_close(&a);
    return st == ST_OK ? st : fail_prefix(st, "%s", j->source[f].name);
}

/* --- AWQ's scales, layer by layer ------------------------------------------------------------- */

/* Columns times s, and the moments of what they are now fed: x / s. */
static void scale_columns(job *j, weight_field f, const float *s) {
    const weight_shape *w = &j->source[f].shape;
    float *v = j->values[f];
    for (int64_t r = 0; r < (int64_t)w->count * w->n; r++)
        for (int32_t i = 0; i < w->k; i++) v[r * w->k + i] *= s[i];
    if (!w->quantise) return;
    for (int32_t e = 0; e < w->count; e++) {
        const moments *m = observer_moments(j->seen, f, j->layer, e);
#pragma omp parallel for schedule(static) if (w->k > 1024)
        for (int32_t a = 0; a < w->k; a++)
            for (int32_t b = 0; b < w->k; b++)
                m->gram[(int64_t)a * w->k + b] /= (double)s[a] * (double)s[b];
    }
}

/* norm / s, rounded as it is stored; s becomes what that really divides by. */
static status divide_norm(job *j, weight_field f, float *s) {
    const weight_source *norm = &j->source[f];
    float *v = j->values[f];
    const int32_t k = norm->shape.k;
    const tensor_view *t = norm->part[0].tensor;
    uint8_t stored[4];
    for (int32_t i = 0; i < k; i++) {
        float divided = v[i] / s[i];
        dtype_from_f32(stored, &divided, 1, t->type);
        dtype_to_f32(&divided, stored, 1, 1, t->type);
        if (v[i] == 0 || divided == 0) divided = v[i], s[i] = 1;
        if (v[i] != 0) s[i] = v[i] / divided;
        v[i] = divided;
    }
    return save_values(j->out, t->name, v, k);
}

static status scale_after_norm(job *j, weight_field norm, weight_field f, float *s) {
    const weight_shape *w = &j->source[f].shape;
    const moments *x = observer_moments(j->seen, f, j->layer, 0);
    TRY(quantise_awq_scales(j->by, s, j->values[f], w->n, w->k, &j->o->precision, x, NULL));
    TRY(divide_norm(j, norm, s));
    scale_columns(j, f, s);
    return ST_OK;
}

/* Rows [at, at + n) of `f` divided by s[0..n). */
static void divide_rows(job *j, weight_field f, int32_t at, int32_t n, const float *s) {
    const int32_t k = j->source[f].shape.k;
    for (int32_t r = 0; r < n; r++)
        for (int32_t i = 0; i < k; i++) j->values[f][(int64_t)(at + r) * k + i] /= s[r];
}

/* v's rows take what o's columns are divided by. Query heads of one KV head share its values, and
 * so their scales. With a bias on v nothing is done. */
static status scale_values(job *j, float *s, int32_t *tie) {
    const model_config *c = j->c;
    const int32_t d = c->head_dim, ratio = c->n_heads / c->n_kv_heads, k = c->n_heads * d;
    if (c->qkv_bias) return ST_OK;
    for (int32_t i = 0; i < k; i++) tie[i] = i / d / ratio * d + i % d;
    const weight_shape *o = &j->source[WEIGHT_o].shape;
    const moments *x = observer_moments(j->seen, WEIGHT_o, j->layer, 0);
    TRY(quantise_awq_scales(j->by, s, j->values[WEIGHT_o], o->n, k, &j->o->precision, x, tie));
    scale_columns(j, WEIGHT_o, s);
    for (int32_t g = 0; g < c->n_kv_heads; g++)
        divide_rows(j, WEIGHT_qkv, (c->n_heads + c->n_kv_heads + g) * d, d,
                    s + (int64_t)g * ratio * d);
    return ST_OK;
}

static status awq_layer(job *j) {
    const model_config *c = j->c;
    const size_t k = (size_t)i64_max(c->dim, i64_max(c->n_heads * c->head_dim, c->ffn_dim));
    float *s = arena_array(&j->layer_memory, float, k);
    int32_t *tie = arena_array(&j->layer_memory, int32_t, k);
    if (!s || !tie) return FAIL(ST_NOMEM, "scales of a layer");
    TRY(scale_after_norm(j, WEIGHT_attn_norm, WEIGHT_qkv, s));
    TRY(scale_values(j, s, tie));
    if (c->n_experts) return ST_OK; /* the router reads the norm too: experts are clipped only */
    TRY(scale_after_norm(j, WEIGHT_ffn_norm, WEIGHT_gate_up, s));
    if (c->activation != ACT_SILU) return ST_OK;
    const weight_shape *down = &j->source[WEIGHT_down].shape;
    const moments *x = observer_moments(j->seen, WEIGHT_down, j->layer, 0);
    TRY(quantise_awq_scales(j->by, s, j->values[WEIGHT_down], down->n, down->k, &j->o->precision, x,
                            NULL));
    scale_columns(j, WEIGHT_down, s);
    divide_rows(j, WEIGHT_gate_up, c->ffn_dim, c->ffn_dim, s);
    return ST_OK;
}

static status do_layer(job *j) {
    TRY(read_layer(j));
    if (j->o->method == QUANTISE_AWQ) TRY(awq_layer(j));
    for (int32_t f = 0; f < WEIGHT_COUNT; f++) {
        if (!weight_field_present(j->c, (weight_field)f) || !j->source[f].shape.quantise) continue;
        const bool expert = f == WEIGHT_experts_gate_up || f == WEIGHT_experts_down;
        if (j->o->layout == SAVE_GPT_OSS && !expert) continue; /* stays in 16 bit */
        for (int32_t e = 0; e < j->source[f].shape.count; e++)
            TRY(write_matrix(j, (weight_field)f, e));
    }
    return ST_OK;
}

/* --- All of it -------------------------------------------------------------------------------- */

static size_t layer_bytes(const model_config *c) {
    size_t bytes = 1 << 20;
    for (int32_t f = 0; f < WEIGHT_COUNT; f++) {
        const weight_shape s = weight_field_shape(c, (weight_field)f);
        bytes += (size_t)s.count * (size_t)s.n * (size_t)s.k * sizeof(float) + 4096;
    }
    return bytes + (size_t)(c->dim + c->ffn_dim + c->n_heads * c->head_dim) * 16;
}

static status done(const job *j) {
    if (j->o->progress) j->o->progress(j->o->user, j->layer + 1, j->c->n_layers);
    return ST_OK;
}

/* As many layers at a time as the moments' memory allows; the text runs once for each turn. */
static status calibrated_layers(job *j, engine *e) {
    const int64_t each = observer_layer_bytes(j->c);
    const int32_t at_once = (int32_t)i64_max(1, i64_min(j->o->memory_bytes / each, j->c->n_layers));
    for (int32_t first = 0; first < j->c->n_layers; first += at_once) {
        const int32_t n = (int32_t)i64_min(at_once, j->c->n_layers - first);
        perplexity_result r;
        TRY(observer_open(&j->seen, e, first, n));
        const int32_t window = (int32_t)i64_min(j->o->window, j->o->n_tokens);
        status st = evaluate_perplexity(e, j->o->token, j->o->n_tokens, window, window - 1, &r);
        if (st == ST_OK) st = observer_end(j->seen);
        for (j->layer = first; st == ST_OK && j->layer < first + n; j->layer++) {
            st = do_layer(j);
            if (st == ST_OK) st = done(j);
        }
        observer_close(j->seen);
        TRY(st);
    }
    return ST_OK;
}

static status calibrated(job *j) {
    const quantise_options *o = j->o;
    if (o->n_tokens < 2 || o->window < 2)
        return FAIL(ST_RANGE, "%lld calibration tokens in windows of %d", (long long)o->n_tokens,
                    o->window);
    engine_options eo = ENGINE_OPTIONS_DEFAULT;
    eo.model = o->model;
    eo.device = o->device;
    eo.device_options.threads = o->threads;
    eo.device_options.no_graphs = true; /* every linear is to be seen */
    eo.policy.token_budget = (int32_t)i64_max(o->window, 64);
    eo.policy.max_seqs = 1;
    eo.max_samples = o->window;
    eo.ctx_max = (int32_t)i64_max(o->window, 64);
    eo.pages = (int32_t)div_up(eo.ctx_max, KV_PAGE_TOKENS) + 1; /* what is left is for moments */
    engine *e;
    TRY(engine_open(&e, &eo, NULL, NULL));
    j->by = engine_device(e)->ops->calibrate;
    const status st = calibrated_layers(j, e);
    engine_close(e);
    return st;
}

static status all_layers(job *j) {
    if (j->o->method != QUANTISE_RTN) return calibrated(j);
    for (j->layer = 0; j->layer < j->c->n_layers; j->layer++) {
        TRY(do_layer(j));
        TRY(done(j));
    }
    return ST_OK;
}

/* The layout of gpt-oss is that of experts in one tensor, inputs before rows. */
static status check_stacked(const job *j) {
    weight_source s;
    if (j->c->n_experts) {
        TRY(checkpoint_source(j->k, WEIGHT_experts_gate_up, 0, &s));
        if (s.part[0].tensor && s.part[0].tensor->n_dims == 3 && s.part[0].col_stride != 1)
            return ST_OK;
    }
    return FAIL(ST_UNSUPPORTED, "%s is no gpt-oss, whose experts alone are stored in that layout",
                j->o->model);
}

static status check_source(const job *j) {
    precision stored = {0};
    const device_ops *d;
    TRY(device_find(&d, j->o->device));
    if (!d->observe)
        return FAIL(ST_UNSUPPORTED, "the %s device has no values to calibrate with", d->name);
    const status st = checkpoint_precision(j->k, &stored);
    if (st != ST_OK || stored.weight != WF_16)
        return FAIL(ST_UNSUPPORTED, "%s is quantised already", j->o->model);
    const weight_format f = j->o->precision.weight;
    if (j->o->method == QUANTISE_AWQ && f != WF_INT4 && f != WF_INT8)
        return FAIL(ST_UNSUPPORTED, "awq makes integer formats, not W%s", weight_format_text(f));
    if (j->o->layout == SAVE_GPT_OSS) TRY(check_stacked(j));
    return model_fits_precision(j->c, &j->o->precision, 1);
}

static bool same_folder(const char *a, const char *b) {
    struct stat x, y;
    return stat(a, &x) == 0 && stat(b, &y) == 0 && x.st_dev == y.st_dev && x.st_ino == y.st_ino;
}

/* What needs no file of the source. */
static status check_options(const quantise_options *o, const char *dir) {
    if (o->precision.weight == WF_16) return FAIL(ST_USAGE, "W16 is what the source is in");
    if (same_folder(dir, o->out)) return FAIL(ST_USAGE, "%s is the source itself", o->out);
    return ST_OK;
}

/* A folder that takes what will be written, or it turns out after hours that it does not. The size
 * is an estimate, of which a tenth is not asked for. */
static status make_room(const job *j) {
    struct statvfs disk;
    TRY(file_make_dirs(j->o->out));
    const int64_t bytes = checkpoint_weight_bytes(j->k, &j->o->precision, 1);
    if (statvfs(j->o->out, &disk) != 0) return ST_OK;
    const double left = (double)disk.f_bavail * (double)disk.f_frsize;
    if (left < 0.9 * (double)bytes)
        return FAIL(ST_OOM, "%s: about %.3g GB will be written, %.3g GB are free", j->o->out,
                    (double)bytes * 1e-9, left * 1e-9);
    return ST_OK;
}

status quantise_checkpoint(const quantise_options *o) {
    char dir[1024];
    model_config *c = mem_alloc(1, sizeof *c);
    checkpoint *k = NULL;
    job *j = mem_alloc(1, sizeof *j);
    status st = c && j ? ST_OK : FAIL(ST_NOMEM, "quantiser");
    if (st == ST_OK) st = model_dir(dir, sizeof dir, o->model);
    if (st == ST_OK) st = check_options(o, dir);
    if (st == ST_OK) st = model_config_load(c, dir);
    if (st == ST_OK) st = checkpoint_open(&k, c, dir, 0);
    if (st == ST_OK) {
        *j = (job){.o = o, .k = k, .c = c};
        st = check_source(j);
    }
    if (st == ST_OK) st = save_open(&j->out, dir, o->layout, &o->precision);
    if (st == ST_OK) st = make_room(j);
    if (st == ST_OK) st = arena_open(&j->layer_memory, layer_bytes(c));
    if (st == ST_OK) st = all_layers(j);
    if (st == ST_OK) st = save_write(j->out, o->out);
    if (j) {
        arena_close(&j->layer_memory);
        save_close(j->out);
    }
    checkpoint_close(k);
    mem_free(j);
    mem_free(c);
    return st;
}
