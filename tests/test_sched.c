/* test_sched.c - the scheduler under random work, watched by a device that remembers what it
 * computed.
 *
 * The device keeps one number for each (page, slot): a hash of the salt and of all tokens up to
 * there, made from the number of the position before as it stands in the sequence's own pages. So
 * whatever a wrong share, a stale page or a lost recomputation does to the KV cache shows up as a
 * wrong number. What a sequence draws depends on those numbers, too.
 *
 * The scheduler is included, not linked, so that the test can see states and plant faults. */
#include "test.h"

#include "../engine/sched.c"

#include "rng.h"
#include "timeline.h"

enum { P = KV_PAGE_TOKENS, CTX = 512, REQUESTS = 40, PAGES = 32, VOCAB = 50, ROWS = 1024 };

/* Ways to spoil a batch or the scheduler, each of which some check must notice. */
typedef enum {
    SOUND,
    PAGE_WRONG,      /* a page number of a visible page is another's */
    KV_SHORT,        /* kv_len is one too small */
    TOKEN_WRONG,     /* one token fed differs */
    POSITION_WRONG,  /* one position is off by one */
    DECODE_LOST,     /* the last decode is left out */
    SAMPLE_LOST,     /* the last sample is left out */
    DRAW_WRONG,      /* a draw index is off by one */
    HISTORY_WRONG,   /* a history of one token less */
    OVER_BUDGET,     /* the budget was one smaller */
    CELL_WRONG,      /* the device flips one remembered number */
    PAGE_LEAKED,     /* somebody holds a page who is no sequence */
    ORDER_WRONG,     /* two running sequences change places */
    COMPUTED_WRONG,  /* a sequence believes one page more computed than is */
    NOT_RECOMPUTED,  /* what was preempted believes its KV is still there */
    OVERTAKEN,       /* the queue's head moves to its tail */
    TOKENS_MISCOUNT, /* storage accounting is off by one */
    OUTPUT_WRONG,    /* a result differs in one token */
    FAULTS,
    FED_WRONG /* ahead: what another sample drew is fed */
} fault_kind;

typedef struct {
    bool alive, cancelled;
    int64_t id, arrival_ns;
    uint64_t salt;
    int32_t n_prompt, max_new, n_stop; /* stops when so many were drawn; 0 = never */
    bool scores;                       /* its prompt */
    int32_t n_scored;                  /* rows of it whose next token has been given */
    int32_t n_known;                   /* prompt and what was drawn */
    int32_t token[CTX];
    uint64_t truth[CTX]; /* hash of salt and token[0..i] */
    int32_t n_preempted;
} person;

typedef struct {
    batch b;
    int32_t drawn[REQUESTS];
    bool stop[REQUESTS];
} flight;

typedef struct {
    arena mem;
    sched *s;
    sched_policy policy;
    sched_limits limits;
    rng r;
    int64_t now, next_id;
    person person[REQUESTS];
    int32_t n_alive;
    uint64_t cell[PAGES * P];
    int64_t written[PAGES * P]; /* step that wrote it, + 1 */
    int64_t n_scored;           /* rows */
    int64_t n_steps, n_finished, n_shared_tokens, n_stopped, n_cancelled;
    uint64_t run_hash; /* of all batches */
    /* Ahead: batches run as they are picked, and their tokens are committed later. */
    bool ahead;
    int32_t n_out;
    flight out[2];              /* oldest first */
    int64_t n_ahead, n_surplus; /* batches picked before others were committed; rows for nobody */
    fault_kind fault;
    bool planted;

    /* Before the pick. */
    int32_t decode[REQUESTS], n_decode; /* slots */
    int32_t was_running[REQUESTS], n_was_running;
    bool was_admitted[REQUESTS];

    /* The batch as the device sees it: a copy, which a fault may spoil. */
    batch b;
    int32_t token[ROWS], position[ROWS], seq_start[REQUESTS + 1], kv_len[REQUESTS],
        page_start[REQUESTS + 1], page[REQUESTS * (CTX / P)];
    int64_t id[REQUESTS];
    sample_row sample[REQUESTS];
} world;

static uint64_t chain(uint64_t before, int32_t token) { return hash_u64((uint64_t)token, before); }
static uint64_t chain_start(uint64_t salt) { return hash_u64(salt, 77); }

static int32_t drawn_after(uint64_t cell) { return (int32_t)(cell % VOCAB); }

static void learn(person *q, int32_t token) {
    const int32_t i = q->n_known++;
    q->token[i] = token;
    q->truth[i] = chain(i ? q->truth[i - 1] : chain_start(q->salt), token);
}

static person *find_person(world *w, int64_t id) {
    for (int32_t i = 0; i < REQUESTS; i++)
        if (w->person[i].alive && w->person[i].id == id) return &w->person[i];
    return NULL;
}

static void world_open(world *w, const sched_policy *p, int32_t n_pages, uint64_t seed) {
    memset(w, 0, sizeof *w);
    rng_seed(&w->r, seed, 0);
    w->policy = *p;
    w->limits = (sched_limits){
        .n_pages = n_pages,
        .ctx_max = (int32_t)i64_min(CTX, n_pages * P),
        .n_requests = REQUESTS,
        .n_tokens = (int64_t)REQUESTS * CTX / 2,
    };
    assert_ok(arena_open(&w->mem, sched_bytes(p, &w->limits)));
    assert_ok(sched_open(&w->s, &w->mem, p, &w->limits));
    arena_seal(&w->mem);
}

static void world_close(world *w) { arena_close(&w->mem); }

/* --- Input ------------------------------------------------------------------------------------ */

