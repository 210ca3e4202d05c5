/* device_cpu.c - the device that defines what every other one must compute.
 *
 * Activations are f32. A weight is f32 [count, n, k] in memory: that of the checkpoint, or the
 * exact value of its quantised form (ref_quant.h), so that a product with it is the definition of a
 * product with the codes. Activations are quantised before a linear whose weight is quantised, KV
 * when it is written; KV_16 stays f32. Kernels are those of kernels/ref_*.c, split over threads by
 * rows, outputs or heads.
 *
 * Two promises beyond being right. A row's result depends on nothing but its own sequence, bit by
 * bit: not on the batch, on how a prompt is cut into chunks, on page numbers or on the number of
 * threads (ref_linear.h says how). And KV that was never written is NaN: a page is filled with it
 * by the first step that names it, so that whoever reads past the end of a sequence sees it, and a
 * pool costs no memory that no sequence has used.
 *
 * One rank only: nothing here is worth splitting over machines. */
#include "device.h"
#include "ref_activation.h"
#include "ref_attention.h"
#include "ref_linear.h"
#include "ref_moe.h"
#include "ref_norm.h"
#include "ref_quant.h"
#include "ref_rope.h"
#include "sampler.h"
#include <math.h>
#include <omp.h>
#include <string.h>
#include <unistd.h>

enum {
    ALIGN = 64,            /* a cache line */
    OUTPUTS_PER_TASK = 48, /* of a linear: a multiple of the tile's 3, 48 KB of weights at K 256 */
    ROWS_PER_TASK = 64,    /* query rows of one attention task */
    PARALLEL_LEAST = 1 << 22, /* element operations under which threads cost more than they bring */
};

typedef struct {
    float *value; /* [count, n, k] */
    float *bias;  /* [count, n] or NULL */
} cpu_weight;

/* Consecutive tokens of one sequence whose queries are answered together. */
typedef struct {
    int32_t seq, token, n_tokens; /* token: first one, of T */
} attention_task;

typedef struct {
    device base; /* first: device_ops get this */
    int threads;
    int32_t k_max; /* widest input of a quantised or expert weight */
    bool ready;
    arena weights, scratch; /* scratch: one quantised matrix at a time, while loading */
    arena run;              /* everything below */

    model_config config;
    precision precision;
    int32_t max_tokens, max_seqs, max_samples, n_pages;
    ref_kv *kv;           /* [L] */
    bool *page_filled;    /* [n_pages] a step has named it */
    double *inv_freq;     /* [D / 2] */
    double rope_factor;   /* on cos and sin */
    float *cosine, *sine; /* [max_tokens, D / 2] of this step */
    int32_t *token_seq;   /* [max_tokens] of this step */
    attention_task *task; /* [max_tokens] of this step */
    int32_t n_tasks;
    float *input;             /* [max_tokens * k, k_max] a linear's input, permuted or quantised */
    int32_t *expert;          /* [max_tokens * k], see ref_moe.h */
    float *expert_weight;     /* [max_tokens * k] */
    int32_t *expert_start;    /* [X + 1] */
    int32_t *slot_row;        /* [max_tokens * k] */
    int32_t *row_token;       /* [max_tokens * k] */
    float *attention_scratch; /* [threads, attention_floats] */
    int64_t attention_floats;
    uint8_t *sampler_scratch; /* [threads, sampler_size] */
    size_t sampler_size;
    sampled *result; /* [max_samples] of this step */
    const batch *b;  /* between begin and end */
} cpu;

static cpu *self(device *d) { return (cpu *)(void *)d; }

static const cpu_weight *values(const weight *w) {
    CHECK(w->n > 0);
    return w->data;
}

static float *data(tensor t) { return t.data; }

/* Threads for this many element operations. */
static int threads_for(const cpu *c, int64_t work) {
    return work < PARALLEL_LEAST ? 1 : c->threads;
}

/* --- Opening and loading ---------------------------------------------------------------------- */

