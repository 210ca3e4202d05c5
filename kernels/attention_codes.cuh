// attention_codes.cuh - codes of K and V to fp16, many at a time. A value is code * scale + minimum
// rounded once, whichever way it is computed.
#ifndef AMALGAM_ATTENTION_CODES_CUH
#define AMALGAM_ATTENTION_CODES_CUH
#include "attention_device.cuh"

namespace {

__device__ __forceinline__ __half2 half2_of(uint32_t x) {
    return *reinterpret_cast<const __half2 *>(&x);
}
__device__ __forceinline__ uint32_t bits_of(__half2 x) {
    return *reinterpret_cast<const uint32_t *>(&x);
}
// LARGE: the minimum less 1024 scales may be no number of fp16. It is one for minima of 1024 scales
// and less, 16 at 4 bit: multiples of 2 units (1) of a scale below 2 units, and of 2048 of them.
template <kv_format F> __device__ __forceinline__ bool is_large(uint32_t param) {
    const __half s = __low2half(half2_of(param)), m = __high2half(half2_of(param));
    return F != KF_FP8 && !(__hlt(s, __float2half(32.f)) &&
                            __hle(__habs(m), __hmul(s, __float2half(F == KF_4 ? 16.f : 1024.f))));
}
// What makes values of a token's codes: x * scale + minimum for x = 1024 + code (LARGE: the code;
// KF_FP8: the value, x * scale), that minimum being less 1024 scales. From the parameters as they
// are stored.
template <kv_format F, bool LARGE>
__device__ __forceinline__ uint32_t multipliers_of(uint32_t param) {
    if (F == KF_FP8 || LARGE) return param;
    const __half2 x = half2_of(param);
    const __half s = __low2half(x);
    return bits_of(__halves2half2(s, __hfma(s, __float2half(-1024.f), __high2half(x))));
}
template <bool LARGE>
__device__ __forceinline__ uint32_t value_of(uint32_t x, __half2 s, __half2 m) {
    const __half2 c = LARGE ? __hsub2(half2_of(x), __float2half2_rn(1024.f)) : half2_of(x);
    return bits_of(__hfma2(c, s, m));
}
__device__ __forceinline__ uint32_t e4m3_two(uint16_t pair) {
#if __CUDA_ARCH__ >= 890
    uint32_t x;
    asm("cvt.rn.f16x2.e4m3x2 %0, %1;" : "=r"(x) : "h"(pair));
    return x;
#else
    const uint32_t x = __byte_perm(pair, 0, 0x1404); // e4m3_value, two at a time
    const uint32_t h = (x & 0x80008000u) | (x & 0x7f007f00u) >> 1;
    return bits_of(__hmul2(half2_of(h), __float2half2_rn(256.f)));
#endif
}
// Four codes, the bytes of w.
template <kv_format F, bool LARGE>
__device__ __forceinline__ uint2 four_of(uint32_t w, __half2 s, __half2 m) {
    uint32_t x[2];
#pragma unroll
    for (int i = 0; i < 2; i++)
        if (F == KF_FP8) {
            x[i] = bits_of(__hmul2(half2_of(e4m3_two((uint16_t)(w >> i * 16))), s));
        } else {
            x[i] = value_of<LARGE>(__byte_perm(w, 0x64u, i ? 0x4342 : 0x4140), s, m);
        }
    return make_uint2(x[0], x[1]);
}
// Eight codes, the nibbles of w, in the order 0 4 1 5 2 6 3 7.
template <bool LARGE> __device__ __forceinline__ uint4 eight_of(uint32_t w, __half2 s, __half2 m) {
    uint32_t x[4];
#pragma unroll
    for (int i = 0; i < 4; i++)
        x[i] = value_of<LARGE>((w >> 4 * i & 0x000f000fu) | 0x64006400u, s, m);
    return make_uint4(x[0], x[1], x[2], x[3]);
}
// 16 bytes to that order of nibbles, and back.
__device__ __forceinline__ uint4 to_nibbles(uint4 x) {
    return make_uint4(__byte_perm(x.x, x.z, 0x5410), __byte_perm(x.x, x.z, 0x7632),
                      __byte_perm(x.y, x.w, 0x5410), __byte_perm(x.y, x.w, 0x7632));
}

__device__ __forceinline__ uint4 from_nibbles(uint4 x) {
    return make_uint4(__byte_perm(x.x, x.y, 0x5410), __byte_perm(x.z, x.w, 0x5410),
                      __byte_perm(x.x, x.y, 0x7632), __byte_perm(x.z, x.w, 0x7632));
}

} // namespace
#endif
