/* test_weights.c - sources against the tensors they come from, by other means; disagreements of
 * checkpoint and config; shards; sizes; synthetic values. */
#include "folder.h"
#include "golden.h"
#include "ref_quant.h"
#include "rng.h"
#include "safetensors.h"
#include "test.h"
#include "weights.h"

#include <stdlib.h>
#include <string.h>

typedef struct {
    model_config c;
    checkpoint *k;
    safetensors *files; /* the same file once more, for the test's own reading */
} golden;

static golden open_golden(const char *name) {
    char path[256];
    snprintf(path, sizeof path, GOLDENS "/%s", name);
    golden g;
    assert_ok(model_config_load(&g.c, path));
    assert_ok(checkpoint_open(&g.k, &g.c, path, 0));
    assert_ok(safetensors_open(&g.files, path));
    return g;
}

static void close_golden(golden *g) {
    checkpoint_close(g->k);
    safetensors_close(g->files);
}

/* Element i of a tensor, by its flat index. */
static float element(const golden *g, const char *name, int64_t i) {
    const tensor_view *t = safetensors_find(g->files, name);
    if (!t) fail_msg("no tensor %s", name);
    assert_true(i >= 0 && dtype_bytes(t->type, i + 1) <= t->bytes);
    float x;
    dtype_to_f32(&x, (const uint8_t *)t->data + dtype_bytes(t->type, i), 1, 1, t->type);
    return x;
}

static weight_source source_of(const golden *g, weight_field f, int32_t layer) {
    weight_source s;
    assert_ok(checkpoint_source(g->k, f, layer, &s));
    return s;
}

/* Rows [at, at + n) of matrix `index` are rows of a [n, k] tensor. */
static void check_rows(const golden *g, weight_field f, int32_t layer, int32_t index, int32_t at,
                       int32_t n, const char *suffix) {
    const weight_source s = source_of(g, f, layer);
    char name[128];
    snprintf(name, sizeof name, "model.layers.%d.%s", layer, suffix);
    float row[512];
    for (int32_t i = 0; i < n; i++) {
        weight_source_row(&s, index, at + i, row);
        for (int32_t j = 0; j < s.shape.k; j++)
            assert_true(row[j] == element(g, name, (int64_t)i * s.shape.k + j));
    }
}

static void test_llama_names(void **state) {
    (void)state;
    golden g = open_golden("qwen3");
    const int32_t d = g.c.head_dim, q = g.c.n_heads * d, kv = g.c.n_kv_heads * d, f = g.c.ffn_dim;
    for (int32_t l = 0; l < g.c.n_layers; l++) {
        check_rows(&g, WEIGHT_qkv, l, 0, 0, q, "self_attn.q_proj.weight");
        check_rows(&g, WEIGHT_qkv, l, 0, q, kv, "self_attn.k_proj.weight");
        check_rows(&g, WEIGHT_qkv, l, 0, q + kv, kv, "self_attn.v_proj.weight");
        check_rows(&g, WEIGHT_q_norm, l, 0, 0, 1, "self_attn.q_norm.weight");
        check_rows(&g, WEIGHT_k_norm, l, 0, 0, 1, "self_attn.k_norm.weight");
        check_rows(&g, WEIGHT_o, l, 0, 0, g.c.dim, "self_attn.o_proj.weight");
        check_rows(&g, WEIGHT_gate_up, l, 0, 0, f, "mlp.gate_proj.weight");
        check_rows(&g, WEIGHT_gate_up, l, 0, f, f, "mlp.up_proj.weight");
        check_rows(&g, WEIGHT_down, l, 0, 0, g.c.dim, "mlp.down_proj.weight");
        check_rows(&g, WEIGHT_attn_norm, l, 0, 0, 1, "input_layernorm.weight");
        check_rows(&g, WEIGHT_ffn_norm, l, 0, 0, 1, "post_attention_layernorm.weight");
    }
    /* Tied: the head has the values of the embedding and the shard of a head. */
    assert_false(weight_field_present(&g.c, WEIGHT_head));
    const weight_source embed = source_of(&g, WEIGHT_embed, 0),
                        head = source_of(&g, WEIGHT_head, 0);
    assert_int_equal(embed.shape.shard, SHARD_NONE);
    assert_int_equal(head.shape.shard, SHARD_ROWS);
    float a[512], b[512];
    weight_source_row(&embed, 0, 17, a);
    weight_source_row(&head, 0, 17, b);
    assert_memory_equal(a, b, (size_t)g.c.dim * sizeof *a);
    assert_true(a[3] == element(&g, "model.embed_tokens.weight", 17 * g.c.dim + 3));
    weight_source none;
    assert_status(checkpoint_source(g.k, WEIGHT_router, 0, &none), ST_NOTFOUND);
    assert_int_equal(checkpoint_dtype(g.k), DT_BF16);
    close_golden(&g);
}

