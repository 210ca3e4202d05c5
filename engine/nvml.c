/* nvml.c - see nvml.h. The few functions and structs below follow NVIDIA's NVML API reference; the
 * library keeps its interface stable by suffixes such as _v2. */
#include "nvml.h"

#include <dlfcn.h>
#include <stdlib.h>
#include <string.h>

typedef void *nvml_device;
typedef struct {
    unsigned long long total, free, used;
} nvml_memory;
typedef struct {
    unsigned pid;
    unsigned long long used;
    unsigned gpu_instance, compute_instance;
} nvml_process;

enum {
    CLOCK_SM = 1,
    CLOCK_MEMORY = 2,
    TEMPERATURE_GPU = 0,
    ECC_UNCORRECTED = 1,
    ECC_VOLATILE = 0,
    PROCESSES_MAX = 64,
    INSUFFICIENT_SIZE = 7, /* NVML_ERROR_INSUFFICIENT_SIZE: the count is right, the list is not */
};

/* X(field, name in the library, parameters): every function that is called. */
#define CALLS(X)                                                                                   \
    X(init, nvmlInit_v2, (void))                                                                   \
    X(shutdown, nvmlShutdown, (void))                                                              \
    X(driver, nvmlSystemGetDriverVersion, (char *, unsigned))                                      \
    X(cuda, nvmlSystemGetCudaDriverVersion, (int *))                                               \
    X(handle, nvmlDeviceGetHandleByIndex_v2, (unsigned, nvml_device *))                            \
    X(handle_of, nvmlDeviceGetHandleByUUID, (const char *, nvml_device *))                         \
    X(name, nvmlDeviceGetName, (nvml_device, char *, unsigned))                                    \
    X(uuid, nvmlDeviceGetUUID, (nvml_device, char *, unsigned))                                    \
    X(clock, nvmlDeviceGetClockInfo, (nvml_device, int, unsigned *))                               \
    X(clock_max, nvmlDeviceGetMaxClockInfo, (nvml_device, int, unsigned *))                        \
    X(power, nvmlDeviceGetPowerUsage, (nvml_device, unsigned *))                                   \
    X(power_limit, nvmlDeviceGetEnforcedPowerLimit, (nvml_device, unsigned *))                     \
    X(temperature, nvmlDeviceGetTemperature, (nvml_device, int, unsigned *))                       \
    X(throttle, nvmlDeviceGetCurrentClocksThrottleReasons, (nvml_device, unsigned long long *))    \
    X(processes, nvmlDeviceGetComputeRunningProcesses_v3,                                          \
      (nvml_device, unsigned *, nvml_process *))                                                   \
    X(ecc, nvmlDeviceGetEccMode, (nvml_device, int *, int *))                                      \
    X(ecc_errors, nvmlDeviceGetTotalEccErrors, (nvml_device, int, int, unsigned long long *))      \
    X(memory, nvmlDeviceGetMemoryInfo, (nvml_device, nvml_memory *))

typedef struct {
    void *library;
#define X(field, symbol, parameters) int(*field) parameters;
    CALLS(X)
#undef X
} nvml;

static bool load(nvml *n) {
    *n = (nvml){.library = dlopen("libnvidia-ml.so.1", RTLD_NOW | RTLD_LOCAL)};
    if (!n->library) return false;
        /* POSIX has data and function pointers alike; ISO C wants the detour. */
#define X(field, symbol, parameters) *(void **)(void *)&n->field = dlsym(n->library, #symbol);
    CALLS(X)
#undef X
    return n->init && n->shutdown && n->handle;
}

