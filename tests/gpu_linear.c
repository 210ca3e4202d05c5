/* gpu_linear.c - the linear kernels against float64 on a GPU: every variant that a format has,
 * edge shapes, epilogues, grouped problems, activations of 8 bits, NaN; outputs start as NaN, a
 * repetition must give the same bits, and a planted error must be noticed. Not a cmocka test: it
 * runs where there may be nothing but the CUDA runtime.
 *
 *   gpu_linear [check [quick|all [FORMAT]]]   exit status 1 when anything differs
 *   gpu_linear check least [FORMAT [KERNEL]]  few launches, for sanitizers; of one kernel: the
 *                                      problems that it takes
 *   gpu_linear mixture [KERNEL]        experts after their router, many times: does a launch end?
 *   gpu_linear both [LAYERS]           a token's experts in one launch, against two
 *   gpu_linear shapes                  each matrix of the models in workloads/models at TP 1, 2, 4
 *   gpu_linear bench WEIGHTS DTYPE M,M,... [KERNEL] [SHAPES]   one JSON object a line */
#include "linear_layout.h"
#include "linear_probe.h"
#include "model.h"
#include "moe.h"
#include "weights.h"

#include <cuda_runtime_api.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

static int32_t failures, shown, checks;

/* What rounding explains. Over all outputs: they are rounded to u = 2^-11 (f16) or 2^-8 (bf16) of
 * themselves at most, and so is each weight; t16 = 1.2 u and u hold both as root mean squares. The
 * worst column may consist of the largest output there is, 5 root mean squares in 10^6 normal
 * ones, whose rounding is 5 u, and of 5 times the rms of what the weights' rounding adds (u / 2):
 * under 6 t16. A gated output is a product of two such numbers, so twice the error, and its largest
 * are 25 root mean squares. */
static const char *verdict(const linear_weight *w, const linear_trial *t, const linear_outcome *o) {
    const bool gated = t->epilogue == LINEAR_GATED || t->epilogue == LINEAR_GATED_OAI;
    const double t16 = w->type == DT_F16 ? 6e-4 : 4e-3;
    if (!(o->rel_err <= (gated ? 2 : 1) * t16)) return "error";
    if (!(o->worst <= (gated ? 25 : 6) * t16)) return "error of a column";
    if (o->unwritten) return "outputs not written";
    if (o->outside) return "written outside";
    return NULL;
}

static void fail(const linear_weight *w, const linear_trial *t, const char *what, const char *wrong,
                 const linear_outcome *o) {
    failures++;
    if (shown++ > 30) return; /* of a format: enough to read */
    printf(
        "FAIL W%sA%s g%d %s%s n=%d k=%d x%d m=%d epilogue %d %s: %s (%s, rel_err %.3g, worst %.3g, "
        "unwritten %lld, outside %lld)\n",
        weight_format_text(w->format), act_format_text(w->act), w->group, dtype_text(w->type),
        w->sym ? " sym" : "", w->n, w->k, w->count, t->m, (int)t->epilogue, what, wrong, o->kernel,
        o->rel_err, o->worst, (long long)o->unwritten, (long long)o->outside);
}

static void one(linear_probe *p, const linear_weight *w, linear_trial t, const char *what) {
    linear_outcome o = {.us = 0}, again = {.us = 0};
    status st = linear_probe_check(p, &t, 20000, &o);
    if (st == ST_UNSUPPORTED && t.kernel) return; /* not an instance for this format */
    checks++;
    const char *wrong = st == ST_OK ? verdict(w, &t, &o) : fail_message();
    if (wrong) {
        fail(w, &t, what, wrong, &o);
        return;
    }
    t.ahead = true;
    st = linear_probe_check(p, &t, 64, &again);
    if (st != ST_OK || again.hash != o.hash) fail(w, &t, what, "not the same bits again", &o);
    t.sabotage = 1; /* the twin: the comparison itself must fail */
    st = linear_probe_check(p, &t, 20000, &again);
    if (st != ST_OK || !verdict(w, &t, &again))
        fail(w, &t, what, "a planted error went unnoticed", &again);
    /* 8 bits of activation are an error of at least 0.4 %: more than fp16 may have. */
    if (w->act == AF_16 || w->type != DT_F16) return;
    t.sabotage = 2;
    st = linear_probe_check(p, &t, 20000, &again);
    if (st != ST_OK || !verdict(w, &t, &again)) fail(w, &t, what, "x was not quantised", &again);
}

static const struct {
    const char *name;
    weight_format format;
    int32_t group;
    bool sym;
    act_format act;
} formats[] = {
    {"16", WF_16, 0, false, AF_16},
    {"8", WF_INT8, 0, false, AF_16},
    {"4", WF_INT4, 128, false, AF_16},
    {"4g64", WF_INT4, 64, false, AF_16},
    {"4g32", WF_INT4, 32, false, AF_16},
    {"4sym", WF_INT4, 128, true, AF_16},
    {"4g32sym", WF_INT4, 32, true, AF_16},
    {"4g16", WF_INT4, 16, false, AF_16},
    {"FP8", WF_FP8, 0, false, AF_16},
    {"FP8b", WF_FP8B, 128, false, AF_16},
    {"MXFP4", WF_MXFP4, 32, false, AF_16},
    {"NVFP4", WF_NVFP4, 16, false, AF_16},
    {"8a8", WF_INT8, 0, false, AF_INT8},
    {"4a8", WF_INT4, 128, false, AF_INT8},
    {"4a8g64sym", WF_INT4, 64, true, AF_INT8},
    {"4a8g32", WF_INT4, 32, false, AF_INT8},
    {"FP8aFP8", WF_FP8, 0, false, AF_FP8},
    {"FP8baFP8", WF_FP8B, 128, false, AF_FP8},
};
enum { N_FORMATS = sizeof formats / sizeof formats[0] };

static int32_t packed_for; /* family of the weights; 0: the GPU's */

static linear_weight weight_of(int32_t f, dtype type, int32_t n, int32_t k, int32_t count) {
    return (linear_weight){.format = formats[f].format,
                           .group = formats[f].group,
                           .sym = formats[f].sym,
                           .act = formats[f].act,
                           .type = type,
                           .n = n,
                           .k = k,
                           .count = count,
                           .family = packed_for};
}

/* A packed weight of noise, or NULL, counted as a failure. */
static linear_probe *opened(const linear_weight *w, uint64_t seed) {
    linear_probe *p;
    if (linear_probe_open(&p, w, false, seed) == ST_OK) return p;
    printf("FAIL open: %s\n", fail_message());
    failures++;
    return NULL;
}

