/* fuzz_http_body.c - the first byte chooses the endpoint, the rest is the body that a client sent. */
#include "fuzz.h"

#include "api.h"

#include <string.h>

static tokenizer *tok;
static chat_template *tpl;

int LLVMFuzzerInitialize(int *argc, char ***argv) {
    (void)argc;
    (void)argv;
    static const char source[] =
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}{{ m.tool_calls }}{% endfor %}"
        "{{ tools | tojson }}{{ reasoning_effort }}";
    if (tokenizer_open(&tok, "tests/vectors/tokenizers/llama3") != ST_OK ||
        chat_template_open(&tpl, source, strlen(source), "fuzz") != ST_OK)
        abort();
    return 0;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t n) {
    if (n < 1) return 0;
    const api_model m = {.model = "m",
                         .tok = data[0] & 4 ? NULL : tok,
                         .tpl = tpl,
                         .bos = "<s>",
                         .eos = "</s>",
                         .ctx_max = 512,
                         .vocab = 1005,
                         .n_max = 4};
    const char *body = (const char *)data + 1;
    api_request r;
    ids list = {0};
    text words = {0};
    switch (data[0] & 3) {
    case 0:
    case 1:
        if (api_parse(&r, &m, data[0] & 1, body, n - 1, 7) == ST_OK) {
            for (int32_t i = 0; i < r.n_prompts; i++) {
                CHECK(r.prompt[i].length >= 1);
                CHECK(r.prompt[i].length + r.max_new[i] <= m.ctx_max);
            }
            CHECK(r.n >= 1 && r.n <= m.n_max);
            api_request_free(&r);
        } else {
            api_put_error(&words, 400, fail_message());
        }
        break;
    case 2: (void)api_tokenize(&list, &m, body, n - 1); break;
    default: (void)api_detokenize(&words, &m, body, n - 1); break;
    }
    ids_free(&list);
    text_free(&words);
    return 0;
}
