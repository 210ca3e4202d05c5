/* test_attention_plan.c - the split of decodes among blocks: every leaf once, whoever does it, and
 * none of a block's share far above the mean. */
#include "attention_plan.h"
#include "rng.h"
#include "test.h"

enum { SMS = 132, HEADS = 32, SEQS_MAX = 600 };

typedef struct {
    int32_t n_seqs, kv_heads, head_dim, window;
    int32_t kv_len[SEQS_MAX];
    attention_plan *plan;
    attention_run *run;
} planned;

static planned plan_of(int32_t n_seqs, int32_t kv_heads, const int32_t *kv_len, int32_t window,
                       bool kv4) {
    planned p = {.n_seqs = n_seqs, .kv_heads = kv_heads, .head_dim = 128, .window = window};
    int32_t start[SEQS_MAX + 1], page[SEQS_MAX + 1], pages = 0;
    for (int32_t s = 0; s < n_seqs; s++) {
        p.kv_len[s] = kv_len[s];
        start[s] = s;
        page[s] = pages;
        pages += (int32_t)div_up(kv_len[s], KV_PAGE_TOKENS);
    }
    start[n_seqs] = n_seqs;
    page[n_seqs] = pages;
    const attention_batch b = {.n_seqs = n_seqs,
                               .n_tokens = n_seqs,
                               .n_decodes = n_seqs,
                               .seq_start = start,
                               .kv_len = p.kv_len,
                               .page_start = page};
    const int64_t bytes = attention_plan_bytes(n_seqs, n_seqs, pages);
    attention_counts counts;
    p.plan = mem_alloc((size_t)bytes, 1);
    assert_ok(attention_plan_make(p.plan, &counts, &b, HEADS, kv_heads, 128, window, kv4, 0, SMS));
    assert_true(counts.bytes <= bytes);
    p.run = (attention_run *)(void *)(p.plan + 1);
    return p;
}

static int32_t tiles_of(const planned *p) {
    const int32_t ratio = HEADS / p->kv_heads;
    return p->kv_heads * (int32_t)div_up(ratio, attention_tile_heads(ratio, p->head_dim));
}

/* Runs in the lists of all blocks that hold leaf i of sequence s; what the run says of its tile. */
static int32_t holders(const planned *p, int32_t s, int32_t leaf, int32_t *prefix_wrong) {
    int32_t n = 0;
    for (int32_t b = 0; b < attention_decode_blocks(SMS); b++)
        for (int32_t i = b; i >= 0; i = p->run[i].next) {
            const attention_run *r = &p->run[i];
            if (r->from == r->to || r->row != s || leaf < r->from || leaf >= r->to) continue;
            n++;
            /* A run that begins within a tile knows where the run before it ended. */
            const int32_t tile = r->from / r->n * r->n;
            if (leaf != r->from || r->from == tile) continue;
            int32_t first = -1;
            for (int32_t k = 0; k < p->plan->n_runs; k++)
                if (p->run[k].row == s && p->run[k].from <= tile && p->run[k].to > tile)
                    first = p->run[k].to;
            *prefix_wrong += first - tile != r->prefix;
        }
    return n;
}

/* Leaves that are in no list, in two, or whose run has a wrong prefix; runs that do not know the
 * one after the next, or whose tiles are a warp's each though they are long. */
static int32_t mistakes(const planned *p) {
    int32_t wrong = 0;
    for (int32_t i = 0; i < p->plan->n_runs; i++) {
        const attention_run *r = &p->run[i];
        if (r->to == r->from) continue;
        wrong += r->third != (r->next < 0 ? -1 : p->run[r->next].next);
        wrong += (r->lone >= 0) != (r->end - r->begin <= ATTENTION_LONE_MAX) || r->lone >= 4;
    }
    for (int32_t s = 0; s < p->n_seqs; s++) {
        const attention_run *any = NULL;
        for (int32_t i = 0; i < p->plan->n_runs; i++)
            if (p->run[i].row == s && p->run[i].to > p->run[i].from) any = &p->run[i];
        if (!any) return -1;
        const int32_t seen = any->end - any->begin;
        wrong += any->end != p->kv_len[s] || any->leaf % ATTENTION_LEAF_MIN != 0 ||
                 any->n != (int32_t)div_up(seen, any->leaf) || any->lo < any->begin ||
                 any->lo >= any->begin + KV_PAGE_TOKENS;
        for (int32_t i = 0; i < any->n * tiles_of(p); i++) wrong += holders(p, s, i, &wrong) != 1;
    }
    return wrong;
}

