/* engine.c - see engine.h. The loop itself is engine_step: pick, forward, commit. */
#include "engine.h"

#include "formats.h"
#include "kernel.h"
#include "made_batch.h"
#include "sampler.h"
#include "trace.h"

#include <string.h>

/* Pages of a device without a memory limit: enough for every running sequence at full length,
 * bounded so that the cpu device never asks for more than a laptop has. */
enum { PAGES_UNLIMITED_MAX = 16384 };

/* A step between its launch and its commit. */
typedef struct {
    batch b;
    int64_t picked_ns;
} step_under_way;

struct engine {
    arena memory;
    engine_options options;
    model_config config;
    precision precision;
    capacity capacity;
    device *device;
    checkpoint *checkpoint;
    forward *forward;
    sched *sched;
    trace *trace;
    timeline clock;
    timeline host; /* real time, for our own overhead */
    engine_hooks hooks;
    engine_stats stats;
    bool ahead;                /* steps are launched before the tokens of the one before are read */
    step_under_way started[2]; /* oldest first */
    int32_t n_started;
    int64_t counted_ns; /* up to here busy_ns is made up */
    int64_t seqs_run;   /* sum over steps, for batch_mean */
    sampled *sampled;   /* [max_samples] of the step */
    int32_t *drawn;     /* [max_seqs] tokens of the step */
    bool *stop;         /* [max_seqs] */
};

static sched_limits limits_of(const engine *e) {
    return (sched_limits){.n_pages = e->capacity.n_pages,
                          .ctx_max = e->options.ctx_max,
                          .n_requests = e->options.max_requests,
                          .n_tokens = e->options.max_tokens};
}

static status check_options(const engine_options *o) {
    const sched_policy *p = &o->policy;
    if (p->token_budget < 1 || p->token_budget > 1 << 20)
        return FAIL(ST_RANGE, "token_budget %d is outside 1 to %d", p->token_budget, 1 << 20);
    if (p->max_seqs < 1 || p->max_seqs > 65536)
        return FAIL(ST_RANGE, "max_seqs %d is outside 1 to 65536", p->max_seqs);
    if (p->max_seqs > p->token_budget)
        return FAIL(ST_RANGE,
                    "max_seqs %d exceeds token_budget %d: every running sequence needs a "
                    "token a step",
                    p->max_seqs, p->token_budget);
    if (!(o->memory_fraction > 0 && o->memory_fraction <= 1))
        return FAIL(ST_RANGE, "memory_fraction %g is outside 0 to 1", o->memory_fraction);
    if (o->device_options.tp < 1 || o->device_options.tp > 64)
        return FAIL(ST_RANGE, "tp %d is outside 1 to 64", o->device_options.tp);
    if (o->max_requests < 1 || o->max_tokens < 1)
        return FAIL(ST_RANGE, "max_requests %d and max_tokens %lld must be positive",
                    o->max_requests, (long long)o->max_tokens);
    return ST_OK;
}

/* Context, pages and memory: everything that is bounded before the first weight is read. */
static status plan_memory(engine *e) {
    engine_options *o = &e->options;
    const model_config *c = &e->config;
    if (o->ctx_max <= 0 || o->ctx_max > c->ctx_max) o->ctx_max = c->ctx_max;
    int64_t usable;
    TRY(e->device->ops->memory(e->device, &usable));
    const int64_t pages_of_one = div_up(o->ctx_max, KV_PAGE_TOKENS);
    int64_t wanted = o->pages;
    if (wanted == 0 && usable == 0) {
        wanted = i64_min(pages_of_one * o->policy.max_seqs, PAGES_UNLIMITED_MAX);
        wanted = i64_min(wanted, div_up(o->max_tokens, KV_PAGE_TOKENS) + o->max_requests);
    }
    TRY(capacity_compute(&e->capacity, c, &e->precision, o->device_options.tp, usable,
                         o->memory_fraction, o->policy.token_budget, o->policy.max_seqs,
                         (int32_t)wanted, 1));
    return ST_OK;
}

