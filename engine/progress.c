/* progress.c - see progress.h. */
#include "progress.h"

#include "timeline.h"

#include <stdarg.h>
#include <string.h>
#include <unistd.h>

void progress_start(progress *p, const char *title, int64_t total) {
    *p = (progress){.total = total, .started_ns = timeline_monotonic_ns(), .terminal = isatty(2)};
    snprintf(p->title, sizeof p->title, "%s", title);
}

static void duration(char *buf, size_t n, int64_t s) {
    if (s < 60)
        snprintf(buf, n, "%ds", (int)s);
    else if (s < 3600)
        snprintf(buf, n, "%dm%02ds", (int)(s / 60), (int)(s % 60));
    else
        snprintf(buf, n, "%dh%02dm", (int)(s / 3600), (int)(s / 60 % 60));
}

void progress_show(progress *p, int64_t done, const char *note) {
    const int64_t now = timeline_monotonic_ns();
    p->done = done;
    const int64_t every = p->terminal ? 100000000 : 5000000000;
    if (p->shown_ns && now - p->shown_ns < every && done < p->total) return;
    p->shown_ns = now;
    const int64_t spent = (now - p->started_ns) / 1000000000;
    char left[24] = "?", used[24];
    duration(used, sizeof used, spent);
    if (done > 0)
        duration(left, sizeof left,
                 (int64_t)((double)spent / (double)done * (double)(p->total - done) + 0.5));
    if (p->terminal) {
        char bar[25];
        const int filled = p->total > 0 ? (int)(24 * done / p->total) : 24;
        for (int i = 0; i < 24; i++) bar[i] = i < filled ? '#' : '.';
        bar[24] = 0;
        fprintf(stderr, "\r\033[K%s [%s] %lld/%lld %s, %s left  %.40s", p->title, bar,
                (long long)done, (long long)p->total, used, left, note);
    } else {
        fprintf(stderr, "%s %lld/%lld %s, %s left  %s\n", p->title, (long long)done,
                (long long)p->total, used, left, note);
    }
    fflush(stderr);
}

void progress_line(progress *p, const char *format, ...) {
    if (p->terminal) fputs("\r\033[K", stderr);
    va_list args;
    va_start(args, format);
    vfprintf(stderr, format, args);
    va_end(args);
    fputc('\n', stderr);
}

void progress_end(progress *p) {
    if (p->terminal) fputs("\r\033[K", stderr);
    fflush(stderr);
}
