// moe.cu - a warp routes a token; a block collects the rows of an expert; a thread adds 16 bytes of
// a token's results. Of few tokens the norm before the router belongs to the launch that routes
// them, and the norm behind the experts to the one that adds up what they return.
//
// permute is a counting sort in which every expert's block counts for itself: it reads all slots
// twice (how many go to lower experts and to its own, then the rank of each of its own), which is X
// times as many reads as need be, all from L2, and asks for no second launch, no atomics and no
// order of blocks.
// Of few tokens one block does both.
#include "linear_layout.h"
#include "linear_words.cuh"
#include "mma_sync.cuh"
#include "moe.h"
#include "ptx_sm90.cuh"
#include "traits.cuh"

#define ROUTE_INSTANCES(X)   X(F32) X(F16) X(BF16)
#define COMBINE_INSTANCES(X) X(F16) X(BF16)

namespace {

constexpr int kWarpsPerBlock = 4; // of route
constexpr int kThreads = 512;     // of permute, and of both at once: one an expert there
constexpr int kFewTokens = 8;     // more of them are faster in two launches
constexpr int kKey = kFewTokens * MOE_TOP_K_MAX;
constexpr int kCombineThreads = 128;
constexpr int kLeaveThreads = MOE_LEAVE_DIM_MAX / 8; // at most: 8 columns each
template <typename T> constexpr bool element_is_half = false;
template <> constexpr bool element_is_half<__half> = true;

// Logits as integers of the same order, -0 as 0; none is 0, so that 0 stands for what is taken.
__device__ __forceinline__ uint32_t ordered(float v) {
    const uint32_t bits = __float_as_uint(v + 0.f);
    return bits >> 31 ? ~bits : bits | 0x80000000u;
}
__device__ __forceinline__ float unordered(uint32_t key) {
    return __uint_as_float(key >> 31 ? key & 0x7fffffffu : ~key);
}

// Of a token, by a warp: lane j < top_k gets the j-th best of up to 32 kPer experts and its weight.
// x: the logits, of expert lane * kPer + i.
template <int kPer>
__device__ __forceinline__ void route_token(int &expert, float &weight, float (&x)[kPer],
                                            int n_experts, int top_k, bool over_chosen,
                                            bool normalise) {
    const int lane = (int)threadIdx.x % 32;
    uint32_t key[kPer];
#pragma unroll
    for (int i = 0; i < kPer; i++) {
        const bool some = lane * kPer + i < n_experts;
        if (!some || isnan(x[i])) x[i] = -INFINITY;
        key[i] = some ? ordered(x[i]) : 0;
    }
    float chosen = -INFINITY, largest = 0.f; // lane j keeps the j-th best
    int chosen_expert = 0;
    for (int j = 0; j < top_k; j++) {
        uint32_t own = key[0];
#pragma unroll
        for (int i = 0; i < kPer; i += 2) own = max(own, max(key[i], key[i + 1]));
        const uint32_t best = __reduce_max_sync(~0u, own);
        const int winner = __ffs(__ballot_sync(~0u, own == best)) - 1;
        int at = 0; // the lowest of this lane's best
#pragma unroll
        for (int i = kPer - 1; i >= 0; i--) at = key[i] == best ? i : at;
#pragma unroll
        for (int i = 0; i < kPer; i++)
            if (lane == winner && at == i) key[i] = 0;
        at = __shfl_sync(~0u, at, winner);
        if (j == 0) largest = unordered(best);
        if (lane == j) {
            chosen = unordered(best);
            chosen_expert = winner * kPer + at;
        }
    }
    const float e_chosen = lane < top_k ? expf(chosen - largest) : 0.f;
    float sum = warp_sum(e_chosen);
    if (!over_chosen && !normalise) {
        float all = 0.f;
#pragma unroll
        for (int i = 0; i < kPer; i++)
            if (lane * kPer + i < n_experts) all += expf(x[i] - largest);
        sum = warp_sum(all);
    }
    expert = chosen_expert;
    weight = e_chosen / sum;
}

template <int kPer, typename T>
__device__ __forceinline__ void load_logits(float (&x)[kPer], const T *logits, int n_experts) {
#pragma unroll
    for (int i = 0; i < kPer; i++) {
        const int e = (int)threadIdx.x % 32 * kPer + i;
        x[i] = e < n_experts ? to_f32(logits[e]) : 0.f;
    }
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
    float w, x[kPer];
    load_logits(x, logits + token * stride, n_experts);
    route_token(e, w, x, n_experts, top_k, over_chosen, normalise);
    if (lane < top_k) {
        expert[token * top_k + lane] = e;
        weight[token * top_k + lane] = w;
    }
}

// Four slots' experts from s on, of those below `end`; others are no expert's.
__device__ __forceinline__ int4 experts_at(const int32_t *expert, int s, int end) {
    if (s + 3 < end) return *reinterpret_cast<const int4 *>(expert + s);
    const auto at = [&](int i) { return i < end ? expert[i] : INT32_MAX; };
    return make_int4(at(s), at(s + 1), at(s + 2), at(s + 3));
}

// Block e: where expert e starts, and the rows of its slots. A warp has an even part of all slots,
// 128 of them at a time, and counts them first.
__global__ void __launch_bounds__(kThreads)
    permute(int32_t *expert_start, int32_t *slot_row, int32_t *row_token, const int32_t *expert,
            int n_slots, int top_k) {
    constexpr int kWarps = kThreads / 32, kSlots = 128, kAhead = 4;
    __shared__ int lower_of[kWarps], own_of[kWarps];
    const int e = (int)blockIdx.x, lane = (int)threadIdx.x % 32, warp = (int)threadIdx.x / 32;
    const int each = (n_slots + kWarps * kSlots - 1) / (kWarps * kSlots) * kSlots;
    const int begin = min(warp * each, n_slots), end = min(begin + each, n_slots);
    follow_previous();
    int lower = 0, own = 0;
#pragma unroll 4
    for (int s = begin + lane * 4; s < end; s += kSlots) {
        const int4 v = experts_at(expert, s, end);
        lower += (v.x < e) + (v.y < e) + (v.z < e) + (v.w < e);
        own += (v.x == e) + (v.y == e) + (v.z == e) + (v.w == e);
    }
    lower = __reduce_add_sync(~0u, lower);
    own = __reduce_add_sync(~0u, own);
    if (lane == 0) lower_of[warp] = lower, own_of[warp] = own;
    __syncthreads();
    int next = 0; // the warp's first row
    for (int w = 0; w < kWarps; w++) next += lower_of[w];
    if (threadIdx.x == 0) {
        expert_start[e] = next;
        if (e + 1 == (int)gridDim.x) expert_start[e + 1] = n_slots;
    }
    for (int w = 0; w < warp; w++) next += own_of[w];
    if (own == 0) return;
    for (int base = begin; base < end; base += kAhead * kSlots) {
        int4 v[kAhead];
#pragma unroll
        for (int i = 0; i < kAhead; i++)
            v[i] = experts_at(expert, base + i * kSlots + lane * 4, end);
#pragma unroll
        for (int i = 0; i < kAhead; i++) {
            const bool mine[4] = {v[i].x == e, v[i].y == e, v[i].z == e, v[i].w == e};
            if (!__any_sync(~0u, mine[0] || mine[1] || mine[2] || mine[3])) continue;
            int row = next;
#pragma unroll
            for (int c = 0; c < 4; c++) {
                const unsigned ballot = __ballot_sync(~0u, mine[c]);
                row += __popc(ballot & ((1u << lane) - 1));
                next += __popc(ballot);
            }
#pragma unroll
            for (int c = 0; c < 4; c++) {
                const int s = base + i * kSlots + lane * 4 + c;
                if (!mine[c]) continue;
                slot_row[s] = row;
                row_token[row++] = s / top_k;
            }
        }
    }
}

// What permute does, by a block that has a thread for each expert and for each slot. key: in shared
// memory, behind a barrier, of each slot expert * kKey + token * MOE_TOP_K_MAX + which.
__device__ __forceinline__ void sort_few(const int *key, int32_t *expert_start, int32_t *slot_row,
                                         int32_t *row_token, int32_t *told, int n_slots,
                                         int n_experts, int top_k) {
    const int s = (int)threadIdx.x, mine = s < n_slots ? key[s] : 0;
    int start = 0, row = 0, before = 0;
    unsigned tokens = 0; // of the slot's expert
#pragma unroll 8
    for (int i = 0; i < n_slots; i++) {
        start += key[i] < s * kKey;
        row += key[i] < mine;
        const unsigned other = (unsigned)key[i];
        const bool same = other / kKey == (unsigned)mine / kKey;
        before += same && key[i] < mine;
        tokens |= same ? 1u << other / MOE_TOP_K_MAX % kFewTokens : 0;
    }
    if (told && s < n_slots) {
        const int v = mine / kKey + 1 + (before == 0 ? (int)tokens << 16 : 0);
        asm volatile("st.relaxed.gpu.global.s32 [%0], %1;" ::"l"(told + row * LINEAR_TOLD), "r"(v)
                     : "memory");
    }
    if (s < n_experts) expert_start[s] = start;
    if (s == 0) expert_start[n_experts] = n_slots;
    if (s >= n_slots) return;
    slot_row[s] = row;
    row_token[row] = s / top_k;
}

// Route and permute of at most kFewTokens tokens.
template <typename T, int kPer>
__global__ void __launch_bounds__(kThreads)
    route_few(int32_t *expert_start, int32_t *slot_row, int32_t *row_token, int32_t *expert,
              float *weight, const T *logits, int t, int n_experts, int top_k, bool over_chosen,
              bool normalise, int64_t stride) {
    __shared__ int key[kFewTokens * MOE_TOP_K_MAX];
    const int lane = (int)threadIdx.x % 32, warp = (int)threadIdx.x / 32;
    follow_previous();
    if (warp < t) {
        int e;
        float w, x[kPer];
        load_logits(x, logits + warp * stride, n_experts);
        route_token(e, w, x, n_experts, top_k, over_chosen, normalise);
        if (lane < top_k) {
            const int slot = warp * top_k + lane;
            key[slot] = e * kKey + warp * MOE_TOP_K_MAX + lane;
            expert[slot] = e;
            weight[slot] = w;
        }
    }
    __syncthreads();
    sort_few(key, expert_start, slot_row, row_token, nullptr, t * top_k, n_experts, top_k);
}
static_assert(kFewTokens <= kThreads / 32, "a warp a token");
static_assert(kFewTokens == MOE_TOLD_TOKENS && kKey == kFewTokens * MOE_TOP_K_MAX, "sort_few");
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

// --- With the norms -----------------------------------------------------------------------------

constexpr int kEnterThreads = 256, kEnterWarps = kEnterThreads / 32;
constexpr int kEnterUnits = 4; // of K, of a CTA, at most
constexpr int kEnterExperts = kEnterWarps * LINEAR_STRIP, kEnterTokens = 8; // 8: of mma's N
constexpr int kClusterMax = 16, kWideTokens = 4; // so few are faster in more CTAs

struct enter_args {
    moe_enter p;
    const uint4 *w; // as linear_layout.h has it, 16 bits
    const void *bias;
    int units, strips, tokens; // of K; of 16 experts; of a cluster
};

// One float into the shared memory of another CTA, counted by a barrier there.
__device__ __forceinline__ void remote_store(uint32_t to, float v, uint32_t bar) {
    asm volatile(
        "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.f32 [%0], %1, [%2];" ::"r"(to),
        "f"(v), "r"(bar)
        : "memory");
}

// A CTA of a cluster has 64 U columns of up to eight tokens, a warp a token, and of the router's
// matrix those of all experts, a warp 16 of them, which it holds before its turn comes. Products
// are those of residual times gain, since a row's root is known only when all CTAs have its
// squares, and sums are multiplied by it: one exchange. The first CTA gets the sums, routes, and
// sorts where this cluster has all the tokens.
template <typename T, int U> struct enter_shared {
    static constexpr int cols = U * LINEAR_UNIT;
    __align__(16) T x[kEnterTokens][cols + 8];
    float squares[kClusterMax][kEnterTokens], unit[kEnterTokens];
    __align__(8) uint64_t sent;
    int key[kEnterTokens * MOE_TOP_K_MAX];
};
constexpr int kEnterPer = kEnterExperts / 32; // experts of a lane: lane * kEnterPer + i

// Where a thread is: its warp's token, eight columns of it.
struct enter_place {
    int lane, warp, rank, ctas, first, m; // tokens first .. first + m - 1 are the cluster's
    bool token, here;                     // has the warp a token, and the lane columns of it?
    int64_t at;                           // of the lane's columns in residual, add and x
    uint32_t bar;
};

// The token's residual, summed up, and its squares to all CTAs; residual times gain to shared
// memory. fp16 has no room for what a residual may become: there rows of about one, over `unit`.
template <typename T, int U>
__device__ __forceinline__ pack<T> enter_row(const moe_enter &p, const enter_place &e,
                                             enter_shared<T, U> &shared, const pack<T> &gain) {
    pack<T> r = {}, add = {};
    if (!e.token) return r;
    if (e.here) {
        r = load_pack(static_cast<const T *>(p.residual) + e.at); // [8]
        add = load_pack(static_cast<const T *>(p.add) + e.at);
    }
    float sum = 0.f, by = 1.f;
#pragma unroll
    for (int i = 0; i < pack<T>::n; i++) {
        r.v[i] = from_f32<T>(to_f32(r.v[i]) + to_f32(add.v[i]));
        sum += to_f32(r.v[i]) * to_f32(r.v[i]);
    }
    sum = warp_sum(sum);
    if (e.lane < e.ctas) {
        const uint32_t to = shared_address(&shared.squares[e.rank][e.warp]);
        remote_store(remote_address(to, e.lane), sum, remote_address(e.bar, e.lane));
    }
    if (element_is_half<T> && sum > 0.f) by = exp2f(rintf(-.5f * log2f(sum / shared.cols)));
    by = fminf(fmaxf(by, 0x1p-40f), 0x1p40f);
    if (e.lane == 0) shared.unit[e.warp] = 1.f / by;
    pack<T> v;
#pragma unroll
    for (int i = 0; i < pack<T>::n; i++)
        v.v[i] = from_f32<T>(to_f32(r.v[i]) * by * to_f32(gain.v[i]));
    if (e.lane * pack<T>::n < shared.cols) store_pack(&shared.x[e.warp][e.lane * pack<T>::n], v);
    return r;
}

// The lane's columns of the residual and of its norm.
template <typename T>
__device__ __forceinline__ void enter_write(const moe_enter &p, const enter_place &e, pack<T> r,
                                            const pack<T> &gain, float scale) {
    store_pack(static_cast<T *>(p.residual) + e.at, r);
#pragma unroll
    for (int i = 0; i < pack<T>::n; i++)
        r.v[i] = from_f32<T>(to_f32(r.v[i]) * scale * to_f32(gain.v[i]));
    store_pack(static_cast<T *>(p.x) + e.at, r);
    if (!p.words) return;
    uint4 word;
    uint32_t *const w = &word.x;
#pragma unroll
    for (int i = 0; i < 4; i++) w[i] = word_half(r.v[2 * i]) | word_half(r.v[2 * i + 1]) << 16;
    asm volatile("st.relaxed.gpu.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(
                     static_cast<T *>(p.words) + e.at),
                 "r"(word.x), "r"(word.y), "r"(word.z), "r"(word.w)
                 : "memory");
}

