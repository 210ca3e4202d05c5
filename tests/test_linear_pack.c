/* test_linear_pack.c - packing of weights: unpack undoes it for every format, group, type and
 * family, and each word holds what the fragment of its lane wants. */
#include "linear_layout.h"
#include "test.h"

#include <string.h>

typedef struct {
    weight_format format;
    int32_t group;
    bool sym;
    act_format act;
} form;

static const form forms[] = {
    {.format = WF_16},
    {.format = WF_INT8},
    {.format = WF_INT4, .group = 16},
    {.format = WF_INT4, .group = 32},
    {.format = WF_INT4, .group = 32, .sym = true},
    {.format = WF_INT4, .group = 48},
    {.format = WF_INT4, .group = 64},
    {.format = WF_INT4, .group = 128},
    {.format = WF_INT4, .group = 128, .sym = true},
    {.format = WF_INT4, .group = 192},
    {.format = WF_INT4},
    {.format = WF_FP8},
    {.format = WF_FP8B, .group = 128},
    {.format = WF_MXFP4, .group = 32},
    {.format = WF_NVFP4, .group = 16},
    {.format = WF_INT8, .act = AF_INT8},
    {.format = WF_INT4, .group = 32, .act = AF_INT8},
    {.format = WF_FP8, .act = AF_FP8},
    {.format = WF_FP8B, .group = 128, .act = AF_FP8},
};

/* A matrix in canonical form in arena `a`, every byte random where the format allows. */
static void make(qmatrix *q, arena *a, const linear_weight *w, uint64_t seed) {
    const precision p = {.weight = w->format, .group = w->group, .sym = w->sym};
    if (w->format == WF_16) {
        *q = (qmatrix){.format = WF_16, .n = w->n, .k = w->k, .group = w->k, .block_n = 1};
        q->code = arena_array(a, uint8_t, (size_t)w->n * (size_t)w->k * 2);
        for (int64_t i = 0; i < (int64_t)w->n * w->k * 2; i++)
            q->code[i] = (uint8_t)(seed * 31 + (uint64_t)i * 7 % 251);
        return;
    }
    assert_ok(qmatrix_alloc(q, a, &p, w->n, w->k));
    uint64_t state = seed;
    const int64_t codes = qmatrix_code_bytes(&p, w->n, w->k);
    const int64_t scales = dtype_bytes(q->scale_type, qmatrix_scale_count(&p, w->n, w->k));
    for (int64_t i = 0; i < codes + scales; i++) {
        state = state * 6364136223846793005u + 1442695040888963407u;
        uint8_t byte = (uint8_t)(state >> 56);
        if (i < codes) {
            q->code[i] = byte;
            continue;
        }
        /* Scales that their packed form can hold (linear_e8m0_pack, linear_channel_fold): those of
         * channels are multiplied, which makes a NaN quiet, so none is. */
        const bool of_channels = w->format == WF_INT8 || w->format == WF_FP8;
        if (w->format == WF_MXFP4 && w->type == DT_F16) byte = (uint8_t)(100 + byte / 8);
        if (of_channels && (i - codes) % 4 == 3) byte &= 0xbf;
        ((uint8_t *)q->scale)[i - codes] = byte;
    }
    for (int64_t i = 0; q->zero && i < qmatrix_zero_count(&p, w->n, w->k); i++)
        q->zero[i] = (uint8_t)(i * 5 % 16);
}

