/* test_trace.c - a recorded run replays to identical batches, a changed policy does not, and no
 * file whatever stops the program. */
#include "test.h"

#include "folder.h"
#include "json.h"
#include "rng.h"
#include "trace.h"
#include <stdlib.h>
#include <string.h>

enum { REQUESTS = 60, LONGEST = 300 };

static char path[128], other[128];

static int make_paths(void **state) {
    if (make_folder(state)) return -1;
    path_join(path, sizeof path, folder, "recorded.jsonl");
    path_join(other, sizeof other, folder, "changed.jsonl");
    return 0;
}

/* Draws depend on the tokens before them, so that a wrong replay runs away from the recording. */
static int32_t draw(const sample_row *r) {
    return (int32_t)(hash_bytes(r->history, (size_t)r->n_history * sizeof *r->history, r->draw) %
                     1000);
}

/* Batches that are out, oldest first, and when they were picked. */
typedef struct {
    batch b[2];
    int64_t at[2];
    int32_t n;
} picks;

/* Pick once; true when out->b[0] is to be committed now. */
static bool pick_some(sched *s, trace *t, bool ahead, int64_t now, rng *r, picks *out) {
    if (sched_pick(s, now, &out->b[out->n])) {
        if (ahead) trace_pick(t, &out->b[out->n], now);
        out->at[out->n++] = now;
        if (ahead && out->n == 1 && rng_below(r, 8)) return false;
    }
    return out->n > 0;
}

/* A run with sharing, preemption, cancels and stops, recorded to `path`. Every third seed picks
 * most batches ahead of commits. Returns its steps. */
static int64_t record(const sched_policy *p, uint64_t seed) {
    const bool ahead = seed % 3 == 0;
    const sched_limits l = {
        .n_pages = 14, .ctx_max = LONGEST, .n_requests = REQUESTS, .n_tokens = REQUESTS * LONGEST};
    arena mem;
    sched *s;
    trace *t;
    rng r;
    rng_seed(&r, seed, 0);
    assert_ok(arena_open(&mem, sched_bytes(p, &l)));
    assert_ok(sched_open(&s, &mem, p, &l));
    assert_ok(trace_open(&t, path, p, &l));

    int64_t now = 0, steps = 0, id = 0;
    int32_t prompt[LONGEST], drawn[REQUESTS];
    bool stop[REQUESTS];
    picks out = {.n = 0};
    for (int32_t i = 0;; i++) {
        now += (int64_t)rng_below(&r, 1000);
        for (int32_t k = 0; id < REQUESTS && k < 2 && rng_below(&r, 4) == 0; k++) {
            const int32_t n = (int32_t)rng_range(&r, 1, 200), same = (int32_t)rng_range(&r, 0, n);
            for (int32_t j = 0; j < n; j++)
                prompt[j] = j < same ? j % 7 : (int32_t)rng_below(&r, 1000);
            const request q = {.id = id++,
                               .arrival_ns = now - (int64_t)rng_below(&r, 500),
                               .prompt = prompt,
                               .n_prompt = n,
                               .score_prompt = n % 7 == 3,
                               .max_new = (int32_t)rng_range(&r, 1, 100),
                               .salt = rng_below(&r, 3) ? 0 : UINT64_MAX,
                               .sampling = SAMPLING_GREEDY};
            assert_ok(sched_add(s, &q, now));
            trace_add(t, &q, now);
        }
        if (rng_below(&r, 30) == 0) {
            const int64_t whom = rng_range(&r, 0, id);
            if (sched_cancel(s, whom, now) == ST_OK) trace_cancel(t, whom, now);
        }
        if (i == 100) {
            sched_flush_cache(s);
            trace_flush_cache(t);
        }
        if (!pick_some(s, t, ahead, now, &r, &out)) {
            if (out.n == 0 && id == REQUESTS) break;
            continue;
        }
        steps++;
        const batch b = out.b[0];
        const int64_t at = out.at[0];
        out.b[0] = out.b[1];
        out.at[0] = out.at[1];
        out.n--;
        const int64_t done = now + (int64_t)rng_below(&r, 1000);
        for (int32_t k = 0; k < b.n_samples; k++) {
            drawn[k] = draw(&b.sample[k]);
            stop[k] = rng_below(&r, 50) == 0;
        }
        trace_step(t, &b, at, drawn, stop, done);
        sched_commit(s, &b, drawn, stop, done);
        now = done;
        request_log log;
        const int32_t *token;
        while (rng_below(&r, 3) && sched_take_finished(s, &log, &token)) {
        }
    }
    assert_ok(trace_close(t));
    arena_close(&mem);
    return steps;
}

