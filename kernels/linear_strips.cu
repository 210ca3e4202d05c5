// linear_strips.cu - y^T = W x^T of experts with few rows of x each, and of one row, on sm_90.
//
// A CTA has a tile: a strip of 16 rows of gate and that of up, or two strips side by side, of one
// expert that has rows; or a strip of the one matrix that a row of x is multiplied with. Its warps
// share K. Each asks for kUnits units of 64 inputs of W at once, all that it has of an expert, each
// lane copying to shared memory the words that it turns into A fragments itself: nothing is waited
// for but bytes, and of a launch whose routing was known before (linear_problem.routed), or that
// has none, they are asked for while the launch before still runs. A CTA takes so little of an SM
// that CTAs of the next launch lie beside it. Sums of the warps are added in order of K. Rows of an
// expert beyond kRows are further passes over the same W.
//
// linear_both has gate, up and down of few rows in one launch, where all of their W fits the SMs'
// shared memory at once.
#include "linear_experts.cuh"
#include "linear_launch.h"
#include "linear_words.cuh"
#include "mma_sync.cuh"
#include "ptx_sm90.cuh"
#include "quantize.cuh"

// Format, type, scale granule.
#ifndef STRIPS_INSTANCES
#define STRIPS_INSTANCES(X)                                                                        \
    X(INT4, F16, 128)                                                                              \
    X(INT4, BF16, 128)                                                                             \
    X(INT4, F16, 64)                                                                               \
    X(INT4, BF16, 64)                                                                              \
    X(INT4, F16, 32)                                                                               \
    X(INT4, BF16, 32)                                                                              \
    X(MXFP4, F16, 32)                                                                              \
    X(MXFP4, BF16, 32)
#endif

namespace {

enum { kUnits = 8, kPairs = kUnits / 2, kWarpsMost = 8, kStripBytes = 512 };
enum { kUnitsMost = kUnits * kWarpsMost };
enum { kRows = 2 }; // of x at once: few experts of a batch that comes here have more
enum { kSharedBytes = 228 * 1024, kRoom = 227 * 1024 }; // of an SM; of a CTA

// How a problem is cut, and where things lie in a warp's shared memory (bytes).
struct division {
    int32_t warps, part; // of a CTA; units of a warp
    int32_t tiles;       // of an expert
    int32_t x_stride;    // bytes of a row
    int32_t at_scale, scale_bytes, at_x, at_sums, at_bar, bytes;
};

// Row r's expert, if it is its first row, by what the launch before tells of it, and the expert's
// tokens. That it waits no longer than that runs needs no trust in its coming.
__device__ __forceinline__ target told_of(const linear_args &p, int r, unsigned &tokens) {
    const int32_t *at = p.told + r * LINEAR_TOLD;
    int32_t v;
    for (int i = 0;; i++) {
        asm volatile("ld.relaxed.gpu.global.s32 %0, [%1];" : "=r"(v) : "l"(at) : "memory");
        if (v != 0 || i > 1000) break;
        if (i == 1000) wait_for_previous();
    }
    v = __shfl_sync(~0u, v, 0);
    tokens = (unsigned)v >> 16;
    return {(v & 0xffff) - 1, 0, r, r + __popc(tokens)};
}
__device__ __forceinline__ int bit_of(unsigned set, int i) { // the i-th that is set
    for (; i > 0; i--) set &= set - 1;
    return __ffs(set) - 1;
}

// The number h of the experts that have rows, by a warp; no rows: there are not so many.
__device__ __forceinline__ target expert_of(const linear_args &p, int h) {
    const int lane = threadIdx.x % 32;
    target found = {};
    int before = 0;
#pragma unroll 1
    for (int e0 = 0; e0 < p.count; e0 += 128) {
        int32_t from[4], to[4];
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const int e = e0 + i * 32 + lane;
            from[i] = e < p.count ? __ldcg(p.expert_start + e) : 0;
            to[i] = e < p.count ? __ldcg(p.expert_start + e + 1) : 0;
        }
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const unsigned some = __ballot_sync(~0u, to[i] > from[i]);
            const int at = before + __popc(some & ((1u << lane) - 1));
            const unsigned here = __ballot_sync(~0u, to[i] > from[i] && at == h);
            before += __popc(some);
            if (!here) continue;
            const int source = __ffs(here) - 1;
            found.expert = e0 + i * 32 + source;
            found.m0 = __shfl_sync(~0u, from[i], source);
            found.m_end = __shfl_sync(~0u, to[i], source);
        }
    }
    return found;
}

__device__ __forceinline__ void copy_weights(uint32_t to, const void *from, uint64_t policy) {
    asm volatile("cp.async.cg.shared.global.L2::cache_hint [%0], [%1], 16, %2;" ::"r"(to),
                 "l"(from), "l"(policy)
                 : "memory");
}
__device__ __forceinline__ void copies_commit() {
    asm volatile("cp.async.commit_group;" ::: "memory");
}
// For group i of four.
__device__ __forceinline__ void copies_wait(int i) {
    asm volatile("{\n.reg .pred p, q, r, s;\n"
                 "setp.eq.s32 p, %0, 0;\nsetp.eq.s32 q, %0, 1;\n"
                 "setp.eq.s32 r, %0, 2;\nsetp.gt.s32 s, %0, 2;\n"
                 "@p cp.async.wait_group 3;\n@q cp.async.wait_group 2;\n"
                 "@r cp.async.wait_group 1;\n@s cp.async.wait_group 0;\n}" ::"r"(i)
                 : "memory");
}
// For group i of four behind which there are four more.
__device__ __forceinline__ void copies_wait_before(int i) {
    asm volatile("{\n.reg .pred p, q, r, s;\n"
                 "setp.eq.s32 p, %0, 0;\nsetp.eq.s32 q, %0, 1;\n"
                 "setp.eq.s32 r, %0, 2;\nsetp.gt.s32 s, %0, 2;\n"
                 "@p cp.async.wait_group 7;\n@q cp.async.wait_group 6;\n"
                 "@r cp.async.wait_group 5;\n@s cp.async.wait_group 4;\n}" ::"r"(i)
                 : "memory");
}
// For all groups but the last three.
__device__ __forceinline__ void copies_wait_oldest() {
    asm volatile("cp.async.wait_group 3;" ::: "memory");
}

