/* devices.c - the table of devices, in the order they are listed to users. devices.def is written
 * by the Makefile: DEVICE(cuda) stands in it when CUDA was built. */
#include "device.h"
#include <string.h>

const device_ops *const devices[] = {
#define DEVICE(name) &device_##name,
#include "devices.def"
#undef DEVICE
    NULL,
};

status device_find(const device_ops **out, const char *name) {
    char names[128] = "";
    size_t used = 0;
    for (int32_t i = 0; devices[i]; i++) {
        if (!strcmp(devices[i]->name, name)) {
            *out = devices[i];
            return ST_OK;
        }
        const int n =
            snprintf(names + used, sizeof names - used, "%s%s", i ? ", " : "", devices[i]->name);
        CHECK(n > 0);
        used += (size_t)n;
        CHECK(used < sizeof names);
    }
    if (!strcmp(name, "cuda"))
        return FAIL(ST_UNSUPPORTED, "this build has no CUDA (make CUDA_ARCH=...); there are: %s",
                    names);
    return FAIL(ST_NOTFOUND, "no device named \"%s\"; there are: %s", name, names);
}

status device_computes(const char *name) {
    const device_ops *ops;
    TRY(device_find(&ops, name));
    if (ops->has_logits) return ST_OK;
    return FAIL(ST_UNSUPPORTED, "the %s device makes up its tokens; cpu and cuda compute them",
                name);
}

status device_family(int32_t *out, const char *name) {
    if (!name || !*name || !strcmp(name, "hopper"))
        *out = 0;
    else if (!strcmp(name, "ampere"))
        *out = 80;
    else
        return FAIL(ST_USAGE, "kernel family '%s' is neither ampere nor hopper", name);
    return ST_OK;
}
