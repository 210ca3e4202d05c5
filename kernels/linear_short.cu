// linear_short.cu - y^T = W x^T for few rows of x, on sm_90: as fast as the weights can be read.
//
// A cluster of C CTAs shares a tile (64 rows of W; with gate and up 64 of each) along K: CTA r has
// the r-th part of the inputs. Cluster c takes tiles c, c + clusters, ... Each CTA keeps its part
// of x in shared memory for all of its tiles, or has it brought with every step where it does not
// fit. Of a CTA's warps
//
//   16 multiply: warp w has strip w % 4, and of every step the two units (128 inputs; one unit of
//      wide formats) of its warpgroup: neighbours along K, or two of gate and the same two of up
//    4 finish: each its strip, where this CTA is the one that finishes it
//    1 loads codes and scales by bulk copies: as few and as large as can be, since each takes about
//      100 cycles. Weights depend on no kernel before this one and are asked for before waiting for
//      it (programmatic dependent launch)
//    1 loads x where it comes with the steps
//
// mma.sync multiplies codes turned into numbers exactly (integers less their zero, e2m1, e4m3);
// the scale of 64 or fewer inputs meets the sums in f32. Sums of a tile go to the CTA that finishes
// their strip (st.async into its shared memory, whose barrier counts the bytes) and are added there
// in order of K. Clusters do not wait for each other, and there is no workspace: the bits are the
// same on every run.
#include "linear_common.cuh"
#include "linear_launch.h"
#include "mma_sync.cuh"
#include "ptx_sm90.cuh"

// The explicit list: format, type, x rows (NT), scale granule (0: none).
#define SHORT_ROWS(X, F, T, G) X(F, T, 8, G) X(F, T, 16, G)
#define SHORT_TYPES(X, F, G)   SHORT_ROWS(X, F, F16, G) SHORT_ROWS(X, F, BF16, G)
#ifndef SHORT_INSTANCES
#define SHORT_INSTANCES(X)                                                                         \
    SHORT_TYPES(X, INT4, 128)                                                                      \
    SHORT_TYPES(X, INT4, 64)                                                                       \
    SHORT_TYPES(X, INT4, 32)                                                                       \
    SHORT_TYPES(X, MXFP4, 32)                                                                      \
    SHORT_TYPES(X, NVFP4, 16)                                                                      \
    SHORT_TYPES(X, INT8, 0)                                                                        \
    SHORT_TYPES(X, FP8, 0)                                                                         \
    SHORT_TYPES(X, FP8B, 128)                                                                      \
    SHORT_TYPES(X, 16, 0)
#endif

namespace {

enum { kWarps = 16, kLoader = kWarps + 4, kThreads = 32 * (kLoader + 2) };
// Sums of so many tiles can be on their way.
__host__ __device__ constexpr int slots(int rows) { return rows == 8 ? 4 : 2; }

__host__ __device__ constexpr int code_bits(int f) {
    return f == WF_16 ? 16 : f == WF_INT4 || f == WF_MXFP4 || f == WF_NVFP4 ? 4 : 8;
}

// Units of a warpgroup in a step: what a warp multiplies at once. NVFP4's scales take registers.
__host__ __device__ constexpr int part_units(int f) {
    return code_bits(f) == 16 || f == WF_NVFP4 ? 1 : 2;
}

// How a problem is cut, and where things lie in shared memory (bytes from a multiple of 1024).
struct division {
    int32_t cluster, clusters, tiles;
    int32_t step;    // units of K: of four warpgroups, or of two with gate and up
    int32_t x_units; // kept for all tiles; 0: brought with every step
    int32_t stages;
    int32_t senders;    // sums of a strip
    int32_t sums_bytes; // of all strips (pairs of them, when gated) that a CTA finishes
    int32_t scale_stage, x_stage, x_stride; // bytes of a stage; from a row of x to the next
    int32_t at_x, at_scale, at_sums, at_turn, at_bars, bytes;
};

// A CTA finishes `strips_of` neighbouring strips of the four (with gate and up: pairs of them); in
// a cluster of eight every other CTA finishes one.
__host__ __device__ __forceinline__ int strips_of(const division &d) {
    return d.cluster < 4 ? 4 / d.cluster : 1;
}

// --- What only clusters have
// ------------------------------------------------------------------------------------------------

__device__ __forceinline__ void cluster_arrive() {
    asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
}
__device__ __forceinline__ void cluster_wait() {
    asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
}
__device__ __forceinline__ uint32_t remote_address(uint32_t at, uint32_t rank) {
    uint32_t r;
    asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(r) : "r"(at), "r"(rank));
    return r;
}
__device__ __forceinline__ void remote_arrive(uint32_t bar) {
    asm volatile("mbarrier.arrive.shared::cluster.b64 _, [%0];" ::"r"(bar) : "memory");
}
// Four floats into another CTA's shared memory, counted by a barrier there.
__device__ __forceinline__ void remote_store(uint32_t to, const float *v, uint32_t bar) {
    asm volatile("st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v4.f32 [%0], "
                 "{%1, %2, %3, %4}, [%5];" ::"r"(to),
                 "f"(v[0]), "f"(v[1]), "f"(v[2]), "f"(v[3]), "r"(bar)
                 : "memory");
}
// --- Loading
// ------------------------------------------------------------------------------------------------

