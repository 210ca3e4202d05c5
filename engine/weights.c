/* weights.c - see weights.h. All names of tensors stand in one table; which row of it a checkpoint
 * follows is decided by the tensors that are there, then checked against the config: each shape,
 * and at the end that no tensor is left over. */
#include "weights.h"

#include "json.h"
#include "rng.h"
#include "safetensors.h"

#include <math.h>
#include <string.h>

/* --- Fields and shapes -------------------------------------------------------------------------
 */

static const char *const field_texts[] = {
    [0] = "embed",
    [1] = "norm",
    [2] = "head",
#define X(field, ...) [WEIGHT_##field + 3] = #field,
#include "layer.def"
#undef X
};

const char *weight_field_text(weight_field f) {
    CHECK(f >= WEIGHT_embed && f < WEIGHT_COUNT);
    return field_texts[f + 3];
}

bool weight_field_present(const model_config *c, weight_field f) {
    return f == WEIGHT_head ? !c->tied : weight_field_shape(c, f).count > 0;
}

static void set_fused(const model_config *c, weight_field f, weight_shape *s) {
    s->n_fused = 1;
    s->fused_rows[0] = s->n;
    if (f == WEIGHT_qkv) {
        s->n_fused = 3;
        s->fused_rows[0] = c->n_heads * c->head_dim;
        s->fused_rows[1] = s->fused_rows[2] = c->n_kv_heads * c->head_dim;
    } else if (f == WEIGHT_gate_up || f == WEIGHT_experts_gate_up) {
        s->n_fused = 2;
        s->fused_rows[0] = s->fused_rows[1] = s->n / 2;
    }
}

weight_shape weight_field_shape(const model_config *c, weight_field f) {
    weight_shape s = {0};
    switch (f) {
    case WEIGHT_embed: s = (weight_shape){.n = c->vocab, .k = c->dim, .count = 1}; break;
    case WEIGHT_norm: s = (weight_shape){.n = 1, .k = c->dim, .count = 1}; break;
    case WEIGHT_head:
        s = (weight_shape){.n = c->vocab, .k = c->dim, .count = 1, .shard = SHARD_ROWS};
        break;
#define X(field, n_, k_, count_, quantise_, shard_, bias_, present)                                \
    case WEIGHT_##field:                                                                           \
        if (present)                                                                               \
            s = (weight_shape){.n = n_,                                                            \
                               .k = k_,                                                            \
                               .count = count_,                                                    \
                               .quantise = quantise_,                                              \
                               .has_bias = bias_,                                                  \
                               .shard = shard_};                                                   \
        break;
#include "layer.def"
#undef X
    case WEIGHT_COUNT: CHECK(!"a field");
    }
    if (s.count) set_fused(c, f, &s);
    return s;
}

weight_shape weight_shape_shard(const model_config *c, weight_field f, weight_shape s, int32_t tp) {
    CHECK(tp >= 1);
    if (s.shard == SHARD_COLS) s.k /= tp;
    if (s.shard != SHARD_ROWS) return s;
    s.n = 0;
    for (int32_t i = 0; i < s.n_fused; i++) {
        s.fused_rows[i] =
            f == WEIGHT_qkv && i > 0 ? model_kv_heads(c, tp) * c->head_dim : s.fused_rows[i] / tp;
        s.n += s.fused_rows[i];
    }
    return s;
}

void weight_shard_range(const model_config *c, weight_field f, int32_t tp, int32_t rank, int32_t i,
                        int32_t *at, int32_t *n) {
    const weight_shape whole = weight_field_shape(c, f), one = weight_shape_shard(c, f, whole, tp);
    CHECK(rank >= 0 && rank < tp);
    CHECK(i >= 0 && i < whole.n_fused);
    *at = 0;
    if (whole.shard == SHARD_NONE) {
        *n = whole.n;
    } else if (whole.shard == SHARD_COLS) {
        *n = one.k;
        *at = rank * one.k;
    } else {
        for (int32_t j = 0; j < i; j++) *at += whole.fused_rows[j];
        *n = one.fused_rows[i];
        /* Ranks that share a KV head: rank / (tp / G) is its number. */
        const bool shared = f == WEIGHT_qkv && i > 0 && tp > c->n_kv_heads;
        *at += (shared ? rank / (tp / c->n_kv_heads) : rank) * *n;
    }
}

/* Rows of one array of a qmatrix: `rows` of them from `from` on, `bytes` of each from `at` on. */
static void copy_part(void *to, const void *from, int64_t rows, size_t stride, size_t at,
                      size_t bytes) {
    for (int64_t r = 0; r < rows; r++)
        memcpy((uint8_t *)to + (size_t)r * bytes, (const uint8_t *)from + (size_t)r * stride + at,
               bytes);
}

static bool weight_has_nibbles(weight_format f) {
    return f == WF_INT4 || f == WF_MXFP4 || f == WF_NVFP4;
}

/* Would [at, at + n) of `of` begin or end within a unit? */
static bool cuts(int32_t at, int32_t n, int32_t of, int32_t unit) {
    return at % unit || (at + n != of && n % unit);
}

