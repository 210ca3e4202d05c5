/* linear_probe.h - linear layers put to the test on a GPU: random weights in any format, float64
 * results to compare with, times. What `amalgam bench linear` and tests/gpu_linear.c are made of.
 *
 * Method of timing: random data; the packed weights are copied until they exceed 260 MB and
 * launches take them in turn, so that no cache holds them; launches are replayed as a CUDA graph,
 * after a rest where they are bound by arithmetic; median of the replays. */
#ifndef KERNEL_LINEAR_PROBE_H
#define KERNEL_LINEAR_PROBE_H
#include "linear.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef struct linear_probe linear_probe;

typedef struct {
    int32_t m; /* rows of the (permuted) problem */
    linear_epilogue epilogue;
    dtype y_type;
    bool bias, gather;    /* gather: rows through x_row; with count > 1 the problem is grouped */
    int32_t experts_used; /* grouped: rows go to the first so many experts of a shuffle; 0 = all */
    int32_t top_k; /* grouped, not 0: m / top_k tokens, each goes to so many different experts; the
                      times are of launches that hit other experts each */
    bool routed;   /* timed launches after the first: as linear_problem has it */
    bool ahead;    /* the launch brings memory to L2 besides (linear_problem.ahead) */
    const char *kernel;
    act_format rounded; /* of a weight with A16, not gathered: x is the values of such codes */
    int32_t sabotage;   /* 1: the packed codes of one unit of every matrix (64 rows, 64 inputs) are
                         spoilt for the launch, which the comparison must notice; 2: compared with
                         the product of x as it is, not quantised */
} linear_trial;

typedef struct {
    char kernel[32];
    double us, cublas_us; /* medians; 0 when not timed */
    double
        rel_err;  /* ||y - ref|| / ||ref|| over what is compared; NaN when one is not written. ref:
                       float64 sums over the operands as quantised */
    double worst; /* root mean square error of the worst column of y, over that of all of ref */
    int64_t compared, unwritten, outside; /* outside: elements written past the problem's own */
    uint64_t hash;                        /* of all bits of y */
    int64_t bytes;    /* of weights, once; of the experts hit by the first launch */
    int64_t bytes_io; /* of x and y */
} linear_outcome;

/* Random weights for `w` (format .. gated, family; pointers are filled in). `timed`: copies for
 * timing and the fp16 twin for cuBLAS. */
status linear_probe_open(linear_probe **out, const linear_weight *w, bool timed, uint64_t seed);
void linear_probe_close(linear_probe *p); /* NULL is fine */

/* Run once over poisoned memory and compare: all outputs when there are at most `samples`, else
 * that many rows and columns spread over it. */
status linear_probe_check(linear_probe *p, const linear_trial *t, int64_t samples,
                          linear_outcome *o);
/* Median time of one launch, and of cublasGemmEx in fp16 with the same shape when `cublas`. */
status linear_probe_time(linear_probe *p, const linear_trial *t, int32_t replays, bool cublas,
                         linear_outcome *o);

int32_t linear_probe_sm(void);

#ifdef __cplusplus
}
#endif
#endif
