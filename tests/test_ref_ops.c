/* test_ref_ops.c - the definitions against formulas written again, in double and without sharing
 * code.
 *
 * A tolerance is unit roundoffs (u = 2^-24) times the operations in a row between input and output;
 * a twin moves one element of the input by a percent of its size and must be noticed. */
#include "test.h"

#include "ref_activation.h"
#include "ref_attention.h"
#include "ref_linear.h"
#include "ref_moe.h"
#include "ref_norm.h"
#include "ref_quant.h"
#include "ref_rope.h"
#include "rng.h"
#include <string.h>

static const double u = 0x1p-24;

static float *floats(int64_t n) {
    float *v = mem_alloc((size_t)(n > 0 ? n : 1), sizeof *v);
    assert_non_null(v);
    return v;
}

static float *gaussian(rng *r, int64_t n) {
    float *v = floats(n);
    for (int64_t i = 0; i < n; i++) v[i] = (float)rng_normal(r);
    return v;
}

/* --- Norm ------------------------------------------------------------------------------------- */

static void naive_norm(float *y, const float *x, const float *w, int32_t rows, int32_t cols,
                       double eps) {
    for (int32_t r = 0; r < rows; r++) {
        double sum = 0;
        for (int32_t i = cols - 1; i >= 0; i--) sum += pow((double)x[r * cols + i], 2);
        for (int32_t i = 0; i < cols; i++)
            y[r * cols + i] =
                (float)((double)x[r * cols + i] / sqrt(sum / cols + eps) * (double)w[i]);
    }
}

static void test_norm(void **state) {
    (void)state;
    rng r;
    rng_seed(&r, 1, 0);
    const int32_t rows[] = {1, 3, 2, 5}, cols[] = {1, 7, 64, 257};
    for (int32_t c = 0; c < COUNT_OF(rows); c++) {
        const int32_t n = rows[c] * cols[c];
        float *x = gaussian(&r, n), *add = gaussian(&r, n), *w = gaussian(&r, cols[c]);
        float *y = floats(n), *want = floats(n), *stream = floats(n);
        naive_norm(want, x, w, rows[c], cols[c], 1e-5);
        ref_rmsnorm(y, x, w, rows[c], cols[c], 1e-5f);
        assert_at_most(relative_error(y, want, n), 3 * u);

        memcpy(stream, x, sizeof(float) * (size_t)n); /* with the residual, out over `add` */
        for (int32_t i = 0; i < n; i++) x[i] += add[i];
        naive_norm(want, x, w, rows[c], cols[c], 1e-5);
        ref_norm_add(add, stream, add, w, rows[c], cols[c], 1e-5f);
        assert_memory_equal(stream, x, sizeof(float) * (size_t)n);
        assert_at_most(relative_error(add, want, n), 3 * u);

        w[cols[c] / 2] *= 1.01f; /* twin */
        ref_rmsnorm(y, x, w, rows[c], cols[c], 1e-5f);
        assert_more(relative_error(y, want, n), 3 * u);
        float *const all[] = {x, add, w, y, want, stream};
        for (int32_t i = 0; i < COUNT_OF(all); i++) mem_free(all[i]);
    }
    const float zero[4] = {0}, one[4] = {1, 1, 1, 1};
    float y[4] = {9, 9, 9, 9};
    ref_rmsnorm(y, zero, one, 0, 4, 1e-5f); /* no rows: nothing is written */
    assert_true(y[0] == 9);
    ref_rmsnorm(y, zero, one, 1, 4, 1e-5f);
    for (int i = 0; i < 4; i++) assert_true(y[i] == 0);
}

/* --- RoPE ------------------------------------------------------------------------------------- */

