/* kvpool.c - see kvpool.h.
 *
 * One record per page; three intrusive lists through it: the free stack, the LRU list of cached
 * pages and the chains of the hash table. The prefix cache is a trie whose edges are pages of 64
 * tokens; its nodes are found by hashing (parent, tokens). Every registration gets a serial number
 * of its own, which is what children name as their parent: a page that was evicted leaves children
 * that nobody can reach any more, and they age out of the LRU list. */
#include "kvpool.h"

#include "kernel.h"
#include <string.h>

enum { NONE = -1 };

typedef struct {
    uint64_t serial;    /* identity of the registered content; 0 = not registered */
    uint64_t parent;    /* serial of the page before, or the salt of a first page */
    int32_t refs;       /* sequences that hold it */
    int32_t prev, next; /* LRU list (cached), `next` also free stack */
    int32_t chain;      /* next page of the same bucket, + 1; 0 = end */
    uint32_t bucket;
    bool first; /* begins a sequence: `parent` is a salt */
} kvpage;

struct kvpool {
    kvpage *page;   /* [n_pages] */
    int32_t *token; /* [n_pages, 64] of registered pages; NULL without prefix cache */
    int32_t *head;  /* [n_buckets] page + 1, 0 = empty */
    uint32_t n_buckets;
    int32_t n_pages, n_fresh;  /* pages from n_fresh on were never used: no list to build at open */
    int32_t free_head, n_free; /* n_free counts the fresh ones, too */
    int32_t lru_oldest, lru_newest, n_cached;
    uint64_t last_serial;
    int64_t hits, queries, evictions;
};

static uint32_t bucket_count(int32_t n_pages, bool prefix_cache) {
    uint32_t n = 1;
    while (prefix_cache && n < (uint32_t)n_pages) n *= 2;
    return n;
}

size_t kvpool_bytes(int32_t n_pages, bool prefix_cache) {
    const size_t per_page =
        sizeof(kvpage) + (prefix_cache ? KV_PAGE_TOKENS * sizeof(int32_t) : (size_t)0);
    /* n_pages < 2^31 and per_page < 2^9: no overflow in 64 bits. 64: alignment of four pieces. */
    return sizeof(kvpool) + (size_t)n_pages * per_page +
           bucket_count(n_pages, prefix_cache) * sizeof(int32_t) + 64;
}

status kvpool_open(kvpool **out, arena *a, int32_t n_pages, bool prefix_cache) {
    CHECK(n_pages >= 1);
    const size_t mark = a->used;
    *out = NULL;
    kvpool *p = arena_array(a, kvpool, 1);
    if (p) {
        p->n_buckets = bucket_count(n_pages, prefix_cache);
        p->page = arena_array(a, kvpage, (size_t)n_pages);
        p->head = arena_array(a, int32_t, p->n_buckets);
        if (prefix_cache) p->token = arena_array(a, int32_t, (size_t)n_pages * KV_PAGE_TOKENS);
    }
    if (!p || !p->page || !p->head || (prefix_cache && !p->token)) {
        arena_reset(a, mark);
        return FAIL(ST_NOMEM, "KV pool of %d pages", n_pages);
    }
    p->n_pages = p->n_free = n_pages;
    p->free_head = p->lru_oldest = p->lru_newest = NONE;
    *out = p;
    return ST_OK;
}

/* --- The prefix cache ------------------------------------------------------------------------- */

static uint32_t bucket_of(const kvpool *p, bool first, uint64_t parent, const int32_t *token) {
    const uint64_t h = hash_bytes(token, KV_PAGE_TOKENS * sizeof *token, first ? ~parent : parent);
    return (uint32_t)h & (p->n_buckets - 1);
}

static int32_t *page_tokens(const kvpool *p, int32_t page) {
    return p->token + (int64_t)page * KV_PAGE_TOKENS;
}

/* The registered page with exactly this key, or NONE. */
static int32_t find(const kvpool *p, uint32_t bucket, bool first, uint64_t parent,
                    const int32_t *token) {
    for (int32_t i = p->head[bucket] - 1; i != NONE; i = p->page[i].chain - 1) {
        const kvpage *g = &p->page[i];
        if (g->parent == parent && g->first == first &&
            memcmp(page_tokens(p, i), token, KV_PAGE_TOKENS * sizeof *token) == 0)
            return i;
    }
    return NONE;
}

static void forget(kvpool *p, int32_t page) {
    kvpage *g = &p->page[page];
    int32_t *link = &p->head[g->bucket];
    while (*link != page + 1) link = &p->page[*link - 1].chain;
    *link = g->chain;
    g->serial = 0;
}

