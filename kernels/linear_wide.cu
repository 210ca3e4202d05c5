// linear_wide.cu - y^T = W x^T for many rows on Hopper: tiles of 256 rows of W x 256 rows of x, by
// the two CTAs of a cluster.
//
// A CTA has half of the tile's rows of W and brings half of its rows of x to both, so that an SM
// asks L2 for 20 (4 bits) to 24 (8 bits) bytes a cycle of the tensor cores. Two warpgroups
// multiply, each one block of 64 rows of W: a unit's A fragments are made while the tensor cores
// are at the unit before, and the other warpgroup's. The walk is linear_common.cuh's, over
// clusters instead of CTAs; what it says of CTAs holds for those of one rank.
#include "linear_common.cuh"
#include "linear_launch.h"
#include "linear_lines.cuh"
#include "linear_pairs.cuh"
#include "tensor_map.cuh"

// The explicit list: format, type, scale granule (0: none).
#ifndef WIDE_INSTANCES
#define WIDE_TYPES(X, F, G) X(F, F16, G) X(F, BF16, G)
#define WIDE_INSTANCES(X)                                                                          \
    WIDE_TYPES(X, INT4, 128)                                                                       \
    WIDE_TYPES(X, INT4, 64)                                                                        \
    WIDE_TYPES(X, INT4, 32)                                                                        \
    WIDE_TYPES(X, MXFP4, 32)                                                                       \
    WIDE_TYPES(X, INT8, 0)                                                                         \
    WIDE_TYPES(X, FP8, 0)                                                                          \
    WIDE_TYPES(X, FP8B, 128)
#endif

