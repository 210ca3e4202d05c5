/* timeline.h - the only source of time: the real clock, or a virtual one moved by the simulator. */
#ifndef AMALGAM_TIMELINE_H
#define AMALGAM_TIMELINE_H
#include "base.h"

/* All times are nanoseconds since the timeline was started. Real: CLOCK_MONOTONIC; spend does
 * nothing, since time has passed by itself. Virtual: only wait and spend move the clock. */
typedef struct timeline {
    bool is_virtual;
    int64_t origin_ns; /* CLOCK_MONOTONIC at the start (real) */
    int64_t t_ns;      /* current time (virtual) */
} timeline;

/* CLOCK_MONOTONIC itself, for what has no timeline: progress, deadlines of child processes. */
int64_t timeline_monotonic_ns(void);

/* Begin at 0, with either kind of clock. */
void timeline_start_real(timeline *t);
void timeline_start_virtual(timeline *t);

int64_t timeline_now_ns(const timeline *t);

/* Sleep or jump to `when_ns`; returns at once when it is past. */
void timeline_wait_until_ns(timeline *t, int64_t when_ns);

/* Add the cost of work that a device only predicted. cost_ns >= 0. */
void timeline_spend_ns(timeline *t, int64_t cost_ns);

/* Wall-clock time for records: UTC "2026-11-21T02:43:24Z" into buf[21]. Never used for durations.
 */
void timeline_utc(char buf[21]);
#endif
