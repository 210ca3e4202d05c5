/* sampler.c - one token from one row of logits.
 *
 * Steps, in the order of request.h: penalty -> z; e[i] = exp((z[i] - max z) / temperature) in f64;
 * the k best (top-k); of those the shortest prefix, best first, whose sum reaches top_p of theirs;
 * of those the ones with e >= min_p (the best has e = 1); one draw: u = philox_unit(seed, draw),
 * and the token is the first, by ascending id, at which the running sum of e over the ones left
 * exceeds u times their sum. "Best" is the larger z, then the lower id: a total order, so how
 * candidates are found (selection first, sorting only what may be kept) cannot change the result.
 *
 * No sort of the vocabulary: top-k and top-p partition around a rank (Hoare's selection, O(V));
 * top-p tries 64 candidates, then eight times as many until their sum suffices. */
#include "sampler.h"
#include "rng.h"
#include <math.h>
#include <stdlib.h>
#include <string.h>

typedef struct {
    float z; /* after the penalty */
    int32_t id;
} candidate;

typedef struct {
    double *e;       /* [V] by id; 0 = not kept */
    candidate *list; /* [V] */
    float *z;        /* [V] by id */
    uint8_t *seen;   /* [V / 8] tokens of the history */
} work;

enum { TOP_P_FIRST = 64, TOP_P_GROWTH = 8 };

size_t sampler_bytes(int32_t vocab) {
    const size_t v = (size_t)vocab;
    return v * (sizeof(double) + sizeof(candidate) + sizeof(float)) + (v + 7) / 8;
}

static work lay_scratch(void *scratch, int32_t vocab) {
    work w;
    w.e = scratch;
    w.list = (candidate *)(void *)(w.e + vocab);
    w.z = (float *)(void *)(w.list + vocab);
    w.seen = (uint8_t *)(w.z + vocab);
    return w;
}

status sampling_check(const sampling *p) {
    if (!(p->temperature >= 0 && p->temperature <= 100))
        return FAIL(ST_RANGE, "temperature %g is not in 0..100", (double)p->temperature);
    if (p->top_k < 0) return FAIL(ST_RANGE, "top_k %d is negative", p->top_k);
    if (!(p->top_p > 0 && p->top_p <= 1))
        return FAIL(ST_RANGE, "top_p %g is not in (0, 1]", (double)p->top_p);
    if (!(p->min_p >= 0 && p->min_p <= 1))
        return FAIL(ST_RANGE, "min_p %g is not in 0..1", (double)p->min_p);
    if (!(p->repetition_penalty > 0 && p->repetition_penalty <= 100))
        return FAIL(ST_RANGE, "repetition_penalty %g is not in (0, 100]",
                    (double)p->repetition_penalty);
    if (p->n_logprobs < -1 || p->n_logprobs > LOGPROBS_MAX)
        return FAIL(ST_RANGE, "logprobs %d is not in 0..%d", p->n_logprobs, LOGPROBS_MAX);
    return ST_OK;
}

static float finite_or_least(float x) { return isfinite(x) ? x : -INFINITY; }

/* --- Order and selection ---------------------------------------------------------------------- */

static bool better(candidate a, candidate b) { return a.z > b.z || (a.z == b.z && a.id < b.id); }

static int compare(const void *a, const void *b) {
    const candidate *x = a, *y = b;
    return better(*x, *y) ? -1 : better(*y, *x) ? 1 : 0;
}

static void swap(candidate *a, candidate *b) {
    const candidate t = *a;
    *a = *b;
    *b = t;
}

/* Reorder list[lo, hi) so that its `n` best, of the whole, come first: lo <= n <= hi. The pivot is
 * the median of three, drawn from fixed places; bad luck costs time and never changes the set. */
static void select_best(candidate *list, int32_t lo, int32_t hi, int32_t n) {
    while (hi - lo > 1 && n > lo && n < hi) {
        candidate *a = &list[lo], *b = &list[lo + (hi - lo) / 2], *c = &list[hi - 1];
        if (better(*b, *a)) swap(a, b);
        if (better(*c, *a)) swap(a, c);
        if (better(*c, *b)) swap(b, c);
        const candidate pivot = *b;
        int32_t i = lo, j = hi - 1;
        while (i <= j) {
            while (better(list[i], pivot)) i++;
            while (better(pivot, list[j])) j--;
            if (i <= j) swap(&list[i++], &list[j--]);
        }
        if (n <= j + 1)
            hi = j + 1;
        else if (n >= i)
            lo = i;
        else
            return;
    }
}

/* --- Steps ------------------------------------------------------------------------------------ */

/* z = logits after the penalty: once for each token of the history, however often it occurs. */
static void penalise(const work *w, const float *logits, int32_t vocab, float penalty,
                     const int32_t *history, int32_t n_history) {
    for (int32_t i = 0; i < vocab; i++) w->z[i] = finite_or_least(logits[i]);
    if (penalty == 1 || n_history == 0) return;
    memset(w->seen, 0, ((size_t)vocab + 7) / 8);
    for (int32_t h = 0; h < n_history; h++) {
        const int32_t id = history[h];
        CHECK(id >= 0 && id < vocab);
        const uint8_t bit = (uint8_t)(1u << (id & 7));
        if (w->seen[id >> 3] & bit) continue;
        w->seen[id >> 3] |= bit;
        w->z[id] = w->z[id] > 0 ? w->z[id] / penalty : w->z[id] * penalty;
        if (isnan(w->z[id])) w->z[id] = -INFINITY;
    }
}

