/* packed.c - see packed.h. First the config, then the layouts one by one, then rows out of them.
 *
 * Easy to get wrong: GPTQ v1 stores the zero point minus 1; compressed-tensors' global scale
 * divides and ModelOpt's multiplies; weight_scale_inv multiplies in spite of its name; AWQ packs
 * along outputs in the order 0 4 1 5 2 6 3 7, GPTQ along inputs, compressed-tensors' zero points
 * along outputs again. */
#include "packed.h"

#include "json.h"

#include <ctype.h>
#include <math.h>
#include <string.h>

enum { BLOCK = 128, NAME_MAX_BYTES = 160, SPAN = 256 };

/* --- Config ------------------------------------------------------------------------------------
 */

typedef struct {
    const json_t *json;
    const char *where;
    packed_config *c;
} config_reader;

static status copy_word(const config_reader *r, const char *key, char *to, size_t n) {
    const char *word = NULL;
    TRY(json_opt_string(r->json, key, r->where, &word));
    if (!word) return ST_OK;
    if (strlen(word) >= n) return FAIL(ST_UNSUPPORTED, "%s: %s '%.80s'", r->where, key, word);
    for (size_t i = 0; i <= strlen(word); i++) to[i] = (char)tolower((unsigned char)word[i]);
    return ST_OK;
}

/* A boolean that may be absent (-1). */
static status opt_flag(const json_t *j, const char *key, const char *where, int32_t *out) {
    if (!json_find(j, key)) return ST_OK;
    bool v;
    TRY(json_opt_bool(j, key, where, &v));
    *out = v;
    return ST_OK;
}

static packed_scheme *add_scheme(packed_config *c) {
    packed_scheme *s = &c->scheme[c->n_schemes++];
    *s = (packed_scheme){.sym = -1};
    return s;
}

static status read_block(const json_t *list, const char *where, int32_t block[2]) {
    if (!list) return ST_OK;
    for (int i = 0; i < 2; i++) {
        const json_t *v = json_array_get(list, (size_t)i);
        if (json_array_size(list) != 2 || !json_is_integer(v) || json_integer_value(v) < 1 ||
            json_integer_value(v) > 1 << 20)
            return FAIL(ST_FORMAT, "%s: a weight block is no pair of sizes", where);
        block[i] = (int32_t)json_integer_value(v);
    }
    return ST_OK;
}

static status read_awq(config_reader *r) {
    packed_scheme *s = add_scheme(r->c);
    TRY(copy_word(r, "version", r->c->version, sizeof r->c->version));
    if (strcmp(r->c->version, "gemm") != 0)
        return FAIL(ST_UNSUPPORTED, "%s: AWQ version '%s'; only 'gemm' is read", r->where,
                    r->c->version);
    TRY(json_opt_i32(r->json, "w_bit", r->where, 1, 32, &s->bits));
    TRY(json_opt_i32(r->json, "bits", r->where, 1, 32, &s->bits));
    TRY(json_opt_i32(r->json, "q_group_size", r->where, -1, 1 << 20, &s->group));
    TRY(json_opt_i32(r->json, "group_size", r->where, -1, 1 << 20, &s->group));
    int32_t has_zero = -1;
    TRY(opt_flag(r->json, "zero_point", r->where, &has_zero));
    if (has_zero == 0)
        return FAIL(ST_UNSUPPORTED, "%s: AWQ without zero points is not read", r->where);
    s->sym = 0;
    return ST_OK;
}

static status read_gptq(config_reader *r) {
    packed_scheme *s = add_scheme(r->c);
    strcpy(r->c->version, "gptq");
    TRY(copy_word(r, "checkpoint_format", r->c->version, sizeof r->c->version));
    if (strcmp(r->c->version, "gptq") != 0 && strcmp(r->c->version, "gptq_v2") != 0)
        return FAIL(ST_UNSUPPORTED, "%s: GPTQ format '%s'; 'gptq' and 'gptq_v2' are read", r->where,
                    r->c->version);
    TRY(json_get_i32(r->json, "bits", r->where, 1, 32, &s->bits));
    TRY(json_get_i32(r->json, "group_size", r->where, -1, 1 << 20, &s->group));
    TRY(opt_flag(r->json, "sym", r->where, &s->sym));
    if (s->bits != 4 && s->bits != 8)
        return FAIL(ST_UNSUPPORTED, "%s: GPTQ of %d bits; 4 and 8 are read", r->where, s->bits);
    if (json_object_size(json_find(r->json, "dynamic"))) { /* modules may differ from the rest */
        s->bits = s->group = 0;
        s->sym = -1;
    }
    return ST_OK;
}

static status read_scheme(config_reader *r, const json_t *weights) {
    if (r->c->n_schemes == PACKED_SCHEMES_MAX)
        return FAIL(ST_UNSUPPORTED, "%s: more than %d config_groups", r->where, PACKED_SCHEMES_MAX);
    packed_scheme *s = add_scheme(r->c);
    const char *type = "int", *strategy = "";
    TRY(json_get_i32(weights, "num_bits", r->where, 1, 32, &s->bits));
    TRY(json_opt_string(weights, "type", r->where, &type));
    TRY(json_opt_string(weights, "strategy", r->where, &strategy));
    s->is_float = strcmp(type, "float") == 0;
    TRY(opt_flag(weights, "symmetric", r->where, &s->sym));
    TRY(json_opt_i32(weights, "group_size", r->where, -1, 1 << 20, &s->group));
    if (strcmp(strategy, "channel") == 0 || strcmp(strategy, "tensor") == 0) s->group = -1;
    return read_block(json_find(weights, "block_structure"), r->where, s->block);
}

