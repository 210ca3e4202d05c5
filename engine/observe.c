/* observe.c - see observe.h. The wrapped table stands inside the observer, so that a wrapped
 * operation finds its observer from the device it is called with. */
#include "observe.h"

#include "ref_moe.h"

#include <string.h>

struct observer {
    device_ops ops; /* first: device.ops points here while we watch */
    const device_ops *real;
    engine *e;
    arena memory;
    int32_t first, n;
    moments *of;           /* [n, 4 kinds, max(1, experts)] */
    calibrate_sums **sums; /* the same */
    float *logits, *route_weight;
    int32_t *expert, *expert_start, *slot_row, *row_token, *in_order;
    int32_t max_rows;
};

enum { KIND_QKV, KIND_O, KIND_UP, KIND_DOWN, KINDS };

static observer *of_device(device *d) { return (observer *)(void *)(uintptr_t)d->ops; }

static int32_t experts_of(const model_config *c) { return c->n_experts ? c->n_experts : 1; }

static int32_t inputs_of(const model_config *c, int32_t kind) {
    switch (kind) {
    case KIND_O: return c->n_heads * c->head_dim;
    case KIND_DOWN: return c->n_experts ? c->expert_dim : c->ffn_dim;
    default: return c->dim;
    }
}

static int64_t place(const observer *o, int32_t layer, int32_t kind, int32_t index) {
    const int32_t x = experts_of(engine_config(o->e));
    return ((int64_t)(layer - o->first) * KINDS + kind) * x + index;
}

static int64_t places(const observer *o) {
    return (int64_t)o->n * KINDS * experts_of(engine_config(o->e));
}

int64_t observer_layer_bytes(const model_config *c) {
    int64_t bytes = 0;
    for (int32_t kind = 0; kind < KINDS; kind++) {
        const int64_t k = inputs_of(c, kind);
        bytes += (kind >= KIND_UP ? experts_of(c) : 1) * (k * k + k) * (int64_t)sizeof(double);
    }
    return bytes;
}

const moments *observer_moments(const observer *o, weight_field f, int32_t layer, int32_t index) {
    CHECK(layer >= o->first && layer < o->first + o->n);
    switch (f) {
    case WEIGHT_qkv: return &o->of[place(o, layer, KIND_QKV, 0)];
    case WEIGHT_o: return &o->of[place(o, layer, KIND_O, 0)];
    case WEIGHT_gate_up:
    case WEIGHT_experts_gate_up: return &o->of[place(o, layer, KIND_UP, index)];
    default: CHECK(f == WEIGHT_down || f == WEIGHT_experts_down);
    }
    return &o->of[place(o, layer, KIND_DOWN, index)];
}

/* The layer and kind of a weight that is watched; false for all others. */
static bool which(const observer *o, const weight *w, int32_t *layer, int32_t *kind) {
    const model_weights *m = forward_weights(engine_forward(o->e));
    for (int32_t i = o->first; i < o->first + o->n; i++) {
        const layer_weights *l = &m->layer[i];
        *layer = i;
        *kind = w == &l->qkv                                   ? KIND_QKV
                : w == &l->o                                   ? KIND_O
                : w == &l->gate_up || w == &l->experts_gate_up ? KIND_UP
                : w == &l->down || w == &l->experts_down       ? KIND_DOWN
                                                               : -1;
        if (*kind >= 0) return true;
    }
    return false;
}

static status watch(device *d, tensor x, const weight *w) {
    observer *o = of_device(d);
    int32_t layer, kind;
    if (!which(o, w, &layer, &kind)) return ST_OK;
    return o->real->observe(d, o->sums[place(o, layer, kind, 0)], x, NULL, x.rows);
}

static status observe_linear(device *d, tensor out, tensor x, const weight *w) {
    TRY(watch(d, x, w));
    return of_device(d)->real->linear(d, out, x, w);
}

static status observe_gated(device *d, tensor out, tensor x, const weight *w, activation_kind kind,
                            float limit) {
    TRY(watch(d, x, w));
    return of_device(d)->real->linear_gated(d, out, x, w, kind, limit);
}

static status observe_route(device *d, tensor logits, int32_t top_k, route_kind kind,
                            bool normalise) {
    observer *o = of_device(d);
    const int32_t x = experts_of(engine_config(o->e));
    TRY(o->real->read(d, logits, o->logits));
    ref_moe_route(o->expert, o->route_weight, o->logits, logits.rows, x, top_k,
                  kind == ROUTE_TOPK_SOFTMAX, normalise);
    ref_moe_permute(o->expert_start, o->slot_row, o->row_token, o->expert, logits.rows, x, top_k);
    return o->real->moe_route(d, logits, top_k, kind, normalise);
}

/* In its parts, for the logits are wanted before what they say is used. */
static status observe_enter(device *d, tensor out, tensor residual, tensor add, const weight *w,
                            float eps, tensor logits, const weight *router, int32_t top_k,
                            route_kind kind, bool normalise) {
    const device_ops *real = of_device(d)->real;
    TRY(real->norm(d, out, residual, add, w, eps));
    TRY(real->linear(d, logits, out, router));
    return observe_route(d, logits, top_k, kind, normalise);
}

