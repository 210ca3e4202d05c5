// linear_codes.cu - linears whose operands are multiplied as they lie, on Hopper: y^T = W x^T by
// wgmma. W and x as 8-bit codes in plain order, both fed to the tensor cores through shared memory
// by the copy engine; or both of 16 bits, W as tiles of which ldmatrix makes A fragments.
//
//   tile     128 rows of W x NT rows of x: a block of 64 rows a warpgroup, two neighbours, or a
//            block of gate and the same of up
//   step     a row of 128 bytes: 128 codes, what one scale of FP8b covers, or 64 inputs of 16 bits
//   cluster  S CTAs cut the inputs of a tile; each then adds S partial sums of its share of the x
//            rows, read from the others' shared memory in rank order: the same bits in every run
//
// FP8 products are summed in the tensor core over one step only, whose sums keep fewer bits than
// f32 has, and added to f32 registers after it. int8 sums are exact; those of 16 bits are f32's.
//
// Two copy warps fill a ring of W and a ring of x. W does not depend on the kernel before, so its
// ring is asked for before that has ended.
#include "linear_common.cuh"
#include "linear_launch.h"
#include "tensor_map.cuh"
#include "traits.cuh"

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ == 900
#include "ptx_sm90_codes.cuh"
#endif
#include <cstring>

namespace {

constexpr int kRows = 128, kStep = 128, kBlock = 64;
constexpr int kConsumers = 256, kThreads = kConsumers + 64; // two warps copy
constexpr int kPitch = kRows + 4; // of sums in shared memory: no bank conflicts
constexpr int kClusterMost = 4;   // larger ones wait longer for their places than they save

struct codes_args : linear_output { // k: bytes of a row of operands
    const float *w_scale, *x_scale;
    int32_t m_pad;
    int32_t x_rows;       // of a tile, in eights: a box that reaches past the last row costs
    int32_t w_step;       // f32 between scales of two block rows, FP8b
    const uint8_t *tiled; // W of 16 bits: blocks (linear_layout.h), and those of a half
    int32_t blocks, half_blocks;
};

// Stages of W and of x; shared memory of two CTAs an SM.
constexpr int kWBytes = kRows * kStep;
template <int NT> constexpr int kXBytes = NT *kStep;
template <int NT> constexpr int kWStages = NT <= 16 ? 6 : NT <= 32 ? 5 : 4;
template <int NT> constexpr int kXStages = NT <= 8 ? 8 : NT <= 16 ? 6 : NT <= 32 ? 7 : 5;
template <int NT> constexpr int ring_bytes = kWStages<NT> *kWBytes + kXStages<NT> *kXBytes<NT>;
template <int NT> constexpr int sums_bytes = kPitch *NT * 4;
template <int NT> constexpr int scale_bytes = kXStages<NT> *NT * 4; // of x, FP8b
template <int NT>
constexpr int shared_bytes = 1024 + (ring_bytes<NT> + scale_bytes<NT> > sums_bytes<NT>
                                         ? ring_bytes<NT> + scale_bytes<NT>
                                         : sums_bytes<NT>);
constexpr int kAlone = 114 * 1024; // the least of which an SM has no two

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ == 900

__device__ __forceinline__ float2 shared_float2(uint32_t at) {
    float2 v;
    asm volatile("ld.shared.v2.f32 {%0, %1}, [%2];" : "=f"(v.x), "=f"(v.y) : "r"(at) : "memory");
    return v;
}
__device__ __forceinline__ void cluster_sync() {
    asm volatile("barrier.cluster.arrive.aligned;\nbarrier.cluster.wait.aligned;" ::: "memory");
}
__device__ __forceinline__ uint4 peer_load(uint32_t at, uint32_t rank) {
    uint32_t there;
    uint4 v;
    asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(at), "r"(rank));
    asm volatile("ld.shared::cluster.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                 : "r"(there)
                 : "memory");
    return v;
}

template <bool INT8> struct sum_of { using type = float; };
template <> struct sum_of<true> { using type = int32_t; };

// Sums of int8 and of 16 bits stay in the tensor core's hands throughout.
template <weight_format F> constexpr bool kWhole = F == WF_INT8 || F == WF_16;
template <bool WHOLE, typename A, typename B>
__device__ __forceinline__ auto &pick(A &acc, B &sums) {
    if constexpr (WHOLE)
        return acc;
    else
        return sums;
}

