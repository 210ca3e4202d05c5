/* forward.c - the transformer, written once: what a step does, in order, on any device.
 *
 *     embed, norm -> layers x { qkv, rope + KV append, attention, o, norm, ffn | experts, norm }
 *     -> rows to be sampled -> logits -> draw
 *
 * The residual stream is a buffer of its own. A sub-layer's output (y) is added to it by the norm
 * that follows, which reads the stream anyway: that of the next layer, or the last one. So
 * y is complete (reduced over ranks, biases of o and down included, once in all) before the next
 * norm, or that norm sums the ranks' parts itself: nobody else reads y after all_reduce. With
 * plan.moe_norm a mixture leaves no y but its experts' rows, and the next norm adds those up.
 *
 * Sizes are those of one rank throughout; the device runs the ranks. Buffers have max_tokens rows
 * and are taken once; a step uses their first rows. */
#include "forward.h"
#include <math.h>

/* Activations of one rank. X router logits, k experts of a token, F of the FFN or of one expert. */
#define BUFFERS(X)                                                                                 \
    X(residual, max_tokens, c->dim, true)               /* the stream            [T, E]        */  \
    X(x, max_tokens, c->dim, true)                      /* normalised            [T, E]        */  \
    X(y, max_tokens, c->dim, true)                      /* of a sub-layer        [T, E]        */  \
    X(qkv, max_tokens, (h + 2 * g) * c->head_dim, true) /*                       [T, (H+2G) D] */  \
    X(attn, max_tokens, h * c->head_dim, true)          /*                       [T, H D]      */  \
    X(gate_up, max_tokens *k, 2 * ffn, !fused)          /* gate | up             [T k, 2F]     */  \
    X(gated, max_tokens *k, ffn, true)                  /*                       [T k, F]      */  \
    X(router, max_tokens, c->n_experts, moe)            /*                       [T, X]        */  \
    X(expert_y, max_tokens *k, c->dim, moe)             /* before combine        [T k, E]      */  \
    X(sampled, max_samples, c->dim, true)               /* rows to be sampled    [n_samples, E] */ \
    X(logits, max_samples, c->vocab, true)              /* f32                   [n_samples, V] */

struct forward {
    device *d;
    model_config config;
    precision precision;
    model_weights w;
    int64_t weight_bytes;
    device_setup limits; /* max_tokens == 0 until forward_setup */
    forward_plan plan;
    int32_t n_heads, n_kv_heads; /* of one rank */
    int64_t n_samples;           /* of the last step */
#define X(name, ...) tensor name;
    BUFFERS(X)
#undef X
};

static tensor rows(tensor t, int64_t n) {
    CHECK(n <= t.rows);
    t.rows = n;
    return t;
}

static attention_layer layer_attention(const forward *f, int32_t layer) {
    const model_config *c = &f->config;
    const layer_weights *l = &f->w.layer[layer];
    return (attention_layer){.layer = layer,
                             .n_heads = f->n_heads,
                             .n_kv_heads = f->n_kv_heads,
                             .head_dim = c->head_dim,
                             .window = c->window[layer],
                             .scale = (float)(1 / sqrt(c->head_dim)),
                             .norm_eps = (float)c->norm_eps,
                             .q_norm = &l->q_norm,
                             .k_norm = &l->k_norm,
                             .sinks = &l->sinks};
}

/* y = attention block of x. */
static status attention_block(forward *f, int32_t layer, int64_t n) {
    const device_ops *op = f->d->ops;
    const layer_weights *l = &f->w.layer[layer];
    const attention_layer a = layer_attention(f, layer);
    const tensor x = rows(f->x, n), y = rows(f->y, n), qkv = rows(f->qkv, n);
    const tensor attn = rows(f->attn, n);
    TRY(op->linear(f->d, qkv, x, &l->qkv));
    TRY(op->rope_append(f->d, qkv, &a));
    TRY(op->attention(f->d, attn, qkv, &a));
    TRY(op->linear(f->d, y, attn, &l->o));
    return op->all_reduce(f->d, y);
}

/* y = dense feed-forward of x. */
static status ffn_block(forward *f, int32_t layer, int64_t n) {
    const device_ops *op = f->d->ops;
    const model_config *c = &f->config;
    const layer_weights *l = &f->w.layer[layer];
    const tensor x = rows(f->x, n), y = rows(f->y, n), gated = rows(f->gated, n);
    const float limit = (float)c->swiglu_limit;
    if (f->plan.linear_gated) {
        TRY(op->linear_gated(f->d, gated, x, &l->gate_up, c->activation, limit));
    } else {
        const tensor gate_up = rows(f->gate_up, n);
        TRY(op->linear(f->d, gate_up, x, &l->gate_up));
        TRY(op->gated(f->d, gated, gate_up, c->activation, limit));
    }
    TRY(op->linear(f->d, y, gated, &l->down));
    return op->all_reduce(f->d, y);
}