/* The table's choice, and what it may not come to. */
static const char *const kernels[] = {NULL,
                                      "mid_32x4",
                                      "mid_32x2x2",
                                      "ampere_16x2",
                                      "ampere_128x1",
                                      "ampere_strips_32",
                                      "short_8",
                                      "words_32",
                                      "mid_64x2x2",
                                      "experts_16",
                                      "ampere_units_64x192",
                                      "ampere_split_16x2",
                                      "short_16",
                                      "mid_64x2",
                                      "tall_128",
                                      "hopper_8x2",
                                      "ampere_strips_8",
                                      "ampere_strips_16",
                                      "short_32",
                                      "mid_64x4",
                                      "experts_8",
                                      "experts_strips",
                                      "strips",
                                      "ampere_64x2",
                                      "ampere_128x2",
                                      "mid_32x2",
                                      "wide_256",
                                      "words_64",
                                      "experts_32",
                                      "hopper_16x2",
                                      "ampere_units_64x128",
                                      "experts_128",
                                      "mid_64x3",
                                      "words_tall",
                                      "experts_words",
                                      "experts_codes",
                                      "w4a8_32x2",
                                      "w4a8_32x4",
                                      "w4a8_32x2x2",
                                      "w4a8_64x2",
                                      "w4a8_64x3",
                                      "w4a8_64x4",
                                      "w4a8_64x2x2"};
enum { N_KERNELS = sizeof kernels / sizeof kernels[0] };

static void variants(int32_t f, dtype type, bool quick) {
    static const int32_t ms[] = {1,  2,  3,  7,  8,   9,   15,  16,  17, 31,
                                 33, 63, 64, 65, 100, 127, 128, 129, 333};
    static const int32_t shapes[][2] = {{272, 384}, {1168, 640}, {64, 2944}};
    for (int32_t s = quick ? 1 : 0; s < 3; s++) {
        const int32_t group = formats[f].group ? formats[f].group : 16;
        int32_t k = shapes[s][1] + (group <= 16 ? 16 : group <= 64 ? 64 : 0);
        if (formats[f].format == WF_FP8B) k = shapes[s][1] + 16;
        const linear_weight w = weight_of(f, type, shapes[s][0], k, 1);
        linear_probe *p = opened(&w, 1 + (uint64_t)s);
        if (!p) return;
        for (int32_t family = 80; family <= 90; family += 10)
            for (const char *const *v = linear_variants(family); *v; v++)
                for (int32_t i = quick ? 5 : 0; i < (int32_t)COUNT_OF(ms); i += quick ? 6 : 1)
                    one(p, &w,
                        (linear_trial){.m = ms[i], .y_type = type, .kernel = *v, .bias = i % 2},
                        *v);
        for (int32_t m = 1; m <= 1000; m = m * 3 + 1) /* other epilogues */
            for (int32_t e = 0; e < 2 * N_KERNELS; e++)
                one(p, &w,
                    (linear_trial){.m = m,
                                   .y_type = e % 2 ? type : DT_F32,
                                   .epilogue = e % 2 ? LINEAR_RESIDUAL : LINEAR_STORE,
                                   .kernel = kernels[e / 2]},
                    "");
        linear_probe_close(p);
    }
}

static void gated_and_grouped(int32_t f, dtype type) {
    for (int32_t gated = 0; gated < 2; gated++)
        for (int32_t count = 1; count <= 9; count += 8) {
            /* K: so much that few tiles are shared by many CTAs */
            linear_weight w = weight_of(f, type, gated ? 544 : 576, count > 1 ? 512 : 2560, count);
            w.gated = gated;
            linear_probe *p = opened(&w, 77);
            if (!p) return;
            for (int32_t m = 1; m <= 700; m = m * 4 + 1)
                for (int32_t gather = 0; gather < 2; gather++)
                    for (int32_t e = 0; e < 3 * N_KERNELS; e++) {
                        static const linear_epilogue kinds[] = {LINEAR_STORE, LINEAR_GATED,
                                                                LINEAR_GATED_OAI};
                        if (!gated && e % 3) continue;
                        one(p, &w,
                            (linear_trial){.m = m,
                                           .y_type = type,
                                           .epilogue = kinds[e % 3],
                                           .kernel = kernels[e / 3],
                                           .bias = (e % 3 + gather) % 2 == 0,
                                           .gather = gather,
                                           .experts_used = m < 100 ? 3 : 0},
                            count > 1 ? "grouped" : "gated");
                    }
            linear_probe_close(p);
        }
}

/* Experts with so many rows that linear_experts and linear_experts_words have tiles of each number
 * of eights, and two or three tiles of the rows of one. Of codes, so much of K that sums begin
 * anew. */
static void many_rows(int32_t f, dtype type) {
    const bool words = formats[f].format == WF_16;
    const bool codes = formats[f].group == 128 && formats[f].act == AF_INT8;
    const char *kernel = words ? "experts_words" : codes ? "experts_codes" : "experts_128";
    for (int32_t gated = 0; gated < 2; gated++) {
        /* the last unit is not whole but where groups are of 128 */
        const int32_t k = words ? 656 : codes ? 2304 : formats[f].group == 32 ? 672 : 640;
        linear_weight w = weight_of(f, type, gated ? 544 : 592, k, 6);
        w.gated = gated;
        linear_probe *p = opened(&w, 79);
        if (!p) return;
        /* 150, 225, 337, 505, 757, 1135, and up to 1000 rows an expert of the latter */
        for (int32_t m = 150; m <= (words ? 4000 : 1200); m += m / 2)
            for (int32_t few = 0; few < 2; few++)
                one(p, &w,
                    (linear_trial){.m = m,
                                   .y_type = type,
                                   .epilogue = gated ? LINEAR_GATED : LINEAR_STORE,
                                   .kernel = kernel,
                                   .bias = true,
                                   .gather = few == gated,
                                   .experts_used = few ? 3 : 0},
                    "many rows");
        linear_probe_close(p);
    }
}

/* So many tiles that linear_codes_tall has those of 192 rows of W or of 256, of an even number of
 * tiles of x, of which two share W, and of an odd one, of which two share x. */
static void tall_codes(int32_t f, dtype type) {
    static const linear_epilogue plain[] = {LINEAR_STORE, LINEAR_RESIDUAL},
                                 pairs[] = {LINEAR_GATED, LINEAR_GATED_OAI};
    static const int32_t ms[] = {700, 850, 1000, 1100}; /* 192 256 256 192 */
    const bool int8 = formats[f].format == WF_INT8 && formats[f].act == AF_INT8;
    if (!int8 && (formats[f].format != WF_FP8 || formats[f].act != AF_FP8)) return;
    for (int32_t gated = 0; gated < 2; gated++) {
        linear_weight w = weight_of(f, type, 8224, 400, 1);
        w.gated = gated;
        linear_probe *p = opened(&w, 39);
        if (!p) return;
        for (int32_t s = 0; s < (int32_t)COUNT_OF(ms); s++)
            for (int32_t i = 0; i < 2; i++)
                one(p, &w,
                    (linear_trial){.m = ms[s],
                                   .y_type = type,
                                   .epilogue = (gated ? pairs : plain)[i],
                                   .kernel = "codes_tall",
                                   .bias = (s + i) % 2},
                    "tall codes");
        linear_probe_close(p);
    }
}

