/* api.c - see api.h. */
#include "api.h"

#include "sampler.h"
#include "utf8.h"

#include <string.h>
#include <time.h>

static const char WHERE[] = "body";

/* --- Writing ---------------------------------------------------------------------------------- */

void api_put_string(text *t, const char *s, size_t n) {
    static const char letters[] = "\"\"\\\\\nn\rr\tt\bb\ff";
    text_bytes(t, "\"", 1);
    size_t from = 0;
    for (size_t i = 0; i < n; i++) {
        const char c = s[i];
        if (c != '"' && c != '\\' && (unsigned char)c >= 32) continue;
        text_bytes(t, s + from, i - from);
        from = i + 1;
        const char *known = NULL;
        for (const char *k = letters; *k && !known; k += 2)
            if (*k == c) known = k + 1;
        if (known)
            text_add(t, "\\%c", *known);
        else
            text_add(t, "\\u%04x", (unsigned)(unsigned char)c);
    }
    text_bytes(t, s + from, n - from);
    text_bytes(t, "\"", 1);
}

void api_put_error(text *t, int32_t http_status, const char *message) {
    static const struct {
        int32_t http_status;
        const char *type;
    } types[] = {
        {401, "authentication_error"}, {404, "not_found_error"}, {429, "rate_limit_error"},
        {500, "server_error"},         {503, "server_error"},
    };
    const char *type = "invalid_request_error";
    for (int32_t i = 0; i < COUNT_OF(types); i++)
        if (types[i].http_status == http_status) type = types[i].type;
    text repaired = {0};
    utf8_repair(&repaired, message, strlen(message)); /* it may quote a part of what was sent */
    text_add(t, "{\"error\":{\"message\":");
    api_put_string(t, repaired.data ? repaired.data : "", repaired.length);
    text_add(t, ",\"type\":\"%s\",\"param\":null,\"code\":%d}}", type, http_status);
    text_free(&repaired);
}

/* --- Prompts ---------------------------------------------------------------------------------- */

/* The prompt is there: what of it was asked for has to fit. */
static status end_prompt(const api_request *r, const api_model *m, ids *prompt) {
    const int64_t surplus = r->n_last ? prompt->length - r->n_last : 0;
    if (surplus > 0) {
        prompt->length = r->n_last;
        memmove(prompt->data, prompt->data + surplus, sizeof *prompt->data * (size_t)r->n_last);
    }
    const int64_t n = prompt->length;
    if (n < 1) return FAIL(ST_RANGE, "the prompt is empty");
    if (n >= m->ctx_max)
        return FAIL(ST_RANGE, "the prompt has %lld tokens, this model's context takes %d",
                    (long long)n, m->ctx_max - 1);
    return ST_OK;
}

static status encode(const api_model *m, const char *s, size_t n, uint32_t flags, ids *out) {
    if (!m->tok) return FAIL(ST_UNSUPPORTED, "this server has no tokenizer: send token ids");
    /* No token is longer than this: a prompt past the limit costs no encoding. */
    enum { TOKEN_BYTES_MAX = 512 };
    if (n / TOKEN_BYTES_MAX > (size_t)m->ctx_max)
        return FAIL(ST_RANGE, "a prompt of %zu bytes is over the context of %d tokens", n,
                    m->ctx_max);
    return tokenizer_encode(m->tok, s, n, flags, out);
}

static status take_ids(const api_model *m, const json_t *list, const char *what, ids *out) {
    const size_t n = json_array_size(list);
    for (size_t i = 0; i < n; i++) {
        const json_t *v = json_array_get(list, i);
        if (!json_is_integer(v)) return FAIL(ST_FORMAT, "%s: item %zu is no integer", what, i);
        const json_int_t id = json_integer_value(v);
        if (id < 0 || id >= m->vocab)
            return FAIL(ST_RANGE, "%s: token %lld is outside the vocabulary of %d", what,
                        (long long)id, m->vocab);
        ids_add(out, (int32_t)id);
    }
    return ids_status(out);
}

/* Bits for the tokenizer: what it puts around a text, unless add_special_tokens says otherwise. */
static status take_special(const json_t *body, bool add, uint32_t *flags) {
    TRY(json_opt_bool(body, "add_special_tokens", WHERE, &add));
    *flags = (add ? TOKENIZER_ADD_SPECIAL : 0) | TOKENIZER_PARSE_SPECIAL;
    return ST_OK;
}

