/* ceilings.h - what the GPU reaches at most, for benchmarks to be held against. Compiled only where
 * CUDA is. */
#ifndef AMALGAM_CEILINGS_H
#define AMALGAM_CEILINGS_H
#include "kernel.h"

/* The rate of a read of 4 GiB, and that of cuBLAS for 8192 x 8192 x 8192 in `type` (F16 or BF16) on
 * random values (zeros would draw less power and run at higher clocks), beside whatever lies on the
 * current device: the best of a few, for a ceiling is what can be. DEVICE, also where 4 GiB are not
 * free. */
status ceilings_measure(double *read_bytes_per_s, double *matrix_flops, dtype type, int32_t n_sms,
                        kernel_stream stream);
#endif