/* Tiles whole, of teams, and whole but for the last wave, each of all heights. Of 16 bits two that
 * share W, or x; of W4 by 8-bit x sums of codes that begin anew within a tile, at an odd unit of K,
 * and with halves that end within a block. */
static void tall_teams(int32_t f, dtype type) {
    static const linear_epilogue plain[] = {LINEAR_STORE, LINEAR_RESIDUAL, LINEAR_RESIDUAL},
                                 pairs[] = {LINEAR_GATED, LINEAR_GATED_OAI, LINEAR_STORE};
    static const int32_t shapes[2][4][3] = {
        {{1056, 6160, 500}, {3104, 4112, 700}, {8224, 400, 700}, {8224, 2064, 1200}},
        {{1056, 6144, 500}, {3104, 4096, 700}, {8224, 448, 700}, {8224, 2112, 1200}}};
    const bool words = formats[f].format == WF_16;
    const bool nibbles = formats[f].format == WF_INT4 && formats[f].act == AF_INT8;
    if (!words && (!nibbles || formats[f].group < 64)) return;
    for (int32_t s = 0; s < 8; s++) {
        const int32_t *shape = shapes[nibbles][s / 2], group = words ? 1 : formats[f].group;
        linear_weight w = weight_of(f, type, shape[0], shape[1] / group * group, 1);
        w.gated = s % 2;
        linear_probe *p = opened(&w, words ? 41 : 43);
        if (!p) return;
        for (int32_t m = 70; m <= shape[2]; m += 3 * m / 2 - m % 2) /* 70 175 436 1090 */
            for (int32_t i = 0; i < 3; i++)
                one(p, &w,
                    (linear_trial){.m = m,
                                   .y_type = i == 2 ? DT_F32 : type,
                                   .epilogue = (w.gated ? pairs : plain)[i],
                                   .kernel = words ? "words_tall" : "w4a8_tall",
                                   .bias = i % 2},
                    "tall teams");
        linear_probe_close(p);
    }
}

/* More tiles than clusters, and no multiple of them: linear_short may cut them as one line, and a
 * CTA of linear_mid has a tile and little of the next. The last one has as many as an output head:
 * of 16 bits a line, since a last round would read slower. */
static void lines(int32_t f, dtype type) {
    static const struct {
        int32_t n, k;
        bool gated, head;
    } of[] = {
        {8960, 10240, false, false},
        {17920, 5120, true, false},
        {70464, 2048, false, true},
    };
    for (int32_t i = 0; i < (int32_t)COUNT_OF(of); i++) {
        linear_weight w = weight_of(f, type, of[i].n, of[i].k, 1);
        w.gated = of[i].gated;
        linear_probe *p = opened(&w, 33);
        if (!p) return;
        for (int32_t m = 1; m <= 31; m += 5) /* 1, 6; 11, 16; 21, 26, 31 */
            for (int32_t plain = of[i].head; plain < 2; plain++)
                one(p, &w,
                    (linear_trial){.m = m,
                                   .y_type = of[i].head ? DT_F32 : type,
                                   .epilogue = of[i].gated ? LINEAR_GATED : LINEAR_STORE,
                                   .kernel = m <= 8    ? "short_8"
                                             : m <= 16 ? "short_16"
                                                       : "mid_32x2x2",
                                   .bias = !plain},
                    "line");
        linear_probe_close(p);
    }
}

/* So many tiles that each CTA has one, of few steps: linear_short does not cut K over CTAs. Then so
 * many that with 8 bits two blocks of a tile share x, the last of which has no other. */
static void whole_tiles(int32_t f, dtype type) {
    static const int32_t shapes[][3] = {{4608, 768, 0}, {28736, 2304, 0}, {28672, 2304, 1}};
    for (int32_t s = 0; s < (int32_t)COUNT_OF(shapes); s++) {
        linear_weight w = weight_of(f, type, shapes[s][0], shapes[s][1], 1);
        w.gated = shapes[s][2];
        linear_probe *p = opened(&w, 35);
        if (!p) return;
        for (int32_t m = 17; m <= 32; m += 5) /* 17, 22, 27, 32 */
            one(p, &w,
                (linear_trial){.m = m,
                               .y_type = type,
                               .epilogue = w.gated ? LINEAR_GATED : LINEAR_STORE,
                               .kernel = "short_32"},
                "whole");
        linear_probe_close(p);
    }
}

/* More blocks than CTAs, so that linear_mid's have some whole and of others a part of K, which for
 * some ends with one block and begins with the next. Gated one round, else two. */
static void rounds(int32_t f, dtype type) {
    for (int32_t gated = 0; gated < 2; gated++) {
        linear_weight w = weight_of(f, type, gated ? 28672 : 57344, 1152, 1);
        w.gated = gated;
        linear_probe *p = opened(&w, 37);
        if (!p) return;
        for (int32_t m = 19; m <= 64; m += 15) /* 19; 34, 49, 64 */
            for (int32_t codes = 0; codes < 2; codes++)
                one(p, &w,
                    (linear_trial){.m = m,
                                   .y_type = type,
                                   .epilogue = gated ? LINEAR_GATED : LINEAR_STORE,
                                   .kernel = m <= 32 ? (codes ? "w4a8_32x4" : "mid_32x4")
                                                     : (codes ? "w4a8_64x4" : "mid_64x4"),
                                   .bias = true},
                    "rounds");
        linear_probe_close(p);
    }
}

/* Problems that linear_mid has kernels of their own for, of up to 48 rows others than of more, and
 * the same with a bias: tiles cut into four alike parts, the last lacking blocks; tiles that CTAs
 * share otherwise; rounds of them. */
