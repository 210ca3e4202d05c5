/* device_null.c - the device that does nothing: what a run on it takes is our own overhead.
 *
 * Sizes of weights are right, memory is unlimited, tensors hold no data, time is real. Drawn tokens
 * are placeholders: a hash of (seed, draw), as on sim, so that both give the same tokens. */
#include "device.h"

#include "rng.h"

typedef struct {
    device base;
    int32_t vocab;
    const batch *b; /* of the step under way */
} null_device;

static status null_open(device **out, const device_options *o) {
    null_device *d = mem_alloc(1, sizeof *d);
    *out = NULL;
    if (!d) return FAIL(ST_NOMEM, "null device");
    d->base = (device){.ops = &device_null, .options = *o};
    *out = &d->base;
    return ST_OK;
}

static void null_close(device *d) { mem_free(d); }

static status null_memory(device *d, int64_t *usable) {
    (void)d;
    *usable = 0;
    return ST_OK;
}

static status null_weight_load(device *d, const weight_source *s, const precision *p, weight *out) {
    *out = weight_source_handle(s, p, d->options.tp);
    return ST_OK;
}

static status null_setup(device *d, const device_setup *s) {
    ((null_device *)d)->vocab = s->config->vocab;
    return ST_OK;
}

static status null_buffer(device *d, int64_t rows, int32_t cols, tensor *out) {
    (void)d;
    *out = (tensor){.rows = rows, .cols = cols};
    return ST_OK;
}

static status null_begin(device *d, const batch *b) {
    ((null_device *)d)->b = b;
    return ST_OK;
}

static status null_embed(device *d, tensor out, tensor residual, const weight *table,
                         const weight *w, float eps) {
    (void)d, (void)out, (void)residual, (void)table, (void)w, (void)eps;
    return ST_OK;
}

static status null_norm(device *d, tensor out, tensor residual, tensor add, const weight *w,
                        float eps) {
    (void)d, (void)out, (void)residual, (void)add, (void)w, (void)eps;
    return ST_OK;
}

static status null_linear(device *d, tensor out, tensor x, const weight *w) {
    (void)d, (void)out, (void)x, (void)w;
    return ST_OK;
}

static status null_rope_append(device *d, tensor qkv, const attention_layer *a) {
    (void)d, (void)qkv, (void)a;
    return ST_OK;
}

static status null_attention(device *d, tensor out, tensor qkv, const attention_layer *a) {
    (void)d, (void)out, (void)qkv, (void)a;
    return ST_OK;
}

static status null_gated(device *d, tensor out, tensor gate_up, activation_kind kind, float limit) {
    (void)d, (void)out, (void)gate_up, (void)kind, (void)limit;
    return ST_OK;
}

static status null_moe_route(device *d, tensor logits, int32_t top_k, route_kind kind,
                             bool normalise) {
    (void)d, (void)logits, (void)top_k, (void)kind, (void)normalise;
    return ST_OK;
}

static status null_moe_linear(device *d, tensor out, tensor x, const weight *w, int32_t top_k,
                              bool gather) {
    (void)d, (void)out, (void)x, (void)w, (void)top_k, (void)gather;
    return ST_OK;
}

static status null_moe_combine(device *d, tensor out, tensor y, int32_t top_k) {
    (void)d, (void)out, (void)y, (void)top_k;
    return ST_OK;
}

static status null_one(device *d, tensor t) {
    (void)d, (void)t;
    return ST_OK;
}

static status null_gather(device *d, tensor out, tensor x) {
    (void)d, (void)out, (void)x;
    return ST_OK;
}

static status null_end(device *d, sampled *out, int64_t *cost_ns) {
    const null_device *n = (const null_device *)d;
    device_placeholders(n->b, n->vocab, out);
    *cost_ns = 0;
    return ST_OK;
}

static status null_read(device *d, tensor t, float *out) {
    (void)d, (void)t, (void)out;
    return FAIL(ST_UNSUPPORTED, "the null device stores no values");
}

static void null_explain(device *d, const char *what, const weight *w, int64_t rows, char *buf,
                         size_t n) {
    (void)d, (void)what, (void)w, (void)rows;
    snprintf(buf, n, "nothing");
}

const device_ops device_null = {
    .name = "null",
    .open = null_open,
    .close = null_close,
    .memory = null_memory,
    .weight_load = null_weight_load,
    .setup = null_setup,
    .buffer = null_buffer,
    .begin = null_begin,
    .embed = null_embed,
    .norm = null_norm,
    .linear = null_linear,
    .rope_append = null_rope_append,
    .attention = null_attention,
    .gated = null_gated,
    .moe_route = null_moe_route,
    .moe_linear = null_moe_linear,
    .moe_combine = null_moe_combine,
    .all_reduce = null_one,
    .gather = null_gather,
    .logits = null_linear,
    .sample = null_one,
    .end = null_end,
    .read = null_read,
    .explain = null_explain,
};

void device_placeholders(const batch *b, int32_t vocab, sampled *out) {
    for (int32_t i = 0; i < b->n_samples; i++) {
        const sample_row *s = &b->sample[i];
        out[i].token = -1;
        out[i].logprob = 0;
        out[i].n_top = 0;
        if (!s->params) continue;
        const uint64_t h = hash_u64(s->draw, s->params->seed ^ (uint64_t)b->id[s->seq]);
        out[i].token =
            (int32_t)(((h >> 32) * (uint64_t)vocab) >> 32); /* cheaper than a remainder */
    }
}
