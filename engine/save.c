/* save.c - see save.h. Everything is collected in one arena (address space: twice the source), then
 * written at once, larger element types first, because safetensors wants them aligned. */
#include "save.h"

#include "json.h"

#include <errno.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

enum { ALIGN = 64 };

typedef struct {
    tensor_view view;
    bool dropped; /* of the source: replaced by others */
} saved;

struct save {
    arena memory;
    safetensors *files;
    char dir[1024];
    save_layout layout;
    precision p;
    saved *tensor; /* the source's, then ours */
    int32_t n, size;
    bool ordered; /* some matrix has an order of inputs */
};

static const char *const layout_texts[SAVE_COUNT] = {
    [SAVE_COMPRESSED] = "compressed-tensors",
    [SAVE_AWQ] = "awq",
    [SAVE_GPTQ] = "gptq",
    [SAVE_GPTQ_V2] = "gptq_v2",
    [SAVE_FP8] = "fp8",
    [SAVE_MODELOPT] = "modelopt",
    [SAVE_GPT_OSS] = "gpt-oss",
};

const char *save_layout_text(save_layout l) {
    CHECK((unsigned)l < SAVE_COUNT);
    return layout_texts[l];
}

status save_layout_parse(save_layout *out, const char *name) {
    for (int32_t i = 0; i < SAVE_COUNT; i++) {
        if (strcmp(layout_texts[i], name) != 0) continue;
        *out = (save_layout)i;
        return ST_OK;
    }
    return FAIL(ST_NOTFOUND,
                "layout '%s' is none of compressed-tensors, awq, gptq, gptq_v2, fp8, modelopt, "
                "gpt-oss",
                name);
}

static bool holds(save_layout l, weight_format f) {
    switch (l) {
    case SAVE_COMPRESSED: return f != WF_16;
    case SAVE_AWQ: return f == WF_INT4;
    case SAVE_GPTQ:
    case SAVE_GPTQ_V2: return f == WF_INT4 || f == WF_INT8;
    case SAVE_FP8: return f == WF_FP8 || f == WF_FP8B;
    case SAVE_MODELOPT: return f == WF_FP8 || f == WF_NVFP4;
    default: return f == WF_MXFP4;
    }
}

/* --- Collecting --------------------------------------------------------------------------------
 */

static status read_source(save *s, const char *dir) {
    TRY(safetensors_open(&s->files, dir));
    const int32_t n = safetensors_count(s->files);
    size_t bytes = 1 << 20;
    for (int32_t i = 0; i < n; i++) bytes += (size_t)safetensors_at(s->files, i)->bytes + 4096;
    s->size = 8 * n + 64;
    TRY(arena_open(&s->memory, 2 * bytes + (size_t)s->size * sizeof *s->tensor));
    s->tensor = arena_array(&s->memory, saved, (size_t)s->size);
    if (!s->tensor) return FAIL(ST_NOMEM, "%d tensors", n);
    for (int32_t i = 0; i < n; i++) s->tensor[i].view = *safetensors_at(s->files, i);
    s->n = n;
    return ST_OK;
}

status save_open(save **out, const char *dir, save_layout layout, const precision *p) {
    *out = NULL;
    if (!holds(layout, p->weight))
        return FAIL(ST_UNSUPPORTED, "%s checkpoints hold no W%s", save_layout_text(layout),
                    weight_format_text(p->weight));
    save *s = mem_alloc(1, sizeof *s);
    if (!s) return FAIL(ST_NOMEM, "checkpoint writer");
    s->layout = layout;
    s->p = *p;
    snprintf(s->dir, sizeof s->dir, "%s", dir);
    const status st = read_source(s, dir);
    if (st != ST_OK) {
        save_close(s);
        return st;
    }
    *out = s;
    return ST_OK;
}

void save_close(save *s) {
    if (!s) return;
    safetensors_close(s->files);
    arena_close(&s->memory);
    mem_free(s);
}

static saved *find(save *s, const char *name) {
    for (int32_t i = 0; i < s->n; i++)
        if (!s->tensor[i].dropped && strcmp(s->tensor[i].view.name, name) == 0)
            return &s->tensor[i];
    return NULL;
}