static status read_compressed(config_reader *r) {
    static const char *const known[] = {
        "pack-quantized",       "float-quantized",      "int-quantized",   "naive-quantized",
        "nvfp4-pack-quantized", "mxfp4-pack-quantized", "mixed-precision", "dense"};
    TRY(copy_word(r, "format", r->c->version, sizeof r->c->version));
    bool fine = false;
    for (int32_t i = 0; i < COUNT_OF(known); i++) fine |= strcmp(r->c->version, known[i]) == 0;
    if (!fine)
        return FAIL(ST_UNSUPPORTED, "%s: compressed-tensors format '%s' is not read", r->where,
                    r->c->version);
    const char *sparse = "dense";
    const json_t *sparsity = json_find(r->json, "sparsity_config");
    if (json_object_size(sparsity)) TRY(json_opt_string(sparsity, "format", r->where, &sparse));
    if (strcmp(sparse, "dense") != 0)
        return FAIL(ST_UNSUPPORTED, "%s: sparsity format '%s' is not read", r->where, sparse);
    const char *key;
    json_t *group;
    json_object_foreach(json_find(r->json, "config_groups"), key, group) {
        const json_t *weights = json_find(group, "weights");
        if (weights) TRY(read_scheme(r, weights));
    }
    return ST_OK;
}

static status read_modelopt(config_reader *r) {
    static const char *const known[] = {"fp8", "nvfp4", "w4a16_nvfp4", "fp8_per_channel_per_token",
                                        "mixed_precision"};
    const json_t *inner = json_find(r->json, "quantization"); /* hf_quant_config.json */
    if (inner) r->json = inner;
    TRY(copy_word(r, "quant_algo", r->c->version, sizeof r->c->version));
    for (int32_t i = 0; i < COUNT_OF(known); i++)
        if (strcmp(r->c->version, known[i]) == 0) return ST_OK;
    return FAIL(ST_UNSUPPORTED, "%s: ModelOpt quant_algo '%s'; FP8 and NVFP4 are read", r->where,
                r->c->version);
}

static status read_fp8(config_reader *r) {
    packed_scheme *s = add_scheme(r->c);
    s->bits = 8;
    s->is_float = true;
    const char *fmt = "e4m3";
    TRY(json_opt_string(r->json, "fmt", r->where, &fmt));
    if (strcmp(fmt, "e4m3") != 0)
        return FAIL(ST_UNSUPPORTED, "%s: fmt '%s'; only e4m3 is read", r->where, fmt);
    return read_block(json_find(r->json, "weight_block_size"), r->where, s->block);
}

static status read_mxfp4(config_reader *r) {
    (void)r;
    return ST_OK;
}

static const struct {
    const char *method;
    status (*read)(config_reader *r);
} methods[] = {
    {"awq", read_awq}, {"gptq", read_gptq},   {"compressed-tensors", read_compressed},
    {"fp8", read_fp8}, {"mxfp4", read_mxfp4}, {"modelopt", read_modelopt},
};

static status read_method(config_reader *r, const char *otherwise) {
    packed_config *c = r->c;
    if (!json_is_object(r->json))
        return FAIL(ST_FORMAT, "%s: quantization_config is no object", r->where);
    TRY(copy_word(r, "quant_method", c->method, sizeof c->method));
    if (!c->method[0] && otherwise) snprintf(c->method, sizeof c->method, "%s", otherwise);
    if (!c->method[0])
        return FAIL(ST_FORMAT, "%s: quantization_config has no quant_method", r->where);
    for (int32_t i = 0; i < COUNT_OF(methods); i++)
        if (strcmp(c->method, methods[i].method) == 0) return methods[i].read(r);
    return FAIL(ST_UNSUPPORTED, "%s: quant_method '%s' is not read", r->where, c->method);
}

status packed_config_load(packed_config *out, const char *dir) {
    static const struct {
        const char *file, *key, *method;
    } places[] = {{"config.json", "quantization_config", NULL},
                  {"config.json", "compression_config", "compressed-tensors"},
                  {"quantize_config.json", NULL, "gptq"},
                  {"hf_quant_config.json", NULL, "modelopt"}};
    *out = (packed_config){0};
    for (int32_t i = 0; i < COUNT_OF(places); i++) {
        char path[4400];
        snprintf(path, sizeof path, "%.4300s/%s", dir, places[i].file);
        if (!file_exists(path)) continue;
        json_t *root;
        TRY(json_file(&root, path));
        const json_t *found = places[i].key ? json_find(root, places[i].key) : root;
        config_reader r = {.json = found, .where = path, .c = out};
        const status st = found ? read_method(&r, places[i].method) : ST_OK;
        json_decref(root);
        if (st != ST_OK || found) return st;
    }
    return ST_OK;
}

