/* test_quant.c - the quantisers: answers by hand, error bounds from the rounding rules,
 * idempotence, groups that sit at the ends of the number range, and sizes. */
#include "test.h"

#include "ref_quant.h"
#include "rng.h"
#include <float.h>
#include <string.h>

enum { ARENA_BYTES = 64 << 20 };

static int open_arena(void **state) {
    static arena a;
    *state = &a;
    return arena_open(&a, ARENA_BYTES) == ST_OK ? 0 : -1;
}

static int close_arena(void **state) {
    arena_close(*state);
    return 0;
}

static const char *const formats[] = {"W8",   "W8g32",   "W4",   "W4sym", "W4g32",  "W4g64sym",
                                      "W4gK", "W4gKsym", "WFP8", "WFP8b", "WMXFP4", "WNVFP4"};

static precision parsed(const char *name) {
    precision p;
    assert_ok(precision_parse(&p, name));
    return p;
}

static qmatrix quantized(arena *a, const char *name, const float *w, int32_t n, int32_t k) {
    const precision p = parsed(name);
    qmatrix q;
    assert_ok(qmatrix_alloc(&q, a, &p, n, k));
    assert_ok(ref_quantize_weight(&q, w));
    return q;
}

static float *dequantized(arena *a, const qmatrix *q) {
    float *out = arena_array(a, float, (size_t)q->n *(size_t)q->k);
    assert_non_null(out);
    ref_dequantize_weight(out, q, 0, q->n);
    return out;
}

/* --- The struct, read without the code under test --------------------------------------------- */

static double scale_at(const qmatrix *q, int64_t row, int64_t col) {
    const int64_t at = row / q->block_n * div_up(q->k, q->group) + col / q->group;
    switch (q->scale_type) {
    case DT_F16: return (double)f32_from_f16(((const uint16_t *)q->scale)[at]);
    case DT_F32: return (double)((const float *)q->scale)[at];
    case DT_UE8M0: return (double)f32_from_ue8m0(((const uint8_t *)q->scale)[at]);
    default: return (double)f32_from_e4m3(((const uint8_t *)q->scale)[at]);
    }
}

static double code_at(const qmatrix *q, int64_t row, int64_t col) {
    const int64_t i = row * q->k + col;
    const uint8_t nibble = (uint8_t)(i & 1 ? q->code[i / 2] >> 4 : q->code[i / 2] & 15);
    switch (q->format) {
    case WF_INT8: return ((const int8_t *)q->code)[i];
    case WF_INT4: return nibble - (q->zero ? q->zero[row * (q->k / q->group) + col / q->group] : 8);
    case WF_FP8:
    case WF_FP8B: return (double)f32_from_e4m3(q->code[i]);
    default: return (double)f32_from_e2m1(nibble);
    }
}

/* The value by the formula of ref_quant.h in f64. */
static double value_at(const qmatrix *q, int64_t row, int64_t col) {
    return code_at(q, row, col) * scale_at(q, row, col) * (double)q->global_scale;
}

/* What an element w may be off by. s = the factor of a code step of 1.
 *   ints: s/2; and at the ends of the range 15 steps of a scale that was rounded to f16 (2^-11 of
 *   it, or 2^-25 where subnormal). FP8: half of 2^-3 of the value, or half the subnormal step 2^-9.
 *   FP4: half the gap at the value (gaps .5, 1, 2), and all beyond 6: for MXFP4 2 of 8; for NVFP4
 *   what an e4m3 scale rounded down by 2^-4 (or half a subnormal step 2^-10) leaves of 6.
 * 2^-20 of the value for the f32 quotient, product and scale, and 448 of the subnormal steps of f32
 *   that a tiny scale was rounded to. */
static double allowed(const qmatrix *q, int64_t row, int64_t col, double w) {
    const double scale = scale_at(q, row, col), s = scale * (double)q->global_scale;
    const double a = fabs(w), slop = a * 0x1p-20 + 448 * 0x1p-149;
    switch (q->format) {
    case WF_INT8: return s / 2 + slop;
    case WF_INT4: return s / 2 + 15 * fmax(scale * 0x1p-11, 0x1p-25) + slop;
    case WF_FP8:
    case WF_FP8B: return fmax(a * 0x1p-4, s * 0x1p-10) + slop;
    default: break;
    }
    const double steps = a / s;
    if (steps <= 6) return s * (steps <= 2 ? 0.25 : steps <= 4 ? 0.5 : 1) + slop;
    if (q->format == WF_MXFP4) return 2 * s + slop;
    return 6 * (double)q->global_scale * fmax(scale * 0x1p-4, 0x1p-10) + slop;
}

