/* bench_cuda.c - see bench_cuda.h. */
#include "bench_cuda.h"
#include "cudev.h"
#include "nvml.h"

#include <cuda_runtime_api.h>
#include <stdio.h>
#include <stdlib.h>

enum { WARM_UPS = 2, REPLAYS = 9 };

status bench_cuda_open(void) {
    int32_t n_gpus;
    return cudev_count(&n_gpus);
}

status bench_cuda_check(int cuda_error, const char *call) {
    const cudaError_t e = (cudaError_t)cuda_error;
    return e == cudaSuccess ? ST_OK : FAIL(ST_DEVICE, "%s: %s", call, cudaGetErrorString(e));
}

void bench_print_gpu(void) {
    char buf[NVML_JSON_MAX];
    if (nvml_json(buf)[0]) printf("{\"kind\":\"gpu\",%s\n", buf + 1);
}

static int ascending(const void *a, const void *b) {
    const float x = *(const float *)a, y = *(const float *)b;
    return (x > y) - (x < y);
}

status bench_replay(cudaGraph_t graph, kernel_stream stream, int32_t n_launches, double *us) {
    cudaGraphExec_t exec;
    cudaEvent_t from, to;
    float ms[REPLAYS];
    CUDA(cudaGraphInstantiate(&exec, graph, 0));
    CUDA(cudaEventCreate(&from));
    CUDA(cudaEventCreate(&to));
    for (int32_t i = -WARM_UPS; i < REPLAYS; i++) {
        CUDA(cudaEventRecord(from, stream));
        CUDA(cudaGraphLaunch(exec, stream));
        CUDA(cudaEventRecord(to, stream));
        CUDA(cudaEventSynchronize(to));
        if (i >= 0) CUDA(cudaEventElapsedTime(&ms[i], from, to));
    }
    qsort(ms, REPLAYS, sizeof *ms, ascending);
    *us = (double)ms[REPLAYS / 2] * 1e3 / n_launches;
    CUDA(cudaEventDestroy(from));
    CUDA(cudaEventDestroy(to));
    CUDA(cudaGraphExecDestroy(exec));
    CUDA(cudaGraphDestroy(graph));
    return ST_OK;
}
