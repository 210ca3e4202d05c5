/* cmd_doctor.c - `amalgam doctor`: what this machine has, and what is missing for what. */
#include "cli.h"
#include "device.h"
#include "nccl.h"
#include "nvml.h"
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

/* What the cuda device needs, in the order in which it can be missing. */
static void gpu_lines(void) {
    const device_ops *cuda;
    nvml_state gpu;
    const bool built = device_find(&cuda, "cuda") == ST_OK;
    line("cuda device in this build", built, "make CUDA_ARCH=90a (needs nvcc 12.4 or newer)");
    line("NVIDIA device node", file_exists("/dev/nvidiactl"), "a GPU and its kernel driver");
    const bool driver = nvml_read(&gpu) == ST_OK;
    line("NVIDIA driver library", driver, driver ? gpu.driver : fail_message());
    if (driver)
        printf("  GPU 0: %s, %.1f GiB, %.1f in use, CUDA %d.%d, SM %d of %d MHz, %.0f W, throttle "
               "bits %llx\n",
               gpu.name, (double)gpu.memory_bytes / (1 << 30),
               (double)gpu.memory_used_bytes / (1 << 30), gpu.cuda_driver / 1000,
               gpu.cuda_driver % 1000 / 10, gpu.sm_clock_mhz, gpu.sm_clock_max_mhz,
               gpu.power_mw * 1e-3, (unsigned long long)gpu.throttle_bits);
    if (!built || !driver) return;
    device *d;
    const device_options o = {.tp = 1};
    const bool opens = cuda->open(&d, &o) == ST_OK;
    line("cuda device opens", opens, opens ? "--device cuda" : fail_message());
    if (opens) cuda->close(d);
    nccl lib;
    char version[64] = "";
    const bool found = nccl_load(&lib) == ST_OK;
    if (found)
        snprintf(version, sizeof version, "%d.%d.%d: --tp over the GPUs of this node",
                 lib.version / 10000, lib.version / 100 % 100, lib.version % 100);
    line("NCCL", found, found ? version : fail_message());
    if (found) nccl_unload(&lib);
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
    gpu_lines();
    printf("devices:");
    for (const device_ops *const *d = devices; *d; d++) printf(" %s", (*d)->name);
    printf("\n");
    return 0;
}