/* --- What tensors say, against each other and the config -----------------------------------------
 */

typedef struct {
    packed_matrix *m;
    const safetensors *files;
    const char *module;
    const packed_config *c;
    int32_t n, k;
} finder;

static const tensor_view *look(const finder *f, const char *ending) {
    char name[NAME_MAX_BYTES];
    if (snprintf(name, sizeof name, "%s%s", f->module, ending) >= (int)sizeof name) return NULL;
    return safetensors_find(f->files, name);
}

/* The tensor with this ending, of one of these types (ends with DT_COUNT), and noted as used. */
static status need(finder *f, const char *ending, const dtype *types, const tensor_view **out) {
    const tensor_view *t = look(f, ending);
    if (!t) return FAIL(ST_NOTFOUND, "tensor '%s%s' is missing", f->module, ending);
    while (*types != DT_COUNT && *types != t->type) types++;
    if (*types == DT_COUNT)
        return FAIL(ST_UNSUPPORTED, "tensor '%s' has elements of %s, which its layout does not use",
                    t->name, dtype_text(t->type));
    CHECK(f->m->n_tensors < COUNT_OF(f->m->tensor));
    f->m->tensor[f->m->n_tensors++] = t;
    *out = t;
    return ST_OK;
}

static status has_shape(const tensor_view *t, const int64_t *dim, int32_t n_dims) {
    if (t->n_dims == n_dims && memcmp(t->dim, dim, (size_t)n_dims * sizeof *dim) == 0) return ST_OK;
    char got[160], want[160];
    return FAIL(ST_SHAPE, "tensor '%s' is %s, its layout makes it %s", t->name,
                tensor_shape_text(got, sizeof got, t->dim, t->n_dims),
                tensor_shape_text(want, sizeof want, dim, n_dims));
}

static status has_shape_2(const tensor_view *t, int64_t a, int64_t b) {
    return has_shape(t, (const int64_t[]){a, b}, 2);
}

static const dtype int_types[] = {DT_I32, DT_COUNT};
static const dtype byte_types[] = {DT_U8, DT_COUNT};
static const dtype float_types[] = {DT_F32, DT_F16, DT_BF16, DT_COUNT};

static status method_is(const finder *f, const char *tensors, const char *method) {
    if (strcmp(f->c->method, method) == 0) return ST_OK;
    if (!f->c->method[0])
        return FAIL(ST_FORMAT,
                    "tensor '%s': tensors of %s, but config.json has no quantization_config to "
                    "say which version",
                    f->m->name, tensors);
    return FAIL(ST_FORMAT, "tensor '%s': tensors of %s, but quant_method is '%s'", f->m->name,
                tensors, f->c->method);
}

/* Some scheme of the config has these bits, this kind, group and block. Sets sym from it where
 * tensors leave it open. */
static status agrees(finder *f, int32_t bits, bool is_float) {
    packed_matrix *m = f->m;
    if (f->c->n_schemes == 0) return ST_OK;
    for (int32_t i = 0; i < f->c->n_schemes; i++) {
        const packed_scheme *s = &f->c->scheme[i];
        if (s->bits && (s->bits != bits || s->is_float != is_float)) continue;
        const bool blocks = m->block_n > 1 && m->block_n < m->n;
        if (s->group > 0 && !blocks && s->group != m->group) continue;
        if (s->group < 0 && m->group != m->k) continue;
        if (s->block[0] && (s->block[0] != m->block_n || s->block[1] != m->group) &&
            !(m->block_n >= m->n && m->group >= m->k))
            continue;
        if (s->sym >= 0 && m->zero.data && !m->zero_add && s->sym != m->sym &&
            strcmp(f->c->method, "compressed-tensors") == 0)
            continue;
        if (s->sym == 0 && !m->zero.data && !is_float) continue;
        return ST_OK;
    }
    const packed_scheme *s = &f->c->scheme[0];
    return FAIL(ST_FORMAT,
                "tensor '%s' holds %d-bit %s in groups of %d%s; quantization_config says %d bits, "
                "group %d",
                m->name, bits, is_float ? "floats" : "integers", m->group,
                m->zero.data ? " with zero points" : "", s->bits, s->group);
}

/* Codes in 32-bit words along k or n. */
static packed_field words(const tensor_view *t, int32_t bits, bool along_n, bool awq,
                          int64_t n_stride, int64_t k_stride) {
    return (packed_field){.data = t->data,
                          .word_bits = 32,
                          .bits = bits,
                          .n_per = along_n ? 32 / bits : 1,
                          .k_per = along_n ? 1 : 32 / bits,
                          .awq_order = awq,
                          .n_stride = n_stride,
                          .k_stride = k_stride};
}

static packed_field bytes(const void *data, int32_t bits, int64_t k) {
    const int32_t per = 8 / bits;
    return (packed_field){.data = data,
                          .word_bits = 8,
                          .bits = bits,
                          .n_per = 1,
                          .k_per = per,
                          .n_stride = k / per,
                          .k_stride = 1};
}

