/* cmd_formats.c - `amalgam formats [--gpu NAME|cpu] [--json]`: the support matrix of formats.h.
 *
 * One architecture is printed row by row, all of them as a matrix with a cell per architecture.
 * Text ends in the refusals with their reasons; --json has one object per pair and architecture,
 * the refused ones included, then the KV formats. */
#include "cli.h"
#include "formats.h"
#include "gpu.h"
#include "json.h"

#include <string.h>

/* The standard form of a weight format: what its bare name means. */
static precision pair(weight_format w, act_format a) {
    char name[32];
    precision p;
    snprintf(name, sizeof name, "W%sA%s", weight_format_text(w), act_format_text(a));
    CHECK(precision_parse(&p, name) == ST_OK);
    return p;
}

/* --- Text ------------------------------------------------------------------------------------- */

static void print_matrix(void) {
    char name[16];
    printf("%-8s %-4s", "weights", "act");
    for (int32_t i = 0; i < arch_count(); i++) printf(" %-11s", arch_text(arch_at(i), name));
    printf("\n");
    for (int32_t w = 0; w < WF_COUNT; w++)
        for (int32_t a = 0; a < AF_COUNT; a++) {
            const precision p = pair((weight_format)w, (act_format)a);
            if (!format_linear_find(&p, ARCH_CPU)) continue; /* among the refusals below */
            printf("%-8s %-4s", weight_format_text(p.weight), act_format_text(p.act));
            for (int32_t i = 0; i < arch_count(); i++) {
                const format_linear *row = format_linear_find(&p, arch_at(i));
                printf(" %-11s", row ? row->family : "-");
            }
            printf("\n");
        }
    printf("\n%-13s", "KV (K and V)");
    for (int32_t i = 0; i < arch_count(); i++) printf(" %-11s", arch_text(arch_at(i), name));
    printf("\n");
    for (int32_t f = 0; f < KF_COUNT; f++) {
        printf("%-13s", kv_format_text((kv_format)f));
        for (int32_t i = 0; i < arch_count(); i++) {
            const format_kv *row = format_kv_find((kv_format)f, arch_at(i));
            printf(" %-11s", row ? row->family : "-");
        }
        printf("\n");
    }
}

static void print_arch(int32_t i) {
    char name[16];
    const int32_t arch = arch_at(i);
    printf("%s%s%s%s, devices %s and sim\n", arch_text(arch, name), arch ? " (" : "", arch_gpus(i),
           arch ? ")" : "", arch ? "cuda" : "cpu");
    printf("%-8s %-4s %-11s %s\n", "weights", "act", "family", "instruction");
    for (int32_t w = 0; w < WF_COUNT; w++)
        for (int32_t a = 0; a < AF_COUNT; a++) {
            const precision p = pair((weight_format)w, (act_format)a);
            const format_linear *row = format_linear_find(&p, arch);
            if (!row) continue;
            printf("%-8s %-4s %-11s %s\n", weight_format_text(p.weight), act_format_text(p.act),
                   row->family, row->instruction);
        }
    for (int32_t f = 0; f < KF_COUNT; f++) {
        const format_kv *row = format_kv_find((kv_format)f, arch);
        if (!row) continue;
        printf("KV%-11s %-11s %s\n", kv_format_text((kv_format)f), row->family, row->instruction);
    }
}

/* Each reason once, with the architectures it names itself. */
static void print_refusals(int32_t first, int32_t last) {
    printf("\nrefused:\n");
    for (int32_t w = 0; w < WF_COUNT; w++)
        for (int32_t a = 0; a < AF_COUNT; a++) {
            char said[512] = "";
            for (int32_t i = first; i <= last; i++) {
                const precision p = pair((weight_format)w, (act_format)a);
                if (format_supported(&p, arch_at(i)) == ST_OK) continue;
                if (strcmp(said, fail_message()) == 0) continue;
                snprintf(said, sizeof said, "%s", fail_message());
                printf("  %s\n", said);
            }
        }
}

/* --- JSON ------------------------------------------------------------------------------------- */

/* `key` (arch and formats, released here) and what is known of its row; family NULL: refused, with
 * the reason in fail_message. */
static status put_row(json_t *key, const char *family, const char *instruction) {
    json_t *rest = family ? json_pack("{s:b, s:s, s:s}", "supported", 1, "family", family,
                                      "instruction", instruction)
                          : json_pack("{s:b, s:s}", "supported", 0, "reason", fail_message());
    const bool whole = key && rest && json_object_update(key, rest) == 0;
    json_decref(rest);
    if (whole) return json_put(key);
    json_decref(key);
    return json_put(NULL);
}

static status print_json(int32_t first, int32_t last) {
    char arch[16];
    for (int32_t i = first; i <= last; i++) {
        arch_text(arch_at(i), arch);
        for (int32_t w = 0; w < WF_COUNT; w++)
            for (int32_t a = 0; a < AF_COUNT; a++) {
                const precision p = pair((weight_format)w, (act_format)a);
                const format_linear *row = format_linear_find(&p, arch_at(i));
                json_t *key =
                    json_pack("{s:s, s:s, s:s}", "arch", arch, "weight",
                              weight_format_text(p.weight), "act", act_format_text(p.act));
                TRY(put_row(key, row ? row->family : NULL, row ? row->instruction : NULL));
            }
        for (int32_t f = 0; f < KF_COUNT; f++) {
            const format_kv *row = format_kv_find((kv_format)f, arch_at(i));
            json_t *key = json_pack("{s:s, s:s}", "arch", arch, "kv", kv_format_text((kv_format)f));
            TRY(put_row(key, row ? row->family : NULL, row ? row->instruction : NULL));
        }
    }
    return ST_OK;
}

/* By the table of formats.h, else by the data sheet of that name. */
static status find_arch(int32_t *arch, const char *name) {
    gpu_sheet sheet;
    char sm[16];
    if (arch_parse(arch, name) == ST_OK) return ST_OK;
    if (gpu_load(&sheet, name) == ST_OK) name = arch_text(sheet.sm, sm);
    return arch_parse(arch, name);
}

/* --- The command ------------------------------------------------------------------------------ */

/* argv[0] is "formats". */
int cmd_formats(int argc, char **argv) {
    bool json = false;
    const char *gpu = NULL;
    const cli_option options[] = {
        {"--gpu", CLI_TEXT, &gpu, "NAME",
         "one architecture, by it or a GPU of it (sm_90, h200), or cpu"},
        {"--json", CLI_FLAG, &json, NULL, "one object a line"},
        {NULL, CLI_FLAG, NULL, NULL, NULL},
    };
    int32_t n = 0, first = 0, last = arch_count() - 1, arch;
    status st = cli_parse(argc - 1, argv + 1, "formats [options]", options, NULL, &n);
    if (st == ST_OK && gpu) st = find_arch(&arch, gpu);
    if (st != ST_OK) return cli_exit(st);
    if (gpu) {
        while (arch_at(first) != arch) first++; /* find_arch gives no other */
        last = first;
    }
    if (json) return cli_exit(print_json(first, last));
    if (gpu)
        print_arch(first);
    else
        print_matrix();
    print_refusals(first, last);
    printf("\nK and V may differ, and each layer may have its own: see K8V4 and KV[8x4,4x28].\n");
    return 0;
}
