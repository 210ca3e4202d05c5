/* workload.h - requests to serve: generated from a seed, or read from a trace of real traffic.
 *
 * Four independent random streams (lengths, arrivals, contents, sampling), so that each can be
 * varied on its own. Rates are exact: gaps are rescaled so that the last arrival falls on n /
 * rate. */
#ifndef AMALGAM_WORKLOAD_H
#define AMALGAM_WORKLOAD_H
#include "dataset.h"
#include "request.h"

typedef enum { LENGTH_FIXED, LENGTH_UNIFORM, LENGTH_LOGNORMAL } length_kind;

/* Tokens of a prompt or an output. FIXED: a. UNIFORM: a..b inclusive. LOGNORMAL: exp(N(a, b^2)),
 * rounded. Always clamped to [min, max]. */
typedef struct {
    length_kind kind;
    double a, b;
    int32_t min, max;
} length_law;

typedef enum {
    ARRIVE_AT_ONCE,
    ARRIVE_POISSON, /* exponential gaps */
    ARRIVE_GAMMA,   /* burstiness b: gamma gaps of shape b, coefficient of variation 1 / sqrt(b) */
    ARRIVE_CONSTANT,
    ARRIVE_TRACE, /* time stamps of the file, divided by `speed` */
    ARRIVE_CLOSED /* `users` of them, each sends its next request when the last one finished */
} arrival_kind;

typedef struct {
    char name[64];      /* in records: "sharegpt", "fixed_1024_128", … */
    char file[512];     /* "" = generated */
    char format[16];    /* of the file: sharegpt, burstgpt, azure, mooncake, jsonl (dataset.h) */
    char model[32];     /* burstgpt: only rows of this model; "" = all */
    int32_t ctx_limit;  /* of a file: leave out requests of more prompt + output tokens; 0 = none */
    int32_t n_requests; /* of a file: at most so many; 0 = all */
    length_law prompt, output; /* generated workloads only */
    int32_t shared_prefix,     /* the first so many tokens of a prompt are */
        n_prefixes;            /*   one of n common prefixes (not where a file has contents) */
    arrival_kind arrival;
    double rate_per_s, burstiness, speed;
    int32_t users;
    uint64_t seed;
    int32_t vocab;     /* ids are drawn uniformly from [0, vocab) */
    bool salted;       /* every request its own prefix-cache namespace */
    sampling sampling; /* seed: replaced by one of the sampling stream for each request */
    bool ignore_eos;
    text_encoder encoder; /* text of a file; without one its lengths are estimated */
} workload_options;

typedef struct {
    workload_options options;
    request *request; /* [n], by arrival; closed loop: by user, then order */
    int32_t n;
    int64_t prompt_tokens, output_tokens; /* sums; outputs are max_new */
    int32_t ctx_max;                      /* largest n_prompt + max_new */
    int64_t n_dropped; /* rows of the file that its rules or ctx_limit left out */
    bool estimated;    /* lengths are bytes / 4: options.name then ends in "_estimated" */
} workload;

/* Presets shaped after published statistics (workloads/SOURCES.md): "sharegpt", "reasoning",
 * "longdoc", "fixed"; NOTFOUND lists them. */
status workload_preset(workload_options *out, const char *name);

/* Make it, in `a`; a refusal leaves the arena as it was. NOMEM; RANGE for senseless options; for
 * files IO, or FORMAT and RANGE with file:line. */
status workload_make(workload *out, arena *a, const workload_options *o);
#endif
