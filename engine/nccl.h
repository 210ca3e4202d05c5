/* nccl.h - sums over several GPUs, by NVIDIA's library when it is found at run time: nothing of it
 * is needed to build or to start. */
#ifndef AMALGAM_NCCL_H
#define AMALGAM_NCCL_H
#include "base.h"
#include "dtype.h"

/* The library's handles; a stream is a cudaStream_t. */
typedef struct ncclComm *nccl_comm;
typedef struct CUstream_st *nccl_stream;

typedef struct {
    void *library;
    int32_t version; /* 22907 = 2.29.7 */
    int (*comm_init_all)(nccl_comm *comm, int n, const int *gpu);
    int (*comm_destroy)(nccl_comm comm);
    int (*comm_abort)(nccl_comm comm);
    int (*all_reduce)(const void *from, void *to, size_t n, int type, int op, nccl_comm comm,
                      nccl_stream stream);
    int (*all_gather)(const void *from, void *to, size_t n, int type, nccl_comm comm,
                      nccl_stream stream);
    int (*group_start)(void);
    int (*group_end)(void);
    int (*version_of)(int *version);
    const char *(*error_text)(int result);
} nccl;

/* NOTFOUND, naming what is missing, when libnccl.so.2 or one of its functions is not there. */
status nccl_load(nccl *n);
void nccl_unload(nccl *n);

/* OK, or DEVICE with the library's words. */
status nccl_check(const nccl *n, int result, const char *what);

/* The library's number of an element type. */
int nccl_type(dtype t);
enum { NCCL_SUM = 0 };
#endif