/* x = norm of the stream with y; the experts of its tokens. */
static status moe_enter(forward *f, int32_t layer, int64_t n) {
    const device_ops *op = f->d->ops;
    const model_config *c = &f->config;
    const layer_weights *l = &f->w.layer[layer];
    const tensor residual = rows(f->residual, n), x = rows(f->x, n), y = rows(f->y, n);
    const tensor logits = rows(f->router, n);
    const float eps = (float)c->norm_eps;
    if (f->plan.moe_norm)
        return op->moe_enter(f->d, x, residual, y, &l->ffn_norm, eps, logits, &l->router, c->top_k,
                             c->route, c->norm_topk);
    TRY(op->norm(f->d, x, residual, y, &l->ffn_norm, eps));
    TRY(op->linear(f->d, logits, x, &l->router));
    return op->moe_route(f->d, logits, c->top_k, c->route, c->norm_topk);
}

/* y, or with plan.moe_norm expert_y = mixture of experts of the stream: each token goes through
 * top_k experts. */
static status moe_block(forward *f, int32_t layer, int64_t n) {
    const device_ops *op = f->d->ops;
    const model_config *c = &f->config;
    const layer_weights *l = &f->w.layer[layer];
    const int64_t nk = n * c->top_k;
    const tensor x = rows(f->x, n), y = rows(f->y, n);
    const tensor gated = rows(f->gated, nk), expert_y = rows(f->expert_y, nk);
    const float limit = (float)c->swiglu_limit;
    TRY(moe_enter(f, layer, n));
    if (f->plan.moe_gated) {
        TRY(op->moe_gated(f->d, gated, x, &l->experts_gate_up, c->top_k, c->activation, limit));
    } else {
        const tensor gate_up = rows(f->gate_up, nk);
        TRY(op->moe_linear(f->d, gate_up, x, &l->experts_gate_up, c->top_k, true));
        TRY(op->gated(f->d, gated, gate_up, c->activation, limit));
    }
    TRY(op->moe_linear(f->d, expert_y, gated, &l->experts_down, c->top_k, false));
    if (f->plan.moe_norm) return ST_OK;
    TRY(op->moe_combine(f->d, y, expert_y, c->top_k));
    return op->all_reduce(f->d, y);
}

/* x = norm of the stream with what the layer before has left. */
static status norm_behind(forward *f, const weight *w, int64_t n) {
    const device_ops *op = f->d->ops;
    const model_config *c = &f->config;
    const tensor residual = rows(f->residual, n), x = rows(f->x, n), y = rows(f->y, n);
    const float eps = (float)c->norm_eps;
    if (c->n_experts && f->plan.moe_norm)
        return op->moe_leave(f->d, x, residual, rows(f->expert_y, n * c->top_k), w, eps, c->top_k);
    return op->norm(f->d, x, residual, y, w, eps);
}

status forward_launch(forward *f, const batch *b) {
    const device_ops *op = f->d->ops;
    const model_config *c = &f->config;
    const float eps = (float)c->norm_eps;
    CHECK(b->n_tokens >= 1);
    CHECK(b->n_tokens <= f->limits.max_tokens);
    CHECK(b->n_seqs <= f->limits.max_seqs);
    CHECK(b->n_samples <= f->limits.max_samples);
    const int64_t n = b->n_tokens;
    const tensor residual = rows(f->residual, n), x = rows(f->x, n), y = rows(f->y, n);

    TRY(op->begin(f->d, b));
    TRY(op->embed(f->d, x, residual, &f->w.embed, &f->w.layer[0].attn_norm, eps));
    for (int32_t i = 0; i < c->n_layers; i++) {
        if (i > 0) TRY(norm_behind(f, &f->w.layer[i].attn_norm, n));
        TRY(attention_block(f, i, n));
        if (!c->n_experts) TRY(op->norm(f->d, x, residual, y, &f->w.layer[i].ffn_norm, eps));
        TRY(c->n_experts ? moe_block(f, i, n) : ffn_block(f, i, n));
    }
    TRY(norm_behind(f, &f->w.norm, n));

    f->n_samples = b->n_samples;
    if (b->n_samples > 0) { /* none: a chunk of a prompt that goes on in the next step */
        const tensor logits = rows(f->logits, b->n_samples);
        const bool all = b->n_samples == n; /* they ascend, so each is its own */
        const tensor sampled_x = all ? x : rows(f->sampled, b->n_samples);
        if (!all) TRY(op->gather(f->d, sampled_x, x));
        TRY(op->logits(f->d, logits, sampled_x, &f->w.head));
        TRY(op->sample(f->d, logits));
    }
    return op->launch ? op->launch(f->d) : ST_OK;
}

