/* test_forward.c - the whole transformer on the cpu device: logits of every golden checkpoint,
 * however the tokens are cut into steps; the same bits in any company; quantised formats in their
 * order.
 *
 * Tolerance of the golden test: 1e-4 in relative Frobenius norm. tests/vectors/README.md gives the
 * distance of two float32 runs as 5e-5 of logits of standard deviation 3, that is 2e-5. Its twin
 * moves one element of one weight, once for each weight of the model, and must be caught every
 * time. */
#include "test.h"

#include "forward.h"
#include "golden.h"
#include "kernel.h"
#include "rng.h"
#include "safetensors.h"
#include <stdio.h>
#include <string.h>
#include <unistd.h>

enum { MAX_TOKENS = 256, MAX_SEQS = 8, PAGES = 64, STREAM_PAGES = 8 };

/* --- An engine of one model ------------------------------------------------------------------- */

typedef struct {
    arena a;
    device *d;
    device_ops ops; /* those of cpu, perhaps with another weight_load */
    checkpoint *k;
    forward *f;
    model_config c;
    precision p;
    sampled result[MAX_TOKENS];
} engine;

typedef status (*load_fn)(device *d, const weight_source *s, const precision *p, weight *out);

/* dir NULL: synthetic weights for e->c. */
static void engine_start(engine *e, const char *dir, const char *format, int32_t threads,
                         load_fn load) {
    const device_ops *ops;
    assert_ok(device_find(&ops, "cpu"));
    e->ops = *ops;
    if (load) e->ops.weight_load = load;
    const device_options options = {.tp = 1, .threads = threads};
    assert_ok(ops->open(&e->d, &options));
    e->d->ops = &e->ops;
    assert_ok(arena_open(&e->a, 16 << 20));
    assert_ok(precision_parse(&e->p, format));
    assert_ok(checkpoint_open(&e->k, &e->c, dir, 1));
    assert_ok(forward_load(&e->f, &e->a, e->d, e->k, &e->c, &e->p, NULL, NULL));
    checkpoint_close(e->k); /* a device keeps nothing of it */
    const device_setup s = {.config = &e->c,
                            .precision = &e->p,
                            .max_tokens = MAX_TOKENS,
                            .max_seqs = MAX_SEQS,
                            .max_samples = MAX_TOKENS,
                            .n_pages = PAGES};
    const forward_plan plan = forward_plan_default(e->d);
    assert_ok(forward_setup(e->f, &s, &plan));
}

static void engine_open_dir(engine *e, const char *dir, const char *format) {
    *e = (engine){0};
    assert_ok(model_config_load(&e->c, dir));
    engine_start(e, dir, format, 2, NULL);
}

static void engine_close(engine *e) {
    e->d->ops->close(e->d);
    arena_close(&e->a);
}

/* --- Streams of tokens, fed in chunks --------------------------------------------------------- */

typedef struct {
    const int32_t *token;
    int32_t n, at;              /* tokens in all, tokens fed */
    int32_t page[STREAM_PAGES]; /* of the device */
    float *logits;              /* [n, V]: of every token fed; NULL: not wanted */
    sampling *draw;             /* sample after the last token of each chunk instead, or NULL */
    int32_t drawn;              /* the token */
} stream;

typedef struct {
    int32_t token[MAX_TOKENS], position[MAX_TOKENS], seq_start[MAX_SEQS + 1], kv_len[MAX_SEQS];
    int32_t page_start[MAX_SEQS + 1], page[MAX_SEQS * STREAM_PAGES];
    int64_t id[MAX_SEQS];
    sample_row sample[MAX_TOKENS];
} batch_memory;

static void add_sequence(batch *b, batch_memory *m, stream *s, int32_t chunk) {
    const int32_t seq = b->n_seqs++;
    if (chunk == 1) b->n_decodes++;
    for (int32_t i = 0; i < chunk; i++) {
        const int32_t row = b->n_tokens + i, position = s->at + i;
        m->token[row] = s->token[position];
        m->position[row] = position;
        sample_row r = {.row = row, .seq = seq, .params = s->draw, .draw = (uint64_t)position};
        if (s->logits || (s->draw && i == chunk - 1)) m->sample[b->n_samples++] = r;
    }
    b->n_tokens += chunk;
    s->at += chunk;
    const int32_t n_pages = (int32_t)div_up(s->at, KV_PAGE_TOKENS);
    memcpy(m->page + m->page_start[seq], s->page, sizeof(int32_t) * (size_t)n_pages);
    m->id[seq] = seq;
    m->kv_len[seq] = s->at;
    m->seq_start[seq + 1] = b->n_tokens;
    m->page_start[seq + 1] = m->page_start[seq] + n_pages;
}

