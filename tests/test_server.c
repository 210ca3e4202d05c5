/* test_server.c - the HTTP server over loopback with libcurl: every endpoint, streams, refusals,
 * clients that leave, read slowly or come in crowds, shutdown. AMALGAM_STREAMS=1000 makes the
 * crowd larger. */
#define _DEFAULT_SOURCE /* syscall */
#include "test.h"

#include "json.h"
#include "load.h"
#include "metrics.h"
#include "reply.h"
#include "server.h"
#include "utf8.h"
#include "vllm_keys.h"

#include <curl/curl.h>
#include <dirent.h>
#include <netinet/in.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

/* --- A server on a small random model --------------------------------------------------------- */

static const char model_folder[] = "build/tests/serve_model";

typedef struct {
    engine *engine;
    tokenizer *tok;
    chat_template *tpl;
    service *service;
    server *server;
    char url[64];
} fixture;

static void write_model(void) {
    static const char config[] =
        "{\"architectures\":[\"LlamaForCausalLM\"],\"model_type\":\"llama\",\"vocab_size\":1005,"
        "\"hidden_size\":64,\"intermediate_size\":64,\"num_hidden_layers\":1,\"head_dim\":32,"
        "\"num_attention_heads\":2,\"num_key_value_heads\":1,\"max_position_embeddings\":16384,"
        "\"rms_norm_eps\":1e-5,\"rope_theta\":10000.0,\"hidden_act\":\"silu\","
        "\"tie_word_embeddings\":false,\"bos_token_id\":1000,\"eos_token_id\":1001}";
    static const char *const copies[][2] = {
        {"tests/vectors/tokenizers/llama3/tokenizer.json", "tokenizer.json"},
        {"tests/vectors/chat/chatml.jinja", "chat_template.jinja"}};
    char path[256], *data;
    size_t n;
    assert_ok(file_write(path_join(path, sizeof path, model_folder, "config.json"), config,
                         strlen(config)));
    for (int32_t i = 0; i < COUNT_OF(copies); i++) {
        assert_ok(file_read(&data, &n, copies[i][0]));
        assert_ok(file_write(path_join(path, sizeof path, model_folder, copies[i][1]), data, n));
        mem_free(data);
    }
}

static double request_timeout_s = 2; /* of the next one */

static void open_fixture(fixture *f, int32_t max_seqs, int32_t max_queue, const char *key) {
    *f = (fixture){0};
    engine_options o = ENGINE_OPTIONS_DEFAULT;
    o.model = model_folder;
    o.synthetic = true;
    o.device_options.threads = 1;
    o.pages = 8192;
    o.policy.max_seqs = max_seqs;
    o.policy.max_queue = max_queue;
    o.max_requests = max_seqs + max_queue;
    o.max_tokens = 1 << 24;
    assert_ok(tokenizer_open(&f->tok, model_folder));
    const char *source = tokenizer_chat_template(f->tok, NULL);
    assert_ok(chat_template_open(&f->tpl, source, strlen(source), "test"));
    assert_ok(engine_open(&f->engine, &o, NULL, NULL));
    assert_ok(service_open(&f->service, f->engine, f->tok, o.max_requests));
    const api_model m = {.model = "tiny",
                         .tok = f->tok,
                         .tpl = f->tpl,
                         .bos = "",
                         .eos = "",
                         .ctx_max = 16384,
                         .vocab = 1005,
                         .n_max = 8};
    server_options so = SERVER_OPTIONS_DEFAULT;
    so.port = 0;
    so.api_key = key;
    so.max_body_bytes = 1 << 20;
    so.request_timeout_s = request_timeout_s;
    assert_ok(server_open(&f->server, &so, f->service, &m));
    snprintf(f->url, sizeof f->url, "http://127.0.0.1:%d", server_port(f->server));
}

static void close_fixture(fixture *f, double grace_s) {
    server_close(f->server, grace_s);
    service_close(f->service);
    engine_close(f->engine);
    chat_template_close(f->tpl);
    tokenizer_close(f->tok);
}

/* --- Requests --------------------------------------------------------------------------------- */

static size_t collect(char *data, size_t size, size_t n, void *user) {
    text_bytes(user, data, size * n);
    return size * n;
}

static CURL *request_of(const char *url, const char *path, const char *body, text *into) {
    char full[256];
    CURL *c = curl_easy_init();
    assert_non_null(c);
    snprintf(full, sizeof full, "%s%s", url, path);
    curl_easy_setopt(c, CURLOPT_URL, full);
    curl_easy_setopt(c, CURLOPT_NOSIGNAL, 1L);
    curl_easy_setopt(c, CURLOPT_PROXY, "");
    curl_easy_setopt(c, CURLOPT_TIMEOUT, 300L);
    curl_easy_setopt(c, CURLOPT_WRITEFUNCTION, collect);
    curl_easy_setopt(c, CURLOPT_WRITEDATA, into);
    if (body) (void)curl_easy_setopt(c, CURLOPT_COPYPOSTFIELDS, body);
    return c;
}

/* HTTP status; *into holds the body. */
static long call(const char *url, const char *path, const char *body, text *into) {
    text_clear(into);
    CURL *c = request_of(url, path, body, into);
    const CURLcode code = curl_easy_perform(c);
    if (code != CURLE_OK) fail_msg("%s: %s", path, curl_easy_strerror(code));
    long http = 0;
    curl_easy_getinfo(c, CURLINFO_RESPONSE_CODE, &http);
    curl_easy_cleanup(c);
    return http;
}

/* The status of a HEAD, which has no body. */
static long call_head(const char *url, const char *path) {
    text t = {0};
    CURL *c = request_of(url, path, NULL, &t);
    curl_easy_setopt(c, CURLOPT_NOBODY, 1L);
    assert_int_equal(curl_easy_perform(c), CURLE_OK);
    assert_int_equal(t.length, 0);
    long http = 0;
    curl_easy_getinfo(c, CURLINFO_RESPONSE_CODE, &http);
    curl_easy_cleanup(c);
    return http;
}

static json_t *parsed(const text *t) {
    json_t *v = json_loadb(t->data ? t->data : "", t->length, JSON_ALLOW_NUL, NULL);
    if (!v) fail_msg("no JSON: %s", t->data ? t->data : "");
    return v;
}

static json_t *call_json(const char *url, const char *path, const char *body, long want) {
    text t = {0};
    const long http = call(url, path, body, &t);
    if (http != want) fail_msg("%s %s: %ld, %s", path, body ? body : "", http, t.data);
    json_t *v = parsed(&t);
    text_free(&t);
    return v;
}

static const json_t *at(const json_t *v, const char *key) { return json_object_get(v, key); }
static const json_t *choice(const json_t *v, size_t i) {
    return json_array_get(at(v, "choices"), i);
}
static const char *words(const json_t *v) { return json_string_value(v); }

/* A metric's value by its full name; NaN when it is not there. */
static double metric(const char *url, const char *name) {
    text t = {0};
    assert_int_equal(call(url, "/metrics", NULL, &t), 200);
    double v = NAN;
    const size_t n = strlen(name);
    for (const char *line = t.data; line && *line; line = strchr(line, '\n')) {
        while (*line == '\n') line++;
        if (strncmp(line, name, n) == 0 && line[n] == '{') v = strtod(strchr(line, '}') + 1, NULL);
    }
    text_free(&t);
    return v;
}

static void wait_metric(const char *url, const char *name, double want, double seconds) {
    timeline t;
    timeline_start_real(&t);
    while (metric(url, name) != want) {
        if ((double)timeline_now_ns(&t) * 1e-9 > seconds)
            fail_msg("%s is %g and not %g after %g s", name, metric(url, name), want, seconds);
        nanosleep(&(struct timespec){.tv_nsec = 10000000}, NULL);
    }
}

/* Events of a stream: data lines in order; returns the number of those with choices. */
typedef struct {
    text words; /* joined */
    ids tokens;
    int32_t n_events;
    bool done, error;
    char finish[16];
    int64_t usage; /* completion tokens, -1 = no usage */
} heard;

static void hear(heard *h, const text *stream) {
    *h = (heard){.usage = -1};
    for (const char *p = stream->data; p && (p = strstr(p, "data: "));) {
        const char *end = strstr(p, "\n\n");
        if (!end) break; /* cut off */
        p += 6;
        if (strncmp(p, "[DONE]", 6) == 0) {
            h->done = true;
        } else {
            json_t *v = json_loadb(p, (size_t)(end - p), JSON_ALLOW_NUL, NULL);
            if (!v) fail_msg("an event is no JSON: %.*s", (int)(end - p), p);
            const json_t *c = choice(v, 0), *list = at(c, "token_ids");
            const json_t *piece = at(c, "text") ? at(c, "text") : at(at(c, "delta"), "content");
            if (c) h->n_events++;
            if (piece) text_bytes(&h->words, json_string_value(piece), json_string_length(piece));
            for (size_t i = 0; i < json_array_size(list); i++)
                ids_add(&h->tokens, (int32_t)json_integer_value(json_array_get(list, i)));
            if (words(at(c, "finish_reason")))
                snprintf(h->finish, sizeof h->finish, "%s", words(at(c, "finish_reason")));
            if (at(v, "usage"))
                h->usage = json_integer_value(at(at(v, "usage"), "completion_tokens"));
            h->error |= at(v, "error") != NULL;
            json_decref(v);
        }
        p = end;
    }
    text_bytes(&h->words, "", 0);
}

static void hear_free(heard *h) {
    text_free(&h->words);
    ids_free(&h->tokens);
}

/* Many requests at once, each into its own text. */
typedef struct {
    CURLM *multi;
    CURL *easy[2048];
    text out[2048];
    int32_t n;
} crowd;

static crowd *open_crowd(void) {
    crowd *c = mem_alloc(1, sizeof *c);
    c->multi = curl_multi_init();
    return c;
}

static void join_crowd(crowd *c, const char *url, const char *path, const char *body) {
    assert_true(c->n < COUNT_OF(c->easy));
    c->easy[c->n] = request_of(url, path, body, &c->out[c->n]);
    curl_multi_add_handle(c->multi, c->easy[c->n]);
    c->n++;
}

static void leave_crowd(crowd *c, int32_t i) {
    if (!c->easy[i]) return;
    curl_multi_remove_handle(c->multi, c->easy[i]);
    curl_easy_cleanup(c->easy[i]);
    c->easy[i] = NULL;
}

/* Until all have ended, or (n_bytes > 0) each has heard so much. */
static void run_crowd(crowd *c, size_t n_bytes) {
    for (int running = 1; running;) {
        curl_multi_perform(c->multi, &running);
        bool enough = n_bytes > 0;
        for (int32_t i = 0; i < c->n; i++)
            enough = enough && (!c->easy[i] || c->out[i].length >= n_bytes);
        if (enough) return;
        if (running) curl_multi_poll(c->multi, NULL, 0, 100, NULL);
    }
}

static void close_crowd(crowd *c) {
    for (int32_t i = 0; i < c->n; i++) leave_crowd(c, i);
    for (int32_t i = 0; i < c->n; i++) text_free(&c->out[i]);
    curl_multi_cleanup(c->multi);
    mem_free(c);
}

/* --- Tests ------------------------------------------------------------------------------------ */

static int open_shared(void **state) {
    fixture *f = mem_alloc(1, sizeof *f);
    write_model();
    open_fixture(f, 128, 2048, NULL);
    *state = f;
    return 0;
}

static int close_shared(void **state) {
    fixture *f = *state;
    close_fixture(f, 5);
    mem_free(f);
    return 0;
}

static void plain_endpoints_answer(void **state) {
    const fixture *f = *state;
    json_t *v = call_json(f->url, "/v1/models", NULL, 200);
    assert_string_equal(words(at(json_array_get(at(v, "data"), 0), "id")), "tiny");
    json_t *one = call_json(f->url, "/v1/models/t%69ny", NULL, 200);
    assert_true(json_equal(one, json_array_get(at(v, "data"), 0)));
    json_decref(one);
    json_decref(call_json(f->url, "/v1/models/tin", NULL, 404));
    json_decref(call_json(f->url, "/v1/models/", NULL, 404));
    json_decref(call_json(f->url, "/v1/models/tiny", "{}", 405));
    json_decref(v);
    json_decref(call_json(f->url, "/health", NULL, 200));
    json_decref(call_json(f->url, "/ping", NULL, 200));
    v = call_json(f->url, "/version", NULL, 200);
    assert_non_null(words(at(v, "version")));
    json_decref(v);
    v = call_json(f->url, "/tokenize", "{\"prompt\":\"hello there\"}", 200);
    const json_t *tokens = at(v, "tokens");
    assert_int_equal(json_integer_value(at(v, "count")), json_array_size(tokens));
    assert_int_equal(json_integer_value(json_array_get(tokens, 0)), 1000); /* bos */
    json_t *ask = json_pack("{s:O}", "tokens", tokens);
    char *body = json_dumps(ask, JSON_COMPACT);
    json_t *back = call_json(f->url, "/detokenize", body, 200);
    assert_non_null(strstr(words(at(back, "prompt")), "hello there"));
    free(body);
    json_decref(ask);
    json_decref(back);
    json_decref(v);
    v = call_json(f->url, "/tokenize", "{\"messages\":[{\"role\":\"user\",\"content\":\"hi\"}]}",
                  200);
    assert_true(json_integer_value(at(v, "count")) > 5);
    json_decref(v);
    v = call_json(f->url, "/tokenizer_info", NULL, 200);
    assert_string_equal(words(at(v, "chat_template")), tokenizer_chat_template(f->tok, NULL));
    assert_true(json_is_null(at(v, "eos_token")) && json_is_null(at(v, "bos_token")));
    json_decref(v);
    json_decref(call_json(f->url, "/reset_prefix_cache", "", 200));
    json_decref(call_json(f->url, "/nothing", NULL, 404));
    json_decref(call_json(f->url, "/v1/completions", NULL, 405));
    json_decref(call_json(f->url, "/health", "{}", 405));
    assert_int_equal(call_head(f->url, "/health"), 200);
    assert_int_equal(call_head(f->url, "/v1/completions"), 405);
    assert_true(metric(f->url, "vllm:num_requests_running") >= 0);
    assert_true(metric(f->url, "vllm:time_to_first_token_seconds_count") >= 0);
}

/* Requests whose prompts have had at most `edge` tokens, by the histogram; each bucket has those
 * before it in it. */
static double prompts_up_to(const fixture *f, const char *edge) {
    static const char name[] = "\nvllm:request_prompt_tokens_bucket{model_name=\"m\"";
    char want[32];
    text t = {0};
    double before = 0, found = -1;
    snprintf(want, sizeof want, "le=\"%s\"} ", edge);
    service_metrics(f->service, "m", &t);
    assert_ok(text_status(&t));
    for (const char *line = t.data; (line = strstr(line, name)); line++) {
        const char *le = strstr(line, "le=");
        const double n = strtod(strchr(le, ' '), NULL);
        assert_true(n >= before);
        before = n;
        if (strncmp(le, want, strlen(want)) == 0) found = n;
    }
    text_free(&t);
    assert_true(found >= 0);
    return found;
}

/* Prompt tokens that a request of 130 equal ones finds in the cache. */
static int64_t cached(const fixture *f, int32_t token, const char *more) {
    text body = {0};
    for (int32_t i = 0; i < 130; i++) text_add(&body, "%s%d", i ? "," : "{\"prompt\":[", token);
    text_add(&body, "],\"max_tokens\":1%s}", more);
    assert_ok(text_status(&body));
    json_t *v = call_json(f->url, "/v1/completions", body.data, 200);
    const json_t *details = at(at(v, "usage"), "prompt_tokens_details");
    const int64_t n = json_integer_value(at(details, "cached_tokens"));
    json_decref(v);
    text_free(&body);
    return n;
}

/* Who does not know the salt finds nothing of who does. */
static void a_salt_keeps_a_prefix_apart(void **state) {
    const fixture *f = *state;
    assert_int_equal(cached(f, 77, ",\"cache_salt\":\"a\""), 0);
    assert_int_equal(cached(f, 77, ",\"cache_salt\":\"a\""), 128); /* whole pages */
    assert_int_equal(cached(f, 77, ",\"cache_salt\":\"b\""), 0);
    assert_int_equal(cached(f, 77, ""), 0);
    assert_int_equal(cached(f, 77, ""), 128);
    assert_int_equal(cached(f, 77, ",\"n\":2"), 128); /* of a prompt, however many answers it has */
    json_decref(call_json(f->url, "/reset_prefix_cache", "", 200));
    assert_int_equal(cached(f, 77, ""), 0);
}

/* Requests that ended for this reason. */
static double ended(const fixture *f, const char *reason) {
    char want[64];
    text t = {0};
    service_metrics(f->service, "m", &t);
    assert_ok(text_status(&t));
    snprintf(want, sizeof want, "finished_reason=\"%s\"} ", reason);
    const char *line = strstr(t.data, want);
    assert_non_null(line);
    const double n = strtod(line + strlen(want), NULL);
    text_free(&t);
    return n;
}

static void ends_are_counted_by_their_reasons(void **state) {
    const fixture *f = *state;
    static const char *const bodies[] = {
        "{\"prompt\":[5],\"max_tokens\":2,\"ignore_eos\":true}",
        "{\"prompt\":[5],\"max_tokens\":9,\"logit_bias\":{\"7\":100},\"stop_token_ids\":[7]}"};
    static const char *const reasons[] = {"length", "stop"};
    for (int32_t i = 0; i < 2; i++) {
        wait_metric(f->url, "amalgam:jobs", 0, 5);
        const double own = ended(f, reasons[i]), other = ended(f, reasons[1 - i]);
        json_decref(call_json(f->url, "/v1/completions", bodies[i], 200));
        wait_metric(f->url, "amalgam:jobs", 0, 5);
        assert_true(ended(f, reasons[i]) == own + 1);
        assert_true(ended(f, reasons[1 - i]) == other);
    }
}

