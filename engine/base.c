/* base.c - see base.h. Nothing here knows of models, devices or experiments. */
#define _GNU_SOURCE
#include "base.h"

#include <ctype.h>
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <math.h>
#include <signal.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

/* --- Errors ----------------------------------------------------------------------------------- */

static _Thread_local char last_message[512];
static _Thread_local char last_birthplace[64];

static const char *const status_texts[ST_COUNT] = {
#define X(name, text) [ST_##name] = text,
#include "status.def"
#undef X
};

const char *status_text(status st) {
    return (unsigned)st < ST_COUNT ? status_texts[st] : "unknown status";
}

/* Messages are one line on a terminal whatever a hostile file put into a name. */
static void blank_controls(char *s) {
    for (; *s; s++)
        if ((unsigned char)*s < 32 || *s == 127) *s = ' ';
}

status fail_at(const char *file, int line, status st, const char *format, ...) {
    CHECK(st != ST_OK);
    const char *slash = strrchr(file, '/');
    snprintf(last_birthplace, sizeof last_birthplace, "%s:%d", slash ? slash + 1 : file, line);
    va_list args;
    va_start(args, format);
    char message[sizeof last_message]; /* an argument may be last_message itself */
    size_t n = 0; /* memory that is short says what it was for: "config" alone would tell nobody */
    if (st == ST_NOMEM) n = (size_t)snprintf(message, sizeof message, "%s: ", status_text(st));
    vsnprintf(message + n, sizeof message - n, format, args);
    va_end(args);
    blank_controls(message);
    memcpy(last_message, message, sizeof last_message);
    return st;
}

status fail_prefix(status st, const char *format, ...) {
    if (st == ST_OK) return st;
    char prefix[256], whole[sizeof last_message + sizeof prefix + 2];
    va_list args;
    va_start(args, format);
    vsnprintf(prefix, sizeof prefix, format, args);
    va_end(args);
    blank_controls(prefix);
    snprintf(whole, sizeof whole, "%s: %s", prefix, last_message);
    whole[sizeof last_message - 1] = 0;
    memcpy(last_message, whole, sizeof last_message);
    return st;
}

const char *fail_message(void) { return last_message; }
const char *fail_birthplace(void) { return last_birthplace; }

void check_failed(const char *file, int line, const char *condition) {
    fflush(stdout);
    fprintf(stderr, "amalgam: internal error at %s:%d: %s\n", file, line, condition);
    abort();
}

/* --- Memory ----------------------------------------------------------------------------------- */

/* Fault injection is for single-threaded tests; the counters are not atomic on purpose, and nothing
 * writes them elsewhere. */
static int64_t mem_seen, mem_fails_at;

static bool mem_refused(void) {
    if (mem_fails_at == 0) return false;
    mem_seen++;
    if (--mem_fails_at != 0) return false;
    errno = ENOMEM; /* as malloc says it */
    return true;
}

int64_t mem_fail_at(int64_t n) {
    const int64_t seen = mem_seen;
    mem_seen = 0;
    mem_fails_at = n;
    return seen;
}

