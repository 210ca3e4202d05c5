/* test_dtype.c - every codec over all its bit patterns, against a slow definition that shares no
 * code with it: ldexp for decoding, a search over all values of the format for encoding. */
#include "test.h"

#include "dtype.h"
#include "rng.h"
#include <stdlib.h>
#include <string.h>

/* --- The definition --------------------------------------------------------------------------- */

typedef struct {
    const char *name;
    int exponent, mantissa, bias;  /* widths in bits */
    enum { IEEE, FN, FINITE } top; /* Inf and NaN at the top exponent, NaN at all ones, neither */
    uint32_t max;                  /* largest finite magnitude code */
    uint32_t overflow;             /* what larger values become */
} small_float;

static const small_float f16 = {"f16", 5, 10, 15, IEEE, 0x7bff, 0x7c00};
static const small_float bf16 = {"bf16", 8, 7, 127, IEEE, 0x7f7f, 0x7f80};
static const small_float e4m3 = {"e4m3", 4, 3, 7, FN, 0x7e, 0x7e};
static const small_float e5m2 = {"e5m2", 5, 2, 15, IEEE, 0x7b, 0x7c};
static const small_float e2m1 = {"e2m1", 2, 1, 1, FINITE, 7, 7};

static int width(const small_float *f) { return 1 + f->exponent + f->mantissa; }

static double slow_decode(const small_float *f, uint32_t code) {
    const int mant = (int)(code & ((1u << f->mantissa) - 1));
    const int expo = (int)(code >> f->mantissa & ((1u << f->exponent) - 1));
    const int top = (1 << f->exponent) - 1;
    const double sign = code >> (width(f) - 1) & 1 ? -1 : 1;
    if (f->top == IEEE && expo == top) return mant ? (double)NAN : sign * (double)INFINITY;
    if (f->top == FN && expo == top && mant == (1 << f->mantissa) - 1) return (double)NAN;
    if (expo == 0) return sign * ldexp(mant, 1 - f->bias - f->mantissa);
    return sign * ldexp(mant + (1 << f->mantissa), expo - f->bias - f->mantissa);
}

/* Magnitude code nearest to |x| among all values, ties to the even code. Values past the largest
 * round as if the next one existed: at half a step beyond the largest they overflow. */
static uint32_t slow_encode(const small_float *f, double x) {
    const uint32_t sign = signbit(x) ? 1u << (width(f) - 1) : 0;
    const double a = fabs(x);
    uint32_t lo = 0, hi = f->max + 1; /* value(lo) <= a < value(hi) */
    const double largest = slow_decode(f, f->max);
    const double beyond = largest + (largest - slow_decode(f, f->max - 1));
    if (a >= beyond) return sign | f->overflow;
    while (hi - lo > 1) {
        const uint32_t mid = (lo + hi) / 2;
        if (slow_decode(f, mid) <= a)
            lo = mid;
        else
            hi = mid;
    }
    const double below = a - slow_decode(f, lo);
    const double above = (hi > f->max ? beyond : slow_decode(f, hi)) - a;
    const uint32_t code = below < above || (below == above && !(lo & 1)) ? lo : hi;
    return sign | (code > f->max ? f->overflow : code);
}

/* --- Uniform faces of the codecs -------------------------------------------------------------- */

static float decode(const small_float *f, uint32_t code) {
    if (f == &f16) return f32_from_f16((uint16_t)code);
    if (f == &bf16) return f32_from_bf16((uint16_t)code);
    if (f == &e4m3) return f32_from_e4m3((uint8_t)code);
    if (f == &e5m2) return f32_from_e5m2((uint8_t)code);
    return f32_from_e2m1((uint8_t)code);
}

static uint32_t encode(const small_float *f, float x) {
    if (f == &f16) return f16_from_f32(x);
    if (f == &bf16) return bf16_from_f32(x);
    if (f == &e4m3) return e4m3_from_f32(x);
    return e2m1_from_f32(x);
}

static uint32_t f32_bits(float x) {
    uint32_t u;
    memcpy(&u, &x, sizeof u);
    return u;
}

static float f32_of(uint32_t u) {
    float x;
    memcpy(&x, &u, sizeof x);
    return x;
}

/* The comparison of every decode test: the same number, the same sign of zero, or both NaN. */
static bool same(float got, double want) {
    if (want != want) return got != got;
    return (double)got == want && !signbit(got) == !signbit(want);
}

/* Number of codes that decode differently from the definition; `planted` (a code, or -1) has the
 * last bit of its decoded value inverted first, which must count as one. */
