/* chat_template.c - see chat_template.h. The syntax tree is walked; scopes are lists of names.
 *
 * jinja2's scoping: `set` in a for body or a macro stays there (each pass of a loop begins with
 * an empty scope), an if makes no scope. A macro sees the scope in which it was defined. */
#include "chat_template.h"

#include "jinja.h"

#include <string.h>

enum { EVALUATION_DEPTH_MAX = 500, MACRO_DEPTH_MAX = 50, RENDER_BYTES = 64 << 20 };

struct chat_template {
    arena memory;
    jinja_node *root;
    char where[256];
};

typedef struct binding {
    struct binding *next;
    const char *name;
    uint32_t n;
    jinja_value value;
} binding;

typedef struct scope {
    struct scope *parent;
    binding *first;
} scope;

struct jinja_macro {
    const jinja_node *node; /* DEFINE or CALL_BLOCK */
    scope *home;
};

typedef enum { FLOW_ON, FLOW_BREAK, FLOW_CONTINUE } flow;

typedef struct {
    jinja_run r; /* first: what the parts take */
    text *out;
    scope *scope;
    int32_t depth, macros, loops;
} rendering;

static status evaluate(rendering *x, const jinja_node *n, jinja_value *out);
static status run_body(rendering *x, const jinja_node *first, flow *f);

static status no_memory(rendering *x) {
    return JINJA_FAIL(&x->r, ST_RANGE, "needs more than %d MiB", RENDER_BYTES >> 20);
}

/* --- Names ------------------------------------------------------------------------------------ */

static status push_scope(rendering *x, scope *parent, scope **made) {
    *made = arena_array(x->r.memory, scope, 1);
    if (!*made) return no_memory(x);
    (*made)->parent = parent;
    return ST_OK;
}

static const jinja_value *find_name(const scope *s, const char *name, uint32_t n) {
    for (; s; s = s->parent)
        for (const binding *b = s->first; b; b = b->next)
            if (b->n == n && memcmp(b->name, name, n) == 0) return &b->value;
    return NULL;
}

static status set_name(rendering *x, scope *s, const char *name, uint32_t n, jinja_value value) {
    TRY(jinja_spend(&x->r, 1));
    for (binding *b = s->first; b; b = b->next)
        if (b->n == n && memcmp(b->name, name, n) == 0) return b->value = value, ST_OK;
    binding *b = arena_array(x->r.memory, binding, 1);
    if (!b) return no_memory(x);
    *b = (binding){.next = s->first, .name = name, .n = n, .value = value};
    s->first = b;
    return ST_OK;
}

static status assign(rendering *x, const jinja_node *target, jinja_value value) {
    if (target->kind == JINJA_NAME) return set_name(x, x->scope, target->s, target->n, value);
    jinja_value space;
    TRY(evaluate(x, target->a, &space));
    x->r.line = target->line;
    if (space.kind != JINJA_NAMESPACE)
        return JINJA_FAIL(&x->r, ST_FORMAT, "set of '%s' on a %s, which is no namespace", target->s,
                          jinja_kind_name(&space));
    return jinja_dict_set(&x->r, space.dict, jinja_string(target->s, target->n), value);
}

/* One value to one name, or its items to as many. */
static status assign_all(rendering *x, const jinja_node *n, jinja_value value) {
    if (n->n_list == 1) return assign(x, n->list[0], value);
    jinja_value items;
    TRY(jinja_iterate(&x->r, &value, &items));
    if (items.list->n != n->n_list)
        return JINJA_FAIL(&x->r, ST_FORMAT, "%d values for %d names", items.list->n, n->n_list);
    for (int32_t i = 0; i < n->n_list; i++) TRY(assign(x, n->list[i], items.list->item[i]));
    return ST_OK;
}

/* --- Calls ------------------------------------------------------------------------------------ */

/* Run a body with its output going into a value. */
static status capture(rendering *x, const jinja_node *body, jinja_value *out) {
    text mine = {0}, *before = x->out;
    flow f = FLOW_ON;
    x->out = &mine;
    const status st = run_body(x, body, &f);
    x->out = before;
    if (st == ST_OK) return jinja_take_text(&x->r, &mine, out);
    text_free(&mine);
    return st;
}

static status evaluate_arguments(rendering *x, const jinja_node *n, jinja_args *args) {
    jinja_value *value = arena_array(x->r.memory, jinja_value, (size_t)n->n_list + 1);
    if (!value) return no_memory(x);
    for (int32_t i = 0; i < n->n_list; i++) TRY(evaluate(x, n->list[i], &value[i]));
    *args = (jinja_args){.value = value, .key = n->key, .n = n->n_list};
    return ST_OK;
}

