/* tokenizer.c - see tokenizer.h. The parts are in normalize, added, pretokenize, bpe, detokenize;
 * here they are read from the folder and put together. */
#include "tokenizer.h"

#include "added.h"
#include "bpe.h"
#include "normalize.h"
#include "pretokenize.h"
#include "utf8.h"

#include <string.h>

enum { TEMPLATE_IDS_MAX = 16, CHAT_TEMPLATES_MAX = 16 };

struct tokenizer {
    arena memory;
    normalizer normal;
    pretokenizer words;
    bpe model;
    added extra;
    detokenizer decoder;
    int32_t before[TEMPLATE_IDS_MAX], after[TEMPLATE_IDS_MAX]; /* of the post_processor */
    int32_t n_before, n_after;
    bool has_template;
    int32_t bos, eos[TOKENIZER_EOS_MAX], n_eos;
    struct {
        const char *name, *source;
    } chat[CHAT_TEMPLATES_MAX];
    int32_t n_chat;
};

/* --- Reading the post_processor --------------------------------------------------------------- */

static status add_template_ids(int32_t *list, int32_t *n, const json_t *special,
                               const json_t *table) {
    const char *name;
    TRY(json_get_string(special, "id", "post_processor", &name));
    const json_t *all = json_find(json_find(table, name), "ids");
    if (!json_is_array(all))
        return FAIL(ST_FORMAT, "post_processor: special token '%.60s' has no ids", name);
    for (size_t i = 0; i < json_array_size(all); i++) {
        const json_t *id = json_array_get(all, i);
        if (!json_is_integer(id)) return FAIL(ST_FORMAT, "post_processor: an id is no integer");
        if (*n == TEMPLATE_IDS_MAX)
            return FAIL(ST_RANGE, "post_processor: more than %d special tokens", TEMPLATE_IDS_MAX);
        if (json_integer_value(id) < 0 || json_integer_value(id) > INT32_MAX)
            return FAIL(ST_RANGE, "post_processor: id %lld", (long long)json_integer_value(id));
        list[(*n)++] = (int32_t)json_integer_value(id);
    }
    return ST_OK;
}

static status read_template(tokenizer *t, const json_t *spec) {
    const json_t *single = json_find(spec, "single"), *table = json_find(spec, "special_tokens");
    bool seen = false;
    if (t->has_template) return FAIL(ST_UNSUPPORTED, "post_processor with two templates");
    if (!json_is_array(single)) return FAIL(ST_FORMAT, "post_processor: 'single' is no list");
    t->has_template = true;
    for (size_t i = 0; i < json_array_size(single); i++) {
        const json_t *part = json_array_get(single, i);
        const json_t *special = json_find(part, "SpecialToken");
        if (special) {
            TRY(add_template_ids(seen ? t->after : t->before, seen ? &t->n_after : &t->n_before,
                                 special, table));
        } else if (json_find(part, "Sequence") && !seen) {
            seen = true;
        } else {
            return FAIL(ST_FORMAT, "post_processor: 'single' part %zu is not understood", i);
        }
    }
    return seen ? ST_OK : FAIL(ST_FORMAT, "post_processor: 'single' without the sequence");
}

static status read_post_processor(tokenizer *t, const json_t *spec, int32_t depth) {
    const char *type;
    if (!spec) return ST_OK;
    TRY(json_get_string(spec, "type", "post_processor", &type));
    if (!strcmp(type, "ByteLevel")) return ST_OK; /* moves offsets, which we do not have */
    if (!strcmp(type, "TemplateProcessing")) return read_template(t, spec);
    if (strcmp(type, "Sequence") != 0)
        return FAIL(ST_UNSUPPORTED, "post_processor '%s' is not supported", type);
    const json_t *list = json_find(spec, "processors");
    if (!json_is_array(list)) return FAIL(ST_FORMAT, "post_processor: Sequence without a list");
    if (depth >= 8) return FAIL(ST_RANGE, "post_processor: nested too deeply");
    for (size_t i = 0; i < json_array_size(list); i++)
        TRY(read_post_processor(t, json_array_get(list, i), depth + 1));
    return ST_OK;
}

static status check_template_ids(const tokenizer *t) {
    for (int32_t i = 0; i < t->n_before + t->n_after; i++) {
        const int32_t id = i < t->n_before ? t->before[i] : t->after[i - t->n_before];
        if (!tokenizer_piece(t, id))
            return FAIL(ST_FORMAT, "post_processor: no token has id %d", id);
    }
    return ST_OK;
}

/* --- Reading tokenizer.json ------------------------------------------------------------------- */

