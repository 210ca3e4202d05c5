/* gpu_tiny.c - the tiny checkpoint, which has been trained, on the cuda device against the cpu
 * device: logits of held-out text in every format, from codes that are in the file too, the greedy
 * text of 200 prompts, the same again for the same bits, and 10,000 requests that leave nothing
 * behind.
 *
 * Logits: relative error in Frobenius norm below 3e-3, with fp16 activations and with bf16; of a
 * quantised format below twice the error that the format has on cpu. Where weights alone are
 * quantised, both devices have the same codes, so there the error to the cpu run of the same format
 * is bounded like that of 16 bits.
 *
 * Text: where it first differs, the cpu run of the text so far must find the two tokens nearly
 * equal. The relative error e of the logits is measured on text. A logit of a row is off by e times
 * the row's root mean square (of its logits less their mean, which no choice depends on) as a
 * standard deviation, by 4 times that at most (none of 6400 choices is to fail by chance), and two
 * logits move. With fp16 nine texts in ten must be alike. The checkpoint writes names and numbers
 * that nothing determines, so that bf16, with 8 times the error, changes more of them, and there
 * only the near-ties are asserted (on an H200: 192 of 200 alike in fp16, 145 in bf16). */
#include "gpu_run.h"

#include "corpus.h"
#include "engine.h"
#include "folder.h"
#include "quantise.h"
#include "tokenizer.h"

#define TINY "workloads/tiny"

enum {
    TEXT_SEQS = 8,
    TEXT_TOKENS = 128,
    LONG_TOKENS = 1400,
    PROMPTS = 200,
    PROMPT_LEAST = 16,
    NEW = 32
};

static const double bound = 3e-3;
static ids held_out;

static int setup(void **state) {
    (void)state;
    tokenizer *t = NULL;
    text corpus = {0};
    status st = tokenizer_open(&t, TINY);
    if (st == ST_OK) st = corpus_text(&corpus, NULL, CORPUS_SEED_HELD_OUT + 7, 1 << 16);
    if (st == ST_OK)
        st = tokenizer_encode(t, corpus.data, corpus.length, TOKENIZER_PARSE_SPECIAL, &held_out);
    text_free(&corpus);
    tokenizer_close(t);
    return st != ST_OK;
}

static int teardown(void **state) {
    (void)state;
    ids_free(&held_out);
    return 0;
}

/* --- Logits --------------------------------------------------------------------------------- */

/* Held-out text: so many stretches of so many tokens. */
typedef struct {
    int32_t seqs, tokens;
} stretches;

static const stretches many = {TEXT_SEQS, TEXT_TOKENS}, one_long = {1, LONG_TOKENS};

/* Half of each stretch in one chunk, a few decode steps of all, the rest.
 * [seqs * tokens, V] in the order of steps; NULL when the device refuses the format. */
static float *logits_in(const char *dir, const char *device_name, const char *format,
                        device_options o, stretches t, int64_t *n) {
    const int32_t chunk[] = {t.tokens / 2, 1, 1, 1, t.tokens / 2 - 3};
    run r;
    float *x = NULL;
    if (run_open(&r, device_name, dir, format, o) == ST_OK) {
        const int32_t *token[TEXT_SEQS];
        int32_t m[TEXT_SEQS], at[TEXT_SEQS] = {0};
        int64_t rows = 0;
        *n = (int64_t)t.seqs * t.tokens * r.c.vocab;
        x = malloc((size_t)*n * sizeof *x);
        assert_non_null(x);
        assert_true(held_out.length >= t.seqs * t.tokens);
        for (int32_t s = 0; s < t.seqs; s++) token[s] = held_out.data + s * t.tokens;
        for (int32_t i = 0; i < COUNT_OF(chunk); i++) {
            for (int32_t s = 0; s < t.seqs; s++) m[s] = chunk[i];
            step(&r, t.seqs, m, at, token, NULL, NULL, x + rows * r.c.vocab);
            for (int32_t s = 0; s < t.seqs; s++) at[s] += chunk[i];
            rows += (int64_t)t.seqs * chunk[i];
        }
    } else {
        print_message("  %-16s refused: %s\n", format, fail_message());
    }
    run_close(&r);
    return x;
}

