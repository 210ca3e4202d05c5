/* safetensors.c - see safetensors.h. The header is read into views first and believed never: every
 * view is checked on its own, then all of a file are sorted by offset and must cover its data
 * without gap or overlap, as the reference implementation demands. Only then does anyone see a
 * pointer. */
#define _GNU_SOURCE
#include "safetensors.h"

#include "json.h"

#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>

enum { HEADER_BYTES_MAX = 100000000, SHARDS_MAX = 10000 };

typedef struct {
    file_map map;
    arena names; /* holds the tensors' names; as large as the header, which holds them as well */
    char *file;  /* name within the folder, for the order of the digest */
} shard;

struct safetensors {
    shard *shard;
    int32_t n_shards;
    tensor_view *tensor; /* sorted by name once opened */
    int32_t n, size;
    uint64_t digest;
};

/* --- One tensor ------------------------------------------------------------------------------- */

static bool integer_in(const json_t *v, int64_t hi, int64_t *out) {
    if (!json_is_integer(v)) return false;
    *out = json_integer_value(v);
    return *out >= 0 && *out <= hi;
}

/* dims, and the number of elements with every product checked. */
static status read_shape(tensor_view *t, const json_t *shape, const char *where,
                         int64_t *elements) {
    if (!json_is_array(shape) || json_array_size(shape) > TENSOR_DIMS_MAX)
        return FAIL(ST_FORMAT, "%s: tensor '%s': shape is no list of at most %d numbers", where,
                    t->name, TENSOR_DIMS_MAX);
    t->n_dims = (int32_t)json_array_size(shape);
    *elements = 1;
    for (int32_t i = 0; i < t->n_dims; i++) {
        if (!integer_in(json_array_get(shape, (size_t)i), INT64_MAX, &t->dim[i]))
            return FAIL(ST_FORMAT, "%s: tensor '%s': shape[%d] is no size", where, t->name, i);
        if (__builtin_mul_overflow(*elements, t->dim[i], elements))
            return FAIL(ST_FORMAT, "%s: tensor '%s': shape overflows", where, t->name);
    }
    return ST_OK;
}

/* `data` is what follows the header, n bytes. */
static status read_tensor(tensor_view *t, const json_t *entry, const uint8_t *data, int64_t n,
                          const char *where) {
    const char *type = json_string_value(json_object_get(entry, "dtype"));
    if (!type) return FAIL(ST_FORMAT, "%s: tensor '%s' has no dtype", where, t->name);
    const status known = dtype_parse(&t->type, type);
    if (known != ST_OK) return fail_prefix(known, "%s: tensor '%s'", where, t->name);
    int64_t elements = 0, bits;
    TRY(read_shape(t, json_object_get(entry, "shape"), where, &elements));

    const json_t *offsets = json_object_get(entry, "data_offsets");
    int64_t begin, end;
    if (json_array_size(offsets) != 2 ||
        !integer_in(json_array_get(offsets, 0), INT64_MAX, &begin) ||
        !integer_in(json_array_get(offsets, 1), INT64_MAX, &end))
        return FAIL(ST_FORMAT, "%s: tensor '%s': data_offsets are not two sizes", where, t->name);
    if (begin > end)
        return FAIL(ST_FORMAT, "%s: tensor '%s': data_offsets %lld to %lld are reversed", where,
                    t->name, (long long)begin, (long long)end);
    if (end > n)
        return FAIL(ST_FORMAT, "%s: tensor '%s' ends at byte %lld of %lld: a truncated file?",
                    where, t->name, (long long)end, (long long)n);
    if (__builtin_mul_overflow(elements, dtype_bits(t->type), &bits) || bits % 8)
        return FAIL(ST_FORMAT, "%s: tensor '%s': shape overflows or is no whole number of bytes",
                    where, t->name);
    if (bits / 8 != end - begin)
        return FAIL(ST_FORMAT,
                    "%s: tensor '%s': shape and dtype make %lld bytes, data_offsets %lld", where,
                    t->name, (long long)(bits / 8), (long long)(end - begin));
    t->bytes = end - begin;
    t->data = data + begin;
    const int32_t align = dtype_bits(t->type) < 8 ? 1 : dtype_bits(t->type) / 8;
    if (t->bytes > 0 && (uintptr_t)t->data % (uintptr_t)align) /* the mapping is page-aligned */
        return FAIL(ST_UNSUPPORTED, "%s: tensor '%s' is not aligned to its %d-byte elements", where,
                    t->name, align);
    return ST_OK;
}

