// ptx_sm90.cuh - Hopper's instructions, one function each: mbarriers, bulk copies, wgmma.
//
// multiply_group<NT>: D [64, NT] f32 += A [64, 16] from registers x B [NT, 16]^T from shared
// memory (rows of 128 bytes, 128-byte swizzle). One asm statement an N, since its operands are
// the accumulators, d[0 .. NT / 2).
#ifndef PTX_SM90_CUH
#define PTX_SM90_CUH
#include "traits.cuh"
#include "wgmma_operands.cuh"
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <stdint.h>

__device__ __forceinline__ uint32_t shared_address(const void *p) {
    return (uint32_t)__cvta_generic_to_shared(p);
}

// --- Barriers in shared memory ------------------------------------------------------------------

__device__ __forceinline__ void barrier_init(uint32_t bar, int arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(bar), "r"(arrivals) : "memory");
}
__device__ __forceinline__ void barrier_arrive(uint32_t bar) {
    chaos(16, 3000);
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(bar) : "memory");
}
__device__ __forceinline__ void barrier_arrive_expect(uint32_t bar, int bytes) {
    chaos(16, 3000);
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(bar), "r"(bytes)
                 : "memory");
}
// Arrives when all cp.async of this thread have landed; counts among the arrivals of init.
__device__ __forceinline__ void barrier_arrive_copies(uint32_t bar) {
    asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(bar) : "memory");
}
__device__ __forceinline__ void barrier_wait(uint32_t bar, int parity) {
    asm volatile("{\n"
                 ".reg .pred done;\n"
                 "again:\n"
                 "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1, 0x989680;\n"
                 "@done bra finished;\n"
                 "bra again;\n"
                 "finished:\n"
                 "}" ::"r"(bar),
                 "r"(parity)
                 : "memory");
    chaos(16, 3000);
}
__device__ __forceinline__ bool barrier_test(uint32_t bar, int parity) {
    uint32_t done;
    asm volatile("{\n"
                 ".reg .pred done;\n"
                 "mbarrier.test_wait.parity.shared::cta.b64 done, [%1], %2;\n"
                 "selp.u32 %0, 1, 0, done;\n"
                 "}"
                 : "=r"(done)
                 : "r"(bar), "r"(parity)
                 : "memory");
    return done != 0;
}
__device__ __forceinline__ void barrier_init_fence() {
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}
// Ordinary writes to shared memory before, reads by the tensor cores or the copy engine after.
__device__ __forceinline__ void proxy_fence() {
    chaos(16, 3000);
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

// --- Copies -------------------------------------------------------------------------------------

__device__ __forceinline__ void copy_bulk(uint32_t to, const void *from, int bytes, uint32_t bar,
                                          uint64_t policy) {
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint "
                 "[%0], [%1], %2, [%3], %4;" ::"r"(to),
                 "l"(from), "r"(bytes), "r"(bar), "l"(policy)
                 : "memory");
}
// Sixteen bytes by this thread, the first `bytes` of them from memory and zeros behind.
__device__ __forceinline__ void copy_some(uint32_t to, const void *from, int bytes) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(bytes)
                 : "memory");
}
__device__ __forceinline__ void copy_tile(uint32_t to, const void *map, int col, int row,
                                          uint32_t bar) {
    asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes "
                 "[%0], [%1, {%2, %3}], [%4];" ::"r"(to),
                 "l"(map), "r"(col), "r"(row), "r"(bar)
                 : "memory");
}

// The same to one place in both CTAs of a cluster of two, and bytes that lie together.
__device__ __forceinline__ void copy_tile_to_both(uint32_t to, const void *map, int col, int row,
                                                  uint32_t bar) {
    asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes"
                 ".multicast::cluster [%0], [%1, {%2, %3}], [%4], %5;" ::"r"(to),
                 "l"(map), "r"(col), "r"(row), "r"(bar), "h"((uint16_t)3)
                 : "memory");
}
__device__ __forceinline__ void copy_bulk_to_both(uint32_t to, const void *from, int bytes,
                                                  uint32_t bar) {
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes"
                 ".multicast::cluster [%0], [%1], %2, [%3], %4;" ::"r"(to),
                 "l"(from), "r"(bytes), "r"(bar), "h"((uint16_t)3)
                 : "memory");
}

__device__ __forceinline__ uint64_t policy_evict_first() {
    uint64_t p;
    asm volatile("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(p));
    return p;
}
__device__ __forceinline__ uint64_t policy_evict_normal() {
    uint64_t p;
    asm volatile("createpolicy.fractional.L2::evict_normal.b64 %0, 1.0;" : "=l"(p));
    return p;
}

// --- Clusters -----------------------------------------------------------------------------------

// This CTA's place in its cluster, and how many there are.
__device__ __forceinline__ int cluster_rank() {
    int r;
    asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(r));
    return r;
}
__device__ __forceinline__ int cluster_size() {
    int n;
    asm volatile("mov.u32 %0, %%cluster_nctarank;" : "=r"(n));
    return n;
}
// Apart, so that work lies between; arriving makes nothing visible.
__device__ __forceinline__ void cluster_arrive() {
    chaos(16, 3000);
    asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
}
__device__ __forceinline__ void cluster_wait() {
    asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
    chaos(8, 5000);
}
// Where `at` of this CTA is in the shared memory of another.
__device__ __forceinline__ uint32_t remote_address(uint32_t at, uint32_t rank) {
    uint32_t r;
    asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(r) : "r"(at), "r"(rank));
    return r;
}
__device__ __forceinline__ void remote_arrive(uint32_t bar) {
    chaos(16, 3000);
    asm volatile("mbarrier.arrive.shared::cluster.b64 _, [%0];" ::"r"(bar) : "memory");
}
// Four floats into another CTA's shared memory, counted by a barrier there.
__device__ __forceinline__ void remote_store(uint32_t to, const float *v, uint32_t bar) {
    chaos(16, 3000);
    asm volatile("st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v4.f32 [%0], "
                 "{%1, %2, %3, %4}, [%5];" ::"r"(to),
                 "f"(v[0]), "f"(v[1]), "f"(v[2]), "f"(v[3]), "r"(bar)
                 : "memory");
}

