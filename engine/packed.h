/* packed.h - matrices in the quantised layouts of other tools: one description that covers all.
 *
 *   AWQ "gemm"          qweight qzeros scales               u4, packed along outputs, interleaved
 *   GPTQ v1, v2         qweight qzeros scales [g_idx]       u4 and u8, packed along inputs
 *   compressed-tensors  weight_packed weight_scale [weight_zero_point] [weight_g_idx] weight_shape
 *                       u4 and u8; NVFP4 and MXFP4 in bytes (weight_global_scale divides)
 *   FP8, int8           weight + weight_scale | weight_scale_inv, by tensor, channel or block
 *   ModelOpt NVFP4      weight weight_scale weight_scale_2  (multiplies)
 *   gpt-oss MXFP4       NAME_blocks NAME_scales             (all experts in one tensor)
 *
 * Which one a linear has is decided by the tensors that are there, their types and shapes; the
 * quantization_config must agree. Every layout is then the same thing: fields of some bits in
 * words, a scale and perhaps a zero point for each group of inputs:
 *
 *   value(n, k) = (code(n, k) - zero(n, g)) * scale(n, g) * global_scale,  g = g_idx[k] or k /
 *   group
 *
 * Nothing is copied: a packed_matrix points into the mapped file. */
#ifndef AMALGAM_PACKED_H
#define AMALGAM_PACKED_H
#include "ref_quant.h"
#include "safetensors.h"

/* field(n, k) = bits at slot of word[n / n_per * n_stride + k / k_per * k_stride], where the slot
 * is n % n_per or k % k_per; one of the two is 1. Words are little-endian. */
typedef struct {
    const void *data;           /* NULL: there are none */
    int32_t word_bits, bits;    /* 8 or 32; 4 or 8 */
    int32_t n_per, k_per;       /* fields of a word along n or k */
    bool awq_order;             /* column 8c + j lies in slot 0 4 1 5 2 6 3 7 [j] */
    int64_t n_stride, k_stride; /* in words */
} packed_field;

typedef struct {
    const char *name;     /* of the codes' tensor */
    weight_format format; /* INT4 INT8 FP8 FP8B MXFP4 NVFP4 */
    int32_t n, k;
    int32_t group;   /* inputs that share a scale; k when one for all */
    int32_t block_n; /* outputs that share one: 1, n (whole tensor), or a block's rows */
    bool sym;        /* INT4, INT8: there are no zero points, or the config says that all are the
                        middle one, which packed_check verifies */
    packed_field code;
    uint8_t code_flip; /* xor makes a stored 8-bit code a signed one */
    packed_field zero; /* k counts groups */
    int32_t zero_add;  /* GPTQ v1 stores zero - 1 */
    const void *scale;
    dtype scale_type;
    int64_t scale_n_stride, scale_g_stride; /* in elements, n counts blocks of block_n */
    float global_scale;
    const int32_t *g_idx; /* [k], NULL where input i is in group i / group */
    const char *only16;   /* why codes cannot be used as they are, only their values; NULL = can */
    const tensor_view *tensor[6]; /* what it is made of */
    int32_t n_tensors;
} packed_matrix;

/* The quantization_config of a checkpoint, as far as it can disagree with the tensors. */
enum { PACKED_SCHEMES_MAX = 8 };
typedef struct {
    int32_t bits;
    bool is_float;
    int32_t sym;      /* -1 = not said */
    int32_t group;    /* -1 = one for all inputs, 0 = not said */
    int32_t block[2]; /* 0 = none */
} packed_scheme;

typedef struct {
    char
        method[24]; /* "awq" "gptq" "compressed-tensors" "fp8" "mxfp4" "modelopt"; "" = no config */
    char version[40]; /* awq: version; gptq: checkpoint_format; compressed-tensors: format */
    packed_scheme scheme[PACKED_SCHEMES_MAX];
    int32_t n_schemes; /* 0: anything goes (gptq with dynamic rules) */
} packed_config;

/* From dir/config.json, else quantize_config.json (GPTQ) or hf_quant_config.json (ModelOpt). None
 * of them: method "". FORMAT or UNSUPPORTED with file and key. */
status packed_config_load(packed_config *out, const char *dir);

/* The [n, k] linear called `module` ("model.layers.0.mlp.up_proj", without ".weight"). *found is
 * false when its weight is a plain tensor or missing altogether. NOTFOUND, SHAPE, UNSUPPORTED and
 * FORMAT name the tensor. */
status packed_find(packed_matrix *out, bool *found, const safetensors *files, const char *module,
                   int32_t n, int32_t k, const packed_config *c);

/* MXFP4 experts as gpt-oss has them: matrix `index` of `count` in NAME_blocks, NAME_scales. */
status packed_find_blocks(packed_matrix *out, bool *found, const safetensors *files,
                          const char *name, int32_t index, int32_t count, int32_t n, int32_t k,
                          const packed_config *c);

/* Is there a tensor of any layout for this module? */
bool packed_exists(const safetensors *files, const char *module);

/* What of rows [row0, row0 + rows * step) cannot be right: a scale that is NaN, infinite or
 * negative, a zero point that is not the middle one although the config says symmetric. */
status packed_check(const packed_matrix *m);

/* out[k] = values of a row, in the checkpoint's order of inputs. Product in f32, one rounding. */
void packed_row(const packed_matrix *m, int32_t row, float *out);

/* Row `row` as row `to` of a canonical matrix of the same format, group and k: codes, scales (block
 * scales when `to` starts a block), zeros. Column j is input order[j] (NULL = j). f32 and bf16
 * scales of INT4 are rounded to f16. */
void packed_canonical(const packed_matrix *m, int32_t row, const int32_t *order, qmatrix *q,
                      int32_t to);

/* Inputs by group, in order within a group: what canonical columns stand for. order [k].
 * UNSUPPORTED when groups differ in size. */
status packed_order(const packed_matrix *m, int32_t *order);
#endif
