// linear_probe.cu - random problems, float64 answers, and times for linear layers. The reference
// walks the canonical form, not the packed one, so it shares nothing with the kernels but the
// definition.
#include "ladder/ladder_linear.h"
#include "linear_layout.h"
#include "linear_probe.h"

#include <cublas_v2.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <ctime>
#include <vector>

#define CUDA(expr)                                                                                 \
    do {                                                                                           \
        const cudaError_t e_ = (expr);                                                             \
        if (e_ != cudaSuccess) return FAIL(ST_DEVICE, "%s: %s", #expr, cudaGetErrorString(e_));    \
    } while (0)

struct linear_probe {
    linear_weight w;
    qmatrix *q; // [count], device pointers
    std::vector<linear_weight> pool;
    std::vector<qmatrix> canonical; // of matrix 0, one for each of the pool: for the ladder
    std::vector<void *> owned;
    std::vector<void *> twin; // fp16 [n, k] matrices for cuBLAS
    cublasHandle_t blas;
    void *workspace, *blas_workspace, *ladder_space;
    int64_t ladder_bytes, code_bytes, scale_bytes; // of the packed weight, all its matrices
    int32_t sm, n_sms;
    cudaStream_t stream;
    uint64_t seed;
};

namespace {

constexpr int64_t kPoolBytes = 260ll << 20;
constexpr int kGuard = 64;  // elements past y that must stay as they are
constexpr int kRoutes = 32; // of experts, taken in turn when launches are timed

__host__ __device__ uint32_t noise(uint64_t seed, uint64_t i) {
    uint64_t z = seed * 0x9E3779B97F4A7C15ull + i + 0x632BE59BD9B4E019ull;
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9ull;
    z = (z ^ z >> 27) * 0x94D049BB133111EBull;
    return (uint32_t)(z >> 32 ^ z);
}
__host__ __device__ float unit_noise(uint64_t seed, uint64_t i) { // (-1, 1)
    return (float)((int32_t)noise(seed, i) >> 8) * (1.f / 8388608.f);
}

__global__ void fill_codes(uint8_t *code, int64_t n, uint64_t seed, weight_format f, dtype type) {
    for (int64_t i = (int64_t)blockIdx.x * blockDim.x + threadIdx.x; i < n;
         i += (int64_t)gridDim.x * blockDim.x) {
        if (f == WF_16) { // n counts elements
            const float v = unit_noise(seed, i) * 0.05f;
            if (type == DT_BF16)
                reinterpret_cast<__nv_bfloat16 *>(code)[i] = __float2bfloat16_rn(v);
            else
                reinterpret_cast<__half *>(code)[i] = __float2half_rn(v);
            continue;
        }
        uint8_t c = (uint8_t)noise(seed, i);
        if ((f == WF_FP8 || f == WF_FP8B) && (c & 127) == 127) c = 0;
        code[i] = c;
    }
}
__global__ void fill_scales(void *scale, int64_t n, uint64_t seed, weight_format f) {
    for (int64_t i = (int64_t)blockIdx.x * blockDim.x + threadIdx.x; i < n;
         i += (int64_t)gridDim.x * blockDim.x) {
        const uint32_t r = noise(seed, i);
        const float u = 0.75f + 0.5f * unit_noise(seed, i);
        if (f == WF_INT4)
            reinterpret_cast<__half *>(scale)[i] = __float2half_rn(0.01f * u);
        else if (f == WF_MXFP4)
            static_cast<uint8_t *>(scale)[i] = (uint8_t)(119 + r % 4);
        else if (f == WF_NVFP4)
            static_cast<uint8_t *>(scale)[i] = (uint8_t)(0x28 + r % 24);
        else
            static_cast<float *>(scale)[i] = (f == WF_INT8 ? 4e-4f : 2e-4f) * u;
    }
}
__global__ void fill_zeros(uint8_t *zero, int64_t n, uint64_t seed) {
    for (int64_t i = (int64_t)blockIdx.x * blockDim.x + threadIdx.x; i < n;
         i += (int64_t)gridDim.x * blockDim.x)
        zero[i] = (uint8_t)(noise(seed, i) % 16);
}
__global__ void fill_values(void *x, int64_t n, uint64_t seed, dtype type) {
    for (int64_t i = (int64_t)blockIdx.x * blockDim.x + threadIdx.x; i < n;
         i += (int64_t)gridDim.x * blockDim.x) {
        const float v = unit_noise(seed, i);
        if (type == DT_F32)
            static_cast<float *>(x)[i] = v;
        else if (type == DT_BF16)
            static_cast<__nv_bfloat16 *>(x)[i] = __float2bfloat16_rn(v);
        else
            static_cast<__half *>(x)[i] = __float2half_rn(v);
    }
}

__device__ double value_of(const void *p, int64_t i, dtype type) {
    if (type == DT_F32) return static_cast<const float *>(p)[i];
    if (type == DT_BF16) return __bfloat162float(static_cast<const __nv_bfloat16 *>(p)[i]);
    return __half2float(static_cast<const __half *>(p)[i]);
}
__device__ double e4m3_value(uint8_t c) {
    const int e = c >> 3 & 15, f = c & 7;
    const double v = e ? ldexp(1.0 + f / 8.0, e - 7) : ldexp(f / 8.0, -6);
    return c & 128 ? -v : v;
}
__device__ double e2m1_value(uint8_t c) {
    const int e = c >> 1 & 3, f = c & 1;
    const double v = e ? ldexp(1.0 + f / 2.0, e - 1) : f / 2.0;
    return c & 8 ? -v : v;
}
__device__ double weight_value(const qmatrix &q, dtype type, int32_t n, int32_t k) {
    const int64_t at = (int64_t)n * q.k + k;
    if (q.format == WF_16) return value_of(q.code, at, type);
    const int64_t s = (int64_t)(n / q.block_n) * ((q.k + q.group - 1) / q.group) + k / q.group;
    const uint8_t nibble = q.code[at / 2 * (q.scale_type != DT_F32)] >> (at % 2 * 4) & 15;
    switch (q.format) {
    case WF_INT4:
        return ((int)nibble - (q.zero ? (int)q.zero[s] : 8)) *
               (double)__half2float(static_cast<const __half *>(q.scale)[s]);
    case WF_INT8: return (double)(int8_t)q.code[at] * static_cast<const float *>(q.scale)[s];
    case WF_MXFP4:
        return e2m1_value(nibble) * ldexp(1.0, static_cast<const uint8_t *>(q.scale)[s] - 127);
    case WF_NVFP4:
        return e2m1_value(nibble) * e4m3_value(static_cast<const uint8_t *>(q.scale)[s]) *
               q.global_scale;
    default: return e4m3_value(q.code[at]) * static_cast<const float *>(q.scale)[s];
    }
}

// to [rows, k]: x quantised as ref_quant.h defines, by arithmetic of its own. One warp a span.
__device__ float e4m3_nearest(float v) {
    const float a = fabsf(v);
    if (a == 0) return v;
    int e;
    frexpf(a, &e);
    const float step = ldexpf(1.f, max(e - 1, -6) - 3);
    return copysignf(fminf(rintf(a / step) * step, 448.f), v);
}
__global__ void quantise_x(double *to, const void *x, int64_t ldx, int32_t rows, int32_t k,
                           int32_t span, act_format act, dtype type) {
    const int64_t i = ((int64_t)blockIdx.x * blockDim.x + threadIdx.x) / 32;
    const int32_t spans = (k + span - 1) / span, row = (int32_t)(i / spans);
    if (row >= rows) return;
    const int32_t from = (int32_t)(i % spans) * span, end = min(from + span, k);
    float amax = 0;
    for (int32_t c = from + (int32_t)threadIdx.x % 32; c < end; c += 32)
        amax = fmaxf(amax, fabsf((float)value_of(x, row * ldx + c, type)));
    for (int d = 16; d; d /= 2) amax = fmaxf(amax, __shfl_xor_sync(~0u, amax, d));
    const float s = amax == 0 ? 1.f : amax / (act == AF_FP8 ? 448.f : 127.f);
    for (int32_t c = from + (int32_t)threadIdx.x % 32; c < end; c += 32) {
        const float q = (float)value_of(x, row * ldx + c, type) / s;
        const float code = act == AF_FP8 ? e4m3_nearest(q) : rintf(fminf(fmaxf(q, -127), 127));
        to[(int64_t)row * k + c] = (double)code * s;
    }
}

struct reference_args {
    const qmatrix *q;          // device copy
    const double *x_quantised; // [rows of x, k], or NULL: x itself
    const void *x, *bias, *y_before, *y;
    const int32_t *expert_start, *x_row;
    dtype type, y_type;
    int64_t ldx, ldy;
    int32_t m, n, n_out, k, count, epilogue, m_step, n_step, rows, cols;
    float limit;
    double *sums;   // [0] error squared, [1] reference squared, [2] unwritten
    double *column; // [cols] error squared
};

__device__ double dot(const reference_args &a, int32_t expert, int64_t row_x, int32_t n) {
    double sum = 0;
    for (int32_t k = threadIdx.x % 32; k < a.k; k += 32)
        sum += (a.x_quantised ? a.x_quantised[row_x * a.k + k]
                              : value_of(a.x, row_x * a.ldx + k, a.type)) *
               weight_value(a.q[expert], a.type, n, k);
    for (int d = 16; d; d /= 2) sum += __shfl_xor_sync(~0u, sum, d);
    return a.bias ? sum + value_of(a.bias, (int64_t)expert * a.n + n, a.type) : sum;
}

__global__ void compare(const reference_args a) { // one warp an output
    const int64_t i = ((int64_t)blockIdx.x * blockDim.x + threadIdx.x) / 32;
    if (i >= (int64_t)a.rows * a.cols) return;
    const int32_t m = min((int32_t)(i / a.cols) * a.m_step, a.m - 1);
    const int32_t n = min((int32_t)(i % a.cols) * a.n_step, a.n_out - 1);
    int32_t expert = 0;
    if (a.expert_start)
        while (expert + 1 < a.count && a.expert_start[expert + 1] <= m) expert++;
    const int64_t row_x = a.x_row ? a.x_row[m] : m;
    double want = dot(a, expert, row_x, n);
    if (a.epilogue == LINEAR_GATED || a.epilogue == LINEAR_GATED_OAI) {
        double u = dot(a, expert, row_x, n + a.n_out);
        if (a.epilogue == LINEAR_GATED_OAI) {
            want = fmin(want, (double)a.limit);
            u = fmin(fmax(u, -(double)a.limit), (double)a.limit) + 1;
            want = want / (1 + exp(-1.702 * want)) * u;
        } else {
            want = want / (1 + exp(-want)) * u;
        }
    }
    if (a.epilogue == LINEAR_RESIDUAL) want += value_of(a.y_before, m * a.ldy + n, a.y_type);
    if (threadIdx.x % 32) return;
    const double got = value_of(a.y, m * a.ldy + n, a.y_type);
    if (isnan(got)) atomicAdd(&a.sums[2], 1.0);
    atomicAdd(&a.sums[0], (got - want) * (got - want));
    atomicAdd(&a.sums[1], want * want);
    atomicAdd(&a.column[i % a.cols], (got - want) * (got - want));
}

// fp16 [n, k] of the canonical form, for cuBLAS: the same numbers as far as fp16 holds them.
__global__ void expand(__half *to, const qmatrix *q, dtype type) {
    const int64_t count = (int64_t)q->n * q->k;
    for (int64_t i = (int64_t)blockIdx.x * blockDim.x + threadIdx.x; i < count;
         i += (int64_t)gridDim.x * blockDim.x)
        to[i] = __double2half(weight_value(*q, type, (int32_t)(i / q->k), (int32_t)(i % q->k)));
}

status own(linear_probe *p, void **out, int64_t bytes) {
    CUDA(cudaMalloc(out, bytes > 0 ? (size_t)bytes : 16));
    p->owned.push_back(*out);
    return ST_OK;
}

status make_canonical(linear_probe *p, qmatrix *q, int32_t index) {
    const linear_weight *w = &p->w;
    *q = qmatrix{};
    q->format = w->format;
    q->n = w->n;
    q->k = w->k;
    q->block_n = w->format == WF_FP8B ? 128 : 1;
    q->group = w->format == WF_INT4 && w->group ? w->group
               : w->format == WF_MXFP4          ? 32
               : w->format == WF_NVFP4          ? 16
               : w->format == WF_FP8B           ? 128
                                                : w->k;
    q->scale_type = w->format == WF_INT4    ? DT_F16
                    : w->format == WF_MXFP4 ? DT_UE8M0
                    : w->format == WF_NVFP4 ? DT_E4M3
                                            : DT_F32;
    q->global_scale = w->format == WF_NVFP4 ? 0.01f : 1.f;
    const int bits = linear_layout_of(w).bits;
    const int64_t elements = (int64_t)w->n * w->k;
    const int64_t scales =
        (int64_t)((w->n + q->block_n - 1) / q->block_n) * ((w->k + q->group - 1) / q->group);
    const uint64_t seed = p->seed * 1000003 + (uint64_t)index * 17;
    TRY(own(p, (void **)&q->code, elements * bits / 8));
    TRY(own(p, &q->scale, scales * 4));
    fill_codes<<<1024, 256, 0, p->stream>>>(q->code, bits == 16 ? elements : elements * bits / 8,
                                            seed, w->format, w->type);
    if (bits < 16) fill_scales<<<256, 256, 0, p->stream>>>(q->scale, scales, seed + 1, w->format);
    if (w->format == WF_INT4 && !w->sym) {
        TRY(own(p, (void **)&q->zero, scales));
        fill_zeros<<<256, 256, 0, p->stream>>>(q->zero, scales, seed + 2);
    }
    CUDA(cudaGetLastError());
    return ST_OK;
}

status open_device(linear_probe *p) {
    int device;
    CUDA(cudaGetDevice(&device));
    cudaDeviceProp prop;
    CUDA(cudaGetDeviceProperties(&prop, device));
    p->sm = prop.major * 10 + prop.minor;
    p->n_sms = prop.multiProcessorCount;
    CUDA(cudaStreamCreate(&p->stream));
    return ST_OK;
}

// The weight, packed and in its canonical form, and the kernels' workspace.
status make_weight(linear_probe *p) {
    linear_weight *w = &p->w;
    w->family = linear_family(p->sm, w->family);
    TRY(linear_pack_bytes(w, &p->code_bytes, &p->scale_bytes));
    std::vector<qmatrix> q((size_t)w->count);
    TRY(own(p, &w->code, p->code_bytes));
    TRY(own(p, &w->scale, p->scale_bytes));
    TRY(own(p, &w->bias, (int64_t)w->count * w->n * 4));
    fill_values<<<256, 256, 0, p->stream>>>(w->bias, (int64_t)w->count * w->n, p->seed + 5,
                                            w->type);
    for (int32_t i = 0; i < w->count; i++) {
        TRY(make_canonical(p, &q[(size_t)i], i));
        TRY(linear_pack(w, i, &q[(size_t)i], p->stream));
    }
    if (w->format == WF_NVFP4) {
        std::vector<float> global((size_t)w->count, q[0].global_scale);
        TRY(own(p, (void **)&w->global_scale, w->count * 4));
        CUDA(cudaMemcpy(w->global_scale, global.data(), global.size() * 4, cudaMemcpyDefault));
    }
    p->canonical.push_back(q[0]);
    TRY(own(p, (void **)&p->q, (int64_t)(q.size() * sizeof(qmatrix))));
    CUDA(cudaMemcpy(p->q, q.data(), q.size() * sizeof(qmatrix), cudaMemcpyDefault));
    const int64_t workspace = linear_workspace_bytes(w, 1 << 20, p->n_sms);
    TRY(own(p, &p->workspace, workspace));
    CUDA(cudaMemset(p->workspace, 0, (size_t)workspace));
    CUDA(cudaDeviceSynchronize());
    p->pool.push_back(*w);
    return ST_OK;
}

// Copies of the weight until no cache holds them all.
status fill_pool(linear_probe *p) {
    const linear_weight *w = &p->w;
    const int64_t bytes = p->code_bytes + p->scale_bytes;
    for (int64_t have = bytes; have < kPoolBytes; have += bytes) {
        linear_weight copy = *w;
        TRY(own(p, &copy.code, p->code_bytes));
        TRY(own(p, &copy.scale, p->scale_bytes));
        CUDA(cudaMemcpy(copy.code, w->code, (size_t)p->code_bytes, cudaMemcpyDefault));
        CUDA(cudaMemcpy(copy.scale, w->scale, (size_t)p->scale_bytes, cudaMemcpyDefault));
        p->pool.push_back(copy);
    }
    return ST_OK;
}

// cuBLAS, and as many copies of the matrix in fp16.
status open_blas(linear_probe *p) {
    constexpr int64_t workspace = 64 << 20;
    const linear_weight *w = &p->w;
    const int64_t bytes = (int64_t)w->n * w->k * 2;
    for (int64_t have = 0; w->count == 1 && have < kPoolBytes; have += bytes) {
        void *twin;
        TRY(own(p, &twin, bytes));
        expand<<<1024, 256, 0, p->stream>>>(static_cast<__half *>(twin), p->q, w->type);
        p->twin.push_back(twin);
    }
    if (cublasCreate(&p->blas) != CUBLAS_STATUS_SUCCESS) return FAIL(ST_DEVICE, "cublasCreate");
    TRY(own(p, &p->blas_workspace, workspace));
    cublasSetStream(p->blas, p->stream);
    cublasSetWorkspace(p->blas, p->blas_workspace, workspace);
    CUDA(cudaDeviceSynchronize());
    return ST_OK;
}

status open(linear_probe *p, bool timed) {
    TRY(open_device(p));
    TRY(make_weight(p));
    if (!timed) return ST_OK;
    TRY(fill_pool(p));
    return open_blas(p);
}

// Device memory of one trial.
struct bench_data {
    void *x = nullptr, *y = nullptr, *y_before = nullptr;
    int32_t *expert_start = nullptr, *x_row = nullptr; // [kRoutes][count + 1], [kRoutes][m]
    double *sums = nullptr, *x_quantised = nullptr;
    int32_t *ahead = nullptr;   // a list for linear_problem.ahead
    int32_t n_out, x_rows, hit; // hit: experts with rows in the first route
    int64_t ldx, ldy, y_bytes;
    ~bench_data() {
        for (void *m : {x, y, y_before, (void *)expert_start, (void *)x_row, (void *)sums,
                        (void *)x_quantised, (void *)ahead})
            cudaFree(m);
    }
};

// The kernel by name, over copy i of the weights.
status run(linear_probe *p, const linear_problem *problem, int32_t i) {
    if (!ladder_linear_is(problem->kernel)) return kernel_linear(problem, p->stream);
    return ladder_linear(problem->kernel, problem, &p->canonical[(size_t)i], p->ladder_space,
                         p->stream);
}

// What the ladder needs beside the packed weights: its codes in every copy of the pool.
status open_ladder(linear_probe *p, int32_t m) {
    const linear_weight *w = &p->w;
    const int64_t space = ladder_linear_space(m, w->n, w->k);
    if (space > p->ladder_bytes) {
        TRY(own(p, &p->ladder_space, space));
        p->ladder_bytes = space;
    }
    while (p->canonical.size() < p->pool.size()) {
        qmatrix q = p->canonical[0];
        TRY(own(p, (void **)&q.code, (int64_t)w->n * w->k / 2));
        CUDA(cudaMemcpy(q.code, p->canonical[0].code, (size_t)w->n * w->k / 2, cudaMemcpyDefault));
        p->canonical.push_back(q);
    }
    return ST_OK;
}

// Rows of the experts, and the row of x of each permuted row. Route r > 0 is route 0 with the
// experts renamed, so that launches in turn find nothing of each other's in a cache.
void route(const linear_probe *p, const linear_trial *t, int32_t x_rows, int32_t r, int32_t *start,
           int32_t *row) {
    const int32_t count = p->w.count, used = t->experts_used ? t->experts_used : count;
    std::vector<std::vector<int32_t>> of((size_t)count); // rows of x, by expert
    std::vector<int32_t> order((size_t)count);
    for (int32_t i = 0; i < t->m; i++) {
        if (!t->top_k) {
            const uint32_t e = noise(p->seed + 11, (uint64_t)i) % (uint32_t)used;
            of[(size_t)(e * 7 + 3) % (size_t)count].push_back(
                t->gather ? (int32_t)(noise(p->seed + 13, (uint64_t)i) % (uint32_t)x_rows) : i);
            continue;
        }
        const int32_t in = i % t->top_k; // the next card of this token's shuffle
        for (int32_t e = 0; in == 0 && e < count; e++) order[(size_t)e] = e;
        std::swap(order[(size_t)in],
                  order[(size_t)in + noise(p->seed + 11, (uint64_t)i) % (uint32_t)(count - in)]);
        const int32_t shift = (int32_t)((int64_t)r * std::min(t->m, count) % count);
        of[(size_t)((order[(size_t)in] + shift) % count)].push_back(i / t->top_k);
    }
    int32_t at = 0;
    for (int32_t e = 0; e < count; e++) {
        start[e] = at;
        for (const int32_t x : of[(size_t)e]) row[at++] = x;
    }
    start[count] = at;
}

// x becomes the values of its codes.
status round_x(const linear_probe *p, act_format act, const bench_data *d) {
    activation_quantiser q = {};
    q.x = q.value = d->x;
    q.ldx = d->ldx;
    q.m = d->x_rows;
    q.k = p->w.k;
    q.type = p->w.type;
    q.act = act;
    return kernel_quantize_activation(&q, p->stream);
}

status copy_out(int32_t **to, const std::vector<int32_t> &from) {
    CUDA(cudaMalloc((void **)to, from.size() * sizeof(int32_t)));
    CUDA(cudaMemcpy(*to, from.data(), from.size() * sizeof(int32_t), cudaMemcpyDefault));
    return ST_OK;
}

// Which rows of x go to which expert, in every route.
status make_routes(const linear_probe *p, const linear_trial *t, bench_data *d) {
    const int32_t routes = t->top_k ? kRoutes : 1, count = p->w.count;
    const size_t starts = (size_t)count + 1, m = (size_t)t->m;
    std::vector<int32_t> start(starts * (size_t)routes), row(m * (size_t)routes);
    for (int32_t r = 0; r < routes; r++)
        route(p, t, d->x_rows, r, &start[(size_t)r * starts], &row[(size_t)r * m]);
    d->hit = 1;
    if (count > 1) {
        d->hit = 0;
        for (int32_t e = 0; e < count; e++) d->hit += start[(size_t)e + 1] > start[(size_t)e];
        TRY(copy_out(&d->expert_start, start));
    }
    return t->gather ? copy_out(&d->x_row, row) : ST_OK;
}

int64_t element_bytes(const linear_trial *t) { return t->y_type == DT_F32 ? 4 : 2; }

status make_data(const linear_probe *p, const linear_trial *t, bench_data *d) {
    const linear_weight *w = &p->w;
    const bool gated = t->epilogue == LINEAR_GATED || t->epilogue == LINEAR_GATED_OAI;
    d->n_out = gated ? w->n / 2 : w->n;
    d->x_rows = !t->gather ? t->m : t->top_k ? t->m / t->top_k : t->m / 2 + 1;
    d->ldx = w->k + (t->gather ? 8 : 0);
    d->ldy = d->n_out + (t->bias ? 4 : 0);
    d->y_bytes = ((int64_t)t->m * d->ldy + kGuard) * element_bytes(t);
    CUDA(cudaMalloc(&d->x, (size_t)(d->x_rows * d->ldx * 2)));
    CUDA(cudaMalloc(&d->y, (size_t)d->y_bytes));
    CUDA(cudaMalloc((void **)&d->sums, (size_t)(3 + d->n_out) * sizeof(double)));
    fill_values<<<512, 256, 0, p->stream>>>(d->x, d->x_rows * d->ldx, p->seed + 7, w->type);
    if (t->rounded != AF_16) TRY(round_x(p, t->rounded, d));
    if (t->epilogue == LINEAR_RESIDUAL) {
        CUDA(cudaMalloc(&d->y_before, (size_t)d->y_bytes));
        fill_values<<<512, 256, 0, p->stream>>>(d->y_before, t->m * d->ldy, p->seed + 9, t->y_type);
    }
    TRY(make_routes(p, t, d));
    CUDA(cudaStreamSynchronize(p->stream));
    return ST_OK;
}

linear_problem problem_of(const linear_probe *p, const linear_trial *t, const bench_data *d,
                          linear_weight *w) {
    linear_problem r = {};
    if (!t->bias) w->bias = nullptr;
    r.w = w;
    r.m = t->m;
    r.x = d->x;
    r.y = d->y;
    r.ldx = d->ldx;
    r.ldy = d->ldy;
    r.y_type = t->y_type;
    r.epilogue = t->epilogue;
    r.limit = 0.5f;
    r.act = w->act;
    r.expert_start = d->expert_start;
    r.x_row = d->x_row;
    r.x_rows = d->x_rows;
    r.workspace = p->workspace;
    r.kernel = t->kernel;
    r.sm = p->sm;
    r.n_sms = p->n_sms;
    return r;
}

// The first unit of every matrix's codes against a pattern that moves each by about its range.
__global__ void spoil_codes(uint8_t *code, int64_t stride, int32_t n) {
    for (int32_t i = threadIdx.x; i < n; i += blockDim.x) code[blockIdx.x * stride + i] ^= 0x4a;
}
status spoil(const linear_probe *p) {
    const linear_layout l = linear_layout_of(&p->w);
    spoil_codes<<<p->w.count, 512, 0, p->stream>>>(static_cast<uint8_t *>(p->w.code), l.code_bytes,
                                                   l.unit_bytes);
    CUDA(cudaStreamSynchronize(p->stream));
    return ST_OK;
}

double median_us(std::vector<float> &ms, double launches) {
    std::sort(ms.begin(), ms.end());
    return ms[ms.size() / 2] * 1e3 / launches;
}

// Launches bound by arithmetic draw so much power that the clock falls, on an H200 from 1.98 GHz to
// as little as 1.49 within 50 ms, and comes back in the 50 to 100 ms after. Without a rest a kernel
// is timed at the clock that the one before it has left.
constexpr timespec kRest = {0, 60 * 1000 * 1000};

status replay(const linear_probe *p, cudaGraph_t graph, int32_t replays, int32_t launches,
              bool rest, double *us) {
    cudaGraphExec_t exec;
    cudaEvent_t from, to;
    std::vector<float> ms;
    CUDA(cudaGraphInstantiate(&exec, graph, 0));
    CUDA(cudaEventCreate(&from));
    CUDA(cudaEventCreate(&to));
    if (rest) {
        CUDA(cudaStreamSynchronize(p->stream));
        nanosleep(&kRest, nullptr);
    }
    for (int32_t i = 0; i < replays + 2; i++) {
        float t;
        CUDA(cudaEventRecord(from, p->stream));
        CUDA(cudaGraphLaunch(exec, p->stream));
        CUDA(cudaEventRecord(to, p->stream));
        CUDA(cudaEventSynchronize(to));
        CUDA(cudaEventElapsedTime(&t, from, to));
        if (i >= 2) ms.push_back(t);
    }
    *us = median_us(ms, launches);
    CUDA(cudaGraphExecDestroy(exec));
    CUDA(cudaGraphDestroy(graph));
    CUDA(cudaEventDestroy(from));
    CUDA(cudaEventDestroy(to));
    return ST_OK;
}

} // namespace

extern "C" int32_t linear_probe_sm(void) {
    int major = 0, minor = 0;
    if (cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, 0) != cudaSuccess ||
        cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, 0) != cudaSuccess)
        return 0;
    return major * 10 + minor;
}