// A warp's part of a tile of kStrips strips.
template <typename T, int F, int G, int kStrips> struct worker {
    static constexpr int per = G > 64 ? G / 64 : 1, each = G < 64 ? 64 / G : 1; // a granule, a unit
    static constexpr bool kSums = F == WF_INT4 && G == 128;
    static constexpr bool kFolded = dequant_unfold<T, F>() != 1.f;
    const linear_args &p;
    const division &d;
    uint32_t w, scale, x, x_at; // in shared memory; x_at: of this lane's row and chunk
    int begin, units, lane;     // of K
    int32_t block[kStrips];     // of the strips
    int strip[kStrips];

    // Part `warp` of a tile; own: the warp's shared memory.
    __device__ __forceinline__ void begin_tile(int tile, int warp, uint32_t own) {
        lane = threadIdx.x % 32;
        begin = warp * d.part;
        units = min(d.part, p.units - begin);
        find_tile(tile);
        w = own + lane * 16;
        asm volatile("" : "+r"(w));
        scale = own + d.at_scale;
        x = own + d.at_x;
    }
    __device__ __forceinline__ void find_tile(int tile) {
#pragma unroll
        for (int s = 0; s < kStrips; s++) {
            const bool apart = kStrips == 1 || p.paired; // each has a block of its own
            block[s] = apart ? tile / 4 + s * p.half_blocks : tile / 2;
            strip[s] = apart ? tile % 4 : tile % 2 * 2 + s;
        }
    }
    // Of the scales of this lane's rows of strip s.
    __device__ __forceinline__ int place_of(int s) const { return strip[s] * 16 + lane / 4 * 2; }
    // Scales of the warp's granules: 64 rows have a place of which only the strips' rows come.
    __device__ __forceinline__ void ask_scales(const uint8_t *from, uint32_t scale) const {
        constexpr int chunks = F == WF_INT4 ? 4 : 1; // of 16 bytes of a strip: scales, zeros, none
        const int first = begin * each / per, n = (units * each + per - 1) / per;
        const int c = lane % chunks, s = lane / chunks % kStrips;
        const int at = s ? strip[kStrips - 1] : strip[0], in = F != WF_INT4 ? at * 16
                                                               : c < 2      ? at * 32 + c * 16
                                                                            : 128 + at * 16;
        if (F == WF_INT4 && c >= (p.sym ? 2 : 3)) return;
#pragma unroll 1
        for (int g = lane / (chunks * kStrips); g < n; g += 32 / (chunks * kStrips))
            copy_some(scale + (g * kStrips + s) * p.granule_bytes + in,
                      from +
                          ((int64_t)(s ? block[kStrips - 1] : block[0]) * p.granules +
                           min(first + g, p.granules - 1)) *
                              p.granule_bytes +
                          in,
                      16);
    }
    // Pair i of the units, number n of all that are asked for, to where the one four before lay.
    __device__ __forceinline__ void ask_pair(const uint8_t *from, int i, int n,
                                             uint64_t policy) const {
        constexpr int unit = kStripBytes * 4;
#pragma unroll
        for (int j = 0; j < 2; j++)
#pragma unroll
            for (int s = 0; s < kStrips; s++)
                if (2 * i + j < units)
                    copy_weights(w + ((n % kPairs * 2 + j) * kStrips + s) * kStripBytes,
                                 from + ((int64_t)block[s] * p.units + begin + 2 * i + j) * unit +
                                     strip[s] * kStripBytes + lane * 16,
                                 policy);
    }
    // kUnits at once. (By ask_pair a step of Mixtral takes 2 % longer.)
    __device__ __forceinline__ void ask_weights(const uint8_t *from, uint64_t policy) const {
        constexpr int unit = kStripBytes * 4;
        const uint8_t *at[kStrips];
#pragma unroll
        for (int s = 0; s < kStrips; s++)
            at[s] = from + ((int64_t)block[s] * p.units + begin) * unit + strip[s] * kStripBytes +
                    lane * 16;
#pragma unroll
        for (int u = 0; u < kUnits; u++) {
            if (u < units)
#pragma unroll
                for (int s = 0; s < kStrips; s++)
                    copy_weights(w + (u * kStrips + s) * kStripBytes, at[s] + u * unit, policy);
            if (u % 2) copies_commit();
        }
    }
    // Rows m0 .. m0 + rows of the problem; what lies past K is zero.
    // tokens: of the expert, of which the first `before` rows were had, where it was told.
    __device__ __forceinline__ void ask_x(int m0, int rows, unsigned tokens, int before,
                                          uint32_t bar) const {
        const int inputs = min(units * 64, p.k - begin * 64);
        if (lane == 0) barrier_arrive_expect(bar, rows * inputs * 2);
        if (lane >= rows) return;
        const int32_t of = !p.x_row ? m0 + lane
                           : p.told ? bit_of(tokens, before + lane)
                                    : __ldcg(p.x_row + m0 + lane);
        copy_bulk(x + lane * d.x_stride,
                  static_cast<const T *>(p.x) + (int64_t)of * p.ldx + begin * 64, inputs * 2, bar,
                  policy_evict_normal());
#pragma unroll 1
        for (int k = inputs; k < units * 64; k += 8)
            asm volatile(
                "st.shared.v4.u32 [%0], {%1, %1, %1, %1};" ::"r"(x + lane * d.x_stride + k * 2),
                "r"(0)
                : "memory");
    }

    // Pair i, which is there as number n of all, onto the sums. Strips in turn, so that few
    // products wait.
    __device__ __forceinline__ void multiply_pair(float (&acc)[kStrips][4], int i, int n,
                                                  uint32_t scale,
                                                  const int (&place)[kStrips]) const {
        float sums[kStrips][2][4] = {};
        dequant_packed packed[kStrips];
        dequant_scales scales[kStrips];
        const int u0 = 2 * i;
        const uint32_t w_at = w + n % kPairs * (2 * kStrips * kStripBytes);
#pragma unroll
        for (int u = 0; u < 2; u++) {
            if (u0 + u >= units) break;
            uint4 chunk[kStrips];
            uint32_t b[8];
#pragma unroll
            for (int s = 0; s < kStrips; s++)
                chunk[s] = shared_u128(w_at + (u * kStrips + s) * kStripBytes);
            load_matrices(b, x_at + (u0 + u) * 128);
            load_matrices(b + 4, x_at + (u0 + u) * 128 + 64);
#pragma unroll
            for (int j = 0; j < 4; j++) {
                uint32_t a[kStrips][4];
#pragma unroll
                for (int s = 0; s < kStrips; s++) {
                    if (j * each % 4 == 0 && (per == 1 || u == 0)) {
                        const int g = ((u0 + u) * each + j * each / 4) / per;
                        dequant_load_packed<F>(packed[s],
                                               scale + (g * kStrips + s) * p.granule_bytes,
                                               place[s], p.sym);
                        if (kSums)
                            scales[s] = dequant_scales_of(dequant_rows_of<T, F, false>(packed[s]));
                        else
                            dequant_scales_of<T, F, kFolded>(scales[s], packed[s]);
                    }
                    dequant_word<T, F, !kSums, kFolded>(
                        a[s], reinterpret_cast<const uint32_t *>(&chunk[s]) + j, scales[s]);
                }
#pragma unroll
                for (int s = 0; s < kStrips; s++)
                    multiply(sums[s][u], a[s], b[2 * j], b[2 * j + 1], T{});
            }
        }
#pragma unroll
        for (int s = 0; s < kStrips; s++) {
            float by[2] = {1.f, 1.f};
            if (kSums) dequant_unpack<F>(by, packed[s]);
#pragma unroll
            for (int e = 0; e < 4; e++)
                acc[s][e] = fmaf(by[e / 2], sums[s][0][e] + sums[s][1][e], acc[s][e]);
        }
    }
};

