// linear_short.cu - y^T = W x^T for few rows of x, on sm_90: as fast as the weights can be read.
//
// A cluster of C CTAs shares a tile (a block of 64 rows of W; with gate and up 64 of each) along K.
// Cluster c takes tiles c, c + clusters, ... Each CTA keeps its part of x in shared memory for all
// of its tiles. Of a CTA's warps
//
//    8 multiply: each has a part of the CTA's inputs (with gate and up four share what eight have)
//      and all 64 rows, and brings its codes and scales itself, through a ring of its own in shared
//      memory (cp.async): warps wait for nothing of each other's
//    2 finish the tiles: they add up what the others have found
//
// Up to 8 rows a CTA takes half of an SM's registers and, where x is not too large and the launch
// not too long, of its shared memory: the CTAs of the next launch (programmatic dependent launch)
// then find room beside those that still work and fill their rings, since weights depend on no
// kernel. For that every launch has a CTA for each SM, if some have nothing to do: they wait like
// all others for the launch before to end, so that no SM comes to hold two of one launch. Where
// other kernels run between linears an SM may be empty and would come to hold two: there a CTA
// takes more than half of the shared memory (linear_problem.apart).
//
// mma.sync multiplies codes as they lie, as far as that is exact: 4-bit integers are subnormals of
// f16 (times 2^-24, or 2^-20 for rows that have the other half of a byte), or 128 + code in bf16;
// bytes 1024 + code in f16. Sums over x alone, one product more for each 16 inputs, then take away
// what is too much, zero points included; the scale meets the sums in f32. Sums of a tile go to the
// CTA that finishes them (st.async into its shared memory, whose barrier counts the bytes) and are
// added there in order of K. Clusters do not wait for each other, and there is no workspace: the
// bits are the same on every run.
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

enum { kWarps = 8, kFinishers = 2, kThreads = 32 * (kWarps + kFinishers) };
// Shared memory of a CTA: two an SM, or one; the least of which an SM has no two.
enum { kHalf = 113 * 1024, kRoom = 227 * 1024, kApart = 114 * 1024 };

__host__ __device__ constexpr int code_bits(int f) {
    return f == WF_16 ? 16 : f == WF_INT4 || f == WF_MXFP4 || f == WF_NVFP4 ? 4 : 8;
}

// Units of a batch: registers.
__host__ __device__ constexpr int batch_units(int f, int g) {
    return code_bits(f) > 4 || (f == WF_INT4 && g < 128) || f == WF_NVFP4 ? 1 : 2;
}

// On an SM, as far as registers go.
__host__ __device__ constexpr int ctas(int f, int rows) {
    return rows == 8 && f != WF_NVFP4 ? 2 : 1;
}

// How a problem is cut, and where things lie in shared memory (bytes from a multiple of 128).
struct division {
    int32_t cluster, clusters;
    int32_t tiles;                 // blocks; with gate and up pairs of them
    int32_t deep, ring_bytes;      // batches of a warp's ring: 2 to 4
    int32_t senders;               // sums of a chunk
    int32_t sums_bytes;            // of all chunks (pairs of them, when gated) that a CTA finishes
    int32_t x_stride;              // bytes from a row of x to the next
    int64_t code_step, scale_step; // from a tile of a cluster to its next
    int32_t at_x, at_sums, at_bars, bytes;
};

// The chunks of a tile, 16 rows by 8 rows of x, are finished by CTAs q C / Q: each has `per` of
// them, or in large clusters some CTAs have one and others none.
template <int NT> struct chunks {
    static constexpr int all = 4 * (NT / 8);
    static __host__ __device__ __forceinline__ int per(int cluster) {
        return cluster < all ? all / cluster : 1;
    }
    static __device__ __forceinline__ bool some(int rank, int cluster) {
        return rank * all % cluster == 0;
    }
};

// --- Copies of a thread
// ------------------------------------------------------------------------------------------------

__device__ __forceinline__ void copy_16(uint32_t to, const void *from) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(from) : "memory");
}
__device__ __forceinline__ void copy_16_or_zeros(uint32_t to, const void *from, bool there) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from),
                 "r"(there ? 16 : 0)
                 : "memory");
}
__device__ __forceinline__ void copies_commit() {
    asm volatile("cp.async.commit_group;" ::: "memory");
}
// All but the last `n` commits of this thread have landed.
template <int n> __device__ __forceinline__ void copies_wait() {
    asm volatile("cp.async.wait_group %0;" ::"n"(n) : "memory");
}

