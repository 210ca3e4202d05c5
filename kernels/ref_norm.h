/* ref_norm.h - the definition of root-mean-square normalisation (Zhang & Sennrich 2019, eq. 4). */
#ifndef AMALGAM_REF_NORM_H
#define AMALGAM_REF_NORM_H
#include "kernel.h"

#ifdef __cplusplus
extern "C" {
#endif

/* y[r,i] = x[r,i] / sqrt(mean_i(x[r,i]^2) + eps) * w[i]
 *
 *   y, x    [rows, cols] row-major f32, may be the same
 *   w       [cols] f32
 *   eps     added inside the root; config.json rms_norm_eps
 *
 * Accumulates in f64; one rounding of the product x * 1/root, one of that times w, as Hugging
 * Face's modules do in f32. rows == 0 does nothing. Also the QK-norm of Qwen3: rows = heads, cols =
 * D. */
void ref_rmsnorm(float *y, const float *x, const float *w, int64_t rows, int32_t cols, float eps);

/* residual[r,i] += add[r,i], then y = rmsnorm(residual). add [rows, cols], or NULL: nothing is
 * added. residual is changed in place; y is another buffer and may be `add` itself. */
void ref_norm_add(float *y, float *residual, const float *add, const float *w, int64_t rows,
                  int32_t cols, float eps);

#ifdef __cplusplus
}
#endif
#endif