static status read_pipeline(tokenizer *t, const json_t *root) {
    if (!json_is_object(root)) return FAIL(ST_FORMAT, "not a JSON object");
    const json_t *list = json_find(root, "added_tokens");
    int32_t n_ids;
    TRY(added_count_ids(list, &n_ids));
    TRY(normalizer_open(&t->normal, json_find(root, "normalizer"), &t->memory));
    TRY(pretokenizer_open(&t->words, json_find(root, "pre_tokenizer")));
    TRY(bpe_open(&t->model, json_find(root, "model"), n_ids, &t->memory));
    TRY(added_open(&t->extra, list, &t->normal, &t->model, &t->memory));
    TRY(detokenizer_open(&t->decoder, json_find(root, "decoder"), &t->memory));
    TRY(read_post_processor(t, json_find(root, "post_processor"), 0));
    return check_template_ids(t);
}

/* Tables take at most 144 bytes per token or merge, each of which takes 6 bytes of JSON or more. */
static status read_tokenizer(tokenizer *t, const char *path) {
    file_map file;
    TRY(file_map_open(&file, path));
    json_t *root = NULL;
    status st = arena_open(&t->memory, 24 * file.size + ((size_t)64 << 20));
    if (st == ST_OK) st = json_parse(&root, (const char *)file.data, file.size, path);
    file_map_close(&file);
    TRY(st);
    st = fail_prefix(read_pipeline(t, root), "%s", path);
    json_decref(root);
    return st;
}

/* --- Reading the files beside it -------------------------------------------------------------- */

static void add_eos(tokenizer *t, int64_t id) {
    if (id < 0 || id > INT32_MAX || t->n_eos == TOKENIZER_EOS_MAX ||
        tokenizer_is_eos(t, (int32_t)id))
        return;
    t->eos[t->n_eos++] = (int32_t)id;
}

/* "bos_token": "<s>" or {"content": "<s>", ...}; -1 when absent or no token of ours. */
static int32_t named_id(const tokenizer *t, const json_t *root, const char *key) {
    const json_t *v = json_find(root, key);
    if (json_is_object(v)) v = json_find(v, "content");
    return json_is_string(v) ? tokenizer_id(t, json_string_value(v)) : -1;
}

static void read_names(tokenizer *t, const json_t *root) {
    if (t->bos < 0) t->bos = named_id(t, root, "bos_token");
    if (t->n_eos == 0) add_eos(t, named_id(t, root, "eos_token"));
}

static status add_chat(tokenizer *t, const char *name, const char *source, size_t n) {
    if (t->n_chat == CHAT_TEMPLATES_MAX)
        return FAIL(ST_RANGE, "more than %d chat templates", CHAT_TEMPLATES_MAX);
    if (tokenizer_chat_template(t, name)) return ST_OK; /* the .jinja file came first */
    const char *copy = arena_string(&t->memory, source, n);
    const char *name_copy = arena_string(&t->memory, name, strlen(name));
    if (!copy || !name_copy) return FAIL(ST_NOMEM, "chat template of %zu bytes", n);
    t->chat[t->n_chat].name = name_copy;
    t->chat[t->n_chat++].source = copy;
    return ST_OK;
}

static status read_chat(tokenizer *t, const json_t *value) {
    if (!value) return ST_OK;
    if (json_is_string(value))
        return add_chat(t, "default", json_string_value(value), json_string_length(value));
    if (!json_is_array(value))
        return FAIL(ST_FORMAT, "'chat_template' is neither a string nor a list");
    for (size_t i = 0; i < json_array_size(value); i++) {
        const char *name, *source;
        TRY(json_get_string(json_array_get(value, i), "name", "chat_template", &name));
        TRY(json_get_string(json_array_get(value, i), "template", "chat_template", &source));
        TRY(add_chat(t, name, source, strlen(source)));
    }
    return ST_OK;
}

static status read_config(tokenizer *t, const json_t *root) {
    read_names(t, root);
    return read_chat(t, json_find(root, "chat_template"));
}

static status read_map(tokenizer *t, const json_t *root) {
    read_names(t, root);
    return ST_OK;
}

static status read_generation(tokenizer *t, const json_t *root) {
    const json_t *bos = json_find(root, "bos_token_id"), *eos = json_find(root, "eos_token_id");
    if (t->bos < 0 && json_is_integer(bos) && json_integer_value(bos) >= 0 &&
        json_integer_value(bos) <= INT32_MAX)
        t->bos = (int32_t)json_integer_value(bos);
    if (json_is_integer(eos)) add_eos(t, json_integer_value(eos));
    for (size_t i = 0; i < json_array_size(eos); i++)
        if (json_is_integer(json_array_get(eos, i)))
            add_eos(t, json_integer_value(json_array_get(eos, i)));
    return ST_OK;
}

