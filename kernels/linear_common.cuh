// linear_common.cuh - what the linear kernels of both families share: the problem as a kernel
// sees it, the walk over it, the exchange of partial sums, and the epilogue.
//
// Work is counted in steps: one step is KU units (64 inputs each) of one tile of 2 R blocks x NT
// rows of x. The first sk_tiles tiles are one long line of steps that is cut evenly over all CTAs
// (stream-K); the others are dealt out whole. Of a tile that two or three CTAs share, all but the
// first deposit their sums in the workspace and the first adds them to its own. Of a tile that
// more share, all deposit, wait at their end for each other, and finish a part of it each. Either
// way sums are added in ascending order of K. The cuts depend on the problem's shape and the
// number of CTAs alone, so the bits are the same on every run. All CTAs of a launch must fit the
// GPU at once.
//
// Eight warps compute: warp w takes strip w % 4 of blocks (w / 4) R .. + R - 1 of the tile. A
// lane's accumulators of one strip are those of mma m16n8: [4 j + 0, 1] = row g, x rows 8 j + 2
// t, + 1; [4 j + 2, 3] = row g + 8.
#ifndef LINEAR_COMMON_CUH
#define LINEAR_COMMON_CUH
#include "linear_dequant.cuh"
#include "linear_epilogue.cuh"
#include "mma_sync.cuh"

enum { LINEAR_EXPERTS_MAX = 512, LINEAR_WARPS = 8, LINEAR_SUMS_BYTES = 256 * 1024 };

__host__ __device__ constexpr int linear_code_bits(int format) {
    return format == WF_16                                                 ? 16
           : format == WF_INT4 || format == WF_MXFP4 || format == WF_NVFP4 ? 4
                                                                           : 8;
}
// Largest bytes of a granule of one block.
__host__ __device__ constexpr int linear_granule_bytes(int format) {
    return format == WF_INT4 ? 192 : format == WF_MXFP4 || format == WF_NVFP4 ? 64 : 16;
}

struct linear_args {
    const uint8_t *code, *scale; // [count][code_bytes], [count][scale_bytes]
    const void *bias;            // [count, n] or NULL
    const float *channel;      // [count][blocks * 64], formats that scale in the epilogue; or NULL
    const float *global_scale; // [count] or NULL
    const void *x;
    void *y;
    int64_t ldx, ldy, code_bytes, scale_bytes;
    const int32_t *expert_start, *x_row;
    float *partial;
    int32_t *counters;
    int32_t m, n, k, count;
    int32_t half_rows, half_blocks, blocks, units, granules, granule_bytes, granule, granule_shift;
    int32_t epilogue, sym, y_f32, paired; // paired: a tile holds blocks b and b + half_blocks
    float limit;
    int32_t n_tiles, steps;  // tiles along N; steps of one tile
    int32_t cut_cost;        // steps that sharing tiles costs a CTA
    int32_t x_box;           // rows of x that come at once
    int32_t team;            // CTAs that share a tile; 1: as the walk says
    int32_t part, part_rest; // of a tile's steps: of each CTA of a team; one more of so many
    int32_t apart, routed;   // as in linear_problem
    float *sums;             // zeros when no launch is under way
    linear_ahead ahead;      // as in linear_problem
    const int32_t *told;     // as in linear_problem
    const float *x_scale;    // x is codes: of its rows, to be read in eights
    act_format act;          // not A16, to kernels that round x: to values of these codes
};

// Where the sums of a problem of 16-bit operands go, k being bytes of a row of those.
template <typename T> linear_output linear_output_of(const linear_args *p) {
    linear_output a = {};
    a.bias = p->bias;
    a.y = p->y;
    a.ldy = p->ldy;
    a.m = p->m;
    a.n = p->n;
    a.k = p->k * 2;
    a.half = p->half_rows;
    a.epilogue = (linear_epilogue)p->epilogue;
    a.limit = p->limit;
    a.gated = p->paired;
    a.bf16 = half_pair<T>::bf16;
    a.y_f32 = p->y_f32;
    return a;
}

// --- Walk ----------------------------------------------------------------------------------------

struct linear_segment {
    int32_t expert, m0, m_end, tile_n; // rows [m0, m_end) of the permuted problem
    int32_t step0, step1;              // of the tile
    int32_t line;                      // place of the tile's first step in the line; -1: not cut
};

// Rows of each of `tiles` tiles, alike but for the last: multiples of 16.
__device__ __forceinline__ int32_t linear_even_rows(int32_t rows, int32_t tiles) {
    return ((rows + tiles - 1) / tiles + 15) / 16 * 16;
}