// Of a tile's rows from m0 on the sums of all warps, a thread an output; part: [warp][strip][lane]
// [4], warps `stride` floats apart. kPlain: they are what y is, or gated by LINEAR_GATED.
template <typename T, int F, int G, bool kPlain>
__device__ __forceinline__ void finish(const linear_args &p, const division &d, const float *part,
                                       int stride, const target &tile, int m0, int rows) {
    const float mend = F == WF_INT4 && G == 128 ? dequant_factor<T, F>() : dequant_unfold<T, F>();
    const int each = p.paired ? 4 : 5; // outputs of a row, as a logarithm
#pragma unroll 1
    for (int i = threadIdx.x; i < rows << each; i += 32 * d.warps) {
        const int o = i % 16, n = i >> each, s0 = p.paired ? 0 : i / 16 % 2;
        const float *at = part + s0 * 128 + (o % 8 * 4 + n / 2) * 4 + o / 8 * 2 + n % 2;
        const int upper = !p.paired && tile.block / 2 >= p.half_blocks ? 1 : 0; // of two halves
        const int32_t in_half = ((tile.block - upper * 2 * p.half_blocks) << each) + s0 * 16 + o;
        const int32_t col = upper * p.half_rows + in_half;
        if (in_half >= p.half_rows) continue;
        float v = 0.f, up = 0.f;
#pragma unroll
        for (int w = 0; w < kWarpsMost; w++)
            if (w < d.warps) {
                v += at[w * stride];
                if (p.paired) up += at[w * stride + 128];
            }
        v *= mend, up *= mend;
        if (!kPlain && p.bias) {
            const T *bias = static_cast<const T *>(p.bias) + (int64_t)tile.expert * p.n + col;
            v += to_f32(bias[0]);
            if (p.paired) up += to_f32(bias[p.half_rows]);
        }
        if (p.paired) v = linear_gate(v, up, kPlain ? LINEAR_GATED : p.epilogue, p.limit);
        static_cast<T *>(p.y)[(m0 + n) * p.ldy + col] = from_f32<T>(v);
    }
}

