/* attention_plan.h - what the attention kernels share among themselves: page layout, plan,
 * variants. Not for callers of attention.h. */
#ifndef AMALGAM_ATTENTION_PLAN_H
#define AMALGAM_ATTENTION_PLAN_H
#include "attention.h"

#ifdef __cplusplus
#define CONSTANT constexpr
extern "C" {
#else
#define CONSTANT static inline
#endif

enum {
    ATTENTION_LEAF_MIN = 256,   /* tokens of a leaf: a page for each of a block's warps */
    ATTENTION_LONE_MAX = 128,   /* tokens of a leaf that one warp does: two pages */
    ATTENTION_BLOCKS_MAX = 512, /* of a decode's launch */
    ATTENTION_TILE_ROWS = 128,  /* query rows (tokens x heads of a group) of a prefill tile */
    ATTENTION_TALL_ROWS = 192,  /* of a tall tile, where head_dim is 64 */
    ATTENTION_WIDE_ROWS = 1024  /* of a chunk whose pages are written out at 16 bit, and more */
};

/* A decode is one work list a block. A sequence has `n` leaves of `leaf` tokens for every tile (up
 * to attention_tile_heads of one group); leaf i of tile t is number t * n + i, and a run is the
 * numbers from .. to of one sequence. Block b starts with run b. */
typedef struct {
    int32_t row;        /* of T */
    int32_t page_at;    /* index into `page` of the sequence's page 0 */
    int32_t begin, end; /* tokens; begin is a multiple of 64 */
    int32_t lo;         /* first visible token (window), begin <= lo < begin + 64 */
    int32_t leaf, n;
    int32_t slot; /* the sequence's first record in the workspace */
    int32_t from, to;
    int32_t tile, first; /* from / n, from % n */
    int32_t prefix;      /* leaves that the run with leaf 0 of tile from / n has of that tile */
    int32_t next;        /* the block's next run, -1 at the end */
    int32_t third;       /* the next one's next */
    int32_t lone; /* -1, or each tile is one warp's: tile from + i that of warp (lone + i) % 4 */
} attention_run;

/* Rows row0 .. row0 + 127 of a prefill chunk, or 191 where it is tall; every KV head of it is one
 * work item. Row r is head r % ratio of the group at token r / ratio. */
typedef struct {
    int32_t token0;   /* of T: first token of the chunk */
    int32_t n_rows;   /* of the whole chunk: tokens * ratio */
    int32_t row0;     /* of this tile */
    int32_t position; /* of the chunk's first token */
    int32_t page_at;
    int32_t kv_len;
    int32_t wide_at; /* page_at in the pages written out: they are numbered as they lie */
    int32_t pad;
} attention_tile;

/* Which tiles a launch has: all, or those of chunks with their pages written out, or the others; or
 * all, as tall tiles. */
typedef enum { TILES_ALL, TILES_WIDE, TILES_NARROW, TILES_TALL, TILES_KINDS } attention_tiles;

/* Tiles of a launch. */
typedef struct {
    int32_t n, at; /* where they begin, in bytes from here */
} attention_tile_list;

/* A chunk of which the pages are written out: its first page among them, and that page's place in
 * `page`. */
typedef struct {
    int32_t to, from;
} attention_chunk;

/* Runs follow the plan itself, then tiles. */
typedef struct {
    int32_t n_runs, pad;
    attention_tile_list tiles[TILES_KINDS];
    attention_chunk chunk[ATTENTION_WIDE_CHUNKS];
} attention_plan;

/* Heads of a group that one pass over its K and V serves: columns of the mma tile. */
static inline int32_t attention_tile_heads(int32_t ratio, int32_t head_dim) {
    return ratio > 8 && head_dim == 128 ? 16 : 8;
}
/* Blocks of a decode's launch: two an SM. */
static inline int32_t attention_decode_blocks(int32_t n_sms) {
    return 2 * n_sms < ATTENTION_BLOCKS_MAX ? 2 * n_sms : ATTENTION_BLOCKS_MAX;
}

/* Bytes of one token's codes and parameters; parameters are 0, 2 or 4 bytes. */
CONSTANT int32_t attention_row_bytes(kv_format f, int32_t head_dim) {
    return f == KF_16 ? 2 * head_dim : f == KF_4 ? head_dim / 2 : head_dim;
}
CONSTANT int32_t attention_param_bytes(kv_format f) { return f == KF_16 ? 0 : f == KF_FP8 ? 2 : 4; }

/* Where the parts of one head lie, in bytes from the page's base: K codes at `code`, V codes
 * `v_code` further on, K params at `param`, V params `v_param` further on. */
typedef struct {
    int64_t head_bytes;  /* codes of one head, K and V */
    int64_t param_base;  /* of head 0 */
    int32_t param_bytes; /* of one head, K and V */
    int32_t v_code, v_param;
} attention_layout;

CONSTANT attention_layout attention_layout_of(kv_format k, kv_format v, int32_t n_kv_heads,
                                              int32_t head_dim) {
    const int32_t k_row = attention_row_bytes(k, head_dim),
                  v_row = attention_row_bytes(v, head_dim);
    const int64_t head_bytes = (int64_t)KV_PAGE_TOKENS * (k_row + v_row);
    const int32_t k_param = KV_PAGE_TOKENS * attention_param_bytes(k);
    const attention_layout l = {head_bytes, head_bytes * n_kv_heads,
                                k_param + KV_PAGE_TOKENS * attention_param_bytes(v),
                                KV_PAGE_TOKENS * k_row, k_param};
    return l;
}

/* The workspace is [slots, H] records of D + 4 words: acc [D] f32 (not divided by l), the largest
 * score m (base 2), l = sum of 2^(score - m), and a counter of leaves, of which that of a
 * sequence's first slot and a tile's first head is used. A sequence has a slot a leaf. */
enum { ATTENTION_PARTIAL_EXTRA = 4 };

/* Everything a launch needs. */
typedef struct {
    void *out;
    const void *qkv;
    attention_layer_params l;
    attention_cache c;
    attention_batch b;
    attention_layout layout;
    attention_cache wide; /* pages written out: at 16 bit, fp16 where the cache has codes */
    const attention_plan *plan;
    attention_counts counts;
    attention_tiles tiles; /* of this launch; TILES_WIDE see `wide` */
    void *workspace;
    int32_t sm, n_sms, shared_bytes_sm; /* shared memory of an SM */
    kernel_stream stream;
} attention_problem;

/* Pages written out: values of 4 bits lie as eight_of makes them, or as the others do, in order. */
typedef enum { WIDE_NEVER, WIDE_NIBBLES, WIDE_ORDER } attention_wide;

/* A variant runs decodes, prefill chunks or both; the first that accepts is launched. */
typedef struct {
    const char *name;
    int32_t family; /* 80 or 90 */
    int32_t sm_min, sm_max;
    bool decode, prefill;
    attention_wide wide;                         /* which pages written out it reads */
    bool (*accepts)(const attention_problem *p); /* no side effects */
    status (*launch)(const attention_problem *p, bool decode, bool prefill);
} attention_variant;

/* The plan's chunks' pages to p->wide, as the kernels that read codes would have them in shared
 * memory. A launch behind it may begin when what came before it has ended. */
status attention_widen(const attention_problem *p, attention_wide order);
status attention_plain_launch(const attention_problem *p, bool decode, bool prefill);
status attention_decode_bulk_launch(const attention_problem *p, bool decode, bool prefill);
status attention_prefill_sm90_launch(const attention_problem *p, bool decode, bool prefill);
status attention_decode_async_launch(const attention_problem *p, bool decode, bool prefill);
status attention_prefill_mma_launch(const attention_problem *p, bool decode, bool prefill);
bool attention_prefill_mma_accepts(const attention_problem *p);

#undef CONSTANT
#ifdef __cplusplus
}
#endif
#endif
