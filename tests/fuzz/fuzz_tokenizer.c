/* fuzz_tokenizer.c - a tokenizer.json from anybody: opened, and a text there and back. */
#include "fuzz.h"

#include "tokenizer.h"

#include <string.h>

int LLVMFuzzerInitialize(int *argc, char ***argv) {
    (void)argc;
    (void)argv;
    return 0;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t n) {
    static const char words[] = "Hello there,\n caf\xC3\xA9 \xF0\x9F\x99\x82 123 \xFF<s>";
    tokenizer *t;
    if (tokenizer_open(&t, fuzz_folder("tokenizer.json", data, n)) != ST_OK) return 0;
    ids list = {0};
    text back = {0};
    if (tokenizer_encode(t, words, strlen(words), 3, &list) == ST_OK)
        (void)tokenizer_decode(t, list.data, list.length, false, &back);
    ids_free(&list);
    text_free(&back);
    tokenizer_close(t);
    return 0;
}