static void mid_plain(int32_t f, dtype type) {
    static const struct {
        int32_t n, k;
        bool gated;
        const char *few, *many; /* kernels of 19 rows; of the others */
    } of[] = {
        {4032, 2048, false, "mid_32x2x2", "mid_64x2x2"},
        {6080, 1024, false, "mid_32x2", "mid_64x3"},
        {8064, 1024, false, "mid_32x4", "mid_64x4"},
        {4096, 640, false, "mid_32x4", "mid_64x2"},
        {4096, 640, true, "mid_32x2", "mid_64x2"},
        {6144, 896, true, "mid_32x2x2", "mid_64x2x2"},
        {57344, 1152, false, "mid_32x4", "mid_64x4"},
        {28672, 1152, true, "mid_32x4", "mid_64x4"},
    };
    static const int32_t ms[] = {19, 41, 48, 49, 64};
    if (formats[f].format != WF_INT4 || formats[f].group != 128 || formats[f].act != AF_16) return;
    for (int32_t i = 0; i < (int32_t)COUNT_OF(of); i++) {
        linear_weight w = weight_of(f, type, of[i].n, of[i].k, 1);
        w.gated = of[i].gated;
        linear_probe *p = opened(&w, 45);
        if (!p) return;
        for (int32_t j = 0; j < (int32_t)COUNT_OF(ms); j++)
            for (int32_t bias = 0; bias < 2; bias++)
                one(p, &w,
                    (linear_trial){.m = ms[j],
                                   .y_type = type,
                                   .epilogue = w.gated ? LINEAR_GATED : LINEAR_STORE,
                                   .kernel = ms[j] <= 32 ? of[i].few : of[i].many,
                                   .bias = bias},
                    "mid plain");
        linear_probe_close(p);
    }
}

/* More of K than linear_mid counts steps of goes to other kernels; the twin, of as much, to it. */
static void longest(int32_t f, dtype type) {
    if (formats[f].format != WF_INT4 || formats[f].group != 128 || formats[f].act != AF_16) return;
    for (int32_t twin = 0; twin < 2; twin++) {
        linear_weight w = weight_of(f, type, 512, twin ? 131072 : 131072 + 128, 1);
        w.family = 90;
        const linear_problem p = {
            .w = &w, .m = 64, .ldx = w.k, .ldy = w.n, .y_type = type, .sm = 90, .n_sms = 132};
        const char *name = linear_choice(&p);
        checks++;
        if (name && (strncmp(name, "mid_", 4) == 0) == twin) continue;
        failures++;
        printf("FAIL W%s K=%d: %s\n", formats[f].name, w.k, name ? name : fail_message());
    }
}

/* With 8-bit activations: the bits of the same kernel with 16, given the values of x's codes. */
static void rounded_before(const linear_weight *w, linear_probe *p, linear_trial t) {
    linear_weight w16 = *w;
    linear_outcome o = {.us = 0}, before = {.us = 0};
    if (linear_probe_check(p, &t, 64, &o) == ST_UNSUPPORTED) return;
    w16.act = AF_16;
    linear_probe *p16 = opened(&w16, 43);
    if (!p16) return;
    for (int32_t twin = 0; twin < 2; twin++) {
        t.rounded = twin ? AF_16 : w->act;
        checks++;
        if (linear_probe_check(p16, &t, 64, &before) != ST_OK || (before.hash == o.hash) == twin)
            fail(w, &t, "row", twin ? "x was not rounded" : "not the bits of values", &o);
    }
    linear_probe_close(p16);
}

/* A row of x by strips: two that a CTA takes in turn, a CTA each, more of K than is under way at
 * once; of halves, as gate and up are packed. */
static void one_row(int32_t f, dtype type) {
    static const int32_t shapes[][2] = {{4096, 640}, {5136, 1152}, {2128, 9344}, {2112, 384}};
    for (int32_t s = 0; s < (int32_t)COUNT_OF(shapes); s++) {
        linear_weight w = weight_of(f, type, shapes[s][0], shapes[s][1], 1);
        w.gated = s == 3;
        linear_probe *p = opened(&w, 43);
        if (!p) return;
        for (int32_t i = 0; i < 4; i++)
            one(p, &w,
                (linear_trial){.m = 1,
                               .y_type = i > 1 ? DT_F32 : type,
                               .epilogue = i % 2 ? LINEAR_RESIDUAL : LINEAR_STORE,
                               .kernel = "strips",
                               .bias = i % 2},
                "row");
        if (w.act != AF_16)
            rounded_before(&w, p, (linear_trial){.m = 1, .y_type = type, .kernel = "strips"});
        linear_probe_close(p);
    }
}

static void *zeros(int64_t bytes) {
    void *at = NULL;
    if (cudaMalloc(&at, (size_t)bytes) != cudaSuccess ||
        cudaMemset(at, 0, (size_t)bytes) != cudaSuccess)
        CHECK(!"device memory");
    return at;
}

static bool zero_weight(linear_weight *w, int32_t f, int32_t n, int32_t k, int32_t count) {
    int64_t code_bytes, scale_bytes;
    *w = weight_of(f, DT_BF16, n, k, count);
    w->family = linear_family(linear_probe_sm(), packed_for);
    if (linear_pack_bytes(w, &code_bytes, &scale_bytes) != ST_OK) return false;
    w->code = zeros(code_bytes);
    w->scale = zeros(scale_bytes);
    return true;
}

/* A row of x with one NaN through every kernel and gate: its outputs are NaN, which a limit must
 * not hide, and those of the other rows (the twin) the zeros that zero weights make. */
static void not_a_number(int32_t f) {
    enum { N = 1024, K = 512, M = 300 };
    static const int32_t ms[] = {2, 16, 32, 64, 128, M};
    static uint16_t x[M * K], y[M * N / 2];
    linear_weight w;
    if (!zero_weight(&w, f, N, K, 1)) {
        printf("FAIL W%s: %s\n", formats[f].name, fail_message());
        failures++;
        return;
    }
    linear_problem p = {.w = &w, .x = zeros(sizeof x), .y = zeros(sizeof y), .y_type = DT_BF16};
    p.ldx = K, p.ldy = N / 2, p.limit = 0.5f, p.sm = linear_probe_sm();
    cudaDeviceGetAttribute(&p.n_sms, cudaDevAttrMultiProcessorCount, 0);
    p.workspace = zeros(linear_workspace_bytes(&w, M, p.n_sms));
    for (int32_t family = 80; family <= 90; family += 10)
        for (const char *const *v = linear_variants(family); *v; v++)
            for (int32_t i = 0; i < 2 * (int32_t)COUNT_OF(ms); i++) {
                p.kernel = *v, p.m = ms[i / 2];
                p.epilogue = i % 2 ? LINEAR_GATED_OAI : LINEAR_GATED;
                memset(x, 0, sizeof x);
                x[(p.m - 1) * K + 5] = 0x7fc0;
                cudaMemcpy((void *)(uintptr_t)p.x, x, sizeof x, cudaMemcpyHostToDevice);
                cudaMemset(p.y, 0x3f, sizeof y);
                const status st = kernel_linear(&p, NULL);
                if (st == ST_UNSUPPORTED) continue;
                cudaMemcpy(y, p.y, sizeof y, cudaMemcpyDeviceToHost);
                int32_t wrong = st != ST_OK;
                for (int32_t j = 0; j < p.m * N / 2; j++)
                    wrong += ((y[j] & 0x7fff) > 0x7f80) != (j / (N / 2) == p.m - 1);
                checks++, failures += wrong > 0;
                if (wrong)
                    printf("FAIL W%s %s m=%d epilogue %d: NaN where none is, or lost, %d times\n",
                           formats[f].name, *v, p.m, (int)p.epilogue, wrong);
            }
    cudaFree(w.code), cudaFree(w.scale), cudaFree((void *)(uintptr_t)p.x);
    cudaFree(p.y), cudaFree(p.workspace);
}