// The part of K of a CTA, in units from `begin`, whole granules of 128 inputs.
struct part {
    int32_t begin, end, steps;
};
__device__ __forceinline__ part part_of(const linear_args &p, const division &d, uint32_t rank) {
    const int32_t pairs = (p.units + 1) / 2;
    part k;
    k.begin = pairs * (int32_t)rank / d.cluster * 2;
    k.end = min(pairs * ((int32_t)rank + 1) / d.cluster * 2, p.units);
    k.steps = (k.end - k.begin + d.step - 1) / d.step;
    return k;
}

// Barriers: full and empty of each stage, sums complete and sums read of each slot.
struct barriers {
    uint32_t full, empty, sums, read;
};

template <typename T, int F, int NT, int G> struct loader {
    static constexpr int kPart = part_units(F);
    static constexpr int unit = 512 * code_bits(F), code_stage = 4 * kPart * unit;
    static constexpr int kGranule = G ? G : 128, part_rows = kPart * 64 / kGranule;
    const linear_args &p;
    const division &d;
    const barriers &bar;
    part k;
    uint32_t base;

    // Codes and scales of all steps, by one thread. What a step takes is known beforehand but for
    // the last one of a tile.
    __device__ void weights(int tile0) const {
        const uint64_t policy = policy_evict_first();
        const int64_t code_half = (int64_t)p.half_blocks * p.units * unit;
        const int64_t scale_half = (int64_t)p.half_blocks * p.granules * p.granule_bytes;
        const int halves = p.paired ? 2 : 1;
        int stage = 0, parity = 1;
        bool again = false;
        for (int tile = tile0; tile < d.tiles; tile += d.clusters) {
            const uint8_t *code = p.code + ((int64_t)tile * p.units + k.begin) * unit;
            const uint8_t *scale =
                p.scale + ((int64_t)tile * p.granules + k.begin * 64 / kGranule) * p.granule_bytes;
            int n = d.step, code_bytes = n * unit;
            int scale_bytes = G ? n * 64 / kGranule * p.granule_bytes : 0;
            int all = halves * (code_bytes + scale_bytes);
            for (int u = k.begin; u < k.end; u += d.step) {
                if (u + d.step >= k.end) { // K may end within it
                    n = k.end - u;
                    code_bytes = n * unit;
                    scale_bytes = G ? (n * 64 + kGranule - 1) / kGranule * p.granule_bytes : 0;
                    all = halves * (code_bytes + scale_bytes);
                }
                const uint32_t full = bar.full + stage * 8, to = base + stage * code_stage;
                const uint32_t scale_to = base + d.at_scale + stage * d.scale_stage;
                if (again) barrier_wait(bar.empty + stage * 8, parity);
                barrier_arrive_expect(full, all);
                copy_bulk(to, code, code_bytes, full, policy);
                if (G) copy_bulk(scale_to, scale, scale_bytes, full, policy);
                if (p.paired) {
                    copy_bulk(to + 2 * kPart * unit, code + code_half, code_bytes, full, policy);
                    if (G)
                        copy_bulk(scale_to + 2 * part_rows * p.granule_bytes, scale + scale_half,
                                  scale_bytes, full, policy);
                }
                code += code_bytes;
                scale += scale_bytes;
                if (++stage == d.stages) stage = 0, parity ^= 1, again = true;
            }
        }
    }

    // n units of all rows of x from u, by `threads` threads of which this is number i.
    __device__ void rows(int u, int n, uint32_t to, int i, int threads) const {
        const int warps = threads / 32;
        const T *x = static_cast<const T *>(p.x) + u * 64;
        for (int row = i / 32; row < p.m; row += warps)
            for (int c = i % 32; c < n * 8; c += 32) {
                const bool there = u * 64 + c * 8 < p.k; // else zeros, which codes past K meet
                asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(
                                 to + row * d.x_stride + c * 16),
                             "l"(there ? x + row * p.ldx + c * 8 : x), "r"(there ? 16 : 0)
                             : "memory");
            }
    }

    // x of all steps, by one warp.
    __device__ void inputs(int tile0) const {
        wait_for_previous();
        int stage = 0, parity = 1;
        for (int tile = tile0; tile < d.tiles; tile += d.clusters)
            for (int u = k.begin; u < k.end; u += d.step) {
                barrier_wait(bar.empty + stage * 8, parity);
                rows(u, min(d.step, k.end - u), base + d.at_x + stage * d.x_stage, threadIdx.x % 32,
                     32);
                barrier_arrive_copies(bar.full + stage * 8);
                if (++stage == d.stages) stage = 0, parity ^= 1;
            }
    }
};

