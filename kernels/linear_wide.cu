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
#include "ptx_sm90.cuh"
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
enum { BAR_PAIR = 1 }; // named barriers; 0 is __syncthreads

// Shared memory of a CTA: stages of one unit, codes and x, then scales, the turning places, what
// warps of gate and up exchange, and barriers. A granule of two units comes with each of them.
template <int F, int G> struct tile {
    static constexpr int unit = 512 * linear_code_bits(F); // bytes of a block
    static constexpr int code = kBlocks * unit, x = kRows * 128;
    static constexpr int granules = G == 0 ? 0 : G < 64 ? 64 / G : 1; // of a unit
    static constexpr int scale_block = granules * linear_granule_bytes(F),
                         scale = kBlocks * scale_block;
    static constexpr int turn = kWarps * LINEAR_STAGE_FLOATS * 4, pair = kWarps * 512;
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

__device__ __forceinline__ void copy_tile_to_both(uint32_t to, const void *map, int col, int row,
                                                  uint32_t bar) {
    asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes"
                 ".multicast::cluster [%0], [%1, {%2, %3}], [%4], %5;" ::"r"(to),
                 "l"(map), "r"(col), "r"(row), "r"(bar), "h"((uint16_t)3)
                 : "memory");
}

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
    __device__ __forceinline__ void weights(int step, int stage) const {
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
        linear_walk<kRows> walk = walk_of(p);
        linear_segment s;
        int stage = 0, parity = 1, early = 0;
        for (bool first = true; walk.next(s); first = false) {
            begin(s);
            if (first) {
                for (; early < L::stages && s.step0 + early < s.step1; early++)
                    weights(s.step0 + early, early);
                wait_for_previous();
            }
            for (int step = s.step0; step < s.step1; step++) {
                barrier_wait(empty + stage * 8, parity); // in both CTAs
                if (early > 0)
                    early--;
                else
                    weights(step, stage);
                inputs(s, step, stage);
                if (++stage == L::stages) stage = 0, parity ^= 1;
            }
        }
    }
};

// --- Epilogue -----------------------------------------------------------------------------------

// Where this warp's block goes; of a pair, the place of the gate.
__device__ __forceinline__ linear_place place_of(const linear_args &p, const linear_segment &s) {
    const int strip = threadIdx.x / 32 % 4;
    linear_place at;
    at.block = linear_block<2>(p, s.tile_n, cluster_rank(), p.paired ? 0 : (int)threadIdx.x / 128);
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

// A whole tile in registers. Of a pair, the warp of the gate finishes the first half of the x rows
// and that of up the second: one group each way at a time.
template <typename T, int F>
__device__ __forceinline__ void finish(float (&acc)[1][kRows / 2], const linear_args &p,
                                       const linear_segment &s, float *stage, float4 *pairs) {
    const linear_place at = place_of(p, s);
    if (!p.paired) {
        if (!at.there) return;
        const linear_outputs o = outputs_of<T, F>(p, at.block, at.col);
#pragma unroll
        for (int j = 0; j < kGroups; j++)
            if (s.m0 + 8 * j < s.m_end)
                linear_emit<T, false>(p, s.m0 + 8 * j, s.m_end, at.col, &acc[0][4 * j],
                                      &acc[0][4 * j], o, o, stage);
        return;
    }
    linear_outputs gate_o = {}, up_o = {};
    if (at.there) {
        gate_o = outputs_of<T, F>(p, at.block, at.col);
        up_o = outputs_of<T, F>(p, at.block + p.half_blocks, at.col + p.half_rows);
    }
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const bool up = warp / 4;
    const int barrier = BAR_PAIR + warp % 4;
#pragma unroll
    for (int j = 0; j < kGroups / 2; j++) {
        float mine[4], other[4];
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const float low = acc[0][4 * j + i], high = acc[0][4 * (j + kGroups / 2) + i];
            mine[i] = up ? high : low;
            other[i] = up ? low : high;
        }
        pairs[warp * 32 + lane] = make_float4(other[0], other[1], other[2], other[3]);
        asm volatile("bar.sync %0, 64;" ::"r"(barrier) : "memory");
        const float4 v = pairs[(warp ^ 4) * 32 + lane];
        asm volatile("bar.sync %0, 64;" ::"r"(barrier) : "memory");
        const float got[4] = {v.x, v.y, v.z, v.w};
        float gate[4], c[4];
#pragma unroll
        for (int i = 0; i < 4; i++) {
            gate[i] = up ? got[i] : mine[i];
            c[i] = up ? mine[i] : got[i];
        }
        const int32_t m0 = s.m0 + 8 * (j + up * kGroups / 2);
        if (at.there && m0 < s.m_end)
            linear_emit<T, true>(p, m0, s.m_end, at.col, gate, c, gate_o, up_o, stage);
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
    float4 *pairs = reinterpret_cast<float4 *>(base + L::at_pair);

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
        finish<T, F>(acc, p, s, turn, pairs);
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

    launch_dependents();
    if (threadIdx.x == 0) {
        for (int i = 0; i < L::stages; i++) {
            barrier_init(full + i * 8, 1);
            barrier_init(empty + i * 8, kCtas * kWarps);
        }
        barrier_init_fence();
    }
    __syncthreads();
    cluster_arrive(); // the other CTA writes here
    cluster_wait();

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
    cudaLaunchAttribute attrs[2];
    attrs[0].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attrs[0].val.programmaticStreamSerializationAllowed = 1;
    attrs[1].id = cudaLaunchAttributeClusterDimension;
    attrs[1].val.clusterDim = {kCtas, 1, 1};
    cudaLaunchConfig_t config = {};
    config.blockDim = dim3(kThreads);
    config.dynamicSmemBytes = bytes;
    config.stream = (cudaStream_t)stream;
    config.attrs = attrs;
    config.numAttrs = 2;
    config.gridDim = dim3((unsigned)(n_sms * per_sm / kCtas * kCtas));
    cudaError_t e =
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
    int fit = 0; // clusters that run at once: they wait for each other
    if (e == cudaSuccess)
        e = cudaOccupancyMaxActiveClusters(&fit, reinterpret_cast<const void *>(kernel), &config);
    if (fit * kCtas < (int)config.gridDim.x) config.gridDim = dim3((unsigned)(fit * kCtas));
    if (e == cudaSuccess) e = cudaLaunchKernelEx(&config, kernel, *args, map);
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
