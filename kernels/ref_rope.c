/* ref_rope.c - rotary position embedding: angles once a token, rotation once a head. */
#include "ref_rope.h"
#include <math.h>

void ref_rope_angles(float *cosine, float *sine, const double *inv_freq, double factor,
                     int32_t position, int32_t half) {
    for (int32_t d = 0; d < half; d++) {
        const double angle = position * inv_freq[d];
        cosine[d] = (float)(factor * cos(angle));
        sine[d] = (float)(factor * sin(angle));
    }
}

void ref_rope(float *x, int32_t heads, int32_t head_dim, const float *cosine, const float *sine) {
    const int32_t half = head_dim / 2;
    CHECK(head_dim % 2 == 0);
    for (int32_t h = 0; h < heads; h++) {
        float *lo = x + (int64_t)h * head_dim, *hi = lo + half;
        for (int32_t d = 0; d < half; d++) {
            const float a = lo[d], b = hi[d];
            lo[d] = a * cosine[d] - b * sine[d];
            hi[d] = b * cosine[d] + a * sine[d];
        }
    }
}