// The warp's 16 experts by all tokens, of this CTA's columns, to `part` of the first CTA. w: of
// every 32 inputs those of rows g and g + 8 that lane 4 g + t holds, 8 t and on, which are inputs
// 2 t, 2 t + 1, 2 t + 8, 2 t + 9 of two products; of x the same, so their order does not matter.
template <typename T, int U>
__device__ __forceinline__ void enter_products(const enter_place &e, enter_shared<T, U> &shared,
                                               const uint4 (&w)[U][4], int tokens,
                                               const float *part) {
    float acc[2][4] = {};
    const T *row = &shared.x[e.lane / 4][e.lane % 4 * 8];
#pragma unroll
    for (int u = 0; u < U; u++)
#pragma unroll
        for (int j = 0; j < 4; j += 2) {
            const uint4 b = *reinterpret_cast<const uint4 *>(row + u * LINEAR_UNIT + j * 16);
            const uint4 lo = w[u][j], hi = w[u][j + 1]; // rows g, g + 8
            const uint32_t a[2][4] = {{lo.x, hi.x, lo.y, hi.y}, {lo.z, hi.z, lo.w, hi.w}};
            multiply(acc[0], a[0], b.x, b.y, T{});
            multiply(acc[1], a[1], b.z, b.w, T{});
        }
    const uint32_t to = remote_address(shared_address(part), 0), arrived = remote_address(e.bar, 0);
#pragma unroll
    for (int i = 0; i < 4; i++) {
        const int token = e.lane % 4 * 2 + i % 2,
                  expert = e.warp * LINEAR_STRIP + e.lane / 4 + i / 2 * 8;
        if (token < e.m)
            remote_store(to + 4 * ((e.rank * tokens + token) * kEnterExperts + expert),
                         (acc[0][i] + acc[1][i]) * shared.unit[token], arrived);
    }
}

