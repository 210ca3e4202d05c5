/* test_precision.c - the grammar of precision names, their one spelling, and the sizes behind them.
 */
#include "test.h"

#include "precision.h"
#include "rng.h"
#include <string.h>

static bool same_precision(const precision *a, const precision *b) {
    if (a->weight != b->weight || a->group != b->group || a->sym != b->sym || a->act != b->act)
        return false;
    if (a->n_kv_layers != b->n_kv_layers) return false;
    if (a->n_kv_layers == 0) return a->kv.k == b->kv.k && a->kv.v == b->kv.v;
    return memcmp(a->kv_layer, b->kv_layer, (size_t)a->n_kv_layers * sizeof *a->kv_layer) == 0;
}

static void names_mean_what_the_grammar_says(void **state) {
    (void)state;
    static const struct {
        const char *name, *canonical;
        weight_format w;
        int32_t group;
        bool sym;
        act_format a;
        kv_format k, v;
    } cases[] = {
        {"W16", "W16A16KV16", WF_16, 0, false, AF_16, KF_16, KF_16},
        {"W8A8", "W8A8KV16", WF_INT8, 0, false, AF_INT8, KF_16, KF_16},
        {"W8g64KV8", "W8g64A16KV8", WF_INT8, 64, false, AF_16, KF_8, KF_8},
        {"W8gK", "W8A16KV16", WF_INT8, 0, false, AF_16, KF_16, KF_16},
        {"W4A16KV8", "W4A16KV8", WF_INT4, 128, false, AF_16, KF_8, KF_8},
        {"W4g128KV8", "W4A16KV8", WF_INT4, 128, false, AF_16, KF_8, KF_8},
        {"W4g64symA8K8V4", "W4g64symA8K8V4", WF_INT4, 64, true, AF_INT8, KF_8, KF_4},
        {"W4sym", "W4symA16KV16", WF_INT4, 128, true, AF_16, KF_16, KF_16},
        {"W4gKK4V4", "W4gKA16KV4", WF_INT4, 0, false, AF_16, KF_4, KF_4},
        {"W4gK", "W4gKA16KV16", WF_INT4, 0, false, AF_16, KF_16, KF_16},
        {"W4g16K16VFP8", "W4g16A16K16VFP8", WF_INT4, 16, false, AF_16, KF_16, KF_FP8},
        {"FP8", "WFP8AFP8KVFP8", WF_FP8, 0, false, AF_FP8, KF_FP8, KF_FP8},
        {"WFP8bAFP8KV16", "WFP8bAFP8KV16", WF_FP8B, 128, false, AF_FP8, KF_16, KF_16},
        {"WMXFP4", "WMXFP4A16KV16", WF_MXFP4, 32, false, AF_16, KF_16, KF_16},
        {"WNVFP4KVFP8", "WNVFP4A16KVFP8", WF_NVFP4, 16, false, AF_16, KF_FP8, KF_FP8},
    };
    for (int32_t i = 0; i < COUNT_OF(cases); i++) {
        precision p;
        char name[PRECISION_NAME_MAX];
        assert_ok(precision_parse(&p, cases[i].name));
        precision want = {.weight = cases[i].w,
                          .group = cases[i].group,
                          .sym = cases[i].sym,
                          .act = cases[i].a,
                          .kv = {cases[i].k, cases[i].v}};
        assert_true(same_precision(&p, &want));
        want.kv.v ^= 1; /* twin */
        assert_false(same_precision(&p, &want));
        assert_string_equal(precision_name(&p, name), cases[i].canonical);
    }
}

/* Every weight spelling x activation x pair of KV formats: name -> parse -> the same struct, and
 * all names differ. */
static void every_combination_survives_its_name(void **state) {
    (void)state;
    static const int32_t groups[] = {0, 16, 32, 64, 128, 256, 65536};
    int32_t n = 0;
    static uint64_t seen[2048];
    for (int32_t w = 0; w < WF_COUNT; w++)
        for (int32_t g = 0; g < (w == WF_INT4 ? 2 * COUNT_OF(groups) : 1); g++)
            for (int32_t a = 0; a < AF_COUNT; a++)
                for (int32_t k = 0; k < KF_COUNT; k++)
                    for (int32_t v = 0; v < KF_COUNT; v++) {
                        static const int32_t own[WF_COUNT] = {
                            [WF_FP8B] = 128, [WF_MXFP4] = 32, [WF_NVFP4] = 16};
                        const precision p = {.weight = (weight_format)w,
                                             .group = w == WF_INT4 ? groups[g / 2] : own[w],
                                             .sym = g & 1,
                                             .act = (act_format)a,
                                             .kv = {(uint8_t)k, (uint8_t)v}};
                        char name[PRECISION_NAME_MAX], again[PRECISION_NAME_MAX];
                        precision q;
                        assert_ok(precision_parse(&q, precision_name(&p, name)));
                        assert_true(same_precision(&p, &q));
                        assert_string_equal(precision_name(&q, again), name);
                        assert_true(precision_kv(&q, 79).v == v);
                        seen[n] = hash_bytes(name, strlen(name), 0);
                        for (int32_t i = 0; i < n; i++) assert_true(seen[i] != seen[n]);
                        n++;
                    }
    assert_int_equal(n, (6 + 14) * 3 * 16);
}

