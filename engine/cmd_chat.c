/* cmd_chat.c - `amalgam chat`: a conversation in the terminal, streamed, with history. */
#include "chat_template.h"
#include "cmd_sampling.h"
#include "engine.h"
#include "output.h"
#include "sampler.h"

#include <errno.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

typedef struct {
    const char *model, *precision, *device, *system;
    cmd_sampling draws;
    int64_t max_new, threads, tp;
    bool no_thinking;
} arguments;

typedef struct {
    const arguments *a;
    engine *engine;
    tokenizer *tok;
    chat_template *tpl;
    json_t *messages, *variables;
    int64_t n_turns;
    output out; /* of the turn */
    status st;
} talk;

/* ctrl-C ends an answer; once more, or where nothing is answered, the program. */
static volatile sig_atomic_t stopped_by_user;

static void stop_answer(int number) {
    (void)number;
    stopped_by_user = 1;
}

static bool on_token(void *user, int64_t id, const sampled *s, bool ends, int64_t now_ns) {
    (void)id;
    (void)now_ns;
    talk *t = user;
    bool stopped = false;
    if (t->st == ST_OK) t->st = output_push(&t->out, s->token, ends, &stopped);
    output_print(&t->out);
    return stopped || stopped_by_user || t->st != ST_OK || ferror(stdout);
}

static status start(talk *t) {
    const arguments *a = t->a;
    char dir[1024];
    TRY(device_computes(a->device));
    TRY(model_dir(dir, sizeof dir, a->model));
    TRY(tokenizer_open(&t->tok, dir));
    const char *source = tokenizer_chat_template(t->tok, NULL);
    if (!source) return FAIL(ST_NOTFOUND, "%s has no chat template", dir);
    TRY(chat_template_open(&t->tpl, source, strlen(source), "of the model"));
    engine_options o = ENGINE_OPTIONS_DEFAULT;
    o.model = a->model;
    o.precision = a->precision;
    o.device = a->device;
    o.device_options.threads = (int32_t)a->threads;
    o.device_options.tp = (int32_t)a->tp;
    o.policy.max_seqs = 1;
    o.policy.token_budget = 1024;
    o.max_requests = 1;
    TRY(engine_open(&t->engine, &o, NULL, NULL));
    engine_set_hooks(t->engine, &(engine_hooks){.user = t, .token = on_token});
    t->variables = a->no_thinking ? json_pack("{s:b}", "enable_thinking", 0) : json_object();
    return t->variables ? ST_OK : FAIL(ST_NOMEM, "chat");
}

static status add_message(talk *t, const char *role, const char *s, size_t n) {
    json_t *m = json_pack("{s:s, s:s%}", "role", role, "content", s, n);
    if (!m || json_array_append_new(t->messages, m) != 0)
        return FAIL(ST_FORMAT, "that is no UTF-8 text");
    return ST_OK;
}

static status forget(talk *t) {
    json_decref(t->messages);
    t->messages = json_array();
    if (!t->messages) return FAIL(ST_NOMEM, "chat");
    const char *system = t->a->system;
    return system ? add_message(t, "system", system, strlen(system)) : ST_OK;
}

static status encode(const talk *t, ids *prompt) {
    text rendered = {0};
    const chat_template_input in = {.messages = t->messages,
                                    .variables = t->variables,
                                    .add_generation_prompt = true,
                                    .bos = tokenizer_bos_text(t->tok),
                                    .eos = tokenizer_eos_text(t->tok),
                                    .now_s = (int64_t)time(NULL)};
    status st = chat_template_render(t->tpl, &in, &rendered);
    if (st == ST_OK)
        st = tokenizer_encode(t->tok, rendered.data ? rendered.data : "", rendered.length,
                              TOKENIZER_PARSE_SPECIAL, prompt);
    text_free(&rendered);
    return st;
}

static status generate(talk *t, const ids *prompt, request_log *log) {
    const arguments *a = t->a;
    const int64_t room = engine_ctx_max(t->engine) - prompt->length;
    int32_t n_eos;
    const int32_t *eos = tokenizer_eos(t->tok, &n_eos);
    if (room < 1) return FAIL(ST_RANGE, "the conversation is full; /reset begins another");
    cmd_sampling draws = a->draws;
    /* A stream of its own for each answer; after the largest seed comes the least. */
    draws.seed = (int64_t)((uint64_t)draws.seed + (uint64_t)t->n_turns);
    const request r = {.id = t->n_turns++,
                       .prompt = prompt->data,
                       .n_prompt = (int32_t)prompt->length,
                       .max_new = (int32_t)i64_min(a->max_new, room),
                       .stop_token = eos,
                       .n_stop_tokens = n_eos,
                       .sampling = cmd_sampling_of(&draws),
                       .user = -1};
    const struct sigaction on_stop = {.sa_handler = stop_answer,
                                      .sa_flags = SA_RESTART | (int)SA_RESETHAND};
    struct sigaction before;
    stopped_by_user = 0;
    (void)sigaction(SIGINT, &on_stop, &before);
    const status st = engine_answer(t->engine, &r, log);
    (void)sigaction(SIGINT, &before, NULL);
    TRY(st);
    TRY(t->st);
    return output_finish(&t->out);
}