static void set_scale(packed_matrix *m, const tensor_view *t, int64_t n_stride, int64_t g_stride) {
    m->scale = t->data;
    m->scale_type = t->type;
    m->scale_n_stride = n_stride;
    m->scale_g_stride = g_stride;
}

/* --- AWQ, GPTQ ---------------------------------------------------------------------------------
 */

/* Scales [groups, n] give the group. */
static status take_groups(finder *f, const tensor_view *scales) {
    const int64_t groups = scales->n_dims == 2 ? scales->dim[0] : 0;
    if (groups < 1 || groups > f->k)
        return FAIL(ST_SHAPE, "tensor '%s' is no [groups, %d]", scales->name, f->n);
    TRY(has_shape_2(scales, groups, f->n));
    f->m->group = (int32_t)div_up(f->k, groups);
    if (div_up(f->k, f->m->group) != groups)
        return FAIL(ST_SHAPE, "tensor '%s': %lld groups do not divide %d inputs", scales->name,
                    (long long)groups, f->k);
    set_scale(f->m, scales, 1, f->n);
    return ST_OK;
}

static status find_awq(finder *f) {
    const tensor_view *code, *zero, *scale;
    packed_matrix *m = f->m;
    TRY(method_is(f, "AWQ", "awq"));
    TRY(need(f, ".qweight", int_types, &code));
    TRY(need(f, ".qzeros", int_types, &zero));
    TRY(need(f, ".scales", float_types, &scale));
    if (f->n % 8) return FAIL(ST_SHAPE, "tensor '%s': %d outputs in words of 8", m->name, f->n);
    TRY(has_shape_2(code, f->k, f->n / 8));
    TRY(take_groups(f, scale));
    TRY(has_shape_2(zero, div_up(f->k, m->group), f->n / 8));
    m->code = words(code, 4, true, true, 1, f->n / 8);
    m->zero = words(zero, 4, true, true, 1, f->n / 8);
    return agrees(f, 4, false);
}

static status take_g_idx(finder *f, const char *ending) {
    const tensor_view *t;
    packed_matrix *m = f->m;
    if (!look(f, ending)) return ST_OK;
    TRY(need(f, ending, int_types, &t));
    TRY(has_shape(t, (const int64_t[]){f->k}, 1));
    const int32_t *g = t->data, groups = (int32_t)div_up(f->k, m->group);
    bool trivial = true, unset = true;
    for (int32_t i = 0; i < f->k; i++) {
        unset &= g[i] == -1; /* compressed-tensors: there, but not used */
        trivial &= g[i] == i / m->group;
    }
    if (unset) return ST_OK;
    for (int32_t i = 0; i < f->k; i++)
        if (g[i] < 0 || g[i] >= groups)
            return FAIL(ST_RANGE, "tensor '%s': input %d is in group %d of %d", t->name, i, g[i],
                        groups);
    if (!trivial) m->g_idx = g;
    return ST_OK;
}

static status find_gptq(finder *f, const tensor_view *code) {
    const tensor_view *zero, *scale;
    packed_matrix *m = f->m;
    TRY(method_is(f, "GPTQ", "gptq"));
    const int32_t bits = code->dim[0] == div_up(f->k, 8) ? 4 : 8, per = 32 / bits;
    TRY(need(f, ".qweight", int_types, &code));
    TRY(need(f, ".qzeros", int_types, &zero));
    TRY(need(f, ".scales", float_types, &scale));
    if (f->k % per || f->n % per)
        return FAIL(ST_SHAPE, "tensor '%s': %d x %d in words of %d", m->name, f->n, f->k, per);
    TRY(has_shape_2(code, f->k / per, f->n));
    TRY(take_groups(f, scale));
    TRY(has_shape_2(zero, div_up(f->k, m->group), f->n / per));
    m->format = bits == 4 ? WF_INT4 : WF_INT8;
    m->code = words(code, bits, false, false, 1, f->n);
    m->zero = words(zero, bits, true, false, 1, f->n / per);
    m->zero_add = strcmp(f->c->version, "gptq") == 0;
    m->code_flip = bits == 8 ? 0x80 : 0;
    m->sym = f->c->scheme[0].sym == 1;
    TRY(agrees(f, bits, false));
    return take_g_idx(f, ".g_idx");
}

static status find_qweight(finder *f, const tensor_view *code) {
    f->m->name = code->name;
    f->m->format = WF_INT4;
    if (code->n_dims != 2) return has_shape_2(code, f->k, f->n / 8);
    if (code->dim[0] == f->k) return find_awq(f);
    if (code->dim[0] == div_up(f->k, 8) || code->dim[0] == div_up(f->k, 4))
        return find_gptq(f, code);
    char got[160];
    return FAIL(ST_SHAPE, "tensor '%s' is %s: neither AWQ nor GPTQ of 4 or 8 bits for %d x %d",
                code->name, tensor_shape_text(got, sizeof got, code->dim, 2), f->n, f->k);
}

/* --- compressed-tensors --------------------------------------------------------------------------
 */

