/* cmd_models.c - `amalgam models`, and `amalgam inspect model`: what a config.json comes to. */
#include "cli.h"
#include "json.h"
#include "weights.h"

#include <string.h>

static const double GiB = 1 << 30;

/* --- models ----------------------------------------------------------------------------------- */

/* Precisions of the size columns. gpt-oss is 2880 wide, no multiple of 128: MXFP4 stands in. */
static status four_bit(precision *p, const model_config *c) {
    TRY(precision_parse(p, "W4"));
    if (model_fits_precision(c, p, 1) != ST_OK) TRY(precision_parse(p, "WMXFP4"));
    return ST_OK;
}

static status model_row(const char *name, bool json) {
    model_config c;
    precision w16, w4;
    TRY(model_config_load(&c, name));
    TRY(precision_parse(&w16, "W16"));
    TRY(four_bit(&w4, &c));
    const int64_t total = model_parameters(&c), active = model_active_parameters(&c);
    const int64_t bytes16 = model_weight_bytes(&c, &w16, 1),
                  bytes4 = model_weight_bytes(&c, &w4, 1);
    const int64_t kv = model_kv_token_bytes(&c, &w16, 1);
    const int32_t ffn = c.n_experts ? c.expert_dim : c.ffn_dim;
    if (json)
        return json_put(json_pack(
            "{s:s, s:s, s:i, s:i, s:i, s:i, s:i, s:i, s:i, s:i, s:i, s:i, s:I, s:I, s:I, s:s, s:I, "
            "s:I}",
            "name", c.name, "arch", c.arch, "layers", c.n_layers, "dim", c.dim, "heads", c.n_heads,
            "kv_heads", c.n_kv_heads, "head_dim", c.head_dim, "ffn_dim", ffn, "experts",
            c.n_experts, "experts_per_token", c.top_k, "vocab", c.vocab, "ctx_max", c.ctx_max,
            "parameters", (json_int_t)total, "active_parameters", (json_int_t)active, "w16_bytes",
            (json_int_t)bytes16, "four_bit_format", weight_format_text(w4.weight), "four_bit_bytes",
            (json_int_t)bytes4, "kv16_bytes_per_token", (json_int_t)kv));
    char experts[32] = "-";
    if (c.n_experts) snprintf(experts, sizeof experts, "%d/%d", c.top_k, c.n_experts);
    printf("%-18s %6d %6d %5d %4d %4d %6d %8s %7d %9.3f %8.3f %8.1f %7.1f%s %7.1f\n", c.name,
           c.n_layers, c.dim, c.n_heads, c.n_kv_heads, c.head_dim, ffn, experts, c.vocab,
           (double)total / 1e9, (double)active / 1e9, (double)bytes16 / GiB, (double)bytes4 / GiB,
           w4.weight == WF_MXFP4 ? "m" : " ", (double)kv / 1024);
    return ST_OK;
}

int cmd_models(int argc, char **argv) {
    bool json = false;
    const cli_option options[] = {
        {"--json", CLI_FLAG, &json, NULL, "one object a line"},
        {NULL, CLI_FLAG, NULL, NULL, NULL},
    };
    arena a;
    const char **names;
    int32_t n = 0;
    status st = cli_parse(argc - 1, argv + 1, "models [--json]", options, NULL, &n);
    if (st == ST_OK) st = arena_open(&a, 1 << 20);
    if (st != ST_OK) return cli_exit(st);
    st = model_names(&a, &names, &n);
    if (st == ST_OK && !json)
        printf("%-18s %6s %6s %5s %4s %4s %6s %8s %7s %9s %8s %8s %7s  %7s\n", "model", "layers",
               "dim", "heads", "kv", "hd", "ffn", "experts", "vocab", "params B", "active B",
               "W16 GiB", "W4 GiB", "KV KiB");
    for (int32_t i = 0; st == ST_OK && i < n; i++) st = model_row(names[i], json);
    if (st == ST_OK && !json)
        puts("W4: group 128, m = MXFP4 instead; embedding and head stay 16 bit. KV: 16 bit, one "
             "token, all layers.");
    arena_close(&a);
    return cli_exit(st);
}

/* --- inspect model ---------------------------------------------------------------------------- */

typedef struct {
    const char *model, *precision;
    int32_t tp;
    bool json;
} inspect_options;

typedef struct {
    const model_config *c;
    const precision *p;
    const checkpoint *files; /* synthetic when the folder has no weights */
    const inspect_options *o;
    int64_t total;
} inspection;

