/* fuzz_trace.c - a recorded run from anybody: replayed to its end, or to what is wrong with it. */
#include "fuzz.h"

#include "trace.h"

int LLVMFuzzerInitialize(int *argc, char ***argv) {
    (void)argc;
    (void)argv;
    return 0;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t n) {
    int64_t steps, different;
    (void)trace_replay(fuzz_file(data, n), &steps, &different);
    CHECK(different <= steps);
    return 0;
}
