/* sched.c - see sched.h.
 *
 *     sched_add -> waiting (list, by arrival) -> running (array, by arrival) -> finished (list)
 *                        ^------ preempted ----------'                            |
 *     sched_take_finished -> taken (list, storage still valid) -> sched_add frees <'
 *
 * Requests live in a table of slots; lists go through it by slot number. A running request also has
 * a lane: a fixed array for its page numbers. Tokens of a request lie in one block of contiguous
 * storage from add until it is freed, so that the sampler's history and the caller's result are
 * plain pointers.
 *
 * Storage that cannot fragment: blocks hold 64 * 2^c words, and class c has blocks enough for the
 * worst case in which all requests are of its size. That is address space; only what was in use at
 * some time is ever touched, at most twice the limit for each class. */
#include "sched.h"

#include "kernel.h"
#include <string.h>

enum {
    NONE = -1,
    CLASSES_MAX = 26,       /* of token storage: up to 64 * 2^25 words */
    LEAST_WORDS = 64,       /* the smallest block */
    CTX_LARGEST = 1 << 29,  /* 3 words a token must fit the largest class */
    COUNT_LARGEST = 1 << 30 /* of requests, sequences, pages: twice of it is still an int32 */
};

typedef enum { SLOT_FREE, SLOT_WAITING, SLOT_RUNNING, SLOT_FINISHED, SLOT_TAKEN } slot_state;

typedef struct {
    /* What a decode step touches. */
    int32_t *token;    /* [n_prompt + max_new] */
    int64_t *token_ns; /* [max_new] */
    int64_t id;
    uint64_t salt;
    int32_t n_prompt, max_new, n_output;
    int32_t n_pending;  /* further tokens, being drawn by batches that are out: 0 to 2 */
    int32_t n_computed; /* tokens that lie in the KV pages once the batches that are out have run */
    int32_t n_scored;   /* rows of the prompt that have scored their next token, with those out */
    kvseq kv;           /* pages in the storage of the lane */
    int32_t lane;
    slot_state state;

    int64_t arrival_ns, dispatch_ns, admit_ns, first_token_ns, finish_ns;
    int32_t n_cached, n_preempted;
    bool was_admitted;
    finish_reason finish;
    request request; /* as given; its prompt is our copy in `token` */

    int32_t prev, next; /* of the list it is in */
    int32_t chain;      /* next of the same id bucket, + 1 */
    int32_t class;      /* of its storage */
} slot;

typedef struct {
    int32_t head, tail, n;
} list;

/* Blocks of one size. */
typedef struct {
    uint32_t *base;
    int64_t words;    /* of a block */
    int32_t n, fresh; /* blocks; from `fresh` on never used */
    int32_t free;     /* stack through the first word of free blocks */
} block_class;

/* A batch and who is in it. It is out from its pick to its commit. */
typedef struct {
    bool out;
    batch b;
    int32_t *slot;             /* [S]; NONE once a request has ended otherwise */
    int32_t *token, *position; /* [token_budget] */
    int32_t *seq_start, *kv_len, *page_start, *page_out; /* [S], [S], [S+1], [S * seq_pages] */
    int64_t *id;
    sample_row *sample;
} picked;

struct sched {
    sched_policy policy;
    sched_limits limits;
    int32_t max_running; /* min(max_seqs, token_budget): decodes alone keep the budget */
    int32_t seq_pages;   /* pages of one sequence at most */
    kvpool *pool;

    slot *slot; /* [n_requests] */
    int32_t n_fresh, free_slot;
    int32_t *id_head; /* [n_id_buckets] slot + 1 */
    uint32_t n_id_buckets;
    list waiting, finished, taken;
    int64_t n_tokens; /* storage promised to those in the table */
    block_class storage[CLASSES_MAX];
    int32_t n_classes;

    int32_t *running; /* [max_running] slots by arrival */
    int32_t n_running;
    int32_t *lane_page; /* [max_running, seq_pages] */
    int32_t *free_lane; /* [max_running] stack */
    int32_t n_free_lanes, n_fresh_lanes;

    /* The head of the queue found too few pages, and nothing since could have changed that. */
    bool blocked;
    int64_t preemptions;

    /* Of step n in picked[n & 1]: the one picked last, and the one before while it is out. */
    picked picked[2];
    int64_t step;
    int32_t left; /* of the token budget */

    int32_t *refs_seen; /* [n_pages] scratch of sched_problem */
};

/* --- Opening ---------------------------------------------------------------------------------- */

/* Adds up sizes, and takes the memory as well when there is an arena: one list for both. */
typedef struct {
    arena *a;
    size_t bytes;
    bool failed;
} layout;