static void test_rope(void **state) {
    (void)state;
    enum { HEADS = 3, D = 8, HALF = D / 2 };
    rng r;
    rng_seed(&r, 2, 0);
    const int32_t position[] = {0, 1, 63, 1000003};
    for (int32_t c = 0; c < COUNT_OF(position); c++) {
        double inv_freq[HALF], factor = c == 1 ? 1.3 : 1;
        float cosine[HALF], sine[HALF], *x = gaussian(&r, HEADS * D), *want = floats(HEADS * D);
        for (int d = 0; d < HALF; d++) inv_freq[d] = pow(10000, -2.0 * d / D);
        for (int h = 0; h < HEADS; h++)
            for (int d = 0; d < HALF; d++) { /* as a complex product */
                const double a = position[c] * inv_freq[d], re = (double)x[h * D + d];
                const double im = (double)x[h * D + d + HALF];
                want[h * D + d] = (float)(factor * (re * cos(a) - im * sin(a)));
                want[h * D + d + HALF] = (float)(factor * (re * sin(a) + im * cos(a)));
            }
        ref_rope_angles(cosine, sine, inv_freq, factor, position[c], HALF);
        float *y = floats(HEADS * D);
        memcpy(y, x, sizeof(float) * HEADS * D);
        ref_rope(y, HEADS, D, cosine, sine);
        assert_at_most(relative_error(y, want, HEADS * D), 4 * u);
        if (c == 0) assert_memory_equal(y, x, sizeof(float) * HEADS * D);
        ref_rope_angles(cosine, sine, inv_freq, factor, position[c] + 1, HALF); /* twin */
        ref_rope(x, HEADS, D, cosine, sine);
        assert_more(relative_error(x, want, HEADS * D), 4 * u);
        mem_free(x);
        mem_free(y);
        mem_free(want);
    }
}

/* --- Linear ----------------------------------------------------------------------------------- */

static void test_linear(void **state) {
    (void)state;
    rng r;
    rng_seed(&r, 3, 0);
    const int32_t shape[][3] = {{1, 1, 1},   {1, 5, 7},   {4, 3, 8},    {5, 7, 9}, {8, 48, 64},
                                {7, 50, 33}, {2, 2, 256}, {9, 1, 1000}, {3, 4, 16}};
    for (int32_t c = 0; c < COUNT_OF(shape); c++) {
        const int32_t t = shape[c][0], n = shape[c][1], k = shape[c][2];
        float *x = gaussian(&r, (int64_t)t * k), *w = gaussian(&r, (int64_t)n * k);
        float *bias = gaussian(&r, n), *y = floats((int64_t)t * n), *want = floats((int64_t)t * n);
        float *lanes = floats((int64_t)t * n), *scalar = floats((int64_t)t * n);
        double size = 0;
        for (int32_t i = 0; i < t; i++)
            for (int32_t j = 0; j < n; j++) {
                double sum = (double)bias[j];
                for (int32_t e = k - 1; e >= 0; e--) {
                    sum += (double)x[i * k + e] * (double)w[j * k + e];
                    size += pow((double)x[i * k + e] * (double)w[j * k + e], 2);
                }
                want[i * n + j] = (float)sum;
            }
        ref_linear(y, x, w, bias, t, n, k);
        assert_at_most(relative_error(y, want, (int64_t)t * n), 1.5 * u);
        ref_linear_lanes(lanes, n, x, k, w, k, bias, t, n, k);
        ref_linear_lanes_scalar(scalar, n, x, k, w, k, bias, t, n, k);
        assert_memory_equal(lanes, scalar, sizeof(float) * (size_t)t * (size_t)n);
        /* Rounding errors of the k / 8 + 5 steps are a random walk of the products' size. */
        double norm = 0;
        for (int32_t i = 0; i < t * n; i++) norm += (double)want[i] * (double)want[i];
        const double tolerance = (k / 8 + 5) * u * sqrt(size / norm) + 1.5 * u;
        assert_at_most(relative_error(lanes, want, (int64_t)t * n), tolerance);

        w[(n / 2) * k + k / 2] += 0.01f + 0.01f * fabsf(w[(n / 2) * k + k / 2]); /* twin */
        ref_linear_lanes(lanes, n, x, k, w, k, bias, t, n, k);
        assert_more(relative_error(lanes, want, (int64_t)t * n), tolerance);
        ref_linear(y, x, w, bias, t, n, k);
        assert_more(relative_error(y, want, (int64_t)t * n), 1.5 * u);
        float *const all[] = {x, w, bias, y, want, lanes, scalar};
        for (int32_t i = 0; i < COUNT_OF(all); i++) mem_free(all[i]);
    }
}

