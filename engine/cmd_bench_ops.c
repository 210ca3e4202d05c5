/* cmd_bench_ops.c - `amalgam bench ops`: the small operations of a step, at the sizes of one model.
 *
 * Inputs are random (synthetic noise), never zeros. Each operation takes its buffers from a set
 * that is walked through and exceeds the GPU's L2, as a step does between two uses of an operation;
 * launches are replays of a CUDA graph, the time is the median of the replays over the launches in
 * it. floor_us is bytes in and out once at 4 TB/s, which no operation of a few rows comes near:
 * there the launch is the cost. */
#include "activation.h"
#include "bench_cuda.h"
#include "cli.h"
#include "draw.h"
#include "fill.h"
#include "model.h"
#include "moe.h"
#include "norm.h"
#include "rows.h"

#include <cuda_runtime_api.h>
#include <string.h>

enum { LAUNCHES = 64 };
static const double floor_bytes_per_us = 4e6;
static const int64_t SET_BYTES = 256 << 20;

/* Everything an operation may read or write; set i begins at i * stride bytes of each. */
typedef struct {
    const model_config *c;
    int64_t t; /* rows */
    uint8_t *in, *out, *other;
    float *weight;
    int32_t *index, *expert, *start, *slot_row, *row_token;
    draw_row *draw;
    int64_t sets, stride;
    cudaStream_t stream;
    bool json;
} bench;

typedef struct {
    const char *name;
    double (*bytes)(const bench *b); /* moved by one launch; 0 = the model has no such operation */
    status (*launch)(const bench *b, void *in, void *out, void *other);
} operation;

static int64_t ffn(const bench *b) { return b->c->n_experts ? b->c->expert_dim : b->c->ffn_dim; }
static int64_t slots(const bench *b) { return b->t * (b->c->n_experts ? b->c->top_k : 1); }

static double norm_bytes(const bench *b) { return 8.0 * (double)b->t * b->c->dim; }
static status norm_launch(const bench *b, void *in, void *out, void *other) {
    return kernel_norm_add(out, in, other, b->in, b->t, b->c->dim, 1e-5f, DT_F16, NULL, b->stream);
}

static double rows_bytes(const bench *b) { return 4.0 * (double)b->t * b->c->dim; }
static status rows_launch(const bench *b, void *in, void *out, void *other) {
    (void)other;
    return kernel_rows(out, in, b->index, b->t, b->c->dim, b->stream);
}

static double gated_bytes(const bench *b) { return 6.0 * (double)(slots(b) * ffn(b)); }
static status gated_launch(const bench *b, void *in, void *out, void *other) {
    (void)other;
    return kernel_gated(out, in, slots(b), (int32_t)ffn(b),
                        b->c->activation == ACT_SILU ? GATED_SILU : GATED_OAI,
                        (float)b->c->swiglu_limit, DT_F16, b->stream);
}

static double route_bytes(const bench *b) { return 4.0 * (double)b->t * b->c->n_experts; }
static status route_launch(const bench *b, void *in, void *out, void *other) {
    (void)out;
    (void)other;
    return kernel_moe_route(b->expert, b->weight, in, b->t, b->c->n_experts, b->c->top_k, true,
                            true, b->c->n_experts, DT_F32, b->stream);
}

static double permute_bytes(const bench *b) {
    return b->c->n_experts ? 12.0 * (double)slots(b) : 0;
}
static status permute_launch(const bench *b, void *in, void *out, void *other) {
    (void)in;
    (void)out;
    (void)other;
    return kernel_moe_permute(b->start, b->slot_row, b->row_token, b->expert, b->t, b->c->n_experts,
                              b->c->top_k, b->stream);
}

static status sort_launch(const bench *b, void *in, void *out, void *other) {
    (void)out;
    (void)other;
    return kernel_moe_sort(b->start, b->slot_row, b->row_token, b->expert, b->weight, in, b->t,
                           b->c->n_experts, b->c->top_k, true, true, b->c->n_experts, DT_F32,
                           b->stream);
}