static status cpu_open(device **out, const device_options *o) {
    if (o->tp != 1) return FAIL(ST_UNSUPPORTED, "the cpu device has one rank, not %d", o->tp);
    if (o->dequant_first) return FAIL(ST_UNSUPPORTED, "the cpu device has no mode dequant_first");
    cpu *c = mem_alloc(1, sizeof *c);
    if (!c) return FAIL(ST_NOMEM, "cpu device");
    c->base = (device){.ops = &device_cpu, .options = *o};
    c->threads = o->threads > 0 ? o->threads : omp_get_max_threads();
    /* Address space as large as the machine's memory for each; what is not touched is not taken. */
    const size_t bytes = (size_t)sysconf(_SC_PHYS_PAGES) * (size_t)sysconf(_SC_PAGESIZE);
    status st = arena_open(&c->weights, bytes);
    if (st == ST_OK) st = arena_open(&c->scratch, bytes);
    if (st == ST_OK) st = arena_open(&c->run, bytes);
    if (st != ST_OK)
        device_cpu.close(&c->base);
    else
        *out = &c->base;
    return st;
}

static void cpu_close(device *d) {
    cpu *c = self(d);
    arena_close(&c->run);
    arena_close(&c->scratch);
    arena_close(&c->weights);
    mem_free(c);
}

static status cpu_memory(device *d, int64_t *usable) {
    (void)d;
    *usable = 0;
    return ST_OK;
}

/* Replace the values [n, k] of one matrix by those of its quantised form. */
static status round_to_format(cpu *c, const precision *p, float *value, int32_t n, int32_t k) {
    const size_t mark = c->scratch.used;
    qmatrix q;
    status st = qmatrix_alloc(&q, &c->scratch, p, n, k);
    if (st == ST_OK) st = ref_quantize_weight(&q, value);
    if (st == ST_OK) {
#pragma omp parallel for num_threads(threads_for(c, (int64_t)n *k))
        for (int32_t i = 0; i < n; i++) ref_dequantize_weight(value + (int64_t)i * k, &q, i, 1);
    }
    arena_reset(&c->scratch, mark);
    return st;
}

/* value [n, k] = what the checkpoint's own codes stand for, inputs in the model's order. */
static status load_codes(cpu *c, const weight_source *s, const precision *p, int32_t index,
                         float *value) {
    const int32_t n = s->shape.n, k = s->shape.k;
    const int32_t *order = s->stored.order ? s->stored.order + (int64_t)index * k : NULL;
    const size_t mark = c->scratch.used;
    qmatrix q;
    status st = qmatrix_alloc(&q, &c->scratch, p, n, k);
    float *row = st == ST_OK && order ? arena_array(&c->scratch, float, (size_t)k) : NULL;
    if (st == ST_OK && order && !row) st = FAIL(ST_NOMEM, "a row of %d", k);
    if (st == ST_OK) {
        weight_source_qmatrix(s, index, &q);
        for (int32_t i = 0; i < n; i++) {
            float *to = value + (int64_t)i * k;
            ref_dequantize_weight(order ? row : to, &q, i, 1);
            for (int32_t j = 0; order && j < k; j++) to[order[j]] = row[j];
        }
    }
    arena_reset(&c->scratch, mark);
    return st;
}

static status cpu_weight_load(device *d, const weight_source *s, const precision *p, weight *out) {
    cpu *c = self(d);
    CHECK(!c->ready);
    const int32_t n = s->shape.n, k = s->shape.k, count = s->shape.count;
    const int64_t size = (int64_t)n * k;
    const bool quantised = s->shape.quantise && p->weight != WF_16, has_bias = s->shape.has_bias;
    const bool codes = weight_source_has_codes(s, p);
    if (quantised) TRY(precision_fits_shape(p, n, k));
    TRY(weight_source_accepts(s, p));

    cpu_weight *w = arena_array(&c->weights, cpu_weight, 1);
    float *value = arena_push(&c->weights, (size_t)(count * size), sizeof(float), ALIGN);
    float *bias = NULL;
    if (has_bias) bias = arena_push(&c->weights, (size_t)count * (size_t)n, sizeof(float), ALIGN);
    if (!w || !value || (has_bias && !bias))
        return FAIL(ST_NOMEM, "%s: %lld elements", s->name, (long long)(count * size));
    *w = (cpu_weight){.value = value, .bias = bias};

    for (int32_t j = 0; j < count; j++) {
        if (codes) TRY(load_codes(c, s, p, j, value + j * size));
#pragma omp parallel for num_threads(threads_for(c, size))
        for (int32_t i = 0; i < (codes ? 0 : n); i++)
            weight_source_row(s, j, i, value + j * size + (int64_t)i * k);
        if (quantised && !codes) TRY(round_to_format(c, p, value + j * size, n, k));
        if (bias) weight_source_bias(s, j, bias + (int64_t)j * n);
    }
    if (s->shape.quantise) c->k_max = (int32_t)i64_max(c->k_max, k); /* experts are among them */
    *out = (weight){.n = n,
                    .k = k,
                    .count = count,
                    .format = quantised ? p->weight : WF_16,
                    .group = quantised ? p->group : 0,
                    .has_bias = has_bias,
                    .sym = quantised && p->sym,
                    .bytes = weight_shape_bytes(&s->shape, p, s->type),
                    .data = w};
    return ST_OK;
}