// kAligned: where the CTAs, or 7/8 of them, are a multiple of the tiles, so many CTAs take a tile
// each, and none has parts of two: for kernels that begin a tile with nothing on its way.
// kEven: tiles of up to NT rows, alike; and the launch says what a cut costs.
template <int NT, bool kAligned = false, bool kEven = false> struct linear_walk {
    static constexpr int32_t kBand = 8, kBandMost = 8 << 20; // tiles of x, and their elements
    const linear_args &p;
    const int32_t *tile_start; // [count + 1] in shared memory, grouped problems only
    int32_t tiles, cta, ctas, tile, share, rest, at, end;
    int32_t per; // CTAs a tile; 0: the line is cut evenly

    __device__ linear_walk(const linear_args &p, const int32_t *tile_start)
        : linear_walk(p, tile_start, (int32_t)(gridDim.x - 1 - blockIdx.x), (int32_t)gridDim.x) {}
    __device__ linear_walk(const linear_args &p, const int32_t *tile_start, int32_t cta,
                           int32_t ctas)
        : p(p), tile_start(tile_start), cta(cta), ctas(ctas) {
        tiles = tile_start ? tile_start[p.count] : p.n_tiles * ((p.m + NT - 1) / NT);
        int32_t sk_tiles = tiles;
        // Not worth cutting: waves of whole tiles that are at least 15/16 full, or where cutting
        // saves less than it costs (tall tiles of kAligned: four steps). Else, of many tiles only
        // the last wave and what is left over, so that most tiles are nobody's but one CTA's.
        const int32_t waves = (tiles + ctas - 1) / ctas;
        if (kEven || (kAligned && NT >= 128)
                ? (waves * ctas - tiles) * p.steps <= (kEven ? p.cut_cost : 4) * ctas
                : tiles * 16 >= waves * ctas * 15)
            sk_tiles = 0;
        else if (tiles > 2 * ctas)
            sk_tiles = tiles % ctas + ctas;
        share = sk_tiles * p.steps / ctas;
        rest = sk_tiles * p.steps % ctas;
        per = 0;
        if (kAligned && sk_tiles == tiles && tiles > 0) {
            per = min(ctas / tiles, p.steps);
            if (tiles * per * 8 < ctas * 7) per = 0;
        }
        at = cut(cta);
        end = cut(cta + 1);
        if (kAligned) { // the CTAs past the last tile's have nothing
            at = min(at, sk_tiles * p.steps);
            end = min(end, sk_tiles * p.steps);
        }
        tile = sk_tiles + cta;
    }
    // First step of CTA i: all have `share` steps, the first `rest` one more, where not aligned.
    __device__ int32_t cut(int32_t i) const {
        if (kAligned && per) return i / per * p.steps + i % per * p.steps / per;
        return i * share + min(i, rest);
    }
    // The CTA that has a step of the line.
    __device__ int32_t holder(int32_t step) const {
        if (kAligned && per)
            return step / p.steps * per + ((step % p.steps + 1) * per - 1) / p.steps;
        const int32_t longer = rest * (share + 1);
        return step < longer ? step / (share + 1) : rest + (step - longer) / share;
    }

    __device__ bool next(linear_segment &s) {
        int32_t t;
        if (at < end) {
            t = at / p.steps;
            s.line = t * p.steps;
            s.step0 = at - s.line;
            s.step1 = min(p.steps, s.step0 + (end - at));
            at += s.step1 - s.step0;
        } else if (tile < tiles) {
            t = tile;
            tile += ctas;
            s.line = -1;
            s.step0 = 0;
            s.step1 = p.steps;
        } else {
            return false;
        }
        locate(t, s);
        return true;
    }

    // Which rows and which part of W tile t is.
    __device__ void locate(int32_t t, linear_segment &s) const {
        s.expert = 0;
        int32_t row0 = 0, row1 = p.m;
        if (tile_start) {
            int32_t lo = 0, hi = p.count; // the last expert whose first tile is not past t
            while (hi - lo > 1) {
                const int32_t mid = (lo + hi) / 2;
                if (tile_start[mid] <= t)
                    lo = mid;
                else
                    hi = mid;
            }
            s.expert = lo;
            row0 = p.expert_start[lo];
            row1 = p.expert_start[lo + 1];
            t -= tile_start[lo];
        }
        const int32_t m_tiles = (row1 - row0 + NT - 1) / NT;
        const int32_t rows = kEven ? linear_even_rows(row1 - row0, m_tiles) : NT;
        // Tiles that share weights are neighbours. Of many tiles of x a band passes over all of W,
        // then the next: so its rows are still in L2 when they are read again, if they fit it.
        int32_t first = 0, band = m_tiles;
        if (kAligned && m_tiles > kBand && (int64_t)kBand * NT * p.k <= kBandMost) {
            first = t / (kBand * p.n_tiles) * kBand;
            t -= first * p.n_tiles;
            band = min(kBand, m_tiles - first);
        }
        s.tile_n = t / band;
        s.m0 = row0 + (first + t - s.tile_n * band) * rows;
        s.m_end = min(row1, s.m0 + rows);
    }
};

