/* capacity.h - how much fits: the one computation of KV pages, used by every device alike, since
 * queueing amplifies any difference between engine and simulator. */
#ifndef AMALGAM_CAPACITY_H
#define AMALGAM_CAPACITY_H
#include "precision.h"
#include "weights.h"

typedef struct {
    int64_t weight_bytes;    /* of one rank */
    int64_t workspace_bytes; /* activations, logits, tables of a step */
    int64_t page_bytes;      /* one KV page of 64 tokens over all layers, one rank */
    int64_t kv_bytes;        /* n_pages * page_bytes */
    int32_t n_pages;
    int64_t kv_tokens; /* n_pages * 64 */
} capacity;

/* Bytes of one KV page on one rank: 64 tokens x layers x KV heads of the rank x (K + V), parameters
 * included. */
int64_t kv_page_bytes(const model_config *c, const precision *p, int32_t tp);

/* Pages of one layer that a step may have written out at 16 bit, for prefill over a cache that has
 * codes somewhere; 0 where none has, and at most as many as the pool has. */
int32_t wide_pages(const model_config *c, const precision *p, int32_t tp, int32_t max_tokens,
                   int32_t ctx_max, int32_t n_pages);

/* What forward and a device need for a step of these limits, bytes on one rank: every buffer of
 * forward.c at two bytes an element, logits at four, the tables of a batch and the pages
 * written out at 16 bit from a pool of n_pages. */
int64_t workspace_bytes(const model_config *c, const precision *p, int32_t tp, int32_t max_tokens,
                        int32_t max_seqs, int32_t max_samples, int32_t n_pages);

/* usable: device_ops.memory of one rank; fraction of it that may be used (0.9). usable == 0 means
 * unlimited: n_pages is `pages_wanted`. Otherwise pages_wanted 0 = as many as fit, and more than
 * fit are refused. OOM, with all terms in the message, when the weights do not fit or when fewer
 * than pages_least pages are left. max_samples is taken to be max_seqs. */
status capacity_compute(capacity *out, const model_config *c, const precision *p, int32_t tp,
                        int64_t usable, double fraction, int32_t max_tokens, int32_t max_seqs,
                        int32_t pages_wanted, int32_t pages_least);

/* Smallest tp among 1, 2, 4, 8 on which it fits and divides; OOM or the last reason otherwise. */
status capacity_choose_tp(int32_t *tp, const model_config *c, const precision *p, int64_t usable,
                          double fraction, int32_t max_tokens, int32_t max_seqs,
                          int32_t pages_least);
#endif
