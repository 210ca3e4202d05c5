// linear_short_32.cu - the kernels of linear_short.cu of 32 rows of x, where those are faster than
// linear_mid.cu's; with 8 bits for dense problems only. A file of their own, for of experts they
// have no register to spare: whether ptxas spills depends on what else is compiled with them.
#define SHORT_OF_32
#define SHORT_INSTANCES(X)
#define SHORT_INSTANCES_32(X)                                                                      \
    X(INT4, F16, 32, 128)                                                                          \
    X(INT4, BF16, 32, 128)                                                                         \
    X(MXFP4, F16, 32, 32)                                                                          \
    X(MXFP4, BF16, 32, 32)
#define SHORT_INSTANCES_32_DENSE(X)                                                                \
    X(INT8, F16, 32, 0) X(INT8, BF16, 32, 0) X(FP8, F16, 32, 0) X(FP8, BF16, 32, 0)
#include "linear_short.cu"
