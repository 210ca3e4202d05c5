/* attention_plan.c - attention's page layout and its split of the work: host arithmetic, no device.
 *
 * A decode is cut into parts of equal size that depend on its length alone: enough parts that a
 * single long sequence occupies a whole GPU (256 / G parts a KV head), none under 256 tokens, since
 * a part costs H D f32 written and read, and for lengths in between as long as sixteen parts
 * remain. */
#include "attention_plan.h"
#include "dtype.h"

#include <string.h>

enum { P = KV_PAGE_TOKENS, GROUP = 8, PANEL_BYTES = 128, PIECE_BYTES = 16 };

int64_t attention_page_bytes(kv_format k, kv_format v, int32_t n_kv_heads, int32_t head_dim) {
    return (int64_t)P * n_kv_heads * (kv_format_bytes(k, head_dim) + kv_format_bytes(v, head_dim));
}

/* --- Layout ------------------------------------------------------------------------------------
 */

int64_t attention_code_at(int32_t row_bytes, int32_t token, int32_t at) {
    const int32_t panel = row_bytes < PANEL_BYTES ? row_bytes : PANEL_BYTES;
    const int32_t pieces = panel / PIECE_BYTES; /* of a token in a panel */
    const int32_t share = PANEL_BYTES / panel;  /* tokens that share 128 bytes */
    const int32_t r = token % GROUP, piece = at % panel / PIECE_BYTES;
    const int32_t turned = piece ^ (r / share % pieces);
    return (int64_t)token / GROUP * GROUP * row_bytes + (int64_t)(at / panel) * GROUP * panel +
           r * panel + turned * PIECE_BYTES + at % PIECE_BYTES;
}

static void unpack_half(float *out, const uint8_t *code, const uint8_t *param, kv_format f,
                        dtype type, int32_t n_kv_heads, int32_t head_dim) {
    enum { ROW_MAX = 1024 };
    const int32_t row_bytes = attention_row_bytes(f, head_dim);
    const int32_t param_bytes = attention_param_bytes(f);
    uint8_t row[ROW_MAX];
    CHECK(row_bytes <= ROW_MAX);
    for (int32_t t = 0; t < P; t++) {
        float *to = out + (int64_t)t * n_kv_heads * head_dim;
        for (int32_t i = 0; i < row_bytes; i++) row[i] = code[attention_code_at(row_bytes, t, i)];
        uint16_t params[2] = {0, 0};
        memcpy(params, param + (int64_t)t * param_bytes, (size_t)param_bytes);
        if (f == KF_16)
            dtype_to_f32(to, row, head_dim, 1, type);
        else
            ref_kv_dequantize(to, row, params, head_dim, f);
    }
}

void attention_unpack_page(float *k, float *v, const void *page, kv_format kf, kv_format vf,
                           dtype type, int32_t n_kv_heads, int32_t head_dim) {
    const attention_layout l = attention_layout_of(kf, vf, n_kv_heads, head_dim);
    for (int32_t g = 0; g < n_kv_heads; g++) {
        const uint8_t *code = (const uint8_t *)page + g * l.head_bytes;
        const uint8_t *param = (const uint8_t *)page + l.param_base + (int64_t)g * l.param_bytes;
        const int64_t at = (int64_t)g * head_dim;
        unpack_half(k + at, code, param, kf, type, n_kv_heads, head_dim);
        unpack_half(v + at, code + l.v_code, param + l.v_param, vf, type, n_kv_heads, head_dim);
    }
}

/* --- Plan --------------------------------------------------------------------------------------
 */

/* Tokens of a part of a decode that sees n tokens. */
static int32_t chunk_of(int32_t n, int32_t n_kv_heads) {
    const int32_t most = n_kv_heads < 2 ? 128 : 256 / n_kv_heads; /* parts */
    const int64_t sixteenth = i64_min(ATTENTION_CHUNK_MID, div_up(n, 16));
    const int64_t chunk =
        i64_max(i64_max(ATTENTION_CHUNK_MIN, sixteenth), div_up(n, i64_max(most, 16)));
    return (int32_t)(div_up(chunk, P) * P);
}

int64_t attention_plan_bytes(int32_t max_seqs, int32_t max_tokens, int64_t max_pages) {
    const int64_t parts = max_seqs + max_pages / (ATTENTION_CHUNK_MIN / P);
    /* Rows are tokens * ratio, and ratio <= 64. */
    const int64_t tiles = max_seqs + div_up((int64_t)max_tokens * 64, ATTENTION_TILE_ROWS);
    return (int64_t)sizeof(attention_plan) + parts * (int64_t)sizeof(attention_part) +
           tiles * (int64_t)sizeof(attention_tile);
}

