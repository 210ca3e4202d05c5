/* ref_quant.h - the definition of every quantised form: weights by group, activations by token, KV
 * by token and head. Packing for a kernel starts from these forms; loaders of foreign checkpoints
 * end in them. Round to nearest even throughout. */
#ifndef AMALGAM_REF_QUANT_H
#define AMALGAM_REF_QUANT_H
#include "kernel.h"

#ifdef __cplusplus
extern "C" {
#endif

/* The one canonical quantised matrix [n, k], row n = output feature.
 *
 *   value(n, k) = (code(n, k) - zero(n, k / group)) * scale(n / block_n, k / group) * global_scale
 *
 * code: 8-bit formats one byte an element, row-major [n, k]; 4-bit formats two a byte, low nibble =
 * even k, [n, k / 2]. INT8 codes are signed with zero = 0; INT4 codes are 0..15 with the zero point
 * in `zero`, or 8 when `zero` is NULL (sym); FP8 and FP4 codes are the bit patterns, zero = 0. */
typedef struct {
    weight_format format;
    int32_t n, k;
    int32_t group;      /* inputs that share a scale; k when per channel */
    int32_t block_n;    /* outputs that share a scale: 1, or 128 for FP8b */
    dtype scale_type;   /* F16 (INT4), F32 (INT8, FP8, FP8b), UE8M0 (MXFP4), E4M3 (NVFP4) */
    uint8_t *code;      /* [n, k] or [n, k / 2] */
    void *scale;        /* [ceil(n / block_n), ceil(k / group)] of scale_type */
    uint8_t *zero;      /* [n, k / group] integers, or NULL */
    float global_scale; /* 1 except NVFP4 */
} qmatrix;

/* Bytes of the parts of a qmatrix for these sizes, so that callers can lay it into their memory;
 * their sum is precision_weight_bytes. Not W16, which has no such form. */
int64_t qmatrix_code_bytes(const precision *p, int32_t n, int32_t k);
int64_t qmatrix_scale_count(const precision *p, int32_t n, int32_t k);
int64_t qmatrix_zero_count(const precision *p, int32_t n, int32_t k); /* 0 when symmetric */
dtype qmatrix_scale_type(weight_format f);

/* Lay out a qmatrix in arena `a` for format p (not W16), all zero but global_scale = 1. SHAPE as
 * precision_fits_shape; NOMEM. A refusal leaves *q and the arena as they were. */
status qmatrix_alloc(qmatrix *q, arena *a, const precision *p, int32_t n, int32_t k);

/* Rows [at, at + rows) of q as a matrix of their own, in the same memory; `at` begins a block. */
qmatrix qmatrix_rows(const qmatrix *q, int32_t at, int32_t rows);

/* Round-to-nearest quantisation of w [n, k] row-major into an allocated q.
 *   INT8   s = amax / 127 per row or group
 *   INT4   asymmetric: s = (max - min) / 15 with min <= 0 <= max, zero = round(-min / s), s rounded
 *          to f16 first so that codes are chosen for the scale that is stored;
 *          sym: s = amax / 7 (codes -7..7 offset by 8, and -8 allowed when it is nearer)
 *   FP8    s = amax / 448 per row or per 128 x 128 block
 *   MXFP4  s = 2^(floor(log2 amax) - 2) per 32 (OCP Microscaling 1.0, section 6.3)
 *   NVFP4  global = amax / (448 * 6), s = e4m3(amax_group / 6 / global)
 * An all-zero group gets scale 1 and the codes that mean zero (8 in a sym INT4). No scale is zero
 * or infinite: one that would round to zero becomes the smallest of its type, one that would
 * overflow f16 becomes 65504 (weights beyond saturate), and an NVFP4 global scale is at least
 * 2^-126; so dequantised values are finite for every finite w.
 * Error per element: at most half a scale (half a code step in the floating formats, a quarter of
 * the value where MXFP4 saturates 6..8 to 6) plus the rounding of the scale times the code.
 * A NaN or infinity in w is FORMAT with its place. Rows are spread over OpenMP threads; the result
 * does not depend on their number. */
status ref_quantize_weight(qmatrix *q, const float *w);

/* The code of one element for the scale and zero point that q holds already: what a quantiser with
 * ideas of its own about codes uses (GPTQ). x finite; the return is the value of the code. */
float ref_quantize_element(qmatrix *q, int32_t row, int32_t col, float x);

/* out [rows, k] = rows row0 .. row0+rows-1 of q as f32, exactly (f64 product rounded once). */
void ref_dequantize_weight(float *out, const qmatrix *q, int32_t row0, int32_t rows);

/* Activations, in place: x [t, k] becomes the value that the device multiplies with.
 *   A16 unchanged; A8 s = amax/127 per token; AFP8 s = amax/448 per token, or per token and 128
 *   inputs when group == 128 (beside WFP8b; the last group may be short). `group` is that of the
 *   weight format and is ignored otherwise.
 * A NaN or infinity makes all values that would share its scale NaN. */
void ref_quantize_activation(float *x, int64_t t, int32_t k, act_format f, int32_t group);

/* KV of one token and head: d values -> codes (kv_format_bytes) and two parameters.
 *   KF_8, KF_4: value = code * scale + minimum, scale = (max - min) / 253 or / 15, minimum = min;
 *   KF_FP8: scale = amax / 448, minimum = 0; KF_16: codes are f32 here (the cpu device keeps 16-bit
 *   KV unrounded), parameters unused.
 * Parameters are f16, of so few bits that values are numbers of f16 as well: a kernel's products
 * with them need neither a second rounding nor another place for the scale. The scale is rounded up
 * to 4 (KF_8), 6 (KF_4) or 7 bits (KF_FP8). With p the power of two in the scale, the minimum is
 * rounded down to a multiple of 2 p (KF_8, whose 255 steps leave two for that) or to the nearest
 * multiple of p (KF_4, half a step at most). Then minimum - 1024 * scale is a number of f16 too, so
 * that 1024 + code becomes the value in one exact multiply-add. Values of KF_8 beyond 2048 / 15
 * scales are the exception: of them every second may take one rounding. So may all of f16's
 * subnormal scales, and minima beyond 2048 of the multiples.
 * A constant vector gets scale 0, and so does one whose scale is under 2^-25 (the values become the
 * minimum: an error below 2^-25 * (2^b - 1)). Parameters saturate at +-65504. A NaN or infinity in
 * x makes both parameters NaN, hence the whole vector. x, codes: no overlap; d even, > 0.
 * codes: KF_8/KF_FP8 d bytes, KF_4 d/2 bytes low nibble first, KF_16 4 * d bytes. */
enum { KV8_SCALE_BITS = 4, KV4_SCALE_BITS = 6, KVFP8_SCALE_BITS = 7, KV8_STEPS = 253 };
void ref_kv_quantize(void *codes, uint16_t params[2], const float *x, int32_t d, kv_format f);
void ref_kv_dequantize(float *x, const void *codes, const uint16_t params[2], int32_t d,
                       kv_format f);

#ifdef __cplusplus
}
#endif
#endif
