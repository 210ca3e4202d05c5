/* test_model.c - config.json: the sixteen models, both spellings, defaults by class, bad values. */
#include "folder.h"
#include "golden.h"
#include "json.h"
#include "model.h"
#include "test.h"
#include "weights.h"

#include <dirent.h>
#include <string.h>

/* Published totals in units of 1e9; sizes in GiB and KiB as they follow from them, by hand. */
typedef struct {
    const char *name;
    double total, active, w16_gib, w4_gib, kv16_kib;
} published;

static const published table[] = {
    {"Llama-2-7B", 6.738, 6.738, 12.6, 3.7, 512},
    {"Llama-3.1-8B", 8.030, 8.030, 15.0, 5.4, 128},
    {"Llama-3.1-70B", 70.554, 70.554, 131.4, 37.8, 320},
    {"Qwen2.5-7B", 7.616, 7.616, 14.2, 5.3, 56},
    {"Qwen2.5-14B", 14.770, 14.770, 27.5, 9.4, 192},
    {"Qwen2.5-32B", 32.764, 32.764, 61.0, 18.3, 256},
    {"Qwen2.5-72B", 72.706, 72.706, 135.4, 39.4, 320},
    {"Qwen3-8B", 8.191, 8.191, 15.3, 5.8, 144},
    {"Qwen3-14B", 14.768, 14.768, 27.5, 9.4, 160},
    {"Qwen3-32B", 32.762, 32.762, 61.0, 18.3, 256},
    {"Qwen3-30B-A3B", 30.532, 3.353, 56.9, 16.0, 96},
    {"Qwen3-235B-A22B", 235.094, 22.191, 437.9, 118.1, 188},
    {"Mistral-7B-v0.3", 7.248, 7.248, 13.5, 4.0, 128},
    {"Mixtral-8x7B", 46.703, 12.880, 87.0, 23.5, 128},
    {"InternLM2.5-20B", 19.861, 19.861, 37.0, 11.4, 192},
    {"gpt-oss-120b", 116.829, 5.712, 217.6, 60.8, 72},
};

static void test_sixteen_models(void **state) {
    (void)state;
    arena a;
    assert_ok(arena_open(&a, 1 << 20));
    const char **names;
    int32_t n;
    assert_ok(model_names(&a, &names, &n));
    assert_true(n >= COUNT_OF(table)); /* whoever adds a model need not be in the table */
    precision w16, w4, mx;
    assert_ok(precision_parse(&w16, "W16"));
    assert_ok(precision_parse(&w4, "W4"));
    assert_ok(precision_parse(&mx, "WMXFP4"));
    int32_t n_held = 0;
    for (int32_t i = 0; i < n; i++) {
        const published *t = table;
        while (t < table + COUNT_OF(table) && strcmp(t->name, names[i]) != 0) t++;
        model_config c;
        assert_ok(model_config_load(&c, names[i]));
        assert_string_equal(c.name, names[i]);
        if (t == table + COUNT_OF(table)) continue;
        n_held++;
        /* Half a unit of the last printed digit is below 0.02 % for all of them. */
        assert_close((double)model_parameters(&c) / 1e9 / t->total, 1, 2e-4);
        assert_close((double)model_active_parameters(&c) / 1e9 / t->active, 1, 2e-4);
        assert_close((double)model_weight_bytes(&c, &w16, 1) / (1 << 30), t->w16_gib, 0.06);
        assert_close((double)model_kv_token_bytes(&c, &w16, 1) / 1024, t->kv16_kib, 1e-9);
        /* Ours: zero points of 8 bits (theirs 16) and for gpt-oss 4-bit attention as well. */
        const precision *four = strcmp(c.name, "gpt-oss-120b") == 0 ? &mx : &w4;
        assert_ok(model_fits_precision(&c, four, 1));
        const double gib = (double)model_weight_bytes(&c, four, 1) / (1 << 30);
        assert_at_most(gib, t->w4_gib + 0.05);
        assert_more(gib, t->w4_gib * 0.97 - 0.05);
        assert_true(c.n_eos >= 1);
    }
    assert_int_equal(n_held, COUNT_OF(table));
    arena_close(&a);
}

