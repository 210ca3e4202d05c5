// linear_dequant.cuh - codes to f16 or bf16 pairs in registers, in the order of the A fragment.
//
// A lane's word holds 8 codes = 4 pairs; pairs 0 and 2 belong to row g of the strip, 1 and 3 to
// row g+8. Integers of 4 bits are subnormals as they lie, in bf16 also of the exponent that goes on
// from them: c 2^-24 in f16, c 2^-133 in bf16, or 16 times that. What makes numbers of 2^-9 and
// 2^-6 of them subtracts the zero point too, exactly; the scale takes in what is missing, so in f16
// it is to be below 128. Instructions that read one register instead of two leave the tensor cores
// more of the registers' time. Floats are moved onto the fields of the wider type and
// multiplied by the power of two that mends the exponent, which is exact too, subnormals
// included. Only the product with the scale rounds.
//
// Instructions for 8 weights, scale included: u4 13; e2m1 16, folded 12; s8 8; e4m3 f16 4, bf16 12.
#ifndef LINEAR_DEQUANT_CUH
#define LINEAR_DEQUANT_CUH
#include "linear_layout.h"
#include "mma_sync.cuh"

#include <cuda_bf16.h>
#include <cuda_fp16.h>

template <typename T> struct half_pair; // two elements in one register
template <> struct half_pair<__half> {
    using type = __half2;
    static constexpr bool bf16 = false;
    static __device__ __forceinline__ uint32_t from_f32(float x) {
        const __half2 h = __float2half2_rn(x);
        return *reinterpret_cast<const uint32_t *>(&h);
    }
};
template <> struct half_pair<__nv_bfloat16> {
    using type = __nv_bfloat162;
    static constexpr bool bf16 = true;
    static __device__ __forceinline__ uint32_t from_f32(float x) {
        const __nv_bfloat162 h = __float2bfloat162_rn(x);
        return *reinterpret_cast<const uint32_t *>(&h);
    }
};

template <typename T> __device__ __forceinline__ uint32_t pair_sub(uint32_t a, uint32_t b) {
    using P = typename half_pair<T>::type;
    const P r = __hsub2(*reinterpret_cast<P *>(&a), *reinterpret_cast<P *>(&b));
    return *reinterpret_cast<const uint32_t *>(&r);
}
template <typename T> __device__ __forceinline__ uint32_t pair_mul(uint32_t a, uint32_t b) {
    using P = typename half_pair<T>::type;
    const P r = __hmul2(*reinterpret_cast<P *>(&a), *reinterpret_cast<P *>(&b));
    return *reinterpret_cast<const uint32_t *>(&r);
}

template <typename T>
__device__ __forceinline__ uint32_t pair_fma(uint32_t a, uint32_t b, uint32_t c) {
    using P = typename half_pair<T>::type;
    const P r =
        __hfma2(*reinterpret_cast<P *>(&a), *reinterpret_cast<P *>(&b), *reinterpret_cast<P *>(&c));
    return *reinterpret_cast<const uint32_t *>(&r);
}

// The largest power of two, less by 2^kLess, twice: 2^15 in f16 and 2^127 in bf16.
template <typename T, bool kMinus = false, int kLess = 0>
constexpr uint32_t kPairTop = (half_pair<T>::bf16 ? 0x7f007f00u - kLess * 0x00800080u
                                                  : 0x78007800u - kLess * 0x04000400u) |
                              (kMinus ? 0x80008000u : 0u);

// Of the low or the high half of v.
template <bool kHigh = false> __device__ __forceinline__ uint32_t e4m3_pair_f16(uint32_t v) {
    uint32_t r;
#if __CUDA_ARCH__ >= 890
    if (kHigh)
        asm("{.reg .b16 l, h; mov.b32 {l, h}, %1; cvt.rn.f16x2.e4m3x2 %0, h;}" : "=r"(r) : "r"(v));
    else
        asm("{.reg .b16 l, h; mov.b32 {l, h}, %1; cvt.rn.f16x2.e4m3x2 %0, l;}" : "=r"(r) : "r"(v));
#else
    v = __byte_perm(v, 0, kHigh ? 0x3424 : 0x1404);
    r = pair_mul<__half>((v & 0x80008000u) | (v >> 1 & 0x3f803f80u), 0x5c005c00u);
#endif
    return r;
}

