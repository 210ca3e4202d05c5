/* pretokenize.c - see pretokenize.h. */
#include "pretokenize.h"

#include "utf8.h"

#include <string.h>

/* --- The byte-level alphabet ------------------------------------------------------------------ */

static bool stands_for_itself(int32_t byte) {
    return (byte >= 33 && byte <= 126) || (byte >= 161 && byte <= 172) || byte >= 174;
}

/* The others in order: 0-32, 127-160, 173. */
static uint32_t byte_char(int32_t byte) {
    if (stands_for_itself(byte)) return (uint32_t)byte;
    return 256u + (uint32_t)(byte <= 32 ? byte : byte <= 160 ? byte - 127 + 33 : 67);
}

int32_t bytelevel_byte(uint32_t c) {
    if (c < 256) return stands_for_itself((int32_t)c) ? (int32_t)c : -1;
    const int32_t k = c < 256 + 68 ? (int32_t)c - 256 : -1;
    return k < 0 ? -1 : k <= 32 ? k : k <= 66 ? k + 127 - 33 : 173;
}

static void put_bytes(text *out, const char *s, size_t n) {
    char part[512]; /* two bytes of UTF-8 for one at most */
    size_t used = 0;
    for (size_t i = 0; i < n; i++) {
        const uint32_t c = byte_char((uint8_t)s[i]);
        if (used + 2 > sizeof part) text_bytes(out, part, used), used = 0;
        if (c < 0x80) {
            part[used++] = (char)c;
        } else {
            part[used++] = (char)(0xc0 | c >> 6);
            part[used++] = (char)(0x80 | (c & 0x3f));
        }
    }
    text_bytes(out, part, used);
}

/* --- Reading ---------------------------------------------------------------------------------- */

static status add_step(pretokenizer *p, pretokenize_step step) {
    if (p->n_steps == PRETOKENIZE_STEPS_MAX) {
        pattern_close(step.what);
        return FAIL(ST_RANGE, "pre_tokenizer: more than %d steps", PRETOKENIZE_STEPS_MAX);
    }
    p->steps[p->n_steps++] = step;
    return ST_OK;
}

static status add_split(pretokenizer *p, const char *source, bool literal,
                        split_behavior behavior) {
    pattern *what;
    TRY(pattern_open(&what, source, strlen(source), literal));
    return add_step(p, (pretokenize_step){.kind = STEP_SPLIT, .what = what, .behavior = behavior});
}

static status read_split(pretokenizer *p, const json_t *spec) {
    static const char *const names[] = {"Removed", "Isolated", "MergedWithPrevious",
                                        "MergedWithNext", "Contiguous"}; /* ORDER split_behavior */
    const char *name;
    pretokenize_step step = {.kind = STEP_SPLIT};
    TRY(json_get_string(spec, "behavior", "pre_tokenizer Split", &name));
    TRY(json_opt_bool(spec, "invert", "pre_tokenizer Split", &step.invert));
    int32_t i = 0;
    while (i < COUNT_OF(names) && strcmp(name, names[i]) != 0) i++;
    if (i == COUNT_OF(names))
        return FAIL(ST_UNSUPPORTED, "pre_tokenizer Split: behavior '%s' is not supported", name);
    step.behavior = (split_behavior)i;
    TRY(fail_prefix(pattern_from_json(&step.what, json_find(spec, "pattern")),
                    "pre_tokenizer Split"));
    return add_step(p, step);
}

static status read_byte_level(pretokenizer *p, const json_t *spec) {
    /* GPT-2's pattern, written into the library and not into the file. */
    static const char words[] = "'(?:[sdmt]|ll|ve|re)| ?\\p{L}+| ?\\p{N}+| ?[^\\s\\p{L}\\p{N}]+"
                                "|\\s+(?!\\S)|\\s+";
    bool prefix = true, regex = true;
    TRY(json_opt_bool(spec, "add_prefix_space", "pre_tokenizer ByteLevel", &prefix));
    TRY(json_opt_bool(spec, "use_regex", "pre_tokenizer ByteLevel", &regex));
    if (prefix) TRY(add_step(p, (pretokenize_step){.kind = STEP_PREFIX_SPACE}));
    if (regex) TRY(add_split(p, words, false, SPLIT_ISOLATED));
    return add_step(p, (pretokenize_step){.kind = STEP_BYTES});
}

