/* cmd_corpus.c - `amalgam corpus`: text and tasks of the seeded generator. */
#include "cli.h"
#include "corpus.h"

#include <jansson.h>
#include <string.h>

static const char usage[] =
    "usage: amalgam corpus --bytes N [--seed N] [--kind story|arithmetic|recall|chat]\n"
    "       amalgam corpus --tasks arithmetic|recall --count N [--seed N] [--digits N]\n"
    "                      [--pairs N] [--sentences N]\n"
    "Seeds from 2^40 = 1099511627776 on are held out from training.\n";

typedef struct {
    int64_t seed, bytes, count, digits, pairs, sentences; /* -1: not given */
    const char *kind, *tasks;
} arguments;

static status parse(int argc, char **argv, arguments *o) {
    *o = (arguments){-1, -1, -1, -1, -1, -1, NULL, NULL};
    const struct {
        const char *name;
        int64_t *number;
        const char **word;
    } known[] = {
        {"--seed", &o->seed, NULL},   {"--bytes", &o->bytes, NULL},
        {"--count", &o->count, NULL}, {"--digits", &o->digits, NULL},
        {"--pairs", &o->pairs, NULL}, {"--sentences", &o->sentences, NULL},
        {"--kind", NULL, &o->kind},   {"--tasks", NULL, &o->tasks},
    };
    for (int i = 1; i < argc; i += 2) {
        int32_t k = 0;
        while (k < COUNT_OF(known) && strcmp(argv[i], known[k].name) != 0) k++;
        if (k == COUNT_OF(known)) return FAIL(ST_USAGE, "unknown option %s", argv[i]);
        if (i + 1 == argc) return FAIL(ST_USAGE, "%s needs a value", argv[i]);
        if (known[k].word) {
            *known[k].word = argv[i + 1];
        } else if (!parse_i64(argv[i + 1], 0, INT64_MAX, known[k].number)) {
            return FAIL(ST_USAGE, "%s: '%s' is no whole number >= 0", argv[i], argv[i + 1]);
        }
    }
    if (o->tasks ? o->count < 0 || o->bytes >= 0 || o->kind : o->bytes < 0 || o->count >= 0)
        return FAIL(ST_USAGE, "either --bytes or --tasks with --count");
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
    if (st == ST_OK && fwrite(t.data, 1, t.length, stdout) != t.length)
        st = FAIL(ST_IO, "standard output");
    text_free(&t);
    return st;
}

static status print_task(const corpus_task *task) {
    json_t *o = json_pack("{s:s, s:s}", "prompt", task->prompt, "answer", task->answer);
    char *line = o ? json_dumps(o, JSON_COMPACT) : NULL;
    status st = line ? ST_OK : FAIL(ST_NOMEM, "a task of %zu bytes", task->prompt_bytes);
    if (line && printf("%s\n", line) < 0) st = FAIL(ST_IO, "standard output");
    free(line);
    json_decref(o);
    return st;
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
    status st = parse(argc, argv, &o);
    const uint64_t seed = st == ST_OK && o.seed >= 0 ? (uint64_t)o.seed : 0;
    if (st == ST_OK) st = o.tasks ? print_tasks(&o, seed) : print_text(&o, seed);
    if (st == ST_OK && fflush(stdout) != 0) st = FAIL(ST_IO, "standard output");
    if (st == ST_OK) return 0;
    fprintf(stderr, "amalgam corpus: %s\n", fail_message());
    if (st == ST_USAGE || st == ST_RANGE || st == ST_UNSUPPORTED) {
        fputs(usage, stderr);
        return 2;
    }
    return 1;
}
