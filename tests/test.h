/* test.h - what every C test includes: cmocka's headers in the order it wants, and comparisons that
 * NaN cannot pass. */
#ifndef AMALGAM_TEST_H
#define AMALGAM_TEST_H
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include "base.h"
#include <math.h>

/* ||got - want|| / ||want|| over n floats, accumulated in double; NaN when anything is NaN. */
static inline double relative_error(const float *got, const float *want, int64_t n) {
    double num = 0, den = 0;
    for (int64_t i = 0; i < n; i++) {
        const double d = (double)got[i] - (double)want[i];
        num += d * d;
        den += (double)want[i] * (double)want[i];
    }
    return sqrt(num) / (den > 0 ? sqrt(den) : 1.0);
}

/* !(err <= tol) and never err > tol: NaN must fail. */
#define assert_at_most(err, tol)                                                                   \
    do {                                                                                           \
        const double err_ = (err), tol_ = (tol);                                                   \
        if (!(err_ <= tol_)) fail_msg("%s = %g, allowed %g", #err, err_, tol_);                    \
    } while (0)
#define assert_more(err, tol)                                                                      \
    do {                                                                                           \
        const double err_ = (err), tol_ = (tol);                                                   \
        if (!(err_ > tol_)) fail_msg("%s = %g, expected more than %g", #err, err_, tol_);          \
    } while (0)
#define assert_close(a, b, tol) assert_at_most(fabs((double)(a) - (double)(b)), tol)

#define assert_ok(expr)                                                                            \
    do {                                                                                           \
        const status st_ = (expr);                                                                 \
        if (st_ != ST_OK) fail_msg("%s: %s (%s)", #expr, status_text(st_), fail_message());        \
    } while (0)
#define assert_status(expr, want)                                                                  \
    do {                                                                                           \
        const status st_ = (expr);                                                                 \
        if (st_ != (want))                                                                         \
            fail_msg("%s: got '%s' (%s), want '%s'", #expr, status_text(st_), fail_message(),      \
                     status_text(want));                                                           \
    } while (0)
#endif