/* One step: chunk[i] more tokens of stream i (0 = none), single tokens first as batch.h wants
 * it. */
static void step(engine *e, stream *s, const int32_t *chunk, int32_t n_streams) {
    static batch_memory m;
    batch b = {.token = m.token,
               .position = m.position,
               .seq_start = m.seq_start,
               .kv_len = m.kv_len,
               .page_start = m.page_start,
               .page = m.page,
               .id = m.id,
               .sample = m.sample};
    stream *of[MAX_SEQS];
    int32_t at[MAX_SEQS];
    for (int pass = 0; pass < 2; pass++)
        for (int32_t i = 0; i < n_streams; i++)
            if (chunk[i] && (chunk[i] == 1) == (pass == 0)) {
                of[b.n_seqs] = &s[i];
                at[b.n_seqs] = s[i].at;
                add_sequence(&b, &m, &s[i], chunk[i]);
            }
    int64_t cost = -1;
    assert_ok(forward_step(e->f, &b, e->result, &cost));
    assert_int_equal(cost, 0);

    const int32_t vocab = e->c.vocab;
    float *all = mem_alloc((size_t)MAX_TOKENS * (size_t)vocab, sizeof(float));
    assert_non_null(all);
    assert_ok(forward_logits(e->f, all));
    for (int32_t i = 0; i < b.n_samples; i++) {
        const sample_row *r = &b.sample[i];
        stream *to = of[r->seq];
        if (to->logits)
            memcpy(to->logits + (int64_t)(at[r->seq] + r->row - b.seq_start[r->seq]) * vocab,
                   all + (int64_t)i * vocab, sizeof(float) * (size_t)vocab);
        if (to->draw)
            to->drawn = e->result[i].token;
        else
            assert_int_equal(e->result[i].token, -1);
    }
    mem_free(all);
}

/* Pages of stream i, scattered over the pool, disjoint from those of the others. */
static void give_pages(stream *s, int32_t n_streams, uint64_t seed) {
    int32_t page[PAGES];
    for (int32_t i = 0; i < PAGES; i++) page[i] = i;
    rng r;
    rng_seed(&r, seed, 0);
    rng_shuffle(&r, page, PAGES);
    for (int32_t i = 0; i < n_streams; i++)
        memcpy(s[i].page, page + i * STREAM_PAGES, sizeof s[i].page);
}

/* Logits of one stream in chunks of the given sizes, the last one repeated. */
static void run_chunks(engine *e, const int32_t *token, int32_t n, const int32_t *chunk,
                       int32_t n_chunks, float *logits) {
    stream s = {.token = token, .n = n, .logits = logits};
    give_pages(&s, 1, 7);
    for (int32_t i = 0; s.at < n; i++) {
        const int32_t c = chunk[i < n_chunks ? i : n_chunks - 1];
        const int32_t next = (int32_t)i64_min(c, n - s.at);
        step(e, &s, &next, 1);
    }
}

/* --- Golden logits ---------------------------------------------------------------------------- */

typedef struct {
    char dir[256];
    safetensors *file;
    int32_t n, vocab;
    int32_t *token;
    const float *logits;
    float *got; /* [n, V] */
} golden;

/* A model in folder `dir` whose golden data lies in folder `data`. */
static void golden_open_at(golden *g, const char *dir, const char *data) {
    char path[512];
    snprintf(g->dir, sizeof g->dir, "%s", dir);
    assert_ok(safetensors_open(&g->file, path_join(path, sizeof path, data, "golden.safetensors")));
    const tensor_view *ids = safetensors_find(g->file, "input_ids");
    const tensor_view *logits = safetensors_find(g->file, "logits");
    assert_non_null(ids);
    assert_non_null(logits);
    assert_int_equal(ids->type, DT_I32);
    assert_int_equal(logits->type, DT_F32);
    assert_int_equal(logits->dim[0], ids->dim[0]);
    g->n = (int32_t)ids->dim[0];
    g->vocab = (int32_t)logits->dim[1];
    g->token = mem_alloc((size_t)g->n, sizeof(int32_t));
    memcpy(g->token, ids->data, sizeof(int32_t) * (size_t)g->n);
    g->logits = logits->data;
    g->got = mem_alloc((size_t)g->n * (size_t)g->vocab, sizeof(float));
    assert_non_null(g->got);
}

