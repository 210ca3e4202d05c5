// linear_expand.cu - a weight written out at 16 bit: what comes before a product that knows no
// other formats (device_options.dequant_first).
#include "linear_common.cuh"
#include "traits.cuh"

namespace {

struct expand_args {
    const uint8_t *code, *scale; // [count][code_bytes], [count][scale_bytes]
    const float *global_scale;   // [count] or NULL
    uint8_t *to;                 // [count][wide.code_bytes]
    linear_layout from, wide;
    int64_t lanes; // of one matrix
    bool sym;
};

// Scales and zeros of rows g and g + 8 of a strip; `place` as in dequant_load_packed.
template <int F>
__device__ __forceinline__ dequant_packed load_packed(const uint8_t *granule, int place, bool sym) {
    dequant_packed s = {0, 0x0808u};
    if (F == WF_INT4) {
        s.scale = *reinterpret_cast<const uint32_t *>(granule + 2 * place);
        if (!sym) s.zero = *reinterpret_cast<const uint16_t *>(granule + 128 + place);
    } else if (F == WF_FP8B) {
        s.scale = *reinterpret_cast<const uint32_t *>(granule + place / 16 * 4);
    } else {
        s.scale = *reinterpret_cast<const uint16_t *>(granule + place);
    }
    return s;
}

// The same scales in f32.
template <typename T, int F>
__device__ __forceinline__ void unpack(float (&scale)[2], const dequant_packed &from) {
    if (F == WF_MXFP4 && !half_pair<T>::bf16) { // the upper bytes of halves, 2^12 times too large
        const uint32_t pair = __byte_perm(from.scale, 0, 0x1404);
        const __half2 h = *reinterpret_cast<const __half2 *>(&pair);
        scale[0] = __low2float(h) * 0x1p-12f;
        scale[1] = __high2float(h) * 0x1p-12f;
    } else {
        dequant_unpack<F>(scale, from);
    }
}

// Word i of lane t of four lanes becomes word t of lane i.
__device__ __forceinline__ void transpose(uint32_t (&word)[4], int lane) {
#pragma unroll
    for (int bit = 1; bit <= 2; bit *= 2)
#pragma unroll
        for (int i = 0; i < 2; i++) {
            uint32_t &low = word[i * (3 - bit)], &high = word[i * (3 - bit) + bit];
            const bool upper = lane & bit;
            const uint32_t got = __shfl_xor_sync(0xffffffffu, upper ? low : high, bit);
            (upper ? low : high) = got;
        }
}

// A thread a lane of a strip and unit. Codes are exact in T; the product with the scale, in f32,
// is rounded to T once.
template <typename T, int F> __global__ void expand(const expand_args a) {
    using P = typename half_pair<T>::type;
    constexpr int kBits = linear_code_bits(F), kWord = kBits / 4; // registers of eight codes
    constexpr bool kChannel = F == WF_INT8 || F == WF_FP8;
    const int64_t i = (int64_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= a.lanes) return;
    const int lane = (int)(i % 32), strip = (int)(i / 32 % 4), matrix = (int)blockIdx.y;
    const int32_t u = (int32_t)(i / 128 % a.from.units), b = (int32_t)(i / 128 / a.from.units);
    const uint8_t *code = a.code + matrix * a.from.code_bytes;
    const uint8_t *scale = a.scale + matrix * a.from.scale_bytes;
    uint8_t *to = a.to + matrix * a.wide.code_bytes;
    uint32_t word[4 * kWord];
#pragma unroll
    for (int c = 0; c < kWord; c++)
        *reinterpret_cast<uint4 *>(word + 4 * c) = *reinterpret_cast<const uint4 *>(
            code + linear_word_at(&a.from, b, u, strip, 0, lane) + 512 * c);
    const float by = dequant_factor<T, F>(), global = a.global_scale ? a.global_scale[matrix] : 1.f;
    float of_row[2] = {1.f, 1.f};
    if (kChannel) {
        const float *row = reinterpret_cast<const float *>(scale) + b * 64 + strip * 16 + lane / 4;
        of_row[0] = row[0];
        of_row[1] = row[8];
    }
#pragma unroll
    for (int j = 0; j < 4; j++) {
        dequant_scales s = {};
        if (!kChannel) {
            const int64_t granule =
                (int64_t)b * a.from.granules + (u * 64 + j * 16) / a.from.granule;
            const dequant_packed packed = load_packed<F>(scale + granule * a.from.granule_bytes,
                                                         strip * 16 + lane / 4 * 2, a.sym);
            unpack<T, F>(of_row, packed);
            if (F == WF_INT4) dequant_scales_of<T, F>(s, packed); // for its zeros
        }
        uint32_t pair[4];
        dequant_word<T, F, false>(pair, word + j * kWord, s);
        P out[4];
#pragma unroll
        for (int e = 0; e < 4; e++) {
            const P v = *reinterpret_cast<const P *>(&pair[e]);
            const float k = of_row[e % 2];
            out[e].x = from_f32<T>(to_f32(v.x) * by * k * global);
            out[e].y = from_f32<T>(to_f32(v.y) * by * k * global);
        }
        if (!a.wide.tiled) {
            *reinterpret_cast<uint4 *>(to + linear_word_at(&a.wide, b, u, strip, j, lane)) =
                *reinterpret_cast<const uint4 *>(out);
            continue;
        }
        transpose(reinterpret_cast<uint32_t(&)[4]>(out), lane);
        const int e = lane % 4;
        *reinterpret_cast<uint4 *>(
            to + ((int64_t)b * a.wide.units + u) * a.wide.unit_bytes +
            linear_chunk_at(strip * 16 + linear_atom_row(lane, 2 * e), 2 * j + e / 2)) =
            *reinterpret_cast<const uint4 *>(out);
    }
}

template <typename T> void (*kernel_of(weight_format f))(const expand_args) {
    switch (f) {
    case WF_INT4: return expand<T, WF_INT4>;
    case WF_MXFP4: return expand<T, WF_MXFP4>;
    case WF_NVFP4: return expand<T, WF_NVFP4>;
    case WF_INT8: return expand<T, WF_INT8>;
    case WF_FP8: return expand<T, WF_FP8>;
    case WF_FP8B: return expand<T, WF_FP8B>;
    default: return nullptr;
    }
}

} // namespace

