/* ref_calibrate.c - see calibrate.h. */
#include "calibrate.h"

#include "ref_linear.h"

#include <math.h>
#include <omp.h>
#include <string.h>

enum {
    ROWS = 256, /* of x transposed at a time: k floats each stay in L2 */
    E_ROWS = 32 /* of a product with the moments at a time */
};

/* --- Moments ---------------------------------------------------------------------------------- */

struct calibrate_sums {
    moments *m;
};

static status sums_open(calibrate_sums **out, moments *m) {
    *out = mem_alloc(1, sizeof **out);
    if (!*out) return FAIL(ST_NOMEM, "moments");
    (*out)->m = m;
    return ST_OK;
}

static status sums_end(calibrate_sums *s) {
    mem_free(s);
    return ST_OK;
}

/* 1 / root mean square of a row; 0 for a row of zeros. */
static float weight_of_row(const float *x, int32_t k) {
    double sum = 0;
    for (int32_t i = 0; i < k; i++) sum += (double)x[i] * (double)x[i];
    return sum > 0 ? (float)(1 / sqrt(sum / k)) : 0;
}

static status sums_add(calibrate_sums *s, const void *data, dtype type, const int32_t *row,
                       int64_t n, kernel_stream stream) {
    moments *m = s->m;
    const int32_t k = m->k;
    const float *x = data;
    float *turned = mem_alloc((size_t)k * ROWS, sizeof *turned); /* [k, count] */
    float *product = mem_alloc((size_t)k * (size_t)omp_get_max_threads(), sizeof *product);
    const status st = turned && product ? ST_OK : FAIL(ST_NOMEM, "moments of %d inputs", k);
    CHECK(type == DT_F32);
    (void)stream;
    for (int64_t at = 0; at < n && st == ST_OK; at += ROWS) {
        const int32_t count = (int32_t)i64_min(ROWS, n - at);
        for (int32_t r = 0; r < count; r++) {
            const float *from = x + (row ? row[at + r] : at + r) * k;
            const float factor = weight_of_row(from, k);
            for (int32_t i = 0; i < k; i++) {
                turned[(int64_t)i * count + r] = from[i] * factor;
                m->magnitude[i] += fabs((double)from[i]) * (double)factor;
            }
        }
#pragma omp parallel for schedule(static) if (k >= 128)
        for (int32_t i = 0; i < k; i++) {
            float *mine = product + (int64_t)omp_get_thread_num() * k;
            ref_linear_lanes(mine, k, turned + (int64_t)i * count, count, turned, count, NULL, 1, k,
                             count);
            for (int32_t j = 0; j < k; j++) m->gram[(int64_t)i * k + j] += (double)mine[j];
        }
    }
    if (st == ST_OK) m->rows += n;
    mem_free(turned);
    mem_free(product);
    return st;
}

/* --- GPTQ ------------------------------------------------------------------------------------- */

typedef struct {
    arena memory;
    int32_t k;
    const int32_t *column;
    double *h, *u; /* [k, k]: H, then R with H = R R^T; U = R^-1, both upper triangles */
} solver;

