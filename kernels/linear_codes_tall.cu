// linear_codes_tall.cu - int8 x int8 for many rows on Hopper: y = x W^T by wgmma, x and W as codes
// in plain order, fed to the tensor cores through shared memory by the copy engine.
//
//   tile     128 rows of x, 64 a warpgroup, by NT rows of W: neighbours, or NT / 2 of gate and the
//            same of up
//   step     128 codes of each row
//   cluster  two CTAs have two tiles of the same rows of W, or of x; each brings half of those to
//            both
//
// Sums are exact int32 in the tensor core's hands; scales, bias, gate and residual meet them in
// registers, where cuBLASLt's product would leave int32 to another kernel. W does not depend on the
// kernel before, so its first stages are asked for before that has ended.
#include "linear_common.cuh"
#include "linear_launch.h"
#include "tensor_map.cuh"
#include "traits.cuh"

#if !defined(__CUDA_ARCH__) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
#include "ptx_sm90_codes.cuh"
#endif

namespace {

constexpr int kRows = 128, kStep = 128, kCtas = 2;
constexpr int kWarps = 8, kThreads = 32 * kWarps + 128;
constexpr int kMathRegisters = 232, kLoadRegisters = 40;
constexpr int kBand = 8; // clusters' tiles along m that are worked on beside each other

struct tall_args : linear_output {
    const float *w_scale, *x_scale;
    int32_t along_m, along_n; // clusters' tiles
    bool share_w;
    bool simple; // y is of 16 bits and 16-byte addresses, without bias, residual or limit
};

constexpr int kXBytes = kRows * kStep;
template <int NT> constexpr int kStageBytes = kXBytes + NT *kStep;
constexpr int kPitch = 40; // f32 between rows of 32 sums: no bank conflicts
constexpr int kTurnBytes = 16 * kPitch * 4, kFixed = 1024 + kWarps * kTurnBytes;
template <int NT> constexpr int kStages = (226 * 1024 - kFixed) / kStageBytes<NT>;
template <int NT> constexpr int shared_bytes = kFixed + kStages<NT> *kStageBytes<NT>;

#if !defined(__CUDA_ARCH__) || defined(__CUDA_ARCH_FEAT_SM90_ALL)

__device__ __forceinline__ void copy_to_both(uint32_t to, const void *map, int col, int row,
                                             uint32_t bar) {
    asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes"
                 ".multicast::cluster [%0], [%1, {%2, %3}], [%4], %5;" ::"r"(to),
                 "l"(map), "r"(col), "r"(row), "r"(bar), "h"((uint16_t)3)
                 : "memory");
}

// --- Walk ---------------------------------------------------------------------------------------

struct place {
    int m0, n0; // first row of x; first output
};

template <int NT> struct walk {
    const tall_args &a;
    int rank, unit;
    __device__ __forceinline__ walk(const tall_args &a)
        : a(a), rank((int)cluster_rank()), unit((int)blockIdx.x / kCtas) {}
    __device__ __forceinline__ bool next(place &p) {
        if (unit >= a.along_m * a.along_n) return false;
        const int band = unit / (kBand * a.along_n), in = unit - band * kBand * a.along_n;
        const int high = min(kBand, a.along_m - band * kBand);
        const int n = in / high, m = band * kBand + in - n * high;
        p.m0 = (a.share_w ? 2 * m + rank : m) * kRows;
        p.n0 = (a.share_w ? n : 2 * n + rank) * (a.gated ? NT / 2 : NT);
        unit += (int)gridDim.x / kCtas;
        return true;
    }
};

// --- Loading ------------------------------------------------------------------------------------

