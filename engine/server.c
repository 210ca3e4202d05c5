/* server.c - see server.h.
 *
 * A connection's life: opened (peer) -> request arrives in pieces (exchange) -> answered at once,
 * or given to the service as a job and suspended -> resumed by wake() when the job has something
 * -> completed. Megabytes of prompt take seconds to become tokens: a body that is not small is
 * read by a thread for that, the connection suspended. The watch thread ends what does not move:
 * requests that do not arrive, clients that are gone while their connection is suspended
 * (libmicrohttpd does not look at those), readers that take nothing. */
#define _GNU_SOURCE /* POLLRDHUP */
#include "server.h"

#include "reply.h"
#include "utf8.h"
#include "version.h"

#include <arpa/inet.h>
#include <errno.h>
#include <microhttpd.h>
#include <netdb.h>
#include <netinet/in.h>
#include <poll.h>
#include <string.h>
#include <strings.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

enum {
    EVENTS_BYTES = 16 << 10, /* of a stream, written at a time */
    HEADER_BYTES = 32 << 10, /* of a request's headers */
    REQUEST_ID_MAX = 128,
    READ_AT_ONCE = 16 << 10, /* bytes of a body: about 10 ms at the slowest of our tokenizers */
    WATCH_MS = 20,
    LOOK_NS = 500 * 1000 * 1000, /* between looks at connections on which nothing runs */
};

/* A connection. */
typedef struct peer {
    struct peer *next, *before;
    int fd;
    int64_t since_ns;  /* a request has been awaited since; 0 = one is being answered */
    int64_t looked_ns; /* while one is awaited: when the watch last looked whether it can come */
    bool ended;        /* and found that the client has closed */
    int64_t moved_ns;  /* the client last took something of a stream */
    bool stalled;      /* there is something that it does not take */
    bool dropped;      /* the watch has shut it down */
    struct job *job;
} peer;

/* A request on it. */
typedef struct exchange {
    struct exchange *next; /* unread */
    server *server;
    struct MHD_Connection *connection;
    peer *peer;
    const struct route *route;
    text body;
    bool too_large;
    int32_t code; /* HTTP's, once the body is read and `answer` says all; 0 = it is not, or a job */
    text answer;
    job *job;
    reply_head head;
    reply_stream stream;
    text staged; /* events not yet taken by libmicrohttpd */
    size_t taken;
    char request_id[REQUEST_ID_MAX + 1];
} exchange;

struct server {
    server_options options;
    api_model model;
    service *service;
    struct MHD_Daemon *daemon;
    int32_t port;
    timeline clock;
    pthread_mutex_t lock; /* of the peers, the counter and the unread */
    peer *peers;
    int64_t n_peers;
    uint64_t counter, secret; /* ids of answers, seeds of draws */
    pthread_t watch;
    atomic_bool closing;
    pthread_t reader;
    pthread_cond_t arrived; /* something is unread, or no_more */
    exchange *unread, **last_unread;
    bool no_more; /* is read */
    int64_t started_s;
};

typedef struct route {
    const char *path, *method;
    bool open; /* without a key */
    enum MHD_Result (*answer)(exchange *x);
    void (*read)(exchange *x); /* in place of `answer`, on any thread: makes a job, or sets code */
} route;

/* --- Answers ---------------------------------------------------------------------------------- */

static enum MHD_Result send_response(exchange *x, int32_t code, const char *type,
                                     struct MHD_Response *r) {
    if (!r) return MHD_NO;
    (void)MHD_add_response_header(r, "Content-Type", type);
    if (x->request_id[0]) (void)MHD_add_response_header(r, "x-request-id", x->request_id);
    if (code == 429 || code == 503) (void)MHD_add_response_header(r, "Retry-After", "1");
    if (code == 401) (void)MHD_add_response_header(r, "WWW-Authenticate", "Bearer");
    if (code == 405 && x->route)
        (void)MHD_add_response_header(r, "Allow",
                                      strcmp(x->route->method, "GET") == 0 ? "GET, HEAD" : "POST");
    const enum MHD_Result result = MHD_queue_response(x->connection, (unsigned)code, r);
    MHD_destroy_response(r);
    return result;
}

