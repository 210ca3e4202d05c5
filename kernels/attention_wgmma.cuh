// attention_wgmma.cuh - the warpgroup products of attention, one instruction each. sm_90a only.
#ifndef AMALGAM_ATTENTION_WGMMA_CUH
#define AMALGAM_ATTENTION_WGMMA_CUH
#include "attention_device.cuh"
#include "wgmma_operands.cuh"

namespace {

// A tile of 64-element panels in the 128-byte swizzle. Bytes between groups of eight rows go to
// `group`, between panels to `panel` (used where the panels run along the result's columns).
__device__ __forceinline__ uint64_t matrix_of(uint32_t at, int group, int panel) {
    return (uint64_t)1 << 62 | (uint64_t)(group >> 4) << 32 | (uint64_t)(panel >> 4) << 16 |
           (uint64_t)((at & 0x3ffff) >> 4);
}
__device__ __forceinline__ void wgmma_fence() {
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}
__device__ __forceinline__ void wgmma_commit() {
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}
template <int N> __device__ __forceinline__ void wgmma_wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(N) : "memory");
}
// The compiler must not move uses of results above the wait.
template <int N> __device__ __forceinline__ void settle(float (&x)[N]) {
#pragma unroll
    for (int i = 0; i < N; i++) asm volatile("" : "+f"(x[i])::"memory");
}

// d[64, N] (+)= a[64, 16] b[16, N]; a in shared memory or in registers, rows of both along k.
template <typename T, int R>
__device__ __forceinline__ void wgmma_rows(float (&d)[R], uint64_t a, uint64_t b, int add);
template <typename T, int R>
__device__ __forceinline__ void wgmma_rows(float (&d)[R], const uint32_t *a, uint64_t b, int add);
// a in registers; b[16, N] with k going down its rows.
template <typename T, int R>
__device__ __forceinline__ void wgmma_columns(float (&d)[R], const uint32_t *a, uint64_t b,
                                              int add);

#define WGMMA_SHARED(T, TYPE, N, R, A0, A1, A2)                                                    \
    template <>                                                                                    \
    __device__ __forceinline__ void wgmma_rows<T, R>(float(&d)[R], uint64_t a, uint64_t b,         \
                                                     int add) {                                    \
        asm volatile("{ .reg .pred p; setp.ne.b32 p, %" #A2 ", 0; "                                \
                     "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." TYPE "." TYPE               \
                     " {" PLACES_##R "}, %" #A0 ", %" #A1 ", p, 1, 1, 0, 0; }"                     \
                     : SUMS_##R("+f", 0)                                                           \
                     : "l"(a), "l"(b), "r"(add));                                                  \
    }
// TURNED: 1 where k goes down the rows of b.
#define WGMMA_KEPT(NAME, TURNED, T, TYPE, N, R, A0, A1, A2, A3, A4, A5)                            \
    template <>                                                                                    \
    __device__ __forceinline__ void NAME<T, R>(float(&d)[R], const uint32_t *a, uint64_t b,        \
                                               int add) {                                          \
        asm volatile("{ .reg .pred p; setp.ne.b32 p, %" #A5 ", 0; "                                \
                     "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." TYPE "." TYPE               \
                     " {" PLACES_##R "}, {%" #A0 ", %" #A1 ", %" #A2 ", %" #A3 "}, %" #A4          \
                                     ", p, 1, 1, " #TURNED "; }"                                   \
                     : SUMS_##R("+f", 0)                                                           \
                     : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(add));              \
    }
#define WGMMA(T, TYPE)                                                                             \
    WGMMA_SHARED(T, TYPE, 64, 32, 32, 33, 34)                                                      \
    WGMMA_SHARED(T, TYPE, 128, 64, 64, 65, 66)                                                     \
    WGMMA_KEPT(wgmma_rows, 0, T, TYPE, 8, 4, 4, 5, 6, 7, 8, 9)                                     \
    WGMMA_KEPT(wgmma_rows, 0, T, TYPE, 64, 32, 32, 33, 34, 35, 36, 37)                             \
    WGMMA_KEPT(wgmma_rows, 0, T, TYPE, 128, 64, 64, 65, 66, 67, 68, 69)                            \
    WGMMA_KEPT(wgmma_columns, 1, T, TYPE, 64, 32, 32, 33, 34, 35, 36, 37)                          \
    WGMMA_KEPT(wgmma_columns, 1, T, TYPE, 128, 64, 64, 65, 66, 67, 68, 69)
WGMMA(__half, "f16")
WGMMA(__nv_bfloat16, "bf16")
#undef WGMMA
#undef WGMMA_KEPT
#undef WGMMA_SHARED

} // namespace
#endif
