/* quantise.c - see quantise.h. A fused weight (q | k | v) is one matrix here, since its parts share
 * their inputs, and is cut into the source's tensors when it is written; NVFP4's global scale is so
 * the same for all of them, as loaders want it.
 *
 * Easy to get wrong: a norm is stored in 16 bit, so what the weights are multiplied with is the
 * ratio of the old norm to the rounded new one, not the scale that was searched for. */
#include "quantise.h"

#include "evaluate.h"
#include "ref_linear.h"

#include <float.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

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

/* --- GPTQ --------------------------------------------------------------------------------------
 */

typedef struct {
    arena memory;
    int32_t k;
    int32_t *column; /* [k] order of processing */
    double *h, *u;   /* [k, k]: H, then R with H = R R^T; U = R^-1, both upper triangles */
} solver;

static int by_diagonal(const void *a, const void *b) {
    const double *const *x = a, *const *y = b;
    if (**x != **y) return **x > **y ? -1 : 1;
    return *x < *y ? -1 : *x > *y;
}

static status solver_open(solver *s, int32_t k) {
    const size_t kk = (size_t)k * (size_t)k;
    *s = (solver){.k = k};
    TRY(arena_open(&s->memory, 2 * kk * sizeof(double) + (size_t)k * 16 + 4096));
    s->column = arena_array(&s->memory, int32_t, (size_t)k);
    s->h = arena_array(&s->memory, double, kk);
    s->u = arena_array(&s->memory, double, kk);
    if (s->column && s->h && s->u) return ST_OK;
    arena_close(&s->memory);
    return FAIL(ST_NOMEM, "moments of %d inputs", k);
}

static status order_columns(solver *s, const double *gram, bool act_order) {
    const int32_t k = s->k;
    const size_t mark = s->memory.used;
    const double **at = arena_array(&s->memory, const double *, (size_t)k);
    if (!at) return FAIL(ST_NOMEM, "order of %d inputs", k);
    for (int32_t i = 0; i < k; i++) at[i] = &gram[(int64_t)i * k + i];
    if (act_order) qsort(at, (size_t)k, sizeof *at, by_diagonal);
    for (int32_t i = 0; i < k; i++) s->column[i] = (int32_t)((at[i] - gram) / (k + 1));
    arena_reset(&s->memory, mark);
    return ST_OK;
}

/* H = R R^T with R upper triangular, in place; false when H is not positive. */
static bool factor(double *h, int32_t k) {
    for (int32_t j = k - 1; j >= 0; j--) {
        double *row = h + (int64_t)j * k;
        double d = row[j];
        for (int32_t p = j + 1; p < k; p++) d -= row[p] * row[p];
        if (!(d > 0)) return false;
        d = row[j] = sqrt(d);
#pragma omp parallel for schedule(static) if (j > 256)
        for (int32_t i = 0; i < j; i++) {
            double *other = h + (int64_t)i * k, x = other[j];
            for (int32_t p = j + 1; p < k; p++) x -= other[p] * row[p];
            other[j] = x / d;
        }
    }
    return true;
}

/* u = the transpose of U = R^-1, whose columns are made upwards: u[j][i] = U[i][j]. */
static void invert(double *u, const double *r, int32_t k) {
#pragma omp parallel for schedule(dynamic, 16) if (k > 256)
    for (int32_t j = 0; j < k; j++) {
        double *v = u + (int64_t)j * k; /* v[i] = U[i][j] */
        v[j] = 1 / r[(int64_t)j * k + j];
        for (int32_t i = j - 1; i >= 0; i--) {
            const double *row = r + (int64_t)i * k;
            double x = 0;
            for (int32_t p = i + 1; p <= j; p++) x += row[p] * v[p];
            v[i] = -x / row[i];
        }
    }
}

/* H = damped gram in processing order; then U, transposed: u[j][i] = U[i][j]. */
static status solve(solver *s, const double *gram, double damp, bool act_order) {
    const int32_t k = s->k;
    TRY(order_columns(s, gram, act_order));
    double mean = 0;
    for (int32_t i = 0; i < k; i++) mean += gram[(int64_t)i * k + i] / k;
    if (!(mean > 0)) mean = 1; /* nothing was seen: every input counts the same */
    for (int32_t i = 0; i < k; i++)
        for (int32_t j = 0; j < k; j++)
            s->h[(int64_t)i * k + j] = gram[(int64_t)s->column[i] * k + s->column[j]];
    for (int32_t i = 0; i < k; i++) s->h[(int64_t)i * k + i] += damp * mean;
    if (!factor(s->h, k))
        return FAIL(ST_RANGE, "moments of %d inputs are singular: more text or more damping", k);
    invert(s->u, s->h, k);
    return ST_OK;
}