static void test_particulars(void **state) {
    (void)state;
    model_config c;
    assert_ok(model_config_load(&c, "gpt-oss-120b"));
    assert_int_equal(c.type, DT_BF16); /* the file names no type */
    assert_int_equal(c.head_dim, 64);
    assert_true(c.sinks && c.qkv_bias && c.o_bias && c.router_bias && c.expert_bias);
    assert_int_equal(c.window[0], 128);
    assert_int_equal(c.window[1], 0);
    assert_int_equal(c.window[34], 128);
    assert_int_equal(c.rope.kind, ROPE_YARN);
    assert_false(c.rope.truncate);
    assert_close(c.rope.attention_factor, 1.3465735902799727, 1e-12);
    assert_int_equal(c.activation, ACT_SWIGLU_OAI);
    assert_int_equal(c.route, ROUTE_TOPK_SOFTMAX);
    assert_int_equal(c.n_eos, 3);
    assert_int_equal(c.bos, 199998); /* from generation_config.json */
    assert_int_equal(c.ctx_max, 131072);
    assert_ok(model_config_load(&c, "Qwen2.5-7B"));
    assert_true(c.qkv_bias && !c.o_bias && !c.qk_norm);
    assert_int_equal(c.window[27], 0); /* use_sliding_window is false */
    assert_ok(model_config_load(&c, "Qwen3-30B-A3B"));
    assert_true(c.norm_topk && c.qk_norm && c.ffn_dim == 0);
    assert_int_equal(c.route, ROUTE_SOFTMAX_TOPK);
    assert_ok(model_config_load(&c, "Llama-2-7B"));
    assert_close(c.rope.theta, 1e4, 0); /* the file has no rope_theta */
    assert_int_equal(c.type, DT_F16);
    assert_ok(model_config_load(&c, "InternLM2.5-20B"));
    assert_int_equal(c.rope.kind, ROPE_DYNAMIC);
    assert_int_equal(c.ctx_max, 32768);
    assert_false(c.qkv_bias);
}

static void load_golden(model_config *c, const char *name, const char *file) {
    char path[256], *data;
    size_t n;
    snprintf(path, sizeof path, GOLDENS "/%s/%s", name, file);
    assert_ok(file_read(&data, &n, path));
    assert_ok(model_config_parse(c, data, n, path));
    mem_free(data);
}

/* golden.h names every folder that there is, so that no test passes one by. */
static void test_golden_names(void **state) {
    (void)state;
    DIR *dir = opendir(GOLDENS);
    assert_non_null(dir);
    int32_t n = 0;
    for (struct dirent *f; (f = readdir(dir)) != NULL;) n += f->d_name[0] != '.';
    closedir(dir);
    assert_int_equal(n, COUNT_OF(golden_names));
}

/* A name needs no escapes, is UTF-8 and ends with a whole character. */
static void test_names_of_folders(void **state) {
    (void)state;
    static const char long_name[] =
        "aa\u6a21\u578b\u6a21\u578b\u6a21\u578b\u6a21\u578b\u6a21\u578b"
        "\u6a21\u578b\u6a21\u578b\u6a21\u578b\u6a21\u578b\u6a21\u578b\u6a21";
    static const char *const names[][2] = {{"tiny", "tiny"},
                                           {"ti\"n\\y\n\x7f", "ti_n_y__"},
                                           {"\xff\xfe 8B", "__ 8B"},
                                           {long_name, NULL}};
    char dir[256], path[300], *data;
    size_t n;
    model_config c;
    assert_ok(file_read(&data, &n, GOLDENS "/llama/config.json"));
    for (int32_t i = 0; i < COUNT_OF(names); i++) {
        path_join(dir, sizeof dir, folder, names[i][0]);
        assert_ok(file_write(path_join(path, sizeof path, dir, "config.json"), data, n));
        assert_ok(model_config_load(&c, dir));
        if (names[i][1]) assert_string_equal(c.name, names[i][1]);
    }
    assert_int_equal(strlen(c.name), 62); /* of 65 bytes: two, and twenty characters of three */
    mem_free(data);
}

