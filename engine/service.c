/* service.c - see service.h. */
#include "service.h"

#include <string.h>
#include <time.h>

/* Edges of the histograms: vLLM's for whole requests and for tokens, so that dashboards fit. */
static const double seconds_edges[] = {0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1,
                                       0.25,  0.5,   0.75, 1,    2.5,  5,    7.5,  10,
                                       20,    40,    80,   160,  640,  2560};
static const double count_edges[] = {1,   2,    5,    10,   20,    50,    100,   200,
                                     500, 1000, 2000, 5000, 10000, 20000, 50000, 100000};
enum { EDGES_MAX = COUNT_OF(seconds_edges) };
_Static_assert((int)COUNT_OF(count_edges) <= (int)EDGES_MAX, "a histogram has room for either");

typedef struct {
    const char *name, *help;
    bool seconds; /* else counts */
} histogram_row;

/* ORDER histograms */
enum {
    H_TTFT,
    H_ITL,
    H_E2E,
    H_QUEUE,
    H_INFERENCE,
    H_PREFILL,
    H_DECODE,
    H_PROMPT,
    H_GENERATION,
    H_ITERATION,
    H_COUNT
};
static const histogram_row histogram_rows[H_COUNT] = {
    {"vllm:time_to_first_token_seconds", "Hand-over to the first token.", true},
    {"vllm:inter_token_latency_seconds", "Gaps between tokens of a request.", true},
    {"vllm:e2e_request_latency_seconds", "Hand-over to the last token.", true},
    {"vllm:request_queue_time_seconds", "Hand-over to the first step.", true},
    {"vllm:request_inference_time_seconds", "First step to the last token.", true},
    {"vllm:request_prefill_time_seconds", "First step to the first token.", true},
    {"vllm:request_decode_time_seconds", "First to last token.", true},
    {"vllm:request_prompt_tokens", "Prompt tokens of a request.", false},
    {"vllm:request_generation_tokens", "Output tokens of a request.", false},
    {"vllm:iteration_tokens_total", "Tokens fed in a step.", false},
};

typedef struct {
    int64_t bucket[EDGES_MAX + 1], n;
    double sum;
} histogram;

/* What /metrics shows; written by the engine thread, once a step and once a request. */
typedef struct {
    int32_t running, waiting;
    double kv_used;
    int64_t cache_queries, cache_hits, preemptions, prompt_tokens, generation_tokens, steps;
    int64_t finished[FINISH_REFUSED + 1];
    int32_t pages, pages_held;
    histogram h[H_COUNT];
} numbers;

struct service {
    engine *engine;
    const tokenizer *tok;
    pthread_t thread;
    bool started;
    timeline clock; /* real, also where the engine's is virtual */

    pthread_mutex_t lock; /* of the inbox, the flags and the numbers */
    pthread_cond_t work, idle;
    job *first, *last;
    bool draining, quit, failed, flush, cancels;
    int32_t n_alive;
    numbers numbers;

    /* engine thread only */
    job_choice **slot; /* [max_requests] choices alive in the scheduler; ids are slot + k * max */
    int32_t *free_slot, n_free, max_requests;
    int64_t round; /* so that an id does not come back */
    job_choice *touched;
    int64_t prompt_tokens, generation_tokens; /* of requests that have begun to answer; all */
    bool quitting;                            /* what is cancelled now is cancelled by us */
};

/* --- Tokens ----------------------------------------------------------------------------------- */

static status grow(job_choice *c) {
    const int32_t n_top = api_tops(&c->job->request);
    if (c->n_tokens < c->size) return ST_OK;
    const size_t size = c->size ? (size_t)c->size * 2 : 32;
    job_token *token = mem_resize(c->token, size, sizeof *token);
    if (!token) return FAIL(ST_NOMEM, "tokens of a request");
    c->token = token;
    if (n_top > 0) {
        int32_t *id = mem_resize(c->top_id, size * (size_t)n_top, sizeof *id);
        if (id) c->top_id = id;
        float *logprob = mem_resize(c->top_logprob, size * (size_t)n_top, sizeof *logprob);
        if (logprob) c->top_logprob = logprob;
        if (!id || !logprob) return FAIL(ST_NOMEM, "tokens of a request");
    }
    c->size = (int32_t)size;
    return ST_OK;
}

