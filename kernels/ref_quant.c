/* ref_quant.c - see ref_quant.h. Arithmetic is f32 with one rounding per operation, in the order
 * that the header gives, so that a kernel which divides by the stored scale can agree bit for bit.
 *
 * Easy to get wrong: codes are chosen for the scale as it is stored (after rounding to f16, e4m3 or
 * a power of two), never for the exact one; and the sum code + zero is clamped, not the code. */
#include "ref_quant.h"

#include <float.h>
#include <math.h>
#include <string.h>

enum {
    FP8B_BLOCK = 128,
    F16_ONE = 0x3c00,
    F16_NAN = 0x7e00,
    F16_MIN_SUBNORMAL = 0x0001, /* 2^-24 */
    E4M3_ONE = 0x38,
    E4M3_MIN_SUBNORMAL = 0x01, /* 2^-9 */
    OMP_ELEMENTS = 1 << 18,    /* below, starting threads costs more than the work */
};

static const float f16_max = 65504.f, e4m3_max = 448.f, e2m1_max = 6.f;

/* --- Small things ----------------------------------------------------------------------------- */

/* To nearest even for |x| < 2^22, inline where rintf is a call at baseline x86-64. */
static inline float round_even(float x) {
    const float magic = 0x1.8p23f;
    return (x + magic) - magic;
}

static inline float clamp(float x, float lo, float hi) {
    x = x < lo ? lo : x;
    return x > hi ? hi : x;
}

/* Smallest and largest of a range. Integers that order as floats do, because a float minimum must
 * mind NaN and so is not made into vector code; NaN and infinity end up at the ends, where `finite`
 * sees them. */
typedef struct {
    int32_t lo_key, hi_key;
} extent;

static const extent nothing = {INT32_MAX, INT32_MIN};

static inline float float_of_key(int32_t key) {
    const int32_t bits = key ^ ((key >> 31) & 0x7fffffff);
    float x;
    memcpy(&x, &bits, sizeof x);
    return x;
}

static extent extent_of(extent e, const float *x, int32_t n) {
    int32_t lo = e.lo_key, hi = e.hi_key;
    for (int32_t i = 0; i < n; i++) {
        int32_t bits;
        memcpy(&bits, x + i, sizeof bits);
        const int32_t key = bits ^ ((bits >> 31) & 0x7fffffff);
        lo = key < lo ? key : lo;
        hi = key > hi ? key : hi;
    }
    return (extent){lo, hi};
}

static inline float lowest(extent e) { return float_of_key(e.lo_key); }
static inline float highest(extent e) { return float_of_key(e.hi_key); }
static inline bool finite(extent e) { return isfinite(lowest(e)) && isfinite(highest(e)); }
static inline float magnitude(extent e) {
    const float lo = fabsf(lowest(e)), hi = fabsf(highest(e)); /* +0 also for a range of -0 */
    return lo > hi ? lo : hi;
}

/* amax / top in f32: 1 for amax == 0, never 0, and small enough that top * scale is finite. */
static float f32_scale(float amax, float top) {
    if (amax == 0) return 1;
    const float s = amax / top;
    if (s == 0) return FLT_TRUE_MIN;
    return isinf(s * top) ? nextafterf(s, 0) : s;
}

/* The bits of a scale s >= 0 in f16: 1 for 0, else at least 2^-24 and at most 65504. */
static uint16_t f16_scale(float s) {
    if (s == 0) return F16_ONE;
    const uint16_t bits = f16_from_f32(s > f16_max ? f16_max : s);
    return bits ? bits : F16_MIN_SUBNORMAL;
}

/* code[i] = e4m3(x[i] / s), in pieces that stay in L1, through the array codec. */
static void e4m3_codes(uint8_t *code, const float *restrict x, int32_t n, float s) {
    enum { PIECE = 128 };
    float quotient[PIECE];
    for (int32_t at = 0; at < n; at += PIECE) {
        const int32_t m = (int32_t)i64_min(PIECE, n - at);
        for (int32_t i = 0; i < m; i++) quotient[i] = x[at + i] / s;
        dtype_from_f32(code + at, quotient, m, DT_E4M3);
    }
}

/* --- Layout ----------------------------------------------------------------------------------- */

int64_t qmatrix_code_bytes(const precision *p, int32_t n, int32_t k) {
    CHECK(p->weight != WF_16);
    return (int64_t)n * k * weight_format_bits(p->weight) / 8;
}

