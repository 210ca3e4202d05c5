/* cmd_bench_step.c - `amalgam bench step`: single steps of one model against the roofline.
 *
 *   decode    each number of --batch: so many sequences of --ctx tokens, one token each
 *   chunk     with --new N: the same with N tokens each
 *   prefill   with --prefill N besides: one sequence of N tokens, all in one step
 *
 * A step is what serving runs, with its copies, its launches (a graph for decodes), and the tokens
 * of each read while the next one runs. On cuda times are the median of the wall clock over many
 * steps on the same batch, whose pages are spread over the pool and hold noise apart from the
 * step's own tokens. On sim they are predicted.
 *
 * roofline = max(bytes / read ceiling, operations / matrix rate), bytes being every weight that the
 * step uses once and the KV of the context once. Of experts those count that the step's tokens go
 * to: on cuda a step before the timed ones sees which (random weights send tokens to fewer than
 * chance would); on sim as many as independent choices hit on average.
 * Both ceilings are the device's own: measured in the same process on cuda, from the data sheet on
 * sim. With 8-bit activations operations of linears count half, such units being twice as fast.
 * serial_us is the same of each operation by itself, added up: one that waits for the last bytes of
 * the one before cannot hide its arithmetic under them. */
#include "cli.h"
#include "engine.h"
#include "made_batch.h"
#include "nvml.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

enum {
    STEPS_MAX = 200,
    STEPS_LEAST = 3,
    WARM_NS = 300 * 1000 * 1000, /* steps before the timed ones, once kernels are loaded */
    LONG_NS = 400 * 1000 * 1000, /* timed steps in all, once there are STEPS_LEAST */
    SHAPES_MAX = 16,
    EXPERTS_MAX = 512
};

typedef struct {
    const char *model, *precision, *device, *gpu, *family, *batches;
    int64_t ctx, n_new, prefill, steps, tp;
    bool json, no_graphs;
    double read_gbs, matrix_tflops; /* 0: ask the device */
} arguments;

typedef struct {
    int32_t n_seqs, ctx, n_new;
} step_shape;

/* --- The step ------------------------------------------------------------------------------- */

static int ascending(const void *a, const void *b) {
    const double x = *(const double *)a, y = *(const double *)b;
    return x < y ? -1 : x > y;
}

/* Microseconds of a step: median, and the two quartiles. */
static status time_steps(engine *e, const batch *b, sampled *drawn, int32_t steps, double us[3]) {
    static double t[STEPS_MAX];
    forward *f = engine_forward(e);
    const bool real = !engine_device(e)->ops->virtual_time;
    timeline clock;
    int64_t cost, first = 0, now = 0, last = 0;
    timeline_start_real(&clock);
    /* The first step loads kernels; graphs and the clock of a GPU that was idle come with time. */
    for (int32_t i = 0; i == 0 || (real && now - first < WARM_NS); i++) {
        TRY(forward_step(f, b, drawn, &cost));
        const int64_t after = timeline_now_ns(&clock);
        last = after - now;
        now = after;
        if (i == 0) first = now;
    }
    if (!real) {
        us[0] = us[1] = us[2] = (double)cost * 1e-3;
        return ST_OK;
    }
    /* Serving launches a step before it reads the tokens of the one before; long steps hide what
     * that saves. */
    const bool ahead = engine_device(e)->ops->launch && last < LONG_NS;
    if (ahead) TRY(forward_launch(f, b));
    if (ahead) TRY(forward_launch(f, b));
    if (ahead) TRY(forward_collect(f, drawn, &cost));
    const int64_t started = timeline_now_ns(&clock);
    int32_t n = 0;
    for (now = started; n < steps && (n < STEPS_LEAST || now < started + LONG_NS); n++) {
        TRY(ahead ? forward_launch(f, b) : forward_step(f, b, drawn, &cost));
        if (ahead) TRY(forward_collect(f, drawn, &cost));
        const int64_t after = timeline_now_ns(&clock);
        t[n] = (double)(after - now) * 1e-3;
        now = after;
    }
    if (ahead) TRY(forward_collect(f, drawn, &cost));
    qsort(t, (size_t)n, sizeof *t, ascending);
    us[0] = t[n / 2];
    us[1] = t[n / 4];
    us[2] = t[n * 3 / 4];
    return ST_OK;
}