static enum MHD_Result send_text(exchange *x, int32_t code, const char *type, text *t) {
    if (t->failed) {
        text_free(t);
        return MHD_NO;
    }
    struct MHD_Response *r = MHD_create_response_from_buffer(
        t->length, t->data ? t->data : (char *)(uintptr_t) "", MHD_RESPMEM_MUST_COPY);
    text_free(t);
    return send_response(x, code, type, r);
}

static enum MHD_Result send_json(exchange *x, int32_t code, text *t) {
    return send_text(x, code, "application/json", t);
}

static enum MHD_Result send_error(exchange *x, int32_t code, const char *message) {
    text t = {0};
    api_put_error(&t, code, message);
    return send_json(x, code, &t);
}

static int32_t code_of(status st) {
    switch (st) {
    case ST_OK: return 200;
    case ST_NOTFOUND: return 404;
    case ST_OOM: return 429;
    case ST_INTERRUPTED: return 503;
    case ST_FORMAT:
    case ST_RANGE:
    case ST_USAGE:
    case ST_UNSUPPORTED:
    case ST_SHAPE: return 400;
    default: return 500;
    }
}

/* The answer to a body that was read. */
static void refuse(exchange *x, int32_t code, const char *why) {
    text_clear(&x->answer);
    x->code = code;
    api_put_error(&x->answer, code, why);
}

/* --- Simple routes ---------------------------------------------------------------------------- */

static enum MHD_Result answer_health(exchange *x) {
    if (!service_healthy(x->server->service)) return send_error(x, 503, "not serving");
    text t = {0};
    text_add(&t, "{\"status\":\"ok\"}");
    return send_json(x, 200, &t);
}

static enum MHD_Result answer_version(exchange *x) {
    text t = {0};
    text_add(&t, "{\"version\":\"%s%s%s\"}", AMALGAM_COMMIT, AMALGAM_DIFF[0] ? "-dirty-" : "",
             AMALGAM_DIFF);
    return send_json(x, 200, &t);
}

static void put_model(text *t, const server *s) {
    const api_model *m = &s->model;
    text_add(t, "{\"id\":");
    api_put_string(t, m->model, strlen(m->model));
    text_add(t, ",\"object\":\"model\",\"created\":%lld,\"owned_by\":\"amalgam\",\"root\":",
             (long long)s->started_s);
    api_put_string(t, m->model, strlen(m->model));
    text_add(t, ",\"parent\":null,\"max_model_len\":%d,\"vocab_size\":%d}", m->ctx_max, m->vocab);
}

static enum MHD_Result answer_models(exchange *x) {
    text t = {0};
    text_add(&t, "{\"object\":\"list\",\"data\":[");
    put_model(&t, x->server);
    text_add(&t, "]}");
    return send_json(x, 200, &t);
}

static enum MHD_Result answer_model(exchange *x) {
    text t = {0};
    put_model(&t, x->server);
    return send_json(x, 200, &t);
}

static void put_text_or_null(text *t, const char *key, const char *words) {
    text_add(t, ",\"%s\":", key);
    if (words && words[0])
        api_put_string(t, words, strlen(words));
    else
        text_add(t, "null");
}

/* vLLM's: what a client needs to make prompts and tokens as this server does. */
static enum MHD_Result answer_tokenizer(exchange *x) {
    const api_model *m = &x->server->model;
    text t = {0};
    if (!m->tok) return send_error(x, 404, "this server has no tokenizer");
    text_add(&t, "{\"tokenizer_class\":null");
    put_text_or_null(&t, "bos_token", m->bos);
    put_text_or_null(&t, "eos_token", m->eos);
    put_text_or_null(&t, "chat_template", m->tpl ? tokenizer_chat_template(m->tok, NULL) : NULL);
    text_add(&t, "}");
    return send_json(x, 200, &t);
}

static enum MHD_Result answer_metrics(exchange *x) {
    text t = {0};
    service_metrics(x->server->service, x->server->model.model, &t);
    return send_text(x, 200, "text/plain; version=0.0.4; charset=utf-8", &t);
}