/* A new request; prompts share beginnings: one of three texts, then noise. */
static const char *add_person(world *w) {
    person *q = w->person;
    while (q->alive) q++;
    *q = (person){.alive = true,
                  .id = w->next_id++,
                  .salt = rng_below(&w->r, 4) == 0,
                  .scores = rng_below(&w->r, 5) == 0,
                  /* Some arrive late at the scheduler, many at the same instant. */
                  .arrival_ns = w->now - (int64_t)rng_below(&w->r, 3) * 50};
    const int32_t longest = w->limits.ctx_max;
    q->n_prompt = (int32_t)rng_range(&w->r, 1, rng_below(&w->r, 4) ? 100 : longest);
    q->max_new = (int32_t)rng_range(&w->r, 1, rng_below(&w->r, 4) ? 60 : longest);
    if (rng_below(&w->r, 3) == 0) q->n_stop = (int32_t)rng_range(&w->r, 1, q->max_new);
    const int32_t variant = (int32_t)rng_below(&w->r, 3);
    const int32_t same = (int32_t)rng_range(&w->r, 0, 3 * P + 5);
    int32_t prompt[CTX];
    for (int32_t i = 0; i < q->n_prompt; i++) {
        prompt[i] = i < same ? (i * 3 + variant) % VOCAB : (int32_t)rng_below(&w->r, VOCAB);
        learn(q, prompt[i]);
    }
    const request r = {.id = q->id,
                       .arrival_ns = q->arrival_ns,
                       .prompt = prompt,
                       .n_prompt = q->n_prompt,
                       .max_new = q->max_new,
                       .salt = q->salt,
                       .score_prompt = q->scores,
                       .sampling = {.seed = (uint64_t)q->id}};
    const int32_t before = sched_alive(w->s);
    const status st = sched_add(w->s, &r, w->now);
    if (st != ST_OK) q->alive = false;
    w->n_alive += st == ST_OK;
    const bool never = q->n_prompt + q->max_new > longest ||
                       (!w->policy.chunked_prefill && q->n_prompt > w->policy.token_budget);
    if ((st == ST_RANGE) != never) return "refused what fits, or took what never will";
    if (st != ST_OK && st != ST_RANGE && st != ST_OOM) return "refused without a reason";
    if (st != ST_OK && sched_alive(w->s) != before) return "a refusal changed something";
    return NULL;
}

static const char *cancel_person(world *w) {
    const int64_t id = rng_range(&w->r, i64_max(0, w->next_id - REQUESTS), w->next_id);
    person *q = find_person(w, id);
    const status st = sched_cancel(w->s, id, w->now);
    if (st == ST_OK && q) {
        q->cancelled = true;
        w->n_cancelled++;
    }
    return (st == ST_OK) == (q != NULL) ? NULL : "cancelled what is not alive, or the reverse";
}

/* --- The device, and what is checked of each batch -------------------------------------------- */

static void copy_batch(world *w, const batch *b) {
    const size_t n = (size_t)b->n_seqs;
    w->b = *b;
    memcpy(w->token, b->token, (size_t)b->n_tokens * sizeof *b->token);
    memcpy(w->position, b->position, (size_t)b->n_tokens * sizeof *b->position);
    memcpy(w->seq_start, b->seq_start, (n + 1) * sizeof *b->seq_start);
    memcpy(w->kv_len, b->kv_len, n * sizeof *b->kv_len);
    memcpy(w->page_start, b->page_start, (n + 1) * sizeof *b->page_start);
    memcpy(w->page, b->page, (size_t)b->page_start[n] * sizeof *b->page);
    memcpy(w->id, b->id, n * sizeof *b->id);
    memcpy(w->sample, b->sample, (size_t)b->n_samples * sizeof *b->sample);
    w->b.token = w->token;
    w->b.position = w->position;
    w->b.seq_start = w->seq_start;
    w->b.kv_len = w->kv_len;
    w->b.page_start = w->page_start;
    w->b.page = w->page;
    w->b.id = w->id;
    w->b.sample = w->sample;
}

/* Put what the batch before drew in the place of its numbers. */
static const char *resolve(world *w) {
    const flight *before = &w->out[0];
    for (int32_t t = 0; t < w->b.n_tokens; t++) {
        if (w->token[t] >= 0) continue;
        int32_t i = -1 - w->token[t];
        if (w->n_out == 0 || i >= before->b.n_samples) return "a token is fed that nobody draws";
        if (w->fault == FED_WRONG && before->b.n_samples > 1) {
            i = (i + 1) % before->b.n_samples;
            w->planted = true;
        }
        w->token[t] = before->drawn[i];
    }
    return NULL;
}

static uint64_t *cell_of(world *w, int32_t seq, int32_t position) {
    return &w->cell[w->page[w->page_start[seq] + position / P] * P + position % P];
}

/* What is visible before is true; then compute the new tokens, each from the cell before it. */
static const char *run_seq(world *w, int32_t k) {
    const person *q = find_person(w, w->id[k]);
    if (!q) return "a sequence that is not alive";
    for (int32_t j = 0; j < k; j++)
        if (w->id[j] == w->id[k]) return "a sequence is in the batch twice";
    if (w->kv_len[k] > q->n_known) return "more tokens than are known";
    const int32_t start = w->position[w->seq_start[k]];
    for (int32_t i = 0; i < start; i++)
        if (*cell_of(w, k, i) != q->truth[i]) return "the KV cache holds something else";
    for (int32_t t = w->seq_start[k]; t < w->seq_start[k + 1]; t++) {
        const int32_t at = w->position[t];
        if (w->token[t] != q->token[at]) return "another token is fed";
        uint64_t *cell = cell_of(w, k, at);
        int64_t *written = &w->written[cell - w->cell];
        if (*written == w->b.step + 1) return "two sequences write one place";
        *written = w->b.step + 1;
        *cell = chain(at ? *cell_of(w, k, at - 1) : chain_start(q->salt), w->token[t]);
    }
    return NULL;
}

/* Every row of a prompt but the last gives the token after it, once, in order. */
static const char *check_given(world *w, person *q, int32_t k, int32_t *n) {
    for (int32_t t = w->seq_start[k]; t < w->seq_start[k + 1]; t++) {
        const int32_t at = w->position[t];
        if (!q->scores || at >= q->n_prompt - 1 || at < q->n_scored) continue;
        if (at > q->n_scored) return "a token of a prompt is not scored";
        if (*n == w->b.n_samples) return "a row to be scored is no sample";
        const sample_row *r = &w->sample[(*n)++];
        if (r->seq != k || r->row != t || !r->given || r->draw != 0) return "another is scored";
        if (*r->given != q->token[at + 1]) return "another token is given";
        if (!r->params || r->params->seed != (uint64_t)q->id) return "parameters of another";
        q->n_scored++;
        w->n_scored++;
    }
    return NULL;
}

