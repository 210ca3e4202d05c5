/* request.c - see request.h. */
#include "request.h"

const char *finish_text(finish_reason r) {
    switch (r) {
    case FINISH_NONE: return "none";
    case FINISH_STOP: return "stop";
    case FINISH_LENGTH: return "length";
    case FINISH_CANCEL: return "cancel";
    case FINISH_REFUSED: return "refused";
    }
    return "unknown";
}
