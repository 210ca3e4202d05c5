/* gpu_ops.c - the kernels around linear and attention against their definitions, on a GPU.
 *
 * Outputs are filled with 0xff (NaN) before every launch, so that what was not written shows.
 * Inputs are rounded to the kernel's type first; what is left is the kernel's own rounding: u =
 * 2^-11 (fp16) or 2^-8 (bf16) of one final rounding, and f32 inside. Twins perturb one element and
 * must be caught. */
#include "gpu_test.h"

#include "activation.h"
#include "draw.h"
#include "fill.h"
#include "linear.h"
#include "linear_layout.h"
#include "moe.h"
#include "norm.h"
#include "quantize.h"
#include "ref_activation.h"
#include "ref_moe.h"
#include "ref_norm.h"
#include "ref_rope.h"
#include "rng.h"
#include "rows.h"
#include "sampler.h"
#include "unpack.h"
#include "weights.h"

/* Few and small cases, for compute-sanitizer: racecheck takes seconds for 10 MB. */
static bool least;
static const dtype types[] = {DT_F16, DT_BF16};
static double unit_of(dtype t) { return t == DT_F16 ? 0x1p-11 : 0x1p-8; }

/* --- Memory --------------------------------------------------------------------------------- */

#define CUDA(call) assert_int_equal((int)(call), (int)cudaSuccess)

static void *dev(size_t bytes) {
    void *p = NULL;
    CUDA(cudaMalloc(&p, bytes ? bytes : 1));
    CUDA(cudaMemset(p, 0xff, bytes ? bytes : 1));
    return p;
}

static void *dev_copy(const void *from, size_t bytes) {
    void *p = dev(bytes);
    CUDA(cudaMemcpy(p, from, bytes, cudaMemcpyHostToDevice));
    return p;
}

static void *host(size_t count, size_t size) {
    void *p = calloc(count ? count : 1, size);
    assert_non_null(p);
    return p;
}

static void fetch(void *to, const void *from, size_t bytes) {
    CUDA(cudaDeviceSynchronize());
    CUDA(cudaMemcpy(to, from, bytes, cudaMemcpyDeviceToHost));
}

/* x rounded to `type` in place; its copy on the device. */
static void *dev_rounded(float *x, int64_t n, dtype type) {
    uint16_t *narrow = host((size_t)n, sizeof *narrow);
    dtype_from_f32(narrow, x, n, type);
    dtype_to_f32(x, narrow, n, 1, type);
    void *p = dev_copy(narrow, (size_t)n * 2);
    free(narrow);
    return p;
}

static void fetch_f32(float *to, const void *from, int64_t n, dtype type) {
    uint16_t *narrow = host((size_t)n, sizeof *narrow);
    fetch(narrow, from, (size_t)n * 2);
    dtype_to_f32(to, narrow, n, 1, type);
    free(narrow);
}

static float *normals(int64_t n, double scale, uint64_t seed) {
    float *x = host((size_t)n, sizeof *x);
    rng r;
    rng_seed(&r, seed, 1);
    for (int64_t i = 0; i < n; i++) x[i] = (float)(scale * rng_normal(&r));
    return x;
}

/* --- Rows ----------------------------------------------------------------------------------- */

static void test_rows(void **state) {
    (void)state;
    static const int32_t cols[] = {1, 7, 8, 9, 64, 4096, 5120};
    for (int c = 0; c < COUNT_OF(cols); c++) {
        enum { TABLE = 37, N = 11 };
        const size_t row = (size_t)cols[c] * 2;
        uint16_t *table = host(TABLE, row), *got = host(N, row);
        for (size_t i = 0; i < TABLE * row / 2; i++) table[i] = (uint16_t)(i * 40503u);
        int32_t index[N];
        for (int i = 0; i < N; i++) index[i] = (i * 23 + 36) % TABLE;
        void *t = dev_copy(table, TABLE * row), *o = dev(N * row),
             *x = dev_copy(index, sizeof index);
        assert_ok(kernel_rows(o, t, x, N, cols[c], NULL));
        fetch(got, o, N * row);
        for (int i = 0; i < N; i++)
            assert_memory_equal((char *)got + (size_t)i * row,
                                (char *)table + (size_t)index[i] * row, row);
        CUDA(cudaFree(t));
        CUDA(cudaFree(o));
        CUDA(cudaFree(x));
        free(table);
        free(got);
    }
    assert_ok(kernel_rows(NULL, NULL, NULL, 0, 8, NULL));
    assert_status(kernel_rows(NULL, NULL, NULL, 1, 0, NULL), ST_SHAPE);
}

static void test_rows_join(void **state) {
    (void)state;
    static const int32_t widths[] = {1, 100, 5000};
    for (int w = 0; w < COUNT_OF(widths); w++)
        for (int32_t parts = 1; parts <= 4; parts *= 2) {
            const int32_t width = widths[w], rows = 3, n = parts * rows * width;
            float *x = host((size_t)n, sizeof *x), *y = host((size_t)n, sizeof *y);
            for (int32_t i = 0; i < n; i++) x[i] = (float)i;
            void *dx = dev_copy(x, sizeof *x * (size_t)n), *dy = dev(sizeof *y * (size_t)n);
            assert_ok(kernel_rows_join(dy, dx, parts, rows, width, NULL));
            fetch(y, dy, sizeof *y * (size_t)n);
            int32_t wrong = 0, moved = 0; /* moved: as if parts were rows, which the twin is */
            for (int32_t r = 0; r < rows; r++)
                for (int32_t p = 0; p < parts; p++)
                    for (int32_t c = 0; c < width; c++) {
                        const float got = y[(r * parts + p) * width + c];
                        wrong += !(got == x[(p * rows + r) * width + c]);
                        moved += !(got == x[(r * parts + p) * width + c]);
                    }
            assert_int_equal(wrong, 0);
            assert_true((moved > 0) == (parts > 1));
            CUDA(cudaFree(dx));
            CUDA(cudaFree(dy));
            free(x);
            free(y);
        }
    assert_status(kernel_rows_join(NULL, NULL, 0, 1, 1, NULL), ST_SHAPE);
}

/* --- Norm ----------------------------------------------------------------------------------- */

static void norm_case(int64_t rows, int32_t cols, dtype type) {
    const int64_t n = rows * cols;
    float *residual = normals(n, 1, 1), *add = normals(n, 1, 2), *w = normals(cols, 0.2, 3);
    float *y = host((size_t)n, 4), *got = host((size_t)n, 4), *stream = host((size_t)n, 4);
    for (int32_t i = 0; i < cols; i++) w[i] += 1;
    void *dr = dev_rounded(residual, n, type), *da = dev_rounded(add, n, type);
    void *dw = dev_rounded(w, cols, type), *dy = dev((size_t)n * 2);
    assert_ok(kernel_norm_add(dy, dr, da, dw, rows, cols, 1e-5f, type, NULL, NULL));
    fetch_f32(got, dy, n, type);
    fetch_f32(stream, dr, n, type);

    for (int64_t i = 0; i < n; i++) residual[i] += add[i];
    void *rounded = dev_rounded(residual, n, type); /* as the kernel stores it */
    assert_memory_equal(stream, residual, (size_t)n * 4);
    ref_rmsnorm(y, residual, w, rows, cols, 1e-5f);
    for (int64_t i = 0; i < n; i++)
        assert_close(got[i], y[i], fabs((double)y[i]) * unit_of(type) * 1.01 + 1e-7);
    got[n / 2] += 4 * (float)unit_of(type) * (fabsf(got[n / 2]) + 1); /* twin */
    assert_more(fabs((double)got[n / 2] - (double)y[n / 2]),
                fabs((double)y[n / 2]) * unit_of(type) * 1.01);
    void *all[] = {dr, da, dw, dy, rounded};
    for (int i = 0; i < 5; i++) CUDA(cudaFree(all[i]));
    free(residual), free(add), free(w), free(y), free(got), free(stream);
}

static void test_norm(void **state) {
    (void)state;
    static const int32_t cols[] = {8, 64, 72, 2880, 4096, 8192, 8200, 16384, 32768};
    for (int c = 0; c < COUNT_OF(cols); c++)
        for (int t = 0; t < 2; t++)
            for (int64_t rows = 1; rows <= 65; rows = rows == 1 ? 7 : rows + 29)
                norm_case(rows, cols[c], types[t]);
    assert_status(kernel_norm_add(NULL, NULL, NULL, NULL, 1, 12, 1, DT_F16, NULL, NULL), ST_SHAPE);
    assert_status(kernel_norm_add(NULL, NULL, NULL, NULL, 1, 16, 1, DT_I8, NULL, NULL),
                  ST_UNSUPPORTED);
    assert_ok(kernel_norm_add(NULL, NULL, NULL, NULL, 0, 16, 1, DT_F16, NULL, NULL));
}

/* The stream is the table's rows, and y the bits that kernel_norm_add makes of them. */
static void embed_case(int64_t rows, int32_t cols, dtype type) {
    enum { TABLE = 37, DRAWN = 5 };
    const size_t row = (size_t)cols * 2, bytes = (size_t)rows * row;
    static draw_result drawn[DRAWN];
    for (int32_t i = 0; i < DRAWN; i++) drawn[i].token = i * 7 + 2;
    float *values = normals(TABLE * cols, 1, 4), *w = normals(cols, 0.2, 5);
    int32_t *token = host((size_t)rows, sizeof *token);
    for (int64_t i = 0; i < rows; i++)
        token[i] = (int32_t)(i % 3 == 0 ? -1 - i % DRAWN : i * 23 % TABLE);
    uint16_t *table = host((size_t)TABLE * (size_t)cols, 2), *got = host(bytes, 1);
    uint16_t *y = host(bytes, 1), *want = host(bytes, 1);
    void *dt = dev_rounded(values, TABLE * cols, type), *dw = dev_rounded(w, cols, type);
    void *dd = dev_copy(drawn, sizeof drawn), *di = dev_copy(token, sizeof *token * (size_t)rows);
    void *dr = dev(bytes), *dy = dev(bytes);
    assert_ok(kernel_norm_embed(dy, dr, dt, di, dd, dw, rows, cols, 1e-5f, type, NULL, NULL));
    fetch(table, dt, TABLE * row);
    fetch(got, dr, bytes);
    fetch(y, dy, bytes);
    for (int64_t i = 0; i < rows; i++) {
        const int32_t id = token[i] < 0 ? drawn[-1 - token[i]].token : token[i];
        assert_memory_equal(got + i * cols, table + (int64_t)id * cols, row);
        assert_memory_not_equal(got + i * cols, table + (int64_t)((id + 1) % TABLE) * cols, row);
    }
    for (int64_t i = 0; i < rows * cols; i++) got[i] = 0x8000; /* -0, which changes no number */
    void *nothing = dev_copy(got, bytes);
    assert_ok(kernel_norm_add(dy, dr, nothing, dw, rows, cols, 1e-5f, type, NULL, NULL));
    fetch(want, dy, bytes);
    assert_memory_equal(y, want, bytes);
    y[rows * cols / 2] ^= 1; /* twin */
    assert_memory_not_equal(y, want, bytes);
    void *all[] = {dt, dw, dd, di, dr, dy, nothing};
    for (int i = 0; i < COUNT_OF(all); i++) CUDA(cudaFree(all[i]));
    free(values), free(w), free(token), free(table), free(got), free(y), free(want);
}

