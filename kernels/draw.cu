// draw.cu - one token from one row of logits, one block a row, without sorting.
//
// Candidates are ordered by key: the logit after the penalty as an unsigned integer that orders
// alike. What top-k, top-p and min-p keep is always a prefix of (key descending, id ascending), so
// it is a threshold: all of a larger key, and those of the key itself up to some id. A threshold is
// found by a descent over the key's four bytes with a histogram of 256 bins each: of counts for
// top-k, of weights for top-p. Weights are integers (draw.h says why), so every sum is exact and
// independent of order.
//
//   1  largest z, lowest id                     greedy ends here
//   2  top-k: descent by count                  -> threshold
//   3  top-p: sum of what is kept, descent by weight -> threshold
// 4  sum of what is kept by all three; each warp has a stretch of ids; the stretch in which the
// drawn
//      number falls is walked by its warp
//
// Each step reads the row once or (a descent) four times, from L2.
#include "draw.h"
#include "traits.cuh"

namespace {

constexpr int kThreads = 1024, kWarps = kThreads / 32, kBins = 256;
constexpr double kOne = 17592186044416.; // 2^44: weight 1; times 2^18 tokens stays below 2^62
constexpr double kLeast = -31.3;         // exp of less rounds to weight 0

typedef unsigned long long weight_sum;

struct candidate {
    float z;
    int id;
};

__device__ __forceinline__ bool better(candidate a, candidate b) {
    return a.z > b.z || (a.z == b.z && a.id < b.id);
}

__device__ __forceinline__ float finite_or_least(float x) { return isfinite(x) ? x : -INFINITY; }

// Orders as floats do, -0 and +0 alike.
__device__ __forceinline__ uint32_t key_of(float z) {
    const uint32_t u = __float_as_uint(z == 0.f ? 0.f : z);
    return u >> 31 ? ~u : u | 0x80000000u;
}

// What is kept: key > at, or key == at and id <= last_id.
struct threshold {
    uint32_t at;
    int last_id;
};

__device__ __forceinline__ bool keeps(threshold t, uint32_t key, int id) {
    return key > t.at || (key == t.at && id <= t.last_id);
}

// One row as the steps see it. Member functions marked "block" are called by all threads together.
struct row_view {
    const float *logits;  // [vocab]
    const uint32_t *seen; // bit set, or NULL
    float penalty;
    int vocab;
    double largest, temperature; // largest: of z

