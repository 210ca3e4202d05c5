/* jinja_value.c - values of the template language: conversions, operators, filters, tests, methods.
 * What each does is what Python's object of that kind does. ORDER of the tables: at the end. */
#include "jinja.h"

#include "chat_template.h"
#include "utf8.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <utf8proc.h>

enum { DEPTH_MAX = 64, RANGE_MAX = 100000 };

/* --- Making values ---------------------------------------------------------------------------- */

status jinja_spend(jinja_run *r, int64_t steps) {
    r->steps += steps;
    if (r->steps > CHAT_TEMPLATE_STEPS_MAX)
        return JINJA_FAIL(r, ST_RANGE, "more than %d steps", CHAT_TEMPLATE_STEPS_MAX);
    return ST_OK;
}

static status no_memory(jinja_run *r) {
    return JINJA_FAIL(r, ST_RANGE, "needs more than %zu MiB", r->memory->size >> 20);
}

jinja_value jinja_string(const char *s, size_t n) {
    return (jinja_value){.kind = JINJA_STRING, .n = (uint32_t)n, .s = s};
}
jinja_value jinja_literal(const char *s) { return jinja_string(s, strlen(s)); }
jinja_value jinja_bool(bool b) { return (jinja_value){.kind = JINJA_BOOL, .b = b}; }
jinja_value jinja_int(int64_t i) { return (jinja_value){.kind = JINJA_INT, .i = i}; }

status jinja_take_text(jinja_run *r, text *t, jinja_value *out) {
    status st = text_status(t);
    if (st == ST_OK) st = jinja_spend(r, (int64_t)(t->length / 64));
    if (st == ST_OK) {
        const char *s = arena_string(r->memory, t->data ? t->data : "", t->length);
        if (!s) st = no_memory(r);
        *out = jinja_string(s, t->length);
    }
    text_free(t);
    return st;
}

status jinja_new_list(jinja_run *r, int32_t n, jinja_value *out) {
    TRY(jinja_spend(r, n / 4));
    jinja_list *l = arena_array(r->memory, jinja_list, 1);
    jinja_value *item = arena_array(r->memory, jinja_value, (size_t)(n ? n : 1));
    if (!l || !item) return no_memory(r);
    for (int32_t i = 0; i < n; i++) item[i] = (jinja_value){.kind = JINJA_UNDEFINED, .s = ""};
    *l = (jinja_list){.item = item, .n = n};
    *out = (jinja_value){.kind = JINJA_LIST, .list = l};
    return ST_OK;
}

status jinja_new_dict(jinja_run *r, jinja_value *out) {
    jinja_dict *d = arena_array(r->memory, jinja_dict, 1);
    if (!d) return no_memory(r);
    *out = (jinja_value){.kind = JINJA_DICT, .dict = d};
    return ST_OK;
}

static const jinja_value *dict_get(const jinja_dict *d, const char *key, size_t n) {
    for (int32_t i = 0; i < d->n; i++)
        if (d->key[i].kind == JINJA_STRING && d->key[i].n == n && memcmp(d->key[i].s, key, n) == 0)
            return &d->value[i];
    return NULL;
}

static status equal(jinja_run *r, const jinja_value *a, const jinja_value *b, bool *out);

status jinja_dict_set(jinja_run *r, jinja_dict *d, jinja_value key, jinja_value value) {
    TRY(jinja_spend(r, 1 + d->n / 16));
    if (key.kind == JINJA_LIST || key.kind == JINJA_DICT)
        return JINJA_FAIL(r, ST_FORMAT, "a %s is no key", jinja_kind_name(&key));
    for (int32_t i = 0; i < d->n; i++) {
        bool same;
        TRY(equal(r, &d->key[i], &key, &same));
        if (!same) continue;
        d->value[i] = value;
        return ST_OK;
    }
    if (d->n == d->size) {
        const int32_t size = d->size ? 2 * d->size : 8;
        jinja_value *keys = arena_array(r->memory, jinja_value, (size_t)size);
        jinja_value *values = arena_array(r->memory, jinja_value, (size_t)size);
        if (!keys || !values) return no_memory(r);
        if (d->n) {
            memcpy(keys, d->key, (size_t)d->n * sizeof *keys);
            memcpy(values, d->value, (size_t)d->n * sizeof *values);
        }
        d->key = keys;
        d->value = values;
        d->size = size;
    }
    d->key[d->n] = key;
    d->value[d->n++] = value;
    return ST_OK;
}

static status dict_from_json(jinja_run *r, const json_t *v, int32_t depth, jinja_value *out) {
    TRY(jinja_new_dict(r, out));
    jinja_dict *d = out->dict;
    const size_t n = json_object_size(v);
    TRY(jinja_spend(r, (int64_t)n));
    d->key = arena_array(r->memory, jinja_value, n + 1);
    d->value = arena_array(r->memory, jinja_value, n + 1);
    if (!d->key || !d->value) return no_memory(r);
    d->size = (int32_t)n + 1;
    const char *key;
    json_t *item;
    json_object_foreach((json_t *)v, key, item) { /* keys of a document differ: no search */
        d->key[d->n] = jinja_literal(key);
        TRY(jinja_from_json(r, item, depth + 1, &d->value[d->n]));
        d->n++;
    }
    return ST_OK;
}

status jinja_from_json(jinja_run *r, const json_t *v, int32_t depth, jinja_value *out) {
    TRY(jinja_spend(r, 1));
    if (depth > DEPTH_MAX) return JINJA_FAIL(r, ST_RANGE, "input nested deeper than %d", DEPTH_MAX);
    switch (json_typeof(v)) {
    case JSON_NULL: *out = (jinja_value){.kind = JINJA_NONE}; return ST_OK;
    case JSON_TRUE:
    case JSON_FALSE: *out = jinja_bool(json_is_true(v)); return ST_OK;
    case JSON_INTEGER: *out = jinja_int(json_integer_value(v)); return ST_OK;
    case JSON_REAL:
        *out = (jinja_value){.kind = JINJA_FLOAT, .f = json_real_value(v)};
        return ST_OK;
    case JSON_STRING:
        *out = jinja_string(json_string_value(v), json_string_length(v));
        return ST_OK;
    case JSON_ARRAY:
        if (json_array_size(v) > INT32_MAX) return no_memory(r);
        TRY(jinja_new_list(r, (int32_t)json_array_size(v), out));
        for (int32_t i = 0; i < out->list->n; i++)
            TRY(jinja_from_json(r, json_array_get(v, (size_t)i), depth + 1, &out->list->item[i]));
        return ST_OK;
    case JSON_OBJECT: return dict_from_json(r, v, depth, out);
    }
    return ST_OK;
}

/* --- Looking at values ------------------------------------------------------------------------ */

const char *jinja_kind_name(const jinja_value *v) {
    static const char *const names[] = {"missing", "undefined", "none",    "bool", "int",
                                        "float",   "string",    "list",    "dict", "namespace",
                                        "loop",    "macro",     "function"};
    return names[v->kind];
}

bool jinja_truth(const jinja_value *v) {
    switch (v->kind) {
    case JINJA_MISSING:
    case JINJA_UNDEFINED:
    case JINJA_NONE: return false;
    case JINJA_BOOL: return v->b;
    case JINJA_INT: return v->i != 0;
    case JINJA_FLOAT: return v->f != 0;
    case JINJA_STRING: return v->n > 0;
    case JINJA_LIST: return v->list->n > 0;
    case JINJA_DICT: return v->dict->n > 0;
    default: return true;
    }
}

static bool is_number(const jinja_value *v) {
    return v->kind == JINJA_INT || v->kind == JINJA_FLOAT || v->kind == JINJA_BOOL;
}
static double number_of(const jinja_value *v) {
    return v->kind == JINJA_FLOAT ? v->f : v->kind == JINJA_INT ? (double)v->i : (double)v->b;
}
/* int and bool */
static bool is_whole(const jinja_value *v) { return v->kind == JINJA_INT || v->kind == JINJA_BOOL; }
static int64_t whole_of(const jinja_value *v) { return v->kind == JINJA_INT ? v->i : v->b; }

static int compare_bytes(const jinja_value *a, const jinja_value *b) {
    const int c = memcmp(a->s, b->s, a->n < b->n ? a->n : b->n);
    return c ? c : (a->n > b->n) - (a->n < b->n);
}

static status equal_deep(jinja_run *r, const jinja_value *a, const jinja_value *b, int32_t depth,
                         bool *out) {
    TRY(jinja_spend(r, 1));
    *out = false;
    if (depth > DEPTH_MAX)
        return JINJA_FAIL(r, ST_RANGE, "values nested deeper than %d", DEPTH_MAX);
    if (is_number(a) && is_number(b)) {
        *out =
            is_whole(a) && is_whole(b) ? whole_of(a) == whole_of(b) : number_of(a) == number_of(b);
        return ST_OK;
    }
    if (a->kind != b->kind) return ST_OK;
    switch (a->kind) {
    case JINJA_STRING:
        *out = a->n == b->n && memcmp(a->s, b->s, a->n) == 0;
        return jinja_spend(r, a->n / 64);
    case JINJA_LIST:
        *out = a->list->n == b->list->n;
        for (int32_t i = 0; *out && i < a->list->n; i++)
            TRY(equal_deep(r, &a->list->item[i], &b->list->item[i], depth + 1, out));
        return ST_OK;
    case JINJA_DICT:
        *out = a->dict->n == b->dict->n;
        for (int32_t i = 0; *out && i < a->dict->n; i++) {
            const jinja_value *key = &a->dict->key[i], *other = NULL;
            TRY(jinja_spend(r, b->dict->n / 16));
            if (key->kind == JINJA_STRING) other = dict_get(b->dict, key->s, key->n);
            *out = other != NULL;
            if (other) TRY(equal_deep(r, &a->dict->value[i], other, depth + 1, out));
        }
        return ST_OK;
    case JINJA_NONE:
    case JINJA_UNDEFINED: *out = true; return ST_OK;
    case JINJA_NAMESPACE: *out = a->dict == b->dict; return ST_OK;
    case JINJA_LOOP: *out = a->loop == b->loop; return ST_OK;
    case JINJA_MACRO: *out = a->macro == b->macro; return ST_OK;
    default: return ST_OK;
    }
}

