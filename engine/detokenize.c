/* detokenize.c - see detokenize.h. */
#include "detokenize.h"

#include "pretokenize.h"
#include "utf8.h"

#include <string.h>

/* --- Reading ---------------------------------------------------------------------------------- */

static status read_string(const char **out, size_t *n, const json_t *value, const char *what,
                          arena *a) {
    if (!json_is_string(value)) return FAIL(ST_FORMAT, "decoder: %s is no string", what);
    *n = json_string_length(value);
    *out = arena_string(a, json_string_value(value), *n);
    return *out ? ST_OK : FAIL(ST_NOMEM, "decoder");
}

static status read_replace(detokenize_step *step, const json_t *spec, arena *a) {
    const json_t *what = json_find(spec, "pattern");
    if (json_find(what, "Regex"))
        return FAIL(ST_UNSUPPORTED, "decoder Replace of a regular expression is not supported");
    step->kind = DETOKENIZE_REPLACE;
    TRY(read_string(&step->pattern, &step->n_pattern, json_find(what, "String"),
                    "Replace's pattern", a));
    if (step->n_pattern == 0) return FAIL(ST_FORMAT, "decoder: Replace of an empty string");
    return read_string(&step->content, &step->n_content, json_find(spec, "content"),
                       "Replace's content", a);
}

static status read_strip(detokenize_step *step, const json_t *spec, arena *a) {
    int32_t stop = 0;
    step->kind = DETOKENIZE_STRIP;
    TRY(read_string(&step->content, &step->n_content, json_find(spec, "content"), "Strip's content",
                    a));
    if (step->n_content == 0) return FAIL(ST_FORMAT, "decoder: Strip of an empty string");
    TRY(json_opt_i32(spec, "start", "decoder Strip", 0, 1 << 20, &step->start));
    TRY(json_opt_i32(spec, "stop", "decoder Strip", 0, 1 << 20, &stop));
    return stop == 0 ? ST_OK : FAIL(ST_UNSUPPORTED, "decoder Strip with stop is not supported");
}

static status read_metaspace(detokenize_step *step, const json_t *spec, arena *a) {
    static const char where[] = "decoder Metaspace";
    const char *replacement = "\xe2\x96\x81", *scheme = "always";
    bool prefix = true;
    TRY(json_opt_string(spec, "replacement", where, &replacement));
    TRY(json_opt_bool(spec, "add_prefix_space", where, &prefix));
    if (!prefix) scheme = "never";
    TRY(json_opt_string(spec, "prepend_scheme", where, &scheme));
    step->kind = DETOKENIZE_METASPACE;
    step->drop_first = strcmp(scheme, "never") != 0;
    step->n_pattern = strlen(replacement);
    if (step->n_pattern == 0) return FAIL(ST_FORMAT, "%s: empty replacement", where);
    step->pattern = arena_string(a, replacement, step->n_pattern);
    step->content = " ", step->n_content = 1;
    return step->pattern ? ST_OK : FAIL(ST_NOMEM, "decoder");
}

static status read_steps(detokenizer *d, const json_t *spec, arena *a, int32_t depth) {
    const char *type;
    TRY(json_get_string(spec, "type", "decoder", &type));
    if (!strcmp(type, "Sequence")) {
        const json_t *list = json_find(spec, "decoders");
        if (!json_is_array(list)) return FAIL(ST_FORMAT, "decoder: Sequence without a list");
        if (depth >= DETOKENIZE_STEPS_MAX) return FAIL(ST_RANGE, "decoder: nested too deeply");
        for (size_t i = 0; i < json_array_size(list); i++)
            TRY(read_steps(d, json_array_get(list, i), a, depth + 1));
        return ST_OK;
    }
    if (d->n_steps == DETOKENIZE_STEPS_MAX)
        return FAIL(ST_RANGE, "decoder: more than %d steps", DETOKENIZE_STEPS_MAX);
    detokenize_step *step = &d->steps[d->n_steps++];
    *step = (detokenize_step){.kind = DETOKENIZE_FUSE};
    if (!strcmp(type, "Fuse")) return ST_OK;
    if (!strcmp(type, "Replace")) return read_replace(step, spec, a);
    if (!strcmp(type, "Strip")) return read_strip(step, spec, a);
    if (!strcmp(type, "Metaspace")) return read_metaspace(step, spec, a);
    if (!strcmp(type, "ByteFallback")) return step->kind = DETOKENIZE_BYTE_FALLBACK, ST_OK;
    if (!strcmp(type, "ByteLevel")) return step->kind = DETOKENIZE_BYTE_LEVEL, ST_OK;
    return FAIL(ST_UNSUPPORTED, "decoder '%s' is not supported", type);
}

/* One buffer holds bytes back, and behind Fuse only Strip can work on a text that is still growing.
 */
