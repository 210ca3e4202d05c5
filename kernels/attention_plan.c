/* attention_plan.c - attention's page layout and its split of the work: host arithmetic, no device.
 *
 * A decode is cut into leaves whose size depends on its length alone, so that a result has the same
 * bits in any batch; leaves are joined in order. Blocks get runs of consecutive leaves: within a
 * run nothing but the result leaves the block. */
#include "attention_plan.h"
#include "dtype.h"

#include <string.h>

enum { P = KV_PAGE_TOKENS, GROUP = 8, PANEL_BYTES = 128, PIECE_BYTES = 16 };

int64_t attention_page_bytes(kv_format k, kv_format v, int32_t n_kv_heads, int32_t head_dim) {
    return (int64_t)P * n_kv_heads * (kv_format_bytes(k, head_dim) + kv_format_bytes(v, head_dim));
}

/* --- Layout ----------------------------------------------------------------------------------- */

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

/* --- Plan ------------------------------------------------------------------------------------- */

/* Tokens of a leaf of a decode that sees n tokens: at most 32 leaves a tile (more where there are
 * few tiles), which is how many records the last block may have to add up, 16 in 1.4 us. At 4 bit,
 * where a leaf's joining weighs more, leaves of 256 tokens would take 11% more time. */
static int32_t leaf_of(int32_t n, int32_t n_tiles, bool kv4) {
    const int64_t most = i64_max(32, 256 / n_tiles);
    const int64_t least = n <= (kv4 ? 512 : 8192) ? ATTENTION_LEAF_MIN : 2 * ATTENTION_LEAF_MIN;
    return (int32_t)i64_max(least, div_up(n, most * ATTENTION_LEAF_MIN) * ATTENTION_LEAF_MIN);
}

enum { SPARE_RUNS = 3 * ATTENTION_BLOCKS_MAX };

int64_t attention_plan_bytes(int32_t max_seqs, int32_t max_tokens, int64_t max_pages) {
    (void)max_pages;
    /* Rows are tokens * ratio, and ratio <= 64. */
    const int64_t tiles = 2 * max_seqs + div_up((int64_t)max_tokens * 64, ATTENTION_TILE_ROWS) +
                          div_up((int64_t)max_tokens * 64, ATTENTION_TALL_ROWS);
    return (int64_t)sizeof(attention_plan) +
           (max_seqs + SPARE_RUNS) * (int64_t)sizeof(attention_run) +
           tiles * (int64_t)sizeof(attention_tile);
}

int64_t attention_wide_pages(int32_t max_tokens, int32_t ctx_max, int32_t ratio) {
    const int64_t chunks =
        i64_min((int64_t)max_tokens * ratio / ATTENTION_WIDE_ROWS, ATTENTION_WIDE_CHUNKS);
    return i64_min(chunks * div_up(ctx_max, P), ATTENTION_WIDE_PAGES);
}

int64_t attention_workspace_bytes(int32_t max_seqs, int64_t max_pages, int32_t n_heads,
                                  int32_t head_dim) {
    const int64_t slots = max_seqs + max_pages / (ATTENTION_LEAF_MIN / P);
    return slots * n_heads * (head_dim + ATTENTION_PARTIAL_EXTRA) * (int64_t)sizeof(float);
}

/* Work is counted in pages, four at a time for a block's four warps; what a leaf costs beside them
 * is about one, and a tile, whose beginning nothing hides, about four. A warp's page takes as long
 * as four do together, but of the tiles that a warp has alone four go at a time. */
static int32_t leaf_cost(const attention_run *r) {
    if (r->lone >= 0) return (int32_t)div_up(r->end - r->begin, P) + 1;
    const int64_t rounds = div_up(i64_min(r->leaf, r->end - r->begin), ATTENTION_LEAF_MIN);
    return (int32_t)(rounds * (ATTENTION_LEAF_MIN / P) + 1 + 4 / r->n);
}

/* Where a block has many leaves, more exactly, in sixteenths of a page: the last leaf of a tile has
 * the tokens that are left, and three pages for its beginning do not vanish beside five leaves. */
enum { SIXTEENTHS = 16, TILE_COST = 3 * SIXTEENTHS };

