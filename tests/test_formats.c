/* test_formats.c - the support matrix against the rules of DESIGN.md, written here a second time as
 * a plain list of pairs, and the command that prints it. */
#include "test.h"

#include "cli.h"
#include "formats.h"
#include <jansson.h>
#include <string.h>
#include <unistd.h>

static precision parsed(const char *name) {
    precision p;
    assert_ok(precision_parse(&p, name));
    return p;
}

/* First architecture that runs a pair: 0 never, else sm; every pair with a meaning runs on cpu. */
static const struct {
    const char *name;
    int32_t sm;
} rules[] = {
    {"W16A16", 80},    {"W8A16", 80},     {"W4A16", 80},   {"WFP8A16", 80},   {"WFP8bA16", 80},
    {"WMXFP4A16", 80}, {"WNVFP4A16", 80}, {"W8A8", 80},    {"W4A8", 80},      {"WFP8AFP8", 89},
    {"WFP8bAFP8", 89}, {"W16A8", 0},      {"W16AFP8", 0},  {"W8AFP8", 0},     {"W4AFP8", 0},
    {"WFP8A8", 0},     {"WFP8bA8", 0},    {"WMXFP4A8", 0}, {"WMXFP4AFP8", 0}, {"WNVFP4A8", 0},
    {"WNVFP4AFP8", 0},
};

/* Pairs x architectures where format_supported and the rule disagree; `planted` (an index, or -1)
 * has its rule inverted. */
static int32_t disagreements(int32_t planted) {
    int32_t wrong = 0;
    for (int32_t i = 0; i < COUNT_OF(rules); i++) {
        const precision p = parsed(rules[i].name);
        for (int32_t a = 0; a < arch_count(); a++) {
            const int32_t arch = arch_at(a);
            bool want = rules[i].sm > 0 && (arch == ARCH_CPU || arch >= rules[i].sm);
            if (i == planted) want = !want;
            const status st = format_supported(&p, arch);
            assert_true(st == ST_OK || st == ST_UNSUPPORTED);
            wrong += (st == ST_OK) != want;
        }
    }
    return wrong;
}

static void every_pair_is_supported_as_the_rules_say(void **state) {
    (void)state;
    assert_int_equal(COUNT_OF(rules), WF_COUNT * AF_COUNT);
    assert_int_equal(disagreements(-1), 0);
    for (int32_t i = 0; i < COUNT_OF(rules); i++)
        assert_int_equal(disagreements(i), arch_count()); /* twins */
}

static void refusals_give_the_reason(void **state) {
    (void)state;
    static const struct {
        const char *name;
        int32_t arch;
        const char *says;
    } cases[] = {
        {"FP8", 80, "sm_80 has no FP8 matrix instruction; use A16 (weight-only)"},
        {"WFP8bAFP8", 86, "sm_86 has no FP8 matrix instruction; use A16 (weight-only)"},
        {"W16A8", 90, "only beside quantised weights"},
        {"W16AFP8", ARCH_CPU, "only beside quantised weights"},
        {"W4AFP8", 90, "FP8 activations need FP8 weights"},
        {"WFP8A8", 90, "int8 activations need int weights"},
        {"WNVFP4AFP8", 90, "weight-only"},
        {"W4A16", 75, "sm_75 is older than sm_80"},
        {"W4g16A8", 80, "the group of 16 is no multiple of 32"},
        {"W4g48A8", 90, "the group of 48 is no multiple of 32"},
    };
    for (int32_t i = 0; i < COUNT_OF(cases); i++) {
        const precision p = parsed(cases[i].name);
        assert_status(format_supported(&p, cases[i].arch), ST_UNSUPPORTED);
        if (!strstr(fail_message(), cases[i].says))
            fail_msg("%s: '%s' lacks '%s'", cases[i].name, fail_message(), cases[i].says);
    }
    const precision fine[] = {parsed("W4g32A8"), parsed("W4gKA8"), parsed("W4g16A16")};
    for (int32_t i = 0; i < COUNT_OF(fine); i++) assert_ok(format_supported(&fine[i], 80));
    const precision host = parsed("W4g16A8");
    assert_ok(format_supported(&host, ARCH_CPU)); /* the definition has no instruction step */
}

