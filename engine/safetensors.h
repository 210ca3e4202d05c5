/* safetensors.h - tensors of a checkpoint folder, mapped and never copied.
 *
 * File: 8-byte little-endian header length, JSON header {name: {dtype, shape, data_offsets}}, data.
 * A folder holds model.safetensors, or model.safetensors.index.json with its shards. Everything a
 * header claims is checked before it is believed: length past the end or over 100 MB, offsets past
 * the end, overlapping, reversed, overflowing, size unequal to shape times dtype, unknown dtype,
 * bytes that belong to no tensor (the reference implementation refuses these files as well), a
 * tensor named twice, an index naming a missing shard or tensor, or a file outside its folder. One
 * line with file and tensor: FORMAT, but UNSUPPORTED for an unknown dtype and for tensors that are
 * not aligned to their element. */
#ifndef AMALGAM_SAFETENSORS_H
#define AMALGAM_SAFETENSORS_H
#include "dtype.h"

enum { TENSOR_DIMS_MAX = 6 };

typedef struct {
    const char *name;
    dtype type;
    int32_t n_dims;
    int64_t dim[TENSOR_DIMS_MAX];
    const void *data; /* into the mapping, aligned to the element */
    int64_t bytes;
} tensor_view;

/* "[2, 3]", cut to n bytes; returns buf. */
const char *tensor_shape_text(char *buf, size_t n, const int64_t *dim, int32_t n_dims);

typedef struct safetensors safetensors;

/* Open one .safetensors file or a folder. NOTFOUND when a folder holds neither of the two. */
status safetensors_open(safetensors **out, const char *path);
void safetensors_close(safetensors *s); /* NULL is fine */

/* NULL when absent. */
const tensor_view *safetensors_find(const safetensors *s, const char *name);
int32_t safetensors_count(const safetensors *s);
const tensor_view *safetensors_at(const safetensors *s, int32_t i); /* sorted by name */
/* Hash of all headers and file sizes, in the order of file names, and of 64 bytes in the middle of
 * each tensor: other weights under the same names are another checkpoint, though not every changed
 * value is seen. */
uint64_t safetensors_digest(const safetensors *s);

/* Write tensors to one file, in the given order (tests, quantiser); `bytes` must be that of shape
 * and type. Larger element types first: a tensor that would end up misaligned is UNSUPPORTED.
 * A file_draft (base.h): the old file stays until the new one is whole. */
status safetensors_write(const char *path, const tensor_view *tensors, int32_t n);
#endif