static void round_trip(const linear_weight *w, uint64_t seed) {
    arena a;
    qmatrix q, back;
    int64_t code_bytes, scale_bytes;
    const precision p = {.weight = w->format, .group = w->group, .sym = w->sym};
    assert_ok(arena_open(&a, (size_t)64 << 20));
    make(&q, &a, w, seed);
    assert_ok(linear_pack_bytes(w, &code_bytes, &scale_bytes));
    uint8_t *code = arena_array(&a, uint8_t, (size_t)code_bytes + 64);
    uint8_t *scale = arena_array(&a, uint8_t, (size_t)scale_bytes + 64);
    memset(code + code_bytes, 0xa5, 64);
    memset(scale + scale_bytes, 0xa5, 64);
    assert_ok(ref_linear_pack(w, code, scale, &q));
    for (int32_t i = 0; i < 64; i++)
        assert_true(code[code_bytes + i] == 0xa5 && scale[scale_bytes + i] == 0xa5);
    back = q;
    const size_t n_code = (size_t)w->n * (size_t)w->k * (size_t)linear_layout_of(w).bits / 8;
    back.code = arena_array(&a, uint8_t, n_code);
    const size_t n_scale =
        w->format == WF_16 ? 0
                           : (size_t)dtype_bytes(q.scale_type, qmatrix_scale_count(&p, w->n, w->k));
    const size_t n_zero = q.zero ? (size_t)qmatrix_zero_count(&p, w->n, w->k) : 0;
    if (n_scale) back.scale = arena_array(&a, uint8_t, n_scale);
    if (n_zero) back.zero = arena_array(&a, uint8_t, n_zero);
    assert_ok(ref_linear_unpack(w, code, scale, &back));
    assert_memory_equal(back.code, q.code, n_code);
    if (n_scale) assert_memory_equal(back.scale, q.scale, n_scale);
    if (n_zero) assert_memory_equal(back.zero, q.zero, n_zero);

    /* Twin: one changed byte of the packed codes is one changed matrix, or padding. */
    code[code_bytes / 3] ^= 0x10;
    assert_ok(ref_linear_unpack(w, code, scale, &back));
    const linear_layout l = linear_layout_of(w);
    if (w->n % 64 == 0 && w->k % 64 == 0 && l.half_rows % 64 == 0)
        assert_memory_not_equal(back.code, q.code, n_code);
    arena_close(&a);
}

static void unpack_undoes_pack(void **state) {
    (void)state;
    static const int32_t shapes[][2] = {{64, 64},   {128, 384}, {16, 192},
                                        {272, 576}, {96, 1152}, {1440, 384}};
    for (int32_t f = 0; f < COUNT_OF(forms); f++)
        for (int32_t s = 0; s < COUNT_OF(shapes); s++)
            for (int32_t i = 0; i < 8; i++) {
                const linear_weight w = {.format = forms[f].format,
                                         .group = forms[f].group,
                                         .sym = forms[f].sym,
                                         .act = forms[f].act,
                                         .type = i & 1 ? DT_BF16 : DT_F16,
                                         .gated = i & 2,
                                         .family = i & 4 ? 90 : 80,
                                         .n = shapes[s][0],
                                         .k = shapes[s][1],
                                         .count = 1};
                int64_t code_bytes, scale_bytes;
                if (w.gated && w.n % 32) continue;
                if (w.group && w.k % w.group && w.format == WF_INT4) {
                    assert_status(linear_pack_bytes(&w, &code_bytes, &scale_bytes), ST_SHAPE);
                    continue;
                }
                round_trip(&w, (uint64_t)(f * 100 + s * 10 + i + 1));
            }
}

static void refusals(void **state) {
    (void)state;
    int64_t a, b;
    linear_weight w = {
        .format = WF_INT4, .group = 128, .type = DT_F16, .n = 64, .k = 256, .count = 1};
    assert_ok(linear_pack_bytes(&w, &a, &b));
    assert_int_equal(a, 64 * 256 / 2);
    assert_int_equal(b, 2 * 64 * 3);
    w.n = 72;
    assert_status(linear_pack_bytes(&w, &a, &b), ST_SHAPE);
    w.n = 64;
    w.k = 200;
    assert_status(linear_pack_bytes(&w, &a, &b), ST_SHAPE);
    w.k = 256;
    w.type = DT_F32;
    assert_status(linear_pack_bytes(&w, &a, &b), ST_UNSUPPORTED);
}