static void *take(layout *l, int64_t count, size_t size, size_t align) {
    size_t bytes;
    if (__builtin_mul_overflow((size_t)count, size, &bytes) ||
        __builtin_add_overflow(bytes, align, &bytes) ||
        __builtin_add_overflow(l->bytes, bytes, &l->bytes))
        l->failed = true;
    if (!l->a || l->failed) return NULL;
    void *p = arena_push(l->a, (size_t)count, size, align);
    if (!p) l->failed = true;
    return p;
}

#define TAKE(l, type, count) ((type *)take((l), (count), sizeof(type), _Alignof(type)))

/* Instants of the output (two words each), then prompt and output. */
static int64_t storage_words(int64_t n_prompt, int64_t max_new) { return n_prompt + 3 * max_new; }

static int32_t storage_class(int64_t words) {
    int32_t c = 0;
    while ((int64_t)LEAST_WORDS << c < words) c++;
    return c;
}

static void lay_out_storage(sched *s, layout *l) {
    s->n_classes = storage_class(storage_words(0, s->limits.ctx_max)) + 1;
    CHECK(s->n_classes <= CLASSES_MAX);
    for (int32_t c = 0; c < s->n_classes; c++) {
        block_class *k = &s->storage[c];
        /* One cache line more than a power of two, or else the same place of all blocks would fall
         * into the same few cache sets, and a step touches one place of each: 15 % at 1024 running.
          */
        k->words = ((int64_t)LEAST_WORDS << c) + 16;
        /* A request of this class has more than half a block of words, and at least 4; all of them
         * together have at most 3 words a token. */
        const int64_t least = c ? ((int64_t)LEAST_WORDS << c) / 2 + 1 : 4;
        k->n = (int32_t)i64_min(s->limits.n_requests, 3 * s->limits.n_tokens / least);
        k->free = NONE;
        k->base = take(l, k->n, (size_t)k->words * sizeof *k->base, _Alignof(int64_t));
    }
}

static void lay_out_batch(const sched *s, picked *p, layout *l) {
    const int64_t budget = s->policy.token_budget, n = s->max_running;
    p->slot = TAKE(l, int32_t, n);
    p->token = TAKE(l, int32_t, budget);
    p->position = TAKE(l, int32_t, budget);
    p->seq_start = TAKE(l, int32_t, n + 1);
    p->kv_len = TAKE(l, int32_t, n);
    p->page_start = TAKE(l, int32_t, n + 1);
    p->page_out = TAKE(l, int32_t, n * s->seq_pages);
    p->id = TAKE(l, int64_t, n);
    p->sample = TAKE(l, sample_row, n);
}

static void lay_out(sched *s, layout *l) {
    const sched_limits *m = &s->limits;
    const int64_t budget = s->policy.token_budget;
    s->max_running = (int32_t)i64_min(s->policy.max_seqs, i64_min(budget, m->n_requests));
    s->seq_pages = (int32_t)i64_min(div_up(m->ctx_max, KV_PAGE_TOKENS), m->n_pages);
    s->n_id_buckets = 1;
    while (s->n_id_buckets < (uint32_t)m->n_requests) s->n_id_buckets *= 2;

    s->slot = TAKE(l, slot, m->n_requests);
    s->id_head = TAKE(l, int32_t, s->n_id_buckets);
    s->running = TAKE(l, int32_t, s->max_running);
    s->free_lane = TAKE(l, int32_t, s->max_running);
    s->lane_page = TAKE(l, int32_t, (int64_t)s->max_running * s->seq_pages);
    lay_out_storage(s, l);

    for (int32_t i = 0; i < COUNT_OF(s->picked); i++) lay_out_batch(s, &s->picked[i], l);
    s->refs_seen = TAKE(l, int32_t, m->n_pages);
}

static status check_limits(const sched_policy *p, const sched_limits *l) {
    const struct {
        const char *name;
        int64_t value, least, most;
    } bound[] = {
        {"token_budget", p->token_budget, 1, COUNT_LARGEST},
        {"max_seqs", p->max_seqs, 1, COUNT_LARGEST},
        {"max_queue", p->max_queue, 0, COUNT_LARGEST},
        {"n_pages", l->n_pages, 1, COUNT_LARGEST},
        {"ctx_max", l->ctx_max, 2, CTX_LARGEST},
        {"n_requests", l->n_requests, 1, COUNT_LARGEST},
        {"n_tokens", l->n_tokens, 2, INT64_MAX / 4},
    };
    for (int32_t i = 0; i < COUNT_OF(bound); i++) {
        if (bound[i].value < bound[i].least || bound[i].value > bound[i].most)
            return FAIL(ST_RANGE, "scheduler: %s = %lld is outside %lld to %lld", bound[i].name,
                        (long long)bound[i].value, (long long)bound[i].least,
                        (long long)bound[i].most);
    }
    const int64_t seqs = i64_min(p->max_seqs, i64_min(p->token_budget, l->n_requests));
    const int64_t pages = i64_min(div_up(l->ctx_max, KV_PAGE_TOKENS), l->n_pages);
    if (seqs * pages > INT32_MAX)
        return FAIL(ST_RANGE, "scheduler: %lld sequences of %lld pages are too many for a batch",
                    (long long)seqs, (long long)pages);
    return ST_OK;
}