static void check_format(int32_t f, dtype type, bool quick) {
    variants(f, type, quick);
    gated_and_grouped(f, type);
    many_rows(f, type);
    tall_codes(f, type);
    tall_teams(f, type);
    lines(f, type);
    whole_tiles(f, type);
    rounds(f, type);
    mid_plain(f, type);
    longest(f, type);
    one_row(f, type);
    if (type == DT_BF16 && formats[f].act == AF_16) not_a_number(f);
}

/* Weights of 16 bits in the order of either family, of others one order serves both. */
static int check(bool quick, const char *only) {
    for (int32_t f = 0; f < N_FORMATS; f++)
        for (int32_t b = 0; b < 2; b++) {
            if (only && !strstr(formats[f].name, only)) continue;
            const int32_t before = failures;
            shown = 0;
            check_format(f, b ? DT_BF16 : DT_F16, quick);
            packed_for = formats[f].format == WF_16 ? 80 : 0;
            if (packed_for) check_format(f, b ? DT_BF16 : DT_F16, quick);
            packed_for = 0;
            printf("W%s %s: %d failures\n", formats[f].name, b ? "bf16" : "f16", failures - before);
            fflush(stdout);
        }
    printf("%d checks, %d failures\n", checks, failures);
    return failures > 0;
}

/* Every kernel that the table chooses, each way that it shares tiles, a few launches: what memory
 * checkers can run through in seconds. */
static int least(const char *only, const char *kernel) {
    static const struct {
        int32_t n, k, experts; /* experts: gated */
        int32_t n_ms;
    } shapes[] = {{544, 2560, 1, 6},
                  {544, 640, 3, 6},
                  {544, 512, 3, 6},    /* whole steps: plain */
                  {33280, 256, 1, 3}}; /* many tiles: alone */
    static const int32_t ms[] = {1, 5, 14, 40, 70, 300};
    for (int32_t f = 0; f < N_FORMATS; f++)
        for (int32_t s = 0; s < (int32_t)COUNT_OF(shapes); s++) {
            if (only && strcmp(formats[f].name, only) != 0) continue;
            const dtype type = (f + s) % 2 ? DT_BF16 : DT_F16;
            const bool grouped = shapes[s].experts > 1;
            linear_weight w = weight_of(f, type, shapes[s].n, shapes[s].k, shapes[s].experts);
            w.gated = grouped;
            linear_probe *p;
            if (linear_probe_open(&p, &w, false, 5) != ST_OK) return 1;
            for (int32_t i = 0; i < shapes[s].n_ms; i++) {
                const linear_trial t = {.m = ms[i],
                                        .y_type = type,
                                        .epilogue = grouped ? LINEAR_GATED : LINEAR_STORE,
                                        .bias = i % 3 == 0,
                                        .gather = grouped,
                                        .kernel = kernel};
                linear_outcome o = {.us = 0};
                const status st = linear_probe_check(p, &t, 256, &o);
                if (st == ST_UNSUPPORTED && kernel) continue;
                checks++;
                const char *wrong = st == ST_OK ? verdict(&w, &t, &o) : fail_message();
                if (wrong) fail(&w, &t, "least", wrong, &o);
            }
            linear_probe_close(p);
        }
    printf("%d checks, %d failures\n", checks, failures);
    return failures > 0;
}

