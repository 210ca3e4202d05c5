/* model.c - see model.h. One row per Hugging Face class says what its config.json leaves unsaid;
 * the rest is reading keys in both spellings and refusing what the engine does not compute.
 *
 * Keys that are absent take the default of the class (configuration_<class>.py of transformers),
 * not a plausible one: MistralConfig without `sliding_window` has a window of 4096, with null it
 * has none.
 *
 * Mixtral's modelling code takes the softmax over all experts and renormalises the chosen ones;
 * that is exp(l_i) / sum over the chosen of exp(l_j), the softmax over the chosen, so its route is
 * TOPK_SOFTMAX here. Qwen3-MoE with norm_topk_prob true is the same number, false is not. */
#define _GNU_SOURCE
#include "model.h"

#include "json.h"
#include "utf8.h"

#include <limits.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

typedef enum {
    WINDOW_NONE,     /* sliding_window is no key of the class */
    WINDOW_ALL,      /* every layer, when sliding_window is not null */
    WINDOW_ALL_IF,   /* every layer, when use_sliding_window is true as well */
    WINDOW_TYPES_IF, /* when use_sliding_window: layer_types, or layers >= max_window_layers */
    WINDOW_TYPES     /* layer_types, or every second layer, the first one windowed */
} window_rule;

typedef struct {
    const char *arch, *model_type;
    const char *bias_key;   /* boolean key for biases on q, k, v and o; NULL = the class has none */
    bool bias;              /* its default */
    bool qkv_bias;          /* always a bias on q, k, v and none on o */
    bool kv_heads_optional; /* absent num_key_value_heads means num_attention_heads */
    bool qk_norm, sinks, expert_bias;
    const char *expert_dim_key; /* NULL = dense */
    route_kind route;
    bool norm_topk; /* default of norm_topk_prob; true where the class has no such key */
    activation_kind activation;
    window_rule window;
    int32_t window_default, head_dim_default; /* 0 = none; 0 = hidden_size / num_attention_heads */
    double theta_default, eps_default;
    bool yarn_default; /* without rope_scaling: gpt-oss' YaRN */
} arch_row;

static const arch_row llama = {
    .arch = "LlamaForCausalLM",
    .model_type = "llama",
    .bias_key = "attention_bias",
    .kv_heads_optional = true,
    .theta_default = 1e4,
    .eps_default = 1e-6,
};

static const arch_row mistral = {
    .arch = "MistralForCausalLM",
    .model_type = "mistral",
    .window = WINDOW_ALL,
    .window_default = 4096,
    .theta_default = 1e4,
    .eps_default = 1e-6,
};

static const arch_row mixtral = {
    .arch = "MixtralForCausalLM",
    .model_type = "mixtral",
    .expert_dim_key = "intermediate_size",
    .route = ROUTE_TOPK_SOFTMAX,
    .norm_topk = true,
    .window = WINDOW_ALL,
    .theta_default = 1e6,
    .eps_default = 1e-5,
};

static const arch_row qwen2 = {
    .arch = "Qwen2ForCausalLM",
    .model_type = "qwen2",
    .qkv_bias = true,
    .window = WINDOW_TYPES_IF,
    .window_default = 4096,
    .theta_default = 1e4,
    .eps_default = 1e-6,
};

static const arch_row qwen3 = {
    .arch = "Qwen3ForCausalLM",
    .model_type = "qwen3",
    .bias_key = "attention_bias",
    .qk_norm = true,
    .window = WINDOW_TYPES_IF,
    .window_default = 4096,
    .head_dim_default = 128,
    .theta_default = 1e4,
    .eps_default = 1e-6,
};

static const arch_row qwen3_moe = {
    .arch = "Qwen3MoeForCausalLM",
    .model_type = "qwen3_moe",
    .bias_key = "attention_bias",
    .qk_norm = true,
    .expert_dim_key = "moe_intermediate_size",
    .route = ROUTE_SOFTMAX_TOPK,
    .window = WINDOW_ALL_IF,
    .window_default = 4096,
    .theta_default = 1e4,
    .eps_default = 1e-6,
};

static const arch_row internlm2 = {
    .arch = "InternLM2ForCausalLM",
    .model_type = "internlm2",
    .bias_key = "bias",
    .bias = true,
    .kv_heads_optional = true,
    .theta_default = 1e4,
    .eps_default = 1e-6,
};