size_t sched_bytes(const sched_policy *p, const sched_limits *l) {
    if (check_limits(p, l) != ST_OK) return SIZE_MAX;
    sched s = {.policy = *p, .limits = *l};
    layout total = {.bytes = sizeof s + _Alignof(sched)};
    lay_out(&s, &total);
    const size_t pool = kvpool_bytes(l->n_pages, p->prefix_cache);
    if (total.failed || __builtin_add_overflow(total.bytes, pool, &total.bytes)) return SIZE_MAX;
    return total.bytes;
}

static const list empty_list = {.head = NONE, .tail = NONE};

status sched_open(sched **out, arena *a, const sched_policy *p, const sched_limits *l) {
    *out = NULL;
    TRY(check_limits(p, l));
    const size_t mark = a->used;
    sched *s = arena_array(a, sched, 1);
    layout memory = {.a = a, .failed = !s};
    if (s) {
        s->policy = *p;
        s->limits = *l;
        lay_out(s, &memory);
    }
    if (memory.failed) {
        arena_reset(a, mark);
        return FAIL(ST_NOMEM, "scheduler: %zu bytes", sched_bytes(p, l));
    }
    s->free_slot = NONE;
    s->waiting = s->finished = s->taken = empty_list;
    const status st = kvpool_open(&s->pool, a, l->n_pages, p->prefix_cache);
    if (st != ST_OK) {
        arena_reset(a, mark);
        return st;
    }
    *out = s;
    return ST_OK;
}

/* --- Lists, ids, storage ---------------------------------------------------------------------- */

/* Put slot i behind slot `at` (NONE: at the head). */
static void list_insert(sched *s, list *l, int32_t at, int32_t i) {
    const int32_t next = at == NONE ? l->head : s->slot[at].next;
    s->slot[i].prev = at;
    s->slot[i].next = next;
    *(at == NONE ? &l->head : &s->slot[at].next) = i;
    *(next == NONE ? &l->tail : &s->slot[next].prev) = i;
    l->n++;
}

static void list_remove(sched *s, list *l, int32_t i) {
    const slot *q = &s->slot[i];
    *(q->prev == NONE ? &l->head : &s->slot[q->prev].next) = q->next;
    *(q->next == NONE ? &l->tail : &s->slot[q->next].prev) = q->prev;
    l->n--;
}

/* The one order of requests: arrival, then id. */
static bool earlier(const slot *a, const slot *b) {
    return a->arrival_ns != b->arrival_ns ? a->arrival_ns < b->arrival_ns : a->id < b->id;
}

static int32_t *id_bucket(const sched *s, int64_t id) {
    return &s->id_head[(uint32_t)hash_u64((uint64_t)id, 0) & (s->n_id_buckets - 1)];
}

static int32_t id_find(const sched *s, int64_t id) {
    int32_t i = *id_bucket(s, id) - 1;
    while (i != NONE && s->slot[i].id != id) i = s->slot[i].chain - 1;
    return i;
}

static void id_remove(sched *s, int32_t i) {
    int32_t *link = id_bucket(s, s->slot[i].id);
    while (*link != i + 1) link = &s->slot[*link - 1].chain;
    *link = s->slot[i].chain;
}

static void storage_take(sched *s, slot *q) {
    q->class = storage_class(storage_words(q->n_prompt, q->max_new));
    block_class *k = &s->storage[q->class];
    uint32_t *block;
    if (k->free != NONE) {
        block = k->base + k->free * k->words;
        k->free = (int32_t)block[0];
    } else {
        CHECK(k->fresh < k->n);
        block = k->base + k->fresh++ * k->words;
    }
    q->token_ns = (int64_t *)block;
    q->token = (int32_t *)(block + 2 * (int64_t)q->max_new);
}

static void storage_give(sched *s, const slot *q) {
    block_class *k = &s->storage[q->class];
    uint32_t *block = (uint32_t *)q->token_ns;
    block[0] = (uint32_t)k->free;
    k->free = (int32_t)((block - k->base) / k->words);
}

/* Results that were taken before are no longer promised. */
static void free_taken(sched *s) {
    while (s->taken.head != NONE) {
        const int32_t i = s->taken.head;
        slot *q = &s->slot[i];
        list_remove(s, &s->taken, i);
        storage_give(s, q);
        q->state = SLOT_FREE;
        q->next = s->free_slot;
        s->free_slot = i;
    }
}