// Units of K from `begin`, whole granules of 128 inputs: the i-th of n parts.
struct part {
    int32_t begin, end;
};
__device__ __forceinline__ part part_of(const linear_args &p, int i, int n) {
    const int32_t pairs = (p.units + 1) / 2;
    part k;
    k.begin = pairs * i / n * 2;
    k.end = min(pairs * (i + 1) / n * 2, p.units);
    return k;
}

// Sums complete, sums read, and for each part of the inputs whether a half of its x is there.
enum { kBarriers = 2 + kWarps * 2 };
struct barriers {
    uint32_t sums, read, x;
};

// --- A warp's ring of codes and scales
// ------------------------------------------------------------------------------------------------

template <int F, int G> struct ring {
    static constexpr int N = batch_units(F, G), unit = 512 * code_bits(F);
    static constexpr int granules = !G ? 0 : N * 64 > G ? N * 64 / G : 1; // of a batch
    static constexpr int granule_max = F == WF_INT4 ? 192 : F == WF_FP8B ? 16 : 64;
    static constexpr int code_bytes = N * unit;
    static constexpr int slot_bytes = (code_bytes + granules * granule_max + 63) / 64 * 64;

    const linear_args &p;
    const division &d;
    int batches;       // of a tile
    bool odd;          // the last has one unit only
    uint32_t at, ends; // the slot to be read and then filled; behind the last
    // What is asked for next: tiles to come, batch, this lane's place in codes and scales.
    int tiles, batch;
    const uint8_t *code, *scale;
    int32_t in; // this lane's 16 bytes of 512

    // Part k of the tiles from tile0. up: 1, of its blocks.
    __device__ __forceinline__ ring(const linear_args &p, const division &d, part k, int up,
                                    uint32_t begins, int tile0)
        : p(p), d(d), at(begins), ends(begins + d.ring_bytes), batch(0) {
        const int block = tile0 + up * p.half_blocks;
        batches = (k.end - k.begin + N - 1) / N;
        odd = (k.end - k.begin) % N;
        tiles = batches && tile0 < d.tiles ? (d.tiles - tile0 + d.clusters - 1) / d.clusters : 0;
        in = threadIdx.x % 32 * 16;
        code = p.code + ((int64_t)block * p.units + k.begin) * unit + in;
        if (G) {
            scale = p.scale +
                    ((int64_t)block * p.granules + k.begin * 64 / (G ? G : 1)) * p.granule_bytes +
                    in;
        }
        asm volatile("" : "+r"(in));
    }

    // Asks for the next batch, if there is one, into the slot that was read.
    __device__ __forceinline__ void fetch() {
        if (tiles > 0) {
            batch++;
            const bool last = batch == batches, all = N == 1 || !(last && odd);
#pragma unroll
            for (int i = 0; i < N * unit; i += 512)
                if (i < unit || all) copy_16(at + in + i, code + i);
            if (G) {
                const int bytes = (all ? granules : (granules + 1) / 2) * p.granule_bytes;
#pragma unroll
                for (int i = 0; i < (granules * granule_max + 511) / 512; i++)
                    if (in + i * 512 < bytes)
                        copy_16(at + code_bytes + in + i * 512, scale + i * 512);
                if (G <= N * 64 || batch % 2 == 0) scale += granules * p.granule_bytes;
            }
            code += N * unit;
            if (last) {
                code += d.code_step - (int64_t)batches * (N * unit);
                if (G)
                    scale += d.scale_step -
                             (G > N * 64 ? batches / 2 : batches) * granules * p.granule_bytes;
                batch = 0;
                tiles--;
            }
        }
        copies_commit();
        at += slot_bytes;
        if (at == ends) at -= d.ring_bytes;
    }
    __device__ __forceinline__ void wait() const {
        if (d.deep == 2)
            copies_wait<1>();
        else if (d.deep == 3)
            copies_wait<2>();
        else
            copies_wait<3>();
        __syncwarp();
    }
};

// --- Multiplying
// ------------------------------------------------------------------------------------------------

