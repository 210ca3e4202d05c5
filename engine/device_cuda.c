/* device_cuda.c - the operations of a step on one NVIDIA GPU.
 *
 * Memory is taken once: weights in one slab (cudev_load.c), then setup takes the KV pages, the
 * buffers and the tables of a step. A step brings a block of tables and a plan for each kind of
 * attention window over on a stream of its own, runs, copies the tokens back on another, and is
 * waited for once, in end.
 *
 * Two steps may be under way (device_ops.launch). Each has a slot: what it uploads, here and on the
 * device, so that one uploads while the other runs, and what comes back. One stream orders their
 * kernels, so that activations and KV pages need no second copy. The embedding of the second takes
 * tokens from where the first drew them.
 *
 * A step of decodes alone is padded to a number of rows of cudev_graph.c and runs as a CUDA graph:
 *
 *     begin: tables -> device      eager: launches | capture: launches recorded | replay: none
 *     launch: replay, capture: launch the graph; tokens -> host      end: wait
 *
 * Rows that pad a step belong to no sequence (token_seq -1): they are computed like others, append
 * nothing and draw nothing, and no other row reads them.
 *
 * No stream here waits for CUDA's default one, where cudaMemset and cudaMemcpy work, and the latter
 * returns before what it has read from pageable memory is on the device: all copies and fills are
 * asynchronous ones on the stream of what reads them, which have read pageable memory when they
 * return.
 *
 * Errors of execution surface in end. They leave a CUDA context unusable, so the device is dead
 * from there on and says the same thing whenever it is asked.
 *
 * This file runs one rank. With more, cudev_ranks.c has one of these for each GPU and does what
 * they do together. */
#include "cudev.h"

#include "activation.h"
#include "capacity.h"
#include "ceilings.h"
#include "fill.h"
#include "moe.h"
#include "norm.h"
#include "rows.h"
#include "sampler.h"

#include <cuda_runtime_api.h>
#include <string.h>

_Static_assert(sizeof(draw_result) == sizeof(sampled), "draw.h repeats request.h");
_Static_assert((int)DRAW_TOP_MAX == (int)LOGPROBS_MAX, "draw.h repeats request.h");

static cudev *self(device *d) { return cudev_self(d); }

static const cudev_weight *weight_of(const weight *w) {
    CHECK(w->n > 0);
    return w->data;
}

/* --- Opening -------------------------------------------------------------------------------- */

status cudev_count(int32_t *n_gpus) {
    int driver = 0, built = 0, count = 0;
    (void)cudaDriverGetVersion(&driver);
    (void)cudaRuntimeGetVersion(&built);
    const cudaError_t e = cudaGetDeviceCount(&count);
    if (driver == 0) return FAIL(ST_DEVICE, "no NVIDIA GPU: there is no driver");
    if (e == cudaErrorInsufficientDriver || (e != cudaSuccess && driver && driver < built))
        return FAIL(ST_DEVICE, "the NVIDIA driver supports CUDA %d.%d, this build needs %d.%d",
                    driver / 1000, driver % 1000 / 10, built / 1000, built % 1000 / 10);
    if (e != cudaSuccess || count == 0)
        return FAIL(ST_DEVICE, "no NVIDIA GPU: %s",
                    e != cudaSuccess ? cudaGetErrorString(e) : "the driver lists none");
    *n_gpus = count;
    return ST_OK;
}

/* The driver, a GPU, its age, and whether this build has code for it. */
static status probe(cudev *c) {
    int32_t count = 0;
    struct cudaDeviceProp p;
    TRY(cudev_count(&count));
    if (c->gpu >= count)
        return FAIL(ST_UNSUPPORTED, "tp %d needs as many GPUs, there are %d", c->base.options.tp,
                    count);
    CUDA_TRY(cudaGetDeviceProperties(&p, c->gpu), "GPU");
    snprintf(c->name, sizeof c->name, "%.63s", p.name);
    c->sm = p.major * 10 + p.minor;
    c->n_sms = p.multiProcessorCount;
    if (c->sm < 80)
        return FAIL(ST_UNSUPPORTED, "%s is sm_%d; kernels are built for sm_80 and later", c->name,
                    c->sm);
    CUDA_TRY(cudaSetDevice(c->gpu), c->name);
    CUDA_TRY(cudaStreamCreateWithFlags(&c->stream, cudaStreamNonBlocking), c->name);
    CUDA_TRY(cudaStreamCreateWithFlags(&c->front, cudaStreamNonBlocking), c->name);
    CUDA_TRY(cudaStreamCreateWithFlags(&c->back, cudaStreamNonBlocking), c->name);
    void *word;
    CUDA_TRY(cudaMalloc(&word, 4), c->name);
    status st = kernel_fill_noise(word, DT_F32, 1, 0, 0, 1, 0, c->stream);
    if (st == ST_OK) st = cudev_check((int)cudaStreamSynchronize(c->stream), c->name);
    (void)cudaFree(word);
    if (st == ST_OK) return ST_OK;
    return FAIL(ST_UNSUPPORTED, "this build has no kernels for %s (sm_%d): make CUDA_ARCH=%d",
                c->name, c->sm, c->sm);
}

status cudev_open(device **out, const device_options *o, int32_t rank) {
    cudev *c = mem_alloc(1, sizeof *c);
    if (!c) return FAIL(ST_NOMEM, "cuda device");
    c->base = (device){.ops = &device_cuda, .options = *o};
    c->gpu = c->rank = rank;
    c->family = o->kernel_family;
    c->staging.timed = o->time_loading;
    *out = &c->base;
    const status st = probe(c);
    if (st != ST_OK) {
        device_cuda.close(&c->base);
        *out = NULL;
    }
    return st;
}

static status cuda_open(device **out, const device_options *o) {
    return o->tp > 1 ? cudev_ranks_open(out, o) : cudev_open(out, o, 0);
}

static void close_slot(cudev_slot *s) {
    for (int32_t i = 0; i < CUDEV_PLANS_MAX; i++) {
        if (s->plan[i]) (void)cudaFreeHost(s->plan[i]);
        if (s->ahead[i]) (void)cudaFreeHost(s->ahead[i]);
    }
    if (s->tables) (void)cudaFreeHost(s->tables);
    if (s->edit) (void)cudaFreeHost(s->edit);
    if (s->result) (void)cudaFreeHost(s->result);
    if (s->uploaded) (void)cudaEventDestroy(s->uploaded);
    if (s->drawn) (void)cudaEventDestroy(s->drawn);
    if (s->done) (void)cudaEventDestroy(s->done);
}

static void cuda_close(device *d) {
    cudev *c = self(d);
    cudev_abandon_capture(c);
    if (c->captured) (void)cudaGraphDestroy(c->captured);
    if (c->stream) (void)cudaStreamSynchronize(c->stream);
    cudev_graphs_free(&c->graphs);
    cudev_load_done(c);
    cudev_slab_free(&c->weights);
    cudev_slab_free(&c->run);
    cudev_slab_free(&c->kv);
    for (int32_t i = 0; i < COUNT_OF(c->slot); i++) close_slot(&c->slot[i]);
    if (c->back) (void)cudaStreamSynchronize(c->back);
    if (c->back) (void)cudaStreamDestroy(c->back);
    if (c->front) (void)cudaStreamSynchronize(c->front);
    if (c->front) (void)cudaStreamDestroy(c->front);
    if (c->stream) (void)cudaStreamDestroy(c->stream);
    arena_close(&c->handles);
    mem_free(c->count);
    (void)cudaGetLastError();
    mem_free(c);
}

