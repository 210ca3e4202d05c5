/* load.c - see load.h. */
#include "load.h"

#include "json.h"
#include "metrics.h"
#include "timeline.h"

#include <curl/curl.h>
#include <errno.h>
#include <math.h>
#include <string.h>
#include <strings.h>
#include <sys/epoll.h>
#include <sys/timerfd.h>
#include <unistd.h>

/* One request on its way. */
typedef struct transfer {
    struct transfer *next;     /* free ones */
    struct transfer *next_all; /* every one */
    struct loader *loader;
    CURL *easy;
    int32_t at; /* index in the workload */
    text body;  /* sent */
    text line;  /* of the stream, so far */
    text rest;  /* of an answer that is no stream: the error */
    int64_t *event_ns;
    int32_t n_events, size;
    int64_t usage_tokens, usage_prompt, usage_cached; /* -1 = not told */
    bool done;                                        /* [DONE], or a finish_reason */
    bool closing; /* the last event had a finish_reason and no text */
    bool failed, stopped, no_memory;
    char why[200];
} transfer;

typedef struct loader {
    const load_options *o;
    const workload *w;
    arena *a;
    request_log *log;
    load_report *report;
    CURLM *multi;
    struct curl_slist *headers;
    char url[1024];
    bool chat; /* the path's interface takes messages */
    int epoll, timer;
    timeline clock;
    int64_t curl_due_ns; /* -1 = nothing */
    int64_t free_ns;     /* a place became free (max_concurrency) */
    transfer *unused, *prepared, *all;
    int32_t next, n_done, in_flight;
    int32_t *user_next; /* closed loop */
    double *lag;        /* [n] seconds */
    int32_t n_lags;
    status st;
} loader;

bool load_valid(double lag_p99_s, double gap_mean_s) {
    const double limit = gap_mean_s > 0 && gap_mean_s * 0.01 < 1e-3 ? gap_mean_s * 0.01 : 1e-3;
    return lag_p99_s <= limit; /* false for NaN */
}

/* The server's URL, with or without slashes or OpenAI's "/v1" at its end, and a path on it. curl
 * speaks more than HTTP. */
static status join_url(char *out, size_t n, const char *url, const char *path) {
    if (strstr(url, "://") && strncasecmp(url, "http://", 7) != 0 &&
        strncasecmp(url, "https://", 8) != 0)
        return FAIL(ST_USAGE, "'%.100s' is no URL of http or https", url);
    int length = (int)strlen(url);
    while (length > 0 && url[length - 1] == '/') length--;
    const bool versioned = strncmp(path + (path[0] == '/'), "v1/", 3) == 0;
    if (versioned && length > 3 && strncmp(url + length - 3, "/v1", 3) == 0) length -= 3;
    const int used = snprintf(out, n, "%.*s%s%s", length, url, path[0] == '/' ? "" : "/", path);
    return (size_t)used < n ? ST_OK : FAIL(ST_RANGE, "a URL of %d bytes", used);
}

/* --- Plain requests --------------------------------------------------------------------------- */

static size_t collect(char *data, size_t size, size_t n, void *user) {
    text *t = user;
    if (t->length + size * n > 1 << 20) return 0;
    text_bytes(t, data, size * n);
    return t->failed ? 0 : size * n;
}

static struct curl_slist *make_headers(const load_options *o) {
    struct curl_slist *list = curl_slist_append(NULL, "Content-Type: application/json");
    list =
        curl_slist_append(list, "Expect:"); /* no 100-continue: a round trip before each prompt */
    if (o->api_key) {
        text t = {0};
        text_add(&t, "Authorization: Bearer %s", o->api_key);
        if (t.data) list = curl_slist_append(list, t.data);
        text_free(&t);
    }
    return list;
}

static void set_common(CURL *c, const struct curl_slist *headers) {
    curl_easy_setopt(c, CURLOPT_NOSIGNAL, 1L);
    curl_easy_setopt(c, CURLOPT_PROXY, ""); /* the server itself, whatever the environment says */
    curl_easy_setopt(c, CURLOPT_HTTPHEADER, headers);
    curl_easy_setopt(c, CURLOPT_HTTP_VERSION, (long)CURL_HTTP_VERSION_1_1);
}

