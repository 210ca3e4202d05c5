// quantize.cu - weights and activations to codes and scales.
//
// Weights: Values that share a scale are a tile of block_n rows
// and `group` columns: a warp has a tile of up to 128 values, a block of 256 threads a larger one.
// It is read twice, for its extent and for its codes; arithmetic is f32 with one rounding an
// operation in the order of ref_quant.c, so codes and scales are the same bits.
#include "ptx_sm90.cuh"
#include "quantize.cuh"
#include "quantize.h"

namespace {

constexpr int kThreads = 256;
constexpr int kWarpTileMost = 128; // values of a tile that a warp takes

// Sizes of the problem. Tiles of a row lie side by side.
struct tiling {
    int k, rows, group, groups, block_n, row0;
    int n_tiles; // of all rows
};

__device__ __forceinline__ __half f16_scale(float s) {
    if (s == 0) return __float2half_rn(1.f);
    const __half h = __float2half_rn(s > kF16Max ? kF16Max : s);
    return __half_as_ushort(h) ? h : __ushort_as_half(1);
}

// Store scale (and zero point) number `at` for values in [lo, hi]; one thread's write is enough,
// all get the factor. ORDER quantize: store_scale of ref_quant.c.
template <weight_format F>
__device__ __forceinline__ float store_scale(const qmatrix &q, int64_t at, float lo, float hi,
                                             bool writer, float *zero) {
    const float amax = fmaxf(fabsf(lo), fabsf(hi));
    *zero = 0.f;
    if constexpr (F == WF_INT4) {
        const float low = lo < 0 ? lo : 0, high = hi > 0 ? hi : 0;
        const __half h = f16_scale(q.zero ? __fsub_rn(high, low) / 15 : amax / 7);
        const float s = __half2float(h);
        *zero = q.zero ? rintf(clamp_to(-low / s, 0, 15)) : 8.f;
        if (writer) static_cast<__half *>(q.scale)[at] = h;
        if (writer && q.zero) q.zero[at] = (uint8_t)*zero;
        return s;
    } else if constexpr (F == WF_MXFP4) {
        const int expo = amax > 0 ? ilogbf(amax) - 2 : 0; // 2: exponent of the largest e2m1
        const uint8_t code = (uint8_t)(127 + (expo < -127 ? -127 : expo));
        if (writer) static_cast<uint8_t *>(q.scale)[at] = code;
        return __uint_as_float(code ? (uint32_t)code << 23 : 0x00400000u);
    } else if constexpr (F == WF_NVFP4) {
        uint8_t code = e4m3_of(amax / kE2m1Max / q.global_scale);
        if (code == 0) code = amax > 0 ? 0x01 : 0x38; // the smallest; 1
        if (writer) static_cast<uint8_t *>(q.scale)[at] = code;
        return __fmul_rn(f32_of_e4m3(code), q.global_scale);
    } else {
        const float s = f32_scale(amax, F == WF_INT8 ? 127.f : kE4m3Max);
        if (writer) static_cast<float *>(q.scale)[at] = s;
        return s;
    }
}

// WIDTH threads share a tile: 32 or kThreads.
template <weight_format F, int WIDTH>
__global__ void __launch_bounds__(kThreads) quantize(qmatrix q, tiling t, const float *w) {
    __shared__ float shared_lo[kThreads / 32], shared_hi[kThreads / 32];
    const int tile = ((int)blockIdx.x * kThreads + (int)threadIdx.x) / WIDTH;
    const int rank = (int)threadIdx.x % WIDTH;
    if (tile >= t.n_tiles) return; // whole warps, and whole blocks where WIDTH is a block
    const int row = tile / t.groups * t.block_n, g = tile % t.groups;
    const int rows = min(t.block_n, t.rows - row), cols = min(t.group, t.k - g * t.group);
    const float *from = w + int64_t{row} * t.k + g * t.group; // [rows, cols], rows k apart
    const int pairs = cols / 2, n = rows * pairs;

    float lo = INFINITY, hi = -INFINITY;
    for (int i = rank; i < n; i += WIDTH) {
        const float2 v =
            *reinterpret_cast<const float2 *>(from + int64_t{i / pairs} * t.k + i % pairs * 2);
        lo = fminf(lo, fminf(v.x, v.y));
        hi = fmaxf(hi, fmaxf(v.x, v.y));
    }
    lo = -warp_max(-lo);
    hi = warp_max(hi);
    if constexpr (WIDTH > 32) {
        if (threadIdx.x % 32 == 0) {
            shared_lo[threadIdx.x / 32] = lo;
            shared_hi[threadIdx.x / 32] = hi;
        }
        __syncthreads();
        for (int i = 0; i < kThreads / 32; i++) {
            lo = fminf(lo, shared_lo[i]);
            hi = fmaxf(hi, shared_hi[i]);
        }
    }
    float zero;
    const int64_t at = int64_t{(t.row0 + row) / t.block_n} * t.groups + g;
    const float s = store_scale<F>(q, at, lo, hi, rank == 0, &zero);
    for (int i = rank; i < n; i += WIDTH) {
        const int r = i / pairs, c = i % pairs * 2;
        const float2 v = *reinterpret_cast<const float2 *>(from + int64_t{r} * t.k + c);
        const int a = code_of<F>(v.x, s, zero), b = code_of<F>(v.y, s, zero);
        const int64_t element = int64_t{t.row0 + row + r} * t.k + g * t.group + c;
        if constexpr (four_bits<F>)
            q.code[element / 2] = (uint8_t)(a | b << 4);
        else
            *reinterpret_cast<uchar2 *>(q.code + element) =
                make_uchar2((unsigned char)a, (unsigned char)b);
    }
}

__global__ void __launch_bounds__(kThreads) extent(uint32_t *amax, const float *w, int64_t n) {
    uint32_t most = 0;
    for (int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x; i < n;
         i += int64_t{gridDim.x} * kThreads)
        most = max(most, __float_as_uint(w[i]) & 0x7fffffffu);
    most = __reduce_max_sync(~0u, most);
    if (threadIdx.x % 32 == 0) atomicMax(amax, most);
}

template <weight_format F>
status launch(const qmatrix &q, const tiling &t, const float *w, cudaStream_t s) {
    const int64_t size = int64_t{t.group} * t.block_n;
    const int width = size <= kWarpTileMost ? 32 : kThreads;
    const unsigned blocks = (unsigned)div_up(int64_t{t.n_tiles} * width, kThreads);
    if (width == 32)
        quantize<F, 32><<<blocks, kThreads, 0, s>>>(q, t, w);
    else
        quantize<F, kThreads><<<blocks, kThreads, 0, s>>>(q, t, w);
    return launched("quantize_weight");
}

// --- Activations: read once, into registers -----------------------------------------------------

constexpr int kSpan = 128; // inputs that share a scale beside FP8b

template <typename T, act_format A>
__device__ __forceinline__ void store_eight(const activation_quantiser &a, int row, int col,
                                            const eight<T, A> &e, float s) {
    const int64_t at = int64_t{row} * a.k + col;
    if (a.value)
        store_pack(static_cast<T *>(a.value) + at, e.values(s));
    else
        *reinterpret_cast<uint2 *>(static_cast<uint8_t *>(a.code) + at) = e.codes(s);
}

template <typename T>
__device__ __forceinline__ const T *row_of(const activation_quantiser &a, int row) {
    const int64_t from = a.x_row && row < a.m ? a.x_row[row] : row;
    return static_cast<const T *>(a.x) + from * a.ldx;
}

constexpr int kThreadsMost = 1024, kCluster = 8, kClusterThreads = 512;

// The largest of the maxima of all warps of a cluster, each of which comes to every block. All
// threads have arrived at the cluster's barrier once before.
__device__ __forceinline__ uint32_t cluster_max(uint32_t warp_most, uint32_t *shared) {
#if __CUDA_ARCH__ >= 900
    const int lane = (int)threadIdx.x % 32, warps = (int)blockDim.x / 32;
    cluster_wait(); // all blocks are there
    if (lane < kCluster) {
        const uint32_t own =
            shared_address(shared + cluster_rank() * warps + (int)threadIdx.x / 32);
        asm volatile("st.shared::cluster.u32 [%0], %1;" ::"r"(remote_address(own, (uint32_t)lane)),
                     "r"(warp_most)
                     : "memory");
    }
    asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
    cluster_wait();
    uint32_t most = 0;
    for (int i = lane; i < warps * kCluster; i += 32) most = max(most, shared[i]);
    return __reduce_max_sync(~0u, most);
#else
    return warp_most;
#endif
}

// A row's vectors of eight `first`, `first` + step, .., of a thread; all lanes of its warp.
template <typename T, act_format A, int PER>
__device__ __forceinline__ uint32_t load_row(eight<T, A> (&e)[PER], const activation_quantiser &a,
                                             int row, int first, int step) {
    uint32_t most = 0;
    const T *x = row_of<T>(a, row); // [k]
#pragma unroll
    for (int i = 0; i < PER; i++) {
        const int v = first + i * step;
        e[i].x = {};
        if (v < a.k / 8 && row < a.m) e[i].x = load_pack(x + v * 8);
        most = __vmaxu2(most, e[i].magnitudes());
    }
    return __reduce_max_sync(~0u, max(most >> 16, most & 0xffffu));
}
template <typename T, act_format A, int PER>
__device__ __forceinline__ void store_row(const activation_quantiser &a, int row,
                                          const eight<T, A> (&e)[PER], float s, int first,
                                          int step) {
#pragma unroll
    for (int i = 0; i < PER; i++) {
        const int v = first + i * step;
        if (A == AF_INT8 && a.atoms) {
            const uint2 code = in_atoms(e[i].codes(s));
            uint8_t *to = static_cast<uint8_t *>(a.code) + int64_t{row} * a.k + v * 8;
            if (v < a.k / 8) *reinterpret_cast<uint2 *>(to) = code;
        } else if (v < a.k / 8) {
            store_eight(a, row, v * 8, e[i], s);
        }
    }
}

// A block a row, or a cluster. PER: vectors of eight that a thread holds.
template <typename T, act_format A, int PER, bool CLUSTER>
__global__ void __launch_bounds__(CLUSTER ? kClusterThreads : kThreadsMost)
    quantize_rows(const activation_quantiser a) {
    __shared__ uint32_t shared[CLUSTER ? kCluster * kClusterThreads / 32 : 32];
    const int warps = (int)blockDim.x / 32;
    int row = (int)blockIdx.x, first = (int)threadIdx.x;
#if __CUDA_ARCH__ >= 900
    if (CLUSTER) {
        cluster_arrive();
        first += cluster_rank() * (int)blockDim.x;
        row = (int)blockIdx.x / kCluster;
    }
#endif
    eight<T, A> e[PER];
    follow_previous();
    uint32_t most = load_row(e, a, row, first, (int)blockDim.x);
    if constexpr (CLUSTER) {
        most = cluster_max(most, shared);
    } else {
        if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = most;
        __syncthreads();
        most = __reduce_max_sync(~0u, (int)threadIdx.x % 32 < warps ? shared[threadIdx.x % 32] : 0);
    }
    const float s = span_scale<T, A>(most);
    if (first == 0 && !a.value) a.scale[row] = s;
    store_row(a, row, e, s, first, (int)blockDim.x);
}

__device__ __host__ __forceinline__ int rows_of(const activation_quantiser &a) {
    return a.value ? a.m : a.m_pad;
}

// A warp a row, which of many short ones keeps more under way.
constexpr int kRowWarps = 4;
template <typename T, act_format A, int PER>
__global__ void __launch_bounds__(32 * kRowWarps)
    quantize_short_rows(const activation_quantiser a) {
    const int row = (int)blockIdx.x * kRowWarps + (int)threadIdx.x / 32;
    const int lane = (int)threadIdx.x % 32;
    eight<T, A> e[PER];
    follow_previous();
    if (row >= rows_of(a)) return;
    const float s = span_scale<T, A>(load_row(e, a, row, lane, 32));
    if (lane == 0 && !a.value) a.scale[row] = s;
    store_row(a, row, e, s, lane, 32);
}

// Eight lanes a span of 128 inputs, in two vectors of eight each; a warp has a span of four rows,
// whose scales lie side by side. Grid: (rows, spans).
constexpr int kLanes = 8, kWarpRows = 32 / kLanes;
template <typename T, act_format A>
__global__ void __launch_bounds__(256) quantize_spans(const activation_quantiser a) {
    constexpr int kVectors = kSpan / 8 / kLanes;
    const int lane = (int)threadIdx.x % kLanes;
    const int row = (int)blockIdx.x * kWarpRows + (int)threadIdx.x % 32 / kLanes;
    const int g = (int)(blockIdx.y * blockDim.x + threadIdx.x) / 32, col = g * kSpan + lane * 8;
    eight<T, A> e[kVectors];
    follow_previous();
    const T *x = row_of<T>(a, row);
    uint32_t most = 0;
#pragma unroll
    for (int i = 0; i < kVectors; i++) {
        e[i].x = {};
        if (row < a.m && col + i * kLanes * 8 < a.k) e[i].x = load_pack(x + col + i * kLanes * 8);
    }
#pragma unroll
    for (int i = 0; i < kVectors; i++) most = __vmaxu2(most, e[i].magnitudes());
#pragma unroll
    for (int d = kLanes / 2; d > 0; d >>= 1) most = __vmaxu2(most, __shfl_xor_sync(~0u, most, d));
    if (g * kSpan >= a.k || row >= rows_of(a)) return;
    const float s = span_scale<T, A>(max(most >> 16, most & 0xffffu));
    if (lane == 0 && !a.value) a.scale[int64_t{g} * a.m_pad + row] = s;
#pragma unroll
    for (int i = 0; i < kVectors; i++)
        if (col + i * kLanes * 8 < a.k) store_eight(a, row, col + i * kLanes * 8, e[i], s);
}

// Of few rows blocks lie apart: where all come to the SM that is free first, their bytes go through
// it one after another. And of many inputs a row's bytes go through the SMs of a cluster. What a
// block takes of an SM for that: less than is left beside two CTAs of attention, whose end it and
// what is launched behind it would else wait for; of clusters by measurement.
constexpr int kRowsFew = 64;
unsigned room_of(bool clusters, int rows) { return room_for_fewer(clusters && rows > 8 ? 4 : 5); }

template <typename T, act_format A>
status launch_activation(const activation_quantiser &a, cudaStream_t stream) {
    const int vectors = a.k / 8, rows = rows_of(a);
    const bool spans = A == AF_FP8 && a.group == kSpan;
    // One vector a thread has the answer soonest; more let more rows run at once.
    const bool alone = rows <= 256 && vectors <= kThreadsMost;
    const int per = alone || vectors <= 128 ? 1 : vectors <= 4096 ? 4 : 8;
    const bool brief = !spans && rows > 4096 && vectors <= 256;
    const bool few = !spans && early_launches() && rows <= kRowsFew;
    const bool wide = few && vectors > kThreadsMost && vectors <= kCluster * kClusterThreads;
    const unsigned cluster = wide ? kCluster : 1;
    dim3 grid((unsigned)rows * cluster);
    dim3 block((unsigned)(div_up(div_up(vectors, wide ? kCluster : per), 32) * 32));
    if (spans) {
        const int n = (int)div_up(a.k, kSpan), warps = rows <= 256 ? 4 : 8;
        grid = dim3((unsigned)div_up(rows, kWarpRows), (unsigned)div_up(n, warps));
        block = dim3((unsigned)warps * 32);
    }
    if (brief) {
        grid = dim3((unsigned)div_up(rows, kRowWarps));
        block = dim3(32 * kRowWarps);
    }
    auto *const kernel =
        spans      ? quantize_spans<T, A>
        : brief    ? (vectors <= 128 ? quantize_short_rows<T, A, 4> : quantize_short_rows<T, A, 8>)
        : wide     ? quantize_rows<T, A, 1, true>
        : per == 1 ? quantize_rows<T, A, 1, false>
        : per == 4 ? quantize_rows<T, A, 4, false>
                   : quantize_rows<T, A, 8, false>;
    return launch_clusters("quantize_activation", kernel, grid, block, cluster,
                           few ? room_of(wide, rows) : 0, stream, a);
}

} // namespace