/* Parts of a message are lines of it. */
static void parts_of_a_message_are_joined(void **state) {
    const fixture *f = *state;
    static const char *const contents[] = {
        "\"one\\ntwo\"",
        "[{\"type\":\"text\",\"text\":\"one\"},{\"type\":\"text\",\"text\":\"two\"}]"};
    json_t *v[2];
    for (int32_t i = 0; i < 2; i++) {
        char body[160];
        snprintf(body, sizeof body, "{\"messages\":[{\"role\":\"user\",\"content\":%s}]}",
                 contents[i]);
        v[i] = call_json(f->url, "/tokenize", body, 200);
    }
    assert_true(json_equal(at(v[0], "tokens"), at(v[1], "tokens")));
    json_decref(v[0]);
    json_decref(v[1]);
}

/* A prompt that is only scored has no output tokens, though one is drawn. */
static void no_output_counts_as_none(void **state) {
    const fixture *f = *state;
    wait_metric(f->url, "amalgam:jobs", 0, 5);
    const double sum = metric(f->url, "vllm:request_generation_tokens_sum"),
                 count = metric(f->url, "vllm:request_generation_tokens_count");
    json_decref(call_json(f->url, "/v1/completions",
                          "{\"prompt\":[5,6,7],\"max_tokens\":0,\"echo\":true,\"logprobs\":1}",
                          200));
    wait_metric(f->url, "vllm:request_generation_tokens_count", count + 1, 5);
    assert_true(metric(f->url, "vllm:request_generation_tokens_sum") == sum);
}

static void metrics_are_text_that_prometheus_reads(void **state) {
    const fixture *f = *state;
    wait_metric(f->url, "amalgam:jobs", 0, 5);
    const double of_2 = prompts_up_to(f, "2"), of_5 = prompts_up_to(f, "5");
    json_decref(call_json(f->url, "/v1/completions",
                          "{\"prompt\":[5,6,7,8,9],\"max_tokens\":2,\"ignore_eos\":true}", 200));
    wait_metric(f->url, "amalgam:jobs", 0, 5);
    assert_true(prompts_up_to(f, "2") == of_2);
    assert_true(prompts_up_to(f, "5") == of_5 + 1); /* at most 5: the edge is in it */
    assert_true(prompts_up_to(f, "+Inf") == metric(f->url, "vllm:request_prompt_tokens_count"));
    text t = {0};
    service_metrics(f->service, "a\"b\\c\nd", &t); /* a label's value is escaped */
    assert_non_null(strstr(t.data, "running{model_name=\"a\\\"b\\\\c\\nd\",engine=\"0\"} 0\n"));
    text_free(&t);
}

static void prompts_come_in_four_forms(void **state) {
    const fixture *f = *state;
    json_t *known = call_json(f->url, "/tokenize", "{\"prompt\":\"one two\"}", 200);
    char *list = json_dumps(at(known, "tokens"), JSON_COMPACT);
    text body = {0};
    static const char tail[] = ",\"max_tokens\":12,\"temperature\":0,\"ignore_eos\":true}";
    const char *forms[4][2] = {
        {"\"one two\"", ""}, {"[\"one two\",\"three\"]", ""}, {"", ""}, {"[", "]"}};
    char first[512] = "";
    for (int32_t i = 0; i < 4; i++) {
        text_clear(&body);
        text_add(&body, "{\"prompt\":%s%s%s%s", forms[i][0], i >= 2 ? list : "", forms[i][1], tail);
        json_t *v = call_json(f->url, "/v1/completions", body.data, 200);
        assert_int_equal(json_array_size(at(v, "choices")), i == 1 ? 2 : 1);
        const char *got = words(at(choice(v, 0), "text"));
        if (i == 0) snprintf(first, sizeof first, "%s", got);
        assert_string_equal(got, first);
        assert_string_equal(words(at(choice(v, 0), "finish_reason")), "length");
        assert_int_equal(json_integer_value(at(at(v, "usage"), "completion_tokens")),
                         i == 1 ? 24 : 12);
        json_decref(v);
    }
    text_free(&body);
    free(list);
    json_decref(known);
}

/* A prompt begins with what the tokenizer puts there, a chat does not; or as add_special_tokens
 * has it. */
static void special_tokens_are_added_as_asked(void **state) {
    const fixture *f = *state;
    static const char *const asks[] = {"", ",\"add_special_tokens\":true",
                                       ",\"add_special_tokens\":false"};
    static const char *const paths[] = {"/v1/completions", "/v1/chat/completions"};
    for (int32_t chat = 0; chat < 2; chat++) {
        json_int_t n[3];
        for (int32_t i = 0; i < 3; i++) {
            char body[200];
            snprintf(body, sizeof body, "{\"max_tokens\":1%s,%s}", asks[i],
                     chat ? "\"messages\":[{\"role\":\"user\",\"content\":\"a\"}]"
                          : "\"prompt\":\"one two\"");
            json_t *v = call_json(f->url, paths[chat], body, 200);
            n[i] = json_integer_value(at(at(v, "usage"), "prompt_tokens"));
            json_decref(v);
        }
        assert_int_equal(n[1], n[2] + 1); /* <|begin_of_text|> */
        assert_int_equal(n[0], chat ? n[2] : n[1]);
    }
}

/* The last tokens of a prompt are a prompt of these. */
static void a_prompt_is_cut_to_its_end(void **state) {
    const fixture *f = *state;
    static const char tail[] = ",\"max_tokens\":12,\"temperature\":0,\"ignore_eos\":true}";
    static const struct {
        const char *prompt, *shorter;
        json_int_t n;
    } cases[] = {{"[7,8,9,10,11]", "[9,10,11]", 3}, {"[[7,8,9],[5]]", "[[7,8,9],[5]]", 4}};
    for (int32_t i = 0; i < COUNT_OF(cases); i++) {
        json_t *v[3];
        for (int32_t k = 0; k < 3; k++) {
            text body = {0};
            text_add(&body, "{\"prompt\":%s%s%s", k == 1 ? cases[i].shorter : cases[i].prompt,
                     k == 0 ? ",\"truncate_prompt_tokens\":3" : "", tail);
            v[k] = call_json(f->url, "/v1/completions", body.data, 200);
            text_free(&body);
        }
        assert_int_equal(json_integer_value(at(at(v[0], "usage"), "prompt_tokens")), cases[i].n);
        assert_string_equal(words(at(choice(v[0], 0), "text")), words(at(choice(v[1], 0), "text")));
        if (i == 0) /* twin: those before them say something */
            assert_string_not_equal(words(at(choice(v[0], 0), "text")),
                                    words(at(choice(v[2], 0), "text")));
        for (int32_t k = 0; k < 3; k++) json_decref(v[k]);
    }
    text body = {0}; /* cut before it is too long; chat, too */
    text_add(&body, "{\"truncate_prompt_tokens\":16000,\"max_tokens\":1,\"prompt\":[5");
    for (int32_t i = 1; i < 20000; i++) text_add(&body, ",%d", i % 1000);
    text_add(&body, "]}");
    json_decref(call_json(f->url, "/v1/completions", body.data, 200));
    text_free(&body);
    json_t *v = call_json(f->url, "/v1/chat/completions",
                          "{\"messages\":[{\"role\":\"user\",\"content\":\"hello there\"}],"
                          "\"max_tokens\":1,\"truncate_prompt_tokens\":4}",
                          200);
    assert_int_equal(json_integer_value(at(at(v, "usage"), "prompt_tokens")), 4);
    json_decref(v);
}

static void draws_follow_the_seed(void **state) {
    const fixture *f = *state;
    static const char ask[] = "{\"prompt\":\"x\",\"max_tokens\":24,\"n\":3,\"seed\":%d,"
                              "\"ignore_eos\":true,\"logprobs\":3}";
    char body[3][160];
    json_t *v[3];
    for (int32_t i = 0; i < 3; i++) {
        snprintf(body[i], sizeof body[i], ask, i < 2 ? 7 : 8);
        v[i] = call_json(f->url, "/v1/completions", body[i], 200);
    }
    for (size_t k = 0; k < 3; k++)
        assert_string_equal(words(at(choice(v[0], k), "text")), words(at(choice(v[1], k), "text")));
    assert_string_not_equal(words(at(choice(v[0], 0), "text")), words(at(choice(v[0], 1), "text")));
    assert_string_not_equal(words(at(choice(v[0], 0), "text")), words(at(choice(v[2], 0), "text")));
    const json_t *l = at(choice(v[0], 0), "logprobs");
    assert_int_equal(json_array_size(at(l, "tokens")), 24);
    assert_int_equal(json_array_size(at(l, "token_logprobs")), 24);
    assert_int_equal(json_array_size(at(l, "text_offset")), 24);
    assert_int_equal(json_object_size(json_array_get(at(l, "top_logprobs"), 0)), 3);
    for (int32_t i = 0; i < 3; i++) json_decref(v[i]);
}

/* Characters of the first n bytes. */
static json_int_t count_chars(const char *s, size_t n) {
    json_int_t chars = 0;
    for (size_t i = 0; i < n; i++) chars += (s[i] & 0xC0) != 0x80;
    return chars;
}

/* Offsets count characters: at each of them the text goes on with its token, where that is plain
 * ASCII. Bytes are those of the text, where characters are split over tokens, too. */
static void tokens_are_found_in_the_text(void **state) {
    const fixture *f = *state;
    static const char ask[] = "{%s,\"max_tokens\":300,\"seed\":11,\"ignore_eos\":true,"
                              "\"return_token_ids\":true,\"logprobs\":%s}";
    char body[512];
    snprintf(body, sizeof body, ask, "\"prompt\":\"x\"", "1");
    json_t *v = call_json(f->url, "/v1/completions", body, 200);
    const char *s = words(at(choice(v, 0), "text"));
    const json_t *l = at(choice(v, 0), "logprobs");
    int32_t n_found = 0, n_shifted = 0;
    for (size_t i = 0; i < json_array_size(at(l, "tokens")); i++) {
        const char *token = words(json_array_get(at(l, "tokens"), i));
        const json_int_t offset = json_integer_value(json_array_get(at(l, "text_offset"), i));
        if (token[0] == '<' || count_chars(token, strlen(token)) != (json_int_t)strlen(token))
            continue;
        const char *here = s;
        for (json_int_t k = 0; k < offset; k++)
            while ((*++here & 0xC0) == 0x80) {
            }
        n_found += strncmp(here, token, strlen(token)) == 0;
        n_shifted += here - s != offset && strncmp(here, token, strlen(token)) == 0;
    }
    assert_true(n_found > 100);
    assert_true(n_shifted > 50); /* the twin: as bytes those offsets are wrong */
    json_decref(v);

    snprintf(body, sizeof body, ask, "\"messages\":[{\"role\":\"user\",\"content\":\"x\"}]",
             "true");
    v = call_json(f->url, "/v1/chat/completions", body, 200);
    l = at(at(choice(v, 0), "logprobs"), "content");
    text bytes = {0}, repaired = {0};
    for (size_t i = 0; i < json_array_size(l); i++) {
        const json_t *id = json_array_get(at(choice(v, 0), "token_ids"), i),
                     *list = at(json_array_get(l, i), "bytes");
        if (tokenizer_is_special(f->tok, (int32_t)json_integer_value(id))) continue;
        for (size_t k = 0; k < json_array_size(list); k++)
            text_bytes(&bytes, &(char){(char)json_integer_value(json_array_get(list, k))}, 1);
    }
    utf8_repair(&repaired, bytes.data, bytes.length);
    assert_string_equal(repaired.data, words(at(at(choice(v, 0), "message"), "content")));
    assert_false(utf8_valid(bytes.data, bytes.length)); /* there were parts of characters */
    text_free(&bytes);
    text_free(&repaired);
    json_decref(v);
}

/* The end tokens of the tokenizer's files end a text as well, unless none shall. */
static void the_tokenizer_knows_ends(void **state) {
    (void)state;
    tokenizer *tok;
    assert_ok(tokenizer_open(&tok, "workloads/tiny"));
    const api_model m = {.model = "tiny", .tok = tok, .ctx_max = 100, .vocab = 2048, .n_max = 1};
    int32_t n;
    const int32_t *eos = tokenizer_eos(tok, &n);
    assert_true(n > 0);
    static const char *const asks[] = {"{\"prompt\":\"a\",\"stop_token_ids\":[7]}",
                                       "{\"prompt\":\"a\",\"stop_token_ids\":[7],"
                                       "\"ignore_eos\":true}"};
    for (int32_t i = 0; i < 2; i++) {
        api_request r;
        assert_ok(api_parse(&r, &m, false, asks[i], strlen(asks[i]), 1));
        assert_int_equal(r.n_stop_tokens, i ? 1 : 1 + n);
        assert_int_equal(r.stop_token[0], 7);
        for (int32_t k = 1; k < r.n_stop_tokens; k++) assert_int_equal(r.stop_token[k], eos[k - 1]);
        api_request_free(&r);
    }
    tokenizer_close(tok);
}

/* Without a tokenizer no text can end an answer: refused, not ignored. */
static void stop_strings_want_a_tokenizer(void **state) {
    (void)state;
    static const char body[] = "{\"prompt\":[1],\"stop\":\"5\"}",
                      none[] = "{\"prompt\":[1],\"stop\":[],\"stop_token_ids\":[5]}";
    const api_model m = {.model = "ids", .ctx_max = 100, .vocab = 10, .n_max = 1};
    api_request r;
    assert_status(api_parse(&r, &m, false, body, strlen(body), 1), ST_UNSUPPORTED);
    assert_non_null(strstr(fail_message(), "'stop'"));
    assert_ok(api_parse(&r, &m, false, none, strlen(none), 1));
    api_request_free(&r);
}

/* The last that is taken, and the first that is refused, of what the context and the vocabulary
 * bound: a context of 5, a vocabulary of 10. */
static void limits_are_where_they_are_said_to_be(void **state) {
    (void)state;
    static const struct {
        const char *body, *why; /* NULL: taken */
    } cases[] = {
        {"{\"prompt\":[1,2,3,4],\"max_tokens\":1}", NULL},
        {"{\"prompt\":[1,2,3,4],\"max_tokens\":2}", "exceed this model's context of 5"},
        {"{\"prompt\":[1,2,3,4,5]}", "the prompt has 5 tokens, this model's context takes 4"},
        {"{\"prompt\":[9]}", NULL},
        {"{\"prompt\":[10]}", "token 10 is outside the vocabulary of 10"},
        {"{\"prompt\":[1],\"logit_bias\":{\"9\":1}}", NULL},
        {"{\"prompt\":[1],\"logit_bias\":{\"10\":1}}", "token 10 is outside"},
        {"{\"prompt\":[1],\"max_tokens\":4,\"min_tokens\":4}", NULL},
        {"{\"prompt\":[1],\"max_tokens\":3,\"min_tokens\":4}", "is more than the 3"},
        {"{\"prompt\":[1],\"n\":2}", NULL},
        {"{\"prompt\":[1],\"n\":3}", "n"},
    };
    const api_model m = {.model = "ids", .ctx_max = 5, .vocab = 10, .n_max = 2};
    for (int32_t i = 0; i < COUNT_OF(cases); i++) {
        api_request r;
        const status st = api_parse(&r, &m, false, cases[i].body, strlen(cases[i].body), 1);
        if (cases[i].why) assert_non_null(strstr(fail_message(), cases[i].why));
        if (cases[i].why)
            assert_status(st, ST_RANGE);
        else
            assert_ok(st);
        if (st == ST_OK) api_request_free(&r);
    }
}

/* A chat says by "logprobs" that it wants any. */
static void top_logprobs_want_logprobs(void **state) {
    (void)state;
    static const char bare[] = "{\"messages\":[],\"top_logprobs\":2}",
                      both[] = "{\"messages\":[],\"top_logprobs\":2,\"logprobs\":true}";
    const api_model m = {.model = "ids", .ctx_max = 5, .vocab = 10, .n_max = 2};
    api_request r;
    assert_status(api_parse(&r, &m, true, bare, strlen(bare), 1), ST_USAGE);
    assert_non_null(strstr(fail_message(), "'top_logprobs' without"));
    assert_status(api_parse(&r, &m, true, both, strlen(both), 1), ST_UNSUPPORTED);
    assert_non_null(strstr(fail_message(), "no chat template")); /* came that far */
}

/* JSON has no infinity: a token that the model gives no chance stands with OpenAI's -9999. */
static void no_chance_is_a_number(void **state) {
    (void)state;
    static const char body[] = "{\"prompt\":[1,2,3],\"echo\":true,\"max_tokens\":0,\"logprobs\":0}";
    const api_model m = {.model = "ids", .ctx_max = 5, .vocab = 10, .n_max = 2};
    api_request r;
    job *j;
    assert_ok(api_parse(&r, &m, false, body, strlen(body), 1));
    assert_ok(job_new(&j, &r, NULL, NULL, NULL));
    job_choice *c = &j->choice[0];
    assert_int_equal(c->n_tokens, 3);
    c->token[1].logprob = -INFINITY;
    c->token[2].logprob = -0.5f;
    c->n_ready = c->n_tokens;
    c->finish = FINISH_LENGTH;
    text t = {0};
    reply_whole(&t, &(reply_head){.model = "ids", .id = "cmpl-1"}, j);
    assert_ok(text_status(&t));
    json_t *v;
    assert_ok(json_parse(&v, t.data, t.length, "the reply"));
    const json_t *list = at(at(choice(v, 0), "logprobs"), "token_logprobs");
    assert_int_equal(json_array_size(list), 3);
    assert_true(json_is_null(json_array_get(list, 0))); /* nothing came before it */
    assert_true(json_number_value(json_array_get(list, 1)) == -9999);
    assert_true(json_number_value(json_array_get(list, 2)) == -0.5);
    json_decref(v);
    text_free(&t);
    job_release(j);
}

