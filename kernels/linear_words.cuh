// linear_words.cuh - values of 16 bits that say themselves that they are there, from a launch that
// still runs, or a CTA, to others: complements, two a word, none of which is zero, since no result
// is the NaN of all ones. Zeros when no launch is under way.
#ifndef LINEAR_WORDS_CUH
#define LINEAR_WORDS_CUH
#include "traits.cuh"

template <typename T> __device__ __forceinline__ uint32_t word_half(T v) {
    const uint32_t bits = *reinterpret_cast<const uint16_t *>(&v);
    return 0xffffu ^ (bits == 0xffffu ? 0x7fffu : bits);
}
__device__ __forceinline__ bool words_there(uint4 v) {
    const auto zero = [](uint32_t w) { return (w - 0x00010001u) & ~w & 0x80008000u; };
    return !(zero(v.x) | zero(v.y) | zero(v.z) | zero(v.w));
}
#endif