// (v & mask) | bits in one instruction; the compiler makes two of it when both are constants.
template <uint32_t kMask> __device__ __forceinline__ uint32_t and_or(uint32_t v, uint32_t bits) {
    uint32_t r;
    asm("lop3.b32 %0, %1, %2, %3, 0xEA;" : "=r"(r) : "r"(v), "n"(kMask), "r"(bits));
    return r;
}
__device__ __forceinline__ uint32_t shared_u32(uint32_t at) {
    uint32_t v;
    asm volatile("ld.shared.u32 %0, [%1];" : "=r"(v) : "r"(at) : "memory");
    return v;
}
__device__ __forceinline__ uint32_t shared_u16(uint32_t at) {
    uint16_t v;
    asm volatile("ld.shared.u16 %0, [%1];" : "=h"(v) : "r"(at) : "memory");
    return v;
}
__device__ __forceinline__ uint2 shared_u64(uint32_t at) {
    uint2 v;
    asm volatile("ld.shared.v2.u32 {%0, %1}, [%2];" : "=r"(v.x), "=r"(v.y) : "r"(at) : "memory");
    return v;
}
__device__ __forceinline__ uint4 shared_u128(uint32_t at) {
    uint4 v;
    asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                 : "r"(at)
                 : "memory");
    return v;
}

// Where a lane reads its words of a strip from: they lie one behind the other, or, of 16 bits, as
// rows with the swizzle, of which ldmatrix makes them.
template <int F> __device__ __forceinline__ int dequant_lane_at(int lane) {
    return F == WF_16 ? linear_chunk_at(lane % 16, lane / 16) : lane * 16;
}
// Sixteen bytes of words, number c of a unit's; `at`: the strip and dequant_lane_at.
template <int F> __device__ __forceinline__ uint4 dequant_load(uint32_t at, int c) {
    if (F != WF_16) return shared_u128(at + c * 512);
    uint32_t r[4];
    load_matrices(r, at ^ c * 32);
    return make_uint4(r[0], r[1], r[2], r[3]);
}

// Scales of a lane's two rows, as pairs, and what is subtracted from integers.
struct dequant_scales {
    uint32_t scale[2], zero[2];
};

// What a kernel keeps of a granule until it needs it.
struct dequant_packed {
    uint32_t scale, zero;
};

// Folded: the scale takes in the power of two that mends the words' exponents, which saves a
// multiplication. So that it stays a number of the type, weights come out smaller than they are,
// and the sums are to be multiplied by this; such formats have no scales of channels. MXFP4: for
// scales up to 2^41 (bf16) or 2^3 (f16), and in f16 scales below 2^-26 become zero; NVFP4: for all;
// e4m3 in blocks (bf16): up to 2^47.
template <typename T, int F> __host__ __device__ constexpr float dequant_unfold() {
    constexpr bool bf16 = half_pair<T>::bf16;
    if (F != WF_MXFP4 && F != WF_NVFP4 && !(F == WF_FP8B && bf16)) return 1.f;
    return bf16 ? 0x1p40f : F == WF_MXFP4 ? 0x1p2f : 0x1p7f;
}

// `granule`: 64 rows, in shared memory; `place` = strip * 16 + g * 2.
template <int F>
__device__ __forceinline__ void dequant_load_packed(dequant_packed &s, uint32_t granule, int place,
                                                    bool sym) {
    s.zero = 0x0808u;
    if (F == WF_INT4) {
        s.scale = shared_u32(granule + 2 * place);
        if (!sym) s.zero = shared_u16(granule + 128 + place);
    } else if (F == WF_FP8B) {
        s.scale = shared_u32(granule + place / 16 * 4);
    } else {
        s.scale = shared_u16(granule + place);
    }
}

