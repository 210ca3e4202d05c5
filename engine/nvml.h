/* nvml.h - what the NVIDIA management library says of a GPU, read at run time: nothing of it is
 * needed to build or to start. */
#ifndef AMALGAM_NVML_H
#define AMALGAM_NVML_H
#include "base.h"

/* Of the first GPU that CUDA_VISIBLE_DEVICES leaves, at the moment of asking. -1 where the library
 * does not say. */
typedef struct {
    char name[96], driver[80], uuid[96];
    int32_t cuda_driver; /* 13000 = CUDA 13.0 */
    int32_t sm_clock_mhz, memory_clock_mhz, sm_clock_max_mhz;
    int32_t power_mw, power_limit_mw;
    int32_t temperature_c;
    int64_t throttle_bits; /* nvmlClocksEventReasons: 0 = none */
    int32_t n_processes;   /* that compute on it, this one included */
    int32_t ecc;           /* 1 on, 0 off */
    int64_t ecc_errors;    /* uncorrected, since the last reset of the counters */
    int64_t memory_bytes, memory_used_bytes;
} nvml_state;

/* NOTFOUND when the library cannot be loaded, DEVICE when it refuses. */
status nvml_read(nvml_state *out);

/* What the first entry of such a list names: a UUID (valid until the next call from this thread),
 * or NULL and the index, 0 without a list or a number. CUDA numbers by speed, this library by bus:
 * alike where all GPUs of a node are. */
const char *nvml_first_visible(const char *list, int32_t *index);

/* The same as one line of JSON without a newline; "" when there is no NVML. buf holds
 * NVML_JSON_MAX. */
enum { NVML_JSON_MAX = 1024 };
const char *nvml_json(char *buf);
#endif
