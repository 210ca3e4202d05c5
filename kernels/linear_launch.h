/* linear_launch.h - between the choice of a linear kernel (linear.cu) and the files that hold them.
 */
#ifndef KERNEL_LINEAR_LAUNCH_H
#define KERNEL_LINEAR_LAUNCH_H
#include "linear_layout.h"

#include <math.h>

typedef struct linear_args linear_args;

/* Experts that m rows hit, if each is as likely. */
static inline double linear_experts_hit(int32_t count, int32_t m) {
    return count * (1 - pow(1 - 1.0 / count, m));
}

/* The least shared memory of a CTA of which an SM has no two: see linear_problem.apart. */
enum { LINEAR_APART_BYTES = 114 * 1024 };

/* One row of a table of variants, best first: the first that accepts is launched. */
typedef struct {
    const char *name;
    int32_t sm_min, sm_max; /* compute capability * 10, inclusive */
    weight_format format;
    dtype type;
    int32_t rows_x;      /* x rows of a tile (NT) */
    int32_t blocks;      /* 64-row blocks of a tile (2 R) */
    int32_t step_units;  /* units of one step (KU) */
    int32_t granule_min; /* smallest and largest scale granule that it takes; 0, 0 = no scales */
    int32_t granule_max;
    int32_t ctas_per_sm;
    /* On n_sms SMs, up to per_sm CTAs each. */
    status (*launch)(const linear_args *args, int32_t n_sms, int32_t per_sm, kernel_stream stream);
    int32_t rows_max;  /* dense problems of up to so many rows, not gathered; 0 = any problem */
    bool one_group;    /* every warp has rows of all blocks of a tile, not of half of them */
    bool experts;      /* problems with experts only, y of the type of x and nothing added to it */
    bool rounds;       /* takes linear_args.act */
    int32_t units_max; /* of K at most; 0 = any */
} linear_variant;

typedef struct {
    const linear_variant *row;
    int32_t n;
} linear_table;

/* A product of 8-bit operands in plain order: out [m, n] = x [m, k] W [n, k]^T. */
typedef struct {
    weight_format format; /* INT8: out is int32, the sums of codes; FP8, FP8B: scaled values */
    int32_t m, n, k;      /* FP8B: m is a multiple of 4 */
    const void *w, *x;
    const float *w_scale, *x_scale; /* FP8B: x_scale [ceil(k / 128), m] */
    void *out;
    dtype out_type; /* F16, BF16 or F32; I32 for INT8 */
    int64_t ldo;
    void *workspace;
    int64_t workspace_bytes;
    int32_t rank; /* which of the library's suggestions, 0 its first */
} linear_product;

#ifdef __cplusplus
extern "C" {
#endif
linear_table linear_ampere_table(void);
linear_table linear_hopper_table(void); /* these run on sm_90, where compiled for 90a */
linear_table linear_experts_table(void);
linear_table linear_experts_codes_table(void); /* of linear_experts.cu: x as codes */
linear_table linear_strips_table(void);
/* linear_strips.cu: gate and up, and down, INT4 in groups of 128, without bias, as one launch. */
bool linear_both_fits(const linear_args *up, const linear_args *down, int32_t n_sms);
status linear_both_launch(const linear_args *up, const linear_args *down, const linear_words *words,
                          int32_t tokens, dtype type, int32_t n_sms, kernel_stream stream);
linear_table linear_experts_words_table(void);
linear_table linear_tall_table(void);
linear_table linear_wide_table(void);
linear_table linear_short_table(void);
linear_table linear_short_32_table(void);
linear_table linear_mid_table(void);
linear_table linear_w4a8_table(void);       /* of linear_mid.cu: x as codes */
linear_table linear_words_table(void);      /* of linear_codes.cu */
linear_table linear_words_tall_table(void); /* of linear_codes_tall.cu */
/* Tensor map (CUtensorMap) of x [m, k] in boxes of [rows, 64]; what lies outside reads as zero. */
status linear_map_x(void *map, const linear_args *a, bool bf16, int32_t rows);

/* linear_tuned.c: names of kernels for p by measured times, best first; NULL past the last, or
 * where nothing like it was measured. They may not accept p, and belong to w->family or not. */
const char *linear_tuned(const linear_problem *p, int32_t rank);
int32_t linear_size_class(int32_t n, int32_t k);

/* linear.cu: of p's workspace LINEAR_SUMS_BYTES an SM that are zeros between launches. */
float *linear_sums(const linear_problem *p);
/* linear.cu: a problem whose x is multiplied as it is or, of p->act, as the values of its codes,
 * where linear_rounds says that the kernel takes those. */
const char *linear_choice_16(const linear_problem *p);
bool linear_rounds(const linear_problem *p);
status linear_launch_16(const linear_problem *p, kernel_stream stream);

/* linear_quantised.cu: problems with A8 and AFP8. `space` is linear_quantised_bytes of the
 * workspace, `scratch` any other part of it. */
int64_t linear_quantised_bytes(const linear_weight *w, int32_t max_x);
const char *linear_quantised_choice(const linear_problem *p);
status linear_quantised(const linear_problem *p, void *space, void *scratch, int64_t scratch_bytes,
                        kernel_stream stream);
activation_codes linear_quantised_x(const linear_problem *p, void *space);
const char *linear_quantised_name(int32_t i); /* variant i, or NULL past the last */

/* linear_codes.cu: rows [row, row + m) of p by variant `name`, x being quantised already (m_pad as
 * in quantize.h). Only where compiled for 90a. */
status linear_codes_launch(const char *name, const linear_problem *p, int32_t row, int32_t m,
                           const void *code, const float *x_scale, int32_t m_pad,
                           kernel_stream stream);

/* linear_codes_tall.cu: the same of INT8 or FP8, for many rows. */
status linear_codes_tall_launch(const linear_problem *p, int32_t row, int32_t m, const void *code,
                                const float *x_scale, kernel_stream stream);

/* linear.cu, linear_w4a8_tall.cu: p, whose weight is linear_nibbles, x being quantised already in
 * the order of atoms: code [m, k], x_scale [m], which is read in eights; of experts the rows of x,
 * which p->x_row names. By variant `name` of linear_w4a8_table, for few rows, or of
 * linear_experts_codes_table; of many. Only where compiled for 90a. */
status linear_w4a8_launch(const char *name, const linear_problem *p, const void *code,
                          const float *x_scale, kernel_stream stream);
status linear_w4a8_tall_launch(const linear_problem *p, const void *code, const float *x_scale,
                               kernel_stream stream);

/* linear_lt.cu: cuBLASLt. Its choice of an algorithm depends on the arguments and on nothing else,
 * and is kept. UNSUPPORTED when it has none. */
status linear_lt_ready(void); /* make what must not be made within a graph */
status linear_lt(const linear_product *p, kernel_stream stream);
#ifdef __cplusplus
}
#endif
#endif
