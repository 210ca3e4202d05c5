/* normalize.h - the "normalizer" of a tokenizer.json: NFC, Replace, Prepend and Sequences of them.
 */
#ifndef AMALGAM_NORMALIZE_H
#define AMALGAM_NORMALIZE_H
#include "pattern.h"

#ifdef __cplusplus
extern "C" {
#endif

enum {
    NORMALIZE_STEPS_MAX = 8,
    NORMALIZE_GROWTH_MAX = 16, /* a text of n bytes may become 16 n + 4096: real steps make 3 of a
                                  blank, but blanks that become many, step by step, fill memory */
    NORMALIZE_TEXT_FREE = 4096,
};

typedef struct {
    enum { NORMALIZE_NFC, NORMALIZE_PREPEND, NORMALIZE_REPLACE } kind;
    pattern *what; /* Replace: owned */
    const char *content;
    size_t n_content;
} normalize_step;

typedef struct {
    normalize_step steps[NORMALIZE_STEPS_MAX]; /* in the order they are applied */
    int32_t n_steps;
} normalizer;

/* Read the JSON value (NULL = no normaliser). Strings are copied to `a`. UNSUPPORTED with the name
 * of a step that is not known; NOMEM; FORMAT. After a failure the normaliser is closed. */
status normalizer_open(normalizer *z, const json_t *spec, arena *a);
void normalizer_close(normalizer *z); /* idempotent */

/* Replace *out by the normal form of n bytes of valid UTF-8. `spare` is scratch; both belong to the
 * caller and keep their memory between calls. Empty stays empty. RANGE past NORMALIZE_GROWTH_MAX.
 */
status normalizer_run(const normalizer *z, const char *s, size_t n, text *out, text *spare);

#ifdef __cplusplus
}
#endif
#endif