static const arch_row gpt_oss = {
    .arch = "GptOssForCausalLM",
    .model_type = "gpt_oss",
    .bias_key = "attention_bias",
    .bias = true,
    .sinks = true,
    .expert_bias = true,
    .expert_dim_key = "intermediate_size",
    .route = ROUTE_TOPK_SOFTMAX,
    .norm_topk = true,
    .activation = ACT_SWIGLU_OAI,
    .window = WINDOW_TYPES,
    .window_default = 128,
    .head_dim_default = 64,
    .theta_default = 1.5e5,
    .eps_default = 1e-5,
    .yarn_default = true,
};

static const arch_row *const archs[] = {&llama, &mistral,   &mixtral,   &qwen2,
                                        &qwen3, &qwen3_moe, &internlm2, &gpt_oss};

/* Bounds that no real model comes near; within them every size fits its type (weights.h). */
enum {
    DIM_MAX = 1 << 17,
    HEADS_MAX = 1 << 10,
    HEAD_DIM_MAX = 1 << 10,
    FFN_MAX = 1 << 20,
    EXPERTS_MAX = 1 << 12,
    VOCAB_MAX = 1 << 24,
    CTX_MAX = 1 << 28
};

/* What the readers below share. */
typedef struct {
    const json_t *root;
    const char *where;
    const arch_row *row;
    model_config *c;
} reader;

static status read_arch(reader *r);
static status read_dtype(reader *r);
static status read_sizes(reader *r);
static status read_experts(reader *r);
static status read_activation(reader *r);
static status read_rope(reader *r);
static status read_window(reader *r);
static status read_tokens(reader *r, const json_t *root, const char *where);

static status read_config(reader *r) {
    model_config *c = r->c;
    if (!json_is_object(r->root)) return FAIL(ST_FORMAT, "%s: not a JSON object", r->where);
    TRY(read_arch(r));
    TRY(read_dtype(r));
    TRY(read_sizes(r));
    TRY(read_experts(r));
    TRY(read_activation(r));
    TRY(read_rope(r));
    TRY(read_window(r));
    c->norm_eps = r->row->eps_default;
    TRY(json_opt_f64(r->root, "rms_norm_eps", r->where, 1e-12, 1e-1, &c->norm_eps));
    TRY(json_opt_bool(r->root, "tie_word_embeddings", r->where, &c->tied));
    c->qkv_bias = c->o_bias = r->row->bias;
    if (r->row->bias_key) TRY(json_opt_bool(r->root, r->row->bias_key, r->where, &c->qkv_bias));
    c->o_bias = c->qkv_bias;
    if (r->row->qkv_bias) c->qkv_bias = true;
    c->qk_norm = r->row->qk_norm;
    c->sinks = r->row->sinks;
    c->router_bias = c->expert_bias = r->row->expert_bias;
    bool mlp_bias = false;
    TRY(json_opt_bool(r->root, "mlp_bias", r->where, &mlp_bias));
    if (mlp_bias) return FAIL(ST_UNSUPPORTED, "%s: mlp_bias is not supported", r->where);
    c->bos = -1;
    return read_tokens(r, r->root, r->where);
}

status model_config_parse(model_config *out, const char *data, size_t n, const char *where) {
    *out = (model_config){0};
    json_t *root;
    TRY(json_parse(&root, data, n, where));
    const status st = read_config(&(reader){.root = root, .where = where, .c = out});
    json_decref(root);
    return st;
}

/* --- Reading ---------------------------------------------------------------------------------- */

static status read_arch(reader *r) {
    const char *arch = NULL, *type = NULL;
    const json_t *list = json_find(r->root, "architectures");
    if (list) {
        arch = json_string_value(json_array_get(list, 0));
        if (!arch) return FAIL(ST_FORMAT, "%s: 'architectures' is no list of names", r->where);
    }
    TRY(json_opt_string(r->root, "model_type", r->where, &type));
    if (!arch && !type)
        return FAIL(ST_NOTFOUND, "%s: neither 'architectures' nor 'model_type'", r->where);
    for (int32_t i = 0; i < COUNT_OF(archs) && !r->row; i++)
        if (strcmp(arch ? arch : type, arch ? archs[i]->arch : archs[i]->model_type) == 0)
            r->row = archs[i];
    if (!r->row)
        return FAIL(ST_UNSUPPORTED, "%s: architecture '%s' is not supported", r->where,
                    arch ? arch : type);
    if (type && strcmp(type, r->row->model_type) != 0)
        return FAIL(ST_FORMAT, "%s: model_type '%s' does not belong to %s", r->where, type,
                    r->row->arch);
    snprintf(r->c->arch, sizeof r->c->arch, "%s", r->row->arch);
    return ST_OK;
}