static status check_order(detokenizer *d) {
    bool holds = false, fused = false;
    for (int32_t i = 0; i < d->n_steps; i++) {
        detokenize_step *step = &d->steps[i];
        const bool bytes =
            step->kind == DETOKENIZE_BYTE_FALLBACK || step->kind == DETOKENIZE_BYTE_LEVEL;
        if (bytes && holds) return FAIL(ST_UNSUPPORTED, "decoder with two steps that join bytes");
        if (fused && step->kind != DETOKENIZE_STRIP && step->kind != DETOKENIZE_FUSE)
            return FAIL(ST_UNSUPPORTED, "decoder with more than Strip behind Fuse or ByteLevel");
        step->fused = fused;
        holds |= bytes;
        fused |= step->kind == DETOKENIZE_FUSE || step->kind == DETOKENIZE_BYTE_LEVEL;
    }
    return ST_OK;
}

status detokenizer_open(detokenizer *d, const json_t *spec, arena *a) {
    *d = (detokenizer){0};
    if (!spec) {
        d->steps[d->n_steps++] = (detokenize_step){.kind = DETOKENIZE_JOIN};
        return ST_OK;
    }
    TRY(read_steps(d, spec, a, 0));
    return check_order(d);
}

/* --- Running ---------------------------------------------------------------------------------- */

typedef struct {
    const detokenizer *d;
    detokenize_state *s;
    text *out;
} run;

static void feed(run *r, int32_t at, const char *token, size_t n);

static void replace(run *r, int32_t at, const char *token, size_t n) {
    const detokenize_step *step = &r->d->steps[at];
    const bool drop = step->drop_first && !r->s->started;
    text *room = &r->s->room[at];
    text_clear(room);
    size_t i = 0, plain = 0; /* [plain, i) is waiting to be copied */
    while (i + step->n_pattern <= n) {
        if (memcmp(token + i, step->pattern, step->n_pattern) != 0) {
            i++;
            continue;
        }
        text_bytes(room, token + plain, i - plain);
        if (!drop) text_bytes(room, step->content, step->n_content);
        plain = i += step->n_pattern;
    }
    text_bytes(room, token + plain, n - plain);
    if (room->failed)
        r->out->failed = true;
    else
        feed(r, at + 1, room->data, room->length);
}

static void strip(run *r, int32_t at, const char *token, size_t n) {
    const detokenize_step *step = &r->d->steps[at];
    int32_t *left = &r->s->strip[at];
    if (!step->fused) *left = step->start;
    size_t i = 0;
    while (*left > 0 && i < n) {
        if (n - i >= step->n_content && !memcmp(token + i, step->content, step->n_content)) {
            i += step->n_content;
            --*left;
        } else {
            *left = 0;
        }
    }
    feed(r, at + 1, token + i, n - i);
}

/* "<0xHH>", as the reference reads it: either case. */
static int32_t fallback_byte(const char *token, size_t n) {
    static const char digits[] = "0123456789abcdef0123456789ABCDEF";
    if (n != 6 || memcmp(token, "<0x", 3) != 0 || token[5] != '>') return -1;
    int32_t value = 0;
    for (int32_t i = 3; i < 5; i++) {
        const char *digit = token[i] ? strchr(digits, token[i]) : NULL;
        if (!digit) return -1;
        value = 16 * value + (int32_t)((digit - digits) % 16);
    }
    return value;
}

/* Every held byte becomes a token of its own. */
static void give_up_run(run *r, int32_t at) {
    const size_t n = r->s->held.length;
    text_clear(&r->s->held);
    r->s->well_formed = 0;
    for (size_t i = 0; i < n; i++) feed(r, at + 1, "\xef\xbf\xbd", 3);
}

static void end_run(run *r, int32_t at) {
    text *held = &r->s->held;
    if (held->length > 0 && r->s->well_formed == held->length) {
        feed(r, at + 1, held->data, held->length);
        text_clear(held);
    }
    give_up_run(r, at);
    r->s->ill_formed = false;
}

static void byte_fallback(run *r, int32_t at, const char *token, size_t n) {
    detokenize_state *s = r->s;
    const int32_t byte = fallback_byte(token, n);
    if (byte < 0) {
        end_run(r, at);
        feed(r, at + 1, token, n);
        return;
    }
    text_bytes(&s->held, &(char){(char)byte}, 1);
    if (s->held.failed) return;
    uint32_t c; /* one byte decides about the last character at most */
    const int32_t k = s->ill_formed ? -1
                                    : utf8_next(s->held.data + s->well_formed,
                                                s->held.length - s->well_formed, &c);
    if (k > 0) s->well_formed += (size_t)k;
    s->ill_formed = k < 0;
    if (k < 0) give_up_run(r, at);
}

/* Append the bytes of a byte-level token; one with a character outside the alphabet (an added token
 * with a space) stands for its own UTF-8. */
