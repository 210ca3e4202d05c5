/* fill.h - what a device fills its memory with before the first step: synthetic weights, elements
 * of a checkpoint in the device's type, the table of rotary angles.
 *
 * All asynchronous on `stream`; DEVICE on launch failure; n == 0 launches nothing. */
#ifndef KERNEL_FILL_H
#define KERNEL_FILL_H
#include "kernel.h"

#ifdef __cplusplus
extern "C" {
#endif

/* out[i] = fmaf(scale, weight_noise(seed, at + i), mean) rounded to `type`, for i < n: bit for bit
 * what engine/weights.h defines.
 *
 *   out   [n] of `type` (F32, F16, BF16), device */
status kernel_fill_noise(void *out, dtype type, int64_t n, uint64_t seed, uint64_t at, float scale,
                         float mean, kernel_stream stream);

/* Random bytes that read as finite numbers whatever they are taken for, and of ordinary size: as
 * fp16, bf16 and e4m3, and as codes of any width. No byte has more than 0x3b beside its sign.
 *
 *   out   [bytes], a multiple of 16, aligned to 16, device */
status kernel_fill_finite(void *out, int64_t bytes, uint64_t seed, kernel_stream stream);

/* out[r, c] = in[r * row_stride + c * col_stride], each through f32, rounded to nearest even.
 *
 *   out   [rows, cols] of `type`, row-major, device
 *   in    elements of `in_type`, device, aligned to their size; both F32, F16 or BF16 */
status kernel_fill_convert(void *out, dtype type, const void *in, dtype in_type, int64_t rows,
                           int32_t cols, int64_t row_stride, int64_t col_stride,
                           kernel_stream stream);

/* cos_sin[p, d] = factor * (cos, sin)(p * inv_freq[d]) in f64, rounded once (ref_rope_angles).
 *
 *   cos_sin    [n, half, 2] f32, device
 *   inv_freq   [half] f64, device */
status kernel_fill_angles(float *cos_sin, const double *inv_freq, double factor, int32_t n,
                          int32_t half, kernel_stream stream);

#ifdef __cplusplus
}
#endif
#endif
