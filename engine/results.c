/* results.c - see results.h. */
#define _GNU_SOURCE
#include "results.h"

#include "json.h"
#include "nvml.h"
#include "version.h" /* generated: AMALGAM_COMMIT, AMALGAM_DIFF, AMALGAM_CC, AMALGAM_CFLAGS */

#include <ctype.h>
#include <errno.h>
#include <fcntl.h>
#include <lua.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/utsname.h>
#include <unistd.h>

/* First "key : value" line of /proc/cpuinfo with this key; "" when there is none. */
static void cpuinfo(const char *key, char *buf, size_t n) {
    buf[0] = 0;
    FILE *f = fopen("/proc/cpuinfo", "r");
    if (!f) return;
    char line[512];
    while (!buf[0] && fgets(line, sizeof line, f)) {
        char *colon = strchr(line, ':');
        if (!colon || strncmp(line, key, strlen(key)) != 0) continue;
        char *value = colon + 1;
        while (isspace((unsigned char)*value)) value++;
        value[strcspn(value, "\n")] = 0;
        snprintf(buf, n, "%s", value);
    }
    fclose(f);
}

static void first_line(const char *path, char *buf, size_t n) {
    buf[0] = 0;
    FILE *f = fopen(path, "r");
    if (!f) return;
    if (fgets(buf, (int)n, f)) buf[strcspn(buf, "\n")] = 0;
    fclose(f);
}

/* "AMD EPYC 7B13 (tm)" -> "amd-epyc-7b13-tm" */
static void slug(char *out, size_t n, const char *in) {
    size_t used = 0;
    for (; *in && used + 1 < n; in++) {
        if (isalnum((unsigned char)*in))
            out[used++] = (char)tolower((unsigned char)*in);
        else if (used && out[used - 1] != '-')
            out[used++] = '-';
    }
    while (used && out[used - 1] == '-') used--;
    out[used] = 0;
}

void identity_get(identity *out) {
    *out = (identity){0};
    snprintf(out->commit, sizeof out->commit, "%s", AMALGAM_COMMIT);
    snprintf(out->diff, sizeof out->diff, "%s", AMALGAM_DIFF);
    snprintf(out->version, sizeof out->version, out->diff[0] ? "%s-dirty-%s" : "%s%s", out->commit,
             out->diff);
    char cpu[256], name[48], host[256] = "";
    cpuinfo("model name", cpu, sizeof cpu);
    slug(name, sizeof name, cpu[0] ? cpu : "cpu");
    nvml_state gpu;
    if (nvml_read(&gpu) == ST_OK) {
        char kind[48];
        slug(kind, sizeof kind, gpu.name);
        snprintf(out->machine, sizeof out->machine, "%s-%s", kind, name);
        return;
    }
    gethostname(host, sizeof host - 1);
    const long cores = sysconf(_SC_NPROCESSORS_ONLN);
    uint64_t h = hash_bytes(cpu, strlen(cpu), 1);
    h = hash_bytes(host, strlen(host), h);
    h = hash_u64((uint64_t)sysconf(_SC_PHYS_PAGES), h);
    snprintf(out->machine, sizeof out->machine, "%s-%ldc-%08x", name, cores, (uint32_t)h);
}

json_t *identity_provenance(void) {
    char cpu[256], governor[64], load[128];
    cpuinfo("model name", cpu, sizeof cpu);
    first_line("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor", governor, sizeof governor);
    first_line("/proc/loadavg", load, sizeof load);
    struct utsname os = {0};
    uname(&os);
    json_t *all = json_pack("{s:s, s:i, s:I, s:s, s:s, s:s, s:s, s:s, s:s, s:s}", "cpu", cpu,
                            "cores", (int)sysconf(_SC_NPROCESSORS_ONLN), "memory_bytes",
                            (json_int_t)sysconf(_SC_PHYS_PAGES) * (json_int_t)sysconf(_SC_PAGESIZE),
                            "kernel", os.release, "governor", governor[0] ? governor : "unknown",
                            "load", load, "compiler", AMALGAM_CC, "flags", AMALGAM_CFLAGS,
                            "jansson", JANSSON_VERSION, "lua", LUA_RELEASE);
    char gpu[NVML_JSON_MAX]; /* as it is now: clocks, power, throttle bits, other processes, ECC */
    if (all && nvml_json(gpu)[0]) json_object_set_new(all, "gpu", json_loads(gpu, 0, NULL));
    return all;
}

status results_append(const char *path, const char *line, size_t n) {
    const char *slash = strrchr(path, '/');
    if (slash && slash != path) {
        char dir[4096];
        snprintf(dir, sizeof dir, "%.*s", (int)(slash - path), path);
        TRY(file_make_dirs(dir));
    }
    const int fd = open(path, O_RDWR | O_CREAT | O_APPEND | O_CLOEXEC, 0666);
    if (fd < 0) return FAIL(ST_IO, "%s: %s", path, strerror(errno));
    text whole = {0};
    const off_t end = lseek(fd, 0, SEEK_END);
    char last = '\n';
    if (end > 0 && pread(fd, &last, 1, end - 1) == 1 && last != '\n') text_add(&whole, "\n");
    text_bytes(&whole, line, n);
    text_add(&whole, "\n");
    status st = text_status(&whole);
    if (st == ST_OK) {
        ssize_t done;
        do done = write(fd, whole.data, whole.length);
        while (done < 0 && errno == EINTR);
        if (done < 0) {
            st = FAIL(ST_IO, "%s: %s", path, strerror(errno));
        } else if ((size_t)done < whole.length) {
            st = FAIL(ST_IO, "%s: %s", path, strerror(ENOSPC));
            if (ftruncate(fd, end) != 0) {
            } /* the row is lost either way; the next append closes it */
        }
    }
    if (close(fd) != 0 && st == ST_OK) st = FAIL(ST_IO, "%s: %s", path, strerror(errno));
    text_free(&whole);
    return st;
}

status results_read(const char *path, status (*row)(void *user, const json_t *value), void *user,
                    int64_t *n_broken) {
    *n_broken = 0;
    if (!file_exists(path)) return ST_OK;
    file_map m;
    TRY(file_map_open(&m, path));
    status st = ST_OK;
    for (size_t at = 0; at < m.size && st == ST_OK;) {
        const uint8_t *end = memchr(m.data + at, '\n', m.size - at);
        const size_t n = end ? (size_t)(end - m.data) - at : m.size - at;
        json_t *value = NULL;
        const status parsed = n ? json_parse(&value, (const char *)m.data + at, n, path) : ST_OK;
        if (parsed == ST_NOMEM)
            st = parsed;
        else if (value && json_is_object(value))
            st = row(user, value);
        else if (n)
            ++*n_broken;
        json_decref(value);
        at += n + 1;
    }
    file_map_close(&m);
    return st;
}