extern "C" status linear_probe_open(linear_probe **out, const linear_weight *w, bool timed,
                                    uint64_t seed) {
    linear_probe *p = new linear_probe();
    p->w = *w;
    p->seed = seed;
    const status st = open(p, timed);
    if (st == ST_OK)
        *out = p;
    else
        linear_probe_close(p);
    return st;
}

extern "C" void linear_probe_close(linear_probe *p) {
    if (!p) return;
    if (p->blas) cublasDestroy(p->blas);
    for (void *m : p->owned) cudaFree(m);
    if (p->stream) cudaStreamDestroy(p->stream);
    delete p;
}

// Pieces of the first 2 KB of codes, the least that a weight has, again and again.
static status ask_ahead(const linear_probe *p, bench_data *d, linear_problem *problem) {
    constexpr int32_t n = 1000;
    std::vector<int32_t> list(2 + 2 * n);
    list[0] = n;
    for (int32_t i = 0; i < n; i++) list[2 + 2 * i] = i % 2, list[3 + 2 * i] = i / 2 % 2;
    TRY(copy_out(&d->ahead, list));
    problem->ahead.list = d->ahead;
    problem->ahead.base = p->w.code;
    problem->ahead.stride = 512;
    problem->ahead.bytes = 768;
    problem->ahead.most = n - 1;
    problem->ahead.part = 1;
    problem->ahead.parts = 2;
    return ST_OK;
}

