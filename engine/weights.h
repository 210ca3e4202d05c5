/* weights.h - the tensors of a model: where each lies in a checkpoint, and how it reaches a device.
 *
 * A device is handed sources, one logical matrix at a time; it decides what to store. A source is
 * either parts of mapped checkpoint files (any strides, so fused, split, interleaved and transposed
 * layouts are the same thing) or a seed for synthetic values. Whatever the file holds, a device
 * sees qkv as rows q | k | v and gate_up as rows gate | up, heads in their order.
 *
 * A checkpoint may be quantised already (packed.h). Then the weight format of a run is the
 * checkpoint's, with its codes as they are, or W16, which dequantises at load; any other is
 * refused, since rounding twice is nobody's format. Linears that such a checkpoint leaves in 16 bit
 * (gpt-oss' attention) stay so: their shape says quantise == false. */
#ifndef AMALGAM_WEIGHTS_H
#define AMALGAM_WEIGHTS_H
#include "model.h"
#include "packed.h"

/* Rows [row_at, row_at + rows) of matrix `index` of a source:
 * value(row_at + i, k) = data[i * row_stride + k * col_stride] in elements of `type`.
 * A packed part (packed not NULL) has neither data nor type; row row_at + i is row
 * packed_row + i * row_stride of `packed`. */
typedef struct {
    const void *data;
    dtype type;    /* F32, F16 or BF16 */
    int32_t index; /* expert, 0 otherwise */
    int32_t row_at, rows;
    int64_t row_stride, col_stride;
    const packed_matrix *packed;
    int32_t packed_row;
    const tensor_view *tensor; /* the one it lies in; NULL in packed and hand-made parts */
} matrix_part;

/* How a checkpoint stores a weight. */
typedef struct {
    bool packed;          /* some part is; all below is zero otherwise */
    weight_format weight; /* WF_16: only its values can be used, because ... */
    int32_t group, k;     /* as in a precision, but k where a group of W4 or W8 is the whole row */
    bool sym;
    const char *why;           /* ... of this, */
    const char *first, *other; /* which these tensors show; `other` may be NULL */
    const int32_t *order; /* [count, k] column j of matrix i stands for input order[i * k + j]; NULL
                             = j. From GPTQ's desc_act */
} stored_form;

typedef enum {
    SHARD_NONE, /* every rank has all of it: norms, router, embedding */
    SHARD_ROWS, /* output features are split: qkv, gate_up, head (vocabulary) */
    SHARD_COLS  /* input features are split, partial sums are reduced: o, down */
} shard_kind;

/* Weights of a model by field: three once, the others in every layer. */
typedef enum {
    WEIGHT_embed = -3,
    WEIGHT_norm = -2,
    WEIGHT_head = -1,
#define X(field, ...) WEIGHT_##field,
#include "layer.def"
#undef X
    WEIGHT_COUNT
} weight_field;

/* Shape of a field for a config, and how it is sharded; of the whole, or of one rank. */
typedef struct {
    int32_t n, k;  /* of one matrix; vectors have n = 1 */
    int32_t count; /* matrices: n_experts, or 1; 0 = the model has no such weight */
    bool quantise; /* takes the precision's weight format; embedding, head, norms, router do not */
    bool has_bias; /* [count, n] */
    shard_kind shard;
    int32_t n_fused;       /* SHARD_ROWS splits each of these row ranges on its own: */
    int32_t fused_rows[3]; /*   q, k, v or gate, up; all of n otherwise */
} weight_shape;

typedef struct {
    char name[128]; /* first tensor, for messages: "model.layers.3.self_attn.q_proj.weight" */
    weight_field field;
    const model_config
        *config;        /* of the checkpoint; NULL in hand-made sources, which have one rank */
    weight_shape shape; /* of the whole */
    dtype type; /* of all 16-bit tensors (checkpoint_dtype): what W16 and biases are stored in */
    int32_t
        n_parts; /* 0 = synthetic. Ordered by index, as many for each of the `count` matrices, in
                        each by row_at; together every row once */
    const matrix_part *part;
    int32_t n_bias_parts; /* bias [count, n]: the same scheme with k = 1; 0 = none, or synthetic */
    const matrix_part *bias_part;
    stored_form stored;
    uint64_t seed; /* synthetic */
    float synthetic_scale, synthetic_mean;
} weight_source;

