// quantize.cuh - one value to its code and back, in every weight format, and eight activations of a
// thread, with the bits of ref_quant.c.
#ifndef KERNEL_QUANTIZE_CUH
#define KERNEL_QUANTIZE_CUH
#include "ref_quant.h"
#include "traits.cuh"
#include <cfloat>
#include <cmath>
#include <cuda_fp8.h>

#define QUANTIZE_INSTANCES(X) X(INT8) X(INT4) X(FP8) X(FP8B) X(MXFP4) X(NVFP4)

constexpr float kE4m3Max = 448.f, kE2m1Max = 6.f, kF16Max = 65504.f;

template <weight_format F>
constexpr bool four_bits = F == WF_INT4 || F == WF_MXFP4 || F == WF_NVFP4;

__device__ __forceinline__ float clamp_to(float x, float lo, float hi) {
    x = x < lo ? lo : x;
    return x > hi ? hi : x;
}

__device__ __forceinline__ uint8_t e4m3_of(float x) {
    return (uint8_t)__nv_cvt_float_to_fp8(x, __NV_SATFINITE, __NV_E4M3);
}
__device__ __forceinline__ float f32_of_e4m3(uint8_t code) {
    return __half2float(__half(__nv_cvt_fp8_to_halfraw(code, __NV_E4M3)));
}

// To nearest of 0 .5 1 1.5 2 3 4 6, ties to the even code; 6 beyond.
__device__ __forceinline__ int e2m1_of(float x) {
    const float a = fabsf(x);
    const int code = a <= .25f    ? 0
                     : a < .75f   ? 1
                     : a <= 1.25f ? 2
                     : a < 1.75f  ? 3
                     : a <= 2.5f  ? 4
                     : a < 3.5f   ? 5
                     : a <= 5.f   ? 6
                                  : 7;
    return code | (signbit(x) ? 8 : 0);
}

// Code of one value. ORDER quantize: store_codes of ref_quant.c.
template <weight_format F> __device__ __forceinline__ int code_of(float w, float s, float zero) {
    if constexpr (F == WF_INT8) return (int)rintf(clamp_to(w / s, -127, 127)) & 255;
    if constexpr (F == WF_INT4) return (int)clamp_to(rintf(clamp_to(w / s, -31, 31)) + zero, 0, 15);
    if constexpr (F == WF_FP8 || F == WF_FP8B) return e4m3_of(w / s);
    return e2m1_of(w / s);
}

__device__ __forceinline__ float f32_of_e2m1(int code) {
    const int expo = code >> 1 & 3, half = code & 1;
    const float a = expo ? (1 + .5f * (float)half) * (float)(1 << expo) * .5f : .5f * (float)half;
    return code & 8 ? -a : a;
}
__device__ __forceinline__ float f32_of_ue8m0(uint8_t code) {
    return __uint_as_float(code ? (uint32_t)code << 23 : 0x00400000u);
}

// Scale (with the global one) and zero point number `at` of a canonical matrix on the device.
template <weight_format F> __device__ __forceinline__ float scale_of(const qmatrix &q, int64_t at) {
    if constexpr (F == WF_INT4) return __half2float(static_cast<const __half *>(q.scale)[at]);
    if constexpr (F == WF_MXFP4) return f32_of_ue8m0(static_cast<const uint8_t *>(q.scale)[at]);
    if constexpr (F == WF_NVFP4)
        return __fmul_rn(f32_of_e4m3(static_cast<const uint8_t *>(q.scale)[at]), q.global_scale);
    return static_cast<const float *>(q.scale)[at];
}
template <weight_format F> __device__ __forceinline__ float zero_of(const qmatrix &q, int64_t at) {
    if constexpr (F != WF_INT4) return 0.f;
    return q.zero ? (float)q.zero[at] : 8.f;
}

template <weight_format F>
__device__ __forceinline__ float value_of(int code, float s, float zero) {
    if constexpr (F == WF_INT8) return (float)(int8_t)code * s;
    if constexpr (F == WF_INT4) return ((float)code - zero) * s;
    if constexpr (F == WF_FP8 || F == WF_FP8B) return f32_of_e4m3((uint8_t)code) * s;
    return f32_of_e2m1(code) * s;
}

// amax / top: 1 for amax == 0, never 0, and small enough that top * scale is finite.
__host__ __device__ inline float f32_scale(float amax, float top) {
    if (amax == 0) return 1;
    const float s = amax / top;
    if (s == 0) return FLT_TRUE_MIN;
    return isinf(s * top) ? nextafterf(s, 0) : s;
}

// --- Activations ---------------------------------------------------------------------------------

// x / s correctly rounded, with r = 1 / s, rounded: the quotient x r is off by little, and its
// remainder is exact (Markstein), as long as it does not underflow.
__device__ __forceinline__ float quotient(float x, float s, float r) {
    const float q = x * r;
    return fmaf(fmaf(-q, s, x), r, q);
}

// Power of two that x and s are multiplied by, to keep clear of the ends of f32.
__device__ __forceinline__ float to_middle(float s) {
    return s < 0x1p-90f ? 0x1p120f : s > 0x1p100f ? 0x1p-100f : 1.f;
}

