/* corpus.c - see corpus.h.
 *
 * The stories come from a small rewriting grammar: a rule is a string of alternatives, and to
 * expand one is to copy it to the output while replacing what stands in braces (the notation is
 * explained at the top of corpus.def). What makes a text more than a chain of words are the bound
 * names: a document first draws its cast, and everything that mentions the hero, the pet or the
 * secret number afterwards says the same, so that a model must look back to predict it.
 *
 * Easy to get wrong: two draws in one expression or initialiser have no order in C, so each has a
 * statement of its own. And every choice changes all that follow it, so one more alternative in
 * any rule is another corpus, to which the checkpoint's figures no longer belong (test_corpus.c
 * pins the bytes). */
#include "corpus.h"
#include "rng.h"

#include <string.h>

#define VARS_MAX   40
#define NAME_BYTES 16 /* bytes of a bound name, with its end */
#define WORD_BYTES 48 /* bytes of a bound value, with its end */

typedef struct {
    const char *at, *end;
} span;

typedef struct {
    text *out;
    rng r;
    bool held_out;
    int32_t n_vars;
    struct {
        char name[NAME_BYTES], value[WORD_BYTES];
    } var[VARS_MAX];
} generator;

static const struct {
    const char *name, *text;
} rules[] = {
#define X(name, text) {#name, text},
#include "corpus.def"
#undef X
};

static const char *const kind_names[CORPUS_KIND_COUNT] = {"story", "arithmetic", "recall", "chat"};

/* Of a hundred documents; ORDER corpus_kind. Of the tokens that is about a third, a quarter, a
 * third and a fourteenth: what needs most practice is short. */
static const uint64_t kind_weights[CORPUS_KIND_COUNT] = {35, 30, 25, 10};

const char *corpus_kind_name(corpus_kind kind) {
    CHECK(kind < CORPUS_KIND_COUNT);
    return kind_names[kind];
}

bool corpus_kind_parse(const char *name, corpus_kind *out) {
    for (int32_t k = 0; k < CORPUS_KIND_COUNT; k++) {
        if (strcmp(name, kind_names[k]) != 0) continue;
        *out = (corpus_kind)k;
        return true;
    }
    return false;
}

/* --- The grammar machine ---------------------------------------------------------------------- */

static int64_t draw(generator *g, int64_t lo, int64_t hi) { return rng_range(&g->r, lo, hi); }
static bool chance(generator *g, uint64_t in_hundred) { return rng_below(&g->r, 100) < in_hundred; }

static void put(generator *g, const char *s) { text_bytes(g->out, s, strlen(s)); }

static span span_of(const char *s) { return (span){s, s + strlen(s)}; }

static bool span_is(span s, const char *name) {
    const size_t n = (size_t)(s.end - s.at);
    return strncmp(s.at, name, n) == 0 && name[n] == 0;
}

/* The end of the alternative that starts at `at`: the next '|' outside braces, or `end`. */
static const char *alternative_end(const char *at, const char *end) {
    int depth = 0;
    for (; at < end; at++) {
        if (*at == '|' && depth == 0) break;
        depth += (*at == '{') - (*at == '}');
    }
    return at;
}

static span choose(generator *g, span s) {
    uint64_t n = 1;
    for (const char *at = alternative_end(s.at, s.end); at < s.end;) {
        n++;
        at = alternative_end(at + 1, s.end);
    }
    const char *at = s.at;
    for (uint64_t skip = rng_below(&g->r, n); skip > 0; skip--) at = alternative_end(at, s.end) + 1;
    return (span){at, alternative_end(at, s.end)};
}

static span rule(span name) {
    for (int32_t i = 0; i < COUNT_OF(rules); i++)
        if (span_is(name, rules[i].name)) return span_of(rules[i].text);
    CHECK(!"a name that the grammar does not know");
    return name;
}

/* The value bound to `name`, or NULL. */
static const char *bound(const generator *g, span name) {
    for (int32_t i = 0; i < g->n_vars; i++)
        if (span_is(name, g->var[i].name)) return g->var[i].value;
    return NULL;
}