// The scales of a lane's two rows in f32.
template <int F>
__device__ __forceinline__ void dequant_unpack(float (&scale)[2], const dequant_packed &from) {
    if (F == WF_INT4) {
        const __half2 h = *reinterpret_cast<const __half2 *>(&from.scale);
        scale[0] = __low2float(h);
        scale[1] = __high2float(h);
    } else if (F == WF_MXFP4) {
#pragma unroll
        for (int i = 0; i < 2; i++) { // 2^(e - 127); e = 0 is a subnormal f32
            const uint32_t e = __byte_perm(from.scale, 0, i ? 0x1444 : 0x0444) >> 1;
            scale[i] = __uint_as_float(max(e, 0x00400000u));
        }
    } else if (F == WF_NVFP4) {
        const uint32_t pair = e4m3_pair_f16(from.scale);
        const __half2 h = *reinterpret_cast<const __half2 *>(&pair);
        scale[0] = __low2float(h);
        scale[1] = __high2float(h);
    } else if (F == WF_FP8B) {
        scale[0] = scale[1] = __uint_as_float(from.scale);
    }
}

// Scales of a lane's two rows, a half each.
template <typename T, int F, bool kFolded>
__device__ __forceinline__ uint32_t dequant_scale_pair(const dequant_packed &from) {
    constexpr bool bf16 = half_pair<T>::bf16;
    constexpr uint32_t kFold = (86u << 7) * 0x10001u; // bf16: exponents + 126 to mend, less 40
    float scale[2];
    if (F == WF_MXFP4 && !bf16) {
        const uint32_t h = __byte_perm(from.scale, 0, 0x1404); // with what mends, 2^14 less 2
        return kFolded ? h : pair_mul<T>(h, 0x0c000c00u);
    }
    if (F == WF_MXFP4 && kFolded) // exponents that are to gain + 126 - 40
        return (__byte_perm(from.scale, 0, 0x4140) << 7) + kFold;
    if (F == WF_NVFP4 && !bf16) {
        const uint32_t h = e4m3_pair_f16(from.scale);
        return kFolded ? pair_mul<T>(h, 0x58005800u) : h; // 2^14 to mend, less 7
    }
    dequant_unpack<F>(scale, from);
    if (F == WF_FP8B && bf16 && kFolded) scale[0] = scale[1] *= 0x1p80f; // 2^120 less 40
    const __nv_bfloat162 b = __floats2bfloat162_rn(scale[0], scale[1]);
    const __half2 h = __floats2half2_rn(scale[0], scale[1]);
    if (!bf16) return *reinterpret_cast<const uint32_t *>(&h);
    // A scale of zero becomes 2^-41, whose products with codes as they lie are zero.
    return *reinterpret_cast<const uint32_t *>(&b) + (F == WF_NVFP4 && kFolded ? kFold : 0);
}

__device__ __forceinline__ uint32_t low_twice(uint32_t v) {
    uint32_t r;
    asm("{.reg .b16 l, h; mov.b32 {l, h}, %1; mov.b32 %0, {l, l};}" : "=r"(r) : "r"(v));
    return r;
}
__device__ __forceinline__ uint32_t high_twice(uint32_t v) {
    uint32_t r;
    asm("{.reg .b16 l, h; mov.b32 {l, h}, %1; mov.b32 %0, {h, h};}" : "=r"(r) : "r"(v));
    return r;
}

// Scales and zeros of a lane's two rows, a half each: half the registers, and fewer instructions,
// since those that take a half of an operand twice cost nothing more.
struct dequant_rows {
    uint32_t scale, zero;
};

template <typename T, int F, bool kFolded>
__device__ __forceinline__ dequant_rows dequant_rows_of(const dequant_packed &from) {
    dequant_rows r;
    if (F == WF_INT4) {
        constexpr bool bf16 = half_pair<T>::bf16;
        uint32_t scale = from.scale;
        if (bf16) {
            const __half2 h = *reinterpret_cast<const __half2 *>(&scale);
            const __nv_bfloat162 b = __floats2bfloat162_rn(__low2float(h), __high2float(h));
            scale = *reinterpret_cast<const uint32_t *>(&b);
        }
        r.scale = pair_mul<T>(scale, bf16 ? 0x42804280u : 0x60006000u); // 2^6 s, 2^9 s
        r.zero = pair_mul<T>(__byte_perm(from.zero, 0, 0x4140), kPairTop<T, true>);
    } else {
        r.zero = 0; // only integers have any
        r.scale = dequant_scale_pair<T, F, kFolded>(from);
    }
    return r;
}