/* Where nothing computes them there are none, and no zeros in their place. */
static void made_up_tokens_have_no_logprobs(void **state) {
    (void)state;
    static const struct {
        const char *body;
        bool refused;
    } cases[] = {{"{\"prompt\":[1]}", false},
                 {"{\"prompt\":[1],\"logprobs\":0}", true},
                 {"{\"prompt\":[1],\"prompt_logprobs\":0}", true}};
    for (int32_t made_up = 0; made_up < 2; made_up++)
        for (int32_t i = 0; i < COUNT_OF(cases); i++) {
            const api_model m = {
                .model = "ids", .ctx_max = 100, .vocab = 10, .n_max = 1, .made_up = made_up};
            api_request r;
            const status st = api_parse(&r, &m, false, cases[i].body, strlen(cases[i].body), 1);
            assert_int_equal(st, made_up && cases[i].refused ? ST_UNSUPPORTED : ST_OK);
            if (st == ST_OK) api_request_free(&r);
        }
}

/* The text of a greedy run; then the same cut at a stop string, whole and streamed. */
static void stop_strings_cut_and_never_leak(void **state) {
    const fixture *f = *state;
    json_t *v = call_json(f->url, "/v1/completions",
                          "{\"prompt\":\"stop\",\"max_tokens\":60,\"temperature\":0.9,\"seed\":3,"
                          "\"ignore_eos\":true}",
                          200);
    const char *all = words(at(choice(v, 0), "text"));
    size_t from = strlen(all) / 2;
    while ((all[from] & 0xC0) == 0x80 || all[from] < ' ') from++; /* a character's beginning */
    size_t n = 4;
    while ((all[from + n] & 0xC0) == 0x80) n++;
    json_t *ask = json_pack("{s:s, s:i, s:f, s:i, s:b, s:[s%, s], s:b}", "prompt", "stop",
                            "max_tokens", 60, "temperature", 0.9, "seed", 3, "ignore_eos", 1,
                            "stop", all + from, n, "never to be seen", "stream", 0);
    char *body = json_dumps(ask, JSON_COMPACT);
    json_t *cut = call_json(f->url, "/v1/completions", body, 200);
    const char *got = words(at(choice(cut, 0), "text"));
    const char *first = strstr(all, "");
    char stop[16] = "";
    memcpy(stop, all + from, n);
    first = strstr(all, stop);
    assert_int_equal(strlen(got), first - all);
    assert_memory_equal(got, all, strlen(got));
    assert_string_equal(words(at(choice(cut, 0), "finish_reason")), "stop");
    free(body);
    json_object_set_new(ask, "stream", json_true());
    body = json_dumps(ask, JSON_COMPACT);
    text stream = {0};
    assert_int_equal(call(f->url, "/v1/completions", body, &stream), 200);
    heard h;
    hear(&h, &stream);
    assert_string_equal(h.words.data, got);
    assert_string_equal(h.finish, "stop");
    assert_true(h.done);
    hear_free(&h);
    text_free(&stream);
    free(body);
    json_decref(ask);
    json_decref(cut);
    json_decref(v);
}

/* The same text with what stops it, a string or a token, and without, whole and streamed; and with
 * special tokens in it. */
static void what_stops_can_be_kept(void **state) {
#define HEADERS "<|start_header_id|><|start_header_id|>"
    const fixture *f = *state;
    static const char *const keeps[] = {"", ",\"include_stop_str_in_output\":true",
                                        ",\"include_stop_str_in_output\":true,"
                                        "\"skip_special_tokens\":false",
                                        ",\"skip_special_tokens\":false"};
    static const struct {
        const char *asked, *text[4];
    } cases[] = {
        /* "A" is token 32, and all that comes */
        {"\"logit_bias\":{\"32\":100},\"stop\":\"AAA\"", {"", "AAA", "AAA", ""}},
        {"\"logit_bias\":{\"32\":100},\"stop\":[\"AA\",\"AAA\"]", {"", "AA", "AA", ""}},
        {"\"logit_bias\":{\"32\":100},\"stop\":\"AA\",\"min_tokens\":3",
         {"AA", "AAAA", "AAAA", "AA"}},
        {"\"logit_bias\":{\"32\":100},\"stop_token_ids\":[32]", {"", "A", "A", ""}},
        {"\"logit_bias\":{\"1001\":100}", {"", "", "<|end_of_text|>", ""}}, /* a special one */
        {"\"logit_bias\":{\"1002\":100},\"max_tokens\":2", {"", "", HEADERS, HEADERS}}};
#undef HEADERS
    for (int32_t i = 0; i < COUNT_OF(cases); i++)
        for (int32_t keep = 0; keep < COUNT_OF(keeps); keep++)
            for (int32_t streamed = 0; streamed < 2; streamed++) {
                text body = {0}, stream = {0};
                const char *finish = strstr(cases[i].asked, "max_tokens") ? "length" : "stop";
                text_add(&body, "{\"prompt\":\"a\",\"temperature\":0,%s%s%s}", cases[i].asked,
                         keeps[keep], streamed ? ",\"stream\":true" : "");
                assert_int_equal(call(f->url, "/v1/completions", body.data, &stream), 200);
                if (streamed) {
                    heard h;
                    hear(&h, &stream);
                    assert_string_equal(h.words.data ? h.words.data : "", cases[i].text[keep]);
                    assert_string_equal(h.finish, finish);
                    hear_free(&h);
                } else {
                    json_t *v = parsed(&stream);
                    assert_string_equal(words(at(choice(v, 0), "text")), cases[i].text[keep]);
                    assert_string_equal(words(at(choice(v, 0), "finish_reason")), finish);
                    json_decref(v);
                }
                text_free(&body);
                text_free(&stream);
            }
}

/* The n tokens of a greedy answer, which lie in *v. `asked`: what the body has besides. */
static const json_t *tokens_of(const fixture *f, json_t **v, int32_t n, const char *asked) {
    text body = {0};
    text_add(&body,
             "{\"prompt\":\"bend\",\"max_tokens\":%d,\"temperature\":0,"
             "\"return_token_ids\":true%s}",
             n, asked);
    *v = call_json(f->url, "/v1/completions", body.data, 200);
    text_free(&body);
    return at(choice(*v, 0), "token_ids");
}

static json_int_t id_at(const json_t *tokens, size_t i) {
    return json_integer_value(json_array_get(tokens, i));
}

static int32_t times_of(const json_t *tokens, json_int_t id, size_t n) {
    int32_t times = 0;
    for (size_t i = 0; i < n && i < json_array_size(tokens); i++) times += id_at(tokens, i) == id;
    return times;
}

static void logits_are_biased_and_penalised(void **state) {
    const fixture *f = *state;
    enum { N = 20 };
    json_t *v;
    const json_t *tokens = tokens_of(f, &v, N, ",\"ignore_eos\":true,\"logit_bias\":{\"65\":100}");
    assert_int_equal(times_of(tokens, 65, N), N);
    json_decref(v);
    tokens = tokens_of(f, &v, N, ",\"ignore_eos\":true,\"logit_bias\":{\"66\":100,\"65\":100}");
    const int32_t plain = times_of(tokens, 65, N);
    assert_int_equal(times_of(tokens, 66, N), N - plain);
    json_decref(v);
    /* Two below for each time: neither comes three times more often, as logits are within 4. */
    tokens = tokens_of(f, &v, N,
                       ",\"ignore_eos\":true,\"logit_bias\":{\"66\":100,\"65\":100},"
                       "\"frequency_penalty\":2,\"logprobs\":1");
    assert_true(times_of(tokens, 65, N) >= N / 4 && times_of(tokens, 66, N) >= N / 4);
    assert_true(plain < N / 4 || plain > 3 * N / 4); /* twin */
    /* Log-probabilities are of the model: it does not think of these. */
    const json_t *logprobs = at(at(choice(v, 0), "logprobs"), "token_logprobs");
    for (size_t i = 0; i < N; i++) assert_true(json_real_value(json_array_get(logprobs, i)) < -1);
    json_decref(v);
    /* Once: then the other one, which is an end as long as it may be. */
    tokens = tokens_of(f, &v, N,
                       ",\"ignore_eos\":true,\"logit_bias\":{\"66\":96,\"65\":97,\"64\":90},"
                       "\"presence_penalty\":2,\"repetition_penalty\":1.02");
    assert_true(times_of(tokens, 65, N) > 0 && times_of(tokens, 66, N) > 0);
    json_decref(v);
    json_t *first;
    tokens = tokens_of(f, &first, N, ",\"ignore_eos\":true");
    char ban[80];
    snprintf(ban, sizeof ban, ",\"ignore_eos\":true,\"logit_bias\":{\"%d\":-100}",
             (int)id_at(tokens, 0));
    const json_t *without = tokens_of(f, &v, N, ban);
    assert_int_equal(times_of(without, id_at(tokens, 0), N), 0);
    json_decref(v);
    json_decref(first);
}

/* A stop token, and a stop string, that would come early: not before min_tokens. */
static void an_answer_has_its_least_length(void **state) {
    const fixture *f = *state;
    enum { N = 40, LEAST = 11 };
    json_t *v, *cut;
    const json_t *tokens = tokens_of(f, &v, N, ",\"ignore_eos\":true");
    const json_int_t stop = id_at(tokens, 3);
    char ask[200];
    snprintf(ask, sizeof ask, ",\"ignore_eos\":true,\"stop_token_ids\":[%d]", (int)stop);
    const json_t *early = tokens_of(f, &cut, N, ask);
    assert_true(json_array_size(early) <= 4); /* twin */
    json_decref(cut);
    snprintf(ask, sizeof ask, ",\"ignore_eos\":true,\"stop_token_ids\":[%d],\"min_tokens\":%d",
             (int)stop, LEAST);
    const json_t *late = tokens_of(f, &cut, N, ask);
    assert_true(json_array_size(late) > LEAST);
    assert_int_equal(times_of(late, stop, LEAST), 0);
    json_decref(cut);
    /* The end token too, which the bias would have at once. */
    tokens_of(f, &cut, N, ",\"logit_bias\":{\"1001\":100}");
    assert_int_equal(json_array_size(at(choice(cut, 0), "token_ids")), 1);
    json_decref(cut);
    late = tokens_of(f, &cut, N, ",\"logit_bias\":{\"1001\":100},\"min_tokens\":11");
    assert_int_equal(json_array_size(late), LEAST + 1);
    assert_int_equal(id_at(late, LEAST), 1001);
    assert_string_equal(words(at(choice(cut, 0), "finish_reason")), "stop");
    json_decref(cut);
    json_decref(v);
    /* "A" is token 32, and all that comes. */
    static const char letters[] = ",\"ignore_eos\":true,\"logit_bias\":{\"32\":100},\"stop\":\"A\"";
    tokens_of(f, &cut, N, letters);
    assert_string_equal(words(at(choice(cut, 0), "text")), "");
    json_decref(cut);
    snprintf(ask, sizeof ask, "%s,\"min_tokens\":%d", letters, LEAST);
    late = tokens_of(f, &cut, N, ask);
    assert_int_equal(json_array_size(late), LEAST + 1);
    assert_string_equal(words(at(choice(cut, 0), "text")), "AAAAAAAAAAA");
    json_decref(cut);
}

/* The text of the prompt comes first, whole and in one event. Stop strings in it stop nothing. */
static void a_prompt_is_echoed(void **state) {
    const fixture *f = *state;
    static const char ask[] = "{\"prompt\":\"one two three\",\"max_tokens\":9,\"temperature\":0,"
                              "\"ignore_eos\":true,\"return_token_ids\":true,\"n\":2%s}";
    char body[256];
    json_t *v[2];
    for (int32_t i = 0; i < 2; i++) {
        snprintf(body, sizeof body, ask, i ? ",\"echo\":true,\"stop\":\"two\"" : "");
        v[i] = call_json(f->url, "/v1/completions", body, 200);
        assert_int_equal(json_integer_value(at(at(v[i], "usage"), "completion_tokens")), 18);
    }
    for (size_t k = 0; k < 2; k++) {
        text want = {0};
        text_add(&want, "one two three%s", words(at(choice(v[0], k), "text")));
        assert_string_equal(words(at(choice(v[1], k), "text")), want.data);
        assert_true(json_equal(at(choice(v[0], k), "token_ids"), at(choice(v[1], k), "token_ids")));
        text_free(&want);
    }
    snprintf(body, sizeof body, ask, ",\"echo\":true,\"stream\":true,\"logprobs\":0");
    text stream = {0};
    assert_int_equal(call(f->url, "/v1/completions", body, &stream), 200);
    heard h;
    hear(&h, &stream);
    assert_int_equal(h.n_events, 18);
    assert_int_equal(h.tokens.length, 18);
    assert_true(h.done);
    assert_memory_equal(h.words.data, "one two three", 13);
    hear_free(&h);
    text_free(&stream);
    json_decref(v[0]);
    json_decref(v[1]);
}

/* What was drawn once, asked for again as a prompt: the log-probabilities are those of then, over
 * several steps (more tokens than rows are sampled in one), and whatever is in the prefix cache. */
static void a_prompt_is_scored(void **state) {
    const fixture *f = *state;
    enum { N = 150 };
    json_t *v;
    const json_t *tokens = tokens_of(f, &v, N, ",\"ignore_eos\":true,\"logprobs\":2");
    const json_t *drawn = at(choice(v, 0), "logprobs");
    json_t *known = call_json(f->url, "/tokenize", "{\"prompt\":\"bend\"}", 200);
    json_t *prompt = json_copy((json_t *)(uintptr_t)at(known, "tokens"));
    const size_t n = json_array_size(prompt);
    json_array_extend(prompt, (json_t *)(uintptr_t)tokens);
    json_t *ask = json_pack("{s:O, s:i, s:i, s:b, s:b, s:i}", "prompt", prompt, "max_tokens", 1,
                            "logprobs", 2, "echo", 1, "ignore_eos", 1, "temperature", 0);
    char *body = json_dumps(ask, JSON_COMPACT);
    for (int32_t again = 0; again < 3; again++) {
        json_t *scored = call_json(f->url, "/v1/completions", body, 200);
        const json_t *l = at(choice(scored, 0), "logprobs");
        const json_t *logprobs = at(l, "token_logprobs"), *top = at(l, "top_logprobs");
        assert_int_equal(json_array_size(at(l, "tokens")), n + N + 1);
        assert_int_equal(json_array_size(logprobs), n + N + 1);
        assert_int_equal(json_array_size(top), n + N + 1);
        assert_int_equal(json_array_size(at(l, "text_offset")), n + N + 1);
        assert_true(json_is_null(json_array_get(logprobs, 0)));
        assert_true(json_is_null(json_array_get(top, 0)));
        for (size_t i = 1; i < n; i++)
            assert_true(json_real_value(json_array_get(logprobs, i)) < 0);
        for (size_t i = 0; i < N; i++) {
            assert_true(json_equal(json_array_get(logprobs, n + i),
                                   json_array_get(at(drawn, "token_logprobs"), i)));
            assert_true(json_equal(json_array_get(top, n + i),
                                   json_array_get(at(drawn, "top_logprobs"), i)));
        }
        /* Twin: those of the token before are others. */
        assert_false(json_equal(json_array_get(logprobs, n),
                                json_array_get(at(drawn, "token_logprobs"), 1)));
        assert_int_equal(json_integer_value(at(at(scored, "usage"), "completion_tokens")), 1);
        json_decref(scored);
    }
    free(body);
    json_decref(ask);
    json_decref(prompt);
    json_decref(known);
    json_decref(v);
}

/* prompt_logprobs say what echo says, of n best that are not those of the output; chat has them
 * too. */
static void a_prompt_has_its_own_scores(void **state) {
    const fixture *f = *state;
    static const char ask[] = "{\"prompt\":[9,8,7,6,5],\"max_tokens\":4,\"temperature\":0,"
                              "\"ignore_eos\":true,\"n\":2,\"logprobs\":%d%s}";
    char body[256];
    json_t *v[2];
    snprintf(body, sizeof body, ask, 3, ",\"echo\":true");
    v[0] = call_json(f->url, "/v1/completions", body, 200);
    snprintf(body, sizeof body, ask, 1, ",\"prompt_logprobs\":3");
    v[1] = call_json(f->url, "/v1/completions", body, 200);
    for (size_t k = 0; k < 2; k++) {
        const json_t *echoed = at(choice(v[0], k), "logprobs"),
                     *l = at(choice(v[1], k), "logprobs");
        const json_t *scores = at(choice(v[1], k), "prompt_logprobs");
        assert_int_equal(json_array_size(scores), 5);
        assert_true(json_is_null(json_array_get(scores, 0)));
        for (int32_t i = 1; i < 5; i++) {
            char id[8];
            snprintf(id, sizeof id, "%d", 9 - i);
            const json_t *of = json_array_get(scores, (size_t)i), *own = at(of, id);
            const json_t *best = json_array_get(at(echoed, "top_logprobs"), (size_t)i);
            assert_true(json_equal(at(own, "logprob"),
                                   json_array_get(at(echoed, "token_logprobs"), (size_t)i)));
            assert_true(json_object_size(of) == 3 + (size_t)json_is_null(at(own, "rank")));
            const char *key;
            json_t *entry;
            json_object_foreach((json_t *)(uintptr_t)of, key,
                                entry) if (!json_is_null(at(entry, "rank")))
                assert_true(
                    json_equal(at(best, words(at(entry, "decoded_token"))), at(entry, "logprob")));
        }
        /* The output is what it is without them, and has the one best token that it asked for. */
        assert_int_equal(json_array_size(at(l, "tokens")), 4);
        for (size_t i = 0; i < 4; i++) {
            assert_true(json_equal(json_array_get(at(l, "token_logprobs"), i),
                                   json_array_get(at(echoed, "token_logprobs"), 5 + i)));
            assert_false(json_equal(json_array_get(at(l, "token_logprobs"), i), /* twin */
                                    json_array_get(at(echoed, "token_logprobs"), 4 + i)));
            assert_int_equal(json_object_size(json_array_get(at(l, "top_logprobs"), i)), 1);
        }
        assert_int_equal(json_integer_value(json_array_get(at(l, "text_offset"), 0)), 0);
    }
    assert_int_equal(json_integer_value(at(at(v[1], "usage"), "completion_tokens")), 8);
    json_decref(v[0]);
    json_decref(v[1]);
    json_t *chat = call_json(f->url, "/v1/chat/completions",
                             "{\"messages\":[{\"role\":\"user\",\"content\":\"a\"}],"
                             "\"max_tokens\":2,\"prompt_logprobs\":0}",
                             200);
    const size_t n = json_array_size(at(chat, "prompt_logprobs"));
    assert_int_equal(n, json_integer_value(at(at(chat, "usage"), "prompt_tokens")));
    assert_int_equal(json_object_size(json_array_get(at(chat, "prompt_logprobs"), n - 1)), 1);
    assert_true(json_is_null(at(choice(chat, 0), "logprobs")));
    json_decref(chat);
}

