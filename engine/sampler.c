/* sampler.c - one token from one row of logits.
 *
 * Steps, in the order of request.h: edits -> z; e[i] = exp((z[i] - max z) / temperature) in f64;
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
    float z; /* after the edits */
    int32_t id;
} candidate;

typedef struct {
    double *e;       /* [V] by id; 0 = not kept */
    candidate *list; /* [V] */
    float *z;        /* [V] by id */
    draw_edit *edit; /* [2 V + 1]: a token at most once in step 1, once in steps 2 and 3 */
    int32_t *count;  /* [sampler_counts] */
} work;

enum { TOP_P_FIRST = 64, TOP_P_GROWTH = 8 };

size_t sampler_bytes(int32_t vocab) {
    const size_t v = (size_t)vocab;
    return v * (sizeof(double) + sizeof(candidate) + sizeof(float)) +
           (2 * v + 1) * sizeof(draw_edit) + (size_t)sampler_counts(vocab) * sizeof(int32_t);
}

static work lay_scratch(void *scratch, int32_t vocab) {
    work w;
    w.e = scratch;
    w.list = (candidate *)(void *)(w.e + vocab);
    w.z = (float *)(void *)(w.list + vocab);
    w.edit = (draw_edit *)(void *)(w.z + vocab);
    w.count = (int32_t *)(void *)(w.edit + 2 * (int64_t)vocab + 1);
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
    if (!(p->presence_penalty >= -2 && p->presence_penalty <= 2))
        return FAIL(ST_RANGE, "presence_penalty %g is not in -2..2", (double)p->presence_penalty);
    if (!(p->frequency_penalty >= -2 && p->frequency_penalty <= 2))
        return FAIL(ST_RANGE, "frequency_penalty %g is not in -2..2", (double)p->frequency_penalty);
    if (p->min_tokens < 0) return FAIL(ST_RANGE, "min_tokens %d is negative", p->min_tokens);
    if (p->n_bias < 0 || p->n_bias > LOGIT_BIAS_MAX)
        return FAIL(ST_RANGE, "logit_bias: %d tokens, at most %d are taken", p->n_bias,
                    LOGIT_BIAS_MAX);
    for (int32_t i = 0; i < p->n_bias; i++) {
        const logit_bias *b = &p->bias[i];
        if (!(b->bias >= -100 && b->bias <= 100))
            return FAIL(ST_RANGE, "logit_bias: %g of token %d is not in -100..100", (double)b->bias,
                        b->token);
        if (b->token < 0) return FAIL(ST_RANGE, "logit_bias: token %d", b->token);
        if (i && b->token <= b[-1].token)
            return FAIL(ST_RANGE, "logit_bias: token %d is there twice", b->token);
    }
    if (p->n_logprobs < -1 || p->n_logprobs > LOGPROBS_MAX)
        return FAIL(ST_RANGE, "logprobs %d is not in 0..%d", p->n_logprobs, LOGPROBS_MAX);
    return ST_OK;
}

static int compare_bias(const void *a, const void *b) {
    const logit_bias *x = a, *y = b;
    return (x->token > y->token) - (x->token < y->token);
}

void logit_bias_sort(logit_bias *b, int32_t n) { qsort(b, (size_t)n, sizeof *b, compare_bias); }

