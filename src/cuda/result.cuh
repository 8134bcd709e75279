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

/* Two neighbours. */
static __device__ __forceinline__ void store_y_2(void *y, moe4_dtype dtype, size_t at, float2 v) {
    size_t bytes = dtype == MOE4_F32 ? 4 : 2;
    char *to = (char *)y + at * bytes;
    if ((uintptr_t)to % (2 * bytes)) {
        store_y(y, dtype, at, v.x);
        store_y(y, dtype, at + 1, v.y);
    } else if (dtype == MOE4_F32) {
        *(float2 *)to = v;
    } else {
        *(__nv_bfloat162 *)to = __floats2bfloat162_rn(v.x, v.y);
    }
}

/* weight * (o + bias) with a rounding after each step, so that every kernel that ends a row gives the same bits. */
static __device__ __forceinline__ float weighted_result(float o, bool biased, float bias, float weight) {
    return __fmul_rn(weight, biased ? __fadd_rn(o, bias) : o);
}

#endif
