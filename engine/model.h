/* model.h - what a transformer is, read from a Hugging Face config.json.
 *
 * Easy to get wrong, all from real files: head_dim is not dim / n_heads (Qwen3, gpt-oss); heads * D
 * differs from E; rope_theta stands at the top (transformers 4) or in rope_parameters (5); gpt-oss
 * alternates windowed and full layers starting with a windowed one; Mixtral takes the softmax over
 * the chosen experts, Qwen3-MoE over all and renormalises (the same numbers, see model.c);
 * an absent key takes the default of its class (Mistral's sliding_window), null switches it off. */
#ifndef AMALGAM_MODEL_H
#define AMALGAM_MODEL_H
#include "dtype.h"

enum { MODEL_LAYERS_MAX = 256, MODEL_EOS_MAX = 8 };

typedef enum { ROPE_DEFAULT, ROPE_LINEAR, ROPE_LLAMA3, ROPE_YARN, ROPE_DYNAMIC } rope_kind;

typedef struct {
    rope_kind
        kind; /* DYNAMIC (InternLM2.5) equals DEFAULT up to original_ctx, which bounds ctx_max */
    double theta, factor;
    double low_freq_factor, high_freq_factor; /* LLAMA3 */
    double beta_fast, beta_slow;              /* YARN */
    double attention_factor; /* YARN: cos and sin are multiplied by it; 1 elsewhere */
    bool truncate;           /* YARN: round the correction range to whole dims */
    int32_t original_ctx;    /* original_max_position_embeddings */
} rope_config;

typedef enum { ACT_SILU, ACT_SWIGLU_OAI } activation_kind;
/* SILU:       y = silu(gate) * up
 * SWIGLU_OAI: gate = min(gate, limit), up = clamp(up, -limit, limit),
 *             y = gate * sigmoid(1.702 gate) * (up + 1)          (gpt-oss; swiglu_limit = 7) */

typedef enum { ROUTE_SOFTMAX_TOPK, ROUTE_TOPK_SOFTMAX } route_kind;
/* SOFTMAX_TOPK: p = softmax over all experts, take the top k, divide by their sum if norm_topk
 * TOPK_SOFTMAX: take the top k logits, softmax over them (Mixtral, gpt-oss) */

typedef struct model_config {
    char name[64]; /* last component of the folder: "Llama-3.1-8B"; nothing that JSON escapes */
    char arch[48]; /* architectures[0]: "LlamaForCausalLM" */
    dtype type;    /* F16, BF16 or F32, as config.json says; what the tensors really are:
                      checkpoint_dtype (weights.h) */
    int32_t dim, n_layers, n_heads, n_kv_heads, head_dim, vocab, ctx_max;
    int32_t ffn_dim;                      /* 0 when every layer is MoE */
    int32_t n_experts, top_k, expert_dim; /* 0, 0, 0 for dense */
    route_kind route;
    bool norm_topk;
    activation_kind activation;
    double swiglu_limit;
    double norm_eps;
    rope_config rope;
    int32_t
        window[MODEL_LAYERS_MAX]; /* tokens a query may look back on, itself included; 0 = all */
    bool tied, qkv_bias, o_bias, qk_norm, sinks, router_bias, expert_bias;
    int32_t bos, eos[MODEL_EOS_MAX], n_eos; /* bos -1 = none; from config and generation_config */
} model_config;

/* Read dir/config.json (and generation_config.json when it is there). `dir` may also be the name of
 * one of workloads/models. Every value is checked against sane bounds: FORMAT, RANGE or UNSUPPORTED
 * with file and key. */
status model_config_load(model_config *out, const char *dir);
/* The same from memory; `where` names it in messages. */
status model_config_parse(model_config *out, const char *data, size_t n, const char *where);

/* Folder of a model: `name` itself when it holds config.json, else workloads/models/<name>. */
status model_dir(char *buf, size_t n, const char *name);
/* Names under workloads/models, in the order of workloads/models/order.txt. */
status model_names(arena *a, const char ***names, int32_t *n);

/* Parameters in all, and those one token uses (top_k experts; embedding and head included). */
int64_t model_parameters(const model_config *c);
int64_t model_active_parameters(const model_config *c);

/* KV heads of each of tp ranks: replicated where there are fewer heads than ranks. */
int32_t model_kv_heads(const model_config *c, int32_t tp);

/* Can it be split over tp GPUs: heads, KV heads (or replication), FFN width, groups? SHAPE with the
 * reason. `group` is the weight group along K (0 = none). */
status model_fits_tp(const model_config *c, int32_t tp, int32_t group);

/* inv_freq[d] for d < head_dim / 2, in double, and the factor on cos and sin. Pair d turns by
 * position * inv_freq[d].
 *   DEFAULT theta^(-2d/D); LINEAR divided by factor; LLAMA3 the wavelength bands of Llama 3.1;
 *   YARN (Peng et al. 2023, eq. 23-25 with the ramp over dims beta_fast..beta_slow). DYNAMIC as
 *   DEFAULT, because ctx_max never exceeds its original_ctx. */
void rope_frequencies(const rope_config *r, int32_t head_dim, double *inv_freq, double *factor);
#endif
