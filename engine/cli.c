/* cli.c - see cli.h. */
#include "cli.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

static void print_help(const char *usage, const cli_option *options) {
    printf("usage: amalgam %s\n", usage);
    for (const cli_option *o = options; o->name; o++) {
        char left[64];
        snprintf(left, sizeof left, "%s%s%s", o->name, o->value ? " " : "",
                 o->value ? o->value : "");
        printf("  %-26s %s\n", left, o->help);
    }
}

static status store(const cli_option *o, const char *value) {
    switch (o->kind) {
    case CLI_FLAG: *(bool *)o->out = true; return ST_OK;
    case CLI_TEXT: *(const char **)o->out = value; return ST_OK;
    case CLI_INT:
        if (!parse_i64(value, INT64_MIN, INT64_MAX, o->out))
            return FAIL(ST_USAGE, "%s: '%s' is no integer", o->name, value);
        return ST_OK;
    case CLI_NUMBER:
        if (!parse_f64(value, -INFINITY, INFINITY, o->out))
            return FAIL(ST_USAGE, "%s: '%s' is no number", o->name, value);
        return ST_OK;
    case CLI_TEXTS: {
        cli_texts *list = o->out;
        if (list->n == CLI_TEXTS_MAX)
            return FAIL(ST_USAGE, "%s is given more than %d times", o->name, CLI_TEXTS_MAX);
        list->item[list->n++] = value;
        return ST_OK;
    }
    }
    return ST_OK;
}

/* Letters of a name that count. */
enum { NAME_LETTERS = 64 };

/* Levenshtein's distance. */
static size_t edit_distance(const char *a, size_t n, const char *b) {
    const size_t m = strnlen(b, NAME_LETTERS);
    size_t row[NAME_LETTERS + 1]; /* from a's first i letters to b's first j */
    if (n > NAME_LETTERS) n = NAME_LETTERS;
    for (size_t j = 0; j <= m; j++) row[j] = j;
    for (size_t i = 1; i <= n; i++) {
        size_t diagonal = row[0];
        row[0] = i;
        for (size_t j = 1; j <= m; j++) {
            const size_t changed = diagonal + (a[i - 1] != b[j - 1]);
            diagonal = row[j];
            row[j] = (row[j] < row[j - 1] ? row[j] : row[j - 1]) + 1;
            if (changed < row[j]) row[j] = changed;
        }
    }
    return row[m];
}

const char *nearest_name(const char *word, size_t length, const char *const *name, size_t stride,
                         int32_t n) {
    const char *best = NULL;
    size_t least = SIZE_MAX;
    for (int32_t i = 0; i < n; i++) {
        const char *const *at = (const void *)((const char *)name + (size_t)i * stride);
        const size_t distance = edit_distance(word, length, *at);
        if (distance >= least) continue;
        least = distance;
        best = *at;
    }
    return best;
}

status cli_parse(int argc, char **argv, const char *usage, const cli_option *options,
                 const char **args, int32_t *n_args) {
    const int32_t max_args = *n_args;
    *n_args = 0;
    bool only_args = false; /* after "--" */
    for (int i = 0; i < argc; i++) {
        const char *arg = argv[i];
        if (only_args || arg[0] != '-' || !arg[1]) {
            if (*n_args == max_args)
                return FAIL(ST_USAGE, "unexpected argument '%s' (amalgam %s)", arg, usage);
            args[(*n_args)++] = arg;
            continue;
        }
        if (strcmp(arg, "--") == 0) {
            only_args = true;
            continue;
        }
        if (strcmp(arg, "--help") == 0 || strcmp(arg, "-h") == 0) {
            print_help(usage, options);
            return ST_INTERRUPTED;
        }
        const char *equals = strchr(arg, '=');
        const size_t n = equals ? (size_t)(equals - arg) : strlen(arg);
        const cli_option *o = options;
        while (o->name && (strlen(o->name) != n || strncmp(o->name, arg, n) != 0)) o++;
        if (!o->name) {
            const char *nearest =
                nearest_name(arg, n, &options->name, sizeof *options, (int32_t)(o - options));
            return FAIL(ST_USAGE, "unknown option '%.*s': the nearest is '%s' (--help lists them)",
                        (int)n, arg, nearest ? nearest : "--help");
        }
        const char *value = NULL;
        if (o->kind == CLI_FLAG) {
            if (equals) return FAIL(ST_USAGE, "%s takes no value", o->name);
        } else if (equals) {
            value = equals + 1;
        } else {
            if (i + 1 == argc) return FAIL(ST_USAGE, "%s needs a value", o->name);
            value = argv[++i];
        }
        TRY(store(o, value));
    }
    return ST_OK;
}

status cli_check(const cli_range *r, int32_t n) {
    for (int32_t i = 0; i < n; i++)
        if (r[i].value < r[i].lo || r[i].value > r[i].hi)
            return FAIL(ST_USAGE, "%s %lld is outside %lld to %lld", r[i].name,
                        (long long)r[i].value, (long long)r[i].lo, (long long)r[i].hi);
    return ST_OK;
}

int cli_exit(status st) {
    if (st == ST_OK || st == ST_INTERRUPTED) return 0;
    fflush(stdout);
    const bool where = getenv("AMALGAM_DEBUG") && fail_birthplace()[0];
    fprintf(stderr, "amalgam: %s%s%s%s\n", fail_message()[0] ? fail_message() : status_text(st),
            where ? " (" : "", where ? fail_birthplace() : "", where ? ")" : "");
    switch (st) {
    case ST_USAGE:
    case ST_FORMAT:
    case ST_RANGE:
    case ST_NOTFOUND: return 2;
    case ST_OOM: return 3;
    case ST_UNSUPPORTED:
    case ST_SHAPE: return 4;
    default: return 1;
    }
}