/* A prompt alone has the log-probabilities that it has before an output, streamed or not, and
 * nothing else: with an end token forced, too. */
static void a_prompt_alone_is_scored(void **state) {
    const fixture *f = *state;
    static const char ask[] =
        "{\"prompt\":[\"one two three\",[5,6,7]],\"echo\":true,\"logprobs\":3,\"max_tokens\":%d,"
        "\"logit_bias\":{\"1001\":100}%s}";
    static const char *const lists[] = {"tokens", "token_logprobs", "top_logprobs", "text_offset"};
    char body[256];
    json_t *v[2];
    for (int32_t n = 0; n < 2; n++) {
        snprintf(body, sizeof body, ask, n, "");
        v[n] = call_json(f->url, "/v1/completions", body, 200);
        assert_int_equal(json_integer_value(at(at(v[n], "usage"), "completion_tokens")), 2 * n);
    }
    for (size_t k = 0; k < 2; k++) {
        const json_t *alone = at(choice(v[0], k), "logprobs");
        const json_t *before = at(choice(v[1], k), "logprobs");
        assert_string_equal(words(at(choice(v[0], k), "finish_reason")), "length");
        for (int32_t i = 0; i < COUNT_OF(lists); i++) {
            json_t *cut = json_copy((json_t *)(uintptr_t)at(before, lists[i]));
            assert_false(json_equal(at(alone, lists[i]), cut)); /* the twin: with the output */
            json_array_remove(cut, json_array_size(cut) - 1);
            assert_true(json_equal(at(alone, lists[i]), cut));
            json_decref(cut);
        }
    }
    snprintf(body, sizeof body, ask, 0,
             ",\"stream\":true,\"stream_options\":{\"include_usage\":true}");
    text stream = {0};
    assert_int_equal(call(f->url, "/v1/completions", body, &stream), 200);
    heard h;
    hear(&h, &stream);
    assert_int_equal(h.n_events, 2);
    assert_true(h.done && h.usage == 0);
    assert_string_equal(h.finish, "length");
    hear_free(&h);
    text_free(&stream);
    json_decref(v[0]);
    json_decref(v[1]);
    v[0] = call_json(f->url, "/v1/completions", "{\"prompt\":\"a\",\"max_tokens\":0}", 200);
    assert_string_equal(words(at(choice(v[0], 0), "text")), "");
    json_decref(v[0]);
    json_decref(call_json(f->url, "/v1/chat/completions",
                          "{\"messages\":[{\"role\":\"user\",\"content\":\"a\"}],\"max_tokens\":0}",
                          400));
}

static int32_t count(const char *in, const char *what) {
    int32_t n = 0;
    for (const char *at = in; (at = strstr(at, what)); at += strlen(what)) n++;
    return n;
}

/* Where usage is asked for, all events but the last have it as null. */
static void chat_streams_what_it_says_whole(void **state) {
    const fixture *f = *state;
    static const char ask[] =
        "{\"model\":\"tiny\",\"messages\":[{\"role\":\"user\",\"content\":[{\"type\":\"text\","
        "\"text\":\"hi\"}]}],\"max_completion_tokens\":20,\"seed\":5,\"stream\":%s,"
        "\"stream_options\":{\"include_usage\":true},\"logprobs\":true,\"top_logprobs\":2,"
        "\"ignore_eos\":true,\"user\":\"someone\",\"metadata\":null}";
    char body[512];
    snprintf(body, sizeof body, ask, "false");
    json_t *v = call_json(f->url, "/v1/chat/completions", body, 200);
    const char *said = words(at(at(choice(v, 0), "message"), "content"));
    assert_string_equal(words(at(v, "object")), "chat.completion");
    const json_t *first = json_array_get(at(at(choice(v, 0), "logprobs"), "content"), 0);
    assert_true(json_real_value(at(first, "logprob")) < 0);
    assert_int_equal(json_array_size(at(first, "top_logprobs")), 2);
    snprintf(body, sizeof body, ask, "true");
    text stream = {0};
    assert_int_equal(call(f->url, "/v1/chat/completions", body, &stream), 200);
    heard h;
    hear(&h, &stream);
    assert_string_equal(h.words.data, said);
    assert_int_equal(h.n_events, 20);
    assert_int_equal(h.usage, 20);
    assert_true(h.done);
    assert_int_equal(count(stream.data, "\"usage\":null"), 20);
    hear_free(&h);
    text_clear(&stream);
    static const char plain[] = "{\"prompt\":\"hi\",\"max_tokens\":4,\"stream\":true,%s"
                                "\"ignore_eos\":true}";
    snprintf(body, sizeof body, plain, "");
    assert_int_equal(call(f->url, "/v1/completions", body, &stream), 200);
    assert_int_equal(count(stream.data, "\"usage\""), 0);
    text_clear(&stream);
    snprintf(body, sizeof body, plain, "\"stream_options\":{\"include_usage\":true},");
    assert_int_equal(call(f->url, "/v1/completions", body, &stream), 200);
    assert_int_equal(count(stream.data, "\"usage\":null"), 4);
    assert_int_equal(count(stream.data, "\"usage\""), 5);
    text_free(&stream);
    json_decref(v);
}

/* Ids of a conversation that ends with an answer to go on with: those of the text up to there, in a
 * template that keeps what a message ends with and in one that strips it. */
static void an_answer_can_be_gone_on_with(void **state) {
    const fixture *f = *state;
    static const char ask[] = "{\"messages\":[{\"role\":\"user\",\"content\":\"im\"},"
                              "{\"role\":\"assistant\",\"content\":\"%s\"}],\"max_tokens\":8,"
                              "\"temperature\":0,\"ignore_eos\":true%s}";
    static const char stripping[] = "{% for m in messages %}<{{ m.role }}>{{ m.content | trim }}</>"
                                    "{% endfor %}",
                      silent[] = "{{ messages[0].content }}";
    static const struct {
        const char *source, *content, *text; /* NULL: the fixture's template */
    } cases[] = {{NULL, "im ", "<|im_start|>user\nim<|im_end|>\n<|im_start|>assistant\nim "},
                 {stripping, " im ", "<user>im</><assistant>im"},
                 {silent, "im", NULL}};
    char body[512];
    for (int32_t i = 0; i < COUNT_OF(cases); i++) {
        chat_template *own = NULL;
        if (cases[i].source)
            assert_ok(chat_template_open(&own, cases[i].source, strlen(cases[i].source), "test"));
        const api_model m = {.tok = f->tok,
                             .tpl = own ? own : f->tpl,
                             .bos = "",
                             .eos = "",
                             .ctx_max = 4096,
                             .vocab = 1005,
                             .n_max = 1};
        ids got = {0}, want = {0};
        snprintf(body, sizeof body, ask, cases[i].content, ",\"continue_final_message\":true");
        const status st = api_tokenize(&got, &m, body, strlen(body));
        if (cases[i].text) {
            assert_ok(st);
            assert_ok(tokenizer_encode(f->tok, cases[i].text, strlen(cases[i].text),
                                       TOKENIZER_PARSE_SPECIAL, &want));
            assert_int_equal(got.length, want.length);
            assert_memory_equal(got.data, want.data, sizeof *got.data * (size_t)want.length);
        } else {
            assert_int_equal(st, ST_UNSUPPORTED);
        }
        ids_clear(&got); /* twin: without, the turn is closed */
        snprintf(body, sizeof body, ask, cases[i].content, "");
        assert_ok(api_tokenize(&got, &m, body, strlen(body)));
        assert_int_not_equal(got.length, want.length);
        ids_free(&got);
        ids_free(&want);
        chat_template_close(own);
    }
    static const char *const wrong[] = {
        ",\"continue_final_message\":true,\"add_generation_prompt\":true",
        ",\"continue_final_message\":1", ",\"continue_final_message\":true"};
    for (int32_t i = 0; i < COUNT_OF(wrong); i++) {
        snprintf(body, sizeof body, ask, i < 2 ? "im" : "", wrong[i]);
        json_decref(call_json(f->url, "/v1/chat/completions", body, 400));
    }
    snprintf(body, sizeof body, ask, "im",
             ",\"continue_final_message\":true,\"add_generation_prompt\":false");
    json_t *v = call_json(f->url, "/v1/chat/completions", body, 200);
    assert_int_equal(json_integer_value(at(at(v, "usage"), "completion_tokens")), 8);
    json_decref(v);
}

static void the_usage_so_far_is_in_every_event(void **state) {
    const fixture *f = *state;
    for (int32_t running = 0; running < 2; running++) {
        char body[256];
        text stream = {0};
        snprintf(body, sizeof body,
                 "{\"prompt\":[5,6,7],\"max_tokens\":6,\"ignore_eos\":true,\"stream\":true,"
                 "\"stream_options\":{\"continuous_usage_stats\":%s}}",
                 running ? "true" : "false");
        assert_int_equal(call(f->url, "/v1/completions", body, &stream), 200);
        char want[80];
        for (int32_t n = 1; n <= 7; n++) {
            snprintf(want, sizeof want, "\"prompt_tokens\":3,\"completion_tokens\":%d,", n);
            assert_int_equal(strstr(stream.data, want) != NULL, running && n <= 6);
        }
        text_free(&stream);
    }
}

/* Nobody asked for 16 tokens: a prompt that leaves room for 4 is answered with 4. */
static void the_default_length_fits_the_context(void **state) {
    const fixture *f = *state;
    text body = {0};
    text_add(&body, "{\"ignore_eos\":true,\"prompt\":[5");
    for (int32_t i = 1; i < 16384 - 4; i++) text_add(&body, ",%d", i * 7 % 1000);
    text_add(&body, "]}");
    json_t *v = call_json(f->url, "/v1/completions", body.data, 200);
    assert_int_equal(json_integer_value(at(at(v, "usage"), "completion_tokens")), 4);
    assert_string_equal(words(at(choice(v, 0), "finish_reason")), "length");
    json_decref(v);
    text_free(&body);
}

static const struct {
    const char *body, *says;
    long http;
} refused_bodies[] = {
    {"{", "body:1", 400},
    {"[]", "no JSON object", 400},
    {"{}", "'prompt' is missing", 400},
    {"{\"prompt\":\"\xff\"}", "body:1", 400},
    {"{\"prompt\":3}", "prompt", 400},
    {"{\"prompt\":[1,\"a\"]}", "item 1 is no integer", 400},
    {"{\"prompt\":[99999]}", "outside the vocabulary", 400},
    {"{\"prompt\":\"a\",\"temperature\":\"hot\"}", "temperature", 400},
    {"{\"prompt\":\"a\",\"temperature\":-1}", "temperature", 400},
    {"{\"prompt\":\"a\",\"max_tokens\":-1}", "max_tokens", 400},
    {"{\"prompt\":\"a\",\"max_tokens\":0,\"min_tokens\":1}", "the 0 of 'max_tokens'", 400},
    {"{\"prompt\":\"a\",\"max_tokens\":16384}", "context", 400},
    {"{\"prompt\":\"a\",\"n\":9}", "n = 9", 400},
    {"{\"prompt\":\"a\",\"stream\":1}", "stream", 400},
    {"{\"prompt\":\"a\",\"stop\":[\"\"]}", "empty string", 400},
    {"{\"prompt\":\"a\",\"stop\":5}", "stop", 400},
    {"{\"prompt\":\"a\",\"stop\":\"b\\u0000\"}", "U+0000", 400},
    {"{\"prompt\":\"a\",\"stop_token_ids\":5}", "'stop_token_ids' is no list", 400},
    {"{\"prompt\":\"a\",\"logprobs\":21}", "logprobs", 400},
    {"{\"prompt\":\"a\",\"echo\":1}", "echo", 400},
    {"{\"prompt\":\"a\",\"prompt_logprobs\":-1}", "prompt_logprobs", 400},
    {"{\"prompt\":\"a\",\"prompt_logprobs\":1,\"stream\":true}", "not with a stream", 400},
    {"{\"prompt\":\"a\",\"presence_penalty\":2.5}", "presence_penalty", 400},
    {"{\"prompt\":\"a\",\"frequency_penalty\":-3}", "frequency_penalty", 400},
    {"{\"prompt\":\"a\",\"frequency_penalty\":\"1\"}", "frequency_penalty", 400},
    {"{\"prompt\":\"a\",\"logit_bias\":[5,1]}", "'logit_bias' is no object", 400},
    {"{\"prompt\":\"a\",\"logit_bias\":{\"the\":1}}", "'the' is no token id", 400},
    {"{\"prompt\":\"a\",\"logit_bias\":{\"-1\":1}}", "'-1' is no token id", 400},
    {"{\"prompt\":\"a\",\"logit_bias\":{\"1005\":1}}", "outside the vocabulary", 400},
    {"{\"prompt\":\"a\",\"logit_bias\":{\"5\":true}}", "of 5 is no number", 400},
    {"{\"prompt\":\"a\",\"logit_bias\":{\"5\":101}}", "logit_bias: 101 of token 5", 400},
    {"{\"prompt\":\"a\",\"logit_bias\":{\"5\":1,\"05\":2}}", "5 is there twice", 400},
    {"{\"prompt\":\"a\",\"min_tokens\":-1}", "min_tokens", 400},
    {"{\"prompt\":\"a\",\"truncate_prompt_tokens\":0}", "truncate_prompt_tokens", 400},
    {"{\"prompt\":\"a\",\"min_tokens\":17}", "more than the 16 of 'max_tokens'", 400},
    {"{\"prompt\":\"a\",\"guided_json\":{\"type\":\"object\"}}", "guided_json", 400},
    {"{\"prompt\":\"a\",\"skip_special_tokens\":0}", "skip_special_tokens", 400},
    {"{\"prompt\":\"a\",\"regex\":\"a+\"}", "'regex' is not supported", 400},
    {"{\"prompt\":\"a\",\"chat_template\":\"{{ 1 }}\"}", "'chat_template'", 400},
    {"{\"prompt\":\"a\",\"tool_choice\":\"required\"}", "tool_choice", 400},
    {"{\"prompt\":\"a\",\"modalities\":[\"text\",\"audio\"]}", "other than [\"text\"]", 400},
    {"{\"prompt\":\"a\",\"model\":\"other\"}", "not served here", 404},
    {"{\"prompt\":[]}", "0 prompts", 400},
};

static void what_is_wrong_is_said(void **state) {
    const fixture *f = *state;
    for (int32_t i = 0; i < COUNT_OF(refused_bodies); i++) {
        json_t *v =
            call_json(f->url, "/v1/completions", refused_bodies[i].body, refused_bodies[i].http);
        const char *message = words(at(at(v, "error"), "message"));
        if (!message || !strstr(message, refused_bodies[i].says))
            fail_msg("%s: says '%s'", refused_bodies[i].body, message ? message : "");
        assert_int_equal(json_integer_value(at(at(v, "error"), "code")), refused_bodies[i].http);
        json_decref(v);
    }
    static const char *const nowhere[][2] = {
        {"/v1/embeddings", "no such path '/v1/embeddings': there are /v1/completions /v1/chat/"},
        {"/v1/models/none", "the model 'none' is not served here, 'tiny' is"},
        {"/%ff", "no such path '/\xef\xbf\xbd': there are"}};
    for (int32_t i = 0; i < COUNT_OF(nowhere); i++) {
        json_t *v = call_json(f->url, nowhere[i][0], "{}", 404);
        const char *message = words(at(at(v, "error"), "message"));
        if (!strstr(message, nowhere[i][1])) fail_msg("%s: '%s'", nowhere[i][0], message);
        json_decref(v);
    }
    json_decref(call_json(f->url, "/v1/chat/completions", "{\"messages\":[]}", 400));
    json_decref(call_json(f->url, "/v1/chat/completions",
                          "{\"echo\":true,\"messages\":[{\"role\":\"user\",\"content\":\"a\"}]}",
                          400));
    json_decref(call_json(f->url, "/v1/chat/completions", "{\"messages\":[{\"content\":1}]}", 400));
    json_decref(call_json(f->url, "/v1/chat/completions",
                          "{\"messages\":[{\"role\":\"user\",\"content\":5}]}", 400));
    json_decref(call_json(f->url, "/v1/chat/completions",
                          "{\"chat_template_kwargs\":[],"
                          "\"messages\":[{\"role\":\"user\",\"content\":\"a\"}]}",
                          400));
    json_decref(call_json(f->url, "/tokenize", "{\"prompt\":5}", 400));
    json_t *v = call_json(f->url, "/v1/chat/completions",
                          "{\"messages\":[{\"role\":\"assistant\",\"content\":null}]}", 400);
    assert_non_null(
        strstr(words(at(at(v, "error"), "message")), "a message has no content, which"));
    json_decref(v);
    json_decref(call_json(
        f->url, "/v1/chat/completions",
        "{\"messages\":[{\"role\":\"user\",\"content\":[{\"type\":\"image_url\"}]}]}", 400));
}