static status take_model(const char *answer, size_t n, const char *url, char *name, size_t size,
                         int32_t *vocab) {
    json_t *v;
    TRY(json_parse(&v, answer, n, url));
    const json_t *first = json_array_get(json_object_get(v, "data"), 0);
    const char *id = json_string_value(json_object_get(first, "id"));
    if (id) snprintf(name, size, "%s", id);
    const json_t *meta = json_object_get(first, "meta"); /* llama.cpp */
    const json_t *said = json_object_get(first, "vocab_size");
    const json_int_t told = json_integer_value(said ? said : json_object_get(meta, "n_vocab"));
    *vocab = told > 0 && told < INT32_MAX ? (int32_t)told : 0;
    json_decref(v);
    return id ? ST_OK : FAIL(ST_FORMAT, "%s/v1/models names no model", url);
}

status load_ask_model(char *name, size_t n, int32_t *vocab, const load_options *o) {
    char url[1024];
    text answer = {0};
    *vocab = 0;
    TRY(join_url(url, sizeof url, o->url, "/v1/models"));
    struct curl_slist *headers = make_headers(o);
    CURL *c = curl_easy_init();
    if (!c) {
        curl_slist_free_all(headers);
        return FAIL(ST_NOMEM, "curl");
    }
    set_common(c, headers);
    curl_easy_setopt(c, CURLOPT_URL, url);
    curl_easy_setopt(c, CURLOPT_TIMEOUT, 30L);
    curl_easy_setopt(c, CURLOPT_WRITEFUNCTION, collect);
    curl_easy_setopt(c, CURLOPT_WRITEDATA, &answer);
    const CURLcode code = curl_easy_perform(c);
    long http = 0;
    curl_easy_getinfo(c, CURLINFO_RESPONSE_CODE, &http);
    status st = ST_OK;
    if (code != CURLE_OK)
        st = FAIL(ST_IO, "%s: %s", url, curl_easy_strerror(code));
    else if (http != 200)
        st = FAIL(ST_IO, "%s answers %ld", url, http);
    else
        st = take_model(answer.data ? answer.data : "", answer.length, o->url, name, n, vocab);
    curl_easy_cleanup(c);
    curl_slist_free_all(headers);
    text_free(&answer);
    return st;
}

/* --- Streams ---------------------------------------------------------------------------------- */

static void add_event(transfer *t, int64_t now) {
    if (t->n_events == t->size) {
        const size_t size = t->size ? (size_t)t->size * 2 : 256;
        int64_t *grown = mem_resize(t->event_ns, size, sizeof *grown);
        if (!grown) {
            t->no_memory = true;
            return;
        }
        t->event_ns = grown;
        t->size = (int32_t)size;
    }
    t->event_ns[t->n_events++] = now;
}

static void fail_transfer(transfer *t, const char *why) {
    if (!t->failed) snprintf(t->why, sizeof t->why, "%s", why);
    t->failed = true;
}

static void take_usage(transfer *t, const json_t *usage) {
    if (!json_is_object(usage)) return;
    const json_t *details = json_object_get(usage, "prompt_tokens_details");
    t->usage_tokens = json_integer_value(json_object_get(usage, "completion_tokens"));
    t->usage_prompt = json_integer_value(json_object_get(usage, "prompt_tokens"));
    t->usage_cached = json_integer_value(json_object_get(details, "cached_tokens"));
}

static void take_choice(transfer *t, const json_t *choice, int64_t now) {
    const json_t *words = json_object_get(choice, "text");
    if (!words) words = json_object_get(json_object_get(choice, "delta"), "content");
    const char *reason = json_string_value(json_object_get(choice, "finish_reason"));
    add_event(t, now);
    t->closing = reason && json_string_length(words) == 0;
    if (!reason) return;
    t->done = true;
    t->stopped = strcmp(reason, "length") != 0;
}

