/* cmd_bench_linear.c - `amalgam bench linear`: time and error of the linear kernels, one line a
 * problem. Compiled where kernels are; the method of timing is linear_probe's. */
#include "bench_cuda.h"
#include "ceilings.h"
#include "cli.h"
#include "linear_probe.h"

#include <cuda_runtime_api.h>
#include <math.h>
#include <string.h>

typedef struct {
    const char *weights, *act, *dtype_name, *shapes, *rows, *kernel, *family;
    bool json, gather, gated, routed;
    int64_t replays, experts, top_k;
    double read_gbs, matrix_tflops; /* ceilings of the bound; 0: the GPU's */
} bench_options;

/* "w4g128", "a16" -> W4g128A16: names of precisions with a small first letter, as they are typed.
 * */
static status parse_weight(linear_weight *w, const bench_options *o) {
    char name[64];
    precision p;
    if (strlen(o->weights) < 2 || strlen(o->act) < 2 || strlen(o->weights) + strlen(o->act) > 60)
        return FAIL(ST_USAGE, "--weights %s --act %s", o->weights, o->act);
    snprintf(name, sizeof name, "W%sA%s", o->weights + 1, o->act + 1);
    TRY(precision_parse(&p, name));
    *w = (linear_weight){.format = p.weight, .group = p.group, .sym = p.sym, .count = 1};
    w->act = p.act;
    w->type = strcmp(o->dtype_name, "bf16") == 0 ? DT_BF16 : DT_F16;
    if (w->type == DT_F16 && strcmp(o->dtype_name, "f16") != 0 &&
        strcmp(o->dtype_name, "fp16") != 0)
        return FAIL(ST_USAGE, "--dtype %s: bf16 or fp16", o->dtype_name);
    if (o->family && strcmp(o->family, "ampere") == 0)
        w->family = 80;
    else if (o->family && strcmp(o->family, "hopper") == 0)
        w->family = 90;
    else if (o->family)
        return FAIL(ST_USAGE, "--kernel-family %s: ampere or hopper", o->family);
    return ST_OK;
}

/* Of a grouped problem m counts tokens, and only experts that are hit cost bytes. */
static void print(const bench_options *o, const linear_weight *w, int32_t m,
                  const linear_outcome *r) {
    const int64_t rows = o->experts > 1 ? m * o->top_k : m;
    const double flops = 2.0 * w->n * w->k * (double)rows, bytes = (double)r->bytes;
    const double gbs = bytes / r->us * 1e-3, tflops = flops / r->us * 1e-6;
    const double bound =
        fmax((bytes + (double)r->bytes_io) / o->read_gbs * 1e-3, flops / o->matrix_tflops * 1e-6);
    const char *type = w->type == DT_BF16 ? "bf16" : "fp16";
    if (o->json) {
        printf("{\"kind\":\"linear\",\"weights\":\"%s\",\"act\":\"%s\",\"dtype\":\"%s\",\"n\":%d,"
               "\"k\":%d,\"m\":%d,\"us\":%.3f,",
               o->weights, o->act, type, w->n, w->k, m, r->us);
        if (o->experts > 1)
            printf("\"experts\":%d,\"topk\":%d,\"gather\":%s,\"gated\":%s,", w->count,
                   (int)o->top_k, o->gather ? "true" : "false", o->gated ? "true" : "false");
        else
            printf("\"cublas_fp16_us\":%.3f,\"speedup\":%.4f,", r->cublas_us, r->cublas_us / r->us);
        printf(
            "\"gbs\":%.1f,\"tflops\":%.2f,\"roofline_us\":%.3f,\"ratio\":%.3f,"
            "\"read_gb_per_s\":%.0f,\"matrix_tflops\":%.0f,\"kernel\":\"%s\",\"rel_err\":%.3g}\n",
            gbs, tflops, bound, r->us / bound, o->read_gbs, o->matrix_tflops, r->kernel,
            r->rel_err);
    } else {
        printf("%-8s %-4s %5d x %-5d M %-5d %9.2f us  ", o->weights, type, w->n, w->k, m, r->us);
        if (o->experts <= 1) printf("%5.2f x cuBLAS  ", r->cublas_us / r->us);
        printf("%5.2f x bound  %6.0f GB/s %6.1f TFLOP/s  %s  error %.2g\n", r->us / bound, gbs,
               tflops, r->kernel, r->rel_err);
    }
    fflush(stdout);
}

