/* isolate.c - see isolate.h. */
#include "isolate.h"

#include "timeline.h"

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <unistd.h>

static volatile sig_atomic_t interrupted;

static void on_signal(int number) {
    (void)number;
    interrupted = 1;
}

void isolate_open(isolate_pool *p, int32_t n_slots, double timeout_s) {
    CHECK(n_slots >= 1 && n_slots <= ISOLATE_JOBS_MAX);
    *p = (isolate_pool){.n_slots = n_slots, .timeout_s = timeout_s};
    struct sigaction action = {.sa_handler = on_signal};
    sigaction(SIGINT, &action, &p->before[0]);
    sigaction(SIGTERM, &action, &p->before[1]);
}

status isolate_start(isolate_pool *p, int64_t index, int (*job)(void *user, int64_t index, int fd),
                     void *user) {
    isolate_slot *s = NULL;
    for (int32_t i = 0; i < p->n_slots && !s; i++)
        if (!p->slot[i].pid) s = &p->slot[i];
    CHECK(s != NULL);
    int ends[2];
    if (pipe(ends) != 0) return FAIL(ST_IO, "pipe: %s", strerror(errno));
    fflush(NULL);
    const pid_t parent = getpid(), pid = fork();
    if (pid < 0) {
        close(ends[0]);
        close(ends[1]);
        return FAIL(ST_IO, "fork: %s", strerror(errno));
    }
    if (pid == 0) {
        /* The child dies with its parent, also when that is killed outright. */
        prctl(PR_SET_PDEATHSIG, SIGKILL);
        if (getppid() != parent) _exit(1);
        signal(SIGINT, SIG_DFL);
        signal(SIGTERM, SIG_DFL);
        setpgid(0, 0);
        close(ends[0]);
        fcntl(ends[1], F_SETFD, FD_CLOEXEC); /* whoever outlives the job must not hold it open */
        const int code = job(user, index, ends[1]);
        fflush(NULL);
        _exit(code);
    }
    setpgid(pid, pid); /* here as well: whoever comes first */
    close(ends[1]);
    fcntl(ends[0], F_SETFL, O_NONBLOCK);
    fcntl(ends[0], F_SETFD, FD_CLOEXEC);
    const int64_t now = timeline_monotonic_ns();
    *s = (isolate_slot){.pid = pid, .index = index, .fd = ends[0], .started_ns = now};
    s->deadline_ns = p->timeout_s > 0 ? now + (int64_t)(p->timeout_s * 1e9) : INT64_MAX;
    p->n_busy++;
    return ST_OK;
}

/* True at end of file. */
static bool drain(isolate_slot *s) {
    char chunk[65536];
    for (;;) {
        const ssize_t n = read(s->fd, chunk, sizeof chunk);
        if (n > 0)
            text_bytes(&s->output, chunk, (size_t)n);
        else if (n == 0)
            return true;
        else if (errno == EINTR)
            continue;
        else
            return errno != EAGAIN;
    }
}

/* Its group, and itself should it not have come to lead one. */
static void kill_job(const isolate_slot *s) {
    kill(-(pid_t)s->pid, SIGKILL);
    kill((pid_t)s->pid, SIGKILL);
}

static void reap(isolate_pool *p, isolate_slot *s, isolate_result *out) {
    int code = 0;
    while (waitpid((pid_t)s->pid, &code, 0) < 0 && errno == EINTR) {
    }
    close(s->fd);
    *out = (isolate_result){.index = s->index,
                            .ok = WIFEXITED(code) && WEXITSTATUS(code) == 0,
                            .output = s->output,
                            .wall_s = (double)(timeline_monotonic_ns() - s->started_ns) * 1e-9};
    if (s->timed_out)
        snprintf(out->reason, sizeof out->reason, "timed out after %.0f s", p->timeout_s);
    else if (WIFSIGNALED(code))
        snprintf(out->reason, sizeof out->reason, "killed by signal %d (%s)", WTERMSIG(code),
                 strsignal(WTERMSIG(code)));
    else if (!out->ok)
        snprintf(out->reason, sizeof out->reason, "left with status %d", WEXITSTATUS(code));
    *s = (isolate_slot){0};
    p->n_busy--;
}

status isolate_wait(isolate_pool *p, isolate_result *out) {
    CHECK(p->n_busy > 0);
    for (;;) {
        struct pollfd wait[ISOLATE_JOBS_MAX];
        isolate_slot *of[ISOLATE_JOBS_MAX];
        nfds_t n = 0;
        int64_t nearest = INT64_MAX;
        for (int32_t i = 0; i < p->n_slots; i++) {
            isolate_slot *s = &p->slot[i];
            if (!s->pid) continue;
            of[n] = s;
            wait[n++] = (struct pollfd){.fd = s->fd, .events = POLLIN};
            nearest = i64_min(nearest, s->deadline_ns);
        }
        int timeout_ms = -1;
        if (nearest != INT64_MAX)
            timeout_ms =
                (int)i64_max(0, i64_min((nearest - timeline_monotonic_ns()) / 1000000 + 1, 60000));
        const int ready = interrupted ? 0 : poll(wait, n, timeout_ms);
        if (interrupted) return FAIL(ST_INTERRUPTED, "interrupted");
        if (ready < 0 && errno != EINTR) return FAIL(ST_IO, "poll: %s", strerror(errno));
        const int64_t now = timeline_monotonic_ns();
        for (nfds_t i = 0; i < n; i++) {
            if (now >= of[i]->deadline_ns && !of[i]->timed_out) {
                of[i]->timed_out = true;
                of[i]->deadline_ns = INT64_MAX;
                kill_job(of[i]);
            }
            if (ready > 0 && wait[i].revents && drain(of[i])) {
                reap(p, of[i], out);
                return ST_OK;
            }
        }
    }
}

void isolate_close(isolate_pool *p) {
    for (int32_t i = 0; i < p->n_slots; i++) {
        isolate_slot *s = &p->slot[i];
        if (!s->pid) continue;
        kill_job(s);
        isolate_result unwanted;
        reap(p, s, &unwanted);
        text_free(&unwanted.output);
    }
    sigaction(SIGINT, &p->before[0], NULL);
    sigaction(SIGTERM, &p->before[1], NULL);
}
