/* made_batch.h - a batch without requests: so many sequences of the same context, for timing steps
 * and for warming a device. */
#ifndef AMALGAM_MADE_BATCH_H
#define AMALGAM_MADE_BATCH_H
#include "base.h"
#include "batch.h"

typedef struct {
    arena a;
    batch b;
    int32_t *token, *position, *seq_start, *kv_len, *page_start, *page;
    int64_t *id;
    sample_row *sample; /* [n_seqs], greedy */
    sampled *drawn;     /* [n_seqs], room for the step's results */
} made_batch;

/* n_seqs sequences of ctx tokens, the last n_new of which the step feeds; 1 <= n_new <= ctx. Each
 * draws the token after its last. Tokens are arbitrary ids below vocab. Pages of a sequence lie
 * apart, as in a used pool; where the pool has fewer than are wanted, sequences share them, so that
 * what is in them afterwards is no one's. NOMEM. */
status made_batch_open(made_batch *m, int32_t n_seqs, int32_t ctx, int32_t n_new, int32_t n_pages,
                       int32_t vocab);
void made_batch_close(made_batch *m); /* zeroed is fine */
#endif