/* `torch_dtype` (transformers 4) or `dtype` (5); absent, as in gpt-oss' file, means bf16. */
static status read_dtype(reader *r) {
    static const struct {
        const char *text;
        dtype type;
    } names[] = {{"bfloat16", DT_BF16}, {"float16", DT_F16}, {"float32", DT_F32}};
    const char *old = NULL, *now = NULL;
    TRY(json_opt_string(r->root, "torch_dtype", r->where, &old));
    TRY(json_opt_string(r->root, "dtype", r->where, &now));
    if (old && now && strcmp(old, now) != 0)
        return FAIL(ST_FORMAT, "%s: torch_dtype '%s' and dtype '%s' disagree", r->where, old, now);
    const char *name = now ? now : old ? old : "bfloat16";
    for (int32_t i = 0; i < COUNT_OF(names); i++) {
        if (strcmp(name, names[i].text) != 0) continue;
        r->c->type = names[i].type;
        return ST_OK;
    }
    return FAIL(ST_UNSUPPORTED, "%s: dtype '%s' is not supported", r->where, name);
}

static status read_sizes(reader *r) {
    model_config *c = r->c;
    const json_t *j = r->root;
    const char *w = r->where;
    TRY(json_get_i32(j, "hidden_size", w, 2, DIM_MAX, &c->dim));
    TRY(json_get_i32(j, "num_hidden_layers", w, 1, MODEL_LAYERS_MAX, &c->n_layers));
    TRY(json_get_i32(j, "num_attention_heads", w, 1, HEADS_MAX, &c->n_heads));
    TRY(json_get_i32(j, "vocab_size", w, 2, VOCAB_MAX, &c->vocab));
    TRY(json_get_i32(j, "max_position_embeddings", w, 1, CTX_MAX, &c->ctx_max));
    c->n_kv_heads = c->n_heads;
    if (r->row->kv_heads_optional) {
        TRY(json_opt_i32(j, "num_key_value_heads", w, 1, HEADS_MAX, &c->n_kv_heads));
    } else {
        TRY(json_get_i32(j, "num_key_value_heads", w, 1, HEADS_MAX, &c->n_kv_heads));
    }
    if (c->n_heads % c->n_kv_heads)
        return FAIL(ST_RANGE, "%s: num_attention_heads %d is no multiple of num_key_value_heads %d",
                    w, c->n_heads, c->n_kv_heads);
    c->head_dim = r->row->head_dim_default;
    TRY(json_opt_i32(j, "head_dim", w, 2, HEAD_DIM_MAX, &c->head_dim));
    if (c->head_dim == 0) {
        if (c->dim % c->n_heads)
            return FAIL(ST_RANGE, "%s: hidden_size %d is no multiple of num_attention_heads %d", w,
                        c->dim, c->n_heads);
        c->head_dim = c->dim / c->n_heads;
    }
    if (c->head_dim % 2 || c->head_dim > HEAD_DIM_MAX)
        return FAIL(ST_RANGE, "%s: head_dim %d is odd or over %d", w, c->head_dim, HEAD_DIM_MAX);
    if (r->row->expert_dim_key) return ST_OK;
    return json_get_i32(j, "intermediate_size", w, 1, FFN_MAX, &c->ffn_dim);
}

/* `num_experts` (Qwen, transformers 4) and `num_local_experts` (Mixtral, gpt-oss, transformers 5)
 * are one attribute under two names. */