/* Elements of `out` further from w than allowed; NaN counts. */
static int64_t out_of_bound(const qmatrix *q, const float *w, const float *out) {
    int64_t wrong = 0;
    for (int64_t r = 0; r < q->n; r++)
        for (int64_t c = 0; c < q->k; c++) {
            const double x = (double)w[r * q->k + c];
            const double err = fabs((double)out[r * q->k + c] - x);
            wrong += !(err <= allowed(q, r, c, x));
        }
    return wrong;
}

static int64_t different(const float *a, const float *b, int64_t n) {
    int64_t count = 0;
    for (int64_t i = 0; i < n; i++) count += !(a[i] == b[i]);
    return count;
}

/* Weights of about 1/sqrt(k) with a few outliers, as in real layers. */
static float *random_weights(arena *a, int32_t n, int32_t k, uint64_t seed) {
    rng r;
    rng_seed(&r, 31, seed);
    float *w = arena_array(a, float, (size_t)n *(size_t)k);
    assert_non_null(w);
    for (int64_t i = 0; i < (int64_t)n * k; i++) {
        const double x = rng_normal(&r) / sqrt(k);
        w[i] = (float)(rng_below(&r, 200) == 0 ? 12 * x : x);
    }
    return w;
}

/* --- Weights ---------------------------------------------------------------------------------- */

static void sizes_are_those_that_precision_counts(void **state) {
    arena *a = *state;
    static const int32_t shapes[][2] = {{16, 128}, {48, 256}, {144, 384}, {256, 640}};
    for (int32_t f = 0; f < COUNT_OF(formats); f++)
        for (int32_t s = 0; s < COUNT_OF(shapes); s++) {
            const precision p = parsed(formats[f]);
            const int32_t n = shapes[s][0], k = shapes[s][1];
            qmatrix q;
            assert_ok(qmatrix_alloc(&q, a, &p, n, k));
            assert_int_equal(!q.zero, qmatrix_zero_count(&p, n, k) == 0);
            const int64_t parts = qmatrix_code_bytes(&p, n, k) + qmatrix_zero_count(&p, n, k) +
                                  dtype_bytes(q.scale_type, qmatrix_scale_count(&p, n, k));
            assert_int_equal(parts, precision_weight_bytes(&p, n, k));
            assert_int_not_equal(parts, precision_weight_bytes(&p, n, k + 128)); /* twin */
            /* What the struct's own fields say. */
            assert_int_equal(qmatrix_scale_count(&p, n, k),
                             div_up(n, q.block_n) * div_up(k, q.group));
            arena_reset(a, 0);
        }
}

static void elements_are_within_half_a_step(void **state) {
    arena *a = *state;
    static const int32_t shapes[][2] = {{16, 128}, {144, 384}, {272, 2048}};
    for (int32_t f = 0; f < COUNT_OF(formats); f++)
        for (int32_t s = 0; s < COUNT_OF(shapes); s++) {
            const int32_t n = shapes[s][0], k = shapes[s][1];
            const float *w = random_weights(a, n, k, (uint64_t)s);
            const qmatrix q = quantized(a, formats[f], w, n, k);
            float *out = dequantized(a, &q);
            for (int64_t r = 0; r < n; r++)
                for (int64_t c = 0; c < k; c++)
                    if (out[r * k + c] != (float)value_at(&q, r, c))
                        fail_msg("%s: [%d, %d] is %a, by the formula %a", formats[f], (int)r,
                                 (int)c, (double)out[r * k + c], value_at(&q, r, c));
            const int64_t wrong = out_of_bound(&q, w, out);
            if (wrong) fail_msg("%s: %d elements out of bound", formats[f], (int)wrong);
            /* Twins: a code in error by one step, and NaN, are noticed. */
            for (int64_t i = 0; i < (int64_t)n * k; i += (int64_t)n * k / (s == 2 ? 2 : 37)) {
                const float keep = out[i];
                const double x = (double)w[i];
                out[i] = (float)(x + 1.01 * allowed(&q, i / k, i % k, x));
                assert_int_equal(out_of_bound(&q, w, out), 1);
                out[i] = NAN;
                assert_int_equal(out_of_bound(&q, w, out), 1);
                out[i] = keep;
            }
            arena_reset(a, 0);
        }
}

/* The quantised form of the dequantised matrix is the same one: exactly where the scale is a
 * rounded one, to the last bits of an f32 scale elsewhere; asymmetric int4 only for groups that use
 * both ends of the code range (else the second range is shorter than the first). */
