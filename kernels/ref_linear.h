/* ref_linear.h - the definition of a linear layer, twice: f64, and f32 in a fixed order for the cpu
 * device.
 *
 * ref_linear is what every kernel is tested against. ref_linear_lanes is what the cpu device runs:
 * its order of summation is part of the definition, so a row of y depends on that row of x alone,
 * bit by bit: not on the batch around it, not on how rows are blocked, on threads or on the
 * processor. A BLAS promises none of that (OpenBLAS takes other kernels for other heights: rows
 * differ in the last bit between M = 1 and M = 8), and greedy text must not depend on the company a
 * request keeps. What it costs is in the table of ref_linear.c. */
#ifndef AMALGAM_REF_LINEAR_H
#define AMALGAM_REF_LINEAR_H
#include "kernel.h"

#ifdef __cplusplus
extern "C" {
#endif

/* y[t,n] = sum_k x[t,k] w[n,k] + bias[n]
 *
 *   y      [t, n] row-major f32, another buffer
 *   x      [t, k] row-major f32
 *   w      [n, k] row-major f32: one row an output feature
 *   bias   [n] or NULL
 *
 * Sums in f64 in ascending k, bias last, rounded once. t == 0 or n == 0 does nothing. */
void ref_linear(float *y, const float *x, const float *w, const float *bias, int64_t t, int32_t n,
                int32_t k);

/* The same in f32 with rows `x_stride`, `w_stride` and `y_stride` elements apart:
 *
 *   lane[l]  = sum of x[t,k] w[n,k] over k = l mod 8, ascending, each step one fused multiply-add
 *   y[t,n]   = ((lane0 + lane4) + (lane2 + lane6)) + ((lane1 + lane5) + (lane3 + lane7)) + bias[n]
 *
 * |error| <= (k / 8 + 4) 2^-24 sum_k |x w| to first order. Elements between rows are not read. */
void ref_linear_lanes(float *y, int64_t y_stride, const float *x, int64_t x_stride, const float *w,
                      int64_t w_stride, const float *bias, int64_t t, int64_t n, int32_t k);

/* ref_linear_lanes without vector instructions, for the test that both agree in every bit. */
void ref_linear_lanes_scalar(float *y, int64_t y_stride, const float *x, int64_t x_stride,
                             const float *w, int64_t w_stride, const float *bias, int64_t t,
                             int64_t n, int32_t k);

#ifdef __cplusplus
}
#endif
#endif