/* --- Requests in ------------------------------------------------------------------------------ */

static status refuse_forever(const sched *s, const request *r) {
    const long long id = r->id;
    if (r->n_prompt < 1 || r->max_new < 1)
        return FAIL(ST_RANGE, "request %lld: %d prompt and %d new tokens; at least 1 of each", id,
                    r->n_prompt, r->max_new);
    const int64_t n = (int64_t)r->n_prompt + r->max_new;
    if (n > s->limits.ctx_max)
        return FAIL(ST_RANGE, "request %lld: %d prompt + %d new tokens exceed the context of %d",
                    id, r->n_prompt, r->max_new, s->limits.ctx_max);
    /* The last token drawn is never fed, so it needs no room in the KV cache. */
    const int64_t pages = div_up(n - 1, KV_PAGE_TOKENS);
    if (pages > s->limits.n_pages)
        return FAIL(ST_RANGE, "request %lld: %d prompt + %d new tokens need %lld KV pages of %d",
                    id, r->n_prompt, r->max_new, (long long)pages, s->limits.n_pages);
    if (!s->policy.chunked_prefill && r->n_prompt > s->policy.token_budget)
        return FAIL(ST_RANGE,
                    "request %lld: a prompt of %d tokens exceeds the token budget of %d and "
                    "chunked prefill is off",
                    id, r->n_prompt, s->policy.token_budget);
    if (n > s->limits.n_tokens)
        return FAIL(ST_RANGE, "request %lld: %lld tokens exceed the token storage of %lld", id,
                    (long long)n, (long long)s->limits.n_tokens);
    return ST_OK;
}

static status refuse_now(const sched *s, const request *r) {
    const long long id = r->id;
    const int64_t n = (int64_t)r->n_prompt + r->max_new;
    if (id_find(s, id) != NONE) return FAIL(ST_USAGE, "request %lld is alive already", id);
    if (s->policy.max_queue && s->waiting.n >= s->policy.max_queue)
        return FAIL(ST_OOM, "request %lld: the queue of %d is full", id, s->policy.max_queue);
    if (sched_alive(s) >= s->limits.n_requests)
        return FAIL(ST_OOM, "request %lld: %d requests are alive", id, s->limits.n_requests);
    if (n > s->limits.n_tokens - s->n_tokens)
        return FAIL(ST_OOM, "request %lld: %lld tokens, and %lld of %lld are taken", id,
                    (long long)n, (long long)s->n_tokens, (long long)s->limits.n_tokens);
    return ST_OK;
}

/* By arrival, looked for from the tail: arrivals mostly come in order. */
static void queue_insert(sched *s, int32_t i) {
    int32_t at = s->waiting.tail;
    while (at != NONE && earlier(&s->slot[i], &s->slot[at])) at = s->slot[at].prev;
    list_insert(s, &s->waiting, at, i);
    if (at == NONE) s->blocked = false;
}

/* The same from the head, where preempted requests belong. */
static void queue_return(sched *s, int32_t i) {
    int32_t next = s->waiting.head;
    while (next != NONE && earlier(&s->slot[next], &s->slot[i])) next = s->slot[next].next;
    list_insert(s, &s->waiting, next == NONE ? s->waiting.tail : s->slot[next].prev, i);
}

status sched_add(sched *s, const request *r, int64_t now_ns) {
    TRY(refuse_forever(s, r));
    TRY(refuse_now(s, r));
    free_taken(s);

    int32_t i = s->free_slot;
    if (i != NONE) {
        s->free_slot = s->slot[i].next;
    } else {
        CHECK(s->n_fresh < s->limits.n_requests);
        i = s->n_fresh++;
    }
    slot *q = &s->slot[i];
    *q = (slot){.id = r->id,
                .salt = r->salt,
                .n_prompt = r->n_prompt,
                .max_new = r->max_new,
                .lane = NONE,
                .state = SLOT_WAITING,
                .arrival_ns = r->arrival_ns,
                .dispatch_ns = now_ns,
                .admit_ns = -1,
                .first_token_ns = -1,
                .finish_ns = -1,
                .request = *r};
    s->n_tokens += (int64_t)q->n_prompt + q->max_new;
    storage_take(s, q);
    memcpy(q->token, r->prompt, (size_t)q->n_prompt * sizeof *q->token);
    q->request.prompt = q->token;
    int32_t *bucket = id_bucket(s, q->id);
    q->chain = *bucket;
    *bucket = i + 1;
    queue_insert(s, i);
    return ST_OK;
}

/* --- Running set ------------------------------------------------------------------------------ */

static int32_t n_known(const slot *q) { return q->n_prompt + q->n_output; }
/* With those that are being drawn. */
static int32_t n_due(const slot *q) { return n_known(q) + q->n_pending; }

