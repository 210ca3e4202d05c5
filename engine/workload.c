/* workload.c - see workload.h. */
#include "workload.h"

#include "rng.h"
#include <math.h>
#include <string.h>

/* Streams of the seed: changing one property of a workload leaves the others as they were. */
enum { STREAM_LENGTHS = 1, STREAM_ARRIVALS, STREAM_CONTENTS, STREAM_SAMPLING };

enum { REQUESTS_MAX = 1 << 24, LENGTH_MAX = 1 << 24 };

/* --- Presets ---------------------------------------------------------------------------------- */

/* Medians and spreads with their sources: workloads/SOURCES.md. ORDER preset. */
static const struct {
    const char *name;
    length_kind kind;
    double prompt, prompt_sigma; /* median; or the length itself */
    int32_t prompt_min, prompt_max;
    double output, output_sigma;
    int32_t output_min, output_max;
} presets[] = {
    {"sharegpt", LENGTH_LOGNORMAL, 134, 1.15, 4, 1024, 135, 0.95, 4, 1024},
    {"reasoning", LENGTH_LOGNORMAL, 120, 0.60, 16, 2048, 4000, 0.80, 128, 16384},
    {"longdoc", LENGTH_LOGNORMAL, 7059, 0.48, 512, 16384, 208, 0.45, 8, 2048},
    {"fixed", LENGTH_FIXED, 1024, 0, 1, 1024, 128, 0, 1, 128},
};

static length_law preset_law(length_kind kind, double median, double sigma, int32_t min,
                             int32_t max) {
    const double a = kind == LENGTH_LOGNORMAL ? log(median) : median;
    return (length_law){.kind = kind, .a = a, .b = sigma, .min = min, .max = max};
}

status workload_preset(workload_options *out, const char *name) {
    int32_t i = 0;
    while (i < COUNT_OF(presets) && strcmp(presets[i].name, name) != 0) i++;
    if (i == COUNT_OF(presets))
        return FAIL(ST_NOTFOUND, "workload '%s' is none of sharegpt reasoning longdoc fixed", name);
    *out = (workload_options){
        .n_requests = 1000,
        .prompt = preset_law(presets[i].kind, presets[i].prompt, presets[i].prompt_sigma,
                             presets[i].prompt_min, presets[i].prompt_max),
        .output = preset_law(presets[i].kind, presets[i].output, presets[i].output_sigma,
                             presets[i].output_min, presets[i].output_max),
        .arrival = ARRIVE_AT_ONCE,
        .rate_per_s = 1,
        .burstiness = 1,
        .speed = 1,
        .users = 1,
        .n_prefixes = 1,
        .vocab = 32000,
        .sampling = SAMPLING_GREEDY,
        .ignore_eos = true,
    };
    snprintf(out->name, sizeof out->name, "%s", name);
    return ST_OK;
}

/* --- Checks ----------------------------------------------------------------------------------- */

static status check_law(const length_law *l, const char *what) {
    if (l->min < 1 || l->max > LENGTH_MAX || l->min > l->max)
        return FAIL(ST_RANGE, "%s length: min %d and max %d are not in order within 1 to %d", what,
                    l->min, l->max, LENGTH_MAX);
    if (!isfinite(l->a) || !isfinite(l->b))
        return FAIL(ST_RANGE, "%s length: a = %g, b = %g", what, l->a, l->b);
    switch (l->kind) {
    case LENGTH_FIXED: return ST_OK;
    case LENGTH_UNIFORM:
        if (l->a <= l->b && l->a >= 1 && l->b <= LENGTH_MAX) return ST_OK;
        return FAIL(ST_RANGE, "%s length: uniform from %g to %g", what, l->a, l->b);
    case LENGTH_LOGNORMAL:
        if (l->b >= 0 && l->b <= 10) return ST_OK;
        return FAIL(ST_RANGE, "%s length: log-normal sigma %g is outside 0 to 10", what, l->b);
    }
    return FAIL(ST_RANGE, "%s length: kind %d", what, (int)l->kind);
}

