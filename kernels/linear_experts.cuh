// linear_experts.cuh - what the kernels for experts have in common (linear_short.cu,
// linear_experts.cu): which tile a CTA has, how its warps are told of it, and how those of
// linear_short that have summed a tile by themselves finish it.
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

// An 8 x 8 matrix of 16 bits across a warp, turned.
__device__ __forceinline__ uint32_t turned(uint32_t v) {
    uint32_t r;
    asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(r) : "r"(v));
    return r;
}
template <typename T> __device__ __forceinline__ uint32_t pair_of(float low, float high) {
    const T v[2] = {linear_round<T>(low), linear_round<T>(high)};
    uint32_t r;
    memcpy(&r, v, 4);
    return r;
}

// A tile whose K is not shared, by the warps that have summed it: 16 bytes of an x row at a time.
// Of gate and up the warp of the gate finishes outputs g and that of up g + 8; what the other needs
// passes through one of two places in turn, PLACE rows at a time. rounds: how often it did. P:
// blocks of a tile, of which this is `number`; SCALED: weights may have scales of channels or
// matrices.
template <typename T, int P, int PLACE, bool SCALED, int R>
__device__ __forceinline__ void finish_own(const float (&acc)[R], const linear_args &p,
                                           const target &tile, int number, uint32_t places,
                                           int &rounds) {
    const int lane = threadIdx.x % 32, g = lane / 4;
    const int warp = __shfl_sync(~0u, threadIdx.x / 32, 0), strip = warp % 4;
    const int block = block_of<P>(p, tile, number), half = number / (P / 2);
    const int upper = block >= p.half_blocks ? 1 : 0, rows = tile.m_end - tile.m0;
    const int32_t in_half = (block - upper * p.half_blocks) * 64 + strip * 16;
    if (block < 0 || in_half >= p.half_rows) return;
    float scale[2] = {1.f, 1.f}, bias[2] = {0.f, 0.f}; // of outputs g and g + 8
#pragma unroll
    for (int i = 0; i < 2; i++) {
        const int of = g + 8 * i;
        if (SCALED && p.channel)
            scale[i] = p.channel[((int64_t)tile.expert * p.blocks + block) * 64 + strip * 16 + of];
        if (SCALED && p.global_scale) scale[i] = p.global_scale[tile.expert];
        if (p.bias)
            bias[i] = linear_f32(static_cast<const T *>(
                p.bias)[(int64_t)tile.expert * p.n + upper * p.half_rows + in_half + of]);
    }
    const int32_t col = (p.paired ? 8 * half : upper * p.half_rows) + in_half + lane % 4 * 2;
    T *y = static_cast<T *>(p.y) + (tile.m0 + g) * p.ldy + col;
    const auto value = [&](int j, int e) {
        const float sum = acc[4 * j + e];
        return SCALED ? fmaf(sum, scale[e / 2], bias[e / 2]) : sum + bias[e / 2];
    };
    if (p.paired) {
        constexpr int J = PLACE / 8;
        const uint32_t mine = (warp * 32 + lane) * 8, other = ((warp ^ 2 * P) * 32 + lane) * 8;
#pragma unroll
        for (int j0 = 0; j0 < R / 4; j0 += J) {
            if (8 * j0 >= rows) break;
            const uint32_t at = places + rounds++ % 2 * (PLACE * P * 128);
#pragma unroll
            for (int j = 0; j < J; j++) // what this warp does not finish
                asm volatile("st.shared.v2.f32 [%0], {%1, %2};" ::"r"(at + mine + j * (P * 1024)),
                             "f"(half ? value(j0 + j, 0) : value(j0 + j, 2)),
                             "f"(half ? value(j0 + j, 1) : value(j0 + j, 3))
                             : "memory");
            asm volatile("barrier.sync %0, 64;" ::"r"(1 + warp % (2 * P)) : "memory");
#pragma unroll
            for (int j = 0; j < J; j++, y += 8 * p.ldy) {
                const int row0 = 8 * (j0 + j);
                if (row0 >= rows) break;
                float v[2], w[2];
                asm volatile("ld.shared.v2.f32 {%0, %1}, [%2];"
                             : "=f"(w[0]), "=f"(w[1])
                             : "r"(at + other + j * (P * 1024))
                             : "memory");
#pragma unroll
                for (int i = 0; i < 2; i++)
                    v[i] = half ? linear_gate(w[i], value(j0 + j, 2 + i), p.epilogue, p.limit)
                                : linear_gate(value(j0 + j, i), w[i], p.epilogue, p.limit);
                const uint32_t out = turned(pair_of<T>(v[0], v[1]));
                if (row0 + g < rows) *reinterpret_cast<uint32_t *>(y) = out;
            }
        }
    } else {
#pragma unroll
        for (int j = 0; j < R / 4; j++, y += 8 * p.ldy) {
            if (8 * j >= rows) break;
            const uint32_t low = turned(pair_of<T>(value(j, 0), value(j, 1)));
            const uint32_t high = turned(pair_of<T>(value(j, 2), value(j, 3)));
            if (8 * j + g >= rows) continue;
            *reinterpret_cast<uint32_t *>(y) = low;
            *reinterpret_cast<uint32_t *>(y + 8) = high;
        }
    }
}
#endif