static void set_logprobs(job_choice *c, int32_t at, const sampled *t) {
    const int32_t n_top = api_tops(&c->job->request);
    c->token[at].logprob = t->logprob;
    for (int32_t i = 0; i < n_top; i++) {
        const size_t k = (size_t)at * (size_t)n_top + (size_t)i;
        c->top_id[k] = i < t->n_top ? t->top_token[i] : -1;
        c->top_logprob[k] = i < t->n_top ? t->top_logprob[i] : 0;
    }
}

/* With the text as it is. */
static status add_token(job_choice *c, const sampled *t) {
    TRY(grow(c));
    c->token[c->n_tokens] =
        (job_token){.id = t->token, .chars_end = c->chars_end, .text_end = c->text_end};
    set_logprobs(c, c->n_tokens, t);
    c->n_tokens++;
    return ST_OK;
}

static status push_token(const tokenizer *tok, job_choice *c, const sampled *t, bool ends,
                         bool *stopped) {
    if (tok) {
        size_t n;
        TRY(output_push(&c->out, t->token, ends, stopped));
        const char *shown = output_take(&c->out, &n);
        c->text_end += n;
        for (size_t i = 0; i < n; i++) c->chars_end += (shown[i] & 0xC0) != 0x80;
    } else {
        text_add(&c->out.text, " %d", t->token);
        TRY(text_status(&c->out.text));
        c->text_end = c->out.text.length;
        c->chars_end = (int32_t)c->text_end;
    }
    return add_token(c, t);
}

/* --- Jobs ------------------------------------------------------------------------------------- */

/* The prompt's tokens as the first ones of the answer, in its text when they are echoed; stop
 * strings are not looked for in them. */
static status give_prompt(job_choice *c, const tokenizer *tok) {
    const api_request *r = &c->job->request;
    const int32_t *prompt = r->prompt[c->index / r->n].data;
    bool stopped;
    if (r->echo) c->out.options.min_tokens += c->n_prompt;
    for (; c->n_given < c->n_prompt; c->n_given++) {
        const sampled t = {.token = prompt[c->n_given]};
        TRY(r->echo ? push_token(tok, c, &t, false, &stopped) : add_token(c, &t));
    }
    return ST_OK;
}

status job_new(job **out, api_request *asked, const tokenizer *tok, void (*wake)(void *user),
               void *user) {
    *out = NULL;
    const int32_t n = asked->n * asked->n_prompts;
    job *j = mem_alloc(1, sizeof *j);
    job_choice *choice = mem_alloc((size_t)n, sizeof *choice);
    if (!j || !choice) {
        mem_free(j);
        mem_free(choice);
        api_request_free(asked);
        return FAIL(ST_NOMEM, "request");
    }
    *j = (job){.request = *asked, .n_choices = n, .choice = choice, .wake = wake, .user = user};
    *asked = (api_request){0};
    atomic_init(&j->refs, 1);
    pthread_mutex_init(&j->lock, NULL);
    status st = ST_OK;
    for (int32_t i = 0; i < n; i++) {
        choice[i] = (job_choice){.job = j, .index = i, .id = -1};
        choice[i].n_prompt = (int32_t)j->request.prompt[i / j->request.n].length;
        if (tok)
            output_open(&choice[i].out, tok,
                        &(output_options){.stop = (const char *const *)j->request.stop,
                                          .n_stops = j->request.n_stops,
                                          .min_tokens = j->request.sampling.min_tokens,
                                          .keep_stop = j->request.keep_stop,
                                          .keep_special = j->request.keep_special,
                                          .continues = j->request.chat ? j->request.continues
                                                                       : !j->request.echo});
        if (st == ST_OK && api_holds_prompt(&j->request)) st = give_prompt(&choice[i], tok);
    }
    if (st != ST_OK) {
        job_release(j);
        return st;
    }
    *out = j;
    return ST_OK;
}

void job_release(job *j) {
    if (!j || atomic_fetch_sub(&j->refs, 1) != 1) return;
    for (int32_t i = 0; i < j->n_choices; i++) {
        job_choice *c = &j->choice[i];
        if (c->out.stream.t) output_close(&c->out);
        text_free(&c->out.text);
        mem_free(c->token);
        mem_free(c->top_id);
        mem_free(c->top_logprob);
    }
    mem_free(j->choice);
    api_request_free(&j->request);
    pthread_mutex_destroy(&j->lock);
    mem_free(j);
}

