/* cudev.h - what the files of the cuda device share: device_cuda.c (operations of a step),
 * cudev_load.c (weights), cudev_memory.c (slabs, errors, staging), cudev_graph.c (graphs of
 * decode steps), cudev_ranks.c (several GPUs). Not for other files, but for bench_cuda.c, which
 * counts GPUs; compiled only where CUDA is. */
#ifndef AMALGAM_CUDEV_H
#define AMALGAM_CUDEV_H
#include "attention.h"
#include "device.h"
#include "draw.h"
#include "linear.h"

/* CUDA's handles without its headers, so that this one stands alone. */
typedef struct CUevent_st *cudev_event;
typedef struct CUgraph_st *cudev_graph_recorded;
typedef struct CUgraphExec_st *cudev_graph_exec;

/* --- Memory (cudev_memory.c) ---------------------------------------------------------------- */

/* Device memory of one lifetime: one allocation sized by what is known to come, further ones only
 * if that falls short. Addresses are 256-byte aligned. Never freed singly. */
enum { CUDEV_PIECES_MAX = 64 };
typedef struct {
    uint8_t *base[CUDEV_PIECES_MAX];
    int32_t n;
    size_t used, size; /* of the last piece */
    size_t total;      /* bytes handed out */
} cudev_slab;

/* OK, or the failure with `what` before it: OOM for refused memory, DEVICE else. */
status cudev_check(int cuda_error, const char *what);
#define CUDA_TRY(call, what) TRY(cudev_check((int)(call), (what)))

/* One more piece unless the last has `bytes` left; take them from it. OOM with `what`. */
status cudev_slab_reserve(cudev_slab *s, size_t bytes, const char *what);
status cudev_slab_take(cudev_slab *s, size_t bytes, const char *what, void **out);
void cudev_slab_free(cudev_slab *s);

/* Scratch that grows: old contents are lost. `stream` is waited for before a block is replaced. */
typedef struct {
    void *data;
    size_t size;
} cudev_scratch;
status cudev_scratch_grow(cudev_scratch *s, size_t bytes, kernel_stream stream, const char *what);
void cudev_scratch_free(cudev_scratch *s);

/* Host to device through pinned buffers in turn, so that reading a mapped file and the copies
 * overlap: several, since codes, zero points and scales take one each. */
enum { CUDEV_STAGES = 4, CUDEV_MARKS_MAX = 1 << 14 };
typedef enum { AT_COPY, AT_COPIED, AT_PACKED } cudev_instant;
typedef struct {
    uint8_t *buffer[CUDEV_STAGES];
    cudev_event done[CUDEV_STAGES];
    uint32_t next;
    bool timed;
    cudev_event *mark; /* [n_marks] instants on the stream, in its order */
    uint8_t *what;     /* [n_marks] cudev_instant */
    int32_t n_marks;
    load_times times;
} cudev_staging;
status cudev_staging_open(cudev_staging *s);
void cudev_staging_close(cudev_staging *s);
/* Returns when `from` may be unmapped; the copies are ordered on `stream`. */
status cudev_upload(cudev_staging *s, void *to, const void *from, size_t bytes,
                    kernel_stream stream);
/* Where `timed`: the instant of the last thing launched. Past CUDEV_MARKS_MAX nothing is timed. */
status cudev_mark(cudev_staging *s, cudev_instant what, kernel_stream stream);
/* Sums of what lay between instants, once all is over; marks begin again. */
status cudev_marks_sum(cudev_staging *s);

/* --- Graphs of decode steps (cudev_graph.c) ------------------------------------------------- */

enum { CUDEV_GRAPHS_MAX = 40 };
typedef struct {
    int32_t n_rows;           /* a decode step of up to so many sequences is padded to this */
    int32_t n_runs;           /* without a graph so far */
    cudev_graph_exec exec[2]; /* by the slot whose tables it reads; NULL until captured */
} cudev_graph;

typedef struct {
    cudev_graph graph[CUDEV_GRAPHS_MAX]; /* ascending n_rows */
    int32_t n;
    bool off; /* steps are padded alike, launched one by one */
} cudev_graphs;