bool sampling_penalises(const sampling *p) {
    return p->repetition_penalty != 1 || p->presence_penalty != 0 || p->frequency_penalty != 0;
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

static void check_token(int32_t id, int32_t vocab) { CHECK((uint32_t)id < (uint32_t)vocab); }

/* Step 1: a token that is barred has no bias beside that. */
static int32_t bias_edits(draw_edit *out, const sampling *p, uint64_t draw, int32_t vocab,
                          int32_t *count) {
    int32_t n = 0, n_barred;
    for (int32_t k = 0; k < COUNT_OF(p->barred) && draw < (uint64_t)p->min_tokens; k++)
        for (int32_t i = 0; i < p->barred[k].n; i++) {
            const int32_t id = p->barred[k].token[i];
            if ((uint32_t)id >= (uint32_t)vocab) continue; /* of a tokenizer that has more */
            if (count[id]++ == 0) out[n++] = (draw_edit){.token = id, .value = -INFINITY};
        }
    n_barred = n;
    for (int32_t i = 0; i < p->n_bias; i++) {
        const logit_bias *b = &p->bias[i];
        check_token(b->token, vocab);
        if (count[b->token] == 0) out[n++] = (draw_edit){.token = b->token, .value = b->bias};
    }
    for (int32_t i = 0; i < n_barred; i++) count[out[i].token] = 0;
    return n;
}

/* Steps 2 and 3: the output's tokens with their counts, then those of the prompt that are not among
 * them, then a place for a last one that is not known. A token stays in the list where it is new: a
 * branch there is one that nobody predicts. */
static int32_t penalty_edits(draw_edit *out, const sampling *p, int32_t n_prompt,
                             const int32_t *history, int32_t n_history, int32_t vocab,
                             int32_t *count) {
    const bool repetition = p->repetition_penalty != 1;
    const int32_t unknown = n_prompt < n_history && history[n_history - 1] < 0;
    uint32_t *seen = (uint32_t *)(count + vocab); /* bit set */
    int32_t n = 0;
    for (int32_t h = n_prompt; h < n_history - unknown; h++) {
        const int32_t id = history[h];
        check_token(id, vocab);
        out[n].token = id;
        n += count[id]++ == 0;
    }
    for (int32_t i = 0; i < n; i++) {
        const int32_t id = out[i].token;
        out[i].value = (float)count[id];
        count[id] = 0;
        if (!repetition) continue;
        out[i].token = ~id;
        seen[id / 32] |= 1u << (id % 32);
    }
    out[n] = (draw_edit){.token = 0};
    if (!repetition) return n + unknown;
    for (int32_t h = 0; h < n_prompt; h++) {
        check_token(history[h], vocab);
        const uint32_t id = (uint32_t)history[h], word = seen[id / 32];
        seen[id / 32] = word | 1u << (id % 32);
        out[n] = (draw_edit){.token = ~history[h]};
        n += (word >> (id % 32) & 1) == 0;
    }
    memset(seen, 0, sizeof *seen * (size_t)div_up(vocab, 32));
    out[n] = (draw_edit){.token = ~0};
    return n + unknown;
}

int64_t sampler_counts(int32_t vocab) { return vocab + div_up(vocab, 32); }

int32_t sampler_edits(draw_edit *out, int32_t *n_bias, const sampling *p, uint64_t draw,
                      const int32_t *history, int32_t n_history, int32_t vocab, int32_t *count) {
    *n_bias = bias_edits(out, p, draw, vocab, count);
    if (!sampling_penalises(p)) return *n_bias;
    const int32_t n_prompt = draw < (uint64_t)n_history ? n_history - (int32_t)draw : 0;
    return *n_bias + penalty_edits(out + *n_bias, p, n_prompt, history, n_history, vocab, count);
}

int64_t sampler_edits_most(const sampling *p, uint64_t draw, int32_t n_history, int32_t vocab) {
    int64_t n = p->n_bias;
    for (int32_t k = 0; k < COUNT_OF(p->barred) && draw < (uint64_t)p->min_tokens; k++)
        n += p->barred[k].n;
    const int64_t counted =
        p->repetition_penalty != 1 || draw > (uint64_t)n_history ? n_history : (int64_t)draw;
    return i64_min(n, vocab) + (sampling_penalises(p) ? i64_min(counted, vocab) + 1 : 0);
}

/* z = logits after steps 1 to 3. */
static void edit(const work *w, const float *logits, int32_t vocab, const sampling *p,
                 uint64_t draw, const int32_t *history, int32_t n_history) {
    if (sampling_penalises(p) && n_history) check_token(history[n_history - 1], vocab);
    for (int32_t i = 0; i < vocab; i++) w->z[i] = finite_or_least(logits[i]);
    memset(w->count, 0, sizeof *w->count * (size_t)sampler_counts(vocab));
    int32_t n_bias;
    const int32_t n = sampler_edits(w->edit, &n_bias, p, draw, history, n_history, vocab, w->count);
    for (int32_t i = 0; i < n; i++) {
        const draw_edit e = w->edit[i];
        float *z = &w->z[e.token < 0 ? ~e.token : e.token], add = e.value;
        if (i >= n_bias && e.value > 0)
            add = -(p->frequency_penalty * e.value + p->presence_penalty);
        if (e.token < 0) *z = *z > 0 ? *z / p->repetition_penalty : *z * p->repetition_penalty;
        *z = finite_or_least(*z + add);
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
    edit(&w, logits, vocab, params, draw, history, n_history);
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

void sampler_score(sampled *out, const float *logits, int32_t vocab, int32_t token,
                   int32_t n_logprobs) {
    check_token(token, vocab);
    *out = (sampled){.token = token};
    if (n_logprobs >= 0) fill_logprobs(out, logits, vocab, n_logprobs);
}