/* Strides, and that a row alone is the row in any batch; what lies between rows is not read. */
static void test_linear_rows(void **state) {
    (void)state;
    enum { T = 11, N = 10, K = 37, STRIDE = 41 };
    rng r;
    rng_seed(&r, 4, 0);
    float x[T * STRIDE], w[N * STRIDE], together[T * STRIDE], alone[N];
    for (int i = 0; i < T * STRIDE; i++) x[i] = i % STRIDE < K ? (float)rng_normal(&r) : NAN;
    for (int i = 0; i < N * STRIDE; i++) w[i] = i % STRIDE < K ? (float)rng_normal(&r) : NAN;
    for (int i = 0; i < T * STRIDE; i++) together[i] = -1;
    ref_linear_lanes(together, STRIDE, x, STRIDE, w, STRIDE, NULL, T, N, K);
    for (int i = 0; i < T; i++) {
        ref_linear_lanes(alone, N, x + i * STRIDE, STRIDE, w, STRIDE, NULL, 1, N, K);
        assert_memory_equal(alone, together + i * STRIDE, sizeof alone);
        for (int j = N; j < STRIDE; j++) assert_true(together[i * STRIDE + j] == -1);
        for (int j = 0; j < N; j++) { /* and an output alone */
            float one;
            ref_linear_lanes(&one, 1, x + i * STRIDE, STRIDE, w + j * STRIDE, STRIDE, NULL, 1, 1,
                             K);
            assert_memory_equal(&one, &alone[j], sizeof one);
        }
    }
}

/* --- Activations ------------------------------------------------------------------------------ */

static void test_activation(void **state) {
    (void)state;
    enum { ROWS = 3, F = 37 };
    rng r;
    rng_seed(&r, 5, 0);
    float *x = gaussian(&r, ROWS * 2 * F), *y = floats(ROWS * F), *want = floats(ROWS * F);
    for (int kind = 0; kind < 2; kind++) {
        const double limit = 1.5; /* reached on all sides */
        for (int i = 0; i < ROWS * F; i++) {
            double g = (double)x[i / F * 2 * F + i % F], up = (double)x[i / F * 2 * F + F + i % F];
            if (kind == 1) {
                g = fmin(g, limit);
                up = fmax(fmin(up, limit), -limit);
                want[i] = (float)(g * (0.5 + 0.5 * tanh(1.702 * g / 2)) * (up + 1));
            } else {
                want[i] = (float)(g * (0.5 + 0.5 * tanh(g / 2)) * up);
            }
        }
        for (int twin = 0; twin < 2; twin++) {
            const int at = 2 * F + F + 5;
            const float kept = x[at];
            if (twin) x[at] = kept * 0.99f;
            if (kind == 0)
                ref_silu_gated(y, x, ROWS, F);
            else
                ref_swiglu_oai_gated(y, x, ROWS, F, (float)limit);
            if (twin)
                assert_more(relative_error(y, want, ROWS * F), 2 * u);
            else
                assert_at_most(relative_error(y, want, ROWS * F), 2 * u);
            x[at] = kept;
        }
    }
    const float edge[] = {-1000, 1000, NAN, 1, 1, 1}; /* no overflow on the way; NaN stays NaN */
    ref_silu_gated(y, edge, 1, 3);
    assert_true(y[0] == 0 && y[1] == 1000 && isnan(y[2]));
    ref_swiglu_oai_gated(y, edge, 1, 3, 7);
    assert_true(y[0] == 0 && isnan(y[2]));
    assert_close(y[1], 14, 14 * 1e-5);
    mem_free(x);
    mem_free(y);
    mem_free(want);
}

/* --- Experts ---------------------------------------------------------------------------------- */

