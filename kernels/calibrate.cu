// calibrate.cu - see calibrate.h: products and triangular solves by cuBLAS, in f32 (no TF32) and
// f64, the rest here. Only one matrix at a time is on the device, beside the sums of moments.
#include "calibrate.h"
#include "quantize.cuh"
#include "quantize.h"

#include <cublas_v2.h>

namespace {

constexpr int kThreads = 256;
constexpr int kRows = 512; // of inputs that are multiplied at a time
constexpr int kBlock = 64; // columns that GPTQ rounds before the rest learns of their errors
constexpr int kWarps = 8;  // rows of a block that rounds

status check(cudaError_t e, const char *what) {
    if (e == cudaSuccess) return ST_OK;
    (void)cudaGetLastError();
    return FAIL(e == cudaErrorMemoryAllocation ? ST_OOM : ST_DEVICE, "%s: %s", what,
                cudaGetErrorString(e));
}
status check(cublasStatus_t e, const char *what) {
    return e == CUBLAS_STATUS_SUCCESS ? ST_OK
                                      : FAIL(ST_DEVICE, "%s: cuBLAS error %d", what, (int)e);
}
#define CUDA(call) TRY(check((call), "calibration"))

unsigned blocks_of(int64_t n) { return (unsigned)div_up(n, kThreads); }

// The one handle, on `stream`.
status library(cublasHandle_t *out, cudaStream_t stream) {
    static cublasHandle_t handle;
    if (!handle) CUDA(cublasCreate(&handle));
    *out = handle;
    return check(cublasSetStream(handle, stream), "cuBLAS");
}

// Device memory of one call, freed at its end.
struct memory {
    void *block[12];
    int n = 0;
    ~memory() {
        for (int i = 0; i < n; i++) (void)cudaFree(block[i]);
    }
    template <typename T> status take(T **out, int64_t count) {
        CUDA(cudaMalloc(&block[n], (size_t)count * sizeof(T)));
        *out = static_cast<T *>(block[n++]);
        return ST_OK;
    }
    template <typename T> status copy(T **out, const T *from, int64_t count) {
        TRY(take(out, count));
        return check(cudaMemcpy(*out, from, (size_t)count * sizeof(T), cudaMemcpyHostToDevice),
                     "calibration");
    }
};

// --- Moments ------------------------------------------------------------------------------------

// out [n, k] = rows of x, each divided by its root mean square. A block a row.
template <typename T>
__global__ void __launch_bounds__(kThreads)
    normalise(float *out, const T *x, const int32_t *row, int k) {
    __shared__ double part[kThreads / 32];
    const T *from = x + int64_t{row ? row[blockIdx.x] : (int)blockIdx.x} * k;
    double sum = 0;
    for (int i = (int)threadIdx.x; i < k; i += kThreads) {
        const double v = (double)to_f32(from[i]);
        sum += v * v;
    }
#pragma unroll
    for (int d = 16; d > 0; d >>= 1) sum += __shfl_xor_sync(~0u, sum, d);
    if (threadIdx.x % 32 == 0) part[threadIdx.x / 32] = sum;
    __syncthreads();
    sum = 0;
    for (int i = 0; i < kThreads / 32; i++) sum += part[i];
    const float factor = sum > 0 ? (float)(1 / sqrt(sum / k)) : 0.f;
    for (int i = (int)threadIdx.x; i < k; i += kThreads)
        out[int64_t{blockIdx.x} * k + i] = to_f32(from[i]) * factor;
}

__global__ void __launch_bounds__(kThreads)
    add_magnitudes(double *sum, const float *x, int rows, int k) {
    const int i = (int)(blockIdx.x * kThreads + threadIdx.x);
    if (i >= k) return;
    double s = 0;
    for (int r = 0; r < rows; r++) s += fabs((double)x[int64_t{r} * k + i]);
    sum[i] += s;
}

__global__ void __launch_bounds__(kThreads) add_products(double *sum, const float *x, int64_t n) {
    const int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x;
    if (i < n) sum[i] += (double)x[i];
}

// What all sums share while there are any.
struct {
    float *x, *product; // [kRows, k], [k, k] of the widest
    int32_t *row;       // [kRows]
    int k, users;
} scratch;

void free_scratch() {
    (void)cudaFree(scratch.x);
    (void)cudaFree(scratch.product);
    (void)cudaFree(scratch.row);
    scratch = {};
}

status grow_scratch(int k) {
    if (k <= scratch.k) return ST_OK;
    const int users = scratch.users;
    CUDA(cudaDeviceSynchronize());
    free_scratch();
    scratch.users = users;
    CUDA(cudaMalloc(&scratch.x, sizeof(float) * kRows * (size_t)k));
    CUDA(cudaMalloc(&scratch.product, sizeof(float) * (size_t)k * (size_t)k));
    CUDA(cudaMalloc(&scratch.row, sizeof(int32_t) * kRows));
    scratch.k = k;
    return ST_OK;
}

} // namespace