static status cuda_memory(device *d, int64_t *usable) {
    size_t free_bytes, all;
    CUDA_TRY(cudaMemGetInfo(&free_bytes, &all), self(d)->name);
    *usable = (int64_t)free_bytes;
    return ST_OK;
}

/* --- Setup ---------------------------------------------------------------------------------- */

static status take(cudev *c, int64_t bytes, const char *what, void *out) {
    return cudev_slab_take(&c->run, (size_t)bytes, what, out);
}

static status pinned(size_t bytes, void *out) {
    CUDA_TRY(cudaHostAlloc(out, bytes, cudaHostAllocDefault), "pinned memory");
    memset(*(void **)out, 0, bytes);
    return ST_OK;
}

/* Lay the tables of a step of these counts from `base` on; page comes last. */
static cudev_tables lay_tables(const uint8_t *base, int64_t t, int64_t s, int64_t samples,
                               int64_t pages) {
    cudev_tables x;
    size_t at = 0;
#define LAY(field, type, count)                                                                    \
    x.field = (const type *)(const void *)(base + at);                                             \
    at += (size_t)div_up((int64_t)sizeof(type) * (count), 16) * 16
    LAY(token, int32_t, t);
    LAY(position, int32_t, t);
    LAY(token_seq, int32_t, t);
    LAY(sample_row, int32_t, samples);
    LAY(draw, draw_row, samples);
    LAY(seq_start, int32_t, s + 1);
    LAY(kv_len, int32_t, s);
    LAY(page_start, int32_t, s + 1);
    LAY(page, int32_t, pages);
#undef LAY
    x.bytes = at;
    return x;
}

static status setup_kv(cudev *c) {
    const model_config *m = &c->config;
    int64_t bytes[MODEL_LAYERS_MAX], all = 0;
    for (int32_t i = 0; i < m->n_layers; i++) {
        const kv_pair f = precision_kv(&c->precision, i);
        c->cache[i] = (attention_cache){.k = (kv_format)f.k, .v = (kv_format)f.v};
        c->cache[i].page_bytes =
            attention_page_bytes(c->cache[i].k, c->cache[i].v, c->n_kv_heads, m->head_dim);
        bytes[i] = div_up(c->n_pages * c->cache[i].page_bytes, 256) * 256;
        all += bytes[i];
    }
    TRY(cudev_slab_reserve(&c->kv, (size_t)all, "KV pages"));
    for (int32_t i = 0; i < m->n_layers; i++) {
        TRY(cudev_slab_take(&c->kv, (size_t)bytes[i], "KV pages", &c->cache[i].base));
        if (c->base.options.kv_noise) {
            TRY(kernel_fill_finite(c->cache[i].base, bytes[i], (uint64_t)i, c->stream));
            continue;
        }
        /* All ones is NaN in every format: whoever reads past a sequence's end sees it. */
        CUDA_TRY(cudaMemsetAsync(c->cache[i].base, 0xff, (size_t)bytes[i], c->stream), "KV pages");
    }
    return ST_OK;
}

static status setup_rope(cudev *c) {
    const model_config *m = &c->config;
    const int32_t half = m->head_dim / 2;
    const int32_t ctx = c->ctx_max;
    double inv_freq[1024], factor;
    CHECK(half <= COUNT_OF(inv_freq));
    rope_frequencies(&m->rope, m->head_dim, inv_freq, &factor);
    void *frequency;
    TRY(take(c, (int64_t)sizeof(double) * half, "rotary table", &frequency));
    TRY(take(c, (int64_t)sizeof(float) * 2 * half * ctx, "rotary table", &c->rope));
    CUDA_TRY(cudaMemcpyAsync(frequency, inv_freq, sizeof(double) * (size_t)half,
                             cudaMemcpyHostToDevice, c->stream),
             "rotary table");
    return kernel_fill_angles(c->rope, frequency, factor, ctx, half, c->stream);
}

/* A plan for each window there is among the layers. */
static status setup_plans(cudev *c) {
    const model_config *m = &c->config;
    const int64_t bytes = attention_plan_bytes(c->max_seqs, c->max_tokens, c->max_page_ids);
    for (int32_t i = 0; i < m->n_layers; i++) {
        int32_t p = 0;
        const kv_pair f = precision_kv(&c->precision, i);
        const bool kv4 = f.k == KF_4 && f.v == KF_4;
        while (p < c->n_plans && c->plan[p].window != m->window[i]) p++;
        if (p < c->n_plans) {
            c->plan[p].kv4 = c->plan[p].kv4 && kv4;
            continue;
        }
        if (p == CUDEV_PLANS_MAX)
            return FAIL(ST_UNSUPPORTED, "more than %d different windows", CUDEV_PLANS_MAX);
        for (int32_t j = 0; j < COUNT_OF(c->slot); j++) {
            TRY(pinned((size_t)bytes, &c->slot[j].plan[p]));
            TRY(take(c, bytes, "attention plan", &c->slot[j].plan_device[p]));
            TRY(pinned(sizeof(attention_ahead), &c->slot[j].ahead[p]));
            TRY(take(c, sizeof(attention_ahead), "attention plan", &c->slot[j].ahead_device[p]));
        }
        c->plan[p].window = m->window[i];
        c->plan[p].kv4 = kv4;
        c->n_plans++;
    }
    return ST_OK;
}

/* options.dequant_first: is this weight written out at 16 bit before each product with it? */
static bool expanded_first(const cudev *c, const linear_weight *w) {
    return c->base.options.dequant_first && w->format != WF_16 && w->act == AF_16;
}

static linear_weight expanded_of(const cudev *c, const linear_weight *w) {
    return (linear_weight){.format = WF_16,
                           .type = w->type,
                           .n = w->n,
                           .k = w->k,
                           .count = w->count,
                           .gated = w->gated,
                           .act = AF_16,
                           .family = w->family,
                           .code = c->expanded,
                           .bias = w->bias};
}

static status setup_spaces(cudev *c, int64_t rows) {
    const model_config *m = &c->config;
    int64_t linear = 0, expanded = 0;
    for (int32_t i = 0; i < c->n_all; i++) { /* experts take their inputs from tokens, or slots */
        const linear_weight *w = &c->all[i]->linear;
        const int64_t x = c->all[i]->field == WEIGHT_experts_down ? rows : c->max_tokens;
        linear = i64_max(linear, linear_workspace_bytes(w, (int32_t)x, c->n_sms));
        if (!expanded_first(c, w)) continue;
        const linear_weight wide = expanded_of(c, w);
        int64_t codes, scales;
        TRY(linear_pack_bytes(&wide, &codes, &scales));
        expanded = i64_max(expanded, codes);
    }
    if (expanded) TRY(take(c, expanded, "a weight at 16 bit", &c->expanded));
    const int64_t attention =
        attention_workspace_bytes(c->max_seqs, c->max_page_ids, c->n_heads, m->head_dim);
    TRY(take(c, linear + 256, "workspace of linears", &c->linear_space));
    TRY(take(c, attention + 256, "workspace of attention", &c->attention_space));
    c->wide_pages =
        wide_pages(m, &c->precision, c->base.options.tp, c->max_tokens, c->ctx_max, c->n_pages);
    const int64_t wide = attention_page_bytes(KF_16, KF_16, c->n_kv_heads, m->head_dim);
    if (c->wide_pages) TRY(take(c, c->wide_pages * wide, "pages at 16 bit", &c->wide_space));
    CUDA_TRY(cudaMemsetAsync(c->linear_space, 0, (size_t)linear + 256, c->stream), "workspace");
    CUDA_TRY(cudaMemsetAsync(c->attention_space, 0, (size_t)attention + 256, c->stream),
             "workspace");
    return ST_OK;
}