static double combine_bytes(const bench *b) {
    return b->c->n_experts ? 2.0 * (double)(slots(b) + b->t) * b->c->dim : 0;
}
static status combine_launch(const bench *b, void *in, void *out, void *other) {
    (void)other;
    return kernel_moe_combine(out, in, b->weight, b->slot_row, b->t, b->c->top_k, b->c->dim, DT_F16,
                              b->stream);
}

static double draw_bytes(const bench *b) { return 4.0 * (double)b->t * b->c->vocab; }
static status draw_launch(const bench *b, void *in, void *out, void *other) {
    (void)other;
    return kernel_draw(out, in, b->draw, (int32_t)b->t, b->c->vocab, b->stream);
}

static const operation operations[] = {
    {"norm_add", norm_bytes, norm_launch},          {"rows", rows_bytes, rows_launch},
    {"gated", gated_bytes, gated_launch},           {"moe_route", route_bytes, route_launch},
    {"moe_permute", permute_bytes, permute_launch}, {"moe_sort", route_bytes, sort_launch},
    {"moe_combine", combine_bytes, combine_launch}, {"draw_greedy", draw_bytes, draw_launch},
    {"draw_top_p", draw_bytes, draw_launch},
};

static status record(const bench *b, const operation *op) {
    for (int64_t i = 0; i < LAUNCHES; i++) {
        const int64_t at = i % b->sets * b->stride;
        TRY(op->launch(b, b->in + at, b->out + at, b->other + at));
    }
    return ST_OK;
}

/* Microseconds of a launch. */
static status measure(const bench *b, const operation *op, double *us) {
    cudaGraph_t graph;
    TRY(record(b, op)); /* loads the kernel */
    CUDA(cudaStreamSynchronize(b->stream));
    CUDA(cudaStreamBeginCapture(b->stream, cudaStreamCaptureModeThreadLocal));
    const status st = record(b, op);
    CUDA(cudaStreamEndCapture(b->stream, &graph));
    TRY(st);
    return bench_replay(graph, b->stream, LAUNCHES, us);
}

/* Every row draws like this. */
static status set_draws(const bench *b, draw_row like) {
    draw_row *draw = mem_alloc((size_t)b->t, sizeof *draw);
    if (!draw) return FAIL(ST_NOMEM, "%lld rows", (long long)b->t);
    like.repetition_penalty = 1;
    like.n_logprobs = -1;
    like.kind = DRAW_TOKEN;
    like.seed = 1;
    for (int64_t i = 0; i < b->t; i++) {
        draw[i] = like;
        draw[i].to = (int32_t)i;
        draw[i].counter = (uint64_t)i;
    }
    const cudaError_t e = cudaMemcpyAsync(b->draw, draw, (size_t)b->t * sizeof *draw,
                                          cudaMemcpyHostToDevice, b->stream);
    mem_free(draw);
    return bench_cuda_check((int)e, "cudaMemcpyAsync of draws");
}

static status fill(bench *b) {
    const model_config *c = b->c;
    const int64_t n = slots(b), widest = i64_max(i64_max(2 * n * ffn(b), n * c->dim),
                                                 2 * b->t * c->vocab); /* 16-bit elements */
    b->stride = div_up(2 * widest, 256) * 256;
    b->sets = i64_max(1, i64_min(LAUNCHES, SET_BYTES / b->stride));
    const int64_t bytes = b->sets * b->stride;
    int32_t *index = mem_alloc((size_t)b->t, sizeof *index);
    if (!index) return FAIL(ST_NOMEM, "%lld rows", (long long)b->t);
    for (int64_t i = 0; i < b->t; i++) index[i] = (int32_t)((i * 7919) % b->t);
    CUDA(cudaStreamCreateWithFlags(&b->stream, cudaStreamNonBlocking));
    CUDA(cudaMalloc((void **)&b->in, (size_t)bytes));
    CUDA(cudaMalloc((void **)&b->out, (size_t)bytes));
    CUDA(cudaMalloc((void **)&b->other, (size_t)bytes));
    CUDA(cudaMalloc((void **)&b->weight, (size_t)n * 4));
    CUDA(cudaMalloc((void **)&b->index, (size_t)b->t * 4));
    CUDA(cudaMalloc((void **)&b->expert, (size_t)n * 4));
    CUDA(cudaMalloc((void **)&b->slot_row, (size_t)n * 4));
    CUDA(cudaMalloc((void **)&b->row_token, (size_t)n * 4));
    CUDA(cudaMalloc((void **)&b->start, (size_t)(c->n_experts + 1) * 4));
    CUDA(cudaMalloc((void **)&b->draw, (size_t)b->t * sizeof(draw_row)));
    CUDA(cudaMemcpyAsync(b->index, index, (size_t)b->t * 4, cudaMemcpyHostToDevice, b->stream));
    mem_free(index);
    TRY(set_draws(b, (draw_row){.top_p = 1}));
    TRY(kernel_fill_noise(b->other, DT_F16, bytes / 2, 3, 0, 1, 0, b->stream));
    return kernel_fill_noise(b->in, DT_F16, bytes / 2, 1, 0, 1, 0, b->stream);
}

