/* unpack.h - a quantised matrix as another tool has stored it, to the canonical form (ref_quant.h)
 * or to values, on the device. engine/packed.h says which layouts there are; packed_canonical and
 * packed_row are the definitions, of which these give the same bits. All asynchronous on `stream`.
 */
#ifndef KERNEL_UNPACK_H
#define KERNEL_UNPACK_H
#include "ref_quant.h"

#ifdef __cplusplus
extern "C" {
#endif

/* Fields of words, as packed_field: field(n, k) = bits at slot of word[n / n_per * n_stride + k /
 * k_per * k_stride]. Rows `row`, row + row_step, ... of it become rows 0, 1, ... of the result. */
typedef struct {
    const void *word; /* device, 16-byte aligned */
    int32_t word_bits, bits, n_per, k_per;
    bool awq_order;
    int64_t n_stride, k_stride;
    int32_t row, row_step;
} unpack_fields;

/* out [rows, k], two fields a byte where they have four bits (k even), each xor `flip` where they
 * have eight; 4-byte aligned. SHAPE for k that is no multiple of 8; DEVICE. */
status kernel_unpack_codes(uint8_t *out, const unpack_fields *f, int32_t rows, int32_t k,
                           uint8_t flip, kernel_stream stream);

/* out [rows, groups]: a byte each, (field + add) modulo 2^bits. */
status kernel_unpack_zeros(uint8_t *out, const unpack_fields *f, int32_t rows, int32_t groups,
                           int32_t add, kernel_stream stream);

/* out[i, g] = scale[(row + i * row_step) / block_n * n_stride + g * g_stride], to fp16 (at most
 * 65504) or f32 from F32, F16, BF16; bytes as they are. i < rows; UNSUPPORTED for other types. */
typedef struct {
    const void *scale; /* device */
    dtype type;
    int64_t n_stride, g_stride;
    int32_t block_n, row, row_step;
} unpack_scales;
status kernel_unpack_scales(void *out, dtype out_type, const unpack_scales *s, int32_t rows,
                            int32_t groups, kernel_stream stream);

/* Values, as packed_row has them: out [rows, k] of `type` (F32, F16, BF16) =
 * (code - zero) * scale * global_scale in f32, rounded once. */
typedef struct {
    unpack_fields code, zero; /* zero.word NULL: all are `middle` */
    int32_t zero_add, middle;
    unpack_scales scale;
    const int32_t *group_of; /* [k] device; NULL: input i is in group i / group */
    int32_t group;
    dtype code_type; /* U8 of `bits`, I8, E4M3, E2M1 */
    float global_scale;
} unpack_matrix;
status kernel_unpack_values(void *out, dtype type, const unpack_matrix *m, int32_t rows, int32_t k,
                            kernel_stream stream);

#ifdef __cplusplus
}
#endif
#endif