static void quantising_again_changes_nothing(void **state) {
    arena *a = *state;
    enum { N = 144, K = 512 };
    for (int32_t f = 0; f < COUNT_OF(formats); f++) {
        const float *w = random_weights(a, N, K, 7);
        const qmatrix q = quantized(a, formats[f], w, N, K);
        float *once = dequantized(a, &q);
        const qmatrix q2 = quantized(a, formats[f], once, N, K);
        const float *twice = dequantized(a, &q2);
        const bool exact = q.format == WF_INT4 || q.format == WF_MXFP4;
        int64_t compared = 0, wrong = 0;
        for (int64_t r = 0; r < N; r++)
            for (int64_t c0 = 0; c0 < K; c0 += q.group) {
                bool low = !q.zero, high = !q.zero;
                for (int64_t c = c0; q.zero && c < c0 + q.group; c++) {
                    const double code = code_at(&q, r, c) + q.zero[r * (K / q.group) + c / q.group];
                    low |= code == 0;
                    high |= code == 15;
                }
                if (!low || !high) continue;
                for (int64_t c = c0; c < i64_min(c0 + q.group, K); c++, compared++) {
                    const double x = (double)once[r * K + c], y = (double)twice[r * K + c];
                    wrong += !(fabs(x - y) <= (exact ? 0 : fabs(x) * 0x1p-22));
                }
            }
        assert_true(compared > N * K / 2);
        if (wrong) fail_msg("%s: %d of %d differ", formats[f], (int)wrong, (int)compared);
        once[N * K / 2 + 3] += 1; /* twin: an outlier takes over its group */
        const qmatrix q3 = quantized(a, formats[f], once, N, K);
        assert_true(different(dequantized(a, &q3), twice, N * K) > 0);
        arena_reset(a, 0);
    }
}

static void int4_asymmetric_known_answer(void **state) {
    arena *a = *state;
    float w[16 * 16] = {-1.5f, 6.f, 0.f, 0.25f, 0.75f, -0.3f, 2.f, 1.f}; /* range 7.5, s = 0.5 */
    for (int32_t i = 0; i < 16; i++) w[16 + i] = 3.f; /* constant: s = f16(3/15), code 15, zero 0 */
    for (int32_t i = 0; i < 16; i++) w[32 + i] = -30.f + (float)i; /* all negative: s = 2 */
    const qmatrix q = quantized(a, "W4g16", w, 16, 16);
    const uint16_t *s = q.scale;
    assert_int_equal(s[0], 0x3800); /* 0.5 */
    assert_int_equal(q.zero[0], 3);
    /* codes 0 15 | 3 3 (.25/.5 = .5 ties to 0) | 5 (1.5 ties to 2) 2 (-.6 to -1) | 7 5 | 3 ... */
    static const uint8_t row0[8] = {0xf0, 0x33, 0x25, 0x57, 0x33, 0x33, 0x33, 0x33};
    assert_memory_equal(q.code, row0, sizeof row0);
    assert_int_equal(s[1], 0x3266); /* 0.2 is 0x3266 = 0.19995 in f16 */
    assert_int_equal(q.zero[1], 0);
    assert_int_equal(q.code[8], 0xff);
    assert_int_equal(s[2], 0x4000);
    assert_int_equal(q.zero[2], 15);
    /* (-30 + i) / 2 to nearest even, then + 15: -15 -14(.5) -14 -14(-13.5) -13 -12 -12 -12 ... */
    static const uint8_t row2[8] = {0x10, 0x11, 0x32, 0x33, 0x54, 0x55, 0x76, 0x77};
    assert_memory_equal(q.code + 16, row2, sizeof row2);
    assert_int_equal(s[3], 0x3c00); /* zeros: scale 1 */
    assert_int_equal(q.zero[3], 0);
    assert_int_equal(q.code[24], 0);
    const float *out = dequantized(a, &q);
    assert_true(out[0] == -1.5f && out[1] == 6.f && out[4] == 1.f && out[16 * 3] == 0.f);
    w[1] = 6.5f; /* twin: a longer range, other codes */
    const qmatrix other = quantized(a, "W4g16", w, 16, 16);
    assert_memory_not_equal(other.code, row0, sizeof row0);
    arena_reset(a, 0);
}

