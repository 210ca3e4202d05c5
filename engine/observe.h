/* observe.h - what the linears of a model are fed: second moments of their inputs, for quantisers.
 *
 * A device's table of operations is wrapped: linear and moe_linear hand their input to `observe`
 * before they run, which sums where the device's memory is. It costs nothing when it is not there.
 */
#ifndef AMALGAM_OBSERVE_H
#define AMALGAM_OBSERVE_H
#include "engine.h"

typedef struct observer observer;

/* Watch the quantisable linears of layers [first, first + n) from now on. The engine must be idle
 * and have one rank. NOMEM when the moments do not fit into memory; UNSUPPORTED on a device without
 * values. */
status observer_open(observer **out, engine *e, int32_t first, int32_t n);
/* Enough was seen: the device is itself again, and the moments are there. */
status observer_end(observer *o);
/* Of matrix `index` (expert) of a field that the model has; qkv, o, gate_up, down or experts'. */
const moments *observer_moments(const observer *o, weight_field f, int32_t layer, int32_t index);
/* Bytes that watching one layer takes. */
int64_t observer_layer_bytes(const model_config *c);
void observer_close(observer *o); /* the device is itself again; NULL is fine */
#endif