static int32_t wrong_decodes(const small_float *f, int64_t planted) {
    int32_t wrong = 0;
    for (uint32_t code = 0; code < 1u << width(f); code++) {
        float got = decode(f, code);
        if (code == planted) got = f32_of(f32_bits(got) ^ 1);
        wrong += !same(got, slow_decode(f, code));
    }
    return wrong;
}

static void every_code_decodes_as_defined(void **state) {
    (void)state;
    const small_float *const all[] = {&f16, &bf16, &e4m3, &e5m2, &e2m1};
    for (int32_t i = 0; i < COUNT_OF(all); i++) {
        if (wrong_decodes(all[i], -1)) fail_msg("%s decodes wrongly", all[i]->name);
        for (int64_t code = 0; code < 8; code++) /* twins */
            assert_int_equal(wrong_decodes(all[i], code), 1);
    }
}

static void every_code_survives_decode_and_encode(void **state) {
    (void)state;
    const small_float *const all[] = {&f16, &bf16, &e4m3, &e2m1};
    for (int32_t i = 0; i < COUNT_OF(all); i++) {
        const small_float *f = all[i];
        int32_t n_nan = 0;
        for (uint32_t code = 0; code < 1u << width(f); code++) {
            const float x = decode(f, code);
            if (x == x) {
                if (encode(f, x) != code) fail_msg("%s code %#x", f->name, code);
            } else {
                n_nan++;
                const uint32_t back = encode(f, x);
                assert_true(isnan(decode(f, back)));
                /* Quiet, sign and payload kept, in the IEEE formats; 0x7f in e4m3. */
                if (f->top == IEEE) assert_int_equal(back, code | 1u << (f->mantissa - 1));
                if (f == &e4m3) assert_int_equal(back, 0x7f);
            }
        }
        assert_int_equal(n_nan, f == &f16 ? 2046 : f == &bf16 ? 254 : f == &e4m3 ? 2 : 0);
    }
}

/* The comparison of every encode test. */
static bool encodes_right(const small_float *f, float x, uint32_t got) {
    if (x != x) return isnan(slow_decode(f, got));
    return got == slow_encode(f, (double)x);
}

static void check_encode(const small_float *f, float x) {
    if (x != x && f == &e2m1) return; /* a programmer error there */
    const uint32_t got = encode(f, x);
    if (!encodes_right(f, x, got))
        fail_msg("%s of %a (%#x): got %#x, want %#x", f->name, (double)x, f32_bits(x), got,
                 slow_encode(f, (double)x));
}

static void encoding_rounds_to_nearest_even(void **state) {
    (void)state;
    const small_float *const all[] = {&f16, &bf16, &e4m3, &e2m1};
    for (int32_t i = 0; i < COUNT_OF(all); i++) {
        const small_float *f = all[i];
        for (uint32_t code = 0; code <= f->max; code++) {
            const double lo = slow_decode(f, code);
            const double hi =
                code < f->max ? slow_decode(f, code + 1) : lo + (lo - slow_decode(f, code - 1));
            /* Both ends and the midpoint, exact in f32 for all (for bf16 as well: one more bit). */
            const float spots[] = {(float)lo, (float)((lo + hi) / 2), (float)hi};
            for (int32_t s = 0; s < 3; s++)
                for (int32_t step = -1; step <= 1; step++)
                    for (int32_t sign = 0; sign < 2; sign++) {
                        if (step < 0 && spots[s] == 0) continue;
                        const float x = f32_of(f32_bits(spots[s]) + (uint32_t)step);
                        check_encode(f, sign ? -x : x);
                    }
        }
        const float limits[] = {0.f,       -0.f,      INFINITY, -INFINITY, NAN,
                                0x1p-149f, 0x1p-126f, 448.f,    464.f,     0x1.fffffep127f,
                                65504.f,   65520.f,   65536.f,  6.f,       7.f};
        for (int32_t s = 0; s < COUNT_OF(limits); s++) check_encode(f, limits[s]);
    }
}

static void encoding_is_right_for_random_f32_bits(void **state) {
    (void)state;
    rng r;
    rng_seed(&r, 11, 0);
    for (int32_t i = 0; i < 1000000; i++) {
        const float x = f32_of((uint32_t)rng_u64(&r));
        check_encode(&f16, x);
        check_encode(&bf16, x);
        /* Most random exponents saturate or vanish: bring half of them near the small formats. */
        const float y = i & 1 ? x : f32_of((f32_bits(x) & 0x81ffffff) | 0x3c000000);
        check_encode(&e4m3, y);
        check_encode(&e2m1, i & 2 ? y : y * 16);
    }
}