static void keys_values_and_layers_choose_freely(void **state) {
    (void)state;
    for (int32_t k = 0; k < KF_COUNT; k++)
        for (int32_t v = 0; v < KF_COUNT; v++)
            for (int32_t a = 0; a < arch_count(); a++) {
                precision p = parsed("W4A16");
                p.kv = (kv_pair){(uint8_t)k, (uint8_t)v};
                assert_ok(format_supported(&p, arch_at(a)));
            }
    const precision list = parsed("W4A16KV[8x4,K8V4x20,FP8,16]");
    assert_ok(format_supported(&list, 80));
    assert_status(format_supported(&list, 70), ST_UNSUPPORTED);
    assert_null(format_kv_find(KF_8, 70));
    assert_string_equal(fail_message(), "KV8 has no kernel for sm_70");
}

static void the_best_kernel_of_an_architecture_comes_first(void **state) {
    (void)state;
    const precision p = parsed("W4A16");
    assert_string_equal(format_linear_find(&p, ARCH_CPU)->family, "definition");
    assert_string_equal(format_linear_find(&p, 80)->family, "ampere");
    assert_string_equal(format_linear_find(&p, 89)->family, "ampere");
    assert_string_equal(format_linear_find(&p, 90)->family, "hopper");
    assert_string_equal(format_linear_find(&p, 120)->family, "ampere"); /* no wgmma there */
    assert_string_equal(format_kv_find(KF_4, 90)->family, "hopper");
}

/* Groups of W8 are read on the host only: the kernels have one scale a row. */
static void groups_of_8_bits_are_for_the_host(void **state) {
    (void)state;
    const precision grouped = parsed("W8g64A16"), by_row = parsed("W8A16");
    assert_non_null(format_linear_find(&grouped, ARCH_CPU));
    for (int32_t arch = 80; arch <= 90; arch += 10) {
        assert_null(format_linear_find(&grouped, arch));
        assert_non_null(strstr(fail_message(), "one scale a row"));
        assert_non_null(format_linear_find(&by_row, arch));
    }
}

/* What the table claims about itself: the cpu definition is on the host and nowhere else, and
 * nothing on a GPU claims more than it can show. */
static void rows_are_honest_and_sane(void **state) {
    (void)state;
    int32_t n, n_kv;
    const format_linear *linear = format_linear_rows(&n);
    for (int32_t i = 0; i < n; i++) {
        assert_int_equal(!strcmp(linear[i].family, "definition"), linear[i].sm_max == ARCH_CPU);
        assert_true(linear[i].sm_min == ARCH_CPU || linear[i].sm_min >= SM_FIRST);
        assert_true(linear[i].sm_max >= linear[i].sm_min);
        assert_true(linear[i].group_step >= 16 || linear[i].sm_max != ARCH_CPU);
        for (int32_t j = 0; j < i; j++) /* a row that an earlier one hides would never run */
            assert_false(linear[j].weight == linear[i].weight && linear[j].act == linear[i].act &&
                         linear[j].sm_min <= linear[i].sm_min &&
                         linear[j].sm_max >= linear[i].sm_max &&
                         linear[j].group_step <= linear[i].group_step);
    }
    const format_kv *kv = format_kv_rows(&n_kv);
    for (int32_t i = 0; i < n_kv; i++)
        assert_int_equal(!strcmp(kv[i].family, "definition"), kv[i].sm_max == ARCH_CPU);
}

static void gpus_are_found_by_the_names_people_use(void **state) {
    (void)state;
    static const struct {
        const char *name;
        int32_t arch;
    } names[] = {{"cpu", 0},        {"RTX 4090", 89}, {"rtx-4090", 89}, {"L40S", 89},
                 {"A100-80GB", 80}, {"a100", 80},     {"H100-SXM", 90}, {"h100_sxm", 90},
                 {"H200", 90},      {"sm_80", 80},    {"sm_90a", 90},   {"SM86", 86}};
    int32_t arch = -1;
    char buf[16];
    for (int32_t i = 0; i < COUNT_OF(names); i++) {
        assert_ok(arch_parse(&arch, names[i].name));
        assert_int_equal(arch, names[i].arch);
    }
    for (int32_t i = 0; i < arch_count(); i++) { /* every text is a name again */
        assert_ok(arch_parse(&arch, arch_text(arch_at(i), buf)));
        assert_int_equal(arch, arch_at(i));
    }
    static const char *const bad[] = {"", "sm_75", "H300", "rtx",
                                      "a very long name of some GPU, 1"};
    for (int32_t i = 0; i < COUNT_OF(bad); i++) {
        arch = -1;
        assert_status(arch_parse(&arch, bad[i]), ST_NOTFOUND);
        assert_int_equal(arch, -1);
    }
    assert_non_null(strstr(fail_message(), "is none of cpu, sm_80 (A100)"));
}