/* --- Setup ------------------------------------------------------------------------------------ */

static void *take(cpu *c, int64_t count, size_t size) {
    return arena_push(&c->run, (size_t)count, size, ALIGN);
}

/* Pages of one layer. */
static status setup_kv(cpu *c, int32_t layer) {
    const model_config *m = &c->config;
    const kv_pair f = precision_kv(&c->precision, layer);
    ref_kv *kv = &c->kv[layer];
    kv->k_format = f.k;
    kv->v_format = f.v;
    kv->n_kv_heads = m->n_kv_heads;
    kv->head_dim = m->head_dim;
    const int64_t tokens = (int64_t)c->n_pages * m->n_kv_heads * KV_PAGE_TOKENS;
    kv->k = take(c, tokens * ref_kv_code_bytes(f.k, m->head_dim), 1);
    kv->v = take(c, tokens * ref_kv_code_bytes(f.v, m->head_dim), 1);
    kv->k_params = take(c, tokens * 2, sizeof(uint16_t));
    kv->v_params = take(c, tokens * 2, sizeof(uint16_t));
    if (!kv->k || !kv->v || !kv->k_params || !kv->v_params)
        return FAIL(ST_NOMEM, "KV pages of layer %d: %d pages", layer, c->n_pages);
    return ST_OK;
}

/* One page of all layers: all ones is NaN in f32, f16 and e4m3. */
static void fill_page(const cpu *c, int32_t page) {
    const model_config *m = &c->config;
    const size_t tokens = (size_t)m->n_kv_heads * KV_PAGE_TOKENS;
    const size_t params = tokens * 2 * sizeof(uint16_t), at = (size_t)page;
    for (int32_t i = 0; i < m->n_layers; i++) {
        const ref_kv *kv = &c->kv[i];
        const size_t k = tokens * (size_t)ref_kv_code_bytes(kv->k_format, m->head_dim);
        const size_t v = tokens * (size_t)ref_kv_code_bytes(kv->v_format, m->head_dim);
        memset(kv->k + at * k, 0xff, k);
        memset(kv->v + at * v, 0xff, v);
        memset(kv->k_params + at * tokens * 2, 0xff, params);
        memset(kv->v_params + at * tokens * 2, 0xff, params);
    }
    c->page_filled[page] = true;
}

/* Query tokens of one attention task. */
static int32_t tokens_per_task(const cpu *c) {
    return (int32_t)i64_max(1, ROWS_PER_TASK / (c->config.n_heads / c->config.n_kv_heads));
}