static status read_experts(reader *r) {
    model_config *c = r->c;
    const json_t *j = r->root;
    const char *w = r->where;
    if (!r->row->expert_dim_key) return ST_OK;
    int32_t old = 0, now = 0;
    TRY(json_opt_i32(j, "num_experts", w, 1, EXPERTS_MAX, &old));
    TRY(json_opt_i32(j, "num_local_experts", w, 1, EXPERTS_MAX, &now));
    if (!old && !now)
        return FAIL(ST_NOTFOUND, "%s: neither 'num_experts' nor 'num_local_experts'", w);
    if (old && now && old != now)
        return FAIL(ST_FORMAT, "%s: num_experts %d and num_local_experts %d disagree", w, old, now);
    c->n_experts = old ? old : now;
    TRY(json_get_i32(j, "num_experts_per_tok", w, 1, c->n_experts, &c->top_k));
    TRY(json_get_i32(j, r->row->expert_dim_key, w, 1, FFN_MAX, &c->expert_dim));
    c->route = r->row->route;
    c->norm_topk = r->row->norm_topk;
    if (c->route == ROUTE_SOFTMAX_TOPK) TRY(json_opt_bool(j, "norm_topk_prob", w, &c->norm_topk));
    int32_t sparse_step = 1;
    TRY(json_opt_i32(j, "decoder_sparse_step", w, 0, MODEL_LAYERS_MAX, &sparse_step));
    if (sparse_step != 1 || json_array_size(json_find(j, "mlp_only_layers")) > 0)
        return FAIL(ST_UNSUPPORTED,
                    "%s: dense layers among MoE layers (decoder_sparse_step, mlp_only_layers) are "
                    "not supported",
                    w);
    return ST_OK;
}

static status read_activation(reader *r) {
    model_config *c = r->c;
    const char *name = "silu";
    TRY(json_opt_string(r->root, "hidden_act", r->where, &name));
    if (strcmp(name, "silu") != 0)
        return FAIL(ST_UNSUPPORTED, "%s: hidden_act '%s' is not supported", r->where, name);
    c->activation = r->row->activation;
    if (c->activation != ACT_SWIGLU_OAI) return ST_OK;
    c->swiglu_limit = 7.0;
    double alpha = 1.702;
    TRY(json_opt_f64(r->root, "swiglu_limit", r->where, 1e-3, 1e6, &c->swiglu_limit));
    TRY(json_opt_f64(r->root, "swiglu_alpha", r->where, 1e-3, 1e3, &alpha));
    if (alpha != 1.702)
        return FAIL(ST_UNSUPPORTED, "%s: swiglu_alpha %g is not supported, only 1.702", r->where,
                    alpha);
    return ST_OK;
}

/* --- Rotary embedding ------------------------------------------------------------------------- */

static status read_rope_kind(const json_t *j, const char *where, rope_kind *kind) {
    static const struct {
        const char *text;
        rope_kind kind;
    } names[] = {{"default", ROPE_DEFAULT},
                 {"linear", ROPE_LINEAR},
                 {"llama3", ROPE_LLAMA3},
                 {"yarn", ROPE_YARN},
                 {"dynamic", ROPE_DYNAMIC}};
    const char *name = NULL;
    TRY(json_opt_string(j, "type", where, &name)); /* before transformers 4.43 */
    TRY(json_opt_string(j, "rope_type", where, &name));
    *kind = ROPE_DEFAULT;
    if (!name) return ST_OK; /* {"rope_theta": ...} alone */
    for (int32_t i = 0; i < COUNT_OF(names); i++) {
        if (strcmp(name, names[i].text) != 0) continue;
        *kind = names[i].kind;
        return ST_OK;
    }
    return FAIL(ST_UNSUPPORTED, "%s: rope type '%s' is not supported", where, name);
}

/* Attention factor of YaRN (Peng et al. 2023, eq. 25) and DeepSeek's quotient of two of them. */
static double yarn_mscale(double factor, double m) {
    return factor <= 1 ? 1.0 : 0.1 * m * log(factor) + 1.0;
}

static status read_yarn(const json_t *j, const char *where, rope_config *p) {
    double m = 0, m_all = 0;
    p->beta_fast = 32;
    p->beta_slow = 1;
    p->truncate = true;
    TRY(json_opt_f64(j, "beta_fast", where, 1e-3, 1e6, &p->beta_fast));
    TRY(json_opt_f64(j, "beta_slow", where, 1e-3, 1e6, &p->beta_slow));
    if (p->beta_fast < p->beta_slow)
        return FAIL(ST_RANGE, "%s: beta_fast %g is below beta_slow %g", where, p->beta_fast,
                    p->beta_slow);
    TRY(json_opt_bool(j, "truncate", where, &p->truncate));
    TRY(json_opt_f64(j, "mscale", where, 0, 1e3, &m));
    TRY(json_opt_f64(j, "mscale_all_dim", where, 0, 1e3, &m_all));
    p->attention_factor = m > 0 && m_all > 0
                              ? yarn_mscale(p->factor, m) / yarn_mscale(p->factor, m_all)
                              : yarn_mscale(p->factor, 1);
    return json_opt_f64(j, "attention_factor", where, 1e-3, 1e3, &p->attention_factor);
}