static void read_tokenize(exchange *x) {
    ids list = {0};
    text *t = &x->answer;
    const status st = api_tokenize(&list, &x->server->model, x->body.data, x->body.length);
    x->code = 200;
    text_add(t, "{\"count\":%lld,\"max_model_len\":%d,\"tokens\":[", (long long)list.length,
             x->server->model.ctx_max);
    for (int64_t i = 0; i < list.length; i++) text_add(t, "%s%d", i ? "," : "", list.data[i]);
    text_add(t, "]}");
    ids_free(&list);
    if (st != ST_OK) refuse(x, code_of(st), fail_message());
}

static void read_detokenize(exchange *x) {
    text words = {0};
    const status st = api_detokenize(&words, &x->server->model, x->body.data, x->body.length);
    x->code = 200;
    text_add(&x->answer, "{\"prompt\":");
    api_put_string(&x->answer, words.data ? words.data : "", words.length);
    text_add(&x->answer, "}");
    text_free(&words);
    if (st != ST_OK) refuse(x, code_of(st), fail_message());
}

static enum MHD_Result answer_reset(exchange *x) {
    service_flush_cache(x->server->service);
    text t = {0};
    text_add(&t, "{\"status\":\"ok\"}");
    return send_json(x, 200, &t);
}

/* --- Completions ------------------------------------------------------------------------------ */

/* Has the other side closed? A suspended connection is read by nobody, so only this tells. */
static bool is_gone(int fd) {
    struct pollfd p = {.fd = fd, .events = POLLRDHUP};
    return poll(&p, 1, 0) > 0 && (p.revents & (POLLRDHUP | POLLHUP | POLLERR));
}

/* Called by the engine thread with the job's lock held, and only while the connection is
 * suspended. */
static void wake_connection(void *user) {
    exchange *x = user;
    MHD_resume_connection(x->connection);
}

static uint64_t next_number(server *s) {
    pthread_mutex_lock(&s->lock);
    const uint64_t n = ++s->counter;
    pthread_mutex_unlock(&s->lock);
    return n;
}

/* Sleep until the engine has something. Job's lock held. */
static void sleep_on(exchange *x) {
    x->job->waiting = true;
    MHD_suspend_connection(x->connection);
}

static void read_job(exchange *x, bool chat) {
    server *s = x->server;
    const uint64_t number = next_number(s);
    api_request r;
    status st =
        api_parse(&r, &s->model, chat, x->body.data, x->body.length, hash_u64(number, s->secret));
    text_free(&x->body);
    if (st == ST_OK) st = job_new(&x->job, &r, s->model.tok, wake_connection, x);
    if (st == ST_OK && x->job->request.stream) st = reply_stream_open(&x->stream, x->job);
    if (st != ST_OK) {
        refuse(x, code_of(st), fail_message());
        job_release(x->job);
        x->job = NULL;
        return;
    }
    x->head = (reply_head){
        .model = s->model.model, .tok = s->model.tok, .created_s = (int64_t)time(NULL)};
    snprintf(x->head.id, sizeof x->head.id, "%s-%016llx", chat ? "chatcmpl" : "cmpl",
             (unsigned long long)hash_u64(number, s->secret + 1));
}

static void read_completions(exchange *x) { read_job(x, false); }
static void read_chat(exchange *x) { read_job(x, true); }

/* The connection is suspended. */
static void submit_job(exchange *x) {
    server *s = x->server;
    pthread_mutex_lock(&s->lock);
    x->peer->job = x->job;
    pthread_mutex_unlock(&s->lock);
    pthread_mutex_lock(&x->job->lock);
    x->job->waiting = true;
    pthread_mutex_unlock(&x->job->lock);
    service_submit(s->service, x->job);
}

static enum MHD_Result read_now(exchange *x) {
    x->route->read(x);
    if (!x->job) return send_json(x, x->code, &x->answer);
    MHD_suspend_connection(x->connection);
    submit_job(x);
    return MHD_YES;
}

static enum MHD_Result read_later(exchange *x) {
    server *s = x->server;
    MHD_suspend_connection(x->connection);
    pthread_mutex_lock(&s->lock);
    const bool no_more = s->no_more;
    if (!no_more) {
        *s->last_unread = x;
        s->last_unread = &x->next;
        pthread_cond_signal(&s->arrived);
    }
    pthread_mutex_unlock(&s->lock);
    if (no_more) {
        refuse(x, 503, "shutting down");
        MHD_resume_connection(x->connection);
    }
    return MHD_YES;
}

