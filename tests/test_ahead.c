/* test_ahead.c - the engine that launches a step before the tokens of the one before are known,
 * against lockstep: over the cpu device, whose results depend on no company, every request comes to
 * the same tokens and the same end, with stops, penalties, late arrivals, cancels and too few
 * pages.
 *
 * The device here runs a step when it is launched and hands it out when it is asked, as a GPU's
 * stream would; ids that stand for drawn tokens it replaces from the step before, in histories too.
 * devices.c is not linked: this is the only device there is. */
#include "test.h"

#include "engine.h"
#include "rng.h"

#include <string.h>

enum { N = 12, NEW = 24, LONGEST = 256, SEQS = 8, TOKENS = 64, TOKENS_MAX = 8192 };

/* --- The device ------------------------------------------------------------------------------ */

static device_ops ops;
static sampled result[2][SEQS];
static int32_t n_result[2], fed[TOKENS_MAX];
static int64_t begun, ended, n_fed, n_told;
static batch resolved;
static sample_row told[SEQS];
static int32_t history[SEQS][LONGEST];
static int32_t shift;         /* twin: what another sample drew is fed */
static int32_t history_shift; /* twin: and is in the history */

static status ahead_open(device **out, const device_options *o) {
    TRY(device_cpu.open(out, o));
    (*out)->ops = &ops;
    begun = ended = n_fed = n_told = 0;
    return ST_OK;
}

/* The token that `id` stands for. */
static int32_t drawn_before(int32_t id, int32_t by) {
    const int32_t n = n_result[~begun & 1], i = -1 - id;
    assert_true(begun > ended && i < n);
    return result[~begun & 1][(i + by) % n].token;
}

/* Histories with all their tokens. */
static void tell_histories(const batch *b) {
    for (int32_t i = 0; i < b->n_samples; i++) {
        sample_row *s = &told[i];
        *s = b->sample[i];
        if (s->n_history == 0) continue;
        assert_true(s->n_history <= LONGEST);
        memcpy(history[i], s->history, sizeof **history * (size_t)s->n_history);
        int32_t *last = &history[i][s->n_history - 1];
        n_told += *last < 0;
        if (*last < 0) *last = drawn_before(*last, history_shift);
        s->history = history[i];
    }
    resolved.sample = told;
}

static status ahead_begin(device *d, const batch *b) {
    assert_true(begun - ended < 2);
    assert_true(b->n_tokens <= TOKENS_MAX);
    resolved = *b;
    resolved.token = fed;
    for (int32_t t = 0; t < b->n_tokens; t++) {
        fed[t] = b->token[t];
        if (fed[t] >= 0) continue;
        fed[t] = drawn_before(fed[t], shift);
        n_fed++;
    }
    tell_histories(b);
    return device_cpu.begin(d, &resolved);
}

static status ahead_launch(device *d) {
    int64_t cost;
    n_result[begun & 1] = resolved.n_samples;
    return device_cpu.end(d, result[begun++ & 1], &cost);
}

static status ahead_end(device *d, sampled *out, int64_t *cost_ns) {
    (void)d;
    assert_true(ended < begun);
    memcpy(out, result[ended & 1], sizeof *out * (size_t)n_result[ended & 1]);
    ended++;
    *cost_ns = 0;
    return ST_OK;
}

const device_ops *const devices[] = {&ops, NULL};

status device_find(const device_ops **out, const char *name) {
    (void)name;
    ops = device_cpu;
    ops.name = "ahead";
    ops.open = ahead_open;
    ops.begin = ahead_begin;
    ops.launch = ahead_launch;
    ops.end = ahead_end;
    *out = &ops;
    return ST_OK;
}

status device_family(int32_t *out, const char *name) {
    (void)name;
    *out = 0;
    return ST_OK;
}

/* --- Runs ------------------------------------------------------------------------------------ */

typedef struct {
    int32_t token[N][NEW], n[N];
    finish_reason finish[N];
    int32_t n_preempted;
} outputs;

