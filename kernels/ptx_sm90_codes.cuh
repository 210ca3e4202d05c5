// ptx_sm90_codes.cuh - Hopper's matrix products of 8-bit operands, both from shared memory:
//
//   multiply_codes<false, NT>: D [64, NT] f32 = A [64, 32] e4m3 x B [NT, 32]^T, added to D or not
//   multiply_codes<true, NT>:  the same of int8 with int32 sums
//
// A and B are rows of 128 bytes with the 128-byte swizzle (group_descriptor), 32 inputs a step.
#ifndef PTX_SM90_CODES_CUH
#define PTX_SM90_CODES_CUH
#include "ptx_sm90.cuh"

template <bool INT8, int NT> struct multiply_codes;

// One asm statement an N, since its operands are the accumulators.
template <> struct multiply_codes<false, 8> {
    static __device__ __forceinline__ void run(float (&d)[4], uint64_t a, uint64_t b, int add) {
        asm volatile("{\n.reg .pred add;\nsetp.ne.b32 add, %6, 0;\n"
                     "wgmma.mma_async.sync.aligned.m64n8k32.f32.e4m3.e4m3 "
                     "{%0, %1, %2, %3}, "
                     "%4, %5, add, 1, 1;\n}"
                     : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                     : "l"(a), "l"(b), "r"(add));
    }
};
template <> struct multiply_codes<true, 8> {
    static __device__ __forceinline__ void run(int32_t (&d)[4], uint64_t a, uint64_t b, int add) {
        asm volatile("{\n.reg .pred add;\nsetp.ne.b32 add, %6, 0;\n"
                     "wgmma.mma_async.sync.aligned.m64n8k32.s32.s8.s8 "
                     "{%0, %1, %2, %3}, "
                     "%4, %5, add;\n}"
                     : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3])
                     : "l"(a), "l"(b), "r"(add));
    }
};
template <> struct multiply_codes<false, 16> {
    static __device__ __forceinline__ void run(float (&d)[8], uint64_t a, uint64_t b, int add) {
        asm volatile("{\n.reg .pred add;\nsetp.ne.b32 add, %10, 0;\n"
                     "wgmma.mma_async.sync.aligned.m64n16k32.f32.e4m3.e4m3 "
                     "{%0, %1, %2, %3, %4, %5, %6, %7}, "
                     "%8, %9, add, 1, 1;\n}"
                     : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]),
                       "+f"(d[6]), "+f"(d[7])
                     : "l"(a), "l"(b), "r"(add));
    }
};
template <> struct multiply_codes<true, 16> {
    static __device__ __forceinline__ void run(int32_t (&d)[8], uint64_t a, uint64_t b, int add) {
        asm volatile("{\n.reg .pred add;\nsetp.ne.b32 add, %10, 0;\n"
                     "wgmma.mma_async.sync.aligned.m64n16k32.s32.s8.s8 "
                     "{%0, %1, %2, %3, %4, %5, %6, %7}, "
                     "%8, %9, add;\n}"
                     : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3]), "+r"(d[4]), "+r"(d[5]),
                       "+r"(d[6]), "+r"(d[7])
                     : "l"(a), "l"(b), "r"(add));
    }
};
template <> struct multiply_codes<false, 32> {
    static __device__ __forceinline__ void run(float (&d)[16], uint64_t a, uint64_t b, int add) {
        asm volatile("{\n.reg .pred add;\nsetp.ne.b32 add, %18, 0;\n"
                     "wgmma.mma_async.sync.aligned.m64n32k32.f32.e4m3.e4m3 "
                     "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, "
                     "%12, %13, %14, %15}, "
                     "%16, %17, add, 1, 1;\n}"
                     : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]),
                       "+f"(d[6]), "+f"(d[7]), "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11]),
                       "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15])
                     : "l"(a), "l"(b), "r"(add));
    }
};
template <> struct multiply_codes<true, 32> {
    static __device__ __forceinline__ void run(int32_t (&d)[16], uint64_t a, uint64_t b, int add) {
        asm volatile("{\n.reg .pred add;\nsetp.ne.b32 add, %18, 0;\n"
                     "wgmma.mma_async.sync.aligned.m64n32k32.s32.s8.s8 "
                     "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, "
                     "%12, %13, %14, %15}, "
                     "%16, %17, add;\n}"
                     : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3]), "+r"(d[4]), "+r"(d[5]),
                       "+r"(d[6]), "+r"(d[7]), "+r"(d[8]), "+r"(d[9]), "+r"(d[10]), "+r"(d[11]),
                       "+r"(d[12]), "+r"(d[13]), "+r"(d[14]), "+r"(d[15])
                     : "l"(a), "l"(b), "r"(add));
    }
};
template <> struct multiply_codes<false, 64> {
    static __device__ __forceinline__ void run(float (&d)[32], uint64_t a, uint64_t b, int add) {
        asm volatile("{\n.reg .pred add;\nsetp.ne.b32 add, %34, 0;\n"
                     "wgmma.mma_async.sync.aligned.m64n64k32.f32.e4m3.e4m3 "
                     "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, "
                     "%12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, "
                     "%24, %25, %26, %27, %28, %29, %30, %31}, "
                     "%32, %33, add, 1, 1;\n}"
                     : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]),
                       "+f"(d[6]), "+f"(d[7]), "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11]),
                       "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15]), "+f"(d[16]), "+f"(d[17]),
                       "+f"(d[18]), "+f"(d[19]), "+f"(d[20]), "+f"(d[21]), "+f"(d[22]), "+f"(d[23]),
                       "+f"(d[24]), "+f"(d[25]), "+f"(d[26]), "+f"(d[27]), "+f"(d[28]), "+f"(d[29]),
                       "+f"(d[30]), "+f"(d[31])
                     : "l"(a), "l"(b), "r"(add));
    }
};
template <> struct multiply_codes<true, 64> {
    static __device__ __forceinline__ void run(int32_t (&d)[32], uint64_t a, uint64_t b, int add) {
        asm volatile("{\n.reg .pred add;\nsetp.ne.b32 add, %34, 0;\n"
                     "wgmma.mma_async.sync.aligned.m64n64k32.s32.s8.s8 "
                     "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, "
                     "%12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, "
                     "%24, %25, %26, %27, %28, %29, %30, %31}, "
                     "%32, %33, add;\n}"
                     : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3]), "+r"(d[4]), "+r"(d[5]),
                       "+r"(d[6]), "+r"(d[7]), "+r"(d[8]), "+r"(d[9]), "+r"(d[10]), "+r"(d[11]),
                       "+r"(d[12]), "+r"(d[13]), "+r"(d[14]), "+r"(d[15]), "+r"(d[16]), "+r"(d[17]),
                       "+r"(d[18]), "+r"(d[19]), "+r"(d[20]), "+r"(d[21]), "+r"(d[22]), "+r"(d[23]),
                       "+r"(d[24]), "+r"(d[25]), "+r"(d[26]), "+r"(d[27]), "+r"(d[28]), "+r"(d[29]),
                       "+r"(d[30]), "+r"(d[31])
                     : "l"(a), "l"(b), "r"(add));
    }
};
#endif
