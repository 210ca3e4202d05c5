/* test_tokenizer_files.c - what tokenizer_open and the command say to broken, damaged and odd
 * files, and to refused memory. */
#define _GNU_SOURCE
#include "test.h"

#include "cli.h"
#include "folder.h"
#include "rng.h"
#include "tokenizer.h"
#include "utf8.h"

#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define VECTORS "tests/vectors/tokenizers"

static const char *const families[] = {"llama3", "qwen2",   "gpt_oss", "gpt2",
                                       "llama2", "mistral", "added"};

enum { BOTH = TOKENIZER_ADD_SPECIAL | TOKENIZER_PARSE_SPECIAL };

static bool same_text(const text *got, const char *want, size_t n) {
    return got->length == n && (n == 0 || !memcmp(got->data, want, n));
}

/* --- Small tokenizers of our own -------------------------------------------------------------- */

/* Not file_write, which waits for the disk every time. */
static void write_text(const char *name, const char *data, size_t n) {
    char path[128];
    FILE *file = fopen(path_join(path, sizeof path, folder, name), "wb");
    assert_non_null(file);
    assert_int_equal(fwrite(data, 1, n, file), n);
    fclose(file);
}

#define MODEL(more)                                                                                \
    "\"model\":{\"type\":\"BPE\",\"vocab\":{\"a\":0,\"b\":1,\"ab\":2,\"\xe2\x96\x81\":3,\"<u>\":"  \
    "4},"                                                                                          \
    "\"merges\":[\"a b\"]" more "}"

static status open_text(tokenizer **t, const char *json) {
    write_text("tokenizer.json", json, strlen(json));
    return tokenizer_open(t, folder);
}

