// linear_lt.cu - products of 8-bit operands by cuBLASLt: y^T [n, m] = W x^T, column-major, W and x
// K-major as 8-bit operands must be.
//
// A plan is descriptors and an algorithm. The library suggests algorithms for a problem from its
// tables, without timing, so the same problem gets the same plan in every run; plans are kept
// because asking takes tens of microseconds.
//
// FP8 sums are promoted to f32 every 128 inputs (no FAST_ACCUM): without, the error of a sum of
// 28672 products is 2.7e-3 instead of 2.2e-4 on an H200.
#include "linear_launch.h"
#include "traits.cuh"

#include <cstring>
#include <cublasLt.h>
#include <mutex>

namespace {

constexpr int kPlans = 1024, kDevices = 16, kRanks = 8;

struct plan_key { // compared as bytes: no padding
    int64_t ldo, workspace_bytes;
    int32_t format, m, n, k, out_type, align, rank, device;
};

struct plan {
    plan_key key;
    bool made, good;
    cublasLtMatmulDesc_t op;
    cublasLtMatrixLayout_t w, x, out;
    cublasLtMatmulAlgo_t algo;
};

std::mutex lock; // of all that follows, and of the scale pointers within a descriptor
plan plans[kPlans];
cublasLtHandle_t handles[kDevices];

status handle_of(int device, cublasLtHandle_t *out) {
    if (device < 0 || device >= kDevices) return FAIL(ST_DEVICE, "cuBLASLt on GPU %d", device);
    cublasLtHandle_t *h = &handles[device];
    if (!*h && cublasLtCreate(h) != CUBLAS_STATUS_SUCCESS)
        return FAIL(ST_DEVICE, "cublasLtCreate failed");
    *out = *h;
    return ST_OK;
}

cudaDataType library_type(dtype t) {
    return t == DT_F16    ? CUDA_R_16F
           : t == DT_BF16 ? CUDA_R_16BF
           : t == DT_F32  ? CUDA_R_32F
                          : CUDA_R_32I;
}

bool set(cublasLtMatmulDesc_t op, cublasLtMatmulDescAttributes_t what, const void *value,
         size_t bytes) {
    return cublasLtMatmulDescSetAttribute(op, what, value, bytes) == CUBLAS_STATUS_SUCCESS;
}

// Scales change from call to call; whether there are any is part of the question.
bool set_scales(plan *p, const linear_product *q) {
    if (q->format == WF_INT8) return true;
    return set(p->op, CUBLASLT_MATMUL_DESC_A_SCALE_POINTER, &q->w_scale, sizeof q->w_scale) &&
           set(p->op, CUBLASLT_MATMUL_DESC_B_SCALE_POINTER, &q->x_scale, sizeof q->x_scale);
}

bool describe(plan *p) {
    const plan_key &k = p->key;
    const bool int8 = k.format == WF_INT8;
    const cublasOperation_t transposed = CUBLAS_OP_T, plain = CUBLAS_OP_N;
    const int32_t w_mode = k.format == WF_FP8B ? CUBLASLT_MATMUL_MATRIX_SCALE_BLK128x128_32F
                                               : CUBLASLT_MATMUL_MATRIX_SCALE_OUTER_VEC_32F;
    const int32_t x_mode = k.format == WF_FP8B ? CUBLASLT_MATMUL_MATRIX_SCALE_VEC128_32F
                                               : CUBLASLT_MATMUL_MATRIX_SCALE_OUTER_VEC_32F;
    const cudaDataType operand = int8 ? CUDA_R_8I : CUDA_R_8F_E4M3;
    bool good = cublasLtMatmulDescCreate(&p->op, int8 ? CUBLAS_COMPUTE_32I : CUBLAS_COMPUTE_32F,
                                         int8 ? CUDA_R_32I : CUDA_R_32F) == CUBLAS_STATUS_SUCCESS;
    good = good && set(p->op, CUBLASLT_MATMUL_DESC_TRANSA, &transposed, sizeof transposed);
    good = good && set(p->op, CUBLASLT_MATMUL_DESC_TRANSB, &plain, sizeof plain);
    if (!int8) {
        good = good && set(p->op, CUBLASLT_MATMUL_DESC_A_SCALE_MODE, &w_mode, sizeof w_mode);
        good = good && set(p->op, CUBLASLT_MATMUL_DESC_B_SCALE_MODE, &x_mode, sizeof x_mode);
    }
    const auto layout = [&](cublasLtMatrixLayout_t *l, cudaDataType type, int32_t rows,
                            int32_t cols, int64_t ld) {
        return cublasLtMatrixLayoutCreate(l, type, (uint64_t)rows, (uint64_t)cols, ld) ==
               CUBLAS_STATUS_SUCCESS;
    };
    return good && layout(&p->w, operand, k.k, k.n, k.k) && layout(&p->x, operand, k.k, k.m, k.k) &&
           layout(&p->out, library_type((dtype)k.out_type), k.n, k.m, k.ldo);
}

bool choose(plan *p, cublasLtHandle_t handle) {
    cublasLtMatmulPreference_t pref;
    if (cublasLtMatmulPreferenceCreate(&pref) != CUBLAS_STATUS_SUCCESS) return false;
    const uint64_t bytes = (uint64_t)p->key.workspace_bytes;
    const uint32_t exact = CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE; // or none
    const uint32_t align = (uint32_t)p->key.align;
    const auto want = [&](cublasLtMatmulPreferenceAttributes_t what, const void *v, size_t n) {
        (void)cublasLtMatmulPreferenceSetAttribute(pref, what, v, n);
    };
    want(CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, &bytes, sizeof bytes);
    want(CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK, &exact, sizeof exact);
    want(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, &align, sizeof align);
    want(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES, &align, sizeof align);
    cublasLtMatmulHeuristicResult_t found[kRanks];
    int n = 0;
    const cublasStatus_t s = cublasLtMatmulAlgoGetHeuristic(
        handle, p->op, p->w, p->x, p->out, p->out, pref, p->key.rank + 1, found, &n);
    (void)cublasLtMatmulPreferenceDestroy(pref);
    if (s != CUBLAS_STATUS_SUCCESS || n == 0) return false;
    p->algo = found[n - 1].algo;
    return true;
}

void forget(plan *p) {
    if (p->w) (void)cublasLtMatrixLayoutDestroy(p->w);
    if (p->x) (void)cublasLtMatrixLayoutDestroy(p->x);
    if (p->out) (void)cublasLtMatrixLayoutDestroy(p->out);
    if (p->op) (void)cublasLtMatmulDescDestroy(p->op);
    *p = plan{};
}

// A place a hash; what lay there is forgotten, and would be made again just so.
plan *find(const plan_key &key, const linear_product *q, cublasLtHandle_t handle) {
    uint64_t h = 14695981039346656037ull;
    uint32_t word[sizeof key / 4];
    memcpy(word, &key, sizeof key);
    for (uint32_t w : word) h = (h ^ w) * 1099511628211ull;
    plan *p = &plans[(h >> 32) % kPlans];
    if (p->made && memcmp(&p->key, &key, sizeof key) == 0) return p;
    forget(p);
    p->key = key;
    p->good = describe(p) && set_scales(p, q) && choose(p, handle);
    p->made = true;
    return p;
}

int32_t alignment(const linear_product *p) {
    const uint64_t bytes = (uint64_t)(uintptr_t)p->out | (uint64_t)dtype_bytes(p->out_type, p->ldo);
    const uint64_t lowest = bytes & (~bytes + 1);
    return lowest < 256 ? (int32_t)lowest : 256;
}

} // namespace

