/* activation.h - gated activations of the feed-forward (ref_activation.h). */
#ifndef KERNEL_ACTIVATION_H
#define KERNEL_ACTIVATION_H
#include "kernel.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef enum { GATED_SILU, GATED_OAI } gated_kind;

/* y [rows, f] from gate_up [rows, 2 f] = gate | up, both of `type`, device, 16-byte aligned, apart.
 *
 *   GATED_SILU   gate / (1 + exp(-gate)) * up
 *   GATED_OAI    g / (1 + exp(-1.702 g)) * (u + 1), g = min(gate, limit), u = clamp(up, +-limit)
 *
 * In f32, rounded once; NaN stays NaN. SHAPE for f <= 0 or rows < 0, UNSUPPORTED for a type other
 * than F16 and BF16, DEVICE on launch failure. rows == 0 launches nothing. Asynchronous on
 * `stream`. */
status kernel_gated(void *y, const void *gate_up, int64_t rows, int32_t f, gated_kind kind,
                    float limit, dtype type, kernel_stream stream);

#ifdef __cplusplus
}
#endif
#endif
