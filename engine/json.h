/* json.h - jansson with messages that name the file and the key, and range checks on every number.
 *
 * All getters take `where` (usually the file name) for messages and fail with FORMAT when the type
 * is wrong, RANGE when a number lies outside [lo, hi], NOTFOUND when a required key is missing. */
#ifndef AMALGAM_JSON_H
#define AMALGAM_JSON_H
#include "base.h"
#include <jansson.h>

/* Parse a file (or n bytes); duplicate keys are refused, depth is limited by jansson to 2048.
 * The caller json_decref's *out. */
status json_file(json_t **out, const char *path);
status json_parse(json_t **out, const char *data, size_t n, const char *where);

/* NULL when absent or JSON null. */
json_t *json_find(const json_t *object, const char *key);

/* A key that must be there. */
status json_get_i64(const json_t *object, const char *key, const char *where, int64_t lo,
                    int64_t hi, int64_t *out);
status json_get_i32(const json_t *object, const char *key, const char *where, int32_t lo,
                    int32_t hi, int32_t *out);
status json_get_f64(const json_t *object, const char *key, const char *where, double lo, double hi,
                    double *out);
status json_get_bool(const json_t *object, const char *key, const char *where, bool *out);
/* *out points into the document. */
status json_get_string(const json_t *object, const char *key, const char *where, const char **out);

/* As above, but an absent or null key leaves *out as it was: set the default first. */
status json_opt_i64(const json_t *object, const char *key, const char *where, int64_t lo,
                    int64_t hi, int64_t *out);
status json_opt_i32(const json_t *object, const char *key, const char *where, int32_t lo,
                    int32_t hi, int32_t *out);
status json_opt_f64(const json_t *object, const char *key, const char *where, double lo, double hi,
                    double *out);
status json_opt_bool(const json_t *object, const char *key, const char *where, bool *out);
status json_opt_string(const json_t *object, const char *key, const char *where, const char **out);

/* Compact, keys in insertion order, doubles with 17 digits trimmed; mem_free the result; NULL when
 * memory is short. */
char *json_line(const json_t *value);

/* That and a newline to standard output. Takes the reference; `value` may be NULL, so that
 * json_put(json_pack(...)) reports either failure as NOMEM. */
status json_put(json_t *value);
#endif
