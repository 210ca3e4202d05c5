/* calibrate.h - what quantisers that look at data (engine/quantise.h) compute over whole matrices:
 * second moments of inputs, the columns of GPTQ, losses for the searches of AWQ and clipping.
 *
 * ref_calibrate is the definition, on the host; cuda_calibrate does the same on a GPU, up to the
 * rounding of its sums. All arrays are the host's, but for x of sums_add. Every function returns
 * when its results are there; not for several threads at a time. NOMEM, OOM, DEVICE. */
#ifndef KERNEL_CALIBRATE_H
#define KERNEL_CALIBRATE_H
#include "ref_quant.h"

#ifdef __cplusplus
extern "C" {
#endif

/* Of one matrix' inputs x [rows, k], each row divided by its root mean square. Without that a few
 * tokens with massive activations (the first ones, where attention rests) outweigh all others in
 * what down and o are fed, although the norm that follows divides their error by as much: on the
 * tiny checkpoint gptq then wins back 54 % of the perplexity of W4 in place of 37 %. */
typedef struct {
    int32_t k;
    int64_t rows;
    double *gram;      /* [k, k] sum over rows of x_i x_j */
    double *magnitude; /* [k] sum over rows of |x_i| */
} moments;

/* Where a group's range is cut: its lowest value times lo, its highest times hi; a range includes
 * 0. */
typedef struct {
    float lo, hi;
} calibrate_cut;

typedef struct calibrate_sums calibrate_sums;     /* moments that grow */
typedef struct calibrate_search calibrate_search; /* one matrix, quantised again and again */

typedef struct {
    /* *m is zero, and holds the sums from sums_end on. */
    status (*sums_open)(calibrate_sums **out, moments *m);
    /* Rows x[row[i]] (row NULL = i), i in [0, n), of x [.., k] of `type`, where the device keeps
     * its activations. Products of some rows in f32, sums of those in f64. */
    status (*sums_add)(calibrate_sums *s, const void *x, dtype type, const int32_t *row, int64_t n,
                       kernel_stream stream);
    status (*sums_end)(calibrate_sums *s); /* frees it, also when it fails; NULL is fine */

    /* Codes of w [n, k] into q, which has scales and zero points. H [k, k] = gram with `damp` added
     * to its diagonal; columns are rounded in the order column[0], column[1], ..., and the error of
     * each is spread over those to come by H^-1. w is destroyed. RANGE for an H that is singular.
     */
    status (*gptq)(qmatrix *q, float *w, const double *gram, double damp, const int32_t *column);

    /* w [n, k] and gram [k, k] stay the caller's until search_close. p is INT4 or INT8. */
    status (*search_open)(calibrate_search **out, const float *w, int32_t n, int32_t k,
                          const precision *p, const float *gram);
    /* *loss = sum over rows of e gram e^T, e = Q(w s) / s - w, s [k]. */
    status (*search_scaled)(calibrate_search *s, const float *scale, double *loss);
    /* loss [n, groups] = e gram e^T within the group, e = Q(w cut) - w, cut [n, groups]. */
    status (*search_cut)(calibrate_search *s, const calibrate_cut *cut, double *loss);
    void (*search_close)(calibrate_search *s); /* NULL is fine */
} calibrate_ops;

extern const calibrate_ops ref_calibrate, cuda_calibrate; /* the latter where CUDA is */

/* The group x [n] with its range cut. */
void ref_calibrate_cut(float *to, const float *x, int32_t n, calibrate_cut at);

#ifdef __cplusplus
}
#endif
#endif