static status take_prompt(api_request *r, const api_model *m, const json_t *v, uint32_t flags) {
    ids *to = &r->prompt[r->n_prompts++];
    if (json_is_string(v))
        TRY(encode(m, json_string_value(v), json_string_length(v), flags, to));
    else if (json_is_array(v))
        TRY(take_ids(m, v, "prompt", to));
    else
        return FAIL(ST_FORMAT, "prompt: neither a string, nor token ids, nor a list of these");
    return end_prompt(r, m, to);
}

static status take_prompts(api_request *r, const api_model *m, const json_t *body) {
    const json_t *v = json_find(body, "prompt");
    uint32_t flags;
    if (!v) return FAIL(ST_USAGE, "'prompt' is missing");
    TRY(take_special(body, true, &flags));
    const bool several = json_is_array(v) && !json_is_integer(json_array_get(v, 0));
    const size_t n = several ? json_array_size(v) : 1;
    if (n < 1 || n > API_PROMPTS_MAX)
        return FAIL(ST_RANGE, "%zu prompts; 1 to %d are taken", n, API_PROMPTS_MAX);
    r->prompt = mem_alloc(n, sizeof *r->prompt);
    if (!r->prompt) return FAIL(ST_NOMEM, "prompts");
    for (size_t i = 0; i < n; i++)
        TRY(take_prompt(r, m, several ? json_array_get(v, i) : v, flags));
    return ST_OK;
}

/* A list of text parts becomes one string. */
static status flatten_content(json_t *message) {
    const json_t *parts = json_object_get(message, "content");
    if (!json_is_array(parts)) {
        if (!parts || json_is_string(parts) || json_is_null(parts)) return ST_OK;
        return FAIL(ST_FORMAT, "content of a message: neither a string nor a list of parts");
    }
    text joined = {0};
    for (size_t i = 0; i < json_array_size(parts); i++) {
        const json_t *part = json_array_get(parts, i), *kind = json_object_get(part, "type"),
                     *words = json_object_get(part, "text");
        if (!json_is_string(words) ||
            (kind && strcmp(json_string_value(kind) ? json_string_value(kind) : "", "text") != 0)) {
            text_free(&joined);
            return FAIL(ST_UNSUPPORTED, "a part of a message that is no text");
        }
        if (i) text_bytes(&joined, "\n", 1);
        text_bytes(&joined, json_string_value(words), json_string_length(words));
    }
    json_t *flat = json_stringn(joined.data ? joined.data : "", joined.length);
    text_free(&joined);
    if (!flat || json_object_set_new(message, "content", flat) != 0)
        return FAIL(ST_NOMEM, "messages");
    return ST_OK;
}

/* OpenAI sends the arguments of a call as a string of JSON; templates want the object. */
static void open_arguments(json_t *message) {
    json_t *calls = json_object_get(message, "tool_calls");
    for (size_t i = 0; i < json_array_size(calls); i++) {
        json_t *function = json_object_get(json_array_get(calls, i), "function");
        const char *arguments = json_string_value(json_object_get(function, "arguments"));
        json_t *opened = arguments ? json_loads(arguments, JSON_REJECT_DUPLICATES, NULL) : NULL;
        if (opened) (void)json_object_set_new(function, "arguments", opened);
    }
}

static status check_messages(json_t *messages) {
    if (!json_is_array(messages)) return FAIL(ST_FORMAT, "'messages' is no list of messages");
    if (json_array_size(messages) == 0) return FAIL(ST_FORMAT, "'messages' is empty");
    for (size_t i = 0; i < json_array_size(messages); i++) {
        json_t *message = json_array_get(messages, i);
        if (!json_is_object(message)) return FAIL(ST_FORMAT, "message %zu is no object", i);
        if (!json_is_string(json_object_get(message, "role")))
            return FAIL(ST_FORMAT, "message %zu has no 'role'", i);
        TRY(flatten_content(message));
        open_arguments(message);
    }
    return ST_OK;
}

/* chat_template_kwargs and what OpenAI has at the top; a new reference. */
static status take_variables(const json_t *body, json_t **out) {
    const json_t *given = json_find(body, "chat_template_kwargs");
    if (given && !json_is_object(given))
        return FAIL(ST_FORMAT, "'chat_template_kwargs' is no object");
    *out = given ? json_copy((json_t *)given) : json_object();
    if (!*out) return FAIL(ST_NOMEM, "messages");
    json_t *effort = json_find(body, "reasoning_effort");
    if (effort) (void)json_object_set(*out, "reasoning_effort", effort);
    return ST_OK;
}