static status read_beside(tokenizer *t, const char *dir, const char *name,
                          status (*read)(tokenizer *, const json_t *)) {
    char path[4096];
    path_join(path, sizeof path, dir, name);
    if (!file_exists(path)) return ST_OK;
    json_t *root;
    TRY(json_file(&root, path));
    const status st = json_is_object(root) ? read(t, root) : FAIL(ST_FORMAT, "not a JSON object");
    json_decref(root);
    return fail_prefix(st, "%s", path);
}

static status read_jinja(tokenizer *t, const char *dir) {
    char path[4096];
    path_join(path, sizeof path, dir, "chat_template.jinja");
    if (!file_exists(path)) return ST_OK;
    file_map file;
    TRY(file_map_open(&file, path));
    const char *data = file.data ? (const char *)file.data : "";
    status st = ST_OK;
    if (file.size > 1 << 20)
        st = FAIL(ST_RANGE, "%zu bytes", file.size);
    else if (!utf8_valid(data, file.size))
        st = FAIL(ST_FORMAT, "not UTF-8");
    else
        st = add_chat(t, "default", data, file.size);
    file_map_close(&file);
    return fail_prefix(st, "%s", path);
}

static status read_folder(tokenizer *t, const char *dir) {
    char path[4096];
    if (strlen(dir) > sizeof path - 64)
        return FAIL(ST_IO, "a folder name of %zu bytes", strlen(dir));
    if (!file_exists(path_join(path, sizeof path, dir, "tokenizer.json")))
        return FAIL(ST_NOTFOUND,
                    "%s: no such file: a checkpoint has one, a folder of "
                    "workloads/models is a configuration alone",
                    path);
    TRY(read_tokenizer(t, path));
    TRY(read_jinja(t, dir));
    TRY(read_beside(t, dir, "tokenizer_config.json", read_config));
    TRY(read_beside(t, dir, "special_tokens_map.json", read_map));
    return read_beside(t, dir, "generation_config.json", read_generation);
}

status tokenizer_open(tokenizer **out, const char *dir) {
    *out = NULL;
    tokenizer *t = mem_alloc(1, sizeof *t);
    if (!t) return FAIL(ST_NOMEM, "%s: tokenizer", dir);
    t->bos = -1;
    const status st = read_folder(t, dir);
    if (st != ST_OK) {
        tokenizer_close(t);
        return st;
    }
    arena_seal(&t->memory);
    *out = t;
    return ST_OK;
}

void tokenizer_close(tokenizer *t) {
    if (!t) return;
    normalizer_close(&t->normal);
    pretokenizer_close(&t->words);
    arena_close(&t->memory);
    mem_free(t);
}

/* --- Encoding --------------------------------------------------------------------------------- */

typedef struct {
    const tokenizer *t;
    uint32_t flags;
    ids *out;
    const char *begin; /* of the whole (repaired) text */
    bool first;        /* the section being cut starts the whole text */
    const char *section;
    text normal, spare; /* normal form of a section */
    pretokenize_run run;
    bpe_room room;
} encoding;

static status encode_word(void *context, const char *s, size_t n) {
    encoding *e = context;
    return bpe_encode(&e->t->model, &e->room, s, n, e->out);
}

/* A part of a section in normal form. */
static status encode_normal_part(void *context, const added_token *token, const char *s, size_t n) {
    encoding *e = context;
    if (token) return ids_add(e->out, token->id), ids_status(e->out);
    return pretokenizer_words(&e->t->words, &e->run, s, n, e->first && s == e->section);
}

/* A part of the text as it came. */
static status encode_raw_part(void *context, const added_token *token, const char *s, size_t n) {
    encoding *e = context;
    const tokenizer *t = e->t;
    if (token) return ids_add(e->out, token->id), ids_status(e->out);
    e->first = s == e->begin;
    e->section = s;
    if (t->normal.n_steps > 0) {
        TRY(normalizer_run(&t->normal, s, n, &e->normal, &e->spare));
        e->section = e->normal.data ? e->normal.data : "";
        n = e->normal.length;
    }
    return added_cut(&t->extra, &t->extra.normal, e->section, n,
                     !(e->flags & TOKENIZER_PARSE_SPECIAL), encode_normal_part, e);
}

