/* cmd_bench_attention.c - `amalgam bench attention`: microseconds, bandwidth and error of one
 * layer.
 *
 * Data are random (never zeros) and appended by the kernel that serving uses. KV sets rotate
 * through at least 512 MB, so that no cache of the GPU helps; runs are replays of a CUDA graph that
 * goes over all sets; the time is the median of the replays over the number of launches, with what
 * a launch writes out at 16 bit first (`kernel` says so), as the engine has it. The read
 * ceiling is measured in the same process. rel_err = ||out - ref|| / ||ref|| over sampled heads,
 * against the f64 definition over the dequantised cache. */
#include "attention.h"
#include "bandwidth.h"
#include "bench_cuda.h"
#include "cli.h"
#include "ref_attention.h"
#include "rng.h"

#include <cuda_runtime_api.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

enum { P = KV_PAGE_TOKENS, SLICE = 1024, LIST_MAX = 32 };
static const int64_t ROTATE_BYTES = 512 << 20;

typedef struct {
    bool prefill, json;
    bool expand_first; /* the cache is written out at 16 bit before each launch */
    dtype type;
    kv_format k, v;
    int32_t heads, kv_heads, head_dim, window, batch, ctx, n_new, family;
    int32_t last;       /* tokens of the last sequence, where that is not ctx */
    const char *kernel; /* NULL: the best */
} bench_case;

typedef struct {
    int32_t sm, n_sms;
    double read_gbs;
} bench_gpu;

/* Device memory of one case, freed together. */
typedef struct {
    void *p[24];
    int32_t n;
} bench_memory;

static status take(bench_memory *m, void **out, int64_t bytes) {
    CHECK(m->n < COUNT_OF(m->p));
    CUDA(cudaMalloc(out, (size_t)bytes));
    m->p[m->n++] = *out;
    return ST_OK;
}
static status take_copy(bench_memory *m, void **out, const void *host, int64_t bytes) {
    TRY(take(m, out, bytes));
    CUDA(cudaMemcpy(*out, host, (size_t)bytes, cudaMemcpyHostToDevice));
    return ST_OK;
}
static void give_back(bench_memory *m) {
    while (m->n > 0) cudaFree(m->p[--m->n]);
}

static float value16(uint16_t bits, dtype type) {
    return type == DT_F16 ? f32_from_f16(bits) : f32_from_bf16(bits);
}

/* [n] Gaussians of type. */
static status take_random(bench_memory *m, void **out, uint16_t **host, int64_t n, dtype type,
                          uint64_t seed) {
    *host = mem_alloc((size_t)n, sizeof **host);
    if (!*host) return FAIL(ST_NOMEM, "%lld values", (long long)n);
#pragma omp parallel for schedule(static)
    for (int64_t i = 0; i < n; i++) {
        uint64_t x = hash_u64((uint64_t)i, seed);
        const double u = ((double)(x >> 32) + 0.5) * 0x1p-32,
                     w = (double)(x & 0xffffffffu) * 0x1p-32;
        const float g = (float)(sqrt(-2 * log(u)) * cos(6.283185307179586 * w));
        (*host)[i] = type == DT_F16 ? f16_from_f32(g) : bf16_from_f32(g);
    }
    return take_copy(m, out, *host, 2 * n);
}

static int32_t length_of(const bench_case *c, int32_t s) {
    return c->last && s == c->batch - 1 ? c->last : c->ctx;
}
/* Pages before sequence s. */
static int64_t pages_before(const bench_case *c, int32_t s) {
    int64_t n = 0;
    for (int32_t i = 0; i < s; i++) n += div_up(length_of(c, i), P);
    return n;
}

/* --- One case --------------------------------------------------------------------------------- */

typedef struct {
    bench_memory m;
    attention_layer_params l;
    attention_cache cache, wide;  /* wide: a set at 16 bit, where expand_first */
    int32_t *in_order;            /* device: [set_pages] 0, 1, ..: the pages of `wide` */
    attention_batch host, device; /* device.page: of set 0 */
    int32_t *ints, *page;         /* host memory of the above; page ids of all sets */
    uint16_t *q;                  /* host [rows, (H + 2G) D] */
    void *qkv, *out;
    attention_work work;
    int64_t set_pages, page_bytes;
    int32_t n_sets;
} bench_run;