// Once, over memory that is NaN in every type; a residual's begins with what is added to.
static status run_once(linear_probe *p, const linear_trial *t, const bench_data *d,
                       const linear_problem *problem) {
    CUDA(cudaMemset(d->y, 0xff, (size_t)d->y_bytes));
    if (d->y_before)
        CUDA(cudaMemcpy(d->y, d->y_before, (size_t)(t->m * d->ldy * element_bytes(t)),
                        cudaMemcpyDefault));
    CUDA(cudaDeviceSynchronize());
    if (t->sabotage == 1) TRY(spoil(p));
    TRY(run(p, problem, 0));
    CUDA(cudaStreamSynchronize(p->stream));
    return t->sabotage == 1 ? spoil(p) : ST_OK; // undoes it
}

static status quantise_reference(const linear_probe *p, bench_data *d) {
    const linear_weight *w = &p->w;
    const int32_t span = w->act == AF_FP8 && w->format == WF_FP8B ? 128 : w->k;
    const int64_t spans = (int64_t)d->x_rows * ((w->k + span - 1) / span);
    CUDA(cudaMalloc((void **)&d->x_quantised, (size_t)d->x_rows * (size_t)w->k * sizeof(double)));
    quantise_x<<<(unsigned)((spans + 7) / 8), 256, 0, p->stream>>>(
        d->x_quantised, d->x, d->ldx, d->x_rows, w->k, span, w->act, w->type);
    return ST_OK;
}

