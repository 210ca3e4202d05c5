// linear_common.cuh - what the linear kernels of both families share: the problem as a kernel sees it,
// the walk over it, the exchange of partial sums, and the epilogue.
//
// Work is counted in steps: one step is KU units (64 inputs each) of one tile of 2 R blocks x NT rows of
// x. The first sk_tiles tiles are one long line of steps that is cut evenly over all CTAs (stream-K); the
// others are dealt out whole. A CTA whose cut begins inside a tile deposits its sums in its slot of the
// workspace, once at most; the CTA that holds the first step of a tile collects the others' in ascending
// order and finishes it. The cuts depend on the problem's shape and the number of CTAs alone, so the bits
// are the same on every run. Cuts run against blockIdx, so that a CTA only ever waits for CTAs that the
// hardware started before it.
//
// Eight warps compute: warp w takes strip w % 4 of blocks (w / 4) R .. + R - 1 of the tile. A lane's
// accumulators of one strip are those of mma m16n8: [4 j + 0, 1] = row g, x rows 8 j + 2 t, + 1;
// [4 j + 2, 3] = row g + 8.
#ifndef LINEAR_COMMON_CUH
#define LINEAR_COMMON_CUH
#include "linear_dequant.cuh"

enum { LINEAR_EXPERTS_MAX = 512, LINEAR_WARPS = 8 };

struct linear_args {
    const uint8_t *code, *scale; // [count][code_bytes], [count][scale_bytes]
    const void *bias;            // [count, n] or NULL
    const float *channel;        // [count][blocks * 64], formats that scale in the epilogue; or NULL
    const float *global_scale;   // [count] or NULL
    const void *x;
    void *y;
    int64_t ldx, ldy, code_bytes, scale_bytes;
    const int32_t *expert_start, *x_row;
    float *partial;
    int32_t *flags;
    int32_t m, n, k, count;
    int32_t half_rows, half_blocks, blocks, units, granules, granule_bytes, granule, granule_shift;
    int32_t epilogue, sym, y_f32, paired; // paired: a tile holds blocks b and b + half_blocks
    float limit;
    int32_t n_tiles, steps; // tiles along N; steps of one tile
    int32_t stream_all;     // cut all tiles, else only what does not fill a wave
};

// --- Walk --------------------------------------------------------------------------------------------

struct linear_segment {
    int32_t expert, m0, m_end, tile_n; // rows [m0, m_end) of the permuted problem
    int32_t step0, step1;              // of the tile
    int32_t line;                      // place of the tile's first step in the line; -1: not cut
};

template <int NT> struct linear_walk {
    const linear_args &p;
    const int32_t *tile_start; // [count + 1] in shared memory, grouped problems only
    int32_t tiles, cta, ctas, tile, share, rest, at, end;

    __device__ linear_walk(const linear_args &p, const int32_t *tile_start)
        : p(p), tile_start(tile_start) {
        ctas = gridDim.x;
        cta = ctas - 1 - (int32_t)blockIdx.x;
        tiles = tile_start ? tile_start[p.count] : p.n_tiles * ((p.m + NT - 1) / NT);
        int32_t sk_tiles = tiles;
        if (!p.stream_all && tiles >= ctas) sk_tiles = tiles % ctas ? tiles % ctas + ctas : 0;
        share = sk_tiles * p.steps / ctas;
        rest = sk_tiles * p.steps % ctas;
        at = cut(cta);
        end = cut(cta + 1);
        tile = sk_tiles + cta;
    }
    // First step of CTA i: all have `share` steps, the first `rest` one more.
    __device__ int32_t cut(int32_t i) const { return i * share + min(i, rest); }

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
        s.expert = 0;
        int32_t row0 = 0, row1 = p.m;
        if (tile_start) {
            int32_t lo = 0, hi = p.count; // the last expert whose first tile is not past t
            while (hi - lo > 1) {
                const int32_t mid = (lo + hi) / 2;
                if (tile_start[mid] <= t) lo = mid;
                else hi = mid;
            }
            s.expert = lo;
            row0 = p.expert_start[lo];
            row1 = p.expert_start[lo + 1];
            t -= tile_start[lo];
        }
        const int32_t m_tiles = (row1 - row0 + NT - 1) / NT;
        s.tile_n = t / m_tiles; // tiles that share weights are neighbours
        s.m0 = row0 + (t - s.tile_n * m_tiles) * NT;
        s.m_end = min(row1, s.m0 + NT);
        return true;
    }
};