static status bench_shape(const bench_options *o, linear_weight w) {
    linear_probe *p = NULL;
    TRY(linear_probe_open(&p, &w, true, 1));
    status st = ST_OK;
    for (const char *at = o->rows; at && st == ST_OK;
         at = strchr(at, ',') ? strchr(at, ',') + 1 : NULL) {
        linear_outcome r = {.us = 0};
        int m = 0;
        if (sscanf(at, "%d", &m) != 1) m = 0;
        linear_trial t = {.m = m, .y_type = w.type, .kernel = o->kernel};
        t.epilogue = o->gated ? LINEAR_GATED : LINEAR_STORE;
        if (w.count > 1) {
            t.top_k = (int32_t)o->top_k;
            t.m *= t.top_k;
            t.gather = o->gather;
            t.routed = o->routed;
        }
        if (t.m <= 0) st = FAIL(ST_USAGE, "--m %s", o->rows);
        if (st == ST_OK) st = linear_probe_check(p, &t, 4096, &r);
        if (st == ST_OK) st = linear_probe_time(p, &t, (int32_t)o->replays, true, &r);
        if (st == ST_OK) print(o, &w, m, &r);
    }
    linear_probe_close(p);
    return st;
}

/* What is not given of the bound's ceilings. */
static status find_ceilings(bench_options *o, dtype type) {
    double read, matrix;
    int gpu, n_sms;
    if (o->read_gbs > 0 && o->matrix_tflops > 0) return ST_OK;
    CUDA(cudaGetDevice(&gpu));
    CUDA(cudaDeviceGetAttribute(&n_sms, cudaDevAttrMultiProcessorCount, gpu));
    TRY(ceilings_measure(&read, &matrix, type, n_sms, NULL));
    if (!(o->read_gbs > 0)) o->read_gbs = read * 1e-9;
    if (!(o->matrix_tflops > 0)) o->matrix_tflops = matrix * 1e-12;
    return ST_OK;
}

int bench_linear(int argc, char **argv) {
    bench_options o = {.weights = "w4g128",
                       .act = "a16",
                       .dtype_name = "bf16",
                       .shapes = "6144x4096,4096x4096,28672x4096,4096x14336,57344x8192,8192x28672",
                       .rows = "1,2,4,8,16,32,64,128,256,512,1024,2048,4096",
                       .replays = 7,
                       .experts = 1,
                       .top_k = 8};
    const cli_option options[] = {
        {"--weights", CLI_TEXT, &o.weights, "FORMAT", "w16, w8, w4g128, wFP8, wMXFP4, ..."},
        {"--act", CLI_TEXT, &o.act, "FORMAT", "a16, a8, aFP8; the time has the quantisation of x"},
        {"--dtype", CLI_TEXT, &o.dtype_name, "TYPE", "bf16 or fp16: of x and y"},
        {"--shape", CLI_TEXT, &o.shapes, "NxK,..", "weights; default: six of Llama's"},
        {"--m", CLI_TEXT, &o.rows, "M,..", "rows of x; tokens, where there are experts"},
        {"--experts", CLI_INT, &o.experts, "N", "so many matrices: a grouped problem"},
        {"--topk", CLI_INT, &o.top_k, "N", "experts of a token (8)"},
        {"--gather", CLI_FLAG, &o.gather, NULL, "grouped: rows of x through an index"},
        {"--routed", CLI_FLAG, &o.routed, NULL, "grouped: after a linear with the same routing"},
        {"--gated", CLI_FLAG, &o.gated, NULL, "gate and up with the gated activation"},
        {"--read-gbs", CLI_NUMBER, &o.read_gbs, "X", "read ceiling, GB/s (the GPU's)"},
        {"--matrix-tflops", CLI_NUMBER, &o.matrix_tflops, "X", "16-bit matrix rate (the GPU's)"},
        {"--kernel", CLI_TEXT, &o.kernel, "NAME",
         "this variant instead of the table's, or a step of kernels/ladder"},
        {"--kernel-family", CLI_TEXT, &o.family, "NAME", "ampere: what runs below sm_90"},
        {"--replays", CLI_INT, &o.replays, "N", "graph replays; the median is printed"},
        {"--json", CLI_FLAG, &o.json, NULL, "one object a line"},
        {NULL, CLI_FLAG, NULL, NULL, NULL},
    };
    int32_t n = 0;
    linear_weight w;
    status st = cli_parse(argc - 1, argv + 1, "bench linear [options]", options, NULL, &n);
    if (st == ST_OK) st = parse_weight(&w, &o);
    const cli_range ranges[] = {{"--experts", o.experts, 1, 1 << 16},
                                {"--topk", o.top_k, 1, o.experts > 1 ? o.experts : INT32_MAX},
                                {"--replays", o.replays, 1, 1 << 16}};
    if (st == ST_OK) st = cli_check(ranges, COUNT_OF(ranges));
    w.count = (int32_t)o.experts;
    if (st == ST_OK) st = bench_cuda_open();
    if (st == ST_OK) st = find_ceilings(&o, w.type);
    for (const char *s = o.shapes; s && st == ST_OK;
         s = strchr(s, ',') ? strchr(s, ',') + 1 : NULL) {
        if (sscanf(s, "%dx%d", &w.n, &w.k) != 2) st = FAIL(ST_USAGE, "--shape %s", o.shapes);
        if (st == ST_OK) st = bench_shape(&o, w);
    }
    if (st == ST_OK && o.json) bench_print_gpu();
    return cli_exit(st);
}
