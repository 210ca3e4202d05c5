/* test_tokenizer.c - equal to Hugging Face's tokenizers on the golden corpus (vectors/README.md),
 * and streaming equal to decoding at once. Broken files are in test_tokenizer_files.c. */
#define _GNU_SOURCE
#include "test.h"

#include "folder.h"
#include "rng.h"
#include "tokenizer.h"
#include "utf8.h"

#include <stdlib.h>
#include <string.h>

#define VECTORS "tests/vectors/tokenizers"

static const char *const families[] = {"llama3", "qwen2",   "gpt_oss", "gpt2",
                                       "llama2", "mistral", "added"};

enum { BOTH = TOKENIZER_ADD_SPECIAL | TOKENIZER_PARSE_SPECIAL };

/* --- Help ------------------------------------------------------------------------------------- */

/* A file of JSON lines as one array. */
static json_t *read_lines(const char *path) {
    char *data;
    size_t size;
    assert_ok(file_read(&data, &size, path));
    json_t *all = json_array();
    for (char *line = data, *end; line < data + size; line = end + 1) {
        end = memchr(line, '\n', (size_t)(data + size - line));
        assert_non_null(end);
        json_t *row;
        assert_ok(json_parse(&row, line, (size_t)(end - line), path));
        json_array_append_new(all, row);
    }
    mem_free(data);
    return all;
}

static json_t *read_family_lines(const char *family, const char *name) {
    char path[256];
    snprintf(path, sizeof path, VECTORS "/%s/%s", family, name);
    return read_lines(path);
}

static tokenizer *open_family(const char *family) {
    char dir[256];
    snprintf(dir, sizeof dir, VECTORS "/%s", family);
    tokenizer *t;
    assert_ok(tokenizer_open(&t, dir));
    return t;
}

/* Place of the first difference, -1 when equal. */
static int64_t first_difference(const ids *got, const json_t *want) {
    const int64_t n = (int64_t)json_array_size(want);
    for (int64_t i = 0; i < i64_min(n, got->length); i++)
        if (got->data[i] != json_integer_value(json_array_get(want, (size_t)i))) return i;
    return got->length == n ? -1 : i64_min(n, got->length);
}

static void ids_from_json(ids *list, const json_t *array) {
    ids_clear(list);
    for (size_t i = 0; i < json_array_size(array); i++)
        ids_add(list, (int32_t)json_integer_value(json_array_get(array, i)));
}

static bool same_text(const text *got, const char *want, size_t n) {
    return got->length == n && (n == 0 || !memcmp(got->data, want, n));
}

/* Decode at once and as a stream; every piece of the stream must be text by itself. */
static void decode_both_ways(const tokenizer *t, const ids *list, bool skip_special, text *whole) {
    text_clear(whole);
    assert_ok(tokenizer_decode(t, list->data, list->length, skip_special, whole));
    tokenizer_stream s;
    text all = {0}, part = {0};
    tokenizer_stream_open(&s, t, skip_special);
    for (int64_t i = 0; i <= list->length; i++) {
        text_clear(&part);
        if (i < list->length)
            assert_ok(tokenizer_stream_push(&s, list->data[i], &part));
        else
            assert_ok(tokenizer_stream_flush(&s, &part));
        assert_true(part.length == 0 || utf8_valid(part.data, part.length));
        text_bytes(&all, part.data, part.length);
    }
    tokenizer_stream_close(&s);
    assert_true(same_text(&all, whole->data, whole->length));
    text_free(&all);
    text_free(&part);
}

/* --- Equal to the reference ------------------------------------------------------------------- */

/* Rows whose ids (without or with what the template adds) differ from the expected ones. */
static int32_t count_different(const tokenizer *t, const json_t *corpus, const json_t *expected,
                               bool special, bool report) {
    int32_t n = 0;
    ids got = {0};
    for (size_t i = 0; i < json_array_size(corpus); i++) {
        const json_t *s = json_find(json_array_get(corpus, i), "text");
        const json_t *row = json_array_get(expected, i), *want = json_find(row, "ids");
        if (special && json_find(row, "ids_special")) want = json_find(row, "ids_special");
        ids_clear(&got);
        assert_ok(tokenizer_encode(t, json_string_value(s), json_string_length(s),
                                   special ? BOTH : TOKENIZER_PARSE_SPECIAL, &got));
        if (first_difference(&got, want) < 0) continue;
        n++;
        if (report)
            print_message("'%.60s': differs at token %lld\n", json_string_value(s),
                          (long long)first_difference(&got, want));
    }
    ids_free(&got);
    return n;
}