static void test_both_spellings(void **state) {
    (void)state;
    for (int32_t i = 0; i < COUNT_OF(golden_names); i++) {
        model_config now, old;
        load_golden(&now, golden_names[i], "config.json");
        load_golden(&old, golden_names[i], "config_v4.json");
        if (memcmp(&now, &old, sizeof now) != 0)
            fail_msg("%s: the spellings differ", golden_names[i]);
    }
    model_config c;
    load_golden(&c, "gpt_oss", "config.json");
    assert_int_equal(c.window[0], 16);
    assert_int_equal(c.window[1], 0);
    load_golden(&c, "mistral_window", "config.json");
    assert_int_equal(c.window[1], 24);
    load_golden(&c, "qwen3_moe", "config_v4.json");
    assert_int_equal(c.n_experts, 8);
    load_golden(&c, "llama_bias_tied", "config.json");
    assert_true(c.tied && c.qkv_bias && c.o_bias);
}

/* A Llama config with one key replaced or added; "" takes it away. */
static status parse_with(model_config *c, const char *base, const char *key, const char *value) {
    json_t *root, *v = NULL;
    json_error_t e;
    assert_ok(json_parse(&root, base, strlen(base), "base"));
    if (value[0]) {
        v = json_loads(value, JSON_DECODE_ANY, &e);
        if (!v) fail_msg("test value %s: %s", value, e.text);
        json_object_set_new(root, key, v);
    } else {
        json_object_del(root, key);
    }
    char *line = json_line(root);
    const status st = model_config_parse(c, line, strlen(line), "config.json");
    mem_free(line);
    json_decref(root);
    return st;
}

static const char llama[] =
    "{\"architectures\":[\"LlamaForCausalLM\"],\"model_type\":\"llama\",\"hidden_size\":64,"
    "\"intermediate_size\":128,\"num_hidden_layers\":4,\"num_attention_heads\":8,"
    "\"num_key_value_heads\":2,\"vocab_size\":100,\"max_position_embeddings\":512}";
static const char qwen[] =
    "{\"architectures\":[\"Qwen2ForCausalLM\"],\"hidden_size\":64,\"intermediate_size\":128,"
    "\"num_hidden_layers\":4,\"num_attention_heads\":8,\"num_key_value_heads\":2,\"vocab_size\":"
    "100,"
    "\"max_position_embeddings\":512,\"use_sliding_window\":true,\"sliding_window\":32}";
static const char mistral[] =
    "{\"model_type\":\"mistral\",\"hidden_size\":64,\"intermediate_size\":128,"
    "\"num_hidden_layers\":4,\"num_attention_heads\":8,\"num_key_value_heads\":2,\"vocab_size\":"
    "100,"
    "\"max_position_embeddings\":512}";
static const char moe[] =
    "{\"architectures\":[\"Qwen3MoeForCausalLM\"],\"hidden_size\":64,\"moe_intermediate_size\":128,"
    "\"num_hidden_layers\":4,\"num_attention_heads\":8,\"num_key_value_heads\":2,\"vocab_size\":"
    "100,"
    "\"max_position_embeddings\":512,\"num_experts\":8,\"num_experts_per_tok\":2}";

