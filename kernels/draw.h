/* draw.h - one token from each row of logits, on the device: engine/sampler.h is the definition. */
#ifndef KERNEL_DRAW_H
#define KERNEL_DRAW_H
#include "kernel.h"

#ifdef __cplusplus
extern "C" {
#endif

enum { DRAW_TOP_MAX = 20 };

/* A change of one logit, in f32; what comes out and is not finite counts as -inf. The first n_bias
 * of a row add `value`. Then come the others: the repetition penalty, if it is marked, and, with
 * value > 0, minus (frequency penalty * value + presence penalty). Within both no token is there
 * twice. engine/sampler.c makes them. */
typedef struct {
    int32_t token; /* its complement: marked */
    float value;   /* what is added, finite or -inf; or how often the output has the token */
} draw_edit;

/* What a row gives: no token (-1), the one that is drawn, or `given`, with its log-probability. */
typedef enum { DRAW_NOTHING, DRAW_TOKEN, DRAW_GIVEN } draw_kind;

/* How row i is drawn from: `sampling` of request.h and what sample_row adds. */
typedef struct {
    float temperature, top_p, min_p;
    float repetition_penalty, presence_penalty, frequency_penalty;
    int32_t top_k;
    int32_t n_logprobs; /* -1 = none; up to DRAW_TOP_MAX */
    draw_kind kind;
    int32_t given;
    int32_t to;              /* the result is out[to]; no two rows' are the same */
    int32_t n_bias, n_edits; /* 0 <= n_bias <= n_edits */
    /* Negative: out[~last].token, of a launch before, is the row's last token, which the edits do
     * not count yet. It is one more in the edit that has it; if none has, the row's last edit,
     * which is kept for it, is its own. 0: all are counted. */
    int32_t last;
    draw_edit *edit; /* [n_edits], 8-byte aligned, of the device or the host's pinned */
    uint64_t seed, counter;
} draw_row;

/* The same fields as `sampled` of request.h. */
typedef struct {
    int32_t token;
    float logprob;
    int32_t n_top;
    int32_t top_token[DRAW_TOP_MAX];
    float top_logprob[DRAW_TOP_MAX];
} draw_result;

/* out[row[i].to] = token of logits[i, :], and its log-probabilities if asked for
 *
 *   out      device memory or pinned host memory that the device can write
 *   logits   [n, vocab] f32, device; rows that have edits are left changed, unless
 *            log-probabilities of them were asked for
 *   row      [n], device, a constant: read while kernels before this one may still run
 *   edits    of a row with log-probabilities: overwritten
 *
 * The token is the one that sampler_draw takes from the same logits, unless rounding decides:
 * weights e = exp((z - max z) / T) are f64 as there, but their sums are of e 2^44 rounded to
 * integers, so that they depend on no order (and a token under 2^-45 of the best is never drawn).
 * Where two running sums differ by less than vocab 2^-45 of the best weight, or the 2^-46 of
 * itself within which e is taken here decides, the neighbour may be taken. Same bits on every run,
 * in any company. Greedy tokens, top-k sets and ties are exact. Log-probabilities are within 1e-6
 * plus rounding.
 *
 * One to eight blocks a row, on which no bit depends. SHAPE for vocab outside 1 .. 2^18, DEVICE on
 * launch failure; n == 0 launches nothing. Asynchronous on `stream`, capturable in a graph. */
status kernel_draw(draw_result *out, float *logits, const draw_row *row, int32_t n, int32_t vocab,
                   kernel_stream stream);

#ifdef __cplusplus
}
#endif
#endif
