/* rows.h - rows by number: those whose logits are wanted; and logits of ranks, side by side. */
#ifndef KERNEL_ROWS_H
#define KERNEL_ROWS_H
#include "kernel.h"

#ifdef __cplusplus
extern "C" {
#endif

/* out[i] = table[row[i]] for i < n
 *
 *   out      [n, cols] of 16-bit elements, device, not within `table`
 *   table    [n_rows, cols], device; both 16-byte aligned
 *   row      [n], device, a constant: read while kernels before this one may still run; each in
 *            [0, n_rows), which the caller has checked
 *
 * Copies. cols need not be a multiple of anything; multiples of 8 move 16 bytes a thread. n == 0
 * launches nothing. DEVICE on launch failure. Asynchronous on `stream`. */
status kernel_rows(void *out, const void *table, const int32_t *row, int64_t n, int32_t cols,
                   kernel_stream stream);

/* out[r, p * width + c] = part[p, r, c]: logits of parts of the vocabulary, side by side
 *
 *   out    [rows, n_parts * width] f32, device, not within `part`
 *   part   [n_parts, rows, width] f32, device
 *
 * SHAPE for sizes below 0 or too large for a launch, DEVICE on launch failure; rows == 0 launches
 * nothing. Asynchronous on `stream`, capturable in a graph. */
status kernel_rows_join(float *out, const float *part, int32_t n_parts, int64_t rows, int32_t width,
                        kernel_stream stream);

#ifdef __cplusplus
}
#endif
#endif
