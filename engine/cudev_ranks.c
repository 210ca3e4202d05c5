/* cudev_ranks.c - tensor parallelism over the GPUs of one node: the cuda device of tp > 1.
 *
 * Each rank is a device of device_cuda.c on a GPU of its own, with its part of every weight and its
 * KV heads. All of them run the same operations over the same batch, so an operation here is a loop
 * over theirs; a handle (tensor, weight) holds one for each rank. Together they do two things:
 *
 *   all_reduce   y of o and down (a mixture's after combine) is summed. Of few rows by the norm
 *                that follows (kernel_norm_add_ranks), over peer access; else, or where a GPU
 *                cannot reach the others, by NCCL in the type of activations, 16 bit. The partial
 *                sums were rounded to that, too
 *   logits       a rank computes its part of the vocabulary; the parts are gathered on every rank,
 *                and laid side by side. A tied head is whole on every rank, which computes all
 *
 * Every rank then has the same residual stream, logits and tokens, bit for bit, so routing and
 * sampling need no exchange, and a step that feeds what the one before drew finds it at hand. Rank
 * 0's tokens are handed out.
 *
 * One thread serves all ranks. NCCL's calls stand in groups, one call a rank. A decode step is a
 * graph on each rank with its collectives inside; all captures end before a graph is made, which a
 * thread may not do while it captures, and all graphs are made before any is launched, since making
 * one may wait for its GPU. */
#include "cudev.h"
#include "nccl.h"
#include "norm.h"
#include "rows.h"

#include <cuda_runtime_api.h>
#include <string.h>

enum { RANKS_MAX = 8 };

typedef struct {
    void *data[RANKS_MAX];
} ranked_tensor;

typedef struct {
    device base;
    int32_t n;
    device *rank[RANKS_MAX];
    nccl lib;
    nccl_comm comm[RANKS_MAX];
    arena handles;             /* ranked_tensor, weight[n] */
    void *parts[RANKS_MAX];    /* [n, max_samples, V / n] f32: logits before they are laid out */
    norm_ranks sum[RANKS_MAX]; /* all zero where sums are NCCL's */
    int32_t *gone;             /* pinned; set when no rank should wait for another any more */
    const void *partial;       /* the tensor that the next norm has to sum, or NULL */
} ranks;

static ranks *self(device *d) { return (ranks *)(void *)d; }

static status use(const ranks *g, int32_t r) {
    return cudev_check((int)cudaSetDevice(cudev_self(g->rank[r])->gpu), "GPU of a rank");
}

/* `call` for each rank: r its number, of its device. */
#define EACH_RANK(g, call)                                                                         \
    for (int32_t r = 0; r < (g)->n; r++) {                                                         \
        device *const of = (g)->rank[r];                                                           \
        TRY(use((g), r));                                                                          \
        TRY(call);                                                                                 \
    }

static tensor part(tensor t, int32_t r) {
    if (t.data) t.data = ((ranked_tensor *)t.data)->data[r];
    return t;
}

static const weight *share(const weight *w, int32_t r) {
    return w->n ? (const weight *)w->data + r : w;
}

/* --- Opening ------------------------------------------------------------------------------------
 */

static void ranks_close(device *d) {
    ranks *g = self(d);
    bool dead = false;
    if (g->gone) *(volatile int32_t *)g->gone = 1;
    for (int32_t r = 0; r < g->n; r++) dead = dead || (g->rank[r] && cudev_self(g->rank[r])->dead);
    for (int32_t r = 0; r < g->n; r++) /* while one is under way, NCCL can wait for nothing */
        if (g->rank[r]) cudev_abandon_capture(cudev_self(g->rank[r]));
    for (int32_t r = 0; r < g->n; r++) {
        cudev *c = cudev_self(g->rank[r]);
        if (!g->comm[r] || use(g, r) != ST_OK) continue;
        if (!dead) (void)cudaStreamSynchronize(c->stream); /* else others wait for who died */
        cudev_graphs_free(&c->graphs); /* NCCL waits for every graph that it is in */
    }
    for (int32_t r = 0; r < g->n; r++)
        if (g->comm[r]) (void)(dead ? g->lib.comm_abort : g->lib.comm_destroy)(g->comm[r]);
    for (int32_t r = 0; r < g->n; r++)
        if (g->rank[r] && use(g, r) == ST_OK) device_cuda.close(g->rank[r]);
    if (g->gone) (void)cudaFreeHost(g->gone);
    /* The library stays: threads of its own may not have left it yet. */
    arena_close(&g->handles);
    (void)cudaSetDevice(0);
    (void)cudaGetLastError();
    mem_free(g);
}

