/* cmd_bench_tune.c - `amalgam tune`: every kernel that accepts a kind of problem is timed, and the
 * best go to a table that is checked in (linear_tuned.def). Compiled where kernels are. */
#include "bench_cuda.h"
#include "cli.h"
#include "linear_launch.h"
#include "linear_probe.h"
#include "nvml.h"
#include "version.h"

#include <cuda_runtime_api.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

enum { SHAPES = 3, NAMES = 4 };

static const char *const formats[] = {
    "W16A16",   "W8A16",     "W4A16",     "W4g64A16", "W4g32A16", "W4g16A16", "WFP8A16",
    "WFP8bA16", "WMXFP4A16", "WNVFP4A16", "W8A8",     "W4A8",     "WFP8AFP8", "WFP8bAFP8",
};

/* Matrices of each size class (linear_size_class), of Llama-3.1 and Qwen3-32B; 4096 x 7168 is down
 * of Llama-3.1-8B on two GPUs. */
static const int32_t shapes[][SHAPES][2] = {
    {{6144, 4096}, {4096, 4096}, {4096, 7168}},
    {{10240, 5120}, {4096, 14336}, {5120, 8192}},
    {{28672, 4096}, {10240, 8192}, {5120, 25600}},
    {{57344, 8192}, {8192, 28672}, {51200, 5120}},
};
static const int32_t rows[] = {1, 8, 16, 32, 64, 128, 256, 512, 1024, 4096};

typedef struct {
    const char *name;
    double us[SHAPES]; /* of the row under way; 0 = does not run */
    double ratio;      /* to the best, geometric mean over the shapes */
    bool out;          /* far behind and falling back: not tried with more rows */
} candidate;

typedef struct {
    candidate kernel[LINEAR_VARIANTS_MAX];
    int32_t n;
    int64_t replays;
    FILE *out;
} tuner;

static status time_all(tuner *t, linear_probe *p, const linear_weight *w, int32_t m,
                       int32_t shape) {
    for (int32_t i = 0; i < t->n; i++) {
        candidate *c = &t->kernel[i];
        const linear_trial trial = {.m = m, .y_type = w->type, .kernel = c->name};
        linear_outcome o = {.us = 0};
        c->us[shape] = 0;
        if (c->out) continue;
        const status st = linear_probe_time(p, &trial, (int32_t)t->replays, false, &o);
        if (st == ST_OK)
            c->us[shape] = o.us;
        else if (st != ST_UNSUPPORTED)
            return st;
    }
    return ST_OK;
}

static int by_ratio(const void *a, const void *b) {
    const double x = ((const candidate *)a)->ratio, y = ((const candidate *)b)->ratio;
    return (x > y) - (x < y);
}

/* Ratios to the best of each shape; what fails anywhere is infinitely far. */
static void rank(tuner *t) {
    double best[SHAPES];
    for (int32_t s = 0; s < SHAPES; s++) {
        best[s] = INFINITY;
        for (int32_t i = 0; i < t->n; i++)
            if (t->kernel[i].us[s] > 0) best[s] = fmin(best[s], t->kernel[i].us[s]);
    }
    for (int32_t i = 0; i < t->n; i++) {
        candidate *c = &t->kernel[i];
        const double before = c->ratio;
        c->ratio = 1;
        for (int32_t s = 0; s < SHAPES; s++)
            c->ratio *= c->us[s] > 0 ? pow(c->us[s] / best[s], 1.0 / SHAPES) : INFINITY;
        /* Tall kernels stay as far behind while rows are few: they are to be tried with more. */
        if (c->ratio > 2.5 && before > 0 && c->ratio > 1.2 * before) c->out = true;
    }
}

/* The row of the table: up to NAMES kernels within half of the best. */
static void write_row(tuner *t, const linear_weight *w, const char *format, const char *act,
                      int32_t size_log2, int32_t m) {
    candidate sorted[LINEAR_VARIANTS_MAX];
    memcpy(sorted, t->kernel, sizeof sorted);
    qsort(sorted, (size_t)t->n, sizeof *sorted, by_ratio);
    if (t->n == 0 || !isfinite(sorted[0].ratio)) return;
    fprintf(t->out, "TUNED(%s, %s, %d, %d, %d", format, act, linear_layout_of(w).granule, size_log2,
            m);
    printf("%s/%s n*k < 2^%d M %d:", format, act, size_log2, m);
    for (int32_t i = 0; i < NAMES && i < t->n && sorted[i].ratio < 1.5; i++) {
        fprintf(t->out, ", \"%s\"", sorted[i].name);
        printf(" %s %.2f", sorted[i].name, sorted[i].ratio);
    }
    fprintf(t->out, ")\n");
    printf("\n");
    fflush(stdout);
}

