/* fuzz_chat_template.c - a template from anybody: parsed, and rendered over a conversation with tools. */
#include "fuzz.h"

#include "chat_template.h"

#include <string.h>

static json_t *messages, *tools;

int LLVMFuzzerInitialize(int *argc, char ***argv) {
    (void)argc;
    (void)argv;
    messages =
        json_loads("[{\"role\":\"system\",\"content\":\"s\"},"
                   "{\"role\":\"user\",\"content\":\"u\\n\xC3\xA9\"},"
                   "{\"role\":\"assistant\",\"content\":\"<think>t</think>a\","
                   "\"tool_calls\":[{\"function\":{\"name\":\"f\",\"arguments\":{\"x\":1.5}}}]},"
                   "{\"role\":\"tool\",\"content\":\"r\"}]",
                   0, NULL);
    tools = json_loads(
        "[{\"type\":\"function\",\"function\":{\"name\":\"f\",\"parameters\":"
        "{\"properties\":{\"x\":{\"type\":\"array\",\"items\":{\"type\":\"number\"}}}}}}]",
        0, NULL);
    return 0;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t n) {
    chat_template *t;
    text out = {0};
    if (chat_template_open(&t, (const char *)data, n, "fuzz") == ST_OK) {
        const chat_template_input in = {.messages = messages,
                                        .tools = n % 2 ? tools : NULL,
                                        .add_generation_prompt = true,
                                        .bos = "<s>",
                                        .eos = "</s>",
                                        .now_s = 1753012800};
        (void)chat_template_render(t, &in, &out);
    }
    chat_template_close(t);
    text_free(&out);
    return 0;
}