// What of the problem is compared: every m_step-th row and n_step-th column.
static reference_args reference_of(const linear_probe *p, const linear_problem *problem,
                                   const bench_data *d, int64_t samples) {
    reference_args a = {};
    a.q = p->q;
    a.x_quantised = d->x_quantised;
    a.x = d->x;
    a.bias = problem->w->bias;
    a.y_before = d->y_before;
    a.y = d->y;
    a.expert_start = d->expert_start;
    a.x_row = d->x_row;
    a.type = p->w.type;
    a.y_type = problem->y_type;
    a.ldx = d->ldx;
    a.ldy = d->ldy;
    a.m = problem->m;
    a.n = p->w.n;
    a.n_out = d->n_out;
    a.k = p->w.k;
    a.count = p->w.count;
    a.epilogue = problem->epilogue;
    a.limit = problem->limit;
    a.sums = d->sums;
    a.column = d->sums + 3;
    a.m_step = a.n_step = 1;
    a.rows = a.m;
    a.cols = a.n_out;
    while ((int64_t)a.rows * a.cols > std::max(samples, (int64_t)64)) {
        int32_t &step = a.rows > 16 ? a.m_step : a.n_step;
        step++;
        a.rows = (a.m + a.m_step - 1) / a.m_step;
        a.cols = (a.n_out + a.n_step - 1) / a.n_step;
    }
    return a;
}

