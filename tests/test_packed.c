/* test_packed.c - quantised checkpoints: what other tools wrote, read to their own values; every
 * layout written by us and read back code by code; refusals; broken files. */
#include "device.h"
#include "evaluate.h"
#include "folder.h"
#include "forward.h"
#include "quantise.h"
#include "rng.h"
#include "test.h"

#include <dirent.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#define VECTORS "tests/vectors/quantised"

static char plain[72], packed[72]; /* folders: a 16-bit checkpoint, and what is made of it */

/* --- Vectors of the original tools ------------------------------------------------------------ */

/* Largest difference of a row to `want`, relative to its largest value. */
static double row_error(const float *got, const float *want, int32_t k) {
    double error = 0, top = 0;
    for (int32_t i = 0; i < k; i++) {
        const double d = fabs((double)got[i] - (double)want[i]);
        error = !(d <= error) ? d : error;
        top = fmax(top, fabs((double)want[i]));
    }
    return error / (top > 0 ? top : 1);
}

static void check_values(const packed_matrix *m, const float *want, int32_t rows) {
    float *got = mem_alloc((size_t)m->k, sizeof *got);
    for (int32_t i = 0; i < rows; i++) {
        packed_row(m, i * (m->n / rows), got);
        /* One product of three factors, each rounding 2^-24: in another order at most 2^-22. */
        const double error = row_error(got, want + (int64_t)i * m->k, m->k);
        if (!(error <= 0x1p-22)) fail_msg("%s: row %d is off by %g", m->name, i, error);
        int32_t largest = 0; /* twin: a little off in one element must show */
        for (int32_t j = 0; j < m->k; j++)
            if (fabsf(got[j]) > fabsf(got[largest])) largest = j;
        got[largest] *= 1.0001f;
        assert_more(row_error(got, want + (int64_t)i * m->k, m->k), 0x1p-22);
    }
    mem_free(got);
}

static void check_vector(const char *name) {
    char path[256];
    snprintf(path, sizeof path, VECTORS "/%s", name);
    packed_config c;
    safetensors *s;
    assert_ok(packed_config_load(&c, path));
    assert_ok(safetensors_open(&s, path));
    print_message("  %s\n", name);
    const tensor_view *want = safetensors_find(s, "want"), *w = safetensors_find(s, "m.weight");
    const bool block = strcmp(name, "fp8_block") == 0 || strcmp(name, "float_block") == 0;
    const int32_t n = block ? (int32_t)w->dim[0] : strncmp(name, "awq", 3) == 0 ? 32 : 16;
    packed_matrix m;
    bool found;
    if (strcmp(name, "gpt_oss") == 0) {
        for (int32_t e = 0; e < 2; e++) {
            assert_ok(packed_find_blocks(&m, &found, s, "e.proj", e, 2, (int32_t)want->dim[1],
                                         (int32_t)want->dim[2], &c));
            assert_true(found);
            check_values(&m, (const float *)want->data + e * want->dim[1] * want->dim[2],
                         (int32_t)want->dim[1]);
        }
    } else {
        const status st = packed_find(&m, &found, s, "m", n, (int32_t)want->dim[1], &c);
        if (st != ST_OK || !found) fail_msg("%s: %s", name, fail_message());
        assert_ok(packed_check(&m));
        check_values(&m, want->data, (int32_t)want->dim[0]);
    }
    safetensors_close(s);
}

static void test_vectors(void **state) {
    (void)state;
    DIR *dir = opendir(VECTORS);
    assert_non_null(dir);
    int32_t n = 0;
    for (struct dirent *e = readdir(dir); e; e = readdir(dir)) {
        if (strchr(e->d_name, '.') || e->d_name[0] == '_') continue;
        check_vector(e->d_name);
        n++;
    }
    closedir(dir);
    assert_true(n >= 31);
}

/* --- A small checkpoint in every layout ------------------------------------------------------- */

static const char small_config[] =
    "{\"architectures\":[\"LlamaForCausalLM\"],\"model_type\":\"llama\",\"hidden_size\":256,"
    "\"num_hidden_layers\":2,\"num_attention_heads\":4,\"num_key_value_heads\":2,\"head_dim\":64,"
    "\"intermediate_size\":384,\"vocab_size\":64,\"max_position_embeddings\":128,"
    "\"rms_norm_eps\":1e-5,\"rope_theta\":10000.0,\"tie_word_embeddings\":false,"
    "\"torch_dtype\":\"bfloat16\",\"hidden_act\":\"silu\",\"bos_token_id\":1,\"eos_token_id\":2}";

typedef struct {
    tensor_view view[64];
    int32_t n;
    arena memory;
} tensor_list;

static void add_rows(tensor_list *l, const weight_source *s, int32_t at, int32_t rows,
                     const char *name) {
    const int32_t k = s->shape.k;
    const bool vector = s->shape.n == 1;
    uint16_t *data = arena_array(&l->memory, uint16_t, (size_t)rows * (size_t)k);
    float *row = arena_array(&l->memory, float, (size_t)k);
    for (int32_t i = 0; i < rows; i++) {
        weight_source_row(s, 0, at + i, row);
        dtype_from_f32(data + (int64_t)i * k, row, k, DT_BF16);
    }
    tensor_view *t = &l->view[l->n++];
    *t = (tensor_view){.name = arena_string(&l->memory, name, strlen(name)),
                       .type = DT_BF16,
                       .n_dims = vector ? 1 : 2,
                       .data = data,
                       .bytes = (int64_t)rows * k * 2};
    t->dim[0] = vector ? k : rows;
    t->dim[1] = vector ? 0 : k;
}

/* The synthetic model of small_config as bf16 tensors. */
static void make_plain(void) {
    static const struct {
        weight_field f;
        const char *name[3];
    } names[] = {
        {WEIGHT_attn_norm, {"input_layernorm"}},
        {WEIGHT_qkv, {"self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"}},
        {WEIGHT_o, {"self_attn.o_proj"}},
        {WEIGHT_ffn_norm, {"post_attention_layernorm"}},
        {WEIGHT_gate_up, {"mlp.gate_proj", "mlp.up_proj"}},
        {WEIGHT_down, {"mlp.down_proj"}},
    };
    model_config c;
    checkpoint *k;
    weight_source s;
    tensor_list l = {.n = 0};
    char name[128];
    assert_ok(arena_open(&l.memory, 64 << 20));
    assert_ok(model_config_parse(&c, small_config, strlen(small_config), "small"));
    assert_ok(checkpoint_open(&k, &c, NULL, 7));
    assert_ok(checkpoint_source(k, WEIGHT_embed, 0, &s));
    add_rows(&l, &s, 0, c.vocab, "model.embed_tokens.weight");
    assert_ok(checkpoint_source(k, WEIGHT_norm, 0, &s));
    add_rows(&l, &s, 0, 1, "model.norm.weight");
    assert_ok(checkpoint_source(k, WEIGHT_head, 0, &s));
    add_rows(&l, &s, 0, c.vocab, "lm_head.weight");
    for (int32_t layer = 0; layer < c.n_layers; layer++) {
        for (int32_t i = 0; i < COUNT_OF(names); i++) {
            assert_ok(checkpoint_source(k, names[i].f, layer, &s));
            for (int32_t j = 0, at = 0; j < 3 && names[i].name[j]; j++) {
                const int32_t rows = names[i].name[1] ? s.shape.fused_rows[j] : s.shape.n;
                snprintf(name, sizeof name, "model.layers.%d.%s.weight", layer, names[i].name[j]);
                add_rows(&l, &s, at, rows, name);
                at += rows;
            }
        }
    }
    char path[128];
    snprintf(path, sizeof path, "%s/model.safetensors", plain);
    assert_ok(safetensors_write(path, l.view, l.n));
    snprintf(path, sizeof path, "%s/config.json", plain);
    assert_ok(file_write(path, small_config, strlen(small_config)));
    checkpoint_close(k);
    arena_close(&l.memory);
}