static void golden_open(golden *g, const char *name) {
    char dir[256];
    path_join(dir, sizeof dir, GOLDENS, name);
    golden_open_at(g, dir, dir);
}

static void golden_close(golden *g) {
    mem_free(g->token);
    mem_free(g->got);
    safetensors_close(g->file);
}

static double golden_error(const golden *g) {
    return relative_error(g->got, g->logits, (int64_t)g->n * g->vocab);
}

static void for_each_golden(void (*test)(const char *name)) {
    for (int32_t i = 0; i < COUNT_OF(golden_names); i++) test(golden_names[i]);
}

static const double golden_tolerance = 1e-4;
static const int32_t whole[] = {MAX_TOKENS};

static void compare_whole(engine *e, golden *g) {
    memset(g->got, 0xff, sizeof(float) * (size_t)g->n * (size_t)g->vocab);
    run_chunks(e, g->token, g->n, whole, 1, g->got);
}

/* Three sequences in ragged steps: the golden one twice, out of phase, and one of other tokens. */
static void compare_ragged(engine *e, golden *g, const float *want) {
    int32_t other[64];
    for (int32_t i = 0; i < COUNT_OF(other); i++) other[i] = (i * 37 + 11) % g->vocab;
    const size_t size = sizeof(float) * (size_t)g->n * (size_t)g->vocab;
    float *second = mem_alloc(1, size);
    stream s[3] = {{.token = g->token, .n = g->n, .logits = g->got},
                   {.token = other, .n = COUNT_OF(other)},
                   {.token = g->token, .n = g->n, .logits = second}};
    memset(g->got, 0xff, size);
    memset(second, 0xff, size);
    give_pages(s, 3, 99);
    rng r;
    rng_seed(&r, 5, 0);
    while (s[0].at < g->n || s[1].at < s[1].n || s[2].at < g->n) {
        int32_t chunk[3], sum = 0;
        for (int32_t i = 0; i < 3; i++) {
            const int64_t wish = rng_below(&r, 3) ? rng_range(&r, 0, 1) : rng_range(&r, 0, 23);
            chunk[i] = (int32_t)i64_min(wish, s[i].n - s[i].at);
            sum += chunk[i];
        }
        if (sum) step(e, s, chunk, 3);
    }
    assert_memory_equal(g->got, want, size);
    assert_memory_equal(second, want, size);
    mem_free(second);
}

static void golden_compare(golden *g, const char *name) {
    engine *e = mem_alloc(1, sizeof *e);
    engine_open_dir(e, g->dir, "W16A16KV16");
    assert_int_equal(e->c.vocab, g->vocab);

    compare_whole(e, g);
    print_message("  %-20s relative error %.2e\n", name, golden_error(g));
    assert_at_most(golden_error(g), golden_tolerance);

    /* Steps are a matter of scheduling: the same bits however they are cut, in any company. */
    const size_t size = sizeof(float) * (size_t)g->n * (size_t)g->vocab;
    float *want = mem_alloc(1, size);
    memcpy(want, g->got, size);
    memset(g->got, 0xff, size);
    const int32_t odd[] = {7, 13, 1, 1, 31, 3, 11, 1};
    run_chunks(e, g->token, g->n, odd, COUNT_OF(odd), g->got);
    assert_memory_equal(g->got, want, size);
    compare_ragged(e, g, want);
    assert_at_most(golden_error(g), golden_tolerance);
    double norm = 0; /* twin: one logit off by twice what the whole may be */
    for (int64_t i = 0; i < (int64_t)g->n * g->vocab; i++)
        norm += (double)g->logits[i] * (double)g->logits[i];
    g->got[(int64_t)g->n * g->vocab / 2] += (float)(2 * golden_tolerance * sqrt(norm));
    assert_more(golden_error(g), golden_tolerance);

    mem_free(want);
    engine_close(e);
    mem_free(e);
    golden_close(g);
}

static void golden_model(const char *name) {
    golden g;
    golden_open(&g, name);
    golden_compare(&g, name);
}

/* The checkpoint that ships, against transformers in float32. */
static void test_golden_tiny(void **state) {
    (void)state;
    golden g;
    golden_open_at(&g, "workloads/tiny", "tests/vectors/tiny");
    golden_compare(&g, "tiny");
}

static void test_golden(void **state) {
    (void)state;
    for_each_golden(golden_model);
}

