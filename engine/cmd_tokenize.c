/* cmd_tokenize.c - `amalgam tokenize`: the ids of a text. */
#include "cli.h"
#include "json.h"
#include "tokenizer.h"

#include <string.h>

typedef struct {
    const char *model, *text, *file;
    bool json;
    uint32_t flags;
} options;

/* argv without the command. */
static status parse(int argc, char **argv, options *o) {
    bool no_bos = false, plain = false;
    *o = (options){0};
    const cli_option table[] = {
        {"--model", CLI_TEXT, &o->model, "DIR", "folder with tokenizer.json"},
        {"--text", CLI_TEXT, &o->text, "TEXT", "what to encode"},
        {"--file", CLI_TEXT, &o->file, "FILE", "the same from a file"},
        {"--no-bos", CLI_FLAG, &no_bos, NULL,
         "leave out what the tokenizer puts around a sequence"},
        {"--plain", CLI_FLAG, &plain, NULL, "special tokens in the text are ordinary text"},
        {"--json", CLI_FLAG, &o->json, NULL, "one object with counts, ids and pieces"},
        {NULL, CLI_FLAG, NULL, NULL, NULL},
    };
    int32_t n = 0;
    TRY(cli_parse(argc, argv, "tokenize --model DIR --text TEXT [options]", table, NULL, &n));
    if (!o->model) return FAIL(ST_USAGE, "tokenize needs --model");
    if (!o->text == !o->file)
        return FAIL(ST_USAGE, "tokenize needs --text or --file%s", o->text ? ", not both" : "");
    o->flags =
        (no_bos ? 0u : TOKENIZER_ADD_SPECIAL) | (plain ? 0u : (uint32_t)TOKENIZER_PARSE_SPECIAL);
    return ST_OK;
}

static status print_json(const tokenizer *t, const ids *list) {
    json_t *id = json_array(), *pieces = json_array();
    bool whole = true;
    for (int64_t i = 0; i < list->length; i++) {
        whole &= json_array_append_new(id, json_integer(list->data[i])) == 0;
        whole &= json_array_append_new(pieces, json_string(tokenizer_piece(t, list->data[i]))) == 0;
    }
    json_t *all = json_pack("{s:I, s:o, s:o}", "tokens", (json_int_t)list->length, "ids", id,
                            "pieces", pieces);
    if (whole) return json_put(all);
    json_decref(all);
    return FAIL(ST_NOMEM, "%lld tokens", (long long)list->length);
}

static status print_lines(const tokenizer *t, const ids *list) {
    for (int64_t i = 0; i < list->length; i++)
        printf("%d\t%s\n", list->data[i], tokenizer_piece(t, list->data[i]));
    return ST_OK;
}

static status tokenize(const options *o) {
    tokenizer *t;
    TRY(tokenizer_open(&t, o->model));
    char *file = NULL;
    size_t n = o->text ? strlen(o->text) : 0;
    ids list = {0};
    status st = o->file ? file_read(&file, &n, o->file) : ST_OK;
    if (st == ST_OK) st = tokenizer_encode(t, o->text ? o->text : file, n, o->flags, &list);
    if (st == ST_OK) st = o->json ? print_json(t, &list) : print_lines(t, &list);
    ids_free(&list);
    mem_free(file);
    tokenizer_close(t);
    return st;
}

int cmd_tokenize(int argc, char **argv) {
    options o;
    status st = parse(argc - 1, argv + 1, &o);
    if (st == ST_OK) st = tokenize(&o);
    return cli_exit(st);
}
