/* dataset.c - see dataset.h. One function for each format; what they share is row_add, which
 * applies the common rules and grows the tables. */
#include "dataset.h"

#include "json.h"
#include "rng.h"
#include <ctype.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

enum { TOKENS_MAX = 1 << 24 }; /* of one prompt or output; more is taken for a broken file */
#define TIME_MAX_S 1e9         /* 30 years; keeps nanoseconds inside int64 */

typedef struct {
    const char *path, *at, *end;
    int64_t line; /* of the last line handed out, from 1 */
    const dataset_options *o;
    dataset *d;
} reader;

typedef status (*format_reader)(reader *r);
static status read_sharegpt(reader *r);
static status read_burstgpt(reader *r);
static status read_azure(reader *r);
static status read_mooncake(reader *r);
static status read_jsonl(reader *r);
static void sort_by_time(dataset *d);

static const struct {
    const char *name;
    format_reader read;
    bool ordered; /* rows keep the order in which they were read */
} formats[] = {
    {"sharegpt", read_sharegpt, true}, {"burstgpt", read_burstgpt, false},
    {"azure", read_azure, false},      {"mooncake", read_mooncake, false},
    {"jsonl", read_jsonl, false},
};

status dataset_read(dataset *out, const char *path, const dataset_options *o) {
    *out = (dataset){0};
    int32_t f = 0;
    while (f < COUNT_OF(formats) && strcmp(formats[f].name, o->format) != 0) f++;
    if (f == COUNT_OF(formats))
        return FAIL(ST_NOTFOUND,
                    "%s: format '%s' is none of sharegpt burstgpt azure mooncake jsonl", path,
                    o->format);
    file_map m;
    TRY(file_map_open(&m, path));
    const char *data = (const char *)m.data;
    reader r = {.path = path, .at = data, .end = data ? data + m.size : data, .o = o, .d = out};
    if (m.size >= 3 && memcmp(data, "\xef\xbb\xbf", 3) == 0) r.at += 3; /* byte order mark */
    status st = formats[f].read(&r);
    file_map_close(&m);
    if (st == ST_OK && out->n == 0)
        st =
            FAIL(ST_NOTFOUND, "%s: no usable row (%lld left out)", path, (long long)out->n_dropped);
    if (st != ST_OK) {
        dataset_free(out);
        return st;
    }
    if (!formats[f].ordered) sort_by_time(out);
    return ST_OK;
}

void dataset_free(dataset *d) {
    mem_free(d->row);
    mem_free(d->id);
    mem_free(d->block);
    *d = (dataset){0};
}

/* --- What the formats share ------------------------------------------------------------------- */

static bool full(const reader *r) { return r->o->n_max > 0 && r->d->n >= r->o->n_max; }

/* Room for `more` further elements of `width` bytes; doubles. */
static status grow(void **table, int64_t used, int64_t *size, int64_t more, size_t width) {
    if (used + more <= *size) return ST_OK;
    const int64_t wanted = i64_max(used + more, i64_max(64, *size * 2));
    void *bigger = mem_resize(*table, (size_t)wanted, width);
    if (!bigger) return FAIL(ST_NOMEM, "%lld rows of a trace", (long long)wanted);
    *table = bigger;
    *size = wanted;
    return ST_OK;
}

static bool keeps(const reader *r, int64_t n_prompt, int64_t n_output) {
    if (n_prompt < 1 || n_output < 1) return false;
    return r->o->ctx_limit == 0 || n_prompt + n_output <= r->o->ctx_limit;
}

static status row_add(reader *r, int64_t at_ns, int64_t n_prompt, int64_t n_output) {
    dataset *d = r->d;
    TRY(grow((void **)&d->row, d->n, &d->row_size, 1, sizeof *d->row));
    d->row[d->n++] = (dataset_row){.at_ns = at_ns,
                                   .line = r->line,
                                   .n_prompt = (int32_t)n_prompt,
                                   .n_output = (int32_t)n_output,
                                   .id_at = -1};
    return ST_OK;
}