extern "C" status linear_lt_ready(void) {
    int device = 0;
    cublasLtHandle_t handle = nullptr;
    if (cudaGetDevice(&device) != cudaSuccess) return FAIL(ST_DEVICE, "no GPU");
    const std::lock_guard<std::mutex> held(lock);
    return handle_of(device, &handle);
}

extern "C" status linear_lt(const linear_product *p, kernel_stream stream) {
    plan_key key = {};
    key.ldo = p->ldo;
    key.workspace_bytes = p->workspace_bytes;
    key.format = p->format;
    key.m = p->m;
    key.n = p->n;
    key.k = p->k;
    key.out_type = p->out_type;
    key.align = alignment(p);
    key.rank = p->rank < kRanks ? p->rank : kRanks - 1;
    if (cudaGetDevice(&key.device) != cudaSuccess) return FAIL(ST_DEVICE, "no GPU");
    const std::lock_guard<std::mutex> held(lock);
    cublasLtHandle_t handle = nullptr;
    TRY(handle_of(key.device, &handle));
    plan *l = find(key, p, handle);
    if (!l->good)
        return FAIL(ST_UNSUPPORTED, "cuBLASLt has no product %d x [%d, %d] of W%s", p->m, p->n,
                    p->k, weight_format_text(p->format));
    const bool int8 = p->format == WF_INT8;
    if (!set_scales(l, p)) return FAIL(ST_DEVICE, "cuBLASLt refuses scales");
    const float f_one = 1, f_zero = 0;
    const int32_t i_one = 1, i_zero = 0;
    const cublasStatus_t s =
        cublasLtMatmul(handle, l->op, int8 ? (const void *)&i_one : &f_one, p->w, l->w, p->x, l->x,
                       int8 ? (const void *)&i_zero : &f_zero, p->out, l->out, p->out, l->out,
                       &l->algo, p->workspace, (size_t)p->workspace_bytes, stream);
    return s == CUBLAS_STATUS_SUCCESS
               ? ST_OK
               : FAIL(ST_DEVICE, "cublasLtMatmul: %s", cublasLtGetStatusString(s));
}