/* A new tensor, zeroed; the name is module + ending. NULL when memory is short. */
static void *add(save *s, const char *module, const char *ending, dtype type, int32_t n_dims,
                 const int64_t *dim) {
    int64_t count = 1;
    for (int32_t i = 0; i < n_dims; i++) count *= dim[i];
    const int64_t bytes = dtype_bytes(type, count);
    char *name = arena_format(&s->memory, "%s%s", module, ending);
    void *data = arena_push(&s->memory, (size_t)(bytes ? bytes : 1), 1, ALIGN);
    if (!name || !data || s->n == s->size) return NULL;
    tensor_view t = {.name = name, .type = type, .n_dims = n_dims, .data = data, .bytes = bytes};
    memcpy(t.dim, dim, (size_t)n_dims * sizeof *dim);
    s->tensor[s->n++].view = t;
    return data;
}

static void *add_2(save *s, const char *module, const char *ending, dtype type, int64_t a,
                   int64_t b) {
    return add(s, module, ending, type, 2, (const int64_t[]){a, b});
}

static void *add_1(save *s, const char *module, const char *ending, dtype type, int64_t a) {
    return add(s, module, ending, type, 1, &a);
}

/* --- Codes, scales, zero points ------------------------------------------------------------------
 */

/* What is written of one matrix, inputs in the order of the file. */
typedef struct {
    save *s;
    const char *module;
    const qmatrix *q;
    const int32_t *order; /* NULL = as they come */
    int32_t n, k, groups, bits;
} writing;

/* Unsigned code of row n, canonical column j. */
static uint32_t code_of(const writing *w, int32_t n, int32_t j) {
    const int64_t at = (int64_t)n * w->k + j;
    if (w->bits == 4) return (uint32_t)w->q->code[at / 2] >> (at % 2 ? 4 : 0) & 15u;
    return w->q->format == WF_INT8 ? (uint32_t)w->q->code[at] ^ 0x80u : w->q->code[at];
}

static uint32_t zero_of(const writing *w, int32_t n, int32_t g) {
    if (w->q->zero) return w->q->zero[(int64_t)n * w->groups + g];
    return w->bits == 4 ? 8 : 128;
}

static int32_t column_of(const writing *w, int32_t j) { return w->order ? w->order[j] : j; }

/* [groups, n] of f16, the type of AWQ's and GPTQ's scales. */
static status put_scales_by_group(const writing *w) {
    uint16_t *scale = add_2(w->s, w->module, ".scales", DT_F16, w->groups, w->n);
    if (!scale) return FAIL(ST_NOMEM, "%s", w->module);
    for (int32_t n = 0; n < w->n; n++)
        for (int32_t g = 0; g < w->groups; g++) {
            const int64_t at = (int64_t)n * w->groups + g;
            scale[(int64_t)g * w->n + n] = w->q->scale_type == DT_F16
                                               ? ((const uint16_t *)w->q->scale)[at]
                                               : f16_from_f32(((const float *)w->q->scale)[at]);
        }
    return ST_OK;
}

/* Codes of 4 and 8 bit lie in words of 32 here, along outputs or inputs: none is filled in part. */
static status fills_words(const writing *w, int32_t size, const char *what) {
    const int32_t per = 32 / w->bits;
    if (size % per == 0) return ST_OK;
    return FAIL(ST_SHAPE, "%s: %d %s are no multiple of %d, which %s needs", w->module, size, what,
                per, save_layout_text(w->s->layout));
}

static status put_awq(const writing *w) {
    static const int32_t slot[8] = {0, 4, 1, 5, 2, 6, 3, 7};
    const int64_t row = w->n / 8;
    TRY(fills_words(w, w->n, "outputs"));
    uint32_t *code = add_2(w->s, w->module, ".qweight", DT_I32, w->k, row);
    uint32_t *zero = add_2(w->s, w->module, ".qzeros", DT_I32, w->groups, row);
    if (!code || !zero) return FAIL(ST_NOMEM, "%s", w->module);
    if (w->order) return FAIL(ST_UNSUPPORTED, "%s: AWQ has no order of inputs", w->module);
    for (int32_t n = 0; n < w->n; n++) {
        for (int32_t k = 0; k < w->k; k++)
            code[k * row + n / 8] |= code_of(w, n, k) << (4 * slot[n % 8]);
        for (int32_t g = 0; g < w->groups; g++)
            zero[g * row + n / 8] |= zero_of(w, n, g) << (4 * slot[n % 8]);
    }
    return put_scales_by_group(w);
}