struct calibrate_sums {
    moments *m;
    double *gram, *magnitude;
};

namespace {

status sums_end(calibrate_sums *s) {
    status st = ST_OK;
    if (!s) return ST_OK;
    if (s->magnitude && s->m->rows) {
        const size_t k = (size_t)s->m->k;
        st = check(cudaDeviceSynchronize(), "moments");
        if (st == ST_OK)
            st = check(cudaMemcpy(s->m->gram, s->gram, k * k * 8, cudaMemcpyDeviceToHost),
                       "moments");
        if (st == ST_OK)
            st = check(cudaMemcpy(s->m->magnitude, s->magnitude, k * 8, cudaMemcpyDeviceToHost),
                       "moments");
    }
    (void)cudaFree(s->gram);
    (void)cudaFree(s->magnitude);
    mem_free(s);
    if (--scratch.users == 0) free_scratch();
    return st;
}

status sums_open(calibrate_sums **out, moments *m) {
    const size_t k = (size_t)m->k;
    calibrate_sums *s = static_cast<calibrate_sums *>(mem_alloc(1, sizeof *s));
    *out = nullptr;
    if (!s) return FAIL(ST_NOMEM, "moments");
    s->m = m;
    scratch.users++;
    status st = grow_scratch(m->k);
    if (st == ST_OK) st = check(cudaMalloc(&s->gram, k * k * 8), "moments");
    if (st == ST_OK) st = check(cudaMalloc(&s->magnitude, k * 8), "moments");
    if (st == ST_OK) st = check(cudaMemset(s->gram, 0, k * k * 8), "moments");
    if (st == ST_OK) st = check(cudaMemset(s->magnitude, 0, k * 8), "moments");
    if (st == ST_OK) st = check(cudaDeviceSynchronize(), "moments");
    if (st == ST_OK)
        *out = s;
    else
        (void)sums_end(s);
    return st;
}

template <typename T>
status add_rows(calibrate_sums *s, const T *x, const int32_t *row, int rows, cudaStream_t stream) {
    const int k = s->m->k;
    const float one = 1, none = 0;
    cublasHandle_t handle;
    TRY(library(&handle, stream));
    normalise<<<(unsigned)rows, kThreads, 0, stream>>>(scratch.x, x, row, k);
    TRY(launched("moments"));
    add_magnitudes<<<blocks_of(k), kThreads, 0, stream>>>(s->magnitude, scratch.x, rows, k);
    TRY(launched("moments"));
    CUDA(cublasSgemm(handle, CUBLAS_OP_N, CUBLAS_OP_T, k, k, rows, &one, scratch.x, k, scratch.x, k,
                     &none, scratch.product, k));
    const int64_t n = int64_t{k} * k;
    add_products<<<blocks_of(n), kThreads, 0, stream>>>(s->gram, scratch.product, n);
    return launched("moments");
}

status sums_add(calibrate_sums *s, const void *data, dtype type, const int32_t *row, int64_t n,
                kernel_stream stream) {
    for (int64_t at = 0; at < n; at += kRows) {
        const int rows = (int)(n - at < kRows ? n - at : kRows);
        const int32_t *on_device = nullptr;
        const int64_t first = row ? 0 : at * s->m->k;
        if (row) { // pageable memory: the copy has been read when this returns
            CUDA(cudaMemcpyAsync(scratch.row, row + at, sizeof *row * (size_t)rows,
                                 cudaMemcpyHostToDevice, stream));
            on_device = scratch.row;
        }
        if (type == DT_F16)
            TRY(add_rows(s, static_cast<const __half *>(data) + first, on_device, rows, stream));
        else if (type == DT_BF16)
            TRY(add_rows(s, static_cast<const __nv_bfloat16 *>(data) + first, on_device, rows,
                         stream));
        else
            TRY(add_rows(s, static_cast<const float *>(data) + first, on_device, rows, stream));
    }
    s->m->rows += n;
    return ST_OK;
}

// --- GPTQ ---------------------------------------------------------------------------------------
//
// H in the order of processing is R R^T, R upper triangular, and U = R^-1. With rows and columns
// reversed that is the usual A = L L^T, so A is factored in place, column-major, by blocks; U comes
// out of L^-1 with both reversed again.

// a(i, j) = gram of columns k-1-i and k-1-j of the order
__global__ void __launch_bounds__(kThreads)
    reorder(double *a, const double *gram, const int32_t *column, double damp, int k) {
    const int64_t at = int64_t{blockIdx.x} * kThreads + threadIdx.x;
    if (at >= int64_t{k} * k) return;
    const int i = (int)(at % k), j = (int)(at / k);
    a[at] = gram[int64_t{column[k - 1 - i]} * k + column[k - 1 - j]] + (i == j ? damp : 0.);
}

// The lower triangle of a block of n, in place; *bad when it is not positive. One block.
__global__ void __launch_bounds__(kThreads) factor_block(double *a, int ld, int n, int *bad) {
    __shared__ double t[kBlock][kBlock + 1]; // t[j][i]
    for (int e = (int)threadIdx.x; e < n * n; e += kThreads)
        t[e / n][e % n] = a[int64_t{e / n} * ld + e % n];
    __syncthreads();
    for (int j = 0; j < n; j++) {
        const double d = t[j][j];
        __syncthreads();
        if (!(d > 0)) {
            if (threadIdx.x == 0) *bad = 1;
            return; // the same d for all threads
        }
        for (int i = j + (int)threadIdx.x; i < n; i += kThreads) t[j][i] /= sqrt(d);
        __syncthreads();
        const int rest = n - j - 1;
        for (int e = (int)threadIdx.x; e < rest * rest; e += kThreads) {
            const int p = j + 1 + e / rest, i = j + 1 + e % rest;
            if (i >= p) t[p][i] -= t[j][i] * t[j][p];
        }
        __syncthreads();
    }
    for (int e = (int)threadIdx.x; e < n * n; e += kThreads)
        if (e % n >= e / n) a[int64_t{e / n} * ld + e % n] = t[e / n][e % n];
}

__global__ void __launch_bounds__(kThreads) identity(double *x, int k) {
    const int64_t at = int64_t{blockIdx.x} * kThreads + threadIdx.x;
    if (at < int64_t{k} * k) x[at] = at % (k + 1) == 0;
}

// u [k, k], row-major = U; its lower triangle is not read.
__global__ void __launch_bounds__(kThreads) reverse(float *u, const double *inverse, int k) {
    const int64_t at = int64_t{blockIdx.x} * kThreads + threadIdx.x;
    if (at < int64_t{k} * k) u[at] = (float)inverse[int64_t{k - 1 - at % k} * k + (k - 1 - at / k)];
}

// out[r, i] = w[r, column[i]]
__global__ void __launch_bounds__(kThreads)
    permute(float *out, const float *w, const int32_t *column, int64_t n, int k) {
    const int64_t at = int64_t{blockIdx.x} * kThreads + threadIdx.x;
    if (at < n * k) out[at] = w[at / k * k + column[at % k]];
}

// Columns [i0, i0 + n) of the order, a warp a row: w [rows, k] in that order, code [rows, k] one
// byte each in the matrix' own, error [rows, kBlock], zero beyond n.
template <weight_format F>
__global__ void __launch_bounds__(kWarps * 32)
    round_block(qmatrix q, uint8_t *code, float *w, float *error, const float *u,
                const int32_t *column, int i0, int n) {
    __shared__ float next[kBlock][kBlock];
    __shared__ int at[kBlock];
    const int k = q.k, lane = (int)threadIdx.x % 32;
    for (int e = (int)threadIdx.x; e < n * n; e += kWarps * 32)
        next[e / n][e % n] = u[int64_t{i0 + e / n} * k + i0 + e % n];
    for (int e = (int)threadIdx.x; e < n; e += kWarps * 32) at[e] = column[i0 + e];
    __syncthreads();
    const int row = (int)(blockIdx.x * kWarps + threadIdx.x / 32);
    if (row >= q.n) return;
    const int64_t groups = (k + q.group - 1) / q.group;
    float *mine = w + int64_t{row} * k + i0; // [n]
    float x[2], e[2] = {0.f, 0.f};
    for (int h = 0; h < 2; h++) x[h] = lane + 32 * h < n ? mine[lane + 32 * h] : 0.f;
    for (int i = 0; i < n; i++) {
        const int c = at[i], g = c / q.group;
        const float s = scale_of<F>(q, row / q.block_n * groups + g);
        const float zero = zero_of<F>(q, row * groups + g);
        const float v = __shfl_sync(~0u, i < 32 ? x[0] : x[1], i % 32);
        const int chosen = code_of<F>(v, s, zero);
        const float err = (v - value_of<F>(chosen, s, zero)) / next[i][i];
        if (lane == i % 32) {
            e[i / 32] = err;
            code[int64_t{row} * k + c] = (uint8_t)chosen;
        }
        for (int h = 0; h < 2; h++)
            if (lane + 32 * h > i && lane + 32 * h < n) x[h] -= err * next[i][lane + 32 * h];
    }
    for (int h = 0; h < 2; h++) error[int64_t{row} * kBlock + lane + 32 * h] = e[h];
}

__global__ void __launch_bounds__(kThreads)
    pair_nibbles(uint8_t *out, const uint8_t *code, int64_t n) {
    const int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x;
    if (i < n) out[i] = (uint8_t)(code[2 * i] | code[2 * i + 1] << 4);
}

// a [k, k] becomes L, x its inverse.
status factor_and_invert(cublasHandle_t handle, double *a, double *x, int k, int *bad) {
    const double one = 1, minus = -1;
    for (int b = 0; b < k; b += kBlock) {
        const int n = k - b < kBlock ? k - b : kBlock, rest = k - b - n;
        double *block = a + int64_t{b} * k + b, *panel = block + n;
        factor_block<<<1, kThreads>>>(block, k, n, bad);
        TRY(launched("gptq"));
        if (rest == 0) break;
        CUDA(cublasDtrsm(handle, CUBLAS_SIDE_RIGHT, CUBLAS_FILL_MODE_LOWER, CUBLAS_OP_T,
                         CUBLAS_DIAG_NON_UNIT, rest, n, &one, block, k, panel, k));
        CUDA(cublasDsyrk(handle, CUBLAS_FILL_MODE_LOWER, CUBLAS_OP_N, rest, n, &minus, panel, k,
                         &one, panel + int64_t{n} * k, k));
    }
    const int64_t kk = int64_t{k} * k;
    identity<<<blocks_of(kk), kThreads>>>(x, k);
    TRY(launched("gptq"));
    return check(cublasDtrsm(handle, CUBLAS_SIDE_LEFT, CUBLAS_FILL_MODE_LOWER, CUBLAS_OP_N,
                             CUBLAS_DIAG_NON_UNIT, k, k, &one, a, k, x, k),
                 "gptq");
}

// u [k, k] of the order.
status make_u(cublasHandle_t handle, float *u, const double *gram, double damp,
              const int32_t *column, int k) {
    const int64_t kk = int64_t{k} * k;
    memory m;
    double *a, *x;
    int *bad, was_bad = 0;
    TRY(m.copy(&x, gram, kk));
    TRY(m.take(&a, kk));
    TRY(m.copy(&bad, &was_bad, 1));
    reorder<<<blocks_of(kk), kThreads>>>(a, x, column, damp, k);
    TRY(launched("gptq"));
    TRY(factor_and_invert(handle, a, x, k, bad));
    reverse<<<blocks_of(kk), kThreads>>>(u, x, k);
    TRY(launched("gptq"));
    CUDA(cudaMemcpy(&was_bad, bad, sizeof was_bad, cudaMemcpyDeviceToHost));
    if (was_bad)
        return FAIL(ST_RANGE, "moments of %d inputs are singular: more text or more damping", k);
    return ST_OK;
}

status round_columns(weight_format f, const qmatrix &q, uint8_t *code, float *w, float *error,
                     const float *u, const int32_t *column, int i0, int n) {
    const unsigned blocks = (unsigned)div_up(q.n, kWarps);
    switch (f) {
#define X(name)                                                                                    \
    case WF_##name:                                                                                \
        round_block<WF_##name><<<blocks, kWarps * 32>>>(q, code, w, error, u, column, i0, n);      \
        return launched("gptq");
        QUANTIZE_INSTANCES(X)
#undef X
    default: return FAIL(ST_UNSUPPORTED, "gptq: W%s", weight_format_text(f));
    }
}

int64_t scale_bytes(const qmatrix *q) {
    return dtype_bytes(q->scale_type, div_up(q->n, q->block_n) * div_up(q->k, q->group));
}

status gptq(qmatrix *q, float *values, const double *gram, double damp, const int32_t *order) {
    const int n = q->n, k = q->k;
    const int64_t nk = int64_t{n} * k;
    const float one = 1, minus = -1;
    memory m;
    qmatrix on = *q;
    float *w, *wp, *u, *error;
    uint8_t *code, *pairs, *scale;
    int32_t *column;
    cublasHandle_t handle;
    TRY(library(&handle, nullptr));
    TRY(m.copy(&column, order, k));
    TRY(m.take(&u, int64_t{k} * k));
    TRY(make_u(handle, u, gram, damp, column, k));
    TRY(m.copy(&w, values, nk));
    TRY(m.take(&wp, nk));
    TRY(m.take(&error, int64_t{n} * kBlock));
    TRY(m.take(&code, nk));
    TRY(m.copy(&scale, static_cast<const uint8_t *>(q->scale), scale_bytes(q)));
    on.scale = scale;
    if (q->zero) TRY(m.copy(&on.zero, q->zero, n * div_up(k, q->group)));
    permute<<<blocks_of(nk), kThreads>>>(wp, w, column, n, k);
    TRY(launched("gptq"));
    for (int i0 = 0; i0 < k; i0 += kBlock) {
        const int cols = k - i0 < kBlock ? k - i0 : kBlock, rest = k - i0 - cols;
        TRY(round_columns(q->format, on, code, wp, error, u, column, i0, cols));
        if (rest)
            CUDA(cublasSgemm(handle, CUBLAS_OP_N, CUBLAS_OP_N, rest, n, cols, &minus,
                             u + int64_t{i0} * k + i0 + cols, k, error, kBlock, &one,
                             wp + i0 + cols, k));
    }
    const bool four = q->format == WF_INT4 || q->format == WF_MXFP4 || q->format == WF_NVFP4;
    if (!four) return check(cudaMemcpy(q->code, code, (size_t)nk, cudaMemcpyDeviceToHost), "gptq");
    TRY(m.take(&pairs, nk / 2));
    pair_nibbles<<<blocks_of(nk / 2), kThreads>>>(pairs, code, nk / 2);
    TRY(launched("gptq"));
    return check(cudaMemcpy(q->code, pairs, (size_t)nk / 2, cudaMemcpyDeviceToHost), "gptq");
}

// --- Losses -------------------------------------------------------------------------------------

__global__ void __launch_bounds__(kThreads)
    scale_columns(float *out, const float *w, const float *scale, int64_t n, int k) {
    const int64_t at = int64_t{blockIdx.x} * kThreads + threadIdx.x;
    if (at < n * k) out[at] = w[at] * scale[at % k];
}

// A warp a group.
__global__ void __launch_bounds__(kThreads)
    cut_groups(float *out, const float *w, const calibrate_cut *cut, int64_t n, int k, int group) {
    const int groups = (k + group - 1) / group, lane = (int)threadIdx.x % 32;
    const int64_t i = (int64_t{blockIdx.x} * kThreads + threadIdx.x) / 32;
    if (i >= n * groups) return;
    const int col = (int)(i % groups) * group, size = min(group, k - col);
    const float *from = w + i / groups * k + col;
    float *to = out + i / groups * k + col;
    float lo = 0, hi = 0;
    for (int j = lane; j < size; j += 32) {
        lo = fminf(lo, from[j]);
        hi = fmaxf(hi, from[j]);
    }
    lo = -warp_max(-lo) * cut[i].lo;
    hi = warp_max(hi) * cut[i].hi;
    for (int j = lane; j < size; j += 32) to[j] = clamp_to(from[j], lo, hi);
}

// e = Q / scale - w; scale NULL = 1
template <weight_format F>
__global__ void __launch_bounds__(kThreads)
    errors(float *e, qmatrix q, const float *w, const float *scale) {
    const int64_t at = int64_t{blockIdx.x} * kThreads + threadIdx.x;
    if (at >= int64_t{q.n} * q.k) return;
    const int c = (int)(at % q.k);
    const int64_t g = at / q.k * ((q.k + q.group - 1) / q.group) + c / q.group;
    const int code = four_bits<F> ? q.code[at / 2] >> (at % 2 * 4) & 15 : q.code[at];
    const float v = value_of<F>(code, scale_of<F>(q, g), zero_of<F>(q, g));
    e[at] = (scale ? v / scale[c] : v) - w[at];
}

// out[i] = sum of a b over group i. A warp a group.
__global__ void __launch_bounds__(kThreads)
    group_dots(double *out, const float *a, const float *b, int64_t n, int k, int group) {
    const int groups = (k + group - 1) / group, lane = (int)threadIdx.x % 32;
    const int64_t i = (int64_t{blockIdx.x} * kThreads + threadIdx.x) / 32;
    if (i >= n * groups) return;
    const int col = (int)(i % groups) * group, size = min(group, k - col);
    const int64_t at = i / groups * k + col;
    double sum = 0;
    for (int j = lane; j < size; j += 32) sum += (double)a[at + j] * (double)b[at + j];
#pragma unroll
    for (int d = 16; d > 0; d >>= 1) sum += __shfl_xor_sync(~0u, sum, d);
    if (lane == 0) out[i] = sum;
}

} // namespace