/* Call with the lock held. */
static void wake(job *j) {
    if (!j->waiting) return;
    j->waiting = false;
    j->wake(j->user);
}

/* Nothing more will happen to a job. */
static void tell_end(job *j, status st, const char *why) {
    pthread_mutex_lock(&j->lock);
    j->done = true;
    j->st = st;
    if (st != ST_OK) snprintf(j->why, sizeof j->why, "%s", why);
    wake(j);
    pthread_mutex_unlock(&j->lock);
    job_release(j);
}

/* The service is through with a job. It is not counted any more when its client hears of it, who
 * may ask for the numbers next. */
static void end_job(service *s, job *j, status st, const char *why) {
    pthread_mutex_lock(&s->lock);
    if (--s->n_alive == 0) pthread_cond_broadcast(&s->idle);
    pthread_mutex_unlock(&s->lock);
    tell_end(j, st, why);
}

/* --- News of the engine ----------------------------------------------------------------------- */

static void touch(service *s, job_choice *c) {
    if (c->is_touched) return;
    c->is_touched = true;
    c->job->n_touched++;
    c->touched = s->touched;
    s->touched = c;
}

static bool on_token(void *user, int64_t id, const sampled *t, bool ends, int64_t now_ns) {
    (void)now_ns;
    service *s = user;
    job_choice *c = s->slot[id % s->max_requests];
    bool stopped = false;
    if (c->n_tokens == c->n_given) s->prompt_tokens += c->n_prompt;
    touch(s, c);
    if (c->job->request.no_output) return false;
    s->generation_tokens++;
    pthread_mutex_lock(&c->job->lock);
    if (push_token(s->tok, c, t, ends, &stopped) != ST_OK)
        stopped = true; /* out of memory: ends short */
    pthread_mutex_unlock(&c->job->lock);
    return stopped;
}

static void on_scored(void *user, int64_t id, int32_t at, const sampled *t) {
    service *s = user;
    job_choice *c = s->slot[id % s->max_requests];
    pthread_mutex_lock(&c->job->lock);
    set_logprobs(c, at, t);
    pthread_mutex_unlock(&c->job->lock);
}

/* --- Numbers ---------------------------------------------------------------------------------- */

static void observe(histogram *h, bool seconds, double v) {
    const double *edge = seconds ? seconds_edges : count_edges;
    const int32_t n = seconds ? COUNT_OF(seconds_edges) : COUNT_OF(count_edges);
    int32_t i = 0;
    while (i < n && v > edge[i]) i++;
    h->bucket[i]++;
    h->n++;
    h->sum += v;
}

static void count_finished(service *s, const request_log *log) {
    numbers *m = &s->numbers;
    pthread_mutex_lock(&s->lock);
    m->finished[log->finish]++;
    const bool ran = log->first_token_ns >= 0 && log->admit_ns >= 0;
    if (ran) {
        const double start = (double)log->arrival_ns, admit = (double)log->admit_ns,
                     first = (double)log->first_token_ns, last = (double)log->finish_ns;
        const double seconds[] = {
            [H_TTFT] = first - start,     [H_E2E] = last - start,      [H_QUEUE] = admit - start,
            [H_INFERENCE] = last - admit, [H_PREFILL] = first - admit, [H_DECODE] = last - first};
        for (int32_t i = 0; i < COUNT_OF(seconds); i++)
            if (i != H_ITL) observe(&m->h[i], true, seconds[i] * 1e-9);
        for (int32_t i = 1; i < log->n_output; i++)
            observe(&m->h[H_ITL], true, (double)(log->token_ns[i] - log->token_ns[i - 1]) * 1e-9);
        observe(&m->h[H_PROMPT], false, log->n_prompt);
        observe(&m->h[H_GENERATION], false, log->n_output);
    }
    pthread_mutex_unlock(&s->lock);
}

static void count_step(service *s, bool ran, int64_t fed) {
    const sched *c = engine_sched(s->engine);
    const kvpool *p = sched_pool(c);
    numbers *m = &s->numbers;
    pthread_mutex_lock(&s->lock);
    m->running = sched_running(c);
    m->waiting = sched_waiting(c);
    m->pages = kvpool_pages(p);
    m->pages_held = kvpool_held(p);
    m->kv_used = (double)m->pages_held / (double)m->pages;
    m->cache_queries = kvpool_queries(p);
    m->cache_hits = kvpool_hits(p);
    m->preemptions = sched_preemptions(c);
    m->prompt_tokens = s->prompt_tokens;
    m->generation_tokens = s->generation_tokens;
    if (ran) {
        m->steps++;
        observe(&m->h[H_ITERATION], false, (double)fed);
    }
    pthread_mutex_unlock(&s->lock);
}

