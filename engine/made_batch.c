/* made_batch.c - see made_batch.h. */
#include "made_batch.h"
#include "kernel.h"

static const sampling greedy = {.top_p = 1, .repetition_penalty = 1, .n_logprobs = -1};

status made_batch_open(made_batch *m, int32_t n_seqs, int32_t ctx, int32_t n_new, int32_t n_pages,
                       int32_t vocab) {
    const int32_t each = (int32_t)div_up(ctx, KV_PAGE_TOKENS), n = n_seqs * n_new;
    *m = (made_batch){0};
    TRY(arena_open(&m->a, (size_t)1 << 30));
    m->token = arena_array(&m->a, int32_t, (size_t)n);
    m->position = arena_array(&m->a, int32_t, (size_t)n);
    m->seq_start = arena_array(&m->a, int32_t, (size_t)n_seqs + 1);
    m->kv_len = arena_array(&m->a, int32_t, (size_t)n_seqs);
    m->page_start = arena_array(&m->a, int32_t, (size_t)n_seqs + 1);
    m->page = arena_array(&m->a, int32_t, (size_t)n_seqs * (size_t)each);
    m->id = arena_array(&m->a, int64_t, (size_t)n_seqs);
    m->sample = arena_array(&m->a, sample_row, (size_t)n_seqs);
    m->drawn = arena_array(&m->a, sampled, (size_t)n_seqs);
    if (!m->drawn) return FAIL(ST_NOMEM, "a batch of %d x %d", n_seqs, ctx);
    for (int32_t q = 0; q < n_seqs; q++) {
        for (int32_t i = 0; i < n_new; i++) {
            m->token[q * n_new + i] =
                (int32_t)((uint32_t)(q * 7919 + i * 104729 + 17) % (uint32_t)vocab);
            m->position[q * n_new + i] = ctx - n_new + i;
        }
        m->id[q] = q;
        m->kv_len[q] = ctx;
        m->seq_start[q + 1] = (q + 1) * n_new;
        m->page_start[q + 1] = (q + 1) * each;
        for (int32_t i = 0; i < each; i++)
            m->page[q * each + i] = (int32_t)(((int64_t)i * n_seqs + q) % n_pages);
        m->sample[q] = (sample_row){.row = (q + 1) * n_new - 1, .seq = q, .params = &greedy};
    }
    m->b = (batch){.n_seqs = n_seqs,
                   .n_tokens = n,
                   .n_samples = n_seqs,
                   .n_decodes = n_new == 1 ? n_seqs : 0,
                   .token = m->token,
                   .position = m->position,
                   .seq_start = m->seq_start,
                   .kv_len = m->kv_len,
                   .page_start = m->page_start,
                   .page = m->page,
                   .id = m->id,
                   .sample = m->sample};
    return ST_OK;
}

void made_batch_close(made_batch *m) { arena_close(&m->a); }
