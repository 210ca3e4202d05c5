/* api.h - the bodies of OpenAI's completions and chat completions: what a client asked for,
 * checked. */
#ifndef AMALGAM_API_H
#define AMALGAM_API_H
#include "chat_template.h"
#include "request.h"
#include "tokenizer.h"

enum {
    API_PROMPTS_MAX = 256,
    API_STOPS_MAX = 16,
    API_STOP_TOKENS_MAX = 64,
    API_ECHO_MAX = 1 << 24 /* log-probabilities of prompts, all choices of a request together */
};

/* What a server can do; fixed while it runs. */
typedef struct {
    const char *model;        /* the name that it serves */
    const tokenizer *tok;     /* NULL: prompts are token ids, output is their numbers */
    const chat_template *tpl; /* NULL: no chat */
    const char *bos, *eos;    /* as text, for the template */
    int32_t ctx_max, vocab;
    int32_t n_max; /* choices of a prompt */
    bool made_up;  /* tokens come of a device without logits */
} api_model;

/* Owned by itself: api_request_free. Pointers lie in it. */
typedef struct {
    bool chat, stream, include_usage, ignore_eos, return_ids, echo;
    bool running_usage;   /* continuous_usage_stats: every event has that of its choice so far */
    bool keep_stop;       /* include_stop_str_in_output: the text ends after what stops it */
    bool keep_special;    /* skip_special_tokens false: these are shown */
    bool continues;       /* continue_final_message: the answer is the rest of a message */
    bool no_output;       /* max_tokens 0: of the prompt alone, to see its log-probabilities */
    int32_t n;            /* choices of each prompt */
    int32_t n_prompts;    /* choice c answers prompt c / n */
    int32_t n_last;       /* truncate_prompt_tokens: so many tokens of a prompt, 0 = all */
    ids *prompt;          /* [n_prompts] */
    int32_t *max_new;     /* [n_prompts]; 1 with no_output: what is drawn is for nobody */
    sampling sampling;    /* seed of choice c: sampling.seed + c; its bias is of this request */
    bool logprobs;        /* were asked for */
    int32_t n_top;        /* and so many best ones */
    int32_t n_prompt_top; /* prompt_logprobs: those of the prompt with so many best; -1 = not */
    uint64_t salt;        /* cache_salt */
    int32_t *stop_token;  /* [n_stop_tokens] */
    int32_t n_stop_tokens;
    logit_bias *bias; /* [sampling.n_bias] */
    char **stop;      /* [n_stops] */
    int32_t n_stops;
} api_request;

/* Best tokens that are kept of each one: as many as anybody asked for. */
int32_t api_tops(const api_request *r);
/* Whether the answer's tokens begin with those of the prompt, and these are scored. */
bool api_holds_prompt(const api_request *r);
bool api_scores_prompt(const api_request *r);

/* Read a body of n bytes. Fields that clients send and that change nothing here are ignored;
 * those that would change the result and are not supported are refused. seed: when the client
 * gave none. FORMAT, RANGE, UNSUPPORTED, USAGE (a missing field, too): the client's fault, the
 * message says what; NOTFOUND: another model; NOMEM. On failure there is nothing to free. */
status api_parse(api_request *out, const api_model *m, bool chat, const char *body, size_t n,
                 uint64_t seed);
void api_request_free(api_request *r); /* idempotent */

/* {"prompt": …} or {"messages": …} to ids (POST /tokenize); {"tokens": […]} to text
 * (/detokenize). */
status api_tokenize(ids *out, const api_model *m, const char *body, size_t n);
status api_detokenize(text *out, const api_model *m, const char *body, size_t n);

/* Append a JSON string with its quotes: n bytes of UTF-8. */
void api_put_string(text *t, const char *s, size_t n);
/* {"error": {…}} for an HTTP status. */
void api_put_error(text *t, int32_t http_status, const char *message);
#endif
