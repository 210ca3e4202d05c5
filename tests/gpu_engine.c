/* gpu_engine.c - the engine on the cuda device, steps ahead against lockstep: the same tokens, the
 * pool empty at the end. And the time of a step, which nothing judges:
 *
 *     gpu_engine time MODEL PRECISION SEQS [TP]
 *
 * prints us a decode step of the whole loop, both ways, for hooks of 0, 1 and 4 us a token, and
 * with penalties; synthetic weights.
 *
 * All requests start together and are as long, so that both ways run the same batches; company may
 * change the last bits of a row. */
#include "gpu_test.h"

#include "engine.h"

enum { SEQS_MAX = 256, NEW = 120, PROMPT = 40 };

typedef struct {
    int32_t token[SEQS_MAX][NEW], n[SEQS_MAX];
    int32_t n_scored[SEQS_MAX]; /* of the prompt, the first not being one */
    float scored[SEQS_MAX][PROMPT];
    finish_reason finish[SEQS_MAX];
    int64_t busy_ns;              /* that the hook takes for a token */
    int64_t decode_ns, n_decodes; /* wall clock of all steps but the first */
} outputs;

static bool on_token(void *user, int64_t id, const sampled *s, bool ends, int64_t now_ns) {
    outputs *o = user;
    (void)ends;
    (void)now_ns;
    if (o->n[id] == NEW) fail_msg("request %d goes on beyond its end", (int)id);
    o->token[id][o->n[id]++] = s->token;
    for (const int64_t start = timeline_monotonic_ns();
         timeline_monotonic_ns() - start < o->busy_ns;) {
    }
    return false;
}

/* Ascending from the second token of the prompt on, before the first one drawn. */
static void on_scored(void *user, int64_t id, int32_t at, const sampled *s) {
    outputs *o = user;
    if (o->n[id] || at != ++o->n_scored[id]) fail_msg("token %d of a prompt is scored", at);
    assert_true(s->logprob <= 0 && s->n_top > 0);
    o->scored[id][at] = s->logprob;
}

static engine_options options_of(const char *model, const char *format, bool lockstep,
                                 bool synthetic, int32_t seqs, int32_t tp) {
    engine_options o = ENGINE_OPTIONS_DEFAULT;
    o.model = model;
    o.precision = format;
    o.device = "cuda";
    o.synthetic = synthetic;
    o.device_options.lockstep = lockstep;
    o.device_options.tp = tp;
    o.policy.max_seqs = seqs;
    o.policy.token_budget = 4096;
    o.ctx_max = 256;
    return o;
}

/* Requests 0 .. n - 1 to their ends. stop: a token that ends a request, or -1. */
static void run(engine *e, int32_t n, const sampling *how, int32_t stop, outputs *o) {
    static int32_t prompt[PROMPT];
    const int32_t vocab = engine_config(e)->vocab;
    memset(o->n, 0, sizeof o->n);
    memset(o->n_scored, 0, sizeof o->n_scored);
    o->n_decodes = -1;
    int64_t first = 0;
    engine_set_hooks(e, &(engine_hooks){.user = o, .token = on_token, .scored = on_scored});
    assert_ok(engine_reset(e));
    for (int32_t i = 0; i < n; i++) {
        for (int32_t k = 0; k < PROMPT; k++) prompt[k] = (i * 131 + k * k * 17 + 3) % vocab;
        const request r = {.id = i,
                           .arrival_ns = i,
                           .prompt = prompt,
                           .n_prompt = PROMPT - i % 7,
                           .max_new = NEW,
                           .ignore_eos = true,
                           .score_prompt = how->n_logprobs >= 0,
                           .sampling = *how,
                           .stop_token = &stop,
                           .n_stop_tokens = stop >= 0,
                           .user = -1};
        assert_ok(engine_submit(e, &r));
    }
    request_log log;
    const int32_t *token;
    for (int32_t done = 0; done < n;) {
        bool ran;
        assert_ok(engine_step(e, &ran));
        assert_true(ran);
        if (o->n_decodes++ < 0) first = timeline_monotonic_ns();
        while (sched_take_finished(engine_sched(e), &log, &token)) {
            assert_int_equal(log.n_output, o->n[log.id]);
            assert_int_equal(o->n_scored[log.id], how->n_logprobs < 0 ? 0 : log.n_prompt - 1);
            o->finish[log.id] = log.finish;
            done++;
        }
    }
    o->decode_ns = timeline_monotonic_ns() - first;
    assert_ok(engine_settle(e));
    assert_int_equal(kvpool_held(sched_pool(engine_sched(e))), 0);
}

