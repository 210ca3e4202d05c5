/* test_chat_template.c - against jinja2's renderings, refusals by name and line, limits, damaged
 * input. */
#include "test.h"

#include "chat_template.h"
#include "rng.h"

#include <string.h>

static const char folder[] = "tests/vectors/chat";

static chat_template_input input_of(const json_t *c) {
    return (chat_template_input){.messages = json_object_get(c, "messages"),
                                 .tools = json_find(c, "tools"),
                                 .variables = json_object_get(c, "variables"),
                                 .add_generation_prompt =
                                     json_is_true(json_object_get(c, "add_generation_prompt")),
                                 .bos = json_string_value(json_object_get(c, "bos_token")),
                                 .eos = json_string_value(json_object_get(c, "eos_token")),
                                 .now_s = 1753012800};
}

static chat_template *open_file(const char *name) {
    char path[256];
    char *source;
    size_t n;
    chat_template *t;
    snprintf(path, sizeof path, "%s/%s.jinja", folder, name);
    assert_ok(file_read(&source, &n, path));
    assert_ok(chat_template_open(&t, source, n, name));
    mem_free(source);
    return t;
}

static void renderings_are_those_of_jinja2(void **state) {
    (void)state;
    char *lines;
    size_t size;
    assert_ok(file_read(&lines, &size, "tests/vectors/chat/expected.jsonl"));
    int32_t n = 0, errors = 0;
    chat_template *t = NULL;
    char open_name[64] = "";
    for (char *line = lines, *end; *line; line = end + 1) {
        end = strchr(line, '\n');
        json_t *c;
        assert_ok(json_parse(&c, line, (size_t)(end - line), "expected.jsonl"));
        const char *name = json_string_value(json_object_get(c, "template"));
        if (strcmp(name, open_name) != 0) {
            chat_template_close(t);
            t = open_file(name);
            snprintf(open_name, sizeof open_name, "%s", name);
        }
        const chat_template_input in = input_of(c);
        text out = {0};
        const status st = chat_template_render(t, &in, &out);
        const char *what = json_string_value(json_object_get(c, "case"));
        const json_t *want = json_object_get(c, "text");
        if (want) {
            if (st != ST_OK) fail_msg("%s %s: %s", name, what, fail_message());
            if (out.length != json_string_length(want) ||
                (out.length && memcmp(out.data, json_string_value(want), out.length) != 0))
                fail_msg("%s %s:\n--- got\n%s\n--- want\n%s", name, what, out.data,
                         json_string_value(want));
        } else {
            errors++;
            if (st != ST_FORMAT) fail_msg("%s %s is rendered as %s", name, what, out.data);
        }
        text_free(&out);
        json_decref(c);
        n++;
    }
    chat_template_close(t);
    mem_free(lines);
    assert_true(n >= 200);
    assert_true(errors >= 40);
}

/* Open and render with no messages; the failure's message, "" when none. */
static const char *outcome_of(const char *source, status want) {
    chat_template *t;
    text out = {0};
    status st = chat_template_open(&t, source, strlen(source), "t");
    if (st == ST_OK) {
        json_t *none = json_array();
        const chat_template_input in = {.messages = none, .bos = "", .eos = ""};
        st = chat_template_render(t, &in, &out);
        json_decref(none);
    }
    chat_template_close(t);
    text_free(&out);
    if (st != want)
        fail_msg("'%.80s': %s (%s), want %s", source, status_text(st), fail_message(),
                 status_text(want));
    return st == ST_OK ? "" : fail_message();
}

static void what_is_beyond_the_subset_is_refused_by_name_and_line(void **state) {
    (void)state;
    static const struct {
        const char *source, *says;
        status st;
    } cases[] = {
        {"a\n{% include 'x' %}", "chat template t:2: statement 'include'", ST_UNSUPPORTED},
        {"{% raw %}{% endraw %}", "t:1: statement 'raw'", ST_UNSUPPORTED},
        {"{{ x | xmlattr }}", "t:1: filter 'xmlattr'", ST_UNSUPPORTED},
        {"\n\n{{ x is sameas none }}", "t:3: test 'sameas'", ST_UNSUPPORTED},
        {"{{ x.mro() }}", "t:1: method 'mro'", ST_UNSUPPORTED},
        {"{{ 2 ** 3 }}", "t:1: operator '**'", ST_UNSUPPORTED},
        {"{{ f(*x) }}", "t:1: argument list '*'", ST_UNSUPPORTED},
        {"{% for a in b recursive %}{% endfor %}", "'for … recursive'", ST_UNSUPPORTED},
        {"x{{ lipsum() }}", "t:1: function 'lipsum'", ST_UNSUPPORTED},
        {"{{ 'a' % 3 }}", "t:1: formatting by '%'", ST_UNSUPPORTED},
        {"{{ [] | select('sameas') }}", "test 'sameas'", ST_UNSUPPORTED},
        {"{% for x in [1] %}{{ loop.changed }}{% endfor %}", "loop.changed", ST_UNSUPPORTED},
        {"\n{{ raise_exception('no: ' ~ 3) }}", "chat template t:2: no: 3", ST_FORMAT},
        {"{{ a.b.c }}", "t:1: 'a' is undefined", ST_FORMAT},
        {"{% if x %}", "no 'elif'", ST_FORMAT},
        {"{% endif %}", "statement 'endif'", ST_UNSUPPORTED},
        {"{{ 'open }}", "string without an end", ST_FORMAT},
        {"{{ 1", "tag without an end", ST_FORMAT},
        {"{# open", "comment without an end", ST_FORMAT},
        {"{{ }}", "the end of the tag instead of an expression", ST_FORMAT},
        {"{% break %}", "'break' outside a loop", ST_FORMAT},
        {"{{ 1 / 0 }}", "division by zero", ST_FORMAT},
        {"{{ 1 + 'a' }}", "'+' of a int and a string", ST_FORMAT},
        {"{{ 9223372036854775807 + 1 }}", "more than 64 bits", ST_RANGE},
        {"{{ 99999999999999999999 }}", "is no integer of 63 bits", ST_FORMAT},
        {"{{ range(1000000) }}", "range of more than", ST_RANGE},
    };
    for (int32_t i = 0; i < COUNT_OF(cases); i++) {
        const char *got = outcome_of(cases[i].source, cases[i].st);
        if (!strstr(got, cases[i].says)) fail_msg("'%s': says '%s'", cases[i].source, got);
    }
}