static double seconds(void) {
    struct timespec t;
    timespec_get(&t, TIME_UTC);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

/* route, permute and a product of gathered rows, as a step of serving launches them: 224 tokens,
 * some experts with many of them and some with none. What waits for what within a kernel depends on
 * what ran before it, so that a launch alone shows less: one of some thousand stood still for ever
 * (a warp that asked for the first weights waited for their stage to be free, which it was before
 * rows that others gathered had filled it, and was no more when that warp was late). Then two more
 * linears of the same routing, for which nothing is waited. */
static int mixture(const char *kernel) {
    enum { T = 224, X = 128, TOP = 8, N = 3072, K = 4096, DOWN_N = 2048, DOWN_K = 768 };
    enum { BATCHES = 400, LAYERS = 16 };
    static float logits[T * X];
    linear_weight w, down;
    int32_t f = kernel && strstr(kernel, "words") ? 0 : 2; /* 16 bits, or W4 */
    while (kernel && strstr(kernel, "codes") && strcmp(formats[f].name, "4a8") != 0) f++;
    if (!zero_weight(&w, f, N, K, X) || !zero_weight(&down, f, DOWN_N, DOWN_K, X)) return 1;
    int sms = 0;
    cudaDeviceGetAttribute(&sms, cudaDevAttrMultiProcessorCount, 0);
    float *from = zeros(sizeof logits), *share = zeros(T * TOP * 4);
    int32_t *expert = zeros(T * TOP * 4), *start = zeros((X + 1) * 4);
    int32_t *slot = zeros(T * TOP * 4), *row = zeros(T * TOP * 4);
    const linear_problem p = {.w = &w,
                              .m = T * TOP,
                              .x = zeros(T * K * 2),
                              .y = zeros((int64_t)T * TOP * N * 2),
                              .ldx = K,
                              .ldy = N,
                              .y_type = DT_BF16,
                              .act = w.act,
                              .expert_start = start,
                              .x_row = row,
                              .x_rows = T,
                              .kernel = kernel,
                              .workspace = zeros(linear_workspace_bytes(&w, T * TOP, sms)),
                              .sm = linear_probe_sm(),
                              .n_sms = sms,
                              .apart = true};
    linear_problem q = p; /* behind a linear of the same routing, which is not waited for */
    q.w = &down;
    q.x = p.y;
    q.y = zeros((int64_t)T * TOP * DOWN_N * 2);
    q.ldx = DOWN_K;
    q.ldy = DOWN_N;
    q.x_row = NULL;
    q.x_rows = T * TOP;
    q.routed = true;
    uint32_t random = 1;
    status st = ST_OK;
    for (int32_t b = 0; b < BATCHES && st == ST_OK; b++) {
        int32_t liking[X]; /* an expert's, beside a token's */
        for (int32_t i = 0; i < X + T * X; i++) {
            random = random * 1664525u + 1013904223u;
            if (i < X)
                liking[i] = (int32_t)(random >> 24) * (b % 4);
            else
                logits[i - X] = (float)liking[i % X] + (float)(random >> 23);
        }
        cudaMemcpyAsync(from, logits, sizeof logits, cudaMemcpyHostToDevice, NULL);
        for (int32_t i = 0; i < LAYERS && st == ST_OK; i++) {
            st = kernel_moe_route(expert, share, from, T, X, TOP, false, true, X, DT_F32, NULL);
            if (st == ST_OK) st = kernel_moe_permute(start, slot, row, expert, T, X, TOP, NULL);
            if (st == ST_OK) st = kernel_linear(&p, NULL);
            for (int32_t k = 0; k < 2 && st == ST_OK; k++) st = kernel_linear(&q, NULL);
        }
        const double since = seconds();
        while (cudaStreamQuery(NULL) == cudaErrorNotReady)
            if (seconds() - since > 2) {
                printf("FAIL mixture: a launch of batch %d does not end\n", b);
                fflush(stdout);
                _Exit(1);
            }
    }
    const bool good = st == ST_OK && cudaGetLastError() == cudaSuccess;
    printf("mixture: %d launches, %s\n", 3 * BATCHES * LAYERS, good ? "all end" : fail_message());
    return good ? 0 : 1;
}

/* --- Gate, up and down in one launch ---------------------------------------------------------- */

/* A layer of a mixture again and again, of a token or two whose streams grow by each. */
typedef struct {
    moe_enter in;
    linear_problem up, down;
    void *gain;
    uint16_t *words[2]; /* of even and odd layers: x, h, y */
    bool joined;
} few_layers;

static void *repeated(const void *from, int64_t some, int64_t bytes) {
    uint8_t *at = zeros(bytes);
    for (int64_t i = 0; i < bytes; i += some)
        cudaMemcpy(at + i, from, (size_t)(some < bytes - i ? some : bytes - i),
                   cudaMemcpyHostToDevice);
    return at;
}

/* 16-bit numbers of either sign, 2^e to 2^(e + 1) and zero. */
static void *numbers(dtype type, int32_t e, int64_t n, uint32_t seed) {
    enum { SOME = 1 << 20 };
    static uint16_t some[SOME];
    const uint32_t exponent = type == DT_BF16 ? (uint32_t)(127 + e) << 7 : (uint32_t)(15 + e) << 10;
    const uint32_t fraction = type == DT_BF16 ? 0x7f : 0x3ff;
    for (int32_t i = 0; i < SOME; i++) {
        seed = seed * 1664525u + 1013904223u;
        some[i] = (uint16_t)((seed >> 16 & 0x8000) | exponent | (seed >> 8 & fraction));
    }
    return repeated(some, sizeof some, n * 2);
}

/* Of packed bytes any are a weight; of scales 64 halves of 2^-7 and codes of zeros. */
static linear_weight random_experts(dtype type, int32_t n, int32_t k, int32_t count, bool gated) {
    enum { SOME = 192 * 4096 };
    static uint8_t some[SOME];
    int64_t code_bytes, scale_bytes;
    linear_weight w = weight_of(2, type, n, k, count);
    CHECK(w.format == WF_INT4 && w.group == 128);
    w.family = 90;
    w.gated = gated;
    CHECK(linear_pack_bytes(&w, &code_bytes, &scale_bytes) == ST_OK);
    uint32_t seed = 7;
    for (int32_t i = 0; i < SOME; i++) {
        seed = seed * 1664525u + 1013904223u;
        some[i] = (uint8_t)(seed >> 24);
    }
    w.code = repeated(some, SOME - 64, code_bytes);
    for (int32_t i = 0; i < SOME; i++)
        some[i] = i % 192 >= 128 ? some[i] & 15 : i % 2 ? 0x20 : some[i];
    w.scale = repeated(some, SOME, scale_bytes);
    return w;
}

static few_layers few_of(const few_layers *same, dtype type, int32_t t, bool joined) {
    enum { X = 128, TOP = 8 };
    const int32_t dim = t > 1 ? 1024 : 2048, ffn = t > 1 ? 384 : 768;
    static linear_weight router, up, down; /* of the first */
    int32_t sms = 0;
    cudaDeviceGetAttribute(&sms, cudaDevAttrMultiProcessorCount, 0);
    const int32_t m = t * TOP;
    if (!same) {
        int64_t code_bytes, scale_bytes;
        router = weight_of(0, type, X, dim, 1);
        router.family = 90;
        CHECK(router.format == WF_16 &&
              linear_pack_bytes(&router, &code_bytes, &scale_bytes) == ST_OK);
        router.code = numbers(type, -5, code_bytes / 2, 3);
        up = random_experts(type, 2 * ffn, dim, X, true);
        down = random_experts(type, dim, ffn, X, false);
    }
    few_layers l = {.gain = same ? same->gain : numbers(type, 0, dim, 5), .joined = joined};
    l.in = (moe_enter){.x = zeros(t * dim * 2),
                       .residual = zeros(t * dim * 2),
                       .add = same ? same->in.add : numbers(type, -1, t * dim, 9),
                       .gain = l.gain,
                       .router = &router,
                       .logits = zeros(t * X * 4),
                       .weight = zeros(m * 4),
                       .expert_start = zeros((X + 1) * 4),
                       .slot_row = zeros(m * 4),
                       .row_token = zeros(m * 4),
                       .expert = zeros(m * 4),
                       .t = t,
                       .stride = X,
                       .dim = dim,
                       .n_experts = X,
                       .top_k = TOP,
                       .normalise = true,
                       .eps = 1e-5f,
                       .type = type,
                       .told = zeros(m * LINEAR_TOLD * 4)};
    for (int32_t i = 0; i < 2; i++) l.words[i] = zeros(t * (dim + TOP * (ffn + dim)) * 2);
    l.up = (linear_problem){.w = &up,
                            .m = m,
                            .x = l.in.x,
                            .ldx = dim,
                            .ldy = ffn,
                            .y_type = type,
                            .epilogue = LINEAR_GATED,
                            .expert_start = l.in.expert_start,
                            .x_row = l.in.row_token,
                            .x_rows = t,
                            .kernel = joined ? NULL : "experts_strips",
                            .workspace = zeros(linear_workspace_bytes(&up, m, sms)),
                            .sm = linear_probe_sm(),
                            .n_sms = sms,
                            .apart = true,
                            .told = l.in.told};
    l.down = l.up;
    l.down.w = &down;
    l.down.ldx = ffn, l.down.ldy = dim;
    l.down.epilogue = LINEAR_STORE;
    l.down.x_row = NULL;
    l.down.x_rows = m;
    l.down.routed = true;
    return l;
}

/* The way in and the two products of layer i, in the words of even or odd ones: [t, dim] x, then
 * [m, ffn] h, then [m, dim] y. As one launch, or as two, which leave values there. */
static status enter_few(const few_layers *l, int32_t i, cudaStream_t stream) {
    const int64_t n_x = l->in.t * l->in.dim, n_h = (int64_t)l->up.m * l->down.w->k;
    moe_enter in = l->in;
    linear_problem up = l->up, down = l->down;
    in.words = l->words[i % 2];
    const linear_words words = {.x = in.words,
                                .used = l->words[(i + 1) % 2],
                                .used_bytes = 2 * (n_x + n_h + l->up.m * l->in.dim)};
    up.y = l->words[i % 2] + n_x;
    down.x = up.y;
    down.y = (uint16_t *)up.y + n_h;
    TRY(kernel_moe_enter(&in, stream));
    if (l->joined) return kernel_linear_both(&up, &down, &words, stream);
    TRY(kernel_linear(&up, stream));
    return kernel_linear(&down, stream);
}

/* So many layers, an even number, behind the residual that is there, which they change. */
static status run_few(const few_layers *l, int32_t layers, cudaStream_t stream) {
    const moe_enter *in = &l->in;
    for (int32_t i = 0; i < layers; i++) {
        TRY(enter_few(l, i, stream));
        TRY(kernel_moe_leave(in->x, in->residual,
                             l->words[i % 2] + in->t * in->dim + l->up.m * l->down.w->k, l->gain,
                             in->weight, in->slot_row, in->told, true, in->t, in->top_k, in->dim,
                             in->eps, in->type, stream));
    }
    return ST_OK;
}

static float number(dtype type, uint16_t bits) {
    float v;
    dtype_to_f32(&v, &bits, 1, 1, type);
    return v;
}

/* One layer by one launch against two: h has the same bits, and y, whose sums are added in another
 * order, is one step off in few places. Twin: what other rows of x make differs everywhere. */
static bool alike(const few_layers *apart, const few_layers *joined, const uint8_t *from) {
    const int64_t n_x = apart->in.t * apart->in.dim, n_h = apart->up.m * apart->down.w->k;
    const int64_t n_y = apart->up.m * apart->down.w->n, n = n_x + n_h + n_y;
    const few_layers *way[2] = {apart, joined};
    uint16_t *got[3];
    for (int32_t i = 0; i < 3; i++) { /* the third: one launch, another row */
        const few_layers *l = way[i > 0];
        got[i] = malloc((size_t)n * 2);
        CHECK(got[i]);
        cudaMemcpy(l->in.residual, from + 2 * n_x * (i == 2), (size_t)n_x * 2,
                   cudaMemcpyDeviceToDevice);
        const bool good = enter_few(l, 0, NULL) == ST_OK;
        CHECK(good);
        cudaMemcpy(got[i], l->words[0], (size_t)n * 2, cudaMemcpyDeviceToHost);
        cudaMemset(l->words[0], 0, (size_t)n * 2);
        cudaMemset(l->in.told, 0, (size_t)l->up.m * LINEAR_TOLD * 4);
    }
    int64_t wrong = 0, off = 0, twin = 0;
    for (int64_t i = n_x; i < n; i++) {
        const uint16_t a = got[0][i], b = got[1][i] ^ 0xffff, c = got[2][i] ^ 0xffff;
        const float va = number(apart->in.type, a), vb = number(apart->in.type, b);
        const float step = apart->in.type == DT_BF16 ? 0x1p-7f : 0x1p-10f;
        /* sums that cancel: f32 rounds terms of some tens, 768 of them */
        if (i < n_x + n_h)
            wrong += a != b;
        else
            wrong += !(fabsf(va - vb) <= step * fabsf(va) + 0x1p-12f);
        off += a != b;
        twin += a != c;
    }
    const bool good = !wrong && off * 100 < n_y && twin * 10 > 9 * (n - n_x);
    printf("%sboth: %lld of %lld values wrong, %lld a step off; twin %lld\n", good ? "" : "FAIL ",
           (long long)wrong, (long long)(n - n_x), (long long)off, (long long)twin);
    for (int32_t i = 0; i < 3; i++) free(got[i]);
    return good;
}

/* Layers of one token, and of two, in one launch each, in graphs of 16, by two that have all their
 * own: the outputs' bits, and those of the stream before, which differ (the twin). A CTA that waits
 * for ever is found by time. */
static int both(int32_t layers) {
    enum { EACH = 16, STREAMS = 64 };
    if (linear_family(linear_probe_sm(), packed_for) != 90) return 0;
    int32_t wrong = 0, same = 0, n = 0;
    for (int32_t i = 0; i < 4; i++) {
        const dtype type = i % 2 ? DT_F16 : DT_BF16;
        const int32_t t = 1 + i / 2;
        const few_layers apart = few_of(NULL, type, t, false);
        const few_layers way[2] = {few_of(&apart, type, t, true), few_of(&apart, type, t, true)};
        if (!kernel_linear_both_accepts(&way[0].up, &way[0].down)) {
            printf("both: not on this GPU\n");
            return 0;
        }
        const size_t bytes = (size_t)(t * apart.in.dim) * 2;
        uint8_t *from = numbers(type, 0, STREAMS * t * apart.in.dim, 21);
        static uint8_t out[2][4096], last[4096];
        wrong += !alike(&apart, &way[0], from);
        cudaStream_t stream;
        cudaGraph_t graph;
        cudaGraphExec_t exec[2];
        cudaStreamCreate(&stream);
        for (int32_t k = 0; k < 2; k++) {
            cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal);
            if (run_few(&way[k], EACH, stream) != ST_OK) {
                printf("FAIL both: %s\n", fail_message());
                return 1;
            }
            cudaStreamEndCapture(stream, &graph);
            cudaGraphInstantiate(&exec[k], graph, 0);
            cudaGraphDestroy(graph);
        }
        for (int32_t r = 0; r < layers / EACH; r++, n += EACH) {
            for (int32_t k = 0; k < 2; k++) {
                cudaMemcpyAsync(way[k].in.residual, from + bytes * (size_t)(r % STREAMS), bytes,
                                cudaMemcpyDeviceToDevice, stream);
                cudaGraphLaunch(exec[k], stream);
            }
            const double since = seconds();
            while (cudaStreamQuery(stream) == cudaErrorNotReady)
                if (seconds() - since > 60) {
                    printf("FAIL both: layer %d does not end\n", n);
                    fflush(stdout);
                    _Exit(1);
                }
            for (int32_t k = 0; k < 2; k++)
                cudaMemcpy(out[k], way[k].in.residual, bytes, cudaMemcpyDeviceToHost);
            wrong += memcmp(out[0], out[1], bytes) != 0;
            same += memcmp(out[0], last, bytes) == 0;
            memcpy(last, out[0], bytes);
        }
        cudaStreamDestroy(stream);
    }
    const bool good = !wrong && !same && cudaGetLastError() == cudaSuccess;
    printf("%sboth: %d layers, %d wrong, %d like the stream before\n", good ? "" : "FAIL ", n,
           wrong, same);
    return !good;
}