static int64_t kv_bytes(const bench_case *c, const bench_run *r) {
    return ((int64_t)(c->batch - 1) * c->ctx + length_of(c, c->batch - 1)) * r->page_bytes / P;
}

/* The cache of all sets, SLICE tokens at a time from one random input. */
static status fill_cache(bench_run *r, const bench_case *c, int32_t *device_pages) {
    const int64_t row = (int64_t)(c->heads + 2 * c->kv_heads) * c->head_dim;
    int32_t position[SLICE], zero[SLICE] = {0};
    for (int32_t i = 0; i < SLICE; i++) position[i] = i;
    void *input, *at, *seq;
    uint16_t *host;
    TRY(take_random(&r->m, &input, &host, SLICE * row, c->type, 1));
    mem_free(host);
    TRY(take_copy(&r->m, &at, position, sizeof position));
    TRY(take_copy(&r->m, &seq, zero, sizeof zero));
    for (int64_t page = 0; page < r->n_sets * r->set_pages; page += SLICE / P) {
        const int64_t pages = i64_min(SLICE / P, r->n_sets * r->set_pages - page);
        const attention_batch slice = {.n_seqs = 1,
                                       .n_tokens = (int32_t)pages * P,
                                       .position = at,
                                       .token_seq = seq,
                                       .page_start = seq,
                                       .page = device_pages + page};
        TRY(kernel_rope_append(input, &r->l, &r->cache, &slice, NULL));
    }
    CUDA(cudaDeviceSynchronize());
    return ST_OK;
}

/* Pages of all sets in random order. */
static status shuffle_pages(bench_run *r, const bench_case *c) {
    r->page_bytes = attention_page_bytes(c->k, c->v, c->kv_heads, c->head_dim);
    r->set_pages = pages_before(c, c->batch);
    r->n_sets = (int32_t)i64_max(1, div_up(ROTATE_BYTES, r->set_pages * r->page_bytes));
    const int64_t n = r->n_sets * r->set_pages;
    r->page = mem_alloc((size_t)n, sizeof *r->page);
    if (!r->page) return FAIL(ST_NOMEM, "page table of %lld", (long long)n);
    for (int64_t i = 0; i < n; i++) r->page[i] = (int32_t)i;
    for (int64_t i = n - 1; i > 0; i--) { /* Fisher-Yates */
        const int64_t j = (int64_t)(hash_u64((uint64_t)i, 7) % (uint64_t)(i + 1));
        const int32_t swap = r->page[i];
        r->page[i] = r->page[j];
        r->page[j] = swap;
    }
    return ST_OK;
}

/* r->host and r->device, the pages of set 0 in both. */
static status describe_batch(bench_run *r, const bench_case *c, int32_t *device_pages) {
    const int32_t rows = c->batch * c->n_new, S = c->batch, n = 2 * rows + 3 * S + 2;
    r->ints = mem_alloc((size_t)n, sizeof *r->ints);
    if (!r->ints) return FAIL(ST_NOMEM, "batch of %d rows", rows);
    int32_t *position = r->ints, *token_seq = position + rows, *seq_start = token_seq + rows;
    int32_t *page_start = seq_start + S + 1, *kv_len = page_start + S + 1;
    for (int32_t s = 0; s <= S; s++) {
        seq_start[s] = s * c->n_new;
        page_start[s] = (int32_t)pages_before(c, s);
    }
    for (int32_t t = 0; t < rows; t++) {
        token_seq[t] = t / c->n_new;
        position[t] = length_of(c, t / c->n_new) - c->n_new + t % c->n_new;
    }
    for (int32_t s = 0; s < S; s++) kv_len[s] = length_of(c, s);
    r->host = (attention_batch){.n_seqs = S,
                                .n_tokens = rows,
                                .n_decodes = c->prefill ? 0 : S,
                                .position = position,
                                .seq_start = seq_start,
                                .token_seq = token_seq,
                                .kv_len = kv_len,
                                .page_start = page_start,
                                .page = r->page};
    void *copy;
    TRY(take_copy(&r->m, &copy, r->ints, n * (int64_t)sizeof *r->ints));
    int32_t *ints = copy;
    r->device = r->host;
    r->device.position = ints + (position - r->ints);
    r->device.token_seq = ints + (token_seq - r->ints);
    r->device.seq_start = ints + (seq_start - r->ints);
    r->device.page_start = ints + (page_start - r->ints);
    r->device.kv_len = ints + (kv_len - r->ints);
    r->device.page = device_pages;
    return ST_OK;
}

