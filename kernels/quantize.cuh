// quantize.cuh - one value to its code and back, in every weight format, with the bits of
// ref_quant.c.
#ifndef KERNEL_QUANTIZE_CUH
#define KERNEL_QUANTIZE_CUH
#include "ref_quant.h"
#include "traits.cuh"
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
#endif