typedef struct {
    model_config c;
    checkpoint *k;
} opened;

static opened open_folder(const char *dir) {
    opened o;
    assert_ok(model_config_load(&o.c, dir));
    assert_ok(checkpoint_open(&o.k, &o.c, dir, 0));
    return o;
}

/* The canonical form of a whole source of the plain checkpoint; one scale for every row where the
 * layout has no more. */
static void quantise_source(qmatrix *q, arena *a, const weight_source *s, const precision *p,
                            bool one_scale) {
    const int32_t n = s->shape.n, k = s->shape.k;
    float *w = arena_array(a, float, (size_t)n *(size_t)k);
    for (int32_t i = 0; i < n; i++) weight_source_row(s, 0, i, w + (int64_t)i * k);
    float top = 0;
    for (int64_t i = 0; i < (int64_t)n * k; i++) top = fmaxf(top, fabsf(w[i]));
    for (int32_t i = 0; one_scale && i < n; i++) w[(int64_t)i * k + i % k] = top;
    assert_ok(qmatrix_alloc(q, a, p, n, k));
    assert_ok(ref_quantize_weight(q, w));
}

static const weight_field linears[] = {WEIGHT_qkv, WEIGHT_o, WEIGHT_gate_up, WEIGHT_down};

typedef struct {
    save_layout layout;
    const char *format;
    bool one_scale, ordered;
} layout_case;

/* Inputs in an order that is not theirs: a shuffle of what groups hold. */
static void make_order(int32_t *order, int32_t k) {
    rng r;
    rng_seed(&r, 5, 0);
    for (int32_t i = 0; i < k; i++) order[i] = i;
    rng_shuffle(&r, order, k);
}

/* Stable order within groups, as a loader makes it from g_idx alone. */
static int by_number(const void *a, const void *b) {
    const int32_t x = *(const int32_t *)a, y = *(const int32_t *)b;
    return x < y ? -1 : x > y;
}

/* Write the plain checkpoint in a layout; q[layer][linear] keeps what was written. */
static void write_layout(const layout_case *t, const precision *p, arena *a, qmatrix q[2][4],
                         int32_t order[384]) {
    opened from = open_folder(plain);
    save *out;
    assert_ok(save_open(&out, plain, t->layout, p));
    for (int32_t layer = 0; layer < from.c.n_layers; layer++) {
        for (int32_t i = 0; i < COUNT_OF(linears); i++) {
            weight_source s;
            assert_ok(checkpoint_source(from.k, linears[i], layer, &s));
            qmatrix *m = &q[layer][i];
            quantise_source(m, a, &s, p, t->one_scale);
            make_order(order, s.shape.k);
            for (int32_t g = 0; g < s.shape.k; g += m->group)
                qsort(order + g, (size_t)m->group, sizeof *order, by_number);
            for (int32_t j = 0; j < s.n_parts; j++) {
                const qmatrix rows = qmatrix_rows(m, s.part[j].row_at, s.part[j].rows);
                assert_ok(
                    save_matrix(out, s.part[j].tensor->name, &rows, t->ordered ? order : NULL));
            }
        }
    }
    assert_ok(save_write(out, packed));
    save_close(out);
    checkpoint_close(from.k);
}

static void same_matrix(const qmatrix *a, const qmatrix *b, const precision *p, const char *what) {
    const size_t codes = (size_t)qmatrix_code_bytes(p, a->n, a->k);
    const size_t scales = (size_t)dtype_bytes(a->scale_type, qmatrix_scale_count(p, a->n, a->k));
    const size_t zeros = (size_t)qmatrix_zero_count(p, a->n, a->k);
    if (memcmp(a->code, b->code, codes) != 0) fail_msg("%s: codes differ", what);
    if (memcmp(a->scale, b->scale, scales) != 0) fail_msg("%s: scales differ", what);
    if (zeros && memcmp(a->zero, b->zero, zeros) != 0) fail_msg("%s: zero points differ", what);
    /* A stored reciprocal may miss by one rounding. */
    assert_close(a->global_scale, b->global_scale, 0x1p-23 * (double)a->global_scale);
}

static void check_source(const weight_source *s, const precision *p, const qmatrix *want,
                         const layout_case *t, arena *a) {
    qmatrix got;
    char what[192];
    snprintf(what, sizeof what, "%s %s %s", save_layout_text(t->layout), t->format, s->name);
    assert_ok(weight_source_accepts(s, p));
    assert_true(weight_source_has_codes(s, p));
    assert_true((s->stored.order != NULL) == t->ordered);
    assert_ok(qmatrix_alloc(&got, a, p, s->shape.n, s->shape.k));
    weight_source_qmatrix(s, 0, &got);
    same_matrix(want, &got, p, what);
    /* The other way in, by value. */
    float *x = arena_array(a, float, (size_t)s->shape.k),
          *y = arena_array(a, float, (size_t)s->shape.k);
    for (int32_t i = 0; i < s->shape.n; i += 37) {
        weight_source_row(s, 0, i, x);
        ref_dequantize_weight(y, &got, i, 1);
        for (int32_t j = 0; j < s->shape.k; j++)
            assert_true(x[t->ordered ? s->stored.order[j] : j] == y[j]);
    }
    got.code[got.k / 3] ^= 1; /* twin */
    assert_true(memcmp(got.code, want->code, (size_t)got.k) != 0);
}

