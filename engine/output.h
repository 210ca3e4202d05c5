/* output.h - tokens of one request become text: streamed as whole characters, ended by stop
 * strings. */
#ifndef AMALGAM_OUTPUT_H
#define AMALGAM_OUTPUT_H
#include "tokenizer.h"

typedef struct {
    const char *const *stop; /* [n_stops], none empty; the caller's */
    int32_t n_stops;
    int32_t min_tokens; /* no stop string ends in the first so many */
    bool keep_stop;     /* the text ends after what stops it, not before */
    bool keep_special; /* special tokens have the text that their vocabulary gives them, not none */
    bool continues;    /* it goes on after a prompt, so that the space at its beginning belongs to
                           it; an answer is a text of its own */
} output_options;

typedef struct {
    output_options options;
    tokenizer_stream stream;
    text text;    /* everything decoded so far; cut at a stop string */
    size_t shown; /* bytes already taken by output_take */
    bool stopped;
} output;

void output_open(output *o, const tokenizer *t, const output_options *options);
void output_close(output *o); /* idempotent */

/* One more token. One that `ends` the request has no text, but with keep_stop. *stopped when a stop
 * string has appeared: the text then ends there and takes no more. NOMEM. */
status output_push(output *o, int32_t token, bool ends, bool *stopped);
/* The request is over: what was held back (incomplete characters, beginnings of stop strings) is
 * text. */
status output_finish(output *o);

/* Bytes that can be shown now and were not yet; *n may be 0. Nothing that may still turn out to be
 * part of a stop string is handed out. Valid until the next call. */
const char *output_take(output *o, size_t *n);
void output_print(output *o); /* them, to standard output */
#endif
