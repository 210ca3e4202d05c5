/* formats.h - the support matrix: which kernels run which precision on which GPU architecture, and
 * why not. Rows are in formats.def. Meaningless pairs are refused everywhere, the cpu definition
 * takes all others, a GPU needs a row: what has no kernel is not predicted either. */
#ifndef AMALGAM_FORMATS_H
#define AMALGAM_FORMATS_H
#include "precision.h"

#ifdef __cplusplus
extern "C" {
#endif

enum {
    ARCH_CPU = 0,  /* else the compute capability without its point: 80, 86, 89, 90, ... */
    SM_FIRST = 80, /* older GPUs have neither cp.async nor bf16 */
    SM_LAST = 999  /* no upper limit */
};

typedef struct {
    weight_format weight;
    act_format act;
    int32_t sm_min, sm_max; /* inclusive; both 0: the cpu definition */
    int32_t group_step;     /* the group along K must be a multiple of it; 0: no groups */
    const char *family;     /* "hopper", "ampere" or "definition" */
    const char *instruction;
} format_linear;

typedef struct {
    kv_format kv;
    int32_t sm_min, sm_max;
    const char *family, *instruction;
} format_kv;

/* All rows; those for one architecture stand best first. */
const format_linear *format_linear_rows(int32_t *n);
const format_kv *format_kv_rows(int32_t *n);

/* The first row that accepts; NULL with the reason in fail_message when none does. */
const format_linear *format_linear_find(const precision *p, int32_t arch);
const format_kv *format_kv_find(kv_format f, int32_t arch);

/* Can `p` run on `arch`, all its layers' K and V formats included? UNSUPPORTED with the name and
 * the reason otherwise. K and V are chosen independently, and so is each layer. */
status format_supported(const precision *p, int32_t arch);

/* "cpu", "sm_80", or a GPU of the sweep as RTX 4090, rtx-4090, H100-SXM (letter case, blanks,
 * dashes and underscores do not count) -> architecture. NOTFOUND with the names that are known. */
status arch_parse(int32_t *arch, const char *name);
/* "cpu" or "sm_89", into buf[16]; returns buf. */
const char *arch_text(int32_t arch, char *buf);

/* Architectures that kernels are built for, ARCH_CPU first; a GPU of each for the reader, "" for
 * cpu. */
int32_t arch_count(void);
int32_t arch_at(int32_t i);
const char *arch_gpus(int32_t i);

#ifdef __cplusplus
}
#endif
#endif