int64_t attention_workspace_bytes(int32_t max_seqs, int64_t max_pages, int32_t n_heads,
                                  int32_t head_dim) {
    const int64_t slots = max_seqs + max_pages / (ATTENTION_CHUNK_MIN / P);
    return slots * n_heads * (head_dim + ATTENTION_PARTIAL_EXTRA) * (int64_t)sizeof(float);
}

/* Longest first, up to a factor of two: the order in which work is handed out. */
static void sort_parts(attention_part *part, int32_t n) {
    attention_part *end = part + n;
    for (int32_t bit = 31; bit-- > 0;) { /* move lengths of 2^bit and more forward */
        attention_part *to = part;
        while (to < end && (to->end - to->begin) >> bit != 0) to++;
        for (attention_part *p = to; p < end; p++)
            if ((p->end - p->begin) >> bit != 0) {
                const attention_part swap = *p;
                *p = *to;
                *to++ = swap;
            }
        part = to;
    }
}

static int32_t plan_decodes(attention_part *part, int32_t *n_slots, const attention_batch *b,
                            int32_t n_kv_heads, int32_t window) {
    int32_t n = 0;
    for (int32_t s = 0; s < b->n_decodes; s++) {
        const int32_t len = b->kv_len[s];
        const int32_t lo = window > 0 && len > window ? len - window : 0;
        const int32_t begin = lo / P * P;
        const int32_t chunk = chunk_of(len - begin, n_kv_heads);
        const int32_t n_parts = (int32_t)div_up(len - begin, chunk);
        for (int32_t i = 0; i < n_parts; i++) {
            const int32_t at = begin + i * chunk;
            part[n++] = (attention_part){.row = b->seq_start[s],
                                         .page_at = b->page_start[s],
                                         .begin = at,
                                         .end = (int32_t)i64_min(at + (int64_t)chunk, len),
                                         .lo = lo,
                                         .slot = *n_slots,
                                         .part = i,
                                         .n_parts = n_parts};
        }
        if (n_parts > 1) *n_slots += n_parts;
    }
    sort_parts(part, n);
    return n;
}

static int32_t plan_prefills(attention_tile *tile, const attention_batch *b, int32_t ratio) {
    int32_t n = 0;
    for (int32_t s = b->n_decodes; s < b->n_seqs; s++) {
        const int32_t n_tokens = b->seq_start[s + 1] - b->seq_start[s];
        const int32_t n_rows = n_tokens * ratio;
        /* The last rows see most: they are handed out first. */
        for (int32_t row = (int32_t)(div_up(n_rows, ATTENTION_TILE_ROWS) - 1) * ATTENTION_TILE_ROWS;
             row >= 0; row -= ATTENTION_TILE_ROWS)
            tile[n++] = (attention_tile){.token0 = b->seq_start[s],
                                         .n_rows = n_rows,
                                         .row0 = row,
                                         .position = b->kv_len[s] - n_tokens,
                                         .page_at = b->page_start[s],
                                         .kv_len = b->kv_len[s]};
    }
    return n;
}

status attention_plan_make(void *host, int64_t *used, const attention_batch *b, int32_t n_heads,
                           int32_t n_kv_heads, int32_t head_dim, int32_t window) {
    if (n_kv_heads <= 0 || n_heads % n_kv_heads || n_heads / n_kv_heads > 64)
        return FAIL(ST_SHAPE, "attention of %d heads over %d", n_heads, n_kv_heads);
    if (head_dim != 32 && head_dim != 64 && head_dim != 128 && head_dim != 256)
        return FAIL(ST_UNSUPPORTED, "attention with head_dim %d", head_dim);
    attention_plan *plan = host;
    *plan = (attention_plan){.n_decodes = b->n_decodes, .parts_at = (int32_t)sizeof *plan};
    attention_part *part = (attention_part *)(void *)((uint8_t *)host + plan->parts_at);
    plan->n_parts = plan_decodes(part, &plan->n_slots, b, n_kv_heads, window);
    const int64_t tiles_at = plan->parts_at + plan->n_parts * (int64_t)sizeof *part;
    if (tiles_at > INT32_MAX) return FAIL(ST_RANGE, "attention plan of %d parts", plan->n_parts);
    plan->tiles_at = (int32_t)tiles_at;
    attention_tile *tile = (attention_tile *)(void *)((uint8_t *)host + tiles_at);
    plan->n_tiles = plan_prefills(tile, b, n_heads / n_kv_heads);
    *used = tiles_at + plan->n_tiles * (int64_t)sizeof *tile;
    return ST_OK;
}
