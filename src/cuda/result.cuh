/* Numbers of y, whatever its type. */
#ifndef MOE4_CUDA_RESULT_CUH
#define MOE4_CUDA_RESULT_CUH

#include "kernels.h"

static __device__ __forceinline__ void store_y(void *y, moe4_dtype dtype, size_t at, float v) {
    if (dtype == MOE4_F32)
        ((float *)y)[at] = v;
    else
        ((__nv_bfloat16 *)y)[at] = __float2bfloat16_rn(v);
}

/* weight * (o + bias) with a rounding after each step, so that every kernel that ends a row gives the same bits. */
static __device__ __forceinline__ float weighted_result(float o, const float *bias, float weight) {
    return __fmul_rn(weight, bias ? __fadd_rn(o, *bias) : o);
}

#endif
