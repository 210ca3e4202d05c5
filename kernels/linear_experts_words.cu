// linear_experts_words.cu - y^T = W x^T of experts with many rows each, weights of 16 bits, on
// sm_90: a tile is four blocks of 64 rows of W (of gate and up two each) and all of an expert's
// rows, or an even part of them, half of which are each CTA's of a cluster of two.
//
// Each CTA brings half of the tile's W to both, as it lies: the tiles of wgmma's swizzle
// (linear_layout.h); and gathers its own rows of x. Of a CTA's warps
//
//   8  multiply: a warpgroup has two blocks, of gate and of up or the first and the third, with
//      as many rows of x as the CTA has, rounded up to eight
//   1  knows the tiles, which are dealt out in turn, and brings W
//   2  gather rows of x to where the copy engine would put them
//   1  makes those visible to the tensor cores: a fence waits for all that its warp has under way
//
// W and x of a step of 64 inputs are a stage of one ring.
#include "linear_experts_many.cuh"
#include "linear_launch.h"
#include "linear_lines.cuh"

#if !defined(__CUDA_ARCH__) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
#include "ptx_sm90_codes.cuh"
#endif

namespace {

constexpr int kCtas = 2;
constexpr int kRows = 160;                  // of x: of a CTA's half of a tile at most
constexpr int kBlocks = 4, kGroups = 2;     // of W of a tile; warpgroups that multiply
constexpr int kWarps = 4 * kGroups;         // that multiply
constexpr int kThreads = 32 * kWarps + 128; // a whole warpgroup, which gives registers away
constexpr int kMathRegisters = 232, kLoadRegisters = 40;
static_assert(32 * kWarps * kMathRegisters + 128 * kLoadRegisters <=
                  kThreads * (65536 / kThreads / 8 * 8),
              "registers_up would wait for ever");
constexpr int kUnit = LINEAR_BLOCK * LINEAR_UNIT * 2; // bytes of a block and step
constexpr int kStages = 4, kXBytes = kRows * 128, kStageBytes = kXBytes + kBlocks * kUnit;
// Places of what tiles end in, [2][warpgroup][16 rows of x][64 outputs] of 16 bits.
constexpr int kPlace = LINEAR_LINES_BYTES, kPlaces = 2 * kGroups * kPlace;
constexpr int kAtPlaces = kStages * kStageBytes, kAtBars = kAtPlaces + kPlaces;
// Barriers of a stage: full, empty in both CTAs, x has landed.
constexpr int kEmpty = kStages * 8, kLanded = 2 * kEmpty, kBars = 128;
static_assert(3 * kEmpty <= kBars, "");
constexpr int kEights = kRows / 8, kRowList = 2 * 4 * kEights * 4;
constexpr int kAtRows = kAtBars + kBars + kToldBytes, kAtTable = kAtRows + kRowList;
constexpr int kRoom = 226 * 1024;
static_assert(kAtTable + table_bytes(LINEAR_EXPERTS_MAX) + 1024 <= kRoom, "");

// Rows of products, with and without those that the eight before take too.
#define WORDS_SMALL(TWO) TWO(16) TWO(32) TWO(48) TWO(64)
#define WORDS_LARGE(ONE)                                                                           \
    ONE(72)                                                                                        \
    ONE(80) ONE(88) ONE(96) ONE(104) ONE(112) ONE(120) ONE(128) ONE(136) ONE(144) ONE(152) ONE(160)

#if !defined(__CUDA_ARCH__) || defined(__CUDA_ARCH_FEAT_SM90_ALL)

// The rows of a tile that are this CTA's; there may be none.
__device__ __forceinline__ target own_rows(const target &tile) {
    const int half = ((tile.m_end - tile.m0 + 1) / 2 + 7) / 8 * 8, m1 = tile.m0 + half;
    if (cluster_rank() == 0) return {tile.expert, tile.block, tile.m0, min(m1, tile.m_end)};
    return {tile.expert, tile.block, min(m1, tile.m_end), tile.m_end};
}
__device__ __forceinline__ int eights_of(const target &own) {
    return max(own.m_end - own.m0 + 7, 8) / 8;
}

// --- Loading ------------------------------------------------------------------------------------

// Where a warp is in the ring.
struct ring {
    uint32_t full; // barriers of the first stage
    int stage, parity;
    __device__ __forceinline__ void next() {
        if (++stage == kStages) stage = 0, parity ^= 1;
    }
    __device__ __forceinline__ void wait_empty() const {
        barrier_wait(full + kEmpty + stage * 8, parity ^ 1);
    }
};

// Half of each block of W to both CTAs, by one warp, a block a lane.
__device__ __forceinline__ void load_weights(const linear_args &p, const expert_cut &d, ring to,
                                             uint32_t base, const expert_table &table,
                                             const told_tiles &told) {
    const int tiles = table.start[p.count], clusters = (int)gridDim.x / kCtas;
    const int lane = threadIdx.x % 32, half = cluster_rank() * (kUnit / 2);
    const uint32_t at = base + kXBytes + lane * kUnit + half;
    wait_for_previous();
    int count = 0;
    for (int t = (int)blockIdx.x / kCtas; t < tiles; t += clusters, count++) {
        const target tile = locate<kBlocks>(p, d, table, t);
        told.tell(count, tile);
        const int32_t block = lane < kBlocks ? block_of<kBlocks>(p, tile, lane) : -1;
        const int there = __popc(__ballot_sync(~0u, block >= 0));
        const uint8_t *from =
            p.code + tile.expert * p.code_bytes + (int64_t)max(block, 0) * p.units * kUnit + half;
        for (int step = 0; step < p.units; step++, from += kUnit, to.next()) {
            const uint32_t full = to.full + to.stage * 8;
            to.wait_empty();
            if (lane == 0) barrier_arrive_expect(full, there * kUnit);
            __syncwarp();
            if (block >= 0) copy_bulk_to_both(at + to.stage * kStageBytes, from, kUnit / 2, full);
        }
    }
    told.tell(count, target{});
}

// Rows of x in the swizzle of the copy engine, by two warps: `half` takes four rows of each eight.
// A row past the CTA's last is the tile's last again: nobody looks at what it gives.
__device__ __forceinline__ void gather(const linear_args &p, ring to, uint32_t base, int32_t *rows,
                                       int half, const told_tiles &told) {
    const int lane = threadIdx.x % 32, chunk = lane % 8, row = half * 4 + lane / 8;
    const uint32_t to_in = base + row * 128 + ((chunk ^ row) << 4);
    wait_for_previous();
    for (int count = 0;; count++) {
        const target tile = told.get(count);
        if (tile.m_end == 0) break;
        const target own = own_rows(tile);
        const int eights = eights_of(own);
        __syncwarp();
        // In pieces of 16 bytes: kEights eights of the first of this warp's rows, of the second, ..
        for (int i = lane; i < 4 * kEights; i += 32) {
            const int r = min(own.m0 + i % kEights * 8 + half * 4 + i / kEights, tile.m_end - 1);
            rows[i] = (int32_t)((p.x_row ? __ldcg(p.x_row + r) : r) * (p.ldx / 8));
        }
        __syncwarp();
        told.done(count);
        for (int step = 0; step < p.units; step++, to.next()) {
            const int k = step * 64 + chunk * 8, bytes = k < p.k ? 16 : 0;
            const uint4 *from = static_cast<const uint4 *>(p.x) + min(k, p.k - 8) / 8;
            uint32_t at = to_in + to.stage * kStageBytes;
            to.wait_empty();
#pragma unroll 2
            for (int e = 0; e < eights; e += 2, at += 2048) {
                const uint2 i = *reinterpret_cast<const uint2 *>(rows + lane / 8 * kEights + e);
                copy_some(at, from + i.x, bytes);
                if (e + 1 < eights) copy_some(at + 1024, from + i.y, bytes);
            }
            barrier_arrive_copies(to.full + kLanded + to.stage * 8);
        }
    }
}

// Makes x visible to the tensor cores, by one warp. Its lanes meet at every step: one that fell two
// uses of a stage behind would take the phase of kLanded for one it has seen, and wait for ever.
__device__ __forceinline__ void show(const linear_args &p, ring to, const told_tiles &told) {
    for (int count = 0; told.get(count).m_end > 0; count++) {
        __syncwarp();
        told.done(count);
        for (int step = 0; step < p.units; step++, to.next()) {
            barrier_wait(to.full + kLanded + to.stage * 8, to.parity);
            proxy_fence();
            __syncwarp();
            if (threadIdx.x % 32 == 0) barrier_arrive(to.full + to.stage * 8);
        }
    }
}

// --- Multiplying --------------------------------------------------------------------------------

// Sums of two blocks of W: [block][x row / 8][4].
typedef float pair_sums[2][kRows / 2];

template <typename T> struct multiplier {
    ring from;
    uint32_t base;

    // A stage is released when the next one's products have been asked for.
    __device__ __forceinline__ void release(uint32_t bar) const {
        const int lane = (int)threadIdx.x % 32;
        if (lane < kCtas) remote_arrive(remote_address(bar, lane));
    }
    template <int N> __device__ __forceinline__ void tile(pair_sums &acc, int steps) {
        const int wg = __shfl_sync(~0u, (int)threadIdx.x / 128, 0);
        uint32_t before = 0;
#pragma unroll 1
        for (int step = 0; step < steps; step++, from.next()) {
            const uint32_t x = base + from.stage * kStageBytes;
            const uint32_t w = x + kXBytes + wg * kUnit;
            barrier_wait(from.full + from.stage * 8, from.parity);
            group_fence();
#pragma unroll
            for (int q = 0; q < 4; q++) {
                const uint64_t x_at = group_descriptor(x + q * 32);
                multiply_words<T, N>::run(acc[0], group_descriptor(w + q * 32), x_at);
                multiply_words<T, N>::run(acc[1], group_descriptor(w + 2 * kUnit + q * 32), x_at);
            }
            group_commit();
            group_wait<1>();
            if (step > 0) release(before);
            before = from.full + kEmpty + from.stage * 8;
        }
        group_wait<0>();
        group_pin(acc[0]);
        group_pin(acc[1]);
        release(before);
    }
};

// --- The end of a tile --------------------------------------------------------------------------

// Biases of rows g and g + 8 of this warp's strip of a block.
template <typename T>
__device__ __forceinline__ void load_bias(float (&bias)[2], const linear_args &p, int expert,
                                          int block) {
    const int upper = block >= p.half_blocks ? 1 : 0, lane = threadIdx.x % 32;
    const int32_t output = (block - upper * p.half_blocks) * 64 + threadIdx.x / 32 % 4 * 16;
    bias[0] = bias[1] = 0.f;
    if (!p.bias || output >= p.half_rows) return;
    const T *of = static_cast<const T *>(p.bias) + (int64_t)expert * p.n + upper * p.half_rows +
                  output + lane / 4;
    bias[0] = to_f32(of[0]);
    bias[1] = to_f32(of[8]);
}

template <typename T>
__device__ __forceinline__ void finish(pair_sums &acc, const linear_args &p, const target &own,
                                       uint32_t places, int &rounds) {
    constexpr int kRounds = kRows / 16;
    const int wg = __shfl_sync(~0u, (int)threadIdx.x / 128, 0);
    float bias[2][2];
    const int rows = own.m_end - own.m0;
    const auto lines_of = [&](int block) {
        const int upper = block >= p.half_blocks ? 1 : 0;
        const int32_t in_half = (block - upper * p.half_blocks) * 64;
        T *y = static_cast<T *>(p.y) + own.m0 * p.ldy + upper * p.half_rows + in_half;
        return linear_lines<T>(p, y, p.half_rows - in_half, rows, places, kGroups * kPlace, 1 + wg);
    };
    float v[8];
    if (p.paired) {
        const int block = block_of<kBlocks>(p, own, wg);
        if (block < 0) return;
        load_bias<T>(bias[0], p, own.expert, block);
        load_bias<T>(bias[1], p, own.expert, block + p.half_blocks);
        linear_lines<T> to = lines_of(block);
#pragma unroll 1
        for (int j = 0; 16 * j < rows; j++) {
            float up[8];
            group_pin(acc[0]);
            group_pin(acc[1]);
            linear_take<0, kRounds>(v, acc[0], j);
            linear_take<0, kRounds>(up, acc[1], j);
#pragma unroll
            for (int i = 0; i < 8; i++) {
                v[i] += bias[0][i / 2 % 2];
                up[i] += bias[1][i / 2 % 2];
            }
            linear_gate_eight(v, up, p);
            to.put(v, rounds);
        }
        return;
    }
#pragma unroll
    for (int b = 0; b < 2; b++) {
        const int block = block_of<kBlocks>(p, own, wg + 2 * b);
        if (block < 0) return;
        load_bias<T>(bias[b], p, own.expert, block);
        linear_lines<T> to = lines_of(block);
#pragma unroll
        for (int j = 0; j < kRounds; j++) {
            if (16 * j >= rows) break;
#pragma unroll
            for (int i = 0; i < 8; i++) v[i] = acc[b][8 * j + i] + bias[b][i / 2 % 2];
            to.put(v, rounds);
        }
    }
}

// --- The kernel ---------------------------------------------------------------------------------

template <typename T>
__device__ __forceinline__ void compute(const linear_args &p, ring from, uint32_t base,
                                        const told_tiles &told) {
    multiplier<T> work = {from, base};
    const uint32_t places = base + kAtPlaces + (int)threadIdx.x / 128 * kPlace;
    int rounds = 0;
    wait_for_previous();
#pragma unroll 1
    for (int count = 0;; count++) {
        const target tile = told.get(count);
        if (tile.m_end == 0) break;
        const target own = own_rows(tile);
        told.done(count);
        pair_sums acc = {};
#define ONE(n)                                                                                     \
    case (n) / 8:                                                                                  \
        work.template tile<n>(acc, p.units);                                                       \
        break;
#define TWO(n)                                                                                     \
    case (n) / 8 - 1: ONE(n)
        switch (eights_of(own)) {
            WORDS_SMALL(TWO)
            WORDS_LARGE(ONE)
        }
#undef ONE
#undef TWO
        finish<T>(acc, p, own, places, rounds);
    }
}
#endif

template <typename T>
__global__ void __launch_bounds__(kThreads, 1)
    linear_experts_words(const __grid_constant__ linear_args p,
                         const __grid_constant__ expert_cut d) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL) // never launched, and empty, on other architectures
    extern __shared__ uint8_t shared[];
    uint8_t *start = shared + ((1024 - (shared_address(shared) & 1023)) & 1023);
    const uint32_t base = shared_address(start);
    const ring both = {base + kAtBars, 0, 0};
    const told_tiles told = {base + kAtBars + kBars};
    int32_t *rows = reinterpret_cast<int32_t *>(start + kAtRows);
    const expert_table table(reinterpret_cast<int32_t *>(start + kAtTable), p.count);
    const int warp = __shfl_sync(~0u, threadIdx.x / 32, 0);
    if (threadIdx.x == 0) {
        told.init(kWarps + 3);
        for (int i = 0; i < kStages; i++) {
            barrier_init(both.full + i * 8, 2);
            barrier_init(both.full + kEmpty + i * 8, kCtas * kWarps);
            barrier_init(both.full + kLanded + i * 8, 2 * 32);
        }
        barrier_init_fence();
    }
    __syncthreads();
    cluster_arrive(); // the other CTA writes here
    cluster_wait();
    if (!p.routed) wait_for_previous();
    fill_table<kThreads>(p, d, table);
    if (warp >= kWarps) {
        registers_down<kLoadRegisters>();
        if (warp == kWarps) {
            load_weights(p, d, both, base, table, told);
        } else if (warp == kWarps + 1) {
            wait_for_previous();
            launch_dependents(); // which may read the routing at once (linear_problem.routed)
            show(p, both, told);
        } else {
            const int half = warp - kWarps - 2;
            gather(p, both, base, rows + half * 4 * kEights, half, told);
        }
    } else {
        registers_up<kMathRegisters>();
        compute<T>(p, both, base, told);
    }
    __syncwarp();
    cluster_arrive(); // until then the other CTA may still write and arrive here
    cluster_wait();
