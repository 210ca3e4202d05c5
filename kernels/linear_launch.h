/* linear_launch.h - between the choice of a linear kernel (linear.cu) and the files that hold them.
 */
#ifndef KERNEL_LINEAR_LAUNCH_H
#define KERNEL_LINEAR_LAUNCH_H
#include "linear_layout.h"

typedef struct linear_args linear_args;

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
    int32_t rows_max; /* dense problems of up to so many rows, not gathered; 0 = any problem */
} linear_variant;

typedef struct {
    const linear_variant *row;
    int32_t n;
} linear_table;

#ifdef __cplusplus
extern "C" {
#endif
linear_table linear_ampere_table(void);
linear_table linear_short_table(void);  /* runs on sm_90, where compiled for 90a */
linear_table linear_hopper_table(void); /* runs on sm_90, where compiled for 90a */
#ifdef __cplusplus
}
#endif
#endif