static int64_t told_bytes(const cudev *c) {
    return 4 * LINEAR_TOLD * MOE_TOLD_TOKENS * (int64_t)c->config.top_k;
}

/* Of a token, of 16 bits: x, and h and y of its experts. */
static int32_t words_of(const cudev *c) {
    return c->config.dim + c->config.top_k * (c->config.expert_dim + c->config.dim);
}
static int64_t words_bytes(const cudev *c) { return 2 * LINEAR_WORD_ROWS * (int64_t)words_of(c); }
/* Of this layer, and of those before and behind it. */
static uint16_t *words_of_layer(const cudev *c, int32_t other) {
    return c->words[(c->layer + other) & 1];
}

static status clear_words(const cudev *c) {
    for (int32_t i = 0; i < 2; i++)
        CUDA_TRY(cudaMemsetAsync(c->words[i], 0, (size_t)words_bytes(c), c->stream), "routing");
    return ST_OK;
}

/* Zeros, as moe_leave leaves them. */
static status clear_told(const cudev *c) {
    if (!c->told) return ST_OK;
    TRY(clear_words(c));
    return cudev_check((int)cudaMemsetAsync(c->told, 0, (size_t)told_bytes(c), c->stream),
                       "routing");
}

static status setup_tables(cudev *c, int64_t rows) {
    const model_config *m = &c->config;
    const cudev_tables x =
        lay_tables(NULL, c->max_tokens, c->max_seqs, c->max_samples, c->max_page_ids);
    c->count = mem_alloc((size_t)sampler_counts(m->vocab), sizeof *c->count);
    if (!c->count) return FAIL(ST_NOMEM, "penalties");
    const size_t drawn = sizeof(draw_result) * (size_t)c->max_samples;
    TRY(take(c, COUNT_OF(c->slot) * (int64_t)drawn, "tokens", &c->drawn));
    for (int32_t i = 0; i < COUNT_OF(c->slot); i++) {
        cudev_slot *slot = &c->slot[i];
        TRY(pinned(x.bytes, &slot->tables));
        TRY(take(c, (int64_t)x.bytes, "tables", &slot->tables_device));
        TRY(pinned(drawn, &slot->result));
        CUDA_TRY(cudaEventCreateWithFlags(&slot->uploaded, cudaEventDisableTiming), "event");
        CUDA_TRY(cudaEventCreateWithFlags(&slot->drawn, cudaEventDisableTiming), "event");
        CUDA_TRY(cudaEventCreateWithFlags(&slot->done, cudaEventDisableTiming), "event");
    }
    if (m->n_experts == 0) return ST_OK;
    TRY(take(c, 4 * rows, "routing", &c->expert));
    TRY(take(c, 4 * rows, "routing", &c->expert_weight));
    TRY(take(c, 4 * rows, "routing", &c->slot_row));
    TRY(take(c, 4 * rows, "routing", &c->row_token));
    TRY(take(c, told_bytes(c), "routing", &c->told));
    for (int32_t i = 0; i < 2; i++) TRY(take(c, words_bytes(c), "routing", &c->words[i]));
    TRY(clear_told(c));
    return take(c, 4 * (int64_t)(m->n_experts + 1), "routing", &c->expert_start);
}

static status cuda_setup(device *d, const device_setup *s) {
    cudev *c = self(d);
    CHECK(!c->ready);
    c->config = *s->config;
    c->precision = *s->precision;
    c->max_tokens = s->max_tokens;
    c->max_seqs = s->max_seqs;
    c->max_samples = s->max_samples;
    c->n_pages = s->n_pages;
    const model_config *m = &c->config;
    const int32_t tp = d->options.tp;
    c->n_heads = m->n_heads / tp;
    c->n_kv_heads = model_kv_heads(m, tp);
    const int64_t rows = (int64_t)s->max_tokens * (m->n_experts ? m->top_k : 1);
    const int32_t ctx = s->ctx_max > 0 && s->ctx_max < m->ctx_max ? s->ctx_max : m->ctx_max;
    c->ctx_max = (int32_t)i64_min(ctx, (int64_t)s->n_pages * KV_PAGE_TOKENS);
    c->max_page_ids = s->max_seqs * div_up(c->ctx_max, KV_PAGE_TOKENS);
    CUDA_TRY(cudaStreamSynchronize(c->stream), "weights");
    cudev_load_done(c);
    /* Buffers follow: reserve for them too. Logits and router logits are f32 here, and CTAs share
     * sums: those of linears up to half a megabyte an SM, of attention some megabytes. */
    const int64_t expected = workspace_bytes(m, s->precision, tp, s->max_tokens, s->max_seqs,
                                             s->max_samples, s->n_pages) +
                             2 * (int64_t)s->max_tokens * m->n_experts + ((int64_t)128 << 20);
    TRY(cudev_slab_reserve(&c->run, (size_t)expected, "workspace"));
    TRY(setup_rope(c));
    TRY(setup_plans(c));
    TRY(setup_spaces(c, rows));
    TRY(setup_tables(c, rows));
    TRY(setup_kv(c));
    cudev_graphs_plan(&c->graphs, s->max_seqs, c->base.options.no_graphs);
    CUDA_TRY(cudaStreamSynchronize(c->stream), "setup");
    c->ready = true;
    return ST_OK;
}

/* Logits and router logits are f32, and known by their width; a buffer of another kind that is as
 * wide merely has room to spare, because operations say which type they write. */
static status cuda_buffer(device *d, int64_t n_rows, int32_t cols, tensor *out) {
    cudev *c = self(d);
    CHECK(c->n_buffers < CUDEV_BUFFERS_MAX);
    const bool wide = cols == c->config.vocab || cols == c->config.n_experts;
    const int64_t stride = wide ? cudev_linear_rows(cols) : cols;
    const size_t bytes = (size_t)(n_rows * stride) * (wide ? 4 : 2);
    void *p;
    TRY(take(c, (int64_t)bytes, "activations", &p));
    CUDA_TRY(cudaMemsetAsync(p, 0, bytes, c->stream), "activations");
    c->buffer[c->n_buffers++] =
        (cudev_buffer){.data = p, .bytes = bytes, .type = wide ? DT_F32 : c->type};
    *out = (tensor){.data = p, .rows = n_rows, .cols = cols};
    return ST_OK;
}

/* --- A step: tables ------------------------------------------------------------------------- */

static void put(const int32_t *to, const int32_t *from, int64_t n) {
    memcpy((int32_t *)(uintptr_t)to, from, sizeof *from * (size_t)n);
}

/* Room for all edits of the step: a row seldom has any, then some hundreds, and one of a long
 * history as many as the vocabulary has tokens. */