// A ring of stages: where the next one is, and how often the ring went round.
template <int STAGES> struct ring_at {
    uint32_t full, empty; // barriers, one a stage
    int stage = 0, turn = 0;
    __device__ __forceinline__ void next() {
        if (++stage == STAGES) stage = 0, turn ^= 1;
    }
    __device__ __forceinline__ void wait_full() const { barrier_wait(full + stage * 8, turn); }
    __device__ __forceinline__ void wait_empty() const { // passes the first time round
        barrier_wait(empty + stage * 8, turn ^ 1);
    }
    __device__ __forceinline__ void release() const { barrier_arrive(empty + stage * 8); }
};

struct part { // of the inputs, and of the rows
    int from, steps, row0, row1, m0;
};

// W of the tile's two blocks; of none where the last tile has but one.
template <int NT>
__device__ __forceinline__ void copy_blocks(const codes_args &a, ring_at<kWStages<NT>> at,
                                            uint32_t ring, const part &p) {
    constexpr int kUnit = kBlock * kStep;
    const int units = (a.k + kStep - 1) / kStep, b0 = p.row0 / kBlock, b1 = p.row1 / kBlock;
    const uint8_t *from0 = a.tiled + ((int64_t)b0 * units + p.from) * kUnit;
    const uint8_t *from1 = a.tiled + ((int64_t)b1 * units + p.from) * kUnit;
    const uint64_t policy = policy_evict_first();
    for (int i = 0; i < p.steps; i++, at.next(), from0 += kUnit, from1 += kUnit) {
        const uint32_t to = ring + at.stage * kWBytes, bar = at.full + at.stage * 8;
        at.wait_empty();
        barrier_arrive_expect(bar, b1 < a.blocks ? kWBytes : kUnit);
        copy_bulk(to, from0, kUnit, bar, policy);
        if (b1 < a.blocks) copy_bulk(to + kUnit, from1, kUnit, bar, policy);
    }
}

template <int NT>
__device__ __forceinline__ void copy_weights(const CUtensorMap *map, ring_at<kWStages<NT>> at,
                                             uint32_t ring, const part &p) {
    for (int i = 0; i < p.steps; i++, at.next()) {
        const uint32_t to = ring + at.stage * kWBytes, bar = at.full + at.stage * 8;
        at.wait_empty();
        barrier_arrive_expect(bar, kWBytes);
        copy_tile(to, map, (p.from + i) * kStep, p.row0, bar);
        copy_tile(to + kBlock * kStep, map, (p.from + i) * kStep, p.row1, bar);
    }
}

// Scales of FP8b come with the codes that they scale; those of rows past m_pad are anything.
template <weight_format F, int NT>
__device__ __forceinline__ void copy_inputs(const codes_args &a, const CUtensorMap *map,
                                            ring_at<kXStages<NT>> at, uint32_t ring,
                                            uint32_t scales, const part &p) {
    const int bytes = F == WF_FP8B ? 4 * min(a.x_rows, a.m_pad - p.m0) : 0;
    const float *scale = a.x_scale + (int64_t)p.from * a.m_pad + p.m0;
    asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
    wait_for_previous();
    for (int i = 0; i < p.steps; i++, at.next(), scale += a.m_pad) {
        const uint32_t bar = at.full + at.stage * 8;
        at.wait_empty();
        barrier_arrive_expect(bar, a.x_rows * kStep + bytes);
        copy_tile(ring + at.stage * kXBytes<NT>, map, (p.from + i) * kStep, p.m0, bar);
        if (F == WF_FP8B)
            copy_bulk(scales + at.stage * NT * 4, scale, bytes, bar, policy_evict_normal());
    }
}

// acc += the sums of one step. x_scale: in shared memory, of columns 2 t, 2 t + 1.
template <weight_format F, int N, typename S>
__device__ __forceinline__ void add_step(S (&acc)[N], const S (&sums)[N], float w_scale,
                                         uint32_t x_scale) {
#pragma unroll
    for (int i = 0; i < N && F == WF_FP8; i++) acc[i] += sums[i];
#pragma unroll
    for (int j = 0; j < N / 4 && F == WF_FP8B; j++) {
        const float2 x = shared_float2(x_scale + 32 * j);
        const float s0 = x.x * w_scale, s1 = x.y * w_scale;
#pragma unroll
        for (int i = 4 * j; i < 4 * j + 4; i++) acc[i] = fmaf(sums[i], i % 2 ? s1 : s0, acc[i]);
    }
}