static void what_is_too_long_is_said(void **state) {
    const fixture *f = *state;
    json_t *v;
    text map = {0};
    text_add(&map, "{\"prompt\":\"a\",\"logit_bias\":{\"0\":1");
    for (int32_t i = 1; i <= LOGIT_BIAS_MAX; i++) text_add(&map, ",\"%d\":1", i);
    text_add(&map, "}}");
    json_decref(call_json(f->url, "/v1/completions", map.data, 400));
    text_clear(&map); /* 8 prompts of 16000 tokens, 8 choices, 21 log-probabilities a token */
    text_add(&map, "{\"echo\":true,\"n\":8,\"logprobs\":20,\"prompt\":[");
    for (int32_t i = 0; i < 8 * 16000; i++) text_add(&map, i % 16000 ? ",5" : i ? "],[5" : "[5");
    text_add(&map, "]]}");
    v = call_json(f->url, "/v1/completions", map.data, 400);
    assert_non_null(strstr(words(at(at(v, "error"), "message")), "'echo' of 21504000"));
    json_decref(v);
    text_free(&map);
    char *big = mem_alloc((2 << 20) + 1, 1);
    memset(big, 'a', 2 << 20);
    json_decref(call_json(f->url, "/v1/completions", big, 413));
    mem_free(big);
    text word = {0}; /* within the body's limit, over the context's */
    text_add(&word, "{\"prompt\":\"");
    for (int32_t i = 0; i < 20000; i++) text_add(&word, "%d ", i);
    text_add(&word, "\"}");
    json_decref(call_json(f->url, "/v1/completions", word.data, 400));
    text_free(&word);
}

/* Every token once and in order: the ids of each stream are those of the same request asked
 * alone. */
static void a_crowd_of_streams_gets_every_token_once(void **state) {
    const fixture *f = *state;
    enum { KINDS = 8 };
    const char *wanted = getenv("AMALGAM_STREAMS");
    const int32_t n = wanted ? (int32_t)strtol(wanted, NULL, 10) : 120;
    static const char ask[] =
        "{\"prompt\":\"crowd %d\",\"max_tokens\":%d,\"seed\":%d,\"stream\":%s,"
        "\"ignore_eos\":true,\"return_token_ids\":true,"
        "\"stream_options\":{\"include_usage\":true}}";
    json_t *alone[KINDS];
    char body[256];
    for (int32_t k = 0; k < KINDS; k++) {
        snprintf(body, sizeof body, ask, k, 40 + 11 * k, k, "false");
        alone[k] = call_json(f->url, "/v1/completions", body, 200);
    }
    crowd *c = open_crowd();
    for (int32_t i = 0; i < n; i++) {
        const int32_t k = i % KINDS;
        snprintf(body, sizeof body, ask, k, 40 + 11 * k, k, "true");
        join_crowd(c, f->url, "/v1/completions", body);
    }
    run_crowd(c, 0);
    for (int32_t i = 0; i < n; i++) {
        const int32_t k = i % KINDS;
        heard h;
        hear(&h, &c->out[i]);
        const json_t *want = at(choice(alone[k], 0), "token_ids");
        if (!h.done) fail_msg("stream %d ends early: %s", i, c->out[i].data ? c->out[i].data : "");
        assert_int_equal(h.n_events, 40 + 11 * k);
        assert_int_equal(h.usage, 40 + 11 * k);
        assert_int_equal(h.tokens.length, json_array_size(want));
        for (int64_t j = 0; j < h.tokens.length; j++)
            assert_int_equal(h.tokens.data[j], json_integer_value(json_array_get(want, (size_t)j)));
        assert_string_equal(h.words.data, words(at(choice(alone[k], 0), "text")));
        hear_free(&h);
    }
    close_crowd(c);
    for (int32_t k = 0; k < KINDS; k++) json_decref(alone[k]);
    wait_metric(f->url, "amalgam:kv_pages_held", 0, 5);
}

static const char long_stream[] = "{\"prompt\":\"long %d\",\"max_tokens\":%d,\"stream\":true,"
                                  "\"ignore_eos\":true}";

static void clients_that_leave_free_their_pages(void **state) {
    const fixture *f = *state;
    char body[160];
    crowd *c = open_crowd();
    for (int32_t i = 0; i < 20; i++) {
        snprintf(body, sizeof body, long_stream, i, i < 10 ? 8000 : 400);
        join_crowd(c, f->url, "/v1/completions", body);
    }
    const double made = metric(f->url, "vllm:generation_tokens_total");
    run_crowd(c, 400); /* in mid-stream, all of them: their tokens count already */
    assert_more(metric(f->url, "vllm:generation_tokens_total"), made);
    assert_true(metric(f->url, "amalgam:kv_pages_held") > 0);
    for (int32_t i = 0; i < 10; i++) leave_crowd(c, i);
    run_crowd(c, 0);
    for (int32_t i = 10; i < 20; i++) {
        heard h;
        hear(&h, &c->out[i]);
        assert_int_equal(h.n_events, 400);
        assert_true(h.done);
        hear_free(&h);
    }
    close_crowd(c);
    wait_metric(f->url, "amalgam:kv_pages_held", 0, 5);
    wait_metric(f->url, "amalgam:jobs", 0, 5);
    /* One that asks for no stream is suspended while the engine works: its leaving is seen as
     * well. */
    CURL *whole = request_of(f->url, "/v1/completions",
                             "{\"prompt\":\"w\",\"max_tokens\":16000,"
                             "\"ignore_eos\":true}",
                             &(text){0});
    curl_easy_setopt(whole, CURLOPT_TIMEOUT_MS, 100L);
    assert_int_equal(curl_easy_perform(whole), CURLE_OPERATION_TIMEDOUT);
    curl_easy_cleanup(whole);
    wait_metric(f->url, "amalgam:kv_pages_held", 0, 1);
}