/* The tokenizer that ships with the tiny checkpoint. */
static void tiny_ids_equal_the_reference(void **state) {
    (void)state;
    json_t *corpus = read_lines(VECTORS "/corpus.jsonl");
    json_t *expected = read_lines("tests/vectors/tiny/expected.jsonl");
    tokenizer *t;
    assert_ok(tokenizer_open(&t, "workloads/tiny"));
    assert_int_equal(json_array_size(corpus), json_array_size(expected));
    assert_int_equal(count_different(t, corpus, expected, false, true), 0);
    assert_int_equal(count_different(t, corpus, expected, true, true), 0);
    tokenizer_close(t);
    json_decref(expected);
    json_decref(corpus);
}

static void ids_equal_the_reference(void **state) {
    (void)state;
    json_t *corpus = read_lines(VECTORS "/corpus.jsonl");
    assert_true(json_array_size(corpus) > 150);
    for (int32_t f = 0; f < COUNT_OF(families); f++) {
        tokenizer *t = open_family(families[f]);
        json_t *expected = read_family_lines(families[f], "expected.jsonl");
        assert_int_equal(json_array_size(corpus), json_array_size(expected));
        const int32_t bad = count_different(t, corpus, expected, false, true) +
                            count_different(t, corpus, expected, true, true);
        if (bad) fail_msg("%s: %d encodings differ", families[f], bad);
        print_message("%s: %zu texts equal, with and without special tokens\n", families[f],
                      json_array_size(corpus));
        json_decref(expected);
        tokenizer_close(t);
    }
    json_decref(corpus);
}

static void one_changed_id_is_noticed(void **state) {
    (void)state;
    json_t *corpus = read_lines(VECTORS "/corpus.jsonl");
    json_t *expected = read_family_lines("llama3", "expected.jsonl");
    tokenizer *t = open_family("llama3");
    size_t row = 0;
    while (json_array_size(json_find(json_array_get(expected, row), "ids")) < 3) row++;
    json_t *list = json_find(json_array_get(expected, row), "ids");
    const json_int_t id = json_integer_value(json_array_get(list, 1));
    json_array_set_new(list, 1, json_integer(id + 1));
    assert_int_equal(count_different(t, corpus, expected, false, false), 1);
    json_array_set_new(list, 1, json_integer(id));
    json_array_remove(list, json_array_size(list) - 1);
    assert_int_equal(count_different(t, corpus, expected, false, false), 1);
    tokenizer_close(t);
    json_decref(expected);
    json_decref(corpus);
}

/* Two merges in the other order must show in some text. */
static void swapped_merges_are_noticed(void **state) {
    char path[256];
    assert_int_equal(make_folder(state), 0);
    json_t *corpus = read_lines(VECTORS "/corpus.jsonl"), *root;
    for (int32_t f = 0; f < COUNT_OF(families); f++) {
        snprintf(path, sizeof path, VECTORS "/%s/tokenizer.json", families[f]);
        assert_ok(json_file(&root, path));
        json_t *merges = json_find(json_find(root, "model"), "merges");
        const size_t last = json_array_size(merges) - 1;
        json_t *first = json_incref(json_array_get(merges, 0));
        json_array_set(merges, 0, json_array_get(merges, last));
        json_array_set_new(merges, last, first);
        char *line = json_line(root);
        json_decref(root);
        assert_ok(
            file_write(path_join(path, sizeof path, folder, "tokenizer.json"), line, strlen(line)));
        mem_free(line);
        tokenizer *t;
        assert_ok(tokenizer_open(&t, folder));
        json_t *expected = read_family_lines(families[f], "expected.jsonl");
        assert_true(count_different(t, corpus, expected, true, false) > 0);
        json_decref(expected);
        tokenizer_close(t);
    }
    json_decref(corpus);
    assert_int_equal(remove_folder(state), 0);
}

static void check_text(const char *family, size_t row, const text *got, const json_t *want) {
    if (!same_text(got, json_string_value(want), json_string_length(want)))
        fail_msg("%s, line %zu: got '%s', want '%s'", family, row + 1, got->data ? got->data : "",
                 json_string_value(want));
}