/* Largest number of tokens of a block over the mean; *fewest: the smallest. */
static double unevenness(const planned *p, double *fewest) {
    int64_t most = 0, least = INT64_MAX, all = 0;
    const int32_t n_blocks = attention_decode_blocks(SMS);
    for (int32_t b = 0; b < n_blocks; b++) {
        int64_t n = 0;
        for (int32_t i = b; i >= 0; i = p->run[i].next) {
            const attention_run *r = &p->run[i];
            n += (int64_t)(r->to - r->from) * i64_min(r->leaf, r->end - r->begin);
        }
        most = i64_max(most, n);
        least = i64_min(least, n);
        all += n;
    }
    *fewest = (double)least * n_blocks / (double)all;
    return (double)most * n_blocks / (double)all;
}

static void test_every_leaf_once(void **state) {
    (void)state;
    rng random = {0};
    rng_seed(&random, 5, 0);
    for (int32_t round = 0; round < 18; round++) { /* the last ones: many leaves a block */
        static const int32_t groups[] = {8, 4, 1};
        int32_t kv_len[SEQS_MAX];
        const int32_t n = round == 0   ? 1
                          : round < 12 ? 1 + (int32_t)rng_below(&random, 40)
                                       : 300 + (int32_t)rng_below(&random, 300);
        for (int32_t s = 0; s < n; s++)
            kv_len[s] = 1 + (int32_t)rng_below(&random, s % 7 == 3 ? 40000 : 900);
        planned p =
            plan_of(n, groups[round % 3], kv_len, round % 4 == 2 ? 1000 : 0, round % 2 == 1);
        assert_int_equal(mistakes(&p), 0);
        if (round == 1 || round == 15) { /* the twins: a leaf lost, a warp for a block */
            attention_run *r = p.run;
            while (r->to == r->from) r++;
            r->to--;
            assert_true(mistakes(&p) != 0);
            r->to++;
            assert_int_equal(mistakes(&p), 0);
            r->lone = r->lone < 0 ? 0 : -1;
            assert_true(mistakes(&p) != 0);
        }
        mem_free(p.plan);
    }
}

static void test_shares_are_even(void **state) {
    (void)state;
    /* Quantised to leaves: 4 where 3.88 would be the mean is 1.03. No block without work where a
     * block has four or more, and tiles do not fit. */
    static const struct {
        int32_t n, len, last;
        double most, fewest;
    } row[] = {{8, 4096, 4096, 1.04, 0},     {64, 1024, 1024, 1.04, 0},
               {64, 4096, 4096, 1.04, 0},    {256, 4096, 4096, 1.02, 0},
               {256, 16384, 16384, 1.01, 0}, {1, 131072, 131072, 1.04, 0},
               {64, 128, 131072, 1.04, 0},   {80, 1500, 1500, 1.11, 0.96},
               {34, 4096, 4096, 1.04, 0.96}, {50, 4096, 4096, 1.08, 0.98}};
    for (int32_t i = 0; i < COUNT_OF(row); i++) {
        int32_t kv_len[SEQS_MAX];
        for (int32_t s = 0; s < row[i].n; s++) kv_len[s] = row[i].len;
        kv_len[row[i].n - 1] = row[i].last;
        planned p = plan_of(row[i].n, 8, kv_len, 0, i % 2 == 1);
        double fewest;
        assert_at_most(unevenness(&p, &fewest), row[i].most);
        assert_at_most(row[i].fewest, fewest);
        mem_free(p.plan);
    }
}

/* A decode, a short chunk, a chunk behind cached pages and a prompt. */
static const int32_t mixed_kv_len[] = {700, 333, 1203, 640};
static const int32_t mixed_start[] = {0, 1, 71, 671, 1311}, mixed_page[] = {0, 11, 17, 36, 46};
static const attention_batch mixed = {.n_seqs = 4,
                                      .n_tokens = 1311,
                                      .n_decodes = 1,
                                      .seq_start = mixed_start,
                                      .kv_len = mixed_kv_len,
                                      .page_start = mixed_page};

/* The last two have the pages that they see written out, as far as there is room; the twin has
 * room for one page less. */