static status measure_error(const linear_probe *p, const reference_args &a, linear_outcome *o) {
    const int64_t warps = (int64_t)a.rows * a.cols;
    CUDA(cudaMemset(a.sums, 0, (size_t)(3 + a.n_out) * sizeof(double)));
    compare<<<(unsigned)((warps + 7) / 8), 256, 0, p->stream>>>(a);
    CUDA(cudaStreamSynchronize(p->stream));
    std::vector<double> sums((size_t)(3 + a.cols));
    CUDA(cudaMemcpy(sums.data(), a.sums, sums.size() * sizeof(double), cudaMemcpyDefault));
    o->rel_err = sqrt(sums[0] / sums[1]);
    o->worst = 0;
    for (int32_t i = 0; i < a.cols; i++) {
        const double e = sqrt(sums[(size_t)(3 + i)] * a.cols / sums[1]);
        if (e > o->worst || std::isnan(e)) o->worst = e;
    }
    o->compared = warps;
    o->unwritten = (int64_t)sums[2];
    return ST_OK;
}

// The hash of y, and how much was written beside it.
static status inspect_y(const linear_trial *t, const bench_data *d, linear_outcome *o) {
    const int64_t element = element_bytes(t);
    std::vector<uint8_t> y((size_t)d->y_bytes);
    CUDA(cudaMemcpy(y.data(), d->y, y.size(), cudaMemcpyDefault));
    o->hash = 14695981039346656037ull;
    for (size_t i = 0; i + 8 <= y.size(); i += 8) {
        uint64_t v;
        memcpy(&v, &y[i], 8);
        o->hash = (o->hash ^ v) * 1099511628211ull;
    }
    o->outside = 0;
    for (int64_t i = 0; i < (int64_t)t->m * d->ldy + kGuard; i++) {
        const bool inside = i / d->ldy < t->m && i % d->ldy < d->n_out;
        if (inside || (d->y_before && i < t->m * d->ldy)) continue;
        for (int64_t b = 0; b < element; b++)
            if (y[(size_t)(i * element + b)] != 0xff) o->outside++;
    }
    return ST_OK;
}

