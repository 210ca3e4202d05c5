/* dtype.h - element types and the scalar codecs that define them.
 *
 * Every `x_from_f32` rounds to nearest, ties to even. fp16 and bf16 overflow to infinity and keep
 * NaN (quiet). e4m3 and e2m1 saturate: values past the largest, infinities included, become the
 * largest of their sign, as quantisers want (OCP 8-bit Floating Point Specification 1.0, table 1,
 * saturating mode; OCP Microscaling 1.0, section 5.3); NaN becomes 0x7f in e4m3 and is a programmer
 * error in e2m1, which has none. Exhaustively tested over all bit patterns (tests/test_dtype.c). */
#ifndef AMALGAM_DTYPE_H
#define AMALGAM_DTYPE_H
#include "base.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef enum {
#define X(name, bits, text) DT_##name,
#include "dtype.def"
#undef X
    DT_COUNT
} dtype;

int32_t dtype_bits(dtype t);
const char *dtype_text(dtype t);                  /* "f16", lower case */
status dtype_parse(dtype *out, const char *name); /* safetensors spelling; UNSUPPORTED by name */

/* Bytes of n elements; sub-byte types round up to whole bytes. */
int64_t dtype_bytes(dtype t, int64_t n);

float f32_from_f16(uint16_t bits);
uint16_t f16_from_f32(float x);
float f32_from_bf16(uint16_t bits);
uint16_t bf16_from_f32(float x);
float f32_from_e4m3(uint8_t bits);
uint8_t e4m3_from_f32(float x);
float f32_from_e5m2(uint8_t bits);
float f32_from_e2m1(uint8_t bits); /* low four bits */
uint8_t e2m1_from_f32(float x);
float f32_from_ue8m0(uint8_t bits);

/* out[i] = value of element i * stride of `in` (stride in elements; 1 for sub-byte types, two codes
 * a byte, low nibble first). `in` may have any alignment, as tensors in files do; no overlap.
 * F32 F16 BF16 E4M3 E5M2 I8 U8 F64 I32 E2M1 U4; other types are a programmer error. */
void dtype_to_f32(float *out, const void *in, int64_t n, int64_t stride, dtype t);
/* F32, F16, BF16, E4M3 only. Any alignment of `out`; no overlap. */
void dtype_from_f32(void *out, const float *in, int64_t n, dtype t);

#ifdef __cplusplus
}
#endif
#endif
