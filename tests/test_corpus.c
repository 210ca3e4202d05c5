/* test_corpus.c - the generator of text and tasks: the same bytes everywhere, right answers, and a
 * held-out side that training never sees. */
#include "test.h"

#include "cli.h"
#include "corpus.h"

#include <stdlib.h>
#include <string.h>

static const uint64_t held_out = CORPUS_SEED_HELD_OUT;

/* --- Text ------------------------------------------------------------------------------------- */

static uint64_t text_hash(uint64_t seed, size_t bytes) {
    text t = {0};
    assert_ok(corpus_text(&t, NULL, seed, bytes));
    assert_true(t.length >= bytes);
    const uint64_t h = hash_bytes(t.data, bytes, 0);
    text_free(&t);
    return h;
}

/* The checkpoint was trained on these bytes: another value here means another corpus. */
static void the_first_megabyte_is_pinned(void **state) {
    (void)state;
    assert_int_equal(text_hash(1, 1 << 20), 0x6c64bf128f1e34du);
    assert_int_equal(text_hash(held_out, 1 << 20), 0xb23d376fa9a5569au);
}

static void seeds_differ_and_repeat(void **state) {
    (void)state;
    for (uint64_t seed = 0; seed < 20; seed++) {
        assert_int_equal(text_hash(seed, 4096), text_hash(seed, 4096));
        assert_int_not_equal(text_hash(seed, 4096), text_hash(seed + 1, 4096));
    }
}

static void a_text_is_its_documents_each_followed_by_the_end(void **state) {
    (void)state;
    for (int32_t k = 0; k < CORPUS_KIND_COUNT; k++) {
        const corpus_kind kind = (corpus_kind)k;
        text all = {0}, parts = {0};
        assert_ok(corpus_text(&all, &kind, 5, 20000));
        for (int64_t i = 0; parts.length < 20000; i++) {
            assert_ok(corpus_document(&parts, kind, 5, i));
            assert_int_equal(parts.data[parts.length - 1], '\n');
            text_add(&parts, "%s", CORPUS_END);
        }
        assert_string_equal(all.data, parts.data);
        text_free(&all);
        text_free(&parts);
    }
    text none = {0};
    assert_ok(corpus_text(&none, NULL, 5, 0));
    assert_int_equal(none.length, 0);
}

static int count(const char *s, const char *what) {
    int n = 0;
    for (const char *at = strstr(s, what); at; at = strstr(at + 1, what)) n++;
    return n;
}

static void documents_are_clean(void **state) {
    (void)state;
    for (int32_t k = 0; k < CORPUS_KIND_COUNT; k++) {
        for (int64_t i = 0; i < 1000; i++) {
            text t = {0};
            assert_ok(corpus_document(&t, (corpus_kind)k, 3, i));
            for (size_t c = 0; c < t.length; c++)
                if ((t.data[c] < ' ' && t.data[c] != '\n') || t.data[c] > '~')
                    fail_msg("byte %d in document %lld", t.data[c], (long long)i);
            assert_null(strpbrk(t.data, "{}@^"));
            assert_null(strstr(t.data, "  "));
            assert_null(strstr(t.data, " a apple "));
            assert_null(strstr(t.data, " an bun"));
            const int turns = count(t.data, CORPUS_TURN);
            assert_int_equal(turns, count(t.data, CORPUS_TURN_OVER "\n"));
            assert_int_equal(turns > 0, k == CORPUS_CHAT);
            assert_int_equal(turns, count(t.data, CORPUS_TURN "user\n") +
                                        count(t.data, CORPUS_TURN "assistant\n"));
            text_free(&t);
        }
    }
}

/* --- Arithmetic ------------------------------------------------------------------------------- */

static long long compute(long long a, char op, long long b) {
    return op == '+' ? a + b : op == '-' ? a - b : a * b;
}

/* Every line of the worksheets of a seed, recomputed. Returns how many had two long operands. */
static int64_t check_worksheets(uint64_t seed) {
    text t = {0};
    for (int64_t i = 0; i < 400; i++) assert_ok(corpus_document(&t, CORPUS_ARITHMETIC, seed, i));
    int64_t n_long = 0;
    for (char *line = strtok(t.data, "\n"); line; line = strtok(NULL, "\n")) {
        long long a, b, result;
        char op, end;
        assert_int_equal(sscanf(line, "%lld %c %lld = %lld%c", &a, &op, &b, &result, &end), 4);
        assert_int_equal(result, compute(a, op, b));
        assert_true(result >= 0);
        if (a < 10 || b < 10) continue;
        assert_int_equal(corpus_is_held_out(a, op, b), seed >= held_out);
        n_long++;
    }
    text_free(&t);
    return n_long;
}

