/* cmd_bench_step.c - `amalgam bench step`: one step on the GPU against the machine's roofline.
 *
 *   decode    B sequences of ctx tokens, one token each
 *   prefill   --new N: one sequence, N tokens on top of ctx - N
 *
 * A step is what serving runs: forward_step, with its copies, its launches (a graph for decodes)
 * and the wait for the tokens. Times are the median of the wall clock over many steps on the same
 * batch, whose pages are spread over the pool. KV codes are what setup left there (all ones), apart
 * from the step's own: kernels read them at the same cost, and no result is looked at.
 *
 * roofline = max(bytes / read ceiling, operations / matrix rate), bytes being every weight that the
 * step uses once (of experts, as many as its tokens hit on average) and the KV of the context once.
 * The read ceiling is measured in the same process, over 4 GiB. The matrix rate is an option; 780
 * is what cuBLAS reaches on an H200 with 8192 x 8192 x 8192 in bf16 on random data. */
#include "bandwidth.h"
#include "cli.h"
#include "engine.h"
#include "linear.h"

#include <cuda_runtime_api.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

enum { STEPS_MAX = 200 };

typedef struct {
    const char *model, *precision, *family;
    int64_t batch, ctx, n_new, steps, tp;
    bool json, no_graphs;
    double read_gbs, matrix_tflops; /* 0: measure */
} arguments;

