/* sched.h - continuous batching as a pure state machine.
 *
 * Time comes in as an argument, the batch goes out, and sched_commit is the only way back. It knows no
 * device, no clock and no meaning of tokens, so the same code runs under cuda, cpu, sim and null, and a
 * recorded trace replays to identical batches.
 *
 * One step (chunked prefill on): every running decode gets its token first; what is left of the token
 * budget goes to prefills in order of arrival, the last one cut to fit; then waiting requests are
 * admitted while budget, slots and pages allow (first come, first served: the first that does not fit
 * stops admission). When a decode finds no page, the latest arrival among the running is preempted: its
 * pages are released and it goes back to the head of the queue to be recomputed (prompt and output so
 * far). The earliest arrival is never preempted, so every run makes progress. */
#ifndef AMALGAM_SCHED_H
#define AMALGAM_SCHED_H
#include "batch.h"
#include "kvpool.h"

typedef struct {
    int32_t
        token_budget;  /* tokens of a step at most (8192); decodes alone may not exceed it either */
    int32_t max_seqs;  /* running sequences at most (256) */
    int32_t max_queue; /* waiting requests at most; further ones are refused; 0 = no limit */
    bool
        chunked_prefill; /* off: a prompt is computed whole, in a step without decodes, before them */
    bool prefix_cache;
    bool
        static_batching; /* baseline: a batch is filled once and runs until its last request ends */
} sched_policy;

#define SCHED_POLICY_DEFAULT                                                                       \
    ((sched_policy){                                                                               \
        .token_budget = 8192, .max_seqs = 256, .chunked_prefill = true, .prefix_cache = true})

typedef struct {
    int32_t n_pages;    /* of the KV pool */
    int32_t ctx_max;    /* prompt + output of one request at most */
    int32_t n_requests; /* requests alive at a time at most: sizes the tables (waiting + running) */
    int64_t
        n_tokens; /* prompt + output tokens of all requests alive at a time: sizes token storage */
} sched_limits;

typedef struct sched sched;

/* Memory a scheduler needs for these limits; then all of it comes from `a`, now. */
size_t sched_bytes(const sched_policy *p, const sched_limits *l);
status sched_open(sched **out, arena *a, const sched_policy *p, const sched_limits *l);

/* Hand over a request at time `now_ns`. Refused, with the reason recorded and status
 *   RANGE   it can never fit: longer than ctx_max, than the pool, or (chunking off) than the budget
 *   OOM     the queue or the token storage is full now (back-pressure; try later)
 * A refusal changes nothing. The id must be unique among those alive. */
status sched_add(sched *s, const request *r, int64_t now_ns);

/* The next batch, or false when there is nothing to run. The batch stays valid until sched_commit;
 * picking twice without a commit is a programmer error. */
bool sched_pick(sched *s, int64_t now_ns, batch *out);

/* The step is done at now_ns: token[i] was drawn for b->sample[i], and stop[i] says that it ends its
 * request (an end token, a stop string). max_new is the scheduler's own business. */
void sched_commit(sched *s, const batch *b, const int32_t *token, const bool *stop, int64_t now_ns);

/* The request of sequence `seq` of the batch picked last, until it is committed. */
const request *sched_request(const sched *s, const batch *b, int32_t seq);

/* Take a request out wherever it is, between steps: pages go back. NOTFOUND when it is not alive. */
status sched_cancel(sched *s, int64_t id, int64_t now_ns);

/* The oldest finished request not yet taken, or false. token: prompt then output [n_prompt +
 * n_output]; both it and log->token_ns are valid until the next sched_add. */
bool sched_take_finished(sched *s, request_log *log, const int32_t **token);

int32_t sched_waiting(const sched *s);
int32_t sched_running(const sched *s);
int64_t sched_preemptions(const sched *s);
const kvpool *sched_pool(const sched *s);
/* Forget the prefix cache (between points). */
void sched_flush_cache(sched *s);

/* NULL or the first broken invariant, for tests. */
const char *sched_problem(const sched *s);
#endif