// 1 / s rounded, of s that to_middle has moved: what __frcp_rn does once it knows s to be no end.
__device__ __forceinline__ float inverse(float s) {
    float r;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(s));
    return fmaf(r, -fmaf(s, r, -1.f), r);
}

// Two elements, the first in the lower half.
template <typename T> __device__ __forceinline__ float2 pair_of(uint32_t word);
template <> __device__ __forceinline__ float2 pair_of<__half>(uint32_t word) {
    return __half22float2(*reinterpret_cast<const __half2 *>(&word));
}
template <> __device__ __forceinline__ float2 pair_of<__nv_bfloat16>(uint32_t word) {
    return make_float2(__uint_as_float(word << 16), __uint_as_float(word & 0xffff0000u));
}

// Plus an integer of eight bits: that is in the low bits, and nothing is lost.
constexpr float kInteger = 12582912.f;

// Eight elements of one span; amax: the largest magnitude of the span as bits of T.
template <typename T, act_format A> struct eight {
    pack<T> x;
    __device__ __forceinline__ uint32_t magnitudes() const { // two 16-bit maxima
        const uint4 w = *reinterpret_cast<const uint4 *>(&x);
        const uint32_t a = __vmaxu2(w.x & 0x7fff7fffu, w.y & 0x7fff7fffu);
        return __vmaxu2(a, __vmaxu2(w.z & 0x7fff7fffu, w.w & 0x7fff7fffu));
    }
    // Of e4m3 the quotients; of int8 the nearest integers of them as kInteger + i, in f32.
    __device__ __forceinline__ void quotients(float (&q)[8], float s) const {
        const uint4 w = *reinterpret_cast<const uint4 *>(&x);
        const float2 f[4] = {pair_of<T>(w.x), pair_of<T>(w.y), pair_of<T>(w.z), pair_of<T>(w.w)};
        const float shift = to_middle(s), t = s * shift, r = inverse(t);
#pragma unroll
        for (int i = 0; i < 8; i++) q[i] = i % 2 ? f[i / 2].y : f[i / 2].x;
        // The scale is the largest's: only where it is subnormal are others over 127 of it.
        if (__builtin_expect(shift != 1.f, 0))
#pragma unroll
            for (int i = 0; i < 8; i++) {
                q[i] *= shift;
                if (A == AF_INT8) q[i] = clamp_to(q[i], -127 * t, 127 * t);
            }
#pragma unroll
        for (int i = 0; i < 8; i++) {
            q[i] = quotient(q[i], t, r);
            if (A == AF_INT8) q[i] += kInteger;
        }
    }
    static __device__ __forceinline__ uint32_t e4m3_pair(float a, float b) {
        return __nv_cvt_float2_to_fp8x2(make_float2(a, b), __NV_SATFINITE, __NV_E4M3);
    }
    // Where s is NaN, because something was not finite, codes mean nothing.
    __device__ __forceinline__ uint2 codes(float s) const {
        float q[8];
        quotients(q, s);
        uint32_t word[2];
#pragma unroll
        for (int i = 0; i < 2; i++) {
            const float *of = q + 4 * i;
            if constexpr (A == AF_FP8)
                word[i] = e4m3_pair(of[0], of[1]) | e4m3_pair(of[2], of[3]) << 16;
            else
                word[i] = __byte_perm(
                    __byte_perm(__float_as_uint(of[0]), __float_as_uint(of[1]), 0x40),
                    __byte_perm(__float_as_uint(of[2]), __float_as_uint(of[3]), 0x40), 0x5410);
        }
        return make_uint2(word[0], word[1]);
    }
    __device__ __forceinline__ pack<T> values(float s) const {
        float q[8];
        quotients(q, s);
        pack<T> y;
#pragma unroll
        for (int i = 0; i < 8; i += 2) {
            float2 v = make_float2(q[i] - kInteger, q[i + 1] - kInteger);
            if constexpr (A == AF_FP8)
                v = __half22float2(__half2(__nv_cvt_fp8x2_to_halfraw2(
                    (__nv_fp8x2_storage_t)e4m3_pair(q[i], q[i + 1]), __NV_E4M3)));
            reinterpret_cast<uint32_t *>(&y)[i / 2] = pack2<T>(v.x * s, v.y * s);
        }
        return y;
    }
};

template <typename T, act_format A> __device__ __forceinline__ float span_scale(uint32_t amax) {
    T top;
    *reinterpret_cast<uint16_t *>(&top) = (uint16_t)amax;
    const float a = to_f32(top);
    constexpr float largest = A == AF_FP8 ? kE4m3Max : 127.f;
    if (__builtin_expect(a >= 0x1p-90f && a <= 0x1p100f, 1))
        return quotient(a, largest, 1 / largest);
    return a <= FLT_MAX ? f32_scale(a, largest) : NAN;
}

// Codes of eight inputs and of the lane's neighbour, which has the other half of 16, in the order
// of linear_byte_input: the lower lane has places 0..7. All lanes of a warp.
__device__ __forceinline__ uint2 in_atoms(uint2 own) {
    const bool upper = threadIdx.x % 2;
    const uint32_t other = __shfl_xor_sync(~0u, upper ? own.x : own.y, 1);
    const uint32_t low = upper ? other : own.x, high = upper ? own.y : other;
    return make_uint2(__byte_perm(low, high, 0x5140), __byte_perm(low, high, 0x7362));
}
#endif