static void texts_equal_the_reference(void **state) {
    (void)state;
    json_t *corpus = read_lines(VECTORS "/corpus.jsonl");
    ids list = {0};
    text whole = {0};
    for (int32_t f = 0; f < COUNT_OF(families); f++) {
        tokenizer *t = open_family(families[f]);
        json_t *expected = read_family_lines(families[f], "expected.jsonl");
        for (size_t i = 0; i < json_array_size(corpus); i++) {
            const json_t *row = json_array_get(expected, i);
            const json_t *plain = json_find(json_array_get(corpus, i), "text");
            const json_t *id = json_find(row, "ids_special");
            ids_from_json(&list, id ? id : json_find(row, "ids"));
            for (int32_t skip = 0; skip < 2; skip++) {
                const json_t *want = json_find(row, skip ? "text" : "text_special");
                decode_both_ways(t, &list, skip, &whole);
                check_text(families[f], i, &whole, want ? want : plain);
            }
        }
        json_decref(expected);
        json_t *cut = read_family_lines(families[f], "decode.jsonl");
        assert_true(json_array_size(cut) > 10);
        for (size_t i = 0; i < json_array_size(cut); i++) {
            ids_from_json(&list, json_find(json_array_get(cut, i), "ids"));
            decode_both_ways(t, &list, false, &whole);
            check_text(families[f], i, &whole, json_find(json_array_get(cut, i), "text"));
        }
        json_decref(cut);
        tokenizer_close(t);
    }
    text_free(&whole);
    ids_free(&list);
    json_decref(corpus);
}

static void ill_formed_bytes_become_replacement_characters(void **state) {
    (void)state;
    json_t *rows = read_lines(VECTORS "/invalid_utf8.jsonl");
    assert_true(json_array_size(rows) > 20);
    tokenizer *llama2 = open_family("llama2"), *qwen2 = open_family("qwen2");
    text repaired = {0};
    ids a = {0}, b = {0};
    for (size_t i = 0; i < json_array_size(rows); i++) {
        const char *hex = json_string_value(json_find(json_array_get(rows, i), "hex"));
        const json_t *want = json_find(json_array_get(rows, i), "text");
        char bytes[64];
        const size_t n = strlen(hex) / 2;
        assert_true(n <= sizeof bytes);
        for (size_t k = 0; k < n; k++) {
            const char digits[3] = {hex[2 * k], hex[2 * k + 1], 0};
            bytes[k] = (char)strtol(digits, NULL, 16);
        }
        text_clear(&repaired);
        utf8_repair(&repaired, bytes, n);
        check_text("invalid_utf8", i, &repaired, want);
        for (int32_t k = 0; k < 2; k++) {
            const tokenizer *t = k ? qwen2 : llama2;
            ids_clear(&a);
            ids_clear(&b);
            assert_ok(tokenizer_encode(t, bytes, n, BOTH, &a));
            assert_ok(
                tokenizer_encode(t, json_string_value(want), json_string_length(want), BOTH, &b));
            assert_int_equal(a.length, b.length);
            assert_memory_equal(a.data, b.data, (size_t)a.length * sizeof *a.data);
        }
    }
    ids_free(&a);
    ids_free(&b);
    text_free(&repaired);
    tokenizer_close(llama2);
    tokenizer_close(qwen2);
    json_decref(rows);
}

/* --- Properties ------------------------------------------------------------------------------- */

/* Characters from all over Unicode, most of them from where tokenisers have rules, or any bytes. */
static void random_text(rng *r, text *out, bool any_bytes) {
    static const uint32_t rich[] = {' ',   ' ',    ' ',    '\n',   '\r',    '\t',    'a',
                                    'Z',   '0',    '9',    '\'',   's',     '.',     0xe9,
                                    0x301, 0x327,  0x200d, 0x4e2d, 0x1f468, 0x1f3fd, 0x3000,
                                    0xa0,  0x180e, 0x85,   0x130,  0x17f,   0x1100,  0x1161,
                                    '<',   '|',    '>',    0x2581, 0xac00,  0x11a8,  0xfffd};
    text_clear(out);
    for (int64_t n = rng_range(r, 0, 120); n > 0; n--) {
        uint32_t c = rich[rng_below(r, (uint64_t)COUNT_OF(rich))];
        if (rng_below(r, 6) == 0) c = (uint32_t)rng_below(r, 0x110000);
        if (any_bytes && rng_below(r, 4) == 0)
            text_bytes(out, &(char){(char)c}, 1);
        else if (c < 0xd800 || c > 0xdfff)
            utf8_put(out, c);
    }
    assert_ok(text_status(out));
}