template <int NT> struct producer {
    const tall_args &a;
    const CUtensorMap *w_map, *x_map;
    uint32_t ring, full, empty;

    // W of a step; all bytes of the stage are announced here.
    __device__ __forceinline__ void weights(const place &p, int step, int stage) const {
        const uint32_t to = ring + stage * kStageBytes<NT> + kXBytes, bar = full + stage * 8;
        const int row1 = a.gated ? a.half + p.n0 : p.n0 + NT / 2, rank = (int)cluster_rank();
        barrier_arrive_expect(bar, kStageBytes<NT>);
        if (a.share_w) {
            copy_to_both(to + rank * (NT / 2 * kStep), w_map, step * kStep, rank ? row1 : p.n0,
                         bar);
        } else {
            copy_tile(to, w_map, step * kStep, p.n0, bar);
            copy_tile(to + NT / 2 * kStep, w_map, step * kStep, row1, bar);
        }
    }
    __device__ __forceinline__ void inputs(const place &p, int step, int stage) const {
        const uint32_t to = ring + stage * kStageBytes<NT>, bar = full + stage * 8;
        constexpr int half = kRows / 2;
        const int rank = (int)cluster_rank();
        if (a.share_w) {
            copy_tile(to, x_map, step * kStep, p.m0, bar);
            copy_tile(to + half * kStep, x_map, step * kStep, p.m0 + half, bar);
        } else {
            copy_to_both(to + rank * half * kStep, x_map, step * kStep, p.m0 + rank * half, bar);
        }
    }
    __device__ __forceinline__ void run() const {
        const int steps = (a.k + kStep - 1) / kStep;
        int stage = 0, turn = 1, early = 0;
        walk<NT> tiles(a);
        place p;
        for (bool first = true; tiles.next(p); first = false) {
            if (first) {
                for (; early < kStages<NT> && early < steps; early++) weights(p, early, early);
                wait_for_previous();
            }
            for (int step = 0; step < steps; step++) {
                barrier_wait(empty + stage * 8, turn); // in both CTAs
                if (early > 0)
                    early--;
                else
                    weights(p, step, stage);
                inputs(p, step, stage);
                if (++stage == kStages<NT>) stage = 0, turn ^= 1;
            }
        }
    }
};

// --- From sums to y -----------------------------------------------------------------------------

// Four sums of x row m, rows n .. n + 3 of W: scaled, with bias.
__device__ __forceinline__ void four_sums(float (&v)[4], const tall_args &a, uint32_t at, int m,
                                          int n) {
    const uint4 s = shared_u128(at);
    const float4 w = *reinterpret_cast<const float4 *>(a.w_scale + n);
    const float x = a.x_scale[m];
    v[0] = (float)(int)s.x * (x * w.x), v[1] = (float)(int)s.y * (x * w.y);
    v[2] = (float)(int)s.z * (x * w.z), v[3] = (float)(int)s.w * (x * w.w);
    if (!a.bias) return;
#pragma unroll
    for (int i = 0; i < 4; i++) v[i] += linear_element(a.bias, n + i, a.bf16, false);
}

template <int I> __device__ __forceinline__ void put_two(uint32_t at, int32_t a, int32_t b) {
    asm volatile("st.shared.v2.u32 [%0], {%1, %2}; // %3" ::"r"(at), "r"(a), "r"(b), "n"(I)
                 : "memory");
}

// Columns of `chunk`, which is I or more: 32 neighbours, or from NT / 32 on 16 of gate and of up.
// By branches: registers have no index, and statements that differ only there would become one.
template <int I, int NT>
__device__ __forceinline__ void put_chunk(const int32_t (&acc)[NT / 2], uint32_t at, int chunk) {
    if (chunk == I) {
#pragma unroll
        for (int j = 0; j < 4; j++) {
            const int b = I < NT / 32 ? 4 * I + j : (I - NT / 32) * 2 + j % 2 + j / 2 * (NT / 16);
            put_two<I>(at + 32 * j, acc[4 * b], acc[4 * b + 1]);
            put_two<I>(at + 32 * j + 8 * kPitch * 4, acc[4 * b + 2], acc[4 * b + 3]);
        }
    } else if constexpr (I + 1 < NT / 16) {
        put_chunk<I + 1, NT>(acc, at, chunk);
    }
}