#endif
}

// --- Launch -------------------------------------------------------------------------------------

template <typename T>
status launch(const linear_args *args, int32_t n_sms, int32_t, kernel_stream stream) {
    const auto kernel = linear_experts_words<T>;
    static int most = 0; // clusters at once
    const expert_cut d = {kCtas * kRows, args->paired ? (args->half_blocks + 1) / 2
                                                      : (args->blocks + kBlocks - 1) / kBlocks};
    launch_config l(dim3(kCtas), dim3(kThreads),
                    (size_t)(kAtTable + table_bytes(args->count) + 1024), stream, true, kCtas);
    cudaError_t e =
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kRoom);
    if (e == cudaSuccess && most == 0) e = cudaOccupancyMaxActiveClusters(&most, kernel, &l.config);
    if (e == cudaSuccess && most == 0)
        return FAIL(ST_DEVICE, "linear_experts_words: no room for a cluster");
    l.config.gridDim = dim3((unsigned)(most < n_sms / kCtas ? most : n_sms / kCtas) * kCtas);
    if (e == cudaSuccess) e = cudaLaunchKernelEx(&l.config, kernel, *args, d);
    return e == cudaSuccess ? ST_OK
                            : FAIL(ST_DEVICE, "linear_experts_words: %s", cudaGetErrorString(e));
}

#define T_F16              __half
#define T_BF16             __nv_bfloat16
#define WORDS_INSTANCES(X) X(F16) X(BF16)
#define ROW(T)                                                                                     \
    {"experts_words", 90, 90,   WF_16, DT_##T, kCtas * kRows, kBlocks, 1, 0, 0, 1,                 \
     launch<T_##T>,   0,  true, true},
const linear_variant rows[] = {WORDS_INSTANCES(ROW)};

} // namespace

extern "C" linear_table linear_experts_words_table(void) {
    return linear_table{rows, (int32_t)(sizeof rows / sizeof rows[0])};
}