namespace {

constexpr int kRows = 256, kGroups = kRows / 8; // of x; and what they are dealt out in
constexpr int kCtas = 2, kBlocks = 2;           // of a tile; of a CTA
constexpr int kWarps = 4 * kBlocks, kThreads = 32 * kWarps + 128;
constexpr int kMathRegisters = 232, kLoadRegisters = 40;
// A CTA has what it is launched with: multiples of 8, of the 65536 of an SM.
static_assert(32 * kWarps * kMathRegisters + 128 * kLoadRegisters <=
                  kThreads * (65536 / kThreads / 8 * 8),
              "registers_up would wait for ever");
enum { BAR_PAIR = 1, BAR_LINES = 5 }; // named barriers; 0 is __syncthreads

// Shared memory of a CTA: stages of one unit, codes and x, then scales, the turning places, what
// warps of gate and up exchange, and barriers. A granule of two units comes with each of them.
template <int F, int G> struct tile {
    static constexpr int unit = 512 * linear_code_bits(F); // bytes of a block
    static constexpr int code = kBlocks * unit, x = kRows * 128;
    static constexpr int granules = G == 0 ? 0 : G < 64 ? 64 / G : 1; // of a unit
    static constexpr int scale_block = granules * linear_granule_bytes(F),
                         scale = kBlocks * scale_block;
    static constexpr int turn = 2 * kBlocks * LINEAR_LINES_BYTES, pair = 2 * kWarps * 1024;
    static_assert(turn >= kWarps * LINEAR_STAGE_FLOATS * 4, "");
    static constexpr int fixed = turn + pair + 256 + 1024; // 1024: alignment of the base
    static constexpr int stages = (226 * 1024 - fixed) / (code + x + scale);
    static_assert(stages >= 3 && 16 * stages <= 256, "");
    static constexpr int at_scale = stages * (code + x), at_turn = at_scale + stages * scale;
    static constexpr int at_pair = at_turn + turn, at_bars = at_pair + pair;
    static constexpr int bytes = at_bars + 256 + 1024;
};

// The cluster among the clusters, as linear_walk counts CTAs, and the slot of a CTA's sums.
__device__ __forceinline__ int32_t clusters() { return (int32_t)gridDim.x / kCtas; }
__device__ __forceinline__ int32_t slot_of(int32_t cluster, int rank) {
    return rank * clusters() + cluster;
}
__device__ __forceinline__ linear_walk<kRows> walk_of(const linear_args &p) {
    return linear_walk<kRows>(p, nullptr, clusters() - 1 - (int32_t)blockIdx.x / kCtas, clusters());
}

// --- Loading ------------------------------------------------------------------------------------

// One warp: lane i < 2 copies the codes of block i, lane 2 + i its scales, lane 4 this CTA's half
// of x. The weights of the first stages are asked for before the kernel before has ended.
template <int F, int G> struct producer {
    using L = tile<F, G>;
    const linear_args &p;
    const CUtensorMap *map;
    uint32_t base, full, empty;
    int lane, rank;

    const uint8_t *from; // what this lane copies: its block's start
    uint32_t to;         // in the first stage
    bool valid;
    int blocks; // of the tile, this CTA's

    __device__ __forceinline__ void begin(const linear_segment &s) {
        const int slot = lane % kBlocks;
        const int32_t b = linear_block<2>(p, s.tile_n, rank, slot);
        blocks = __popc(__ballot_sync(~0u, lane < kBlocks && b < p.blocks));
        valid = lane < (G ? 2 : 1) * kBlocks && b < p.blocks;
        from = lane < kBlocks ? p.code + (int64_t)b * p.units * L::unit
                              : p.scale + (int64_t)b * p.granules * p.granule_bytes;
        to = base + (lane < kBlocks ? slot * L::unit : L::at_scale + slot * L::scale_block);
    }

    // Codes and scales of a unit; all its bytes are announced here.
    __device__ __forceinline__ void weights(const linear_segment &, int step, int stage) const {
        const int scales = L::granules * p.granule_bytes;
        if (lane == 0)
            barrier_arrive_expect(full + stage * 8, blocks * (L::unit + (G ? scales : 0)) + L::x);
        __syncwarp();
        if (!valid) return;
        if (lane < kBlocks)
            copy_bulk(to + stage * (L::code + L::x), from + (int64_t)step * L::unit, L::unit,
                      full + stage * 8, policy_evict_normal());
        else
            copy_bulk(to + stage * L::scale, from + step * 64 / (G ? G : 64) * p.granule_bytes,
                      scales, full + stage * 8, policy_evict_normal());
    }

    __device__ __forceinline__ void inputs(const linear_segment &s, int step, int stage) const {
        if (lane == 2 * kBlocks)
            copy_tile_to_both(base + stage * (L::code + L::x) + L::code + rank * kRows / 2 * 128,
                              map, step * 64, s.m0 + rank * kRows / 2, full + stage * 8);
    }

    __device__ __forceinline__ void run() {
        fill_ring_of_both<L::stages, linear_segment>(walk_of(p), *this, empty);
    }
};

// --- Epilogue -----------------------------------------------------------------------------------

// Where this warp's block goes.
__device__ __forceinline__ linear_place place_of(const linear_args &p, const linear_segment &s) {
    const int strip = threadIdx.x / 32 % 4;
    linear_place at;
    at.block = linear_block<2>(p, s.tile_n, cluster_rank(), (int)threadIdx.x / 128);
    const int32_t half = at.block >= p.half_blocks ? 1 : 0;
    const int32_t in_half = (at.block - half * p.half_blocks) * 64 + strip * 16;
    at.there = at.block < p.blocks && in_half < p.half_rows;
    at.col = half * p.half_rows + in_half + threadIdx.x % 4 * 4;
    return at;
}

template <typename T, int F>
__device__ __forceinline__ linear_outputs outputs_of(const linear_args &p, int32_t block,
                                                     int32_t col) {
    linear_outputs o = linear_outputs_of<T>(p, 0, block, col);
    constexpr float unfold = dequant_unfold<T, F>(); // such formats have no other scale here
    if (unfold != 1.f) o.scale = make_float4(unfold, unfold, unfold, unfold);
    return o;
}

// A whole tile in registers, of f32 or added to y.
template <typename T, int F>
__device__ __forceinline__ void finish_wide(float (&acc)[1][kRows / 2], const linear_args &p,
                                            const linear_segment &s, float *stage) {
    const linear_place at = place_of(p, s);
    if (!at.there) return;
    const linear_outputs o = outputs_of<T, F>(p, at.block, at.col);
#pragma unroll
    for (int j = 0; j < kGroups; j++)
        if (s.m0 + 8 * j < s.m_end)
            linear_emit<T, false>(p, s.m0 + 8 * j, s.m_end, at.col, &acc[0][4 * j], &acc[0][4 * j],
                                  o, o, stage);
}

// Scales and biases of rows g and g + 8 of this warp's strip of a block.
template <typename T, int F>
__device__ __forceinline__ linear_row_outputs row_outputs_of(const linear_args &p, int32_t block) {
    constexpr float unfold = dequant_unfold<T, F>(); // such formats have no other scale here
    linear_row_outputs o = {{unfold, unfold}, {0.f, 0.f}};
    const int32_t half = block >= p.half_blocks ? 1 : 0;
    const int32_t in_half = (block - half * p.half_blocks) * 64 + threadIdx.x / 32 % 4 * 16;
    if (in_half >= p.half_rows) return o;
    o = linear_row_outputs_of<T>(p, 0, block, threadIdx.x);
    if (unfold != 1.f) o.scale[0] = o.scale[1] = unfold;
    return o;
}

// In 16 bits, by whole lines. Of a pair the warpgroup of the gate finishes every second 16 rows of
// x, and that of up the others: each leaves its sums of those that are the other's, warp by warp,
// in one of two places in turn, [warp][2][lane] of 16 bytes.
template <typename T, int F>
__device__ __forceinline__ void finish(float (&acc)[1][kRows / 2], const linear_args &p,
                                       const linear_segment &s, uint32_t places, uint32_t pairs,
                                       int &turn) {
    constexpr int kRounds = kRows / 16;
    const int warp = __shfl_sync(~0u, (int)threadIdx.x / 32, 0), wg = warp / 4;
    const int32_t block = linear_block<2>(p, s.tile_n, cluster_rank(), p.paired ? 0 : wg);
    if (block >= p.blocks) return;
    const int32_t half = block >= p.half_blocks ? 1 : 0;
    const int32_t in_half = (block - half * p.half_blocks) * 64;
    if (in_half >= p.half_rows) return;
    T *y = static_cast<T *>(p.y) + s.m0 * p.ldy + half * p.half_rows + in_half;
    const int rows = s.m_end - s.m0;
    linear_lines<T> to(p, y, p.half_rows - in_half, rows, places + wg * LINEAR_LINES_BYTES,
                       kBlocks * LINEAR_LINES_BYTES, BAR_LINES + wg, p.paired ? wg : 0,
                       p.paired ? 2 : 1);
    float v[8];
    const linear_row_outputs o =
        row_outputs_of<T, F>(p, block + (p.paired ? wg : 0) * p.half_blocks);
    const auto scaled = [&](float(&v)[8]) {
#pragma unroll
        for (int i = 0; i < 8; i++) v[i] = fmaf(v[i], o.scale[i / 2 % 2], o.bias[i / 2 % 2]);
    };
    if (!p.paired) {
#pragma unroll
        for (int j = 0; j < kRounds; j++) {
            if (16 * j >= rows) break;
#pragma unroll
            for (int i = 0; i < 8; i++) v[i] = acc[0][8 * j + i];
            scaled(v);
            to.put(v, turn);
        }
        return;
    }
    const uint32_t put = pairs + warp * 1024 + threadIdx.x % 32 * 16;
    const uint32_t get = pairs + (warp ^ 4) * 1024 + threadIdx.x % 32 * 16;
#pragma unroll 1
    for (int j = wg; 16 * (j - wg) < rows; j += 2) {
        const uint32_t place = turn % 2 * (kWarps * 1024);
        float other[8], gate[8], up[8];
        group_pin(acc[0]);
        linear_take<0, kRounds>(other, acc[0], j ^ 1);
        scaled(other);
        linear_shared_put(put + place, &other[0]);
        linear_shared_put(put + place + 512, &other[4]);
        linear_meet(BAR_PAIR + warp % 4, 64);
        linear_take<0, kRounds>(v, acc[0], j);
        scaled(v);
        linear_shared_get(&other[0], get + place);
        linear_shared_get(&other[4], get + place + 512);
#pragma unroll
        for (int i = 0; i < 8; i++) gate[i] = wg ? other[i] : v[i], up[i] = wg ? v[i] : other[i];
        linear_gate_eight(gate, up, p);
        to.put(gate, turn);
    }
}

// --- The kernel ---------------------------------------------------------------------------------

#if defined(__CUDA_ARCH_FEAT_SM90_ALL) // empty on other architectures
// A unit of this warp's strip as A fragments of its four atoms of 16 inputs.
template <typename T, int F, int G>
__device__ __forceinline__ void convert(uint32_t (&f)[4][4], const linear_args &p, uint32_t code,
                                        uint32_t scale_at, int place) {
    constexpr int bits = linear_code_bits(F), kPerLoad = 16 / bits; // atoms in one load of 16 bytes
    uint4 chunk;
    dequant_scales scales;
#pragma unroll
    for (int j = 0; j < 4; j++) {
        if (j % kPerLoad == 0) chunk = shared_u128(code + j / kPerLoad * 512);
        if (G && j * 16 % (G ? G : 64) == 0)
            dequant_load_scales<T, F, true>(
                scales, scale_at + j * 16 / (G ? G : 64) * p.granule_bytes, place, p.sym);
        dequant_word<T, F, true, true>(
            f[j], reinterpret_cast<const uint32_t *>(&chunk) + j % kPerLoad * (bits / 4), scales);
    }
}

// All that a warp which multiplies does.
template <typename T, int F, int G>
__device__ __forceinline__ void compute(const linear_args &p, uint8_t *base) {
    using L = tile<F, G>;
    const uint32_t base_at = shared_address(base);
    const uint32_t full = base_at + L::at_bars, empty = full + L::stages * 8;
    const int warp = __shfl_sync(~0u, threadIdx.x / 32, 0), lane = threadIdx.x % 32;
    const int wg = warp / 4, strip = warp % 4;
    // Offsets of this lane within a stage; opaque, lest they be computed anew for every unit.
    uint32_t code_in = wg * L::unit + strip * (L::unit / 4) + lane * 16;
    int place = strip * 16 + lane / 4 * 2;
    uint32_t scale_in = base_at + L::at_scale + wg * L::scale_block;
    asm volatile("" : "+r"(code_in), "+r"(place), "+r"(scale_in));
    float *turn = reinterpret_cast<float *>(base + L::at_turn) + warp * LINEAR_STAGE_FLOATS;
    int turns = 0;

    int stage = 0, parity = 0;
    uint32_t before = 0; // the barrier of the unit that the tensor cores may still be at
    const auto release = [&] {
        __syncwarp();
        if (lane < kCtas) remote_arrive(remote_address(before, lane));
    };
    linear_walk<kRows> walk = walk_of(p);
    linear_segment s;
    while (walk.next(s)) {
        float acc[1][kRows / 2] = {};
        const auto multiply = [&](uint32_t(&f)[4][4], bool first) {
            const uint32_t at = base_at + stage * (L::code + L::x);
            const uint32_t x_at = (at + L::code) >> 4 | 1u << 16; // low half of a descriptor
            barrier_wait(full + stage * 8, parity);
            convert<T, F, G>(f, p, at + code_in, scale_in + stage * L::scale, place);
            group_fence();
#pragma unroll
            for (int j = 0; j < 4; j++)
                multiply_group<T, kRows>::run(acc[0], f[j], group_descriptor_low(x_at + j * 2));
            group_commit();
            group_wait<1>();
            if (!first) release();
            before = empty + stage * 8;
            if (++stage == L::stages) stage = 0, parity ^= 1;
        };
        uint32_t even[4][4], odd[4][4];
        int step = s.step0;
        for (; step + 1 < s.step1; step += 2) {
            multiply(even, step == s.step0);
            multiply(odd, false);
        }
        if (step < s.step1) multiply(even, step == s.step0);
        group_wait<0>();
        group_pin(acc[0]);
        release();
        if (s.line >= 0) {
            const int32_t owner = walk.holder(s.line);
            const int32_t sharers = walk.holder(s.line + p.steps - 1) - owner + 1;
            const int rank = cluster_rank();
            if (s.step0 > 0) {
                linear_deposit<kRows, 1, kWarps>(acc, p, slot_of(walk.cta, rank),
                                                 slot_of(owner, rank), s);
                continue;
            }
            if (sharers > 1)
                linear_collect<kRows, 1, kWarps>(acc, p, s, slot_of(owner, rank), sharers);
        }
        if (p.y_f32 || p.epilogue == LINEAR_RESIDUAL)
            finish_wide<T, F>(acc, p, s, turn);
        else
            finish<T, F>(acc, p, s, base_at + L::at_turn, base_at + L::at_pair, turns);
    }
}
#endif

template <typename T, int F, int G>
__global__ void __launch_bounds__(kThreads, 1)
    linear_wide(const __grid_constant__ linear_args p, const __grid_constant__ CUtensorMap map) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL) // never launched, and empty, on other architectures
    using L = tile<F, G>;
    extern __shared__ uint8_t shared[];
    uint8_t *base = shared + ((1024 - (shared_address(shared) & 1023)) & 1023);
    const uint32_t base_at = shared_address(base);
    const uint32_t full = base_at + L::at_bars, empty = full + L::stages * 8;
    const int warp = __shfl_sync(~0u, threadIdx.x / 32, 0);

    begin_ring_of_both<L::stages>(full, empty, kCtas * kWarps);

    if (warp >= kWarps) {
        registers_down<kLoadRegisters>();
        if (warp == kWarps) {
            producer<F, G> load = {
                p, &map, base_at, full, empty, (int)threadIdx.x % 32, cluster_rank()};
            load.run();
        }
    } else {
        registers_up<kMathRegisters>();
        wait_for_previous();
        compute<T, F, G>(p, base);
    }
    __syncwarp();
    cluster_arrive(); // until then it may still arrive here
    cluster_wait();
