/* added.c - see added.h. */
#include "added.h"

#include "utf8.h"

#include <stdlib.h>
#include <string.h>

/* --- Reading ---------------------------------------------------------------------------------- */

enum { ADDED_ID_MAX = 1 << 24 }; /* vocabularies reach 2^18; beyond 2^24 it is a damaged file */

status added_count_ids(const json_t *list, int32_t *n_ids) {
    *n_ids = 0;
    if (list && !json_is_array(list)) return FAIL(ST_FORMAT, "'added_tokens' is no list");
    for (size_t i = 0; i < json_array_size(list); i++) {
        int32_t id;
        TRY(json_get_i32(json_array_get(list, i), "id", "added_tokens", 0, ADDED_ID_MAX, &id));
        *n_ids = (int32_t)i64_max(*n_ids, id + 1);
    }
    return ST_OK;
}

static status read_token(added_token *t, const json_t *spec, arena *a) {
    static const char where[] = "added_tokens";
    const json_t *content = json_find(spec, "content");
    if (!json_is_string(content)) return FAIL(ST_FORMAT, "%s: a token without content", where);
    const size_t n = json_string_length(content);
    if (n > 1 << 16) return FAIL(ST_RANGE, "%s: a token of %zu bytes", where, n);
    t->length = (int32_t)n;
    t->content = arena_string(a, json_string_value(content), n);
    if (!t->content) return FAIL(ST_NOMEM, "%s", where);
    TRY(json_get_i32(spec, "id", where, 0, ADDED_ID_MAX, &t->id));
    TRY(json_opt_bool(spec, "single_word", where, &t->single_word));
    TRY(json_opt_bool(spec, "lstrip", where, &t->lstrip));
    TRY(json_opt_bool(spec, "rstrip", where, &t->rstrip));
    TRY(json_opt_bool(spec, "special", where, &t->special));
    t->normalized = !t->special; /* the library's default, which no file leaves out */
    return json_opt_bool(spec, "normalized", where, &t->normalized);
}

/* The vocabulary and the list must agree: an id that means two things would be decided silently. */
static status enter_token(bpe *m, const added_token *t) {
    CHECK(t->id < m->n_ids);
    piece *p = &m->pieces[t->id];
    const int32_t known = bpe_find(m, t->content, (size_t)t->length);
    if (known >= 0 && known != t->id)
        return FAIL(ST_FORMAT, "added_tokens: '%.60s' has id %d, the vocabulary says %d",
                    t->content, t->id, known);
    if (p->data && known != t->id)
        return FAIL(ST_FORMAT, "added_tokens: '%.60s' has the id %d of '%.60s'", t->content, t->id,
                    p->data);
    *p = (piece){t->content, t->length, t->special};
    return ST_OK;
}

static int compare_keys(const void *a, const void *b) {
    const added_key *x = a, *y = b;
    const int32_t n = x->length < y->length ? x->length : y->length;
    const int order = memcmp(x->data, y->data, (size_t)n);
    if (order != 0) return order;
    if (x->length != y->length) return x->length < y->length ? -1 : 1;
    return x->token < y->token ? -1 : 1; /* of equal keys the first counts */
}

static status make_set(added_set *set, const added *d, bool normalized, const normalizer *z,
                       arena *a) {
    set->keys = arena_array(a, added_key, (size_t)d->n_tokens);
    if (!set->keys) return FAIL(ST_NOMEM, "added_tokens");
    text form = {0}, spare = {0};
    status st = ST_OK;
    for (int32_t i = 0; i < d->n_tokens && st == ST_OK; i++) {
        const added_token *t = &d->tokens[i];
        if (t->normalized != normalized || t->length == 0) continue; /* "" is never found */
        added_key key = {t->content, t->length, i};
        if (normalized) {
            st = normalizer_run(z, t->content, (size_t)t->length, &form, &spare);
            if (st != ST_OK) break;
            key.length = (int32_t)form.length;
            key.data = arena_string(a, form.data ? form.data : "", form.length);
            if (!key.data) st = FAIL(ST_NOMEM, "added_tokens");
            if (key.length == 0)
                st = FAIL(ST_FORMAT, "added_tokens: '%.60s' normalises to nothing", t->content);
        }
        set->keys[set->n++] = key;
    }
    text_free(&form);
    text_free(&spare);
    TRY(st);
    if (set->n > 1) qsort(set->keys, (size_t)set->n, sizeof *set->keys, compare_keys);
    return ST_OK;
}

static int compare_contents(const void *a, const void *b) {
    const added_token *const *x = a, *const *y = b;
    const added_key kx = {(*x)->content, (*x)->length, 0}, ky = {(*y)->content, (*y)->length, 1};
    return compare_keys(&kx, &ky);
}