static void bind(generator *g, span name, span value) {
    const size_t n_name = (size_t)(name.end - name.at), n_value = (size_t)(value.end - value.at);
    CHECK(n_name < NAME_BYTES);
    CHECK(n_value < WORD_BYTES);
    int32_t i = 0;
    while (i < g->n_vars && !span_is(name, g->var[i].name)) i++;
    CHECK(i < VARS_MAX);
    if (i == g->n_vars) {
        memcpy(g->var[i].name, name.at, n_name);
        g->var[i].name[n_name] = 0;
        g->n_vars++;
    }
    memcpy(g->var[i].value, value.at, n_value);
    g->var[i].value[n_value] = 0;
}

static void expand(generator *g, span s);

/* Bind `name` to an expansion of `pattern` and print nothing. A refused allocation leaves it empty;
 * the document is lost then anyway. */
static void bind_expansion(generator *g, span name, span pattern) {
    text *const out = g->out, scratch = *out;
    *out = (text){0};
    expand(g, pattern);
    bind(g, name, out->data ? (span){out->data, out->data + out->length} : (span){"", ""});
    const bool failed = out->failed;
    text_free(out);
    *out = scratch;
    out->failed |= failed;
}

static void bind_as(generator *g, const char *name, const char *pattern) {
    bind_expansion(g, span_of(name), span_of(pattern));
}

static void bind_number(generator *g, const char *name, int64_t v) {
    char digits[24];
    snprintf(digits, sizeof digits, "%lld", (long long)v);
    bind(g, span_of(name), span_of(digits));
}

static void expand_braces(generator *g, span s) {
    const char *const equals = memchr(s.at, '=', (size_t)(s.end - s.at));
    if (alternative_end(s.at, s.end) < s.end) {
        expand(g, choose(g, s));
    } else if (equals) {
        bind_expansion(g, (span){s.at, equals}, choose(g, rule((span){equals + 1, s.end})));
    } else {
        const char *const value = bound(g, s);
        if (value) {
            put(g, value);
        } else {
            expand(g, choose(g, rule(s)));
        }
    }
}

/* Print one alternative. */
static void expand(generator *g, span s) {
    while (s.at < s.end) {
        const char *brace = memchr(s.at, '{', (size_t)(s.end - s.at));
        if (!brace) brace = s.end;
        text_bytes(g->out, s.at, (size_t)(brace - s.at));
        if (brace == s.end) return;

        span in = {brace + 1, brace + 1};
        for (int depth = 1; depth > 0; in.end++) {
            CHECK(in.end < s.end);
            depth += (*in.end == '{') - (*in.end == '}');
        }
        s.at = in.end--; /* behind the brace; the inside ends before it */

        bool capital = false, article = false;
        for (; *in.at == '^' || *in.at == '@'; in.at++) {
            capital |= *in.at == '^';
            article |= *in.at == '@';
        }
        const size_t start = g->out->length;
        if (article) put(g, "a ");
        expand_braces(g, in);
        char *const c = g->out->failed ? NULL : g->out->data + start;
        if (c && capital && c[0] >= 'a' && c[0] <= 'z') c[0] = (char)(c[0] - 'a' + 'A');
        if (c && article && strchr("aeiouAEIOU", c[2])) {
            put(g, " ");
            char *const again = g->out->data + start; /* the text may have moved */
            if (g->out->failed) return;
            memmove(again + 2, again + 1, g->out->length - start - 2);
            again[1] = 'n';
        }
    }
}

static void say(generator *g, const char *pattern) { expand(g, choose(g, span_of(pattern))); }

/* --- Stories ---------------------------------------------------------------------------------- */

static void bind_person(generator *g, const char *name, const char *const pronouns[4]) {
    const bool girl = chance(g, 50);
    static const char *const forms[2][4] = {{"he", "him", "his", "boy"},
                                            {"she", "her", "her", "girl"}};
    bind_as(g, name, girl ? "{girl}" : "{boy}");
    for (int i = 0; i < 4; i++) bind(g, span_of(pronouns[i]), span_of(forms[girl][i]));
}

/* Bind everything that a story keeps: hero (he, him, his, child), friend (fhe, ...), pet, petname,
 * relative, thing, secret, and numbers with x + y = sum. */