static status check_shape_tensor(finder *f) {
    static const dtype types[] = {DT_I32, DT_I64, DT_COUNT};
    const tensor_view *t;
    if (!look(f, ".weight_shape")) return ST_OK;
    TRY(need(f, ".weight_shape", types, &t));
    TRY(has_shape(t, (const int64_t[]){2}, 1));
    int64_t v[2];
    for (int i = 0; i < 2; i++)
        v[i] = t->type == DT_I64 ? ((const int64_t *)t->data)[i] : ((const int32_t *)t->data)[i];
    if (v[0] == f->n && v[1] == f->k) return ST_OK;
    return FAIL(ST_SHAPE, "tensor '%s' says [%lld, %lld], config.json makes it [%d, %d]", t->name,
                (long long)v[0], (long long)v[1], f->n, f->k);
}

/* [n, groups] (or [n] for one group). */
static status take_row_groups(finder *f, const tensor_view *t) {
    packed_matrix *m = f->m;
    const int64_t groups = t->n_dims == 1 ? 1 : t->n_dims == 2 ? t->dim[1] : 0;
    if (groups < 1 || groups > f->k || t->dim[0] != f->n)
        return FAIL(ST_SHAPE, "tensor '%s' is no [%d, groups]", t->name, f->n);
    m->group = (int32_t)div_up(f->k, groups);
    if (div_up(f->k, m->group) != groups)
        return FAIL(ST_SHAPE, "tensor '%s': %lld groups do not divide %d inputs", t->name,
                    (long long)groups, f->k);
    set_scale(m, t, groups, 1);
    return ST_OK;
}

static status find_pack(finder *f) {
    const tensor_view *code, *scale, *zero;
    packed_matrix *m = f->m;
    TRY(need(f, ".weight_packed", int_types, &code));
    TRY(need(f, ".weight_scale", float_types, &scale));
    const int32_t bits = code->n_dims == 2 && code->dim[1] == div_up(f->k, 4) ? 8 : 4;
    const int32_t per = 32 / bits;
    TRY(has_shape_2(code, f->n, div_up(f->k, per)));
    TRY(check_shape_tensor(f));
    TRY(take_row_groups(f, scale));
    const int64_t groups = m->scale_n_stride;
    m->format = bits == 4 ? WF_INT4 : WF_INT8;
    m->code = words(code, bits, false, false, div_up(f->k, per), 1);
    m->code_flip = bits == 8 ? 0x80 : 0;
    m->sym = true;
    if (look(f, ".weight_zero_point")) {
        TRY(need(f, ".weight_zero_point", int_types, &zero));
        TRY(has_shape_2(zero, div_up(f->n, per), groups));
        m->zero = words(zero, bits, true, false, groups, 1);
        m->sym = false;
    }
    TRY(agrees(f, bits, false));
    return take_g_idx(f, ".weight_g_idx");
}

/* The one f32 of a matrix: [1] or []. */
static status take_scalar(finder *f, const char *ending, float *out) {
    static const dtype types[] = {DT_F32, DT_COUNT};
    const tensor_view *t;
    TRY(need(f, ending, types, &t));
    if (t->bytes != 4) return has_shape(t, (const int64_t[]){1}, 1);
    memcpy(out, t->data, 4);
    if (*out > 0 && *out <= 3e38f) return ST_OK;
    return FAIL(ST_FORMAT, "tensor '%s' is %g", t->name, (double)*out);
}

static status find_fp4(finder *f, const char *codes) {
    static const dtype nv[] = {DT_E4M3, DT_COUNT}, mx[] = {DT_U8, DT_UE8M0, DT_COUNT};
    const tensor_view *code, *scale;
    packed_matrix *m = f->m;
    const bool divides = look(f, ".weight_global_scale") != NULL;
    const bool is_nv = divides || look(f, ".weight_scale_2");
    m->format = is_nv ? WF_NVFP4 : WF_MXFP4;
    m->group = is_nv ? 16 : 32;
    TRY(need(f, codes, byte_types, &code));
    TRY(need(f, ".weight_scale", is_nv ? nv : mx, &scale));
    if (f->k % m->group)
        return FAIL(ST_SHAPE, "tensor '%s': %d inputs in groups of %d", m->name, f->k, m->group);
    TRY(has_shape_2(code, f->n, f->k / 2));
    TRY(has_shape_2(scale, f->n, f->k / m->group));
    set_scale(m, scale, f->k / m->group, 1);
    if (!is_nv) m->scale_type = DT_UE8M0;
    m->code = bytes(code->data, 4, f->k);
    TRY(agrees(f, 4, true));
    if (!is_nv) return ST_OK;
    TRY(take_scalar(f, divides ? ".weight_global_scale" : ".weight_scale_2", &m->global_scale));
    if (divides) m->global_scale = 1 / m->global_scale;
    return ST_OK;
}

/* --- One byte a weight -------------------------------------------------------------------------
 */