status arena_open(arena *a, size_t bytes) {
    *a = (arena){0};
    if (mem_refused()) return FAIL(ST_NOMEM, "arena of %zu bytes", bytes);
    void *p = mmap(NULL, bytes ? bytes : 1, PROT_READ | PROT_WRITE,
                   MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (p == MAP_FAILED)
        return FAIL(ST_NOMEM, "%.3g GB of address space: %s (ulimit -v, vm.overcommit_memory)",
                    (double)bytes * 1e-9, strerror(errno));
    a->base = p;
    a->size = bytes;
    return ST_OK;
}

void arena_close(arena *a) {
    if (a->base) munmap(a->base, a->size ? a->size : 1);
    *a = (arena){0};
}

void *arena_push(arena *a, size_t count, size_t size, size_t align) {
    CHECK(!a->sealed);
    CHECK(align && (align & (align - 1)) == 0);
    size_t at = (a->used + align - 1) & ~(align - 1), bytes;
    if (__builtin_mul_overflow(count, size, &bytes)) return NULL;
    if (at > a->size || bytes > a->size - at) return NULL;
    if (mem_refused()) return NULL;
    /* Pages below the peak were used before and reset; those above are zero from the kernel. */
    if (at < a->peak) memset(a->base + at, 0, bytes < a->peak - at ? bytes : a->peak - at);
    a->used = at + bytes;
    if (a->used > a->peak) a->peak = a->used;
    return a->base + at;
}

char *arena_string(arena *a, const char *s, size_t length) {
    char *copy = arena_array(a, char, length + 1);
    if (copy && length) memcpy(copy, s, length);
    return copy;
}

char *arena_format(arena *a, const char *format, ...) {
    va_list args, again;
    va_start(args, format);
    va_copy(again, args);
    const int n = vsnprintf(NULL, 0, format, args);
    va_end(args);
    char *s = n < 0 ? NULL : arena_array(a, char, (size_t)n + 1);
    if (s) vsnprintf(s, (size_t)n + 1, format, again);
    va_end(again);
    return s;
}

void arena_reset(arena *a, size_t used) {
    CHECK(used <= a->used);
    a->used = used;
}

void arena_seal(arena *a) { a->sealed = true; }

void *mem_alloc(size_t count, size_t size) {
    if (mem_refused()) return NULL;
    return calloc(count ? count : 1, size ? size : 1);
}

void *mem_resize(void *old, size_t count, size_t size) {
    size_t bytes;
    if (__builtin_mul_overflow(count, size, &bytes)) return NULL;
    if (mem_refused()) return NULL;
    return realloc(old, bytes ? bytes : 1);
}

void mem_free(void *p) { free(p); }

/* --- Text ------------------------------------------------------------------------------------- */

static bool text_room(text *t, size_t more) {
    if (t->failed) return false;
    const size_t need = t->length + more + 1;
    if (need <= t->size) return true;
    size_t size = t->size ? t->size : 64;
    while (size < need) size *= 2;
    char *p = mem_resize(t->data, size, 1);
    if (!p) {
        t->failed = true;
        return false;
    }
    t->data = p;
    t->size = size;
    return true;
}

void text_bytes(text *t, const void *bytes, size_t n) {
    if (!text_room(t, n)) return;
    if (n) memcpy(t->data + t->length, bytes, n);
    t->length += n;
    t->data[t->length] = 0;
}

void text_add(text *t, const char *format, ...) {
    va_list args, again;
    va_start(args, format);
    va_copy(again, args);
    const int n = vsnprintf(NULL, 0, format, args);
    va_end(args);
    if (n < 0) t->failed = true; /* more than INT_MAX bytes */
    if (n >= 0 && text_room(t, (size_t)n)) {
        vsnprintf(t->data + t->length, (size_t)n + 1, format, again);
        t->length += (size_t)n;
    }
    va_end(again);
}

void text_clear(text *t) {
    t->length = 0;
    t->failed = false;
    if (t->data) t->data[0] = 0;
}

void text_free(text *t) {
    mem_free(t->data);
    *t = (text){0};
}

status text_status(const text *t) {
    return t->failed ? FAIL(ST_NOMEM, "text of %zu bytes", t->length) : ST_OK;
}

/* --- Hash ------------------------------------------------------------------------------------- */

static uint64_t mix64(uint64_t x) { /* splitmix64 finaliser */
    x ^= x >> 30;
    x *= 0xbf58476d1ce4e5b9u;
    x ^= x >> 27;
    x *= 0x94d049bb133111ebu;
    return x ^ (x >> 31);
}

uint64_t hash_bytes(const void *bytes, size_t n, uint64_t seed) {
    /* Eight bytes at a time: digests run over whole checkpoints. */
    const uint8_t *p = bytes;
    uint64_t h = mix64(seed ^ 0xcbf29ce484222325u ^ (uint64_t)n);
    for (; n >= 8; n -= 8, p += 8) {
        uint64_t word;
        memcpy(&word, p, 8);
        h = (h ^ word) * 0x100000001b3u;
        h ^= h >> 29;
    }
    for (; n; n--, p++) h = (h ^ *p) * 0x100000001b3u;
    return mix64(h);
}

uint64_t hash_u64(uint64_t value, uint64_t seed) {
    return mix64(mix64(seed + 0x9e3779b97f4a7c15u) ^ value);
}

/* --- Files ------------------------------------------------------------------------------------ */

/* A file that is not there is the fault of who named it, not of the disk. */
static status open_to_read(int *fd, const char *path) {
    *fd = open(path, O_RDONLY | O_CLOEXEC);
    if (*fd >= 0) return ST_OK;
    return FAIL(errno == ENOENT || errno == ENOTDIR ? ST_NOTFOUND : ST_IO, "%s: %s", path,
                strerror(errno));
}

status file_map_open(file_map *m, const char *path) {
    *m = (file_map){0};
    int fd;
    TRY(open_to_read(&fd, path));
    struct stat st;
    status result = ST_OK;
    if (fstat(fd, &st) != 0) {
        result = FAIL(ST_IO, "%s: %s", path, strerror(errno));
    } else if (!S_ISREG(st.st_mode)) {
        result = FAIL(ST_FORMAT, "%s: not a regular file", path);
    } else if (st.st_size > 0) {
        void *p = mmap(NULL, (size_t)st.st_size, PROT_READ, MAP_PRIVATE, fd, 0);
        if (p == MAP_FAILED) {
            result = FAIL(ST_IO, "%s: %s", path, strerror(errno));
        } else {
            m->data = p;
            m->size = (size_t)st.st_size;
        }
    }
    close(fd);
    return result;
}

void file_map_close(file_map *m) {
    if (m->data) munmap((void *)(uintptr_t)m->data, m->size);
    *m = (file_map){0};
}

/* A pipe has no size: all that comes until its end. */
static status read_pipe(char **data, size_t *size, const char *path) {
    int fd;
    TRY(open_to_read(&fd, path));
    text all = {0};
    char part[4096];
    ssize_t n;
    do {
        n = read(fd, part, sizeof part);
        if (n > 0) text_bytes(&all, part, (size_t)n);
    } while (!all.failed && (n > 0 || (n < 0 && errno == EINTR)));
    status st = all.failed ? FAIL(ST_NOMEM, "%s: more than %zu bytes", path, all.length) : ST_OK;
    if (n < 0) st = FAIL(ST_IO, "%s: %s", path, strerror(errno));
    close(fd);
    text_bytes(&all, "", 0); /* an empty one ends with a 0, too */
    if (st == ST_OK) st = text_status(&all);
    if (st != ST_OK) {
        text_free(&all);
        return st;
    }
    *data = all.data;
    *size = all.length;
    return ST_OK;
}

status file_read(char **data, size_t *size, const char *path) {
    *data = NULL;
    *size = 0;
    struct stat kind;
    if (stat(path, &kind) == 0 && S_ISFIFO(kind.st_mode)) return read_pipe(data, size, path);
    file_map m;
    TRY(file_map_open(&m, path));
    char *copy = mem_alloc(m.size + 1, 1);
    if (!copy) {
        file_map_close(&m);
        return FAIL(ST_NOMEM, "%s: %zu bytes", path, m.size);
    }
    if (m.size) memcpy(copy, m.data, m.size);
    *data = copy;
    *size = m.size;
    file_map_close(&m);
    return ST_OK;
}

status file_make_dirs(const char *path) {
    char part[4096];
    const size_t n = strlen(path);
    if (n >= sizeof part) return FAIL(ST_IO, "path of %zu bytes is too long", n);
    memcpy(part, path, n + 1);
    for (size_t i = 1; i <= n; i++) {
        if (part[i] != '/' && part[i] != 0) continue;
        const char keep = part[i];
        part[i] = 0;
        if (mkdir(part, 0777) != 0 && errno != EEXIST)
            return FAIL(ST_IO, "%s: %s", part, strerror(errno));
        part[i] = keep;
    }
    struct stat made;
    if (stat(path, &made) != 0 || !S_ISDIR(made.st_mode))
        return FAIL(ST_IO, "%s: %s", path, strerror(ENOTDIR));
    if (access(path, W_OK) != 0) return FAIL(ST_IO, "%s: %s", path, strerror(errno));
    return ST_OK;
}

/* --- Drafts ------------------------------------------------------------------------------------
 * A temporary is TARGET.PID.tmp, locked by its writer: what nobody has locked is left of one that
 * was killed. */

static file_draft *volatile draft_on_signal; /* the one that a signal removes; NULL = none */

static void remove_draft(int number) {
    const file_draft *f = draft_on_signal;
    if (f) (void)unlink(f->temporary);
    (void)raise(number); /* SA_RESETHAND: this one ends the process */
}

void file_remove_on_signals(void) {
    static const int numbers[] = {SIGHUP, SIGINT, SIGTERM};
    for (int32_t i = 0; i < COUNT_OF(numbers); i++) {
        struct sigaction before;
        if (sigaction(numbers[i], NULL, &before) != 0 || before.sa_handler == SIG_IGN) continue;
        const struct sigaction once = {.sa_handler = remove_draft, .sa_flags = (int)SA_RESETHAND};
        (void)sigaction(numbers[i], &once, NULL);
    }
}

static void forget_draft(const file_draft *f) {
    if (draft_on_signal == f) draft_on_signal = NULL;
}

/* Is `name` the first n bytes of `target`, a number, and ".tmp"? */
static bool is_temporary_of(const char *name, const char *target, size_t n) {
    if (strncmp(name, target, n) != 0 || name[n] != '.') return false;
    const char *pid = name + n + 1;
    const size_t digits = strspn(pid, "0123456789");
    return digits > 0 && strcmp(pid + digits, ".tmp") == 0;
}

static void remove_dead_drafts(const char *path) {
    char folder[PATH_MAX];
    const char *slash = strrchr(path, '/'), *name = slash ? slash + 1 : path;
    snprintf(folder, sizeof folder, "%.*s", slash ? (int)(slash - path + 1) : 1,
             slash ? path : ".");
    DIR *dir = opendir(folder);
    for (struct dirent *e; dir && (e = readdir(dir));) {
        if (!is_temporary_of(e->d_name, name, strlen(name))) continue;
        const int fd = openat(dirfd(dir), e->d_name, O_RDWR | O_NOFOLLOW | O_NONBLOCK | O_CLOEXEC);
        if (fd < 0) continue;
        if (flock(fd, LOCK_EX | LOCK_NB) == 0) (void)unlinkat(dirfd(dir), e->d_name, 0);
        close(fd);
    }
    if (dir) closedir(dir);
}

/* Another process may take it for a dead one's before it is locked: then once more. */
static int open_temporary(const char *path) {
    int fd = -1;
    for (int32_t tries = 0; tries < 8; tries++) {
        struct stat made;
        fd = open(path, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0666);
        if (fd < 0 || flock(fd, LOCK_EX) != 0 || fstat(fd, &made) != 0 || made.st_nlink > 0) break;
        if (tries < 7) close(fd);
    }
    return fd;
}

status file_begin(file_draft *f, const char *path) {
    char real[PATH_MAX];
    struct stat kind, link;
    const bool there = stat(path, &kind) == 0;
    if (there && S_ISDIR(kind.st_mode)) return FAIL(ST_IO, "%s: %s", path, strerror(EISDIR));
    if (there && S_ISREG(kind.st_mode) && lstat(path, &link) == 0 && S_ISLNK(link.st_mode) &&
        realpath(path, real))
        path = real;
    const bool replaced = !there || S_ISREG(kind.st_mode);
    if (snprintf(f->path, sizeof f->path, "%s", path) >= (int)sizeof f->path ||
        snprintf(f->temporary, sizeof f->temporary, "%s.%d.tmp", path, (int)getpid()) >=
            (int)sizeof f->temporary)
        return FAIL(ST_IO, "%s: path too long", path);
    if (replaced) {
        remove_dead_drafts(path);
        if (!draft_on_signal) draft_on_signal = f;
        f->fd = open_temporary(f->temporary);
    } else {
        f->temporary[0] = 0;
        f->fd = open(path, O_WRONLY | O_CLOEXEC);
    }
    if (f->fd >= 0) return ST_OK;
    const int why = errno;
    forget_draft(f);
    return FAIL(ST_IO, "%s: %s", path, strerror(why));
}

status file_add(file_draft *f, const void *data, size_t n) {
    for (const uint8_t *p = data; n > 0;) {
        const ssize_t done = write(f->fd, p, n);
        if (done < 0 && errno == EINTR) continue;
        if (done <= 0) return FAIL(ST_IO, "%s: %s", f->path, strerror(done ? errno : ENOSPC));
        p += done;
        n -= (size_t)done;
    }
    return ST_OK;
}

status file_end(file_draft *f, status st) {
    const bool replaces = f->temporary[0] != 0;
    if (st == ST_OK && replaces && fsync(f->fd) != 0)
        st = FAIL(ST_IO, "%s: %s", f->path, strerror(errno));
    if (close(f->fd) != 0 && st == ST_OK) st = FAIL(ST_IO, "%s: %s", f->path, strerror(errno));
    if (st == ST_OK && replaces && rename(f->temporary, f->path) != 0)
        st = FAIL(ST_IO, "%s: %s", f->path, strerror(errno));
    if (st != ST_OK && replaces) unlink(f->temporary);
    forget_draft(f);
    return st;
}

static status make_parents(const char *path) {
    const char *slash = strrchr(path, '/');
    if (!slash || slash == path) return ST_OK;
    char dir[4096];
    if (snprintf(dir, sizeof dir, "%.*s", (int)(slash - path), path) >= (int)sizeof dir)
        return FAIL(ST_IO, "%s: path too long", path);
    return file_make_dirs(dir);
}

status file_write(const char *path, const void *data, size_t size) {
    TRY(make_parents(path));
    file_draft f;
    TRY(file_begin(&f, path));
    return file_end(&f, file_add(&f, data, size));
}

status file_may_write(const char *path) {
    struct stat kind;
    if (stat(path, &kind) == 0 && !S_ISREG(kind.st_mode) && !S_ISDIR(kind.st_mode)) return ST_OK;
    TRY(make_parents(path));
    file_draft f;
    TRY(file_begin(&f, path));
    (void)file_end(&f, ST_INTERRUPTED);
    return ST_OK;
}

status stdout_failed(void) {
    if (errno == EPIPE) return ST_INTERRUPTED;
    return FAIL(ST_IO, "standard output: %s", strerror(errno));
}

bool file_exists(const char *path) { return access(path, F_OK) == 0; }

const char *path_join(char *buf, size_t n, const char *dir, const char *name) {
    const int length =
        name[0] == '/' ? snprintf(buf, n, "%s", name) : snprintf(buf, n, "%s/%s", dir, name);
    CHECK(length >= 0 && (size_t)length < n);
    return buf;
}

/* --- The root --------------------------------------------------------------------------------- */

static char root_path[2048];

static bool is_root(const char *dir) {
    char probe[2200];
    snprintf(probe, sizeof probe, "%s/experiments/amalgam.meta.lua", dir);
    return file_exists(probe);
}

void root_set(const char *dir) {
    CHECK(strlen(dir) < sizeof root_path);
    strcpy(root_path, dir);
}

const char *root_dir(void) {
    if (root_path[0]) return root_path;
    const char *given = getenv("AMALGAM_ROOT");
    if (given && given[0] && strlen(given) < sizeof root_path) {
        root_set(given);
        return root_path;
    }
    char exe[2048];
    const ssize_t n = readlink("/proc/self/exe", exe, sizeof exe - 1);
    if (n > 0) {
        exe[n] = 0;
        for (char *slash = strrchr(exe, '/'); slash && slash != exe; slash = strrchr(exe, '/')) {
            *slash = 0;
            if (is_root(exe)) {
                root_set(exe);
                return root_path;
            }
        }
    }
    root_set(".");
    return root_path;
}

bool root_found(void) { return is_root(root_dir()); }

/* --- Numbers ---------------------------------------------------------------------------------- */

bool parse_i64(const char *s, int64_t lo, int64_t hi, int64_t *out) {
    if (!*s || isspace((unsigned char)*s)) return false;
    char *end;
    errno = 0;
    const long long v = strtoll(s, &end, 10);
    if (errno || *end || v < lo || v > hi) return false;
    *out = v;
    return true;
}

bool parse_f64(const char *s, double lo, double hi, double *out) {
    if (!*s || isspace((unsigned char)*s)) return false;
    char *end;
    errno = 0;
    const double v = strtod(s, &end);
    if (errno || *end || !(v >= lo && v <= hi)) return false;
    *out = v;
    return true;
}