static void bind_cast(generator *g) {
    static const char *const hero[4] = {"he", "him", "his", "child"};
    static const char *const friend_[4] = {"fhe", "fhim", "fhis", "fchild"};
    bind_person(g, "hero", hero);
    do {
        bind_person(g, "friend", friend_);
    } while (strcmp(bound(g, span_of("hero")), bound(g, span_of("friend"))) == 0 &&
             !g->out->failed);
    bind_as(g, "pet", "{animal}");
    bind_as(g, "petname", "{petname}");
    bind_as(g, "relative", "{relative}");
    bind_as(g, "thing", "{colour} {object}");
    bind_number(g, "secret", draw(g, 100, 9999));
    const int64_t x = draw(g, 2, 30), y = draw(g, 2, 30);
    bind_number(g, "x", x);
    bind_number(g, "y", y);
    bind_number(g, "sum", x + y);
    bind_number(g, "n", draw(g, 3, 24));
}

/* The story of a bound cast. */
static void tell_story(generator *g) {
    static const char *const scenes[] = {
        "{scene_secret}", /* first: only in stories that introduced the number */
        "{scene_lost}",   "{scene_count}",  "{scene_storm}", "{scene_meet}",   "{scene_market}",
        "{scene_bake}",   "{scene_race}",   "{scene_night}", "{scene_gift}",   "{scene_letter}",
        "{scene_animal}", "{scene_garden}", "{scene_river}", "{scene_school}",
    };
    const bool secret = chance(g, 50);
    int32_t order[COUNT_OF(scenes)];
    const int32_t first = secret ? 0 : 1, n = COUNT_OF(scenes) - first;
    for (int32_t i = 0; i < n; i++) order[i] = first + i;
    rng_shuffle(&g->r, order, n);

    say(g, "{opening}");
    if (secret) say(g, " {about_secret}");
    put(g, "\n\n");
    for (int64_t i = 0, m = draw(g, 1, 4); i < m; i++) {
        say(g, scenes[order[i]]);
        put(g, "\n\n");
    }
    say(g, secret && chance(g, 50) ? "{ending_secret}" : "{ending}");
    put(g, "\n");
}

/* --- Arithmetic ------------------------------------------------------------------------------- */

typedef struct {
    int64_t a, b, result;
    char op;
} problem;

bool corpus_is_held_out(int64_t a, char op, int64_t b) {
    if (a < 10 || b < 10) return false;
    const bool commutes = op != '-';
    const int64_t lo = commutes ? i64_min(a, b) : a, hi = commutes ? i64_max(a, b) : b;
    const uint64_t h = hash_u64((uint64_t)op, hash_u64((uint64_t)lo, hash_u64((uint64_t)hi, 0)));
    return h % 16 == 0;
}

/* A number of exactly `digits` digits. */
static int64_t draw_digits(generator *g, int64_t digits) {
    int64_t lo = 1;
    for (int64_t i = 1; i < digits; i++) lo *= 10;
    return draw(g, digits == 1 ? 0 : lo, 10 * lo - 1);
}

/* `digits` of both operands; 0: each of `shortest` to CORPUS_DIGITS_MAX. The lengths are drawn
 * before the side of the split is asked for, else a held-out text would hold short problems
 * mostly. */
static problem draw_problem(generator *g, char op, int64_t digits, int64_t shortest) {
    const int64_t digits_a = digits ? digits : draw(g, shortest, CORPUS_DIGITS_MAX);
    const int64_t digits_b = digits ? digits : draw(g, shortest, CORPUS_DIGITS_MAX);
    for (;;) {
        int64_t a = draw_digits(g, digits_a), b = draw_digits(g, digits_b);
        if (op == '-' && a < b) {
            const int64_t swap = a;
            a = b;
            b = swap;
        }
        if (a >= 10 && b >= 10 && corpus_is_held_out(a, op, b) != g->held_out) continue;
        return (problem){a, b, op == '+' ? a + b : a - b, op};
    }
}

static char draw_op(generator *g) { return chance(g, 50) ? '+' : '-'; }