static void test_norm_embed(void **state) {
    (void)state;
    static const int32_t cols[] = {8, 72, 4096, 8200, 32768};
    for (int c = 0; c < COUNT_OF(cols); c++)
        for (int t = 0; t < 2; t++)
            for (int64_t rows = 1; rows <= 65; rows += 32) embed_case(rows, cols[c], types[t]);
    assert_status(
        kernel_norm_embed(NULL, NULL, NULL, NULL, NULL, NULL, 1, 12, 1, DT_F16, NULL, NULL),
        ST_SHAPE);
    assert_status(
        kernel_norm_embed(NULL, NULL, NULL, NULL, NULL, NULL, 1, 16, 1, DT_I8, NULL, NULL),
        ST_UNSUPPORTED);
    assert_ok(kernel_norm_embed(NULL, NULL, NULL, NULL, NULL, NULL, 0, 16, 1, DT_F16, NULL, NULL));
}

/* Codes that a norm leaves are those of its y: all bits, each order. The twin: of another row. */
static void codes_case(int64_t rows, int32_t cols, dtype type, act_format act, bool atoms) {
    const int64_t n = rows * cols;
    float *table = normals(n, 1, 6), *w = normals(cols, 0.2, 7);
    int32_t *token = host((size_t)rows, sizeof *token);
    for (int64_t i = 0; i < rows; i++) token[i] = (int32_t)(rows - 1 - i);
    void *dt = dev_rounded(table, n, type), *dw = dev_rounded(w, cols, type);
    void *da = dev_rounded(table, n, type), *di = dev_copy(token, sizeof *token * (size_t)rows);
    void *dr = dev((size_t)n * 2), *dy = dev((size_t)n * 2);
    const activation_codes to = {dev((size_t)n), dev((size_t)rows * 4), act, atoms};
    activation_quantiser q = {.x = dy, .ldx = cols, .m = (int32_t)rows, .k = cols, .type = type};
    q.act = act;
    q.m_pad = q.m;
    q.code = dev((size_t)n);
    q.scale = dev((size_t)rows * 4);
    q.atoms = atoms;
    uint8_t *got = host((size_t)n, 1), *want = host((size_t)n, 1);
    float *scale = host((size_t)rows, 4), *scale_want = host((size_t)rows, 4);
    for (int embed = 1; embed >= 0; embed--) { /* then the stream is there to add to */
        assert_ok(
            embed ? kernel_norm_embed(dy, dr, dt, di, NULL, dw, rows, cols, 1e-5f, type, &to, NULL)
                  : kernel_norm_add(dy, dr, da, dw, rows, cols, 1e-5f, type, &to, NULL));
        assert_ok(kernel_quantize_activation(&q, NULL));
        fetch(got, to.code, (size_t)n);
        fetch(want, q.code, (size_t)n);
        fetch(scale, to.scale, (size_t)rows * 4);
        fetch(scale_want, q.scale, (size_t)rows * 4);
        assert_memory_equal(got, want, (size_t)n);
        assert_memory_equal(scale, scale_want, (size_t)rows * 4);
        if (rows > 1) assert_memory_not_equal(got, want + cols, (size_t)cols);
    }
    void *all[] = {dt, dw, da, di, dr, dy, to.code, to.scale, q.code, q.scale};
    for (int i = 0; i < COUNT_OF(all); i++) CUDA(cudaFree(all[i]));
    free(table), free(w), free(token), free(got), free(want), free(scale), free(scale_want);
}

/* The same of values, which the norm leaves in place of y: those of the y that it leaves without.
 * The twin: y itself. */
static void values_case(int64_t rows, int32_t cols, dtype type, act_format act) {
    const int64_t n = rows * cols;
    const size_t bytes = (size_t)n * 2;
    float *table = normals(n, 1, 6), *w = normals(cols, 0.2, 7);
    int32_t *token = host((size_t)rows, sizeof *token);
    for (int64_t i = 0; i < rows; i++) token[i] = (int32_t)(rows - 1 - i);
    void *dt = dev_rounded(table, n, type), *dw = dev_rounded(w, cols, type);
    void *da = dev_rounded(table, n, type), *di = dev_copy(token, sizeof *token * (size_t)rows);
    void *dr = dev(bytes), *dy = dev(bytes), *value = dev(bytes);
    const activation_codes to = {.act = act};
    activation_quantiser q = {.x = dy, .ldx = cols, .m = (int32_t)rows, .k = cols, .type = type};
    q.act = act;
    q.value = value;
    uint8_t *y = host(bytes, 1), *got = host(bytes, 1), *want = host(bytes, 1);
    for (int embed = 1; embed >= 0; embed--) {
        for (int made = 0; made < 2; made++) {
            if (!embed) CUDA(cudaMemcpy(dr, dt, bytes, cudaMemcpyDeviceToDevice));
            assert_ok(embed ? kernel_norm_embed(dy, dr, dt, di, NULL, dw, rows, cols, 1e-5f, type,
                                                made ? &to : NULL, NULL)
                            : kernel_norm_add(dy, dr, da, dw, rows, cols, 1e-5f, type,
                                              made ? &to : NULL, NULL));
            if (!made) assert_ok(kernel_quantize_activation(&q, NULL));
            fetch(made ? got : y, dy, bytes);
        }
        fetch(want, value, bytes);
        assert_memory_equal(got, want, bytes);
        assert_memory_not_equal(y, want, bytes);
    }
    void *all[] = {dt, dw, da, di, dr, dy, value};
    for (int i = 0; i < COUNT_OF(all); i++) CUDA(cudaFree(all[i]));
    free(table), free(w), free(token), free(y), free(got), free(want);
}

static void test_norm_codes(void **state) {
    (void)state;
    static const int32_t cols[] = {16, 144, 2880, 4096, 8208, 32768};
    for (int c = 0; c < COUNT_OF(cols); c++)
        for (int t = 0; t < 2; t++)
            for (int64_t rows = 1; rows <= 65; rows += 32) {
                codes_case(rows, cols[c], types[t], AF_INT8, false);
                codes_case(rows, cols[c], types[t], AF_INT8, true);
                codes_case(rows, cols[c], types[t], AF_FP8, false);
                values_case(rows, cols[c], types[t], AF_INT8);
                values_case(rows, cols[c], types[t], AF_FP8);
            }
}

/* Ranks as streams of one GPU. */
enum { SUM_RANKS = 3, SUM_COLS = 4096 };
typedef struct {
    norm_ranks peers[SUM_RANKS];
    cudaStream_t stream[SUM_RANKS];
    int32_t *gone;
} sum_ranks;

static void sum_open(sum_ranks *s) {
    void *inbox[SUM_RANKS], *gone;
    const size_t bytes = norm_inbox_bytes(SUM_RANKS, SUM_COLS);
    CUDA(cudaHostAlloc((void **)&s->gone, sizeof *s->gone, cudaHostAllocMapped));
    CUDA(cudaHostGetDevicePointer(&gone, s->gone, 0));
    *s->gone = 0;
    for (int r = 0; r < SUM_RANKS; r++) {
        inbox[r] = dev(bytes);
        CUDA(cudaMemset(inbox[r], 0, bytes));
        CUDA(cudaStreamCreateWithFlags(&s->stream[r], cudaStreamNonBlocking));
    }
    for (int r = 0; r < SUM_RANKS; r++) {
        uint32_t *calls = dev(sizeof *calls * NORM_RANK_ROWS);
        CUDA(cudaMemset(calls, 0, sizeof *calls * NORM_RANK_ROWS));
        s->peers[r] = (norm_ranks){.inbox = dev_copy(inbox, sizeof inbox),
                                   .calls = calls,
                                   .gone = gone,
                                   .rank = r,
                                   .n = SUM_RANKS,
                                   .cols_max = SUM_COLS};
    }
    CUDA(cudaDeviceSynchronize());
}

/* One call of all ranks: the same bits on each, those of a sum in f32 in order of ranks. */
static void sum_case(sum_ranks *s, int64_t rows, int32_t cols, dtype type, uint64_t seed) {
    const int64_t n = rows * cols;
    float *residual = normals(n, 1, seed), *w = normals(cols, 0.2, 3), *y = host((size_t)n, 4);
    float *got = host((size_t)n, 4), *stream = host((size_t)n, 4), *sum = host((size_t)n, 4);
    void *dr[SUM_RANKS], *da[SUM_RANKS], *dy[SUM_RANKS];
    void *dw = dev_rounded(w, cols, type);
    for (int r = 0; r < SUM_RANKS; r++) {
        float *add = normals(n, 1, seed + 1 + (uint64_t)r);
        dr[r] = dev_rounded(residual, n, type);
        da[r] = dev_rounded(add, n, type);
        dy[r] = dev((size_t)n * 2);
        for (int64_t i = 0; i < n; i++) sum[i] += add[i];
        free(add);
    }
    CUDA(cudaDeviceSynchronize());
    for (int r = SUM_RANKS - 1; r >= 0; r--)
        assert_ok(kernel_norm_add_ranks(dy[r], dr[r], da[r], dw, rows, cols, 1e-5f, type,
                                        &s->peers[r], s->stream[r]));
    for (int64_t i = 0; i < n; i++) residual[i] += sum[i];
    void *rounded = dev_rounded(residual, n, type);
    ref_rmsnorm(y, residual, w, rows, cols, 1e-5f);
    for (int r = 0; r < SUM_RANKS; r++) {
        fetch_f32(got, dy[r], n, type);
        fetch_f32(stream, dr[r], n, type);
        assert_memory_equal(stream, residual, (size_t)n * 4);
        for (int64_t i = 0; i < n; i++)
            assert_close(got[i], y[i], fabs((double)y[i]) * unit_of(type) * 1.01 + 1e-7);
        CUDA(cudaFree(dr[r]));
        CUDA(cudaFree(da[r]));
        CUDA(cudaFree(dy[r]));
    }
    residual[n - 1] += 8 * (float)unit_of(type) * (fabsf(residual[n - 1]) + 1); /* twin */
    assert_memory_not_equal(stream, residual, (size_t)n * 4);
    CUDA(cudaFree(dw));
    CUDA(cudaFree(rounded));
    free(residual), free(w), free(y), free(got), free(stream), free(sum);
}