status weight_shard_qmatrix(const model_config *c, weight_field f, int32_t tp, int32_t rank,
                            const qmatrix *q, qmatrix *part) {
    const weight_shape whole = weight_field_shape(c, f), one = weight_shape_shard(c, f, whole, tp);
    const bool cols = whole.shard == SHARD_COLS, half = weight_has_nibbles(q->format);
    CHECK(q->n == whole.n && q->k == whole.k);
    CHECK(part->n == one.n && part->k == one.k);
    const size_t size = (size_t)dtype_bytes(q->scale_type, 1);
    const int32_t groups = (int32_t)div_up(q->k, q->group), unit = q->group == q->k ? 1 : q->group;
    int32_t to = 0;
    part->global_scale = q->global_scale;
    for (int32_t i = 0; i < (cols ? 1 : whole.n_fused); i++) {
        int32_t at, n;
        weight_shard_range(c, f, tp, rank, i, &at, &n);
        const int32_t row = cols ? 0 : at, rows = cols ? q->n : n;
        const int32_t col = cols ? at : 0, width = cols ? n : q->k;
        if (cuts(col, width, q->k, 1 << half) || cuts(col, width, q->k, unit) ||
            cuts(row, rows, q->n, q->block_n) || to % q->block_n)
            return FAIL(ST_SHAPE, "rank %d of %d would cut a block of %s", rank, tp,
                        weight_field_text(f));
        /* A scale of whole rows belongs to every part of them. */
        const size_t first = q->group == q->k ? 0 : (size_t)(col / q->group);
        const size_t n_groups = q->group == q->k ? 1 : (size_t)div_up(width, q->group);
        const size_t code = (size_t)q->k >> half, part_code = (size_t)part->k >> half;
        copy_part(part->code + (size_t)to * part_code, q->code + (size_t)row * code, rows, code,
                  (size_t)col >> half, part_code);
        copy_part((uint8_t *)part->scale + (size_t)(to / q->block_n) * n_groups * size,
                  (const uint8_t *)q->scale + (size_t)(row / q->block_n) * (size_t)groups * size,
                  div_up(rows, q->block_n), (size_t)groups * size, first * size, n_groups * size);
        if (q->zero)
            copy_part(part->zero + (size_t)to * n_groups, q->zero + (size_t)row * (size_t)groups,
                      rows, (size_t)groups, first, n_groups);
        to += rows;
    }
    CHECK(to == part->n);
    return ST_OK;
}

int64_t weight_shape_bytes(const weight_shape *s, const precision *p, dtype type) {
    const int64_t one = s->quantise && p->weight != WF_16 ? precision_weight_bytes(p, s->n, s->k)
                                                          : dtype_bytes(type, (int64_t)s->n * s->k);
    return s->count * (one + (s->has_bias ? dtype_bytes(type, s->n) : 0));
}

int64_t model_weight_bytes(const model_config *c, const precision *p, int32_t tp) {
    int64_t total = 0;
    for (int32_t f = WEIGHT_embed; f < WEIGHT_COUNT; f++) {
        if (!weight_field_present(c, (weight_field)f)) continue;
        const weight_shape s =
            weight_shape_shard(c, (weight_field)f, weight_field_shape(c, (weight_field)f), tp);
        total += weight_shape_bytes(&s, p, c->type) * (f < 0 ? 1 : c->n_layers);
    }
    return total;
}

int64_t model_kv_token_bytes(const model_config *c, const precision *p, int32_t tp) {
    int64_t head = 0;
    for (int32_t i = 0; i < c->n_layers; i++) {
        const kv_pair kv = precision_kv(p, i);
        head += kv_format_bytes((kv_format)kv.k, c->head_dim) +
                kv_format_bytes((kv_format)kv.v, c->head_dim);
    }
    return head * model_kv_heads(c, tp);
}

status model_fits_precision(const model_config *c, const precision *p, int32_t tp) {
    if (p->n_kv_layers > 0 && p->n_kv_layers != c->n_layers)
        return FAIL(ST_SHAPE, "%s: %d entries in the KV list for %d layers", c->name,
                    p->n_kv_layers, c->n_layers);
    /* A block of WFP8b may be partial at the end of a matrix, but no rank boundary may cut one. */
    const bool partial = p->weight == WF_FP8B && tp == 1;
    TRY(model_fits_tp(c, tp, p->weight == WF_16 || partial ? 0 : p->group));
    if (p->weight == WF_16) return ST_OK;
    for (int32_t i = 0; i < WEIGHT_COUNT; i++) {
        const weight_field f = (weight_field)i;
        const weight_shape s = weight_shape_shard(c, f, weight_field_shape(c, f), tp);
        if (s.count == 0 || !s.quantise) continue;
        const status st = precision_fits_shape(p, s.n, s.k);
        if (st != ST_OK) return fail_prefix(st, "%s: %s", c->name, weight_field_text(f));
    }
    return ST_OK;
}

/* --- Names and layouts of tensors ---------------------------------------------------------------
 * '#' stands for the layer, a second one for the expert. A bias is called as the weight with
 * .weight replaced by .bias, or _bias added where there is no such ending. */

typedef enum {
    STACKED,    /* the tensors' rows one after the other, each [rows, k], vectors [k] */
    PER_EXPERT, /* as STACKED for each expert */
    EXPERTS,    /* one [experts, n, k] (transformers 5) */
    EXPERTS_T,  /* one [experts, k, n], rows of gate and up alternating (gpt-oss) */
    KV_GROUPS   /* per KV head: its query heads, its key, its value (InternLM2) */
} layout_kind;

typedef struct {
    weight_field field;
    layout_kind kind;
    const char *arch; /* only for this one; NULL = any */
    const char *first, *second, *third;
} layout;