static void read_all(const nvml *n, nvml_device d, nvml_state *s) {
    unsigned u;
    unsigned long long big;
    int a, b;
    nvml_memory m;
    static nvml_process list[PROCESSES_MAX];
    if (n->driver) n->driver(s->driver, sizeof s->driver);
    if (n->cuda && !n->cuda(&a)) s->cuda_driver = a;
    if (n->name) n->name(d, s->name, sizeof s->name);
    if (n->uuid) n->uuid(d, s->uuid, sizeof s->uuid);
    if (n->clock && !n->clock(d, CLOCK_SM, &u)) s->sm_clock_mhz = (int32_t)u;
    if (n->clock && !n->clock(d, CLOCK_MEMORY, &u)) s->memory_clock_mhz = (int32_t)u;
    if (n->clock_max && !n->clock_max(d, CLOCK_SM, &u)) s->sm_clock_max_mhz = (int32_t)u;
    if (n->power && !n->power(d, &u)) s->power_mw = (int32_t)u;
    if (n->power_limit && !n->power_limit(d, &u)) s->power_limit_mw = (int32_t)u;
    if (n->temperature && !n->temperature(d, TEMPERATURE_GPU, &u)) s->temperature_c = (int32_t)u;
    if (n->throttle && !n->throttle(d, &big)) s->throttle_bits = (int64_t)big;
    if (n->ecc && !n->ecc(d, &a, &b)) s->ecc = a;
    if (n->ecc_errors && !n->ecc_errors(d, ECC_UNCORRECTED, ECC_VOLATILE, &big))
        s->ecc_errors = (int64_t)big;
    if (n->memory && !n->memory(d, &m)) {
        s->memory_bytes = (int64_t)m.total;
        s->memory_used_bytes = (int64_t)m.used;
    }
    u = PROCESSES_MAX;
    if (n->processes && (a = n->processes(d, &u, list), !a || a == INSUFFICIENT_SIZE))
        s->n_processes = (int32_t)u;
}

const char *nvml_first_visible(const char *list, int32_t *index) {
    static _Thread_local char uuid[96];
    char *end;
    *index = 0;
    if (!list) return NULL;
    while (*list == ' ') list++;
    const size_t n = strcspn(list, ", ");
    const long i = strtol(list, &end, 10);
    if (n > 0 && end == list + n && i >= 0 && i < INT32_MAX) *index = (int32_t)i;
    if ((strncmp(list, "GPU-", 4) && strncmp(list, "MIG-", 4)) || n >= sizeof uuid) return NULL;
    memcpy(uuid, list, n);
    uuid[n] = 0;
    return uuid;
}

/* NVML counts all GPUs, CUDA those that it is left. */
static bool first_visible(const nvml *n, nvml_device *d) {
    int32_t index;
    const char *uuid = nvml_first_visible(getenv("CUDA_VISIBLE_DEVICES"), &index);
    if (uuid && n->handle_of && n->handle_of(uuid, d) == 0) return true;
    return n->handle((unsigned)index, d) == 0;
}

status nvml_read(nvml_state *out) {
    nvml n;
    nvml_device d;
    *out = (nvml_state){.cuda_driver = -1,
                        .sm_clock_mhz = -1,
                        .memory_clock_mhz = -1,
                        .sm_clock_max_mhz = -1,
                        .power_mw = -1,
                        .power_limit_mw = -1,
                        .temperature_c = -1,
                        .throttle_bits = -1,
                        .n_processes = -1,
                        .ecc = -1,
                        .ecc_errors = -1,
                        .memory_bytes = -1,
                        .memory_used_bytes = -1};
    const bool loaded = load(&n);
    status st = loaded ? ST_OK : FAIL(ST_NOTFOUND, "no NVIDIA driver: libnvidia-ml.so.1");
    if (loaded) {
        if (n.init() != 0)
            st = FAIL(ST_DEVICE, "NVML does not start: no GPU, or driver and library differ");
        else {
            if (first_visible(&n, &d))
                read_all(&n, d, out);
            else
                st = FAIL(ST_DEVICE, "NVML lists no GPU");
            n.shutdown();
        }
    }
    if (n.library) dlclose(n.library);
    return st;
}

const char *nvml_json(char *buf) {
    nvml_state s;
    buf[0] = 0;
    if (nvml_read(&s) != ST_OK) return buf;
    const int n = snprintf(
        buf, NVML_JSON_MAX,
        "{\"name\":\"%s\",\"uuid\":\"%s\",\"driver\":\"%s\",\"cuda_driver\":%d,"
        "\"sm_clock_mhz\":%d,\"sm_clock_max_mhz\":%d,\"memory_clock_mhz\":%d,\"power_w\":%.1f,"
        "\"power_limit_w\":%.1f,\"temperature_c\":%d,\"throttle_bits\":%lld,\"processes\":%d,"
        "\"ecc\":%d,\"ecc_errors\":%lld,\"memory_bytes\":%lld,\"memory_used_bytes\":%lld}",
        s.name, s.uuid, s.driver, s.cuda_driver, s.sm_clock_mhz, s.sm_clock_max_mhz,
        s.memory_clock_mhz, s.power_mw * 1e-3, s.power_limit_mw * 1e-3, s.temperature_c,
        (long long)s.throttle_bits, s.n_processes, s.ecc, (long long)s.ecc_errors,
        (long long)s.memory_bytes, (long long)s.memory_used_bytes);
    CHECK(n > 0 && n < NVML_JSON_MAX);
    return buf;
}
