/* dtype.c - see dtype.h. The small floating formats share two ideas.
 *
 * Widening: shift the magnitude into f32 position and add the difference of the exponent biases; a
 * subnormal gets an exponent of one and has the hidden bit that it does not own subtracted again.
 * Narrowing: a normal is rounded on its bits ("add half less one and the last kept bit"), a
 * subnormal by adding the power of two whose f32 unit in the last place is the subnormal step, so
 * that the processor rounds to nearest even for us. Both results are computed and one is selected:
 * no branch,
 * no table, and the loops below become vector code on any x86-64. Nothing here depends on f32
 * subnormals being fast or on more than the default rounding mode. */
#include "dtype.h"

#include <ctype.h>
#include <string.h>

static const int32_t bits_of[DT_COUNT] = {
#define X(name, bits, text) [DT_##name] = bits,
#include "dtype.def"
#undef X
};

static const char *const spelling_of[DT_COUNT] = {
#define X(name, bits, text) [DT_##name] = text,
#include "dtype.def"
#undef X
};

int32_t dtype_bits(dtype t) {
    CHECK((unsigned)t < DT_COUNT);
    return bits_of[t];
}

const char *dtype_text(dtype t) {
    static const char *const texts[DT_COUNT] = {
        [DT_F32] = "f32",     [DT_F16] = "f16",   [DT_BF16] = "bf16", [DT_E4M3] = "e4m3",
        [DT_E5M2] = "e5m2",   [DT_E2M1] = "e2m1", [DT_I8] = "i8",     [DT_U8] = "u8",
        [DT_UE8M0] = "ue8m0", [DT_U4] = "u4",     [DT_I16] = "i16",   [DT_I32] = "i32",
        [DT_I64] = "i64",     [DT_F64] = "f64",   [DT_BOOL] = "bool",
    };
    CHECK((unsigned)t < DT_COUNT);
    return texts[t];
}

status dtype_parse(dtype *out, const char *name) {
    for (int32_t t = 0; t < DT_COUNT; t++) {
        if (!spelling_of[t][0] || strcmp(spelling_of[t], name) != 0) continue;
        *out = (dtype)t;
        return ST_OK;
    }
    return FAIL(ST_UNSUPPORTED, "element type '%.40s'", name);
}

int64_t dtype_bytes(dtype t, int64_t n) {
    CHECK(n >= 0 && n <= INT64_MAX / 64 - 1);
    return div_up(n * dtype_bits(t), 8);
}

/* --- One element ------------------------------------------------------------------------------ */

static inline uint32_t bits_from_f32(float x) {
    uint32_t u;
    memcpy(&u, &x, sizeof u);
    return u;
}

static inline float f32_from_bits(uint32_t u) {
    float x;
    memcpy(&x, &u, sizeof x);
    return x;
}

/* All ones or all zeros. Masks rather than `?:`, because the compiler would move the floating-point
 * operation of one arm into a branch, and then no loop around it becomes vector code. */
static inline uint32_t mask_if(bool c) { return 0u - (uint32_t)c; }
static inline uint32_t pick(uint32_t mask, uint32_t a, uint32_t b) {
    return (a & mask) | (b & ~mask);
}

/* Magnitude `m` of a format with `mant` mantissa bits and exponent bias `bias`, not Inf or NaN. */
static inline float widen(uint32_t m, int mant, int bias) {
    const uint32_t shifted = (m << (23 - mant)) + ((uint32_t)(127 - bias) << 23);
    const uint32_t subnormal = mask_if(m >> mant == 0);
    return f32_from_bits(shifted + (subnormal & 1u << 23)) -
           f32_from_bits(subnormal & (uint32_t)(128 - bias) << 23); /* 2^(1 - bias), or 0 */
}

/* The inverse, to nearest even; `a` = bits of a finite |x|. Runs past the largest code on overflow:
 * the caller saturates. */