static status equal(jinja_run *r, const jinja_value *a, const jinja_value *b, bool *out) {
    return equal_deep(r, a, b, 0, out);
}

static status contains(jinja_run *r, const jinja_value *item, const jinja_value *in, bool *out) {
    *out = false;
    switch (in->kind) {
    case JINJA_STRING:
        if (item->kind != JINJA_STRING) break;
        TRY(jinja_spend(r, in->n / 64 + 1));
        if (item->n == 0) return *out = true, ST_OK;
        for (const char *p = in->s, *end = in->s + in->n; p && (size_t)(end - p) >= item->n; p++) {
            p = memchr(p, item->s[0], (size_t)(end - p) - item->n + 1);
            if (!p) break;
            TRY(jinja_spend(r, 1));
            if (memcmp(p, item->s, item->n) == 0) return *out = true, ST_OK;
        }
        return ST_OK;
    case JINJA_LIST:
        for (int32_t i = 0; !*out && i < in->list->n; i++)
            TRY(equal(r, item, &in->list->item[i], out));
        return ST_OK;
    case JINJA_DICT:
        for (int32_t i = 0; !*out && i < in->dict->n; i++)
            TRY(equal(r, item, &in->dict->key[i], out));
        return ST_OK;
    case JINJA_UNDEFINED: return ST_OK;
    default: break;
    }
    return JINJA_FAIL(r, ST_FORMAT, "'in': a %s in a %s", jinja_kind_name(item),
                      jinja_kind_name(in));
}

status jinja_compare(jinja_run *r, const jinja_value *a, int32_t op, const jinja_value *b,
                     bool *out) {
    if (op == JINJA_EQ || op == JINJA_NE) {
        TRY(equal(r, a, b, out));
        *out = *out == (op == JINJA_EQ);
        return ST_OK;
    }
    if (op == JINJA_IN || op == JINJA_NOT_IN) {
        TRY(contains(r, a, b, out));
        *out = *out == (op == JINJA_IN);
        return ST_OK;
    }
    double order;
    if (a->kind == JINJA_STRING && b->kind == JINJA_STRING)
        order = compare_bytes(a, b); /* UTF-8 keeps the order of code points */
    else if (is_whole(a) && is_whole(b))
        order = (double)((whole_of(a) > whole_of(b)) - (whole_of(a) < whole_of(b)));
    else if (is_number(a) && is_number(b))
        order = number_of(a) - number_of(b);
    else
        return JINJA_FAIL(r, ST_FORMAT, "a %s and a %s have no order", jinja_kind_name(a),
                          jinja_kind_name(b));
    *out = op == JINJA_LT   ? order < 0
           : op == JINJA_LE ? order <= 0
           : op == JINJA_GT ? order > 0
                            : order >= 0;
    return ST_OK;
}

/* --- Text of values --------------------------------------------------------------------------- */

/* repr(float): the fewest digits that read back as the same number. */
static void write_float(double f, text *out) {
    char buf[40];
    if (isnan(f) || isinf(f)) {
        text_add(out, "%s", isnan(f) ? "nan" : f > 0 ? "inf" : "-inf");
        return;
    }
    int digits = 1;
    do snprintf(buf, sizeof buf, "%.*e", digits - 1, f);
    while (strtod(buf, NULL) != f && ++digits <= 17);
    const long exponent = strtol(strchr(buf, 'e') + 1, NULL, 10);
    if (exponent >= -4 && exponent < 16) {
        const long after = digits - 1 - exponent;
        snprintf(buf, sizeof buf, "%.*f", after > 1 ? (int)after : 1, f);
        text_add(out, "%s", buf);
    } else {
        text_add(out, "%s", buf);
    }
}

static void write_repr_string(const jinja_value *v, text *out) {
    const bool single = memchr(v->s, '\'', v->n) && !memchr(v->s, '"', v->n);
    const char quote = single ? '"' : '\'';
    text_bytes(out, &quote, 1);
    for (uint32_t i = 0; i < v->n; i++) {
        const char c = v->s[i];
        if (c == quote || c == '\\')
            text_add(out, "\\%c", c);
        else if (c == '\n' || c == '\t' || c == '\r')
            text_add(out, "\\%c", c == '\n' ? 'n' : c == '\t' ? 't' : 'r');
        else if ((unsigned char)c < 32 || c == 127)
            text_add(out, "\\x%02x", (unsigned)(unsigned char)c);
        else
            text_bytes(out, &c, 1);
    }
    text_bytes(out, &quote, 1);
}

static status write_value(jinja_run *r, const jinja_value *v, bool repr, int32_t depth, text *out) {
    TRY(jinja_spend(r, 1));
    if (depth > DEPTH_MAX)
        return JINJA_FAIL(r, ST_RANGE, "values nested deeper than %d", DEPTH_MAX);
    if (out->length > CHAT_TEMPLATE_OUTPUT_MAX)
        return JINJA_FAIL(r, ST_RANGE, "text of more than %d bytes", CHAT_TEMPLATE_OUTPUT_MAX);
    switch (v->kind) {
    case JINJA_MISSING: return ST_OK;
    case JINJA_UNDEFINED: text_add(out, "%s", repr ? "Undefined" : ""); return ST_OK;
    case JINJA_NONE: text_add(out, "None"); return ST_OK;
    case JINJA_BOOL: text_add(out, "%s", v->b ? "True" : "False"); return ST_OK;
    case JINJA_INT: text_add(out, "%lld", (long long)v->i); return ST_OK;
    case JINJA_FLOAT: write_float(v->f, out); return ST_OK;
    case JINJA_STRING:
        TRY(jinja_spend(r, v->n / 64));
        if (repr)
            write_repr_string(v, out);
        else
            text_bytes(out, v->s, v->n);
        return ST_OK;
    case JINJA_LIST:
        text_add(out, "%c", v->list->tuple ? '(' : '[');
        for (int32_t i = 0; i < v->list->n; i++) {
            if (i) text_add(out, ", ");
            TRY(write_value(r, &v->list->item[i], true, depth + 1, out));
        }
        text_add(out, "%s", !v->list->tuple ? "]" : v->list->n == 1 ? ",)" : ")");
        return ST_OK;
    case JINJA_DICT:
        text_add(out, "{");
        for (int32_t i = 0; i < v->dict->n; i++) {
            if (i) text_add(out, ", ");
            TRY(write_value(r, &v->dict->key[i], true, depth + 1, out));
            text_add(out, ": ");
            TRY(write_value(r, &v->dict->value[i], true, depth + 1, out));
        }
        text_add(out, "}");
        return ST_OK;
    default: return JINJA_FAIL(r, ST_UNSUPPORTED, "text of a %s", jinja_kind_name(v));
    }
}

status jinja_write(jinja_run *r, const jinja_value *v, text *out) {
    return write_value(r, v, false, 0, out);
}

static void write_json_string(const char *s, size_t n, text *out) {
    text_add(out, "\"");
    size_t from = 0;
    for (size_t i = 0; i < n; i++) {
        const char c = s[i];
        if (c != '"' && c != '\\' && (unsigned char)c >= 32) continue;
        text_bytes(out, s + from, i - from);
        from = i + 1;
        static const char letters[] = "\"\"\\\\\nn\rr\tt\bb\ff";
        const char *known = NULL;
        for (const char *k = letters; *k && !known; k += 2)
            if (*k == c) known = k + 1;
        if (known)
            text_add(out, "\\%c", *known);
        else
            text_add(out, "\\u%04x", (unsigned)(unsigned char)c);
    }
    text_bytes(out, s + from, n - from);
    text_add(out, "\"");
}

/* indent < 0: on one line. */
static void json_break(text *out, int64_t indent, int32_t depth) {
    if (indent >= 0) text_add(out, "\n%*s", (int)indent * depth, "");
}

