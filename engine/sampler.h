/* sampler.h - the definition of how a token is drawn from logits (request.h has the order of
 * steps). */
#ifndef AMALGAM_SAMPLER_H
#define AMALGAM_SAMPLER_H
#include "draw.h"
#include "request.h"

/* Draw from logits [vocab], which are left unchanged; `scratch`, aligned for double, holds at least
 * sampler_bytes(vocab). Depends on logits, params, draw and history alone: nothing of the batch.
 * The last `draw` tokens of the history, or all if it has fewer, are output.
 *
 * Logits that are not finite (NaN, infinities) count as -inf; when none is finite the result is
 * token 0 with log-probability -inf and no list. Probabilities are f64, ties are broken by the
 * lower id. Of what the truncations leave, the token is the first by ascending id at which the
 * running sum of probabilities exceeds philox_unit(seed, draw) times their sum. A token of the
 * history outside the vocabulary is a programmer error. */
void sampler_draw(sampled *out, const float *logits, int32_t vocab, const sampling *params,
                  uint64_t draw, const int32_t *history, int32_t n_history, void *scratch);
size_t sampler_bytes(int32_t vocab);

/* What sampler_draw says of the log-probabilities, of a token that is there already. */
void sampler_score(sampled *out, const float *logits, int32_t vocab, int32_t token,
                   int32_t n_logprobs);

/* Steps 1 to 3 of request.h as changes of single logits: into `out`, which has room for
 * sampler_edits_most of them (one is written in vain), the first *n_bias being step 1. Returns how
 * many. `count` [sampler_counts(vocab)] is 0 before and after. A token outside the vocabulary is a
 * programmer error, but among the barred it is passed over; and a negative last one of the output
 * is not known yet (batch.h): it is not counted, and the last edit is kept for it (draw.h). */
int32_t sampler_edits(draw_edit *out, int32_t *n_bias, const sampling *params, uint64_t draw,
                      const int32_t *history, int32_t n_history, int32_t vocab, int32_t *count);
int64_t sampler_counts(int32_t vocab);
int64_t sampler_edits_most(const sampling *params, uint64_t draw, int32_t n_history, int32_t vocab);

/* By ascending token, as sampling wants them. */
void logit_bias_sort(logit_bias *b, int32_t n);
/* RANGE with the parameter's name. */
status sampling_check(const sampling *p);
/* Whether the history matters: one of the penalties is set. */
bool sampling_penalises(const sampling *p);
#endif
