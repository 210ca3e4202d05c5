// attention_device.cuh - what the attention kernels of every architecture do alike: addresses in a page
// and conversions of single codes. See attention.h for the layout.
#ifndef AMALGAM_ATTENTION_DEVICE_CUH
#define AMALGAM_ATTENTION_DEVICE_CUH
#include "attention_plan.h"
#include "traits.cuh"

namespace {

constexpr float kLog2E = 1.4426950408889634f;
constexpr int kPage = KV_PAGE_TOKENS;

// attention_code_at on the device.
__device__ __forceinline__ int code_at(int row_bytes, int token, int at) {
    const int panel = min(row_bytes, 128), pieces = panel / 16, share = 128 / panel, r = token % 8;
    const int turned = (at % panel / 16) ^ (r / share % pieces);
    return token / 8 * 8 * row_bytes + at / panel * 8 * panel + r * panel + turned * 16 + at % 16;
}

__device__ __forceinline__ int row_bytes_of(kv_format f, int head_dim) {
    return f == KF_16 ? 2 * head_dim : f == KF_4 ? head_dim / 2 : head_dim;
}

// e4m3 as the fp16 of the same sign, exponent field and mantissa: the value times 2^-8, subnormals too.
__device__ __forceinline__ float e4m3_value(uint32_t code) {
    const uint16_t bits = (uint16_t)((code & 0x80u) << 8 | (code & 0x7fu) << 7);
    return __half2float(__ushort_as_half(bits)) * 256.f;
}

} // namespace
#endif