/* The keys of one rope_scaling or flat rope_parameters object. */
static status read_rope_object(reader *r, const json_t *j, const char *where) {
    rope_config *p = &r->c->rope;
    TRY(json_opt_f64(j, "rope_theta", where, 1, 1e12, &p->theta));
    double partial = 1;
    TRY(json_opt_f64(j, "partial_rotary_factor", where, 0, 1e3, &partial));
    if (partial != 1)
        return FAIL(ST_UNSUPPORTED, "%s: partial_rotary_factor %g is not supported", where,
                    partial);
    TRY(read_rope_kind(j, where, &p->kind));
    if (p->kind == ROPE_DEFAULT) return ST_OK;
    TRY(json_get_f64(j, "factor", where, 1, 1e6, &p->factor));
    const char *key = "original_max_position_embeddings";
    if (p->kind == ROPE_LLAMA3) {
        TRY(json_get_i32(j, key, where, 1, CTX_MAX, &p->original_ctx));
        TRY(json_get_f64(j, "low_freq_factor", where, 1e-3, 1e6, &p->low_freq_factor));
        TRY(json_get_f64(j, "high_freq_factor", where, 1e-3, 1e6, &p->high_freq_factor));
        if (p->high_freq_factor <= p->low_freq_factor)
            return FAIL(ST_RANGE, "%s: high_freq_factor %g is not above low_freq_factor %g", where,
                        p->high_freq_factor, p->low_freq_factor);
    } else {
        TRY(json_opt_i32(j, key, where, 1, CTX_MAX, &p->original_ctx));
    }
    return p->kind == ROPE_YARN ? read_yarn(j, where, p) : ST_OK;
}

/* transformers 5 may nest one object per layer type. They are read when they are all the same. */
static status rope_flat(const json_t *j, const char *where, const json_t **out) {
    *out = j;
    const char *key;
    json_t *value;
    const json_t *first = NULL;
    json_object_foreach((json_t *)(uintptr_t)j, key, value) {
        if (!json_is_object(value)) continue;
        if (first && !json_equal(first, value))
            return FAIL(ST_UNSUPPORTED,
                        "%s: rotary embeddings that differ by layer type ('%s') "
                        "are not supported",
                        where, key);
        first = value;
    }
    if (first) *out = first;
    return ST_OK;
}

static status read_rope(reader *r) {
    model_config *c = r->c;
    rope_config *p = &c->rope;
    *p = (rope_config){.theta = r->row->theta_default,
                       .factor = 1,
                       .attention_factor = 1,
                       .original_ctx = c->ctx_max};
    double top_theta = 0, partial = 1;
    TRY(json_opt_f64(r->root, "rope_theta", r->where, 1, 1e12, &top_theta));
    TRY(json_opt_f64(r->root, "partial_rotary_factor", r->where, 0, 1e3, &partial));
    if (partial != 1)
        return FAIL(ST_UNSUPPORTED, "%s: partial_rotary_factor %g is not supported", r->where,
                    partial);
    if (top_theta > 0) p->theta = top_theta;

    const json_t *old = json_find(r->root, "rope_scaling"),
                 *now = json_find(r->root, "rope_parameters");
    if (old && now && !json_equal(old, now))
        return FAIL(ST_FORMAT, "%s: rope_scaling and rope_parameters are both given", r->where);
    if ((old && !json_is_object(old)) || (now && !json_is_object(now)))
        return FAIL(ST_FORMAT, "%s: rope_scaling or rope_parameters is no object", r->where);
    if (old || now) {
        char where[512];
        snprintf(where, sizeof where, "%s: %s", r->where, now ? "rope_parameters" : "rope_scaling");
        const json_t *flat;
        TRY(rope_flat(now ? now : old, where, &flat));
        TRY(read_rope_object(r, flat, where));
        if (top_theta > 0 && p->theta != top_theta)
            return FAIL(ST_FORMAT, "%s: rope_theta %g and %g disagree", r->where, top_theta,
                        p->theta);
    } else if (r->row->yarn_default) {
        p->kind = ROPE_YARN;
        p->factor = p->beta_fast = 32;
        p->beta_slow = 1;
        p->original_ctx = 4096;
        p->attention_factor = yarn_mscale(p->factor, 1);
    }
    if (p->kind == ROPE_DYNAMIC && p->original_ctx < c->ctx_max) c->ctx_max = p->original_ctx;
    /* Qwen's recipe for long contexts adds YaRN and leaves max_position_embeddings alone. */
    if (p->kind == ROPE_YARN && p->original_ctx * p->factor <= CTX_MAX)
        c->ctx_max = (int32_t)i64_max(c->ctx_max, (int64_t)(p->original_ctx * p->factor));
    return ST_OK;
}

