/* What the device can do at most, measured when it is asked: memory by reading it, arithmetic by a large product of cuBLAS. */
#include "cublas.h"
#include "device.h"

enum { SIDE = 8192, N_TIMES = 9 };
static const size_t READ_BYTES = (size_t)1 << 30; /* many times the caches */

/* The fastest of N_TIMES; *seconds_ret stays where the work fails. */
static cudaError_t best_time(double *seconds_ret, cudaError_t (*work)(void *arg), void *arg) {
    cudaEvent_t begin = NULL, end = NULL;
    cudaError_t error = cudaEventCreate(&begin);
    if (error == cudaSuccess) error = cudaEventCreate(&end);
    float best = 0;
    for (int i = 0; i < N_TIMES && error == cudaSuccess; i++) {
        float ms = 0;
        error = cudaEventRecord(begin, NULL);
        if (error == cudaSuccess) error = work(arg);
        if (error == cudaSuccess) error = cudaEventRecord(end, NULL);
        if (error == cudaSuccess) error = cudaEventSynchronize(end);
        if (error == cudaSuccess) error = cudaEventElapsedTime(&ms, begin, end);
        if (i == 0 || ms < best) best = ms;
    }
    if (begin) cudaEventDestroy(begin);
    if (end) cudaEventDestroy(end);
    if (error == cudaSuccess) *seconds_ret = 1e-3 * (double)best;
    return error;
}

struct reading {
    void *data;
    int n_blocks;
};

static cudaError_t read_all(void *arg) {
    const struct reading *r = arg;
    return moe4_cuda_read(r->data, READ_BYTES, r->n_blocks, r->data, NULL);
}

static moe4_status measure_reading(const moe4_ctx *ctx, moe4_ceilings *c) {
    struct reading r = {NULL, 0};
    MOE4_TRY(moe4_cuda_alloc(ctx, &r.data, READ_BYTES, "memory to read"));
    cudaError_t error = moe4_cuda_fill(r.data, READ_BYTES / sizeof(moe4_bf16), NULL);
    for (int per_sm = 1; per_sm <= 16 && error == cudaSuccess; per_sm *= 2) {
        double seconds = 0;
        r.n_blocks = per_sm * moe4_cuda_of(ctx)->n_sms;
        error = best_time(&seconds, read_all, &r);
        if (error == cudaSuccess && (double)READ_BYTES / seconds > c->read_bytes) c->read_bytes = (double)READ_BYTES / seconds;
    }
    cudaFree(r.data);
    return moe4_cuda_check(ctx, error, "reading memory");
}

struct multiplying {
    struct moe4_cublas *blas;
    char *data; /* x and w in bf16, y in fp32 */
};

static cudaError_t multiply(void *arg) {
    const struct multiplying *m = arg;
    const size_t matrix = (size_t)SIDE * SIDE * sizeof(moe4_bf16);
    float *y = (float *)(m->data + 2 * matrix);
    const struct moe4_cublas_call product = {.y = y,
                                             .y_type = CUDA_R_32F,
                                             .y_ld = SIDE,
                                             .x = m->data,
                                             .x_ld = SIDE,
                                             .w = m->data + matrix,
                                             .alpha = 1,
                                             .T = SIDE,
                                             .N = SIDE,
                                             .K = SIDE};
    return moe4_cublas_product(m->blas, &product) == 0 ? cudaGetLastError() : cudaErrorUnknown;
}

static moe4_status measure_products(const moe4_ctx *ctx, moe4_ceilings *c, struct moe4_cublas *blas) {
    struct multiplying m = {blas, NULL};
    void *data = NULL;
    double seconds = 0;
    const size_t n = (size_t)SIDE * SIDE;
    MOE4_TRY(moe4_cuda_alloc(ctx, &data, n * (2 * sizeof(moe4_bf16) + sizeof(float)), "matrices to multiply"));
    m.data = data;
    cudaError_t error = moe4_cuda_fill(data, 2 * n, NULL);
    if (error == cudaSuccess) error = best_time(&seconds, multiply, &m);
    if (error == cudaSuccess) c->bf16_macs = (double)n * SIDE / seconds;
    cudaFree(data);
    return moe4_cuda_check(ctx, error, "a product by cuBLAS");
}

moe4_status moe4_cuda_ceilings(moe4_ctx *ctx, moe4_ceilings *c) {
    struct moe4_cuda_current saved;
    MOE4_TRY(moe4_cuda_enter(ctx, &saved));
    c->device = moe4_cuda_of(ctx)->name;
    moe4_status status = measure_reading(ctx, c);
    struct moe4_cublas *blas = status == MOE4_OK ? moe4_cuda_blas(ctx) : NULL;
    if (blas) status = measure_products(ctx, c, blas);
    moe4_cuda_leave(saved);
    return status;
}