static void symmetric_and_float_known_answers(void **state) {
    arena *a = *state;
    float w[16 * 32] = {7.f, -7.f, 3.5f, 0.5f, -1.5f, 0.4f};
    qmatrix q = quantized(a, "W4g32sym", w, 16, 32);
    assert_int_equal(((uint16_t *)q.scale)[0], 0x3c00);
    static const uint8_t sym[4] = {0x1f, 0x8c, 0x86, 0x88}; /* 15 1 | 4+8 0+8 | -2+8 0+8 */
    assert_memory_equal(q.code, sym, sizeof sym);
    assert_int_equal(((uint16_t *)q.scale)[1], 0x3c00); /* a row of zeros */
    assert_int_equal(q.code[16], 0x88);

    w[0] = 127.f; /* s = 1 */
    q = quantized(a, "W8", w, 16, 32);
    assert_true(((float *)q.scale)[0] == 1.f);
    static const int8_t int8[6] = {127, -7, 4, 0, -2, 0};
    assert_memory_equal(q.code, int8, sizeof int8);

    w[0] = 448.f;
    q = quantized(a, "WFP8", w, 16, 32);
    assert_true(((float *)q.scale)[0] == 1.f);
    /* 448; -7 = -1.75 * 4; 3.5 = 1.75 * 2; .5; -1.5; .4 = 1.6 / 4 -> 1.625 / 4 */
    static const uint8_t fp8[6] = {0x7e, 0xce, 0x46, 0x30, 0xbc, 0x2d};
    assert_memory_equal(q.code, fp8, sizeof fp8);

    w[0] = 7.f; /* floor(log2 7) - 2 = 0: scale 1, 7 saturates to 6, 3.5 ties to 4 */
    q = quantized(a, "WMXFP4", w, 16, 32);
    assert_int_equal(((uint8_t *)q.scale)[0], 127);
    static const uint8_t mx[3] = {0xf7, 0x16, 0x1b}; /* 6 -6 | 4 .5 | -1.5 .5 */
    assert_memory_equal(q.code, mx, sizeof mx);

    w[0] = 2688.f; /* global 1, s = 448; the second group of 16: amax 12, s = 2 */
    w[16] = 12.f;
    w[17] = -1.f;
    w[48] = 0.004f; /* / 6 rounds to zero in e4m3: the smallest scale 2^-9 instead, 2.05 steps */
    q = quantized(a, "WNVFP4", w, 16, 32);
    assert_true(q.global_scale == 1.f);
    assert_int_equal(((uint8_t *)q.scale)[0], 0x7e);
    assert_int_equal(((uint8_t *)q.scale)[1], 0x40);
    assert_int_equal(q.code[0], 0x87); /* 6, and -7/448 is -0 */
    assert_int_equal(q.code[8], 0x97); /* 6, -.5 */
    assert_int_equal(((uint8_t *)q.scale)[2], 0x38);
    assert_int_equal(((uint8_t *)q.scale)[3], 0x01);
    assert_true(dequantized(a, &q)[48] == 0x1p-8f);
    q.code[8] ^= 0x10; /* twin */
    assert_true(dequantized(a, &q)[17] != -1.f);
    arena_reset(a, 0);
}

/* FP8b: each 128 x 128 block, the partial ones at the edges too, has the scale of its own amax. */
static void blocks_have_their_own_scale(void **state) {
    arena *a = *state;
    enum { N = 144, K = 272 };
    float *w = random_weights(a, N, K, 3);
    for (int32_t i = 0; i < 2; i++)
        for (int32_t j = 0; j < 3; j++) /* the last element of each block is its largest */
            w[(int64_t)(i ? N - 1 : 127) * K + (j == 2 ? K - 1 : 128 * j + 127)] =
                448.f * (float)(1 + i * 3 + j);
    const qmatrix q = quantized(a, "WFP8b", w, N, K);
    for (int32_t at = 0; at < 6; at++) assert_true(((float *)q.scale)[at] == (float)(1 + at));
    assert_int_equal(out_of_bound(&q, w, dequantized(a, &q)), 0);
    ((float *)q.scale)[5] = 1; /* twin */
    assert_true(out_of_bound(&q, w, dequantized(a, &q)) > 0);
    arena_reset(a, 0);
}

/* Every format on groups at the ends of f32: finite out for finite in, and the bound wherever the
 * scale type reaches (INT4's f16 scale ends at 65504). */
static void extreme_groups_stay_finite(void **state) {
    arena *a = *state;
    enum { N = 16, K = 128 };
    static const float levels[] = {0.f,     -0.f,     FLT_TRUE_MIN, 0x1p-140f, 0x1p-127f, FLT_MIN,
                                   1e-30f,  0x1p-40f, 0x1p-26f,     0x1p-24f,  1e-6f,     1.f,
                                   65504.f, 4e5f,     9e5f,         1e20f,     FLT_MAX};
    rng r;
    rng_seed(&r, 33, 0);
    for (int32_t f = 0; f < COUNT_OF(formats); f++)
        for (int32_t l = 0; l < COUNT_OF(levels); l++)
            for (int32_t kind = 0; kind < 5; kind++) {
                float *w = arena_array(a, float, N *K);
                for (int32_t i = 0; i < N * K; i++) {
                    const float u = (float)rng_unit(&r), x = levels[l];
                    w[i] = kind == 0 ? x : kind == 1 ? -x : kind == 2 ? x * u : -x * u;
                    if (kind == 4) w[i] = i & 1 ? -x : x * u; /* the widest range */
                }
                const qmatrix q = quantized(a, formats[f], w, N, K);
                float *out = dequantized(a, &q);
                for (int32_t i = 0; i < N * K; i++) {
                    if (!isfinite(out[i]) || !isfinite(scale_at(&q, i / K, i % K)) ||
                        !(scale_at(&q, i / K, i % K) > 0))
                        fail_msg("%s of level %g: %g", formats[f], (double)levels[l],
                                 (double)out[i]);
                }
                const bool reached = q.format != WF_INT4 || levels[l] <= 4e5f;
                if (reached && out_of_bound(&q, w, out) > 0)
                    fail_msg("%s of level %g, kind %d: out of bound", formats[f], (double)levels[l],
                             kind);
                if (levels[l] == 0) assert_true(out[77] == 0);
                out[77] = 3.f * levels[l] + 1.f; /* twin */
                if (reached && !out_of_bound(&q, w, out))
                    fail_msg("%s of level %g, kind %d: twin passed", formats[f], (double)levels[l],
                             kind);
                arena_reset(a, 0);
            }
}