static void a_planted_wrong_code_is_noticed(void **state) {
    (void)state;
    const small_float *const all[] = {&f16, &bf16, &e4m3, &e2m1};
    for (int32_t i = 0; i < COUNT_OF(all); i++)
        for (uint32_t code = 1; code + 2 < all[i]->max; code++) {
            const float x = decode(all[i], code);
            assert_true(encodes_right(all[i], x, code));
            assert_false(encodes_right(all[i], x, code + 1));
            assert_false(encodes_right(all[i], x, code - 1));
            assert_false(encodes_right(all[i], -x, code));
        }
    assert_false(same(0.f, -0.0));
    assert_false(same(NAN, 1.0));
    assert_false(same(1.f, (double)NAN));
    assert_false(encodes_right(&f16, NAN, 0x7c00));
}

static void known_codes_are_those_of_the_specifications(void **state) {
    (void)state;
    assert_int_equal(f16_from_f32(1.f), 0x3c00); /* IEEE 754-2019, table 3.5 */
    assert_int_equal(f16_from_f32(65504.f), 0x7bff);
    assert_int_equal(f16_from_f32(0x1p-24f), 0x0001);
    assert_int_equal(f16_from_f32(0x1p-25f), 0x0000); /* a tie with zero */
    assert_int_equal(f16_from_f32(0x1.000002p-25f), 0x0001);
    assert_int_equal(bf16_from_f32(-1.f), 0xbf80);
    assert_int_equal(bf16_from_f32(0x1.fffffep127f), 0x7f80);
    assert_int_equal(e4m3_from_f32(448.f), 0x7e); /* OCP OFP8 1.0, table 2 */
    assert_int_equal(e4m3_from_f32(-1e9f), 0xfe);
    assert_int_equal(e4m3_from_f32(0x1p-9f), 0x01);
    assert_int_equal(e4m3_from_f32(0x1p-6f), 0x08);
    assert_int_equal(e2m1_from_f32(5.f), 6); /* 4 or 6: the even code is 4's */
    assert_int_equal(e2m1_from_f32(2.5f), 4);
    assert_int_equal(e2m1_from_f32(-0.3f), 9);
    assert_int_equal(e2m1_from_f32(INFINITY), 7);
    assert_int_equal(f32_bits(f32_from_e5m2(0x7b)), f32_bits(57344.f));
}

static void every_ue8m0_code_is_a_power_of_two(void **state) {
    (void)state;
    int32_t wrong = 0, planted = 0;
    for (int32_t code = 0; code < 255; code++) {
        const float got = f32_from_ue8m0((uint8_t)code);
        wrong += !same(got, ldexp(1, code - 127));
        planted += !same(got, ldexp(1, code - 127 + (code == 77)));
    }
    assert_int_equal(wrong, 0);
    assert_int_equal(planted, 1);
    assert_true(isnan(f32_from_ue8m0(255)));
}

/* --- Arrays ----------------------------------------------------------------------------------- */

/* out[i] of dtype_to_f32 for one element computed alone, from the definitions above. */
static double slow_element(const uint8_t *in, int64_t i, dtype t) {
    const uint8_t *p = in + i * dtype_bits(t) / 8;
    const uint32_t nibble = i & 1 ? p[0] >> 4 : p[0] & 15;
    const uint32_t word = (uint32_t)p[0] | (uint32_t)(dtype_bits(t) >= 16 ? p[1] : 0) << 8;
    switch (t) {
    case DT_F32: {
        float v;
        memcpy(&v, p, 4);
        return (double)v;
    }
    case DT_F64: {
        double v;
        memcpy(&v, p, 8);
        return (double)(float)v;
    }
    case DT_I32: {
        int32_t v;
        memcpy(&v, p, 4);
        return (double)(float)v;
    }
    case DT_F16: return slow_decode(&f16, word);
    case DT_BF16: return slow_decode(&bf16, word);
    case DT_E4M3: return slow_decode(&e4m3, p[0]);
    case DT_E5M2: return slow_decode(&e5m2, p[0]);
    case DT_I8: return p[0] < 128 ? p[0] : p[0] - 256;
    case DT_U8: return p[0];
    case DT_U4: return nibble;
    case DT_E2M1: return slow_decode(&e2m1, nibble);
    default: return (double)NAN;
    }
}

static int32_t wrong_elements(const float *got, const uint8_t *in, int64_t n, int64_t stride,
                              dtype t) {
    int32_t wrong = 0;
    for (int64_t i = 0; i < n; i++) wrong += !same(got[i], slow_element(in, i * stride, t));
    return wrong;
}

