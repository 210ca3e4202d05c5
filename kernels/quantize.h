/* quantize.h - weights to the canonical quantised form, on the device: what ref_quantize_weight
 * gives, bit for bit, in every format. */
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

#ifdef __cplusplus
}
#endif
#endif