static void test_moe_route(void **state) {
    (void)state;
    enum { X = 5, K = 3 };
    const float l[2][X] = {{1, 3, 2, 3, -1}, {0, NAN, 0, 0, 0}};
    int32_t expert[2 * K];
    float weight[2 * K];
    const double e1 = exp(-1.0), all = exp(-2.0) + 2 + e1 + exp(-4.0), chosen = 2 + e1;
    const struct {
        bool over_chosen, normalise;
        double sum;
    } rule[] = {
        {true, false, chosen}, {true, true, chosen}, {false, true, chosen}, {false, false, all}};
    for (int32_t c = 0; c < COUNT_OF(rule); c++) {
        ref_moe_route(expert, weight, l[0], 2, X, K, rule[c].over_chosen, rule[c].normalise);
        const int32_t want[] = {1, 3, 2, 0, 2, 3}; /* ties: the lower expert; NaN last */
        assert_memory_equal(expert, want, sizeof want);
        assert_close(weight[0], 1 / rule[c].sum, 2 * u);
        assert_close(weight[1], 1 / rule[c].sum, 2 * u);
        assert_close(weight[2], e1 / rule[c].sum, 2 * u);
    }
    assert_more(fabs((double)weight[0] - 1 / chosen), 2 * u); /* twin: the rules do differ */
    ref_moe_route(expert, weight, l[0], 1, X, X, true, false);
    const int32_t sorted[] = {1, 3, 2, 0, 4};
    assert_memory_equal(expert, sorted, sizeof sorted);
}

/* Random routings: the permutation is one, sorted by expert then token; combine undoes it. */
static void test_moe_permute(void **state) {
    (void)state;
    enum { T = 23, X = 6, K = 2, E = 3, SLOTS = T * K };
    rng r;
    rng_seed(&r, 6, 0);
    float *logits = gaussian(&r, T * X), *y = gaussian(&r, SLOTS * E), weight[SLOTS];
    int32_t expert[SLOTS], start[X + 1], slot_row[SLOTS], row_token[SLOTS], row_slot[SLOTS];
    for (int i = 0; i < T; i++) logits[i * X + 4] = -100; /* an expert without tokens */
    ref_moe_route(expert, weight, logits, T, X, K, true, false);
    ref_moe_permute(start, slot_row, row_token, expert, T, X, K);
    for (int i = 0; i < SLOTS; i++) row_slot[i] = -1;
    for (int s = 0; s < SLOTS; s++) row_slot[slot_row[s]] = s;
    assert_int_equal(start[0], 0);
    assert_int_equal(start[X], SLOTS);
    assert_int_equal(start[4], start[5]);
    for (int e = 0; e < X; e++)
        for (int row = start[e]; row < start[e + 1]; row++) {
            assert_in_range(row_slot[row], 0, SLOTS - 1);
            assert_int_equal(expert[row_slot[row]], e);
            assert_int_equal(row_token[row], row_slot[row] / K);
            if (row > start[e]) assert_true(row_token[row] > row_token[row - 1]);
        }
    float out[T * E], want[T * E];
    for (int i = 0; i < T * E; i++)
        want[i] =
            (float)((double)weight[i / E * K] * (double)y[slot_row[i / E * K] * E + i % E] +
                    (double)weight[i / E * K + 1] * (double)y[slot_row[i / E * K + 1] * E + i % E]);
    ref_moe_combine(out, y, weight, slot_row, T, K, E);
    assert_at_most(relative_error(out, want, T * E), u);
    y[7] *= 1.01f; /* twin */
    ref_moe_combine(out, y, weight, slot_row, T, K, E);
    assert_more(relative_error(out, want, T * E), u);
    mem_free(logits);
    mem_free(y);
}

/* --- Attention -------------------------------------------------------------------------------- */

typedef struct {
    int32_t kv_len, n; /* tokens in all, of them queries at the end */
    int32_t g, ratio, d, window;
    bool sinks;
    kv_format k_format, v_format;
} attention_case;

enum { N_PAGES = 9 };

typedef struct {
    ref_kv kv;
    int32_t page[N_PAGES];
    float *q, *k, *v;       /* [n, H, D], [kv_len, G, D] as written */
    float *k_head, *v_head; /* [G, kv_len, D] as read back */
    float *out, *want, *sinks, *scratch;
} attention_data;

