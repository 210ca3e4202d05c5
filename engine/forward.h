/* forward.h - the transformer, written once over the table of operations. */
#ifndef AMALGAM_FORWARD_H
#define AMALGAM_FORWARD_H
#include "device.h"

typedef struct forward forward;

/* Which of a device's fused operations to use. Printed by `amalgam inspect plan`. */
typedef struct {
    bool linear_gated, moe_gated, moe_norm;
} forward_plan;

/* Every fused operation that the device has. */
forward_plan forward_plan_default(const device *d);

/* Load all weights of `k` onto the device (progress may be NULL), then set up the device and the
 * activation buffers for the limits in `s`. Owns the handles, not the device. */
status forward_load(forward **out, arena *a, device *d, checkpoint *k, const model_config *c,
                    const precision *p, void (*progress)(void *user, int64_t done, int64_t total),
                    void *user);
status forward_setup(forward *f, const device_setup *s, const forward_plan *plan);

/* One step: fills `out` [b->n_samples]; cost_ns as device_ops.end. A batch that breaks its promises
 * is a programmer error. */
status forward_step(forward *f, const batch *b, sampled *out, int64_t *cost_ns);
/* Its two halves. Where the device has `launch`, a second step may be launched before the first is
 * collected; `b` is read during the launch only, `out` belongs to the oldest step. */
status forward_launch(forward *f, const batch *b);
status forward_collect(forward *f, sampled *out, int64_t *cost_ns);

/* Logits of the last step, f32 [n_samples, vocab]. */
status forward_logits(forward *f, float *out);

const model_weights *forward_weights(const forward *f);
int64_t forward_weight_bytes(const forward *f);
/* The list of operations of a step of T tokens with the device's explanation of each. */
void forward_explain(forward *f, int32_t n_tokens, int32_t n_samples, text *out);
#endif
