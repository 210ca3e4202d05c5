/* device_sim.c - a GPU nobody has: each operation adds its predicted cost to a virtual clock.
 *
 * Every number comes from the data sheet (gpu.h) and the constants below. They are data-sheet
 * defaults, uncalibrated, unless the sheet's `calibrated` names a measurement: expect single
 * operations within some tens of per cent, small ones worse, ratios between formats better than
 * absolute times.
 *
 * One kernel takes
 *
 *     fixed + max(memory, compute, conversion) + OVERLAP_LOSS * (the other two)
 *
 * memory      bytes moved / (DRAM rate * dram_efficiency). Weights, scales, KV and its parameters
 *             are the exact bytes of precision.h; activations have two. No credit for the L2.
 * compute     matrix operations / (rate of the operand type * matrix_efficiency), rows padded to
 *             tiles. A16 runs at the f16 rate, A8 at int8, AFP8 at fp8.
 * conversion  weights or KV that the matrix units cannot read are widened on the integer pipe, once
 *             for each tile of rows; exponentials of the softmax are here as well.
 * fixed       launch_s for each kernel (a graph node), link latency of a collective; step_s once a
 *             step: host time that no work of the GPU hides. Steps are predicted one after the
 *             other, also where a cuda device would run ahead.
 *
 * linear      tiles of 16 to 256 rows by 128 features. Fewer tiles than SMs: split along K, no
 *             loss. More: whole waves. Best of the two largest tiles. A8 and AFP8 add a kernel that
 *             quantises x (reads 2 bytes, writes 1).
 * moe_linear  the same over X (1 - (1 - k / X)^T) experts, the expected number that T tokens touch
 *             with even routing; their weights are what is read.
 * attention   sums over the batch are made once a step and window, in begin; a layer is O(1).
 *             decode: KV of every sequence once; query heads of a KV head share a tile of 16 rows;
 *             split over the context in pieces of 64 tokens, and fewer pieces than SMs draw only
 *             their share of the bandwidth; a second kernel adds up when sequences were split.
 *             prefill: causal pairs plus half a tile of 128 on the diagonal, at ATTENTION_MATRIX of
 *             the matrix rate; KV read once from DRAM and widened for every 128 query rows.
 * all_reduce  link latency + 2 (tp - 1) / tp * bytes / link rate. logits gather at half of that.
 * the rest    bytes and a launch.
 *
 * dequant_first (device.h): a kernel in front that reads the packed form, writes 16 bit, then the
 * 16-bit operation.
 *
 * Easy to get wrong: rates here are per nanosecond and reciprocal, so the hot path multiplies. */
#include "capacity.h"
#include "device.h"
#include "formats.h"

#include "kernel.h"
#include <math.h>
#include <string.h>

/* Share of the smaller terms that a well-pipelined kernel still fails to hide: prologue and
 * epilogue of a 4 to 8 stage pipeline over some 64 stages. Assumed, not measured. */
#define OVERLAP_LOSS 0.1

/* Attention against plain matrix work: cuDNN's causal prefill on H200 reaches 613 TFLOP/s where its
 * large products reach 770 (plots/peers.lua; 8192 tokens). */
#define ATTENTION_MATRIX 0.8

/* Two dependent trips to DRAM (K, then V) before the first result: 0.7 us each, from memory, of
 * published latency measurements on A100 and H100. */
#define ATTENTION_LATENCY_NS 1400.0

enum { TILE_FEATURES = 128, TILE_ROWS_MAX = 256, TILE_QUERIES = 128, TILE_DECODE = 16 };

/* Integer instructions an element takes on its way to the matrix unit, two elements to a register:
 * u4 to f16 is a shared shift, a LOP3 with the exponent trick for two, and half a repack (the
 * multiply-add by scale and zero runs beside it on the float pipe); int8 a PRMT for two; e4m3 and
 * e2m1 are shifts and masks. To 8-bit operands half of the work is left. ORDER precision, act. */