// Codes of a unit and raw scales of a granule, of S strips from strip s0 of this warp's.
template <int F, int S>
__device__ __forceinline__ void load_codes(uint4 (&f)[S][code_bits(F) / 4], uint32_t code, int s0) {
#pragma unroll
    for (int s = 0; s < S; s++)
#pragma unroll
        for (int c = 0; c < code_bits(F) / 4; c++)
            f[s][c] = shared_u128(code + ((s0 + s) * code_bits(F) / 4 + c) * 512);
}
template <int F, int S, int C>
__device__ __forceinline__ void load_scales(dequant_packed (&f)[S], uint32_t from, int place,
                                            int s0, const linear_args &p) {
#pragma unroll
    for (int s = s0; s < s0 + C; s++) dequant_load_packed<F>(f[s], from, place + s * 16, p.sym);
}

// A unit of x: four atoms of NT rows.
template <int NT> struct inputs { uint32_t x[4][NT / 8][2]; };
template <int NT> __device__ __forceinline__ void load_inputs(inputs<NT> &f, uint32_t x) {
    if (NT == 8) {
#pragma unroll
        for (int h = 0; h < 2; h++) load_matrices(&f.x[2 * h][0][0], x + h * 64);
    } else {
#pragma unroll
        for (int j = 0; j < 4; j++) load_matrices(&f.x[j][0][0], x + j * 32);
    }
}

// Codes as they are multiplied: something added to each, or all times a power of two, that no
// instruction of their own takes away. Sums of x mend the one, `mend` the other.
template <typename T, int F> struct raw {
    static constexpr bool bf16 = half_pair<T>::bf16;
    static constexpr bool zeros = F == WF_INT4 || (F == WF_INT8 && !bf16);
    // Of rows g and g + 8: what the products' sums are to be multiplied with.
    static constexpr float mend0 = F == WF_INT4 && !bf16 ? 16777216.f : dequant_factor<T, F>();
    static constexpr float mend1 = F == WF_INT4 && !bf16 ? 1048576.f : dequant_factor<T, F>();
    // An A fragment whose products are the sums of x, of rows g + 8 those times mend0 / mend1.
    static constexpr uint32_t one0 = bf16 ? 0x3f803f80u : 0x3c003c00u;
    static constexpr uint32_t one1 = F == WF_INT4 && !bf16 ? 0x4c004c00u : one0;

    static __device__ __forceinline__ void word(uint32_t (&a)[4], const uint32_t *word) {
        if (F == WF_INT4 && !bf16) { // subnormal: codes times 2^-24, of rows g + 8 times 2^-20
            const uint32_t v = word[0], high = v >> 8;
            a[0] = v & 0x000f000fu;
            a[1] = v & 0x00f000f0u;
            a[2] = high & 0x000f000fu;
            a[3] = high & 0x00f000f0u;
        } else if (F == WF_INT4) { // plus 128
#pragma unroll
            for (int i = 0; i < 4; i++) a[i] = and_or<0x000f000fu>(word[0] >> 4 * i, 0x43004300u);
        } else if (F == WF_INT8 && !bf16) { // stored plus 128; plus 1024
#pragma unroll
            for (int i = 0; i < 4; i++)
                a[i] = __byte_perm(word[i / 2], 0x64646464u, i % 2 ? 0x4341 : 0x4240);
        } else {
            dequant_word<T, F, false>(a, word, dequant_scales{});
        }
    }
    // Scales of rows g and g + 8, and what the sums of x are to be multiplied with and taken away.
    static __device__ __forceinline__ void scales(float (&s)[2], float (&z)[2],
                                                  const dequant_packed &from) {
        dequant_unpack<F>(s, from);
        if (F == WF_INT8) {
            z[0] = z[1] = 1152.f;
        } else if (bf16) { // 128 + z
            z[0] = __uint_as_float(__byte_perm(from.zero, 0x43000000u, 0x7055));
            z[1] = __uint_as_float(__byte_perm(from.zero, 0x43000000u, 0x7155));
        } else { // subnormal too
            const uint32_t pair = __byte_perm(from.zero, 0, 0x4140);
            const __half2 h = *reinterpret_cast<const __half2 *>(&pair);
            z[0] = __low2float(h);
            z[1] = __high2float(h);
        }
    }
};

