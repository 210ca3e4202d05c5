/* test_metrics.c - every metric of a run small enough for pencil and paper. */
#include "test.h"

#include "metrics.h"
#include "rng.h"
#include "vllm_keys.h"
#include <stdlib.h>
#include <string.h>

#define MS 1000000

/* Six requests: three that ended, one refused, one cancelled, one still running. */
static int64_t tokens0[] = {10 * MS, 20 * MS, 40 * MS};
static int64_t tokens1[] = {30 * MS};
static int64_t tokens2[] = {50 * MS, 60 * MS, 70 * MS, 100 * MS};

static void six(request_log log[6]) {
    log[0] = (request_log){.arrival_ns = 0,
                           .dispatch_ns = 1 * MS,
                           .admit_ns = 2 * MS,
                           .first_token_ns = 10 * MS,
                           .finish_ns = 40 * MS,
                           .token_ns = tokens0,
                           .n_prompt = 100,
                           .n_output = 3,
                           .n_cached = 64,
                           .finish = FINISH_LENGTH};
    log[1] = (request_log){.arrival_ns = 5 * MS,
                           .dispatch_ns = 5 * MS,
                           .admit_ns = 12 * MS,
                           .first_token_ns = 30 * MS,
                           .finish_ns = 30 * MS,
                           .token_ns = tokens1,
                           .n_prompt = 50,
                           .n_output = 1,
                           .finish = FINISH_STOP};
    log[2] = (request_log){.arrival_ns = 20 * MS,
                           .dispatch_ns = 22 * MS,
                           .admit_ns = 25 * MS,
                           .first_token_ns = 50 * MS,
                           .finish_ns = 100 * MS,
                           .token_ns = tokens2,
                           .n_prompt = 10,
                           .n_output = 4,
                           .n_preempted = 2,
                           .finish = FINISH_LENGTH};
    log[3] = (request_log){.arrival_ns = 0, .finish_ns = 900 * MS, .finish = FINISH_REFUSED};
    log[4] = (request_log){.n_preempted = 1, .n_output = 7, .finish = FINISH_CANCEL};
    log[5] = (request_log){.n_output = 7, .finish = FINISH_NONE};
}

static void assert_summary(const metric_summary *m, double mean, double p50, double p90, double p99,
                           double max, int64_t n) {
    assert_close(m->mean, mean, 1e-12);
    assert_close(m->p50, p50, 1e-12);
    assert_close(m->p90, p90, 1e-12);
    assert_close(m->p99, p99, 1e-12);
    assert_close(m->max, max, 1e-12);
    assert_int_equal(m->n, n);
}

static void a_run_by_pencil(void **state) {
    (void)state;
    request_log log[6];
    six(log);
    metrics m;
    assert_ok(metrics_compute(&m, log, 6, NULL));
    assert_int_equal(m.n_completed, 3);
    assert_int_equal(m.n_refused, 1);
    assert_int_equal(m.n_cancelled, 1);
    assert_int_equal(m.n_preemptions, 3);
    assert_int_equal(m.prompt_tokens, 160);
    assert_int_equal(m.output_tokens, 8);
    assert_int_equal(m.cached_tokens, 64);
    assert_close(m.duration_s, 0.1, 1e-15);
    assert_close(m.requests_per_s, 30, 1e-9);
    assert_close(m.output_tokens_per_s, 80, 1e-9);
    assert_close(m.total_tokens_per_s, 1680, 1e-9);
    assert_summary(&m.ttft, 0.065 / 3, 0.025, 0.029, 0.0299, 0.030, 3);
    assert_close(m.ttft.std, sqrt(650.0 / 9) * 1e-3, 1e-12); /* 10, 25, 30: population */
    assert_summary(&m.ttft_dispatch, 0.062 / 3, 0.025, 0.0274, 0.02794, 0.028, 3);
    assert_summary(&m.tpot, (15 + 50.0 / 3) / 2 * 1e-3, (15 + 50.0 / 3) / 2 * 1e-3,
                   (15 + 0.9 * 5 / 3) * 1e-3, (15 + 0.99 * 5 / 3) * 1e-3, 0.05 / 3, 2);
    assert_summary(&m.itl, 0.016, 0.010, 0.026, 0.0296, 0.030, 5); /* 10 10 10 20 30 */
    assert_summary(&m.e2e, 0.145 / 3, 0.040, 0.072, 0.0792, 0.080, 3);
    assert_summary(&m.e2e_dispatch, 0.142 / 3, 0.039, 0.0702, 0.07722, 0.078, 3);
    assert_summary(&m.queue, 0.014 / 3, 0.005, 0.0066, 0.00696, 0.007, 3);
    assert_close(m.lag_p99_s, 0.00198, 1e-12);
    assert_close(m.mean_concurrency, 1.45, 1e-12);
    assert_int_equal(m.max_concurrency, 3);
    assert_close(m.max_output_tokens_per_s, 8, 0);
    assert_true(isnan(m.goodput_per_s));
    assert_true(isnan(m.steady_output_tokens_per_s));
}

