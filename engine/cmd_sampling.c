/* cmd_sampling.c - see cmd_sampling.h. */
#include "cmd_sampling.h"

#include "sampler.h"

#include <string.h>

static status read_bias(const char *words, logit_bias *out) {
    char id[24];
    int64_t token;
    double bias;
    const char *equals = strchr(words, '=');
    const size_t n = equals ? (size_t)(equals - words) : 0;
    if (n > 0 && n < sizeof id) {
        memcpy(id, words, n);
        id[n] = 0;
        if (parse_i64(id, 0, INT32_MAX, &token) && parse_f64(equals + 1, -100, 100, &bias)) {
            *out = (logit_bias){.token = (int32_t)token, .bias = (float)bias};
            return ST_OK;
        }
    }
    return FAIL(ST_USAGE, "--logit-bias %s is not ID=BIAS, a token id and -100 to 100", words);
}

status cmd_sampling_check(cmd_sampling *s) {
    const cli_range top_k = {"--top-k", s->top_k, 0, 1 << 24};
    TRY(cli_check(&top_k, 1));
    for (int32_t i = 0; i < s->bias_words.n; i++)
        TRY(read_bias(s->bias_words.item[i], &s->bias[i]));
    logit_bias_sort(s->bias, s->bias_words.n);
    const sampling all = cmd_sampling_of(s);
    return sampling_check(&all);
}

sampling cmd_sampling_of(const cmd_sampling *s) {
    return (sampling){.temperature = (float)s->temperature,
                      .top_k = (int32_t)s->top_k,
                      .top_p = (float)s->top_p,
                      .min_p = (float)s->min_p,
                      .repetition_penalty = (float)s->repetition,
                      .presence_penalty = (float)s->presence,
                      .frequency_penalty = (float)s->frequency,
                      .seed = (uint64_t)s->seed,
                      .n_bias = s->bias_words.n,
                      .bias = s->bias,
                      .n_logprobs = -1};
}