static status write_json(jinja_run *r, const jinja_value *v, int64_t indent, int32_t depth,
                         text *out) {
    TRY(jinja_spend(r, 1));
    if (depth > DEPTH_MAX)
        return JINJA_FAIL(r, ST_RANGE, "values nested deeper than %d", DEPTH_MAX);
    if (out->length > CHAT_TEMPLATE_OUTPUT_MAX)
        return JINJA_FAIL(r, ST_RANGE, "text of more than %d bytes", CHAT_TEMPLATE_OUTPUT_MAX);
    const char *comma = indent >= 0 ? "," : ", ";
    switch (v->kind) {
    case JINJA_NONE: text_add(out, "null"); return ST_OK;
    case JINJA_BOOL: text_add(out, "%s", v->b ? "true" : "false"); return ST_OK;
    case JINJA_STRING:
        TRY(jinja_spend(r, v->n / 64));
        write_json_string(v->s, v->n, out);
        return ST_OK;
    case JINJA_INT:
    case JINJA_FLOAT: return write_value(r, v, false, depth, out);
    case JINJA_LIST:
        text_add(out, "[");
        for (int32_t i = 0; i < v->list->n; i++) {
            if (i) text_add(out, "%s", comma);
            json_break(out, indent, depth + 1);
            TRY(write_json(r, &v->list->item[i], indent, depth + 1, out));
        }
        if (v->list->n) json_break(out, indent, depth);
        text_add(out, "]");
        return ST_OK;
    case JINJA_DICT:
        text_add(out, "{");
        for (int32_t i = 0; i < v->dict->n; i++) {
            const jinja_value *key = &v->dict->key[i];
            if (i) text_add(out, "%s", comma);
            json_break(out, indent, depth + 1);
            if (key->kind != JINJA_STRING)
                return JINJA_FAIL(r, ST_UNSUPPORTED, "tojson: a key that is a %s",
                                  jinja_kind_name(key));
            write_json_string(key->s, key->n, out);
            text_add(out, ": ");
            TRY(write_json(r, &v->dict->value[i], indent, depth + 1, out));
        }
        if (v->dict->n) json_break(out, indent, depth);
        text_add(out, "}");
        return ST_OK;
    default: return JINJA_FAIL(r, ST_FORMAT, "tojson of a %s", jinja_kind_name(v));
    }
}

/* str(v) as a value. */
static status to_string(jinja_run *r, const jinja_value *v, jinja_value *out) {
    if (v->kind == JINJA_STRING) return *out = *v, ST_OK;
    text t = {0};
    const status st = jinja_write(r, v, &t);
    if (st != ST_OK) {
        text_free(&t);
        return st;
    }
    return jinja_take_text(r, &t, out);
}

/* --- Parts of values -------------------------------------------------------------------------- */

static size_t char_bytes(const char *p, size_t n) {
    uint32_t code;
    const int32_t k = utf8_next(p, n, &code);
    return k > 0 ? (size_t)k : 1;
}

static int64_t count_chars(const char *s, size_t n) {
    int64_t count = 0;
    for (size_t i = 0; i < n; i++) count += ((unsigned char)s[i] & 0xC0) != 0x80;
    return count;
}

status jinja_iterate(jinja_run *r, const jinja_value *v, jinja_value *list) {
    switch (v->kind) {
    case JINJA_LIST: *list = *v; return jinja_spend(r, 1);
    case JINJA_UNDEFINED: return jinja_new_list(r, 0, list);
    case JINJA_DICT:
        TRY(jinja_new_list(r, v->dict->n, list));
        if (v->dict->n)
            memcpy(list->list->item, v->dict->key, (size_t)v->dict->n * sizeof(jinja_value));
        return ST_OK;
    case JINJA_STRING: {
        TRY(jinja_new_list(r, (int32_t)count_chars(v->s, v->n), list));
        size_t at = 0;
        for (int32_t i = 0; i < list->list->n && at < v->n; i++) {
            const size_t n = char_bytes(v->s + at, v->n - at);
            list->list->item[i] = jinja_string(v->s + at, n);
            at += n;
        }
        return ST_OK;
    }
    default: return JINJA_FAIL(r, ST_FORMAT, "a %s cannot be iterated", jinja_kind_name(v));
    }
}

static jinja_value undefined(const char *name, size_t n) {
    return (jinja_value){.kind = JINJA_UNDEFINED, .n = (uint32_t)n, .s = name};
}

static status loop_attribute(jinja_run *r, const jinja_loop *l, const char *name, size_t n,
                             jinja_value *out) {
    const int64_t at = l->at, length = l->items->n;
    const struct {
        const char *name;
        jinja_value value;
    } known[] = {
        {"index0", jinja_int(at)},
        {"index", jinja_int(at + 1)},
        {"revindex0", jinja_int(length - at - 1)},
        {"revindex", jinja_int(length - at)},
        {"first", jinja_bool(at == 0)},
        {"last", jinja_bool(at == length - 1)},
        {"length", jinja_int(length)},
        {"depth", jinja_int(l->depth + 1)},
        {"depth0", jinja_int(l->depth)},
        {"previtem", at > 0 ? l->items->item[at - 1] : undefined("previtem", 8)},
        {"nextitem", at + 1 < length ? l->items->item[at + 1] : undefined("nextitem", 8)},
    };
    for (int32_t i = 0; i < COUNT_OF(known); i++)
        if (strlen(known[i].name) == n && memcmp(known[i].name, name, n) == 0)
            return *out = known[i].value, ST_OK;
    return JINJA_FAIL(r, ST_UNSUPPORTED, "loop.%.*s", (int)(n < 40 ? n : 40), name);
}

status jinja_attribute(jinja_run *r, const jinja_value *v, const char *name, size_t n,
                       jinja_value *out) {
    *out = undefined(name, n);
    switch (v->kind) {
    case JINJA_UNDEFINED:
        return JINJA_FAIL(r, ST_FORMAT, "'%.*s' is undefined (its '%.*s' was asked for)",
                          v->n < 80 ? (int)v->n : 80, v->s, (int)(n < 80 ? n : 80), name);
    case JINJA_LOOP: return loop_attribute(r, v->loop, name, n, out);
    case JINJA_DICT:
    case JINJA_NAMESPACE: {
        TRY(jinja_spend(r, v->dict->n / 16));
        const jinja_value *found = dict_get(v->dict, name, n);
        static const char *const methods[] = {"items", "keys",   "values", "get",
                                              "copy",  "update", "pop"};
        for (int32_t i = 0; v->kind == JINJA_DICT && i < COUNT_OF(methods); i++)
            if (strlen(methods[i]) == n && memcmp(methods[i], name, n) == 0)
                return *out = (jinja_value){.kind = JINJA_FUNCTION, .n = (uint32_t)n, .s = name},
                       ST_OK;
        if (found) *out = *found;
        return ST_OK;
    }
    default: return ST_OK;
    }
}

status jinja_item(jinja_run *r, const jinja_value *v, const jinja_value *key, jinja_value *out) {
    if (v->kind == JINJA_UNDEFINED && key->kind != JINJA_STRING)
        return JINJA_FAIL(r, ST_FORMAT, "'%.*s' is undefined", v->n < 80 ? (int)v->n : 80, v->s);
    if (key->kind == JINJA_STRING) {
        if (v->kind == JINJA_DICT) {
            TRY(jinja_spend(r, v->dict->n / 16));
            const jinja_value *found = dict_get(v->dict, key->s, key->n);
            *out = found ? *found : undefined(key->s, key->n);
            return ST_OK;
        }
        return jinja_attribute(r, v, key->s, key->n, out);
    }
    *out = undefined("item", 4);
    if (v->kind == JINJA_DICT) {
        for (int32_t i = 0; i < v->dict->n; i++) {
            bool same;
            TRY(equal(r, &v->dict->key[i], key, &same));
            if (same) return *out = v->dict->value[i], ST_OK;
        }
        return ST_OK;
    }
    if (!is_whole(key)) return ST_OK;
    int64_t at = whole_of(key);
    if (v->kind == JINJA_LIST) {
        if (at < 0) at += v->list->n;
        if (at >= 0 && at < v->list->n) *out = v->list->item[at];
    } else if (v->kind == JINJA_STRING) {
        jinja_value chars;
        TRY(jinja_iterate(r, v, &chars));
        if (at < 0) at += chars.list->n;
        if (at >= 0 && at < chars.list->n) *out = chars.list->item[at];
    }
    return ST_OK;
}

status jinja_slice(jinja_run *r, const jinja_value *v, const jinja_value bound[3],
                   jinja_value *out) {
    if (v->kind != JINJA_LIST && v->kind != JINJA_STRING)
        return JINJA_FAIL(r, ST_FORMAT, "a slice of a %s", jinja_kind_name(v));
    for (int32_t i = 0; i < 3; i++)
        if (bound[i].kind != JINJA_MISSING && bound[i].kind != JINJA_NONE && !is_whole(&bound[i]))
            return JINJA_FAIL(r, ST_FORMAT, "a slice by a %s", jinja_kind_name(&bound[i]));
    jinja_value items;
    TRY(jinja_iterate(r, v, &items));
    const int64_t n = items.list->n;
    const int64_t step = is_whole(&bound[2]) ? whole_of(&bound[2]) : 1;
    if (step == 0 || step < -INT32_MAX || step > INT32_MAX)
        return JINJA_FAIL(r, ST_FORMAT, "a slice by steps of %lld", (long long)step);
    const int64_t low = step < 0 ? -1 : 0, high = step < 0 ? n - 1 : n;
    int64_t end[2] = {step < 0 ? high : low, step < 0 ? low : high};
    for (int32_t i = 0; i < 2; i++) {
        if (!is_whole(&bound[i])) continue;
        int64_t at = whole_of(&bound[i]);
        if (at < 0) at = at < -n ? low : at + n;
        end[i] = at < low ? low : at > high ? high : at;
    }
    int64_t count = 0;
    for (int64_t i = end[0]; step > 0 ? i < end[1] : i > end[1]; i += step) count++;
    jinja_value part;
    TRY(jinja_new_list(r, (int32_t)count, &part));
    for (int64_t i = 0; i < count; i++) part.list->item[i] = items.list->item[end[0] + i * step];
    part.list->tuple = v->kind == JINJA_LIST && v->list->tuple;
    if (v->kind == JINJA_LIST) return *out = part, ST_OK;
    text t = {0};
    for (int64_t i = 0; i < count; i++) text_bytes(&t, part.list->item[i].s, part.list->item[i].n);
    return jinja_take_text(r, &t, out);
}

