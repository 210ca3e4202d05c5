/* gpu_forward.c - the whole transformer on the cuda device against the cpu device: every
 * architecture of tests/vectors/models, in chunks and in decode steps, with graphs and without,
 * both kernel families.
 *
 * The cpu device is f32 throughout; cuda rounds every activation to 16 bits. With fp16 (u = 2^-12
 * of each rounding's relative error at most) some thirty roundings in two layers stay below 3e-3 in
 * relative Frobenius norm; bf16 has u = 2^-9, 8 times as much. A quantised format may lie at most
 * twice as far from the unquantised cpu run as its own cpu run does. On an H200 mixtral in bf16 and
 * three formats of gpt_oss have missed these bounds, and that is still to be explained. Twin: one
 * weight of a layer is moved. */
#include "test.h"

#include "forward.h"
#include "kernel.h"
#include "safetensors.h"

#include <cuda_runtime_api.h>
#include <dirent.h>
#include <stdlib.h>
#include <string.h>

#define MODELS "tests/vectors/models"
enum { TOKENS = 128, SEQS = 16, PAGES = 64, SEQ_PAGES = 3 };

typedef struct {
    arena a;
    device *d;
    device_ops ops;
    forward *f;
    model_config c;
    precision p;
} run;

typedef status (*load_fn)(device *d, const weight_source *s, const precision *p, weight *out);

static dtype forced; /* type that weights of a checkpoint are said to have */
static float moved;  /* added to element 0 of the first quantised linear: the twin */

static status load_forced(device *d, const weight_source *s, const precision *p, weight *out) {
    weight_source t = *s;
    matrix_part part[64];
    static float value[1 << 20];
    t.type = forced;
    if (moved != 0 && s->field == WEIGHT_qkv && s->n_parts > 0 && s->n_parts <= COUNT_OF(part)) {
        for (int32_t r = 0; r < s->shape.n; r++)
            weight_source_row(s, 0, r, value + (int64_t)r * s->shape.k);
        value[0] += moved;
        part[0] = (matrix_part){.data = value,
                                .type = DT_F32,
                                .rows = s->shape.n,
                                .row_stride = s->shape.k,
                                .col_stride = 1};
        t.part = part;
        t.n_parts = 1;
    }
    return device_cuda.weight_load(d, &t, p, out);
}

/* UNSUPPORTED when the device refuses a format; anything else must succeed. */
static status run_open(run *r, const char *name, const char *dir, const char *format,
                       device_options o) {
    const device_ops *ops;
    *r = (run){0};
    o.tp = 1;
    assert_ok(device_find(&ops, name));
    assert_ok(model_config_load(&r->c, dir));
    assert_ok(precision_parse(&r->p, format));
    assert_ok(ops->open(&r->d, &o));
    r->ops = *ops;
    if (!strcmp(name, "cuda")) r->ops.weight_load = load_forced;
    r->d->ops = &r->ops;
    checkpoint *k;
    assert_ok(arena_open(&r->a, 16 << 20));
    assert_ok(checkpoint_open(&k, &r->c, dir, 1));
    const status st = forward_load(&r->f, &r->a, r->d, k, &r->c, &r->p, NULL, NULL);
    checkpoint_close(k);
    if (st == ST_UNSUPPORTED) return st;
    assert_ok(st);
    const device_setup s = {.config = &r->c,
                            .precision = &r->p,
                            .max_tokens = TOKENS,
                            .max_seqs = SEQS,
                            .max_samples = TOKENS,
                            .n_pages = PAGES};
    const forward_plan plan = forward_plan_default(r->d);
    assert_ok(forward_setup(r->f, &s, &plan));
    return ST_OK;
}

static void run_close(run *r) {
    r->d->ops->close(r->d);
    arena_close(&r->a);
}

/* --- Steps ---------------------------------------------------------------------------------- */

static int32_t page_of(int32_t seq, int32_t i) { return (seq * SEQ_PAGES + i) * 5 % PAGES; }

/* One step: n[s] tokens of sequence s from position at[s] on; decodes come first in `n`. With
 * params the last token of each sequence is sampled; without, every row's logits go to `logits`. */
static void step(run *r, int32_t n_seqs, const int32_t *n, const int32_t *at,
                 const int32_t *const *token, const sampling *params, sampled *out, float *logits) {
    int32_t id[TOKENS], position[TOKENS], seq_start[SEQS + 1] = {0}, kv_len[SEQS];
    int32_t page_start[SEQS + 1] = {0}, page[SEQS * SEQ_PAGES];
    int64_t ids[SEQS];
    sample_row sample[TOKENS];
    sampled ignored[TOKENS];
    batch b = {.n_seqs = n_seqs,
               .token = id,
               .position = position,
               .seq_start = seq_start,
               .kv_len = kv_len,
               .page_start = page_start,
               .page = page,
               .id = ids,
               .sample = sample};
    for (int32_t s = 0; s < n_seqs; s++) {
        for (int32_t i = 0; i < n[s]; i++, b.n_tokens++) {
            id[b.n_tokens] = token[s][at[s] + i];
            position[b.n_tokens] = at[s] + i;
            if (!params || i == n[s] - 1)
                sample[b.n_samples++] = (sample_row){
                    .row = b.n_tokens, .seq = s, .params = params, .draw = (uint64_t)(at[s] + i)};
        }
        b.n_decodes += n[s] == 1;
        ids[s] = s;
        kv_len[s] = at[s] + n[s];
        seq_start[s + 1] = b.n_tokens;
        const int32_t pages = (int32_t)div_up(kv_len[s], KV_PAGE_TOKENS);
        for (int32_t i = 0; i < pages; i++) page[page_start[s] + i] = page_of(s, i);
        page_start[s + 1] = page_start[s] + pages;
    }
    int64_t cost;
    assert_ok(forward_step(r->f, &b, out ? out : ignored, &cost));
    if (logits) assert_ok(forward_logits(r->f, logits));
}