// --- Multiplying
// ------------------------------------------------------------------------------------------------

// One unit of one strip in registers: codes, x fragments by atom, raw scales.
template <int F, int NT, int G> struct fragments {
    static constexpr int rows = G && G < 64 ? 64 / G : 1; // granules
    uint4 code[code_bits(F) / 4];
    uint32_t x[4][NT / 8][2];
    dequant_packed scale[rows];
};

// This lane's places: in the codes and scales of the first stage and in the first unit of x.
struct places {
    uint32_t code, scale, x;
    int place;
};

template <int F, int NT, int G>
__device__ __forceinline__ void load_unit(fragments<F, NT, G> &f, uint32_t code, uint32_t x,
                                          uint32_t scale, const places &at, const linear_args &p) {
#pragma unroll
    for (int c = 0; c < code_bits(F) / 4; c++) f.code[c] = shared_u128(code + c * 512);
    if (NT == 8) {
#pragma unroll
        for (int h = 0; h < 2; h++) load_matrices(&f.x[2 * h][0][0], x + h * 64);
    } else {
#pragma unroll
        for (int j = 0; j < 4; j++) load_matrices(&f.x[j][0][0], x + j * 32);
    }
    if (G)
#pragma unroll
        for (int i = 0; i < fragments<F, NT, G>::rows; i++)
            dequant_load_packed<F>(f.scale[i], scale + i * p.granule_bytes, at.place, p.sym);
}

// n units at once: their chains of mma.sync are independent.
template <typename T, int F, int NT, int G, int N>
__device__ __forceinline__ void multiply_units(float (&acc)[NT / 8][4],
                                               const fragments<F, NT, G> (&f)[N]) {
    constexpr int rows = fragments<F, NT, G>::rows, bits = code_bits(F);
#pragma unroll
    for (int i = 0; i < rows; i++) {
        dequant_sums s[N];
        float sum[N][NT / 8][4] = {};
#pragma unroll
        for (int u = 0; u < N; u++) dequant_unpack<T, F>(s[u], f[u].scale[i]);
#pragma unroll
        for (int j = i * 4 / rows; j < (i + 1) * 4 / rows; j++)
#pragma unroll
            for (int u = 0; u < N; u++) {
                uint32_t a[4];
                dequant_word<T, F, false>(
                    a, reinterpret_cast<const uint32_t *>(f[u].code) + j * bits / 4, s[u].codes);
#pragma unroll
                for (int t = 0; t < NT / 8; t++)
                    multiply(sum[u][t], a, f[u].x[j][t][0], f[u].x[j][t][1], T{});
            }
#pragma unroll
        for (int u = 0; u < N; u++)
#pragma unroll
            for (int t = 0; t < NT / 8; t++)
#pragma unroll
                for (int e = 0; e < 4; e++)
                    acc[t][e] = G ? fmaf(s[u].scale[e / 2], sum[u][t][e], acc[t][e])
                                  : acc[t][e] + sum[u][t][e];
    }
}

