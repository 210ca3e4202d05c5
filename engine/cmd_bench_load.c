/* cmd_bench_load.c - `amalgam bench load`: how fast a checkpoint leaves its files on one core.
 *
 *   open    map, read and check all headers, find every weight: milliseconds
 *   read    every byte of every tensor once, where it is mapped: what a copy to a device reads
 *   values  every row of every weight as f32 (cpu device; dequantised where the checkpoint is)
 *
 * The files are read once before, so that the page cache and not a disk is measured. Exit status 1
 * when `read` stays under 2 GB/s. */
#include "cli.h"
#include "safetensors.h"
#include "timeline.h"
#include "weights.h"

#include <string.h>

typedef struct {
    int64_t bytes, elements;
    double open_s, read_s, values_s;
} load_times;

static double now_s(void) {
    static timeline clock;
    static bool running;
    if (!running) timeline_start_real(&clock);
    running = true;
    return (double)timeline_now_ns(&clock) * 1e-9;
}

/* Sum of all 8-byte words: as cheap as reading gets, and nothing a compiler could leave out. */
static uint64_t read_all(const safetensors *s, int64_t *bytes) {
    uint64_t sum = 0;
    *bytes = 0;
    for (int32_t i = 0; i < safetensors_count(s); i++) {
        const tensor_view *t = safetensors_at(s, i);
        const uint8_t *p = t->data;
        for (int64_t at = 0; at + 8 <= t->bytes; at += 8) {
            uint64_t word;
            memcpy(&word, p + at, 8);
            sum += word;
        }
        *bytes += t->bytes;
    }
    return sum;
}

static status time_values(const checkpoint *k, const model_config *c, load_times *t) {
    float *row = mem_alloc((size_t)1 << 20, sizeof *row);
    if (!row) return FAIL(ST_NOMEM, "a row");
    const double start = now_s();
    for (int32_t layer = 0; layer < c->n_layers; layer++) {
        for (int32_t f = layer ? 0 : WEIGHT_embed; f < WEIGHT_COUNT; f++) {
            weight_source s;
            if (!weight_field_present(c, (weight_field)f)) continue;
            CHECK(checkpoint_source(k, (weight_field)f, layer, &s) == ST_OK);
            for (int32_t i = 0; i < s.shape.count * s.shape.n; i++)
                weight_source_row(&s, i / s.shape.n, i % s.shape.n, row);
            t->elements += (int64_t)s.shape.count * s.shape.n * s.shape.k;
        }
    }
    t->values_s = now_s() - start;
    mem_free(row);
    return ST_OK;
}

static status time_load(const char *dir, load_times *t) {
    model_config *c = mem_alloc(1, sizeof *c);
    checkpoint *k = NULL;
    safetensors *s = NULL;
    *t = (load_times){.bytes = 0};
    status st = c ? model_config_load(c, dir) : FAIL(ST_NOMEM, "config");
    if (st == ST_OK) st = safetensors_open(&s, dir);
    if (st == ST_OK) {
        static volatile uint64_t sink;
        sink = read_all(s, &t->bytes); /* into the cache, and the mapping */
        const double start = now_s();
        sink = sink + read_all(s, &t->bytes);
        t->read_s = now_s() - start;
    }
    const double start = now_s();
    if (st == ST_OK) st = checkpoint_open(&k, c, dir, 0);
    t->open_s = now_s() - start;
    if (st == ST_OK) st = time_values(k, c, t);
    checkpoint_close(k);
    safetensors_close(s);
    mem_free(c);
    return st;
}

int cmd_bench_load(int argc, char **argv) {
    const char *model = NULL;
    bool json = false;
    const double floor_gb_per_s = 2;
    const cli_option options[] = {
        {"--model", CLI_TEXT, &model, "DIR", "checkpoint folder"},
        {"--json", CLI_FLAG, &json, NULL, "one object"},
        {NULL, CLI_FLAG, NULL, NULL, NULL},
    };
    int32_t n = 0;
    char dir[1024];
    load_times t;
    status st = cli_parse(argc - 1, argv + 1, "bench load --model DIR [--json]", options, NULL, &n);
    if (st == ST_OK && !model) st = FAIL(ST_USAGE, "bench load needs --model");
    if (st == ST_OK) st = model_dir(dir, sizeof dir, model);
    if (st == ST_OK) st = time_load(dir, &t);
    if (st != ST_OK) return cli_exit(st);
    const double read = (double)t.bytes / t.read_s * 1e-9;
    const double values = (double)t.elements / t.values_s * 1e-9;
    if (json)
        printf("{\"kind\":\"load\",\"bytes\":%lld,\"open_ms\":%.3f,\"read_gb_per_s\":%.3f,"
               "\"values_g_per_s\":%.3f,\"limit_gb_per_s\":%g,\"ok\":%s}\n",
               (long long)t.bytes, t.open_s * 1e3, read, values, floor_gb_per_s,
               read >= floor_gb_per_s ? "true" : "false");
    else
        printf(
            "%.3f GB: opened in %.2f ms, read at %.2f GB/s (at least %g: %s), values at %.2f G/s\n",
            (double)t.bytes * 1e-9, t.open_s * 1e3, read, floor_gb_per_s,
            read >= floor_gb_per_s ? "ok" : "MISSED", values);
    return read >= floor_gb_per_s ? 0 : 1;
}
