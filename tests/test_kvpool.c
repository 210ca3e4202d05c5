/* test_kvpool.c - the KV pool against a naive model: linear searches over arrays, no hash, no
 * lists.
 *
 * The pool is included, not linked, so that faults can be planted inside it. */
#include "test.h"

#include "../engine/kvpool.c"

#include "rng.h"
#include <stdlib.h>

enum { P = KV_PAGE_TOKENS, SEQS = 8, BLOCKS = 6, PAGES = 24, MAX_TOKENS = BLOCKS * P };

/* --- The model ---------------------------------------------------------------------------------
 * Content comes in blocks of 64 tokens; blocks of different numbers differ in one token only. */

static int32_t block_token(int32_t block, int32_t t) { return 7 * t + (t == 37 ? block : 0); }

typedef struct {
    int32_t refs;
    uint64_t instance, parent; /* 0: not registered */
    bool first;
    int32_t block;
    int64_t released; /* LRU: when it was last let go */
    /* What a sequence has computed into it. */
    bool written;
    uint64_t salt;
    int32_t depth;
    int32_t prefix[BLOCKS];
} model_page;

typedef struct {
    kvseq kv;
    int32_t storage[BLOCKS + 1];
    bool live;
    uint64_t salt;
    int32_t block[BLOCKS]; /* the last may be used in part */
    int32_t token[MAX_TOKENS];
    int32_t n_tokens, n_computed;
    /* The model's opinion of kv. */
    int32_t page[BLOCKS], n_pages, n_registered;
    uint64_t chain;
} model_seq;

typedef struct {
    arena mem;
    kvpool *p;
    bool cache;
    int32_t n_pages;
    rng r;
    model_page page[PAGES];
    model_seq seq[SEQS];
    uint64_t last_instance;
    int64_t now, hits, queries;
} world;

static void world_open(world *w, int32_t n_pages, bool cache, uint64_t seed) {
    memset(w, 0, sizeof *w);
    w->n_pages = n_pages;
    w->cache = cache;
    rng_seed(&w->r, seed, 0);
    assert_ok(arena_open(&w->mem, kvpool_bytes(n_pages, cache)));
    assert_ok(kvpool_open(&w->p, &w->mem, n_pages, cache));
    arena_seal(&w->mem);
}

static void world_close(world *w) { arena_close(&w->mem); }

static int32_t model_find(const world *w, bool first, uint64_t parent, int32_t block) {
    for (int32_t i = 0; i < w->n_pages; i++) {
        const model_page *g = &w->page[i];
        if (g->instance && g->first == first && g->parent == parent && g->block == block) return i;
    }
    return -1;
}

static int32_t model_count(const world *w, bool held, bool registered) {
    int32_t n = 0;
    for (int32_t i = 0; i < w->n_pages; i++)
        n += (w->page[i].refs > 0) == held && (w->page[i].instance != 0) == registered;
    return n;
}

static int32_t model_free(const world *w) { return model_count(w, false, false); }
static int32_t model_cached(const world *w) { return model_count(w, false, true); }

/* --- Operations: done to both, NULL or what differs ------------------------------------------- */

static const char *written_by_this(const model_page *g, const model_seq *s, int32_t d) {
    if (!g->written || g->salt != s->salt || g->depth != d) return "a match of other content";
    return memcmp(g->prefix, s->block, (size_t)(d + 1) * sizeof *s->block) ? "a match of a lie"
                                                                           : NULL;
}

/* Longest cached beginning of at most `most` tokens that leaves one, by the book; returns pages and
 * puts them down. */
static int32_t model_match(const world *w, model_seq *s, int32_t n, int32_t most,
                           int32_t *n_evictable) {
    int32_t m = 0;
    *n_evictable = 0;
    s->chain = s->salt;
    for (; w->cache && (m + 1) * P <= most && (m + 1) * P < n; m++) {
        const int32_t i = model_find(w, m == 0, s->chain, s->block[m]);
        if (i < 0) break;
        s->page[m] = i;
        s->chain = w->page[i].instance;
        *n_evictable += w->page[i].refs == 0;
    }
    return m;
}