/* Logits of all n tokens of one sequence: a chunk, then single tokens, then chunks again. */
static void logits_of(run *r, const int32_t *token, int32_t n, float *logits) {
    static const int32_t chunk[] = {33, 1, 1, 1, 17, 1, 64};
    for (int32_t at = 0, i = 0; at < n; i++) {
        const int32_t m = (int32_t)i64_min(chunk[i % COUNT_OF(chunk)], n - at);
        const int32_t *const list[] = {token};
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

typedef struct {
    const char *name;
    char dir[256];
    int32_t n, token[TOKENS];
} golden;

static void golden_open(golden *g, const char *name) {
    char path[512];
    safetensors *file;
    g->name = name;
    path_join(g->dir, sizeof g->dir, MODELS, name);
    assert_ok(safetensors_open(&file, path_join(path, sizeof path, g->dir, "golden.safetensors")));
    const tensor_view *ids = safetensors_find(file, "input_ids");
    assert_non_null(ids);
    g->n = (int32_t)i64_min(ids->dim[0], TOKENS);
    memcpy(g->token, ids->data, sizeof(int32_t) * (size_t)g->n);
    safetensors_close(file);
}

/* Logits of one model on one device; NULL when it refuses the format. */
static float *logits_on(const golden *g, const char *device_name, const char *format,
                        device_options o, int64_t *n) {
    run r;
    float *x = NULL;
    if (run_open(&r, device_name, g->dir, format, o) == ST_OK) {
        *n = (int64_t)g->n * r.c.vocab;
        x = malloc((size_t)(*n + (int64_t)TOKENS * r.c.vocab) * sizeof *x);
        assert_non_null(x);
        memset(x, 0xff, (size_t)*n * sizeof *x);
        logits_of(&r, g->token, g->n, x);
    } else {
        print_message("  %-14s %-16s refused: %s\n", g->name, format, fail_message());
    }
    run_close(&r);
    return x;
}

/* Relative error of cuda in `format` to cpu in `against`; -1 when refused. */
static double error_of(const golden *g, const char *format, const char *against, dtype type,
                       int32_t family) {
    int64_t n;
    forced = type;
    float *got = logits_on(g, "cuda", format, (device_options){.kernel_family = family}, &n);
    if (!got) return -1;
    float *want = logits_on(g, "cpu", against, (device_options){.threads = 1}, &n);
    const double e = relative_error(got, want, n);
    free(want);
    free(got);
    return e;
}

static double error_of_format(const golden *g, const char *format) {
    int64_t n;
    float *got = logits_on(g, "cpu", format, (device_options){.threads = 1}, &n);
    float *want = logits_on(g, "cpu", "W16A16KV16", (device_options){.threads = 1}, &n);
    const double e = relative_error(got, want, n);
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
    const double e[] = {error_of(&g, "W16A16KV16", "W16A16KV16", DT_F16, 0),
                        error_of(&g, "W16A16KV16", "W16A16KV16", DT_BF16, 0),
                        error_of(&g, "W16A16KV16", "W16A16KV16", DT_F16, 80)};
    moved = 4; /* weights lie around 0.1 */
    const double twin = error_of(&g, "W16A16KV16", "W16A16KV16", DT_F16, 0);
    moved = 0;
    const bool good =
        e[0] <= bound_f16 && e[1] <= bound_bf16 && e[2] <= bound_f16 && twin > bound_f16;
    print_message("  %-20s f16 %.2e bf16 %.2e ampere %.2e twin %.1e%s\n", name, e[0], e[1], e[2],
                  twin, good ? "" : "  FAILED");
    failures += !good;
}

static void for_each_model(void (*test)(const char *name)) {
    DIR *dir = opendir(MODELS);
    assert_non_null(dir);
    for (struct dirent *f; (f = readdir(dir)) != NULL;)
        if (f->d_name[0] != '.') test(f->d_name);
    closedir(dir);
}

static void test_architectures(void **state) {
    (void)state;
    failures = 0;
    for_each_model(architecture);
    assert_int_equal(failures, 0);
}

static void formats_of(const char *name) {
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
        const double e = error_of(&g, formats[i], "W16A16KV16", DT_F16, 0);
        if (e < 0) continue; /* refused, and said so */
        const double own = error_of_format(&g, formats[i]);
        const bool good = e <= 2 * own;
        print_message("  %-14s %-16s %.2e, cpu %.2e%s\n", name, formats[i], e, own,
                      good ? "" : "  FAILED");
        failures += !good;
    }
}

static void test_formats(void **state) {
    (void)state;
    failures = 0;
    formats_of("qwen3");
    formats_of("gpt_oss");
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

static void test_refusals(void **state) {
    (void)state;
    device *d;
    const device_options many = {.tp = 64}, first = {.tp = 1, .dequant_first = true};
    assert_status(device_cuda.open(&d, &many), ST_UNSUPPORTED);
    assert_status(device_cuda.open(&d, &first), ST_UNSUPPORTED);
}

int main(void) {
    int n = 0;
    if (cudaGetDeviceCount(&n) != cudaSuccess || n == 0) {
        printf("skipped: no device\n");
        return getenv("AMALGAM_GPU_MUST") != NULL;
    }
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_refusals),
        cmocka_unit_test(test_architectures),
        cmocka_unit_test(test_formats),
        cmocka_unit_test(test_graphs),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
