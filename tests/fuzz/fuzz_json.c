/* fuzz_json.c - JSON from anybody: what is read, and written as a line, reads as the same. */
#include "fuzz.h"

#include "json.h"

#include <string.h>

int LLVMFuzzerInitialize(int *argc, char ***argv) {
    (void)argc;
    (void)argv;
    return 0;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t n) {
    static const char *const keys[] = {"a", "b", "c"};
    json_t *v, *again;
    if (json_parse(&v, (const char *)data, n, "fuzz") != ST_OK) return 0;
    for (int32_t i = 0; i < COUNT_OF(keys); i++) {
        int64_t wide = 1;
        int32_t narrow = 1;
        double real = 0.5;
        bool flag = false;
        const char *s = "";
        if (json_get_i64(v, keys[i], "fuzz", -5, 1LL << 60, &wide) == ST_OK) CHECK(wide >= -5);
        if (json_get_i32(v, keys[i], "fuzz", 0, 9, &narrow) == ST_OK)
            CHECK(narrow >= 0 && narrow <= 9);
        if (json_get_f64(v, keys[i], "fuzz", 0, 1, &real) == ST_OK) CHECK(real >= 0 && real <= 1);
        (void)json_get_bool(v, keys[i], "fuzz", &flag);
        (void)json_get_string(v, keys[i], "fuzz", &s);
    }
    char *line = json_line(v);
    CHECK(line != NULL);
    CHECK(strchr(line, '\n') == NULL);
    CHECK(json_parse(&again, line, strlen(line), "again") == ST_OK);
    CHECK(json_equal(v, again));
    free(line);
    json_decref(again);
    json_decref(v);
    return 0;
}
