/* cmd_sampling.h - how tokens are drawn, as options of the commands that write text. */
#ifndef AMALGAM_CMD_SAMPLING_H
#define AMALGAM_CMD_SAMPLING_H
#include "cli.h"
#include "request.h"

/* Filled by the rows of cmd_sampling.def. */
typedef struct {
    double temperature, top_p, min_p, repetition, presence, frequency;
    int64_t top_k, seed; /* top_k fits 32 bits: see cli_check */
} cmd_sampling;

/* For sampling_check, which knows the limits of the others. */
static inline sampling cmd_sampling_of(const cmd_sampling *s) {
    return (sampling){.temperature = (float)s->temperature,
                      .top_k = (int32_t)s->top_k,
                      .top_p = (float)s->top_p,
                      .min_p = (float)s->min_p,
                      .repetition_penalty = (float)s->repetition,
                      .presence_penalty = (float)s->presence,
                      .frequency_penalty = (float)s->frequency,
                      .seed = (uint64_t)s->seed,
                      .n_logprobs = -1};
}
#endif