static void test_biases(void **state) {
    (void)state;
    golden g = open_golden("qwen2");
    const weight_source s = source_of(&g, WEIGHT_qkv, 1), o = source_of(&g, WEIGHT_o, 1);
    const int32_t q = g.c.n_heads * g.c.head_dim, kv = g.c.n_kv_heads * g.c.head_dim;
    float bias[512];
    assert_true(s.shape.has_bias && !o.shape.has_bias);
    weight_source_bias(&s, 0, bias);
    for (int32_t i = 0; i < q; i++)
        assert_true(bias[i] == element(&g, "model.layers.1.self_attn.q_proj.bias", i));
    for (int32_t i = 0; i < kv; i++) {
        assert_true(bias[q + i] == element(&g, "model.layers.1.self_attn.k_proj.bias", i));
        assert_true(bias[q + kv + i] == element(&g, "model.layers.1.self_attn.v_proj.bias", i));
    }
    weight_source_bias(&o, 0, bias);
    for (int32_t i = 0; i < g.c.dim; i++) assert_true(bias[i] == 0);
    close_golden(&g);
}

static void test_internlm2(void **state) {
    (void)state;
    golden g = open_golden("internlm2");
    const int32_t d = g.c.head_dim, heads = g.c.n_heads, groups = g.c.n_kv_heads;
    const int32_t each = heads / groups, stride = (each + 2) * d;
    const weight_source s = source_of(&g, WEIGHT_qkv, 1);
    float row[512];
    for (int32_t i = 0; i < s.shape.n; i++) {
        const int32_t head = i / d, in_head = i % d; /* of q | k | v */
        const int32_t at = head < heads ? head / each * stride + head % each * d
                           : head < heads + groups
                               ? (head - heads) * stride + each * d
                               : (head - heads - groups) * stride + (each + 1) * d;
        weight_source_row(&s, 0, i, row);
        for (int32_t j = 0; j < g.c.dim; j++)
            assert_true(row[j] == element(&g, "model.layers.1.attention.wqkv.weight",
                                          (int64_t)(at + in_head) * g.c.dim + j));
    }
    check_rows(&g, WEIGHT_gate_up, 0, 0, g.c.ffn_dim, g.c.ffn_dim, "feed_forward.w3.weight");
    check_rows(&g, WEIGHT_down, 0, 0, 0, g.c.dim, "feed_forward.w2.weight");
    check_rows(&g, WEIGHT_o, 0, 0, 0, g.c.dim, "attention.wo.weight");
    close_golden(&g);
}

static void test_gpt_oss(void **state) {
    (void)state;
    golden g = open_golden("gpt_oss");
    const int32_t e = g.c.dim, f = g.c.expert_dim;
    const weight_source up = source_of(&g, WEIGHT_experts_gate_up, 1),
                        down = source_of(&g, WEIGHT_experts_down, 1);
    float row[512], bias[512];
    for (int32_t x = 0; x < g.c.n_experts; x++) {
        weight_source_bias(&up, x, bias);
        for (int32_t i = 0; i < 2 * f; i++) {
            const int32_t column = i < f ? 2 * i : 2 * (i - f) + 1;
            weight_source_row(&up, x, i, row);
            for (int32_t j = 0; j < e; j++)
                assert_true(row[j] == element(&g, "model.layers.1.mlp.experts.gate_up_proj",
                                              ((int64_t)x * e + j) * 2 * f + column));
            assert_true(bias[i] == element(&g, "model.layers.1.mlp.experts.gate_up_proj_bias",
                                           (int64_t)x * 2 * f + column));
        }
        weight_source_bias(&down, x, bias);
        for (int32_t i = 0; i < e; i++) {
            weight_source_row(&down, x, i, row);
            for (int32_t j = 0; j < f; j++)
                assert_true(row[j] == element(&g, "model.layers.1.mlp.experts.down_proj",
                                              ((int64_t)x * f + j) * e + i));
            assert_true(bias[i] == element(&g, "model.layers.1.mlp.experts.down_proj_bias",
                                           (int64_t)x * e + i));
        }
    }
    check_rows(&g, WEIGHT_sinks, 1, 0, 0, 1, "self_attn.sinks");
    check_rows(&g, WEIGHT_router, 1, 0, 0, g.c.n_experts, "mlp.router.weight");
    const weight_source router = source_of(&g, WEIGHT_router, 0);
    weight_source_bias(&router, 0, bias);
    assert_true(bias[2] == element(&g, "model.layers.0.mlp.router.bias", 2));
    close_golden(&g);
}