static void test_defaults(void **state) {
    (void)state;
    model_config c;
    assert_ok(parse_with(&c, llama, "num_key_value_heads", ""));
    assert_int_equal(c.n_kv_heads, 8);
    assert_int_equal(c.head_dim, 8);
    assert_close(c.norm_eps, 1e-6, 0);
    assert_ok(parse_with(&c, llama, "head_dim", "null"));
    assert_int_equal(c.head_dim, 8);
    assert_ok(parse_with(&c, mistral, "x", "1")); /* by model_type; the window of the class */
    assert_int_equal(c.window[3], 4096);
    assert_ok(parse_with(&c, mistral, "sliding_window", "null"));
    assert_int_equal(c.window[3], 0);
    assert_ok(parse_with(&c, qwen, "max_window_layers", "2"));
    assert_int_equal(c.window[1], 0);
    assert_int_equal(c.window[2], 32);
    assert_ok(parse_with(&c, qwen, "layer_types",
                         "[\"sliding_attention\",\"full_attention\",\"full_attention\","
                         "\"sliding_attention\"]"));
    assert_int_equal(c.window[0], 32);
    assert_int_equal(c.window[2], 0);
    assert_ok(parse_with(&c, moe, "x", "1"));
    assert_false(c.norm_topk);
    assert_ok(parse_with(&c, llama, "eos_token_id", "[3, 4, 3]"));
    assert_int_equal(c.n_eos, 2);
    assert_ok(parse_with(&c, llama, "rope_parameters",
                         "{\"full_attention\":{\"rope_theta\":500.0},"
                         "\"sliding_attention\":{\"rope_theta\":500.0}}"));
    assert_close(c.rope.theta, 500, 0);
    assert_ok(parse_with(&c, llama, "rope_scaling",
                         "{\"rope_type\":\"yarn\",\"factor\":4.0,"
                         "\"original_max_position_embeddings\":512}"));
    assert_int_equal(c.ctx_max, 2048);
    assert_ok(parse_with(&c, llama, "rope_scaling",
                         "{\"rope_type\":\"yarn\",\"factor\":40.0,\"mscale\":1.0,"
                         "\"mscale_all_dim\":1.0}"));
    assert_close(c.rope.attention_factor, 1, 1e-15); /* DeepSeek's quotient */
}

/* gpt-oss without layer_types and rope: every second layer windowed, the first one too, and YaRN.
 */
static void test_gpt_oss_defaults(void **state) {
    (void)state;
    static const char oss[] =
        "{\"model_type\":\"gpt_oss\",\"hidden_size\":64,\"intermediate_size\":128,"
        "\"num_hidden_layers\":4,\"num_attention_heads\":8,\"num_key_value_heads\":2,"
        "\"vocab_size\":100,\"max_position_embeddings\":131072,\"num_local_experts\":8,"
        "\"num_experts_per_tok\":2}";
    model_config c;
    assert_ok(model_config_parse(&c, oss, strlen(oss), "config.json"));
    assert_int_equal(c.window[0], 128);
    assert_int_equal(c.window[1], 0);
    assert_int_equal(c.window[2], 128);
    assert_int_equal(c.rope.kind, ROPE_YARN);
    assert_false(c.rope.truncate);
    assert_close(c.rope.theta, 1.5e5, 0);
    assert_close(c.rope.attention_factor, 1.3465735902799727, 1e-12);
    assert_close(c.swiglu_limit, 7, 0);
    assert_int_equal(c.head_dim, 64);
}