static status call_macro(rendering *x, const jinja_macro *m, const jinja_args *args,
                         const jinja_value *caller, jinja_value *out) {
    const jinja_node *n = m->node;
    if (x->macros == MACRO_DEPTH_MAX)
        return JINJA_FAIL(&x->r, ST_RANGE, "macros call each other deeper than %d",
                          MACRO_DEPTH_MAX);
    scope *inner, *outer = x->scope;
    TRY(push_scope(x, m->home, &inner));
    x->scope = inner;
    for (int32_t i = 0; i < n->n_list; i++) {
        jinja_value v = {.kind = JINJA_UNDEFINED, .s = n->key[i], .n = (uint32_t)strlen(n->key[i])};
        if (n->arg[i]) TRY(evaluate(x, n->arg[i], &v));
        TRY(set_name(x, inner, n->key[i], (uint32_t)strlen(n->key[i]), v));
    }
    for (int32_t i = 0; i < args->n; i++) {
        int32_t at = args->key && args->key[i] ? -1 : i;
        for (int32_t k = 0; at < 0 && k < n->n_list; k++)
            if (strcmp(args->key[i], n->key[k]) == 0) at = k;
        if (at < 0 || at >= n->n_list)
            return JINJA_FAIL(&x->r, ST_FORMAT, "macro '%s' takes no such argument",
                              n->s ? n->s : "caller");
        TRY(set_name(x, inner, n->key[at], (uint32_t)strlen(n->key[at]), args->value[i]));
    }
    if (caller) TRY(set_name(x, inner, "caller", 6, *caller));
    const int32_t loops = x->loops;
    x->macros++;
    TRY(capture(x, n->body, out));
    x->macros--;
    x->loops = loops;
    x->scope = outer;
    return ST_OK;
}

/* A CALL node; `caller` for call blocks. */
static status evaluate_call(rendering *x, const jinja_node *n, const jinja_value *caller,
                            jinja_value *out) {
    jinja_value callee;
    jinja_args args;
    if (n->a->kind == JINJA_ATTR) {
        TRY(evaluate(x, n->a->a, &callee));
        TRY(evaluate_arguments(x, n, &args));
        x->r.line = n->line;
        return jinja_method(&x->r, &callee, n->a->s, n->a->n, &args, out);
    }
    TRY(evaluate(x, n->a, &callee));
    TRY(evaluate_arguments(x, n, &args));
    x->r.line = n->line;
    if (callee.kind == JINJA_MACRO) return call_macro(x, callee.macro, &args, caller, out);
    if (callee.kind == JINJA_FUNCTION && jinja_find_function(callee.s, callee.n))
        return jinja_function(&x->r, callee.s, callee.n, &args, out);
    if (callee.kind == JINJA_UNDEFINED)
        return JINJA_FAIL(&x->r, ST_UNSUPPORTED, "function '%.*s'",
                          callee.n < 80 ? (int)callee.n : 80, callee.s);
    return JINJA_FAIL(&x->r, ST_FORMAT, "a %s cannot be called", jinja_kind_name(&callee));
}

/* --- Expressions ------------------------------------------------------------------------------ */

static status evaluate_name(rendering *x, const jinja_node *n, jinja_value *out) {
    const jinja_value *found = find_name(x->scope, n->s, n->n);
    if (found)
        *out = *found;
    else
        *out = (jinja_value){.kind =
                                 jinja_find_function(n->s, n->n) ? JINJA_FUNCTION : JINJA_UNDEFINED,
                             .s = n->s,
                             .n = n->n};
    return ST_OK;
}

static status evaluate_literal(rendering *x, const jinja_node *n, jinja_value *out) {
    if (n->kind == JINJA_SEQ) {
        TRY(jinja_new_list(&x->r, n->n_list, out));
        out->list->tuple = n->op;
        for (int32_t i = 0; i < n->n_list; i++) TRY(evaluate(x, n->list[i], &out->list->item[i]));
        return ST_OK;
    }
    TRY(jinja_new_dict(&x->r, out));
    for (int32_t i = 0; i < n->n_list; i++) {
        jinja_value key, value;
        TRY(evaluate(x, n->list[i], &key));
        TRY(evaluate(x, n->arg[i], &value));
        TRY(jinja_dict_set(&x->r, out->dict, key, value));
    }
    return ST_OK;
}