static void broken_files_are_refused_with_one_line(void **state) {
    (void)state;
    static const struct {
        const char *json;
        status want;
        const char *reason;
    } cases[] = {
        {"", ST_FORMAT, "tokenizer.json:1"},
        {"[]", ST_FORMAT, "not a JSON object"},
        {"{}", ST_FORMAT, "'model' is missing"},
        {"{\"model\":{\"type\":\"Unigram\",\"vocab\":[]}}", ST_UNSUPPORTED, "model 'Unigram'"},
        {"{\"model\":{\"vocab\":{\"a\":0}}}", ST_FORMAT, "'merges' is missing"},
        {"{\"model\":{\"vocab\":{\"a\":0,\"b\":0},\"merges\":[]}}", ST_FORMAT, "share id 0"},
        {"{\"model\":{\"vocab\":{\"a\":-1},\"merges\":[]}}", ST_RANGE, "token 'a'"},
        {"{\"model\":{\"vocab\":{\"a\":99999999},\"merges\":[]}}", ST_RANGE, "token 'a'"},
        {"{\"model\":{\"vocab\":{\"a\":0},\"merges\":[\"a a\"]}}", ST_FORMAT, "makes 'aa'"},
        {"{\"model\":{\"vocab\":{\"a\":0},\"merges\":[\"a z\"]}}", ST_FORMAT, "token 'z'"},
        {"{\"model\":{\"vocab\":{\"a\":0},\"merges\":[\"aa\"]}}", ST_FORMAT, "merge 0 is neither"},
        {"{\"model\":{\"vocab\":{\"a\":0},\"merges\":[],\"unk_token\":\"u\"}}", ST_FORMAT, "'u'"},
        {"{" MODEL(",\"dropout\":0.1") "}", ST_UNSUPPORTED, "dropout"},
        {"{" MODEL(",\"end_of_word_suffix\":\"</w>\"") "}", ST_UNSUPPORTED, "end_of_word_suffix"},
        {"{\"normalizer\":{\"type\":\"NFKC\"}," MODEL() "}", ST_UNSUPPORTED, "normalizer 'NFKC'"},
        {"{\"pre_tokenizer\":{\"type\":\"Whitespace\"}," MODEL() "}", ST_UNSUPPORTED,
         "pre_tokenizer 'Whitespace'"},
        {"{\"pre_tokenizer\":{\"type\":\"Split\",\"pattern\":{\"Regex\":\"(\"},\"behavior\":"
         "\"Isolated\"}," MODEL() "}",
         ST_FORMAT, "regular expression"},
        {"{\"pre_tokenizer\":{\"type\":\"Split\",\"pattern\":{\"Regex\":\"[a[b]]\"},"
         "\"behavior\":"
         "\"Isolated\"}," MODEL() "}",
         ST_UNSUPPORTED, "class inside a class"},
        {"{\"pre_tokenizer\":{\"type\":\"Split\",\"pattern\":{\"String\":\"x\"},\"behavior\":"
         "\"Sideways\"}," MODEL() "}",
         ST_UNSUPPORTED, "'Sideways'"},
        {"{\"decoder\":{\"type\":\"WordPiece\"}," MODEL() "}", ST_UNSUPPORTED,
         "decoder 'WordPiece'"},
        {"{\"decoder\":{\"type\":\"Metaspace\",\"replacement\":\"\"}," MODEL() "}", ST_FORMAT,
         "decoder Metaspace: empty replacement"},
        {"{\"decoder\":{\"type\":\"Sequence\",\"decoders\":[{\"type\":\"Fuse\"},{\"type\":"
         "\"ByteLevel\"}]}," MODEL() "}",
         ST_UNSUPPORTED, "behind Fuse"},
        {"{\"post_processor\":{\"type\":\"RobertaProcessing\"}," MODEL() "}", ST_UNSUPPORTED,
         "post_processor 'RobertaProcessing'"},
        {"{\"post_processor\":{\"type\":\"TemplateProcessing\",\"single\":[{\"SpecialToken\":"
         "{\"id\":\"s\"}},{\"Sequence\":{\"id\":\"A\"}}],\"special_tokens\":{\"s\":{\"ids\":[7]"
         "}}}," MODEL() "}",
         ST_FORMAT, "no token has id 7"},
        {"{\"added_tokens\":[{\"id\":1,\"content\":\"x\"}]," MODEL() "}", ST_FORMAT, "id 1 of 'b'"},
        {"{\"added_tokens\":[{\"id\":9,\"content\":\"a\"}]," MODEL() "}", ST_FORMAT, "says 0"},
        {"{\"added_tokens\":[{\"id\":9999999,\"content\":\"x\"}]," MODEL() "}", ST_RANGE,
         "9999999"},
        {"{\"added_tokens\":[{\"id\":8,\"content\":\"x\"},{\"id\":9,\"content\":\"x\"}]"
         "," MODEL() "}",
         ST_FORMAT, "'x' appears twice"},
    };
    for (int32_t i = 0; i < COUNT_OF(cases); i++) {
        tokenizer *t;
        assert_status(open_text(&t, cases[i].json), cases[i].want);
        assert_null(t);
        if (!strstr(fail_message(), cases[i].reason) || !strstr(fail_message(), "tokenizer.json"))
            fail_msg("case %d: '%s' does not say '%s'", i, fail_message(), cases[i].reason);
        assert_null(strchr(fail_message(), '\n'));
    }
    tokenizer *t;
    assert_status(tokenizer_open(&t, "/no/such/folder"), ST_NOTFOUND);
    assert_non_null(strstr(fail_message(), "/no/such/folder/tokenizer.json"));
}

/* The decoder Metaspace: texts of the decoder of tokenizers 0.23 for these tokens. Of the first
 * token all replacements go, unless the scheme is never; of the others each is a space. */
static void the_metaspace_decoder_drops_the_first_spaces(void **state) {
    (void)state;
    static const char vocab[] =
        "{\"decoder\":{\"type\":\"Metaspace\",\"replacement\":\"\\u2581\",%s},\"model\":{\"vocab\":"
        "{"
        "\"\\u2581Hello\":0,\"\\u2581a\":1,\"b\\u2581c\":2,\"\\u2581\\u2581Hello\":3,\"x\":4,"
        "\"\\u2581y\":5,\"\\u2581\":6,\"a\\u2581\":7,\"\\u2581\\u2581b\":8},\"merges\":[]}}";
    static const struct {
        const char *option;
        bool never;
    } schemes[] = {{"\"prepend_scheme\":\"always\"", false},
                   {"\"prepend_scheme\":\"first\"", false},
                   {"\"prepend_scheme\":\"never\"", true},
                   {"\"add_prefix_space\":true", false},
                   {"\"add_prefix_space\":false", true}};
    static const struct {
        int32_t id[3], n;
        const char *dropped, *kept;
    } rows[] = {{{0, 1, 2}, 3, "Hello ab c", " Hello ab c"},
                {{3, 4}, 2, "Hellox", "  Hellox"},
                {{4, 5}, 2, "x y", "x y"},
                {{6}, 1, "", " "},
                {{7, 8}, 2, "a  b", "a   b"}};
    for (int32_t i = 0; i < COUNT_OF(schemes); i++) {
        text json = {0};
        tokenizer *t;
        text_add(&json, vocab, schemes[i].option);
        assert_ok(open_text(&t, json.data));
        for (int32_t k = 0; k < COUNT_OF(rows); k++) {
            text out = {0};
            assert_ok(tokenizer_decode(t, rows[k].id, rows[k].n, true, &out));
            assert_string_equal(out.data ? out.data : "",
                                schemes[i].never ? rows[k].kept : rows[k].dropped);
            text_free(&out);
        }
        tokenizer_close(t);
        text_free(&json);
    }
}

