/* ref_linear_pack.c - the packed order of weights on the host: sizes, packing, and its inverse.
 *
 * Both directions walk the matrix word by word, as the lanes of a kernel do, through the index
 * functions of linear_layout.h, so there is one description of the order and no formula for its
 * inverse. */
#include "linear_layout.h"

#include <string.h>

int32_t linear_family(int32_t sm, int32_t force) {
    if (force) return force;
    return sm >= 90 && sm < 100 ? 90 : 80;
}

status linear_pack_bytes(const linear_weight *w, int64_t *code_bytes, int64_t *scale_bytes) {
    precision p = {.weight = w->format, .group = w->group, .sym = w->sym};
    const bool own_group = w->format == WF_INT4;
    if (w->type != DT_F16 && w->type != DT_BF16)
        return FAIL(ST_UNSUPPORTED, "linear of %s: f16 or bf16", dtype_text(w->type));
    if (w->n <= 0 || w->k <= 0 || w->count <= 0 || w->n % 16 || w->k % 16)
        return FAIL(ST_SHAPE, "linear %d x [%d, %d]: N and K must be multiples of 16", w->count,
                    w->n, w->k);
    if (own_group) TRY(precision_fits_shape(&p, w->n, w->k));
    if (w->format == WF_MXFP4 && w->k % 32)
        return FAIL(ST_SHAPE, "MXFP4 linear: K=%d is no multiple of its group, 32", w->k);
    if (w->gated && w->n % 32)
        return FAIL(ST_SHAPE, "gated linear: N=%d, half of it must be a multiple of 16", w->n);
    if (w->act != AF_16 && w->k > 65536)
        return FAIL(ST_SHAPE, "linear with A%s: K=%d is over 65536", act_format_text(w->act), w->k);
    const linear_layout l = linear_layout_of(w);
    *code_bytes = w->count * l.code_bytes;
    *scale_bytes = w->count * l.scale_bytes;
    return ST_OK;
}

/* --- Codes ------------------------------------------------------------------------------------ */

static uint8_t code_zero(const linear_weight *w) { return w->format == WF_INT4 && w->sym ? 8 : 0; }

static uint16_t code_get(const linear_weight *w, const qmatrix *q, int32_t row, int32_t col) {
    if (row < 0 || col >= w->k) return code_zero(w);
    const int64_t at = (int64_t)row * w->k + col;
    if (w->format == WF_16) return ((const uint16_t *)(const void *)q->code)[at];
    if (linear_layout_of(w).bits == 8) return q->code[at];
    return q->code[at / 2] >> (at % 2 * 4) & 15;
}

static void code_set(const linear_weight *w, qmatrix *q, int32_t row, int32_t col, uint16_t code) {
    if (row < 0 || col >= w->k) return;
    const int64_t at = (int64_t)row * w->k + col;
    if (w->format == WF_16)
        ((uint16_t *)(void *)q->code)[at] = code;
    else if (linear_layout_of(w).bits == 8)
        q->code[at] = (uint8_t)code;
    else
        q->code[at / 2] =
            (uint8_t)((q->code[at / 2] & ~(15 << (at % 2 * 4))) | code << (at % 2 * 4));
}

static void word_pack(const linear_weight *w, uint8_t *at, const uint16_t code[8]) {
    const bool int8 = w->format == WF_INT8;
    const int32_t bits = linear_layout_of(w).bits;
    if (bits == 16) memcpy(at, code, 16);
    if (bits <= 8) {
        uint8_t c[8];
        uint32_t word[2];
        for (int32_t i = 0; i < 8; i++) c[i] = (uint8_t)code[i];
        if (bits == 8)
            linear_pack8(word, c, int8, w->type == DT_BF16);
        else
            word[0] = linear_pack4(c, w->format != WF_INT4, w->type == DT_BF16);
        memcpy(at, word, (size_t)bits);
    }
}

