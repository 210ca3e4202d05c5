// linear_w4a8_tall.cu - (placeholder)
#include "linear_launch.h"
extern "C" status linear_w4a8_tall_launch(const linear_problem *, const void *, const float *,
                                          kernel_stream) {
    return FAIL(ST_UNSUPPORTED, "no w4a8 yet");
}