/* Row `row` of matrix `index` as f32 [k]; and the bias [n] of matrix `index` (zeros when none). */
void weight_source_row(const weight_source *s, int32_t index, int32_t row, float *out);
void weight_source_bias(const weight_source *s, int32_t index, float *out);

/* Can it be loaded in format p: plain, or p's weight format is the stored one or W16? UNSUPPORTED
 * names the tensor and what to ask for. FORMAT for scales or zero points that cannot be right,
 * which are all read for this. Every device asks before it loads. */
status weight_source_accepts(const weight_source *s, const precision *p);

/* Are its codes to be used, in format p? Then weight_source_qmatrix gives them; else values are to
 * be read by row and, when shape.quantise and p is not W16, rounded by the device. */
bool weight_source_has_codes(const weight_source *s, const precision *p);

/* Codes, scales and zero points of matrix `index`, exactly as the checkpoint has them, into a
 * qmatrix laid out by qmatrix_alloc for an accepted p. Columns are in the order of stored.order.
 * f32 and bf16 scales of INT4 are rounded to f16; a scale for a whole FP8 tensor is repeated by
 * row. Rows are spread over OpenMP threads. */
void weight_source_qmatrix(const weight_source *s, int32_t index, qmatrix *q);

/* Synthetic element (row, col) of matrix j is
 *     fmaf(scale, weight_noise(seed, (j * n + row) * k + col), mean)
 * and bias `row` of matrix j is 0.1f * weight_noise(~seed, j * n + row), so that any device can
 * make any tile on its own, with the same bits.
 *
 * weight_noise is (2 sum - 8 * 65535) * 9.344062e-6f, sum being that of the eight 16-bit halves of
 * philox4x32(seed, counter): mean 0, variance 1, bell-shaped within +-4.9 (a quantiser meets few
 * outliers, not none), one integer sum and one multiplication, no libm. */
float weight_noise(uint64_t seed, uint64_t counter);

/* The handle of a loaded weight; `data` belongs to the device. Sizes are those of one rank. */
typedef struct weight {
    int32_t n, k, count;
    weight_format format;
    int32_t group;
    bool has_bias, sym;
    int64_t bytes; /* device memory it takes on one rank, exact, bias and scales included */
    void *data;
} weight;

/* The handle that a source in format p gives on one of tp ranks, `data` NULL: sizes and bytes are
 * the same on every device. */
weight weight_source_handle(const weight_source *s, const precision *p, int32_t tp);

/* Weights of one layer: fields and sources are generated from layer.def. Absent ones have n == 0.
 */
typedef struct {
#define X(field, ...) weight field;
#include "layer.def"
#undef X
} layer_weights;

typedef struct {
    weight embed, norm, head; /* head is a copy of the handle of embed when tied */
    layer_weights *layer;     /* [n_layers] */
} model_weights;

const char *weight_field_text(weight_field f);
/* Does this model have it (in every layer)? A tied head is not there: it is the embedding. */
bool weight_field_present(const model_config *c, weight_field f);

/* --- Checkpoints --------------------------------------------------------------------------------
 */

/* An opened checkpoint (mapped files, name table) or, with dir == NULL, synthetic weights.
 *
 * Every weight of the model is found and its shape checked before this returns: NOTFOUND names the
 * missing tensor, SHAPE both shapes, UNSUPPORTED a layout or element type that is not read, FORMAT
 * a tensor that the model as config.json describes it has no place for (a bias, a layer too many),
 * or one that its quantization_config contradicts. Static scales of activations and of the KV cache
 * are passed over: the engine takes its own as it goes. The config is copied. */