static void word_unpack(const linear_weight *w, uint16_t code[8], const uint8_t *at) {
    const bool int8 = w->format == WF_INT8;
    const int32_t bits = linear_layout_of(w).bits;
    if (bits == 16) memcpy(code, at, 16);
    if (bits <= 8) {
        uint8_t c[8];
        uint32_t word[2];
        memcpy(word, at, (size_t)bits);
        if (bits == 8)
            linear_unpack8(c, word, int8, w->type == DT_BF16);
        else
            linear_unpack4(c, word[0], w->format != WF_INT4, w->type == DT_BF16);
        for (int32_t i = 0; i < 8; i++) code[i] = c[i];
    }
}

/* Call visit for every word of a matrix: its place and the canonical (row, col) of its eight codes.
 */
typedef void word_visit(const linear_weight *w, void *code, qmatrix *q, int64_t at,
                        const int32_t row[8], const int32_t col[8]);

static void each_word(const linear_weight *w, void *code, qmatrix *q, word_visit *visit) {
    const linear_layout l = linear_layout_of(w);
    for (int32_t b = 0; b < l.blocks; b++)
        for (int32_t u = 0; u < l.units; u++)
            for (int32_t strip = 0; strip < 4; strip++)
                for (int32_t j = 0; j < 4; j++)
                    for (int32_t lane = 0; lane < 32; lane++) {
                        int32_t row[8], col[8];
                        for (int32_t i = 0; i < 8; i++) {
                            row[i] =
                                linear_row(&l, b, strip * 16 + linear_word_row(&l, j, lane, i));
                            col[i] = u * 64 + linear_word_col(&l, j, lane, i);
                        }
                        visit(w, code, q, linear_word_at(&l, b, u, strip, j, lane), row, col);
                    }
}

static void pack_word(const linear_weight *w, void *code, qmatrix *q, int64_t at,
                      const int32_t row[8], const int32_t col[8]) {
    uint16_t c[8];
    for (int32_t i = 0; i < 8; i++) c[i] = code_get(w, q, row[i], col[i]);
    word_pack(w, (uint8_t *)code + at, c);
}

static void unpack_word(const linear_weight *w, void *code, qmatrix *q, int64_t at,
                        const int32_t row[8], const int32_t col[8]) {
    uint16_t c[8];
    word_unpack(w, c, (const uint8_t *)code + at);
    for (int32_t i = 0; i < 8; i++) code_set(w, q, row[i], col[i], c[i]);
}

/* --- Scales ----------------------------------------------------------------------------------- */

/* Scale and zero of row r, granule j: copied from or to the canonical arrays. */
static void scale_pack(const linear_weight *w, uint8_t *granule, const qmatrix *q, int32_t place,
                       int32_t row, int32_t j) {
    const linear_layout l = linear_layout_of(w);
    const int32_t group = q->group, groups = (w->k + group - 1) / group;
    const bool pad = row < 0 || j * l.granule >= w->k;
    const int64_t at = pad ? 0 : (int64_t)(row / q->block_n) * groups + j * l.granule / group;
    if (w->format == WF_INT4) {
        const uint16_t one = 0x3c00;
        memcpy(granule + 2 * place, pad ? &one : (const uint16_t *)q->scale + at, 2);
        if (!w->sym) granule[128 + place] = pad ? 0 : q->zero[at];
    } else if (w->format == WF_FP8B) {
        const float one = 1;
        memcpy(granule + place / 16 * 4, pad ? &one : (const float *)q->scale + at, 4);
    } else {
        const uint8_t one = w->format == WF_MXFP4 ? 127 : 0x38;
        const uint8_t s = pad ? one : ((const uint8_t *)q->scale)[at];
        granule[place] = w->format == WF_MXFP4 ? linear_e8m0_pack(s, w->type == DT_BF16) : s;
    }
}