static void arrays_decode_element_by_element(void **state) {
    (void)state;
    static const dtype types[] = {DT_F32, DT_F16, DT_BF16, DT_E4M3, DT_E5M2, DT_I8,
                                  DT_U8,  DT_F64, DT_I32,  DT_E2M1, DT_U4};
    enum { N = 1031 };
    static uint8_t raw[8 * N * 3 + 9];
    float out[N + 1];
    rng r;
    rng_seed(&r, 12, 0);
    for (int32_t k = 0; k < COUNT_OF(types); k++) {
        const dtype t = types[k];
        for (size_t i = 0; i < sizeof raw; i++) raw[i] = (uint8_t)rng_u64(&r);
        for (int64_t offset = 0; offset < 2; offset++) /* misaligned as well */
            for (int64_t stride = 1; stride <= (dtype_bits(t) < 8 ? 1 : 3); stride++) {
                const uint8_t *in = raw + offset;
                const int64_t sizes[] = {0, 1, 2, 3, 7, 8, 16, 17, N};
                for (int32_t s = 0; s < COUNT_OF(sizes); s++) {
                    const int64_t n = sizes[s];
                    out[n] = 12345.f;
                    dtype_to_f32(out, in, n, stride, t);
                    assert_int_equal(wrong_elements(out, in, n, stride, t), 0);
                    assert_true(out[n] == 12345.f); /* nothing past the end */
                }
                for (int32_t i = 0; i < N; i += 101) { /* twins */
                    const float keep = out[i];
                    out[i] = keep != keep ? 0.f : f32_of(f32_bits(keep) ^ 1);
                    assert_int_equal(wrong_elements(out, in, N, stride, t), 1);
                    out[i] = keep;
                }
            }
    }
}

static void arrays_encode_element_by_element(void **state) {
    (void)state;
    enum { N = 777 };
    float in[N];
    uint8_t out[4 * N + 2];
    rng r;
    rng_seed(&r, 13, 0);
    for (int32_t i = 0; i < N; i++) in[i] = (float)rng_normal(&r) * 30;
    in[5] = NAN;
    in[6] = -INFINITY;
    for (int32_t offset = 0; offset < 2; offset++) {
        uint8_t *p = out + offset;
        dtype_from_f32(p, in, N, DT_F32);
        assert_memory_equal(p, in, sizeof in);
        dtype_from_f32(p, in, N, DT_E4M3);
        for (int32_t i = 0; i < N; i++) assert_true(encodes_right(&e4m3, in[i], p[i]));
        for (int32_t k = 0; k < 2; k++) {
            out[offset + 2 * N] = 0xa5;
            dtype_from_f32(p, in, N, k ? DT_BF16 : DT_F16);
            assert_int_equal(p[2 * N], 0xa5);
            for (int32_t i = 0; i < N; i++) {
                uint16_t code;
                memcpy(&code, p + 2 * i, 2);
                assert_true(encodes_right(k ? &bf16 : &f16, in[i], code));
            }
        }
    }
}

static void types_have_names_sizes_and_spellings(void **state) {
    (void)state;
    for (int32_t t = 0; t < DT_COUNT; t++) {
        assert_non_null(dtype_text((dtype)t));
        assert_true(dtype_bits((dtype)t) >= 4);
    }
    assert_string_equal(dtype_text(DT_UE8M0), "ue8m0");
    dtype t = DT_F32;
    assert_ok(dtype_parse(&t, "BF16"));
    assert_int_equal(t, DT_BF16);
    assert_ok(dtype_parse(&t, "F8_E4M3"));
    assert_int_equal(t, DT_E4M3);
    assert_status(dtype_parse(&t, ""), ST_UNSUPPORTED); /* U4 has no spelling in files */
    assert_status(dtype_parse(&t, "bf16"), ST_UNSUPPORTED);
    assert_status(dtype_parse(&t, "C64"), ST_UNSUPPORTED);
    assert_string_equal(fail_message(), "element type 'C64'");
    assert_int_equal(t, DT_E4M3); /* a refusal changes nothing */
    assert_int_equal(dtype_bytes(DT_U4, 3), 2);
    assert_int_equal(dtype_bytes(DT_U4, 0), 0);
    assert_int_equal(dtype_bytes(DT_F16, (int64_t)1 << 40), (int64_t)2 << 40);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(every_code_decodes_as_defined),
        cmocka_unit_test(every_code_survives_decode_and_encode),
        cmocka_unit_test(encoding_rounds_to_nearest_even),
        cmocka_unit_test(encoding_is_right_for_random_f32_bits),
        cmocka_unit_test(a_planted_wrong_code_is_noticed),
        cmocka_unit_test(known_codes_are_those_of_the_specifications),
        cmocka_unit_test(every_ue8m0_code_is_a_power_of_two),
        cmocka_unit_test(arrays_decode_element_by_element),
        cmocka_unit_test(arrays_encode_element_by_element),
        cmocka_unit_test(types_have_names_sizes_and_spellings),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
