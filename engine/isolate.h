/* isolate.h - jobs in child processes of their own: a crash of one is a result and not an end.
 *
 * A child is a fork: it inherits everything that was loaded (scripts, tables). It leads a process
 * group, and what is killed is the group: the programs that it has started as well. The parent must
 * not have started threads of its own. */
#ifndef AMALGAM_ISOLATE_H
#define AMALGAM_ISOLATE_H
#include "base.h"

#include <signal.h>

enum { ISOLATE_JOBS_MAX = 64 };

typedef struct {
    int64_t pid; /* 0 = free slot */
    int64_t index;
    int fd;
    int64_t started_ns, deadline_ns; /* CLOCK_MONOTONIC */
    bool timed_out;
    text output;
} isolate_slot;

typedef struct {
    int32_t n_slots, n_busy;
    double timeout_s; /* 0 = none; a job past it is killed */
    isolate_slot slot[ISOLATE_JOBS_MAX];
    struct sigaction before[2]; /* of SIGINT and SIGTERM */
} isolate_pool;

typedef struct {
    int64_t index;
    bool ok;          /* exit status 0 */
    char reason[256]; /* else: "killed by signal 11 (Segmentation fault)", "timed out after 60 s" */
    text output;      /* all that the job wrote; the receiver frees it */
    double wall_s;
} isolate_result;

/* 1 <= n_slots <= ISOLATE_JOBS_MAX. From here to isolate_close SIGINT and SIGTERM only end the next
 * isolate_wait. */
void isolate_open(isolate_pool *p, int32_t n_slots, double timeout_s);

/* Start job(user, index, fd) in a free slot (there must be one). The child leaves with what the job
 * returns as exit status; it writes its result to fd. */
status isolate_start(isolate_pool *p, int64_t index, int (*job)(void *user, int64_t index, int fd),
                     void *user);

/* Wait for the next job to end. At least one must be running. INTERRUPTED after SIGINT or SIGTERM,
 * also when that came before the call. */
status isolate_wait(isolate_pool *p, isolate_result *out);

/* Kill what still runs, free everything, and let signals do what they did. */
void isolate_close(isolate_pool *p);
#endif
