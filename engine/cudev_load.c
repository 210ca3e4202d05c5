/* cudev_load.c - one weight onto the device: values, their quantised form, the packed order, all
 * made there. The host touches a checkpoint's bytes once, to hand them over (once a rank).
 *
 *     file --upload--> raw --convert--> f32 rows --quantise--> canonical --pack--> weight
 *     seed ------------noise----------^
 *     of other tools: raw --unpack----^ values, or codes ------^
 *                                                               16 bit: values --pack-->
 *
 * A rank takes its rows or columns of the values before they are quantised, so that a scale of a
 * whole row (WFP8, W8, the global one of NVFP4) is that of the rank's part of it; codes that a
 * checkpoint has already keep their scales.
 *
 * f32 rows are made in chunks of at most VALUES_MOST; the canonical matrix is whole, because
 * packing wants it so. Work is ordered on one stream, so scratch is used again without waiting. */
#include "cudev.h"

#include "fill.h"
#include "formats.h"
#include "quantize.h"
#include "unpack.h"

#include <cuda_runtime_api.h>
#include <math.h>
#include <string.h>

enum { ROW_BLOCK = 128, VALUES_MOST = 1 << 26 /* f32 values of a chunk: 256 MiB */ };

static status begin_loading(cudev *c, const weight_source *s, const precision *p) {
    if (c->loading) return ST_OK;
    TRY(format_supported(p, c->sm));
    c->type = s->type == DT_BF16 ? DT_BF16 : DT_F16;
    /* Packed forms may be padded to whole tiles: a part in 64 is more than any model here needs. */
    const int64_t bytes = s->config ? model_weight_bytes(s->config, p, c->base.options.tp) : 0;
    TRY(cudev_slab_reserve(&c->weights, (size_t)(bytes + bytes / 64), "weights"));
    TRY(arena_open(&c->handles, (size_t)1 << 30)); /* address space */
    CUDA_TRY(cudaMalloc((void **)&c->amax, sizeof *c->amax), "weights");
    c->loading = true;
    return ST_OK;
}

void cudev_load_done(cudev *c) {
    cudev_scratch_free(&c->raw);
    cudev_scratch_free(&c->values);
    cudev_scratch_free(&c->packed);
    cudev_scratch_free(&c->wide);
    cudev_staging_close(&c->staging);
    if (c->amax) (void)cudaFree(c->amax);
    c->amax = NULL;
}

status cudev_load_times(device *d, load_times *out) {
    cudev *c = cudev_self(d);
    CUDA_TRY(cudaStreamSynchronize(c->stream), "weights");
    TRY(cudev_marks_sum(&c->staging));
    *out = c->staging.times;
    return ST_OK;
}

/* --- Values --------------------------------------------------------------------------------- */

/* Rows [row, row + rows) of a part, counted in the part, to out [rows, k] of `type`. */
static status part_values(cudev *c, const matrix_part *p, int32_t k, int32_t row, int32_t rows,
                          void *out, dtype type) {
    const int64_t size = dtype_bytes(p->type, 1), first = row * p->row_stride;
    const int64_t elements = (rows - 1) * p->row_stride + (k - 1) * p->col_stride + 1;
    TRY(cudev_scratch_grow(&c->raw, (size_t)(elements * size), c->stream, "weights"));
    TRY(cudev_upload(&c->staging, c->raw.data, (const uint8_t *)p->data + first * size,
                     (size_t)(elements * size), c->stream));
    return kernel_fill_convert(out, type, c->raw.data, p->type, rows, k, p->row_stride,
                               p->col_stride, c->stream);
}

static size_t aligned(int64_t bytes) { return (size_t)div_up(bytes, 256) * 256; }

/* Words of a field that a matrix of n x k takes. */
static size_t field_bytes(const packed_field *f, int32_t n, int32_t k) {
    const int64_t last = (n - 1) / f->n_per * f->n_stride + (k - 1) / f->k_per * f->k_stride;
    return (size_t)(last + 1) * (size_t)f->word_bits / 8;
}