void cudev_graphs_plan(cudev_graphs *g, int32_t max_rows, bool off);
/* The entry for a decode step of n rows; NULL when it is larger than any. */
cudev_graph *cudev_graphs_find(cudev_graphs *g, int32_t n_rows);
void cudev_graphs_free(cudev_graphs *g);

/* --- The device ----------------------------------------------------------------------------- */

typedef struct {
    weight_field field;
    void *plain;          /* [count, n, k] of the type: embedding, norms, sinks; or NULL */
    linear_weight linear; /* format == WF_COUNT when it is no linear */
} cudev_weight;

/* One layer's attention shape that a plan is made for. */
enum { CUDEV_PLANS_MAX = 4 };
typedef struct {
    int32_t window;
    bool kv4;            /* of all its layers */
    attention_work work; /* of the step */
} cudev_plan;

/* Arrays of a step on the device: one block, laid out for padded counts, one copy. Constants to all
 * kernels but the first (norm.h). */
typedef struct {
    const int32_t *token, *position, *token_seq; /* [T] */
    const int32_t *sample_row;                   /* [n_samples] */
    const draw_row *draw;                        /* [n_samples] */
    const int32_t *seq_start, *kv_len, *page_start, *page;
    size_t bytes;
} cudev_tables;

/* What a step uploads, pinned, and where that goes; and what comes back, pinned. Two, so that a
 * step can be made and uploaded while the one before runs. */
typedef struct {
    uint8_t *tables, *tables_device;
    draw_edit *edit; /* [n_edits_max], read where it lies; grows as rows want it */
    int64_t n_edits_max;
    void *plan[CUDEV_PLANS_MAX], *plan_device[CUDEV_PLANS_MAX]; /* attention_plan_bytes */
    attention_ahead *ahead[CUDEV_PLANS_MAX], *ahead_device[CUDEV_PLANS_MAX];
    draw_result *result;               /* [max_samples] */
    cudev_event uploaded, drawn, done; /* tables on the device; tokens there; tokens here */
    int64_t step;
    int32_t n_samples;
} cudev_slot;

enum { CUDEV_BUFFERS_MAX = 24 };
typedef struct {
    const uint8_t *data;
    size_t bytes;
    dtype type;
} cudev_buffer;

typedef enum { STEP_EAGER, STEP_CAPTURE, STEP_REPLAY } step_mode;