static status load(engine *e, void (*progress)(void *, int64_t, int64_t), void *user) {
    engine_options *o = &e->options;
    const int32_t max_seqs = o->policy.max_seqs;
    const int32_t max_samples = o->max_samples > max_seqs ? o->max_samples : max_seqs;
    char dir[1024];
    TRY(model_dir(dir, sizeof dir, o->model));
    TRY(model_config_load(&e->config, dir));
    const device_ops *ops;
    TRY(device_find(&ops, o->device));
    /* A device whose memory is only counted needs no files: weights are sizes to it. Opening maps
     * them; nothing is read yet. */
    const bool synthetic = o->synthetic || ops->virtual_time || !ops->has_logits;
    TRY(checkpoint_open(&e->checkpoint, &e->config, synthetic ? NULL : dir, o->weights_seed));
    TRY(checkpoint_parse_precision(e->checkpoint, &e->precision, o->precision));
    TRY(model_fits_tp(&e->config, o->device_options.tp, e->precision.group));
    TRY(model_fits_precision(&e->config, &e->precision, o->device_options.tp));
    TRY(ops->open(&e->device, &o->device_options));
    e->ahead = e->device->ops->launch && !o->device_options.lockstep;
    TRY(plan_memory(e));
    TRY(forward_load(&e->forward, &e->memory, e->device, e->checkpoint, &e->config, &e->precision,
                     progress, user));
    const device_setup setup = {.config = &e->config,
                                .precision = &e->precision,
                                .max_tokens = o->policy.token_budget,
                                .max_seqs = max_seqs,
                                .max_samples = max_samples,
                                .n_pages = e->capacity.n_pages,
                                .ctx_max = o->ctx_max};
    const forward_plan plan = forward_plan_default(e->device);
    TRY(forward_setup(e->forward, &setup, &plan));

    const sched_limits limits = limits_of(e);
    TRY(sched_open(&e->sched, &e->memory, &o->policy, &limits));
    if (o->trace) TRY(trace_open(&e->trace, o->trace, &o->policy, &limits));

    e->sampled = arena_array(&e->memory, sampled, (size_t)max_samples);
    e->drawn = arena_array(&e->memory, int32_t, (size_t)max_seqs);
    e->stop = arena_array(&e->memory, bool, (size_t)max_seqs);
    if (!e->sampled || !e->drawn || !e->stop) return FAIL(ST_NOMEM, "engine tables");
    arena_seal(&e->memory);
    return engine_reset(e);
}

status engine_open(engine **out, const engine_options *o,
                   void (*progress)(void *user, int64_t done, int64_t total), void *user) {
    *out = NULL;
    TRY(check_options(o));
    engine *e = mem_alloc(1, sizeof *e);
    if (!e) return FAIL(ST_NOMEM, "engine");
    e->options = *o;
    const sched_limits guess = {.n_pages = 1 << 24,
                                .ctx_max = 1 << 20,
                                .n_requests = o->max_requests,
                                .n_tokens = o->max_tokens};
    /* Address space only: pages are committed as they are touched. */
    status st = arena_open(&e->memory, sched_bytes(&o->policy, &guess) + ((size_t)64 << 20));
    if (st == ST_OK) st = load(e, progress, user);
    if (st != ST_OK) {
        engine_close(e);
        return st;
    }
    *out = e;
    return ST_OK;
}

void engine_close(engine *e) {
    if (!e) return;
    if (e->trace) (void)trace_close(e->trace);
    if (e->device) e->device->ops->close(e->device);
    checkpoint_close(e->checkpoint);
    arena_close(&e->memory);
    mem_free(e);
}

void engine_set_hooks(engine *e, const engine_hooks *h) { e->hooks = *h; }

/* Three times: the second and the third capture a graph. */
static status warm_step(engine *e, int32_t n_seqs, int32_t n_new) {
    made_batch m;
    int64_t cost;
    status st = made_batch_open(&m, n_seqs, n_new, n_new, e->capacity.n_pages, e->config.vocab);
    for (int32_t i = 0; i < 3 && st == ST_OK; i++)
        st = forward_step(e->forward, &m.b, m.drawn, &cost);
    made_batch_close(&m);
    return st;
}