// First tile of every expert, by all threads of the CTA; experts without rows have none.
template <int NT> __device__ void linear_tile_starts(int32_t *tile_start, const linear_args &p) {
    for (int e = threadIdx.x; e < p.count; e += blockDim.x)
        tile_start[e + 1] = (p.expert_start[e + 1] - p.expert_start[e] + NT - 1) / NT * p.n_tiles;
    __syncthreads();
    if (threadIdx.x < 32) {
        int32_t sum = 0;
#pragma unroll 1
        for (int e0 = 0; e0 < p.count; e0 += 32) {
            const int e = e0 + (int)threadIdx.x;
            int32_t v = e < p.count ? tile_start[e + 1] : 0;
#pragma unroll
            for (int d = 1; d < 32; d *= 2) {
                const int32_t u = __shfl_up_sync(~0u, v, d);
                if ((int)threadIdx.x >= d) v += u;
            }
            if (e < p.count) tile_start[e + 1] = sum + v;
            sum += __shfl_sync(~0u, v, 31);
        }
        if (threadIdx.x == 0) tile_start[0] = 0;
    }
    __syncthreads();
}

// Block r = 0..R-1 of warp group wg (0 .. GROUPS - 1) in tile_n; may be >= blocks (nothing there)
// when not paired.
template <int R, int GROUPS = 2>
__device__ __forceinline__ int32_t linear_block(const linear_args &p, int32_t tile_n, int wg,
                                                int r) {
    if (R % 2 == 0 && p.paired) {
        const int32_t b = (tile_n * GROUPS + wg) * (R / 2) + r / 2;
        return b < p.half_blocks ? b + r % 2 * p.half_blocks : p.blocks;
    }
    return (tile_n * GROUPS + wg) * R + r;
}

// --- Epilogue ------------------------------------------------------------------------------------

template <typename T> struct alignas(8) four { T v[4]; };

// Two groups of 8 x rows, rounded, to shared memory: x row i of the warp's 16 outputs lies at
// 32 i, its halves the other way round in every second four rows. `at`: linear_place_at.
__device__ __forceinline__ void linear_place_16(uint32_t at, const uint32_t (&v)[4]) {
    asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(at),
                 "r"(v[0]), "r"(v[1]), "r"(v[2]), "r"(v[3])
                 : "memory");
}
__device__ __forceinline__ uint32_t linear_place_at(int row, int half) {
    return row * 32 + ((half ^ row >> 2 & 1) << 4);
}

// Sixteen bytes to a multiple of 16, or of 8 when not wide. (As C it becomes four stores.)
__device__ __forceinline__ void linear_store_16(void *to, uint4 v, bool wide) {
    if (wide)
        asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(to), "r"(v.x), "r"(v.y),
                     "r"(v.z), "r"(v.w)
                     : "memory");
    else
        asm volatile(
            "st.global.v2.u32 [%0], {%1, %2};\nst.global.v2.u32 [%0+8], {%3, %4};" ::"l"(to),
            "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w)
            : "memory");
}
// Whether every eight outputs of 16 bits lie at a multiple of 16 bytes.
__device__ __forceinline__ bool linear_wide(const linear_args &p) {
    return ((p.ldy | (int64_t)(reinterpret_cast<uintptr_t>(p.y) / 2)) & 7) == 0;
}

// The thread, read anew: what follows from it is then not kept in registers through the main loop.
__device__ __forceinline__ int linear_thread_anew() {
    int i;
    asm volatile("mov.u32 %0, %%tid.x;" : "=r"(i)::"memory");
    return i;
}

__device__ __forceinline__ float4 linear_gate_all(float4 g, float4 u, int epilogue, float limit) {
    return make_float4(
        linear_gate(g.x, u.x, epilogue, limit), linear_gate(g.y, u.y, epilogue, limit),
        linear_gate(g.z, u.z, epilogue, limit), linear_gate(g.w, u.w, epilogue, limit));
}
__device__ __forceinline__ float4 linear_gate_all(float4 g, float4 u, const linear_args &p) {
    return linear_gate_all(g, u, p.epilogue, p.limit);
}

enum {
    LINEAR_STAGE_FLOATS = 8 * 20
}; // one warp's 8 x rows of 16 outputs, rows padded by one vector

// Eight x rows of one strip: from the fragment (lane = 4 g + t) to lane = 4 row + n / 4.
__device__ __forceinline__ float4 linear_turn(const float *c, float *stage,
                                              unsigned thread = threadIdx.x) {
    const int lane = thread % 32, g = lane / 4, t = lane % 4;
    __syncwarp();
    stage[(2 * t) * 20 + g] = c[0];
    stage[(2 * t + 1) * 20 + g] = c[1];
    stage[(2 * t) * 20 + g + 8] = c[2];
    stage[(2 * t + 1) * 20 + g + 8] = c[3];
    __syncwarp();
    return *reinterpret_cast<const float4 *>(stage + lane / 4 * 20 + lane % 4 * 4);
}