// The products of a step; f: fragments of the step's four atoms, or unused.
template <weight_format F, typename T, int X, typename S, int N>
__device__ __forceinline__ void multiply_step(S (&d)[N], uint32_t w, uint32_t x) {
    uint4 f[F == WF_16 ? 4 : 1];
    if constexpr (F == WF_16) {
        const uint32_t at =
            w + threadIdx.x / 32 % 4 * 2048 + dequant_lane_at<WF_16>(threadIdx.x % 32);
#pragma unroll
        for (int q = 0; q < 4; q++) f[q] = dequant_load<WF_16>(at, q);
    }
    group_pin(d);
    group_fence();
#pragma unroll
    for (int q = 0; q < kStep / 32; q++) {
        if constexpr (F == WF_16) {
            const uint32_t a[4] = {f[q].x, f[q].y, f[q].z, f[q].w};
            multiply_group<T, X>::run(d, a, group_descriptor(x + q * 32));
        } else {
            multiply_codes<F == WF_INT8, X>::run(d, group_descriptor(w + q * 32),
                                                 group_descriptor(x + q * 32), kWhole<F> || q > 0);
        }
    }
    group_commit();
    group_wait<0>();
    group_pin(d);
}

// Sums of this CTA's steps for the warpgroup's block, whose first row is row0: acc holds rows
// 16 (warp % 4) + g and + 8, columns 8 j + 2 t, + 1.
template <weight_format F, int NT, typename T>
__device__ __forceinline__ void
multiply_steps(typename sum_of<F == WF_INT8>::type (&acc)[NT / 2], const codes_args &a,
               ring_at<kWStages<NT>> w_at, uint32_t w_ring, ring_at<kXStages<NT>> x_at,
               uint32_t x_ring, uint32_t scales, const part &p, int row0) {
    const int warp = (int)threadIdx.x / 32, lane = (int)threadIdx.x % 32;
    const int strip = min(row0 + 16 * (warp % 4), a.n - 1); // never in two rows of blocks
    const int w_first = strip / 128 * a.w_step + p.from;
    // Scales of W come from memory: a lane has that of one of 32 steps, and of the 32 after.
    const auto w_scale_at = [&](int i) { return i < p.steps ? a.w_scale[w_first + i] : 0.f; };
    float w_scales = F == WF_FP8B ? w_scale_at(lane) : 0.f, w_then = 0;
    if (F == WF_FP8B) w_then = w_scale_at(lane + 32);
    scales += lane % 4 * 8;
    for (int i = 0; i < p.steps; i++, w_at.next(), x_at.next()) {
        const uint32_t w = w_ring + w_at.stage * kWBytes + warp / 4 * kBlock * kStep;
        const uint32_t x = x_ring + x_at.stage * kXBytes<NT>;
        if (F == WF_FP8B && i > 0 && i % 32 == 0) {
            w_scales = w_then;
            w_then = w_scale_at(i + 32 + lane);
        }
        const float w_now = F == WF_FP8B ? __shfl_sync(~0u, w_scales, i % 32) : 0.f;
        w_at.wait_full();
        x_at.wait_full();
        typename sum_of<F == WF_INT8>::type sums[NT / 2];
        multiply_step<F, T, NT>(pick<kWhole<F>>(acc, sums), w, x);
        if (F == WF_16 || lane == 0) w_at.release();
        if (F != WF_FP8B && lane == 0) x_at.release();
        if constexpr (!kWhole<F>) add_step<F>(acc, sums, w_now, scales + x_at.stage * NT * 4);
        if (F == WF_FP8B) __syncwarp(); // all lanes have read the scales
        if (F == WF_FP8B && lane == 0) x_at.release();
    }
}

