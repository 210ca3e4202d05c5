/* cmd_generate.c - `amalgam generate`: text from a prompt, on any device. */
#include "cli.h"
#include "engine.h"
#include "json.h"
#include "output.h"

#include <string.h>

typedef struct {
    output *out;
    bool stream;
    status st;
} printer;

static bool on_token(void *user, int64_t id, const sampled *s, int64_t now_ns) {
    (void)id;
    (void)now_ns;
    printer *p = user;
    bool stopped = false;
    if (p->st == ST_OK) p->st = output_push(p->out, s->token, &stopped);
    if (p->stream && p->st == ST_OK) {
        size_t n;
        const char *bytes = output_take(p->out, &n);
        fwrite(bytes, 1, n, stdout);
        fflush(stdout);
    }
    return stopped || p->st != ST_OK;
}

typedef struct {
    const char *model, *precision, *device, *prompt, *file;
    double temperature, top_p, min_p, penalty;
    int64_t max_new, top_k, seed, threads;
    bool stream, json, ignore_eos, synthetic;
    cli_texts stop;
} arguments;

static status run(const arguments *a, engine **e, tokenizer **t, ids *prompt, char **file) {
    engine_options o = ENGINE_OPTIONS_DEFAULT;
    o.model = a->model;
    o.precision = a->precision;
    o.device = a->device;
    o.synthetic = a->synthetic;
    o.device_options.threads = (int32_t)a->threads;
    o.policy.max_seqs = 1;
    o.policy.token_budget = 1024;
    o.max_requests = 1;
    char dir[1024];
    TRY(model_dir(dir, sizeof dir, a->model));
    TRY(tokenizer_open(t, dir));
    const char *words = a->prompt;
    size_t n_words = words ? strlen(words) : 0;
    if (a->file) {
        TRY(file_read(file, &n_words, a->file));
        words = *file;
    }
    TRY(tokenizer_encode(*t, words, n_words, TOKENIZER_ADD_SPECIAL | TOKENIZER_PARSE_SPECIAL,
                         prompt));
    if (prompt->length == 0) return FAIL(ST_USAGE, "the prompt is empty");
    TRY(engine_open(e, &o, NULL, NULL));

    for (int32_t i = 0; i < a->stop.n; i++)
        if (!a->stop.item[i][0]) return FAIL(ST_USAGE, "--stop: an empty string ends nothing");
    int32_t n_eos;
    const int32_t *eos = tokenizer_eos(*t, &n_eos);
    const request r = {
        .prompt = prompt->data,
        .n_prompt = (int32_t)prompt->length,
        .max_new = (int32_t)i64_min(a->max_new, engine_config(*e)->ctx_max - prompt->length),
        .ignore_eos = a->ignore_eos,
        .stop_token = a->ignore_eos ? NULL : eos,
        .n_stop_tokens = a->ignore_eos ? 0 : n_eos,
        .sampling = {.temperature = (float)a->temperature,
                     .top_k = (int32_t)a->top_k,
                     .top_p = (float)a->top_p,
                     .min_p = (float)a->min_p,
                     .repetition_penalty = (float)a->penalty,
                     .seed = (uint64_t)a->seed,
                     .n_logprobs = -1},
        .user = -1
    };
    if (r.max_new < 1)
        return FAIL(ST_RANGE, "the prompt has %lld tokens, the model takes %d",
                    (long long)prompt->length, engine_config(*e)->ctx_max);

    output out;
    output_open(&out, *t, a->stop.item, a->stop.n);
    printer p = {.out = &out, .stream = a->stream && !a->json};
    engine_set_hooks(*e, &(engine_hooks){.user = &p, .token = on_token});
    status st = engine_submit(*e, &r);
    request_log log = {0};
    const int32_t *tokens = NULL;
    while (st == ST_OK && !sched_take_finished(engine_sched(*e), &log, &tokens)) {
        bool ran;
        st = engine_step(*e, &ran);
    }
    if (st == ST_OK) st = p.st;
    if (st == ST_OK) st = output_finish(&out);
    if (st == ST_OK) {
        size_t n;
        const char *rest = output_take(&out, &n);
        if (a->json) {
            const double seconds = (double)(log.finish_ns - log.first_token_ns) * 1e-9;
            json_t *line = json_pack(
                "{s:s%, s:s, s:i, s:i, s:f, s:f}", "text", out.text.data ? out.text.data : "",
                out.text.length, "finish", finish_text(log.finish), "prompt_tokens", log.n_prompt,
                "output_tokens", log.n_output, "ttft_ms",
                (double)(log.first_token_ns - log.dispatch_ns) * 1e-6, "decode_tokens_per_s",
                seconds > 0 ? (log.n_output - 1) / seconds : 0.0);
            char *printed = line ? json_line(line) : NULL;
            puts(printed ? printed : "{}");
            mem_free(printed);
            json_decref(line);
        } else {
            fwrite(rest, 1, n, stdout);
            putchar('\n');
        }
    }
    output_close(&out);
    return st;
}