// First tile of every expert, by all threads of the CTA; experts without rows have none.
template <int NT>
__device__ void linear_tile_starts(int32_t *tile_start, const linear_args &p) {
    for (int e = threadIdx.x; e < p.count; e += blockDim.x)
        tile_start[e + 1] =
            (p.expert_start[e + 1] - p.expert_start[e] + NT - 1) / NT * p.n_tiles;
    __syncthreads();
    if (threadIdx.x < 32) {
        int32_t sum = 0;
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

// Block r = 0..R-1 of warp group wg (0, 1) in tile_n; may be >= blocks (nothing there) when not paired.
template <int R>
__device__ __forceinline__ int32_t linear_block(const linear_args &p, int32_t tile_n, int wg, int r) {
    if (R % 2 == 0 && p.paired) {
        const int32_t b = (tile_n * 2 + wg) * (R / 2) + r / 2;
        return b < p.half_blocks ? b + r % 2 * p.half_blocks : p.blocks;
    }
    return (tile_n * 2 + wg) * R + r;
}

// --- Partial sums ------------------------------------------------------------------------------------

__device__ __forceinline__ void flag_raise(int32_t *flag) {
    asm volatile("st.release.gpu.global.s32 [%0], 1;" ::"l"(flag) : "memory");
}
__device__ __forceinline__ int32_t flag_read(const int32_t *flag) {
    int32_t v;
    asm volatile("ld.acquire.gpu.global.s32 %0, [%1];" : "=r"(v) : "l"(flag) : "memory");
    return v;
}

// Returns whether this CTA finishes the tile.
template <int NT, int R>
__device__ __forceinline__ bool linear_exchange(float (&acc)[R][NT / 2], const linear_args &p,
                                                const linear_walk<NT> &walk,
                                                const linear_segment &s) {
    constexpr int N4 = R * NT / 8; // float4 of a lane
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    float4 *const slots = reinterpret_cast<float4 *>(p.partial);
    if (s.step0 > 0) {
        float4 *slot = slots + ((int64_t)walk.cta * LINEAR_WARPS + warp) * N4 * 32 + lane;
#pragma unroll
        for (int r = 0; r < R; r++)
#pragma unroll
            for (int j = 0; j < NT / 8; j++)
                __stcg(slot + (r * (NT / 8) + j) * 32,
                       make_float4(acc[r][4 * j], acc[r][4 * j + 1], acc[r][4 * j + 2],
                                   acc[r][4 * j + 3]));
        __threadfence();
        __syncwarp();
        if (lane == 0) flag_raise(p.flags + walk.cta * LINEAR_WARPS + warp);
        return false;
    }
    if (s.step1 == p.steps) return true;
    int32_t other = walk.cta + 1;
    for (int32_t done = s.line + s.step1; done < s.line + p.steps; other++) {
        const int32_t end = min(walk.cut(other + 1), s.line + p.steps);
        if (end == done) continue; // an empty cut
        done = end;
        int32_t *flag = p.flags + other * LINEAR_WARPS + warp;
        if (lane == 0) {
            while (flag_read(flag) == 0) {}
            *flag = 0; // for the next launch, which starts writing after this one has ended
        }
        __syncwarp();
        const float4 *slot = slots + ((int64_t)other * LINEAR_WARPS + warp) * N4 * 32 + lane;
#pragma unroll
        for (int r = 0; r < R; r++)
#pragma unroll
            for (int j = 0; j < NT / 8; j++) {
                const float4 v = __ldcg(slot + (r * (NT / 8) + j) * 32);
                acc[r][4 * j] += v.x;
                acc[r][4 * j + 1] += v.y;
                acc[r][4 * j + 2] += v.z;
                acc[r][4 * j + 3] += v.w;
            }
    }
    return true;
}

// --- Epilogue ----------------------------------------------------------------------------------------

template <typename T> struct alignas(8) four {
    T v[4];
};

__device__ __forceinline__ float linear_f32(__half x) { return __half2float(x); }
__device__ __forceinline__ float linear_f32(__nv_bfloat16 x) { return __bfloat162float(x); }
template <typename T> __device__ __forceinline__ T linear_round(float x);
template <> __device__ __forceinline__ __half linear_round<__half>(float x) {
    return __float2half_rn(x);
}
template <> __device__ __forceinline__ __nv_bfloat16 linear_round<__nv_bfloat16>(float x) {
    return __float2bfloat16_rn(x);
}

__device__ __forceinline__ float linear_gate(float g, float u, int epilogue, float limit) {
    if (epilogue == LINEAR_GATED) return g / (1.f + __expf(-g)) * u;
    g = fminf(g, limit);
    u = fminf(fmaxf(u, -limit), limit);
    return g / (1.f + __expf(-1.702f * g)) * (u + 1.f);
}

enum { LINEAR_STAGE_FLOATS = 8 * 20 }; // one warp's 8 x rows of 16 outputs, rows padded by one vector

// Eight x rows of one strip: from the fragment (lane = 4 g + t) to lane = 4 row + n / 4.
__device__ __forceinline__ float4 linear_turn(const float *c, float *stage) {
    const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
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
                                                            int32_t block, int32_t row) {
    linear_outputs o = {{1.f, 1.f, 1.f, 1.f}, {0.f, 0.f, 0.f, 0.f}};
    const int strip = threadIdx.x / 32 % 4, quad = threadIdx.x % 4;
    if (p.channel)
        o.scale = *reinterpret_cast<const float4 *>(
            p.channel + ((int64_t)expert * p.blocks + block) * 64 + strip * 16 + quad * 4);
    if (p.global_scale) {
        const float g = p.global_scale[expert];
        o.scale = make_float4(g, g, g, g);
    }
    if (p.bias) {
        const four<T> b = *reinterpret_cast<const four<T> *>(
            static_cast<const T *>(p.bias) + (int64_t)expert * p.n + row);
        o.bias = make_float4(linear_f32(b.v[0]), linear_f32(b.v[1]), linear_f32(b.v[2]),
                             linear_f32(b.v[3]));
    }
    return o;
}

__device__ __forceinline__ float4 linear_affine(float4 v, const linear_outputs &o) {
    return make_float4(fmaf(v.x, o.scale.x, o.bias.x), fmaf(v.y, o.scale.y, o.bias.y),
                       fmaf(v.z, o.scale.z, o.bias.z), fmaf(v.w, o.scale.w, o.bias.w));
}

template <typename T>
__device__ __forceinline__ void linear_put(const linear_args &p, int32_t row_x, int32_t col, float4 v) {
    const int64_t at = (int64_t)row_x * p.ldy + col;
    if (p.y_f32) {
        float4 *y = reinterpret_cast<float4 *>(static_cast<float *>(p.y) + at);
        if (p.epilogue == LINEAR_RESIDUAL) {
            const float4 old = *y;
            v = make_float4(v.x + old.x, v.y + old.y, v.z + old.z, v.w + old.w);
        }
        *y = v;
        return;
    }
    four<T> *y = reinterpret_cast<four<T> *>(static_cast<T *>(p.y) + at);
    if (p.epilogue == LINEAR_RESIDUAL) {
        const four<T> old = *y;
        v = make_float4(v.x + linear_f32(old.v[0]), v.y + linear_f32(old.v[1]),
                        v.z + linear_f32(old.v[2]), v.w + linear_f32(old.v[3]));
    }
    *y = four<T>{{linear_round<T>(v.x), linear_round<T>(v.y), linear_round<T>(v.z),
                  linear_round<T>(v.w)}};
}

// Finish the tile of this warp. `stage`: LINEAR_STAGE_FLOATS of this warp.
template <typename T, int NT, int R>
__device__ __forceinline__ void linear_finish(float (&acc)[R][NT / 2], const linear_args &p,
                                              const linear_segment &s, float *stage) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int quad = lane % 4 * 4, strip = warp % 4;
    const bool gated = p.epilogue == LINEAR_GATED || p.epilogue == LINEAR_GATED_OAI;
#pragma unroll
    for (int r = 0; r < R; r++) {
        if (gated && r % 2) continue;
        const int32_t block = linear_block<R>(p, s.tile_n, warp / 4, r);
        const int32_t half = block >= p.half_blocks ? 1 : 0;
        const int32_t in_half = (block - half * p.half_blocks) * 64 + strip * 16;
        if (block >= p.blocks || in_half >= p.half_rows) continue;
        const int32_t col = half * p.half_rows + in_half + quad;
        const linear_outputs o = linear_outputs_of<T>(p, s.expert, block, col);
        linear_outputs up;
        if (R > 1 && gated)
            up = linear_outputs_of<T>(p, s.expert, block + p.half_blocks, col + p.half_rows);
#pragma unroll
        for (int j = 0; j < NT / 8; j++) {
            const int32_t row = s.m0 + 8 * j + lane / 4;
            if (s.m0 + 8 * j >= s.m_end) break;
            float4 v = linear_affine(linear_turn(&acc[r][4 * j], stage), o);
            if (R > 1 && gated) {
                const float4 u =
                    linear_affine(linear_turn(&acc[r + 1 < R ? r + 1 : r][4 * j], stage), up);
                v = make_float4(linear_gate(v.x, u.x, p.epilogue, p.limit),
                                linear_gate(v.y, u.y, p.epilogue, p.limit),
                                linear_gate(v.z, u.z, p.epilogue, p.limit),
                                linear_gate(v.w, u.w, p.epilogue, p.limit));
            }
            if (row < s.m_end) linear_put<T>(p, row, col, v);
        }
    }
}
#endif