/* --- Operators -------------------------------------------------------------------------------- */

static status concatenate(jinja_run *r, const jinja_value *a, const jinja_value *b,
                          jinja_value *out) {
    const size_t n = (size_t)a->n + b->n;
    if (n > CHAT_TEMPLATE_OUTPUT_MAX)
        return JINJA_FAIL(r, ST_RANGE, "text of more than %d bytes", CHAT_TEMPLATE_OUTPUT_MAX);
    TRY(jinja_spend(r, (int64_t)n / 64));
    char *s = arena_array(r->memory, char, n + 1);
    if (!s) return no_memory(r);
    if (a->n) memcpy(s, a->s, a->n);
    if (b->n) memcpy(s + a->n, b->s, b->n);
    *out = jinja_string(s, n);
    return ST_OK;
}

static status repeat(jinja_run *r, const jinja_value *s, int64_t times, jinja_value *out) {
    const size_t n = times > 0 ? s->n : 0;
    if (n && times > CHAT_TEMPLATE_OUTPUT_MAX / (int64_t)n)
        return JINJA_FAIL(r, ST_RANGE, "text of more than %d bytes", CHAT_TEMPLATE_OUTPUT_MAX);
    text t = {0};
    for (int64_t i = 0; n && i < times; i++) text_bytes(&t, s->s, n);
    return jinja_take_text(r, &t, out);
}

static status whole_binary(jinja_run *r, int64_t a, int32_t op, int64_t b, jinja_value *out) {
    int64_t v = 0;
    bool over = false;
    switch (op) {
    case '+': over = __builtin_add_overflow(a, b, &v); break;
    case '-': over = __builtin_sub_overflow(a, b, &v); break;
    case '*': over = __builtin_mul_overflow(a, b, &v); break;
    default:
        if (b == 0) return JINJA_FAIL(r, ST_FORMAT, "division by zero");
        over = a == INT64_MIN && b == -1;
        if (over) break;
        v = op == '%' ? a % b : a / b;
        if (a % b != 0 && (a < 0) != (b < 0)) v += op == '%' ? b : -1; /* Python rounds down */
    }
    if (over) return JINJA_FAIL(r, ST_RANGE, "an integer of more than 64 bits");
    *out = jinja_int(v);
    return ST_OK;
}

status jinja_binary(jinja_run *r, const jinja_value *a, int32_t op, const jinja_value *b,
                    jinja_value *out) {
    TRY(jinja_spend(r, 1));
    if (op == '~') {
        jinja_value x, y;
        TRY(to_string(r, a, &x));
        TRY(to_string(r, b, &y));
        return concatenate(r, &x, &y, out);
    }
    if (op == '/' * 256 + '/') op = 'f';
    if (is_whole(a) && is_whole(b) && op != '/')
        return whole_binary(r, whole_of(a), op, whole_of(b), out);
    if (is_number(a) && is_number(b)) {
        const double x = number_of(a), y = number_of(b);
        if (y == 0 && op != '+' && op != '-' && op != '*')
            return JINJA_FAIL(r, ST_FORMAT, "division by zero");
        double v = op == '+'   ? x + y
                   : op == '-' ? x - y
                   : op == '*' ? x * y
                   : op == '/' ? x / y
                   : op == 'f' ? floor(x / y)
                               : fmod(x, y);
        if (op == '%' && v != 0 && (v < 0) != (y < 0)) v += y;
        *out = (jinja_value){.kind = JINJA_FLOAT, .f = v};
        return ST_OK;
    }
    if (op == '+' && a->kind == JINJA_STRING && b->kind == JINJA_STRING)
        return concatenate(r, a, b, out);
    if (op == '*' && a->kind == JINJA_STRING && is_whole(b)) return repeat(r, a, whole_of(b), out);
    if (op == '*' && b->kind == JINJA_STRING && is_whole(a)) return repeat(r, b, whole_of(a), out);
    if (op == '+' && a->kind == JINJA_LIST && b->kind == JINJA_LIST) {
        if (a->list->n > INT32_MAX - b->list->n) return no_memory(r);
        TRY(jinja_new_list(r, a->list->n + b->list->n, out));
        for (int32_t i = 0; i < a->list->n; i++) out->list->item[i] = a->list->item[i];
        for (int32_t i = 0; i < b->list->n; i++) out->list->item[a->list->n + i] = b->list->item[i];
        return ST_OK;
    }
    if (op == '%' && a->kind == JINJA_STRING)
        return JINJA_FAIL(r, ST_UNSUPPORTED, "formatting by '%%'");
    const jinja_value *bad = a->kind == JINJA_UNDEFINED ? a : b;
    if (bad->kind == JINJA_UNDEFINED)
        return JINJA_FAIL(r, ST_FORMAT, "'%.*s' is undefined", bad->n < 80 ? (int)bad->n : 80,
                          bad->s);
    return JINJA_FAIL(r, ST_FORMAT, "'%c' of a %s and a %s", op == 'f' ? '/' : op,
                      jinja_kind_name(a), jinja_kind_name(b));
}

/* --- Arguments -------------------------------------------------------------------------------- */

enum { PARAMETERS_MAX = 4 };

/* "a,b,c" names the parameters; value[i] becomes MISSING where none was given. */
static status bind(jinja_run *r, const char *what, const char *parameters, const jinja_args *args,
                   jinja_value value[PARAMETERS_MAX]) {
    const char *name[PARAMETERS_MAX];
    size_t length[PARAMETERS_MAX];
    int32_t n = 0;
    for (const char *p = parameters; *p; n++) {
        CHECK(n < PARAMETERS_MAX);
        name[n] = p;
        length[n] = strcspn(p, ",");
        p += length[n] + (p[length[n]] == ',');
    }
    for (int32_t i = 0; i < PARAMETERS_MAX; i++) value[i] = (jinja_value){.kind = JINJA_MISSING};
    for (int32_t i = 0; i < args->n; i++) {
        const char *key = args->key ? args->key[i] : NULL;
        int32_t at = key ? -1 : i;
        for (int32_t k = 0; key && k < n; k++)
            if (strlen(key) == length[k] && memcmp(key, name[k], length[k]) == 0) at = k;
        if (key && at < 0) return JINJA_FAIL(r, ST_UNSUPPORTED, "%s: argument '%s'", what, key);
        if (at >= n) return JINJA_FAIL(r, ST_UNSUPPORTED, "%s: more than %d arguments", what, n);
        value[at] = args->value[i];
    }
    return ST_OK;
}

static status want_string(jinja_run *r, const char *what, const jinja_value *v) {
    if (v->kind == JINJA_STRING) return ST_OK;
    return JINJA_FAIL(r, ST_FORMAT, "%s: a %s where a string is needed", what, jinja_kind_name(v));
}

static bool given(const jinja_value *v) { return v->kind != JINJA_MISSING; }

/* --- Strings ---------------------------------------------------------------------------------- */

static bool space_at(const char *p, size_t n) {
    uint32_t code;
    if ((unsigned char)*p < 0x80) return (*p >= 9 && *p <= 13) || (*p >= 28 && *p <= 32);
    return utf8_next(p, n, &code) > 0 && utf8_is_space(code);
}

/* Is the character at p (n bytes long) one that strip() takes? */
static bool stripped(const char *p, size_t n, const jinja_value *chars) {
    if (chars->kind != JINJA_STRING) return space_at(p, n);
    for (uint32_t i = 0; i + n <= chars->n; i += (uint32_t)char_bytes(chars->s + i, chars->n - i))
        if (memcmp(chars->s + i, p, n) == 0) return true;
    return false;
}

static jinja_value strip(const jinja_value *s, const jinja_value *chars, bool left, bool right) {
    const char *from = s->s, *to = s->s + s->n;
    while (left && from < to) {
        const size_t n = char_bytes(from, (size_t)(to - from));
        if (!stripped(from, n, chars)) break;
        from += n;
    }
    while (right && to > from) {
        const char *last = to - 1;
        while (last > from && ((unsigned char)*last & 0xC0) == 0x80) last--;
        if (!stripped(last, (size_t)(to - last), chars)) break;
        to = last;
    }
    return jinja_string(from, (size_t)(to - from));
}

typedef enum { CASE_UPPER, CASE_LOWER, CASE_TITLE, CASE_CAPITAL } letter_case;

static status change_case(jinja_run *r, const jinja_value *s, letter_case how, jinja_value *out) {
    text t = {0};
    bool inside = false; /* a word (title) or behind the first character */
    for (size_t at = 0; at < s->n;) {
        uint32_t code;
        const int32_t n = utf8_next(s->s + at, s->n - at, &code);
        if (n <= 0) break;
        at += (size_t)n;
        const bool upper =
            how == CASE_UPPER || ((how == CASE_TITLE || how == CASE_CAPITAL) && !inside);
        const int32_t c = upper ? utf8proc_toupper((int32_t)code) : utf8proc_tolower((int32_t)code);
        utf8_put(&t, (uint32_t)c);
        const utf8proc_category_t k = utf8proc_category((int32_t)code);
        inside = how != CASE_TITLE || (k >= UTF8PROC_CATEGORY_LU && k <= UTF8PROC_CATEGORY_LO);
    }
    return jinja_take_text(r, &t, out);
}

