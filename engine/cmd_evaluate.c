/* cmd_evaluate.c - `amalgam eval`: perplexity of a text under one precision or several, and
 * agreement with 16 bit. */
#include "cli.h"
#include "evaluate.h"
#include "json.h"

#include <string.h>

typedef struct {
    engine_options options; /* but for the precision */
    ids tokens;
    const char *path; /* of the text */
    size_t n_bytes;
    int32_t window, stride;
    engine *reference; /* that `against` names, in 16 bit; or NULL */
    const char *against;
    bool json, table; /* a line each: of several precisions */
} evaluation;

static status print_agreement(const evaluation *v, const char *name, const agreement_result *r) {
    if (v->json)
        return json_put(json_pack(
            "{s:s, s:s, s:s, s:I, s:f, s:f, s:f, s:f, s:f}", "model", v->options.model, "precision",
            name, "reference", v->against, "positions", (json_int_t)r->n, "greedy_agreement",
            r->agreement, "kl_nats", r->kl_nats, "kl_nats_max", r->kl_nats_max, "perplexity",
            r->perplexity, "reference_perplexity", r->reference_perplexity));
    if (v->table)
        printf("%-20s %10.4f %10.4f %10.5f %11.3f\n", name, r->perplexity, r->agreement, r->kl_nats,
               r->kl_nats_max);
    else
        printf("greedy agreement %.4f, KL divergence %.5f nats (largest %.3f) over %lld tokens; "
               "perplexity %.4f, in 16 bit %.4f\n",
               r->agreement, r->kl_nats, r->kl_nats_max, (long long)r->n, r->perplexity,
               r->reference_perplexity);
    return ST_OK;
}

static status print_perplexity(const evaluation *v, const char *name, const perplexity_result *r) {
    if (v->json)
        return json_put(
            json_pack("{s:s, s:s, s:s, s:I, s:f, s:f, s:f}", "model", v->options.model, "precision",
                      name, "text", v->path, "scored_tokens", (json_int_t)r->n_scored, "nll_nats",
                      r->nll, "perplexity", r->perplexity, "bits_per_byte",
                      r->nll / 0.6931471805599453 * (double)r->n_scored / (double)v->n_bytes));
    if (v->table)
        printf("%-20s %10.4f %10.4f\n", name, r->perplexity, r->nll);
    else
        printf("perplexity %.4f over %lld tokens (%.4f nats a token)\n", r->perplexity,
               (long long)r->n_scored, r->nll);
    return ST_OK;
}

static void print_head(const evaluation *v) {
    if (v->against)
        printf("%-20s %10s %10s %10s %11s\n", "precision", "perplexity", "agreement", "KL (nats)",
               "largest KL");
    else
        printf("%-20s %10s %10s\n", "precision", "perplexity", "nats");
}

/* One precision, in an engine of its own. */
static status evaluate(const evaluation *v, const char *format) {
    engine_options o = v->options;
    char name[PRECISION_NAME_MAX];
    engine *e;
    o.precision = format;
    TRY(engine_open(&e, &o, NULL, NULL));
    precision_name(engine_precision(e), name);
    agreement_result a;
    perplexity_result p;
    const ids *t = &v->tokens;
    status st = v->reference ? evaluate_agreement(e, v->reference, t->data, t->length, v->window,
                                                  v->stride, &a)
                             : evaluate_perplexity(e, t->data, t->length, v->window, v->stride, &p);
    if (st == ST_OK)
        st = v->reference ? print_agreement(v, name, &a) : print_perplexity(v, name, &p);
    engine_close(e);
    return st;
}

/* All of them: one that cannot run is said, and the next one has its turn. The exit status is that
 * of the first that could not. */
static int evaluate_all(evaluation *v, const cli_texts *precisions) {
    int code = 0;
    v->table = precisions->n > 1 && !v->json;
    if (v->table) print_head(v);
    for (int32_t i = 0; i < precisions->n; i++) {
        fflush(stdout);
        status st = evaluate(v, precisions->item[i]);
        if (st != ST_OK && precisions->n > 1) st = fail_prefix(st, "%s", precisions->item[i]);
        const int result = cli_exit(st);
        if (code == 0) code = result;
    }
    return code;
}

static status write_logits(const evaluation *v, const char *format, const char *path) {
    engine_options o = v->options;
    engine *e;
    o.precision = format;
    TRY(engine_open(&e, &o, NULL, NULL));
    const status st =
        evaluate_logits(e, v->tokens.data, (int32_t)i64_min(v->tokens.length, v->window - 1), path);
    engine_close(e);
    return st;
}

/* A text that is shorter than a window is one window: no room is made for more. Then what an engine
 * needs for it; two engines share a device's memory, so no more pages than that. */