static status read_metaspace(pretokenizer *p, const json_t *spec) {
    static const char *const names[] = {"never", "first", "always"}; /* ORDER prepend_scheme */
    static const char where[] = "pre_tokenizer Metaspace";
    pretokenize_step step = {.kind = STEP_METASPACE, .prepend = PREPEND_ALWAYS};
    const char *replacement = "\xe2\x96\x81", *name = NULL;
    bool legacy_prefix = true, split = true;
    TRY(json_opt_string(spec, "replacement", where, &replacement));
    TRY(json_opt_string(spec, "prepend_scheme", where, &name));
    TRY(json_opt_bool(spec, "add_prefix_space", where, &legacy_prefix));
    TRY(json_opt_bool(spec, "split", where, &split));
    uint32_t c;
    const size_t n = strlen(replacement);
    if (n == 0 || utf8_next(replacement, n, &c) != (int32_t)n)
        return FAIL(ST_FORMAT, "%s: 'replacement' is not one character", where);
    memcpy(step.replacement, replacement, n + 1);
    if (name) {
        int32_t i = 0;
        while (i < COUNT_OF(names) && strcmp(name, names[i]) != 0) i++;
        if (i == COUNT_OF(names))
            return FAIL(ST_UNSUPPORTED, "%s: prepend_scheme '%s' is not supported", where, name);
        step.prepend = (prepend_scheme)i;
        if (!legacy_prefix && step.prepend != PREPEND_NEVER)
            return FAIL(ST_FORMAT, "%s: add_prefix_space contradicts prepend_scheme", where);
    } else if (!legacy_prefix) {
        step.prepend = PREPEND_NEVER;
    }
    TRY(add_step(p, step));
    return split ? add_split(p, step.replacement, true, SPLIT_MERGED_WITH_NEXT) : ST_OK;
}

static status read_steps(pretokenizer *p, const json_t *spec, int32_t depth) {
    const char *type;
    TRY(json_get_string(spec, "type", "pre_tokenizer", &type));
    if (!strcmp(type, "Sequence")) {
        const json_t *list = json_find(spec, "pretokenizers");
        if (!json_is_array(list)) return FAIL(ST_FORMAT, "pre_tokenizer: Sequence without a list");
        if (depth >= PRETOKENIZE_STEPS_MAX)
            return FAIL(ST_RANGE, "pre_tokenizer: nested too deeply");
        for (size_t i = 0; i < json_array_size(list); i++)
            TRY(read_steps(p, json_array_get(list, i), depth + 1));
        return ST_OK;
    }
    if (!strcmp(type, "Split")) return read_split(p, spec);
    if (!strcmp(type, "ByteLevel")) return read_byte_level(p, spec);
    if (!strcmp(type, "Metaspace")) return read_metaspace(p, spec);
    if (!strcmp(type, "Digits")) {
        bool individual = false;
        TRY(json_opt_bool(spec, "individual_digits", "pre_tokenizer Digits", &individual));
        return add_split(p, "\\p{N}", false, individual ? SPLIT_ISOLATED : SPLIT_CONTIGUOUS);
    }
    return FAIL(ST_UNSUPPORTED, "pre_tokenizer '%s' is not supported", type);
}

status pretokenizer_open(pretokenizer *p, const json_t *spec) {
    *p = (pretokenizer){0};
    if (!spec) return ST_OK;
    const status st = read_steps(p, spec, 0);
    if (st != ST_OK) pretokenizer_close(p);
    return st;
}

void pretokenizer_close(pretokenizer *p) {
    for (int32_t i = 0; i < p->n_steps; i++) pattern_close(p->steps[i].what);
    *p = (pretokenizer){0};
}

/* --- Running ---------------------------------------------------------------------------------- */

void pretokenize_run_close(pretokenize_run *r) {
    for (int32_t i = 0; i < PRETOKENIZE_STEPS_MAX; i++) text_free(&r->room[i]);
}

typedef struct {
    const pretokenizer *p;
    pretokenize_run *r;
    int32_t next; /* step that gets the parts */
    const char *s;
    bool first;
    split_behavior behavior;
    bool any, was_match; /* a part is waiting; the last range was a match */
    size_t start, end;   /* the waiting part, which a later range may still lengthen */
} splitter;