// --- Sums of a tile
// ------------------------------------------------------------------------------------------------

// To the CTA that finishes this warp's strip. In a slot: [strip][sender][8 x rows][lane][4].
template <int NT>
__device__ __forceinline__ void send(const float (&acc)[NT / 8][4], const division &d,
                                     const barriers &bar, uint32_t base, uint32_t rank, int slot,
                                     bool paired) {
    const int wg = threadIdx.x / 128, strip = threadIdx.x / 32 % 4, lane = threadIdx.x % 32;
    const uint32_t owner = strip * d.cluster / 4;
    const int local = strip % strips_of(d) * (paired ? 2 : 1) + (paired ? wg % 2 : 0);
    const int sender = paired ? rank * 2 + wg / 2 : rank * 4 + wg;
    const uint32_t to = remote_address(base + d.at_sums + slot * d.sums_bytes, owner) +
                        (local * d.senders + sender) * (NT * 64) + lane * 16;
    const uint32_t sums = remote_address(bar.sums + slot * 8, owner);
#pragma unroll
    for (int t = 0; t < NT / 8; t++) remote_store(to + t * 512, acc[t], sums);
}

template <int NT>
__device__ __forceinline__ void sum_senders(float (&c)[4], uint32_t from, int senders) {
    c[0] = c[1] = c[2] = c[3] = 0.f;
#pragma unroll 4
    for (int i = 0; i < senders; i++) {
        const uint4 v = shared_u128(from + i * (NT * 64));
        c[0] += __uint_as_float(v.x), c[1] += __uint_as_float(v.y);
        c[2] += __uint_as_float(v.z), c[3] += __uint_as_float(v.w);
    }
}

// The strip of this warp, if this CTA finishes it.
template <typename T, int NT>
__device__ __forceinline__ void finish(const linear_args &p, const division &d, const barriers &bar,
                                       uint32_t base, uint32_t rank, int tile, int turn, bool more,
                                       float *stage) {
    constexpr int kSlots = slots(NT);
    const int strip = threadIdx.x / 32 % 4, lane = threadIdx.x % 32, slot = turn % kSlots;
    if (strip * d.cluster / 4 != (int)rank) return;
    barrier_wait(bar.sums + slot * 8, turn / kSlots % 2);
    const int per = strips_of(d), halves = p.paired ? 2 : 1;
    if (strip % per == 0 && lane == 0 && more)
        barrier_arrive_expect(bar.sums + slot * 8, d.sums_bytes);
    const uint32_t from = base + d.at_sums + slot * d.sums_bytes +
                          strip % per * halves * d.senders * (NT * 64) + lane * 16;
    const int32_t half = !p.paired && tile >= p.half_blocks ? 1 : 0;
    const int32_t in_half = (tile - half * p.half_blocks) * 64 + strip * 16;
    if (in_half < p.half_rows) {
        const int32_t col = half * p.half_rows + in_half + lane % 4 * 4;
        const linear_outputs o = linear_outputs_of<T>(p, 0, tile, col);
        linear_outputs o_up = o;
        if (p.paired) o_up = linear_outputs_of<T>(p, 0, tile + p.half_blocks, col + p.half_rows);
#pragma unroll
        for (int t = 0; t < NT / 8; t++) {
            if (8 * t >= p.m) continue;
            float c[4], up[4];
            sum_senders<NT>(c, from + t * 512, d.senders);
            if (p.paired) {
                sum_senders<NT>(up, from + d.senders * (NT * 64) + t * 512, d.senders);
                linear_emit<T, true>(p, 8 * t, p.m, col, c, up, o, o_up, stage);
            } else {
                linear_emit<T, false>(p, 8 * t, p.m, col, c, c, o, o, stage);
            }
        }
    }
    __syncwarp();
    if (more && lane < d.cluster) remote_arrive(remote_address(bar.read + slot * 8, lane));
}

