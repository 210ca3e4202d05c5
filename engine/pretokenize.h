/* pretokenize.h - the "pre_tokenizer" of a tokenizer.json: cut a text into the words that BPE sees.
 *
 * Split (regular expression or string, five behaviours, invert), ByteLevel, Metaspace, Digits and
 * Sequences of them. Every step cuts or rewrites one piece and hands the parts on, so that nothing
 * but the rewritten piece itself is ever stored:
 *
 *     "Héllo wörld"  --Split-->  "Héllo" | " wörld"  --bytes-->  "HÃ©llo" | "ĠwÃ¶rld"  -->  emit */
#ifndef AMALGAM_PRETOKENIZE_H
#define AMALGAM_PRETOKENIZE_H
#include "pattern.h"

#ifdef __cplusplus
extern "C" {
#endif

enum { PRETOKENIZE_STEPS_MAX = 12 };

typedef enum {
    SPLIT_REMOVED,
    SPLIT_ISOLATED,
    SPLIT_MERGED_WITH_PREVIOUS,
    SPLIT_MERGED_WITH_NEXT,
    SPLIT_CONTIGUOUS
} split_behavior;

typedef enum { PREPEND_NEVER, PREPEND_FIRST, PREPEND_ALWAYS } prepend_scheme;

typedef struct {
    enum { STEP_SPLIT, STEP_PREFIX_SPACE, STEP_BYTES, STEP_METASPACE } kind;
    pattern *what;           /* split: owned */
    split_behavior behavior; /* split */
    bool invert;             /* split: the gaps are the matches */
    prepend_scheme prepend;  /* metaspace */
    char replacement[8];     /* metaspace: one character */
} pretokenize_step;

typedef struct {
    pretokenize_step steps[PRETOKENIZE_STEPS_MAX];
    int32_t n_steps;
} pretokenizer;

/* Read the JSON value (NULL = none: the text is one word). UNSUPPORTED with the name of what is not
 * known; FORMAT; NOMEM. After a failure the pre-tokeniser is closed. */
status pretokenizer_open(pretokenizer *p, const json_t *spec);
void pretokenizer_close(pretokenizer *p); /* idempotent */

/* Scratch and receiver of one caller; zeroed but for emit and context. */
typedef struct {
    status (*emit)(void *context, const char *word, size_t n); /* words are never empty */
    void *context;
    text room[PRETOKENIZE_STEPS_MAX];
} pretokenize_run;

void pretokenize_run_close(pretokenize_run *r);

/* Emit the words of n bytes of valid UTF-8 in order. `first` says that the piece starts the whole
 * text, which is where Metaspace's "first" puts its prefix. */
status pretokenizer_words(const pretokenizer *p, pretokenize_run *r, const char *s, size_t n,
                          bool first);

/* The byte-level alphabet: 33-126, 161-172 and 174-255 stand for themselves as code points, the
 * other 68 are U+0100, U+0101, ... in order (GPT-2's encoder.py). */
/* The byte that a character of the alphabet stands for, or -1. */
int32_t bytelevel_byte(uint32_t code_point);

#ifdef __cplusplus
}
#endif
#endif
