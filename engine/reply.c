/* reply.c - see reply.h. */
#include "reply.h"

#include "utf8.h"

#include <math.h>
#include <string.h>

/* --- Pieces ----------------------------------------------------------------------------------- */

static const char *reason_text(finish_reason f) {
    return f == FINISH_LENGTH ? "length" : f == FINISH_STOP ? "stop" : "abort";
}

static void put_head(text *t, const reply_head *h, const job *j, bool chunk) {
    text_add(t, "{\"id\":\"%s\",\"object\":\"%s\",\"created\":%lld,\"model\":", h->id,
             !j->request.chat ? "text_completion"
             : chunk          ? "chat.completion.chunk"
                              : "chat.completion",
             (long long)h->created_s);
    api_put_string(t, h->model, strlen(h->model));
    text_add(t, ",\"choices\":[");
}

static void put_counts(text *t, int64_t prompt, int64_t made, int64_t cached) {
    text_add(t,
             "\"usage\":{\"prompt_tokens\":%lld,\"completion_tokens\":%lld,\"total_tokens\":%lld,"
             "\"prompt_tokens_details\":{\"cached_tokens\":%lld}}",
             (long long)prompt, (long long)made, (long long)(prompt + made), (long long)cached);
}

static void put_usage(text *t, const job *j) {
    int64_t prompt = 0, made = 0, cached = 0;
    for (int32_t i = 0; i < j->n_choices; i++) {
        if (i % j->request.n == 0) prompt += j->choice[i].n_prompt;
        if (i % j->request.n == 0) cached += j->choice[i].n_cached;
        made += j->choice[i].n_ready - j->choice[i].n_given;
    }
    put_counts(t, prompt, made, cached);
}

/* A token as text; what is no complete text on its own, as the vocabulary writes it. `bytes`: those
 * that it adds to the text, where characters are split over tokens, too. */
static void put_token(text *t, const reply_head *h, int32_t id, text *bytes) {
    const char *piece = h->tok ? tokenizer_piece(h->tok, id) : NULL;
    text_clear(bytes);
    if (piece)
        (void)tokenizer_token_bytes(h->tok, id, bytes);
    else
        text_add(bytes, "%d", id);
    const bool whole = bytes->length > 0 && utf8_valid(bytes->data, bytes->length) &&
                       strlen(bytes->data) == bytes->length; /* many readers take no U+0000 */
    const char *shown = whole ? bytes->data : piece ? piece : "";
    api_put_string(t, shown, whole ? bytes->length : strlen(shown));
}

/* JSON has no infinities; OpenAI's own floor is -9999. */
static double shown_logprob(float v) { return isfinite(v) ? (double)v : -9999.0; }

static void put_chat_logprob(text *t, const reply_head *h, int32_t id, float logprob, text *bytes) {
    text_add(t, "{\"token\":");
    put_token(t, h, id, bytes);
    text_add(t, ",\"logprob\":%.9g,\"bytes\":[", shown_logprob(logprob));
    for (size_t i = 0; i < bytes->length; i++)
        text_add(t, "%s%d", i ? "," : "", (int)(unsigned char)bytes->data[i]);
    text_add(t, "]");
}

/* Of tokens [from, to), as chat completions have it. */
static void put_chat_logprobs(text *t, const reply_head *h, const job_choice *c, int32_t from,
                              int32_t to, text *bytes) {
    const int32_t n_top = c->job->request.n_top, tops = api_tops(&c->job->request);
    text_add(t, "\"logprobs\":{\"content\":[");
    for (int32_t i = from; i < to; i++) {
        if (i > from) text_add(t, ",");
        put_chat_logprob(t, h, c->token[i].id, c->token[i].logprob, bytes);
        text_add(t, ",\"top_logprobs\":[");
        for (int32_t k = 0; k < n_top && c->top_id[i * tops + k] >= 0; k++) {
            if (k) text_add(t, ",");
            put_chat_logprob(t, h, c->top_id[i * tops + k], c->top_logprob[i * tops + k], bytes);
            text_add(t, "}");
        }
        text_add(t, "]}");
    }
    text_add(t, "]}");
}

