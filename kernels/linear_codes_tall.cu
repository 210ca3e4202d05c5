// linear_codes_tall.cu - operands multiplied as they lie, for many rows on Hopper: y = x W^T by
// wgmma, both fed to the tensor cores through shared memory by the copy engine. x and W as codes in
// plain order, int8 or e4m3; or of 16 bits, W as tiles that have the swizzle (linear_layout.h).
//
//   tile     128 rows of x, 64 a warpgroup, by NT rows of W: neighbours, or NT / 2 of gate and the
//            same of up
//   step     128 bytes of each row
//   cluster  two CTAs have two tiles of the same rows of W, or of x; each brings half of those to
//            both
//   team     16 bits: clusters that have a part of the inputs of a tile each, where tiles are fewer
//            than clusters, or of the last wave. All leave sums in the workspace, and each finishes
//            every size-th piece of 32 columns: its own sums and, in their order, the others'.
//            Who that is depends on the shape and the number of SMs alone, so bits are the same in
//            every run
//
// Sums of int8 are exact int32 in the tensor core's hands; of e4m3 the sums of a step are, and are
// added up in f32, in the same order in tiles of all sizes. Scales, bias, gate and residual meet
// them in registers, where cuBLASLt's product would leave int32, or what is not y yet, to another
// kernel. W does not depend on the kernel before, so its first stages are asked for before that has
// ended.
#include "linear_common.cuh"
#include "linear_launch.h"
#include "linear_pairs.cuh"
#include "tensor_map.cuh"
#include "traits.cuh"

#include <cuda_fp8.h>
#include <type_traits>

#if !defined(__CUDA_ARCH__) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
#include "ptx_sm90_codes.cuh"
#endif