static status put_g_idx(const writing *w, const char *ending) {
    int32_t *g = add_1(w->s, w->module, ending, DT_I32, w->k);
    if (!g) return FAIL(ST_NOMEM, "%s", w->module);
    for (int32_t j = 0; j < w->k; j++) g[column_of(w, j)] = j / w->q->group;
    return ST_OK;
}

static status put_gptq(const writing *w) {
    const int32_t per = 32 / w->bits;
    const uint32_t less = w->s->layout == SAVE_GPTQ, mask = (1u << w->bits) - 1;
    TRY(fills_words(w, w->n, "outputs"));
    TRY(fills_words(w, w->k, "inputs"));
    uint32_t *code = add_2(w->s, w->module, ".qweight", DT_I32, w->k / per, w->n);
    uint32_t *zero = add_2(w->s, w->module, ".qzeros", DT_I32, w->groups, w->n / per);
    if (!code || !zero) return FAIL(ST_NOMEM, "%s", w->module);
    for (int32_t n = 0; n < w->n; n++) {
        for (int32_t j = 0; j < w->k; j++) {
            const int32_t k = column_of(w, j);
            code[(int64_t)(k / per) * w->n + n] |= code_of(w, n, j) << (w->bits * (k % per));
        }
        for (int32_t g = 0; g < w->groups; g++)
            zero[(int64_t)g * (w->n / per) + n / per] |= ((zero_of(w, n, g) - less) & mask)
                                                         << (w->bits * (n % per));
    }
    TRY(put_g_idx(w, ".g_idx"));
    return put_scales_by_group(w);
}

static status put_copy(const writing *w, const char *ending, dtype type, int64_t a, int64_t b,
                       const void *data) {
    void *to = add_2(w->s, w->module, ending, type, a, b);
    if (!to) return FAIL(ST_NOMEM, "%s", w->module);
    memcpy(to, data, (size_t)dtype_bytes(type, a * b));
    return ST_OK;
}

static status put_pack(const writing *w) {
    const int32_t per = 32 / w->bits;
    const int64_t row = div_up(w->k, per);
    uint32_t *code = add_2(w->s, w->module, ".weight_packed", DT_I32, w->n, row);
    int64_t *shape = add_1(w->s, w->module, ".weight_shape", DT_I64, 2);
    if (!code || !shape) return FAIL(ST_NOMEM, "%s", w->module);
    shape[0] = w->n;
    shape[1] = w->k;
    for (int32_t n = 0; n < w->n; n++)
        for (int32_t j = 0; j < w->k; j++) {
            const int32_t k = column_of(w, j);
            code[n * row + k / per] |= code_of(w, n, j) << (w->bits * (k % per));
        }
    if (w->q->zero) {
        uint32_t *zero =
            add_2(w->s, w->module, ".weight_zero_point", DT_I32, div_up(w->n, per), w->groups);
        if (!zero) return FAIL(ST_NOMEM, "%s", w->module);
        for (int32_t n = 0; n < w->n; n++)
            for (int32_t g = 0; g < w->groups; g++)
                zero[(int64_t)(n / per) * w->groups + g] |= zero_of(w, n, g)
                                                            << (w->bits * (n % per));
    }
    if (w->order) TRY(put_g_idx(w, ".weight_g_idx"));
    return put_copy(w, ".weight_scale", w->q->scale_type, w->n, w->groups, w->q->scale);
}

/* 1 / x == global when there is such an x. */
static float reciprocal_of(float global) {
    float x = 1 / global;
    for (int i = 0; i < 3 && 1 / x != global; i++)
        x = i == 0 ? nextafterf(x, INFINITY) : nextafterf(1 / global, 0);
    return x;
}

