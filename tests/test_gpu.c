/* test_gpu.c - data sheets: what must hold of them, and damaged ones. */
#include "gpu.h"
#include "json.h"
#include "nvml.h"
#include "test.h"

#include <string.h>

static void test_sheets(void **state) {
    (void)state;
    arena a;
    assert_ok(arena_open(&a, 1 << 16));
    const char **names;
    int32_t n;
    assert_ok(gpu_names(&a, &names, &n));
    assert_true(n >= 5);
    for (int32_t i = 0; i < n; i++) {
        gpu_sheet g;
        assert_true(i == 0 || strcmp(names[i - 1], names[i]) < 0);
        assert_ok(gpu_load(&g, names[i]));
        assert_string_equal(g.name, names[i]);
        /* Dense rates from SMs and clocks: FLOP per clock and SM with f32 accumulation, GHz. */
        const bool geforce = strstr(g.title, "GeForce") != NULL;
        const double per_clock = g.sm == 90 ? 4096 : g.sm == 80 ? 2048 : geforce ? 512 : 1024;
        const double clock_ghz = g.f16_flops / g.n_sms / per_clock / 1e9;
        if (g.sm <= 90) {
            assert_more(clock_ghz, 1.3);
            assert_at_most(clock_ghz, 2.6);
        }
        assert_close(g.int8_ops / g.f16_flops, geforce ? 4 : 2, 0.03);
        if (g.sm == 80) assert_true(g.fp8_flops == 0);
        if (g.sm > 80) assert_close(g.fp8_flops / g.f16_flops, 2, 0.03);
        assert_true(g.reserved_bytes > 0 && g.l2_bytes < g.memory_bytes);
    }
    arena_close(&a);
}

/* The traps of public tables, by number. */
static void test_traps(void **state) {
    (void)state;
    gpu_sheet g;
    assert_ok(gpu_load(&g, "h200"));
    assert_close(g.f16_flops, 989e12, 1); /* not the sparse 1979 */
    assert_close(g.dram_bytes_per_s, 4.8e12, 1);
    assert_close(g.link_bytes_per_s, 450e9, 1); /* one direction */
    assert_int_equal(g.sm, 90);
    assert_int_equal(g.n_sms, 132);
    assert_true(g.calibrated[0] != 0);
    assert_ok(gpu_load(&g, "l40s"));
    assert_close(g.fp8_flops, 733e12, 1); /* not 1466 */
    assert_ok(gpu_load(&g, "rtx4090"));
    assert_close(g.f16_flops, 165.2e12, 1e3); /* not 330.3, FP16 accumulation */
    assert_true(g.calibrated[0] == 0);        /* nothing was measured on it */
    assert_ok(gpu_load(&g, "h100-sxm"));
    assert_close(g.dram_bytes_per_s, 3.35e12, 1); /* not 3072 */
}

static void test_names(void **state) {
    (void)state;
    gpu_sheet g;
    static const char *const bad[] = {"",
                                      ".",
                                      "..",
                                      "../models/order.txt",
                                      "/etc/passwd",
                                      "h300",
                                      "h200.json",
                                      "a-name-that-is-much-too-long-for-the-field"};
    for (int32_t i = 0; i < COUNT_OF(bad); i++) assert_status(gpu_load(&g, bad[i]), ST_NOTFOUND);
    static const char *const known[] = {"a100-80gb", "h100-sxm", "h200", "l40s", "rtx4090"};
    for (int32_t i = 0; i < COUNT_OF(known); i++) assert_non_null(strstr(fail_message(), known[i]));
    arena a;
    const char **names;
    int32_t n;
    assert_ok(arena_open(&a, 1 << 16));
    for (int64_t i = 1; i <= 3; i++) {
        mem_fail_at(i);
        assert_status(gpu_names(&a, &names, &n), ST_NOMEM);
    }
    mem_fail_at(0);
    arena_close(&a);
}

/* The sheet of an H200 with one key changed; "" takes it away. */
static void refuse(const char *key, const char *value, status want) {
    json_t *root;
    assert_ok(json_file(&root, "workloads/gpus/h200.json"));
    if (value[0])
        json_object_set_new(root, key, json_loads(value, JSON_DECODE_ANY, NULL));
    else
        json_object_del(root, key);
    char *line = json_line(root);
    gpu_sheet g;
    const status st = gpu_parse(&g, line, strlen(line), "sheet");
    if (st != want || !strstr(fail_message(), key))
        fail_msg("%s = %s: %s (%s)", key, value, status_text(st), fail_message());
    mem_free(line);
    json_decref(root);
}

static void test_refusals(void **state) {
    (void)state;
    refuse("title", "", ST_NOTFOUND);
    refuse("title", "7", ST_FORMAT);
    refuse("sm", "", ST_NOTFOUND);
    refuse("n_sms", "132", ST_FORMAT); /* a figure without its source */
    refuse("n_sms", "{\"value\":132}", ST_NOTFOUND);
    refuse("n_sms", "{\"value\":132,\"source\":\"\"}", ST_FORMAT);
    refuse("n_sms", "{\"source\":\"x\"}", ST_NOTFOUND);
    refuse("n_sms", "{\"value\":0,\"source\":\"x\"}", ST_RANGE);
    refuse("f16_flops", "{\"value\":-1,\"source\":\"x\"}", ST_RANGE);
    refuse("f16_flops", "{\"value\":\"1\",\"source\":\"x\"}", ST_FORMAT);
    refuse("dram_efficiency", "{\"value\":1.01,\"source\":\"x\"}", ST_RANGE);
    refuse("memory_bytes", "{\"value\":1e9,\"source\":\"x\"}", ST_RANGE); /* less than reserved */
    gpu_sheet g;
    assert_status(gpu_parse(&g, "[]", 2, "x"), ST_FORMAT);
    assert_status(gpu_parse(&g, "{", 1, "x"), ST_FORMAT);
}

/* The first of CUDA_VISIBLE_DEVICES: what clocks and power in a row are of. */
static void test_visible(void **state) {
    (void)state;
    static const struct {
        const char *list, *uuid;
        int32_t index;
    } cases[] = {{NULL, NULL, 0},         {"", NULL, 0},
                 {"1", NULL, 1},          {"3,0", NULL, 3},
                 {" 2 ,1", NULL, 2},      {"GPU-8a5c,1", "GPU-8a5c", 0},
                 {"-1", NULL, 0},         {"1x", NULL, 0},
                 {"NoDevFiles", NULL, 0}, {"MIG-GPU-1/2/3", "MIG-GPU-1/2/3", 0}};
    for (int i = 0; i < COUNT_OF(cases); i++) {
        int32_t index;
        const char *uuid = nvml_first_visible(cases[i].list, &index);
        assert_int_equal(index, cases[i].index);
        assert_int_equal(uuid != NULL, cases[i].uuid != NULL);
        if (uuid) assert_string_equal(uuid, cases[i].uuid);
    }
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_sheets),  cmocka_unit_test(test_traps),
        cmocka_unit_test(test_names),   cmocka_unit_test(test_refusals),
        cmocka_unit_test(test_visible),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