namespace {

constexpr int kRows = 128, kStep = 128, kCtas = 2;
constexpr int kWarps = 8, kThreads = 32 * kWarps + 128;
// Of a thread that multiplies, and of one that loads: a third of 504 each at the launch.
template <typename T> constexpr int kLoadRegisters = sizeof(T) == 2 ? 56 : 40;
template <typename T> constexpr int kMathRegisters = (504 - kLoadRegisters<T>) / 2;
constexpr int kBand = 8; // clusters' tiles along m that are worked on beside each other

struct tall_args : linear_output { // k: bytes of a row of operands
    const float *w_scale, *x_scale;
    const uint8_t *tiled;        // W of 16 bits (linear_layout.h)
    int32_t blocks, half_blocks; // of all of it, and of gate or up
    int32_t second, gap;         // its rows from there on are outputs of so many less
    int32_t along_m, along_n;    // clusters' tiles
    int32_t whole, team;         // tiles of one cluster; of how many clusters the others are
    float4 *partial;             // of each CTA the sums of a tile
    int32_t *counters;           // two of each CTA's warps: sums that are there; who has read them
    bool share_w;
    bool simple; // y is of 16 bits and 16-byte addresses, without bias, residual or limit
};

template <typename T> constexpr bool kWords = sizeof(T) == 2;
template <typename T> constexpr bool kInt8 = std::is_same<T, int8_t>::value;
template <typename T> constexpr bool kE4m3 = std::is_same<T, __nv_fp8_e4m3>::value;
template <typename T> using sum_type = typename std::conditional<kInt8<T>, int32_t, float>::type;

constexpr int kXBytes = kRows * kStep;
template <int NT> constexpr int kStageBytes = kXBytes + NT *kStep;
constexpr int kPitch = 40; // f32 between rows of 32 sums: no bank conflicts
constexpr int kTurnBytes = 16 * kPitch * 4, kFixed = 1024 + kWarps * kTurnBytes;
// Of a warp: scales of the tile's rows of W and of its own 16 of x; words have none.
template <typename T, int NT>
constexpr int kScaleBytes = kWords<T> ? 0 : (NT + 16) * (int)sizeof(float);
template <typename T, int NT>
constexpr int kStages = (226 * 1024 - kFixed - kWarps * kScaleBytes<T, NT>) / kStageBytes<NT>;
template <typename T, int NT>
constexpr int shared_bytes = kFixed + kStages<T, NT> *kStageBytes<NT> + kWarps *kScaleBytes<T, NT>;
// Pieces that others leave for a warp, at most; its own are two then, or up to four beside fewer of
// others.
constexpr int kOthersMost = 8, kRoom = 2 * kTurnBytes + kOthersMost * 2048;

#if !defined(__CUDA_ARCH__) || defined(__CUDA_ARCH_FEAT_SM90_ALL)

// --- Walk ---------------------------------------------------------------------------------------

struct place {
    int m0, n0;       // first row of x; first output, of 16 bits as packed
    int step0, step1; // of the tile
    int owner, rank;  // first cluster of the team, and which of it this is
    int size;         // of the team; 1: the tile is not shared, and owner and rank are not set
};

template <typename T, int NT> struct walk {
    const tall_args &a;
    int unit;
    __device__ __forceinline__ walk(const tall_args &a) : a(a), unit((int)blockIdx.x / kCtas) {}
    __device__ __forceinline__ bool next(place &p) {
        int tile = unit;
        p.step0 = 0, p.step1 = (a.k + kStep - 1) / kStep;
        p.size = 1;
        if (kWords<T> && unit >= a.whole) {
            const int part = unit - a.whole, in = part / a.team, cluster = (int)blockIdx.x / kCtas;
            tile = a.whole + in;
            p.rank = part - in * a.team;
            p.size = a.team;
            p.owner = cluster - p.rank;
            const int steps = p.step1;
            p.step0 = steps * p.rank / a.team;
            p.step1 = steps * (p.rank + 1) / a.team;
        }
        if (tile >= a.along_m * a.along_n) return false;
        unit += (int)gridDim.x / kCtas;
        const int rank = (int)cluster_rank();
        const int band = tile / (kBand * a.along_n), in = tile - band * kBand * a.along_n;
        const int high = min(kBand, a.along_m - band * kBand);
        const int n = in / high, m = band * kBand + in - n * high;
        p.m0 = (a.share_w ? 2 * m + rank : m) * kRows;
        p.n0 = (a.share_w ? n : 2 * n + rank) * (a.gated ? NT / 2 : NT);
        return true;
    }
};

// --- Loading ------------------------------------------------------------------------------------

template <typename T, int NT> struct producer {
    const tall_args &a;
    const CUtensorMap *w_map, *x_map;
    uint32_t ring, full, empty;

    __device__ __forceinline__ void begin(const place &) const {}
    // W of a step; all bytes of the stage are announced here.
    __device__ __forceinline__ void weights(const place &p, int step, int stage) const {
        const uint32_t to = ring + stage * kStageBytes<NT> + kXBytes, bar = full + stage * 8;
        const int rank = (int)cluster_rank();
        if constexpr (kWords<T>) {
            constexpr int kBlocks = NT / LINEAR_BLOCK, kUnit = LINEAR_BLOCK * kStep;
            const int units = (a.k + kStep - 1) / kStep, first = p.n0 / LINEAR_BLOCK;
            const int high = a.gated ? kBlocks / 2 : kBlocks; // up's follow
            const int there = max(0, min(high, (a.gated ? a.half_blocks : a.blocks) - first));
            const int from = rank * (kUnit / 2);
            const uint64_t policy = a.m <= 2 * kRows ? policy_evict_first() : policy_evict_normal();
            barrier_arrive_expect(bar, kXBytes + (a.gated ? 2 : 1) * there * kUnit);
#pragma unroll
            for (int i = 0; i < kBlocks; i++) {
                const int in = i < high ? i : i - high, half = i < high ? 0 : a.half_blocks;
                const uint8_t *unit =
                    a.tiled + ((int64_t)(half + first + in) * units + step) * kUnit;
                if (in >= there) continue;
                if (a.share_w)
                    copy_bulk_to_both(to + i * kUnit + from, unit + from, kUnit / 2, bar);
                else
                    copy_bulk(to + i * kUnit, unit, kUnit, bar, policy);
            }
        } else {
            const int row1 = a.gated ? a.half + p.n0 : p.n0 + NT / 2;
            barrier_arrive_expect(bar, kStageBytes<NT>);
            if (a.share_w) {
                copy_tile_to_both(to + rank * (NT / 2 * kStep), w_map, step * kStep,
                                  rank ? row1 : p.n0, bar);
            } else {
                copy_tile(to, w_map, step * kStep, p.n0, bar);
                copy_tile(to + NT / 2 * kStep, w_map, step * kStep, row1, bar);
            }
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
            copy_tile_to_both(to + rank * half * kStep, x_map, step * kStep, p.m0 + rank * half,
                              bar);
        }
    }
    __device__ __forceinline__ void run() const {
        fill_ring_of_both<kStages<T, NT>, place>(walk<T, NT>(a), *this, empty);
    }
};

// --- From sums to y -----------------------------------------------------------------------------

// The sum that has these bits.
template <typename T> __device__ __forceinline__ float sum_value(uint32_t bits) {
    return kInt8<T> ? (float)(int)bits : __uint_as_float(bits);
}

// Asks for the scales of a tile, a warp's: [NT] of rows of W, of gate and then of up, and [16] of
// rows of x from `row` on; zeros where there are none.
template <int NT>
__device__ __forceinline__ void ask_for_scales(const tall_args &a, const place &p, int row,
                                               uint32_t to) {
    const int lane = (int)threadIdx.x % 32, across = a.gated ? NT / 2 : NT;
    __syncwarp(); // those of the tile before have been read
#pragma unroll
    for (int i = lane * 4; i < NT; i += 128) {
        const bool up = i >= across;
        const int n = p.n0 + i - (up ? across : 0);
        const float *from = a.w_scale + (up ? a.half : 0) + n;
        copy_some(to + i * 4, n < a.half ? from : a.w_scale, n < a.half ? 16 : 0);
    }
    const int rows = min(max(a.m - row - 4 * lane, 0), 4);
    if (lane < 4)
        copy_some(to + (NT + lane * 4) * 4, a.x_scale + (rows ? row + 4 * lane : 0), rows * 4);
}

// Four sums of one row of x: scaled by those in shared memory, with the bias of rows n .. n + 3 of
// W.
template <typename T>
__device__ __forceinline__ void four_sums(float (&v)[4], const tall_args &a, uint32_t at,
                                          uint32_t w_at, uint32_t x_at, int n) {
    const uint4 s = shared_u128(at);
    if constexpr (kWords<T>) {
        v[0] = sum_value<T>(s.x), v[1] = sum_value<T>(s.y);
        v[2] = sum_value<T>(s.z), v[3] = sum_value<T>(s.w);
    } else {
        const uint4 w = shared_u128(w_at);
        const float x = __uint_as_float(shared_u32(x_at));
        v[0] = sum_value<T>(s.x) * (x * __uint_as_float(w.x));
        v[1] = sum_value<T>(s.y) * (x * __uint_as_float(w.y));
        v[2] = sum_value<T>(s.z) * (x * __uint_as_float(w.z));
        v[3] = sum_value<T>(s.w) * (x * __uint_as_float(w.w));
    }
    if (!a.bias) return;
#pragma unroll
    for (int i = 0; i < 4; i++) v[i] += linear_element(a.bias, n + i, a.bf16, false);
}

template <int I> __device__ __forceinline__ void put_two(uint32_t at, int32_t a, int32_t b) {
    asm volatile("st.shared.v2.u32 [%0], {%1, %2}; // %3" ::"r"(at), "r"(a), "r"(b), "n"(I)
                 : "memory");
}
template <int I> __device__ __forceinline__ void put_two(uint32_t at, float a, float b) {
    put_two<I>(at, __float_as_int(a), __float_as_int(b));
}

// Columns of `chunk`, which is I or more: 32 neighbours, or from NT / 32 on 16 of gate and of up.
// By branches: registers have no index, and statements that differ only there would become one.
template <int I, int NT, typename S>
__device__ __forceinline__ void put_chunk(const S (&acc)[NT / 2], uint32_t at, int chunk) {
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

__device__ __forceinline__ void shared_two(float (&v)[2], uint32_t at) {
    const uint2 s = shared_u64(at);
    v[0] = __uint_as_float(s.x), v[1] = __uint_as_float(s.y);
}

// 64 outputs in 16 bits to [16][128 bytes], the 16 bytes of eight at their place exclusive or the
// row's number: chunk I of the sums, or from NT / 64 on chunk I - NT / 64 of gate and up.
template <typename T, int I, int NT>
__device__ __forceinline__ void put_outputs(const sum_type<T> (&acc)[NT / 2], const tall_args &a,
                                            const float (&x_scale)[2], uint32_t scales,
                                            uint32_t turn, int chunk) {
    const int lane = (int)threadIdx.x % 32, g = lane / 4, t = lane % 4;
    const bool gated = I >= NT / 64;
    constexpr int kFirst = (I >= NT / 64 ? I - NT / 64 : I) * 8;
    if (chunk == I) {
#pragma unroll
        for (int j = 0; j < 8; j++) {
            if (gated && kFirst + j >= NT / 16) break;
            const uint32_t at = turn + g * 128 + ((j ^ g) << 4) + t * 4;
            const int b = kFirst + j;
            float w[2] = {1.f, 1.f}, w_up[2] = {1.f, 1.f};
            if (!kWords<T>) shared_two(w, scales + (8 * b + 2 * t) * 4);
            if (!kWords<T> && gated) shared_two(w_up, scales + (NT / 2 + 8 * b + 2 * t) * 4);
#pragma unroll
            for (int h = 0; h < 2; h++) {
                const float x = kWords<T> ? 1.f : x_scale[h];
                const int i = 4 * b + 2 * h, up = (i + NT / 4) % (NT / 2);
                float v0 = (float)acc[i] * (x * w[0]);
                float v1 = (float)acc[i + 1] * (x * w[1]);
                if (gated) {
                    v0 = linear_gate(v0, (float)acc[up] * (x * w_up[0]), LINEAR_GATED, 0);
                    v1 = linear_gate(v1, (float)acc[up + 1] * (x * w_up[1]), LINEAR_GATED, 0);
                }
                put_word<I>(at + h * 1024, two_words(v0, v1, a.bf16));
            }
        }
    } else if constexpr (I + 1 < NT / 64 + (NT + 127) / 128) {
        put_outputs<T, I + 1, NT>(acc, a, x_scale, scales, turn, chunk);
    }
}

template <typename T, int NT>
__device__ __forceinline__ void finish_simple(sum_type<T> (&acc)[NT / 2], const tall_args &a,
                                              const place &p, int row, uint32_t turn,
                                              uint32_t scales) {
    const int lane = (int)threadIdx.x % 32;
    float x_scale[2] = {};
#pragma unroll
    for (int h = 0; h < 2; h++)
        if (!kWords<T>)
            x_scale[h] = __uint_as_float(shared_u32(scales + (NT + lane / 4 + 8 * h) * 4));
    const int first = a.gated ? NT / 64 : 0, chunks = a.gated ? (NT + 127) / 128 : NT / 64;
    const int end = min(a.half, p.n0 + (a.gated ? NT / 2 : NT));
    const int m = row + lane / 8, unit = lane % 8;
    uint16_t *y = static_cast<uint16_t *>(a.y) + m * a.ldy + p.n0 + unit * 8;
    int n = p.n0 + unit * 8;
#pragma unroll 1
    for (int c = 0; c < chunks; c++, n += 64, y += 64) {
        group_pin(acc); // what is made of them is made here, not before the loop
        __syncwarp();
        put_outputs<T, 0, NT>(acc, a, x_scale, scales, turn, first + c);
        __syncwarp();
        uint4 v[4];
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const int r = i * 4 + lane / 8;
            v[i] = shared_u128(turn + r * 128 + ((unit ^ (r & 7)) << 4));
        }
#pragma unroll
        for (int i = 0; i < 4; i++)
            if (m + 4 * i < a.m && n < end) *reinterpret_cast<uint4 *>(y + 4 * i * a.ldy) = v[i];
    }
}

// A warp's 32 columns of 16 rows of x, in shared memory; of those rows number i of fours, to 32
// outputs each, or of eights, to 16 outputs: 16 sums of gate beside the 16 of up.
template <typename T, int NT>
__device__ __forceinline__ void put_rows(const tall_args &a, const place &p, int row, uint32_t turn,
                                         uint32_t scales, int c, int i) {
    const int lane = (int)threadIdx.x % 32;
    const int shift = a.gated ? 2 : 3, across = 1 << shift; // lanes of a row
    int first = p.n0 + c * (a.gated ? 16 : 32), end = a.half;
    if (kWords<T> && !a.gated && first >= a.second) first -= a.gap, end = a.n;
    const int r = i * (32 >> shift) + (lane >> shift), col = (lane & (across - 1)) * 4;
    const int m = row + r, n = first + col;
    if (m >= a.m || n >= end) return;
    const uint32_t from = turn + (r * kPitch + col) * 4;
    const int64_t at = m * a.ldy + n;
    float v[4], u[4] = {};
    const uint32_t w_at = scales + (n - p.n0) * 4, x_at = scales + (NT + r) * 4;
    four_sums<T>(v, a, from, w_at, x_at, n);
    if (a.gated) four_sums<T>(u, a, from + 64, w_at + NT * 2, x_at, a.half + n);
    linear_put_four(a, at, v, u);
}

// A warp's 16 rows of the tile from `row` on, 32 columns at a time through shared memory. Straight
// code for all of them would be read from L2 once a tile, which takes longer than this.
template <typename T, int NT>
__device__ __forceinline__ void finish(sum_type<T> (&acc)[NT / 2], const tall_args &a,
                                       const place &p, int row, uint32_t turn, uint32_t scales) {
    const int lane = (int)threadIdx.x % 32, g = lane / 4, t = lane % 4;
#pragma unroll 1
    for (int c = 0; c < NT / 32; c++) {
        group_pin(acc); // what is made of them is made here, not before the loop
        __syncwarp();
        put_chunk<0, NT>(acc, turn + (g * kPitch + 2 * t) * 4, c + (a.gated ? NT / 32 : 0));
        __syncwarp();
#pragma unroll
        for (int i = 0; i < 4; i++) {
            if (i >= (a.gated ? 2 : 4)) break;
            put_rows<T, NT>(a, p, row, turn, scales, c, i);
        }
    }
}

// --- Tiles that clusters share -------------------------------------------------------------------

// A warp's 16 rows of 32 columns as CTA `cta` left them, this lane's: [4][lane][4], four rows each.
template <int NT>
__device__ __forceinline__ float4 *piece_of(const tall_args &a, int cta, int piece) {
    return a.partial + ((cta * kWarps + (int)threadIdx.x / 32) * (NT / 32) + piece) * 128 +
           (int)threadIdx.x % 32;
}
__device__ __forceinline__ void shared_put(uint32_t at, float4 v) {
    asm volatile("st.shared.v4.f32 [%0], {%1, %2, %3, %4};" ::"r"(at), "f"(v.x), "f"(v.y), "f"(v.z),
                 "f"(v.w)
                 : "memory");
}
__device__ __forceinline__ float4 shared_get(uint32_t at) {
    const uint4 v = shared_u128(at);
    return make_float4(__uint_as_float(v.x), __uint_as_float(v.y), __uint_as_float(v.z),
                       __uint_as_float(v.w));
}

// Leaves what others finish, and finishes every size-th piece. The ring is free: what is this
// cluster's own waits there, and what the others left comes there. Loops, for straight code is read
// from L2 once, which takes longer than what it does.
template <int NT>
__device__ __forceinline__ void finish_team(float (&acc)[NT / 2], const tall_args &a,
                                            const place &p, int row, uint32_t ring, uint32_t turn) {
    static_assert(kWarps * kRoom <= kStages<__half, NT> * kStageBytes<NT>, "no room for sums");
    const int warp = (int)threadIdx.x / 32, lane = (int)threadIdx.x % 32, g = lane / 4,
              t = lane % 4;
    const uint32_t own = ring + warp * kRoom,
                   others = own + (NT / 32 - p.rank + p.size - 1) / p.size * kTurnBytes + lane * 16;
    const uint32_t four_rows = (lane / 8 * kPitch + lane % 8 * 4) * 4; // where this lane's are
    const int rank = (int)cluster_rank();
    int32_t *counter = a.counters + ((kCtas * p.owner + rank) * kWarps + warp) * 2;
    asm volatile("bar.sync 1, %0;" ::"n"(32 * kWarps) : "memory"); // all stages have been read
    if (row >= a.m) return;
    int mine = p.rank;
    uint32_t to = own;
#pragma unroll 1
    for (int c = 0; c < NT / 32; c++) {
        const bool keep = c == mine;
        group_pin(acc);
        __syncwarp();
        put_chunk<0, NT>(acc, (keep ? to : turn) + (g * kPitch + 2 * t) * 4,
                         c + (a.gated ? NT / 32 : 0));
        __syncwarp();
        if (keep) {
            mine += p.size, to += kTurnBytes;
            continue;
        }
        float4 *slot = piece_of<NT>(a, (int)blockIdx.x, c);
#pragma unroll
        for (int q = 0; q < 4; q++)
            __stcg(slot + q * 32, shared_get(turn + four_rows + q * 4 * kPitch * 4));
    }
    __syncwarp();
    if (lane == 0)
        asm volatile("red.release.gpu.global.add.s32 [%0], 1;" ::"l"(counter) : "memory");
    linear_await(counter, p.size);
    // For the next launch, which comes here after this one has ended.
    if (lane == 0 && atomicAdd(counter + 1, 1) == p.size - 1) counter[0] = counter[1] = 0;
    uint32_t at = others;
#pragma unroll 1
    for (int c = p.rank; c < NT / 32; c += p.size)
#pragma unroll 1
        for (int i = 0; i < p.size - 1; i++, at += 2048) {
            const float4 *from = piece_of<NT>(a, kCtas * (p.owner + i + (i >= p.rank)) + rank, c);
#pragma unroll
            for (int q = 0; q < 4; q++) copy_some(at + q * 512, from + q * 32, 16);
        }
    asm volatile("cp.async.wait_all;" ::: "memory");
    __syncwarp();
    at = others, to = own;
#pragma unroll 1
    for (int c = p.rank; c < NT / 32; c += p.size, to += kTurnBytes) {
        float4 sum[4];
#pragma unroll
        for (int q = 0; q < 4; q++) sum[q] = shared_get(to + four_rows + q * 4 * kPitch * 4);
#pragma unroll 1
        for (int i = 0; i < p.size - 1; i++, at += 2048)
#pragma unroll
            for (int q = 0; q < 4; q++) {
                const float4 v = shared_get(at + q * 512);
                sum[q].x += v.x, sum[q].y += v.y, sum[q].z += v.z, sum[q].w += v.w;
            }
#pragma unroll
        for (int q = 0; q < 4; q++) shared_put(to + four_rows + q * 4 * kPitch * 4, sum[q]);
        __syncwarp();
#pragma unroll 1
        for (int i = 0; i < (a.gated ? 2 : 4); i++) put_rows<__half, NT>(a, p, row, to, 0, c, i);
    }
}

// --- Products -----------------------------------------------------------------------------------

// Steps of a tile, or of this cluster's part of it.
template <typename T, int NT> struct multiplier {
    uint32_t ring, full, empty;
    int stage = 0, turn = 0;

    __device__ __forceinline__ void release(uint32_t bar) const {
        const int lane = (int)threadIdx.x % 32;
        if (lane < kCtas) remote_arrive(remote_address(bar, lane));
    }
    __device__ __forceinline__ void next() {
        if (++stage == kStages<T, NT>) stage = 0, turn ^= 1;
    }
    // The products of a stage, or with WIDE rows of W from `first` on, as one group.
    template <int WIDE>
    __device__ __forceinline__ void multiply(sum_type<T> (&acc)[WIDE / 2], int first = 0) const {
        const int warp = __shfl_sync(~0u, (int)threadIdx.x / 32, 0);
        const uint32_t x = ring + stage * kStageBytes<NT> + warp / 4 * 64 * kStep;
        const uint32_t w = ring + stage * kStageBytes<NT> + kXBytes + first * kStep;
        if (first == 0) barrier_wait(full + stage * 8, turn);
        if (!kWords<T>) group_pin(acc);
        group_fence();
#pragma unroll
        for (int q = 0; q < kStep / 32; q++) {
            const uint64_t x_at = group_descriptor(x + q * 32), w_at = group_descriptor(w + q * 32);
            if constexpr (kWords<T>)
                multiply_words<T, WIDE>::run(acc, x_at, w_at);
            else
                multiply_codes<kInt8<T>, WIDE>::run(acc, x_at, w_at, kInt8<T> || q > 0);
        }
        group_commit();
    }
    __device__ __forceinline__ void codes(sum_type<T> (&acc)[NT / 2], const place &p) {
        for (int step = p.step0; step < p.step1; step++, next()) {
            multiply<NT>(acc);
            group_wait<0>();
            group_pin(acc);
            release(empty + stage * 8);
        }
    }
    // The tensor cores cut sums of e4m3 off 13 bits behind the first, so theirs are of one step and
    // are added up here. Halves of a tile of 256 rows of W take turns: registers have no room for
    // as many sums again.
    __device__ __forceinline__ void promoted(float (&acc)[NT / 2], const place &p) {
        constexpr int kWide = NT == 256 ? NT / 2 : NT;
        float sums[kWide / 2] = {};
        for (int step = p.step0; step < p.step1; step++, next()) {
#pragma unroll
            for (int first = 0; first < NT; first += kWide) {
                multiply<kWide>(sums, first);
                group_wait<0>();
                group_pin(sums);
                if (first + kWide == NT) release(empty + stage * 8);
#pragma unroll
                for (int i = 0; i < kWide / 2; i++) acc[first / 2 + i] += sums[i];
            }
        }
    }
    // A stage is released when the next one's products have been asked for.
    __device__ __forceinline__ void words(sum_type<T> (&acc)[NT / 2], const place &p) {
        uint32_t before = 0;
#pragma unroll 1
        for (int step = p.step0; step < p.step1; step++, next()) {
            multiply<NT>(acc);
            group_wait<1>();
            if (step > p.step0) release(before);
            before = empty + stage * 8;
        }
        group_wait<0>();
        group_pin(acc);
        release(before);
    }
};

template <typename T, int NT>
__device__ __forceinline__ void compute(const tall_args &a, uint32_t ring, uint32_t full,
                                        uint32_t empty) {
    const int warp = __shfl_sync(~0u, (int)threadIdx.x / 32, 0);
    const uint32_t turned = ring + kStages<T, NT> * kStageBytes<NT> + warp * kTurnBytes;
    const uint32_t scales =
        ring + kStages<T, NT> * kStageBytes<NT> + kWarps * kTurnBytes + warp * kScaleBytes<T, NT>;
    multiplier<T, NT> steps = {ring, full, empty};
    walk<T, NT> tiles(a);
    place p;
    while (tiles.next(p)) {
        sum_type<T> acc[NT / 2] = {};
        const int row = p.m0 + warp * 16;
        if constexpr (kWords<T>) {
            steps.words(acc, p);
        } else {
            ask_for_scales<NT>(a, p, row, scales);
            if constexpr (kE4m3<T>)
                steps.promoted(acc, p);
            else
                steps.codes(acc, p);
            asm volatile("cp.async.wait_all;" ::: "memory");
            __syncwarp();
        }
        if constexpr (kWords<T>) {
            if (p.size > 1) {
                finish_team<NT>(acc, a, p, row, ring, turned);
                continue;
            }
        }
        if (a.simple)
            finish_simple<T, NT>(acc, a, p, row, turned, scales);
        else
            finish<T, NT>(acc, a, p, row, turned, scales);
    }
}
#endif

template <typename T, int NT>
__global__ void __launch_bounds__(kThreads, 1)
    linear_codes_tall(const __grid_constant__ tall_args a,
                      const __grid_constant__ CUtensorMap w_map,
                      const __grid_constant__ CUtensorMap x_map) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
    extern __shared__ uint8_t shared[];
    __shared__ uint64_t barriers[2 * kStages<T, NT>];
    const uint32_t ring = (shared_address(shared) + 1023) / 1024 * 1024;
    const uint32_t full = shared_address(barriers), empty = full + kStages<T, NT> * 8;
    const int warp = __shfl_sync(~0u, (int)threadIdx.x / 32, 0);
    begin_ring_of_both<kStages<T, NT>>(full, empty, kCtas * kWarps);
    if (warp >= kWarps) {
        registers_down<kLoadRegisters<T>>();
        if (threadIdx.x == 32 * kWarps) {
            prefetch_map(&w_map);
            prefetch_map(&x_map);
            const producer<T, NT> load = {a, &w_map, &x_map, ring, full, empty};
            load.run();
        }
    } else {
        registers_up<kMathRegisters<T>>();
        wait_for_previous(); // scales of x, and y
        compute<T, NT>(a, ring, full, empty);
    }
    __syncwarp();
    cluster_arrive(); // until then it may still arrive here
    cluster_wait();
#endif
}