static void random_bytes_come_back_as_their_repair(void **state) {
    (void)state;
    rng r;
    rng_seed(&r, 1, 0);
    text s = {0}, repaired = {0}, whole = {0};
    ids list = {0};
    for (int32_t f = 0; f < COUNT_OF(families); f++) {
        tokenizer *t = open_family(families[f]);
        const bool lossless = !strcmp(families[f], "llama3") || !strncmp(families[f], "gpt", 3);
        for (int32_t i = 0; i < 200; i++) {
            random_text(&r, &s, i % 2);
            ids_clear(&list);
            assert_ok(tokenizer_encode(t, s.data ? s.data : "", s.length, 0, &list));
            for (int64_t k = 0; k < list.length; k++)
                assert_non_null(tokenizer_piece(t, list.data[k]));
            decode_both_ways(t, &list, false, &whole);
            text_clear(&repaired);
            utf8_repair(&repaired, s.data, s.length);
            if (lossless) assert_true(same_text(&whole, repaired.data, repaired.length));
        }
        for (int32_t i = 0; i < 200; i++) { /* what a model that has gone mad would say */
            ids_clear(&list);
            for (int64_t n = rng_range(&r, 0, 40); n > 0; n--)
                ids_add(&list, (int32_t)rng_range(&r, -1, tokenizer_vocab_size(t)));
            decode_both_ways(t, &list, i % 2, &whole);
        }
        tokenizer_close(t);
    }
    ids_free(&list);
    text_free(&s);
    text_free(&repaired);
    text_free(&whole);
}

/* A run of byte tokens that is ill-formed somewhere is let go at once, a good one at its end. */
static void byte_runs_are_held_back_only_as_long_as_needed(void **state) {
    (void)state;
    tokenizer *t = open_family("llama2");
    tokenizer_stream s;
    text out = {0};
    tokenizer_stream_open(&s, t, true);
    assert_ok(tokenizer_stream_push(&s, tokenizer_id(t, "<0xC3>"), &out));
    assert_ok(tokenizer_stream_push(&s, tokenizer_id(t, "<0xA9>"), &out));
    assert_int_equal(out.length, 0);
    assert_ok(tokenizer_stream_push(&s, tokenizer_id(t, "a"), &out));
    assert_string_equal(out.data, "\xc3\xa9"
                                  "a");
    text_clear(&out);
    assert_ok(tokenizer_stream_push(&s, tokenizer_id(t, "<0xC3>"), &out));
    assert_ok(tokenizer_stream_push(&s, tokenizer_id(t, "<0xC3>"), &out));
    assert_string_equal(out.data, "\xef\xbf\xbd\xef\xbf\xbd");
    assert_ok(tokenizer_stream_push(&s, tokenizer_id(t, "<0xA9>"), &out));
    assert_string_equal(out.data, "\xef\xbf\xbd\xef\xbf\xbd\xef\xbf\xbd");
    assert_ok(tokenizer_stream_flush(&s, &out));
    /* After a flush the next sequence starts: its first space goes again. */
    text_clear(&out);
    assert_ok(tokenizer_stream_push(&s, tokenizer_id(t, "\xe2\x96\x81"), &out));
    assert_ok(tokenizer_stream_push(&s, tokenizer_id(t, "\xe2\x96\x81"), &out));
    assert_string_equal(out.data, " ");
    tokenizer_stream_close(&s);
    text_free(&out);
    tokenizer_close(t);
}

/* The text of the tokens from `from` on, in a stream that goes on or in one that begins. */
static void add_rest(const tokenizer *t, const ids *list, int64_t from, bool continues, text *out) {
    tokenizer_stream s;
    tokenizer_stream_open(&s, t, true);
    if (continues) tokenizer_stream_continue(&s);
    for (int64_t i = from; i < list->length; i++)
        assert_ok(tokenizer_stream_push(&s, list->data[i], out));
    assert_ok(tokenizer_stream_flush(&s, out));
    tokenizer_stream_close(&s);
}