/* --- Windows ---------------------------------------------------------------------------------- */

/* layer_types -> windows; *given is false when the key is absent. */
static status read_layer_types(reader *r, int32_t window, bool *given) {
    const json_t *types = json_find(r->root, "layer_types");
    *given = types != NULL;
    if (!types) return ST_OK;
    if (!json_is_array(types) || json_array_size(types) != (size_t)r->c->n_layers)
        return FAIL(ST_FORMAT, "%s: layer_types is no list of num_hidden_layers = %d names",
                    r->where, r->c->n_layers);
    for (int32_t i = 0; i < r->c->n_layers; i++) {
        const char *name = json_string_value(json_array_get(types, (size_t)i));
        if (name && strcmp(name, "full_attention") == 0) {
            r->c->window[i] = 0;
        } else if (name && strcmp(name, "sliding_attention") == 0) {
            if (window == 0)
                return FAIL(ST_FORMAT, "%s: layer_types[%d] is sliding, but there is no window",
                            r->where, i);
            r->c->window[i] = window;
        } else {
            return FAIL(ST_UNSUPPORTED, "%s: layer_types[%d] '%s' is not supported", r->where, i,
                        name ? name : "(no name)");
        }
    }
    return ST_OK;
}

static status read_window(reader *r) {
    model_config *c = r->c;
    const window_rule rule = r->row->window;
    int32_t window = rule == WINDOW_NONE ? 0 : r->row->window_default, first = 28;
    bool use = rule == WINDOW_ALL || rule == WINDOW_TYPES, given;
    if (rule == WINDOW_ALL_IF || rule == WINDOW_TYPES_IF)
        TRY(json_opt_bool(r->root, "use_sliding_window", r->where, &use));
    if (use) {
        if (json_is_null(json_object_get(r->root, "sliding_window"))) window = 0;
        TRY(json_opt_i32(r->root, "sliding_window", r->where, 1, CTX_MAX, &window));
    }
    if (!use) window = 0;
    TRY(read_layer_types(r, window, &given));
    if (given && (rule == WINDOW_TYPES || rule == WINDOW_TYPES_IF)) return ST_OK;
    if (rule == WINDOW_TYPES_IF)
        TRY(json_opt_i32(r->root, "max_window_layers", r->where, 0, INT32_MAX, &first));
    if (rule != WINDOW_TYPES_IF) first = 0;
    for (int32_t i = 0; i < c->n_layers; i++) {
        const int32_t rule_window = i < first || (rule == WINDOW_TYPES && i % 2 == 1) ? 0 : window;
        if (given && c->window[i] != rule_window)
            return FAIL(ST_UNSUPPORTED,
                        "%s: %s does not read layer_types, which differ from its "
                        "rule in layer %d",
                        r->where, c->arch, i);
        c->window[i] = rule_window;
    }
    return ST_OK;
}

/* --- Token ids -------------------------------------------------------------------------------- */

static status add_eos(reader *r, const json_t *v, const char *where) {
    model_config *c = r->c;
    if (!json_is_integer(v)) return FAIL(ST_FORMAT, "%s: 'eos_token_id' is no token id", where);
    const json_int_t id = json_integer_value(v);
    if (id < 0 || id >= c->vocab)
        return FAIL(ST_RANGE, "%s: eos_token_id = %lld is outside 0 to %d", where, (long long)id,
                    c->vocab - 1);
    for (int32_t i = 0; i < c->n_eos; i++)
        if (c->eos[i] == id) return ST_OK;
    if (c->n_eos == MODEL_EOS_MAX)
        return FAIL(ST_RANGE, "%s: more than %d eos_token_id", where, MODEL_EOS_MAX);
    c->eos[c->n_eos++] = (int32_t)id;
    return ST_OK;
}