    __device__ __forceinline__ float z(int id) const { return z_of(id, logits[id]); }
    __device__ __forceinline__ float z_of(int id, float logit) const {
        float v = finite_or_least(logit);
        if (seen && seen[id >> 5] >> (id & 31) & 1) {
            v = v > 0.f ? __fdiv_rn(v, penalty) : __fmul_rn(v, penalty);
            if (isnan(v)) v = -INFINITY;
        }
        return v;
    }
    __device__ __forceinline__ double e(float v) const {
        return exp(((double)v - largest) / temperature);
    }
    __device__ __forceinline__ weight_sum weight(float v) const {
        if (((double)v - largest) < kLeast * temperature) return 0;
        return (weight_sum)__double2ll_rn(e(v) * kOne);
    }
};

struct block_memory {
    weight_sum bin[kBins];
    weight_sum warp[kWarps];
    candidate best[kWarps];
    double sum[kWarps];
    weight_sum chosen[2]; // results that one thread hands to all
    int chosen_id;
};

// Sum over the block, in every thread. Block.
__device__ weight_sum block_total(weight_sum x, block_memory &m) {
    for (int d = 16; d > 0; d >>= 1) x += __shfl_xor_sync(~0u, x, d);
    __syncthreads();
    if (threadIdx.x % 32 == 0) m.warp[threadIdx.x / 32] = x;
    __syncthreads();
    weight_sum all = 0;
    for (int w = 0; w < kWarps; w++) all += m.warp[w];
    return all;
}

__device__ candidate block_best(candidate c, block_memory &m) {
    for (int d = 16; d > 0; d >>= 1) {
        const candidate o = {__shfl_xor_sync(~0u, c.z, d), __shfl_xor_sync(~0u, c.id, d)};
        if (better(o, c)) c = o;
    }
    __syncthreads();
    if (threadIdx.x % 32 == 0) m.best[threadIdx.x / 32] = c;
    __syncthreads();
    c = m.best[0];
    for (int w = 1; w < kWarps; w++)
        if (better(m.best[w], c)) c = m.best[w];
    return c;
}

// In a fixed order. Block.
__device__ double block_sum_f64(double x, block_memory &m) {
    for (int d = 16; d > 0; d >>= 1) x += __shfl_xor_sync(~0u, x, d);
    __syncthreads();
    if (threadIdx.x % 32 == 0) m.sum[threadIdx.x / 32] = x;
    __syncthreads();
    double all = 0;
    for (int w = 0; w < kWarps; w++) all += m.sum[w];
    return all;
}

// Ids are dealt to warps in stretches, so that a warp's share is a range of ids and its reads
// coalesce.
__device__ __forceinline__ int stretch(int vocab) {
    return (vocab + kWarps * 32 - 1) / (kWarps * 32) * 32;
}

// Among ids with `value(id) > 0`, in ascending order: the first at which the running sum of values
// exceeds `target`, or the last one with a value if none does; -1 when there is none. Block.
template <typename F>
__device__ int find_by_id(int vocab, weight_sum target, block_memory &m, F value) {
    const int warp = (int)threadIdx.x / 32, lane = (int)threadIdx.x % 32, each = stretch(vocab);
    const int lo = warp * each, hi = min(vocab, lo + each);
    weight_sum sum = 0;
    for (int id = lo + lane; id < hi; id += 32) sum += value(id);
    for (int d = 16; d > 0; d >>= 1) sum += __shfl_xor_sync(~0u, sum, d);
    __syncthreads();
    if (lane == 0) m.warp[warp] = sum;
    if (threadIdx.x == 0) m.chosen_id = -1;
    __syncthreads();
    weight_sum before = 0;
    int owner = -1; // the warp whose stretch passes the target, else the last that holds a value
    weight_sum before_owner = 0;
    for (int w = 0; w < kWarps; w++) {
        if (m.warp[w] > 0) {
            owner = w;
            before_owner = before;
        }
        before += m.warp[w];
        if (m.warp[w] > 0 && before > target) break;
    }
    if (warp == owner) {
        weight_sum running = before_owner;
        int found = -1;
        for (int base = lo; base < hi && (found < 0 || running <= target); base += 32) {
            const int id = base + lane;
            const weight_sum v = id < hi ? value(id) : 0;
            weight_sum prefix = v;
            for (int d = 1; d < 32; d <<= 1) {
                const weight_sum o = __shfl_up_sync(~0u, prefix, d);
                if (lane >= d) prefix += o;
            }
            const unsigned has = __ballot_sync(~0u, v > 0);
            const unsigned past = __ballot_sync(~0u, v > 0 && running + prefix > target);
            if (past)
                found = base + __ffs((int)past) - 1;
            else if (has)
                found = base + 31 - __clz((int)has);
            running += __shfl_sync(~0u, prefix, 31);
            if (past) break;
        }
        if (lane == 0) m.chosen_id = found;
    }
    __syncthreads();
    return m.chosen_id;
}

// Add w to a bin, for all lanes of a warp together; w == 0 adds nothing. Logits crowd into few bins
// at first, where lanes would queue for one address, so up to four bins are added up in the warp.
__device__ __forceinline__ void add_to_bin(block_memory &m, int bin, weight_sum w) {
    constexpr int kRounds = 4, kHalf = 22; // w <= 2^44: two halves that 32 lanes may add in 32 bits
    const int lane = (int)threadIdx.x % 32;
    unsigned left = __ballot_sync(~0u, w > 0);
    for (int round = 0; round < kRounds && left; round++) {
        const int leader = __ffs((int)left) - 1;
        const int leading = __shfl_sync(~0u, bin, leader); // by all lanes, hence before the test
        const bool mine = (left >> lane & 1) && bin == leading;
        const unsigned lo = __reduce_add_sync(~0u, mine ? (unsigned)w & ((1u << kHalf) - 1) : 0u);
        const unsigned hi = __reduce_add_sync(~0u, mine ? (unsigned)(w >> kHalf) : 0u);
        if (lane == leader) atomicAdd(&m.bin[bin], ((weight_sum)hi << kHalf) + lo);
        left &= ~__ballot_sync(~0u, mine);
    }
    if (left >> lane & 1) atomicAdd(&m.bin[bin], w);
}

// From the highest bin down: the first one at which `above` and the bins so far sum to `target`, or
// the lowest that holds anything. m.chosen = the sum before it, its number. One warp.
__device__ void choose_bin(block_memory &m, weight_sum above, weight_sum target) {
    constexpr int kEach = kBins / 32;
    const int lane = (int)threadIdx.x, top = kBins - 1 - lane * kEach;
    weight_sum mine = 0;
    for (int i = 0; i < kEach; i++) mine += m.bin[top - i];
    weight_sum upto = mine; // inclusive over lanes
    for (int d = 1; d < 32; d <<= 1) {
        const weight_sum o = __shfl_up_sync(~0u, upto, d);
        if (lane >= d) upto += o;
    }
    const unsigned reach = __ballot_sync(~0u, mine > 0 && above + upto >= target);
    const unsigned has = __ballot_sync(~0u, mine > 0);
    const int owner = reach ? __ffs((int)reach) - 1 : has ? 31 - __clz((int)has) : 31;
    if (lane != owner) return;
    weight_sum sum = above + upto - mine;
    m.chosen[0] = sum;
    m.chosen[1] = 0;
    for (int i = 0; i < kEach; i++) {
        const weight_sum w = m.bin[top - i];
        if (w == 0) continue;
        m.chosen[0] = sum;
        m.chosen[1] = (weight_sum)(top - i);
        sum += w;
        if (sum >= target) break;
    }
}

// The threshold that keeps the shortest prefix, best first, of what `within` keeps whose values sum
// to `target` or more; all of it if the sum stays below. Values of equal keys are equal. Block.
template <typename F>
__device__ threshold descend(const row_view &r, threshold within, weight_sum target,
                             block_memory &m, F value) {
    uint32_t prefix = 0;
    weight_sum above = 0; // sum of larger keys
    for (int shift = 24; shift >= 0; shift -= 8) {
        __syncthreads();
        for (int i = (int)threadIdx.x; i < kBins; i += kThreads) m.bin[i] = 0;
        __syncthreads();
        for (int base = (int)threadIdx.x & ~31; base < r.vocab; base += kThreads) {
            const int id = base + (int)threadIdx.x % 32;
            const float v = id < r.vocab ? r.z(id) : -INFINITY;
            const uint32_t key = key_of(v);
            const bool here = id < r.vocab && keeps(within, key, id) &&
                              (shift == 24 || key >> (shift + 8) == prefix >> (shift + 8));
            add_to_bin(m, (int)(key >> shift & 255), here ? value(v) : 0);
        }
        __syncthreads();
        if (threadIdx.x < 32) choose_bin(m, above, target);
        __syncthreads();
        above = m.chosen[0];
        prefix |= (uint32_t)m.chosen[1] << shift;
    }
    // Of the key itself the lowest ids, as many as reach the target; all of them are `one` apiece.
    const weight_sum one = value(__uint_as_float(prefix >> 31 ? prefix & 0x7fffffffu : ~prefix));
    if (one == 0 || target <= above) return threshold{prefix, r.vocab};
    const weight_sum wanted = (target - above + one - 1) / one; // >= 1
    const int id = find_by_id(r.vocab, wanted - 1, m, [&](int i) -> weight_sum {
        const uint32_t key = key_of(r.z(i));
        return key == prefix && keeps(within, key, i);
    });
    return threshold{prefix, id < 0 ? r.vocab : id};
}

// The best candidate of the row. One SM alone waits for each read, so a thread has kInFlight of 16
// bytes under way, fewer where 64 registers do not hold more. Block.
__device__ candidate best_of_row(const row_view &r, block_memory &m) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
    constexpr int kInFlight = 4;
#else
    constexpr int kInFlight = 8;
#endif
    candidate best = {-INFINITY, r.vocab};
    const int units = r.vocab % 4 == 0 ? r.vocab / 4 : 0; // rows are 16-byte aligned then
    const float4 *from = reinterpret_cast<const float4 *>(r.logits);
    for (int base = (int)threadIdx.x; base < units; base += kThreads * kInFlight) {
        float4 x[kInFlight];
#pragma unroll
        for (int k = 0; k < kInFlight; k++)
            if (base + k * kThreads < units) x[k] = from[base + k * kThreads];
#pragma unroll
        for (int k = 0; k < kInFlight; k++) {
            if (base + k * kThreads >= units) continue;
            const int id = (base + k * kThreads) * 4;
            const float v[4] = {x[k].x, x[k].y, x[k].z, x[k].w};
#pragma unroll
            for (int i = 0; i < 4; i++) {
                const candidate c = {r.z_of(id + i, v[i]), id + i};
                if (better(c, best)) best = c;
            }
        }
    }
    for (int id = units * 4 + (int)threadIdx.x; id < r.vocab; id += kThreads) {
        const candidate c = {r.z(id), id};
        if (better(c, best)) best = c;
    }
    return block_best(best, m);
}

