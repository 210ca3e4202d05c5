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

#include <string.h>

enum { N = 12, NEW = 24, LONGEST = 150, SEQS = 8, TOKENS = 64, TOKENS_MAX = 128 };

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
    options.ctx_max = LONGEST;
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
    const conditions companies[] = {{.tokens = 9},
                                    {.whole = true, .tokens = TOKENS_MAX},
                                    {.seqs = 3, .tokens = 17},
                                    {.pages = 7},
                                    {.pages = 5, .tokens = 11},
                                    {.no_cache = true, .pages = 7},
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

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(the_same_tokens),          cmocka_unit_test(the_same_ends),
        cmocka_unit_test(the_same_least_length),    cmocka_unit_test(the_same_with_too_few_pages),
        cmocka_unit_test(company_changes_nothing),  cmocka_unit_test(cancels_what_is_under_way),
        cmocka_unit_test(another_token_is_noticed),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