static float *logits_of(const char *device_name, const char *format, device_options o, int64_t *n) {
    return logits_in(TINY, device_name, format, o, many, n);
}

static const device_options one_thread = {.threads = 1};

static void test_logits(void **state) {
    (void)state;
    static const struct {
        const char *name;
        dtype type;
        int32_t family;
    } runs[] = {{"f16", DT_F16, 0},
                {"bf16", DT_BF16, 0},
                {"f16 ampere", DT_F16, 80},
                {"bf16 ampere", DT_BF16, 80}};
    int64_t n;
    int failures = 0;
    float *want = logits_of("cpu", "W16A16KV16", one_thread, &n);
    for (int i = 0; i < COUNT_OF(runs); i++) {
        forced = runs[i].type;
        float *got =
            logits_of("cuda", "W16A16KV16", (device_options){.kernel_family = runs[i].family}, &n);
        const double e = relative_error(got, want, n);
        print_message("  %-12s %.2e, allowed %.1e\n", runs[i].name, e, bound);
        failures += !(e <= bound);
        got[n / 2] += 1000; /* twin */
        failures += relative_error(got, want, n) <= bound;
        free(got);
    }
    free(want);
    assert_int_equal(failures, 0);
}

static void formats_of(int32_t family, const float *exact) {
    static const char *const formats[] = {
        "W8A16KV16",    "W4A16KV16",     "W4g64A16KV8",   "W4g32symA16KV4", "WFP8A16KVFP8",
        "WFP8bA16KV16", "WMXFP4A16K8V4", "WNVFP4A16KV16", "W16A16KV8",      "W16A16KV4",
        "W8A8KV8",      "W4A8KV8",       "WFP8AFP8KVFP8"};
    int failures = 0;
    for (int i = 0; i < COUNT_OF(formats); i++) {
        precision p;
        int64_t n;
        assert_ok(precision_parse(&p, formats[i]));
        forced = DT_F16;
        float *got = logits_of("cuda", formats[i], (device_options){.kernel_family = family}, &n);
        if (!got) continue; /* refused, and said so */
        float *same = logits_of("cpu", formats[i], one_thread, &n);
        const double e = relative_error(got, exact, n), own = relative_error(same, exact, n);
        const double between = relative_error(got, same, n);
        const bool weights_alone = p.act == AF_16 && strstr(formats[i], "KV16");
        const bool good = e <= 2 * own && (!weights_alone || between <= bound);
        print_message("  %-16s %.2e, cpu %.2e, between them %.2e%s\n", formats[i], e, own, between,
                      good ? "" : "  FAILED");
        failures += !good;
        free(same);
        free(got);
    }
    assert_int_equal(failures, 0);
}

static void test_formats(void **state) {
    (void)state;
    int64_t n;
    float *exact = logits_of("cpu", "W16A16KV16", one_thread, &n);
    formats_of(0, exact);
    print_message("  kernel family ampere\n");
    formats_of(80, exact);
    free(exact);
}

/* Chunks of 700 and 697 tokens, of which attention on the GPU has the pages written out at 16 bit
 * first (attention_plan.h: 1024 rows, two heads a group). With bf16 activations what those are off
 * by comes on top. */
static void test_long_chunks(void **state) {
    (void)state;
    static const char *const formats[] = {"W16A16KV8", "W16A16KVFP8", "W16A16K8V4", "W16A16KV4"};
    int64_t n;
    int failures = 0;
    float *exact = logits_in(TINY, "cpu", "W16A16KV16", one_thread, one_long, &n);
    for (int i = 0; i < COUNT_OF(formats); i++) {
        float *same = logits_in(TINY, "cpu", formats[i], one_thread, one_long, &n);
        const double own = relative_error(same, exact, n);
        free(same);
        for (int k = 0; k < 4; k++) {
            const device_options o = {.kernel_family = k < 2 ? 0 : 80};
            forced = k % 2 ? DT_BF16 : DT_F16;
            float *got = logits_in(TINY, "cuda", formats[i], o, one_long, &n);
            assert_non_null(got);
            const double e = relative_error(got, exact, n);
            const double most = 2 * own + (k % 2 ? bound : 0);
            print_message("  %-16s %s%s %.2e, cpu %.2e%s\n", formats[i], k % 2 ? "bf16" : "f16",
                          k < 2 ? "" : " ampere", e, own, e <= most ? "" : "  FAILED");
            failures += !(e <= most);
            got[n / 2] += 1e5f; /* twin */
            failures += relative_error(got, exact, n) <= most;
            free(got);
        }
    }
    free(exact);
    assert_int_equal(failures, 0);
}

