/* corpus.h - seeded text and exact-answer tasks: what the tiny checkpoint was trained on, and what
 * held-out perplexity and accuracy are measured with.
 *
 * Four kinds of document: short stories from a grammar (corpus.def), in which names, pets, things
 * and numbers come back later; worksheets of arithmetic; lists of key-value pairs with the
 * questions a distance away; chat. Everything is a function of (seed, index) through integers
 * alone, so the bytes are the same on every platform. Documents are ASCII. */
#ifndef AMALGAM_CORPUS_H
#define AMALGAM_CORPUS_H
#include "base.h"

#ifdef __cplusplus
extern "C" {
#endif

/* The special tokens of the tiny tokenizer, written into the text as the literals that it maps to
 * one token each. CORPUS_END follows every document of corpus_text. */
#define CORPUS_END       "<|endoftext|>"
#define CORPUS_TURN      "<|im_start|>" /* then "user\n" or "assistant\n" */
#define CORPUS_TURN_OVER "<|im_end|>"   /* then "\n" */

/* Training draws seeds below, evaluation from here on. Which side a seed is on also decides which
 * problems of arithmetic it may pose: see corpus_is_held_out. */
#define CORPUS_SEED_HELD_OUT ((uint64_t)1 << 40)

/* A sixteenth of all problems a OP b with both operands of two digits or more, chosen by hash, is
 * never posed under a training seed, and under a held-out seed nothing else is: an answer to such a
 * problem was computed and not remembered. `op` is '+', '-' or '*'. Smaller problems: false. */
bool corpus_is_held_out(int64_t a, char op, int64_t b);

typedef enum {
    CORPUS_STORY,
    CORPUS_ARITHMETIC,
    CORPUS_RECALL,
    CORPUS_CHAT,
    CORPUS_KIND_COUNT
} corpus_kind;

/* "story", "arithmetic", "recall", "chat". */
const char *corpus_kind_name(corpus_kind kind);
bool corpus_kind_parse(const char *name, corpus_kind *out);

/* Append document `index` >= 0 of `seed`; it ends with a newline. NOMEM when `out` cannot grow. */
status corpus_document(text *out, corpus_kind kind, uint64_t seed, int64_t index);

/* Append documents 0, 1, 2, ... of `seed`, each followed by CORPUS_END, until at least `bytes`
 * bytes were added; whole documents only. Kinds are drawn with the weights of the training mixture
 * (per hundred documents: 35 stories, 30 worksheets, 25 lists, 10 chats), or all are `*only` when
 * that is not NULL. bytes == 0 adds nothing. NOMEM when `out` cannot grow. */
status corpus_text(text *out, const corpus_kind *only, uint64_t seed, size_t bytes);

/* One question with exactly one right continuation: greedy decoding after `prompt` is right when
 * what it says begins with `answer`, whose last character is a newline that occurs nowhere before.
 * */
typedef struct {
    const char *prompt; /* "347 + 586 =", or a list, filler and at last "- red kite=" */
    const char *answer; /* " 933\n",     or "471\n" */
    size_t prompt_bytes, answer_bytes;
} corpus_task;

#define CORPUS_DIGITS_MAX    4
#define CORPUS_PAIRS_MAX     16
#define CORPUS_SENTENCES_MAX 80 /* about 1000 tokens of the tiny tokenizer */

typedef struct {
    int32_t digits; /* arithmetic: of both operands, 1..CORPUS_DIGITS_MAX; 0: 2 to 4, each drawn */
    int32_t pairs;  /* recall: pairs listed, 1..CORPUS_PAIRS_MAX; 0: drawn, mostly few */
    /* recall: between list and question, 0..CORPUS_SENTENCES_MAX; -1: drawn, mostly few */
    int32_t sentences;
} corpus_task_options;

/* {0, 0, -1}: everything drawn. */
corpus_task_options corpus_task_defaults(void);

/* Task `index` >= 0 of `seed`, in the arena. ARITHMETIC poses additions and subtractions with
 * results >= 0; RECALL asks for one of the listed three-digit values. RANGE for options outside
 * their bounds, UNSUPPORTED for the kinds that have no exact answer, NOMEM when the arena is full.
 * */
status corpus_task_make(arena *a, corpus_kind kind, corpus_task_options options, uint64_t seed,
                        int64_t index, corpus_task *out);

#ifdef __cplusplus
}
#endif
#endif