static status open_all(ranks *g, const device_options *o) {
    int gpu[RANKS_MAX];
    TRY(arena_open(&g->handles, (size_t)64 << 20)); /* address space */
    for (int32_t r = 0; r < o->tp; r++, g->n++) {
        gpu[r] = r;
        TRY(cudev_open(&g->rank[r], o, r));
        if (cudev_self(g->rank[r])->sm != cudev_self(g->rank[0])->sm)
            return FAIL(ST_UNSUPPORTED, "tp %d over GPUs of different kinds: %s and %s", o->tp,
                        cudev_self(g->rank[0])->name, cudev_self(g->rank[r])->name);
    }
    if (nccl_load(&g->lib) != ST_OK) return fail_prefix(ST_UNSUPPORTED, "tp %d", o->tp);
    return nccl_check(&g->lib, g->lib.comm_init_all(g->comm, g->n, gpu), "opening");
}

static const device_ops device_ranks;

status cudev_ranks_open(device **out, const device_options *o) {
    *out = NULL;
    if (o->tp > RANKS_MAX)
        return FAIL(ST_UNSUPPORTED, "tp %d: the cuda device runs at most %d GPUs", o->tp,
                    RANKS_MAX);
    ranks *g = mem_alloc(1, sizeof *g);
    if (!g) return FAIL(ST_NOMEM, "cuda device");
    g->base = (device){.ops = &device_ranks, .options = *o};
    const status st = open_all(g, o);
    if (st != ST_OK) {
        ranks_close(&g->base);
        return st;
    }
    *out = &g->base;
    return ST_OK;
}

static status ranks_memory(device *d, int64_t *usable) {
    const ranks *g = self(d);
    int64_t bytes;
    *usable = INT64_MAX;
    for (int32_t r = 0; r < g->n; r++) {
        TRY(use(g, r));
        TRY(device_cuda.memory(g->rank[r], &bytes));
        *usable = i64_min(*usable, bytes);
    }
    return ST_OK;
}

static status ranks_weight_load(device *d, const weight_source *s, const precision *p,
                                weight *out) {
    ranks *g = self(d);
    weight *w = arena_array(&g->handles, weight, (size_t)g->n);
    if (!w) return FAIL(ST_NOMEM, "handle of %s", s->name);
    EACH_RANK(g, device_cuda.weight_load(of, s, p, &w[r]));
    *out = w[0];
    out->data = w;
    return ST_OK;
}

/* Peer access between all ranks? Then each can write to the others' inboxes. */
static status reach_peers(ranks *g, bool *all) {
    *all = true;
    for (int32_t r = 0; r < g->n; r++)
        for (int32_t p = 0; p < g->n; p++) {
            int can = 1;
            if (p != r) CUDA_TRY(cudaDeviceCanAccessPeer(&can, r, p), "peer access");
            *all = *all && can;
        }
    if (!*all) return ST_OK;
    for (int32_t r = 0; r < g->n; r++) {
        TRY(use(g, r));
        for (int32_t p = 0; p < g->n; p++) {
            if (p == r) continue;
            const cudaError_t e = cudaDeviceEnablePeerAccess(p, 0);
            if (e == cudaErrorPeerAccessAlreadyEnabled) /* NCCL's */
                (void)cudaGetLastError();
            else
                CUDA_TRY(e, "peer access");
        }
    }
    return ST_OK;
}

