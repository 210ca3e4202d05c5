/* batch.h - the one thing that crosses from policy to device: a ragged batch in CSR form. */
#ifndef AMALGAM_BATCH_H
#define AMALGAM_BATCH_H
#include "request.h"

#ifdef __cplusplus
extern "C" {
#endif

/* A row whose logits are wanted and how to draw from them. */
typedef struct {
    int32_t row;            /* of T */
    int32_t seq;            /* of S */
    const sampling *params; /* NULL: logits are read by the caller, nothing is drawn (evaluation) */
    uint64_t draw;          /* index of this output token: the counter of philox_unit */
    const int32_t
        *history; /* [n_history] prompt and the `draw` output tokens so far, for penalties; the last
                     may be -1 - j like the row's token, until the batch before is committed */
    int32_t n_history;
    const int32_t *given; /* this token gets its log-probability and none is drawn; NULL: one is */
} sample_row;

/* Sequences come with all decodes (one token) first, then prefill chunks. Every sequence has at
 * least one token. Tokens of a sequence are consecutive in position, ending at kv_len - 1. */
typedef struct {
    int64_t step;
    int32_t n_seqs, n_tokens, n_samples;
    int32_t n_decodes;         /* the first so many sequences feed one token each */
    const int32_t *token;      /* [T]    ids to feed; of a decode also -1 - j: what was drawn for
                                           sample j of the batch before */
    const int32_t *position;   /* [T]    absolute position of each */
    const int32_t *seq_start;  /* [S+1]  first token of each sequence */
    const int32_t *kv_len;     /* [S]    tokens visible after this step, the new ones included */
    const int32_t *page_start; /* [S+1]  into page */
    const int32_t *page;       /* [.]    physical KV page of each 64 tokens */
    const int64_t *id;         /* [S]    request ids, for traces and messages */
    const sample_row *sample;  /* [n_samples], ascending by row */
} batch;

/* Structural promises above, checked in pairs: by the scheduler when it writes and by a device when
 * it reads. Returns NULL or what is wrong. n_pages bounds page ids. */
const char *batch_problem(const batch *b, int32_t n_pages);

/* CHECKs that a batch keeps them and is no larger than what a device was set up for. */
void batch_check(const batch *b, int32_t max_tokens, int32_t max_seqs, int32_t max_samples,
                 int32_t n_pages);

/* Hash of everything but pointers: two equal batches have equal hashes. */
uint64_t batch_hash(const batch *b);

#ifdef __cplusplus
}
#endif
#endif
