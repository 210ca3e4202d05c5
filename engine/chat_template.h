/* chat_template.h - the part of Jinja in which checkpoints write their chat templates.
 *
 *     source --jinja_parse.c--> syntax tree --chat_template.c--> text
 *                                    values and filters: jinja_value.c
 *
 * Understood: if / elif / else, for (with filter, else, break, continue and `loop`), set (names,
 * several names, namespace attributes, blocks), macro, call, filter and generation blocks,
 * comments, whitespace control with trim_blocks and lstrip_blocks on; expressions with slices,
 * calls, tests, `~`, `in`, inline if, literals; the filters, tests, methods and functions of the
 * tables in jinja_value.c. Results are those of jinja2 as transformers sets it up (tojson does
 * not escape HTML and keeps the order of keys).
 *
 * Anything else is refused by name with its line, when the template is opened where the syntax
 * shows it and at rendering where only the values do. Templates and messages are untrusted:
 * nesting, steps, memory and output are bounded. */
#ifndef AMALGAM_CHAT_TEMPLATE_H
#define AMALGAM_CHAT_TEMPLATE_H
#include "json.h"

#ifdef __cplusplus
extern "C" {
#endif

enum {
    CHAT_TEMPLATE_SOURCE_MAX = 1 << 20,
    CHAT_TEMPLATE_OUTPUT_MAX = 16 << 20,
    CHAT_TEMPLATE_STEPS_MAX = 20000000, /* evaluated nodes and, by 64 bytes, copied text */
};

typedef struct chat_template chat_template;

/* Parse n bytes; `where` names them in messages ("tokenizer_config.json"). FORMAT, UNSUPPORTED
 * and RANGE with where:line; NOMEM. A template is read-only: any number of threads may render
 * with one. */
status chat_template_open(chat_template **out, const char *source, size_t n, const char *where);
void chat_template_close(chat_template *t); /* NULL is fine */

typedef struct {
    const json_t *messages;  /* array of objects with role and content */
    const json_t *tools;     /* array, or NULL: the variable is None */
    const json_t *variables; /* object of further ones (enable_thinking, …), or NULL */
    bool add_generation_prompt;
    const char *bos, *eos; /* "" when the tokenizer has none */
    int64_t now_s;         /* strftime_now: seconds since the epoch, shown as local time */
} chat_template_input;

/* Append the text. FORMAT with the line for what the template itself refuses (raise_exception)
 * and for operations that Python would refuse; UNSUPPORTED, RANGE (a limit), NOMEM. `out` may
 * then hold a part. */
status chat_template_render(const chat_template *t, const chat_template_input *in, text *out);

#ifdef __cplusplus
}
#endif
#endif