static const char *check_samples(world *w) {
    int32_t n = 0;
    for (int32_t k = 0; k < w->b.n_seqs; k++) {
        person *q = find_person(w, w->id[k]);
        const char *problem = check_given(w, q, k, &n);
        if (problem) return problem;
        if (w->kv_len[k] != q->n_known) continue;
        if (n == w->b.n_samples) return "a finished prompt is not sampled";
        const sample_row *r = &w->sample[n++];
        if (r->seq != k || r->row != w->seq_start[k + 1] - 1) return "another row is sampled";
        if (r->given) return "what is to be drawn is given";
        if (r->draw != (uint64_t)(q->n_known - q->n_prompt)) return "the draw index is wrong";
        if (!r->params || r->params->seed != (uint64_t)q->id) return "parameters of another";
        if (r->n_history != q->n_known) return "the history is not all of it";
        const bool unknown = r->history[q->n_known - 1] < 0;
        if (unknown && w->n_out == 0) return "the history is not known";
        if (memcmp(r->history, q->token, (size_t)(q->n_known - unknown) * sizeof *r->history))
            return "the history is another";
    }
    return n == w->b.n_samples ? NULL : "something is sampled before its end";
}

static bool in_batch(const world *w, int64_t id) {
    for (int32_t k = 0; k < w->b.n_seqs; k++)
        if (w->id[k] == id) return true;
    return false;
}

static const char *check_policy(const world *w) {
    const sched *s = w->s;
    const bool chunked = w->policy.chunked_prefill;
    const int32_t budget = w->policy.token_budget - (w->fault == OVER_BUDGET);
    if (w->b.n_tokens > budget) return "the token budget is exceeded";
    if (s->n_running > w->policy.max_seqs) return "too many run";
    if (w->b.n_samples > s->max_running) return "too many rows are sampled";
    if (!chunked && w->b.n_decodes != 0 && w->b.n_decodes != w->b.n_seqs)
        return "a step mixes prompts and decodes";

    /* Decodes: all of them, unless preempted; with chunking off, unless it is a step of prompts. */
    if (chunked || w->b.n_decodes) {
        for (int32_t i = 0; i < w->n_decode; i++) {
            const slot *q = &s->slot[w->decode[i]];
            if (q->state == SLOT_RUNNING && !in_batch(w, q->id)) return "a decode is starved";
        }
    }
    if (w->n_decode && w->n_was_running && s->slot[w->was_running[0]].state != SLOT_RUNNING)
        return "the earliest was preempted";

    /* Who was preempted came later than everyone who stayed; and then nobody is admitted. */
    const slot *preempted = NULL;
    for (int32_t i = 0; i < w->n_was_running; i++) {
        const slot *q = &s->slot[w->was_running[i]];
        if (q->state == SLOT_WAITING && !preempted) preempted = q;
        if (q->state == SLOT_RUNNING && preempted) return "an earlier arrival was preempted";
    }
    if (preempted && s->n_running > w->n_was_running) return "preempted and admitted at once";

    /* First come, first served: nobody who waits came before one who was admitted now. */
    const slot *head = s->waiting.head == NONE ? NULL : &s->slot[s->waiting.head];
    int32_t cut = 0;
    for (int32_t k = 0; k < s->n_running; k++) {
        const int32_t i = s->running[k];
        const slot *q = &s->slot[i];
        bool is_new = true;
        for (int32_t j = 0; j < w->n_was_running; j++) is_new = is_new && w->was_running[j] != i;
        if (is_new && head && earlier(head, q)) return "somebody was overtaken";
        if (is_new && w->policy.static_batching && w->n_was_running)
            return "a static batch was topped up";
    }
    for (int32_t k = w->b.n_decodes; k < w->b.n_seqs; k++) {
        const slot *q = &s->slot[s->picked[w->b.step & 1].slot[k]];
        const int32_t n = w->seq_start[k + 1] - w->seq_start[k];
        if (cut) return "somebody comes after a prompt that was cut";
        cut = w->kv_len[k] < n_known(q) && w->b.n_samples < s->max_running; /* by the budget */
        if (cut && !chunked && (n != w->policy.token_budget || q->n_output == 0))
            return "a prompt was cut";
    }
    return NULL;
}

static const char *run_batch(world *w, int32_t *drawn, bool *stop) {
    const char *problem = batch_problem(&w->b, w->limits.n_pages);
    for (int32_t k = 0; k < w->b.n_seqs && !problem; k++) problem = run_seq(w, k);
    if (!problem) problem = check_samples(w);
    if (!problem) problem = check_policy(w);
    if (problem) return problem;
    for (int32_t i = 0; i < w->b.n_samples; i++) {
        const int32_t k = w->sample[i].seq;
        person *q = find_person(w, w->id[k]);
        if (w->sample[i].given) {
            drawn[i] = *w->sample[i].given;
            continue;
        }
        drawn[i] = drawn_after(*cell_of(w, k, w->kv_len[k] - 1));
        if (drawn[i] != drawn_after(q->truth[q->n_known - 1])) return "another token is drawn";
        if (q->n_stop && q->n_known - q->n_prompt == q->n_stop) {
            if (w->n_out == 0) return "a request goes on beyond its stop";
            w->n_surplus++;
            continue;
        }
        learn(q, drawn[i]);
        stop[i] = q->n_stop && q->n_known - q->n_prompt == q->n_stop;
    }
    return NULL;
}

/* --- Results ---------------------------------------------------------------------------------- */

static const char *check_log(world *w, const person *q, const request_log *log) {
    int32_t n = q->n_known - q->n_prompt;
    /* What was drawn and not committed when it was cancelled. */
    if (q->cancelled && w->ahead && log->n_output >= n - 2 && log->n_output <= n) n = log->n_output;
    const finish_reason want = q->cancelled ? FINISH_CANCEL
                               : q->n_stop  ? FINISH_STOP
                                            : FINISH_LENGTH;
    if (log->finish != want) return "the reason is wrong";
    if (!q->cancelled && n != (q->n_stop ? q->n_stop : q->max_new)) return "the output has no end";
    if (log->n_prompt != q->n_prompt || log->n_output != n) return "the lengths are wrong";
    if (log->arrival_ns != q->arrival_ns || log->dispatch_ns < log->arrival_ns)
        return "arrival and dispatch";
    if (log->n_cached % P || log->n_cached >= CTX) return "n_cached";
    w->n_shared_tokens += log->n_cached;

    int64_t before = log->dispatch_ns;
    if (log->admit_ns >= 0 && log->admit_ns < before) return "admitted before dispatch";
    if ((n > 0) != (log->first_token_ns >= 0)) return "the first token";
    if (n && (log->admit_ns < 0 || log->first_token_ns != log->token_ns[0])) return "first token";
    for (int32_t i = 0; i < n; before = log->token_ns[i++])
        if (log->token_ns[i] <= before) return "instants do not ascend";
    if (log->finish_ns < before) return "finished before the last token";
    return !q->cancelled && log->finish_ns != before ? "finish is not the last token" : NULL;
}