static int64_t exact_cost(const attention_run *r, int32_t tokens) {
    if (r->lone >= 0) return leaf_cost(r) * SIXTEENTHS;
    const int64_t rounds = div_up(tokens, ATTENTION_LEAF_MIN);
    return (rounds * (ATTENTION_LEAF_MIN / P) + 1) * SIXTEENTHS + TILE_COST / r->n;
}
static int64_t whole_cost(const attention_run *r) {
    return exact_cost(r, (int32_t)i64_min(r->leaf, r->end - r->begin));
}
/* What a tile's last leaf costs less. */
static int64_t missing_cost(const attention_run *r) {
    return whole_cost(r) - exact_cost(r, r->end - r->begin - (r->n - 1) * r->leaf);
}
static int64_t run_cost(const attention_run *r) {
    return (r->to - r->from) * whole_cost(r) - (r->to / r->n - r->from / r->n) * missing_cost(r);
}
/* Most leaves from r->from on that cost no more than `room`. */
static int32_t leaves_in(const attention_run *r, int64_t room) {
    const int64_t leaf = whole_cost(r), missing = missing_cost(r), tile = r->n * leaf - missing;
    const int32_t left = r->n - r->from % r->n; /* of the first tile */
    if (room < left * leaf - missing) return (int32_t)i64_min(i64_max(room, 0) / leaf, left - 1);
    room -= left * leaf - missing;
    return (int32_t)(left + room / tile * r->n + i64_min(room % tile / leaf, r->n - 1));
}

/* The whole of decode s as one run. */
static attention_run decode_run(const attention_batch *b, int32_t s, int32_t n_tiles,
                                int32_t window, bool kv4) {
    const int32_t len = b->kv_len[s], lo = window > 0 && len > window ? len - window : 0;
    const int32_t begin = lo / P * P, leaf = leaf_of(len - begin, n_tiles, kv4);
    const int32_t n = (int32_t)div_up(len - begin, leaf);
    return (attention_run){.row = b->seq_start[s],
                           .page_at = b->page_start[s],
                           .begin = begin,
                           .end = len,
                           .lo = lo,
                           .leaf = leaf,
                           .n = n,
                           .to = n * n_tiles,
                           .next = -1,
                           .lone = len - begin <= ATTENTION_LONE_MAX ? 0 : -1};
}

typedef struct {
    attention_run *run;
    int32_t n, most; /* runs */
    int32_t n_blocks, at, room,
        n_full;           /* block at hand, cost a block may have, full ones in a row */
    bool few;             /* leaves: for half of the blocks at most */
    bool shares;          /* block b's list ends where b + 1 equal shares of the cost do */
    int64_t total, given; /* exact cost: of all, of what blocks have */
    int32_t last[ATTENTION_BLOCKS_MAX], cost[ATTENTION_BLOCKS_MAX]; /* last run, or -1 */
    int32_t lone[ATTENTION_BLOCKS_MAX];                             /* warp whose turn it is */
} split;

/* The block that is number i to get work. Blocks b and b + n / 2 share an SM where the launch finds
 * the GPU empty, and 2 b and 2 b + 1 where it becomes so: work for half of the blocks or less goes
 * to one of either pair. */
static int32_t block_of(const split *s, int32_t i) {
    const int32_t half = s->n_blocks / 2, below = (half + 1) / 2;
    if (!s->few) return i;
    return i < below ? 2 * i : half + 2 * (i - below) + 1;
}

static void add_run(split *s, attention_run r) {
    const bool first = s->last[s->at] < 0;
    const int32_t i = first ? block_of(s, s->at) : s->n++;
    if (!first) s->run[s->last[s->at]].next = i;
    if (r.lone >= 0) {
        r.lone = s->lone[s->at];
        s->lone[s->at] = (r.lone + r.to - r.from) % (ATTENTION_LEAF_MIN / P);
    }
    r.tile = r.from / r.n;
    r.first = r.from % r.n;
    s->run[i] = r;
    s->last[s->at] = i;
    s->cost[s->at] += (r.to - r.from) * leaf_cost(&r);
    s->given += run_cost(&r);
}

/* Leaves of r that the block at hand still takes. */
static int32_t fit_of(const split *s, const attention_run *r) {
    if (!s->shares) return (s->room - s->cost[s->at]) / leaf_cost(r);
    const int64_t end = s->total * (s->at + 1) / s->n_blocks;
    return leaves_in(r, end - s->given + whole_cost(r) / 2);
}

/* Leaves of `all` to blocks that take some, from the one at hand on; room grows when all are
 * full. */
static void split_run(split *s, const attention_run *all, int32_t runs_to_come) {
    for (attention_run r = *all; r.from < all->to;) {
        const int32_t left = all->to - r.from;
        int32_t fit = fit_of(s, &r);
        if (fit > left || s->n + runs_to_come >= s->most) fit = left;
        if (fit > 0) {
            r.to = r.from + fit;
            add_run(s, r);
            if (r.from <= r.to / r.n * r.n) r.prefix = r.to % r.n;
            r.from = r.to;
            s->n_full = 0;
        }
        if (fit == left) return;
        s->at = (s->at + 1) % s->n_blocks;
        if (++s->n_full > s->n_blocks) s->room += leaf_cost(all), s->n_full = 0;
    }
}

