// linear_lines.cuh - sums of wgmma to y in 16 bits, by whole lines of 64 outputs of a warpgroup's
// block, 16 rows of x at a time. With gates it is a loop: as straight code, which is read anew for
// every tile, they take longer. Without, sums are faster named than taken by their number.
#ifndef LINEAR_LINES_CUH
#define LINEAR_LINES_CUH
#include "linear_common.cuh"
#include "ptx_sm90.cuh"

// A place of 16 lines, and how a warpgroup's warps meet there.
enum { LINEAR_LINES_BYTES = 16 * 128 };
__device__ __forceinline__ void linear_meet(int barrier, int threads) {
    asm volatile("barrier.sync %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
}

// Four floats to and from shared memory.
__device__ __forceinline__ void linear_shared_put(uint32_t at, const float *v) {
    asm volatile("st.shared.v4.f32 [%0], {%1, %2, %3, %4};" ::"r"(at), "f"(v[0]), "f"(v[1]),
                 "f"(v[2]), "f"(v[3])
                 : "memory");
}
__device__ __forceinline__ void linear_shared_get(float *v, uint32_t at) {
    asm volatile("ld.shared.v4.f32 {%0, %1, %2, %3}, [%4];"
                 : "=f"(v[0]), "=f"(v[1]), "=f"(v[2]), "=f"(v[3])
                 : "r"(at)
                 : "memory");
}

// Sums of rows 16 j .. 16 j + 15 of x, j being one of I .. I + N - 1. By branches: registers have
// no index, and moves that differ only there would become selections among all of them. Before a
// loop's each turn the sums are pinned (group_pin), lest it be done for all j before the loop.
template <int I, int N, int R>
__device__ __forceinline__ void linear_take(float (&v)[8], const float (&acc)[R], int j) {
    if constexpr (N == 1) {
#pragma unroll
        for (int i = 0; i < 8; i++)
            asm volatile("mov.b32 %0, %1; // %2" : "=f"(v[i]) : "f"(acc[8 * I + i]), "n"(I));
    } else {
        if (j < I + N / 2)
            linear_take<I, N / 2>(v, acc, j);
        else
            linear_take<I + N / 2, N - N / 2>(v, acc, j);
    }
}

// gate = of gate and up. The test stands outside, so that all take turns in the pipe.
__device__ __forceinline__ void linear_gate_eight(float (&gate)[8], const float (&up)[8],
                                                  const linear_args &p) {
    if (p.epilogue == LINEAR_GATED) {
#pragma unroll
        for (int i = 0; i < 8; i++) gate[i] = linear_gate(gate[i], up[i], LINEAR_GATED, 0.f);
    } else {
#pragma unroll
        for (int i = 0; i < 8; i++)
            gate[i] = linear_gate(gate[i], up[i], LINEAR_GATED_OAI, p.limit);
    }
}

// Lines of a warpgroup's block, 16 rows of x a round, by all of its threads and one of two places
// in turn. A line has its pieces of 16 bytes where the copy engine's swizzle would put them.
template <typename T> struct linear_lines {
    T *y; // this thread's piece of the next line that it writes
    int64_t step;
    int32_t rows, rows_step; // from that line on to the tile's end; of a round and what is left out
    uint32_t put_at, get_at, apart;
    int barrier; // of 128 threads
    bool inside, wide;

    // y: of the tile's first row, the block's first output; outputs: of the block that there are;
    // places: two, `apart` bytes from each other; of the tile's rounds first, first + each, ..
    __device__ __forceinline__ linear_lines(const linear_args &p, T *y, int outputs, int rows,
                                            uint32_t places, uint32_t apart, int barrier,
                                            int first = 0, int each = 1)
        : step(16 * each * p.ldy), rows_step(16 * each), apart(apart), barrier(barrier),
          wide(linear_wide(p)) {
        const int thread = threadIdx.x % 128, lane = thread % 32, piece = thread % 8;
        const int row = thread / 8, to = lane / 16 * 8 + lane % 8;
        const int of = thread / 32 * 2 + lane / 8 % 2;
        put_at = places + to * 128 + ((of ^ to % 8) << 4);
        get_at = places + row * 128 + ((piece ^ row % 8) << 4);
        this->y = y + (16 * first + row) * p.ldy + piece * 8;
        this->rows = rows - 16 * first - row;
        inside = piece * 8 < outputs;
    }
    // v: the next round's, as wgmma leaves them; turn: rounds until now, of all tiles.
    __device__ __forceinline__ void put(const float (&v)[8], int &turn) {
        const uint32_t place = turn++ % 2 * apart;
        linear_place_16(put_at + place, {pack2<T>(v[0], v[1]), pack2<T>(v[2], v[3]),
                                         pack2<T>(v[4], v[5]), pack2<T>(v[6], v[7])});
        linear_meet(barrier, 128);
        const uint4 line = shared_u128(get_at + place);
        if (inside && rows > 0) linear_store_16(y, line, wide);
        y += step;
        rows -= rows_step;
    }
};
#endif