static void test_norm_ranks(void **state) {
    (void)state;
    if (least) skip(); /* a sanitizer may run kernels one by one, and these wait for each other */
    sum_ranks s;
    sum_open(&s);
    /* Rows come and go between calls, so that their numbers of calls differ. */
    static const int64_t rows[] = {1, 5, 1, 32, 3, 64, 1, 1, 64, 2};
    static const int32_t cols[] = {4096, 72, 4096, 2880, 8};
    for (int i = 0; i < 3 * COUNT_OF(rows); i++)
        sum_case(&s, rows[i % COUNT_OF(rows)], cols[i % COUNT_OF(cols)], types[i / 7 % 2],
                 100 + 10 * (uint64_t)i);
    /* A rank whose peers never come ends all the same, once it is told. */
    void *x = dev((size_t)2 * SUM_COLS);
    assert_ok(
        kernel_norm_add_ranks(x, x, x, x, 1, SUM_COLS, 1e-5f, DT_F16, &s.peers[0], s.stream[0]));
    assert_int_equal((int)cudaStreamQuery(s.stream[0]), (int)cudaErrorNotReady);
    *(volatile int32_t *)s.gone = 1;
    CUDA(cudaDeviceSynchronize());
    assert_status(kernel_norm_add_ranks(x, x, x, x, NORM_RANK_ROWS + 1, SUM_COLS, 1e-5f, DT_F16,
                                        &s.peers[0], s.stream[0]),
                  ST_SHAPE);
    assert_status(
        kernel_norm_add_ranks(x, x, x, x, 1, SUM_COLS + 8, 1e-5f, DT_F16, &s.peers[0], s.stream[0]),
        ST_SHAPE);
}

/* --- Activations ---------------------------------------------------------------------------- */

static void gated_case(int64_t rows, int32_t f, dtype type, gated_kind kind) {
    const int64_t n = rows * f;
    float *x = normals(2 * n, 6, 5), *y = host((size_t)n, 4), *got = host((size_t)n, 4);
    if (n > 3) { /* infinities and NaN go through as in the definition */
        x[0] = INFINITY;
        x[1] = -INFINITY;
        x[2] = NAN;
    }
    void *dx = dev_rounded(x, 2 * n, type), *dy = dev((size_t)n * 2);
    assert_ok(kernel_gated(dy, dx, rows, f, kind, 7, type, NULL));
    fetch_f32(got, dy, n, type);
    if (kind == GATED_SILU)
        ref_silu_gated(y, x, rows, f);
    else
        ref_swiglu_oai_gated(y, x, rows, f, 7);
    /* exp of an argument up to 40 in f32 is off by 2^-23 of it: 40 * 2^-23 beside the rounding. */
    for (int64_t i = 0; i < n; i++) {
        if (isnan(y[i]) || isinf(y[i])) {
            assert_true(isnan(got[i]) == isnan(y[i]) && (isnan(y[i]) || got[i] == y[i]));
            continue;
        }
        assert_close(got[i], y[i], fabs((double)y[i]) * (unit_of(type) * 1.01 + 1e-5) + 6e-8);
    }
    CUDA(cudaFree(dx));
    CUDA(cudaFree(dy));
    free(x), free(y), free(got);
}

static void test_gated(void **state) {
    (void)state;
    static const int32_t f[] = {1, 7, 8, 9, 32, 2880, 14336};
    for (int i = 0; i < COUNT_OF(f); i++)
        for (int t = 0; t < 2; t++)
            for (int kind = 0; kind < 2; kind++) {
                gated_case(1, f[i], types[t], (gated_kind)kind);
                gated_case(33, f[i], types[t], (gated_kind)kind);
            }
    assert_ok(kernel_gated(NULL, NULL, 0, 8, GATED_SILU, 0, DT_F16, NULL));
    assert_status(kernel_gated(NULL, NULL, 1, 0, GATED_SILU, 0, DT_F16, NULL), ST_SHAPE);
}

/* --- Mixture of experts --------------------------------------------------------------------- */

/* at_once: by kernel_moe_sort, else by route and permute. */
static void moe_case(int64_t t, int32_t x, int32_t k, bool over_chosen, bool normalise,
                     bool at_once) {
    const int64_t slots = t * k;
    enum { DIM = 72 };
    float *logits = normals(t * x, 2, 7), *w = host((size_t)slots, 4),
          *got_w = host((size_t)slots, 4);
    int32_t *e = host((size_t)slots, 4), *start = host((size_t)x + 1, 4),
            *row = host((size_t)slots, 4);
    int32_t *token = host((size_t)slots, 4), *got = host((size_t)(slots + x + 1), 4);
    for (int64_t i = 0; i < t * x; i++) logits[i] = roundf(logits[i] * 4) / 4; /* ties */
    if (t * x > 5) logits[5] = NAN;
    void *dl = dev_copy(logits, (size_t)(t * x) * 4), *de = dev((size_t)slots * 4);
    void *dw = dev((size_t)slots * 4), *ds = dev((size_t)(x + 1) * 4), *dr = dev((size_t)slots * 4);
    void *dt = dev((size_t)slots * 4);
    if (at_once) {
        assert_ok(kernel_moe_sort(ds, dr, dt, de, dw, dl, t, x, k, over_chosen, normalise, x,
                                  DT_F32, NULL));
    } else {
        assert_ok(kernel_moe_route(de, dw, dl, t, x, k, over_chosen, normalise, x, DT_F32, NULL));
        assert_ok(kernel_moe_permute(ds, dr, dt, de, t, x, k, NULL));
    }
    ref_moe_route(e, w, logits, t, x, k, over_chosen, normalise);
    ref_moe_permute(start, row, token, e, t, x, k);
    fetch(got, de, (size_t)slots * 4);
    assert_memory_equal(got, e, (size_t)slots * 4);
    fetch(got, ds, (size_t)(x + 1) * 4);
    assert_memory_equal(got, start, (size_t)(x + 1) * 4);
    fetch(got, dr, (size_t)slots * 4);
    assert_memory_equal(got, row, (size_t)slots * 4);
    fetch(got, dt, (size_t)slots * 4);
    assert_memory_equal(got, token, (size_t)slots * 4);
    fetch(got_w, dw, (size_t)slots * 4);
    for (int64_t i = 0; i < slots; i++) /* NaN where all logits are */
        if (!(isnan(w[i]) && isnan(got_w[i])))
            assert_close(got_w[i], w[i], 2e-6 * (double)w[i] + 1e-12);
    for (int64_t i = 0; i < slots; i++)
        if (isnan(got_w[i])) got_w[i] = 0;
    CUDA(cudaMemcpy(dw, got_w, (size_t)slots * 4, cudaMemcpyHostToDevice));

    float *y = normals(slots * DIM, 1, 9), *out = host((size_t)t * DIM, 4),
          *sum = host((size_t)t * DIM, 4);
    for (int ty = 0; ty < 2; ty++) {
        void *dy = dev_rounded(y, slots * DIM, types[ty]), *d_out = dev((size_t)t * DIM * 2);
        assert_ok(kernel_moe_combine(d_out, dy, dw, dr, t, k, DIM, types[ty], NULL));
        ref_moe_combine(out, y, got_w, row, t, k, DIM);
        fetch_f32(sum, d_out, t * DIM, types[ty]);
        /* rounding, and k additions of terms up to 5 in f32 */
        for (int64_t i = 0; i < t * DIM; i++)
            assert_close(sum[i], out[i],
                         fabs((double)out[i]) * unit_of(types[ty]) * 1.01 + k * 5 * 0x1p-23);
        CUDA(cudaFree(dy));
        CUDA(cudaFree(d_out));
    }
    void *all[] = {dl, de, dw, ds, dr, dt};
    for (int i = 0; i < 6; i++) CUDA(cudaFree(all[i]));
    free(logits), free(w), free(got_w), free(e), free(start), free(row), free(token), free(got);
    free(y), free(out), free(sum);
}

static void test_moe(void **state) {
    (void)state;
    static const int32_t shape[][2] = {{1, 1},  {4, 2},   {8, 2},   {32, 4},
                                       {33, 8}, {128, 8}, {512, 32}};
    static const int64_t t[] = {1, 7, 17, 32, 64, 513, 3000};
    for (int i = 0; i < COUNT_OF(shape); i++)
        for (int j = 0; j < COUNT_OF(t); j++)
            for (int at_once = 0; at_once < 2; at_once++)
                moe_case(t[j], shape[i][0], shape[i][1], (i + j) % 2 == 0, (i + j) % 3 == 0,
                         at_once);
    assert_status(kernel_moe_route(NULL, NULL, NULL, 1, 8, 9, true, true, 8, DT_F32, NULL),
                  ST_SHAPE);
    assert_status(kernel_moe_route(NULL, NULL, NULL, 1, 513, 9, true, true, 513, DT_F32, NULL),
                  ST_SHAPE);
}

/* A router's matrix as it is packed for the kernels; its values are rounded in place. */
static linear_weight router_of(float *w, float *bias, int32_t n, int32_t k, dtype type) {
    linear_weight r = {.format = WF_16,
                       .type = type,
                       .n = (n + 15) / 16 * 16,
                       .k = k,
                       .count = 1,
                       .act = AF_16,
                       .family = 90};
    int64_t code, scale;
    assert_ok(linear_pack_bytes(&r, &code, &scale));
    r.code = dev((size_t)code);
    void *plain = dev_rounded(w, (int64_t)r.n * k, type);
    const qmatrix q = {.format = WF_16, .n = r.n, .k = k, .group = k, .block_n = 1, .code = plain};
    assert_ok(linear_pack(&r, 0, &q, NULL));
    if (bias) r.bias = dev_rounded(bias, r.n, type);
    CUDA(cudaDeviceSynchronize());
    CUDA(cudaFree(plain));
    return r;
}