static const sched_policy chunked = {
    .token_budget = 96, .max_seqs = 8, .chunked_prefill = true, .prefix_cache = true};

static void replays_to_identical_batches(void **state) {
    (void)state;
    for (uint64_t seed = 0; seed < 12; seed++) {
        sched_policy p = chunked;
        p.chunked_prefill = seed % 4 != 3;
        p.prefix_cache = seed % 3 != 2;
        p.static_batching = seed % 5 == 4;
        p.token_budget = p.chunked_prefill ? 96 : 200;
        const int64_t steps = record(&p, seed);
        int64_t n, different;
        assert_ok(trace_replay(path, &n, &different));
        assert_true(n == steps && steps > 100);
        assert_int_equal(different, 0);
    }
}

/* file_write without its fsync, which some disks take long for. */
static void write_file(const char *data, size_t size) {
    FILE *f = fopen(other, "w");
    assert_non_null(f);
    assert_int_equal(fwrite(data, 1, size, f), size);
    assert_int_equal(fclose(f), 0);
}

static char *recorded(size_t *size) {
    char *data;
    assert_ok(file_read(&data, size, path));
    return data;
}

/* Write `data` with the first `from` replaced by `to` (of any length) and replay it. */
static status replay_changed(const char *data, const char *from, const char *to, int64_t *n,
                             int64_t *different) {
    const char *at = strstr(data, from);
    assert_non_null(at);
    text t = {0};
    text_bytes(&t, data, (size_t)(at - data));
    text_add(&t, "%s%s", to, at + strlen(from));
    assert_ok(text_status(&t));
    write_file(t.data, t.length);
    text_free(&t);
    return trace_replay(other, n, different);
}

/* The twin: a policy that differs by one, or one other token, gives other batches. */
static void a_changed_policy_gives_other_batches(void **state) {
    (void)state;
    record(&chunked, 1);
    size_t size;
    char *data = recorded(&size);
    static const struct {
        const char *from, *to;
        int64_t least; /* batches that differ */
    } change[] = {
        {"\"token_budget\":96", "\"token_budget\":95", 50},
        {"\"token_budget\":96", "\"token_budget\":97", 50},
        {"\"max_seqs\":8", "\"max_seqs\":7", 50},
        {"\"n_pages\":14", "\"n_pages\":13", 10},
        {"\"prefix_cache\":true", "\"prefix_cache\":false", 50},
        {"\"static_batching\":false", "\"static_batching\":true", 50},
        {"\"hash\":\"", "\"hash\":\"0123456789abcdef\",\"was\":\"", 1},
        {"\"score_prompt\":true", "\"score_prompt\":false", 1},
    };
    for (int32_t i = 0; i < COUNT_OF(change); i++) {
        int64_t n, different;
        assert_ok(replay_changed(data, change[i].from, change[i].to, &n, &different));
        if (different < change[i].least)
            fail_msg("%s: %lld of %lld batches differ", change[i].to, (long long)different,
                     (long long)n);
        print_message("%s: %lld of %lld batches differ\n", change[i].to, (long long)different,
                      (long long)n);
    }
    mem_free(data);

    record(&chunked, 6); /* ahead: the first hash is that of a pick */
    data = recorded(&size);
    int64_t n, different;
    assert_ok(replay_changed(data, change[6].from, change[6].to, &n, &different));
    assert_int_equal(different, 1);
    assert_ok(replay_changed(data, change[0].from, change[0].to, &n, &different));
    assert_true(different > 50);
    mem_free(data);
}