// --- Launch -------------------------------------------------------------------------------------

// Sets how the problem lies in tiles of NT rows of W, and how many of them there are for clusters.
template <int NT> int32_t lay_out(tall_args *a) {
    const int32_t wide = a->gated ? NT / 2 : NT;
    const int32_t rows = a->tiled && !a->gated ? a->blocks * LINEAR_BLOCK : a->half;
    const int32_t m_tiles = (a->m + kRows - 1) / kRows, n_tiles = (rows + wide - 1) / wide;
    a->share_w = (m_tiles + 1) / 2 * n_tiles <= m_tiles * ((n_tiles + 1) / 2);
    a->along_m = a->share_w ? (m_tiles + 1) / 2 : m_tiles;
    a->along_n = a->share_w ? n_tiles : (n_tiles + 1) / 2;
    a->team = 1;
    a->whole = a->along_m * a->along_n;
    return a->along_m * a->along_n;
}

// The kernel's launch; clusters: of the grid.
template <typename T, int NT> struct grid : launch_config {
    grid(int32_t clusters, cudaStream_t stream)
        : launch_config(dim3((unsigned)(clusters * kCtas)), dim3(kThreads), shared_bytes<T, NT>,
                        stream, true, kCtas) {}
};

template <typename T, int NT>
status launch(const tall_args &a, const void *w, const void *x, int64_t ldx, int32_t clusters,
              cudaStream_t stream) {
    const auto kernel = linear_codes_tall<T, NT>;
    CUtensorMap w_map = {}, x_map;
    if (!kWords<T>) TRY(tensor_map_codes(&w_map, w, a.n, a.k, a.k, NT / 2));
    TRY(tensor_map_codes(&x_map, x, a.m, a.k, ldx, kRows / 2));
    cudaError_t e = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                         shared_bytes<T, NT>);
    const grid<T, NT> g(clusters, stream);
    if (e == cudaSuccess) e = cudaLaunchKernelEx(&g.config, kernel, a, w_map, x_map);
    return e == cudaSuccess ? ST_OK
                            : FAIL(ST_DEVICE, "linear_codes_tall: %s", cudaGetErrorString(e));
}