static const double convert_weight[WF_COUNT][AF_COUNT] = {
    [WF_16] = {0, 0, 0},          [WF_INT8] = {0.5, 0, 0.5}, [WF_INT4] = {0.75, 0.5, 1.0},
    [WF_FP8] = {1.0, 1.0, 0},     [WF_FP8B] = {1.0, 1.0, 0}, [WF_MXFP4] = {1.0, 0.5, 0.5},
    [WF_NVFP4] = {1.0, 0.5, 0.5},
};
static const double convert_kv[KF_COUNT] = {
    [KF_16] = 0, [KF_FP8] = 1.0, [KF_8] = 0.5, [KF_4] = 0.75};

enum { WEIGHTS_MAX = MODEL_LAYERS_MAX * WEIGHT_COUNT + 3 };

/* Nanoseconds. */
typedef struct {
    double memory, compute, convert, fixed;
} terms;

/* What a step's batch means to attention layers of one window. */
typedef struct {
    int32_t window;
    double decode_seqs, decode_tokens, decode_pieces; /* KV tokens seen; pieces of 64 of them */
    double prefill_tokens, prefill_pairs,
        prefill_kv; /* queries; visible (query, key) pairs; keys */
} attention_sums;

/* Constants of a weight, made when it is loaded; behind weight.data. Those of all layers whose
 * matrices are alike are one: what a product costs is worked out for the first layer of a step. */
typedef struct {
    int32_t n, k, count;
    weight_format format;
    act_format act;
    int64_t all_bytes; /* of all matrices: of these six the rest is made */
    double bytes;      /* of one matrix, bias and scales included */
    double read_ns;    /* all of one matrix */
    double tile_ns;    /* one row of a tile of 128 features over all of K, on one SM */
    double convert_ns; /* one matrix, once, on all SMs */
    double expand_ns;  /* dequant_first: the kernel in front, its launch included */
    int32_t n_tiles;   /* along N */
    double x_bytes;    /* of one element of x as the kernel reads it */
    bool quantise_x;
    double asked[3], ns; /* the last product: experts (0: of a linear), rows, columns; its cost */
} sim_weight;

typedef struct {
    device base;
    gpu_sheet gpu;
    arena memory;
    sim_weight *weight; /* [n_weights] */
    int32_t n_weights;
    model_config config;
    int64_t weight_bytes, n_pages;
    kv_pair kv[MODEL_LAYERS_MAX];
    int32_t window_of[MODEL_LAYERS_MAX]; /* into sums */
    int32_t n_windows;
    attention_sums sums[MODEL_LAYERS_MAX];
    /* Reciprocal rates: nanoseconds for one byte, operation, instruction. */
    double byte_ns, link_ns, matrix_ns[AF_COUNT], integer_ns, launch_ns, sms;
    /* The step under way. */
    const batch *b;
    double cost_ns;
    double experts; /* expected number of distinct ones */
} sim_device;

static sim_device *sim_of(device *d) { return (sim_device *)d; }

static inline double terms_ns(terms t) {
    const double rest = t.memory + t.compute + t.convert;
    double most = t.memory > t.compute ? t.memory : t.compute;
    if (t.convert > most) most = t.convert;
    return t.fixed + most + OVERLAP_LOSS * (rest - most);
}

static inline status spend(sim_device *d, terms t) {
    d->cost_ns += terms_ns(t);
    return ST_OK;
}

/* --- Opening ---------------------------------------------------------------------------------- */

static double reciprocal(double rate_per_s) { return rate_per_s > 0 ? 1e9 / rate_per_s : 0; }

static status check_sheet(const gpu_sheet *g) {
    const double needed[] = {g->f16_flops,           g->f32_flops,         g->dram_bytes_per_s,
                             g->dram_efficiency,     g->matrix_efficiency, (double)g->n_sms,
                             (double)g->memory_bytes};
    for (int32_t i = 0; i < COUNT_OF(needed); i++)
        if (!(needed[i] > 0))
            return FAIL(ST_RANGE, "data sheet of %s: a rate, size or efficiency is missing",
                        g->name);
    return ST_OK;
}