/* Where a kernel sent tokens by its own logits [t, x]: no rounding chooses. */
static void check_entered(const moe_enter *p, const float *own) {
    const int64_t t = p->t, slots = t * p->top_k;
    const int32_t x = p->n_experts, k = p->top_k;
    int32_t *e = host((size_t)slots, 4), *start = host((size_t)x + 1, 4);
    int32_t *row = host((size_t)slots, 4), *token = host((size_t)slots, 4);
    int32_t *back = host((size_t)(slots + x + 1), 4);
    float *share = host((size_t)slots, 4), *got_share = host((size_t)slots, 4);
    ref_moe_route(e, share, own, t, x, k, p->over_chosen, p->normalise);
    ref_moe_permute(start, row, token, e, t, x, k);
    const struct {
        const void *from, *want;
        int64_t n;
    } list[] = {{p->expert, e, slots},
                {p->slot_row, row, slots},
                {p->row_token, token, slots},
                {p->expert_start, start, x + 1}};
    for (int i = 0; i < COUNT_OF(list); i++) {
        fetch(back, list[i].from, (size_t)list[i].n * 4);
        assert_memory_equal(back, list[i].want, (size_t)list[i].n * 4);
        back[list[i].n / 2]++; /* twin */
        assert_memory_not_equal(back, list[i].want, (size_t)list[i].n * 4);
    }
    fetch(got_share, p->weight, (size_t)slots * 4);
    for (int64_t i = 0; i < slots; i++)
        assert_close(got_share[i], share[i], 2e-6 * (double)share[i] + 1e-12);
    int32_t *told = host((size_t)slots * LINEAR_TOLD, 4), wrong = 0, twin = 0;
    fetch(told, p->told, (size_t)slots * LINEAR_TOLD * 4);
    for (int32_t i = 0; i < x; i++)
        for (int32_t r = start[i]; r < start[i + 1]; r++) {
            int32_t want = t <= MOE_TOLD_TOKENS ? 1 + i : 0;
            for (int32_t of = r; r == start[i] && of < start[i + 1] && want; of++)
                want |= 1 << (16 + token[of]);
            wrong += told[(int64_t)r * LINEAR_TOLD] != want;
            twin += told[(int64_t)r * LINEAR_TOLD] != want + 1;
        }
    assert_int_equal(wrong, 0);
    assert_int_equal(twin, slots);
    free(e), free(start), free(row), free(token), free(back), free(share), free(got_share);
    free(told);
}

/* Logits of y [t, dim], rounded once, by w [x, dim]; those of the kernel to own. */
static void check_logits(const moe_enter *p, float *own, const float *y, const float *w,
                         const float *bias) {
    const int64_t t = p->t, stride = p->stride;
    const int32_t dim = p->dim, x = p->n_experts;
    float *logits = host((size_t)(t * stride), 4);
    fetch(logits, p->logits, (size_t)(t * stride) * 4);
    for (int64_t i = 0; i < t; i++)
        for (int32_t e = 0; e < x; e++) {
            double want = bias ? (double)bias[e] : 0, sum = 0;
            for (int32_t c = 0; c < dim; c++) {
                const double v = (double)y[i * dim + c] * (double)w[(int64_t)e * dim + c];
                want += v, sum += fabs(v);
            }
            /* x rounded once, sums of `dim` products in f32; twin: an expert's sum moved by more */
            const double bound =
                sum * (unit_of(p->type) * 1.01 + dim * 0x1p-23) + fabs(want) * 1e-6;
            own[i * x + e] = logits[i * stride + e];
            assert_close(own[i * x + e], want, bound);
            assert_more(fabs((double)own[i * x + e] + 2.1 * bound - want), bound);
        }
    free(logits);
}

static void enter_case(int64_t t, int32_t dim, int32_t x, int32_t k, dtype type, bool biased) {
    const int64_t n = t * dim, slots = t * k, stride = (x + 15) / 16 * 16;
    const float size = type == DT_F16 ? 3000 : 1; /* times the gain: more than fp16 holds */
    float *residual = normals(n, (double)size, 1), *add = normals(n, 1, 2);
    float *gain = normals(dim, 30, 3), *w = normals(stride * dim, 0.05, 4);
    float *bias = normals(stride, 1, 5), *y = host((size_t)n, 4), *got = host((size_t)n, 4);
    float *own = host((size_t)(t * x), 4);
    void *dr = dev_rounded(residual, n, type), *da = dev_rounded(add, n, type);
    void *dg = dev_rounded(gain, dim, type), *dy = dev((size_t)n * 2);
    const linear_weight router = router_of(w, biased ? bias : NULL, x, dim, type);
    moe_enter p = {.x = dy,
                   .residual = dr,
                   .add = da,
                   .gain = dg,
                   .router = &router,
                   .logits = dev((size_t)(t * stride) * 4),
                   .weight = dev((size_t)slots * 4),
                   .expert_start = dev((size_t)(x + 1) * 4),
                   .slot_row = dev((size_t)slots * 4),
                   .row_token = dev((size_t)slots * 4),
                   .expert = dev((size_t)slots * 4),
                   .t = t,
                   .stride = stride,
                   .dim = dim,
                   .n_experts = x,
                   .top_k = k,
                   .over_chosen = t % 2,
                   .normalise = true,
                   .eps = 1e-5f,
                   .type = type,
                   .told = dev((size_t)slots * LINEAR_TOLD * 4),
                   .words = dev((size_t)n * 2)};
    CUDA(cudaMemset(p.told, 0, (size_t)slots * LINEAR_TOLD * 4));
    CUDA(cudaMemset(p.words, 0, (size_t)n * 2));
    assert_true(kernel_moe_enter_accepts(&p, 90));
    assert_ok(kernel_moe_enter(&p, NULL));
    fetch_f32(got, dr, n, type);
    for (int64_t i = 0; i < n; i++) residual[i] += add[i];
    void *rounded = dev_rounded(residual, n, type);
    assert_memory_equal(got, residual, (size_t)n * 4);
    fetch_f32(got, dy, n, type);
    ref_rmsnorm(y, residual, gain, t, dim, 1e-5f);
    for (int64_t i = 0; i < n; i++)
        assert_close(got[i], y[i], fabs((double)y[i]) * unit_of(type) * 1.01 + 1e-7);
    uint16_t *x_bits = host((size_t)n, 2), *words = host((size_t)n, 2);
    int64_t wrong = 0, twin = 0;
    fetch(x_bits, dy, (size_t)n * 2);
    fetch(words, p.words, (size_t)n * 2);
    for (int64_t i = 0; i < n; i++) {
        wrong += words[i] + x_bits[i] != 0xffff;
        twin += words[i] != x_bits[i];
    }
    assert_int_equal(wrong, 0);
    assert_int_equal(twin, n);
    free(x_bits), free(words);
    check_logits(&p, own, y, w, biased ? bias : NULL);
    check_entered(&p, own);
    void *all[] = {dr,          da,          dg,
                   dy,          rounded,     router.code,
                   router.bias, p.logits,    p.expert_start,
                   p.slot_row,  p.row_token, p.expert,
                   p.weight,    p.told,      p.words};
    for (int i = 0; i < COUNT_OF(all); i++) CUDA(cudaFree(all[i]));
    free(residual), free(add), free(gain), free(w), free(bias), free(y), free(got), free(own);
}

static void leave_case(int64_t t, int32_t dim, int32_t k, dtype type) {
    const int64_t n = t * dim, slots = t * k;
    float *residual = normals(n, 1, 1), *y = normals(slots * dim, 1, 2), *gain = normals(dim, 1, 3);
    float *share = normals(slots, 0.3, 4), *sum = host((size_t)n, 4), *got = host((size_t)n, 4);
    int32_t *row = host((size_t)slots, 4);
    for (int64_t i = 0; i < slots; i++) row[i] = (int32_t)(slots - 1 - i);
    void *dr = dev_rounded(residual, n, type), *dy = dev_rounded(y, slots * dim, type);
    void *dg = dev_rounded(gain, dim, type), *dx = dev((size_t)n * 2);
    void *ds = dev_copy(share, (size_t)slots * 4), *dw = dev_copy(row, (size_t)slots * 4);
    int32_t *told = dev((size_t)slots * LINEAR_TOLD * 4),
            *left = host((size_t)slots * LINEAR_TOLD, 4);
    CUDA(cudaMemset(told, 1, (size_t)slots * LINEAR_TOLD * 4));
    assert_ok(kernel_moe_leave(dx, dr, dy, dg, ds, dw, told, false, t, k, dim, 1e-5f, type, NULL));
    fetch(left, told, (size_t)slots * LINEAR_TOLD * 4);
    for (int64_t i = 0; i < slots; i++) {
        assert_int_equal(left[i * LINEAR_TOLD], 0);
        assert_int_equal(left[i * LINEAR_TOLD + 1], 0x01010101); /* twin: what is no row's */
    }
    ref_moe_combine(sum, y, share, row, t, k, dim);
    fetch_f32(got, dr, n, type);
    for (int64_t i = 0; i < n; i++) { /* k additions of terms up to 8 in f32, then a rounding */
        const double want = (double)residual[i] + (double)sum[i];
        assert_close(got[i], want, fabs(want) * unit_of(type) * 1.01 + k * 8 * 0x1p-23);
    }
    memcpy(residual, got, (size_t)n * 4); /* the norm, of the sums as they are */
    ref_rmsnorm(sum, residual, gain, t, dim, 1e-5f);
    fetch_f32(got, dx, n, type);
    for (int64_t i = 0; i < n; i++)
        assert_close(got[i], sum[i], fabs((double)sum[i]) * unit_of(type) * 1.01 + 1e-7);
    got[n / 2] += 4 * (float)unit_of(type) * (fabsf(got[n / 2]) + 1); /* twin */
    assert_more(fabs((double)got[n / 2] - (double)sum[n / 2]),
                fabs((double)sum[n / 2]) * unit_of(type) * 1.01);
    void *all[] = {dr, dy, dg, dx, ds, dw, told};
    for (int i = 0; i < COUNT_OF(all); i++) CUDA(cudaFree(all[i]));
    free(residual), free(y), free(gain), free(share), free(sum), free(got), free(row), free(left);
}

