/* progress.h - what long work says of itself: a bar with an estimate on a terminal, plain lines
 * (at most one every few seconds) when the output is a pipe or a file. */
#ifndef AMALGAM_PROGRESS_H
#define AMALGAM_PROGRESS_H
#include "base.h"

typedef struct {
    char title[64];
    int64_t total, done;
    int64_t started_ns, shown_ns; /* CLOCK_MONOTONIC */
    bool terminal;                /* of standard error, where all of it goes */
} progress;

void progress_start(progress *p, const char *title, int64_t total);
/* `done` of `total` are finished; `note` (may be "") names the current one. Shows at most ten times
 * a second on a terminal, and every 5 s otherwise. */
void progress_show(progress *p, int64_t done, const char *note);
/* A line of its own, above the bar when there is one. */
void progress_line(progress *p, const char *format, ...) __attribute__((format(printf, 2, 3)));
void progress_end(progress *p);
#endif
