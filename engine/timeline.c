/* timeline.c - see timeline.h. */
#include "timeline.h"

#include <errno.h>
#include <time.h>

int64_t timeline_monotonic_ns(void) {
    struct timespec ts;
    clock_gettime(CLOCK_MONOTONIC, &ts);
    return (int64_t)ts.tv_sec * 1000000000 + ts.tv_nsec;
}

void timeline_start_real(timeline *t) { *t = (timeline){.origin_ns = timeline_monotonic_ns()}; }
void timeline_start_virtual(timeline *t) { *t = (timeline){.is_virtual = true}; }

int64_t timeline_now_ns(const timeline *t) {
    return t->is_virtual ? t->t_ns : timeline_monotonic_ns() - t->origin_ns;
}

void timeline_wait_until_ns(timeline *t, int64_t when_ns) {
    if (t->is_virtual) {
        t->t_ns = i64_max(t->t_ns, when_ns);
        return;
    }
    const int64_t at = when_ns + t->origin_ns;
    const struct timespec ts = {.tv_sec = (time_t)(at / 1000000000), .tv_nsec = at % 1000000000};
    if (when_ns > timeline_now_ns(t))
        while (clock_nanosleep(CLOCK_MONOTONIC, TIMER_ABSTIME, &ts, NULL) == EINTR) {
        }
}

void timeline_spend_ns(timeline *t, int64_t cost_ns) {
    CHECK(cost_ns >= 0);
    if (t->is_virtual) t->t_ns += cost_ns;
}

void timeline_utc(char buf[21]) {
    const time_t now = time(NULL);
    struct tm tm;
    gmtime_r(&now, &tm);
    strftime(buf, 21, "%Y-%m-%dT%H:%M:%SZ", &tm);
}