// --- The warps that multiply
// ------------------------------------------------------------------------------------------------

template <typename T, int F, int NT, int G> struct multiplier {
    using L = loader<T, F, NT, G>;
    using unit = fragments<F, NT, G>;
    static constexpr int N = L::kPart;
    const L &load;
    places at;
    int ahead; // units of a step before those of this warpgroup
    int stage, parity;

    __device__ void begin() {
        const linear_args &p = load.p;
        const division &d = load.d;
        const int wg = threadIdx.x / 128, strip = threadIdx.x / 32 % 4, lane = threadIdx.x % 32;
        const int in = p.paired ? wg % 2 * 2 + wg / 2 : wg; // place among the parts of a stage
        ahead = (p.paired ? wg / 2 : wg) * N;
        at.code = load.base + in * N * L::unit + strip * (L::unit / 4) + lane * 16;
        at.scale = load.base + d.at_scale + in * L::part_rows * p.granule_bytes;
        at.place = strip * 16 + lane / 4 * 2;
        // Rows past M give outputs that nobody stores.
        const int row = NT == 8 ? lane % 8 : lane / 16 * 8 + lane % 8;
        at.x = load.base + d.at_x + ahead * 128 + min(row, p.m - 1) * d.x_stride +
               (NT == 8 ? lane / 8 : lane / 8 % 2) * 16;
        asm volatile("" : "+r"(at.code), "+r"(at.scale), "+r"(at.place), "+r"(at.x));
        stage = parity = 0;
        if (!d.x_units) return;
        load.rows(load.k.begin, load.k.end - load.k.begin, load.base + d.at_x, threadIdx.x,
                  32 * kWarps);
        asm volatile("cp.async.wait_all;\n"
                     "bar.sync 1, %0;" ::"n"(32 * kWarps)
                     : "memory");
    }

    __device__ void fetch(unit &to, int i, int step) const { // unit i of this step's
        const division &d = load.d;
        load_unit<F, NT, G>(to, at.code + stage * L::code_stage + i * L::unit,
                            at.x + (d.x_units ? step * d.step * 128 : stage * d.x_stage) + i * 128,
                            at.scale + stage * d.scale_stage +
                                (i * 64 / L::kGranule) * load.p.granule_bytes,
                            at, load.p);
    }
    __device__ void release() {
        __syncwarp();
        if (threadIdx.x % 32 == 0) barrier_arrive(load.bar.empty + stage * 8);
        if (++stage == load.d.stages) stage = 0, parity ^= 1;
    }

    // This warp's sums of a tile.
    __device__ void tile(float (&acc)[NT / 8][4]) {
        int left = load.k.end - load.k.begin - ahead; // units from this warpgroup's first
        for (int step = 0; step < load.k.steps; step++, left -= load.d.step) {
            barrier_wait(load.bar.full + stage * 8, parity);
            if (left >= N) {
                unit f[N];
#pragma unroll
                for (int i = 0; i < N; i++) fetch(f[i], i, step);
                release();
                multiply_units<T, F, NT, G, N>(acc, f);
            } else {
                if (left == 1) {
                    unit f[1];
                    fetch(f[0], 0, step);
                    multiply_units<T, F, NT, G, 1>(acc, f);
                }
                release();
            }
        }
        constexpr float mend = dequant_factor<T, F>();
#pragma unroll
        for (int t = 0; t < NT / 8; t++)
#pragma unroll
            for (int e = 0; e < 4; e++) acc[t][e] *= mend;
    }
};