static const struct {
    const char *base, *key, *value;
    status want;
    const char *says;
} refusals[] = {
    {llama, "architectures", "[\"GemmaForCausalLM\"]", ST_UNSUPPORTED, "GemmaForCausalLM"},
    {llama, "architectures", "[]", ST_FORMAT, "architectures"},
    {llama, "architectures", "[7]", ST_FORMAT, "architectures"},
    {llama, "model_type", "\"qwen2\"", ST_FORMAT, "qwen2"},
    {llama, "hidden_size", "", ST_NOTFOUND, "hidden_size"},
    {llama, "hidden_size", "0", ST_RANGE, "hidden_size"},
    {llama, "hidden_size", "-64", ST_RANGE, "hidden_size"},
    {llama, "hidden_size", "1e30", ST_FORMAT, "hidden_size"},
    {llama, "hidden_size", "65", ST_RANGE, "num_attention_heads"},
    {llama, "hidden_size", "\"64\"", ST_FORMAT, "hidden_size"},
    {llama, "hidden_size", "64.5", ST_FORMAT, "hidden_size"},
    {llama, "num_hidden_layers", "257", ST_RANGE, "num_hidden_layers"},
    {llama, "num_attention_heads", "0", ST_RANGE, "num_attention_heads"},
    {llama, "num_key_value_heads", "3", ST_RANGE, "num_key_value_heads"},
    {llama, "num_key_value_heads", "16", ST_RANGE, "num_key_value_heads"},
    {llama, "head_dim", "63", ST_RANGE, "head_dim"},
    {llama, "head_dim", "0", ST_RANGE, "head_dim"},
    {llama, "vocab_size", "0", ST_RANGE, "vocab_size"},
    {llama, "vocab_size", "4294967296", ST_RANGE, "vocab_size"},
    {llama, "intermediate_size", "0", ST_RANGE, "intermediate_size"},
    {llama, "max_position_embeddings", "0", ST_RANGE, "max_position_embeddings"},
    {llama, "rms_norm_eps", "0", ST_RANGE, "rms_norm_eps"},
    {llama, "rms_norm_eps", "-1e-5", ST_RANGE, "rms_norm_eps"},
    {llama, "rms_norm_eps", "\"nan\"", ST_FORMAT, "rms_norm_eps"},
    {llama, "tie_word_embeddings", "1", ST_FORMAT, "tie_word_embeddings"},
    {llama, "mlp_bias", "true", ST_UNSUPPORTED, "mlp_bias"},
    {llama, "hidden_act", "\"gelu\"", ST_UNSUPPORTED, "gelu"},
    {llama, "torch_dtype", "\"int8\"", ST_UNSUPPORTED, "int8"},
    {llama, "eos_token_id", "100", ST_RANGE, "eos_token_id"},
    {llama, "eos_token_id", "[1,2,3,4,5,6,7,8,9]", ST_RANGE, "eos_token_id"},
    {llama, "eos_token_id", "\"</s>\"", ST_FORMAT, "eos_token_id"},
    {llama, "bos_token_id", "-1", ST_RANGE, "bos_token_id"},
    {llama, "rope_theta", "0", ST_RANGE, "rope_theta"},
    {llama, "partial_rotary_factor", "0.5", ST_UNSUPPORTED, "partial_rotary_factor"},
    {llama, "rope_scaling", "7", ST_FORMAT, "rope_scaling"},
    {llama, "rope_scaling", "{\"type\":\"longrope\"}", ST_UNSUPPORTED, "longrope"},
    {llama, "rope_scaling", "{\"type\":\"linear\"}", ST_NOTFOUND, "factor"},
    {llama, "rope_scaling", "{\"type\":\"linear\",\"factor\":0.5}", ST_RANGE, "factor"},
    {llama, "rope_scaling", "{\"rope_type\":\"llama3\",\"factor\":8}", ST_NOTFOUND,
     "original_max_position_embeddings"},
    {llama, "rope_scaling",
     "{\"rope_type\":\"llama3\",\"factor\":8,\"low_freq_factor\":4,\"high_freq_factor\":4,"
     "\"original_max_position_embeddings\":64}",
     ST_RANGE, "high_freq_factor"},
    {llama, "rope_scaling", "{\"rope_type\":\"yarn\",\"factor\":8,\"beta_fast\":0.5}", ST_RANGE,
     "beta_fast"},
    {llama, "rope_parameters",
     "{\"full_attention\":{\"rope_theta\":500.0},\"sliding_attention\":{\"rope_theta\":501.0}}",
     ST_UNSUPPORTED, "layer type"},
    {llama, "layer_types",
     "[\"sliding_attention\",\"full_attention\",\"full_attention\",\"full_attention\"]", ST_FORMAT,
     "layer_types"},
    {qwen, "sliding_window", "0", ST_RANGE, "sliding_window"},
    {qwen, "layer_types", "[\"full_attention\"]", ST_FORMAT, "layer_types"},
    {qwen, "layer_types",
     "[\"chunked_attention\",\"full_attention\",\"full_attention\",\"full_attention\"]",
     ST_UNSUPPORTED, "chunked_attention"},
    {qwen, "num_key_value_heads", "", ST_NOTFOUND, "num_key_value_heads"},
    {moe, "num_experts", "", ST_NOTFOUND, "num_experts"},
    {moe, "num_local_experts", "9", ST_FORMAT, "num_local_experts"},
    {moe, "num_experts_per_tok", "9", ST_RANGE, "num_experts_per_tok"},
    {moe, "mlp_only_layers", "[0]", ST_UNSUPPORTED, "mlp_only_layers"},
    {moe, "decoder_sparse_step", "2", ST_UNSUPPORTED, "decoder_sparse_step"},
};

