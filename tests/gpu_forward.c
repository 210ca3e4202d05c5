/* gpu_forward.c - the whole transformer on the cuda device against the cpu device: every
 * architecture of tests/vectors/models, in chunks and in decode steps, with graphs and without,
 * both kernel families.
 *
 * The cpu device is f32 throughout; cuda rounds every activation to 16 bits. With fp16 (u = 2^-12
 * of each rounding's relative error at most) some thirty roundings in two layers stay below 3e-3 in
 * relative Frobenius norm; bf16 has u = 2^-9, 8 times as much. A quantised format may lie at most
 * twice as far from the unquantised cpu run as its own cpu run does. Twin: one weight of a layer is
 * moved.
 *
 * Choosing experts is no rounding: a token whose k-th and k+1-th router logits lie closer than
 * their error may go through another expert, and all its logits are others then. (mixtral in bf16
 * has one such token of 80. Rounding the router's input alone, on the cpu device, moves it, and
 * moves no other token by more than the bound.) So rows of such tokens are left out, if three
 * things hold: on cpu the two logits are no further apart than 2 * bound * |logits of the row|,
 * each moved by no more than the bound; no more than a token in 16 is like that; and what is left
 * keeps the bound. */
#include "folder.h"
#include "gpu_run.h"

enum { LAYERS_MAX = 4, EXPERTS_MAX = 32 };

/* --- Routes --------------------------------------------------------------------------------- */

/* Router logits of one run, by layer and token. */
typedef struct {
    float logit[LAYERS_MAX][GOLDEN_TOKENS][EXPERTS_MAX];
    int32_t at, layer; /* of the step: its first token; the next layer that routes */
} routes;

static routes route_of_cuda, route_of_cpu, *route; /* route: where a run writes; NULL = nowhere */

static status note(device *d, const device_ops *own, tensor logits) {
    static float x[GOLDEN_TOKENS * EXPERTS_MAX];
    if (!route) return ST_OK;
    TRY(own->read(d, logits, x));
    for (int64_t t = 0; t < logits.rows; t++)
        memcpy(route->logit[route->layer][route->at + t], x + t * logits.cols,
               sizeof(float) * (size_t)logits.cols);
    route->layer++;
    return ST_OK;
}

static status route_noted(device *d, tensor logits, int32_t top_k, route_kind kind,
                          bool normalise) {
    const device_ops *own;
    TRY(device_find(&own, d->ops->name));
    TRY(own->moe_route(d, logits, top_k, kind, normalise));
    return note(d, own, logits);
}

static status enter_noted(device *d, tensor out, tensor residual, tensor add, const weight *w,
                          float eps, tensor logits, const weight *router, int32_t top_k,
                          route_kind kind, bool normalise) {
    const device_ops *own;
    TRY(device_find(&own, d->ops->name));
    TRY(own->moe_enter(d, out, residual, add, w, eps, logits, router, top_k, kind, normalise));
    return note(d, own, logits);
}

/* The k largest of x[0..n) as a bit set; *gap to the one after them. */
static uint32_t chosen(const float *x, int32_t n, int32_t k, double *gap) {
    uint32_t set = 0;
    float last = 0;
    for (int32_t i = 0; i <= k && i < n; i++) {
        int32_t best = -1;
        for (int32_t e = 0; e < n; e++)
            if (!(set >> e & 1) && (best < 0 || x[e] > x[best])) best = e;
        if (i == k) {
            *gap = (double)last - (double)x[best];
            return set;
        }
        set |= 1u << best;
        last = x[best];
    }
    *gap = INFINITY;
    return set;
}

/* Marks the tokens that took another way on cuda; false when one had no reason to. */
static bool rerouted(const model_config *c, int32_t n, double bound, bool out[]) {
    int32_t n_other = 0;
    for (int32_t t = 0; t < n; t++) {
        out[t] = false;
        for (int32_t l = 0; l < c->n_layers && c->n_experts && !out[t]; l++) {
            const float *want = route_of_cpu.logit[l][t], *got = route_of_cuda.logit[l][t];
            double gap, other_gap, norm = 0;
            const uint32_t set = chosen(want, c->n_experts, c->top_k, &gap);
            out[t] = chosen(got, c->n_experts, c->top_k, &other_gap) != set;
            for (int32_t e = 0; e < c->n_experts; e++) norm += (double)want[e] * (double)want[e];
            if (out[t] && !(gap <= 2 * bound * sqrt(norm))) return false;
        }
        n_other += out[t];
    }
    return n_other * 16 <= n;
}