/* Position of `part` in s from `at`, or SIZE_MAX. */
static size_t find(const jinja_value *s, size_t at, const jinja_value *part) {
    for (; at + part->n <= s->n; at++) {
        const char *p = memchr(s->s + at, part->s[0], s->n - part->n - at + 1);
        if (!p) break;
        at = (size_t)(p - s->s);
        if (memcmp(p, part->s, part->n) == 0) return at;
    }
    return SIZE_MAX;
}

static status replace(jinja_run *r, const jinja_value *s, const jinja_value *from,
                      const jinja_value *to, int64_t most, jinja_value *out) {
    TRY(want_string(r, "replace", from));
    TRY(want_string(r, "replace", to));
    if (from->n == 0) return JINJA_FAIL(r, ST_UNSUPPORTED, "replace of an empty string");
    text t = {0};
    size_t at = 0;
    for (int64_t i = 0; most < 0 || i < most; i++) {
        const size_t next = find(s, at, from);
        if (next == SIZE_MAX) break;
        text_bytes(&t, s->s + at, next - at);
        text_bytes(&t, to->s, to->n);
        at = next + from->n;
        if (t.length > CHAT_TEMPLATE_OUTPUT_MAX) break;
    }
    if (t.length > CHAT_TEMPLATE_OUTPUT_MAX) {
        text_free(&t);
        return JINJA_FAIL(r, ST_RANGE, "text of more than %d bytes", CHAT_TEMPLATE_OUTPUT_MAX);
    }
    text_bytes(&t, s->s + at, s->n - at);
    return jinja_take_text(r, &t, out);
}

/* The next part of s from *at; false at the end. sep MISSING or NONE: words. */
static bool next_part(const jinja_value *s, size_t *at, const jinja_value *sep, bool rest,
                      jinja_value *part) {
    if (*at > s->n) return false;
    if (sep->kind == JINJA_STRING) {
        const size_t to = rest ? SIZE_MAX : find(s, *at, sep);
        *part = jinja_string(s->s + *at, (to == SIZE_MAX ? s->n : to) - *at);
        *at = to == SIZE_MAX ? (size_t)s->n + 1 : to + sep->n;
        return true;
    }
    while (*at < s->n && space_at(s->s + *at, s->n - *at))
        *at += char_bytes(s->s + *at, s->n - *at);
    if (*at >= s->n) return false;
    size_t to = *at;
    while (to < s->n && (rest || !space_at(s->s + to, s->n - to)))
        to += char_bytes(s->s + to, s->n - to);
    *part = jinja_string(s->s + *at, to - *at);
    *at = to;
    return true;
}

static status split(jinja_run *r, const jinja_value *s, const jinja_value *sep, int64_t most,
                    jinja_value *out) {
    if (sep->kind == JINJA_STRING && sep->n == 0)
        return JINJA_FAIL(r, ST_FORMAT, "split by an empty string");
    jinja_value part;
    int32_t n = 0;
    for (size_t at = 0; next_part(s, &at, sep, most >= 0 && n >= most, &part);) n++;
    TRY(jinja_new_list(r, n, out));
    n = 0;
    for (size_t at = 0; next_part(s, &at, sep, most >= 0 && n >= most, &part);)
        out->list->item[n++] = part;
    return ST_OK;
}

static status join(jinja_run *r, const jinja_value *list, const jinja_value *between,
                   jinja_value *out) {
    jinja_value items;
    TRY(jinja_iterate(r, list, &items));
    text t = {0};
    status st = ST_OK;
    for (int32_t i = 0; st == ST_OK && i < items.list->n; i++) {
        if (i && between->kind == JINJA_STRING) text_bytes(&t, between->s, between->n);
        st = jinja_write(r, &items.list->item[i], &t);
    }
    if (st == ST_OK) return jinja_take_text(r, &t, out);
    text_free(&t);
    return st;
}

/* --- Filters ---------------------------------------------------------------------------------- */

#define FILTER(name)                                                                               \
    static status filter_##name(jinja_run *r, const jinja_value *in, const jinja_value *arg,       \
                                jinja_value *out)

FILTER(tojson) {
    int64_t indent = -1;
    if (is_whole(&arg[0])) indent = whole_of(&arg[0]);
    if (indent > 16) return JINJA_FAIL(r, ST_RANGE, "tojson: indent %lld", (long long)indent);
    text t = {0};
    const status st = write_json(r, in, indent, 0, &t);
    if (st == ST_OK) return jinja_take_text(r, &t, out);
    text_free(&t);
    return st;
}

FILTER(trim) {
    jinja_value s;
    TRY(to_string(r, in, &s));
    *out = strip(&s, &arg[0], true, true);
    return jinja_spend(r, s.n / 64);
}

FILTER(join) { return join(r, in, &arg[0], out); }

FILTER(items) {
    if (in->kind == JINJA_UNDEFINED) return jinja_new_list(r, 0, out);
    if (in->kind != JINJA_DICT)
        return JINJA_FAIL(r, ST_FORMAT, "items of a %s", jinja_kind_name(in));
    (void)arg;
    TRY(jinja_new_list(r, in->dict->n, out));
    for (int32_t i = 0; i < in->dict->n; i++) {
        jinja_value *pair = &out->list->item[i];
        TRY(jinja_new_list(r, 2, pair));
        pair->list->tuple = true;
        pair->list->item[0] = in->dict->key[i];
        pair->list->item[1] = in->dict->value[i];
    }
    return ST_OK;
}

FILTER(default) {
    (void)r;
    const bool replaced = in->kind == JINJA_UNDEFINED || (jinja_truth(&arg[1]) && !jinja_truth(in));
    *out = !replaced ? *in : given(&arg[0]) ? arg[0] : jinja_literal("");
    return ST_OK;
}

FILTER(length) {
    (void)arg;
    switch (in->kind) {
    case JINJA_STRING:
        *out = jinja_int(count_chars(in->s, in->n));
        return jinja_spend(r, in->n / 64);
    case JINJA_LIST: *out = jinja_int(in->list->n); return ST_OK;
    case JINJA_DICT: *out = jinja_int(in->dict->n); return ST_OK;
    case JINJA_UNDEFINED: *out = jinja_int(0); return ST_OK;
    default: return JINJA_FAIL(r, ST_FORMAT, "length of a %s", jinja_kind_name(in));
    }
}

static status filter_case(jinja_run *r, const jinja_value *in, letter_case how, jinja_value *out) {
    jinja_value s;
    TRY(to_string(r, in, &s));
    return change_case(r, &s, how, out);
}
FILTER(upper) { return (void)arg, filter_case(r, in, CASE_UPPER, out); }
FILTER(lower) { return (void)arg, filter_case(r, in, CASE_LOWER, out); }
FILTER(capitalize) { return (void)arg, filter_case(r, in, CASE_CAPITAL, out); }
FILTER(title) { return (void)arg, filter_case(r, in, CASE_TITLE, out); }

FILTER(list) {
    (void)arg;
    jinja_value items;
    TRY(jinja_iterate(r, in, &items));
    TRY(jinja_new_list(r, items.list->n, out));
    for (int32_t i = 0; i < items.list->n; i++) out->list->item[i] = items.list->item[i];
    return ST_OK;
}

static status end_item(jinja_run *r, const jinja_value *in, bool last, jinja_value *out) {
    jinja_value items;
    TRY(jinja_iterate(r, in, &items));
    const int32_t n = items.list->n;
    *out = n ? items.list->item[last ? n - 1 : 0] : undefined("item", 4);
    return ST_OK;
}
FILTER(first) { return (void)arg, end_item(r, in, false, out); }
FILTER(last) { return (void)arg, end_item(r, in, true, out); }

FILTER(string) { return (void)arg, to_string(r, in, out); }
FILTER(safe) { return (void)arg, to_string(r, in, out); }

FILTER(int) {
    *out = given(&arg[0]) ? arg[0] : jinja_int(0);
    char buf[64];
    int64_t i;
    double f;
    if (is_whole(in)) return *out = jinja_int(whole_of(in)), ST_OK;
    if (in->kind == JINJA_STRING && in->n < sizeof buf) {
        const jinja_value none = {.kind = JINJA_MISSING}, s = strip(in, &none, true, true);
        memcpy(buf, s.s, s.n);
        buf[s.n] = 0;
        if (parse_i64(buf, INT64_MIN, INT64_MAX, &i))
            *out = jinja_int(i);
        else if (parse_f64(buf, -9e18, 9e18, &f))
            *out = jinja_int((int64_t)f);
    } else if (in->kind == JINJA_FLOAT && fabs(in->f) < 9e18) {
        *out = jinja_int((int64_t)in->f);
    } else if (in->kind == JINJA_UNDEFINED) {
        return JINJA_FAIL(r, ST_FORMAT, "int of an undefined value");
    }
    return ST_OK;
}