/* --- Layouts ------------------------------------------------------------------------------- */

/* The checkpoint written in a layout of other tools, then its codes as they stand on both devices.
 */
static double error_of_layout(save_layout layout, const char *format) {
    char activations[64];
    int64_t n;
    quantise_options q = QUANTISE_OPTIONS_DEFAULT;
    assert_int_equal(make_folder(NULL), 0);
    q.model = TINY;
    q.out = folder;
    q.layout = layout;
    assert_ok(precision_parse(&q.precision, format));
    assert_ok(quantise_checkpoint(&q));
    snprintf(activations, sizeof activations, "%sA16KV16", format);
    forced = DT_F16;
    float *got = logits_in(folder, "cuda", activations, (device_options){0}, many, &n);
    float *want = logits_in(folder, "cpu", activations, one_thread, many, &n);
    assert_non_null(got);
    const double e = relative_error(got, want, n);
    free(want);
    free(got);
    assert_int_equal(remove_folder(NULL), 0);
    return e;
}

static void test_layouts(void **state) {
    (void)state;
    static const struct {
        save_layout layout;
        const char *format;
    } cases[] = {
        {SAVE_COMPRESSED, "W4"},   {SAVE_COMPRESSED, "W4g32sym"}, {SAVE_COMPRESSED, "W8"},
        {SAVE_COMPRESSED, "WFP8"}, {SAVE_COMPRESSED, "WMXFP4"},   {SAVE_COMPRESSED, "WNVFP4"},
        {SAVE_AWQ, "W4"},          {SAVE_GPTQ, "W4sym"},          {SAVE_GPTQ_V2, "W4g64"},
        {SAVE_FP8, "WFP8b"},       {SAVE_MODELOPT, "WNVFP4"}};
    int failures = 0;
    for (int i = 0; i < COUNT_OF(cases); i++) {
        const double e = error_of_layout(cases[i].layout, cases[i].format);
        print_message("  %-20s %-8s %.2e%s\n", save_layout_text(cases[i].layout), cases[i].format,
                      e, e <= bound ? "" : "  FAILED");
        failures += !(e <= bound);
    }
    assert_int_equal(failures, 0);
}

/* --- Text ----------------------------------------------------------------------------------- */

static int32_t prompt_length(int32_t i) { return PROMPT_LEAST + i * 7 % 33; }
static const int32_t *prompt_of(int32_t i) {
    return held_out.data + (int64_t)i * 131 % (held_out.length - 64);
}

/* NEW greedy tokens after each prompt, SEQS prompts at a time: all prefilled in one step, then
 * decode steps. */
static void write_text(const char *device_name, device_options o, int32_t out[PROMPTS][NEW]) {
    const sampling greedy = SAMPLING_GREEDY;
    run r;
    assert_ok(run_open(&r, device_name, TINY, "W16A16KV16", o));
    for (int32_t first = 0; first < PROMPTS; first += SEQS) {
        static int32_t written[SEQS][64 + NEW];
        const int32_t *token[SEQS];
        int32_t n[SEQS], at[SEQS] = {0};
        sampled drawn[SEQS];
        for (int32_t s = 0; s < SEQS; s++) {
            n[s] = prompt_length(first + s);
            token[s] = written[s];
            memcpy(written[s], prompt_of(first + s), sizeof(int32_t) * (size_t)n[s]);
        }
        for (int32_t k = 0; k < NEW; k++) {
            step(&r, SEQS, n, at, token, &greedy, drawn, NULL);
            for (int32_t s = 0; s < SEQS; s++) {
                out[first + s][k] = drawn[s].token;
                at[s] += n[s];
                written[s][at[s]] = drawn[s].token;
                n[s] = 1;
            }
        }
    }
    run_close(&r);
}