// By one thread.
template <int NT> __device__ __forceinline__ void init(const barriers &bar, const division &d) {
    for (int i = 0; i < d.stages; i++) {
        barrier_init(bar.full + i * 8, d.x_units ? 1 : 1 + 32);
        barrier_init(bar.empty + i * 8, kWarps);
    }
    for (int i = 0; i < slots(NT); i++) {
        barrier_init(bar.sums + i * 8, 1);
        barrier_init(bar.read + i * 8, 4);
        barrier_arrive_expect(bar.sums + i * 8, d.sums_bytes);
    }
    barrier_init_fence();
}

template <typename T, int F, int NT, int G>
__global__ void __launch_bounds__(kThreads, 1)
    linear_short(const __grid_constant__ linear_args p, const __grid_constant__ division d) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL) // never launched, and empty, on other architectures
    constexpr int kSlots = slots(NT);
    extern __shared__ uint8_t shared[];
    uint8_t *start = shared + ((1024 - (shared_address(shared) & 1023)) & 1023);
    const uint32_t base = shared_address(start), rank = cluster_rank();
    const int warp = __shfl_sync(~0u, threadIdx.x / 32, 0);
    const int tile0 = blockIdx.x / d.cluster;
    barriers bar;
    bar.full = base + d.at_bars;
    bar.empty = bar.full + d.stages * 8;
    bar.sums = bar.empty + d.stages * 8;
    bar.read = bar.sums + kSlots * 8;

    launch_dependents();
    if (threadIdx.x == 32 * kLoader) init<NT>(bar, d);
    const loader<T, F, NT, G> load = {p, d, bar, part_of(p, d, rank), base};
    __syncthreads();
    cluster_arrive();

    if (warp >= kLoader) {
        if (threadIdx.x == 32 * kLoader)
            load.weights(tile0);
        else if (warp > kLoader && !d.x_units)
            load.inputs(tile0);
        __syncwarp();
        cluster_wait();
        return;
    }

    wait_for_previous();
    if (warp >= kWarps) {
        float *turn = reinterpret_cast<float *>(start + d.at_turn) + warp % 4 * LINEAR_STAGE_FLOATS;
        cluster_wait();
        for (int tile = tile0, count = 0; tile < d.tiles; tile += d.clusters, count++)
            finish<T, NT>(p, d, bar, base, rank, tile, count, tile + kSlots * d.clusters < d.tiles,
                          turn);
        return;
    }

    multiplier<T, F, NT, G> work = {load, {}, 0, 0, 0};
    work.begin();
    int count = 0;
    for (int tile = tile0; tile < d.tiles; tile += d.clusters, count++) {
        float acc[NT / 8][4] = {};
        work.tile(acc);
        if (count == 0) cluster_wait(); // all barriers of the cluster are there
        const int slot = count % kSlots;
        if (count >= kSlots) barrier_wait(bar.read + slot * 8, count / kSlots % 2 ^ 1);
        send<NT>(acc, d, bar, base, rank, slot, p.paired);
    }
#endif
}

enum { kRoom = 226 * 1024, kStages = 16 };