typedef struct {
    int32_t n, k;
} matrix_shape;
enum { SHAPES_MAX = 512 };

static void add_shape(matrix_shape *list, int32_t *n_list, int32_t n, int32_t k) {
    for (int32_t i = 0; i < *n_list; i++)
        if (list[i].n == n && list[i].k == k) return;
    if (*n_list < SHAPES_MAX) list[(*n_list)++] = (matrix_shape){n, k};
}

/* Of each shape one format, type and odd number of rows, all of them in turn. */
static void try_shape(matrix_shape shape, int32_t i) {
    static const int32_t ms[] = {3, 17, 100, 333, 1000};
    const dtype type = i / N_FORMATS % 2 ? DT_BF16 : DT_F16;
    const linear_weight w = weight_of(i % N_FORMATS, type, shape.n, shape.k, 1);
    const linear_trial t = {.m = ms[i % (int32_t)COUNT_OF(ms)], .y_type = type};
    int64_t code_bytes, scale_bytes;
    linear_probe *p;
    if (linear_pack_bytes(&w, &code_bytes, &scale_bytes) != ST_OK) {
        printf("refused: W%s n=%d k=%d: %s\n", formats[i % N_FORMATS].name, w.n, w.k,
               fail_message());
    } else if ((p = opened(&w, (uint64_t)i)) != NULL) {
        one(p, &w, t, "shapes");
        linear_probe_close(p);
    }
}

