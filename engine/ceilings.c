/* ceilings.c - see ceilings.h. */
#include "ceilings.h"
#include "cudev.h"

#include "bandwidth.h"
#include "fill.h"

#include <cublas_v2.h>
#include <cuda_runtime_api.h>

enum { SIDE = 8192, READS = 5, PRODUCTS = 8 };
static const int64_t read_bytes = (int64_t)4 << 30, guard_bytes = 256;

typedef struct {
    cudaEvent_t start, stop;
    kernel_stream stream;
} stopwatch;

static status stopped(const stopwatch *w, double *best_s) {
    float ms = 0;
    CUDA_TRY(cudaEventRecord(w->stop, w->stream), "ceiling");
    CUDA_TRY(cudaEventSynchronize(w->stop), "ceiling");
    CUDA_TRY(cudaEventElapsedTime(&ms, w->start, w->stop), "ceiling");
    if (*best_s == 0 || (double)ms * 1e-3 < *best_s) *best_s = (double)ms * 1e-3;
    return ST_OK;
}

static status time_read(const stopwatch *w, int32_t n_sms, void *block, double *best_s) {
    uint32_t *sum = (uint32_t *)(void *)((uint8_t *)block + read_bytes);
    CUDA_TRY(cudaMemsetAsync(block, 0x5a, (size_t)(read_bytes + guard_bytes), w->stream),
             "ceiling");
    for (int i = 0; i < READS; i++) {
        CUDA_TRY(cudaEventRecord(w->start, w->stream), "ceiling");
        TRY(kernel_read(sum, block, read_bytes, n_sms, w->stream));
        TRY(stopped(w, best_s));
    }
    return ST_OK;
}

static status time_product(const stopwatch *w, dtype of, void *block, double *best_s) {
    const int64_t each = (int64_t)SIDE * SIDE;
    uint8_t *a = block, *b = a + 2 * each, *y = b + 2 * each;
    const cudaDataType_t type = of == DT_BF16 ? CUDA_R_16BF : CUDA_R_16F;
    const float one = 1, none = 0;
    cublasHandle_t handle;
    TRY(kernel_fill_noise(a, of, 2 * each, 1, 0, 1, 0, w->stream)); /* a and b */
    if (cublasCreate(&handle) != CUBLAS_STATUS_SUCCESS)
        return FAIL(ST_DEVICE, "ceiling: cuBLAS does not start");
    status st = ST_OK;
    cublasStatus_t good = cublasSetStream(handle, w->stream);
    for (int i = 0; i < PRODUCTS && st == ST_OK && good == CUBLAS_STATUS_SUCCESS; i++) {
        st = cudev_check((int)cudaEventRecord(w->start, w->stream), "ceiling");
        good =
            cublasGemmEx(handle, CUBLAS_OP_T, CUBLAS_OP_N, SIDE, SIDE, SIDE, &one, a, type, SIDE, b,
                         type, SIDE, &none, y, type, SIDE, CUBLAS_COMPUTE_32F, CUBLAS_GEMM_DEFAULT);
        if (st == ST_OK && good == CUBLAS_STATUS_SUCCESS && i > 1) /* the first two warm up */
            st = stopped(w, best_s);
    }
    (void)cublasDestroy(handle);
    if (st == ST_OK && good != CUBLAS_STATUS_SUCCESS)
        return FAIL(ST_DEVICE, "ceiling: cuBLAS error %d", (int)good);
    return st;
}

status ceilings_measure(double *read_bytes_per_s, double *matrix_flops, dtype type, int32_t n_sms,
                        kernel_stream stream) {
    stopwatch w = {.stream = stream};
    void *block;
    double read_s = 0, product_s = 0;
    CUDA_TRY(cudaMalloc(&block, (size_t)(read_bytes + guard_bytes)), "4 GiB for the ceilings");
    status st = cudev_check((int)cudaEventCreate(&w.start), "event");
    if (st == ST_OK) st = cudev_check((int)cudaEventCreate(&w.stop), "event");
    if (st == ST_OK) st = time_read(&w, n_sms, block, &read_s);
    if (st == ST_OK) st = time_product(&w, type, block, &product_s);
    if (w.start) (void)cudaEventDestroy(w.start);
    if (w.stop) (void)cudaEventDestroy(w.stop);
    (void)cudaFree(block);
    TRY(st);
    *read_bytes_per_s = (double)read_bytes / read_s;
    *matrix_flops = 2.0 * SIDE * SIDE * SIDE / product_s;
    return ST_OK;
}
