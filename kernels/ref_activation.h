/* ref_activation.h - the definition of the gated activations of the feed-forward. */
#ifndef AMALGAM_REF_ACTIVATION_H
#define AMALGAM_REF_ACTIVATION_H
#include "kernel.h"

#ifdef __cplusplus
extern "C" {
#endif

/* SwiGLU (Shazeer 2020, eq. 6): y[t,f] = silu(g) * u with silu(g) = g / (1 + exp(-g)).
 *
 *   gate_up   [rows, 2 F] f32: g = first F columns, u = last F
 *   y         [rows, F] f32, another buffer
 *
 * In f64, rounded once. rows == 0 does nothing. */
void ref_silu_gated(float *y, const float *gate_up, int64_t rows, int32_t f);

/* gpt-oss (modeling_gpt_oss.py, GptOssExperts): g = min(g, limit), u = clamp(u, -limit, limit),
 * y = g / (1 + exp(-1.702 g)) * (u + 1). Same layout; checkpoints interleave g and u, the loader
 * separates them. limit is config.json swiglu_limit. */
void ref_swiglu_oai_gated(float *y, const float *gate_up, int64_t rows, int32_t f, float limit);

#ifdef __cplusplus
}
#endif
#endif
