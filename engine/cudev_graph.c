/* cudev_graph.c - which decode steps are padded to which number of rows, and their graphs.
 *
 * A graph has fixed launches, so decode steps are padded up to one of these numbers: dense where a
 * row more costs most. They are padded whether graphs are on or off, so that both launch the same
 * kernels over the same rows and give the same tokens. Graphs are captured from the second time on
 * that a number comes up (the first run loads the kernels, which cannot be done within a capture).
 * Bounded: two graphs a number, since steps take their tables from two places in turn. What the
 * driver takes for them on the device is no term of capacity.h: it comes out of the share that
 * memory_fraction leaves. */
#include "cudev.h"

#include <cuda_runtime_api.h>

enum { ROWS_MOST = 512 }; /* a step of more rows is long enough to hide its launches */

static int32_t following(int32_t rows) {
    return rows < 8 ? rows * 2 : rows < 64 ? rows + 8 : rows < 128 ? rows + 16 : rows + 32;
}

void cudev_graphs_plan(cudev_graphs *g, int32_t max_rows, bool off) {
    const int32_t most = max_rows < ROWS_MOST ? max_rows : ROWS_MOST;
    g->n = 0;
    g->off = off;
    for (int32_t rows = 1; g->n < CUDEV_GRAPHS_MAX; rows = following(rows)) {
        g->graph[g->n++] = (cudev_graph){.n_rows = rows < most ? rows : most};
        if (rows >= most) return;
    }
    CHECK(!"as many numbers as the table holds");
}

cudev_graph *cudev_graphs_find(cudev_graphs *g, int32_t n_rows) {
    for (int32_t i = 0; i < g->n; i++)
        if (g->graph[i].n_rows >= n_rows) return &g->graph[i];
    return NULL;
}

void cudev_graphs_free(cudev_graphs *g) {
    for (int32_t i = 0; i < g->n; i++)
        for (int32_t j = 0; j < COUNT_OF(g->graph[i].exec); j++)
            if (g->graph[i].exec[j]) (void)cudaGraphExecDestroy(g->graph[i].exec[j]);
    *g = (cudev_graphs){0};
}