status engine_warm(engine *e) {
    const sched_policy *p = &e->options.policy;
    if (!e->device->ops->padded_rows) return ST_OK;
    TRY(engine_settle(e));
    int32_t longest = e->options.ctx_max < p->token_budget ? e->options.ctx_max : p->token_budget;
    if (div_up(longest, KV_PAGE_TOKENS) > e->capacity.n_pages)
        longest = e->capacity.n_pages * KV_PAGE_TOKENS;
    for (int32_t n = 16; n < longest * 2; n *= 2) TRY(warm_step(e, 1, n < longest ? n : longest));
    for (int32_t n = 0; n < p->max_seqs;) { /* where there is no padding, by a sixteenth */
        n = e->device->ops->padded_rows(e->device, n + 1 + n / 16);
        TRY(warm_step(e, n < p->max_seqs ? n : p->max_seqs, 1));
    }
    return engine_reset(e);
}

status engine_reset(engine *e) {
    TRY(engine_settle(e));
    sched_flush_cache(e->sched);
    if (e->trace) trace_flush_cache(e->trace);
    e->stats = (engine_stats){0};
    e->seqs_run = e->counted_ns = 0;
    timeline_start_real(&e->host);
    if (e->device->ops->virtual_time)
        timeline_start_virtual(&e->clock);
    else
        timeline_start_real(&e->clock);
    return ST_OK;
}

/* What ends_request takes for an end. */
static void bar_ends(const engine *e, request *r) {
    sampling *s = &r->sampling;
    if (s->min_tokens == 0) return;
    s->barred[0].token = r->stop_token;
    s->barred[0].n = r->n_stop_tokens;
    s->barred[1].token = e->config.eos;
    s->barred[1].n = r->ignore_eos ? 0 : e->config.n_eos;
}

status engine_submit(engine *e, const request *r) {
    const int64_t now = timeline_now_ns(&e->clock);
    TRY(sampling_check(&r->sampling));
    for (int32_t i = 0; i < r->n_prompt; i++)
        if (r->prompt[i] < 0 || r->prompt[i] >= e->config.vocab)
            return FAIL(ST_RANGE, "prompt token %d is outside the vocabulary of %d", r->prompt[i],
                        e->config.vocab);
    for (int32_t i = 0; i < r->sampling.n_bias; i++)
        if (r->sampling.bias[i].token >= e->config.vocab)
            return FAIL(ST_RANGE, "logit_bias: token %d is outside the vocabulary of %d",
                        r->sampling.bias[i].token, e->config.vocab);
    if (r->sampling.min_tokens > r->max_new)
        return FAIL(ST_RANGE, "min_tokens %d is more than the %d output tokens at most",
                    r->sampling.min_tokens, r->max_new);
    request q = *r;
    bar_ends(e, &q);
    TRY(sched_add(e->sched, &q, now));
    if (e->trace) trace_add(e->trace, r, now);
    return ST_OK;
}

status engine_cancel(engine *e, int64_t id) {
    const int64_t now = timeline_now_ns(&e->clock);
    TRY(sched_cancel(e->sched, id, now));
    if (e->trace) trace_cancel(e->trace, id, now);
    return ST_OK;
}

static bool ends_request(const engine *e, const request *r, int32_t token) {
    for (int32_t i = 0; i < r->n_stop_tokens; i++)
        if (r->stop_token[i] == token) return true;
    if (r->ignore_eos) return false;
    for (int32_t i = 0; i < e->config.n_eos; i++)
        if (e->config.eos[i] == token) return true;
    return false;
}

/* Pick a batch, if there is one, and start it. */
static status launch_step(engine *e) {
    step_under_way *s = &e->started[e->n_started];
    s->picked_ns = timeline_now_ns(&e->clock);
    if (!sched_pick(e->sched, s->picked_ns, &s->b)) return ST_OK;
    if (e->trace && e->ahead) trace_pick(e->trace, &s->b, s->picked_ns);
    const int64_t before = timeline_now_ns(&e->host);
    TRY(forward_launch(e->forward, &s->b));
    e->n_started++;
    e->stats.forward_ns += timeline_now_ns(&e->host) - before;
    return ST_OK;
}

