/* rows.h - rows by number: the embedding, and the rows whose logits are wanted. */
#ifndef KERNEL_ROWS_H
#define KERNEL_ROWS_H
#include "draw.h"
#include "kernel.h"

#ifdef __cplusplus
extern "C" {
#endif

/* out[i] = table[row[i]] for i < n
 *
 *   out      [n, cols] of 16-bit elements, device, not within `table`
 *   table    [n_rows, cols], device; both 16-byte aligned
 *   row      [n], device; each in [0, n_rows), which the caller has checked
 *
 * Copies. cols need not be a multiple of anything; multiples of 8 move 16 bytes a thread. n == 0
 * launches nothing. DEVICE on launch failure. Asynchronous on `stream`. */
status kernel_rows(void *out, const void *table, const int32_t *row, int64_t n, int32_t cols,
                   kernel_stream stream);

/* token[i] = drawn[-1 - token[i]].token for those i < n with token[i] < 0
 *
 *   token    [n], device
 *   drawn    results of draw.h, device: of the step before, which the same stream has run
 *
 * n == 0 launches nothing. DEVICE on launch failure. Asynchronous on `stream`. */
status kernel_rows_feed(int32_t *token, const draw_result *drawn, int64_t n, kernel_stream stream);

#ifdef __cplusplus
}
#endif
#endif
