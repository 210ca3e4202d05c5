/* kernel.h - what every kernel family shares with its callers: strides, streams, dimension letters.
 *
 * T tokens in the batch, S sequences, H query heads, G KV heads, D head dim, E model dim, F FFN
 * dim, V vocabulary, L layers, P tokens per page, N/K output and input features of a linear, X
 * experts. Valid as C and as C++: .cu files include it. */
#ifndef AMALGAM_KERNEL_H
#define AMALGAM_KERNEL_H
#include "precision.h"

#ifdef __cplusplus
extern "C" {
#endif

/* A CUDA stream without CUDA's headers: the same pointer as cudaStream_t. NULL is the default one.
 */
typedef struct CUstream_st *kernel_stream;

enum { KV_PAGE_TOKENS = 64 }; /* P: tokens of one KV page, on every device */

#ifdef __cplusplus
}
#endif
#endif
