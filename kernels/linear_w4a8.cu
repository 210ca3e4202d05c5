// linear_w4a8.cu - (placeholder)
#include "linear_launch.h"
extern "C" status linear_w4a8_launch(const char *, const linear_problem *, const void *,
                                     const float *, kernel_stream) {
    return FAIL(ST_UNSUPPORTED, "no w4a8 yet");
}
