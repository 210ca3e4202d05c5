/* evaluate.h - how good a format is: perplexity of text, exact answers to tasks. */
#ifndef AMALGAM_EVALUATE_H
#define AMALGAM_EVALUATE_H
#include "corpus.h"
#include "engine.h"
#include "tokenizer.h"

typedef struct {
    int64_t n_scored;  /* tokens */
    double nll;        /* mean negative log-likelihood, nats a token */
    double perplexity; /* exp(nll) */
} perplexity_result;

/* Sliding window over token[0..n): windows of `window` tokens every `stride`; each token but the
 * first of the text is scored once, in the first window that holds it, with at least window -
 * stride tokens of context (fewer only near the beginning). The engine must be idle and opened with
 * max_samples and token_budget of at least `window`; its KV pages are used directly, so quantised
 * KV is read back by every query as in serving. Logits are turned into log-probabilities in double.
 * FORMAT when they are no numbers. */
status evaluate_perplexity(engine *e, const int32_t *token, int64_t n, int32_t window,
                           int32_t stride, perplexity_result *out);

/* How far the distributions of one engine are from those of another: that in 16 bit. */
typedef struct {
    int64_t n;          /* positions compared: those that evaluate_perplexity scores */
    double agreement;   /* share of them where both find the same token most likely */
    double kl_nats;     /* mean over positions of KL(reference || engine) */
    double kl_nats_max; /* the worst position's */
    double perplexity, reference_perplexity;
} agreement_result;

/* Both engines read the same windows of the text, teacher-forced. Conditions as for
 * evaluate_perplexity, for both; their vocabularies must be the same size. */
status evaluate_agreement(engine *e, engine *reference, const int32_t *token, int64_t n,
                          int32_t window, int32_t stride, agreement_result *out);

/* Write the logits after each token of one window to a safetensors file: input_ids I32 [n],
 * logits F32 [n, V]. n is at most the window that the engine was opened for, less 1; otherwise as
 * evaluate_perplexity. */
status evaluate_logits(engine *e, const int32_t *token, int32_t n, const char *path);

typedef struct {
    int64_t n, n_exact;
    double accuracy; /* n_exact / n */
} task_result;

/* Greedy answers to n tasks of the seeded generator: exact when the text up to the answer's
 * terminator equals the answer. Tasks are held-out ones. */
status evaluate_tasks(engine *e, const tokenizer *t, corpus_kind kind, uint64_t seed, int32_t n,
                      task_result *out);
#endif