/* Distinct experts that one step's tokens go to, over all layers. */
static struct {
    const device_ops *own;
    float *logits; /* [max_tokens, X] */
    int64_t distinct, n_layers;
    bool unclear; /* a NaN: the context of a device that has no noise for it */
} routed;

static status see_route(device *d, tensor logits, int32_t top_k) {
    bool hit[EXPERTS_MAX] = {false};
    CHECK(logits.cols <= EXPERTS_MAX);
    TRY(routed.own->read(d, logits, routed.logits));
    for (int64_t t = 0; t < logits.rows; t++) {
        float *x = routed.logits + t * logits.cols;
        for (int32_t k = 0; k < top_k; k++) {
            int32_t best = 0;
            for (int32_t e = 0; e < logits.cols; e++) {
                if (x[e] > x[best]) best = e;
                routed.unclear |= isnan(x[e]);
            }
            hit[best] = true;
            x[best] = -INFINITY;
        }
    }
    for (int32_t e = 0; e < logits.cols; e++) routed.distinct += hit[e];
    routed.n_layers++;
    return ST_OK;
}

static status route_seen(device *d, tensor logits, int32_t top_k, route_kind kind, bool normalise) {
    TRY(routed.own->moe_route(d, logits, top_k, kind, normalise));
    return see_route(d, logits, top_k);
}

static status enter_seen(device *d, tensor out, tensor residual, tensor add, const weight *w,
                         float eps, tensor logits, const weight *router, int32_t top_k,
                         route_kind kind, bool normalise) {
    TRY(routed.own->moe_enter(d, out, residual, add, w, eps, logits, router, top_k, kind,
                              normalise));
    return see_route(d, logits, top_k);
}

/* Share of the experts that a step reads, in the mean over layers. */
static status expert_share(engine *e, made_batch *s, double *share) {
    const model_config *c = engine_config(e);
    device *d = engine_device(e);
    *share = 1;
    if (c->n_experts == 0) return ST_OK;
    *share = 1 - pow(1 - (double)c->top_k / c->n_experts, (double)s->b.n_tokens);
    if (d->ops->virtual_time) return ST_OK;
    device_ops watched = *d->ops;
    routed.own = d->ops;
    routed.distinct = routed.n_layers = 0;
    routed.unclear = false;
    routed.logits = mem_alloc((size_t)s->b.n_tokens * (size_t)c->n_experts, sizeof(float));
    if (!routed.logits) return FAIL(ST_NOMEM, "router logits of %d tokens", s->b.n_tokens);
    watched.moe_route = route_seen;
    if (watched.moe_enter) watched.moe_enter = enter_seen;
    d->ops = &watched;
    const sampling *draw = s->sample[0].params;
    for (int32_t i = 0; i < s->b.n_samples; i++) s->sample[i].params = NULL; /* hence no graph */
    int64_t cost;
    const status st = forward_step(engine_forward(e), &s->b, s->drawn, &cost);
    for (int32_t i = 0; i < s->b.n_samples; i++) s->sample[i].params = draw;
    d->ops = routed.own;
    mem_free(routed.logits);
    if (st == ST_OK && !routed.unclear)
        *share = (double)routed.distinct / (double)(routed.n_layers * c->n_experts);
    return st;
}

/* What a step must do: bytes read, operations, and us of its operations one after another, each at
 * the longer of its bytes' and its arithmetic's time. */
typedef struct {
    double read_gbs, matrix_tflops;
    double bytes, flops, serial_us;
} step_work;

static double roofline_us(const step_work *w, double bytes, double flops) {
    return fmax(bytes / w->read_gbs * 1e-3, flops / w->matrix_tflops * 1e-6);
}

static void add_operation(step_work *w, double bytes, double flops) {
    w->bytes += bytes;
    w->flops += flops;
    w->serial_us += roofline_us(w, bytes, flops);
}