typedef struct {
    sampling how;
    int32_t stop;  /* token, or -1 */
    int32_t hook;  /* the hook ends a request after so many tokens; 0 = never */
    int32_t pages; /* 0 = enough */
    bool cancel;   /* request 2, after its 5th token */
    const char *precision;
    int32_t seqs, tokens; /* 0 = SEQS, TOKENS */
    bool whole, no_cache; /* prompts in one piece; nothing shared */
} conditions;

typedef struct {
    outputs *o;
    const conditions *c;
} listener;

static bool on_token(void *user, int64_t id, const sampled *s, bool ends, int64_t now_ns) {
    const listener *l = user;
    outputs *o = l->o;
    (void)ends;
    (void)now_ns;
    assert_true(o->n[id] < NEW);
    o->token[id][o->n[id]++] = s->token;
    return l->c->hook && o->n[id] == l->c->hook + (int32_t)id;
}

static void add(engine *e, int32_t id, const conditions *c) {
    static int32_t prompt[LONGEST];
    const int32_t n = 1 + id * 37 % 100;
    for (int32_t k = 0; k < n; k++) prompt[k] = (k < 64 ? k : id + k * 5) % 200 + 20;
    const request r = {.id = id,
                       .arrival_ns = id,
                       .prompt = prompt,
                       .n_prompt = n,
                       .max_new = NEW - id % 3,
                       .ignore_eos = true,
                       .sampling = c->how,
                       .stop_token = &c->stop,
                       .n_stop_tokens = c->stop >= 0,
                       .user = -1};
    assert_ok(engine_submit(e, &r));
}

/* Half of the requests at once, the others one a step. */
static void run(bool lockstep, const conditions *c, outputs *o) {
    engine_options options = ENGINE_OPTIONS_DEFAULT;
    options.model = "workloads/tiny";
    options.device = "ahead";
    options.device_options.lockstep = lockstep;
    options.precision = c->precision ? c->precision : "W16";
    options.policy.max_seqs = c->seqs ? c->seqs : SEQS;
    options.policy.token_budget = c->tokens ? c->tokens : TOKENS;
    options.policy.chunked_prefill = !c->whole;
    options.policy.prefix_cache = !c->no_cache;
    options.ctx_max = 150;
    options.pages = c->pages ? c->pages : 3 * SEQS;
    engine *e;
    *o = (outputs){0};
    listener l = {.o = o, .c = c};
    assert_ok(engine_open(&e, &options, NULL, NULL));
    engine_set_hooks(e, &(engine_hooks){.user = &l, .token = on_token});
    int32_t added = 0, done = 0;
    bool cancelled = false;
    for (; added < N / 2; added++) add(e, added, c);
    while (done < N) {
        request_log log;
        const int32_t *token;
        bool ran;
        assert_ok(engine_step(e, &ran));
        assert_null(sched_problem(engine_sched(e)));
        if (added < N) add(e, added++, c);
        if (c->cancel && !cancelled && o->n[2] == 5) {
            assert_ok(engine_cancel(e, 2));
            cancelled = true;
        }
        while (sched_take_finished(engine_sched(e), &log, &token)) {
            assert_int_equal(log.n_output, o->n[log.id]);
            assert_memory_equal(token + log.n_prompt, o->token[log.id],
                                sizeof *token * (size_t)log.n_output);
            o->finish[log.id] = log.finish;
            o->n_preempted += log.n_preempted;
            done++;
        }
    }
    assert_ok(engine_settle(e));
    assert_int_equal(kvpool_held(sched_pool(engine_sched(e))), 0);
    assert_int_equal(begun, ended);
    engine_close(e);
}

static int32_t differing(const outputs *a, const outputs *b) {
    int32_t n = 0;
    for (int32_t i = 0; i < N; i++)
        n += a->n[i] != b->n[i] || a->finish[i] != b->finish[i] ||
             memcmp(a->token[i], b->token[i], sizeof a->token[i]) != 0;
    return n;
}

static outputs ahead, behind;

