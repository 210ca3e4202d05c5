/* trace.c - see trace.h. Writing is plain text, since every value is a number; reading goes through
 * jansson line by line, and nothing in a file may stop the program. */
#include "trace.h"

#include "json.h"
#include <errno.h>
#include <inttypes.h>
#include <string.h>

/* --- Recording -------------------------------------------------------------------------------- */

struct trace {
    FILE *file;
    int64_t n_steps;
    char path[];
};

static const char *json_bool(bool b) { return b ? "true" : "false"; }

status trace_open(trace **out, const char *path, const sched_policy *p, const sched_limits *l) {
    *out = NULL;
    const size_t n = strlen(path) + 1;
    trace *t = mem_alloc(1, sizeof *t + n);
    if (!t) return FAIL(ST_NOMEM, "trace %s", path);
    memcpy(t->path, path, n);
    t->file = fopen(path, "w");
    if (!t->file) {
        mem_free(t);
        return FAIL(ST_IO, "%s: %s", path, strerror(errno));
    }
    fprintf(t->file,
            "{\"policy\":{\"token_budget\":%" PRId32 ",\"max_seqs\":%" PRId32
            ",\"max_queue\":%" PRId32
            ",\"chunked_prefill\":%s,\"prefix_cache\":%s,\"static_batching\":%s},",
            p->token_budget, p->max_seqs, p->max_queue, json_bool(p->chunked_prefill),
            json_bool(p->prefix_cache), json_bool(p->static_batching));
    fprintf(t->file,
            "\"limits\":{\"n_pages\":%" PRId32 ",\"ctx_max\":%" PRId32 ",\"n_requests\":%" PRId32
            ",\"n_tokens\":%" PRId64 "}}\n",
            l->n_pages, l->ctx_max, l->n_requests, l->n_tokens);
    *out = t;
    return ST_OK;
}

static void write_i32s(FILE *f, const int32_t *v, int32_t n) {
    fputc('[', f);
    for (int32_t i = 0; i < n; i++) fprintf(f, i ? ",%" PRId32 : "%" PRId32, v[i]);
    fputc(']', f);
}

void trace_add(trace *t, const request *r, int64_t now_ns) {
    /* JSON integers are signed here: the salt goes through its two's complement. */
    fprintf(t->file,
            "{\"add\":{\"id\":%" PRId64 ",\"arrival\":%" PRId64 ",\"max_new\":%" PRId32
            ",\"salt\":%" PRId64 "%s,\"prompt\":",
            r->id, r->arrival_ns, r->max_new, (int64_t)r->salt,
            r->score_prompt ? ",\"score_prompt\":true" : "");
    write_i32s(t->file, r->prompt, r->n_prompt);
    fprintf(t->file, "},\"now\":%" PRId64 "}\n", now_ns);
}

void trace_cancel(trace *t, int64_t id, int64_t now_ns) {
    fprintf(t->file, "{\"cancel\":%" PRId64 ",\"now\":%" PRId64 "}\n", id, now_ns);
}

void trace_flush_cache(trace *t) { fputs("{\"flush\":true}\n", t->file); }

void trace_pick(trace *t, const batch *b, int64_t pick_ns) {
    fprintf(t->file, "{\"pick\":%" PRId64 ",\"now\":%" PRId64 ",\"hash\":\"%016" PRIx64 "\"}\n",
            b->step, pick_ns, batch_hash(b));
}

void trace_step(trace *t, const batch *b, int64_t pick_ns, const int32_t *token, const bool *stop,
                int64_t commit_ns) {
    FILE *f = t->file;
    fprintf(f, "{\"step\":%" PRId64 ",\"now\":%" PRId64 ",\"hash\":\"%016" PRIx64 "\",\"tokens\":",
            b->step, pick_ns, batch_hash(b));
    write_i32s(f, token, b->n_samples);
    fputs(",\"stop\":[", f);
    for (int32_t i = 0; i < b->n_samples; i++)
        fprintf(f, i ? ",%d" : "%d", stop && stop[i] ? 1 : 0);
    fprintf(f, "],\"done\":%" PRId64 "}\n", commit_ns);
    t->n_steps++;
}