static void put_value(text *t, const char *name, const char *kind, const char *help,
                      const char *model, double v) {
    text_add(t, "# HELP %s %s\n# TYPE %s %s\n%s{model_name=\"%s\",engine=\"0\"} %.15g\n", name,
             help, name, kind, name, model, v);
}

static void put_histogram(text *t, const histogram_row *row, const histogram *h,
                          const char *model) {
    const double *edge = row->seconds ? seconds_edges : count_edges;
    const int32_t n = row->seconds ? COUNT_OF(seconds_edges) : COUNT_OF(count_edges);
    text_add(t, "# HELP %s %s\n# TYPE %s histogram\n", row->name, row->help, row->name);
    int64_t sum = 0;
    for (int32_t i = 0; i < n; i++) {
        sum += h->bucket[i];
        text_add(t, "%s_bucket{model_name=\"%s\",engine=\"0\",le=\"%g\"} %lld\n", row->name, model,
                 edge[i], (long long)sum);
    }
    text_add(t, "%s_bucket{model_name=\"%s\",engine=\"0\",le=\"+Inf\"} %lld\n", row->name, model,
             (long long)h->n);
    text_add(t, "%s_sum{model_name=\"%s\",engine=\"0\"} %.9g\n", row->name, model, h->sum);
    text_add(t, "%s_count{model_name=\"%s\",engine=\"0\"} %lld\n", row->name, model,
             (long long)h->n);
}

/* A label's value: backslash, quote and newline are escaped. */
static void put_label(text *t, const char *s) {
    for (; *s; s++) {
        if (*s == '\\' || *s == '"' || *s == '\n') text_bytes(t, "\\", 1);
        text_bytes(t, *s == '\n' ? "n" : s, 1);
    }
}

void service_metrics(service *s, const char *name, text *out) {
    pthread_mutex_lock(&s->lock);
    const numbers m = s->numbers;
    const int32_t inbox = s->n_alive;
    pthread_mutex_unlock(&s->lock);
    text label = {0};
    put_label(&label, name);
    const char *model = label.data ? label.data : "";
    const struct {
        const char *name, *kind, *help;
        double value;
    } rows[] = {
        {"vllm:num_requests_running", "gauge", "Sequences that run.", m.running},
        {"vllm:num_requests_waiting", "gauge", "Sequences that wait.", m.waiting},
        {"vllm:kv_cache_usage_perc", "gauge", "Pages in use, 1 = all.", m.kv_used},
        {"vllm:prefix_cache_queries_total", "counter", "Prompt tokens looked up.",
         (double)m.cache_queries},
        {"vllm:prefix_cache_hits_total", "counter", "Prompt tokens found.", (double)m.cache_hits},
        {"vllm:num_preemptions_total", "counter", "Sequences put back.", (double)m.preemptions},
        {"vllm:prompt_tokens_total", "counter", "Prompt tokens, counted at the first output.",
         (double)m.prompt_tokens},
        {"vllm:generation_tokens_total", "counter", "Output tokens.", (double)m.generation_tokens},
        {"amalgam:kv_pages", "gauge", "Pages of the KV pool.", m.pages},
        {"amalgam:kv_pages_held", "gauge", "Pages that sequences hold.", m.pages_held},
        {"amalgam:jobs", "gauge", "HTTP requests in the engine's hands.", inbox},
        {"amalgam:steps_total", "counter", "Steps run.", (double)m.steps},
    };
    for (int32_t i = 0; i < COUNT_OF(rows); i++)
        put_value(out, rows[i].name, rows[i].kind, rows[i].help, model, rows[i].value);
    text_add(out, "# HELP vllm:request_success_total Requests that ended.\n"
                  "# TYPE vllm:request_success_total counter\n");
    static const char *const reasons[] = {
        [FINISH_STOP] = "stop", [FINISH_LENGTH] = "length", [FINISH_CANCEL] = "abort"};
    for (int32_t i = FINISH_STOP; i <= FINISH_CANCEL; i++)
        text_add(out,
                 "vllm:request_success_total{model_name=\"%s\",engine=\"0\","
                 "finished_reason=\"%s\"} %lld\n",
                 model, reasons[i], (long long)m.finished[i]);
    for (int32_t i = 0; i < H_COUNT; i++) put_histogram(out, &histogram_rows[i], &m.h[i], model);
    text_free(&label);
}

