/* test_capacity.c - pages and refusals against sums done by hand. */
#include "test.h"

#include "capacity.h"
#include "gpu.h"
#include <string.h>

static model_config model(const char *name) {
    model_config c;
    assert_ok(model_config_load(&c, name));
    return c;
}

static precision format(const char *name) {
    precision p;
    assert_ok(precision_parse(&p, name));
    return p;
}

static void pages_have_exact_bytes(void **state) {
    (void)state;
    const model_config c = model("Llama-3.1-8B"); /* 32 layers, 8 KV heads, D 128 */
    static const struct {
        const char *name;
        int64_t head; /* bytes of one token of one head, K and V */
    } rows[] = {
        {"W16A16KV16", 2 * 256},          {"W16A16KV8", 2 * (128 + 4)},
        {"W16A16KV4", 2 * (64 + 4)},      {"W16A16KVFP8", 2 * (128 + 2)},
        {"W16A16K8V4", 128 + 4 + 64 + 4},
    };
    for (int i = 0; i < COUNT_OF(rows); i++) {
        const precision p = format(rows[i].name);
        assert_int_equal(kv_page_bytes(&c, &p, 1), 64 * 32 * 8 * rows[i].head);
        assert_int_equal(kv_page_bytes(&c, &p, 4), 64 * 32 * 2 * rows[i].head);
        assert_int_equal(kv_page_bytes(&c, &p, 16), 64 * 32 * 1 * rows[i].head); /* replicated */
    }
    const precision list = format("W16A16KV[8x16,4x16]"); /* half the layers each */
    assert_int_equal(kv_page_bytes(&c, &list, 1), 64 * 8 * 16 * (2 * 132 + 2 * 68));
}

static void workspace_is_the_sum_of_the_buffers(void **state) {
    (void)state;
    const model_config c = model("Llama-3.1-8B"); /* E 4096, F 14336, V 128256 */
    const precision p = format("W16A16KV16"), codes = format("W16A16KV[16x31,4x1]");
    const int64_t token = 3 * 4096 + (32 + 16) * 128 + 32 * 128 + 3 * 14336;
    assert_int_equal(workspace_bytes(&c, &p, 1, 8192, 256, 256, 9),
                     8192 * (2 * token + 16) + 256 * (2 * 4096 + 4 * 128256) + 256 * 76);
    const int64_t half = 3 * 4096 + (16 + 8) * 128 + 16 * 128 + 3 * 7168;
    assert_int_equal(workspace_bytes(&c, &p, 2, 100, 10, 10, 9),
                     100 * (2 * half + 16) + 10 * (2 * 4096 + 4 * 128256) + 10 * 76);
    /* Of chunks of 256 tokens and more (32 / 8 heads) pages are written out, 1024 at most. */
    const int64_t page = 64 * 8 * 2 * 256, none = workspace_bytes(&c, &p, 1, 1024, 10, 10, 9);
    assert_int_equal(workspace_bytes(&c, &codes, 1, 1024, 10, 10, 5000) - none, 1024 * page);
    assert_int_equal(workspace_bytes(&c, &codes, 1, 1024, 10, 10, 9) - none, 9 * page);
    assert_int_equal(wide_pages(&c, &codes, 1, 1100, 8191, 5000), 4 * 128);
    assert_int_equal(wide_pages(&c, &codes, 1, 255, 8191, 5000), 0);
    const model_config moe = model("Qwen3-30B-A3B"); /* E 2048, 32 heads, 4 KV, X 128, k 8, F 768 */
    const int64_t routed = 3 * 2048 + (32 + 8) * 128 + 32 * 128 + 8 * 3 * 768 + 128 + 8 * 2048;
    assert_int_equal(workspace_bytes(&moe, &p, 1, 7, 3, 2, 9),
                     7 * (2 * routed + 16 + 96) + 2 * (2 * 2048 + 4 * (int64_t)moe.vocab) + 3 * 76);
}

/* Of a small pool every page brings one at 16 bit with it. */
static void pages_at_16_bit_are_no_more_than_the_pool(void **state) {
    (void)state;
    const model_config c = model("Llama-3.1-8B");
    const precision p = format("W4A16KV8");
    for (int32_t n = 1; n < 2000; n += 333) {
        const int64_t all = model_weight_bytes(&c, &p, 1) +
                            workspace_bytes(&c, &p, 1, 2048, 64, 64, n) +
                            n * kv_page_bytes(&c, &p, 1);
        capacity m;
        assert_ok(capacity_compute(&m, &c, &p, 1, all, 1, 2048, 64, 0, 1));
        assert_int_equal(m.n_pages, n);
        assert_int_equal(m.weight_bytes + m.workspace_bytes + m.kv_bytes, all);
        if (n == 1) continue;
        assert_ok(capacity_compute(&m, &c, &p, 1, all - 1, 1, 2048, 64, 0, 1)); /* twin */
        assert_int_equal(m.n_pages, n - 1);
    }
}