static void set_rates(sim_device *d) {
    const gpu_sheet *g = &d->gpu;
    d->sms = g->n_sms;
    d->byte_ns = reciprocal(g->dram_bytes_per_s * g->dram_efficiency);
    d->link_ns = reciprocal(g->link_bytes_per_s);
    d->matrix_ns[AF_16] = reciprocal(g->f16_flops * g->matrix_efficiency);
    d->matrix_ns[AF_INT8] = reciprocal(g->int8_ops * g->matrix_efficiency);
    d->matrix_ns[AF_FP8] = reciprocal(g->fp8_flops * g->matrix_efficiency);
    /* The integer pipe has 64 lanes an SM on all of them; f32 has 64 on 7.x and 8.0, 128 since 8.6;
     * and f32_flops counts a multiply-add as two. */
    const double lanes = g->sm < 86 ? 64 : 128;
    d->integer_ns = reciprocal(g->f32_flops / 2 * (64 / lanes));
    d->launch_ns = g->launch_s * 1e9;
}

static void sim_close(device *d) {
    if (!d) return;
    arena_close(&sim_of(d)->memory);
    mem_free(d);
}

static status sim_open(device **out, const device_options *o) {
    *out = NULL;
    gpu_sheet sheet;
    if (o->sheet)
        sheet = *o->sheet;
    else if (o->gpu)
        TRY(gpu_load(&sheet, o->gpu));
    else
        return FAIL(ST_USAGE,
                    "the sim device needs the name of a GPU: --gpu h200, or `gpu` in Lua");
    TRY(check_sheet(&sheet));
    if (o->tp > 1 && !(sheet.link_bytes_per_s > 0))
        return FAIL(ST_UNSUPPORTED, "%s has no link to peers, tp %d is not possible", sheet.name,
                    o->tp);
    sim_device *d = mem_alloc(1, sizeof *d);
    if (!d) return FAIL(ST_NOMEM, "sim device");
    d->base = (device){.ops = &device_sim, .options = *o};
    d->gpu = sheet;
    d->base.options.sheet = NULL;
    set_rates(d);
    status st = arena_open(&d->memory, WEIGHTS_MAX * sizeof(sim_weight) + 64);
    if (st == ST_OK && !(d->weight = arena_array(&d->memory, sim_weight, WEIGHTS_MAX)))
        st = FAIL(ST_NOMEM, "costs of weights");
    if (st != ST_OK)
        sim_close(&d->base);
    else
        *out = &d->base;
    return st;
}

static status sim_memory(device *d, int64_t *usable) {
    const gpu_sheet *g = &sim_of(d)->gpu;
    *usable = i64_max(g->memory_bytes - g->reserved_bytes, 1);
    return ST_OK;
}

/* --- Weights ---------------------------------------------------------------------------------- */

/* Formats that no kernel is planned for on this architecture are refused, with the reason. */
static status check_precision(const sim_device *d, const precision *p) {
    TRY(format_supported(p, d->gpu.sm));
    if (d->matrix_ns[p->act] > 0) return ST_OK;
    return FAIL(ST_UNSUPPORTED, "%s (sm_%d) has no %s matrix units, which A%s needs", d->gpu.name,
                d->gpu.sm, p->act == AF_FP8 ? "fp8" : "int8", act_format_text(p->act));
}

static sim_weight weight_constants(const sim_device *d, const weight *w, const precision *p) {
    const double elements = (double)w->n * w->k;
    const act_format act = w->format == WF_16 ? AF_16 : p->act;
    const double ops = convert_weight[w->format][act];
    sim_weight s = {.n = w->n,
                    .k = w->k,
                    .count = w->count,
                    .format = w->format,
                    .act = p->act,
                    .all_bytes = w->bytes,
                    .bytes = (double)w->bytes / (w->count > 0 ? w->count : 1),
                    .n_tiles = (int32_t)div_up(w->n, TILE_FEATURES),
                    .tile_ns = 2.0 * TILE_FEATURES * w->k * d->matrix_ns[act] * d->sms,
                    .convert_ns = elements * ops * d->integer_ns,
                    .x_bytes = act == AF_16 ? 2 : 1,
                    .quantise_x = act != AF_16,
                    .asked = {-1, -1, -1}};
    if (d->base.options.dequant_first && w->format != WF_16 && act == AF_16) {
        const terms front = {.memory = (s.bytes + 2 * elements) * d->byte_ns,
                             .convert = s.convert_ns};
        s.expand_ns = terms_ns(front);
        s.convert_ns = 0;
        s.bytes = 2 * elements;
    }
    s.read_ns = s.bytes * d->byte_ns;
    return s;
}