static status reserve_edits(const cudev *c) {
    const batch *b = c->b;
    int64_t n = 0;
    for (int32_t i = 0; i < b->n_samples; i++) {
        const sample_row *s = &b->sample[i];
        if (s->params) n += sampler_edits_most(s->params, s->draw, s->n_history, c->config.vocab);
    }
    if (n <= c->at->n_edits_max) return ST_OK;
    if (c->at->edit) CUDA_TRY(cudaFreeHost(c->at->edit), "penalties");
    c->at->edit = NULL;
    c->at->n_edits_max = 0;
    TRY(pinned(sizeof(draw_edit) * 2 * (size_t)n, &c->at->edit));
    c->at->n_edits_max = 2 * n;
    return ST_OK;
}

/* What a step draws stays while the next one draws: the host has it before the one after begins. */
static int32_t drawn_at(const cudev *c, int64_t step) {
    return (int32_t)(step & 1) * c->max_samples;
}

static draw_result *drawn_by(const cudev *c, int64_t step) { return c->drawn + drawn_at(c, step); }

/* How sample i is drawn; its edits go to `edit`. */
static draw_row draw_of(const cudev *c, const sample_row *s, draw_edit *edit) {
    const sampling *p = s->params;
    if (!p) return (draw_row){.n_logprobs = -1};
    if (s->given)
        return (draw_row){.n_logprobs = p->n_logprobs, .kind = DRAW_GIVEN, .given = *s->given};
    draw_row r = {.temperature = p->temperature,
                  .top_p = p->top_p,
                  .min_p = p->min_p,
                  .repetition_penalty = p->repetition_penalty,
                  .presence_penalty = p->presence_penalty,
                  .frequency_penalty = p->frequency_penalty,
                  .top_k = p->top_k,
                  .n_logprobs = p->n_logprobs,
                  .kind = DRAW_TOKEN,
                  .edit = edit,
                  .seed = p->seed,
                  .counter = s->draw};
    r.n_edits = sampler_edits(edit, &r.n_bias, p, s->draw, s->history, s->n_history,
                              c->config.vocab, c->count);
    const int32_t last = s->n_history ? s->history[s->n_history - 1] : 0;
    if (last < 0 && sampling_penalises(p)) r.last = last - drawn_at(c, c->n_begun - 1);
    return r;
}

/* Fill the host's tables for `rows` tokens, sequences and samples as padded. */
static cudev_tables fill_tables(const cudev *c, int32_t t, int32_t s, int32_t samples) {
    const batch *b = c->b;
    draw_edit *edit = c->at->edit;
    const int32_t n_pages = b->page_start[b->n_seqs];
    const cudev_tables h = lay_tables(c->at->tables, t, s, samples, n_pages);
    int32_t *seq = (int32_t *)(uintptr_t)h.token_seq, *row = (int32_t *)(uintptr_t)h.sample_row;
    draw_row *draw = (draw_row *)(uintptr_t)h.draw;
    memset(c->at->tables, 0, (size_t)((const uint8_t *)h.page - c->at->tables));
    put(h.token, b->token, b->n_tokens);
    put(h.position, b->position, b->n_tokens);
    put(h.seq_start, b->seq_start, b->n_seqs + 1);
    put(h.kv_len, b->kv_len, b->n_seqs);
    put(h.page_start, b->page_start, b->n_seqs + 1);
    put(h.page, b->page, n_pages);
    for (int32_t i = 0; i < b->n_seqs; i++)
        for (int32_t k = b->seq_start[i]; k < b->seq_start[i + 1]; k++) seq[k] = i;
    for (int32_t k = b->n_tokens; k < t; k++) seq[k] = -1;
    for (int32_t i = 0; i < b->n_samples; i++) {
        row[i] = b->sample[i].row;
        draw[i] = draw_of(c, &b->sample[i], edit);
        edit += draw[i].n_edits;
    }
    for (int32_t i = 0; i < samples; i++) draw[i].to = drawn_at(c, c->n_begun) + i;
    return h;
}

/* Padding rows count as decodes of no sequence, so that a graph's launches do not depend on how
 * many there are; the plan, made from the host's tables, knows the real ones only. */
static attention_batch attention_of(const cudev *c, const cudev_tables *x, bool padded) {
    return (attention_batch){.n_seqs = padded ? c->rows : c->b->n_seqs,
                             .n_tokens = padded ? c->rows : c->b->n_tokens,
                             .n_decodes = padded ? c->rows : c->b->n_decodes,
                             .position = x->position,
                             .seq_start = x->seq_start,
                             .token_seq = x->token_seq,
                             .kv_len = x->kv_len,
                             .page_start = x->page_start,
                             .page = x->page};
}

static status upload(const cudev *c, void *to, const void *from, int64_t bytes) {
    CUDA_TRY(cudaMemcpyAsync(to, from, (size_t)bytes, cudaMemcpyHostToDevice, c->front), "tables");
    return ST_OK;
}

/* Do linears of this step ask for what attention will read? Mixtures have not been timed. */
static bool asks_ahead(const cudev *c) {
    return c->graph && c->rows > 8 && c->rows <= 64 && c->sm == 90 && c->config.n_experts == 0;
}

/* The step that last read what this one writes is over, for begin has seen to it that at most one
 * other is under way: nothing on the device is waited for. */
static status upload_step(cudev *c) {
    const batch *b = c->b;
    const bool padded = c->graph != NULL;
    const int32_t s = padded ? c->rows : b->n_seqs, samples = padded ? c->rows : b->n_samples;
    cudev_slot *at = c->at;
    TRY(reserve_edits(c));
    const cudev_tables h = fill_tables(c, c->rows, s, samples);
    c->tables = lay_tables(at->tables_device, c->rows, s, samples, b->page_start[b->n_seqs]);
    TRY(upload(c, at->tables_device, at->tables, (int64_t)h.bytes));
    const model_config *m = &c->config;
    const attention_batch a = attention_of(c, &h, false);
    for (int32_t i = 0; i < c->n_plans; i++) {
        attention_work *w = &c->plan[i].work;
        w->plan = at->plan_device[i];
        TRY(attention_plan_make(at->plan[i], &w->counts, &a, c->n_heads, c->n_kv_heads, m->head_dim,
                                c->plan[i].window, c->plan[i].kv4, c->wide_pages, c->n_sms));
        TRY(upload(c, at->plan_device[i], at->plan[i], w->counts.bytes));
        if (!asks_ahead(c)) continue;
        TRY(upload(c, at->ahead_device[i], at->ahead[i],
                   attention_ahead_make(at->ahead[i], at->plan[i], h.page, c->n_heads,
                                        c->n_kv_heads, m->head_dim, c->n_sms)));
    }
    CUDA_TRY(cudaEventRecord(at->uploaded, c->front), "tables");
    CUDA_TRY(cudaStreamWaitEvent(c->stream, at->uploaded, 0), "tables");
    return ST_OK;
}

/* --- A step: beginning and end -------------------------------------------------------------- */

static status dead(const cudev *c) { return FAIL(ST_DEVICE, "%s", c->why); }

/* What execution left behind. The first failure is remembered: the context is lost with it. */
static status finished(cudev *c, int64_t step, cudaError_t e) {
    if (e == cudaSuccess) return ST_OK;
    c->dead = true;
    snprintf(c->why, sizeof c->why, "%s: %s (in or before step %lld)", c->name,
             cudaGetErrorString(e), (long long)step);
    return dead(c);
}

static int32_t cuda_padded_rows(device *d, int32_t rows) {
    const cudev_graph *g = cudev_graphs_find(&self(d)->graphs, rows);
    return g ? g->n_rows : rows;
}