/* One row: w in the order of processing, in double; the error of each column moves to the later. */
static void round_row(qmatrix *q, int32_t row, float *w, const solver *s) {
    const int32_t k = s->k;
    for (int32_t i = 0; i < k; i++) {
        const int32_t c = s->column[i];
        const float value = ref_quantize_element(q, row, c, w[c]);
        const double error = ((double)w[c] - value) / s->u[(int64_t)i * k + i];
        /* u is transposed: U[i][j] lies at [j][i]; h holds a contiguous copy in its row i. */
        const double *next = s->h + (int64_t)i * k;
        for (int32_t j = i + 1; j < k; j++)
            w[s->column[j]] = (float)((double)w[s->column[j]] - error * next[j]);
    }
}

status quantise_gptq(qmatrix *q, float *w, const double *gram, double damp, bool act_order) {
    solver s;
    TRY(solver_open(&s, q->k));
    const status st = solve(&s, gram, damp, act_order);
    if (st == ST_OK) {
        for (int32_t i = 0; i < s.k; i++)
            for (int32_t j = i; j < s.k; j++) s.h[(int64_t)i * s.k + j] = s.u[(int64_t)j * s.k + i];
#pragma omp parallel for schedule(static)
        for (int32_t r = 0; r < q->n; r++) round_row(q, r, w + (int64_t)r * q->k, &s);
    }
    arena_close(&s.memory);
    return st;
}

/* --- AWQ ---------------------------------------------------------------------------------------
 */

enum {
    SEARCH_STEPS = 20, /* as AutoAWQ: exponents by 0.05 */
    CLIP_STEPS = 10,   /* down to half */
    END_STEPS = 4,     /* 20 % up and down */
    ROWS = 32          /* of a product with the moments at a time */
};

typedef struct {
    arena memory;
    const precision *p;
    int32_t n, k;
    float *scaled, *error, *product, *gram; /* [n, k], [n, k], [n, k], [k, k] */
    qmatrix q;
} search;

static status search_open(search *s, int32_t n, int32_t k, const precision *p, const double *gram) {
    const size_t nk = (size_t)n * (size_t)k, kk = (size_t)k * (size_t)k;
    *s = (search){.p = p, .n = n, .k = k};
    TRY(arena_open(&s->memory, nk * 24 + kk * 4 + ((size_t)n + (size_t)k) * 64 + 65536));
    s->scaled = arena_array(&s->memory, float, nk);
    s->error = arena_array(&s->memory, float, nk);
    s->product = arena_array(&s->memory, float, nk);
    s->gram = arena_array(&s->memory, float, kk);
    status st =
        s->scaled && s->error && s->product && s->gram ? ST_OK : FAIL(ST_NOMEM, "%d x %d", n, k);
    if (st == ST_OK) st = qmatrix_alloc(&s->q, &s->memory, p, n, k);
    if (st != ST_OK) {
        arena_close(&s->memory);
        return st;
    }
    double largest = 0; /* f32 from here on, so in units of the largest moment */
    for (int32_t i = 0; i < k; i++) largest = fmax(largest, gram[(int64_t)i * k + i]);
    for (size_t i = 0; i < kk; i++)
        s->gram[i] = (float)(largest > 0 ? gram[i] / largest : i % (size_t)(k + 1) == 0);
    return ST_OK;
}