static bool is_alike(const sim_weight *s, const weight *w, act_format act) {
    return s->n == w->n && s->k == w->k && s->count == w->count && s->format == w->format &&
           s->act == act && s->all_bytes == w->bytes;
}

static status sim_weight_load(device *base, const weight_source *source, const precision *p,
                              weight *out) {
    sim_device *d = sim_of(base);
    TRY(check_precision(d, p));
    *out = weight_source_handle(source, p, base->options.tp);
    sim_weight *s = d->weight;
    while (s < d->weight + d->n_weights && !is_alike(s, out, p->act)) s++;
    if (s == d->weight + d->n_weights) {
        CHECK(d->n_weights < WEIGHTS_MAX);
        *s = weight_constants(d, out, p);
        d->n_weights++;
    }
    out->data = s;
    d->weight_bytes += out->bytes;
    return ST_OK;
}

/* --- Setting up ------------------------------------------------------------------------------- */

static int32_t window_index(sim_device *d, int32_t window) {
    int32_t i = 0;
    while (i < d->n_windows && d->sums[i].window != window) i++;
    if (i == d->n_windows) d->sums[d->n_windows++] = (attention_sums){.window = window};
    return i;
}

static status sim_setup(device *base, const device_setup *s) {
    sim_device *d = sim_of(base);
    const int32_t tp = base->options.tp;
    TRY(check_precision(d, s->precision));
    d->config = *s->config;
    d->n_pages = s->n_pages;
    d->n_windows = 0;
    for (int32_t i = 0; i < d->config.n_layers; i++) {
        d->kv[i] = precision_kv(s->precision, i);
        d->window_of[i] = window_index(d, d->config.window[i]);
    }
    int64_t usable;
    TRY(sim_memory(base, &usable));
    const int64_t kv = s->n_pages * kv_page_bytes(&d->config, s->precision, tp);
    const int64_t work = workspace_bytes(&d->config, s->precision, tp, s->max_tokens, s->max_seqs,
                                         s->max_samples, s->n_pages);
    const double gib = 1.0 / (1 << 30);
    if (d->weight_bytes + work + kv > usable)
        return FAIL(ST_OOM,
                    "%s on %s tp %d: weights %.1f GiB + workspace %.1f GiB + KV %.1f GiB, usable "
                    "%.1f GiB",
                    d->config.name, d->gpu.name, tp, (double)d->weight_bytes * gib,
                    (double)work * gib, (double)kv * gib, (double)usable * gib);
    return ST_OK;
}

static status sim_buffer(device *d, int64_t rows, int32_t cols, tensor *out) {
    (void)d;
    *out = (tensor){.rows = rows, .cols = cols};
    return ST_OK;
}

/* --- Linears ---------------------------------------------------------------------------------- */

/* `experts` matrices with `rows` rows each, tiles of tile_rows. */
static inline terms tiled(const sim_device *d, const sim_weight *s, double experts, double rows,
                          double tile_rows) {
    const double row_tiles = ceil(rows / tile_rows);
    const double tiles = experts * row_tiles * s->n_tiles;
    const double waves = tiles <= d->sms ? tiles / d->sms : ceil(tiles / d->sms);
    return (terms){.compute = waves * tile_rows * s->tile_ns,
                   .convert = experts * row_tiles * s->convert_ns};
}

static inline terms product(const sim_device *d, const sim_weight *s, double experts, double rows,
                            double moved_bytes) {
    terms t;
    if (rows > TILE_ROWS_MAX / 2) {
        t = tiled(d, s, experts, rows, TILE_ROWS_MAX / 2);
        const terms large = tiled(d, s, experts, rows, TILE_ROWS_MAX);
        if (large.compute < t.compute || (large.compute == t.compute && large.convert < t.convert))
            t = large;
    } else {
        t = tiled(d, s, experts, rows, rows <= 16 ? 16 : rows <= 32 ? 32 : rows <= 64 ? 64 : 128);
    }
    t.memory = experts * s->read_ns + moved_bytes * d->byte_ns;
    t.fixed = d->launch_ns;
    if (s->expand_ns > 0) t.fixed += d->launch_ns + experts * s->expand_ns;
    return t;
}