// --- Codes --------------------------------------------------------------------------------------

// Hundredths of the time that a tile of 256 rows of W takes. As timed on an H200.
template <int NT> constexpr int kTileCost = NT == 256 ? 100 : NT == 192 ? 73 : 55;

template <int NT> int64_t waves_cost(tall_args a, int32_t clusters) {
    return div_up(lay_out<NT>(&a), clusters) * kTileCost<NT>;
}

template <typename T, int NT>
status launch_tiles(tall_args a, const void *w, const void *x, int32_t clusters,
                    cudaStream_t stream) {
    const int32_t tiles = lay_out<NT>(&a);
    return launch<T, NT>(a, w, x, a.k, tiles < clusters ? tiles : clusters, stream);
}

// Tiles of 256, 192 or 128 rows of W, whose waves end soonest.
template <typename T>
status launch_codes(const tall_args &a, const void *w, const void *x, int32_t n_sms,
                    cudaStream_t stream) {
    const int32_t clusters = n_sms / kCtas;
    const int64_t with_256 = waves_cost<256>(a, clusters);
    const int64_t with_192 = waves_cost<192>(a, clusters);
    const int64_t with_128 = waves_cost<128>(a, clusters);
    if (with_256 <= with_192 && with_256 <= with_128)
        return launch_tiles<T, 256>(a, w, x, clusters, stream);
    return with_192 <= with_128 ? launch_tiles<T, 192>(a, w, x, clusters, stream)
                                : launch_tiles<T, 128>(a, w, x, clusters, stream);
}

