/* request.h - one request as a workload or a client states it, and the instants that were seen of
 * it. */
#ifndef AMALGAM_REQUEST_H
#define AMALGAM_REQUEST_H
#include "base.h"

#ifdef __cplusplus
extern "C" {
#endif

/* A logit is changed by so much. */
typedef struct {
    int32_t token;
    float bias; /* -100..100 */
} logit_bias;

enum { LOGIT_BIAS_MAX = 1024, LOGPROBS_MAX = 20 };

/* How a token is drawn. Applied in this order, each in f32:
 *
 *   1  min_tokens and logit_bias
 *   2  repetition penalty, once for each token of prompt and output
 *   3  minus (frequency penalty * times + presence penalty), for each token of the output
 *   4  temperature, top-k, top-p, min-p, then one draw
 *
 * temperature == 0 is greedy: the largest logit after 3, lowest id on a tie, and the rest is not
 * looked at. The definitions of logit_bias and of 3 are OpenAI's; that min_tokens and the bias come
 * first, then repetition, frequency and presence, is vLLM's (v1/sample/sampler.py,
 * apply_logits_processors; ops/penalties.py), where min-p comes before top-k. */
typedef struct {
    float temperature; /* 0 = greedy; up to 100 */
    int32_t top_k;     /* 0 = all */
    float top_p;       /* 1 = all; smallest set whose probability reaches it */
    float min_p;       /* 0 = all; keep p >= min_p * max p */
    /* 1 = none; Keskar et al. 2019: divide positive logits, multiply others. */
    float repetition_penalty;
    float presence_penalty, frequency_penalty; /* 0 = none; -2..2 */
    uint64_t seed;          /* the i-th output token draws philox_unit(seed, i) */
    int32_t n_logprobs;     /* -1 = none; else of the chosen token and of n best, <= 20 */
    int32_t n_bias;         /* <= LOGIT_BIAS_MAX */
    const logit_bias *bias; /* [n_bias] by ascending token; owner keeps it like the prompt */
    int32_t min_tokens;     /* none of the first so many output tokens is barred */
    /* The stop tokens, and the model's end tokens if they end a request: engine_submit sees to
     * it. */
    struct {
        const int32_t *token;
        int32_t n;
    } barred[2];
} sampling;

#define SAMPLING_GREEDY ((sampling){.top_p = 1, .repetition_penalty = 1, .n_logprobs = -1})

/* What the sampler says of one row. Log-probabilities are of the raw logits (before all of the
 * above), as vLLM has it. */
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
    bool score_prompt; /* log-probabilities of the prompt's tokens, too: sampling.n_logprobs */
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
