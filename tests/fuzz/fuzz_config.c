/* fuzz_config.c - a config.json from anybody. */
#include "fuzz.h"

#include "model.h"

int LLVMFuzzerInitialize(int *argc, char ***argv) {
    (void)argc;
    (void)argv;
    return 0;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t n) {
    static model_config c; /* large */
    (void)model_config_parse(&c, (const char *)data, n, "fuzz");
    return 0;
}