static status cpu_setup(device *d, const device_setup *s) {
    cpu *c = self(d);
    CHECK(!c->ready);
    c->config = *s->config;
    c->precision = *s->precision;
    c->max_tokens = s->max_tokens;
    c->max_seqs = s->max_seqs;
    c->max_samples = s->max_samples;
    c->n_pages = s->n_pages;
    const model_config *m = &c->config;
    CHECK(m->n_heads % m->n_kv_heads == 0);
    const int32_t half = m->head_dim / 2, ratio = m->n_heads / m->n_kv_heads;
    const int64_t rows = (int64_t)s->max_tokens * (m->n_experts ? m->top_k : 1);
    c->attention_floats = ref_attention_scratch(tokens_per_task(c) * ratio, m->head_dim);
    c->attention_floats = div_up(c->attention_floats, ALIGN) * ALIGN; /* doubles lie in it */
    c->sampler_size = (size_t)div_up((int64_t)sampler_bytes(m->vocab), ALIGN) * ALIGN;

    bool ok = true;
    ok &= (c->kv = take(c, m->n_layers, sizeof *c->kv)) != NULL;
    ok &= (c->page_filled = take(c, s->n_pages, sizeof(bool))) != NULL;
    ok &= (c->inv_freq = take(c, half, sizeof(double))) != NULL;
    ok &= (c->cosine = take(c, (int64_t)s->max_tokens * half, sizeof(float))) != NULL;
    ok &= (c->sine = take(c, (int64_t)s->max_tokens * half, sizeof(float))) != NULL;
    ok &= (c->token_seq = take(c, s->max_tokens, sizeof(int32_t))) != NULL;
    ok &= (c->task = take(c, s->max_tokens, sizeof *c->task)) != NULL;
    ok &= (c->input = take(c, rows * c->k_max, sizeof(float))) != NULL;
    ok &= (c->expert = take(c, rows, sizeof(int32_t))) != NULL;
    ok &= (c->expert_weight = take(c, rows, sizeof(float))) != NULL;
    ok &= (c->expert_start = take(c, m->n_experts + 1, sizeof(int32_t))) != NULL;
    ok &= (c->slot_row = take(c, rows, sizeof(int32_t))) != NULL;
    ok &= (c->row_token = take(c, rows, sizeof(int32_t))) != NULL;
    ok &= (c->attention_scratch = take(c, c->threads * c->attention_floats, sizeof(float))) != NULL;
    ok &= (c->sampler_scratch = take(c, c->threads, c->sampler_size)) != NULL;
    ok &= (c->result = take(c, s->max_samples, sizeof *c->result)) != NULL;
    if (!ok) return FAIL(ST_NOMEM, "cpu device: %d tokens a step", s->max_tokens);
    for (int32_t i = 0; i < m->n_layers; i++) TRY(setup_kv(c, i));
    rope_frequencies(&m->rope, m->head_dim, c->inv_freq, &c->rope_factor);
    c->ready = true;
    return ST_OK;
}

static status cpu_buffer(device *d, int64_t n_rows, int32_t cols, tensor *out) {
    void *p = take(self(d), n_rows * cols, sizeof(float));
    if (!p) return FAIL(ST_NOMEM, "buffer of %lld x %d", (long long)n_rows, cols);
    *out = (tensor){.data = p, .rows = n_rows, .cols = cols};
    return ST_OK;
}

/* --- One step --------------------------------------------------------------------------------- */

/* Which sequence each token belongs to, the angles of its position, and the attention tasks. */
static void plan_step(cpu *c) {
    const batch *b = c->b;
    const int32_t half = c->config.head_dim / 2, per_task = tokens_per_task(c);
    c->n_tasks = 0;
    for (int32_t s = 0; s < b->n_seqs; s++) {
        const int32_t end = b->seq_start[s + 1];
        for (int32_t t = b->seq_start[s]; t < end; t++) c->token_seq[t] = s;
        for (int32_t t = b->seq_start[s]; t < end; t += per_task)
            c->task[c->n_tasks++] = (attention_task){
                .seq = s, .token = t, .n_tokens = (int32_t)i64_min(per_task, end - t)};
    }
#pragma omp parallel for num_threads(threads_for(c, (int64_t)b->n_tokens *half * 32))
    for (int32_t t = 0; t < b->n_tokens; t++)
        ref_rope_angles(c->cosine + (int64_t)t * half, c->sine + (int64_t)t * half, c->inv_freq,
                        c->rope_factor, b->position[t], half);
}

static status cpu_begin(device *d, const batch *b) {
    cpu *c = self(d);
    CHECK(c->ready);
    batch_check(b, c->max_tokens, c->max_seqs, c->max_samples, c->n_pages);
    for (int32_t t = 0; t < b->n_tokens; t++)
        CHECK((uint32_t)b->token[t] < (uint32_t)c->config.vocab);
    for (int32_t i = 0; i < b->page_start[b->n_seqs]; i++)
        if (!c->page_filled[b->page[i]]) fill_page(c, b->page[i]);
    c->b = b;
    plan_step(c);
    return ST_OK;
}

/* add: NULL, or what is added to the stream. */
static void norm_rows(const cpu *c, tensor out, tensor residual, const float *add, const weight *w,
                      float eps) {
    CHECK(out.rows == residual.rows);
    CHECK(out.cols == residual.cols);
    CHECK(w->k == out.cols);
    const float *gain = values(w)->value;
#pragma omp parallel for num_threads(threads_for(c, out.rows *out.cols * 4))
    for (int64_t r = 0; r < out.rows; r++)
        ref_norm_add(data(out) + r * out.cols, data(residual) + r * out.cols,
                     add ? add + r * out.cols : NULL, gain, 1, out.cols, eps);
}