static void worksheets_are_right_and_keep_to_their_side(void **state) {
    (void)state;
    assert_true(check_worksheets(1) > 1000);
    assert_true(check_worksheets(held_out) > 1000);
}

static void a_sixteenth_of_the_problems_is_held_out(void **state) {
    (void)state;
    int64_t n = 0;
    for (int64_t a = 10; a < 410; a++)
        for (int64_t b = 10; b < 410; b++) {
            n += corpus_is_held_out(a, '+', b);
            assert_int_equal(corpus_is_held_out(a, '+', b), corpus_is_held_out(b, '+', a));
        }
    assert_close((double)n, 160000 / 16.0, 700); /* 5 sigma of pairs counted twice */
    assert_false(corpus_is_held_out(9, '+', 1000));
    assert_false(corpus_is_held_out(1000, '-', 9));
}

static void sums_are_right_and_of_the_asked_length(void **state) {
    (void)state;
    arena a;
    assert_ok(arena_open(&a, 1 << 16));
    for (int32_t digits = 0; digits <= CORPUS_DIGITS_MAX; digits++) {
        corpus_task_options o = corpus_task_defaults();
        o.digits = digits;
        for (int64_t i = 0; i < 500; i++) {
            corpus_task task;
            assert_ok(corpus_task_make(&a, CORPUS_ARITHMETIC, o, held_out, i, &task));
            long long x, y;
            char op, equals, end, want[32];
            assert_int_equal(sscanf(task.prompt, "%lld %c %lld %c%c", &x, &op, &y, &equals, &end),
                             4);
            assert_int_equal(equals, '=');
            snprintf(want, sizeof want, " %lld\n", compute(x, op, y));
            assert_string_equal(task.answer, want);
            assert_int_equal(task.answer_bytes, strlen(task.answer));
            assert_int_equal(task.prompt_bytes, strlen(task.prompt));
            if (digits != 1) assert_true(corpus_is_held_out(x, op, y));
            const int n_x = snprintf(NULL, 0, "%lld", x), n_y = snprintf(NULL, 0, "%lld", y);
            assert_in_range(n_x, digits ? digits : 2, digits ? digits : 4);
            assert_in_range(n_y, digits ? digits : 2, digits ? digits : 4);
            arena_reset(&a, 0);
        }
    }
    arena_close(&a);
}

/* --- Recall ----------------------------------------------------------------------------------- */

static void recall_has_one_answer_and_it_is_in_the_list(void **state) {
    (void)state;
    arena a;
    assert_ok(arena_open(&a, 1 << 16));
    for (int64_t i = 0; i < 500; i++) {
        corpus_task_options o = corpus_task_defaults();
        o.pairs = 1 + (int32_t)(i % CORPUS_PAIRS_MAX);
        o.sentences = (int32_t)(i % (CORPUS_SENTENCES_MAX + 1));
        corpus_task task;
        assert_ok(corpus_task_make(&a, CORPUS_RECALL, o, held_out, i, &task));
        assert_int_equal(count(task.prompt, "\n- "), o.pairs + 1); /* and the question */

        /* The question is the last line; the list has exactly one line that begins like it. */
        const char *question = strrchr(task.prompt, '\n');
        char line[128];
        snprintf(line, sizeof line, "%s%s", question, task.answer);
        assert_int_equal(count(task.prompt, question), 2);
        assert_int_equal(count(task.prompt, line), 1);
        assert_ptr_equal(strchr(task.answer, '\n'), task.answer + task.answer_bytes - 1);
        arena_reset(&a, 0);
    }
    arena_close(&a);
}

static void more_sentences_are_a_longer_way(void **state) {
    (void)state;
    arena a;
    assert_ok(arena_open(&a, 1 << 16));
    corpus_task near, far;
    assert_ok(corpus_task_make(&a, CORPUS_RECALL, (corpus_task_options){0, 8, 0}, 1, 0, &near));
    assert_ok(corpus_task_make(&a, CORPUS_RECALL, (corpus_task_options){0, 8, CORPUS_SENTENCES_MAX},
                               1, 0, &far));
    assert_true(near.prompt_bytes < 300);
    assert_true(far.prompt_bytes > 3000);
    arena_close(&a);
}

