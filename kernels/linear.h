/* linear.h - linear layers with weights in any format, on a GPU: y = epilogue(x W^T + bias).
 *
 * Description (linear_problem), choice (a table of variants per architecture, best first) and
 * launch are three things. A weight is packed once at load for the family that will run it; the
 * order inside is the one in which that family's fragments are loaded, made by running its own load
 * path. */
#ifndef KERNEL_LINEAR_H
#define KERNEL_LINEAR_H
#include "quantize.h"

#ifdef __cplusplus
extern "C" {
#endif

/* A weight in device memory. Fill format .. family, ask linear_pack_bytes, point code / scale /
 * bias at device memory, then linear_pack each of the `count` matrices. */
typedef struct {
    weight_format format;
    dtype type; /* F16 or BF16: of x, y and bias, and of W16 weights */
    int32_t n, k, count;
    int32_t group; /* 0 = per output channel */
    bool sym;
    bool gated; /* rows are gate | up, halves packed so that one tile holds both; must be set for a
                       gated epilogue when n / 2 is no multiple of 64 */
    act_format act;      /* AF_16, or the format that x is quantised to: another packed order */
    int32_t family;      /* 80 or 90: which packed order; set by linear_family */
    void *code, *scale;  /* packed; zeros lie beside the scales */
    void *bias;          /* [count, n] of `type`, or NULL */
    float *global_scale; /* [count], NVFP4; else NULL */
} linear_weight;

/* The family that runs this on a GPU of compute capability sm (80, 86, 89, 90): 90 on Hopper unless
 * `force` is 80. */
int32_t linear_family(int32_t sm, int32_t force);

/* Bytes of code and scale for all `count` matrices. UNSUPPORTED or SHAPE with the reason. */
status linear_pack_bytes(const linear_weight *w, int64_t *code_bytes, int64_t *scale_bytes);

/* Pack matrix `index` from the canonical form in device memory (q's pointers are device pointers;
 * W16 takes q->code as [n, k] of w->type). Asynchronous on `stream`. */
status linear_pack(const linear_weight *w, int32_t index, const qmatrix *q, kernel_stream stream);

/* The same on the host, and its inverse: the definition of the packed order, for tests. Pack ->
 * unpack is the identity for every format, group and family, but for scales beyond the packed form:
 * of MXFP4 with f16 outside 2^-27 to 2^4, of int8 with bf16 from 2^122 on. */
status ref_linear_pack(const linear_weight *w, void *code, void *scale, const qmatrix *q);
status ref_linear_unpack(const linear_weight *w, const void *code, const void *scale, qmatrix *q);

/* Baseline of kernels that know W16 only: `from`, in any other format, written out as `to`, which
 * has format WF_16, the same type, shape, count, gated and family, and its own device memory of
 * linear_pack_bytes. Values are code times scale in f32, rounded to the type once. Other pairs, and
 * weights of 8-bit products (linear_plain), are UNSUPPORTED. Asynchronous, and capturable. */
status linear_expand(const linear_weight *to, const linear_weight *from, kernel_stream stream);

typedef enum {
    LINEAR_STORE,     /* y [m, n] = x W^T + bias */
    LINEAR_GATED,     /* W rows are gate | up: y [m, n / 2] = activation(gate, up), SILU */
    LINEAR_GATED_OAI, /* the same with gpt-oss's clamped activation */
    LINEAR_RESIDUAL   /* y += x W^T + bias */
} linear_epilogue;

/* Memory that a launch behind this one reads, in pieces: piece i, j is `bytes` at base + i * stride
 * + j * bytes. The list is int32 on the device: how many there are, a pad, i and j of each;
 * constants of the step. A launch takes share `part` of `parts` of the first `most`. */
typedef struct {
    const int32_t *list; /* NULL: none */
    const void *base;
    int64_t stride;
    int32_t bytes, most, part, parts;
} linear_ahead;

typedef struct {
    const linear_weight *w;
    int32_t m;
    const void *x; /* [m, k] of w->type, row stride ldx elements */
    void *y;       /* [m, n] of y_type, row stride ldy */
    int64_t ldx, ldy;
    dtype y_type;   /* w->type, or F32 (logits) */
    act_format act; /* that of w: x as it is, or quantised here per token (and 128 inputs beside
                       FP8b), in the same stream */
    bool x_coded;   /* that was done by the kernel before, as linear_x_codes said */
    linear_epilogue epilogue;
    float limit; /* LINEAR_GATED_OAI */

    /* Grouped problem (mixture of experts); all NULL for a dense one. Rows expert_start[e] ..
     * expert_start[e+1] of the permuted problem use matrix e; row r reads x row x_row[r] (NULL: r).
     * m is the number of permuted rows and an upper bound on expert_start[count]. Device pointers.
      */
    const int32_t *expert_start; /* [count + 1] */
    const int32_t *x_row;        /* [m] */
    int32_t x_rows;              /* rows that x has, when x_row names them; 0 = m */
    bool routed; /* another linear with these rows of experts came before: what they are was known
                    when the launch before this one began */

    /* linear_workspace_bytes of device memory, zeroed once: what must be zero is left so. Its parts
     * lie by n_sms, which is the same in all launches. */
    void *workspace;
    const char *kernel; /* force a variant by name; NULL = the table's choice */
    int32_t sm, n_sms;
    /* Other kernels run between this launch and other linears, so that SMs may be empty when it
     * begins, one before another: no two of its CTAs may fit an SM. */
    bool apart;
    /* Brought to L2 by CTAs that have asked for all of their weights, in launches of 9 to 64 rows,
     * which leave memory idle; else nobody does. */
    linear_ahead ahead;
    /* Grouped problems; NULL, or words LINEAR_TOLD apart, zeros until a launch before this one has
     * written them, which may be the one before and still run (routed: it has ended). Row r's: 1 +
     * expert, and where it is that expert's first row from bit 16 on a bit for each row of x that
     * the expert has, which are its rows in order (where x_row names them). */
    const int32_t *told;
} linear_problem;
enum { LINEAR_TOLD = 32 }; /* a line of L2, so that not all CTAs ask for the same */

/* Values of 16 bits that say that they are there: complements, none of which is zero, where zeros
 * were. For kernel_linear_both; of up to LINEAR_WORD_ROWS rows of x. */
typedef struct {
    const void *x;      /* [x_rows, k], which the launch before writes (moe_enter.words) */
    void *used;         /* words that were used before that launch; they become zeros */
    int64_t used_bytes; /* a multiple of 16 */
} linear_words;
enum { LINEAR_WORD_ROWS = 2 };

/* For problems whose x has up to max_x rows. */
int64_t linear_workspace_bytes(const linear_weight *w, int32_t max_x, int32_t n_sms);

/* What the kernel before p may do to p's x: leave codes in p's workspace, which no other linear
 * uses in between, or values in its place; nothing where p would not read them. */
activation_codes linear_x_codes(const linear_problem *p);

/* Launch. SHAPE, UNSUPPORTED with the reason, DEVICE on launch failure; m == 0 launches nothing.
 * Deterministic: the same bits on every run. Asynchronous, and capturable in a CUDA graph.
 * CTAs of a launch wait for each other: one linear at a time on a GPU, so one stream for all of
 * them. */
status kernel_linear(const linear_problem *p, kernel_stream stream);

/* Gate and up, and down behind it, of the same experts' rows (told), as one launch: few of them,
 * whose W fits the SMs' shared memory at once. x is words->x instead of up's; up's y, which is
 * down's x, and down's y become such words, too: zeros before. Bits do not hang on the number of
 * rows, and those of up's y are kernel_linear's. Errors as of kernel_linear; SHAPE where it does
 * not accept. Its CTAs wait for each other: no other kernel may hold an SM for longer than it needs
 * by itself. */
bool kernel_linear_both_accepts(const linear_problem *up, const linear_problem *down);
status kernel_linear_both(const linear_problem *up, const linear_problem *down,
                          const linear_words *words, kernel_stream stream);

/* Name of the variant that kernel_linear would launch, or NULL with the reason recorded. Valid
 * until the next call from this thread. "values, NAME": x is replaced by the values that its codes
 * stand for, in 16 bits, and multiplied by kernel NAME. */
const char *linear_choice(const linear_problem *p);
/* All variants of a family, for benchmarks: fewer than LINEAR_VARIANTS_MAX, NULL-terminated. */
enum { LINEAR_VARIANTS_MAX = 64 };
const char *const *linear_variants(int32_t family);

#ifdef __cplusplus
}
#endif
#endif
