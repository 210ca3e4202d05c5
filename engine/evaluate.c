/* evaluate.c - see evaluate.h. */
#include "evaluate.h"

#include "kernel.h"
#include "output.h"
#include "safetensors.h"

#include <math.h>
#include <string.h>

/* log softmax(x)[target] in double. */
static double log_probability(const float *x, int32_t n, int32_t target) {
    double top = -INFINITY, sum = 0;
    for (int32_t i = 0; i < n; i++)
        if ((double)x[i] > top) top = (double)x[i];
    for (int32_t i = 0; i < n; i++) sum += exp((double)x[i] - top);
    return (double)x[target] - top - log(sum);
}

/* One window as a batch of one sequence in pages 0, 1, 2, …, with rows [from, n) sampled. */
typedef struct {
    arena memory;
    int32_t *position, *page;
    sample_row *sample;
    float *logits;
    sampled *sampled;
} window_batch;

static status window_open(window_batch *w, int32_t window, int32_t vocab) {
    const size_t n = (size_t)window;
    TRY(arena_open(&w->memory, n * (sizeof(sample_row) + sizeof(sampled) + 64) +
                                   n * (size_t)vocab * sizeof(float) + 65536));
    w->position = arena_array(&w->memory, int32_t, n);
    w->page = arena_array(&w->memory, int32_t, n / KV_PAGE_TOKENS + 1);
    w->sample = arena_array(&w->memory, sample_row, n);
    w->sampled = arena_array(&w->memory, sampled, n);
    w->logits = arena_array(&w->memory, float, n *(size_t)vocab);
    if (!w->position || !w->page || !w->sample || !w->sampled || !w->logits)
        return FAIL(ST_NOMEM, "window of %d tokens", window);
    for (int32_t i = 0; i < window; i++) w->position[i] = i;
    for (int32_t i = 0; i <= window / KV_PAGE_TOKENS; i++) w->page[i] = i;
    return ST_OK;
}

/* Logits of rows from .. n - 2 of a window: predictions of token[from+1 .. n). */
static status run_window(engine *e, window_batch *w, const int32_t *token, int32_t n,
                         int32_t from) {
    const int32_t rows = n - 1 - from;
    for (int32_t i = 0; i < rows; i++) w->sample[i] = (sample_row){.row = from + i, .draw = 0};
    const int32_t seq_start[2] = {0, n}, page_start[2] = {0, (int32_t)div_up(n, KV_PAGE_TOKENS)};
    const int64_t id = 0;
    const batch b = {.n_seqs = 1,
                     .n_tokens = n,
                     .n_samples = rows,
                     .n_decodes = n == 1,
                     .token = token,
                     .position = w->position,
                     .seq_start = seq_start,
                     .kv_len = &n,
                     .page_start = page_start,
                     .page = w->page,
                     .id = &id,
                     .sample = w->sample};
    int64_t cost;
    TRY(engine_settle(e));
    TRY(forward_step(engine_forward(e), &b, w->sampled, &cost));
    return forward_logits(engine_forward(e), w->logits);
}

/* Sum of log-probabilities of token[from+1 .. n) given all before them. */
static status score_window(engine *e, window_batch *w, const int32_t *token, int32_t n,
                           int32_t from, double *sum) {
    const int32_t vocab = engine_config(e)->vocab, rows = n - 1 - from;
    TRY(run_window(e, w, token, n, from));
    for (int32_t i = 0; i < rows; i++)
        *sum += log_probability(w->logits + (int64_t)i * vocab, vocab, token[from + i + 1]);
    return ST_OK;
}

static status check_text(engine *e, const int32_t *token, int64_t n, int32_t window,
                         int32_t stride) {
    if (n < 2) return FAIL(ST_RANGE, "a text of %lld tokens has nothing to score", (long long)n);
    if (window < 2 || stride < 1 || stride >= window)
        return FAIL(ST_RANGE, "window %d and stride %d: stride must be below window", window,
                    stride);
    if (window > engine_config(e)->ctx_max)
        return FAIL(ST_RANGE, "window %d exceeds the model's context of %d", window,
                    engine_config(e)->ctx_max);
    if (div_up(window, KV_PAGE_TOKENS) > engine_capacity(e)->n_pages)
        return FAIL(ST_OOM, "window %d exceeds the KV pool of %lld tokens", window,
                    (long long)engine_capacity(e)->kv_tokens);
    CHECK(sched_running(engine_sched(e)) == 0);
    for (int64_t i = 0; i < n; i++)
        if (token[i] < 0 || token[i] >= engine_config(e)->vocab)
            return FAIL(ST_RANGE, "token %d is outside the vocabulary", token[i]);
    return ST_OK;
}