static void says_what_is_wrong_with_a_file(void **state) {
    (void)state;
    record(&chunked, 2);
    size_t size;
    char *data = recorded(&size);
    static const struct {
        const char *from, *to, *message;
    } change[] = {
        {"{\"policy\"", "{\"polizei\"", "'policy' is no object"},
        {"\"token_budget\":96", "\"token_budget\":0", "token_budget = 0 is outside"},
        {"\"token_budget\":96", "\"token_budget\":\"96\"", "'token_budget' is no integer"},
        {"\"ctx_max\":300", "\"ctx_max\":2147483647", "limits make no sense"},
        {"{\"add\":{", "{\"odd\":{", "neither add, cancel, pick"},
        {"\"prompt\":[", "\"prompt\":[-1,", "'prompt'[0] is no integer"},
        {"\"prompt\":[", "\"prompt\":[],\"was\":[", "request 0: 0 prompt"},
        {"\"id\":1,", "\"id\":0,", "request 0 is alive already"},
        {"\"hash\":\"", "\"hash\":\"x", "is not 16 hexadecimal digits"},
        {"\"tokens\":[]", "\"tokens\":[1]", "tokens and"},
        {"\"stop\":[]", "\"stop\":[7]", "no integer from 0 to 1"},
        {"\"done\"", "\"gone\"", "'done' is missing"},
        {"{\"end\":", "{\"end\":1", "steps were recorded"},
        {"{\"end\":", "{\"end\":", NULL},
        {"{\"end\":", "{\"now\":1}\n{\"end\":", "neither add"},
    };
    for (int32_t i = 0; i < COUNT_OF(change); i++) {
        int64_t n, different;
        const status st = replay_changed(data, change[i].from, change[i].to, &n, &different);
        if (!change[i].message) {
            assert_int_equal(st, ST_OK);
            continue;
        }
        if (st != ST_FORMAT || !strstr(fail_message(), change[i].message) ||
            !strstr(fail_message(), "changed.jsonl:"))
            fail_msg("%s: %s: %s", change[i].to, status_text(st), fail_message());
    }
    mem_free(data);
    int64_t n, different;
    assert_status(trace_replay("/nonexistent", &n, &different), ST_NOTFOUND);
    write_file("", 0);
    assert_status(trace_replay(other, &n, &different), ST_FORMAT);
}

/* A shorter recording for the many replays below. */
static char *short_recording(size_t *size) {
    record(&chunked, 3);
    char *data = recorded(size);
    int32_t lines = 0;
    for (size_t i = 0; i < *size; i++) {
        if (data[i] == '\n' && ++lines == 25) {
            data[ *size = i + 1] = 0;
            break;
        }
    }
    return data;
}

static void every_truncation_is_format(void **state) {
    (void)state;
    size_t size;
    char *data = short_recording(&size);
    for (size_t n = 0; n < size; n += n % 100 < 50 ? 1 : 37) {
        int64_t steps, different;
        write_file(data, n);
        assert_status(trace_replay(other, &steps, &different), ST_FORMAT);
        assert_int_equal(different, 0);
    }
    mem_free(data);
}

static void no_flipped_bit_stops_the_program(void **state) {
    (void)state;
    size_t size;
    char *data = short_recording(&size);
    rng r;
    rng_seed(&r, 99, 0);
    int32_t count[ST_COUNT] = {0};
    for (int32_t i = 0; i < 1500; i++) {
        /* Half of them in the first line: limits are what sizes memory. */
        const size_t at = (size_t)rng_below(&r, i % 2 ? 200 : size);
        const char was = data[at];
        data[at] = (char)(was ^ 1 << rng_below(&r, 8));
        int64_t steps, different;
        write_file(data, size);
        const status st = trace_replay(other, &steps, &different);
        data[at] = was;
        assert_true(st == ST_FORMAT || st == ST_NOMEM);
        count[st]++;
    }
    assert_true(count[ST_FORMAT] > 1000);
    mem_free(data);
}

static void survives_every_refused_allocation(void **state) {
    (void)state;
    record(&chunked, 4);
    for (int64_t k = 1;; k++) {
        int64_t n, different;
        mem_fail_at(k);
        const status st = trace_replay(path, &n, &different);
        mem_fail_at(0);
        if (st == ST_OK) break;
        assert_int_equal(st, ST_NOMEM);
        assert_true(k < 200);
    }
    trace *t;
    const sched_limits l = {.n_pages = 1};
    mem_fail_at(1);
    assert_status(trace_open(&t, other, &chunked, &l), ST_NOMEM);
    mem_fail_at(0);
    assert_null(t);
}

static void a_full_disk_is_an_error(void **state) {
    (void)state;
    trace *t;
    const sched_limits l = {.n_pages = 1};
    assert_status(trace_open(&t, "/nonexistent/trace", &chunked, &l), ST_IO);
    if (!file_exists("/dev/full")) skip();
    assert_ok(trace_open(&t, "/dev/full", &chunked, &l));
    assert_status(trace_close(t), ST_IO);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(replays_to_identical_batches),
        cmocka_unit_test(a_changed_policy_gives_other_batches),
        cmocka_unit_test(says_what_is_wrong_with_a_file),
        cmocka_unit_test(every_truncation_is_format),
        cmocka_unit_test(no_flipped_bit_stops_the_program),
        cmocka_unit_test(survives_every_refused_allocation),
        cmocka_unit_test(a_full_disk_is_an_error),
    };
    return cmocka_run_group_tests_name("trace", tests, make_paths, remove_folder);
}