/* Ids of a text behind the ones there are; *n of them. Without an encoder a token is four bytes:
 * the usual rule of thumb for English text and 32k to 128k vocabularies, marked as estimated. */
static status encode_text(reader *r, const char *s, size_t bytes, int64_t *n) {
    dataset *d = r->d;
    if (!r->o->encoder.encode) {
        d->estimated = true;
        *n = div_up((int64_t)bytes, 4);
        return ST_OK;
    }
    const int64_t room = (int64_t)bytes + 16;
    if (room > TOKENS_MAX) return FAIL(ST_RANGE, "text of %zu bytes", bytes);
    TRY(grow((void **)&d->id, d->n_ids, &d->id_size, room, sizeof *d->id));
    int32_t got = 0;
    TRY(r->o->encoder.encode(r->o->encoder.user, s, bytes, d->id + d->n_ids, (int32_t)room, &got));
    *n = got;
    return ST_OK;
}

/* The next line without its end, or false. Lines end in LF or CR LF. */
static bool next_line(reader *r, const char **line, size_t *n) {
    if (r->at == r->end) return false;
    const char *stop = memchr(r->at, '\n', (size_t)(r->end - r->at));
    const char *last = stop ? stop : r->end;
    *line = r->at;
    *n = (size_t)(last - r->at);
    if (*n > 0 && last[-1] == '\r') (*n)--;
    r->at = stop ? stop + 1 : r->end;
    r->line++;
    return true;
}

static bool blank(const char *s, size_t n) {
    while (n > 0 && isspace((unsigned char)*s)) s++, n--;
    return n == 0;
}

/* "path:12" for messages and for json.h's `where`. */
static const char *place(const reader *r, char buf[1024]) {
    snprintf(buf, 1024, "%s:%lld", r->path, (long long)r->line);
    return buf;
}

static int row_order(const void *a, const void *b) {
    const dataset_row *x = a, *y = b;
    if (x->at_ns != y->at_ns) return x->at_ns < y->at_ns ? -1 : 1;
    return x->line < y->line ? -1 : x->line > y->line;
}

/* By time, rows of one instant in the order of the file; instants from the first one on. Files cut
 * out of several servers are not quite sorted. */
static void sort_by_time(dataset *d) {
    bool sorted = true;
    for (int64_t i = 1; i < d->n; i++) sorted = sorted && d->row[i - 1].at_ns <= d->row[i].at_ns;
    if (!sorted) qsort(d->row, (size_t)d->n, sizeof *d->row, row_order);
    const int64_t first = d->row[0].at_ns;
    for (int64_t i = 0; i < d->n; i++) d->row[i].at_ns -= first;
}

/* --- CSV -------------------------------------------------------------------------------------- */

enum { FIELDS_MAX = 64 };
typedef struct {
    const char *s;
    size_t n;
} field;

/* Fields of a line, outer blanks and one pair of quotes taken off. -1: too many, -2: open quote. */
static int32_t split_fields(field *f, const char *s, size_t n) {
    const char *end = s + n;
    for (int32_t count = 0; count < FIELDS_MAX; count++) {
        while (s < end && (*s == ' ' || *s == '\t')) s++;
        const bool quoted = s < end && *s == '"';
        if (quoted) s++;
        f[count].s = s;
        while (s < end && *s != (quoted ? '"' : ',')) s++;
        if (quoted && s == end) return -2;
        const char *last = s;
        if (quoted) s++;
        while (!quoted && last > f[count].s && (last[-1] == ' ' || last[-1] == '\t')) last--;
        f[count].n = (size_t)(last - f[count].s);
        while (s < end && *s != ',') s++; /* behind a closing quote */
        if (s == end) return count + 1;
        s++;
    }
    return -1;
}

/* Header names compare by letters and digits alone: "Session ID" is "SessionID" is "session_id". */
static bool same_name(field f, const char *name) {
    size_t i = 0;
    for (;;) {
        while (i < f.n && !isalnum((unsigned char)f.s[i])) i++;
        while (*name && !isalnum((unsigned char)*name)) name++;
        if (i == f.n || !*name) return i == f.n && !*name;
        if (tolower((unsigned char)f.s[i]) != tolower((unsigned char)*name)) return false;
        i++, name++;
    }
}