/* A sum of logarithms of probabilities: everything that is no number in a model ends up in it. */
static status check_sum(double sum) {
    if (isfinite(sum)) return ST_OK;
    return FAIL(ST_FORMAT, "the logits are no numbers: a weight or a scale is not finite, or the "
                           "activations overflow");
}

status evaluate_perplexity(engine *e, const int32_t *token, int64_t n, int32_t window,
                           int32_t stride, perplexity_result *out) {
    *out = (perplexity_result){.nll = NAN, .perplexity = NAN};
    TRY(check_text(e, token, n, window, stride));
    window_batch w = {0};
    status st = window_open(&w, window, engine_config(e)->vocab);
    double sum = 0;
    int64_t scored = 1; /* tokens 0..scored-1 are done; the first has no context */
    for (int64_t at = 0; st == ST_OK && scored < n; at += stride) {
        const int32_t size = (int32_t)i64_min(window, n - at);
        st = score_window(e, &w, token + at, size, (int32_t)(scored - 1 - at), &sum);
        scored = at + size;
    }
    arena_close(&w.memory);
    TRY(st);
    TRY(check_sum(sum));
    out->n_scored = n - 1;
    out->nll = -sum / (double)out->n_scored;
    out->perplexity = exp(out->nll);
    return ST_OK;
}

/* --- Agreement -------------------------------------------------------------------------------- */

static int32_t most_likely(const float *x, int32_t n) {
    int32_t best = 0;
    for (int32_t i = 1; i < n; i++)
        if (x[i] > x[best]) best = i;
    return best;
}

/* log of the sum of exponentials, in double. */
static double log_total(const float *x, int32_t n) {
    const double top = (double)x[most_likely(x, n)];
    double sum = 0;
    for (int32_t i = 0; i < n; i++) sum += exp((double)x[i] - top);
    return top + log(sum);
}

/* One position: x the engine's logits, y the reference's. KL never falls below 0 by rounding. */
static void compare_row(agreement_result *r, const float *x, const float *y, int32_t vocab,
                        int32_t target) {
    const double zx = log_total(x, vocab), zy = log_total(y, vocab);
    double kl = 0;
    for (int32_t i = 0; i < vocab; i++) {
        const double log_y = (double)y[i] - zy, log_x = (double)x[i] - zx;
        kl += exp(log_y) * (log_y - log_x);
    }
    if (kl < 0) kl = 0;
    r->n++;
    r->agreement += most_likely(x, vocab) == most_likely(y, vocab);
    r->kl_nats += kl;
    if (!(kl <= r->kl_nats_max)) r->kl_nats_max = kl;
    r->perplexity -= (double)x[target] - zx;
    r->reference_perplexity -= (double)y[target] - zy;
}

static status compare_windows(engine *e, engine *reference, window_batch *x, window_batch *y,
                              const int32_t *token, int64_t n, int32_t window, int32_t stride,
                              agreement_result *r) {
    const int32_t vocab = engine_config(e)->vocab;
    int64_t scored = 1;
    for (int64_t at = 0; scored < n; at += stride) {
        const int32_t size = (int32_t)i64_min(window, n - at), from = (int32_t)(scored - 1 - at);
        TRY(run_window(e, x, token + at, size, from));
        TRY(run_window(reference, y, token + at, size, from));
        for (int32_t i = 0; i < size - 1 - from; i++)
            compare_row(r, x->logits + (int64_t)i * vocab, y->logits + (int64_t)i * vocab, vocab,
                        token[at + from + i + 1]);
        scored = at + size;
    }
    return ST_OK;
}

status evaluate_agreement(engine *e, engine *reference, const int32_t *token, int64_t n,
                          int32_t window, int32_t stride, agreement_result *out) {
    const int32_t vocab = engine_config(e)->vocab;
    *out = (agreement_result){.agreement = NAN, .kl_nats = NAN};
    TRY(check_text(e, token, n, window, stride));
    TRY(check_text(reference, token, n, window, stride));
    if (engine_config(reference)->vocab != vocab)
        return FAIL(ST_SHAPE, "vocabularies of %d and %d tokens", vocab,
                    engine_config(reference)->vocab);
    window_batch x = {0}, y = {0};
    agreement_result r = {.n = 0};
    status st = window_open(&x, window, vocab);
    if (st == ST_OK) st = window_open(&y, window, vocab);
    if (st == ST_OK) st = compare_windows(e, reference, &x, &y, token, n, window, stride, &r);
    arena_close(&x.memory);
    arena_close(&y.memory);
    TRY(st);
    TRY(check_sum(r.perplexity));
    TRY(check_sum(r.reference_perplexity));
    r.agreement /= (double)r.n;
    r.kl_nats /= (double)r.n;
    r.perplexity = exp(r.perplexity / (double)r.n);
    r.reference_perplexity = exp(r.reference_perplexity / (double)r.n);
    *out = r;
    return ST_OK;
}