int64_t qmatrix_scale_count(const precision *p, int32_t n, int32_t k) {
    return precision_scale_count(p, n, k);
}

int64_t qmatrix_zero_count(const precision *p, int32_t n, int32_t k) {
    return precision_zero_count(p, n, k);
}

dtype qmatrix_scale_type(weight_format f) {
    CHECK(f != WF_16);
    return f == WF_INT4 ? DT_F16 : f == WF_MXFP4 ? DT_UE8M0 : f == WF_NVFP4 ? DT_E4M3 : DT_F32;
}

static bool four_bits(const qmatrix *q) { return weight_format_bits(q->format) == 4; }

static int64_t scales_per_row(const qmatrix *q) { return div_up(q->k, q->group); }

status qmatrix_alloc(qmatrix *q, arena *a, const precision *p, int32_t n, int32_t k) {
    enum { ALIGN = 64 }; /* a cache line, and what the widest vector load asks for */
    CHECK(p->weight != WF_16);
    TRY(precision_fits_shape(p, n, k));
    const size_t mark = a->used;
    const dtype type = qmatrix_scale_type(p->weight);
    const int64_t codes = qmatrix_code_bytes(p, n, k);
    const int64_t scales = qmatrix_scale_count(p, n, k), zeros = qmatrix_zero_count(p, n, k);
    qmatrix m = {.format = p->weight,
                 .n = n,
                 .k = k,
                 .group = p->group ? p->group : k,
                 .block_n = p->weight == WF_FP8B ? FP8B_BLOCK : 1,
                 .scale_type = type,
                 .global_scale = 1};
    m.code = arena_push(a, (size_t)codes, 1, ALIGN);
    m.scale = arena_push(a, (size_t)scales, (size_t)dtype_bits(type) / 8, ALIGN);
    m.zero = zeros ? arena_push(a, (size_t)zeros, 1, ALIGN) : NULL;
    if (!m.code || !m.scale || (zeros && !m.zero)) {
        arena_reset(a, mark);
        return FAIL(ST_NOMEM, "a W%s matrix of %d x %d", weight_format_text(p->weight), n, k);
    }
    *q = m;
    return ST_OK;
}

qmatrix qmatrix_rows(const qmatrix *q, int32_t at, int32_t rows) {
    const int64_t groups = scales_per_row(q);
    qmatrix s = *q;
    s.n = rows;
    s.code += (int64_t)at * q->k / (four_bits(q) ? 2 : 1);
    s.scale = (uint8_t *)s.scale + dtype_bytes(q->scale_type, at / q->block_n * groups);
    if (s.zero) s.zero += at * groups;
    return s;
}

/* --- Weights: quantise ------------------------------------------------------------------------ */

/* Choose and store the scale (and zero point) number `at` of q for values within `e`; returns the
 * factor that codes are multiplied with, and the zero point. */
static float store_scale(qmatrix *q, int64_t at, extent e, int32_t *zero) {
    const float amax = magnitude(e);
    *zero = 0;
    switch (q->format) {
    case WF_INT4: {
        const float lo = lowest(e) < 0 ? lowest(e) : 0, hi = highest(e) > 0 ? highest(e) : 0;
        const uint16_t bits = f16_scale(q->zero ? (hi - lo) / 15 : amax / 7);
        const float s = f32_from_f16(bits);
        ((uint16_t *)q->scale)[at] = bits;
        *zero = q->zero ? (int32_t)round_even(clamp(-lo / s, 0, 15)) : 8;
        if (q->zero) q->zero[at] = (uint8_t)*zero;
        return s;
    }
    case WF_MXFP4: {
        /* 2 = exponent of the largest e2m1; values in (6, 8) times the scale saturate to 6. */
        const int32_t expo = amax > 0 ? ilogbf(amax) - 2 : 0;
        const uint8_t code = (uint8_t)(127 + (expo < -127 ? -127 : expo));
        ((uint8_t *)q->scale)[at] = code;
        return f32_from_ue8m0(code);
    }
    case WF_NVFP4: {
        uint8_t code = e4m3_from_f32(amax / e2m1_max / q->global_scale);
        if (code == 0) code = amax > 0 ? E4M3_MIN_SUBNORMAL : E4M3_ONE;
        ((uint8_t *)q->scale)[at] = code;
        return f32_from_e4m3(code) * q->global_scale;
    }
    default: {
        const float s = f32_scale(amax, q->format == WF_INT8 ? 127 : e4m3_max);
        ((float *)q->scale)[at] = s;
        return s;
    }
    }
}