/* Columns of `name` (n of them), in `at`; the last `n_optional` may be absent (-1). */
static status read_header(reader *r, const char *const *name, int32_t n, int32_t n_optional,
                          int32_t *at, int32_t *n_fields) {
    const char *line;
    size_t length;
    if (!next_line(r, &line, &length)) return FAIL(ST_FORMAT, "%s: empty file", r->path);
    field f[FIELDS_MAX];
    *n_fields = split_fields(f, line, length);
    if (*n_fields < 1) return FAIL(ST_FORMAT, "%s:1: the header cannot be read", r->path);
    for (int32_t i = 0; i < n; i++) {
        at[i] = -1;
        for (int32_t c = 0; c < *n_fields; c++) {
            if (!same_name(f[c], name[i])) continue;
            if (at[i] >= 0)
                return FAIL(ST_FORMAT, "%s:1: column '%s' stands twice", r->path, name[i]);
            at[i] = c;
        }
        if (at[i] < 0 && i < n - n_optional)
            return FAIL(ST_FORMAT, "%s:1: column '%s' is missing", r->path, name[i]);
    }
    return ST_OK;
}

/* The next row that is not blank; *more false at the end. */
static status read_fields(reader *r, field *f, int32_t n_fields, bool *more) {
    const char *line;
    size_t length;
    do {
        *more = next_line(r, &line, &length);
    } while (*more && blank(line, length));
    if (!*more) return ST_OK;
    const int32_t n = split_fields(f, line, length);
    if (n == -2)
        return FAIL(ST_FORMAT, "%s:%lld: a quote is not closed", r->path, (long long)r->line);
    if (n != n_fields)
        return FAIL(ST_FORMAT, "%s:%lld: %d fields, the header has %d", r->path, (long long)r->line,
                    n < 0 ? FIELDS_MAX : n, n_fields);
    return ST_OK;
}

static const char *field_text(char buf[64], field f) {
    const size_t n = f.n < 63 ? f.n : 63;
    memcpy(buf, f.s, n);
    buf[n] = 0;
    return buf;
}

/* A count of tokens; "472.0" is how pandas writes an integer column that once had a gap. */
static status field_tokens(const reader *r, field f, const char *name, int64_t *out) {
    char buf[64];
    double x;
    const bool good = f.n < 63 && memchr(f.s, 0, f.n) == NULL &&
                      parse_f64(field_text(buf, f), 0, TOKENS_MAX, &x) && x == floor(x);
    if (!good)
        return FAIL(ST_FORMAT, "%s:%lld: %s '%s' is no count of tokens (0 to %d)", r->path,
                    (long long)r->line, name, field_text(buf, f), TOKENS_MAX);
    *out = (int64_t)x;
    return ST_OK;
}

/* Days since 1970-01-01 (Howard Hinnant's days_from_civil, public domain algorithm). */
static int64_t days_from_civil(int64_t y, int64_t m, int64_t d) {
    y -= m <= 2;
    const int64_t era = (y >= 0 ? y : y - 399) / 400, year = y - era * 400;
    const int64_t day = (153 * (m + (m > 2 ? -3 : 9)) + 2) / 5 + d - 1;
    return era * 146097 + year * 365 + year / 4 - year / 100 + day - 719468;
}

/* Exactly `digits` digits in [lo, hi], then `then` (0 = nothing asked). */
static bool take_number(const char **s, int32_t digits, int64_t lo, int64_t hi, char then,
                        int64_t *out) {
    *out = 0;
    for (int32_t i = 0; i < digits; i++, (*s)++) {
        if (!isdigit((unsigned char)**s)) return false;
        *out = *out * 10 + (**s - '0');
    }
    if (then && *(*s)++ != then) return false;
    return *out >= lo && *out <= hi;
}

/* "2023-11-16 18:15:46.6805900", 'T' for the blank, "Z" or "+00:00" behind: ns since 1970, UTC. A
 * double has no room for 100 ns at this size, so digits are taken as integers. */