/* One at a time, in the order of their arrival; others wait, so the body of a client that has left
 * is not read. When there are no_more, those that are left are refused. A connection that is
 * resumed may be gone at once, and its exchange with it. */
static void *read_thread(void *arg) {
    server *s = arg;
    pthread_mutex_lock(&s->lock);
    for (;;) {
        while (!s->unread && !s->no_more) pthread_cond_wait(&s->arrived, &s->lock);
        exchange *x = s->unread;
        const bool no_more = s->no_more;
        if (!x) break;
        s->unread = x->next;
        if (!s->unread) s->last_unread = &s->unread;
        pthread_mutex_unlock(&s->lock);
        if (no_more)
            refuse(x, 503, "shutting down");
        else if (is_gone(x->peer->fd))
            refuse(x, 503, "the client went away");
        else
            x->route->read(x);
        if (x->job)
            submit_job(x);
        else
            MHD_resume_connection(x->connection);
        pthread_mutex_lock(&s->lock);
    }
    pthread_mutex_unlock(&s->lock);
    return NULL;
}

static ssize_t read_events(void *user, uint64_t at, char *buf, size_t max) {
    (void)at;
    exchange *x = user;
    job *j = x->job;
    peer *l = x->peer;
    if (x->taken == x->staged.length) {
        text_clear(&x->staged);
        x->taken = 0;
        if (x->stream.end) return MHD_CONTENT_READER_END_OF_STREAM;
        pthread_mutex_lock(&j->lock);
        reply_events(&x->staged, &x->head, j, &x->stream, EVENTS_BYTES);
        const bool nothing = x->staged.length == 0 && !x->staged.failed;
        if (nothing) sleep_on(x);
        pthread_mutex_unlock(&j->lock);
        pthread_mutex_lock(&x->server->lock);
        l->stalled = !nothing;
        l->moved_ns = timeline_now_ns(&x->server->clock);
        pthread_mutex_unlock(&x->server->lock);
        if (nothing) return 0;
    }
    if (x->staged.failed || atomic_load(&j->cancelled)) return MHD_CONTENT_READER_END_WITH_ERROR;
    size_t n = x->staged.length - x->taken;
    if (n > max) n = max;
    memcpy(buf, x->staged.data + x->taken, n);
    x->taken += n;
    return (ssize_t)n;
}

/* The job has news for the first time: accepted (a stream), or done. */
static enum MHD_Result answer_job(exchange *x) {
    job *j = x->job;
    pthread_mutex_lock(&j->lock);
    const bool done = j->done, failed = done && j->st != ST_OK, begun = j->accepted;
    text t = {0};
    int32_t code = failed ? code_of(j->st) : 200;
    if (failed && (!begun || !j->request.stream))
        api_put_error(&t, code, j->why);
    else if (!j->request.stream)
        reply_whole(&t, &x->head, j);
    pthread_mutex_unlock(&j->lock);
    if (t.length) return send_json(x, code, &t);
    struct MHD_Response *r =
        MHD_create_response_from_callback(MHD_SIZE_UNKNOWN, EVENTS_BYTES, read_events, x, NULL);
    if (r) (void)MHD_add_response_header(r, "Cache-Control", "no-cache");
    return send_response(x, 200, "text/event-stream; charset=utf-8", r);
}

/* --- Requests --------------------------------------------------------------------------------- */

static const route routes[] = {
    {"/v1/completions", "POST", false, NULL, read_completions},
    {"/v1/chat/completions", "POST", false, NULL, read_chat},
    {"/v1/models", "GET", false, answer_models, NULL},
    {"/v1/models/", "GET", false, answer_model, NULL},
    {"/health", "GET", true, answer_health, NULL},
    {"/ping", "GET", true, answer_health, NULL},
    {"/version", "GET", false, answer_version, NULL},
    {"/metrics", "GET", false, answer_metrics, NULL},
    {"/tokenizer_info", "GET", false, answer_tokenizer, NULL},
    {"/tokenize", "POST", false, NULL, read_tokenize},
    {"/detokenize", "POST", false, NULL, read_detokenize},
    {"/reset_prefix_cache", "POST", false, answer_reset, NULL},
};

