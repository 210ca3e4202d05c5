// ptx_sm90_codes.cuh - Hopper's matrix products of operands that both lie in shared memory:
//
//   multiply_codes<false, NT>: D [64, NT] f32 = A [64, 32] e4m3 x B [NT, 32]^T, added to D or not
//   multiply_codes<true, NT>:  the same of int8 with int32 sums
//
//   multiply_words<T, NT>: D [64, NT] f32 += A [64, 16] x B [NT, 16]^T of f16 or bf16
//
// A and B are rows of 128 bytes with the 128-byte swizzle (group_descriptor), 32 bytes a step.
#ifndef PTX_SM90_CODES_CUH
#define PTX_SM90_CODES_CUH
#include "ptx_sm90.cuh"

template <bool INT8, int NT> struct multiply_codes;

#define CODES_MULTIPLY(INT8, SUM, KIND, TYPES, N, R, A, B, ADD, SIGNS)                             \
    template <> struct multiply_codes<INT8, N> {                                                   \
        static __device__ __forceinline__ void run(SUM (&d)[R], uint64_t a, uint64_t b, int add) { \
            asm volatile("{\n.reg .pred add;\nsetp.ne.b32 add, %" #ADD ", 0;\n"                    \
                         "wgmma.mma_async.sync.aligned.m64n" #N "k32." TYPES " {" PLACES_##R       \
                         "}, %" #A ", %" #B ", add" SIGNS ";\n}"                                   \
                         : SUMS_##R(KIND, 0)                                                       \
                         : "l"(a), "l"(b), "r"(add));                                              \
        }                                                                                          \
    };
#define CODES_MULTIPLIES(...)                                                                      \
    CODES_MULTIPLY(false, float, "+f", "f32.e4m3.e4m3", __VA_ARGS__, ", 1, 1")                     \
    CODES_MULTIPLY(true, int32_t, "+r", "s32.s8.s8", __VA_ARGS__, "")
CODES_MULTIPLIES(8, 4, 4, 5, 6)
CODES_MULTIPLIES(16, 8, 8, 9, 10)
CODES_MULTIPLIES(32, 16, 16, 17, 18)
CODES_MULTIPLIES(64, 32, 32, 33, 34)
CODES_MULTIPLIES(128, 64, 64, 65, 66)
CODES_MULTIPLIES(192, 96, 96, 97, 98)
CODES_MULTIPLIES(256, 128, 128, 129, 130)
#undef CODES_MULTIPLIES
#undef CODES_MULTIPLY

template <typename T, int NT> struct multiply_words;

#define WORDS_MULTIPLY(T, TYPE, N, R, A, B)                                                        \
    template <> struct multiply_words<T, N> {                                                      \
        static __device__ __forceinline__ void run(float *d, uint64_t a, uint64_t b) {             \
            asm volatile("wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." TYPE "." TYPE           \
                         " {" PLACES_##R "}, %" #A ", %" #B ", 1, 1, 1, 0, 0;"                     \
                         : SUMS_##R("+f", 0)                                                       \
                         : "l"(a), "l"(b));                                                        \
        }                                                                                          \
    };
#define WORDS_MULTIPLIES(...)                                                                      \
    WORDS_MULTIPLY(__half, "f16", __VA_ARGS__)                                                     \
    WORDS_MULTIPLY(__nv_bfloat16, "bf16", __VA_ARGS__)
WORDS_MULTIPLIES(16, 8, 8, 9)
WORDS_MULTIPLIES(32, 16, 16, 17)
WORDS_MULTIPLIES(48, 24, 24, 25)
WORDS_MULTIPLIES(64, 32, 32, 33)
WORDS_MULTIPLIES(72, 36, 36, 37)
WORDS_MULTIPLIES(80, 40, 40, 41)
WORDS_MULTIPLIES(88, 44, 44, 45)
WORDS_MULTIPLIES(96, 48, 48, 49)
WORDS_MULTIPLIES(104, 52, 52, 53)
WORDS_MULTIPLIES(112, 56, 56, 57)
WORDS_MULTIPLIES(120, 60, 60, 61)
WORDS_MULTIPLIES(128, 64, 64, 65)
WORDS_MULTIPLIES(136, 68, 68, 69)
WORDS_MULTIPLIES(144, 72, 72, 73)
WORDS_MULTIPLIES(152, 76, 76, 77)
WORDS_MULTIPLIES(160, 80, 80, 81)
WORDS_MULTIPLIES(192, 96, 96, 97)
WORDS_MULTIPLIES(256, 128, 128, 129)
#undef WORDS_MULTIPLIES
#undef WORDS_MULTIPLY
#endif