/* Both sources give the same matrices; name says which on failure. */
static void check_same(const golden *a, const golden *b, weight_field f, int32_t layer) {
    const weight_source x = source_of(a, f, layer), y = source_of(b, f, layer);
    float p[512], q[512];
    assert_memory_equal(&x.shape, &y.shape, sizeof x.shape);
    for (int32_t m = 0; m < x.shape.count; m++) {
        for (int32_t i = 0; i < x.shape.n; i++) {
            weight_source_row(&x, m, i, p);
            weight_source_row(&y, m, i, q);
            if (memcmp(p, q, (size_t)x.shape.k * sizeof *p) != 0)
                fail_msg("%s and %s differ in matrix %d, row %d", x.name, y.name, m, i);
        }
        if (!x.shape.has_bias) continue;
        weight_source_bias(&x, m, p);
        weight_source_bias(&y, m, q);
        assert_memory_equal(p, q, (size_t)x.shape.n * sizeof *p);
    }
}

static void check_all_same(const golden *a, const golden *b) {
    for (int32_t l = 0; l < a->c.n_layers; l++)
        for (int32_t f = WEIGHT_embed; f < WEIGHT_COUNT; f++)
            if (weight_field_present(&a->c, (weight_field)f)) check_same(a, b, (weight_field)f, l);
}

static void test_fused_twins(void **state) {
    (void)state;
    static const char *const twins[][2] = {{"mixtral", "mixtral_fused"},
                                           {"qwen3_moe", "qwen3_moe_fused"}};
    for (int32_t i = 0; i < COUNT_OF(twins); i++) {
        golden a = open_golden(twins[i][0]), b = open_golden(twins[i][1]);
        check_all_same(&a, &b);
        close_golden(&a);
        close_golden(&b);
    }
    golden g = open_golden("mixtral"); /* w1 is gate, w3 is up */
    check_rows(&g, WEIGHT_experts_gate_up, 0, 2, 0, g.c.expert_dim,
               "block_sparse_moe.experts.2.w1.weight");
    check_rows(&g, WEIGHT_experts_down, 0, 3, 0, g.c.dim, "block_sparse_moe.experts.3.w2.weight");
    close_golden(&g);
}

/* Parts are what weights.h promises to devices: every row once, in order, same number a matrix. */
static void test_part_order(void **state) {
    (void)state;
    for (int32_t i = 0; i < COUNT_OF(golden_names); i++) {
        golden g = open_golden(golden_names[i]);
        for (int32_t f = WEIGHT_embed; f < WEIGHT_COUNT; f++) {
            if (!weight_field_present(&g.c, (weight_field)f)) continue;
            const weight_source s = source_of(&g, (weight_field)f, 0);
            assert_int_equal(s.n_parts % s.shape.count, 0);
            int32_t row = 0, index = 0;
            for (int32_t p = 0; p < s.n_parts; p++) {
                assert_int_equal(s.part[p].index, index);
                assert_int_equal(s.part[p].row_at, row);
                row += s.part[p].rows;
                if (row == s.shape.n) {
                    row = 0;
                    index++;
                }
            }
            assert_int_equal(index, s.shape.count);
        }
        assert_true(checkpoint_digest(g.k) != 0);
        close_golden(&g);
    }
}

/* --- Checkpoints that disagree with their config ---------------------------------------------- */

/* The folder tests/vectors/models/<name> with its tensors changed: `drop` left out, `add` added. */
static void write_variant(const char *name, const char *drop, const tensor_view *add,
                          int32_t n_add) {
    char path[256];
    snprintf(path, sizeof path, GOLDENS "/%s", name);
    safetensors *s;
    assert_ok(safetensors_open(&s, path));
    tensor_view list[256];
    int32_t n = 0;
    for (int32_t i = 0; i < safetensors_count(s); i++)
        if (!strstr(safetensors_at(s, i)->name, drop)) list[n++] = *safetensors_at(s, i);
    for (int32_t i = 0; i < n_add; i++) list[n++] = add[i];
    snprintf(path, sizeof path, "%s/model.safetensors", folder);
    assert_ok(safetensors_write(path, list, n));
    safetensors_close(s);
    char *data;
    size_t size;
    snprintf(path, sizeof path, GOLDENS "/%s/config.json", name);
    assert_ok(file_read(&data, &size, path));
    snprintf(path, sizeof path, "%s/config.json", folder);
    assert_ok(file_write(path, data, size));
    mem_free(data);
}

static void refuse(const char *name, const char *drop, const tensor_view *add, status want,
                   const char *says) {
    write_variant(name, drop, add, add ? 1 : 0);
    model_config c;
    checkpoint *k;
    assert_ok(model_config_load(&c, folder));
    const status st = checkpoint_open(&k, &c, folder, 0);
    if (st != want ||
        (st != ST_OK && (!strstr(fail_message(), says) || !strstr(fail_message(), folder))))
        fail_msg("without '%s', with '%s': %s (%s)", drop, add ? add->name : "", status_text(st),
                 st == ST_OK ? "" : fail_message());
    checkpoint_close(k);
}