/* Twice the same content would leave one of two ids unreachable. */
static status refuse_twins(const added *d, arena *a) {
    const size_t mark = a->used;
    const added_token **sorted = arena_array(a, const added_token *, (size_t)d->n_tokens);
    if (!sorted) return FAIL(ST_NOMEM, "added_tokens");
    for (int32_t i = 0; i < d->n_tokens; i++) sorted[i] = &d->tokens[i];
    if (d->n_tokens > 1) qsort(sorted, (size_t)d->n_tokens, sizeof *sorted, compare_contents);
    for (int32_t i = 1; i < d->n_tokens; i++) {
        const added_token *x = sorted[i - 1], *y = sorted[i];
        if (x->length == y->length && !memcmp(x->content, y->content, (size_t)x->length))
            return FAIL(ST_FORMAT, "added_tokens: '%.60s' appears twice", x->content);
    }
    arena_reset(a, mark);
    return ST_OK;
}

status added_open(added *out, const json_t *list, const normalizer *z, bpe *m, arena *a) {
    *out = (added){.n_tokens = (int32_t)json_array_size(list)};
    out->tokens = arena_array(a, added_token, (size_t)out->n_tokens);
    if (!out->tokens) return FAIL(ST_NOMEM, "added_tokens");
    for (int32_t i = 0; i < out->n_tokens; i++) {
        TRY(read_token(&out->tokens[i], json_array_get(list, (size_t)i), a));
        TRY(enter_token(m, &out->tokens[i]));
    }
    TRY(refuse_twins(out, a));
    TRY(make_set(&out->raw, out, false, z, a));
    return make_set(&out->normal, out, true, z, a);
}

/* --- Looking up ------------------------------------------------------------------------------- */

int32_t added_find(const added *d, const char *s, size_t n) {
    for (int32_t i = 0; i < d->n_tokens; i++)
        if ((size_t)d->tokens[i].length == n && !memcmp(d->tokens[i].content, s, n))
            return d->tokens[i].id;
    return -1;
}

/* First key in [lo, hi) whose byte `at` is not below c; all of them agree before `at`. A key that
 * ends there sorts first. */
static int32_t lower_bound(const added_set *set, int32_t lo, int32_t hi, int32_t at, int32_t c) {
    while (lo < hi) {
        const int32_t mid = lo + (hi - lo) / 2;
        const added_key *k = &set->keys[mid];
        if (k->length <= at || (uint8_t)k->data[at] < c)
            lo = mid + 1;
        else
            hi = mid;
    }
    return lo;
}

/* The longest key that begins the n bytes, or NULL. */
static const added_key *longest_key(const added_set *set, const char *s, size_t n) {
    const added_key *best = NULL;
    int32_t lo = 0, hi = set->n;
    for (int32_t at = 0; (size_t)at < n; at++) {
        const int32_t c = (uint8_t)s[at];
        lo = lower_bound(set, lo, hi, at, c);
        hi = lower_bound(set, lo, hi, at, c + 1);
        if (lo == hi) break;
        if (set->keys[lo].length == at + 1) best = &set->keys[lo];
    }
    return best;
}

/* --- Cutting ---------------------------------------------------------------------------------- */

/* Is there a word character at s[at], or with `backwards` right before it? */
static bool word_beside(const char *s, size_t n, size_t at, bool backwards) {
    if (backwards) {
        if (at == 0) return false;
        do at--;
        while (at > 0 && ((uint8_t)s[at] & 0xc0) == 0x80);
    }
    uint32_t c = 0;
    return at < n && utf8_next(s + at, n - at, &c) > 0 && utf8_is_word(c);
}

static size_t blanks_after(const char *s, size_t n, size_t at) {
    uint32_t c = 0;
    while (at < n) {
        const int32_t k = utf8_next(s + at, n - at, &c);
        if (k <= 0 || !utf8_is_space(c)) break;
        at += (size_t)k;
    }
    return at;
}

static size_t blanks_before(const char *s, size_t at, size_t from) {
    uint32_t c = 0;
    while (at > from) {
        size_t back = at - 1;
        while (back > from && ((uint8_t)s[back] & 0xc0) == 0x80) back--;
        if (utf8_next(s + back, at - back, &c) <= 0 || !utf8_is_space(c)) break;
        at = back;
    }
    return at;
}

status added_cut(const added *d, const added_set *set, const char *s, size_t n,
                 bool keep_special_text, added_part part, void *context) {
    bool begins[256] = {false};
    for (int32_t i = 0; i < set->n; i++) begins[(uint8_t)set->keys[i].data[0]] = true;
    size_t done = 0;
    for (size_t at = 0; at < n && set->n > 0;) {
        const added_key *key = begins[(uint8_t)s[at]] ? longest_key(set, s + at, n - at) : NULL;
        if (!key) {
            at++;
            continue;
        }
        const added_token *t = &d->tokens[key->token];
        size_t start = at, end = at + (size_t)key->length;
        at = end; /* a match that is turned down below still uses up its text */
        if (keep_special_text && t->special) continue;
        if (t->single_word && (word_beside(s, n, start, true) || word_beside(s, n, end, false)))
            continue;
        if (start < done) start = done; /* its head was swallowed by the last token's rstrip */
        if (t->lstrip) start = blanks_before(s, start, done);
        if (t->rstrip) end = blanks_after(s, n, end);
        if (end < done) end = done;
        if (start > done) TRY(part(context, NULL, s + done, start - done));
        TRY(part(context, t, s + start, end - start));
        done = end;
    }
    return done < n ? part(context, NULL, s + done, n - done) : ST_OK;
}
