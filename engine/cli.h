/* cli.h - options of a command: one table says names, types and help, and fills the variables. */
#ifndef AMALGAM_CLI_H
#define AMALGAM_CLI_H
#include "base.h"

typedef enum { CLI_FLAG, CLI_TEXT, CLI_INT, CLI_NUMBER, CLI_TEXTS } cli_kind;

typedef struct {
    const char *name; /* "--model" */
    cli_kind kind;
    void *out;         /* bool, const char *, int64_t, double, cli_texts: holds the default */
    const char *value; /* what the help shows after it: "DIR"; NULL for flags */
    const char *help;
} cli_option;

enum { CLI_TEXTS_MAX = 32 };
typedef struct { /* an option that may be repeated */
    const char *item[CLI_TEXTS_MAX];
    int32_t n;
} cli_texts;

/* Read argv[0..argc) (without the command itself). The table ends with a NULL name. Up to *n_args
 * plain arguments go to args; *n_args becomes their number. USAGE with the reason for anything
 * unknown, missing or out of form. "--help" prints `usage` and the table, and returns INTERRUPTED.
  */
status cli_parse(int argc, char **argv, const char *usage, const cli_option *options,
                 const char **args, int32_t *n_args);

/* The number of an option, and its limits. */
typedef struct {
    const char *name; /* "--tp" */
    int64_t value, lo, hi;
} cli_range;

/* USAGE, naming the first of n that is outside of its limits. */
status cli_check(const cli_range *r, int32_t n);

/* Of the n names, which lie `stride` bytes apart, the one with the fewest letters to change, insert
 * or leave out to make the first `length` of `word` of it; the first of several. NULL where n = 0.
 */
const char *nearest_name(const char *word, size_t length, const char *const *name, size_t stride,
                         int32_t n);

/* For a command's return: prints the recorded failure to standard error (where AMALGAM_DEBUG is set
 * with the place in the source that it comes from) and gives the exit status:
 * 0 for OK and --help, 2 for USAGE (and what a user can mend in the input), 3 for what does not fit
 * the device's memory, 4 for what the device or the build cannot do, 1 for the rest. */
int cli_exit(status st);

/* The commands (main.c). argv[0] is the command's name. */
int cmd_corpus(int argc, char **argv);
int cmd_doctor(int argc, char **argv);
int cmd_evaluate(int argc, char **argv);
int cmd_formats(int argc, char **argv);
int cmd_generate(int argc, char **argv);
int cmd_bench(int argc, char **argv);
int cmd_bench_load(int argc, char **argv);
int cmd_bench_serve(int argc, char **argv);
int cmd_bench_step(int argc, char **argv);
int cmd_chat(int argc, char **argv);
int cmd_inspect(int argc, char **argv);
int cmd_inspect_model(int argc, char **argv);
int cmd_models(int argc, char **argv);
int cmd_quantise(int argc, char **argv);
int cmd_serve(int argc, char **argv);
int cmd_tokenize(int argc, char **argv);

/* Rows of `amalgam bench` that need CUDA: linked where the build has it (bench.def). */
int bench_attention(int argc, char **argv);
int bench_linear(int argc, char **argv);
int bench_ops(int argc, char **argv);
int bench_tune(int argc, char **argv);
#endif