/* In time that depends on the sent text's length alone. */
static bool same_secret(const char *given, const char *secret) {
    const size_t n = strlen(given), m = strlen(secret);
    unsigned char different = n != m;
    for (size_t i = 0; i < n; i++) different |= (unsigned char)(given[i] ^ secret[i % (m ? m : 1)]);
    return !different;
}

static bool authorised(const exchange *x) {
    const char *key = x->server->options.api_key;
    if (!key || (x->route && x->route->open)) return true;
    const char *given =
        MHD_lookup_connection_value(x->connection, MHD_HEADER_KIND, "Authorization");
    return given && strncasecmp(given, "Bearer ", 7) == 0 && same_secret(given + 7, key);
}

/* Echoed only when it is plain text: it goes into a header of ours. */
static void take_request_id(exchange *x) {
    const char *id = MHD_lookup_connection_value(x->connection, MHD_HEADER_KIND, "x-request-id");
    const size_t n = id ? strlen(id) : 0;
    if (n == 0 || n > REQUEST_ID_MAX) return;
    for (size_t i = 0; i < n; i++)
        if (id[i] <= ' ' || id[i] > '~') return;
    memcpy(x->request_id, id, n + 1);
}

static enum MHD_Result count_length(void *user, enum MHD_ValueKind kind, const char *key,
                                    const char *value) {
    (void)kind;
    (void)value;
    *(int32_t *)user +=
        strcasecmp(key, "Content-Length") == 0 || strcasecmp(key, "Transfer-Encoding") == 0;
    return MHD_YES;
}

/* Two lengths are two opinions on where the next request begins: an attack behind a proxy. */
static bool is_ambiguous(const exchange *x) {
    int32_t n = 0;
    (void)MHD_get_connection_values(x->connection, MHD_HEADER_KIND, count_length, &n);
    return n > 1;
}

/* Whoever may GET may ask for the headers alone; libmicrohttpd then sends no body. */
static bool takes(const route *r, const char *method) {
    return strcmp(method, r->method) == 0 ||
           (strcmp(method, "HEAD") == 0 && strcmp(r->method, "GET") == 0);
}

/* What follows a path's last slash, if it ends with one, is the model's name. */
static bool leads_to(const char *url, const route *r, const char *model) {
    const size_t n = strlen(r->path);
    if (r->path[n - 1] != '/') return strcmp(url, r->path) == 0;
    return strncmp(url, r->path, n) == 0 && strcmp(url + n, model) == 0;
}

/* Names what there is, of models or of paths. */
static enum MHD_Result send_no_path(exchange *x, const char *url) {
    static const char models[] = "/v1/models/";
    text why = {0}, answer = {0};
    if (strncmp(url, models, sizeof models - 1) == 0) {
        text_add(&why, "the model '%.100s' is not served here, '%s' is", url + sizeof models - 1,
                 x->server->model.model);
    } else {
        text_add(&why, "no such path '%.100s': there are", url);
        for (int32_t i = 0; i < COUNT_OF(routes); i++) text_add(&why, " %s", routes[i].path);
    }
    api_put_error(&answer, 404, why.data ? why.data : "no such path");
    text_free(&why);
    return send_json(x, 404, &answer);
}

/* The headers are here: refuse before the body is read, or go on. */
static enum MHD_Result begin_exchange(exchange *x, const char *url, const char *method) {
    take_request_id(x);
    for (int32_t i = 0; i < COUNT_OF(routes); i++)
        if (leads_to(url, &routes[i], x->server->model.model)) x->route = &routes[i];
    if (is_ambiguous(x)) return send_error(x, 400, "more than one length of the body");
    if (!authorised(x)) return send_error(x, 401, "wrong or missing API key");
    if (!x->route) return send_no_path(x, url);
    if (!takes(x->route, method)) return send_error(x, 405, "no such method here");
    const char *length =
        MHD_lookup_connection_value(x->connection, MHD_HEADER_KIND, "Content-Length");
    int64_t n;
    if (length && parse_i64(length, 0, INT64_MAX, &n) && n > x->server->options.max_body_bytes)
        return send_error(x, 413, "the body is too large");
    return MHD_YES;
}