__device__ __forceinline__ uint32_t two_words(float a, float b, bool bf16) {
    const __nv_bfloat162 x = __floats2bfloat162_rn(a, b);
    const __half2 y = __floats2half2_rn(a, b);
    return bf16 ? *reinterpret_cast<const uint32_t *>(&x) : *reinterpret_cast<const uint32_t *>(&y);
}
template <int I> __device__ __forceinline__ void put_word(uint32_t at, uint32_t w) {
    asm volatile("st.shared.u32 [%0], %1; // %2" ::"r"(at), "r"(w), "n"(I) : "memory");
}

// 64 outputs in 16 bits to [16][128 bytes], the 16 bytes of eight at their place exclusive or the
// row's number: chunk I of the sums, or from NT / 64 on chunk I - NT / 64 of gate and up.
template <int I, int NT>
__device__ __forceinline__ void put_outputs(const int32_t (&acc)[NT / 2], const tall_args &a,
                                            const place &p, const float (&x_scale)[2],
                                            uint32_t turn, int chunk) {
    const int lane = (int)threadIdx.x % 32, g = lane / 4, t = lane % 4;
    const bool gated = I >= NT / 64;
    constexpr int kFirst = (I >= NT / 64 ? I - NT / 64 : I) * 8;
    if (chunk == I) {
#pragma unroll
        for (int j = 0; j < 8; j++) {
            const uint32_t at = turn + g * 128 + ((j ^ g) << 4) + t * 4;
            const int b = kFirst + j, n = p.n0 + 8 * b + 2 * t;
            float2 w = {}, w_up = {};
            if (n < a.half) w = *reinterpret_cast<const float2 *>(a.w_scale + n);
            if (gated && n < a.half)
                w_up = *reinterpret_cast<const float2 *>(a.w_scale + a.half + n);
#pragma unroll
            for (int h = 0; h < 2; h++) {
                const int i = 4 * b + 2 * h, up = (i + NT / 4) % (NT / 2);
                float v0 = (float)acc[i] * (x_scale[h] * w.x);
                float v1 = (float)acc[i + 1] * (x_scale[h] * w.y);
                if (gated) {
                    v0 = linear_gate(v0, (float)acc[up] * (x_scale[h] * w_up.x), LINEAR_GATED, 0);
                    v1 = linear_gate(v1, (float)acc[up + 1] * (x_scale[h] * w_up.y), LINEAR_GATED,
                                     0);
                }
                put_word<I>(at + h * 1024, two_words(v0, v1, a.bf16));
            }
        }
    } else if constexpr (I + 1 < NT / 64 + NT / 128) {
        put_outputs<I + 1, NT>(acc, a, p, x_scale, turn, chunk);
    }
}

template <int NT>
__device__ __forceinline__ void finish_simple(int32_t (&acc)[NT / 2], const tall_args &a,
                                              const place &p, int row, uint32_t turn) {
    const int lane = (int)threadIdx.x % 32;
    float x_scale[2] = {};
#pragma unroll
    for (int h = 0; h < 2; h++)
        if (row + lane / 4 + 8 * h < a.m) x_scale[h] = a.x_scale[row + lane / 4 + 8 * h];
    const int first = a.gated ? NT / 64 : 0, chunks = a.gated ? NT / 128 : NT / 64;
    const int m = row + lane / 8, unit = lane % 8;
    uint16_t *y = static_cast<uint16_t *>(a.y) + m * a.ldy + p.n0 + unit * 8;
    int n = p.n0 + unit * 8;
#pragma unroll 1
    for (int c = 0; c < chunks; c++, n += 64, y += 64) {
        group_pin(acc); // what is made of them is made here, not before the loop
        __syncwarp();
        put_outputs<0, NT>(acc, a, p, x_scale, turn, first + c);
        __syncwarp();
        uint4 v[4];
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const int r = i * 4 + lane / 8;
            v[i] = shared_u128(turn + r * 128 + ((unit ^ (r & 7)) << 4));
        }
#pragma unroll
        for (int i = 0; i < 4; i++)
            if (m + 4 * i < a.m && n < a.half) *reinterpret_cast<uint4 *>(y + 4 * i * a.ldy) = v[i];
    }
}

