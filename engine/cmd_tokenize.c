/* cmd_tokenize.c - see cmd_tokenize.h. */
#include "cli.h"

#include "json.h"
#include "tokenizer.h"

#include <string.h>

static const char usage[] =
    "usage: amalgam tokenize --model DIR (--text TEXT | --file FILE) [--json]\n"
    "                        [--no-bos] [--plain]\n"
    "  --no-bos   leave out what the tokenizer puts around a sequence\n"
    "  --plain    special tokens in the text are ordinary text\n";

typedef struct {
    const char *model, *text, *file;
    bool json;
    uint32_t flags;
} options;

static bool read_options(options *o, int argc, char **argv) {
    o->flags = TOKENIZER_ADD_SPECIAL | TOKENIZER_PARSE_SPECIAL;
    for (int i = 1; i < argc; i++) {
        const char **value = !strcmp(argv[i], "--model")  ? &o->model
                             : !strcmp(argv[i], "--text") ? &o->text
                             : !strcmp(argv[i], "--file") ? &o->file
                                                          : NULL;
        if (value) {
            if (++i == argc) return false;
            *value = argv[i];
        } else if (!strcmp(argv[i], "--json")) {
            o->json = true;
        } else if (!strcmp(argv[i], "--no-bos")) {
            o->flags &= ~(uint32_t)TOKENIZER_ADD_SPECIAL;
        } else if (!strcmp(argv[i], "--plain")) {
            o->flags &= ~(uint32_t)TOKENIZER_PARSE_SPECIAL;
        } else {
            return false;
        }
    }
    return o->model && !o->text != !o->file;
}

static status print_json(const tokenizer *t, const ids *list) {
    json_t *id = json_array(), *pieces = json_array();
    for (int64_t i = 0; i < list->length; i++) {
        json_array_append_new(id, json_integer(list->data[i]));
        json_array_append_new(pieces, json_string(tokenizer_piece(t, list->data[i])));
    }
    json_t *row = json_pack("{s:I, s:o, s:o}", "tokens", (json_int_t)list->length, "ids", id,
                            "pieces", pieces);
    char *line = row ? json_line(row) : NULL;
    json_decref(row);
    if (!line) return FAIL(ST_NOMEM, "%lld tokens as JSON", (long long)list->length);
    puts(line);
    mem_free(line);
    return ST_OK;
}

static status print_lines(const tokenizer *t, const ids *list) {
    for (int64_t i = 0; i < list->length; i++)
        printf("%d\t%s\n", list->data[i], tokenizer_piece(t, list->data[i]));
    return ST_OK;
}

static status tokenize(const options *o) {
    tokenizer *t;
    TRY(tokenizer_open(&t, o->model));
    file_map file = {0};
    ids list = {0};
    status st = o->file ? file_map_open(&file, o->file) : ST_OK;
    if (st == ST_OK) {
        const char *s = o->text ? o->text : file.data ? (const char *)file.data : "";
        st = tokenizer_encode(t, s, o->text ? strlen(o->text) : file.size, o->flags, &list);
    }
    if (st == ST_OK) st = o->json ? print_json(t, &list) : print_lines(t, &list);
    ids_free(&list);
    file_map_close(&file);
    tokenizer_close(t);
    return st;
}

int cmd_tokenize(int argc, char **argv) {
    options o = {0};
    if (!read_options(&o, argc, argv)) {
        fputs(usage, stderr);
        return 2;
    }
    if (tokenize(&o) == ST_OK) return 0;
    fprintf(stderr, "amalgam: %s\n", fail_message());
    return 1;
}