static status describe_layer(bench_run *r, const bench_case *c) {
    float *turn = mem_alloc((size_t)SLICE * (size_t)c->head_dim, sizeof *turn);
    if (!turn) return FAIL(ST_NOMEM, "rope table");
    for (int32_t p = 0; p < SLICE; p++)
        for (int32_t d = 0; d < c->head_dim / 2; d++) {
            const double angle = p * pow(10000, -2.0 * d / c->head_dim);
            turn[p * c->head_dim + 2 * d] = (float)cos(angle);
            turn[p * c->head_dim + 2 * d + 1] = (float)sin(angle);
        }
    void *rope;
    status st = take_copy(&r->m, &rope, turn, (int64_t)SLICE * c->head_dim * (int64_t)sizeof *turn);
    mem_free(turn);
    TRY(st);
    r->l = (attention_layer_params){.type = c->type,
                                    .n_heads = c->heads,
                                    .n_kv_heads = c->kv_heads,
                                    .head_dim = c->head_dim,
                                    .window = c->window,
                                    .scale = 1 / sqrtf((float)c->head_dim),
                                    .rope_cos_sin = rope};
    return ST_OK;
}

static status make_plan(bench_run *r, const bench_case *c, const bench_gpu *g) {
    const int64_t bytes = attention_plan_bytes(c->batch, r->host.n_tokens, r->set_pages);
    void *plan = mem_alloc((size_t)bytes, 1);
    if (!plan) return FAIL(ST_NOMEM, "plan of %lld bytes", (long long)bytes);
    const bool codes = c->k != KF_16 && c->v != KF_16;
    const int32_t longest = (int32_t)i64_max(c->ctx, c->last);
    int64_t room = attention_wide_pages(r->host.n_tokens, longest, c->heads / c->kv_heads);
    if (!codes || c->expand_first || c->kernel) room = 0;
    status st = attention_plan_make(
        plan, &r->work.counts, &r->host, c->heads, c->kv_heads, c->head_dim, c->window,
        !c->expand_first && c->k == KF_4 && c->v == KF_4, (int32_t)room, g->n_sms);
    void *copy = NULL;
    if (st == ST_OK) st = take_copy(&r->m, &copy, plan, r->work.counts.bytes);
    r->work.plan = copy;
    mem_free(plan);
    TRY(st);
    if (room == 0) return ST_OK;
    const int64_t wide = attention_page_bytes(KF_16, KF_16, c->kv_heads, c->head_dim);
    return take(&r->m, &r->work.wide, room * wide);
}

/* expand_first: one set's pages at 16 bit, in order. */
static status take_wide(bench_run *r, const bench_case *c) {
    const int64_t bytes = attention_page_bytes(KF_16, KF_16, c->kv_heads, c->head_dim);
    r->wide = (attention_cache){NULL, bytes, KF_16, KF_16};
    TRY(take(&r->m, &r->wide.base, r->set_pages * bytes));
    int32_t *in_order = mem_alloc((size_t)r->set_pages, sizeof *in_order);
    if (!in_order) return FAIL(ST_NOMEM, "page table");
    for (int32_t i = 0; i < r->set_pages; i++) in_order[i] = i;
    void *copy;
    const status st = take_copy(&r->m, &copy, in_order, r->set_pages * (int64_t)sizeof *in_order);
    if (st == ST_OK) r->in_order = copy;
    mem_free(in_order);
    return st;
}

static status open_run(bench_run *r, const bench_case *c, const bench_gpu *g) {
    memset(r, 0, sizeof *r);
    TRY(shuffle_pages(r, c));
    const int64_t n_pages = r->n_sets * r->set_pages;
    void *pages, *base;
    TRY(take_copy(&r->m, &pages, r->page, n_pages * (int64_t)sizeof *r->page));
    TRY(describe_batch(r, c, pages));
    TRY(describe_layer(r, c));
    TRY(take(&r->m, &base, n_pages * r->page_bytes));
    r->cache = (attention_cache){base, r->page_bytes, c->k, c->v};
    if (c->expand_first) TRY(take_wide(r, c));
    TRY(fill_cache(r, c, pages));

    const int64_t rows = r->host.n_tokens,
                  row = (c->heads + 2 * c->kv_heads) * (int64_t)c->head_dim;
    TRY(take_random(&r->m, &r->qkv, &r->q, rows * row, c->type, 2));
    TRY(take(&r->m, &r->out, rows * c->heads * c->head_dim * 2));
    TRY(make_plan(r, c, g));
    const int64_t bytes = attention_workspace_bytes(c->batch, r->set_pages, c->heads, c->head_dim);
    TRY(take(&r->m, &r->work.workspace, bytes));
    CUDA(cudaMemset(r->work.workspace, 0, (size_t)bytes));
    return ST_OK;
}