/* A step of decodes of which each draws: what graphs are for. */
static bool decodes_alone(const batch *b) {
    if (b->n_decodes != b->n_seqs || b->n_samples != b->n_seqs) return false;
    for (int32_t i = 0; i < b->n_samples; i++)
        if (!b->sample[i].params) return false;
    return true;
}

void cudev_abandon_capture(cudev *c) {
    if (!c->b || c->mode != STEP_CAPTURE) return;
    cudaGraph_t graph = NULL;
    (void)cudaStreamEndCapture(c->stream, &graph);
    if (graph) (void)cudaGraphDestroy(graph);
    (void)cudaGetLastError();
    c->mode = STEP_EAGER;
}

/* The graph of this step, of its number of rows and its slot. */
static cudev_graph_exec *exec_of(const cudev *c) { return &c->graph->exec[c->n_begun & 1]; }

static status cuda_begin(device *d, const batch *b) {
    cudev *c = self(d);
    CHECK(c->ready);
    if (c->dead) return dead(c);
    if (c->b) { /* refused midway: what runs, and copies, may still read what is made now */
        cudev_abandon_capture(c);
        TRY(clear_told(c)); /* moe_leave may not have come */
        CUDA_TRY(cudaStreamSynchronize(c->stream), "an abandoned step");
        CUDA_TRY(cudaStreamSynchronize(c->front), "an abandoned step");
    }
    batch_check(b, c->max_tokens, c->max_seqs, c->max_samples, c->n_pages);
    CHECK(b->page_start[b->n_seqs] <= c->max_page_ids);
    for (int32_t t = 0; t < b->n_tokens; t++) {
        CHECK(b->token[t] < c->config.vocab);
        CHECK(b->token[t] >= -c->slot[~c->n_begun & 1].n_samples);
        CHECK(b->position[t] < c->ctx_max);
    }
    CHECK(c->n_begun - c->n_ended < COUNT_OF(c->slot));
    c->joined = false;
    c->b = b;
    c->at = &c->slot[c->n_begun & 1];
    c->at->step = b->step;
    c->at->n_samples = b->n_samples;
    c->graph = decodes_alone(b) ? cudev_graphs_find(&c->graphs, b->n_seqs) : NULL;
    c->rows = c->graph ? c->graph->n_rows : b->n_tokens;
    c->mode = STEP_EAGER;
    c->layer = 0;
    TRY(upload_step(c));
    if (!c->graph || c->graphs.off) return ST_OK;
    if (*exec_of(c)) {
        c->mode = STEP_REPLAY;
    } else if (c->graph->n_runs++ > 0) {
        CUDA_TRY(cudaStreamBeginCapture(c->stream, cudaStreamCaptureModeThreadLocal), "capture");
        c->mode = STEP_CAPTURE;
    }
    return ST_OK;
}

status cudev_end_capture(cudev *c) {
    if (c->mode != STEP_CAPTURE) return ST_OK;
    c->mode = STEP_REPLAY;
    return cudev_check((int)cudaStreamEndCapture(c->stream, &c->captured), "capture");
}

status cudev_make_graph(cudev *c) {
    if (!c->captured) return ST_OK;
    const cudaError_t e = cudaGraphInstantiate(exec_of(c), c->captured, 0);
    (void)cudaGraphDestroy(c->captured);
    c->captured = NULL;
    return cudev_check((int)e, "graph");
}

static status cuda_launch(device *d) {
    cudev *c = self(d);
    CHECK(c->b != NULL);
    const size_t bytes = sizeof(draw_result) * (size_t)c->b->n_samples;
    TRY(cudev_end_capture(c));
    TRY(cudev_make_graph(c));
    c->b = NULL;
    if (c->mode == STEP_REPLAY) CUDA_TRY(cudaGraphLaunch(*exec_of(c), c->stream), "graph");
    c->mode = STEP_EAGER;
    CUDA_TRY(cudaEventRecord(c->at->drawn, c->stream), "tokens");
    CUDA_TRY(cudaStreamWaitEvent(c->back, c->at->drawn, 0), "tokens");
    if (bytes)
        CUDA_TRY(cudaMemcpyAsync(c->at->result, drawn_by(c, c->n_begun), bytes,
                                 cudaMemcpyDeviceToHost, c->back),
                 "tokens");
    CUDA_TRY(cudaEventRecord(c->at->done, c->back), "tokens");
    c->n_begun++;
    return ST_OK;
}

status cudev_poll(cudev *c, bool *over) {
    if (c->dead) return dead(c);
    CHECK(c->n_ended < c->n_begun);
    const cudev_slot *s = &c->slot[c->n_ended & 1];
    const cudaError_t e = cudaEventQuery(s->done);
    *over = e != cudaErrorNotReady;
    return *over ? finished(c, s->step, e) : ST_OK;
}

static status cuda_end(device *d, sampled *out, int64_t *cost_ns) {
    cudev *c = self(d);
    if (c->dead) return dead(c);
    CHECK(c->n_ended < c->n_begun);
    const cudev_slot *s = &c->slot[c->n_ended & 1];
    c->n_ended++;
    TRY(finished(c, s->step, cudaEventSynchronize(s->done)));
    memcpy(out, s->result, sizeof *out * (size_t)s->n_samples);
    *cost_ns = 0;
    return ST_OK;
}

/* --- A step: operations --------------------------------------------------------------------- */

static int64_t rows_of(const cudev *c, tensor t) { return cudev_rows(c, t.rows); }

static int32_t plan_of(const cudev *c, int32_t window) {
    int32_t p = 0;
    while (p < c->n_plans && c->plan[p].window != window) p++;
    CHECK(p < c->n_plans); /* setup_plans has seen all layers */
    return p;
}

/* A layer's linears of INT4 bring a quarter each of what the next attention reads some time after
 * it begins: with so few rows they leave memory idle (LADDER_steps.md). */
static linear_ahead ahead_of(const cudev *c, const cudev_weight *w) {
    static const weight_field fields[] = {WEIGHT_o, WEIGHT_gate_up, WEIGHT_down, WEIGHT_qkv};
    int32_t part = 0;
    while (part < COUNT_OF(fields) && fields[part] != w->field) part++;
    if (!asks_ahead(c) || part == COUNT_OF(fields) || c->layer == c->config.n_layers ||
        w->linear.format != WF_INT4)
        return (linear_ahead){0};
    linear_ahead a = attention_ahead_of(c->at->ahead_device[plan_of(c, c->config.window[c->layer])],
                                        &c->cache[c->layer], c->n_kv_heads, c->config.head_dim);
    a.part = part;
    a.parts = COUNT_OF(fields);
    return a;
}

static linear_problem problem_of(const cudev *c, const cudev_weight *cw, int64_t m) {
    CHECK(cw->linear.format != WF_COUNT);
    return (linear_problem){.w = &cw->linear,
                            .m = (int32_t)m,
                            .ldx = cw->linear.k,
                            .ldy = cw->linear.n,
                            .y_type = cudev_linear_type(c, cw->field),
                            .act = cw->linear.act,
                            .epilogue = LINEAR_STORE,
                            .apart = true,
                            .ahead = ahead_of(c, cw),
                            .workspace = c->linear_space,
                            .sm = c->sm,
                            .n_sms = c->n_sms};
}