static status watch_experts(device *d, tensor x, const weight *w, bool gather) {
    observer *o = of_device(d);
    int32_t layer, kind;
    if (!which(o, w, &layer, &kind)) return ST_OK;
    const int32_t *row = gather ? o->row_token : o->in_order;
    for (int32_t e = 0; e < w->count; e++) {
        const int32_t from = o->expert_start[e], n = o->expert_start[e + 1] - from;
        TRY(o->real->observe(d, o->sums[place(o, layer, kind, e)], x, row + from, n));
    }
    return ST_OK;
}

static status observe_experts(device *d, tensor out, tensor x, const weight *w, int32_t top_k,
                              bool gather) {
    TRY(watch_experts(d, x, w, gather));
    return of_device(d)->real->moe_linear(d, out, x, w, top_k, gather);
}

static status observe_experts_gated(device *d, tensor out, tensor x, const weight *w, int32_t top_k,
                                    activation_kind kind, float limit) {
    TRY(watch_experts(d, x, w, true));
    return of_device(d)->real->moe_gated(d, out, x, w, top_k, kind, limit);
}

static status allocate(observer *o, int32_t max_tokens) {
    const model_config *c = engine_config(o->e);
    const int32_t x = experts_of(c), top_k = c->n_experts ? c->top_k : 1;
    o->max_rows = max_tokens * top_k;
    const size_t rows = (size_t)o->max_rows, n = (size_t)places(o);
    const size_t bytes = (size_t)(o->n * observer_layer_bytes(c)) + rows * (size_t)(x + 8) * 8 +
                         ((size_t)1 << 20) + n * (sizeof(moments) + 512);
    TRY(arena_open(&o->memory, bytes));
    arena *a = &o->memory;
    bool ok = true;
    ok &= (o->of = arena_array(a, moments, n)) != NULL;
    ok &= (o->sums = arena_array(a, calibrate_sums *, n)) != NULL;
    ok &= (o->logits = arena_array(a, float, rows *(size_t)x)) != NULL;
    ok &= (o->route_weight = arena_array(a, float, rows)) != NULL;
    ok &= (o->expert = arena_array(a, int32_t, rows)) != NULL;
    ok &= (o->slot_row = arena_array(a, int32_t, rows)) != NULL;
    ok &= (o->row_token = arena_array(a, int32_t, rows)) != NULL;
    ok &= (o->in_order = arena_array(a, int32_t, rows)) != NULL;
    ok &= (o->expert_start = arena_array(a, int32_t, (size_t)x + 1)) != NULL;
    if (!ok) return FAIL(ST_NOMEM, "moments of %d layers", o->n);
    for (int32_t i = 0; i < o->max_rows; i++) o->in_order[i] = i;
    for (int64_t i = 0; i < places(o); i++) {
        const int32_t kind = (int32_t)(i / x % KINDS);
        if (kind < KIND_UP && i % x) continue;
        moments *m = &o->of[i];
        const size_t size = (size_t)(m->k = inputs_of(c, kind));
        m->gram = arena_array(a, double, size *size);
        m->magnitude = arena_array(a, double, size);
        if (!m->gram || !m->magnitude) return FAIL(ST_NOMEM, "moments of %d layers", o->n);
        TRY(engine_device(o->e)->ops->calibrate->sums_open(&o->sums[i], m));
    }
    return ST_OK;
}

status observer_open(observer **out, engine *e, int32_t first, int32_t n) {
    *out = NULL;
    device *d = engine_device(e);
    if (!d->ops->observe)
        return FAIL(ST_UNSUPPORTED, "the %s device has no values to observe", d->ops->name);
    CHECK(d->options.tp == 1);
    CHECK(first >= 0 && n >= 1 && first + n <= engine_config(e)->n_layers);
    observer *o = mem_alloc(1, sizeof *o);
    if (!o) return FAIL(ST_NOMEM, "observer");
    o->e = e;
    o->first = first;
    o->n = n;
    const status st = allocate(o, engine_token_budget(e));
    o->real = d->ops;
    if (st != ST_OK) {
        observer_close(o);
        return st;
    }
    o->ops = *d->ops;
    o->ops.linear = observe_linear;
    if (o->real->linear_gated) o->ops.linear_gated = observe_gated;
    o->ops.moe_route = observe_route;
    o->ops.moe_linear = observe_experts;
    if (o->real->moe_gated) o->ops.moe_gated = observe_experts_gated;
    if (o->real->moe_enter) o->ops.moe_enter = observe_enter;
    d->ops = &o->ops;
    *out = o;
    return ST_OK;
}

status observer_end(observer *o) {
    status first = ST_OK;
    engine_device(o->e)->ops = o->real;
    for (int64_t i = 0; o->sums && i < places(o); i++) {
        const status st = o->real->calibrate->sums_end(o->sums[i]);
        o->sums[i] = NULL;
        if (first == ST_OK) first = st;
    }
    return first;
}

void observer_close(observer *o) {
    if (!o) return;
    (void)observer_end(o);
    arena_close(&o->memory);
    mem_free(o);
}