// In the first CTA: the token's logits, in order of K, and its experts.
__device__ __forceinline__ void enter_route(const moe_enter &p, const enter_place &e, int *key,
                                            const float (&bias)[kEnterPer], float scale, int token,
                                            int tokens, const float *part) {
    float4 sums = {};
    const float *from = part + token * kEnterExperts + e.lane * kEnterPer;
#pragma unroll 8
    for (int c = 0; c < e.ctas; c++) {
        const float4 v = *reinterpret_cast<const float4 *>(from + c * tokens * kEnterExperts);
        sums.x += v.x, sums.y += v.y, sums.z += v.z, sums.w += v.w;
    }
    float x[kEnterPer] = {bias[0] + sums.x * scale, bias[1] + sums.y * scale,
                          bias[2] + sums.z * scale, bias[3] + sums.w * scale};
#pragma unroll
    for (int i = 0; i < kEnterPer; i++)
        if (e.lane * kEnterPer + i < p.n_experts)
            p.logits[int64_t{e.first + token} * p.stride + e.lane * kEnterPer + i] = x[i];
    int expert;
    float weight;
    route_token(expert, weight, x, p.n_experts, p.top_k, p.over_chosen, p.normalise);
    if (e.lane >= p.top_k) return;
    const int slot = token * p.top_k + e.lane;
    key[slot] = expert * kKey + token * MOE_TOP_K_MAX + e.lane;
    p.expert[e.first * p.top_k + slot] = expert;
    p.weight[e.first * p.top_k + slot] = weight;
}

