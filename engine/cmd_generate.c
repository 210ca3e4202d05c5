/* cmd_generate.c - `amalgam generate`: text from a prompt, on any device. */
#include "cmd_sampling.h"
#include "engine.h"
#include "json.h"
#include "output.h"

#include <string.h>

typedef struct {
    output *out;
    bool stream;
    status st;
} printer;

static bool on_token(void *user, int64_t id, const sampled *s, bool ends, int64_t now_ns) {
    (void)id;
    (void)now_ns;
    printer *p = user;
    bool stopped = false;
    if (p->st == ST_OK) p->st = output_push(p->out, s->token, ends, &stopped);
    if (p->stream && p->st == ST_OK) output_print(p->out);
    return stopped || p->st != ST_OK || ferror(stdout);
}

typedef struct {
    const char *model, *precision, *device, *family, *prompt, *file;
    cmd_sampling draws;
    int64_t max_new, min_new, threads, tp;
    bool stream, json, ignore_eos, keep_stop, keep_special;
    cli_texts stop;
} arguments;

/* What a run holds; closed on every way out. */
typedef struct {
    engine *engine;
    tokenizer *tokenizer;
    ids prompt;
    char *file; /* of --prompt-file */
    output out;
    request_log log;
} generation;

static void generation_close(generation *g) {
    output_close(&g->out);
    engine_close(g->engine);
    tokenizer_close(g->tokenizer);
    ids_free(&g->prompt);
    mem_free(g->file);
}

static sampling sampling_of(const arguments *a) {
    sampling s = cmd_sampling_of(&a->draws);
    s.min_tokens = (int32_t)a->min_new;
    return s;
}

/* All that can be said before a file is read. */
static status check(arguments *a) {
    const cli_range ranges[] = {{"--max-tokens", a->max_new, 1, 1 << 24},
                                {"--min-tokens", a->min_new, 0, a->max_new},
                                {"--threads", a->threads, 0, 1024},
                                {"--tp", a->tp, 1, 64}};
    if (!a->model) return FAIL(ST_USAGE, "generate needs --model");
    if (!a->prompt == !a->file)
        return FAIL(ST_USAGE, "generate needs --prompt or --prompt-file%s",
                    a->prompt ? ", not both" : "");
    TRY(cli_check(ranges, COUNT_OF(ranges)));
    for (int32_t i = 0; i < a->stop.n; i++)
        if (!a->stop.item[i][0]) return FAIL(ST_USAGE, "--stop: an empty string ends nothing");
    return cmd_sampling_check(&a->draws);
}

static status generation_open(generation *g, const arguments *a) {
    TRY(device_computes(a->device));
    engine_options o = ENGINE_OPTIONS_DEFAULT;
    o.model = a->model;
    o.precision = a->precision;
    o.device = a->device;
    o.device_options.threads = (int32_t)a->threads;
    o.device_options.tp = (int32_t)a->tp;
    TRY(device_family(&o.device_options.kernel_family, a->family));
    o.policy.max_seqs = 1;
    o.policy.token_budget = 1024;
    o.max_requests = 1;
    char dir[1024];
    TRY(model_dir(dir, sizeof dir, a->model));
    TRY(tokenizer_open(&g->tokenizer, dir));
    const char *words = a->prompt;
    size_t n_words = words ? strlen(words) : 0;
    if (a->file) {
        TRY(file_read(&g->file, &n_words, a->file));
        words = g->file;
    }
    TRY(tokenizer_encode(g->tokenizer, words, n_words,
                         TOKENIZER_ADD_SPECIAL | TOKENIZER_PARSE_SPECIAL, &g->prompt));
    if (g->prompt.length == 0) return FAIL(ST_USAGE, "the prompt is empty");
    TRY(engine_open(&g->engine, &o, NULL, NULL));
    const int32_t ctx_max = engine_ctx_max(g->engine);
    if (g->prompt.length >= ctx_max)
        return FAIL(ST_RANGE, "the prompt has %lld tokens, the model takes %d",
                    (long long)g->prompt.length, ctx_max);
    output_open(&g->out, g->tokenizer,
                &(output_options){.stop = a->stop.item,
                                  .n_stops = a->stop.n,
                                  .min_tokens = (int32_t)a->min_new,
                                  .keep_stop = a->keep_stop,
                                  .keep_special = a->keep_special,
                                  .continues = true});
    return ST_OK;
}

