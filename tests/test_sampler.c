/* test_sampler.c - what is drawn, against probabilities worked out here, and the corners by
 * hand. */
#include "test.h"

#include "rng.h"
#include "sampler.h"
#include <string.h>

enum { V_MAX = 4096 };
static double scratch[V_MAX * 6];
static const sampling greedy = {.top_p = 1, .repetition_penalty = 1, .n_logprobs = -1};

static sampled draw_of(const float *logits, int32_t vocab, const sampling *p, uint64_t draw) {
    sampled out;
    assert_true(sampler_bytes(vocab) <= sizeof scratch);
    memset(scratch, 0xff, sizeof scratch); /* nothing is kept between calls */
    sampler_draw(&out, logits, vocab, p, draw, NULL, 0, scratch);
    return out;
}

static void test_greedy(void **state) {
    (void)state;
    const float tie[] = {1, 3, -2, 3, 3};
    assert_int_equal(draw_of(tie, 5, &greedy, 0).token, 1);
    const float nan[] = {NAN, -5, NAN, -4, INFINITY, -INFINITY};
    assert_int_equal(draw_of(nan, 6, &greedy, 0).token, 3);
    const float none[] = {NAN, -INFINITY, NAN};
    sampling warm = greedy;
    warm.temperature = 1;
    warm.n_logprobs = 2;
    const sampled s = draw_of(none, 3, &warm, 0);
    assert_int_equal(s.token, 0);
    assert_int_equal(s.n_top, 0);
    assert_true(isinf(s.logprob) && s.logprob < 0);
    assert_int_equal(draw_of(none, 3, &greedy, 0).token, 0);
    assert_int_equal(draw_of(tie, 1, &warm, 0).token, 0);

    sampling rest = greedy; /* at temperature 0 nothing else is looked at */
    rest.top_k = 1;
    rest.top_p = 0.1f;
    rest.min_p = 1;
    for (uint64_t i = 0; i < 10; i++) assert_int_equal(draw_of(tie, 5, &rest, i).token, 1);
}

/* --- Which tokens can be drawn ---------------------------------------------------------------- */

/* The truncations written again: everything sorted, bit per token kept. Vocabulary at most 64. */
static uint64_t naive_kept(const float *logits, int32_t vocab, const sampling *p, double *prob) {
    int32_t order[64], n = 0;
    double e[64], sum = 0, run = 0;
    for (int32_t i = 0; i < vocab; i++) {
        int32_t at = n++;
        for (; at > 0 && logits[order[at - 1]] < logits[i]; at--) order[at] = order[at - 1];
        order[at] = i; /* stable: the lower id stays ahead */
    }
    for (int32_t i = 0; i < vocab; i++)
        e[i] = exp(((double)logits[i] - (double)logits[order[0]]) / (double)p->temperature);
    if (p->top_k > 0 && p->top_k < n) n = p->top_k;
    for (int32_t i = 0; i < n; i++) sum += e[order[i]];
    for (int32_t i = 0; i < n && p->top_p < 1; i++) {
        run += e[order[i]];
        if (run >= (double)p->top_p * sum * (1 - 1e-12)) n = i + 1;
    }
    while (n > 1 && e[order[n - 1]] < (double)p->min_p) n--;
    uint64_t kept = 0;
    sum = 0;
    for (int32_t i = 0; i < n; i++) sum += e[order[i]];
    for (int32_t i = 0; i < vocab; i++) prob[i] = 0;
    for (int32_t i = 0; i < n; i++) {
        kept |= UINT64_C(1) << order[i];
        prob[order[i]] = e[order[i]] / sum;
    }
    return kept;
}

/* Pearson's chi-square over draws, where 5 are expected at least (the rest pooled), and the number
 * of cells. */
static double chi_square(const int32_t *count, const double *prob, int32_t vocab, int32_t draws,
                         int32_t *cells) {
    double chi = 0, pool_want = 0, pool_got = 0;
    *cells = 0;
    for (int32_t i = 0; i < vocab; i++) {
        const double want = prob[i] * draws;
        if (want < 5) {
            pool_want += want;
            pool_got += count[i];
            continue;
        }
        chi += pow(count[i] - want, 2) / want;
        ++*cells;
    }
    if (pool_want >= 5) {
        chi += pow(pool_got - pool_want, 2) / pool_want;
        ++*cells;
    }
    return chi;
}

