/* save.h - a checkpoint written in a quantised layout: what `amalgam quantize` leaves, and what
 * tests of the loader read.
 *
 * Linears come as canonical matrices, one for each tensor of the source; all other tensors are
 * copied. config.json gets its quantization_config; tokenizer and generation files are copied. */
#ifndef AMALGAM_SAVE_H
#define AMALGAM_SAVE_H
#include "weights.h"

typedef enum {
    SAVE_COMPRESSED, /* compressed-tensors: W4, W8 pack-quantized, WFP8(b) float-quantized, FP4 */
    SAVE_AWQ,        /* W4 */
    SAVE_GPTQ,       /* W4, W8; version 1: zero points minus 1 */
    SAVE_GPTQ_V2,
    SAVE_FP8,      /* WFP8b as DeepSeek and Qwen write it; WFP8 when a tensor has one scale */
    SAVE_MODELOPT, /* WNVFP4; WFP8 when a tensor has one scale */
    SAVE_GPT_OSS,  /* WMXFP4 experts */
    SAVE_COUNT
} save_layout;

const char *save_layout_text(save_layout l);
status save_layout_parse(save_layout *out, const char *name); /* NOTFOUND lists them */

typedef struct save save;

/* `dir` is the source. UNSUPPORTED when the layout cannot hold p. */
status save_open(save **out, const char *dir, save_layout layout, const precision *p);

/* The linear of tensor `name` ("….weight"): codes in its place. Column j of q is input order[j]
 * (NULL = j; GPTQ and compressed-tensors integers only). Copies q. */
status save_matrix(save *s, const char *name, const qmatrix *q, const int32_t *order);

/* gpt-oss: matrix `index` of `count` experts of tensor `name`: `n_fused` matrices one below the
 * other, whose rows alternate in the file. Copies q. NOTFOUND: the source has no such tensor. */
status save_expert(save *s, const char *name, int32_t index, int32_t count, int32_t n_fused,
                   const qmatrix *q);

/* Other values for a plain tensor of the source, n elements, rounded to its type. */
status save_values(save *s, const char *name, const float *values, int64_t n);

/* Write model.safetensors, the copies and config.json into `out`, which is made. config.json comes
 * last, and one that was there goes with the weights that it was of: a folder that could not be
 * finished is no checkpoint. */
status save_write(save *s, const char *out);
void save_close(save *s); /* NULL is fine */
#endif