/* Room to begin with: the mean, up to whole leaves where that is little more. */
static int32_t first_room(int64_t cost, int32_t largest, int32_t n_blocks) {
    const int64_t mean = i64_max(largest, div_up(cost, n_blocks));
    const int64_t whole = div_up(mean, i64_max(largest, 1)) * largest;
    return (int32_t)(whole * 8 <= mean * 9 ? whole : mean);
}

/* In one half of the launch blocks with long leaves and short ones do the long ones last: an SM has
 * a block of each half, and while one waits for the beginnings of small tiles the other takes the
 * bandwidth. */
static void stagger(split *s) {
    for (int32_t b = s->n_blocks / 2; b < s->n_blocks; b++) {
        attention_run *first = &s->run[b];
        if (first->next < 0) continue;
        const int32_t second = first->next;
        if (leaf_cost(first) <= 2 * leaf_cost(&s->run[second])) continue;
        const attention_run large = *first;
        *first = s->run[second];
        s->run[second] = large;
        s->run[second].next = -1;
        if (first->next < 0)
            first->next = second;
        else
            s->run[s->last[b]].next = second;
    }
}

/* Blocks with many leaves, of a mean cost, have equal shares, cut where they end, unless tiles are
 * alike and a block's room is several or a part of one: its leaves are of few tiles then. With few
 * leaves small ones fill the gaps that large ones leave. */
static bool has_shares(int64_t mean, int32_t room, int32_t largest, const attention_run *any,
                       bool alike) {
    const int32_t leaves = room / largest;
    const bool fits =
        alike && room % largest == 0 && (leaves % any->n == 0 || any->n % leaves == 0);
    return mean >= 4 * (int64_t)largest && !fits;
}

/* Large leaves first, up to a factor of two, since small ones fill the gaps. */
static int32_t plan_decodes(attention_run *run, const attention_batch *b, int32_t n_tiles,
                            int32_t window, bool kv4, int32_t n_blocks) {
    split s = {.run = run, .n = n_blocks, .most = b->n_decodes + SPARE_RUNS, .n_blocks = n_blocks};
    int64_t cost = 0;
    int64_t n_leaves = 0;
    bool alike = true; /* tiles */
    attention_run r = {0};
    int32_t largest = 0, slot = 0, to_come = b->n_decodes;
    for (int32_t i = 0; i < n_blocks; i++) {
        run[i] = (attention_run){.n = 1, .next = -1, .lone = -1};
        s.last[i] = -1;
    }
    for (int32_t i = 0; i < b->n_decodes; i++) {
        const attention_run before = r;
        r = decode_run(b, i, n_tiles, window, kv4);
        alike = alike && (i == 0 || (r.n == before.n && run_cost(&r) == run_cost(&before)));
        n_leaves += r.to;
        cost += (int64_t)r.to * leaf_cost(&r);
        s.total += run_cost(&r);
        largest = (int32_t)i64_max(largest, leaf_cost(&r));
    }
    s.room = first_room(cost, largest, n_blocks);
    s.shares = has_shares(cost / n_blocks, s.room, largest, &r, alike);
    s.few = n_leaves <= n_blocks / 2;
    int32_t bit = 0;
    while (largest >> bit > 1) bit++;
    for (; to_come > 0; bit--) {
        slot = 0;
        if (!s.shares) s.at = s.n_full = 0;
        for (int32_t i = 0; i < b->n_decodes; i++) {
            r = decode_run(b, i, n_tiles, window, kv4);
            r.slot = slot;
            slot += r.n;
            if (leaf_cost(&r) >> bit == 1) split_run(&s, &r, to_come--);
        }
    }
    stagger(&s);
    for (int32_t i = 0; i < s.n; i++) run[i].third = run[i].next < 0 ? -1 : run[run[i].next].next;
    return s.n;
}

/* A page of a KV head. */
typedef struct {
    int32_t page, head;
} piece;

/* Of block b's list the pages that attention_ahead wants, up to where a warp has tiles of its own:
 * their number. per_head: tiles. */
