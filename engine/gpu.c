/* gpu.c - see gpu.h. A figure is {"value": ..., "source": "..."}: one without a source is refused.
 */
#define _GNU_SOURCE
#include "gpu.h"

#include "json.h"

#include <dirent.h>
#include <errno.h>
#include <stdlib.h>
#include <string.h>

/* A number of [lo, hi] as double or int64_t at `at` in the sheet; int32_t where `kind` says so. */
typedef enum { DOUBLE, INT32, INT64 } field_kind;

typedef struct {
    const char *key;
    size_t at;
    field_kind kind;
    double lo, hi;
} field;

#define AT(member) offsetof(gpu_sheet, member)
static const field fields[] = {
    {"sm", AT(sm), INT32, 70, 200},
    {"n_sms", AT(n_sms), INT32, 1, 4096},
    {"f16_flops", AT(f16_flops), DOUBLE, 1e9, 1e18},
    {"int8_ops", AT(int8_ops), DOUBLE, 0, 1e18},
    {"fp8_flops", AT(fp8_flops), DOUBLE, 0, 1e18},
    {"f32_flops", AT(f32_flops), DOUBLE, 1e9, 1e18},
    {"dram_bytes_per_s", AT(dram_bytes_per_s), DOUBLE, 1e9, 1e15},
    {"link_bytes_per_s", AT(link_bytes_per_s), DOUBLE, 1e6, 1e15},
    {"memory_bytes", AT(memory_bytes), INT64, 1e6, 1e15},
    {"reserved_bytes", AT(reserved_bytes), INT64, 0, 1e15},
    {"l2_bytes", AT(l2_bytes), INT64, 0, 1e12},
    {"dram_efficiency", AT(dram_efficiency), DOUBLE, 0.01, 1},
    {"matrix_efficiency", AT(matrix_efficiency), DOUBLE, 0.01, 1},
    {"launch_s", AT(launch_s), DOUBLE, 0, 1},
    {"step_s", AT(step_s), DOUBLE, 0, 1},
    {"link_latency_s", AT(link_latency_s), DOUBLE, 0, 1},
};
#undef AT

static status read_field(gpu_sheet *g, const json_t *root, const field *f, const char *path) {
    const json_t *figure = json_find(root, f->key);
    if (!figure) return FAIL(ST_NOTFOUND, "%s: key '%s' is missing", path, f->key);
    char where[4600];
    snprintf(where, sizeof where, "%.4300s: %s", path, f->key);
    const char *source = NULL;
    if (!json_is_object(figure))
        return FAIL(ST_FORMAT, "%s is no object of value and source", where);
    TRY(json_get_string(figure, "source", where, &source));
    if (!source[0]) return FAIL(ST_FORMAT, "%s: the source is empty", where);
    uint8_t *to = (uint8_t *)g + f->at;
    switch (f->kind) {
    case DOUBLE: return json_get_f64(figure, "value", where, f->lo, f->hi, (double *)(void *)to);
    case INT32:
        return json_get_i32(figure, "value", where, (int32_t)f->lo, (int32_t)f->hi,
                            (int32_t *)(void *)to);
    case INT64:
        return json_get_i64(figure, "value", where, (int64_t)f->lo, (int64_t)f->hi,
                            (int64_t *)(void *)to);
    }
    CHECK(!"a kind");
    return ST_OK;
}

static status copy_string(char *to, size_t n, const char *from, const char *key, const char *path) {
    if (strlen(from) >= n)
        return FAIL(ST_FORMAT, "%s: '%s' is longer than %zu bytes", path, key, n - 1);
    strcpy(to, from);
    return ST_OK;
}

static status read_sheet(gpu_sheet *g, const json_t *root, const char *path) {
    if (!json_is_object(root)) return FAIL(ST_FORMAT, "%s: not a JSON object", path);
    const char *title = NULL, *calibrated = "";
    TRY(json_get_string(root, "title", path, &title));
    TRY(json_opt_string(root, "calibrated", path, &calibrated));
    TRY(copy_string(g->title, sizeof g->title, title, "title", path));
    TRY(copy_string(g->calibrated, sizeof g->calibrated, calibrated, "calibrated", path));
    for (int32_t i = 0; i < COUNT_OF(fields); i++) TRY(read_field(g, root, &fields[i], path));
    if (g->reserved_bytes >= g->memory_bytes)
        return FAIL(ST_RANGE, "%s: reserved_bytes leave nothing of memory_bytes", path);
    return ST_OK;
}

status gpu_parse(gpu_sheet *out, const char *data, size_t n, const char *where) {
    *out = (gpu_sheet){0};
    json_t *root;
    TRY(json_parse(&root, data, n, where));
    const status st = read_sheet(out, root, where);
    json_decref(root);
    return st;
}

static status not_found(const char *name) {
    arena a;
    TRY(arena_open(&a, 1 << 20));
    const char **names;
    int32_t n;
    char list[384] = "";
    size_t at = 0;
    if (gpu_names(&a, &names, &n) == ST_OK)
        for (int32_t i = 0; i < n && at < sizeof list; i++)
            at += (size_t)snprintf(list + at, sizeof list - at, "%s%s", i ? ", " : "", names[i]);
    arena_close(&a);
    return FAIL(ST_NOTFOUND, "no GPU '%.40s'; there are: %s", name, list);
}

status gpu_load(gpu_sheet *out, const char *name) {
    *out = (gpu_sheet){0};
    char path[4400];
    const bool plain =
        name[0] && name[0] != '.' && !strchr(name, '/') && strlen(name) < sizeof out->name;
    snprintf(path, sizeof path, "%.4000s/workloads/gpus/%.40s.json", root_dir(), name);
    if (!plain || !file_exists(path)) return not_found(name);
    file_map m;
    TRY(file_map_open(&m, path));
    const status st = gpu_parse(out, (const char *)m.data, m.size, path);
    file_map_close(&m);
    TRY(st);
    strcpy(out->name, name);
    return ST_OK;
}

static int by_text(const void *a, const void *b) {
    return strcmp(*(const char *const *)a, *(const char *const *)b);
}

static int is_sheet(const struct dirent *e) {
    const char *dot = strrchr(e->d_name, '.');
    return e->d_name[0] != '.' && dot && strcmp(dot, ".json") == 0;
}

status gpu_names(arena *a, const char ***names, int32_t *n) {
    *names = NULL;
    *n = 0;
    char path[4400];
    snprintf(path, sizeof path, "%.4000s/workloads/gpus", root_dir());
    struct dirent **entries;
    const int count = scandir(path, &entries, is_sheet, NULL);
    if (count < 0) return FAIL(ST_IO, "%s: %s", path, strerror(errno));
    const char **list = arena_array(a, const char *, (size_t)count);
    bool ok = list != NULL;
    for (int i = 0; i < count; i++) {
        if (ok) list[i] = arena_string(a, entries[i]->d_name, strlen(entries[i]->d_name) - 5);
        ok = ok && list[i];
        free(entries[i]);
    }
    free(entries);
    if (!ok) return FAIL(ST_NOMEM, "%s: %d names", path, count);
    qsort(list, (size_t)count, sizeof *list, by_text);
    *names = list;
    *n = count;
    return ST_OK;
}
