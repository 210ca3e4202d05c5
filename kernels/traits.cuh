// traits.cuh - the one template header of the kernels: element types, conversions, reductions, and
// the status of a launch. Everything else belongs to a family.
#ifndef AMALGAM_TRAITS_CUH
#define AMALGAM_TRAITS_CUH
#include "kernel.h"
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

template <dtype> struct element;
template <> struct element<DT_F32> { using type = float; };
template <> struct element<DT_F16> { using type = __half; };
template <> struct element<DT_BF16> { using type = __nv_bfloat16; };

__device__ __forceinline__ float to_f32(float x) { return x; }
__device__ __forceinline__ float to_f32(__half x) { return __half2float(x); }
__device__ __forceinline__ float to_f32(__nv_bfloat16 x) { return __bfloat162float(x); }

// To nearest, ties to even; past the largest fp16 comes infinity.
template <typename T> __device__ __forceinline__ T from_f32(float x);
template <> __device__ __forceinline__ float from_f32<float>(float x) { return x; }
template <> __device__ __forceinline__ __half from_f32<__half>(float x) {
    return __float2half_rn(x);
}
template <> __device__ __forceinline__ __nv_bfloat16 from_f32<__nv_bfloat16>(float x) {
    return __float2bfloat16_rn(x);
}

// Two elements of 16 bits, the first in the lower half.
template <typename T> __device__ __forceinline__ uint32_t pack2(float lo, float hi);
template <> __device__ __forceinline__ uint32_t pack2<__half>(float lo, float hi) {
    const __half2 h = __floats2half2_rn(lo, hi);
    return *reinterpret_cast<const uint32_t *>(&h);
}
template <> __device__ __forceinline__ uint32_t pack2<__nv_bfloat16>(float lo, float hi) {
    const __nv_bfloat162 h = __floats2bfloat162_rn(lo, hi);
    return *reinterpret_cast<const uint32_t *>(&h);
}

// Sixteen bytes of elements: what one thread loads or stores at a time. Addresses are aligned to
// that.
template <typename T> struct alignas(16) pack {
    static constexpr int n = 16 / (int)sizeof(T);
    T v[n];
};
template <typename T> __device__ __forceinline__ pack<T> load_pack(const T *p) {
    pack<T> r;
    *reinterpret_cast<uint4 *>(&r) = *reinterpret_cast<const uint4 *>(p);
    return r;
}
template <typename T> __device__ __forceinline__ void store_pack(T *p, const pack<T> &r) {
    *reinterpret_cast<uint4 *>(p) = *reinterpret_cast<const uint4 *>(&r);
}

// Every lane gets the result; the order of additions is fixed.
__device__ __forceinline__ float warp_sum(float x) {
#pragma unroll
    for (int d = 16; d > 0; d >>= 1) x += __shfl_xor_sync(~0u, x, d);
    return x;
}
__device__ __forceinline__ float warp_max(float x) {
#pragma unroll
    for (int d = 16; d > 0; d >>= 1) x = fmaxf(x, __shfl_xor_sync(~0u, x, d));
    return x;
}

// Sum over a block of up to 1024 threads (a multiple of 32), in a fixed order; every thread gets
// it. `shared` holds 32 floats and may be used again only after another barrier.
__device__ __forceinline__ float block_sum(float x, float *shared) {
    const int warps = (int)blockDim.x / 32, lane = (int)threadIdx.x % 32;
    x = warp_sum(x);
    if (lane == 0) shared[threadIdx.x / 32] = x;
    __syncthreads();
    return warp_sum(lane < warps ? shared[lane] : 0.f);
}

// Philox4x32-10, as engine/rng.c has it (Salmon et al. 2011).
__device__ __forceinline__ void philox_block(uint64_t seed, uint64_t counter, uint32_t out[4]) {
    uint32_t c0 = (uint32_t)counter, c1 = (uint32_t)(counter >> 32), c2 = 0, c3 = 0;
    uint32_t k0 = (uint32_t)seed, k1 = (uint32_t)(seed >> 32);
#pragma unroll
    for (int round = 0; round < 10; round++) {
        const uint32_t h0 = __umulhi(0xD2511F53u, c0), l0 = 0xD2511F53u * c0;
        const uint32_t h1 = __umulhi(0xCD9E8D57u, c2), l1 = 0xCD9E8D57u * c2;
        c0 = h1 ^ c1 ^ k0;
        c2 = h0 ^ c3 ^ k1;
        c1 = l1;
        c3 = l0;
        k0 += 0x9E3779B9u;
        k1 += 0xBB67AE85u;
    }
    out[0] = c0;
    out[1] = c1;
    out[2] = c2;
    out[3] = c3;
}

