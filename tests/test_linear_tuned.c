/* test_linear_tuned.c - which row of a table of times answers for a problem. */
#define LINEAR_TUNED_DEF "../tests/test_linear_tuned.def"
#include "linear_tuned.c"

#include "test.h"
#include <string.h>

typedef struct {
    weight_format format;
    act_format act;
    int32_t group, n, k, m, experts, sm, n_sms, rank;
    const char *name;
} question;

static const char *answer(const question *q) {
    static const int32_t some;
    const linear_weight w = {.format = q->format,
                             .type = DT_F16,
                             .n = q->n,
                             .k = q->k,
                             .count = q->experts ? q->experts : 1,
                             .group = q->group,
                             .act = q->act,
                             .family = 90};
    const linear_problem p = {.w = &w,
                              .m = q->m,
                              .sm = q->sm,
                              .n_sms = q->n_sms,
                              .expert_start = q->experts ? &some : NULL};
    return linear_tuned(&p, q->rank);
}

static bool same(const char *a, const char *b) { return a && b ? strcmp(a, b) == 0 : a == b; }

static const question questions[] = {
    {WF_INT4, AF_16, 128, 4096, 4096, 1, 0, 90, 132, 0, "a8"},
    {WF_INT4, AF_16, 128, 4096, 4096, 8, 0, 90, 132, 1, "b8"},
    {WF_INT4, AF_16, 128, 4096, 4096, 8, 0, 90, 132, 2, NULL},
    {WF_INT4, AF_16, 128, 4096, 4096, 9, 0, 90, 132, 0, "a64"},
    {WF_INT4, AF_16, 128, 4096, 4096, 5000, 0, 90, 132, 0, "a64"}, /* more than was measured */
    {WF_INT4, AF_16, 128, 28672, 4096, 8, 0, 90, 132, 0, "wide8"}, /* the first of two alike */
    {WF_INT4, AF_16, 128, 28672, 4096, 64, 0, 90, 132, 0, "wide8"},
    {WF_INT4, AF_16, 128, 57344, 8192, 1, 0, 90, 132, 0, NULL}, /* class not measured */
    {WF_INT4, AF_16, 32, 4096, 4096, 1, 0, 90, 132, 0, "fine8"},
    {WF_INT4, AF_16, 64, 4096, 4096, 1, 0, 90, 132, 0, "a8"},   /* the coarser of two others */
    {WF_INT4, AF_16, 128, 4096, 4096, 64, 8, 90, 132, 0, "a8"}, /* eight rows an expert */
    {WF_INT4, AF_16, 128, 4096, 4096, 1, 0, 90, 114, 0, "a8"},  /* another size of the same */
    {WF_INT4, AF_16, 128, 4096, 4096, 1, 0, 86, 84, 0, "small_8"},
    {WF_INT8, AF_INT8, 0, 4096, 4096, 1, 0, 90, 132, 0, "codes_16"},
    {WF_INT8, AF_16, 0, 4096, 4096, 1, 0, 90, 132, 0, NULL},
};

static void the_row_that_fits_answers(void **state) {
    (void)state;
    for (int32_t i = 0; i < COUNT_OF(questions); i++)
        if (!same(answer(&questions[i]), questions[i].name))
            fail_msg("question %d: %s", i, answer(&questions[i]));
    question twin = questions[0]; /* other rows, another answer */
    twin.m = 9;
    assert_false(same(answer(&twin), questions[0].name));
}

int main(void) {
    const struct CMUnitTest tests[] = {cmocka_unit_test(the_row_that_fits_answers)};
    return cmocka_run_group_tests(tests, NULL, NULL);
}