static const char *after_match(world *w, model_seq *s, int32_t m, int32_t n, int32_t covered) {
    if (covered != m * P) return "another length matched";
    for (int32_t d = 0; d < m; d++) {
        if (s->kv.page[d] != s->page[d]) return "another page matched";
        const char *problem = written_by_this(&w->page[s->page[d]], s, d);
        if (problem) return problem;
        w->page[s->page[d]].refs++;
    }
    s->n_pages = s->n_registered = m;
    s->n_computed = m * P;
    w->hits += m * P;
    w->queries += n;
    return NULL;
}

/* The pages beyond n_pages that the pool gave must be free ones, then the oldest cached ones. */
static const char *after_take(world *w, model_seq *s, int32_t n_tokens) {
    for (; s->n_pages < (n_tokens + P - 1) / P; s->n_pages++) {
        const int32_t i = s->kv.page[s->n_pages];
        if (i < 0 || i >= w->n_pages) return "a page out of range";
        model_page *g = &w->page[i];
        if (g->refs) return "a held page was given away";
        if (g->instance && model_free(w) > 0) return "evicted although a page was free";
        for (int32_t k = 0; g->instance && k < w->n_pages; k++) {
            const model_page *o = &w->page[k];
            if (o->instance && o->refs == 0 && o->released < g->released) return "not the oldest";
        }
        *g = (model_page){.refs = 1};
        s->page[s->n_pages] = i;
    }
    return s->kv.n_pages == s->n_pages ? NULL : "another number of pages";
}

static void new_content(world *w, model_seq *s) {
    s->live = true;
    s->salt = rng_below(&w->r, 2);
    s->n_tokens = (int32_t)rng_range(&w->r, 1, MAX_TOKENS);
    if (rng_below(&w->r, 3) == 0) s->n_tokens = (int32_t)rng_range(&w->r, 1, BLOCKS) * P;
    for (int32_t d = 0; d < BLOCKS; d++) {
        s->block[d] = rng_below(&w->r, 3) == 0;
        for (int32_t t = 0; t < P; t++) s->token[d * P + t] = block_token(s->block[d], t);
    }
    s->kv = (kvseq){.page = s->storage, .max_pages = BLOCKS};
    s->n_pages = s->n_registered = s->n_computed = 0;
}

/* All tokens, or a part of them: reservations and registrations may follow up to all. */
static const char *op_admit(world *w, model_seq *s, bool all) {
    new_content(w, s);
    int32_t n_evictable, covered = -1;
    const int32_t n = all ? s->n_tokens : (int32_t)rng_range(&w->r, 1, s->n_tokens);
    const int32_t most = rng_below(&w->r, 3) ? n : (int32_t)rng_range(&w->r, 0, n);
    const int32_t m = model_match(w, s, n, most, &n_evictable);
    const int32_t available = model_free(w) + model_cached(w);
    const bool fits = (n + P - 1) / P - m <= available - n_evictable;
    if (kvpool_admit(w->p, &s->kv, s->token, n, most, s->salt, &covered) != fits)
        return "admission differs";
    if (!fits) {
        s->live = false;
        return covered || s->kv.n_pages ? "a refused admission left something" : NULL;
    }
    const char *problem = after_match(w, s, m, n, covered);
    return problem ? problem : after_take(w, s, n);
}

static const char *op_reserve(world *w, model_seq *s) {
    const int32_t n = (int32_t)rng_range(&w->r, 0, s->n_tokens);
    const int32_t missing = (n + P - 1) / P - s->n_pages;
    const bool fits = missing <= model_free(w) + model_cached(w);
    if (kvpool_reserve(w->p, &s->kv, n) != fits) return "reservation differs";
    return fits ? after_take(w, s, n) : NULL;
}