bool simple_output(const tall_args &a) {
    return !a.y_f32 && !a.bias && (a.epilogue == LINEAR_STORE || a.epilogue == LINEAR_GATED) &&
           ((uintptr_t)a.y | (uintptr_t)(a.ldy * 2)) % 16 == 0;
}

// --- 16 bits ------------------------------------------------------------------------------------

// ns of a step; of a tile's end; of sums left and taken, and of how many of their bytes an SM
// moves in one. As timed on an H200.
template <int NT> constexpr int kStepTime = NT == 256 ? 560 : NT == 192 ? 430 : 330;
constexpr int kTileTime = 1500, kExchangeTime = 1000, kBytesTime = 20;

// Shares the steps out over the clusters that run at once. About how many ns it takes.
template <int NT> int64_t share(tall_args *a, int32_t clusters) {
    const int32_t tiles = lay_out<NT>(a), steps = (a->k + kStep - 1) / kStep;
    const int32_t rest = tiles % clusters;
    const int64_t tile = steps * kStepTime<NT> + kTileTime;
    int64_t last = rest ? tile : 0; // of the last wave
    a->whole = tiles;
    for (int32_t s = 2; s <= NT / 32 && s * rest <= clusters && s * 2 <= steps && rest; s++) {
        if ((NT / 32 + s - 1) / s * (s - 1) > kOthersMost) continue;
        const int64_t with = div_up(steps, s) * kStepTime<NT> + kTileTime + kExchangeTime +
                             2 * kRows * NT * 4 * (s - 1) / s / kBytesTime;
        if (with < last) last = with, a->team = s, a->whole = tiles - rest;
    }
    return tiles / clusters * tile + last;
}