/* Codes of `n` neighbours of row `row` from column `col` on (both even where codes are nibbles). */
static void store_codes(qmatrix *q, int32_t row, int32_t col, int32_t n, const float *restrict w,
                        float s, int32_t zero) {
    uint8_t *restrict code = q->code + ((int64_t)row * q->k + col) / (four_bits(q) ? 2 : 1);
    const float z = (float)zero;
    switch (q->format) {
    case WF_INT8:
        for (int32_t i = 0; i < n; i++)
            code[i] = (uint8_t)(int32_t)round_even(clamp(w[i] / s, -127, 127));
        return;
    case WF_INT4:
        for (int32_t i = 0; i < n / 2; i++) { /* +-31: beyond any code, within round_even */
            const float a = round_even(clamp(w[2 * i] / s, -31, 31)) + z;
            const float b = round_even(clamp(w[2 * i + 1] / s, -31, 31)) + z;
            code[i] = (uint8_t)((int32_t)clamp(a, 0, 15) | (int32_t)clamp(b, 0, 15) << 4);
        }
        return;
    case WF_FP8:
    case WF_FP8B: e4m3_codes(code, w, n, s); return;
    default:
        for (int32_t i = 0; i < n / 2; i++)
            code[i] = (uint8_t)(e2m1_from_f32(w[2 * i] / s) | e2m1_from_f32(w[2 * i + 1] / s) << 4);
    }
}

/* All groups of block row `b` (one row, or 128 of FP8b). */
static void quantize_block_row(qmatrix *q, int32_t b, const float *w) {
    const int32_t row0 = b * q->block_n;
    const int32_t row1 = (int32_t)i64_min(row0 + q->block_n, q->n);
    const int64_t groups = scales_per_row(q);
    for (int64_t g = 0; g < groups; g++) {
        const int32_t col = (int32_t)(g * q->group);
        const int32_t cols = (int32_t)i64_min(q->group, q->k - col);
        extent e = nothing;
        for (int32_t r = row0; r < row1; r++) e = extent_of(e, w + (int64_t)r * q->k + col, cols);
        int32_t zero;
        const float s = store_scale(q, b * groups + g, e, &zero);
        for (int32_t r = row0; r < row1; r++)
            store_codes(q, r, col, cols, w + (int64_t)r * q->k + col, s, zero);
    }
}

static status whole_extent(extent *out, const float *w, int32_t n, int32_t k) {
    extent all = nothing;
    for (int32_t r = 0; r < n; r++) {
        const float *row = w + (int64_t)r * k;
        all = extent_of(all, row, k);
        if (finite(all)) continue;
        int32_t i = 0;
        while (isfinite(row[i])) i++;
        return FAIL(ST_FORMAT, "weight at row %d, column %d is %g", r, i, (double)row[i]);
    }
    *out = all;
    return ST_OK;
}

status ref_quantize_weight(qmatrix *q, const float *w) {
    extent all = nothing;
    TRY(whole_extent(&all, w, q->n, q->k));
    q->global_scale = 1;
    if (q->format == WF_NVFP4) {
        /* Not subnormal: the smallest group scale times it must not vanish. */
        const float s = f32_scale(magnitude(all), e4m3_max * e2m1_max);
        q->global_scale = s < FLT_MIN ? FLT_MIN : s;
    }
    const int32_t block_rows = (int32_t)div_up(q->n, q->block_n);
#pragma omp parallel for schedule(static) if ((int64_t)q->n * q->k > OMP_ELEMENTS)
    for (int32_t b = 0; b < block_rows; b++) quantize_block_row(q, b, w);
    return ST_OK;
}

/* --- Weights: dequantise ---------------------------------------------------------------------- */

static float load_scale(const qmatrix *q, int64_t at) {
    switch (q->scale_type) {
    case DT_F16: return f32_from_f16(((const uint16_t *)q->scale)[at]);
    case DT_UE8M0: return f32_from_ue8m0(((const uint8_t *)q->scale)[at]);
    case DT_E4M3: return f32_from_e4m3(((const uint8_t *)q->scale)[at]);
    default: CHECK(q->scale_type == DT_F32); return ((const float *)q->scale)[at];
    }
}