static void encodes_as_wanted(tokenizer *t, const json_t *c, bool planted) {
    const json_t *texts = json_object_get(c, "texts"), *all = json_object_get(c, "ids");
    assert_true(json_array_size(texts) > 0);
    bool same = true;
    for (size_t i = 0; i < json_array_size(texts); i++) {
        const json_t *s = json_array_get(texts, i), *want = json_array_get(all, i);
        ids got = {0};
        assert_ok(tokenizer_encode(t, json_string_value(s), json_string_length(s), 0, &got));
        same &= got.length == (int64_t)json_array_size(want);
        for (int64_t k = 0; same && k < got.length; k++)
            same &= got.data[k] == json_integer_value(json_array_get(want, (size_t)k));
        ids_free(&got);
    }
    if (same == planted) {
        char *spec = json_dumps(json_object_get(c, "pre_tokenizer"), JSON_COMPACT);
        fail_msg("%s: %s", spec, planted ? "a planted id was not seen" : "other ids");
    }
}

/* Every behaviour of Split, Digits and Metaspace: ids of the library. The twin: one id more. */
static void pre_tokenizers_split_as_the_library(void **state) {
    (void)state;
    char *lines;
    size_t size;
    json_t *model = NULL;
    size_t n = 0;
    assert_ok(file_read(&lines, &size, VECTORS "/splits.jsonl"));
    for (char *line = lines, *end; *line; line = end + 1) {
        json_t *c;
        tokenizer *t;
        end = strchr(line, '\n');
        assert_ok(json_parse(&c, line, (size_t)(end - line), "splits.jsonl"));
        if (!model) {
            model = c;
            continue;
        }
        assert_int_equal(json_object_update_missing(c, model), 0);
        char *file = json_dumps(c, JSON_COMPACT);
        assert_ok(open_text(&t, file));
        free(file);
        encodes_as_wanted(t, c, false);
        json_array_append_new(json_array_get(json_object_get(c, "ids"), n % 6), json_integer(0));
        encodes_as_wanted(t, c, true);
        tokenizer_close(t);
        json_decref(c);
        n++;
    }
    assert_int_equal(n, 79);
    json_decref(model);
    mem_free(lines);
}

#define TENFOLD "{\"type\":\"Replace\",\"pattern\":{\"String\":\"a\"},\"content\":\"aaaaaaaaaa\"}"

/* Three steps make a thousand of one, eight would fill the memory. */
static void a_normalizer_may_not_multiply_without_end(void **state) {
    (void)state;
    static const char head[] = "{\"normalizer\":{\"type\":\"Sequence\",\"normalizers\":[";
    for (int32_t n = 3; n <= 8; n += 5) {
        text json = {0};
        ids list = {0};
        tokenizer *t;
        text_add(&json, "%s", head);
        for (int32_t i = 0; i < n; i++) text_add(&json, "%s" TENFOLD, i ? "," : "");
        text_add(&json, "]}," MODEL() "}");
        assert_ok(open_text(&t, json.data));
        assert_status(tokenizer_encode(t, "a", 1, 0, &list), n == 3 ? ST_OK : ST_RANGE);
        if (n == 3) assert_int_equal(list.length, 1000);
        if (n == 8) assert_non_null(strstr(fail_message(), "normalizer"));
        ids_free(&list);
        tokenizer_close(t);
        text_free(&json);
    }
}

