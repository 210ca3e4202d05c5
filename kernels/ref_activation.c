/* ref_activation.c - gated activations, element by element. */
#include "ref_activation.h"
#include <math.h>

void ref_silu_gated(float *y, const float *gate_up, int64_t rows, int32_t f) {
    for (int64_t r = 0; r < rows; r++) {
        const float *gate = gate_up + r * 2 * f, *up = gate + f;
        for (int32_t i = 0; i < f; i++) {
            const double g = gate[i];
            y[r * f + i] = (float)(g / (1 + exp(-g)) * up[i]);
        }
    }
}

/* Not fmin and fmax: they would turn NaN into the limit and hide it. */
static double clamp(double x, double lo, double hi) { return x < lo ? lo : x > hi ? hi : x; }

void ref_swiglu_oai_gated(float *y, const float *gate_up, int64_t rows, int32_t f, float limit) {
    const double alpha = 1.702; /* GptOssExperts.alpha: x sigmoid(1.702 x) approximates GELU */
    for (int64_t r = 0; r < rows; r++) {
        const float *gate = gate_up + r * 2 * f, *up = gate + f;
        for (int32_t i = 0; i < f; i++) {
            const double g = clamp(gate[i], -INFINITY, limit), u = clamp(up[i], -limit, limit);
            y[r * f + i] = (float)(g / (1 + exp(-alpha * g)) * (u + 1));
        }
    }
}