static void make_cache(attention_data *a, const attention_case *c, rng *r) {
    ref_kv *kv = &a->kv;
    *kv = (ref_kv){
        .k_format = c->k_format, .v_format = c->v_format, .n_kv_heads = c->g, .head_dim = c->d};
    const int64_t slots = (int64_t)N_PAGES * c->g * KV_PAGE_TOKENS;
    const int64_t k_bytes = ref_kv_code_bytes(c->k_format, c->d);
    const int64_t v_bytes = ref_kv_code_bytes(c->v_format, c->d);
    kv->k = mem_alloc((size_t)(slots * k_bytes), 1);
    kv->v = mem_alloc((size_t)(slots * v_bytes), 1);
    kv->k_params = mem_alloc((size_t)slots * 2, sizeof(uint16_t));
    kv->v_params = mem_alloc((size_t)slots * 2, sizeof(uint16_t));
    memset(kv->k, 0xff, (size_t)(slots * k_bytes)); /* NaN wherever nothing is written */
    memset(kv->v, 0xff, (size_t)(slots * v_bytes));
    memset(kv->k_params, 0xff, (size_t)slots * 4);
    memset(kv->v_params, 0xff, (size_t)slots * 4);
    for (int32_t i = 0; i < N_PAGES; i++) a->page[i] = i;
    rng_shuffle(r, a->page, N_PAGES);
    for (int32_t j = 0; j < c->kv_len; j++) {
        const int32_t page = a->page[j / KV_PAGE_TOKENS], slot = j % KV_PAGE_TOKENS;
        const float *k = a->k + (int64_t)j * c->g * c->d, *v = a->v + (int64_t)j * c->g * c->d;
        ref_kv_store(kv, page, slot, k, v);
        for (int32_t g = 0; g < c->g; g++) { /* quantised and read back by ref_quant alone */
            uint8_t codes[1024];
            uint16_t params[2];
            float *k_to = a->k_head + ((int64_t)g * c->kv_len + j) * c->d;
            float *v_to = a->v_head + ((int64_t)g * c->kv_len + j) * c->d;
            ref_kv_quantize(codes, params, k + g * c->d, c->d, c->k_format);
            ref_kv_dequantize(k_to, codes, params, c->d, c->k_format);
            ref_kv_quantize(codes, params, v + g * c->d, c->d, c->v_format);
            ref_kv_dequantize(v_to, codes, params, c->d, c->v_format);
        }
    }
}

static void make_attention(attention_data *a, const attention_case *c, uint64_t seed) {
    rng r;
    rng_seed(&r, seed, 0);
    const int64_t h = (int64_t)c->g * c->ratio, kv = (int64_t)c->kv_len * c->g * c->d;
    a->q = gaussian(&r, c->n * h * c->d);
    a->k = gaussian(&r, kv);
    a->v = gaussian(&r, kv);
    a->k_head = floats(kv);
    a->v_head = floats(kv);
    a->out = floats(c->n * h * c->d);
    a->want = floats(c->n * h * c->d);
    a->sinks = gaussian(&r, h);
    a->scratch = floats(ref_attention_scratch(c->n * c->ratio, c->d));
    make_cache(a, c, &r);
}

static void free_attention(attention_data *a) {
    void *const all[] = {a->q,    a->k,           a->v,          a->k_head,  a->v_head,
                         a->out,  a->want,        a->sinks,      a->scratch, a->kv.k,
                         a->kv.v, a->kv.k_params, a->kv.v_params};
    for (int32_t i = 0; i < COUNT_OF(all); i++) mem_free(all[i]);
}

static float scale_of(const attention_case *c) { return (float)(1 / sqrt(c->d)); }

