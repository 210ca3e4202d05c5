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
    return rows <= d.rows ? (rows > 0 ? 1 : 0) : (rows + d.rows - 1) / d.rows;
}

// In shared memory, from a multiple of 16 bytes on: a key of each expert; where its rows begin,
// [count + 1]; the experts, those whose tiles have the most rows first, so that CTAs end alike,
// [count]; where the tiles of these begin, [count + 1].
//
// A key is, from the highest bit on, the rows of the expert's tiles, the number of experts behind
// it, so that keys differ, and the parts that its rows are cut into.
struct expert_table {
    uint32_t *key;
    int32_t *row, *order, *start;
    static constexpr int kPartBits = 14, kKeys = 16; // keys: a multiple of so many
    __device__ __forceinline__ expert_table(int32_t *at, int count)
        : key(reinterpret_cast<uint32_t *>(at)), row(at + (count + kKeys - 1) / kKeys * kKeys),
          order(row + count + 1), start(order + count) {}
};
__host__ __device__ constexpr int table_bytes(int count) {
    return ((count + 15) / 16 * 16 + 3 * count + 2) * 4;
}

// By all threads of the CTA. The routing may have been written since it was last read from here.
template <int kThreads>
__device__ __forceinline__ void fill_table(const linear_args &p, const expert_cut &d,
                                           const expert_table &table) {
    constexpr int kPartBits = expert_table::kPartBits, kRankBit = 21; // tiles along x below that
    static_assert(LINEAR_EXPERTS_MAX <= 1 << (32 - kRankBit), "ranks");
    const int keys = (p.count + expert_table::kKeys - 1) / expert_table::kKeys;
    for (int e = threadIdx.x; e < keys * expert_table::kKeys; e += kThreads) {
        uint32_t key = 0; // before none
        if (e < p.count) {
            const int32_t row = __ldcg(p.expert_start + e), end = __ldcg(p.expert_start + e + 1);
            const int rows = end - row, parts = parts_of(d, rows);
            const int each = parts > 1 ? (rows + parts - 1) / parts : rows;
            key = ((uint32_t)each * LINEAR_EXPERTS_MAX + (uint32_t)(p.count - 1 - e)) << kPartBits |
                  (uint32_t)parts;
            table.row[e] = row;
            if (e + 1 == p.count) table.row[p.count] = end;
        }
        table.key[e] = key;
    }
    __syncthreads();
    // Four threads an expert count those before it, and their parts.
    for (int t = threadIdx.x; t < (p.count * 4 + 31) / 32 * 32; t += kThreads) {
        const int e = t / 4;
        const uint32_t mine = e < p.count ? table.key[e] : ~0u;
        uint32_t before = 0;
        const auto count = [&](uint32_t key) {
            if (key > mine) before += 1u << kRankBit | key & ((1u << kPartBits) - 1);
        };
#pragma unroll 4
        for (int i = 0; i < keys; i++) {
            const uint4 four = reinterpret_cast<const uint4 *>(table.key)[i * 4 + t % 4];
            count(four.x), count(four.y), count(four.z), count(four.w);
        }
        before += __shfl_xor_sync(~0u, before, 1);
        before += __shfl_xor_sync(~0u, before, 2);
        if (t % 4 != 0 || e >= p.count) continue;
        const int rank = (int)(before >> kRankBit), at = (int)(before & ((1u << kRankBit) - 1));
        table.order[rank] = e;
        table.start[rank] = at * d.tiles;
        if (rank + 1 == p.count)
            table.start[p.count] = (at + (int)(mine & ((1u << kPartBits) - 1))) * d.tiles;
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
    const int parts = parts_of(d, rows);
    if (parts == 1) return {e, t * (p.paired ? kBlocks / 2 : kBlocks), row, row + rows};
    const int n = t / parts, each_part = ((rows + parts - 1) / parts + 7) / 8 * 8;
    const int32_t m0 = row + (t - n * parts) * each_part;
    return {e, n * (p.paired ? kBlocks / 2 : kBlocks), m0, min(row + rows, m0 + each_part)};
}
#endif