/* The twin of the above: each instant moved by a microsecond shows where it should and only
 * there. */
static void one_instant_moves_one_metric(void **state) {
    (void)state;
    request_log log[6];
    metrics was, m;
    six(log);
    assert_ok(metrics_compute(&was, log, 6, NULL));
    log[1].admit_ns += 1000;
    assert_ok(metrics_compute(&m, log, 6, NULL));
    assert_close(m.queue.mean - was.queue.mean, 1e-6 / 3, 1e-12);
    assert_true(m.e2e.mean == was.e2e.mean && m.itl.mean == was.itl.mean);
    six(log);
    tokens0[1] += 1000;
    assert_ok(metrics_compute(&m, log, 6, NULL));
    tokens0[1] -= 1000;
    assert_true(fabs(m.itl.std - was.itl.std) > 1e-8);
    assert_true(m.tpot.mean == was.tpot.mean);
    log[2].finish_ns += 1000;
    assert_ok(metrics_compute(&m, log, 6, NULL));
    assert_close(m.e2e.mean - was.e2e.mean, 1e-6 / 3, 1e-12);
    assert_close(m.tpot.max - was.tpot.max, 1e-6 / 3, 1e-12);
    assert_close(m.duration_s - was.duration_s, 1e-6, 1e-12);
    six(log);
    log[0].finish = FINISH_CANCEL;
    assert_ok(metrics_compute(&m, log, 6, NULL));
    assert_int_equal(m.n_completed, 2);
    assert_close(m.duration_s, 0.095, 1e-12); /* the first arrival is another */
}

static void goodput_counts_requests_within_all_limits(void **state) {
    (void)state;
    request_log log[6];
    six(log);
    static const struct {
        metric_limits limits;
        double want;
    } rows[] = {
        {{.ttft_s = 0.026}, 20},
        {{.ttft_s = 0.025}, 20}, /* at the limit is within */
        {{.ttft_s = 0.0249}, 10},
        {{.tpot_s = 0.016}, 20}, /* one token: no time per further token */
        {{.e2e_s = 0.03}, 10},
        {{.ttft_s = 0.02, .tpot_s = 0.0149}, 0},
        {{.ttft_s = 1, .tpot_s = 1, .e2e_s = 1}, 30},
    };
    for (int i = 0; i < COUNT_OF(rows); i++) {
        metrics m;
        assert_ok(metrics_compute(&m, log, 6, &rows[i].limits));
        assert_close(m.goodput_per_s, rows[i].want, 1e-9);
    }
}

static void the_steady_rate_leaves_out_both_ends(void **state) {
    (void)state;
    request_log log[20];
    int64_t instant[20];
    for (int i = 0; i < 20; i++) { /* one token a second, but the last four at once */
        instant[i] = (i < 16 ? i + 1 : 17) * (int64_t)1000 * MS;
        log[i] = (request_log){.arrival_ns = 0,
                               .first_token_ns = instant[i],
                               .finish_ns = instant[i],
                               .token_ns = &instant[i],
                               .n_prompt = 1,
                               .n_output = 1,
                               .finish = FINISH_STOP};
    }
    metrics m;
    assert_ok(metrics_compute(&m, log, 20, NULL));
    assert_close(m.steady_output_tokens_per_s, 18.0 / 15, 1e-12); /* (2 s, 17 s] */
    assert_close(m.max_output_tokens_per_s, 4, 0);
    assert_int_equal(m.max_concurrency, 20);
    for (int i = 0; i < 20; i++) log[i].arrival_ns = instant[i] - 1000 * MS;
    assert_ok(metrics_compute(&m, log, 20, NULL));
    assert_int_equal(m.max_concurrency, 4); /* departures before arrivals at a tie */
}

static void an_empty_run_has_no_latencies(void **state) {
    (void)state;
    metrics m;
    assert_ok(metrics_compute(&m, NULL, 0, NULL));
    assert_int_equal(m.n_completed, 0);
    assert_true(isnan(m.ttft.p50) && isnan(m.itl.mean) && isnan(m.output_tokens_per_s));
    json_t *o = json_object();
    assert_ok(metrics_json(&m, o));
    assert_null(json_object_get(o, "ttft_p50_ms"));
    assert_int_equal(json_integer_value(json_object_get(o, "ttft_n")), 0);
    json_decref(o);
}

