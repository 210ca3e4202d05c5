/* precision.h - a precision is data: one struct, parsed once from a name such as W4A16KV8.
 *
 *     name   = "W" weight ["A" act] [kv]                    missing parts mean 16
 *     weight = "16" | "8" ["g" group] | "4" ["g" group] ["sym"]
 *              | "FP8" | "FP8b" | "MXFP4" | "NVFP4"
 *     group  = multiple of 16 | "K"
 *     act    = "16" | "8" | "FP8"
 *     kv     = "KV" f | "K" f "V" f | "KV[" item { "," item } "]"      one item per layer or run
 *     item   = ( f | "K" f "V" f ) [ "x" count ]           "8x4" = four layers of KV8
 *     f      = "16" | "FP8" | "8" | "4"
 *
 * A group is a multiple of 16; "gK" is the whole row, one scale per output channel (group 0), which
 * is what W8 means without one. "FP8" alone is short for WFP8AFP8KVFP8. Names are case-sensitive;
 * precision_name writes the one canonical spelling (all three parts, "KV8" rather than "K8V8", runs
 * merged), so equal precisions have equal names and a name can be part of a natural key. */
#ifndef AMALGAM_PRECISION_H
#define AMALGAM_PRECISION_H
#include "dtype.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef enum {
#define WEIGHT(name, ...) WF_##name,
#include "precision.def"
    WF_COUNT
} weight_format;

typedef enum {
#define ACT(name, ...) AF_##name,
#include "precision.def"
    AF_COUNT
} act_format;

typedef enum {
#define KV(name, ...) KF_##name,
#include "precision.def"
    KF_COUNT
} kv_format;

enum { PRECISION_LAYERS_MAX = 256, PRECISION_NAME_MAX = 2304 }; /* 256 x "K16VFP8," */

typedef struct {
    uint8_t k, v; /* kv_format */
} kv_pair;

typedef struct {
    weight_format weight;
    int32_t group; /* along K; 0 = per output channel (or not quantised) */
    bool sym;      /* W4 only: no zero point, codes are offset by 8 */
    act_format act;
    kv_pair kv;          /* of every layer, when n_kv_layers == 0 */
    int32_t n_kv_layers; /* > 0: a list, which must have as many entries as the model has layers */
    kv_pair kv_layer[PRECISION_LAYERS_MAX];
} precision;

/* FORMAT with the offending part of the name; UNSUPPORTED for a value that is well-formed but
 * meaningless (group no multiple of 16, "sym" on FP8, more than 256 layers). Whether a device can
 * run it is asked of formats.h. A refusal leaves *out alone. */
status precision_parse(precision *out, const char *name);

/* Canonical name into buf[PRECISION_NAME_MAX]; returns buf. */
const char *precision_name(const precision *p, char *buf);

/* KV formats of a layer. Programmer error when the list is shorter than `layer`. */
kv_pair precision_kv(const precision *p, int32_t layer);

/* Scales and zero points of an [n, k] matrix in this format; no zeros when symmetric, none of both
 * in W16. n, k > 0. */
int64_t precision_scale_count(const precision *p, int64_t n, int64_t k);
int64_t precision_zero_count(const precision *p, int64_t n, int64_t k);

/* Bytes of an [n, k] matrix in this format as the engine stores it: codes, scales, zeros. W16 is
 * two bytes an element. The one f32 that NVFP4 has per matrix travels as an argument and is not
 * counted. n * k < 2^58. */
int64_t precision_weight_bytes(const precision *p, int64_t n, int64_t k);

/* Bytes that one token of one KV head takes: codes of head_dim elements and their parameters. */
int64_t kv_format_bytes(kv_format f, int32_t head_dim);
int32_t kv_format_bits(kv_format f);         /* of a code */
int32_t weight_format_bits(weight_format f); /* of a code; 16 for W16 */
const char *kv_format_text(kv_format f);
const char *weight_format_text(weight_format f);
const char *act_format_text(act_format f);

/* Can an [n, k] linear be stored so? K must be a multiple of the group, N of 16, K of 16
 * (FP8b needs neither N nor K to be multiples of 128: the last blocks are partial); W16 takes any
 * shape, since routers and output heads have odd ones. SHAPE with the reason otherwise. */
status precision_fits_shape(const precision *p, int32_t n, int32_t k);

#ifdef __cplusplus
}
#endif
#endif