extern "C" status linear_probe_check(linear_probe *p, const linear_trial *t, int64_t samples,
                                     linear_outcome *o) {
    bench_data d;
    TRY(make_data(p, t, &d));
    linear_weight w = p->w;
    linear_problem problem = problem_of(p, t, &d, &w);
    if (t->ahead) TRY(ask_ahead(p, &d, &problem));
    const bool ladder = ladder_linear_is(t->kernel);
    if (ladder) TRY(open_ladder(p, t->m));
    const char *name = ladder ? t->kernel : linear_choice(&problem);
    if (!name) return ST_UNSUPPORTED;
    snprintf(o->kernel, sizeof o->kernel, "%s", name);
    TRY(run_once(p, t, &d, &problem));
    if (w.act != AF_16 && t->sabotage != 2) TRY(quantise_reference(p, &d));
    TRY(measure_error(p, reference_of(p, &problem, &d, samples), o));
    TRY(inspect_y(t, &d, o));
    o->bytes = (p->code_bytes + p->scale_bytes) / w.count * d.hit;
    o->bytes_io = ((int64_t)d.x_rows * w.k + (int64_t)t->m * d.n_out) * 2;
    return ST_OK;
}

// cublasGemmEx in fp16 over the twins in turn.
static status time_blas(linear_probe *p, int32_t m, int32_t launches, int32_t replays, bool rest,
                        double *us) {
    const float one = 1, zero = 0;
    const int32_t n = p->w.n, k = p->w.k;
    void *x16, *y16;
    cudaGraph_t graph;
    CUDA(cudaMalloc(&x16, (size_t)m * k * 2));
    CUDA(cudaMalloc(&y16, (size_t)m * n * 2));
    fill_values<<<512, 256, 0, p->stream>>>(x16, (int64_t)m * k, p->seed + 7, DT_F16);
    const auto gemm = [&](int32_t i) {
        return cublasGemmEx(p->blas, CUBLAS_OP_T, CUBLAS_OP_N, n, m, k, &one,
                            p->twin[(size_t)i % p->twin.size()], CUDA_R_16F, k, x16, CUDA_R_16F, k,
                            &zero, y16, CUDA_R_16F, n, CUBLAS_COMPUTE_32F,
                            CUBLAS_GEMM_DEFAULT) == CUBLAS_STATUS_SUCCESS;
    };
    bool good = gemm(0);
    CUDA(cudaStreamSynchronize(p->stream));
    CUDA(cudaStreamBeginCapture(p->stream, cudaStreamCaptureModeThreadLocal));
    for (int32_t i = 0; i < launches; i++) good = good && gemm(i);
    CUDA(cudaStreamEndCapture(p->stream, &graph));
    if (!good) return FAIL(ST_DEVICE, "cublasGemmEx failed");
    TRY(replay(p, graph, replays, launches, rest, us));
    CUDA(cudaFree(x16));
    CUDA(cudaFree(y16));
    return ST_OK;
}