/* Scales of a byte matrix: one for all, one a row, or one a block. */
static status take_byte_scale(finder *f, const tensor_view *t) {
    packed_matrix *m = f->m;
    int32_t block[2] = {BLOCK, BLOCK};
    for (int32_t i = 0; i < f->c->n_schemes; i++)
        if (f->c->scheme[i].block[0]) memcpy(block, f->c->scheme[i].block, sizeof block);
    const int64_t count = t->n_dims == 0   ? 1
                          : t->n_dims == 1 ? t->dim[0]
                          : t->n_dims == 2 ? t->dim[0] * t->dim[1]
                                           : -1;
    const bool blocks = t->n_dims == 2 && t->dim[0] == div_up(f->n, block[0]) &&
                        t->dim[1] == div_up(f->k, block[1]);
    m->group = f->k;
    if (blocks && !(t->dim[0] == f->n && t->dim[1] == 1 && f->n > 1)) {
        m->group = block[1];
        m->block_n = block[0];
        set_scale(m, t, t->dim[1], 1);
        if (m->format == WF_INT8 || block[0] != BLOCK || block[1] != BLOCK)
            m->only16 = "the engine's blocks are 128 x 128 of FP8";
        else
            m->format = WF_FP8B;
        return ST_OK;
    }
    if (count == 1) {
        m->block_n = f->n;
        set_scale(m, t, 0, 0);
        return ST_OK;
    }
    if (count == f->n && t->dim[0] == f->n) {
        set_scale(m, t, 1, 0);
        return ST_OK;
    }
    char got[160];
    return FAIL(ST_SHAPE, "tensor '%s' is %s: no scale for the tensor, a row or %d x %d blocks",
                t->name, tensor_shape_text(got, sizeof got, t->dim, t->n_dims), block[0], block[1]);
}

static status find_bytes(finder *f, dtype type) {
    const tensor_view *code, *scale;
    packed_matrix *m = f->m;
    const dtype types[] = {type, DT_COUNT};
    m->format = type == DT_E4M3 ? WF_FP8 : WF_INT8;
    TRY(need(f, ".weight", types, &code));
    TRY(need(f, look(f, ".weight_scale_inv") ? ".weight_scale_inv" : ".weight_scale", float_types,
             &scale));
    TRY(has_shape_2(code, f->n, f->k));
    TRY(take_byte_scale(f, scale));
    m->code = bytes(code->data, 8, f->k);
    m->sym = true;
    if (look(f, ".weight_zero_point"))
        return FAIL(ST_UNSUPPORTED, "tensor '%s.weight_zero_point': bytes with zero points",
                    f->module);
    return agrees(f, 8, type == DT_E4M3);
}

/* --- Finding -----------------------------------------------------------------------------------
 */

static bool is_integer(const packed_matrix *m) {
    return m->format == WF_INT4 || m->format == WF_INT8;
}

/* Codes that no precision name describes, only their values. */
static void judge(packed_matrix *m) {
    if (m->only16) return;
    if (m->format == WF_INT8 && !m->sym)
        m->only16 = "8-bit codes with zero points have no precision name";
    if (is_integer(m) && (m->group % 16 || m->k % m->group))
        m->only16 = "the engine's groups are multiples of 16 that divide the inputs";
    if (!m->g_idx || m->only16) return;
    /* Canonical columns are sorted by group: all must be of one size. */
    const int32_t groups = m->k / m->group;
    for (int32_t g = 0; g < groups && !m->only16; g++) {
        int32_t count = 0;
        for (int32_t i = 0; i < m->k; i++) count += m->g_idx[i] == g;
        if (count != m->group) m->only16 = "its g_idx makes groups of different sizes";
    }
}

bool packed_exists(const safetensors *files, const char *module) {
    const finder f = {.files = files, .module = module};
    return look(&f, ".qweight") || look(&f, ".weight_packed") || look(&f, "_blocks");
}

status packed_find(packed_matrix *out, bool *found, const safetensors *files, const char *module,
                   int32_t n, int32_t k, const packed_config *c) {
    packed_matrix m = {.n = n, .k = k, .group = k, .block_n = 1, .global_scale = 1};
    finder f = {.m = &m, .files = files, .module = module, .c = c, .n = n, .k = k};
    const tensor_view *q = look(&f, ".qweight"), *p = look(&f, ".weight_packed"),
                      *w = look(&f, ".weight");
    *found = false;
    if ((q && p) || (q && w) || (p && w))
        return FAIL(ST_FORMAT, "tensor '%s': the same weight is there in another layout",
                    (q ? q : p)->name);
    status st = ST_OK;
    const tensor_view *codes = q ? q : p ? p : w;
    if (!codes) return ST_OK;
    m.name = codes->name;
    if (q)
        st = find_qweight(&f, q);
    else if (p)
        st = p->type == DT_U8 ? find_fp4(&f, ".weight_packed") : find_pack(&f);
    else if (w->type == DT_E4M3 || w->type == DT_I8)
        st = find_bytes(&f, w->type);
    else if (w->type == DT_U8)
        st = find_fp4(&f, ".weight");
    else
        return ST_OK;
    TRY(st);
    judge(&m);
    *out = m;
    *found = true;
    return ST_OK;
}

