/* quantize.h - weights to the canonical quantised form, and activations to 8 bits, on the device:
 * what ref_quantize_weight and ref_quantize_activation give, bit for bit, in every format. */
#ifndef KERNEL_QUANTIZE_H
#define KERNEL_QUANTIZE_H
#include "ref_quant.h"

#ifdef __cplusplus
extern "C" {
#endif

/* Rows row0 .. row0 + rows - 1 of q from w [rows, q->k] f32.
 *
 * q     code, scale and zero are device pointers; global_scale is set already
 * (quantize_global_scale)
 *   w     device, 8-byte aligned; finite values (quantize_extent finds others)
 *   row0  a multiple of q->block_n; rows too, unless they end the matrix
 *
 * SHAPE when that does not hold, UNSUPPORTED for W16, DEVICE on launch failure; rows == 0 launches
 * nothing. Asynchronous on `stream`. */
status kernel_quantize_weight(const qmatrix *q, const float *w, int32_t row0, int32_t rows,
                              kernel_stream stream);

/* *amax_bits = max(*amax_bits, bits of |w[i]|) over n values: the largest magnitude as an integer
 * that orders alike; infinity and NaN end up above all finite values. Device pointer, zeroed by the
 * caller. */
status kernel_quantize_extent(uint32_t *amax_bits, const float *w, int64_t n, kernel_stream stream);

/* The factor of a whole NVFP4 matrix whose largest magnitude is amax (ref_quant.h); 1 elsewhere. */
float quantize_global_scale(weight_format f, float amax);

/* What a kernel that makes x does for the linear that reads it, with the bits of
 * kernel_quantize_activation, a scale a token:
 *
 *   nothing  act is AF_16
 *   codes    leaves code and scale, device pointers, beside x
 *   values   code is NULL: of x leaves the values that its codes stand for, in their place */
typedef struct {
    void *code; /* [m, k] */
    float *scale;
    act_format act;
    bool atoms; /* order of codes, see activation_quantiser */
} activation_codes;

/* Activations x [m, k] of one linear, in one of two forms:
 *
 *   codes    code [m_pad, k] int8 or e4m3, with scale [m_pad], or [ceil(k / 128), m_pad] where
 *            group is 128: for products of 8-bit operands. Rows m .. m_pad are codes of zero. With
 *            `atoms` (int8) each 16 inputs lie as W4's words have them beside 8-bit x: input
 *            linear_byte_input(i) at place i (linear_layout.h).
 *   values   value [m, k] of `type`: code times scale, rounded to 16 bits (relative error of each
 *            at most 2^-11 in f16, 2^-8 in bf16): for kernels that take 16-bit operands */
typedef struct {
    const void *x; /* F16 or BF16, 16-byte aligned, row stride ldx elements, a multiple of 8 */
    int64_t ldx;
    const int32_t *x_row; /* [m] device: the rows of x to take; NULL: 0 .. m */
    int32_t m, k;         /* k: a multiple of 16, at most 65536 */
    int32_t group;        /* that of the weight format: 128 beside FP8b; others are not looked at */
    dtype type;           /* of x */
    act_format act;       /* not A16 */
    void *value;          /* or NULL, and then */
    void *code;
    float *scale;
    int32_t m_pad; /* >= m */
    bool atoms;
} activation_quantiser;

/* A NaN or infinity makes the scale NaN, or all values that share it. SHAPE, UNSUPPORTED; DEVICE on
 * launch failure. m == 0 launches nothing. Asynchronous on `stream`; a kernel that is launched to
 * start early (programmatic dependent launch) may begin before x is read, and must wait. */
status kernel_quantize_activation(const activation_quantiser *a, kernel_stream stream);

#ifdef __cplusplus
}
#endif
#endif