static const uint16_t zeros[64 * 64];
static const char nothing[] = "\x01";

static tensor_view zero_tensor(const char *name, dtype type, int64_t rows, int64_t cols) {
    tensor_view t = {
        .name = name, .type = type, .n_dims = cols ? 2 : 1, .dim = {rows, cols}, .data = zeros};
    t.bytes = dtype_bytes(type, rows * (cols ? cols : 1));
    assert_true((size_t)t.bytes <= sizeof zeros);
    return t;
}

static void test_disagreements(void **state) {
    (void)state;
    refuse("llama", nothing, NULL, ST_OK, "");
    refuse("llama", "layers.1.self_attn.k_proj", NULL, ST_NOTFOUND,
           "'model.layers.1.self_attn.k_proj.weight' is missing");
    refuse("llama", "layers.1.self_attn.q_proj", NULL, ST_NOTFOUND,
           "'model.layers.1.self_attn.q_proj.weight', 'model.layers.1.self_attn.qkv_proj.weight'");
    refuse("llama", "lm_head", NULL, ST_NOTFOUND, "head is missing");
    refuse("qwen2", "layers.0.self_attn.v_proj.bias", NULL, ST_NOTFOUND,
           "'model.layers.0.self_attn.v_proj.bias' is missing");
    tensor_view t = zero_tensor("model.layers.0.self_attn.k_proj.weight", DT_BF16, 64, 32);
    refuse("llama", "layers.0.self_attn.k_proj", &t, ST_SHAPE,
           "is [64, 32], config.json makes it [32, 64]");
    t = zero_tensor("model.norm.weight", DT_BF16, 64, 1);
    refuse("llama", "model.norm", &t, ST_SHAPE, "is [64, 1], config.json makes it [64]");
    t = zero_tensor("model.norm.weight", DT_I16, 64, 0);
    refuse("llama", "model.norm", &t, ST_UNSUPPORTED, "i16");
    t = zero_tensor("model.layers.0.self_attn.q_proj.bias", DT_BF16, 64, 0);
    refuse("llama", nothing, &t, ST_FORMAT, "'model.layers.0.self_attn.q_proj.bias' has no place");
    t = zero_tensor("model.layers.2.input_layernorm.weight", DT_BF16, 64, 0);
    refuse("llama", nothing, &t, ST_FORMAT, "(2 layers)");
    t = zero_tensor("model.layers.0.self_attn.rotary_emb.inv_freq", DT_BF16, 16, 0);
    refuse("llama", nothing, &t, ST_OK, "");
    t = zero_tensor("lm_head.weight", DT_BF16, 32, 64); /* tied, and another */
    refuse("llama_bias_tied", nothing, &t, ST_UNSUPPORTED, "another matrix than the embedding");
    safetensors *s;
    assert_ok(safetensors_open(&s, GOLDENS "/llama_bias_tied"));
    t = *safetensors_find(s, "model.embed_tokens.weight"); /* the same once more */
    t.name = "lm_head.weight";
    refuse("llama_bias_tied", nothing, &t, ST_OK, "");
    uint8_t *other = mem_alloc((size_t)t.bytes, 1);
    memcpy(other, t.data, (size_t)t.bytes);
    other[t.bytes - 1] ^= 1;
    t.data = other;
    refuse("llama_bias_tied", nothing, &t, ST_UNSUPPORTED, "tie_word_embeddings false");
    mem_free(other);
    safetensors_close(s);
    /* Codes without what belongs to them. */
    static const struct {
        const char *name;
        status want;
        const char *says;
    } codes[] = {
        {"mlp.down_proj.qweight", ST_SHAPE, "qweight' is [64]"},
        {"mlp.down_proj.weight_packed", ST_NOTFOUND, "weight_scale' is missing"},
        {"mlp.experts.gate_up_proj_blocks", ST_NOTFOUND, "down_proj"},
        {"mlp.down_proj.weight_scale_inv", ST_NOTFOUND, "down_proj"},
    };
    for (int32_t i = 0; i < COUNT_OF(codes); i++) {
        char name[128];
        snprintf(name, sizeof name, "model.layers.0.%s", codes[i].name);
        t = zero_tensor(name, DT_U8, 64, 0);
        refuse("llama", "down_proj", &t, codes[i].want, codes[i].says);
    }
    /* Experts of Qwen under a dense config, and the other way round. */
    refuse("mixtral", "experts.3.w3", NULL, ST_NOTFOUND, "experts.3.w3.weight' is missing");
    model_config c;
    checkpoint *k;
    assert_ok(model_config_load(&c, "Llama-3.1-8B"));
    assert_status(checkpoint_open(&k, &c, "workloads/models/Llama-3.1-8B", 0), ST_NOTFOUND);
    assert_null(k);
}