static void lists_give_one_format_a_layer(void **state) {
    (void)state;
    precision p;
    char name[PRECISION_NAME_MAX];
    assert_ok(precision_parse(&p, "W4A16KV[8x2,8,K8V4,K8V4x2,16,K4V4,FP8x248]"));
    assert_int_equal(p.n_kv_layers, PRECISION_LAYERS_MAX);
    for (int32_t i = 0; i < p.n_kv_layers; i++) {
        const kv_pair got = precision_kv(&p, i);
        const kv_format k = i < 6 ? KF_8 : i == 6 ? KF_16 : i == 7 ? KF_4 : KF_FP8;
        assert_int_equal(got.k, k);
        assert_int_equal(got.v, i >= 3 && i < 6 ? KF_4 : k);
    }
    assert_string_equal(precision_name(&p, name), "W4A16KV[8x3,K8V4x3,16,4,FP8x248]");
    assert_ok(precision_parse(&p, "W16KV[8]")); /* a list of one is not KV8: it fits one layer */
    assert_int_equal(p.n_kv_layers, 1);
    assert_string_equal(precision_name(&p, name), "W16A16KV[8]");
}

static void random_lists_survive_their_names(void **state) {
    (void)state;
    rng r;
    rng_seed(&r, 21, 0);
    for (int32_t round = 0; round < 2000; round++) {
        precision p = {.weight = WF_INT4, .group = 64, .sym = true}, q;
        p.n_kv_layers = (int32_t)rng_range(&r, 1, PRECISION_LAYERS_MAX);
        const uint64_t change = 1 + rng_below(&r, 20); /* mean length of a run */
        kv_pair kv = {KF_8, KF_4};
        for (int32_t i = 0; i < p.n_kv_layers; i++) {
            if (rng_below(&r, change) == 0) {
                kv.k = (uint8_t)rng_below(&r, KF_COUNT);
                kv.v = (uint8_t)rng_below(&r, KF_COUNT);
            }
            p.kv_layer[i] = kv;
        }
        char name[PRECISION_NAME_MAX];
        assert_ok(precision_parse(&q, precision_name(&p, name)));
        assert_true(same_precision(&p, &q));
        q.kv_layer[q.n_kv_layers - 1].k ^= 1; /* twin */
        assert_false(same_precision(&p, &q));
    }
}

/* The longest name there is: no two neighbours alike, every item the longest, the longest weight.
 */
static void the_longest_name_fits_its_buffer(void **state) {
    (void)state;
    precision p = {.weight = WF_INT4, .group = 65536, .sym = true, .act = AF_FP8}, q;
    p.n_kv_layers = PRECISION_LAYERS_MAX;
    for (int32_t i = 0; i < PRECISION_LAYERS_MAX; i++)
        p.kv_layer[i] = i & 1 ? (kv_pair){KF_16, KF_FP8} : (kv_pair){KF_FP8, KF_16};
    char name[PRECISION_NAME_MAX];
    assert_true(strlen(precision_name(&p, name)) > 2000);
    assert_ok(precision_parse(&q, name));
    assert_true(same_precision(&p, &q));
}