/* continue_final_message: a mark behind the text of the last message says where it ends in what the
 * template makes of it. U+E000 is nobody's character; the space shows whether the template strips
 * what a message ends with. */
static const char mark[] = "\xEE\x80\x80 ";

static status mark_final(json_t *messages) {
    json_t *last = json_array_get(messages, json_array_size(messages) - 1);
    const json_t *content = json_object_get(last, "content");
    if (!json_is_string(content) || json_string_length(content) == 0)
        return FAIL(ST_FORMAT, "'continue_final_message': the last message has no text");
    text t = {0};
    text_bytes(&t, json_string_value(content), json_string_length(content));
    text_bytes(&t, mark, strlen(mark));
    json_t *marked = t.failed ? NULL : json_stringn(t.data, t.length);
    text_free(&t);
    return marked && json_object_set_new(last, "content", marked) == 0 ? ST_OK
                                                                       : FAIL(ST_NOMEM, "messages");
}

/* End where the last mark is. */
static status cut_at_mark(text *rendered) {
    const size_t n = strlen(mark) - 1; /* but the space */
    size_t at = rendered->length;
    while (at > 0 && !(at + n <= rendered->length && memcmp(rendered->data + at, mark, n) == 0))
        at--;
    if (at == 0)
        return FAIL(ST_UNSUPPORTED,
                    "'continue_final_message': this template does not show the last message");
    const bool stripped = at + n == rendered->length || rendered->data[at + n] != ' ';
    while (stripped && at > 0 && strchr(" \t\r\n", rendered->data[at - 1])) at--;
    rendered->length = at;
    return ST_OK;
}

/* Clients leave the content of a message out that calls tools. */
static bool any_without_text(const json_t *messages) {
    for (size_t i = 0; i < json_array_size(messages); i++)
        if (!json_is_string(json_object_get(json_array_get(messages, i), "content"))) return true;
    return false;
}

/* `continues`: the answer goes on from the last message, whose turn stays open. */
static status render_messages(const api_model *m, json_t *body, bool *continues, ids *out) {
    if (!m->tpl) return FAIL(ST_UNSUPPORTED, "this model has no chat template");
    json_t *messages = json_object_get(body, "messages"), *variables = NULL;
    if (!messages) return FAIL(ST_USAGE, "'messages' is missing");
    TRY(check_messages(messages));
    const json_t *tools = json_find(body, "tools");
    if (tools && !json_is_array(tools)) return FAIL(ST_FORMAT, "'tools' is no list");
    uint32_t flags; /* a template has those tokens in it */
    TRY(take_special(body, false, &flags));
    *continues = false;
    TRY(json_opt_bool(body, "continue_final_message", WHERE, continues));
    bool prompt = !*continues;
    TRY(json_opt_bool(body, "add_generation_prompt", WHERE, &prompt));
    if (prompt && *continues)
        return FAIL(ST_USAGE, "'continue_final_message' and 'add_generation_prompt' are both true");
    if (*continues) TRY(mark_final(messages));
    TRY(take_variables(body, &variables));
    text rendered = {0};
    const chat_template_input in = {.messages = messages,
                                    .tools = json_array_size(tools) ? tools : NULL,
                                    .variables = variables,
                                    .add_generation_prompt = prompt,
                                    .bos = m->bos,
                                    .eos = m->eos,
                                    .now_s = (int64_t)time(NULL)};
    status st = chat_template_render(m->tpl, &in, &rendered);
    if (st == ST_FORMAT && any_without_text(messages))
        st = fail_prefix(st, "a message has no content, which this template may not take");
    if (st == ST_OK && *continues) st = cut_at_mark(&rendered);
    if (st == ST_OK)
        st = encode(m, rendered.data ? rendered.data : "", rendered.length, flags, out);
    text_free(&rendered);
    json_decref(variables);
    return st;
}

static status take_messages(api_request *r, const api_model *m, json_t *body) {
    r->prompt = mem_alloc(1, sizeof *r->prompt);
    if (!r->prompt) return FAIL(ST_NOMEM, "prompts");
    r->n_prompts = 1;
    TRY(render_messages(m, body, &r->continues, &r->prompt[0]));
    return end_prompt(r, m, &r->prompt[0]);
}