/* --- Steps ---------------------------------------------------------------------------------- */

/* Logits of all n tokens of one sequence: a chunk, then single tokens, then chunks again. */
static void logits_of(run *r, const int32_t *token, int32_t n, float *logits) {
    static const int32_t chunk[] = {33, 1, 1, 1, 17, 1, 64};
    for (int32_t at = 0, i = 0; at < n; i++) {
        const int32_t m = (int32_t)i64_min(chunk[i % COUNT_OF(chunk)], n - at);
        const int32_t *const list[] = {token};
        if (route) route->at = at, route->layer = 0;
        step(r, 1, &m, &at, list, NULL, NULL, logits + (int64_t)at * r->c.vocab);
        at += m;
    }
}

/* Continuations of SEQS short prompts, all by decode steps, in company that grows and shrinks: a
 * prompt is fed token by token, and what is drawn after its end is fed next. */
static void generate(run *r, const int32_t *prompt, int32_t n_prompt, int32_t steps,
                     const sampling *params, int32_t out[SEQS][TOKENS]) {
    const int32_t *token[SEQS];
    int32_t length[SEQS], fed[SEQS] = {0}, n[SEQS];
    sampled drawn[SEQS];
    for (int32_t q = 0; q < SEQS; q++) {
        n[q] = 1;
        length[q] = 1 + q % 5;
        token[q] = out[q];
        for (int32_t i = 0; i < length[q]; i++) out[q][i] = prompt[(i + 3 * q) % n_prompt];
    }
    for (int32_t k = 0; k < steps; k++) {
        const int32_t live = 1 + (k * 7) % SEQS;
        step(r, live, n, fed, token, params, drawn, NULL);
        for (int32_t q = 0; q < live; q++)
            if (++fed[q] >= length[q]) out[q][length[q]++] = drawn[q].token;
    }
}

/* --- Tests ---------------------------------------------------------------------------------- */

/* Logits of one model on one device; NULL when it refuses the format. */
static float *logits_on(const golden *g, const char *device_name, const char *format,
                        device_options o, model_config *c) {
    run r;
    float *x = NULL;
    if (run_open(&r, device_name, g->dir, format, o) == ST_OK) {
        const int64_t n = (int64_t)g->n * r.c.vocab;
        r.ops.moe_route = route_noted;
        if (r.ops.moe_enter) r.ops.moe_enter = enter_noted;
        x = malloc((size_t)n * sizeof *x);
        assert_non_null(x);
        memset(x, 0xff, (size_t)n * sizeof *x);
        logits_of(&r, g->token, g->n, x);
    } else {
        print_message("  %-14s %-16s refused: %s\n", g->name, format, fail_message());
    }
    *c = r.c;
    run_close(&r);
    return x;
}

/* Relative error of cuda in `format` to cpu in W16; -1 when refused. */
static double error_of(const golden *g, const char *format, dtype type, device_options o) {
    model_config c;
    forced = type;
    float *got = logits_on(g, "cuda", format, o, &c);
    if (!got) return -1;
    float *want = logits_on(g, "cpu", "W16A16KV16", (device_options){.threads = 1}, &c);
    const double e = relative_error(got, want, (int64_t)g->n * c.vocab);
    free(want);
    free(got);
    return e;
}

/* The same in W16, over the tokens that took the same experts; infinite when one of the others had
 * no reason not to. *n_other counts them. */