#define L "model.layers.#."
static const layout layouts[] = {
    {WEIGHT_embed, STACKED, NULL, "model.embed_tokens.weight", NULL, NULL},
    {WEIGHT_embed, STACKED, NULL, "model.tok_embeddings.weight", NULL, NULL},
    {WEIGHT_norm, STACKED, NULL, "model.norm.weight", NULL, NULL},
    {WEIGHT_head, STACKED, NULL, "lm_head.weight", NULL, NULL},
    {WEIGHT_head, STACKED, NULL, "output.weight", NULL, NULL},
    {WEIGHT_attn_norm, STACKED, NULL, L "input_layernorm.weight", NULL, NULL},
    {WEIGHT_attn_norm, STACKED, NULL, L "attention_norm.weight", NULL, NULL},
    {WEIGHT_qkv, STACKED, NULL, L "self_attn.q_proj.weight", L "self_attn.k_proj.weight",
     L "self_attn.v_proj.weight"},
    {WEIGHT_qkv, STACKED, NULL, L "self_attn.qkv_proj.weight", NULL, NULL},
    {WEIGHT_qkv, KV_GROUPS, NULL, L "attention.wqkv.weight", NULL, NULL},
    {WEIGHT_q_norm, STACKED, NULL, L "self_attn.q_norm.weight", NULL, NULL},
    {WEIGHT_k_norm, STACKED, NULL, L "self_attn.k_norm.weight", NULL, NULL},
    {WEIGHT_sinks, STACKED, NULL, L "self_attn.sinks", NULL, NULL},
    {WEIGHT_o, STACKED, NULL, L "self_attn.o_proj.weight", NULL, NULL},
    {WEIGHT_o, STACKED, NULL, L "attention.wo.weight", NULL, NULL},
    {WEIGHT_ffn_norm, STACKED, NULL, L "post_attention_layernorm.weight", NULL, NULL},
    {WEIGHT_ffn_norm, STACKED, NULL, L "ffn_norm.weight", NULL, NULL},
    {WEIGHT_gate_up, STACKED, NULL, L "mlp.gate_proj.weight", L "mlp.up_proj.weight", NULL},
    {WEIGHT_gate_up, STACKED, NULL, L "mlp.gate_up_proj.weight", NULL, NULL},
    {WEIGHT_gate_up, STACKED, NULL, L "feed_forward.w1.weight", L "feed_forward.w3.weight", NULL},
    {WEIGHT_down, STACKED, NULL, L "mlp.down_proj.weight", NULL, NULL},
    {WEIGHT_down, STACKED, NULL, L "feed_forward.w2.weight", NULL, NULL},
    {WEIGHT_router, STACKED, NULL, L "mlp.gate.weight", NULL, NULL},
    {WEIGHT_router, STACKED, NULL, L "block_sparse_moe.gate.weight", NULL, NULL},
    {WEIGHT_router, STACKED, NULL, L "mlp.router.weight", NULL, NULL},
    {WEIGHT_experts_gate_up, EXPERTS_T, "GptOssForCausalLM", L "mlp.experts.gate_up_proj", NULL,
     NULL},
    {WEIGHT_experts_gate_up, EXPERTS, NULL, L "mlp.experts.gate_up_proj", NULL, NULL},
    {WEIGHT_experts_gate_up, PER_EXPERT, NULL, L "mlp.experts.#.gate_proj.weight",
     L "mlp.experts.#.up_proj.weight", NULL},
    {WEIGHT_experts_gate_up, PER_EXPERT, NULL, L "block_sparse_moe.experts.#.w1.weight",
     L "block_sparse_moe.experts.#.w3.weight", NULL},
    {WEIGHT_experts_down, EXPERTS_T, "GptOssForCausalLM", L "mlp.experts.down_proj", NULL, NULL},
    {WEIGHT_experts_down, EXPERTS, NULL, L "mlp.experts.down_proj", NULL, NULL},
    {WEIGHT_experts_down, PER_EXPERT, NULL, L "mlp.experts.#.down_proj.weight", NULL, NULL},
    {WEIGHT_experts_down, PER_EXPERT, NULL, L "block_sparse_moe.experts.#.w2.weight", NULL, NULL},
};
#undef L

/* Tensors that real checkpoints carry and no one needs: tables recomputed from the config. */
static const char *const needless[] = {"rotary_emb.inv_freq", "rope.inv_freq"};

/* Endings of what quantised checkpoints add and a run does not use: static scales of activations
 * and of the KV cache. */
static const char *const passed_over[] = {".input_scale",      ".input_global_scale",
                                          ".input_zero_point", ".output_scale",
                                          ".k_scale",          ".v_scale",
                                          ".q_scale",          ".k_zero_point",
                                          ".v_zero_point"};

/* Endings by which layouts that are not read give themselves away: bitsandbytes, ModelOpt's AWQ,
 * sparse and Marlin ones of compressed-tensors, HQQ, AQLM. */
static const char *const unread[] = {
    ".absmax",  ".quant_map",       ".quant_state.bitsandbytes__nf4",
    ".SCB",     ".pre_quant_scale", ".meta",
    ".bitmask", ".compressed",      ".scale_packed",
    ".W_q",     ".codebooks"};

static bool ends_in(const char *name, const char *end) {
    const size_t n = strlen(name), m = strlen(end);
    return n >= m && strcmp(name + n - m, end) == 0;
}

enum { NAME_MAX_BYTES = 128 };

/* The pattern with its numbers in place. */
static void fill_name(char *out, const char *pattern, int32_t layer, int32_t expert) {
    size_t n = 0;
    int32_t number = layer;
    for (; *pattern; pattern++) {
        CHECK(n + 12 < NAME_MAX_BYTES);
        if (*pattern != '#') {
            out[n++] = *pattern;
            continue;
        }
        n += (size_t)snprintf(out + n, 12, "%d", number);
        number = expert;
    }
    out[n] = 0;
}

static void bias_name(char *out, const char *name) {
    const size_t n = strlen(name), cut = ends_in(name, ".weight") ? n - 7 : n;
    CHECK(cut + 6 < NAME_MAX_BYTES);
    memcpy(out, name, cut);
    strcpy(out + cut, cut < n ? ".bias" : "_bias");
}

/* --- Opening -----------------------------------------------------------------------------------
 */

struct checkpoint {
    model_config config;
    safetensors *files;    /* NULL for synthetic */
    arena memory;          /* sources and parts */
    weight_source *source; /* [3 + n_layers * WEIGHT_COUNT] */
    bool *used;            /* [tensors] */
    packed_config packing;
    bool packed; /* some linear is quantised: the plain ones stay plain */
    uint64_t seed, digest_seed;
};

static size_t source_at(weight_field f, int32_t layer) {
    return f < 0 ? (size_t)(f + 3) : 3 + (size_t)layer * WEIGHT_COUNT + (size_t)f;
}

/* The tensor of this name, which must have this shape and a type that weights are read in. */
static status find_tensor(checkpoint *k, const char *name, const int64_t *dim, int32_t n_dims,
                          const tensor_view **out) {
    const tensor_view *t = safetensors_find(k->files, name);
    if (!t) return FAIL(ST_NOTFOUND, "tensor '%s' is missing", name);
    if (t->n_dims != n_dims || memcmp(t->dim, dim, (size_t)n_dims * sizeof *dim) != 0) {
        char got[160], want[160];
        return FAIL(ST_SHAPE, "tensor '%s' is %s, config.json makes it %s", name,
                    tensor_shape_text(got, sizeof got, t->dim, t->n_dims),
                    tensor_shape_text(want, sizeof want, dim, n_dims));
    }
    if (t->type != DT_F32 && t->type != DT_F16 && t->type != DT_BF16)
        return FAIL(ST_UNSUPPORTED,
                    "tensor '%s' has elements of %s; weights are read from f32, f16 "
                    "and bf16",
                    name, dtype_text(t->type));
    k->used[t - safetensors_at(k->files, 0)] = true;
    *out = t;
    return ST_OK;
}