static const struct {
    const char *name;
    status st;
    const char *says; /* part of the message */
} bad_names[] = {
    {"", ST_FORMAT, "does not start with W"},
    {"w4a16", ST_FORMAT, "does not start with W"},
    {"fp8", ST_FORMAT, "does not start with W"},
    {"FP8KV8", ST_FORMAT, "does not start with W"},
    {"A16", ST_FORMAT, "does not start with W"},
    {"W", ST_FORMAT, "unknown weight format"},
    {"W5A16", ST_FORMAT, "at '5A16'"},
    {"W1", ST_FORMAT, "unknown weight format"},
    {"W160", ST_FORMAT, "at '0'"},
    {"WFP4", ST_FORMAT, "unknown weight format"},
    {"WFP8c", ST_FORMAT, "at 'c'"},
    {"W4 A16", ST_FORMAT, "at ' A16'"},
    {"W4A", ST_FORMAT, "unknown activation format"},
    {"W4A4", ST_FORMAT, "at '4'"},
    {"W4A16A16", ST_FORMAT, "at 'A16'"},
    {"W4KV8A16", ST_FORMAT, "at 'A16'"},
    {"W4A16KV", ST_FORMAT, "unknown KV format"},
    {"W4A16KV7", ST_FORMAT, "unknown KV format"},
    {"W4A16KV8x2", ST_FORMAT, "at 'x2'"},
    {"W4A16KV8junk", ST_FORMAT, "at 'junk'"},
    {"W4A16KV8 ", ST_FORMAT, "at ' '"},
    {"W4A16K8", ST_FORMAT, "without its V"},
    {"W4A16V8", ST_FORMAT, "at 'V8'"},
    {"W4A16K8V", ST_FORMAT, "unknown KV format"},
    {"W4g", ST_FORMAT, "no group size"},
    {"W4gx", ST_FORMAT, "no group size"},
    {"W4g-16", ST_FORMAT, "no group size"},
    {"W4g0", ST_UNSUPPORTED, "multiple of 16"},
    {"W4g1", ST_UNSUPPORTED, "multiple of 16"},
    {"W4g120", ST_UNSUPPORTED, "multiple of 16"},
    {"W4g65552", ST_UNSUPPORTED, "up to 65536"},
    {"W4g4294967296", ST_UNSUPPORTED, "up to 65536"},
    {"W4g99999999999999999999999999999999999999", ST_UNSUPPORTED, "up to 65536"},
    {"W4symg64", ST_FORMAT, "at 'g64'"},
    {"W4symsym", ST_FORMAT, "at 'sym'"},
    {"WFP8g128", ST_UNSUPPORTED, "only W4 and W8"},
    {"W8sym", ST_UNSUPPORTED, "zero points"},
    {"W16g64", ST_UNSUPPORTED, "only W4"},
    {"WFP8symA16", ST_UNSUPPORTED, "only W4"},
    {"WMXFP4g32", ST_UNSUPPORTED, "only W4"},
    {"W4KV[", ST_FORMAT, "empty item"},
    {"W4KV[]", ST_FORMAT, "empty item"},
    {"W4KV[8,]", ST_FORMAT, "empty item"},
    {"W4KV[,8]", ST_FORMAT, "empty item"},
    {"W4KV[8", ST_FORMAT, "lacks , or ]"},
    {"W4KV[8 4]", ST_FORMAT, "lacks , or ]"},
    {"W4KV[8]]", ST_FORMAT, "at ']'"},
    {"W4KV[8x]", ST_FORMAT, "no count"},
    {"W4KV[8x0]", ST_FORMAT, "no count"},
    {"W4KV[8x-1]", ST_FORMAT, "no count"},
    {"W4KV[8x2x2]", ST_FORMAT, "at 'x2]'"},
    {"W4KV[K8x2]", ST_FORMAT, "without its V"},
    {"W4KV[KV8]", ST_FORMAT, "unknown KV format"},
    {"W4KV[8x257]", ST_UNSUPPORTED, "256 layers"},
    {"W4KV[8x256,8]", ST_UNSUPPORTED, "256 layers"},
    {"W4KV[8x99999999999999999999]", ST_UNSUPPORTED, "256 layers"},
    {"W4\nA16", ST_FORMAT, "W4 A16"},
};

static void bad_names_are_refused_in_one_line(void **state) {
    (void)state;
    for (int32_t i = 0; i < COUNT_OF(bad_names); i++) {
        precision p, before;
        memset(&p, 0x5a, sizeof p);
        before = p;
        assert_status(precision_parse(&p, bad_names[i].name), bad_names[i].st);
        assert_memory_equal(&p, &before, sizeof p); /* a refusal changes nothing */
        if (!strstr(fail_message(), bad_names[i].says))
            fail_msg("'%s': '%s' lacks '%s'", bad_names[i].name, fail_message(), bad_names[i].says);
        assert_null(strchr(fail_message(), '\n'));
    }
    char endless[5000];
    memset(endless, '4', sizeof endless - 1);
    endless[0] = 'W';
    endless[sizeof endless - 1] = 0;
    precision p;
    assert_status(precision_parse(&p, endless), ST_FORMAT);
    assert_true(strlen(fail_message()) < 160);
}

/* Cutting a good name anywhere or changing one byte gives a refusal or a name that is stable. */
static void damaged_names_never_go_astray(void **state) {
    (void)state;
    static const char good[] = "W4g64symA8KV[8x12,K8V4x3,16,FP8]";
    for (size_t cut = 0; cut < sizeof good; cut++)
        for (int32_t byte = -1; byte < 128; byte++) {
            char name[sizeof good + 1] = "", one[PRECISION_NAME_MAX], two[PRECISION_NAME_MAX];
            memcpy(name, good, sizeof good);
            name[cut] = (char)(byte < 0 ? 0 : byte);
            precision p, q;
            const status st = precision_parse(&p, name);
            assert_true(st == ST_OK || st == ST_FORMAT || st == ST_UNSUPPORTED);
            if (st != ST_OK) continue;
            assert_ok(precision_parse(&q, precision_name(&p, one)));
            assert_string_equal(precision_name(&q, two), one);
        }
}