// What the four outputs of a lane are multiplied with and what is added.
struct linear_outputs {
    float4 scale, bias;
};

template <typename T>
__device__ __forceinline__ linear_outputs linear_outputs_of(const linear_args &p, int32_t expert,
                                                            int32_t block, int32_t row,
                                                            int strip = threadIdx.x / 32 % 4,
                                                            int quad = threadIdx.x % 4) {
    linear_outputs o = {{1.f, 1.f, 1.f, 1.f}, {0.f, 0.f, 0.f, 0.f}};
    if (p.channel)
        o.scale = *reinterpret_cast<const float4 *>(
            p.channel + ((int64_t)expert * p.blocks + block) * 64 + strip * 16 + quad * 4);
    if (p.global_scale) {
        const float g = p.global_scale[expert];
        o.scale = make_float4(g, g, g, g);
    }
    if (p.bias) {
        const four<T> b = *reinterpret_cast<const four<T> *>(static_cast<const T *>(p.bias) +
                                                             (int64_t)expert * p.n + row);
        o.bias = make_float4(to_f32(b.v[0]), to_f32(b.v[1]), to_f32(b.v[2]), to_f32(b.v[3]));
    }
    return o;
}

__device__ __forceinline__ float4 linear_affine(float4 v, const linear_outputs &o) {
    return make_float4(fmaf(v.x, o.scale.x, o.bias.x), fmaf(v.y, o.scale.y, o.bias.y),
                       fmaf(v.z, o.scale.z, o.bias.z), fmaf(v.w, o.scale.w, o.bias.w));
}

// kPlain: nothing is added to y, which is of type T.
template <typename T, bool kPlain = false>
__device__ __forceinline__ void linear_put(const linear_args &p, int32_t row_x, int32_t col,
                                           float4 v) {
    const int64_t at = (int64_t)row_x * p.ldy + col;
    if (!kPlain && p.y_f32) {
        float4 *y = reinterpret_cast<float4 *>(static_cast<float *>(p.y) + at);
        if (p.epilogue == LINEAR_RESIDUAL) {
            const float4 old = *y;
            v = make_float4(v.x + old.x, v.y + old.y, v.z + old.z, v.w + old.w);
        }
        *y = v;
        return;
    }
    four<T> *y = reinterpret_cast<four<T> *>(static_cast<T *>(p.y) + at);
    if (!kPlain && p.epilogue == LINEAR_RESIDUAL) {
        const four<T> old = *y;
        v = make_float4(v.x + to_f32(old.v[0]), v.y + to_f32(old.v[1]), v.z + to_f32(old.v[2]),
                        v.w + to_f32(old.v[3]));
    }
    *y = four<T>{{from_f32<T>(v.x), from_f32<T>(v.y), from_f32<T>(v.z), from_f32<T>(v.w)}};
}

// Where block r of this warp's group goes.
struct linear_place {
    int32_t block, col; // col: of this lane's four outputs in W's rows
    bool there;
};

template <int R, int GROUPS>
__device__ __forceinline__ linear_place linear_place_of(const linear_args &p,
                                                        const linear_segment &s, int r,
                                                        unsigned thread = threadIdx.x) {
    const int warp = thread / 32, strip = warp % 4;
    linear_place at;
    at.block = linear_block<R, GROUPS>(p, s.tile_n, warp / 4 % GROUPS, r);
    const int32_t half = at.block >= p.half_blocks ? 1 : 0;
    const int32_t in_half = (at.block - half * p.half_blocks) * 64 + strip * 16;
    at.there = at.block < p.blocks && in_half < p.half_rows;
    at.col = half * p.half_rows + in_half + thread % 4 * 4;
    return at;
}

// Eight x rows from m0 of one block (and of its other half, when gated). kPlain: sums are what y
// is, or gated by LINEAR_GATED, and of type T.
template <typename T, bool kGated, bool kPlain = false>
__device__ __forceinline__ void
linear_emit(const linear_args &p, int32_t m0, int32_t m_end, int32_t col, const float *c,
            const float *c_up, const linear_outputs &o, const linear_outputs &o_up, float *stage) {
    float4 v = linear_turn(c, stage);
    if (!kPlain) v = linear_affine(v, o);
    if (kGated) {
        float4 up = linear_turn(c_up, stage);
        if (!kPlain) up = linear_affine(up, o_up);
        v = linear_gate_all(v, up, kPlain ? LINEAR_GATED : p.epilogue, p.limit);
    }
    const int32_t row = m0 + threadIdx.x % 32 / 4;
    if (row < m_end) linear_put<T, kPlain>(p, row, col, v);
}