/* Products of n tokens on one rank; units for 8-bit activations are twice as fast. */
static void add_weights(step_work *w, const engine *e, int64_t n, int64_t n_seqs, double share) {
    const model_config *c = engine_config(e);
    const model_weights *all = forward_weights(engine_forward((engine *)e));
    const double each = engine_precision(e)->act != AF_16 ? 1 : 2;
    add_operation(w, (double)all->norm.bytes + (double)n * c->dim * 2, 0);
    add_operation(w, (double)all->head.bytes,
                  each * (double)n_seqs * (double)all->head.n * all->head.k);
    for (int32_t l = 0; l < c->n_layers; l++) {
        const layer_weights *layer = &all->layer[l];
#define X(field, ...)                                                                              \
    {                                                                                              \
        const weight *x = &layer->field;                                                           \
        const bool experts = x->count > 1;                                                         \
        const double rows = x->n > 1 ? (double)n * (experts ? c->top_k : 1) : 0;                   \
        add_operation(w, (experts ? share : 1) * (double)x->bytes,                                 \
                      each * rows * (double)x->n * x->k);                                          \
    }
#include "layer.def"
#undef X
    }
}

/* KV that is read, and operations of the scores and sums, by one of tp ranks. */
static void add_attention(step_work *w, const model_config *c, const precision *p,
                          const step_shape *s, int64_t tp) {
    const int32_t n_seqs = s->n_seqs, ctx = s->ctx, n_new = s->n_new;
    for (int32_t l = 0; l < c->n_layers; l++) {
        const kv_pair f = precision_kv(p, l);
        const int64_t row = kv_format_bytes((kv_format)f.k, c->head_dim) +
                            kv_format_bytes((kv_format)f.v, c->head_dim);
        const double window = c->window[l] ? fmin(c->window[l] + n_new - 1, ctx) : ctx;
        const double seen =
            c->window[l] ? fmin(c->window[l], ctx - (n_new - 1) / 2.0) : ctx - (n_new - 1) / 2.0;
        add_operation(w, (double)n_seqs * window * c->n_kv_heads * (double)row / (double)tp,
                      4.0 * n_seqs * n_new * seen * c->n_heads * c->head_dim / (double)tp);
    }
}

/* --- Steps ---------------------------------------------------------------------------------- */

static int32_t pages_of(const step_shape *s) {
    return (int32_t)(s->n_seqs * div_up(s->ctx, KV_PAGE_TOKENS));
}

static void print_step(const arguments *a, const engine *e, const step_shape *s, const double us[3],
                       double share, const step_work *w) {
    char name[PRECISION_NAME_MAX];
    char clocks[112] = ""; /* right after the last step */
    nvml_state gpu;
    if (nvml_read(&gpu) == ST_OK)
        snprintf(clocks, sizeof clocks,
                 a->json ? ",\"sm_clock_mhz\":%d,\"power_w\":%.0f,\"throttle_bits\":%lld"
                         : "; SM clock %d MHz, %.0f W, throttle bits %lld",
                 gpu.sm_clock_mhz, gpu.power_mw * 1e-3, (long long)gpu.throttle_bits);
    const double roof = roofline_us(w, w->bytes, w->flops);
    const char *model = engine_config(e)->name;
    precision_name(engine_precision(e), name);
    if (a->json)
        printf("{\"kind\":\"step\",\"model\":\"%s\",\"precision\":\"%s\",\"batch\":%d,\"ctx\":%d,"
               "\"new\":%d,\"us\":%.1f,\"us_p25\":%.1f,\"us_p75\":%.1f,\"roofline_us\":%.1f,"
               "\"ratio\":%.3f,\"serial_us\":%.1f,\"bytes\":%.0f,\"flops\":%.0f,"
               "\"experts_share\":%.3f,"
               "\"read_gb_per_s\":%.0f,\"matrix_tflops\":%.0f%s}\n",
               model, name, s->n_seqs, s->ctx, s->n_new, us[0], us[1], us[2], roof, us[0] / roof,
               w->serial_us, w->bytes, w->flops, share, a->read_gbs, a->matrix_tflops, clocks);
    else
        printf(
            "%-18s %-14s batch %4d ctx %6d new %5d  %9.1f us (%.1f .. %.1f)  roofline %9.1f us  "
            "ratio %.3f  (of operations in turn %.3f; %.3g bytes, %.3g operations, experts %.2f, "
            "%.0f GB/s, %.0f TFLOP/s%s)\n",
            model, name, s->n_seqs, s->ctx, s->n_new, us[0], us[1], us[2], roof, us[0] / roof,
            us[0] / w->serial_us, w->bytes, w->flops, share, a->read_gbs, a->matrix_tflops, clocks);
    fflush(stdout);
}

