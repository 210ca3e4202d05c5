// draw.cu - one token from one row of logits, by the blocks of a cluster, without sorting.
//
// Candidates are ordered by key: the logit after the edits as an unsigned integer that orders
// alike. What top-k, top-p and min-p keep is always a prefix of (key descending, id ascending), so
// it is a threshold: all of a larger key, and those of the key itself up to some id. A threshold is
// found by a descent with a histogram of 256 bins for each level: of counts for top-k, of weights
// for top-p. The first level's bins are even in z, where logits lie spread and threads seldom meet
// in a bin; those after it are of eight bits each of the keys within one bin, of which there are
// few. Weights are integers (draw.h says why), so every sum is exact and independent of order, and
// of how many blocks share a row.
//
// Edits (bias, penalties) are few, and written into the logits first: no step knows of them.
//
//   1  largest z, lowest id                     greedy ends here
//   2  top-k: descent by count                  -> threshold
//   3  top-p: descent by weight                 -> threshold
//   4  sum of what is kept by all three; each warp has a stretch of ids; the stretch in which the
//      drawn number falls is walked by its warp
//
// Each step reads the row once or (a descent) about five times, from L2, hence several SMs for a
// row as long as there are some without one.
#include "draw.h"
#include "traits.cuh"

namespace {

constexpr int kThreads = 1024, kWarps = kThreads / 32, kBins = 256;
// Blocks of a row: 1, 2, 4 or 8. Its ids are dealt out in kParts stretches, to warps in order.
constexpr int kBlocksMax = 8, kParts = kBlocksMax * kWarps;
constexpr int kOneBits = 44;     // weight 1 is 2^44; times 2^18 tokens stays below 2^62
constexpr double kLeast = -31.3; // exp of less rounds to weight 0

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

__device__ __forceinline__ float z_of_key(uint32_t key) {
    return __uint_as_float(key >> 31 ? key & 0x7fffffffu : ~key);
}

// What is kept: key > at, or key == at and id <= last_id.
struct threshold {
    uint32_t at;
    int last_id;
};

__device__ __forceinline__ bool keeps(threshold t, uint32_t key, int id) {
    return key > t.at || (key == t.at && id <= t.last_id);
}

// One row as the steps see it.
struct row_view {
    float *logits; // [vocab]
    int vocab;
    double largest, temperature; // largest: of z
    double rate;                 // log2(e) / temperature
    float least;                 // z below weighs nothing
    float spread;                // first bins of a descent in a unit of z