static bool parse_instant(const char *s, int64_t *ns) {
    int64_t y, mo, d, h, mi, sec;
    if (!take_number(&s, 4, 1970, 2200, '-', &y) || !take_number(&s, 2, 1, 12, '-', &mo) ||
        !take_number(&s, 2, 1, 31, 0, &d) || (*s != ' ' && *s != 'T'))
        return false;
    s++;
    if (!take_number(&s, 2, 0, 23, ':', &h) || !take_number(&s, 2, 0, 59, ':', &mi) ||
        !take_number(&s, 2, 0, 60, 0, &sec))
        return false;
    int64_t fraction = 0, unit = 100000000;
    if (*s == '.') {
        for (s++; isdigit((unsigned char)*s); s++, unit /= 10) fraction += (*s - '0') * unit;
    }
    int64_t zone_s = 0;
    if (*s == 'Z') {
        s++;
    } else if (*s == '+' || *s == '-') {
        const int64_t sign = *s++ == '-' ? -1 : 1;
        int64_t zh, zm;
        if (!take_number(&s, 2, 0, 14, ':', &zh) || !take_number(&s, 2, 0, 59, 0, &zm))
            return false;
        zone_s = sign * (zh * 3600 + zm * 60);
    }
    *ns = ((days_from_civil(y, mo, d) * 24 + h) * 3600 + mi * 60 + sec - zone_s) * 1000000000 +
          fraction;
    return *s == 0;
}

/* --- Files of request times ------------------------------------------------------------------- */

enum { TIME, PROMPT, OUTPUT, MODEL, COLUMNS };

/* A CSV with a request a line. */
typedef struct {
    const char *column[COLUMNS]; /* their names; MODEL may be missing in a file, NULL: always is */
    bool (*read_time)(const char *s, int64_t *ns);
    const char *time; /* what that reads, in words */
} csv_form;

static bool read_seconds(const char *s, int64_t *ns) {
    double t;
    if (!parse_f64(s, 0, TIME_MAX_S, &t)) return false;
    *ns = llround(t * 1e9);
    return true;
}

static const csv_form burstgpt = {
    {"Timestamp", "Request tokens", "Response tokens", "Model"}, read_seconds, "time in seconds"};
static const csv_form azure = {
    {"TIMESTAMP", "ContextTokens", "GeneratedTokens"}, parse_instant, "date and time"};

static status read_csv(reader *r, const csv_form *form) {
    const bool has_model = form->column[MODEL] != NULL;
    int32_t at[COLUMNS], n_fields = 0;
    TRY(read_header(r, form->column, has_model ? COLUMNS : MODEL, has_model, at, &n_fields));
    const char *model = has_model && r->o->model && r->o->model[0] ? r->o->model : NULL;
    if (model && at[MODEL] < 0)
        return FAIL(ST_FORMAT, "%s:1: column '%s' is missing, '%s' was asked for", r->path,
                    form->column[MODEL], model);
    r->d->timed = true;
    field f[FIELDS_MAX];
    for (;;) {
        bool more;
        TRY(read_fields(r, f, n_fields, &more));
        if (!more || full(r)) return ST_OK;
        char buf[64];
        int64_t t = 0, n_prompt = 0, n_output = 0;
        if (f[at[TIME]].n >= 63 || !form->read_time(field_text(buf, f[at[TIME]]), &t))
            return FAIL(ST_FORMAT, "%s:%lld: %s '%s' is no %s", r->path, (long long)r->line,
                        form->column[TIME], field_text(buf, f[at[TIME]]), form->time);
        TRY(field_tokens(r, f[at[PROMPT]], form->column[PROMPT], &n_prompt));
        TRY(field_tokens(r, f[at[OUTPUT]], form->column[OUTPUT], &n_output));
        const bool other = model && (f[at[MODEL]].n != strlen(model) ||
                                     memcmp(f[at[MODEL]].s, model, strlen(model)) != 0);
        if (other || !keeps(r, n_prompt, n_output))
            r->d->n_dropped++;
        else
            TRY(row_add(r, t, n_prompt, n_output));
    }
}