/* Release what only running requests have. The caller takes it out of running[]. */
static void leave(sched *s, slot *q) {
    kvpool_release(s->pool, &q->kv);
    s->free_lane[s->n_free_lanes++] = q->lane;
    q->lane = NONE;
    s->blocked = false;
}

static void finish(sched *s, int32_t i, finish_reason why, int64_t now_ns) {
    slot *q = &s->slot[i];
    q->state = SLOT_FINISHED;
    q->finish = why;
    q->finish_ns = now_ns;
    list_insert(s, &s->finished, s->finished.tail, i);
}

/* End a request that waits or runs. Batches that are out compute its rows for nobody. The caller
 * compacts the running set. */
static void retire(sched *s, int32_t i, finish_reason why, int64_t now_ns) {
    slot *q = &s->slot[i];
    if (q->state == SLOT_WAITING) {
        if (s->waiting.head == i) s->blocked = false;
        list_remove(s, &s->waiting, i);
    } else {
        leave(s, q);
    }
    q->n_pending = 0;
    for (int32_t j = 0; j < COUNT_OF(s->picked); j++) {
        picked *p = &s->picked[j];
        for (int32_t k = 0; p->out && k < p->b.n_seqs; k++)
            if (p->slot[k] == i) p->slot[k] = NONE;
    }
    finish(s, i, why, now_ns);
}

static void preempt_latest(sched *s) {
    const int32_t i = s->running[--s->n_running];
    slot *q = &s->slot[i];
    leave(s, q);
    q->state = SLOT_WAITING;
    q->n_computed = 0;
    q->n_preempted++;
    s->preemptions++;
    queue_return(s, i);
}

/* Rows of the prompt that are yet to score the token after them. */
static int32_t unscored(const slot *q) {
    return q->request.score_prompt ? q->n_prompt - 1 - q->n_scored : 0;
}

/* Move the head of the queue to the running, with pages for all it knows. NONE when it does not
 * fit. */
static int32_t admit_head(sched *s) {
    const int32_t i = s->waiting.head;
    if (i == NONE || s->n_running == s->max_running || s->blocked) return NONE;
    slot *q = &s->slot[i];
    CHECK(q->n_pending == 0); /* preempted in one pick, known before the next but one */
    const int32_t lane = s->n_free_lanes ? s->free_lane[s->n_free_lanes - 1] : s->n_fresh_lanes;
    q->kv = (kvseq){.page = s->lane_page + (int64_t)lane * s->seq_pages, .max_pages = s->seq_pages};
    int32_t n_cached;
    const int32_t most = unscored(q) ? q->n_scored : n_known(q);
    if (!kvpool_admit(s->pool, &q->kv, q->token, n_known(q), most, q->salt, &n_cached)) {
        s->blocked = true;
        return NONE;
    }
    if (s->n_free_lanes) {
        s->n_free_lanes--;
    } else {
        s->n_fresh_lanes++;
    }
    q->lane = lane;
    q->n_computed = n_cached;
    if (!q->was_admitted) q->n_cached = n_cached;
    q->was_admitted = true;
    q->state = SLOT_RUNNING;
    list_remove(s, &s->waiting, i);

    int32_t at = s->n_running++;
    for (; at > 0 && earlier(q, &s->slot[s->running[at - 1]]); at--)
        s->running[at] = s->running[at - 1];
    s->running[at] = i;
    return i;
}

/* --- One step --------------------------------------------------------------------------------- */

/* Append the next n tokens of slot i to the batch. */
static void place(sched *s, picked *p, int32_t i, int32_t n, int64_t now_ns) {
    slot *q = &s->slot[i];
    batch *b = &p->b;
    const int32_t at = b->n_seqs, first = b->n_tokens, kv_len = q->n_computed + n;
    for (int32_t t = 0; t < n; t++) {
        p->token[first + t] = q->token[q->n_computed + t];
        p->position[first + t] = q->n_computed + t;
    }
    b->n_tokens += n;
    s->left -= n;

    const int32_t n_pages = (int32_t)div_up(kv_len, KV_PAGE_TOKENS);
    memcpy(p->page_out + p->page_start[at], q->kv.page, (size_t)n_pages * sizeof *p->page_out);
    p->slot[at] = i;
    p->id[at] = q->id;
    p->kv_len[at] = kv_len;
    p->seq_start[at + 1] = b->n_tokens;
    p->page_start[at + 1] = p->page_start[at] + n_pages;
    b->n_seqs++;

    for (; unscored(q) && q->n_scored < kv_len; q->n_scored++)
        p->sample[b->n_samples++] = (sample_row){.row = first + q->n_scored - q->n_computed,
                                                 .seq = at,
                                                 .params = &q->request.sampling,
                                                 .given = &q->token[q->n_scored + 1]};
    if (kv_len == n_due(q)) {
        p->sample[b->n_samples] = (sample_row){.row = b->n_tokens - 1,
                                               .seq = at,
                                               .params = &q->request.sampling,
                                               .draw = (uint64_t)(q->n_output + q->n_pending),
                                               .history = q->token,
                                               .n_history = kv_len};
        q->token[kv_len] = -1 - b->n_samples++; /* until it is known */
        q->n_pending++;
    }
    q->n_computed = kv_len;
    if (q->admit_ns < 0) q->admit_ns = now_ns;
}