static void count_step(engine *e, const step_under_way *s, int64_t now) {
    engine_stats *t = &e->stats;
    const batch *b = &s->b;
    t->n_steps++;
    t->n_decode_steps += b->n_decodes == b->n_seqs;
    t->tokens_fed += b->n_tokens;
    t->tokens_sampled += b->n_samples;
    t->busy_ns += now - i64_max(s->picked_ns, e->counted_ns);
    e->counted_ns = now;
    e->seqs_run += b->n_seqs;
    t->batch_mean = (double)e->seqs_run / (double)t->n_steps;
    if (kvpool_held(sched_pool(e->sched)) > t->pages_peak)
        t->pages_peak = kvpool_held(sched_pool(e->sched));
}

/* Wait for the oldest step; hand out and commit its tokens. */
static status finish_step(engine *e) {
    const step_under_way s = e->started[0];
    const batch *b = &s.b;
    int64_t cost = 0;
    const int64_t before = timeline_now_ns(&e->host);
    TRY(forward_collect(e->forward, e->sampled, &cost));
    e->stats.forward_ns += timeline_now_ns(&e->host) - before;
    timeline_spend_ns(&e->clock, cost);
    const int64_t now = timeline_now_ns(&e->clock);
    e->started[0] = e->started[1];
    e->n_started--;

    const bool meant = e->device->ops->has_logits; /* placeholders end nothing */
    for (int32_t i = 0; i < b->n_samples; i++) {
        const request *r = sched_request(e->sched, b, b->sample[i].seq);
        e->drawn[i] = e->sampled[i].token;
        e->stop[i] = false;
        if (b->sample[i].given) {
            if (r && e->hooks.scored)
                e->hooks.scored(e->hooks.user, r->id, b->position[b->sample[i].row] + 1,
                                &e->sampled[i]);
            continue;
        }
        e->stop[i] = r && meant && ends_request(e, r, e->drawn[i]);
        if (r && e->hooks.token &&
            e->hooks.token(e->hooks.user, r->id, &e->sampled[i], e->stop[i], now))
            e->stop[i] = true;
    }
    count_step(e, &s, now);
    if (e->trace) trace_step(e->trace, b, s.picked_ns, e->drawn, e->stop, now);
    sched_commit(e->sched, b, e->drawn, e->stop, now);
    return ST_OK;
}

status engine_step(engine *e, bool *ran) {
    if (e->n_started == 0) TRY(launch_step(e));
    *ran = e->n_started > 0;
    if (!*ran) return ST_OK;
    if (e->ahead) TRY(launch_step(e));
    return finish_step(e);
}

status engine_settle(engine *e) {
    while (e->n_started > 0) TRY(finish_step(e));
    return ST_OK;
}

/* --- Whole workloads -------------------------------------------------------------------------- */

/* Hand over what is due. Open loop: everything whose arrival has come. Closed loop: `user_next`
 * holds each user's next request, due at once. */
typedef struct {
    engine *e;
    arena *a;
    const workload *w;
    request_log *log;
    int32_t next; /* open loop: first request not yet handed over */
    int32_t n_done;
    int32_t *user_next; /* closed loop [users]: index of the next request, -1 = none */
    bool closed;
} serving;

static void refuse(serving *v, const request *r, int64_t now) {
    request_log *log = &v->log[r->id];
    const char *why = fail_message();
    *log = (request_log){.id = r->id,
                         .arrival_ns = r->arrival_ns,
                         .dispatch_ns = now,
                         .admit_ns = -1,
                         .first_token_ns = -1,
                         .finish_ns = now,
                         .n_prompt = r->n_prompt,
                         .finish = FINISH_REFUSED,
                         .reason = arena_string(v->a, why, strlen(why))};
    v->n_done++;
}

static status submit(serving *v, const request *r) {
    const status st = engine_submit(v->e, r);
    if (st == ST_RANGE || st == ST_OOM)
        refuse(v, r, timeline_now_ns(&v->e->clock));
    else if (st != ST_OK)
        return st;
    return ST_OK;
}