#define CUDA(call)                                                                                 \
    do {                                                                                           \
        const cudaError_t e_ = (call);                                                             \
        if (e_ != cudaSuccess) return FAIL(ST_DEVICE, "%s: %s", #call, cudaGetErrorString(e_));    \
    } while (0)

/* --- Ceilings ------------------------------------------------------------------------------- */

static double milliseconds(cudaEvent_t a, cudaEvent_t b) {
    float ms = 0;
    (void)cudaEventSynchronize(b);
    (void)cudaEventElapsedTime(&ms, a, b);
    return (double)ms;
}

static status measure_read(double *gbs, int32_t n_sms) {
    const int64_t bytes = (int64_t)4 << 30;
    void *p;
    cudaEvent_t a, b;
    double best = 1e30;
    CUDA(cudaMalloc(&p, (size_t)bytes + 256));
    CUDA(cudaMemset(p, 0x5a, (size_t)bytes + 256));
    CUDA(cudaEventCreate(&a));
    CUDA(cudaEventCreate(&b));
    for (int i = 0; i < 5; i++) {
        CUDA(cudaEventRecord(a, NULL));
        TRY(kernel_read((uint32_t *)(void *)((char *)p + bytes), p, bytes, n_sms, NULL));
        CUDA(cudaEventRecord(b, NULL));
        best = fmin(best, milliseconds(a, b));
    }
    *gbs = (double)bytes / best * 1e-6;
    CUDA(cudaFree(p));
    CUDA(cudaEventDestroy(a));
    CUDA(cudaEventDestroy(b));
    return ST_OK;
}

/* --- One batch ------------------------------------------------------------------------------ */

typedef struct {
    arena a;
    batch b;
    int32_t *token, *position, *seq_start, *kv_len, *page_start, *page;
    int64_t *id;
    sample_row *sample;
    sampled *drawn;
} step_batch;

static const sampling greedy = {.top_p = 1, .repetition_penalty = 1, .n_logprobs = -1};

static status step_batch_open(step_batch *s, int32_t n_seqs, int32_t ctx, int32_t n_new,
                              int32_t n_pages, int32_t vocab) {
    const int32_t each = (int32_t)div_up(ctx, KV_PAGE_TOKENS), n = n_seqs * n_new;
    TRY(arena_open(&s->a, (size_t)1 << 30));
    s->token = arena_array(&s->a, int32_t, (size_t)n);
    s->position = arena_array(&s->a, int32_t, (size_t)n);
    s->seq_start = arena_array(&s->a, int32_t, (size_t)n_seqs + 1);
    s->kv_len = arena_array(&s->a, int32_t, (size_t)n_seqs);
    s->page_start = arena_array(&s->a, int32_t, (size_t)n_seqs + 1);
    s->page = arena_array(&s->a, int32_t, (size_t)n_seqs * (size_t)each);
    s->id = arena_array(&s->a, int64_t, (size_t)n_seqs);
    s->sample = arena_array(&s->a, sample_row, (size_t)n_seqs);
    s->drawn = arena_array(&s->a, sampled, (size_t)n_seqs);
    if (!s->drawn) return FAIL(ST_NOMEM, "a batch of %d x %d", n_seqs, ctx);
    for (int32_t q = 0; q < n_seqs; q++) {
        for (int32_t i = 0; i < n_new; i++) {
            s->token[q * n_new + i] =
                (int32_t)((uint32_t)(q * 7919 + i * 104729 + 17) % (uint32_t)vocab);
            s->position[q * n_new + i] = ctx - n_new + i;
        }
        s->id[q] = q;
        s->kv_len[q] = ctx;
        s->seq_start[q + 1] = (q + 1) * n_new;
        s->page_start[q + 1] = (q + 1) * each;
        for (int32_t i = 0; i < each; i++) /* neighbours in time lie apart, as in a used pool */
            s->page[q * each + i] = (int32_t)(((int64_t)i * n_seqs + q) % n_pages);
        s->sample[q] = (sample_row){.row = (q + 1) * n_new - 1, .seq = q, .params = &greedy};
    }
    s->b = (batch){.n_seqs = n_seqs,
                   .n_tokens = n,
                   .n_samples = n_seqs,
                   .n_decodes = n_new == 1 ? n_seqs : 0,
                   .token = s->token,
                   .position = s->position,
                   .seq_start = s->seq_start,
                   .kv_len = s->kv_len,
                   .page_start = s->page_start,
                   .page = s->page,
                   .id = s->id,
                   .sample = s->sample};
    return ST_OK;
}

/* --- The step ------------------------------------------------------------------------------- */

static int ascending(const void *a, const void *b) {
    const double x = *(const double *)a, y = *(const double *)b;
    return x < y ? -1 : x > y;
}

/* Microseconds of a step: median, and the two quartiles. */
static status time_steps(forward *f, const batch *b, sampled *drawn, int32_t steps, double us[3]) {
    static double t[STEPS_MAX];
    timeline clock;
    int64_t cost;
    timeline_start_real(&clock);
    for (int i = 0; i < 4; i++) TRY(forward_step(f, b, drawn, &cost)); /* load, capture, warm */
    for (int32_t i = 0; i < steps; i++) {
        const int64_t before = timeline_now_ns(&clock);
        TRY(forward_step(f, b, drawn, &cost));
        t[i] = (double)(timeline_now_ns(&clock) - before) * 1e-3;
    }
    qsort(t, (size_t)steps, sizeof *t, ascending);
    us[0] = t[steps / 2];
    us[1] = t[steps / 4];
    us[2] = t[steps * 3 / 4];
    return ST_OK;
}

/* Bytes of weights that a step of n tokens reads, and operations of its products. */
static void count_weights(const model_config *c, const model_weights *w, int64_t n, int64_t n_seqs,
                          double *bytes, double *flops) {
    *bytes = (double)w->head.bytes + (double)w->norm.bytes + (double)n * c->dim * 2;
    *flops = 2.0 * (double)n_seqs * (double)w->head.n * w->head.k;
    for (int32_t l = 0; l < c->n_layers; l++) {
        const layer_weights *layer = &w->layer[l];
#define X(field, ...)                                                                              \
    {                                                                                              \
        const weight *x = &layer->field;                                                           \
        const bool experts = x->count > 1;                                                         \
        const double hit = experts ? 1 - pow(1 - (double)c->top_k / c->n_experts, (double)n) : 1;  \
        *bytes += hit * (double)x->bytes;                                                          \
        if (x->n > 1) *flops += 2.0 * (double)n * (experts ? c->top_k : 1) * (double)x->n * x->k;  \
    }
#include "layer.def"
#undef X
    }
}

/* Bytes of KV that are read, and operations of the scores and sums. */
static void count_attention(const model_config *c, const precision *p, int32_t tp, int32_t n_seqs,
                            int32_t ctx, int32_t n_new, double *bytes, double *flops) {
    const int32_t heads = c->n_heads / tp, kv_heads = c->n_kv_heads < tp ? 1 : c->n_kv_heads / tp;
    for (int32_t l = 0; l < c->n_layers; l++) {
        const kv_pair f = precision_kv(p, l);
        const int64_t row = kv_format_bytes((kv_format)f.k, c->head_dim) +
                            kv_format_bytes((kv_format)f.v, c->head_dim);
        const double window = c->window[l] ? fmin(c->window[l] + n_new - 1, ctx) : ctx;
        const double seen =
            c->window[l] ? fmin(c->window[l], ctx - (n_new - 1) / 2.0) : ctx - (n_new - 1) / 2.0;
        *bytes += (double)n_seqs * window * kv_heads * (double)row;
        *flops += 4.0 * n_seqs * n_new * seen * heads * c->head_dim;
    }
}

static status bench(const arguments *a) {
    engine_options o = ENGINE_OPTIONS_DEFAULT;
    const int32_t n_seqs = (int32_t)a->batch, ctx = (int32_t)a->ctx, n_new = (int32_t)a->n_new;
    o.model = a->model;
    o.precision = a->precision;
    o.device = "cuda";
    o.synthetic = true;
    o.device_options.no_graphs = a->no_graphs;
    o.device_options.tp = (int32_t)a->tp;
    TRY(device_family(&o.device_options.kernel_family, a->family));
    o.ctx_max = ctx;
    o.policy.max_seqs = n_seqs;
    o.policy.token_budget = n_seqs * n_new;
    o.pages = (int32_t)(n_seqs * div_up(ctx, KV_PAGE_TOKENS));
    struct cudaDeviceProp gpu;
    CUDA(cudaGetDeviceProperties(&gpu, 0));
    double read_gbs = a->read_gbs;
    if (read_gbs <= 0) TRY(measure_read(&read_gbs, gpu.multiProcessorCount));
    engine *e;
    TRY(engine_open(&e, &o, NULL, NULL));
    const model_config *c = engine_config(e);
    step_batch s = {0};
    double us[3], bytes, flops;
    status st =
        ctx > c->ctx_max ? FAIL(ST_RANGE, "%s takes %d tokens", c->name, c->ctx_max) : ST_OK;
    if (st == ST_OK)
        st = step_batch_open(&s, n_seqs, ctx, n_new, engine_capacity(e)->n_pages, c->vocab);
    if (st == ST_OK) st = time_steps(engine_forward(e), &s.b, s.drawn, (int32_t)a->steps, us);
    if (st == ST_OK) {
        count_weights(c, forward_weights(engine_forward(e)), n_seqs * n_new, n_seqs, &bytes,
                      &flops);
        count_attention(c, engine_precision(e), (int32_t)a->tp, n_seqs, ctx, n_new, &bytes, &flops);
        const double read_us = bytes / read_gbs * 1e-3;
        const double matrix_us = flops / a->matrix_tflops * 1e-6, roof = fmax(read_us, matrix_us);
        char name[PRECISION_NAME_MAX];
        printf(
            a->json
                ? "{\"kind\":\"step\",\"model\":\"%s\",\"precision\":\"%s\",\"tp\":%d,\"batch\":%d,"
                  "\"ctx\":%d,\"new\":%d,\"us\":%.1f,\"us_p25\":%.1f,\"us_p75\":%.1f,"
                  "\"roofline_us\":%.1f,\"ratio\":%.3f,\"bytes\":%.0f,\"flops\":%.0f,"
                  "\"read_gb_per_s\":%.0f,\"matrix_tflops\":%.0f}\n"
                : "%-18s %-14s tp %d batch %4d ctx %6d new %5d  %9.1f us (%.1f .. %.1f)  roofline "
                  "%9.1f us  ratio %.3f  (%.3g bytes, %.3g operations, %.0f GB/s, %.0f "
                  "TFLOP/s)\n",
            c->name, precision_name(engine_precision(e), name), (int)a->tp, n_seqs, ctx, n_new,
            us[0], us[1], us[2], roof, us[0] / roof, bytes, flops, read_gbs, a->matrix_tflops);
    }
    arena_close(&s.a);
    engine_close(e);
    return st;
}

int bench_step(int argc, char **argv); /* cmd_bench.c */

int bench_step(int argc, char **argv) {
    arguments a = {.precision = "W16A16KV16",
                   .batch = 1,
                   .ctx = 4096,
                   .n_new = 1,
                   .tp = 1,
                   .steps = 30,
                   .matrix_tflops = 780};
    const cli_option options[] = {
        {"--model", CLI_TEXT, &a.model, "NAME", "folder, or one of `amalgam models`"},
        {"--precision", CLI_TEXT, &a.precision, "NAME", "W16A16KV16"},
        {"--batch", CLI_INT, &a.batch, "N", "sequences (1)"},
        {"--ctx", CLI_INT, &a.ctx, "N", "tokens of each after the step (4096)"},
        {"--new", CLI_INT, &a.n_new, "N", "tokens that the step feeds to each (1: decode)"},
        {"--tp", CLI_INT, &a.tp, "N", "GPUs (1); the roofline is one rank's, without its sums"},
        {"--steps", CLI_INT, &a.steps, "N", "timed steps (30)"},
        {"--kernel-family", CLI_TEXT, &a.family, "F", "ampere or hopper"},
        {"--no-graphs", CLI_FLAG, &a.no_graphs, NULL, "launch decode steps kernel by kernel"},
        {"--read-gbs", CLI_NUMBER, &a.read_gbs, "X", "read ceiling, GB/s (measured)"},
        {"--matrix-tflops", CLI_NUMBER, &a.matrix_tflops, "X",
         "16-bit matrix rate (780: cuBLAS, H200)"},
        {"--json", CLI_FLAG, &a.json, NULL, "one object a line"},
        {NULL, CLI_FLAG, NULL, NULL, NULL},
    };
    int32_t none = 0;
    status st =
        cli_parse(argc - 1, argv + 1, "bench step --model NAME [options]", options, NULL, &none);
    if (st == ST_OK && !a.model) st = FAIL(ST_USAGE, "bench step needs --model");
    if (st == ST_OK && (a.batch < 1 || a.batch > 4096 || a.n_new < 1 || a.ctx < a.n_new ||
                        a.batch * a.n_new > 1 << 20 || a.ctx > 1 << 24 || a.steps < 1 || a.tp < 1 ||
                        a.steps > STEPS_MAX || a.matrix_tflops <= 0))
        st = FAIL(ST_USAGE, "--batch, --ctx, --new or --steps is out of range");
    if (st == ST_OK) st = bench(&a);
    return cli_exit(st);
}
