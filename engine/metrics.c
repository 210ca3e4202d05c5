/* metrics.c - see metrics.h. */
#include "metrics.h"

#include "utf8.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

#define S(ns) ((double)(ns)*1e-9)

/* --- Order statistics ------------------------------------------------------------------------- */

/* Hoare's selection: afterwards v[k] is what sorting would put there, nothing larger before it and
 * nothing smaller behind. Middle pivots, so sorted input is no worst case. No NaN. */
static void select_order(double *v, int64_t n, int64_t k) {
    int64_t lo = 0, hi = n - 1;
    while (lo < hi) {
        const double pivot = v[lo + (hi - lo) / 2];
        int64_t i = lo, j = hi;
        while (i <= j) {
            while (v[i] < pivot) i++;
            while (v[j] > pivot) j--;
            if (i > j) break;
            const double t = v[i];
            v[i++] = v[j];
            v[j--] = t;
        }
        if (k <= j)
            hi = j;
        else if (k >= i)
            lo = i;
        else
            return;
    }
}

double percentile(double *v, int64_t n, double p) {
    CHECK(p >= 0 && p <= 1);
    for (int64_t i = 0; i < n; i++)
        if (isnan(v[i])) return NAN;
    if (n <= 0) return NAN;
    const double at = p * (double)(n - 1);
    const int64_t low = (int64_t)floor(at);
    select_order(v, n, low);
    if (low + 1 >= n) return v[low];
    double next = v[low + 1]; /* smallest of what lies behind */
    for (int64_t i = low + 2; i < n; i++)
        if (v[i] < next) next = v[i];
    const double t = at - (double)low, gap = next - v[low];
    return t >= 0.5 ? next - gap * (1 - t) : v[low] + gap * t; /* numpy's _lerp, to the last bit */
}

static metric_summary summarise(double *v, int64_t n) {
    if (n == 0) return (metric_summary){NAN, NAN, NAN, NAN, NAN, NAN, 0};
    metric_summary m = {.n = n, .max = v[0]};
    double sum = 0, squares = 0;
    for (int64_t i = 0; i < n; i++) {
        sum += v[i];
        if (v[i] > m.max) m.max = v[i];
    }
    m.mean = sum / (double)n;
    for (int64_t i = 0; i < n; i++) squares += (v[i] - m.mean) * (v[i] - m.mean);
    m.std = sqrt(squares / (double)n);
    m.p50 = percentile(v, n, 0.50);
    m.p90 = percentile(v, n, 0.90);
    m.p99 = percentile(v, n, 0.99);
    return m;
}

/* --- One run ---------------------------------------------------------------------------------- */

static bool completed(const request_log *r) {
    return (r->finish == FINISH_STOP || r->finish == FINISH_LENGTH) && r->n_output > 0;
}

static double ttft_of(const request_log *r) { return S(r->first_token_ns - r->arrival_ns); }
static double ttft_dispatch_of(const request_log *r) {
    return S(r->first_token_ns - r->dispatch_ns);
}
static double e2e_of(const request_log *r) { return S(r->finish_ns - r->arrival_ns); }
static double e2e_dispatch_of(const request_log *r) { return S(r->finish_ns - r->dispatch_ns); }
static double queue_of(const request_log *r) { return S(r->admit_ns - r->arrival_ns); }
static double lag_of(const request_log *r) { return S(r->dispatch_ns - r->arrival_ns); }
static double tpot_of(const request_log *r) {
    return r->n_output > 1 ? S(r->finish_ns - r->first_token_ns) / (r->n_output - 1) : 0;
}

/* `scratch` has room for a value of each request. */
static metric_summary summarise_by(const request_log *log, int64_t n, double *scratch,
                                   double (*value)(const request_log *)) {
    int64_t k = 0;
    for (int64_t i = 0; i < n; i++)
        if (completed(&log[i]) && (value != tpot_of || log[i].n_output > 1))
            scratch[k++] = value(&log[i]);
    return summarise(scratch, k);
}

/* Gaps between tokens of all requests; scratch has n_gaps places. */
static metric_summary summarise_gaps(const request_log *log, int64_t n, double *scratch) {
    int64_t k = 0;
    for (int64_t i = 0; i < n; i++)
        for (int32_t t = 1; completed(&log[i]) && log[i].token_ns && t < log[i].n_output; t++)
            scratch[k++] = S(log[i].token_ns[t] - log[i].token_ns[t - 1]);
    return summarise(scratch, k);
}