/* --- The command ------------------------------------------------------------------------------ */

static char output[65536];

/* Run the command with its standard output in `output`. */
static int run(int argc, char **argv) {
    fflush(stdout);
    FILE *f = tmpfile();
    assert_non_null(f);
    const int keep = dup(1), keep_err = dup(2);
    dup2(fileno(f), 1);
    dup2(fileno(f), 2);
    const int result = cmd_formats(argc, argv);
    fflush(stdout);
    fflush(stderr);
    dup2(keep, 1);
    dup2(keep_err, 2);
    close(keep);
    close(keep_err);
    rewind(f);
    output[fread(output, 1, sizeof output - 1, f)] = 0;
    fclose(f);
    return result;
}

#define RUN(...) run(COUNT_OF(((char *[]){__VA_ARGS__})), (char *[]){__VA_ARGS__, NULL})

static void the_matrix_is_printed(void **state) {
    (void)state;
    assert_int_equal(RUN("formats"), 0);
    assert_non_null(strstr(output, "sm_86"));
    assert_non_null(strstr(output, "hopper"));
    assert_non_null(strstr(output, "no FP8 matrix instruction"));
    assert_int_equal(RUN("formats", "--gpu", "RTX 4090"), 0);
    assert_non_null(strstr(output, "sm_89 (RTX 4090, L40S), devices cuda and sim"));
    assert_null(strstr(output, "hopper"));
    assert_null(strstr(output, "no FP8 matrix instruction"));
    assert_int_equal(RUN("formats", "--gpu", "cpu"), 0);
    assert_non_null(strstr(output, "cpu, devices cpu and sim"));
}

static void json_has_one_object_per_pair_and_architecture(void **state) {
    (void)state;
    assert_int_equal(RUN("formats", "--json"), 0);
    int32_t lines = 0, supported = 0, reasons = 0;
    for (char *line = output, *end; (end = strchr(line, '\n')); line = end + 1, lines++) {
        json_t *o = json_loadb(line, (size_t)(end - line), JSON_REJECT_DUPLICATES, NULL);
        assert_non_null(o);
        assert_non_null(json_object_get(o, "arch"));
        const bool kv = json_object_get(o, "kv");
        assert_true(kv != !!json_object_get(o, "weight"));
        supported += !kv && json_is_true(json_object_get(o, "supported"));
        reasons += json_object_get(o, "reason") != NULL;
        json_decref(o);
    }
    assert_int_equal(lines, 5 * (21 + 4));
    assert_int_equal(supported, 5 * 11 - 2 * 2); /* FP8 mma lacks on sm_80 and sm_86 */
    assert_int_equal(reasons, 5 * 10 + 2 * 2);
    assert_int_equal(RUN("formats", "--json", "--gpu", "cpu"), 0);
    assert_null(strstr(output, "sm_"));
}

static void wrong_usage_is_status_2(void **state) {
    (void)state;
    assert_int_equal(RUN("formats", "--gpu"), 2);
    assert_non_null(strstr(output, "--gpu needs a value"));
    assert_int_equal(RUN("formats", "--gpu", "H300"), 2);
    assert_non_null(strstr(output, "'H300' is none of"));
    assert_int_equal(RUN("formats", "--help"), 0);
    assert_non_null(strstr(output, "usage: amalgam formats"));
    assert_int_equal(RUN("formats", "-v"), 2);
    assert_non_null(strstr(output, "unknown option '-v'"));
    assert_int_equal(RUN("formats", "--gqu=h200"), 2);
    assert_non_null(strstr(output, "unknown option '--gqu': the nearest is '--gpu' (--help"));
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(every_pair_is_supported_as_the_rules_say),
        cmocka_unit_test(refusals_give_the_reason),
        cmocka_unit_test(keys_values_and_layers_choose_freely),
        cmocka_unit_test(the_best_kernel_of_an_architecture_comes_first),
        cmocka_unit_test(groups_of_8_bits_are_for_the_host),
        cmocka_unit_test(rows_are_honest_and_sane),
        cmocka_unit_test(gpus_are_found_by_the_names_people_use),
        cmocka_unit_test(the_matrix_is_printed),
        cmocka_unit_test(json_has_one_object_per_pair_and_architecture),
        cmocka_unit_test(wrong_usage_is_status_2),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