static void round_trip(const layout_case *t) {
    static qmatrix q[2][4];
    static int32_t order[384];
    precision p, stored = {0};
    arena a;
    assert_ok(arena_open(&a, 256 << 20));
    assert_ok(precision_parse(&p, t->format));
    write_layout(t, &p, &a, q, order);
    opened o = open_folder(packed);
    assert_ok(checkpoint_precision(o.k, &stored));
    assert_int_equal(stored.weight, p.weight);
    assert_int_equal(stored.group, p.group);
    assert_int_equal(stored.sym, p.sym);
    assert_int_equal(checkpoint_weight_bytes(o.k, &p, 1), model_weight_bytes(&o.c, &p, 1));
    for (int32_t layer = 0; layer < 2; layer++)
        for (int32_t i = 0; i < COUNT_OF(linears); i++) {
            weight_source s;
            assert_ok(checkpoint_source(o.k, linears[i], layer, &s));
            check_source(&s, &p, &q[layer][i], t, &a);
        }
    checkpoint_close(o.k);
    arena_close(&a);
}

static const layout_case cases[] = {
    {SAVE_COMPRESSED, "W4g32", false, false},  {SAVE_COMPRESSED, "W4g64sym", false, false},
    {SAVE_COMPRESSED, "W4", false, false},     {SAVE_COMPRESSED, "W4sym", false, false},
    {SAVE_COMPRESSED, "W4gK", false, false},   {SAVE_COMPRESSED, "W4gKsym", false, false},
    {SAVE_COMPRESSED, "W4g64", false, true},   {SAVE_COMPRESSED, "W8", false, false},
    {SAVE_COMPRESSED, "W8g32", false, false},  {SAVE_COMPRESSED, "W8g128", false, true},
    {SAVE_COMPRESSED, "W8g64", false, false},  {SAVE_COMPRESSED, "WFP8", false, false},
    {SAVE_COMPRESSED, "WFP8b", false, false},  {SAVE_COMPRESSED, "WNVFP4", false, false},
    {SAVE_COMPRESSED, "WMXFP4", false, false}, {SAVE_AWQ, "W4", false, false},
    {SAVE_AWQ, "W4g32", false, false},         {SAVE_AWQ, "W4g64", false, false},
    {SAVE_AWQ, "W4gK", false, false},          {SAVE_GPTQ, "W4sym", false, false},
    {SAVE_GPTQ, "W4g32", false, false},        {SAVE_GPTQ, "W4g64", false, true},
    {SAVE_GPTQ, "W4sym", false, true},         {SAVE_GPTQ_V2, "W4gKsym", false, false},
    {SAVE_GPTQ_V2, "W4", false, true},         {SAVE_FP8, "WFP8b", false, false},
    {SAVE_FP8, "WFP8", true, false},           {SAVE_MODELOPT, "WNVFP4", false, false},
    {SAVE_MODELOPT, "WFP8", true, false},
};

static void test_round_trips(void **state) {
    (void)state;
    for (int32_t i = 0; i < COUNT_OF(cases); i++) round_trip(&cases[i]);
}

/* --- Through the cpu device ------------------------------------------------------------------- */

/* Logits of a few tokens. */
static void logits_of(const char *dir, const char *format, float *out) {
    enum { T = 24 };
    engine_options o = ENGINE_OPTIONS_DEFAULT;
    engine *e;
    o.model = dir;
    o.precision = format;
    o.device_options.threads = 1;
    o.ctx_max = 64;
    o.policy.token_budget = 64;
    o.policy.max_seqs = 1;
    o.max_samples = T;
    assert_ok(engine_open(&e, &o, NULL, NULL));
    int32_t token[T], position[T];
    sample_row sample[T];
    sampled result[T];
    for (int32_t i = 0; i < T; i++) {
        token[i] = (i * 29 + 3) % 64;
        position[i] = i;
        sample[i] = (sample_row){.row = i};
    }
    const int32_t seq_start[2] = {0, T}, page_start[2] = {0, 1}, kv_len = T, page = 0;
    const int64_t id = 0;
    const batch b = {.n_seqs = 1,
                     .n_tokens = T,
                     .n_samples = T,
                     .token = token,
                     .position = position,
                     .seq_start = seq_start,
                     .kv_len = &kv_len,
                     .page_start = page_start,
                     .page = &page,
                     .id = &id,
                     .sample = sample};
    int64_t cost;
    assert_ok(forward_step(engine_forward(e), &b, result, &cost));
    assert_ok(forward_logits(engine_forward(e), out));
    engine_close(e);
}

/* A quantised checkpoint gives the logits of the plain one that is quantised at load: the same
 * codes by two ways. Dequantised at load (W16) it gives them too, as long as activations stay. */
static void test_logits(void **state) {
    (void)state;
    static const layout_case on_load[] = {{SAVE_COMPRESSED, "W4", false, false},
                                          {SAVE_AWQ, "W4g64", false, false},
                                          {SAVE_GPTQ, "W4g32", false, false},
                                          {SAVE_FP8, "WFP8b", false, false}};
    static float want[24 * 64], got[24 * 64];
    for (int32_t i = 0; i < COUNT_OF(on_load); i++) {
        round_trip(&on_load[i]);
        logits_of(plain, on_load[i].format, want);
        logits_of(packed, "auto", got);
        assert_memory_equal(got, want, sizeof got);
        logits_of(packed, "W16", got);
        assert_memory_equal(got, want, sizeof got);
        logits_of(plain, "W16", got); /* twin */
        assert_true(memcmp(got, want, sizeof got) != 0);
    }
    /* An order of inputs changes nothing but which column is which: by codes and by value alike. */
    round_trip(&(layout_case){SAVE_GPTQ, "W4g64", false, true});
    logits_of(packed, "auto", got);
    logits_of(packed, "W16", want);
    assert_memory_equal(got, want, sizeof got);
}

/* gpt-oss: experts in blocks, attention in 16 bit, which stays so. What is read again, rows of gate
 * and up no longer alternating, is what the source's rows give. */