struct calibrate_search {
    memory m;
    int n, k, group;
    float *w, *gram, *changed, *error, *product, *scale;
    calibrate_cut *cut;
    double *loss;     // [n, groups] device
    double *row_loss; // [n] host
    qmatrix q;
};

namespace {

void search_close(calibrate_search *s) {
    if (!s) return;
    mem_free(s->row_loss);
    delete s;
}

status allocate(calibrate_search *s, const float *w, const precision *p, const float *gram) {
    const int64_t nk = int64_t{s->n} * s->k, groups = div_up(s->k, s->group);
    uint8_t *scale;
    s->row_loss = static_cast<double *>(mem_alloc((size_t)s->n, sizeof(double)));
    if (!s->row_loss) return FAIL(ST_NOMEM, "search of %d rows", s->n);
    s->q = qmatrix{};
    s->q.format = p->weight;
    s->q.n = s->n;
    s->q.k = s->k;
    s->q.group = s->group;
    s->q.block_n = 1;
    s->q.scale_type = qmatrix_scale_type(p->weight);
    s->q.global_scale = 1;
    TRY(s->m.copy(&s->w, w, nk));
    TRY(s->m.copy(&s->gram, gram, int64_t{s->k} * s->k));
    TRY(s->m.take(&s->changed, nk));
    TRY(s->m.take(&s->error, nk));
    TRY(s->m.take(&s->product, nk));
    TRY(s->m.take(&s->scale, s->k));
    TRY(s->m.take(&s->cut, s->n * groups));
    TRY(s->m.take(&s->loss, s->n * groups));
    TRY(s->m.take(&s->q.code, qmatrix_code_bytes(p, s->n, s->k)));
    TRY(s->m.take(&scale, scale_bytes(&s->q)));
    s->q.scale = scale;
    const int64_t zeros = qmatrix_zero_count(p, s->n, s->k);
    return zeros ? s->m.take(&s->q.zero, zeros) : ST_OK;
}

status search_open(calibrate_search **out, const float *w, int32_t n, int32_t k, const precision *p,
                   const float *gram) {
    *out = nullptr;
    if (p->weight != WF_INT4 && p->weight != WF_INT8)
        return FAIL(ST_UNSUPPORTED, "search in W%s", weight_format_text(p->weight));
    calibrate_search *s = new calibrate_search{};
    s->n = n;
    s->k = k;
    s->group = p->group ? p->group : k;
    const status st = allocate(s, w, p, gram);
    if (st == ST_OK)
        *out = s;
    else
        search_close(s);
    return st;
}

// s->changed to codes; the errors of those.
status make_errors(calibrate_search *s, const float *scale) {
    const unsigned blocks = blocks_of(int64_t{s->n} * s->k);
    TRY(kernel_quantize_weight(&s->q, s->changed, 0, s->n, nullptr));
    if (s->q.format == WF_INT4)
        errors<WF_INT4><<<blocks, kThreads>>>(s->error, s->q, s->w, scale);
    else
        errors<WF_INT8><<<blocks, kThreads>>>(s->error, s->q, s->w, scale);
    return launched("search");
}

// s->loss of groups of `size` columns, with the blocks of gram on its diagonal.
status make_losses(calibrate_search *s, int size) {
    const int n = s->n, k = s->k, whole = k / size, rest = k % size, at = whole * size;
    const float one = 1, none = 0;
    cublasHandle_t handle;
    TRY(library(&handle, nullptr));
    CUDA(cublasSgemmStridedBatched(handle, CUBLAS_OP_N, CUBLAS_OP_N, size, n, size, &one, s->gram,
                                   k, int64_t{size} * (k + 1), s->error, k, size, &none, s->product,
                                   k, size, whole));
    if (rest)
        CUDA(cublasSgemm(handle, CUBLAS_OP_N, CUBLAS_OP_N, rest, n, rest, &one,
                         s->gram + int64_t{at} * (k + 1), k, s->error + at, k, &none,
                         s->product + at, k));
    const int64_t groups = div_up(k, size);
    group_dots<<<blocks_of(n * groups * 32), kThreads>>>(s->loss, s->error, s->product, n, k, size);
    return launched("search");
}

status search_scaled(calibrate_search *s, const float *scale, double *loss) {
    const int64_t nk = int64_t{s->n} * s->k;
    CUDA(cudaMemcpy(s->scale, scale, sizeof(float) * (size_t)s->k, cudaMemcpyHostToDevice));
    scale_columns<<<blocks_of(nk), kThreads>>>(s->changed, s->w, s->scale, s->n, s->k);
    TRY(launched("search"));
    TRY(make_errors(s, s->scale));
    TRY(make_losses(s, s->k));
    CUDA(cudaMemcpy(s->row_loss, s->loss, sizeof(double) * (size_t)s->n, cudaMemcpyDeviceToHost));
    *loss = 0;
    for (int i = 0; i < s->n; i++) *loss += s->row_loss[i];
    return ST_OK;
}

status search_cut(calibrate_search *s, const calibrate_cut *cut, double *loss) {
    const int64_t count = s->n * div_up(s->k, s->group);
    CUDA(cudaMemcpy(s->cut, cut, sizeof *cut * (size_t)count, cudaMemcpyHostToDevice));
    cut_groups<<<blocks_of(count * 32), kThreads>>>(s->changed, s->w, s->cut, s->n, s->k, s->group);
    TRY(launched("search"));
    TRY(make_errors(s, nullptr));
    TRY(make_losses(s, s->group));
    return check(cudaMemcpy(loss, s->loss, sizeof(double) * (size_t)count, cudaMemcpyDeviceToHost),
                 "search");
}

} // namespace

extern "C" const calibrate_ops cuda_calibrate = {
    sums_open, sums_add, sums_end, gptq, search_open, search_scaled, search_cut, search_close,
};
