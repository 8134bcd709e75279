#include "cublas.h"

#include <dlfcn.h>
#include <stdio.h>
#include <stdlib.h>

/* What is called of cublas_api.h; its numbers are part of cuBLAS's binary interface. */
enum { OP_N = 0, OP_T = 1, COMPUTE_32F = 68, GEMM_DEFAULT = -1 };
typedef int (*create_fn)(void **handle);
typedef int (*destroy_fn)(void *handle);
typedef int (*set_stream_fn)(void *handle, cudaStream_t stream);
typedef int (*gemm_fn)(void *handle, int trans_a, int trans_b, int m, int n, int k, const void *alpha, const void *a, cudaDataType a_type,
                       int lda, const void *b, cudaDataType b_type, int ldb, const void *beta, void *c, cudaDataType c_type, int ldc,
                       int compute, int algorithm);

struct moe4_cublas {
    void *handle;
    destroy_fn destroy;
    set_stream_fn set_stream;
    gemm_fn gemm;
};

static bool find(void *library, void *to, const char *name) {
    *(void **)to = dlsym(library, name);
    return *(void **)to != NULL;
}

/* The library stays open: like the CUDA runtime, it does not survive being unloaded. */
struct moe4_cublas *moe4_cublas_open(char *why, size_t why_bytes) {
    static const char *const files[] = {"libcublas.so.13", "libcublas.so.12", "libcublas.so"};
    void *library = NULL;
    create_fn create = NULL;
    struct moe4_cublas *blas = calloc(1, sizeof *blas);
    for (size_t i = 0; blas && !library && i < sizeof files / sizeof *files; i++) library = dlopen(files[i], RTLD_NOW | RTLD_LOCAL);
    if (!library) {
        snprintf(why, why_bytes, "libcublas.so is not found");
    } else if (!find(library, &create, "cublasCreate_v2") || !find(library, &blas->destroy, "cublasDestroy_v2") ||
               !find(library, &blas->set_stream, "cublasSetStream_v2") || !find(library, &blas->gemm, "cublasGemmEx")) {
        snprintf(why, why_bytes, "libcublas.so lacks a function");
    } else {
        int status = create(&blas->handle);
        if (status == 0) return blas;
        snprintf(why, why_bytes, "cublasCreate: status %d", status);
    }
    free(blas);
    return NULL;
}

void moe4_cublas_close(struct moe4_cublas *blas) {
    if (blas) blas->destroy(blas->handle);
    free(blas);
}

/* cuBLAS counts columns first: y^T [N,T] = w x^T, where w and x as they lie are K x N and K x T. */
bool moe4_cublas_product(struct moe4_cublas *blas, void *y, cudaDataType y_type, const void *x, const void *w, int T, int N, int K,
                         cudaStream_t stream) {
    const float one = 1, zero = 0;
    return blas->set_stream(blas->handle, stream) == 0 && blas->gemm(blas->handle, OP_T, OP_N, N, T, K, &one, w, CUDA_R_16BF, K, x,
                                                                     CUDA_R_16BF, K, &zero, y, y_type, N, COMPUTE_32F, GEMM_DEFAULT) == 0;
}