extern "C" status linear_expand(const linear_weight *to, const linear_weight *from,
                                kernel_stream stream) {
    if (to->format != WF_16 || to->type != from->type || to->n != from->n || to->k != from->k ||
        to->count != from->count || to->gated != from->gated || linear_plain(from))
        return FAIL(ST_UNSUPPORTED, "linear_expand: no W16 of the same shape, type and order");
    const auto kernel = from->type == DT_F16 ? kernel_of<__half>(from->format)
                                             : kernel_of<__nv_bfloat16>(from->format);
    if (!kernel)
        return FAIL(ST_UNSUPPORTED, "linear_expand of W%s", weight_format_text(from->format));
    expand_args a = {};
    a.code = static_cast<const uint8_t *>(from->code);
    a.scale = static_cast<const uint8_t *>(from->scale);
    a.global_scale = from->format == WF_NVFP4 ? from->global_scale : nullptr;
    a.to = static_cast<uint8_t *>(to->code);
    a.from = linear_layout_of(from);
    a.wide = linear_layout_of(to);
    a.lanes = (int64_t)a.from.blocks * a.from.units * 128;
    a.sym = from->sym;
    kernel<<<dim3((unsigned)((a.lanes + 255) / 256), (unsigned)from->count), 256, 0,
             (cudaStream_t)stream>>>(a);
    launch_nothing((cudaStream_t)stream); // a linear reads its weights early
    return launched("linear_expand");
}