typedef struct {
    device base; /* first: device_ops get this */
    char name[64];
    int32_t gpu, rank; /* of options.tp; equal: ranks are GPUs 0 .. tp - 1 */
    int32_t sm, n_sms, family;
    kernel_stream stream;
    kernel_stream front, back; /* tables to the device; tokens to the host */
    bool dead;                 /* an execution error was seen: nothing runs any more */
    char why[256];

    /* Weights and what loading them needs. */
    bool loading;               /* format checked, slab taken */
    dtype type;                 /* F16 or BF16: of activations, 16-bit weights and KV */
    const weight_source *whole; /* being loaded; `s` of cudev_load.c has this rank's shape */
    cudev_slab weights;
    cudev_staging staging;
    cudev_scratch raw, values, packed; /* part of a file; f32 rows; a canonical matrix */
    cudev_scratch wide;                /* whole rows, of which a rank takes some columns */
    uint32_t *amax;                    /* device: largest magnitude of a matrix */
    arena handles;                     /* cudev_weight */
    cudev_weight *all[8192];           /* every linear, for the workspace */
    int32_t n_all;

    /* The run. */
    bool ready;
    model_config config;
    precision precision;
    int32_t max_tokens, max_seqs, max_samples, n_pages, ctx_max;
    int64_t max_page_ids;        /* of a batch */
    int32_t n_heads, n_kv_heads; /* of this rank */
    cudev_slab run, kv;
    attention_cache cache[MODEL_LAYERS_MAX];
    float *rope; /* [ctx, D / 2, 2] */
    void *linear_space, *attention_space;
    const void *coded_x; /* what a norm has made codes (in linear_space) or values of, for the */
    weight_field coded;  /* next linear, of this field; or NULL */
    void *wide_space; /* pages of one layer at 16 bit, for prefill chunks of many rows; or NULL */
    int32_t wide_pages;
    void *expanded; /* options.dequant_first: the largest weight at 16 bit */
    cudev_plan plan[CUDEV_PLANS_MAX];
    int32_t n_plans;
    cudev_slot slot[2];
    int64_t n_begun, n_ended; /* steps; step i has slot i & 1 */
    int32_t *count;           /* [sampler_counts] on the host, see sampler_edits */
    draw_result *drawn;       /* [2, max_samples] device, by step: the next may feed its tokens */
    int32_t *expert, *expert_start, *slot_row, *row_token, *told;
    bool is_told;   /* told: by the last moe_enter */
    void *words[2]; /* (linear_words) [T, dim] x, [T top_k, expert_dim] gated and [T top_k, dim] y
                       of gate_up and down in one launch, which leaves zeros in the other */
    bool joined;    /* gate_up and down of this layer are one launch */
    linear_problem held; /* its gate_up */
    float *expert_weight;
    cudev_buffer buffer[CUDEV_BUFFERS_MAX];
    int32_t n_buffers;
    cudev_graphs graphs;

    /* The step. */
    const batch *b; /* between begin and launch */
    cudev_slot *at;
    step_mode mode;
    cudev_graph *graph;            /* of a decode step */
    cudev_graph_recorded captured; /* not yet graph->exec */
    int32_t rows;                  /* T of the device: b->n_tokens, or padded */
    cudev_tables tables;
    int32_t layer; /* whose attention comes next */
} cudev;

static inline cudev *cudev_self(device *d) { return (cudev *)(void *)d; }

/* Type that a linear of this field writes: logits, of the vocabulary or of a router, are f32. */
static inline dtype cudev_linear_type(const cudev *c, weight_field f) {
    return f == WEIGHT_router || f == WEIGHT_head || f == WEIGHT_embed ? DT_F32 : c->type;
}

/* Output features that a linear is padded to: the kernels work by 16. Only a router may need it,
 * whose logits are laid out with that stride. */
static inline int32_t cudev_linear_rows(int32_t n) { return (n + 15) / 16 * 16; }

/* Nothing to launch: the graph will. */
static inline bool cudev_replayed(const cudev *c) { return c->mode == STEP_REPLAY; }

/* Rows of the device for rows of the batch: tokens, slots of tokens, or samples. */
static inline int64_t cudev_rows(const cudev *c, int64_t n) {
    return c->graph ? n / c->b->n_tokens * c->rows : n;
}

/* device_cuda.c, for bench_cuda.c: GPUs that the driver lists, 1 at least. DEVICE, with what is
 * missing: a driver, one that this build can use, a GPU. */
status cudev_count(int32_t *n_gpus);
/* device_cuda.c, for cudev_ranks.c */
status cudev_open(device **out, const device_options *o, int32_t rank);
/* A linear into y [rows, w->n] wherever that lies. */
status cudev_linear_to(cudev *c, void *y, tensor x, const weight *w);
/* The first half of `launch`: what was captured becomes a graph, and nothing runs yet. Two calls,
 * because no graph can be made by a thread that still captures on another rank. */
status cudev_end_capture(cudev *c);
status cudev_make_graph(cudev *c);
void cudev_abandon_capture(cudev *c); /* if there is one */
/* Is the oldest step over? DEVICE when it failed. */
status cudev_poll(cudev *c, bool *over);

/* cudev_ranks.c: the device of tp > 1. UNSUPPORTED (no NCCL, too few GPUs) or DEVICE. */
status cudev_ranks_open(device **out, const device_options *o);

/* cudev_load.c */
status cudev_weight_load(device *d, const weight_source *s, const precision *p, weight *out);
status cudev_load_times(device *d, load_times *out);
void cudev_load_done(cudev *c); /* free what only loading needs */
#endif
