/* pattern.c - see pattern.h.
 *
 * Easy to get wrong: PCRE2's own \s counts U+180E as a space, Oniguruma's does not; PCRE2's \w is
 * letters, all numbers and '_', Oniguruma's is Alphabetic, marks, decimal digits and connectors,
 * and outside a class six more of Latin-1 (compared over every code point assigned in Unicode 14).
 * Characters assigned later have no class here, for PCRE2 10.42 knows Unicode 14 only. */
#define PCRE2_CODE_UNIT_WIDTH 8
#include "pattern.h"

#include <pcre2.h>
#include <string.h>

struct pattern {
    pcre2_general_context *memory; /* so that allocation failures can be planned here as well */
    pcre2_match_context *limits;
    pcre2_code *code;
};

static void *give(size_t bytes, void *unused) {
    (void)unused;
    return mem_resize(NULL, bytes, 1);
}

static void take(void *p, void *unused) {
    (void)unused;
    mem_free(p);
}

/* --- Oniguruma to PCRE2 ----------------------------------------------------------------------- */

/* Members of a class: White_Space, all others, and Oniguruma's \w, in general categories and
 * ranges, since PCRE2 knows the names of properties from 10.40 on only. Each begins and ends with a
 * category, beside which a '-' of the class is no range. */
#define SPACE "\\p{Zs}\\t-\\r\\x85\\p{Z}"
#define NO_SPACE                                                                                   \
    "\\p{L}\\x00-\\x08\\x0e-\\x1f\\x7f-\\x84\\x86-\\x9f\\p{M}\\p{N}\\p{P}\\p{S}\\p{Cf}"            \
    "\\p{Co}\\p{Cn}"
#define WORD                                                                                       \
    "\\p{L}\\p{Nl}\\x{24b6}-\\x{24e9}\\x{1f130}-\\x{1f149}\\x{1f150}-\\x{1f169}"                   \
    "\\x{1f170}-\\x{1f189}\\p{M}\\p{Nd}\\p{Pc}"

