/* request.h - one request as a workload or a client states it, and the instants that were seen of
 * it. */
#ifndef AMALGAM_REQUEST_H
#define AMALGAM_REQUEST_H
#include "base.h"

#ifdef __cplusplus
extern "C" {
#endif

/* How a token is drawn. Applied in this order: repetition penalty, temperature, top-k, top-p,
 * min-p, then one draw. temperature == 0 is greedy: the largest logit after the penalty, lowest id
 * on a tie, and the rest is not looked at. */
typedef struct {
    float temperature; /* 0 = greedy; up to 100 */
    int32_t top_k;     /* 0 = all */
    float top_p;       /* 1 = all; smallest set whose probability reaches it */
    float min_p;       /* 0 = all; keep p >= min_p * max p */
    /* 1 = none; Keskar et al. 2019: divide positive logits, multiply others. */
    float repetition_penalty;
    uint64_t seed;      /* the i-th output token draws philox_unit(seed, i) */
    int32_t n_logprobs; /* -1 = none; else of the chosen token and of n best, <= 20 */
} sampling;

#define SAMPLING_GREEDY ((sampling){.top_p = 1, .repetition_penalty = 1, .n_logprobs = -1})

enum { LOGPROBS_MAX = 20 };

/* What the sampler says of one row. Log-probabilities are of the raw logits (before penalty and
 * temperature), as OpenAI's API has it. */
typedef struct {
    int32_t token;
    float logprob; /* of token; 0 when not asked for */
    int32_t n_top; /* filled entries below, best first */
    int32_t top_token[LOGPROBS_MAX];
    float top_logprob[LOGPROBS_MAX];
} sampled;

typedef enum {
    FINISH_NONE,
    FINISH_STOP,
    FINISH_LENGTH,
    FINISH_CANCEL,
    FINISH_REFUSED
} finish_reason;
const char *finish_text(finish_reason r); /* "none", "stop", "length", "cancel", "refused" */

typedef struct request {
    int64_t id;
    int64_t arrival_ns; /* scheduled arrival, ns since the run began; latency counts from here */
    const int32_t
        *prompt;      /* [n_prompt] token ids; owner keeps them until the request has finished */
    int32_t n_prompt; /* >= 1 */
    int32_t max_new;  /* output tokens at most, >= 1 */
    bool ignore_eos;  /* run to max_new whatever is drawn: benchmarks, and devices without logits */
    sampling sampling;
    const int32_t *stop_token; /* besides the model's end tokens */
    int32_t n_stop_tokens;
    uint64_t salt; /* prefix-cache namespace: requests share pages only within one */
    int32_t user;  /* closed loop: which user sends it; -1 = open loop */
} request;

/* Instants of one request, ns on the run's timeline; -1 = did not happen. Metrics are differences
 * made later (metrics.h). */
typedef struct {
    int64_t id;
    int64_t arrival_ns;  /* when it should have arrived */
    int64_t dispatch_ns; /* when it was handed to the scheduler */
    int64_t admit_ns;    /* first time any of it was in a batch */
    int64_t first_token_ns, finish_ns;
    int64_t *token_ns; /* [n_output] */
    int32_t n_prompt, n_output;
    int32_t n_cached; /* prompt tokens taken from the prefix cache at first admission */
    int32_t n_preempted;
    finish_reason finish;
    const char *reason; /* of a refusal */
} request_log;

#ifdef __cplusplus
}
#endif
#endif
