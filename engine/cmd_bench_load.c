/* cmd_bench_load.c - `amalgam bench load`: how fast a checkpoint leaves its files on one core, or
 * reaches a device.
 *
 *   open    map, read and check all headers, find every weight: milliseconds
 *   read    every byte of every tensor once, where it is mapped: what a copy to a device reads
 *   values  every row of every weight as f32 (cpu device; dequantised where the checkpoint is)
 *
 * The files are read once before, so that the page cache and not a disk is measured. Exit status 1
 * when `read` stays under 2 GB/s.
 *
 * With --device, all in bytes of the file per second, of every layer but the first (which brings
 * buffers with it); the parts overlap in time:
 *
 *   load    all of it, as a run does it
 *   host    out of the page cache into pinned memory, by all cores
 *   copy    from there to the device
 *   pack    kernels: unpacking, conversion, rounding, the order of those that multiply
 *
 * `ok` is false when `pack` is slower than `copy`. */
#include "cli.h"
#include "device.h"
#include "safetensors.h"
#include "timeline.h"
#include "weights.h"

#include <string.h>

typedef struct {
    int64_t bytes, elements;
    double open_s, read_s, values_s;
} file_times;

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

static status time_values(const checkpoint *k, const model_config *c, file_times *t) {
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

static status time_load(const char *dir, file_times *t) {
    model_config *c = mem_alloc(1, sizeof *c);
    checkpoint *k = NULL;
    safetensors *s = NULL;
    *t = (file_times){.bytes = 0};
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

/* --- Onto a device ------------------------------------------------------------------------------
 */

typedef struct {
    load_times part;
    double all_s;
} device_times;

static status load_layer(device *d, const checkpoint *k, const model_config *c, const precision *p,
                         int32_t layer) {
    for (int32_t f = 0; f < WEIGHT_COUNT; f++) {
        weight_source s;
        weight w;
        if (!weight_field_present(c, (weight_field)f)) continue;
        TRY(checkpoint_source(k, (weight_field)f, layer, &s));
        TRY(d->ops->weight_load(d, &s, p, &w));
    }
    return ST_OK;
}

static status load_layers(device *d, const checkpoint *k, const model_config *c, const precision *p,
                          device_times *t) {
    load_times before, *after = &t->part;
    TRY(load_layer(d, k, c, p, 0));
    TRY(d->ops->load_times(d, &before));
    const double start = now_s();
    for (int32_t layer = 1; layer < c->n_layers; layer++) TRY(load_layer(d, k, c, p, layer));
    TRY(d->ops->load_times(d, after));
    t->all_s = now_s() - start;
    after->bytes -= before.bytes;
    after->host_s -= before.host_s;
    after->copy_s -= before.copy_s;
    after->pack_s -= before.pack_s;
    return ST_OK;
}

/* One load of its own mapping, so that its pages are new to it. */
static status time_once(const char *dir, const model_config *c, const device_ops *ops,
                        const char *format, char *made, device_times *t) {
    const device_options o = {.tp = 1, .time_loading = true};
    checkpoint *k = NULL;
    device *d = NULL;
    precision p;
    status st = checkpoint_open(&k, c, dir, 0);
    if (st == ST_OK) st = checkpoint_parse_precision(k, &p, format);
    if (st == ST_OK) precision_name(&p, made);
    if (st == ST_OK) st = ops->open(&d, &o);
    if (st == ST_OK) st = load_layers(d, k, c, &p, t);
    if (d) ops->close(d);
    checkpoint_close(k);
    return st;
}

/* The fastest of some. */
static status time_device(const char *dir, const char *name, const char *format, char *made,
                          char model[64], device_times *t) {
    enum { REPEATS = 3 };
    const device_ops *ops = NULL;
    model_config *c = mem_alloc(1, sizeof *c);
    safetensors *files = NULL;
    int64_t bytes;
    static volatile uint64_t sink;
    status st = c ? device_find(&ops, name) : FAIL(ST_NOMEM, "config");
    if (st == ST_OK && !ops->load_times)
        st = FAIL(ST_UNSUPPORTED, "nothing is copied to the %s device", name);
    if (st == ST_OK) st = model_config_load(c, dir);
    if (st == ST_OK && c->n_layers < 2) st = FAIL(ST_UNSUPPORTED, "a model of one layer");
    if (st == ST_OK) st = safetensors_open(&files, dir);
    if (st == ST_OK) sink = sink + read_all(files, &bytes);
    safetensors_close(files);
    for (int i = 0; i < REPEATS && st == ST_OK; i++) {
        device_times now;
        st = time_once(dir, c, ops, format, made, &now);
        if (st == ST_OK && (i == 0 || now.all_s < t->all_s)) *t = now;
    }
    if (c) snprintf(model, sizeof c->name, "%s", c->name);
    mem_free(c);
    return st;
}

static int show_device(const char *dir, const char *name, const char *format, bool json) {
    char made[PRECISION_NAME_MAX], model[64];
    device_times t = {0};
    const status st = time_device(dir, name, format, made, model, &t);
    if (st != ST_OK) return cli_exit(st);
    const double gb = (double)t.part.bytes * 1e-9;
    const bool ok = t.part.pack_s < t.part.copy_s;
    printf(
        json ? "{\"kind\":\"load_device\",\"model\":\"%s\",\"device\":\"%s\",\"precision\":\"%s\","
               "\"gb\":%.3f,\"load_gb_per_s\":%.2f,\"host_gb_per_s\":%.2f,"
               "\"copy_gb_per_s\":%.2f,\"pack_gb_per_s\":%.2f,\"ok\":%s}\n"
             : "%s to %s as %s, %.3f GB: load %.2f GB/s; host %.2f, copy %.2f, pack %.2f GB/s "
               "(faster than the copy: %s)\n",
        model, name, made, gb, gb / t.all_s, gb / t.part.host_s, gb / t.part.copy_s,
        gb / t.part.pack_s,
        json ? (ok ? "true" : "false")
        : ok ? "ok"
             : "NO");
    return 0;
}

int cmd_bench_load(int argc, char **argv) {
    const char *model = NULL, *device_name = NULL, *format = "auto";
    bool json = false;
    const double floor_gb_per_s = 2;
    const cli_option options[] = {
        {"--model", CLI_TEXT, &model, "DIR", "checkpoint folder"},
        {"--device", CLI_TEXT, &device_name, "NAME", "onto it (off the files only)"},
        {"--precision", CLI_TEXT, &format, "NAME", "with --device: as what (auto, as stored)"},
        {"--json", CLI_FLAG, &json, NULL, "one object"},
        {NULL, CLI_FLAG, NULL, NULL, NULL},
    };
    int32_t n = 0;
    char dir[1024];
    file_times t;
    status st = cli_parse(argc - 1, argv + 1, "bench load --model DIR [--device NAME] [--json]",
                          options, NULL, &n);
    if (st == ST_OK && !model) st = FAIL(ST_USAGE, "bench load needs --model");
    if (st == ST_OK) st = model_dir(dir, sizeof dir, model);
    if (st == ST_OK && device_name) return show_device(dir, device_name, format, json);
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