// Sums in registers, N places down. A loop over all groups of rows of a large tile, unrolled since
// registers have no addresses, would be most of a kernel: so a few groups are the code, and the
// next ones move to where it finds them.
template <int N, int M> __device__ __forceinline__ void linear_move_down(float (&acc)[M]) {
#pragma unroll
    for (int i = 0; i + N < M; i++) acc[i] = acc[i + N];
}

// What rows g and g + 8 of a strip are multiplied with and what is added.
struct linear_row_outputs {
    float scale[2], bias[2];
};
template <typename T>
__device__ __forceinline__ linear_row_outputs linear_row_outputs_of(const linear_args &p,
                                                                    int32_t expert, int32_t block,
                                                                    unsigned thread) {
    linear_row_outputs o = {{1.f, 1.f}, {0.f, 0.f}};
    const int32_t half = block >= p.half_blocks ? 1 : 0;
#pragma unroll
    for (int i = 0; i < 2; i++) {
        const int in = thread / 32 % 4 * 16 + thread % 32 / 4 + 8 * i;
        if (p.channel) o.scale[i] = p.channel[((int64_t)expert * p.blocks + block) * 64 + in];
        if (p.global_scale) o.scale[i] = p.global_scale[expert];
        if (p.bias)
            o.bias[i] =
                to_f32(static_cast<const T *>(p.bias)[(int64_t)expert * p.n + half * p.half_rows +
                                                      (block - half * p.half_blocks) * 64 + in]);
    }
    return o;
}

// Eight x rows of one strip, rounded: from the fragment to four outputs of x row lane / 4, those
// from 0, 8, 4 and 12 on by lane % 4.
template <typename T>
__device__ __forceinline__ uint2 linear_turn_16(const float (&v)[4], unsigned thread) {
    const bool odd = thread % 2;
    const uint32_t low = turned(pack2<T>(v[0], v[1])), high = turned(pack2<T>(v[2], v[3]));
    const uint32_t other = __shfl_xor_sync(~0u, odd ? low : high, 1);
    return odd ? make_uint2(other, high) : make_uint2(low, other);
}

// Finish the tile of this warp, whose sums it uses up. `stage`: LINEAR_STAGE_FLOATS of this warp,
// for what is f32 or added to y; all else, gated outputs too, is rounded before it is turned.
template <typename T, int NT, int R, int GROUPS = 2>
__device__ __forceinline__ void linear_finish(float (&acc)[R][NT / 2], const linear_args &p,
                                              const linear_segment &s, float *stage,
                                              unsigned thread = threadIdx.x) {
    constexpr int ALL = NT / 8, AT = ALL < 4 ? ALL : 4;
    const bool gated = R > 1 && p.paired, wide = p.y_f32 || p.epilogue == LINEAR_RESIDUAL;
    const int lane = linear_thread_anew() % 32;
    const int32_t row = s.m0 + lane / 4;
#pragma unroll
    for (int r = 0; r < R; r++) {
        constexpr int kUp = R > 1 ? 1 : 0; // block r + kUp is the up half of block r
        if (gated && (r % 2 || r + 1 == R)) continue;
        const linear_place at = linear_place_of<R, GROUPS>(p, s, r, thread);
        if (!at.there) continue;
        if (wide) {
            const linear_outputs o =
                linear_outputs_of<T>(p, s.expert, at.block, at.col, thread / 32 % 4, thread % 4);
#pragma unroll 1
            for (int j0 = 0; j0 < ALL && s.m0 + 8 * j0 < s.m_end; j0 += AT) {
#pragma unroll
                for (int j = 0; j < AT; j++) {
                    const float4 v = linear_affine(linear_turn(&acc[r][4 * j], stage, thread), o);
                    if (row + 8 * (j0 + j) < s.m_end)
                        linear_put<T>(p, row + 8 * (j0 + j), at.col, v);
                }
                linear_move_down<4 * AT>(acc[r]);
            }
            continue;
        }
        const linear_row_outputs o = linear_row_outputs_of<T>(p, s.expert, at.block, thread);
        T *y = static_cast<T *>(p.y) + (int64_t)row * p.ldy + at.col - lane % 4 * 4 + lane % 2 * 8 +
               lane % 4 / 2 * 4; // as linear_turn_16 has them
        const auto value = [&](const linear_row_outputs &of, const float *c, int e) {
            return fmaf(c[e], of.scale[e / 2], of.bias[e / 2]);
        };
        if (!gated) {
#pragma unroll
            for (int j = 0; j < ALL; j++, y += 8 * p.ldy) {
                float v[4];
#pragma unroll
                for (int e = 0; e < 4; e++) v[e] = value(o, &acc[r][4 * j], e);
                const uint2 out = linear_turn_16<T>(v, thread);
                if (row + 8 * j < s.m_end) *reinterpret_cast<uint2 *>(y) = out;
            }
            continue;
        }
        const linear_row_outputs up =
            linear_row_outputs_of<T>(p, s.expert, at.block + p.half_blocks, thread);
#pragma unroll 1
        for (int j0 = 0; j0 < ALL && s.m0 + 8 * j0 < s.m_end; j0 += AT) {
#pragma unroll
            for (int j = 0; j < AT; j++, y += 8 * p.ldy) {
                float v[4];
#pragma unroll
                for (int e = 0; e < 4; e++)
                    v[e] =
                        linear_gate(value(o, &acc[r][4 * j], e),
                                    value(up, &acc[(r + kUp) % R][4 * j], e), p.epilogue, p.limit);
                const uint2 out = linear_turn_16<T>(v, thread);
                if (row + 8 * (j0 + j) < s.m_end) *reinterpret_cast<uint2 *>(y) = out;
            }
            linear_move_down<4 * AT>(acc[r]);
            linear_move_down<4 * AT>(acc[(r + kUp) % R]);
        }
    }
}

