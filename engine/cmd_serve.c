/* cmd_serve.c - `amalgam serve`: a model behind OpenAI's HTTP interface, until SIGTERM, SIGINT, or
 * SIGHUP of a terminal that closes. */
#include "cli.h"
#include "server.h"

#include <semaphore.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>

typedef struct {
    const char *model, *precision, *device, *gpu, *name, *host, *api_key;
    int64_t port, tp, threads, ctx, pages, max_seqs, token_budget, max_queue, max_n, max_body_mib,
        max_connections, http_threads;
    double request_timeout_s, grace_s, memory_fraction;
    bool synthetic, no_prefix_cache;
} arguments;

enum { SECONDS_MAX = 1000000 };

typedef struct {
    engine *engine;
    tokenizer *tok;
    chat_template *tpl;
    service *service;
    server *server;
    char name[256];
} parts;

static sem_t ended; /* a signal has come that ends the server */

static void on_end(int number) {
    (void)number;
    (void)sem_post(&ended);
}

static void on_signal(int number, void (*handler)(int)) {
    (void)sigaction(number, &(struct sigaction){.sa_handler = handler, .sa_flags = SA_RESTART},
                    NULL);
}

static void end_on_signals(void) {
    struct sigaction hangup;
    on_signal(SIGINT, on_end);
    on_signal(SIGTERM, on_end);
    /* nohup has it ignored: then so it stays. */
    if (sigaction(SIGHUP, NULL, &hangup) == 0 && hangup.sa_handler != SIG_IGN)
        on_signal(SIGHUP, on_end);
}

/* The next one ends all at once, but a terminal that closes may send several. */
static void end_at_once_on_signals(void) {
    on_signal(SIGINT, SIG_DFL);
    on_signal(SIGTERM, SIG_DFL);
    on_signal(SIGHUP, SIG_IGN);
}

static status check(const arguments *a) {
    const cli_range ranges[] = {
        {"--port", a->port, 0, 65535},
        {"--tp", a->tp, 1, 64},
        {"--threads", a->threads, 0, 1024},
        {"--ctx", a->ctx, 0, 1 << 24},
        {"--pages", a->pages, 0, 1 << 24},
        {"--max-seqs", a->max_seqs, 1, 65536},
        {"--token-budget", a->token_budget, 1, 1 << 20},
        {"--max-queue", a->max_queue, 1, 1 << 20},
        {"--max-n", a->max_n, 1, 128},
        {"--max-body-mib", a->max_body_mib, 1, 1024},
        {"--max-connections", a->max_connections, 1, 1 << 20},
        {"--http-threads", a->http_threads, 1, 64},
    };
    if (!a->model) return FAIL(ST_USAGE, "serve needs --model");
    TRY(cli_check(ranges, COUNT_OF(ranges)));
    if (!(a->request_timeout_s > 0 && a->request_timeout_s <= SECONDS_MAX) ||
        !(a->grace_s >= 0 && a->grace_s <= SECONDS_MAX))
        return FAIL(ST_USAGE, "--request-timeout and --grace are seconds, %d at most", SECONDS_MAX);
    if (!(a->memory_fraction >= 0.01 && a->memory_fraction <= 1))
        return FAIL(ST_USAGE, "--memory-fraction is outside 0.01 to 1");
    if (a->name && !a->name[0]) return FAIL(ST_USAGE, "--served-model-name is empty");
    return ST_OK;
}

/* One that is empty comes of a script's mistake, and would open the server to all. */
static status take_key(arguments *a) {
    const char *given = getenv("AMALGAM_API_KEY");
    if (a->api_key && !a->api_key[0]) return FAIL(ST_USAGE, "--api-key is empty");
    if (given && !given[0]) return FAIL(ST_USAGE, "AMALGAM_API_KEY is empty");
    if (a->api_key && given && strcmp(a->api_key, given) != 0)
        return FAIL(ST_USAGE, "--api-key and AMALGAM_API_KEY differ");
    if (!a->api_key) a->api_key = given;
    return ST_OK;
}

/* A folder without tokenizer.json serves token ids; one whose template is beyond us, completions.
 */
static status open_text(parts *p, const char *dir) {
    char path[1200];
    if (!file_exists(path_join(path, sizeof path, dir, "tokenizer.json"))) {
        fprintf(stderr, "amalgam: %s: no tokenizer.json, prompts are token ids\n", dir);
        return ST_OK;
    }
    TRY(tokenizer_open(&p->tok, dir));
    const char *source = tokenizer_chat_template(p->tok, NULL);
    if (!source) return ST_OK;
    if (chat_template_open(&p->tpl, source, strlen(source), "of the model") != ST_OK)
        fprintf(stderr, "amalgam: no chat completions: %s\n", fail_message());
    return ST_OK;
}