static peer *peer_of(struct MHD_Connection *c) {
    return MHD_get_connection_info(c, MHD_CONNECTION_INFO_SOCKET_CONTEXT)->socket_context;
}

static enum MHD_Result on_request(void *user, struct MHD_Connection *connection, const char *url,
                                  const char *method, const char *version, const char *data,
                                  size_t *n_data, void **state) {
    (void)version;
    exchange *x = *state;
    if (!x) {
        x = mem_alloc(1, sizeof *x);
        if (!x) return MHD_NO;
        x->server = user;
        x->connection = connection;
        x->peer = peer_of(connection);
        if (!x->peer) {
            mem_free(x);
            return MHD_NO;
        }
        *state = x;
        return begin_exchange(x, url, method);
    }
    if (*n_data) {
        x->too_large |= x->body.length + *n_data > (size_t)x->server->options.max_body_bytes;
        if (!x->too_large) text_bytes(&x->body, data, *n_data);
        *n_data = 0;
        return MHD_YES;
    }
    if (x->job) return answer_job(x);
    if (x->code) return send_json(x, x->code, &x->answer);
    pthread_mutex_lock(&x->server->lock);
    x->peer->since_ns = 0; /* it has arrived */
    pthread_mutex_unlock(&x->server->lock);
    if (x->too_large) return send_error(x, 413, "the body is too large");
    if (x->body.failed) return send_error(x, 500, "out of memory");
    if (!x->route->read) return x->route->answer(x);
    return x->body.length > READ_AT_ONCE ? read_later(x) : read_now(x);
}

static void on_completed(void *user, struct MHD_Connection *connection, void **state,
                         enum MHD_RequestTerminationCode why) {
    (void)connection;
    (void)why;
    server *s = user;
    exchange *x = *state;
    if (!x) return;
    *state = NULL;
    pthread_mutex_lock(&s->lock);
    x->peer->job = NULL;
    x->peer->stalled = false;
    x->peer->since_ns = timeline_now_ns(&s->clock);
    pthread_mutex_unlock(&s->lock);
    if (x->job) {
        pthread_mutex_lock(&x->job->lock);
        const bool done = x->job->done;
        x->job->waiting = false; /* nobody is left to wake */
        pthread_mutex_unlock(&x->job->lock);
        if (!done) service_cancel(s->service, x->job);
        job_release(x->job);
    }
    reply_stream_close(&x->stream);
    text_free(&x->staged);
    text_free(&x->answer);
    text_free(&x->body);
    mem_free(x);
}

static void on_connection(void *user, struct MHD_Connection *connection, void **context,
                          enum MHD_ConnectionNotificationCode what) {
    server *s = user;
    if (what == MHD_CONNECTION_NOTIFY_STARTED) {
        peer *l = mem_alloc(1, sizeof *l);
        *context = l;
        if (!l) return;
        l->fd = MHD_get_connection_info(connection, MHD_CONNECTION_INFO_CONNECTION_FD)->connect_fd;
        l->since_ns = timeline_now_ns(&s->clock);
        pthread_mutex_lock(&s->lock);
        l->next = s->peers;
        if (l->next) l->next->before = l;
        s->peers = l;
        s->n_peers++;
        pthread_mutex_unlock(&s->lock);
        return;
    }
    peer *l = *context;
    if (!l) return;
    pthread_mutex_lock(&s->lock);
    if (l->before)
        l->before->next = l->next;
    else
        s->peers = l->next;
    if (l->next) l->next->before = l->before;
    s->n_peers--;
    pthread_mutex_unlock(&s->lock);
    mem_free(l);
    *context = NULL;
}

/* --- The watch -------------------------------------------------------------------------------- */

/* A request is awaited from a client that has closed: libmicrohttpd does not see an end that came
 * together with data. Seen twice: what had arrived at the first look has been read by then. */