// (With the 72 registers of three CTAs of eight warps an SM steps are 1.5 % slower.)
template <typename T, int F, int G, bool kPlain>
__global__ void __maxnreg__(80)
    linear_strips(const __grid_constant__ linear_args p, const __grid_constant__ division d) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL) // never launched, and empty, on other architectures
    extern __shared__ __align__(128) uint8_t shared[];
    const int warp = __shfl_sync(~0u, threadIdx.x / 32, 0), lane = threadIdx.x % 32;
    // Not from `warp`: ptxas 13.0 adds what is uniform to the copies' addresses in a way that is no
    // instruction beside their policy.
    uint8_t *const mine = shared + threadIdx.x / 32 * d.bytes;
    const uint32_t own = shared_address(mine), bar = own + d.at_bar;
    if (lane == 0) {
        barrier_init(bar, 1);
        barrier_init_fence();
    }
    __syncwarp();
    const bool early = p.routed || p.told;
    worker<T, F, G, 2> work = {p, d};
    work.begin_tile((int)blockIdx.x, warp, own);
    if (!early) {
        wait_for_previous();
        launch_dependents();
    }
    unsigned tokens = 0;
    target tile = p.told ? told_of(p, (int)blockIdx.y, tokens) : expert_of(p, (int)blockIdx.y);
    tile.block = (int)blockIdx.x;
    if (tile.m_end > tile.m0) {
        work.ask_scales(p.scale + tile.expert * p.scale_bytes, work.scale);
        work.ask_weights(p.code + tile.expert * p.code_bytes, policy_evict_first());
    }
    if (early) {
        wait_for_previous();
        launch_dependents();
    }
    int parity = 0, place[2] = {work.place_of(0), work.place_of(1)};
    asm volatile("" : "+r"(place[0]), "+r"(place[1])); // lest they be computed anew
#pragma unroll 1
    for (int m0 = tile.m0; m0 < tile.m_end; m0 += kRows, parity ^= 1) {
        const int rows = min(kRows, tile.m_end - m0);
        if (m0 > tile.m0) { // sums have been read, which lay where x comes to
            __syncthreads();
            proxy_fence();
        }
        work.ask_x(m0, rows, tokens, m0 - tile.m0, bar);
        work.x_at = work.x + min(lane % 8, rows - 1) * d.x_stride + lane / 8 * 16;
        asm volatile("" : "+r"(work.x_at)); // lest it be computed anew for each pair
        float acc[2][4] = {};
#pragma unroll 1
        for (int i = 0; 2 * i < work.units; i++) {
            copies_wait(i);
            __syncwarp();
            if (i == 0) barrier_wait(bar, parity);
            work.multiply_pair(acc, i, i, work.scale, place);
        }
        __syncwarp();
#pragma unroll
        for (int s = 0; s < 2; s++)
            *reinterpret_cast<float4 *>(mine + d.at_x + s * 512 + lane * 16) =
                make_float4(acc[s][0], acc[s][1], acc[s][2], acc[s][3]);
        __syncthreads();
        finish<T, F, G, kPlain>(p, d, reinterpret_cast<const float *>(shared + d.at_x), d.bytes / 4,
                                tile, m0, rows);
    }
#endif
}

// Of one row the sums of all warps of tile `at`, by one of them; part: the first warp's. kPlain: W
// has no halves, and sums are what y is, of type T.
template <typename T, int F, int G, bool kPlain>
__device__ __forceinline__ void finish_row(const linear_args &p, const division &d,
                                           const uint8_t *part, int at) {
    const int lane = threadIdx.x % 32;
    const int upper = !kPlain && at / 4 >= p.half_blocks ? 1 : 0; // of two halves
    const int32_t in_half = (at - upper * 4 * p.half_blocks) * 16 + lane;
    const int32_t col = upper * p.half_rows + in_half;
    const int in_part = lane % 8 * 16 + lane / 8 * 2; // [lane][4] of a product, whose column is one
    if (lane >= 16 || in_half >= p.half_rows) return;
    float v = 0.f;
#pragma unroll
    for (int w = 0; w < kWarpsMost; w++)
        if (w < d.warps) v += reinterpret_cast<const float *>(part + w * d.bytes)[in_part];
    v *= F == WF_INT4 && G == 128 ? dequant_factor<T, F>() : dequant_unfold<T, F>();
    if (!kPlain && p.bias) v += to_f32(static_cast<const T *>(p.bias)[col]);
    if (!kPlain && p.epilogue == LINEAR_RESIDUAL)
        v += linear_element(p.y, col, half_pair<T>::bf16, p.y_f32);
    if (!kPlain && p.y_f32)
        static_cast<float *>(p.y)[col] = v;
    else
        static_cast<T *>(p.y)[col] = from_f32<T>(v);
}

// The row of x, of which each warp of the CTA has a part, becomes the values of its codes.
// from: this warp's part, of which `some` vectors of eight are there and others, of n, zeros. To x;
// behind each row of x is room for 16 bytes, of which the warp's largest takes place `place`.
template <typename T, act_format A>
__device__ __forceinline__ void round_row(const division &d, uint8_t *shared, const T *from,
                                          uint8_t *x, int some, int n, int place) {
    const int lane = threadIdx.x % 32;
    const auto largest_of = [&](uint8_t *part) {
        return reinterpret_cast<uint32_t *>(part + d.x_stride - 16) + place;
    };
    eight<T, A> e[2];
    const auto load = [&](int v) {
#pragma unroll
        for (int i = 0; i < 2; i++) {
            e[i].x = {};
            if (v + 32 * i < some) e[i].x = load_pack(from + (v + 32 * i) * 8);
        }
    };
    uint32_t most = 0;
#pragma unroll 1
    for (int v = (n - 1) / 64 * 64 + lane; v >= 0; v -= 64) { // the first two at last: they stay
        load(v);
        most = __vmaxu2(most, __vmaxu2(e[0].magnitudes(), e[1].magnitudes()));
    }
    most = __reduce_max_sync(~0u, max(most >> 16, most & 0xffffu));
    if (lane == 0) *largest_of(x) = most;
    __syncthreads();
    most = lane < d.warps ? *largest_of(shared + lane * d.bytes + d.at_x) : 0;
    const float s = span_scale<T, A>(__reduce_max_sync(~0u, most));
#pragma unroll 1
    for (int v = lane;;) {
#pragma unroll
        for (int i = 0; i < 2; i++)
            if (v + 32 * i < n)
                store_pack(reinterpret_cast<T *>(x) + (v + 32 * i) * 8, e[i].values(s));
        if ((v += 64) >= n) break;
        load(v);
    }
    __syncwarp();
}