static status open_sums(ranks *g, int32_t cols) {
    const size_t calls = sizeof(uint32_t) * NORM_RANK_ROWS, table = sizeof(void *) * RANKS_MAX;
    const size_t bytes = norm_inbox_bytes(g->n, cols);
    void *inbox[RANKS_MAX] = {0};
    bool reached;
    if (cols > NORM_RANK_COLS) return ST_OK;
    TRY(reach_peers(g, &reached));
    if (!reached) return ST_OK;
    CUDA_TRY(cudaHostAlloc((void **)&g->gone, sizeof *g->gone,
                           cudaHostAllocMapped | cudaHostAllocPortable),
             "pinned memory");
    *g->gone = 0;
    for (int32_t r = 0; r < g->n; r++) {
        TRY(use(g, r));
        cudev *c = cudev_self(g->rank[r]);
        TRY(cudev_slab_take(&c->run, bytes, "inbox of ranks", &inbox[r]));
        CUDA_TRY(cudaMemsetAsync(inbox[r], 0, bytes, c->stream), "inbox of ranks");
    }
    for (int32_t r = 0; r < g->n; r++) {
        void *at_calls, *at_table, *gone;
        cudev *c = cudev_self(g->rank[r]);
        TRY(use(g, r));
        TRY(cudev_slab_take(&c->run, calls, "inbox of ranks", &at_calls));
        TRY(cudev_slab_take(&c->run, table, "inbox of ranks", &at_table));
        CUDA_TRY(cudaMemsetAsync(at_calls, 0, calls, c->stream), "inbox of ranks");
        CUDA_TRY(cudaMemcpyAsync(at_table, inbox, table, cudaMemcpyHostToDevice, c->stream),
                 "inbox of ranks");
        CUDA_TRY(cudaHostGetDevicePointer(&gone, g->gone, 0), "pinned memory");
        CUDA_TRY(cudaDeviceSynchronize(), "inbox of ranks"); /* before another rank writes to it */
        g->sum[r] = (norm_ranks){.inbox = at_table,
                                 .calls = at_calls,
                                 .gone = gone,
                                 .rank = r,
                                 .n = g->n,
                                 .cols_max = cols};
    }
    return ST_OK;
}

static status ranks_setup(device *d, const device_setup *s) {
    ranks *g = self(d);
    EACH_RANK(g, device_cuda.setup(of, s));
    TRY(open_sums(g, s->config->dim));
    if (s->config->tied) return ST_OK;
    const size_t bytes = sizeof(float) * (size_t)s->max_samples * (size_t)s->config->vocab;
    EACH_RANK(g, cudev_slab_take(&cudev_self(of)->run, bytes, "logits of ranks", &g->parts[r]));
    return ST_OK;
}

static status ranks_buffer(device *d, int64_t rows, int32_t cols, tensor *out) {
    ranks *g = self(d);
    ranked_tensor *t = arena_array(&g->handles, ranked_tensor, 1);
    if (!t) return FAIL(ST_NOMEM, "buffer handle");
    for (int32_t r = 0; r < g->n; r++) {
        TRY(use(g, r));
        TRY(device_cuda.buffer(g->rank[r], rows, cols, out));
        t->data[r] = out->data;
    }
    *out = (tensor){.data = t, .rows = rows, .cols = cols};
    return ST_OK;
}

/* --- Together -----------------------------------------------------------------------------------
 */

/* A rank sends every row to each other one, twice its bytes: past so many rows NCCL is faster. */
static bool sums_in_norm(const ranks *g, int64_t rows) {
    return g->sum[0].n && rows * (g->n - 1) <= NORM_RANK_ROWS;
}

static status ranks_all_reduce(device *d, tensor inout) {
    ranks *g = self(d);
    const cudev *first = cudev_self(g->rank[0]);
    if (cudev_replayed(first)) return ST_OK;
    const int64_t rows = cudev_rows(first, inout.rows);
    CHECK(!g->partial);
    if (sums_in_norm(g, rows)) {
        g->partial = inout.data;
        return ST_OK;
    }
    const size_t n = (size_t)(rows * inout.cols);
    TRY(nccl_check(&g->lib, g->lib.group_start(), "all-reduce"));
    int result = 0;
    for (int32_t r = 0; r < g->n && result == 0; r++) {
        const cudev *c = cudev_self(g->rank[r]);
        void *x = part(inout, r).data;
        TRY(use(g, r));
        result = g->lib.all_reduce(x, x, n, nccl_type(c->type), NCCL_SUM, g->comm[r], c->stream);
    }
    const int ended = g->lib.group_end();
    return nccl_check(&g->lib, result ? result : ended, "all-reduce");
}

static status ranks_logits(device *d, tensor out, tensor x, const weight *head) {
    ranks *g = self(d);
    const cudev *first = cudev_self(g->rank[0]);
    if (head->n == out.cols) { /* tied */
        EACH_RANK(g, device_cuda.logits(of, part(out, r), part(x, r), share(head, r)));
        return ST_OK;
    }
    CHECK((int64_t)head->n * g->n == out.cols);
    if (cudev_replayed(first)) return ST_OK;
    const int64_t rows = cudev_rows(first, out.rows), width = head->n;
    EACH_RANK(g, cudev_linear_to(cudev_self(of), (float *)g->parts[r] + r * rows * width,
                                 part(x, r), share(head, r)));
    TRY(nccl_check(&g->lib, g->lib.group_start(), "logits"));
    int result = 0;
    for (int32_t r = 0; r < g->n && result == 0; r++) {
        TRY(use(g, r));
        result = g->lib.all_gather((float *)g->parts[r] + r * rows * width, g->parts[r],
                                   (size_t)(rows * width), nccl_type(DT_F32), g->comm[r],
                                   cudev_self(g->rank[r])->stream);
    }
    const int ended = g->lib.group_end();
    TRY(nccl_check(&g->lib, result ? result : ended, "logits"));
    EACH_RANK(g, kernel_rows_join(part(out, r).data, g->parts[r], g->n, rows, head->n,
                                  cudev_self(of)->stream));
    return ST_OK;
}