static int order(const void *a, const void *b) {
    const double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

static void percentiles_are_those_of_a_sorted_array(void **state) {
    (void)state;
    rng r;
    rng_seed(&r, 3, 0);
    static double v[2000], sorted[2000];
    for (int round = 0; round < 300; round++) {
        const int64_t n = rng_range(&r, 1, round < 200 ? 12 : 2000);
        const uint64_t kinds = round % 2 ? 4 : 1000000; /* many equal values; few */
        for (int64_t i = 0; i < n; i++) sorted[i] = v[i] = (double)rng_below(&r, kinds) / 7;
        qsort(sorted, (size_t)n, sizeof *v, order);
        const double p = round % 5 ? rng_unit(&r) : (double)(round % 3) / 2;
        const double at = p * (double)(n - 1), t = at - floor(at);
        const double lo = sorted[(int64_t)floor(at)], hi = sorted[(int64_t)ceil(at)];
        const double want = t >= 0.5 ? hi - (hi - lo) * (1 - t) : lo + (hi - lo) * t;
        assert_true(percentile(v, n, p) == want);
        qsort(v, (size_t)n, sizeof *v, order); /* a permutation of what it was */
        assert_memory_equal(v, sorted, (size_t)n * sizeof *v);
        /* The twin: the largest value raised moves the maximum and nothing below the last gap. */
        v[n - 1] += 1;
        assert_true(percentile(v, n, 1) == sorted[n - 1] + 1);
    }
    double four[] = {40, 10, 30, 20};
    assert_close(percentile(four, 4, 0.25), 17.5, 0);
    double bad[] = {1, NAN, 2};
    assert_true(isnan(percentile(bad, 3, 0.5)));
    assert_true(isnan(percentile(bad, 0, 0.5)));
}

static double number(const json_t *o, const char *key) {
    const json_t *v = json_object_get(o, key);
    if (!json_is_number(v)) fail_msg("no number '%s'", key);
    return json_number_value(v);
}

static void json_has_units_and_vllm_its_own_names(void **state) {
    (void)state;
    request_log log[6];
    six(log);
    metrics m;
    const metric_limits limits = {.ttft_s = 0.026};
    assert_ok(metrics_compute(&m, log, 6, &limits));
    json_t *o = json_object(), *v = json_object();
    assert_ok(metrics_json(&m, o));
    assert_close(number(o, "ttft_p50_ms"), 25, 1e-9);
    assert_close(number(o, "itl_p99_ms"), 29.6, 1e-9);
    assert_close(number(o, "output_tokens_per_s"), 80, 1e-9);
    assert_close(number(o, "goodput_per_s"), 20, 1e-9);
    assert_null(json_object_get(o, "steady_output_tokens_per_s"));
    assert_ok(metrics_json_vllm(&m, v));
    for (int i = 0; i < COUNT_OF(vllm_keys); i++) number(v, vllm_keys[i]);
    assert_close(number(v, "mean_ttft_ms"), 62.0 / 3,
                 1e-9); /* from dispatch, as its client sees it */
    assert_close(number(v, "median_e2el_ms"), 39, 1e-9);
    assert_close(number(v, "failed"), 2, 0);
    json_decref(o);
    json_decref(v);
    assert_ok(metrics_compute(&m, log, 6, NULL));
    v = json_object();
    assert_ok(metrics_json_vllm(&m, v));
    assert_true(json_is_null(json_object_get(v, "request_goodput")));
    json_decref(v);
}

/* By dispatch 9, 25 and 28 ms to the first token and 39, 25 and 78 to the last; by arrival 10, 25
 * and 30, 40, 25 and 80. */
static void vllm_counts_good_requests_from_dispatch(void **state) {
    (void)state;
    request_log log[6];
    six(log);
    const struct {
        metric_limits limits;
        double arrival, dispatch;
    } rows[] = {{{.ttft_s = 0.0095}, 0, 10},
                {{.ttft_s = 0.029}, 20, 30},
                {{.e2e_s = 0.0395}, 10, 20},
                {{.ttft_s = 0.029, .e2e_s = 0.079, .tpot_s = 0.016}, 20, 20}};
    for (int32_t i = 0; i < COUNT_OF(rows); i++) {
        metrics m;
        assert_ok(metrics_compute(&m, log, 6, &rows[i].limits));
        assert_close(m.goodput_per_s, rows[i].arrival, 1e-9);
        assert_close(m.goodput_dispatch_per_s, rows[i].dispatch, 1e-9);
        json_t *v = json_object();
        assert_ok(metrics_json_vllm(&m, v));
        assert_close(number(v, "request_goodput"), rows[i].dispatch, 1e-9);
        json_decref(v);
    }
}

static double entry(const json_t *o, const char *key, size_t i) {
    return json_number_value(json_array_get(json_object_get(o, key), i));
}

static void requests_are_listed_as_they_were(void **state) {
    (void)state;
    request_log log[6];
    six(log);
    json_t *v = json_object();
    assert_ok(metrics_json_requests(log, 6, v));
    const struct {
        const char *key;
        double want[4]; /* of requests 0 to 3 */
    } rows[] = {{"input_lens", {100, 50, 10, 0}},       {"output_lens", {3, 1, 4, 0}},
                {"ttfts", {0.009, 0.025, 0.028, 0}},    {"latencies", {0.039, 0.025, 0.078, 0}},
                {"start_times", {0.001, 0.005, 0.022}}, {"amalgam_arrivals", {0, 0.005, 0.020}}};
    for (int32_t i = 0; i < COUNT_OF(rows); i++) {
        assert_int_equal(json_array_size(json_object_get(v, rows[i].key)), 6);
        for (size_t k = 0; k < 4; k++)
            assert_close(entry(v, rows[i].key, k), rows[i].want[k], 1e-12);
    }
    const json_t *gaps = json_object_get(v, "itls");
    const size_t n_gaps[6] = {2, 0, 3, 0, 0, 0};
    for (size_t k = 0; k < 6; k++)
        assert_int_equal(json_array_size(json_array_get(gaps, k)), n_gaps[k]);
    assert_close(json_number_value(json_array_get(json_array_get(gaps, 2), 2)), 0.030, 1e-12);
    const json_t *errors = json_object_get(v, "errors");
    assert_string_equal(json_string_value(json_array_get(errors, 2)), "");
    assert_string_equal(json_string_value(json_array_get(errors, 3)), "refused");
    assert_string_equal(json_string_value(json_array_get(errors, 4)), "cancel");
    json_decref(v);
}

/* What a server answers is quoted by 150 bytes: they may end within a character. */
static void a_reason_may_be_any_bytes(void **state) {
    (void)state;
    request_log log[6];
    six(log);
    log[3].reason = "HTTP 500: \xff caf\xc3";
    json_t *v = json_object();
    assert_ok(metrics_json_requests(log, 6, v));
    assert_string_equal(json_string_value(json_array_get(json_object_get(v, "errors"), 3)),
                        "HTTP 500: \xef\xbf\xbd caf\xef\xbf\xbd");
    json_decref(v);
}

static void *count_malloc(size_t n) { return mem_alloc(n, 1); }

/* A list of fewer gaps than a request had would be a wrong result. */
static void lists_are_whole_or_refused(void **state) {
    (void)state;
    enum { TOKENS = 100 };
    static int64_t tokens[TOKENS];
    for (int32_t i = 0; i < TOKENS; i++) tokens[i] = (10 + i) * MS;
    request_log log[6];
    six(log);
    log[0].token_ns = tokens;
    log[0].n_output = TOKENS;
    log[3].reason = "refused by the server";
    json_set_alloc_funcs(count_malloc, mem_free);
    status st = ST_NOMEM;
    int64_t n = 1;
    for (; st != ST_OK; n++) {
        json_t *v = json_object();
        mem_fail_at(n);
        st = metrics_json_requests(log, 6, v);
        mem_fail_at(0);
        if (st != ST_OK)
            assert_int_equal(st, ST_NOMEM);
        else
            assert_int_equal(json_array_size(json_array_get(json_object_get(v, "itls"), 0)),
                             TOKENS - 1);
        json_decref(v);
    }
    json_set_alloc_funcs(malloc, free);
    assert_true(n > TOKENS);
}

static void every_allocation_may_fail(void **state) {
    (void)state;
    request_log log[6];
    six(log);
    int64_t n = 1;
    for (;; n++) {
        metrics m;
        mem_fail_at(n);
        const status st = metrics_compute(&m, log, 6, NULL);
        mem_fail_at(0);
        if (st == ST_OK) break;
        assert_int_equal(st, ST_NOMEM);
    }
    assert_int_equal(n, 5);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(a_run_by_pencil),
        cmocka_unit_test(one_instant_moves_one_metric),
        cmocka_unit_test(goodput_counts_requests_within_all_limits),
        cmocka_unit_test(the_steady_rate_leaves_out_both_ends),
        cmocka_unit_test(an_empty_run_has_no_latencies),
        cmocka_unit_test(percentiles_are_those_of_a_sorted_array),
        cmocka_unit_test(json_has_units_and_vllm_its_own_names),
        cmocka_unit_test(vllm_counts_good_requests_from_dispatch),
        cmocka_unit_test(requests_are_listed_as_they_were),
        cmocka_unit_test(a_reason_may_be_any_bytes),
        cmocka_unit_test(lists_are_whole_or_refused),
        cmocka_unit_test(every_allocation_may_fail),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
