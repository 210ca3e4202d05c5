/* attention.h - attention over the paged KV cache in any precision of K and V, and the append.
 *
 * A page holds 64 tokens of one layer on one rank. In bytes from its base:
 *
 *     for each KV head g:  K codes [64 tokens, D]   V codes [64, D]      in the format's bits
 *     then for each head:  K params [64]   V params [64]
 *                          (f16 scale and f16 minimum for KF_8 and KF_4, f16 scale for KF_FP8)
 *
 * so that everything of one head and page is two runs of bytes. Within [64, D] tokens lie in groups
 * of eight, a group in panels of up to 128 bytes a token, and the 16-byte pieces of a panel are
 * permuted by token (attention_code_at). Copied to shared memory as it is, a panel can be read by
 * eight consecutive rows or by one column without a bank conflict, and at 16 bit it is what wgmma
 * calls the 128-byte swizzle. The order is the same for every kernel, for decode and for prefill.
 *
 * Pages of one layer are contiguous: page p begins at base + p * page_bytes. Bytes of tokens at or
 * past kv_len may hold anything, NaN included, and never reach a result. All offsets are 64-bit. */
#ifndef AMALGAM_ATTENTION_H
#define AMALGAM_ATTENTION_H
#include "linear.h"
#include "ref_quant.h"