static status read_burstgpt(reader *r) { return read_csv(r, &burstgpt); }
static status read_azure(reader *r) { return read_csv(r, &azure); }

/* --- JSON lines ------------------------------------------------------------------------------- */

/* Parse the next line that is not blank; *doc NULL at the end. */
static status next_object(reader *r, json_t **doc, char where[1024]) {
    const char *line;
    size_t n;
    *doc = NULL;
    do {
        if (!next_line(r, &line, &n)) return ST_OK;
    } while (blank(line, n));
    TRY(json_parse(doc, line, n, place(r, where)));
    if (json_is_object(*doc)) return ST_OK;
    json_decref(*doc);
    return FAIL(ST_FORMAT, "%s: not a JSON object", where);
}

/* A file of an object a line, each a row. */
static status read_lines(reader *r,
                         status (*row)(reader *r, const json_t *doc, const char *where)) {
    for (;;) {
        json_t *doc;
        char where[1024];
        TRY(next_object(r, &doc, where));
        if (!doc) return ST_OK;
        const status st = full(r) ? ST_OK : row(r, doc, where);
        json_decref(doc);
        TRY(st);
        if (full(r)) return ST_OK;
    }
}

/* hash_ids of one row. Writers differ in whether the last, partial block has an id. */
static status take_blocks(reader *r, const json_t *ids, int64_t n_prompt, const char *where,
                          int64_t *n) {
    dataset *d = r->d;
    *n = 0;
    if (!ids) return ST_OK;
    if (!json_is_array(ids)) return FAIL(ST_FORMAT, "%s: hash_ids is no array", where);
    *n = (int64_t)json_array_size(ids);
    if (*n < n_prompt / DATASET_BLOCK_TOKENS || *n > div_up(n_prompt, DATASET_BLOCK_TOKENS))
        return FAIL(ST_FORMAT, "%s: %lld hash_ids for %lld tokens, which are %lld blocks of %d",
                    where, (long long)*n, (long long)n_prompt,
                    (long long)div_up(n_prompt, DATASET_BLOCK_TOKENS), DATASET_BLOCK_TOKENS);
    TRY(grow((void **)&d->block, d->n_blocks, &d->block_size, *n, sizeof *d->block));
    for (int64_t i = 0; i < *n; i++) {
        const json_t *v = json_array_get(ids, (size_t)i);
        if (!json_is_integer(v))
            return FAIL(ST_FORMAT, "%s: hash_ids[%lld] is no integer", where, (long long)i);
        d->block[d->n_blocks + i] = json_integer_value(v);
    }
    return ST_OK;
}

static status mooncake_row(reader *r, const json_t *doc, const char *where) {
    dataset *d = r->d;
    double t_ms = 0;
    int64_t n_prompt = 0, n_output = 0, n_blocks = 0;
    TRY(json_get_f64(doc, "timestamp", where, 0, TIME_MAX_S * 1e3, &t_ms));
    TRY(json_get_i64(doc, "input_length", where, 0, TOKENS_MAX, &n_prompt));
    TRY(json_get_i64(doc, "output_length", where, 0, TOKENS_MAX, &n_output));
    TRY(take_blocks(r, json_find(doc, "hash_ids"), n_prompt, where, &n_blocks));
    if (!keeps(r, n_prompt, n_output)) {
        d->n_dropped++;
        return ST_OK;
    }
    TRY(row_add(r, llround(t_ms * 1e6), n_prompt, n_output));
    d->row[d->n - 1].block_at = d->n_blocks;
    d->row[d->n - 1].n_blocks = (int32_t)n_blocks;
    d->n_blocks += n_blocks;
    return ST_OK;
}

static status read_mooncake(reader *r) {
    r->d->timed = true;
    return read_lines(r, mooncake_row);
}