/* Submit and step until it has finished; streamed text goes out on the way. */
static status answer(generation *g, const arguments *a) {
    int32_t n_eos;
    const int32_t *eos = tokenizer_eos(g->tokenizer, &n_eos);
    const int64_t room = engine_ctx_max(g->engine) - g->prompt.length;
    const request r = {.prompt = g->prompt.data,
                       .n_prompt = (int32_t)g->prompt.length,
                       .max_new = (int32_t)i64_min(a->max_new, room),
                       .ignore_eos = a->ignore_eos,
                       .stop_token = a->ignore_eos ? NULL : eos,
                       .n_stop_tokens = a->ignore_eos ? 0 : n_eos,
                       .sampling = sampling_of(a),
                       .user = -1};
    printer p = {.out = &g->out, .stream = a->stream && !a->json};
    engine_set_hooks(g->engine, &(engine_hooks){.user = &p, .token = on_token});
    TRY(engine_answer(g->engine, &r, &g->log));
    TRY(p.st);
    return output_finish(&g->out);
}

static status print_json(const generation *g) {
    const request_log *log = &g->log;
    const double seconds = (double)(log->finish_ns - log->first_token_ns) * 1e-9;
    return json_put(
        json_pack("{s:s%, s:s, s:i, s:i, s:f, s:f}", "text",
                  g->out.text.data ? g->out.text.data : "", g->out.text.length, "finish",
                  finish_text(log->finish), "prompt_tokens", log->n_prompt, "output_tokens",
                  log->n_output, "ttft_ms", (double)(log->first_token_ns - log->dispatch_ns) * 1e-6,
                  "decode_tokens_per_s", seconds > 0 ? (log->n_output - 1) / seconds : 0.0));
}

int cmd_generate(int argc, char **argv) {
    arguments a = {.precision = "auto",
                   .device = "cpu",
                   .draws = {.top_p = 1, .repetition = 1},
                   .max_new = 128,
                   .tp = 1};
    const cli_option options[] = {
        {"--model", CLI_TEXT, &a.model, "DIR",
         "checkpoint folder (config.json, *.safetensors, tokenizer.json)"},
        {"--precision", CLI_TEXT, &a.precision, "NAME",
         "auto: weights as stored, A16 KV16; see `amalgam formats`"},
        {"--device", CLI_TEXT, &a.device, "NAME", "cpu or cuda (cpu)"},
        {"--prompt", CLI_TEXT, &a.prompt, "TEXT", "what to go on from"},
        {"--prompt-file", CLI_TEXT, &a.file, "FILE", "the same from a file"},
        {"--max-tokens", CLI_INT, &a.max_new, "N", "output tokens at most (128)"},
        {"--min-tokens", CLI_INT, &a.min_new, "N", "and at least, before an end or a --stop (0)"},
#include "cmd_sampling.def"
        {"--stop", CLI_TEXTS, &a.stop, "TEXT", "end before this text; may be repeated"},
        {"--include-stop", CLI_FLAG, &a.keep_stop, NULL,
         "end after it; an end token has its text, too"},
        {"--show-special", CLI_FLAG, &a.keep_special, NULL, "special tokens in the text"},
        {"--ignore-eos", CLI_FLAG, &a.ignore_eos, NULL, "go on after an end token"},
        {"--threads", CLI_INT, &a.threads, "N", "0 = all cores"},
        {"--tp", CLI_INT, &a.tp, "N", "GPUs to run on together (1)"},
        {"--kernel-family", CLI_TEXT, &a.family, "F", "cuda: ampere or hopper"},
        {"--stream", CLI_FLAG, &a.stream, NULL, "print as it comes"},
        {"--json", CLI_FLAG, &a.json, NULL, "one object with text, counts and speed"},
        {NULL, CLI_FLAG, NULL, NULL, NULL},
    };
    int32_t n_args = 0;
    status st = cli_parse(argc - 1, argv + 1, "generate --model DIR --prompt TEXT [options]",
                          options, NULL, &n_args);
    if (st == ST_OK) st = check(&a);
    generation g = {0};
    if (st == ST_OK) st = generation_open(&g, &a);
    if (st == ST_OK) st = answer(&g, &a);
    if (st == ST_OK && a.json) {
        st = print_json(&g);
    } else if (st == ST_OK) {
        output_print(&g.out);
        putchar('\n');
    }
    generation_close(&g);
    return cli_exit(st);
}