// --- Tiles that several CTAs share ---------------------------------------------------------------

__device__ __forceinline__ int32_t counter_read(const int32_t *counter) {
    int32_t v;
    asm volatile("ld.acquire.gpu.global.s32 %0, [%1];" : "=r"(v) : "l"(counter) : "memory");
    return v;
}

// What a CTA must come back to: at most the tile that its cut begins in and the one that it ends
// in. Kept in shared memory, by warp; m_end is 0 where there is none.
struct linear_shared {
    linear_segment tile[2];             // the one it begins in, the one it ends in
    int32_t owner[2], rank[2], size[2]; // of its CTAs: the first, which this is, how many
};

__device__ __forceinline__ void linear_shared_init(linear_shared *shared) {
    if (threadIdx.x % 32 == 0) shared->tile[0].m_end = shared->tile[1].m_end = 0;
    __syncwarp();
}

// Slot of a CTA's sums, and warp's counters: arrivals and departures of the tile that `owner`
// begins. W: warps of a CTA that compute.
template <int NT, int R, int W = LINEAR_WARPS>
__device__ __forceinline__ float4 *linear_slot(const linear_args &p, int32_t cta, bool tail) {
    constexpr int N4 = R * NT / 8;
    const int warp = threadIdx.x / 32;
    return reinterpret_cast<float4 *>(p.partial) +
           ((int64_t)(cta * 2 + tail) * W + warp) * N4 * 32 + threadIdx.x % 32;
}
template <int W = LINEAR_WARPS>
__device__ __forceinline__ int32_t *linear_counter(const linear_args &p, int32_t owner) {
    return p.counters + (owner * W + (int)threadIdx.x / 32) * 2;
}

enum { LINEAR_OWNER_ADDS = 3 }; // CTAs of a tile up to which its first adds all

// What this warp has stored is there.
template <int W = LINEAR_WARPS>
__device__ __forceinline__ void linear_announce(const linear_args &p, int32_t owner) {
    __threadfence();
    __syncwarp();
    if (threadIdx.x % 32 == 0) atomicAdd(linear_counter<W>(p, owner), 1);
}

template <int NT, int R, int W = LINEAR_WARPS>
__device__ __forceinline__ void linear_deposit(float (&acc)[R][NT / 2], const linear_args &p,
                                               int32_t cta, int32_t owner,
                                               const linear_segment &s) {
    float4 *slot = linear_slot<NT, R, W>(p, cta, s.step0 == 0);
#pragma unroll
    for (int r = 0; r < R; r++)
#pragma unroll
        for (int j = 0; j < NT / 8; j++)
            if (s.m0 + 8 * j < s.m_end)
                __stcg(slot + (r * (NT / 8) + j) * 32,
                       make_float4(acc[r][4 * j], acc[r][4 * j + 1], acc[r][4 * j + 2],
                                   acc[r][4 * j + 3]));
    linear_announce<W>(p, owner);
}

// Wait until n CTAs have deposited.
__device__ __forceinline__ void linear_await(const int32_t *counter, int32_t n) {
    while (counter_read(counter) < n) __nanosleep(32);
    __syncwarp();
}

// The first of n CTAs of a tile adds the sums of the others to its own.
template <int NT, int R, int W = LINEAR_WARPS>
__device__ __forceinline__ void linear_collect(float (&acc)[R][NT / 2], const linear_args &p,
                                               const linear_segment &s, int32_t owner, int32_t n) {
    int32_t *counter = linear_counter<W>(p, owner);
    linear_await(counter, n - 1);
    for (int i = 1; i < n; i++) {
        const float4 *slot = linear_slot<NT, R, W>(p, owner + i, false);
#pragma unroll
        for (int r = 0; r < R; r++)
#pragma unroll
            for (int j = 0; j < NT / 8; j++) {
                if (s.m0 + 8 * j >= s.m_end) continue;
                const float4 v = __ldcg(slot + (r * (NT / 8) + j) * 32);
                acc[r][4 * j] += v.x;
                acc[r][4 * j + 1] += v.y;
                acc[r][4 * j + 2] += v.z;
                acc[r][4 * j + 3] += v.w;
            }
    }
    __syncwarp();
    if (threadIdx.x % 32 == 0)
        *counter = 0; // for the next launch, which writes after this one ended
}