/* Mean n, variance 2 n: five deviations above. Seeds are fixed, so this never flickers. */
static double chi_bound(int32_t cells) { return (cells - 1) + 5 * sqrt(2.0 * (cells - 1)) + 1e-9; }

static void test_distribution(void **state) {
    (void)state;
    enum { V = 40, DRAWS = 20000 };
    rng r;
    rng_seed(&r, 1, 0);
    float logits[V];
    for (int i = 0; i < V; i++) logits[i] = (float)(1.5 * rng_normal(&r));
    logits[7] = logits[30] = logits[12]; /* ties at some rank */
    const struct {
        float temperature;
        int32_t top_k;
        float top_p, min_p;
    } rule[] = {
        {1, 0, 1, 0},        {0.5f, 0, 1, 0},        {1, 5, 1, 0},    {1, 1, 1, 0},
        {1.5f, 0, 0.8f, 0},  {1, 0, 1e-6f, 0},       {1, 0, 1, 0.2f}, {1, 0, 1, 1},
        {2, 20, 0.9f, 0.1f}, {100, 1000, 0.999f, 0},
    };
    for (int32_t c = 0; c < COUNT_OF(rule); c++) {
        sampling p = greedy;
        p.temperature = rule[c].temperature;
        p.top_k = rule[c].top_k;
        p.top_p = rule[c].top_p;
        p.min_p = rule[c].min_p;
        double prob[V];
        int32_t count[V] = {0}, cells;
        const uint64_t kept = naive_kept(logits, V, &p, prob);
        for (int32_t i = 0; i < DRAWS; i++) { /* seeds and counters both move */
            p.seed = 77 + (uint64_t)(i / 100);
            const int32_t token = draw_of(logits, V, &p, (uint64_t)(i % 100)).token;
            assert_in_range(token, 0, V - 1);
            assert_true(kept >> token & 1);
            count[token]++;
        }
        const double chi = chi_square(count, prob, V, DRAWS, &cells);
        assert_at_most(chi, chi_bound(cells));
        if (cells > 1) { /* twin: a probability moved by a tenth of the whole */
            int32_t best = 0;
            for (int32_t i = 0; i < V; i++)
                if (prob[i] > prob[best]) best = i;
            for (int32_t i = 0; i < V; i++) prob[i] *= 0.9;
            prob[best] += 0.1;
            assert_more(chi_square(count, prob, V, DRAWS, &cells), chi_bound(cells));
        }
    }
}

/* Selection and doubling at sizes where they have something to do, against ranks found by
 * counting. */
static void test_large_vocabulary(void **state) {
    (void)state;
    enum { V = V_MAX };
    static float logits[V];
    static int32_t rank[V];
    static double ahead[V + 1]; /* by rank: mass of all better ones */
    rng r;
    for (uint64_t seed = 0; seed < 6; seed++) {
        rng_seed(&r, seed, 0);
        for (int i = 0; i < V; i++) /* many ties in half of the cases */
            logits[i] = seed % 2 ? (float)rng_below(&r, 9) : (float)(3 * rng_normal(&r));
        for (int32_t i = 0; i < V; i++) {
            rank[i] = 0;
            for (int32_t j = 0; j < V; j++)
                rank[i] += logits[j] > logits[i] || (logits[j] == logits[i] && j < i);
            ahead[rank[i] + 1] = exp((double)logits[i]);
        }
        for (int32_t i = 0; i < V; i++) ahead[i + 1] += ahead[i];
        for (int32_t c = 0; c < 9; c++) {
            sampling p = greedy;
            p.temperature = 1;
            p.seed = seed;
            if (c % 3 != 1) p.top_k = (int32_t)rng_range(&r, 1, V - 1);
            if (c % 3 != 0) p.top_p = (float)(0.05 + 0.9 * rng_unit(&r));
            const double sum = ahead[p.top_k ? p.top_k : V];
            for (uint64_t i = 0; i < 200; i++) {
                const int32_t at = rank[draw_of(logits, V, &p, i).token];
                if (p.top_k) assert_true(at < p.top_k);
                if (p.top_p < 1) assert_true(ahead[at] < (double)p.top_p * sum * (1 + 1e-12));
            }
        }
    }
}

