/* cmd_inspect.c - `amalgam inspect model|plan|trace`: what the engine holds, as text. */
#include "cli.h"
#include "engine.h"
#include "trace.h"

#include <string.h>

/* Operations of one step on a device, with its own explanation of each (kernel, predicted cost). */
static status inspect_plan(int argc, char **argv) {
    engine_options o = ENGINE_OPTIONS_DEFAULT;
    o.model = NULL;
    o.device = "sim";
    int64_t tokens = 1, samples = 0, tp = 1;
    const char *family = NULL;
    const cli_option options[] = {
        {"--model", CLI_TEXT, &o.model, "NAME", "folder, or one of `amalgam models`"},
        {"--precision", CLI_TEXT, &o.precision, "NAME", "W16A16KV16"},
        {"--device", CLI_TEXT, &o.device, "NAME", "sim"},
        {"--gpu", CLI_TEXT, &o.device_options.gpu, "NAME", "data sheet, for sim"},
        {"--tp", CLI_INT, &tp, "N", "GPUs (1)"},
        {"--kernel-family", CLI_TEXT, &family, "F", "cuda: ampere or hopper"},
        {"--tokens", CLI_INT, &tokens, "T", "of the step (1)"},
        {"--samples", CLI_INT, &samples, "N", "rows whose logits are wanted (T, at most 256)"},
        {"--synthetic", CLI_FLAG, &o.synthetic, NULL, "seeded weights"},
        {NULL, CLI_FLAG, NULL, NULL, NULL},
    };
    int32_t n = 0;
    TRY(cli_parse(argc, argv, "inspect plan --model NAME [options]", options, NULL, &n));
    if (!o.model) return FAIL(ST_USAGE, "inspect plan needs --model");
    const cli_range ranges[] = {{"--tokens", tokens, 1, o.policy.token_budget},
                                {"--samples", samples, 0, i64_min(tokens, o.policy.max_seqs)},
                                {"--tp", tp, 1, 64}};
    TRY(cli_check(ranges, COUNT_OF(ranges)));
    o.device_options.tp = (int32_t)tp;
    TRY(device_family(&o.device_options.kernel_family, family));
    if (samples < 1) samples = i64_min(tokens, o.policy.max_seqs);
    engine *e;
    TRY(engine_open(&e, &o, NULL, NULL));
    text out = {0};
    forward_explain(engine_forward(e), (int32_t)tokens, (int32_t)samples, &out);
    const status st = text_status(&out);
    if (st == ST_OK) fputs(out.data ? out.data : "", stdout);
    text_free(&out);
    engine_close(e);
    return st;
}

static status inspect_trace(int argc, char **argv) {
    const cli_option options[] = {{NULL, CLI_FLAG, NULL, NULL, NULL}};
    const char *path[1];
    int32_t n = 1;
    TRY(cli_parse(argc, argv, "inspect trace FILE", options, path, &n));
    if (n != 1) return FAIL(ST_USAGE, "inspect trace needs a file");
    int64_t steps, different;
    TRY(trace_replay(path[0], &steps, &different));
    printf("%lld steps replayed, %lld batches differ\n", (long long)steps, (long long)different);
    return different ? FAIL(ST_DEVICE, "%lld batches differ", (long long)different) : ST_OK;
}

int cmd_inspect(int argc, char **argv) {
    const char *what = argc > 1 ? argv[1] : "";
    if (strcmp(what, "model") == 0) return cmd_inspect_model(argc - 1, argv + 1);
    if (strcmp(what, "plan") == 0) return cli_exit(inspect_plan(argc - 2, argv + 2));
    if (strcmp(what, "trace") == 0) return cli_exit(inspect_trace(argc - 2, argv + 2));
    if (strcmp(what, "--help") == 0 || strcmp(what, "-h") == 0) {
        puts("usage: amalgam inspect model|plan|trace ... (each takes --help)");
        return 0;
    }
    return cli_exit(FAIL(ST_USAGE, "inspect needs one of: model, plan, trace%s%s",
                         what[0] ? ", not " : "", what));
}
