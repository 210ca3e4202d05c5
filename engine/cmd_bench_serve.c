/* cmd_bench_serve.c - `amalgam bench serve --url …`: a workload against a server, and its
 * figures. */
#include "cli.h"
#include "json.h"
#include "load.h"
#include "metrics.h"

#include <math.h>
#include <signal.h>
#include <string.h>
#include <time.h>

typedef struct {
    const char *url, *path, *model, *api_key, *workload, *format, *rate, *tokenizer, *result,
        *label, *backend;
    int64_t n, concurrency, users, seed, vocab, prompt, output;
    double burstiness, timeout_s, temperature, speed;
    bool json, natural_end, salted, trace_times, detailed;
    cli_texts goodput;
} arguments;

static length_law fixed(int64_t n) {
    return (length_law){.kind = LENGTH_FIXED, .a = (double)n, .min = (int32_t)n, .max = (int32_t)n};
}

static status encode(void *with, const char *s, size_t n, int32_t *id, int32_t max,
                     int32_t *n_ids) {
    ids list = {0};
    const status st = tokenizer_encode(with, s, n, 0, &list);
    *n_ids = (int32_t)i64_min(list.length, max);
    if (st == ST_OK && *n_ids > 0) memcpy(id, list.data, (size_t)*n_ids * sizeof *id);
    ids_free(&list);
    return st;
}

/* A preset by name, else a file. */
static status make_options(const arguments *a, tokenizer *tok, int32_t vocab, workload_options *w) {
    const bool file = strpbrk(a->workload, "./") != NULL;
    TRY(workload_preset(w, file ? "fixed" : a->workload));
    if (file) {
        if (!a->format)
            return FAIL(ST_USAGE, "--format sharegpt|burstgpt|azure|mooncake|jsonl says what %s is",
                        a->workload);
        snprintf(w->file, sizeof w->file, "%s", a->workload);
        snprintf(w->format, sizeof w->format, "%s", a->format);
        if (tok) w->encoder = (text_encoder){.encode = encode, .user = tok};
    }
    w->n_requests = (int32_t)a->n;
    if (a->prompt > 0) w->prompt = fixed(a->prompt);
    if (a->output > 0) w->output = fixed(a->output);
    w->seed = (uint64_t)a->seed;
    w->vocab = vocab;
    w->salted = a->salted;
    w->ignore_eos = !a->natural_end;
    w->sampling.temperature = (float)a->temperature;
    w->burstiness = a->burstiness;
    w->speed = a->speed;
    if (a->users > 0) {
        w->arrival = ARRIVE_CLOSED;
        w->users = (int32_t)a->users;
    } else if (a->trace_times) {
        w->arrival = ARRIVE_TRACE;
    } else if (strcmp(a->rate, "inf") == 0) {
        w->arrival = ARRIVE_AT_ONCE;
    } else {
        if (!parse_f64(a->rate, 1e-6, 1e9, &w->rate_per_s))
            return FAIL(ST_USAGE, "--rate '%s' is neither requests per second nor inf", a->rate);
        w->arrival = isinf(a->burstiness) ? ARRIVE_CONSTANT
                     : a->burstiness == 1 ? ARRIVE_POISSON
                                          : ARRIVE_GAMMA;
        if (isinf(a->burstiness)) w->burstiness = 1;
    }
    return ST_OK;
}

/* "ttft:200", in ms; of a name that comes twice the last one counts. */
static status read_limits(metric_limits *out, const cli_texts *said) {
    *out = (metric_limits){0};
    const struct {
        const char *name;
        double *limit_s;
    } known[] = {{"ttft:", &out->ttft_s},
                 {"tpot:", &out->tpot_s},
                 {"e2e:", &out->e2e_s},
                 {"e2el:", &out->e2e_s}}; /* as vLLM calls it */
    for (int32_t i = 0; i < said->n; i++) {
        double ms = 0;
        for (int32_t k = 0; k < COUNT_OF(known); k++) {
            const size_t n = strlen(known[k].name);
            if (strncmp(said->item[i], known[k].name, n) == 0 &&
                parse_f64(said->item[i] + n, 1e-3, 1e9, &ms))
                *known[k].limit_s = ms * 1e-3;
        }
        if (!(ms > 0))
            return FAIL(ST_USAGE, "--goodput '%s' is none of ttft:MS, tpot:MS, e2e:MS",
                        said->item[i]);
    }
    return ST_OK;
}