/* The bytes of a packed matrix, in scratch. */
typedef struct {
    uint8_t *code, *zero, *scale;
    int32_t *group; /* [k], of desc_act; or NULL */
} stored_bytes;

static status upload_stored(cudev *c, const packed_matrix *m, stored_bytes *at) {
    const int32_t groups = (int32_t)div_up(m->k, m->group);
    const int64_t blocks = div_up(m->n, m->block_n);
    const int64_t last = (blocks - 1) * m->scale_n_stride + (groups - 1) * m->scale_g_stride;
    const size_t codes = field_bytes(&m->code, m->n, m->k);
    const size_t zeros = m->zero.data ? field_bytes(&m->zero, m->n, groups) : 0;
    const size_t scales = (size_t)dtype_bytes(m->scale_type, last + 1);
    const size_t order = m->g_idx ? (size_t)m->k * sizeof *m->g_idx : 0;
    const size_t to_zero = aligned((int64_t)codes), to_scale = to_zero + aligned((int64_t)zeros);
    const size_t to_group = to_scale + aligned((int64_t)scales);
    TRY(cudev_scratch_grow(&c->raw, to_group + order, c->stream, "weights"));
    uint8_t *base = c->raw.data;
    *at = (stored_bytes){.code = base,
                         .zero = zeros ? base + to_zero : NULL,
                         .scale = base + to_scale,
                         .group = order ? (int32_t *)(void *)(base + to_group) : NULL};
    TRY(cudev_upload(&c->staging, at->code, m->code.data, codes, c->stream));
    if (zeros) TRY(cudev_upload(&c->staging, at->zero, m->zero.data, zeros, c->stream));
    if (order) TRY(cudev_upload(&c->staging, at->group, m->g_idx, order, c->stream));
    return cudev_upload(&c->staging, at->scale, m->scale, scales, c->stream);
}

/* From row `row` of a part on. */
static unpack_fields fields_of(const packed_field *f, const void *word, const matrix_part *p,
                               int32_t row) {
    return (unpack_fields){.word = word,
                           .word_bits = f->word_bits,
                           .bits = f->bits,
                           .n_per = f->n_per,
                           .k_per = f->k_per,
                           .awq_order = f->awq_order,
                           .n_stride = f->n_stride,
                           .k_stride = f->k_stride,
                           .row = p->packed_row + row * (int32_t)p->row_stride,
                           .row_step = (int32_t)p->row_stride};
}

static unpack_scales scales_of(const packed_matrix *m, const void *scale, const matrix_part *p,
                               int32_t row, int32_t block_n) {
    return (unpack_scales){.scale = scale,
                           .type = m->scale_type,
                           .n_stride = m->scale_n_stride,
                           .g_stride = m->scale_g_stride,
                           .block_n = m->block_n,
                           .row = p->packed_row + row * (int32_t)p->row_stride,
                           .row_step = (int32_t)p->row_stride * block_n};
}

static dtype code_type_of(const packed_matrix *m) {
    switch (m->format) {
    case WF_INT8: return m->code_flip ? DT_U8 : DT_I8;
    case WF_INT4: return DT_U8;
    case WF_FP8:
    case WF_FP8B: return DT_E4M3;
    default: return DT_E2M1;
    }
}

/* Rows [row, row + rows) of a part that other tools have quantised. */
static status unpack_rows(cudev *c, const matrix_part *p, const stored_bytes *at, int32_t row,
                          int32_t rows, void *out, dtype type) {
    const packed_matrix *m = p->packed;
    const dtype code = code_type_of(m);
    const unpack_matrix u = {.code = fields_of(&m->code, at->code, p, row),
                             .zero = fields_of(&m->zero, at->zero, p, row),
                             .zero_add = m->zero_add,
                             .middle = code == DT_U8 ? 1 << (m->code.bits - 1) : 0,
                             .scale = scales_of(m, at->scale, p, row, 1),
                             .group_of = at->group,
                             .group = m->group,
                             .code_type = code,
                             .global_scale = m->global_scale};
    return kernel_unpack_values(out, type, &u, rows, m->k, c->stream);
}