/* --- The engine thread ------------------------------------------------------------------------ */

static status submit_choice(service *s, job_choice *c) {
    const api_request *r = &c->job->request;
    if (s->n_free == 0) return FAIL(ST_OOM, "the queue is full");
    const int32_t slot = s->free_slot[s->n_free - 1], prompt = c->index / r->n;
    /* It has waited in the inbox, for a step to end as a rule: that counts. */
    const int64_t waited_ns = timeline_now_ns(&s->clock) - c->job->since_ns;
    request q = {.id = s->round++ * s->max_requests + slot,
                 .arrival_ns = engine_now_ns(s->engine) - waited_ns,
                 .prompt = r->prompt[prompt].data,
                 .n_prompt = c->n_prompt,
                 .max_new = r->max_new[prompt],
                 .ignore_eos = r->ignore_eos || r->no_output,
                 .score_prompt = api_scores_prompt(r),
                 .sampling = r->sampling,
                 .stop_token = r->stop_token,
                 .n_stop_tokens = r->no_output ? 0 : r->n_stop_tokens,
                 .salt = r->salt,
                 .user = -1};
    q.sampling.seed += (uint64_t)c->index;
    TRY(engine_submit(s->engine, &q));
    s->n_free--;
    s->slot[slot] = c;
    c->id = q.id;
    return ST_OK;
}

static void cancel_choices(service *s, job *j) {
    for (int32_t i = 0; i < j->n_choices; i++)
        if (j->choice[i].id >= 0 && j->choice[i].ending == FINISH_NONE)
            (void)engine_cancel(s->engine, j->choice[i].id);
}

static void take_finished(service *s) {
    request_log log;
    const int32_t *token;
    while (sched_take_finished(engine_sched(s->engine), &log, &token)) {
        const int32_t slot = (int32_t)(log.id % s->max_requests);
        job_choice *c = s->slot[slot];
        s->slot[slot] = NULL;
        s->free_slot[s->n_free++] = slot;
        if (c->job->request.no_output) log.n_output = 0;
        count_finished(s, &log);
        pthread_mutex_lock(&c->job->lock);
        if (s->tok && output_finish(&c->out) == ST_OK) {
            size_t n;
            output_take(&c->out, &n);
            c->text_end += n;
        }
        c->n_cached = log.n_cached;
        pthread_mutex_unlock(&c->job->lock);
        c->ending = log.finish;
        touch(s, c);
    }
}

/* Show what the step made, and end the jobs whose last choice it finished. */
static void publish(service *s) {
    while (s->touched) {
        job_choice *c = s->touched;
        job *j = c->job;
        s->touched = c->touched;
        c->is_touched = false;
        j->n_touched--;
        pthread_mutex_lock(&j->lock);
        c->n_ready = c->n_tokens;
        if (c->finish == FINISH_NONE && c->ending != FINISH_NONE) j->n_finished++;
        c->finish = c->ending;
        /* Only the last of its choices in the list may end a job: the others point to it. */
        const bool ends = j->accepted && j->n_finished == j->n_choices && j->n_touched == 0;
        if (!ends && j->accepted && j->request.stream) wake(j); /* others want only the end */
        pthread_mutex_unlock(&j->lock);
        if (!ends) continue;
        const bool gone = atomic_load(&j->cancelled);
        if (s->quitting && !gone && c->finish == FINISH_CANCEL)
            end_job(s, j, ST_INTERRUPTED, "the server is shutting down");
        else
            end_job(s, j, ST_OK, "");
    }
}