// Four rows of W of one x row: the sums of all CTAs of the cluster, scaled, with bias. All are
// asked for before the first is added.
template <weight_format F>
__device__ __forceinline__ void add_up(float (&v)[4], const codes_args &a, uint32_t at, int ranks,
                                       int m, int n) {
    uint4 part[kClusterMost];
#pragma unroll
    for (int r = 0; r < kClusterMost; r++)
        part[r] = r < ranks ? peer_load(at, (uint32_t)r) : make_uint4(0, 0, 0, 0);
    if constexpr (F == WF_INT8) {
        int4 s = make_int4(0, 0, 0, 0);
#pragma unroll
        for (int r = 0; r < kClusterMost; r++)
            s.x += (int)part[r].x, s.y += (int)part[r].y, s.z += (int)part[r].z,
                s.w += (int)part[r].w;
        v[0] = (float)s.x, v[1] = (float)s.y, v[2] = (float)s.z, v[3] = (float)s.w;
    } else {
        v[0] = v[1] = v[2] = v[3] = 0;
#pragma unroll
        for (int r = 0; r < kClusterMost; r++) {
            v[0] += __uint_as_float(part[r].x), v[1] += __uint_as_float(part[r].y);
            v[2] += __uint_as_float(part[r].z), v[3] += __uint_as_float(part[r].w);
        }
    }
    if (F != WF_FP8B && F != WF_16) {
        const float4 w = *reinterpret_cast<const float4 *>(a.w_scale + n);
        const float x = a.x_scale[m];
        v[0] *= x * w.x, v[1] *= x * w.y, v[2] *= x * w.z, v[3] *= x * w.w;
    }
    if (!a.bias) return;
#pragma unroll
    for (int i = 0; i < 4; i++) v[i] += linear_element(a.bias, n + i, a.bf16, false);
}

template <weight_format F>
__device__ __forceinline__ void finish(const codes_args &a, uint32_t sums, const part &p, int ranks,
                                       int rank, int rows) {
    const int wide = a.gated ? kBlock / 4 : kRows / 4;             // fours of an output row
    const int per = kThreads / wide;                               // x rows at a time
    const int i = (int)threadIdx.x % wide * 4;                     // row of W in the tile
    const int row = i < kBlock ? p.row0 + i : p.row1 + i - kBlock; // of W as packed
    const bool second = row >= a.half_blocks * kBlock;
    const int n = second ? row - a.half_blocks * kBlock + a.half : row;
    const int end = !a.gated && second ? a.n : a.half;
    for (int m = rank + (int)threadIdx.x / wide * ranks; m < rows; m += per * ranks) {
        if (n >= end) continue;
        float v[4], u[4] = {};
        add_up<F>(v, a, sums + (uint32_t)(m * kPitch + i) * 4, ranks, p.m0 + m, n);
        const int64_t at = (int64_t)(p.m0 + m) * a.ldy + n;
        if (a.gated)
            add_up<F>(u, a, sums + (uint32_t)(m * kPitch + kBlock + i) * 4, ranks, p.m0 + m,
                      a.half + n);
        linear_put_four(a, at, v, u);
    }
}

#endif

