/* After a product that knows nothing of the contract: a row of x with an infinity comes out NaN in every element, not infinite in some. */
#include "launch.cuh"
#include "ptx.cuh"
#include "result.cuh"

#define THREADS 256
#define WARPS (THREADS / 32)

static __device__ __forceinline__ bool is_finite_bf16(uint16_t bits) {
    return (bits & 0x7F80) != 0x7F80;
}

/* A warp a row. Each number of a row that x's infinity or NaN has reached is one itself, so that the first one tells. */
static __global__ void __launch_bounds__(THREADS) settle_kernel(const __grid_constant__ moe4_rows_check c) {
#if __CUDA_ARCH__ == 900
    dependency_wait();
#endif
    int row = (int)(blockIdx.x * WARPS + threadIdx.x / 32), lane = threadIdx.x & 31;
    if (row >= c.n_rows) return;
    size_t at = (size_t)row * c.y_ld;
    if (c.y_dtype == MOE4_F32 ? isfinite(((const float *)c.y)[at]) : is_finite_bf16(((const uint16_t *)c.y)[at])) return;
    bool bad = false;
    for (int k = lane; k < c.K; k += 32) bad |= !is_finite_bf16(((const uint16_t *)c.x)[(size_t)row * c.x_ld + (size_t)k]);
    if (!__any_sync(0xFFFFFFFFu, bad)) return; /* the product is too large for its type */
    for (int n = lane; n < c.N; n += 32) store_y(c.y, c.y_dtype, at + (size_t)n, __uint_as_float(0x7FFFFFFFu));
}

cudaError_t moe4_cuda_settle_rows(const moe4_rows_check *c, cudaStream_t stream) {
    return moe4_cuda_launch_early(settle_kernel, dim3((unsigned)((c->n_rows + WARPS - 1) / WARPS)), THREADS, 0, stream, *c);
}