static void test_gpt_oss(void **state) {
    (void)state;
    quantise_options o = {.model = "tests/vectors/models/gpt_oss",
                          .out = packed,
                          .layout = SAVE_GPT_OSS,
                          .device = "cpu"};
    precision stored = {0};
    arena a;
    assert_ok(arena_open(&a, 64 << 20));
    assert_ok(precision_parse(&o.precision, "WMXFP4"));
    assert_ok(quantise_checkpoint(&o));
    opened from = open_folder(o.model), to = open_folder(packed);
    assert_ok(checkpoint_precision(to.k, &stored));
    assert_int_equal(stored.weight, WF_MXFP4);
    weight_source s, t;
    assert_ok(checkpoint_source(to.k, WEIGHT_qkv, 0, &t));
    assert_false(t.shape.quantise);
    for (int32_t layer = 0; layer < from.c.n_layers; layer++)
        for (int32_t i = 0; i < 2; i++) {
            const weight_field f = i ? WEIGHT_experts_down : WEIGHT_experts_gate_up;
            assert_ok(checkpoint_source(from.k, f, layer, &s));
            assert_ok(checkpoint_source(to.k, f, layer, &t));
            const int32_t n = s.shape.n, k = s.shape.k;
            float *w = arena_array(&a, float, (size_t)n *(size_t)k);
            qmatrix want, got;
            assert_ok(qmatrix_alloc(&want, &a, &o.precision, n, k));
            assert_ok(qmatrix_alloc(&got, &a, &o.precision, n, k));
            for (int32_t e = 0; e < s.shape.count; e++) {
                for (int32_t r = 0; r < n; r++) weight_source_row(&s, e, r, w + (int64_t)r * k);
                assert_ok(ref_quantize_weight(&want, w));
                weight_source_qmatrix(&t, e, &got);
                assert_memory_equal(got.code, want.code, (size_t)n * (size_t)k / 2);
                assert_memory_equal(got.scale, want.scale, (size_t)n * (size_t)k / 32);
            }
        }
    static float x[24 * 128], y[24 * 128];
    logits_of(packed, "auto", x);
    logits_of(packed, "W16", y);
    assert_memory_equal(x, y, sizeof x);
    /* Experts in matrices of their own, or none, are not stored so. */
    static const char *const others[] = {"tests/vectors/models/mixtral",
                                         "tests/vectors/models/mixtral_fused",
                                         "tests/vectors/models/llama"};
    for (int32_t i = 0; i < COUNT_OF(others); i++) {
        o.model = others[i];
        assert_status(quantise_checkpoint(&o), ST_UNSUPPORTED);
        assert_non_null(strstr(fail_message(), "is no gpt-oss"));
    }
    checkpoint_close(from.k);
    checkpoint_close(to.k);
    arena_close(&a);
}

/* --- Refusals --------------------------------------------------------------------------------- */

/* The checkpoint in `packed` with a tensor changed and its config by replacing `old`. */
typedef struct {
    const char *drop; /* tensors holding this go */
    const char *name; /* this one becomes ... */
    dtype type;       /* ... of this type and shape, with this data */
    int64_t dim[2];
    const void *data;
    const char *old, *now; /* in config.json */
} change;

static status reopen(const change *h) {
    static const uint8_t zeros[1 << 18];
    char path[128], *text_of;
    size_t size;
    safetensors *s;
    static tensor_view list[256];
    assert_ok(safetensors_open(&s, packed));
    int32_t n = 0;
    if (h->name) {
        list[n] = (tensor_view){.name = h->name,
                                .type = h->type,
                                .n_dims = h->dim[1] ? 2 : 1,
                                .dim = {h->dim[0], h->dim[1]},
                                .data = h->data ? h->data : zeros};
        list[n].bytes = dtype_bytes(h->type, h->dim[0] * (h->dim[1] ? h->dim[1] : 1));
        n++;
    }
    for (int32_t bits = 64; bits >= 8; bits /= 2)
        for (int32_t i = 0; i < safetensors_count(s); i++) {
            const tensor_view *t = safetensors_at(s, i);
            if (dtype_bits(t->type) != bits || (h->drop && strstr(t->name, h->drop))) continue;
            if (!h->name || strcmp(t->name, h->name) != 0) list[n++] = *t;
        }
    if (h->name && dtype_bits(h->type) < 64) { /* by element size: ours is first of its kind */
        const tensor_view mine = list[0];
        int32_t at = 0;
        while (at + 1 < n && dtype_bits(list[at + 1].type) > dtype_bits(mine.type)) {
            list[at] = list[at + 1];
            at++;
        }
        list[at] = mine;
    }
    char dir[80];
    path_join(dir, sizeof dir, packed, "changed");
    assert_ok(file_make_dirs(dir));
    snprintf(path, sizeof path, "%s/model.safetensors", dir);
    assert_ok(safetensors_write(path, list, n));
    safetensors_close(s);
    snprintf(path, sizeof path, "%s/config.json", packed);
    assert_ok(file_read(&text_of, &size, path));
    text t = {0};
    const char *at = h->old ? strstr(text_of, h->old) : NULL;
    if (h->old && !at) fail_msg("config.json has no %s", h->old);
    if (at)
        text_add(&t, "%.*s%s%s", (int)(at - text_of), text_of, h->now, at + strlen(h->old));
    else
        text_add(&t, "%s", text_of);
    snprintf(path, sizeof path, "%s/config.json", dir);
    assert_ok(file_write(path, t.data, t.length));
    text_free(&t);
    mem_free(text_of);
    model_config c;
    checkpoint *k = NULL;
    assert_ok(model_config_load(&c, dir));
    status st = checkpoint_open(&k, &c, dir, 0);
    precision p = {0};
    if (st == ST_OK) st = checkpoint_precision(k, &p);
    for (int32_t i = 0; st == ST_OK && i < COUNT_OF(linears); i++) {
        weight_source s2;
        assert_ok(checkpoint_source(k, linears[i], 0, &s2));
        st = weight_source_accepts(&s2, &p);
    }
    checkpoint_close(k);
    return st;
}

static void refuse(const change *h, status want, const char *says) {
    const status st = reopen(h);
    if (st != want || (st != ST_OK && !strstr(fail_message(), says)))
        fail_msg("expected '%s' with '%s', got '%s': %s", status_text(want), says, status_text(st),
                 fail_message());
}

#define UP "model.layers.0.mlp.up_proj"