/* --- Refusals --------------------------------------------------------------------------------- */

static void options_outside_their_bounds_are_refused(void **state) {
    (void)state;
    arena a;
    corpus_task task;
    assert_ok(arena_open(&a, 1 << 16));
    static const corpus_task_options bad[] = {
        {-1, 0, 0}, {CORPUS_DIGITS_MAX + 1, 0, 0},    {0, -1, 0}, {0, CORPUS_PAIRS_MAX + 1, 0},
        {0, 0, -2}, {0, 0, CORPUS_SENTENCES_MAX + 1},
    };
    for (int32_t i = 0; i < COUNT_OF(bad); i++)
        assert_status(corpus_task_make(&a, CORPUS_RECALL, bad[i], 0, 0, &task), ST_RANGE);
    const corpus_task_options good = corpus_task_defaults();
    assert_status(corpus_task_make(&a, CORPUS_STORY, good, 0, 0, &task), ST_UNSUPPORTED);
    assert_status(corpus_task_make(&a, CORPUS_CHAT, good, 0, 0, &task), ST_UNSUPPORTED);
    arena_close(&a);

    corpus_kind kind;
    assert_false(corpus_kind_parse("poem", &kind));
    for (int32_t k = 0; k < CORPUS_KIND_COUNT; k++) {
        assert_true(corpus_kind_parse(corpus_kind_name((corpus_kind)k), &kind));
        assert_int_equal(kind, k);
    }
}

static void a_refused_allocation_is_nomem(void **state) {
    (void)state;
    for (int32_t k = 0; k < CORPUS_KIND_COUNT; k++) {
        for (int64_t n = 1;; n++) {
            text t = {0};
            mem_fail_at(n);
            const status st = corpus_document(&t, (corpus_kind)k, 1, 0);
            mem_fail_at(0);
            text_free(&t);
            if (st == ST_OK) break;
            assert_int_equal(st, ST_NOMEM);
        }
    }
    arena a;
    assert_ok(arena_open(&a, 1 << 16));
    for (int64_t n = 1;; n++) {
        corpus_task task;
        mem_fail_at(n);
        const status st = corpus_task_make(&a, CORPUS_RECALL, corpus_task_defaults(), 1, 0, &task);
        mem_fail_at(0);
        if (st == ST_OK) break;
        assert_int_equal(st, ST_NOMEM);
        assert_int_equal(a.used, 0);
    }
    arena_close(&a);
}

static void the_command_refuses_what_it_does_not_know(void **state) {
    (void)state;
    static const char *const bad[] = {
        "corpus",
        "corpus --bytes",
        "corpus --bytes -3",
        "corpus --bytes 10 --poem 1",
        "corpus --bytes 10 --kind poem",
        "corpus --tasks recall",
        "corpus --tasks story --count 1",
        "corpus --tasks recall --count 1 --pairs 17",
    };
    for (int32_t i = 0; i < COUNT_OF(bad); i++) {
        char words[64], *argv[8];
        snprintf(words, sizeof words, "%s", bad[i]);
        int argc = 0;
        for (char *w = strtok(words, " "); w; w = strtok(NULL, " ")) argv[argc++] = w;
        assert_int_equal(cmd_corpus(argc, argv), 2);
    }
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(the_first_megabyte_is_pinned),
        cmocka_unit_test(seeds_differ_and_repeat),
        cmocka_unit_test(a_text_is_its_documents_each_followed_by_the_end),
        cmocka_unit_test(documents_are_clean),
        cmocka_unit_test(worksheets_are_right_and_keep_to_their_side),
        cmocka_unit_test(a_sixteenth_of_the_problems_is_held_out),
        cmocka_unit_test(sums_are_right_and_of_the_asked_length),
        cmocka_unit_test(recall_has_one_answer_and_it_is_in_the_list),
        cmocka_unit_test(more_sentences_are_a_longer_way),
        cmocka_unit_test(options_outside_their_bounds_are_refused),
        cmocka_unit_test(a_refused_allocation_is_nomem),
        cmocka_unit_test(the_command_refuses_what_it_does_not_know),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
