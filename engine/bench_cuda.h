/* bench_cuda.h - what benchmarks of kernels share; compiled only where CUDA is. */
#ifndef AMALGAM_BENCH_CUDA_H
#define AMALGAM_BENCH_CUDA_H
#include "kernel.h"

/* DEVICE, with what is missing, where no GPU can be used: asked before anything is made. */
status bench_cuda_open(void);

/* Return DEVICE with the call in the message where it fails. */
#define CUDA(call) TRY(bench_cuda_check((int)(call), #call))
status bench_cuda_check(int cuda_error, const char *call);

/* A last line of JSON, {"kind":"gpu",...}: what NVML says right after the last problem. */
void bench_print_gpu(void);

/* Median over replays of a graph of n_launches, in us a launch; the graph is destroyed. */
struct CUgraph_st;
status bench_replay(struct CUgraph_st *graph, kernel_stream stream, int32_t n_launches, double *us);
#endif