/* The formula, with no maximum subtracted: scores are small here. */
static void naive_attention(attention_data *a, const attention_case *c) {
    const int32_t h = c->g * c->ratio;
    for (int32_t i = 0; i < c->n; i++)
        for (int32_t head = 0; head < h; head++) {
            const int32_t at = c->kv_len - c->n + i;
            double acc[256] = {0}, sum = c->sinks ? exp((double)a->sinks[head]) : 0;
            for (int32_t j = 0; j <= at; j++) {
                if (c->window && at - j >= c->window) continue;
                const int64_t row = ((int64_t)(head / c->ratio) * c->kv_len + j) * c->d;
                double s = 0;
                for (int32_t d = 0; d < c->d; d++)
                    s += (double)a->q[((int64_t)i * h + head) * c->d + d] *
                         (double)a->k_head[row + d];
                const double p = exp(s * (double)scale_of(c));
                sum += p;
                for (int32_t d = 0; d < c->d; d++) acc[d] += p * (double)a->v_head[row + d];
            }
            for (int32_t d = 0; d < c->d; d++)
                a->want[((int64_t)i * h + head) * c->d + d] = (float)(acc[d] / sum);
        }
}

/* Queries [from, to) of the case, one call for each KV head. */
static void run_paged(attention_data *a, const attention_case *c, int32_t from, int32_t to) {
    const int64_t width = (int64_t)c->g * c->ratio * c->d;
    for (int32_t g = 0; g < c->g; g++) {
        const ref_attention_rows r = {.kv = &a->kv,
                                      .page = a->page,
                                      .kv_len = c->kv_len - c->n + to,
                                      .kv_head = g,
                                      .ratio = c->ratio,
                                      .n_tokens = to - from,
                                      .position = c->kv_len - c->n + from,
                                      .window = c->window,
                                      .scale = scale_of(c),
                                      .q = a->q + from * width,
                                      .out = a->out + from * width,
                                      .q_stride = width,
                                      .out_stride = width,
                                      .sinks = c->sinks ? a->sinks : NULL};
        ref_attention_paged(&r, a->scratch);
    }
}

static void run_formula(attention_data *a, const attention_case *c) {
    const int64_t h = (int64_t)c->g * c->ratio, width = h * c->d;
    for (int32_t head = 0; head < h; head++) {
        const int64_t at = (int64_t)(head / c->ratio) * c->kv_len * c->d;
        ref_attention(a->out + (int64_t)head * c->d, width, a->q + (int64_t)head * c->d, width,
                      a->k_head + at, a->v_head + at, c->n, c->kv_len - c->n, c->d, c->window,
                      scale_of(c), c->sinks ? &a->sinks[head] : NULL);
    }
}

/* Dot of D products, exponential, sum over the context: errors of a random walk; 4 u of exp and of
 * the score's rounding, which exp multiplies by a score of up to 5 or so. */
static double attention_tolerance(const attention_case *c) {
    return (30 + c->d / 8 + sqrt(c->kv_len)) * u;
}

static void check_attention(const attention_case *c, uint64_t seed) {
    attention_data a;
    make_attention(&a, c, seed);
    const int64_t size = (int64_t)c->n * c->g * c->ratio * c->d;
    naive_attention(&a, c);
    run_formula(&a, c);
    assert_at_most(relative_error(a.out, a.want, size), 4 * u);

    memset(a.out, 0xff, sizeof(float) * (size_t)size);
    run_paged(&a, c, 0, c->n);
    assert_at_most(relative_error(a.out, a.want, size), attention_tolerance(c));

    /* One query at a time, each with nothing behind it: the same bits. */
    float *once = floats(size);
    memcpy(once, a.out, sizeof(float) * (size_t)size);
    memset(a.out, 0xff, sizeof(float) * (size_t)size);
    for (int32_t i = 0; i < c->n; i++) run_paged(&a, c, i, i + 1);
    assert_memory_equal(a.out, once, sizeof(float) * (size_t)size);
    mem_free(once);

    /* Twins: one element of q (which is of no account where a single token is seen), and another
     * last token. */
    a.q[size / 2] = 1.01f * a.q[size / 2] + 0.01f;
    run_paged(&a, c, 0, c->n);
    if (c->sinks || (c->kv_len > 1 && c->window != 1))
        assert_more(relative_error(a.out, a.want, size), attention_tolerance(c));
    const int32_t last = c->kv_len - 1;
    ref_kv_store(&a.kv, a.page[last / KV_PAGE_TOKENS], last % KV_PAGE_TOKENS, a.v, a.k);
    run_paged(&a, c, 0, c->n);
    assert_more(relative_error(a.out, a.want, size), attention_tolerance(c));
    free_attention(&a);
}

