/* added.h - the "added_tokens" of a tokenizer.json, found in a text before anything else cuts it.
 *
 * A token is looked for either in the text as it came or, with "normalized", in its normal form
 * (and then by the normal form of the token). At the leftmost place the longest token wins. */
#ifndef AMALGAM_ADDED_H
#define AMALGAM_ADDED_H
#include "bpe.h"
#include "normalize.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef struct {
    const char *content; /* as in the file, terminated; what decoding gives */
    int32_t length, id;
    bool single_word;    /* only between characters that are no word characters */
    bool lstrip, rstrip; /* swallows the blanks on that side */
    bool normalized, special;
} added_token;

typedef struct {
    const char *data; /* what is searched */
    int32_t length, token;
} added_key;

typedef struct {
    added_key *keys; /* [n] in byte order: a range of equal prefixes is a node of a trie */
    int32_t n;
} added_set;

typedef struct {
    added_token *tokens; /* [n_tokens], in the order of the file */
    int32_t n_tokens;
    added_set raw, normal; /* searched in the text as it came; in its normal form */
} added;

/* Highest id of the list + 1 (0 when empty), checked to be sane: FORMAT, RANGE. */
status added_count_ids(const json_t *list, int32_t *n_ids);

/* Read the list and enter every token into m->pieces, which has room for them. FORMAT when an id or
 * a content is used twice or differs from the vocabulary; NOMEM. */
status added_open(added *out, const json_t *list, const normalizer *z, bpe *m, arena *a);

/* The id of exactly this text, or -1. */
int32_t added_find(const added *d, const char *s, size_t n);

/* Cut n bytes of valid UTF-8 at the tokens of `set`, left to right. With `keep_special_text` a
 * special token's text is ordinary text. Each part goes to `part`: a token (then s is its place),
 * or text between tokens (token == NULL, n > 0). Stops at the first status that is not OK. */
typedef status (*added_part)(void *context, const added_token *token, const char *s, size_t n);
status added_cut(const added *d, const added_set *set, const char *s, size_t n,
                 bool keep_special_text, added_part part, void *context);

#ifdef __cplusplus
}
#endif
#endif