/* p as one of experts: its rows are those that moe_route found for x's tokens, or slots. */
static void group(const cudev *c, linear_problem *p, tensor x, bool gather) {
    p->expert_start = c->expert_start;
    p->x_row = gather ? c->row_token : NULL;
    p->x_rows = (int32_t)rows_of(c, x);
}

/* What the next linear of x, whose weight is a layer's field, wants x to become: layers are alike,
 * so the first one's says. */
static activation_codes codes_for(cudev *c, const weight *norm, tensor x) {
    const weight_field f = weight_of(norm)->field;
    c->coded_x = NULL;
    c->coded = f == WEIGHT_attn_norm     ? WEIGHT_qkv
               : c->config.n_experts > 0 ? WEIGHT_experts_gate_up
                                         : WEIGHT_gate_up;
    if (f != WEIGHT_attn_norm && f != WEIGHT_ffn_norm) return (activation_codes){0};
    for (int32_t i = 0; i < c->n_all; i++) {
        if (c->all[i]->field != c->coded) continue;
        const bool experts = c->coded == WEIGHT_experts_gate_up;
        linear_problem p =
            problem_of(c, c->all[i], rows_of(c, x) * (experts ? c->config.top_k : 1));
        if (experts) group(c, &p, x, true);
        const activation_codes codes = linear_x_codes(&p);
        if (experts && !codes.code) break; /* values would stand in place of the router's x */
        if (codes.act != AF_16) c->coded_x = x.data;
        return codes;
    }
    return (activation_codes){0};
}

/* Has the kernel before made of x what w's linear wants? Codes are gone after the next linear that
 * takes codes or values of them; the router does not. */
static bool coded(cudev *c, const cudev_weight *w, const void *x) {
    if (w->linear.act == AF_16) return false;
    const bool is = c->coded_x == x && c->coded == w->field;
    c->coded_x = NULL;
    return is;
}

static status cuda_embed(device *d, tensor out, tensor residual, const weight *table,
                         const weight *w, float eps) {
    cudev *c = self(d);
    CHECK(out.rows == c->b->n_tokens && residual.rows == out.rows);
    CHECK(out.cols == table->k && residual.cols == out.cols && w->k == out.cols);
    if (cudev_replayed(c)) return ST_OK;
    const activation_codes codes = codes_for(c, w, out);
    return kernel_norm_embed(out.data, residual.data, weight_of(table)->plain, c->tables.token,
                             drawn_by(c, c->n_begun - 1), weight_of(w)->plain, rows_of(c, out),
                             out.cols, eps, c->type, &codes, c->stream);
}

static status cuda_norm(device *d, tensor out, tensor residual, tensor add, const weight *w,
                        float eps) {
    cudev *c = self(d);
    CHECK(out.rows == residual.rows);
    CHECK(out.cols == residual.cols);
    CHECK(w->k == out.cols);
    CHECK(add.rows == out.rows);
    if (cudev_replayed(c)) return ST_OK;
    const activation_codes codes = codes_for(c, w, out);
    return kernel_norm_add(out.data, residual.data, add.data, weight_of(w)->plain, rows_of(c, out),
                           out.cols, eps, c->type, &codes, c->stream);
}

static status launch_linear(const cudev *c, linear_problem p) {
    if (!expanded_first(c, p.w)) return kernel_linear(&p, c->stream);
    const linear_weight wide = expanded_of(c, p.w);
    TRY(linear_expand(&wide, p.w, c->stream));
    p.w = &wide;
    return kernel_linear(&p, c->stream);
}

status cudev_linear_to(cudev *c, void *y, tensor x, const weight *w) {
    CHECK(w->count == 1);
    CHECK(x.cols == w->k);
    if (cudev_replayed(c)) return ST_OK;
    linear_problem p = problem_of(c, weight_of(w), rows_of(c, x));
    p.x = x.data;
    p.x_coded = coded(c, weight_of(w), x.data);
    p.y = y;
    return launch_linear(c, p);
}

static status cuda_linear(device *d, tensor out, tensor x, const weight *w) {
    CHECK(out.rows == x.rows);
    CHECK(out.cols == w->n);
    return cudev_linear_to(self(d), out.data, x, w);
}

static status cuda_linear_gated(device *d, tensor out, tensor x, const weight *gate_up,
                                activation_kind kind, float limit) {
    cudev *c = self(d);
    CHECK(gate_up->count == 1);
    CHECK(out.rows == x.rows);
    CHECK(2 * out.cols == gate_up->n);
    CHECK(x.cols == gate_up->k);
    if (cudev_replayed(c)) return ST_OK;
    linear_problem p = problem_of(c, weight_of(gate_up), rows_of(c, x));
    p.x = x.data;
    p.x_coded = coded(c, weight_of(gate_up), x.data);
    p.y = out.data;
    p.ldy = out.cols;
    p.epilogue = kind == ACT_SILU ? LINEAR_GATED : LINEAR_GATED_OAI;
    p.limit = limit;
    return launch_linear(c, p);
}

static attention_layer_params params_of(const cudev *c, const attention_layer *a) {
    return (attention_layer_params){.type = c->type,
                                    .n_heads = a->n_heads,
                                    .n_kv_heads = a->n_kv_heads,
                                    .head_dim = a->head_dim,
                                    .window = a->window,
                                    .scale = a->scale,
                                    .norm_eps = a->norm_eps,
                                    .q_norm = a->q_norm->n ? weight_of(a->q_norm)->plain : NULL,
                                    .k_norm = a->k_norm->n ? weight_of(a->k_norm)->plain : NULL,
                                    .sinks = a->sinks->n ? weight_of(a->sinks)->plain : NULL,
                                    .rope_cos_sin = c->rope};
}

static status cuda_rope_append(device *d, tensor qkv, const attention_layer *a) {
    cudev *c = self(d);
    CHECK(qkv.rows == c->b->n_tokens);
    CHECK(qkv.cols == (a->n_heads + 2 * a->n_kv_heads) * a->head_dim);
    if (cudev_replayed(c)) return ST_OK;
    const attention_layer_params l = params_of(c, a);
    const attention_batch b = attention_of(c, &c->tables, c->graph != NULL);
    return kernel_rope_append(qkv.data, &l, &c->cache[a->layer], &b, c->stream);
}

static status cuda_attention(device *d, tensor out, tensor qkv, const attention_layer *a) {
    cudev *c = self(d);
    CHECK(out.rows == c->b->n_tokens);
    CHECK(out.cols == a->n_heads * a->head_dim);
    if (cudev_replayed(c)) return ST_OK;
    const attention_layer_params l = params_of(c, a);
    const attention_batch b = attention_of(c, &c->tables, c->graph != NULL);
    c->layer = a->layer + 1;
    attention_work w = c->plan[plan_of(c, a->window)].work;
    w.workspace = c->attention_space;
    w.wide = c->wide_space;
    return kernel_attention(out.data, qkv.data, &l, &c->cache[a->layer], &b, &w, NULL, c->family,
                            c->sm, c->n_sms, c->stream);
}

static status cuda_ceilings(device *d, double *read_bytes_per_s, double *matrix_flops) {
    cudev *c = self(d);
    return ceilings_measure(read_bytes_per_s, matrix_flops, c->type, c->n_sms, c->stream);
}