/* vLLM's flat object: identity first, then totals and statistics. */
static status save(const arguments *a, const load_report *r, const request_log *log,
                   const metrics *m) {
    char date[32];
    const time_t now = time(NULL);
    struct tm utc;
    gmtime_r(&now, &utc);
    strftime(date, sizeof date, "%Y%m%d-%H%M%S", &utc);
    double rate;
    const bool number = parse_f64(a->rate, 0, 1e12, &rate);
    json_t *o =
        json_pack("{s:s, s:s, s:s, s:s?, s:s, s:s, s:i, s:o, s:f, s:o}", "date", date,
                  "endpoint_type", a->backend, "backend", a->backend, "label", a->label, "model_id",
                  r->model, "tokenizer_id", a->tokenizer ? a->tokenizer : r->model, "num_prompts",
                  r->n_logged, "request_rate", number ? json_real(rate) : json_string("inf"),
                  "burstiness", isinf(a->burstiness) ? 1e9 : a->burstiness, "max_concurrency",
                  a->concurrency > 0 ? json_integer(a->concurrency) : json_null());
    json_t *ours = json_pack("{s:f, s:f, s:b, s:b}", "rtfx", 0.0 /* audio models only */,
                             "amalgam_lag_p99_ms", r->lag_p99_s * 1e3, "amalgam_valid", r->valid,
                             "amalgam_interrupted", r->interrupted);
    status st = o ? metrics_json_vllm(m, o) : FAIL(ST_NOMEM, "result");
    if (st == ST_OK && a->detailed) st = metrics_json_requests(log, r->n_logged, o);
    if (st == ST_OK && json_object_update(o, ours) != 0) st = FAIL(ST_NOMEM, "result");
    json_decref(ours);
    char *line = st == ST_OK ? json_line(o) : NULL;
    if (st == ST_OK && !line) st = FAIL(ST_NOMEM, "result");
    if (st == ST_OK) st = file_write(a->result, line, strlen(line));
    mem_free(line);
    json_decref(o);
    return st;
}

static status print_json(const load_report *r, const metrics *m) {
    json_t *o =
        json_pack("{s:s, s:s, s:b, s:b, s:f, s:f, s:I, s:I}", "kind", "serve", "model", r->model,
                  "valid", r->valid, "interrupted", r->interrupted, "own_lag_p99_ms",
                  r->lag_p99_s * 1e3, "own_lag_max_ms", r->lag_max_s * 1e3, "n_failed",
                  (json_int_t)r->n_failed, "n_events", (json_int_t)r->n_events);
    status st = o ? metrics_json(m, o) : FAIL(ST_NOMEM, "result");
    char *line = st == ST_OK ? json_line(o) : NULL;
    if (line) puts(line);
    mem_free(line);
    json_decref(o);
    return st;
}

static void print_row(const char *name, const metric_summary *s) {
    printf("  %-22s %9.3f %9.3f %9.3f %9.3f\n", name, s->mean * 1e3, s->p50 * 1e3, s->p90 * 1e3,
           s->p99 * 1e3);
}

static void print_text(const load_report *r, const metrics *m, int32_t n) {
    if (r->interrupted)
        printf("interrupted: %d of %d requests were sent, %lld of them given up in flight\n",
               r->n_logged, n, (long long)m->n_cancelled);
    printf("%s: %lld completed, %lld failed in %.2f s%s%s\n", r->model, (long long)m->n_completed,
           (long long)r->n_failed, m->duration_s, r->n_failed ? "; first failure: " : "",
           r->failure);
    if (m->n_completed == 0) return; /* there is nothing to take a mean of */
    printf("  %.3f requests/s, %.1f output tokens/s, %.1f tokens/s in all\n", m->requests_per_s,
           m->output_tokens_per_s, m->total_tokens_per_s);
    printf(
        "  %lld prompt tokens (%lld cached), %lld output tokens, at most %lld requests at a time\n",
        (long long)m->prompt_tokens, (long long)m->cached_tokens, (long long)m->output_tokens,
        (long long)m->max_concurrency);
    if (isfinite(m->goodput_per_s))
        printf("  goodput %.3f requests/s: within the limits given\n", m->goodput_per_s);
    printf("  %-22s %9s %9s %9s %9s\n", "ms", "mean", "p50", "p90", "p99");
    print_row("ttft from arrival", &m->ttft);
    print_row("ttft from dispatch", &m->ttft_dispatch);
    print_row("tpot", &m->tpot);
    print_row("itl", &m->itl);
    print_row("e2e from arrival", &m->e2e);
    printf("  own lag p50 %.3f, p99 %.3f, max %.3f ms: %s\n", r->lag_p50_s * 1e3,
           r->lag_p99_s * 1e3, r->lag_max_s * 1e3,
           r->valid ? "valid" : "INVALID, the load generator was late (1 ms or 1 % of the gap)");
}