static void count(metrics *m, const request_log *log, int64_t n, int64_t *first, int64_t *last) {
    for (int64_t i = 0; i < n; i++) {
        const request_log *r = &log[i];
        m->n_preemptions += r->n_preempted;
        m->n_refused += r->finish == FINISH_REFUSED;
        m->n_cancelled += r->finish == FINISH_CANCEL;
        if (!completed(r)) continue;
        if (m->n_completed == 0 || r->arrival_ns < *first) *first = r->arrival_ns;
        if (m->n_completed == 0 || r->finish_ns > *last) *last = r->finish_ns;
        m->n_completed++;
        m->prompt_tokens += r->n_prompt;
        m->output_tokens += r->n_output;
        m->cached_tokens += r->n_cached;
    }
}

typedef double value_of(const request_log *);

static double goodput(const request_log *log, int64_t n, const metric_limits *l, value_of *ttft,
                      value_of *e2e, double duration) {
    if (!l || (l->ttft_s <= 0 && l->tpot_s <= 0 && l->e2e_s <= 0)) return NAN;
    int64_t k = 0;
    for (int64_t i = 0; i < n; i++) {
        const request_log *r = &log[i];
        k += completed(r) && (l->ttft_s <= 0 || ttft(r) <= l->ttft_s) &&
             (l->tpot_s <= 0 || tpot_of(r) <= l->tpot_s) && (l->e2e_s <= 0 || e2e(r) <= l->e2e_s);
    }
    return (double)k / duration;
}

static int order_i64(const void *a, const void *b) {
    const int64_t x = *(const int64_t *)a, y = *(const int64_t *)b;
    return (x > y) - (x < y);
}

/* starts and ends of the completed requests, each sorted; n places each. */
static void sorted_instants(const request_log *log, int64_t n, int64_t *start, int64_t *end) {
    int64_t k = 0;
    for (int64_t i = 0; i < n; i++) {
        if (!completed(&log[i])) continue;
        start[k] = log[i].arrival_ns;
        end[k++] = log[i].finish_ns;
    }
    qsort(start, (size_t)k, sizeof *start, order_i64);
    qsort(end, (size_t)k, sizeof *end, order_i64);
}

static int64_t most_at_once(const int64_t *start, const int64_t *end, int64_t n) {
    int64_t most = 0, ended = 0;
    for (int64_t i = 0; i < n; i++) {
        while (end[ended] <= start[i] && ended < i) ended++;
        most = i64_max(most, i + 1 - ended);
    }
    return most;
}

static double steady_rate(const request_log *log, int64_t n, const int64_t *end, int64_t n_done) {
    if (n_done < 10) return NAN;
    const int64_t from = end[div_up(n_done, 10) - 1], to = end[div_up(9 * n_done, 10) - 1];
    int64_t tokens = 0;
    for (int64_t i = 0; i < n; i++)
        for (int32_t t = 0; completed(&log[i]) && log[i].token_ns && t < log[i].n_output; t++)
            tokens += log[i].token_ns[t] > from && log[i].token_ns[t] <= to;
    return to > from ? (double)tokens / S(to - from) : NAN;
}

/* In `bucket`, one for each second begun since `first`. */
static double busiest_second(const request_log *log, int64_t n, int64_t first, int64_t *bucket) {
    int64_t most = 0;
    for (int64_t i = 0; i < n; i++)
        for (int32_t t = 0; completed(&log[i]) && log[i].token_ns && t < log[i].n_output; t++)
            most = i64_max(most, ++bucket[(log[i].token_ns[t] - first) / 1000000000]);
    return (double)most;
}

typedef struct {
    double *value;        /* [max(requests, gaps)] */
    int64_t *start, *end; /* [requests] */
    int64_t *bucket;      /* [seconds] */
} scratch;

static void fill(metrics *m, const request_log *log, int64_t n, const metric_limits *limits,
                 int64_t first, const scratch *s) {
    m->ttft = summarise_by(log, n, s->value, ttft_of);
    m->ttft_dispatch = summarise_by(log, n, s->value, ttft_dispatch_of);
    m->tpot = summarise_by(log, n, s->value, tpot_of);
    m->e2e = summarise_by(log, n, s->value, e2e_of);
    m->e2e_dispatch = summarise_by(log, n, s->value, e2e_dispatch_of);
    m->queue = summarise_by(log, n, s->value, queue_of);
    m->lag_p99_s = summarise_by(log, n, s->value, lag_of).p99;
    m->itl = summarise_gaps(log, n, s->value);
    sorted_instants(log, n, s->start, s->end);
    m->max_concurrency = most_at_once(s->start, s->end, m->n_completed);
    m->steady_output_tokens_per_s = steady_rate(log, n, s->end, m->n_completed);
    m->max_output_tokens_per_s = s->bucket ? busiest_second(log, n, first, s->bucket) : NAN;

    const double duration = m->duration_s > 0 ? m->duration_s : NAN;
    m->requests_per_s = (double)m->n_completed / duration;
    m->output_tokens_per_s = (double)m->output_tokens / duration;
    m->total_tokens_per_s = (double)(m->prompt_tokens + m->output_tokens) / duration;
    m->goodput_per_s = goodput(log, n, limits, ttft_of, e2e_of, duration);
    m->goodput_dispatch_per_s =
        goodput(log, n, limits, ttft_dispatch_of, e2e_dispatch_of, duration);
    m->mean_concurrency = m->e2e.mean * (double)m->n_completed / duration;
}

