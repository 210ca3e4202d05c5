// linear_quantised.cu - linears whose x is quantised to 8 bits. Three routes:
//
//   plain    x becomes codes and scales; a product of 8-bit operands. After cuBLASLt's, a pass over
//            the sums where they are not y yet: scales of int32 sums, bias, gate, residual
//   nibbles  W4: x becomes codes and scales; a product of 4-bit by 8-bit codes, from some rows on
//   values   x becomes the values that its codes stand for, in 16 bits, and runs as A16; of one
//            row within the kernel, where a CTA has all of it
//
// Space of the plain route holds a part of the rows of x at a time: codes, scales, and sums where
// the product is not y yet.
#include "linear_epilogue.cuh"
#include "linear_launch.h"
#include "quantize.h"
#include "traits.cuh"

#include <cstring>

namespace {

constexpr int32_t kRowsMost = 4096;
constexpr int64_t kSumsBytes = 128 << 20;
constexpr int kThreads = 256, kEach = 4; // columns of a thread

bool gated(const linear_problem *p) {
    return p->epilogue == LINEAR_GATED || p->epilogue == LINEAR_GATED_OAI;
}

int64_t aligned(int64_t bytes) { return (bytes + 255) / 256 * 256; }

// Rows of x at a time, at most: sums of them, where there are any, are within kSumsBytes.
int32_t rows_most(const linear_weight *w, bool sums) {
    const int64_t most = sums ? kSumsBytes / (4ll * w->n) / 16 * 16 : kRowsMost;
    return (int32_t)(most > kRowsMost ? kRowsMost : most < 16 ? 16 : most);
}

struct plain_space {
    uint8_t *code;
    float *scale;
    void *sums;
    int64_t bytes;
};

plain_space lay(const linear_weight *w, int32_t rows, bool sums, void *base) {
    const int64_t scales = w->format == WF_FP8B ? (w->k + 127) / 128 : 1;
    plain_space s;
    s.code = static_cast<uint8_t *>(base);
    s.scale = reinterpret_cast<float *>(s.code + aligned((int64_t)rows * w->k));
    s.sums = reinterpret_cast<uint8_t *>(s.scale) + aligned(rows * scales * 4);
    s.bytes = static_cast<uint8_t *>(s.sums) - s.code;
    if (sums) s.bytes += aligned((int64_t)rows * w->n * 4);
    return s;
}

// --- From sums to y ----------------------------------------------------------------------------

struct finish_args : linear_output {
    const void *sums;               // [m, n]: int32, or already scaled in the type of y
    const float *x_scale, *w_scale; // of int32 sums
};

template <typename S> __device__ __forceinline__ void four(float (&v)[kEach], const S *p);
template <> __device__ __forceinline__ void four<int32_t>(float (&v)[kEach], const int32_t *p) {
    const int4 w = *reinterpret_cast<const int4 *>(p);
    v[0] = (float)w.x, v[1] = (float)w.y, v[2] = (float)w.z, v[3] = (float)w.w;
}
template <> __device__ __forceinline__ void four<float>(float (&v)[kEach], const float *p) {
    const float4 w = *reinterpret_cast<const float4 *>(p);
    v[0] = w.x, v[1] = w.y, v[2] = w.z, v[3] = w.w;
}
template <typename S> __device__ __forceinline__ void four(float (&v)[kEach], const S *p) {
    const uint2 w = *reinterpret_cast<const uint2 *>(p);
    const S *e = reinterpret_cast<const S *>(&w);
    for (int i = 0; i < kEach; i++) v[i] = to_f32(e[i]);
}

template <typename Y> __device__ __forceinline__ void put(Y *p, const float (&v)[kEach]) {
    alignas(8) Y e[kEach];
    for (int i = 0; i < kEach; i++) e[i] = from_f32<Y>(v[i]);
    *reinterpret_cast<uint2 *>(p) = *reinterpret_cast<const uint2 *>(e);
}
template <> __device__ __forceinline__ void put<float>(float *p, const float (&v)[kEach]) {
    *reinterpret_cast<float4 *>(p) = make_float4(v[0], v[1], v[2], v[3]);
}

// Row r, columns c .. c + 4 of x W^T + bias. T: of the weight, hence of bias.
template <typename S, typename T>
__device__ __forceinline__ void linear_part(float (&v)[kEach], const finish_args &a, int r, int c) {
    four<S>(v, static_cast<const S *>(a.sums) + int64_t{r} * a.n + c);
    if (a.x_scale) {
        float w[kEach];
        four<float>(w, a.w_scale + c);
        for (int i = 0; i < kEach; i++) v[i] *= a.x_scale[r] * w[i];
    }
    if (a.bias) {
        float b[kEach];
        four<T>(b, static_cast<const T *>(a.bias) + c);
        for (int i = 0; i < kEach; i++) v[i] += b[i];
    }
}

template <typename S, typename T, typename Y>
__global__ void __launch_bounds__(kThreads) finish(const finish_args a) {
    const int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x;
    const int units = a.half / kEach, r = (int)(i / units), c = (int)(i % units) * kEach;
    if (r >= a.m) return;
    float v[kEach];
    linear_part<S, T>(v, a, r, c);
    Y *y = static_cast<Y *>(a.y) + r * a.ldy + c;
    if (a.gated) {
        float u[kEach];
        linear_part<S, T>(u, a, r, c + a.half);
        for (int j = 0; j < kEach; j++) v[j] = linear_gate(v[j], u[j], a.epilogue, a.limit);
    } else if (a.epilogue == LINEAR_RESIDUAL) {
        float before[kEach];
        four<Y>(before, y);
        for (int j = 0; j < kEach; j++) v[j] += before[j];
    }
    put<Y>(y, v);
}

template <typename T>
status launch_finish(const finish_args &a, dtype sums, dtype y, cudaStream_t stream) {
    const unsigned blocks = (unsigned)div_up((int64_t)a.m * (a.half / kEach), kThreads);
    auto *const kernel = sums == DT_I32
                             ? (y == DT_F32 ? finish<int32_t, T, float> : finish<int32_t, T, T>)
                             : (y == DT_F32 ? finish<float, T, float> : finish<T, T, T>);
    kernel<<<blocks, kThreads, 0, stream>>>(a);
    return launched("linear: sums to y");
}

// --- Routes ------------------------------------------------------------------------------------

// Products of 8-bit operands; where linear_tuned.def has nothing, best first for up to `rows` rows.
struct variant {
    const char *name;
    int32_t rank; // of cuBLASLt's suggestions, or one of those below
    int32_t rows;
};
constexpr int32_t kOwn = -1, kOwnTall = -2; // linear_codes or linear_mid, and their tall kernels
constexpr int32_t kAny = 1 << 30;
const variant variants[] = {
    {"codes_8", kOwn, 8},    {"codes_16", kOwn, 16},        {"codes_32", kOwn, 32},
    {"codes_64", kOwn, 64},  {"cublaslt", 0, kAny},         {"cublaslt_1", 1, kAny},
    {"cublaslt_2", 2, kAny}, {"cublaslt_3", 3, kAny},       {"cublaslt_4", 4, kAny},
    {"cublaslt_5", 5, kAny}, {"codes_tall", kOwnTall, kAny}};

// Products of 4-bit by 8-bit codes, by the most rows, of x that has as many as `from`: for fewer,
// where W's bytes are all that takes time, the kernels of 16-bit x need no more of it. 0 rows: by
// name only.
const variant nibbles[] = {{"w4a8_32", kOwn, 32},         {"w4a8_64", kOwn, 64},
                           {"w4a8_tall", kOwnTall, kAny}, {"w4a8_32x2", kOwn, 0},
                           {"w4a8_32x4", kOwn, 0},        {"w4a8_32x2x2", kOwn, 0},
                           {"w4a8_64x2", kOwn, 0},        {"w4a8_64x3", kOwn, 0},
                           {"w4a8_64x4", kOwn, 0},        {"w4a8_64x2x2", kOwn, 0}};
constexpr int32_t kNibblesFrom = 17;
// The same of experts, from so many rows each on, in the mean.
const variant of_experts = {"experts_codes", kOwn, kAny};
constexpr int32_t kExpertsFrom = 12;

template <int N> const variant *named(const variant (&of)[N], const char *name) {
    for (const variant &v : of)
        if (strcmp(v.name, name) == 0) return &v;
    return nullptr;
}

int64_t size_of_y(const linear_problem *p) { return p->y_type == DT_F32 ? 4 : 2; }

// Rows that are multiplied: cuBLASLt wants fours of them beside scales in blocks.
int32_t padded(const linear_problem *p, int32_t m) {
    return p->w->format == WF_FP8B ? (m + 3) / 4 * 4 : m;
}

// Whether v leaves sums that are not y yet.
bool leaves_sums(const linear_problem *p, const variant *v) {
    if (v->rank < 0) return false;
    const bool whole = p->w->format != WF_INT8 && p->epilogue == LINEAR_STORE && !p->w->bias &&
                       padded(p, p->m) == p->m;
    return !whole || ((uintptr_t)p->y | (uintptr_t)(p->ldy * size_of_y(p))) % 16 != 0;
}

// Where cuBLASLt's sums of FP8 are not y yet, the pass over them takes longer than it saves.
const variant *choose(const linear_problem *p) {
    const char *name = p->kernel ? p->kernel : linear_tuned(p, 0);
    const variant *found = name ? named(variants, name) : nullptr;
    if (found && found->rank == kOwnTall && p->w->format == WF_FP8B) found = nullptr;
    for (const variant &v : variants)
        if (!found && !p->kernel && p->m <= v.rows) found = &v;
    if (!found) FAIL(ST_UNSUPPORTED, "no product of 8-bit operands %s", p->kernel);
    const bool fp8 = found && !p->kernel && p->w->format == WF_FP8;
    return fp8 && leaves_sums(p, found) ? named(variants, "codes_tall") : found;
}

// What quantises rows [row, row + m) of p; where to is the caller's.
activation_quantiser quantiser_of(const linear_problem *p, int32_t row, int32_t m) {
    activation_quantiser q = {};
    q.x = p->x_row ? p->x : static_cast<const uint16_t *>(p->x) + row * p->ldx;
    q.ldx = p->ldx;
    q.x_row = p->x_row ? p->x_row + row : nullptr;
    q.m = q.m_pad = m;
    q.k = p->w->k;
    q.group = p->w->format == WF_FP8B ? 128 : 0;
    q.type = p->w->type;
    q.act = p->act;
    return q;
}

// Rows of x that p quantises where its product takes those that x_row names.
int32_t rows_of_x(const linear_problem *p) { return p->x_row && p->x_rows ? p->x_rows : p->m; }

// The product of m_pad rows quantised in s by cuBLASLt, into `y`.
linear_product product_of(const linear_problem *p, const plain_space &s, int32_t m_pad, void *y,
                          int32_t rank) {
    const linear_weight *w = p->w;
    linear_product product = {};
    product.format = w->format;
    product.m = m_pad;
    product.n = w->n;
    product.k = w->k;
    product.w = w->code;
    product.x = s.code;
    product.w_scale = static_cast<const float *>(w->scale);
    product.x_scale = s.scale;
    product.out = y;
    product.out_type = p->y_type;
    product.ldo = p->ldy;
    product.rank = rank;
    return product;
}

// The product into s.sums, and what makes y of them.
status product_and_finish(const linear_problem *p, const plain_space &s, int32_t row, int32_t m,
                          linear_product product, cudaStream_t stream) {
    const linear_weight *w = p->w;
    const bool int8 = w->format == WF_INT8;
    product.out = s.sums;
    product.out_type = int8 ? DT_I32 : gated(p) ? w->type : p->y_type;
    product.ldo = w->n;
    TRY(linear_lt(&product, stream));
    finish_args a = {linear_output_of(p, row, m)};
    a.sums = s.sums;
    a.x_scale = int8 ? s.scale : nullptr;
    a.w_scale = product.w_scale;
    return w->type == DT_BF16 ? launch_finish<__nv_bfloat16>(a, product.out_type, p->y_type, stream)
                              : launch_finish<__half>(a, product.out_type, p->y_type, stream);
}

// Rows [row, row + m) of p, quantised into s.
status plain_part(const linear_problem *p, const plain_space &s, int32_t row, int32_t m, bool sums,
                  void *scratch, int64_t scratch_bytes, const variant *v, cudaStream_t stream) {
    const int32_t m_pad = padded(p, m);
    activation_quantiser q = quantiser_of(p, row, m);
    q.code = s.code;
    q.scale = s.scale;
    q.m_pad = m_pad;
    if (!p->x_coded) TRY(kernel_quantize_activation(&q, stream));
    if (v->rank == kOwnTall) return linear_codes_tall_launch(p, row, m, s.code, s.scale, stream);
    if (v->rank == kOwn)
        return linear_codes_launch(v->name, p, row, m, s.code, s.scale, m_pad, stream);
    void *y = static_cast<uint8_t *>(p->y) + row * p->ldy * size_of_y(p);
    linear_product product = product_of(p, s, m_pad, y, v->rank);
    product.workspace = scratch;
    product.workspace_bytes = scratch_bytes;
    return sums ? product_and_finish(p, s, row, m, product, stream) : linear_lt(&product, stream);
}

// The parts of p's rows and how many a part has, at most, in sixteens.
int32_t parts_of(const linear_problem *p, bool sums, int32_t *rows) {
    const int32_t most = rows_most(p->w, sums), parts = (p->m + most - 1) / most;
    *rows = ((p->m + parts - 1) / parts + 15) / 16 * 16; // <= most
    return parts;
}

status plain(const linear_problem *p, void *space, void *scratch, int64_t scratch_bytes,
             cudaStream_t stream) {
    const variant *v = choose(p);
    if (!v) return ST_UNSUPPORTED;
    const bool sums = leaves_sums(p, v);
    int32_t rows;
    (void)parts_of(p, sums, &rows);
    const plain_space s = lay(p->w, rows, sums, space);
    for (int32_t row = 0; row < p->m; row += rows) {
        const int32_t m = p->m - row < rows ? p->m - row : rows;
        TRY(plain_part(p, s, row, m, sums, scratch, scratch_bytes, v, stream));
    }
    return ST_OK;
}

// The product of codes for p, or NULL: values.
const variant *choose_nibbles(const linear_problem *p) {
    if (!linear_nibbles(p->w)) return nullptr;
    if (p->expert_start) {
        const bool may = p->y_type != DT_F32 && p->epilogue != LINEAR_RESIDUAL;
        const bool is = p->kernel ? strcmp(p->kernel, of_experts.name) == 0
                                  : p->m >= (int64_t)kExpertsFrom * p->w->count;
        return may && is ? &of_experts : nullptr;
    }
    if (p->kernel) return named(nibbles, p->kernel);
    if (const char *name = linear_tuned(p, 0)) return named(nibbles, name);
    for (const variant &v : nibbles)
        if (p->m >= kNibblesFrom && p->m <= v.rows) return &v;
    return nullptr;
}

status nibbles_by(const variant *v, const linear_problem *p, void *space, cudaStream_t stream) {
    const int32_t rows = p->expert_start ? rows_of_x(p) : p->m;
    const plain_space s = lay(p->w, rows, false, space);
    activation_quantiser q = quantiser_of(p, 0, rows);
    if (p->expert_start) q.x_row = nullptr; // the product takes them
    q.code = s.code;
    q.scale = s.scale;
    q.atoms = true;
    if (!p->x_coded) TRY(kernel_quantize_activation(&q, stream));
    return v->rank == kOwnTall ? linear_w4a8_tall_launch(p, s.code, s.scale, stream)
                               : linear_w4a8_launch(v->name, p, s.code, s.scale, stream);
}

// The problem whose x is `space`, the weight being `w`.
linear_problem of_values(const linear_problem *p, linear_weight *w, void *space) {
    *w = *p->w;
    w->act = AF_16;
    linear_problem q = *p;
    q.w = w;
    q.act = AF_16;
    q.x = space;
    q.ldx = w->k;
    q.apart = true; // behind the quantiser, or what makes x values
    return q;
}

status values(const linear_problem *p, void *space, cudaStream_t stream) {
    linear_weight w;
    linear_problem r = of_values(p, &w, space);
    const bool rounds = linear_rounds(&r);
    if (rounds || p->x_coded) {
        r.x = p->x;
        r.ldx = p->ldx;
        r.act = rounds ? p->act : AF_16;
        return linear_launch_16(&r, stream);
    }
    activation_quantiser q = quantiser_of(p, 0, rows_of_x(p));
    q.x_row = nullptr; // the product takes them
    q.value = space;
    TRY(kernel_quantize_activation(&q, stream));
    return linear_launch_16(&r, stream);
}

} // namespace