// Grid: (S in a cluster, tiles of W, tiles of x).
template <weight_format F, int NT, typename T>
__global__ void __launch_bounds__(kThreads, 2)
    linear_codes(const codes_args a, const __grid_constant__ CUtensorMap w_map,
                 const __grid_constant__ CUtensorMap x_map) {
#if __CUDA_ARCH__ == 900
    extern __shared__ uint8_t shared[];
    __shared__ uint64_t barriers[2 * (kWStages<NT> + kXStages<NT>)];
    using S = typename sum_of<F == WF_INT8>::type;
    const uint32_t ring = (shared_address(shared) + 1023) / 1024 * 1024;
    const uint32_t x_ring = ring + kWStages<NT> * kWBytes, bars = shared_address(barriers);
    const uint32_t scales = x_ring + kXStages<NT> * kXBytes<NT>;
    ring_at<kWStages<NT>> w_at;
    ring_at<kXStages<NT>> x_at;
    w_at.full = bars;
    w_at.empty = bars + kWStages<NT> * 8;
    x_at.full = bars + kWStages<NT> * 16;
    x_at.empty = bars + (2 * kWStages<NT> + kXStages<NT>)*8;
    const int ranks = (int)cluster_size(), rank = (int)cluster_rank();
    const int all = (a.k + kStep - 1) / kStep, warp = (int)threadIdx.x / 32;
    part p;
    p.from = all * rank / ranks;
    p.steps = all * (rank + 1) / ranks - p.from;
    p.row0 = (int)blockIdx.y * (a.gated ? kBlock : kRows);
    p.row1 = p.row0 + (a.gated ? (F == WF_16 ? a.half_blocks * kBlock : a.half) : kBlock);
    p.m0 = (int)blockIdx.z * a.x_rows;
    if (threadIdx.x == 0) {
        for (int i = 0; i < kWStages<NT>; i++) {
            barrier_init(w_at.full + i * 8, 1);
            // Fragments are read by every lane, what tensor cores read by none.
            barrier_init(w_at.empty + i * 8, F == WF_16 ? kConsumers : kConsumers / 32);
        }
        for (int i = 0; i < kXStages<NT>; i++) {
            barrier_init(x_at.full + i * 8, 1);
            barrier_init(x_at.empty + i * 8, kConsumers / 32);
        }
        barrier_init_fence();
    }
    __syncthreads();
    launch_dependents();
    if (warp >= kConsumers / 32) {
        if (threadIdx.x == kConsumers) {
            if constexpr (F == WF_16)
                copy_blocks<NT>(a, w_at, ring, p);
            else
                copy_weights<NT>(&w_map, w_at, ring, p);
        }
        if (threadIdx.x == kConsumers + 32) copy_inputs<F, NT>(a, &x_map, x_at, x_ring, scales, p);
        __syncwarp();
    } else {
        S acc[NT / 2];
#pragma unroll
        for (int i = 0; i < NT / 2; i++) acc[i] = 0;
        multiply_steps<F, NT, T>(acc, a, w_at, ring, x_at, x_ring, scales, p,
                                 warp < 4 ? p.row0 : p.row1);
        // All stages have been read: their place takes the sums, [NT][kPitch].
        asm volatile("bar.sync 1, 256;" ::: "memory");
        const int lane = (int)threadIdx.x % 32;
        S *sums = reinterpret_cast<S *>(shared + (ring - shared_address(shared)));
#pragma unroll
        for (int c = 0; c < NT / 2; c++)
            sums[(c / 4 * 8 + lane % 4 * 2 + c % 2) * kPitch + warp * 16 + lane / 4 +
                 c / 2 % 2 * 8] = acc[c];
    }
    wait_for_previous(); // every thread that reads scales of x, or y
    cluster_sync();
    finish<F>(a, ring, p, ranks, rank, min(a.x_rows, a.m - p.m0));
    cluster_sync(); // the others have read
#endif
}

// --- Launch -------------------------------------------------------------------------------------

// CTAs that share the inputs of one of `tiles`: the most for which all clusters run at once, which
// the GPU's division into groups of SMs decides, with at least two steps each.
template <typename K>
status cluster_for(int32_t *size, int (&at_once)[kClusterMost + 1], K kernel, int bytes,
                   int32_t tiles, int32_t steps) {
    *size = 1;
    for (int32_t s = 2; s <= kClusterMost && s <= steps / 2; s++) {
        const launch_config l(dim3((unsigned)s), dim3(kThreads), (size_t)bytes, nullptr, false,
                              (unsigned)s);
        int n = at_once[s];
        if (n == 0) {
            const cudaError_t e = cudaOccupancyMaxActiveClusters(&n, kernel, &l.config);
            if (e != cudaSuccess) return FAIL(ST_DEVICE, "linear_codes: %s", cudaGetErrorString(e));
            at_once[s] = n;
        }
        if (tiles <= n) *size = s;
    }
    return ST_OK;
}

