/* ids.h - a list of token ids that grows. */
#ifndef AMALGAM_IDS_H
#define AMALGAM_IDS_H
#include "base.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef struct {
    int32_t *data; /* [length], NULL before anything was added */
    int64_t length, size;
    bool failed; /* an allocation was refused: the list is incomplete */
} ids;

void ids_add(ids *list, int32_t id);
void ids_add_all(ids *list, const int32_t *more, int64_t n);
void ids_clear(ids *list); /* keep the memory */
void ids_free(ids *list);
/* NOMEM if any addition was refused. */
status ids_status(const ids *list);

#ifdef __cplusplus
}
#endif
#endif
