/* ref_rope.h - the definition of rotary position embedding (Su et al. 2021, eq. 34).
 *
 * Easy to get wrong: pairs are the two halves of a head (d, d + D/2), as in every Hugging Face
 * model here, not neighbours (2d, 2d + 1). YaRN's attention factor multiplies cos and sin both, so
 * a score carries its square. Frequencies come from rope_frequencies (model.h), which knows the
 * kinds. */
#ifndef AMALGAM_REF_ROPE_H
#define AMALGAM_REF_ROPE_H
#include "kernel.h"

#ifdef __cplusplus
extern "C" {
#endif

/* cosine[d] = factor * cos(position * inv_freq[d]), sine alike, for d < half = D / 2.
 *
 *   cosine, sine, inv_freq   [half]
 *
 * The angle is an f64 product. Hugging Face takes it in f32, which is off by position * 2^-24
 * radians: 1e-6 where the golden logits lie, but 0.06 at position 10^6; the wide one is the
 * definition. */
void ref_rope_angles(float *cosine, float *sine, const double *inv_freq, double factor,
                     int32_t position, int32_t half);

/* In place, for each of `heads` rows of x [heads, D]:
 *   x[d]        = x[d] cosine[d] - x[d + D/2] sine[d]
 *   x[d + D/2]  = x[d + D/2] cosine[d] + x[d] sine[d]        in f32, each product rounded */
void ref_rope(float *x, int32_t heads, int32_t head_dim, const float *cosine, const float *sine);

#ifdef __cplusplus
}
#endif
#endif