/* out [rows, k] of `type` = rows [row0, row0 + rows) of matrix j. */
static status matrix_values(cudev *c, const weight_source *s, int32_t j, int32_t row0, int32_t rows,
                            void *out, dtype type) {
    const int32_t n = s->shape.n, k = s->shape.k;
    if (s->n_parts == 0)
        return kernel_fill_noise(out, type, (int64_t)rows * k, s->seed,
                                 ((uint64_t)j * (uint64_t)n + (uint64_t)row0) * (uint64_t)k,
                                 s->synthetic_scale, s->synthetic_mean, c->stream);
    const int32_t each = s->n_parts / s->shape.count;
    const matrix_part *p = s->part + (int64_t)j * each;
    const packed_matrix *there = NULL; /* its bytes lie in scratch */
    stored_bytes at = {0};
    for (int32_t i = 0; i < each; i++, p++) {
        const int64_t lo = i64_max(row0, p->row_at), hi = i64_min(row0 + rows, p->row_at + p->rows);
        if (lo >= hi) continue;
        const int32_t row = (int32_t)(lo - p->row_at), count = (int32_t)(hi - lo);
        uint8_t *to = (uint8_t *)out + dtype_bytes(type, (lo - row0) * k);
        if (p->packed && p->packed != there) TRY(upload_stored(c, p->packed, &at));
        there = p->packed;
        TRY(p->packed ? unpack_rows(c, p, &at, row, count, to, type)
                      : part_values(c, p, k, row, count, to, type));
    }
    return ST_OK;
}

/* The range i of a rank in the whole weight, as weight_shard_range; all of it without a config. */
static void range_of(const cudev *c, int32_t i, int32_t *at, int32_t *n) {
    const weight_source *w = c->whole;
    *at = 0;
    *n = w->shape.shard == SHARD_COLS ? w->shape.k : w->shape.n;
    if (w->config && c->base.options.tp > 1)
        weight_shard_range(w->config, w->field, c->base.options.tp, c->rank, i, at, n);
}

/* Columns of rows [row0, row0 + rows): whole rows in scratch first. */
static status rank_columns(cudev *c, int32_t j, int32_t row0, int32_t rows, void *out, dtype type) {
    const weight_source *w = c->whole;
    int32_t at, n;
    range_of(c, 0, &at, &n);
    const size_t stride = (size_t)dtype_bytes(type, w->shape.k);
    const size_t width = (size_t)dtype_bytes(type, n);
    const int32_t step = (int32_t)i64_max(1, i64_min(rows, VALUES_MOST / w->shape.k));
    TRY(cudev_scratch_grow(&c->wide, (size_t)step * stride, c->stream, "weights"));
    for (int32_t r = 0; r < rows; r += step) {
        const int32_t m = (int32_t)i64_min(step, rows - r);
        TRY(matrix_values(c, w, j, row0 + r, m, c->wide.data, type));
        CUDA_TRY(cudaMemcpy2DAsync((uint8_t *)out + (size_t)r * width, width,
                                   (uint8_t *)c->wide.data + dtype_bytes(type, at), stride, width,
                                   (size_t)m, cudaMemcpyDeviceToDevice, c->stream),
                 "weights");
    }
    return ST_OK;
}

/* As matrix_values, of this rank's matrix j. */
static status rank_values(cudev *c, const weight_source *s, int32_t j, int32_t row0, int32_t rows,
                          void *out, dtype type) {
    const weight_source *w = c->whole;
    if (c->base.options.tp == 1 || w->shape.shard == SHARD_NONE)
        return matrix_values(c, w, j, row0, rows, out, type);
    if (w->shape.shard == SHARD_COLS) return rank_columns(c, j, row0, rows, out, type);
    int32_t start = 0; /* of the range, in the rank's matrix */
    for (int32_t i = 0; i < w->shape.n_fused; i++) {
        int32_t at, n;
        range_of(c, i, &at, &n);
        const int32_t lo = (int32_t)i64_max(row0, start);
        const int32_t hi = (int32_t)i64_min(row0 + rows, start + n);
        if (lo < hi)
            TRY(matrix_values(c, w, j, at + lo - start, hi - lo,
                              (uint8_t *)out + dtype_bytes(type, (int64_t)(lo - row0) * s->shape.k),
                              type));
        start += n;
    }
    return ST_OK;
}