static void compare(const conditions *c) {
    run(false, c, &ahead);
    assert_true(n_fed > N && n_told > N);
    run(true, c, &behind);
    assert_int_equal(n_fed + n_told, 0);
    assert_int_equal(differing(&ahead, &behind), 0);
}

static const sampling greedy = {.top_p = 1, .repetition_penalty = 1, .n_logprobs = -1};

static void the_same_tokens(void **state) {
    (void)state;
    compare(&(conditions){.how = greedy, .stop = -1});
    compare(&(conditions){.how = {.temperature = 0.9f,
                                  .top_p = 0.95f,
                                  .repetition_penalty = 1,
                                  .seed = 5,
                                  .n_logprobs = -1},
                          .stop = -1});
    compare(&(conditions){.how = {.top_p = 1, .repetition_penalty = 1.3f, .n_logprobs = -1},
                          .stop = -1});
    sampling counted = greedy;
    counted.frequency_penalty = 0.5f;
    compare(&(conditions){.how = counted, .stop = -1});
    counted.repetition_penalty = 1.1f;
    compare(&(conditions){.how = counted, .stop = -1, .pages = 7});
    assert_true(ahead.n_preempted > 0);
}

/* What comes most often. */
static int32_t frequent(const outputs *o) {
    static int32_t times[4096];
    int32_t best = 0;
    memset(times, 0, sizeof times);
    for (int32_t i = 0; i < N; i++)
        for (int32_t k = 0; k < o->n[i]; k++)
            if (++times[o->token[i][k]] > times[best]) best = o->token[i][k];
    return best;
}

/* The stop is barred up to the same token. */
static void the_same_least_length(void **state) {
    (void)state;
    static const logit_bias bias[] = {{30, 6}, {100, -100}, {2000, 1}};
    conditions c = {.how = greedy, .stop = -1};
    c.how.bias = bias;
    c.how.n_bias = COUNT_OF(bias);
    run(true, &c, &behind);
    c.stop = frequent(&behind);
    run(true, &c, &behind);
    int32_t early = 0, stopped = 0; /* the twin: without */
    for (int32_t i = 0; i < N; i++) early += behind.n[i] <= NEW / 2;
    c.how.min_tokens = NEW / 2;
    compare(&c);
    for (int32_t i = 0; i < N; i++) {
        assert_true(ahead.n[i] > NEW / 2);
        for (int32_t k = 0; k < NEW / 2; k++) assert_int_not_equal(ahead.token[i][k], c.stop);
        stopped += ahead.finish[i] == FINISH_STOP;
    }
    assert_true(early > 0 && stopped > 0);
}

static void the_same_ends(void **state) {
    (void)state;
    run(true, &(conditions){.how = greedy, .stop = -1}, &behind);
    compare(&(conditions){.how = greedy, .stop = behind.token[3][NEW / 2]});
    int32_t stopped = 0;
    for (int32_t i = 0; i < N; i++) stopped += ahead.finish[i] == FINISH_STOP;
    assert_true(stopped > 0);
    compare(&(conditions){.how = greedy, .stop = -1, .hook = 7});
    for (int32_t i = 0; i < N; i++) assert_int_equal(ahead.n[i], 7 + i);
}

static void the_same_with_too_few_pages(void **state) {
    (void)state;
    compare(&(conditions){.how = greedy, .stop = -1, .pages = 7});
    assert_true(ahead.n_preempted > 0);
}

/* What a request gets is its own: neighbours, sizes of chunks, shared prefixes and being computed
 * again change no token of it. */
