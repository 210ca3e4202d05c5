/* device.h - the operations a transformer needs, once per back-end.
 *
 *   null   costs nothing and computes nothing: what is left is our own overhead
 *   cpu    the definition: f32, wide accumulation, quantised forms exactly as ref_quant.h has them.
 *          "16" means unquantised here: activations and 16-bit KV stay f32, so that W16A16KV16
 *          equals a float32 run of the model to rounding
 *   sim    adds each operation's predicted cost to a virtual clock; memory is exact
 *   cuda   runs kernels
 *
 * forward.c is written once over this table. A device knows no request and no policy. With tp > 1
 * the device runs every rank; sizes seen by forward are those of one rank. Calls between begin and
 * end may be asynchronous; errors of execution surface in end. */
#ifndef AMALGAM_DEVICE_H
#define AMALGAM_DEVICE_H
#include "batch.h"
#include "calibrate.h"
#include "gpu.h"
#include "precision.h"
#include "weights.h"

typedef struct device device;

/* Activations: `rows` x `cols` in the device's own element type. data NULL where nothing is stored.
 */
typedef struct {
    void *data;
    int64_t rows;
    int32_t cols;
} tensor;

typedef struct {
    const char *gpu; /* sim: name of a data sheet */
    const gpu_sheet
        *sheet;      /* sim: used instead when not NULL (calibration, tests); copied by open */
    int32_t tp;      /* ranks, >= 1 */
    int32_t threads; /* cpu; 0 = all cores */

    /* Baseline mode: a weight-only linear writes the whole weight out at 16 bit and multiplies that
     * (packed bytes read + 16-bit written + 16-bit read + the W16 product), as a kernel without
     * fused dequantisation does. UNSUPPORTED at open by a device that has no such mode. */
    bool dequant_first;

    int32_t kernel_family; /* cuda: 80 = kernels of that family on any GPU; 0 = the newest */
    bool no_graphs;        /* cuda: launch decode steps one kernel at a time */
    bool lockstep;     /* read the tokens of a step before the next is launched, as devices without
                      `launch` must */
    bool time_loading; /* cuda: load_times has the parts of a load */
    bool kv_noise; /* cuda: KV pages begin with finite noise instead of NaN, for steps on a context
                      that nothing has written */
} device_options;

/* What went to the device while weights were loaded, and the time of each part, which overlap. */
typedef struct {
    int64_t bytes;
    double host_s;         /* out of the mapped file into pinned memory */
    double copy_s, pack_s; /* the device's, with options.time_loading: from there to the device;
                              kernels between copies and behind them */
} load_times;

/* Everything that is allocated once per run. Set after the weights are loaded. */
typedef struct {
    const model_config *config;
    const precision *precision;
    int32_t max_tokens, max_seqs, max_samples; /* of a batch */
    int32_t n_pages;                           /* KV pages */
    int32_t ctx_max; /* tokens of a sequence at most; 0 = as many as the model takes */
} device_setup;

/* What one layer's attention needs besides the batch. H, G are one rank's. */
typedef struct {
    int32_t layer, n_heads, n_kv_heads, head_dim;
    int32_t window; /* 0 = all */
    float scale;    /* 1 / sqrt(head_dim) */
    float norm_eps;
    const weight *q_norm, *k_norm, *sinks; /* n == 0 when the model has none */
} attention_layer;

/* How the chosen tokens come out: logits of sampled rows are f32 [n_samples, vocab]. */
struct device {
    const struct device_ops *ops;
    device_options options;
};