static status evaluate_compare(rendering *x, const jinja_node *n, jinja_value *out) {
    jinja_value left, right;
    bool yes = true;
    TRY(evaluate(x, n->list[0], &left));
    for (int32_t i = 1; yes && i < n->n_list; i++) {
        TRY(evaluate(x, n->list[i], &right));
        x->r.line = n->line;
        TRY(jinja_compare(&x->r, &left, n->cmp[i - 1], &right, &yes));
        left = right;
    }
    *out = jinja_bool(yes);
    return ST_OK;
}

static status evaluate_negative(rendering *x, const jinja_node *n, jinja_value *out) {
    const jinja_value zero = jinja_int(0);
    jinja_value v;
    TRY(evaluate(x, n->a, &v));
    if (v.kind == JINJA_FLOAT) return *out = v, out->f = -v.f, ST_OK;
    return jinja_binary(&x->r, &zero, '-', &v, out);
}

static status evaluate_part(rendering *x, const jinja_node *n, jinja_value *out) {
    jinja_value v, key, bound[3];
    TRY(evaluate(x, n->a, &v));
    if (n->kind == JINJA_ITEM) TRY(evaluate(x, n->b, &key));
    for (int32_t i = 0; n->kind == JINJA_SLICE && i < 3; i++) {
        bound[i] = (jinja_value){.kind = JINJA_MISSING};
        if (n->list[i]) TRY(evaluate(x, n->list[i], &bound[i]));
    }
    x->r.line = n->line;
    if (n->kind == JINJA_ATTR) return jinja_attribute(&x->r, &v, n->s, n->n, out);
    if (n->kind == JINJA_ITEM) return jinja_item(&x->r, &v, &key, out);
    return jinja_slice(&x->r, &v, bound, out);
}

static status evaluate_filter(rendering *x, const jinja_node *n, jinja_value *out) {
    jinja_value v;
    jinja_args args;
    TRY(evaluate(x, n->a, &v));
    TRY(evaluate_arguments(x, n, &args));
    x->r.line = n->line;
    if (n->kind == JINJA_FILTER) return jinja_filter(&x->r, n->op, &v, &args, out);
    bool yes;
    TRY(jinja_test(&x->r, n->op, &v, &args, &yes));
    *out = jinja_bool(yes);
    return ST_OK;
}

static status evaluate_kind(rendering *x, const jinja_node *n, jinja_value *out) {
    jinja_value a, b;
    switch (n->kind) {
    case JINJA_CONST: *out = n->value; return ST_OK;
    case JINJA_NAME: return evaluate_name(x, n, out);
    case JINJA_SLOT: return evaluate_name(x, &(jinja_node){.s = "|", .n = 1}, out);
    case JINJA_SEQ:
    case JINJA_MAP: return evaluate_literal(x, n, out);
    case JINJA_ATTR:
    case JINJA_ITEM:
    case JINJA_SLICE: return evaluate_part(x, n, out);
    case JINJA_CALL: return evaluate_call(x, n, NULL, out);
    case JINJA_FILTER:
    case JINJA_TEST: return evaluate_filter(x, n, out);
    case JINJA_NOT:
        TRY(evaluate(x, n->a, &a));
        *out = jinja_bool(!jinja_truth(&a));
        return ST_OK;
    case JINJA_NEG: return evaluate_negative(x, n, out);
    case JINJA_AND:
    case JINJA_OR:
        TRY(evaluate(x, n->a, out));
        return jinja_truth(out) == (n->kind == JINJA_AND) ? evaluate(x, n->b, out) : ST_OK;
    case JINJA_COMPARE: return evaluate_compare(x, n, out);
    case JINJA_BINARY:
        TRY(evaluate(x, n->a, &a));
        TRY(evaluate(x, n->b, &b));
        x->r.line = n->line;
        return jinja_binary(&x->r, &a, n->op, &b, out);
    case JINJA_COND:
        TRY(evaluate(x, n->b, &b));
        if (jinja_truth(&b)) return evaluate(x, n->a, out);
        *out = (jinja_value){.kind = JINJA_UNDEFINED, .s = "else", .n = 4};
        return n->c ? evaluate(x, n->c, out) : ST_OK;
    default: CHECK(!"an expression"); return ST_OK;
    }
}

static status evaluate(rendering *x, const jinja_node *n, jinja_value *out) {
    x->r.line = n->line;
    if (x->depth >= EVALUATION_DEPTH_MAX)
        return JINJA_FAIL(&x->r, ST_RANGE, "nested deeper than %d", EVALUATION_DEPTH_MAX);
    TRY(jinja_spend(&x->r, 1));
    x->depth++;
    const status st = evaluate_kind(x, n, out);
    x->depth--;
    return st;
}