/* Phi names: one tensor of q|k|v rows and one of gate|up rows, made from the golden's. */
static void test_fused_projections(void **state) {
    (void)state;
    golden g = open_golden("qwen2");
    static uint16_t qkv[2][128 * 64], up[2][128 * 64], bias[2][128];
    static const char *const names[2][3] = {
        {"model.layers.0.self_attn.qkv_proj.weight", "model.layers.0.mlp.gate_up_proj.weight",
         "model.layers.0.self_attn.qkv_proj.bias"},
        {"model.layers.1.self_attn.qkv_proj.weight", "model.layers.1.mlp.gate_up_proj.weight",
         "model.layers.1.self_attn.qkv_proj.bias"}};
    tensor_view add[6];
    for (int32_t l = 0; l < 2; l++) {
        const char *const parts[3][3] = {
            {"self_attn.q_proj.weight", "self_attn.k_proj.weight", "self_attn.v_proj.weight"},
            {"mlp.gate_proj.weight", "mlp.up_proj.weight", NULL},
            {"self_attn.q_proj.bias", "self_attn.k_proj.bias", "self_attn.v_proj.bias"}};
        uint16_t *const to[3] = {qkv[l], up[l], bias[l]};
        for (int32_t i = 0; i < 3; i++) {
            int64_t bytes = 0;
            for (int32_t j = 0; j < 3 && parts[i][j]; j++) {
                char name[128];
                snprintf(name, sizeof name, "model.layers.%d.%s", l, parts[i][j]);
                const tensor_view *t = safetensors_find(g.files, name);
                memcpy((uint8_t *)to[i] + bytes, t->data, (size_t)t->bytes);
                bytes += t->bytes;
            }
            tensor_view *a = &add[3 * l + i];
            *a = (tensor_view){.name = names[l][i],
                               .type = DT_BF16,
                               .n_dims = i == 2 ? 1 : 2,
                               .data = to[i],
                               .bytes = bytes};
            a->dim[0] = i == 2 ? bytes / 2 : bytes / 2 / 64;
            a->dim[1] = i == 2 ? 0 : 64;
        }
    }
    /* "_proj." of q k v gate up goes; o_proj and down_proj are put back by a second pass. */
    safetensors *s;
    assert_ok(safetensors_open(&s, GOLDENS "/qwen2"));
    tensor_view list[64];
    int32_t n = 0;
    for (int32_t i = 0; i < safetensors_count(s); i++) {
        const tensor_view *t = safetensors_at(s, i);
        if (!strstr(t->name, "q_proj") && !strstr(t->name, "k_proj") &&
            !strstr(t->name, "v_proj") && !strstr(t->name, "gate_proj") &&
            !strstr(t->name, "up_proj"))
            list[n++] = *t;
    }
    for (int32_t i = 0; i < 6; i++) list[n++] = add[i];
    char path[256];
    snprintf(path, sizeof path, "%s/model.safetensors", folder);
    assert_ok(safetensors_write(path, list, n));
    safetensors_close(s);
    golden fused = {.c = g.c};
    assert_ok(checkpoint_open(&fused.k, &g.c, folder, 0));
    assert_int_equal(source_of(&fused, WEIGHT_qkv, 1).n_parts, 1);
    check_all_same(&g, &fused);
    checkpoint_close(fused.k);
    close_golden(&g);
}

static void test_digest(void **state) {
    (void)state;
    write_variant("llama", nothing, NULL, 0);
    golden g = open_golden("llama");
    model_config c;
    checkpoint *k;
    assert_ok(model_config_load(&c, folder));
    assert_ok(checkpoint_open(&k, &c, folder, 0));
    const uint64_t first = checkpoint_digest(k);
    checkpoint_close(k);
    char path[256];
    snprintf(path, sizeof path, "%s/config.json", folder);
    char *data;
    size_t n;
    assert_ok(file_read(&data, &n, path));
    assert_ok(file_write(path, data, n - 1)); /* the newline at the end */
    mem_free(data);
    assert_ok(checkpoint_open(&k, &c, folder, 0));
    assert_true(checkpoint_digest(k) != first);
    checkpoint_close(k);
    close_golden(&g);
}

/* --- Shards and sizes ------------------------------------------------------------------------- */