#endif
}

template <typename T, int F, int G>
status launch(const linear_args *args, int32_t n_sms, int32_t per_sm, kernel_stream stream) {
    const auto kernel = linear_wide<T, F, G>;
    CUtensorMap map = {};
    TRY(linear_map_x(&map, args, half_pair<T>::bf16, kRows / 2));
    constexpr int bytes = tile<F, G>::bytes;
    launch_config l(dim3((unsigned)(n_sms * per_sm / kCtas * kCtas)), dim3(kThreads), bytes, stream,
                    true, kCtas);
    cudaError_t e =
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
    int fit = 0; // clusters that run at once: they wait for each other
    if (e == cudaSuccess)
        e = cudaOccupancyMaxActiveClusters(&fit, reinterpret_cast<const void *>(kernel), &l.config);
    if (fit * kCtas < (int)l.config.gridDim.x) l.config.gridDim = dim3((unsigned)(fit * kCtas));
    if (e == cudaSuccess) e = cudaLaunchKernelEx(&l.config, kernel, *args, map);
    return e == cudaSuccess ? ST_OK : FAIL(ST_DEVICE, "linear_wide: %s", cudaGetErrorString(e));
}

#define T_F16  __half
#define T_BF16 __nv_bfloat16
#define ROW(F, T, G)                                                                               \
    {"wide_256",      90,   90, WF_##F, DT_##T, kRows,                                             \
     kCtas * kBlocks, 1,    G,  G,      1,      launch<T_##T, WF_##F, G>,                          \
     INT32_MAX,       false},
const linear_variant rows[] = {WIDE_INSTANCES(ROW)};

} // namespace

extern "C" linear_table linear_wide_table(void) {
    return linear_table{rows, (int32_t)(sizeof rows / sizeof rows[0])};
}