static void test_refusals_gptq(void **state) {
    (void)state;
    round_trip(&(layout_case){SAVE_GPTQ, "W4g64", false, true});
    refuse(&(change){0}, ST_OK, "");
    refuse(&(change){.old = "\"gptq\",\n    \"lm", .now = "\"marlin\",\n    \"lm"}, ST_UNSUPPORTED,
           "'marlin'");
    refuse(&(change){.old = "\"bits\": 4", .now = "\"bits\": 3"}, ST_UNSUPPORTED, "3 bits");
    refuse(&(change){.old = "\"bits\": 4", .now = "\"bits\": 8"}, ST_FORMAT, "says 8 bits");
    refuse(&(change){.old = "\"group_size\": 64", .now = "\"group_size\": 128"}, ST_FORMAT,
           "groups of 64");
    refuse(&(change){.old = "\"sym\": false", .now = "\"sym\": true"}, ST_FORMAT,
           "quantization_config says symmetric");
    refuse(&(change){.old = "\"quant_method\": \"gptq\"", .now = "\"quant_method\": \"hqq\""},
           ST_UNSUPPORTED, "'hqq'");
    refuse(&(change){.old = "quantization_config", .now = "quantized_how"}, ST_FORMAT,
           "no quantization_config");
    refuse(&(change){.drop = UP ".scales"}, ST_NOTFOUND, "'" UP ".scales' is missing");
    refuse(&(change){.drop = UP ".qzeros"}, ST_NOTFOUND, "'" UP ".qzeros' is missing");
    refuse(&(change){.drop = UP ".q"}, ST_NOTFOUND, "'" UP ".weight' is missing");
    refuse(&(change){.name = UP ".scales", .type = DT_I16, .dim = {4, 384}}, ST_UNSUPPORTED,
           "elements of i16");
    refuse(&(change){.name = UP ".scales", .type = DT_F16, .dim = {384, 4}}, ST_SHAPE,
           "'" UP ".scales'");
    refuse(&(change){.name = UP ".qzeros", .type = DT_I32, .dim = {4, 47}}, ST_SHAPE,
           "[4, 47], its layout makes it [4, 48]");
    refuse(&(change){.name = UP ".qweight", .type = DT_I32, .dim = {24, 384}}, ST_SHAPE,
           "neither AWQ nor GPTQ");
    static int32_t index[256];
    for (int32_t i = 0; i < 256; i++) index[i] = i / 64;
    index[17] = 4;
    const change range = {.name = UP ".g_idx", .type = DT_I32, .dim = {256}, .data = index};
    refuse(&range, ST_RANGE, "input 17 is in group 4 of 4");
    index[17] = -2;
    refuse(&range, ST_RANGE, "group -2");
    index[17] = 3;
    refuse(&range, ST_UNSUPPORTED, "groups of different sizes");
    for (int32_t i = 0; i < 256; i++) index[i] = i / 64;
    refuse(&range, ST_UNSUPPORTED, "different g_idx"); /* gate has another */
    refuse(&(change){.name = "model.layers.0.mlp.bias.absmax", .type = DT_F32, .dim = {4}},
           ST_UNSUPPORTED, "absmax");
    refuse(&(change){.name = UP ".weight", .type = DT_BF16, .dim = {384, 256}}, ST_FORMAT,
           "in another layout");
}

static void test_refusals_others(void **state) {
    (void)state;
    round_trip(&(layout_case){SAVE_AWQ, "W4", false, false});
    refuse(&(change){.old = "\"gemm\"", .now = "\"gemv\""}, ST_UNSUPPORTED, "'gemv'");
    refuse(&(change){.old = "\"awq\"", .now = "\"fp8\""}, ST_FORMAT, "quant_method is 'fp8'");
    refuse(&(change){.name = UP ".scales", .type = DT_F16, .dim = {3, 384}}, ST_SHAPE,
           "its layout makes it [3, 48]"); /* the last of 3 groups would have no zero points */
    static uint16_t bad[2 * 384];
    for (int32_t i = 0; i < 2 * 384; i++) bad[i] = 0x3c00;
    bad[385] = 0x7e00;
    refuse(&(change){.name = UP ".scales", .type = DT_F16, .dim = {2, 384}, .data = bad}, ST_FORMAT,
           "scale of row 1, group 1 is nan");
    bad[385] = 0xbc00;
    refuse(&(change){.name = UP ".scales", .type = DT_F16, .dim = {2, 384}, .data = bad}, ST_FORMAT,
           "is -1");
    bad[385] = 0x5800;
    refuse(&(change){.name = UP ".scales", .type = DT_F16, .dim = {2, 384}, .data = bad},
           ST_UNSUPPORTED, "is 128; of 4 bits");
    static uint32_t large[2 * 384]; /* f32: the last below what rounds to 128, and the first */
    for (int32_t i = 0; i < 2 * 384; i++) large[i] = 0x3f800000;
    for (uint32_t i = 0; i < 2; i++) {
        large[385] = 0x42ffefff + i;
        refuse(&(change){.name = UP ".scales", .type = DT_F32, .dim = {2, 384}, .data = large},
               i ? ST_UNSUPPORTED : ST_OK, "is 127.969; of 4 bits");
    }
    round_trip(&(layout_case){SAVE_COMPRESSED, "W4g64", false, false});
    refuse(&(change){.old = "\"pack-quantized\"", .now = "\"marlin-24\""}, ST_UNSUPPORTED,
           "marlin-24");
    refuse(&(change){.old = "\"num_bits\": 4", .now = "\"num_bits\": 8"}, ST_FORMAT, "says 8 bits");
    refuse(&(change){.old = "\"symmetric\": false", .now = "\"symmetric\": true"}, ST_FORMAT,
           "with zero points");
    refuse(&(change){.drop = UP ".weight_zero_point"}, ST_FORMAT, "quantization_config");
    refuse(&(change){.drop = UP ".weight_scale"}, ST_NOTFOUND, ".weight_scale' is missing");
    static const int64_t shape[2] = {256, 384};
    refuse(&(change){.name = UP ".weight_shape", .type = DT_I64, .dim = {2}, .data = shape},
           ST_SHAPE, "says [256, 384]");
    refuse(&(change){.name = UP ".weight_packed", .type = DT_U8, .dim = {384, 128}}, ST_UNSUPPORTED,
           "elements of f16");
    round_trip(&(layout_case){SAVE_FP8, "WFP8b", false, false});
    refuse(&(change){.old = "\"e4m3\"", .now = "\"e5m2\""}, ST_UNSUPPORTED, "e5m2");
    refuse(&(change){.name = UP ".weight_scale_inv", .type = DT_F32, .dim = {2, 2}}, ST_SHAPE,
           "[2, 2]");
    refuse(&(change){.drop = UP ".weight_scale_inv"}, ST_NOTFOUND, "weight_scale' is missing");
    round_trip(&(layout_case){SAVE_MODELOPT, "WNVFP4", false, false});
    static const float global = 0.5f;
    refuse(&(change){.name = UP ".weight_scale_2", .type = DT_F32, .dim = {1}, .data = &global},
           ST_UNSUPPORTED, "different global scales");
    refuse(&(change){.old = "\"NVFP4\"", .now = "\"W4A16_AWQ\""}, ST_UNSUPPORTED, "w4a16_awq");
    /* The rule for other formats than the stored one. */
    opened o = open_folder(packed);
    weight_source s;
    precision p;
    assert_ok(checkpoint_source(o.k, WEIGHT_down, 0, &s));
    assert_ok(precision_parse(&p, "W4A16KV8"));
    assert_status(weight_source_accepts(&s, &p), ST_UNSUPPORTED);
    assert_non_null(strstr(fail_message(), "is stored as WNVFP4"));
    assert_ok(checkpoint_parse_precision(o.k, &p, "autoA16KV8"));
    char name[PRECISION_NAME_MAX];
    assert_string_equal(precision_name(&p, name), "WNVFP4A16KV8");
    assert_status(checkpoint_parse_precision(o.k, &p, "autoA17"), ST_FORMAT);
    checkpoint_close(o.k);
}

