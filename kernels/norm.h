/* norm.h - residual addition and root-mean-square normalisation in one pass (ref_norm.h). */
#ifndef KERNEL_NORM_H
#define KERNEL_NORM_H
#include "draw.h"
#include "kernel.h"
#include "quantize.h"

#ifdef __cplusplus
extern "C" {
#endif

/* residual[r,i] = round(residual[r,i] + add[r,i]);  y[r,i] = residual[r,i] * w[i] / root_r
 * with root_r = sqrt(mean_i(residual[r,i]^2) + eps) of the rounded residual.
 *
 *   y, residual, add   [rows, cols] of `type`, device, 16-byte aligned; y may be `add`
 *   w                  [cols] of `type`
 *   codes              of y, or NULL: none; cols a multiple of 16 then. Or y becomes values
 *
 * Sums in f32 in an order that depends on cols alone, so a row's result does not depend on the
 * others. SHAPE if cols is no multiple of 8 or over 32768, UNSUPPORTED for a type other than F16
 * and BF16, DEVICE on launch failure. rows == 0 launches nothing. Asynchronous on `stream`. */
status kernel_norm_add(void *y, void *residual, const void *add, const void *w, int64_t rows,
                       int32_t cols, float eps, dtype type, const activation_codes *codes,
                       kernel_stream stream);

/* residual[r,i] = table[id[r],i];  y[r,i] = residual[r,i] * w[i] / root_r, root_r and rounding as
 * above: the first kernel of a step. It begins when all before it is over, so that the tables of
 * the step, whose upload the stream has waited for, are constants to all that follow.
 *
 *   y, residual   [rows, cols] of `type`, device, 16-byte aligned
 *   table         [., cols] of `type`
 *   token         [rows] ids, device: id[r] = token[r], a row of the table, which the caller has
 *                 checked; or drawn[j].token where token[r] = -1 - j
 *   drawn         results of draw.h, device
 *
 * Errors as above. rows == 0 launches nothing. Asynchronous on `stream`. */
status kernel_norm_embed(void *y, void *residual, const void *table, const int32_t *token,
                         const draw_result *drawn, const void *w, int64_t rows, int32_t cols,
                         float eps, dtype type, const activation_codes *codes,
                         kernel_stream stream);

/* What the ranks of tensor parallelism share for `kernel_norm_add_ranks`. Every rank has an inbox
 * on its own GPU, which the others write to (peer access); it is zeroed once, and never again.
 *
 *   inbox   [n] on this rank's GPU, of every rank: [2, n, NORM_RANK_ROWS, cols_max / 2] words of
 *           64 bits, a pair of values and the number of the call that sent it, which alone says
 *           that it has come
 *   calls   [NORM_RANK_ROWS] on this rank's GPU, zeroed once: calls that a row has taken part in
 *   gone    mapped host memory; not 0: others will not come any more, so stop waiting for them.
 *           What is written then is undefined */
enum { NORM_RANK_ROWS = 64, NORM_RANK_COLS = 16384 };
typedef struct {
    void *const *inbox;
    uint32_t *calls;
    const int32_t *gone;
    int32_t rank, n, cols_max;
} norm_ranks;

size_t norm_inbox_bytes(int32_t n_ranks, int32_t cols_max);

/* kernel_norm_add with the sum of all ranks' `add`, which each of them launches with its own: in
 * f32, in order of ranks, not rounded before it meets the residual, so that all ranks get the same
 * bits. A launch ends when the others' of the same call have sent theirs; ranks make the same calls
 * in the same order. SHAPE also if rows > NORM_RANK_ROWS, cols > NORM_RANK_COLS or cols > cols_max.
 */
status kernel_norm_add_ranks(void *y, void *residual, const void *add, const void *w, int64_t rows,
                             int32_t cols, float eps, dtype type, const norm_ranks *ranks,
                             kernel_stream stream);

#ifdef __cplusplus
}
#endif
#endif