/* The transformers 4 spelling of the same model: the same bits. */
static void golden_v4(const char *name) {
    golden g;
    engine *e = mem_alloc(1, sizeof *e);
    golden_open(&g, name);
    char path[512], *json;
    size_t n;
    assert_ok(file_read(&json, &n, path_join(path, sizeof path, g.dir, "config_v4.json")));
    assert_ok(model_config_parse(&e->c, json, n, path));
    mem_free(json);
    engine_start(e, g.dir, "W16", 1, NULL);
    compare_whole(e, &g);
    assert_at_most(golden_error(&g), golden_tolerance);
    engine_close(e);
    mem_free(e);
    golden_close(&g);
}

static void test_golden_v4(void **state) {
    (void)state;
    for_each_golden(golden_v4);
}

/* The fused layouts of the experts are the same model as the split ones: the same bits. */
static void same_logits(const char *a, const char *b) {
    golden g[2];
    const char *name[2] = {a, b};
    for (int i = 0; i < 2; i++) {
        engine *e = mem_alloc(1, sizeof *e);
        golden_open(&g[i], name[i]);
        engine_open_dir(e, g[i].dir, "W16");
        compare_whole(e, &g[i]);
        engine_close(e);
        mem_free(e);
    }
    assert_int_equal(g[0].n * g[0].vocab, g[1].n * g[1].vocab);
    assert_memory_equal(g[0].got, g[1].got, sizeof(float) * (size_t)g[0].n * (size_t)g[0].vocab);
    golden_close(&g[0]);
    golden_close(&g[1]);
}

static void test_layouts(void **state) {
    (void)state;
    same_logits("qwen3_moe", "qwen3_moe_fused");
    same_logits("mixtral", "mixtral_fused");
}

/* --- Twins: one element of one weight --------------------------------------------------------- */

static struct {
    int32_t at;   /* which of the loads, values and biases counted apart, is disturbed */
    int32_t seen; /* so many were there */
    int32_t token;
    char name[160];
} twin;

/* Load the weight from a copy in which one element in the middle is 1 larger: of its values when
 * twin.at counts so, then of its bias. */
static status load_disturbed(device *d, const weight_source *s, const precision *p, weight *out) {
    const device_ops *cpu;
    TRY(device_find(&cpu, "cpu"));
    const bool value = twin.seen++ == twin.at, bias = s->shape.has_bias && twin.seen++ == twin.at;
    if (!value && !bias) return cpu->weight_load(d, s, p, out);
    const int32_t n = s->shape.n, k = s->shape.k, count = s->shape.count;
    snprintf(twin.name, sizeof twin.name, "%s%s", s->name, bias ? " (bias)" : "");

    weight_source copy = *s;
    const int32_t cols = bias ? 1 : k;
    float *data = mem_alloc((size_t)count * (size_t)n * (size_t)cols, sizeof(float));
    matrix_part *part = mem_alloc((size_t)count, sizeof *part);
    for (int32_t j = 0; j < count; j++) {
        float *matrix = data + (int64_t)j * n * cols;
        if (bias) weight_source_bias(s, j, matrix);
        for (int32_t i = 0; i < n && !bias; i++)
            weight_source_row(s, j, i, matrix + (int64_t)i * k);
        part[j] = (matrix_part){.data = matrix,
                                .type = DT_F32,
                                .index = j,
                                .rows = n,
                                .row_stride = cols,
                                .col_stride = 1};
    }
    const bool table = strstr(s->name, "embed") || strstr(s->name, "tok_embeddings");
    const int32_t row = table ? twin.token : n / 2;
    data[((int64_t)(count - 1) * n + row) * cols + cols / 2] += 1;
    if (bias) {
        copy.bias_part = part;
        copy.n_bias_parts = count;
    } else {
        copy.part = part;
        copy.n_parts = count;
    }
    const status st = cpu->weight_load(d, &copy, p, out);
    mem_free(part);
    mem_free(data);
    return st;
}

static void golden_twins(const char *name) {
    golden g;
    golden_open(&g, name);
    for (twin.at = 0, twin.seen = 1; twin.at < twin.seen; twin.at++) {
        engine *e = mem_alloc(1, sizeof *e);
        twin.seen = 0;
        twin.token = g.token[3];
        assert_ok(model_config_load(&e->c, g.dir));
        engine_start(e, g.dir, "W16", 1, load_disturbed);
        compare_whole(e, &g);
        if (!(golden_error(&g) > golden_tolerance))
            fail_msg("%s: %s moved by 1 goes unnoticed: %g", name, twin.name, golden_error(&g));
        engine_close(e);
        mem_free(e);
    }
    assert_true(twin.seen >= 2 * 6 + 2);
    golden_close(&g);
}