static int32_t pieces_of(piece at[ATTENTION_AHEAD_PAGES], const attention_run *run, int32_t b,
                         const int32_t *page, int32_t per_head) {
    int32_t n = 0, place = ATTENTION_AHEAD_FIRST; /* of the next one, from the page at hand */
    for (int32_t i = b; i >= 0; i = run[i].next) {
        const attention_run *r = &run[i];
        if (r->lone >= 0) return n;
        for (int32_t leaf = r->from; leaf < r->to; leaf++) {
            const int32_t begin = r->begin + leaf % r->n * r->leaf;
            const int32_t pages = (int32_t)div_up(i64_min(r->leaf, r->end - begin), P);
            for (; place < pages; place += ATTENTION_AHEAD_STRIDE) {
                at[n++] = (piece){page[r->page_at + begin / P + place], leaf / r->n / per_head};
                if (n == ATTENTION_AHEAD_PAGES) return n;
            }
            place -= pages;
        }
    }
    return n;
}

int64_t attention_ahead_make(attention_ahead *out, const void *plan, const int32_t *page,
                             int32_t n_heads, int32_t n_kv_heads, int32_t head_dim, int32_t n_sms) {
    _Static_assert(ATTENTION_AHEAD_PAGES * ATTENTION_BLOCKS_MAX <= ATTENTION_AHEAD_MAX, "all");
    const attention_plan *all = plan;
    const attention_run *run = (const attention_run *)(const void *)(all + 1);
    const int32_t n_blocks = all->n_runs ? attention_decode_blocks(n_sms) : 0;
    const int32_t ratio = n_heads / n_kv_heads;
    const int32_t per_head = (int32_t)div_up(ratio, attention_tile_heads(ratio, head_dim));
    piece at[ATTENTION_BLOCKS_MAX][ATTENTION_AHEAD_PAGES];
    int32_t n[ATTENTION_BLOCKS_MAX];
    out->n = 0;
    for (int32_t b = 0; b < n_blocks; b++) n[b] = pieces_of(at[b], run, b, page, per_head);
    /* What comes first in any block comes first. */
    for (int32_t i = 0; i < ATTENTION_AHEAD_PAGES; i++)
        for (int32_t b = 0; b < n_blocks; b++) {
            if (i >= n[b]) continue;
            out->at[out->n].page = at[b][i].page;
            out->at[out->n++].head = at[b][i].head;
        }
    return (const uint8_t *)&out->at[out->n] - (const uint8_t *)out;
}

linear_ahead attention_ahead_of(const attention_ahead *list, const attention_cache *c,
                                int32_t n_kv_heads, int32_t head_dim) {
    const attention_layout l = attention_layout_of(c->k, c->v, n_kv_heads, head_dim);
    return (linear_ahead){.list = &list->n,
                          .base = c->base,
                          .stride = c->page_bytes,
                          .bytes = (int32_t)l.head_bytes,
                          .most = (int32_t)(ATTENTION_AHEAD_BYTES / l.head_bytes),
                          .parts = 1};
}

/* Tiles of sequence s. wide_at: where its page 0 would lie among pages written out. */
static int32_t plan_chunk(attention_tile *tile, const attention_batch *b, int32_t s, int32_t ratio,
                          int32_t wide_at) {
    const int32_t n_tokens = b->seq_start[s + 1] - b->seq_start[s], n_rows = n_tokens * ratio;
    const int32_t n = (int32_t)div_up(n_rows, ATTENTION_TILE_ROWS);
    /* The last rows see most: they are handed out first. */
    for (int32_t i = 0; i < n; i++)
        tile[i] = (attention_tile){.token0 = b->seq_start[s],
                                   .n_rows = n_rows,
                                   .row0 = (n - 1 - i) * ATTENTION_TILE_ROWS,
                                   .position = b->kv_len[s] - n_tokens,
                                   .page_at = b->page_start[s],
                                   .kv_len = b->kv_len[s],
                                   .wide_at = wide_at};
    return n;
}

/* Is a chunk's cache written out? Then its pages are counted, from the first block of tokens that
 * it sees on (blocks are of up to two pages). */
static bool is_wide(attention_chunk *chunk, attention_counts *c, const attention_batch *b,
                    int32_t s, int32_t ratio, int32_t window, int32_t wide_pages) {
    const int32_t n_tokens = b->seq_start[s + 1] - b->seq_start[s];
    const int32_t position = b->kv_len[s] - n_tokens;
    const bool cut = window > 0 && position >= window;
    const int32_t unseen = cut ? (position - window + 1) / (2 * P) * 2 : 0;
    const int32_t pages = (int32_t)div_up(b->kv_len[s], P) - unseen;
    if (n_tokens * ratio < ATTENTION_WIDE_ROWS || pages > wide_pages - c->n_wide_pages ||
        c->n_wide_chunks == ATTENTION_WIDE_CHUNKS)
        return false;
    if (c->n_wide_chunks == 0) c->first_wide = b->page_start[s] + unseen;
    chunk[c->n_wide_chunks++] =
        (attention_chunk){.to = c->n_wide_pages, .from = b->page_start[s] + unseen};
    c->n_wide_pages += pages;
    return true;
}