/* Where the parts of one source go: its weight's or its bias'. */
typedef struct {
    checkpoint *k;
    const layout *how;
    const weight_shape *shape;
    int32_t layer;
    bool bias;
    matrix_part *part; /* room for all of them */
    int32_t n;
} part_list;

static void add_part(part_list *p, const tensor_view *t, int64_t element, matrix_part part) {
    part.tensor = t;
    part.type = t->type;
    part.data = (const uint8_t *)t->data + dtype_bytes(t->type, element);
    p->part[p->n++] = part;
}

static status find_part(part_list *p, const char *pattern, int32_t expert, const int64_t *dim,
                        int32_t n_dims, const tensor_view **t) {
    char name[NAME_MAX_BYTES], bias[NAME_MAX_BYTES];
    fill_name(name, pattern, p->layer, expert);
    bias_name(bias, name);
    return find_tensor(p->k, p->bias ? bias : name, dim, n_dims, t);
}

static void mark_used(checkpoint *k, const packed_matrix *m) {
    for (int32_t i = 0; i < m->n_tensors; i++)
        k->used[m->tensor[i] - safetensors_at(k->files, 0)] = true;
}

static packed_matrix *keep_packed(checkpoint *k, const packed_matrix *m) {
    packed_matrix *kept = arena_array(&k->memory, packed_matrix, 1);
    if (!kept) return NULL;
    *kept = *m;
    mark_used(k, m);
    return kept;
}

static void module_name(char *out, const char *name) {
    const size_t n = strlen(name), cut = ends_in(name, ".weight") ? n - 7 : n;
    memcpy(out, name, cut);
    out[cut] = 0;
}

/* A quantised linear of `rows` x k under this name. Vectors and biases never are. */
static status find_packed(part_list *p, const char *pattern, int32_t expert, int32_t rows,
                          const packed_matrix **out) {
    char name[NAME_MAX_BYTES], module[NAME_MAX_BYTES];
    *out = NULL;
    if (p->bias || p->shape->n == 1) return ST_OK;
    fill_name(name, pattern, p->layer, expert);
    module_name(module, name);
    packed_matrix m;
    bool found;
    TRY(packed_find(&m, &found, p->k->files, module, rows, p->shape->k, &p->k->packing));
    if (!found) return ST_OK;
    *out = keep_packed(p->k, &m);
    return *out ? ST_OK : FAIL(ST_NOMEM, "%s", module);
}

/* Row ranges of one matrix from up to three tensors: STACKED, and each expert of PER_EXPERT. */
static status add_stacked(part_list *p, int32_t expert) {
    const weight_shape *s = p->shape;
    const char *const pattern[] = {p->how->first, p->how->second, p->how->third};
    const int64_t k = p->bias ? 1 : s->k;
    int32_t row_at = 0;
    for (int32_t i = 0; i < 3 && pattern[i]; i++) {
        const int32_t rows = p->how->second ? s->fused_rows[i] : s->n;
        const bool vector = s->n == 1 && p->how->field != WEIGHT_router;
        const int64_t dim[] = {vector ? s->k : rows, k};
        const tensor_view *t;
        const packed_matrix *packed;
        TRY(find_packed(p, pattern[i], expert, rows, &packed));
        if (packed) {
            p->part[p->n++] = (matrix_part){
                .index = expert, .row_at = row_at, .rows = rows, .row_stride = 1, .packed = packed};
            row_at += rows;
            continue;
        }
        TRY(find_part(p, pattern[i], expert, dim, vector || p->bias ? 1 : 2, &t));
        add_part(
            p, t, 0,
            (matrix_part){
                .index = expert, .row_at = row_at, .rows = rows, .row_stride = k, .col_stride = 1});
        row_at += rows;
    }
    return ST_OK;
}

/* MXFP4 as gpt-oss has it: rows of gate and up alternate here too, but inputs lie in a row. */
static status add_blocks(part_list *p, const char *name) {
    const weight_shape *s = p->shape;
    for (int32_t e = 0; e < s->count; e++) {
        packed_matrix m;
        bool found;
        TRY(packed_find_blocks(&m, &found, p->k->files, name, e, s->count, s->n, s->k,
                               &p->k->packing));
        CHECK(found);
        const packed_matrix *kept = keep_packed(p->k, &m);
        if (!kept) return FAIL(ST_NOMEM, "%s", name);
        for (int32_t i = 0; i < s->n_fused; i++)
            p->part[p->n++] = (matrix_part){.index = e,
                                            .row_at = i * (s->n / s->n_fused),
                                            .rows = s->n / s->n_fused,
                                            .row_stride = s->n_fused,
                                            .packed = kept,
                                            .packed_row = i};
    }
    return ST_OK;
}

static status add_experts(part_list *p) {
    const weight_shape *s = p->shape;
    char name[NAME_MAX_BYTES];
    fill_name(name, p->how->first, p->layer, 0);
    if (!p->bias && !safetensors_find(p->k->files, name)) return add_blocks(p, name);
    const bool transposed = p->how->kind == EXPERTS_T;
    const int64_t k = p->bias ? 1 : s->k;
    const int64_t dim[] = {s->count, transposed && !p->bias ? k : s->n,
                           transposed && !p->bias ? s->n : k};
    const tensor_view *t;
    TRY(find_part(p, p->how->first, 0, dim, p->bias ? 2 : 3, &t));
    const int32_t ranges = transposed ? s->n_fused : 1;
    for (int32_t e = 0; e < s->count; e++)
        for (int32_t i = 0; i < ranges; i++)
            add_part(p, t, (int64_t)e * s->n * k + i,
                     (matrix_part){.index = e,
                                   .row_at = i * (s->n / ranges),
                                   .rows = s->n / ranges,
                                   .row_stride = transposed ? ranges : k,
                                   .col_stride = transposed ? s->n : 1});
    return ST_OK;
}

