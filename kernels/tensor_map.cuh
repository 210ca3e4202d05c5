// tensor_map.cuh - the driver's function that makes tensor maps (CUtensorMap), found at run time:
// the library links the CUDA runtime only.
#ifndef TENSOR_MAP_CUH
#define TENSOR_MAP_CUH
#include "base.h"

#include <cuda.h>
#include <cuda_runtime.h>

// cuTensorMapEncodeTiled: map, type, dimensions, base, sizes, strides in bytes (all but the
// innermost), box, steps, then how it is laid out in shared memory and read from L2.
using tensor_map_encode = CUresult (*)(CUtensorMap *, CUtensorMapDataType, cuuint32_t, void *,
                                       const cuuint64_t *, const cuuint64_t *, const cuuint32_t *,
                                       const cuuint32_t *, CUtensorMapInterleave,
                                       CUtensorMapSwizzle, CUtensorMapL2promotion,
                                       CUtensorMapFloatOOBfill);

__device__ __forceinline__ void prefetch_map(const CUtensorMap *map) {
#if __CUDA_ARCH__ >= 900
    asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
#endif
}

// DEVICE where the driver is older than tensor maps.
inline status tensor_map_encoder(tensor_map_encode *encode) {
    static tensor_map_encode function = nullptr;
    if (!function) {
        void *f = nullptr;
        cudaDriverEntryPointQueryResult found;
        const cudaError_t e =
            cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &f, cudaEnableDefault, &found);
        if (e != cudaSuccess || found != cudaDriverEntryPointSuccess)
            return FAIL(ST_DEVICE, "the driver has no tensor maps");
        function = reinterpret_cast<tensor_map_encode>(f);
    }
    *encode = function;
    return ST_OK;
}

// Map of codes [rows, k] of 8 bits, rows `ld` bytes apart, in boxes of [box_rows, 128]; what lies
// outside reads as zero.
inline status tensor_map_codes(CUtensorMap *map, const void *codes, int32_t rows, int32_t k,
                               int64_t ld, int box_rows) {
    tensor_map_encode encode = nullptr;
    TRY(tensor_map_encoder(&encode));
    const cuuint64_t size[2] = {(cuuint64_t)k, (cuuint64_t)rows}, stride[1] = {(cuuint64_t)ld};
    const cuuint32_t box[2] = {128, (cuuint32_t)box_rows}, step[2] = {1, 1};
    const CUresult r =
        encode(map, CU_TENSOR_MAP_DATA_TYPE_UINT8, 2, const_cast<void *>(codes), size, stride, box,
               step, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
               CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
    return r == CUDA_SUCCESS ? ST_OK : FAIL(ST_DEVICE, "tensor map of codes: error %d", (int)r);
}
#endif