static void nan_and_infinity_are_refused_with_their_place(void **state) {
    arena *a = *state;
    enum { N = 32, K = 256 };
    static const float bad[] = {NAN, -NAN, INFINITY, -INFINITY};
    for (int32_t f = 0; f < COUNT_OF(formats); f++)
        for (int32_t b = 0; b < COUNT_OF(bad); b++) {
            float *w = random_weights(a, N, K, 4);
            const precision p = parsed(formats[f]);
            qmatrix q;
            assert_ok(qmatrix_alloc(&q, a, &p, N, K));
            assert_ok(ref_quantize_weight(&q, w));
            w[17 * K + 201] = bad[b];
            w[30 * K] = NAN; /* the first one is named */
            assert_status(ref_quantize_weight(&q, w), ST_FORMAT);
            assert_non_null(strstr(fail_message(), "row 17, column 201"));
            arena_reset(a, 0);
        }
}

static void a_range_of_rows_is_part_of_the_whole(void **state) {
    arena *a = *state;
    enum { N = 144, K = 128 };
    const float *w = random_weights(a, N, K, 5);
    for (int32_t f = 0; f < COUNT_OF(formats); f++) {
        const qmatrix q = quantized(a, formats[f], w, N, K);
        float *whole = dequantized(a, &q);
        static float part[N * K];
        ref_dequantize_weight(part, &q, 5, 0);
        for (int32_t row = 0; row < N; row += 11) {
            const int32_t rows = (int32_t)i64_min(13, N - row);
            part[rows * K] = -77.f;
            ref_dequantize_weight(part, &q, row, rows);
            assert_int_equal(different(part, whole + row * K, rows * K), 0);
            if (row + rows < N) assert_true(part[rows * K] == -77.f);
        }
        part[0] += 1; /* twin */
        assert_true(different(part, whole + 143 * K, K) == 1);
    }
    arena_reset(a, 0);
}

static void allocation_failures_leave_no_trace(void **state) {
    arena *a = *state;
    for (int32_t f = 0; f < COUNT_OF(formats); f++) {
        const precision p = parsed(formats[f]);
        const int32_t parts = qmatrix_zero_count(&p, 16, 128) ? 3 : 2;
        qmatrix q;
        memset(&q, 0x5a, sizeof q);
        const qmatrix before = q;
        assert_non_null(arena_array(a, char, 5));
        const size_t used = a->used;
        for (int32_t n = 1;; n++) {
            mem_fail_at(n);
            const status st = qmatrix_alloc(&q, a, &p, 16, 128);
            mem_fail_at(0);
            if (st == ST_OK) {
                assert_int_equal(n, parts + 1);
                break;
            }
            assert_status(st, ST_NOMEM);
            assert_int_equal(a->used, used);
            assert_memory_equal(&q, &before, sizeof q);
        }
        assert_status(qmatrix_alloc(&q, a, &p, 1 << 20, 1 << 20), ST_NOMEM); /* the arena ends */
        assert_status(qmatrix_alloc(&q, a, &p, 16, 40), ST_SHAPE);
        arena_reset(a, 0);
    }
}

/* --- Activations ------------------------------------------------------------------------------ */

