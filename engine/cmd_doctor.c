/* cmd_doctor.c - `amalgam doctor`: what this machine has, and what is missing for what. */
#include "cli.h"
#include "device.h"
#include "results.h"

#include <stdlib.h>
#include <string.h>
#include <unistd.h>

static bool on_path(const char *program) {
    const char *path = getenv("PATH");
    char candidate[4096];
    while (path && *path) {
        const size_t n = strcspn(path, ":");
        snprintf(candidate, sizeof candidate, "%.*s/%s", (int)n, path, program);
        if (n && access(candidate, X_OK) == 0) return true;
        path += n + (path[n] == ':');
    }
    return false;
}

static void line(const char *what, bool good, const char *meaning) {
    printf("  %-28s %-8s %s\n", what, good ? "yes" : "no", meaning);
}

int cmd_doctor(int argc, char **argv) {
    const cli_option options[] = {{NULL, CLI_FLAG, NULL, NULL, NULL}};
    int32_t n = 0;
    const status st = cli_parse(argc - 1, argv + 1, "doctor", options, NULL, &n);
    if (st != ST_OK) return cli_exit(st);
    identity id;
    identity_get(&id);
    json_t *p = identity_provenance();
    printf("amalgam %s on %s\n", id.version, id.machine);
    if (p)
        printf("  %s, %lld cores, %.1f GiB, kernel %s, %s\n",
               json_string_value(json_object_get(p, "cpu")),
               (long long)json_integer_value(json_object_get(p, "cores")),
               (double)json_integer_value(json_object_get(p, "memory_bytes")) / (1 << 30),
               json_string_value(json_object_get(p, "kernel")),
               json_string_value(json_object_get(p, "compiler")));
    json_decref(p);
    printf("root %s\n", root_dir());
    char path[1200];
    line("experiments",
         file_exists(path_join(path, sizeof path, root_dir(), "experiments/amalgam.meta.lua")),
         "run, report, compare");
    line("tiny checkpoint",
         file_exists(path_join(path, sizeof path, root_dir(), "workloads/tiny/model.safetensors")),
         "e01 accuracy, e05 serving on the cpu");
    line("gnuplot", on_path("gnuplot"), "figures of the report");
    line("git", on_path("git"), "the commit in result rows, at build time");
    line("NVIDIA device node", file_exists("/dev/nvidia0"), "this version has no cuda device yet");
    printf("devices:");
    for (const device_ops *const *d = devices; *d; d++) printf(" %s", (*d)->name);
    printf("\n");
    return 0;
}