// Sums of a granule, of S strips and of x itself: as many chains of mma.sync that are independent.
template <typename T, int F, int NT, int S> struct granule_sums {
    using W = raw<T, F>;
    float strip[S][NT / 8][4], x[NT / 8][4];

    // Strips s0 .. s0 + C - 1; x with the first of them.
    template <int C> __device__ __forceinline__ void clear(int s0) {
#pragma unroll
        for (int t = 0; t < NT / 8; t++)
#pragma unroll
            for (int e = 0; e < 4; e++) {
                if (s0 == 0) x[t][e] = 0.f;
#pragma unroll
                for (int s = s0; s < s0 + C; s++) strip[s][t][e] = 0.f;
            }
    }
    // Atoms j0 .. j1 - 1 of a unit of x, and of C strips from s0.
    __device__ __forceinline__ void add_x(const inputs<NT> &in, int j0, int j1) {
        const uint32_t one[4] = {W::one0, W::one1, W::one0, W::one1};
#pragma unroll
        for (int j = j0; W::zeros && j < j1; j++)
#pragma unroll
            for (int t = 0; t < NT / 8; t++) multiply(x[t], one, in.x[j][t][0], in.x[j][t][1], T{});
    }
    template <int C>
    __device__ __forceinline__ void add(const uint4 (&code)[C][code_bits(F) / 4],
                                        const inputs<NT> &in, int s0, int j0, int j1) {
#pragma unroll
        for (int j = j0; j < j1; j++)
#pragma unroll
            for (int s = 0; s < C; s++) {
                uint32_t a[4];
                W::word(a, reinterpret_cast<const uint32_t *>(code[s]) + j * code_bits(F) / 4);
#pragma unroll
                for (int t = 0; t < NT / 8; t++)
                    multiply(strip[s0 + s][t], a, in.x[j][t][0], in.x[j][t][1], T{});
            }
    }
    template <int G, int C>
    __device__ __forceinline__ void scaled_to(float (&acc)[S][NT / 8][4],
                                              const dequant_packed (&packed)[S], int s0) const {
#pragma unroll
        for (int s = s0; s < s0 + C; s++) {
            float scale[2], zero[2];
            W::scales(scale, zero, packed[s]);
#pragma unroll
            for (int t = 0; t < NT / 8; t++)
#pragma unroll
                for (int e = 0; e < 4; e++) {
                    const float v =
                        W::zeros ? fmaf(-zero[e / 2], x[t][e], strip[s][t][e]) : strip[s][t][e];
                    acc[s][t][e] = G ? fmaf(scale[e / 2], v, acc[s][t][e]) : acc[s][t][e] + v;
                }
        }
    }
};

// A batch from the ring, times x; the ring is asked for another as soon as all is in registers.
template <typename T, int F, int NT, int G>
__device__ __forceinline__ void multiply_batch(float (&acc)[4][NT / 8][4], ring<F, G> &r, bool both,
                                               uint32_t x, int place) {
    using R = ring<F, G>;
    constexpr int S = 4, N = R::N, rows = G && G < 64 ? 64 / G : 1; // granules of a unit
    // Strips at once: registers.
    constexpr int C = code_bits(F) == 16 ? 1 : code_bits(F) == 8 || G == 64 || G == 16 ? 2 : S;
    granule_sums<T, F, NT, S> sum;
    dequant_packed scale[S];
    inputs<NT> in;
    load_inputs(in, x);
    r.wait();
    const uint32_t from = r.at, scales = from + R::code_bytes;
#pragma unroll
    for (int u = 0; u < N; u++) {
        uint4 code[C][code_bits(F) / 4];
        if (u > 0 && both) load_inputs(in, x + u * 128);
#pragma unroll
        for (int s0 = 0; s0 < S; s0 += C) {
            if (u == 0 || both) load_codes<F, C>(code, from + u * R::unit + r.in, s0);
#pragma unroll
            for (int i = 0; i < rows; i++) {
                if (G && (u == 0 || (both && G <= 64)))
                    load_scales<F, S, C>(scale, scales + (u * rows + i) * r.p.granule_bytes, place,
                                         s0, r.p);
                if (u == N - 1 && s0 == S - C && i == rows - 1) {
                    __syncwarp();
                    r.fetch();
                }
                if (u == 0 || both) {
                    if (u == 0 || (G && G <= 64)) sum.template clear<C>(s0);
                    if (s0 == 0) sum.add_x(in, i * 4 / rows, (i + 1) * 4 / rows);
                    sum.template add<C>(code, in, s0, i * 4 / rows, (i + 1) * 4 / rows);
                    if (G && G <= 64) sum.template scaled_to<G, C>(acc, scale, s0);
                }
            }
        }
    }
    if (!G || G > 64) sum.template scaled_to<G, S>(acc, scale, 0);
}