/* Every sequence with one token left gets it, the latest arrivals making room where pages are
 * short. Returns whether any had to. */
static bool place_decodes(sched *s, picked *p, int64_t now_ns) {
    bool preempted = false;
    for (int32_t k = 0; k < s->n_running; k++) {
        const int32_t i = s->running[k];
        slot *q = &s->slot[i];
        if (n_due(q) - q->n_computed != 1) continue;
        if (q->n_output + q->n_pending == q->max_new) continue; /* its last token is being drawn */
        bool fits = true;
        while (n_due(q) > q->kv.n_pages * KV_PAGE_TOKENS &&
               !kvpool_reserve(s->pool, &q->kv, n_due(q))) {
            CHECK(s->n_running > 1); /* alone it fits: sched_add saw to that */
            fits = s->running[s->n_running - 1] != i;
            preempt_latest(s);
            preempted = true;
            if (!fits) break;
        }
        if (fits) place(s, p, i, 1, now_ns);
    }
    p->b.n_decodes = p->b.n_seqs;
    return preempted;
}

/* Samples of the next n tokens. */
static int32_t samples_of(const slot *q, int32_t n) {
    const int32_t kv_len = q->n_computed + n, end = q->n_prompt - 1;
    const int32_t scored = (kv_len < end ? kv_len : end) - q->n_scored;
    return (unscored(q) && scored > 0 ? scored : 0) + (kv_len == n_due(q));
}

/* Give slot i what the budget allows of its prompt, and the rows to be sampled. */
static void place_prefill(sched *s, picked *p, int32_t i, int64_t now_ns) {
    const slot *q = &s->slot[i];
    int32_t n = n_due(q) - q->n_computed;
    if (n > s->left) {
        const bool may_cut = s->policy.chunked_prefill || p->b.n_seqs == 0;
        if (!may_cut) s->left = 0; /* the step is over: nobody overtakes */
        n = s->left;
    }
    while (n > 0 && samples_of(q, n) > s->max_running - p->b.n_samples) n--;
    if (n > 0) place(s, p, i, n, now_ns);
}

/* Sequences that are running with more than one token left. */
static void place_prefills(sched *s, picked *p, int64_t now_ns) {
    for (int32_t k = 0; k < s->n_running && s->left > 0; k++) {
        const slot *q = &s->slot[s->running[k]];
        if (n_due(q) - q->n_computed > 1) place_prefill(s, p, s->running[k], now_ns);
    }
}

static void admit_and_place(sched *s, picked *p, int64_t now_ns) {
    const bool fill = s->policy.static_batching;
    if (fill && s->n_running) return;
    while (fill || s->left > 0) {
        const int32_t i = admit_head(s);
        if (i == NONE) break;
        if (s->left > 0) place_prefill(s, p, i, now_ns);
    }
}

/* Chunking off: a step computes prompts or decodes, prompts first. */
static void place_whole_prompts_or_decodes(sched *s, picked *p, int64_t now_ns) {
    place_prefills(s, p, now_ns);
    admit_and_place(s, p, now_ns);
    if (p->b.n_seqs == 0) place_decodes(s, p, now_ns);
}

static void place_mixed(sched *s, picked *p, int64_t now_ns) {
    const bool preempted = place_decodes(s, p, now_ns);
    place_prefills(s, p, now_ns);
    if (!preempted) admit_and_place(s, p, now_ns);
}

bool sched_pick(sched *s, int64_t now_ns, batch *out) {
    picked *p = &s->picked[s->step & 1];
    const bool ahead = s->picked[~s->step & 1].out;
    CHECK(!p->out);
    p->b = (batch){.step = s->step,
                   .token = p->token,
                   .position = p->position,
                   .seq_start = p->seq_start,
                   .kv_len = p->kv_len,
                   .page_start = p->page_start,
                   .page = p->page_out,
                   .id = p->id,
                   .sample = p->sample};
    p->seq_start[0] = p->page_start[0] = 0;
    s->left = s->policy.token_budget;
    if (s->policy.chunked_prefill) {
        place_mixed(s, p, now_ns);
    } else {
        place_whole_prompts_or_decodes(s, p, now_ns);
    }
    if (p->b.n_seqs == 0) {
        CHECK(ahead || s->n_running == 0);
        CHECK(ahead || s->waiting.n == 0);
        return false;
    }
#if defined(__SANITIZE_ADDRESS__) || !defined(__OPTIMIZE__)
    CHECK(batch_problem(&p->b, s->limits.n_pages) == NULL);
#endif
    p->out = true;
    s->step++;
    *out = p->b;
    return true;
}