// The division among at most `most` clusters of c CTAs; stages = 0 when x leaves no room.
template <int F, int NT, int G> division divide(const linear_args *a, int c, int most) {
    using L = loader<__half, F, NT, G>;
    division d = {};
    d.cluster = c;
    d.tiles = a->paired ? a->half_blocks : a->blocks;
    const int rounds = (d.tiles + most - 1) / most;
    d.clusters = (d.tiles + rounds - 1) / rounds;
    d.step = (a->paired ? 2 : 4) * L::kPart;
    d.senders = c * (a->paired ? 2 : 4);
    d.sums_bytes = strips_of(d) * (a->paired ? 2 : 1) * d.senders * NT * 64;
    d.scale_stage = G ? (4 * L::part_rows * a->granule_bytes + 127) / 128 * 128 : 0;
    const int sums = slots(NT) * d.sums_bytes, turn = 4 * LINEAR_STAGE_FLOATS * 4;
    const int bars = kStages * 16 + slots(NT) * 16, stage = L::code_stage + d.scale_stage;
    int room = kRoom - 1024 - sums - turn - bars;
    // From a row of x to the next 16 bytes modulo 128, which ldmatrix reads without conflicts.
    const int units = ((a->units + 1) / 2 + c - 1) / c * 2;
    const int x_all = (a->m * (units * 128 + 16) + 127) / 128 * 128;
    if (room - x_all >= 3 * stage && room - x_all >= 40 * 1024) d.x_units = units;
    d.x_stride = (d.x_units ? units : d.step) * 128 + 16;
    d.x_stage = d.x_units ? 0 : (a->m * d.x_stride + 127) / 128 * 128;
    if (d.x_units) room -= x_all;
    const int steps = rounds * ((units + d.step - 1) / d.step), fit = room / (stage + d.x_stage);
    d.stages = fit < kStages ? fit : kStages;
    if (d.stages > steps) d.stages = steps;
    d.at_x = d.stages * L::code_stage;
    d.at_sums = d.at_x + (d.x_units ? x_all : d.stages * d.x_stage);
    d.at_scale = d.at_sums + sums;
    d.at_turn = d.at_scale + d.stages * d.scale_stage;
    d.at_bars = d.at_turn + turn;
    d.bytes = d.at_bars + bars + 1024;
    return d;
}

// Clusters of two fit every SM. Larger ones leave out the SMs of a GPC that make no whole cluster,
// but with them x fits for longer K.
constexpr int kClusters[] = {2, 4, 8};

template <typename T, int F, int NT, int G>
status launch(const linear_args *args, int32_t n_sms, int32_t per_sm, kernel_stream stream) {
    const auto kernel = linear_short<T, F, NT, G>;
    cudaLaunchAttribute with[2];
    with[0].id = cudaLaunchAttributeClusterDimension;
    with[0].val.clusterDim.y = with[0].val.clusterDim.z = 1;
    with[1].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    with[1].val.programmaticStreamSerializationAllowed = 1;
    cudaLaunchConfig_t config = {};
    config.blockDim = dim3(kThreads);
    config.dynamicSmemBytes = kRoom;
    config.attrs = with;
    config.numAttrs = 1;
    cudaError_t e =
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kRoom);
    static int most[COUNT_OF(kClusters)]; // that the GPU holds at once
    division d = {};
    for (int i = 0; i < (int)COUNT_OF(kClusters) && e == cudaSuccess && !d.x_units; i++) {
        const int c = kClusters[i];
        with[0].val.clusterDim.x = (unsigned)c;
        config.gridDim = dim3((unsigned)(n_sms * per_sm / c * c));
        if (!most[i]) e = cudaOccupancyMaxActiveClusters(&most[i], kernel, &config);
        if (e != cudaSuccess || !most[i]) break;
        const division other = divide<F, NT, G>(args, c, most[i]);
        if (i == 0 || other.x_units) d = other;
    }
    if (e != cudaSuccess) return FAIL(ST_DEVICE, "linear_short: %s", cudaGetErrorString(e));
    if (d.stages < 1) return FAIL(ST_UNSUPPORTED, "linear_short: no room for %d rows", args->m);
    with[0].val.clusterDim.x = (unsigned)d.cluster;
    config.gridDim = dim3((unsigned)(d.clusters * d.cluster));
    config.dynamicSmemBytes = (size_t)d.bytes;
    config.stream = (cudaStream_t)stream;
    config.numAttrs = 2;
    e = cudaLaunchKernelEx(&config, kernel, *args, d);
    return e == cudaSuccess ? ST_OK : FAIL(ST_DEVICE, "linear_short: %s", cudaGetErrorString(e));
}

#define T_F16  __half
#define T_BF16 __nv_bfloat16
#define ROW(F, T, NT, G)                                                                           \
    {"short_" #NT, 90, 90, WF_##F, DT_##T, NT, 4, 1, G, G, 1, launch<T_##T, WF_##F, NT, G>, NT},
const linear_variant rows[] = {SHORT_INSTANCES(ROW)};

} // namespace

extern "C" linear_table linear_short_table(void) {
    return linear_table{rows, (int32_t)(sizeof rows / sizeof rows[0])};
}
