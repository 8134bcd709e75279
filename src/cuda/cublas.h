/* cuBLAS, where it is installed: opened at run time, so the plug-in neither needs it nor loads it for a layer. It sets the ceiling of
 * arithmetic (moe4_ctx_ceilings), and tests hold the products to it. */
#ifndef MOE4_CUDA_CUBLAS_H
#define MOE4_CUDA_CUBLAS_H

#include <cuda_runtime_api.h>
#include <library_types.h>
#include <stdbool.h>

#ifdef __cplusplus
extern "C" {
#endif

struct moe4_cublas;

/* NULL where cuBLAS is not found or does not start on the current device; `why` then has a sentence. */
struct moe4_cublas *moe4_cublas_open(char *why, size_t why_bytes);
void moe4_cublas_close(struct moe4_cublas *blas);
/* y[T,N] (CUDA_R_32F or CUDA_R_16BF) = x[T,K] bf16 @ w[N,K]^T bf16, sums in fp32, queued in `stream`; false when cuBLAS refuses. */
bool moe4_cublas_product(struct moe4_cublas *blas, void *y, cudaDataType y_type, const void *x, const void *w, int T, int N, int K,
                         cudaStream_t stream);

#ifdef __cplusplus
}
#endif

#endif