/* This rank's part of the bias of a whole matrix, in place. */
static void rank_bias(const cudev *c, float *value) {
    const weight_shape *w = &c->whole->shape;
    if (c->base.options.tp == 1 || w->shard == SHARD_NONE) return;
    if (w->shard == SHARD_COLS) { /* the sums are reduced: one rank adds it */
        if (c->rank) memset(value, 0, sizeof *value * (size_t)w->n);
        return;
    }
    for (int32_t i = 0, to = 0; i < w->n_fused; i++) {
        int32_t at, n;
        range_of(c, i, &at, &n); /* at >= to: ranges only move down */
        memmove(value + to, value + at, sizeof *value * (size_t)n);
        to += n;
    }
}

/* Bias of all matrices, [count, n] of the device's type. */
static status load_bias(cudev *c, const weight_source *s, void *to) {
    const int32_t n = s->shape.n, count = s->shape.count;
    const size_t bytes = (size_t)dtype_bytes(c->type, n);
    float *value = mem_alloc((size_t)c->whole->shape.n, sizeof(float));
    uint8_t *narrow = mem_alloc(1, bytes);
    status st = value && narrow ? ST_OK : FAIL(ST_NOMEM, "bias of %d", n);
    for (int32_t j = 0; j < count && st == ST_OK; j++) {
        weight_source_bias(c->whole, j, value);
        rank_bias(c, value);
        dtype_from_f32(narrow, value, n, c->type);
        st = cudev_check((int)cudaMemcpyAsync((uint8_t *)to + (size_t)j * bytes, narrow, bytes,
                                              cudaMemcpyHostToDevice, c->stream),
                         "bias");
    }
    mem_free(narrow);
    mem_free(value);
    return st;
}

/* --- Quantised linears ---------------------------------------------------------------------- */

/* A canonical matrix in scratch. */
static status canonical(cudev *c, const precision *p, int32_t n, int32_t k, qmatrix *q) {
    const dtype type = qmatrix_scale_type(p->weight);
    const size_t codes = aligned(qmatrix_code_bytes(p, n, k));
    const size_t scales = aligned(dtype_bytes(type, qmatrix_scale_count(p, n, k)));
    const int64_t zeros = qmatrix_zero_count(p, n, k);
    TRY(cudev_scratch_grow(&c->packed, codes + scales + aligned(zeros), c->stream, "quantising"));
    uint8_t *base = c->packed.data;
    *q = (qmatrix){.format = p->weight,
                   .n = n,
                   .k = k,
                   .group = p->group ? p->group : k,
                   .block_n = p->weight == WF_FP8B ? ROW_BLOCK : 1,
                   .scale_type = type,
                   .code = base,
                   .scale = base + codes,
                   .zero = zeros ? base + codes + scales : NULL,
                   .global_scale = 1};
    return ST_OK;
}

static int32_t chunk_rows(int32_t n, int32_t k) {
    const int64_t rows = i64_max(VALUES_MOST / k / ROW_BLOCK, 1) * ROW_BLOCK;
    return (int32_t)i64_min(rows, n);
}

/* c->values = a chunk of matrix j; its largest magnitude joins *c->amax. */
static status chunk_values(cudev *c, const weight_source *s, int32_t j, int32_t row, int32_t rows,
                           bool extent) {
    TRY(rank_values(c, s, j, row, rows, c->values.data, DT_F32));
    if (!extent) return ST_OK;
    return kernel_quantize_extent(c->amax, c->values.data, (int64_t)rows * s->shape.k, c->stream);
}