static void limit_window(evaluation *v) {
    v->window = (int32_t)i64_max(2, i64_min(v->window, v->tokens.length + 1));
    v->stride = (int32_t)i64_min(v->stride, v->window - 1);
    v->options.policy.token_budget = (int32_t)i64_max(v->window, 64);
    v->options.max_samples = v->window;
    v->options.pages = (int32_t)div_up(v->window, KV_PAGE_TOKENS);
}

/* The text as tokens, and the reference. */
static status open_all(evaluation *v) {
    char dir[1024], beside[1024], *words = NULL;
    tokenizer *t = NULL;
    TRY(model_dir(dir, sizeof dir, v->options.model));
    if (v->against) TRY(model_dir(beside, sizeof beside, v->against));
    TRY(tokenizer_open(&t, dir));
    status st = file_read(&words, &v->n_bytes, v->path);
    if (st == ST_OK)
        st = tokenizer_encode(t, words, v->n_bytes, TOKENIZER_ADD_SPECIAL | TOKENIZER_PARSE_SPECIAL,
                              &v->tokens);
    mem_free(words);
    tokenizer_close(t);
    if (st != ST_OK) return st;
    limit_window(v);
    if (!v->against) return ST_OK;
    engine_options o = v->options;
    o.model = v->against;
    o.precision = "W16A16KV16";
    return engine_open(&v->reference, &o, NULL, NULL);
}

int cmd_evaluate(int argc, char **argv) {
    const char *device_name = "cpu", *family = NULL, *logits = NULL;
    int64_t window = 512, stride = 256, threads = 0, tp = 1;
    cli_texts precisions = {.n = 0};
    evaluation v = {.options = ENGINE_OPTIONS_DEFAULT};
    engine_options *o = &v.options;
    const cli_option options[] = {
        {"--model", CLI_TEXT, &o->model, "DIR", "checkpoint folder"},
        {"--precision", CLI_TEXTS, &precisions, "NAME",
         "auto: weights as stored, A16 KV16; may be repeated: a table"},
        {"--device", CLI_TEXT, &device_name, "NAME", "cpu or cuda (cpu)"},
        {"--text", CLI_TEXT, &v.path, "FILE", "what to score"},
        {"--against", CLI_TEXT, &v.against, "DIR",
         "16-bit checkpoint: print greedy agreement and KL divergence"},
        {"--logits", CLI_TEXT, &logits, "FILE",
         "write input_ids and logits of the first window there (safetensors)"},
        {"--window", CLI_INT, &window, "N", "tokens of a window (512)"},
        {"--stride", CLI_INT, &stride, "N", "from window to window (256)"},
        {"--threads", CLI_INT, &threads, "N", "0 = all cores"},
        {"--tp", CLI_INT, &tp, "N", "GPUs to run on together (1)"},
        {"--kernel-family", CLI_TEXT, &family, "F", "cuda: ampere or hopper"},
        {"--json", CLI_FLAG, &v.json, NULL, "an object for each precision"},
        {NULL, CLI_FLAG, NULL, NULL, NULL},
    };
    int32_t n_args = 0;
    status st = cli_parse(argc - 1, argv + 1, "eval --model DIR --text FILE [options]", options,
                          NULL, &n_args);
    if (st == ST_OK && (!o->model || !v.path)) st = FAIL(ST_USAGE, "eval needs --model and --text");
    if (st == ST_OK && (window < 2 || window > 1 << 20 || stride < 1 || stride >= window))
        st = FAIL(ST_USAGE, "--window must be 2 to %d and --stride below it", 1 << 20);
    if (st == ST_OK && logits && (v.against || v.json || precisions.n > 1))
        st = FAIL(ST_USAGE, "--logits writes a file alone: of one --precision, without --against "
                            "and --json");
    const cli_range limits[] = {{"--threads", threads, 0, 1024}, {"--tp", tp, 1, 64}};
    if (st == ST_OK) st = cli_check(limits, COUNT_OF(limits));
    if (st == ST_OK) st = device_computes(device_name);
    if (st == ST_OK) st = device_family(&o->device_options.kernel_family, family);
    if (st != ST_OK) return cli_exit(st);
    if (precisions.n == 0) precisions = (cli_texts){.item = {"auto"}, .n = 1};
    v.window = (int32_t)window;
    v.stride = (int32_t)stride;
    o->device = device_name;
    o->device_options.threads = (int32_t)threads;
    o->device_options.tp = (int32_t)tp;
    o->policy.max_seqs = 1;
    st = open_all(&v);
    if (st == ST_OK && logits) st = write_logits(&v, precisions.item[0], logits);
    const int code = st != ST_OK || logits ? cli_exit(st) : evaluate_all(&v, &precisions);
    engine_close(v.reference);
    ids_free(&v.tokens);
    return code;
}