/* KV pages when nobody said how many: what fits, but on the cpu device, which has no limit of its
 * own, a GiB, and at least one request of full length. */
static status choose_pages(const arguments *a, const char *dir, int32_t *pages) {
    static model_config c; /* large */
    *pages = (int32_t)a->pages;
    if (a->pages > 0 || strcmp(a->device, "cpu") != 0) return ST_OK;
    TRY(model_config_load(&c, dir));
    const int64_t ctx = a->ctx > 0 ? i64_min(a->ctx, c.ctx_max) : c.ctx_max;
    const int64_t page_bytes = (int64_t)KV_PAGE_TOKENS * 2 * c.n_kv_heads * c.head_dim *
                               c.n_layers * (int64_t)sizeof(float);
    *pages = (int32_t)i64_max(div_up(ctx, KV_PAGE_TOKENS),
                              i64_min(((int64_t)1 << 30) / page_bytes, 16384));
    return ST_OK;
}

/* The last part of the folder's path, also where a shell has completed it with a slash. */
static const char *name_of(const char *model, char name[static 256]) {
    size_t n = strlen(model);
    while (n > 1 && model[n - 1] == '/') n--;
    size_t from = n;
    while (from > 0 && model[from - 1] != '/') from--;
    snprintf(name, 256, "%.*s", (int)(n - from), model + from);
    return name[0] ? name : model;
}

static status start(const arguments *a, parts *p) {
    char dir[1024];
    server_options so = SERVER_OPTIONS_DEFAULT;
    so.host = a->host;
    so.port = (int32_t)a->port;
    so.api_key = a->api_key;
    so.max_body_bytes = a->max_body_mib << 20;
    so.max_connections = (int32_t)a->max_connections;
    so.request_timeout_s = a->request_timeout_s;
    so.threads = (int32_t)a->http_threads;
    TRY(server_check(&so)); /* before the weights are read, which takes minutes */
    TRY(model_dir(dir, sizeof dir, a->model));
    TRY(open_text(p, dir));
    engine_options o = ENGINE_OPTIONS_DEFAULT;
    o.model = a->model;
    o.precision = a->precision;
    o.device = a->device;
    o.synthetic = a->synthetic;
    o.device_options.gpu = a->gpu;
    o.device_options.tp = (int32_t)a->tp;
    o.device_options.threads = (int32_t)a->threads;
    o.memory_fraction = a->memory_fraction;
    o.ctx_max = (int32_t)a->ctx;
    TRY(choose_pages(a, dir, &o.pages));
    o.policy.max_seqs = (int32_t)a->max_seqs;
    o.policy.token_budget = (int32_t)a->token_budget;
    o.policy.max_queue = (int32_t)a->max_queue;
    o.policy.prefix_cache = !a->no_prefix_cache;
    o.max_requests = (int32_t)(a->max_seqs + a->max_queue);
    TRY(engine_open(&p->engine, &o, NULL, NULL));
    TRY(engine_warm(p->engine));
    const model_config *c = engine_config(p->engine);
    TRY(service_open(&p->service, p->engine, p->tok, o.max_requests));

    const api_model m = {.model = a->name ? a->name : name_of(a->model, p->name),
                         .tok = p->tok,
                         .tpl = p->tpl,
                         .bos = tokenizer_bos_text(p->tok),
                         .eos = tokenizer_eos_text(p->tok),
                         .ctx_max = engine_ctx_max(p->engine),
                         .vocab = c->vocab,
                         .n_max = (int32_t)a->max_n,
                         .made_up = !engine_device(p->engine)->ops->has_logits};
    end_on_signals(); /* while the model was loading they did what signals do */
    TRY(server_open(&p->server, &so, p->service, &m));
    const bool bare6 = strchr(a->host, ':') != NULL;
    char format[PRECISION_NAME_MAX];
    precision_name(engine_precision(p->engine), format);
    printf("serving %s as %s on http://%s%s%s:%d\n", m.model, format, bare6 ? "[" : "", a->host,
           bare6 ? "]" : "", server_port(p->server));
    printf("contexts of up to %d tokens, a KV cache of %lld tokens\n", m.ctx_max,
           (long long)engine_capacity(p->engine)->n_pages * KV_PAGE_TOKENS);
    fflush(stdout);
    return ST_OK;
}

