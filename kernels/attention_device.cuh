// attention_device.cuh - what the attention kernels of every architecture do alike: addresses in a
// page and conversions of single codes. See attention.h for the layout.
#ifndef AMALGAM_ATTENTION_DEVICE_CUH
#define AMALGAM_ATTENTION_DEVICE_CUH
#include "attention_plan.h"
#include "traits.cuh"
#include <type_traits>

namespace {

constexpr float kLog2E = 1.4426950408889634f;
constexpr int kPage = KV_PAGE_TOKENS;

// threadIdx.x read anew: what follows from it is not kept in registers all the time.
__device__ __forceinline__ int thread_anew() {
    uint32_t t;
    asm volatile("mov.u32 %0, %%tid.x;" : "=r"(t));
    return (int)(t % 1024);
}

// attention_code_at on the device.
__device__ __forceinline__ int code_at(int row_bytes, int token, int at) {
    const int panel = min(row_bytes, 128), pieces = panel / 16, share = 128 / panel, r = token % 8;
    const int turned = (at % panel / 16) ^ (r / share % pieces);
    return token / 8 * 8 * row_bytes + at / panel * 8 * panel + r * panel + turned * 16 + at % 16;
}

__device__ __forceinline__ int row_bytes_of(kv_format f, int head_dim) {
    return f == KF_16 ? 2 * head_dim : f == KF_4 ? head_dim / 2 : head_dim;
}

// e4m3 as the fp16 of the same sign, exponent field and mantissa: the value times 2^-8, subnormals
// too.
__device__ __forceinline__ float e4m3_value(uint32_t code) {
    const uint16_t bits = (uint16_t)((code & 0x80u) << 8 | (code & 0x7fu) << 7);
    return __half2float(__ushort_as_half(bits)) * 256.f;
}

// --- PTX, one instruction each -------------------------------------------------------------------

__device__ __forceinline__ uint32_t shared_at(const void *p) {
    return (uint32_t)__cvta_generic_to_shared(p);
}

__device__ __forceinline__ float exp2_approx(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// Four 8 x 8 matrices of 16-bit elements; lane i gives the address of row i % 8 of matrix i / 8.
__device__ __forceinline__ void load_matrices(uint32_t (&r)[4], uint32_t at) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(at));
}
__device__ __forceinline__ void load_matrices_turned(uint32_t (&r)[4], uint32_t at) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(at));
}
__device__ __forceinline__ uint32_t turn_matrix(uint32_t x) {
    uint32_t y;
    asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(y) : "r"(x));
    return y;
}

// c[16, 8] += a[16, 16] b[16, 8]
template <typename T>
__device__ __forceinline__ void mma(float (&c)[4], uint32_t a0, uint32_t a1, uint32_t a2,
                                    uint32_t a3, uint32_t b0, uint32_t b1);
template <>
__device__ __forceinline__ void mma<__half>(float (&c)[4], uint32_t a0, uint32_t a1, uint32_t a2,
                                            uint32_t a3, uint32_t b0, uint32_t b1) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, "
                 "{%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                 : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}
template <>
__device__ __forceinline__ void mma<__nv_bfloat16>(float (&c)[4], uint32_t a0, uint32_t a1,
                                                   uint32_t a2, uint32_t a3, uint32_t b0,
                                                   uint32_t b1) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, "
                 "{%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                 : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