int cmd_generate(int argc, char **argv) {
    arguments a = {
        .precision = "W16A16KV16", .device = "cpu", .top_p = 1, .penalty = 1, .max_new = 128};
    const cli_option options[] = {
        {"--model",              CLI_TEXT,   &a.model,       "DIR",
         "checkpoint folder (config.json, *.safetensors, tokenizer.json)"                                    },
        {"--precision",          CLI_TEXT,   &a.precision,   "NAME", "W16A16KV16; see `amalgam formats`"     },
        {"--device",             CLI_TEXT,   &a.device,      "NAME", "cpu"                                   },
        {"--prompt",             CLI_TEXT,   &a.prompt,      "TEXT", "what to go on from"                    },
        {"--prompt-file",        CLI_TEXT,   &a.file,        "FILE", "the same from a file"                  },
        {"--max-tokens",         CLI_INT,    &a.max_new,     "N",    "output tokens at most (128)"           },
        {"--temperature",        CLI_NUMBER, &a.temperature, "T",    "0 = greedy, the default"               },
        {"--top-k",              CLI_INT,    &a.top_k,       "K",    "0 = all"                               },
        {"--top-p",              CLI_NUMBER, &a.top_p,       "P",    "1 = all"                               },
        {"--min-p",              CLI_NUMBER, &a.min_p,       "P",    "0 = all"                               },
        {"--repetition-penalty", CLI_NUMBER, &a.penalty,     "R",    "1 = none"                              },
        {"--seed",               CLI_INT,    &a.seed,        "N",    "of the draws (0)"                      },
        {"--stop",               CLI_TEXTS,  &a.stop,        "TEXT", "end before this text; may be repeated" },
        {"--ignore-eos",         CLI_FLAG,   &a.ignore_eos,  NULL,   "go on after an end token"              },
        {"--threads",            CLI_INT,    &a.threads,     "N",    "0 = all cores"                         },
        {"--stream",             CLI_FLAG,   &a.stream,      NULL,   "print as it comes"                     },
        {"--json",               CLI_FLAG,   &a.json,        NULL,   "one object with text, counts and speed"},
        {NULL,                   CLI_FLAG,   NULL,           NULL,   NULL                                    },
    };
    int32_t n_args = 0;
    status st = cli_parse(argc - 1, argv + 1, "generate --model DIR --prompt TEXT [options]",
                          options, NULL, &n_args);
    if (st == ST_OK && !a.model) st = FAIL(ST_USAGE, "generate needs --model");
    if (st == ST_OK && !a.prompt == !a.file)
        st = FAIL(ST_USAGE, "generate needs --prompt or --prompt-file");
    if (st == ST_OK && (a.max_new < 1 || a.max_new > 1 << 24))
        st = FAIL(ST_USAGE, "--max-tokens %lld is out of range", (long long)a.max_new);
    if (st == ST_OK && (a.top_k < 0 || a.top_k > 1 << 24 || a.threads < 0 || a.threads > 1024))
        st = FAIL(ST_USAGE, "--top-k or --threads is out of range");
    engine *e = NULL;
    tokenizer *t = NULL;
    ids prompt = {0};
    char *file = NULL;
    if (st == ST_OK) st = run(&a, &e, &t, &prompt, &file);
    engine_close(e);
    tokenizer_close(t);
    ids_free(&prompt);
    mem_free(file);
    return cli_exit(st);
}