/* The operations that read f32, which come after those of 16 bits in the table. */
static status refill_f32(bench *b) {
    return kernel_fill_noise(b->in, DT_F32, b->sets * b->stride / 4, 2, 0, 3, 0, b->stream);
}

static status run_all(bench *b) {
    TRY(fill(b));
    for (int32_t i = 0; i < COUNT_OF(operations); i++) {
        const operation *op = &operations[i];
        const double bytes = op->bytes(b);
        const bool f32 = strstr(op->name, "route") || strstr(op->name, "draw");
        if (bytes <= 0) continue;
        if (f32)
            TRY(refill_f32(b));
        else
            TRY(kernel_fill_noise(b->in, DT_F16, b->sets * b->stride / 2, 1, 0, 1, 0, b->stream));
        if (!strcmp(op->name, "draw_top_p"))
            TRY(set_draws(b, (draw_row){.temperature = 0.8f, .top_p = 0.95f, .top_k = 50}));
        double us = 0;
        TRY(measure(b, op, &us));
        printf(b->json
                   ? "{\"kind\":\"op\",\"model\":\"%s\",\"op\":\"%s\",\"rows\":%lld,\"us\":%.2f,"
                     "\"floor_us\":%.2f,\"bytes\":%.0f}\n"
                   : "%-18s %-12s rows %6lld %9.2f us   floor %9.2f us   %.3g bytes\n",
               b->c->name, op->name, (long long)b->t, us, bytes / floor_bytes_per_us, bytes);
    }
    return ST_OK;
}

static void close_bench(bench *b) {
    void *all[] = {b->in,     b->out,      b->other,     b->weight, b->index,
                   b->expert, b->slot_row, b->row_token, b->start,  b->draw};
    for (int32_t i = 0; i < COUNT_OF(all); i++) (void)cudaFree(all[i]);
    if (b->stream) (void)cudaStreamDestroy(b->stream);
}

int bench_ops(int argc, char **argv) {
    const char *model = "Llama-3.1-8B";
    int64_t rows = 64;
    bool json = false;
    const cli_option options[] = {
        {"--model", CLI_TEXT, &model, "NAME", "whose sizes (Llama-3.1-8B)"},
        {"--rows", CLI_INT, &rows, "T", "tokens of the step (64)"},
        {"--json", CLI_FLAG, &json, NULL, "one object a line"},
        {NULL, CLI_FLAG, NULL, NULL, NULL},
    };
    int32_t none = 0;
    char dir[1024];
    model_config c;
    status st = cli_parse(argc - 1, argv + 1, "bench ops [options]", options, NULL, &none);
    if (st == ST_OK) st = cli_check(&(cli_range){"--rows", rows, 1, 65536}, 1);
    if (st == ST_OK) st = model_dir(dir, sizeof dir, model);
    if (st == ST_OK) st = model_config_load(&c, dir);
    if (st == ST_OK) st = bench_cuda_open();
    if (st != ST_OK) return cli_exit(st);
    bench b = {.c = &c, .t = rows, .json = json};
    st = run_all(&b);
    close_bench(&b);
    return cli_exit(st);
}
