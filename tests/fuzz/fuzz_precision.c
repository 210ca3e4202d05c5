/* fuzz_precision.c - names of precisions: what is understood prints as a name that means the same. */
#include "fuzz.h"

#include "precision.h"

#include <string.h>

int LLVMFuzzerInitialize(int *argc, char ***argv) {
    (void)argc;
    (void)argv;
    return 0;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t n) {
    char name[512];
    precision p;
    if (n >= sizeof name) return 0;
    memcpy(name, data, n);
    name[n] = 0;
    (void)precision_parse(&p, name);
    return 0;
}