static void names_and_templates_come_from_the_files_beside(void **state) {
    (void)state;
    static const char config[] = "{\"bos_token\":{\"content\":\"a\"},\"chat_template\":[{\"name\":"
                                 "\"default\",\"template\":\"D\"},{\"name\":\"rag\",\"template\":"
                                 "\"R\"}]}";
    static const char map[] = "{\"bos_token\":\"b\",\"eos_token\":\"<u>\"}";
    static const char generation[] = "{\"bos_token_id\":2,\"eos_token_id\":[4,2]}";
    tokenizer *t;
    int32_t n;
    assert_ok(open_text(&t, "{" MODEL() "}"));
    assert_int_equal(tokenizer_bos(t), -1);
    tokenizer_eos(t, &n);
    assert_int_equal(n, 0);
    assert_null(tokenizer_chat_template(t, NULL));
    tokenizer_close(t);
    write_text("tokenizer_config.json", config, strlen(config));
    write_text("special_tokens_map.json", map, strlen(map));
    write_text("generation_config.json", generation, strlen(generation));
    assert_ok(tokenizer_open(&t, folder));
    assert_int_equal(tokenizer_bos(t), 0);
    const int32_t *eos = tokenizer_eos(t, &n);
    assert_int_equal(n, 2);
    assert_int_equal(eos[0], 4);
    assert_int_equal(eos[1], 2);
    assert_true(tokenizer_is_eos(t, 2) && !tokenizer_is_eos(t, 0));
    assert_string_equal(tokenizer_chat_template(t, NULL), "D");
    assert_string_equal(tokenizer_chat_template(t, "rag"), "R");
    assert_null(tokenizer_chat_template(t, "tools"));
    tokenizer_close(t);
    write_text("chat_template.jinja", "J", 1);
    assert_ok(tokenizer_open(&t, folder));
    assert_string_equal(tokenizer_chat_template(t, NULL), "J");
    tokenizer_close(t);
    write_text("tokenizer_config.json", "{\"chat_template\":7}", 19);
    assert_status(tokenizer_open(&t, folder), ST_FORMAT);
    assert_non_null(strstr(fail_message(), "tokenizer_config.json"));
    write_text("tokenizer_config.json", "[]", 2);
    assert_status(tokenizer_open(&t, folder), ST_FORMAT);
    remove_folder(state);
    assert_int_equal(make_folder(state), 0);
}

/* --- Faults ----------------------------------------------------------------------------------- */

/* Whatever the file says: a status with a message, or a tokenizer that works. */
static bool survives(rng *r) {
    static const char s[] = "Hello  w\xc3\xb6rld, it's 1234 <|eot_id|> \xe4\xb8\xad\xff\n\n x";
    tokenizer *t;
    if (tokenizer_open(&t, folder) != ST_OK) {
        assert_null(t);
        assert_true(fail_message()[0] != 0);
        return false;
    }
    ids list = {0};
    text whole = {0};
    if (tokenizer_encode(t, s, sizeof s - 1, (uint32_t)rng_below(r, 4), &list) == ST_OK) {
        assert_ok(tokenizer_decode(t, list.data, list.length, rng_below(r, 2), &whole));
        assert_true(whole.length == 0 || utf8_valid(whole.data, whole.length));
    }
    text_free(&whole);
    ids_free(&list);
    tokenizer_close(t);
    return true;
}

static void damaged_files_never_crash(void **state) {
    (void)state;
    rng r;
    rng_seed(&r, 2, 0);
    int32_t opened = 0, refused = 0;
    for (int32_t f = 0; f < COUNT_OF(families); f++) {
        char path[256];
        snprintf(path, sizeof path, VECTORS "/%s/tokenizer.json", families[f]);
        char *data;
        size_t n;
        assert_ok(file_read(&data, &n, path));
        while (n > 0 && data[n - 1] != '}') n--; /* a file without its last newline is whole */
        for (size_t i = 0; i < 50; i++) {
            write_text("tokenizer.json", data, i == 49 ? n - 1 : n * i / 50);
            assert_false(survives(&r));
        }
        /* Damage is aimed at the head and tail as well: the middle is one long vocabulary. */
        for (int32_t i = 0; i < 300; i++) {
            const size_t part = i % 3 == 0 || n < 2500 ? n : 2500;
            size_t at = rng_below(&r, part);
            if (i % 3 == 2) at = n - 1 - at;
            const char keep = data[at];
            if (i % 2)
                data[at] = (char)(data[at] ^ 1 << rng_below(&r, 8));
            else
                data[at] = (char)rng_below(&r, 256);
            write_text("tokenizer.json", data, n);
            if (survives(&r))
                opened++;
            else
                refused++;
            data[at] = keep;
        }
        mem_free(data);
    }
    assert_true(opened > 100);
    assert_true(refused > 100);
}

