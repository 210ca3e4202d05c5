/* quantise.h - a 16-bit checkpoint into a quantised one.
 *
 *   rtn   round to nearest, as the engine does when it loads a plain checkpoint
 *   gptq  Frantar et al. 2022: columns one by one, the error of each spread over those that follow
 *         by the inverse of the inputs' second moments H; columns in the order of diag H, largest
 *         first (act-order), scales of the groups fixed before (so no g_idx is needed), ranges
 *         clipped as below
 *   awq   Lin et al. 2023: inputs that matter are scaled up before rounding and down in what comes
 *         before them (the norm, rows of v and up); then each group's range is clipped. Both by
 *         search for the least error e H e^T of the layer's output
 *
 * gptq and awq need text to see what the linears are fed: the engine runs it in 16 bit once. */
#ifndef AMALGAM_QUANTISE_H
#define AMALGAM_QUANTISE_H
#include "observe.h"
#include "save.h"

typedef enum { QUANTISE_RTN, QUANTISE_GPTQ, QUANTISE_AWQ, QUANTISE_COUNT } quantise_method;

const char *quantise_method_text(quantise_method m);
status quantise_method_parse(quantise_method *out, const char *name); /* NOTFOUND lists them */

typedef struct {
    const char *model; /* folder of the source; must be plain */
    const char *out;   /* folder to write; not the source */
    quantise_method method;
    precision precision; /* its weight part */
    save_layout layout;
    const char *device; /* runs the calibration text and does the arithmetic: one with values */
    int32_t threads;
    const int32_t *token; /* calibration; not for rtn */
    int64_t n_tokens;
    int32_t window;       /* tokens of a window of it (512) */
    double damp;          /* gptq: of mean diag H added to the diagonal (0.01) */
    bool act_order;       /* gptq (true) */
    int64_t memory_bytes; /* for moments at a time: layers are done in turns of as many as fit */
    void (*progress)(void *user, int64_t done, int64_t total); /* layers; may be NULL */
    void *user;
} quantise_options;

#define QUANTISE_OPTIONS_DEFAULT                                                                   \
    ((quantise_options){.device = "cpu",                                                           \
                        .window = 512,                                                             \
                        .damp = 0.01,                                                              \
                        .act_order = true,                                                         \
                        .memory_bytes = (int64_t)4 << 30})

/* UNSUPPORTED for a source that is quantised already or whose linears are not one tensor each, for
 * awq in other than integer formats; USAGE when `out` is the source, or the format 16 bit. */
status quantise_checkpoint(const quantise_options *o);

/* --- The methods, on one matrix; `by` does the arithmetic ------------------------------------- */

/* Codes of w [n, k] into q, which holds the scales already (ref_quantize_weight sets them). gram
 * [k, k] is symmetric: sum of x x^T over inputs; `damp` is a share of its mean diagonal. w is
 * destroyed. NOMEM, FORMAT. */
status quantise_gptq(const calibrate_ops *by, qmatrix *q, float *w, const double *gram, double damp,
                     bool act_order);

/* For each input i, s[i] > 0 such that rounding w[n,i] s[i] to format p loses least, w being [n,
 * k]; inputs with equal tie[i] (NULL = all differ; numbers below k) share theirs. */
status quantise_awq_scales(const calibrate_ops *by, float *s, const float *w, int32_t n, int32_t k,
                           const precision *p, const moments *x, const int32_t *tie);

/* out [n, k] = w with each group's range cut where that loses less. gram as above; out is not w. */
status quantise_clip(const calibrate_ops *by, float *out, const float *w, int32_t n, int32_t k,
                     const precision *p, const double *gram);
#endif