// A warp's 16 rows of the tile from `row` on, 32 columns at a time through shared memory: 32
// outputs, or 16 of gate beside their 16 of up. Straight code for all of them would be read from L2
// once a tile, which takes longer than this.
template <int NT>
__device__ __forceinline__ void finish(int32_t (&acc)[NT / 2], const tall_args &a, const place &p,
                                       int row, uint32_t turn) {
    const int lane = (int)threadIdx.x % 32, g = lane / 4, t = lane % 4;
    const int shift = a.gated ? 2 : 3, across = 1 << shift; // lanes of a row
#pragma unroll 1
    for (int c = 0; c < NT / 32; c++) {
        group_pin(acc); // what is made of them is made here, not before the loop
        __syncwarp();
        put_chunk<0, NT>(acc, turn + (g * kPitch + 2 * t) * 4, c + (a.gated ? NT / 32 : 0));
        __syncwarp();
#pragma unroll
        for (int i = 0; i < 4; i++) {
            if (i >= across / 2) break;
            const int r = i * (32 >> shift) + (lane >> shift), col = (lane & (across - 1)) * 4;
            const int m = row + r, n = p.n0 + c * (a.gated ? 16 : 32) + col;
            if (m >= a.m || n >= a.half) continue;
            const uint32_t from = turn + (r * kPitch + col) * 4;
            const int64_t at = m * a.ldy + n;
            float v[4], u[4] = {};
            four_sums(v, a, from, m, n);
            if (a.gated) four_sums(u, a, from + 64, m, a.half + n);
            linear_put_four(a, at, v, u);
        }
    }
}

template <int NT>
__device__ __forceinline__ void compute(const tall_args &a, uint32_t ring, uint32_t full,
                                        uint32_t empty) {
    const int warp = __shfl_sync(~0u, (int)threadIdx.x / 32, 0), lane = (int)threadIdx.x % 32;
    const int steps = (a.k + kStep - 1) / kStep;
    const uint32_t turned = ring + kStages<NT> * kStageBytes<NT> + warp * kTurnBytes;
    int stage = 0, turn = 0;
    walk<NT> tiles(a);
    place p;
    while (tiles.next(p)) {
        int32_t acc[NT / 2] = {};
        for (int step = 0; step < steps; step++) {
            const uint32_t x = ring + stage * kStageBytes<NT> + warp / 4 * 64 * kStep;
            const uint32_t w = ring + stage * kStageBytes<NT> + kXBytes;
            barrier_wait(full + stage * 8, turn);
            group_pin(acc);
            group_fence();
#pragma unroll
            for (int q = 0; q < kStep / 32; q++)
                multiply_codes<true, NT>::run(acc, group_descriptor(x + q * 32),
                                              group_descriptor(w + q * 32), 1);
            group_commit();
            group_wait<0>();
            group_pin(acc);
            if (lane < kCtas) remote_arrive(remote_address(empty + stage * 8, lane));
            if (++stage == kStages<NT>) stage = 0, turn ^= 1;
        }
        const int row = p.m0 + warp * 16;
        if (a.simple)
            finish_simple<NT>(acc, a, p, row, turned);
        else
            finish<NT>(acc, a, p, row, turned);
    }
}
#endif