static status add_kv_groups(part_list *p) {
    const weight_shape *s = p->shape;
    const model_config *c = &p->k->config;
    const int64_t k = p->bias ? 1 : s->k, dim[] = {s->n, k};
    const tensor_view *t = NULL;
    const packed_matrix *packed;
    TRY(find_packed(p, p->how->first, 0, s->n, &packed));
    if (!packed) TRY(find_part(p, p->how->first, 0, dim, p->bias ? 1 : 2, &t));
    const int32_t group = s->n / c->n_kv_heads; /* rows of one KV head and its query heads */
    int32_t row_at = 0, within = 0;
    for (int32_t i = 0; i < 3; i++) {
        const int32_t rows = s->fused_rows[i] / c->n_kv_heads;
        for (int32_t g = 0; g < c->n_kv_heads; g++, row_at += rows) {
            if (packed)
                p->part[p->n++] = (matrix_part){.row_at = row_at,
                                                .rows = rows,
                                                .row_stride = 1,
                                                .packed = packed,
                                                .packed_row = g * group + within};
            else
                add_part(p, t, (g * (int64_t)group + within) * k,
                         (matrix_part){
                             .row_at = row_at, .rows = rows, .row_stride = k, .col_stride = 1});
        }
        within += rows;
    }
    return ST_OK;
}

static status add_parts(part_list *p) {
    const weight_shape *s = p->shape;
    const int32_t n = p->how->kind == KV_GROUPS ? 3 * p->k->config.n_kv_heads : 3 * s->count;
    p->part = arena_array(&p->k->memory, matrix_part, (size_t)n);
    if (!p->part) return FAIL(ST_NOMEM, "%d parts of a tensor", n);
    switch (p->how->kind) {
    case STACKED: return add_stacked(p, 0);
    case PER_EXPERT:
        for (int32_t e = 0; e < s->count; e++) TRY(add_stacked(p, e));
        return ST_OK;
    case EXPERTS:
    case EXPERTS_T: return add_experts(p);
    case KV_GROUPS: return add_kv_groups(p);
    }
    CHECK(!"a layout");
    return ST_OK;
}

/* The first row of the table whose first tensor is there. */
static status find_layout(checkpoint *k, weight_field f, int32_t layer, const layout **out) {
    char tried[384] = "", name[NAME_MAX_BYTES];
    size_t n = 0;
    for (int32_t i = 0; i < COUNT_OF(layouts); i++) {
        const layout *y = &layouts[i];
        if (y->field != f || (y->arch && strcmp(y->arch, k->config.arch) != 0)) continue;
        fill_name(name, y->first, layer, 0);
        *out = y;
        char module[NAME_MAX_BYTES];
        module_name(module, name);
        if (safetensors_find(k->files, name) || packed_exists(k->files, module)) return ST_OK;
        if (n < sizeof tried)
            n += (size_t)snprintf(tried + n, sizeof tried - n, "%s'%s'", n ? ", " : "", name);
    }
    return FAIL(ST_NOTFOUND, "tensor of %s is missing: %s", weight_field_text(f), tried);
}

static const char *part_name(const matrix_part *p) {
    return p->packed ? p->packed->name : p->tensor ? p->tensor->name : "";
}

/* A row of blocks of the canonical matrix must be one of the file's. */
static bool blocks_align(const matrix_part *p) {
    const packed_matrix *m = p->packed;
    return m->format != WF_FP8B || (p->row_at % m->block_n == 0 && p->packed_row % m->block_n == 0);
}

/* Why the parts make no one canonical matrix together, or NULL. */
static const char *differs(const matrix_part *a, const matrix_part *b) {
    if (!a->packed != !b->packed) return "one of its parts is quantised, another is not";
    const packed_matrix *x = a->packed, *y = b->packed;
    if (x->only16) return x->only16;
    if (y->only16) return y->only16;
    if (x->format != y->format || x->group != y->group || x->sym != y->sym)
        return "its parts have different formats";
    if (a->index == b->index && x->global_scale != y->global_scale)
        return "its parts have different global scales";
    if (!blocks_align(a) || !blocks_align(b)) return "its parts meet inside a block of 128 rows";
    const size_t bytes = (size_t)x->k * sizeof(int32_t);
    if (a->index == b->index &&
        (!x->g_idx != !y->g_idx || (x->g_idx && memcmp(x->g_idx, y->g_idx, bytes) != 0)))
        return "its parts have different g_idx";
    return NULL;
}

static status set_order(checkpoint *k, weight_source *s) {
    const int32_t each = s->n_parts / s->shape.count;
    bool any = false;
    for (int32_t i = 0; i < s->n_parts; i++) any |= s->part[i].packed->g_idx != NULL;
    if (!any) return ST_OK;
    int32_t *order = arena_array(&k->memory, int32_t, (size_t)s->shape.count * (size_t)s->shape.k);
    if (!order) return FAIL(ST_NOMEM, "order of inputs of %s", s->name);
    for (int32_t e = 0; e < s->shape.count; e++) {
        const packed_matrix *m = s->part[(int64_t)e * each].packed;
        int32_t *to = order + (int64_t)e * s->shape.k;
        if (m->g_idx)
            packed_order(m, to);
        else
            for (int32_t i = 0; i < s->shape.k; i++) to[i] = i;
    }
    s->stored.order = order;
    return ST_OK;
}

/* What the parts of a source are together. A weight that no format applies to is read by value. */
static status set_stored(checkpoint *k, weight_source *s) {
    bool any = false;
    for (int32_t i = 0; i < s->n_parts; i++) any |= s->part[i].packed != NULL;
    if (!any) return ST_OK;
    if (s->field == WEIGHT_embed)
        return FAIL(ST_UNSUPPORTED, "tensor '%s': a quantised embedding", part_name(s->part));
    stored_form *f = &s->stored;
    f->packed = true;
    f->first = part_name(s->part);
    k->packed |= s->shape.quantise;
    for (int32_t i = 0; i < s->n_parts && !f->why; i++) {
        f->why = differs(s->part, &s->part[i]);
        if (f->why && i > 0) f->other = part_name(&s->part[i]);
    }
    if (f->why || !s->shape.quantise) return ST_OK;
    const packed_matrix *m = s->part->packed;
    f->weight = m->format;
    f->group = m->format == WF_FP8 ? 0 : m->group;
    f->k = m->k;
    f->sym = m->format == WF_INT4 && m->sym;
    return set_order(k, s);
}