status packed_find_blocks(packed_matrix *out, bool *found, const safetensors *files,
                          const char *name, int32_t index, int32_t count, int32_t n, int32_t k,
                          const packed_config *c) {
    packed_matrix m = {.n = n, .k = k, .group = 32, .block_n = 1, .global_scale = 1};
    finder f = {.m = &m, .files = files, .module = name, .c = c, .n = n, .k = k};
    const tensor_view *code, *scale;
    *found = false;
    if (!look(&f, "_blocks")) return ST_OK;
    m.format = WF_MXFP4;
    TRY(need(&f, "_blocks", byte_types, &code));
    TRY(need(&f, "_scales", byte_types, &scale));
    if (k % 32) return FAIL(ST_SHAPE, "tensor '%s': %d inputs in blocks of 32", code->name, k);
    m.name = code->name;
    TRY(has_shape(code, (const int64_t[]){count, n, k / 32, 16}, 4));
    TRY(has_shape(scale, (const int64_t[]){count, n, k / 32}, 3));
    if (c->method[0]) TRY(method_is(&f, "MXFP4", "mxfp4"));
    m.code = bytes((const uint8_t *)code->data + (int64_t)index * n * k / 2, 4, k);
    set_scale(&m, scale, k / 32, 1);
    m.scale_type = DT_UE8M0;
    m.scale = (const uint8_t *)scale->data + (int64_t)index * n * k / 32;
    *out = m;
    *found = true;
    return ST_OK;
}

/* --- Rows --------------------------------------------------------------------------------------
 */

static uint32_t word_at(const packed_field *f, int64_t i) {
    return f->word_bits == 32 ? ((const uint32_t *)f->data)[i] : ((const uint8_t *)f->data)[i];
}

/* out[i] = field(n, k0 + i). */
static void fields(const packed_field *f, int32_t n, int32_t k0, int32_t count, uint8_t *out) {
    static const uint8_t awq_slot[8] = {0, 4, 1, 5, 2, 6, 3, 7};
    const uint32_t mask = (1u << f->bits) - 1;
    const int64_t base = n / f->n_per * f->n_stride;
    const int32_t in_n = n % f->n_per, slot_n = f->awq_order ? awq_slot[in_n] : in_n;
    for (int32_t i = 0; i < count; i++) {
        const int32_t k = k0 + i, slot = f->k_per > 1 ? k % f->k_per : slot_n;
        out[i] =
            (uint8_t)(word_at(f, base + k / f->k_per * f->k_stride) >> (f->bits * slot) & mask);
    }
}

static float scale_at(const packed_matrix *m, int32_t row, int32_t g) {
    const int64_t i = row / m->block_n * m->scale_n_stride + g * m->scale_g_stride;
    switch (m->scale_type) {
    case DT_F16: return f32_from_f16(((const uint16_t *)m->scale)[i]);
    case DT_BF16: return f32_from_bf16(((const uint16_t *)m->scale)[i]);
    case DT_E4M3: return f32_from_e4m3(((const uint8_t *)m->scale)[i]);
    case DT_UE8M0: return f32_from_ue8m0(((const uint8_t *)m->scale)[i]);
    default: CHECK(m->scale_type == DT_F32); return ((const float *)m->scale)[i];
    }
}

/* Unsigned, as stored; the middle of the range when there are none. */
static int32_t zero_at(const packed_matrix *m, int32_t row, int32_t g) {
    if (!is_integer(m)) return 0;
    const int32_t bits = m->format == WF_INT4 ? 4 : 8;
    if (!m->zero.data) return 1 << (bits - 1);
    uint8_t z;
    fields(&m->zero, row, g, 1, &z);
    return (z + m->zero_add) & ((1 << bits) - 1);
}

static int32_t groups_of(const packed_matrix *m) { return (int32_t)div_up(m->k, m->group); }

/* What is wrong with row r, to be said. */
static status check_row(const packed_matrix *m, int32_t r) {
    const int32_t groups = groups_of(m), middle = m->format == WF_INT4 ? 8 : 128;
    for (int32_t g = 0; g < groups; g++) {
        if (r % m->block_n == 0) {
            const float s = scale_at(m, r, g);
            if (!(s >= 0 && isfinite(s)))
                return FAIL(ST_FORMAT, "tensor '%s': scale of row %d, group %d is %g", m->name, r,
                            g, (double)s);
            if (m->format == WF_INT4 && s >= 127.96875f) /* of which fp16 makes 128 */
                return FAIL(ST_UNSUPPORTED,
                            "tensor '%s': scale of row %d, group %d is %g; of 4 bits they must be "
                            "below 128",
                            m->name, r, g, (double)s);
        }
        if (m->zero.data && m->sym && zero_at(m, r, g) != middle)
            return FAIL(ST_FORMAT,
                        "tensor '%s': zero point of row %d, group %d is %d; quantization_config "
                        "says symmetric",
                        m->name, r, g, zero_at(m, r, g));
    }
    return ST_OK;
}

/* Scales [groups] of a row: finite, and negative only as -0, seen in their bits. Those of WF_INT4
 * are below 128 when rounded to fp16: its kernels multiply by 512 of them (linear_dequant.cuh). */
#define SCALES_FINE(type, most, sign)                                                              \
    do {                                                                                           \
        const type *v = (const type *)m->scale + at;                                               \
        for (int32_t g = 0; g < groups; g++, v += m->scale_g_stride)                               \
            fine &= (*v <= (most)) | (*v == (sign));                                               \
    } while (0)