static double error_of_routed(const golden *g, dtype type, int32_t family, double bound,
                              int32_t *n_other) {
    model_config c;
    bool other[GOLDEN_TOKENS];
    forced = type;
    route = &route_of_cuda;
    float *got = logits_on(g, "cuda", "W16A16KV16", (device_options){.kernel_family = family}, &c);
    route = &route_of_cpu;
    float *want = logits_on(g, "cpu", "W16A16KV16", (device_options){.threads = 1}, &c);
    route = NULL;
    assert_non_null(got);
    const bool good = rerouted(&c, g->n, bound, other);
    for (int32_t t = 0; t < g->n; t++) {
        *n_other += other[t];
        if (other[t])
            memcpy(got + (int64_t)t * c.vocab, want + (int64_t)t * c.vocab,
                   sizeof *got * (size_t)c.vocab);
    }
    const double e = relative_error(got, want, (int64_t)g->n * c.vocab);
    free(want);
    free(got);
    return good ? e : INFINITY;
}

static double error_of_format(const golden *g, const char *format) {
    model_config c;
    float *got = logits_on(g, "cpu", format, (device_options){.threads = 1}, &c);
    float *want = logits_on(g, "cpu", "W16A16KV16", (device_options){.threads = 1}, &c);
    const double e = relative_error(got, want, (int64_t)g->n * c.vocab);
    free(want);
    free(got);
    return e;
}

static const double bound_f16 = 3e-3, bound_bf16 = 8 * 3e-3;
static int32_t failures;

static void architecture(const char *name) {
    golden g;
    golden_open(&g, name);
    moved = 0;
    int32_t n_other = 0, ignored = 0;
    const double e[] = {error_of_routed(&g, DT_F16, 0, bound_f16, &n_other),
                        error_of_routed(&g, DT_BF16, 0, bound_bf16, &n_other),
                        error_of_routed(&g, DT_F16, 80, bound_f16, &n_other)};
    moved = 4; /* weights lie around 0.1 */
    const double twin = error_of_routed(&g, DT_F16, 0, bound_f16, &ignored);
    moved = 0;
    const bool good =
        e[0] <= bound_f16 && e[1] <= bound_bf16 && e[2] <= bound_f16 && twin > bound_f16;
    print_message("  %-20s f16 %.2e bf16 %.2e ampere %.2e twin %.1e  %d by other experts%s\n", name,
                  e[0], e[1], e[2], twin, n_other, good ? "" : "  FAILED");
    failures += !good;
}

static const char *only; /* a model to test alone, as under compute-sanitizer; NULL: all */

static void for_each_model(void (*test)(const char *name)) {
    for (int32_t i = 0; i < COUNT_OF(golden_names); i++)
        if (!only || !strcmp(only, golden_names[i])) test(golden_names[i]);
}

static void test_architectures(void **state) {
    (void)state;
    failures = 0;
    for_each_model(architecture);
    assert_int_equal(failures, 0);
}

static void formats_of(const char *name, bool dequant_first) {
    static const char *const formats[] = {"W8A16KV16",     "W4g32A16KV16", "W4g16symA16KV8",
                                          "WFP8A16KVFP8",  "WFP8bA16KV4",  "WMXFP4A16K8V4",
                                          "WNVFP4A16KV16", "W4g32A8KV8",   "WFP8AFP8KVFP8"};
    golden g;
    golden_open(&g, name);
    for (int i = 0; i < COUNT_OF(formats); i++) {
        precision p;
        model_config c;
        assert_ok(precision_parse(&p, formats[i]));
        assert_ok(model_config_load(&c, g.dir));
        if (model_fits_precision(&c, &p, 1) != ST_OK) continue;
        const device_options o = {.dequant_first = dequant_first};
        const double e = error_of(&g, formats[i], DT_F16, o);
        if (e < 0) continue; /* refused, and said so */
        const double own = error_of_format(&g, formats[i]);
        const bool good = e <= 2 * own;
        print_message("  %-14s %-16s %.2e, cpu %.2e%s%s\n", name, formats[i], e, own,
                      dequant_first ? " expanded" : "", good ? "" : "  FAILED");
        failures += !good;
    }
}

static void test_formats(void **state) {
    (void)state;
    failures = 0;
    if (!only) formats_of("qwen3", false);
    if (!only) formats_of("gpt_oss", false);
    assert_int_equal(failures, 0);
}

/* The baseline that writes weights out at 16 bit keeps the bounds of the formats. */
static void test_dequant_first(void **state) {
    (void)state;
    failures = 0;
    if (!only) formats_of("qwen3", true);
    if (!only) formats_of("gpt_oss", true);
    assert_int_equal(failures, 0);
}