/* Closed loop: the user of a finished request sends the next one now. */
static status user_sends(serving *v, int32_t user) {
    for (int32_t i = v->user_next[user]; i >= 0 && i < v->w->n; i++) {
        if (v->w->request[i].user != user) continue;
        request r = v->w->request[i];
        r.arrival_ns = timeline_now_ns(&v->e->clock);
        v->user_next[user] = i + 1;
        TRY(submit(v, &r));
        if (v->log[r.id].finish != FINISH_REFUSED) return ST_OK;
    }
    v->user_next[user] = -1;
    return ST_OK;
}

static status take_finished(serving *v) {
    request_log log;
    const int32_t *token;
    while (sched_take_finished(v->e->sched, &log, &token)) {
        int64_t *instants = arena_array(v->a, int64_t, (size_t)log.n_output);
        if (log.n_output && !instants)
            return FAIL(ST_NOMEM, "log of request %lld", (long long)log.id);
        if (log.n_output) memcpy(instants, log.token_ns, (size_t)log.n_output * sizeof *instants);
        log.token_ns = instants;
        v->log[log.id] = log;
        v->n_done++;
        if (v->e->hooks.finished) v->e->hooks.finished(v->e->hooks.user, &log, token);
        if (v->closed) TRY(user_sends(v, v->w->request[log.id].user));
    }
    return ST_OK;
}

status engine_answer(engine *e, const request *r, request_log *log) {
    const int32_t *token;
    TRY(engine_submit(e, r));
    while (!sched_take_finished(e->sched, log, &token)) {
        bool ran;
        TRY(engine_step(e, &ran));
    }
    return ST_OK;
}

status engine_serve(engine *e, arena *a, const workload *w, request_log *log) {
    serving v = {.e = e, .a = a, .w = w, .log = log, .closed = w->options.arrival == ARRIVE_CLOSED};
    memset(log, 0, (size_t)w->n * sizeof *log);
    for (int32_t i = 0; i < w->n; i++) CHECK(w->request[i].id == i); /* logs are by index */
    TRY(engine_reset(e));
    if (v.closed) {
        v.user_next = arena_array(a, int32_t, (size_t)w->options.users);
        if (!v.user_next) return FAIL(ST_NOMEM, "closed loop of %d users", w->options.users);
        for (int32_t u = 0; u < w->options.users; u++) TRY(user_sends(&v, u));
    }
    const int64_t start_ns = timeline_now_ns(&e->host);
    int64_t waited = 0;
    while (v.n_done < w->n) {
        const int64_t now = timeline_now_ns(&e->clock);
        if (!v.closed)
            for (; v.next < w->n && w->request[v.next].arrival_ns <= now; v.next++)
                TRY(submit(&v, &w->request[v.next]));
        bool ran;
        TRY(engine_step(e, &ran));
        TRY(take_finished(&v));
        if (ran || v.n_done >= w->n) continue;
        /* Idle: nothing alive, so the next event is an arrival. */
        CHECK(sched_waiting(e->sched) == 0 && sched_running(e->sched) == 0);
        if (v.closed) continue; /* every user's rest was refused */
        CHECK(v.next < w->n);
        const int64_t before = timeline_now_ns(&e->host);
        timeline_wait_until_ns(&e->clock, w->request[v.next].arrival_ns);
        waited += timeline_now_ns(&e->host) - before;
    }
    TRY(engine_settle(e));
    e->stats.host_ns = timeline_now_ns(&e->host) - start_ns - waited - e->stats.forward_ns;
    return ST_OK;
}

const model_config *engine_config(const engine *e) { return &e->config; }
const precision *engine_precision(const engine *e) { return &e->precision; }
const capacity *engine_capacity(const engine *e) { return &e->capacity; }
int32_t engine_ctx_max(const engine *e) {
    return (int32_t)i64_min(e->options.ctx_max, (int64_t)e->capacity.n_pages * KV_PAGE_TOKENS);
}
const engine_stats *engine_statistics(const engine *e) { return &e->stats; }
sched *engine_sched(engine *e) { return e->sched; }
uint64_t engine_digest(const engine *e) { return checkpoint_digest(e->checkpoint); }
int64_t engine_now_ns(const engine *e) { return timeline_now_ns(&e->clock); }
forward *engine_forward(engine *e) { return e->forward; }
device *engine_device(engine *e) { return e->device; }
int32_t engine_token_budget(const engine *e) { return e->options.policy.token_budget; }