static void scale_unpack(const linear_weight *w, const uint8_t *granule, qmatrix *q, int32_t place,
                         int32_t row, int32_t j) {
    const linear_layout l = linear_layout_of(w);
    const int32_t group = q->group, groups = (w->k + group - 1) / group;
    if (row < 0 || j * l.granule >= w->k) return;
    const int64_t at = (int64_t)(row / q->block_n) * groups + j * l.granule / group;
    if (w->format == WF_INT4) {
        memcpy((uint16_t *)q->scale + at, granule + 2 * place, 2);
        if (!w->sym) q->zero[at] = granule[128 + place];
    } else if (w->format == WF_FP8B) {
        memcpy((float *)q->scale + at, granule + place / 16 * 4, 4);
    } else {
        const uint8_t s = granule[place];
        ((uint8_t *)q->scale)[at] =
            w->format == WF_MXFP4 ? linear_e8m0_unpack(s, w->type == DT_BF16) : s;
    }
}

static void channel_scales(const linear_weight *w, float *packed, float *canonical, bool pack) {
    const linear_layout l = linear_layout_of(w);
    for (int32_t b = 0; b < l.blocks; b++)
        for (int32_t i = 0; i < LINEAR_BLOCK; i++) {
            const int32_t row = linear_row(&l, b, i);
            float *at = packed + b * LINEAR_BLOCK + i;
            if (pack)
                *at = row < 0 ? 0 : canonical[row] * linear_channel_fold(w);
            else if (row >= 0)
                canonical[row] = *at / linear_channel_fold(w);
        }
}

static void each_scale(const linear_weight *w, uint8_t *scale, qmatrix *q, bool pack) {
    const linear_layout l = linear_layout_of(w);
    if (w->format == WF_16) return;
    if (!l.granule) {
        channel_scales(w, (float *)(void *)scale, q->scale, pack);
        return;
    }
    for (int32_t b = 0; b < l.blocks; b++)
        for (int32_t j = 0; j < l.granules; j++)
            for (int32_t i = 0; i < LINEAR_BLOCK; i++) {
                uint8_t *granule = scale + ((int64_t)b * l.granules + j) * l.granule_bytes;
                const int32_t place = linear_scale_place(i), row = linear_row(&l, b, i);
                if (pack)
                    scale_pack(w, granule, q, place, row, j);
                else
                    scale_unpack(w, granule, q, place, row, j);
            }
}

/* Plain order: the canonical arrays, rows of block scales further apart. */
static void each_plain(const linear_weight *w, uint8_t *code, float *scale, qmatrix *q, bool pack) {
    const bool blocks = w->format == WF_FP8B;
    const int32_t rows = blocks ? (w->n + 127) / 128 : 1, stride = linear_plain_stride(w->k);
    const int32_t cols = blocks ? (w->k + 127) / 128 : w->n;
    const size_t codes = (size_t)w->n * (size_t)w->k;
    memcpy(pack ? code : q->code, pack ? q->code : code, codes);
    for (int32_t r = 0; r < rows; r++) {
        float *own = (float *)q->scale + (int64_t)r * cols, *at = scale + (int64_t)r * stride;
        memcpy(pack ? at : own, pack ? own : at, sizeof(float) * (size_t)cols);
        for (int32_t c = cols; pack && blocks && c < stride; c++) at[c] = 0;
    }
}

status ref_linear_pack(const linear_weight *w, void *code, void *scale, const qmatrix *q) {
    int64_t code_bytes, scale_bytes;
    TRY(linear_pack_bytes(w, &code_bytes, &scale_bytes));
    qmatrix source = *q; /* the walk is shared with unpacking; packing only reads */
    if (linear_plain(w)) {
        each_plain(w, code, scale, &source, true);
        return ST_OK;
    }
    each_word(w, code, &source, pack_word);
    each_scale(w, scale, &source, true);
    return ST_OK;
}

status ref_linear_unpack(const linear_weight *w, const void *code, const void *scale, qmatrix *q) {
    int64_t code_bytes, scale_bytes;
    TRY(linear_pack_bytes(w, &code_bytes, &scale_bytes));
    if (linear_plain(w)) {
        each_plain(w, (uint8_t *)(uintptr_t)code, (float *)(uintptr_t)scale, q, false);
        return ST_OK;
    }
    each_word(w, (void *)(uintptr_t)code, q, unpack_word);
    each_scale(w, (uint8_t *)(uintptr_t)scale, q, false);
    return ST_OK;
}