// --- Sums of a tile
// ------------------------------------------------------------------------------------------------

// To the CTAs that finish them. In a slot: [chunk][gate, up][sender][lane][4].
template <int NT>
__device__ __forceinline__ void send(const float (&acc)[4][NT / 8][4], const division &d,
                                     const barriers &bar, uint32_t base, int sender, int half,
                                     bool paired) {
    using Q = chunks<NT>;
    const int per = Q::per(d.cluster), halves = paired ? 2 : 1, lane = threadIdx.x % 32;
#pragma unroll
    for (int q = 0; q < Q::all; q++) {
        const uint32_t owner = q * d.cluster / Q::all;
        const uint32_t to = remote_address(base + d.at_sums, owner);
        remote_store(to + ((q % per * halves + half) * d.senders + sender) * 512 + lane * 16,
                     acc[q / (NT / 8)][q % (NT / 8)], remote_address(bar.sums, owner));
    }
}

__device__ __forceinline__ void sum_senders(float (&c)[4], uint32_t from, int senders) {
    c[0] = c[1] = c[2] = c[3] = 0.f;
#pragma unroll 8
    for (int i = 0; i < senders; i++) {
        const uint4 v = shared_u128(from + i * 512);
        c[0] += __uint_as_float(v.x), c[1] += __uint_as_float(v.y);
        c[2] += __uint_as_float(v.z), c[3] += __uint_as_float(v.w);
    }
}

// Every second of this CTA's chunks of a tile, by finisher number `me`.
template <typename T, int NT>
__device__ __forceinline__ void finish(const linear_args &p, const division &d, const barriers &bar,
                                       uint8_t *shared, int rank, int tile, int turn, bool more,
                                       int me) {
    using Q = chunks<NT>;
    const int lane = threadIdx.x % 32, per = Q::per(d.cluster);
    const int halves = p.paired ? 2 : 1;
    if (!Q::some(rank, d.cluster)) return;
    for (int local = me; local < per; local += kFinishers) {
        const int q = rank * Q::all / d.cluster + local, t = q % (NT / 8);
        const int block = tile, strip = q / (NT / 8);
        const int half = !p.paired && block >= p.half_blocks ? 1 : 0;
        const int32_t in_half = (block - half * p.half_blocks) * 64 + strip * 16;
        const int32_t col = half * p.half_rows + in_half + lane % 4 * 4;
        const bool there = block < p.blocks && in_half < p.half_rows && 8 * t < p.m;
        linear_outputs o = {}, o_up = {};
        if (there) {
            o = linear_outputs_of<T>(p, 0, block, col, strip);
            if (p.paired)
                o_up = linear_outputs_of<T>(p, 0, block + p.half_blocks, col + p.half_rows, strip);
        }
        barrier_wait(bar.sums, turn % 2);
        if (local == 0 && lane == 0 && more) barrier_arrive_expect(bar.sums, d.sums_bytes);
        // Where the sums lay is free for what turns them.
        uint8_t *at = shared + d.at_sums + local * halves * d.senders * 512;
        float *stage = reinterpret_cast<float *>(at);
        const uint32_t from = shared_address(at) + lane * 16;
        if (there) {
            float c[4], up[4];
            sum_senders(c, from, d.senders);
            if (p.paired) {
                sum_senders(up, from + d.senders * 512, d.senders);
                linear_emit<T, true>(p, 8 * t, p.m, col, c, up, o, o_up, stage);
            } else {
                linear_emit<T, false>(p, 8 * t, p.m, col, c, c, o, o, stage);
            }
        }
        __syncwarp();
        if (more && lane < d.cluster) remote_arrive(remote_address(bar.read, lane));
    }
}

// --- The kernel
// ------------------------------------------------------------------------------------------------