static void work_is_bounded(void **state) {
    (void)state;
    outcome_of(
        "{% for a in range(99999) %}{% for b in range(99999) %}{{ a }}{% endfor %}{% endfor %}",
        ST_RANGE);
    outcome_of("{% set ns = namespace(s='xxxxxxxx') %}{% for a in range(99) %}"
               "{% set ns.s = ns.s ~ ns.s %}{% endfor %}",
               ST_RANGE);
    outcome_of("{% macro f(x) %}{{ f(x) }}{% endmacro %}{{ f(1) }}", ST_RANGE);
    outcome_of("{{ 'abcdefgh' * 99999999 }}", ST_RANGE);
    outcome_of("{% set ns = namespace(l=[]) %}{% for a in range(99) %}"
               "{% set ns.l = [ns.l] %}{% endfor %}{{ ns.l }}",
               ST_RANGE);
    text deep = {0};
    for (int32_t i = 0; i < 5000; i++) text_add(&deep, "%s", i ? "(" : "{{ ");
    outcome_of(deep.data, ST_RANGE);
    text_clear(&deep);
    for (int32_t i = 0; i < 5000; i++) text_add(&deep, "{%% if 1 %%}");
    outcome_of(deep.data, ST_RANGE);
    text_clear(&deep);
    text_add(&deep, "{{ 1");
    for (int32_t i = 0; i < 5000; i++) text_add(&deep, " + 1");
    text_add(&deep, " }}");
    outcome_of(deep.data, ST_RANGE);
    text_clear(&deep);
    text_add(&deep, "{%% if 0 %%}");
    for (int32_t i = 0; i < 5000; i++) text_add(&deep, "{%% elif 0 %%}");
    text_add(&deep, "{%% endif %%}");
    outcome_of(deep.data, ST_OK); /* a chain is no nesting */
    text_free(&deep);
}

/* Every prefix, and seeded flips of bits: any outcome but a crash. */
static void damaged_templates_do_no_harm(void **state) {
    (void)state;
    char *source;
    size_t n;
    assert_ok(file_read(&source, &n, "tests/vectors/chat/language.jinja"));
    json_t *messages = json_pack("[{s:s, s:s}]", "role", "user", "content", "x");
    const chat_template_input in = {.messages = messages, .bos = "<s>", .eos = "</s>"};
    char *damaged = mem_alloc(n + 1, 1);
    int32_t opened = 0;
    for (int32_t i = 0; i < 2000; i++) {
        const uint64_t h = hash_u64((uint64_t)i, 7);
        size_t length = n;
        memcpy(damaged, source, n);
        if (i % 2)
            length = h % n;
        else
            for (int32_t k = 0; k < 1 + (int32_t)(h % 4); k++) {
                const uint64_t g = hash_u64((uint64_t)k, h);
                damaged[g % n] ^= (char)(1 << (g >> 40) % 7);
            }
        char *exact = mem_alloc(length + 1, 1); /* so that a sanitizer sees the end */
        memcpy(exact, damaged, length);
        chat_template *t;
        text out = {0};
        if (chat_template_open(&t, exact, length, "damaged") == ST_OK) {
            opened++;
            (void)chat_template_render(t, &in, &out);
        }
        chat_template_close(t);
        text_free(&out);
        mem_free(exact);
    }
    assert_true(opened > 100); /* else the flips tested the first check only */
    json_decref(messages);
    mem_free(damaged);
    mem_free(source);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(renderings_are_those_of_jinja2),
        cmocka_unit_test(what_is_beyond_the_subset_is_refused_by_name_and_line),
        cmocka_unit_test(work_is_bounded),
        cmocka_unit_test(damaged_templates_do_no_harm),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