static status cpu_embed(device *d, tensor out, tensor residual, const weight *table,
                        const weight *w, float eps) {
    const cpu *c = self(d);
    const float *value = values(table)->value;
    CHECK(residual.rows == c->b->n_tokens);
    CHECK(residual.cols == table->k);
    for (int32_t t = 0; t < c->b->n_tokens; t++)
        memcpy(data(residual) + (int64_t)t * table->k, value + (int64_t)c->b->token[t] * table->k,
               sizeof(float) * (size_t)table->k);
    norm_rows(c, out, residual, NULL, w, eps);
    return ST_OK;
}

static status cpu_norm(device *d, tensor out, tensor residual, tensor add, const weight *w,
                       float eps) {
    CHECK(add.rows == out.rows);
    norm_rows(self(d), out, residual, data(add), w, eps);
    return ST_OK;
}

/* y [t, n] = x [t, k] W^T + bias, split by outputs. */
static void multiply(const cpu *c, float *y, const float *x, const cpu_weight *w, int64_t t,
                     int32_t n, int32_t k) {
#pragma omp parallel for num_threads(threads_for(c, t *n *k))
    for (int32_t j = 0; j < n; j += OUTPUTS_PER_TASK)
        ref_linear_lanes(y + j, n, x, k, w->value + (int64_t)j * k, k, w->bias ? w->bias + j : NULL,
                         t, i64_min(OUTPUTS_PER_TASK, n - j), k);
}

/* The values a linear with weight w multiplies with: x itself, or rows of it (`row`, NULL = all in
 * order) copied and quantised. */
static const float *linear_input(cpu *c, tensor x, const weight *w, const int32_t *row, int64_t t) {
    const act_format f = w->format == WF_16 ? AF_16 : c->precision.act;
    if (f == AF_16 && !row) return data(x);
    CHECK(w->k <= c->k_max);
    const int32_t group = w->format == WF_FP8B ? 128 : 0; /* ref_quant.h: beside WFP8b only */
#pragma omp parallel for num_threads(threads_for(c, t * w->k))
    for (int64_t i = 0; i < t; i++) {
        float *to = c->input + i * w->k;
        memcpy(to, data(x) + (row ? row[i] : i) * w->k, sizeof(float) * (size_t)w->k);
        ref_quantize_activation(to, 1, w->k, f, group);
    }
    return c->input;
}

static status cpu_linear(device *d, tensor out, tensor x, const weight *w) {
    cpu *c = self(d);
    CHECK(w->count == 1);
    CHECK(out.rows == x.rows);
    CHECK(out.cols == w->n);
    CHECK(x.cols == w->k);
    multiply(c, data(out), linear_input(c, x, w, NULL, x.rows), values(w), x.rows, w->n, w->k);
    return ST_OK;
}

static status cpu_rope_append(device *d, tensor qkv, const attention_layer *a) {
    cpu *c = self(d);
    const batch *b = c->b;
    const int32_t h = a->n_heads, g = a->n_kv_heads, dim = a->head_dim, half = dim / 2;
    CHECK(qkv.rows == b->n_tokens);
    CHECK(qkv.cols == (h + 2 * g) * dim);
    const float *q_gain = a->q_norm->n ? values(a->q_norm)->value : NULL;
    const float *k_gain = a->k_norm->n ? values(a->k_norm)->value : NULL;
#pragma omp parallel for num_threads(threads_for(c, qkv.rows *qkv.cols * 8))
    for (int64_t t = 0; t < qkv.rows; t++) {
        float *q = data(qkv) + t * qkv.cols, *k = q + (int64_t)h * dim, *v = k + (int64_t)g * dim;
        if (q_gain) ref_rmsnorm(q, q, q_gain, h, dim, a->norm_eps);
        if (k_gain) ref_rmsnorm(k, k, k_gain, g, dim, a->norm_eps);
        ref_rope(q, h + g, dim, c->cosine + t * half, c->sine + t * half); /* k follows q */
        const int32_t position = b->position[t];
        const int32_t *page = b->page + b->page_start[c->token_seq[t]];
        ref_kv_store(&c->kv[a->layer], page[position / KV_PAGE_TOKENS], position % KV_PAGE_TOKENS,
                     k, v);
    }
    return ST_OK;
}

