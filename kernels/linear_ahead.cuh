// linear_ahead.cuh - bytes that a later launch reads, asked for by one that leaves memory idle.
#ifndef LINEAR_AHEAD_CUH
#define LINEAR_AHEAD_CUH
#include "linear_common.cuh"

// This warp's share of linear_problem.ahead, to L2: it is one of `warps` in the launch. 32 lines
// at a time, each behind a read of the list, so that they do not all come at once.
__device__ __forceinline__ void linear_ask_ahead(const linear_ahead &a, int warp, int warps) {
    enum { kLine = 128, kTurn = 32 * kLine };
    if (!a.list) return;
    const int turns = (a.bytes + kTurn - 1) / kTurn, all = min(a.list[0], a.most) * turns;
#pragma unroll 1
    for (int i = a.part * warps + warp; i < all; i += a.parts * warps) {
        const int n = i / turns, at = (i - n * turns) * kTurn + (int)threadIdx.x % 32 * kLine;
        const int2 piece = reinterpret_cast<const int2 *>(a.list + 2)[n];
        const uint8_t *from = static_cast<const uint8_t *>(a.base) + piece.x * a.stride +
                              (int64_t)piece.y * a.bytes + at;
        if (at < a.bytes) asm volatile("prefetch.global.L2 [%0];" ::"l"(from) : "memory");
    }
}
#endif