// c[16, 8] += a[16, 32] b[32, 8], a of unsigned bytes, b of signed ones.
__device__ __forceinline__ void mma_integers(int (&c)[4], const uint32_t (&a)[4], uint32_t b0,
                                             uint32_t b1) {
    asm volatile("mma.sync.aligned.m16n8k32.row.col.s32.u8.s8.s32 {%0, %1, %2, %3}, "
                 "{%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
                 : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// The type of 16-bit operands where an instance serves both: asked for at each product, which costs
// an instruction that is not executed.
struct either {};

template <typename T>
__device__ __forceinline__ void mma_of(float (&c)[4], uint32_t a0, uint32_t a1, uint32_t a2,
                                       uint32_t a3, uint32_t b0, uint32_t b1, bool bf16) {
    if constexpr (!std::is_same<T, either>::value)
        mma<T>(c, a0, a1, a2, a3, b0, b1);
    else
        asm volatile("{ .reg .pred p; setp.ne.u32 p, %10, 0;\n"
                     "@p mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, "
                     "{%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};\n"
                     "@!p mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, "
                     "{%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3}; }"
                     : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                     : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1), "r"((int)bf16));
}
template <typename T> __device__ __forceinline__ uint32_t pack2_of(float lo, float hi, bool bf16) {
    if constexpr (!std::is_same<T, either>::value)
        return pack2<T>(lo, hi);
    else
        return bf16 ? pack2<__nv_bfloat16>(lo, hi) : pack2<__half>(lo, hi);
}

__device__ __forceinline__ void barrier_init(uint32_t at, int count) {
    asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(at), "r"(count) : "memory");
}
__device__ __forceinline__ void barrier_arrive(uint32_t at) {
    asm volatile("{ .reg .b64 t; mbarrier.arrive.shared.b64 t, [%0]; }" ::"r"(at) : "memory");
}
__device__ __forceinline__ void barrier_wait(uint32_t at, uint32_t parity) {
    uint32_t done;
    do {
#if __CUDA_ARCH__ >= 900
        asm volatile("{ .reg .pred p; mbarrier.try_wait.parity.shared.b64 p, [%1], %2; "
                     "selp.u32 %0, 1, 0, p; }"
                     : "=r"(done)
                     : "r"(at), "r"(parity)
                     : "memory");
#else
        asm volatile("{ .reg .pred p; mbarrier.test_wait.parity.shared.b64 p, [%1], %2; "
                     "selp.u32 %0, 1, 0, p; }"
                     : "=r"(done)
                     : "r"(at), "r"(parity)
                     : "memory");
#endif
    } while (!done);
}
// One thread of the barrier's count arrives and announces bytes of bulk copies.
__device__ __forceinline__ void barrier_expect(uint32_t at, uint32_t bytes) {
#if __CUDA_ARCH__ >= 900
    asm volatile("{ .reg .b64 t; mbarrier.arrive.expect_tx.shared.b64 t, [%0], %1; }" ::"r"(at),
                 "r"(bytes)
                 : "memory");
#endif
}
// bytes: a multiple of 16, both addresses too.
__device__ __forceinline__ void copy_bulk(uint32_t to, const void *from, uint32_t bytes,
                                          uint32_t barrier) {
#if __CUDA_ARCH__ >= 900
    asm volatile(
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, "
        "[%3];" ::"r"(to),
        "l"(from), "r"(bytes), "r"(barrier)
        : "memory");
#endif
}
// The same of what is read once: L2 lets go of it first, so that plans, page numbers and partial
// results stay there.
__device__ __forceinline__ void copy_bulk_once(uint32_t to, const void *from, uint32_t bytes,
                                               uint32_t barrier) {
#if __CUDA_ARCH__ >= 900
    uint64_t policy;
    asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint "
                 "[%0], [%1], %2, [%3], %4;" ::"r"(to),
                 "l"(from), "r"(bytes), "r"(barrier), "l"(policy)
                 : "memory");
#endif
}
// Bytes that will be read soon: to L2.
__device__ __forceinline__ void prefetch_bulk(const void *from, uint32_t bytes) {
#if __CUDA_ARCH__ >= 900
    asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(from), "r"(bytes) : "memory");
#endif
}
__device__ __forceinline__ void copy_async(uint32_t to, const void *from) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(from) : "memory");
}
// This thread's arrival, once all its copies so far have landed.
__device__ __forceinline__ void copy_async_arrive(uint32_t barrier) {
    asm volatile("cp.async.mbarrier.arrive.noinc.shared.b64 [%0];" ::"r"(barrier) : "memory");
}
// Ordinary stores to shared memory become visible to (and ordered with) bulk copies and wgmma.
__device__ __forceinline__ void fence_async_proxy() {
#if __CUDA_ARCH__ >= 900
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#endif
}

} // namespace
#endif