status forward_collect(forward *f, sampled *out, int64_t *cost_ns) {
    return f->d->ops->end(f->d, out, cost_ns);
}

status forward_step(forward *f, const batch *b, sampled *out, int64_t *cost_ns) {
    TRY(forward_launch(f, b));
    return forward_collect(f, out, cost_ns);
}

status forward_logits(forward *f, float *out) {
    if (f->n_samples == 0) return ST_OK;
    return f->d->ops->read(f->d, rows(f->logits, f->n_samples), out);
}

/* --- Loading ---------------------------------------------------------------------------------- */

forward_plan forward_plan_default(const device *d) {
    return (forward_plan){.linear_gated = d->ops->linear_gated != NULL,
                          .moe_gated = d->ops->moe_gated != NULL,
                          .moe_norm = d->ops->moe_enter != NULL};
}

static weight *field_weight(model_weights *w, weight_field field, int32_t layer) {
    switch (field) {
    case WEIGHT_embed: return &w->embed;
    case WEIGHT_norm: return &w->norm;
    case WEIGHT_head: return &w->head;
#define X(name, ...)                                                                               \
    case WEIGHT_##name:                                                                            \
        return &w->layer[layer].name;
#include "layer.def"
#undef X
    case WEIGHT_COUNT: break;
    }
    CHECK(false);
    return NULL;
}

typedef struct {
    forward *f;
    checkpoint *k;
    void (*progress)(void *user, int64_t done, int64_t total);
    void *user;
    int64_t total;
} loader;

static status load_field(loader *l, weight_field field, int32_t layer) {
    forward *f = l->f;
    weight *w = field_weight(&f->w, field, layer);
    weight_source source;
    TRY(checkpoint_source(l->k, field, layer, &source));
    const status st = f->d->ops->weight_load(f->d, &source, &f->precision, w);
    if (st != ST_OK) return fail_prefix(st, "%s", source.name);
    CHECK(w->n > 0);
    f->weight_bytes += w->bytes;
    if (l->progress) l->progress(l->user, f->weight_bytes, l->total);
    return ST_OK;
}

status forward_load(forward **out, arena *a, device *d, checkpoint *k, const model_config *c,
                    const precision *p, void (*progress)(void *user, int64_t done, int64_t total),
                    void *user) {
    const int32_t tp = d->options.tp;
    TRY(model_fits_precision(c, p, tp));
    forward *f = arena_array(a, forward, 1);
    layer_weights *layer = arena_array(a, layer_weights, (size_t)c->n_layers);
    if (!f || !layer) return FAIL(ST_NOMEM, "weight handles of %d layers", c->n_layers);
    f->d = d;
    f->config = *c;
    f->precision = *p;
    f->w.layer = layer;
    f->n_heads = c->n_heads / tp;
    f->n_kv_heads = model_kv_heads(c, tp);

    loader l = {.f = f, .k = k, .progress = progress, .user = user};
    l.total = checkpoint_weight_bytes(k, p, tp);
    TRY(load_field(&l, WEIGHT_embed, 0));
    for (int32_t i = 0; i < c->n_layers; i++)
        for (int field = 0; field < WEIGHT_COUNT; field++)
            if (weight_field_present(c, (weight_field)field))
                TRY(load_field(&l, (weight_field)field, i));
    TRY(load_field(&l, WEIGHT_norm, 0));
    if (c->tied)
        f->w.head = f->w.embed;
    else
        TRY(load_field(&l, WEIGHT_head, 0));
    *out = f;
    return ST_OK;
}

status forward_setup(forward *f, const device_setup *s, const forward_plan *plan) {
    const model_config *c = &f->config;
    CHECK(f->limits.max_tokens == 0);
    CHECK(s->max_tokens >= 1);
    CHECK(s->max_seqs >= 1);
    CHECK(s->max_samples >= 1);
    CHECK(s->n_pages >= 1);
    CHECK(!plan->linear_gated || f->d->ops->linear_gated != NULL);
    CHECK(!plan->moe_gated || f->d->ops->moe_gated != NULL);
    CHECK(!plan->moe_norm || (f->d->ops->moe_enter != NULL && f->d->ops->moe_leave != NULL));
    f->limits = *s;
    f->limits.config = c;
    f->limits.precision = &f->precision;
    f->plan = *plan;
    TRY(f->d->ops->setup(f->d, &f->limits));

    const bool moe = c->n_experts > 0, fused = moe ? plan->moe_gated : plan->linear_gated;
    const int32_t h = f->n_heads, g = f->n_kv_heads;
    const int32_t ffn = moe ? f->w.layer[0].experts_down.k : f->w.layer[0].down.k;
    const int64_t max_tokens = s->max_tokens, max_samples = s->max_samples;
    const int64_t k = moe ? c->top_k : 1;
#define X(name, n_rows, n_cols, wanted)                                                            \
    if (wanted) TRY(f->d->ops->buffer(f->d, n_rows, n_cols, &f->name));
    BUFFERS(X)
#undef X
    return ST_OK;
}