FILTER(float) {
    (void)r;
    *out = given(&arg[0]) ? arg[0] : (jinja_value){.kind = JINJA_FLOAT};
    char buf[64];
    double f;
    if (is_number(in)) return *out = (jinja_value){.kind = JINJA_FLOAT, .f = number_of(in)}, ST_OK;
    if (in->kind == JINJA_STRING && in->n < sizeof buf) {
        memcpy(buf, in->s, in->n);
        buf[in->n] = 0;
        if (parse_f64(buf, -INFINITY, INFINITY, &f))
            *out = (jinja_value){.kind = JINJA_FLOAT, .f = f};
    }
    return ST_OK;
}

FILTER(abs) {
    (void)arg;
    if (is_whole(in) && whole_of(in) > INT64_MIN)
        return *out = jinja_int(llabs(whole_of(in))), ST_OK;
    if (in->kind != JINJA_FLOAT)
        return JINJA_FAIL(r, ST_FORMAT, "abs of a %s", jinja_kind_name(in));
    *out = (jinja_value){.kind = JINJA_FLOAT, .f = fabs(in->f)};
    return ST_OK;
}

FILTER(replace) {
    jinja_value s;
    TRY(to_string(r, in, &s));
    return replace(r, &s, &arg[0], &arg[1], is_whole(&arg[2]) ? whole_of(&arg[2]) : -1, out);
}

FILTER(reverse) {
    (void)arg;
    const jinja_value bound[3] = {{.kind = JINJA_MISSING}, {.kind = JINJA_MISSING}, jinja_int(-1)};
    jinja_value items = *in;
    if (in->kind != JINJA_STRING) TRY(jinja_iterate(r, in, &items));
    return jinja_slice(r, &items, bound, out);
}

/* Lines as splitlines() of text that ends with a newline. */
FILTER(indent) {
    jinja_value s, none = {.kind = JINJA_MISSING};
    (void)none;
    TRY(to_string(r, in, &s));
    const int64_t width = is_whole(&arg[0]) ? whole_of(&arg[0]) : 4;
    const bool first = jinja_truth(&arg[1]), blank = jinja_truth(&arg[2]);
    if (arg[0].kind == JINJA_STRING) return JINJA_FAIL(r, ST_UNSUPPORTED, "indent by a string");
    if (width < 0 || width > 256)
        return JINJA_FAIL(r, ST_RANGE, "indent by %lld", (long long)width);
    text t = {0};
    for (size_t at = 0; at <= s.n;) {
        const char *end = memchr(s.s + at, '\n', s.n - at);
        const size_t to = end ? (size_t)(end - s.s) : s.n;
        if (at) text_bytes(&t, "\n", 1);
        if (at ? blank || to > at : first) text_add(&t, "%*s", (int)width, "");
        text_bytes(&t, s.s + at, to - at);
        at = to + 1;
        if (t.length > CHAT_TEMPLATE_OUTPUT_MAX) break;
    }
    if (t.length > CHAT_TEMPLATE_OUTPUT_MAX) {
        text_free(&t);
        return JINJA_FAIL(r, ST_RANGE, "text of more than %d bytes", CHAT_TEMPLATE_OUTPUT_MAX);
    }
    return jinja_take_text(r, &t, out);
}

FILTER(unique) {
    (void)arg;
    jinja_value items;
    TRY(jinja_iterate(r, in, &items));
    TRY(jinja_new_list(r, items.list->n, out));
    int32_t n = 0;
    for (int32_t i = 0; i < items.list->n; i++) {
        bool seen = false;
        jinja_value mine = items.list->item[i];
        if (mine.kind == JINJA_STRING) TRY(change_case(r, &mine, CASE_LOWER, &mine));
        for (int32_t k = 0; k < n && !seen; k++) {
            jinja_value other = out->list->item[k];
            if (other.kind == JINJA_STRING) TRY(change_case(r, &other, CASE_LOWER, &other));
            TRY(equal(r, &mine, &other, &seen));
        }
        if (!seen) out->list->item[n++] = items.list->item[i];
    }
    out->list->n = n;
    return ST_OK;
}

FILTER(dictsort) {
    (void)arg;
    jinja_value pairs;
    TRY(filter_items(r, in, arg, &pairs));
    for (int32_t i = 1; i < pairs.list->n; i++) { /* insertion: stable, and the dicts are small */
        const jinja_value pair = pairs.list->item[i];
        jinja_value key = pair.list->item[0];
        if (key.kind == JINJA_STRING) TRY(change_case(r, &key, CASE_LOWER, &key));
        int32_t k = i;
        for (; k > 0; k--) {
            jinja_value other = pairs.list->item[k - 1].list->item[0];
            bool less = false;
            if (other.kind == JINJA_STRING) TRY(change_case(r, &other, CASE_LOWER, &other));
            TRY(jinja_compare(r, &key, JINJA_LT, &other, &less));
            if (!less) break;
            pairs.list->item[k] = pairs.list->item[k - 1];
        }
        pairs.list->item[k] = pair;
    }
    *out = pairs;
    return ST_OK;
}

/* "a.b.0" of a value, as attribute= means it. */
static status dotted(jinja_run *r, const jinja_value *v, const jinja_value *path,
                     jinja_value *out) {
    *out = *v;
    if (path->kind == JINJA_INT) return jinja_item(r, v, path, out);
    TRY(want_string(r, "attribute", path));
    const char *p = path->s, *end = path->s + path->n;
    for (;;) {
        const char *dot = memchr(p, '.', (size_t)(end - p));
        const size_t n = (size_t)((dot ? dot : end) - p);
        const jinja_value from = *out;
        char buf[24];
        int64_t at;
        snprintf(buf, sizeof buf, "%.*s", (int)(n < 20 ? n : 20), p);
        const jinja_value key =
            parse_i64(buf, 0, INT32_MAX, &at) ? jinja_int(at) : jinja_string(p, n);
        TRY(jinja_item(r, &from, &key, out));
        if (!dot) return ST_OK;
        p = dot + 1;
    }
}

/* select, reject, selectattr, rejectattr: args are [attribute,] [test, its arguments]. */
static status choose(jinja_run *r, const jinja_value *in, const jinja_args *args, bool attribute,
                     bool keep, jinja_value *out) {
    const int32_t skip = attribute;
    if (args->n < skip) return JINJA_FAIL(r, ST_FORMAT, "selectattr without an attribute");
    for (int32_t i = 0; i < args->n; i++)
        if (args->key && args->key[i])
            return JINJA_FAIL(r, ST_UNSUPPORTED, "select: argument '%s'", args->key[i]);
    int32_t row = -1;
    if (args->n > skip) {
        const jinja_value *name = &args->value[skip];
        TRY(want_string(r, "select", name));
        row = jinja_find_test(name->s, name->n);
        if (row < 0)
            return JINJA_FAIL(r, ST_UNSUPPORTED, "test '%.*s'", name->n < 40 ? (int)name->n : 40,
                              name->s);
    }
    const jinja_args rest = {.value = args->value + skip + 1,
                             .n = args->n > skip ? args->n - skip - 1 : 0};
    jinja_value items;
    TRY(jinja_iterate(r, in, &items));
    TRY(jinja_new_list(r, items.list->n, out));
    int32_t n = 0;
    for (int32_t i = 0; i < items.list->n; i++) {
        jinja_value v = items.list->item[i];
        if (attribute) TRY(dotted(r, &items.list->item[i], &args->value[0], &v));
        bool yes = jinja_truth(&v);
        if (row >= 0) TRY(jinja_test(r, row, &v, &rest, &yes));
        if (yes == keep) out->list->item[n++] = items.list->item[i];
    }
    out->list->n = n;
    return ST_OK;
}

/* map(attribute="x", default=y) or map("filter", its arguments). */
static status map(jinja_run *r, const jinja_value *in, const jinja_args *args, jinja_value *out) {
    const jinja_value *path = NULL, *instead = NULL;
    for (int32_t i = 0; i < args->n; i++) {
        const char *key = args->key ? args->key[i] : NULL;
        if (key && strcmp(key, "attribute") == 0)
            path = &args->value[i];
        else if (key && strcmp(key, "default") == 0)
            instead = &args->value[i];
        else if (key)
            return JINJA_FAIL(r, ST_UNSUPPORTED, "map: argument '%s'", key);
    }
    int32_t row = -1;
    if (!path) {
        if (!args->n) return JINJA_FAIL(r, ST_FORMAT, "map without a filter");
        const jinja_value *name = &args->value[0];
        TRY(want_string(r, "map", name));
        row = jinja_find_filter(name->s, name->n);
        if (row < 0)
            return JINJA_FAIL(r, ST_UNSUPPORTED, "filter '%.*s'", name->n < 40 ? (int)name->n : 40,
                              name->s);
    }
    const jinja_args rest = {.value = args->value + 1, .n = args->n > 0 ? args->n - 1 : 0};
    jinja_value items;
    TRY(jinja_iterate(r, in, &items));
    TRY(jinja_new_list(r, items.list->n, out));
    for (int32_t i = 0; i < items.list->n; i++) {
        jinja_value *to = &out->list->item[i];
        if (path)
            TRY(dotted(r, &items.list->item[i], path, to));
        else
            TRY(jinja_filter(r, row, &items.list->item[i], &rest, to));
        if (instead && to->kind == JINJA_UNDEFINED) *to = *instead;
    }
    return ST_OK;
}

typedef struct {
    const char *name;
    const char *parameters; /* NULL: takes the arguments as they are */
    status (*run)(jinja_run *r, const jinja_value *in, const jinja_value *arg, jinja_value *out);
} filter_row;

