/* gpu_ranks.c - tensor parallelism over two GPUs: logits of every architecture of
 * tests/vectors/models against the cpu device, greedy tokens against one GPU, graphs against none.
 * Skipped where there are fewer GPUs or no NCCL.
 *
 * Bounds are those of gpu_forward.c: with two ranks, y of o and down is a sum of two values that
 * were rounded to 16 bit, rounded once more, which are four roundings more in two layers beside
 * some thirty. Greedy tokens may part only at a near-tie. An error e of a row in relative norm is
 * e |row| / sqrt V of an element, root mean square; a difference of two logits in two runs has
 * twice that, and five deviations of it are 10 e |row| / sqrt V. */
#include "gpu_test.h"

#include "forward.h"
#include "kernel.h"
#include "nccl.h"

enum { TOKENS = 96, PAGES = 16, RANKS = 2 };

typedef struct {
    arena a;
    device *d;
    forward *f;
    model_config c;
    precision p;
} run;

/* UNSUPPORTED and SHAPE are refusals; anything else must succeed. */
static status run_open(run *r, const char *name, const char *dir, const char *format,
                       device_options o) {
    const device_ops *ops;
    checkpoint *k;
    *r = (run){0};
    assert_ok(device_find(&ops, name));
    assert_ok(model_config_load(&r->c, dir));
    assert_ok(precision_parse(&r->p, format));
    TRY(model_fits_tp(&r->c, o.tp, r->p.group));
    TRY(model_fits_precision(&r->c, &r->p, o.tp));
    assert_ok(ops->open(&r->d, &o));
    assert_ok(arena_open(&r->a, 16 << 20));
    assert_ok(checkpoint_open(&k, &r->c, dir, 1));
    const status st = forward_load(&r->f, &r->a, r->d, k, &r->c, &r->p, NULL, NULL);
    checkpoint_close(k);
    if (st == ST_UNSUPPORTED || st == ST_SHAPE) return st;
    assert_ok(st);
    const device_setup s = {.config = &r->c,
                            .precision = &r->p,
                            .max_tokens = TOKENS,
                            .max_seqs = 4,
                            .max_samples = TOKENS,
                            .n_pages = PAGES};
    const forward_plan plan = forward_plan_default(r->d);
    assert_ok(forward_setup(r->f, &s, &plan));
    return ST_OK;
}

static void run_close(run *r) {
    if (r->d) r->d->ops->close(r->d);
    arena_close(&r->a);
}

/* One sequence: n tokens from position `at` on, pages in a scattered order. Without params the
 * logits of all rows go to `logits`. */
static int32_t step(run *r, const int32_t *token, int32_t at, int32_t n, const sampling *params,
                    float *logits) {
    static const int32_t page[] = {7, 2, 11, 5};
    int32_t position[TOKENS];
    sample_row sample[TOKENS];
    sampled drawn[TOKENS];
    const int32_t kv_len = at + n, seq_start[] = {0, n};
    const int32_t page_start[] = {0, (int32_t)div_up(kv_len, KV_PAGE_TOKENS)};
    const int64_t id = 0;
    batch b = {.n_seqs = 1,
               .n_tokens = n,
               .n_decodes = n == 1,
               .token = token + at,
               .position = position,
               .seq_start = seq_start,
               .kv_len = &kv_len,
               .page_start = page_start,
               .page = page,
               .id = &id,
               .sample = sample};
    for (int32_t i = 0; i < n; i++) {
        position[i] = at + i;
        if (!params || i == n - 1)
            sample[b.n_samples++] =
                (sample_row){.row = i, .params = params, .draw = (uint64_t)(at + i)};
    }
    int64_t cost;
    assert_ok(forward_step(r->f, &b, drawn, &cost));
    if (logits) assert_ok(forward_logits(r->f, logits));
    return drawn[b.n_samples - 1].token;
}

/* Logits of all tokens: a chunk, single tokens, the rest. NULL with the refusal printed. */
static float *logits_on(const golden *g, const char *device_name, const char *format,
                        device_options o, dtype *type, int64_t *n) {
    run r;
    float *x = NULL;
    if (run_open(&r, device_name, g->dir, format, o) == ST_OK) {
        const int32_t cut[] = {0, 33, 34, 35, g->n};
        *n = (int64_t)g->n * r.c.vocab;
        *type = r.c.type;
        x = malloc((size_t)*n * sizeof *x);
        assert_non_null(x);
        for (int i = 0; i + 1 < COUNT_OF(cut); i++)
            step(&r, g->token, cut[i], cut[i + 1] - cut[i], NULL, x + (int64_t)cut[i] * r.c.vocab);
    } else {
        print_message("  %-40s %-14s refused: %s\n", g->dir, format, fail_message());
    }
    run_close(&r);
    return x;
}

static const device_options two = {.tp = RANKS}, alone = {.tp = 1},
                            on_cpu = {.tp = 1, .threads = 1};
static int32_t failures, compared;

/* Bound of 16 bit by the checkpoint's type. */
static double bound_of(dtype t) { return t == DT_BF16 ? 8 * 3e-3 : 3e-3; }

/* Split and shared KV heads, experts, sinks and biases, a tied head; the others differ in config.
 * */
static const char *const kinds[] = {"internlm2", "qwen3", "gpt_oss", "qwen3_moe",
                                    "llama_bias_tied"};

static bool is_kind(const char *name) {
    for (int i = 0; i < COUNT_OF(kinds); i++)
        if (!strcmp(kinds[i], name)) return true;
    return false;
}