static const char *take_results(world *w) {
    request_log log;
    const int32_t *token;
    while (sched_take_finished(w->s, &log, &token)) {
        person *q = find_person(w, log.id);
        if (!q) return "a stranger finished";
        if (w->fault == OUTPUT_WRONG) q->token[q->n_known - 1] ^= 1;
        const int32_t n = w->ahead && q->cancelled ? log.n_prompt + log.n_output : q->n_known;
        if (memcmp(token, q->token, (size_t)n * sizeof *token))
            return "the tokens of a result differ";
        const char *problem = check_log(w, q, &log);
        if (problem) return problem;
        w->n_finished++;
        w->n_stopped += log.finish == FINISH_STOP;
        q->alive = false;
        w->n_alive--;
    }
    return NULL;
}

/* --- Faults ----------------------------------------------------------------------------------- */

static void spoil_batch(world *w) {
    batch *b = &w->b;
    const int32_t last = b->n_seqs - 1;
    bool done = true;
    switch (w->fault) {
    case PAGE_WRONG:
        done = w->kv_len[last] > 1;
        w->page[w->page_start[last]] = (w->page[w->page_start[last]] + 1) % w->limits.n_pages;
        break;
    case KV_SHORT: w->kv_len[0]--; break;
    case TOKEN_WRONG: w->token[b->n_tokens - 1] ^= 1; break;
    case POSITION_WRONG: w->position[0]++; break;
    case DECODE_LOST:
        done = b->n_decodes == b->n_seqs && b->n_seqs > 1;
        if (!done) break;
        b->n_seqs--, b->n_tokens--, b->n_decodes--, b->n_samples--;
        break;
    case SAMPLE_LOST:
        done = b->n_samples > 0;
        if (done) b->n_samples--;
        break;
    case DRAW_WRONG:
        done = b->n_samples > 0;
        w->sample[0].draw++;
        break;
    case HISTORY_WRONG:
        done = b->n_samples > 0;
        w->sample[0].n_history--;
        break;
    case OVER_BUDGET: done = b->n_tokens == w->policy.token_budget; break;
    case CELL_WRONG:
        done = w->position[0] > 0;
        *cell_of(w, 0, w->position[0] - (done ? 1 : 0)) ^= 1;
        break;
    default: return;
    }
    w->planted = w->planted || done;
}

static void spoil_sched(world *w) {
    sched *s = w->s;
    static int32_t stolen;
    switch (w->fault) {
    case PAGE_LEAKED: {
        kvseq thief = {.page = &stolen, .max_pages = 1};
        w->planted = kvpool_reserve(s->pool, &thief, 1);
        break;
    }
    case ORDER_WRONG:
        if (s->n_running < 2) return;
        w->planted = true;
        const int32_t first = s->running[0];
        s->running[0] = s->running[1];
        s->running[1] = first;
        break;
    case COMPUTED_WRONG:
        for (int32_t k = 0; k < s->n_running && !w->planted; k++) {
            slot *q = &s->slot[s->running[k]];
            w->planted = n_known(q) - q->n_computed > P;
            if (w->planted) q->n_computed += P;
        }
        break;
    case NOT_RECOMPUTED:
        for (int32_t k = 0; k < s->n_running && !w->planted; k++) {
            slot *q = &s->slot[s->running[k]];
            if (q->n_preempted == 0 || n_known(q) - q->n_computed < 2) continue;
            w->planted = true;
            q->n_computed = n_known(q) - 1;
        }
        break;
    case OVERTAKEN:
        if (s->waiting.n < 3) return;
        w->planted = true;
        const int32_t head = s->waiting.head;
        list_remove(s, &s->waiting, head);
        list_insert(s, &s->waiting, s->waiting.tail, head);
        break;
    case TOKENS_MISCOUNT:
        w->planted = s->n_tokens > 0;
        s->n_tokens -= w->planted;
        break;
    default: break;
    }
}

/* --- One step of everything ------------------------------------------------------------------- */

static void remember(world *w) {
    const sched *s = w->s;
    w->n_decode = 0;
    w->n_was_running = s->n_running;
    for (int32_t k = 0; k < s->n_running; k++) {
        const slot *q = &s->slot[s->running[k]];
        w->was_running[k] = s->running[k];
        if (n_due(q) - q->n_computed == 1 && q->n_output + q->n_pending < q->max_new)
            w->decode[w->n_decode++] = s->running[k];
    }
}

static const char *commit_oldest(world *w) {
    w->now += 5;
    const flight f = w->out[0];
    w->out[0] = w->out[1];
    w->n_out--;
    sched_commit(w->s, &f.b, f.drawn, f.stop, w->now);
    const char *problem = sched_problem(w->s);
    return problem ? problem : take_results(w);
}

/* As world_step, but a second batch may be picked before the first is committed. */
static const char *step_ahead(world *w) {
    w->now += 10;
    const char *problem = sched_problem(w->s);
    if (problem) return problem;
    remember(w);
    flight *f = &w->out[w->n_out];
    const bool picked_one = sched_pick(w->s, w->now, &f->b);
    if (!picked_one && w->n_out == 0) {
        if (sched_waiting(w->s) || sched_running(w->s)) return "work is left and nothing runs";
        return take_results(w);
    }
    if (picked_one) {
        memset(f->stop, 0, sizeof f->stop);
        copy_batch(w, &f->b);
        w->run_hash = hash_u64(batch_hash(&f->b), w->run_hash);
        w->n_steps++;
        w->n_ahead += w->n_out;
        problem = resolve(w);
        if (!problem) problem = run_batch(w, f->drawn, f->stop);
        if (!problem) problem = sched_problem(w->s);
        if (problem) return problem;
        w->n_out++;
        if (w->n_out == 1 && rng_below(&w->r, 8)) return take_results(w); /* go ahead of it */
    }
    return commit_oldest(w);
}