static void put_problem(generator *g, problem p) {
    text_add(g->out, "%lld %c %lld =", (long long)p.a, p.op, (long long)p.b);
}

/* Two digits by one: what the times tables need. */
static problem draw_product(generator *g) {
    const int64_t a = draw(g, 2, 99), b = draw(g, 2, 9);
    return (problem){a, b, a * b, '*'};
}

static void write_worksheet(generator *g) {
    for (int64_t i = 0, n = draw(g, 4, 24); i < n; i++) {
        const problem p = chance(g, 10) ? draw_product(g) : draw_problem(g, draw_op(g), 0, 1);
        put_problem(g, p);
        text_add(g->out, " %lld\n", (long long)p.result);
    }
}

/* --- Recall ----------------------------------------------------------------------------------- */

typedef struct {
    char key[WORD_BYTES];
    int64_t value;
} pair;

static int64_t draw_sentences(generator *g) {
    if (chance(g, 30)) return 0;
    return chance(g, 50) ? draw(g, 1, 12) : draw(g, 1, CORPUS_SENTENCES_MAX);
}

static int64_t draw_pair_count(generator *g) {
    return chance(g, 50) ? draw(g, 2, 5) : draw(g, 4, CORPUS_PAIRS_MAX);
}

/* Keys differ as a whole; two may share the colour or the object. */
static void draw_pairs(generator *g, pair *p, int64_t n, const char *key) {
    for (int64_t i = 0; i < n && !g->out->failed;) {
        bind_as(g, "key", key);
        snprintf(p[i].key, sizeof p[i].key, "%s", bound(g, span_of("key")));
        p[i].value = draw(g, 100, 999);
        int64_t same = 0;
        while (strcmp(p[same].key, p[i].key) != 0) same++;
        i += same == i;
    }
}

/* A line of the list and a line of the answers are the same, with one token between key and value:
 * the plainest lookup there is. With the question worded differently from the list, or with the
 * answers few, 1.6e9 tokens of training did not lead beyond naming any of the values. */
static void put_key(generator *g, const pair *p) { text_add(g->out, "- %s=", p->key); }

static void put_pair(generator *g, const pair *p) {
    put_key(g, p);
    text_add(g->out, "%lld\n", (long long)p->value);
}

static void put_again(generator *g) {
    say(g, "What were the codes?\n|Say the codes again.\n|Now repeat the codes.\n");
}

static void put_list(generator *g, const pair *p, int64_t n, int64_t sentences) {
    say(g, "Remember these codes.\n|Learn these codes by heart.\n|Here is a list of codes.\n");
    for (int64_t i = 0; i < n; i++) put_pair(g, &p[i]);
    for (int64_t i = 0; i < sentences; i++) { /* paragraphs of eight */
        put(g, i % 8 == 0 ? "\n" : " ");
        say(g, "{aside}");
        if (i % 8 == 7 || i == sentences - 1) put(g, "\n");
    }
    put(g, "\n");
}

/* The list, and then all of it again in another order, one to three times. */
static void write_list(generator *g) {
    pair p[CORPUS_PAIRS_MAX] = {0};
    const int64_t n = draw_pair_count(g);
    bind_cast(g);
    draw_pairs(g, p, n, chance(g, 50) ? "{object}" : "{colour} {object}");
    put_list(g, p, n, draw_sentences(g));
    int32_t order[CORPUS_PAIRS_MAX];
    for (int32_t i = 0; i < n; i++) order[i] = i;
    for (int64_t round = draw(g, 1, 3); round > 0; round--) {
        rng_shuffle(&g->r, order, n);
        put_again(g);
        for (int64_t i = 0; i < n; i++) put_pair(g, &p[order[i]]);
    }
}

/* Words in no order, said two to four times: what teaches a model to look for the last occurrence
 * of what it just read, from which the lookup in lists follows. */
static void write_words(generator *g) {
    const int64_t n = draw(g, 5, 40), times = draw(g, 2, 4);
    const rng before = g->r;
    for (int64_t t = 0; t < times; t++) {
        g->r = before; /* the same words */
        put(g, t == 0 ? "Repeat after me:" : "Again:");
        for (int64_t i = 0; i < n; i++) {
            put(g, " ");
            say(g, "{any_word}");
        }
        put(g, "\n");
    }
}