static bool awaits_in_vain(peer *l, int64_t now) {
    if (!l->since_ns || now - i64_max(l->looked_ns, l->since_ns) < LOOK_NS) return false;
    const bool before = l->ended && l->looked_ns > l->since_ns;
    l->looked_ns = now;
    l->ended = is_gone(l->fd);
    return before && l->ended;
}

/* The socket stays open while its peer is in the list, and the list is locked. */
static void watch_peer(server *s, peer *l, int64_t now) {
    const double waited = l->since_ns ? (double)(now - l->since_ns) * 1e-9 : 0;
    const double stalled = l->stalled ? (double)(now - l->moved_ns) * 1e-9 : 0;
    const bool gone = l->job ? is_gone(l->fd) : awaits_in_vain(l, now);
    if (!gone && waited <= s->options.request_timeout_s && stalled <= s->options.stall_timeout_s)
        return;
    l->dropped = true;
    if (l->job) service_cancel(s->service, l->job);
    (void)shutdown(l->fd, SHUT_RDWR);
}

static void *watch_thread(void *arg) {
    server *s = arg;
    while (!atomic_load(&s->closing)) {
        pthread_mutex_lock(&s->lock);
        const int64_t now = timeline_now_ns(&s->clock);
        for (peer *l = s->peers; l; l = l->next)
            if (!l->dropped) watch_peer(s, l, now);
        pthread_mutex_unlock(&s->lock);
        nanosleep(&(struct timespec){.tv_nsec = WATCH_MS * 1000000L}, NULL);
    }
    return NULL;
}

/* --- Interface -------------------------------------------------------------------------------- */

static status address_of(const server_options *o, struct sockaddr_storage *out) {
    char port[16];
    struct addrinfo *found = NULL;
    const struct addrinfo hints = {.ai_family = AF_UNSPEC,
                                   .ai_socktype = SOCK_STREAM,
                                   .ai_flags = AI_NUMERICHOST | AI_PASSIVE};
    snprintf(port, sizeof port, "%d", o->port);
    if (o->port < 0 || o->port > 65535) return FAIL(ST_RANGE, "port %d", o->port);
    if (getaddrinfo(o->host, port, &hints, &found) != 0 || !found)
        return FAIL(ST_RANGE, "'%s' is no IP address (127.0.0.1: this machine alone)", o->host);
    memset(out, 0, sizeof *out);
    memcpy(out, found->ai_addr, found->ai_addrlen);
    freeaddrinfo(found);
    return ST_OK;
}

/* By trying it: whoever listens there refuses us the address. */
static status check_free(const server_options *o, const struct sockaddr_storage *address) {
    const int fd = socket(address->ss_family, SOCK_STREAM | SOCK_CLOEXEC, 0);
    if (fd < 0) return FAIL(ST_IO, "%s: %s", o->host, strerror(errno));
    const socklen_t n =
        address->ss_family == AF_INET6 ? sizeof(struct sockaddr_in6) : sizeof(struct sockaddr_in);
    status st = ST_OK;
    (void)setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &(int){1}, sizeof(int));
    if (address->ss_family == AF_INET6) /* as the daemon's: IPv4's port of the number is another */
        (void)setsockopt(fd, IPPROTO_IPV6, IPV6_V6ONLY, &(int){1}, sizeof(int));
    if (bind(fd, (const struct sockaddr *)address, n) != 0)
        st = FAIL(ST_IO, "cannot listen on %s port %d: %s", o->host, o->port, strerror(errno));
    close(fd);
    return st;
}

status server_check(const server_options *o) {
    struct sockaddr_storage address;
    TRY(address_of(o, &address));
    return check_free(o, &address);
}

static void end_reading(server *s) {
    pthread_mutex_lock(&s->lock);
    s->no_more = true;
    pthread_cond_signal(&s->arrived);
    pthread_mutex_unlock(&s->lock);
    pthread_join(s->reader, NULL);
}

