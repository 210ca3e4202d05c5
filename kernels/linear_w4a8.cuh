// linear_w4a8.cuh - W4 beside 8-bit x, on Hopper: A fragments of int8 wgmma from words of 4-bit
// codes (linear_layout.h), and that product.
//
//   multiply_nibbles<NT>: D [64, NT] int32 = A [64, 32] s8 from registers x B [NT, 32]^T s8 from
//   shared memory (rows of 128 bytes, 128-byte swizzle, linear_byte_input's order), added to D
#ifndef LINEAR_W4A8_CUH
#define LINEAR_W4A8_CUH
#include "linear_dequant.cuh"
#include "ptx_sm90.cuh"

// Sums that start at these bits are, read as f32, NIBBLE_START_VALUE more than they are, as long as
// they are within 2^22.
enum : int32_t { NIBBLE_START = 0x4b400000 };
constexpr float NIBBLE_START_VALUE = 12582912.f;
__device__ __forceinline__ void nibble_start(int32_t &sum) { // here, not behind a wgmma.fence
    asm volatile("mov.b32 %0, 0x4b400000;" : "=r"(sum));
}
// For a lane's rows g and g + 8 in a granule 128 less the zero point, at most 112, in each byte, so
// that no byte carries.
__device__ __forceinline__ void nibble_offsets(uint32_t (&offset)[2],
                                               const dequant_packed &packed) {
    offset[0] = 0x80808080u - __byte_perm(packed.zero, 0, 0);
    offset[1] = 0x80808080u - __byte_perm(packed.zero, 0, 0x1111);
}

// Codes less zero points of the word of an atom: rows g and g + 8, four inputs each. Of atoms j and
// j + 1 these are a[0..1] and a[2..3] of a fragment.
__device__ __forceinline__ void nibble_codes(uint32_t &g, uint32_t &g8, uint32_t word,
                                             const uint32_t (&offset)[2]) {
    g = ((word & 0x0f0f0f0fu) + offset[0]) ^ 0x80808080u;
    g8 = ((word >> 4 & 0x0f0f0f0fu) + offset[1]) ^ 0x80808080u;
}

#if !defined(__CUDA_ARCH__) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
template <int NT> struct multiply_nibbles;

#define PLACES_88        PLACES_80 ", %80, %81, %82, %83, %84, %85, %86, %87"
#define SUMS_88(kind, i) SUMS_80(kind, i), SUMS_8(kind, i + 80)

#define NIBBLES_MULTIPLY(N, R, A0, A1, A2, A3, B)                                                  \
    template <> struct multiply_nibbles<N> {                                                       \
        static __device__ __forceinline__ void run(int32_t (&d)[R], const uint32_t *a,             \
                                                   uint64_t b) {                                   \
            asm volatile("wgmma.mma_async.sync.aligned.m64n" #N "k32.s32.s8.s8 {" PLACES_##R       \
                         "}, {%" #A0 ", %" #A1 ", %" #A2 ", %" #A3 "}, %" #B ", 1;"                \
                         : SUMS_##R("+r", 0)                                                       \
                         : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));                    \
        }                                                                                          \
    };
NIBBLES_MULTIPLY(16, 8, 8, 9, 10, 11, 12)
NIBBLES_MULTIPLY(24, 12, 12, 13, 14, 15, 16)
NIBBLES_MULTIPLY(32, 16, 16, 17, 18, 19, 20)
NIBBLES_MULTIPLY(48, 24, 24, 25, 26, 27, 28)
NIBBLES_MULTIPLY(64, 32, 32, 33, 34, 35, 36)
NIBBLES_MULTIPLY(80, 40, 40, 41, 42, 43, 44)
NIBBLES_MULTIPLY(128, 64, 64, 65, 66, 67, 68)
NIBBLES_MULTIPLY(176, 88, 88, 89, 90, 91, 92)
#undef NIBBLES_MULTIPLY
#endif
#endif
