/* cmd_quantise.c - `amalgam quantize`: a 16-bit checkpoint into a quantised one. */
#include "cli.h"
#include "corpus.h"
#include "progress.h"
#include "quantise.h"
#include "tokenizer.h"

typedef struct {
    const char *model, *out, *method, *format, *layout, *text_path, *device;
    int64_t tokens, threads, seed;
    double damp;
    bool no_act_order;
} arguments;

static void show(void *user, int64_t done, int64_t total) {
    (void)total;
    progress_show(user, done, "");
}

/* Text given, or of the seeded generator under a training seed. */
static status calibration(const arguments *a, const char *dir, ids *out) {
    tokenizer *t;
    char *words = NULL;
    size_t n = 0;
    text made = {0};
    TRY(tokenizer_open(&t, dir));
    status st = a->text_path ? file_read(&words, &n, a->text_path)
                             : corpus_text(&made, NULL, (uint64_t)a->seed, (size_t)a->tokens * 6);
    if (st == ST_OK)
        st = a->text_path
                 ? tokenizer_encode(t, words, n, TOKENIZER_PARSE_SPECIAL, out)
                 : tokenizer_encode(t, made.data, made.length, TOKENIZER_PARSE_SPECIAL, out);
    if (st == ST_OK && out->length > a->tokens) out->length = a->tokens;
    mem_free(words);
    text_free(&made);
    tokenizer_close(t);
    return st;
}

/* What a method does not read, and what no checkpoint holds, is refused, not dropped. */
static status check_use(const arguments *a, const quantise_options *o) {
    const precision *p = &o->precision;
    if (p->act != AF_16 || p->kv.k != KF_16 || p->kv.v != KF_16 || p->n_kv_layers > 0)
        return FAIL(ST_USAGE,
                    "--precision %s: a checkpoint has weights alone; activations and cache are "
                    "chosen where it runs",
                    a->format);
    if (o->method == QUANTISE_RTN && a->text_path)
        return FAIL(ST_USAGE, "--calibration is of gptq and awq: rtn reads no text");
    if (o->method != QUANTISE_GPTQ && a->no_act_order)
        return FAIL(ST_USAGE, "--no-act-order is of gptq");
    return ST_OK;
}

static status run(const arguments *a) {
    quantise_options o = QUANTISE_OPTIONS_DEFAULT;
    char dir[1024];
    ids tokens = {0};
    TRY(quantise_method_parse(&o.method, a->method));
    TRY(save_layout_parse(&o.layout, a->layout));
    TRY(precision_parse(&o.precision, a->format));
    TRY(check_use(a, &o));
    TRY(model_dir(dir, sizeof dir, a->model));
    if (o.method != QUANTISE_RTN) TRY(calibration(a, dir, &tokens));
    progress bar;
    progress_start(&bar, "quantize", 1);
    o.model = dir;
    o.out = a->out;
    o.device = a->device;
    o.threads = (int32_t)a->threads;
    o.token = tokens.data;
    o.n_tokens = tokens.length;
    o.damp = a->damp;
    o.act_order = !a->no_act_order;
    o.progress = show;
    o.user = &bar;
    model_config *c = mem_alloc(1, sizeof *c);
    status st = c ? model_config_load(c, dir) : FAIL(ST_NOMEM, "config");
    if (st == ST_OK) bar.total = c->n_layers;
    mem_free(c);
    if (st == ST_OK) st = quantise_checkpoint(&o);
    progress_end(&bar);
    ids_free(&tokens);
    return st;
}

int cmd_quantise(int argc, char **argv) {
    arguments a = {.method = "rtn",
                   .format = "W4",
                   .layout = "compressed-tensors",
                   .device = "cpu",
                   .tokens = 16384,
                   .damp = 0.01};
    const cli_option options[] = {
        {"--model", CLI_TEXT, &a.model, "DIR", "16-bit checkpoint"},
        {"--out", CLI_TEXT, &a.out, "DIR", "folder to write"},
        {"--method", CLI_TEXT, &a.method, "NAME", "rtn, gptq or awq (rtn)"},
        {"--precision", CLI_TEXT, &a.format, "NAME", "weight format: W4, W4g64sym, W8, WFP8 (W4)"},
        {"--layout", CLI_TEXT, &a.layout, "NAME",
         "compressed-tensors, awq, gptq, gptq_v2, fp8, modelopt, gpt-oss"},
        {"--calibration", CLI_TEXT, &a.text_path, "FILE", "text (the seeded corpus)"},
        {"--tokens", CLI_INT, &a.tokens, "N", "of it at most (16384)"},
        {"--seed", CLI_INT, &a.seed, "N", "of the corpus (0)"},
        {"--damp", CLI_NUMBER, &a.damp, "X", "gptq: of the mean diagonal (0.01)"},
        {"--no-act-order", CLI_FLAG, &a.no_act_order, NULL, "gptq: columns as they come"},
        {"--device", CLI_TEXT, &a.device, "NAME", "of gptq and awq: cpu or cuda (cpu)"},
        {"--threads", CLI_INT, &a.threads, "N", "0 = all cores"},
        {NULL, CLI_FLAG, NULL, NULL, NULL},
    };
    int32_t n_args = 0;
    status st = cli_parse(argc - 1, argv + 1, "quantize --model DIR --out DIR [options]", options,
                          NULL, &n_args);
    if (st == ST_OK && (!a.model || !a.out))
        st = FAIL(ST_USAGE, "quantize needs --model and --out");
    const cli_range ranges[] = {{"--tokens", a.tokens, 2, 1 << 24},
                                {"--threads", a.threads, 0, 1024},
                                {"--seed", a.seed, 0, INT64_MAX}};
    if (st == ST_OK) st = cli_check(ranges, COUNT_OF(ranges));
    if (st == ST_OK && !(a.damp >= 0 && a.damp <= 10))
        st = FAIL(ST_USAGE, "--damp is outside 0 to 10");
    return cli_exit(st == ST_OK ? run(&a) : st);
}