static const filter_row filters[] = {
    {"tojson", "indent", filter_tojson},
    {"trim", "chars", filter_trim},
    {"join", "d", filter_join},
    {"items", "", filter_items},
    {"default", "default_value,boolean", filter_default},
    {"d", "default_value,boolean", filter_default},
    {"length", "", filter_length},
    {"count", "", filter_length},
    {"upper", "", filter_upper},
    {"lower", "", filter_lower},
    {"capitalize", "", filter_capitalize},
    {"title", "", filter_title},
    {"list", "", filter_list},
    {"first", "", filter_first},
    {"last", "", filter_last},
    {"string", "", filter_string},
    {"safe", "", filter_safe},
    {"int", "default", filter_int},
    {"float", "default", filter_float},
    {"abs", "", filter_abs},
    {"replace", "old,new,count", filter_replace},
    {"reverse", "", filter_reverse},
    {"indent", "width,first,blank", filter_indent},
    {"unique", "", filter_unique},
    {"dictsort", "", filter_dictsort},
    {"select", NULL, NULL},
    {"reject", NULL, NULL},
    {"selectattr", NULL, NULL},
    {"rejectattr", NULL, NULL},
    {"map", NULL, NULL},
};

static bool named(const char *row, const char *name, size_t n) {
    return strlen(row) == n && memcmp(row, name, n) == 0;
}

int32_t jinja_find_filter(const char *name, size_t n) {
    for (int32_t i = 0; i < COUNT_OF(filters); i++)
        if (named(filters[i].name, name, n)) return i;
    return -1;
}

status jinja_filter(jinja_run *r, int32_t row, const jinja_value *in, const jinja_args *args,
                    jinja_value *out) {
    CHECK(row >= 0 && row < COUNT_OF(filters));
    TRY(jinja_spend(r, 1));
    const filter_row *f = &filters[row];
    if (!f->run) {
        if (strcmp(f->name, "map") == 0) return map(r, in, args, out);
        return choose(r, in, args, strstr(f->name, "attr") != NULL, f->name[0] == 's', out);
    }
    jinja_value arg[PARAMETERS_MAX];
    TRY(bind(r, f->name, f->parameters, args, arg));
    return f->run(r, in, arg, out);
}

/* --- Tests ------------------------------------------------------------------------------------ */

static const struct {
    const char *name;
    int32_t n_args;
} tests[] = {{"defined", 0},     {"undefined", 0}, {"none", 0},   {"string", 0},  {"mapping", 0},
             {"iterable", 0},    {"sequence", 0},  {"number", 0}, {"integer", 0}, {"float", 0},
             {"boolean", 0},     {"true", 0},      {"false", 0},  {"odd", 0},     {"even", 0},
             {"divisibleby", 1}, {"equalto", 1},   {"eq", 1},     {"ne", 1},      {"in", 1},
             {"lt", 1},          {"le", 1},        {"gt", 1},     {"ge", 1},      {"lower", 0},
             {"upper", 0},       {"callable", 0}};

int32_t jinja_find_test(const char *name, size_t n) {
    for (int32_t i = 0; i < COUNT_OF(tests); i++)
        if (named(tests[i].name, name, n)) return i;
    return -1;
}

static status test_remainder(jinja_run *r, const jinja_value *in, int64_t by, int64_t want,
                             bool *out) {
    if (!is_whole(in)) return JINJA_FAIL(r, ST_FORMAT, "remainder of a %s", jinja_kind_name(in));
    if (by == 0) return JINJA_FAIL(r, ST_FORMAT, "division by zero");
    *out = by == -1 || llabs(whole_of(in) % by) == want;
    return ST_OK;
}

static status test_case(jinja_run *r, const jinja_value *in, letter_case how, bool *out) {
    jinja_value s, changed, other;
    TRY(to_string(r, in, &s));
    TRY(change_case(r, &s, how, &changed));
    TRY(change_case(r, &s, how == CASE_UPPER ? CASE_LOWER : CASE_UPPER, &other));
    *out = compare_bytes(&s, &changed) == 0 && compare_bytes(&s, &other) != 0;
    return ST_OK;
}

status jinja_test(jinja_run *r, int32_t row, const jinja_value *in, const jinja_args *args,
                  bool *out) {
    CHECK(row >= 0 && row < COUNT_OF(tests));
    TRY(jinja_spend(r, 1));
    const char *t = tests[row].name;
    if (args->n != tests[row].n_args)
        return JINJA_FAIL(r, ST_FORMAT, "test '%s' takes %d arguments", t, tests[row].n_args);
    const jinja_value *arg = args->value;
    const jinja_kind k = in->kind;
    static const struct {
        const char *name;
        int32_t op;
    } orders[] = {{"equalto", JINJA_EQ}, {"eq", JINJA_EQ}, {"ne", JINJA_NE}, {"in", JINJA_IN},
                  {"lt", JINJA_LT},      {"le", JINJA_LE}, {"gt", JINJA_GT}, {"ge", JINJA_GE}};
    for (int32_t i = 0; i < COUNT_OF(orders); i++)
        if (strcmp(t, orders[i].name) == 0) return jinja_compare(r, in, orders[i].op, arg, out);
    if (strcmp(t, "odd") == 0) return test_remainder(r, in, 2, 1, out);
    if (strcmp(t, "even") == 0) return test_remainder(r, in, 2, 0, out);
    if (strcmp(t, "divisibleby") == 0) {
        if (!is_whole(arg))
            return JINJA_FAIL(r, ST_FORMAT, "divisibleby a %s", jinja_kind_name(arg));
        return test_remainder(r, in, whole_of(arg), 0, out);
    }
    if (strcmp(t, "lower") == 0) return test_case(r, in, CASE_LOWER, out);
    if (strcmp(t, "upper") == 0) return test_case(r, in, CASE_UPPER, out);
    *out = strcmp(t, "defined") == 0     ? k != JINJA_UNDEFINED
           : strcmp(t, "undefined") == 0 ? k == JINJA_UNDEFINED
           : strcmp(t, "none") == 0      ? k == JINJA_NONE
           : strcmp(t, "string") == 0    ? k == JINJA_STRING
           : strcmp(t, "mapping") == 0   ? k == JINJA_DICT
           : strcmp(t, "iterable") == 0
               ? k == JINJA_STRING || k == JINJA_LIST || k == JINJA_DICT || k == JINJA_UNDEFINED
           : strcmp(t, "sequence") == 0
               ? k == JINJA_STRING || k == JINJA_LIST || k == JINJA_DICT || k == JINJA_UNDEFINED
           : strcmp(t, "number") == 0  ? is_number(in)
           : strcmp(t, "integer") == 0 ? k == JINJA_INT
           : strcmp(t, "float") == 0   ? k == JINJA_FLOAT
           : strcmp(t, "boolean") == 0 ? k == JINJA_BOOL
           : strcmp(t, "true") == 0    ? k == JINJA_BOOL && in->b
           : strcmp(t, "false") == 0   ? k == JINJA_BOOL && !in->b
                                       : k == JINJA_MACRO || k == JINJA_FUNCTION;
    return ST_OK;
}

/* --- Methods ---------------------------------------------------------------------------------- */

typedef enum { ON_STRING, ON_DICT, ON_LIST, ON_LOOP } method_owner;

static const struct {
    const char *name, *parameters;
    method_owner owner;
} methods[] = {
    {"strip", "chars", ON_STRING},
    {"lstrip", "chars", ON_STRING},
    {"rstrip", "chars", ON_STRING},
    {"split", "sep,maxsplit", ON_STRING},
    {"startswith", "prefix", ON_STRING},
    {"endswith", "suffix", ON_STRING},
    {"upper", "", ON_STRING},
    {"lower", "", ON_STRING},
    {"title", "", ON_STRING},
    {"capitalize", "", ON_STRING},
    {"replace", "old,new,count", ON_STRING},
    {"find", "sub", ON_STRING},
    {"count", "sub", ON_STRING},
    {"join", "items", ON_STRING},
    {"isdigit", "", ON_STRING},
    {"items", "", ON_DICT},
    {"keys", "", ON_DICT},
    {"values", "", ON_DICT},
    {"get", "key,default", ON_DICT},
    {"copy", "", ON_DICT},
    {"index", "value", ON_LIST},
    {"cycle", NULL, ON_LOOP},
};

int32_t jinja_find_method(const char *name, size_t n) {
    for (int32_t i = 0; i < COUNT_OF(methods); i++)
        if (named(methods[i].name, name, n)) return i;
    return -1;
}

/* prefix or suffix may be a tuple of them. */
static status affix(jinja_run *r, const jinja_value *s, const jinja_value *part, bool end,
                    bool *out) {
    *out = false;
    if (part->kind == JINJA_LIST && part->list->tuple) {
        for (int32_t i = 0; !*out && i < part->list->n; i++) {
            if (part->list->item[i].kind == JINJA_LIST) return want_string(r, "affix", part);
            TRY(affix(r, s, &part->list->item[i], end, out));
        }
        return ST_OK;
    }
    TRY(want_string(r, end ? "endswith" : "startswith", part));
    *out = s->n >= part->n && memcmp(end ? s->s + s->n - part->n : s->s, part->s, part->n) == 0;
    return ST_OK;
}

