/* metrics.h - numbers of a run, as differences of logged instants. Definitions (one request):
 *
 *   ttft   first_token - arrival            (from the scheduled arrival: no coordinated omission)
 *   ttft_dispatch  first_token - dispatch   (what an HTTP client that measures itself would say)
 *   e2e_dispatch   finish - dispatch        (the same)
 *   tpot   (finish - first_token) / (n_output - 1), requests with n_output > 1 only
 *   itl    gaps between successive tokens of a request, all requests pooled
 *   e2e    finish - arrival
 *   queue  admit - arrival
 *   duration  last finish - first arrival
 *   output_tokens_per_s  sum n_output / duration;  total_… counts prompts too;  requests_per_s
 *
 *   steady_output_tokens_per_s  tokens in (t10, t90] / (t90 - t10), t10 and t90 being the instants
 *          of completion number ceil(n / 10) and ceil(9 n / 10); NaN below 10 completions
 *   max_output_tokens_per_s  most tokens in a second, counted from the first arrival in whole
 *                            seconds
 *   max_concurrency  most requests in flight (arrival to finish), departures before arrivals at a
 *                    tie
 *
 * where finish is the instant of the last token. Percentiles interpolate linearly between order
 * statistics (numpy's default, vLLM's choice). p99 from fewer than 662 requests is not defensible
 * at 99 % confidence (MLPerf early stopping), so the count is always reported beside it. Only
 * completed requests (finish reason stop or length) take part: first and last above are over those;
 * refused and cancelled ones are counted; one that did not end counts nowhere. */
#ifndef AMALGAM_METRICS_H
#define AMALGAM_METRICS_H
#include "request.h"
#include <jansson.h>

typedef struct {
    double mean, std, p50, p90, p99, max; /* seconds; NaN when n == 0; std divides by n */
    int64_t n;
} metric_summary;

typedef struct {
    int64_t n_completed, n_refused, n_cancelled, n_preemptions;
    int64_t prompt_tokens, output_tokens, cached_tokens;
    double duration_s, requests_per_s, output_tokens_per_s, total_tokens_per_s;
    metric_summary ttft, ttft_dispatch, tpot, itl, e2e, e2e_dispatch, queue;
    /* Requests within all limits given, per second; NaN without limits. With one output token the
     * tpot is 0. The second counts ttft and e2e from the dispatch. */
    double goodput_per_s, goodput_dispatch_per_s;
    double max_output_tokens_per_s;
    int64_t max_concurrency;
    double steady_output_tokens_per_s; /* between 10 % and 90 % of completions */
    double mean_concurrency;           /* Little: sum of e2e / duration */
    double lag_p99_s; /* dispatch - arrival: how late the load generator itself was */
} metrics;

typedef struct {
    double ttft_s, tpot_s, e2e_s; /* 0 = no limit */
} metric_limits;

/* NOMEM only. n == 0 gives zero counts and NaN summaries. */
status metrics_compute(metrics *out, const request_log *log, int64_t n,
                       const metric_limits *limits);

/* p in [0, 1] of n values, which are put into another order; NaN for n == 0 or when one is NaN. */
double percentile(double *v, int64_t n, double p);

/* Flat keys with units: ttft_p50_ms, ..., output_tokens_per_s; NaN members are left out. */
status metrics_json(const metrics *m, json_t *object);
/* The same run under the exact keys of `vllm bench serve --save-result` (totals and statistics; who
 * and what ran is the caller's to add). Its clock starts at dispatch, and so do these. */
status metrics_json_vllm(const metrics *m, json_t *object);
/* What its --save-detailed adds, all of it but the texts: input_lens, output_lens, ttfts, itls,
 * latencies, start_times, errors, each a list with an entry a request, in seconds from the run's
 * begin or from dispatch; and amalgam_arrivals, when each was scheduled. A request that did not
 * complete has 0 tokens, no gaps and its finish as the error. */
status metrics_json_requests(const request_log *log, int64_t n, json_t *object);
#endif