static status find_source(checkpoint *k, weight_field f, int32_t layer) {
    weight_source *s = &k->source[source_at(f, layer)];
    s->field = f;
    s->shape = weight_field_shape(&k->config, f);
    if (!weight_field_present(&k->config, f)) return ST_OK;
    part_list p = {.k = k, .shape = &s->shape, .layer = layer};
    TRY(find_layout(k, f, layer, &p.how));
    fill_name(s->name, p.how->first, layer, 0);
    TRY(add_parts(&p));
    s->part = p.part;
    s->n_parts = p.n;
    TRY(set_stored(k, s));
    if (!s->shape.has_bias) return ST_OK;
    p.bias = true;
    p.n = 0;
    TRY(add_parts(&p));
    s->bias_part = p.part;
    s->n_bias_parts = p.n;
    return ST_OK;
}

/* A head in the files of a model whose config.json says that the embedding is its head: the same
 * bytes, or nobody knows which of the two was meant (a head that was trained on its own). */
static status check_tied(const checkpoint *k) {
    static const char *const names[][2] = {{"lm_head.weight", "model.embed_tokens.weight"},
                                           {"output.weight", "model.tok_embeddings.weight"}};
    for (int32_t i = 0; i < COUNT_OF(names) && k->config.tied; i++) {
        const tensor_view *head = safetensors_find(k->files, names[i][0]);
        const tensor_view *embed = safetensors_find(k->files, names[i][1]);
        if (!head || !embed) continue;
        if (head->type != embed->type || head->bytes != embed->bytes ||
            memcmp(head->data, embed->data, (size_t)head->bytes) != 0)
            return FAIL(ST_UNSUPPORTED,
                        "'%s' is another matrix than the embedding, which config.json ties to it: "
                        "with tie_word_embeddings false it is the head",
                        names[i][0]);
    }
    return ST_OK;
}

static status check_leftovers(const checkpoint *k) {
    for (int32_t i = 0; i < safetensors_count(k->files); i++) {
        const char *name = safetensors_at(k->files, i)->name;
        bool fine = k->used[i] || (k->config.tied && (strcmp(name, "lm_head.weight") == 0 ||
                                                      strcmp(name, "output.weight") == 0));
        for (int32_t j = 0; j < COUNT_OF(needless); j++) fine |= ends_in(name, needless[j]);
        for (int32_t j = 0; j < COUNT_OF(passed_over) && k->packed; j++)
            fine |= ends_in(name, passed_over[j]);
        for (int32_t j = 0; j < COUNT_OF(unread); j++)
            if (ends_in(name, unread[j]))
                return FAIL(ST_UNSUPPORTED, "tensor '%.200s': a quantised layout that is not read",
                            name);
        if (!fine)
            return FAIL(ST_FORMAT,
                        "tensor '%.200s' has no place in the %s of config.json (%d layers)", name,
                        k->config.arch, k->config.n_layers);
    }
    return ST_OK;
}

/* Upper bound of what the sources and their parts take. */
static size_t memory_bytes(const model_config *c, const safetensors *files) {
    const int32_t n_tensors = safetensors_count(files);
    size_t packed = 0; /* one for each tensor at most, an expert's matrix for each of its experts */
    for (int32_t i = 0; i < n_tensors; i++) {
        const tensor_view *t = safetensors_at(files, i);
        packed += sizeof(packed_matrix) + 64;
        if (ends_in(t->name, "_blocks"))
            packed += (size_t)(c->n_experts + 1) * (sizeof(packed_matrix) + 64);
        if (ends_in(t->name, "g_idx")) packed += (size_t)t->bytes + 64;
    }
    const size_t parts =
        2 * (3 * ((size_t)c->n_kv_heads + WEIGHT_COUNT + 2 * (size_t)c->n_experts));
    const size_t layer = parts * sizeof(matrix_part) + WEIGHT_COUNT * sizeof(weight_source);
    return ((size_t)c->n_layers + 1) * layer + packed + (size_t)n_tensors + 4096;
}

static status digest_config(checkpoint *k, const char *dir) {
    char path[4400];
    snprintf(path, sizeof path, "%.4300s/config.json", dir);
    file_map m;
    TRY(file_map_open(&m, path));
    k->digest_seed = hash_bytes(m.data, m.size, 0);
    file_map_close(&m);
    return ST_OK;
}

static status open_files(checkpoint *k, const char *dir) {
    TRY(safetensors_open(&k->files, dir));
    const int32_t n = safetensors_count(k->files);
    TRY(arena_open(&k->memory, memory_bytes(&k->config, k->files)));
    k->used = arena_array(&k->memory, bool, (size_t)n);
    k->source =
        arena_array(&k->memory, weight_source, 3 + (size_t)k->config.n_layers * WEIGHT_COUNT);
    if (!k->used || !k->source) return FAIL(ST_NOMEM, "%s: %d tensors", dir, n);
    status st = packed_config_load(&k->packing, dir);
    if (st != ST_OK) return st;
    for (int32_t f = WEIGHT_embed; st == ST_OK && f < 0; f++)
        st = find_source(k, (weight_field)f, 0);
    for (int32_t layer = 0; layer < k->config.n_layers; layer++)
        for (int32_t f = 0; st == ST_OK && f < WEIGHT_COUNT; f++)
            st = find_source(k, (weight_field)f, layer);
    if (st == ST_OK && k->packing.method[0] && !k->packed)
        st = FAIL(ST_FORMAT, "quantization_config says '%s', but no linear is quantised",
                  k->packing.method);
    if (st == ST_OK) st = check_leftovers(k);
    if (st == ST_OK) st = check_tied(k);
    if (st != ST_OK) return fail_prefix(st, "%s", dir);
    arena_seal(&k->memory);
    return digest_config(k, dir);
}