static void test_golden_twins(void **state) {
    (void)state;
    for_each_golden(golden_twins);
}

/* --- A synthetic model: company, threads, formats, speed -------------------------------------- */

/* The shape of the tiny checkpoint. */
static const char tiny_config[] =
    "{\"architectures\":[\"LlamaForCausalLM\"],\"model_type\":\"llama\",\"hidden_size\":256,"
    "\"num_hidden_layers\":6,\"num_attention_heads\":4,\"num_key_value_heads\":2,\"head_dim\":64,"
    "\"intermediate_size\":768,\"vocab_size\":2048,\"max_position_embeddings\":2048,"
    "\"rms_norm_eps\":1e-5,\"rope_theta\":10000.0,\"tie_word_embeddings\":false,"
    "\"torch_dtype\":\"bfloat16\",\"hidden_act\":\"silu\",\"bos_token_id\":1,\"eos_token_id\":2}";

static engine *tiny_open_layers(int32_t n_layers, const char *format, int32_t threads) {
    engine *e = mem_alloc(1, sizeof *e);
    assert_ok(model_config_parse(&e->c, tiny_config, strlen(tiny_config), "tiny"));
    e->c.n_layers = n_layers;
    engine_start(e, NULL, format, threads, NULL);
    return e;
}

static engine *tiny_open(const char *format, int32_t threads) {
    return tiny_open_layers(6, format, threads);
}

static void tiny_close(engine *e) {
    engine_close(e);
    mem_free(e);
}

enum { TINY_TOKENS = 100, FEW_LAYERS = 3 };
static int32_t tiny_token[TINY_TOKENS];

static float *tiny_logits(const char *format, int32_t threads) {
    engine *e = tiny_open_layers(FEW_LAYERS, format, threads);
    float *logits = mem_alloc((size_t)TINY_TOKENS * (size_t)e->c.vocab, sizeof(float));
    for (int32_t i = 0; i < TINY_TOKENS; i++) tiny_token[i] = (i * 97 + 5) % e->c.vocab;
    run_chunks(e, tiny_token, TINY_TOKENS, whole, 1, logits);
    tiny_close(e);
    return logits;
}

static double tiny_error(const char *format, const float *want) {
    float *got = tiny_logits(format, 2);
    const double error = relative_error(got, want, (int64_t)TINY_TOKENS * 2048);
    print_message("  %-16s relative error %.4f\n", format, error);
    mem_free(got);
    return error;
}

/* Quantisation noise of a format, against the exact run of the same weights. Rounding with a step s
 * adds noise of s / sqrt(12) to values of deviation 1: for bell-shaped values 0.9 % for 8 bits over
 * a row's +-4, 10 % for 4 bits over a group's +-2.6, 13 % over a row's +-3.4, 2.6 % for e4m3, 15 %
 * for e2m1. Activations add theirs, in squares. The 4 linears of each of 3 layers lie one behind
 * the other, so the bounds are sqrt(12) = 3.5 of that; the stream passes by most of them, and half
 * is what is seen. KV counts k and v of 3 layers: 2.4 of 10 % for 4 bits, and so on. */
static void test_formats(void **state) {
    (void)state;
    float *want = tiny_logits("W16A16KV16", 2);
    const struct {
        const char *better, *worse;
        double worse_bound;
    } pair[] = {
        {"W16", "W8", 0.03},
        {"W8", "WFP8A16KV16", 0.09},
        {"WFP8A16KV16", "W4", 0.35},
        {"W4g32", "W4gK", 0.46},
        {"WNVFP4", "WMXFP4", 0.52},
        {"W8A16", "W8A8", 0.042},
        {"W8A8", "WFP8AFP8KV16", 0.13},
        {"WFP8b", "WFP8bAFP8KV16", 0.13},
        {"W16KV16", "W16KV8", 0.014},
        {"W16KV8", "W16KVFP8", 0.063},
        {"W16KVFP8", "W16KV4", 0.24},
        {"W4", "W4A16KV4", 0.43},
    };
    for (int32_t i = 0; i < COUNT_OF(pair); i++) {
        const double a = tiny_error(pair[i].better, want), b = tiny_error(pair[i].worse, want);
        assert_more(b, a);
        assert_at_most(b, pair[i].worse_bound);
    }
    assert_at_most(tiny_error("W16A8KV16", want), 0); /* activations stay when weights do */
    mem_free(want);
}