#ifdef __cplusplus
extern "C" {
#endif

/* One layer's cache. */
typedef struct {
    void *base;         /* device, 128-byte aligned */
    int64_t page_bytes; /* stride from page to page, a multiple of 128 */
    kv_format k, v;
} attention_cache;

/* 64 * G * (bytes of a token's K + of its V), parameters included. */
int64_t attention_page_bytes(kv_format k, kv_format v, int32_t n_kv_heads, int32_t head_dim);

/* The batch as attention sees it: device copies of batch.h's arrays, made once a step. Decodes (one
 * token each) come first. A token whose token_seq is negative is padding: append skips it, and
 * attention leaves its row of `out` alone. */
typedef struct {
    int32_t n_seqs, n_tokens, n_decodes;
    const int32_t *position;   /* [T] */
    const int32_t *seq_start;  /* [S + 1] */
    const int32_t *token_seq;  /* [T] sequence of each token, or -1 */
    const int32_t *kv_len;     /* [S] */
    const int32_t *page_start; /* [S + 1] */
    const int32_t *page;       /* [.] */
} attention_batch;

typedef struct {
    dtype type; /* F16 or BF16: of qkv, out, norms, sinks and 16-bit KV */
    int32_t n_heads, n_kv_heads, head_dim, window; /* head_dim 32, 64, 128, 256; window 0 = all */
    float scale, norm_eps;
    const void *q_norm, *k_norm; /* [D] or NULL */
    const void *sinks;           /* [H] or NULL */
    const float *rope_cos_sin;   /* [ctx_max, D / 2, 2] f32: cos, sin (times the YaRN factor) */
} attention_layer_params;

/* QK-norm, RoPE on q and k (half-split pairs d, d + D/2), quantise and append k and v of all tokens
 * of the batch, in f32 from the 16-bit input on; codes as ref_kv_quantize has them. q is changed in
 * place in qkv [T, (H + 2G) D], k and v are left alone. */
status kernel_rope_append(void *qkv, const attention_layer_params *l, const attention_cache *c,
                          const attention_batch *b, kernel_stream stream);

/* Baseline of an attention that knows 16 bits only: page i of `to`, which has memory of its own, is
 * page[i] of `from` with codes as their values in fp16, rounded once. What lies past a sequence's
 * end is written out like the rest. K and V of `from` are codes and head_dim is 64, 128 or 256,
 * else UNSUPPORTED; n_pages == 0 launches nothing; page is a device pointer. */
status kernel_attention_expand(const attention_cache *to, const attention_cache *from,
                               int32_t n_kv_heads, int32_t head_dim, const int32_t *page,
                               int32_t n_pages, kernel_stream stream);

/* --- Plan: the split of the work -----------------------------------------------------------------
 *
 * Made once a step on the host, read by every layer of that window. How a sequence is split depends
 * on its own length (and on H, G, D, window, kv4) alone, and the parts are joined in a fixed order:
 * a result has the same bits in any batch. */

enum {
    ATTENTION_WIDE_PAGES = 1024, /* most pages that a batch has written out, */
    ATTENTION_WIDE_CHUNKS = 32   /* and chunks that see them */
};

/* Of a plan, what the host has to know. A chunk of many rows has the pages that it sees written out
 * at 16 bit before it, where there are codes and room: the same bits, but less work a row. */
typedef struct {
    int64_t bytes, tiles_at, tall_at; /* of the whole; where tiles begin, and tall ones */
    int32_t n_tiles, n_wide;     /* tiles of chunks; of them those with their pages written out */
    int32_t n_tall, n_tall_wide; /* the same of tall ones: 0 where head_dim is not 64 */
    int32_t n_wide_chunks, n_wide_pages, first_wide; /* first_wide: in `page`, of the first chunk */
} attention_counts;

/* A plan on the device, and the memory that goes with it. */
typedef struct {
    const void *plan; /* device: counts.bytes of what attention_plan_make made */
    void *workspace;  /* attention_workspace_bytes */
    void *wide;       /* pages of 16 bit, as many as the plan was made for, or NULL */
    attention_counts counts;
} attention_work;

/* Most pages that a batch of so many tokens has written out. */
int64_t attention_wide_pages(int32_t max_tokens, int32_t ctx_max, int32_t ratio);

/* Most bytes of a plan. max_pages: entries of `page` of all sequences together. */
int64_t attention_plan_bytes(int32_t max_seqs, int32_t max_tokens, int64_t max_pages);

/* Partial results. Zero it once after allocation; each call leaves its counters at zero. */
int64_t attention_workspace_bytes(int32_t max_seqs, int64_t max_pages, int32_t n_heads,
                                  int32_t head_dim);

/* Fill `host`; counts->bytes of it are what the caller copies to the device. kv_len, seq_start and
 * page_start of `b` are host pointers here, the others are not read. A graph that was captured with
 * a plan of decodes runs with any later one written to the same place. kv4: K and V of every layer
 * that reads the plan have 4 bits; a hint. wide_pages: room for pages written out. n_sms as for
 * kernel_attention. */
status attention_plan_make(void *host, attention_counts *counts, const attention_batch *b,
                           int32_t n_heads, int32_t n_kv_heads, int32_t head_dim, int32_t window,
                           bool kv4, int32_t wide_pages, int32_t n_sms);

/* What linear_problem.ahead lists for a launch of decodes: of each block some pages of a KV head
 * that its warps have in turn, at a distance from each other, for memory stands still unless it is
 * asked for what lies between. What the rings hold when a block begins (6 pages of 8 bits) comes
 * before them. */
enum {
    ATTENTION_AHEAD_FIRST = 6,
    ATTENTION_AHEAD_STRIDE = 7,
    ATTENTION_AHEAD_PAGES = 4,
    ATTENTION_AHEAD_MAX = 2048,      /* pieces: of 512 blocks */
    ATTENTION_AHEAD_BYTES = 17 << 20 /* of a layer: what L2 keeps until it is read */
};
typedef struct {
    int32_t n, pad;
    struct {
        int32_t page, head;
    } at[ATTENTION_AHEAD_MAX];
} attention_ahead;

/* Fill `out` from a plan that attention_plan_make has made of the same batch; `page` is the
 * batch's, on the host. Bytes of it that are to be copied to the device. */
int64_t attention_ahead_make(attention_ahead *out, const void *plan, const int32_t *page,
                             int32_t n_heads, int32_t n_kv_heads, int32_t head_dim, int32_t n_sms);
/* That list (on the device) for one layer. */
linear_ahead attention_ahead_of(const attention_ahead *list, const attention_cache *c,
                                int32_t n_kv_heads, int32_t head_dim);

/* out [T, H D] = softmax(scale q K^T + mask, sinks) V for decodes, prefill chunks, and both at
 * once. q is read from qkv [T, (H + 2G) D]. kernel: NULL, or the name of a variant that must be the
 * one to run (UNSUPPORTED where it cannot). family: 80 or 90 restricts the choice, 0 takes the best
 * for `sm`. Deterministic and batch-invariant. Accumulates in f32. A NaN or an infinity in q of a
 * head makes that head's row NaN and no other's. */
status kernel_attention(void *out, const void *qkv, const attention_layer_params *l,
                        const attention_cache *c, const attention_batch *b,
                        const attention_work *work, const char *kernel, int32_t family, int32_t sm,
                        int32_t n_sms, kernel_stream stream);

/* Names of the variants, best first, NULL at the end. */
const char *const *attention_variants(void);

/* --- Layout, for tests and tools -------------------------------------------------------------- */

/* Byte offset of byte `at` of a token's row of D * bits / 8 = row_bytes, within its [64, D] codes.
 */
int64_t attention_code_at(int32_t row_bytes, int32_t token, int32_t at);

/* Host: codes of a page back to plain values, K and V [64, G, D] f32. type: of 16-bit parts. */
void attention_unpack_page(float *k, float *v, const void *page, kv_format kf, kv_format vf,
                           dtype type, int32_t n_kv_heads, int32_t head_dim);

#ifdef __cplusplus
}
#endif
#endif