/* --- Statements ------------------------------------------------------------------------------- */

static status emit(rendering *x, const char *s, size_t n) {
    if (x->out->length + n > CHAT_TEMPLATE_OUTPUT_MAX)
        return JINJA_FAIL(&x->r, ST_RANGE, "output of more than %d bytes",
                          CHAT_TEMPLATE_OUTPUT_MAX);
    text_bytes(x->out, s, n);
    TRY(text_status(x->out));
    return jinja_spend(&x->r, (int64_t)(n / 64));
}

static status run_output(rendering *x, const jinja_node *n) {
    jinja_value v;
    TRY(evaluate(x, n->a, &v));
    x->r.line = n->line;
    if (v.kind == JINJA_STRING) return emit(x, v.s, v.n);
    TRY(jinja_write(&x->r, &v, x->out));
    return emit(x, "", 0);
}

/* The items that the loop's filter leaves: `loop` counts only those. */
static status filtered_items(rendering *x, const jinja_node *n, jinja_value *items) {
    jinja_value v;
    TRY(evaluate(x, n->a, &v));
    x->r.line = n->line;
    TRY(jinja_iterate(&x->r, &v, items));
    if (!n->b) return ST_OK;
    const jinja_value all = *items;
    scope *outer = x->scope;
    TRY(jinja_new_list(&x->r, all.list->n, items));
    int32_t kept = 0;
    for (int32_t i = 0; i < all.list->n; i++) {
        jinja_value yes;
        TRY(push_scope(x, outer, &x->scope));
        TRY(assign_all(x, n, all.list->item[i]));
        TRY(evaluate(x, n->b, &yes));
        if (jinja_truth(&yes)) items->list->item[kept++] = all.list->item[i];
    }
    x->scope = outer;
    items->list->n = kept;
    return ST_OK;
}

static status run_for(rendering *x, const jinja_node *n, flow *f) {
    jinja_value items;
    TRY(filtered_items(x, n, &items));
    if (items.list->n == 0) return run_body(x, n->other, f);
    jinja_loop *loop = arena_array(x->r.memory, jinja_loop, 1);
    if (!loop) return no_memory(x);
    *loop = (jinja_loop){.items = items.list};
    scope *outer = x->scope;
    x->loops++;
    for (loop->at = 0; loop->at < items.list->n; loop->at++) {
        TRY(push_scope(x, outer, &x->scope));
        x->r.line = n->line;
        TRY(assign_all(x, n, items.list->item[loop->at]));
        TRY(set_name(x, x->scope, "loop", 4, (jinja_value){.kind = JINJA_LOOP, .loop = loop}));
        flow inner = FLOW_ON;
        TRY(run_body(x, n->body, &inner));
        if (inner == FLOW_BREAK) break;
    }
    x->loops--;
    x->scope = outer;
    return ST_OK;
}

/* A chain of filters over what the block wrote. */
static status apply_filters(rendering *x, const jinja_node *chain, jinja_value *v) {
    scope *outer = x->scope;
    TRY(push_scope(x, outer, &x->scope));
    TRY(set_name(x, x->scope, "|", 1, *v)); /* no template can spell this name */
    TRY(evaluate(x, chain, v));
    x->scope = outer;
    return ST_OK;
}

static status run_block(rendering *x, const jinja_node *n) {
    jinja_value v;
    scope *outer = x->scope;
    TRY(push_scope(x, outer, &x->scope));
    TRY(capture(x, n->body, &v));
    x->scope = outer;
    if (n->a) TRY(apply_filters(x, n->a, &v));
    if (n->kind == JINJA_SET_BLOCK) return assign(x, n->list[0], v);
    x->r.line = n->line;
    return jinja_write(&x->r, &v, x->out);
}

static status make_macro(rendering *x, const jinja_node *n, jinja_value *out) {
    jinja_macro *m = arena_array(x->r.memory, jinja_macro, 1);
    if (!m) return no_memory(x);
    *m = (jinja_macro){.node = n, .home = x->scope};
    *out = (jinja_value){.kind = JINJA_MACRO, .macro = m};
    return ST_OK;
}

