/* weights.h - the tensors of a model: where each lies in a checkpoint, and how it reaches a device.
 *
 * A device is handed sources, one logical matrix at a time; it decides what to store. A source is
 * either parts of mapped checkpoint files (any strides, so fused, split, interleaved and transposed
 * layouts are the same thing) or a seed for synthetic values. */
#ifndef AMALGAM_WEIGHTS_H
#define AMALGAM_WEIGHTS_H
#include "model.h"
#include "precision.h"

/* Rows row_at, row_at + row_step, ... (`rows` of them) of matrix `index` of a source:
 * value(i, k) = data[i * row_stride + k * col_stride] in elements of `type`. */
typedef struct {
    const void *data;
    dtype type;
    int32_t index; /* expert, 0 otherwise */
    int32_t row_at, row_step, rows;
    int64_t row_stride, col_stride;
} matrix_part;

typedef enum {
    SHARD_NONE, /* every rank has all of it: norms, router, embedding */
    SHARD_ROWS, /* output features are split: qkv, gate_up, head (vocabulary) */
    SHARD_COLS  /* input features are split, partial sums are reduced: o, down */
} shard_kind;

typedef struct {
    char name[128]; /* first tensor, for messages: "model.layers.3.self_attn.q_proj.weight" */
    int32_t n, k;   /* of one matrix; vectors have n = 1 */
    int32_t count;  /* matrices: n_experts, or 1 */
    bool quantise;  /* takes the precision's weight format; embedding, head, norms, router do not */
    shard_kind shard;
    int32_t n_fused;       /* SHARD_ROWS splits each of these row ranges on its own: */
    int32_t fused_rows[3]; /*   q, k, v or gate, up */
    int32_t n_parts;       /* 0 = synthetic */
    const matrix_part *part;
    int32_t n_bias_parts; /* bias [count, n]; same scheme with k = 1; 0 = none unless synthetic */
    const matrix_part *bias_part;
    bool has_bias;
    uint64_t seed; /* synthetic: element i of matrix j = gaussian of (seed, j, i) * scale + mean */
    float synthetic_scale, synthetic_mean;
} weight_source;

/* Row `row` of matrix `index` as f32 [k]; and the bias [n] of matrix `index` (zeros when none).
 * Synthetic values come from philox_unit(seed, index * n * k + row * k + col), so that any device
 * can make any tile on its own. */
void weight_source_row(const weight_source *s, int32_t index, int32_t row, float *out);
void weight_source_bias(const weight_source *s, int32_t index, float *out);

/* The handle of a loaded weight; `data` belongs to the device. Sizes are those of one rank. */
typedef struct weight {
    int32_t n, k, count;
    weight_format format;
    int32_t group;
    bool has_bias, sym;
    int64_t bytes; /* device memory it takes on one rank, exact, bias and scales included */
    void *data;
} weight;

/* Weights of one layer: fields and sources are generated from layer.def. Absent ones have n == 0. */
typedef struct {
#define X(field, ...) weight field;
#include "layer.def"
#undef X
} layer_weights;

typedef struct {
    weight embed, norm, head; /* head is a copy of the handle of embed when tied */
    layer_weights *layer;     /* [n_layers] */
} model_weights;

/* An opened checkpoint (mapped files, name table) or, with dir == NULL, synthetic weights. */
typedef struct checkpoint checkpoint;
status checkpoint_open(checkpoint **out, const model_config *c, const char *dir, uint64_t seed);
void checkpoint_close(checkpoint *k);
/* Digest over config.json and the headers and sizes of the weight files (not their bodies), for the
 * natural key; 0 for synthetic. checkpoint_digest_full reads every byte. */
uint64_t checkpoint_digest(const checkpoint *k);

/* Sources by field. NOTFOUND names the missing tensor, SHAPE both shapes. The result points into the
 * checkpoint and lives as long. */
typedef enum {
    WEIGHT_embed = -3,
    WEIGHT_norm = -2,
    WEIGHT_head = -1,
#define X(field, ...) WEIGHT_##field,
#include "layer.def"
#undef X
    WEIGHT_COUNT
} weight_field;
const char *weight_field_text(weight_field f);
/* Does this model have it in layer `layer`? */
bool weight_field_present(const model_config *c, weight_field f);
status checkpoint_source(checkpoint *k, weight_field f, int32_t layer, weight_source *out);

/* Shape of a field for a config, before sharding, and how it is sharded; for sim and for inspect. */
typedef struct {
    int32_t n, k, count;
    bool quantise, has_bias;
    shard_kind shard;
    int32_t n_fused, fused_rows[3];
} weight_shape;
weight_shape weight_field_shape(const model_config *c, weight_field f);

/* One rank's share of a shape: n, k divided as `shard` says (KV heads replicated when tp exceeds
 * them). Caller has checked model_fits_tp. */
weight_shape weight_shape_shard(const model_config *c, weight_field f, weight_shape s, int32_t tp);

/* Bytes of one rank's weight in format p (bias and scales included): the one definition that sim,
 * capacity and the devices share. */
int64_t weight_shape_bytes(const weight_shape *s, const precision *p, dtype type);

/* All weights of one rank. */
int64_t model_weight_bytes(const model_config *c, const precision *p, int32_t tp);
#endif