/* eos_token_id is a number or a list; config.json and generation_config.json are united. */
static status read_tokens(reader *r, const json_t *root, const char *where) {
    TRY(json_opt_i32(root, "bos_token_id", where, 0, r->c->vocab - 1, &r->c->bos));
    const json_t *eos = json_find(root, "eos_token_id");
    if (!eos) return ST_OK;
    if (!json_is_array(eos)) return add_eos(r, eos, where);
    for (size_t i = 0; i < json_array_size(eos); i++)
        TRY(add_eos(r, json_array_get(eos, i), where));
    return ST_OK;
}

/* --- Folders ---------------------------------------------------------------------------------- */

static bool holds_config(const char *dir) {
    char path[4400];
    snprintf(path, sizeof path, "%s/config.json", dir);
    return file_exists(path);
}

status model_dir(char *buf, size_t n, const char *name) {
    if ((size_t)snprintf(buf, n, "%s", name) < n && holds_config(buf)) return ST_OK;
    if (name[0] && name[0] != '.' && !strchr(name, '/') &&
        (size_t)snprintf(buf, n, "%s/workloads/models/%s", root_dir(), name) < n &&
        holds_config(buf))
        return ST_OK;
    return FAIL(ST_NOTFOUND,
                "no model '%s': neither a folder with config.json nor one of %s/workloads/models "
                "(`amalgam models` lists them)",
                name, root_dir());
}

status model_names(arena *a, const char ***names, int32_t *n) {
    *names = NULL;
    *n = 0;
    char path[4400];
    snprintf(path, sizeof path, "%s/workloads/models/order.txt", root_dir());
    file_map m;
    TRY(file_map_open(&m, path));
    status st = FAIL(ST_NOMEM, "%s", path);
    char *copy = arena_string(a, (const char *)m.data, m.size);
    size_t names_most = 1;
    for (size_t i = 0; i < m.size; i++) names_most += m.data[i] <= ' ';
    const char **list = arena_array(a, const char *, names_most);
    file_map_close(&m);
    if (!copy || !list) return st;
    char *rest = NULL;
    for (char *line = strtok_r(copy, " \t\r\n", &rest); line;
         line = strtok_r(NULL, " \t\r\n", &rest))
        list[(*n)++] = line;
    *names = list;
    return ST_OK;
}

/* Name of the folder itself, also for "." and with slashes at the end. '_' for what lines of JSON
 * would have to escape, and for what is no UTF-8. */
static void set_name(model_config *c, const char *dir) {
    char real[PATH_MAX];
    const char *slash = realpath(dir, real) ? strrchr(real, '/') : NULL,
               *from = slash ? slash + 1 : dir;
    size_t used = 0;
    for (size_t left = strlen(from); left > 0;) {
        uint32_t u;
        const int32_t k = utf8_next(from, left, &u);
        const size_t n = (size_t)(k > 0 ? k : -k);
        const bool plain = k > 0 && u >= ' ' && u != 127 && u != '"' && u != '\\';
        if (used + (plain ? n : 1) >= sizeof c->name) break;
        memcpy(c->name + used, plain ? from : "_", plain ? n : 1);
        used += plain ? n : 1;
        from += n;
        left -= n;
    }
    c->name[used] = 0;
}

static status read_generation(model_config *c, const char *dir) {
    char path[4400];
    snprintf(path, sizeof path, "%s/generation_config.json", dir);
    if (!file_exists(path)) return ST_OK;
    json_t *root;
    TRY(json_file(&root, path));
    reader r = {.root = root, .where = path, .c = c};
    const status st = json_is_object(root) ? read_tokens(&r, root, path)
                                           : FAIL(ST_FORMAT, "%s: not a JSON object", path);
    json_decref(root);
    return st;
}

status model_config_load(model_config *out, const char *name) {
    *out = (model_config){0};
    char dir[4096], path[4400];
    TRY(model_dir(dir, sizeof dir, name));
    snprintf(path, sizeof path, "%s/config.json", dir);
    file_map m;
    TRY(file_map_open(&m, path));
    const status st = model_config_parse(out, (const char *)m.data, m.size, path);
    file_map_close(&m);
    TRY(st);
    set_name(out, dir);
    return read_generation(out, dir);
}

/* --- Derived figures -------------------------------------------------------------------------- */