static volatile sig_atomic_t stopped_by_user;

/* The next one ends the process. */
static void stop(int number) {
    (void)number;
    stopped_by_user = 1;
}

/* load_run, which SIGINT and SIGTERM end early, unless they are ignored. */
static status run_load(load_report *out, arena *memory, const load_options *o, const workload *w,
                       request_log *log) {
    static const int numbers[] = {SIGINT, SIGTERM};
    struct sigaction before[COUNT_OF(numbers)];
    const struct sigaction once = {.sa_handler = stop, .sa_flags = (int)SA_RESETHAND};
    for (int32_t i = 0; i < COUNT_OF(numbers); i++) {
        (void)sigaction(numbers[i], NULL, &before[i]);
        if (before[i].sa_handler != SIG_IGN) (void)sigaction(numbers[i], &once, NULL);
    }
    const status st = load_run(out, memory, o, w, log);
    for (int32_t i = 0; i < COUNT_OF(numbers); i++) (void)sigaction(numbers[i], &before[i], NULL);
    return st;
}

enum { VALID = 0, FAILED = 1, INTERRUPTED = 130 }; /* exit statuses of a run with figures */

static status measure(const arguments *a, tokenizer **tok, arena *memory, int *code) {
    metric_limits limits;
    TRY(read_limits(&limits, &a->goodput));
    if (a->result) TRY(file_may_write(a->result));
    if (a->tokenizer) TRY(tokenizer_open(tok, a->tokenizer));
    const load_options o = {.url = a->url,
                            .path = a->path,
                            .model = a->model,
                            .api_key = a->api_key,
                            .tok = *tok,
                            .max_concurrency = (int32_t)a->concurrency,
                            .timeout_s = a->timeout_s,
                            .stop = &stopped_by_user};
    char model[LOAD_NAME_MAX];
    int32_t vocab = 0;
    const int32_t known = a->vocab ? (int32_t)a->vocab : *tok ? tokenizer_vocab_size(*tok) : 0;
    if (!a->model || !known) TRY(load_ask_model(model, sizeof model, &vocab, &o));
    if (known) vocab = known;
    if (!vocab) return FAIL(ST_USAGE, "the server does not tell its vocabulary: give --vocab");
    workload_options wo;
    workload w;
    TRY(make_options(a, *tok, vocab, &wo));
    TRY(workload_make(&w, memory, &wo));
    request_log *log = arena_array(memory, request_log, (size_t)w.n + 1);
    if (!log) return FAIL(ST_NOMEM, "log of %d requests", w.n);
    load_report r;
    metrics m;
    TRY(run_load(&r, memory, &o, &w, log));
    TRY(metrics_compute(&m, log, r.n_logged, &limits));
    if (a->json)
        TRY(print_json(&r, &m));
    else
        print_text(&r, &m, w.n);
    *code = r.interrupted ? INTERRUPTED : r.n_failed == 0 && r.valid ? VALID : FAILED;
    return a->result ? save(a, &r, log, &m) : ST_OK;
}

static status check(const arguments *a) {
    const cli_range ranges[] = {{"--n", a->n, 1, 1 << 24},
                                {"--concurrency", a->concurrency, 0, 1 << 20},
                                {"--users", a->users, 0, 1 << 20},
                                {"--vocab", a->vocab, 0, 1 << 24},
                                {"--prompt-tokens", a->prompt, 0, 1 << 24},
                                {"--output-tokens", a->output, 0, 1 << 24}};
    if (!a->url) return FAIL(ST_USAGE, "bench serve needs --url");
    if (a->detailed && !a->result)
        return FAIL(ST_USAGE,
                    "--save-detailed adds to the file of --save-result, which is not given");
    TRY(cli_check(ranges, COUNT_OF(ranges)));
    return a->burstiness > 0 ? ST_OK : FAIL(ST_USAGE, "--burstiness must be positive");
}