static void activations_become_what_the_device_multiplies(void **state) {
    (void)state;
    enum { T = 3, K = 272 };
    static float x[T * K], y[T * K];
    rng r;
    rng_seed(&r, 34, 0);
    for (int32_t i = 0; i < T * K; i++) x[i] = i < K ? 0 : (float)rng_normal(&r);
    x[K + 5] = 50.f; /* an outlier: the groups of 128 differ */
    memcpy(y, x, sizeof x);
    ref_quantize_activation(y, T, K, AF_16, 0);
    assert_int_equal(different(x, y, T * K), 0);
    for (int32_t mode = 0; mode < 3; mode++) {
        const act_format f = mode == 0 ? AF_INT8 : AF_FP8;
        const int32_t span = mode == 2 ? 128 : K;
        memcpy(y, x, sizeof x);
        ref_quantize_activation(y, T, K, f, mode == 2 ? 128 : 0);
        for (int32_t twin = 0; twin < 2; twin++) {
            int32_t wrong = 0;
            if (twin) y[K + 200] += 0.5f;
            for (int32_t i = 0; i < T * K; i++) {
                const int32_t first = i % K / span * span + i / K * K;
                double amax = 0;
                for (int32_t j = first; j < i64_min(first + span, (i / K + 1) * K); j++)
                    amax = fmax(amax, fabs((double)x[j]));
                const double s = amax / (f == AF_INT8 ? 127 : 448), a = fabs((double)x[i]);
                const double bound = f == AF_INT8 ? s / 2 : fmax(a * 0x1p-4, s * 0x1p-10);
                wrong += !(fabs((double)y[i] - (double)x[i]) <= bound + a * 0x1p-20);
            }
            assert_int_equal(wrong, twin);
        }
    }
    memcpy(y, x, sizeof x);
    y[K + 130] = INFINITY;
    ref_quantize_activation(y, T, K, AF_FP8, 128);
    for (int32_t i = 0; i < T * K; i++) assert_int_equal(isnan(y[i]), i >= K + 128 && i < K + 256);
    float tiny[16] = {FLT_TRUE_MIN, -FLT_TRUE_MIN}, huge[16] = {FLT_MAX, -FLT_MAX, 1.f};
    for (act_format f = AF_INT8; f <= AF_FP8; f++) {
        ref_quantize_activation(tiny, 1, 16, f, 0);
        ref_quantize_activation(huge, 1, 16, f, 0);
        for (int32_t i = 0; i < 16; i++) assert_true(isfinite(tiny[i]) && isfinite(huge[i]));
    }
    ref_quantize_activation(NULL, 0, K, AF_INT8, 0);
}

/* --- KV --------------------------------------------------------------------------------------- */

/* |value - x| allowed: half a step, that was rounded up; the clamped end: (2^b - 1) times the
 * rounding of the scale to f16 (2^-11 of it, or 2^-25); the rounding of the minimum to f16; one f32
 * rounding. */
static double kv_allowed(const float *x, int32_t d, int32_t i, kv_format f) {
    double lo = (double)x[0], hi = (double)x[0];
    for (int32_t j = 1; j < d; j++) {
        lo = fmin(lo, (double)x[j]);
        hi = fmax(hi, (double)x[j]);
    }
    const double a = fabs((double)x[i]), amax = fmax(-lo, hi);
    if (f == KF_16) return 0;
    if (f == KF_FP8) {
        const double s = amax / 448 * (1 + ldexp(1, 1 - KVFP8_SCALE_BITS));
        const double off = fmax(s * 0x1p-11, 0x1p-25);
        return fmax(a * 0x1p-4, (s + off) * 0x1p-10) + 448 * off + amax * 0x1p-20;
    }
    const double top = f == KF_8 ? 255 : 15;
    const double up = 1 + ldexp(1, 1 - (f == KF_8 ? KV8_SCALE_BITS : KV4_SCALE_BITS));
    const double s = (hi - lo) / (f == KF_8 ? KV8_STEPS : 15) * up;
    const double off = fmax(s * 0x1p-11, 0x1p-25), min_off = fmax(fabs(lo) * 0x1p-11, 0x1p-25);
    return (s + off) / 2 + top * off + min_off + amax * 0x1p-20;
}

static int32_t kv_out_of_bound(const float *x, const float *y, int32_t d, kv_format f) {
    int32_t wrong = 0;
    for (int32_t i = 0; i < d; i++)
        wrong += !(fabs((double)y[i] - (double)x[i]) <= kv_allowed(x, d, i, f));
    return wrong;
}