/* Operands of 8-bit products lie in the canonical order, on Hopper and not grouped. */
static void plain_order(void **state) {
    (void)state;
    linear_weight w = {.format = WF_FP8B,
                       .group = 128,
                       .act = AF_FP8,
                       .type = DT_F16,
                       .n = 144,
                       .k = 272,
                       .count = 1,
                       .family = 90};
    arena a;
    qmatrix q;
    int64_t code_bytes, scale_bytes;
    assert_ok(arena_open(&a, (size_t)1 << 20));
    make(&q, &a, &w, 7);
    assert_ok(linear_pack_bytes(&w, &code_bytes, &scale_bytes));
    assert_int_equal(code_bytes, 144 * 272);
    assert_int_equal(scale_bytes, 2 * 4 * 4); /* 3 blocks of inputs in rows of 4 */
    uint8_t *code = arena_array(&a, uint8_t, (size_t)code_bytes);
    float scale[8];
    assert_ok(ref_linear_pack(&w, code, scale, &q));
    assert_memory_equal(code, q.code, (size_t)code_bytes);
    assert_memory_equal(scale, q.scale, 12);
    assert_memory_equal(scale + 4, (float *)q.scale + 3, 12);
    assert_true(scale[3] == 0 && scale[7] == 0);
    w.family = 80; /* fragments */
    assert_ok(linear_pack_bytes(&w, &code_bytes, &scale_bytes));
    assert_int_equal(code_bytes, 192 * 320);
    w.family = 90;
    w.count = 8;
    assert_ok(linear_pack_bytes(&w, &code_bytes, &scale_bytes));
    assert_int_equal(code_bytes, 8 * 192 * 320);
    arena_close(&a);
}

/* The words of a unit hold every code once: atoms of lanes tile 16 x 16, places of rows are a
 * permutation. */
static void order_is_a_permutation(void **state) {
    (void)state;
    bool seen[16][16] = {{false}};
    for (int32_t lane = 0; lane < 32; lane++)
        for (int32_t i = 0; i < 8; i++) {
            const int32_t r = linear_atom_row(lane, i), c = linear_atom_col(lane, i);
            assert_false(seen[r][c]);
            seen[r][c] = true;
        }
    const linear_weight w = {.format = WF_16, .family = 90, .n = 64, .k = 64, .count = 1};
    const linear_layout l = linear_layout_of(&w);
    bool there[64][64] = {{false}};
    for (int32_t n = 0; n < 64 * 64; n++) { /* words of 16 bits with the swizzle */
        const int32_t i = n % 8, lane = n / 8 % 32, j = n / 256 % 4, strip = n / 1024;
        const int32_t r = strip * 16 + linear_word_row(&l, j, lane, i);
        const int32_t c = linear_word_col(&l, j, lane, i);
        assert_false(there[r][c]);
        there[r][c] = true;
        assert_int_equal(linear_word_at(&l, 0, 0, strip, j, lane), linear_chunk_at(r, c / 8));
        assert_int_equal(i, c % 8);
    }
    uint64_t places = 0;
    for (int32_t i = 0; i < 64; i++) places |= (uint64_t)1 << linear_scale_place(i);
    assert_true(places == UINT64_MAX);
}

/* Each bit of each code, beside others, comes back from its word; and a word with a bit turned
 * holds other codes. */
static void e2m1_words_hold_their_codes(void **state) {
    (void)state;
    uint32_t seed = 1;
    for (int32_t n = 0; n < 20000; n++) {
        const bool bf16 = n % 2;
        uint8_t code[8], back[8];
        for (int32_t i = 0; i < 8; i++) {
            seed = seed * 1664525u + 1013904223u;
            code[i] = (uint8_t)(n >= 64 ? seed >> 28 : i == n / 8 ? 1u << n / 2 % 4 : 0u);
        }
        const uint32_t word = linear_pack4(code, true, bf16);
        linear_unpack4(back, word, true, bf16);
        assert_memory_equal(back, code, 8);
        linear_unpack4(back, word ^ 1u << n % 32, true, bf16);
        assert_memory_not_equal(back, code, 8);
    }
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(unpack_undoes_pack),
        cmocka_unit_test(refusals),
        cmocka_unit_test(order_is_a_permutation),
        cmocka_unit_test(e2m1_words_hold_their_codes),
        cmocka_unit_test(plain_order),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