static status check_positive(double x, const char *what) {
    if (x > 0 && x <= 1e9) return ST_OK;
    return FAIL(ST_RANGE, "%s = %g is outside 0 (exclusive) to 1e9", what, x);
}

static status check_arrival(const workload_options *o) {
    switch (o->arrival) {
    case ARRIVE_AT_ONCE: return ST_OK;
    case ARRIVE_GAMMA: TRY(check_positive(o->burstiness, "burstiness")); /* fall through */
    case ARRIVE_POISSON:
    case ARRIVE_CONSTANT: return check_positive(o->rate_per_s, "rate_per_s");
    case ARRIVE_TRACE:
        if (!o->file[0]) return FAIL(ST_RANGE, "arrival by trace needs a file");
        return check_positive(o->speed, "speed");
    case ARRIVE_CLOSED:
        if (o->users >= 1 && o->users <= REQUESTS_MAX) return ST_OK;
        return FAIL(ST_RANGE, "users = %d is outside 1 to %d", o->users, REQUESTS_MAX);
    }
    return FAIL(ST_RANGE, "arrival kind %d", (int)o->arrival);
}

static status check_options(const workload_options *o) {
    const bool from_file = o->file[0] != 0;
    if (o->n_requests < (from_file ? 0 : 1) || o->n_requests > REQUESTS_MAX)
        return FAIL(ST_RANGE, "n_requests = %d is outside %d to %d", o->n_requests, !from_file,
                    REQUESTS_MAX);
    if (o->vocab < 1) return FAIL(ST_RANGE, "vocab = %d", o->vocab);
    if (o->ctx_limit < 0) return FAIL(ST_RANGE, "ctx_limit = %d", o->ctx_limit);
    if (o->shared_prefix < 0 || o->shared_prefix > LENGTH_MAX)
        return FAIL(ST_RANGE, "shared_prefix = %d is outside 0 to %d", o->shared_prefix,
                    LENGTH_MAX);
    if (o->shared_prefix > 0 && (o->n_prefixes < 1 || o->n_prefixes > REQUESTS_MAX))
        return FAIL(ST_RANGE, "n_prefixes = %d is outside 1 to %d", o->n_prefixes, REQUESTS_MAX);
    if (!from_file) {
        TRY(check_law(&o->prompt, "prompt"));
        TRY(check_law(&o->output, "output"));
    }
    return check_arrival(o);
}

/* --- Lengths, instants, contents -------------------------------------------------------------- */

static int32_t draw_length(rng *r, const length_law *l) {
    double x = l->a;
    if (l->kind == LENGTH_UNIFORM) x = (double)rng_range(r, (int64_t)ceil(l->a), (int64_t)l->b);
    if (l->kind == LENGTH_LOGNORMAL) x = rng_lognormal(r, l->a, l->b);
    if (!(x > l->min)) return l->min; /* also before the conversion, which huge values do not fit */
    if (x > l->max) return l->max;
    return (int32_t)lround(x);
}

static void make_lengths(request *q, int32_t n, const workload_options *o) {
    rng r;
    rng_seed(&r, o->seed, STREAM_LENGTHS);
    for (int32_t i = 0; i < n; i++) {
        q[i].n_prompt = draw_length(&r, &o->prompt);
        q[i].max_new = draw_length(&r, &o->output);
    }
}

static double draw_gap(rng *r, const workload_options *o) {
    if (o->arrival == ARRIVE_POISSON) return rng_exponential(r, 1);
    if (o->arrival == ARRIVE_GAMMA) return rng_gamma(r, o->burstiness, 1 / o->burstiness);
    return 1;
}

/* Gaps of mean 1, cumulated and stretched so that the last arrival falls on n / rate: the realised
 * rate is exact and no seed is faster than another (vLLM's rule). */