status evaluate_logits(engine *e, const int32_t *token, int32_t n, const char *path) {
    const int32_t vocab = engine_config(e)->vocab;
    window_batch w = {0};
    TRY(check_text(e, token, n, n + 1, n));
    /* run_window predicts what follows all tokens but its last: any one more will do. */
    status st = window_open(&w, n + 1, vocab);
    int32_t *all = st == ST_OK ? arena_array(&w.memory, int32_t, (size_t)n + 1) : NULL;
    if (st == ST_OK && !all) st = FAIL(ST_NOMEM, "window of %d tokens", n);
    if (st == ST_OK) {
        memcpy(all, token, (size_t)n * sizeof *all);
        st = run_window(e, &w, all, n + 1, 0);
    }
    const tensor_view out[] = {{.name = "input_ids",
                                .type = DT_I32,
                                .n_dims = 1,
                                .dim = {n},
                                .data = token,
                                .bytes = n * (int64_t)sizeof *token},
                               {.name = "logits",
                                .type = DT_F32,
                                .n_dims = 2,
                                .dim = {n, vocab},
                                .data = w.logits,
                                .bytes = n * (int64_t)vocab * (int64_t)sizeof(float)}};
    if (st == ST_OK) st = safetensors_write(path, out, COUNT_OF(out));
    arena_close(&w.memory);
    return st;
}

/* --- Tasks ------------------------------------------------------------------------------------ */

typedef struct {
    ids prompt;
    output out;
    corpus_task task;
} question;

typedef struct {
    question *q;
    status st;
} answers;

static bool on_token(void *user, int64_t id, const sampled *s, bool ends, int64_t now_ns) {
    (void)now_ns;
    answers *a = user;
    question *q = &a->q[id];
    bool stopped = false;
    if (a->st == ST_OK) a->st = output_push(&q->out, s->token, ends, &stopped);
    /* Long enough to judge: the answer's terminator is its last character. */
    return a->st != ST_OK || q->out.text.length >= q->task.answer_bytes;
}

static status ask(engine *e, const tokenizer *t, arena *a, question *q, int32_t n, corpus_kind kind,
                  uint64_t seed) {
    for (int32_t i = 0; i < n; i++) {
        TRY(corpus_task_make(a, kind, corpus_task_defaults(), seed, i, &q[i].task));
        TRY(tokenizer_encode(t, q[i].task.prompt, q[i].task.prompt_bytes, TOKENIZER_PARSE_SPECIAL,
                             &q[i].prompt));
        output_open(&q[i].out, t, &(output_options){.continues = true});
        const request r = {.id = i,
                           .prompt = q[i].prompt.data,
                           .n_prompt = (int32_t)q[i].prompt.length,
                           .max_new = (int32_t)q[i].task.answer_bytes + 2,
                           .sampling = SAMPLING_GREEDY,
                           .user = -1};
        TRY(engine_submit(e, &r));
    }
    request_log log;
    const int32_t *token;
    for (int32_t done = 0; done < n;) {
        bool ran;
        TRY(engine_step(e, &ran));
        CHECK(ran);
        while (sched_take_finished(engine_sched(e), &log, &token)) done++;
    }
    return ST_OK;
}

status evaluate_tasks(engine *e, const tokenizer *t, corpus_kind kind, uint64_t seed, int32_t n,
                      task_result *out) {
    *out = (task_result){.n = n};
    arena a;
    TRY(arena_open(&a, (size_t)n * (sizeof(question) + 65536) + 65536));
    question *q = arena_array(&a, question, (size_t)n);
    if (!q) {
        arena_close(&a);
        return FAIL(ST_NOMEM, "%d tasks", n);
    }
    answers all = {.q = q};
    engine_set_hooks(e, &(engine_hooks){.user = &all, .token = on_token});
    status st = ask(e, t, &a, q, n, kind, seed);
    if (st == ST_OK) st = all.st;
    engine_set_hooks(e, &(engine_hooks){0});
    for (int32_t i = 0; i < n; i++) {
        question *x = &q[i];
        if (st == ST_OK) st = output_finish(&x->out);
        out->n_exact += st == ST_OK && x->out.text.length >= x->task.answer_bytes &&
                        memcmp(x->out.text.data, x->task.answer, x->task.answer_bytes) == 0;
        output_close(&x->out);
        ids_free(&x->prompt);
    }
    arena_close(&a);
    out->accuracy = (double)out->n_exact / (double)n;
    return st;
}
