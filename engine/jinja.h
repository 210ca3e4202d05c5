/* jinja.h - syntax tree and values of the template language: private to chat_template.c and its
 * parts. */
#ifndef AMALGAM_JINJA_H
#define AMALGAM_JINJA_H
#include "json.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef struct jinja_node jinja_node;
typedef struct jinja_value jinja_value;
typedef struct jinja_list jinja_list;
typedef struct jinja_dict jinja_dict;
typedef struct jinja_loop jinja_loop;
typedef struct jinja_macro jinja_macro;
typedef struct jinja_run jinja_run;

/* --- Values ----------------------------------------------------------------------------------- */

typedef enum {
    JINJA_MISSING, /* an argument that was not given; never seen by a template */
    JINJA_UNDEFINED,
    JINJA_NONE,
    JINJA_BOOL,
    JINJA_INT,
    JINJA_FLOAT,
    JINJA_STRING,
    JINJA_LIST,
    JINJA_DICT,
    JINJA_NAMESPACE, /* a dict whose members can be set */
    JINJA_LOOP,
    JINJA_MACRO,
    JINJA_FUNCTION /* a built-in one, by name */
} jinja_kind;

/* Strings, lists and dicts lie in the arena of the rendering (constants in that of the template)
 * and are never changed once another value can see them. */
struct jinja_value {
    jinja_kind kind;
    uint32_t n; /* bytes of s */
    union {
        bool b;
        int64_t i;
        double f;
        const char *s; /* UTF-8, not terminated; of UNDEFINED and FUNCTION the name */
        jinja_list *list;
        jinja_dict *dict;
        jinja_loop *loop;
        jinja_macro *macro;
    };
};

struct jinja_list {
    jinja_value *item;
    int32_t n;
    bool tuple; /* only its repr differs */
};

struct jinja_dict {
    jinja_value *key, *value;
    int32_t n, size;
};

struct jinja_loop {
    const jinja_list *items;
    int32_t at; /* index0 */
    int32_t depth;
};

/* --- Syntax tree ------------------------------------------------------------------------------ */

typedef enum {
    /* statements */
    JINJA_TEXT,         /* s, n */
    JINJA_OUTPUT,       /* a */
    JINJA_IF,           /* a = condition, body, other (an elif is an IF there) */
    JINJA_FOR,          /* list = targets, a = iterable, b = filter or NULL, body, other */
    JINJA_SET,          /* list = targets, a */
    JINJA_SET_BLOCK,    /* list = target, body, a = chain of filters over an empty slot, or NULL */
    JINJA_DEFINE,       /* macro: s, list = parameters (NAME), defaults in arg, body */
    JINJA_CALL_BLOCK,   /* a = CALL, list = parameters, body */
    JINJA_FILTER_BLOCK, /* a = chain of filters over an empty slot, body */
    JINJA_SCOPE,        /* body: generation */
    JINJA_BREAK,
    JINJA_CONTINUE,
    /* expressions */
    JINJA_SLOT,    /* what a block of filters is applied to */
    JINJA_CONST,   /* value */
    JINJA_NAME,    /* s */
    JINJA_SEQ,     /* list; op = tuple */
    JINJA_MAP,     /* list = keys, arg = values */
    JINJA_ATTR,    /* a, s */
    JINJA_ITEM,    /* a, b */
    JINJA_SLICE,   /* a, list[3] (entries may be NULL) */
    JINJA_CALL,    /* a, list = arguments, key[i] = keyword or NULL */
    JINJA_FILTER,  /* a, op = row of the filter table, list, key */
    JINJA_TEST,    /* a, op = row of the test table, list, key */
    JINJA_NOT,     /* a */
    JINJA_NEG,     /* a */
    JINJA_AND,     /* a, b */
    JINJA_OR,      /* a, b */
    JINJA_COMPARE, /* list[0] cmp[0] list[1] cmp[1] list[2] … */
    JINJA_BINARY,  /* a, op, b */
    JINJA_COND     /* a if b else c (or NULL) */
} jinja_node_kind;

enum { JINJA_EQ, JINJA_NE, JINJA_LT, JINJA_LE, JINJA_GT, JINJA_GE, JINJA_IN, JINJA_NOT_IN };