static void test_refusals(void **state) {
    (void)state;
    for (int32_t i = 0; i < COUNT_OF(refusals); i++) {
        model_config c;
        const status st = parse_with(&c, refusals[i].base, refusals[i].key, refusals[i].value);
        if (st != refusals[i].want || !strstr(fail_message(), refusals[i].says))
            fail_msg("%s = %s: %s (%s)", refusals[i].key, refusals[i].value, status_text(st),
                     st == ST_OK ? "" : fail_message());
    }
    model_config c;
    assert_status(model_config_parse(&c, "[]", 2, "x"), ST_FORMAT);
    assert_status(model_config_parse(&c, "", 0, "x"), ST_FORMAT);
    assert_status(model_config_parse(&c, "{\"hidden_size\": NaN}", 20, "x"), ST_FORMAT);
    assert_status(model_config_load(&c, "../../etc"), ST_NOTFOUND);
    assert_status(model_config_load(&c, "no-such-model"), ST_NOTFOUND);
    assert_status(model_config_load(&c, ""), ST_NOTFOUND);
}

/* Damaged text never crashes, whatever it parses to. */
static void test_truncated(void **state) {
    (void)state;
    char *data;
    size_t n;
    assert_ok(file_read(&data, &n, "workloads/models/gpt-oss-120b/config.json"));
    model_config c;
    for (size_t cut = 0; cut + 2 < n; cut++)
        assert_status(model_config_parse(&c, data, cut, "cut"), ST_FORMAT);
    for (size_t i = 0; i < n; i++) {
        data[i] ^= 1;
        (void)!model_config_parse(&c, data, n, "flip");
        data[i] ^= 1;
    }
    mem_free(data);
}

static void refused(const char *name, const char *format, int32_t tp, const char *says) {
    model_config c;
    precision p;
    assert_ok(model_config_load(&c, name));
    assert_ok(precision_parse(&p, format));
    const status st = model_fits_precision(&c, &p, tp);
    if (st != ST_SHAPE || !strstr(fail_message(), says))
        fail_msg("%s %s tp %d: %s", name, format, tp, st == ST_OK ? "accepted" : fail_message());
}

static void accepted(const char *name, const char *format, int32_t tp) {
    model_config c;
    precision p;
    assert_ok(model_config_load(&c, name));
    assert_ok(precision_parse(&p, format));
    assert_ok(model_fits_precision(&c, &p, tp));
}

static void test_tensor_parallel(void **state) {
    (void)state;
    accepted("Qwen2.5-72B", "W4", 1);
    refused("Qwen2.5-72B", "W4", 2, "group 128");
    accepted("Qwen2.5-72B", "W4g64", 2); /* 14784 = 231 * 64 */
    accepted("Qwen2.5-72B", "W16", 8);
    refused("Qwen2.5-72B", "W16", 3, "head count");
    refused("Qwen3-30B-A3B", "W4", 4, "192");
    accepted("Qwen3-30B-A3B", "W4", 2);
    refused("Qwen3-235B-A22B", "WFP8bAFP8", 8, "192"); /* a rank boundary would cut a block */
    accepted("Qwen3-235B-A22B", "WFP8bAFP8", 4);
    refused("Llama-2-7B", "W4", 4, "group 128");
    refused("Qwen2.5-7B", "W4", 8, "head count");
    refused("gpt-oss-120b", "W4", 1, "2880");
    accepted("gpt-oss-120b", "W4g64", 1);
    accepted("gpt-oss-120b", "W4g32", 2);
    accepted("gpt-oss-120b", "WMXFP4", 2);
    refused("gpt-oss-120b", "WMXFP4", 4, "720");
    accepted("Qwen3-8B", "W16KV[8x36]", 1);
    refused("Qwen3-8B", "W16KV[8x35]", 1, "36 layers");
    accepted("Qwen3-235B-A22B", "W16", 16); /* four KV heads, each on four ranks */
    model_config c;
    assert_ok(model_config_load(&c, "Qwen3-8B"));
    assert_status(model_fits_tp(&c, 0, 0), ST_RANGE);
    assert_status(model_fits_tp(&c, -1, 0), ST_RANGE);
}