static const char *op_register(world *w, model_seq *s, bool lie) {
    const int32_t room = s->n_pages * P < s->n_tokens ? s->n_pages * P : s->n_tokens;
    if (room <= s->n_computed) return NULL;
    const int32_t n = (int32_t)rng_range(&w->r, s->n_computed + 1, room);
    for (int32_t d = s->n_computed / P; d < n / P; d++) { /* pages that became full */
        model_page *g = &w->page[s->page[d]];
        g->written = true;
        g->salt = s->salt;
        g->depth = d;
        memcpy(g->prefix, s->block, sizeof g->prefix);
    }
    s->n_computed = n;
    for (int32_t d = s->n_registered; w->cache && d < n / P; d++) {
        const uint64_t parent = d ? s->chain : s->salt;
        const int32_t known = model_find(w, d == 0, parent, s->block[d]);
        model_page *g = &w->page[s->page[d]];
        if (known < 0) {
            g->instance = ++w->last_instance;
            g->parent = parent;
            g->first = d == 0;
            g->block = s->block[d];
        }
        s->chain = known < 0 ? g->instance : w->page[known].instance;
        s->n_registered = d + 1;
    }
    if (lie) s->token[37] ^= 1; /* the pool hears of another first block */
    kvpool_register(w->p, &s->kv, s->token, n, s->salt);
    return NULL;
}

static void op_release(world *w, model_seq *s) {
    while (s->n_pages) {
        model_page *g = &w->page[s->page[--s->n_pages]];
        if (--g->refs) continue;
        g->released = ++w->now;
        if (!g->instance) *g = (model_page){0};
    }
    s->live = false;
    kvpool_release(w->p, &s->kv);
    kvpool_release(w->p, &s->kv); /* idempotent */
}

static void op_flush(world *w) {
    for (int32_t i = 0; i < w->n_pages; i++)
        if (w->page[i].refs == 0) w->page[i] = (model_page){0};
    kvpool_flush(w->p);
}

static const char *compare(const world *w) {
    if (kvpool_pages(w->p) != w->n_pages) return "pages";
    if (kvpool_available(w->p) != model_free(w) + model_cached(w)) return "available pages";
    if (kvpool_cached(w->p) != model_cached(w)) return "cached pages";
    if (kvpool_held(w->p) + kvpool_available(w->p) != w->n_pages) return "held pages";
    if (kvpool_hits(w->p) != w->hits || kvpool_queries(w->p) != w->queries) return "counters";
    for (int32_t i = 0; i < w->n_pages; i++)
        if (kvpool_refs(w->p, i) != w->page[i].refs) return "references";
    for (int32_t k = 0; k < SEQS; k++) {
        const model_seq *s = &w->seq[k];
        if (!s->live) continue;
        if (s->kv.n_pages != s->n_pages) return "pages of a sequence";
        if (memcmp(s->kv.page, s->page, (size_t)s->n_pages * sizeof *s->page))
            return "page numbers of a sequence";
        if (w->cache && s->kv.n_registered != s->n_registered) return "registered pages";
    }
    return kvpool_problem(w->p);
}

static const char *random_op(world *w, bool lie) {
    model_seq *s = &w->seq[rng_below(&w->r, SEQS)];
    const char *problem = NULL;
    const uint64_t what = rng_below(&w->r, 100);
    if (what == 99) {
        op_flush(w);
    } else if (!s->live) {
        problem = op_admit(w, s, what >= 50);
    } else if (what < 40) {
        problem = op_reserve(w, s);
    } else if (what < 80) {
        problem = op_register(w, s, lie);
    } else {
        op_release(w, s);
    }
    return problem ? problem : compare(w);
}

static void equals_a_naive_model_over_a_million_operations(void **state) {
    (void)state;
    const uint64_t seed = 20240817;
    print_message("seed %llu\n", (unsigned long long)seed);
    int64_t hits = 0, evictions = 0;
    for (uint64_t episode = 0; episode < 100; episode++) {
        world w;
        world_open(&w, 1 + (int32_t)(episode * 7 % PAGES), episode % 4 != 3, seed + episode);
        for (int32_t i = 0; i < 10000; i++) {
            const char *problem = random_op(&w, false);
            if (problem)
                fail_msg("seed %llu, operation %d: %s", (unsigned long long)(seed + episode), i,
                         problem);
        }
        for (int32_t k = 0; k < SEQS; k++) op_release(&w, &w.seq[k]);
        assert_int_equal(kvpool_available(w.p), w.n_pages);
        hits += kvpool_hits(w.p);
        evictions += kvpool_evictions(w.p);
        op_flush(&w);
        assert_int_equal(kvpool_cached(w.p), 0);
        assert_null(kvpool_problem(w.p));
        world_close(&w);
    }
    assert_true(hits > 1000000); /* the run did exercise the cache */
    assert_true(evictions > 10000);
}