static void lru_append(kvpool *p, int32_t page) {
    p->page[page].prev = p->lru_newest;
    p->page[page].next = NONE;
    if (p->lru_newest == NONE) {
        p->lru_oldest = page;
    } else {
        p->page[p->lru_newest].next = page;
    }
    p->lru_newest = page;
    p->n_cached++;
}

static void lru_remove(kvpool *p, int32_t page) {
    const kvpage *g = &p->page[page];
    if (g->prev == NONE) {
        p->lru_oldest = g->next;
    } else {
        p->page[g->prev].next = g->next;
    }
    if (g->next == NONE) {
        p->lru_newest = g->prev;
    } else {
        p->page[g->next].prev = g->prev;
    }
    p->n_cached--;
}

static void free_push(kvpool *p, int32_t page) {
    p->page[page].next = p->free_head;
    p->free_head = page;
    p->n_free++;
}

/* Fill s->page with the cached beginning of token[0..n), without taking references. Returns the
 * number of pages, and how many of them are now evictable. */
static int32_t look_up(const kvpool *p, kvseq *s, const int32_t *token, int32_t n, uint64_t salt,
                       int32_t *n_evictable) {
    *n_evictable = 0;
    if (!p->token) return 0;
    const int32_t most = (int32_t)i64_min((n - 1) / KV_PAGE_TOKENS, s->max_pages);
    uint64_t parent = salt;
    int32_t m = 0;
    for (; m < most; m++) {
        const int32_t *t = token + (int64_t)m * KV_PAGE_TOKENS;
        const int32_t page = find(p, bucket_of(p, m == 0, parent, t), m == 0, parent, t);
        if (page == NONE) break;
        s->page[m] = page;
        if (p->page[page].refs == 0) ++*n_evictable;
        parent = p->page[page].serial;
    }
    return m;
}

/* Take references to the m pages that look_up put down. */
static void take_found(kvpool *p, kvseq *s, int32_t m) {
    for (int32_t i = 0; i < m; i++) {
        if (p->page[s->page[i]].refs++ == 0) lru_remove(p, s->page[i]);
    }
    s->n_pages = s->n_registered = m;
    s->chain = m ? p->page[s->page[m - 1]].serial : 0;
}

void kvpool_register(kvpool *p, kvseq *s, const int32_t *token, int32_t n_computed, uint64_t salt) {
    const int32_t n_full = n_computed / KV_PAGE_TOKENS;
    CHECK(n_full <= s->n_pages);
    if (!p->token) return;
    for (int32_t i = s->n_registered; i < n_full; i++) {
        const int32_t *t = token + (int64_t)i * KV_PAGE_TOKENS;
        const uint64_t parent = i ? s->chain : salt;
        const uint32_t bucket = bucket_of(p, i == 0, parent, t);
        const int32_t known = find(p, bucket, i == 0, parent, t);
        if (known != NONE) {
            s->chain = p->page[known].serial;
            continue;
        }
        kvpage *g = &p->page[s->page[i]];
        CHECK(g->serial == 0);
        CHECK(g->refs == 1);
        g->serial = ++p->last_serial;
        g->parent = parent;
        g->first = i == 0;
        g->bucket = bucket;
        g->chain = p->head[bucket];
        p->head[bucket] = s->page[i] + 1;
        memcpy(page_tokens(p, s->page[i]), t, KV_PAGE_TOKENS * sizeof *t);
        s->chain = g->serial;
    }
    if (n_full > s->n_registered) s->n_registered = n_full;
}

void kvpool_flush(kvpool *p) {
    while (p->lru_oldest != NONE) {
        const int32_t page = p->lru_oldest;
        lru_remove(p, page);
        forget(p, page);
        free_push(p, page);
    }
}

/* --- Taking and giving back ------------------------------------------------------------------- */

/* A page for one owner: free if there is one, else the cached page unused for longest. */
static int32_t take(kvpool *p) {
    int32_t page;
    if (p->free_head != NONE) {
        page = p->free_head;
        p->free_head = p->page[page].next;
        p->n_free--;
    } else if (p->n_fresh < p->n_pages) {
        page = p->n_fresh++;
        p->n_free--;
    } else {
        page = p->lru_oldest;
        CHECK(page != NONE);
        lru_remove(p, page);
        forget(p, page);
        p->evictions++;
    }
    CHECK(p->page[page].refs == 0);
    p->page[page].refs = 1;
    return page;
}

bool kvpool_reserve(kvpool *p, kvseq *s, int32_t n_tokens) {
    const int32_t want = (int32_t)div_up(n_tokens, KV_PAGE_TOKENS);
    if (want <= s->n_pages) return true;
    if (want - s->n_pages > kvpool_available(p)) return false;
    CHECK(want <= s->max_pages);
    while (s->n_pages < want) s->page[s->n_pages++] = take(p);
    return true;
}