/* Truncated and flipped files: an answer or a refusal, no wrong access (the sanitizer looks). */
static void test_broken_files(void **state) {
    (void)state;
    static const layout_case some[] = {{SAVE_GPTQ, "W4g64", false, true},
                                       {SAVE_COMPRESSED, "W4g32", false, false},
                                       {SAVE_MODELOPT, "WNVFP4", false, false}};
    rng r;
    rng_seed(&r, 11, 0);
    for (int32_t i = 0; i < COUNT_OF(some); i++) {
        char path[128], *data;
        size_t n;
        round_trip(&some[i]);
        snprintf(path, sizeof path, "%s/model.safetensors", packed);
        assert_ok(file_read(&data, &n, path));
        uint64_t header = 0;
        memcpy(&header, data, 8);
        for (int32_t j = 0; j < 60; j++) {
            const bool cut = j % 4 == 0;
            const size_t at = rng_below(&r, j % 2 ? header + 8 : n);
            const char was = data[at];
            if (!cut) data[at] = (char)(was ^ (1 << rng_below(&r, 8)));
            assert_ok(file_write(path, data, cut ? at : n));
            data[at] = was;
            model_config c;
            checkpoint *k = NULL;
            assert_ok(model_config_load(&c, packed));
            if (checkpoint_open(&k, &c, packed, 0) != ST_OK) continue;
            static float row[384];
            weight_source s;
            for (int32_t f = 0; f < COUNT_OF(linears); f++) {
                assert_ok(checkpoint_source(k, linears[f], 1, &s));
                weight_source_row(&s, 0, s.shape.n - 1, row);
            }
            checkpoint_close(k);
        }
        mem_free(data);
    }
}

static void test_no_memory(void **state) {
    (void)state;
    round_trip(&(layout_case){SAVE_GPTQ, "W4g64", false, true});
    model_config c;
    assert_ok(model_config_load(&c, packed));
    status st = ST_NOMEM;
    int64_t n = 0;
    while (st != ST_OK) {
        checkpoint *k = NULL;
        mem_fail_at(++n);
        st = checkpoint_open(&k, &c, packed, 0);
        mem_fail_at(0);
        if (st != ST_OK) assert_int_equal(st, ST_NOMEM);
        checkpoint_close(k);
    }
    assert_true(n > 40);
    precision p;
    assert_ok(precision_parse(&p, "W4"));
    for (n = 1, st = ST_NOMEM; st != ST_OK; n++) {
        save *s = NULL;
        mem_fail_at(n);
        st = save_open(&s, plain, SAVE_AWQ, &p);
        mem_fail_at(0);
        if (st != ST_OK) assert_int_equal(st, ST_NOMEM);
        save_close(s);
    }
}

/* A part of a fused matrix may have fewer outputs than fill the words of AWQ and GPTQ, though the
 * whole has a multiple of 16: it is refused, and 8 more are not. */
static void test_words_are_filled(void **state) {
    (void)state;
    enum { N = 16, K = 128 };
    static const struct {
        save_layout layout;
        const char *format;
    } layout[] = {{SAVE_AWQ, "W4"}, {SAVE_GPTQ, "W4"}, {SAVE_GPTQ_V2, "W8"}};
    static float w[N * K];
    static const uint16_t stored[N * K];
    arena a;
    assert_ok(arena_open(&a, 1 << 22));
    for (int32_t i = 0; i < N * K; i++) w[i] = (float)(i % 97) - 48;
    for (int32_t i = 0; i < COUNT_OF(layout); i++)
        for (int32_t n = 8; n <= N; n += 2) {
            char path[512];
            const tensor_view t = {.name = "x.weight",
                                   .type = DT_F16,
                                   .n_dims = 2,
                                   .dim = {n, K},
                                   .data = stored,
                                   .bytes = n * K * 2};
            precision p;
            qmatrix q;
            save *s;
            assert_ok(file_make_dirs(path_join(path, sizeof path, folder, "words")));
            assert_ok(safetensors_write(
                path_join(path, sizeof path, folder, "words/model.safetensors"), &t, 1));
            path_join(path, sizeof path, folder, "words");
            assert_ok(precision_parse(&p, layout[i].format));
            assert_ok(qmatrix_alloc(&q, &a, &p, N, K));
            assert_ok(ref_quantize_weight(&q, w));
            const qmatrix rows = qmatrix_rows(&q, 0, n);
            assert_ok(save_open(&s, path, layout[i].layout, &p));
            const int32_t per = layout[i].format[1] == '4' ? 8 : 4;
            assert_status(save_matrix(s, "x.weight", &rows, NULL), n % per ? ST_SHAPE : ST_OK);
            save_close(s);
            arena_reset(&a, 0);
        }
    arena_close(&a);
}

/* --- Quantisers ------------------------------------------------------------------------------- */

/* e H e^T over all rows. */
static double output_error(const qmatrix *q, const float *w, const double *h) {
    const int32_t k = q->k;
    float *e = mem_alloc((size_t)k, sizeof *e);
    double sum = 0;
    for (int32_t r = 0; r < q->n; r++) {
        ref_dequantize_weight(e, q, r, 1);
        for (int32_t i = 0; i < k; i++) e[i] -= w[(int64_t)r * k + i];
        for (int32_t i = 0; i < k; i++)
            for (int32_t j = 0; j < k; j++)
                sum += h[(int64_t)i * k + j] * (double)e[i] * (double)e[j];
    }
    mem_free(e);
    return sum;
}

enum { QN = 32, QK = 128 };

typedef struct {
    float w[QN * QK], copy[QN * QK];
    double h[QK * QK], magnitude[QK];
    moments x;
    arena a;
} problem;

/* Inputs that go together (rank 24 and noise), a few of them large. */
static problem *make_problem(void) {
    problem *p = mem_alloc(1, sizeof *p);
    rng r;
    rng_seed(&r, 3, 0);
    static double mix[24][QK];
    for (int32_t i = 0; i < 24 * QK; i++) mix[i / QK][i % QK] = rng_normal(&r);
    for (int32_t t = 0; t < 512; t++) {
        double x[QK], z[24];
        for (int32_t i = 0; i < 24; i++) z[i] = rng_normal(&r);
        for (int32_t i = 0; i < QK; i++) {
            x[i] = 0.3 * rng_normal(&r);
            for (int32_t j = 0; j < 24; j++) x[i] += 0.2 * z[j] * mix[j][i];
            if (i % 19 == 0) x[i] *= 12;
            p->magnitude[i] += fabs(x[i]);
        }
        for (int32_t i = 0; i < QK; i++)
            for (int32_t j = 0; j < QK; j++) p->h[i * QK + j] += x[i] * x[j];
    }
    for (int32_t i = 0; i < QN * QK; i++) p->w[i] = (float)rng_normal(&r);
    memcpy(p->copy, p->w, sizeof p->w);
    p->x = (moments){.k = QK, .rows = 512, .gram = p->h, .magnitude = p->magnitude};
    assert_ok(arena_open(&p->a, 1 << 20));
    return p;
}