/* --- Twins: planted faults are noticed -------------------------------------------------------- */

static void notices_one_token_registered_wrong(void **state) {
    (void)state;
    world w;
    int32_t noticed = 0;
    for (uint64_t seed = 0; seed < 20; seed++) {
        world_open(&w, PAGES, true, seed);
        /* Find a registration of a first page and tell the pool another token. */
        for (int32_t i = 0; i < 2000; i++) assert_null(random_op(&w, false));
        const char *problem = NULL;
        for (int32_t i = 0; i < 2000 && !problem; i++) problem = random_op(&w, true);
        noticed += problem != NULL;
        world_close(&w);
    }
    assert_int_equal(noticed, 20);
}

static kvpage *some_page(world *w, bool held, bool registered) {
    for (int32_t i = 0; i < w->p->n_fresh; i++) {
        kvpage *g = &w->p->page[i];
        if ((g->refs > 0) == held && (g->serial != 0) == registered) return g;
    }
    return NULL;
}

static void notices_every_planted_fault(void **state) {
    (void)state;
    enum { REFS_UP, REFS_DOWN, FREE_COUNT, LRU_LINK, LRU_BACK, TOKEN, SERIAL, BUCKET, LOST, N };
    for (int32_t fault = 0; fault < N; fault++) {
        world w;
        world_open(&w, PAGES, true, 5);
        /* 3 sequences hold pages, others are cached, some are free. */
        const char *problem = NULL;
        while (!some_page(&w, true, true) || !some_page(&w, false, true) ||
               !some_page(&w, false, false) || w.p->n_cached < 3)
            assert_null(random_op(&w, false));
        kvpage *held = some_page(&w, true, true), *cached = &w.p->page[w.p->lru_oldest];
        switch (fault) {
        case REFS_UP: held->refs++; break;
        case REFS_DOWN: held->refs--; break;
        case FREE_COUNT: w.p->n_free--; break;
        case LRU_LINK: cached->next = w.p->page[cached->next].next; break;
        case LRU_BACK: w.p->page[cached->next].prev = NONE; break;
        case TOKEN: page_tokens(w.p, (int32_t)(cached - w.p->page))[37] ^= 1; break;
        case SERIAL: cached->serial = 0; break;
        case BUCKET: cached->bucket ^= 1; break;
        case LOST: w.p->head[cached->bucket] = 0; break;
        default: fail();
        }
        problem = compare(&w);
        if (!problem) fail_msg("fault %d was not noticed", fault);
        world_close(&w);
    }
}

/* --- Edges ------------------------------------------------------------------------------------ */

/* All sets of three sequences of 0..P+1 tokens: a pool of exactly their pages suffices, one page
 * less does not, and a refusal changes nothing. */
static void page_edges_exhaustively(void **state) {
    (void)state;
    arena mem;
    assert_ok(arena_open(&mem, 1 << 20));
    for (int32_t n_pages = 1; n_pages <= 6; n_pages++) {
        kvpool *p;
        arena_reset(&mem, 0);
        assert_ok(kvpool_open(&p, &mem, n_pages, false));
        for (int32_t code = 0; code < (P + 2) * (P + 2) * (P + 2); code++) {
            const int32_t n[3] = {code % (P + 2), code / (P + 2) % (P + 2),
                                  code / (P + 2) / (P + 2)};
            int32_t storage[3][2], used = 0;
            kvseq s[3];
            for (int32_t i = 0; i < 3; i++) {
                s[i] = (kvseq){.page = storage[i], .max_pages = 2};
                const int32_t want = n[i] == 0 ? 0 : n[i] <= P ? 1 : 2;
                const bool fits = used + want <= n_pages;
                if (kvpool_reserve(p, &s[i], n[i]) != fits) fail_msg("%d tokens", n[i]);
                if (fits) used += want;
                if (s[i].n_pages != (fits ? want : 0)) fail_msg("%d tokens", n[i]);
            }
            if (kvpool_held(p) != used) fail_msg("%d pages are held", kvpool_held(p));
            for (int32_t i = 0; i < 3; i++) kvpool_release(p, &s[i]);
        }
        assert_int_equal(kvpool_available(p), n_pages);
        assert_null(kvpool_problem(p));
    }
    arena_close(&mem);
}