/* A line of the stream, n bytes without its end. */
static void take_line(transfer *t, const char *s, size_t n, int64_t now) {
    if (n && s[n - 1] == '\r') n--;
    if (n < 5 || memcmp(s, "data:", 5) != 0) return; /* comments, blank lines, other fields */
    s += 5, n -= 5;
    while (n && *s == ' ') s++, n--;
    if (n == 6 && memcmp(s, "[DONE]", 6) == 0) {
        t->done = true;
        return;
    }
    json_t *v = json_loadb(s, n, JSON_ALLOW_NUL, NULL);
    if (!v) {
        fail_transfer(t, "an event that is no JSON");
        return;
    }
    const json_t *choices = json_object_get(v, "choices"), *error = json_object_get(v, "error");
    if (error && !json_is_null(error)) {
        const char *message = json_string_value(json_object_get(error, "message"));
        fail_transfer(t, message ? message : "an error event");
    }
    if (json_array_size(choices) > 0) take_choice(t, json_array_get(choices, 0), now);
    take_usage(t, json_object_get(v, "usage"));
    json_decref(v);
}

static size_t on_data(char *data, size_t size, size_t n, void *user) {
    enum { LINE_MOST = 1 << 22 };
    transfer *t = user;
    const size_t total = size * n;
    const int64_t now = timeline_now_ns(&t->loader->clock);
    if (t->rest.length < 4096) text_bytes(&t->rest, data, total < 4096 ? total : 4096);
    for (size_t at = 0; at < total;) {
        const char *end = memchr(data + at, '\n', total - at);
        const size_t to = end ? (size_t)(end - data) : total;
        if (end && t->line.length == 0) {
            take_line(t, data + at, to - at, now);
        } else {
            text_bytes(&t->line, data + at, to - at);
            if (end) {
                take_line(t, t->line.data, t->line.length, now);
                text_clear(&t->line);
            }
        }
        at = to + 1;
    }
    return t->line.failed || t->line.length > LINE_MOST ? 0 : total;
}

/* --- Requests --------------------------------------------------------------------------------- */

static status write_prompt(const loader *l, const request *r, text *out) {
    if (!l->o->tok) {
        text_add(out, "[");
        for (int32_t i = 0; i < r->n_prompt; i++) text_add(out, "%s%d", i ? "," : "", r->prompt[i]);
        text_add(out, "]");
        return text_status(out);
    }
    text words = {0};
    status st = tokenizer_decode(l->o->tok, r->prompt, r->n_prompt, true, &words);
    json_t *s = st == ST_OK ? json_stringn(words.data ? words.data : "", words.length) : NULL;
    char *quoted = s ? json_dumps(s, JSON_ENCODE_ANY | JSON_COMPACT) : NULL;
    if (quoted)
        text_add(out, "%s", quoted);
    else if (st == ST_OK)
        st = FAIL(ST_FORMAT, "request %d: its text cannot be sent", (int)r->id);
    free(quoted);
    json_decref(s);
    text_free(&words);
    return st;
}

static status write_body(const loader *l, const request *r, text *out) {
    const sampling *s = &r->sampling;
    text_clear(out);
    text_add(out, "{\"model\":\"%s\",\"%s\":", l->report->model,
             l->chat ? "messages\":[{\"role\":\"user\",\"content" : "prompt");
    TRY(write_prompt(l, r, out));
    if (l->chat) text_add(out, "}]");
    text_add(out,
             ",\"max_tokens\":%d,\"temperature\":%g,\"top_p\":%g,\"seed\":%lld,\"stream\":true,"
             "\"stream_options\":{\"include_usage\":true}",
             r->max_new, (double)s->temperature, (double)s->top_p,
             (long long)(s->seed & INT32_MAX)); /* what every server takes */
    if (s->top_k > 0) text_add(out, ",\"top_k\":%d", s->top_k);
    if (s->min_p > 0) text_add(out, ",\"min_p\":%g", (double)s->min_p);
    if (s->repetition_penalty != 1)
        text_add(out, ",\"repetition_penalty\":%g", (double)s->repetition_penalty);
    if (s->presence_penalty != 0)
        text_add(out, ",\"presence_penalty\":%g", (double)s->presence_penalty);
    if (s->frequency_penalty != 0)
        text_add(out, ",\"frequency_penalty\":%g", (double)s->frequency_penalty);
    if (s->min_tokens > 0) text_add(out, ",\"min_tokens\":%d", s->min_tokens);
    for (int32_t i = 0; i < s->n_bias; i++)
        text_add(out, "%s\"%d\":%g%s", i ? "," : ",\"logit_bias\":{", s->bias[i].token,
                 (double)s->bias[i].bias, i + 1 < s->n_bias ? "" : "}");
    if (r->ignore_eos) text_add(out, ",\"ignore_eos\":true");
    if (r->salt) text_add(out, ",\"cache_salt\":\"%llx\"", (unsigned long long)r->salt);
    text_add(out, "}");
    return text_status(out);
}