template <int NT>
__global__ void __launch_bounds__(kThreads, 1)
    linear_codes_tall(const __grid_constant__ tall_args a,
                      const __grid_constant__ CUtensorMap w_map,
                      const __grid_constant__ CUtensorMap x_map) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
    extern __shared__ uint8_t shared[];
    __shared__ uint64_t barriers[2 * kStages<NT>];
    const uint32_t ring = (shared_address(shared) + 1023) / 1024 * 1024;
    const uint32_t full = shared_address(barriers), empty = full + kStages<NT> * 8;
    const int warp = __shfl_sync(~0u, (int)threadIdx.x / 32, 0);
    launch_dependents();
    if (threadIdx.x == 0) {
        for (int i = 0; i < kStages<NT>; i++) {
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
        if (threadIdx.x == 32 * kWarps) {
            prefetch_map(&w_map);
            prefetch_map(&x_map);
            const producer<NT> load = {a, &w_map, &x_map, ring, full, empty};
            load.run();
        }
    } else {
        registers_up<kMathRegisters>();
        wait_for_previous(); // scales of x, and y
        compute<NT>(a, ring, full, empty);
    }
    __syncwarp();
    cluster_arrive(); // until then it may still arrive here
    cluster_wait();
#endif
}

// --- Launch -------------------------------------------------------------------------------------

template <int NT>
status launch(const tall_args &args, const void *w, const void *x, int32_t n_sms,
              cudaStream_t stream) {
    const auto kernel = linear_codes_tall<NT>;
    tall_args a = args;
    const int32_t wide = a.gated ? NT / 2 : NT;
    const int32_t m_tiles = (a.m + kRows - 1) / kRows, n_tiles = (a.half + wide - 1) / wide;
    a.share_w = (m_tiles + 1) / 2 * n_tiles <= m_tiles * ((n_tiles + 1) / 2);
    a.along_m = a.share_w ? (m_tiles + 1) / 2 : m_tiles;
    a.along_n = a.share_w ? n_tiles : (n_tiles + 1) / 2;
    a.simple = !a.y_f32 && !a.bias && (a.epilogue == LINEAR_STORE || a.epilogue == LINEAR_GATED) &&
               ((uintptr_t)a.y | (uintptr_t)(a.ldy * 2)) % 16 == 0;
    CUtensorMap w_map, x_map;
    TRY(tensor_map_codes(&w_map, w, a.n, a.k, a.k, NT / 2));
    TRY(tensor_map_codes(&x_map, x, a.m, a.k, a.k, kRows / 2));
    cudaError_t e =
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes<NT>);
    cudaLaunchAttribute attrs[2];
    attrs[0].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attrs[0].val.programmaticStreamSerializationAllowed = 1;
    attrs[1].id = cudaLaunchAttributeClusterDimension;
    attrs[1].val.clusterDim = {kCtas, 1, 1};
    cudaLaunchConfig_t config = {};
    const int32_t units = a.along_m * a.along_n, clusters = n_sms / kCtas;
    config.gridDim = dim3((unsigned)((units < clusters ? units : clusters) * kCtas));
    config.blockDim = dim3(kThreads);
    config.dynamicSmemBytes = shared_bytes<NT>;
    config.stream = stream;
    config.attrs = attrs;
    config.numAttrs = 2;
    if (e == cudaSuccess) e = cudaLaunchKernelEx(&config, kernel, a, w_map, x_map);
    return e == cudaSuccess ? ST_OK
                            : FAIL(ST_DEVICE, "linear_codes_tall: %s", cudaGetErrorString(e));
}

} // namespace

// Tiles of 256 rows of W, or of 128, which take 0.6 of their time, where those end sooner.
extern "C" status linear_codes_tall_launch(const linear_problem *p, int32_t row, int32_t m,
                                           const void *code, const float *x_scale,
                                           kernel_stream stream) {
    const linear_weight *w = p->w;
    tall_args a = {linear_output_of(p, row, m)};
    a.w_scale = static_cast<const float *>(w->scale);
    a.x_scale = x_scale;
    const int64_t tiles = (m + kRows - 1) / kRows * (int64_t)((w->n + 255) / 256);
    const int64_t waves = div_up(tiles, p->n_sms), halves = div_up(2 * tiles, p->n_sms);
    return 5 * waves <= 3 * halves ? launch<256>(a, w->code, code, p->n_sms, (cudaStream_t)stream)
                                   : launch<128>(a, w->code, code, p->n_sms, (cudaStream_t)stream);
}