static void same_tokens(const char *name) {
    static int32_t with[SEQS][TOKENS], without[SEQS][TOKENS];
    static const sampling drawn = {.temperature = 0.8f,
                                   .top_p = 0.9f,
                                   .top_k = 50,
                                   .repetition_penalty = 1,
                                   .seed = 3,
                                   .n_logprobs = -1};
    const sampling greedy = SAMPLING_GREEDY;
    const sampling *params[] = {&greedy, &drawn};
    golden g;
    golden_open(&g, name);
    forced = DT_BF16;
    for (int i = 0; i < 2; i++) {
        run r;
        memset(with, 0, sizeof with);
        memset(without, 0, sizeof without);
        assert_ok(run_open(&r, "cuda", g.dir, "W16A16KV8", (device_options){.no_graphs = false}));
        generate(&r, g.token, g.n, 80, params[i], with);
        run_close(&r);
        assert_ok(run_open(&r, "cuda", g.dir, "W16A16KV8", (device_options){.no_graphs = true}));
        generate(&r, g.token, g.n, 80, params[i], without);
        run_close(&r);
        const bool good = memcmp(with, without, sizeof with) == 0;
        failures += !good;
        if (!good) print_message("  %s: graphs change tokens\n", name);
    }
}

static void test_graphs(void **state) {
    (void)state;
    failures = 0;
    for_each_model(same_tokens);
    assert_int_equal(failures, 0);
}

static status leave_refused(device *d, tensor out, tensor residual, tensor y, const weight *w,
                            float eps, int32_t top_k) {
    (void)d, (void)out, (void)residual, (void)y, (void)w, (void)eps, (void)top_k;
    return FAIL(ST_UNSUPPORTED, "refused");
}

/* A step that is refused midway, behind a mixture's experts, changes no bit of the next one. */
static void test_abandoned(void **state) {
    (void)state;
    if (only && strcmp(only, "gpt_oss")) skip();
    static float logits[2][1 << 10];
    golden g;
    golden_open(&g, "gpt_oss");
    forced = DT_F16;
    for (int32_t refused = 0; refused < 2; refused++) {
        run r;
        const int32_t n = 1, at = 0;
        const int32_t *const token[] = {g.token};
        assert_ok(run_open(&r, "cuda", g.dir, "W4g32A16KV16", (device_options){0}));
        assert_true(r.c.vocab <= COUNT_OF(logits[0]));
        /* each token another routing, perhaps: after one of them at least words differ */
        for (int32_t i = 1; refused && i < 8; i++) {
            const int32_t *const other[] = {g.token + i};
            r.ops.moe_leave = leave_refused;
            assert_status(try_step(&r, 1, &n, &at, other, NULL, NULL, logits[refused]),
                          ST_UNSUPPORTED);
            r.ops.moe_leave = device_cuda.moe_leave;
            step(&r, 1, &n, &at, token, NULL, NULL, logits[refused]);
            if (memcmp(logits[0], logits[1], sizeof *logits[0] * (size_t)r.c.vocab)) break;
        }
        if (!refused) step(&r, 1, &n, &at, token, NULL, NULL, logits[0]);
        run_close(&r);
    }
    assert_memory_equal(logits[0], logits[1], sizeof logits[0]);
}

/* Experts as large as those of Qwen3-30B-A3B, of whose gate, up and down one launch is made for a
 * token alone (linear_both), in an odd number of layers. */
static const char large_experts[] =
    "{\"architectures\":[\"Qwen3MoeForCausalLM\"],\"model_type\":\"qwen3_moe\",\"vocab_size\":512,"
    "\"hidden_size\":2048,\"moe_intermediate_size\":768,\"intermediate_size\":768,"
    "\"num_hidden_layers\":3,\"num_attention_heads\":32,\"num_key_value_heads\":4,\"head_dim\":128,"
    "\"num_experts\":128,\"num_experts_per_tok\":8,\"norm_topk_prob\":true,"
    "\"decoder_sparse_step\":1,\"mlp_only_layers\":[],\"hidden_act\":\"silu\","
    "\"max_position_embeddings\":256,\"rms_norm_eps\":1e-6,\"rope_theta\":1e6,"
    "\"tie_word_embeddings\":false,\"torch_dtype\":\"float16\"}";