enum { SECONDS_MAX = 1 << 26 }; /* two years: longer runs have no busiest second */

status metrics_compute(metrics *out, const request_log *log, int64_t n,
                       const metric_limits *limits) {
    metrics m = {0};
    int64_t first = 0, last = 0, n_gaps = 0;
    count(&m, log, n, &first, &last);
    m.duration_s = S(last - first);
    for (int64_t i = 0; i < n; i++) n_gaps += completed(&log[i]) ? log[i].n_output : 0;
    const int64_t seconds = (last - first) / 1000000000 + 1;
    scratch s = {.value = mem_alloc((size_t)(i64_max(n, n_gaps) + 1), sizeof *s.value),
                 .start = mem_alloc((size_t)n + 1, sizeof *s.start),
                 .end = mem_alloc((size_t)n + 1, sizeof *s.end)};
    bool enough = s.value && s.start && s.end;
    if (enough && seconds <= SECONDS_MAX && m.n_completed > 0) {
        s.bucket = mem_alloc((size_t)seconds, sizeof *s.bucket);
        enough = s.bucket != NULL;
    }
    if (enough) {
        fill(&m, log, n, limits, first, &s);
        *out = m;
    }
    mem_free(s.value);
    mem_free(s.start);
    mem_free(s.end);
    mem_free(s.bucket);
    return enough ? ST_OK : FAIL(ST_NOMEM, "metrics of %lld requests", (long long)n);
}

/* --- JSON ------------------------------------------------------------------------------------- */

static bool set_real(json_t *o, const char *key, double v) {
    return !isfinite(v) || json_object_set_new(o, key, json_real(v)) == 0;
}

static bool set_count(json_t *o, const char *key, int64_t v) {
    return json_object_set_new(o, key, json_integer(v)) == 0;
}

static bool set_summary(json_t *o, const char *name, const metric_summary *m) {
    const struct {
        const char *what;
        double v;
    } part[] = {
        {"mean", m->mean}, {"std", m->std}, {"p50", m->p50},
        {"p90", m->p90},   {"p99", m->p99}, {"max", m->max},
    };
    bool done = true;
    char key[64];
    for (int32_t i = 0; i < COUNT_OF(part); i++) {
        snprintf(key, sizeof key, "%s_%s_ms", name, part[i].what);
        done = set_real(o, key, part[i].v * 1e3) && done;
    }
    snprintf(key, sizeof key, "%s_n", name);
    return set_count(o, key, m->n) && done;
}

status metrics_json(const metrics *m, json_t *o) {
    const bool done =
        set_count(o, "n_completed", m->n_completed) && set_count(o, "n_refused", m->n_refused) &&
        set_count(o, "n_cancelled", m->n_cancelled) &&
        set_count(o, "n_preemptions", m->n_preemptions) &&
        set_count(o, "prompt_tokens", m->prompt_tokens) &&
        set_count(o, "output_tokens", m->output_tokens) &&
        set_count(o, "cached_tokens", m->cached_tokens) &&
        set_real(o, "duration_s", m->duration_s) &&
        set_real(o, "requests_per_s", m->requests_per_s) &&
        set_real(o, "output_tokens_per_s", m->output_tokens_per_s) &&
        set_real(o, "total_tokens_per_s", m->total_tokens_per_s) &&
        set_summary(o, "ttft", &m->ttft) && set_summary(o, "ttft_dispatch", &m->ttft_dispatch) &&
        set_summary(o, "tpot", &m->tpot) && set_summary(o, "itl", &m->itl) &&
        set_summary(o, "e2e", &m->e2e) && set_summary(o, "e2e_dispatch", &m->e2e_dispatch) &&
        set_summary(o, "queue", &m->queue) && set_real(o, "goodput_per_s", m->goodput_per_s) &&
        set_real(o, "steady_output_tokens_per_s", m->steady_output_tokens_per_s) &&
        set_real(o, "max_output_tokens_per_s", m->max_output_tokens_per_s) &&
        set_count(o, "max_concurrency", m->max_concurrency) &&
        set_real(o, "mean_concurrency", m->mean_concurrency) &&
        set_real(o, "lag_p99_ms", m->lag_p99_s * 1e3);
    return done ? ST_OK : FAIL(ST_NOMEM, "metrics as JSON");
}