/* Equal logits make exact sums: 2 of 4 reach 0.5, and the lower ids are the ones that stay. */
static void test_top_p_exact(void **state) {
    (void)state;
    const float flat[] = {2, 2, 2, 2};
    const struct {
        float top_p;
        int32_t kept;
    } rule[] = {{0.25f, 1}, {0.2500001f, 2}, {0.5f, 2}, {0.75f, 3}, {0.7500001f, 4}, {0.9999f, 4}};
    for (int32_t c = 0; c < COUNT_OF(rule); c++) {
        sampling p = greedy;
        p.temperature = 1;
        p.top_p = rule[c].top_p;
        int32_t most = 0;
        bool seen[4] = {false};
        for (uint64_t i = 0; i < 200; i++) seen[draw_of(flat, 4, &p, i).token] = true;
        for (int32_t i = 0; i < 4; i++)
            if (seen[i]) most = i + 1;
        assert_int_equal(most, rule[c].kept);
    }
}

/* The draw itself: ids in ascending order, u times the sum. */
static void test_inverse(void **state) {
    (void)state;
    const float logits[] = {0, 0, 0, 0, 0, 0, 0, 0};
    sampling p = greedy;
    p.temperature = 0.7f;
    for (uint64_t seed = 0; seed < 5; seed++)
        for (uint64_t draw = 0; draw < 50; draw++) {
            p.seed = seed;
            const int32_t want = (int32_t)(8 * philox_unit(seed, draw));
            assert_int_equal(draw_of(logits, 8, &p, draw).token, want);
        }
    /* Very low temperatures do not overflow. */
    const float wide[] = {-3e38f, 3e38f, 2.9e38f};
    p.temperature = 1e-30f;
    for (uint64_t draw = 0; draw < 20; draw++)
        assert_int_equal(draw_of(wide, 3, &p, draw).token, 1);
}

static void test_penalty(void **state) {
    (void)state;
    const float logits[] = {2, 3, -1, -1.5f};
    const int32_t history[] = {1, 1, 1, 2}; /* once for each token, however often it occurs */
    sampling p = greedy;
    sampled out;
    p.repetition_penalty = 1.4f; /* 3 / 1.4 = 2.14 is still the largest; 3 / 1.4^3 would not be */
    sampler_draw(&out, logits, 4, &p, 0, history, 4, scratch);
    assert_int_equal(out.token, 1);
    p.repetition_penalty = 1.6f; /* 3 / 1.6 = 1.875 < 2 */
    sampler_draw(&out, logits, 4, &p, 0, history, 4, scratch);
    assert_int_equal(out.token, 0);
    const int32_t both[] = {0, 1, 2}; /* negative ones are multiplied: -1 * 1.6 < -1.5 */
    sampling last = p;
    last.temperature = 1;
    const float low[] = {-100, -100, -1, -1.5f};
    last.min_p = 1; /* only the best */
    sampler_draw(&out, low, 4, &last, 0, both, 3, scratch);
    assert_int_equal(out.token, 3);
    last.repetition_penalty = 1.4f;
    sampler_draw(&out, low, 4, &last, 0, both, 3, scratch);
    assert_int_equal(out.token, 2);
    p.repetition_penalty = 0.5f; /* below 1 it favours what was said */
    const int32_t weak[] = {0};
    sampler_draw(&out, logits, 4, &p, 0, weak, 1, scratch);
    assert_int_equal(out.token, 0);
}

/* Steps 1 to 3 as they are written down: every token by itself, counts anew for each. */
static float naive_edited(const sampling *p, float z, int32_t id, int32_t draw,
                          const int32_t *history, int32_t n) {
    bool barred = false;
    int32_t in_all = 0, in_output = 0;
    for (int32_t k = 0; k < 2; k++)
        for (int32_t i = 0; i < p->barred[k].n; i++) barred |= p->barred[k].token[i] == id;
    if (barred && draw < p->min_tokens) return -INFINITY;
    for (int32_t i = 0; i < p->n_bias; i++)
        if (p->bias[i].token == id) z += p->bias[i].bias;
    for (int32_t h = 0; h < n; h++) {
        in_all += history[h] == id;
        in_output += history[h] == id && h >= n - draw;
    }
    if (in_all) z = z > 0 ? z / p->repetition_penalty : z * p->repetition_penalty;
    if (in_output) z -= p->frequency_penalty * (float)in_output + p->presence_penalty;
    return z;
}

/* Every logit after n edits against naive_edited, and that no step has a token twice; how many
 * logits the edits changed. */