static status feed(const pretokenizer *p, pretokenize_run *r, int32_t at, const char *s, size_t n,
                   bool first);

static status release(splitter *sp) {
    if (!sp->any) return ST_OK;
    sp->any = false;
    return feed(sp->p, sp->r, sp->next, sp->s + sp->start, sp->end - sp->start,
                sp->first && sp->start == 0);
}

/* The next range of the text, a match of the pattern or a gap between two. */
static status take_range(splitter *sp, size_t start, size_t end, bool is_match) {
    bool merge = false;
    switch (sp->behavior) {
    case SPLIT_REMOVED:
    case SPLIT_ISOLATED: break;
    case SPLIT_CONTIGUOUS: merge = is_match == sp->was_match; break;
    case SPLIT_MERGED_WITH_PREVIOUS: merge = is_match && !sp->was_match; break;
    case SPLIT_MERGED_WITH_NEXT: merge = !is_match && sp->was_match; break;
    }
    sp->was_match = is_match;
    if (merge && sp->any) {
        sp->end = end;
        return ST_OK;
    }
    TRY(release(sp));
    sp->any = !(is_match && sp->behavior == SPLIT_REMOVED);
    sp->start = start;
    sp->end = end;
    return ST_OK;
}

static status split(const pretokenizer *p, pretokenize_run *r, int32_t at, const char *s, size_t n,
                    bool first) {
    const pretokenize_step *step = &p->steps[at];
    splitter sp = {p, r, at + 1, s, first, step->behavior, false, false, 0, 0};
    pattern_walk walk;
    TRY(pattern_walk_open(&walk, step->what, s, n));
    bool found;
    size_t start, end, done = 0;
    status st;
    while ((st = pattern_walk_next(&walk, &found, &start, &end)) == ST_OK && found) {
        if (start > done) st = take_range(&sp, done, start, step->invert);
        if (st == ST_OK) st = take_range(&sp, start, end, !step->invert);
        if (st != ST_OK) break;
        done = end;
    }
    pattern_walk_close(&walk);
    TRY(st);
    if (done < n) TRY(take_range(&sp, done, n, step->invert));
    return release(&sp);
}

static void put_metaspace(const pretokenize_step *step, text *out, const char *s, size_t n,
                          bool first) {
    const size_t k = strlen(step->replacement);
    const bool starts = s[0] == ' ' || (n >= k && !memcmp(s, step->replacement, k));
    const bool wanted =
        step->prepend == PREPEND_ALWAYS || (step->prepend == PREPEND_FIRST && first);
    if (wanted && !starts) text_bytes(out, step->replacement, k);
    for (size_t i = 0; i < n;) {
        const char *space = memchr(s + i, ' ', n - i);
        const size_t plain = space ? (size_t)(space - (s + i)) : n - i;
        text_bytes(out, s + i, plain);
        if (space) text_bytes(out, step->replacement, k);
        i += plain + (space != NULL);
    }
}

/* One piece into step `at`; `first` as in pretokenizer_words. */
static status feed(const pretokenizer *p, pretokenize_run *r, int32_t at, const char *s, size_t n,
                   bool first) {
    if (n == 0) return ST_OK;
    if (at == p->n_steps) return r->emit(r->context, s, n);
    const pretokenize_step *step = &p->steps[at];
    text *room = &r->room[at];
    text_clear(room);
    switch (step->kind) {
    case STEP_SPLIT: return split(p, r, at, s, n, first);
    case STEP_PREFIX_SPACE:
        if (s[0] == ' ') return feed(p, r, at + 1, s, n, first);
        text_bytes(room, " ", 1);
        text_bytes(room, s, n);
        break;
    case STEP_BYTES: put_bytes(room, s, n); break;
    case STEP_METASPACE: put_metaspace(step, room, s, n, first); break;
    }
    TRY(text_status(room));
    return feed(p, r, at + 1, room->data, room->length, first);
}

status pretokenizer_words(const pretokenizer *p, pretokenize_run *r, const char *s, size_t n,
                          bool first) {
    return feed(p, r, 0, s, n, first);
}