/* Open, encode and decode with every allocation of ours refused in turn. Only PCRE2's JIT may do
 * without: then the result is the same. */
static void refused_memory_is_reported(void **state) {
    (void)state;
    static const char s[] = "x <longest> cafe\xcc\x81 wo\xffrd <caf\xc3\xa9> hello hello hello";
    static const char *const dirs[] = {VECTORS "/added", VECTORS "/mistral"};
    for (int32_t d = 0; d < COUNT_OF(dirs); d++) {
        int32_t n_refused = 0;
        text want = {0};
        bool struck = true;
        /* n = 0 refuses nothing. The vocabulary is one allocation a token: jump over most of it. */
        for (int64_t n = 0; struck; n += n > 60 && n < 300 ? 7 : 1) {
            tokenizer *t = NULL;
            ids list = {0};
            text back = {0};
            mem_fail_at(n);
            status st = tokenizer_open(&t, dirs[d]);
            if (st == ST_OK) st = tokenizer_encode(t, s, sizeof s - 1, BOTH, &list);
            if (st == ST_OK) st = tokenizer_decode(t, list.data, list.length, false, &back);
            struck = mem_fail_at(0) >= n;
            if (st == ST_OK) {
                if (n == 0) text_bytes(&want, back.data, back.length);
                assert_true(same_text(&back, want.data, want.length));
            } else {
                assert_int_equal(st, ST_NOMEM);
                n_refused++;
            }
            ids_free(&list);
            text_free(&back);
            tokenizer_close(t);
        }
        text_free(&want);
        assert_true(n_refused > 100);
    }
}

/* --- The command ------------------------------------------------------------------------------ */

/* Standard output (fd 1) or error (2) of the command, and its status. */
static int run_command(int fd, const char *const *argv, char *out, size_t n) {
    char path[128];
    path_join(path, sizeof path, folder, "text");
    fflush(NULL);
    const int keep = dup(fd);
    FILE *file = fopen(path, "w+");
    assert_non_null(file);
    dup2(fileno(file), fd);
    int argc = 0;
    while (argv[argc]) argc++;
    const int rc = cmd_tokenize(argc, (char **)(uintptr_t)argv);
    fflush(NULL);
    dup2(keep, fd);
    close(keep);
    rewind(file);
    out[fread(out, 1, n - 1, file)] = 0;
    fclose(file);
    return rc;
}

static void the_command_prints_ids_and_pieces(void **state) {
    (void)state;
    char out[1024];
    write_text("tokenizer.json", "{" MODEL() "}", strlen("{" MODEL() "}"));
    const char *const plain[] = {"tokenize", "--model", folder, "--text", "abba", NULL};
    assert_int_equal(run_command(1, plain, out, sizeof out), 0);
    assert_string_equal(out, "2\tab\n1\tb\n0\ta\n");
    const char *const json[] = {"tokenize", "--json", "--model", folder, "--text", "abba", NULL};
    assert_int_equal(run_command(1, json, out, sizeof out), 0);
    assert_string_equal(out, "{\"tokens\":3,\"ids\":[2,1,0],\"pieces\":[\"ab\",\"b\",\"a\"]}\n");
    const char *const neither[] = {"tokenize", "--model", folder, NULL};
    assert_int_equal(run_command(2, neither, out, sizeof out), 2);
    assert_non_null(strstr(out, "--text or --file"));
    const char *const nowhere[] = {"tokenize", "--model", "/none", "--text", "a", NULL};
    assert_int_equal(run_command(2, nowhere, out, sizeof out), 2);
    assert_non_null(strstr(out, "/none/tokenizer.json"));
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(broken_files_are_refused_with_one_line),
        cmocka_unit_test(the_metaspace_decoder_drops_the_first_spaces),
        cmocka_unit_test(pre_tokenizers_split_as_the_library),
        cmocka_unit_test(a_normalizer_may_not_multiply_without_end),
        cmocka_unit_test(names_and_templates_come_from_the_files_beside),
        cmocka_unit_test(damaged_files_never_crash),
        cmocka_unit_test(refused_memory_is_reported),
        cmocka_unit_test(the_command_prints_ids_and_pieces),
    };
    return cmocka_run_group_tests(tests, make_folder, remove_folder);
}
