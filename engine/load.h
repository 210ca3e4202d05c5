/* load.h - a load generator for OpenAI-compatible servers: requests go out when the workload says
 * so, whatever the server does (open loop), and every event of every stream is timed on arrival.
 *
 * One thread, libcurl's multi interface over epoll. It measures itself: the lag of a request is
 * how long after it could have gone out it did go out; a run whose p99 lag passes 1 ms or 1 % of
 * the mean gap between arrivals says more about us than about the server and is marked invalid.
 *
 * Logs have the client's instants: dispatch is before the request is handed to libcurl,
 * first_token and token_ns are arrivals of events with a non-empty `choices`, finish is the last
 * of them (the closing usage and [DONE] move nothing), admit is the dispatch. Where a server puts
 * several tokens into an event (usage tells), the gap before it is divided among them. */
#ifndef AMALGAM_LOAD_H
#define AMALGAM_LOAD_H
#include "tokenizer.h"
#include "workload.h"

#include <signal.h>

typedef struct {
    const char *url;         /* "http://127.0.0.1:8000": no path, but "/v1" or slashes
                                may end it */
    const char *path;        /* NULL = "/v1/completions"; with "/chat/" prompts go as a user's
                                message, which needs tok */
    const char *model;       /* NULL = the first of /v1/models */
    const char *api_key;     /* NULL = none */
    const tokenizer *tok;    /* prompts are sent as text of this tokenizer; NULL: as token ids */
    int32_t max_concurrency; /* requests in flight; 0 = no limit. Waiting for a place is no lag */
    double timeout_s;        /* of a request; 0 = none */
    const volatile sig_atomic_t *stop; /* once it is not 0 nothing more is sent, and what is in
                                          flight is given up; NULL = never */
} load_options;

enum { LOAD_NAME_MAX = 1024 }; /* of a model: may be the path of a folder */

typedef struct {
    char model[LOAD_NAME_MAX];
    int64_t n_failed, n_events;
    char failure[256]; /* of the first that failed; "" */
    double lag_p50_s, lag_p99_s, lag_max_s, gap_mean_s;
    bool valid;
    double duration_s; /* first dispatch to the last end */
    int32_t n_logged;  /* requests that were sent: entries of the log */
    bool interrupted;  /* by o->stop, before all had ended */
} load_report;

/* The served model and its vocabulary (0 when the server does not say). IO, FORMAT. */
status load_ask_model(char *name, size_t n, int32_t *vocab, const load_options *o);

/* Run the workload against the server; log[w->n], its token_ns in `a`. Failed requests are logged
 * as refused, those given up as cancelled; those never sent leave no entry, and the others close
 * the gap, in the workload's order. IO when no connection can be made at all; NOMEM. */
status load_run(load_report *out, arena *a, const load_options *o, const workload *w,
                request_log *log);

/* The verdict on lag: see above. gap_mean_s 0 = all at once. */
bool load_valid(double lag_p99_s, double gap_mean_s);
#endif