template <weight_format F, int NT, typename T = void>
status launch(const codes_args &args, const void *w, const void *x, int64_t ldx,
              cudaStream_t stream) {
    const auto kernel = linear_codes<F, NT, T>;
    codes_args a = args;
    const int32_t m_tiles = (a.m + NT - 1) / NT;
    a.x_rows = ((a.m + m_tiles - 1) / m_tiles + 7) / 8 * 8;
    CUtensorMap w_map = {}, x_map;
    if (F != WF_16) TRY(tensor_map_codes(&w_map, w, a.n, a.k, a.k, kBlock));
    TRY(tensor_map_codes(&x_map, x, a.m_pad, a.k, ldx, a.x_rows));
    const int32_t rows = a.gated ? a.half : F == WF_16 ? a.blocks * kBlock : a.n;
    const int32_t tile = a.gated ? kBlock : kRows;
    const int32_t tiles = (rows + tile - 1) / tile;
    static_assert(shared_bytes<NT> < kAlone, "two CTAs an SM");
    const int32_t all = tiles * m_tiles, steps = (a.k + kStep - 1) / kStep;
    cudaError_t e =
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kAlone);
    if (e != cudaSuccess) return FAIL(ST_DEVICE, "linear_codes: %s", cudaGetErrorString(e));
    // Clusters of a size that run, with one CTA an SM and with two; 0: not asked yet. Few tiles get
    // SMs of their own: CTAs would come to lie in pairs on half of them, and wait for what those
    // can take in.
    static int alone[kClusterMost + 1], in_pairs[kClusterMost + 1];
    int32_t s;
    int bytes = kAlone;
    TRY(cluster_for(&s, alone, kernel, bytes, all, steps));
    if (s == 1) {
        bytes = shared_bytes<NT>;
        TRY(cluster_for(&s, in_pairs, kernel, bytes, all, steps));
    }
    const launch_config l(dim3((unsigned)s, (unsigned)tiles, (unsigned)m_tiles), dim3(kThreads),
                          (size_t)bytes, stream, true, (unsigned)s);
    e = cudaLaunchKernelEx(&l.config, kernel, a, w_map, x_map);
    return e == cudaSuccess ? ST_OK : FAIL(ST_DEVICE, "linear_codes: %s", cudaGetErrorString(e));
}

struct instance {
    const char *name;
    weight_format format;
    int32_t rows_x;
    status (*launch)(const codes_args &, const void *, const void *, int64_t, cudaStream_t);
};

#define CODES_INSTANCES(X) X(8) X(16) X(32) X(64)
#define ROWS(NT)                                                                                   \
    {"codes_" #NT, WF_INT8, NT, launch<WF_INT8, NT>},                                              \
        {"codes_" #NT, WF_FP8, NT, launch<WF_FP8, NT>},                                            \
        {"codes_" #NT, WF_FP8B, NT, launch<WF_FP8B, NT>},
const instance instances[] = {CODES_INSTANCES(ROWS)};

// W and x of 16 bits.
template <int NT, typename T>
status launch_words(const linear_args *p, int32_t, int32_t, kernel_stream stream) {
    codes_args a = {linear_output_of<T>(p)};
    a.m_pad = p->m;
    a.tiled = p->code;
    a.blocks = p->blocks;
    a.half_blocks = p->half_blocks;
    return launch<WF_16, NT, T>(a, nullptr, p->x, p->ldx * 2, (cudaStream_t)stream);
}

#define T_F16  __half
#define T_BF16 __nv_bfloat16
// Type; rows of x of a tile and, at most, of a problem.
#define WORDS_INSTANCES(X) X(F16, 32, 32) X(BF16, 32, 32) X(F16, 64, 128) X(BF16, 64, 128)
#define WORDS_ROW(T, NT, MOST)                                                                     \
    {                                                                                              \
        "words_" #NT,   90,  90, WF_16, DT_##T, NT,                                                \
        kRows / kBlock, 1,   0,  0,     2,      launch_words<NT, T_##T>,                           \
        MOST,           true},
const linear_variant words[] = {WORDS_INSTANCES(WORDS_ROW)};

} // namespace

extern "C" status linear_codes_launch(const char *name, const linear_problem *p, int32_t row,
                                      int32_t m, const void *code, const float *x_scale,
                                      int32_t m_pad, kernel_stream stream) {
    const linear_weight *w = p->w;
    codes_args a = {linear_output_of(p, row, m)};
    a.w_scale = static_cast<const float *>(w->scale);
    a.x_scale = x_scale;
    a.m_pad = m_pad;
    a.half_blocks = 1 << 24; // rows lie as they are counted
    a.w_step = linear_plain_stride(w->k);
    for (const instance &i : instances)
        if (i.format == w->format && strcmp(i.name, name) == 0)
            return i.launch(a, w->code, code, a.k, stream);
    return FAIL(ST_UNSUPPORTED, "no kernel %s of W%s", name, weight_format_text(w->format));
}

extern "C" linear_table linear_words_table(void) {
    return linear_table{words, (int32_t)(sizeof words / sizeof words[0])};
}
