/* sampler.h - the definition of how a token is drawn from logits (request.h has the order of steps). */
#ifndef AMALGAM_SAMPLER_H
#define AMALGAM_SAMPLER_H
#include "request.h"

/* Draw from logits [vocab], which are left unchanged; `scratch` holds at least sampler_bytes(vocab).
 * Depends on logits, params, draw and history alone: nothing of the batch. NaN logits count as -inf;
 * when no logit is finite the result is token 0. Probabilities are taken in double and ties are broken
 * by the lower id, so the result is the same for any order of summation up to rounding of logits. */
void sampler_draw(sampled *out, const float *logits, int32_t vocab, const sampling *params,
                  uint64_t draw, const int32_t *history, int32_t n_history, void *scratch);
size_t sampler_bytes(int32_t vocab);

/* RANGE with the parameter's name. */
status sampling_check(const sampling *p);
#endif