static void make_arrivals(request *q, int32_t n, const workload_options *o) {
    rng r;
    double sum = 0, at = 0;
    rng_seed(&r, o->seed, STREAM_ARRIVALS);
    for (int32_t i = 0; i < n; i++) sum += draw_gap(&r, o);
    const double last = n / o->rate_per_s, scale = sum > 0 ? last / sum : 0;
    rng_seed(&r, o->seed, STREAM_ARRIVALS); /* the same gaps again */
    for (int32_t i = 0; i < n; i++) {
        at += draw_gap(&r, o);
        q[i].arrival_ns = llround(fmin(at * scale, last) * 1e9);
    }
    q[n - 1].arrival_ns = llround(last * 1e9);
}

/* Element i of common text `number`: a function of (seed, number, i), so that equal numbers are
 * equal texts wherever they occur. The bias of the remainder is below vocab / 2^32. */
static void common_tokens(int32_t *out, int64_t n, uint64_t seed, int64_t number, int32_t vocab) {
    const uint64_t key = hash_u64((uint64_t)number, seed ^ 0x636f6d6d6f6e2121u);
    uint32_t word[4];
    for (int64_t i = 0; i < n; i++) {
        if (i % 4 == 0) philox4x32(key, (uint64_t)i / 4, word);
        out[i] = (int32_t)(word[i % 4] % (uint32_t)vocab);
    }
}

/* What a prompt of `length` tokens begins with: the file's ids, its blocks, or one of the prefixes
 * that requests share. Returns how many; the rest is drawn. */
static int32_t begin_prompt(int32_t *ids, int32_t length, const dataset *d, int32_t i,
                            const workload_options *o, rng *r) {
    const dataset_row *row = d->row ? &d->row[i] : NULL;
    int32_t at = 0;
    if (row && row->id_at >= 0) {
        memcpy(ids, d->id + row->id_at, (size_t)length * sizeof *ids);
        return length;
    }
    if (row && row->n_blocks > 0) {
        for (int32_t b = 0; b < row->n_blocks; b++) {
            const int64_t more = i64_min(DATASET_BLOCK_TOKENS, length - at);
            common_tokens(ids + at, more, o->seed, d->block[row->block_at + b], o->vocab);
            at += (int32_t)more;
        }
        return at;
    }
    if (o->shared_prefix <= 0) return 0;
    const int64_t which = (int64_t)rng_below(r, (uint64_t)o->n_prefixes);
    at = (int32_t)i64_min(o->shared_prefix, length);
    common_tokens(ids, at, o->seed, which, o->vocab);
    return at;
}

static void make_contents(request *q, int32_t *ids, const dataset *d, int32_t n,
                          const workload_options *o) {
    rng r;
    rng_seed(&r, o->seed, STREAM_CONTENTS);
    for (int32_t i = 0; i < n; i++) {
        const int32_t length = q[i].n_prompt;
        for (int32_t at = begin_prompt(ids, length, d, i, o, &r); at < length; at++)
            ids[at] = (int32_t)rng_below(&r, (uint64_t)o->vocab);
        q[i].prompt = ids;
        ids += length;
    }
}

static void take_rows(request *q, const dataset *d, int32_t n, const workload_options *o) {
    for (int32_t i = 0; i < n; i++) {
        q[i].n_prompt = d->row[i].n_prompt;
        q[i].max_new = d->row[i].n_output;
        if (o->arrival == ARRIVE_TRACE)
            q[i].arrival_ns = llround((double)d->row[i].at_ns / o->speed);
    }
}

static void make_sampling(request *q, int32_t n, const workload_options *o) {
    rng r;
    rng_seed(&r, o->seed, STREAM_SAMPLING);
    for (int32_t i = 0; i < n; i++) {
        q[i].user = -1;
        q[i].ignore_eos = o->ignore_eos;
        q[i].sampling = o->sampling;
        q[i].sampling.seed = rng_u64(&r);
        q[i].salt = o->salted ? hash_u64((uint64_t)i + 1, o->seed) | 1 : 0;
    }
}