/* What is covered of a sequence that is admitted and gives all back. */
static int32_t covered_of(world *w, kvseq *s, const int32_t *token, int32_t n, uint64_t salt) {
    int32_t covered = -1;
    assert_true(kvpool_admit(w->p, s, token, n, n, salt, &covered));
    kvpool_release(w->p, s);
    return covered;
}

/* One sequence registers 3 pages; for every length the match covers all full pages but never all.
 */
static void matches_all_but_the_last_token(void **state) {
    (void)state;
    world w;
    world_open(&w, 8, true, 1);
    int32_t token[3 * P + 2], pages[4];
    for (int32_t i = 0; i < COUNT_OF(token); i++) token[i] = i;
    kvseq s = {.page = pages, .max_pages = 4};
    assert_true(kvpool_reserve(w.p, &s, 3 * P));
    kvpool_register(w.p, &s, token, 3 * P, 9);
    kvpool_release(w.p, &s);
    for (int32_t n = 1; n <= COUNT_OF(token); n++) {
        const int32_t full = (n - 1) / P < 3 ? (n - 1) / P : 3;
        assert_int_equal(covered_of(&w, &s, token, n, 9), full * P);
        assert_int_equal(covered_of(&w, &s, token, n, 10), 0); /* another namespace */
        for (int32_t at = 0; at < n; at += 13) {               /* one token differs */
            token[at] ^= 1;
            const int32_t least = at / P < full ? at / P : full;
            assert_int_equal(covered_of(&w, &s, token, n, 9), least * P);
            token[at] ^= 1;
        }
    }
    assert_null(kvpool_problem(w.p));
    world_close(&w);
}

/* A salt that equals the serial number of a page must not stand for it. */
static void a_salt_is_no_parent(void **state) {
    (void)state;
    world w;
    world_open(&w, 8, true, 1);
    int32_t token[2 * P + 1] = {0}, pages[4];
    kvseq s = {.page = pages, .max_pages = 4};
    assert_true(kvpool_reserve(w.p, &s, 2 * P));
    kvpool_register(w.p, &s, token, 2 * P, 0);
    kvpool_release(w.p, &s);
    for (uint64_t salt = 1; salt <= w.p->last_serial; salt++)
        assert_int_equal(covered_of(&w, &s, token, 2 * P + 1, salt), 0);
    assert_int_equal(covered_of(&w, &s, token, 2 * P + 1, 0), 2 * P);
    world_close(&w);
}

static void survives_every_refused_allocation(void **state) {
    (void)state;
    for (int32_t cache = 0; cache < 2; cache++) {
        arena mem;
        assert_ok(arena_open(&mem, kvpool_bytes(100, cache)));
        for (int64_t n = 1;; n++) {
            kvpool *p;
            mem_fail_at(n);
            const status st = kvpool_open(&p, &mem, 100, cache);
            mem_fail_at(0);
            if (st == ST_OK) break;
            assert_int_equal(st, ST_NOMEM);
            assert_null(p);
            assert_int_equal(mem.used, 0);
            assert_true(n < 10);
        }
        arena_close(&mem);
        assert_ok(arena_open(&mem, 100)); /* too small an arena */
        kvpool *p;
        assert_status(kvpool_open(&p, &mem, 100, cache), ST_NOMEM);
        assert_int_equal(mem.used, 0);
        arena_close(&mem);
    }
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(equals_a_naive_model_over_a_million_operations),
        cmocka_unit_test(notices_one_token_registered_wrong),
        cmocka_unit_test(notices_every_planted_fault),
        cmocka_unit_test(page_edges_exhaustively),
        cmocka_unit_test(matches_all_but_the_last_token),
        cmocka_unit_test(a_salt_is_no_parent),
        cmocka_unit_test(survives_every_refused_allocation),
    };
    return cmocka_run_group_tests_name("kvpool", tests, NULL, NULL);
}