static void compact_running(sched *s) {
    int32_t n = 0;
    for (int32_t k = 0; k < s->n_running; k++)
        if (s->slot[s->running[k]].state == SLOT_RUNNING) s->running[n++] = s->running[k];
    s->n_running = n;
}

/* Of a batch that is out. */
static const picked *picked_of(const sched *s, const batch *b) {
    const picked *p = &s->picked[b->step & 1];
    CHECK(p->out);
    CHECK(b->step == p->b.step);
    return p;
}

void sched_commit(sched *s, const batch *b, const int32_t *token, const bool *stop,
                  int64_t now_ns) {
    picked *p = &s->picked[b->step & 1], *other = &s->picked[~b->step & 1];
    CHECK(picked_of(s, b) == p);
    CHECK(!other->out || other->b.step > b->step);
    CHECK(b->n_samples == p->b.n_samples);
    p->out = false;
    for (int32_t k = 0; k < p->b.n_seqs && s->policy.prefix_cache; k++) {
        if (p->slot[k] == NONE) continue;
        slot *q = &s->slot[p->slot[k]];
        if (q->state == SLOT_RUNNING && p->kv_len[k] / KV_PAGE_TOKENS > q->kv.n_registered)
            kvpool_register(s->pool, &q->kv, q->token, p->kv_len[k], q->salt);
    }
    /* After a prefill the head may share pages that are known only now. */
    if (s->policy.prefix_cache && p->b.n_seqs > p->b.n_decodes) s->blocked = false;

    bool any_finished = false;
    for (int32_t k = 0; k < p->b.n_samples; k++) {
        const int32_t i = p->slot[p->sample[k].seq];
        if (i == NONE || p->sample[k].given) continue;
        slot *q = &s->slot[i];
        CHECK(token[k] >= 0);
        q->token[n_known(q)] = token[k];
        q->token_ns[q->n_output] = now_ns;
        if (q->n_output++ == 0) q->first_token_ns = now_ns;
        q->n_pending--;
        const bool stopped = stop && stop[k];
        if (!stopped && q->n_output < q->max_new) continue;
        retire(s, i, stopped ? FINISH_STOP : FINISH_LENGTH, now_ns);
        any_finished = true;
    }
    if (any_finished) compact_running(s);
}

/* --- Requests out ----------------------------------------------------------------------------- */

status sched_cancel(sched *s, int64_t id, int64_t now_ns) {
    const int32_t i = id_find(s, id);
    const slot_state state = i == NONE ? SLOT_FREE : s->slot[i].state;
    if (state != SLOT_WAITING && state != SLOT_RUNNING)
        return FAIL(ST_NOTFOUND, "request %lld is neither waiting nor running", (long long)id);
    retire(s, i, FINISH_CANCEL, now_ns);
    if (state == SLOT_RUNNING) compact_running(s);
    return ST_OK;
}

bool sched_take_finished(sched *s, request_log *log, const int32_t **token) {
    const int32_t i = s->finished.head;
    if (i == NONE) return false;
    slot *q = &s->slot[i];
    list_remove(s, &s->finished, i);
    id_remove(s, i);
    s->n_tokens -= (int64_t)q->n_prompt + q->max_new;
    q->state = SLOT_TAKEN;
    list_insert(s, &s->taken, s->taken.tail, i);
    *log = (request_log){.id = q->id,
                         .arrival_ns = q->arrival_ns,
                         .dispatch_ns = q->dispatch_ns,
                         .admit_ns = q->admit_ns,
                         .first_token_ns = q->first_token_ns,
                         .finish_ns = q->finish_ns,
                         .token_ns = q->token_ns,
                         .n_prompt = q->n_prompt,
                         .n_output = q->n_output,
                         .n_cached = q->n_cached,
                         .n_preempted = q->n_preempted,
                         .finish = q->finish};
    *token = q->token;
    return true;
}

const request *sched_request(const sched *s, const batch *b, int32_t seq) {
    const picked *p = picked_of(s, b);
    CHECK(seq >= 0 && seq < p->b.n_seqs);
    return p->slot[seq] == NONE ? NULL : &s->slot[p->slot[seq]].request;
}

int32_t sched_holds(const sched *s) {
    const int32_t queue = s->policy.max_queue, all = s->limits.n_requests;
    return queue && queue < all ? queue : all;
}

