/* cmd_corpus.c - `amalgam corpus`: text and tasks of the seeded generator. */
#include "cli.h"
#include "corpus.h"
#include "json.h"

typedef struct {
    int64_t seed, bytes, count, digits, pairs, sentences; /* -1: not given */
    const char *kind, *tasks;
} arguments;

/* argv without the command. */
static status parse(int argc, char **argv, arguments *o) {
    *o = (arguments){-1, -1, -1, -1, -1, -1, NULL, NULL};
    const cli_option options[] = {
        {"--bytes", CLI_INT, &o->bytes, "N", "text of that length"},
        {"--kind", CLI_TEXT, &o->kind, "NAME", "only story, arithmetic, recall or chat"},
        {"--tasks", CLI_TEXT, &o->tasks, "NAME", "arithmetic or recall, one object a line"},
        {"--count", CLI_INT, &o->count, "N", "of the tasks"},
        {"--digits", CLI_INT, &o->digits, "N", "of the numbers of arithmetic tasks"},
        {"--pairs", CLI_INT, &o->pairs, "N", "to remember in recall tasks"},
        {"--sentences", CLI_INT, &o->sentences, "N", "between a pair and its question"},
        {"--seed", CLI_INT, &o->seed, "N",
         "0; from 2^40 = 1099511627776 on they are held out from training"},
        {NULL, CLI_FLAG, NULL, NULL, NULL},
    };
    int32_t n = 0;
    TRY(cli_parse(argc, argv, "corpus --bytes N | --tasks NAME --count N [options]", options, NULL,
                  &n));
    const struct {
        const char *name;
        int64_t value;
    } numbers[] = {{"--seed", o->seed},     {"--bytes", o->bytes}, {"--count", o->count},
                   {"--digits", o->digits}, {"--pairs", o->pairs}, {"--sentences", o->sentences}};
    for (int32_t i = 0; i < COUNT_OF(numbers); i++)
        if (numbers[i].value < -1)
            return FAIL(ST_USAGE, "%s %lld is below 0", numbers[i].name,
                        (long long)numbers[i].value);
    if (o->tasks ? o->count < 0 || o->bytes >= 0 || o->kind : o->bytes < 0 || o->count >= 0)
        return FAIL(ST_USAGE, "corpus needs either --bytes or --tasks with --count");
    return ST_OK;
}

static status parse_kind(const char *name, corpus_kind *out) {
    if (corpus_kind_parse(name, out)) return ST_OK;
    return FAIL(ST_USAGE, "no kind of text is called '%s'", name);
}

static status print_text(const arguments *o, uint64_t seed) {
    corpus_kind only = CORPUS_STORY;
    if (o->kind) TRY(parse_kind(o->kind, &only));
    text t = {0};
    status st = corpus_text(&t, o->kind ? &only : NULL, seed, (size_t)o->bytes);
    if (st == ST_OK && fwrite(t.data, 1, t.length, stdout) != t.length) st = stdout_failed();
    text_free(&t);
    return st;
}

static status print_task(const corpus_task *task) {
    return json_put(json_pack("{s:s, s:s}", "prompt", task->prompt, "answer", task->answer));
}

static status print_tasks(const arguments *o, uint64_t seed) {
    corpus_kind kind;
    TRY(parse_kind(o->tasks, &kind));
    corpus_task_options options = corpus_task_defaults();
    if (o->digits >= 0) options.digits = (int32_t)i64_min(o->digits, INT32_MAX);
    if (o->pairs >= 0) options.pairs = (int32_t)i64_min(o->pairs, INT32_MAX);
    if (o->sentences >= 0) options.sentences = (int32_t)i64_min(o->sentences, INT32_MAX);

    arena a;
    TRY(arena_open(&a, 1 << 20)); /* the longest prompt is some 8 KiB */
    status st = ST_OK;
    for (int64_t i = 0; st == ST_OK && i < o->count; i++) {
        corpus_task task;
        st = corpus_task_make(&a, kind, options, seed, i, &task);
        if (st == ST_OK) st = print_task(&task);
        arena_reset(&a, 0);
    }
    arena_close(&a);
    return st;
}

int cmd_corpus(int argc, char **argv) {
    arguments o;
    status st = parse(argc - 1, argv + 1, &o);
    const uint64_t seed = st == ST_OK && o.seed >= 0 ? (uint64_t)o.seed : 0;
    if (st == ST_OK) st = o.tasks ? print_tasks(&o, seed) : print_text(&o, seed);
    return cli_exit(st == ST_UNSUPPORTED ? ST_USAGE : st); /* no task of that kind */
}
