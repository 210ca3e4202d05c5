/* fuzz.h - what the libFuzzer targets share: an input as a file with a name. `make fuzz-NAME`. */
#ifndef AMALGAM_FUZZ_H
#define AMALGAM_FUZZ_H
#define _GNU_SOURCE
#include "base.h"

#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <unistd.h>

int LLVMFuzzerInitialize(int *argc, char ***argv);
int LLVMFuzzerTestOneInput(const uint8_t *data, size_t n);

/* The bytes as a file in memory, made once and then filled again. */
static inline void fuzz_fill(int *fd, const uint8_t *data, size_t n) {
    if (*fd < 0) *fd = memfd_create("fuzz", 0);
    if (*fd < 0 || ftruncate(*fd, 0) != 0) abort();
    if (pwrite(*fd, data, n, 0) != (ssize_t)n) abort();
}

/* Its path, valid until the next call. */
static inline const char *fuzz_file(const uint8_t *data, size_t n) {
    static int fd = -1;
    static char path[64];
    fuzz_fill(&fd, data, n);
    snprintf(path, sizeof path, "/proc/self/fd/%d", fd);
    return path;
}

static char fuzz_made[64] = "/tmp/amalgam-fuzz-XXXXXX", fuzz_link[128];

static inline void fuzz_clean(void) {
    unlink(fuzz_link);
    rmdir(fuzz_made);
}

/* Another one, under a name in a folder, for readers that open folders. */
static inline const char *fuzz_folder(const char *name, const uint8_t *data, size_t n) {
    static bool made;
    static int fd = -1;
    fuzz_fill(&fd, data, n);
    if (!made) {
        char file[64];
        if (!mkdtemp(fuzz_made)) abort();
        snprintf(file, sizeof file, "/proc/self/fd/%d", fd);
        snprintf(fuzz_link, sizeof fuzz_link, "%s/%s", fuzz_made, name);
        if (symlink(file, fuzz_link) != 0) abort();
        atexit(fuzz_clean);
        made = true;
    }
    return fuzz_made;
}
#endif