struct jinja_node {
    jinja_node_kind kind;
    int32_t line, op;
    const char *s;
    uint32_t n;
    jinja_value value;
    jinja_node *a, *b, *c;
    jinja_node **list, **arg;
    const char **key; /* keywords of arguments, terminated strings */
    uint8_t *cmp;
    int32_t n_list;
    jinja_node *body, *other; /* first statements */
    jinja_node *next;         /* statement after this one */
};

/* Parse into `a`; *root is the first statement or NULL. */
status jinja_parse(jinja_node **root, arena *a, const char *source, size_t n, const char *where);

/* --- One rendering ---------------------------------------------------------------------------- */

struct jinja_run {
    arena *memory;
    const char *where;
    int32_t line; /* of the node at work, for messages */
    int64_t steps;
    int64_t now_s;
};

/* `st` with where:line before the message. */
#define JINJA_FAIL(r, st, ...)                                                                     \
    fail_prefix(FAIL(st, __VA_ARGS__), "chat template %s:%d", (r)->where, (r)->line)

/* Count work; RANGE past the limit. */
status jinja_spend(jinja_run *r, int64_t steps);

jinja_value jinja_string(const char *s, size_t n); /* not copied; n < 2^32 */
jinja_value jinja_literal(const char *s);
jinja_value jinja_bool(bool b);
jinja_value jinja_int(int64_t i);
/* Copy what was built and free it. */
status jinja_take_text(jinja_run *r, text *t, jinja_value *out);
status jinja_new_list(jinja_run *r, int32_t n, jinja_value *out); /* n items, UNDEFINED */
status jinja_new_dict(jinja_run *r, jinja_value *out);            /* empty */
/* d[key] = value; keys that are equal as Python has it are one. */
status jinja_dict_set(jinja_run *r, jinja_dict *d, jinja_value key, jinja_value value);
/* v lies `depth` levels deep; RANGE where it goes too deep. Strings are not copied. */
status jinja_from_json(jinja_run *r, const json_t *v, int32_t depth, jinja_value *out);

/* Python's bool(). */
bool jinja_truth(const jinja_value *v);
/* a op b for == != < <= > >= in "not in" (JINJA_EQ, ...); FORMAT for what has no order. */
status jinja_compare(jinja_run *r, const jinja_value *a, int32_t op, const jinja_value *b,
                     bool *out);
/* str(): what an output statement writes. */
status jinja_write(jinja_run *r, const jinja_value *v, text *out);
const char *jinja_kind_name(const jinja_value *v);

/* Items of a list, keys of a dict, characters of a string, nothing of undefined. */
status jinja_iterate(jinja_run *r, const jinja_value *v, jinja_value *list);
/* v.name and v[key]; what is not there is UNDEFINED, and FORMAT when v itself was. */
status jinja_attribute(jinja_run *r, const jinja_value *v, const char *name, size_t n,
                       jinja_value *out);
status jinja_item(jinja_run *r, const jinja_value *v, const jinja_value *key, jinja_value *out);
/* bound[3]: start, stop, step; MISSING when not given. */
status jinja_slice(jinja_run *r, const jinja_value *v, const jinja_value bound[3],
                   jinja_value *out);
/* a op b: '+' '-' '*' '/' '%' '~', or '/' * 256 + '/' for //; FORMAT for kinds that do not go
 * together. */
status jinja_binary(jinja_run *r, const jinja_value *a, int32_t op, const jinja_value *b,
                    jinja_value *out);

/* Arguments of a call: positional ones first, then those with keywords. */
typedef struct {
    const jinja_value *value;
    const char *const *key;
    int32_t n;
} jinja_args;

/* Rows of the tables, or -1. */
int32_t jinja_find_filter(const char *name, size_t n);
int32_t jinja_find_test(const char *name, size_t n);
int32_t jinja_find_method(const char *name, size_t n);
bool jinja_find_function(const char *name, size_t n);

/* in | row, in is row, self.name(args), name(args); row as found above. FORMAT for arguments that
 * it does not take, UNSUPPORTED for a name that is not known. */
status jinja_filter(jinja_run *r, int32_t row, const jinja_value *in, const jinja_args *args,
                    jinja_value *out);
status jinja_test(jinja_run *r, int32_t row, const jinja_value *in, const jinja_args *args,
                  bool *out);
status jinja_method(jinja_run *r, const jinja_value *self, const char *name, size_t n,
                    const jinja_args *args, jinja_value *out);
status jinja_function(jinja_run *r, const char *name, size_t n, const jinja_args *args,
                      jinja_value *out);

#ifdef __cplusplus
}
#endif
#endif