const model_weights *forward_weights(const forward *f) { return &f->w; }
int64_t forward_weight_bytes(const forward *f) { return f->weight_bytes; }

/* --- Inspection ------------------------------------------------------------------------------- */

typedef struct {
    forward *f;
    text *out;
} listing;

/* One line: where, operation, rows, N, K, how the device would run it. */
static void list_op(listing *l, const char *where, const char *what, int64_t n_rows,
                    const weight *w) {
    char how[256] = "";
    const device_ops *op = l->f->d->ops;
    if (op->explain) op->explain(l->f->d, what, w, n_rows, how, sizeof how);
    text_add(l->out, "%s\t%s\t%lld", where, what, (long long)n_rows);
    if (w)
        text_add(l->out, "\t%d\t%d", w->n, w->k);
    else
        text_add(l->out, "\t-\t-");
    text_add(l->out, "\t%s\n", how[0] ? how : "-");
}

/* What ends the layer before, if it is a mixture, with the norm behind it. */
static const char *norm_behind_name(const forward *f) {
    return f->config.n_experts && f->plan.moe_norm ? "moe_leave" : "norm";
}

/* The same order as forward_step. Layers of one window stand together, wherever they lie; the first
 * norm of the first one has no layer before it, and is one. */
static void list_layer(listing *l, const char *where, const layer_weights *w, int64_t n) {
    const forward *f = l->f;
    const bool fused = f->config.n_experts && f->plan.moe_norm;
    list_op(l, where, norm_behind_name(f), n, &w->attn_norm);
    list_op(l, where, "linear", n, &w->qkv);
    list_op(l, where, "rope_append", n, NULL);
    list_op(l, where, "attention", n, NULL);
    list_op(l, where, "linear", n, &w->o);
    list_op(l, where, "all_reduce", n, NULL);
    if (!fused) list_op(l, where, "norm", n, &w->ffn_norm);
    if (f->config.n_experts) {
        const int64_t nk = n * f->config.top_k;
        list_op(l, where, fused ? "moe_enter" : "linear", n, &w->router);
        if (!fused) list_op(l, where, "moe_route", n, NULL);
        if (f->plan.moe_gated) {
            list_op(l, where, "moe_gated", nk, &w->experts_gate_up);
        } else {
            list_op(l, where, "moe_linear", nk, &w->experts_gate_up);
            list_op(l, where, "gated", nk, NULL);
        }
        list_op(l, where, "moe_linear", nk, &w->experts_down);
        if (!fused) list_op(l, where, "moe_combine", n, NULL);
    } else {
        if (f->plan.linear_gated) {
            list_op(l, where, "linear_gated", n, &w->gate_up);
        } else {
            list_op(l, where, "linear", n, &w->gate_up);
            list_op(l, where, "gated", n, NULL);
        }
        list_op(l, where, "linear", n, &w->down);
    }
    list_op(l, where, "all_reduce", n, NULL);
}

void forward_explain(forward *f, int32_t n_tokens, int32_t n_samples, text *out) {
    listing l = {.f = f, .out = out};
    const int32_t n_layers = f->config.n_layers;
    text_add(out, "where\toperation\trows\tn\tk\thow\n");
    list_op(&l, "-", "embed", n_tokens, &f->w.embed);
    for (int32_t i = 0; i < n_layers; i++) { /* once for each window there is */
        const int32_t window = f->config.window[i];
        int32_t first = 0, count = 0;
        while (f->config.window[first] != window) first++;
        if (first < i) continue;
        for (int32_t j = i; j < n_layers; j++) count += f->config.window[j] == window;
        char where[64];
        if (window)
            snprintf(where, sizeof where, "%d layers, window %d", count, window);
        else
            snprintf(where, sizeof where, "%d layers", count);
        list_layer(&l, where, &f->w.layer[i], n_tokens);
    }
    list_op(&l, "-", norm_behind_name(f), n_tokens, &f->w.norm);
    if (n_samples > 0) {
        if (n_samples < n_tokens) list_op(&l, "-", "gather", n_samples, NULL);
        list_op(&l, "-", "logits", n_samples, &f->w.head);
        list_op(&l, "-", "sample", n_samples, NULL);
    }
}
