/* detokenize.h - the "decoder" of a tokenizer.json, run token by token.
 *
 * A decoder is a chain of steps. Each step of this one takes a token's text and hands on what is
 * certain, so decoding a whole sequence and streaming it are the same code:
 *
 *     "▁caf" "<0xC3>" "<0xA9>" "▁x"  --Replace-->  " caf" "<0xC3>" "<0xA9>" " x"
 *            --ByteFallback-->  " caf" (holds C3, A9) "é" " x"  --Fuse, Strip-->  "café x"
 *
 * What is held back: ByteLevel keeps the unfinished end of a character (at most 3 bytes).
 * ByteFallback keeps a run of byte tokens until another token ends it, because the reference turns
 * *every* byte of a run that is ill-formed anywhere into U+FFFD; as soon as that is certain the run
 * is let go. */
#ifndef AMALGAM_DETOKENIZE_H
#define AMALGAM_DETOKENIZE_H
#include "json.h"

#ifdef __cplusplus
extern "C" {
#endif

enum { DETOKENIZE_STEPS_MAX = 8 };

typedef struct {
    enum {
        DETOKENIZE_JOIN,    /* no decoder: a space between tokens */
        DETOKENIZE_REPLACE, /* pattern -> content, within a token */
        DETOKENIZE_METASPACE,
        DETOKENIZE_STRIP, /* up to `start` leading `content` */
        DETOKENIZE_BYTE_FALLBACK,
        DETOKENIZE_FUSE, /* from here on the sequence is one token */
        DETOKENIZE_BYTE_LEVEL
    } kind;
    const char *pattern, *content; /* in the arena */
    size_t n_pattern, n_content;
    int32_t start;   /* strip */
    bool drop_first; /* metaspace: the first token's replacement characters vanish */
    bool fused;      /* strip: behind Fuse or ByteLevel */
} detokenize_step;

typedef struct {
    detokenize_step steps[DETOKENIZE_STEPS_MAX];
    int32_t n_steps;
} detokenizer;

/* Read the JSON value (NULL = none). UNSUPPORTED with the name of what is not known or stands at a
 * place where it could not be streamed; FORMAT; NOMEM. Nothing to close. */
status detokenizer_open(detokenizer *d, const json_t *spec, arena *a);

/* One sequence that is being decoded. */
typedef struct {
    text held;                           /* ByteFallback's run, ByteLevel's unfinished character */
    text room[DETOKENIZE_STEPS_MAX];     /* scratch of each step */
    int32_t strip[DETOKENIZE_STEPS_MAX]; /* how much a fused Strip may still take */
    size_t well_formed; /* ByteFallback: bytes of `held` that are complete characters */
    bool ill_formed;    /* the run of byte tokens can no longer be text */
    bool started;       /* a token was pushed */
} detokenize_state;

/* Ready for a new sequence, memory kept. Call it once on a zeroed state before the first push. */
void detokenize_reset(detokenize_state *s, const detokenizer *d);
/* The sequence goes on where another text ended: nothing is done to its beginning, so that the
 * space stays that Strip or Metaspace would take. After a reset, before the first push. */
void detokenize_continue(detokenize_state *s);
void detokenize_close(detokenize_state *s); /* idempotent */

/* Append what the token's text (n bytes of UTF-8) makes certain; after the last token, the rest.
 * NOMEM (then reset). */
status detokenize_push(detokenize_state *s, const detokenizer *d, const char *token, size_t n,
                       text *out);
status detokenize_flush(detokenize_state *s, const detokenizer *d, text *out);

/* Append the bytes that a token adds to a text that has begun, as they are: those of a part of a
 * character are no UTF-8. */
status detokenize_bytes(const detokenizer *d, const char *token, size_t n, text *out);

#ifdef __cplusplus
}
#endif
#endif