static status run_statement(rendering *x, const jinja_node *n, flow *f) {
    jinja_value v, caller;
    switch (n->kind) {
    case JINJA_TEXT: return emit(x, n->s, n->n);
    case JINJA_OUTPUT: return run_output(x, n);
    case JINJA_IF:
        for (; n && n->kind == JINJA_IF; n = n->other) {
            TRY(evaluate(x, n->a, &v));
            if (jinja_truth(&v)) return run_body(x, n->body, f);
            if (!n->other || n->other->kind != JINJA_IF || !n->other->op) break;
        }
        return run_body(x, n->other, f);
    case JINJA_FOR: return run_for(x, n, f);
    case JINJA_SET:
        TRY(evaluate(x, n->a, &v));
        x->r.line = n->line;
        return assign_all(x, n, v);
    case JINJA_SET_BLOCK:
    case JINJA_FILTER_BLOCK: return run_block(x, n);
    case JINJA_DEFINE: TRY(make_macro(x, n, &v)); return set_name(x, x->scope, n->s, n->n, v);
    case JINJA_CALL_BLOCK:
        TRY(make_macro(x, n, &caller));
        TRY(evaluate_call(x, n->a, &caller, &v));
        return jinja_write(&x->r, &v, x->out);
    case JINJA_SCOPE: return run_block(x, n);
    case JINJA_BREAK: *f = FLOW_BREAK; return ST_OK;
    case JINJA_CONTINUE: *f = FLOW_CONTINUE; return ST_OK;
    default: CHECK(!"a statement"); return ST_OK;
    }
}

static status run_body(rendering *x, const jinja_node *first, flow *f) {
    if (x->depth >= EVALUATION_DEPTH_MAX)
        return JINJA_FAIL(&x->r, ST_RANGE, "nested deeper than %d", EVALUATION_DEPTH_MAX);
    x->depth++;
    for (const jinja_node *n = first; n && *f == FLOW_ON; n = n->next) {
        x->r.line = n->line;
        TRY(jinja_spend(&x->r, 1));
        TRY(run_statement(x, n, f));
    }
    x->depth--;
    return ST_OK;
}

/* --- Interface -------------------------------------------------------------------------------- */

status chat_template_open(chat_template **out, const char *source, size_t n, const char *where) {
    *out = NULL;
    chat_template *t = mem_alloc(1, sizeof *t);
    if (!t) return FAIL(ST_NOMEM, "chat template");
    snprintf(t->where, sizeof t->where, "%s", where);
    /* A byte of source makes at most a node and a list of it: address space, committed as
     * touched. */
    status st = arena_open(&t->memory, (n < CHAT_TEMPLATE_SOURCE_MAX ? n : 1) * 512 + (1 << 20));
    if (st == ST_OK) st = jinja_parse(&t->root, &t->memory, source, n, t->where);
    if (st != ST_OK) {
        chat_template_close(t);
        return st;
    }
    arena_seal(&t->memory);
    *out = t;
    return ST_OK;
}

void chat_template_close(chat_template *t) {
    if (!t) return;
    arena_close(&t->memory);
    mem_free(t);
}

static status set_inputs(rendering *x, const chat_template_input *in) {
    jinja_value v;
    const char *key;
    json_t *item;
    json_object_foreach((json_t *)in->variables, key, item) {
        TRY(jinja_from_json(&x->r, item, 0, &v));
        TRY(set_name(x, x->scope, key, (uint32_t)strlen(key), v));
    }
    TRY(jinja_from_json(&x->r, in->messages, 0, &v));
    TRY(set_name(x, x->scope, "messages", 8, v));
    v = (jinja_value){.kind = JINJA_NONE};
    if (in->tools) TRY(jinja_from_json(&x->r, in->tools, 0, &v));
    TRY(set_name(x, x->scope, "tools", 5, v));
    v = (jinja_value){.kind = JINJA_NONE};
    TRY(set_name(x, x->scope, "documents", 9, v));
    TRY(set_name(x, x->scope, "add_generation_prompt", 21, jinja_bool(in->add_generation_prompt)));
    TRY(set_name(x, x->scope, "bos_token", 9, jinja_literal(in->bos ? in->bos : "")));
    return set_name(x, x->scope, "eos_token", 9, jinja_literal(in->eos ? in->eos : ""));
}

status chat_template_render(const chat_template *t, const chat_template_input *in, text *out) {
    arena memory;
    TRY(arena_open(&memory, RENDER_BYTES));
    rendering x = {.r = {.memory = &memory, .where = t->where, .line = 1, .now_s = in->now_s},
                   .out = out};
    flow f = FLOW_ON;
    status st = push_scope(&x, NULL, &x.scope);
    if (st == ST_OK) st = set_inputs(&x, in);
    if (st == ST_OK) st = push_scope(&x, x.scope, &x.scope);
    if (st == ST_OK) st = run_body(&x, t->root, &f);
    arena_close(&memory);
    return st == ST_OK ? text_status(out) : st;
}
