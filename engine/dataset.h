/* dataset.h - traces and conversations of other people, read into rows of lengths and instants.
 *
 *   sharegpt  one JSON array of {"conversations": [{"from", "value"}, ...]}; vLLM's rules: at least
 *             two turns, prompt = turn 1, output length = tokens of turn 2, seeded shuffle; left
 *             out are prompts or outputs under 4 tokens, prompts over 1024, sums over 2048
 *   burstgpt  CSV with columns by name, in any order: Timestamp (seconds), Request tokens, Response
 *             tokens, Model; others are ignored
 *   azure     CSV: TIMESTAMP (date and time, up to 9 decimals, optional zone), ContextTokens,
 *             GeneratedTokens
 *   mooncake  JSON lines: timestamp (ms), input_length, output_length, hash_ids (optional; one per
 *             512 tokens, equal ids = equal blocks)
 *   jsonl     ours: one of prompt (text), prompt_ids, n_prompt; max_new; arrival_s (all rows or
 *             none)
 *
 * Rows come out in order of time (sharegpt: of the shuffle), instants counted from the first. Rows
 * without prompt or output tokens (failed requests of BurstGPT) are left out and counted. Anything
 * malformed is refused with file:line and the reason, never repaired. No file of this kind is
 * shipped; where they come from: workloads/SOURCES.md. */
#ifndef AMALGAM_DATASET_H
#define AMALGAM_DATASET_H
#include "base.h"

enum { DATASET_BLOCK_TOKENS = 512 }; /* tokens behind one of Mooncake's hash_ids */

/* Turns text into ids; the tokenizer lives above this layer. `max` >= bytes of text + 16. */
typedef struct {
    status (*encode)(void *user, const char *text, size_t n, int32_t *ids, int32_t max,
                     int32_t *n_ids); /* NULL: none */
    void *user;
} text_encoder;

typedef struct {
    int64_t at_ns; /* since the first row; 0 when the file has no times */
    int64_t line;  /* of the file, from 1 */
    int32_t n_prompt, n_output;
    int64_t id_at;    /* into `id`, n_prompt of them; -1 = no contents */
    int64_t block_at; /* into `block`, n_blocks of them */
    int32_t n_blocks;
} dataset_row;

typedef struct {
    dataset_row *row; /* [n] */
    int64_t n;
    int32_t *id; /* token ids of all rows that have contents */
    int64_t n_ids;
    int64_t *block; /* hash_ids */
    int64_t n_blocks;
    int64_t n_dropped;
    bool timed, estimated; /* instants are there; lengths are bytes / 4 */
    int64_t row_size, id_size, block_size;
} dataset;

typedef struct {
    const char *format, *model; /* "" or NULL model = all */
    int64_t n_max;              /* rows to keep; 0 = all */
    int32_t ctx_limit;          /* 0 = none */
    int32_t vocab;              /* prompt_ids must lie below */
    uint64_t seed;              /* of the shuffle */
    text_encoder encoder;
} dataset_options;

/* IO; FORMAT, RANGE with file:line; NOTFOUND for an unknown format (lists them) or when no row is
 * left; NOMEM. Nothing is kept on failure. */
status dataset_read(dataset *out, const char *path, const dataset_options *o);
void dataset_free(dataset *d); /* idempotent */
#endif