static status prepare(loader *l, int32_t at, transfer **out) {
    transfer *t = l->unused;
    if (t) {
        l->unused = t->next;
    } else {
        t = mem_alloc(1, sizeof *t);
        if (!t) return FAIL(ST_NOMEM, "load generator");
        t->loader = l;
        t->easy = curl_easy_init();
        if (!t->easy) {
            mem_free(t);
            return FAIL(ST_NOMEM, "curl");
        }
        t->next_all = l->all;
        l->all = t;
    }
    *out = t;
    t->at = at;
    t->n_events = 0;
    t->done = t->closing = t->failed = t->stopped = t->no_memory = false;
    t->usage_tokens = t->usage_prompt = t->usage_cached = -1;
    t->why[0] = 0;
    text_clear(&t->line);
    text_clear(&t->rest);
    TRY(write_body(l, &l->w->request[at], &t->body));
    CURL *c = t->easy;
    set_common(c, l->headers);
    curl_easy_setopt(c, CURLOPT_URL, l->url);
    curl_easy_setopt(c, CURLOPT_POSTFIELDS, t->body.data);
    curl_easy_setopt(c, CURLOPT_POSTFIELDSIZE, (long)t->body.length);
    curl_easy_setopt(c, CURLOPT_WRITEFUNCTION, on_data);
    curl_easy_setopt(c, CURLOPT_WRITEDATA, t);
    curl_easy_setopt(c, CURLOPT_PRIVATE, t);
    if (l->o->timeout_s > 0) curl_easy_setopt(c, CURLOPT_TIMEOUT_MS, (long)(l->o->timeout_s * 1e3));
    return ST_OK;
}

/* due_ns: when it could have gone out. The body of the request after it is prepared when it is
 * away. */
static status dispatch(loader *l, int32_t at, int64_t due_ns) {
    transfer *t = l->prepared;
    if (t && t->at == at)
        l->prepared = NULL;
    else
        TRY(prepare(l, at, &t));
    const request *r = &l->w->request[at];
    request_log *log = &l->log[at];
    const int64_t now = timeline_now_ns(&l->clock);
    *log = (request_log){.id = r->id,
                         .arrival_ns = l->user_next ? now : r->arrival_ns,
                         .dispatch_ns = now,
                         .admit_ns = now,
                         .first_token_ns = -1,
                         .finish_ns = -1,
                         .n_prompt = r->n_prompt};
    l->lag[l->n_lags++] = (double)(now - due_ns) * 1e-9;
    l->in_flight++;
    if (curl_multi_add_handle(l->multi, t->easy) != CURLM_OK) return FAIL(ST_IO, "curl");
    return ST_OK;
}

/* Instants of n tokens from those of the events, in l->a. */
static status spread_tokens(loader *l, const transfer *t, request_log *log) {
    const int32_t n = log->n_output, events = t->n_events;
    log->token_ns = arena_array(l->a, int64_t, (size_t)(n ? n : 1));
    if (!log->token_ns) return FAIL(ST_NOMEM, "instants of request %lld", (long long)log->id);
    for (int32_t i = 0; i < n; i++) {
        /* Token i lies at event at + part, at 0 for the first and events - 1 for the last. */
        const double at = n > 1 ? (double)i * (events - 1) / (n - 1) : 0;
        const int32_t low = (int32_t)at;
        const double part = at - low;
        const int64_t from = t->event_ns[low], to = t->event_ns[low + 1 < events ? low + 1 : low];
        log->token_ns[i] =
            n == events ? t->event_ns[i] : from + (int64_t)((double)(to - from) * part);
    }
    return ST_OK;
}

