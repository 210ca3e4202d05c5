/* ladder_linear.h - the steps from a plain W4A16 linear to the ones that run, kept so that
 * experiment e07 can time what each idea buys, and the baseline of systems without such kernels.
 * Not part of the engine.
 *
 * y [m, n] f16 = x [m, k] W^T, W in 4 bits with groups of 128 and zero points. Steps add one idea
 * each:
 *
 *   ladder_scalar     a warp an output, f32, codes in checkpoint order
 *   ladder_tensor     tensor cores (mma.sync), codes in checkpoint order, one tile at a time
 *   ladder_packed     codes in the order of the fragments: one 16-byte load for 32 codes of a lane
 *   ladder_pipelined  tiles arrive by cp.async, four in flight
 *   ladder_convert    codes become f16 by bit operations instead of conversions
 *   (ampere_*)        work shared out over all SMs, deterministic sums: linear_ampere.cu
 *   (the choice)      Hopper's copies and matrix units
 *   dequant_cublas    baseline: expand to f16 in memory, then cuBLAS */
#ifndef KERNEL_LADDER_LINEAR_H
#define KERNEL_LADDER_LINEAR_H
#include "linear.h"

#ifdef __cplusplus
extern "C" {
#endif

/* Is it the name of a step above? NULL is none. */
bool ladder_linear_is(const char *name);

/* Device memory that a step wants beside its operands. */
int64_t ladder_linear_space(int32_t m, int32_t n, int32_t k);

/* p's w, m, x, y, ldx, ldy and n_sms are used; q is the canonical form of the same matrix, with
 * device pointers. UNSUPPORTED for another format, type, epilogue, bias, or k that is no multiple of
 * 128. Asynchronous, capturable. */
status ladder_linear(const char *name, const linear_problem *p, const qmatrix *q, void *space,
                     kernel_stream stream);

#ifdef __cplusplus
}
#endif
#endif