extern "C" status kernel_quantize_weight(const qmatrix *q, const float *w, int32_t row0,
                                         int32_t rows, kernel_stream stream) {
    const bool whole = row0 + rows == q->n || rows % q->block_n == 0;
    if (rows == 0) return ST_OK;
    if (row0 < 0 || rows < 0 || rows > q->n - row0 || row0 % q->block_n || !whole || q->k % 2 ||
        q->group % 2)
        return FAIL(ST_SHAPE, "quantize: rows %d + %d of [%d, %d]", row0, rows, q->n, q->k);
    tiling t = {q->k, rows, q->group, (int)div_up(q->k, q->group), q->block_n, row0, 0};
    const int64_t tiles = div_up(rows, q->block_n) * t.groups;
    if (tiles > INT32_MAX / kThreads) return FAIL(ST_SHAPE, "quantize: %d rows at once", rows);
    t.n_tiles = (int)tiles;
    switch (q->format) {
#define X(name)                                                                                    \
    case WF_##name: return launch<WF_##name>(*q, t, w, stream);
        QUANTIZE_INSTANCES(X)
#undef X
    default: return FAIL(ST_UNSUPPORTED, "quantize: W%s", weight_format_text(q->format));
    }
}

extern "C" status kernel_quantize_extent(uint32_t *amax_bits, const float *w, int64_t n,
                                         kernel_stream stream) {
    if (n < 0) return FAIL(ST_SHAPE, "extent of %lld values", (long long)n);
    if (n == 0) return ST_OK;
    const int64_t blocks = div_up(n, kThreads);
    extent<<<(unsigned)(blocks < 4096 ? blocks : 4096), kThreads, 0, stream>>>(amax_bits, w, n);
    return launched("quantize_extent");
}

