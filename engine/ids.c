/* ids.c - see ids.h. */
#include "ids.h"

#include <string.h>

static bool room_for(ids *list, int64_t more) {
    if (list->failed) return false;
    if (list->length + more <= list->size) return true;
    const int64_t size = i64_max(list->length + more, i64_max(64, 2 * list->size));
    int32_t *p = mem_resize(list->data, (size_t)size, sizeof *p);
    if (!p) {
        list->failed = true;
        return false;
    }
    list->data = p;
    list->size = size;
    return true;
}

void ids_add(ids *list, int32_t id) {
    if (room_for(list, 1)) list->data[list->length++] = id;
}

void ids_add_all(ids *list, const int32_t *more, int64_t n) {
    if (n == 0 || !room_for(list, n)) return;
    memcpy(list->data + list->length, more, (size_t)n * sizeof *more);
    list->length += n;
}

void ids_clear(ids *list) {
    list->length = 0;
    list->failed = false;
}

void ids_free(ids *list) {
    mem_free(list->data);
    *list = (ids){0};
}

status ids_status(const ids *list) {
    return list->failed ? FAIL(ST_NOMEM, "%lld token ids", (long long)list->length) : ST_OK;
}