static int32_t compare_edits(const sampling *p, const float *logits, int32_t vocab,
                             const draw_edit *edit, int32_t n, int32_t n_bias, int32_t draw,
                             const int32_t *history, int32_t n_history) {
    int32_t differ = 0;
    for (int32_t i = 0; i < vocab; i++) {
        float want = naive_edited(p, logits[i], i, draw, history, n_history), got = logits[i];
        if (!isfinite(want)) want = -INFINITY;
        if (!isfinite(got)) got = -INFINITY;
        differ += got != want;
        for (int32_t k = 0; k < n; k++) {
            const int32_t token = edit[k].token;
            if ((token < 0 ? ~token : token) != i) continue;
            const float value = edit[k].value;
            if (token < 0)
                got = got > 0 ? got / p->repetition_penalty : got * p->repetition_penalty;
            if (k < n_bias)
                got += value;
            else if (value > 0)
                got -= p->frequency_penalty * value + p->presence_penalty;
            for (int32_t j = k + 1; j < n; j++)
                if ((k < n_bias) == (j < n_bias)) assert_int_not_equal(edit[j].token, token);
        }
        assert_true(got == want || fabsf(got - want) <= 1e-6f * (1 + fabsf(want)));
    }
    return differ;
}

/* A token against another one just below and just above what its logit is after the edits. */
static void draw_beside(const sampling *p, float logit, int32_t id, int32_t vocab, int32_t draw,
                        const int32_t *history, int32_t n_history) {
    const float want = naive_edited(p, logit, id, draw, history, n_history);
    const int32_t other = id == 10 ? 9 : 10; /* neither is in the history or has a bias */
    float two[V_MAX];
    for (int32_t k = 0; k < vocab; k++) two[k] = k == id ? logit : -INFINITY;
    for (int32_t up = 0; up < 2; up++) {
        sampled out;
        two[other] = !isfinite(want) ? -1e6f : want + (up ? 1e-3f : -1e-3f);
        sampler_draw(&out, two, vocab, p, (uint64_t)draw, history, n_history, scratch);
        assert_int_equal(out.token, up || !isfinite(want) ? other : id);
    }
}

static void test_edits(void **state) {
    (void)state;
    enum { V = 13, H = 9 };
    static const int32_t history[H] = {1, 2, 2, 5, 2, 3, 3, 3, 7}, ends[] = {4, 7, 40, 7};
    static const logit_bias bias[] = {{0, 1.5f}, {3, -2}, {4, 100}, {7, 0.25f}, {12, -100}};
    const struct {
        float repetition, presence, frequency;
        int32_t draw, min_tokens, n_bias;
    } rule[] = {
        {1, 0, 0, 4, 0, 0},       {1, 0.5f, 0, 4, 0, 0},       {1, 0, 0.3f, 4, 0, 0},
        {1, -2, 2, 5, 0, 5},      {1.3f, 0, 0, 4, 0, 5},       {1.3f, 0.7f, -0.2f, 0, 1, 5},
        {1, 0, 0, 4, 5, 5},       {0.8f, 1.1f, 0.9f, 9, 9, 3}, {1.5f, 0.1f, 0.1f, 12, 99, 5},
        {1, 0.5f, 0.5f, 1, 1, 1},
    };
    float logits[V];
    int32_t count[V + 1] = {0};
    assert_int_equal(sampler_counts(V), COUNT_OF(count));
    rng r;
    rng_seed(&r, 3, 0);
    for (int32_t c = 0; c < COUNT_OF(rule); c++) {
        sampling p = greedy;
        p.repetition_penalty = rule[c].repetition;
        p.presence_penalty = rule[c].presence;
        p.frequency_penalty = rule[c].frequency;
        p.min_tokens = rule[c].min_tokens;
        p.bias = bias;
        p.n_bias = rule[c].n_bias;
        p.barred[0].token = ends;
        p.barred[0].n = 3;
        p.barred[1].token = ends + 3;
        p.barred[1].n = 1;
        assert_ok(sampling_check(&p));
        for (int32_t i = 0; i < V; i++) logits[i] = (float)(3 * rng_normal(&r));
        logits[11] = NAN;
        draw_edit edit[2 * V + 1];
        int32_t n_bias;
        const uint64_t draw = (uint64_t)rule[c].draw;
        const int32_t n = sampler_edits(edit, &n_bias, &p, draw, history, H, V, count);
        assert_true(n <= sampler_edits_most(&p, draw, H, V));
        for (int32_t i = 0; i < COUNT_OF(count); i++) assert_int_equal(count[i], 0);
        const int32_t differ =
            compare_edits(&p, logits, V, edit, n, n_bias, rule[c].draw, history, H);
        assert_true((differ > 0) == (c > 0)); /* the twin: without them */
        for (int32_t i = 0; i < V; i++) draw_beside(&p, logits[i], i, V, rule[c].draw, history, H);
    }
}