/* A format list is applied by layer: all layers listed equal the plain format, one differing layer
 * lies between. */
static void test_kv_list(void **state) {
    (void)state;
    float *want = tiny_logits("W16A16KV4", 2), *list = tiny_logits("W16A16KV[4x3]", 1);
    assert_memory_equal(list, want, sizeof(float) * TINY_TOKENS * 2048);
    float *mixed = tiny_logits("W16A16KV[4x2,K8V4]", 1);
    assert_true(memcmp(mixed, want, sizeof(float) * TINY_TOKENS * 2048) != 0);
    mem_free(want);
    mem_free(list);
    mem_free(mixed);
}

static void test_threads(void **state) {
    (void)state;
    const char *const format[] = {"W16", "W4A8KV8"};
    for (int32_t i = 0; i < COUNT_OF(format); i++) {
        float *one = tiny_logits(format[i], 1), *three = tiny_logits(format[i], 3);
        assert_memory_equal(one, three, sizeof(float) * TINY_TOKENS * 2048);
        mem_free(one);
        mem_free(three);
    }
}

/* Generate n_new tokens after each prompt. */
static void generate(engine *e, stream *s, int32_t n_streams, int32_t n_new, int32_t *out) {
    int32_t fed[MAX_SEQS][STREAM_PAGES * KV_PAGE_TOKENS];
    int32_t chunk[MAX_SEQS];
    for (int32_t i = 0; i < n_streams; i++) {
        memcpy(fed[i], s[i].token, sizeof(int32_t) * (size_t)s[i].n);
        s[i].token = fed[i];
        chunk[i] = s[i].n;
    }
    for (int32_t j = 0; j < n_new; j++) {
        step(e, s, chunk, n_streams);
        for (int32_t i = 0; i < n_streams; i++) {
            assert_in_range(s[i].drawn, 0, (uint64_t)e->c.vocab - 1);
            out[i * n_new + j] = fed[i][s[i].at] = s[i].drawn;
            chunk[i] = 1;
        }
    }
    for (int32_t i = 0; i < n_streams; i++) s[i].token = NULL; /* ours, gone now */
}

/* Several prompts at temperature 1, alone and together: the same tokens. */
static void test_company(void **state) {
    (void)state;
    enum { N = 6, NEW = 24 };
    engine *e = tiny_open("W4A8KV8", 2);
    sampling draw = SAMPLING_GREEDY;
    draw.temperature = 1;
    draw.top_p = 0.95f;
    int32_t prompt[N][40], together[N * NEW], alone[NEW];
    stream s[N];
    for (int32_t i = 0; i < N; i++) {
        for (int32_t j = 0; j < 40; j++) prompt[i][j] = (i * 311 + j * 71) % 2048;
        s[i] = (stream){.token = prompt[i], .n = 5 + 7 * i, .draw = &draw};
    }
    give_pages(s, N, 3);
    generate(e, s, N, NEW, together);
    for (int32_t i = 0; i < N; i++) {
        stream one = {.token = prompt[i], .n = 5 + 7 * i, .draw = &draw};
        give_pages(&one, 1, 1000 + (uint64_t)i);
        generate(e, &one, 1, NEW, alone);
        assert_memory_equal(alone, together + i * NEW, sizeof alone);
    }
    draw.seed++; /* twin: another seed, other tokens */
    stream one = {.token = prompt[0], .n = 5, .draw = &draw};
    give_pages(&one, 1, 4);
    generate(e, &one, 1, NEW, alone);
    assert_true(memcmp(alone, together, sizeof alone) != 0);
    tiny_close(e);
}

/* A chunk of a prompt that goes on: no rows are sampled, and the step is still right. */
static void test_no_samples(void **state) {
    (void)state;
    float *want = tiny_logits("W16", 2);
    engine *e = tiny_open_layers(FEW_LAYERS, "W16", 2);
    float *got = mem_alloc((size_t)TINY_TOKENS * (size_t)e->c.vocab, sizeof(float));
    stream s = {.token = tiny_token, .n = TINY_TOKENS};
    give_pages(&s, 1, 8);
    const int32_t first = 70, rest = TINY_TOKENS - first;
    step(e, &s, &first, 1);
    s.logits = got;
    step(e, &s, &rest, 1);
    const int64_t at = (int64_t)first * e->c.vocab;
    assert_memory_equal(got + at, want + at, sizeof(float) * (size_t)rest * (size_t)e->c.vocab);
    mem_free(got);
    mem_free(want);
    tiny_close(e);
}

