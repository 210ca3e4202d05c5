/* fuzz_stream.c - what a server answers to the load generator: events cut anywhere, at bytes that the
 * first one chooses. The reader is private to load.c, hence included. */
#include "fuzz.h"

#include "../../engine/load.c"

static loader fixture;

int LLVMFuzzerInitialize(int *argc, char ***argv) {
    (void)argc;
    (void)argv;
    timeline_start_real(&fixture.clock);
    return 0;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t n) {
    static arena memory;
    enum { MAX_NEW = 1000 };
    if (n < 1) return 0;
    if (!memory.base && arena_open(&memory, 64 << 20) != ST_OK) abort();
    request_log log = {.n_prompt = 1};
    transfer t = {.loader = &fixture, .usage_tokens = -1, .usage_prompt = -1, .usage_cached = -1};
    const size_t step = (size_t)data[0] % 61 + 1;
    char *copy = malloc(n);
    if (!copy) abort();
    for (size_t at = 1; at < n; at += step) {
        const size_t piece = at + step < n ? step : n - at;
        memcpy(copy, data + at, piece);
        (void)on_data(copy, 1, piece, &t);
    }
    CHECK(t.n_events >= 0 && t.n_events <= (int32_t)n);
    arena_reset(&memory, 0);
    fixture.a = &memory;
    if (t.n_events > 0 && !t.failed && !usage_is_wrong(&t, MAX_NEW)) {
        CHECK(take_result(&fixture, &t, &log) == ST_OK);
        for (int32_t i = 1; i < log.n_output; i++) CHECK(log.token_ns[i] >= log.token_ns[i - 1]);
    }
    free(copy);
    text_free(&t.line);
    text_free(&t.rest);
    mem_free(t.event_ns);
    return 0;
}