// What a launcher returns right after its launch.
static inline status launched(const char *what) {
    const cudaError_t e = cudaGetLastError();
    return e == cudaSuccess ? ST_OK : FAIL(ST_DEVICE, "%s: %s", what, cudaGetErrorString(e));
}

// `make CHAOS=1`: one time in `odds` a warp sleeps for a random time below `most` ns, so that what
// nothing but good timing keeps right goes wrong. Nothing in other builds.
__device__ __forceinline__ void chaos(unsigned odds, unsigned most) {
#ifdef AMALGAM_CHAOS
    unsigned h; // of the clock: the same in all lanes that come here together
    asm volatile("mov.u32 %0, %%clock;" : "=r"(h));
    h ^= (threadIdx.x / 32 + 1) * 0x9E3779B9u ^ (blockIdx.x + 1) * 0x85EBCA6Bu;
    h *= 0xC2B2AE35u;
    h = (h ^ h >> 15) * 0x27D4EB2Fu;
    h ^= h >> 13;
    if (h % odds == 0) __nanosleep((h >> 8) % most);
#else
    (void)odds;
    (void)most;
#endif
}

// Dependent launch, on sm_90 and later: a kernel of launch_early may start while the one before it
// in the stream still runs, hence reads and writes nothing of others, constants apart, before
// follow_previous. That also lets the next one start, once every block has come here. Some thread
// of every such kernel must wait, so that the end of a kernel is the end of all before it.
// Constants are weights and the tables of the step: what uploads those is no early launch, nor is
// the first kernel behind it (rows.h), so they are there before any early one starts.
__device__ __forceinline__ void launch_dependents() {
    chaos(8, 10000);
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}
__device__ __forceinline__ void wait_for_previous() {
#if __CUDA_ARCH__ >= 900
    chaos(8, 10000);
    asm volatile("griddepcontrol.wait;" ::: "memory");
    chaos(4, 30000);
#endif
}
__device__ __forceinline__ void follow_previous() {
    launch_dependents();
    wait_for_previous();
}

static inline bool early_launches() {
    static int major = 0;
    int device = 0;
    if (major == 0 &&
        (cudaGetDevice(&device) != cudaSuccess ||
         cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) != cudaSuccess))
        return false;
    return major >= 9;
}

// How a kernel is launched: early (launch_dependents) or after all before it, in clusters of
// `cluster` blocks or in none (0). Not copied: config points to attrs.
struct launch_config {
    cudaLaunchAttribute attrs[2];
    cudaLaunchConfig_t config = {};

    launch_config(dim3 grid, dim3 block, size_t shared_bytes, kernel_stream stream, bool early,
                  unsigned cluster = 0) {
        config.gridDim = grid;
        config.blockDim = block;
        config.dynamicSmemBytes = shared_bytes;
        config.stream = (cudaStream_t)stream;
        config.attrs = attrs;
        if (early) {
            attrs[0].id = cudaLaunchAttributeProgrammaticStreamSerialization;
            attrs[0].val.programmaticStreamSerializationAllowed = 1;
            config.numAttrs = 1;
        }
        if (cluster) {
            attrs[config.numAttrs].id = cudaLaunchAttributeClusterDimension;
            attrs[config.numAttrs].val.clusterDim = {cluster, 1, 1};
            config.numAttrs++;
        }
    }
    launch_config(const launch_config &) = delete;
    launch_config &operator=(const launch_config &) = delete;
};

// Clusters of `cluster` blocks; more than one only where there are early launches. room: bytes of
// shared memory that a block takes beside its own, used or not; those only there, too.
template <typename... P, typename... A>
status launch_clusters(const char *what, void (*kernel)(P...), dim3 grid, dim3 block,
                       unsigned cluster, unsigned room, cudaStream_t s, A... argument) {
    const bool early = early_launches();
    const launch_config l(grid, block, early ? room : 0, s, early,
                          early && cluster > 1 ? cluster : 0);
    if (early && room)
        (void)cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)room);
    (void)cudaLaunchKernelEx(&l.config, kernel, static_cast<P>(argument)...);
    return launched(what);
}

// What an early launch takes for constant may have been written by the kernel before this one: it
// begins when that has ended, its stores done, and the early one cannot begin before it.
template <typename = void> __global__ void nothing() {}
static inline void launch_nothing(cudaStream_t s) { nothing<><<<1, 1, 0, s>>>(); }

template <typename... P, typename... A>
status launch_early(const char *what, void (*kernel)(P...), dim3 grid, dim3 block, cudaStream_t s,
                    A... argument) {
    return launch_clusters(what, kernel, grid, block, 1, 0, s, argument...);
}
#endif