/* x [rows, k] to out [rows, out_cols] of out_bytes an element. */
static inline terms linear_terms(const sim_device *d, const weight *w, double rows, double out_cols,
                                 double out_bytes) {
    const sim_weight *s = w->data;
    const double moved = rows * (w->k * s->x_bytes + out_cols * out_bytes);
    terms t = product(d, s, 1, rows, moved);
    if (s->quantise_x) t.fixed += d->launch_ns + rows * w->k * 3 * d->byte_ns;
    return t;
}

/* Experts of w that `rows` = tokens * top_k rows go to. */
static inline terms moe_terms(const sim_device *d, const weight *w, double experts, double rows) {
    const sim_weight *s = w->data;
    const double moved = rows * (w->k * s->x_bytes + w->n * 2.0);
    terms t = product(d, s, experts, rows / experts, moved);
    if (s->quantise_x) t.fixed += d->launch_ns + rows * w->k * 3 * d->byte_ns;
    return t;
}

static double experts_touched(const model_config *c, double tokens) {
    if (c->n_experts == 0) return 0;
    const double missed = pow(1 - (double)c->top_k / c->n_experts, tokens);
    return fmax(c->n_experts * (1 - missed), 1);
}

/* True when s->ns is the cost of this product already; else it is to be set. */
static inline bool is_asked_again(sim_weight *s, double experts, double rows, double cols) {
    const bool again = s->asked[0] == experts && s->asked[1] == rows && s->asked[2] == cols;
    s->asked[0] = experts, s->asked[1] = rows, s->asked[2] = cols;
    return again;
}

static inline status spend_linear(sim_device *d, const weight *w, double rows, double out_cols) {
    sim_weight *s = w->data;
    if (!is_asked_again(s, 0, rows, out_cols))
        s->ns = terms_ns(linear_terms(d, w, rows, out_cols, 2));
    d->cost_ns += s->ns;
    return ST_OK;
}

static status sim_linear(device *base, tensor out, tensor x, const weight *w) {
    (void)out;
    return spend_linear(sim_of(base), w, (double)x.rows, w->n);
}

static status sim_linear_gated(device *base, tensor out, tensor x, const weight *w,
                               activation_kind kind, float limit) {
    (void)out, (void)kind, (void)limit;
    return spend_linear(sim_of(base), w, (double)x.rows, w->n / 2.0);
}

static status sim_moe_linear(device *base, tensor out, tensor x, const weight *w, int32_t top_k,
                             bool gather) {
    sim_device *d = sim_of(base);
    (void)x, (void)top_k, (void)gather;
    sim_weight *s = w->data;
    if (!is_asked_again(s, d->experts, (double)out.rows, w->n))
        s->ns = terms_ns(moe_terms(d, w, d->experts, (double)out.rows));
    d->cost_ns += s->ns;
    return ST_OK;
}

static double gather_ns(const sim_device *d, double bytes, double trips) {
    const int32_t tp = d->base.options.tp;
    if (tp <= 1) return 0;
    return d->gpu.link_latency_s * 1e9 + trips * (tp - 1) / tp * bytes * d->link_ns;
}

static terms logits_terms(const sim_device *d, const weight *head, double rows) {
    terms t = linear_terms(d, head, rows, head->n, 4);
    t.fixed += gather_ns(d, rows * head->n * 4.0 * d->base.options.tp, 1);
    return t;
}

static status sim_logits(device *base, tensor out, tensor x, const weight *head) {
    sim_device *d = sim_of(base);
    (void)out;
    return spend(d, logits_terms(d, head, (double)x.rows));
}

/* --- Attention -------------------------------------------------------------------------------- */

/* Keys that `m` queries, the last of n tokens, see together; each looks back on `window` (0 =
 * all). */
static double visible_pairs(double m, double n, double window) {
    const double first = n - m + 1; /* keys that the first query sees without a window */
    if (window <= 0 || n <= window) return m * (first + n) / 2;
    if (first >= window) return m * window;
    const double growing =
        window - first; /* queries that see all there is, and fewer than window */
    return growing * (first + window - 1) / 2 + (m - growing) * window;
}

static void add_sequence(attention_sums *s, double m, double n, bool decode) {
    const double window = s->window;
    const double keys = window > 0 && n > window + m - 1 ? window + m - 1 : n;
    if (decode) {
        s->decode_seqs++;
        s->decode_tokens += keys;
        s->decode_pieces += ceil(keys * (1.0 / KV_PAGE_TOKENS));
    } else {
        s->prefill_tokens += m;
        s->prefill_kv += keys;
        s->prefill_pairs += visible_pairs(m, n, window);
    }
}