/* mean_ttft_ms, median_ttft_ms, ...; vLLM writes 0 where nothing was seen. */
static bool set_vllm(json_t *o, const char *name, const metric_summary *m) {
    const struct {
        const char *what;
        double v;
    } part[] = {
        {"mean", m->mean}, {"median", m->p50}, {"std", m->std}, {"p90", m->p90}, {"p99", m->p99},
    };
    bool done = true;
    for (int32_t i = 0; i < COUNT_OF(part); i++) {
        char key[64];
        snprintf(key, sizeof key, "%s_%s_ms", part[i].what, name);
        done = set_real(o, key, m->n > 0 ? part[i].v * 1e3 : 0) && done;
    }
    return done;
}

status metrics_json_vllm(const metrics *m, json_t *o) {
    const double rate = m->goodput_dispatch_per_s;
    json_t *good_rate = isfinite(rate) ? json_real(rate) : json_null();
    const bool done = set_real(o, "duration", m->duration_s) &&
                      set_count(o, "completed", m->n_completed) &&
                      set_count(o, "failed", m->n_refused + m->n_cancelled) &&
                      set_count(o, "total_input_tokens", m->prompt_tokens) &&
                      set_count(o, "total_output_tokens", m->output_tokens) &&
                      set_real(o, "request_throughput", m->requests_per_s) &&
                      set_real(o, "output_throughput", m->output_tokens_per_s) &&
                      set_real(o, "total_token_throughput", m->total_tokens_per_s) &&
                      set_real(o, "max_output_tokens_per_s", m->max_output_tokens_per_s) &&
                      set_count(o, "max_concurrent_requests", m->max_concurrency) &&
                      set_vllm(o, "ttft", &m->ttft_dispatch) && set_vllm(o, "tpot", &m->tpot) &&
                      set_vllm(o, "itl", &m->itl) && set_vllm(o, "e2el", &m->e2e_dispatch);
    const bool last = json_object_set_new(o, "request_goodput", good_rate) == 0; /* takes it */
    return done && last ? ST_OK : FAIL(ST_NOMEM, "metrics as JSON");
}

/* Seconds between successive tokens; NULL when memory is short. */
static json_t *gaps_of(const request_log *r) {
    json_t *gaps = json_array();
    for (int32_t t = 1; gaps && completed(r) && r->token_ns && t < r->n_output; t++)
        if (json_array_append_new(gaps, json_real(S(r->token_ns[t] - r->token_ns[t - 1]))) != 0) {
            json_decref(gaps);
            return NULL;
        }
    return gaps;
}

/* Why it did not complete, "" when it did. A reason may quote a server's answer, whatever bytes
 * those are, cut anywhere. NULL when memory is short. */
static json_t *error_of(const request_log *r) {
    if (completed(r)) return json_string("");
    if (!r->reason) return json_string(finish_text(r->finish));
    text repaired = {0};
    utf8_repair(&repaired, r->reason, strlen(r->reason));
    json_t *error = text_status(&repaired) == ST_OK
                        ? json_stringn(repaired.data ? repaired.data : "", repaired.length)
                        : NULL;
    text_free(&repaired);
    return error;
}

status metrics_json_requests(const request_log *log, int64_t n, json_t *o) {
    enum { IN, OUT, TTFT, ITL, LATENCY, START, ERROR, ARRIVAL, LISTS };
    static const char *const name[LISTS] = {"input_lens", "output_lens",     "ttfts",
                                            "itls",       "latencies",       "start_times",
                                            "errors",     "amalgam_arrivals"};
    json_t *list[LISTS];
    bool done = true;
    for (int32_t k = 0; k < LISTS; k++) {
        list[k] = json_array();
        done = json_object_set_new(o, name[k], list[k]) == 0 && done; /* takes it, NULL too */
    }
    for (int64_t i = 0; done && i < n; i++) {
        const request_log *r = &log[i];
        const bool whole = completed(r);
        json_t *entry[LISTS] = {
            [IN] = json_integer(r->n_prompt),
            [OUT] = json_integer(whole ? r->n_output : 0),
            [TTFT] = json_real(whole ? ttft_dispatch_of(r) : 0),
            [ITL] = gaps_of(r),
            [LATENCY] = json_real(whole ? e2e_dispatch_of(r) : 0),
            [START] = json_real(S(r->dispatch_ns)),
            [ERROR] = error_of(r),
            [ARRIVAL] = json_real(S(r->arrival_ns)),
        };
        for (int32_t k = 0; k < LISTS; k++)
            done = json_array_append_new(list[k], entry[k]) == 0 && done;
    }
    return done ? ST_OK : FAIL(ST_NOMEM, "requests as JSON");
}