// Sums of a tile that all its CTAs finish: a CTA's lie where zeros were, and nothing of them is +0;
// who wants them reads until they are there, and leaves zeros. That saves the way to L2 of a fence
// and of a counter. (A CTA that adds alone takes longer to leave zeros than to wait for those.)

// Strong, for it may be read meanwhile: each word is either what was there or what is stored.
__device__ __forceinline__ void linear_store_part(float4 *to, float4 v) {
    asm volatile("st.relaxed.gpu.global.v4.f32 [%0], {%1, %2, %3, %4};" ::"l"(to), "f"(v.x),
                 "f"(v.y), "f"(v.z), "f"(v.w)
                 : "memory");
}
// What lies there, or -0 where it is not wanted: as C it is a predicate of each load that lives on.
__device__ __forceinline__ float4 linear_load_part(const float4 *from, bool wanted) {
    float4 v;
    asm volatile("{\n.reg .pred p;\nsetp.ne.s32 p, %5, 0;\n"
                 "mov.f32 %0, 0f80000000;\nmov.f32 %1, 0f80000000;\n"
                 "mov.f32 %2, 0f80000000;\nmov.f32 %3, 0f80000000;\n"
                 "@p ld.relaxed.gpu.global.v4.f32 {%0, %1, %2, %3}, [%4];\n}"
                 : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w)
                 : "l"(from), "r"((int)wanted)
                 : "memory");
    return v;
}
__device__ __forceinline__ float linear_never_zero(float v) { // the least there is instead
    return __uint_as_float(max(__float_as_uint(v), 1u));
}
__device__ __forceinline__ bool linear_is_there(float4 v) {
    return min(min(__float_as_uint(v.x), __float_as_uint(v.y)),
               min(__float_as_uint(v.z), __float_as_uint(v.w))) != 0;
}

// Sums of groups of eight x rows of a CTA, 32 apart: of the tile that it begins (tail) or ends in.
template <int NT, int R>
__device__ __forceinline__ float4 *linear_part(const linear_args &p, int32_t cta, bool tail) {
    return reinterpret_cast<float4 *>(p.sums) +
           ((int64_t)(cta * 2 + tail) * LINEAR_WARPS + threadIdx.x / 32) * (R * NT / 8) * 32 +
           threadIdx.x % 32;
}
// Bytes of `sums` that the CTAs of an SM take, at most LINEAR_SUMS_BYTES.
template <int NT, int R> __host__ __device__ constexpr int linear_part_bytes(int ctas) {
    return ctas * 2 * LINEAR_WARPS * (R * NT / 8) * 512;
}

// Sums to where others find them; s: which rows there are.
template <int NT, int R>
__device__ __forceinline__ void linear_put_part(const float (&acc)[R][NT / 2], float4 *to,
                                                const linear_segment &s) {
#pragma unroll
    for (int r = 0; r < R; r++)
#pragma unroll
        for (int j = 0; j < NT / 8; j++)
            if (s.m0 + 8 * j < s.m_end)
                linear_store_part(to + (r * (NT / 8) + j) * 32,
                                  make_float4(linear_never_zero(acc[r][4 * j]),
                                              linear_never_zero(acc[r][4 * j + 1]),
                                              linear_never_zero(acc[r][4 * j + 2]),
                                              linear_never_zero(acc[r][4 * j + 3])));
}

// What to do with the sums of a segment that is not a whole tile; true: acc now holds the whole
// tile. Either way that sums travel is one piece of code, for it is a large one.
template <int NT, int R, typename W>
__device__ __forceinline__ bool linear_share(float (&acc)[R][NT / 2], const linear_args &p,
                                             const W &walk, const linear_segment &s,
                                             linear_shared *later) {
    const int32_t owner = walk.holder(s.line), n = walk.holder(s.line + p.steps - 1) - owner + 1;
    const bool all = n > LINEAR_OWNER_ADDS, first = s.step0 == 0;
    if (!all && first) {
        linear_collect<NT, R>(acc, p, s, owner, n);
        return true;
    }
    linear_put_part<NT, R>(
        acc, all ? linear_part<NT, R>(p, walk.cta, first) : linear_slot<NT, R>(p, walk.cta, first),
        s);
    if (all) {
        if (threadIdx.x % 32 == 0) {
            later->tile[first] = s;
            later->owner[first] = owner;
            later->rank[first] = walk.cta - owner;
            later->size[first] = n;
        }
    } else {
        linear_announce(p, owner);
    }
    return false;
}