static status put_fp4(const writing *w) {
    const bool nv = w->q->format == WF_NVFP4, modelopt = w->s->layout == SAVE_MODELOPT;
    TRY(put_copy(w, modelopt ? ".weight" : ".weight_packed", DT_U8, w->n, w->k / 2, w->q->code));
    TRY(put_copy(w, ".weight_scale", nv ? DT_E4M3 : DT_U8, w->n, w->groups, w->q->scale));
    if (!nv) return ST_OK;
    float *global =
        add_1(w->s, w->module, modelopt ? ".weight_scale_2" : ".weight_global_scale", DT_F32, 1);
    if (!global) return FAIL(ST_NOMEM, "%s", w->module);
    *global = modelopt ? w->q->global_scale : reciprocal_of(w->q->global_scale);
    return ST_OK;
}

static status put_fp8(const writing *w) {
    const float *scale = w->q->scale;
    TRY(put_copy(w, ".weight", DT_E4M3, w->n, w->k, w->q->code));
    if (w->q->format == WF_FP8B)
        return put_copy(w, w->s->layout == SAVE_FP8 ? ".weight_scale_inv" : ".weight_scale", DT_F32,
                        div_up(w->n, w->q->block_n), w->groups, scale);
    if (w->s->layout == SAVE_COMPRESSED)
        return put_copy(w, ".weight_scale", DT_F32, w->n, 1, scale);
    for (int32_t n = 1; n < w->n; n++)
        if (scale[n] != scale[0])
            return FAIL(ST_UNSUPPORTED, "%s: %s has one scale for a tensor, not one a row",
                        w->module, save_layout_text(w->s->layout));
    float *one = add_1(w->s, w->module, ".weight_scale", DT_F32, 1);
    if (!one) return FAIL(ST_NOMEM, "%s", w->module);
    *one = scale[0];
    return ST_OK;
}

status save_matrix(save *s, const char *name, const qmatrix *q, const int32_t *order) {
    saved *old = find(s, name);
    const size_t length = strlen(name);
    if (!old || length < 8 || strcmp(name + length - 7, ".weight") != 0)
        return FAIL(ST_NOTFOUND, "the source has no linear '%s'", name);
    if (old->view.n_dims != 2 || old->view.dim[0] != q->n || old->view.dim[1] != q->k)
        return FAIL(ST_SHAPE, "'%s' is no [%d, %d]", name, q->n, q->k);
    CHECK(q->format == s->p.weight);
    const writing w = {.s = s,
                       .module = arena_string(&s->memory, name, length - 7),
                       .q = q,
                       .order = order,
                       .n = q->n,
                       .k = q->k,
                       .groups = (int32_t)div_up(q->k, q->group),
                       .bits = weight_format_bits(q->format)};
    if (!w.module) return FAIL(ST_NOMEM, "%s", name);
    old->dropped = true;
    s->ordered |= order != NULL;
    if (q->format == WF_FP8 || q->format == WF_FP8B) return put_fp8(&w);
    if (q->format == WF_MXFP4 || q->format == WF_NVFP4) return put_fp4(&w);
    return s->layout == SAVE_AWQ          ? put_awq(&w)
           : s->layout == SAVE_COMPRESSED ? put_pack(&w)
                                          : put_gptq(&w);
}

status save_expert(save *s, const char *name, int32_t index, int32_t count, int32_t n_fused,
                   const qmatrix *q) {
    CHECK(s->layout == SAVE_GPT_OSS && q->format == WF_MXFP4 && q->n % n_fused == 0);
    char codes[256];
    snprintf(codes, sizeof codes, "%s_blocks", name);
    saved *old = find(s, name), *to = find(s, codes);
    const int64_t dim[] = {count, q->n, q->k / 32, 16};
    if (!to) {
        if (!old) return FAIL(ST_NOTFOUND, "the source has no experts '%s'", name);
        old->dropped = true;
        if (!add(s, name, "_blocks", DT_U8, 4, dim) || !add(s, name, "_scales", DT_U8, 3, dim))
            return FAIL(ST_NOMEM, "%s", name);
        to = find(s, codes);
    }
    const int64_t n = q->n, codes_k = q->k / 2, scales_k = q->k / 32;
    uint8_t *code = (uint8_t *)(uintptr_t)to->view.data + index * n * codes_k;
    uint8_t *scale = (uint8_t *)(uintptr_t)to[1].view.data + index * n * scales_k;
    for (int64_t r = 0; r < n; r++) {
        const int64_t from = r / n_fused + r % n_fused * (n / n_fused);
        memcpy(code + r * codes_k, q->code + from * codes_k, (size_t)codes_k);
        memcpy(scale + r * scales_k, (const uint8_t *)q->scale + from * scales_k, (size_t)scales_k);
    }
    return ST_OK;
}