/* --- Chat ------------------------------------------------------------------------------------- */

static void open_turn(generator *g, const char *role) {
    put(g, CORPUS_TURN);
    put(g, role);
    put(g, "\n");
}

static void close_turn(generator *g) { put(g, CORPUS_TURN_OVER "\n"); }

static void exchange(generator *g, const char *user, const char *assistant) {
    open_turn(g, "user");
    say(g, user);
    close_turn(g);
    open_turn(g, "assistant");
    say(g, assistant);
    close_turn(g);
}

static void chat_story(generator *g) {
    bind_as(g, "topic",
            (const char *const[]){"{hero}", "{hero} and {friend}", "{hero} and {@thing}",
                                  "{@pet} called {petname}"}[rng_below(&g->r, 4)]);
    open_turn(g, "user");
    say(g, "{ask_story}");
    close_turn(g);
    open_turn(g, "assistant");
    tell_story(g);
    if (!g->out->failed) g->out->length--; /* the turn ends where the story's last newline was */
    close_turn(g);
}

static void chat_arithmetic(generator *g) {
    for (int64_t i = 0, n = draw(g, 1, 4); i < n; i++) {
        const problem p = draw_problem(g, draw_op(g), 0, 1);
        bind_number(g, "a", p.a);
        bind_number(g, "b", p.b);
        bind_number(g, "result", p.result);
        exchange(g,
                 p.op == '+'
                     ? "What is {a} + {b}?|What is {a} plus {b}?|Please add {a} and {b}."
                     : "What is {a} - {b}?|What is {a} minus {b}?|Please take {b} from {a}.",
                 p.op == '+' ? "{a} + {b} = {result}" : "{a} - {b} = {result}");
    }
}

static void chat_recall(generator *g) {
    static const char *const facts[][2] = {
        {"What is my name?", "Your name is {hero}."},
        {"What is my {pet} called?", "Your {pet} is called {petname}."},
        {"Who is my best friend?", "Your best friend is {friend}."},
        {"Which number should you remember?", "The number is {secret}."},
    };
    exchange(
        g,
        "{greeting} My name is {hero}, and my best friend is {friend}. I have {@pet} called "
        "{petname}. Please remember the number {secret}.|"
        "I am {hero}, and I have {@pet}. The {pet} is called {petname}, and {friend} is my best "
        "friend. Remember the number {secret}.",
        "Nice to meet you, {hero}!|Hello, {hero}! I will remember that.");
    if (chance(g, 40)) exchange(g, "{ask_story}", "{aside} {aside} {aside}");
    for (int64_t i = 0, n = draw(g, 1, 4); i < n; i++) {
        const uint64_t f = rng_below(&g->r, (uint64_t)COUNT_OF(facts));
        exchange(g, facts[f][0], facts[f][1]);
    }
}

static void write_chat(generator *g) {
    bind_cast(g);
    bind_as(g, "topic", "{hero}");
    if (chance(g, 15)) exchange(g, "{greeting}", "{greeting_reply}");
    switch (rng_below(&g->r, 3)) {
    case 0: chat_story(g); break;
    case 1: chat_arithmetic(g); break;
    default: chat_recall(g); break;
    }
    if (chance(g, 15)) exchange(g, "{thanks}", "{thanks_reply}");
}

/* --- Documents and tasks ---------------------------------------------------------------------- */

/* Streams of a seed: 0 draws the kinds of a text, every document and every task has its own. */
static void generator_open(generator *g, text *out, const char *purpose, corpus_kind kind,
                           uint64_t seed, int64_t index) {
    CHECK(index >= 0);
    g->out = out;
    g->n_vars = 0;
    g->held_out = seed >= CORPUS_SEED_HELD_OUT;
    const uint64_t what = hash_bytes(purpose, strlen(purpose), (uint64_t)kind);
    rng_seed(&g->r, seed, hash_u64((uint64_t)index, what));
}

