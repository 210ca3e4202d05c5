/* bpe.h - byte-pair encoding (Sennrich et al. 2016): a vocabulary, and merges in order of rank.
 *
 *     pieces [n_ids]      id -> text            slots   text -> id          (open addressing)
 *     merges [mask + 1]   (left id, right id) -> rank, merged id            (open addressing)
 *
 * Encoding a word: one symbol per character, then the pair of lowest rank (leftmost of equals) is
 * merged until no pair has a rank. Everything lives in one arena and is read-only once opened. */
#ifndef AMALGAM_BPE_H
#define AMALGAM_BPE_H
#include "ids.h"
#include "json.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef struct {
    const char *data; /* terminated by a 0 that is not counted; NULL = no token has this id */
    int32_t length;
    bool special; /* an added token that skip_special leaves out */
} piece;

typedef struct {
    int32_t left, right; /* left = -1: empty slot */
    int32_t rank, id;
} bpe_merge;

typedef struct {
    piece *pieces; /* [n_ids] */
    int32_t n_ids; /* highest id + 1, holes included */
    int32_t *slots;
    uint32_t slot_mask;
    bpe_merge *merges;
    uint32_t merge_mask;
    int32_t char_ids[512]; /* id of the single character, for code points below 512; -1 = none */
    int32_t byte_ids[256]; /* ids of <0x00> ... <0xFF>, -1 = none */
    int32_t unk;           /* -1 = characters without a token vanish */
    bool fuse_unk, byte_fallback, ignore_merges;
} bpe;

/* Read the "model" of a tokenizer.json into `a`, with room for ids up to n_ids_min - 1 (for tokens
 * that are added later). UNSUPPORTED for other models, dropout and word affixes; FORMAT for a merge
 * whose parts or result are no tokens, for two tokens with one id; RANGE for an id far beyond the
 * number of tokens; NOMEM. */
status bpe_open(bpe *m, const json_t *spec, int32_t n_ids_min, arena *a);

/* The id of a text, or -1. */
int32_t bpe_find(const bpe *m, const char *s, size_t n);

/* Scratch of one caller: zeroed, then kept between words. */
typedef struct bpe_symbol bpe_symbol;
typedef struct bpe_candidate bpe_candidate;
typedef struct {
    bpe_symbol *symbols;
    size_t n_symbols_max;
    bpe_candidate *heap;
    size_t heap_max;
    ids word;
} bpe_room;

void bpe_room_close(bpe_room *room);

/* Append the ids of one word (n bytes of valid UTF-8, no cut may fall inside it). O(n log n).
 * NOMEM; RANGE beyond 2^30 bytes. */
status bpe_encode(const bpe *m, bpe_room *room, const char *s, size_t n, ids *out);

#ifdef __cplusplus
}
#endif
#endif