static status cuda_gated(device *d, tensor out, tensor gate_up, activation_kind kind, float limit) {
    cudev *c = self(d);
    CHECK(out.rows == gate_up.rows);
    CHECK(gate_up.cols == 2 * out.cols);
    if (cudev_replayed(c)) return ST_OK;
    return kernel_gated(out.data, gate_up.data, rows_of(c, out), out.cols,
                        kind == ACT_SILU ? GATED_SILU : GATED_OAI, limit, c->type, c->stream);
}

static status cuda_moe_route(device *d, tensor logits, int32_t top_k, route_kind kind,
                             bool normalise) {
    cudev *c = self(d);
    CHECK(logits.rows == c->b->n_tokens);
    CHECK(logits.cols == c->config.n_experts);
    CHECK(top_k == c->config.top_k);
    c->is_told = false;
    if (cudev_replayed(c)) return ST_OK;
    const int64_t t = rows_of(c, logits);
    return kernel_moe_sort(c->expert_start, c->slot_row, c->row_token, c->expert, c->expert_weight,
                           logits.data, t, logits.cols, top_k, kind == ROUTE_TOPK_SOFTMAX,
                           normalise, cudev_linear_rows(logits.cols), DT_F32, c->stream);
}

/* The rest of a problem whose rows are those that moe_route found; of tokens where gathered. */
static linear_problem of_experts(cudev *c, const cudev_weight *cw, linear_problem p, tensor out,
                                 tensor x, int32_t top_k, bool gather) {
    CHECK(out.rows == (int64_t)c->b->n_tokens * top_k);
    CHECK(x.rows == (gather ? c->b->n_tokens : out.rows));
    CHECK(x.cols == p.w->k);
    p.x = x.data;
    p.y = out.data;
    p.ldy = out.cols;
    group(c, &p, x, gather);
    p.x_coded = coded(c, cw, x.data);
    p.routed = !gather; /* down: gate and up come before */
    p.told = c->is_told ? c->told : NULL;
    return p;
}

/* Are gate_up and down of so many tokens one launch? Layers are alike, so the first one's says. */
static bool joins(const cudev *c, int64_t n_tokens) {
    static const int32_t some; /* not read */
    const linear_weight *up = NULL, *down = NULL;
    for (int32_t i = 0; i < c->n_all && !(up && down); i++) {
        if (c->all[i]->field == WEIGHT_experts_gate_up) up = &c->all[i]->linear;
        if (c->all[i]->field == WEIGHT_experts_down) down = &c->all[i]->linear;
    }
    if (!up || !down || c->config.activation != ACT_SILU || expanded_first(c, up)) return false;
    const linear_problem p = {.w = up,
                              .m = (int32_t)n_tokens * c->config.top_k,
                              .ldx = up->k,
                              .ldy = down->k,
                              .y_type = c->type,
                              .act = up->act,
                              .epilogue = LINEAR_GATED,
                              .expert_start = &some,
                              .x_row = &some,
                              .x_rows = (int32_t)n_tokens,
                              .told = &some,
                              .sm = c->sm,
                              .n_sms = c->n_sms};
    linear_problem q = p;
    q.w = down;
    q.act = down->act;
    q.ldx = down->k;
    q.ldy = down->n;
    q.epilogue = LINEAR_STORE;
    q.x_row = NULL;
    q.x_rows = p.m;
    q.routed = true;
    return kernel_linear_both_accepts(&p, &q);
}

/* p, down, and the gate_up that is held back for it. */
static status launch_joined(cudev *c, linear_problem p) {
    linear_problem up = c->held;
    const linear_words words = {
        .x = words_of_layer(c, 0), .used = words_of_layer(c, 1), .used_bytes = words_bytes(c)};
    up.y = words_of_layer(c, 0) + (int64_t)up.x_rows * up.w->k;
    p.x = up.y;
    p.y = (uint16_t *)up.y + (int64_t)p.m * p.w->k;
    return kernel_linear_both(&up, &p, &words, c->stream);
}

static status cuda_moe_linear(device *d, tensor out, tensor x, const weight *w, int32_t top_k,
                              bool gather) {
    cudev *c = self(d);
    CHECK(w->count == c->config.n_experts);
    CHECK(out.cols == w->n);
    if (cudev_replayed(c)) return ST_OK;
    const linear_problem p = of_experts(
        c, weight_of(w), problem_of(c, weight_of(w), rows_of(c, out)), out, x, top_k, gather);
    if (c->joined && !gather) return launch_joined(c, p);
    if (c->joined) TRY(clear_words(c)); /* a plan without moe_gated */
    c->joined = false;
    return launch_linear(c, p);
}

static status cuda_moe_gated(device *d, tensor out, tensor x, const weight *gate_up, int32_t top_k,
                             activation_kind kind, float limit) {
    cudev *c = self(d);
    CHECK(gate_up->count == c->config.n_experts);
    CHECK(2 * out.cols == gate_up->n);
    if (cudev_replayed(c)) return ST_OK;
    linear_problem p = problem_of(c, weight_of(gate_up), rows_of(c, out));
    p.epilogue = kind == ACT_SILU ? LINEAR_GATED : LINEAR_GATED_OAI;
    p.limit = limit;
    c->held = of_experts(c, weight_of(gate_up), p, out, x, top_k, true);
    return c->joined ? ST_OK : launch_linear(c, c->held);
}

static status cuda_moe_combine(device *d, tensor out, tensor y, int32_t top_k) {
    cudev *c = self(d);
    CHECK(out.rows == c->b->n_tokens);
    CHECK(y.rows == out.rows * top_k);
    CHECK(y.cols == out.cols);
    if (cudev_replayed(c)) return ST_OK;
    return kernel_moe_combine(out.data, y.data, c->expert_weight, c->slot_row, rows_of(c, out),
                              top_k, out.cols, c->type, c->stream);
}

static status cuda_moe_enter(device *d, tensor out, tensor residual, tensor add, const weight *w,
                             float eps, tensor logits, const weight *router, int32_t top_k,
                             route_kind kind, bool normalise) {
    cudev *c = self(d);
    CHECK(out.rows == c->b->n_tokens && residual.rows == out.rows && add.rows == out.rows);
    CHECK(out.cols == residual.cols && w->k == out.cols && router->k == out.cols);
    CHECK(logits.rows == out.rows && logits.cols == c->config.n_experts);
    const int64_t t = rows_of(c, out);
    const bool told = t <= MOE_TOLD_TOKENS && out.cols <= MOE_LEAVE_DIM_MAX;
    /* Not of text, which is no decode step: somebody may look at what lies between gate_up and
     * down. Nor of a last layer whose words those of the next step's first one are. */
    c->joined = !cudev_replayed(c) && told && c->graph && t <= LINEAR_WORD_ROWS &&
                c->layer <= (c->config.n_layers & ~1) && joins(c, t);
    const moe_enter p = {.x = out.data,
                         .residual = residual.data,
                         .add = add.data,
                         .gain = weight_of(w)->plain,
                         .router = &weight_of(router)->linear,
                         .logits = logits.data,
                         .weight = c->expert_weight,
                         .expert_start = c->expert_start,
                         .slot_row = c->slot_row,
                         .row_token = c->row_token,
                         .expert = c->expert,
                         .t = rows_of(c, out),
                         .stride = cudev_linear_rows(logits.cols),
                         .dim = out.cols,
                         .n_experts = logits.cols,
                         .top_k = top_k,
                         .over_chosen = kind == ROUTE_TOPK_SOFTMAX,
                         .normalise = normalise,
                         .eps = eps,
                         .type = c->type,
                         .told = told ? c->told : NULL,
                         .words = c->joined ? words_of_layer(c, 0) : NULL};
    const bool accepted = kernel_moe_enter_accepts(&p, c->sm);
    c->is_told = accepted && told;
    c->joined = c->joined && accepted;
    if (accepted) return cudev_replayed(c) ? ST_OK : kernel_moe_enter(&p, c->stream);
    TRY(cuda_norm(d, out, residual, add, w, eps));
    TRY(cuda_linear(d, logits, out, router));
    return cuda_moe_route(d, logits, top_k, kind, normalise);
}