static void close_run(bench_run *r) {
    give_back(&r->m);
    mem_free(r->ints);
    mem_free(r->page);
    mem_free(r->q);
}

static status launch(bench_run *r, const bench_case *c, const bench_gpu *g, int32_t set,
                     cudaStream_t stream) {
    attention_batch b = r->device;
    b.page += set * r->set_pages;
    if (c->expand_first) {
        TRY(kernel_attention_expand(&r->wide, &r->cache, c->kv_heads, c->head_dim, b.page,
                                    (int32_t)r->set_pages, stream));
        b.page = r->in_order;
    }
    return kernel_attention(r->out, r->qkv, &r->l, c->expand_first ? &r->wide : &r->cache, &b,
                            &r->work, c->kernel, c->family, g->sm, g->n_sms, stream);
}

static status time_run(bench_run *r, const bench_case *c, const bench_gpu *g, double *us) {
    cudaStream_t stream;
    cudaGraph_t graph;
    const int32_t n = (int32_t)i64_max(r->n_sets, c->prefill ? 3 : 8);
    CUDA(cudaStreamCreate(&stream));
    TRY(launch(r, c, g, 0, stream)); /* loads the module outside the capture */
    CUDA(cudaStreamSynchronize(stream));
    CUDA(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
    status st = ST_OK;
    for (int32_t i = 0; i < n && st == ST_OK; i++) st = launch(r, c, g, i % r->n_sets, stream);
    CUDA(cudaStreamEndCapture(stream, &graph));
    TRY(st);
    TRY(bench_replay(graph, stream, n, us));
    CUDA(cudaStreamDestroy(stream));
    return ST_OK;
}

enum { HEADS = 3 }; /* that are compared: the first, the middle, the last */

/* Host memory of a comparison. */
typedef struct {
    int32_t head[HEADS], pages;
    uint16_t *out; /* [n_new, H, D] of sequence 0 */
    uint8_t *page;
    float *k, *v;   /* [P, G, D] of one page */
    float *kh, *vh; /* [HEADS, pages P, D] */
} comparison;

/* The heads' keys and values of set 0's sequence 0, as the cache holds them. */
static status gather_heads(comparison *x, const bench_run *r, const bench_case *c) {
    const int32_t d = c->head_dim, G = c->kv_heads, ratio = c->heads / G;
    for (int32_t p = 0; p < x->pages; p++) {
        CUDA(cudaMemcpy(x->page, (uint8_t *)r->cache.base + r->page[p] * r->page_bytes,
                        (size_t)r->page_bytes, cudaMemcpyDeviceToHost));
        attention_unpack_page(x->k, x->v, x->page, c->k, c->v, c->type, G, d);
        for (int32_t h = 0; h < HEADS; h++)
            for (int32_t t = 0; t < P; t++) {
                const int64_t to = (((int64_t)h * x->pages + p) * P + t) * d;
                const int64_t from = (int64_t)t * G * d + x->head[h] / ratio * d;
                memcpy(x->kh + to, x->k + from, (size_t)d * sizeof(float));
                memcpy(x->vh + to, x->v + from, (size_t)d * sizeof(float));
            }
    }
    return ST_OK;
}

/* Over the heads of the last new token and of another. */
static double compare_heads(const comparison *x, const bench_run *r, const bench_case *c) {
    const int32_t d = c->head_dim;
    double error = 0, norm = 0;
#pragma omp parallel for reduction(+ : error, norm)
    for (int32_t i = 0; i < 2 * HEADS; i++) {
        const int32_t h = i / 2, t = i % 2 ? c->n_new - 1 : c->n_new / 3;
        float q[1024], ref[1024];
        const int64_t row = (int64_t)t * (c->heads + 2 * c->kv_heads) + x->head[h];
        const int64_t at = (int64_t)h * x->pages * P * d;
        const uint16_t *out = x->out + ((int64_t)t * c->heads + x->head[h]) * d;
        for (int32_t e = 0; e < d; e++) q[e] = value16(r->q[row * d + e], c->type);
        ref_attention(ref, d, q, d, x->kh + at, x->vh + at, 1, c->ctx - c->n_new + t, d, c->window,
                      r->l.scale, NULL);
        for (int32_t e = 0; e < d; e++) {
            const double got = (double)value16(out[e], c->type), want = (double)ref[e];
            error += (got - want) * (got - want);
            norm += want * want;
        }
    }
    return sqrt(error / norm);
}

/* Sampled heads of the last token and another of sequence 0, set 0. */
static status measure_error(bench_run *r, const bench_case *c, const bench_gpu *g,
                            double *rel_err) {
    const size_t d = (size_t)c->head_dim, row = (size_t)c->heads * d, gd = (size_t)c->kv_heads * d,
                 pages = (size_t)div_up(c->ctx, P);
    CUDA(cudaMemset(r->out, 0xff, (size_t)c->batch * (size_t)c->n_new * row * 2));
    TRY(launch(r, c, g, 0, NULL));
    CUDA(cudaDeviceSynchronize());
    comparison x = {.head = {0, c->heads / 2, c->heads - 1},
                    .pages = (int32_t)pages,
                    .out = mem_alloc((size_t)c->n_new * row, sizeof *x.out),
                    .page = mem_alloc((size_t)r->page_bytes, 1),
                    .k = mem_alloc(P * gd, sizeof *x.k),
                    .v = mem_alloc(P * gd, sizeof *x.v),
                    .kh = mem_alloc(HEADS * pages * P * d, sizeof *x.kh),
                    .vh = mem_alloc(HEADS * pages * P * d, sizeof *x.vh)};
    const bool enough = x.out && x.page && x.k && x.v && x.kh && x.vh;
    status st = enough ? bench_cuda_check((int)cudaMemcpy(x.out, r->out, (size_t)c->n_new * row * 2,
                                                          cudaMemcpyDeviceToHost),
                                          "output")
                       : FAIL(ST_NOMEM, "reference");
    if (st == ST_OK) st = gather_heads(&x, r, c);
    if (st == ST_OK) *rel_err = compare_heads(&x, r, c);
    mem_free(x.out), mem_free(x.page), mem_free(x.k), mem_free(x.v), mem_free(x.kh), mem_free(x.vh);
    return st;
}

/* Multiply-adds of Q K^T and P V that the mask leaves, times two. */
static double flops(const bench_case *c) {
    double seen = 0;
    for (int32_t s = 0; s < c->batch; s++)
        for (int32_t t = 0; t < c->n_new; t++) {
            const int32_t n = length_of(c, s) - c->n_new + t + 1;
            seen += c->window > 0 && n > c->window ? c->window : n;
        }
    return 4.0 * seen * c->heads * c->head_dim;
}

static const char json_line[] =
    "{\"kind\":\"attention\",\"phase\":\"%s\",\"kv\":\"%s\",\"dtype\":\"%s\",\"hq\":%d,"
    "\"hkv\":%d,\"d\":%d,\"batch\":%d,\"ctx\":%d,\"last\":%d,\"new\":%d,\"us\":%.2f,\"gbs\":%.1f,"
    "\"pct_read\":%.1f,\"tflops\":%.1f,\"kernel\":\"%s%s\",\"rel_err\":%.3g}\n";
static const char text_line[] =
    "%-8s %-6s %-4s %3d/%-3d d%-3d %4d x %-6d last %-6d new %-5d %10.2f us %8.1f GB/s %5.1f%% of "
    "read %7.1f TFLOP/s  %s%s  rel_err %.3g\n";

static void print_case(const bench_case *c, const bench_gpu *g, const bench_run *r, double us,
                       double rel_err) {
    const double gbs = (double)kv_bytes(c, r) / us * 1e-3, tflops = flops(c) / us * 1e-6;
    const char *kernel = c->expand_first   ? "expand_first"
                         : c->kernel       ? c->kernel
                         : !c->family      ? "best"
                         : c->family == 80 ? "family80"
                                           : "family90";
    char kv[16];
    snprintf(kv, sizeof kv, c->k == c->v ? "KV%s" : "K%sV%s", kv_format_text(c->k),
             kv_format_text(c->v));
    printf(c->json ? json_line : text_line, c->prefill ? "prefill" : "decode", kv,
           dtype_text(c->type), c->heads, c->kv_heads, c->head_dim, c->batch, c->ctx,
           length_of(c, c->batch - 1), c->n_new, us, gbs, gbs / g->read_gbs * 100, tflops, kernel,
           r->work.counts.n_wide ? ", written out" : "", rel_err);
    fflush(stdout);
}

static status bench_one(const bench_case *c, const bench_gpu *g) {
    bench_run r;
    double us = 0, rel_err = NAN;
    status st = open_run(&r, c, g);
    if (st == ST_OK) st = time_run(&r, c, g, &us);
    if (st == ST_OK) st = measure_error(&r, c, g, &rel_err);
    if (st == ST_OK) print_case(c, g, &r, us, rel_err);
    close_run(&r);
    return st;
}

/* Grid-stride read of 2 GB. */
static status measure_ceiling(bench_gpu *g, bool json) {
    const int64_t bytes = (int64_t)2 << 30;
    void *from, *sum;
    cudaStream_t stream;
    cudaGraph_t graph;
    double us;
    CUDA(cudaMalloc(&from, (size_t)bytes));
    CUDA(cudaMalloc(&sum, 4));
    CUDA(cudaMemset(from, 0x5a, (size_t)bytes));
    CUDA(cudaStreamCreate(&stream));
    TRY(kernel_read(sum, from, bytes, g->n_sms, stream));
    CUDA(cudaStreamSynchronize(stream));
    CUDA(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
    for (int32_t i = 0; i < 3; i++) TRY(kernel_read(sum, from, bytes, g->n_sms, stream));
    CUDA(cudaStreamEndCapture(stream, &graph));
    TRY(bench_replay(graph, stream, 3, &us));
    CUDA(cudaFree(from));
    CUDA(cudaFree(sum));
    g->read_gbs = (double)bytes / us * 1e-3;
    printf(json ? "{\"kind\":\"ceiling\",\"read_gbs\":%.1f}\n" : "read ceiling %.1f GB/s\n",
           g->read_gbs);
    return ST_OK;
}

static status open_gpu(bench_gpu *g, bool json) {
    struct cudaDeviceProp prop;
    TRY(bench_cuda_open());
    CUDA(cudaGetDeviceProperties(&prop, 0));
    g->sm = prop.major * 10 + prop.minor;
    g->n_sms = prop.multiProcessorCount;
    return measure_ceiling(g, json);
}

/* --- Options ---------------------------------------------------------------------------------- */

/* "kv16", "kvfp8", "k8v4", ... in any case. */
static status parse_kv(const char *given, kv_format *k, kv_format *v) {
    char name[PRECISION_NAME_MAX] = "W16A16";
    size_t n = strlen(name);
    for (; *given && n + 1 < sizeof name; given++)
        name[n++] = (char)(*given >= 'a' && *given <= 'z' ? *given - 'a' + 'A' : *given);
    name[n] = 0;
    precision p;
    TRY(precision_parse(&p, name));
    *k = (kv_format)p.kv.k;
    *v = (kv_format)p.kv.v;
    return ST_OK;
}

static int32_t split(char *list, char **item) {
    int32_t n = 0;
    for (char *p = strtok(list, ","); p && n < LIST_MAX; p = strtok(NULL, ",")) item[n++] = p;
    return n;
}

/* Every format of `kv` at every "batch x ctx" of `shapes`. */
static status bench_all(bench_case *c, char *kv, char *shapes, int64_t n_new, const bench_gpu *g) {
    char *format[LIST_MAX], *shape[LIST_MAX];
    const int32_t n_formats = split(kv, format), n_shapes = split(shapes, shape);
    for (int32_t i = 0; i < n_shapes; i++)
        for (int32_t f = 0; f < n_formats; f++) {
            c->last = 0;
            if (sscanf(shape[i], "%dx%d+%d", &c->batch, &c->ctx, &c->last) < 2 || c->batch < 1 ||
                c->ctx < 1 || c->last < 0)
                return FAIL(ST_USAGE, "'%s' is no BATCHxCTX", shape[i]);
            if (c->last) c->batch++;
            TRY(parse_kv(format[f], &c->k, &c->v));
            c->n_new = c->prefill ? (int32_t)(n_new ? i64_min(n_new, c->ctx) : c->ctx) : 1;
            TRY(bench_one(c, g));
        }
    return ST_OK;
}

static status check_word(const char *option, const char *value, const char *one,
                         const char *other) {
    if (strcmp(value, one) == 0 || strcmp(value, other) == 0) return ST_OK;
    return FAIL(ST_USAGE, "%s '%s' is neither %s nor %s", option, value, one, other);
}

int bench_attention(int argc, char **argv) {
    const char *phase = "decode", *kv = "kv16", *type = "fp16", *heads = "32/8", *shapes = NULL;
    const char *kernel = NULL, *family = NULL;
    int64_t head_dim = 128, batch = 64, ctx = 4096, n_new = 0, window = 0;
    bool json = false, expand_first = false;
    const cli_option options[] = {
        {"--phase", CLI_TEXT, &phase, "P", "decode or prefill"},
        {"--kv", CLI_TEXT, &kv, "F", "formats: kv16,kvfp8,kv8,kv4,k8v4"},
        {"--dtype", CLI_TEXT, &type, "T", "fp16 or bf16"},
        {"--heads", CLI_TEXT, &heads, "H/G", "query and KV heads"},
        {"--head-dim", CLI_INT, &head_dim, "D", "64, 128 or 256"},
        {"--batch", CLI_INT, &batch, "N", "sequences"},
        {"--ctx", CLI_INT, &ctx, "N", "tokens of each, the new ones included"},
        {"--shapes", CLI_TEXT, &shapes, "BxC", "a list instead; BxC+L: and one of L"},
        {"--new", CLI_INT, &n_new, "N", "prefill: new tokens (default: all)"},
        {"--window", CLI_INT, &window, "N", "sliding window"},
        {"--kernel", CLI_TEXT, &kernel, "NAME", "force a variant, pages as they are"},
        {"--kernel-family", CLI_TEXT, &family, "F", "ampere or hopper"},
        {"--expand-first", CLI_FLAG, &expand_first, NULL,
         "baseline: write the cache out at 16 bit before each launch"},
        {"--json", CLI_FLAG, &json, NULL, "one object a line"},
        {NULL, CLI_FLAG, NULL, NULL, NULL},
    };
    int32_t none = 0;
    status st = cli_parse(argc - 1, argv + 1, "bench attention [options]", options, NULL, &none);
    bench_case c = {.json = json,
                    .expand_first = expand_first,
                    .prefill = !strcmp(phase, "prefill"),
                    .type = !strcmp(type, "bf16") ? DT_BF16 : DT_F16,
                    .head_dim = (int32_t)head_dim,
                    .window = (int32_t)window,
                    .kernel = kernel,
                    .family = !family                     ? 0
                              : !strcmp(family, "ampere") ? 80
                                                          : 90};
    if (st == ST_OK) st = check_word("--phase", phase, "decode", "prefill");
    if (st == ST_OK) st = check_word("--dtype", type, "fp16", "bf16");
    if (st == ST_OK && family) st = check_word("--kernel-family", family, "hopper", "ampere");
    const cli_range ranges[] = {{"--head-dim", head_dim, 1, 1024},
                                {"--batch", batch, 1, 1 << 20},
                                {"--ctx", ctx, 1, 1 << 24},
                                {"--new", n_new, 0, 1 << 24},
                                {"--window", window, 0, 1 << 24}};
    if (st == ST_OK) st = cli_check(ranges, COUNT_OF(ranges));
    if (st == ST_OK && sscanf(heads, "%d/%d", &c.heads, &c.kv_heads) != 2)
        st = FAIL(ST_USAGE, "'%s' is no H/G", heads);
    char list[256], formats[256];
    if (shapes)
        snprintf(list, sizeof list, "%s", shapes);
    else
        snprintf(list, sizeof list, "%lldx%lld", (long long)batch, (long long)ctx);
    snprintf(formats, sizeof formats, "%s", kv);
    if (st == ST_OK && expand_first && c.type != DT_F16)
        st = FAIL(ST_UNSUPPORTED, "--expand-first: values are numbers of fp16");
    bench_gpu g = {0};
    if (st == ST_OK) st = open_gpu(&g, json);
    if (st == ST_OK) st = bench_all(&c, formats, list, n_new, &g);
    if (st == ST_OK && json) bench_print_gpu();
    return cli_exit(st);
}