static status cpu_attention(device *d, tensor out, tensor qkv, const attention_layer *a) {
    cpu *c = self(d);
    const batch *b = c->b;
    CHECK(out.rows == b->n_tokens);
    CHECK(out.cols == a->n_heads * a->head_dim);
    const float *sinks = a->sinks->n ? values(a->sinks)->value : NULL;
    const int32_t g = a->n_kv_heads;
    /* Dynamic: tasks of long contexts take longer. Scores, products with V and exponentials. */
#pragma omp parallel for collapse(2) schedule(dynamic)                                             \
    num_threads(threads_for(c, out.rows *out.cols * 2 * KV_PAGE_TOKENS))
    for (int32_t i = 0; i < c->n_tasks; i++) {
        for (int32_t head = 0; head < g; head++) {
            const attention_task *task = &c->task[i];
            const ref_attention_rows r = {.kv = &c->kv[a->layer],
                                          .page = b->page + b->page_start[task->seq],
                                          .kv_len = b->kv_len[task->seq],
                                          .kv_head = head,
                                          .ratio = a->n_heads / g,
                                          .n_tokens = task->n_tokens,
                                          .position = b->position[task->token],
                                          .window = a->window,
                                          .scale = a->scale,
                                          .q = data(qkv) + (int64_t)task->token * qkv.cols,
                                          .out = data(out) + (int64_t)task->token * out.cols,
                                          .q_stride = qkv.cols,
                                          .out_stride = out.cols,
                                          .sinks = sinks};
            ref_attention_paged(&r,
                                c->attention_scratch + omp_get_thread_num() * c->attention_floats);
        }
    }
    return ST_OK;
}

static status cpu_gated(device *d, tensor out, tensor gate_up, activation_kind kind, float limit) {
    CHECK(out.rows == gate_up.rows);
    CHECK(gate_up.cols == 2 * out.cols);
#pragma omp parallel for num_threads(threads_for(self(d), out.rows *out.cols * 16))
    for (int64_t r = 0; r < out.rows; r++) {
        float *y = data(out) + r * out.cols;
        const float *x = data(gate_up) + r * gate_up.cols;
        if (kind == ACT_SILU)
            ref_silu_gated(y, x, 1, out.cols);
        else
            ref_swiglu_oai_gated(y, x, 1, out.cols, limit);
    }
    return ST_OK;
}

/* --- Mixture of experts ----------------------------------------------------------------------- */

static status cpu_moe_route(device *d, tensor logits, int32_t top_k, route_kind kind,
                            bool normalise) {
    cpu *c = self(d);
    CHECK(logits.rows == c->b->n_tokens);
    CHECK(logits.cols == c->config.n_experts);
    CHECK(top_k == c->config.top_k);
    ref_moe_route(c->expert, c->expert_weight, data(logits), logits.rows, logits.cols, top_k,
                  kind == ROUTE_TOPK_SOFTMAX, normalise);
    ref_moe_permute(c->expert_start, c->slot_row, c->row_token, c->expert, logits.rows, logits.cols,
                    top_k);
    return ST_OK;
}

static status cpu_moe_linear(device *d, tensor out, tensor x, const weight *w, int32_t top_k,
                             bool gather) {
    cpu *c = self(d);
    CHECK(w->count == c->config.n_experts);
    CHECK(out.rows == (int64_t)c->b->n_tokens * top_k);
    CHECK(x.rows == (gather ? c->b->n_tokens : out.rows));
    CHECK(x.cols == w->k);
    CHECK(out.cols == w->n);
    const float *in = linear_input(c, x, w, gather ? c->row_token : NULL, out.rows);
    const cpu_weight *v = values(w);
    const int32_t n = w->n, k = w->k;
#pragma omp parallel for collapse(2) schedule(dynamic) num_threads(threads_for(c, out.rows *n *k))
    for (int32_t e = 0; e < w->count; e++) {
        for (int32_t j = 0; j < n; j += OUTPUTS_PER_TASK) {
            const int64_t row = c->expert_start[e], t = c->expert_start[e + 1] - row;
            ref_linear_lanes(data(out) + row * n + j, n, in + row * k, k,
                             v->value + ((int64_t)e * n + j) * k, k,
                             v->bias ? v->bias + (int64_t)e * n + j : NULL, t,
                             i64_min(OUTPUTS_PER_TASK, n - j), k);
        }
    }
    return ST_OK;
}