status save_values(save *s, const char *name, const float *values, int64_t n) {
    saved *old = find(s, name);
    if (!old) return FAIL(ST_NOTFOUND, "the source has no tensor '%s'", name);
    const dtype type = old->view.type;
    if (dtype_bytes(type, n) != old->view.bytes)
        return FAIL(ST_SHAPE, "'%s' has not %lld elements", name, (long long)n);
    void *data = arena_push(&s->memory, (size_t)old->view.bytes, 1, ALIGN);
    if (!data) return FAIL(ST_NOMEM, "%s", name);
    dtype_from_f32(data, values, n, type);
    old->view.data = data;
    return ST_OK;
}

/* --- Config ------------------------------------------------------------------------------------
 */

/* Linears that stay in 16 bit, for the lists that loaders of others go by; NULL when memory is
 * short. */
static json_t *plain_modules(const save *s) {
    json_t *list = json_array();
    bool whole = list != NULL;
    for (int32_t i = 0; whole && i < s->n; i++) {
        const tensor_view *t = &s->tensor[i].view;
        const size_t n = strlen(t->name);
        if (s->tensor[i].dropped || t->n_dims != 2 || n < 8 || dtype_bits(t->type) < 16) continue;
        if (strcmp(t->name + n - 7, ".weight") != 0 || strstr(t->name, "embed")) continue;
        whole = json_array_append_new(list, json_stringn(t->name, n - 7)) == 0;
    }
    if (whole && json_array_size(list) == 0)
        whole = json_array_append_new(list, json_string("lm_head")) == 0;
    if (whole) return list;
    json_decref(list);
    return NULL;
}

static json_t *compressed_config(const save *s) {
    const weight_format f = s->p.weight;
    const bool integer = f == WF_INT4 || f == WF_INT8;
    const bool four = f == WF_INT4 || f == WF_MXFP4 || f == WF_NVFP4;
    const char *format = integer         ? "pack-quantized"
                         : f == WF_NVFP4 ? "nvfp4-pack-quantized"
                         : f == WF_MXFP4 ? "mxfp4-pack-quantized"
                                         : "float-quantized";
    const char *strategy = f == WF_FP8B    ? "block"
                           : f == WF_NVFP4 ? "tensor_group"
                           : s->p.group    ? "group"
                                           : "channel";
    json_t *group = s->p.group && f != WF_FP8B ? json_integer(s->p.group) : json_null();
    json_t *block = f == WF_FP8B ? json_pack("[i, i]", 128, 128) : json_null();
    json_t *weights = json_pack(
        "{s:i, s:s, s:b, s:o, s:s, s:o, s:b, s:o, s:s}", "num_bits", four ? 4 : 8, "type",
        integer ? "int" : "float", "symmetric", f != WF_INT4 || s->p.sym, "group_size", group,
        "strategy", strategy, "block_structure", block, "dynamic", false, "actorder",
        s->ordered ? json_string("group") : json_null(), "observer", "minmax");
    return json_pack("{s:s, s:s, s:s, s:{s:{s:[s], s:o, s:n, s:n}}, s:o, s:n}", "quant_method",
                     "compressed-tensors", "format", format, "quantization_status", "compressed",
                     "config_groups", "group_0", "targets", "Linear", "weights", weights,
                     "input_activations", "output_activations", "ignore", plain_modules(s),
                     "kv_cache_scheme");
}