// Waits until the row is there and rounds it. Once through the code of that before, with whatever
// lies in its place.
template <typename T, act_format A, int F, int G>
__device__ __forceinline__ void take_rounded(const worker<T, F, G, 1> &work, uint8_t *shared,
                                             uint8_t *mine) {
    const division &d = work.d;
    const int n = work.units * 8, some = min(n, (work.p.k - work.begin * 64) / 8);
    const T *from = reinterpret_cast<const T *>(mine + d.at_x);
#pragma unroll 1
    for (int pass = 0; pass < 2; pass++) {
        if (pass == 1) {
            from = static_cast<const T *>(work.p.x) + work.begin * 64;
            wait_for_previous();
        }
        round_row<T, A>(d, shared, from, mine + d.at_x, some, n, pass);
    }
}

// A row of x by one matrix, whose strips CTAs take in turn. All columns of a product are that row.
// kPlain: as of finish_row. x is rounded for A first.
template <typename T, int F, int G, bool kPlain, act_format A>
__global__ void __maxnreg__(64)
    linear_strip(const __grid_constant__ linear_args p, const __grid_constant__ division d) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL) // never launched, and empty, on other architectures
    extern __shared__ __align__(128) uint8_t shared[];
    const int warp = __shfl_sync(~0u, threadIdx.x / 32, 0), lane = threadIdx.x % 32;
    uint8_t *const mine = shared + threadIdx.x / 32 * d.bytes; // see linear_strips
    const uint32_t own = shared_address(mine), bar = own + d.at_bar;
    const uint64_t policy = policy_evict_first();
    launch_dependents();
    if (lane == 0) {
        barrier_init(bar, 1);
        barrier_init_fence();
    }
    __syncwarp();
    worker<T, F, G, 1> work = {p, d};
    work.begin_tile((int)blockIdx.x, warp, own);
    const int pairs = (work.units + 1) / 2;
    // The pair that is asked for next: of which tile, and which of it; `all`: of all tiles.
    int asked = (int)blockIdx.x, pair = 0, all = 0, place_asked = 0;
    const auto ask = [&] {
        if (asked < d.tiles) {
            if (pair == 0) work.ask_scales(p.scale, work.scale + place_asked * d.scale_bytes);
            work.ask_pair(p.code, pair, all++, policy);
            if (++pair == pairs) {
                pair = 0, place_asked ^= 1;
                asked += (int)gridDim.x;
                work.find_tile(asked);
            }
        }
        copies_commit();
    };
#pragma unroll 1
    for (int i = 0; i < kPairs; i++) ask();
    work.x_at = work.x + lane / 8 * 16;
    asm volatile("" : "+r"(work.x_at)); // lest it be computed anew for each pair
    if (A != AF_16) {
        take_rounded<T, A>(work, shared, mine);
    } else {
        wait_for_previous();
        work.ask_x(0, 1, 0, 0, bar);
    }
    int n = 0, turn = 0, finisher = 0; // n: the pair at hand, of all tiles
#pragma unroll 1
    for (int tile = (int)blockIdx.x; tile < d.tiles; tile += (int)gridDim.x) {
        float acc[1][4] = {};
        const int place[1] = {tile % 4 * 16 + lane / 4 * 2};
        const uint32_t scale = work.scale + turn * d.scale_bytes;
#pragma unroll 1
        for (int i = 0; i < pairs; i++, n++) {
            copies_wait_oldest();
            __syncwarp();
            if (A == AF_16 && n == 0) barrier_wait(bar, 0);
            work.multiply_pair(acc, i, n, scale, place);
            ask();
        }
        const int at_sums = d.at_sums + turn * 512;
        *reinterpret_cast<float4 *>(mine + at_sums + lane * 16) =
            make_float4(acc[0][0], acc[0][1], acc[0][2], acc[0][3]);
        // Who has met the others here has read the sums of the tile before.
        __syncthreads();
        if (warp == finisher) finish_row<T, F, G, kPlain>(p, d, shared + at_sums, tile);
        if (++finisher == d.warps) finisher = 0;
        turn ^= 1;
    }
#endif
}

// --- Gate, up and down in one launch -------------------------------------------------------------

// CTAs (i, row of the problem) have gate and up's strips i up_each .. + up_each - 1 of the row's
// expert, and down's in the same way; `bytes` of a warp's shared memory, of which `up` has the
// first up.bytes.
struct division_of_both {
    division up, down; // `warps`: of a strip
    int32_t up_each, down_each, bytes;
    int32_t tokens; // rows of x
    const void *x;  // in words
    uint4 *used;    // `used_pieces` of 16 bytes that become zeros
    int32_t used_pieces;
};
enum { kBothWarps = 24 }; // at 80 registers
enum { kNamedBarriers = 16 };

__device__ __forceinline__ void meet(int barrier, int warps) { // of a CTA's warps so many
    asm volatile("barrier.sync %0, %1;" ::"r"(barrier), "r"(warps * 32) : "memory");
}