status trace_close(trace *t) {
    if (!t) return ST_OK;
    fprintf(t->file, "{\"end\":%" PRId64 "}\n", t->n_steps);
    const bool failed = ferror(t->file) != 0;
    const bool ok = fclose(t->file) == 0 && !failed;
    const status st = ok ? ST_OK : FAIL(ST_IO, "%s: cannot be written", t->path);
    mem_free(t);
    return st;
}

/* --- Replay ----------------------------------------------------------------------------------- */

typedef struct {
    sched *s;
    arena mem;
    char where[4096]; /* "file:line" */
    int32_t *numbers; /* of the line at hand: prompt, or drawn tokens */
    int32_t n_numbers, max_numbers;
    bool *stop;
    int32_t max_stop;
    int64_t n_steps, n_different;
    batch ahead[2]; /* picked by lines of their own */
    bool ahead_same[2];
    int32_t n_ahead;
    bool ended;
} replay;

/* A broken value keeps its message and becomes FORMAT; short memory stays what it is. */
static status as_format(status st) {
    return st == ST_OK || st == ST_NOMEM ? st : FAIL(ST_FORMAT, "%s", fail_message());
}

static status read_object(const replay *r, const json_t *line, const char *key,
                          const json_t **out) {
    *out = json_object_get(line, key);
    if (!json_is_object(*out)) return FAIL(ST_FORMAT, "%s: '%s' is no object", r->where, key);
    return ST_OK;
}

/* An array of integers in [0, hi] into r->numbers. */
static status read_numbers(replay *r, const json_t *object, const char *key, int32_t hi) {
    const json_t *array = json_object_get(object, key);
    if (!json_is_array(array)) return FAIL(ST_FORMAT, "%s: '%s' is no array", r->where, key);
    const size_t n = json_array_size(array);
    if (n > INT32_MAX / 8) return FAIL(ST_FORMAT, "%s: '%s' is too long", r->where, key);
    if ((int32_t)n > r->max_numbers) {
        int32_t *more = mem_resize(r->numbers, n, sizeof *more);
        if (!more) return FAIL(ST_NOMEM, "%s: %zu numbers", r->where, n);
        r->numbers = more;
        r->max_numbers = (int32_t)n;
    }
    for (size_t i = 0; i < n; i++) {
        const json_t *v = json_array_get(array, i);
        const int64_t x = json_is_integer(v) ? json_integer_value(v) : -1;
        if (x < 0 || x > hi)
            return FAIL(ST_FORMAT, "%s: '%s'[%zu] is no integer from 0 to %d", r->where, key, i,
                        hi);
        r->numbers[i] = (int32_t)x;
    }
    r->n_numbers = (int32_t)n;
    return ST_OK;
}

static status read_header(replay *r, const json_t *line) {
    const json_t *object;
    const char *w = r->where;
    sched_policy p = {0};
    sched_limits l = {0};
    TRY(read_object(r, line, "policy", &object));
    TRY(json_get_i32(object, "token_budget", w, 1, INT32_MAX, &p.token_budget));
    TRY(json_get_i32(object, "max_seqs", w, 1, INT32_MAX, &p.max_seqs));
    TRY(json_get_i32(object, "max_queue", w, 0, INT32_MAX, &p.max_queue));
    TRY(json_get_bool(object, "chunked_prefill", w, &p.chunked_prefill));
    TRY(json_get_bool(object, "prefix_cache", w, &p.prefix_cache));
    TRY(json_get_bool(object, "static_batching", w, &p.static_batching));
    TRY(read_object(r, line, "limits", &object));
    TRY(json_get_i32(object, "n_pages", w, 1, INT32_MAX, &l.n_pages));
    TRY(json_get_i32(object, "ctx_max", w, 2, INT32_MAX, &l.ctx_max));
    TRY(json_get_i32(object, "n_requests", w, 1, INT32_MAX, &l.n_requests));
    TRY(json_get_i64(object, "n_tokens", w, 2, INT64_MAX, &l.n_tokens));

    const size_t bytes = sched_bytes(&p, &l);
    if (bytes == SIZE_MAX) return FAIL(ST_FORMAT, "%s: the limits make no sense", w);
    TRY(arena_open(&r->mem, bytes));
    return sched_open(&r->s, &r->mem, &p, &l);
}

/* What a faithful replay could not refuse. */
static status refused(const replay *r, status st) {
    if (st == ST_OK || r->n_different) return ST_OK;
    return fail_prefix(st, "%s", r->where);
}