/* --- Parameters ------------------------------------------------------------------------------- */

static status take_f32(const json_t *body, const char *key, double lo, double hi, float *out) {
    double v = (double)*out;
    TRY(json_opt_f64(body, key, WHERE, lo, hi, &v));
    *out = (float)v;
    return ST_OK;
}

/* {"token id": bias, ...}: JSON has no other keys than strings. */
static status take_bias(api_request *r, const api_model *m, const json_t *body) {
    const json_t *map = json_find(body, "logit_bias");
    sampling *s = &r->sampling;
    const char *key;
    json_t *v;
    if (!map) return ST_OK;
    if (!json_is_object(map)) return FAIL(ST_FORMAT, "'logit_bias' is no object");
    if (json_object_size(map) > LOGIT_BIAS_MAX)
        return FAIL(ST_RANGE, "'logit_bias' has %zu tokens, at most %d are taken",
                    json_object_size(map), LOGIT_BIAS_MAX);
    r->bias = mem_alloc(json_object_size(map) + 1, sizeof *r->bias);
    if (!r->bias) return FAIL(ST_NOMEM, "logit_bias");
    json_object_foreach((json_t *)(uintptr_t)map, key, v) {
        int64_t id;
        if (!parse_i64(key, 0, INT64_MAX, &id))
            return FAIL(ST_FORMAT, "'logit_bias': '%.40s' is no token id", key);
        if (id >= m->vocab)
            return FAIL(ST_RANGE, "'logit_bias': token %lld is outside the vocabulary of %d",
                        (long long)id, m->vocab);
        if (!json_is_number(v))
            return FAIL(ST_FORMAT, "'logit_bias': that of %lld is no number", (long long)id);
        r->bias[s->n_bias++] =
            (logit_bias){.token = (int32_t)id, .bias = (float)json_number_value(v)};
    }
    logit_bias_sort(r->bias, s->n_bias);
    s->bias = r->bias;
    return ST_OK;
}

static status take_sampling(api_request *r, const json_t *body, uint64_t seed) {
    sampling *s = &r->sampling;
    *s = (sampling){.temperature = 1, .top_p = 1, .repetition_penalty = 1, .n_logprobs = -1};
    TRY(take_f32(body, "temperature", 0, 100, &s->temperature));
    TRY(take_f32(body, "top_p", 0, 1, &s->top_p));
    TRY(take_f32(body, "min_p", 0, 1, &s->min_p));
    TRY(take_f32(body, "repetition_penalty", 0.01, 100, &s->repetition_penalty));
    TRY(take_f32(body, "presence_penalty", -2, 2, &s->presence_penalty));
    TRY(take_f32(body, "frequency_penalty", -2, 2, &s->frequency_penalty));
    TRY(json_opt_i32(body, "min_tokens", WHERE, 0, 1 << 24, &s->min_tokens));
    int32_t top_k = 0;
    TRY(json_opt_i32(body, "top_k", WHERE, -1, 1 << 24, &top_k));
    s->top_k = top_k < 0 ? 0 : top_k; /* -1 is how vLLM says all */
    int64_t given = -1;
    TRY(json_opt_i64(body, "seed", WHERE, INT64_MIN, INT64_MAX, &given));
    s->seed = json_find(body, "seed") ? (uint64_t)given : seed;
    return ST_OK;
}

static status take_logprobs(api_request *r, const api_model *m, const json_t *body) {
    if (r->chat) {
        TRY(json_opt_bool(body, "logprobs", WHERE, &r->logprobs));
        TRY(json_opt_i32(body, "top_logprobs", WHERE, 0, LOGPROBS_MAX, &r->n_top));
        if (r->n_top > 0 && !r->logprobs)
            return FAIL(ST_USAGE, "'top_logprobs' without \"logprobs\": true");
    } else {
        int32_t n = -1;
        TRY(json_opt_i32(body, "logprobs", WHERE, 0, LOGPROBS_MAX, &n));
        r->logprobs = n >= 0;
        r->n_top = n >= 0 ? n : 0;
    }
    r->n_prompt_top = -1;
    TRY(json_opt_i32(body, "prompt_logprobs", WHERE, 0, LOGPROBS_MAX, &r->n_prompt_top));
    if (r->n_prompt_top >= 0 && r->stream)
        return FAIL(ST_UNSUPPORTED,
                    "'prompt_logprobs' come with a whole answer, not with a stream");
    const bool any = r->logprobs || r->n_prompt_top >= 0;
    if (any && m->made_up)
        return FAIL(ST_UNSUPPORTED,
                    "this device makes up its tokens: they have no log-probability");
    if (any) r->sampling.n_logprobs = api_tops(r);
    return ST_OK;
}

