/* gpu.h - data sheets of GPUs: workloads/gpus/<name>.json, with the source of every figure:
 * {"title": ..., "<field>": {"value": number, "source": text}, ..., "calibrated": text}. */
#ifndef AMALGAM_GPU_H
#define AMALGAM_GPU_H
#include "base.h"

/* All rates are dense (no 2:4 sparsity), in operations or bytes per second; 0 = the GPU has no such
 * unit. f16 is the rate with f32 accumulation, which is what an engine uses. */
typedef struct {
    char name[32];  /* file name without .json: "h200", "rtx4090" */
    char title[64]; /* "NVIDIA H200 SXM" */
    int32_t sm;     /* compute capability * 10 */
    int32_t n_sms;
    double f16_flops, int8_ops, fp8_flops;
    double f32_flops;                          /* CUDA cores: dequantisation, softmax */
    double dram_bytes_per_s, link_bytes_per_s; /* link: one direction, to the peers of a node */
    int64_t memory_bytes, reserved_bytes; /* as the driver reports; taken by context, libraries */
    int64_t l2_bytes;
    /* Calibration: what a well-written kernel reaches, as a fraction of the figures above, and
     * fixed costs. From measurements where `calibrated` names them, else from the data sheet
     * defaults. */
    double dram_efficiency, matrix_efficiency;
    double launch_s, step_s,
        link_latency_s;  /* per kernel in a graph; per engine step; per collective */
    char calibrated[96]; /* "" or e.g. "results/e07_linear/... commit" */
} gpu_sheet;

/* By name from workloads/gpus under root_dir(). NOTFOUND lists the names there are. */
status gpu_load(gpu_sheet *out, const char *name);

/* The same from memory, without the name; FORMAT, RANGE or NOTFOUND with the key. Every field of
 * gpu_sheet is required, with a source. */
status gpu_parse(gpu_sheet *out, const char *data, size_t n, const char *where);

/* Names of all sheets, sorted; *n of them in arena memory. */
status gpu_names(arena *a, const char ***names, int32_t *n);
#endif
