/* bandwidth.h - the rate at which a GPU reads its memory: the ceiling that benchmarks are held
 * against. */
#ifndef AMALGAM_BANDWIDTH_H
#define AMALGAM_BANDWIDTH_H
#include "kernel.h"

#ifdef __cplusplus
extern "C" {
#endif

/* Read `bytes` (a multiple of 16) of device memory once, 16 bytes a thread at a time, and add all
 * up into *sum (device, one u32) when it is one value in 2^32, so that no read can be left out.
 * Asynchronous. */
status kernel_read(uint32_t *sum, const void *from, int64_t bytes, int32_t n_sms,
                   kernel_stream stream);

#ifdef __cplusplus
}
#endif
#endif