typedef struct {
    double n_heads, n_kv_heads, head_dim;
    double kv_bytes, kv_ops; /* of one token of one head, K and V: bytes, instructions */
} attention_shape;

static inline attention_shape shape_of(const attention_layer *a, kv_pair kv) {
    return (attention_shape){.n_heads = a->n_heads,
                             .n_kv_heads = a->n_kv_heads,
                             .head_dim = a->head_dim,
                             .kv_bytes = (double)(kv_format_bytes((kv_format)kv.k, a->head_dim) +
                                                  kv_format_bytes((kv_format)kv.v, a->head_dim)),
                             .kv_ops = a->head_dim * (convert_kv[kv.k] + convert_kv[kv.v])};
}

/* 16 exponentials a clock and SM: a quarter of the integer pipe. */
static inline double exponentials_ns(const sim_device *d, double n) {
    return n * 4 * d->integer_ns;
}

static terms decode_terms(const sim_device *d, const attention_shape *a, const attention_sums *s) {
    const double group = a->n_heads / a->n_kv_heads, tokens = s->decode_tokens * a->n_kv_heads;
    const double rows = ceil(group / TILE_DECODE) * TILE_DECODE;
    const double pieces = s->decode_pieces * a->n_kv_heads;
    const double share = pieces < d->sms ? pieces / d->sms : 1; /* of the machine that is at work */
    const double q_bytes = s->decode_seqs * a->n_heads * a->head_dim * 4;
    const bool split = s->decode_seqs * a->n_kv_heads < d->sms && pieces > s->decode_seqs;
    return (terms){.memory = (tokens * a->kv_bytes + q_bytes) * d->byte_ns / share,
                   .compute = tokens * 4 * rows * a->head_dim * d->matrix_ns[AF_16] / share,
                   .convert =
                       (tokens * a->kv_ops * d->integer_ns + exponentials_ns(d, tokens * group)) /
                       share,
                   .fixed = d->launch_ns * (split ? 2 : 1) + ATTENTION_LATENCY_NS};
}

static terms prefill_terms(const sim_device *d, const attention_shape *a, const attention_sums *s) {
    const double group = a->n_heads / a->n_kv_heads;
    const double kv = s->prefill_kv * a->n_kv_heads;
    const double pairs = s->prefill_pairs + s->prefill_tokens * (TILE_QUERIES / 2);
    const double passes = fmax(s->prefill_pairs * group / TILE_QUERIES, s->prefill_kv);
    const double q_bytes = s->prefill_tokens * a->n_heads * a->head_dim * 4;
    return (terms){.compute = a->n_heads * pairs * 4 * a->head_dim * d->matrix_ns[AF_16] /
                              ATTENTION_MATRIX,
                   .convert = exponentials_ns(d, a->n_heads * s->prefill_pairs) +
                              passes * a->n_kv_heads * a->kv_ops * d->integer_ns,
                   .memory = (kv * a->kv_bytes + q_bytes) * d->byte_ns,
                   .fixed = d->launch_ns + ATTENTION_LATENCY_NS};
}

static double attention_ns(const sim_device *d, const attention_shape *a, const attention_sums *s) {
    double ns = 0;
    if (s->decode_seqs > 0) ns += terms_ns(decode_terms(d, a, s));
    if (s->prefill_tokens > 0) ns += terms_ns(prefill_terms(d, a, s));
    return ns;
}

static status sim_attention(device *base, tensor out, tensor qkv, const attention_layer *a) {
    sim_device *d = sim_of(base);
    (void)out, (void)qkv;
    const attention_shape shape = shape_of(a, d->kv[a->layer]);
    d->cost_ns += attention_ns(d, &shape, &d->sums[d->window_of[a->layer]]);
    return ST_OK;
}

/* --- Operations that only move bytes ---------------------------------------------------------- */

static inline terms moving(const sim_device *d, double bytes) {
    return (terms){.memory = bytes * d->byte_ns, .fixed = d->launch_ns};
}

static inline double elements(tensor t) { return (double)t.rows * t.cols; }