int32_t api_tops(const api_request *r) {
    return r->n_top > r->n_prompt_top ? r->n_top : r->n_prompt_top;
}

bool api_holds_prompt(const api_request *r) { return r->echo || r->n_prompt_top >= 0; }

bool api_scores_prompt(const api_request *r) {
    return (r->echo && r->logprobs) || r->n_prompt_top >= 0;
}

static status add_stop(api_request *r, const json_t *v) {
    if (!json_is_string(v)) return FAIL(ST_FORMAT, "'stop' is neither a string nor a list of them");
    if (json_string_length(v) == 0) return FAIL(ST_RANGE, "'stop': an empty string");
    if (strlen(json_string_value(v)) != json_string_length(v))
        return FAIL(ST_UNSUPPORTED, "'stop': a string with U+0000");
    char *copy = mem_alloc(json_string_length(v) + 1, 1);
    if (!copy) return FAIL(ST_NOMEM, "stop strings");
    memcpy(copy, json_string_value(v), json_string_length(v));
    r->stop[r->n_stops++] = copy;
    return ST_OK;
}

static status take_stops(api_request *r, const api_model *m, const json_t *body) {
    const json_t *v = json_find(body, "stop"), *list = json_find(body, "stop_token_ids");
    const size_t n = json_is_array(v) ? json_array_size(v) : v ? 1 : 0;
    if (n > API_STOPS_MAX) return FAIL(ST_RANGE, "'stop': more than %d strings", API_STOPS_MAX);
    if (n > 0 && !m->tok)
        return FAIL(ST_UNSUPPORTED, "'stop': this server has no tokenizer: send 'stop_token_ids'");
    r->stop = mem_alloc(n + 1, sizeof *r->stop);
    r->stop_token = mem_alloc(API_STOP_TOKENS_MAX + TOKENIZER_EOS_MAX, sizeof *r->stop_token);
    if (!r->stop || !r->stop_token) return FAIL(ST_NOMEM, "stop strings");
    for (size_t i = 0; i < n; i++) TRY(add_stop(r, json_is_array(v) ? json_array_get(v, i) : v));
    if (!list) return ST_OK;
    if (!json_is_array(list) || json_array_size(list) > API_STOP_TOKENS_MAX)
        return FAIL(ST_FORMAT, "'stop_token_ids' is no list of at most %d ids",
                    API_STOP_TOKENS_MAX);
    ids all = {0};
    const status st = take_ids(m, list, "stop_token_ids", &all);
    for (int64_t i = 0; st == ST_OK && i < all.length; i++)
        r->stop_token[r->n_stop_tokens++] = all.data[i];
    ids_free(&all);
    return st;
}

/* What the tokenizer's files name as the end of a text ends one; config.json need not have it. */
static void add_end_tokens(api_request *r, const api_model *m) {
    int32_t n = 0;
    const int32_t *eos = m->tok && !r->ignore_eos ? tokenizer_eos(m->tok, &n) : NULL;
    for (int32_t i = 0; i < n; i++) r->stop_token[r->n_stop_tokens++] = eos[i];
}

/* Tokens of the prompt are held from the beginning: a small body could ask for much memory. */
static status check_held(const api_request *r) {
    int64_t n = 0;
    for (int32_t i = 0; i < r->n_prompts && api_holds_prompt(r); i++)
        n += (int64_t)r->prompt[i].length * r->n * (1 + api_tops(r));
    if (n > API_ECHO_MAX)
        return FAIL(ST_RANGE, "'%s' of %lld log-probabilities, at most %d in a request",
                    r->echo ? "echo" : "prompt_logprobs", (long long)n, API_ECHO_MAX);
    return ST_OK;
}

/* Output tokens of each prompt: what was asked for, or what the context leaves; where nobody said,
 * completions end after OpenAI's 16 at the latest. None at all is for completions to ask. */