static status count_parts(jinja_run *r, const jinja_value *s, const jinja_value *part, bool first,
                          jinja_value *out) {
    TRY(want_string(r, first ? "find" : "count", part));
    if (part->n == 0) {
        *out = jinja_int(first ? 0 : count_chars(s->s, s->n) + 1);
        return ST_OK;
    }
    int64_t n = 0;
    for (size_t at = find(s, 0, part); at != SIZE_MAX; at = find(s, at + part->n, part)) {
        if (first) return *out = jinja_int(count_chars(s->s, at)), ST_OK;
        n++;
    }
    *out = jinja_int(first ? -1 : n);
    return ST_OK;
}

static status string_method(jinja_run *r, const jinja_value *s, const char *m,
                            const jinja_value *arg, jinja_value *out) {
    TRY(jinja_spend(r, s->n / 64 + 1));
    bool yes = false;
    const bool left = strcmp(m, "rstrip") != 0, right = strcmp(m, "lstrip") != 0;
    if (strcmp(m + (left && right ? 0 : 1), "strip") == 0) {
        if (given(&arg[0]) && arg[0].kind != JINJA_NONE) TRY(want_string(r, m, &arg[0]));
        *out = strip(s, &arg[0], left, right);
        return ST_OK;
    }
    if (strcmp(m, "split") == 0)
        return split(r, s, &arg[0], is_whole(&arg[1]) ? whole_of(&arg[1]) : -1, out);
    if (strcmp(m, "replace") == 0)
        return replace(r, s, &arg[0], &arg[1], is_whole(&arg[2]) ? whole_of(&arg[2]) : -1, out);
    if (strcmp(m, "upper") == 0) return change_case(r, s, CASE_UPPER, out);
    if (strcmp(m, "lower") == 0) return change_case(r, s, CASE_LOWER, out);
    if (strcmp(m, "title") == 0) return change_case(r, s, CASE_TITLE, out);
    if (strcmp(m, "capitalize") == 0) return change_case(r, s, CASE_CAPITAL, out);
    if (strcmp(m, "find") == 0) return count_parts(r, s, &arg[0], true, out);
    if (strcmp(m, "count") == 0) return count_parts(r, s, &arg[0], false, out);
    if (strcmp(m, "join") == 0) return join(r, &arg[0], s, out);
    if (strcmp(m, "isdigit") == 0) {
        yes = s->n > 0;
        for (uint32_t i = 0; i < s->n; i++) yes = yes && s->s[i] >= '0' && s->s[i] <= '9';
    } else {
        TRY(affix(r, s, &arg[0], strcmp(m, "endswith") == 0, &yes));
    }
    *out = jinja_bool(yes);
    return ST_OK;
}

static status dict_method(jinja_run *r, const jinja_value *d, const char *m, const jinja_value *arg,
                          jinja_value *out) {
    if (strcmp(m, "items") == 0) return filter_items(r, d, arg, out);
    if (strcmp(m, "keys") == 0) return jinja_iterate(r, d, out);
    if (strcmp(m, "copy") == 0) return *out = *d, ST_OK;
    if (strcmp(m, "get") == 0) {
        TRY(jinja_item(r, d, &arg[0], out));
        if (out->kind == JINJA_UNDEFINED)
            *out = given(&arg[1]) ? arg[1] : (jinja_value){.kind = JINJA_NONE};
        return ST_OK;
    }
    TRY(jinja_new_list(r, d->dict->n, out));
    for (int32_t i = 0; i < d->dict->n; i++) out->list->item[i] = d->dict->value[i];
    return ST_OK;
}

status jinja_method(jinja_run *r, const jinja_value *self, const char *name, size_t n,
                    const jinja_args *args, jinja_value *out) {
    const int32_t row = jinja_find_method(name, n);
    CHECK(row >= 0); /* the parser refused others */
    const char *m = methods[row].name;
    if (self->kind == JINJA_UNDEFINED)
        return JINJA_FAIL(r, ST_FORMAT, "'%.*s' is undefined (its '%s' was called)",
                          self->n < 80 ? (int)self->n : 80, self->s, m);
    if (methods[row].owner == ON_LOOP && self->kind == JINJA_LOOP && args->n > 0) {
        *out = args->value[self->loop->at % args->n];
        return ST_OK;
    }
    jinja_value arg[PARAMETERS_MAX];
    if (methods[row].parameters) TRY(bind(r, m, methods[row].parameters, args, arg));
    if (methods[row].owner == ON_STRING && self->kind == JINJA_STRING)
        return string_method(r, self, m, arg, out);
    if (methods[row].owner == ON_DICT && self->kind == JINJA_DICT)
        return dict_method(r, self, m, arg, out);
    if ((strcmp(m, "index") == 0 || strcmp(m, "count") == 0) && self->kind == JINJA_LIST) {
        int64_t found = 0;
        for (int32_t i = 0; i < self->list->n; i++) {
            bool same;
            TRY(equal(r, &self->list->item[i], &arg[0], &same));
            if (same && m[0] == 'i') return *out = jinja_int(i), ST_OK;
            found += same;
        }
        if (m[0] == 'i') return JINJA_FAIL(r, ST_FORMAT, "index: the value is not in the list");
        *out = jinja_int(found);
        return ST_OK;
    }
    return JINJA_FAIL(r, ST_FORMAT, "a %s has no method '%s'", jinja_kind_name(self), m);
}

/* --- Functions -------------------------------------------------------------------------------- */

static const struct {
    const char *name, *parameters;
} functions[] = {
    {"raise_exception", "message"}, {"range", "a,b,c"}, {"namespace", NULL}, {"dict", NULL},
    {"strftime_now", "format"},
};

bool jinja_find_function(const char *name, size_t n) {
    for (int32_t i = 0; i < COUNT_OF(functions); i++)
        if (named(functions[i].name, name, n)) return true;
    return false;
}

static status make_range(jinja_run *r, const jinja_value *arg, jinja_value *out) {
    int64_t v[3] = {0, 0, 1};
    for (int32_t i = 0; i < 3; i++) {
        if (!given(&arg[i])) continue;
        if (!is_whole(&arg[i]))
            return JINJA_FAIL(r, ST_FORMAT, "range of a %s", jinja_kind_name(&arg[i]));
        v[i] = whole_of(&arg[i]);
        if (v[i] < -INT32_MAX || v[i] > INT32_MAX)
            return JINJA_FAIL(r, ST_RANGE, "range of %lld", (long long)v[i]);
    }
    if (!given(&arg[1])) v[1] = v[0], v[0] = 0;
    if (v[2] == 0) return JINJA_FAIL(r, ST_FORMAT, "range by steps of 0");
    const int64_t span = v[2] > 0 ? v[1] - v[0] : v[0] - v[1];
    const int64_t n = span > 0 ? div_up(span, llabs(v[2])) : 0;
    if (n > RANGE_MAX) return JINJA_FAIL(r, ST_RANGE, "range of more than %d", RANGE_MAX);
    TRY(jinja_new_list(r, (int32_t)n, out));
    for (int64_t i = 0; i < n; i++) out->list->item[i] = jinja_int(v[0] + i * v[2]);
    return ST_OK;
}

static status make_dict(jinja_run *r, const jinja_args *args, bool space, jinja_value *out) {
    TRY(jinja_new_dict(r, out));
    if (space) out->kind = JINJA_NAMESPACE;
    for (int32_t i = 0; i < args->n; i++) {
        const jinja_value *v = &args->value[i];
        if (args->key && args->key[i]) {
            TRY(jinja_dict_set(r, out->dict, jinja_literal(args->key[i]), *v));
        } else if (v->kind == JINJA_DICT) {
            for (int32_t k = 0; k < v->dict->n; k++)
                TRY(jinja_dict_set(r, out->dict, v->dict->key[k], v->dict->value[k]));
        } else {
            return JINJA_FAIL(r, ST_UNSUPPORTED, "dict of a %s", jinja_kind_name(v));
        }
    }
    return ST_OK;
}

status jinja_function(jinja_run *r, const char *name, size_t n, const jinja_args *args,
                      jinja_value *out) {
    int32_t row = 0;
    while (!named(functions[row].name, name, n)) row++; /* the caller found it */
    const char *f = functions[row].name;
    jinja_value arg[PARAMETERS_MAX];
    if (functions[row].parameters) TRY(bind(r, f, functions[row].parameters, args, arg));
    if (strcmp(f, "range") == 0) return make_range(r, arg, out);
    if (strcmp(f, "namespace") == 0) return make_dict(r, args, true, out);
    if (strcmp(f, "dict") == 0) return make_dict(r, args, false, out);
    TRY(want_string(r, f, &arg[0]));
    const int length = arg[0].n < 400 ? (int)arg[0].n : 400;
    if (strcmp(f, "raise_exception") == 0)
        return JINJA_FAIL(r, ST_FORMAT, "%.*s", length, arg[0].s);
    char format[128], shown[256];
    if (arg[0].n >= sizeof format) return JINJA_FAIL(r, ST_RANGE, "strftime_now: a long format");
    snprintf(format, sizeof format, "%.*s", length, arg[0].s);
    const time_t now = (time_t)r->now_s;
    struct tm local;
    if (!localtime_r(&now, &local)) return JINJA_FAIL(r, ST_RANGE, "strftime_now: no such time");
    const size_t written = strftime(shown, sizeof shown, format, &local);
    text t = {0};
    text_bytes(&t, shown, written);
    return jinja_take_text(r, &t, out);
}
