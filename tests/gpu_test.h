/* gpu_test.h - what tests on a GPU share: whether there is one, and the golden checkpoints. */
#ifndef AMALGAM_GPU_TEST_H
#define AMALGAM_GPU_TEST_H
#include "test.h"

#include "golden.h"
#include "safetensors.h"

#include <cuda_runtime_api.h>
#include <stdlib.h>
#include <string.h>

/* Without a GPU a test says that it is skipped and ends with *result: a failure where
 * AMALGAM_GPU_MUST is set. */
static inline bool gpu_missing(int *result) {
    int n = 0;
    if (cudaGetDeviceCount(&n) == cudaSuccess && n > 0) return false;
    printf("skipped: no device\n");
    *result = getenv("AMALGAM_GPU_MUST") != NULL;
    return true;
}

enum { GOLDEN_TOKENS = 80 };

typedef struct {
    const char *name;
    char dir[256];
    int32_t n, token[GOLDEN_TOKENS];
} golden;

static inline void golden_open(golden *g, const char *name) {
    char path[512];
    safetensors *file;
    g->name = name;
    path_join(g->dir, sizeof g->dir, GOLDENS, name);
    assert_ok(safetensors_open(&file, path_join(path, sizeof path, g->dir, "golden.safetensors")));
    const tensor_view *ids = safetensors_find(file, "input_ids");
    assert_non_null(ids);
    assert_int_equal(ids->dim[0], GOLDEN_TOKENS);
    g->n = GOLDEN_TOKENS;
    memcpy(g->token, ids->data, sizeof g->token);
    safetensors_close(file);
}
#endif