/* --- One file --------------------------------------------------------------------------------- */

static tensor_view *push_view(safetensors *s) {
    if (s->n == s->size) {
        const int32_t size = s->size ? 2 * s->size : 64;
        tensor_view *grown = mem_resize(s->tensor, (size_t)size, sizeof *grown);
        if (!grown) return NULL;
        s->tensor = grown;
        s->size = size;
    }
    s->tensor[s->n] = (tensor_view){0};
    return &s->tensor[s->n++];
}

static int by_place(const void *a, const void *b) {
    const tensor_view *x = a, *y = b;
    if (x->data != y->data) return (uintptr_t)x->data < (uintptr_t)y->data ? -1 : 1;
    return x->bytes < y->bytes ? -1 : x->bytes > y->bytes; /* empty ones first */
}

/* Views of one file, sorted by place, cover [data, data + n) exactly. */
static status check_cover(const tensor_view *t, int32_t count, const uint8_t *data, int64_t n,
                          const char *where) {
    int64_t at = 0;
    for (int32_t i = 0; i < count; i++) {
        const int64_t begin = (const uint8_t *)t[i].data - data;
        if (begin < at)
            return FAIL(ST_FORMAT, "%s: tensor '%s' overlaps another at byte %lld", where,
                        t[i].name, (long long)begin);
        if (begin > at)
            return FAIL(ST_FORMAT, "%s: bytes %lld to %lld before tensor '%s' belong to no tensor",
                        where, (long long)at, (long long)begin, t[i].name);
        at += t[i].bytes;
    }
    if (at != n)
        return FAIL(ST_FORMAT, "%s: bytes %lld to %lld at the end belong to no tensor", where,
                    (long long)at, (long long)n);
    return ST_OK;
}

static status read_entries(safetensors *s, shard *f, const json_t *header, int64_t header_bytes,
                           const char *where) {
    const uint8_t *data = f->map.data + 8 + header_bytes;
    const int64_t n = (int64_t)f->map.size - 8 - header_bytes;
    const int32_t first = s->n;
    const char *key;
    json_t *entry;
    json_object_foreach((json_t *)(uintptr_t)header, key, entry) {
        if (strcmp(key, "__metadata__") == 0) continue;
        tensor_view *t = push_view(s);
        if (t) t->name = arena_string(&f->names, key, strlen(key));
        if (!t || !t->name) return FAIL(ST_NOMEM, "%s: %d tensors", where, s->n);
        if (!json_is_object(entry))
            return FAIL(ST_FORMAT, "%s: tensor '%s' is no object", where, key);
        TRY(read_tensor(t, entry, data, n, where));
    }
    const int32_t added = s->n - first;
    tensor_view *own = s->tensor ? s->tensor + first : NULL; /* a file may hold no tensor */
    if (added > 0) qsort(own, (size_t)added, sizeof *own, by_place);
    return check_cover(own, added, data, n, where);
}