static void assert_vocab_nan(const float *logits, int32_t vocab, bool nan) {
    for (int32_t i = 0; i < vocab; i++) assert_int_equal(isnan(logits[i]) != 0, nan);
}

/* A sequence that begins at position 3 reads KV nobody wrote, and every format says so. */
static void test_unwritten_kv(void **state) {
    (void)state;
    const char *const format[] = {"W16", "W16KV8", "W16KV4", "W16KVFP8"};
    for (int32_t i = 0; i < COUNT_OF(format); i++) {
        engine *e = tiny_open_layers(1, format[i], 1);
        float *logits = mem_alloc((size_t)TINY_TOKENS * (size_t)e->c.vocab, sizeof(float));
        for (int32_t at = 0; at <= 3; at += 3) {
            stream s = {.token = tiny_token, .n = 10, .at = at, .logits = logits};
            give_pages(&s, 1, (uint64_t)(50 + at)); /* the second time on other pages */
            const int32_t chunk = 5;
            step(e, &s, &chunk, 1);
            assert_vocab_nan(logits + (int64_t)at * e->c.vocab, e->c.vocab, at > 0);
        }
        mem_free(logits);
        tiny_close(e);
    }
}

/* Bytes of this program in memory. */
static int64_t resident_bytes(void) {
    long long size, pages;
    FILE *f = fopen("/proc/self/statm", "r");
    assert_non_null(f);
    assert_int_equal(fscanf(f, "%lld %lld", &size, &pages), 2);
    fclose(f);
    return pages * sysconf(_SC_PAGESIZE);
}

/* A pool of a gigabyte costs what its sequences use: little to set up, a page when a step names
 * it. */
static void test_unused_kv(void **state) {
    (void)state;
    engine *e = mem_alloc(1, sizeof *e);
    const device_ops *ops;
    assert_ok(model_config_parse(&e->c, tiny_config, strlen(tiny_config), "tiny"));
    assert_ok(precision_parse(&e->p, "W16A16KV16"));
    assert_ok(device_find(&ops, "cpu"));
    assert_ok(ops->open(&e->d, &(device_options){.tp = 1, .threads = 1}));
    const int64_t page =
        2 * 4 * KV_PAGE_TOKENS * (int64_t)e->c.n_kv_heads * e->c.head_dim * e->c.n_layers;
    const device_setup s = {.config = &e->c,
                            .precision = &e->p,
                            .max_tokens = 8,
                            .max_seqs = 2,
                            .max_samples = 2,
                            .n_pages = (int32_t)((1 << 30) / page)};
    const int64_t before = resident_bytes();
    assert_ok(ops->setup(e->d, &s));
    assert_true(resident_bytes() - before < 32 << 20);
    ops->close(e->d);
    mem_free(e);
}

/* Two sequences that share a full page, as the prefix cache arranges it: the second computes only
 * what follows, and comes to the same bits. */
static void test_shared_page(void **state) {
    (void)state;
    engine *e = tiny_open_layers(FEW_LAYERS, "W16A16KV8", 2);
    const size_t size = sizeof(float) * (size_t)TINY_TOKENS * (size_t)e->c.vocab;
    float *first = mem_alloc(1, size), *second = mem_alloc(1, size);
    stream s[2] = {{.token = tiny_token, .n = TINY_TOKENS, .logits = first},
                   {.token = tiny_token, .n = TINY_TOKENS, .at = KV_PAGE_TOKENS, .logits = second}};
    give_pages(s, 2, 21);
    s[1].page[0] = s[0].page[0];
    step(e, s, (const int32_t[]){TINY_TOKENS, 0}, 2);
    step(e, s, (const int32_t[]){0, 20}, 2);
    step(e, s, (const int32_t[]){0, TINY_TOKENS - KV_PAGE_TOKENS - 20}, 2);
    const int64_t at = (int64_t)KV_PAGE_TOKENS * e->c.vocab;
    assert_memory_equal(second + at, first + at, size - sizeof(float) * (size_t)at);
    mem_free(first);
    mem_free(second);
    tiny_close(e);
}