static status one_step(const arguments *a, engine *e, const step_shape *s) {
    const model_config *c = engine_config(e);
    made_batch b = {0};
    double us[3], share;
    status st =
        made_batch_open(&b, s->n_seqs, s->ctx, s->n_new, engine_capacity(e)->n_pages, c->vocab);
    if (st == ST_OK) st = expert_share(e, &b, &share);
    if (st == ST_OK) st = time_steps(e, &b.b, b.drawn, (int32_t)a->steps, us);
    if (st == ST_OK) {
        step_work w = {.read_gbs = a->read_gbs, .matrix_tflops = a->matrix_tflops};
        add_weights(&w, e, s->n_seqs * s->n_new, s->n_seqs, share);
        add_attention(&w, c, engine_precision(e), s, a->tp);
        print_step(a, e, s, us, share, &w);
    }
    made_batch_close(&b);
    return st;
}

/* The device's own where none are given. */
static status find_ceilings(arguments *a, device *d) {
    double read = 0, matrix = 0;
    if (a->read_gbs > 0 && a->matrix_tflops > 0) return ST_OK;
    if (!d->ops->ceilings)
        return FAIL(ST_UNSUPPORTED,
                    "device %s does not know its ceilings: give --read-gbs and "
                    "--matrix-tflops",
                    d->ops->name);
    TRY(d->ops->ceilings(d, &read, &matrix));
    if (!(a->read_gbs > 0)) a->read_gbs = read * 1e-9;
    if (!(a->matrix_tflops > 0)) a->matrix_tflops = matrix * 1e-12;
    return ST_OK;
}

/* One engine for all shapes. With one shape it gets the pages of that, or does not fit; with more,
 * all there is room for, and a shape that needs more is left out and said to be. */
static status bench(arguments *a, const step_shape *shape, int32_t n) {
    engine_options o = ENGINE_OPTIONS_DEFAULT;
    engine *e;
    o.model = a->model;
    o.precision = a->precision;
    o.device = a->device;
    o.synthetic = true;
    o.device_options.gpu = a->gpu;
    o.device_options.tp = (int32_t)a->tp;
    o.device_options.no_graphs = a->no_graphs;
    o.device_options.kv_noise = true;
    TRY(device_family(&o.device_options.kernel_family, a->family));
    o.policy.max_seqs = o.policy.token_budget = 1;
    for (int32_t i = 0; i < n; i++) {
        const step_shape *s = &shape[i];
        if (s->ctx > o.ctx_max) o.ctx_max = s->ctx;
        if (s->n_seqs > o.policy.max_seqs) o.policy.max_seqs = s->n_seqs;
        if (s->n_seqs * s->n_new > o.policy.token_budget)
            o.policy.token_budget = s->n_seqs * s->n_new;
    }
    o.memory_fraction = 0.95; /* nothing else is to fit but what the ceilings need */
    if (n == 1) o.pages = pages_of(shape);
    TRY(engine_open(&e, &o, NULL, NULL));
    const model_config *c = engine_config(e);
    status st = find_ceilings(a, engine_device(e));
    for (int32_t i = 0; i < n && st == ST_OK; i++) {
        if (shape[i].ctx > c->ctx_max)
            st = FAIL(ST_RANGE, "%s takes %d tokens", c->name, c->ctx_max);
        else if (pages_of(&shape[i]) > engine_capacity(e)->n_pages)
            fprintf(stderr, "amalgam: batch %d of %d tokens: KV does not fit\n", shape[i].n_seqs,
                    shape[i].ctx);
        else
            st = one_step(a, e, &shape[i]);
    }
    engine_close(e);
    return st;
}