template <typename T, int U>
__global__ void __launch_bounds__(kEnterThreads, 2) enter(const __grid_constant__ enter_args a) {
#if __CUDA_ARCH__ >= 900
    extern __shared__ __align__(16) float part[]; // [CTA][token][expert], in the first CTA
    __shared__ enter_shared<T, U> shared;
    const moe_enter &p = a.p;
    enter_place e;
    e.lane = (int)threadIdx.x % 32, e.warp = (int)threadIdx.x / 32;
    e.rank = cluster_rank(), e.ctas = cluster_size();
    e.first = (int)blockIdx.x / e.ctas * a.tokens, e.m = min(a.tokens, (int)p.t - e.first);
    const int col = e.rank * shared.cols + e.lane * pack<T>::n;
    e.token = e.warp < e.m;
    e.here = e.lane * pack<T>::n < shared.cols && col < p.dim;
    e.at = int64_t{e.first + e.warp} * p.dim + col;
    e.bar = shared_address(&shared.sent);
    if (threadIdx.x == 0) {
        barrier_init(e.bar, 1);
        barrier_init_fence();
        const int sums = e.rank == 0 ? a.strips * LINEAR_STRIP : 0;
        barrier_arrive_expect(e.bar, e.ctas * e.m * (1 + sums) * (int)sizeof(float));
    }
    cluster_arrive(); // others' memory is written to once they have begun
    const bool strip_here = e.warp < a.strips;
    uint4 w[U][4];
#pragma unroll
    for (int u = 0; u < U; u++) {
        const int unit_at = e.rank * U + u;
        const bool some = strip_here && unit_at < a.units;
        const uint4 *from =
            a.w + (int64_t{e.warp / 4} * a.units + unit_at) * 512 + e.warp % 4 * 128;
#pragma unroll
        for (int j = 0; j < 4; j++) {
            const int row = e.lane / 4 + j % 2 * 8, chunk = j / 2 * 4 + e.lane % 4;
            w[u][j] = some ? __ldg(from + linear_chunk_at(row, chunk) / 16) : uint4{};
        }
    }
    pack<T> gain = {};
    if (e.here) gain = load_pack(static_cast<const T *>(p.gain) + col);
    float bias[kEnterPer];
#pragma unroll
    for (int i = 0; i < kEnterPer; i++) {
        const int expert = e.lane * kEnterPer + i;
        bias[i] =
            a.bias && expert < p.n_experts ? to_f32(static_cast<const T *>(a.bias)[expert]) : 0.f;
    }
    cluster_wait();
    wait_for_previous();
    launch_dependents();

    const pack<T> r = enter_row(p, e, shared, gain);
    __syncthreads();
    if (strip_here) enter_products(e, shared, w, a.tokens, part);
    barrier_wait(e.bar, 0);
    // In the first CTA other warps route than those that write x, where there are as many.
    const int by = a.tokens <= kEnterWarps / 2 ? kEnterWarps / 2 : 0;
    const bool routes = e.rank == 0 && e.warp >= by && e.warp - by < e.m;
    if (e.token || routes) {
        const int token = e.token ? e.warp : e.warp - by;
        float all = 0.f;
#pragma unroll 8
        for (int c = 0; c < e.ctas; c++) all += shared.squares[c][token];
        const float scale = rsqrtf(all / (float)p.dim + p.eps);
        if (e.token && e.here) enter_write(p, e, r, gain, scale);
        if (routes) enter_route(p, e, shared.key, bias, scale, token, a.tokens, part);
    }
    if (e.rank != 0 || p.t > a.tokens) return;
    __syncthreads();
    sort_few(shared.key, p.expert_start, p.slot_row, p.row_token, p.told, (int)p.t * p.top_k,
             p.n_experts, p.top_k);
#endif
}
static_assert(kEnterTokens * MOE_TOP_K_MAX <= kEnterThreads, "a thread a slot");
static_assert(kEnterTokens <= kEnterWarps && kEnterExperts <= kEnterThreads, "a warp, a thread");
static_assert(kEnterExperts == 4 * 32, "of a lane, sums are a float4");