// Output threadIdx.x % 16 of a strip and row n: the sums of `warps` warps, `stride` floats apart.
__device__ __forceinline__ float sum_of(const float *part, int stride, int warps, int n) {
    const int o = (int)threadIdx.x % 16;
    const float *at = part + (o % 8 * 4 + n / 2) * 4 + o / 8 * 2 + n % 2;
    float v = 0.f;
#pragma unroll
    for (int w = 0; w < kWarpsMost; w++)
        if (w < warps) v += at[w * stride];
    return v;
}
// Every second lane stores its value and that of the next one as a word.
template <typename T>
__device__ __forceinline__ void store_words(void *to, int64_t at, float v, bool some) {
    const uint32_t bits = word_half(from_f32<T>(v));
    const uint32_t word = bits | __shfl_down_sync(~0u, bits, 1) << 16;
    if (some && threadIdx.x % 2 == 0)
        asm volatile("st.relaxed.gpu.global.u32 [%0], %1;" ::"l"(static_cast<T *>(to) + at),
                     "r"(word)
                     : "memory");
}

// x and h come as words that say themselves that they are there (linear_words.cuh): nothing is
// counted, and nobody waits for a fence or for the end of a launch, which comes late where every SM
// has asked for all of its W. x is looked for no longer than the launch before runs; h of others
// comes, for they run.
__device__ __forceinline__ uint4 load_words(const void *from, bool trusted) {
    uint4 v;
    for (int i = 0;; i++) {
        asm volatile("ld.relaxed.gpu.global.v4.u32 {%0, %1, %2, %3}, [%4];"
                     : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                     : "l"(from)
                     : "memory");
        if (words_there(v) || (!trusted && i > 1000)) break;
        if (!trusted && i == 1000) wait_for_previous();
    }
    return make_uint4(~v.x, ~v.y, ~v.z, ~v.w);
}
// A warp's inputs of `rows` rows to shared memory; what lies past K is zero.
template <typename W, typename T>
__device__ __forceinline__ void take_words(const W &work, const T *x, int64_t ldx, int rows,
                                           bool trusted) {
    const int lane = threadIdx.x % 32, pieces = work.units * 8; // of 16 bytes, of a row
    const int inputs = min(work.units * 64, work.p.k - work.begin * 64);
#pragma unroll 1
    for (int i = lane; i < rows * pieces; i += 32) {
        const int r = rows > 1 ? i / pieces : 0, k = (i - r * pieces) * 8;
        uint4 v = {};
        if (k < inputs) v = load_words(x + r * ldx + work.begin * 64 + k, trusted);
        asm volatile(
            "st.shared.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(work.x + r * work.d.x_stride + k * 2),
            "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w)
            : "memory");
    }
    __syncwarp();
}

// A warp's share of a phase: gate and up, or down.
struct share_of_both {
    int group, part, tile, warps; // of the CTA; of the group; of the expert; that share K
    bool some;
    __device__ __forceinline__ share_of_both(const division &d, int each, int warp)
        : group(warp / d.warps), part(warp - group * d.warps), tile((int)blockIdx.x * each + group),
          warps(d.warps), some(group < each && tile < d.tiles) {}
};

// The launches that had these words have ended: they came before the one that this one follows.
__device__ __forceinline__ void clear_used(const division_of_both &d) {
    const int ctas = (int)(gridDim.x * gridDim.y), cta = (int)(blockIdx.y * gridDim.x + blockIdx.x);
#pragma unroll 1
    for (int i = cta + (int)threadIdx.x * ctas; i < d.used_pieces; i += (int)blockDim.x * ctas)
        d.used[i] = uint4{};
}

// Of a tile's rows m0 .. m0 + rows - 1 the sums of a group's warps, by one of them, as words.
template <typename T>
__device__ __forceinline__ void
finish_both(const linear_args &up, const linear_args &down, const float *sums, int stride,
            const share_of_both &share, bool is_down, int m0, int rows) {
    const int lane = threadIdx.x % 32;
    const float mend = dequant_factor<T, WF_INT4>();
#pragma unroll 1
    for (int n = 0; n < rows; n++) {
        if (!is_down) {
            const float g = mend * sum_of(sums, stride, share.warps, n),
                        u = mend * sum_of(sums + 128, stride, share.warps, n);
            const int32_t col = share.tile * 16 + lane;
            store_words<T>(up.y, (m0 + n) * up.ldy + col, linear_gate(g, u, LINEAR_GATED, 0.f),
                           lane < 16 && col < up.half_rows);
        } else {
            const int32_t col = share.tile * 32 + lane;
            store_words<T>(down.y, (m0 + n) * down.ldy + col,
                           mend * sum_of(sums + lane / 16 * 128, stride, share.warps, n),
                           col < down.half_rows);
        }
    }
}