/* Shapes of "1,16,64" and of the prefill; -1 when something is out of range. */
static int32_t read_shapes(const arguments *a, step_shape *shape) {
    int32_t n = 0;
    if (a->ctx < a->n_new || a->n_new < 1 || a->ctx > 1 << 24) return -1;
    for (const char *at = a->batches; *at && n < SHAPES_MAX - 1;) {
        char *end;
        const long n_seqs = strtol(at, &end, 10);
        if (end == at || n_seqs < 1 || n_seqs > 4096 || n_seqs * a->n_new > 1 << 20) return -1;
        shape[n++] = (step_shape){(int32_t)n_seqs, (int32_t)a->ctx, (int32_t)a->n_new};
        if (*end && *end != ',') return -1;
        at = *end ? end + 1 : end;
    }
    if (a->prefill < 0 || a->prefill > 1 << 20) return -1;
    if (a->prefill) shape[n++] = (step_shape){1, (int32_t)a->prefill, (int32_t)a->prefill};
    return n;
}

int cmd_bench_step(int argc, char **argv) {
    arguments a = {.precision = "W16A16KV16",
                   .device = "cuda",
                   .batches = "1",
                   .ctx = 4096,
                   .n_new = 1,
                   .steps = 30,
                   .tp = 1};
    const cli_option options[] = {
        {"--model", CLI_TEXT, &a.model, "NAME", "folder, or one of `amalgam models`"},
        {"--precision", CLI_TEXT, &a.precision, "NAME", "W16A16KV16"},
        {"--device", CLI_TEXT, &a.device, "NAME", "cuda (the default) or sim"},
        {"--gpu", CLI_TEXT, &a.gpu, "NAME", "sim: one of workloads/gpus"},
        {"--tp", CLI_INT, &a.tp, "N", "ranks (1)"},
        {"--batch", CLI_TEXT, &a.batches, "N,...", "sequences of a step (1)"},
        {"--ctx", CLI_INT, &a.ctx, "N", "tokens of each after the step (4096)"},
        {"--new", CLI_INT, &a.n_new, "N", "tokens that the step feeds to each (1: decode)"},
        {"--prefill", CLI_INT, &a.prefill, "N", "then a step of one sequence of N tokens (none)"},
        {"--steps", CLI_INT, &a.steps, "N", "timed steps at most (30)"},
        {"--kernel-family", CLI_TEXT, &a.family, "F", "ampere or hopper"},
        {"--no-graphs", CLI_FLAG, &a.no_graphs, NULL, "launch decode steps kernel by kernel"},
        {"--read-gbs", CLI_NUMBER, &a.read_gbs, "X", "read ceiling, GB/s (the device's)"},
        {"--matrix-tflops", CLI_NUMBER, &a.matrix_tflops, "X", "16-bit matrix rate (the device's)"},
        {"--json", CLI_FLAG, &a.json, NULL, "one object a line"},
        {NULL, CLI_FLAG, NULL, NULL, NULL},
    };
    int32_t none = 0, n = 0;
    step_shape shape[SHAPES_MAX];
    status st =
        cli_parse(argc - 1, argv + 1, "bench step --model NAME [options]", options, NULL, &none);
    if (st == ST_OK && !a.model) st = FAIL(ST_USAGE, "bench step needs --model");
    if (st == ST_OK) n = read_shapes(&a, shape);
    if (st == ST_OK && (n < 1 || a.steps < 1 || a.steps > STEPS_MAX || a.tp < 1 || a.tp > 64))
        st = FAIL(ST_USAGE, "--batch, --ctx, --new, --prefill, --steps or --tp is out of range");
    if (st == ST_OK) st = bench(&a, shape, n);
    return cli_exit(st);
}
