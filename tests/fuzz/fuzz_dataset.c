/* fuzz_dataset.c - the first byte chooses the format, the rest is a trace from anybody. */
#include "fuzz.h"

#include "dataset.h"

int LLVMFuzzerInitialize(int *argc, char ***argv) {
    (void)argc;
    (void)argv;
    return 0;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t n) {
    static const char *const formats[] = {"sharegpt", "burstgpt", "azure", "mooncake", "jsonl"};
    if (n < 1) return 0;
    const dataset_options o = {.format = formats[data[0] % 5], .vocab = 1000, .n_max = 100};
    dataset d;
    if (dataset_read(&d, fuzz_file(data + 1, n - 1), &o) == ST_OK) dataset_free(&d);
    return 0;
}
