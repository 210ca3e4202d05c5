// moe.cu - a warp routes a token; a block collects the rows of an expert; a thread adds 16 bytes of
// a token's results.
//
// permute is a counting sort in which every expert's block counts for itself: it reads all slots
// twice (how many go to lower experts, then the rank of each of its own), which is X times as many
// reads as need be, all from L2, and asks for no second launch, no atomics and no order of blocks.
// Of few tokens one block does both.
#include "moe.h"
#include "traits.cuh"

#define ROUTE_INSTANCES(X)   X(F32) X(F16) X(BF16)
#define COMBINE_INSTANCES(X) X(F16) X(BF16)

namespace {

constexpr int kWarpsPerBlock = 4; // of route
constexpr int kThreads = 512;     // of permute, and of both at once: one an expert there
constexpr int kFewTokens = 8;     // more of them are faster in two launches
constexpr int kCombineThreads = 128;

// Logits as integers of the same order, -0 as 0; none is 0, so that 0 stands for what is taken.
__device__ __forceinline__ uint32_t ordered(float v) {
    const uint32_t bits = __float_as_uint(v + 0.f);
    return bits >> 31 ? ~bits : bits | 0x80000000u;
}
__device__ __forceinline__ float unordered(uint32_t key) {
    return __uint_as_float(key >> 31 ? key & 0x7fffffffu : ~key);
}

// Of a token, by a warp: lane j < top_k gets the j-th best of up to 32 kPer experts and its weight.
template <typename T, int kPer>
__device__ __forceinline__ void route_token(int &expert, float &weight, const T *logits,
                                            int n_experts, int top_k, bool over_chosen,
                                            bool normalise) {
    const int lane = (int)threadIdx.x % 32;
    float x[kPer]; // expert i * 32 + lane
    uint32_t key[kPer];
#pragma unroll
    for (int i = 0; i < kPer; i++) {
        const int e = i * 32 + lane;
        x[i] = e < n_experts ? to_f32(logits[e]) : -INFINITY;
        if (isnan(x[i])) x[i] = -INFINITY;
        key[i] = e < n_experts ? ordered(x[i]) : 0;
    }
    float chosen = -INFINITY, largest = 0.f; // lane j keeps the j-th best
    int chosen_expert = 0;
    for (int j = 0; j < top_k; j++) {
        uint32_t best = key[0];
#pragma unroll
        for (int i = 1; i < kPer; i++) best = max(best, key[i]);
        best = __reduce_max_sync(~0u, best);
        int at = MOE_EXPERTS_MAX; // the lowest of the best
#pragma unroll
        for (int i = kPer - 1; i >= 0; i--)
            if (key[i] == best) at = i * 32 + lane;
        at = __reduce_min_sync(~0u, at);
#pragma unroll
        for (int i = 0; i < kPer; i++)
            if (at == i * 32 + lane) key[i] = 0;
        if (j == 0) largest = unordered(best);
        if (lane == j) {
            chosen = unordered(best);
            chosen_expert = at;
        }
    }
    const float e_chosen = lane < top_k ? expf(chosen - largest) : 0.f;
    float sum = warp_sum(e_chosen);
    if (!over_chosen && !normalise) {
        float all = 0.f;
#pragma unroll
        for (int i = 0; i < kPer; i++)
            if (i * 32 + lane < n_experts) all += expf(x[i] - largest);
        sum = warp_sum(all);
    }
    expert = chosen_expert;
    weight = e_chosen / sum;
}

template <typename T, int kPer>
__global__ void __launch_bounds__(32 * kWarpsPerBlock)
    route(int32_t *expert, float *weight, const T *logits, int64_t t, int n_experts, int top_k,
          bool over_chosen, bool normalise, int64_t stride) {
    const int64_t token = int64_t{blockIdx.x} * kWarpsPerBlock + threadIdx.y;
    const int lane = (int)threadIdx.x;
    if (token >= t) return;
    follow_previous();
    int e;
    float w;
    route_token<T, kPer>(e, w, logits + token * stride, n_experts, top_k, over_chosen, normalise);
    if (lane < top_k) {
        expert[token * top_k + lane] = e;
        weight[token * top_k + lane] = w;
    }
}

// Block e: where expert e starts, and the rows of its slots.
__global__ void __launch_bounds__(kThreads)
    permute(int32_t *expert_start, int32_t *slot_row, int32_t *row_token, const int32_t *expert,
            int n_slots, int top_k) {
    __shared__ int warp_count[kThreads / 32];
    __shared__ int total;
    const int e = (int)blockIdx.x, lane = (int)threadIdx.x % 32, warp = (int)threadIdx.x / 32;
    follow_previous();
    int lower = 0;
    for (int s = (int)threadIdx.x; s < n_slots; s += kThreads) lower += expert[s] < e;
    for (int d = 16; d > 0; d >>= 1) lower += __shfl_xor_sync(~0u, lower, d);
    if (lane == 0) warp_count[warp] = lower;
    __syncthreads();
    if (threadIdx.x == 0) {
        int start = 0;
        for (int w = 0; w < kThreads / 32; w++) start += warp_count[w];
        total = start;
        expert_start[e] = start;
        if (e + 1 == (int)gridDim.x) expert_start[e + 1] = n_slots;
    }
    __syncthreads();
    int next = total; // first free row of the expert
    for (int base = 0; base < n_slots; base += kThreads) {
        const int s = base + (int)threadIdx.x;
        const bool mine = s < n_slots && expert[s] == e;
        const unsigned ballot = __ballot_sync(~0u, mine);
        if (lane == 0) warp_count[warp] = __popc(ballot);
        __syncthreads();
        int before = __popc(ballot & ((1u << lane) - 1)), all = 0;
        for (int w = 0; w < kThreads / 32; w++) {
            before += w < warp ? warp_count[w] : 0;
            all += warp_count[w];
        }
        if (mine) {
            slot_row[s] = next + before;
            row_token[next + before] = s / top_k;
        }
        next += all;
        __syncthreads(); // warp_count is written again
    }
}

// Route and permute of at most kFewTokens tokens.
template <typename T, int kPer>
__global__ void __launch_bounds__(kThreads)
    route_few(int32_t *expert_start, int32_t *slot_row, int32_t *row_token, int32_t *expert,
              float *weight, const T *logits, int t, int n_experts, int top_k, bool over_chosen,
              bool normalise, int64_t stride) {
    constexpr int kWarps = kThreads / 32;
    __shared__ int16_t count[kWarps][MOE_EXPERTS_MAX]; // of an expert's among 32 slots
    __shared__ int slot_expert[kThreads], start[MOE_EXPERTS_MAX], sums[kWarps];
    const int s = (int)threadIdx.x, lane = s % 32, warp = s / 32, n_slots = t * top_k;
    for (int i = 0; i * 32 < n_slots; i++) count[i][s] = 0;
    follow_previous();
    for (int token = warp; token < t; token += kWarps) {
        int e;
        float w;
        route_token<T, kPer>(e, w, logits + token * stride, n_experts, top_k, over_chosen,
                             normalise);
        if (lane >= top_k) continue;
        slot_expert[token * top_k + lane] = e;
        expert[token * top_k + lane] = e;
        weight[token * top_k + lane] = w;
    }
    __syncthreads();
    const int mine = s < n_slots ? slot_expert[s] : -1;
    const unsigned same = __match_any_sync(~0u, mine);
    const int before = __popc(same & ((1u << lane) - 1)); // among the slots of this warp
    if (mine >= 0 && before == 0) count[warp][mine] = (int16_t)__popc(same);
    __syncthreads();
    int all = 0; // of expert s; count becomes how many come in the warps before
    for (int i = 0; i * 32 < n_slots; i++) {
        const int16_t n = count[i][s];
        count[i][s] = (int16_t)all;
        all += n;
    }
    int end = all;
#pragma unroll
    for (int d = 1; d < 32; d *= 2) {
        const int up = __shfl_up_sync(~0u, end, d);
        if (lane >= d) end += up;
    }
    if (lane == 31) sums[warp] = end;
    __syncthreads();
    for (int i = 0; i < warp; i++) end += sums[i];
    start[s] = end - all;
    if (s < n_experts) expert_start[s] = end - all;
    if (s == n_experts - 1) expert_start[n_experts] = n_slots;
    __syncthreads();
    if (mine < 0) return;
    const int row = start[mine] + count[warp][mine] + before;
    slot_row[s] = row;
    row_token[row] = s / top_k;
}
static_assert(kThreads == MOE_EXPERTS_MAX, "a thread an expert");
static_assert(kFewTokens * MOE_TOP_K_MAX <= kThreads, "a thread a slot");

template <typename T>
__global__ void __launch_bounds__(kCombineThreads)
    combine(T *out, const T *y, const float *weight, const int32_t *slot_row, int top_k, int dim) {
    const int64_t token = blockIdx.x;
    const int col = ((int)blockIdx.y * kCombineThreads + (int)threadIdx.x) * pack<T>::n;
    if (col >= dim) return;
    follow_previous();
    float sum[pack<T>::n] = {};
    for (int j = 0; j < top_k; j++) {
        const float w = weight[token * top_k + j];
        const pack<T> v = load_pack(y + int64_t{slot_row[token * top_k + j]} * dim + col); // [8]
#pragma unroll
        for (int i = 0; i < pack<T>::n; i++) sum[i] += w * to_f32(v.v[i]);
    }
    pack<T> r;
#pragma unroll
    for (int i = 0; i < pack<T>::n; i++) r.v[i] = from_f32<T>(sum[i]);
    store_pack(out + token * dim + col, r);
}

} // namespace