/* And as completions do. */
static void put_text_logprobs(text *t, const reply_head *h, const job_choice *c, int32_t from,
                              int32_t to, text *bytes) {
    const int32_t n_top = c->job->request.n_top, tops = api_tops(&c->job->request);
    text_add(t, "\"logprobs\":{\"tokens\":[");
    for (int32_t i = from; i < to; i++) {
        if (i > from) text_add(t, ",");
        put_token(t, h, c->token[i].id, bytes);
    }
    text_add(t, "],\"token_logprobs\":[");
    const bool none = c->n_given && from == 0; /* of the first token of all */
    for (int32_t i = from; i < to; i++)
        if (i == 0 && none)
            text_add(t, "null");
        else
            text_add(t, "%s%.9g", i > from ? "," : "", shown_logprob(c->token[i].logprob));
    text_add(t, "],\"top_logprobs\":[");
    if (none && to > 0) text_add(t, "null");
    for (int32_t i = from + none; i < to; i++) {
        text_add(t, "%s{", i > from ? "," : "");
        for (int32_t k = 0; k < n_top && c->top_id[i * tops + k] >= 0; k++) {
            if (k) text_add(t, ",");
            put_token(t, h, c->top_id[i * tops + k], bytes);
            text_add(t, ":%.9g", shown_logprob(c->top_logprob[i * tops + k]));
        }
        text_add(t, "}");
    }
    text_add(t, "],\"text_offset\":[");
    for (int32_t i = from; i < to; i++)
        text_add(t, "%s%d", i > from ? "," : "", i ? c->token[i - 1].chars_end : 0);
    text_add(t, "]}");
}

static void put_logprobs(text *t, const reply_head *h, const job_choice *c, int32_t from,
                         int32_t to) {
    const api_request *r = &c->job->request;
    text bytes = {0};
    if (!r->logprobs)
        text_add(t, "\"logprobs\":null");
    else if (r->chat)
        put_chat_logprobs(t, h, c, from, to, &bytes);
    else
        put_text_logprobs(t, h, c, from, to, &bytes);
    text_free(&bytes);
}

static void put_ids(text *t, const job_choice *c, int32_t from, int32_t to) {
    if (!c->job->request.return_ids) return;
    if (from < c->n_given) from = c->n_given < to ? c->n_given : to;
    text_add(t, ",\"token_ids\":[");
    for (int32_t i = from; i < to; i++) text_add(t, "%s%d", i > from ? "," : "", c->token[i].id);
    text_add(t, "]");
}

static void put_rank(text *t, const reply_head *h, int32_t id, float logprob, int32_t rank,
                     text *bytes) {
    text_add(t, "\"%d\":{\"logprob\":%.9g,\"rank\":", id, shown_logprob(logprob));
    text_add(t, rank ? "%d" : "null", rank);
    text_add(t, ",\"decoded_token\":");
    put_token(t, h, id, bytes);
    text_add(t, "}");
}

/* As vLLM has them: of each token of the prompt but the first the best ones by id, and itself,
 * whose rank is known where it is among them. */
static void put_prompt_logprobs(text *t, const reply_head *h, const job_choice *c) {
    const int32_t n_top = c->job->request.n_prompt_top, tops = api_tops(&c->job->request);
    text bytes = {0};
    if (n_top < 0) return;
    text_add(t, ",\"prompt_logprobs\":[null");
    for (int32_t i = 1; i < c->n_given; i++) {
        const int32_t *top = tops ? &c->top_id[i * tops] : NULL;
        bool itself = false;
        text_add(t, ",{");
        for (int32_t k = 0; k < n_top && top[k] >= 0; k++) {
            if (k) text_add(t, ",");
            put_rank(t, h, top[k], c->top_logprob[i * tops + k], k + 1, &bytes);
            itself |= top[k] == c->token[i].id;
        }
        if (!itself) {
            if (n_top && top[0] >= 0) text_add(t, ",");
            put_rank(t, h, c->token[i].id, c->token[i].logprob, 0, &bytes);
        }
        text_add(t, "}");
    }
    text_add(t, "]");
    text_free(&bytes);
}

/* --- The whole object ------------------------------------------------------------------------- */