static void test_shards(void **state) {
    (void)state;
    model_config c;
    assert_ok(model_config_load(&c, "Qwen3-235B-A22B")); /* 64 heads, 4 KV heads, 128 experts */
    const int32_t d = c.head_dim;
    for (int32_t tp = 1; tp <= 16; tp *= 2) {
        assert_ok(model_fits_tp(&c, tp, 0));
        for (int32_t f = WEIGHT_embed; f < WEIGHT_COUNT; f++) {
            const weight_shape w = weight_field_shape(&c, (weight_field)f);
            if (!w.count) continue;
            const weight_shape one = weight_shape_shard(&c, (weight_field)f, w, tp);
            int64_t rows = 0, covered = 0;
            for (int32_t i = 0; i < one.n_fused; i++) {
                int32_t at, n, end = 0;
                for (int32_t rank = 0; rank < tp; rank++) {
                    weight_shard_range(&c, (weight_field)f, tp, rank, i, &at, &n);
                    if (w.shard != SHARD_NONE && !(f == WEIGHT_qkv && i > 0 && tp > c.n_kv_heads)) {
                        if (rank > 0) assert_int_equal(at, end);
                        covered += n;
                    }
                    end = at + n;
                    assert_true(end <= (w.shard == SHARD_COLS ? w.k : w.n));
                }
                rows += n;
            }
            if (w.shard == SHARD_ROWS) assert_int_equal(rows, one.n);
            if (w.shard == SHARD_COLS) assert_int_equal(covered, w.k);
            if (w.shard == SHARD_ROWS && (f != WEIGHT_qkv || tp <= c.n_kv_heads))
                assert_int_equal(covered, w.n);
        }
    }
    /* 16 ranks: four of them share each KV head; V starts behind all of K. */
    int32_t at, n;
    weight_shard_range(&c, WEIGHT_qkv, 16, 7, 1, &at, &n);
    assert_int_equal(at, (64 + 1) * d);
    assert_int_equal(n, d);
    weight_shard_range(&c, WEIGHT_qkv, 16, 12, 2, &at, &n);
    assert_int_equal(at, (64 + 4 + 3) * d);
    weight_shard_range(&c, WEIGHT_experts_gate_up, 4, 3, 1, &at, &n);
    assert_int_equal(at, 1536 + 3 * 384);
    assert_int_equal(n, 384);
    precision p;
    assert_ok(precision_parse(&p, "W16KV8"));
    assert_int_equal(model_kv_token_bytes(&c, &p, 1), 94 * 4 * 2 * (128 + 4));
    assert_int_equal(model_kv_token_bytes(&c, &p, 16), 94 * 2 * (128 + 4));
}

/* Value of a canonical matrix. */
static void values_of(float *out, const qmatrix *q) { ref_dequantize_weight(out, q, 0, q->n); }

/* The parts of all ranks, laid where weight_shard_range says, against the whole: how many values
 * differ. `wrong` takes each part for that of the next rank. Ranks that share a KV head lay it
 * twice. */
static int64_t parts_differ(const model_config *c, weight_field f, const precision *p, int32_t tp,
                            bool wrong) {
    const weight_shape w = weight_field_shape(c, f), one = weight_shape_shard(c, f, w, tp);
    const size_t n = (size_t)w.n * (size_t)w.k;
    arena a;
    qmatrix q, part;
    assert_ok(arena_open(&a, 64 << 20));
    float *value = arena_array(&a, float, n), *joined = arena_array(&a, float, n);
    float *mine = arena_array(&a, float, (size_t)one.n *(size_t)one.k);
    for (size_t i = 0; i < n; i++) value[i] = weight_noise(7, i);
    assert_ok(qmatrix_alloc(&q, &a, p, w.n, w.k));
    assert_ok(ref_quantize_weight(&q, value));
    values_of(value, &q);
    memset(joined, 0xff, n * sizeof *joined); /* NaN: what nobody lays differs */
    for (int32_t rank = 0; rank < tp; rank++) {
        assert_ok(qmatrix_alloc(&part, &a, p, one.n, one.k));
        assert_ok(weight_shard_qmatrix(c, f, tp, wrong ? (rank + 1) % tp : rank, &q, &part));
        values_of(mine, &part);
        for (int32_t i = 0, row = 0; i < w.n_fused; i++) {
            int32_t at, m;
            weight_shard_range(c, f, tp, rank, i, &at, &m);
            const bool cols = w.shard == SHARD_COLS;
            for (int32_t r = 0; r < (cols ? w.n : m); r++, row++)
                memcpy(joined + (int64_t)(cols ? r : at + r) * w.k + (cols ? at : 0),
                       mine + (int64_t)row * one.k, (size_t)one.k * sizeof *mine);
        }
    }
    int64_t differ = 0;
    for (size_t i = 0; i < n; i++) differ += !(joined[i] == value[i]);
    arena_close(&a);
    return differ;
}