template <typename T, int NT> int clusters_at_once(int32_t n_sms) {
    static int most = 0;
    const auto kernel = linear_codes_tall<T, NT>;
    const grid<T, NT> g(1, nullptr);
    if (most == 0 && (cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                           shared_bytes<T, NT>) != cudaSuccess ||
                      cudaOccupancyMaxActiveClusters(&most, kernel, &g.config) != cudaSuccess))
        most = 0;
    return most < n_sms / kCtas ? most : n_sms / kCtas;
}

template <typename T>
status launch_words(const linear_args *p, int32_t n_sms, int32_t, kernel_stream stream) {
    tall_args a = {linear_output_of<T>(p)};
    a.tiled = p->code;
    a.blocks = p->blocks;
    a.half_blocks = p->half_blocks;
    a.second = p->half_blocks * LINEAR_BLOCK;
    a.gap = a.second - p->half_rows;
    if (!a.gated && a.gap == 0) a.half = a.n;
    a.simple = simple_output(a) && (a.gated || a.half == a.n);
    a.partial = reinterpret_cast<float4 *>(p->partial);
    a.counters = p->counters;
    const int32_t clusters = clusters_at_once<T, 256>(n_sms);
    if (clusters == 0) return FAIL(ST_DEVICE, "linear_codes_tall: no room for a cluster");
    tall_args b = a, c = a;
    int64_t with_256 = share<256>(&a, clusters), with_128 = share<128>(&b, clusters);
    int64_t with_192 = a.gated ? INT64_MAX : share<192>(&c, clusters);
    const auto grid_of = [&](const tall_args &x) {
        const int32_t n = x.along_m * x.along_n, all = x.whole + (n - x.whole) * x.team;
        return all < clusters ? all : clusters;
    };
    const cudaStream_t s = (cudaStream_t)stream;
    if (with_256 <= with_128 && with_256 <= with_192)
        return launch<T, 256>(a, nullptr, p->x, p->ldx * 2, grid_of(a), s);
    if (with_192 <= with_128) return launch<T, 192>(c, nullptr, p->x, p->ldx * 2, grid_of(c), s);
    return launch<T, 128>(b, nullptr, p->x, p->ldx * 2, grid_of(b), s);
}

#define T_F16              __half
#define T_BF16             __nv_bfloat16
#define WORDS_INSTANCES(X) X(F16) X(BF16)
#define WORDS_ROW(T)                                                                               \
    {"words_tall", 90, 90, WF_16, DT_##T, kRows, 4, 1, 0, 0, 1, launch_words<T_##T>, INT32_MAX},
const linear_variant words[] = {WORDS_INSTANCES(WORDS_ROW)};

} // namespace

extern "C" status linear_codes_tall_launch(const linear_problem *p, int32_t row, int32_t m,
                                           const void *code, const float *x_scale,
                                           kernel_stream stream) {
    const linear_weight *w = p->w;
    tall_args a = {linear_output_of(p, row, m)};
    a.w_scale = static_cast<const float *>(w->scale);
    a.x_scale = x_scale;
    a.simple = simple_output(a);
    const cudaStream_t s = (cudaStream_t)stream;
    return w->format == WF_INT8 ? launch_codes<int8_t>(a, w->code, code, p->n_sms, s)
                                : launch_codes<__nv_fp8_e4m3>(a, w->code, code, p->n_sms, s);
}

extern "C" linear_table linear_words_tall_table(void) {
    return linear_table{words, (int32_t)(sizeof words / sizeof words[0])};
}