static status run(const arguments *a) {
    TRY(check(a));
    /* Every connection is a descriptor. */
    struct rlimit files;
    if (getrlimit(RLIMIT_NOFILE, &files) == 0) {
        files.rlim_cur = files.rlim_max;
        (void)setrlimit(RLIMIT_NOFILE, &files);
    }
    parts p = {0};
    (void)sem_init(&ended, 0, 0);
    const status st = start(a, &p);
    if (st == ST_OK) {
        while (sem_wait(&ended) != 0) {
        }
        fprintf(stderr, "amalgam: shutting down, %d requests in flight; once more to stop now\n",
                service_alive(p.service));
        end_at_once_on_signals();
    }
    server_close(p.server, a->grace_s);
    service_close(p.service);
    engine_close(p.engine);
    chat_template_close(p.tpl);
    tokenizer_close(p.tok);
    return st;
}

int cmd_serve(int argc, char **argv) {
    arguments a = {.precision = "auto",
                   .device = "cpu",
                   .host = "127.0.0.1",
                   .port = 8000,
                   .tp = 1,
                   .max_seqs = 256,
                   .token_budget = 8192,
                   .max_queue = 1024,
                   .max_n = 16,
                   .max_body_mib = 8,
                   .max_connections = 4096,
                   .http_threads = 1,
                   .request_timeout_s = 30,
                   .grace_s = 30,
                   .memory_fraction = ENGINE_OPTIONS_DEFAULT.memory_fraction};
    const cli_option options[] = {
        {"--model", CLI_TEXT, &a.model, "DIR",
         "checkpoint folder, or a name under workloads/models"},
        {"--precision", CLI_TEXT, &a.precision, "NAME",
         "auto: weights as stored, A16 KV16; see `amalgam formats`"},
        {"--device", CLI_TEXT, &a.device, "NAME",
         "cpu or cuda (cpu); sim makes tokens up, at the predicted speed"},
        {"--gpu", CLI_TEXT, &a.gpu, "NAME", "data sheet of the sim device"},
        {"--tp", CLI_INT, &a.tp, "N", "tensor parallelism (1)"},
        {"--synthetic", CLI_FLAG, &a.synthetic, NULL, "seeded random weights"},
        {"--threads", CLI_INT, &a.threads, "N", "of the cpu device; 0 = all cores"},
        {"--host", CLI_TEXT, &a.host, "ADDR", "127.0.0.1; anything else is open to the network"},
        {"--port", CLI_INT, &a.port, "N", "8000; 0 = any free one, printed"},
        {"--api-key", CLI_TEXT, &a.api_key, "KEY",
         "wanted as `Authorization: Bearer KEY`; AMALGAM_API_KEY in the environment hides it"},
        {"--served-model-name", CLI_TEXT, &a.name, "NAME", "the folder's name"},
        {"--ctx", CLI_INT, &a.ctx, "N", "prompt and output of a request at most; 0 = the model's"},
        {"--pages", CLI_INT, &a.pages, "N", "KV pages; 0 = what fits, on cpu 1 GiB"},
        {"--memory-fraction", CLI_NUMBER, &a.memory_fraction, "F",
         "of the GPU's memory for weights, steps and KV pages together (0.9)"},
        {"--max-seqs", CLI_INT, &a.max_seqs, "N", "running sequences (256)"},
        {"--token-budget", CLI_INT, &a.token_budget, "N", "tokens of a step (8192)"},
        {"--no-prefix-cache", CLI_FLAG, &a.no_prefix_cache, NULL, "share nothing between requests"},
        {"--max-queue", CLI_INT, &a.max_queue, "N",
         "waiting sequences; more are answered 429 (1024)"},
        {"--max-n", CLI_INT, &a.max_n, "N", "choices of a request (16)"},
        {"--max-body-mib", CLI_INT, &a.max_body_mib, "N", "size of a request (8)"},
        {"--max-connections", CLI_INT, &a.max_connections, "N", "open connections (4096)"},
        {"--http-threads", CLI_INT, &a.http_threads, "N", "threads that read and write (1)"},
        {"--request-timeout", CLI_NUMBER, &a.request_timeout_s, "S",
         "for a request to arrive (30)"},
        {"--grace", CLI_NUMBER, &a.grace_s, "S", "for running requests at shutdown (30)"},
        {NULL, CLI_FLAG, NULL, NULL, NULL},
    };
    int32_t n_args = 0;
    status st =
        cli_parse(argc - 1, argv + 1, "serve --model DIR [options]", options, NULL, &n_args);
    if (st == ST_OK) st = take_key(&a);
    if (st == ST_OK) st = run(&a);
    return cli_exit(st);
}