static void test_parts_join(void **state) {
    (void)state;
    static const char *const formats[] = {"W4g32", "W4g16sym", "W8",     "WFP8",
                                          "WFP8b", "WMXFP4",   "WNVFP4", "W4gK"};
    static const weight_field fields[] = {
        WEIGHT_qkv,         WEIGHT_o, WEIGHT_gate_up, WEIGHT_down, WEIGHT_experts_gate_up,
        WEIGHT_experts_down};
    int32_t joined = 0;
    for (int experts = 0; experts < 2; experts++) {
        model_config c;
        assert_ok(model_config_load(&c, experts ? GOLDENS "/qwen3_moe" : GOLDENS "/internlm2"));
        c.dim = 256;
        c.n_heads = 8;
        c.n_kv_heads = 2;
        c.head_dim = 128;
        c.ffn_dim = c.expert_dim = 512;
        for (int i = 0; i < COUNT_OF(formats); i++)
            for (int k = 0; k < COUNT_OF(fields); k++)
                for (int32_t tp = 2; tp <= 4; tp *= 2) {
                    precision p;
                    const weight_shape w = weight_field_shape(&c, fields[k]);
                    assert_ok(precision_parse(&p, formats[i]));
                    if (w.count == 0 || model_fits_precision(&c, &p, tp) != ST_OK) continue;
                    if (parts_differ(&c, fields[k], &p, tp, false))
                        fail_msg("%s of %s over %d", weight_field_text(fields[k]), formats[i], tp);
                    assert_true(parts_differ(&c, fields[k], &p, tp, true) > (int64_t)w.n * w.k / 2);
                    joined++;
                }
    }
    assert_true(joined >= 60);

    model_config c; /* a rank's K would begin within a block of 128 rows */
    precision p;
    arena a;
    qmatrix q, part;
    assert_ok(model_config_load(&c, GOLDENS "/internlm2"));
    assert_ok(precision_parse(&p, "WFP8b"));
    assert_ok(arena_open(&a, 16 << 20));
    const weight_shape w = weight_field_shape(&c, WEIGHT_qkv);
    const weight_shape one = weight_shape_shard(&c, WEIGHT_qkv, w, 2);
    assert_ok(qmatrix_alloc(&q, &a, &p, w.n, w.k));
    assert_ok(qmatrix_alloc(&part, &a, &p, one.n, one.k));
    assert_status(weight_shard_qmatrix(&c, WEIGHT_qkv, 2, 1, &q, &part), ST_SHAPE);
    arena_close(&a);
}

static void test_bytes(void **state) {
    (void)state;
    model_config c;
    precision p;
    assert_ok(model_config_load(&c, "Qwen2.5-7B"));
    assert_ok(precision_parse(&p, "W4"));
    const weight_shape qkv = weight_field_shape(&c, WEIGHT_qkv);
    assert_int_equal(qkv.n, 4608);
    assert_int_equal(weight_shape_bytes(&qkv, &p, c.type),
                     precision_weight_bytes(&p, 4608, 3584) + 2 * 4608);
    /* By hand: 28 layers of four linears, two norms, the bias; embedding, head, norm in 16 bit. */
    const int64_t linears =
        precision_weight_bytes(&p, 4608, 3584) + precision_weight_bytes(&p, 3584, 3584) +
        precision_weight_bytes(&p, 2 * 18944, 3584) + precision_weight_bytes(&p, 3584, 18944);
    assert_int_equal(model_weight_bytes(&c, &p, 1),
                     28 * (linears + 2 * (2 * 3584 + 4608)) + 2 * (2 * 152064LL * 3584 + 3584));
    /* Ranks together hold the whole once, and what is replicated once each. */
    const int64_t replicated = 28 * 2 * 2 * 3584 + 2 * (152064LL * 3584 + 3584);
    assert_int_equal(4 * model_weight_bytes(&c, &p, 4),
                     model_weight_bytes(&c, &p, 1) + 3 * replicated);
    /* W16 is the parameters twice. */
    assert_ok(precision_parse(&p, "W16"));
    assert_int_equal(model_weight_bytes(&c, &p, 1), 2 * model_parameters(&c));
    assert_ok(model_config_load(&c, "gpt-oss-120b"));
    assert_int_equal(model_weight_bytes(&c, &p, 1), 2 * model_parameters(&c));
    const weight_shape router = weight_field_shape(&c, WEIGHT_router);
    assert_true(router.has_bias && !router.quantise);
}

/* --- Synthetic -------------------------------------------------------------------------------- */