// Where the program says, which the compiler would else move to the use.
__device__ __forceinline__ uint4 load_now(const void *p) {
    uint4 v;
    asm volatile("ld.relaxed.gpu.global.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                 : "l"(p)
                 : "memory");
    return v;
}

// A block has a row, and K rows of its experts under way. The launch before is a linear of the same
// rows of experts, so what slot_row and weight are was known when that began
// (linear_problem.routed). kWords: y comes in words, of a launch that runs; they are waited for.
template <typename T, int K, bool kWords>
__global__ void __launch_bounds__(kLeaveThreads)
    leave(T *x, T *residual, const T *y, const T *gain, const float *weight,
          const int32_t *slot_row, int32_t *told, int top_k, int dim, float eps) {
    __shared__ float shared[32];
    const int lane = (int)threadIdx.x % 32, col = (int)threadIdx.x * pack<T>::n;
    const bool here = col < dim;
    const int64_t token = blockIdx.x, at = token * dim + (here ? col : 0);
    const pack<T> g = load_pack(gain + (here ? col : 0));
    const int row = lane < top_k ? slot_row[token * top_k + lane] : 0;
    const float share = lane < top_k ? weight[token * top_k + lane] : 0.f;
    const float inverse = 1.f / (float)dim;
    launch_dependents();
    if (!kWords) wait_for_previous();
    if (!kWords && told && (int)threadIdx.x < top_k) told[row * LINEAR_TOLD] = 0;
    pack<T> r = load_pack(residual + at); // [8]
    float sum[pack<T>::n] = {};
    for (int j0 = 0; j0 < top_k; j0 += K) {
        uint4 v[K]; // all asked for before any is used
        bool there;
        do {
            there = true;
#pragma unroll
            for (int j = 0; j < K; j++)
                v[j] = load_now(y + int64_t{__shfl_sync(~0u, row, (j0 + j) % 32)} * dim +
                                (here ? col : 0));
#pragma unroll
            for (int j = 0; kWords && j < K; j++)
                there = there && (j0 + j >= top_k || words_there(v[j]));
        } while (kWords && !__all_sync(~0u, there));
#pragma unroll
        for (int j = 0; kWords && j < K; j++) v[j] = make_uint4(~v[j].x, ~v[j].y, ~v[j].z, ~v[j].w);
#pragma unroll
        for (int j = 0; j < K; j++) {
            const float w = __shfl_sync(~0u, share, (j0 + j) % 32);
            const pack<T> own = load_pack(reinterpret_cast<const T *>(&v[j]));
#pragma unroll
            for (int i = 0; i < pack<T>::n; i++)
                sum[i] += j0 + j < top_k ? w * to_f32(own.v[i]) : 0.f;
        }
    }
    float squares = 0.f;
#pragma unroll
    for (int i = 0; i < pack<T>::n; i++) {
        r.v[i] = from_f32<T>(to_f32(r.v[i]) + sum[i]);
        squares += here ? to_f32(r.v[i]) * to_f32(r.v[i]) : 0.f;
    }
    const float scale = rsqrtf(block_sum(squares, shared) * inverse + eps);
    // Whoever finds no row told now has none to work on.
    if (kWords && told && (int)threadIdx.x < top_k) told[row * LINEAR_TOLD] = 0;
    if (here) {
        store_pack(residual + at, r);
#pragma unroll
        for (int i = 0; i < pack<T>::n; i++)
            r.v[i] = from_f32<T>(to_f32(r.v[i]) * scale * to_f32(g.v[i]));
        store_pack(x + at, r);
    }
    if (kWords) wait_for_previous();
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

extern "C" bool kernel_moe_enter_accepts(const moe_enter *p, int32_t sm) {
    const linear_weight *w = p->router;
    return sm >= 90 && w->format == WF_16 && w->family == 90 && w->type == p->type &&
           p->n_experts <= kEnterExperts && p->top_k <= MOE_TOP_K_MAX &&
           p->dim <= kClusterMax * kEnterUnits * LINEAR_UNIT && p->t <= MOE_ENTER_TOKENS_MAX;
}

template <typename T> static status launch_enter(const moe_enter *p, cudaStream_t stream) {
    const linear_layout l = linear_layout_of(p->router);
    const int each = p->t <= kWideTokens && l.units <= 2 * kClusterMax ? 2 : kEnterUnits;
    // Two at least: compute-sanitizer lets no CTA that is alone store as clusters do.
    const int ctas = (int)i64_max(2, div_up(l.units, each));
    const int tokens = p->t < kEnterTokens ? (int)p->t : kEnterTokens;
    const enter_args a = {*p,      static_cast<const uint4 *>(p->router->code), p->router->bias,
                          l.units, (int)div_up(p->n_experts, LINEAR_STRIP),     tokens};
    const auto kernel = each == 2 ? enter<T, 2> : enter<T, kEnterUnits>;
    const int bytes = ctas * tokens * kEnterExperts * (int)sizeof(float);
    (void)cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
    (void)cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
    // For linears of the experts to find room on its SMs.
    (void)cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout,
                               cudaSharedmemCarveoutMaxShared);
    const launch_config how((unsigned)(div_up(p->t, tokens) * ctas), kEnterThreads, (size_t)bytes,
                            stream, true, (unsigned)ctas);
    (void)cudaLaunchKernelEx(&how.config, kernel, a);
    TRY(launched("moe_enter"));
    if (p->t <= tokens) return ST_OK;
    return kernel_moe_permute(p->expert_start, p->slot_row, p->row_token, p->expert, p->t,
                              p->n_experts, p->top_k, stream);
}

