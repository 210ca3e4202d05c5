/* normalize.c - see normalize.h. */
#include "normalize.h"

#include "utf8.h"

#include <string.h>

/* --- Reading ---------------------------------------------------------------------------------- */

static status read_content(normalize_step *step, const json_t *spec, const char *key, arena *a) {
    const json_t *content = json_find(spec, key);
    if (!json_is_string(content)) return FAIL(ST_FORMAT, "normalizer: '%s' is no string", key);
    step->n_content = json_string_length(content);
    step->content = arena_string(a, json_string_value(content), step->n_content);
    return step->content ? ST_OK : FAIL(ST_NOMEM, "normalizer");
}

static status read_steps(normalizer *z, const json_t *spec, arena *a, int32_t depth) {
    const char *type;
    TRY(json_get_string(spec, "type", "normalizer", &type));
    if (!strcmp(type, "Sequence")) {
        const json_t *list = json_find(spec, "normalizers");
        if (!json_is_array(list)) return FAIL(ST_FORMAT, "normalizer: Sequence without a list");
        if (depth >= NORMALIZE_STEPS_MAX) return FAIL(ST_RANGE, "normalizer: nested too deeply");
        for (size_t i = 0; i < json_array_size(list); i++)
            TRY(read_steps(z, json_array_get(list, i), a, depth + 1));
        return ST_OK;
    }
    if (z->n_steps == NORMALIZE_STEPS_MAX)
        return FAIL(ST_RANGE, "normalizer: more than %d steps", NORMALIZE_STEPS_MAX);
    normalize_step *step = &z->steps[z->n_steps++];
    *step = (normalize_step){.kind = NORMALIZE_NFC};
    if (!strcmp(type, "NFC")) return ST_OK;
    if (!strcmp(type, "Prepend")) {
        step->kind = NORMALIZE_PREPEND;
        return read_content(step, spec, "prepend", a);
    }
    if (!strcmp(type, "Replace")) {
        step->kind = NORMALIZE_REPLACE;
        TRY(read_content(step, spec, "content", a));
        return fail_prefix(pattern_from_json(&step->what, json_find(spec, "pattern")),
                           "normalizer Replace");
    }
    return FAIL(ST_UNSUPPORTED, "normalizer '%s' is not supported", type);
}

status normalizer_open(normalizer *z, const json_t *spec, arena *a) {
    *z = (normalizer){0};
    if (!spec) return ST_OK;
    const status st = read_steps(z, spec, a, 0);
    if (st != ST_OK) normalizer_close(z);
    return st;
}

void normalizer_close(normalizer *z) {
    for (int32_t i = 0; i < z->n_steps; i++) pattern_close(z->steps[i].what);
    *z = (normalizer){0};
}

/* --- Running ---------------------------------------------------------------------------------- */

static status replace(const normalize_step *step, const char *s, size_t n, size_t most, text *out) {
    pattern_walk walk;
    TRY(pattern_walk_open(&walk, step->what, s, n));
    bool found;
    size_t start, end, at = 0;
    status st;
    while ((st = pattern_walk_next(&walk, &found, &start, &end)) == ST_OK && found) {
        text_bytes(out, s + at, start - at);
        text_bytes(out, step->content, step->n_content);
        at = end;
        if (out->length > most) break; /* the caller says so */
    }
    pattern_walk_close(&walk);
    text_bytes(out, s + at, n - at);
    return st;
}

static status apply(const normalize_step *step, const char *s, size_t n, size_t most, text *out) {
    switch (step->kind) {
    case NORMALIZE_NFC: return utf8_nfc(out, s, n);
    case NORMALIZE_PREPEND:
        if (n) text_bytes(out, step->content, step->n_content);
        text_bytes(out, s, n);
        return ST_OK;
    case NORMALIZE_REPLACE: return replace(step, s, n, most, out);
    }
    CHECK(!"a step has a kind");
    return ST_OK;
}

status normalizer_run(const normalizer *z, const char *s, size_t n, text *out, text *spare) {
    const size_t most = n * NORMALIZE_GROWTH_MAX + NORMALIZE_TEXT_FREE;
    text_clear(out);
    if (z->n_steps == 0) text_bytes(out, s, n);
    for (int32_t i = 0; i < z->n_steps; i++) {
        if (i > 0) { /* the result so far is the next input */
            const text made = *out;
            *out = *spare;
            *spare = made;
            text_clear(out);
            s = spare->data ? spare->data : "";
            n = spare->length;
        }
        TRY(apply(&z->steps[i], s, n, most, out));
        TRY(text_status(out));
        if (out->length > most)
            return FAIL(ST_RANGE, "normalizer: makes a text of more than %zu bytes", most);
    }
    return text_status(out);
}