// x of part k, by one warp, one half of its batches after the other. Rows in turn from one that
// differs from CTA to CTA: they all want the same lines of L2 at once. All that can be known before
// the wait is made before it.
template <typename T>
__device__ __forceinline__ void load_x(const linear_args &p, const division &d, part k, int first,
                                       uint32_t to, uint32_t bar, int row0) {
    const int64_t ld = p.ldx * 2;
    const uint8_t *x = static_cast<const uint8_t *>(p.x);
    const int left = p.k * 2 - k.begin * 128, end = (k.end - k.begin) * 128;
    int at = threadIdx.x % 32 * 16;
    const uint8_t *from = x + row0 * ld + k.begin * 128 + at;
    to += row0 * d.x_stride + at;
    asm volatile("" : "+l"(from), "+r"(to), "+r"(at));
    wait_for_previous();
#pragma unroll
    for (int h = 0; h < 2; h++) {
        for (; at < (h ? end : first); at += 512, from += 512, to += 512) {
            const bool there = at < left; // else zeros, which codes past K meet
            for (int row = row0, i = 0; i < p.m; i++) {
                copy_16_or_zeros(to, there ? from : x, there);
                from += ld;
                to += d.x_stride;
                if (++row == p.m) row = 0, from -= p.m * ld, to -= p.m * d.x_stride;
            }
        }
        barrier_arrive_copies(bar + h * 8);
    }
}

// By one thread.
template <int NT> __device__ __forceinline__ void init(const barriers &bar, const division &d) {
    barrier_init(bar.sums, 1);
    for (int i = 0; i < kWarps * 2; i++) barrier_init(bar.x + i * 8, 32);
    barrier_init(bar.read, chunks<NT>::all);
    barrier_arrive_expect(bar.sums, d.sums_bytes);
    barrier_init_fence();
}

template <typename T, int F, int NT, int G>
__global__ void __launch_bounds__(kThreads, ctas(F, NT))
    linear_short(const __grid_constant__ linear_args p, const __grid_constant__ division d) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL) // never launched, and empty, on other architectures
    extern __shared__ __align__(128) uint8_t shared[];
    const uint32_t base = shared_address(shared);
    const int rank = cluster_rank(), lane = threadIdx.x % 32;
    const int warp = __shfl_sync(~0u, threadIdx.x / 32, 0);
    const int tile0 = blockIdx.x / d.cluster;
    const barriers bar = {base + d.at_bars, base + d.at_bars + 8, base + d.at_bars + 16};

    launch_dependents();
    if (threadIdx.x == 32 * kWarps) init<NT>(bar, d);

    if (warp >= kWarps) {
        __syncthreads();
        cluster_arrive();
        wait_for_previous();
        cluster_wait();
        for (int tile = tile0, count = 0; tile < d.tiles; tile += d.clusters, count++)
            finish<T, NT>(p, d, bar, shared, rank, tile, count, tile + d.clusters < d.tiles,
                          warp - kWarps);
        return;
    }

    using R = ring<F, G>;
    const int groups = p.paired ? kWarps / 2 : kWarps, half = warp / groups;
    const int sender = rank * groups + warp % groups;
    const part k = part_of(p, sender, d.senders);
    R r(p, d, k, half, base + warp * d.ring_bytes, tile0);
    for (int i = 0; i < d.deep; i++) r.fetch();
    __syncthreads();
    cluster_arrive();
    const uint32_t x_from = base + d.at_x + (k.begin - part_of(p, rank, d.cluster).begin) * 128;
    const uint32_t x_there = bar.x + warp % groups * 16;
    const int first = (r.batches + 1) / 2; // batches of the first half
    if (half == 0 && tile0 < d.tiles)
        load_x<T>(p, d, k, first * R::N * 128, x_from, x_there, (tile0 + warp) % p.m);
    cluster_wait(); // all barriers of the cluster are there
    // Rows past M give outputs that nobody stores.
    const int row = NT == 8 ? lane % 8 : lane / 16 * 8 + lane % 8;
    uint32_t x = x_from + min(row, p.m - 1) * d.x_stride + (NT == 8 ? lane / 8 : lane / 8 % 2) * 16;
    int place = lane / 4 * 2;
    asm volatile("" : "+r"(place), "+r"(x));
    int turn = 1;
    for (int tile = tile0; tile < d.tiles; tile += d.clusters) {
        float acc[4][NT / 8][4] = {};
        for (int b = 1; b <= r.batches; b++, x += R::N * 128) {
            if (tile == tile0 && (b == 1 || b == first + 1))
                barrier_wait(x_there + (b > 1 ? 8 : 0), 0);
            multiply_batch<T, F, NT, G>(acc, r, R::N == 1 || !(b == r.batches && r.odd), x, place);
        }
        x -= r.batches * R::N * 128;
#pragma unroll
        for (int s = 0; s < 4; s++)
#pragma unroll
            for (int t = 0; t < NT / 8; t++)
#pragma unroll
                for (int e = 0; e < 4; e++)
                    acc[s][t][e] *= e < 2 ? raw<T, F>::mend0 : raw<T, F>::mend1;
        if (tile != tile0) barrier_wait(bar.read, turn); // the sums of the tile before
        turn ^= 1;
        send<NT>(acc, d, bar, base, sender, half, p.paired);
    }