static double rope_bytes(const attention_shape *a, double rows) {
    const double turned = (a->n_heads + a->n_kv_heads) * a->head_dim; /* read; q written back */
    return rows * (2 * (turned + a->n_kv_heads * a->head_dim) + 2 * a->n_heads * a->head_dim +
                   a->n_kv_heads * a->kv_bytes);
}

/* Two kernels: rows of the table, and their norm. */
static status sim_embed(device *base, tensor out, tensor residual, const weight *table,
                        const weight *w, float eps) {
    sim_device *d = sim_of(base);
    (void)residual, (void)table, (void)w, (void)eps;
    TRY(spend(d, moving(d, 4 * elements(out))));
    return spend(d, moving(d, 4 * elements(out)));
}

static status sim_norm(device *base, tensor out, tensor residual, tensor add, const weight *w,
                       float eps) {
    sim_device *d = sim_of(base);
    (void)residual, (void)add, (void)w, (void)eps;
    /* Read the stream and what is added, write the stream and the result. */
    return spend(d, moving(d, 8 * elements(out)));
}

static status sim_rope_append(device *base, tensor qkv, const attention_layer *a) {
    sim_device *d = sim_of(base);
    const attention_shape shape = shape_of(a, d->kv[a->layer]);
    return spend(d, moving(d, rope_bytes(&shape, (double)qkv.rows)));
}

static status sim_gated(device *base, tensor out, tensor gate_up, activation_kind kind,
                        float limit) {
    sim_device *d = sim_of(base);
    (void)gate_up, (void)kind, (void)limit;
    return spend(d, moving(d, 6 * elements(out)));
}

static status sim_moe_route(device *base, tensor logits, int32_t top_k, route_kind kind,
                            bool normalise) {
    sim_device *d = sim_of(base);
    (void)kind, (void)normalise;
    terms t = moving(d, 2 * elements(logits) + (double)logits.rows * top_k * 12);
    t.fixed += d->launch_ns; /* choose; then count and sort by expert */
    return spend(d, t);
}

static status sim_moe_combine(device *base, tensor out, tensor y, int32_t top_k) {
    sim_device *d = sim_of(base);
    (void)top_k;
    return spend(d, moving(d, 2 * elements(y) + 2 * elements(out)));
}

static status sim_all_reduce(device *base, tensor inout) {
    sim_device *d = sim_of(base);
    d->cost_ns += gather_ns(d, 2 * elements(inout), 2);
    return ST_OK;
}

static status sim_gather(device *base, tensor out, tensor x) {
    sim_device *d = sim_of(base);
    (void)x;
    return spend(d, moving(d, 4 * elements(out)));
}

static status sim_sample(device *base, tensor logits) {
    sim_device *d = sim_of(base);
    return spend(d, moving(d, 4 * elements(logits)));
}

/* --- A step ----------------------------------------------------------------------------------- */

static status sim_begin(device *base, const batch *b) {
    sim_device *d = sim_of(base);
    d->b = b;
    d->cost_ns = d->gpu.step_s * 1e9;
    d->experts = experts_touched(&d->config, b->n_tokens);
    for (int32_t w = 0; w < d->n_windows; w++) {
        attention_sums s = {.window = d->sums[w].window};
        for (int32_t i = 0; i < b->n_seqs; i++)
            add_sequence(&s, b->seq_start[i + 1] - b->seq_start[i], b->kv_len[i], i < b->n_decodes);
        d->sums[w] = s;
    }
    return ST_OK;
}

static status sim_end(device *base, sampled *out, int64_t *cost_ns) {
    sim_device *d = sim_of(base);
    device_placeholders(d->b, d->config.vocab, out);
    *cost_ns = llround(d->cost_ns);
    return ST_OK;
}

static status sim_read(device *d, tensor t, float *out) {
    (void)d, (void)t, (void)out;
    return FAIL(ST_UNSUPPORTED, "the sim device stores no values");
}

/* --- Explaining ------------------------------------------------------------------------------- */

enum { EXPLAIN_CONTEXT = 1024 }; /* of the decodes that attention is explained for */