static void test_pages_written_out(void **state) {
    (void)state;
    static const struct {
        int32_t window, room, chunks, pages, tiles, first; /* tiles: 128 rows, 4 heads a group */
    } rows[] = {{0, 29, 2, 29, 39, 17},   {0, 28, 1, 19, 19, 17}, {0, 18, 1, 10, 20, 36},
                {200, 23, 2, 23, 39, 23}, {0, 9, 0, 0, 0, 0},     {0, 0, 0, 0, 0, 0}};
    void *plan = mem_alloc((size_t)attention_plan_bytes(4, 1311, 46), 1);
    for (int32_t i = 0; i < COUNT_OF(rows); i++) {
        attention_counts c;
        assert_ok(attention_plan_make(plan, &c, &mixed, 32, 8, 128, rows[i].window, false,
                                      rows[i].room, SMS));
        assert_int_equal(c.n_wide_chunks, rows[i].chunks);
        assert_int_equal(c.n_wide_pages, rows[i].pages);
        assert_int_equal(c.n_wide, rows[i].tiles);
        assert_int_equal(c.n_tiles, 3 + 19 + 20);
        assert_int_equal(c.first_wide, rows[i].first);
        /* A tile's page lies where its chunk's was written. */
        const attention_tile *tile = (attention_tile *)(void *)((uint8_t *)plan + c.tiles_at);
        const attention_chunk *chunk = ((attention_plan *)plan)->chunk;
        assert_true(!c.n_wide_chunks || (chunk[0].to == 0 && chunk[0].from == c.first_wide));
        for (int32_t t = 0, k = 0; t < c.n_wide; t++) {
            if (tile[t].page_at + chunk[k].to - chunk[k].from != tile[t].wide_at) k++;
            assert_true(k < c.n_wide_chunks);
            assert_int_equal(tile[t].page_at + chunk[k].to - chunk[k].from, tile[t].wide_at);
        }
    }
    mem_free(plan);
}

/* Rows of chunks that are not in just one of n tiles of `height` rows, or twice in one chunk's. */
static int32_t rows_missed(const attention_tile *tile, int32_t n, int32_t height, int32_t all) {
    int32_t wrong = 0, rows = 0;
    for (int32_t i = 0; i < n; i++) {
        const attention_tile *t = &tile[i];
        const bool first = i == 0 || tile[i - 1].token0 != t->token0;
        wrong += first ? t->row0 + height < t->n_rows : t->row0 != tile[i - 1].row0 - height;
        wrong += (i + 1 == n || tile[i + 1].token0 != t->token0) && t->row0 != 0;
        rows += (int32_t)i64_min(t->n_rows - t->row0, height);
    }
    return wrong + (rows != all);
}

/* Its chunks in both heights, those with their pages written out first; the twin has a tile
 * too few. */
static void test_tall_tiles(void **state) {
    (void)state;
    static const struct {
        int32_t room, tall_wide, rows_wide; /* 4 heads a group */
    } rows[] = {{29, 13 + 14, 4 * 1240}, {28, 13, 4 * 600}, {18, 14, 4 * 640}, {0, 0, 0}};
    const int64_t most = attention_plan_bytes(4, 1311, 46);
    void *plan = mem_alloc((size_t)most, 1);
    for (int32_t i = 0; i < COUNT_OF(rows); i++) {
        attention_counts c;
        assert_ok(attention_plan_make(plan, &c, &mixed, 32, 8, 64, 0, false, rows[i].room, SMS));
        const attention_tile *tile = (attention_tile *)(void *)((uint8_t *)plan + c.tiles_at);
        const attention_tile *tall = (attention_tile *)(void *)((uint8_t *)plan + c.tall_at);
        assert_int_equal(c.n_tall, 2 + 13 + 14);
        assert_int_equal(c.n_tall_wide, rows[i].tall_wide);
        assert_int_equal(rows_missed(tile, c.n_tiles, ATTENTION_TILE_ROWS, 4 * 1310), 0);
        assert_int_equal(rows_missed(tall, c.n_tall, ATTENTION_TALL_ROWS, 4 * 1310), 0);
        assert_int_equal(rows_missed(tall, c.n_tall_wide, ATTENTION_TALL_ROWS, rows[i].rows_wide),
                         0);
        assert_int_not_equal(rows_missed(tall, c.n_tall - 1, ATTENTION_TALL_ROWS, 4 * 1310), 0);
        const attention_tile_list *list = &((attention_plan *)plan)->tiles[TILES_TALL];
        assert_int_equal(list->n, c.n_tall);
        assert_ptr_equal((const uint8_t *)list + list->at, tall);
        assert_true(c.bytes <= most);
        assert_ok(attention_plan_make(plan, &c, &mixed, 32, 8, 128, 0, false, rows[i].room, SMS));
        assert_int_equal(c.n_tall, 0);
    }
    mem_free(plan);
}