typedef struct device_ops {
    const char *name;
    bool virtual_time; /* end reports a cost; the clock is virtual */
    bool has_logits;   /* false: sampled tokens are placeholders, lengths come from the workload */

    status (*open)(device **out, const device_options *o);
    void (*close)(device *d);

    /* Device memory of one rank in bytes: usable in all, before weights. 0 = unlimited (cpu, null).
     */
    status (*memory)(device *d, int64_t *usable);

    /* Take one weight in format p (W16 unless s->shape.quantise). Fills *out; out->bytes equals
     * weight_shape_bytes of the rank's share on every device. Nothing of the source is kept: the
     * checkpoint may be closed afterwards. The bias of a weight whose columns are split
     * (SHARD_COLS) is added by one rank alone, since the partial sums are reduced. */
    status (*weight_load)(device *d, const weight_source *s, const precision *p, weight *out);
    /* So far, all of it being over; NULL where nothing is copied. */
    status (*load_times)(device *d, load_times *out);
    status (*setup)(device *d, const device_setup *s);
    /* Decode steps of `rows` sequences run as those of so many, at least as many; their first three
     * runs, like those of other steps, cost more than later ones. NULL: none does. */
    int32_t (*padded_rows)(device *d, int32_t rows);
    /* An activation buffer for the whole run. */
    status (*buffer)(device *d, int64_t rows, int32_t cols, tensor *out);

    /* --- one step ------------------------------------------------------------------------- */
    status (*begin)(device *d, const batch *b); /* upload ids, plan attention */

    /* residual[t] = table[token[t]]; out = rmsnorm(residual) * w          [T, E] */
    status (*embed)(device *d, tensor out, tensor residual, const weight *table, const weight *w,
                    float eps);

    /* residual += add; out = rmsnorm(residual) * w                        [T, E]
     * out is neither of the others. */
    status (*norm)(device *d, tensor out, tensor residual, tensor add, const weight *w, float eps);

    /* out = quantise_A(x) W^T + bias. x [T, K], out [T, N]. The activation format applies when w is
     * quantised. */
    status (*linear)(device *d, tensor out, tensor x, const weight *w);

    /* qkv [T, (H + 2G) D]: norm q and k by head if the layer has it, rotate both by position, write
     * k and v of the batch's tokens into their pages in the layer's KV format. q is changed in
     * place. */
    status (*rope_append)(device *d, tensor qkv, const attention_layer *a);

    /* out [T, H D] = causal attention of q (in qkv) over the pages of each sequence. */
    status (*attention)(device *d, tensor out, tensor qkv, const attention_layer *a);

    /* out [T, F] from gate_up [T, 2F] = gate | up. */
    status (*gated)(device *d, tensor out, tensor gate_up, activation_kind kind, float limit);

    /* Mixture of experts. route: logits [T, X] -> top_k experts and weights of each token, kept by
     * the device until combine. moe_linear: rows of the permuted problem, `gather` takes x by
     * token ([T, K] -> [T k, N]), else x is permuted already. combine: out [T, E] = weighted sums.
      */
    status (*moe_route)(device *d, tensor logits, int32_t top_k, route_kind kind, bool normalise);
    status (*moe_linear)(device *d, tensor out, tensor x, const weight *w, int32_t top_k,
                         bool gather);
    status (*moe_combine)(device *d, tensor out, tensor y, int32_t top_k);

    /* Sum over ranks; a no-op at tp 1. Nothing but the next norm, which must add it, may read
     * `inout` afterwards: the sum may be that norm's work. */
    status (*all_reduce)(device *d, tensor inout);

    /* out [n_samples, E] = rows of x to be sampled, in order. */
    status (*gather)(device *d, tensor out, tensor x);
    /* out [n_samples, V] f32 = x W^T over the whole vocabulary (gathered over ranks). */
    status (*logits)(device *d, tensor out, tensor x, const weight *head);
    /* Draw one token for each sample_row that has params; the others get token -1. */
    status (*sample)(device *d, tensor logits);

    /* Everything of the step is on its way. The next one may begin before this one ends, two at
     * most are under way, and the later one's batch may feed what this one draws (batch.h). NULL:
     * one step at a time, run by `end` at the latest. */
    status (*launch)(device *d);

    /* Wait for the oldest step that has begun; its results [n_samples]; cost_ns is 0 unless
     * virtual_time: device time with the host time that nothing hides (gpu.h, step_s). */
    status (*end)(device *d, sampled *out, int64_t *cost_ns);

    /* Copy a tensor to f32 (tests, evaluation). UNSUPPORTED where nothing is stored. */
    status (*read)(device *d, tensor t, float *out);

    /* One line on how operation `what` of this size would run (kernel, cost): inspect plan. */
    void (*explain)(device *d, const char *what, const weight *w, int64_t rows, char *buf,
                    size_t n);

    /* What the device reaches at most: bytes read per second, operations per second of a 16-bit
     * product. cuda measures, sim has them from the data sheet; NULL: nobody knows. */
    status (*ceilings)(device *d, double *read_bytes_per_s, double *matrix_flops);

    /* --- quantisers; NULL where nothing has values, and on several ranks -------------------- */
    const calibrate_ops *calibrate; /* their arithmetic; its sums belong to this device */
    /* In the middle of a step: rows row[i] (NULL = i), i < n, of x join s. */
    status (*observe)(device *d, calibrate_sums *s, tensor x, const int32_t *row, int64_t n);

    /* --- fused operations, NULL where a device lacks them; chosen by forward's plan ---------- */
    /* gated(linear(x, gate_up)) without storing the product of size [T, 2F]. */
    status (*linear_gated)(device *d, tensor out, tensor x, const weight *gate_up,
                           activation_kind kind, float limit);
    /* The same of experts: gated(moe_linear(x, gate_up)), rows of x gathered. */
    status (*moe_gated)(device *d, tensor out, tensor x, const weight *gate_up, int32_t top_k,
                        activation_kind kind, float limit);
    /* A mixture's way in: norm, the router's linear of `out`, moe_route of `logits`. And out: norm
     * with what moe_combine makes of y as `add`. A device has both or none. */
    status (*moe_enter)(device *d, tensor out, tensor residual, tensor add, const weight *w,
                        float eps, tensor logits, const weight *router, int32_t top_k,
                        route_kind kind, bool normalise);
    status (*moe_leave)(device *d, tensor out, tensor residual, tensor y, const weight *w,
                        float eps, int32_t top_k);
} device_ops;

/* Tokens of a device without logits: a hash of (seed, request, draw), -1 for rows without params.
 */
void device_placeholders(const batch *b, int32_t vocab, sampled *out);

extern const device_ops device_null, device_cpu, device_sim, device_cuda; /* the last: with CUDA */

/* The table of devices (devices.c), NULL-terminated, and look-up by name: NOTFOUND lists them. */
extern const device_ops *const devices[];
status device_find(const device_ops **out, const char *name);
/* Is there one of this name that computes what it says? UNSUPPORTED where tokens are made up. */
status device_computes(const char *name);

/* device_options.kernel_family by name: "hopper" or NULL (the newest the GPU runs), "ampere". */
status device_family(int32_t *out, const char *name);
#endif
