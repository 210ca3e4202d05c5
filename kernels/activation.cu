// activation.cu - gated activations, element by element: 16 bytes of gate and of up a thread.
#include "activation.h"
#include "traits.cuh"

#define ACTIVATION_INSTANCES(X) X(F16) X(BF16)

namespace {

constexpr int kThreads = 256;

__device__ __forceinline__ float silu(float gate, float up) {
    return gate / (1.f + expf(-gate)) * up;
}

// Not fminf and fmaxf: they would turn NaN into the limit and hide it.
__device__ __forceinline__ float swiglu_oai(float gate, float up, float limit) {
    const float g = gate > limit ? limit : gate;
    const float u = up > limit ? limit : up < -limit ? -limit : up;
    return g / (1.f + expf(-1.702f * g)) * (u + 1.f);
}

// EACH: elements of a thread, 8 when f is a multiple of 8, else 1. OAI: which formula.
template <typename T, int EACH, bool OAI>
__global__ void __launch_bounds__(kThreads)
    gated(T *y, const T *gate_up, int64_t n_units, int32_t units, int32_t f, float limit) {
    const int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x;
    if (i >= n_units) return;
    const int64_t row = i / units;
    const int col = (int)(i % units) * EACH;
    follow_previous();
    const T *gate = gate_up + row * 2 * f + col, *up = gate + f; // [EACH] each
    T *out = y + row * f + col;                                  // [EACH]
    if constexpr (EACH == pack<T>::n) {
        pack<T> g = load_pack(gate);
        const pack<T> u = load_pack(up);
#pragma unroll
        for (int j = 0; j < EACH; j++)
            g.v[j] = from_f32<T>(OAI ? swiglu_oai(to_f32(g.v[j]), to_f32(u.v[j]), limit)
                                     : silu(to_f32(g.v[j]), to_f32(u.v[j])));
        store_pack(out, g);
    } else {
        *out = from_f32<T>(OAI ? swiglu_oai(to_f32(*gate), to_f32(*up), limit)
                               : silu(to_f32(*gate), to_f32(*up)));
    }
}

template <dtype dt>
status launch(void *y, const void *gate_up, int64_t rows, int32_t f, gated_kind kind, float limit,
              cudaStream_t s) {
    using T = typename element<dt>::type;
    const int each = f % pack<T>::n ? 1 : pack<T>::n;
    const int64_t units = f / each, n = rows * units, blocks = div_up(n, kThreads);
    if (blocks > INT32_MAX) return FAIL(ST_SHAPE, "gated [%lld, %d]", (long long)rows, f);
    auto *const kernel = kind == GATED_OAI ? (each == 1 ? gated<T, 1, true> : gated<T, 8, true>)
                                           : (each == 1 ? gated<T, 1, false> : gated<T, 8, false>);
    return launch_early("gated", kernel, (unsigned)blocks, kThreads, s, static_cast<T *>(y),
                        static_cast<const T *>(gate_up), n, (int)units, f, limit);
}

} // namespace

extern "C" status kernel_gated(void *y, const void *gate_up, int64_t rows, int32_t f,
                               gated_kind kind, float limit, dtype type, kernel_stream stream) {
    if (rows < 0 || f <= 0) return FAIL(ST_SHAPE, "gated [%lld, %d]", (long long)rows, f);
    if (rows == 0) return ST_OK;
    switch (type) {
#define X(name)                                                                                    \
    case DT_##name: return launch<DT_##name>(y, gate_up, rows, f, kind, limit, stream);
        ACTIVATION_INSTANCES(X)
#undef X
    default: return FAIL(ST_UNSUPPORTED, "gated: elements of %s", dtype_text(type));
    }
}
