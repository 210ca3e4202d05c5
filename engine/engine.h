/* engine.h - one model on one device under one scheduler: the loop that every run goes through. */
#ifndef AMALGAM_ENGINE_H
#define AMALGAM_ENGINE_H
#include "capacity.h"
#include "device.h"
#include "forward.h"
#include "metrics.h"
#include "sched.h"
#include "timeline.h"
#include "workload.h"

/* What a run is; everything here that changes results is part of the natural key of its row. */
typedef struct {
    const char *model; /* folder with config.json, or a name under workloads/models */
    bool synthetic;    /* weights from weights_seed instead of the folder's files */
    uint64_t weights_seed;
    const char
        *precision;     /* "W4A16KV8"; "auto", "autoA16KV8": weights as the checkpoint has them */
    const char *device; /* "cpu", "sim", "null" */
    device_options device_options;
    double memory_fraction; /* of the device memory that may be used (0.9) */
    sched_policy policy;
    int32_t ctx_max;      /* prompt + output of a request at most; 0 = the model's limit */
    int32_t max_requests; /* alive at a time (waiting and running) */
    int64_t max_tokens;   /* prompt + output tokens of all of them */
    int32_t pages;        /* KV pages; 0 = as many as fit (unlimited devices: as max_seqs * ctx_max
                                needs, at most 16384) */
    int32_t max_samples;  /* rows of logits of a step; 0 = max_seqs (evaluation wants every row) */
    const char *trace;    /* file to record the scheduler to; NULL = none */
} engine_options;

#define ENGINE_OPTIONS_DEFAULT                                                                     \
    ((engine_options){.precision = "W16A16KV16",                                                   \
                      .device = "cpu",                                                             \
                      .device_options = {.tp = 1},                                                 \
                      .memory_fraction = 0.9,                                                      \
                      .policy = SCHED_POLICY_DEFAULT,                                              \
                      .max_requests = 1024,                                                        \
                      .max_tokens = 1 << 22})

typedef struct engine engine;

/* Load and set up everything. OOM with the terms when it does not fit; UNSUPPORTED with the reason
 * when the device cannot run this precision. `progress` may be NULL. */
status engine_open(engine **out, const engine_options *o,
                   void (*progress)(void *user, int64_t done, int64_t total), void *user);
void engine_close(engine *e); /* NULL is fine */

/* Called by the loop. token: a token of `id` was drawn, one that ends the request or not; return
 * true to end it here all the same (a stop string). scored: log-probabilities of prompt[at], where
 * the request has score_prompt: once for each `at` from 1 on, ascending, before the first token.
 * finished: instants, and all tokens (prompt, then output). */
typedef struct {
    void *user;
    bool (*token)(void *user, int64_t id, const sampled *s, bool ends, int64_t now_ns);
    void (*scored)(void *user, int64_t id, int32_t at, const sampled *s);
    void (*finished)(void *user, const request_log *log, const int32_t *token);
} engine_hooks;

/* Without a token hook a request ends at the model's end tokens (unless ignore_eos), at its stop
 * tokens and at max_new. With one, the hook is asked besides. */
void engine_set_hooks(engine *e, const engine_hooks *h);

/* Hand over a request now (sched_add has the refusals). The prompt stays the caller's. */
status engine_submit(engine *e, const request *r);
status engine_cancel(engine *e, int64_t id);

/* Finish one step, if there is anything to run; *ran says so. On a device that can, the next step
 * is launched before the tokens of this one are waited for, so that hooks, results, arrivals and
 * the making of batches all happen while the device works. Then a request that ends by a token or
 * by its hook is computed once more, for nobody. */
status engine_step(engine *e, bool *ran);
/* Finish what is launched, before the device is used past the engine. */
status engine_settle(engine *e);

/* One request alone: submit it and step until it is over. */
status engine_answer(engine *e, const request *r, request_log *log);

/* Serve a whole workload from its first arrival to its last finish, on the device's timeline. Fills
 * log[w->n] (by request index; token_ns lies in `a`). Hooks of the caller stay in force. A request
 * that is refused is logged as such, and the run goes on. */
status engine_serve(engine *e, arena *a, const workload *w, request_log *log);

/* Before the first run, where a server or a benchmark is to be at its speed from the first request
 * on: run what a device finds cold (device_ops.padded_rows), each kernel's first launch and each
 * graph's capture. Decode steps of every padded number of sequences, and chunks of 16, 32, 64, ...
 * tokens up to the budget. Then engine_reset. Some dozens of short steps; nothing where no device
 * is cold. */
status engine_warm(engine *e);

/* Before an independent run on the same engine: drop the prefix cache, restart the clock. */
status engine_reset(engine *e);

typedef struct {
    int64_t n_steps, n_decode_steps; /* all; those without any prefill token */
    int64_t tokens_fed, tokens_sampled;
    int64_t host_ns;    /* real time neither in forward nor waiting for arrivals: our own overhead,
                           of which a device that runs ahead hides what it can */
    int64_t forward_ns; /* real time inside it: launching, and waiting for tokens */
    int64_t busy_ns;    /* timeline spent in steps; where two overlap it counts once */
    int32_t pages_peak; /* held at a time at most */
    double batch_mean;  /* sequences per step */
} engine_stats;

const model_config *engine_config(const engine *e);
const precision *engine_precision(const engine *e);
const capacity *engine_capacity(const engine *e);
/* Prompt and output of a request at most: the option, the model's limit, or what the KV cache
 * holds. */
int32_t engine_ctx_max(const engine *e);
const engine_stats *engine_statistics(const engine *e);
sched *engine_sched(engine *e);
uint64_t engine_digest(const engine *e); /* of the checkpoint; 0 = synthetic */
int64_t engine_now_ns(const engine *e);
forward *engine_forward(engine *e);
device *engine_device(engine *e);
int32_t engine_token_budget(const engine *e); /* tokens of a step at most */
#endif