/* Wherever a text is cut, its beginning and its continuation are the text. */
static void a_continuation_keeps_its_first_space(void **state) {
    (void)state;
    static const char whole[] = "Once upon a time there was";
    for (size_t f = 0; f < COUNT_OF(families); f++) {
        tokenizer *t = open_family(families[f]);
        ids list = {0};
        text got = {0};
        int32_t n_lost = 0; /* the twin: where a text of its own begins, Strip takes the space */
        assert_ok(tokenizer_encode(t, whole, sizeof whole - 1, 0, &list));
        for (int64_t cut = 1; cut < list.length; cut++)
            for (int32_t continues = 0; continues < 2; continues++) {
                text_clear(&got);
                assert_ok(tokenizer_decode(t, list.data, cut, true, &got));
                add_rest(t, &list, cut, continues, &got);
                if (continues)
                    assert_string_equal(got.data, whole);
                else
                    n_lost += strcmp(got.data, whole) != 0;
            }
        assert_int_equal(n_lost > 0,
                         !strcmp(families[f], "llama2") || !strcmp(families[f], "mistral"));
        text_free(&got);
        ids_free(&list);
        tokenizer_close(t);
    }
}

/* The bytes of all tokens together are the text, also where a character is cut. */
static void bytes_of_tokens_are_the_text(void **state) {
    (void)state;
    json_t *corpus = read_lines(VECTORS "/corpus.jsonl");
    for (size_t f = 0; f < COUNT_OF(families); f++) {
        tokenizer *t = open_family(families[f]);
        ids list = {0};
        text got = {0}, want = {0}, repaired = {0};
        int32_t n_parts = 0; /* tokens that are no text on their own */
        for (size_t i = 0; i < json_array_size(corpus); i++) {
            const json_t *s = json_find(json_array_get(corpus, i), "text");
            ids_clear(&list);
            text_clear(&got);
            text_clear(&want);
            assert_ok(tokenizer_encode(t, json_string_value(s), json_string_length(s), 0, &list));
            add_rest(t, &list, 0, true, &want);
            for (int64_t k = 0; k < list.length; k++) {
                const size_t from = got.length;
                if (tokenizer_is_special(t, list.data[k])) continue;
                assert_ok(tokenizer_token_bytes(t, list.data[k], &got));
                n_parts += got.length > from && !utf8_valid(got.data + from, got.length - from);
            }
            text_clear(&repaired); /* byte-level families make ill-formed text of "<café>" */
            utf8_repair(&repaired, got.data ? got.data : "", got.length);
            assert_true(same_text(&repaired, want.data ? want.data : "", want.length));
        }
        assert_true(n_parts > 0);
        text_free(&got);
        text_free(&want);
        text_free(&repaired);
        ids_free(&list);
        tokenizer_close(t);
    }
    json_decref(corpus);
}

static void special_tokens_are_parsed_only_when_asked(void **state) {
    (void)state;
    static const char s[] = "a<|eot_id|>b";
    tokenizer *t = open_family("llama3");
    const int32_t eot = tokenizer_id(t, "<|eot_id|>");
    assert_true(eot >= 0 && tokenizer_is_special(t, eot));
    ids list = {0};
    text back = {0};
    assert_ok(tokenizer_encode(t, s, strlen(s), TOKENIZER_PARSE_SPECIAL, &list));
    assert_int_equal(list.length, 3);
    assert_int_equal(list.data[1], eot);
    ids_clear(&list);
    assert_ok(tokenizer_encode(t, s, strlen(s), 0, &list));
    assert_true(list.length > 3);
    for (int64_t i = 0; i < list.length; i++) assert_false(tokenizer_is_special(t, list.data[i]));
    decode_both_ways(t, &list, true, &back);
    assert_string_equal(back.data, s);
    assert_int_equal(tokenizer_id(t, "no such token"), -1);
    assert_null(tokenizer_piece(t, tokenizer_vocab_size(t)));
    assert_null(tokenizer_piece(t, -1));
    text_free(&back);
    ids_free(&list);
    tokenizer_close(t);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(ids_equal_the_reference),
        cmocka_unit_test(tiny_ids_equal_the_reference),
        cmocka_unit_test(one_changed_id_is_noticed),
        cmocka_unit_test(swapped_merges_are_noticed),
        cmocka_unit_test(texts_equal_the_reference),
        cmocka_unit_test(ill_formed_bytes_become_replacement_characters),
        cmocka_unit_test(random_bytes_come_back_as_their_repair),
        cmocka_unit_test(byte_runs_are_held_back_only_as_long_as_needed),
        cmocka_unit_test(a_continuation_keeps_its_first_space),
        cmocka_unit_test(bytes_of_tokens_are_the_text),
        cmocka_unit_test(special_tokens_are_parsed_only_when_asked),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