static status take_ids(reader *r, const json_t *ids, const char *where, int64_t *n) {
    dataset *d = r->d;
    if (!json_is_array(ids)) return FAIL(ST_FORMAT, "%s: prompt_ids is no array", where);
    *n = (int64_t)json_array_size(ids);
    TRY(grow((void **)&d->id, d->n_ids, &d->id_size, *n, sizeof *d->id));
    for (int64_t i = 0; i < *n; i++) {
        const json_t *v = json_array_get(ids, (size_t)i);
        if (!json_is_integer(v) || json_integer_value(v) < 0 ||
            json_integer_value(v) >= r->o->vocab)
            return FAIL(ST_RANGE, "%s: prompt_ids[%lld] is no token id below %d", where,
                        (long long)i, r->o->vocab);
        d->id[d->n_ids + i] = (int32_t)json_integer_value(v);
    }
    return ST_OK;
}

static status jsonl_row(reader *r, const json_t *doc, const char *where) {
    dataset *d = r->d;
    const json_t *words = json_find(doc, "prompt"), *ids = json_find(doc, "prompt_ids");
    const json_t *count = json_find(doc, "n_prompt"), *when = json_find(doc, "arrival_s");
    if ((words != NULL) + (ids != NULL) + (count != NULL) != 1)
        return FAIL(ST_FORMAT, "%s: one of prompt, prompt_ids, n_prompt is needed", where);
    int64_t n_prompt = 0, n_output = 0;
    double t = 0;
    TRY(json_get_i64(doc, "max_new", where, 1, TOKENS_MAX, &n_output));
    TRY(json_opt_f64(doc, "arrival_s", where, 0, TIME_MAX_S, &t));
    if (d->n + d->n_dropped == 0) d->timed = when != NULL;
    if (d->timed != (when != NULL))
        return FAIL(ST_FORMAT, "%s: arrival_s must stand in every row or in none", where);
    if (count) TRY(json_get_i64(doc, "n_prompt", where, 1, TOKENS_MAX, &n_prompt));
    if (ids) TRY(take_ids(r, ids, where, &n_prompt));
    if (words) {
        if (!json_is_string(words)) return FAIL(ST_FORMAT, "%s: prompt is no string", where);
        const status st =
            encode_text(r, json_string_value(words), json_string_length(words), &n_prompt);
        if (st != ST_OK) return fail_prefix(st, "%s", where);
    }
    if (!keeps(r, n_prompt, n_output)) {
        d->n_dropped++;
        return ST_OK;
    }
    TRY(row_add(r, llround(t * 1e9), n_prompt, n_output));
    if (ids || (words && r->o->encoder.encode)) {
        d->row[d->n - 1].id_at = d->n_ids;
        d->n_ids += n_prompt;
    }
    return ST_OK;
}

static status read_jsonl(reader *r) { return read_lines(r, jsonl_row); }

/* --- ShareGPT --------------------------------------------------------------------------------- */

/* One object of the outer array; the real file has 0.7 GB, so it is cut up before it is parsed. */
typedef struct {
    const char *s;
    size_t n;
    int64_t line;
} slice;

/* One past the object that begins at s ('{'); NULL when it does not end. Counts lines. */
static const char *object_end(const char *s, const char *end, int64_t *line) {
    int32_t depth = 0;
    bool quoted = false;
    for (; s < end; s++) {
        if (*s == '\n') (*line)++;
        if (quoted) {
            if (*s == '\\' && s + 1 < end)
                s++;
            else if (*s == '"')
                quoted = false;
        } else if (*s == '"') {
            quoted = true;
        } else if (*s == '{' || *s == '[') {
            depth++;
        } else if (*s == '}' || *s == ']') {
            if (--depth == 0) return s + 1;
        }
    }
    return NULL;
}

static void skip_blank(reader *r) {
    while (r->at < r->end && isspace((unsigned char)*r->at)) r->line += *r->at++ == '\n';
}