bool kvpool_admit(kvpool *p, kvseq *s, const int32_t *token, int32_t n, int32_t most, uint64_t salt,
                  int32_t *n_cached) {
    CHECK(s->n_pages == 0);
    CHECK(n >= 1);
    int32_t n_evictable;
    const int32_t m = look_up(p, s, token, most < n ? most + 1 : n, salt, &n_evictable);
    const int32_t want = (int32_t)div_up(n, KV_PAGE_TOKENS);
    *n_cached = 0;
    if (want - m > kvpool_available(p) - n_evictable) return false;
    take_found(p, s, m);
    const bool fits = kvpool_reserve(p, s, n);
    CHECK(fits);
    p->queries += n;
    p->hits += (int64_t)m * KV_PAGE_TOKENS;
    *n_cached = m * KV_PAGE_TOKENS;
    return true;
}

void kvpool_release(kvpool *p, kvseq *s) {
    while (s->n_pages) {
        const int32_t page = s->page[--s->n_pages];
        CHECK(p->page[page].refs >= 1);
        if (--p->page[page].refs) continue;
        if (p->page[page].serial) {
            lru_append(p, page);
        } else {
            free_push(p, page);
        }
    }
    s->n_registered = 0;
    s->chain = 0;
}

/* --- Looking ---------------------------------------------------------------------------------- */

int32_t kvpool_pages(const kvpool *p) { return p->n_pages; }
int32_t kvpool_available(const kvpool *p) { return p->n_free + p->n_cached; }
int32_t kvpool_cached(const kvpool *p) { return p->n_cached; }
int32_t kvpool_held(const kvpool *p) { return p->n_pages - p->n_free - p->n_cached; }
int64_t kvpool_hits(const kvpool *p) { return p->hits; }
int64_t kvpool_queries(const kvpool *p) { return p->queries; }
int64_t kvpool_evictions(const kvpool *p) { return p->evictions; }

int32_t kvpool_refs(const kvpool *p, int32_t page) {
    CHECK(page >= 0);
    CHECK(page < p->n_pages);
    return p->page[page].refs;
}

static const char *lists_problem(const kvpool *p) {
    int32_t n = 0, before = NONE;
    for (int32_t i = p->free_head; i != NONE; i = p->page[i].next) {
        if (i < 0 || i >= p->n_fresh || ++n > p->n_free) return "the free stack is broken";
        if (p->page[i].refs || p->page[i].serial) return "a free page is held or registered";
    }
    if (n + p->n_pages - p->n_fresh != p->n_free) return "the free pages are miscounted";
    n = 0;
    for (int32_t i = p->lru_oldest; i != NONE; before = i, i = p->page[i].next) {
        if (i < 0 || i >= p->n_fresh || ++n > p->n_cached) return "the LRU list is broken";
        if (p->page[i].prev != before) return "the LRU list has a wrong back link";
        if (p->page[i].refs) return "a cached page is held";
        if (!p->page[i].serial) return "a cached page is not registered";
    }
    if (n != p->n_cached || before != p->lru_newest) return "the cached pages are miscounted";
    return NULL;
}

static const char *table_problem(const kvpool *p, int32_t n_registered) {
    int32_t n = 0;
    for (uint32_t b = 0; b < p->n_buckets; b++) {
        for (int32_t i = p->head[b] - 1; i != NONE; i = p->page[i].chain - 1) {
            if (i < 0 || i >= p->n_fresh || ++n > n_registered) return "a bucket is broken";
            const kvpage *g = &p->page[i];
            if (!g->serial) return "a bucket holds a page that is not registered";
            if (g->serial > p->last_serial) return "a serial number was never given out";
            if (!g->first && g->parent >= g->serial) return "a page is older than its parent";
            const int32_t *t = page_tokens(p, i);
            if (g->bucket != b || bucket_of(p, g->first, g->parent, t) != b)
                return "a page lies in the wrong bucket";
            if (find(p, b, g->first, g->parent, t) != i) return "two pages have the same key";
        }
    }
    return n == n_registered ? NULL : "a registered page is in no bucket";
}

const char *kvpool_problem(const kvpool *p) {
    int32_t n_held = 0, n_registered = 0;
    for (int32_t i = 0; i < p->n_fresh; i++) {
        if (p->page[i].refs < 0) return "a reference count is negative";
        n_held += p->page[i].refs > 0;
        n_registered += p->page[i].serial != 0;
    }
    if (p->n_free < 0 || p->n_cached < 0) return "a count is negative";
    if (n_held != kvpool_held(p)) return "the held pages are miscounted";
    const char *problem = lists_problem(p);
    return problem ? problem : table_problem(p, n_registered);
}