#endif
}

// The division among at most `most` clusters of c CTAs, and about how many cycles it takes; bytes
// = 0 when x leaves no room.
template <int F, int NT, int G>
division divide(const linear_args *a, int c, int most, int *cycles) {
    using R = ring<F, G>;
    division d = {};
    d.cluster = c;
    d.tiles = a->paired ? a->half_blocks : a->blocks;
    // Also where there are fewer tiles: each SM then has one CTA of every launch.
    d.clusters = most;
    const int rounds = (d.tiles + most - 1) / most;
    d.code_step = (int64_t)most * a->units * R::unit;
    d.scale_step = (int64_t)most * a->granules * a->granule_bytes;
    d.senders = c * (a->paired ? kWarps / 2 : kWarps);
    d.sums_bytes = chunks<NT>::per(c) * (a->paired ? 2 : 1) * d.senders * 512;
    // From a row of x to the next 16 bytes modulo 128, which ldmatrix reads without conflicts.
    const int units = ((a->units + 1) / 2 + c - 1) / c * 2;
    d.x_stride = units * 128 + 16;
    const int x = (a->m * d.x_stride + 127) / 128 * 128, rest = x + d.sums_bytes + kBarriers * 8,
              ring = kWarps * R::slot_bytes;
    const int slice = ((a->units + 1) / 2 + d.senders - 1) / d.senders * 2;
    const int tile = slice * kWarps * (R::unit + (G ? 64 * a->granule_bytes / G : 0));
    // An SM's share of memory is 18 bytes a cycle. Large clusters have few batches of a tile each
    // and wait for each other's sums.
    const int read = rounds * (tile / 18 + (c > 2 ? 1000 : 100));
    // The next launch's CTA beside this one, where that counts: long launches are better off with
    // more batches on their way. Clusters of more than two are not spread evenly over SMs with room
    // for two CTAs.
    const bool shared_sm = c <= 2 && ctas(F, NT) == 2 && rest + 2 * ring <= kHalf && read < 40000;
    d.deep = ((shared_sm ? kHalf : kRoom) - rest) / ring;
    if (d.deep > 4) d.deep = 4;
    d.ring_bytes = d.deep * R::slot_bytes;
    d.at_x = d.deep * ring;
    d.at_sums = d.at_x + x;
    d.at_bars = d.at_sums + d.sums_bytes;
    d.bytes = shared_sm ? d.at_bars + kBarriers * 8 : kRoom;
    if (a->apart && d.bytes < kApart) d.bytes = kApart;
    // L2 gives an SM 24 bytes of x a cycle.
    *cycles = read + a->m * units * 128 / 24 + (shared_sm ? 0 : 2000) + (c > 2 ? 2000 : 0);
    if (d.deep < 2) d.bytes = 0;
    return d;
}

// Clusters of two fit every SM. Larger ones leave out the SMs of a GPC that make no whole cluster.
constexpr int kClusters[] = {1, 2, 4, 8};

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
    static int most[COUNT_OF(kClusters)]; // that the GPU holds at once, one CTA an SM
    division d = {};
    int best = 0;
    for (int i = 0; i < (int)COUNT_OF(kClusters) && e == cudaSuccess; i++) {
        const int c = kClusters[i];
        with[0].val.clusterDim.x = (unsigned)c;
        config.gridDim = dim3((unsigned)(n_sms * per_sm / c * c));
        if (!most[i]) e = cudaOccupancyMaxActiveClusters(&most[i], kernel, &config);
        if (e != cudaSuccess || !most[i]) break;
        int cycles;
        const division other = divide<F, NT, G>(args, c, most[i], &cycles);
        if (other.bytes && (!d.bytes || cycles < best)) d = other, best = cycles;
    }
    if (e != cudaSuccess) return FAIL(ST_DEVICE, "linear_short: %s", cudaGetErrorString(e));
    if (!d.bytes) return FAIL(ST_UNSUPPORTED, "linear_short: no room for %d rows", args->m);
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