static status solver_open(solver *s, int32_t k, const int32_t *column) {
    const size_t kk = (size_t)k * (size_t)k;
    *s = (solver){.k = k, .column = column};
    TRY(arena_open(&s->memory, 2 * kk * sizeof(double) + 4096));
    s->h = arena_array(&s->memory, double, kk);
    s->u = arena_array(&s->memory, double, kk);
    if (s->h && s->u) return ST_OK;
    arena_close(&s->memory);
    return FAIL(ST_NOMEM, "moments of %d inputs", k);
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
static status solve(solver *s, const double *gram, double damp) {
    const int32_t k = s->k;
    for (int32_t i = 0; i < k; i++)
        for (int32_t j = 0; j < k; j++)
            s->h[(int64_t)i * k + j] = gram[(int64_t)s->column[i] * k + s->column[j]];
    for (int32_t i = 0; i < k; i++) s->h[(int64_t)i * k + i] += damp;
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

static status gptq(qmatrix *q, float *w, const double *gram, double damp, const int32_t *column) {
    solver s;
    TRY(solver_open(&s, q->k, column));
    const status st = solve(&s, gram, damp);
    if (st == ST_OK) {
        for (int32_t i = 0; i < s.k; i++)
            for (int32_t j = i; j < s.k; j++) s.h[(int64_t)i * s.k + j] = s.u[(int64_t)j * s.k + i];
#pragma omp parallel for schedule(static)
        for (int32_t r = 0; r < q->n; r++) round_row(q, r, w + (int64_t)r * q->k, &s);
    }
    arena_close(&s.memory);
    return st;
}

/* --- Losses ----------------------------------------------------------------------------------- */

struct calibrate_search {
    arena memory;
    int32_t n, k, group;
    const float *w, *gram;
    float *changed, *error, *product; /* [n, k] each */
    qmatrix q;
};

static void search_close(calibrate_search *s) {
    if (s) arena_close(&s->memory);
    mem_free(s);
}

static status search_open(calibrate_search **out, const float *w, int32_t n, int32_t k,
                          const precision *p, const float *gram) {
    const size_t nk = (size_t)n * (size_t)k;
    *out = NULL;
    calibrate_search *s = mem_alloc(1, sizeof *s);
    if (!s) return FAIL(ST_NOMEM, "search");
    *s = (calibrate_search){.n = n, .k = k, .group = p->group ? p->group : k, .w = w, .gram = gram};
    status st = arena_open(&s->memory, nk * 20 + ((size_t)n + (size_t)k) * 64 + 65536);
    if (st == ST_OK) {
        s->changed = arena_array(&s->memory, float, nk);
        s->error = arena_array(&s->memory, float, nk);
        s->product = arena_array(&s->memory, float, nk);
        st = s->changed && s->error && s->product ? qmatrix_alloc(&s->q, &s->memory, p, n, k)
                                                  : FAIL(ST_NOMEM, "search of %d x %d", n, k);
    }
    if (st == ST_OK)
        *out = s;
    else
        search_close(s);
    return st;
}

static status search_scaled(calibrate_search *s, const float *scale, double *loss) {
    const int32_t n = s->n, k = s->k;
    for (int64_t i = 0; i < (int64_t)n * k; i++) s->changed[i] = s->w[i] * scale[i % k];
    TRY(ref_quantize_weight(&s->q, s->changed));
    double sum = 0;
#pragma omp parallel for schedule(static) reduction(+ : sum)
    for (int32_t r0 = 0; r0 < n; r0 += E_ROWS) {
        const int32_t rows = (int32_t)i64_min(E_ROWS, n - r0);
        float *e = s->error + (int64_t)r0 * k, *y = s->product + (int64_t)r0 * k;
        const float *was = s->w + (int64_t)r0 * k;
        ref_dequantize_weight(e, &s->q, r0, rows);
        for (int64_t i = 0; i < (int64_t)rows * k; i++) e[i] = e[i] / scale[i % k] - was[i];
        ref_linear_lanes(y, k, e, k, s->gram, k, NULL, rows, k, k);
        for (int64_t i = 0; i < (int64_t)rows * k; i++) sum += (double)y[i] * (double)e[i];
    }
    *loss = sum;
    return ST_OK;
}

void ref_calibrate_cut(float *to, const float *x, int32_t n, calibrate_cut at) {
    float lo = 0, hi = 0;
    for (int32_t i = 0; i < n; i++) {
        lo = x[i] < lo ? x[i] : lo;
        hi = x[i] > hi ? x[i] : hi;
    }
    lo *= at.lo;
    hi *= at.hi;
    for (int32_t i = 0; i < n; i++) to[i] = x[i] < lo ? lo : x[i] > hi ? hi : x[i];
}

/* Of rows [r0, r0 + rows). */
static void cut_losses(calibrate_search *s, double *loss, int32_t r0, int32_t rows) {
    const int32_t k = s->k, groups = (int32_t)div_up(k, s->group);
    float *e = s->error + (int64_t)r0 * k, *y = s->product + (int64_t)r0 * k;
    ref_dequantize_weight(e, &s->q, r0, rows);
    for (int64_t i = 0; i < (int64_t)rows * k; i++) e[i] -= s->w[(int64_t)r0 * k + i];
    for (int32_t g = 0; g < groups; g++) {
        const int32_t at = g * s->group, size = (int32_t)i64_min(s->group, k - at);
        ref_linear_lanes(y, size, e + at, k, s->gram + (int64_t)at * k + at, k, NULL, rows, size,
                         size);
        for (int32_t r = 0; r < rows; r++) {
            double sum = 0;
            for (int32_t i = 0; i < size; i++)
                sum += (double)y[(int64_t)r * size + i] * (double)e[(int64_t)r * k + at + i];
            loss[(int64_t)(r0 + r) * groups + g] = sum;
        }
    }
}

static status search_cut(calibrate_search *s, const calibrate_cut *cut, double *loss) {
    const int32_t n = s->n, k = s->k;
    const int64_t groups = div_up(k, s->group);
    for (int64_t i = 0; i < n * groups; i++) {
        const int64_t col = i % groups * s->group, at = i / groups * k + col;
        ref_calibrate_cut(s->changed + at, s->w + at, (int32_t)i64_min(s->group, k - col), cut[i]);
    }
    TRY(ref_quantize_weight(&s->q, s->changed));
#pragma omp parallel for schedule(static)
    for (int32_t r = 0; r < n; r += E_ROWS) cut_losses(s, loss, r, (int32_t)i64_min(E_ROWS, n - r));
    return ST_OK;
}

const calibrate_ops ref_calibrate = {
    .sums_open = sums_open,
    .sums_add = sums_add,
    .sums_end = sums_end,
    .gptq = gptq,
    .search_open = search_open,
    .search_scaled = search_scaled,
    .search_cut = search_cut,
    .search_close = search_close,
};