static const char *const weight_names[] = {
#define WEIGHT(name, ...) #name,
#include "precision.def"
};
static const char *const act_names[] = {
#define ACT(name, ...) #name,
#include "precision.def"
};

static status tune_class(tuner *t, const precision *p, int32_t which) {
    linear_probe *probe[SHAPES] = {NULL};
    linear_weight w = {.format = p->weight,
                       .group = p->group,
                       .sym = p->sym,
                       .act = p->act,
                       .type = DT_BF16,
                       .count = 1,
                       .family = linear_family(linear_probe_sm(), 0)};
    status st = ST_OK;
    t->n = 0;
    for (const char *const *v = linear_variants(w.family); *v; v++)
        t->kernel[t->n++] = (candidate){.name = *v};
    for (int32_t s = 0; s < SHAPES && st == ST_OK; s++) {
        w.n = shapes[which][s][0];
        w.k = shapes[which][s][1];
        st = linear_probe_open(&probe[s], &w, true, 1);
    }
    for (int32_t i = 0; i < COUNT_OF(rows) && st == ST_OK; i++) {
        for (int32_t s = 0; s < SHAPES && st == ST_OK; s++)
            st = time_all(t, probe[s], &w, rows[i], s);
        if (st != ST_OK) break;
        rank(t);
        write_row(t, &w, weight_names[p->weight], act_names[p->act], linear_size_class(w.n, w.k),
                  rows[i]);
    }
    for (int32_t s = 0; s < SHAPES; s++) linear_probe_close(probe[s]);
    return st;
}

static status tune(tuner *t, const char *only) {
    struct cudaDeviceProp gpu;
    CUDA(cudaGetDeviceProperties(&gpu, 0));
    fprintf(
        t->out,
        "/* Made by `amalgam tune` on GPU(\"%s\", %d, %d) at commit %s%s%s, %lld replays each;\n"
        "   do not edit. */\n",
        gpu.name, gpu.major * 10 + gpu.minor, gpu.multiProcessorCount, AMALGAM_COMMIT,
        AMALGAM_DIFF[0] ? "-dirty-" : "", AMALGAM_DIFF, (long long)t->replays);
    for (int32_t f = 0; f < COUNT_OF(formats); f++) {
        precision p;
        if (only && strcmp(only, formats[f]) != 0) continue;
        TRY(precision_parse(&p, formats[f]));
        for (int32_t c = 0; c < COUNT_OF(shapes); c++) TRY(tune_class(t, &p, c));
    }
    return ST_OK;
}

/* The name of one of the formats, or none. */
static status check_format(const char *only) {
    char names[256] = "";
    size_t n = 0;
    for (int32_t f = 0; f < COUNT_OF(formats); f++) {
        if (!only || strcmp(only, formats[f]) == 0) return ST_OK;
        n += (size_t)snprintf(names + n, sizeof names - n, "%s%s", f ? " " : "", formats[f]);
        CHECK(n < sizeof names);
    }
    return FAIL(ST_USAGE, "--only '%s' is none of %s", only, names);
}

/* The table is made in memory and takes the place of `path` when it is whole: what was there stays
 * if a kernel fails, or somebody stops it. */
static status write_table(tuner *t, const char *only, const char *path) {
    file_draft file;
    char *table = NULL;
    size_t size = 0;
    TRY(file_begin(&file, path));
    t->out = open_memstream(&table, &size);
    status st = t->out ? tune(t, only) : FAIL(ST_NOMEM, "table");
    if (t->out && fclose(t->out) != 0 && st == ST_OK) st = FAIL(ST_NOMEM, "table");
    if (st == ST_OK) st = file_add(&file, table, size);
    free(table);
    return file_end(&file, st);
}

int bench_tune(int argc, char **argv) {
    static tuner t = {.replays = 3};
    const char *out = "linear_tuned.def", *only = NULL;
    const cli_option options[] = {
        {"--out", CLI_TEXT, &out, "FILE", "kernels/tuned/NAME.def of this GPU"},
        {"--only", CLI_TEXT, &only, "FORMAT", "one of them, as W4A16"},
        {"--replays", CLI_INT, &t.replays, "N", "graph replays of a time; their median counts"},
        {NULL, CLI_FLAG, NULL, NULL, NULL},
    };
    int32_t n = 0;
    status st = cli_parse(argc - 1, argv + 1, "tune [options]", options, NULL, &n);
    if (st == ST_OK) st = cli_check(&(cli_range){"--replays", t.replays, 1, 1000}, 1);
    if (st == ST_OK) st = check_format(only);
    if (st == ST_OK) st = bench_cuda_open();
    return cli_exit(st == ST_OK ? write_table(&t, only, out) : st);
}