/* sum over rows of e H e^T, where e = Q(w s) / s - w. */
static status scaled_loss(search *s, const float *w, const float *scale, double *loss) {
    const int32_t n = s->n, k = s->k;
    for (int32_t r = 0; r < n; r++)
        for (int32_t i = 0; i < k; i++)
            s->scaled[(int64_t)r * k + i] = w[(int64_t)r * k + i] * scale[i];
    TRY(ref_quantize_weight(&s->q, s->scaled));
    double sum = 0;
#pragma omp parallel for schedule(static) reduction(+ : sum)
    for (int32_t r0 = 0; r0 < n; r0 += ROWS) {
        const int32_t rows = (int32_t)i64_min(ROWS, n - r0);
        float *e = s->error + (int64_t)r0 * k, *y = s->product + (int64_t)r0 * k;
        const float *was = w + (int64_t)r0 * k;
        ref_dequantize_weight(e, &s->q, r0, rows);
        for (int64_t i = 0; i < (int64_t)rows * k; i++) e[i] = e[i] / scale[i % k] - was[i];
        ref_linear_lanes(y, k, e, k, s->gram, k, NULL, rows, k, k);
        for (int64_t i = 0; i < (int64_t)rows * k; i++) sum += (double)y[i] * (double)e[i];
    }
    *loss = sum;
    return ST_OK;
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
    float *try = arena_array(&s->memory, float, (size_t)k);
    double *xm = arena_array(&s->memory, double, (size_t)k);
    double *wm = arena_array(&s->memory, double, (size_t)k);
    double *sum = arena_array(&s->memory, double, 2 * (size_t)k);
    if (!try || !xm || !wm || !sum) return FAIL(ST_NOMEM, "scales of %d inputs", k);
    for (int32_t i = 0; i < k; i++) xm[i] = x->rows ? x->magnitude[i] / (double)x->rows : 1;
    relative_magnitude(wm, w, s->n, k, s->p->group ? s->p->group : k);
    tie_values(xm, tie, k, sum);
    tie_values(wm, tie, k, sum);
    double least;
    for (int32_t i = 0; i < k; i++) best[i] = 1;
    TRY(scaled_loss(s, w, best, &least));
    for (int32_t step = 1; step <= 2 * SEARCH_STEPS; step++) {
        double loss;
        const int32_t r = (step - 1) % SEARCH_STEPS + (step <= SEARCH_STEPS);
        candidate(try, xm, wm, k, (double)r / SEARCH_STEPS, step > SEARCH_STEPS);
        TRY(scaled_loss(s, w, try, &loss));
        if (!(loss < least)) continue;
        least = loss;
        memcpy(best, try, (size_t)k * sizeof *best);
    }
    return ST_OK;
}

status quantise_awq_scales(float *s, const float *w, int32_t n, int32_t k, const precision *p,
                           const moments *x, const int32_t *tie) {
    search all;
    TRY(search_open(&all, n, k, p, x->gram));
    const status st = search_scales(&all, s, w, x, tie);
    arena_close(&all.memory);
    return st;
}

/* Where a group's range is cut: its lowest value times lo, its highest times hi. */
typedef struct {
    float lo, hi;
} cut;

typedef struct {
    double *least; /* [n, groups] loss with `best` */
    cut *best, *base;
} cuts;

static void clip_group(float *to, const float *x, int32_t n, cut at) {
    float lo = 0, hi = 0;
    for (int32_t i = 0; i < n; i++) {
        lo = x[i] < lo ? x[i] : lo;
        hi = x[i] > hi ? x[i] : hi;
    }
    lo *= at.lo;
    hi *= at.hi;
    for (int32_t i = 0; i < n; i++) to[i] = x[i] < lo ? lo : x[i] > hi ? hi : x[i];
}

/* Loss of every group of rows [r0, r0 + rows), e H e^T within the group; better cuts are kept. */
static void judge_rows(search *s, const float *w, cuts *c, int32_t r0, int32_t rows, cut factor) {
    const int32_t k = s->k, group = s->p->group ? s->p->group : k;
    const int32_t groups = (int32_t)div_up(k, group);
    float *e = s->error + (int64_t)r0 * k, *y = s->product + (int64_t)r0 * k;
    ref_dequantize_weight(e, &s->q, r0, rows);
    for (int64_t i = 0; i < (int64_t)rows * k; i++) e[i] -= w[(int64_t)r0 * k + i];
    for (int32_t g = 0; g < groups; g++) {
        const int32_t at = g * group, size = (int32_t)i64_min(group, k - at);
        ref_linear_lanes(y, size, e + at, k, s->gram + (int64_t)at * k + at, k, NULL, rows, size,
                         size);
        for (int32_t r = 0; r < rows; r++) {
            double loss = 0;
            for (int32_t i = 0; i < size; i++)
                loss += (double)y[(int64_t)r * size + i] * (double)e[(int64_t)r * k + at + i];
            const int64_t which = (int64_t)(r0 + r) * groups + g;
            if (!(loss < c->least[which])) continue;
            c->least[which] = loss;
            c->best[which] = (cut){c->base[which].lo * factor.lo, c->base[which].hi * factor.hi};
        }
    }
}