/* What usage tells, else what was counted. */
static status take_result(loader *l, transfer *t, request_log *log) {
    if (t->closing && t->usage_tokens > 0 && t->n_events == t->usage_tokens + 1)
        t->n_events--; /* the last one brought no token */
    log->n_output = t->usage_tokens > 0 ? (int32_t)t->usage_tokens : t->n_events;
    if (t->usage_prompt > 0) log->n_prompt = (int32_t)t->usage_prompt;
    if (t->usage_cached > 0) log->n_cached = (int32_t)t->usage_cached;
    log->first_token_ns = t->event_ns[0];
    log->finish_ns = t->event_ns[t->n_events - 1];
    log->finish = t->stopped ? FINISH_STOP : FINISH_LENGTH;
    return spread_tokens(l, t, log);
}

/* Numbers that the request cannot have had. */
static bool usage_is_wrong(const transfer *t, int32_t max_new) {
    return t->usage_tokens > max_new || t->usage_prompt > INT32_MAX || t->usage_cached > INT32_MAX;
}

static status finish(loader *l, transfer *t, CURLcode code) {
    request_log *log = &l->log[t->at];
    long http = 0;
    curl_easy_getinfo(t->easy, CURLINFO_RESPONSE_CODE, &http);
    if (code != CURLE_OK) {
        fail_transfer(t, curl_easy_strerror(code));
    } else if (http != 200) {
        char why[200];
        snprintf(why, sizeof why, "HTTP %ld: %.150s", http, t->rest.data ? t->rest.data : "");
        fail_transfer(t, why);
    }
    if (t->n_events == 0) fail_transfer(t, "a stream without a token");
    if (!t->done) fail_transfer(t, "the stream was cut off");
    if (t->no_memory) fail_transfer(t, "out of memory");
    if (usage_is_wrong(t, l->w->request[t->at].max_new))
        fail_transfer(t, "usage tells of more tokens than were asked for");
    l->report->n_events += t->n_events;
    if (t->failed) {
        log->finish = FINISH_REFUSED;
        log->finish_ns = timeline_now_ns(&l->clock);
        log->reason = arena_string(l->a, t->why, strlen(t->why));
        if (l->report->n_failed++ == 0)
            snprintf(l->report->failure, sizeof l->report->failure, "%s", t->why);
        return ST_OK;
    }
    return take_result(l, t, log);
}

/* --- The loop --------------------------------------------------------------------------------- */

static int on_socket(CURL *easy, curl_socket_t s, int what, void *user, void *known) {
    (void)easy;
    loader *l = user;
    struct epoll_event e = {.data.fd = s};
    if (what == CURL_POLL_REMOVE) {
        (void)epoll_ctl(l->epoll, EPOLL_CTL_DEL, s, NULL);
        return 0;
    }
    if (what & CURL_POLL_IN) e.events |= EPOLLIN;
    if (what & CURL_POLL_OUT) e.events |= EPOLLOUT;
    if (epoll_ctl(l->epoll, known ? EPOLL_CTL_MOD : EPOLL_CTL_ADD, s, &e) != 0)
        return errno == EEXIST || errno == ENOENT ? epoll_ctl(l->epoll, EPOLL_CTL_MOD, s, &e) : -1;
    curl_multi_assign(l->multi, s, l);
    return 0;
}

static int on_timer(CURLM *multi, long ms, void *user) {
    (void)multi;
    loader *l = user;
    l->curl_due_ns = ms < 0 ? -1 : timeline_now_ns(&l->clock) + (int64_t)ms * 1000000;
    return 0;
}

static status user_sends(loader *l, int32_t user) {
    for (int32_t i = l->user_next[user]; i < l->w->n; i++) {
        if (l->w->request[i].user != user) continue;
        l->user_next[user] = i + 1;
        return dispatch(l, i, timeline_now_ns(&l->clock));
    }
    l->user_next[user] = l->w->n;
    return ST_OK;
}

static status take_ended(loader *l) {
    int left;
    for (CURLMsg *m; (m = curl_multi_info_read(l->multi, &left));) {
        if (m->msg != CURLMSG_DONE) continue;
        transfer *t = NULL;
        curl_easy_getinfo(m->easy_handle, CURLINFO_PRIVATE, (char **)&t);
        const CURLcode code = m->data.result;
        curl_multi_remove_handle(l->multi, t->easy);
        l->in_flight--;
        l->n_done++;
        l->free_ns = timeline_now_ns(&l->clock);
        const status st = finish(l, t, code);
        t->next = l->unused;
        l->unused = t;
        TRY(st);
        if (l->user_next) TRY(user_sends(l, l->w->request[t->at].user));
    }
    return ST_OK;
}