/* Tiles of chunks, first those of which the pages are written out. */
static void plan_prefills(attention_tile *tile, attention_chunk *chunk, attention_counts *c,
                          const attention_batch *b, int32_t ratio, int32_t window,
                          int32_t wide_pages) {
    for (int32_t s = b->n_decodes; s < b->n_seqs; s++)
        if (is_wide(chunk, c, b, s, ratio, window, wide_pages)) {
            const int32_t i = c->n_wide_chunks - 1;
            c->n_wide += plan_chunk(tile + c->n_wide, b, s, ratio,
                                    chunk[i].to - (chunk[i].from - b->page_start[s]));
        }
    c->n_tiles = c->n_wide;
    for (int32_t s = b->n_decodes, i = 0; s < b->n_seqs; s++)
        if (i < c->n_wide_chunks && chunk[i].from < b->page_start[s + 1])
            i++;
        else
            c->n_tiles += plan_chunk(tile + c->n_tiles, b, s, ratio, 0);
}

/* The chunks of n tiles in tall ones, in the same order; how many. */
static int32_t plan_tall(attention_tile *tall, const attention_tile *tile, int32_t n) {
    int32_t made = 0;
    for (int32_t i = 0; i < n; i += (int32_t)div_up(tile[i].n_rows, ATTENTION_TILE_ROWS)) {
        const int32_t rows = ATTENTION_TALL_ROWS, last = (tile[i].n_rows - 1) / rows * rows;
        for (int32_t row0 = last; row0 >= 0; row0 -= rows) {
            tall[made] = tile[i];
            tall[made++].row0 = row0;
        }
    }
    return made;
}

status attention_plan_make(void *host, attention_counts *counts, const attention_batch *b,
                           int32_t n_heads, int32_t n_kv_heads, int32_t head_dim, int32_t window,
                           bool kv4, int32_t wide_pages, int32_t n_sms) {
    if (n_kv_heads <= 0 || n_heads % n_kv_heads || n_heads / n_kv_heads > 64)
        return FAIL(ST_SHAPE, "attention of %d heads over %d", n_heads, n_kv_heads);
    if (head_dim != 32 && head_dim != 64 && head_dim != 128 && head_dim != 256)
        return FAIL(ST_UNSUPPORTED, "attention with head_dim %d", head_dim);
    const int32_t ratio = n_heads / n_kv_heads;
    const int32_t n_tiles =
        n_kv_heads * (int32_t)div_up(ratio, attention_tile_heads(ratio, head_dim));
    attention_plan *plan = host;
    attention_run *run = (attention_run *)(void *)(plan + 1);
    *plan = (attention_plan){0};
    if (b->n_decodes)
        plan->n_runs = plan_decodes(run, b, n_tiles, window, kv4, attention_decode_blocks(n_sms));
    *counts = (attention_counts){0};
    attention_tile *tile = (attention_tile *)(void *)(run + plan->n_runs);
    plan_prefills(tile, plan->chunk, counts, b, ratio, window, wide_pages);
    attention_tile *narrow = tile + counts->n_wide, *tall = tile + counts->n_tiles;
    const int32_t n_narrow = counts->n_tiles - counts->n_wide;
    if (head_dim == 64) {
        counts->n_tall_wide = plan_tall(tall, tile, counts->n_wide);
        counts->n_tall =
            counts->n_tall_wide + plan_tall(tall + counts->n_tall_wide, narrow, n_narrow);
    }
    const attention_tile *first[TILES_KINDS] = {tile, tile, narrow, tall};
    const int32_t n[TILES_KINDS] = {counts->n_tiles, counts->n_wide, n_narrow, counts->n_tall};
    for (int32_t i = 0; i < TILES_KINDS; i++)
        plan->tiles[i] = (attention_tile_list){
            .n = n[i],
            .at = (int32_t)((const uint8_t *)first[i] - (const uint8_t *)&plan->tiles[i])};
    counts->tiles_at = (uint8_t *)tile - (uint8_t *)host;
    counts->tall_at = (uint8_t *)tall - (uint8_t *)host;
    counts->bytes = (uint8_t *)(tall + counts->n_tall) - (uint8_t *)host;
    return ST_OK;
}
