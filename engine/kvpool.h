/* kvpool.h - logical KV pages: who owns which, what can be shared, what can be evicted.
 *
 * A page holds 64 tokens (KV_PAGE_TOKENS) of all layers. Its life:
 *
 *     free -> held by sequences (reference count >= 1) -> cached (count 0, content still known,
 *     evictable in LRU order) -> free
 *
 * With the prefix cache on, a full page is registered under (identity of the page before it, or the
 * salt for a first page; its 64 tokens). A hash finds it, and the whole key is compared exactly:
 * since an identity is never used twice, a hash collision costs a miss and never a wrong answer,
 * over the whole prefix and not just over the last 64 tokens. Partial pages are never shared, so no
 * copy-on-write is needed. With it off, a page goes straight back to free. Nothing here knows bytes
 * or devices. */
#ifndef AMALGAM_KVPOOL_H
#define AMALGAM_KVPOOL_H
#include "base.h"

typedef struct kvpool kvpool;

/* The pages of one sequence. Zero-initialise; `page` is storage of the caller's ([max_pages]). */
typedef struct {
    int32_t *page;
    int32_t n_pages, max_pages;
    int32_t n_registered; /* full pages already known to the prefix cache */
    uint64_t chain;       /* identity of the cached page equal to the last of them */
} kvseq;

/* All memory comes from `a` now; nothing is allocated later. n_pages >= 1. NOMEM leaves `a` as it
 * was. Memory is touched only as pages come into use. */
status kvpool_open(kvpool **out, arena *a, int32_t n_pages, bool prefix_cache);
/* What kvpool_open takes from an arena at most; SIZE_MAX on overflow. */
size_t kvpool_bytes(int32_t n_pages, bool prefix_cache);

/* Make room for n_tokens in all, taking free pages, then evicting cached ones, oldest first. False
 * and nothing changed when there are not enough. */
bool kvpool_reserve(kvpool *p, kvseq *s, int32_t n_tokens);

/* Begin an empty `s` with token[0..n): references to the longest run of full cached pages that
 * equals its beginning, of `most` tokens at most and never all of it (at least one token is left
 * to compute), and room for the rest. All or nothing: a refusal changes neither the LRU order nor
 * the counters, so that a waiting request may ask at every step. *n_cached: tokens covered, a
 * multiple of 64. */
bool kvpool_admit(kvpool *p, kvseq *s, const int32_t *token, int32_t n, int32_t most, uint64_t salt,
                  int32_t *n_cached);

/* The first n_computed tokens of the sequence now lie in its pages: register full pages not yet
 * known. When an equal page is registered already, this one stays private. */
void kvpool_register(kvpool *p, kvseq *s, const int32_t *token, int32_t n_computed, uint64_t salt);

/* Drop all references of the sequence; it is empty afterwards. Idempotent. Its last pages become
 * the first to be evicted, so that what is left of a prefix can still be matched. */
void kvpool_release(kvpool *p, kvseq *s);

/* Forget everything cached and unreferenced (between experiment points). */
void kvpool_flush(kvpool *p);

int32_t kvpool_pages(const kvpool *p);     /* all */
int32_t kvpool_available(const kvpool *p); /* free + cached */
int32_t kvpool_cached(const kvpool *p);
int32_t kvpool_held(const kvpool *p);
int32_t kvpool_refs(const kvpool *p, int32_t page); /* references to one page */
int64_t kvpool_hits(const kvpool *p);               /* tokens matched since open */
int64_t kvpool_queries(const kvpool *p);            /* tokens asked for */
int64_t kvpool_evictions(const kvpool *p);          /* cached pages given up for new ones */

/* NULL, or the first broken invariant (counts, lists, hash table): for tests, O(pages). */
const char *kvpool_problem(const kvpool *p);
#endif