// y of `down` by up's h, which is up.y and down.x: one place. A CTA first has strips of gate and up
// and then, with the same warps and code, strips of down, whose W comes meanwhile. It waits for h
// of other CTAs, so all must be on the GPU at once: there are no more than SMs, no launch behind
// begins before all have come to launch_dependents, and those before this one end without it.
template <typename T, int G>
__global__ void __maxnreg__(80)
    linear_both(const __grid_constant__ linear_args up, const __grid_constant__ linear_args down,
                const __grid_constant__ division_of_both d) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL) // never launched, and empty, on other architectures
    extern __shared__ __align__(128) uint8_t shared[];
    const int warp = __shfl_sync(~0u, threadIdx.x / 32, 0), lane = threadIdx.x % 32;
    uint8_t *const mine = shared + threadIdx.x / 32 * d.bytes; // see linear_strips
    const int m0 = (int)blockIdx.y;
    share_of_both share(d.up, d.up_each, warp);
    const share_of_both later(d.down, d.down_each, warp);
    worker<T, WF_INT4, G, 2> work = {up, d.up}, next = {down, d.down};
    work.begin_tile(share.tile, share.part, shared_address(mine));
    next.begin_tile(later.tile, later.part, shared_address(mine) + d.up.bytes);
    if (share.some) take_words(work, static_cast<const T *>(d.x), up.ldx, d.tokens, false);
    clear_used(d);
    unsigned tokens;
    const int expert = told_of(up, m0, tokens).expert, rows = __popc(tokens);
    if (rows == 0) { // not the first row of its expert
        wait_for_previous();
        return;
    }
    if (share.some) {
        work.ask_scales(up.scale + expert * up.scale_bytes, work.scale);
        work.ask_weights(up.code + expert * up.code_bytes, policy_evict_first());
    }
    if (later.some) {
        next.ask_scales(down.scale + expert * down.scale_bytes, next.scale);
        next.ask_weights(down.code + expert * down.code_bytes, policy_evict_first());
    }
    const int row = min(lane % 8, rows - 1);
    work.x_at = work.x + (__ffs(tokens) - 1 + row) * d.up.x_stride + lane / 8 * 16;
    int place[2] = {work.place_of(0), work.place_of(1)}, at_sums = d.up.at_x;
#pragma unroll 1
    for (int phase = 0; phase < 2; phase++) {
        float acc[2][4] = {};
#pragma unroll 1
        for (int i = 0; share.some && 2 * i < work.units; i++) {
            if (phase == 0 && later.some)
                copies_wait_before(i);
            else
                copies_wait(i);
            __syncwarp();
            work.multiply_pair(acc, i, i, work.scale, place);
        }
        __syncwarp();
        float *const sums = reinterpret_cast<float *>(mine + at_sums);
#pragma unroll
        for (int s = 0; s < 2; s++)
            *reinterpret_cast<float4 *>(sums + s * 128 + lane * 4) =
                make_float4(acc[s][0], acc[s][1], acc[s][2], acc[s][3]);
        if (share.some) meet(1 + phase * d.up_each + share.group, share.warps);
        if (share.some && share.part == 0)
            finish_both<T>(up, down, sums, d.bytes / 4, share, phase == 1, m0, rows);
        if (phase == 1) break;
        // What launches behind take for known is what the launch before this one has left.
        if (warp == 0) {
            wait_for_previous();
            launch_dependents();
        }
        if (!later.some) break;
        take_words(next, static_cast<const T *>(down.x) + m0 * down.ldx, down.ldx, rows, true);
        work.w = next.w, work.scale = next.scale, work.units = next.units;
        work.x_at = next.x + row * d.down.x_stride + lane / 8 * 16;
        place[0] = next.place_of(0), place[1] = next.place_of(1);
        share = later;
        at_sums = d.up.bytes + d.down.at_x;
    }
#endif
}

// So much shared memory of a CTA that no SM has more of them than its share, where all find room at
// once: those that come beside the launch before would else lie on the SMs that are free first.
int least_bytes(int32_t ctas, int32_t n_sms) {
    const int share = (ctas + n_sms - 1) / n_sms;
    return share > 8 ? 0 : kSharedBytes / (share + 1) / 128 * 128;
}

// Of `tiles` tiles of `strips` strips and up to `rows` rows of x, a warp `least` units at least.
// again: a CTA has more than one.
template <int G>
division divide(const linear_args *a, int32_t tiles, int32_t strips, int32_t rows, int32_t least,
                bool again) {
    constexpr int per = G > 64 ? G / 64 : 1, each = G < 64 ? 64 / G : 1;
    const int part = max(least, (a->units + kWarpsMost - 1) / kWarpsMost);
    division d = {};
    d.tiles = tiles;
    d.part = (part + per - 1) / per * per;
    d.warps = (a->units + d.part - 1) / d.part;
    d.x_stride = d.part * 128 + 16;
    d.at_scale = (again ? (int)kUnits : min(d.part, (int)kUnits)) * strips * kStripBytes;
    d.scale_bytes = d.part * each / per * strips * a->granule_bytes;
    d.at_x = d.at_scale + d.scale_bytes * (again ? 2 : 1);
    d.at_sums = d.at_x + rows * d.x_stride; // of one row of x; of more they come to lie where x did
    d.at_bar = rows == 1 ? d.at_sums + (again ? 1024 : 512) : max(d.at_sums, d.at_x + strips * 512);
    d.bytes = (d.at_bar + 8 + 127) / 128 * 128;
    return d;
}

status launch(void (*kernel)(linear_args, division), const linear_args *a, const division &d,
              dim3 ctas, int32_t n_sms, kernel_stream stream) {
    const int bytes = max(d.warps * d.bytes, least_bytes((int)(ctas.x * ctas.y), n_sms));
    cudaError_t e =
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kRoom);
    if (e == cudaSuccess)
        e = cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout,
                                 cudaSharedmemCarveoutMaxShared);
    const launch_config l(ctas, dim3((unsigned)(32 * d.warps)), (size_t)bytes, stream, true);
    if (e == cudaSuccess) e = cudaLaunchKernelEx(&l.config, kernel, *a, d);
    return e == cudaSuccess ? ST_OK : FAIL(ST_DEVICE, "linear_strips: %s", cudaGetErrorString(e));
}