static int shapes(void) {
    static matrix_shape list[SHAPES_MAX];
    int32_t n_list = 0, n_models;
    const char **names;
    char dir[512];
    arena a;
    if (arena_open(&a, (size_t)16 << 20) != ST_OK || model_names(&a, &names, &n_models) != ST_OK) {
        printf("FAIL %s\n", fail_message());
        return 1;
    }
    for (int32_t i = 0; i < n_models; i++)
        for (int32_t tp = 1; tp <= 4; tp *= 2) {
            model_config config;
            const model_config *c = &config;
            if (model_dir(dir, sizeof dir, names[i]) != ST_OK ||
                model_config_load(&config, dir) != ST_OK) {
                printf("FAIL %s: %s\n", names[i], fail_message());
                return 1;
            }
#define X(field, n, k, count, quantise, shard, bias, present)                                      \
    if ((quantise) && (present))                                                                   \
        add_shape(list, &n_list, (n) / ((shard) == SHARD_ROWS ? tp : 1),                           \
                  (k) / ((shard) == SHARD_COLS ? tp : 1));
#include "layer.def"
#undef X
        }
    for (int32_t i = 0; i < n_list; i++) try_shape(list[i], i);
    printf("%d shapes of %d models, %d checks, %d failures\n", n_list, n_models, checks, failures);
    arena_close(&a);
    return failures > 0;
}

static int bench(const char *weights, const char *type_name, const char *ms, const char *kernel,
                 const char *shape_list) {
    int32_t f = 0;
    while (f < N_FORMATS && strcmp(formats[f].name, weights) != 0) f++;
    if (f == N_FORMATS) return 2;
    const dtype type = strcmp(type_name, "bf16") == 0 ? DT_BF16 : DT_F16;
    int status_out = 0;
    for (const char *s = shape_list; s; s = strchr(s, ',') ? strchr(s, ',') + 1 : NULL) {
        int n, k;
        if (sscanf(s, "%dx%d", &n, &k) != 2) return 2;
        const linear_weight w = weight_of(f, type, n, k, 1);
        linear_probe *p;
        if (linear_probe_open(&p, &w, true, 3) != ST_OK) {
            printf("{\"error\":\"%s\"}\n", fail_message());
            return 1;
        }
        for (const char *at = ms; at; at = strchr(at, ',') ? strchr(at, ',') + 1 : NULL) {
            linear_outcome o = {.us = 0};
            int m = 0;
            if (sscanf(at, "%d", &m) != 1) return 2;
            const linear_trial t = {
                .m = m, .y_type = type, .kernel = strcmp(kernel, "-") ? kernel : NULL};
            status st = linear_probe_check(p, &t, 2048, &o);
            if (st == ST_OK) st = linear_probe_time(p, &t, 7, true, &o);
            if (st != ST_OK) {
                printf("{\"n\":%d,\"k\":%d,\"m\":%d,\"error\":\"%s\"}\n", n, k, t.m,
                       fail_message());
                status_out = 1;
                continue;
            }
            printf(
                "{\"kind\":\"linear\",\"weights\":\"%s\",\"act\":\"%s\",\"dtype\":\"%s\",\"n\":%d,"
                "\"k\":%d,\"m\":%d,\"us\":%.3f,\"cublas_fp16_us\":%.3f,\"speedup\":%.4f,\"gbs\":%."
                "0f,"
                "\"tflops\":%.1f,\"kernel\":\"%s\",\"rel_err\":%.3g}\n",
                weights, act_format_text(formats[f].act), type_name, n, k, t.m, o.us, o.cublas_us,
                o.cublas_us / o.us, (double)o.bytes / o.us * 1e-3, 2.0 * n * k * t.m / o.us * 1e-6,
                o.kernel, o.rel_err);
            fflush(stdout);
        }
        linear_probe_close(p);
    }
    return status_out;
}

int main(int argc, char **argv) {
    setvbuf(stdout, NULL, _IOLBF, 0);
    const char *six = "6144x4096,4096x4096,28672x4096,4096x14336,57344x8192,8192x28672";
    if (argc > 2 && strcmp(argv[2], "least") == 0)
        return least(argc > 3 ? argv[3] : NULL, argc > 4 ? argv[4] : NULL);
    if (argc == 1 || strcmp(argv[1], "check") == 0) {
        const char *only = argc > 3 ? argv[3] : NULL;
        const int wrong = check(argc > 2 && strcmp(argv[2], "quick") == 0, only);
        return only ? wrong : mixture(NULL) | both(4096) | wrong;
    }
    if (strcmp(argv[1], "mixture") == 0) return mixture(argc > 2 ? argv[2] : NULL);
    if (strcmp(argv[1], "both") == 0) {
        int64_t layers = 20000;
        if (argc > 2 && !parse_i64(argv[2], 16, 1 << 30, &layers)) return 2;
        return both((int32_t)layers);
    }
    if (strcmp(argv[1], "shapes") == 0) return shapes();
    if (argc >= 5 && strcmp(argv[1], "bench") == 0)
        return bench(argv[2], argv[3], argv[4], argc > 5 ? argv[5] : "-", argc > 6 ? argv[6] : six);
    fprintf(stderr, "gpu_linear check [quick|all [FORMAT]] | check least [FORMAT [KERNEL]] | "
                    "mixture [KERNEL] | both [LAYERS] | shapes | "
                    "bench WEIGHTS DTYPE M,... [KERNEL] [SHAPES]\n");
    return 2;
}