static status replay_add(replay *r, const json_t *line) {
    const json_t *object;
    const char *w = r->where;
    int64_t now = 0, salt = 0;
    request q = {.user = -1, .sampling = SAMPLING_GREEDY};
    TRY(read_object(r, line, "add", &object));
    TRY(json_get_i64(line, "now", w, INT64_MIN, INT64_MAX, &now));
    TRY(json_get_i64(object, "id", w, INT64_MIN, INT64_MAX, &q.id));
    TRY(json_get_i64(object, "arrival", w, INT64_MIN, INT64_MAX, &q.arrival_ns));
    TRY(json_get_i32(object, "max_new", w, 1, INT32_MAX, &q.max_new));
    TRY(json_get_i64(object, "salt", w, INT64_MIN, INT64_MAX, &salt));
    TRY(json_opt_bool(object, "score_prompt", w, &q.score_prompt));
    TRY(read_numbers(r, object, "prompt", INT32_MAX));
    q.salt = (uint64_t)salt;
    q.prompt = r->numbers;
    q.n_prompt = r->n_numbers;
    return refused(r, sched_add(r->s, &q, now));
}

static status replay_cancel(replay *r, const json_t *line) {
    int64_t id = 0, now = 0;
    TRY(json_get_i64(line, "cancel", r->where, INT64_MIN, INT64_MAX, &id));
    TRY(json_get_i64(line, "now", r->where, INT64_MIN, INT64_MAX, &now));
    return refused(r, sched_cancel(r->s, id, now));
}

/* Both arrays of the line, with room for n samples: what the file lacks is token 0 and no stop. */
static status read_draws(replay *r, const json_t *line, int32_t n) {
    TRY(read_numbers(r, line, "stop", 1));
    const int32_t n_stop = r->n_numbers, room = n_stop > n ? n_stop : n;
    if (room > r->max_stop) {
        bool *more = mem_resize(r->stop, (size_t)room, sizeof *more);
        if (!more) return FAIL(ST_NOMEM, "%s: %d samples", r->where, room);
        r->stop = more;
        r->max_stop = room;
    }
    for (int32_t i = n_stop; i < room; i++) r->stop[i] = false;
    for (int32_t i = 0; i < n_stop; i++) r->stop[i] = r->numbers[i] != 0;

    TRY(read_numbers(r, line, "tokens", INT32_MAX));
    if (r->n_numbers != n_stop)
        return FAIL(ST_FORMAT, "%s: %d tokens and %d stops", r->where, r->n_numbers, n_stop);
    if (n > r->max_numbers) {
        int32_t *more = mem_resize(r->numbers, (size_t)n, sizeof *more);
        if (!more) return FAIL(ST_NOMEM, "%s: %d samples", r->where, n);
        r->numbers = more;
        r->max_numbers = n;
    }
    for (int32_t i = r->n_numbers; i < n; i++) r->numbers[i] = 0;
    return ST_OK;
}

static status read_hash(const replay *r, const json_t *line, uint64_t *hash) {
    const char *s = "";
    TRY(json_get_string(line, "hash", r->where, &s));
    if (strlen(s) != 16 || strspn(s, "0123456789abcdef") != 16)
        return FAIL(ST_FORMAT, "%s: hash '%s' is not 16 hexadecimal digits", r->where, s);
    *hash = 0;
    for (; *s; s++) *hash = *hash << 4 | (uint64_t)(*s <= '9' ? *s - '0' : *s - 'a' + 10);
    return ST_OK;
}

static status replay_pick(replay *r, const json_t *line) {
    int64_t step = 0, now = 0;
    uint64_t hash = 0;
    TRY(json_get_i64(line, "pick", r->where, 0, INT64_MAX, &step));
    TRY(json_get_i64(line, "now", r->where, INT64_MIN, INT64_MAX, &now));
    TRY(read_hash(r, line, &hash));
    if (r->n_ahead == COUNT_OF(r->ahead))
        return FAIL(ST_FORMAT, "%s: a third batch without a step", r->where);
    batch *b = &r->ahead[r->n_ahead];
    if (!sched_pick(r->s, now, b)) return ST_OK; /* its step finds no batch either */
    r->ahead_same[r->n_ahead++] = batch_hash(b) == hash && b->step == step;
    return ST_OK;
}