static void hold_bytes(text *held, const char *token, size_t n) {
    const size_t before = held->length;
    for (size_t i = 0; i < n;) {
        uint32_t c = 0;
        const int32_t k = utf8_next(token + i, n - i, &c);
        const int32_t byte = k > 0 ? bytelevel_byte(c) : -1;
        if (byte < 0) {
            held->length = before;
            text_bytes(held, token, n);
            return;
        }
        text_bytes(held, &(char){(char)byte}, 1);
        i += (size_t)k;
    }
}

static void byte_level(run *r, int32_t at, const char *token, size_t n) {
    text *held = &r->s->held, *room = &r->s->room[at];
    hold_bytes(held, token, n);
    if (held->failed) return;
    size_t end = 0; /* of what is decided */
    for (int32_t k = 1; end < held->length && k != 0; end += (size_t)(k < 0 ? -k : k)) {
        uint32_t c;
        k = utf8_next(held->data + end, held->length - end, &c);
    }
    if (end == 0) return;
    text_clear(room);
    utf8_repair(room, held->data, end);
    memmove(held->data, held->data + end, held->length - end);
    held->length -= end;
    if (room->failed)
        r->out->failed = true;
    else
        feed(r, at + 1, room->data, room->length);
}

static void join(run *r, int32_t at, const char *token, size_t n) {
    if (r->s->started) feed(r, at + 1, " ", 1);
    feed(r, at + 1, token, n);
}

static void feed(run *r, int32_t at, const char *token, size_t n) {
    if (at == r->d->n_steps) {
        text_bytes(r->out, token, n);
        return;
    }
    switch (r->d->steps[at].kind) {
    case DETOKENIZE_JOIN: join(r, at, token, n); break;
    case DETOKENIZE_REPLACE:
    case DETOKENIZE_METASPACE: replace(r, at, token, n); break;
    case DETOKENIZE_STRIP: strip(r, at, token, n); break;
    case DETOKENIZE_BYTE_FALLBACK: byte_fallback(r, at, token, n); break;
    case DETOKENIZE_FUSE: feed(r, at + 1, token, n); break;
    case DETOKENIZE_BYTE_LEVEL: byte_level(r, at, token, n); break;
    }
}

static status finish(const run *r) {
    if (r->s->held.failed || r->out->failed) return FAIL(ST_NOMEM, "decoded text");
    return ST_OK;
}

void detokenize_reset(detokenize_state *s, const detokenizer *d) {
    text_clear(&s->held);
    s->well_formed = 0;
    s->ill_formed = s->started = false;
    for (int32_t i = 0; i < d->n_steps; i++) s->strip[i] = d->steps[i].start;
}

void detokenize_close(detokenize_state *s) {
    text_free(&s->held);
    for (int32_t i = 0; i < DETOKENIZE_STEPS_MAX; i++) text_free(&s->room[i]);
    *s = (detokenize_state){0};
}

void detokenize_continue(detokenize_state *s) {
    s->started = true;
    memset(s->strip, 0, sizeof s->strip); /* one that is not fused counts anew with each token */
}

status detokenize_push(detokenize_state *s, const detokenizer *d, const char *token, size_t n,
                       text *out) {
    run r = {d, s, out};
    feed(&r, 0, token, n);
    s->started = true;
    return finish(&r);
}

status detokenize_flush(detokenize_state *s, const detokenizer *d, text *out) {
    run r = {d, s, out};
    for (int32_t i = 0; i < d->n_steps; i++) {
        if (d->steps[i].kind == DETOKENIZE_BYTE_FALLBACK) end_run(&r, i);
        if (d->steps[i].kind == DETOKENIZE_BYTE_LEVEL && s->held.length > 0) {
            text_clear(&s->held); /* an unfinished character is one ill-formed part */
            feed(&r, i + 1, "\xef\xbf\xbd", 3);
        }
    }
    TRY(finish(&r));
    detokenize_reset(s, d);
    return ST_OK;
}

status detokenize_bytes(const detokenizer *d, const char *token, size_t n, text *out) {
    for (int32_t i = 0; i < d->n_steps; i++) {
        const int32_t byte =
            d->steps[i].kind == DETOKENIZE_BYTE_FALLBACK ? fallback_byte(token, n) : -1;
        if (d->steps[i].kind == DETOKENIZE_BYTE_LEVEL) {
            hold_bytes(out, token, n);
            return text_status(out);
        }
        if (byte < 0) continue;
        text_bytes(out, &(char){(char)byte}, 1);
        return text_status(out);
    }
    detokenize_state s = {0};
    detokenize_reset(&s, d);
    detokenize_continue(&s);
    status st = detokenize_push(&s, d, token, n, out);
    if (st == ST_OK) st = detokenize_flush(&s, d, out);
    detokenize_close(&s);
    return st;
}