static void kv_is_within_half_a_step(void **state) {
    (void)state;
    static const int32_t dims[] = {2, 32, 64, 96, 128, 256};
    static const float levels[] = {1e-9f, 1e-6f, 1e-3f, 1.f, 300.f, 20000.f};
    rng r;
    rng_seed(&r, 35, 0);
    for (int32_t f = 0; f < KF_COUNT; f++)
        for (int32_t di = 0; di < COUNT_OF(dims); di++)
            for (int32_t round = 0; round < 60; round++) {
                const int32_t d = dims[di];
                const double level = (double)levels[round % COUNT_OF(levels)];
                const double shift = round % 4 == 0 ? 3 * level : 0;
                float x[256], y[257], code[256];
                uint8_t *bytes = (uint8_t *)code;
                for (int32_t i = 0; i < d; i++)
                    x[i] = (float)(fmax(-3, fmin(3, rng_normal(&r))) * level + shift);
                uint16_t params[2] = {0, 0};
                const int64_t n_codes =
                    f == KF_16 ? 4 * d : kv_format_bytes((kv_format)f, d) - (f == KF_FP8 ? 2 : 4);
                if (n_codes < (int64_t)sizeof code) bytes[n_codes] = 0xa5;
                ref_kv_quantize(code, params, x, d, (kv_format)f);
                if (n_codes < (int64_t)sizeof code) assert_int_equal(bytes[n_codes], 0xa5);
                y[d] = 5.f;
                ref_kv_dequantize(y, code, params, d, (kv_format)f);
                assert_true(y[d] == 5.f);
                if (kv_out_of_bound(x, y, d, (kv_format)f))
                    fail_msg("KV%s d=%d level %g", kv_format_text((kv_format)f), d, level);
                y[d / 2] = (float)((double)x[d / 2] + 1.01 * kv_allowed(x, d, d / 2, (kv_format)f) +
                                   1e-12 * level);
                if (f == KF_16) y[d / 2] = x[d / 2] * 1.001f;
                assert_int_equal(kv_out_of_bound(x, y, d, (kv_format)f), 1); /* twins */
                y[d / 2] = NAN;
                assert_int_equal(kv_out_of_bound(x, y, d, (kv_format)f), 1);
            }
}

/* Normal values of these codes that f16 has not; of KF_8 those below 2048 / 15 scales. */
static int32_t kv_beyond_f16(const uint8_t *code, const uint16_t params[2], int32_t d,
                             kv_format f) {
    float y[256];
    const float s = f32_from_f16(params[0]);
    int32_t n = 0;
    ref_kv_dequantize(y, code, params, d, f);
    for (int32_t i = 0; i < d; i++)
        n += fabsf(y[i]) >= 0x1p-14f && (f != KF_8 || fabsf(y[i]) < 136 * s) &&
             f32_from_f16(f16_from_f32(y[i])) != y[i];
    const float less = f32_from_f16(params[1]) - 1024 * s;
    return n + (f != KF_FP8 && f32_from_f16(f16_from_f32(less)) != less);
}

static void kv_values_are_numbers_of_f16(void **state) {
    (void)state;
    enum { D = 128 };
    rng r;
    rng_seed(&r, 36, 0);
    for (int32_t f = KF_FP8; f < KF_COUNT; f++)
        for (int32_t round = 0; round < 200; round++) {
            const double level = ldexp(1, round % 12 - 6), shift = round % 3 ? 0 : level;
            float x[D];
            uint8_t code[D];
            uint16_t params[2];
            for (int32_t i = 0; i < D; i++) x[i] = (float)(rng_normal(&r) * level + shift);
            ref_kv_quantize(code, params, x, D, (kv_format)f);
            assert_int_equal(kv_beyond_f16(code, params, D, (kv_format)f), 0);
            params[0] |= 1; /* twin: a scale of eleven bits */
            assert_int_not_equal(kv_beyond_f16(code, params, D, (kv_format)f), 0);
        }
}

static void kv_known_answers(void **state) {
    (void)state;
    float y[4];
    uint8_t code[4];
    uint16_t params[2];
    const float a[4] = {-1.f, 6.5f, 0.f, 1.75f}; /* 15 steps of .5; 5.5 steps tie to 6 */
    ref_kv_quantize(code, params, a, 4, KF_4);
    assert_int_equal(params[0], 0x3800);
    assert_int_equal(params[1], 0xbc00);
    assert_int_equal(code[0], 0xf0); /* low nibble first */
    assert_int_equal(code[1], 0x62);
    ref_kv_dequantize(y, code, params, 4, KF_4);
    const float a4[4] = {-1.f, 6.5f, 0.f, 2.f};
    assert_int_equal(different(y, a4, 4), 0);
    code[1] ^= 0x10; /* twin */
    ref_kv_dequantize(y, code, params, 4, KF_4);
    assert_int_equal(different(y, a4, 4), 1);

    const float b[4] = {0.f, 253.f, 2.5f, 3.5f};
    ref_kv_quantize(code, params, b, 4, KF_8);
    assert_int_equal(params[0], 0x3c00);
    assert_int_equal(params[1], 0);
    static const uint8_t b8[4] = {0, 253, 2, 4};
    assert_memory_equal(code, b8, 4);

    const float c[4] = {-448.f, 1.f, 0.f, -0.0625f};
    ref_kv_quantize(code, params, c, 4, KF_FP8);
    assert_int_equal(params[0], 0x3c00);
    assert_int_equal(params[1], 0);
    static const uint8_t c8[4] = {0xfe, 0x38, 0x00, 0x98};
    assert_memory_equal(code, c8, 4);
}