/* Map a file, check its header, add its tensors. */
static status read_file(safetensors *s, shard *f, const char *path) {
    TRY(file_map_open(&f->map, path));
    const size_t size = f->map.size;
    static const char pointer[] = "version https://git-lfs";
    if (size < 8) return FAIL(ST_FORMAT, "%s: %zu bytes are no safetensors file", path, size);
    if (size >= sizeof pointer && memcmp(f->map.data, pointer, sizeof pointer - 1) == 0)
        return FAIL(ST_FORMAT, "%s: a pointer of Git LFS, not the file itself: git lfs pull", path);
    uint64_t header_bytes = 0;
    for (int i = 7; i >= 0; i--) header_bytes = header_bytes << 8 | f->map.data[i];
    if (header_bytes > HEADER_BYTES_MAX)
        return FAIL(ST_FORMAT, "%s: header of %llu bytes: no safetensors file?", path,
                    (unsigned long long)header_bytes);
    if (header_bytes > size - 8)
        return FAIL(ST_FORMAT, "%s: header of %llu bytes in a file of %zu: truncated?", path,
                    (unsigned long long)header_bytes, size);
    TRY(arena_open(&f->names, (size_t)header_bytes + 1));
    json_t *header;
    TRY(json_parse(&header, (const char *)f->map.data + 8, (size_t)header_bytes, path));
    const status st = json_is_object(header)
                          ? read_entries(s, f, header, (int64_t)header_bytes, path)
                          : FAIL(ST_FORMAT, "%s: header is no JSON object", path);
    json_decref(header);
    TRY(st);
    s->digest = hash_bytes(f->map.data, 8 + (size_t)header_bytes, hash_u64(size, s->digest));
    return ST_OK;
}

/* --- A folder --------------------------------------------------------------------------------- */

static int by_name(const void *a, const void *b) {
    return strcmp(((const tensor_view *)a)->name, ((const tensor_view *)b)->name);
}

static int by_file(const void *a, const void *b) {
    return strcmp(((const shard *)a)->file, ((const shard *)b)->file);
}

static status add_shard(safetensors *s, const char *file, const char *where) {
    /* A name and nothing else: an index must not lead out of its folder. */
    if (!file || !file[0] || file[0] == '.' || strchr(file, '/') || strchr(file, '\\'))
        return FAIL(ST_FORMAT, "%s: '%s' is no name of a file beside it", where, file ? file : "");
    for (int32_t i = 0; i < s->n_shards; i++)
        if (strcmp(s->shard[i].file, file) == 0) return ST_OK;
    if (s->n_shards == SHARDS_MAX)
        return FAIL(ST_FORMAT, "%s: more than %d files", where, SHARDS_MAX);
    shard *grown = mem_resize(s->shard, (size_t)s->n_shards + 1, sizeof *grown);
    if (!grown) return FAIL(ST_NOMEM, "%s: %d files", where, s->n_shards + 1);
    s->shard = grown;
    char *copy = mem_alloc(strlen(file) + 1, 1);
    if (!copy) return FAIL(ST_NOMEM, "%s: %d files", where, s->n_shards + 1);
    strcpy(copy, file);
    s->shard[s->n_shards++] = (shard){.file = copy};
    return ST_OK;
}

static status sort_tensors(safetensors *s, const char *where) {
    if (s->n) qsort(s->tensor, (size_t)s->n, sizeof *s->tensor, by_name);
    for (int32_t i = 1; i < s->n; i++)
        if (strcmp(s->tensor[i - 1].name, s->tensor[i].name) == 0)
            return FAIL(ST_FORMAT, "%s: tensor '%s' is in two files", where, s->tensor[i].name);
    return ST_OK;
}

static bool lies_in(const shard *f, const tensor_view *t) {
    const uintptr_t begin = (uintptr_t)f->map.data, at = (uintptr_t)t->data;
    return at >= begin && at <= begin + f->map.size;
}

/* Each name of the weight map is in the file that it says. */
static status check_map(const safetensors *s, const json_t *map, const char *where) {
    const char *key;
    json_t *file;
    json_object_foreach((json_t *)(uintptr_t)map, key, file) {
        const shard *f = bsearch(&(shard){.file = (char *)(uintptr_t)json_string_value(file)},
                                 s->shard, (size_t)s->n_shards, sizeof *s->shard, by_file);
        CHECK(f != NULL);
        const tensor_view *t = safetensors_find(s, key);
        if (!t || !lies_in(f, t))
            return FAIL(ST_FORMAT, "%s: tensor '%s' is not in %s", where, key, f->file);
    }
    return ST_OK;
}