/* Formats of the kinds only: opening two ranks takes a while. */
static void logits_of(const char *name) {
    static const char *const formats[] = {"W16A16KV16", "W4g16A16KV8", "W8A16KV16"};
    golden g;
    golden_open(&g, name);
    for (int i = 0; i < (is_kind(name) ? COUNT_OF(formats) : 1); i++) {
        int64_t n;
        dtype type = DT_F16;
        float *got = logits_on(&g, "cuda", formats[i], two, &type, &n);
        if (!got) continue;
        float *want = logits_on(&g, "cpu", "W16A16KV16", on_cpu, &type, &n);
        float *own = i ? logits_on(&g, "cpu", formats[i], on_cpu, &type, &n) : NULL;
        const double e = relative_error(got, want, n), bound = bound_of(type);
        const double most = own ? 2 * relative_error(own, want, n) + bound : bound;
        for (int64_t k = 0; k < n / g.n; k++) want[k] = got[n - 1 - k]; /* twin: a row of others */
        const double twin = relative_error(got, want, n);
        const bool good = e <= most && (i || twin > most);
        print_message("  %-40s %-14s %.2e, at most %.2e, twin %.1e%s\n", g.dir, formats[i], e, most,
                      twin, good ? "" : "  FAILED");
        failures += !good;
        compared++;
        free(own);
        free(want);
        free(got);
    }
}

static void test_logits(void **state) {
    (void)state;
    failures = compared = 0;
    for (int i = 0; i < COUNT_OF(golden_names); i++) logits_of(golden_names[i]);
    assert_int_equal(failures, 0);
    assert_true(compared >= COUNT_OF(golden_names) + COUNT_OF(kinds));
}

/* Prompt of 8, then greedy to the end. */
static void generate(const golden *g, const char *name, device_options o, int32_t out[TOKENS]) {
    const sampling greedy = SAMPLING_GREEDY;
    run r;
    memcpy(out, g->token, sizeof(int32_t) * 8);
    assert_ok(run_open(&r, name, g->dir, "W16A16KV16", o));
    out[8] = step(&r, out, 0, 8, &greedy, NULL);
    for (int32_t i = 8; i + 1 < TOKENS; i++) out[i + 1] = step(&r, out, i, 1, &greedy, NULL);
    run_close(&r);
}

/* The margin of the token after out[0 .. n) on the cpu device, relative to the logits' size. */
static double margin(const golden *g, const int32_t *out, int32_t n, int32_t a, int32_t b,
                     double *most) {
    run r;
    assert_ok(run_open(&r, "cpu", g->dir, "W16A16KV16", on_cpu));
    const int32_t vocab = r.c.vocab;
    *most = 10 * bound_of(r.c.type) / sqrt(vocab);
    float *x = malloc(sizeof *x * (size_t)vocab * (size_t)n);
    assert_non_null(x);
    step(&r, out, 0, n, NULL, x);
    const float *row = x + (int64_t)(n - 1) * vocab;
    double norm = 0;
    for (int32_t i = 0; i < vocab; i++) norm += (double)row[i] * (double)row[i];
    const double m = fabs((double)row[a] - (double)row[b]) / sqrt(norm);
    free(x);
    run_close(&r);
    return m;
}

static void tokens_of(const char *name) {
    static int32_t ours[TOKENS], plain[TOKENS], eager[TOKENS];
    golden g;
    golden_open(&g, name);
    generate(&g, "cuda", two, ours);
    generate(&g, "cuda", (device_options){.tp = RANKS, .no_graphs = true}, eager);
    generate(&g, "cuda", alone, plain);
    int32_t n = 0;
    while (n < TOKENS && ours[n] == plain[n]) n++;
    const bool same = memcmp(ours, eager, sizeof ours) == 0;
    if (!same) print_message("  %s: graphs change tokens\n", name);
    failures += !same;
    if (n == TOKENS) return;
    double most;
    const double m = margin(&g, ours, n, ours[n], plain[n], &most);
    print_message("  %s: parts at token %d, margin %.1e of %.1e%s\n", name, n, m, most,
                  m <= most ? "" : "  FAILED");
    failures += !(m <= most);
}

static void test_tokens(void **state) {
    (void)state;
    failures = 0;
    for (int i = 0; i < COUNT_OF(kinds); i++) tokens_of(kinds[i]);
    assert_int_equal(failures, 0);
}

static void test_refusals(void **state) {
    (void)state;
    model_config c;
    precision p;
    device *d;
    const device_options many = {.tp = 64};
    assert_status(device_cuda.open(&d, &many), ST_UNSUPPORTED);
    assert_ok(model_config_load(&c, "Qwen2.5-7B")); /* 28 heads */
    assert_ok(precision_parse(&p, "W4A16KV8"));
    assert_status(model_fits_precision(&c, &p, 8), ST_SHAPE);
}

int main(void) {
    int n = 0;
    nccl lib;
    if (cudaGetDeviceCount(&n) != cudaSuccess || n < RANKS || nccl_load(&lib) != ST_OK) {
        printf("skipped: %d GPUs, %s\n", n, n < RANKS ? "two are needed" : fail_message());
        return getenv("AMALGAM_RANKS_MUST") != NULL;
    }
    nccl_unload(&lib);
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_refusals),
        cmocka_unit_test(test_tokens),
        cmocka_unit_test(test_logits),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
