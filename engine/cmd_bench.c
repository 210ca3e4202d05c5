/* cmd_bench.c - `amalgam bench WHAT`: a table of sub-commands, and the first of them:
 *
 * `bench harness`: what the suite itself costs, on the devices every machine has.
 *
 *   null   our own work per step: scheduler, pool, forward's calls, sampling bookkeeping
 *   sim    1,000 ShareGPT-shaped requests on Llama-3.1-8B, one core
 *   cpu    decode speed of the tiny checkpoint, batch 1 and 8
 *
 * Each prints its figure beside the limit that we hold ourselves to; exit status 1 when one is
 * missed. */
#include "cli.h"
#include "engine.h"
#include "json.h"

#include <string.h>
#include <sys/resource.h>

typedef struct {
    const char *name, *unit;
    double value, limit;
    bool at_least; /* the limit is a floor */
} figure;

static status serve(const engine_options *base, const workload_options *wo, engine_stats *stats,
                    metrics *m, double *wall_s) {
    arena a;
    engine *e = NULL;
    workload w;
    timeline clock;
    timeline_start_real(&clock);
    TRY(arena_open(&a, (size_t)8 << 30));
    status st = workload_make(&w, &a, wo);
    engine_options o = *base;
    if (st == ST_OK) {
        o.max_requests = w.n;
        o.max_tokens = w.prompt_tokens + w.output_tokens;
        st = engine_open(&e, &o, NULL, NULL);
    }
    request_log *log = st == ST_OK ? arena_array(&a, request_log, (size_t)w.n) : NULL;
    if (st == ST_OK && !log) st = FAIL(ST_NOMEM, "log of %d requests", w.n);
    if (st == ST_OK) st = engine_serve(e, &a, &w, log);
    *wall_s = (double)timeline_now_ns(&clock) * 1e-9;
    if (st == ST_OK) st = metrics_compute(m, log, w.n, NULL);
    if (st == ST_OK) *stats = *engine_statistics(e);
    engine_close(e);
    arena_close(&a);
    return st;
}

static double resident_peak_mb(void) {
    struct rusage use;
    getrusage(RUSAGE_SELF, &use);
    return (double)use.ru_maxrss * 1024e-6;
}

static status null_step(figure *f) {
    engine_options o = ENGINE_OPTIONS_DEFAULT;
    o.model = "Llama-3.1-8B";
    o.precision = "W16A16KV16";
    o.device = "null";
    o.ctx_max = 8192;
    o.policy.max_seqs = 64;
    workload_options wo;
    TRY(workload_preset(&wo, "sharegpt"));
    wo.n_requests = 500;
    wo.arrival = ARRIVE_AT_ONCE;
    wo.vocab = 128256;
    engine_stats s;
    metrics m;
    double wall_s;
    TRY(serve(&o, &wo, &s, &m, &wall_s));
    *f = (figure){"null_us_per_step", "us",
                  (double)(s.host_ns + s.forward_ns) / (double)s.n_steps * 1e-3, 5, false};
    return ST_OK;
}

static status sim_run(figure *seconds, figure *memory) {
    engine_options o = ENGINE_OPTIONS_DEFAULT;
    o.model = "Llama-3.1-8B";
    o.precision = "W4A16KV8";
    o.device = "sim";
    o.device_options.gpu = "h200";
    workload_options wo;
    TRY(workload_preset(&wo, "sharegpt"));
    wo.n_requests = 1000;
    wo.arrival = ARRIVE_POISSON;
    wo.rate_per_s = 20;
    wo.vocab = 128256;
    engine_stats s;
    metrics m;
    double wall_s;
    TRY(serve(&o, &wo, &s, &m, &wall_s));
    *seconds = (figure){"sim_1000_requests_s", "s", wall_s, 0.3, false};
    *memory = (figure){"sim_resident_peak_mb", "MB", resident_peak_mb(), 200, false};
    return ST_OK;
}

static status cpu_decode(figure *f, const char *name, int32_t n_seqs, double limit) {
    static char dir[1100];
    engine_options o = ENGINE_OPTIONS_DEFAULT;
    o.model = path_join(dir, sizeof dir, root_dir(), "workloads/tiny");
    o.policy.max_seqs = n_seqs;
    o.policy.token_budget = 512;
    o.ctx_max = 512;
    workload_options wo;
    TRY(workload_preset(&wo, "fixed"));
    wo.n_requests = n_seqs;
    wo.prompt = (length_law){.kind = LENGTH_FIXED, .a = 64, .min = 1, .max = 64};
    wo.output = (length_law){.kind = LENGTH_FIXED, .a = 256, .min = 1, .max = 256};
    wo.arrival = ARRIVE_AT_ONCE;
    wo.ignore_eos = true;
    wo.vocab = 1024;
    engine_stats s;
    metrics m;
    double wall_s;
    TRY(serve(&o, &wo, &s, &m, &wall_s));
    *f = (figure){name, "tokens/s", n_seqs / m.tpot.p50, limit, true};
    return ST_OK;
}