static const char *world_step(world *w) {
    if (w->ahead) return step_ahead(w);
    w->now += 10;
    const char *problem = sched_problem(w->s);
    if (problem) return problem;
    remember(w);
    batch b;
    if (!sched_pick(w->s, w->now, &b)) {
        if (sched_waiting(w->s) || sched_running(w->s)) return "work is left and nothing runs";
        return take_results(w);
    }
    copy_batch(w, &b);
    if (w->fault) spoil_batch(w);
    w->run_hash = hash_u64(batch_hash(&b), w->run_hash);
    w->n_steps++;
    int32_t drawn[REQUESTS];
    bool stop[REQUESTS];
    problem = run_batch(w, drawn, stop);
    if (!problem) problem = sched_problem(w->s);
    if (problem) return problem;
    w->now += 5;
    sched_commit(w->s, &b, drawn, stop, w->now);
    problem = sched_problem(w->s);
    if (!problem && w->fault && !w->planted) spoil_sched(w);
    return problem ? problem : take_results(w);
}

static const char *random_step(world *w) {
    const char *problem = NULL;
    const bool busy = rng_below(&w->r, 4) == 0; /* bursts */
    for (int32_t i = 0; i < (busy ? 6 : 1) && !problem && w->n_alive < REQUESTS - 1; i++)
        if (rng_below(&w->r, 100) < 6 || busy) problem = add_person(w);
    if (!problem && rng_below(&w->r, 60) == 0) problem = cancel_person(w);
    if (rng_below(&w->r, 500) == 0) sched_flush_cache(w->s);
    return problem ? problem : world_step(w);
}

/* No new requests: every one alive finishes, and every page comes back. */
static const char *drain(world *w) {
    for (int32_t i = 0; w->n_alive; i++) {
        const char *problem = world_step(w);
        if (problem) return problem;
        if (i > REQUESTS * CTX * 8) return "it does not end";
    }
    while (w->n_out) {
        const char *problem = commit_oldest(w);
        if (problem) return problem;
    }
    if (kvpool_held(sched_pool(w->s))) return "pages are held by nobody";
    if (sched_alive(w->s) || w->s->n_tokens) return "something is left";
    return world_step(w); /* frees what was taken last */
}

static sched_policy random_policy(rng *r) {
    static const int32_t budget[] = {1, 7, 40, 64, 65, 100, 200, 512};
    return (sched_policy){
        .token_budget = budget[rng_below(r, (uint64_t)COUNT_OF(budget))],
        .max_seqs = (int32_t)rng_range(r, 1, 20),
        .max_queue = rng_below(r, 3) ? 0 : (int32_t)rng_range(r, 1, 20),
        .chunked_prefill = rng_below(r, 4) != 0,
        .prefix_cache = rng_below(r, 3) != 0,
        .static_batching = rng_below(r, 5) == 0,
    };
}

static void open_random(world *w, uint64_t seed) {
    rng r;
    rng_seed(&r, seed, 1);
    const sched_policy p = random_policy(&r);
    world_open(w, &p, (int32_t)rng_range(&r, 2, PAGES / 2), seed);
}

static world w; /* large */

static void keeps_every_promise_under_random_work(void **state) {
    (void)state;
    const uint64_t seed = 4711;
    print_message("seed %llu\n", (unsigned long long)seed);
    int64_t steps = 0, finished = 0, shared = 0, preempted = 0, evicted = 0, stopped = 0,
            cancelled = 0, scored = 0;
    for (uint64_t episode = 0; steps < 400000; episode++) {
        open_random(&w, seed + episode);
        const char *problem = NULL;
        for (int32_t i = 0; i < 1500 && !problem; i++) problem = random_step(&w);
        if (!problem) problem = drain(&w);
        if (problem)
            fail_msg("seed %llu, step %lld: %s", (unsigned long long)(seed + episode),
                     (long long)w.n_steps, problem);
        steps += w.n_steps;
        finished += w.n_finished;
        shared += w.n_shared_tokens;
        stopped += w.n_stopped;
        cancelled += w.n_cancelled;
        scored += w.n_scored;
        preempted += sched_preemptions(w.s);
        evicted += kvpool_evictions(sched_pool(w.s));
        world_close(&w);
    }
    print_message("%lld steps, %lld requests (%lld stopped, %lld cancelled), %lld preemptions, "
                  "%lld tokens shared, %lld pages evicted\n",
                  (long long)steps, (long long)finished, (long long)stopped, (long long)cancelled,
                  (long long)preempted, (long long)shared, (long long)evicted);
    assert_true(preempted > 1000);
    assert_true(shared > 10000);
    assert_true(evicted > 1000);
    assert_true(stopped > 1000);
    assert_true(cancelled > 1000);
    assert_true(scored > 10000);
}

/* The same with batches picked ahead of commits; its twin is at the end. */
static void keeps_them_when_it_picks_ahead(void **state) {
    (void)state;
    int64_t steps = 0, ahead = 0, surplus = 0, finished = 0, cancelled = 0, preempted = 0;
    for (uint64_t episode = 0; steps < 200000; episode++) {
        open_random(&w, 99 + episode);
        w.ahead = true;
        const char *problem = NULL;
        for (int32_t i = 0; i < 1500 && !problem; i++) problem = random_step(&w);
        if (!problem) problem = drain(&w);
        if (problem)
            fail_msg("seed %llu, step %lld: %s", (unsigned long long)(99 + episode),
                     (long long)w.n_steps, problem);
        steps += w.n_steps;
        ahead += w.n_ahead;
        surplus += w.n_surplus;
        finished += w.n_finished;
        cancelled += w.n_cancelled;
        preempted += sched_preemptions(w.s);
        world_close(&w);
    }
    print_message("%lld steps, %lld ahead, %lld surplus rows, %lld requests (%lld cancelled), %lld "
                  "preemptions\n",
                  (long long)steps, (long long)ahead, (long long)surplus, (long long)finished,
                  (long long)cancelled, (long long)preempted);
    assert_true(ahead > steps / 2);
    assert_true(surplus > 1000);
    assert_true(cancelled > 500);
    assert_true(preempted > 500);

    int32_t planted = 0;
    for (uint64_t seed = 0; seed < 20; seed++) {
        const sched_policy p = {.token_budget = 65, .max_seqs = 8, .chunked_prefill = true};
        world_open(&w, &p, 10, seed);
        w.ahead = true;
        w.fault = FED_WRONG;
        const char *problem = NULL;
        for (int32_t i = 0; i < 400 && !problem; i++) problem = random_step(&w);
        planted += w.planted;
        assert_true(w.planted == (problem != NULL));
        world_close(&w);
    }
    assert_true(planted > 5);
}