    __device__ __forceinline__ double e(float v) const {
        return exp(((double)v - largest) / temperature);
    }
    // e 2^44, rounded: 2^n 2^f, |f| <= 1/2, by the series to f^12 (2^-52), the integer out of the
    // low bits of its sum with 2^52. A sixth of what exp and a division take.
    __device__ __forceinline__ weight_sum weight(float v) const {
        constexpr double kRound = 0x1.8p52;
        constexpr double kSeries[] = {
            0x1.0000000000000p+0,  0x1.62e42fefa39efp-1,  0x1.ebfbdff82c58fp-3,
            0x1.c6b08d704a0c0p-5,  0x1.3b2ab6fba4e77p-7,  0x1.5d87fe78a6731p-10,
            0x1.430912f86c787p-13, 0x1.ffcbfc588b0c7p-17, 0x1.62c0223a5c824p-20,
            0x1.b5253d395e7c4p-24, 0x1.e4cf5158b8ecap-28, 0x1.e8cac7351bb25p-32,
            0x1.c3bd650fc2986p-36};
        const double y = ((double)v - largest) * rate;
        if (v < least || y < -46.) return 0;
        const double nearest = y + kRound, f = y - (nearest - kRound);
        double power = kSeries[12];
#pragma unroll
        for (int i = 11; i >= 0; i--) power = fma(power, f, kSeries[i]);
        const double scale = __hiloint2double((1023 + kOneBits + __double2loint(nearest)) << 20, 0);
        return (weight_sum)__double_as_longlong(fma(power, scale, 0x1p52)) & ((1ull << 52) - 1);
    }
    // The first bin of a descent: falls as z grows. The last one holds all that is far below.
    __device__ __forceinline__ int bin_of(float v) const {
        return min(kBins - 1, (int)(((float)largest - v) * spread));
    }
    // Keys between which all of a bin lie: rounding moved z in bin_of by less than 2^-22 of its
    // distance from the largest, and 2^-20 is allowed for.
    __device__ __forceinline__ void keys_of(int bin, uint32_t *lo, uint32_t *hi) const {
        const double below = bin * (1 - 0x1p-20) / spread, far = (bin + 1) * (1 + 0x1p-20) / spread;
        *hi = key_of(__double2float_ru(largest - below));
        *lo = key_of(bin == kBins - 1 ? -INFINITY : __double2float_rd(largest - far));
    }
};

// f(id, logit) for ids [lo, hi) of a row, by `size` threads of which this one is `thread`, in no
// order. An SM waits for each read, so a thread has kInFlight of 16 bytes under way: as many as 64
// registers hold beside what f needs. lo is a multiple of 4.
template <int kInFlight, typename F>
__device__ __forceinline__ void each_logit(const row_view &r, int lo, int hi, int thread, int size,
                                           F f) {
    const int units = r.vocab % 4 == 0 ? max(hi - lo, 0) / 4 : 0; // rows are 16-byte aligned then
    __builtin_assume(__isGlobal(r.logits)); // a pointer out of shared memory tells nothing
    const float4 *from = reinterpret_cast<const float4 *>(r.logits + lo);
    for (int base = thread; base < units; base += size * kInFlight) {
        float4 x[kInFlight];
#pragma unroll
        for (int k = 0; k < kInFlight; k++)
            if (base + k * size < units) x[k] = from[base + k * size];
#pragma unroll
        for (int k = 0; k < kInFlight; k++) {
            if (base + k * size >= units) continue;
            const int id = lo + (base + k * size) * 4;
            f(id, x[k].x), f(id + 1, x[k].y), f(id + 2, x[k].z), f(id + 3, x[k].w);
        }
    }
    for (int id = lo + units * 4 + thread; id < hi; id += size) f(id, r.logits[id]);
}

// What blocks of a row read of each other is there twice and used in turn: whoever writes to it
// again has met the others since they read it.
struct block_memory {
    uint32_t bin[2][2][kBins]; // low and high words
    weight_sum part[2][kWarps];
    candidate block_best[2][kBlocksMax]; // of each block of the row
    int found[2];
    weight_sum all[kParts]; // of the row: bins, or sums of parts
    candidate best[kWarps];
    double part_f64[kParts];
    weight_sum chosen[2]; // results that one thread hands to all
    int counted;          // rank 0's: an edit has counted the row's last token
    int rank, size;       // this block, of how many of the row
    int each, lo, hi;     // ids of a part; [lo, hi) are this block's
};

// The blocks of a row. Member functions and those marked "row" are called by all threads of all
// blocks of a row together; what does not change is in shared memory, for registers are few.
struct team {
    block_memory &m;
    int turn;