static status cpu_moe_combine(device *d, tensor out, tensor y, int32_t top_k) {
    cpu *c = self(d);
    CHECK(out.rows == c->b->n_tokens);
    CHECK(y.rows == out.rows * top_k);
    CHECK(y.cols == out.cols);
    ref_moe_combine(data(out), data(y), c->expert_weight, c->slot_row, out.rows, top_k, out.cols);
    return ST_OK;
}

static status cpu_all_reduce(device *d, tensor inout) {
    (void)d;
    (void)inout;
    return ST_OK;
}

/* --- Logits and tokens ------------------------------------------------------------------------ */

static status cpu_gather(device *d, tensor out, tensor x) {
    const batch *b = self(d)->b;
    CHECK(out.rows == b->n_samples);
    CHECK(out.cols == x.cols);
    for (int32_t i = 0; i < b->n_samples; i++) {
        CHECK(b->sample[i].row < x.rows);
        memcpy(data(out) + (int64_t)i * out.cols, data(x) + (int64_t)b->sample[i].row * x.cols,
               sizeof(float) * (size_t)out.cols);
    }
    return ST_OK;
}

static status cpu_sample(device *d, tensor logits) {
    cpu *c = self(d);
    const batch *b = c->b;
    CHECK(logits.rows == b->n_samples);
#pragma omp parallel for num_threads(threads_for(c, logits.rows *logits.cols * 8))
    for (int32_t i = 0; i < b->n_samples; i++) {
        const sample_row *s = &b->sample[i];
        c->result[i] = (sampled){.token = -1};
        if (!s->params) continue;
        const float *row = data(logits) + (int64_t)i * logits.cols;
        if (s->given)
            sampler_score(&c->result[i], row, logits.cols, *s->given, s->params->n_logprobs);
        else
            sampler_draw(&c->result[i], row, logits.cols, s->params, s->draw, s->history,
                         s->n_history,
                         c->sampler_scratch + (size_t)omp_get_thread_num() * c->sampler_size);
    }
    return ST_OK;
}

static status cpu_end(device *d, sampled *out, int64_t *cost_ns) {
    cpu *c = self(d);
    CHECK(c->b != NULL);
    memcpy(out, c->result, sizeof *out * (size_t)c->b->n_samples);
    *cost_ns = 0;
    c->b = NULL;
    return ST_OK;
}

static status cpu_read(device *d, tensor t, float *out) {
    (void)d;
    memcpy(out, t.data, sizeof(float) * (size_t)t.rows * (size_t)t.cols);
    return ST_OK;
}

static status cpu_observe(device *d, calibrate_sums *s, tensor x, const int32_t *row, int64_t n) {
    (void)d;
    return ref_calibrate.sums_add(s, x.data, DT_F32, row, n, NULL);
}

static void cpu_explain(device *d, const char *what, const weight *w, int64_t n_rows, char *buf,
                        size_t n) {
    const cpu *c = self(d);
    if (w && w->format != WF_16)
        snprintf(buf, n, "f32 values of W%s, %d threads", weight_format_text(w->format),
                 threads_for(c, n_rows * w->n * w->k));
    else if (w && (strstr(what, "linear") || !strcmp(what, "logits")))
        snprintf(buf, n, "f32, %d threads", threads_for(c, n_rows * w->n * w->k));
    else
        snprintf(buf, n, "f32");
}

const device_ops device_cpu = {
    .name = "cpu",
    .virtual_time = false,
    .has_logits = true,
    .open = cpu_open,
    .close = cpu_close,
    .memory = cpu_memory,
    .weight_load = cpu_weight_load,
    .setup = cpu_setup,
    .buffer = cpu_buffer,
    .begin = cpu_begin,
    .embed = cpu_embed,
    .norm = cpu_norm,
    .linear = cpu_linear,
    .rope_append = cpu_rope_append,
    .attention = cpu_attention,
    .gated = cpu_gated,
    .moe_route = cpu_moe_route,
    .moe_linear = cpu_moe_linear,
    .moe_combine = cpu_moe_combine,
    .all_reduce = cpu_all_reduce,
    .gather = cpu_gather,
    .logits = cpu_linear,
    .sample = cpu_sample,
    .end = cpu_end,
    .read = cpu_read,
    .explain = cpu_explain,
    .calibrate = &ref_calibrate,
    .observe = cpu_observe,
};