/* On cpu, after prompt i and the first k tokens: how far `other` lies below `best`, and the
 * root mean square of the row about its mean. */
static double gap_of(run *cpu, int32_t i, const int32_t *written, int32_t k, int32_t other,
                     double *deviation) {
    static float logits[(64 + NEW) * 2048];
    int32_t whole[64 + NEW], n = prompt_length(i);
    const int32_t at = 0, *list[] = {whole};
    memcpy(whole, prompt_of(i), sizeof(int32_t) * (size_t)n);
    memcpy(whole + n, written, sizeof(int32_t) * (size_t)k);
    n += k;
    assert_int_equal(cpu->c.vocab, 2048);
    step(cpu, 1, &n, &at, list, NULL, NULL, logits);
    const float *row = logits + (int64_t)(n - 1) * cpu->c.vocab;
    double sum = 0, squares = 0;
    for (int32_t v = 0; v < cpu->c.vocab; v++) sum += (double)row[v];
    const double mean = sum / cpu->c.vocab;
    for (int32_t v = 0; v < cpu->c.vocab; v++) squares += pow((double)row[v] - mean, 2);
    *deviation = sqrt(squares / cpu->c.vocab);
    return (double)row[written[k]] - (double)row[other];
}

/* Returns the number of prompts whose text is the same; *unexplained: others without a near-tie,
 * for logits of this relative error. */
static int32_t compare_text(int32_t want[PROMPTS][NEW], int32_t got[PROMPTS][NEW], double error,
                            int32_t *unexplained) {
    run cpu;
    int32_t same = 0;
    *unexplained = 0;
    assert_ok(run_open(&cpu, "cpu", TINY, "W16A16KV16", one_thread));
    for (int32_t i = 0; i < PROMPTS; i++) {
        int32_t k = 0;
        double deviation;
        while (k < NEW && want[i][k] == got[i][k]) k++;
        same += k == NEW;
        if (k == NEW) continue;
        const double gap = gap_of(&cpu, i, want[i], k, got[i][k], &deviation);
        const double allowed = 2 * 4 * error * deviation;
        const bool tie = gap <= allowed;
        if (*unexplained < 8)
            print_message("    prompt %d, token %d: %d, not %d; gap %.2e, allowed %.2e%s\n", i, k,
                          got[i][k], want[i][k], gap, allowed, tie ? "" : "  FAILED");
        *unexplained += !tie;
    }
    run_close(&cpu);
    return same;
}

static void test_text(void **state) {
    (void)state;
    static int32_t want[PROMPTS][NEW], got[PROMPTS][NEW];
    static const struct {
        const char *name;
        dtype type;
        int32_t family;
    } runs[] = {{"f16", DT_F16, 0}, {"f16 ampere", DT_F16, 80}, {"bf16", DT_BF16, 0}};
    int failures = 0;
    int32_t unexplained;
    int64_t n;
    double error = 0;
    float *exact = logits_of("cpu", "W16A16KV16", one_thread, &n);
    write_text("cpu", one_thread, want);
    for (int i = 0; i < COUNT_OF(runs); i++) {
        const device_options o = {.kernel_family = runs[i].family};
        forced = runs[i].type;
        float *logits = logits_of("cuda", "W16A16KV16", o, &n);
        error = relative_error(logits, exact, n);
        free(logits);
        write_text("cuda", o, got);
        const int32_t same = compare_text(want, got, error, &unexplained);
        print_message("  %-12s %d of %d prompts alike, %d differences without a near-tie\n",
                      runs[i].name, same, PROMPTS, unexplained);
        failures += unexplained != 0 || (runs[i].type == DT_F16 && 10 * same < 9 * PROMPTS);
    }
    free(exact);
    assert_int_equal(failures, 0);
    memcpy(got, want, sizeof got);
    got[PROMPTS / 2][NEW / 2] ^= 1; /* twin: a token that nothing brings near */
    assert_int_equal(compare_text(want, got, error, &unexplained), PROMPTS - 1);
    assert_int_equal(unexplained, 1);
}

