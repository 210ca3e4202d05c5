/* ref_moe.h - the definition of routing tokens to experts and of adding up what they return.
 *
 * Three steps around the experts' linears: route (which experts, with which weights), permute (rows
 * sorted by expert, so that each expert sees a dense matrix), combine (weighted sum by token).
 *
 *     token 0 -> experts 2, 0        slot  0  1  2  3        row    0  1  2  3
 *     token 1 -> experts 2, 1   =>   row   2  0  3  1   =>   token  0  1  0  1
 *                                                            expert 0  1  2  2
 *
 * Slot = token * k + rank among the token's choices. */
#ifndef AMALGAM_REF_MOE_H
#define AMALGAM_REF_MOE_H
#include "kernel.h"

#ifdef __cplusplus
extern "C" {
#endif

/* The top_k largest logits of each token, best first, lower expert on a tie; NaN counts as -inf.
 *
 *   expert   [t, top_k] expert of each slot
 *   weight   [t, top_k] f32, its factor:
 *            over_chosen   softmax over the chosen logits (Mixtral, gpt-oss)
 *            else          softmax over all n_experts, then divided by the sum of the chosen ones
 *                          if normalise (Qwen3-MoE, norm_topk_prob)
 *   logits   [t, n_experts] f32
 *
 * Softmax in f64, rounded once. 1 <= top_k <= n_experts. */
void ref_moe_route(int32_t *expert, float *weight, const float *logits, int64_t t,
                   int32_t n_experts, int32_t top_k, bool over_chosen, bool normalise);

/* Sort slots by expert; within an expert by token.
 *
 *   expert         [t * top_k]     as above
 *   expert_start   [n_experts + 1] first row of each expert
 *   slot_row       [t * top_k]     row of a slot
 *   row_token      [t * top_k]     token that a row takes its input from */
void ref_moe_permute(int32_t *expert_start, int32_t *slot_row, int32_t *row_token,
                     const int32_t *expert, int64_t t, int32_t n_experts, int32_t top_k);

/* out[i, e] = sum over ranks j < top_k of weight[i, j] * y[slot_row[i, j], e], in f64 in that
 * order. out [t, dim], y [t * top_k, dim]. */
void ref_moe_combine(float *out, const float *y, const float *weight, const int32_t *slot_row,
                     int64_t t, int32_t top_k, int32_t dim);

#ifdef __cplusplus
}
#endif
#endif