/* The user said something: answer, remember both, tell the speed. A failed turn is forgotten. */
static status turn(talk *t, const char *line, size_t n_line) {
    const size_t before = json_array_size(t->messages);
    ids prompt = {0};
    request_log log = {0};
    t->st = ST_OK;
    output_open(&t->out, t->tok, &(output_options){0});
    status st = add_message(t, "user", line, n_line);
    if (st == ST_OK) st = encode(t, &prompt);
    if (st == ST_OK) st = generate(t, &prompt, &log);
    if (st == ST_OK) {
        output_print(&t->out);
        const double decode_s = (double)(log.finish_ns - log.first_token_ns) * 1e-9;
        printf(
            "\n[%d tokens of prompt, %d cached, first token %.0f ms; %d tokens, %.1f tokens/s]\n",
            log.n_prompt, log.n_cached, (double)(log.first_token_ns - log.dispatch_ns) * 1e-6,
            log.n_output, decode_s > 0 ? (log.n_output - 1) / decode_s : 0.0);
        st = add_message(t, "assistant", t->out.text.data ? t->out.text.data : "",
                         t->out.text.length);
    }
    while (st != ST_OK && json_array_size(t->messages) > before)
        (void)json_array_remove(t->messages, json_array_size(t->messages) - 1);
    output_close(&t->out);
    ids_free(&prompt);
    return st;
}

/* "/word": true when the conversation goes on. */
static bool command(talk *t, const char *line) {
    if (strcmp(line, "/quit") == 0 || strcmp(line, "/exit") == 0) return false;
    if (strcmp(line, "/reset") == 0) {
        (void)forget(t);
        printf("[a new conversation]\n");
    } else if (strcmp(line, "/precision") == 0) {
        const engine_stats *s = engine_statistics(t->engine);
        const capacity *c = engine_capacity(t->engine);
        char format[PRECISION_NAME_MAX];
        precision_name(engine_precision(t->engine), format);
        printf("[%s on %s: weights %.2f GB, %lld KV tokens; %lld tokens in %lld steps so far]\n",
               format, t->a->device, (double)c->weight_bytes * 1e-9, (long long)c->kv_tokens,
               (long long)s->tokens_sampled, (long long)s->n_steps);
    } else {
        printf("[/precision  format and memory   /reset  forget   /quit  leave   ctrl-C  ends an "
               "answer]\n");
    }
    return true;
}

static status converse(talk *t) {
    char *line = NULL;
    size_t size = 0;
    status st = ST_OK;
    const bool terminal = isatty(STDIN_FILENO);
    for (bool on = true; on && st == ST_OK && !ferror(stdout);) {
        if (terminal) printf("> ");
        fflush(stdout);
        ssize_t n = getline(&line, &size, stdin);
        if (n < 0 && ferror(stdin)) st = FAIL(ST_IO, "standard input: %s", strerror(errno));
        if (n < 0) break;
        while (n > 0 && (line[n - 1] == '\n' || line[n - 1] == '\r')) line[--n] = 0;
        if ((size_t)n == strspn(line, " \t")) continue;
        if (line[0] == '/') {
            on = command(t, line);
        } else {
            const status said = turn(t, line, (size_t)n);
            if (said == ST_NOMEM || said == ST_DEVICE)
                st = said;
            else if (said != ST_OK)
                printf("[%s]\n", fail_message());
        }
    }
    free(line);
    return st;
}

int cmd_chat(int argc, char **argv) {
    arguments a = {.precision = "auto",
                   .device = "cpu",
                   .draws = {.top_p = 1, .repetition = 1},
                   .max_new = 512,
                   .tp = 1};
    const cli_option options[] = {
        {"--model", CLI_TEXT, &a.model, "DIR", "checkpoint folder with a chat template"},
        {"--precision", CLI_TEXT, &a.precision, "NAME",
         "auto: weights as stored, A16 KV16; see `amalgam formats`"},
        {"--device", CLI_TEXT, &a.device, "NAME", "cpu or cuda (cpu)"},
        {"--system", CLI_TEXT, &a.system, "TEXT", "system message"},
        {"--no-thinking", CLI_FLAG, &a.no_thinking, NULL,
         "enable_thinking = false for the template"},
        {"--max-tokens", CLI_INT, &a.max_new, "N", "of an answer (512)"},
#include "cmd_sampling.def"
        {"--threads", CLI_INT, &a.threads, "N", "0 = all cores"},
        {"--tp", CLI_INT, &a.tp, "N", "GPUs to run on together (1)"},
        {NULL, CLI_FLAG, NULL, NULL, NULL},
    };
    int32_t n_args = 0;
    status st = cli_parse(argc - 1, argv + 1, "chat --model DIR [options]", options, NULL, &n_args);
    if (st == ST_OK && !a.model) st = FAIL(ST_USAGE, "chat needs --model");
    const cli_range ranges[] = {{"--max-tokens", a.max_new, 1, 1 << 24},
                                {"--threads", a.threads, 0, 1024},
                                {"--tp", a.tp, 1, 64}};
    if (st == ST_OK) st = cli_check(ranges, COUNT_OF(ranges));
    if (st == ST_OK) st = cmd_sampling_check(&a.draws);
    talk t = {.a = &a};
    if (st == ST_OK) st = forget(&t); /* before the weights are read: --system may be no text */
    if (st == ST_OK) st = start(&t);
    if (st == ST_OK) st = converse(&t);
    json_decref(t.messages);
    json_decref(t.variables);
    engine_close(t.engine);
    chat_template_close(t.tpl);
    tokenizer_close(t.tok);
    return cli_exit(st);
}
