/* norm.h - residual addition and root-mean-square normalisation in one pass (ref_norm.h). */
#ifndef KERNEL_NORM_H
#define KERNEL_NORM_H
#include "kernel.h"

#ifdef __cplusplus
extern "C" {
#endif

/* residual[r,i] = round(residual[r,i] + add[r,i]);  y[r,i] = residual[r,i] / root_r * w[i]
 * with root_r = sqrt(mean_i(residual[r,i]^2) + eps) of the rounded residual.
 *
 *   y, residual, add   [rows, cols] of `type`, device, 16-byte aligned; y may be `add`
 *   add                NULL: nothing is added and residual is only read
 *   w                  [cols] of `type`
 *
 * Sums in f32 in an order that depends on cols alone, so a row's result does not depend on the
 * others. SHAPE if cols is no multiple of 8 or over 32768, UNSUPPORTED for a type other than F16
 * and BF16, DEVICE on launch failure. rows == 0 launches nothing. Asynchronous on `stream`. */
status kernel_norm_add(void *y, void *residual, const void *add, const void *w, int64_t rows,
                       int32_t cols, float eps, dtype type, kernel_stream stream);

#ifdef __cplusplus
}
#endif
#endif
