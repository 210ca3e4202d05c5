// linear_experts.cuh - what the kernels for experts have in common (linear_short.cu,
// linear_experts.cu): which tile a CTA has, and how its warps are told of it.
#ifndef LINEAR_EXPERTS_CUH
#define LINEAR_EXPERTS_CUH
#include "linear_common.cuh"
#include "ptx_sm90.cuh"

// Where a tile goes: its matrix, its first block, its rows of the (permuted) problem.
struct target {
    int32_t expert, block, m0, m_end;
};

// Block i of a tile of P, of gate and up half of them each: of the matrix, or not there.
template <int P>
__device__ __forceinline__ int32_t block_of(const linear_args &p, const target &tile, int i) {
    if (!p.paired) return tile.block + i < p.blocks ? tile.block + i : -1;
    const int32_t block = tile.block + i % (P / 2);
    return block < p.half_blocks ? block + i / (P / 2) * p.half_blocks : -1;
}

// Where a CTA's tiles are told of, a few of them ahead: one warp takes them, as it comes to need
// them, for CTAs are not equally fast. No rows: the end.
enum { kTold = 4, kToldBytes = kTold * 32 };
struct told_tiles {
    uint32_t at; // kTold times: told, read, the tile
    __device__ __forceinline__ void init(int readers) const {
        for (int i = 0; i < kTold; i++) {
            barrier_init(at + i * 32, 1);
            barrier_init(at + i * 32 + 8, readers);
        }
    }
    // By a warp.
    __device__ __forceinline__ void tell(int count, const target &tile) const {
        const uint32_t to = at + count % kTold * 32;
        barrier_wait(to + 8, count / kTold % 2 ^ 1);
        if (threadIdx.x % 32 == 0) {
            asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(to + 16),
                         "r"(tile.expert), "r"(tile.block), "r"(tile.m0), "r"(tile.m_end)
                         : "memory");
            barrier_arrive(to);
        }
        __syncwarp();
    }
    // What a reader looks at, as often as it likes until it is done with it.
    __device__ __forceinline__ target get(int count) const {
        barrier_wait(at + count % kTold * 32, count / kTold % 2);
        return again(count);
    }
    __device__ __forceinline__ target again(int count) const {
        const uint4 v = shared_u128(at + count % kTold * 32 + 16);
        // From one lane, so that the compiler knows it for uniform.
        const auto all = [](uint32_t of) { return (int32_t)__shfl_sync(~0u, of, 0); };
        return {all(v.x), all(v.y), all(v.z), all(v.w)};
    }
    // When all lanes of the warp are: behind what get or __syncwarp has them meet in.
    __device__ __forceinline__ void done(int count) const {
        if (threadIdx.x % 32 == 0) barrier_arrive(at + count % kTold * 32 + 8);
    }
};
#endif