extern "C" const char *linear_quantised_name(int32_t i) {
    const int32_t n = (int32_t)COUNT_OF(variants);
    if (i < n) return variants[i].name;
    if (i - n < (int32_t)COUNT_OF(nibbles)) return nibbles[i - n].name;
    return i - n == (int32_t)COUNT_OF(nibbles) ? of_experts.name : nullptr;
}

extern "C" int64_t linear_quantised_bytes(const linear_weight *w, int32_t max_x) {
    if (w->act == AF_16) return 0;
    int64_t bytes = 0;
    if (linear_nibbles(w)) bytes = lay(w, max_x, false, nullptr).bytes;
    if (!linear_plain(w)) {
        const int64_t values = aligned((int64_t)max_x * w->k * 2);
        return values > bytes ? values : bytes;
    }
    for (const bool sums : {false, true}) {
        const int32_t most = rows_most(w, sums), rows = (max_x + 15) / 16 * 16;
        const int64_t n = lay(w, rows < most ? rows : most, sums, nullptr).bytes;
        bytes = n > bytes ? n : bytes;
    }
    return bytes;
}

// Nothing where scales are of 128 inputs, where x is taken in parts or the kernel rounds it.
extern "C" activation_codes linear_quantised_x(const linear_problem *p, void *space) {
    int32_t rows = p->expert_start ? rows_of_x(p) : p->m;
    const bool own = linear_plain(p->w), atoms = choose_nibbles(p) != nullptr;
    if (p->w->format == WF_FP8B || (own && parts_of(p, true, &rows) > 1)) return {};
    if (!own && !atoms) {
        linear_weight w;
        const linear_problem r = of_values(p, &w, nullptr);
        return {nullptr, nullptr, linear_rounds(&r) ? AF_16 : p->act, false};
    }
    const plain_space s = lay(p->w, rows, false, space);
    return {s.code, s.scale, p->act, atoms};
}

extern "C" const char *linear_quantised_choice(const linear_problem *p) {
    if (linear_plain(p->w)) {
        const variant *v = choose(p);
        return v ? v->name : nullptr;
    }
    if (const variant *v = choose_nibbles(p)) return v->name;
    static thread_local char name[64];
    linear_weight w;
    const linear_problem r = of_values(p, &w, nullptr);
    const char *kernel = linear_choice_16(&r);
    if (kernel) snprintf(name, sizeof name, "values, %s", kernel);
    return kernel ? name : nullptr;
}

extern "C" status linear_quantised(const linear_problem *p, void *space, void *scratch,
                                   int64_t scratch_bytes, kernel_stream stream) {
    if (linear_plain(p->w)) return plain(p, space, scratch, scratch_bytes, stream);
    const variant *v = choose_nibbles(p);
    return v ? nibbles_by(v, p, space, stream) : values(p, space, stream);
}
