/* linear_tuned.c - the choice of linear kernels from times measured offline: rows of
 * linear_tuned.def, never from times of this run, so that a run can be repeated. */
#include "linear_launch.h"

#ifndef LINEAR_TUNED_DEF /* a test has its own */
#define LINEAR_TUNED_DEF "linear_tuned.def"
#endif

enum { NAMES = 4 };

typedef struct {
    const char *gpu;
    int32_t sm, n_sms; /* of a GPU row; its rows follow */
    weight_format format;
    act_format act;
    int32_t granule, size_log2, rows;
    const char *name[NAMES]; /* NULL after the last */
} tuned_row;

static const tuned_row table[] = {
#define GPU(text, cc, sms) {.gpu = (text), .sm = (cc), .n_sms = (sms)},
#define TUNED(f, a, inputs, size, m, ...)                                                          \
    {.format = WF_##f,                                                                             \
     .act = AF_##a,                                                                                \
     .granule = (inputs),                                                                          \
     .size_log2 = (size),                                                                          \
     .rows = (m),                                                                                  \
     .name = {__VA_ARGS__}},
#include LINEAR_TUNED_DEF
    {.gpu = ""} /* end */
};

/* How far a GPU is from the one at hand; the architecture counts before the size. Kernels of a
 * newer one than ours are no use, so those come last. */
static int64_t distance(const tuned_row *gpu, const linear_problem *p) {
    const int32_t sm = gpu->sm - p->sm, sms = gpu->n_sms - p->n_sms;
    return (int64_t)(sm < 0 ? -sm : 4 * sm) * 1000000 + (sms < 0 ? -sms : sms);
}

static const tuned_row *nearest_gpu(const linear_problem *p) {
    const tuned_row *best = NULL;
    for (int32_t i = 0; i < COUNT_OF(table) - 1; i++)
        if (table[i].gpu && (!best || distance(&table[i], p) < distance(best, p))) best = &table[i];
    return best;
}

int32_t linear_size_class(int32_t n, int32_t k) {
    const int64_t size = (int64_t)n * k;
    return size < (int64_t)1 << 25   ? 25
           : size < (int64_t)1 << 26 ? 26
           : size < (int64_t)1 << 27 ? 27
                                     : 40;
}

/* Does a row fit better than the one found so far? Granules alike first, then the fewest rows that
 * are enough, then the most. */
static bool better(const tuned_row *r, const tuned_row *best, int32_t granule, int32_t rows) {
    if (!best) return true;
    if ((r->granule == granule) != (best->granule == granule)) return r->granule == granule;
    if (r->granule != best->granule) return r->granule > best->granule;
    if ((r->rows >= rows) != (best->rows >= rows)) return r->rows >= rows;
    return r->rows >= rows ? r->rows < best->rows : r->rows > best->rows;
}

const char *linear_tuned(const linear_problem *p, int32_t rank) {
    const linear_weight *w = p->w;
    const tuned_row *gpu = nearest_gpu(p), *best = NULL;
    if (!gpu || rank < 0 || rank >= NAMES) return NULL;
    const int32_t rows = p->expert_start ? (p->m + w->count - 1) / w->count : p->m;
    const int32_t size = linear_size_class(w->n, w->k), granule = linear_layout_of(w).granule;
    for (const tuned_row *r = gpu + 1; !r->gpu; r++)
        if (r->format == w->format && r->act == w->act && r->size_log2 == size &&
            better(r, best, granule, rows))
            best = r;
    return best ? best->name[rank] : NULL;
}