static void company_changes_nothing(void **state) {
    (void)state;
    static const char *const precisions[] = {"W16", "W4A8KV4"};
    const conditions companies[] = {
        {.tokens = 9},   {.whole = true, .tokens = 128}, {.seqs = 3, .tokens = 17},
        {.pages = 7},    {.pages = 5, .tokens = 11},     {.no_cache = true, .pages = 7},
        {.cancel = true}};
    sampling drawn = {
        .temperature = 0.9f, .top_p = 0.95f, .repetition_penalty = 1, .seed = 5, .n_logprobs = -1};
    int32_t n_preempted = 0;
    for (int32_t i = 0; i < COUNT_OF(precisions); i++) {
        if (i == 1) drawn.frequency_penalty = 0.4f, drawn.repetition_penalty = 1.1f;
        run(true,
            &(conditions){
                .how = drawn, .stop = -1, .precision = precisions[i], .seqs = 1, .no_cache = true},
            &behind);
        for (int32_t k = 0; k < COUNT_OF(companies); k++) {
            conditions c = companies[k];
            c.how = drawn;
            c.stop = -1;
            c.precision = precisions[i];
            run(k & 1, &c, &ahead);
            n_preempted += ahead.n_preempted;
            assert_int_equal(differing(&ahead, &behind),
                             c.cancel); /* the twin: the one cut short */
        }
    }
    assert_true(n_preempted > 0);
}

static void cancels_what_is_under_way(void **state) {
    (void)state;
    const conditions c = {.how = greedy, .stop = -1, .cancel = true};
    compare(&c);
    assert_int_equal(ahead.finish[2], FINISH_CANCEL);
    assert_int_equal(ahead.n[2], 5);
}

/* The twins of all of them. */
static void another_token_is_noticed(void **state) {
    (void)state;
    conditions c = {.how = greedy, .stop = -1};
    shift = 1;
    run(false, &c, &ahead);
    shift = 0;
    run(true, &c, &behind);
    assert_true(differing(&ahead, &behind) > N / 2);
    c.how.temperature = 1; /* one step's penalty moves few best tokens, but many drawn ones */
    c.how.presence_penalty = 2;
    history_shift = 1;
    run(false, &c, &ahead);
    history_shift = 0;
    run(true, &c, &behind);
    assert_true(differing(&ahead, &behind) > 0);
}

/* --- Drawn work ------------------------------------------------------------------------------- */

/* Requests that are awkward on purpose: prompts that end at, before and after the edge of a page,
 * share prefixes or are the same, answers of one token, ends by the first token, scored prompts.
 * What each gets alone, tokens and log-probabilities, it gets in every company. */
enum { DRAWN = 10 };
typedef struct {
    int32_t prompt[LONGEST], n_prompt, max_new;
    int32_t stop; /* -1 = none */
    bool is_scored;
    sampling how;
    int32_t arrives, leaves; /* at these steps; leaves 0 = never */
} drawn_request;

typedef struct {
    int32_t token[NEW], n;
    finish_reason finish;
    int32_t n_scored;
    uint64_t seen; /* of all log-probabilities, to the bit, in their order */
} drawn_answer;

typedef struct {
    int32_t seqs, tokens, pages;
    bool whole, no_cache, lockstep, leave;
    drawn_answer answer[DRAWN];
    int32_t n_preempted, n_left, n_cached;
} drawn_run;

static void draw_requests(rng *r, drawn_request *w) {
    static const int32_t edges[] = {1, 2, 63, 64, 65, 127, 128, 129, 192, 193};
    for (int32_t i = 0; i < DRAWN; i++) {
        drawn_request *q = &w[i];
        *q = (drawn_request){.stop = -1};
        q->n_prompt = rng_below(r, 3) ? edges[rng_below(r, COUNT_OF(edges))]
                                      : (int32_t)rng_range(r, 1, LONGEST - NEW);
        const int32_t family = (int32_t)rng_below(r, 2);
        const int32_t own = rng_below(r, 2) ? LONGEST : (int32_t)rng_range(r, 0, q->n_prompt);
        for (int32_t k = 0; k < q->n_prompt; k++)
            q->prompt[k] = 20 + (k * 7 + family * 31 + (k >= own ? i + 1 : 0)) % 300;
        q->max_new = rng_below(r, 4) ? (int32_t)rng_range(r, 1, NEW) : 1;
        q->is_scored = rng_below(r, 4) == 0;
        q->how = SAMPLING_GREEDY;
        q->how.n_logprobs = (int32_t)rng_range(r, 0, 2);
        q->how.seed = rng_u64(r);
        if (rng_below(r, 2)) q->how.temperature = 0.9f, q->how.top_p = 0.9f;
        if (rng_below(r, 3) == 0) q->how.repetition_penalty = 1.2f, q->how.presence_penalty = 0.5f;
        q->arrives = (int32_t)rng_below(r, 12);
        if (rng_below(r, 4) == 0) q->leaves = 1 + q->arrives + (int32_t)rng_below(r, 20);
    }
}