static void test_moe_norms(void **state) {
    (void)state;
    static const int32_t shape[][3] = {{2048, 128, 8}, {4096, 128, 8}, {2880, 128, 4},
                                       {2880, 32, 4},  {4096, 8, 2},   {256, 5, 5},
                                       {72, 16, 1}};
    static const int64_t t[] = {1, 2, 4, 5, 8, 9, 16, 61, MOE_ENTER_TOKENS_MAX};
    int hopper = 0;
    CUDA(cudaDeviceGetAttribute(&hopper, cudaDevAttrComputeCapabilityMajor, 0));
    hopper = hopper >= 9;
    for (int i = 0; i < COUNT_OF(shape); i++)
        for (int j = 0; j < COUNT_OF(t); j++) {
            if (least && (i > 2 || t[j] > 9)) continue;
            const int32_t *s = shape[i];
            if (hopper && s[0] % 16 == 0)
                enter_case(t[j], s[0], s[1], s[2], types[(i + j) % 2], i % 2);
            leave_case(t[j], s[0], s[2], types[(i + j) % 2]);
        }
    leave_case(3, 512, MOE_TOP_K_MAX, DT_BF16);
    moe_enter p = {.t = 1, .stride = 129, .n_experts = 129, .top_k = 1, .dim = 64};
    const linear_weight w = {.format = WF_16, .family = 90, .k = 64};
    p.router = &w;
    p.type = w.type;
    assert_status(kernel_moe_enter(&p, NULL), ST_SHAPE);
    assert_status(kernel_moe_leave(NULL, NULL, NULL, NULL, NULL, NULL, NULL, false, 1, 1, 12, 1,
                                   DT_F16, NULL),
                  ST_SHAPE);
}

/* --- Drawing ---------------------------------------------------------------------------------- */

enum { DRAWS = 96, BIASES = 40, HISTORY = 50 };

/* Parameters that walk through every combination of the options. `bias`: room for BIASES. */
static sampling params_of(int i, int32_t vocab, logit_bias *bias) {
    static const float temperature[] = {0, 1, 0.7f, 2.5f}, top_p[] = {1, 0.9f, 0.3f, 1e-4f};
    static const float min_p[] = {0, 0.05f, 0}, penalty[] = {1, 1.3f, 0.8f};
    static const float presence[] = {0, 0.5f, -1.5f, 2, 0}, frequency[] = {0, 0.7f, 0, -0.3f, 0};
    static const int32_t top_k[] = {0, 1, 40, 0, 7}, n_bias[] = {0, 1, 0, BIASES};
    static const int32_t barred[] = {3, 1 << 20, 3, 17, 0, 31}; /* one is no token */
    sampling p = SAMPLING_GREEDY;
    p.temperature = temperature[i % 4];
    p.top_p = top_p[i / 4 % 4];
    p.min_p = min_p[i % 3];
    p.top_k = top_k[i % 5];
    p.repetition_penalty = penalty[i / 2 % 3];
    p.presence_penalty = presence[i / 3 % 5];
    p.frequency_penalty = frequency[i / 7 % 5];
    p.n_logprobs = i % 7 == 0 ? 20 : i % 7 == 1 ? 0 : -1;
    p.seed = (uint64_t)i * 77 + 5;
    p.n_bias = i % 11 == 0 ? 0 : n_bias[i / 5 % 4] < vocab ? n_bias[i / 5 % 4] : vocab;
    p.bias = bias;
    for (int32_t k = 0; k < p.n_bias; k++)
        bias[k] = (logit_bias){.token = k * (vocab / p.n_bias),
                               .bias = k % 5   ? (float)(i % 9) - 4.3f
                                       : k % 2 ? -100
                                               : 9};
    p.min_tokens = i % 3 * 40;
    p.barred[0].token = barred;
    p.barred[0].n = 4;
    p.barred[1].token = barred + 2;
    p.barred[1].n = vocab > 31 ? 4 : 2;
    return p;
}

/* kind 0: normal logits; 1: few distinct values, hence ties; 2: hardly any finite one. */
static void make_logits(float *x, int32_t vocab, int kind, uint64_t seed) {
    rng r;
    rng_seed(&r, seed, 3);
    for (int32_t i = 0; i < vocab; i++) {
        const double v = 3 * rng_normal(&r);
        x[i] = (float)(kind == 1 ? round(v) : v);
        if (kind == 2 && i != vocab / 2 && i != vocab - 1) x[i] = i % 3 ? -INFINITY : NAN;
        if (kind == 2 && seed % 2) x[i] = i % 2 ? INFINITY : NAN; /* none at all */
    }
}

/* Rows of a draw, on both sides: a draw may leave its logits and edits changed. Behind the results
 * of a draw lie those of the one before. */
typedef struct {
    int32_t vocab;
    int64_t n_edits;
    float *logits, *logits_device; /* [DRAWS, vocab] */
    draw_edit *edit, *edit_device; /* [n_edits] */
    draw_row row[DRAWS], *row_device;
    draw_result got[DRAWS], before[DRAWS], *got_device;
} drawing;

/* The rows, `few` at a time, which more blocks share the fewer they are. */
static void draw_all(drawing *d, int32_t few) {
    CUDA(cudaMemcpy(d->logits_device, d->logits, (size_t)d->vocab * DRAWS * 4,
                    cudaMemcpyHostToDevice));
    CUDA(cudaMemcpy(d->edit_device, d->edit, (size_t)d->n_edits * sizeof *d->edit,
                    cudaMemcpyDefault));
    CUDA(cudaMemcpy(d->row_device, d->row, sizeof d->row, cudaMemcpyHostToDevice));
    CUDA(cudaMemcpy(d->got_device + DRAWS, d->before, sizeof d->before, cudaMemcpyHostToDevice));
    for (int32_t i = 0; i < DRAWS; i += few)
        assert_ok(kernel_draw(d->got_device, d->logits_device + (int64_t)i * d->vocab,
                              d->row_device + i, DRAWS - i < few ? DRAWS - i : few, d->vocab,
                              NULL));
    fetch(d->got, d->got_device, sizeof d->got);
}

/* The edits are read from `at`. */
static void place_edits(drawing *d, draw_edit *at) {
    for (int i = 0; i < DRAWS; i++) d->row[i].edit = at + (d->row[i].edit - d->edit_device);
    d->edit_device = at;
}

/* The same bits from fewer rows at a time, and from edits in the host's memory. */
static void draw_results_of_few(drawing *d) {
    static draw_result want[DRAWS];
    void *host_edits, *device_edits = d->edit_device;
    memcpy(want, d->got, sizeof want);
    CUDA(cudaHostAlloc(&host_edits, (size_t)d->n_edits * sizeof *d->edit, cudaHostAllocDefault));
    place_edits(d, host_edits);
    for (int32_t few = least ? 16 : 64; few >= (least ? 16 : 1); few /= few > 16 ? 2 : 16) {
        draw_all(d, few);
        for (int32_t i = 0; i < DRAWS; i++) {
            const size_t used = offsetof(draw_result, top_token) + 4 * (size_t)want[i].n_top;
            assert_memory_equal(&d->got[i], &want[i], used);
            assert_memory_equal(d->got[i].top_logprob, want[i].top_logprob,
                                4 * (size_t)want[i].n_top);
        }
    }
    place_edits(d, device_edits);
    CUDA(cudaFreeHost(host_edits));
}

/* Without edits, or with log-probabilities, a row is as it was. */
static void rows_are_left(const drawing *d) {
    float *after = host((size_t)d->vocab * DRAWS, 4);
    fetch(after, d->logits_device, (size_t)d->vocab * DRAWS * 4);
    for (int i = 0; i < DRAWS; i++) {
        const int64_t at = (int64_t)i * d->vocab;
        if (d->row[i].n_edits && d->row[i].n_logprobs < 0) continue;
        assert_memory_equal(after + at, d->logits + at, (size_t)d->vocab * 4);
    }
    free(after);
}

/* How many tokens are not those wanted; what else is wrong fails here. */
static int32_t differing_draws(const drawing *d, const sampled *want, bool shown) {
    int32_t differ = 0;
    for (int i = 0; i < DRAWS; i++) {
        const draw_result *got = &d->got[d->row[i].to];
        if (d->row[i].kind == DRAW_NOTHING) {
            assert_int_equal(got->token, -1);
            continue;
        }
        if (got->token != want[i].token) {
            differ++;
            if (shown)
                print_message("vocab %d row %d: token %d, want %d\n", d->vocab, i, got->token,
                              want[i].token);
            continue;
        }
        assert_int_equal(got->n_top, want[i].n_top);
        if (d->row[i].n_logprobs < 0) continue;
        assert_true(got->logprob == want[i].logprob ||
                    fabs((double)got->logprob - (double)want[i].logprob) <=
                        1e-6 * (1 + fabs((double)want[i].logprob)));
        for (int j = 0; j < want[i].n_top; j++) {
            assert_int_equal(got->top_token[j], want[i].top_token[j]);
            assert_close(got->top_logprob[j], want[i].top_logprob[j],
                         1e-6 * (1 + fabs((double)want[i].top_logprob[j])));
        }
    }
    return differ;
}

/* Row i has drawn i tokens before: the last ones of a history of HISTORY. The device alone knows
 * the last of them in every other four rows; it is new or was there before. */
static void make_draw(drawing *d, int i, sampled *want, int32_t *count, void *scratch) {
    static logit_bias bias[BIASES];
    const int32_t vocab = d->vocab;
    const float *x = d->logits + (int64_t)i * vocab;
    const sampling p = params_of(i, vocab, bias);
    int32_t history[HISTORY], *last = &history[HISTORY - 1];
    for (int h = 0; h < HISTORY; h++) /* a token up to 12 times */
        history[h] = (h / (1 + h % 12) * 7919 + i) % vocab;
    const bool untold = i / 4 % 2;
    if (untold) *last = i % 2 ? (i * 331 + 5) % vocab : last[-i / 4];
    sampler_draw(want, x, vocab, &p, (uint64_t)i, history, HISTORY, scratch);
    draw_row *r = &d->row[i];
    *r = (draw_row){.temperature = p.temperature,
                    .top_p = p.top_p,
                    .min_p = p.min_p,
                    .repetition_penalty = p.repetition_penalty,
                    .presence_penalty = p.presence_penalty,
                    .frequency_penalty = p.frequency_penalty,
                    .top_k = p.top_k,
                    .n_logprobs = p.n_logprobs,
                    .kind = i == 13       ? DRAW_NOTHING
                            : i % 19 == 7 ? DRAW_GIVEN
                                          : DRAW_TOKEN,
                    .given = (i * 31) % vocab,
                    .to = (i + 3) % DRAWS,
                    .edit = d->edit_device + d->n_edits,
                    .seed = p.seed,
                    .counter = (uint64_t)i};
    if (r->kind == DRAW_GIVEN) { /* i is 7, 26, 45, 64 or 83: some have log-probabilities */
        sampler_score(want, x, vocab, r->given, p.n_logprobs);
        return;
    }
    if (untold && sampling_penalises(&p)) {
        r->last = ~(2 * DRAWS - 1 - i);
        d->before[DRAWS - 1 - i].token = *last;
        *last = -1;
    }
    r->n_edits = sampler_edits(d->edit + d->n_edits, &r->n_bias, &p, (uint64_t)i, history, HISTORY,
                               vocab, count);
    assert_true(r->n_edits <= sampler_edits_most(&p, (uint64_t)i, HISTORY, vocab));
    d->n_edits += r->n_edits;
}

