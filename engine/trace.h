/* trace.h - a recorded run of the scheduler: what went in, and a hash of each batch that came out.
 * Feeding the inputs to a fresh scheduler must reproduce every batch: that proves it pure, and what
 * is left between two devices is then only their difference in time.
 *
 * File: JSON lines. {"policy":…,"limits":…} then {"add":…}, {"cancel":id}, {"step":n,"now":ns,
 * "hash":"…","tokens":[…],"stop":[…],"done":ns}, {"flush":true}, and {"end":steps} as the last.
 * {"pick":n,"now": ns,"hash":"…"} stands where a batch was picked before others were committed;
 * its "step" follows. */
#ifndef AMALGAM_TRACE_H
#define AMALGAM_TRACE_H
#include "sched.h"

typedef struct trace trace;

/* Write to `path`. The recorder is called at each arrow that crosses the scheduler's border, after
 * the scheduler has accepted it (a refusal changes nothing and is not recorded). */
status trace_open(trace **out, const char *path, const sched_policy *p, const sched_limits *l);
void trace_add(trace *t, const request *r, int64_t now_ns);
void trace_cancel(trace *t, int64_t id, int64_t now_ns);
void trace_flush_cache(trace *t);
/* For each batch of a run that picks ahead of commits, as it is picked. */
void trace_pick(trace *t, const batch *b, int64_t pick_ns);
/* stop == NULL: none. Call it before sched_commit: the batch is valid only until then. */
void trace_step(trace *t, const batch *b, int64_t pick_ns, const int32_t *token, const bool *stop,
                int64_t commit_ns);
/* Flush and close; IO when anything could not be written. */
status trace_close(trace *t);

/* Replay: *n_steps batches were compared, *n_different of them differed. Both are set on failure,
 * too, so that the trace of a killed run is of use. FORMAT with file and line for a broken file,
 * for one that does not end in its last line, and for inputs that the scheduler refuses. Once a
 * batch has differed, refusals are expected and passed over; drawn tokens are taken from the file
 * as far as they go. Prompts and tokens are replayed, sampling parameters are not: no batch depends
 * on them. */
status trace_replay(const char *path, int64_t *n_steps, int64_t *n_different);
#endif
