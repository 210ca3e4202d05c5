/* ref_moe.c - mixture-of-experts routing, permutation and combination. */
#include "ref_moe.h"
#include <math.h>

static double logit_of(float x) { return isnan(x) ? -INFINITY : (double)x; }

/* Is expert `a` before expert `b` in the order of choice? */
static bool before(const float *logits, int32_t a, int32_t b) {
    const double la = logit_of(logits[a]), lb = logit_of(logits[b]);
    return la > lb || (la == lb && a < b);
}

static void route_token(int32_t *expert, float *weight, const float *logits, int32_t n_experts,
                        int32_t top_k, bool over_chosen, bool normalise) {
    for (int32_t e = 0, n = 0; e < n_experts; e++) { /* insertion into the list of the best */
        if (n == top_k && !before(logits, e, expert[n - 1])) continue;
        if (n < top_k) n++;
        int32_t at = n - 1;
        for (; at > 0 && before(logits, e, expert[at - 1]); at--) expert[at] = expert[at - 1];
        expert[at] = e;
    }
    const double largest = logit_of(logits[expert[0]]);
    double all = 0, chosen = 0;
    for (int32_t e = 0; e < n_experts; e++) all += exp(logit_of(logits[e]) - largest);
    for (int32_t j = 0; j < top_k; j++) chosen += exp(logit_of(logits[expert[j]]) - largest);
    const double sum = over_chosen || normalise ? chosen : all; /* p / sum p: `all` cancels */
    for (int32_t j = 0; j < top_k; j++)
        weight[j] = (float)(exp(logit_of(logits[expert[j]]) - largest) / sum);
}

void ref_moe_route(int32_t *expert, float *weight, const float *logits, int64_t t,
                   int32_t n_experts, int32_t top_k, bool over_chosen, bool normalise) {
    CHECK(top_k >= 1);
    CHECK(top_k <= n_experts);
    for (int64_t i = 0; i < t; i++)
        route_token(expert + i * top_k, weight + i * top_k, logits + i * n_experts, n_experts,
                    top_k, over_chosen, normalise);
}

void ref_moe_permute(int32_t *expert_start, int32_t *slot_row, int32_t *row_token,
                     const int32_t *expert, int64_t t, int32_t n_experts, int32_t top_k) {
    const int64_t n_slots = t * top_k;
    for (int32_t e = 0; e <= n_experts; e++) expert_start[e] = 0;
    for (int64_t s = 0; s < n_slots; s++) expert_start[expert[s] + 1]++;
    for (int32_t e = 0; e < n_experts; e++) expert_start[e + 1] += expert_start[e];
    for (int64_t s = 0; s < n_slots; s++) { /* start[e] runs to the end of e ... */
        const int32_t row = expert_start[expert[s]]++;
        slot_row[s] = row;
        row_token[row] = (int32_t)(s / top_k);
    }
    for (int32_t e = n_experts; e > 0; e--)
        expert_start[e] = expert_start[e - 1]; /* ... and back */
    expert_start[0] = 0;
}

void ref_moe_combine(float *out, const float *y, const float *weight, const int32_t *slot_row,
                     int64_t t, int32_t top_k, int32_t dim) {
    for (int64_t i = 0; i < t; i++) {
        for (int32_t e = 0; e < dim; e++) {
            double sum = 0;
            for (int32_t j = 0; j < top_k; j++) {
                const int64_t slot = i * top_k + j;
                sum += (double)weight[slot] * y[(int64_t)slot_row[slot] * dim + e];
            }
            out[i * dim + e] = (float)sum;
        }
    }
}
