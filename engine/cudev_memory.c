/* cudev_memory.c - device memory by lifetime, and the way of a mapped file onto the device. */
#include "cudev.h"

#include <cuda_runtime_api.h>
#include <string.h>
#include <time.h>

enum { ALIGN = 256 };
static const size_t staging_bytes = (size_t)32 << 20, piece_least = (size_t)16 << 20;

status cudev_check(int cuda_error, const char *what) {
    const cudaError_t e = (cudaError_t)cuda_error;
    if (e == cudaSuccess) return ST_OK;
    (void)cudaGetLastError(); /* a refusal must not be found again by the next launch */
    return FAIL(e == cudaErrorMemoryAllocation ? ST_OOM : ST_DEVICE, "%s: %s", what,
                cudaGetErrorString(e));
}

static status add_piece(cudev_slab *s, size_t bytes, const char *what) {
    if (s->n == CUDEV_PIECES_MAX) return FAIL(ST_OOM, "%s: more pieces than planned", what);
    void *p = NULL;
    const status st = cudev_check((int)cudaMalloc(&p, bytes), what);
    if (st != ST_OK) return fail_prefix(st, "%.1f GiB", (double)bytes / (1 << 30));
    s->base[s->n++] = p;
    s->size = bytes;
    s->used = 0;
    return ST_OK;
}

status cudev_slab_reserve(cudev_slab *s, size_t bytes, const char *what) {
    if (s->n && s->size - s->used >= bytes) return ST_OK;
    return add_piece(s, bytes > piece_least ? bytes : piece_least, what);
}

status cudev_slab_take(cudev_slab *s, size_t bytes, const char *what, void **out) {
    bytes = (bytes + ALIGN - 1) / ALIGN * ALIGN;
    TRY(cudev_slab_reserve(s, bytes, what));
    *out = s->base[s->n - 1] + s->used;
    s->used += bytes;
    s->total += bytes;
    return ST_OK;
}

void cudev_slab_free(cudev_slab *s) {
    for (int32_t i = 0; i < s->n; i++) (void)cudaFree(s->base[i]);
    *s = (cudev_slab){0};
}

status cudev_scratch_grow(cudev_scratch *s, size_t bytes, cudaStream_t stream, const char *what) {
    if (bytes <= s->size) return ST_OK;
    CUDA_TRY(cudaStreamSynchronize(stream), what);
    cudev_scratch_free(s);
    CUDA_TRY(cudaMalloc(&s->data, bytes), what);
    s->size = bytes;
    return ST_OK;
}

void cudev_scratch_free(cudev_scratch *s) {
    if (s->data) (void)cudaFree(s->data);
    *s = (cudev_scratch){0};
}

status cudev_staging_open(cudev_staging *s) {
    for (int i = 0; i < CUDEV_STAGES; i++) {
        CUDA_TRY(cudaHostAlloc((void **)&s->buffer[i], staging_bytes, cudaHostAllocDefault),
                 "pinned memory");
        CUDA_TRY(cudaEventCreateWithFlags(&s->done[i], cudaEventDisableTiming), "event");
    }
    return ST_OK;
}

void cudev_staging_close(cudev_staging *s) {
    for (int i = 0; i < CUDEV_STAGES; i++) {
        if (s->buffer[i]) (void)cudaFreeHost(s->buffer[i]);
        if (s->done[i]) (void)cudaEventDestroy(s->done[i]);
    }
    for (int32_t i = 0; i < s->n_marks; i++) (void)cudaEventDestroy(s->mark[i]);
    mem_free(s->mark);
    mem_free(s->what);
    *s = (cudev_staging){.timed = s->timed, .times = s->times};
}

/* One thread copies at 10 GB/s or so, the bus takes several times that; but to wake the others
 * costs 0.1 ms and more where the host is a virtual machine. */
static void copy_in(uint8_t *to, const uint8_t *from, size_t n) {
    enum { PIECE = 1 << 20 };
#pragma omp parallel for schedule(static) if (n > 4 * PIECE)
    for (size_t at = 0; at < n; at += PIECE)
        memcpy(to + at, from + at, n - at < PIECE ? n - at : PIECE);
}

static double seconds(void) {
    struct timespec t;
    (void)clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + (double)t.tv_nsec * 1e-9;
}

status cudev_mark(cudev_staging *s, cudev_instant what, cudaStream_t stream) {
    if (!s->timed || s->n_marks == CUDEV_MARKS_MAX) return ST_OK;
    if (!s->mark) s->mark = mem_alloc(CUDEV_MARKS_MAX, sizeof *s->mark);
    if (!s->what) s->what = mem_alloc(CUDEV_MARKS_MAX, 1);
    if (!s->mark || !s->what) return FAIL(ST_NOMEM, "instants of a load");
    CUDA_TRY(cudaEventCreate(&s->mark[s->n_marks]), "event");
    s->what[s->n_marks] = (uint8_t)what;
    CUDA_TRY(cudaEventRecord(s->mark[s->n_marks++], stream), "event");
    return ST_OK;
}

status cudev_marks_sum(cudev_staging *s) {
    status st = ST_OK;
    for (int32_t i = 1; i < s->n_marks && st == ST_OK; i++) {
        float ms = 0;
        if (s->what[i - 1] == AT_PACKED) continue; /* the host was somewhere else */
        st = cudev_check((int)cudaEventElapsedTime(&ms, s->mark[i - 1], s->mark[i]), "event");
        if (s->what[i - 1] == AT_COPY)
            s->times.copy_s += (double)ms * 1e-3;
        else
            s->times.pack_s += (double)ms * 1e-3;
    }
    for (int32_t i = 0; i < s->n_marks; i++) (void)cudaEventDestroy(s->mark[i]);
    s->n_marks = 0;
    return st;
}

status cudev_upload(cudev_staging *s, void *to, const void *from, size_t bytes,
                    cudaStream_t stream) {
    if (!s->buffer[0]) TRY(cudev_staging_open(s));
    for (size_t at = 0; at < bytes; at += staging_bytes) {
        const size_t n = bytes - at < staging_bytes ? bytes - at : staging_bytes;
        const uint32_t i = s->next++ % CUDEV_STAGES;
        TRY(cudev_mark(s, AT_PACKED, stream)); /* kernels behind the copy before, if any */
        CUDA_TRY(cudaEventSynchronize(s->done[i]), "upload");
        const double began = seconds();
        copy_in(s->buffer[i], (const uint8_t *)from + at, n);
        s->times.host_s += seconds() - began;
        TRY(cudev_mark(s, AT_COPY, stream));
        CUDA_TRY(
            cudaMemcpyAsync((uint8_t *)to + at, s->buffer[i], n, cudaMemcpyHostToDevice, stream),
            "upload");
        TRY(cudev_mark(s, AT_COPIED, stream));
        CUDA_TRY(cudaEventRecord(s->done[i], stream), "upload");
    }
    s->times.bytes += (int64_t)bytes;
    return ST_OK;
}