static void accept_job(service *s, job *j) {
    status st = ST_OK;
    if (atomic_load(&j->cancelled)) {
        end_job(s, j, ST_INTERRUPTED, "the client went away");
        return;
    }
    const int32_t most = sched_holds(engine_sched(s->engine));
    if (j->n_choices > most) /* no 429: to come again would be in vain */
        st = FAIL(ST_RANGE, "%d answers in a request; this server takes %d", j->n_choices, most);
    for (int32_t i = 0; st == ST_OK && i < j->n_choices; i++) st = submit_choice(s, &j->choice[i]);
    if (st != ST_OK) {
        char why[256];
        snprintf(why, sizeof why, "%s", fail_message());
        cancel_choices(s, j); /* those that were taken */
        take_finished(s);
        publish(s);
        end_job(s, j, st, why);
        return;
    }
    pthread_mutex_lock(&j->lock);
    j->accepted = true;
    if (j->request.stream) wake(j);
    pthread_mutex_unlock(&j->lock);
}

static const char the_engine_has_failed[] = "the engine has failed";

/* Everything fails with the engine. */
static void fail_all(service *s, job *inbox, status st, const char *why) {
    for (int32_t i = 0; i < s->max_requests; i++) {
        job_choice *c = s->slot[i];
        if (!c) continue;
        job *j = c->job;
        for (int32_t k = i; k < s->max_requests; k++)
            if (s->slot[k] && s->slot[k]->job == j) s->slot[k] = NULL;
        end_job(s, j, st, why);
    }
    while (inbox) {
        job *j = inbox;
        inbox = j->next;
        end_job(s, j, st, why);
    }
}

static void cancel_marked(service *s, bool all) {
    for (int32_t i = 0; i < s->max_requests; i++)
        if (s->slot[i] && (all || atomic_load(&s->slot[i]->job->cancelled)))
            (void)engine_cancel(s->engine, s->slot[i]->id);
    take_finished(s);
    publish(s);
}

/* A virtual clock ran ahead by what a step would have cost: wait it out, so that clients see the
 * speed that was predicted. */
static void keep_pace(const service *s, int64_t from_ns, int64_t real_ns) {
    if (!engine_device(s->engine)->ops->virtual_time) return;
    timeline t = s->clock;
    timeline_wait_until_ns(&t, real_ns + engine_now_ns(s->engine) - from_ns);
}

/* What others want of the engine thread. */
typedef struct {
    job *inbox;
    bool cancels, flush, quit, failed;
} wishes;

/* Take what is there; while the engine is not busy, wait for something. */
static wishes take_wishes(service *s, bool busy) {
    pthread_mutex_lock(&s->lock);
    while (!busy && !s->first && !s->cancels && !s->flush && !s->quit)
        pthread_cond_wait(&s->work, &s->lock);
    const wishes w = {.inbox = s->first,
                      .cancels = s->cancels,
                      .flush = s->flush,
                      .quit = s->quit,
                      .failed = s->failed};
    s->first = s->last = NULL;
    s->cancels = s->flush = false;
    pthread_mutex_unlock(&s->lock);
    return w;
}

static void fail_engine(service *s, status st) {
    fprintf(stderr, "amalgam: the engine failed: %s\n", fail_message());
    pthread_mutex_lock(&s->lock);
    s->failed = true;
    pthread_mutex_unlock(&s->lock);
    s->touched = NULL;
    fail_all(s, NULL, st, the_engine_has_failed);
}

/* One step and what it made. Is there more to do? */
static bool step(service *s) {
    const sched *scheduler = engine_sched(s->engine);
    const int64_t fed = engine_statistics(s->engine)->tokens_fed;
    const int64_t from = engine_now_ns(s->engine), real_from = timeline_now_ns(&s->clock);
    bool busy;
    const status st = engine_step(s->engine, &busy);
    if (st != ST_OK) {
        fail_engine(s, st);
        return false;
    }
    if (busy) keep_pace(s, from, real_from);
    take_finished(s);
    count_step(s, busy, engine_statistics(s->engine)->tokens_fed - fed);
    publish(s);
    return sched_waiting(scheduler) + sched_running(scheduler) > 0;
}

static void *engine_thread(void *arg) {
    service *s = arg;
    bool busy = false;
    for (;;) {
        wishes w = take_wishes(s, busy);
        s->quitting = w.quit;
        if (w.failed) {
            fail_all(s, w.inbox, ST_DEVICE, the_engine_has_failed);
            if (w.quit) break;
            continue;
        }
        if (w.flush) sched_flush_cache(engine_sched(s->engine));
        while (w.inbox) {
            job *j = w.inbox;
            w.inbox = j->next;
            accept_job(s, j);
        }
        if (w.cancels || w.quit) cancel_marked(s, w.quit);
        if (w.quit) break;
        busy = step(s);
    }
    return NULL;
}