status corpus_document(text *out, corpus_kind kind, uint64_t seed, int64_t index) {
    generator g;
    generator_open(&g, out, "document", kind, seed, index);
    switch (kind) {
    case CORPUS_STORY:
        bind_cast(&g);
        tell_story(&g);
        break;
    case CORPUS_ARITHMETIC: write_worksheet(&g); break;
    case CORPUS_RECALL:
        if (chance(&g, 70)) {
            write_list(&g);
        } else {
            write_words(&g);
        }
        break;
    case CORPUS_CHAT: write_chat(&g); break;
    default: CHECK(!"a kind of document");
    }
    return text_status(out);
}

static corpus_kind draw_kind(rng *r) {
    uint64_t total = 0;
    for (int32_t k = 0; k < CORPUS_KIND_COUNT; k++) total += kind_weights[k];
    uint64_t v = rng_below(r, total);
    int32_t k = 0;
    for (; v >= kind_weights[k]; k++) v -= kind_weights[k];
    return (corpus_kind)k;
}

status corpus_text(text *out, const corpus_kind *only, uint64_t seed, size_t bytes) {
    rng kinds;
    rng_seed(&kinds, seed, 0);
    const size_t start = out->length;
    for (int64_t i = 0; out->length - start < bytes; i++) {
        TRY(corpus_document(out, only ? *only : draw_kind(&kinds), seed, i));
        text_bytes(out, CORPUS_END, strlen(CORPUS_END));
        TRY(text_status(out));
    }
    return ST_OK;
}

corpus_task_options corpus_task_defaults(void) {
    return (corpus_task_options){.digits = 0, .pairs = 0, .sentences = -1};
}

static status in_range(const char *what, int64_t v, int64_t lo, int64_t hi) {
    if (v >= lo && v <= hi) return ST_OK;
    return FAIL(ST_RANGE, "%s %lld is outside %lld..%lld", what, (long long)v, (long long)lo,
                (long long)hi);
}

static int64_t pose_sum(generator *g, int64_t digits) {
    const problem p = draw_problem(g, draw_op(g), digits, 2);
    put_problem(g, p);
    return p.result;
}

static int64_t pose_recall(generator *g, int64_t pairs, int64_t sentences) {
    pair p[CORPUS_PAIRS_MAX] = {0};
    const int64_t n = pairs ? pairs : draw_pair_count(g);
    bind_cast(g);
    draw_pairs(g, p, n, "{colour} {object}");
    put_list(g, p, n, sentences >= 0 ? sentences : draw_sentences(g));
    const pair *asked = &p[rng_below(&g->r, (uint64_t)n)];
    put_again(g);
    put_key(g, asked);
    return asked->value;
}

status corpus_task_make(arena *a, corpus_kind kind, corpus_task_options options, uint64_t seed,
                        int64_t index, corpus_task *out) {
    TRY(in_range("digits", options.digits, 0, CORPUS_DIGITS_MAX));
    TRY(in_range("pairs", options.pairs, 0, CORPUS_PAIRS_MAX));
    TRY(in_range("sentences", options.sentences, -1, CORPUS_SENTENCES_MAX));
    if (kind != CORPUS_ARITHMETIC && kind != CORPUS_RECALL)
        return FAIL(ST_UNSUPPORTED, "no exact-answer tasks of kind %s", corpus_kind_name(kind));

    text prompt = {0};
    generator g;
    generator_open(&g, &prompt, "task", kind, seed, index);
    const int64_t result = kind == CORPUS_ARITHMETIC
                               ? pose_sum(&g, options.digits)
                               : pose_recall(&g, options.pairs, options.sentences);
    const char *const space = kind == CORPUS_ARITHMETIC ? " " : "";
    status st = text_status(&prompt);
    if (st == ST_OK) {
        const size_t mark = a->used;
        out->prompt = arena_string(a, prompt.data, prompt.length);
        out->answer = out->prompt ? arena_format(a, "%s%lld\n", space, (long long)result) : NULL;
        if (out->answer) {
            out->prompt_bytes = prompt.length;
            out->answer_bytes = strlen(out->answer);
        } else {
            arena_reset(a, mark);
            st = FAIL(ST_NOMEM, "a task of %zu bytes", prompt.length);
        }
    }
    text_free(&prompt);
    return st;
}