int32_t sched_waiting(const sched *s) { return s->waiting.n; }
int32_t sched_running(const sched *s) { return s->n_running; }
int32_t sched_alive(const sched *s) { return s->waiting.n + s->n_running + s->finished.n; }
int64_t sched_preemptions(const sched *s) { return s->preemptions; }
const kvpool *sched_pool(const sched *s) { return s->pool; }

void sched_flush_cache(sched *s) {
    kvpool_flush(s->pool);
    s->blocked = false;
}

/* --- Invariants ------------------------------------------------------------------------------- */

static const char *list_problem(const sched *s, const list *l, slot_state state, bool by_arrival) {
    int32_t n = 0, before = NONE;
    for (int32_t i = l->head; i != NONE; before = i, i = s->slot[i].next) {
        if (i < 0 || i >= s->n_fresh || ++n > l->n) return "a list is broken";
        const slot *q = &s->slot[i];
        if (q->prev != before) return "a list has a wrong back link";
        if (q->state != state) return "a request is in the list of another state";
        if (q->lane != NONE || q->kv.n_pages) return "a request that does not run holds pages";
        if (by_arrival && before != NONE && !earlier(&s->slot[before], q))
            return "the queue is not in order of arrival";
    }
    return n == l->n && before == l->tail ? NULL : "a list is miscounted";
}

static const char *running_problem(const sched *s) {
    if (s->n_running > s->max_running) return "more run than may";
    if (s->n_running + s->n_free_lanes != s->n_fresh_lanes) return "a lane was lost";
    for (int32_t k = 0; k < s->n_running; k++) {
        const slot *q = &s->slot[s->running[k]];
        if (q->state != SLOT_RUNNING) return "what does not run is in the running set";
        if (k && !earlier(&s->slot[s->running[k - 1]], q))
            return "the running set is not in order of arrival";
        if (q->lane < 0 || q->lane >= s->n_fresh_lanes ||
            q->kv.page != s->lane_page + (int64_t)q->lane * s->seq_pages)
            return "a lane is not its owner's";
        if (q->n_computed >= n_due(q)) return "a running request has nothing to compute";
        if (unscored(q) && q->n_scored < q->n_computed) return "a token of a prompt is not scored";
        if (q->n_output >= q->max_new || q->n_output + q->n_pending > q->max_new)
            return "a request runs beyond its end";
        if ((int64_t)q->kv.n_pages * KV_PAGE_TOKENS < q->n_computed) return "a page is missing";
        if (q->n_computed < n_due(q) - 1 && (int64_t)q->kv.n_pages * KV_PAGE_TOKENS < n_due(q))
            return "a prefill does not own all its pages";
    }
    return NULL;
}

/* Every reference is some running sequence's; shared pages are full and known to the cache. */
static const char *pages_problem(const sched *s) {
    memset(s->refs_seen, 0, (size_t)s->limits.n_pages * sizeof *s->refs_seen);
    for (int32_t k = 0; k < s->n_running; k++) {
        const slot *q = &s->slot[s->running[k]];
        for (int32_t p = 0; p < q->kv.n_pages; p++) {
            const int32_t page = q->kv.page[p];
            if (page < 0 || page >= s->limits.n_pages) return "a page number is out of range";
            s->refs_seen[page]++;
            if (p >= q->kv.n_registered && kvpool_refs(s->pool, page) > 1)
                return "a page that is not known to the cache has two owners";
        }
    }
    for (int32_t p = 0; p < s->limits.n_pages; p++)
        if (s->refs_seen[p] != kvpool_refs(s->pool, p)) return "a reference is nobody's";
    return NULL;
}

const char *sched_problem(const sched *s) {
    const char *problem = list_problem(s, &s->waiting, SLOT_WAITING, true);
    if (!problem) problem = list_problem(s, &s->finished, SLOT_FINISHED, false);
    if (!problem) problem = list_problem(s, &s->taken, SLOT_TAKEN, false);
    if (!problem) problem = running_problem(s);
    if (!problem) problem = pages_problem(s);
    if (!problem) problem = kvpool_problem(s->pool);
    if (problem) return problem;

    int64_t n_tokens = 0;
    int32_t n_alive = 0, n_found = 0;
    for (int32_t i = 0; i < s->n_fresh; i++) {
        const slot *q = &s->slot[i];
        if (q->state == SLOT_FREE || q->state == SLOT_TAKEN) continue;
        n_alive++;
        n_found += id_find(s, q->id) == i;
        n_tokens += (int64_t)q->n_prompt + q->max_new;
    }
    if (n_alive != sched_alive(s)) return "a request is in no list";
    if (n_found != n_alive) return "an id does not lead to its request";
    if (n_tokens != s->n_tokens || n_tokens > s->limits.n_tokens) return "tokens are miscounted";
    return NULL;
}