static inline uint32_t narrow(uint32_t a, int mant, int bias) {
    const int drop = 23 - mant;
    const uint32_t normal =
        (a + ((1u << (drop - 1)) - 1) + ((a >> drop) & 1) - ((uint32_t)(127 - bias) << 23)) >> drop;
    const uint32_t magic = (uint32_t)(127 + 24 - bias - mant) << 23; /* 2^23 subnormal steps */
    const uint32_t subnormal = bits_from_f32(f32_from_bits(a) + f32_from_bits(magic)) - magic;
    return pick(mask_if(a >= (uint32_t)(128 - bias) << 23), normal, subnormal);
}

static inline float widen_f16(uint32_t h) {
    const uint32_t m = h & 0x7fff;
    const uint32_t special = 0x7f800000u | (m & 0x3ff) << 13;
    const uint32_t u = pick(mask_if(m >= 0x7c00), special, bits_from_f32(widen(m, 10, 15)));
    return f32_from_bits(u | (h & 0x8000) << 16);
}

static inline uint32_t narrow_f16(float x) {
    const uint32_t u = bits_from_f32(x), a = u & 0x7fffffff;
    const uint32_t nan = mask_if(a > 0x7f800000u) & (0x200 | ((a >> 13) & 0x3ff));
    const uint32_t overflow = mask_if(a >= 0x47800000u /* 2^16 */);
    return pick(overflow, 0x7c00 | nan, narrow(a, 10, 15)) | ((u >> 16) & 0x8000);
}

static inline float widen_bf16(uint32_t h) { return f32_from_bits(h << 16); }

static inline uint32_t narrow_bf16(float x) {
    const uint32_t u = bits_from_f32(x);
    const uint32_t rounded = (u + 0x7fff + ((u >> 16) & 1)) >> 16;
    return (u & 0x7fffffff) > 0x7f800000u ? u >> 16 | 0x40 : rounded;
}

static inline float widen_e4m3(uint32_t b) {
    const uint32_t m = b & 0x7f;
    const uint32_t u = pick(mask_if(m == 0x7f), 0x7fc00000u, bits_from_f32(widen(m, 3, 7)));
    return f32_from_bits(u | (b & 0x80) << 24);
}

static inline uint32_t narrow_e4m3(float x) {
    const uint32_t u = bits_from_f32(x), a = u & 0x7fffffff;
    const uint32_t m = narrow(a, 3, 7);
    const uint32_t saturated = m > 0x7e ? 0x7e : m; /* 448 */
    return pick(mask_if(a > 0x7f800000u), 0x7f, saturated | ((u >> 24) & 0x80));
}

static inline float widen_e5m2(uint32_t b) { return widen_f16(b << 8); } /* f16 cut short */

static inline float widen_e2m1(uint32_t b) {
    return f32_from_bits(bits_from_f32(widen(b & 7, 1, 1)) | (b & 8) << 28);
}

static inline uint32_t narrow_e2m1(float x) {
    const uint32_t u = bits_from_f32(x), m = narrow(u & 0x7fffffff, 1, 1);
    return (m > 7 ? 7 : m) | ((u >> 28) & 8); /* 6 */
}

float f32_from_f16(uint16_t bits) { return widen_f16(bits); }
uint16_t f16_from_f32(float x) { return (uint16_t)narrow_f16(x); }
float f32_from_bf16(uint16_t bits) { return widen_bf16(bits); }
uint16_t bf16_from_f32(float x) { return (uint16_t)narrow_bf16(x); }
float f32_from_e4m3(uint8_t bits) { return widen_e4m3(bits); }
uint8_t e4m3_from_f32(float x) { return (uint8_t)narrow_e4m3(x); }
float f32_from_e5m2(uint8_t bits) { return widen_e5m2(bits); }
float f32_from_e2m1(uint8_t bits) { return widen_e2m1(bits); }

uint8_t e2m1_from_f32(float x) {
    CHECK(x == x);
    return (uint8_t)narrow_e2m1(x);
}