/* Lowest id among the largest; 0 when there is no finite one. */
static int32_t largest_at(const float *z, int32_t vocab) {
    int32_t best = 0;
    for (int32_t i = 1; i < vocab; i++)
        if (z[i] > z[best]) best = i;
    return best;
}

/* Forget the candidates list[from, to). */
static void drop(const work *w, int32_t from, int32_t to) {
    for (int32_t i = from; i < to; i++) w->e[w->list[i].id] = 0;
}

static double sum_of(const double *e, int32_t vocab) {
    double sum = 0;
    for (int32_t i = 0; i < vocab; i++) sum += e[i];
    return sum;
}

/* Of the n candidates, how many the shortest prefix has whose sum reaches `target`. On return these
 * come first in the list. */
static int32_t prefix_reaching(const work *w, int32_t n, double target) {
    double sum = 0;
    for (int32_t done = 0, size = TOP_P_FIRST;; size *= TOP_P_GROWTH) {
        if (size > n) size = n;
        select_best(w->list, done, n, size);
        qsort(w->list + done, (size_t)(size - done), sizeof *w->list, compare);
        for (int32_t i = done; i < size; i++) {
            sum += w->e[w->list[i].id];
            if (sum >= target) return i + 1;
        }
        if (size == n) return n; /* rounding: the sum in this order stays below the target */
        done = size;
    }
}

/* Set e to 0 for every token that top-k, top-p or min-p takes out. */
static void truncate_to(const work *w, int32_t vocab, const sampling *p) {
    int32_t n = 0;
    const bool by_rank = (p->top_k > 0 && p->top_k < vocab) || p->top_p < 1;
    if (by_rank) {
        for (int32_t i = 0; i < vocab; i++)
            if (w->e[i] > 0) w->list[n++] = (candidate){.z = w->z[i], .id = i};
        if (p->top_k > 0 && p->top_k < n) {
            select_best(w->list, 0, n, p->top_k);
            drop(w, p->top_k, n);
            n = p->top_k;
        }
        if (p->top_p < 1) {
            const double target = (double)p->top_p * sum_of(w->e, vocab);
            drop(w, prefix_reaching(w, n, target), n);
        }
    }
    if (p->min_p > 0)
        for (int32_t i = 0; i < vocab; i++)
            if (w->e[i] < (double)p->min_p) w->e[i] = 0;
}

static int32_t draw_from(const double *e, int32_t vocab, double u) {
    const double target = u * sum_of(e, vocab);
    double sum = 0;
    int32_t last = 0;
    for (int32_t i = 0; i < vocab; i++) {
        if (e[i] == 0) continue;
        sum += e[i];
        last = i;
        if (sum > target) break;
    }
    return last;
}

/* Log-probabilities of the raw logits: of out->token, and the n best. */
static void fill_logprobs(sampled *out, const float *logits, int32_t vocab, int32_t n) {
    candidate top[LOGPROBS_MAX];
    float largest = -INFINITY;
    for (int32_t i = 0; i < vocab; i++) {
        const candidate x = {.z = finite_or_least(logits[i]), .id = i};
        if (x.z > largest) largest = x.z;
        if (n == 0 || isinf(x.z)) continue;
        if (out->n_top == n && !better(x, top[n - 1])) continue;
        if (out->n_top < n) out->n_top++;
        int32_t at = out->n_top - 1;
        for (; at > 0 && better(x, top[at - 1]); at--) top[at] = top[at - 1];
        top[at] = x;
    }
    out->logprob = -INFINITY;
    if (isinf(largest)) return;
    double sum = 0;
    for (int32_t i = 0; i < vocab; i++)
        sum += exp((double)finite_or_least(logits[i]) - (double)largest);
    const double log_sum = log(sum) + (double)largest;
    out->logprob = (float)((double)finite_or_least(logits[out->token]) - log_sum);
    for (int32_t i = 0; i < out->n_top; i++) {
        out->top_token[i] = top[i].id;
        out->top_logprob[i] = (float)((double)top[i].z - log_sum);
    }
}

void sampler_draw(sampled *out, const float *logits, int32_t vocab, const sampling *params,
                  uint64_t draw, const int32_t *history, int32_t n_history, void *scratch) {
    const work w = lay_scratch(scratch, vocab);
    CHECK(vocab >= 1);
    *out = (sampled){0};
    penalise(&w, logits, vocab, params->repetition_penalty, history, n_history);
    out->token = largest_at(w.z, vocab);
    const double largest = w.z[out->token];
    if (params->temperature > 0 && isfinite(largest)) {
        for (int32_t i = 0; i < vocab; i++)
            w.e[i] = exp(((double)w.z[i] - largest) / (double)params->temperature);
        truncate_to(&w, vocab, params);
        out->token = draw_from(w.e, vocab, philox_unit(params->seed, draw));
    }
    if (params->n_logprobs >= 0) fill_logprobs(out, logits, vocab, params->n_logprobs);
}