static void kv_edges_are_constant_huge_and_poisoned_vectors(void **state) {
    (void)state;
    enum { D = 32 };
    float x[D], y[D];
    float code[D];
    uint16_t params[2];
    for (int32_t f = KF_FP8; f < KF_COUNT; f++) {
        for (int32_t i = 0; i < D; i++) x[i] = f == KF_FP8 ? 0.f : 1.5f;
        ref_kv_quantize(code, params, x, D, (kv_format)f);
        assert_int_equal(params[0], 0);
        ref_kv_dequantize(y, code, params, D, (kv_format)f);
        assert_int_equal(different(x, y, D), 0);
        y[3] += 1; /* twin */
        assert_int_equal(different(x, y, D), 1);
        /* Beyond f16: saturated, finite. */
        for (int32_t i = 0; i < D; i++) x[i] = i & 1 ? FLT_MAX : -FLT_MAX;
        ref_kv_quantize(code, params, x, D, (kv_format)f);
        ref_kv_dequantize(y, code, params, D, (kv_format)f);
        for (int32_t i = 0; i < D; i++) assert_true(isfinite(y[i]));
        /* One bad element spoils the vector visibly. */
        static const float bad[] = {NAN, -NAN, INFINITY, -INFINITY};
        for (int32_t b = 0; b < COUNT_OF(bad); b++) {
            for (int32_t i = 0; i < D; i++) x[i] = (float)i;
            x[D - 1] = bad[b];
            ref_kv_quantize(code, params, x, D, (kv_format)f);
            ref_kv_dequantize(y, code, params, D, (kv_format)f);
            for (int32_t i = 0; i < D; i++) assert_true(isnan(y[i]));
        }
    }
}

/* Every code with awkward parameters: dequantising is code * scale + minimum, rounded once. */
static void every_kv_code_dequantises_as_defined(void **state) {
    (void)state;
    uint8_t code[256];
    float y[512];
    for (int32_t i = 0; i < 256; i++) code[i] = (uint8_t)i;
    static const uint16_t params[][2] = {
        {0x3c00, 0}, {0x0001, 0x8001}, {0x7bff, 0xfbff}, {0x2e67, 0xc123}, {0x0000, 0x3555}};
    for (int32_t p = 0; p < COUNT_OF(params); p++)
        for (int32_t f = KF_FP8; f < KF_COUNT; f++) {
            const int32_t d = f == KF_4 ? 512 : 256;
            const double s = (double)f32_from_f16(params[p][0]);
            const double lo = f == KF_FP8 ? 0 : (double)f32_from_f16(params[p][1]);
            ref_kv_dequantize(y, code, params[p], d, (kv_format)f);
            for (int32_t twin = 0; twin < 2; twin++) {
                int32_t wrong = 0;
                if (twin) y[d / 3] = nextafterf(y[d / 3], INFINITY);
                for (int32_t i = 0; i < d; i++) {
                    const uint8_t byte = code[f == KF_4 ? i / 2 : i];
                    const double c = f == KF_8   ? byte
                                     : f == KF_4 ? (i & 1 ? byte >> 4 : byte & 15)
                                                 : (double)f32_from_e4m3(byte);
                    const float want = (float)(c * s + lo);
                    wrong += !(y[i] == want || (isnan(want) && isnan(y[i])));
                }
                assert_int_equal(wrong, twin);
            }
        }
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(sizes_are_those_that_precision_counts),
        cmocka_unit_test(elements_are_within_half_a_step),
        cmocka_unit_test(quantising_again_changes_nothing),
        cmocka_unit_test(int4_asymmetric_known_answer),
        cmocka_unit_test(symmetric_and_float_known_answers),
        cmocka_unit_test(blocks_have_their_own_scale),
        cmocka_unit_test(extreme_groups_stay_finite),
        cmocka_unit_test(nan_and_infinity_are_refused_with_their_place),
        cmocka_unit_test(a_range_of_rows_is_part_of_the_whole),
        cmocka_unit_test(allocation_failures_leave_no_trace),
        cmocka_unit_test(activations_become_what_the_device_multiplies),
        cmocka_unit_test(kv_is_within_half_a_step),
        cmocka_unit_test(kv_values_are_numbers_of_f16),
        cmocka_unit_test(kv_known_answers),
        cmocka_unit_test(kv_edges_are_constant_huge_and_poisoned_vectors),
        cmocka_unit_test(every_kv_code_dequantises_as_defined),
    };
    return cmocka_run_group_tests(tests, open_arena, close_arena);
}