/* By hand for a 4096 x 14336 matrix, 58720256 weights (Llama-3.1-8B down_proj). */
static void weights_take_the_bytes_counted_by_hand(void **state) {
    (void)state;
    static const struct {
        const char *name;
        int64_t bytes;
    } cases[] = {
        {"W16", 117440512},
        {"W8", 58720256 + 4096 * 4},
        {"W4", 29360128 + 4096 * 112 * 3}, /* 112 groups of 128: f16 and u8 each */
        {"W4sym", 29360128 + 4096 * 112 * 2},
        {"W4g32", 29360128 + 4096 * 448 * 3},
        {"W4gK", 29360128 + 4096 * 3},
        {"WFP8", 58720256 + 4096 * 4},
        {"WFP8b", 58720256 + 32 * 112 * 4},
        {"WMXFP4", 29360128 + 4096 * 448},
        {"WNVFP4", 29360128 + 4096 * 896},
    };
    for (int32_t i = 0; i < COUNT_OF(cases); i++) {
        precision p;
        assert_ok(precision_parse(&p, cases[i].name));
        assert_int_equal(precision_weight_bytes(&p, 4096, 14336), cases[i].bytes);
        assert_int_not_equal(precision_weight_bytes(&p, 4096, 14352), cases[i].bytes); /* twin */
    }
    precision p;
    /* FP8b: 129 outputs are two block rows, 16 inputs one block column. */
    assert_ok(precision_parse(&p, "WFP8b"));
    assert_int_equal(precision_weight_bytes(&p, 144, 16), 144 * 16 + 2 * 4);
}

static void kv_takes_the_bytes_counted_by_hand(void **state) {
    (void)state;
    assert_int_equal(kv_format_bytes(KF_16, 128), 256);
    assert_int_equal(kv_format_bytes(KF_8, 128), 128 + 4);
    assert_int_equal(kv_format_bytes(KF_4, 128), 64 + 4);
    assert_int_equal(kv_format_bytes(KF_FP8, 128), 128 + 2);
    assert_int_equal(kv_format_bits(KF_4), 4);
    assert_string_equal(kv_format_text(KF_FP8), "FP8");
    assert_string_equal(weight_format_text(WF_FP8B), "FP8b");
    assert_string_equal(act_format_text(AF_INT8), "8");
}

static void shapes_are_refused_with_the_reason(void **state) {
    (void)state;
    static const struct {
        const char *name;
        int32_t n, k;
        const char *says; /* NULL: fits */
    } cases[] = {
        {"W16", 8, 7, NULL},
        {"W16", 0, 16, "0 x 16"},
        {"W16", 16, -1, "16 x -1"},
        {"W8", 16, 16, NULL},
        {"W8", 24, 16, "n=24"},
        {"W8", 16, 24, "k=24"},
        {"W4", 16, 128, NULL},
        {"W4", 16, 192, "group of 128"},
        {"W4g64", 16, 192, NULL},
        {"W4gK", 16, 48, NULL},
        {"WFP8b", 144, 144, NULL},
        {"WFP8b", 136, 144, "n=136"},
        {"WMXFP4", 16, 48, "group of 32"},
        {"WNVFP4", 16, 48, NULL},
    };
    for (int32_t i = 0; i < COUNT_OF(cases); i++) {
        precision p;
        assert_ok(precision_parse(&p, cases[i].name));
        if (!cases[i].says) {
            assert_ok(precision_fits_shape(&p, cases[i].n, cases[i].k));
            continue;
        }
        assert_status(precision_fits_shape(&p, cases[i].n, cases[i].k), ST_SHAPE);
        assert_non_null(strstr(fail_message(), cases[i].says));
    }
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(names_mean_what_the_grammar_says),
        cmocka_unit_test(every_combination_survives_its_name),
        cmocka_unit_test(lists_give_one_format_a_layer),
        cmocka_unit_test(random_lists_survive_their_names),
        cmocka_unit_test(the_longest_name_fits_its_buffer),
        cmocka_unit_test(bad_names_are_refused_in_one_line),
        cmocka_unit_test(damaged_names_never_go_astray),
        cmocka_unit_test(weights_take_the_bytes_counted_by_hand),
        cmocka_unit_test(kv_takes_the_bytes_counted_by_hand),
        cmocka_unit_test(shapes_are_refused_with_the_reason),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