static int32_t draw_case(int32_t vocab, int kind, uint64_t salt) {
    drawing d = {.vocab = vocab, .logits = host((size_t)vocab * DRAWS, 4)};
    static sampled want[DRAWS];
    void *scratch = host(1, sampler_bytes(vocab));
    int32_t *count = host((size_t)sampler_counts(vocab), 4);
    d.edit = host((size_t)DRAWS * (BIASES + HISTORY + 8), sizeof *d.edit);
    d.logits_device = dev((size_t)vocab * DRAWS * 4);
    d.edit_device = dev((size_t)DRAWS * (BIASES + HISTORY + 8) * sizeof *d.edit);
    d.row_device = dev(sizeof d.row);
    d.got_device = dev(2 * sizeof d.got);
    for (int i = 0; i < DRAWS; i++) {
        make_logits(d.logits + (int64_t)i * vocab, vocab, kind, (uint64_t)i + salt);
        make_draw(&d, i, &want[i], count, scratch);
    }
    draw_all(&d, DRAWS);
    const int32_t differ = differing_draws(&d, want, true);
    rows_are_left(&d);
    draw_results_of_few(&d);
    /* Twins: another last token; no edits; no penalty for what the output has. */
    if (vocab >= 1024 && kind == 0) {
        for (int i = 0; i < DRAWS; i++)
            if (d.row[i].last) d.before[DRAWS - 1 - i].token = want[i].token;
        draw_all(&d, DRAWS);
        assert_true(differing_draws(&d, want, false) > 0);
        for (int i = 0; i < DRAWS; i++) d.row[i].n_edits = d.row[i].n_bias;
        draw_all(&d, DRAWS);
        assert_true(differing_draws(&d, want, false) > 0);
        for (int i = 0; i < DRAWS; i++) d.row[i].n_edits = d.row[i].n_bias = 0;
        draw_all(&d, DRAWS);
        assert_true(differing_draws(&d, want, false) > 5);
    }
    void *all[] = {d.logits_device, d.edit_device, d.row_device, d.got_device};
    for (int i = 0; i < COUNT_OF(all); i++) CUDA(cudaFree(all[i]));
    free(d.logits), free(d.edit), free(count), free(scratch);
    return differ;
}

static void test_draw(void **state) {
    (void)state;
    static const int32_t vocab[] = {33, 1, 2, 31, 128, 1024, 1025, 32000, 151936};
    int32_t differ = 0, n = 0;
    for (int v = 0; v < (least ? 1 : COUNT_OF(vocab)); v++)
        for (int kind = 0; kind < 3; kind++, n += DRAWS) differ += draw_case(vocab[v], kind, 0);
    print_message("  %d of %d drawn tokens differ from sampler_draw\n", differ, n);
    assert_int_equal(differ, 0);
}

/* --- Fill ------------------------------------------------------------------------------------- */

/* Finite as whatever it is taken for, and of every sign and size there is. */
static void test_finite(void **state) {
    (void)state;
    enum { N = 1 << 16 };
    static uint8_t byte[N];
    static float value[N];
    void *p;
    assert_int_equal(cudaMalloc(&p, N), cudaSuccess);
    assert_ok(kernel_fill_finite(p, N, 5, NULL));
    assert_int_equal(cudaMemcpy(byte, p, N, cudaMemcpyDeviceToHost), cudaSuccess);
    static const dtype readings[] = {DT_F16, DT_BF16, DT_E4M3};
    for (int i = 0; i < COUNT_OF(readings); i++) {
        const int64_t n = N / dtype_bytes(readings[i], 1);
        dtype_to_f32(value, byte, n, 1, readings[i]);
        for (int64_t k = 0; k < n; k++) assert_true(fabsf(value[k]) <= 2);
    }
    bool used[256] = {false};
    int n_used = 0;
    for (int i = 0; i < N; i++) n_used += !used[byte[i]], used[byte[i]] = true;
    assert_int_equal(n_used, 1 << 6); /* six free bits */
    assert_status(kernel_fill_finite(p, 8, 5, NULL), ST_SHAPE);
    assert_int_equal(cudaFree(p), cudaSuccess);
}

static void test_noise(void **state) {
    (void)state;
    enum { N = 100003 };
    static const float mean[] = {0, 1, -0.25f};
    float *want = host(N, 4), *got = host(N, 4), *narrow = host(N, 4);
    for (int m = 0; m < 3; m++) {
        const uint64_t at = m == 2 ? ((uint64_t)5 << 32) - 1000 : 12345;
        for (int i = 0; i < N; i++)
            want[i] = fmaf(0.02f, weight_noise(0xdeadbeefcafeu, at + (uint64_t)i), mean[m]);
        void *d = dev(N * 4);
        assert_ok(kernel_fill_noise(d, DT_F32, N, 0xdeadbeefcafeu, at, 0.02f, mean[m], NULL));
        fetch(got, d, N * 4);
        assert_memory_equal(got, want, N * 4);
        for (int t = 0; t < 2; t++) {
            assert_ok(kernel_fill_noise(d, types[t], N, 0xdeadbeefcafeu, at, 0.02f, mean[m], NULL));
            dtype_from_f32(narrow, want, N, types[t]);
            fetch(got, d, N * 2);
            assert_memory_equal(got, narrow, N * 2);
        }
        assert_ok(kernel_fill_noise(d, DT_F32, N, 0xdeadbeefcafeu, at + 1, 0.02f, mean[m], NULL));
        fetch(got, d, N * 4);
        assert_memory_not_equal(got, want, N * 4); /* twin */
        CUDA(cudaFree(d));
    }
    free(want), free(got), free(narrow);
}

static void test_convert(void **state) {
    (void)state;
    static const dtype all[] = {DT_F32, DT_F16, DT_BF16};
    enum {
        ROWS = 37,
        COLS = 53,
        ROW_STRIDE = 2,
        COL_STRIDE = 90,
        N = ROWS * 2 + COLS * COL_STRIDE
    };
    float *x = normals(N, 1, 21), *want = host(ROWS * COLS, 4);
    uint8_t *in = host(N, 4), *got = host(ROWS * COLS, 4), *expect = host(ROWS * COLS, 4);
    for (int a = 0; a < 3; a++)
        for (int b = 0; b < 3; b++) {
            dtype_from_f32(in, x, N, all[a]);
            const size_t size = (size_t)dtype_bytes(all[a], 1);
            for (int r = 0; r < ROWS; r++)
                for (int c = 0; c < COLS; c++)
                    dtype_to_f32(want + r * COLS + c,
                                 in + (size_t)(r * ROW_STRIDE + c * COL_STRIDE) * size, 1, 1,
                                 all[a]);
            void *d = dev_copy(in, N * size), *o = dev(ROWS * COLS * 4);
            assert_ok(kernel_fill_convert(o, all[b], d, all[a], ROWS, COLS, ROW_STRIDE, COL_STRIDE,
                                          NULL));
            dtype_from_f32(expect, want, ROWS * COLS, all[b]);
            fetch(got, o, (size_t)dtype_bytes(all[b], ROWS * COLS));
            assert_memory_equal(got, expect, (size_t)dtype_bytes(all[b], ROWS * COLS));
            CUDA(cudaFree(d));
            CUDA(cudaFree(o));
        }
    free(x), free(want), free(in), free(got), free(expect);
}

static void test_angles(void **state) {
    (void)state;
    enum { N = 3000, HALF = 64 };
    double inv[HALF];
    for (int d = 0; d < HALF; d++) inv[d] = pow(500000, -2.0 * d / 128);
    float *got = host(N * HALF * 2, 4), c[HALF], s[HALF];
    void *di = dev_copy(inv, sizeof inv), *o = dev(N * HALF * 8);
    assert_ok(kernel_fill_angles(o, di, 1.25, N, HALF, NULL));
    fetch(got, o, N * HALF * 8);
    for (int p = 0; p < N; p++) {
        ref_rope_angles(c, s, inv, 1.25, p, HALF);
        for (int d = 0; d < HALF; d++) {
            assert_close(got[(p * HALF + d) * 2], c[d], 2e-7);
            assert_close(got[(p * HALF + d) * 2 + 1], s[d], 2e-7);
        }
    }
    CUDA(cudaFree(di));
    CUDA(cudaFree(o));
    free(got);
}

/* --- Quantisers ------------------------------------------------------------------------------- */

/* Values of every magnitude: groups of zeros, of subnormals, of ones that overflow a scale, and -0.
 * */
static float *weights_of(int32_t n, int32_t k, uint64_t seed) {
    float *w = normals((int64_t)n * k, 0.02, seed);
    static const float factor[] = {1, 0, 1e-30f, 1e30f, 1e-42f, 3e6f, 1, 1e-6f};
    for (int64_t i = 0; i < (int64_t)n * k; i++) {
        w[i] *= factor[i / k / 3 % 8];
        if (i % 97 == 0) w[i] = -0.f;
        if (i % 31 == 0) w[i] = fabsf(w[i]);
    }
    return w;
}

static void quantise_case(const char *name, int32_t n, int32_t k) {
    static arena a;
    precision p;
    assert_ok(precision_parse(&p, name));
    if (precision_fits_shape(&p, n, k) != ST_OK) return;
    assert_ok(arena_open(&a, 256 << 20));
    qmatrix want, got;
    float *w = weights_of(n, k, (uint64_t)n * 31 + (uint64_t)k), amax;
    assert_ok(qmatrix_alloc(&want, &a, &p, n, k));
    assert_ok(ref_quantize_weight(&want, w));
    const size_t codes = (size_t)qmatrix_code_bytes(&p, n, k);
    const size_t scales = (size_t)dtype_bytes(want.scale_type, qmatrix_scale_count(&p, n, k));
    const size_t zeros = (size_t)qmatrix_zero_count(&p, n, k);
    void *dw = dev_copy(w, (size_t)n * (size_t)k * 4), *da = dev(4);
    CUDA(cudaMemset(da, 0, 4));
    assert_ok(kernel_quantize_extent(da, dw, (int64_t)n * k, NULL));
    fetch(&amax, da, 4);
    float most = 0;
    for (int64_t i = 0; i < (int64_t)n * k; i++) most = fabsf(w[i]) > most ? fabsf(w[i]) : most;
    assert_true(amax == most);
    got = want;
    got.code = dev(codes);
    got.scale = dev(scales);
    got.zero = zeros ? dev(zeros) : NULL;
    got.global_scale = quantize_global_scale(p.weight, amax);
    assert_true(got.global_scale == want.global_scale);
    const int32_t half = n > 128 ? 128 : n; /* in two calls where there is room for two */
    assert_ok(kernel_quantize_weight(&got, dw, 0, half, NULL));
    assert_ok(kernel_quantize_weight(&got, (float *)dw + (int64_t)half * k, half, n - half, NULL));
    uint8_t *buffer = host(1, codes + scales);
    fetch(buffer, got.scale, scales);
    assert_memory_equal(buffer, want.scale, scales);
    if (zeros) {
        fetch(buffer, got.zero, zeros);
        assert_memory_equal(buffer, want.zero, zeros);
    }
    fetch(buffer, got.code, codes);
    assert_memory_equal(buffer, want.code, codes);
    void *all[] = {dw, da, got.code, got.scale, got.zero};
    for (int i = 0; i < 5; i++) CUDA(cudaFree(all[i]));
    free(buffer), free(w);
    arena_close(&a);
}