/* Requests 0, 1, 2, ... go to users 0, 1, ..., N - 1, 0, ...; then by user, each in order. */
static void deal_to_users(request *to, const request *from, int32_t n, int32_t users) {
    int32_t at = 0;
    for (int32_t u = 0; u < users; u++) {
        for (int64_t i = u; i < n; i += users) {
            to[at] = from[i];
            to[at].user = u;
            at++;
        }
    }
}

/* --- The whole -------------------------------------------------------------------------------- */

static status fill(workload *w, arena *a, const dataset *d) {
    const workload_options *o = &w->options;
    const int32_t n = w->n;
    request *q = arena_array(a, request, (size_t)n);
    if (!q) return FAIL(ST_NOMEM, "%d requests", n);
    w->request = q;
    if (d->row)
        take_rows(q, d, n, o);
    else
        make_lengths(q, n, o);
    for (int32_t i = 0; i < n; i++) {
        w->prompt_tokens += q[i].n_prompt;
        w->output_tokens += q[i].max_new;
        const int64_t ctx = (int64_t)q[i].n_prompt + q[i].max_new;
        w->ctx_max = (int32_t)i64_max(w->ctx_max, ctx);
    }
    int32_t *ids = arena_array(a, int32_t, (size_t)w->prompt_tokens);
    if (!ids) return FAIL(ST_NOMEM, "%lld prompt tokens", (long long)w->prompt_tokens);
    make_contents(q, ids, d, n, o);
    if (o->arrival == ARRIVE_POISSON || o->arrival == ARRIVE_GAMMA || o->arrival == ARRIVE_CONSTANT)
        make_arrivals(q, n, o);
    make_sampling(q, n, o);
    if (o->arrival == ARRIVE_CLOSED) {
        w->request = arena_array(a, request, (size_t)n);
        if (!w->request) return FAIL(ST_NOMEM, "%d requests", n);
        deal_to_users(w->request, q, n, o->users);
    }
    for (int32_t i = 0; i < n; i++) w->request[i].id = i;
    return ST_OK;
}

static status read_file(dataset *d, const workload_options *o) {
    const dataset_options files = {.format = o->format,
                                   .model = o->model,
                                   .n_max = o->n_requests,
                                   .ctx_limit = o->ctx_limit,
                                   .vocab = o->vocab,
                                   .seed = o->seed,
                                   .encoder = o->encoder};
    TRY(dataset_read(d, o->file, &files));
    status st = ST_OK;
    if (o->arrival == ARRIVE_TRACE && !d->timed)
        st = FAIL(ST_RANGE, "%s: has no time stamps to arrive by", o->file);
    else if (d->n > REQUESTS_MAX)
        st = FAIL(ST_RANGE, "%s: more than %d requests", o->file, REQUESTS_MAX);
    if (st != ST_OK) dataset_free(d);
    return st;
}

status workload_make(workload *out, arena *a, const workload_options *o) {
    *out = (workload){0};
    TRY(check_options(o));
    dataset d = {0};
    if (o->file[0]) TRY(read_file(&d, o));
    workload w = {.options = *o,
                  .n = d.row ? (int32_t)d.n : o->n_requests,
                  .n_dropped = d.n_dropped,
                  .estimated = d.estimated};
    const size_t mark = a->used;
    const status st = fill(&w, a, &d);
    dataset_free(&d);
    if (st != ST_OK) {
        arena_reset(a, mark);
        return st;
    }
    if (w.estimated) {
        const size_t room = sizeof w.options.name - sizeof "_estimated", used = strlen(o->name);
        snprintf(w.options.name, sizeof w.options.name, "%.*s_estimated",
                 (int)(used < room ? used : room), o->name);
    }
    *out = w;
    return ST_OK;
}