/* *slices: mem_free'd by the caller, also on failure. */
static status cut_array(reader *r, slice **slices, int64_t *n) {
    int64_t size = 0;
    r->line = 1;
    skip_blank(r);
    if (r->at == r->end || *r->at != '[')
        return FAIL(ST_FORMAT, "%s:%lld: not a JSON array", r->path, (long long)r->line);
    r->at++;
    for (;;) {
        skip_blank(r);
        if (r->at < r->end && *r->at == ']' && *n == 0) break;
        if (r->at == r->end || *r->at != '{')
            return FAIL(ST_FORMAT, "%s:%lld: an object was expected", r->path, (long long)r->line);
        const int64_t line = r->line;
        const char *stop = object_end(r->at, r->end, &r->line);
        if (!stop)
            return FAIL(ST_FORMAT, "%s:%lld: this object does not end", r->path, (long long)line);
        TRY(grow((void **)slices, *n, &size, 1, sizeof **slices));
        (*slices)[(*n)++] = (slice){r->at, (size_t)(stop - r->at), line};
        r->at = stop;
        skip_blank(r);
        if (r->at < r->end && *r->at == ']') break;
        if (r->at == r->end || *r->at != ',')
            return FAIL(ST_FORMAT, "%s:%lld: ',' or ']' was expected", r->path, (long long)r->line);
        r->at++;
    }
    r->at++;
    skip_blank(r);
    if (r->at != r->end)
        return FAIL(ST_FORMAT, "%s:%lld: text behind the array", r->path, (long long)r->line);
    return ST_OK;
}

static status turn_text(const json_t *turns, size_t i, const char *where, const json_t **out) {
    const json_t *turn = json_array_get(turns, i);
    *out = json_is_object(turn) ? json_find(turn, "value") : NULL;
    if (!json_is_string(*out))
        return FAIL(ST_FORMAT, "%s: conversations[%zu].value is no string", where, i);
    return ST_OK;
}

static status sharegpt_row(reader *r, const json_t *doc, const char *where) {
    dataset *d = r->d;
    const json_t *turns = json_find(doc, "conversations"), *prompt, *answer;
    if (!json_is_array(turns)) return FAIL(ST_FORMAT, "%s: no array 'conversations'", where);
    int64_t n_prompt = 0, n_output = 0;
    bool good = json_array_size(turns) >= 2;
    if (good) {
        TRY(turn_text(turns, 0, where, &prompt));
        TRY(turn_text(turns, 1, where, &answer));
        status st =
            encode_text(r, json_string_value(answer), json_string_length(answer), &n_output);
        if (st == ST_OK) /* last, so that its ids are the ones that stay */
            st = encode_text(r, json_string_value(prompt), json_string_length(prompt), &n_prompt);
        if (st != ST_OK) return fail_prefix(st, "%s", where);
        good = n_prompt >= 4 && n_output >= 4 && n_prompt <= 1024 && n_prompt + n_output <= 2048 &&
               keeps(r, n_prompt, n_output);
    }
    if (!good) {
        d->n_dropped++;
        return ST_OK;
    }
    TRY(row_add(r, 0, n_prompt, n_output));
    if (r->o->encoder.encode) {
        d->row[d->n - 1].id_at = d->n_ids;
        d->n_ids += n_prompt;
    }
    return ST_OK;
}

static status read_slices(reader *r, const slice *slices, const int32_t *order, int64_t n) {
    for (int64_t i = 0; i < n && !full(r); i++) {
        const slice *s = &slices[order[i]];
        char where[1024];
        json_t *doc;
        r->line = s->line;
        TRY(json_parse(&doc, s->s, s->n, place(r, where)));
        const status st = sharegpt_row(r, doc, where);
        json_decref(doc);
        TRY(st);
    }
    return ST_OK;
}

static status read_sharegpt(reader *r) {
    slice *slices = NULL;
    int64_t n = 0;
    status st = cut_array(r, &slices, &n);
    int32_t *order = NULL;
    if (st == ST_OK && n > 0) {
        order = n < INT32_MAX ? mem_alloc((size_t)n, sizeof *order) : NULL;
        if (!order) st = FAIL(ST_NOMEM, "%lld conversations", (long long)n);
    }
    if (order) {
        rng shuffle;
        rng_seed(&shuffle, r->o->seed, 0);
        for (int64_t i = 0; i < n; i++) order[i] = (int32_t)i;
        rng_shuffle(&shuffle, order, n);
        st = read_slices(r, slices, order, n);
    }
    mem_free(order);
    mem_free(slices);
    return st;
}
