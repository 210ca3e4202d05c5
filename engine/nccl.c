/* nccl.c - see nccl.h. The functions and numbers follow NVIDIA's NCCL API reference; the library
 * keeps them stable within its major version, which is the 2 in its name. */
#include "nccl.h"

#include <dlfcn.h>
#include <stdlib.h>
#include <string.h>

/* X(field, name in the library) */
#define CALLS(X)                                                                                   \
    X(comm_init_all, ncclCommInitAll)                                                              \
    X(comm_destroy, ncclCommDestroy)                                                               \
    X(comm_abort, ncclCommAbort)                                                                   \
    X(all_reduce, ncclAllReduce)                                                                   \
    X(all_gather, ncclAllGather)                                                                   \
    X(group_start, ncclGroupStart)                                                                 \
    X(group_end, ncclGroupEnd)                                                                     \
    X(version_of, ncclGetVersion)                                                                  \
    X(error_text, ncclGetErrorString)

int nccl_type(dtype t) {
    switch (t) {
    case DT_F16: return 6;
    case DT_F32: return 7;
    case DT_BF16: return 9;
    default: CHECK(!"a type that is summed"); return 0;
    }
}

status nccl_load(nccl *n) {
    *n = (nccl){0};
    /* One thread launches the graphs of all ranks, and the streams order them: what NCCL does for
     * programs that mix graphs freely could only make ranks wait for each other crosswise. Sums in
     * the switch (NVLink multicast) have no order that is fixed. */
    (void)setenv("NCCL_GRAPH_MIXING_SUPPORT", "0", 0);
    (void)setenv("NCCL_NVLS_ENABLE", "0", 0);
    n->library = dlopen("libnccl.so.2", RTLD_NOW | RTLD_LOCAL);
    if (!n->library) return FAIL(ST_NOTFOUND, "no NCCL: libnccl.so.2 is not on the library path");
    const char *missing = NULL;
    void *symbol;
    /* POSIX has data and function pointers alike; ISO C wants the detour. */
#define X(field, name)                                                                             \
    symbol = dlsym(n->library, #name);                                                             \
    memcpy(&n->field, &symbol, sizeof symbol);                                                     \
    if (!symbol) missing = #name;
    CALLS(X)
#undef X
    int version = 0;
    if (!missing && n->version_of(&version) == 0) {
        n->version = version;
        return ST_OK;
    }
    nccl_unload(n);
    return FAIL(ST_NOTFOUND, "libnccl.so.2 has no %s", missing ? missing : "version");
}

void nccl_unload(nccl *n) {
    if (n->library) (void)dlclose(n->library);
    *n = (nccl){0};
}

status nccl_check(const nccl *n, int result, const char *what) {
    if (result == 0) return ST_OK;
    return FAIL(ST_DEVICE, "NCCL, %s: %s", what, n->error_text(result));
}