static void test_rope_golden(void **state) {
    (void)state;
    json_t *rows, *row;
    size_t i;
    assert_ok(json_file(&rows, "tests/vectors/rope.json"));
    int32_t seen = 0;
    json_array_foreach(rows, i, row) {
        const char *name = json_string_value(json_object_get(row, "name"));
        const json_t *length = json_object_get(row, "seq_len");
        const json_int_t positions =
            json_integer_value(json_object_get(row, "max_position_embeddings"));
        if (length && json_integer_value(length) > positions) continue; /* beyond ctx_max */
        const int32_t head_dim = (int32_t)json_integer_value(json_object_get(row, "head_dim"));
        json_t *config =
            json_pack("{s:[s], s:i, s:i, s:i, s:i, s:i, s:i, s:I, s:O}", "architectures",
                      "LlamaForCausalLM", "hidden_size", head_dim * 4, "intermediate_size", 64,
                      "num_hidden_layers", 1, "num_attention_heads", 4, "num_key_value_heads", 4,
                      "vocab_size", 64, "max_position_embeddings", positions, "rope_parameters",
                      json_object_get(row, "rope_parameters"));
        char *line = json_line(config);
        model_config c;
        assert_ok(model_config_parse(&c, line, strlen(line), name));
        double freq[256], factor;
        assert_int_equal(c.head_dim, head_dim);
        rope_frequencies(&c.rope, head_dim, freq, &factor);
        assert_close(factor, json_number_value(json_object_get(row, "attention_factor")), 1e-7);
        const json_t *want = json_object_get(row, "inv_freq");
        for (int32_t d = 0; d < head_dim / 2; d++) {
            const double w = json_number_value(json_array_get(want, (size_t)d));
            /* The reference computes in float32: a few ulp through pow, division, blend. */
            if (!(fabs(freq[d] - w) <= 1e-6 * w))
                fail_msg("%s[%d] %.9g, not %.9g", name, d, freq[d], w);
        }
        mem_free(line);
        json_decref(config);
        seen++;
    }
    assert_int_equal(seen, 8);
    json_decref(rows);
}

/* So small a base that the ramp would start past the last pair; transformers 5.23 gives these. */
static void test_rope_ramp_clamped(void **state) {
    (void)state;
    const rope_config r = {.kind = ROPE_YARN,
                           .theta = 10,
                           .factor = 4,
                           .beta_fast = 32,
                           .beta_slow = 1,
                           .attention_factor = 1.138629436111989,
                           .truncate = true,
                           .original_ctx = 4096};
    double freq[32], factor;
    rope_frequencies(&r, 64, freq, &factor);
    assert_close(freq[20], 0.23713736236095428, 1e-6);
    assert_close(freq[31], 0.10746078193187714, 1e-6);
}

static void test_out_of_memory(void **state) {
    (void)state;
    arena a;
    assert_ok(arena_open(&a, 1 << 16));
    const char **names;
    int32_t n;
    mem_fail_at(1);
    assert_status(model_names(&a, &names, &n), ST_NOMEM);
    mem_fail_at(2);
    assert_status(model_names(&a, &names, &n), ST_NOMEM);
    mem_fail_at(0);
    arena_close(&a);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_sixteen_models),   cmocka_unit_test(test_particulars),
        cmocka_unit_test(test_both_spellings),   cmocka_unit_test(test_defaults),
        cmocka_unit_test(test_gpt_oss_defaults), cmocka_unit_test(test_refusals),
        cmocka_unit_test(test_truncated),        cmocka_unit_test(test_tensor_parallel),
        cmocka_unit_test(test_rope_golden),      cmocka_unit_test(test_rope_ramp_clamped),
        cmocka_unit_test(test_out_of_memory),    cmocka_unit_test(test_golden_names),
        cmocka_unit_test(test_names_of_folders),
    };
    return cmocka_run_group_tests(tests, make_folder, remove_folder);
}