static int connect_raw(const fixture *f, int receive_bytes) {
    const int s = socket(AF_INET, SOCK_STREAM, 0);
    const struct sockaddr_in to = {.sin_family = AF_INET,
                                   .sin_port = htons((uint16_t)server_port(f->server)),
                                   .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    if (receive_bytes) setsockopt(s, SOL_SOCKET, SO_RCVBUF, &receive_bytes, sizeof receive_bytes);
    assert_int_equal(connect(s, (const struct sockaddr *)&to, sizeof to), 0);
    return s;
}

static void send_text(int s, const char *t) {
    assert_int_equal(send(s, t, strlen(t), MSG_NOSIGNAL), (ssize_t)strlen(t));
}

/* What a server answers on a socket until it closes it. */
static void hear_out(int s, text *got) {
    char buf[65536];
    text_clear(got);
    for (ssize_t n; (n = read(s, buf, sizeof buf)) > 0;) text_bytes(got, buf, (size_t)n);
    close(s);
}

static atomic_bool planned_failure;
static const device_ops *sound_ops;

static status failing_embed(device *d, tensor out, tensor residual, const weight *table,
                            const weight *w, float eps) {
    if (atomic_load(&planned_failure)) return FAIL(ST_DEVICE, "planned");
    return sound_ops->embed(d, out, residual, table, w, eps);
}

/* A device that is lost ends what runs, streams with an error and no finish reason; what comes
 * later is refused at once, and /health says so. */
static void a_lost_device_ends_all_requests(void **state) {
    (void)state;
    fixture f;
    char body[160];
    open_fixture(&f, 4, 4, NULL);
    device *d = engine_device(f.engine);
    device_ops ops = *d->ops;
    sound_ops = d->ops;
    ops.embed = failing_embed;
    atomic_store(&planned_failure, false);
    d->ops = &ops; /* before the first request */
    json_decref(call_json(f.url, "/v1/completions", "{\"prompt\":\"a\",\"max_tokens\":3}", 200));
    crowd *c = open_crowd();
    for (int32_t i = 0; i < 2; i++) {
        snprintf(body, sizeof body, long_stream, i, 8000);
        join_crowd(c, f.url, "/v1/completions", body);
    }
    run_crowd(c, 400);
    atomic_store(&planned_failure, true);
    run_crowd(c, 0);
    for (int32_t i = 0; i < 2; i++) {
        heard h;
        hear(&h, &c->out[i]);
        assert_true(h.n_events > 0 && h.n_events < 8000);
        assert_true(h.error);
        assert_int_equal(h.finish[0], 0);
        hear_free(&h);
    }
    close_crowd(c);
    for (int32_t i = 0; i < 3; i++) {
        json_t *v = call_json(f.url, "/v1/completions", "{\"prompt\":\"a\"}", 500);
        assert_string_equal(words(at(at(v, "error"), "message")), "the engine has failed");
        json_decref(v);
    }
    json_decref(call_json(f.url, "/health", NULL, 503));
    json_decref(call_json(f.url, "/v1/models", NULL, 200));
    wait_metric(f.url, "amalgam:jobs", 0, 10);
    d->ops = sound_ops;
    close_fixture(&f, 1);
}

/* It does not read a byte while the engine makes megabytes for it; others do not wait; then it
 * reads on and nothing is missing. */
static void a_slow_reader_delays_nobody(void **state) {
    const fixture *f = *state;
    enum { TOKENS = 6000 };
    text body = {0}, head = {0}, got = {0};
    text_add(&body,
             "{\"prompt\":\"slow\",\"max_tokens\":%d,\"stream\":true,\"ignore_eos\":true,"
             "\"logprobs\":10}",
             TOKENS);
    text_add(&head, "POST /v1/completions HTTP/1.0\r\nHost: x\r\nContent-Length: %zu\r\n\r\n%s",
             body.length, body.data);
    const int s = connect_raw(f, 4096);
    send_text(s, head.data);
    wait_metric(f->url, "amalgam:jobs", 1, 30);
    timeline t;
    timeline_start_real(&t);
    for (int32_t i = 0; i < 5; i++)
        json_decref(call_json(f->url, "/v1/completions",
                              "{\"prompt\":\"quick\",\"max_tokens\":50,\"ignore_eos\":true}", 200));
    assert_at_most((double)timeline_now_ns(&t) * 1e-9, 10);
    /* The engine does not wait for it either, however slow the machine. */
    wait_metric(f->url, "amalgam:jobs", 0, 300);
    hear_out(s, &got);
    heard h;
    hear(&h, &got);
    assert_int_equal(h.n_events, TOKENS);
    assert_true(h.done);
    assert_true(got.length > 2 << 20); /* more than sockets hold, else nothing was proved */
    hear_free(&h);
    text_free(&got);
    text_free(&head);
    text_free(&body);
}

/* A prompt of n bytes that no space divides: the slowest to tokenise. */
static void add_long_request(text *head, const char *path, int32_t n) {
    text body = {0};
    text_add(&body, "{\"prompt\":\"");
    for (int32_t i = 0; i < n; i++)
        text_bytes(&body, &(char){(char)('a' + hash_u64((uint64_t)i, 1) % 26)}, 1);
    text_add(&body, "\"}");
    text_add(head, "POST %s HTTP/1.0\r\nContent-Length: %zu\r\n\r\n%s", path, body.length,
             body.data);
    text_free(&body);
}

/* While a megabyte becomes tokens others are answered: the longest wait is no half of that time.
 * Once in five times, because other programs may take the processor. */
static void a_long_prompt_delays_nobody(void **state) {
    const fixture *f = *state;
    text head = {0}, got = {0}, ignored = {0};
    add_long_request(&head, "/v1/completions", 1000000);
    bool good = false;
    for (int32_t i = 0; i < 5 && !good; i++) {
        timeline t;
        double longest_s = 0, now_s = 0;
        int32_t n = 0;
        const int s = connect_raw(f, 0);
        send_text(s, head.data);
        timeline_start_real(&t);
        for (struct pollfd p = {.fd = s, .events = POLLIN}; poll(&p, 1, 0) == 0; n++) {
            const double before_s = now_s;
            assert_int_equal(call(f->url, "/health", NULL, &ignored), 200);
            now_s = (double)timeline_now_ns(&t) * 1e-9;
            longest_s = fmax(longest_s, now_s - before_s);
        }
        good = n > 2 && longest_s < now_s / 2;
        hear_out(s, &got);
        assert_non_null(strstr(got.data, "HTTP/1.1 400"));
        assert_non_null(strstr(got.data, "tokens, this model's context takes 16383"));
    }
    assert_true(good);
    text_clear(&head);
    add_long_request(&head, "/tokenize", 100000);
    const int s = connect_raw(f, 0);
    send_text(s, head.data);
    hear_out(s, &got);
    assert_non_null(strstr(got.data, "{\"count\":"));
    text_free(&head);
    text_free(&got);
    text_free(&ignored);
}

/* Seconds until a long body on a connection of its own is answered. */
static double time_long_body(const fixture *f, const text *head) {
    text got = {0};
    timeline t;
    const int s = connect_raw(f, 0);
    timeline_start_real(&t);
    send_text(s, head->data);
    hear_out(s, &got);
    const double seconds = (double)timeline_now_ns(&t) * 1e-9;
    assert_non_null(strstr(got.data, "{\"count\":"));
    text_free(&got);
    return seconds;
}

/* Long bodies whose clients have left are not read: who comes behind N of them waits for one at
 * most, that is for two with the own. Half of what all would take is the limit, once in five times,
 * because other programs may take the processor. */
static void bodies_of_clients_that_left_are_not_read(void **state) {
    enum { N = 10 };
    const fixture *f = *state;
    text head = {0};
    add_long_request(&head, "/tokenize", 1000000);
    bool good = false;
    for (int32_t i = 0; i < 5 && !good; i++) {
        const double alone_s = time_long_body(f, &head);
        int s[N];
        for (int32_t k = 0; k < N; k++) {
            s[k] = connect_raw(f, 0);
            send_text(s[k], head.data);
        }
        /* The thread that takes bodies in has come so far as to answer this. */
        json_decref(call_json(f->url, "/health", NULL, 200));
        for (int32_t k = 0; k < N; k++) close(s[k]);
        good = time_long_body(f, &head) < alone_s * N / 2;
    }
    assert_true(good);
    text_free(&head);
}

/* Long bodies that have arrived and are unread when the server closes are told. How soon they have
 * arrived, and how many of them, is the machine's affair, hence several waits. */
static void long_prompts_end_with_the_server(void **state) {
    (void)state;
    enum { N = 6 };
    text head = {0}, got = {0};
    int32_t told = 0;
    add_long_request(&head, "/v1/completions", 1000000);
    for (int64_t wait_ms = 20; wait_ms < 1000 && !told; wait_ms *= 2) {
        fixture f;
        int s[N];
        open_fixture(&f, 1, 1, NULL);
        for (int32_t i = 0; i < N; i++) {
            s[i] = connect_raw(&f, 0);
            send_text(s[i], head.data);
        }
        nanosleep(&(struct timespec){.tv_nsec = wait_ms * 1000000}, NULL);
        close_fixture(&f, 0);
        for (int32_t i = 0; i < N; i++) {
            hear_out(s[i], &got);
            told += strstr(got.data ? got.data : "", "shutting down") != NULL;
        }
    }
    assert_true(told > 0);
    text_free(&head);
    text_free(&got);
}

/* Latency counts from the hand-over, also for a request that comes in the middle of a long step. */
static void waiting_for_a_step_is_counted(void **state) {
    const fixture *f = *state;
    static const char sum[] = "vllm:e2e_request_latency_seconds_sum";
    const double before = metric(f->url, sum);
    text body = {0}, head = {0};
    text_add(&body, "{\"max_tokens\":1,\"prompt\":[5");
    for (int32_t i = 1; i < 8000; i++) text_add(&body, ",%d", i % 1000);
    text_add(&body, "]}");
    text_add(&head, "POST /v1/completions HTTP/1.0\r\nContent-Length: %zu\r\n\r\n%s", body.length,
             body.data);
    const int s = connect_raw(f, 0);
    send_text(s, head.data);
    wait_metric(f->url, "amalgam:jobs", 1, 30); /* its one step runs, or comes first */
    timeline t;
    timeline_start_real(&t);
    json_decref(call_json(f->url, "/v1/completions", "{\"prompt\":\"b\",\"max_tokens\":1}", 200));
    const double second_s = (double)timeline_now_ns(&t) * 1e-9;
    char buf[4096];
    while (recv(s, buf, sizeof buf, 0) > 0) {
    }
    close(s);
    assert_more(second_s, 0.2); /* else it did not wait, and nothing is shown */
    /* Both took about as long; without the wait in the sum it would be that of the first alone. */
    assert_more(metric(f->url, sum) - before, 1.5 * second_s);
    text_free(&head);
    text_free(&body);
}

/* A request that does not arrive is cut off; one that is no HTTP is answered or closed. */
static void broken_senders_are_cut_off(void **state) {
    const fixture *f = *state;
    char buf[512];
    int s = connect_raw(f, 0);
    send_text(s, "POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Le");
    timeline t;
    timeline_start_real(&t);
    while (recv(s, buf, sizeof buf, 0) > 0) {
    }
    close(s);
    assert_at_most((double)timeline_now_ns(&t) * 1e-9, 4); /* the limit is 2 */
    s = connect_raw(f, 0); /* a body that comes byte by byte is no better */
    send_text(s, "POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n");
    timeline_start_real(&t);
    for (ssize_t sent = 1; sent == 1 && timeline_now_ns(&t) < 4000000000;) {
        nanosleep(&(struct timespec){.tv_nsec = 100000000}, NULL);
        sent = send(s, "{", 1, MSG_NOSIGNAL);
    }
    close(s);
    assert_at_most((double)timeline_now_ns(&t) * 1e-9, 4);
    s = connect_raw(f, 0);
    send_text(s, "POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\n"
                 "Content-Length: 30\r\n\r\n{}");
    assert_more((double)recv(s, buf, sizeof buf, 0), 20);
    assert_memory_equal(buf, "HTTP/1.1 400", 12);
    close(s);
    s = connect_raw(f, 0);
    send_text(s, "\x16\x03\x01 nonsense\r\n\r\n");
    while (recv(s, buf, sizeof buf, 0) > 0) {
    }
    close(s);
    json_decref(call_json(f->url, "/health", NULL, 200));
}

static int32_t open_files(void) {
    int32_t n = 0;
    DIR *d = opendir("/proc/self/fd");
    assert_non_null(d);
    while (readdir(d)) n++;
    closedir(d);
    return n;
}

/* A part of a request and the end in one segment: the connection does not stay until the time for
 * requests is over. A request that is whole is answered, though its sender says no more. */
static void ends_that_come_with_data_are_seen(void **state) {
    (void)state;
    enum { N = 20 };
    fixture f;
    char buf[2048];
    request_timeout_s = 60;
    open_fixture(&f, 1, 2, NULL);
    request_timeout_s = 2;
    json_decref(call_json(f.url, "/health", NULL, 200));
    const int32_t before = open_files();
    for (int32_t i = 0; i < N; i++) {
        const int s = connect_raw(&f, 0);
        send_text(s, "POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{");
        close(s);
    }
    timeline t;
    timeline_start_real(&t);
    while (open_files() > before) {
        assert_at_most((double)timeline_now_ns(&t) * 1e-9, 30);
        nanosleep(&(struct timespec){.tv_nsec = 20000000}, NULL);
    }
    const int s = connect_raw(&f, 0);
    send_text(s, "GET /health HTTP/1.1\r\nHost: x\r\n\r\n");
    assert_int_equal(shutdown(s, SHUT_WR), 0);
    assert_more((double)recv(s, buf, sizeof buf, 0), 12);
    assert_memory_equal(buf, "HTTP/1.1 200", 12);
    close(s);
    close_fixture(&f, 1);
}

static void a_full_queue_is_429(void **state) {
    (void)state;
    fixture f;
    open_fixture(&f, 1, 2, NULL);
    char body[160];
    crowd *c = open_crowd();
    for (int32_t i = 0; i < 12; i++) {
        snprintf(body, sizeof body, long_stream, i, 300);
        join_crowd(c, f.url, "/v1/completions", body);
    }
    run_crowd(c, 0);
    int32_t served = 0, refused = 0;
    for (int32_t i = 0; i < c->n; i++) {
        long http = 0;
        curl_easy_getinfo(c->easy[i], CURLINFO_RESPONSE_CODE, &http);
        served += http == 200;
        refused += http == 429;
        if (http == 429) assert_non_null(strstr(c->out[i].data, "rate_limit_error"));
    }
    assert_int_equal(served + refused, 12);
    assert_true(served >= 2);
    assert_true(refused >= 1);
    close_crowd(c);
    json_decref(call_json(f.url, "/v1/completions", "{\"prompt\":\"a\",\"max_tokens\":2}", 200));
    /* What can never be held is no matter of waiting. */
    for (int32_t n = 2; n <= 4; n++) {
        snprintf(body, sizeof body, "{\"prompt\":\"a\",\"max_tokens\":2,\"n\":%d}", n);
        json_t *v = call_json(f.url, "/v1/completions", body, n <= 2 ? 200 : 400);
        if (n > 2)
            assert_non_null(strstr(words(at(at(v, "error"), "message")), "this server takes 2"));
        json_decref(v);
    }
    close_fixture(&f, 5);
}

/* A job, and whether it was ever woken before it was known whether it is taken. */
typedef struct {
    job *j;
    bool early;
} watched;

static void note_wake(void *user) { /* with the job's lock held */
    watched *w = user;
    w->early |= !w->j->accepted && !w->j->done;
    w->j->waiting = true;
}

static void submit_watched(const fixture *f, watched *w, int32_t n, int32_t max_new) {
    char body[160];
    api_request r;
    const api_model m = {
        .model = "tiny", .tok = f->tok, .ctx_max = 16384, .vocab = 1005, .n_max = 8};
    snprintf(body, sizeof body,
             "{\"prompt\":\"a\",\"stream\":true,\"ignore_eos\":true,\"n\":%d,\"max_tokens\":%d}", n,
             max_new);
    assert_ok(api_parse(&r, &m, false, body, strlen(body), 1));
    *w = (watched){0};
    assert_ok(job_new(&w->j, &r, f->tok, note_wake, w));
    w->j->waiting = true;
    service_submit(f->service, w->j);
}

static status wait_watched(watched *w) {
    for (bool done = false; !done;) {
        nanosleep(&(struct timespec){.tv_nsec = 1000000L}, NULL);
        pthread_mutex_lock(&w->j->lock);
        done = w->j->done;
        pthread_mutex_unlock(&w->j->lock);
    }
    return w->j->st;
}

/* A stream whose first answer is taken and whose second is refused begins with 429: it must not be
 * woken for the cancellation of the first, or else 200 goes out. */
static void a_stream_begins_when_all_of_it_is_taken(void **state) {
    (void)state;
    fixture f;
    open_fixture(&f, 1, 4, NULL);
    watched filler[4], w;
    submit_watched(&f, &filler[0], 1, 12000);
    wait_metric(f.url, "vllm:num_requests_running", 1, 20);
    for (int32_t i = 1; i < 4; i++) submit_watched(&f, &filler[i], 1, 12000);
    wait_metric(f.url, "vllm:num_requests_waiting", 3, 20);
    submit_watched(&f, &w, 3, 4);
    assert_int_equal(wait_watched(&w), ST_OOM);
    assert_false(w.early);
    job_release(w.j);
    for (int32_t i = 0; i < 4; i++) {
        service_cancel(f.service, filler[i].j);
        (void)wait_watched(&filler[i]);
        assert_false(filler[i].early);
        job_release(filler[i].j);
    }
    submit_watched(&f, &w, 3, 4); /* and when there is room it streams */
    assert_ok(wait_watched(&w));
    assert_int_equal(w.j->choice[2].n_ready, 4);
    job_release(w.j);
    close_fixture(&f, 5);
}

enum { LATE = 400 };
typedef struct {
    service *service;
    job *j[LATE];
} late;

static void *submit_all(void *user) {
    const late *l = user;
    for (int32_t i = 0; i < LATE; i++) service_submit(l->service, l->j[i]);
    return NULL;
}

/* Requests come on connections that are still open: before, while and after the service ends. All
 * of them are told, and none is waited for that came too late. */
static void what_comes_while_it_ends_is_refused(void **state) {
    (void)state;
    fixture f;
    open_fixture(&f, 1, 4, NULL);
    server_close(f.server, 0);
    const api_model m = {
        .model = "tiny", .tok = f.tok, .ctx_max = 16384, .vocab = 1005, .n_max = 1};
    static const char body[] = "{\"prompt\":[5],\"max_tokens\":1}";
    int32_t n_late = 0;
    for (int32_t round = 0; round < 150; round++) {
        late l;
        pthread_t thread;
        service_close(f.service);
        assert_ok(service_open(&f.service, f.engine, f.tok, 5));
        l.service = f.service;
        for (int32_t i = 0; i < LATE; i++) {
            api_request r;
            assert_ok(api_parse(&r, &m, false, body, sizeof body - 1, 1));
            assert_ok(job_new(&l.j[i], &r, f.tok, NULL, NULL));
        }
        assert_int_equal(pthread_create(&thread, NULL, submit_all, &l), 0);
        nanosleep(&(struct timespec){.tv_nsec = 50000}, NULL);
        service_drain(f.service, 0);
        pthread_join(thread, NULL);
        for (int32_t i = 0; i < LATE; i++) {
            assert_true(l.j[i]->done);
            n_late += l.j[i]->st == ST_INTERRUPTED;
            job_release(l.j[i]);
        }
        assert_int_equal(service_alive(f.service), 0);
    }
    assert_true(n_late > 0);
    service_close(f.service);
    engine_close(f.engine);
    chat_template_close(f.tpl);
    tokenizer_close(f.tok);
}

static void the_key_is_wanted(void **state) {
    (void)state;
    fixture f;
    open_fixture(&f, 4, 16, "secret");
    json_decref(call_json(f.url, "/v1/models", NULL, 401));
    json_decref(call_json(f.url, "/health", NULL, 200));
    static const struct {
        const char *header;
        long http;
    } cases[] = {
        {"Authorization: Bearer secret", 200},  {"Authorization: Bearer secre", 401},
        {"Authorization: Bearer secrets", 401}, {"Authorization: secret", 401},
        {"Authorization: Bearer ", 401},        {"Authorization: bearer secret", 200},
    };
    for (int32_t i = 0; i < COUNT_OF(cases); i++) {
        text t = {0}, heads = {0};
        CURL *c = request_of(f.url, "/v1/models", NULL, &t);
        struct curl_slist *list = curl_slist_append(NULL, cases[i].header);
        list = curl_slist_append(list, "x-request-id: id-7");
        curl_easy_setopt(c, CURLOPT_HTTPHEADER, list);
        curl_easy_setopt(c, CURLOPT_HEADERFUNCTION, collect);
        curl_easy_setopt(c, CURLOPT_HEADERDATA, &heads);
        assert_int_equal(curl_easy_perform(c), CURLE_OK);
        long http = 0;
        curl_easy_getinfo(c, CURLINFO_RESPONSE_CODE, &http);
        assert_int_equal(http, cases[i].http);
        assert_non_null(strstr(heads.data, "x-request-id: id-7"));
        curl_easy_cleanup(c);
        curl_slist_free_all(list);
        text_free(&t);
        text_free(&heads);
    }
    close_fixture(&f, 1);
}

typedef struct {
    fixture f;
    double grace_s;
} closing;

static void *close_later(void *arg) {
    closing *c = arg;
    close_fixture(&c->f, c->grace_s);
    return NULL;
}

/* With SO_REUSEPORT the system would hand each server every other connection. */
static void a_port_has_one_server(void **state) {
    (void)state;
    fixture f;
    open_fixture(&f, 1, 1, NULL);
    server_options so = SERVER_OPTIONS_DEFAULT;
    so.port = server_port(f.server);
    server *second;
    const api_model m = {.model = "tiny", .ctx_max = 16384, .vocab = 1005, .n_max = 8};
    assert_status(server_open(&second, &so, f.service, &m), ST_IO);
    assert_non_null(strstr(fail_message(), "Address already in use"));
    assert_status(server_check(&so), ST_IO);
    server_close(f.server, 0); /* and is free again at once */
    assert_ok(server_open(&f.server, &so, f.service, &m));
    close_fixture(&f, 0);
}

/* With grace streams end as they should; without, each is told. */
/* libmicrohttpd's, and here slow to take a socket out of a set, the daemon's thread slower than the
 * one that closes it. */
static atomic_bool slow_to_remove;
int epoll_ctl(int set, int op, int fd, struct epoll_event *event) {
    const bool daemons = syscall(SYS_gettid) != getpid();
    if (op == EPOLL_CTL_DEL && atomic_load(&slow_to_remove))
        nanosleep(&(struct timespec){.tv_nsec = daemons ? 6000000 : 2000000}, NULL);
    return (int)syscall(SYS_epoll_ctl, set, op, fd, event);
}

static void *knock(void *user) {
    const int32_t port = *(const int32_t *)user;
    while (atomic_load(&slow_to_remove)) {
        const int s = socket(AF_INET, SOCK_STREAM, 0);
        const struct sockaddr_in to = {.sin_family = AF_INET,
                                       .sin_port = htons((uint16_t)port),
                                       .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
        (void)connect(s, (const struct sockaddr *)&to, sizeof to);
        close(s);
    }
    return NULL;
}

/* The daemon takes the socket that listens out of its set when it is closed already: that would
 * abort (the twin is the close before MHD_stop_daemon). */
static void clients_that_come_at_the_end_harm_nobody(void **state) {
    (void)state;
    fixture f;
    pthread_t thread;
    open_fixture(&f, 1, 1, NULL);
    const api_model m = {.model = "tiny", .ctx_max = 16384, .vocab = 1005, .n_max = 8};
    for (int32_t i = 0; i < 20; i++) {
        server_options so = SERVER_OPTIONS_DEFAULT;
        so.port = server_port(f.server);
        atomic_store(&slow_to_remove, true);
        assert_int_equal(pthread_create(&thread, NULL, knock, &so.port), 0);
        nanosleep(&(struct timespec){.tv_nsec = 2000000}, NULL);
        server_close(f.server, 0);
        atomic_store(&slow_to_remove, false);
        pthread_join(thread, NULL);
        assert_ok(server_open(&f.server, &so, f.service, &m));
    }
    close_fixture(&f, 0);
}

static void shutdown_finishes_or_reports(void **state) {
    (void)state;
    for (int32_t graceful = 0; graceful < 2; graceful++) {
        closing k = {.grace_s = graceful ? 60 : 0};
        open_fixture(&k.f, 64, 64, NULL);
        const int32_t tokens = graceful ? 300 : 12000;
        char body[160];
        crowd *c = open_crowd();
        for (int32_t i = 0; i < 10; i++) {
            snprintf(body, sizeof body, long_stream, i, tokens);
            join_crowd(c, k.f.url, "/v1/completions", body);
        }
        run_crowd(c, 400);
        pthread_t thread;
        assert_int_equal(pthread_create(&thread, NULL, close_later, &k), 0);
        run_crowd(c, 0);
        pthread_join(thread, NULL);
        for (int32_t i = 0; i < c->n; i++) {
            heard h;
            hear(&h, &c->out[i]);
            assert_true(h.done);
            assert_int_equal(h.error, !graceful);
            if (graceful) assert_int_equal(h.n_events, tokens);
            hear_free(&h);
        }
        close_crowd(c);
    }
}

/* `amalgam serve` of a model with random weights; *said reads its standard output. */
static pid_t start_command(const char *model, FILE **said) {
    int out[2];
    assert_int_equal(pipe(out), 0);
    const char *binary = getenv("AMALGAM_BINARY");
    const pid_t pid = fork();
    if (pid == 0) {
        signal(SIGINT, SIG_DFL); /* a shell's background job inherits that it is ignored */
        dup2(out[1], STDOUT_FILENO);
        close(out[0]);
        close(out[1]);
        execl(binary ? binary : "build/amalgam", "amalgam", "serve", "--model", model,
              "--synthetic", "--threads", "1", "--port", "0", "--pages", "64", (char *)NULL);
        _exit(127);
    }
    close(out[1]);
    *said = fdopen(out[0], "r");
    return pid;
}

/* Weights of 7B parameters take a minute to make: that can be ended, too. */
static void the_command_ends_while_it_loads(void **state) {
    (void)state;
    FILE *said;
    int status_ = 0;
    const pid_t pid = start_command("Qwen2.5-7B", &said);
    nanosleep(&(struct timespec){.tv_nsec = 500000000L}, NULL);
    assert_int_equal(waitpid(pid, &status_, WNOHANG), 0);
    assert_int_equal(kill(pid, SIGINT), 0);
    pid_t ended = 0;
    for (int32_t i = 0; i < 500 && ended == 0; i++) {
        nanosleep(&(struct timespec){.tv_nsec = 10000000L}, NULL);
        ended = waitpid(pid, &status_, WNOHANG);
    }
    if (ended == 0) {
        kill(pid, SIGKILL);
        waitpid(pid, &status_, 0);
    }
    fclose(said);
    assert_int_equal(ended, pid);
    assert_true(WIFSIGNALED(status_));
}

/* A key in the environment is no argument that `ps` shows. */
static void the_command_takes_the_key_of_the_environment(void **state) {
    (void)state;
    char line[256] = "", *url;
    FILE *said;
    assert_int_equal(setenv("AMALGAM_API_KEY", "secret", 1), 0);
    const pid_t pid = start_command(model_folder, &said);
    assert_int_equal(unsetenv("AMALGAM_API_KEY"), 0);
    assert_non_null(fgets(line, sizeof line, said));
    url = strstr(line, "http://");
    assert_non_null(url);
    url[strcspn(url, "\r\n")] = 0;
    const long without = call_head(url, "/v1/models"), open = call_head(url, "/health");
    assert_int_equal(kill(pid, SIGTERM), 0);
    assert_int_equal(waitpid(pid, NULL, 0), pid);
    fclose(said);
    assert_int_equal(without, 401);
    assert_int_equal(open, 200);
}

/* The command: it says where it listens, and SIGTERM ends it with status 0. Its KV cache is smaller
 * than the model's context: that is the limit that it tells, and chats that set none get it. */
static void the_command_serves_until_sigterm(void **state) {
    (void)state;
    char line[256] = "", folder[256], *url;
    int status_;
    FILE *said;
    snprintf(folder, sizeof folder, "%s/", model_folder); /* the model's name has no slash */
    const pid_t pid = start_command(folder, &said);
    assert_non_null(fgets(line, sizeof line, said));
    url = strstr(line, "http://");
    assert_non_null(url);
    url[strcspn(url, "\r\n")] = 0;
    json_decref(call_json(url, "/v1/completions",
                          "{\"model\":\"serve_model\",\"prompt\":\"a\",\"max_tokens\":2}", 200));
    json_t *models = call_json(url, "/v1/models", NULL, 200);
    assert_int_equal(json_integer_value(at(json_array_get(at(models, "data"), 0), "max_model_len")),
                     64 * KV_PAGE_TOKENS);
    json_decref(models);
    json_decref(call_json(url, "/v1/chat/completions",
                          "{\"messages\":[{\"role\":\"user\",\"content\":\"a\"}],"
                          "\"stop\":[\"a\",\"e\",\" \"]}",
                          200));
    assert_int_equal(kill(pid, SIGTERM), 0);
    assert_int_equal(waitpid(pid, &status_, 0), pid);
    assert_true(WIFEXITED(status_));
    assert_int_equal(WEXITSTATUS(status_), 0);
    fclose(said);
}

/* Until nobody listens there any more: the server drains. */
static void wait_unheard(const char *url) {
    text t = {0};
    CURLcode code = CURLE_OK;
    for (int32_t i = 0; i < 1000 && code != CURLE_COULDNT_CONNECT; i++) {
        CURL *c = request_of(url, "/health", NULL, &t);
        code = curl_easy_perform(c);
        curl_easy_cleanup(c);
        nanosleep(&(struct timespec){.tv_nsec = 10000000L}, NULL);
    }
    text_free(&t);
    assert_int_equal(code, CURLE_COULDNT_CONNECT);
}

/* While a stream runs, twice: a terminal that closes lets it end, a second SIGTERM does not. The
 * server of nohup goes on. */
static void the_command_ends_by_other_signals(void **state) {
    (void)state;
    signal(SIGHUP, SIG_DFL); /* under nohup it is ignored, and the command would keep to that */
    for (int32_t hangup = 0; hangup < 2; hangup++) {
        char line[256] = "", body[160], *url;
        const int32_t tokens = 3000;
        int status_;
        FILE *said;
        const pid_t pid = start_command(model_folder, &said);
        assert_non_null(fgets(line, sizeof line, said));
        url = strstr(line, "http://");
        assert_non_null(url);
        url[strcspn(url, "\r\n")] = 0;
        snprintf(body, sizeof body, long_stream, 1, tokens);
        crowd *c = open_crowd();
        join_crowd(c, url, "/v1/completions", body);
        run_crowd(c, 400);
        for (int32_t i = 0; i < 2; i++) {
            assert_int_equal(kill(pid, hangup ? SIGHUP : SIGTERM), 0);
            wait_unheard(url);
        }
        run_crowd(c, 0);
        assert_int_equal(waitpid(pid, &status_, 0), pid);
        heard h;
        hear(&h, &c->out[0]);
        assert_int_equal(h.done, hangup);
        if (hangup) assert_int_equal(h.n_events, tokens);
        assert_true(hangup ? WIFEXITED(status_) && WEXITSTATUS(status_) == 0
                           : WIFSIGNALED(status_) && WTERMSIG(status_) == SIGTERM);
        hear_free(&h);
        close_crowd(c);
        fclose(said);
    }
}

static void nohup_keeps_the_command(void **state) {
    (void)state;
    char line[256] = "", *url;
    int status_;
    FILE *said;
    signal(SIGHUP, SIG_IGN);
    const pid_t pid = start_command(model_folder, &said);
    signal(SIGHUP, SIG_DFL);
    assert_non_null(fgets(line, sizeof line, said));
    url = strstr(line, "http://");
    assert_non_null(url);
    url[strcspn(url, "\r\n")] = 0;
    assert_int_equal(kill(pid, SIGHUP), 0);
    nanosleep(&(struct timespec){.tv_nsec = 100000000L}, NULL);
    assert_int_equal(call_head(url, "/health"), 200);
    assert_int_equal(kill(pid, SIGTERM), 0);
    assert_int_equal(waitpid(pid, &status_, 0), pid);
    assert_true(WIFEXITED(status_) && WEXITSTATUS(status_) == 0);
    fclose(said);
}

/* A command's standard output and exit status. */
static int run_command(const char *line, text *said) {
    char buf[4096];
    text_clear(said);
    FILE *f = popen(line, "r");
    assert_non_null(f);
    for (size_t n; (n = fread(buf, 1, sizeof buf, f)) > 0;) text_bytes(said, buf, n);
    const int status_ = pclose(f);
    return WIFEXITED(status_) ? WEXITSTATUS(status_) : -1;
}

/* Commands of C and of Lua, with more and with less than a buffer of output. */
static void what_cannot_be_written_is_said(void **state) {
    (void)state;
    static const char *const commands[] = {"formats", "corpus --bytes 100000", "run e03 --list",
                                           "tokenize --model workloads/tiny --text x"};
    const char *binary = getenv("AMALGAM_BINARY");
    char line[512];
    text said = {0};
    for (int32_t i = 0; i < COUNT_OF(commands); i++) {
        snprintf(line, sizeof line, "%s %s 2>&1 >/dev/full", binary ? binary : "build/amalgam",
                 commands[i]);
        assert_int_equal(run_command(line, &said), 1);
        assert_non_null(strstr(said.data, "amalgam: standard output"));
        snprintf(line, sizeof line, "%s %s 2>&1 >/dev/null", binary ? binary : "build/amalgam",
                 commands[i]);
        assert_int_equal(run_command(line, &said), 0);
        assert_int_equal(said.length, 0);
    }
    text_free(&said);
}

/* However long: what is pasted into a terminal is one message. */
static void a_line_is_one_message(void **state) {
    (void)state;
    const char *binary = getenv("AMALGAM_BINARY");
    char line[512];
    text said = {0};
    snprintf(line, sizeof line,
             "yes word | head -c 140000 | tr '\\n' ' ' | %s chat --model workloads/tiny 2>&1 "
             "| grep -c 'conversation is full'",
             binary ? binary : "build/amalgam");
    assert_int_equal(run_command(line, &said), 0);
    assert_string_equal(said.data, "1\n");
    text_free(&said);
}

/* ctrl-C in the middle of an answer ends that and not the conversation. Once in five times: the
 * answer, of a quarter of a second, may be over before the signal comes, which then ends all. */
static void an_answer_can_be_stopped(void **state) {
    (void)state;
    const char *binary = getenv("AMALGAM_BINARY");
    bool good = false;
    for (int32_t i = 0; i < 5 && !good; i++) {
        int in[2], out[2], status_;
        assert_int_equal(pipe(in) + pipe(out), 0);
        const pid_t pid = fork();
        if (pid == 0) {
            signal(SIGINT, SIG_DFL);
            dup2(in[0], STDIN_FILENO);
            dup2(out[1], STDOUT_FILENO);
            close(in[1]);
            close(out[0]);
            execl(binary ? binary : "build/amalgam", "amalgam", "chat", "--model", "workloads/tiny",
                  (char *)NULL);
            _exit(127);
        }
        close(in[0]);
        close(out[1]);
        static const char first[] = "Tell me a story about a clever fox and a red kite.\n",
                          second[] = "Hello\n";
        text said = {0};
        char c;
        assert_int_equal(write(in[1], first, sizeof first - 1), sizeof first - 1);
        assert_int_equal(read(out[0], &c, 1), 1);
        kill(pid, SIGINT);
        (void)!write(in[1], second, sizeof second - 1);
        close(in[1]);
        hear_out(out[0], &said);
        assert_int_equal(waitpid(pid, &status_, 0), pid);
        const char *told = said.data ? strstr(said.data, " tokens of prompt") : NULL;
        good = WIFEXITED(status_) && WEXITSTATUS(status_) == 0 && told &&
               strstr(told + 1, " tokens of prompt");
        text_free(&said);
    }
    assert_true(good);
}

/* Commands whose answer is tokens or values take no device that makes them up. */
static void made_up_tokens_are_no_answer(void **state) {
    (void)state;
    static const char *const commands[] = {"generate --prompt x", "chat", "eval --text README.md"};
    static const char *const made_up[] = {"sim", "null"};
    const char *binary = getenv("AMALGAM_BINARY");
    char line[512];
    text said = {0};
    for (int32_t i = 0; i < COUNT_OF(commands); i++)
        for (int32_t d = 0; d < COUNT_OF(made_up); d++) {
            snprintf(line, sizeof line, "%s %s --model workloads/tiny --device %s 2>&1 </dev/null",
                     binary ? binary : "build/amalgam", commands[i], made_up[d]);
            assert_int_equal(run_command(line, &said), 4);
            assert_non_null(strstr(said.data, "makes up its tokens; cpu and cuda compute them"));
        }
    text_free(&said);
}

static void check_result_keys(const char *path) {
    json_t *result;
    assert_ok(json_file(&result, path));
    static const char *const keys[] = {
        "date",        "endpoint_type", "backend",    "label",           "model_id", "tokenizer_id",
        "num_prompts", "request_rate",  "burstiness", "max_concurrency", "rtfx"};
    for (int32_t i = 0; i < COUNT_OF(keys); i++)
        if (!at(result, keys[i])) fail_msg("the result has no '%s'", keys[i]);
    for (int32_t i = 0; i < COUNT_OF(vllm_keys); i++)
        if (!at(result, vllm_keys[i])) fail_msg("the result has no '%s'", vllm_keys[i]);
    double sum = 0; /* of the requests themselves: what the mean was made of */
    for (size_t i = 0; i < 20; i++)
        sum += json_number_value(json_array_get(at(result, "ttfts"), i));
    assert_true(fabs(sum / 20 * 1e3 - json_number_value(at(result, "mean_ttft_ms"))) < 1e-6);
    assert_int_equal(json_array_size(at(result, "itls")), 20);
    assert_int_equal(json_array_size(json_array_get(at(result, "itls"), 19)), 5);
    json_decref(result);
}

/* The end token forced: every output is that one, here, over HTTP and in `generate`. Twins: without
 * the bias they are longer. */
static void a_bias_is_given_in_lua_and_by_option(void **state) {
    const fixture *f = *state;
    static const char code[] =
        "local a = require 'amalgam'\n"
        "for _, bias in ipairs { 100, 0 } do\n"
        "  local function load(id) return { n_requests = 4, prompt = { fixed = 8 }, ignore_eos ="
        " false,\n    output = { fixed = 6 }, sampling = { logit_bias = { [id] = bias } } } end\n"
        "  local r = a.bench_serve { url = '%s', vocab = 1000, workload = load(1001) }\n"
        "  local own = a.serve { model = 'workloads/tiny', workload = load(0) }\n"
        "  io.write(r.metrics.output_tokens, ' ', own.metrics.output_tokens, ' ')\n"
        "end\n"
        "print(pcall(a.serve, { model = 'workloads/tiny', workload = { sampling = { logit_bias ="
        " { [1] = 101 } } } }))\n";
    const char *binary = getenv("AMALGAM_BINARY"), *script = "build/tests/bias.lua";
    if (!binary) binary = "build/amalgam";
    char line[2048];
    text said = {0};
    snprintf(line, sizeof line, code, f->url);
    assert_ok(file_write(script, line, strlen(line)));
    snprintf(line, sizeof line, "%s lua %s", binary, script);
    assert_int_equal(run_command(line, &said), 0);
    if (strncmp(said.data, "4 4 24 24 ", 10) != 0) fail_msg("%s", said.data);
    assert_non_null(strstr(said.data, "logit_bias: 101 of token 1"));
    for (int32_t forced = 0; forced < 2; forced++) {
        snprintf(line, sizeof line,
                 "%s generate --model workloads/tiny --prompt Once --max-tokens 5 --json %s",
                 binary, forced ? "--logit-bias 7=-3 --logit-bias 0=100" : "");
        assert_int_equal(run_command(line, &said), 0);
        json_t *v = parsed(&said);
        assert_int_equal(json_integer_value(at(v, "output_tokens")), forced ? 1 : 5);
        json_decref(v);
    }
    text_free(&said);
}

/* bench serve's line and vLLM's keys, amalgam.bench_serve, chat: status 1 only says that this
 * machine was too busy for a valid run. */
static void commands_and_lua_measure_a_server(void **state) {
    const fixture *f = *state;
    const char *binary = getenv("AMALGAM_BINARY");
    if (!binary) binary = "build/amalgam";
    char line[1024], path[] = "build/tests/serve_result.json", script[] = "build/tests/serve.lua";
    text said = {0};
    snprintf(line, sizeof line,
             "%s bench serve --url %s --workload fixed --n 20 --rate 100 --prompt-tokens 8 "
             "--output-tokens 6 --vocab 1000 --json --save-result %s --save-detailed "
             "--label here --goodput ttft:1e6 --goodput e2el:1e6",
             binary, f->url, path);
    assert_true(run_command(line, &said) <= 1);
    json_t *v = parsed(&said);
    assert_int_equal(json_integer_value(at(v, "n_completed")), 20);
    assert_int_equal(json_integer_value(at(v, "output_tokens")), 120);
    const double rate = json_number_value(at(v, "requests_per_s"));
    assert_more(rate, 0);
    assert_true(json_number_value(at(v, "goodput_per_s")) == rate); /* all are within */
    json_decref(v);
    check_result_keys(path);
    snprintf(line, sizeof line,
             "%s bench serve --url %s --workload fixed --n 5 --output-tokens 6 --vocab 1000 "
             "--goodput ttft:1e6 --goodput e2e:0.001",
             binary, f->url);
    assert_true(run_command(line, &said) <= 1);
    assert_non_null(strstr(said.data, "goodput 0.000 requests/s"));

    snprintf(
        line, sizeof line,
        "local r = require'amalgam'.bench_serve{url='%s', vocab=1000, workload={preset='fixed',"
        "n_requests=10, prompt={fixed=8}, output={fixed=6}}, limits={ttft_ms=1e6}}\n"
        "print(r.status, r.origin, r.metrics.n_completed, r.metrics.output_tokens)\n",
        f->url);
    assert_ok(file_write(script, line, strlen(line)));
    snprintf(line, sizeof line, "%s lua %s", binary, script);
    assert_int_equal(run_command(line, &said), 0);
    assert_non_null(strstr(said.data, "ok\tmeasured\t10\t60"));

    snprintf(line, sizeof line,
             "printf 'hello\\n/precision\\n/reset\\n/quit\\nnever\\n' | %s chat --model "
             "workloads/tiny --threads 1 --max-tokens 8",
             binary);
    assert_int_equal(run_command(line, &said), 0);
    assert_non_null(strstr(said.data, "tokens/s]"));
    assert_non_null(strstr(said.data, "W16A16KV16 on cpu"));
    assert_non_null(strstr(said.data, "[a new conversation]"));
    snprintf(
        line, sizeof line,
        "%s quantize --model workloads/tiny --method rtn --precision W4 --out build/tests/w4 && "
        "echo /precision | %s chat --model build/tests/w4 --threads 1",
        binary, binary);
    assert_int_equal(run_command(line, &said), 0);
    assert_non_null(strstr(said.data, "W4A16KV16 on cpu")); /* as it is stored */
    text_free(&said);
}

/* The load generator's figures against what is known of the run. */
static void the_load_generator_counts_right(void **state) {
    const fixture *f = *state;
    arena a;
    workload_options wo;
    workload w;
    load_report r;
    metrics m;
    assert_ok(arena_open(&a, (size_t)1 << 30));
    assert_ok(workload_preset(&wo, "fixed"));
    wo.n_requests = 50;
    wo.prompt = (length_law){.kind = LENGTH_FIXED, .a = 20, .min = 20, .max = 20};
    wo.output = (length_law){.kind = LENGTH_UNIFORM, .a = 5, .b = 40, .min = 1, .max = 40};
    wo.arrival = ARRIVE_POISSON;
    wo.rate_per_s = 100;
    wo.vocab = 1000;
    wo.salted = true;
    assert_ok(workload_make(&w, &a, &wo));
    request_log *log = arena_array(&a, request_log, 50);
    const load_options o = {.url = f->url};
    static const char prompts[] = "vllm:prompt_tokens_total",
                      outputs[] = "vllm:generation_tokens_total";
    const double read = metric(f->url, prompts), made = metric(f->url, outputs);
    assert_ok(load_run(&r, &a, &o, &w, log));
    assert_true(metric(f->url, prompts) - read == (double)w.prompt_tokens);
    assert_true(metric(f->url, outputs) - made == (double)w.output_tokens);
    if (r.n_failed) fail_msg("%s", r.failure);
    assert_string_equal(r.model, "tiny");
    assert_ok(metrics_compute(&m, log, 50, NULL));
    assert_int_equal(m.n_completed, 50);
    assert_int_equal(m.prompt_tokens, w.prompt_tokens);
    assert_int_equal(m.output_tokens, w.output_tokens);
    assert_int_equal(r.n_events, w.output_tokens); /* one event a token */
    for (int32_t i = 0; i < 50; i++) {
        assert_int_equal(log[i].n_output, w.request[i].max_new);
        assert_true(log[i].dispatch_ns >= log[i].arrival_ns);
        assert_true(log[i].first_token_ns >= log[i].dispatch_ns);
        assert_true(log[i].token_ns[log[i].n_output - 1] == log[i].finish_ns);
    }
    wo.arrival = ARRIVE_CLOSED; /* and two users who take turns */
    wo.users = 2;
    assert_ok(workload_make(&w, &a, &wo));
    assert_ok(load_run(&r, &a, &o, &w, log));
    assert_ok(metrics_compute(&m, log, 50, NULL));
    assert_int_equal(m.n_completed, 50);
    assert_true(m.max_concurrency <= 2);
    /* The same as messages: the template adds tokens to every prompt. */
    const load_options chat = {.url = f->url, .path = "/v1/chat/completions", .tok = f->tok};
    const int64_t plain = m.prompt_tokens;
    assert_ok(load_run(&r, &a, &chat, &w, log));
    if (r.n_failed) fail_msg("%s", r.failure);
    assert_ok(metrics_compute(&m, log, 50, NULL));
    assert_int_equal(m.output_tokens, w.output_tokens);
    assert_more((double)m.prompt_tokens, (double)plain);
    const load_options silent = {.url = f->url, .path = "/v1/chat/completions"};
    assert_status(load_run(&r, &a, &silent, &w, log), ST_USAGE);
    const load_options nobody = {.url = "http://127.0.0.1:1"};
    assert_status(load_run(&r, &a, &nobody, &w, log), ST_IO);
    arena_close(&a);
    assert_true(load_valid(0.0009, 1.0));
    assert_false(load_valid(0.0011, 1.0));
    assert_false(load_valid(0.0002, 0.01));
    assert_false(load_valid(NAN, 1.0));
}

/* A server of somebody else: each connection gets the next answer and is closed. */
typedef struct {
    int fd;
    const char *const *answer;
    int32_t n;
    pthread_t thread;
    char url[64];
} stranger;

static void *serve_strangely(void *user) {
    const stranger *s = user;
    for (int32_t i = 0; i < s->n; i++) {
        char asked[8192];
        const int fd = accept(s->fd, NULL, NULL);
        assert_true(fd >= 0 && recv(fd, asked, sizeof asked, 0) > 0);
        static const char head[] = "HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n";
        if (strncmp(s->answer[i], "HTTP", 4) != 0)
            assert_true(send(fd, head, sizeof head - 1, 0) > 0);
        assert_true(send(fd, s->answer[i], strlen(s->answer[i]), 0) > 0);
        shutdown(fd, SHUT_WR);
        while (recv(fd, asked, sizeof asked, 0) > 0) {
        }
        close(fd);
    }
    return NULL;
}

static void stranger_begin(stranger *s, const char *const *answer, int32_t n) {
    struct sockaddr_in at = {.sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    socklen_t size = sizeof at;
    *s = (stranger){.fd = socket(AF_INET, SOCK_STREAM, 0), .answer = answer, .n = n};
    assert_int_equal(bind(s->fd, (struct sockaddr *)&at, size), 0);
    assert_int_equal(listen(s->fd, 8), 0);
    assert_int_equal(getsockname(s->fd, (struct sockaddr *)&at, &size), 0);
    snprintf(s->url, sizeof s->url, "http://127.0.0.1:%d", ntohs(at.sin_port));
    assert_int_equal(pthread_create(&s->thread, NULL, serve_strangely, s), 0);
}
static void stranger_end(stranger *s) {
    pthread_join(s->thread, NULL);
    close(s->fd);
}

/* So many requests of a prompt of four tokens and an output of two, one after another. */
static void few_requests(workload *w, arena *a, int32_t n) {
    workload_options o;
    assert_ok(workload_preset(&o, "fixed"));
    o.n_requests = n;
    o.prompt = (length_law){.kind = LENGTH_FIXED, .a = 4, .min = 4, .max = 4};
    o.output = (length_law){.kind = LENGTH_FIXED, .a = 2, .min = 2, .max = 2};
    o.arrival = ARRIVE_CLOSED;
    o.users = 1;
    o.vocab = 100;
    assert_ok(workload_make(w, a, &o));
}

#define EVENT(text, reason)                                                                        \
    "data: {\"choices\":[{\"index\":0,\"text\":\"" text "\",\"finish_reason\":" reason "}]}\n\n"
#define USAGE "data: {\"choices\":[],\"usage\":{\"prompt_tokens\":4,\"completion_tokens\":2}}\n\n"
#define FULL(text, more, reason, end)                                                              \
    "data: "                                                                                       \
    "{\"id\":\"cmpl-1\",\"object\":\"text_completion\",\"created\":1,\"model\":\"m\",\"choices\":" \
    "[{"                                                                                           \
    "\"index\":0,\"text\":\"" text "\",\"logprobs\":null" more ",\"finish_reason\":" reason        \
    "}],\"usage\":null}" end end
#define FULL_USAGE(more, end)                                                                      \
    "data: "                                                                                       \
    "{\"id\":\"cmpl-1\",\"object\":\"text_completion\",\"created\":1,\"model\":\"m\",\"choices\":" \
    "[],"                                                                                          \
    "\"usage\":{\"prompt_tokens\":4,\"total_tokens\":6,\"completion_tokens\":2" more "}}" end end

/* What each server of baselines/servers sends for a prompt of four tokens and an output of two. */
static const char *const dialects[] = {
    /* llama.cpp: the last event has no token */
    EVENT("a", "null") EVENT("b", "null") EVENT("", "\"length\"") USAGE "data: [DONE]\n\n",
    /* vLLM; two tokens may come in one event */
    FULL("a", ",\"stop_reason\":null,\"token_ids\":null", "null", "\n")
        FULL("b", ",\"stop_reason\":null,\"token_ids\":null", "\"length\"", "\n")
            FULL_USAGE(",\"prompt_tokens_details\":null", "\n") "data: [DONE]\n\n",
    FULL("ab", ",\"stop_reason\":null", "\"length\"", "\n") FULL_USAGE("", "\n") "data: [DONE]\n\n",
    /* SGLang */
    FULL("a", ",\"matched_stop\":null", "null", "\n")
        FULL("b", ",\"matched_stop\":null", "\"length\"", "\n")
            FULL_USAGE(",\"reasoning_tokens\":0", "\n") "data: [DONE]\n\n",
    /* LMDeploy: a character held back, an empty first event */
    FULL("", "", "null", "\n") FULL("ab", "", "\"length\"", "\n")
        FULL_USAGE(",\"prompt_tokens_details\":{\"cached_tokens\":0}", "\n") "data: [DONE]\n\n",
    /* TensorRT-LLM */
    FULL("a", ",\"token_ids\":null,\"stop_reason\":null,\"disaggregated_params\":null", "null",
         "\n") FULL("b", ",\"token_ids\":null,\"stop_reason\":null", "\"length\"", "\n")
        FULL_USAGE("", "\n") "data: [DONE]\n\n",
    /* transformers, and whatever writes events with CRLF and a ping between them; no [DONE] */
    FULL("a", "", "null", "\r\n") ": ping - 2026-01-01\r\n\r\n" FULL("b", "", "\"length\"", "\r\n")
        FULL_USAGE("", "\r\n"),
};

/* What is no answer, and a part of what is said of it. */
static const struct {
    const char *answer, *failure;
} mistakes[] = {
    {"HTTP/1.1 503 Busy\r\nConnection: close\r\n\r\nlater", "HTTP 503: later"},
    {"HTTP/1.1 200 OK\r\nContent-Length: 99\r\nConnection: close\r\n\r\n" EVENT("a", "null"),
     "artial" /* curl's words */},
    {"data: {\n\n", "an event that is no JSON"},
    {EVENT("a", "null") "data: {\"error\":{\"message\":\"no pages\"}}\n\n", "no pages"},
    {"data: {\"error\":{}}\n\n", "an error event"},
    {EVENT("a", "null") EVENT(
         "b", "\"length\"") "data: {\"choices\":[],\"usage\":{"
                            "\"prompt_tokens\":4,\"completion_tokens\":3}}\n\ndata: [DONE]\n\n",
     "usage tells of more tokens than were asked for"},
    {"data: [DONE]\n\n", "a stream without a token"},
    {" ", "a stream without a token"},
};

static void name_the_mistakes(void) {
    for (int32_t i = 0; i < COUNT_OF(mistakes); i++) {
        stranger s;
        arena a;
        workload w;
        load_report r;
        request_log log;
        stranger_begin(&s, &mistakes[i].answer, 1);
        assert_ok(arena_open(&a, 1 << 24));
        few_requests(&w, &a, 1);
        assert_ok(load_run(&r, &a, &(load_options){.url = s.url, .model = "m"}, &w, &log));
        assert_int_equal(r.n_failed, 1);
        if (!strstr(r.failure, mistakes[i].failure)) fail_msg("case %d: '%s'", i, r.failure);
        assert_int_equal(log.finish, FINISH_REFUSED);
        stranger_end(&s);
        arena_close(&a);
    }
}

/* llama.cpp tells its vocabulary under a name of its own; a stream that ends before it is over is a
 * failure. */
static void strangers_are_read_carefully(void **state) {
    (void)state;
    enum { N = COUNT_OF(dialects) };
    const char *answers[N + 2] = {"{\"data\":[{\"id\":\"tiny\",\"meta\":{\"n_vocab\":777}}]}"};
    memcpy(answers + 1, dialects, sizeof dialects);
    answers[N + 1] = EVENT("a", "null") EVENT("b", "null");
    stranger s;
    char name[128];
    int32_t vocab;
    arena a;
    workload w;
    load_report r;
    stranger_begin(&s, answers, COUNT_OF(answers));
    assert_ok(arena_open(&a, 1 << 24));
    few_requests(&w, &a, N + 1);
    request_log *log = arena_array(&a, request_log, N + 1);
    char folder[300] = ""; /* a server's model may be the path of a folder */
    memset(folder, 'm', sizeof folder - 1);
    const load_options o = {.url = s.url, .model = folder};
    assert_ok(load_ask_model(name, sizeof name, &vocab, &o));
    assert_int_equal(vocab, 777);
    assert_ok(load_run(&r, &a, &o, &w, log));
    assert_string_equal(r.model, folder);
    assert_int_equal(r.n_failed, 1);
    assert_string_equal(r.failure, "the stream was cut off");
    assert_int_equal(log[N].finish, FINISH_REFUSED);
    for (int32_t i = 0; i < N; i++) {
        assert_int_equal(log[i].n_output, 2);
        assert_int_equal(log[i].finish, FINISH_LENGTH);
        assert_true(log[i].token_ns[1] == log[i].finish_ns);
    }
    stranger_end(&s);
    arena_close(&a);
    name_the_mistakes();
}

/* `bench serve` under ctrl-C: one request has ended, one is in flight (its connection is never
 * taken), one was never sent. */
static void an_interrupted_load_says_what_it_has(void **state) {
    (void)state;
    const char *binary = getenv("AMALGAM_BINARY"), *path = "build/tests/interrupted.json";
    stranger s;
    int out[2], status_;
    text said = {0};
    json_t *v;
    stranger_begin(&s, dialects, 1);
    assert_int_equal(pipe(out), 0);
    const pid_t pid = fork();
    if (pid == 0) {
        signal(SIGINT, SIG_DFL);
        dup2(out[1], STDOUT_FILENO);
        close(out[0]);
        execl(binary ? binary : "build/amalgam", "amalgam", "bench", "serve", "--url", s.url,
              "--model", "m", "--vocab", "100", "--workload", "fixed", "--n", "3", "--users", "1",
              "--prompt-tokens", "4", "--output-tokens", "2", "--json", "--save-result", path,
              "--save-detailed", (char *)NULL);
        _exit(127);
    }
    close(out[1]);
    pthread_join(s.thread, NULL);
    (void)usleep(200000);
    assert_int_equal(kill(pid, SIGINT), 0);
    hear_out(out[0], &said);
    assert_int_equal(waitpid(pid, &status_, 0), pid);
    assert_true(WIFEXITED(status_) && WEXITSTATUS(status_) == 130);
    close(s.fd);
    v = parsed(&said);
    assert_true(json_is_true(at(v, "interrupted")));
    assert_int_equal(json_integer_value(at(v, "n_completed")), 1);
    assert_int_equal(json_integer_value(at(v, "n_cancelled")), 1);
    assert_int_equal(json_integer_value(at(v, "n_failed")), 0);
    json_decref(v);
    assert_ok(json_file(&v, path));
    assert_true(json_is_true(at(v, "amalgam_interrupted")));
    assert_int_equal(json_integer_value(at(v, "num_prompts")), 2);
    assert_int_equal(json_integer_value(at(v, "completed")), 1);
    const json_t *errors = at(v, "errors");
    assert_int_equal(json_array_size(errors), 2);
    assert_string_equal(json_string_value(json_array_get(errors, 0)), "");
    assert_string_equal(json_string_value(json_array_get(errors, 1)), "interrupted");
    json_decref(v);
    text_free(&said);
}

/* Slashes at the end of a URL mean nothing; what cannot be one is refused before the first request.
 */
static void urls_are_read_as_meant(void **state) {
    const fixture *f = *state;
    char slashed[128], endless[2000] = "", name[LOAD_NAME_MAX];
    int32_t vocab;
    arena a;
    workload_options wo;
    workload w;
    load_report r;
    request_log log[2];
    assert_ok(arena_open(&a, 1 << 24));
    assert_ok(workload_preset(&wo, "fixed"));
    wo.n_requests = 2;
    wo.prompt = (length_law){.kind = LENGTH_FIXED, .a = 4, .min = 4, .max = 4};
    wo.output = (length_law){.kind = LENGTH_FIXED, .a = 2, .min = 2, .max = 2};
    wo.vocab = 100;
    assert_ok(workload_make(&w, &a, &wo));
    snprintf(slashed, sizeof slashed, "%s//", f->url);
    const load_options joined = {.url = slashed, .path = "v1/completions"};
    assert_ok(load_run(&r, &a, &joined, &w, log));
    assert_int_equal(r.n_failed, 0);
    snprintf(slashed, sizeof slashed, "%s/v1/", f->url); /* as OpenAI's clients have it */
    assert_ok(load_run(&r, &a, &(load_options){.url = slashed}, &w, log));
    assert_int_equal(r.n_failed, 0);
    memset(endless, 'u', sizeof endless - 1);
    const load_options cut = {.url = endless}, other = {.url = "file:///etc/passwd"};
    assert_status(load_ask_model(name, sizeof name, &vocab, &cut), ST_RANGE);
    assert_status(load_ask_model(name, sizeof name, &vocab, &other), ST_USAGE);
    arena_close(&a);
}

static const struct CMUnitTest tests[] = {
    cmocka_unit_test(plain_endpoints_answer),
    cmocka_unit_test(a_lost_device_ends_all_requests),
    cmocka_unit_test(a_salt_keeps_a_prefix_apart),
    cmocka_unit_test(ends_are_counted_by_their_reasons),
    cmocka_unit_test(parts_of_a_message_are_joined),
    cmocka_unit_test(no_output_counts_as_none),
    cmocka_unit_test(metrics_are_text_that_prometheus_reads),
    cmocka_unit_test(prompts_come_in_four_forms),
    cmocka_unit_test(special_tokens_are_added_as_asked),
    cmocka_unit_test(a_prompt_is_cut_to_its_end),
    cmocka_unit_test(draws_follow_the_seed),
    cmocka_unit_test(tokens_are_found_in_the_text),
    cmocka_unit_test(the_tokenizer_knows_ends),
    cmocka_unit_test(stop_strings_want_a_tokenizer),
    cmocka_unit_test(limits_are_where_they_are_said_to_be),
    cmocka_unit_test(no_chance_is_a_number),
    cmocka_unit_test(top_logprobs_want_logprobs),
    cmocka_unit_test(made_up_tokens_have_no_logprobs),
    cmocka_unit_test(stop_strings_cut_and_never_leak),
    cmocka_unit_test(what_stops_can_be_kept),
    cmocka_unit_test(logits_are_biased_and_penalised),
    cmocka_unit_test(an_answer_has_its_least_length),
    cmocka_unit_test(a_prompt_is_echoed),
    cmocka_unit_test(a_prompt_is_scored),
    cmocka_unit_test(a_prompt_has_its_own_scores),
    cmocka_unit_test(a_prompt_alone_is_scored),
    cmocka_unit_test(chat_streams_what_it_says_whole),
    cmocka_unit_test(an_answer_can_be_gone_on_with),
    cmocka_unit_test(the_usage_so_far_is_in_every_event),
    cmocka_unit_test(the_default_length_fits_the_context),
    cmocka_unit_test(what_is_wrong_is_said),
    cmocka_unit_test(what_is_too_long_is_said),
    cmocka_unit_test(a_crowd_of_streams_gets_every_token_once),
    cmocka_unit_test(clients_that_leave_free_their_pages),
    cmocka_unit_test(a_slow_reader_delays_nobody),
    cmocka_unit_test(a_long_prompt_delays_nobody),
    cmocka_unit_test(bodies_of_clients_that_left_are_not_read),
    cmocka_unit_test(long_prompts_end_with_the_server),
    cmocka_unit_test(waiting_for_a_step_is_counted),
    cmocka_unit_test(broken_senders_are_cut_off),
    cmocka_unit_test(the_load_generator_counts_right),
    cmocka_unit_test(strangers_are_read_carefully),
    cmocka_unit_test(an_interrupted_load_says_what_it_has),
    cmocka_unit_test(commands_and_lua_measure_a_server),
    cmocka_unit_test(a_bias_is_given_in_lua_and_by_option),
    cmocka_unit_test(urls_are_read_as_meant),
    cmocka_unit_test(ends_that_come_with_data_are_seen),
    cmocka_unit_test(a_full_queue_is_429),
    cmocka_unit_test(a_stream_begins_when_all_of_it_is_taken),
    cmocka_unit_test(what_comes_while_it_ends_is_refused),
    cmocka_unit_test(the_key_is_wanted),
    cmocka_unit_test(a_port_has_one_server),
    cmocka_unit_test(clients_that_come_at_the_end_harm_nobody),
    cmocka_unit_test(shutdown_finishes_or_reports),
    cmocka_unit_test(what_cannot_be_written_is_said),
    cmocka_unit_test(a_line_is_one_message),
    cmocka_unit_test(an_answer_can_be_stopped),
    cmocka_unit_test(made_up_tokens_are_no_answer),
    cmocka_unit_test(the_command_ends_while_it_loads),
    cmocka_unit_test(the_command_takes_the_key_of_the_environment),
    cmocka_unit_test(the_command_serves_until_sigterm),
    cmocka_unit_test(the_command_ends_by_other_signals),
    cmocka_unit_test(nohup_keeps_the_command),
};

int main(void) {
    signal(SIGPIPE, SIG_IGN);
    curl_global_init(CURL_GLOBAL_DEFAULT);
    const int failed = cmocka_run_group_tests(tests, open_shared, close_shared);
    curl_global_cleanup();
    return failed;
}
