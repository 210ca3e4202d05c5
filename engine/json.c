/* json.c - see json.h. */
#include "json.h"

#include <errno.h>
#include <math.h>
#include <string.h>

/* Jansson calls most of what memory was short for an error of syntax: errno tells. */
static status parse_error(const json_error_t *e, const char *where) {
    if (errno == ENOMEM || json_error_code(e) == json_error_out_of_memory)
        return FAIL(ST_NOMEM, "%s", where);
    return FAIL(ST_FORMAT, "%s:%d: %s", where, e->line, e->text);
}

status json_parse(json_t **out, const char *data, size_t n, const char *where) {
    json_error_t e;
    errno = 0;
    *out = json_loadb(data ? data : "", n, JSON_REJECT_DUPLICATES | JSON_ALLOW_NUL, &e);
    return *out ? ST_OK : parse_error(&e, where);
}

status json_file(json_t **out, const char *path) {
    *out = NULL;
    file_map m;
    TRY(file_map_open(&m, path));
    const status st = json_parse(out, (const char *)m.data, m.size, path);
    file_map_close(&m);
    return st;
}

json_t *json_find(const json_t *object, const char *key) {
    json_t *v = json_object_get(object, key);
    return v && !json_is_null(v) ? v : NULL;
}

static status missing(const char *key, const char *where) {
    return FAIL(ST_NOTFOUND, "%s: key '%s' is missing", where, key);
}

status json_opt_i64(const json_t *object, const char *key, const char *where, int64_t lo,
                    int64_t hi, int64_t *out) {
    const json_t *v = json_find(object, key);
    if (!v) return ST_OK;
    int64_t n;
    if (json_is_integer(v)) {
        n = json_integer_value(v);
    } else if (json_is_real(v) && floor(json_real_value(v)) == json_real_value(v) &&
               fabs(json_real_value(v)) < 0x1p53) {
        n = (int64_t)json_real_value(v); /* 5e5 is how some writers spell an integer */
    } else {
        return FAIL(ST_FORMAT, "%s: '%s' is no integer", where, key);
    }
    if (n < lo || n > hi)
        return FAIL(ST_RANGE, "%s: %s = %lld is outside %lld to %lld", where, key, (long long)n,
                    (long long)lo, (long long)hi);
    *out = n;
    return ST_OK;
}

status json_opt_i32(const json_t *object, const char *key, const char *where, int32_t lo,
                    int32_t hi, int32_t *out) {
    int64_t wide = *out;
    TRY(json_opt_i64(object, key, where, lo, hi, &wide));
    *out = (int32_t)wide;
    return ST_OK;
}

status json_opt_f64(const json_t *object, const char *key, const char *where, double lo, double hi,
                    double *out) {
    const json_t *v = json_find(object, key);
    if (!v) return ST_OK;
    if (!json_is_number(v)) return FAIL(ST_FORMAT, "%s: '%s' is no number", where, key);
    const double x = json_number_value(v);
    if (!(x >= lo && x <= hi))
        return FAIL(ST_RANGE, "%s: %s = %g is outside %g to %g", where, key, x, lo, hi);
    *out = x;
    return ST_OK;
}

status json_opt_bool(const json_t *object, const char *key, const char *where, bool *out) {
    const json_t *v = json_find(object, key);
    if (!v) return ST_OK;
    if (!json_is_boolean(v))
        return FAIL(ST_FORMAT, "%s: '%s' is neither true nor false", where, key);
    *out = json_is_true(v);
    return ST_OK;
}

status json_opt_string(const json_t *object, const char *key, const char *where, const char **out) {
    const json_t *v = json_find(object, key);
    if (!v) return ST_OK;
    if (!json_is_string(v)) return FAIL(ST_FORMAT, "%s: '%s' is no string", where, key);
    if (strlen(json_string_value(v)) != json_string_length(v))
        return FAIL(ST_FORMAT, "%s: '%s' holds a zero byte", where, key);
    *out = json_string_value(v);
    return ST_OK;
}

#define REQUIRED(name, ...)                                                                        \
    if (!json_find(object, key)) return missing(key, where);                                       \
    return json_opt_##name(object, key, where, __VA_ARGS__)

status json_get_i64(const json_t *object, const char *key, const char *where, int64_t lo,
                    int64_t hi, int64_t *out) {
    REQUIRED(i64, lo, hi, out);
}
status json_get_i32(const json_t *object, const char *key, const char *where, int32_t lo,
                    int32_t hi, int32_t *out) {
    *out = 0; /* json_opt_i32 reads it */
    REQUIRED(i32, lo, hi, out);
}
status json_get_f64(const json_t *object, const char *key, const char *where, double lo, double hi,
                    double *out) {
    REQUIRED(f64, lo, hi, out);
}
status json_get_bool(const json_t *object, const char *key, const char *where, bool *out) {
    REQUIRED(bool, out);
}
status json_get_string(const json_t *object, const char *key, const char *where, const char **out) {
    REQUIRED(string, out);
}

char *json_line(const json_t *value) {
    return json_dumps(value, JSON_COMPACT | JSON_PRESERVE_ORDER | JSON_ENCODE_ANY);
}

status json_put(json_t *value) {
    char *line = value ? json_line(value) : NULL;
    json_decref(value);
    if (!line) return FAIL(ST_NOMEM, "a line of JSON");
    const status st = puts(line) >= 0 ? ST_OK : stdout_failed();
    mem_free(line);
    return st;
}