static dtype code_type(const qmatrix *q) {
    switch (q->format) {
    case WF_INT8: return DT_I8;
    case WF_INT4: return DT_U4;
    case WF_FP8:
    case WF_FP8B: return DT_E4M3;
    default: return DT_E2M1;
    }
}

float ref_quantize_element(qmatrix *q, int32_t row, int32_t col, float x) {
    const int64_t groups = scales_per_row(q), at = (int64_t)row * q->k + col;
    const int32_t g = col / q->group;
    const float s = load_scale(q, row / q->block_n * groups + g) * q->global_scale;
    if (q->format == WF_INT8) {
        const float code = round_even(clamp(x / s, -127, 127));
        q->code[at] = (uint8_t)(int32_t)code;
        return code * s;
    }
    if (q->format == WF_FP8 || q->format == WF_FP8B) {
        q->code[at] = e4m3_from_f32(x / s);
        return f32_from_e4m3(q->code[at]) * s;
    }
    const float z = q->format != WF_INT4 ? 0.f : q->zero ? (float)q->zero[row * groups + g] : 8.f;
    uint8_t code;
    if (q->format == WF_INT4)
        code = (uint8_t)(int32_t)clamp(round_even(clamp(x / s, -31, 31)) + z, 0, 15);
    else
        code = e2m1_from_f32(x / s);
    const int32_t shift = at % 2 ? 4 : 0;
    q->code[at / 2] = (uint8_t)((q->code[at / 2] & (0xf0 >> shift)) | code << shift);
    return q->format == WF_INT4 ? ((float)code - z) * s : f32_from_e2m1(code) * s;
}

/* f32 gives the f64 product rounded once: (code - zero) has at most 8 bits and the scale 24, so one
 * multiplication is one rounding; where global_scale takes part, code * scale (2 + 4 bits) is
 * exact. */
void ref_dequantize_weight(float *out, const qmatrix *q, int32_t row0, int32_t rows) {
    CHECK(row0 >= 0);
    CHECK(rows >= 0 && rows <= q->n - row0);
    const int64_t groups = scales_per_row(q);
    const float global = q->global_scale;
    for (int32_t r = row0; r < row0 + rows; r++, out += q->k) {
        const int64_t code_at = (int64_t)r * q->k / (four_bits(q) ? 2 : 1);
        dtype_to_f32(out, q->code + code_at, q->k, 1, code_type(q));
        const int64_t scale_row = r / q->block_n * groups;
        for (int64_t g = 0; g < groups; g++) {
            const float s = load_scale(q, scale_row + g);
            const float z = q->format != WF_INT4 ? 0.f
                            : q->zero            ? (float)q->zero[(int64_t)r * groups + g]
                                                 : 8.f;
            const int64_t end = i64_min((g + 1) * q->group, q->k);
            for (int64_t i = g * q->group; i < end; i++) out[i] = (out[i] - z) * s * global;
        }
    }
}

/* --- Activations ------------------------------------------------------------------------------ */

static void quantize_span(float *x, int32_t n, act_format f) {
    const extent e = extent_of(nothing, x, n);
    if (!finite(e)) { /* visible, instead of a finite lie */
        for (int32_t i = 0; i < n; i++) x[i] = NAN;
        return;
    }
    if (f == AF_INT8) {
        const float s = f32_scale(magnitude(e), 127);
        for (int32_t i = 0; i < n; i++) x[i] = round_even(clamp(x[i] / s, -127, 127)) * s;
        return;
    }
    const float s = f32_scale(magnitude(e), e4m3_max);
    for (int32_t i = 0; i < n; i++) x[i] = f32_from_e4m3(e4m3_from_f32(x[i] / s)) * s;
}

void ref_quantize_activation(float *x, int64_t t, int32_t k, act_format f, int32_t group) {
    CHECK((unsigned)f < AF_COUNT);
    CHECK(group >= 0);
    if (f == AF_16) return;
    const int32_t span = f == AF_FP8 && group == FP8B_BLOCK ? group : k;
    for (int64_t row = 0; row < t; row++)
        for (int32_t col = 0; col < k; col += span)
            quantize_span(x + row * k + col, (int32_t)i64_min(span, k - col), f);
}

/* --- KV --------------------------------------------------------------------------------------- */

/* f16 of a parameter, kept finite. */
static uint16_t f16_param(float x) { return f16_from_f32(clamp(x, -f16_max, f16_max)); }