__device__ __forceinline__ dequant_scales dequant_scales_of(const dequant_rows &r) {
    return dequant_scales{{low_twice(r.scale), high_twice(r.scale)},
                          {low_twice(r.zero), high_twice(r.zero)}};
}

template <typename T, int F, bool kFolded = false>
__device__ __forceinline__ void dequant_scales_of(dequant_scales &s, const dequant_packed &from) {
    s = dequant_scales_of(dequant_rows_of<T, F, kFolded>(from));
}

template <typename T, int F, bool kFolded = false>
__device__ __forceinline__ void dequant_load_scales(dequant_scales &s, uint32_t granule, int place,
                                                    bool sym) {
    dequant_packed packed;
    dequant_load_packed<F>(packed, granule, place, sym);
    dequant_scales_of<T, F, kFolded>(s, packed);
}

// Words without their scale are exact but for this factor: f16 keeps e2m1 as it lies.
template <typename T, int F> __device__ __forceinline__ constexpr float dequant_factor() {
    if (F == WF_INT4) return half_pair<T>::bf16 ? 64.f : 512.f;
    return (F == WF_MXFP4 || F == WF_NVFP4) && !half_pair<T>::bf16 ? 16384.f : 1.f;
}

// One word (1, 2 or 4 registers) to the four registers of an A fragment, with the scale or without.
template <typename T, int F, bool kScaled = true, bool kFolded = false>
__device__ __forceinline__ void dequant_word(uint32_t a[4], const uint32_t *word,
                                             const dequant_scales &s) {
    constexpr bool bf16 = half_pair<T>::bf16;
    if (F == WF_16) {
#pragma unroll
        for (int i = 0; i < 4; i++) a[i] = word[i];
    } else if (F == WF_INT4) {
        const uint32_t v = word[0], high = v >> 8;
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const uint32_t code = (i / 2 ? high : v) & (i % 2 ? 0x00f000f0u : 0x000f000fu);
            a[i] = pair_fma<T>(code, i % 2 ? kPairTop<T, false, 4> : kPairTop<T>, s.zero[i % 2]);
            if (kScaled) a[i] = pair_mul<T>(a[i], s.scale[i % 2]);
        }
    } else if (F == WF_MXFP4 || F == WF_NVFP4) {
        const uint32_t v = word[0];
#pragma unroll
        for (int i = 0; i < 4; i++) a[i] = linear_e2m1_pair(v, bf16, i);
        const uint32_t mend = bf16 ? 0x7e807e80u : 0x74007400u; // 2^126, 2^14
#pragma unroll
        for (int i = 0; i < 4; i++) {
            if (!kFolded && (kScaled || bf16)) a[i] = pair_mul<T>(a[i], mend);
            if (kScaled) a[i] = pair_mul<T>(a[i], s.scale[i % 2]);
        }
    } else if (F == WF_INT8) { // stored plus 128; bf16: 1/64 of the code
#pragma unroll
        for (int i = 0; i < 2; i++) {
            const uint32_t v = word[i];
            if (bf16) {
                // Bytes are subnormals, or of the exponent that goes on from them: times 2^-133.
                a[2 * i] = pair_fma<T>(__byte_perm(v, 0, 0x4240), 0x7f007f00u, 0xc000c000u);
                a[2 * i + 1] = pair_fma<T>(__byte_perm(v, 0, 0x4341), 0x7f007f00u, 0xc000c000u);
            } else {
                a[2 * i] = pair_sub<T>(__byte_perm(v, 0x64646464u, 0x4240), 0x64806480u);
                a[2 * i + 1] = pair_sub<T>(__byte_perm(v, 0x64646464u, 0x4341), 0x64806480u);
            }
        }
    } else { // e4m3, four codes a register in order
#pragma unroll
        for (int i = 0; i < 4; i++) {
            if (bf16) {
                a[i] = linear_e4m3_pair(word[i / 2], i % 2);
                if (F == WF_FP8 || !kFolded) a[i] = pair_mul<T>(a[i], 0x7b807b80u); // 2^120
            } else {
                a[i] = i % 2 ? e4m3_pair_f16<true>(word[i / 2]) : e4m3_pair_f16(word[i / 2]);
            }
            if (F == WF_FP8B && kScaled) a[i] = pair_mul<T>(a[i], s.scale[i % 2]);
        }
    }
}
#endif
