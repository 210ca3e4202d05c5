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
#endif
