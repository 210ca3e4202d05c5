/* fuzz_packed.c - a quantised checkpoint from anybody: its config, and a linear of every layout.
 *
 *     byte 0: shape | bytes 1, 2: length of config.json | config.json | model.safetensors
 *
 * Each tensor is read from a block of its own, so that the sanitizer sees the first byte past it. */
#include "fuzz.h"

#include "packed.h"

#include <string.h>

static arena memory;

int LLVMFuzzerInitialize(int *argc, char ***argv) {
    (void)argc;
    (void)argv;
    if (arena_open(&memory, 64 << 20) != ST_OK) abort();
    return 0;
}

static void read_codes(const packed_matrix *m, int32_t n, int32_t k) {
    static const char *const names[WF_COUNT] = {
        [WF_INT8] = "W8",    [WF_INT4] = "W4",      [WF_FP8] = "WFP8",
        [WF_FP8B] = "WFP8b", [WF_MXFP4] = "WMXFP4", [WF_NVFP4] = "WNVFP4"};
    precision p;
    qmatrix q;
    CHECK(precision_parse(&p, names[m->format]) == ST_OK);
    if (m->format == WF_INT4) p.group = m->group == k ? 0 : m->group;
    p.sym = m->sym;
    memory.used = 0;
    if (qmatrix_alloc(&q, &memory, &p, n, k) != ST_OK || q.group != m->group) return;
    int32_t *order = m->g_idx ? arena_array(&memory, int32_t, (size_t)k) : NULL;
    if (order) CHECK(packed_order(m, order) == ST_OK);
    for (int32_t r = 0; r < n; r++) packed_canonical(m, r, order, &q, r);
}

static void read_linear(const packed_matrix *m, int32_t n, int32_t k) {
    static float row[512];
    CHECK(m->n == n && m->k == k);
    (void)packed_check(m);
    for (int32_t r = 0; r < n; r++) packed_row(m, r, row);
    if (!m->only16) read_codes(m, n, k);
}

/* The file's tensors, each in memory of its own. */
static void *separate(const safetensors *s, int32_t i) {
    tensor_view *t = (tensor_view *)(uintptr_t)safetensors_at(s, i);
    void *copy = malloc((size_t)t->bytes);
    if (t->bytes && !copy) abort();
    if (t->bytes) memcpy(copy, t->data, (size_t)t->bytes);
    t->data = copy;
    return copy;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    static const int32_t ns[] = {1, 8, 16, 136}, ks[] = {16, 32, 64, 128, 160, 256, 257, 320};
    enum { TENSORS_MAX = 64 };
    if (size < 3) return 0;
    const int32_t n = ns[data[0] & 3], k = ks[data[0] >> 2 & 7];
    size_t n_config = (size_t)data[1] << 8 | data[2];
    if (n_config > size - 3) n_config = size - 3;
    const char *folder = fuzz_folder("config.json", data + 3, n_config);
    safetensors *s;
    packed_config c;
    packed_matrix m;
    bool found;
    if (packed_config_load(&c, folder) != ST_OK) return 0;
    if (safetensors_open(&s, fuzz_file(data + 3 + n_config, size - 3 - n_config)) != ST_OK)
        return 0;
    void *copy[TENSORS_MAX];
    const int32_t n_tensors = safetensors_count(s);
    if (n_tensors <= TENSORS_MAX) {
        for (int32_t i = 0; i < n_tensors; i++) copy[i] = separate(s, i);
        if (packed_find(&m, &found, s, "m", n, k, &c) == ST_OK && found) read_linear(&m, n, k);
        for (int32_t e = 0; e < 2; e++)
            if (packed_find_blocks(&m, &found, s, "e", e, 2, n, k, &c) == ST_OK && found)
                read_linear(&m, n, k);
        for (int32_t i = 0; i < n_tensors; i++) free(copy[i]);
    }
    safetensors_close(s);
    return 0;
}
