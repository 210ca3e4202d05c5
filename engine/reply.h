/* reply.h - what goes back to a client: OpenAI's objects for a job, whole or as server-sent
 * events. */
#ifndef AMALGAM_REPLY_H
#define AMALGAM_REPLY_H
#include "service.h"

typedef struct {
    const char *model;
    const tokenizer *tok; /* may be NULL */
    char id[48];          /* "cmpl-…", "chatcmpl-…" */
    int64_t created_s;
} reply_head;

/* How far a stream has been written. */
typedef struct {
    int32_t choice; /* where the round goes on */
    int32_t *sent;  /* [n_choices] tokens */
    size_t *shown;  /* [n_choices] bytes of text */
    bool *ended;    /* [n_choices] */
    bool end;       /* the closing events are out */
} reply_stream;

/* For the choices of j; NOMEM leaves what reply_stream_close frees. */
status reply_stream_open(reply_stream *s, const job *j);
void reply_stream_close(reply_stream *s); /* idempotent */

/* Append events that are ready, at least one if there is any, until `enough` bytes are there.
 * Call with the job's lock held. After s->end nothing more comes. */
void reply_events(text *out, const reply_head *h, const job *j, reply_stream *s, size_t enough);

/* The object of a job that is done. */
void reply_whole(text *out, const reply_head *h, const job *j);
#endif