template <typename T, int F, int G>
status launch_experts(const linear_args *a, int32_t n_sms, int32_t, kernel_stream stream) {
    const int tiles = a->paired ? (a->half_rows + 15) / 16 : a->blocks * 2;
    const int experts = a->told ? a->m : min(a->m, a->count);
    const bool plain = !a->bias && (a->epilogue == LINEAR_STORE || a->epilogue == LINEAR_GATED);
    return launch(plain ? linear_strips<T, F, G, true> : linear_strips<T, F, G, false>, a,
                  divide<G>(a, tiles, 2, kRows, kUnits / 2, false),
                  dim3((unsigned)tiles, (unsigned)experts), n_sms, stream);
}

// Two strips an SM are taken by one CTA, which reads the second while it multiplies the first; of
// more each has its own.
template <typename T, int F, int G>
status launch_row(const linear_args *a, int32_t n_sms, int32_t, kernel_stream stream) {
    const int tiles = a->blocks * 4;
    const bool again = tiles > n_sms && tiles <= 2 * n_sms;
    const bool plain =
        !a->bias && !a->y_f32 && a->epilogue == LINEAR_STORE && a->half_blocks == a->blocks;
    auto *const kernel =
        a->act == AF_16
            ? (plain ? linear_strip<T, F, G, true, AF_16> : linear_strip<T, F, G, false, AF_16>)
        : a->act == AF_INT8
            ? (plain ? linear_strip<T, F, G, true, AF_INT8> : linear_strip<T, F, G, false, AF_INT8>)
            : linear_strip<T, F, G, false, AF_FP8>;
    return launch(kernel, a, divide<G>(a, tiles, 1, 1, kUnits / 2, again),
                  dim3((unsigned)(again ? n_sms : tiles)), n_sms, stream);
}

// How both are cut: gate and up as alone; down, for which all warps are there at once, so that a
// warp has few units. No bytes: they do not fit.
template <int G>
division_of_both divide_both(const linear_args *up, const linear_args *down, int32_t ctas) {
    division_of_both d = {};
    if (ctas < 1) return d;
    d.up = divide<G>(up, (up->half_rows + 15) / 16, 2, kRows, kUnits / 2, false);
    d.down = divide<G>(down, down->blocks * 2, 2, kRows, 2, false);
    d.up_each = (d.up.tiles + ctas - 1) / ctas;
    d.down_each = (d.down.tiles + ctas - 1) / ctas;
    const int warps = max(d.up_each * d.up.warps, d.down_each * d.down.warps);
    const int bytes = d.up.bytes + d.down.bytes;
    const bool fits = warps <= kBothWarps && 1 + d.up_each + d.down_each <= kNamedBarriers &&
                      warps * bytes + 128 <= kRoom && max(d.up.part, d.down.part) <= kUnits;
    d.bytes = fits ? bytes : 0;
    return d;
}

template <typename T>
status launch_both(const linear_args *up, const linear_args *down, const division_of_both &d,
                   int32_t ctas, kernel_stream stream) {
    const auto kernel = linear_both<T, 128>;
    const int warps = max(d.up_each * d.up.warps, d.down_each * d.down.warps);
    cudaError_t e =
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kRoom - 128);
    if (e == cudaSuccess)
        e = cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout,
                                 cudaSharedmemCarveoutMaxShared);
    const launch_config l(dim3((unsigned)ctas, (unsigned)up->m), dim3((unsigned)(32 * warps)),
                          (size_t)(warps * d.bytes), stream, true);
    if (e == cudaSuccess) e = cudaLaunchKernelEx(&l.config, kernel, *up, *down, d);
    return e == cudaSuccess ? ST_OK : FAIL(ST_DEVICE, "linear_both: %s", cudaGetErrorString(e));
}

#define T_F16  __half
#define T_BF16 __nv_bfloat16
#define ROW(NAME, F, T, G, BLOCKS, LAUNCH, ROWS, EXPERTS, ROUNDS, UNITS)                           \
    {NAME, 90, 90,     WF_##F, DT_##T, 8,       BLOCKS, 1,    G,                                   \
     G,    1,  LAUNCH, ROWS,   false,  EXPERTS, ROUNDS, UNITS},
#define ROWS(F, T, G)                                                                              \
    ROW("experts_strips", F, T, G, 4, (launch_experts<T_##T, WF_##F, G>), 0, true, false,          \
        kUnitsMost)                                                                                \
    ROW("strips", F, T, G, 1, (launch_row<T_##T, WF_##F, G>), 1, false, true, 0)
const linear_variant rows[] = {STRIPS_INSTANCES(ROWS)};

} // namespace

extern "C" linear_table linear_strips_table(void) {
    return linear_table{rows, (int32_t)(sizeof rows / sizeof rows[0])};
}

extern "C" bool linear_both_fits(const linear_args *up, const linear_args *down, int32_t n_sms) {
    return divide_both<128>(up, down, n_sms / up->m).bytes > 0;
}

extern "C" status linear_both_launch(const linear_args *up, const linear_args *down,
                                     const linear_words *words, int32_t tokens, dtype type,
                                     int32_t n_sms, kernel_stream stream) {
    const int32_t ctas = n_sms / up->m;
    division_of_both d = divide_both<128>(up, down, ctas);
    d.x = words->x, d.tokens = tokens;
    d.used = static_cast<uint4 *>(words->used), d.used_pieces = (int32_t)(words->used_bytes / 16);
    return type == DT_F16 ? launch_both<__half>(up, down, d, ctas, stream)
                          : launch_both<__nv_bfloat16>(up, down, d, ctas, stream);
}
