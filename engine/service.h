/* service.h - requests from many threads onto one engine.
 *
 *     any thread:   service_submit ──inbox──▶  engine thread: submit, step, take finished
 *                   wake() ◀── tokens under the job's lock ──┘
 *
 * The engine thread never waits for a client: it appends tokens to the job, whose memory is
 * bounded by its own max_new, and calls wake once a step for those who wait. All that a client
 * can do to the engine is submit and cancel. */
#ifndef AMALGAM_SERVICE_H
#define AMALGAM_SERVICE_H
#include "api.h"
#include "engine.h"
#include "output.h"

#include <pthread.h>
#include <stdatomic.h>

/* One token of a choice, as it was seen. */
typedef struct {
    int32_t id;
    float logprob;
    size_t text_end;   /* bytes of the choice's text that can be shown after it */
    int32_t chars_end; /* the same in characters, which clients count */
} job_token;

/* One of the answers of a job. What the engine thread has published: n_ready tokens, and finish.
 * Where they are asked for, the prompt's tokens come first, and are there from the beginning. */
typedef struct job_choice {
    struct job *job;
    int32_t index;
    output out; /* out.text: the text so far */
    job_token *token;
    int32_t *top_id;    /* [n_ready * api_tops], -1 where there were fewer */
    float *top_logprob; /* the same */
    int32_t n_given;    /* of the prompt: all or 0; the first has no log-probability */
    int32_t n_tokens, n_ready, size;
    size_t text_end;      /* of all that can be shown */
    int32_t chars_end;    /* the same in characters */
    finish_reason finish; /* NONE while it runs; shown with the last tokens, never before them */
    finish_reason ending; /* engine thread: the finish to be published */
    int32_t n_prompt, n_cached;
    int64_t id;                 /* the engine's, -1 = not handed over */
    struct job_choice *touched; /* engine thread: next of those with new tokens in this step */
    bool is_touched;
} job_choice;

typedef struct job {
    pthread_mutex_t lock; /* of everything below but refs, next and since_ns */
    atomic_int refs;
    struct job *next; /* inbox */
    int64_t since_ns; /* handed over, by the service's clock */
    api_request request;
    int32_t n_choices, n_finished;
    int32_t n_touched; /* engine thread: of its choices */
    job_choice *choice;
    bool accepted; /* by the scheduler: all choices are in */
    bool done;     /* nothing more will happen */
    status st;     /* why it failed; OK otherwise */
    char why[256];
    bool waiting; /* wake(user) is wanted, once */
    void (*wake)(void *user);
    void *user;
    atomic_bool cancelled;
} job;

typedef struct service service;

/* Take over a started engine and run it on its own thread. `tok` may be NULL (api.h). */
status service_open(service **out, engine *e, const tokenizer *tok, int32_t max_requests);
/* Stop taking jobs, wait up to grace_s for those alive, cancel the rest with a reason; then
 * nothing is alive any more. Idempotent; service_close does it with no grace. */
void service_drain(service *s, double grace_s);
void service_close(service *s); /* NULL is fine; the engine stays the caller's */

/* A job of `asked`, which is taken over also on failure. wake is called with the job's lock held.
 */
status job_new(job **out, api_request *asked, const tokenizer *tok, void (*wake)(void *user),
               void *user);
void job_release(job *j); /* NULL is fine */

/* Hand over; the service keeps its own reference until the job is done. Draining: the job is done
 * at once with INTERRUPTED. */
void service_submit(service *s, job *j);
/* Its client is gone: pages are freed at the next step. */
void service_cancel(service *s, job *j);
/* Forget the prefix cache before anything that is submitted after this call. */
void service_flush_cache(service *s);

bool service_healthy(const service *s); /* false when draining or after a failure of the engine */
int32_t service_alive(service *s);      /* jobs not done */
/* Append the numbers in Prometheus' text format. */
void service_metrics(service *s, const char *model, text *out);
#endif