float f32_from_ue8m0(uint8_t bits) {
    const uint32_t normal = bits == 255 ? 0x7fc00000u : (uint32_t)bits << 23;
    return f32_from_bits(bits ? normal : 0x00400000u); /* 2^-127 is subnormal in f32 */
}

/* --- Many elements ---------------------------------------------------------------------------- */

/* memcpy because tensors in a file start at any byte; it compiles to a plain load. Unit stride has
 * a loop of its own, which is the one that vectorises. */
#define WIDEN(type, convert)                                                                       \
    do {                                                                                           \
        const uint8_t *p = in;                                                                     \
        if (stride == 1) {                                                                         \
            for (int64_t i = 0; i < n; i++) {                                                      \
                type v;                                                                            \
                memcpy(&v, p + i * (int64_t)sizeof v, sizeof v);                                   \
                out[i] = convert(v);                                                               \
            }                                                                                      \
        } else {                                                                                   \
            for (int64_t i = 0; i < n; i++) {                                                      \
                type v;                                                                            \
                memcpy(&v, p + i * stride * (int64_t)sizeof v, sizeof v);                          \
                out[i] = convert(v);                                                               \
            }                                                                                      \
        }                                                                                          \
    } while (0)

/* Two codes a byte, low nibble first; an odd n leaves the last high nibble unread. */
#define WIDEN_NIBBLES(convert)                                                                     \
    do {                                                                                           \
        const uint8_t *p = in;                                                                     \
        CHECK(stride == 1);                                                                        \
        for (int64_t i = 0; i < n / 2; i++) {                                                      \
            out[2 * i] = convert(p[i] & 15u);                                                      \
            out[2 * i + 1] = convert((uint32_t)p[i] >> 4);                                         \
        }                                                                                          \
        if (n & 1) out[n - 1] = convert(p[n / 2] & 15u);                                           \
    } while (0)

#define AS_FLOAT(v)        ((float)(v))
#define NIBBLE_AS_FLOAT(v) ((float)(int32_t)(v)) /* signed: SSE2 converts no unsigned */

void dtype_to_f32(float *restrict out, const void *restrict in, int64_t n, int64_t stride,
                  dtype t) {
    switch (t) {
    case DT_F32: WIDEN(float, AS_FLOAT); return;
    case DT_F16: WIDEN(uint16_t, widen_f16); return;
    case DT_BF16: WIDEN(uint16_t, widen_bf16); return;
    case DT_E4M3: WIDEN(uint8_t, widen_e4m3); return;
    case DT_E5M2: WIDEN(uint8_t, widen_e5m2); return;
    case DT_I8: WIDEN(int8_t, AS_FLOAT); return;
    case DT_U8: WIDEN(uint8_t, AS_FLOAT); return;
    case DT_I32: WIDEN(int32_t, AS_FLOAT); return;
    case DT_F64: WIDEN(double, AS_FLOAT); return;
    case DT_E2M1: WIDEN_NIBBLES(widen_e2m1); return;
    case DT_U4: WIDEN_NIBBLES(NIBBLE_AS_FLOAT); return;
    default: CHECK(!"dtype_to_f32 reads this type");
    }
}

#define NARROW(type, convert)                                                                      \
    do {                                                                                           \
        uint8_t *p = out;                                                                          \
        for (int64_t i = 0; i < n; i++) {                                                          \
            const type v = (type)convert(in[i]);                                                   \
            memcpy(p + i * (int64_t)sizeof v, &v, sizeof v);                                       \
        }                                                                                          \
    } while (0)

void dtype_from_f32(void *restrict out, const float *restrict in, int64_t n, dtype t) {
    switch (t) {
    case DT_F32: NARROW(float, AS_FLOAT); return;
    case DT_F16: NARROW(uint16_t, narrow_f16); return;
    case DT_BF16: NARROW(uint16_t, narrow_bf16); return;
    case DT_E4M3: NARROW(uint8_t, narrow_e4m3); return;
    default: CHECK(!"dtype_from_f32 writes this type");
    }
}