static void test_quantise(void **state) {
    (void)state;
    static const char *const formats[] = {"W8",       "W4",    "W4sym",   "W4g32",
                                          "W4g64sym", "W4gK",  "W4gKsym", "W4g16",
                                          "WFP8",     "WFP8b", "WMXFP4",  "WNVFP4"};
    for (int f = 0; f < COUNT_OF(formats); f++) {
        quantise_case(formats[f], 16, 128);
        quantise_case(formats[f], 48, 64);
        quantise_case(formats[f], 304, 1152);
        quantise_case(formats[f], 272, 2880);
        quantise_case(formats[f], 1024, 4096);
    }
}

/* --- Written out at 16 bit ------------------------------------------------------------------- */

/* A packed weight of `format` written out is the packed weight of its values at 16 bit, bit for
 * bit, padding included. Twin: codes that differ must show. */
static void expand_case(const char *name, int32_t n, int32_t k, dtype type, bool gated) {
    static arena a;
    precision p;
    assert_ok(precision_parse(&p, name));
    if (precision_fits_shape(&p, n, k) != ST_OK) return;
    assert_ok(arena_open(&a, 256 << 20));
    qmatrix q, values = {0};
    static const float factor[] = {1, 0, 1e-3f, 30}; /* scales that every packed form holds */
    float *w = normals((int64_t)n * k, 0.02, (uint64_t)n * 37 + (uint64_t)k);
    for (int64_t i = 0; i < (int64_t)n * k; i++) w[i] *= i % 97 ? factor[i / k / 3 % 4] : -0.f;
    assert_ok(qmatrix_alloc(&q, &a, &p, n, k));
    assert_ok(ref_quantize_weight(&q, w));
    linear_weight from = {.format = p.weight,
                          .type = type,
                          .n = n,
                          .k = k,
                          .count = 1,
                          .group = p.group,
                          .sym = p.sym,
                          .gated = gated,
                          .act = AF_16,
                          .family = 90};
    linear_weight to = from;
    to.format = WF_16;
    to.group = 0;
    to.sym = false;
    int64_t codes, scales, wide, none;
    assert_ok(linear_pack_bytes(&from, &codes, &scales));
    assert_ok(linear_pack_bytes(&to, &wide, &none));
    uint8_t *code = host((size_t)codes, 1), *scale = host((size_t)scales + 1, 1);
    uint8_t *want = host((size_t)wide, 1), *got = host((size_t)wide, 1);
    assert_ok(ref_linear_pack(&from, code, scale, &q));
    ref_dequantize_weight(w, &q, 0, n);
    uint16_t *narrow = host((size_t)n * (size_t)k, 2);
    dtype_from_f32(narrow, w, (int64_t)n * k, type);
    values.code = (uint8_t *)narrow;
    assert_ok(ref_linear_pack(&to, want, NULL, &values));
    from.scale = dev_copy(scale, (size_t)scales);
    from.global_scale = dev_copy(&q.global_scale, 4);
    to.code = dev((size_t)wide);
    for (int twin = 0; twin < 2; twin++) {
        for (int64_t i = 0; twin && i < codes; i += 97) code[i] ^= 0x10;
        from.code = dev_copy(code, (size_t)codes);
        assert_ok(linear_expand(&to, &from, NULL));
        fetch(got, to.code, (size_t)wide);
        assert_int_equal(memcmp(got, want, (size_t)wide) != 0, twin);
        CUDA(cudaFree(from.code));
    }
    void *all[] = {from.scale, from.global_scale, to.code};
    for (int i = 0; i < COUNT_OF(all); i++) CUDA(cudaFree(all[i]));
    free(w), free(code), free(scale), free(want), free(got), free(narrow);
    arena_close(&a);
}

static void test_expand(void **state) {
    (void)state;
    static const char *const formats[] = {"W8",    "W4",   "W4sym", "W4g32",  "W4g64sym",
                                          "W4g16", "WFP8", "WFP8b", "WMXFP4", "WNVFP4"};
    for (int f = 0; f < COUNT_OF(formats); f++)
        for (int t = 0; t < 2; t++) {
            expand_case(formats[f], 64, 128, types[t], false);
            expand_case(formats[f], 96, 192, types[t], true);
            if (!least) expand_case(formats[f], 272, 2880, types[t], false);
        }
}

/* Activations of rows of every magnitude, one of them with an infinity: codes times scales and
 * values are the definition's bits; int8 codes in the order of atoms too. */
static void activations_case(act_format f, int32_t group, dtype type, int32_t m, int32_t k) {
    const int32_t spans = f == AF_FP8 && group == 128 ? (k + 127) / 128 : 1, m_pad = m + 3;
    const int64_t n = (int64_t)m * k, padded = (int64_t)m_pad * k;
    static const float factor[] = {1, 0, 1e-3f, 300, 1e-7f, 1e30f, 1e-36f, 1e-41f};
    float *x = normals(n, 1, (uint64_t)n), *want = host((size_t)n, sizeof *want);
    for (int64_t i = 0; i < n; i++) x[i] *= factor[i / k % (type == DT_BF16 ? 8 : 5)];
    if (m > 9) x[9 * (int64_t)k + k / 2] = INFINITY;
    void *dx = dev_rounded(x, n, type);
    memcpy(want, x, (size_t)n * sizeof *x);
    ref_quantize_activation(want, m, k, f, group);
    activation_quantiser q = {.x = dx, .ldx = k, .m = m, .k = k, .group = group, .type = type};
    q.act = f;
    q.m_pad = m_pad;
    q.code = dev((size_t)padded);
    q.scale = dev((size_t)(spans * m_pad) * 4);
    assert_ok(kernel_quantize_activation(&q, NULL));
    uint8_t *code = host((size_t)padded, 1);
    float *scale = host((size_t)(spans * m_pad), 4), *value = host((size_t)n, 4);
    fetch(code, q.code, (size_t)padded);
    fetch(scale, q.scale, (size_t)(spans * m_pad) * 4);
    for (int64_t i = 0; i < padded; i++) {
        const int64_t row = i / k, span = spans > 1 ? i % k / 128 : 0;
        const float c = f == AF_FP8 ? f32_from_e4m3(code[i]) : (float)(int8_t)code[i];
        if (row >= m)
            assert_true(c == 0);
        else if (isnan(want[i]))
            assert_true(isnan(scale[span * m_pad + row]));
        else
            assert_true(c * scale[span * m_pad + row] == want[i]);
    }
    if (f == AF_INT8) {
        uint8_t *atoms = host((size_t)padded, 1);
        q.atoms = true;
        assert_ok(kernel_quantize_activation(&q, NULL));
        fetch(atoms, q.code, (size_t)padded);
        for (int64_t i = 0; i < padded; i++)
            assert_int_equal(atoms[i], code[i / 16 * 16 + linear_byte_input((int32_t)(i % 16))]);
        assert_true(m < 3 || memcmp(atoms, code, (size_t)padded) != 0);
        q.atoms = false;
        free(atoms);
    }
    q.value = dev((size_t)n * 2);
    assert_ok(kernel_quantize_activation(&q, NULL));
    fetch_f32(value, q.value, n, type);
    uint16_t *narrow = host((size_t)n, 2);
    dtype_from_f32(narrow, want, n, type);
    dtype_to_f32(want, narrow, n, 1, type);
    for (int64_t i = 0; i < n; i++)
        assert_true(isnan(want[i]) ? isnan(value[i]) : value[i] == want[i]);
    void *all[] = {dx, q.code, q.scale, q.value};
    for (int i = 0; i < COUNT_OF(all); i++) CUDA(cudaFree(all[i]));
    free(x), free(want), free(code), free(scale), free(value), free(narrow);
}

static void test_activations(void **state) {
    (void)state;
    static const int32_t shapes[][2] = {{1, 16},     {3, 144},    {17, 2880}, {300, 4096},
                                        {4100, 768}, {20, 14336}, {5, 53248}, {270, 1040},
                                        {950, 1168}, {4099, 2048}};
    for (int i = 0; i < COUNT_OF(shapes); i++)
        for (int t = 0; t < 2; t++) {
            activations_case(AF_INT8, 0, types[t], shapes[i][0], shapes[i][1]);
            activations_case(AF_FP8, 0, types[t], shapes[i][0], shapes[i][1]);
            activations_case(AF_FP8, 128, types[t], shapes[i][0], shapes[i][1]);
        }
}

/* --- Layouts of other tools ------------------------------------------------------------------ */

enum { UNPACK_N = 304, UNPACK_K = 1040, UNPACK_GROUP = 16 }; /* no multiples of the tiles */

typedef struct {
    const char *name;
    weight_format format;
    int32_t word_bits, bits, n_per, k_per;
    bool awq_order, zeros;
    int32_t zero_add, block_n;
    uint8_t flip;
    dtype scale_type;
    int32_t row, row_step; /* of the part that is unpacked */
} layout;

static const layout layouts[] = {
    {"awq", WF_INT4, 32, 4, 8, 1, true, true, 0, 1, 0, DT_F16, 0, 1},
    {"awq, every second row", WF_INT4, 32, 4, 8, 1, true, true, 0, 1, 0, DT_F16, 3, 2},
    {"gptq", WF_INT4, 32, 4, 1, 8, false, true, 1, 1, 0, DT_BF16, 0, 1},
    {"gptq of 8 bits", WF_INT8, 32, 8, 1, 4, false, false, 0, 1, 0x80, DT_F16, 5, 1},
    {"words along inputs", WF_INT4, 32, 4, 1, 8, false, true, 0, 1, 0, DT_F32, 1, 2},
    {"bytes", WF_FP8, 8, 8, 1, 1, false, false, 0, 1, 0, DT_F32, 0, 1},
    {"bytes in blocks", WF_FP8B, 8, 8, 1, 1, false, false, 0, 128, 0, DT_F32, 128, 1},
    {"nibbles", WF_MXFP4, 8, 4, 1, 2, false, false, 0, 1, 0, DT_UE8M0, 1, 2},
};