status tokenizer_encode(const tokenizer *t, const char *s, size_t n, uint32_t flags, ids *out) {
    const bool wrap = flags & TOKENIZER_ADD_SPECIAL;
    encoding e = {.t = t, .flags = flags, .out = out};
    e.run.emit = encode_word;
    e.run.context = &e;
    text repaired = {0};
    status st = ST_OK;
    if (!utf8_valid(s, n)) {
        utf8_repair(&repaired, s, n);
        st = text_status(&repaired);
        s = repaired.data;
        n = repaired.length;
    }
    e.begin = s;
    if (wrap) ids_add_all(out, t->before, t->n_before);
    if (st == ST_OK && n > 0)
        st = added_cut(&t->extra, &t->extra.raw, s, n, !(flags & TOKENIZER_PARSE_SPECIAL),
                       encode_raw_part, &e);
    if (wrap) ids_add_all(out, t->after, t->n_after);
    if (st == ST_OK) st = ids_status(out);
    pretokenize_run_close(&e.run);
    bpe_room_close(&e.room);
    text_free(&e.normal);
    text_free(&e.spare);
    text_free(&repaired);
    return st;
}

/* --- Decoding --------------------------------------------------------------------------------- */

void tokenizer_stream_open(tokenizer_stream *s, const tokenizer *t, bool skip_special) {
    *s = (tokenizer_stream){.t = t, .skip_special = skip_special};
    detokenize_reset(&s->state, &t->decoder);
}

void tokenizer_stream_continue(tokenizer_stream *s) { detokenize_continue(&s->state); }

status tokenizer_stream_push(tokenizer_stream *s, int32_t id, text *out) {
    const tokenizer *t = s->t;
    if (!tokenizer_piece(t, id) || (s->skip_special && tokenizer_is_special(t, id))) return ST_OK;
    const piece *p = &t->model.pieces[id];
    return detokenize_push(&s->state, &t->decoder, p->data, (size_t)p->length, out);
}

status tokenizer_stream_flush(tokenizer_stream *s, text *out) {
    return detokenize_flush(&s->state, &s->t->decoder, out);
}

void tokenizer_stream_close(tokenizer_stream *s) { detokenize_close(&s->state); }

status tokenizer_decode(const tokenizer *t, const int32_t *id, int64_t n, bool skip_special,
                        text *out) {
    tokenizer_stream s;
    tokenizer_stream_open(&s, t, skip_special);
    status st = ST_OK;
    for (int64_t i = 0; i < n && st == ST_OK; i++) st = tokenizer_stream_push(&s, id[i], out);
    if (st == ST_OK) st = tokenizer_stream_flush(&s, out);
    tokenizer_stream_close(&s);
    return st;
}

status tokenizer_token_bytes(const tokenizer *t, int32_t id, text *out) {
    if (!tokenizer_piece(t, id)) return ST_OK;
    const piece *p = &t->model.pieces[id];
    return detokenize_bytes(&t->decoder, p->data, (size_t)p->length, out);
}

/* --- Asking ----------------------------------------------------------------------------------- */

int32_t tokenizer_vocab_size(const tokenizer *t) { return t->model.n_ids; }

int32_t tokenizer_id(const tokenizer *t, const char *token) {
    const size_t n = strlen(token);
    const int32_t id = added_find(&t->extra, token, n);
    return id >= 0 ? id : bpe_find(&t->model, token, n);
}

const char *tokenizer_piece(const tokenizer *t, int32_t id) {
    return id >= 0 && id < t->model.n_ids ? t->model.pieces[id].data : NULL;
}

bool tokenizer_is_special(const tokenizer *t, int32_t id) {
    return tokenizer_piece(t, id) && t->model.pieces[id].special;
}

int32_t tokenizer_bos(const tokenizer *t) { return t->bos; }

const int32_t *tokenizer_eos(const tokenizer *t, int32_t *n) {
    *n = t->n_eos;
    return t->eos;
}

bool tokenizer_is_eos(const tokenizer *t, int32_t id) {
    for (int32_t i = 0; i < t->n_eos; i++)
        if (t->eos[i] == id) return true;
    return false;
}

static const char *piece_or_empty(const tokenizer *t, int32_t id) {
    const char *s = tokenizer_piece(t, id);
    return s ? s : "";
}

const char *tokenizer_bos_text(const tokenizer *t) { return t ? piece_or_empty(t, t->bos) : ""; }

const char *tokenizer_eos_text(const tokenizer *t) {
    return t && t->n_eos ? piece_or_empty(t, t->eos[0]) : "";
}

const char *tokenizer_chat_template(const tokenizer *t, const char *name) {
    if (!name) name = "default";
    for (int32_t i = 0; i < t->n_chat; i++)
        if (!strcmp(t->chat[i].name, name)) return t->chat[i].source;
    return NULL;
}
