/* ref_linear.c - linear layers: the f64 definition, and f32 in eight lanes for the cpu device.
 *
 * The lanes are the eight floats of an AVX register. A tile of four rows of x and three rows of w
 * keeps twelve accumulators in registers and loads seven vectors for twelve multiply-adds, so the
 * arithmetic and not the loads is the limit; every accumulator sees the same sequence of operations
 * whatever the tile, which is why the order of ref_linear.h holds for any shape.
 *
 * GFLOP/s on one core of an EPYC (Zen 4), warm caches, against OpenBLAS 0.3.21 with one thread:
 *
 *     n x k          t = 1         8        64       512
 *     512 x 256    31 / 43   69 / 45   73 / 92  69 / 104
 *     2048 x 256   33 / 7    64 / 46   71 / 92  61 / 100
 *     4096 x 4096  12 / 3    49 / 19   72 / 68 */
#include "ref_linear.h"
#include <math.h>
#include <string.h>

enum { LANES = 8 };

void ref_linear(float *y, const float *x, const float *w, const float *bias, int64_t t, int32_t n,
                int32_t k) {
    for (int64_t i = 0; i < t; i++) {
        for (int32_t j = 0; j < n; j++) {
            const float *xi = x + i * k, *wj = w + (int64_t)j * k;
            double sum = 0;
            for (int32_t c = 0; c < k; c++) sum += (double)xi[c] * wj[c];
            y[i * n + j] = (float)(bias ? sum + bias[j] : sum);
        }
    }
}

/* The last k % 8 products go to the first lanes; then the lanes are added in the stated order. */
static float finish_lanes(float lane[LANES], const float *x, const float *w, int32_t tail) {
    for (int32_t l = 0; l < tail; l++) lane[l] = fmaf(x[l], w[l], lane[l]);
    return ((lane[0] + lane[4]) + (lane[2] + lane[6])) +
           ((lane[1] + lane[5]) + (lane[3] + lane[7]));
}

void ref_linear_lanes_scalar(float *y, int64_t y_stride, const float *x, int64_t x_stride,
                             const float *w, int64_t w_stride, const float *bias, int64_t t,
                             int64_t n, int32_t k) {
    const int32_t whole = k - k % LANES;
    for (int64_t i = 0; i < t; i++) {
        for (int64_t j = 0; j < n; j++) {
            const float *xi = x + i * x_stride, *wj = w + j * w_stride;
            float lane[LANES] = {0};
            for (int32_t c = 0; c < whole; c += LANES)
                for (int32_t l = 0; l < LANES; l++) lane[l] = fmaf(xi[c + l], wj[c + l], lane[l]);
            const float sum = finish_lanes(lane, xi + whole, wj + whole, k - whole);
            y[i * y_stride + j] = bias ? sum + bias[j] : sum;
        }
    }
}

#ifdef __x86_64__
#include <immintrin.h>

typedef struct {
    float *y;
    const float *x, *w, *bias;
    int64_t y_stride, x_stride, w_stride;
    int32_t k;
} problem;

/* finish_lanes without a tail, in the same order. */
__attribute__((target("avx2,fma"), always_inline)) static inline float add_lanes(__m256 v) {
    const __m128 s = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    const __m128 t = _mm_add_ps(s, _mm_movehl_ps(s, s)); /* 0+4 + 2+6, 1+5 + 3+7 */
    return _mm_cvtss_f32(_mm_add_ss(t, _mm_movehdup_ps(t)));
}

/* Rows i .. i + rows and outputs j .. j + cols; both constants where this is inlined. */
__attribute__((target("avx2,fma"), always_inline)) static inline void
tile(const problem *p, int64_t i, int64_t j, const int rows, const int cols) {
    const int32_t whole = p->k - p->k % LANES;
    const float *x = p->x + i * p->x_stride, *w = p->w + j * p->w_stride;
    __m256 acc[4][3];
    for (int a = 0; a < rows; a++)
        for (int b = 0; b < cols; b++) acc[a][b] = _mm256_setzero_ps();
    for (int32_t c = 0; c < whole; c += LANES) {
        __m256 wv[3];
        for (int b = 0; b < cols; b++) wv[b] = _mm256_loadu_ps(w + b * p->w_stride + c);
        for (int a = 0; a < rows; a++) {
            const __m256 xv = _mm256_loadu_ps(x + a * p->x_stride + c);
            for (int b = 0; b < cols; b++) acc[a][b] = _mm256_fmadd_ps(xv, wv[b], acc[a][b]);
        }
    }
    for (int a = 0; a < rows; a++) {
        for (int b = 0; b < cols; b++) {
            float sum;
            if (whole == p->k) {
                sum = add_lanes(acc[a][b]);
            } else {
                float lane[LANES];
                _mm256_storeu_ps(lane, acc[a][b]);
                sum = finish_lanes(lane, x + a * p->x_stride + whole, w + b * p->w_stride + whole,
                                   p->k - whole);
            }
            p->y[(i + a) * p->y_stride + j + b] = p->bias ? sum + p->bias[j + b] : sum;
        }
    }
}

__attribute__((target("avx2,fma"))) static void tile_rows(const problem *p, int64_t t, int64_t j,
                                                          const int cols) {
    int64_t i = 0;
    switch (cols) {
    case 3:
        for (; i + 4 <= t; i += 4) tile(p, i, j, 4, 3);
        for (; i + 2 <= t; i += 2) tile(p, i, j, 2, 3);
        for (; i < t; i++) tile(p, i, j, 1, 3);
        break;
    default:
        for (; i + 4 <= t; i += 4) tile(p, i, j, 4, 1);
        for (; i < t; i++) tile(p, i, j, 1, 1);
    }
}

void ref_linear_lanes(float *y, int64_t y_stride, const float *x, int64_t x_stride, const float *w,
                      int64_t w_stride, const float *bias, int64_t t, int64_t n, int32_t k) {
    if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma")) {
        ref_linear_lanes_scalar(y, y_stride, x, x_stride, w, w_stride, bias, t, n, k);
        return;
    }
    const problem p = {.y = y,
                       .x = x,
                       .w = w,
                       .bias = bias,
                       .y_stride = y_stride,
                       .x_stride = x_stride,
                       .w_stride = w_stride,
                       .k = k};
    int64_t j = 0;
    for (; j + 3 <= n; j += 3) tile_rows(&p, t, j, 3);
    for (; j < n; j++) tile_rows(&p, t, j, 1);
}
#else
void ref_linear_lanes(float *y, int64_t y_stride, const float *x, int64_t x_stride, const float *w,
                      int64_t w_stride, const float *bias, int64_t t, int64_t n, int32_t k) {
    ref_linear_lanes_scalar(y, y_stride, x, x_stride, w, w_stride, bias, t, n, k);
}
#endif