/* Words along inputs where rows of them lie together, else by input, as the tools have them. */
static packed_field field_of(const layout *l, const void *data, bool zero, int32_t cols) {
    const bool along_n = l->n_per > 1 || (zero && l->bits == 4);
    const int32_t n_per = along_n ? 32 / l->bits : 1, k_per = along_n ? 1 : l->k_per;
    const bool by_input = !strncmp(l->name, "gptq", 4) || !strncmp(l->name, "awq", 3);
    return (packed_field){.data = data,
                          .word_bits = l->word_bits,
                          .bits = l->bits,
                          .n_per = n_per,
                          .k_per = k_per,
                          .awq_order = l->awq_order,
                          .n_stride = by_input ? 1 : cols / k_per,
                          .k_stride = by_input ? UNPACK_N / n_per : 1};
}

static unpack_fields on_device(const packed_field *f, size_t bytes, const layout *l) {
    return (unpack_fields){.word = dev_copy(f->data, bytes),
                           .word_bits = f->word_bits,
                           .bits = f->bits,
                           .n_per = f->n_per,
                           .k_per = f->k_per,
                           .awq_order = f->awq_order,
                           .n_stride = f->n_stride,
                           .k_stride = f->k_stride,
                           .row = l->row,
                           .row_step = l->row_step};
}

/* A matrix of random codes, scales and zero points, and its canonical form. */
typedef struct {
    const layout *l;
    int32_t k, group, groups, rows;
    precision p;
    uint32_t *code, *zero;
    uint8_t *scale;
    packed_matrix m;
    qmatrix q;
    arena a;
} stored;

enum { UNPACK_WORDS = UNPACK_N * UNPACK_K };

static stored make_stored(const layout *l) {
    const weight_format f = l->format;
    const int32_t k = f == WF_MXFP4 ? 1024 : UNPACK_K;
    const int32_t group = f == WF_FP8 || f == WF_INT8 ? k
                          : f == WF_FP8B              ? 128
                          : f == WF_MXFP4             ? 32
                                                      : UNPACK_GROUP;
    stored s = {.l = l, .k = k, .group = group, .groups = (int32_t)div_up(k, group)};
    s.rows = (UNPACK_N - l->row) / l->row_step / 16 * 16;
    s.p = (precision){.weight = f, .group = group == k ? 0 : group, .sym = !l->zeros};
    s.code = host(UNPACK_WORDS, 4);
    s.zero = host(UNPACK_WORDS, 4);
    s.scale = host(UNPACK_WORDS / 8, 4);
    float *scale = normals(UNPACK_WORDS / 8, 0.01, 5);
    rng r;
    rng_seed(&r, 3, 1);
    for (int32_t i = 0; i < UNPACK_WORDS; i++) {
        s.code[i] = (uint32_t)rng_u64(&r) & 0x7b7b7b7bu; /* no NaN among the floats */
        s.zero[i] = (uint32_t)rng_u64(&r);
    }
    if (l->scale_type == DT_UE8M0)
        for (int32_t i = 0; i < UNPACK_WORDS / 2; i++) s.scale[i] = (uint8_t)(100 + i % 50);
    else
        dtype_from_f32(s.scale, scale, UNPACK_WORDS / 8, l->scale_type);
    free(scale);
    s.m = (packed_matrix){.name = l->name,
                          .format = f,
                          .n = UNPACK_N,
                          .k = k,
                          .group = group,
                          .block_n = l->block_n,
                          .sym = !l->zeros,
                          .code_flip = l->flip,
                          .zero_add = l->zero_add,
                          .scale = s.scale,
                          .scale_type = l->scale_type,
                          .scale_n_stride = s.groups,
                          .scale_g_stride = 1,
                          .global_scale = 1};
    s.m.code = field_of(l, s.code, false, k);
    if (l->zeros) s.m.zero = field_of(l, s.zero, true, s.groups);
    assert_ok(arena_open(&s.a, (size_t)16 << 20));
    assert_ok(qmatrix_alloc(&s.q, &s.a, &s.p, s.rows, k));
    for (int32_t i = 0; i < s.rows; i++)
        packed_canonical(&s.m, l->row + i * l->row_step, NULL, &s.q, i);
    return s;
}

/* Values of the same rows; with `order`, of inputs whose groups lie the other way round. */
static void check_values(stored *s, bool order, int32_t *failures) {
    const layout *l = s->l;
    const int64_t n = (int64_t)s->rows * s->k;
    float *want = host((size_t)n, 4), *got = host((size_t)n, 4), *to = dev((size_t)n * 4);
    int32_t *g = host((size_t)s->k, 4);
    for (int32_t i = 0; i < s->k; i++) g[i] = s->groups - 1 - i / s->group;
    s->m.g_idx = order ? g : NULL;
    for (int32_t i = 0; i < s->rows; i++)
        packed_row(&s->m, l->row + i * l->row_step, want + (int64_t)i * s->k);
    const bool four = l->bits == 4, integer = l->format == WF_INT4 || l->format == WF_INT8;
    unpack_matrix u = {.code = on_device(&s->m.code, UNPACK_WORDS * 4, l),
                       .zero_add = l->zero_add,
                       .middle = !integer ? 0
                                 : four   ? 8
                                          : 128,
                       .scale = {.scale = dev_copy(s->scale, UNPACK_WORDS / 2),
                                 .type = l->scale_type,
                                 .n_stride = s->groups,
                                 .g_stride = 1,
                                 .block_n = l->block_n,
                                 .row = l->row,
                                 .row_step = l->row_step},
                       .group_of = order ? dev_copy(g, (size_t)s->k * 4) : NULL,
                       .group = s->group,
                       .code_type = integer ? DT_U8
                                    : four  ? DT_E2M1
                                            : DT_E4M3,
                       .global_scale = s->m.global_scale};
    if (l->zeros) u.zero = on_device(&s->m.zero, UNPACK_WORDS * 4, l);
    assert_ok(kernel_unpack_values(to, DT_F32, &u, s->rows, s->k, NULL));
    fetch(got, to, (size_t)n * 4);
    *failures += memcmp(got, want, (size_t)n * 4) != 0;
    got[n / 3] = nextafterf(got[n / 3], 9); /* twin */
    *failures += memcmp(got, want, (size_t)n * 4) == 0;
    CUDA(cudaFree((void *)(uintptr_t)u.code.word));
    CUDA(cudaFree((void *)(uintptr_t)u.scale.scale));
    CUDA(cudaFree(to));
    if (l->zeros) CUDA(cudaFree((void *)(uintptr_t)u.zero.word));
    if (order) CUDA(cudaFree((void *)(uintptr_t)u.group_of));
    free(want);
    free(got);
    free(g);
}

static void check_unpack(const stored *s, int32_t *failures) {
    const layout *l = s->l;
    const qmatrix *q = &s->q;
    const size_t codes = (size_t)qmatrix_code_bytes(&s->p, s->rows, s->k);
    const size_t zeros = (size_t)qmatrix_zero_count(&s->p, s->rows, s->k);
    const size_t scales =
        (size_t)dtype_bytes(q->scale_type, qmatrix_scale_count(&s->p, s->rows, s->k));
    uint8_t *got = host(codes + scales, 1), *to = dev(codes + scales);
    const unpack_fields fields = on_device(&s->m.code, UNPACK_WORDS * 4, l);
    assert_ok(kernel_unpack_codes(to, &fields, s->rows, s->k, l->flip, NULL));
    fetch(got, to, codes);
    *failures += memcmp(got, q->code, codes) != 0;
    got[codes / 2] ^= 1; /* twin */
    *failures += memcmp(got, q->code, codes) == 0;
    if (zeros) {
        const unpack_fields z = on_device(&s->m.zero, UNPACK_WORDS * 4, l);
        assert_ok(kernel_unpack_zeros(to, &z, s->rows, s->groups, l->zero_add, NULL));
        fetch(got, to, zeros);
        *failures += memcmp(got, q->zero, zeros) != 0;
        CUDA(cudaFree((void *)(uintptr_t)z.word));
    }
    const unpack_scales us = {.scale = dev_copy(s->scale, UNPACK_WORDS / 2),
                              .type = l->scale_type,
                              .n_stride = s->groups,
                              .g_stride = 1,
                              .block_n = l->block_n,
                              .row = l->row,
                              .row_step = l->row_step * q->block_n};
    assert_ok(kernel_unpack_scales(to, q->scale_type, &us, (int32_t)div_up(s->rows, q->block_n),
                                   s->groups, NULL));
    fetch(got, to, scales);
    *failures += memcmp(got, q->scale, scales) != 0;
    CUDA(cudaFree((void *)(uintptr_t)fields.word));
    CUDA(cudaFree((void *)(uintptr_t)us.scale));
    CUDA(cudaFree(to));
    free(got);
}

static void test_unpack(void **state) {
    (void)state;
    int32_t failures = 0;
    for (int i = 0; i < COUNT_OF(layouts); i++) {
        stored s = make_stored(&layouts[i]);
        check_unpack(&s, &failures);
        check_values(&s, false, &failures);
        check_values(&s, true, &failures);
        print_message("  %-24s %d failures so far\n", layouts[i].name, failures);
        arena_close(&s.a);
        free(s.code);
        free(s.zero);
        free(s.scale);
    }
    assert_int_equal(failures, 0);
}

/* gpu_ops [TEST]: one test alone; gpu_ops least TEST: on few and small cases. */
int main(int argc, char **argv) {
    int result;
    least = argc > 2 && !strcmp(argv[1], "least");
    if (argc > 1) cmocka_set_test_filter(argv[argc - 1]);
    if (gpu_missing(&result)) return result;
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_rows),       cmocka_unit_test(test_norm_embed),
        cmocka_unit_test(test_norm_codes), cmocka_unit_test(test_rows_join),
        cmocka_unit_test(test_norm),       cmocka_unit_test(test_norm_ranks),
        cmocka_unit_test(test_gated),      cmocka_unit_test(test_moe),
        cmocka_unit_test(test_moe_norms),  cmocka_unit_test(test_draw),
        cmocka_unit_test(test_noise),      cmocka_unit_test(test_finite),
        cmocka_unit_test(test_convert),    cmocka_unit_test(test_angles),
        cmocka_unit_test(test_quantise),   cmocka_unit_test(test_activations),
        cmocka_unit_test(test_expand),     cmocka_unit_test(test_unpack),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