static status cuda_moe_leave(device *d, tensor out, tensor residual, tensor y, const weight *w,
                             float eps, int32_t top_k) {
    cudev *c = self(d);
    if (out.cols > MOE_LEAVE_DIM_MAX) {
        TRY(cuda_moe_combine(d, out, y, top_k));
        return cuda_norm(d, out, residual, out, w, eps);
    }
    CHECK(out.rows == c->b->n_tokens && residual.rows == out.rows && y.rows == out.rows * top_k);
    CHECK(out.cols == residual.cols && y.cols == out.cols && w->k == out.cols);
    if (cudev_replayed(c)) return ST_OK;
    const int64_t t = rows_of(c, out);
    const void *in_words = words_of_layer(c, 0) + t * (out.cols + top_k * c->config.expert_dim);
    return kernel_moe_leave(out.data, residual.data, c->joined ? in_words : y.data,
                            weight_of(w)->plain, c->expert_weight, c->slot_row,
                            c->is_told ? c->told : NULL, c->joined, t, top_k, out.cols, eps,
                            c->type, c->stream);
}

static status cuda_all_reduce(device *d, tensor inout) {
    (void)d;
    (void)inout;
    return ST_OK; /* of one rank; cudev_ranks.c has the other */
}

static status cuda_gather(device *d, tensor out, tensor x) {
    cudev *c = self(d);
    CHECK(out.rows == c->b->n_samples);
    CHECK(out.cols == x.cols);
    if (cudev_replayed(c)) return ST_OK;
    return kernel_rows(out.data, x.data, c->tables.sample_row, rows_of(c, out), out.cols,
                       c->stream);
}

static status cuda_sample(device *d, tensor logits) {
    cudev *c = self(d);
    CHECK(logits.rows == c->b->n_samples);
    if (cudev_replayed(c)) return ST_OK;
    return kernel_draw(c->drawn, logits.data, c->tables.draw, (int32_t)rows_of(c, logits),
                       logits.cols, c->stream);
}

/* --- Looking -------------------------------------------------------------------------------- */

static status cuda_read(device *d, tensor t, float *out) {
    cudev *c = self(d);
    if (c->dead) return dead(c);
    const int64_t n = t.rows * t.cols;
    for (int32_t i = 0; i < c->n_buffers; i++) {
        const cudev_buffer *b = &c->buffer[i];
        if (b->data != t.data) continue;
        const size_t bytes = (size_t)dtype_bytes(b->type, n);
        if (b->type == DT_F32) {
            const size_t row = (size_t)t.cols * sizeof(float);
            const size_t stride = /* of router logits */
                t.cols == c->config.n_experts ? (size_t)cudev_linear_rows(t.cols) * sizeof(float)
                                              : row;
            CUDA_TRY(cudaMemcpy2DAsync(out, row, t.data, stride, row, (size_t)t.rows,
                                       cudaMemcpyDeviceToHost, c->stream),
                     "read");
            return cudev_check((int)cudaStreamSynchronize(c->stream), "read");
        }
        uint16_t *narrow = mem_alloc((size_t)n, sizeof *narrow);
        if (!narrow) return FAIL(ST_NOMEM, "read of %lld elements", (long long)n);
        cudaError_t e = cudaMemcpyAsync(narrow, t.data, bytes, cudaMemcpyDeviceToHost, c->stream);
        if (e == cudaSuccess) e = cudaStreamSynchronize(c->stream);
        const status st = cudev_check((int)e, "read");
        if (st == ST_OK) dtype_to_f32(out, narrow, n, 1, b->type);
        mem_free(narrow);
        return st;
    }
    CHECK(!"a buffer of this device");
    return ST_OK;
}

static status cuda_observe(device *d, calibrate_sums *s, tensor x, const int32_t *row, int64_t n) {
    cudev *c = self(d);
    CHECK(c->mode == STEP_EAGER); /* text runs in chunks, which no graph holds */
    for (int32_t i = 0; i < c->n_buffers; i++)
        if (c->buffer[i].data == x.data)
            return cuda_calibrate.sums_add(s, x.data, c->buffer[i].type, row, n, c->stream);
    CHECK(!"a buffer of this device");
    return ST_OK;
}

static void cuda_explain(device *d, const char *what, const weight *w, int64_t n_rows, char *buf,
                         size_t n) {
    const cudev *c = self(d);
    const moe_enter way_in = {.router = w ? &weight_of(w)->linear : NULL,
                              .t = n_rows,
                              .dim = w ? w->k : 0,
                              .n_experts = c->config.n_experts,
                              .top_k = c->config.top_k,
                              .type = c->type};
    if (!w || weight_of(w)->linear.format == WF_COUNT || !strcmp(what, "embed") ||
        (!strcmp(what, "moe_enter") && kernel_moe_enter_accepts(&way_in, c->sm))) {
        snprintf(buf, n, "%s, one kernel", c->name);
        return;
    }
    linear_problem p = problem_of(c, weight_of(w), n_rows);
    static const int32_t some; /* a grouped problem is one with expert_start; not read */
    if (w->count > 1) p.expert_start = &some;
    if (w->count > 1 && d->options.tp <= 1) p.told = &some; /* as moe_enter does for few tokens */
    const linear_weight wide = expanded_of(c, p.w);
    const bool first = expanded_first(c, p.w);
    if (first) p.w = &wide;
    const char *kernel = linear_choice(&p);
    snprintf(buf, n, "%s%s", first ? "expanded, " : "", kernel ? kernel : fail_message());
}

const device_ops device_cuda = {
    .name = "cuda",
    .virtual_time = false,
    .has_logits = true,
    .open = cuda_open,
    .close = cuda_close,
    .memory = cuda_memory,
    .weight_load = cudev_weight_load,
    .load_times = cudev_load_times,
    .setup = cuda_setup,
    .padded_rows = cuda_padded_rows,
    .buffer = cuda_buffer,
    .begin = cuda_begin,
    .embed = cuda_embed,
    .norm = cuda_norm,
    .linear = cuda_linear,
    .rope_append = cuda_rope_append,
    .attention = cuda_attention,
    .gated = cuda_gated,
    .moe_route = cuda_moe_route,
    .moe_linear = cuda_moe_linear,
    .moe_combine = cuda_moe_combine,
    .all_reduce = cuda_all_reduce,
    .gather = cuda_gather,
    .logits = cuda_linear,
    .sample = cuda_sample,
    .launch = cuda_launch,
    .end = cuda_end,
    .read = cuda_read,
    .explain = cuda_explain,
    .ceilings = cuda_ceilings,
    .calibrate = &cuda_calibrate,
    .observe = cuda_observe,
    .linear_gated = cuda_linear_gated,
    .moe_gated = cuda_moe_gated,
    .moe_enter = cuda_moe_enter,
    .moe_leave = cuda_moe_leave,
};