/* The edits made without the last token, which a device adds by the rule of draw.h, against those
 * of the whole history: the last token is in the output already, in the prompt, or in neither. */
static void test_last_token_is_added(void **state) {
    (void)state;
    enum { V = 13, H = 9, DRAWN = 4 };
    int32_t history[H] = {1, 2, 2, 5, 2, 3, 3, 3, -1}, count[V + 1] = {0}, missed = 0;
    float logits[V];
    rng r;
    rng_seed(&r, 4, 0);
    for (int32_t c = 0; c < 3 * V; c++) {
        const int32_t last = c / 3;
        sampling p = greedy;
        p.repetition_penalty = c % 3 != 1 ? 1.3f : 1;
        p.presence_penalty = c % 3 != 0 ? 0.4f : 0;
        p.frequency_penalty = c % 3 != 0 ? -0.3f : 0;
        for (int32_t i = 0; i < V; i++) logits[i] = (float)(3 * rng_normal(&r));
        draw_edit edit[2 * V + 1];
        int32_t n_bias;
        history[H - 1] = -7; /* whatever sample draws it */
        int32_t n = sampler_edits(edit, &n_bias, &p, DRAWN, history, H, V, count);
        assert_true(n < sampler_edits_most(&p, DRAWN, H, V));
        for (int32_t i = 0; i < COUNT_OF(count); i++) assert_int_equal(count[i], 0);
        history[H - 1] = last;
        bool counted = false;
        for (int32_t k = 0; k < n - 1; k++) {
            if ((edit[k].token < 0 ? ~edit[k].token : edit[k].token) != last) continue;
            edit[k].value += 1;
            counted = true;
        }
        draw_edit *kept = &edit[n - 1];
        assert_int_equal(kept->token, c % 3 != 1 ? ~0 : 0);
        if (counted)
            n--;
        else
            *kept = (draw_edit){.token = c % 3 != 1 ? ~last : last, .value = 1};
        assert_true(compare_edits(&p, logits, V, edit, n, 0, DRAWN, history, H) > 0);
        const float all = naive_edited(&p, logits[last], last, DRAWN, history, H);
        missed += all != naive_edited(&p, logits[last], last, DRAWN - 1, history, H - 1);
    }
    assert_int_equal(missed, 3 * V - 4); /* the twin: without it; four have the penalty already */
}

/* The bound holds where every token of a long history is another, and where there is none. */
static void test_edits_most(void **state) {
    (void)state;
    enum { V = 50 };
    int32_t history[V], count[V + 2] = {0}, n_bias;
    for (int32_t i = 0; i < V; i++) history[i] = V - 1 - i;
    draw_edit edit[V + 1];
    sampling p = greedy;
    assert_int_equal(sampler_edits_most(&p, 50, V, V), 0);
    p.presence_penalty = 1;
    for (uint64_t draw = 0; draw < 60; draw++) {
        const int32_t n = sampler_edits(edit, &n_bias, &p, draw, history, V, V, count);
        assert_int_equal(n, draw < V ? draw : V);
        assert_int_equal(sampler_edits_most(&p, draw, V, V), n + 1);
    }
    assert_int_equal(sampler_edits(edit, &n_bias, &p, 3, NULL, 0, V, count), 0);
    p.repetition_penalty = 2;
    assert_int_equal(sampler_edits(edit, &n_bias, &p, 3, history, V, V, count), V);
    assert_int_equal(sampler_edits_most(&p, 3, V, V), V + 1);
    for (int32_t i = 0; i < COUNT_OF(count); i++) assert_int_equal(count[i], 0);
    assert_true(sampling_penalises(&p));
    assert_false(sampling_penalises(&greedy));
}