static terms explain_attention(const sim_device *d, const attention_shape *a, double rows) {
    attention_sums s = {0};
    for (int32_t i = 0; i < (int32_t)rows; i++) add_sequence(&s, 1, EXPLAIN_CONTEXT, true);
    return decode_terms(d, a, &s);
}

static terms explain_terms(const sim_device *d, const char *what, const weight *w, double rows) {
    const model_config *c = &d->config;
    const int32_t tp = d->base.options.tp;
    const attention_layer layer = {
        .n_heads = c->n_heads / tp, .n_kv_heads = model_kv_heads(c, tp), .head_dim = c->head_dim};
    const attention_shape a = shape_of(&layer, d->kv[0]);
    const double ffn = (double)(c->n_experts ? c->expert_dim : c->ffn_dim) / tp, dim = c->dim;
    if (strcmp(what, "linear") == 0) return linear_terms(d, w, rows, w->n, 2);
    if (strcmp(what, "linear_gated") == 0) return linear_terms(d, w, rows, w->n / 2.0, 2);
    if (strcmp(what, "logits") == 0) return logits_terms(d, w, rows);
    if (strcmp(what, "moe_linear") == 0)
        return moe_terms(d, w, experts_touched(c, rows / c->top_k), rows);
    if (strcmp(what, "attention") == 0) return explain_attention(d, &a, rows);
    if (strcmp(what, "rope_append") == 0) return moving(d, rope_bytes(&a, rows));
    if (strcmp(what, "norm") == 0) return moving(d, 8 * rows * dim);
    if (strcmp(what, "gated") == 0) return moving(d, 6 * rows * ffn);
    if (strcmp(what, "moe_combine") == 0) return moving(d, 2 * rows * dim * (c->top_k + 1));
    if (strcmp(what, "moe_route") == 0) return moving(d, rows * (2 * c->n_experts + 12 * c->top_k));
    if (strcmp(what, "sample") == 0) return moving(d, 4 * rows * c->vocab);
    if (strcmp(what, "all_reduce") == 0) return (terms){.fixed = gather_ns(d, 2 * rows * dim, 2)};
    return moving(d, 4 * rows * dim); /* embed, gather */
}

static void sim_explain(device *base, const char *what, const weight *w, int64_t rows, char *buf,
                        size_t n) {
    const sim_device *d = sim_of(base);
    const terms t = explain_terms(d, what, w, (double)rows);
    const char *bound = t.fixed >= t.memory && t.fixed >= t.compute && t.fixed >= t.convert
                            ? "fixed"
                        : t.memory >= t.compute && t.memory >= t.convert ? "memory"
                        : t.compute >= t.convert                         ? "compute"
                                                                         : "conversion";
    snprintf(
        buf, n,
        "predicted %.2f us: memory %.2f, compute %.2f, conversion %.2f, fixed %.2f; %s bound%s",
        terms_ns(t) * 1e-3, t.memory * 1e-3, t.compute * 1e-3, t.convert * 1e-3, t.fixed * 1e-3,
        bound, strcmp(what, "attention") == 0 ? " (decodes at a context of 1024)" : "");
}

static status sim_ceilings(device *base, double *read_bytes_per_s, double *matrix_flops) {
    const gpu_sheet *g = &sim_of(base)->gpu;
    *read_bytes_per_s = g->dram_bytes_per_s * g->dram_efficiency;
    *matrix_flops = g->f16_flops * g->matrix_efficiency;
    return ST_OK;
}

const device_ops device_sim = {
    .name = "sim",
    .virtual_time = true,
    .open = sim_open,
    .close = sim_close,
    .memory = sim_memory,
    .weight_load = sim_weight_load,
    .setup = sim_setup,
    .buffer = sim_buffer,
    .begin = sim_begin,
    .embed = sim_embed,
    .norm = sim_norm,
    .linear = sim_linear,
    .rope_append = sim_rope_append,
    .attention = sim_attention,
    .gated = sim_gated,
    .moe_route = sim_moe_route,
    .moe_linear = sim_moe_linear,
    .moe_combine = sim_moe_combine,
    .all_reduce = sim_all_reduce,
    .gather = sim_gather,
    .logits = sim_logits,
    .sample = sim_sample,
    .end = sim_end,
    .read = sim_read,
    .explain = sim_explain,
    .ceilings = sim_ceilings,
    .linear_gated = sim_linear_gated,
};
