/* cmd_sampling.h - how tokens are drawn, as options of the commands that write text. */
#ifndef AMALGAM_CMD_SAMPLING_H
#define AMALGAM_CMD_SAMPLING_H
#include "cli.h"
#include "request.h"

/* Filled by the rows of cmd_sampling.def, and `bias` by the check. */
typedef struct {
    double temperature, top_p, min_p, repetition, presence, frequency;
    int64_t top_k, seed;
    cli_texts bias_words; /* "ID=BIAS" */
    logit_bias bias[CLI_TEXTS_MAX];
} cmd_sampling;

/* Read what is given as words. USAGE or RANGE, naming the option or the parameter. */
status cmd_sampling_check(cmd_sampling *s);

/* After the check; its bias lies in `s`. */
sampling cmd_sampling_of(const cmd_sampling *s);
#endif