static status read_amax(cudev *c, int32_t j, float *amax) {
    CUDA_TRY(cudaMemcpyAsync(amax, c->amax, sizeof *amax, cudaMemcpyDeviceToHost, c->stream),
             "weights");
    CUDA_TRY(cudaStreamSynchronize(c->stream), "weights");
    if (isfinite(*amax)) return ST_OK;
    return FAIL(ST_FORMAT, "matrix %d holds a NaN or an infinity", j);
}

/* Values, codes and packed form of matrix j. What comes from a file is searched for NaN; NVFP4 asks
 * for the largest magnitude of the whole matrix before the first code. */
static status quantise_matrix(cudev *c, const weight_source *s, const precision *p, int32_t j,
                              cudev_weight *w) {
    const int32_t n = s->shape.n, k = s->shape.k, step = chunk_rows(n, k);
    const bool nvfp4 = p->weight == WF_NVFP4, extent = nvfp4 || s->n_parts > 0;
    qmatrix q;
    float amax = 0;
    TRY(canonical(c, p, n, k, &q));
    TRY(cudev_scratch_grow(&c->values, (size_t)step * (size_t)k * sizeof(float), c->stream,
                           "quantising"));
    if (extent) CUDA_TRY(cudaMemsetAsync(c->amax, 0, sizeof *c->amax, c->stream), "weights");
    if (nvfp4) {
        for (int32_t row = 0; row < n; row += step)
            TRY(chunk_values(c, s, j, row, (int32_t)i64_min(step, n - row), true));
        TRY(read_amax(c, j, &amax));
        q.global_scale = quantize_global_scale(WF_NVFP4, amax);
        CUDA_TRY(cudaMemcpyAsync(w->linear.global_scale + j, &q.global_scale, sizeof(float),
                                 cudaMemcpyHostToDevice, c->stream),
                 "weights");
    }
    for (int32_t row = 0; row < n; row += step) {
        const int32_t rows = (int32_t)i64_min(step, n - row);
        if (!nvfp4 || step < n) TRY(chunk_values(c, s, j, row, rows, extent && !nvfp4));
        TRY(kernel_quantize_weight(&q, c->values.data, row, rows, c->stream));
    }
    if (extent && !nvfp4) TRY(read_amax(c, j, &amax));
    return linear_pack(&w->linear, j, &q, c->stream);
}

/* Rows of the canonical matrix that one part has. */
static status unpack_part(cudev *c, const matrix_part *p, const stored_bytes *at,
                          const qmatrix *q) {
    const packed_matrix *m = p->packed;
    const int64_t groups = div_up(q->k, q->group), row_bytes = (int64_t)q->k * m->code.bits / 8;
    const unpack_fields code = fields_of(&m->code, at->code, p, 0);
    TRY(kernel_unpack_codes(q->code + p->row_at * row_bytes, &code, p->rows, q->k, m->code_flip,
                            c->stream));
    if (q->zero) {
        const unpack_fields zero = fields_of(&m->zero, at->zero, p, 0);
        TRY(kernel_unpack_zeros(q->zero + p->row_at * groups, &zero, p->rows, (int32_t)groups,
                                m->zero_add, c->stream));
    }
    const unpack_scales s = scales_of(m, at->scale, p, 0, q->block_n);
    uint8_t *to = (uint8_t *)q->scale + dtype_bytes(q->scale_type, p->row_at / q->block_n * groups);
    return kernel_unpack_scales(to, q->scale_type, &s, (int32_t)div_up(p->rows, q->block_n),
                                (int32_t)groups, c->stream);
}

/* Matrix j as the checkpoint has it, made canonical here. Parts of one packed matrix follow each
 * other: its bytes come over once. */
static status unpack_stored(cudev *c, int32_t j, qmatrix *q) {
    const weight_source *s = c->whole;
    const int32_t each = s->n_parts / s->shape.count;
    const matrix_part *p = s->part + (int64_t)j * each;
    stored_bytes at = {0};
    q->global_scale = p->packed->global_scale;
    for (int32_t i = 0; i < each; i++) {
        if (i == 0 || p[i].packed != p[i - 1].packed) TRY(upload_stored(c, p[i].packed, &at));
        TRY(unpack_part(c, &p[i], &at, q));
    }
    return ST_OK;
}