static status take_max_new(api_request *r, const api_model *m, const json_t *body) {
    const int32_t least = r->chat ? 1 : 0;
    int32_t asked = -1;
    TRY(json_opt_i32(body, "max_tokens", WHERE, least, 1 << 24, &asked));
    TRY(json_opt_i32(body, "max_completion_tokens", WHERE, least, 1 << 24, &asked));
    r->no_output = asked == 0;
    r->max_new = mem_alloc((size_t)r->n_prompts, sizeof *r->max_new);
    if (!r->max_new) return FAIL(ST_NOMEM, "prompts");
    for (int32_t i = 0; i < r->n_prompts; i++) {
        const int32_t n = (int32_t)r->prompt[i].length, room = m->ctx_max - n;
        if (asked > room)
            return FAIL(ST_RANGE,
                        "max_tokens %d and a prompt of %d tokens exceed this model's context of %d",
                        asked, n, m->ctx_max);
        r->max_new[i] = asked > 0 ? asked : r->chat || room < 16 ? room : 16;
        if (r->no_output) r->max_new[i] = 1;
        const int32_t most = r->no_output ? 0 : r->max_new[i];
        if (r->sampling.min_tokens > most)
            return FAIL(ST_RANGE, "'min_tokens' %d is more than the %d of 'max_tokens'",
                        r->sampling.min_tokens, most);
    }
    return ST_OK;
}

/* What would change the result and cannot be done, each with the value that asks for nothing; so
 * does null, and what is empty. */
static const struct {
    const char *key, *nothing;
} unsupported[] = {
    {"suffix", ""},
    {"best_of", "1"},
    {"response_format", "{\"type\":\"text\"}"},
    {"modalities", "[\"text\"]"},
    {"audio", ""},
    {"web_search_options", ""},
    {"functions", ""},
    {"function_call", "\"none\""},
    {"length_penalty", "1"}, /* from here on: vLLM's */
    {"use_beam_search", "false"},
    {"bad_words", ""},
    {"allowed_token_ids", ""},
    {"structured_outputs", ""},
    {"guided_json", ""},
    {"guided_regex", ""},
    {"guided_choice", ""},
    {"guided_grammar", ""},
    {"chat_template", ""},
    {"documents", ""},
    {"thinking_token_budget", ""},
    {"regex", ""}, /* from here on: SGLang's and llama.cpp's */
    {"ebnf", ""},
    {"grammar", ""},
    {"json_schema", ""},
};

static bool is_empty(const json_t *v) {
    return json_is_string(v)   ? json_string_length(v) == 0
           : json_is_array(v)  ? json_array_size(v) == 0
           : json_is_object(v) ? json_object_size(v) == 0
                               : false;
}

/* 0 is 0.0 too. */
static bool means(const json_t *v, const char *nothing) {
    json_t *same = json_loads(nothing, JSON_DECODE_ANY, NULL);
    const bool yes = json_is_number(v) && json_is_number(same)
                         ? json_number_value(v) == json_number_value(same)
                         : json_equal(v, same);
    json_decref(same);
    return yes;
}

/* "auto" and "none" leave it to the model, whose calls come as it writes them: as text. */
static status refuse_unsupported(const json_t *body) {
    for (int32_t i = 0; i < COUNT_OF(unsupported); i++) {
        const json_t *v = json_find(body, unsupported[i].key);
        if (!v || is_empty(v) || means(v, unsupported[i].nothing)) continue;
        return FAIL(ST_UNSUPPORTED, "'%s' is not supported%s%s", unsupported[i].key,
                    unsupported[i].nothing[0] ? ", other than " : "", unsupported[i].nothing);
    }
    const json_t *choice = json_find(body, "tool_choice");
    const char *kind = json_string_value(choice);
    if (choice && !(kind && (strcmp(kind, "auto") == 0 || strcmp(kind, "none") == 0)))
        return FAIL(ST_UNSUPPORTED,
                    "'tool_choice' is not supported, other than \"auto\" or \"none\"");
    return ST_OK;
}