/* `experts` of the n_experts matrices of every expert field are counted. */
static int64_t parameters(const model_config *c, int32_t experts) {
    int64_t layer = 0;
#define X(field, n, k, count, quantise, shard, bias, present)                                      \
    if (present) {                                                                                 \
        const int64_t one = (int64_t)(n) * (k) + ((bias) ? (n) : 0);                               \
        layer += one * ((count) > 1 ? experts : 1);                                                \
    }
#include "layer.def"
#undef X
    const int64_t embedding = (int64_t)c->vocab * c->dim;
    return embedding * (c->tied ? 1 : 2) + c->dim + layer * c->n_layers;
}

int64_t model_parameters(const model_config *c) { return parameters(c, c->n_experts); }
int64_t model_active_parameters(const model_config *c) { return parameters(c, c->top_k); }

int32_t model_kv_heads(const model_config *c, int32_t tp) {
    return c->n_kv_heads < tp ? 1 : c->n_kv_heads / tp;
}

static status fits_split(const model_config *c, const char *what, int32_t width, int32_t tp,
                         int32_t group) {
    if (width % tp)
        return FAIL(ST_SHAPE, "%s: %s %d is no multiple of tp %d", c->name, what, width, tp);
    if (group > 0 && width / tp % group)
        return FAIL(ST_SHAPE,
                    "%s: %s %d at tp %d, %d a rank, is no multiple of the weight group %d", c->name,
                    what, width, tp, width / tp, group);
    return ST_OK;
}

status model_fits_tp(const model_config *c, int32_t tp, int32_t group) {
    if (tp < 1 || tp > HEADS_MAX) return FAIL(ST_RANGE, "tp %d is outside 1 to %d", tp, HEADS_MAX);
    TRY(fits_split(c, "head count", c->n_heads, tp, 0));
    if (c->n_kv_heads % tp && tp % c->n_kv_heads)
        return FAIL(ST_SHAPE, "%s: tp %d neither divides the %d KV heads nor is a multiple of them",
                    c->name, tp, c->n_kv_heads);
    TRY(fits_split(c, "attention width", c->n_heads * c->head_dim, tp, group));
    TRY(fits_split(c, "vocabulary", c->vocab, tp, 0));
    return c->n_experts ? fits_split(c, "expert width", c->expert_dim, tp, group)
                        : fits_split(c, "FFN width", c->ffn_dim, tp, group);
}

/* Dimension at which a rotary pair makes `turns` turns over `ctx` positions (YaRN, eq. 23). */
static double yarn_dim(double turns, const rope_config *r, int32_t head_dim) {
    return head_dim * log(r->original_ctx / (turns * 2 * 3.14159265358979323846)) /
           (2 * log(r->theta));
}

static double yarn_frequency(double f, const rope_config *r, int32_t head_dim, int32_t d) {
    double low = yarn_dim(r->beta_fast, r, head_dim), high = yarn_dim(r->beta_slow, r, head_dim);
    if (r->truncate) {
        low = floor(low);
        high = ceil(high);
    }
    low = fmax(low, 0);
    high = fmin(high, head_dim - 1);
    if (low == high) high += 0.001; /* as transformers does, against 0 / 0 */
    const double ramp = fmin(fmax((d - low) / (high - low), 0), 1);
    return f / r->factor * ramp + f * (1 - ramp);
}

static double llama3_frequency(double f, const rope_config *r) {
    const double turns = r->original_ctx * f / (2 * 3.14159265358979323846);
    if (turns > r->high_freq_factor) return f;
    if (turns < r->low_freq_factor) return f / r->factor;
    const double s = (turns - r->low_freq_factor) / (r->high_freq_factor - r->low_freq_factor);
    return (1 - s) * f / r->factor + s * f;
}

void rope_frequencies(const rope_config *r, int32_t head_dim, double *inv_freq, double *factor) {
    *factor = r->kind == ROPE_YARN ? r->attention_factor : 1.0;
    for (int32_t d = 0; d < head_dim / 2; d++) {
        const double f = pow(r->theta, -2.0 * d / head_dim);
        switch (r->kind) {
        case ROPE_DEFAULT:
        case ROPE_DYNAMIC: inv_freq[d] = f; break;
        case ROPE_LINEAR: inv_freq[d] = f / r->factor; break;
        case ROPE_LLAMA3: inv_freq[d] = llama3_frequency(f, r); break;
        case ROPE_YARN: inv_freq[d] = yarn_frequency(f, r, head_dim, d); break;
        }
    }
}
