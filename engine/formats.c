/* formats.c - see formats.h. */
#include "formats.h"

#include <ctype.h>
#include <string.h>

static const format_linear linear_rows[] = {
#define LINEAR(w, a, sm_min, sm_max, step, family, instruction)                                    \
    {WF_##w, AF_##a, sm_min, sm_max, step, family, instruction},
#include "formats.def"
};

static const format_kv kv_rows[] = {
#define KVROW(kv, sm_min, sm_max, family, instruction)                                             \
    {KF_##kv, sm_min, sm_max, family, instruction},
#include "formats.def"
};

static const struct {
    int32_t arch;
    const char *gpus;
} archs[] = {
    {ARCH_CPU, ""},         {80, "A100-80GB"},      {86, "RTX 3090, A10, A40"},
    {89, "RTX 4090, L40S"}, {90, "H100-SXM, H200"},
};

/* Names a user may type, in the form that `plain` makes; compute capabilities after NVIDIA's table
 * of CUDA GPUs. Data sheets are not here: workloads/ has them. */
static const struct {
    const char *name;
    int32_t arch;
} gpus[] = {
    {"cpu", ARCH_CPU}, {"a100", 80},    {"a10080gb", 80}, {"a10040gb", 80}, {"rtx3090", 86},
    {"a10", 86},       {"a40", 86},     {"rtx4090", 89},  {"l40s", 89},     {"l4", 89},
    {"h100", 90},      {"h100sxm", 90}, {"h200", 90},     {"sm80", 80},     {"sm86", 86},
    {"sm89", 89},      {"sm90", 90},    {"sm90a", 90},
};

int32_t arch_count(void) { return COUNT_OF(archs); }

int32_t arch_at(int32_t i) {
    CHECK(i >= 0 && i < COUNT_OF(archs));
    return archs[i].arch;
}

const char *arch_gpus(int32_t i) {
    CHECK(i >= 0 && i < COUNT_OF(archs));
    return archs[i].gpus;
}

const char *arch_text(int32_t arch, char *buf) {
    if (arch == ARCH_CPU)
        strcpy(buf, "cpu");
    else
        snprintf(buf, 16, "sm_%d", arch);
    return buf;
}

/* Lower case, letters and digits only; false when it does not fit. */
static bool plain(char *buf, size_t size, const char *name) {
    size_t n = 0;
    for (; *name; name++) {
        if (strchr(" -_", *name)) continue;
        if (n + 1 >= size) return false;
        buf[n++] = (char)tolower((unsigned char)*name);
    }
    buf[n] = 0;
    return true;
}

status arch_parse(int32_t *arch, const char *name) {
    char key[32];
    if (plain(key, sizeof key, name))
        for (int32_t i = 0; i < COUNT_OF(gpus); i++) {
            if (strcmp(gpus[i].name, key) != 0) continue;
            *arch = gpus[i].arch;
            return ST_OK;
        }
    return FAIL(ST_NOTFOUND,
                "GPU '%.40s' is none of cpu, sm_80 (A100), sm_86 (RTX 3090, A10, A40), "
                "sm_89 (RTX 4090, L40S, L4), sm_90 (H100, H200)",
                name);
}

const format_linear *format_linear_rows(int32_t *n) {
    *n = COUNT_OF(linear_rows);
    return linear_rows;
}

const format_kv *format_kv_rows(int32_t *n) {
    *n = COUNT_OF(kv_rows);
    return kv_rows;
}

/* --- Support ---------------------------------------------------------------------------------- */

/* Why a pair has no meaning on any device; NULL when it has one. */
static const char *meaningless(weight_format w, act_format a) {
    if (a == AF_16) return NULL;
    if (w == WF_16) return "activations are quantised only beside quantised weights; use A16";
    if (w == WF_MXFP4 || w == WF_NVFP4) return "FP4 weights are weight-only here; use A16";
    const bool int_weight = w == WF_INT8 || w == WF_INT4;
    if (a == AF_INT8 && !int_weight) return "int8 activations need int weights (W8 or W4)";
    if (a == AF_FP8 && int_weight) return "FP8 activations need FP8 weights (WFP8 or WFP8b)";
    return NULL;
}

static bool covers(int32_t sm_min, int32_t sm_max, int32_t arch) {
    return arch >= sm_min && arch <= sm_max;
}

const format_linear *format_linear_find(const precision *p, int32_t arch) {
    char name[16];
    arch_text(arch, name);
    const char *w = weight_format_text(p->weight), *a = act_format_text(p->act);
    const char *why = meaningless(p->weight, p->act);
    int32_t step = -1;
    if (!why)
        for (int32_t i = 0; i < COUNT_OF(linear_rows); i++) {
            const format_linear *row = &linear_rows[i];
            if (row->weight != p->weight || row->act != p->act) continue;
            if (!covers(row->sm_min, row->sm_max, arch)) continue;
            if (row->group_step ? p->group % row->group_step == 0 : p->group == 0) return row;
            step = row->group_step;
        }
    if (why)
        FAIL(ST_UNSUPPORTED, "W%sA%s: %s", w, a, why);
    else if (step == 0)
        FAIL(ST_UNSUPPORTED, "W%sA%s on %s: one scale a row, no group of %d", w, a, name, p->group);
    else if (step > 0)
        FAIL(ST_UNSUPPORTED, "W%sA%s on %s: the group of %d is no multiple of %d", w, a, name,
             p->group, step);
    else if (arch < SM_FIRST)
        FAIL(ST_UNSUPPORTED, "%s is older than sm_%d, the first that kernels are built for", name,
             SM_FIRST);
    else if (p->act == AF_FP8)
        FAIL(ST_UNSUPPORTED, "W%sA%s: %s has no FP8 matrix instruction; use A16 (weight-only)", w,
             a, name);
    else
        FAIL(ST_UNSUPPORTED, "W%sA%s has no kernel for %s", w, a, name);
    return NULL;
}

const format_kv *format_kv_find(kv_format f, int32_t arch) {
    char name[16];
    for (int32_t i = 0; i < COUNT_OF(kv_rows); i++)
        if (kv_rows[i].kv == f && covers(kv_rows[i].sm_min, kv_rows[i].sm_max, arch))
            return &kv_rows[i];
    FAIL(ST_UNSUPPORTED, "KV%s has no kernel for %s", kv_format_text(f), arch_text(arch, name));
    return NULL;
}

status format_supported(const precision *p, int32_t arch) {
    if (!format_linear_find(p, arch)) return ST_UNSUPPORTED;
    const int32_t layers = p->n_kv_layers ? p->n_kv_layers : 1;
    for (int32_t layer = 0; layer < layers; layer++) {
        const kv_pair kv = precision_kv(p, layer);
        if (!format_kv_find((kv_format)kv.k, arch)) return ST_UNSUPPORTED;
        if (!format_kv_find((kv_format)kv.v, arch)) return ST_UNSUPPORTED;
    }
    return ST_OK;
}