/* --- Interface -------------------------------------------------------------------------------- */

status service_open(service **out, engine *e, const tokenizer *tok, int32_t max_requests) {
    *out = NULL;
    service *s = mem_alloc(1, sizeof *s);
    if (!s) return FAIL(ST_NOMEM, "service");
    s->engine = e;
    s->tok = tok;
    s->max_requests = max_requests;
    s->slot = mem_alloc((size_t)max_requests, sizeof *s->slot);
    s->free_slot = mem_alloc((size_t)max_requests, sizeof *s->free_slot);
    pthread_mutex_init(&s->lock, NULL);
    pthread_cond_init(&s->work, NULL);
    pthread_condattr_t monotonic;
    pthread_condattr_init(&monotonic);
    pthread_condattr_setclock(&monotonic, CLOCK_MONOTONIC);
    pthread_cond_init(&s->idle, &monotonic);
    pthread_condattr_destroy(&monotonic);
    if (!s->slot || !s->free_slot) {
        service_close(s);
        return FAIL(ST_NOMEM, "service of %d requests", max_requests);
    }
    for (int32_t i = 0; i < max_requests; i++) s->free_slot[s->n_free++] = max_requests - 1 - i;
    s->round = 1;
    timeline_start_real(&s->clock);
    engine_set_hooks(e, &(engine_hooks){.user = s, .token = on_token, .scored = on_scored});
    count_step(s, false, 0);
    if (pthread_create(&s->thread, NULL, engine_thread, s) != 0) {
        service_close(s);
        return FAIL(ST_NOMEM, "a thread for the engine");
    }
    s->started = true;
    *out = s;
    return ST_OK;
}

void service_submit(service *s, job *j) {
    atomic_fetch_add(&j->refs, 1);
    j->since_ns = timeline_now_ns(&s->clock);
    pthread_mutex_lock(&s->lock);
    const bool draining = s->draining; /* then none is counted: nobody would wait for it */
    j->next = NULL;
    if (!draining) {
        s->n_alive++;
        if (s->last)
            s->last->next = j;
        else
            s->first = j;
        s->last = j;
        pthread_cond_signal(&s->work);
    }
    pthread_mutex_unlock(&s->lock);
    if (draining) tell_end(j, ST_INTERRUPTED, "the server is shutting down");
}

void service_cancel(service *s, job *j) {
    atomic_store(&j->cancelled, true);
    pthread_mutex_lock(&s->lock);
    s->cancels = true;
    pthread_cond_signal(&s->work);
    pthread_mutex_unlock(&s->lock);
}

void service_flush_cache(service *s) {
    pthread_mutex_lock(&s->lock);
    s->flush = true;
    pthread_cond_signal(&s->work);
    pthread_mutex_unlock(&s->lock);
}

bool service_healthy(const service *s) {
    service *w = (service *)s; /* the lock is no part of its value */
    pthread_mutex_lock(&w->lock);
    const bool healthy = !s->draining && !s->failed;
    pthread_mutex_unlock(&w->lock);
    return healthy;
}

int32_t service_alive(service *s) {
    pthread_mutex_lock(&s->lock);
    const int32_t n = s->n_alive;
    pthread_mutex_unlock(&s->lock);
    return n;
}

void service_drain(service *s, double grace_s) {
    if (!s->started) return;
    struct timespec until;
    clock_gettime(CLOCK_MONOTONIC, &until);
    const int64_t ns = until.tv_nsec + (int64_t)(grace_s * 1e9);
    until.tv_sec += (time_t)(ns / 1000000000);
    until.tv_nsec = (long)(ns % 1000000000);
    pthread_mutex_lock(&s->lock);
    s->draining = true;
    while (s->n_alive > 0)
        if (pthread_cond_timedwait(&s->idle, &s->lock, &until) != 0) break;
    s->quit = true;
    pthread_cond_signal(&s->work);
    pthread_mutex_unlock(&s->lock);
    pthread_join(s->thread, NULL);
    s->started = false;
    CHECK(s->n_alive == 0);
}

void service_close(service *s) {
    if (!s) return;
    service_drain(s, 0);
    pthread_mutex_destroy(&s->lock);
    pthread_cond_destroy(&s->work);
    pthread_cond_destroy(&s->idle);
    mem_free(s->slot);
    mem_free(s->free_slot);
    mem_free(s);
}
