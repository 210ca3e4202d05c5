/* batch.c - see batch.h. */
#include "batch.h"

#include "kernel.h"

static const char *seq_problem(const batch *b, int32_t i, int32_t n_pages) {
    const int32_t first = b->seq_start[i], n = b->seq_start[i + 1] - first;
    if (n < 1 || n > b->n_tokens - first) return "a sequence has no token";
    if (i < b->n_decodes && n != 1) return "a decode feeds more than one token";
    if (b->kv_len[i] < n) return "kv_len does not cover the new tokens";

    const int32_t start = b->kv_len[i] - n;
    for (int32_t t = 0; t < n; t++) {
        if (b->position[first + t] != start + t) return "positions do not end at kv_len - 1";
        if (b->token[first + t] < 0 && i >= b->n_decodes) return "a token id is negative";
    }

    const int32_t page0 = b->page_start[i], page1 = b->page_start[i + 1];
    if (page1 - page0 != div_up(b->kv_len[i], KV_PAGE_TOKENS)) return "pages do not match kv_len";
    for (int32_t p = page0; p < page1; p++)
        if (b->page[p] < 0 || b->page[p] >= n_pages) return "a page lies outside the pool";
    return NULL;
}

static const char *sample_problem(const batch *b, int32_t i) {
    const sample_row *r = &b->sample[i];
    if (i && r->row <= b->sample[i - 1].row) return "sampled rows do not ascend";
    if (r->seq < 0 || r->seq >= b->n_seqs) return "a sampled row has no sequence";
    if (r->row < b->seq_start[r->seq] || r->row >= b->seq_start[r->seq + 1])
        return "a sampled row lies outside its sequence";
    if (r->given && (*r->given < 0 || !r->params || r->n_history))
        return "a given token is none, or is drawn";
    if (r->n_history && !r->history) return "a history is missing";
    if (r->n_history && r->n_history != b->position[r->row] + 1)
        return "a history does not end at its row";
    return NULL;
}

const char *batch_problem(const batch *b, int32_t n_pages) {
    if (b->n_seqs < 1 || b->n_tokens < b->n_seqs) return "a batch without tokens";
    if (b->n_decodes < 0 || b->n_decodes > b->n_seqs) return "n_decodes is no count of sequences";
    if (b->n_samples < 0 || b->n_samples > b->n_tokens) return "n_samples is no count of rows";
    if (b->seq_start[0] != 0 || b->page_start[0] != 0) return "a CSR array does not start at 0";
    for (int32_t i = 0; i < b->n_seqs; i++) {
        const char *problem = seq_problem(b, i, n_pages);
        if (problem) return problem;
    }
    if (b->seq_start[b->n_seqs] != b->n_tokens) return "the sequences do not add up to n_tokens";
    for (int32_t i = 0; i < b->n_samples; i++) {
        const char *problem = sample_problem(b, i);
        if (problem) return problem;
    }
    return NULL;
}

void batch_check(const batch *b, int32_t max_tokens, int32_t max_seqs, int32_t max_samples,
                 int32_t n_pages) {
    const char *problem = batch_problem(b, n_pages);
    if (problem) check_failed(__FILE__, __LINE__, problem);
    CHECK(b->n_tokens <= max_tokens);
    CHECK(b->n_seqs <= max_seqs);
    CHECK(b->n_samples <= max_samples);
}

/* An array and its length, so that [1,2][3] and [1][2,3] differ. */
static uint64_t hash_array(const void *v, int32_t n, size_t size, uint64_t h) {
    return n ? hash_bytes(v, (size_t)n * size, h) : hash_u64(0, h);
}

uint64_t batch_hash(const batch *b) {
    uint64_t h = hash_u64((uint64_t)b->step, 0);
    const int32_t counts[] = {b->n_seqs, b->n_tokens, b->n_samples, b->n_decodes};
    h = hash_bytes(counts, sizeof counts, h);
    h = hash_array(b->token, b->n_tokens, sizeof *b->token, h);
    h = hash_array(b->position, b->n_tokens, sizeof *b->position, h);
    h = hash_array(b->seq_start, b->n_seqs + 1, sizeof *b->seq_start, h);
    h = hash_array(b->kv_len, b->n_seqs, sizeof *b->kv_len, h);
    h = hash_array(b->page_start, b->n_seqs + 1, sizeof *b->page_start, h);
    h = hash_array(b->page, b->page_start[b->n_seqs], sizeof *b->page, h);
    h = hash_array(b->id, b->n_seqs, sizeof *b->id, h);
    for (int32_t i = 0; i < b->n_samples; i++) {
        const sample_row *r = &b->sample[i]; /* field by field: the struct has padding */
        h = hash_u64((uint64_t)(uint32_t)r->row << 32 | (uint32_t)r->seq, h);
        h = hash_u64(r->draw, h);
        h = hash_u64((uint64_t)(uint32_t)r->n_history << 1 | (r->params != NULL), h);
        if (r->given) h = hash_u64((uint64_t)(uint32_t)*r->given, h);
    }
    return h;
}