static status start(server *s) {
    const server_options *o = &s->options;
    struct sockaddr_storage address;
    TRY(address_of(o, &address));
    TRY(check_free(o, &address));
    unsigned flags = MHD_USE_EPOLL_INTERNAL_THREAD | MHD_ALLOW_SUSPEND_RESUME | MHD_USE_ITC;
    if (address.ss_family == AF_INET6) flags |= MHD_USE_IPv6;
    s->daemon =
        MHD_start_daemon(flags, 0, NULL, NULL, on_request, s, MHD_OPTION_SOCK_ADDR, &address,
                         MHD_OPTION_NOTIFY_COMPLETED, on_completed, s, MHD_OPTION_NOTIFY_CONNECTION,
                         on_connection, s, MHD_OPTION_CONNECTION_LIMIT,
                         (unsigned)o->max_connections, MHD_OPTION_CONNECTION_MEMORY_LIMIT,
                         (size_t)HEADER_BYTES + EVENTS_BYTES, MHD_OPTION_CONNECTION_TIMEOUT,
                         (unsigned)(o->stall_timeout_s + 1), MHD_OPTION_LISTEN_BACKLOG_SIZE, 1024u,
                         o->threads > 1 ? MHD_OPTION_THREAD_POOL_SIZE : MHD_OPTION_END,
                         (unsigned)o->threads, MHD_OPTION_END);
    if (!s->daemon) return FAIL(ST_IO, "cannot listen on %s port %d", o->host, o->port);
    const union MHD_DaemonInfo *info = MHD_get_daemon_info(s->daemon, MHD_DAEMON_INFO_BIND_PORT);
    s->port = info ? info->port : o->port;
    if (pthread_create(&s->reader, NULL, read_thread, s) == 0) {
        if (pthread_create(&s->watch, NULL, watch_thread, s) == 0) return ST_OK;
        end_reading(s);
    }
    MHD_stop_daemon(s->daemon);
    return FAIL(ST_NOMEM, "a thread");
}

status server_open(server **out, const server_options *o, service *service_, const api_model *m) {
    *out = NULL;
    if (o->max_connections < 1 || o->max_body_bytes < 1 || o->threads < 1 || o->threads > 64)
        return FAIL(ST_RANGE, "connections, body size and threads must be positive");
    server *s = mem_alloc(1, sizeof *s);
    if (!s) return FAIL(ST_NOMEM, "server");
    s->options = *o;
    s->model = *m;
    s->service = service_;
    s->started_s = (int64_t)time(NULL);
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    s->secret = hash_u64((uint64_t)now.tv_nsec, (uint64_t)now.tv_sec + (uint64_t)getpid());
    timeline_start_real(&s->clock);
    pthread_mutex_init(&s->lock, NULL);
    pthread_cond_init(&s->arrived, NULL);
    s->last_unread = &s->unread;
    const status st = start(s);
    if (st != ST_OK) {
        pthread_cond_destroy(&s->arrived);
        pthread_mutex_destroy(&s->lock);
        mem_free(s);
        return st;
    }
    *out = s;
    return ST_OK;
}

int32_t server_port(const server *s) { return s->port; }

static bool any_busy(server *s) {
    bool busy = false;
    pthread_mutex_lock(&s->lock);
    for (peer *l = s->peers; l; l = l->next) busy |= l->since_ns == 0;
    pthread_mutex_unlock(&s->lock);
    return busy;
}

void server_close(server *s, double grace_s) {
    enum { FLUSH_MS = 2000 }; /* for the last bytes of answers that are complete */
    if (!s) return;
    /* Whoever comes now is refused, and another server may have the port. Closed it is only when no
     * thread of the daemon is left that may still take it out of its set of sockets. */
    const MHD_socket listening = MHD_quiesce_daemon(s->daemon);
    if (listening != MHD_INVALID_SOCKET) (void)shutdown(listening, SHUT_RDWR);
    end_reading(s);
    service_drain(s->service, grace_s);
    for (int32_t ms = 0; ms < FLUSH_MS && any_busy(s); ms += 10)
        nanosleep(&(struct timespec){.tv_nsec = 10000000L}, NULL);
    atomic_store(&s->closing, true);
    pthread_join(s->watch, NULL);
    MHD_stop_daemon(s->daemon);
    if (listening != MHD_INVALID_SOCKET) close(listening);
    pthread_cond_destroy(&s->arrived);
    pthread_mutex_destroy(&s->lock);
    mem_free(s);
}
