// linear_epilogue.cuh - what becomes of sums on their way to y: the gate, and elements whose type
// is known at run time only.
#ifndef LINEAR_EPILOGUE_CUH
#define LINEAR_EPILOGUE_CUH
#include "linear.h"
#include "traits.cuh"

// Where sums go, for kernels whose code does not depend on the type of y.
struct linear_output {
    const void *bias; // [n] of the weight's type, or NULL
    void *y;          // [m, half], f32 or of the weight's type
    int64_t ldy;
    int32_t m, n, k;
    int32_t half; // first row of up; n where W has no halves
    linear_epilogue epilogue;
    float limit;
    bool gated, bf16, y_f32; // bf16: the weight's type
};
// Of rows row .. row + m of a problem.
inline linear_output linear_output_of(const linear_problem *p, int32_t row, int32_t m) {
    const linear_weight *w = p->w;
    linear_output a = {};
    a.bias = w->bias;
    a.y = static_cast<uint8_t *>(p->y) + row * p->ldy * (p->y_type == DT_F32 ? 4 : 2);
    a.ldy = p->ldy;
    a.m = m;
    a.n = w->n;
    a.k = w->k;
    a.epilogue = p->epilogue;
    a.limit = p->limit;
    a.gated = p->epilogue == LINEAR_GATED || p->epilogue == LINEAR_GATED_OAI;
    a.half = a.gated ? w->n / 2 : w->n;
    a.bf16 = w->type == DT_BF16;
    a.y_f32 = p->y_type == DT_F32;
    return a;
}

// The smaller and the larger of two, NaN if one is: fminf and fmaxf would hide it.
__device__ __forceinline__ float linear_min(float a, float b) {
    float v;
    asm("min.NaN.f32 %0, %1, %2;" : "=f"(v) : "f"(a), "f"(b));
    return v;
}
__device__ __forceinline__ float linear_max(float a, float b) {
    float v;
    asm("max.NaN.f32 %0, %1, %2;" : "=f"(v) : "f"(a), "f"(b));
    return v;
}

// LINEAR_GATED or LINEAR_GATED_OAI of one output. Reciprocals are good to two places of f32; of
// more than 2^126 they give the zero that a 16-bit result is.
__device__ __forceinline__ float linear_gate(float g, float u, int epilogue, float limit) {
    if (epilogue == LINEAR_GATED) return __fdividef(1.f, 1.f + __expf(-g)) * g * u;
    g = linear_min(g, limit);
    u = linear_min(linear_max(u, -limit), limit);
    return __fdividef(1.f, 1.f + __expf(-1.702f * g)) * g * (u + 1.f);
}

// Element i of p: f32, or bf16 or fp16.
__device__ __forceinline__ float linear_element(const void *p, int64_t i, bool bf16, bool f32) {
    if (f32) return static_cast<const float *>(p)[i];
    return bf16 ? to_f32(static_cast<const __nv_bfloat16 *>(p)[i])
                : to_f32(static_cast<const __half *>(p)[i]);
}

// Four sums of one row to y + at, a multiple of four. up: the same outputs of up, where gated.
__device__ __forceinline__ void linear_put_four(const linear_output &a, int64_t at, float (&v)[4],
                                                const float (&up)[4]) {
    if (a.gated) {
#pragma unroll
        for (int i = 0; i < 4; i++) v[i] = linear_gate(v[i], up[i], a.epilogue, a.limit);
    } else if (a.epilogue == LINEAR_RESIDUAL) {
#pragma unroll
        for (int i = 0; i < 4; i++) v[i] += linear_element(a.y, at + i, a.bf16, a.y_f32);
    }
    if (a.y_f32) {
        *reinterpret_cast<float4 *>(static_cast<float *>(a.y) + at) =
            make_float4(v[0], v[1], v[2], v[3]);
        return;
    }
    alignas(8) uint16_t e[4];
#pragma unroll
    for (int i = 0; i < 4; i++)
        e[i] = a.bf16 ? __bfloat16_as_ushort(from_f32<__nv_bfloat16>(v[i]))
                      : __half_as_ushort(from_f32<__half>(v[i]));
    *reinterpret_cast<uint2 *>(static_cast<uint16_t *>(a.y) + at) =
        *reinterpret_cast<const uint2 *>(e);
}
#endif