static void test_gptq(void **state) {
    (void)state;
    static const char *const formats[] = {"W4g32", "W4sym", "W8", "WFP8", "WMXFP4"};
    for (int32_t f = 0; f < COUNT_OF(formats); f++) {
        problem *p = make_problem();
        precision format;
        qmatrix q;
        assert_ok(precision_parse(&format, formats[f]));
        assert_ok(qmatrix_alloc(&q, &p->a, &format, QN, QK));
        assert_ok(ref_quantize_weight(&q, p->w));
        const double rtn = output_error(&q, p->w, p->h);
        for (int32_t order = 0; order < 2; order++) {
            memcpy(p->copy, p->w, sizeof p->w);
            assert_ok(quantise_gptq(&ref_calibrate, &q, p->copy, p->h, 0.01, order));
            const double gptq = output_error(&q, p->w, p->h);
            print_message("  %s order %d: %.3f of rounding's error\n", formats[f], order,
                          gptq / rtn);
            assert_at_most(gptq, 0.7 * rtn);
        }
        /* Uncorrelated inputs of one size: nothing to be gained, nothing changed. */
        memset(p->h, 0, sizeof p->h);
        for (int32_t i = 0; i < QK; i++) p->h[i * QK + i] = 1;
        assert_ok(ref_quantize_weight(&q, p->w));
        const double plain_error = output_error(&q, p->w, p->h);
        memcpy(p->copy, p->w, sizeof p->w);
        assert_ok(quantise_gptq(&ref_calibrate, &q, p->copy, p->h, 0.01, true));
        assert_close(output_error(&q, p->w, p->h), plain_error, 1e-12 * plain_error);
        p->h[5] = p->h[5 * QK] = 2; /* no matrix of moments */
        assert_status(quantise_gptq(&ref_calibrate, &q, p->copy, p->h, 0.0, true), ST_RANGE);
        arena_close(&p->a);
        mem_free(p);
    }
}

static void test_awq(void **state) {
    (void)state;
    problem *p = make_problem();
    precision format;
    qmatrix q;
    assert_ok(precision_parse(&format, "W4g32"));
    assert_ok(qmatrix_alloc(&q, &p->a, &format, QN, QK));
    assert_ok(ref_quantize_weight(&q, p->w));
    const double rtn = output_error(&q, p->w, p->h);
    float s[QK];
    assert_ok(quantise_awq_scales(&ref_calibrate, s, p->w, QN, QK, &format, &p->x, NULL));
    assert_true(s[0] > s[1] && s[19] > s[20]); /* the large inputs are protected */
    static double scaled_h[QK * QK];
    for (int32_t i = 0; i < QN * QK; i++) p->copy[i] = p->w[i] * s[i % QK];
    for (int32_t i = 0; i < QK * QK; i++)
        scaled_h[i] = p->h[i] / ((double)s[i / QK] * (double)s[i % QK]);
    assert_ok(ref_quantize_weight(&q, p->copy));
    const double scales = output_error(&q, p->copy, scaled_h);
    static float clipped[QN * QK];
    assert_ok(quantise_clip(&ref_calibrate, clipped, p->copy, QN, QK, &format, scaled_h));
    assert_ok(ref_quantize_weight(&q, clipped));
    const double both = output_error(&q, p->copy, scaled_h);
    print_message("  scales %.3f, with clipping %.3f of rounding's error\n", scales / rtn,
                  both / rtn);
    assert_at_most(scales, 0.8 * rtn);
    assert_at_most(both, scales);
    /* Tied inputs share a scale. */
    int32_t tie[QK];
    for (int32_t i = 0; i < QK; i++) tie[i] = i % 64;
    assert_ok(quantise_awq_scales(&ref_calibrate, s, p->w, QN, QK, &format, &p->x, tie));
    for (int32_t i = 0; i < 64; i++) assert_true(s[i] == s[i + 64]);
    arena_close(&p->a);
    mem_free(p);
}

/* The moments that an engine's linears see, against products of read-back inputs: norm output of
 * the first layer is what qkv is fed. All methods write checkpoints that load as their format. */
static void test_quantise_checkpoint(void **state) {
    (void)state;
    int32_t token[160];
    for (int32_t i = 0; i < 160; i++) token[i] = (i * 37 + i / 7) % 64;
    quantise_options o = QUANTISE_OPTIONS_DEFAULT;
    static float exact[24 * 64], got[24 * 64];
    double error[QUANTISE_COUNT];
    logits_of(plain, "W16", exact);
    o.model = plain;
    o.out = packed;
    o.token = token;
    o.n_tokens = 160;
    o.window = 64;
    o.threads = 2;
    o.memory_bytes = 1; /* a layer at a time */
    assert_ok(precision_parse(&o.precision, "W4"));
    for (int32_t m = 0; m < QUANTISE_COUNT; m++) {
        o.method = (quantise_method)m;
        assert_ok(quantise_checkpoint(&o));
        logits_of(packed, "auto", got);
        error[m] = relative_error(got, exact, 24 * 64);
        print_message("  %s: relative error of the logits %.4f\n", quantise_method_text(o.method),
                      error[m]);
    }
    assert_at_most(error[QUANTISE_GPTQ], 0.9 * error[QUANTISE_RTN]);
    assert_at_most(error[QUANTISE_AWQ], error[QUANTISE_RTN]);
    o.model = packed;
    o.out = folder;
    assert_status(quantise_checkpoint(&o), ST_UNSUPPORTED);
    assert_non_null(strstr(fail_message(), "quantised already"));
    o.model = plain;
    o.out = plain; /* before the source is touched */
    assert_status(quantise_checkpoint(&o), ST_USAGE);
    assert_non_null(strstr(fail_message(), "is the source itself"));
    logits_of(plain, "W16", got);
    assert_memory_equal(got, exact, sizeof exact);
    o.out = packed;
    o.method = QUANTISE_AWQ;
    assert_ok(precision_parse(&o.precision, "WFP8"));
    assert_status(quantise_checkpoint(&o), ST_UNSUPPORTED);
    o.method = QUANTISE_GPTQ;
    assert_ok(quantise_checkpoint(&o));
    o.layout = SAVE_AWQ;
    assert_status(quantise_checkpoint(&o), ST_UNSUPPORTED);
    o.layout = SAVE_COMPRESSED;
    o.out = "/proc/none"; /* refused before the text is run, which n_tokens would be */
    o.n_tokens = 1;
    assert_status(quantise_checkpoint(&o), ST_IO);
    o.out = packed;
    assert_status(quantise_checkpoint(&o), ST_RANGE);
    /* A model of experts: each has moments of its own. */
    o.model = "tests/vectors/models/qwen3_moe";
    o.n_tokens = 160;
    assert_ok(precision_parse(&o.precision, "W4g32"));
    for (int32_t m = 0; m < QUANTISE_COUNT; m++) {
        o.method = (quantise_method)m;
        assert_ok(quantise_checkpoint(&o));
        opened q = open_folder(packed);
        precision p = {0};
        assert_ok(checkpoint_precision(q.k, &p));
        assert_int_equal(p.group, 32);
        checkpoint_close(q.k);
    }
}