// n launches over the copies of the weight in turn, each to other experts where there are routes.
static status capture(linear_probe *p, const linear_trial *t, const bench_data *d, int32_t n,
                      cudaGraph_t *graph) {
    std::vector<linear_weight> w = p->pool;
    CUDA(cudaStreamBeginCapture(p->stream, cudaStreamCaptureModeThreadLocal));
    for (int32_t i = 0; i < n; i++) {
        const int32_t copy = i % (int32_t)w.size();
        linear_problem problem = problem_of(p, t, d, &w[(size_t)copy]);
        if (t->top_k) {
            problem.routed = t->routed && i > 0;
            problem.expert_start += i % kRoutes * (p->w.count + 1);
            if (problem.x_row) problem.x_row += (int64_t)(i % kRoutes) * t->m;
        }
        const status st = run(p, &problem, copy);
        if (st != ST_OK) {
            cudaStreamEndCapture(p->stream, graph);
            return st;
        }
    }
    CUDA(cudaStreamEndCapture(p->stream, graph));
    return ST_OK;
}

extern "C" status linear_probe_time(linear_probe *p, const linear_trial *t, int32_t replays,
                                    bool cublas, linear_outcome *o) {
    bench_data d;
    TRY(make_data(p, t, &d));
    const double flops = 2.0 * t->m * p->w.n * p->w.k, bytes = (double)p->w.n * p->w.k * d.hit;
    const double guess_us = std::max(flops / 6e8, bytes / 4e6) + 2;
    const bool rest = flops / 6e8 > bytes / 4e6;
    const auto launches = [&](size_t pool) {
        return std::max((int32_t)std::min((double)(pool > 1 ? 2 * pool : 20), 3000 / guess_us), 2);
    };
    cudaGraph_t graph;
    if (ladder_linear_is(t->kernel)) {
        TRY(open_ladder(p, t->m));
        linear_weight w = p->w; // cuBLAS makes its handle outside the capture
        const linear_problem first = problem_of(p, t, &d, &w);
        TRY(run(p, &first, 0));
        CUDA(cudaStreamSynchronize(p->stream));
    }
    const int32_t n = launches(t->top_k ? kRoutes : p->pool.size());
    TRY(capture(p, t, &d, n, &graph));
    TRY(replay(p, graph, replays, n, rest, &o->us));
    o->cublas_us = 0;
    if (!cublas || p->twin.empty()) return ST_OK;
    return time_blas(p, t->m, launches(p->twin.size()), replays, rest, &o->cublas_us);
}