static void test_refusals(void **state) {
    (void)state;
    const device_ops *ops;
    device *d;
    assert_status(device_find(&ops, "abacus"), ST_NOTFOUND);
    assert_non_null(strstr(fail_message(), "cpu"));
    assert_ok(device_find(&ops, "cpu"));
    assert_status(ops->open(&d, &(device_options){.tp = 2}), ST_UNSUPPORTED);
    assert_status(ops->open(&d, &(device_options){.tp = 1, .dequant_first = true}), ST_UNSUPPORTED);

    /* K = 768 is no multiple of a group of 512; a KV list of the wrong length. */
    engine *e = mem_alloc(1, sizeof *e);
    assert_ok(model_config_parse(&e->c, tiny_config, strlen(tiny_config), "tiny"));
    assert_ok(ops->open(&d, &(device_options){.tp = 1}));
    assert_ok(arena_open(&e->a, 1 << 20));
    assert_ok(checkpoint_open(&e->k, &e->c, NULL, 1));
    const char *const name[] = {"W4g512", "W16KV[8x5]"};
    for (int32_t i = 0; i < COUNT_OF(name); i++) {
        assert_ok(precision_parse(&e->p, name[i]));
        assert_status(forward_load(&e->f, &e->a, d, e->k, &e->c, &e->p, NULL, NULL), ST_SHAPE);
    }
    checkpoint_close(e->k);
    arena_close(&e->a);
    ops->close(d);
    mem_free(e);
}

/* Refuse the n-th allocation, for every n until all is well: NOMEM each time, and nothing is lost
 * (the sanitizer counts). */
static void test_no_memory(void **state) {
    (void)state;
    const char *const dir = GOLDENS "/qwen3_moe";
    engine *e = mem_alloc(1, sizeof *e);
    const device_ops *ops;
    assert_ok(device_find(&ops, "cpu"));
    assert_ok(model_config_load(&e->c, dir));
    assert_ok(precision_parse(&e->p, "W4g32A8KV8"));
    assert_ok(checkpoint_open(&e->k, &e->c, dir, 0));
    const device_setup s = {.config = &e->c,
                            .precision = &e->p,
                            .max_tokens = 8,
                            .max_seqs = 2,
                            .max_samples = 2,
                            .n_pages = 2};
    status st = ST_NOMEM;
    int64_t n = 0;
    while (st != ST_OK) {
        assert_ok(arena_open(&e->a, 1 << 20));
        mem_fail_at(++n);
        e->d = NULL;
        st = ops->open(&e->d, &(device_options){.tp = 1, .threads = 1});
        if (st == ST_OK) st = forward_load(&e->f, &e->a, e->d, e->k, &e->c, &e->p, NULL, NULL);
        if (st == ST_OK) st = forward_setup(e->f, &s, &(forward_plan){0});
        mem_fail_at(0);
        if (st != ST_OK) assert_int_equal(st, ST_NOMEM);
        if (e->d) ops->close(e->d);
        arena_close(&e->a);
    }
    assert_true(n > 60);
    checkpoint_close(e->k);
    mem_free(e);
}

/* Sizes agree with the definition, and the listing names every operation of a layer. */
static void test_inspection(void **state) {
    (void)state;
    engine *e = tiny_open("W4A16KV8", 1);
    assert_int_equal(forward_weight_bytes(e->f), model_weight_bytes(&e->c, &e->p, 1));
    text t = {0};
    forward_explain(e->f, 9, 8, &t);
    const char *const op[] = {"embed",     "norm",   "linear",     "rope_append",
                              "attention", "gated",  "all_reduce", "6 layers",
                              "gather",    "logits", "sample",     "W4"};
    for (int32_t i = 0; i < COUNT_OF(op); i++) assert_non_null(strstr(t.data, op[i]));
    text_free(&t);
    tiny_close(e);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_golden),       cmocka_unit_test(test_golden_tiny),
        cmocka_unit_test(test_golden_v4),    cmocka_unit_test(test_layouts),
        cmocka_unit_test(test_golden_twins), cmocka_unit_test(test_formats),
        cmocka_unit_test(test_kv_list),      cmocka_unit_test(test_threads),
        cmocka_unit_test(test_company),      cmocka_unit_test(test_no_samples),
        cmocka_unit_test(test_unwritten_kv), cmocka_unit_test(test_unused_kv),
        cmocka_unit_test(test_shared_page),  cmocka_unit_test(test_refusals),
        cmocka_unit_test(test_no_memory),    cmocka_unit_test(test_inspection),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