static outputs ahead, behind;

static int32_t differing(int32_t n) {
    int32_t differ = 0;
    for (int32_t i = 0; i < n; i++)
        differ += ahead.n[i] != behind.n[i] || ahead.n_scored[i] != behind.n_scored[i] ||
                  memcmp(ahead.scored[i], behind.scored[i],
                         sizeof(float) * (size_t)(ahead.n_scored[i] + 1)) ||
                  memcmp(ahead.token[i], behind.token[i], sizeof(int32_t) * (size_t)ahead.n[i]);
    return differ;
}

static void both(const char *format, const sampling *how, int32_t stop, int32_t n) {
    for (int lockstep = 0; lockstep < 2; lockstep++) {
        const engine_options o = options_of("workloads/tiny", format, lockstep != 0, false, n, 1);
        engine *e;
        assert_ok(engine_open(&e, &o, NULL, NULL));
        run(e, n, how, stop, lockstep ? &behind : &ahead);
        engine_close(e);
    }
}

static const sampling greedy = {.top_p = 1, .repetition_penalty = 1, .n_logprobs = -1};

static const logit_bias bias[] = {{7, 1.5f}, {900, -100}};
static const sampling biased = {.temperature = 0.9f,
                                .top_p = 1,
                                .repetition_penalty = 1,
                                .n_bias = 2,
                                .bias = bias,
                                .min_tokens = 30,
                                .n_logprobs = 2};

static void compare_sizes(const sampling *how) {
    static const int32_t sizes[] = {1, 5, 16};
    for (int k = 0; k < COUNT_OF(sizes); k++) {
        both("W16A16KV16", how, -1, sizes[k]);
        assert_int_equal(differing(sizes[k]), 0);
    }
}

static void the_same_tokens(void **state) {
    (void)state;
    static const sampling drawn = {
        .temperature = 0.9f, .top_p = 0.95f, .repetition_penalty = 1, .seed = 5, .n_logprobs = 2};
    compare_sizes(&greedy);
    compare_sizes(&drawn);
    compare_sizes(&biased);
    both("W16A16KV16", &greedy, -1, 16);
    ahead.token[3][50] ^= 1; /* twin */
    assert_int_equal(differing(16), 1);
}

/* The last token of a history is on the device alone when a step ahead is made. */
static void the_same_penalised_tokens(void **state) {
    (void)state;
    static const sampling penalised = {
        .top_p = 1, .repetition_penalty = 1.3f, .seed = 5, .n_logprobs = -1};
    sampling all = biased;
    all.repetition_penalty = 1.1f;
    all.presence_penalty = 0.3f;
    all.frequency_penalty = 0.2f;
    compare_sizes(&penalised);
    compare_sizes(&all);
    ahead.token[3][50] ^= 1; /* twin */
    assert_int_equal(differing(16), 1);
}

/* What goes beyond its stop is dropped. Up to the first stop the company is the same, so tokens
 * are; then a near-tie may fall otherwise. */
static void stops_are_seen_late(void **state) {
    (void)state;
    enum { N = 16 };
    both("W16A16KV16", &greedy, -1, N);
    const int32_t stop = behind.token[0][NEW / 2];
    int32_t stopped = 0, common = NEW;
    both("W16A16KV16", &greedy, stop, N);
    for (int32_t i = 0; i < N; i++) {
        const int32_t n = ahead.n[i];
        for (int32_t k = 0; k < n - 1; k++) assert_int_not_equal(ahead.token[i][k], stop);
        assert_true((ahead.finish[i] == FINISH_STOP) == (ahead.token[i][n - 1] == stop));
        assert_true(ahead.finish[i] == FINISH_STOP || n == NEW);
        stopped += ahead.finish[i] == FINISH_STOP;
        if (n < common) common = n;
    }
    for (int32_t i = 0; i < N; i++)
        assert_memory_equal(ahead.token[i], behind.token[i], sizeof(int32_t) * (size_t)common);
    assert_true(stopped > 0 && common > 1);
    print_message("%d of %d stopped, the first after %d; %d differ from lockstep\n", stopped, N,
                  common, differing(N));
}