// Log-probabilities of the raw logits: of out->token, and the n best in turn. Block.
__device__ void log_probabilities(draw_result *out, const row_view &r, int token, int n,
                                  block_memory &m) {
    candidate best = {-INFINITY, r.vocab};
    for (int id = (int)threadIdx.x; id < r.vocab; id += kThreads) {
        const candidate c = {finite_or_least(r.logits[id]), id};
        if (better(c, best)) best = c;
    }
    best = block_best(best, m);
    const double largest = best.z;
    if (isinf(best.z)) {
        if (threadIdx.x == 0) out->logprob = -INFINITY;
        return;
    }
    double sum = 0;
    for (int id = (int)threadIdx.x; id < r.vocab; id += kThreads)
        sum += exp((double)finite_or_least(r.logits[id]) - largest);
    const double log_sum = log(block_sum_f64(sum, m)) + largest;
    if (threadIdx.x == 0)
        out->logprob = (float)((double)finite_or_least(r.logits[token]) - log_sum);
    int filled = 0;
    for (; filled < n && filled < r.vocab && !isinf(best.z); filled++) {
        if (threadIdx.x == 0) {
            out->top_token[filled] = best.id;
            out->top_logprob[filled] = (float)((double)best.z - log_sum);
        }
        const candidate last = best;
        best = candidate{-INFINITY, r.vocab};
        for (int id = (int)threadIdx.x; id < r.vocab; id += kThreads) {
            const candidate c = {finite_or_least(r.logits[id]), id};
            if (better(last, c) && better(c, best)) best = c;
        }
        best = block_best(best, m);
    }
    if (threadIdx.x == 0) out->n_top = filled;
}

