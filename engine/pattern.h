/* pattern.h - the regular expressions of tokenizer.json, found by PCRE2.
 *
 * The files are written for Oniguruma in Ruby syntax. What the two engines read differently is
 * translated (\s \w \h, line anchors) or refused by name (a class inside a class, \b, &&). */
#ifndef AMALGAM_PATTERN_H
#define AMALGAM_PATTERN_H
#include "json.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef struct pattern pattern;

/* Compile n bytes of UTF-8: a regular expression, or with `literal` the very characters.
 * JIT-compiled where the platform has one. FORMAT with PCRE2's reason, UNSUPPORTED for what cannot
 * be translated. The result is read-only: any number of threads may search with it. */
status pattern_open(pattern **out, const char *source, size_t n, bool literal);
void pattern_close(pattern *p); /* NULL is fine */

/* pattern_open for the value of a "pattern" key, {"Regex": "..."} or {"String": "..."}. */
status pattern_from_json(pattern **out, const json_t *spec);

/* One walk over the matches of one text, left to right, as Rust's onig find_iter: an empty match
 * directly behind the last match is skipped. */
typedef struct {
    const pattern *p;
    const char *data; /* valid UTF-8, not owned */
    size_t n, at;
    size_t match_end; /* of the last match; SIZE_MAX before the first */
    void *room;       /* PCRE2's match data */
} pattern_walk;

/* NOMEM when memory is short. */
status pattern_walk_open(pattern_walk *w, const pattern *p, const char *data, size_t n);
void pattern_walk_close(pattern_walk *w); /* idempotent */

/* The next match as bytes [*start, *end) and *found = true, or *found = false at the end. RANGE
 * when the expression gave up (PCRE2's limit on backtracking). */
status pattern_walk_next(pattern_walk *w, bool *found, size_t *start, size_t *end);

#ifdef __cplusplus
}
#endif
#endif