/* This rank's part of its codes: cut on the host. */
static status rank_codes(cudev *c, const precision *p, int32_t j, qmatrix *q) {
    const weight_source *w = c->whole;
    qmatrix whole, mine;
    TRY(qmatrix_alloc(&mine, &c->handles, p, q->n, q->k));
    TRY(qmatrix_alloc(&whole, &c->handles, p, w->shape.n, w->shape.k));
    weight_source_qmatrix(w, j, &whole);
    TRY(weight_shard_qmatrix(w->config, w->field, c->base.options.tp, c->rank, &whole, &mine));
    const size_t codes = (size_t)qmatrix_code_bytes(p, q->n, q->k);
    const size_t scales = (size_t)dtype_bytes(q->scale_type, qmatrix_scale_count(p, q->n, q->k));
    const size_t zeros = (size_t)qmatrix_zero_count(p, q->n, q->k);
    TRY(cudev_upload(&c->staging, q->code, mine.code, codes, c->stream));
    TRY(cudev_upload(&c->staging, q->scale, mine.scale, scales, c->stream));
    if (zeros) TRY(cudev_upload(&c->staging, q->zero, mine.zero, zeros, c->stream));
    q->global_scale = mine.global_scale;
    return ST_OK;
}

/* A matrix whose codes the checkpoint has. */
static status stored_matrix(cudev *c, const weight_source *s, const precision *p, int32_t j,
                            cudev_weight *w) {
    qmatrix q;
    TRY(canonical(c, p, s->shape.n, s->shape.k, &q));
    const size_t mark = c->handles.used;
    const status st = c->base.options.tp == 1 ? unpack_stored(c, j, &q) : rank_codes(c, p, j, &q);
    arena_reset(&c->handles, mark);
    TRY(st);
    if (p->weight == WF_NVFP4)
        CUDA_TRY(cudaMemcpyAsync(w->linear.global_scale + j, &q.global_scale, sizeof(float),
                                 cudaMemcpyHostToDevice, c->stream),
                 "weights");
    return linear_pack(&w->linear, j, &q, c->stream);
}

/* --- Weights -------------------------------------------------------------------------------- */

static bool is_linear(const weight_source *s) {
    switch (s->field) {
    case WEIGHT_embed: return s->config && s->config->tied;
    case WEIGHT_norm:
    case WEIGHT_attn_norm:
    case WEIGHT_ffn_norm:
    case WEIGHT_q_norm:
    case WEIGHT_k_norm:
    case WEIGHT_sinks: return false;
    default: return true;
    }
}

static status load_plain(cudev *c, const weight_source *s, cudev_weight *w) {
    const int64_t size = (int64_t)s->shape.n * s->shape.k;
    TRY(cudev_slab_take(&c->weights, (size_t)dtype_bytes(c->type, size * s->shape.count), s->name,
                        &w->plain));
    for (int32_t j = 0; j < s->shape.count; j++)
        TRY(rank_values(c, s, j, 0, s->shape.n,
                        (uint8_t *)w->plain + dtype_bytes(c->type, j * size), c->type));
    return ST_OK;
}

/* A 16-bit matrix is made in scratch and packed; the canonical form is the matrix itself. */
static status pack_16(cudev *c, const weight_source *s, int32_t j, cudev_weight *w) {
    const int32_t n = w->linear.n, k = s->shape.k;
    const size_t bytes = (size_t)dtype_bytes(c->type, (int64_t)n * k);
    TRY(cudev_scratch_grow(&c->packed, bytes, c->stream, "weights"));
    if (n > s->shape.n) /* rows of padding */
        CUDA_TRY(cudaMemsetAsync(c->packed.data, 0, bytes, c->stream), "weights");
    TRY(rank_values(c, s, j, 0, s->shape.n, c->packed.data, c->type));
    const qmatrix q = {
        .format = WF_16, .n = n, .k = k, .group = k, .block_n = 1, .code = c->packed.data};
    return linear_pack(&w->linear, j, &q, c->stream);
}

