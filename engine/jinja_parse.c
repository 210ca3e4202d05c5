/* jinja_parse.c - source of a chat template to its syntax tree.
 *
 * Tokens are made on demand, in two states: text up to the next "{{", "{%" or "{#", and what stands
 * inside a tag. Operator precedence is that of jinja2's parser, one function a level. */
#include "jinja.h"

#include "chat_template.h"
#include "utf8.h"

#include <stdlib.h>
#include <string.h>

enum { NESTING_MAX = 100, LIST_MAX = 1024 };

typedef enum {
    TOKEN_END,
    TOKEN_TEXT,
    TOKEN_OPEN_OUTPUT, /* {{ */
    TOKEN_OPEN_BLOCK,  /* {% */
    TOKEN_CLOSE,       /* }} or %} */
    TOKEN_NAME,
    TOKEN_STRING,
    TOKEN_INT,
    TOKEN_FLOAT,
    TOKEN_OPERATOR /* op holds the characters: '(' or '=' * 256 + '=' */
} token_kind;

typedef struct {
    token_kind kind;
    const char *s; /* text, name, or decoded string */
    size_t n;
    int32_t op, line;
    int64_t i;
    double f;
} token;

typedef struct {
    const char *p, *end, *where;
    arena *memory;
    int32_t line, depth;
    bool inside;       /* of a tag */
    bool output;       /* the tag is {{ }} */
    bool strip_next;   /* the tag that ended wants the white space behind it gone */
    bool newline_next; /* …or (trim_blocks) one newline */
    bool line_start;   /* the text that begins here begins a line */
    int32_t brackets;  /* open ones: "}}" inside a dict is no end */
    token at;          /* the current token */
    int32_t loops;     /* open for loops: break and continue are allowed */
} parser;

#define REFUSE(p, st, ...)                                                                         \
    fail_prefix(FAIL(st, __VA_ARGS__), "chat template %s:%d", (p)->where, (p)->at.line)

/* --- Tokens ----------------------------------------------------------------------------------- */

static void count_lines(parser *p, const char *from, const char *to) {
    for (; from < to; from++) p->line += *from == '\n';
}