    __device__ team(block_memory &m, int vocab) : m(m), turn(0) {
        int rank = 0, size = 1;
#if __CUDA_ARCH__ >= 900
        asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
        asm("mov.u32 %0, %%cluster_nctarank;" : "=r"(size));
#endif
        if (threadIdx.x == 0) {
            m.counted = 0;
            m.rank = rank;
            m.size = size;
            m.each = (vocab + kParts * 32 - 1) / (kParts * 32) * 32;
            m.lo = min(vocab, rank * (kParts / size) * m.each);
            m.hi = min(vocab, (rank + 1) * (kParts / size) * m.each);
        }
        __syncthreads();
    }
    // All that any thread has written before is seen by all after.
    __device__ void meet() {
#if __CUDA_ARCH__ >= 900
        if (m.size > 1) {
            asm volatile("barrier.cluster.arrive.release.aligned;\n"
                         "barrier.cluster.wait.acquire.aligned;" ::
                             : "memory");
            return;
        }
#endif
        __syncthreads();
    }
    // Where p of this block's shared memory is in that of another.
    template <typename T> __device__ T *there(T *p, int other) const {
#if __CUDA_ARCH__ >= 900
        if (m.size > 1) {
            T *q;
            asm("mapa.u64 %0, %1, %2;" : "=l"(q) : "l"(p), "r"(other));
            return q;
        }
#endif
        return p;
    }
};

// The best of the row, in every thread. Row.
__device__ candidate row_best(candidate c, team &t) {
    const int lane = (int)threadIdx.x % 32;
    const auto best_of_lanes = [&](int lanes) {
        for (int d = lanes / 2; d > 0; d >>= 1) {
            const candidate o = {__shfl_xor_sync(~0u, c.z, d), __shfl_xor_sync(~0u, c.id, d)};
            if (better(o, c)) c = o;
        }
    };
    best_of_lanes(32);
    __syncthreads();
    if (lane == 0) t.m.best[threadIdx.x / 32] = c;
    __syncthreads();
    if (threadIdx.x < 32) {
        c = t.m.best[lane];
        best_of_lanes(32);
        if (lane < t.m.size) *t.there(&t.m.block_best[t.turn][t.m.rank], lane) = c;
    }
    t.meet();
    c = t.m.block_best[t.turn][lane & (t.m.size - 1)];
    best_of_lanes(kBlocksMax);
    t.turn ^= 1;
    return c;
}

// Sum over the row of value(id): of parts, then over them, in an order that does not depend on the
// number of blocks. Row.
template <typename F> __device__ double row_sum_f64(team &t, F value) {
    const int warp = (int)threadIdx.x / 32, lane = (int)threadIdx.x % 32;
    const int parts = kBlocksMax / t.m.size; // of a warp
    __syncthreads();
    for (int i = warp * parts; i < (warp + 1) * parts; i++) {
        const int lo = t.m.lo + i * t.m.each, hi = min(t.m.hi, lo + t.m.each);
        double x = 0;
        for (int id = lo + lane; id < hi; id += 32) x += value(id);
        for (int d = 16; d > 0; d >>= 1) x += __shfl_xor_sync(~0u, x, d);
        if (lane == 0) t.m.part_f64[i] = x;
    }
    t.meet();
    double sum = 0;
    for (int i = lane * kBlocksMax; i < (lane + 1) * kBlocksMax; i++)
        sum += t.there(t.m.part_f64, i / (kWarps * parts))[i % (kWarps * parts)];
    for (int d = 16; d > 0; d >>= 1) sum += __shfl_xor_sync(~0u, sum, d);
    t.meet(); // once a row, so there is no second place
    return sum;
}

// Of n = 32 each sums, from the last down or from the first up: the first one at which `above` and
// those so far come to `target`, or the last that is not 0; m.chosen = the sum before it, its
// number. One warp.
__device__ void choose(block_memory &m, int each, bool down, weight_sum above, weight_sum target) {
    const int lane = (int)threadIdx.x % 32, last = 32 * each - 1;
    const auto at = [&](int i) { return down ? last - (lane * each + i) : lane * each + i; };
    weight_sum mine = 0;
    for (int i = 0; i < each; i++) mine += m.all[at(i)];
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
#pragma unroll 1 // eight numbers at once would cost 16 registers
    for (int i = 0; i < each; i++) {
        const weight_sum w = m.all[at(i)];
        if (w == 0) continue;
        m.chosen[0] = sum;
        m.chosen[1] = (weight_sum)at(i);
        sum += w;
        if (sum >= target) break;
    }
}

// The sum of m.all[0 .. n), in every thread. Block.
__device__ weight_sum sum_of_all(const block_memory &m, int n) {
    weight_sum x = 0;
    for (int i = (int)threadIdx.x % 32; i < n; i += 32) x += m.all[i];
    for (int d = 16; d > 0; d >>= 1) x += __shfl_xor_sync(~0u, x, d);
    return x;
}

// find_by_id within [lo, hi), by one warp, `running` being the sum before it: a lane has four ids
// at a time, and those after them under way.
template <typename F>
__device__ int walk(const row_view &r, int lo, int hi, weight_sum running, weight_sum target,
                    F value) {
    const int lane = (int)threadIdx.x % 32;
    const auto logit = [&](int id) { return id < hi ? r.logits[id] : -INFINITY; };
    const auto four = [&](int id) {
        if (r.vocab % 4 == 0 && id < hi) return *reinterpret_cast<const float4 *>(r.logits + id);
        return float4{logit(id), logit(id + 1), logit(id + 2), logit(id + 3)};
    };
    int found = -1;
    float4 x = four(lo + 4 * lane);
    for (int base = lo; base < hi; base += 128) {
        const float own[4] = {x.x, x.y, x.z, x.w};
        const int first = base + 4 * lane;
        x = four(first + 128);
        weight_sum v[4], mine = 0;
#pragma unroll
        for (int i = 0; i < 4; i++) {
            v[i] = first + i < hi ? value(first + i, finite_or_least(own[i])) : 0;
            mine += v[i];
        }
        weight_sum upto = mine; // inclusive over lanes
        for (int d = 1; d < 32; d <<= 1) {
            const weight_sum o = __shfl_up_sync(~0u, upto, d);
            if (lane >= d) upto += o;
        }
        const unsigned has = __ballot_sync(~0u, mine > 0);
        const unsigned past = __ballot_sync(~0u, mine > 0 && running + upto > target);
        weight_sum before = running + upto - mine;
        int at = -1; // the last one with no more than the target before it
#pragma unroll
        for (int i = 0; i < 4; i++) {
            if (v[i] > 0 && before <= target) at = first + i;
            before += v[i];
        }
        const int owner = past ? __ffs((int)past) - 1 : 31 - __clz((int)has);
        if (has) found = __shfl_sync(~0u, at, owner);
        if (past) break;
        running += __shfl_sync(~0u, upto, 31);
    }
    return found;
}

// Among ids with `value(id, z) > 0`, in ascending order: the first at which the running sum of
// values exceeds `target(sum of all)`, or the last one with a value if none does; -1 when there is
// none. Row.
template <typename F, typename G>
__device__ int find_by_id(const row_view &r, team &t, F value, G target_of) {
    const int warp = (int)threadIdx.x / 32, lane = (int)threadIdx.x % 32;
    const int lo = t.m.lo + warp * (kBlocksMax / t.m.size) * t.m.each;
    const int hi = min(t.m.hi, lo + kBlocksMax / t.m.size * t.m.each);
    weight_sum sum = 0;
    each_logit<2>(r, lo, hi, lane, 32,
                  [&](int id, float x) { sum += value(id, finite_or_least(x)); });
    for (int d = 16; d > 0; d >>= 1) sum += __shfl_xor_sync(~0u, sum, d);
    __syncthreads();
    if (lane == 0) t.m.part[t.turn][warp] = sum;
    t.meet();
    const int n = t.m.size * kWarps;
    if ((int)threadIdx.x < n) t.m.all[threadIdx.x] = t.there(t.m.part[t.turn], warp)[lane];
    __syncthreads();
    const weight_sum total = sum_of_all(t.m, n);
    if (total == 0) {
        t.meet(); // others may still read parts
        t.turn ^= 1;
        return -1;
    }
    const weight_sum target = target_of(total);
    if (warp == 0) choose(t.m, t.m.size, false, 0, target + 1);
    __syncthreads();
    if (t.m.rank * kWarps + warp == (int)t.m.chosen[1]) {
        const int found = walk(r, lo, hi, t.m.chosen[0], target, value);
        if (lane < t.m.size) *t.there(&t.m.found[t.turn], lane) = found;
    }
    t.meet();
    const int found = t.m.found[t.turn];
    t.turn ^= 1;
    return found;
}

// Add w to a bin. Shared memory adds words of 32 bits, so the carry goes by hand.
__device__ __forceinline__ void add_to_bin(uint32_t (*bins)[kBins], int bin, weight_sum w) {
    const uint32_t low = (uint32_t)w, before = low ? atomicAdd(&bins[0][bin], low) : 0;
    const uint32_t high = (uint32_t)(w >> 32) + (before + low < low ? 1 : 0);
    if (high) atomicAdd(&bins[1][bin], high);
}

// One level of a descent: the sums of value(z) by bin_of(id, z), -1 being none, into m.all. Row.
template <typename F, typename B>
__device__ void fill_bins(const row_view &r, team &t, F value, B bin_of) {
    uint32_t(*const bins)[kBins] = t.m.bin[t.turn];
    if (threadIdx.x < 2 * kBins) bins[threadIdx.x / kBins][threadIdx.x % kBins] = 0;
    __syncthreads();
    each_logit<2>(r, t.m.lo, t.m.hi, (int)threadIdx.x, kThreads, [&](int id, float x) {
        const float v = finite_or_least(x);
        const int bin = bin_of(id, v);
        if (bin >= 0) add_to_bin(bins, bin, value(v));
    });
    t.meet();
    if (threadIdx.x < kBins) {
        weight_sum all = 0;
        for (int b = 0; b < t.m.size; b++) {
            const uint32_t *there = t.there(&bins[0][0], b) + threadIdx.x;
            all += ((weight_sum)there[kBins] << 32) + there[0];
        }
        t.m.all[threadIdx.x] = all;
    }
    __syncthreads();
    t.turn ^= 1;
}

// The threshold that keeps the shortest prefix, best first, of what `within` keeps whose values sum
// to target(sum of all it keeps) or more; all of it if the sum stays below. Values of equal keys
// are equal, and the best one's is not 0. Row.
template <typename F, typename G>
__device__ threshold descend(const row_view &r, team &t, threshold within, F value, G target_of) {
    fill_bins(r, t, value,
              [&](int id, float v) { return keeps(within, key_of(v), id) ? r.bin_of(v) : -1; });
    const weight_sum target = target_of(sum_of_all(t.m, kBins));
    if (threadIdx.x < 32) choose(t.m, kBins / 32, false, 0, target);
    __syncthreads();
    weight_sum above = t.m.chosen[0]; // sum of larger keys
    const int first = (int)t.m.chosen[1];
    uint32_t lo, hi, at = 0; // at: of the key from lo, so far
    r.keys_of(first, &lo, &hi);
    const int bits = 32 - __clz((int)(hi - lo));
    for (int left = bits; left > 0;) {
        const int shift = max(left - 8, 0);
        fill_bins(r, t, value, [&](int id, float v) {
            const uint32_t key = key_of(v), in = key - lo;
            const bool here = r.bin_of(v) == first && keeps(within, key, id) &&
                              (left == bits || in >> left == at >> left);
            return here ? (int)(in >> shift & ((1u << (left - shift)) - 1)) : -1;
        });
        if (threadIdx.x < 32) choose(t.m, kBins / 32, true, above, target);
        __syncthreads();
        above = t.m.chosen[0];
        at |= (uint32_t)t.m.chosen[1] << shift;
        left = shift;
    }
    // Of the key itself the lowest ids, as many as reach the target; all of them are `one` apiece.
    const uint32_t last = lo + at;
    const weight_sum one = value(z_of_key(last));
    if (one == 0 || target <= above) return threshold{last, r.vocab};
    const weight_sum wanted = (target - above + one - 1) / one; // >= 1
    const int id = find_by_id(
        r, t,
        [&](int i, float v) -> weight_sum {
            const uint32_t key = key_of(v);
            return key == last && keeps(within, key, i);
        },
        [&](weight_sum) { return wanted - 1; });
    return threshold{last, id < 0 ? r.vocab : id};
}

// The best candidate of the row. Row.
__device__ candidate best_of_row(const row_view &r, team &t) {
    candidate best = {-INFINITY, r.vocab};
    each_logit<4>(r, t.m.lo, t.m.hi, (int)threadIdx.x, kThreads, [&](int id, float x) {
        const candidate c = {finite_or_least(x), id};
        if (better(c, best)) best = c;
    });
    return row_best(best, t);
}

// f(i) for the edits [from, to) of a row; then all is seen by all. Row.
template <typename F> __device__ void each_edit(int from, int to, team &t, F f) {
    const int first = from + t.m.rank * kThreads + (int)threadIdx.x;
    for (int i = first; i < to; i += t.m.size * kThreads) f(i);
    t.meet();
}

// Edit i of a row: whole, for it may be the host's.
__device__ __forceinline__ int2 &edit_at(const draw_row &p, int i) {
    return reinterpret_cast<int2 *>(p.edit)[i];
}

// Change a logit; what it was goes to edit `keep` where it will be asked for.
__device__ __forceinline__ void edit_logit(const row_view &r, const draw_row &p, int id,
                                           bool repeated, float add, int keep) {
    const float was = r.logits[id];
    float v = finite_or_least(was);
    if (repeated)
        v = v > 0.f ? __fdiv_rn(v, p.repetition_penalty) : __fmul_rn(v, p.repetition_penalty);
    if (p.n_logprobs >= 0) edit_at(p, keep) = {id, __float_as_int(was)};
    r.logits[id] = finite_or_least(__fadd_rn(v, add));
}

__device__ void add_bias(const row_view &r, const draw_row &p, team &t) {
    each_edit(0, p.n_bias, t, [&](int i) {
        const int2 e = edit_at(p, i);
        edit_logit(r, p, e.x, false, __int_as_float(e.y), i);
    });
}

// last: a token that no edit counts yet, or -1. The last edit is then kept for it, and gets its
// logit in any case, so that undoing knows nothing of it. Row.
__device__ void penalise(const row_view &r, const draw_row &p, int last, team &t) {
    const auto add_of = [&](float times) {
        const float penalty = __fadd_rn(__fmul_rn(p.frequency_penalty, times), p.presence_penalty);
        return times > 0.f ? -penalty : 0.f;
    };
    const int kept = last < 0 ? p.n_edits : p.n_edits - 1;
    each_edit(p.n_bias, kept, t, [&](int i) {
        const int2 e = edit_at(p, i);
        const int id = e.x < 0 ? ~e.x : e.x;
        float times = __int_as_float(e.y);
        if (id == last) {
            times += 1.f;
            *t.there(&t.m.counted, 0) = 1;
            if (p.n_logprobs >= 0) edit_at(p, kept) = {id, __float_as_int(r.logits[id])};
        }
        edit_logit(r, p, id, e.x < 0, add_of(times), i);
    });
    if (last < 0) return;
    if (t.m.rank == 0 && threadIdx.x == 0 && !t.m.counted)
        edit_logit(r, p, last, edit_at(p, kept).x < 0, add_of(1.f), kept);
    t.meet();
}

// Logits as they were before edits [from, to). Row.
__device__ void undo_edits(const row_view &r, const draw_row &p, int from, int to, team &t) {
    each_edit(from, to, t, [&](int i) {
        const int2 e = edit_at(p, i);
        r.logits[e.x] = __int_as_float(e.y);
    });
}

// Log-probabilities of the raw logits: of out->token, and the n best in turn. Row.
__device__ void log_probabilities(draw_result *out, const row_view &r, int token, int n, team &t) {
    const bool writes = t.m.rank == 0 && threadIdx.x == 0;
    candidate best = {-INFINITY, r.vocab};
    for (int id = t.m.lo + (int)threadIdx.x; id < t.m.hi; id += kThreads) {
        const candidate c = {finite_or_least(r.logits[id]), id};
        if (better(c, best)) best = c;
    }
    best = row_best(best, t);
    const double largest = best.z;
    if (isinf(best.z)) {
        if (writes) out->logprob = -INFINITY;
        return;
    }
    const double sum = row_sum_f64(
        t, [&](int id) { return exp((double)finite_or_least(r.logits[id]) - largest); });
    const double log_sum = log(sum) + largest;
    if (writes) out->logprob = (float)((double)finite_or_least(r.logits[token]) - log_sum);
    int filled = 0;
    for (; filled < n && filled < r.vocab && !isinf(best.z); filled++) {
        if (writes) {
            out->top_token[filled] = best.id;
            out->top_logprob[filled] = (float)((double)best.z - log_sum);
        }
        const candidate last = best;
        best = candidate{-INFINITY, r.vocab};
        for (int id = t.m.lo + (int)threadIdx.x; id < t.m.hi; id += kThreads) {
            const candidate c = {finite_or_least(r.logits[id]), id};
            if (better(last, c) && better(c, best)) best = c;
        }
        best = row_best(best, t);
    }
    if (writes) out->n_top = filled;
}

// The least key with e of at least min_p, which the largest's is. Every warp.
__device__ uint32_t least_key(const row_view &r, float min_p) {
    const uint32_t lane = threadIdx.x % 32;
    uint32_t lo = key_of(-INFINITY), hi = key_of((float)r.largest); // lo is too small, hi is not
    while (hi - lo > 1) {
        const uint32_t key = lo + (uint32_t)((uint64_t)(hi - lo) * (lane + 1) / 33);
        const unsigned enough = __ballot_sync(~0u, key > lo && r.e(z_of_key(key)) >= (double)min_p);
        const int first = enough ? __ffs((int)enough) - 1 : 32;
        const uint32_t below = __shfl_sync(~0u, key, first ? first - 1 : 0);
        if (enough) hi = __shfl_sync(~0u, key, first);
        if (first) lo = below;
    }
    return hi;
}

// The token of one row with temperature > 0. Row.
__device__ int draw_token(const row_view &r, const draw_row &p, team &t) {
    threshold kept = {0, r.vocab};
    if (p.top_k > 0 && p.top_k < r.vocab)
        kept = descend(
            r, t, kept, [&](float v) -> weight_sum { return isinf(v) ? 0 : 1; },
            [&](weight_sum) { return (weight_sum)p.top_k; });
    if (p.top_p < 1.f)
        kept = descend(
            r, t, kept, [&](float v) -> weight_sum { return r.weight(v); },
            [&](weight_sum sum) { return (weight_sum)ceil((double)p.top_p * (double)sum); });
    if (p.min_p > 0.f) {
        const uint32_t least = least_key(r, p.min_p);
        if (least > kept.at) kept = threshold{least, r.vocab};
    }
    uint32_t word[4];
    philox_block(p.seed, p.counter, word);
    const uint64_t bits = ((uint64_t)word[0] << 32 | word[1]) >> 12;
    const double u = ((double)bits + 0.5) * 0x1p-52;
    const int id = find_by_id(
        r, t,
        [&](int i, float v) -> weight_sum { return keeps(kept, key_of(v), i) ? r.weight(v) : 0; },
        [&](weight_sum total) { return (weight_sum)floor(u * (double)total); });
    return id < 0 ? 0 : id;
}

__global__ void __launch_bounds__(kThreads)
    draw(draw_result *out, float *logits, const draw_row *row, int32_t vocab) {
    __shared__ block_memory m; // with what follows, not 20 registers of each thread, which has 64
    __shared__ row_view r;
    __shared__ draw_row p;
    launch_dependents();
    team t(m, vocab);
    if (threadIdx.x == 0) {
        const int at = (int)blockIdx.x / t.m.size;
        p = row[at]; // a constant of the step
        r = {logits + int64_t{at} * vocab,
             vocab,
             0.,
             (double)p.temperature,
             1.4426950408889634 / (double)p.temperature,
             0.f,
             fminf((float)(kBins / -kLeast / (double)p.temperature), 1e30f)};
    }
    __syncthreads();
    t.meet(); // all blocks are there, so that their memory may be written to
    wait_for_previous();
    const auto writes = [&] { return t.m.rank == 0 && threadIdx.x == 0; };
    if (writes()) {
        draw_result *const result = out + p.to;
        result->token = -1;
        result->logprob = 0.f;
        result->n_top = 0;
    }
    if (p.kind == DRAW_NOTHING) return;
    if (p.n_bias) add_bias(r, p, t);
    if (p.n_edits > p.n_bias) penalise(r, p, p.last < 0 ? out[~p.last].token : -1, t);
    const candidate best = best_of_row(r, t);
    const bool any = !isinf(best.z);
    int token = any ? best.id : 0;
    if (threadIdx.x == 0) {
        r.largest = best.z;
        r.least = __double2float_rd((double)best.z + kLeast * (double)p.temperature);
    }
    __syncthreads();
    if (p.temperature > 0.f && any) token = draw_token(r, p, t);
    if (p.kind == DRAW_GIVEN) token = p.given; // with temperature 0, so little was done in vain
    if (writes()) out[p.to].token = token;
    if (p.n_logprobs < 0) return;
    if (p.n_edits > p.n_bias) undo_edits(r, p, p.n_bias, p.n_edits, t);
    if (p.n_bias) undo_edits(r, p, 0, p.n_bias, t);
    log_probabilities(out + p.to, r, token, p.n_logprobs, t);
}

// Blocks of each of n rows: the most with which all rows run at once, since those that come when
// the first have gone double the time. There are fewer clusters of eight than SMs would do for.
int blocks_of_row(int n) {
    static int fit[kBlocksMax + 1]; // clusters of so many blocks that run at once; 0: not asked yet
    if (!early_launches()) return 1;
    for (int size = kBlocksMax; size > 1; size /= 2) {
        const launch_config l((unsigned)size, kThreads, 0, nullptr, false, (unsigned)size);
        if (fit[size] == 0 &&
            cudaOccupancyMaxActiveClusters(&fit[size], draw, &l.config) != cudaSuccess)
            return 1;
        if (n <= fit[size]) return size;
    }
    return 1;
}

} // namespace

extern "C" status kernel_draw(draw_result *out, float *logits, const draw_row *row, int32_t n,
                              int32_t vocab, kernel_stream stream) {
    if (n < 0 || vocab < 1 || vocab > 1 << 18)
        return FAIL(ST_SHAPE, "draw: %d rows of %d logits", n, vocab);
    if (n == 0) return ST_OK;
    const int size = blocks_of_row(n);
    return launch_clusters("draw", draw, (unsigned)(n * size), kThreads, (unsigned)size, 0, stream,
                           out, logits, row, vocab);
}