/* All groups at their base cuts times `factor`. */
static status try_cut(search *s, const float *w, cuts *c, cut factor) {
    const int32_t n = s->n, k = s->k, group = s->p->group ? s->p->group : k;
    const int64_t groups = div_up(k, group);
    for (int64_t i = 0; i < n * groups; i++) {
        const int64_t at = i / groups * k + i % groups * group;
        const int32_t size = (int32_t)i64_min(group, k - i % groups * group);
        clip_group(s->scaled + at, w + at, size,
                   (cut){c->base[i].lo * factor.lo, c->base[i].hi * factor.hi});
    }
    TRY(ref_quantize_weight(&s->q, s->scaled));
#pragma omp parallel for schedule(static)
    for (int32_t r = 0; r < n; r += ROWS)
        judge_rows(s, w, c, r, (int32_t)i64_min(ROWS, n - r), factor);
    return ST_OK;
}

/* Both ends together by halves of a tenth, then each end alone around what that found. */
static status search_cuts(search *s, const float *w, cuts *c) {
    const int32_t groups = (int32_t)div_up(s->k, s->p->group ? s->p->group : s->k);
    const size_t bytes = (size_t)s->n * (size_t)groups * sizeof(cut);
    for (int32_t i = 0; i < s->n * groups; i++) {
        c->least[i] = DBL_MAX;
        c->best[i] = (cut){1, 1};
    }
    memcpy(c->base, c->best, bytes);
    for (int32_t i = 0; i <= CLIP_STEPS; i++) {
        const float f = 1 - 0.5f * (float)i / CLIP_STEPS;
        TRY(try_cut(s, w, c, (cut){f, f}));
    }
    for (int32_t end = 0; end < 2; end++) {
        memcpy(c->base, c->best, bytes);
        for (int32_t i = -END_STEPS; i <= END_STEPS; i++) {
            const float f = 1 + 0.05f * (float)i;
            if (i) TRY(try_cut(s, w, c, end ? (cut){1, f} : (cut){f, 1}));
        }
    }
    return ST_OK;
}

status quantise_clip(float *out, const float *w, int32_t n, int32_t k, const precision *p,
                     const double *gram) {
    const int32_t group = p->group ? p->group : k;
    const int64_t groups = div_up(k, group), count = n * groups;
    search s;
    TRY(search_open(&s, n, k, p, gram));
    cuts c = {.least = mem_alloc((size_t)count, sizeof *c.least),
              .best = mem_alloc((size_t)count, sizeof *c.best),
              .base = mem_alloc((size_t)count, sizeof *c.base)};
    status st =
        c.least && c.best && c.base ? search_cuts(&s, w, &c) : FAIL(ST_NOMEM, "%d x %d", n, k);
    for (int64_t i = 0; st == ST_OK && i < count; i++) {
        const int64_t at = i / groups * k + i % groups * group;
        clip_group(out + at, w + at, (int32_t)i64_min(group, k - i % groups * group), c.best[i]);
    }
    mem_free(c.least);
    mem_free(c.best);
    mem_free(c.base);
    arena_close(&s.memory);
    return st;
}

/* --- A layer -----------------------------------------------------------------------------------
 */

typedef struct {
    const quantise_options *o;
    const checkpoint *k;
    const model_config *c;
    save *out;
    observer *seen; /* NULL for rtn */
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
        for (int32_t i = 0; i < s->shape.count * s->shape.n; i++)
            weight_source_row(s, i / s->shape.n, i % s->shape.n,
                              j->values[f] + (int64_t)i * s->shape.k);
    }
    return ST_OK;
}

/* Rows [at, at + rows) of q as a matrix of their own. */
static qmatrix slice(const qmatrix *q, int32_t at, int32_t rows) {
    qmatrix s = *q;
    const bool four = q->format == WF_INT4 || q->format == WF_MXFP4 || q->format == WF_NVFP4;
    const int64_t groups = div_up(q->k, q->group);
    s.n = rows;
    s.code += (int64_t)at * q->k / (four ? 2 : 1);
    s.scale = (uint8_t *)s.scale + dtype_bytes(q->scale_type, at / q->block_n * groups);
    if (s.zero) s.zero += at * groups;
    return s;
}