static void test_attention(void **state) {
    (void)state;
    const attention_case shape[] = {
        {1, 1, 1, 1, 8, 0, false, KF_16, KF_16},      {1, 1, 1, 1, 2, 1, true, KF_16, KF_16},
        {63, 63, 2, 1, 16, 0, false, KF_16, KF_16},   {64, 3, 1, 3, 32, 0, false, KF_16, KF_16},
        {65, 65, 2, 5, 8, 0, true, KF_16, KF_16},     {129, 5, 1, 6, 64, 0, false, KF_16, KF_16},
        {200, 7, 1, 7, 24, 17, false, KF_16, KF_16},  {200, 100, 1, 16, 8, 64, true, KF_16, KF_16},
        {130, 130, 3, 2, 10, 1, false, KF_16, KF_16}, {130, 70, 1, 2, 8, 65, true, KF_16, KF_16},
        {500, 2, 2, 4, 128, 0, true, KF_16, KF_16},   {150, 90, 2, 3, 16, 0, false, KF_8, KF_8},
        {150, 90, 2, 3, 16, 30, true, KF_4, KF_4},    {150, 4, 2, 1, 32, 0, false, KF_FP8, KF_FP8},
        {150, 4, 1, 8, 32, 0, false, KF_8, KF_4},     {90, 90, 1, 2, 16, 500, false, KF_16, KF_8},
    };
    for (int32_t i = 0; i < COUNT_OF(shape); i++) check_attention(&shape[i], 100 + (uint64_t)i);
}

/* Large scores of either sign overflow nothing; a sink far above leaves nothing of the values. */
static void test_attention_range(void **state) {
    (void)state;
    const attention_case c = {70, 2, 1, 2, 8, 0, true, KF_16, KF_16};
    attention_data a;
    make_attention(&a, &c, 9);
    const int32_t size = c.n * c.ratio * c.d;
    for (int32_t i = 0; i < size; i++) a.q[i] *= 300;
    run_formula(&a, &c);
    memcpy(a.want, a.out, sizeof(float) * (size_t)size);
    run_paged(&a, &c, 0, c.n);
    assert_at_most(relative_error(a.out, a.want, size), 300 * attention_tolerance(&c));
    a.sinks[0] = a.sinks[1] = 1e5f;
    run_paged(&a, &c, 0, c.n);
    for (int32_t i = 0; i < size; i++) assert_true(a.out[i] == 0);
    free_attention(&a);
}

/* A NaN that is seen comes through; the one just past the end, or just outside the window, does
 * not. */
static void test_attention_nan(void **state) {
    (void)state;
    const attention_case c = {80, 1, 1, 2, 8, 20, false, KF_16, KF_16};
    attention_data a;
    make_attention(&a, &c, 10);
    const float nan[8] = {NAN, NAN, NAN, NAN, NAN, NAN, NAN, NAN};
    ref_kv_store(&a.kv, a.page[1], 80 % KV_PAGE_TOKENS, nan, nan);
    ref_kv_store(&a.kv, a.page[0], 59, nan, nan);
    run_paged(&a, &c, 0, 1);
    for (int32_t i = 0; i < 16; i++) assert_true(isfinite(a.out[i]));
    ref_kv_store(&a.kv, a.page[0], 60, a.k, nan);
    run_paged(&a, &c, 0, 1);
    for (int32_t i = 0; i < 16; i++) assert_true(isnan(a.out[i]));
    ref_kv_store(&a.kv, a.page[0], 60, nan, a.v);
    run_paged(&a, &c, 0, 1);
    for (int32_t i = 0; i < 16; i++) assert_true(isnan(a.out[i]));
    free_attention(&a);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_norm),
        cmocka_unit_test(test_rope),
        cmocka_unit_test(test_linear),
        cmocka_unit_test(test_linear_rows),
        cmocka_unit_test(test_activation),
        cmocka_unit_test(test_moe_route),
        cmocka_unit_test(test_moe_permute),
        cmocka_unit_test(test_attention),
        cmocka_unit_test(test_attention_range),
        cmocka_unit_test(test_attention_nan),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