/* A token alone has the logits that it has beside two like it, whose experts are two launches; but
 * for those that go through another expert, one in 16 at most. Twin: those of the next token. */
static void test_token_alone(void **state) {
    (void)state;
    if (only && strcmp(only, "alone")) skip();
    enum { N = 48, VOCAB = 512 };
    static float alone[N][VOCAB], beside[N][3][VOCAB];
    char path[80];
    int32_t token[N], n_other = 0, n_alike = 0;
    FILE *f = fopen(path_join(path, sizeof path, folder, "config.json"), "w");
    assert_non_null(f);
    assert_true(fputs(large_experts, f) >= 0 && fclose(f) == 0);
    for (int32_t i = 0; i < N; i++) token[i] = (i * 37 + 5) % VOCAB;
    const int32_t *const same[] = {token, token, token}, one[] = {1, 1, 1};
    forced = DT_F16;
    made = true;
    run r;
    assert_ok(run_open(&r, "cuda", folder, "W4A16KV8", (device_options){0}));
    for (int32_t i = 0; i < N; i++) step(&r, 1, one, &i, same, NULL, NULL, alone[i]);
    for (int32_t i = 0; i < N; i++) {
        const int32_t at[] = {i, i, i};
        step(&r, 3, one, at, same, NULL, NULL, beside[i][0]);
    }
    run_close(&r);
    made = false;
    for (int32_t i = 0; i < N; i++) {
        n_other += !(relative_error(alone[i], beside[i][0], VOCAB) < 3e-3);
        n_alike += relative_error(alone[i], beside[(i + 1) % N][0], VOCAB) < 3e-3;
    }
    print_message("  a token alone: %d of %d otherwise, twin %d\n", n_other, N, N - n_alike);
    assert_true(n_other * 16 <= N);
    assert_int_equal(n_alike, 0);
}

static void test_refusals(void **state) {
    (void)state;
    device *d;
    const device_options many = {.tp = 64};
    assert_status(device_cuda.open(&d, &many), ST_UNSUPPORTED);
}

static status norm_nowhere(device *d, tensor out, tensor residual, tensor add, const weight *w,
                           float eps) {
    out.data = (void *)(uintptr_t)4096;
    return device_cuda.norm(d, out, residual, add, w, eps);
}

/* A kernel that writes where nothing is: the step says so, and so does every later one. The last
 * test, since CUDA does not run in this process any more. Not with a name given, as under
 * compute-sanitizer, which would find it. */
static void test_error(void **state) {
    (void)state;
    if (only) skip();
    run r;
    golden g;
    const int32_t n = 1, at = 0;
    golden_open(&g, "llama");
    forced = DT_F16;
    const int32_t *const token[] = {g.token};
    const sampling greedy = SAMPLING_GREEDY;
    assert_ok(run_open(&r, "cuda", g.dir, "W16A16KV16", (device_options){.no_graphs = true}));
    r.ops.norm = norm_nowhere;
    assert_status(try_step(&r, 1, &n, &at, token, &greedy, NULL, NULL), ST_DEVICE);
    assert_non_null(strstr(fail_message(), "illegal memory access"));
    r.ops.norm = device_cuda.norm;
    assert_status(try_step(&r, 1, &n, &at, token, &greedy, NULL, NULL), ST_DEVICE);
    assert_non_null(strstr(fail_message(), "illegal memory access"));
    run_close(&r);
}

int main(int argc, char **argv) {
    int result;
    only = argc > 1 ? argv[1] : NULL;
    if (gpu_missing(&result)) return result;
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_refusals),    cmocka_unit_test(test_architectures),
        cmocka_unit_test(test_formats),     cmocka_unit_test(test_dequant_first),
        cmocka_unit_test(test_graphs),      cmocka_unit_test(test_abandoned),
        cmocka_unit_test(test_token_alone), cmocka_unit_test(test_error),
    };
    return cmocka_run_group_tests(tests, make_folder, remove_folder);
}