static void see(drawn_answer *a, const void *data, size_t n) {
    for (size_t i = 0; i < n; i++)
        a->seen = (a->seen ^ ((const uint8_t *)data)[i]) * 1099511628211u;
}

static void see_sampled(drawn_answer *a, const sampled *s) {
    see(a, &s->token, sizeof s->token);
    see(a, &s->logprob, sizeof s->logprob);
    see(a, s->top_token, sizeof *s->top_token * (size_t)s->n_top);
    see(a, s->top_logprob, sizeof *s->top_logprob * (size_t)s->n_top);
}

static bool drawn_token(void *user, int64_t id, const sampled *s, bool ends, int64_t now_ns) {
    (void)ends;
    (void)now_ns;
    drawn_answer *a = &((drawn_run *)user)->answer[id];
    assert_true(a->n < NEW);
    a->token[a->n++] = s->token;
    see_sampled(a, s);
    return false;
}

static void drawn_scored(void *user, int64_t id, int32_t at, const sampled *s) {
    drawn_answer *a = &((drawn_run *)user)->answer[id];
    assert_int_equal(at, ++a->n_scored);
    see_sampled(a, s);
}

static void run_drawn(const drawn_request *w, drawn_run *run) {
    engine_options options = ENGINE_OPTIONS_DEFAULT;
    options.model = "workloads/tiny";
    options.device = "ahead";
    options.device_options.lockstep = run->lockstep;
    options.precision = "W16A16KV4";
    options.policy.max_seqs = run->seqs;
    options.policy.token_budget = run->tokens;
    options.policy.chunked_prefill = !run->whole;
    options.policy.prefix_cache = !run->no_cache;
    options.ctx_max = LONGEST;
    options.pages = run->pages;
    engine *e;
    assert_ok(engine_open(&e, &options, NULL, NULL));
    engine_set_hooks(e, &(engine_hooks){.user = run, .token = drawn_token, .scored = drawn_scored});
    for (int32_t step = 0, done = 0; done < DRAWN; step++) {
        for (int32_t i = 0; i < DRAWN; i++) {
            const drawn_request *q = &w[i];
            if (q->arrives == step)
                assert_ok(engine_submit(e, &(request){.id = i,
                                                      .arrival_ns = step,
                                                      .prompt = q->prompt,
                                                      .n_prompt = q->n_prompt,
                                                      .max_new = q->max_new,
                                                      .ignore_eos = true,
                                                      .score_prompt = q->is_scored,
                                                      .sampling = q->how,
                                                      .stop_token = &q->stop,
                                                      .n_stop_tokens = q->stop >= 0,
                                                      .user = -1}));
            if (run->leave && q->leaves == step && step > 0) {
                const status st = engine_cancel(e, i); /* NOTFOUND: it has ended before */
                assert_true(st == ST_OK || st == ST_NOTFOUND);
            }
        }
        bool ran;
        assert_ok(engine_step(e, &ran));
        assert_null(sched_problem(engine_sched(e)));
        request_log log;
        const int32_t *token;
        while (sched_take_finished(engine_sched(e), &log, &token)) {
            drawn_answer *a = &run->answer[log.id];
            assert_int_equal(log.n_output, a->n);
            assert_memory_equal(token + log.n_prompt, a->token, sizeof *token * (size_t)a->n);
            a->finish = log.finish;
            run->n_preempted += log.n_preempted;
            run->n_cached += log.n_cached;
            run->n_left += log.finish == FINISH_CANCEL;
            done++;
        }
        assert_true(step < 20000);
    }
    assert_ok(engine_settle(e));
    assert_int_equal(kvpool_held(sched_pool(engine_sched(e))), 0);
    engine_close(e);
}