/* --- A step -------------------------------------------------------------------------------------
 */

static status ranks_begin(device *d, const batch *b) {
    ranks *g = self(d);
    g->partial = NULL;
    EACH_RANK(g, device_cuda.begin(of, b));
    return ST_OK;
}

static status ranks_launch(device *d) {
    ranks *g = self(d);
    EACH_RANK(g, cudev_end_capture(cudev_self(of)));
    EACH_RANK(g, cudev_make_graph(cudev_self(of)));
    EACH_RANK(g, device_cuda.launch(of));
    return ST_OK;
}

/* A rank that fails leaves the others waiting for it: look at all of them until all are over. */
static status ranks_end(device *d, sampled *out, int64_t *cost_ns) {
    ranks *g = self(d);
    for (int32_t over = 0; over < g->n;) {
        over = 0;
        for (int32_t r = 0; r < g->n; r++) {
            bool done;
            TRY(cudev_poll(cudev_self(g->rank[r]), &done));
            over += done;
        }
    }
    for (int32_t r = g->n - 1; r >= 0; r--) TRY(device_cuda.end(g->rank[r], out, cost_ns));
    return ST_OK;
}

static status ranks_embed(device *d, tensor out, tensor residual, const weight *table,
                          const weight *w, float eps) {
    ranks *g = self(d);
    EACH_RANK(g, device_cuda.embed(of, part(out, r), part(residual, r), share(table, r),
                                   share(w, r), eps));
    return ST_OK;
}

static status ranks_norm(device *d, tensor out, tensor residual, tensor add, const weight *w,
                         float eps) {
    ranks *g = self(d);
    if (!g->partial) {
        EACH_RANK(g, device_cuda.norm(of, part(out, r), part(residual, r), part(add, r),
                                      share(w, r), eps));
        return ST_OK;
    }
    CHECK(add.data == g->partial);
    g->partial = NULL;
    for (int32_t r = 0; r < g->n; r++) {
        const cudev *c = cudev_self(g->rank[r]);
        const cudev_weight *gain = share(w, r)->data;
        TRY(use(g, r));
        TRY(kernel_norm_add_ranks(part(out, r).data, part(residual, r).data, part(add, r).data,
                                  gain->plain, cudev_rows(c, out.rows), out.cols, eps, c->type,
                                  &g->sum[r], c->stream));
    }
    return ST_OK;
}

static status ranks_linear(device *d, tensor out, tensor x, const weight *w) {
    ranks *g = self(d);
    EACH_RANK(g, device_cuda.linear(of, part(out, r), part(x, r), share(w, r)));
    return ST_OK;
}

static status ranks_linear_gated(device *d, tensor out, tensor x, const weight *gate_up,
                                 activation_kind kind, float limit) {
    ranks *g = self(d);
    EACH_RANK(
        g, device_cuda.linear_gated(of, part(out, r), part(x, r), share(gate_up, r), kind, limit));
    return ST_OK;
}

static attention_layer of_rank(const attention_layer *a, int32_t r) {
    attention_layer l = *a;
    l.q_norm = share(a->q_norm, r);
    l.k_norm = share(a->k_norm, r);
    l.sinks = share(a->sinks, r);
    return l;
}

static status ranks_rope_append(device *d, tensor qkv, const attention_layer *a) {
    ranks *g = self(d);
    for (int32_t r = 0; r < g->n; r++) {
        const attention_layer l = of_rank(a, r);
        TRY(use(g, r));
        TRY(device_cuda.rope_append(g->rank[r], part(qkv, r), &l));
    }
    return ST_OK;
}

static status ranks_attention(device *d, tensor out, tensor qkv, const attention_layer *a) {
    ranks *g = self(d);
    for (int32_t r = 0; r < g->n; r++) {
        const attention_layer l = of_rank(a, r);
        TRY(use(g, r));
        TRY(device_cuda.attention(g->rank[r], part(out, r), part(qkv, r), &l));
    }
    return ST_OK;
}