static bool has_place(const loader *l) {
    return l->o->max_concurrency <= 0 || l->in_flight < l->o->max_concurrency;
}

/* Sleep until a socket, curl's timer or the next arrival wants something. */
static status wait_events(loader *l) {
    int64_t due = l->curl_due_ns;
    if (!l->user_next && l->next < l->w->n && has_place(l)) {
        const int64_t arrival = l->w->request[l->next].arrival_ns;
        if (due < 0 || arrival < due) due = arrival;
    }
    const int64_t at = due < 0 ? 0 : l->clock.origin_ns + (due > 0 ? due : 1);
    const struct itimerspec when = {
        .it_value = {.tv_sec = at / 1000000000, .tv_nsec = at % 1000000000}};
    (void)timerfd_settime(l->timer, TFD_TIMER_ABSTIME, &when, NULL);
    struct epoll_event events[256];
    /* A signal between the look at `stop` and the sleep is seen a second later. */
    const int n = epoll_wait(l->epoll, events, COUNT_OF(events), 1000);
    if (n < 0 && errno != EINTR) return FAIL(ST_IO, "epoll: %s", strerror(errno));
    for (int i = 0; i < n; i++) {
        int running;
        if (events[i].data.fd == l->timer) {
            uint64_t fired;
            (void)!read(l->timer, &fired, sizeof fired);
            continue;
        }
        const int what =
            (events[i].events & (EPOLLIN | EPOLLHUP | EPOLLERR) ? CURL_CSELECT_IN : 0) |
            (events[i].events & EPOLLOUT ? CURL_CSELECT_OUT : 0);
        (void)curl_multi_socket_action(l->multi, events[i].data.fd, what, &running);
    }
    return ST_OK;
}

static bool is_stopped(const loader *l) { return l->o->stop && *l->o->stop; }

static status run_loop(loader *l) {
    if (l->user_next)
        for (int32_t u = 0; u < l->w->options.users; u++) TRY(user_sends(l, u));
    while (l->n_done < l->w->n && !is_stopped(l)) {
        int64_t now = timeline_now_ns(&l->clock);
        while (!l->user_next && l->next < l->w->n && l->w->request[l->next].arrival_ns <= now &&
               has_place(l)) {
            const int64_t arrival = l->w->request[l->next].arrival_ns;
            const bool queued = l->o->max_concurrency > 0 && l->free_ns > arrival;
            TRY(dispatch(l, l->next++, queued ? l->free_ns : arrival));
            now = timeline_now_ns(&l->clock);
        }
        if (l->curl_due_ns >= 0 && now >= l->curl_due_ns) {
            int running;
            l->curl_due_ns = -1;
            (void)curl_multi_socket_action(l->multi, CURL_SOCKET_TIMEOUT, 0, &running);
        }
        TRY(take_ended(l));
        if (l->n_done >= l->w->n) break;
        if (!l->user_next && l->next < l->w->n && !l->prepared)
            TRY(prepare(l, l->next, &l->prepared));
        /* What became due meanwhile goes out before any sleep: a timer in the past fires at once.
         */
        TRY(wait_events(l));
    }
    return ST_OK;
}