// --- Registers: given back by a warpgroup that needs few, taken by one that needs many -----------

template <int N> __device__ __forceinline__ void registers_down() {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(N));
}
template <int N> __device__ __forceinline__ void registers_up() {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(N));
}

// --- wgmma --------------------------------------------------------------------------------------

__device__ __forceinline__ void group_fence() {
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}
__device__ __forceinline__ void group_commit() {
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}
template <int N> __device__ __forceinline__ void group_wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(N) : "memory");
}
// Keeps the compiler from moving reads and writes of accumulators across.
template <int N> __device__ __forceinline__ void group_pin(float (&acc)[N]) {
#pragma unroll
    for (int i = 0; i < N; i++) asm volatile("" : "+f"(acc[i])::"memory");
}
template <int N> __device__ __forceinline__ void group_pin(int32_t (&acc)[N]) {
#pragma unroll
    for (int i = 0; i < N; i++) asm volatile("" : "+r"(acc[i])::"memory");
}

// Rows of 128 bytes, 8 of them 1024 bytes, 128-byte swizzle (PTX ISA 8.5, section 9.7.14.5.1).
// Sixteen 2-byte elements further along a row are 32 bytes further. Shared addresses have 18
// bits.
enum { GROUP_DESCRIPTOR_HIGH = 64 | 1 << 30 };
__device__ __forceinline__ uint64_t group_descriptor_of(uint32_t low, uint32_t high) {
    uint64_t d;
    asm("mov.b64 %0, {%1, %2};" : "=l"(d) : "r"(low), "r"(high));
    return d;
}
__device__ __forceinline__ uint64_t group_descriptor_low(uint32_t low) { // at >> 4 | 1 << 16
    return group_descriptor_of(low, GROUP_DESCRIPTOR_HIGH);
}
__device__ __forceinline__ uint64_t group_descriptor(uint32_t at) {
    return group_descriptor_low(at >> 4 | 1u << 16);
}

template <typename T, int NT> struct multiply_group;

#define GROUP_MULTIPLY(T, TYPE, N, R, A0, A1, A2, A3, B)                                           \
    template <> struct multiply_group<T, N> {                                                      \
        GROUP_MULTIPLY_RUN(run, "1", TYPE, N, R, A0, A1, A2, A3, B)                                \
        GROUP_MULTIPLY_RUN(run_fresh, "0", TYPE, N, R, A0, A1, A2, A3, B)                          \
    };
#define GROUP_MULTIPLY_RUN(NAME, ADD, TYPE, N, R, A0, A1, A2, A3, B)                               \
    static __device__ __forceinline__ void NAME(float *d, const uint32_t(&a)[4], uint64_t b) {     \
        asm volatile("wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." TYPE "." TYPE               \
                     " {" PLACES_##R "}, {%" #A0 ", %" #A1 ", %" #A2 ", %" #A3 "}, %" #B ", " ADD  \
                                     ", 1, 1, 0;"                                                  \
                     : SUMS_##R("+f", 0)                                                           \
                     : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));                        \
    }
#define GROUP_MULTIPLIES(...)                                                                      \
    GROUP_MULTIPLY(__half, "f16", __VA_ARGS__)                                                     \
    GROUP_MULTIPLY(__nv_bfloat16, "bf16", __VA_ARGS__)
GROUP_MULTIPLIES(8, 4, 4, 5, 6, 7, 8)
GROUP_MULTIPLIES(16, 8, 8, 9, 10, 11, 12)
GROUP_MULTIPLIES(24, 12, 12, 13, 14, 15, 16)
GROUP_MULTIPLIES(32, 16, 16, 17, 18, 19, 20)
GROUP_MULTIPLIES(40, 20, 20, 21, 22, 23, 24)
GROUP_MULTIPLIES(48, 24, 24, 25, 26, 27, 28)
GROUP_MULTIPLIES(56, 28, 28, 29, 30, 31, 32)
GROUP_MULTIPLIES(64, 32, 32, 33, 34, 35, 36)
GROUP_MULTIPLIES(72, 36, 36, 37, 38, 39, 40)
GROUP_MULTIPLIES(80, 40, 40, 41, 42, 43, 44)
GROUP_MULTIPLIES(96, 48, 48, 49, 50, 51, 52)
GROUP_MULTIPLIES(112, 56, 56, 57, 58, 59, 60)
GROUP_MULTIPLIES(128, 64, 64, 65, 66, 67, 68)
GROUP_MULTIPLIES(256, 128, 128, 129, 130, 131, 132)
#undef GROUP_MULTIPLIES
#undef GROUP_MULTIPLY
#undef GROUP_MULTIPLY_RUN
#endif