static status write_parts(job *j, weight_field f, int32_t index, const qmatrix *q) {
    const weight_source *s = &j->source[f];
    const int32_t each = s->n_parts / s->shape.count;
    const matrix_part *p = s->part + (int64_t)index * each;
    for (int32_t i = 0; i < each; i++, p++) {
        if (!p->tensor || p->tensor->n_dims != 2 || p->tensor->dim[0] != p->rows)
            return FAIL(ST_UNSUPPORTED, "%s: its tensors hold more than one linear", s->name);
        if (p->row_at % q->block_n)
            return FAIL(ST_UNSUPPORTED, "tensor '%s' begins inside a block of %d rows",
                        p->tensor->name, q->block_n);
        const qmatrix rows = slice(q, p->row_at, p->rows);
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
        st = clipped ? quantise_clip(clipped, w, s->n, s->k, p, x->gram)
                     : FAIL(ST_NOMEM, "%d x %d", s->n, s->k);
    }
    if (st == ST_OK) st = ref_quantize_weight(&q, clipped);
    if (st == ST_OK && j->o->method == QUANTISE_GPTQ)
        st = quantise_gptq(&q, w, x->gram, j->o->damp, j->o->act_order);
    if (st == ST_OK) st = write_parts(j, f, index, &q);
    arena_close(&a);
    return st == ST_OK ? st : fail_prefix(st, "%s", j->source[f].name);
}

/* --- AWQ's scales, layer by layer ----------------------------------------------------------------
 */

/* Columns times s, and the moments of what they are now fed: x / s. */
static void scale_columns(job *j, weight_field f, const float *s) {
    const weight_shape *w = &j->source[f].shape;
    float *v = j->values[f];
    for (int64_t r = 0; r < (int64_t)w->count * w->n; r++)
        for (int32_t i = 0; i < w->k; i++) v[r * w->k + i] *= s[i];
    if (!w->quantise) return;
    for (int32_t e = 0; e < w->count; e++) {
        const moments *m = observer_moments(j->seen, f, j->layer, e);
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
    TRY(quantise_awq_scales(s, j->values[f], w->n, w->k, &j->o->precision, x, NULL));
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
    TRY(quantise_awq_scales(s, j->values[WEIGHT_o], o->n, k, &j->o->precision, x, tie));
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
    TRY(quantise_awq_scales(s, j->values[WEIGHT_down], down->n, down->k, &j->o->precision, x,
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
        for (int32_t e = 0; e < j->source[f].shape.count; e++)
            TRY(write_matrix(j, (weight_field)f, e));
    }
    return ST_OK;
}

/* --- All of it ---------------------------------------------------------------------------------
 */

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
    eo.policy.token_budget = (int32_t)i64_max(o->window, 64);
    eo.policy.max_seqs = 1;
    eo.max_samples = o->window;
    eo.ctx_max = (int32_t)i64_max(o->window, 64);
    engine *e;
    TRY(engine_open(&e, &eo, NULL, NULL));
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

static status check_source(const job *j) {
    precision stored = {0};
    const status st = checkpoint_precision(j->k, &stored);
    if (st != ST_OK || stored.weight != WF_16)
        return FAIL(ST_UNSUPPORTED, "%s is quantised already", j->o->model);
    const weight_format f = j->o->precision.weight;
    if (j->o->method == QUANTISE_AWQ && f != WF_INT4 && f != WF_INT8)
        return FAIL(ST_UNSUPPORTED, "awq makes integer formats, not W%s", weight_format_text(f));
    return model_fits_precision(j->c, &j->o->precision, 1);
}

status quantise_checkpoint(const quantise_options *o) {
    char dir[1024];
    model_config *c = mem_alloc(1, sizeof *c);
    checkpoint *k = NULL;
    job *j = mem_alloc(1, sizeof *j);
    status st = c && j ? ST_OK : FAIL(ST_NOMEM, "quantiser");
    if (st == ST_OK) st = model_dir(dir, sizeof dir, o->model);
    if (st == ST_OK) st = model_config_load(c, dir);
    if (st == ST_OK) st = checkpoint_open(&k, c, dir, 0);
    if (st == ST_OK) {
        *j = (job){.o = o, .k = k, .c = c};
        st = check_source(j);
    }
    if (st == ST_OK) st = save_open(&j->out, dir, o->layout, &o->precision);
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