/* An engine agrees with itself wholly, and with a coarser one less. */
static void test_agreement(void **state) {
    (void)state;
    static const char *const formats[] = {"W16", "W8", "W4gK"};
    int32_t token[120];
    for (int32_t i = 0; i < 120; i++) token[i] = (i * 41 + i / 5) % 64;
    engine_options o = ENGINE_OPTIONS_DEFAULT;
    engine *reference, *e;
    o.model = plain;
    o.device_options.threads = 1;
    o.ctx_max = o.policy.token_budget = o.max_samples = 64;
    o.policy.max_seqs = 1;
    assert_ok(engine_open(&reference, &o, NULL, NULL));
    double before = -1;
    for (int32_t i = 0; i < COUNT_OF(formats); i++) {
        agreement_result r;
        perplexity_result p;
        o.precision = formats[i];
        assert_ok(engine_open(&e, &o, NULL, NULL));
        assert_ok(evaluate_agreement(e, reference, token, 120, 48, 16, &r));
        assert_ok(evaluate_perplexity(e, token, 120, 48, 16, &p));
        assert_int_equal(r.n, p.n_scored);
        assert_close(r.perplexity, p.perplexity, 1e-9 * p.perplexity);
        assert_more(r.kl_nats, before); /* from nothing to more */
        if (i == 0) assert_true(r.agreement == 1 && r.kl_nats == 0 && r.kl_nats_max == 0);
        if (i > 0) assert_true(r.agreement >= 0 && r.agreement <= 1 && r.kl_nats_max >= r.kl_nats);
        before = r.kl_nats;
        engine_close(e);
    }
    engine_close(reference);
}

/* Weights that are no numbers are said, not scored. */
static void test_broken_weights(void **state) {
    (void)state;
    static const char *const names[] = {"config.json", "model.safetensors"};
    for (int32_t broken = 0; broken < 2; broken++) {
        for (int32_t i = 0; i < 2; i++) {
            char from[128], to[128], *data;
            size_t n;
            snprintf(from, sizeof from, "%s/%s", plain, names[i]);
            snprintf(to, sizeof to, "%s/%s", packed, names[i]);
            assert_ok(file_read(&data, &n, from));
            const size_t header = 8 + (size_t)(uint8_t)data[0] + 256 * (size_t)(uint8_t)data[1] +
                                  65536 * (size_t)(uint8_t)data[2];
            if (i == 1 && broken) memset(data + header, 0xFF, n - header); /* NaN in any type */
            assert_ok(file_write(to, data, n));
            mem_free(data);
        }
        engine_options o = ENGINE_OPTIONS_DEFAULT;
        engine *e, *reference;
        perplexity_result p;
        agreement_result r;
        int32_t token[40];
        for (int32_t i = 0; i < 40; i++) token[i] = (i * 29 + i / 3) % 64;
        o.device_options.threads = 1;
        o.ctx_max = o.policy.token_budget = o.max_samples = 64;
        o.policy.max_seqs = 1;
        o.model = plain;
        assert_ok(engine_open(&reference, &o, NULL, NULL));
        o.model = packed;
        assert_ok(engine_open(&e, &o, NULL, NULL));
        const status want = broken ? ST_FORMAT : ST_OK;
        assert_status(evaluate_perplexity(e, token, 40, 32, 16, &p), want);
        assert_status(evaluate_agreement(e, reference, token, 40, 32, 16, &r), want);
        assert_status(evaluate_agreement(reference, e, token, 40, 32, 16, &r), want);
        engine_close(e);
        engine_close(reference);
    }
}

/* What is written scores the text as the evaluation does. */
static void test_logits_file(void **state) {
    (void)state;
    enum { N = 40 };
    int32_t token[N + 1];
    for (int32_t i = 0; i <= N; i++) token[i] = (i * 29 + i / 3) % 64;
    engine_options o = ENGINE_OPTIONS_DEFAULT;
    engine *e;
    safetensors *s;
    perplexity_result want;
    char path[128];
    o.model = plain;
    o.precision = "W4";
    o.device_options.threads = 1;
    o.ctx_max = o.policy.token_budget = o.max_samples = 64;
    o.policy.max_seqs = 1;
    snprintf(path, sizeof path, "%s/model.safetensors", packed);
    assert_ok(engine_open(&e, &o, NULL, NULL));
    assert_ok(evaluate_perplexity(e, token, N + 1, N + 1, N, &want));
    assert_ok(evaluate_logits(e, token, N, path));
    assert_status(evaluate_logits(e, token, 200, path), ST_RANGE);
    engine_close(e);
    assert_ok(safetensors_open(&s, path));
    const tensor_view *fed = safetensors_find(s, "input_ids"), *x = safetensors_find(s, "logits");
    assert_true(fed && x && x->type == DT_F32 && x->dim[0] == N && x->dim[1] == 64);
    assert_memory_equal(fed->data, token, N * sizeof *token);
    double nll[2] = {0, 0}; /* the text's, and as a twin that of a text one token ahead */
    for (int32_t i = 0; i < N; i++) {
        const float *row = (const float *)x->data + (int64_t)i * 64;
        double sum = 0;
        for (int32_t v = 0; v < 64; v++) sum += exp((double)row[v]);
        for (int32_t k = 0; k < 2; k++) nll[k] += log(sum) - (double)row[token[i + 1 - k]];
    }
    assert_close(nll[0] / N, want.nll, 1e-12 * want.nll);
    assert_more(fabs(nll[1] / N - want.nll), 1e-3 * want.nll);
    safetensors_close(s);
}

static int make_folders(void **state) {
    if (make_folder(state)) return -1;
    path_join(plain, sizeof plain, folder, "plain");
    path_join(packed, sizeof packed, folder, "packed");
    assert_ok(file_make_dirs(plain));
    assert_ok(file_make_dirs(packed));
    make_plain();
    return 0;
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_vectors),
        cmocka_unit_test(test_words_are_filled),
        cmocka_unit_test(test_round_trips),
        cmocka_unit_test(test_logits),
        cmocka_unit_test(test_gpt_oss),
        cmocka_unit_test(test_refusals_gptq),
        cmocka_unit_test(test_refusals_others),
        cmocka_unit_test(test_broken_files),
        cmocka_unit_test(test_no_memory),
        cmocka_unit_test(test_gptq),
        cmocka_unit_test(test_awq),
        cmocka_unit_test(test_quantise_checkpoint),
        cmocka_unit_test(test_agreement),
        cmocka_unit_test(test_broken_weights),
        cmocka_unit_test(test_logits_file),
    };
    return cmocka_run_group_tests(tests, make_folders, remove_folder);
}
