/* observe.h - what the linears of a model are fed: second moments of their inputs, for quantisers.
 *
 * A device's table of operations is wrapped: linear and moe_linear read their input back before
 * they run. So it works on every device that can read tensors, and costs nothing when it is not
 * there. */
#ifndef AMALGAM_OBSERVE_H
#define AMALGAM_OBSERVE_H
#include "engine.h"

/* Of one matrix' inputs x [rows, k], each row divided by its root mean square. Without that a few
 * tokens with massive activations (the first ones, where attention rests) outweigh all others in
 * what down and o are fed, although the norm that follows divides their error by as much: on the
 * tiny checkpoint gptq then wins back 54 % of the perplexity of W4 in place of 37 %. */
typedef struct {
    int32_t k;
    int64_t rows;
    double *gram;      /* [k, k] sum over rows of x_i x_j */
    double *magnitude; /* [k] sum over rows of |x_i| */
} moments;

typedef struct observer observer;

/* Watch the quantisable linears of layers [first, first + n) from now on. The engine must be idle
 * and have one rank. NOMEM when the moments do not fit into memory; UNSUPPORTED on a device without
 * values. */
status observer_open(observer **out, engine *e, int32_t first, int32_t n);
/* Of matrix `index` (expert) of a field that the model has; qkv, o, gate_up, down or experts'. */
const moments *observer_moments(const observer *o, weight_field f, int32_t layer, int32_t index);
/* Bytes that watching one layer takes. */
int64_t observer_layer_bytes(const model_config *c);
void observer_close(observer *o); /* the device is itself again; NULL is fine */
#endif