static status ranks_gated(device *d, tensor out, tensor gate_up, activation_kind kind,
                          float limit) {
    ranks *g = self(d);
    EACH_RANK(g, device_cuda.gated(of, part(out, r), part(gate_up, r), kind, limit));
    return ST_OK;
}

static status ranks_moe_route(device *d, tensor logits, int32_t top_k, route_kind kind,
                              bool normalise) {
    ranks *g = self(d);
    EACH_RANK(g, device_cuda.moe_route(of, part(logits, r), top_k, kind, normalise));
    return ST_OK;
}

static status ranks_moe_linear(device *d, tensor out, tensor x, const weight *w, int32_t top_k,
                               bool gather) {
    ranks *g = self(d);
    EACH_RANK(g, device_cuda.moe_linear(of, part(out, r), part(x, r), share(w, r), top_k, gather));
    return ST_OK;
}

static status ranks_moe_gated(device *d, tensor out, tensor x, const weight *gate_up, int32_t top_k,
                              activation_kind kind, float limit) {
    ranks *g = self(d);
    EACH_RANK(g, device_cuda.moe_gated(of, part(out, r), part(x, r), share(gate_up, r), top_k, kind,
                                       limit));
    return ST_OK;
}

static status ranks_moe_combine(device *d, tensor out, tensor y, int32_t top_k) {
    ranks *g = self(d);
    EACH_RANK(g, device_cuda.moe_combine(of, part(out, r), part(y, r), top_k));
    return ST_OK;
}

static status ranks_gather(device *d, tensor out, tensor x) {
    ranks *g = self(d);
    EACH_RANK(g, device_cuda.gather(of, part(out, r), part(x, r)));
    return ST_OK;
}

static status ranks_sample(device *d, tensor logits) {
    ranks *g = self(d);
    EACH_RANK(g, device_cuda.sample(of, part(logits, r)));
    return ST_OK;
}

/* --- Looking: at rank 0, which has what all have, or its part ------------------------------------
 */

static status ranks_read(device *d, tensor t, float *out) {
    ranks *g = self(d);
    TRY(use(g, 0));
    return device_cuda.read(g->rank[0], part(t, 0), out);
}

static void ranks_explain(device *d, const char *what, const weight *w, int64_t n_rows, char *buf,
                          size_t n) {
    ranks *g = self(d);
    if (strcmp(what, "all_reduce") == 0) {
        const int32_t v = g->lib.version;
        if (sums_in_norm(g, n_rows))
            snprintf(buf, n, "by the norm, from %d GPUs", g->n);
        else
            snprintf(buf, n, "NCCL %d.%d.%d over %d GPUs, 16 bit", v / 10000, v / 100 % 100,
                     v % 100, g->n);
        return;
    }
    device_cuda.explain(g->rank[0], what, w ? share(w, 0) : NULL, n_rows, buf, n);
}

static int32_t ranks_padded_rows(device *d, int32_t rows) {
    return device_cuda.padded_rows(self(d)->rank[0], rows);
}

static status ranks_ceilings(device *d, double *read_bytes_per_s, double *matrix_flops) {
    ranks *g = self(d);
    TRY(use(g, 0));
    return device_cuda.ceilings(g->rank[0], read_bytes_per_s, matrix_flops);
}

static const device_ops device_ranks = {
    .name = "cuda",
    .virtual_time = false,
    .has_logits = true,
    .open = cudev_ranks_open,
    .close = ranks_close,
    .memory = ranks_memory,
    .weight_load = ranks_weight_load,
    .setup = ranks_setup,
    .padded_rows = ranks_padded_rows,
    .buffer = ranks_buffer,
    .begin = ranks_begin,
    .embed = ranks_embed,
    .norm = ranks_norm,
    .linear = ranks_linear,
    .rope_append = ranks_rope_append,
    .attention = ranks_attention,
    .gated = ranks_gated,
    .moe_route = ranks_moe_route,
    .moe_linear = ranks_moe_linear,
    .moe_combine = ranks_moe_combine,
    .all_reduce = ranks_all_reduce,
    .gather = ranks_gather,
    .logits = ranks_logits,
    .sample = ranks_sample,
    .launch = ranks_launch,
    .end = ranks_end,
    .read = ranks_read,
    .explain = ranks_explain,
    .ceilings = ranks_ceilings,
    .linear_gated = ranks_linear_gated,
    .moe_gated = ranks_moe_gated,
};