/* n pages fit and n + 1 do not, to the byte. */
static void the_last_page_fits_to_the_byte(void **state) {
    (void)state;
    const model_config c = model("Llama-3.1-8B");
    const precision p = format("W4A16KV8");
    const int64_t page = kv_page_bytes(&c, &p, 1), n = 2000;
    const int64_t fixed =
        model_weight_bytes(&c, &p, 1) + workspace_bytes(&c, &p, 1, 2048, 64, 64, n);
    capacity m;
    assert_ok(capacity_compute(&m, &c, &p, 1, fixed + n * page, 1, 2048, 64, 0, 1));
    assert_int_equal(m.n_pages, n);
    assert_int_equal(m.kv_bytes, n * page);
    assert_int_equal(m.kv_tokens, n * 64);
    assert_int_equal(m.weight_bytes + m.workspace_bytes, fixed);
    assert_ok(capacity_compute(&m, &c, &p, 1, fixed + n * page - 1, 1, 2048, 64, 0, 1)); /* twin */
    assert_int_equal(m.n_pages, n - 1);
    assert_ok(capacity_compute(&m, &c, &p, 1, 2 * (fixed + n * page), 0.5, 2048, 64, 0, 1));
    assert_int_equal(m.n_pages, n);
    assert_ok(capacity_compute(&m, &c, &p, 1, fixed + n * page, 1, 2048, 64, 17, 1));
    assert_int_equal(m.n_pages, 17); /* asked for */
    assert_status(capacity_compute(&m, &c, &p, 1, fixed + n * page, 1, 2048, 64, (int32_t)n + 1, 1),
                  ST_OOM);
    const int64_t three =
        model_weight_bytes(&c, &p, 1) + workspace_bytes(&c, &p, 1, 2048, 64, 64, 3) + 3 * page;
    assert_status(capacity_compute(&m, &c, &p, 1, three, 1, 2048, 64, 0, 4), ST_OOM);
    assert_non_null(strstr(fail_message(), "4 KV pages of"));
    assert_ok(capacity_compute(&m, &c, &p, 1, 0, 0.9, 2048, 64, 33, 1)); /* unlimited */
    assert_int_equal(m.n_pages, 33);
    assert_status(capacity_compute(&m, &c, &p, 1, 0, 0.9, 2048, 64, 0, 1), ST_RANGE);
}

static void a_refusal_names_all_terms(void **state) {
    (void)state;
    const model_config c = model("Llama-3.1-70B");
    const precision p = format("W16");
    gpu_sheet g;
    assert_ok(gpu_load(&g, "rtx4090"));
    capacity m;
    assert_status(
        capacity_compute(&m, &c, &p, 1, g.memory_bytes - g.reserved_bytes, 0.9, 8192, 256, 0, 1),
        ST_OOM);
    static const char *const parts[] = {"Llama-3.1-70B W16A16KV16 tp 1", "weights 131.4 GiB",
                                        "workspace 2.1 GiB", "usable 20.", "(90 % of "};
    for (int i = 0; i < COUNT_OF(parts); i++)
        if (!strstr(fail_message(), parts[i]))
            fail_msg("'%s' lacks '%s'", fail_message(), parts[i]);
}

static void the_smallest_tp_that_fits_is_chosen(void **state) {
    (void)state;
    const model_config c = model("Llama-3.1-70B");
    gpu_sheet g;
    assert_ok(gpu_load(&g, "h100-sxm"));
    const int64_t usable = g.memory_bytes - g.reserved_bytes;
    const precision wide = format("W16"), narrow = format("W4A16KV8");
    int32_t tp = 0;
    assert_ok(capacity_choose_tp(&tp, &c, &wide, usable, 0.9, 8192, 256, 64));
    assert_int_equal(tp, 2);
    assert_ok(capacity_choose_tp(&tp, &c, &wide, usable, 0.9, 8192, 256, 2048));
    assert_int_equal(tp, 4); /* 20 GiB of KV beside 66 GiB of weights do not fit 71 */
    assert_ok(capacity_choose_tp(&tp, &c, &narrow, usable, 0.9, 8192, 256, 64));
    assert_int_equal(tp, 1);
    assert_ok(gpu_load(&g, "rtx4090"));
    assert_status(capacity_choose_tp(&tp, &c, &wide, (int64_t)4 << 30, 0.9, 8192, 256, 1), ST_OOM);
    const model_config nemo = model("Mixtral-8x7B");
    assert_ok(capacity_choose_tp(&tp, &nemo, &narrow, usable, 0.9, 8192, 256, 64));
    assert_int_equal(tp, 1);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(pages_have_exact_bytes),
        cmocka_unit_test(workspace_is_the_sum_of_the_buffers),
        cmocka_unit_test(pages_at_16_bit_are_no_more_than_the_pool),
        cmocka_unit_test(the_last_page_fits_to_the_byte),
        cmocka_unit_test(a_refusal_names_all_terms),
        cmocka_unit_test(the_smallest_tp_that_fits_is_chosen),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