static json_t *quantization_config(const save *s) {
    const int group = s->p.group ? s->p.group : -1;
    switch (s->layout) {
    case SAVE_COMPRESSED: return compressed_config(s);
    case SAVE_AWQ:
        return json_pack("{s:s, s:i, s:i, s:b, s:s, s:n}", "quant_method", "awq", "bits", 4,
                         "group_size", group, "zero_point", true, "version", "gemm",
                         "modules_to_not_convert");
    case SAVE_GPTQ:
    case SAVE_GPTQ_V2:
        return json_pack("{s:s, s:i, s:i, s:b, s:b, s:s, s:b}", "quant_method", "gptq", "bits",
                         s->p.weight == WF_INT8 ? 8 : 4, "group_size", group, "desc_act",
                         s->ordered, "sym", s->p.sym || s->p.weight == WF_INT8, "checkpoint_format",
                         s->layout == SAVE_GPTQ ? "gptq" : "gptq_v2", "lm_head", false);
    case SAVE_FP8: {
        json_t *block = s->p.weight == WF_FP8B ? json_pack("[i, i]", 128, 128) : json_null();
        return json_pack("{s:s, s:s, s:s, s:o, s:o}", "quant_method", "fp8", "fmt", "e4m3",
                         "activation_scheme", "dynamic", "weight_block_size", block,
                         "modules_to_not_convert", plain_modules(s));
    }
    case SAVE_MODELOPT:
        return json_pack("{s:s, s:s, s:o}", "quant_method", "modelopt", "quant_algo",
                         s->p.weight == WF_NVFP4 ? "NVFP4" : "FP8", "ignore", plain_modules(s));
    default:
        return json_pack("{s:s, s:[s, s, s, s]}", "quant_method", "mxfp4", "modules_to_not_convert",
                         "model.layers.*.self_attn", "model.layers.*.mlp.router",
                         "model.embed_tokens", "lm_head");
    }
}

/* The source's config.json with what was done to it; free() the result, it is jansson's. */
static status make_config(const save *s, char **text_) {
    char path[4400];
    json_t *root;
    snprintf(path, sizeof path, "%s/config.json", s->dir);
    TRY(json_file(&root, path));
    json_t *q = quantization_config(s);
    *text_ = NULL;
    if (q && json_object_set_new(root, "quantization_config", q) == 0)
        *text_ = json_dumps(root, JSON_INDENT(2));
    json_decref(root);
    return *text_ ? ST_OK : FAIL(ST_NOMEM, "config.json");
}

static status copy_files(const save *s, const char *out) {
    static const char *const names[] = {"tokenizer.json",
                                        "tokenizer_config.json",
                                        "generation_config.json",
                                        "special_tokens_map.json",
                                        "tokenizer.model",
                                        "chat_template.jinja",
                                        "vocab.json",
                                        "merges.txt",
                                        "added_tokens.json"};
    for (int32_t i = 0; i < COUNT_OF(names); i++) {
        char path[4400], *data;
        size_t n;
        snprintf(path, sizeof path, "%s/%s", s->dir, names[i]);
        if (!file_exists(path)) continue;
        TRY(file_read(&data, &n, path));
        snprintf(path, sizeof path, "%.4300s/%s", out, names[i]);
        const status st = file_write(path, data, n);
        mem_free(data);
        TRY(st);
    }
    return ST_OK;
}

static int by_element(const void *a, const void *b) {
    const tensor_view *x = a, *y = b;
    const int32_t p = dtype_bits(x->type), q = dtype_bits(y->type);
    return p != q ? (p > q ? -1 : 1) : strcmp(x->name, y->name);
}

status save_write(save *s, const char *out) {
    tensor_view *list = arena_array(&s->memory, tensor_view, (size_t)s->n);
    if (!list) return FAIL(ST_NOMEM, "%d tensors", s->n);
    int32_t n = 0;
    for (int32_t i = 0; i < s->n; i++)
        if (!s->tensor[i].dropped) list[n++] = s->tensor[i].view;
    qsort(list, (size_t)n, sizeof *list, by_element);
    char path[4400], *config;
    TRY(file_make_dirs(out));
    TRY(make_config(s, &config));
    snprintf(path, sizeof path, "%.4300s/model.safetensors", out);
    status st = safetensors_write(path, list, n);
    snprintf(path, sizeof path, "%.4300s/config.json", out);
    if (st == ST_OK && unlink(path) != 0 && errno != ENOENT)
        st = FAIL(ST_IO, "%s: %s", path, strerror(errno));
    if (st == ST_OK) st = copy_files(s, out);
    if (st == ST_OK) st = file_write(path, config, strlen(config));
    free(config);
    return st;
}