static void the_same_work_gives_the_same_batches(void **state) {
    (void)state;
    for (uint64_t seed = 0; seed < 10; seed++) {
        uint64_t hash[2];
        for (int32_t i = 0; i < 2; i++) {
            open_random(&w, seed);
            for (int32_t k = 0; k < 500; k++) assert_null(random_step(&w));
            assert_null(drain(&w));
            hash[i] = w.run_hash;
            world_close(&w);
        }
        assert_true(hash[0] == hash[1]);
    }
}

/* Twin of the random test: the checks notice each of the faults soon after it was planted. */
static void notices_every_planted_fault(void **state) {
    (void)state;
    for (int32_t f = SOUND + 1; f < FAULTS; f++) {
        int32_t planted = 0;
        for (uint64_t seed = 0; seed < 30; seed++) {
            const sched_policy p = {.token_budget = 65,
                                    .max_seqs = 8,
                                    .chunked_prefill = true,
                                    .prefix_cache = seed % 2 == 0};
            world_open(&w, &p, 10, seed);
            const char *problem = NULL;
            for (int32_t i = 0; i < 300 && !problem; i++) problem = random_step(&w);
            if (problem) fail_msg("no fault and yet: %s", problem);
            w.fault = (fault_kind)f;
            for (int32_t i = 0; i < 400 && !problem; i++) problem = random_step(&w);
            if (f == OUTPUT_WRONG) w.planted = w.n_finished > 0;
            planted += w.planted;
            if (w.planted && !problem) fail_msg("fault %d of seed %d is not noticed", f, (int)seed);
            if (!w.planted && problem) fail_msg("fault %d: noticed before it was made", f);
            world_close(&w);
        }
        if (planted < 5) fail_msg("fault %d was planted %d times only", f, planted);
    }
}

/* --- Small cases, exhaustively ---------------------------------------------------------------- */

/* Up to three sequences of 0..P+1 prompt tokens (0: none) and two new ones, for each kind of
 * policy: everything is computed once, in the steps that the policy says. */
static void small_batches_exhaustively(void **state) {
    (void)state;
    static const int32_t third[] = {0, P + 1}; /* the first two take all lengths */
    const int32_t n = P + 2;
    for (int32_t kind = 0; kind < 8; kind++) {
        const sched_policy p = {.token_budget = 2 * P,
                                .max_seqs = 3,
                                .chunked_prefill = kind & 1,
                                .prefix_cache = (kind & 2) != 0,
                                .static_batching = (kind & 4) != 0};
        world_open(&w, &p, 6, 1);
        for (int32_t code = 0; code < n * n * COUNT_OF(third); code++) {
            const int32_t want[3] = {code % n, code / n % n, third[code / n / n]};
            for (int32_t i = 0; i < 3; i++) {
                if (!want[i]) continue;
                person *q = &w.person[i];
                int32_t prompt[P + 1];
                *q = (person){.alive = true,
                              .id = w.next_id++,
                              .arrival_ns = w.now,
                              .n_prompt = want[i],
                              .max_new = 2};
                for (int32_t t = 0; t < want[i]; t++) {
                    prompt[t] = (code + i * t) % VOCAB;
                    learn(q, prompt[t]);
                }
                const request r = {.id = q->id,
                                   .arrival_ns = w.now,
                                   .prompt = prompt,
                                   .n_prompt = want[i],
                                   .max_new = 2,
                                   .sampling = {.seed = (uint64_t)q->id}};
                assert_ok(sched_add(w.s, &r, w.now));
                w.n_alive++;
            }
            const char *problem = drain(&w);
            if (problem) fail_msg("%d, %d, %d: %s", want[0], want[1], want[2], problem);
        }
        world_close(&w);
    }
}

/* --- Named behaviour -------------------------------------------------------------------------- */

static status add(world *v, int64_t id, int32_t n_prompt, int32_t max_new, int64_t arrival_ns) {
    static int32_t prompt[4 * CTX];
    for (int32_t i = 0; i < n_prompt; i++) prompt[i] = (int32_t)(id + i) % VOCAB;
    const request r = {.id = id,
                       .arrival_ns = arrival_ns,
                       .prompt = prompt,
                       .n_prompt = n_prompt,
                       .max_new = max_new,
                       .sampling = SAMPLING_GREEDY};
    return sched_add(v->s, &r, arrival_ns);
}

static void commit(world *v, const batch *b, int64_t now_ns) {
    static const int32_t zeros[REQUESTS];
    sched_commit(v->s, b, zeros, NULL, now_ns);
}

static void refuses_what_can_never_fit(void **state) {
    (void)state;
    sched_policy p = {.token_budget = 100, .max_seqs = 4, .chunked_prefill = true};
    world_open(&w, &p, 4, 0); /* 256 tokens of KV, and as much context */
    assert_status(add(&w, 1, 0, 1, 0), ST_RANGE);
    assert_status(add(&w, 1, 1, 0, 0), ST_RANGE);
    assert_status(add(&w, 1, 200, 57, 0), ST_RANGE);
    assert_non_null(strstr(fail_message(), "context of 256"));
    assert_ok(add(&w, 1, 200, 56, 0));
    assert_status(add(&w, 1, 5, 5, 0), ST_USAGE);
    assert_int_equal(sched_alive(w.s), 1);
    world_close(&w);

    w.limits.n_pages = 3;
    w.limits.ctx_max = 256;
    assert_ok(arena_open(&w.mem, sched_bytes(&p, &w.limits)));
    assert_ok(sched_open(&w.s, &w.mem, &p, &w.limits));
    assert_status(add(&w, 1, 100, 94, 0), ST_RANGE);
    assert_non_null(strstr(fail_message(), "need 4 KV pages of 3"));
    assert_ok(add(&w, 1, 100, 93, 0)); /* 192 tokens are stored: the last one drawn is never fed */
    world_close(&w);

    p.chunked_prefill = false;
    world_open(&w, &p, 4, 0);
    assert_status(add(&w, 1, 101, 1, 0), ST_RANGE);
    assert_non_null(strstr(fail_message(), "chunked prefill is off"));
    assert_ok(add(&w, 1, 100, 1, 0));
    world_close(&w);
}