static void draw_company(rng *r, drawn_run *run) {
    static const int32_t budgets[] = {16, 17, 64, 100, 256, 8192};
    *run = (drawn_run){.seqs = (int32_t)rng_range(r, 1, SEQS),
                       .tokens = budgets[rng_below(r, COUNT_OF(budgets))],
                       .pages = (int32_t)(rng_below(r, 2) ? rng_range(r, 4, 8) : 4 * SEQS),
                       .whole = rng_below(r, 4) == 0,
                       .no_cache = rng_below(r, 3) == 0,
                       .lockstep = rng_below(r, 2),
                       .leave = rng_below(r, 2)};
    if (run->whole) run->tokens = LONGEST;
}

/* Answers that are not as alone. One that left has had the beginning of its own. */
static int32_t not_as_alone(const drawn_run *run, const drawn_run *alone) {
    int32_t n = 0;
    for (int32_t i = 0; i < DRAWN; i++) {
        const drawn_answer *a = &run->answer[i], *b = &alone->answer[i];
        const bool left = run->leave && a->finish == FINISH_CANCEL;
        const bool alike = left ? a->n <= b->n && a->n_scored <= b->n_scored
                                : a->n == b->n && a->finish == b->finish &&
                                      a->n_scored == b->n_scored && a->seen == b->seen;
        n += !alike || memcmp(a->token, b->token, sizeof *a->token * (size_t)a->n) != 0;
    }
    return n;
}

static void drawn_work_is_answered_as_alone(void **state) {
    (void)state;
    enum { ROUNDS = 1, COMPANIES = 4 }; /* more rounds where the scheduler has changed */
    static drawn_request w[DRAWN];
    static drawn_run alone, together;
    int32_t n_preempted = 0, n_left = 0, n_cached = 0, n_first = 0;
    for (uint64_t seed = 1; seed <= ROUNDS; seed++) {
        rng r;
        rng_seed(&r, seed, 0);
        draw_requests(&r, w);
        const drawn_run one = {
            .seqs = 1, .tokens = TOKENS_MAX, .pages = 4, .no_cache = true, .lockstep = true};
        alone = one;
        run_drawn(w, &alone);
        for (int32_t i = 0; i < DRAWN; i += 2) /* ends at a token that comes, often the first */
            w[i].stop = alone.answer[i].token[rng_below(&r, (uint64_t)alone.answer[i].n)];
        alone = one;
        run_drawn(w, &alone);
        for (int32_t i = 0; i < DRAWN; i++)
            n_first += alone.answer[i].finish == FINISH_STOP && alone.answer[i].n == 1;
        for (int32_t k = 0; k < COMPANIES; k++) {
            draw_company(&r, &together);
            run_drawn(w, &together);
            const int32_t n = not_as_alone(&together, &alone);
            if (n)
                fail_msg("seed %d, company %d: %d answers are not as alone (seqs %d, tokens %d, "
                         "pages %d, whole %d, no_cache %d, lockstep %d)",
                         (int)seed, k, n, together.seqs, together.tokens, together.pages,
                         together.whole, together.no_cache, together.lockstep);
            n_preempted += together.n_preempted;
            n_left += together.n_left;
            n_cached += together.n_cached;
        }
    }
    assert_true(n_preempted > 0 && n_left > 0 && n_cached > 0 && n_first > 0);
    /* The twin: one log-probability, and one token. */
    together = alone;
    together.answer[3].seen ^= 1;
    together.answer[4].token[0]++;
    assert_int_equal(not_as_alone(&together, &alone), 2);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(the_same_tokens),
        cmocka_unit_test(the_same_ends),
        cmocka_unit_test(the_same_least_length),
        cmocka_unit_test(the_same_with_too_few_pages),
        cmocka_unit_test(company_changes_nothing),
        cmocka_unit_test(cancels_what_is_under_way),
        cmocka_unit_test(another_token_is_noticed),
        cmocka_unit_test(drawn_work_is_answered_as_alone),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
