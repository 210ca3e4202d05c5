// mma_sync.cuh - matrix products of a warp and the loads of their operands, from sm_80 on.
#ifndef MMA_SYNC_CUH
#define MMA_SYNC_CUH
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <stdint.h>

// Four 8 x 8 matrices of 16-bit elements from shared memory; lane l names row l % 8 of matrix
// l / 8.
__device__ __forceinline__ void load_matrices(uint32_t *r, uint32_t at) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(at)
                 : "memory");
}

// An 8 x 8 matrix of 16-bit elements across a warp, turned: lane 4 i + j holds elements 2 j and
// 2 j + 1 of row i.
__device__ __forceinline__ uint32_t turned(uint32_t v) {
    uint32_t r;
    asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(r) : "r"(v));
    return r;
}

// c[16, 8] += a[16, 16] b[16, 8] in f32.
#define MULTIPLY(T, TYPE)                                                                          \
    __device__ __forceinline__ void multiply(float *c, const uint32_t *a, uint32_t b0,             \
                                             uint32_t b1, T) {                                     \
        asm("mma.sync.aligned.m16n8k16.row.col.f32." TYPE "." TYPE ".f32 {%0,%1,%2,%3}, "          \
            "{%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"                                               \
            : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])                                       \
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));                       \
    }
MULTIPLY(__half, "f16")
MULTIPLY(__nv_bfloat16, "bf16")
#undef MULTIPLY
#endif