/* x >= 0 up to the next number of so many bits, as f16. */
static uint16_t kv_scale(float x, int32_t bits) {
    const uint32_t below = (1u << (24 - bits)) - 1;
    uint32_t word;
    memcpy(&word, &x, sizeof word);
    word = (word + below) & ~below;
    memcpy(&x, &word, sizeof x);
    return f16_param(x);
}
static uint16_t kv_minimum(float lo, float scale, kv_format f) {
    uint32_t word;
    memcpy(&word, &scale, sizeof word);
    word &= 0x7f800000u;
    float unit; /* the power of two in the scale */
    memcpy(&unit, &word, sizeof unit);
    if (f == KF_8) unit *= 2;
    if (!(fabsf(lo) < 2048 * unit)) return f16_param(lo);
    return f16_param(floorf(lo / unit + (f == KF_8 ? 0 : 0.5f)) * unit);
}

static void kv_codes_u8(uint8_t *restrict code, const float *restrict x, int32_t d, float s,
                        float lo) {
    for (int32_t i = 0; i < d; i++)
        code[i] = (uint8_t)(int32_t)round_even(clamp((x[i] - lo) / s, 0, 255));
}

static void kv_codes_u4(uint8_t *restrict code, const float *restrict x, int32_t d, float s,
                        float lo) {
    for (int32_t i = 0; i < d / 2; i++) {
        const int32_t a = (int32_t)round_even(clamp((x[2 * i] - lo) / s, 0, 15));
        const int32_t b = (int32_t)round_even(clamp((x[2 * i + 1] - lo) / s, 0, 15));
        code[i] = (uint8_t)(a | b << 4);
    }
}

void ref_kv_quantize(void *codes, uint16_t params[2], const float *x, int32_t d, kv_format f) {
    CHECK(d > 0 && d % 2 == 0);
    if (f == KF_16) {
        memcpy(codes, x, (size_t)d * sizeof *x);
        return;
    }
    const extent e = extent_of(nothing, x, d);
    if (!finite(e)) {
        memset(codes, 0, (size_t)(f == KF_4 ? d / 2 : d));
        params[0] = params[1] = F16_NAN;
        return;
    }
    if (f == KF_FP8) {
        params[0] = kv_scale(magnitude(e) / e4m3_max, KVFP8_SCALE_BITS);
        params[1] = 0;
        const float s = f32_from_f16(params[0]);
        for (int32_t i = 0; i < d; i++) ((uint8_t *)codes)[i] = s > 0 ? e4m3_from_f32(x[i] / s) : 0;
        return;
    }
    CHECK(f == KF_8 || f == KF_4);
    const float range = highest(e) - lowest(e);
    params[0] = f == KF_8 ? kv_scale(range / KV8_STEPS, KV8_SCALE_BITS)
                          : kv_scale(range / 15, KV4_SCALE_BITS);
    const float s = f32_from_f16(params[0]);
    params[1] = kv_minimum(lowest(e), s, f);
    const float lo = f32_from_f16(params[1]);
    if (s == 0)
        memset(codes, 0, (size_t)(f == KF_4 ? d / 2 : d));
    else if (f == KF_8)
        kv_codes_u8(codes, x, d, s, lo);
    else
        kv_codes_u4(codes, x, d, s, lo);
}

/* code * scale is exact in f32 (8 + 11 bits), so each value is one rounding, fused or not. */
void ref_kv_dequantize(float *restrict x, const void *restrict codes, const uint16_t params[2],
                       int32_t d, kv_format f) {
    const uint8_t *code = codes;
    if (f == KF_16) {
        memcpy(x, codes, (size_t)d * sizeof *x);
        return;
    }
    const float s = f32_from_f16(params[0]);
    if (f == KF_FP8) {
        dtype_to_f32(x, codes, d, 1, DT_E4M3);
        for (int32_t i = 0; i < d; i++) x[i] *= s;
        return;
    }
    const float lo = f32_from_f16(params[1]);
    if (f == KF_8) {
        for (int32_t i = 0; i < d; i++) x[i] = (float)code[i] * s + lo;
        return;
    }
    CHECK(f == KF_4 && d % 2 == 0);
    for (int32_t i = 0; i < d / 2; i++) {
        x[2 * i] = (float)(code[i] & 15) * s + lo;
        x[2 * i + 1] = (float)(code[i] >> 4) * s + lo;
    }
}
