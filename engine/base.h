/* base.h - status codes, checks, arenas, hashing, files: what every other file stands on. */
#ifndef AMALGAM_BASE_H
#define AMALGAM_BASE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>

#ifdef __cplusplus
extern "C" {
#endif

/* --- Operation errors: returned, with the message recorded once where the error is born. --- */

typedef enum {
#define X(name, text) ST_##name,
#include "status.def"
#undef X
    ST_COUNT
} status;

/* "ok", "out of memory", ... for any value of `status`. */
const char *status_text(status st);

/* Record why (thread-local, one line, at most 511 bytes, control characters blanked) and where, and
 * return `st`: `return FAIL(ST_SHAPE, "k=%d is no multiple of 16", k);`. NOMEM's reason is what the
 * memory was for. */
#define FAIL(st, ...) fail_at(__FILE__, __LINE__, (st), __VA_ARGS__)
status fail_at(const char *file, int line, status st, const char *format, ...)
    __attribute__((format(printf, 4, 5)));

/* Put "prefix: " before the recorded message and return `st` unchanged; for the one place that
 * knows the file name or the point that the error belongs to. */
status fail_prefix(status st, const char *format, ...) __attribute__((format(printf, 2, 3)));

/* The last message of this thread ("" when none) and its birthplace "file.c:12". */
const char *fail_message(void);
const char *fail_birthplace(void);

/* Evaluate once; on error return it unchanged. */
#define TRY(expr)                                                                                  \
    do {                                                                                           \
        status try_st_ = (expr);                                                                   \
        if (try_st_ != ST_OK) return try_st_;                                                      \
    } while (0)

/* --- Programmer errors: stop the program in every build. The argument must be cheap and pure. - */

#define CHECK(cond) ((cond) ? (void)0 : check_failed(__FILE__, __LINE__, #cond))
void check_failed(const char *file, int line, const char *condition) __attribute__((noreturn));

/* --- Memory -----------------------------------------------------------------------------------
 * An arena is one mmap'ed range, committed by the kernel as it is touched, so that a generous upper
 * bound costs nothing. Passing an arena as an argument is the statement "you may allocate, I free".
 * Lifetimes: process (tables, weights), run (one experiment point), step (mark and reset). */
typedef struct {
    uint8_t *base;
    size_t used, size;
    size_t peak; /* high-water mark in bytes, reported in the row of a run */
    bool sealed; /* after arena_seal every allocation is a bug */
} arena;

/* Reserve `bytes` of address space. NOMEM when the range is refused. */
status arena_open(arena *a, size_t bytes);
void arena_close(arena *a); /* idempotent */

/* `count * size` zeroed bytes at `align` (a power of two), or NULL when they do not fit, when the
 * product overflows or when a planned failure strikes (mem_fail_at). A refusal changes nothing. */
void *arena_push(arena *a, size_t count, size_t size, size_t align);
#define arena_array(a, type, count) ((type *)arena_push((a), (count), sizeof(type), _Alignof(type)))

/* As arena_push for a copy of a string. NULL when it does not fit. */
char *arena_string(arena *a, const char *text, size_t length);
char *arena_format(arena *a, const char *format, ...) __attribute__((format(printf, 2, 3)));

/* Give back everything pushed after the mark `used` (= a->used at that time). */
void arena_reset(arena *a, size_t used);
void arena_seal(arena *a);

/* malloc family for what outlives no arena (growing buffers of readers). Same failure injection.
 * NULL on refusal; mem_free(NULL) is fine. */
void *mem_alloc(size_t count, size_t size); /* zeroed */
void *mem_resize(void *old, size_t count, size_t size);
void mem_free(void *p);

/* Fault injection for tests: the n-th allocation from now (1 = the next one, arenas included)
 * fails, once. 0 switches off. Returns the number of allocations since the last call, up to that
 * one. */
int64_t mem_fail_at(int64_t n);

/* --- Strings that grow ------------------------------------------------------------------------ */
typedef struct {
    char *data; /* always terminated once anything was added; NULL before */
    size_t length, size;
    bool failed; /* an allocation was refused: the content is incomplete */
} text;

void text_add(text *t, const char *format, ...) __attribute__((format(printf, 2, 3)));
void text_bytes(text *t, const void *bytes, size_t n);
void text_clear(text *t); /* keep the memory */
void text_free(text *t);
/* NOMEM if any addition was refused. */
status text_status(const text *t);

/* --- Hash ------------------------------------------------------------------------------------- */

/* 64-bit hash (FNV-1a over bytes, then a finaliser); chain by passing the last value as `seed`.
 * Not for untrusted collision resistance; digests of files use the same. */
uint64_t hash_bytes(const void *bytes, size_t n, uint64_t seed);
uint64_t hash_u64(uint64_t value, uint64_t seed);

/* --- Files ------------------------------------------------------------------------------------ */
typedef struct {
    const uint8_t *data; /* NULL when empty */
    size_t size;
} file_map;

/* Map a regular file read-only. NOTFOUND, or IO, with the path and errno text; FORMAT for a
 * directory or a device. An empty file gives size 0. */
status file_map_open(file_map *m, const char *path);
void file_map_close(file_map *m); /* idempotent */

/* Read a whole file, or a pipe to its end, into malloc'ed memory, terminated by a 0 that is not
 * counted. Errors as file_map_open. */
status file_read(char **data, size_t *size, const char *path);

/* A file in the making. What is added goes to a temporary beside the target, which file_end puts
 * into its place: readers see the old file or the new one, and a full disk leaves the old one.
 * Symbolic links are followed. A pipe or a device is written to as it comes: nothing may take its
 * place. */
typedef struct {
    int fd;
    char path[4096], temporary[4096]; /* temporary "": of a pipe or a device */
} file_draft;

/* IO with the path, as all three; also for a folder. After a failure there is nothing to end. */
status file_begin(file_draft *f, const char *path);
status file_add(file_draft *f, const void *data, size_t n);
/* st OK: flush to the disk and put into place. Else drop what was added; the result is st then. */
status file_end(file_draft *f, status st);

/* From here on SIGHUP, SIGINT and SIGTERM, where they are not ignored, remove the first draft that
 * is open before they end the process. What a process killed outright leaves goes when somebody
 * next begins the same file. */
void file_remove_on_signals(void);

/* All of it at once. Missing parent directories are made. */
status file_write(const char *path, const void *data, size_t size);
/* Could that begin? For what is only known after long work; parents are made here already. */
status file_may_write(const char *path);
bool file_exists(const char *path);
/* Why the write to standard output that has just failed did (errno): INTERRUPTED when who read it
 * has closed the pipe and so has what they wanted, else IO. */
status stdout_failed(void);
/* Like mkdir -p. IO also where the folder is there and cannot be written to. */
status file_make_dirs(const char *path);

/* "a/b" joined into buf (size n). Truncation is a programmer error. */
const char *path_join(char *buf, size_t n, const char *dir, const char *name);

/* The root of the checkout or installation: the folder that holds experiments/ and workloads/,
 * found from --root, the environment variable AMALGAM_ROOT, the folder of the binary and its
 * parents, then the working directory. Never NULL after root_set. */
const char *root_dir(void);
bool root_found(void); /* is it one? What was named need not be, nor the working directory */
void root_set(const char *dir);

/* --- Small things ----------------------------------------------------------------------------- */
#define COUNT_OF(a) ((int32_t)(sizeof(a) / sizeof((a)[0])))

static inline int64_t i64_min(int64_t a, int64_t b) { return a < b ? a : b; }
static inline int64_t i64_max(int64_t a, int64_t b) { return a > b ? a : b; }
static inline int64_t div_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

/* Whole-string number; false on junk, on overflow and on values outside [lo, hi]. */
bool parse_i64(const char *text, int64_t lo, int64_t hi, int64_t *out);
bool parse_f64(const char *text, double lo, double hi, double *out);

#ifdef __cplusplus
}
#endif
#endif