static status check_route(int64_t t, int32_t n_experts, int32_t top_k, int64_t stride) {
    if (t < 0 || n_experts < 1 || n_experts > MOE_EXPERTS_MAX || top_k < 1 || top_k > n_experts ||
        top_k > MOE_TOP_K_MAX || stride < n_experts)
        return FAIL(ST_SHAPE, "route: %d of %d experts", top_k, n_experts);
    return ST_OK;
}

extern "C" status kernel_moe_route(int32_t *expert, float *weight, const void *logits, int64_t t,
                                   int32_t n_experts, int32_t top_k, bool over_chosen,
                                   bool normalise, int64_t stride, dtype type,
                                   kernel_stream stream) {
    TRY(check_route(t, n_experts, top_k, stride));
    if (t == 0) return ST_OK;
    const dim3 block(32, kWarpsPerBlock);
    const unsigned grid = (unsigned)div_up(t, kWarpsPerBlock);
    switch (type) {
#define X(name)                                                                                    \
    case DT_##name: {                                                                              \
        using T = typename element<DT_##name>::type;                                               \
        const auto kernel = n_experts <= 128 ? route<T, 4> : route<T, MOE_EXPERTS_MAX / 32>;       \
        return launch_early("moe_route", kernel, grid, block, stream, expert, weight,              \
                            static_cast<const T *>(logits), t, n_experts, top_k, over_chosen,      \
                            normalise, stride);                                                    \
    }
        ROUTE_INSTANCES(X)
#undef X
    default: return FAIL(ST_UNSUPPORTED, "route: logits of %s", dtype_text(type));
    }
}