// The token of one row with temperature > 0. Block.
__device__ int draw_token(const row_view &r, const draw_row &p, block_memory &m) {
    threshold kept = {0, r.vocab};
    if (p.top_k > 0 && p.top_k < r.vocab)
        kept = descend(r, kept, (weight_sum)p.top_k, m,
                       [&](float v) -> weight_sum { return isinf(v) ? 0 : 1; });
    if (p.top_p < 1.f) {
        weight_sum sum = 0;
        for (int id = (int)threadIdx.x; id < r.vocab; id += kThreads) {
            const float v = r.z(id);
            if (keeps(kept, key_of(v), id)) sum += r.weight(v);
        }
        const double target = (double)p.top_p * (double)block_total(sum, m);
        kept = descend(r, kept, (weight_sum)ceil(target), m,
                       [&](float v) -> weight_sum { return r.weight(v); });
    }
    const auto value = [&](int id) -> weight_sum {
        const float v = r.z(id);
        if (!keeps(kept, key_of(v), id)) return 0;
        if (p.min_p > 0.f && r.e(v) < (double)p.min_p) return 0;
        return r.weight(v);
    };
    weight_sum sum = 0;
    for (int id = (int)threadIdx.x; id < r.vocab; id += kThreads) sum += value(id);
    const double total = (double)block_total(sum, m);
    uint32_t word[4];
    philox_block(p.seed, p.counter, word);
    const uint64_t bits = ((uint64_t)word[0] << 32 | word[1]) >> 12;
    const double u = ((double)bits + 0.5) * 0x1p-52;
    const int id = find_by_id(r.vocab, (weight_sum)floor(u * total), m, value);
    return id < 0 ? 0 : id;
}

__global__ void __launch_bounds__(kThreads)
    draw(draw_result *out, const float *logits, const draw_row *row, const uint32_t *seen,
         int32_t vocab) {
    __shared__ block_memory m;
    follow_previous();
    const draw_row &p = row[blockIdx.x]; // not a copy: registers
    draw_result *const result = out + p.to;
    if (threadIdx.x == 0) {
        result->token = -1;
        result->logprob = 0.f;
        result->n_top = 0;
    }
    if (!p.active) return;
    const int64_t words = (vocab + 31) / 32;
    row_view r = {logits + int64_t{blockIdx.x} * vocab,
                  p.seen >= 0 && p.repetition_penalty != 1.f ? seen + p.seen * words : nullptr,
                  p.repetition_penalty,
                  vocab,
                  0.,
                  (double)p.temperature};
    const candidate best = best_of_row(r, m);
    const bool any = !isinf(best.z);
    int token = any ? best.id : 0;
    r.largest = best.z;
    if (p.temperature > 0.f && any) token = draw_token(r, p, m);
    if (threadIdx.x == 0) result->token = token;
    if (p.n_logprobs >= 0) log_probabilities(result, r, token, p.n_logprobs, m);
}

} // namespace

extern "C" status kernel_draw(draw_result *out, const float *logits, const draw_row *row,
                              const uint32_t *seen, int32_t n, int32_t vocab,
                              kernel_stream stream) {
    if (n < 0 || vocab < 1 || vocab > 1 << 18)
        return FAIL(ST_SHAPE, "draw: %d rows of %d logits", n, vocab);
    if (n == 0) return ST_OK;
    return launch_early("draw", draw, (unsigned)n, kThreads, stream, out, logits, row, seen, vocab);
}