extern "C" status kernel_moe_enter(const moe_enter *p, kernel_stream stream) {
    TRY(check_route(p->t, p->n_experts, p->top_k, p->stride));
    if (p->router->k != p->dim || p->dim % 8 || !kernel_moe_enter_accepts(p, 90))
        return FAIL(ST_SHAPE, "moe_enter [%lld, %d], %d experts", (long long)p->t, p->dim,
                    p->n_experts);
    if (p->t == 0) return ST_OK;
    return p->type == DT_F16 ? launch_enter<__half>(p, stream)
                             : launch_enter<__nv_bfloat16>(p, stream);
}

extern "C" status kernel_moe_leave(void *x, void *residual, const void *y, const void *gain,
                                   const float *weight, const int32_t *slot_row, int32_t *told,
                                   bool y_in_words, int64_t t, int32_t top_k, int32_t dim,
                                   float eps, dtype type, kernel_stream stream) {
    if (t < 0 || t > INT32_MAX || top_k < 1 || top_k > MOE_TOP_K_MAX || dim <= 0 || dim % 8 ||
        dim > MOE_LEAVE_DIM_MAX)
        return FAIL(ST_SHAPE, "moe_leave [%lld, %d] of %d", (long long)t, dim, top_k);
    if (t == 0) return ST_OK;
    const unsigned threads = (unsigned)div_up(dim, 8 * 32) * 32;
    switch (type) {
#define X(name)                                                                                    \
    case DT_##name: {                                                                              \
        using T = typename element<DT_##name>::type;                                               \
        const auto kernel = y_in_words   ? leave<T, 8, true>                                       \
                            : top_k <= 2 ? leave<T, 2, false>                                      \
                            : top_k <= 4 ? leave<T, 4, false>                                      \
                                         : leave<T, 8, false>;                                     \
        return launch_early("moe_leave", kernel, (unsigned)t, threads, stream,                     \
                            static_cast<T *>(x), static_cast<T *>(residual),                       \
                            static_cast<const T *>(y), static_cast<const T *>(gain), weight,       \
                            slot_row, told, top_k, dim, eps);                                      \
    }
        COMBINE_INSTANCES(X)
#undef X
    default: return FAIL(ST_UNSUPPORTED, "moe_leave: elements of %s", dtype_text(type));
    }
}