static void pushes_back_when_it_is_full(void **state) {
    (void)state;
    const sched_policy p = {
        .token_budget = 100, .max_seqs = 4, .max_queue = 2, .chunked_prefill = true};
    world_open(&w, &p, 8, 0);
    assert_ok(add(&w, 1, 10, 10, 0));
    assert_ok(add(&w, 2, 10, 10, 0));
    assert_status(add(&w, 3, 10, 10, 0), ST_OOM);
    batch b;
    assert_true(sched_pick(w.s, 1, &b));
    assert_ok(add(&w, 3, 10, 10, 0)); /* allowed while a step runs */
    commit(&w, &b, 2);
    world_close(&w);

    /* Alive until taken: results count, and taking makes room. */
    w.limits.n_requests = 2;
    assert_ok(arena_open(&w.mem, sched_bytes(&p, &w.limits)));
    assert_ok(sched_open(&w.s, &w.mem, &p, &w.limits));
    assert_ok(add(&w, 1, 10, 1, 0));
    assert_ok(add(&w, 2, 10, 1, 0));
    assert_true(sched_pick(w.s, 1, &b));
    commit(&w, &b, 2);
    assert_status(add(&w, 3, 10, 1, 0), ST_OOM);
    request_log log;
    const int32_t *token;
    assert_true(sched_take_finished(w.s, &log, &token));
    assert_int_equal(log.id, 1);
    assert_int_equal(token[10], 0);
    assert_ok(add(&w, 3, 10, 1, 0));
    assert_null(sched_problem(w.s));
    world_close(&w);
}

/* Any set of requests within the limits fits, whatever came and went before. */
static void token_storage_does_not_fragment(void **state) {
    (void)state;
    const sched_policy p = {.token_budget = 512, .max_seqs = 4, .chunked_prefill = true};
    world_open(&w, &p, 8, 0);
    rng r;
    rng_seed(&r, 3, 0);
    int64_t id = 0;
    for (int32_t round = 0; round < 3000; round++) {
        for (;;) { /* fill to the last token with requests of a size that changes every round */
            const int64_t left = w.limits.n_tokens - w.s->n_tokens;
            const int32_t n = (int32_t)i64_min(rng_range(&r, 2, 2 + round % 510), left);
            if (sched_alive(w.s) == REQUESTS || n < 2) break;
            assert_ok(add(&w, id++, n - n / 2, n / 2, 0));
        }
        for (int64_t k = id - REQUESTS; k < id; k++)
            if (rng_below(&r, 3)) (void)sched_cancel(w.s, k, 1);
        request_log log;
        const int32_t *token;
        while (sched_take_finished(w.s, &log, &token)) {
        }
        assert_null(sched_problem(w.s));
    }
    world_close(&w);
}

static void a_long_prompt_does_not_hold_up_decodes(void **state) {
    (void)state;
    const sched_policy p = {.token_budget = 32, .max_seqs = 4, .chunked_prefill = true};
    world_open(&w, &p, 16, 0);
    assert_ok(add(&w, 1, 8, 50, 0));
    batch b;
    assert_true(sched_pick(w.s, 1, &b));
    assert_int_equal(b.n_tokens, 8);
    commit(&w, &b, 2);
    assert_ok(add(&w, 2, 400, 4, 3));
    for (int32_t i = 0; i < 12; i++) {
        assert_true(sched_pick(w.s, 4, &b));
        assert_int_equal(b.n_decodes, 1);
        assert_int_equal(b.n_tokens, 32); /* one decode and 31 of the prompt */
        assert_int_equal(b.n_samples, 1);
        commit(&w, &b, 5);
    }
    assert_true(sched_pick(w.s, 4, &b)); /* 28 left: 400 = 12 * 31 + 28 */
    assert_int_equal(b.n_tokens, 29);
    assert_int_equal(b.n_samples, 2);
    commit(&w, &b, 6);
    world_close(&w);
}

static void opening_refuses_and_survives(void **state) {
    (void)state;
    const sched_policy good = SCHED_POLICY_DEFAULT;
    const sched_limits l = {.n_pages = 10, .ctx_max = 100, .n_requests = 10, .n_tokens = 1000};
    const size_t bytes = sched_bytes(&good, &l);
    sched *s;
    arena mem;
    assert_ok(arena_open(&mem, bytes));
    for (int64_t n = 1;; n++) {
        mem_fail_at(n);
        const status st = sched_open(&s, &mem, &good, &l);
        mem_fail_at(0);
        if (st == ST_OK) break;
        assert_int_equal(st, ST_NOMEM);
        assert_null(s);
        assert_int_equal(mem.used, 0);
        assert_true(n < 100);
    }
    arena_reset(&mem, 0);

    sched_policy p = good;
    sched_limits bad = l;
    p.token_budget = 0;
    assert_status(sched_open(&s, &mem, &p, &l), ST_RANGE);
    assert_true(sched_bytes(&p, &l) == SIZE_MAX);
    bad.n_pages = 0;
    assert_status(sched_open(&s, &mem, &good, &bad), ST_RANGE);
    bad = l;
    bad.ctx_max = INT32_MAX;
    assert_status(sched_open(&s, &mem, &good, &bad), ST_RANGE);
    bad = l;
    bad.n_requests = 1 << 30;
    bad.n_tokens = INT64_MAX / 4; /* no address space has that */
    assert_status(sched_open(&s, &mem, &good, &bad), ST_NOMEM);
    bad = (sched_limits){
        .n_pages = 1 << 30, .ctx_max = 1 << 29, .n_requests = 1 << 30, .n_tokens = INT64_MAX / 4};
    (void)sched_bytes(&good, &bad);
    assert_int_equal(mem.used, 0);
    arena_close(&mem);

    /* Too little memory, wherever it ends. */
    for (size_t part = 0; part < bytes / 2; part += bytes / 50) {
        assert_ok(arena_open(&mem, part));
        assert_status(sched_open(&s, &mem, &good, &l), ST_NOMEM);
        assert_int_equal(mem.used, 0);
        arena_close(&mem);
    }
}