/* The stop is not drawn before its time, and a step that runs ahead knows when that is. */
static void a_stop_is_barred(void **state) {
    (void)state;
    enum { N = 5 };
    sampling how = greedy;
    both("W16A16KV16", &how, -1, N);
    const int32_t stop = behind.token[0][2];
    both("W16A16KV16", &how, stop, N);
    assert_true(ahead.n[0] <= 3); /* twin */
    how.min_tokens = NEW / 2;
    both("W16A16KV16", &how, stop, N);
    assert_int_equal(differing(N), 0);
    for (int32_t i = 0; i < N; i++) {
        assert_true(ahead.n[i] > NEW / 2);
        for (int32_t k = 0; k < NEW / 2; k++) assert_int_not_equal(ahead.token[i][k], stop);
    }
}

/* A warmed engine gives the tokens of a cold one; the time of a first run is there to be read. */
static void warming_changes_no_token(void **state) {
    (void)state;
    enum { N = 16 };
    int64_t ns[2];
    for (int warm = 0; warm < 2; warm++) {
        const engine_options o = options_of("workloads/tiny", "W4A16KV8", false, false, N, 1);
        engine *e;
        assert_ok(engine_open(&e, &o, NULL, NULL));
        if (warm) assert_ok(engine_warm(e));
        const int64_t start = timeline_monotonic_ns();
        run(e, N, &greedy, -1, warm ? &ahead : &behind);
        ns[warm] = timeline_monotonic_ns() - start;
        engine_close(e);
    }
    assert_int_equal(differing(N), 0);
    ahead.token[N - 1][0] ^= 1; /* twin */
    assert_int_equal(differing(N), 1);
    print_message("first run cold %.1f ms, warmed %.1f ms\n", (double)ns[0] * 1e-6,
                  (double)ns[1] * 1e-6);
}

static int time_steps(const char *model, const char *format, int32_t seqs, int32_t tp) {
    static const int64_t busy[] = {0, 1000, 4000, 0};
    static const sampling penalised = {
        .top_p = 1, .repetition_penalty = 1.1f, .frequency_penalty = 0.2f, .n_logprobs = -1};
    for (int lockstep = 0; lockstep < 2; lockstep++) {
        const engine_options o = options_of(model, format, lockstep != 0, true, seqs, tp);
        engine *e;
        if (engine_open(&e, &o, NULL, NULL) != ST_OK) {
            printf("%s\n", fail_message());
            return 1;
        }
        outputs *out = lockstep ? &behind : &ahead;
        for (int i = 0; i < COUNT_OF(busy); i++) {
            const sampling *how = i == 3 ? &penalised : &greedy;
            out->busy_ns = busy[i];
            run(e, seqs, how, -1, out); /* graphs and kernels are there from the second on */
            run(e, seqs, how, -1, out);
            printf("%s %s tp %d, %d running, %s, hook %d us a token%s: %.1f us a step\n", model,
                   format, tp, seqs, lockstep ? "lockstep" : "ahead", (int)busy[i] / 1000,
                   i == 3 ? ", penalties" : "",
                   (double)out->decode_ns * 1e-3 / (double)out->n_decodes);
        }
        engine_close(e);
    }
    printf("%d of %d outputs differ\n", differing(seqs), seqs);
    return 0;
}

int main(int argc, char **argv) {
    int result;
    if (gpu_missing(&result)) return result;
    int64_t seqs, tp = 1;
    if (argc >= 5 && parse_i64(argv[4], 1, SEQS_MAX, &seqs) &&
        (argc == 5 || parse_i64(argv[5], 1, 8, &tp)))
        return time_steps(argv[2], argv[3], (int32_t)seqs, (int32_t)tp);
    if (argc == 2) cmocka_set_test_filter(argv[1]);
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(the_same_tokens),          cmocka_unit_test(the_same_penalised_tokens),
        cmocka_unit_test(stops_are_seen_late),      cmocka_unit_test(a_stop_is_barred),
        cmocka_unit_test(warming_changes_no_token),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
