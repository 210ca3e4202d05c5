// linear_experts_many.cuh - what the kernels for experts with many rows have in common
// (linear_experts.cu, linear_experts_words.cu): how experts' rows are cut into tiles, and the order
// of those.
#ifndef LINEAR_EXPERTS_MANY_CUH
#define LINEAR_EXPERTS_MANY_CUH
#include "linear_experts.cuh"

// Rows of x that a tile has at most, and tiles of so many of an expert's rows along W.
struct expert_cut {
    int32_t rows, tiles;
};

__device__ __forceinline__ int parts_of(const expert_cut &d, int rows) {
    return (rows + d.rows - 1) / d.rows;
}

// In shared memory: where an expert's rows begin, [count + 1]; the experts, those whose tiles have
// the most rows first, so that CTAs end alike, [count]; where the tiles of these begin,
// [count + 1], and until that is known the rows of an expert's tiles.
struct expert_table {
    int32_t *row, *order, *start;
    __device__ __forceinline__ expert_table(int32_t *at, int count)
        : row(at), order(at + count + 1), start(at + 2 * count + 1) {}
    __device__ __forceinline__ int tiles(const expert_cut &d, int e) const {
        return parts_of(d, row[e + 1] - row[e]) * d.tiles;
    }
};
__host__ __device__ constexpr int table_bytes(int count) { return (3 * count + 2) * 4; }

// By all threads of the CTA. The routing may have been written since it was last read from here.
template <int kThreads>
__device__ __forceinline__ void fill_table(const linear_args &p, const expert_cut &d,
                                           const expert_table &table) {
    for (int i = threadIdx.x; i <= p.count; i += kThreads)
        table.row[i] = __ldcg(p.expert_start + i);
    __syncthreads();
    for (int e = threadIdx.x; e < p.count; e += kThreads) {
        const int rows = table.row[e + 1] - table.row[e], parts = parts_of(d, rows);
        table.start[e] = parts > 1 ? (rows + parts - 1) / parts : rows;
    }
    __syncthreads();
    for (int t = threadIdx.x; t < (p.count * 4 + 31) / 32 * 32; t += kThreads) { // four an expert
        const int e = t / 4, rows = e < p.count ? table.start[e] : 0;
        int rank = 0;
#pragma unroll 8
        for (int i = t % 4; i < p.count; i += 4) rank += table.start[i] + (i < e) > rows;
        rank += __shfl_xor_sync(~0u, rank, 1);
        rank += __shfl_xor_sync(~0u, rank, 2);
        if (t % 4 == 0 && e < p.count) table.order[rank] = e;
    }
    __syncthreads();
    if (threadIdx.x < 32) {
        const int lane = threadIdx.x, each = (p.count + 31) / 32;
        const int i0 = min(lane * each, p.count), i1 = min(i0 + each, p.count);
        int32_t own = 0, sum;
        for (int i = i0; i < i1; i++) own += table.tiles(d, table.order[i]);
        sum = own;
#pragma unroll
        for (int i = 1; i < 32; i *= 2) {
            const int32_t before = __shfl_up_sync(~0u, sum, i);
            if (lane >= i) sum += before;
        }
        if (lane == 31) table.start[p.count] = sum;
        sum -= own;
        for (int i = i0; i < i1; i++) {
            table.start[i] = sum;
            sum += table.tiles(d, table.order[i]);
        }
    }
    __syncthreads();
}

// Tile t, by a warp: lane i looks at the experts from i * each on, then lane j at the j-th of them.
// Those that share weights are neighbours.
template <int kBlocks>
__device__ __forceinline__ target locate(const linear_args &p, const expert_cut &d,
                                         const expert_table &table, int t) {
    const int lane = threadIdx.x % 32, each = (p.count + 31) / 32;
    int i = __popc(__ballot_sync(~0u, table.start[min(lane * each, p.count)] <= t)) - 1;
    i *= each;
    i += __popc(__ballot_sync(~0u, lane < each && table.start[min(i + lane, p.count)] <= t)) - 1;
    const int e = table.order[i], row = table.row[e], rows = table.row[e + 1] - row;
    t -= table.start[i];
    const int parts = parts_of(d, rows), n = t / parts;
    const int each_part = ((rows + parts - 1) / parts + 7) / 8 * 8;
    const int32_t m0 = row + (t - n * parts) * each_part;
    return {e, n * (p.paired ? kBlocks / 2 : kBlocks), m0, min(row + rows, m0 + each_part)};
}
#endif