extern "C" status kernel_moe_permute(int32_t *expert_start, int32_t *slot_row, int32_t *row_token,
                                     const int32_t *expert, int64_t t, int32_t n_experts,
                                     int32_t top_k, kernel_stream stream) {
    if (t < 0 || n_experts < 1 || top_k < 1 || t * top_k > INT32_MAX)
        return FAIL(ST_SHAPE, "permute: %lld tokens, %d of %d experts", (long long)t, top_k,
                    n_experts);
    if (t == 0) return ST_OK;
    return launch_early("moe_permute", permute, (unsigned)n_experts, kThreads, stream, expert_start,
                        slot_row, row_token, expert, (int)(t * top_k), top_k);
}

extern "C" status kernel_moe_sort(int32_t *expert_start, int32_t *slot_row, int32_t *row_token,
                                  int32_t *expert, float *weight, const void *logits, int64_t t,
                                  int32_t n_experts, int32_t top_k, bool over_chosen,
                                  bool normalise, int64_t stride, dtype type,
                                  kernel_stream stream) {
    TRY(check_route(t, n_experts, top_k, stride));
    if (t == 0) return ST_OK;
    if (t > kFewTokens) {
        TRY(kernel_moe_route(expert, weight, logits, t, n_experts, top_k, over_chosen, normalise,
                             stride, type, stream));
        return kernel_moe_permute(expert_start, slot_row, row_token, expert, t, n_experts, top_k,
                                  stream);
    }
    switch (type) {
#define X(name)                                                                                    \
    case DT_##name: {                                                                              \
        using T = typename element<DT_##name>::type;                                               \
        const auto kernel =                                                                        \
            n_experts <= 128 ? route_few<T, 4> : route_few<T, MOE_EXPERTS_MAX / 32>;               \
        return launch_early("moe_sort", kernel, 1, kThreads, stream, expert_start, slot_row,       \
                            row_token, expert, weight, static_cast<const T *>(logits), (int)t,     \
                            n_experts, top_k, over_chosen, normalise, stride);                     \
    }
        ROUTE_INSTANCES(X)
#undef X
    default: return FAIL(ST_UNSUPPORTED, "route: logits of %s", dtype_text(type));
    }
}

extern "C" status kernel_moe_combine(void *out, const void *y, const float *weight,
                                     const int32_t *slot_row, int64_t t, int32_t top_k, int32_t dim,
                                     dtype type, kernel_stream stream) {
    if (t < 0 || t > INT32_MAX || top_k < 1 || dim <= 0 || dim % 8)
        return FAIL(ST_SHAPE, "combine [%lld, %d] of %d", (long long)t, dim, top_k);
    if (t == 0) return ST_OK;
    const dim3 grid((unsigned)t, (unsigned)div_up(dim / 8, kCombineThreads));
    switch (type) {
#define X(name)                                                                                    \
    case DT_##name: {                                                                              \
        using T = typename element<DT_##name>::type;                                               \
        return launch_early("moe_combine", combine<T>, grid, kCombineThreads, stream,              \
                            static_cast<T *>(out), static_cast<const T *>(y), weight, slot_row,    \
                            top_k, dim);                                                           \
    }
        COMBINE_INSTANCES(X)
#undef X
    default: return FAIL(ST_UNSUPPORTED, "combine: elements of %s", dtype_text(type));
    }
}