static status open_loader(loader *l) {
    l->chat = l->o->path && strstr(l->o->path, "/chat/");
    if (l->chat && !l->o->tok)
        return FAIL(ST_USAGE, "%s takes text: a tokenizer is needed", l->o->path);
    l->multi = curl_multi_init();
    l->headers = make_headers(l->o);
    l->epoll = epoll_create1(EPOLL_CLOEXEC);
    l->timer = timerfd_create(CLOCK_MONOTONIC, TFD_NONBLOCK | TFD_CLOEXEC);
    l->lag = mem_alloc((size_t)l->w->n + 1, sizeof *l->lag);
    if (l->w->options.arrival == ARRIVE_CLOSED)
        l->user_next = mem_alloc((size_t)l->w->options.users + 1, sizeof *l->user_next);
    if (!l->multi || !l->headers || l->epoll < 0 || l->timer < 0 || !l->lag ||
        (l->w->options.arrival == ARRIVE_CLOSED && !l->user_next))
        return FAIL(ST_NOMEM, "load generator");
    struct epoll_event e = {.events = EPOLLIN, .data.fd = l->timer};
    if (epoll_ctl(l->epoll, EPOLL_CTL_ADD, l->timer, &e) != 0)
        return FAIL(ST_IO, "epoll: %s", strerror(errno));
    curl_multi_setopt(l->multi, CURLMOPT_SOCKETFUNCTION, on_socket);
    curl_multi_setopt(l->multi, CURLMOPT_SOCKETDATA, l);
    curl_multi_setopt(l->multi, CURLMOPT_TIMERFUNCTION, on_timer);
    curl_multi_setopt(l->multi, CURLMOPT_TIMERDATA, l);
    curl_multi_setopt(l->multi, CURLMOPT_MAXCONNECTS, 4096L);
    return join_url(l->url, sizeof l->url, l->o->url, l->o->path ? l->o->path : "/v1/completions");
}

static void close_loader(loader *l) {
    while (l->all) {
        transfer *t = l->all;
        l->all = t->next_all;
        if (l->multi) curl_multi_remove_handle(l->multi, t->easy);
        curl_easy_cleanup(t->easy);
        text_free(&t->body);
        text_free(&t->line);
        text_free(&t->rest);
        mem_free(t->event_ns);
        mem_free(t);
    }
    if (l->multi) curl_multi_cleanup(l->multi);
    curl_slist_free_all(l->headers);
    if (l->epoll >= 0) close(l->epoll);
    if (l->timer >= 0) close(l->timer);
    mem_free(l->lag);
    mem_free(l->user_next);
}

/* Leave in the log what was sent; what is still in flight is cancelled. */
static void close_log(loader *l) {
    load_report *r = l->report;
    r->interrupted = l->n_done < l->w->n;
    for (int32_t i = 0; i < l->w->n; i++) {
        request_log *log = &l->log[i];
        if (log->dispatch_ns < 0) continue;
        if (log->finish == FINISH_NONE) {
            log->finish = FINISH_CANCEL;
            log->finish_ns = timeline_now_ns(&l->clock);
            log->reason = "interrupted";
        }
        l->log[r->n_logged++] = *log;
    }
}

static void judge(loader *l) {
    load_report *r = l->report;
    const workload *w = l->w;
    for (int32_t i = 0; i < l->n_lags; i++)
        if (l->lag[i] > r->lag_max_s) r->lag_max_s = l->lag[i];
    r->lag_p50_s = percentile(l->lag, l->n_lags, 0.5);
    r->lag_p99_s = percentile(l->lag, l->n_lags, 0.99);
    const int64_t span = w->n > 1 ? w->request[w->n - 1].arrival_ns - w->request[0].arrival_ns : 0;
    r->gap_mean_s = l->user_next || w->n < 2 ? 0 : (double)span * 1e-9 / (w->n - 1);
    r->duration_s = (double)timeline_now_ns(&l->clock) * 1e-9;
    /* All at once is a burst: the order in which it goes out is no lag that an arrival could
     * show. */
    r->valid = r->gap_mean_s == 0 || load_valid(r->lag_p99_s, r->gap_mean_s);
}

status load_run(load_report *out, arena *a, const load_options *o, const workload *w,
                request_log *log) {
    *out = (load_report){0};
    for (int32_t i = 0; i < w->n; i++) log[i] = (request_log){.dispatch_ns = -1};
    int32_t vocab;
    if (o->model)
        snprintf(out->model, sizeof out->model, "%s", o->model);
    else
        TRY(load_ask_model(out->model, sizeof out->model, &vocab, o));
    for (const char *c = out->model; *c; c++)
        if ((unsigned char)*c < ' ' || *c == '"' || *c == '\\')
            return FAIL(ST_FORMAT, "a model's name with quotes or control characters");
    loader l = {.o = o, .w = w, .a = a, .log = log, .report = out, .curl_due_ns = -1};
    status st = open_loader(&l);
    timeline_start_real(&l.clock);
    if (st == ST_OK) st = run_loop(&l);
    if (st == ST_OK) {
        close_log(&l);
        judge(&l);
    }
    close_loader(&l);
    return st;
}
