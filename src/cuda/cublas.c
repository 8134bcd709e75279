#include "cublas.h"

#include <dlfcn.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>

/* What is called of cublas_api.h; its numbers are part of cuBLAS's binary interface. */
enum { OP_N = 0, OP_T = 1, COMPUTE_32F = 68, GEMM_DEFAULT = -1, NO_REDUCED_PRECISION_REDUCTION = 16 };
typedef int (*create_fn)(void **handle);
typedef int (*destroy_fn)(void *handle);
typedef int (*set_stream_fn)(void *handle, cudaStream_t stream);
typedef int (*set_math_mode_fn)(void *handle, int mode);
typedef int (*set_workspace_fn)(void *handle, void *workspace, size_t bytes);
typedef int (*gemm_fn)(void *handle, int trans_a, int trans_b, int m, int n, int k, const void *alpha, const void *a, cudaDataType a_type,
                       int lda, const void *b, cudaDataType b_type, int ldb, const void *beta, void *c, cudaDataType c_type, int ldc,
                       int compute, int algorithm);

struct moe4_cublas {
    void *handle;
    destroy_fn destroy;
    set_stream_fn set_stream;
    set_workspace_fn set_workspace;
    gemm_fn gemm;
    pthread_mutex_t lock; /* stream and workspace are the handle's until the product is queued */
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
    set_math_mode_fn set_math_mode = NULL;
    struct moe4_cublas *blas = calloc(1, sizeof *blas);
    for (size_t i = 0; blas && !library && i < sizeof files / sizeof *files; i++) library = dlopen(files[i], RTLD_NOW | RTLD_LOCAL);
    if (!library) {
        snprintf(why, why_bytes, "libcublas.so is not found");
    } else if (!find(library, &create, "cublasCreate_v2") || !find(library, &blas->destroy, "cublasDestroy_v2") ||
               !find(library, &blas->set_stream, "cublasSetStream_v2") || !find(library, &blas->set_workspace, "cublasSetWorkspace_v2") ||
               !find(library, &set_math_mode, "cublasSetMathMode") || !find(library, &blas->gemm, "cublasGemmEx")) {
        snprintf(why, why_bytes, "libcublas.so lacks a function");
    } else {
        int status = create(&blas->handle);
        if (status == 0) status = set_math_mode(blas->handle, NO_REDUCED_PRECISION_REDUCTION); /* or parts of k are added in bf16 */
        if (status == 0 && pthread_mutex_init(&blas->lock, NULL) == 0) return blas;
        snprintf(why, why_bytes, "cublasCreate: status %d", status);
        if (blas->handle) blas->destroy(blas->handle);
    }
    free(blas);
    return NULL;
}

void moe4_cublas_close(struct moe4_cublas *blas) {
    if (!blas) return;
    blas->destroy(blas->handle);
    pthread_mutex_destroy(&blas->lock);
    free(blas);
}

/* cuBLAS counts columns first: y^T [N,T] = w x^T, where w and x as they lie are K x N and K x T. Setting the stream sets its own workspace
 * again. */
int moe4_cublas_product(struct moe4_cublas *blas, const struct moe4_cublas_call *c) {
    const float zero = 0;
    pthread_mutex_lock(&blas->lock);
    int status = blas->set_stream(blas->handle, c->stream);
    if (status == 0 && c->workspace) status = blas->set_workspace(blas->handle, c->workspace, MOE4_CUBLAS_WORKSPACE);
    if (status == 0)
        status = blas->gemm(blas->handle, OP_T, OP_N, c->N, c->T, c->K, &c->alpha, c->w, CUDA_R_16BF, c->K, c->x, CUDA_R_16BF, (int)c->x_ld,
                            &zero, c->y, c->y_type, (int)c->y_ld, COMPUTE_32F, GEMM_DEFAULT);
    pthread_mutex_unlock(&blas->lock);
    return status;
}