status checkpoint_open(checkpoint **out, const model_config *c, const char *dir, uint64_t seed) {
    *out = NULL;
    checkpoint *k = mem_alloc(1, sizeof *k);
    if (!k) return FAIL(ST_NOMEM, "checkpoint of %s", c->name);
    k->config = *c;
    k->seed = seed;
    const status st = dir ? open_files(k, dir) : ST_OK;
    if (st != ST_OK) {
        checkpoint_close(k);
        return st;
    }
    *out = k;
    return ST_OK;
}

void checkpoint_close(checkpoint *k) {
    if (!k) return;
    safetensors_close(k->files);
    arena_close(&k->memory);
    mem_free(k);
}

uint64_t checkpoint_digest(const checkpoint *k) {
    return k->files ? hash_u64(safetensors_digest(k->files), k->digest_seed) : 0;
}

dtype checkpoint_dtype(const checkpoint *k) {
    return k->files ? k->source[source_at(WEIGHT_embed, 0)].part[0].type : k->config.type;
}

/* --- Sources -----------------------------------------------------------------------------------
 */

/* Scales keep activations of order 1 at any depth: 1/sqrt(k) for matrices, the embedding and norms
 * around 1, an embedding that is the head as well like the head. */
static void make_synthetic(const checkpoint *k, weight_field f, int32_t layer, weight_source *s) {
    const bool vector = s->shape.n == 1 && f != WEIGHT_router;
    s->seed = hash_u64((uint64_t)(f + 3), hash_u64((uint64_t)layer, k->seed));
    s->synthetic_scale = 1.0f / sqrtf((float)s->shape.k);
    if (f == WEIGHT_sinks || (f == WEIGHT_embed && !k->config.tied)) s->synthetic_scale = 1;
    if (vector && f != WEIGHT_sinks) {
        s->synthetic_scale = 0.1f;
        s->synthetic_mean = 1;
    }
    if (f < 0) snprintf(s->name, sizeof s->name, "synthetic %s", weight_field_text(f));
    if (f >= 0) snprintf(s->name, sizeof s->name, "synthetic %s %d", weight_field_text(f), layer);
}

status checkpoint_source(const checkpoint *k, weight_field f, int32_t layer, weight_source *out) {
    *out = (weight_source){0};
    if (f < 0) layer = 0;
    CHECK(layer >= 0 && layer < k->config.n_layers);
    if (f == WEIGHT_head && k->config.tied) {
        TRY(checkpoint_source(k, WEIGHT_embed, 0, out));
        out->shape = weight_field_shape(&k->config, WEIGHT_head); /* split over ranks as a head */
        out->field = WEIGHT_head;
        return ST_OK;
    }
    if (!weight_field_present(&k->config, f))
        return FAIL(ST_NOTFOUND, "%s has no %s", k->config.name, weight_field_text(f));
    if (k->files) {
        *out = k->source[source_at(f, layer)];
        out->type = checkpoint_dtype(k);
        if (k->packed && !out->stored.packed) out->shape.quantise = false;
    } else {
        out->type = k->config.type;
        out->shape = weight_field_shape(&k->config, f);
        make_synthetic(k, f, layer, out);
    }
    out->field = f;
    out->config = &k->config;
    return ST_OK;
}

/* --- Quantised sources ---------------------------------------------------------------------------
 */

/* Formats whose group may be the whole row, which precisions write as 0. */
static bool takes_group(weight_format f) { return f == WF_INT4 || f == WF_INT8; }

static const char *form_name(const stored_form *f, char *buf) {
    const bool whole = takes_group(f->weight) && f->group == f->k;
    const precision p = {.weight = f->weight, .group = whole ? 0 : f->group, .sym = f->sym};
    precision_name(&p, buf);
    *strchr(buf, 'A') = 0;
    return buf;
}

static status refuse_codes(const stored_form *f) {
    if (f->other)
        return FAIL(ST_UNSUPPORTED, "tensors '%s' and '%s': %s; W16 dequantises at load", f->first,
                    f->other, f->why);
    return FAIL(ST_UNSUPPORTED, "tensor '%s': %s; W16 dequantises at load", f->first, f->why);
}

/* A group that is the whole row has two names: W4g128 and W4gK at k = 128. */
static bool same_form(const stored_form *f, const precision *p) {
    const int32_t group = takes_group(p->weight) && p->group == 0 ? f->k : p->group;
    return f->weight == p->weight && f->group == group && f->sym == p->sym;
}

bool weight_source_has_codes(const weight_source *s, const precision *p) {
    return s->stored.packed && s->shape.quantise && p->weight != WF_16 && !s->stored.why &&
           same_form(&s->stored, p);
}

status weight_source_accepts(const weight_source *s, const precision *p) {
    const stored_form *f = &s->stored;
    if (!f->packed) return ST_OK;
    for (int32_t i = 0; i < s->n_parts; i++)
        if (s->part[i].packed && (i == 0 || s->part[i].packed != s->part[i - 1].packed))
            TRY(packed_check(s->part[i].packed));
    if (p->weight == WF_16 || !s->shape.quantise) return ST_OK;
    if (f->why) return refuse_codes(f);
    if (same_form(f, p)) return ST_OK;
    char have[PRECISION_NAME_MAX], want[PRECISION_NAME_MAX];
    const stored_form asked = {.weight = p->weight, .group = p->group, .sym = p->sym};
    return FAIL(ST_UNSUPPORTED,
                "tensor '%s' is stored as %s: ask for that or for W16, which dequantises it, not "
                "for %s",
                f->first, form_name(f, have), form_name(&asked, want));
}

void weight_source_qmatrix(const weight_source *s, int32_t index, qmatrix *q) {
    const weight_shape *w = &s->shape;
    CHECK(s->stored.packed && !s->stored.why);
    CHECK(index >= 0 && index < w->count);
    CHECK(q->n == w->n && q->k == w->k);
    const int32_t each = s->n_parts / w->count;
    const int32_t *order = s->stored.order ? s->stored.order + (int64_t)index * w->k : NULL;
    const matrix_part *p = s->part + (int64_t)index * each;
    q->global_scale = p->packed->global_scale;
    for (int32_t i = 0; i < each; i++, p++) {
#pragma omp parallel for schedule(static) if ((int64_t)p->rows * w->k > 1 << 18)
        for (int32_t r = 0; r < p->rows; r++)
            packed_canonical(p->packed, p->packed_row + (int32_t)(r * p->row_stride), order, q,
                             p->row_at + r);
    }
}

