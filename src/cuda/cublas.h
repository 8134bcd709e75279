/* cuBLAS, where it is installed: opened at run time, so the plug-in does not need it. It multiplies linears of many rows
 * (linear_decoded.c) and sets the ceiling of arithmetic (moe4_ctx_ceilings); tests hold the products to it. */
#ifndef MOE4_CUDA_CUBLAS_H
#define MOE4_CUDA_CUBLAS_H

#include <cuda_runtime_api.h>
#include <library_types.h>
#include <stdbool.h>

#ifdef __cplusplus
extern "C" {
#endif

struct moe4_cublas;

/* What cuBLAS is given to work in, where a call gives it something. */
#define MOE4_CUBLAS_WORKSPACE ((size_t)32 << 20)

/* y[T, N] (CUDA_R_32F or CUDA_R_16BF) = alpha * x[T, K] @ w[N, K]^T, x and w bf16, all sums in fp32, queued in `stream`. Rows are y_ld and
 * x_ld apart, those of w K. */
struct moe4_cublas_call {
    void *y;
    cudaDataType y_type;
    size_t y_ld;
    const void *x;
    size_t x_ld;
    const void *w;
    float alpha;
    int T, N, K;
    void *workspace; /* MOE4_CUBLAS_WORKSPACE bytes, at a multiple of 256, that no other stream uses; NULL: cuBLAS' own, for one stream */
    cudaStream_t stream;
};

/* NULL where cuBLAS is not found or does not start on the current device; `why` then has a sentence. */
struct moe4_cublas *moe4_cublas_open(char *why, size_t why_bytes);
void moe4_cublas_close(struct moe4_cublas *blas);
/* 0, or the status with which cuBLAS refuses. May be called from several threads. */
int moe4_cublas_product(struct moe4_cublas *blas, const struct moe4_cublas_call *c);

#ifdef __cplusplus
}
#endif

#endif