/* The batch of a step line: picked by a line of its own, or now. */
static bool batch_of_step(replay *r, int64_t now, batch *b, bool *same) {
    *same = true;
    if (r->n_ahead == 0) return sched_pick(r->s, now, b);
    *b = r->ahead[0];
    *same = r->ahead_same[0];
    r->ahead[0] = r->ahead[1];
    r->ahead_same[0] = r->ahead_same[1];
    r->n_ahead--;
    return true;
}

static status replay_step(replay *r, const json_t *line) {
    int64_t step = 0, now = 0, done = 0;
    uint64_t hash = 0;
    TRY(json_get_i64(line, "step", r->where, 0, INT64_MAX, &step));
    TRY(json_get_i64(line, "now", r->where, INT64_MIN, INT64_MAX, &now));
    TRY(json_get_i64(line, "done", r->where, INT64_MIN, INT64_MAX, &done));
    TRY(read_hash(r, line, &hash));
    batch b;
    bool same;
    if (!batch_of_step(r, now, &b, &same)) {
        TRY(read_draws(r, line, 0));
        r->n_steps++;
        r->n_different++;
        return ST_OK;
    }
    TRY(read_draws(r, line, b.n_samples));
    same = same && batch_hash(&b) == hash && b.step == step && b.n_samples == r->n_numbers;
    r->n_steps++;
    r->n_different += !same;
    sched_commit(r->s, &b, r->numbers, r->stop, done);

    /* Whoever recorded has taken results at times we do not know; early is safe. */
    request_log log;
    const int32_t *token;
    while (sched_take_finished(r->s, &log, &token)) {
    }
    return ST_OK;
}

static status replay_end(replay *r, const json_t *line) {
    int64_t n = 0;
    TRY(json_get_i64(line, "end", r->where, 0, INT64_MAX, &n));
    if (n != r->n_steps)
        return FAIL(ST_FORMAT, "%s: %lld steps were recorded, %lld are here", r->where,
                    (long long)n, (long long)r->n_steps);
    r->ended = true;
    return ST_OK;
}

static status replay_line(replay *r, const char *data, size_t n) {
    if (r->ended) return FAIL(ST_FORMAT, "%s: goes on after its end", r->where);
    json_t *line = NULL;
    TRY(json_parse(&line, data, n, r->where));
    status st;
    if (!r->s) {
        st = read_header(r, line);
    } else if (json_find(line, "step")) {
        st = replay_step(r, line);
    } else if (json_find(line, "pick")) {
        st = replay_pick(r, line);
    } else if (json_find(line, "add")) {
        st = replay_add(r, line);
    } else if (json_find(line, "cancel")) {
        st = replay_cancel(r, line);
    } else if (json_find(line, "flush")) {
        sched_flush_cache(r->s);
        st = ST_OK;
    } else if (json_find(line, "end")) {
        st = replay_end(r, line);
    } else {
        st = FAIL(ST_FORMAT, "%s: neither add, cancel, pick, step, flush nor end", r->where);
    }
    json_decref(line);
    return as_format(st);
}

static status replay_lines(replay *r, const char *path, const file_map *m) {
    const char *p = (const char *)m->data, *end = p + m->size;
    for (int64_t number = 1; p < end; number++) {
        const char *stop = memchr(p, '\n', (size_t)(end - p));
        if (!stop) stop = end;
        snprintf(r->where, sizeof r->where, "%s:%lld", path, (long long)number);
        TRY(replay_line(r, p, (size_t)(stop - p)));
        p = stop < end ? stop + 1 : end;
    }
    if (!r->ended) return FAIL(ST_FORMAT, "%s: ends without its last line", path);
    return ST_OK;
}

status trace_replay(const char *path, int64_t *n_steps, int64_t *n_different) {
    *n_steps = *n_different = 0;
    file_map m;
    TRY(file_map_open(&m, path));
    replay r = {0};
    const status st = m.size ? replay_lines(&r, path, &m) : FAIL(ST_FORMAT, "%s: is empty", path);
    *n_steps = r.n_steps;
    *n_different = r.n_different;
    arena_close(&r.mem);
    mem_free(r.numbers);
    mem_free(r.stop);
    file_map_close(&m);
    return st;
}
