/* fuzz_safetensors.c - a file of tensors from anybody. */
#include "fuzz.h"

#include "safetensors.h"

int LLVMFuzzerInitialize(int *argc, char ***argv) {
    (void)argc;
    (void)argv;
    return 0;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t n) {
    safetensors *s = NULL;
    if (safetensors_open(&s, fuzz_file(data, n)) == ST_OK) safetensors_close(s);
    return 0;
}