static void test_synthetic(void **state) {
    (void)state;
    model_config c;
    checkpoint *k, *same, *other;
    assert_ok(model_config_load(&c, "Qwen3-30B-A3B"));
    assert_ok(checkpoint_open(&k, &c, NULL, 7));
    assert_ok(checkpoint_open(&same, &c, NULL, 7));
    assert_ok(checkpoint_open(&other, &c, NULL, 8));
    weight_source a, b, z, layer1;
    assert_ok(checkpoint_source(k, WEIGHT_experts_down, 0, &a));
    assert_ok(checkpoint_source(same, WEIGHT_experts_down, 0, &b));
    assert_ok(checkpoint_source(other, WEIGHT_experts_down, 0, &z));
    assert_ok(checkpoint_source(k, WEIGHT_experts_down, 1, &layer1));
    assert_int_equal(a.n_parts, 0);
    assert_true(a.seed == b.seed && a.seed != z.seed && a.seed != layer1.seed);
    float row[2048], again[2048];
    double sum = 0, squares = 0, fourth = 0;
    int64_t n = 0;
    for (int32_t i = 0; i < 200; i++) {
        weight_source_row(&a, 127, i, row);
        weight_source_row(&b, 127, i, again);
        assert_memory_equal(row, again, 768 * sizeof *row);
        for (int32_t j = 0; j < 768; j++, n++) {
            /* The definition in the header, by the letter. */
            uint32_t w[4];
            philox4x32(a.seed, ((uint64_t)127 * 2048 + (uint64_t)i) * 768 + (uint64_t)j, w);
            int64_t total = 0;
            for (int h = 0; h < 8; h++) total += w[h / 2] >> 16 * (h % 2) & 0xffff;
            const float noise = (float)(2 * total - 8 * 65535) * 9.344062e-6f;
            assert_true(row[j] == a.synthetic_scale * noise);
            const double x = row[j] / (double)a.synthetic_scale;
            sum += x;
            squares += x * x;
            fourth += x * x * x * x;
        }
    }
    /* 153 600 samples: four standard errors. Kurtosis of eight uniforms: 3 - 1.2 / 8. */
    assert_close(sum / (double)n, 0, 4 / sqrt((double)n));
    assert_close(squares / (double)n, 1, 4 * sqrt(1.85 / (double)n));
    assert_close(fourth / (double)n, 2.85, 0.08);
    assert_close(a.synthetic_scale, 1 / sqrt(768), 1e-6);
    assert_ok(checkpoint_source(k, WEIGHT_attn_norm, 3, &a));
    weight_source_row(&a, 0, 0, row);
    for (int32_t j = 0; j < 2048; j++) assert_true(row[j] > 0.4f && row[j] < 1.6f);
    assert_int_equal(checkpoint_digest(k), 0);
    assert_int_equal(checkpoint_dtype(k), DT_BF16);
    checkpoint_close(k);
    checkpoint_close(same);
    checkpoint_close(other);
    checkpoint_close(NULL);

    assert_ok(model_config_load(&c, "gpt-oss-120b"));
    assert_ok(checkpoint_open(&k, &c, NULL, 7));
    assert_ok(checkpoint_source(k, WEIGHT_router, 0, &a));
    float bias[128];
    weight_source_bias(&a, 0, bias);
    assert_true(bias[5] == 0.1f * weight_noise(~a.seed, 5));
    checkpoint_close(k);
}

static void test_out_of_memory(void **state) {
    (void)state;
    model_config c;
    assert_ok(model_config_load(&c, GOLDENS "/mixtral"));
    int64_t n = 1;
    for (status st = ST_NOMEM; st != ST_OK; n++) {
        checkpoint *k;
        mem_fail_at(n);
        st = checkpoint_open(&k, &c, GOLDENS "/mixtral", 0);
        mem_fail_at(0);
        if (st != ST_OK) assert_int_equal(st, ST_NOMEM);
        if (st != ST_OK) assert_null(k);
        checkpoint_close(k);
        assert_true(n < 1000);
    }
    assert_true(n > 20);
}

static void test_names(void **state) {
    (void)state;
    assert_string_equal(weight_field_text(WEIGHT_embed), "embed");
    assert_string_equal(weight_field_text(WEIGHT_head), "head");
    assert_string_equal(weight_field_text(WEIGHT_attn_norm), "attn_norm");
    assert_string_equal(weight_field_text(WEIGHT_experts_down), "experts_down");
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_llama_names),   cmocka_unit_test(test_biases),
        cmocka_unit_test(test_internlm2),     cmocka_unit_test(test_gpt_oss),
        cmocka_unit_test(test_fused_twins),   cmocka_unit_test(test_part_order),
        cmocka_unit_test(test_disagreements), cmocka_unit_test(test_fused_projections),
        cmocka_unit_test(test_digest),        cmocka_unit_test(test_shards),
        cmocka_unit_test(test_parts_join),    cmocka_unit_test(test_bytes),
        cmocka_unit_test(test_synthetic),     cmocka_unit_test(test_out_of_memory),
        cmocka_unit_test(test_names),
    };
    return cmocka_run_group_tests(tests, make_folder, remove_folder);
}