/* Refuse here, with the reason, what no kernel runs. */
static status has_kernel(const cudev *c, const weight_source *s, const linear_weight *l) {
    const linear_problem p = {.w = l,
                              .m = 1,
                              .ldx = l->k,
                              .ldy = l->n,
                              .y_type = cudev_linear_type(c, s->field),
                              .act = l->act,
                              .sm = c->sm,
                              .n_sms = c->n_sms,
                              .expert_start = l->count > 1 ? &l->count : NULL};
    return linear_choice(&p) ? ST_OK : ST_UNSUPPORTED;
}

static status load_linear(cudev *c, const weight_source *s, const precision *p, cudev_weight *w) {
    const weight_shape *shape = &s->shape;
    const bool quantised = shape->quantise && p->weight != WF_16;
    const bool codes = quantised && weight_source_has_codes(s, p);
    if (codes && s->stored.order)
        return FAIL(ST_UNSUPPORTED, "inputs in an order of their own (GPTQ desc_act): ask for W16");
    if (quantised) TRY(precision_fits_shape(p, shape->n, shape->k));
    linear_weight *l = &w->linear;
    *l = (linear_weight){.format = quantised ? p->weight : WF_16,
                         .type = c->type,
                         .n = s->field == WEIGHT_router ? cudev_linear_rows(shape->n) : shape->n,
                         .k = shape->k,
                         .count = shape->count,
                         .group = quantised ? p->group : 0,
                         .sym = quantised && p->sym,
                         .gated = s->field == WEIGHT_gate_up || s->field == WEIGHT_experts_gate_up,
                         .act = quantised ? p->act : AF_16,
                         .family = linear_family(c->sm, c->family)};
    int64_t code, scale;
    TRY(linear_pack_bytes(l, &code, &scale));
    TRY(has_kernel(c, s, l));
    TRY(cudev_slab_take(&c->weights, (size_t)code, s->name, &l->code));
    if (scale) TRY(cudev_slab_take(&c->weights, (size_t)scale, s->name, &l->scale));
    if (l->format == WF_NVFP4)
        TRY(cudev_slab_take(&c->weights, (size_t)shape->count * sizeof(float), s->name,
                            (void **)&l->global_scale));
    if (shape->has_bias) {
        const size_t bytes = (size_t)dtype_bytes(c->type, (int64_t)shape->count * l->n);
        TRY(cudev_slab_take(&c->weights, bytes, s->name, &l->bias));
        CUDA_TRY(cudaMemsetAsync(l->bias, 0, bytes, c->stream), "bias");
        TRY(load_bias(c, s, l->bias));
    }
    for (int32_t j = 0; j < shape->count; j++)
        TRY(codes       ? stored_matrix(c, s, p, j, w)
            : quantised ? quantise_matrix(c, s, p, j, w)
                        : pack_16(c, s, j, w));
    CHECK(c->n_all < COUNT_OF(c->all));
    c->all[c->n_all++] = w;
    return ST_OK;
}

status cudev_weight_load(device *d, const weight_source *s, const precision *p, weight *out) {
    cudev *c = cudev_self(d);
    CHECK(!c->ready);
    TRY(weight_source_accepts(s, p));
    TRY(begin_loading(c, s, p));
    const int32_t tp = s->config ? c->base.options.tp : 1;
    weight_source mine = *s;
    *out = weight_source_handle(s, p, tp);
    if (tp > 1) mine.shape = weight_shape_shard(s->config, s->field, s->shape, tp);
    c->whole = s;
    s = &mine;
    cudev_weight *w = arena_array(&c->handles, cudev_weight, 1);
    if (!w) return FAIL(ST_NOMEM, "handle of %s", s->name);
    w->field = s->field;
    w->linear.format = WF_COUNT;
    const bool linear = is_linear(s);
    if (linear) TRY(load_linear(c, s, p, w));
    if (!linear || s->field == WEIGHT_embed) TRY(load_plain(c, s, w));
    out->data = w;
    return cudev_mark(&c->staging, AT_PACKED, c->stream);
}