/* Pages of block b's list, all of them, in the order in which its four warps have them in turn;
 * up to where a warp has tiles of its own. */
static int32_t pages_of(const planned *p, int32_t b, const int32_t *page, int32_t (*at)[2]) {
    int32_t n = 0;
    for (int32_t i = b; i >= 0; i = p->run[i].next) {
        const attention_run *r = &p->run[i];
        if (r->lone >= 0) return n;
        for (int32_t leaf = r->from; leaf < r->to; leaf++) {
            const int32_t token = r->begin + leaf % r->n * r->leaf;
            for (int32_t k = 0; k < r->leaf && token + k < r->end; k += KV_PAGE_TOKENS, n++) {
                at[n][0] = page[r->page_at + (token + k) / KV_PAGE_TOKENS];
                at[n][1] = leaf / r->n / (tiles_of(p) / p->kv_heads);
            }
        }
    }
    return n;
}

/* Pieces that are not what a block reads at its place, are missing, or are there twice (as they may
 * be where a head has two tiles). */
static int32_t ahead_mistakes(const planned *p, const attention_ahead *a, const int32_t *page) {
    enum { MOST = 4096 };
    static int32_t at[MOST][2];
    int32_t wrong = 0, all = 0;
    for (int32_t b = 0; b < attention_decode_blocks(SMS) && p->plan->n_runs; b++) {
        const int32_t n = pages_of(p, b, page, at);
        CHECK(n <= MOST);
        for (int32_t i = 0; i < ATTENTION_AHEAD_PAGES; i++) {
            const int32_t place = ATTENTION_AHEAD_FIRST + i * ATTENTION_AHEAD_STRIDE;
            if (place >= n) break;
            int32_t found = 0;
            for (int32_t k = 0; k < a->n; k++)
                found += a->at[k].page == at[place][0] && a->at[k].head == at[place][1];
            wrong += found < 1 || (found > 1 && tiles_of(p) == p->kv_heads);
            all++;
        }
    }
    return wrong + (all != a->n);
}

static void test_pieces_ahead(void **state) {
    (void)state;
    static const struct {
        int32_t n, len, last, groups, window, pieces;
    } row[] = {{16, 4096, 4096, 8, 0, 1024}, {64, 4096, 4096, 8, 0, 1024},
               {40, 700, 9000, 8, 0, -1},    {30, 5000, 5000, 4, 1000, -1},
               {20, 900, 20000, 1, 0, -1},   {64, 100, 100, 8, 0, 0},
               {63, 100, 60000, 8, 0, -1}};
    static attention_ahead a;
    for (int32_t i = 0; i < COUNT_OF(row); i++) {
        int32_t kv_len[SEQS_MAX], page[8192], pages = 0;
        for (int32_t s = 0; s < row[i].n; s++) {
            kv_len[s] = s + 1 < row[i].n ? row[i].len : row[i].last;
            pages += (int32_t)div_up(kv_len[s], KV_PAGE_TOKENS);
        }
        for (int32_t k = 0; k < pages; k++) page[k] = (k * 7919 + 5) % 100003;
        planned p = plan_of(row[i].n, row[i].groups, kv_len, row[i].window, false);
        const int64_t bytes =
            attention_ahead_make(&a, p.plan, page, HEADS, row[i].groups, 128, SMS);
        assert_true(bytes == 8 + 8 * (int64_t)a.n);
        assert_true(row[i].pieces < 0 || row[i].pieces == a.n);
        assert_int_equal(ahead_mistakes(&p, &a, page), 0);
        if (a.n && row[i].groups > 1) { /* the twins: another head, a page twice, a piece lost */
            a.at[a.n / 2].head ^= 1;
            assert_true(ahead_mistakes(&p, &a, page) != 0);
            a.at[a.n / 2] = a.at[0];
            assert_true(ahead_mistakes(&p, &a, page) != 0);
            (void)attention_ahead_make(&a, p.plan, page, HEADS, row[i].groups, 128, SMS);
            a.n--;
            assert_true(ahead_mistakes(&p, &a, page) != 0);
        }
        mem_free(p.plan);
    }
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_every_leaf_once),   cmocka_unit_test(test_shares_are_even),
        cmocka_unit_test(test_pages_written_out), cmocka_unit_test(test_tall_tiles),
        cmocka_unit_test(test_pieces_ahead),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