static status take_body(api_request *r, const api_model *m, json_t *body, uint64_t seed) {
    const char *name = NULL;
    TRY(json_opt_string(body, "model", WHERE, &name));
    if (name && strcmp(name, m->model) != 0)
        return FAIL(ST_NOTFOUND, "the model '%.100s' is not served here, '%s' is", name, m->model);
    TRY(refuse_unsupported(body));
    TRY(json_opt_bool(body, "stream", WHERE, &r->stream));
    TRY(json_opt_bool(body, "ignore_eos", WHERE, &r->ignore_eos));
    TRY(json_opt_bool(body, "return_token_ids", WHERE, &r->return_ids));
    TRY(json_opt_bool(body, "include_stop_str_in_output", WHERE, &r->keep_stop));
    bool skip = true;
    TRY(json_opt_bool(body, "skip_special_tokens", WHERE, &skip));
    r->keep_special = !skip;
    TRY(json_opt_bool(body, "echo", WHERE, &r->echo));
    if (r->echo && r->chat) return FAIL(ST_UNSUPPORTED, "'echo' is of completions, not of chat");
    const json_t *so = json_find(body, "stream_options");
    if (so && !json_is_object(so)) return FAIL(ST_FORMAT, "'stream_options' is no object");
    if (so) TRY(json_opt_bool(so, "include_usage", WHERE, &r->include_usage));
    if (so) TRY(json_opt_bool(so, "continuous_usage_stats", WHERE, &r->running_usage));
    r->n = 1;
    TRY(json_opt_i32(body, "n", WHERE, 1, m->n_max, &r->n));
    const char *salt = NULL;
    TRY(json_opt_string(body, "cache_salt", WHERE, &salt));
    if (salt) r->salt = hash_bytes(salt, strlen(salt), 1);
    TRY(json_opt_i32(body, "truncate_prompt_tokens", WHERE, 1, 1 << 24, &r->n_last));
    TRY(take_sampling(r, body, seed));
    TRY(take_bias(r, m, body));
    TRY(take_logprobs(r, m, body));
    TRY(take_stops(r, m, body));
    add_end_tokens(r, m);
    TRY(sampling_check(&r->sampling));
    TRY(r->chat ? take_messages(r, m, body) : take_prompts(r, m, body));
    TRY(check_held(r));
    return take_max_new(r, m, body);
}

static status open_body(json_t **out, const char *body, size_t n) {
    TRY(json_parse(out, body, n, WHERE));
    if (json_is_object(*out)) return ST_OK;
    json_decref(*out);
    *out = NULL;
    return FAIL(ST_FORMAT, "the body is no JSON object");
}

status api_parse(api_request *out, const api_model *m, bool chat, const char *body, size_t n,
                 uint64_t seed) {
    *out = (api_request){.chat = chat};
    json_t *object;
    TRY(open_body(&object, body, n));
    const status st = take_body(out, m, object, seed);
    json_decref(object);
    if (st != ST_OK) api_request_free(out);
    return st;
}

void api_request_free(api_request *r) {
    for (int32_t i = 0; i < r->n_prompts; i++) ids_free(&r->prompt[i]);
    for (int32_t i = 0; i < r->n_stops; i++) mem_free(r->stop[i]);
    mem_free(r->prompt);
    mem_free(r->max_new);
    mem_free(r->stop);
    mem_free(r->stop_token);
    mem_free(r->bias);
    *r = (api_request){0};
}

status api_tokenize(ids *out, const api_model *m, const char *body, size_t n) {
    json_t *object;
    TRY(open_body(&object, body, n));
    const json_t *prompt = json_find(object, "prompt");
    uint32_t flags;
    bool continues;
    status st = take_special(object, true, &flags);
    if (st == ST_OK && json_find(object, "messages"))
        st = render_messages(m, object, &continues, out);
    else if (st == ST_OK && json_is_string(prompt))
        st = encode(m, json_string_value(prompt), json_string_length(prompt), flags, out);
    else if (st == ST_OK)
        st = FAIL(ST_FORMAT, "'prompt' is no string");
    json_decref(object);
    return st;
}

status api_detokenize(text *out, const api_model *m, const char *body, size_t n) {
    json_t *object;
    ids all = {0};
    TRY(open_body(&object, body, n));
    const json_t *list = json_find(object, "tokens");
    status st = json_is_array(list) ? take_ids(m, list, "tokens", &all)
                                    : FAIL(ST_FORMAT, "'tokens' is no list");
    if (st == ST_OK && !m->tok) st = FAIL(ST_UNSUPPORTED, "this server has no tokenizer");
    if (st == ST_OK) st = tokenizer_decode(m->tok, all.data, all.length, false, out);
    ids_free(&all);
    json_decref(object);
    return st;
}