void reply_whole(text *out, const reply_head *h, const job *j) {
    put_head(out, h, j, false);
    for (int32_t i = 0; i < j->n_choices; i++) {
        const job_choice *c = &j->choice[i];
        const char *s = c->out.text.data ? c->out.text.data : "";
        text_add(out, "%s{\"index\":%d,", i ? "," : "", i);
        if (j->request.chat) {
            text_add(out, "\"message\":{\"role\":\"assistant\",\"content\":");
            api_put_string(out, s, c->text_end);
            text_add(out, "},");
        } else {
            text_add(out, "\"text\":");
            api_put_string(out, s, c->text_end);
            text_add(out, ",");
        }
        put_logprobs(out, h, c, j->request.echo ? 0 : c->n_given, c->n_ready);
        put_ids(out, c, 0, c->n_ready);
        text_add(out, ",\"finish_reason\":\"%s\"", reason_text(c->finish));
        if (!j->request.chat) put_prompt_logprobs(out, h, c);
        text_add(out, "}");
    }
    text_add(out, "],");
    put_usage(out, j);
    if (j->request.chat) put_prompt_logprobs(out, h, &j->choice[0]);
    text_add(out, "}");
}

/* --- Events ----------------------------------------------------------------------------------- */

status reply_stream_open(reply_stream *s, const job *j) {
    *s = (reply_stream){0};
    s->sent = mem_alloc((size_t)j->n_choices, sizeof *s->sent);
    s->shown = mem_alloc((size_t)j->n_choices, sizeof *s->shown);
    s->ended = mem_alloc((size_t)j->n_choices, sizeof *s->ended);
    return s->sent && s->shown && s->ended ? ST_OK : FAIL(ST_NOMEM, "stream");
}

void reply_stream_close(reply_stream *s) {
    mem_free(s->sent);
    mem_free(s->shown);
    mem_free(s->ended);
    *s = (reply_stream){0};
}

/* The next event of a choice, if there is one: of a token, the first with what is echoed. The last
 * token carries the finish reason and what was held back; a choice that ends without one
 * (cancelled) gets an event of its own. */
static bool put_event(text *out, const reply_head *h, const job_choice *c, reply_stream *s) {
    const int32_t at = s->sent[c->index];
    const bool token = at < c->n_ready;
    int32_t next = at < c->n_given ? c->n_given + 1 : at + 1;
    if (next > c->n_ready) next = c->n_ready;
    const bool last = c->finish != FINISH_NONE && next >= c->n_ready;
    if (s->ended[c->index] || (!token && !last)) return false;
    const size_t from = s->shown[c->index], to = last ? c->text_end : c->token[next - 1].text_end;
    const char *words = c->out.text.data ? c->out.text.data + from : "";
    text_add(out, "data: ");
    put_head(out, h, c->job, true);
    text_add(out, "{\"index\":%d,", c->index);
    if (c->job->request.chat) {
        text_add(out, "\"delta\":{%s\"content\":", at == 0 ? "\"role\":\"assistant\"," : "");
        api_put_string(out, words, to - from);
        text_add(out, "},");
    } else {
        text_add(out, "\"text\":");
        api_put_string(out, words, to - from);
        text_add(out, ",");
    }
    put_logprobs(out, h, c, at, next);
    put_ids(out, c, at, next);
    if (last)
        text_add(out, ",\"finish_reason\":\"%s\"}]", reason_text(c->finish));
    else
        text_add(out, ",\"finish_reason\":null}]");
    if (c->job->request.running_usage) {
        text_add(out, ",");
        put_counts(out, c->n_prompt, next > c->n_given ? next - c->n_given : 0, c->n_cached);
    } else if (c->job->request.include_usage) {
        text_add(out, ",\"usage\":null"); /* it comes in the last event */
    }
    text_add(out, "}\n\n");
    s->sent[c->index] = next;
    s->shown[c->index] = to;
    s->ended[c->index] = last;
    return true;
}

void reply_events(text *out, const reply_head *h, const job *j, reply_stream *s, size_t enough) {
    /* Round robin, so that the choices of a request advance together. */
    for (int32_t idle = 0; idle < j->n_choices && out->length < enough;) {
        const job_choice *c = &j->choice[s->choice];
        s->choice = (s->choice + 1) % j->n_choices;
        idle = put_event(out, h, c, s) ? 0 : idle + 1;
    }
    if (!j->done || out->length >= enough || s->end) return;
    if (j->st != ST_OK) {
        text_add(out, "data: ");
        api_put_error(out, j->st == ST_INTERRUPTED ? 503 : 500, j->why);
        text_add(out, "\n\n");
    } else if (j->request.include_usage) {
        text_add(out, "data: ");
        put_head(out, h, j, true);
        text_add(out, "],");
        put_usage(out, j);
        text_add(out, "}\n\n");
    }
    text_add(out, "data: [DONE]\n\n");
    s->end = true;
}