static bool row_is_fine(const packed_matrix *m, int32_t r) {
    const int32_t groups = groups_of(m), middle = m->format == WF_INT4 ? 8 : 128;
    const int64_t at = r / m->block_n * m->scale_n_stride;
    const bool small = m->format == WF_INT4;
    int fine = 1;
    for (int32_t g = 0; g < groups && m->zero.data && m->sym; g++)
        fine &= zero_at(m, r, g) == middle;
    if (r % m->block_n) return fine;
    switch (m->scale_type) {
    case DT_F16: SCALES_FINE(uint16_t, small ? 0x57ff : 0x7bff, 0x8000); break;
    case DT_BF16: SCALES_FINE(uint16_t, small ? 0x42ff : 0x7f7f, 0x8000); break;
    case DT_E4M3: SCALES_FINE(uint8_t, 0x7e, 0x80); break;
    case DT_UE8M0: SCALES_FINE(uint8_t, 0xfe, 0xfe); break;
    default: SCALES_FINE(uint32_t, small ? 0x42ffefffu : 0x7f7fffffu, 0x80000000u);
    }
    return fine;
}

/* Runs before every load, so on all cores. */
status packed_check(const packed_matrix *m) {
    int32_t first = m->n;
#pragma omp parallel for schedule(static) reduction(min : first) if (m->n >= 256)
    for (int32_t r = 0; r < m->n; r++)
        if (!row_is_fine(m, r) && r < first) first = r;
    return first < m->n ? check_row(m, first) : ST_OK;
}

void packed_row(const packed_matrix *m, int32_t row, float *out) {
    const bool four = m->code.bits == 4;
    const dtype type = four ? DT_E2M1 : DT_E4M3;
    uint8_t code[SPAN];
    int32_t group = -1;
    float s = 0, z = 0;
    for (int32_t k0 = 0; k0 < m->k; k0 += SPAN) {
        const int32_t count = (int32_t)i64_min(SPAN, m->k - k0);
        fields(&m->code, row, k0, count, code);
        for (int32_t i = 0; i < count; i++) {
            const int32_t k = k0 + i, g = m->g_idx ? m->g_idx[k] : k / m->group;
            if (g != group) {
                group = g;
                s = scale_at(m, row, g);
                z = (float)zero_at(m, row, g);
                if (m->format == WF_INT8 && !m->code_flip) z = 0;
            }
            float x;
            if (!is_integer(m))
                x = type == DT_E2M1 ? f32_from_e2m1(code[i]) : f32_from_e4m3(code[i]);
            else
                x = m->format == WF_INT8 && !m->code_flip ? (float)(int8_t)code[i] : (float)code[i];
            out[k] = (x - z) * s * m->global_scale;
        }
    }
}

static void store_scale(qmatrix *q, int64_t at, const packed_matrix *m, int32_t row, int32_t g) {
    const float s = scale_at(m, row, g);
    switch (q->scale_type) {
    case DT_F16: ((uint16_t *)q->scale)[at] = f16_from_f32(s > 65504.f ? 65504.f : s); return;
    case DT_F32: ((float *)q->scale)[at] = s; return;
    default: /* the same type on both sides, bit for bit */
        ((uint8_t *)q->scale)[at] =
            ((const uint8_t *)
                 m->scale)[row / m->block_n * m->scale_n_stride + g * m->scale_g_stride];
    }
}

void packed_canonical(const packed_matrix *m, int32_t row, const int32_t *order, qmatrix *q,
                      int32_t to) {
    CHECK(!m->only16);
    CHECK(m->format == q->format);
    CHECK(m->k == q->k);
    CHECK(m->group == q->group);
    const bool four = m->code.bits == 4;
    uint8_t *code = q->code + (four ? (int64_t)to * q->k / 2 : (int64_t)to * q->k);
    for (int32_t k0 = 0; k0 < m->k; k0 += SPAN) {
        const int32_t count = (int32_t)i64_min(SPAN, m->k - k0);
        uint8_t field[SPAN];
        if (!order)
            fields(&m->code, row, k0, count, field);
        else
            for (int32_t i = 0; i < count; i++) fields(&m->code, row, order[k0 + i], 1, field + i);
        if (four)
            for (int32_t i = 0; i < count; i += 2)
                code[(k0 + i) / 2] = (uint8_t)(field[i] | field[i + 1] << 4);
        else
            for (int32_t i = 0; i < count; i++) code[k0 + i] = field[i] ^ m->code_flip;
    }
    const int32_t groups = groups_of(m);
    for (int32_t g = 0; g < groups; g++) {
        if (to % q->block_n == 0) store_scale(q, to / q->block_n * (int64_t)groups + g, m, row, g);
        if (q->zero) q->zero[(int64_t)to * groups + g] = (uint8_t)zero_at(m, row, g);
    }
}

status packed_order(const packed_matrix *m, int32_t *order) {
    CHECK(m->g_idx != NULL);
    CHECK(!m->only16);
    const int32_t groups = groups_of(m);
    for (int32_t g = 0, n = 0; g < groups; g++)
        for (int32_t i = 0; i < m->k; i++)
            if (m->g_idx[i] == g) order[n++] = i;
    return ST_OK;
}