typedef struct checkpoint checkpoint;
status checkpoint_open(checkpoint **out, const model_config *c, const char *dir, uint64_t seed);
void checkpoint_close(checkpoint *k); /* NULL is fine */

/* Digest over config.json and the headers and sizes of the weight files (not their bodies), for the
 * natural key; 0 for synthetic. */
uint64_t checkpoint_digest(const checkpoint *k);

/* Element type of the embedding: what the checkpoint is stored in, whatever config.json says (one
 * saved by transformers 5 may say float32 over bf16 tensors). The config's type for synthetic. */
dtype checkpoint_dtype(const checkpoint *k);

/* The weight part of the format that the checkpoint is stored in: W16 for a plain or synthetic one;
 * activations and KV of *p stay as they were. UNSUPPORTED, naming tensors, when its linears differ
 * or have no format with a name; W16 then reads it. */
status checkpoint_precision(const checkpoint *k, precision *p);

/* "auto" or "auto" followed by the rest of a name ("autoA16KV8"): the checkpoint's weight format;
 * any other name as precision_parse. */
status checkpoint_parse_precision(const checkpoint *k, precision *out, const char *name);

/* As model_weight_bytes, counting what the checkpoint leaves in 16 bit. */
int64_t checkpoint_weight_bytes(const checkpoint *k, const precision *p, int32_t tp);

/* Sources by field; `layer` is ignored for embed, norm and head. NOTFOUND for a field the model
 * does not have. A tied head gives the values of embed. Points into the checkpoint and lives as
 * long. */
status checkpoint_source(const checkpoint *k, weight_field f, int32_t layer, weight_source *out);

/* --- Sizes, the one definition that sim, capacity and the devices share -------------------------
 */

/* The whole of a weight, all experts, before any sharding. */
weight_shape weight_field_shape(const model_config *c, weight_field f);

/* One rank's share of a shape: n, k divided as `shard` says (KV heads replicated when tp exceeds
 * them). Caller has checked model_fits_tp. */
weight_shape weight_shape_shard(const model_config *c, weight_field f, weight_shape s, int32_t tp);

/* Which rows (SHARD_ROWS) or columns (SHARD_COLS) of the whole matrix a rank holds: rank's rows
 * [*at, *at + *n) of fused range `i`, counted in the whole matrix; i is 0 for all other shapes.
 * The rank's own matrix has its ranges in the same order. SHARD_NONE: all rows. */
void weight_shard_range(const model_config *c, weight_field f, int32_t tp, int32_t rank, int32_t i,
                        int32_t *at, int32_t *n);

/* A rank's part of the quantised matrix q of field f: its rows in their order, or its columns,
 * codes and scales as they are in q. `part` is laid out for the rank's sizes (qmatrix_alloc).
 * SHAPE where the part would begin or end within a byte, a group or a block. */
status weight_shard_qmatrix(const model_config *c, weight_field f, int32_t tp, int32_t rank,
                            const qmatrix *q, qmatrix *part);

/* Bytes of one rank's weight in format p, bias and scales included; what is not quantised (W16, the
 * bias) takes elements of `type`. */
int64_t weight_shape_bytes(const weight_shape *s, const precision *p, dtype type);

/* All weights of one rank, in the config's type. A tied head takes nothing; with tp > 1 it reads a
 * range of the embedding, which every rank has whole. */
int64_t model_weight_bytes(const model_config *c, const precision *p, int32_t tp);

/* KV cache bytes one token takes on one rank, over all layers (windows do not shorten it). */
int64_t model_kv_token_bytes(const model_config *c, const precision *p, int32_t tp);

/* Can the model run so: model_fits_tp with the format's groups, every linear's shard in the format,
 * as many entries in a KV list as layers. SHAPE with the reason. Whether a device has kernels for
 * it is the device's answer. */
status model_fits_precision(const model_config *c, const precision *p, int32_t tp);
#endif