/* Append the translation of the escape \c; false when it has none. */
static bool translate_escape(text *out, char c, bool in_class) {
    /* Outside a class Oniguruma's Latin-1 table decides, which has superscripts and fractions. */
    static const char latin[] = "\\xb2\\xb3\\xb9\\xbc-\\xbe";
    switch (c) {
    case 's': text_add(out, in_class ? SPACE : "[" SPACE "]"); return true;
    case 'S': text_add(out, in_class ? NO_SPACE : "[^" SPACE "]"); return true;
    case 'w': text_add(out, in_class ? "%s" : "[%s%s]", WORD, latin); return true;
    case 'h': text_add(out, in_class ? "0-9a-fA-F" : "[0-9a-fA-F]"); return true;
    case 'W':
    case 'H':
        if (in_class) return false;
        if (c == 'W') text_add(out, "[^%s%s]", WORD, latin);
        if (c == 'H') text_add(out, "[^0-9a-fA-F]");
        return true;
    case 'v': text_add(out, "\\x0b"); return true;
    default: /* the same in both: classes, controls, code points, anchors, punctuation */
        if (((c >= '0' && c <= '9') || (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z')) &&
            !strchr("dDpPtnrfaexAzZ", c))
            return false;
        text_add(out, "\\%c", c);
        return true;
    }
}

static status translate(text *out, const char *p, size_t n) {
    bool in_class = false;
    size_t class_at = 0; /* first character of the class, where ']' is a letter */
    for (size_t i = 0; i < n; i++) {
        const char c = p[i];
        if (c == 0) return FAIL(ST_UNSUPPORTED, "regular expression with a zero byte");
        if (c == '\\') {
            if (i + 1 == n) return FAIL(ST_FORMAT, "regular expression ends in '\\'");
            if (!translate_escape(out, p[++i], in_class))
                return FAIL(ST_UNSUPPORTED, "regular expression with \\%c%s", p[i],
                            in_class ? " in a class" : "");
            continue;
        }
        if (!in_class && c == '[') {
            in_class = true;
            class_at = i + 1 + (i + 1 < n && p[i + 1] == '^');
        } else if (in_class && c == ']' && i > class_at) {
            in_class = false;
        } else if (in_class && c == '[') { /* [:name:] as well: the engines' tables differ */
            return FAIL(ST_UNSUPPORTED, "regular expression with a class inside a class");
        } else if (in_class && c == '&' && i + 1 < n && p[i + 1] == '&') {
            return FAIL(ST_UNSUPPORTED, "regular expression with && in a class");
        } else if (!in_class && c == '(' && i + 2 < n && p[i + 1] == '?' &&
                   strchr("mx", p[i + 2])) {
            return FAIL(ST_UNSUPPORTED, "regular expression with (?%c", p[i + 2]);
        }
        text_bytes(out, &c, 1);
    }
    return text_status(out);
}

/* --- Compiling -------------------------------------------------------------------------------- */

static status compile(pattern *p, const char *source, size_t n, bool literal) {
    int code;
    size_t at;
    /* Ruby's ^ and $ are line anchors; a literal allows no other option than UTF. */
    const uint32_t options =
        literal ? PCRE2_UTF | PCRE2_LITERAL
                : PCRE2_UTF | PCRE2_UCP | PCRE2_MULTILINE | PCRE2_NEVER_BACKSLASH_C;
    pcre2_compile_context *context = pcre2_compile_context_create(p->memory);
    if (!context) return FAIL(ST_NOMEM, "regular expression");
    pcre2_set_newline(context, PCRE2_NEWLINE_LF);
    p->code = pcre2_compile((PCRE2_SPTR)source, n, options, &code, &at, context);
    pcre2_compile_context_free(context);
    if (!p->code) {
        char why[128] = "";
        pcre2_get_error_message(code, (PCRE2_UCHAR *)why, sizeof why);
        if (code == PCRE2_ERROR_HEAP_FAILED) return FAIL(ST_NOMEM, "regular expression: %s", why);
        return FAIL(ST_FORMAT, "regular expression, byte %zu: %s", at, why);
    }
    pcre2_jit_compile(p->code, PCRE2_JIT_COMPLETE); /* without it the same result, slower */
    return ST_OK;
}

status pattern_open(pattern **out, const char *source, size_t n, bool literal) {
    *out = NULL;
    pattern *p = mem_alloc(1, sizeof *p);
    if (!p) return FAIL(ST_NOMEM, "regular expression");
    text translated = {0};
    status st = literal ? ST_OK : translate(&translated, source, n);
    if (st == ST_OK) {
        p->memory = pcre2_general_context_create(give, take, NULL);
        p->limits = p->memory ? pcre2_match_context_create(p->memory) : NULL;
        if (!p->limits) st = FAIL(ST_NOMEM, "regular expression");
    }
    if (st == ST_OK)
        st = literal ? compile(p, source, n, true)
                     : compile(p, translated.data ? translated.data : "", translated.length, false);
    text_free(&translated);
    if (st != ST_OK) {
        pattern_close(p);
        return st;
    }
    /* Ten times PCRE2's default: a run of 10 MB of blanks is a legal, if odd, prompt. */
    pcre2_set_match_limit(p->limits, 100 * 1000 * 1000);
    *out = p;
    return ST_OK;
}

status pattern_from_json(pattern **out, const json_t *spec) {
    *out = NULL;
    const json_t *regex = json_find(spec, "Regex"), *string = json_find(spec, "String");
    const json_t *source = regex ? regex : string;
    if (!json_is_string(source) || (regex && string))
        return FAIL(ST_FORMAT, "'pattern' is neither {\"Regex\": ...} nor {\"String\": ...}");
    return pattern_open(out, json_string_value(source), json_string_length(source), !regex);
}

void pattern_close(pattern *p) {
    if (!p) return;
    pcre2_code_free(p->code);
    pcre2_match_context_free(p->limits);
    pcre2_general_context_free(p->memory);
    mem_free(p);
}

/* --- Walking ---------------------------------------------------------------------------------- */

status pattern_walk_open(pattern_walk *w, const pattern *p, const char *data, size_t n) {
    *w = (pattern_walk){.p = p, .data = data, .n = n, .match_end = SIZE_MAX};
    w->room = pcre2_match_data_create(1, p->memory);
    return w->room ? ST_OK : FAIL(ST_NOMEM, "regular expression");
}

void pattern_walk_close(pattern_walk *w) {
    pcre2_match_data_free(w->room);
    w->room = NULL;
}

static size_t char_length(const char *p) {
    const uint8_t lead = (uint8_t)*p;
    return lead < 0x80 ? 1 : lead < 0xe0 ? 2 : lead < 0xf0 ? 3 : 4;
}

status pattern_walk_next(pattern_walk *w, bool *found, size_t *start, size_t *end) {
    *found = false;
    while (w->at <= w->n) {
        const PCRE2_SPTR subject = (PCRE2_SPTR)w->data;
        int rc = pcre2_match(w->p->code, subject, w->n, w->at, PCRE2_NO_UTF_CHECK, w->room,
                             w->p->limits);
        if (rc == PCRE2_ERROR_JIT_STACKLIMIT)
            rc = pcre2_match(w->p->code, subject, w->n, w->at, PCRE2_NO_UTF_CHECK | PCRE2_NO_JIT,
                             w->room, w->p->limits);
        if (rc == PCRE2_ERROR_NOMATCH) {
            w->at = w->n + 1;
            return ST_OK;
        }
        if (rc == PCRE2_ERROR_NOMEMORY) return FAIL(ST_NOMEM, "regular expression");
        if (rc < 0) {
            char why[128] = "";
            pcre2_get_error_message(rc, (PCRE2_UCHAR *)why, sizeof why);
            return FAIL(ST_RANGE, "regular expression gave up at byte %zu: %s", w->at, why);
        }
        const size_t *bounds = pcre2_get_ovector_pointer(w->room);
        const size_t a = bounds[0], b = bounds[1];
        if (b < a || a < w->at) /* \K in a look-around: no tokeniser has a use for it */
            return FAIL(ST_UNSUPPORTED, "regular expression that matches backwards");
        if (a == b && w->match_end == b) {
            w->at += w->at < w->n ? char_length(w->data + w->at) : 1;
            continue;
        }
        w->at = w->match_end = b;
        *found = true;
        *start = a;
        *end = b;
        return ST_OK;
    }
    return ST_OK;
}