static status read_shards(safetensors *s, const char *dir, const json_t *map, const char *where) {
    const char *key;
    json_t *file;
    json_object_foreach((json_t *)(uintptr_t)map, key, file)
        TRY(add_shard(s, json_string_value(file), where));
    if (s->n_shards == 0) return FAIL(ST_FORMAT, "%s: the weight_map is empty", where);
    qsort(s->shard, (size_t)s->n_shards, sizeof *s->shard, by_file);
    for (int32_t i = 0; i < s->n_shards; i++) {
        char path[8192];
        if ((size_t)snprintf(path, sizeof path, "%s/%s", dir, s->shard[i].file) >= sizeof path)
            return FAIL(ST_IO, "%s: path too long", where);
        if (!file_exists(path))
            return FAIL(ST_FORMAT, "%s: its file '%s' is missing", where, s->shard[i].file);
        TRY(read_file(s, &s->shard[i], path));
    }
    TRY(sort_tensors(s, where));
    return check_map(s, map, where);
}

static status read_index(safetensors *s, const char *dir, const char *path) {
    json_t *index;
    TRY(json_file(&index, path));
    const json_t *map = json_object_get(index, "weight_map");
    const status st = json_is_object(map) ? read_shards(s, dir, map, path)
                                          : FAIL(ST_FORMAT, "%s: no weight_map", path);
    json_decref(index);
    return st;
}

static status read_single(safetensors *s, const char *path) {
    const char *slash = strrchr(path, '/'), *name = slash ? slash + 1 : path;
    TRY(add_shard(s, name, path));
    TRY(read_file(s, &s->shard[0], path));
    return sort_tensors(s, path);
}

static status read_path(safetensors *s, const char *path) {
    struct stat st;
    if (stat(path, &st) != 0 || !S_ISDIR(st.st_mode)) return read_single(s, path);
    char file[4096];
    if ((size_t)snprintf(file, sizeof file, "%s/model.safetensors.index.json", path) >= sizeof file)
        return FAIL(ST_IO, "%s: path too long", path);
    char single[sizeof file];
    snprintf(single, sizeof single, "%.4000s/model.safetensors", path);
    if (file_exists(single)) return read_single(s, single); /* first, as transformers does */
    if (file_exists(file)) return read_index(s, path, file);
    return FAIL(ST_NOTFOUND, "%s: neither model.safetensors nor model.safetensors.index.json",
                path);
}

status safetensors_open(safetensors **out, const char *path) {
    *out = NULL;
    safetensors *s = mem_alloc(1, sizeof *s);
    if (!s) return FAIL(ST_NOMEM, "%s", path);
    const status st = read_path(s, path);
    if (st != ST_OK) {
        safetensors_close(s);
        return st;
    }
    *out = s;
    return ST_OK;
}

void safetensors_close(safetensors *s) {
    if (!s) return;
    for (int32_t i = 0; i < s->n_shards; i++) {
        file_map_close(&s->shard[i].map);
        arena_close(&s->shard[i].names);
        mem_free(s->shard[i].file);
    }
    mem_free(s->shard);
    mem_free(s->tensor);
    mem_free(s);
}

const tensor_view *safetensors_find(const safetensors *s, const char *name) {
    if (!s->n) return NULL;
    return bsearch(&(tensor_view){.name = name}, s->tensor, (size_t)s->n, sizeof *s->tensor,
                   by_name);
}

int32_t safetensors_count(const safetensors *s) { return s->n; }

const tensor_view *safetensors_at(const safetensors *s, int32_t i) {
    CHECK(i >= 0 && i < s->n);
    return &s->tensor[i];
}