static void batches_that_break_their_promises(void **state) {
    (void)state;
    const int32_t token[] = {1, 2, 3}, position[] = {64, 0, 1}, seq_start[] = {0, 1, 3};
    const int32_t kv_len[] = {65, 2}, page_start[] = {0, 2, 3}, page[] = {3, 1, 0};
    const int64_t id[] = {1, 2};
    const sample_row sample[] = {{.row = 0, .seq = 0}, {.row = 2, .seq = 1}};
    const batch good = {.n_seqs = 2,
                        .n_tokens = 3,
                        .n_samples = 2,
                        .n_decodes = 1,
                        .token = token,
                        .position = position,
                        .seq_start = seq_start,
                        .kv_len = kv_len,
                        .page_start = page_start,
                        .page = page,
                        .id = id,
                        .sample = sample};
    assert_null(batch_problem(&good, 4));
    assert_non_null(batch_problem(&good, 3));
    const uint64_t hash = batch_hash(&good);
    /* Every number of every array: one off is a problem or at least another hash. */
    const struct {
        const void *from;
        size_t at;
        int32_t n;
        bool must; /* be a problem */
    } part[] = {
        {token, offsetof(batch, token), 3, false},
        {position, offsetof(batch, position), 3, true},
        {seq_start, offsetof(batch, seq_start), 3, true},
        {kv_len, offsetof(batch, kv_len), 2, true},
        {page_start, offsetof(batch, page_start), 3, true},
        {page, offsetof(batch, page), 3, false},
    };
    for (int32_t k = 0; k < COUNT_OF(part); k++) {
        for (int32_t i = 0; i < part[k].n; i++) {
            int32_t copy[3] = {0}, *const spoilt = copy;
            memcpy(copy, part[k].from, (size_t)part[k].n * sizeof *copy);
            copy[i]++;
            batch b = good;
            memcpy((char *)&b + part[k].at, &spoilt, sizeof spoilt);
            const char *problem = batch_problem(&b, 5);
            if (part[k].must && !problem) fail_msg("array %d, element %d passes", k, i);
            if (!problem) assert_true(batch_hash(&b) != hash);
        }
    }
    batch b = good;
    b.n_decodes = 2;
    assert_non_null(batch_problem(&b, 4));
    b = good;
    b.n_samples = 1;
    assert_null(batch_problem(&b, 4));
    assert_true(batch_hash(&b) != hash);
    b = good;
    b.step++;
    assert_true(batch_hash(&b) != hash);
    const sample_row swapped[] = {sample[1], sample[0]};
    b = good;
    b.sample = swapped;
    assert_non_null(batch_problem(&b, 4));
    for (int32_t r = FINISH_NONE; r <= FINISH_REFUSED; r++)
        assert_true(strcmp(finish_text((finish_reason)r), "unknown") != 0);
}

/* --- Cost ------------------------------------------------------------------------------------- */

/* Printed, and bounded loosely: one decode step of pick and commit at several batch sizes. */
static void costs_little(void **state) {
    (void)state;
    for (int32_t n = 16; n <= 1024; n *= 4) {
        const sched_policy p = {
            .token_budget = 8192, .max_seqs = n, .chunked_prefill = true, .prefix_cache = true};
        const sched_limits l = {
            .n_pages = n * 32, .ctx_max = 4096, .n_requests = n, .n_tokens = n * 2048};
        arena mem;
        sched *s;
        assert_ok(arena_open(&mem, sched_bytes(&p, &l)));
        assert_ok(sched_open(&s, &mem, &p, &l));
        static int32_t prompt[512], drawn[1024];
        for (int32_t i = 0; i < n; i++) {
            for (int32_t k = 0; k < 512; k++) prompt[k] = i * 131 + k;
            const request r = {.id = i, .prompt = prompt, .n_prompt = 512, .max_new = 1000};
            assert_ok(sched_add(s, &r, 0));
        }
        timeline clock;
        timeline_start_real(&clock);
        batch b;
        int64_t steps = 0, best = INT64_MAX, checked = INT64_MAX;
        for (; sched_waiting(s); steps++) {
            assert_true(sched_pick(s, 0, &b));
            sched_commit(s, &b, drawn, NULL, 0);
        }
        for (int32_t round = 0; round < 9; round++) {
            const int64_t t0 = timeline_now_ns(&clock);
            for (int32_t i = 0; i < 100; i++) {
                const bool any = sched_pick(s, 0, &b);
                CHECK(any);
                sched_commit(s, &b, drawn, NULL, 0);
            }
            best = i64_min(best, (timeline_now_ns(&clock) - t0) / 100);
            const int64_t t1 = timeline_now_ns(&clock);
            for (int32_t i = 0; i < 100; i++) assert_null(batch_problem(&b, l.n_pages));
            checked = i64_min(checked, (timeline_now_ns(&clock) - t1) / 100);
        }
        print_message("%5d running: %6lld ns a step (%lld to check the batch)\n", n,
                      (long long)best, (long long)checked);
        arena_close(&mem);
    }
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(keeps_every_promise_under_random_work),
        cmocka_unit_test(keeps_them_when_it_picks_ahead),
        cmocka_unit_test(the_same_work_gives_the_same_batches),
        cmocka_unit_test(notices_every_planted_fault),
        cmocka_unit_test(small_batches_exhaustively),
        cmocka_unit_test(refuses_what_can_never_fit),
        cmocka_unit_test(pushes_back_when_it_is_full),
        cmocka_unit_test(token_storage_does_not_fragment),
        cmocka_unit_test(a_long_prompt_does_not_hold_up_decodes),
        cmocka_unit_test(opening_refuses_and_survives),
        cmocka_unit_test(batches_that_break_their_promises),
        cmocka_unit_test(costs_little),
    };
    return cmocka_run_group_tests_name("sched", tests, NULL, NULL);
}
