/* gpu_attention.c - append and attention on a GPU against the f64 definition over the dequantised
 * cache.
 *
 * The pool is filled with 0xff (NaN in every format) before anything is appended, and so is `out`
 * before every run: what should not be read, or was not written, shows. Every variant of the table
 * runs every case. Twins: a reference that misses one token, and a flipped code, must be told from
 * the right result. */
#include "attention.h"
#include "ref_attention.h"
#include "ref_norm.h"
#include "ref_rope.h"

#include <cuda_runtime_api.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

enum { P = KV_PAGE_TOKENS, MAX_SEQS = 80, SAMPLES = 48 };

typedef struct {
    const char *name;
    dtype type;
    int32_t heads, kv_heads, head_dim, window;
    float sigma, mean; /* of the input */
    bool sinks, norms;
    kv_format k, v;
    int32_t n_seqs, n_decodes;
    int32_t kv_len[MAX_SEQS], n_new[MAX_SEQS];
} attention_case;

static int32_t n_failed, n_run;
static int32_t sm, n_sms;

#define CUDA(call)                                                                                 \
    do {                                                                                           \
        const cudaError_t e_ = (call);                                                             \
        if (e_ != cudaSuccess) {                                                                   \
            printf("%s:%d: %s: %s\n", __FILE__, __LINE__, #call, cudaGetErrorString(e_));          \
            fflush(stdout);                                                                        \
            _Exit(1);                                                                              \
        }                                                                                          \
    } while (0)

static uint64_t random_state = 88172645463325252u;

/* What the random numbers of a case are for. */
typedef enum { DRAW_INPUT, DRAW_APPEND, DRAW_ROWS } draw;

/* Every purpose of every case has numbers of its own, which hang on what the case is and on nothing
 * that ran before: all variants are measured on the same rows, and a case that is run alone does
 * what it did among others. */
static void draw_for(const attention_case *c, draw what) {
    const int32_t member[] = {(int32_t)what, (int32_t)c->type, c->heads,          c->kv_heads,
                              c->head_dim,   c->window,        c->sinks,          c->norms,
                              (int32_t)c->k, (int32_t)c->v,    (int32_t)c->sigma, (int32_t)c->mean,
                              c->n_seqs,     c->n_decodes};
    uint64_t h = 88172645463325252u;
    for (const char *p = c->name; *p; p++) h = hash_u64((uint64_t)*p, h);
    for (int32_t i = 0; i < COUNT_OF(member); i++) h = hash_u64((uint64_t)member[i], h);
    for (int32_t s = 0; s < c->n_seqs; s++)
        h = hash_u64((uint64_t)c->kv_len[s] << 32 | (uint32_t)c->n_new[s], h);
    random_state = h | 1; /* not zero, which xorshift keeps */
}
static double uniform(void) {
    random_state ^= random_state << 13;
    random_state ^= random_state >> 7;
    random_state ^= random_state << 17;
    return (double)(random_state >> 11) * 0x1p-53;
}
static float gaussian(void) {
    return (float)(sqrt(-2 * log(1 - uniform())) * cos(6.283185307179586 * uniform()));
}

static void *device_bytes(int64_t n, int fill) {
    void *p;
    CUDA(cudaMalloc(&p, (size_t)i64_max(n, 16)));
    CUDA(cudaMemset(p, fill, (size_t)i64_max(n, 16)));
    return p;
}
static void *device_copy(const void *host, int64_t n) {
    void *p = device_bytes(n, 0);
    CUDA(cudaMemcpy(p, host, (size_t)n, cudaMemcpyHostToDevice));
    return p;
}
static void *host_copy(const void *device, int64_t n) {
    void *p = mem_alloc((size_t)n, 1);
    CHECK(p != NULL);
    CUDA(cudaMemcpy(p, device, (size_t)n, cudaMemcpyDeviceToHost));
    return p;
}
static uint16_t *random_16(int64_t n, dtype type, float sigma, float mean) {
    uint16_t *x = mem_alloc((size_t)n, 2);
    CHECK(x != NULL);
    static float table[1 << 16]; /* drawn once: a Box-Muller a value is most of the test's time */
    const uint64_t state = random_state;
    if (table[0] == 0) random_state = 88172645463325252u;
    for (int32_t i = 0; table[0] == 0 && i < COUNT_OF(table); i++)
        table[COUNT_OF(table) - 1 - i] = gaussian();
    random_state = state;
    for (int64_t i = 0; i < n; i++) {
        random_state = random_state * 6364136223846793005u + 1442695040888963407u;
        const float v = table[random_state >> 48] * sigma + mean;
        x[i] = type == DT_F16 ? f16_from_f32(v) : bf16_from_f32(v);
    }
    return x;
}

/* A batch of `c` on host and device; whole: every token of every sequence, else the n_new last. */
typedef struct {
    attention_batch host, device;
    int32_t *position, *seq_start, *token_seq, *kv_len, *page_start, *page;
    int32_t *first; /* [S] row of a sequence's token 0 among all tokens */
    int32_t n_pages;
} test_batch;

static int32_t *ints(int64_t n) { return mem_alloc((size_t)i64_max(n, 1), sizeof(int32_t)); }

/* Sequences from..to of the case; pages shuffled over the pool the same way in every cut. */
static test_batch make_batch(const attention_case *c, bool whole, int32_t from, int32_t to) {
    test_batch b = {0};
    int32_t n_tokens = 0, n_pages = 0, n_all = 0;
    int32_t all_pages = 0;
    for (int32_t s = 0; s < c->n_seqs; s++) all_pages += (int32_t)div_up(c->kv_len[s], P);
    for (int32_t s = from; s < to; s++) n_tokens += whole ? c->kv_len[s] : c->n_new[s];
    b.position = ints(n_tokens);
    b.token_seq = ints(n_tokens);
    b.seq_start = ints(to - from + 1);
    b.kv_len = ints(to - from);
    b.page_start = ints(to - from + 1);
    b.page = ints(all_pages);
    b.first = ints(c->n_seqs);
    int32_t page_id = 0, t = 0;
    for (int32_t s = 0; s < c->n_seqs; s++) {
        b.first[s] = n_all;
        n_all += c->kv_len[s];
        const int32_t pages = (int32_t)div_up(c->kv_len[s], P);
        if (s < from || s >= to) {
            page_id += pages;
            continue;
        }
        b.kv_len[s - from] = c->kv_len[s];
        b.page_start[s - from] = n_pages;
        b.seq_start[s - from] = t;
        for (int32_t i = 0; i < pages; i++, page_id++) /* a permutation: 7919 is prime */
            b.page[n_pages++] = (int32_t)((int64_t)page_id * 7919 % all_pages % all_pages);
        const int32_t n = whole ? c->kv_len[s] : c->n_new[s];
        for (int32_t i = 0; i < n; i++, t++) {
            b.position[t] = c->kv_len[s] - n + i;
            b.token_seq[t] = s - from;
        }
    }
    b.seq_start[to - from] = t;
    b.page_start[to - from] = n_pages;
    b.n_pages = all_pages;
    const int32_t n_decodes = whole ? 0 : (int32_t)i64_max(0, i64_min(c->n_decodes, to) - from);
    b.host = (attention_batch){.n_seqs = to - from,
                               .n_tokens = n_tokens,
                               .n_decodes = n_decodes,
                               .position = b.position,
                               .seq_start = b.seq_start,
                               .token_seq = b.token_seq,
                               .kv_len = b.kv_len,
                               .page_start = b.page_start,
                               .page = b.page};
    b.device = b.host;
    const int64_t i = sizeof(int32_t);
    b.device.position = device_copy(b.position, n_tokens * i);
    b.device.seq_start = device_copy(b.seq_start, (to - from + 1) * i);
    b.device.token_seq = device_copy(b.token_seq, n_tokens * i);
    b.device.kv_len = device_copy(b.kv_len, (to - from) * i);
    b.device.page_start = device_copy(b.page_start, (to - from + 1) * i);
    b.device.page = device_copy(b.page, n_pages * i);
    return b;
}

static void free_batch(test_batch *b) {
    int32_t *host[] = {b->position,   b->seq_start, b->token_seq, b->kv_len,
                       b->page_start, b->page,      b->first};
    for (int32_t i = 0; i < COUNT_OF(host); i++) mem_free(host[i]);
    const int32_t *device[] = {b->device.position, b->device.seq_start,  b->device.token_seq,
                               b->device.kv_len,   b->device.page_start, b->device.page};
    for (int32_t i = 0; i < COUNT_OF(device); i++) CUDA(cudaFree((void *)(uintptr_t)device[i]));
}

/* Everything of one case on the device. */
typedef struct {
    const attention_case *c;
    attention_layer_params l;
    attention_cache cache;
    int64_t page_bytes;
    int32_t n_pages;
    uint16_t *qkv;    /* host, as given [all tokens, (H + 2G) D] */
    uint16_t *turned; /* host, after append */
    void *device_qkv; /* the same on the device */
    float *k, *v;     /* host: dequantised [all tokens, G, D] */
    void *workspace;
    uint16_t *q_norm, *k_norm, *sinks; /* host */
    float *rope;
} fixture;

static float value16(uint16_t bits, dtype type) {
    return type == DT_F16 ? f32_from_f16(bits) : f32_from_bf16(bits);
}

static void check(bool good, const attention_case *c, const char *variant, const char *what,
                  double value) {
    n_run++;
    if (good) return;
    n_failed++;
    if (!variant) variant = "best";
    printf("FAILED %s %s %s H%d/%d D%d w%d K%sV%s: %s %g\n", c->name, variant, dtype_text(c->type),
           c->heads, c->kv_heads, c->head_dim, c->window, kv_format_text(c->k),
           kv_format_text(c->v), what, value);
}

/* What a cache holds, dequantised: to_k, to_v [all tokens, G, D]. type: of 16-bit parts. */
static void load_pages(const fixture *f, const test_batch *all, const attention_cache *cache,
                       dtype type, float *to_k, float *to_v) {
    const attention_case *c = f->c;
    const int32_t g_d = c->kv_heads * c->head_dim;
    uint8_t *pool = host_copy(cache->base, cache->page_bytes * f->n_pages);
    for (int32_t s = 0; s < c->n_seqs; s++)
#pragma omp parallel for schedule(static)
        for (int32_t at = 0; at < c->kv_len[s]; at += P) {
            float *k = mem_alloc((size_t)P * (size_t)g_d, sizeof *k),
                  *v = mem_alloc((size_t)P * (size_t)g_d, sizeof *v);
            const int32_t page = all->page[all->page_start[s] + at / P];
            attention_unpack_page(k, v, pool + page * cache->page_bytes, cache->k, cache->v, type,
                                  c->kv_heads, c->head_dim);
            const int64_t n = i64_min(P, c->kv_len[s] - at) * g_d;
            memcpy(to_k + (int64_t)(all->first[s] + at) * g_d, k, (size_t)n * sizeof *k);
            memcpy(to_v + (int64_t)(all->first[s] + at) * g_d, v, (size_t)n * sizeof *v);
            mem_free(k);
            mem_free(v);
        }
    mem_free(pool);
}

/* The append of sampled tokens, by the definitions. */
static void check_append(fixture *f, const test_batch *all) {
    const attention_case *c = f->c;
    const int32_t d = c->head_dim, heads = c->heads + 2 * c->kv_heads;
    float x[256], w[256], back[256], cosine[128], sine[128];
    uint8_t codes[1024];
    double worst_q = 0, worst_kv = 0;
    draw_for(c, DRAW_APPEND);
    for (int32_t i = 0; i < 200; i++) {
        const int32_t t = (int32_t)(uniform() * all->host.n_tokens);
        const int32_t h = (int32_t)(uniform() * heads);
        const uint16_t *in = f->qkv + ((int64_t)t * heads + h) * d;
        for (int32_t e = 0; e < d; e++) x[e] = value16(in[e], c->type);
        const bool is_v = h >= c->heads + c->kv_heads, is_q = h < c->heads;
        if (!is_v) {
            const uint16_t *norm = is_q ? f->q_norm : f->k_norm;
            for (int32_t e = 0; e < d; e++) w[e] = norm ? value16(norm[e], c->type) : 1;
            if (norm) ref_rmsnorm(x, x, w, 1, d, f->l.norm_eps);
            const float *turn = f->rope + (int64_t)all->position[t] * d;
            for (int32_t e = 0; e < d / 2; e++) cosine[e] = turn[2 * e], sine[e] = turn[2 * e + 1];
            ref_rope(x, 1, d, cosine, sine);
        }
        const kv_format format = is_v ? c->v : c->k;
        double largest = 1e-30, error = 0;
        float step = 0;
        if (is_q) {
            for (int32_t e = 0; e < d; e++)
                back[e] = value16(f->turned[((int64_t)t * heads + h) * d + e], c->type);
        } else {
            const int32_t g = (h - c->heads) % c->kv_heads;
            uint16_t params[2] = {0, 0};
            ref_kv_quantize(codes, params, x, d, format);
            if (format != KF_16) ref_kv_dequantize(x, codes, params, d, format);
            if (format == KF_8 || format == KF_4) step = f32_from_f16(params[0]);
            memcpy(back, (is_v ? f->v : f->k) + ((int64_t)t * c->kv_heads + g) * d,
                   (size_t)d * sizeof *back);
        }
        for (int32_t e = 0; e < d; e++) {
            largest = fmax(largest, fabs((double)x[e]));
            const double off = fabs((double)x[e] - (double)back[e]);
            if (!(off <= error)) error = off;
        }
        /* 16 bit: one rounding. Codes: none differ, but a norm's last bit may move one by a step.
         * */
        const bool sixteen = is_q || format == KF_16;
        const double limit = sixteen ? largest * (c->type == DT_F16 ? 0x1p-11 : 0x1p-8) * 1.01
                             : c->norms && !is_v
                                 ? fmax((double)step, largest / 15) * 1.01 + largest * 1e-3
                                 : largest * 1e-6;
        double *worst = is_q ? &worst_q : &worst_kv;
        if (!(error / limit <= *worst)) *worst = error / limit;
    }
    check(worst_q <= 1, c, "append", "q error over its limit:", worst_q);
    check(worst_kv <= 1, c, "append", "KV error over its limit:", worst_kv);
}

/* Values of n that are not those of `want` rounded to fp16. */
static int64_t differing(const float *got, const float *want, int64_t n) {
    int64_t wrong = 0;
    for (int64_t i = 0; i < n; i++) wrong += !(f32_from_f16(f16_from_f32(want[i])) == got[i]);
    return wrong;
}

/* The cache written out at 16 bit has the values of the codes, rounded once. */
static void check_expand(fixture *f, const test_batch *all) {
    const attention_case *c = f->c;
    const int64_t n = all->host.n_tokens * (int64_t)c->kv_heads * c->head_dim;
    const int64_t bytes = attention_page_bytes(KF_16, KF_16, c->kv_heads, c->head_dim);
    const attention_cache wide = {device_bytes(bytes * f->n_pages, 0xff), bytes, KF_16, KF_16};
    int32_t *pages = ints(f->n_pages);
    for (int32_t i = 0; i < f->n_pages; i++) pages[i] = i;
    int32_t *device_pages = device_copy(pages, f->n_pages * (int64_t)sizeof *pages);
    float *k = mem_alloc((size_t)n, sizeof *k), *v = mem_alloc((size_t)n, sizeof *v);
    const status st = kernel_attention_expand(&wide, &f->cache, c->kv_heads, c->head_dim,
                                              device_pages, f->n_pages, NULL);
    check(st == ST_OK, c, "expand", fail_message(), st);
    CUDA(cudaDeviceSynchronize());
    load_pages(f, all, &wide, DT_F16, k, v);
    const int64_t wrong = differing(k, f->k, n) + differing(v, f->v, n);
    check(wrong == 0, c, "expand", "values that differ:", (double)wrong);
    k[n / 2] += fabsf(k[n / 2]) + 1; /* twin */
    check(differing(k, f->k, n) > 0, c, "expand", "a moved value went unseen", 0);
    CUDA(cudaFree(wide.base));
    CUDA(cudaFree(device_pages));
    mem_free(pages);
    mem_free(k);
    mem_free(v);
}

static void open_fixture(fixture *f, const attention_case *c) {
    memset(f, 0, sizeof *f);
    f->c = c;
    const int32_t d = c->head_dim, heads = c->heads + 2 * c->kv_heads;
    test_batch all = make_batch(c, true, 0, c->n_seqs);
    const int64_t n_tokens = all.host.n_tokens, kv = n_tokens * c->kv_heads * d;
    int32_t longest = 0;
    for (int32_t s = 0; s < c->n_seqs; s++) longest = (int32_t)i64_max(longest, c->kv_len[s]);
    f->n_pages = all.n_pages;
    f->page_bytes = attention_page_bytes(c->k, c->v, c->kv_heads, d);
    f->cache = (attention_cache){device_bytes(f->page_bytes * f->n_pages, 0xff), f->page_bytes,
                                 c->k, c->v};
    f->rope = mem_alloc((size_t)longest * (size_t)d, sizeof(float));
    for (int64_t p = 0; p < longest; p++)
        for (int32_t e = 0; e < d / 2; e++) {
            const double angle = (double)p * pow(10000, -2.0 * e / d);
            f->rope[p * d + 2 * e] = (float)cos(angle);
            f->rope[p * d + 2 * e + 1] = (float)sin(angle);
        }
    draw_for(c, DRAW_INPUT);
    f->qkv = random_16(n_tokens * heads * d, c->type, c->sigma, c->mean);
    if (c->norms)
        f->q_norm = random_16(d, c->type, 0.1f, 1), f->k_norm = random_16(d, c->type, 0.1f, 1);
    if (c->sinks) f->sinks = random_16(c->heads, c->type, 1, 2);
    f->l = (attention_layer_params){
        .type = c->type,
        .n_heads = c->heads,
        .n_kv_heads = c->kv_heads,
        .head_dim = d,
        .window = c->window,
        .scale = 1 / sqrtf((float)d),
        .norm_eps = 1e-6f,
        .q_norm = c->norms ? device_copy(f->q_norm, 2 * d) : NULL,
        .k_norm = c->norms ? device_copy(f->k_norm, 2 * d) : NULL,
        .sinks = c->sinks ? device_copy(f->sinks, 2 * c->heads) : NULL,
        .rope_cos_sin = device_copy(f->rope, (int64_t)longest * d * 4),
    };
    f->device_qkv = device_copy(f->qkv, n_tokens * heads * d * 2);
    const status st = kernel_rope_append(f->device_qkv, &f->l, &f->cache, &all.device, NULL);
    check(st == ST_OK, c, "append", fail_message(), st);
    CUDA(cudaDeviceSynchronize());
    f->turned = host_copy(f->device_qkv, n_tokens * heads * d * 2);
    f->k = mem_alloc((size_t)kv, sizeof(float));
    f->v = mem_alloc((size_t)kv, sizeof(float));
    load_pages(f, &all, &f->cache, c->type, f->k, f->v);
    check_append(f, &all);
    if (n_tokens <= 8192 && c->k != KF_16 && c->v != KF_16) check_expand(f, &all);
    int64_t pages = all.page_start[c->n_seqs];
    f->workspace = device_bytes(attention_workspace_bytes(c->n_seqs, pages, c->heads, d), 0);
    free_batch(&all);
}

static void close_fixture(fixture *f) {
    void *device[] = {f->cache.base,
                      (void *)(uintptr_t)f->l.q_norm,
                      (void *)(uintptr_t)f->l.k_norm,
                      (void *)(uintptr_t)f->l.sinks,
                      (void *)(uintptr_t)f->l.rope_cos_sin,
                      f->device_qkv,
                      f->workspace};
    for (int32_t i = 0; i < COUNT_OF(device); i++) CUDA(cudaFree(device[i]));
    void *host[] = {f->qkv, f->turned, f->k, f->v, f->q_norm, f->k_norm, f->sinks, f->rope};
    for (int32_t i = 0; i < COUNT_OF(host); i++) mem_free(host[i]);
}

/* What is asked for: NULL, the best for each phase; the same of the Ampere family; of that family
 * with the shared memory of other GPUs; variants. */
static const char AMPERE[] = "ampere", AS_80[] = "ampere on sm_80", AS_86[] = "ampere on sm_86";
static const char *names[16] = {NULL, AMPERE, AS_80, AS_86};

static int32_t wide_pages;   /* room for pages written out */
static int64_t wide_touched; /* of them, by the last call */

/* Values of q that `attend` gives instead. */
static struct {
    int32_t row, head, dim; /* of the call's T, of a head */
    uint16_t bits;
} odd_q[16];
static int32_t n_odd;

static int64_t pages_touched(const uint8_t *pages, int64_t n, int64_t bytes) {
    int64_t touched = 0;
    for (int64_t i = 0; i < n; i++) {
        int64_t at = 0;
        while (at < bytes && pages[i * bytes + at] == 0xff) at++;
        touched += at < bytes;
    }
    return touched;
}

/* Attention of sequences from..to by one of `names`: out [T, H D], or NULL when it refuses. */
static uint16_t *attend(fixture *f, const char *variant, int32_t from, int32_t to) {
    const attention_case *c = f->c;
    const int32_t d = c->head_dim, heads = c->heads + 2 * c->kv_heads;
    test_batch b = make_batch(c, false, from, to);
    const int64_t row = (int64_t)heads * d, n_out = (int64_t)b.host.n_tokens * c->heads * d;
    uint16_t *q = mem_alloc((size_t)(b.host.n_tokens * row), 2), *to_row = q;
    int64_t at = 0;
    for (int32_t s = 0; s < c->n_seqs; at += c->kv_len[s++])
        if (s >= from && s < to) {
            memcpy(to_row, f->turned + (at + c->kv_len[s] - c->n_new[s]) * row,
                   (size_t)(c->n_new[s] * row) * 2);
            to_row += c->n_new[s] * row;
        }
    for (int32_t i = 0; i < n_odd; i++)
        q[odd_q[i].row * row + odd_q[i].head * d + odd_q[i].dim] = odd_q[i].bits;
    void *device_q = device_copy(q, b.host.n_tokens * row * 2),
         *out = device_bytes(n_out * 2, 0xff);
    const int64_t plan_bytes =
        attention_plan_bytes(to - from, b.host.n_tokens, b.page_start[to - from]);
    void *plan = mem_alloc((size_t)plan_bytes, 1);
    const int64_t wide_bytes = attention_page_bytes(KF_16, KF_16, c->kv_heads, d);
    attention_work work = {.workspace = f->workspace};
    status st = attention_plan_make(plan, &work.counts, &b.host, c->heads, c->kv_heads, d,
                                    c->window, c->k == KF_4 && c->v == KF_4, wide_pages, n_sms);
    CHECK(st == ST_OK && work.counts.bytes <= plan_bytes);
    CHECK(work.counts.n_wide_pages <= wide_pages);
    void *device_plan = device_copy(plan, work.counts.bytes);
    work.plan = device_plan;
    work.wide = wide_pages ? device_bytes(wide_pages * wide_bytes, 0xff) : NULL;
    const int32_t as = variant == AS_80 ? 80 : variant == AS_86 ? 86 : sm;
    const bool ampere = variant == AMPERE || variant == AS_80 || variant == AS_86;
    st = kernel_attention(out, device_q, &f->l, &f->cache, &b.device, &work,
                          ampere ? NULL : variant, ampere ? 80 : 0, as, n_sms, NULL);
    uint16_t *result = NULL;
    if (st != ST_UNSUPPORTED) {
        check(st == ST_OK, c, variant, fail_message(), st);
        CUDA(cudaDeviceSynchronize());
        result = host_copy(out, n_out * 2);
    }
    if (wide_pages) {
        uint8_t *pages = host_copy(work.wide, wide_pages * wide_bytes);
        wide_touched = pages_touched(pages, wide_pages, wide_bytes);
        mem_free(pages);
        CUDA(cudaFree(work.wide));
    }
    CUDA(cudaFree(device_q));
    CUDA(cudaFree(out));
    CUDA(cudaFree(device_plan));
    mem_free(plan);
    mem_free(q);
    free_batch(&b);
    return result;
}

/* ||out - ref||^2 and ||ref||^2 of a row: head h of token t of sequence s; `first`: the sequence's
 * token 0 among all. */
typedef struct {
    double error, norm;
} row_error;

static row_error error_of(const fixture *f, const uint16_t *out, int32_t s, int64_t first,
                          int32_t h, int32_t t, int32_t miss) {
    const attention_case *c = f->c;
    const int32_t d = c->head_dim, heads = c->heads + 2 * c->kv_heads;
    const int32_t g = h / (c->heads / c->kv_heads), position = c->kv_len[s] - c->n_new[s] + t;
    const int64_t stride = (int64_t)c->kv_heads * d;
    row_error e = {0, 0};
    if (miss && position < miss) return e;
    float q[256], ref[256];
    float *k = mem_alloc((size_t)(position + 1) * (size_t)d, sizeof *k);
    float *v = mem_alloc((size_t)(position + 1) * (size_t)d, sizeof *v);
    for (int32_t j = 0; j <= position; j++) {
        memcpy(k + (int64_t)j * d, f->k + (first + j) * stride + g * d, (size_t)d * 4);
        memcpy(v + (int64_t)j * d, f->v + (first + j) * stride + g * d, (size_t)d * 4);
    }
    const uint16_t *in = f->turned + ((first + position) * heads + h) * d;
    for (int32_t i = 0; i < d; i++) q[i] = value16(in[i], c->type);
    const float sink = f->sinks ? value16(f->sinks[h], c->type) : 0;
    ref_attention(ref, d, q, d, k, v, 1, position - miss, d, c->window, f->l.scale,
                  f->sinks ? &sink : NULL);
    for (int32_t i = 0; i < d; i++) {
        const double off = (double)value16(out[h * d + i], c->type) - (double)ref[i];
        e.error += off * off;
        e.norm += (double)ref[i] * (double)ref[i];
    }
    mem_free(k);
    mem_free(v);
    return e;
}

/* ||out - ref|| / ||ref|| of a sequence over sampled rows, the root of its mean square over the
 * sequences: what `bench attention` says of one. Of all rows together the shortest sequence would
 * be the measure, since results shrink as contexts grow, and the few rows of one scatter. `miss`
 * leaves that many last tokens out of the reference. Any NaN anywhere in out makes it NaN. */
static double relative_error(fixture *f, const uint16_t *out, int32_t miss) {
    const attention_case *c = f->c;
    int64_t n_out = 0, rows = 0;
    for (int32_t s = 0; s < c->n_seqs; s++) rows += c->n_new[s];
    for (n_out = rows * c->heads * c->head_dim; n_out-- > 0;)
        if (isnan(value16(out[n_out], c->type))) return NAN;
    int64_t first = 0, row = 0;
    double sum = 0;
    int32_t n_seen = 0;
    draw_for(c, DRAW_ROWS);
    for (int32_t s = 0; s < c->n_seqs; first += c->kv_len[s], row += c->n_new[s++]) {
        const int32_t n = c->kv_len[s] > 100000 ? 8 : (int32_t)i64_max(2, SAMPLES / c->n_seqs);
        const int32_t head0 = (int32_t)(uniform() * c->heads);
        int32_t token[SAMPLES];
        for (int32_t i = 0; i < n; i++)
            token[i] = i == 0 ? c->n_new[s] - 1 : (int32_t)(uniform() * c->n_new[s]);
        double error = 0, norm = 0;
#pragma omp parallel for schedule(dynamic) reduction(+ : error, norm)
        for (int32_t i = 0; i < n; i++) { /* heads in turn: no row of a decode twice before all */
            const row_error e = error_of(f, out + (row + token[i]) * c->heads * c->head_dim, s,
                                         first, (head0 + i) % c->heads, token[i], miss);
            error += e.error;
            norm += e.norm;
        }
        if (!(norm == 0)) sum += error / norm, n_seen++;
    }
    return sqrt(sum / n_seen);
}

/* Largest rel_err by variant, decodes only or not, type, quantised or not. */
static double worst[16][2][2][2];
static int64_t rows_of(const attention_case *c, int32_t to) {
    int64_t n = 0;
    for (int32_t s = 0; s < to; s++) n += c->n_new[s];
    return n;
}

/* With room for all pages to be written out (of chunks of 1024 rows), and for those of the first
 * such chunk, the bits are those of `out`. The twin: how many have been written says which way it
 * went. */
static void check_wide(fixture *f, const char *name, const uint16_t *out) {
    const attention_case *c = f->c;
    const int64_t n = rows_of(c, c->n_seqs) * c->heads * c->head_dim;
    const bool able = !name || (strcmp(name, "plain") && !(name == AS_86 && c->head_dim == 256));
    int32_t first = 0, all = 0;
    for (int32_t s = c->n_decodes; s < c->n_seqs; s++) {
        if (c->n_new[s] * (c->heads / c->kv_heads) < 1024) continue;
        const int32_t position = c->kv_len[s] - c->n_new[s];
        const bool cut = c->window > 0 && position >= c->window;
        const int32_t pages =
            (int32_t)div_up(c->kv_len[s], P) - (cut ? (position - c->window + 1) / (2 * P) * 2 : 0);
        if (!first) first = pages;
        all += pages;
    }
    const bool codes = c->k != KF_16 && c->v != KF_16;
    const int32_t rooms[] = {all, first};
    for (int32_t i = 0; i < 2 && rooms[i]; i++) {
        wide_pages = rooms[i];
        uint16_t *got = attend(f, name, 0, c->n_seqs);
        wide_pages = 0;
        check(!memcmp(out, got, (size_t)n * 2), c, name, "differs written out: pages", rooms[i]);
        check(wide_touched == (able && codes ? rooms[i] : 0), c, name,
              "pages written out:", (double)wide_touched);
        mem_free(got);
    }
}

/* Of relative_error. */
static double limit_of(dtype type) { return type == DT_F16 ? 3e-4 : 2.5e-3; }

static void run_case(const attention_case *c) {
    fixture f;
    open_fixture(&f, c);
    const bool decode_only = c->n_decodes == c->n_seqs;
    const double limit = limit_of(c->type);
    int32_t index = 0;
    for (const char **name = names; name == names || *name; name++, index++) {
        uint16_t *out = attend(&f, *name, 0, c->n_seqs);
        if (!out) continue;
        const double e = relative_error(&f, out, 0);
        const bool quantised = c->k != KF_16 || c->v != KF_16;
        double *w = &worst[index][decode_only][c->type == DT_BF16][quantised];
        if (!(e <= *w)) *w = e;
        check(e <= limit, c, *name, "rel_err", e);
        if (c->kv_len[0] > 1 && (c->kv_len[0] < 200 || c->n_seqs == 1)) {
            const int32_t few = 1 + c->kv_len[0] / 16384; /* one alone weighs little then */
            const double missed = relative_error(&f, out, few);
            check(missed > 2 * limit, c, *name, "a missing token went unseen: rel_err", missed);
        }
        uint16_t *again = attend(&f, *name, 0, c->n_seqs);
        const int64_t row = (int64_t)c->heads * c->head_dim, n = rows_of(c, c->n_seqs) * row;
        check(!memcmp(out, again, (size_t)n * 2), c, *name, "differs from run to run", 0);
        mem_free(again);
        check_wide(&f, *name, out);
        for (int32_t s = 0; s < c->n_seqs && c->n_seqs > 1;
             s += (int32_t)i64_max(1, c->n_seqs / 4)) {
            uint16_t *alone = attend(&f, *name, s, s + 1);
            if (!alone) continue;
            check(!memcmp(out + rows_of(c, s) * row, alone, (size_t)(c->n_new[s] * row) * 2), c,
                  *name, "differs from the sequence alone: sequence", s);
            mem_free(alone);
        }
        mem_free(out);
    }
    close_fixture(&f);
}

/* Are a head's results `got` and `want` as far apart as two that pass may be, or less? */
static bool is_near(const attention_case *c, const uint16_t *got, const uint16_t *want) {
    double off = 0, norm = 0;
    for (int32_t e = 0; e < c->head_dim; e++) {
        const double x = (double)value16(want[e], c->type);
        off += ((double)value16(got[e], c->type) - x) * ((double)value16(got[e], c->type) - x);
        norm += x * x;
    }
    return sqrt(off) <= 2 * limit_of(c->type) * sqrt(norm);
}

/* Heads of rows of `got` that are not as they should be: NaN throughout where q is odd, near
 * `clean` where that of another head is that has the same K and V, for a warp moves the sums of all
 * its heads to new maxima together, and elsewhere the bits of `clean`. moved: as if the next head's
 * q were odd. */
static int32_t spoilt(const attention_case *c, const uint16_t *got, const uint16_t *clean,
                      int32_t moved) {
    const int32_t d = c->head_dim, ratio = c->heads / c->kv_heads;
    int32_t n = 0;
    for (int32_t i = 0; i < rows_of(c, c->n_seqs) * c->heads; i++, got += d, clean += d) {
        bool odd = false, beside = false, nan = true;
        for (int32_t o = 0; o < n_odd; o++) {
            const int32_t first = odd_q[o].row * c->heads;
            odd = odd || i == first + (odd_q[o].head + moved) % c->heads;
            beside = beside || i / ratio == (first + odd_q[o].head) / ratio;
        }
        for (int32_t e = 0; e < d; e++) nan = nan && isnan(value16(got[e], c->type));
        const bool same = !memcmp(got, clean, (size_t)d * 2);
        n += odd ? !nan : !(same || (beside && is_near(c, got, clean)));
    }
    return n;
}

/* --- Cases -------------------------------------------------------------------------------------
 * */

static attention_case base_case(const char *name, dtype type, kv_format k, kv_format v) {
    attention_case c = {0};
    c.name = name;
    c.type = type;
    c.heads = 8;
    c.kv_heads = 2;
    c.head_dim = 128;
    c.sigma = 1;
    c.k = k;
    c.v = v;
    return c;
}

static void add(attention_case *c, int32_t kv_len, int32_t n_new) {
    c->kv_len[c->n_seqs] = kv_len;
    c->n_new[c->n_seqs++] = n_new;
    if (n_new == 1 && c->n_decodes == c->n_seqs - 1) c->n_decodes++;
}

static void every_length(dtype type, kv_format k, kv_format v, int32_t head_dim) {
    attention_case c = base_case("lengths", type, k, v);
    c.head_dim = head_dim;
    static const int32_t lengths[] = {1,  2,  3,  7,   8,   9,   15,  16,  17,  31,  32,  33,  47,
                                      63, 64, 65, 127, 128, 129, 255, 256, 257, 511, 513, 1025};
    for (int32_t i = 0; i < COUNT_OF(lengths); i++) add(&c, lengths[i], 1);
    run_case(&c);
    attention_case p = base_case("chunks", type, k, v);
    p.head_dim = head_dim;
    add(&p, 200, 1);
    add(&p, 700, 1);
    for (int32_t i = 0; i < COUNT_OF(lengths); i += 2) add(&p, lengths[i], (lengths[i] + 1) / 2);
    add(&p, 300, 300);
    add(&p, 333, 7);
    run_case(&p);
}

/* More work items than the GPU takes at once, and a chunk alone. */
static void many(dtype type, kv_format k, kv_format v) {
    attention_case c = base_case("many", type, k, v);
    for (int32_t i = 0; i < 70; i++) add(&c, 300 + i * 13 % 900, 1); /* 280 items and more */
    add(&c, 150, 1);
    run_case(&c);
    const int32_t all = n_sms;
    n_sms = 16; /* many leaves a block: equal shares */
    c.name = "shares";
    run_case(&c);
    n_sms = all;
    attention_case r = base_case("ragged", type, k, v);
    for (int32_t i = 0; i < 40; i++) add(&r, 100 + i, 1);
    add(&r, 20001, 1); /* alone it is split otherwise than beside the others */
    run_case(&r);
    attention_case p = base_case("prefill", type, k, v);
    p.heads = 64; /* enough rows for whole tiles in the batch, and for halves alone */
    add(&p, 1100, 500);
    add(&p, 64, 64);
    run_case(&p);
}

/* Decodes, short chunks and long ones in one call; a prompt, and chunks behind what is cached. */
static void long_chunks(dtype type, kv_format k, kv_format v, int32_t head_dim, int32_t window) {
    attention_case c = base_case("long chunks", type, k, v);
    c.head_dim = head_dim;
    c.window = window;
    c.sinks = window > 0;
    add(&c, 700, 1);
    add(&c, 64, 1);
    add(&c, 333, 70);
    add(&c, 1203, 600);
    add(&c, 640, 640);
    add(&c, 100, 100);
    run_case(&c);
}

/* The same with so few SMs that chunks have tall tiles, but the shorter ones alone have not. */
static void tall_tiles(dtype type, kv_format k, kv_format v, int32_t window) {
    const int32_t all = n_sms;
    n_sms = 4;
    long_chunks(type, k, v, 64, window);
    n_sms = all;
}

/* Minima of V so many scales below zero that 1024 scales less would be no number of fp16. */
static void far_minima(dtype type, kv_format f) {
    attention_case c = base_case("far minima", type, f, f);
    c.sigma = 0.05f;
    c.mean = -3;
    add(&c, 100, 30);
    add(&c, 700, 520);
    run_case(&c);
}

static void features(dtype type, kv_format f) {
    static const int32_t ratios[][2] = {{4, 4},  {8, 2},  {10, 2}, {12, 2},
                                        {14, 2}, {16, 2}, {32, 2}};
    for (int32_t i = 0; i < COUNT_OF(ratios); i++) {
        attention_case c = base_case("ratios", type, f, f);
        c.heads = ratios[i][0];
        c.kv_heads = ratios[i][1];
        c.norms = i % 2;
        add(&c, 100, 1);
        add(&c, 1000, 1);
        add(&c, 150, 77);
        run_case(&c);
    }
    static const int32_t windows[] = {1, 17, 64, 100, 128, 300};
    for (int32_t i = 0; i < COUNT_OF(windows); i++) {
        attention_case c = base_case("windows", type, f, f);
        c.heads = 16;
        c.head_dim = i % 2 ? 64 : 128;
        c.window = windows[i];
        c.sinks = i != 1;
        add(&c, 50, 1);
        add(&c, 129, 1);
        add(&c, 1600, 1);
        add(&c, 200, 200);
        add(&c, 400, 90);
        run_case(&c);
    }
}

static void long_context(dtype type, kv_format f) {
    attention_case c = base_case("long", type, f, f);
    c.heads = 4;
    c.kv_heads = 1;
    add(&c, 65537, 1);
    add(&c, 65536, 1);
    add(&c, 70, 1);
    add(&c, 5000, 1);
    add(&c, 2100, 130);
    run_case(&c);
}

/* Codes of one sign summed over leaves of 4096 tokens, to a result far smaller than the sums: a mma
 * truncates them, so that they drift. */
static void drift(dtype type, kv_format f) {
    attention_case c = base_case("drift", type, f, f);
    c.kv_heads = 8;
    c.head_dim = 64;
    add(&c, 131072, 1);
    run_case(&c);
}

/* NaNs and infinities in q of some heads make those heads' results NaN and no other's. The twins:
 * nothing odd, and odd what is not. */
static void odd_queries(dtype type, kv_format k, kv_format v, int32_t heads) {
    attention_case c = base_case("odd q", type, k, v);
    static const int32_t lengths[] = {100, 700, 9000}; /* a warp's, one block's, several blocks' */
    static const int32_t rows[] = {0, 1, 2, 2 + 17, 2 + 130 + 299}; /* of decodes and of chunks */
    c.heads = heads;
    for (int32_t i = 0; i < COUNT_OF(lengths); i++) add(&c, lengths[i], 1);
    add(&c, 200, 130);
    add(&c, 300, 300);
    fixture f;
    open_fixture(&f, &c);
    for (const char **name = names; name == names || *name; name++) {
        uint16_t *clean = attend(&f, *name, 0, c.n_seqs);
        if (!clean) continue;
        for (n_odd = 0; n_odd < 2 * COUNT_OF(rows); n_odd++) {
            const float odd = n_odd % 2 ? INFINITY : NAN;
            odd_q[n_odd].row = rows[n_odd / 2];
            odd_q[n_odd].head = (3 + 5 * n_odd) % heads;
            odd_q[n_odd].dim = (7 + 29 * n_odd) % c.head_dim;
            odd_q[n_odd].bits = type == DT_F16 ? f16_from_f32(odd) : bf16_from_f32(odd);
        }
        uint16_t *got = attend(&f, *name, 0, c.n_seqs);
        const int32_t n = spoilt(&c, got, clean, 0);
        check(n == 0, &c, *name, "NaN and infinity in q: heads not as they should be:", n);
        check(spoilt(&c, clean, clean, 0) == n_odd, &c, *name, "no NaN went unseen", 0);
        check(spoilt(&c, got, clean, 1) == 2 * n_odd, &c, *name, "a NaN too many went unseen", 0);
        n_odd = 0;
        mem_free(got);
        mem_free(clean);
    }
    close_fixture(&f);
}

/* For compute-sanitizer: seconds under it. Prefills: with two SMs a block has several items, and of
 * 64 dims, 16 bits each, tall ones. */
static void tiny(dtype type, kv_format f, int32_t head_dim) {
    attention_case c = base_case("tiny", type, f, f);
    c.head_dim = head_dim;
    const int32_t all = n_sms;
    n_sms = 2;
    add(&c, 70, 1);
    add(&c, 200, 130);
    run_case(&c);
    n_sms = all;
}

/* Each way a decode's sequence may go: a warp alone, a leaf, leaves of one block and of several;
 * few leaves a block and, with two SMs, many. */
static void least(kv_format f) {
    attention_case c = base_case("least", DT_F16, f, f);
    static const int32_t lengths[] = {1, 65, 128, 129, 300, 1100};
    for (int32_t i = 0; i < COUNT_OF(lengths); i++) add(&c, lengths[i], 1);
    run_case(&c);
    const int32_t all = n_sms;
    n_sms = 2;
    c.name = "least, shares";
    add(&c, 2300, 1);
    add(&c, 700, 1);
    run_case(&c);
    n_sms = all;
}

/* Scales of V beyond 32, and of K as ever. */
static void large_values(dtype type, kv_format f) {
    attention_case c = base_case("large", type, f, f);
    c.sigma = 3000;
    c.norms = true;
    add(&c, 300, 1);
    add(&c, 200, 130);
    run_case(&c);
}

/* gpu_attention [--quick | --least | --long | --odd]: all cases, a fifth, those that
 * compute-sanitizer can do, chunks with their pages written out, or NaNs and infinities in q. */
int main(int argc, char **argv) {
    const bool quick = argc > 1 && !strcmp(argv[1], "--quick");
    const bool for_sanitizer = argc > 1 && !strcmp(argv[1], "--least");
    const bool only_long = argc > 1 && !strcmp(argv[1], "--long");
    const bool only_odd = argc > 1 && !strcmp(argv[1], "--odd");
    struct cudaDeviceProp prop;
    if (cudaGetDeviceProperties(&prop, 0) != cudaSuccess) {
        printf("skipped: no device\n");
        return 0;
    }
    sm = prop.major * 10 + prop.minor;
    n_sms = prop.multiProcessorCount;
    for (int32_t i = 4; i + 1 < COUNT_OF(names) && attention_variants()[i - 4]; i++)
        names[i] = attention_variants()[i - 4];
    static const dtype types[] = {DT_F16, DT_BF16};
    for (int32_t f = 0; for_sanitizer && f < KF_COUNT; f++)
        least((kv_format)f), tiny(types[f % 2], (kv_format)f, 128);
    for (int32_t i = 0; for_sanitizer && i < 2; i++) tiny(types[i], KF_16, 64);
    for (int32_t i = 0; !for_sanitizer && !only_long && i < 2; i++) {
        for (int32_t f = 0; f < KF_COUNT; f++)
            for (int32_t heads = 8; heads <= (quick ? 8 : 32); heads += 8 + 16 * ((f + i) % 2))
                odd_queries(types[i], (kv_format)f, (kv_format)f, heads);
        odd_queries(types[i], KF_8, KF_4, quick ? 16 : 8);
    }
    for (int32_t i = 0; !for_sanitizer && !only_odd && i < 2; i++) {
        for (int32_t f = 0; f < KF_COUNT; f++) {
            const kv_format k = (kv_format)f, other = (kv_format)((f + 1) % KF_COUNT);
            long_chunks(types[i], k, k, 128, f % 2 ? 200 : 0);
            if (!quick || i == f % 2) tall_tiles(types[i], k, k, f / 2 ? 100 : 0);
            if (quick) continue;
            long_chunks(types[i], k, other, 128, f % 2 ? 0 : 200);
            long_chunks(types[i], k, k, 64, 0);
            long_chunks(types[i], k, other, 256, 100);
        }
        far_minima(types[i], KF_8), far_minima(types[i], KF_4);
        if (only_long) continue;
        for (int32_t f = 0; f < KF_COUNT; f++)
            if (!quick || i == f % 2)
                many(types[i], (kv_format)f, (kv_format)f), large_values(types[i], (kv_format)f);
        for (int32_t k = 0; k < KF_COUNT; k++)
            for (int32_t v = 0; v < KF_COUNT; v++)
                if (!quick || (k == v && i == k % 2))
                    every_length(types[i], (kv_format)k, (kv_format)v,
                                 k == v || quick ? 128
                                 : (k + v) % 2   ? 64
                                                 : 256);
        if (types[i] == DT_F16) drift(types[i], KF_8);
        if (quick) continue;
        for (int32_t f = 0; f < KF_COUNT; f++) {
            every_length(types[i], (kv_format)f, (kv_format)f, 64);
            every_length(types[i], (kv_format)f, (kv_format)f, 256);
            features(types[i], (kv_format)f);
            long_context(types[i], (kv_format)f);
        }
    }
    for (int32_t i = 0; i == 0 || names[i]; i++)
        for (int32_t d = 0; d < 2; d++)
            printf("{\"kind\":\"attention_error\",\"kernel\":\"%s\",\"phase\":\"%s\",\"fp16_kv16\":"
                   "%.3g,"
                   "\"fp16_quantised\":%.3g,\"bf16_kv16\":%.3g,\"bf16_quantised\":%.3g}\n",
                   names[i] ? names[i] : "best", d ? "decode" : "mixed", worst[i][d][0][0],
                   worst[i][d][0][1], worst[i][d][1][0], worst[i][d][1][1]);
    printf("%d checks: %d passed, %d failed\n", n_run, n_run - n_failed, n_failed);
    return n_failed ? 1 : 0;
}