static status weight_row(inspection *v, weight_field f) {
    if (!weight_field_present(v->c, f)) return ST_OK;
    weight_source source;
    TRY(checkpoint_source(v->files, f, 0, &source));
    const weight_shape s = weight_shape_shard(v->c, f, source.shape, v->o->tp);
    const int64_t bytes = weight_shape_bytes(&s, v->p, v->c->type);
    const int32_t times = f < 0 ? 1 : v->c->n_layers;
    char format[16];
    const bool quantised = s.quantise && v->p->weight != WF_16;
    snprintf(format, sizeof format, "%s%s", quantised ? "W" : "",
             quantised ? weight_format_text(v->p->weight) : dtype_text(v->c->type));
    v->total += bytes * times;
    if (v->o->json)
        return json_put(json_pack("{s:s, s:i, s:i, s:i, s:i, s:b, s:s, s:I, s:s}", "weight",
                                  weight_field_text(f), "layers", times, "n", s.n, "k", s.k,
                                  "count", s.count, "bias", s.has_bias, "format", format, "bytes",
                                  (json_int_t)bytes, "tensor", source.name));
    printf("%-16s %4d x %8d %8d %5d %5s %7s %15lld  %s\n", weight_field_text(f), times, s.n, s.k,
           s.count, s.has_bias ? "bias" : "", format, (long long)bytes, source.name);
    return ST_OK;
}

static status print_weights(inspection *v) {
    if (!v->o->json)
        printf("%-16s %6s %8s %8s %5s %5s %7s %15s  %s\n", "weight", "layers", "n", "k", "count",
               "", "format", "bytes", "first tensor");
    TRY(weight_row(v, WEIGHT_embed));
    for (int32_t f = 0; f < WEIGHT_COUNT; f++) TRY(weight_row(v, (weight_field)f));
    TRY(weight_row(v, WEIGHT_norm));
    TRY(weight_row(v, WEIGHT_head));
    v->total = checkpoint_weight_bytes(v->files, v->p, v->o->tp); /* layers may differ */
    char name[PRECISION_NAME_MAX];
    const int64_t kv = model_kv_token_bytes(v->c, v->p, v->o->tp);
    if (v->o->json)
        return json_put(json_pack("{s:s, s:s, s:s, s:i, s:I, s:I, s:I, s:I}", "model", v->c->name,
                                  "arch", v->c->arch, "precision", precision_name(v->p, name), "tp",
                                  v->o->tp, "parameters", (json_int_t)model_parameters(v->c),
                                  "active_parameters", (json_int_t)model_active_parameters(v->c),
                                  "rank_bytes", (json_int_t)v->total, "kv_bytes_per_token",
                                  (json_int_t)kv));
    printf("%s (%s), %s, rank of tp %d: %.3f GiB of weights, %.1f KiB of KV cache a token; %.3f B "
           "parameters, %.3f B active\n",
           v->c->name, v->c->arch, precision_name(v->p, name), v->o->tp, (double)v->total / GiB,
           (double)kv / 1024, (double)model_parameters(v->c) / 1e9,
           (double)model_active_parameters(v->c) / 1e9);
    return ST_OK;
}

/* A folder with config.json alone is inspected as synthetic; one with broken weights is an error.
 */
static status open_weights(checkpoint **out, const model_config *c, const char *model) {
    char dir[4096], single[4400], sharded[4400];
    TRY(model_dir(dir, sizeof dir, model));
    snprintf(single, sizeof single, "%s/model.safetensors", dir);
    snprintf(sharded, sizeof sharded, "%s/model.safetensors.index.json", dir);
    const bool weights = file_exists(single) || file_exists(sharded);
    return checkpoint_open(out, c, weights ? dir : NULL, 0);
}

static status inspect_model(const inspect_options *o) {
    model_config c;
    precision p;
    checkpoint *files = NULL;
    TRY(model_config_load(&c, o->model));
    TRY(open_weights(&files, &c, o->model));
    status st = checkpoint_parse_precision(files, &p, o->precision);
    if (st == ST_OK) st = model_fits_precision(&c, &p, o->tp);
    if (st == ST_OK) st = print_weights(&(inspection){.c = &c, .p = &p, .files = files, .o = o});
    checkpoint_close(files);
    return st;
}

/* argv[0] is "model". */
int cmd_inspect_model(int argc, char **argv) {
    inspect_options o = {.precision = "auto"};
    int64_t tp = 1;
    const cli_option options[] = {
        {"--model", CLI_TEXT, &o.model, "DIR",
         "checkpoint folder, or a name under workloads/models"},
        {"--precision", CLI_TEXT, &o.precision, "NAME", "auto: weights as stored"},
        {"--tp", CLI_INT, &tp, "N", "GPUs that share it (1)"},
        {"--json", CLI_FLAG, &o.json, NULL, "one object a weight"},
        {NULL, CLI_FLAG, NULL, NULL, NULL},
    };
    int32_t n = 0;
    status st =
        cli_parse(argc - 1, argv + 1, "inspect model --model DIR [options]", options, NULL, &n);
    if (st == ST_OK && !o.model) st = FAIL(ST_USAGE, "inspect model needs --model");
    if (st == ST_OK && (tp < 1 || tp > 1024))
        st = FAIL(ST_USAGE, "--tp %lld is outside 1 to 1024", (long long)tp);
    o.tp = (int32_t)tp;
    if (st == ST_OK) st = inspect_model(&o);
    return cli_exit(st);
}
