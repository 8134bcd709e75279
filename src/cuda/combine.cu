/* y[T, hidden] = sum over a token's slots, in slot order, of weight * o, then the shared expert's output; fp32, rounded once.
 * A thread owns four neighbouring columns of one token. */
#include "activation.cuh"
#include "launch.cuh"
#include "ptx.cuh"

#define THREADS 128

static __device__ bool slot_is_local(const moe4_layer_run &run, int slot) {
    if (!run.ids) return true;
    int64_t id = run.ids_are_64bit ? ((const int64_t *)run.ids)[slot] : ((const int32_t *)run.ids)[slot];
    return id >= run.first_expert && id < run.first_expert + run.w.n;
}

/* V: columns a thread loads at once, 4 where hidden is a multiple of it. */
template <int V> static __device__ __forceinline__ void add_scaled(float sum[4], const float *o, int n, float weight) {
    float v[4];
    if (V == 4) {
        *(float4 *)v = *(const float4 *)o;
    } else {
        for (int i = 0; i < 4; i++) v[i] = i < n ? o[i] : 0.f;
    }
    for (int i = 0; i < 4; i++) sum[i] += weight * v[i];
}

template <int V>
static __global__ void __launch_bounds__(THREADS) combine_kernel(const __grid_constant__ moe4_layer_run run, void *y, moe4_dtype y_dtype,
                                                                 size_t y_ld, const float *weights, const float *shared) {
#if __CUDA_ARCH__ == 900
    dependency_launch();
    dependency_wait();
#endif
    int token = blockIdx.x, n = 4 * (int)(blockIdx.y * THREADS + threadIdx.x), left = run.w.hidden - n;
    if (left <= 0) return;
    float sum[4] = {0.f, 0.f, 0.f, 0.f};
    for (int k = 0; k < run.top_k; k++) {
        int slot = token * run.top_k + k;
        if (!slot_is_local(run, slot)) continue;
        add_scaled<V>(sum, run.o + (size_t)slot * (size_t)run.w.hidden + n, left, weights ? weights[slot] : 1.f);
    }
    if (shared) add_scaled<V>(sum, shared + (size_t)token * (size_t)run.w.hidden + n, left, 1.f);
    for (int i = 0; i < 4 && i < left; i++) { /* y may have any leading dimension, so no wide store */
        size_t at = (size_t)token * y_ld + (size_t)(n + i);
        if (y_dtype == MOE4_F32)
            ((float *)y)[at] = sum[i];
        else
            ((__nv_bfloat16 *)y)[at] = __float2bfloat16_rn(sum[i]);
    }
}

cudaError_t moe4_cuda_combine(const moe4_layer_run *run, void *y, moe4_dtype y_dtype, size_t y_ld, const float *weights,
                              const float *shared, cudaStream_t stream) {
    dim3 grid((unsigned)run->n_tokens, (unsigned)((run->w.hidden + 4 * THREADS - 1) / (4 * THREADS)));
    auto kernel = run->w.hidden % 4 ? combine_kernel<1> : combine_kernel<4>;
    return moe4_cuda_launch_early(kernel, grid, THREADS, 0, stream, *run, y, y_dtype, y_ld, weights, shared);
}