uint64_t safetensors_digest(const safetensors *s) {
    enum { SAMPLE = 64 };
    uint64_t digest = s->digest;
    for (int32_t i = 0; i < s->n; i++) {
        const tensor_view *t = &s->tensor[i];
        const int64_t n = i64_min(t->bytes, SAMPLE), from = (t->bytes - n) / 2;
        if (n > 0) digest = hash_bytes((const uint8_t *)t->data + from, (size_t)n, digest);
    }
    return digest;
}

/* --- Writing ---------------------------------------------------------------------------------- */

static const char *const spelling_of[DT_COUNT] = {
#define X(name, bits, spelling) [DT_##name] = spelling,
#include "dtype.def"
#undef X
};

static json_t *header_entry(const tensor_view *t, int64_t at) {
    json_t *shape = json_array();
    for (int32_t i = 0; i < t->n_dims; i++)
        if (json_array_append_new(shape, json_integer(t->dim[i])) != 0) {
            json_decref(shape);
            return NULL;
        }
    return json_pack("{s:s, s:o, s:[I, I]}", "dtype", spelling_of[t->type], "shape", shape,
                     "data_offsets", (json_int_t)at, (json_int_t)(at + t->bytes));
}

/* The 8-byte length and the header, padded with blanks so that the data starts at a multiple of 8.
 */
static status make_header(text *out, const char *path, const tensor_view *tensors, int32_t n) {
    json_t *header = json_object();
    status st = header ? ST_OK : FAIL(ST_NOMEM, "%s", path);
    int64_t at = 0;
    for (int32_t i = 0; st == ST_OK && i < n; i++) {
        const tensor_view *t = &tensors[i];
        const int32_t align = dtype_bits(t->type) < 8 ? 1 : dtype_bits(t->type) / 8;
        if (json_object_get(header, t->name) || strcmp(t->name, "__metadata__") == 0)
            st = FAIL(ST_FORMAT, "%s: tensor name '%s' is taken", path, t->name);
        else if (at % align)
            st = FAIL(ST_UNSUPPORTED,
                      "%s: tensor '%s' would lie at byte %lld: write larger element "
                      "types first",
                      path, t->name, (long long)at);
        else if (json_object_set_new(header, t->name, header_entry(t, at)) != 0)
            st =
                FAIL(ST_NOMEM, "%s: header of tensor '%s' (its name must be UTF-8)", path, t->name);
        at += t->bytes;
    }
    char *line = st == ST_OK ? json_line(header) : NULL;
    if (st == ST_OK && !line) st = FAIL(ST_NOMEM, "%s: header of %d tensors", path, n);
    if (line) {
        const size_t length = strlen(line), padded = (length + 7) & ~(size_t)7;
        uint8_t count[8];
        for (int i = 0; i < 8; i++) count[i] = (uint8_t)((uint64_t)padded >> (8 * i));
        text_bytes(out, count, sizeof count);
        text_add(out, "%s%*s", line, (int)(padded - length), "");
        st = text_status(out);
    }
    mem_free(line);
    json_decref(header);
    return st;
}

status safetensors_write(const char *path, const tensor_view *tensors, int32_t n) {
    text header = {0};
    file_draft f;
    status st = make_header(&header, path, tensors, n);
    if (st == ST_OK) st = file_begin(&f, path);
    if (st == ST_OK) {
        st = file_add(&f, header.data, header.length);
        for (int32_t i = 0; st == ST_OK && i < n; i++)
            st = file_add(&f, tensors[i].data, (size_t)tensors[i].bytes);
        st = file_end(&f, st);
    }
    text_free(&header);
    return st;
}

const char *tensor_shape_text(char *buf, size_t n, const int64_t *dim, int32_t n_dims) {
    size_t at = (size_t)snprintf(buf, n, "[");
    for (int32_t i = 0; i < n_dims && at < n; i++)
        at += (size_t)snprintf(buf + at, n - at, "%s%lld", i ? ", " : "", (long long)dim[i]);
    if (at < n) snprintf(buf + at, n - at, "]");
    return buf;
}
