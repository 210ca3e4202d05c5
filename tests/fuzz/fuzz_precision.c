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
    static precision p; /* large */
    if (n >= sizeof name) return 0;
    memcpy(name, data, n);
    name[n] = 0;
    if (precision_parse(&p, name) != ST_OK) return 0;
    static char printed[PRECISION_NAME_MAX], again[PRECISION_NAME_MAX];
    static precision q;
    CHECK(precision_parse(&q, precision_name(&p, printed)) == ST_OK);
    CHECK(strcmp(precision_name(&q, again), printed) == 0);
    return 0;
}