extern "C" float quantize_global_scale(weight_format f, float amax) {
    if (f != WF_NVFP4) return 1;
    const float s = f32_scale(amax, kE4m3Max * kE2m1Max);
    return s < FLT_MIN ? FLT_MIN : s; // not subnormal: group scales times it must not vanish
}

extern "C" status kernel_quantize_activation(const activation_quantiser *a, kernel_stream stream) {
    if (a->m < 0 || a->k <= 0 || a->k % 16 || a->k > 65536 || a->ldx % 8 ||
        (!a->value && a->m_pad < a->m))
        return FAIL(ST_SHAPE, "quantize: activations [%d, %d], rows %lld apart", a->m, a->k,
                    (long long)a->ldx);
    if (a->m == 0) return ST_OK;
    const bool fp8 = a->act == AF_FP8;
    if (a->atoms && (fp8 || a->value))
        return FAIL(ST_UNSUPPORTED, "quantize: A%s in the order of atoms", act_format_text(a->act));
    if (a->type == DT_F16 && a->act != AF_16)
        return fp8 ? launch_activation<__half, AF_FP8>(*a, stream)
                   : launch_activation<__half, AF_INT8>(*a, stream);
    if (a->type == DT_BF16 && a->act != AF_16)
        return fp8 ? launch_activation<__nv_bfloat16, AF_FP8>(*a, stream)
                   : launch_activation<__nv_bfloat16, AF_INT8>(*a, stream);
    return FAIL(ST_UNSUPPORTED, "quantize: %s to A%s", dtype_text(a->type),
                act_format_text(a->act));
}