static status harness(bool json, bool *missed) {
    figure f[5];
    TRY(null_step(&f[0]));
    TRY(sim_run(&f[1], &f[2]));
    TRY(cpu_decode(&f[3], "cpu_decode_batch1_tokens_per_s", 1, 100));
    TRY(cpu_decode(&f[4], "cpu_decode_batch8_tokens_per_s", 8, 300));
    *missed = false;
    for (int32_t i = 0; i < COUNT_OF(f); i++) {
        const bool good = f[i].at_least ? f[i].value >= f[i].limit : f[i].value <= f[i].limit;
        if (!good) *missed = true;
        if (json)
            printf("{\"kind\":\"harness\",\"name\":\"%s\",\"value\":%.6g,\"limit\":%.6g,"
                   "\"ok\":%s}\n",
                   f[i].name, f[i].value, f[i].limit, good ? "true" : "false");
        else
            printf("%-34s %10.3f %-9s %s %g: %s\n", f[i].name, f[i].value, f[i].unit,
                   f[i].at_least ? "at least" : "at most", f[i].limit, good ? "ok" : "MISSED");
    }
    return ST_OK;
}

static int bench_harness(int argc, char **argv) {
    bool json = false, missed = false;
    const cli_option options[] = {
        {"--json", CLI_FLAG, &json, NULL, "one object a line"},
        {NULL, CLI_FLAG, NULL, NULL, NULL},
    };
    int32_t n = 0;
    status st = cli_parse(argc - 1, argv + 1, "bench harness [--json]", options, NULL, &n);
    if (st == ST_OK) st = harness(json, &missed);
    return st == ST_OK && missed ? 1 : cli_exit(st);
}

/* bench.def is written by the Makefile: BENCH(name) for each engine/cmd_bench_<name>.c that needs
 * CUDA, where CUDA is built; else NO_BENCH(name). */
static const struct {
    const char *name;
    int (*run)(int argc, char **argv); /* argv[0] is the name; NULL: not in this build */
    const char *help;
} benches[] = {
    {"harness", bench_harness, "our own cost: null, sim and cpu devices"},
    {"load", cmd_bench_load, "bytes a second out of a checkpoint's files, one core"},
    {"serve", cmd_bench_serve, "an OpenAI-compatible server, open loop"},
    {"step", cmd_bench_step, "a decode or prefill step against the roofline: cuda, sim"},
#define BENCH(name)    {#name, bench_##name, "on the GPU: see --help"},
#define NO_BENCH(name) {#name, NULL, "on a GPU: not in this build (make CUDA_ARCH=...)"},
#include "bench.def"
#undef BENCH
#undef NO_BENCH
};

int cmd_bench(int argc, char **argv) {
    for (int32_t i = 0; argc > 1 && i < COUNT_OF(benches); i++) {
        if (strcmp(benches[i].name, argv[1]) != 0) continue;
        if (benches[i].run) return benches[i].run(argc - 1, argv + 1);
        if (argc > 2 && strcmp(argv[2], "--help") == 0)
            return printf("bench %s: %s\n", benches[i].name, benches[i].help) < 0;
        return cli_exit(FAIL(ST_UNSUPPORTED, "bench %s: this build has no CUDA", argv[1]));
    }
    if (argc < 2) return cli_exit(FAIL(ST_USAGE, "bench what? (amalgam bench --help lists them)"));
    if (strcmp(argv[1], "--help") != 0 && strcmp(argv[1], "-h") != 0)
        return cli_exit(FAIL(
            ST_USAGE, "no benchmark '%s': the nearest is '%s' (amalgam bench --help lists them)",
            argv[1],
            nearest_name(argv[1], strlen(argv[1]), &benches->name, sizeof *benches,
                         COUNT_OF(benches))));
    puts("usage: amalgam bench WHAT [options]");
    for (int32_t i = 0; i < COUNT_OF(benches); i++)
        printf("  %-10s %s\n", benches[i].name, benches[i].help);
    return 0;
}
