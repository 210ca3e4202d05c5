/* ref_norm.c - root-mean-square normalisation: two passes over a row. */
#include "ref_norm.h"
#include <math.h>

void ref_rmsnorm(float *y, const float *x, const float *w, int64_t rows, int32_t cols, float eps) {
    for (int64_t r = 0; r < rows; r++) {
        const float *xr = x + r * cols;
        float *yr = y + r * cols;
        double sum = 0;
        for (int32_t i = 0; i < cols; i++) sum += (double)xr[i] * xr[i];
        const double scale = 1 / sqrt(sum / cols + (double)eps);
        for (int32_t i = 0; i < cols; i++) yr[i] = (float)(xr[i] * scale) * w[i];
    }
}

void ref_norm_add(float *y, float *residual, const float *add, const float *w, int64_t rows,
                  int32_t cols, float eps) {
    CHECK(y != residual);
    if (add)
        for (int64_t i = 0; i < rows * cols; i++) residual[i] += add[i];
    ref_rmsnorm(y, residual, w, rows, cols, eps);
}