int cmd_bench_serve(int argc, char **argv) {
    arguments a = {.workload = "sharegpt",
                   .rate = "inf",
                   .backend = "openai",
                   .n = 1000,
                   .burstiness = 1,
                   .speed = 1,
                   .timeout_s = 0};
    const cli_option options[] = {
        {"--url", CLI_TEXT, &a.url, "URL", "http://127.0.0.1:8000"},
        {"--path", CLI_TEXT, &a.path, "PATH",
         "/v1/completions; /v1/chat/completions sends messages"},
        {"--model", CLI_TEXT, &a.model, "NAME", "the first of /v1/models"},
        {"--api-key", CLI_TEXT, &a.api_key, "KEY", "sent as a bearer token"},
        {"--workload", CLI_TEXT, &a.workload, "W",
         "sharegpt, reasoning, longdoc, fixed, or a file"},
        {"--format", CLI_TEXT, &a.format, "NAME",
         "of a file: sharegpt burstgpt azure mooncake jsonl"},
        {"--n", CLI_INT, &a.n, "N", "requests (1000)"},
        {"--rate", CLI_TEXT, &a.rate, "R", "requests per second; inf = all at once, the default"},
        {"--burstiness", CLI_NUMBER, &a.burstiness, "B", "1 = Poisson; below burstier; inf = even"},
        {"--trace-times", CLI_FLAG, &a.trace_times, NULL, "arrivals of the file"},
        {"--speed", CLI_NUMBER, &a.speed, "X", "the file's clock runs X times as fast (1)"},
        {"--concurrency", CLI_INT, &a.concurrency, "C", "in flight at most"},
        {"--users", CLI_INT, &a.users, "U", "closed loop: each sends when its last one ended"},
        {"--prompt-tokens", CLI_INT, &a.prompt, "N", "length of every prompt"},
        {"--output-tokens", CLI_INT, &a.output, "N", "length of every output"},
        {"--seed", CLI_INT, &a.seed, "N", "of lengths, arrivals and contents (0)"},
        {"--salted", CLI_FLAG, &a.salted, NULL, "no request finds another's prefix in the cache"},
        {"--vocab", CLI_INT, &a.vocab, "N", "ids are drawn below it; asked of the server"},
        {"--tokenizer", CLI_TEXT, &a.tokenizer, "DIR", "send prompts as its text, not as ids"},
        {"--temperature", CLI_NUMBER, &a.temperature, "T", "0"},
        {"--natural-end", CLI_FLAG, &a.natural_end, NULL, "do not send ignore_eos"},
        {"--goodput", CLI_TEXTS, &a.goodput, "NAME:MS",
         "count requests with ttft, tpot or e2e within MS; may be repeated"},
        {"--timeout", CLI_NUMBER, &a.timeout_s, "S", "of a request; 0 = none"},
        {"--backend", CLI_TEXT, &a.backend, "NAME", "what the result file calls the server"},
        {"--label", CLI_TEXT, &a.label, "TEXT", "in the result file"},
        {"--json", CLI_FLAG, &a.json, NULL, "one object"},
        {"--save-result", CLI_TEXT, &a.result, "FILE", "with the keys of vllm bench serve"},
        {"--save-detailed", CLI_FLAG, &a.detailed, NULL,
         "in that file also every request: lengths, instants, gaps between tokens"},
        {NULL, CLI_FLAG, NULL, NULL, NULL},
    };
    int32_t n_args = 0;
    int code = FAILED;
    status st = cli_parse(argc - 1, argv + 1,
                          "bench serve --url URL [options]\n"
                          "ctrl-C ends it with the figures of what had finished, and status 130",
                          options, NULL, &n_args);
    if (st == ST_OK) st = check(&a);
    tokenizer *tok = NULL;
    arena memory = {0};
    if (st == ST_OK) st = arena_open(&memory, (size_t)16 << 30);
    if (st == ST_OK) st = measure(&a, &tok, &memory, &code);
    arena_close(&memory);
    tokenizer_close(tok);
    return st == ST_OK ? code : cli_exit(st);
}