// Groups of eight x rows of a block that a CTA finishes together: group j of block r; r < 0: none.
template <int AT> struct linear_groups { int32_t r[AT], j[AT]; };

// Their sums over all n CTAs. PARTS of each are under way: this is all latency.
template <int NT, int R, int AT>
__device__ __forceinline__ void linear_take_parts(float (&c)[AT][4], const linear_args &p,
                                                  const linear_groups<AT> &g, int32_t owner,
                                                  int32_t n) {
    constexpr int PARTS = NT == 16 || NT == 32 ? 2 : 4, SLOT = LINEAR_WARPS * (R * NT / 8) * 32;
    float4 *tile = linear_part<NT, R>(p, owner, true);
    for (int32_t i0 = 0; i0 < n; i0 += PARTS) {
        const auto part = [&](int a, int i) { // the first CTA begins the tile, the others end it
            return tile +
                   ((i0 + i ? 2 * (i0 + i) - 1 : 0) * SLOT + (g.r[a] * (NT / 8) + g.j[a]) * 32);
        };
        const auto wanted = [&](int a, int i) { return g.r[a] >= 0 && i0 + i < n; };
        float4 v[AT][PARTS];
        bool there;
        do {
            there = true;
#pragma unroll
            for (int k = 0; k < AT * PARTS; k++)
                v[k / PARTS][k % PARTS] =
                    linear_load_part(part(k / PARTS, k % PARTS), wanted(k / PARTS, k % PARTS));
#pragma unroll
            for (int k = 0; k < AT * PARTS; k++)
                there = there && linear_is_there(v[k / PARTS][k % PARTS]);
        } while (!__all_sync(~0u, there));
#pragma unroll
        for (int a = 0; a < AT; a++)
#pragma unroll
            for (int i = 0; i < PARTS; i++) {
                if (wanted(a, i)) __stcg(part(a, i), make_float4(0, 0, 0, 0));
                c[a][0] += v[a][i].x, c[a][1] += v[a][i].y;
                c[a][2] += v[a][i].z, c[a][3] += v[a][i].w;
            }
    }
}

// This CTA's part of a shared tile: every n-th group, with gate and up of one at once.
template <typename T, int NT, int R, int GROUPS>
__device__ __forceinline__ void linear_finish_shared(const linear_args &p, const linear_segment &s,
                                                     int32_t owner, int32_t rank, int32_t n,
                                                     float *stage) {
    constexpr int N = R * NT / 8, AT = N == 1 ? 1 : N < 4 || NT < 32 ? 2 : 4;
    const bool gated = R > 1 && p.paired;
    const int32_t groups_m = min(NT / 8, (s.m_end - s.m0 + 7) / 8);
    const int32_t groups = (gated ? R / 2 : R) * groups_m;
    for (int32_t g0 = rank; g0 < groups; g0 += n * (gated ? AT / 2 : AT)) {
        float c[AT][4] = {};
        linear_groups<AT> group;
#pragma unroll
        for (int a = 0; a < AT; a++) {
            const int32_t g = g0 + (gated ? a / 2 : a) * n, r = g / groups_m;
            group.r[a] = g >= groups ? -1 : gated ? 2 * r + a % 2 : r;
            group.j[a] = g - r * groups_m;
        }
        linear_take_parts<NT, R>(c, p, group, owner, n);
#pragma unroll
        for (int a = 0; a < AT; a++) {
            if (group.r[a] < 0 || (gated && a % 2)) continue;
            const bool pair = a % 2 == 0 && a + 1 < AT && gated;
            const linear_place at = linear_place_of<R, GROUPS>(p, s, group.r[a]);
            if (!at.there) continue;
            float4 v = linear_affine(linear_turn(c[a], stage),
                                     linear_outputs_of<T>(p, s.expert, at.block, at.col));
            if (pair)
                v = linear_gate_all(
                    v,
                    linear_affine(linear_turn(c[a + 1 < AT ? a + 1 : a], stage),
                                  linear_outputs_of<T>(p, s.expert, at.block + p.half_blocks,
                                                       at.col + p.half_rows)),
                    p);
            const int32_t row = s.m0 + 8 * group.j[a] + threadIdx.x % 32 / 4;
            if (row < s.m_end) linear_put<T>(p, row, at.col, v);
        }
    }
}

template <typename T, int NT, int R, int GROUPS = 2>
__device__ __forceinline__ void linear_finish_all(const linear_args &p, const linear_shared *shared,
                                                  float *stage) {
    __syncwarp();
#pragma unroll 1
    for (int i = 0; i < 2; i++) {
        const linear_segment s = shared->tile[i];
        if (s.m_end)
            linear_finish_shared<T, NT, R, GROUPS>(p, s, shared->owner[i], shared->rank[i],
                                                   shared->size[i], stage);
    }
}
#endif