static bool is_blank(char c) { return c == ' ' || (c >= '\t' && c <= '\r'); }
static bool is_letter(char c) {
    return (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || c == '_';
}
static bool is_digit(char c) { return c >= '0' && c <= '9'; }

static void after_tag(parser *p, char mark, bool trim) {
    p->strip_next = mark == '-';
    p->newline_next = mark != '-' && mark != '+' && trim;
    p->line_start = false;
}

/* Skip "{# … #}"; p->p stands behind "{#". */
static status skip_comment(parser *p) {
    const char *q = p->p;
    while (q + 1 < p->end && !(q[0] == '#' && q[1] == '}')) q++;
    p->at.line = p->line;
    if (q + 1 >= p->end) return REFUSE(p, ST_FORMAT, "comment without an end");
    const char mark = q > p->p ? q[-1] : 0;
    count_lines(p, p->p, q);
    p->p = q + 2;
    after_tag(p, mark, true);
    return ST_OK;
}

/* What the end of the last tag takes from the text at p->p. */
static void trim_front(parser *p) {
    if (p->strip_next) {
        const char *from = p->p;
        while (p->p < p->end && is_blank(*p->p)) p->p++;
        count_lines(p, from, p->p);
        if (p->p > from) p->line_start = p->p[-1] == '\n';
    } else if (p->newline_next && p->p < p->end && *p->p == '\n') {
        p->p++;
        p->line++;
        p->line_start = true;
    }
    p->strip_next = p->newline_next = false;
}

/* Text up to the next tag, then the tag's opening. */
static status lex_outside(parser *p) {
    for (;;) {
        trim_front(p);
        const char *from = p->p, *q = from;
        while (q < p->end &&
               !(q[0] == '{' && q + 1 < p->end && (q[1] == '{' || q[1] == '%' || q[1] == '#')))
            q++;
        const bool tag = q < p->end;
        const char kind = tag ? q[1] : 0, mark = tag && q + 2 < p->end ? q[2] : 0;
        const char *to = q;
        if (mark == '-') {
            while (to > from && is_blank(to[-1])) to--;
        } else if (tag && mark != '+' && kind != '{') { /* lstrip_blocks */
            const char *start = q;
            while (start > from && is_blank(start[-1]) && start[-1] != '\n') start--;
            if (start > from ? start[-1] == '\n' : p->line_start) to = start;
        }
        if (to > from) {
            p->at =
                (token){.kind = TOKEN_TEXT, .s = from, .n = (size_t)(to - from), .line = p->line};
            count_lines(p, from, q);
            p->p = q;
            p->line_start = false;
            return ST_OK;
        }
        count_lines(p, from, q);
        p->p = q;
        if (!tag) {
            p->at = (token){.kind = TOKEN_END, .line = p->line};
            return ST_OK;
        }
        p->p += mark == '-' || (mark == '+' && kind != '{') ? 3 : 2;
        if (kind == '#') {
            TRY(skip_comment(p));
            continue;
        }
        p->inside = true;
        p->output = kind == '{';
        p->brackets = 0;
        p->at = (token){.kind = p->output ? TOKEN_OPEN_OUTPUT : TOKEN_OPEN_BLOCK, .line = p->line};
        return ST_OK;
    }
}

static status hex_escape(parser *p, const char **at, const char *end, int32_t digits, text *out) {
    uint32_t code = 0;
    for (int32_t i = 0; i < digits; i++, (*at)++) {
        const char c = *at < end ? **at : 0;
        const int32_t v = is_digit(c)            ? c - '0'
                          : c >= 'a' && c <= 'f' ? c - 'a' + 10
                          : c >= 'A' && c <= 'F' ? c - 'A' + 10
                                                 : -1;
        if (v < 0) return REFUSE(p, ST_FORMAT, "ill-formed escape in a string");
        code = code * 16 + (uint32_t)v;
    }
    if (code > 0x10FFFF || (code >= 0xD800 && code <= 0xDFFF))
        return REFUSE(p, ST_FORMAT, "escape of U+%X, which is no character", code);
    utf8_put(out, code);
    return ST_OK;
}

static status decode_string(parser *p, const char *s, const char *end, text *out) {
    static const char letters[] = "n\nt\tr\r\\\\'\'\"\"a\ab\bf\fv\v";
    while (s < end) {
        const char *slash = memchr(s, '\\', (size_t)(end - s));
        text_bytes(out, s, (size_t)((slash ? slash : end) - s));
        if (!slash) break;
        const char c = slash[1]; /* the lexer saw a character after every backslash */
        s = slash + 2;
        const char *known = NULL;
        for (const char *k = letters; *k && !known; k += 2)
            if (*k == c) known = k + 1;
        if (known) {
            text_bytes(out, known, 1);
        } else if (c == '\n') {
            continue;
        } else if (c == 'x' || c == 'u' || c == 'U') {
            TRY(hex_escape(p, &s, end, c == 'x' ? 2 : c == 'u' ? 4 : 8, out));
        } else if (is_digit(c)) {
            return REFUSE(p, ST_UNSUPPORTED, "octal escape \\%c in a string", c);
        } else {
            text_bytes(out, slash, 2);
        }
    }
    return text_status(out);
}

static status lex_string(parser *p) {
    const char quote = *p->p, *from = p->p + 1, *q = from;
    while (q < p->end && *q != quote) q += *q == '\\' ? 2 : 1;
    if (q >= p->end) return REFUSE(p, ST_FORMAT, "string without an end");
    text decoded = {0};
    status st = decode_string(p, from, q, &decoded);
    p->at.kind = TOKEN_STRING;
    p->at.n = decoded.length;
    p->at.s = st == ST_OK
                  ? arena_string(p->memory, decoded.data ? decoded.data : "", decoded.length)
                  : "";
    text_free(&decoded);
    TRY(st);
    if (!p->at.s) return FAIL(ST_NOMEM, "chat template");
    count_lines(p, p->p, q);
    p->p = q + 1;
    return ST_OK;
}

static status lex_number(parser *p) {
    char digits[64];
    size_t n = 0;
    const char *q = p->p;
    bool real = false;
    for (; q < p->end && n + 1 < sizeof digits; q++) {
        if (*q == '_') continue;
        const bool dot = *q == '.' && !real && q + 1 < p->end && is_digit(q[1]);
        const bool exponent =
            (*q == 'e' || *q == 'E') && q + 1 < p->end &&
            (is_digit(q[1]) || ((q[1] == '-' || q[1] == '+') && q + 2 < p->end && is_digit(q[2])));
        const bool sign = (*q == '-' || *q == '+') && (q[-1] == 'e' || q[-1] == 'E');
        if (!is_digit(*q) && !dot && !exponent && !sign) break;
        real |= dot || exponent;
        digits[n++] = *q;
    }
    digits[n] = 0;
    p->p = q;
    if (real) {
        p->at.kind = TOKEN_FLOAT;
        if (!parse_f64(digits, -1e308, 1e308, &p->at.f))
            return REFUSE(p, ST_FORMAT, "'%s' is no number", digits);
    } else {
        p->at.kind = TOKEN_INT;
        if (!parse_i64(digits, 0, INT64_MAX, &p->at.i))
            return REFUSE(p, ST_FORMAT, "'%s' is no integer of 63 bits", digits);
    }
    return ST_OK;
}

/* "}}", "-}}", "%}", …: true when the tag ends here. */
static bool lex_close(parser *p) {
    const char *q = p->p;
    const char first = p->output ? '}' : '%';
    if (p->output && p->brackets > 0) return false;
    const char mark = *q == '-' || (*q == '+' && !p->output) ? *q : 0;
    if (mark) q++;
    if (q + 1 >= p->end || q[0] != first || q[1] != '}') return false;
    p->p = q + 2;
    p->inside = false;
    p->at.kind = TOKEN_CLOSE;
    after_tag(p, mark, !p->output);
    return true;
}

static status lex_inside(parser *p) {
    while (p->p < p->end && is_blank(*p->p)) p->line += *p->p++ == '\n';
    p->at = (token){.line = p->line};
    if (p->p >= p->end) return REFUSE(p, ST_FORMAT, "tag without an end");
    if (lex_close(p)) return ST_OK;
    const char c = *p->p, next = p->p + 1 < p->end ? p->p[1] : 0;
    if (is_letter(c)) {
        p->at.kind = TOKEN_NAME;
        p->at.s = p->p;
        while (p->p < p->end && (is_letter(*p->p) || is_digit(*p->p))) p->p++;
        p->at.n = (size_t)(p->p - p->at.s);
        return ST_OK;
    }
    if (is_digit(c)) return lex_number(p);
    if (c == '"' || c == '\'') return lex_string(p);
    p->at.kind = TOKEN_OPERATOR;
    const bool two = (next == '=' && c && strchr("=!<>", c)) || (c == '/' && next == '/') ||
                     (c == '*' && next == '*');
    if (c == '*' && next == '*') return REFUSE(p, ST_UNSUPPORTED, "operator '**'");
    if (!two && (!c || !strchr("()[]{}.,:|~+-*/%=<>", c))) {
        if (c > ' ' && c < 127) return REFUSE(p, ST_FORMAT, "unexpected character '%c'", c);
        return REFUSE(p, ST_FORMAT, "unexpected byte 0x%02x", (unsigned)(unsigned char)c);
    }
    p->at.op = two ? c * 256 + next : c;
    if (c == '(' || c == '[' || c == '{') p->brackets++;
    if ((c == ')' || c == ']' || c == '}') && p->brackets > 0) p->brackets--;
    p->p += two ? 2 : 1;
    return ST_OK;
}

static status advance(parser *p) { return p->inside ? lex_inside(p) : lex_outside(p); }

static bool is_op(const parser *p, int32_t op) {
    return p->at.kind == TOKEN_OPERATOR && p->at.op == op;
}
static bool is_word(const parser *p, const char *word) {
    return p->at.kind == TOKEN_NAME && p->at.n == strlen(word) &&
           memcmp(p->at.s, word, p->at.n) == 0;
}

/* How the current token reads in a message. */
static const char *shown(const parser *p, char buf[48]) {
    const token *t = &p->at;
    switch (t->kind) {
    case TOKEN_END: return "the end of the template";
    case TOKEN_TEXT: return "text";
    case TOKEN_OPEN_OUTPUT: return "'{{'";
    case TOKEN_OPEN_BLOCK: return "'{%'";
    case TOKEN_CLOSE: return "the end of the tag";
    case TOKEN_STRING: return "a string";
    case TOKEN_INT:
    case TOKEN_FLOAT: return "a number";
    case TOKEN_NAME: snprintf(buf, 48, "'%.*s'", t->n < 40 ? (int)t->n : 40, t->s); return buf;
    case TOKEN_OPERATOR:
        if (t->op > 255)
            snprintf(buf, 48, "'%c%c'", t->op / 256, t->op % 256);
        else
            snprintf(buf, 48, "'%c'", t->op);
        return buf;
    }
    return "";
}

static status unexpected(parser *p, const char *wanted) {
    char buf[48];
    return REFUSE(p, ST_FORMAT, "%s instead of %s", shown(p, buf), wanted);
}

static status expect_op(parser *p, char op) {
    const char wanted[4] = {'\'', op, '\'', 0};
    if (!is_op(p, op)) return unexpected(p, wanted);
    return advance(p);
}

/* --- Nodes ------------------------------------------------------------------------------------ */

static status make(parser *p, jinja_node_kind kind, jinja_node **out) {
    *out = arena_array(p->memory, jinja_node, 1);
    if (!*out) return FAIL(ST_NOMEM, "chat template %s", p->where);
    (*out)->kind = kind;
    (*out)->line = p->at.line;
    return ST_OK;
}

/* A node around the one that was read so far, as its first operand. */
static status wrap(parser *p, jinja_node_kind kind, jinja_node **node, jinja_node **out) {
    TRY(make(p, kind, out));
    (*out)->a = *node;
    *node = *out;
    return ST_OK;
}

/* A list that grows while it is parsed; done() puts it into the arena. */
typedef struct {
    jinja_node *item[LIST_MAX], *other[LIST_MAX];
    const char *key[LIST_MAX];
    int32_t n;
} growing;

static status push(parser *p, growing *g, const char *key, jinja_node *item, jinja_node *other) {
    if (g->n == LIST_MAX) return REFUSE(p, ST_RANGE, "a list of more than %d", LIST_MAX);
    g->key[g->n] = key;
    g->item[g->n] = item;
    g->other[g->n++] = other;
    return ST_OK;
}

static status done(parser *p, growing *g, jinja_node *n) {
    const size_t count = (size_t)g->n, at_least = count ? count : 1;
    n->n_list = g->n;
    n->list = arena_array(p->memory, jinja_node *, at_least);
    n->arg = arena_array(p->memory, jinja_node *, at_least);
    n->key = arena_array(p->memory, const char *, at_least);
    if (!n->list || !n->arg || !n->key) return FAIL(ST_NOMEM, "chat template %s", p->where);
    memcpy(n->list, g->item, count * sizeof *n->list);
    memcpy(n->arg, g->other, count * sizeof *n->arg);
    memcpy(n->key, g->key, count * sizeof *n->key);
    return ST_OK;
}

static growing *open_list(void) { return mem_alloc(1, sizeof(growing)); }

/* --- Expressions ------------------------------------------------------------------------------ */

static status parse_expression(parser *p, jinja_node **out);
static status parse_unary(parser *p, bool filters, jinja_node **out);
static status parse_primary(parser *p, jinja_node **out);
static status parse_postfix(parser *p, jinja_node **node);

static status enter(parser *p) {
    if (++p->depth > NESTING_MAX) return REFUSE(p, ST_RANGE, "nested deeper than %d", NESTING_MAX);
    return ST_OK;
}

/* The current name as an arena string. */
static status take_name(parser *p, const char **name, uint32_t *n) {
    if (p->at.kind != TOKEN_NAME) return unexpected(p, "a name");
    *name = arena_string(p->memory, p->at.s, p->at.n);
    if (!*name) return FAIL(ST_NOMEM, "chat template %s", p->where);
    if (n) *n = (uint32_t)p->at.n;
    return advance(p);
}

/* "(a, b, key=c)" into n->list and n->key; the current token is "(". */
static status parse_items(parser *p, growing *g) {
    TRY(advance(p));
    while (!is_op(p, ')')) {
        jinja_node *item;
        const char *key = NULL;
        if (is_op(p, '*')) return REFUSE(p, ST_UNSUPPORTED, "argument list '*'");
        TRY(parse_expression(p, &item));
        if (is_op(p, '=') && item->kind == JINJA_NAME) {
            key = item->s;
            TRY(advance(p));
            TRY(parse_expression(p, &item));
        } else if (g->n && g->key[g->n - 1]) {
            return REFUSE(p, ST_FORMAT, "positional argument after a keyword");
        }
        TRY(push(p, g, key, item, NULL));
        if (!is_op(p, ',')) break;
        TRY(advance(p));
    }
    return expect_op(p, ')');
}

static status parse_arguments(parser *p, jinja_node *n) {
    growing *g = open_list();
    if (!g) return FAIL(ST_NOMEM, "chat template %s", p->where);
    status st = parse_items(p, g);
    if (st == ST_OK) st = done(p, g, n);
    mem_free(g);
    return st;
}

static status parse_pairs(parser *p, growing *g) {
    while (!is_op(p, '}')) {
        jinja_node *key, *value;
        TRY(parse_expression(p, &key));
        TRY(expect_op(p, ':'));
        TRY(parse_expression(p, &value));
        TRY(push(p, g, NULL, key, value));
        if (!is_op(p, ',')) break;
        TRY(advance(p));
    }
    return expect_op(p, '}');
}

static status parse_sequence(parser *p, growing *g, char close) {
    while (!is_op(p, close)) {
        jinja_node *item;
        TRY(parse_expression(p, &item));
        TRY(push(p, g, NULL, item, NULL));
        if (!is_op(p, ',')) break;
        TRY(advance(p));
    }
    return expect_op(p, close);
}

/* "[…]", "{…}": the opening is the current token. */
static status parse_literal(parser *p, jinja_node **out) {
    const bool pairs = is_op(p, '{');
    TRY(make(p, pairs ? JINJA_MAP : JINJA_SEQ, out));
    TRY(advance(p));
    growing *g = open_list();
    if (!g) return FAIL(ST_NOMEM, "chat template %s", p->where);
    status st = pairs ? parse_pairs(p, g) : parse_sequence(p, g, ']');
    if (st == ST_OK) st = done(p, g, *out);
    mem_free(g);
    return st;
}

/* "(a)" is a; "(a,)" and "()" are tuples. */
static status parse_parenthesis(parser *p, jinja_node **out) {
    jinja_node *seq;
    TRY(make(p, JINJA_SEQ, &seq));
    seq->op = 1;
    TRY(advance(p));
    if (!is_op(p, ')')) {
        TRY(parse_expression(p, out));
        if (is_op(p, ')')) return advance(p);
        TRY(expect_op(p, ','));
    } else {
        *out = NULL;
    }
    growing *g = open_list();
    if (!g) return FAIL(ST_NOMEM, "chat template %s", p->where);
    status st = *out ? push(p, g, NULL, *out, NULL) : ST_OK;
    if (st == ST_OK) st = parse_sequence(p, g, ')');
    if (st == ST_OK) st = done(p, g, seq);
    mem_free(g);
    *out = seq;
    return st;
}

static status parse_strings(parser *p, jinja_node *n) {
    text all = {0};
    status st = ST_OK;
    while (st == ST_OK && p->at.kind == TOKEN_STRING) { /* "a" "b" is "ab" */
        text_bytes(&all, p->at.s, p->at.n);
        st = advance(p);
    }
    if (st == ST_OK) st = text_status(&all);
    if (st == ST_OK) {
        const char *s = arena_string(p->memory, all.data ? all.data : "", all.length);
        if (!s) st = FAIL(ST_NOMEM, "chat template %s", p->where);
        n->value = jinja_string(s, all.length);
    }
    text_free(&all);
    return st;
}

static status parse_primary(parser *p, jinja_node **out) {
    if (is_op(p, '[') || is_op(p, '{')) return parse_literal(p, out);
    if (is_op(p, '(')) return parse_parenthesis(p, out);
    TRY(make(p, JINJA_CONST, out));
    jinja_node *n = *out;
    switch (p->at.kind) {
    case TOKEN_STRING: return parse_strings(p, n);
    case TOKEN_INT: n->value = jinja_int(p->at.i); return advance(p);
    case TOKEN_FLOAT:
        n->value = (jinja_value){.kind = JINJA_FLOAT, .f = p->at.f};
        return advance(p);
    case TOKEN_NAME: break;
    default: return unexpected(p, "an expression");
    }
    if (is_word(p, "true") || is_word(p, "True")) {
        n->value = jinja_bool(true);
    } else if (is_word(p, "false") || is_word(p, "False")) {
        n->value = jinja_bool(false);
    } else if (is_word(p, "none") || is_word(p, "None")) {
        n->value = (jinja_value){.kind = JINJA_NONE};
    } else {
        n->kind = JINJA_NAME;
        return take_name(p, &n->s, &n->n);
    }
    return advance(p);
}

/* "[expr]" or "[a:b:c]"; the current token is "[". */
static status parse_subscript(parser *p, jinja_node **node) {
    jinja_node *n, *bound[3] = {NULL, NULL, NULL};
    TRY(wrap(p, JINJA_ITEM, node, &n));
    TRY(advance(p));
    int32_t colons = 0;
    for (;;) {
        if (is_op(p, ':')) {
            if (++colons > 2) return unexpected(p, "']'");
            TRY(advance(p));
        } else if (is_op(p, ']')) {
            break;
        } else if (bound[colons]) {
            return unexpected(p, "']'");
        } else {
            TRY(parse_expression(p, &bound[colons]));
        }
    }
    if (!colons) {
        if (!bound[0]) return unexpected(p, "an expression");
        n->b = bound[0];
        return advance(p);
    }
    n->kind = JINJA_SLICE;
    n->list = arena_array(p->memory, jinja_node *, 3);
    if (!n->list) return FAIL(ST_NOMEM, "chat template %s", p->where);
    memcpy(n->list, bound, sizeof bound);
    n->n_list = 3;
    return advance(p);
}

static status parse_dot(parser *p, jinja_node **node) {
    jinja_node *n;
    TRY(wrap(p, JINJA_ATTR, node, &n));
    TRY(advance(p));
    if (p->at.kind == TOKEN_INT) {
        n->kind = JINJA_ITEM;
        TRY(make(p, JINJA_CONST, &n->b));
        n->b->value = jinja_int(p->at.i);
        return advance(p);
    }
    return take_name(p, &n->s, &n->n);
}

static status parse_call(parser *p, jinja_node **node) {
    jinja_node *n;
    TRY(wrap(p, JINJA_CALL, node, &n));
    if (n->a->kind == JINJA_ATTR && jinja_find_method(n->a->s, n->a->n) < 0)
        return REFUSE(p, ST_UNSUPPORTED, "method '%s'", n->a->s);
    return parse_arguments(p, n);
}

static status parse_postfix(parser *p, jinja_node **node) {
    for (;;) {
        if (is_op(p, '.'))
            TRY(parse_dot(p, node));
        else if (is_op(p, '['))
            TRY(parse_subscript(p, node));
        else if (is_op(p, '('))
            TRY(parse_call(p, node));
        else
            return ST_OK;
    }
}

/* The name of a filter or test is the current token. */
static status parse_filter(parser *p, jinja_node **node) {
    jinja_node *n;
    TRY(wrap(p, JINJA_FILTER, node, &n));
    TRY(take_name(p, &n->s, &n->n));
    n->op = jinja_find_filter(n->s, n->n);
    if (n->op < 0) return REFUSE(p, ST_UNSUPPORTED, "filter '%s'", n->s);
    return is_op(p, '(') ? parse_arguments(p, n) : ST_OK;
}

static bool begins_argument(const parser *p) {
    switch (p->at.kind) {
    case TOKEN_STRING:
    case TOKEN_INT:
    case TOKEN_FLOAT: return true;
    case TOKEN_OPERATOR: return p->at.op == '[' || p->at.op == '{';
    case TOKEN_NAME:
        return !is_word(p, "else") && !is_word(p, "or") && !is_word(p, "and") &&
               !is_word(p, "if") && !is_word(p, "is") && !is_word(p, "in") && !is_word(p, "not");
    default: return false;
    }
}

/* "is not name arg": "is" was read. */
static status parse_test(parser *p, jinja_node **node) {
    jinja_node *n, *negation;
    TRY(wrap(p, JINJA_TEST, node, &n));
    if (is_word(p, "not")) {
        TRY(wrap(p, JINJA_NOT, node, &negation));
        TRY(advance(p));
    }
    TRY(take_name(p, &n->s, &n->n));
    n->op = jinja_find_test(n->s, n->n);
    if (n->op < 0) return REFUSE(p, ST_UNSUPPORTED, "test '%s'", n->s);
    if (is_op(p, '(')) return parse_arguments(p, n);
    if (!begins_argument(p)) return ST_OK;
    n->n_list = 1;
    n->list = arena_array(p->memory, jinja_node *, 1);
    n->key = arena_array(p->memory, const char *, 1);
    if (!n->list || !n->key) return FAIL(ST_NOMEM, "chat template %s", p->where);
    TRY(parse_primary(p, &n->list[0]));
    return parse_postfix(p, &n->list[0]);
}

static status parse_unary(parser *p, bool filters, jinja_node **out) {
    TRY(enter(p));
    if (is_op(p, '-') || is_op(p, '+')) {
        const bool negative = is_op(p, '-');
        jinja_node *inner;
        TRY(make(p, JINJA_NEG, out));
        TRY(advance(p));
        TRY(parse_unary(p, false, &inner));
        (*out)->a = inner;
        if (!negative) *out = inner;
    } else {
        TRY(parse_primary(p, out));
    }
    TRY(parse_postfix(p, out));
    while (filters) {
        if (is_op(p, '|')) {
            TRY(advance(p));
            TRY(parse_filter(p, out));
        } else if (is_word(p, "is")) {
            TRY(advance(p));
            TRY(parse_test(p, out));
        } else if (is_op(p, '(')) {
            TRY(parse_call(p, out));
        } else {
            break;
        }
    }
    p->depth--;
    return ST_OK;
}

/* Left-associative levels: 0 = "* / // %", 1 = "~", 2 = "+ -". */
static status parse_level(parser *p, int32_t level, jinja_node **out) {
    if (level < 0) return parse_unary(p, true, out);
    TRY(parse_level(p, level - 1, out));
    for (;;) {
        const bool here = level == 0 ? is_op(p, '*') || is_op(p, '/') || is_op(p, '%') ||
                                           is_op(p, '/' * 256 + '/')
                          : level == 1 ? is_op(p, '~')
                                       : is_op(p, '+') || is_op(p, '-');
        if (!here) return ST_OK;
        jinja_node *n;
        TRY(wrap(p, JINJA_BINARY, out, &n));
        n->op = p->at.op;
        TRY(advance(p));
        TRY(parse_level(p, level - 1, &n->b));
    }
}

static status comparison(parser *p, int32_t *op) {
    static const struct {
        int32_t spelt, op;
    } ops[] = {{'=' * 256 + '=', JINJA_EQ},
               {'!' * 256 + '=', JINJA_NE},
               {'<', JINJA_LT},
               {'<' * 256 + '=', JINJA_LE},
               {'>', JINJA_GT},
               {'>' * 256 + '=', JINJA_GE}};
    *op = -1;
    for (int32_t i = 0; i < COUNT_OF(ops); i++)
        if (is_op(p, ops[i].spelt)) *op = ops[i].op;
    if (is_word(p, "in")) *op = JINJA_IN;
    if (*op >= 0) return advance(p);
    if (!is_word(p, "not")) return ST_OK;
    *op = JINJA_NOT_IN; /* behind an operand, "not" can only begin "not in" */
    TRY(advance(p));
    if (!is_word(p, "in")) return unexpected(p, "'in'");
    return advance(p);
}

static status parse_compare(parser *p, jinja_node **out) {
    enum { CHAIN_MAX = 16 };
    TRY(parse_level(p, 2, out));
    jinja_node *item[CHAIN_MAX + 1] = {*out}, *n;
    uint8_t cmp[CHAIN_MAX];
    int32_t links = 0, op;
    TRY(make(p, JINJA_COMPARE, &n));
    TRY(comparison(p, &op));
    for (; op >= 0; links++) {
        if (links == CHAIN_MAX) return REFUSE(p, ST_RANGE, "more than %d comparisons", CHAIN_MAX);
        cmp[links] = (uint8_t)op;
        TRY(parse_level(p, 2, &item[links + 1]));
        TRY(comparison(p, &op));
    }
    if (!links) return ST_OK;
    n->n_list = links + 1;
    n->list = arena_array(p->memory, jinja_node *, (size_t)links + 1);
    n->cmp = arena_array(p->memory, uint8_t, (size_t)links);
    if (!n->list || !n->cmp) return FAIL(ST_NOMEM, "chat template %s", p->where);
    memcpy(n->list, item, ((size_t)links + 1) * sizeof *item);
    memcpy(n->cmp, cmp, (size_t)links);
    *out = n;
    return ST_OK;
}

static status parse_not(parser *p, jinja_node **out) {
    if (!is_word(p, "not")) return parse_compare(p, out);
    TRY(enter(p));
    TRY(make(p, JINJA_NOT, out));
    TRY(advance(p));
    TRY(parse_not(p, &(*out)->a));
    p->depth--;
    return ST_OK;
}

/* Left-associative levels: 0 = "and", 1 = "or". */
static status parse_logic(parser *p, int32_t level, jinja_node **out) {
    if (level < 0) return parse_not(p, out);
    TRY(parse_logic(p, level - 1, out));
    while (is_word(p, level ? "or" : "and")) {
        jinja_node *n;
        TRY(wrap(p, level ? JINJA_OR : JINJA_AND, out, &n));
        TRY(advance(p));
        TRY(parse_logic(p, level - 1, &n->b));
    }
    return ST_OK;
}

static status parse_expression(parser *p, jinja_node **out) {
    TRY(enter(p));
    TRY(parse_logic(p, 1, out));
    while (is_word(p, "if")) {
        jinja_node *n;
        TRY(wrap(p, JINJA_COND, out, &n));
        TRY(advance(p));
        TRY(parse_logic(p, 1, &n->b));
        if (!is_word(p, "else")) continue;
        TRY(advance(p));
        TRY(parse_expression(p, &n->c));
    }
    p->depth--;
    return ST_OK;
}

/* "a, b" without brackets is a tuple. */
static status parse_tuple(parser *p, jinja_node **out) {
    TRY(parse_expression(p, out));
    if (!is_op(p, ',')) return ST_OK;
    jinja_node *seq;
    TRY(make(p, JINJA_SEQ, &seq));
    seq->op = 1;
    growing *g = open_list();
    if (!g) return FAIL(ST_NOMEM, "chat template %s", p->where);
    status st = push(p, g, NULL, *out, NULL);
    while (st == ST_OK && is_op(p, ',')) {
        jinja_node *item;
        st = advance(p);
        if (st == ST_OK && p->at.kind == TOKEN_CLOSE) break;
        if (st == ST_OK) st = parse_expression(p, &item);
        if (st == ST_OK) st = push(p, g, NULL, item, NULL);
    }
    if (st == ST_OK) st = done(p, g, seq);
    mem_free(g);
    *out = seq;
    return st;
}

/* --- Statements ------------------------------------------------------------------------------- */

/* Statements up to a tag whose first word is one of `ends` (terminated by NULL); that word is
 * then the current token. No ends: up to the end of the template. */
static status parse_body(parser *p, const char *const *ends, jinja_node **first);

static status close_tag(parser *p) {
    if (p->at.kind != TOKEN_CLOSE) return unexpected(p, "the end of the tag");
    return advance(p);
}

/* The rest of an opening tag, its body and "endX". */
static status parse_block(parser *p, const char *end, jinja_node **body) {
    const char *const ends[] = {end, NULL};
    TRY(close_tag(p));
    TRY(parse_body(p, ends, body));
    TRY(advance(p));
    return close_tag(p);
}

/* The end of a block that may have an "else": the current token is that, or "endX" already. */
static status parse_else(parser *p, const char *end, jinja_node **other) {
    if (is_word(p, "else")) {
        TRY(advance(p));
        return parse_block(p, end, other);
    }
    TRY(advance(p));
    return close_tag(p);
}

static status parse_if(parser *p, jinja_node *n) {
    static const char *const ends[] = {"elif", "else", "endif", NULL};
    for (;;) {
        TRY(parse_expression(p, &n->a));
        TRY(close_tag(p));
        TRY(parse_body(p, ends, &n->body));
        if (!is_word(p, "elif")) break;
        TRY(make(p, JINJA_IF, &n->other));
        n = n->other;
        n->op = 1; /* an elif, not an if that begins an else */
        TRY(advance(p));
    }
    return parse_else(p, "endif", &n->other);
}

/* "a", "a, b", "(a, b)" or (set only) "space.name". */
static status parse_targets(parser *p, bool attributes, jinja_node *n) {
    enum { TARGETS_MAX = 8 };
    jinja_node *item[TARGETS_MAX];
    const bool bracket = is_op(p, '(');
    if (bracket) TRY(advance(p));
    n->n_list = 0;
    for (;;) {
        if (n->n_list == TARGETS_MAX) return REFUSE(p, ST_RANGE, "more than %d names", TARGETS_MAX);
        jinja_node *t;
        TRY(make(p, JINJA_NAME, &t));
        TRY(take_name(p, &t->s, &t->n));
        if (attributes && is_op(p, '.')) TRY(parse_dot(p, &t));
        if (t->kind == JINJA_ITEM) return REFUSE(p, ST_FORMAT, "cannot assign to an item");
        item[n->n_list++] = t;
        if (!is_op(p, ',')) break;
        TRY(advance(p));
    }
    if (bracket) TRY(expect_op(p, ')'));
    n->list = arena_array(p->memory, jinja_node *, (size_t)n->n_list);
    if (!n->list) return FAIL(ST_NOMEM, "chat template %s", p->where);
    memcpy(n->list, item, (size_t)n->n_list * sizeof *item);
    return ST_OK;
}

static status parse_for(parser *p, jinja_node *n) {
    static const char *const ends[] = {"else", "endfor", NULL};
    TRY(parse_targets(p, false, n));
    if (!is_word(p, "in")) return unexpected(p, "'in'");
    TRY(advance(p));
    TRY(parse_logic(p, 1, &n->a)); /* an inline if would be the loop's filter */
    if (is_word(p, "if")) {
        TRY(advance(p));
        TRY(parse_expression(p, &n->b));
    }
    if (is_word(p, "recursive")) return REFUSE(p, ST_UNSUPPORTED, "'for … recursive'");
    TRY(close_tag(p));
    p->loops++;
    TRY(parse_body(p, ends, &n->body));
    p->loops--;
    return parse_else(p, "endfor", &n->other);
}

/* "| f(x) | g": filters over an empty slot. */
static status parse_filters(parser *p, jinja_node **out) {
    TRY(make(p, JINJA_SLOT, out));
    TRY(parse_filter(p, out));
    while (is_op(p, '|')) {
        TRY(advance(p));
        TRY(parse_filter(p, out));
    }
    return ST_OK;
}

static status parse_set(parser *p, jinja_node *n) {
    TRY(parse_targets(p, true, n));
    if (is_op(p, '=')) {
        TRY(advance(p));
        TRY(parse_tuple(p, &n->a));
        return close_tag(p);
    }
    if (n->n_list != 1) return unexpected(p, "'='");
    n->kind = JINJA_SET_BLOCK;
    if (is_op(p, '|')) {
        TRY(advance(p));
        TRY(parse_filters(p, &n->a));
    }
    return parse_block(p, "endset", &n->body);
}

/* "(a, b=1)": parameters into list, defaults into arg. */
static status parse_parameters(parser *p, jinja_node *n) {
    TRY(parse_arguments(p, n));
    for (int32_t i = 0; i < n->n_list; i++) {
        n->arg[i] = n->key[i] ? n->list[i] : NULL;
        if (!n->key[i] && n->list[i]->kind != JINJA_NAME)
            return REFUSE(p, ST_FORMAT, "a parameter of a macro is a name");
        if (!n->key[i]) n->key[i] = n->list[i]->s;
    }
    return ST_OK;
}

static status parse_macro(parser *p, jinja_node *n) {
    TRY(take_name(p, &n->s, &n->n));
    if (!is_op(p, '(')) return unexpected(p, "'('");
    TRY(parse_parameters(p, n));
    const int32_t loops = p->loops;
    p->loops = 0;
    TRY(parse_block(p, "endmacro", &n->body));
    p->loops = loops;
    return ST_OK;
}

static status parse_call_block(parser *p, jinja_node *n) {
    if (is_op(p, '(')) TRY(parse_parameters(p, n));
    TRY(parse_expression(p, &n->a));
    if (n->a->kind != JINJA_CALL) return REFUSE(p, ST_FORMAT, "a call block calls a macro");
    const int32_t loops = p->loops;
    p->loops = 0;
    TRY(parse_block(p, "endcall", &n->body));
    p->loops = loops;
    return ST_OK;
}

/* The word after "{%" is the current token and no end of an open block. */
static status parse_statement(parser *p, jinja_node **out) {
    static const struct {
        const char *word;
        jinja_node_kind kind;
    } words[] = {
        {"if", JINJA_IF},
        {"for", JINJA_FOR},
        {"set", JINJA_SET},
        {"macro", JINJA_DEFINE},
        {"call", JINJA_CALL_BLOCK},
        {"filter", JINJA_FILTER_BLOCK},
        {"generation", JINJA_SCOPE},
        {"break", JINJA_BREAK},
        {"continue", JINJA_CONTINUE},
    };
    int32_t at = -1;
    for (int32_t i = 0; i < COUNT_OF(words); i++)
        if (is_word(p, words[i].word)) at = i;
    if (p->at.kind != TOKEN_NAME) return unexpected(p, "a statement");
    if (at < 0)
        return REFUSE(p, ST_UNSUPPORTED, "statement '%.*s'", p->at.n < 40 ? (int)p->at.n : 40,
                      p->at.s);
    TRY(make(p, words[at].kind, out));
    TRY(advance(p));
    switch (words[at].kind) {
    case JINJA_IF: return parse_if(p, *out);
    case JINJA_FOR: return parse_for(p, *out);
    case JINJA_SET: return parse_set(p, *out);
    case JINJA_DEFINE: return parse_macro(p, *out);
    case JINJA_CALL_BLOCK: return parse_call_block(p, *out);
    case JINJA_FILTER_BLOCK:
        TRY(parse_filters(p, &(*out)->a));
        return parse_block(p, "endfilter", &(*out)->body);
    case JINJA_SCOPE: return parse_block(p, "endgeneration", &(*out)->body);
    default:
        if (!p->loops) return REFUSE(p, ST_FORMAT, "'%s' outside a loop", words[at].word);
        return close_tag(p);
    }
}

static status parse_body(parser *p, const char *const *ends, jinja_node **first) {
    TRY(enter(p));
    jinja_node **to = first;
    for (;;) {
        if (p->at.kind == TOKEN_END) {
            if (ends) return REFUSE(p, ST_FORMAT, "a block is open at the end: no '%s'", ends[0]);
            break;
        }
        if (p->at.kind == TOKEN_TEXT) {
            TRY(make(p, JINJA_TEXT, to));
            (*to)->s = p->at.s;
            (*to)->n = (uint32_t)p->at.n;
            TRY(advance(p));
        } else if (p->at.kind == TOKEN_OPEN_OUTPUT) {
            TRY(make(p, JINJA_OUTPUT, to));
            TRY(advance(p));
            TRY(parse_tuple(p, &(*to)->a));
            TRY(close_tag(p));
        } else {
            TRY(advance(p));
            for (int32_t i = 0; ends && ends[i]; i++)
                if (is_word(p, ends[i])) {
                    p->depth--;
                    return ST_OK;
                }
            TRY(parse_statement(p, to));
        }
        to = &(*to)->next;
    }
    p->depth--;
    return ST_OK;
}

status jinja_parse(jinja_node **root, arena *a, const char *source, size_t n, const char *where) {
    *root = NULL;
    parser p = {.where = where, .memory = a, .line = 1, .line_start = true, .at = {.line = 1}};
    if (n > CHAT_TEMPLATE_SOURCE_MAX)
        return REFUSE(&p, ST_RANGE, "%zu bytes, at most %d", n, CHAT_TEMPLATE_SOURCE_MAX);
    if (!utf8_valid(source, n)) return REFUSE(&p, ST_FORMAT, "ill-formed UTF-8");
    char *copy = arena_array(a, char, n + 1);
    if (!copy) return FAIL(ST_NOMEM, "chat template %s", where);
    size_t length = 0;
    for (size_t i = 0; i < n; i++) { /* "\r\n" and "\r" are newlines */
        if (source[i] == '\r') {
            copy[length++] = '\n';
            if (i + 1 < n && source[i + 1] == '\n') i++;
        } else {
            copy[length++] = source[i];
        }
    }
    if (length && copy[length - 1] == '\n') length--; /* jinja2 drops one newline at the end */
    p.p = copy;
    p.end = copy + length;
    TRY(advance(&p));
    return parse_body(&p, NULL, root);
}