/* Is this a linear whose codes a precision is asked for? */
static bool is_stored_linear(const weight_source *s) {
    return s->stored.packed && s->shape.quantise;
}

status checkpoint_precision(const checkpoint *k, precision *p) {
    const stored_form *first = NULL;
    precision found = {.weight = WF_16};
    const size_t n = source_at((weight_field)0, k->config.n_layers);
    for (size_t i = 0; k->packed && i < n; i++) { /* groups that are no whole rows decide */
        const stored_form *f = &k->source[i].stored;
        if (!is_stored_linear(&k->source[i])) continue;
        if (f->why) return refuse_codes(f);
        if (!first) first = f;
        if (found.group == 0 && !(takes_group(f->weight) && f->group == f->k))
            found.group = f->group;
    }
    if (first) {
        found.weight = first->weight;
        found.sym = first->sym;
    }
    for (size_t i = 0; i < n && first; i++) {
        const stored_form *f = &k->source[i].stored;
        if (is_stored_linear(&k->source[i]) && !same_form(f, &found))
            return FAIL(ST_UNSUPPORTED,
                        "tensors '%s' and '%s' have different formats; W16 dequantises at load",
                        first->first, f->first);
    }
    p->weight = found.weight;
    p->group = found.group;
    p->sym = found.sym;
    return ST_OK;
}

status checkpoint_parse_precision(const checkpoint *k, precision *out, const char *name) {
    if (strncmp(name, "auto", 4) != 0) return precision_parse(out, name);
    char rest[PRECISION_NAME_MAX];
    if (snprintf(rest, sizeof rest, "W16%s", name + 4) >= (int)sizeof rest)
        return FAIL(ST_FORMAT, "precision '%.48s...' is too long", name);
    TRY(precision_parse(out, rest));
    return checkpoint_precision(k, out);
}

int64_t checkpoint_weight_bytes(const checkpoint *k, const precision *p, int32_t tp) {
    const model_config *c = &k->config;
    if (!k->packed) return model_weight_bytes(c, p, tp);
    int64_t total = 0;
    for (int32_t layer = 0; layer < c->n_layers; layer++) {
        for (int32_t f = layer ? 0 : WEIGHT_embed; f < WEIGHT_COUNT; f++) {
            weight_source s;
            if (!weight_field_present(c, (weight_field)f)) continue;
            if (checkpoint_source(k, (weight_field)f, layer, &s) != ST_OK) continue;
            const weight_shape one = weight_shape_shard(c, s.field, s.shape, tp);
            total += weight_shape_bytes(&one, p, c->type);
        }
    }
    return total;
}

weight weight_source_handle(const weight_source *s, const precision *p, int32_t tp) {
    CHECK(s->config || tp == 1);
    const weight_shape one =
        s->config ? weight_shape_shard(s->config, s->field, s->shape, tp) : s->shape;
    const bool packed = one.quantise && p->weight != WF_16;
    return (weight){.n = one.n,
                    .k = one.k,
                    .count = one.count,
                    .format = packed ? p->weight : WF_16,
                    .group = packed ? p->group : 0,
                    .sym = packed && p->sym,
                    .has_bias = one.has_bias,
                    .bytes = weight_shape_bytes(&one, p, s->config ? s->config->type : DT_F16)};
}

float weight_noise(uint64_t seed, uint64_t counter) {
    uint32_t word[4];
    philox4x32(seed, counter, word);
    int32_t sum = 0;
    for (int i = 0; i < 4; i++) sum += (int32_t)(word[i] & 0xffff) + (int32_t)(word[i] >> 16);
    return (float)(2 * sum - 8 * 65535) * 9.344062e-6f;
}

void weight_source_row(const weight_source *s, int32_t index, int32_t row, float *out) {
    const weight_shape *w = &s->shape;
    CHECK(index >= 0 && index < w->count);
    CHECK(row >= 0 && row < w->n);
    if (s->n_parts == 0) {
        const uint64_t at = ((uint64_t)index * (uint64_t)w->n + (uint64_t)row) * (uint64_t)w->k;
        for (int32_t i = 0; i < w->k; i++) {
            const float x = weight_noise(s->seed, at + (uint64_t)i);
            out[i] = s->synthetic_mean != 0 ? fmaf(s->synthetic_scale, x, s->synthetic_mean)
                                            : s->synthetic_scale * x; /* the same, cheaper */
        }
        return;
    }
    const int32_t each = s->n_parts / w->count;
    const matrix_part *p = s->part + (int64_t)index * each;
    for (int32_t i = 0; i < each; i++, p++) {
        if (row < p->row_at || row >= p->row_at + p->rows) continue;
        if (p->packed) {
            packed_row(p->packed, p->packed_row + (int32_t)((row - p->row_at) * p->row_stride),
                       out);
            return;
        }
        const int64_t element = (row - p->row_at) * p->row_stride;
        dtype_to_f32(out, (const uint8_t *)p->data + dtype_bytes(p->type, element), w->k,
                     p->col_stride, p->type);
        return;
    }
    CHECK(!"every row is in a part");
}

void weight_source_bias(const weight_source *s, int32_t index, float *out) {
    const weight_shape *w = &s->shape;
    CHECK(index >= 0 && index < w->count);
    memset(out, 0, (size_t)w->n * sizeof *out);
    if (!w->has_bias) return;
    if (s->n_parts == 0) {
        for (int32_t i = 0; i < w->n; i++)
            out[i] = 0.1f * weight_noise(~s->seed, (uint64_t)index * (uint64_t)w->n + (uint64_t)i);
        return;
    }
    const int32_t each = s->n_bias_parts / w->count;
    const matrix_part *p = s->bias_part + (int64_t)index * each;
    for (int32_t i = 0; i < each; i++, p++)
        dtype_to_f32(out + p->row_at, p->data, p->rows, p->row_stride, p->type);
}
