/* moe.h - mixture of experts around the experts' linears: route, permute, combine (ref_moe.h).
 *
 * permute makes the grouped problem of linear.h: expert_start and row_token are its expert_start
 * and x_row. All pointers are device pointers; all calls are asynchronous on `stream`, capturable
 * in a graph and deterministic. t == 0 launches nothing. DEVICE on launch failure. */
#ifndef KERNEL_MOE_H
#define KERNEL_MOE_H
#include "linear.h"

#ifdef __cplusplus
extern "C" {
#endif

enum { MOE_EXPERTS_MAX = 512, MOE_TOP_K_MAX = 32 };

/* The top_k largest logits of each token, best first, the lower expert on a tie, NaN as -inf;
 * weights as ref_moe_route, in f32.
 *
 *   expert, weight   [t, top_k]
 *   logits           [t, n_experts] of `type`: F32, F16 or BF16, rows `stride` elements apart
 *
 * SHAPE for n_experts over MOE_EXPERTS_MAX or top_k outside 1 .. min(n_experts, MOE_TOP_K_MAX). */
status kernel_moe_route(int32_t *expert, float *weight, const void *logits, int64_t t,
                        int32_t n_experts, int32_t top_k, bool over_chosen, bool normalise,
                        int64_t stride, dtype type, kernel_stream stream);

/* Sort slots by expert, within an expert by token: exactly ref_moe_permute.
 *
 *   expert_start   [n_experts + 1]     slot_row    [t * top_k] row of a slot
 *   expert         [t * top_k]         row_token   [t * top_k] token of a row
 *
 * expert lies at a multiple of 16 bytes. */
status kernel_moe_permute(int32_t *expert_start, int32_t *slot_row, int32_t *row_token,
                          const int32_t *expert, int64_t t, int32_t n_experts, int32_t top_k,
                          kernel_stream stream);

/* kernel_moe_route, then kernel_moe_permute; of few tokens in one launch. Arguments, results and
 * errors are theirs; t == 0 writes nothing. */
status kernel_moe_sort(int32_t *expert_start, int32_t *slot_row, int32_t *row_token,
                       int32_t *expert, float *weight, const void *logits, int64_t t,
                       int32_t n_experts, int32_t top_k, bool over_chosen, bool normalise,
                       int64_t stride, dtype type, kernel_stream stream);

/* out[i] = sum over j < top_k of weight[i, j] y[slot_row[i, j]], in f32 in that order, rounded
 * once.
 *
 *   out   [t, dim] of `type`, F16 or BF16, 16-byte aligned as y
 *   y     [t * top_k, dim]
 *
 * SHAPE unless dim is a multiple of 8. */
status kernel_moe_combine(void *out, const void *y, const float *weight, const int32_t *slot_row,
                          int64_t t, int32_t top_k, int32_t dim, dtype type, kernel_stream stream);

/* A mixture's way in for few tokens, in one launch where they are eight at most, in two else:
 * residual += add, x = the norm of that (kernel_norm_add), logits = x router^T + bias,
 * kernel_moe_sort of them.
 *
 *   x, residual, add   [t, dim] of `type`, F16 or BF16, 16-byte aligned
 *   gain               [dim] of `type`
 *   logits             [t, n_experts] f32, rows `stride` apart
 *
 * Products are of residual times gain rounded to `type` (fp16: times a power of two), in f32, and
 * multiplied by 1 / root after that. SHAPE where kernel_moe_enter_accepts says no.
 *
 * told: NULL, or where up to MOE_TOLD_TOKENS tokens' rows are told as soon as they are known
 * (linear_problem.told); zeros before, and kernel_moe_leave leaves zeros. */
enum { MOE_ENTER_TOKENS_MAX = 64, MOE_TOLD_TOKENS = 8 };
typedef struct {
    void *x, *residual;
    const void *add, *gain;
    const linear_weight *router;
    float *logits, *weight;
    int32_t *expert_start, *slot_row, *row_token, *expert;
    int64_t t, stride;
    int32_t dim, n_experts, top_k;
    bool over_chosen, normalise;
    float eps;
    dtype type;
    int32_t *told;
    void *words; /* NULL, or [t, dim] of x besides, as linear_words has it */
} moe_enter;

bool kernel_moe_enter_accepts(const moe_enter *p, int32_t sm);
status kernel_moe_enter(const moe_enter *p, kernel_stream stream);

/* Its way out: residual[i] = round(residual[i] + sum over j < top_k of weight[i, j]
 * y[slot_row[i, j]]), the sum in f32 in that order; x = the norm of that. A stream's launch before
 * this one has not written slot_row and weight: they are read before it ends.
 *
 *   x, residual   [t, dim]      y   [t * top_k, dim]      gain   [dim], all of `type`, F16 or BF16
 *
 *   told   [t * top_k] words LINEAR_TOLD apart, zeros after; or NULL
 *   y_in_words: y is what kernel_linear_both, the launch before, makes of it
 *
 * SHAPE unless dim is a multiple of 8 and at most MOE_LEAVE_DIM_MAX. */
enum { MOE_LEAVE_DIM_MAX = 4096 };
status kernel_moe_leave(void *x, void *residual, const void *y, const void *gain,
                        const float *weight, const int32_t *slot_row, int32_t *told,
                        bool y_in_words, int64_t t, int32_t top_k, int32_t dim, float eps,
                        dtype type, kernel_stream stream);

#ifdef __cplusplus
}
#endif
#endif