/* The same steps twice: every sum has an order that nothing but the shapes decides. */
static void test_repeated(void **state) {
    (void)state;
    static const dtype types[] = {DT_F16, DT_BF16};
    int failures = 0;
    for (int i = 0; i < COUNT_OF(types); i++) {
        for (int32_t family = 0; family <= 80; family += 80) {
            const device_options o = {.kernel_family = family};
            static int32_t text_a[PROMPTS][NEW], text_b[PROMPTS][NEW];
            int64_t n;
            forced = types[i];
            float *a = logits_of("cuda", "W4A16KV8", o, &n);
            float *b = logits_of("cuda", "W4A16KV8", o, &n);
            const bool logits = memcmp(a, b, (size_t)n * sizeof *a) == 0;
            write_text("cuda", o, text_a);
            write_text("cuda", o, text_b);
            const bool written = memcmp(text_a, text_b, sizeof text_a) == 0;
            if (!logits || !written)
                print_message("  %s, family %d: logits %s, text %s\n", dtype_text(types[i]), family,
                              logits ? "alike" : "differ", written ? "alike" : "differs");
            failures += !logits || !written;
            free(a);
            free(b);
        }
    }
    assert_int_equal(failures, 0);
}

/* --- 10,000 requests ------------------------------------------------------------------------ */

static int64_t free_bytes(engine *e) {
    int64_t usable;
    assert_ok(engine_device(e)->ops->memory(engine_device(e), &usable));
    return usable;
}

/* Serves n short conversations that begin in one of four ways; no page is held afterwards. */
static void serve(engine *e, int32_t n, uint64_t seed) {
    arena a;
    workload w;
    workload_options o;
    assert_ok(arena_open(&a, (size_t)1 << 30));
    assert_ok(workload_preset(&o, "fixed"));
    o.n_requests = n;
    o.prompt = (length_law){.kind = LENGTH_UNIFORM, .a = 70, .b = 130, .min = 1, .max = 1 << 24};
    o.output = (length_law){.kind = LENGTH_UNIFORM, .a = 1, .b = 24, .min = 1, .max = 1 << 24};
    o.shared_prefix = 64;
    o.n_prefixes = 4;
    o.vocab = engine_config(e)->vocab;
    o.seed = seed;
    assert_ok(workload_make(&w, &a, &o));
    request_log *log = arena_array(&a, request_log, (size_t)n);
    assert_non_null(log);
    assert_ok(engine_serve(e, &a, &w, log));
    for (int32_t i = 0; i < n; i++) {
        assert_int_equal(log[i].finish, FINISH_LENGTH);
        assert_int_equal(log[i].n_output, w.request[i].max_new);
    }
    engine_reset(e); /* drops the prefix cache */
    assert_int_equal(kvpool_held(sched_pool(engine_sched(e))), 0);
    arena_close(&a);
}

static void test_soak(void **state) {
    (void)state;
    engine *e;
    engine_options o = ENGINE_OPTIONS_DEFAULT;
    o.model = TINY;
    o.precision = "W4A16KV8";
    o.device = "cuda";
    o.ctx_max = 256;
    o.pages = 400;
    o.policy.max_seqs = 64;
    o.policy.token_budget = 1024;
    o.max_requests = 10000;
    assert_ok(engine_open(&e, &o, NULL, NULL));
    assert_ok(engine_warm(e)); /* captures every graph, of which there are two a number of rows */
    serve(e, 1000, 1);
    const int64_t before = free_bytes(e);
    serve(e, 10000, 2);
    const int64_t after = free_bytes(e);
    print_message("  free device memory before and after: %lld, %lld bytes\n", (long long)before,
                  (long long)after);
    assert_int_equal(before, after);
    engine_close(e);
}

int main(void) {
    int result;
    if (gpu_missing(&result)) return result;
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_logits),      cmocka_unit_test(test_formats),
        cmocka_unit_test(test_long_chunks), cmocka_unit_test(test_layouts),
        cmocka_unit_test(test_text),        cmocka_unit_test(test_repeated),
        cmocka_unit_test(test_soak),
    };
    return cmocka_run_group_tests(tests, setup, teardown);
}