static void test_logprobs(void **state) {
    (void)state;
    const float logits[] = {1, 4, NAN, 4, 2, -3};
    double sum = 0;
    for (int i = 0; i < 6; i++)
        if (i != 2) sum += exp((double)logits[i]);
    sampling p = greedy;
    p.n_logprobs = 3;
    sampled s = draw_of(logits, 6, &p, 0);
    assert_int_equal(s.token, 1);
    assert_close(s.logprob, 4 - log(sum), 1e-6);
    assert_int_equal(s.n_top, 3);
    const int32_t order[] = {1, 3, 4};
    for (int i = 0; i < 3; i++) {
        assert_int_equal(s.top_token[i], order[i]);
        assert_close(s.top_logprob[i], (double)logits[order[i]] - log(sum), 1e-6);
    }
    assert_more(fabs((double)s.top_logprob[2] - (double)s.top_logprob[1]), 1e-6); /* twin */

    /* Of the raw logits: neither temperature nor penalty nor bias nor truncation shows. */
    const int32_t history[] = {1, 3};
    const logit_bias bias[] = {{1, -3}, {5, -100}};
    p.bias = bias;
    p.n_bias = 2;
    p.repetition_penalty = 10;
    p.temperature = 0.01f;
    p.top_k = 1;
    p.n_logprobs = LOGPROBS_MAX; /* more than there are finite ones */
    sampler_draw(&s, logits, 6, &p, 0, history, 2, scratch);
    assert_int_equal(s.token, 4);
    assert_close(s.logprob, 2 - log(sum), 1e-6);
    assert_int_equal(s.n_top, 5);
    assert_int_equal(s.top_token[0], 1);
    assert_int_equal(s.top_token[4], 5);
    p.n_logprobs = p.n_bias = 0;
    s = draw_of(logits, 6, &p, 0);
    assert_int_equal(s.n_top, 0);
    assert_close(s.logprob, 4 - log(sum), 1e-6);
    p.n_logprobs = -1;
    assert_true(draw_of(logits, 6, &p, 0).logprob == 0);
}

static void refuse(const char *name, sampling p) {
    assert_status(sampling_check(&p), ST_RANGE);
    assert_non_null(strstr(fail_message(), name));
}

static void test_check(void **state) {
    (void)state;
    assert_ok(sampling_check(&greedy));
    refuse("temperature", (sampling){.temperature = -1, .top_p = 1, .repetition_penalty = 1});
    refuse("temperature", (sampling){.temperature = NAN, .top_p = 1, .repetition_penalty = 1});
    refuse("temperature", (sampling){.temperature = 101, .top_p = 1, .repetition_penalty = 1});
    refuse("top_k", (sampling){.top_k = -1, .top_p = 1, .repetition_penalty = 1});
    refuse("top_p", (sampling){.top_p = 0, .repetition_penalty = 1});
    refuse("top_p", (sampling){.top_p = NAN, .repetition_penalty = 1});
    refuse("top_p", (sampling){.top_p = 1.5f, .repetition_penalty = 1});
    refuse("min_p", (sampling){.top_p = 1, .min_p = 2, .repetition_penalty = 1});
    refuse("min_p", (sampling){.top_p = 1, .min_p = -1, .repetition_penalty = 1});
    refuse("repetition_penalty", (sampling){.top_p = 1, .repetition_penalty = 0});
    refuse("repetition_penalty", (sampling){.top_p = 1, .repetition_penalty = NAN});
    refuse("presence_penalty",
           (sampling){.top_p = 1, .repetition_penalty = 1, .presence_penalty = 2.1f});
    refuse("presence_penalty",
           (sampling){.top_p = 1, .repetition_penalty = 1, .presence_penalty = NAN});
    refuse("frequency_penalty",
           (sampling){.top_p = 1, .repetition_penalty = 1, .frequency_penalty = -2.1f});
    refuse("min_tokens", (sampling){.top_p = 1, .repetition_penalty = 1, .min_tokens = -1});
    static const logit_bias bias[] = {{3, 1}, {3, 2}, {4, 100.5f}, {5, NAN}, {-1, 0}};
    sampling biased = greedy;
    for (biased.bias = bias, biased.n_bias = 2; biased.bias < bias + 5;
         biased.bias += biased.n_bias, biased.n_bias = 1)
        refuse("logit_bias", biased);
    biased.n_bias = LOGIT_BIAS_MAX + 1;
    refuse("logit_bias", biased);
    refuse("logprobs", (sampling){.top_p = 1, .repetition_penalty = 1, .n_logprobs = 21});
    refuse("logprobs", (sampling){.top_p = 1, .repetition_penalty = 1, .n_logprobs = -2});
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_greedy),
        cmocka_unit_test(test_distribution),
        cmocka_unit_test(test_large_vocabulary),
        cmocka_unit_test(test_top_p_exact),
        cmocka_unit_test(test_inverse),
        cmocka_unit_test(test_penalty),
        cmocka_unit_test(test_edits),
        cmocka_unit_test(test_last_token_is_added),
        cmocka_unit_test(test_edits_most),
        cmocka_unit_test(test_logprobs),
        cmocka_unit_test(test_check),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
