/* cmd_evaluate.c - `amalgam eval`: perplexity of a text under a precision, agreement with 16
 * bit. */
#include "cli.h"
#include "evaluate.h"
#include "json.h"

#include <string.h>

/* Beside the same weights in 16 bit, or those of another folder. */
static status compare(engine *e, const engine_options *o, const char *against, const ids *tokens,
                      int32_t window, int32_t stride, bool json) {
    engine_options ro = *o;
    engine *reference;
    agreement_result r;
    ro.model = against;
    ro.precision = "W16A16KV16";
    TRY(engine_open(&reference, &ro, NULL, NULL));
    status st = evaluate_agreement(e, reference, tokens->data, tokens->length, window, stride, &r);
    engine_close(reference);
    TRY(st);
    char name[PRECISION_NAME_MAX];
    if (json)
        return json_put(json_pack("{s:s, s:s, s:s, s:I, s:f, s:f, s:f, s:f, s:f}", "model",
                                  o->model, "precision", precision_name(engine_precision(e), name),
                                  "reference", against, "positions", (json_int_t)r.n,
                                  "greedy_agreement", r.agreement, "kl_nats", r.kl_nats,
                                  "kl_nats_max", r.kl_nats_max, "perplexity", r.perplexity,
                                  "reference_perplexity", r.reference_perplexity));
    printf("greedy agreement %.4f, KL divergence %.5f nats (largest %.3f) over %lld tokens; "
           "perplexity %.4f, in 16 bit %.4f\n",
           r.agreement, r.kl_nats, r.kl_nats_max, (long long)r.n, r.perplexity,
           r.reference_perplexity);
    return ST_OK;
}

static status run(engine_options *o, const char *path, const char *against, const char *logits,
                  int32_t window, int32_t stride, bool json) {
    char dir[1024], beside[1024], *words = NULL;
    size_t n_words = 0;
    tokenizer *t = NULL;
    engine *e = NULL;
    ids tokens = {0};
    perplexity_result r;
    status st = model_dir(dir, sizeof dir, o->model);
    if (st == ST_OK && against) st = model_dir(beside, sizeof beside, against);
    if (st == ST_OK) st = tokenizer_open(&t, dir);
    if (st == ST_OK) st = file_read(&words, &n_words, path);
    if (st == ST_OK)
        st = tokenizer_encode(t, words, n_words, TOKENIZER_ADD_SPECIAL | TOKENIZER_PARSE_SPECIAL,
                              &tokens);
    if (st == ST_OK) st = engine_open(&e, o, NULL, NULL);
    if (st == ST_OK && logits) {
        st = evaluate_logits(e, tokens.data, (int32_t)i64_min(tokens.length, window - 1), logits);
        goto done;
    }
    if (st == ST_OK && against) {
        st = compare(e, o, against, &tokens, window, stride, json);
        goto done;
    }
    if (st == ST_OK) st = evaluate_perplexity(e, tokens.data, tokens.length, window, stride, &r);
    if (st == ST_OK && json) {
        char name[PRECISION_NAME_MAX];
        json_t *line = json_pack("{s:s, s:s, s:s, s:I, s:f, s:f, s:f}", "model", o->model,
                                 "precision", precision_name(engine_precision(e), name), "text",
                                 path, "scored_tokens", (json_int_t)r.n_scored, "nll_nats", r.nll,
                                 "perplexity", r.perplexity, "bits_per_byte",
                                 r.nll / 0.6931471805599453 * (double)r.n_scored / (double)n_words);
        st = json_put(line);
    } else if (st == ST_OK) {
        printf("perplexity %.4f over %lld tokens (%.4f nats a token)\n", r.perplexity,
               (long long)r.n_scored, r.nll);
    }
done:
    engine_close(e);
    tokenizer_close(t);
    ids_free(&tokens);
    mem_free(words);
    return st;
}

int cmd_evaluate(int argc, char **argv) {
    const char *model = NULL, *format = "auto", *device_name = "cpu", *path = NULL, *against = NULL;
    const char *family = NULL, *logits = NULL;
    int64_t window = 512, stride = 256, threads = 0;
    bool json = false;
    const cli_option options[] = {
        {"--model", CLI_TEXT, &model, "DIR", "checkpoint folder"},
        {"--precision", CLI_TEXT, &format, "NAME", "auto: weights as stored, A16 KV16"},
        {"--device", CLI_TEXT, &device_name, "NAME", "cpu or cuda (cpu)"},
        {"--text", CLI_TEXT, &path, "FILE", "what to score"},
        {"--against", CLI_TEXT, &against, "DIR",
         "16-bit checkpoint: print greedy agreement and KL divergence"},
        {"--logits", CLI_TEXT, &logits, "FILE",
         "write input_ids and logits of the first window there (safetensors)"},
        {"--window", CLI_INT, &window, "N", "tokens of a window (512)"},
        {"--stride", CLI_INT, &stride, "N", "from window to window (256)"},
        {"--threads", CLI_INT, &threads, "N", "0 = all cores"},
        {"--kernel-family", CLI_TEXT, &family, "F", "cuda: ampere or hopper"},
        {"--json", CLI_FLAG, &json, NULL, "one object"},
        {NULL, CLI_FLAG, NULL, NULL, NULL},
    };
    int32_t n_args = 0;
    status st = cli_parse(argc - 1, argv + 1, "eval --model DIR --text FILE [options]", options,
                          NULL, &n_args);
    if (st == ST_OK && (!model || !path)) st = FAIL(ST_USAGE, "eval needs --model and --text");
    if (st == ST_OK && (window < 2 || window > 1 << 20 || stride < 1 || stride >= window))
        st = FAIL(ST_USAGE, "--window must be 2 to %d and --stride below it", 1 << 20);
    if (st == ST_OK && logits && (against || json))
        st = FAIL(ST_USAGE, "--logits writes a file alone: without --against and --json");
    if (st == ST_OK) st = cli_check(&(cli_range){"--threads", threads, 0, 1024}, 1);
    engine_options o = ENGINE_OPTIONS_DEFAULT;
    if (st == ST_OK) st = device_computes(device_name);
    if (st == ST_OK) st = device_family(&o.device_options.kernel_family, family);
    if (st != ST_OK) return cli_exit(st);
    o.model = model;
    o.precision = format;
    o.device = device_name;
    o.device_options.threads = (int32_t)threads;
    o.policy.token_budget = (int32_t)i64_max(window, 64);
    o.policy.max_seqs = 1;
    o.max_samples = (int32_t)window;
    return cli_exit(run(&o, path, against, logits, (int32_t)window, (int32_t)stride, json));
}
