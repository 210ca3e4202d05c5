/* sched.h - continuous batching as a pure state machine.
 *
 * Time comes in as an argument, the batch goes out, and sched_commit is the only way back. It knows
 * no device, no clock and no meaning of tokens, so the same code runs under cuda, cpu, sim and
 * null, and a recorded trace replays to identical batches.
 *
 * A batch may be picked before the one before it is committed, so that a device always has work:
 * then each sequence of the first is taken to go on. Its next token is fed by the number of its
 * sample (batch.h); what turns out to have ended is computed once more, for nobody.
 *
 * One step (chunked prefill on): every running decode gets its token first; what is left of the
 * token budget goes to prefills in order of arrival, the last one cut to fit; then waiting requests
 * are admitted while budget, slots and pages allow (first come, first served: the first that does
 * not fit stops admission). Order is by (arrival_ns, id) throughout. Admission takes the pages of
 * all tokens known by then, so that only decodes can run out of pages. When one does, the latest
 * arrival among the running is preempted: its pages are released and it goes back to its place in
 * the queue (the head, unless somebody with an earlier arrival was added late) to be recomputed
 * (prompt and output so far), and nothing is admitted in that step. The earliest arrival is never
 * preempted, so every run makes progress.
 *
 * A sequence with one token left to compute counts as a decode, however it came there.
 *
 * A request with score_prompt has a sample for every row of its prompt but the last, once, before
 * it draws. As many rows are sampled in a step as sequences may run: prompts are cut to that, and a
 * prefix from the cache is not taken before it has been scored. */
#ifndef AMALGAM_SCHED_H
#define AMALGAM_SCHED_H
#include "batch.h"
#include "kvpool.h"

typedef struct {
    int32_t token_budget; /* tokens of a step at most (8192); also bounds running sequences */
    int32_t max_seqs;     /* running sequences at most (256) */
    int32_t max_queue;    /* waiting requests at most; further ones are refused; 0 = no limit */
    /* Off: a prompt is computed whole, in a step without decodes, before them. Only a recomputation
     * that has outgrown the budget is still cut, into steps of its own. */
    bool chunked_prefill;
    bool prefix_cache;
    /* Baseline: a batch is filled once, with as many waiting requests as slots and pages allow
     * (computing their prompts may take several steps), and runs until its last request ends. */
    bool static_batching;
} sched_policy;

#define SCHED_POLICY_DEFAULT                                                                       \
    ((sched_policy){                                                                               \
        .token_budget = 8192, .max_seqs = 256, .chunked_prefill = true, .prefix_cache = true})

typedef struct {
    int32_t n_pages; /* of the KV pool */
    int32_t ctx_max; /* prompt + output of one request at most */
    /* Alive = waiting, running, or finished and not yet taken. Whatever set of requests stays
     * within these limits fits: token storage does not fragment. */
    int32_t n_requests; /* alive at a time at most */
    int64_t n_tokens;   /* n_prompt + max_new of all that are alive, at most */
} sched_limits;

typedef struct sched sched;

/* Memory a scheduler needs for these limits (address space: far less is touched); SIZE_MAX when
 * they are senseless. sched_open takes all of it from `a`, now: RANGE names the senseless limit,
 * NOMEM leaves `a` as it was. */
size_t sched_bytes(const sched_policy *p, const sched_limits *l);
status sched_open(sched **out, arena *a, const sched_policy *p, const sched_limits *l);

/* Hand over a request at time `now_ns`; the prompt and all parameters but the stop lists are
 * copied. Refused, with the reason recorded and status
 *   RANGE   it can never fit: longer than ctx_max, than the pool, or (chunking off) than the
 *           budget; or it has no prompt or no output
 *   OOM     the queue or the token storage is full now (back-pressure; try later)
 *   USAGE   a request of this id is alive
 * A refusal changes nothing. Allowed between pick and commit, too. */
status sched_add(sched *s, const request *r, int64_t now_ns);

/* The next batch, or false when there is nothing to run (ahead of a commit: nothing yet). The batch
 * stays valid until sched_commit; picking three times without a commit is a programmer error. */
bool sched_pick(sched *s, int64_t now_ns, batch *out);

/* The step is done at now_ns: token[i] was drawn for b->sample[i], unless that was given, and
 * stop[i] says that it ends its request (an end token, a stop string); stop == NULL: none does.
 * max_new is the scheduler's own business. In the order of the picks. What was drawn for a request
 * that has ended is passed over. */
void sched_commit(sched *s, const batch *b, const int32_t *token, const bool *stop, int64_t now_ns);

/* The request of sequence `seq` of a batch that is not committed; NULL when it has ended since. */
const request *sched_request(const sched *s, const batch *b, int32_t seq);

/* Take a request out of queue or batch: its pages go back and it finishes with CANCEL. NOTFOUND
 * when it is neither waiting nor running. */
status sched_cancel(sched *s, int64_t id, int64_t now_ns);

/* The oldest finished request not yet taken, or false. token: prompt then output [n_prompt +
 * n_output]; both it and log->token_ns are valid until the next sched_add. */
bool sched_take_finished(sched *s, request_log *log, const int32_t **token);

/* Requests that are taken at once when there are no others. */
int32_t sched_holds(const sched *s);
int32_t sched_waiting(const sched *s);
int32_t sched_running(const sched *s);
int64_t sched_preemptions(const sched *s);
int32_t sched_alive(const sched *s); /* waiting, running, finished and not yet taken */
const kvpool *sched_pool(const sched *s);
/* Forget the prefix cache (between points). */
void sched_flush_cache(sched *s);

/* NULL or the first broken invariant, for tests. */
const char *sched_problem(const sched *s);
#endif
