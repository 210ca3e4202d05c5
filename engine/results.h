/* results.h - who measured what: the identity of this build and machine, and rows that survive.
 *
 * results/<experiment>/<machine>/<commit>.jsonl, one JSON object a line, appended row by row. The
 * commit is the one the binary was built from; a tree with changed sources adds "-dirty-<hash>". */
#ifndef AMALGAM_RESULTS_H
#define AMALGAM_RESULTS_H
#include "base.h"
#include <jansson.h>

enum { RESULTS_SCHEMA = 1 };

typedef struct {
    char commit[64];  /* 12 hex digits, or "unknown" outside git */
    char diff[24];    /* hash of the difference to it, "" when clean */
    char version[96]; /* commit, or commit-dirty-hash: the file name of its rows */
    /* "amd-epyc-2c-7f3a91c2": cpu, cores, a hash over cpu, memory and host name; with a GPU
     * "nvidia-h200-amd-epyc": nodes of one kind are one machine, whose rows hold the GPU's UUID. */
    char machine[96];
} identity;

/* Of this build and machine; the GPU is asked for by NVML. */
void identity_get(identity *out);
/* Everything worth knowing of host and build: cpu, cores, memory, kernel, governor, load, compiler,
 * flags, library versions. New reference; NULL when memory is short. */
json_t *identity_provenance(void);

/* Append one line to a file (made with its folders when missing) by a single write. A torn last
 * line left by a crash is closed first. IO names the path: nothing written before is touched. */
status results_append(const char *path, const char *line, size_t n);

/* Call `row` for each complete line that parses; others are counted in *n_broken (a torn last line
 * after a kill is expected and is no error). A missing file has no rows. */
status results_read(const char *path, status (*row)(void *user, const json_t *value), void *user,
                    int64_t *n_broken);
#endif
