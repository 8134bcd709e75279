/* y[T, hidden] = sum over a token's slots, in slot order, of weight * o, then the shared expert's output; fp32, rounded once.
 * A thread owns four neighbouring columns of one token. Each warp finds the token's slots for itself, 32 at a time, before it waits for
 * the products: then only the latency of o is left. */
#include "activation.cuh"
#include "launch.cuh"
#include "ptx.cuh"
#include "slots.cuh"

#define THREADS 128
#define AT_ONCE 8 /* slots whose loads are under way together */

/* V: columns a thread loads at once, 4 where hidden is a multiple of it. */
template <int V> static __device__ __forceinline__ void load_4(float v[4], const float *o, int n) {
    if (V == 4) {
        *(float4 *)v = *(const float4 *)o;
    } else {
        for (int i = 0; i < 4; i++) v[i] = i < n ? o[i] : 0.f;
    }
}

/* sum += weight * o over the slots k0 .. k0 + n - 1 of a token that `local` names; lane i has the weight of slot k0 + i. */
template <int V>
static __device__ __forceinline__ void add_slots(float sum[4], const float *o, size_t ld, int n, int left, uint32_t local,
                                                 float my_weight) {
    for (int k0 = 0; k0 < n; k0 += AT_ONCE) {
        float v[AT_ONCE][4];
#pragma unroll
        for (int k = 0; k < AT_ONCE; k++)
            if (local >> (k0 + k) & 1 && left > 0) load_4<V>(v[k], o + (size_t)(k0 + k) * ld, left);
#pragma unroll
        for (int k = 0; k < AT_ONCE; k++) {
            float weight = __shfl_sync(0xFFFFFFFFu, my_weight, k0 + k);
            if (local >> (k0 + k) & 1 && left > 0)
                for (int i = 0; i < 4; i++) sum[i] += weight * v[k][i];
        }
    }
}

template <int V>
static __global__ void __launch_bounds__(THREADS) combine_kernel(const __grid_constant__ moe4_layer_run run, void *y, moe4_dtype y_dtype,
                                                                 size_t y_ld, const float *weights, const float *shared) {
    int token = blockIdx.x, n = 4 * (int)(blockIdx.y * THREADS + threadIdx.x), left = run.w.hidden - n, lane = threadIdx.x & 31;
    size_t ld = (size_t)run.w.hidden;
    float sum[4] = {0.f, 0.f, 0.f, 0.f};
#if __CUDA_ARCH__ == 900
    dependency_launch();
#endif
    for (int k0 = 0; k0 < run.top_k; k0 += 32) {
        int slot = token * run.top_k + k0 + lane, n_slots = min(32, run.top_k - k0);
        bool here = lane < n_slots && local_expert(run, slot) >= 0;
        float weight = here && weights ? weights[slot] : 1.f;
        uint32_t local = __ballot_sync(0xFFFFFFFFu, here);
#if __CUDA_ARCH__ == 900
        if (k0 == 0) dependency_wait();
#endif
        add_slots<V>(sum, run.o + (size_t)(token * run.top_k + k0) * ld + n, ld, n_slots, left, local, weight);
    }
    if (left <= 0) return;
    if (shared) {
        float v[4];
        load_4<V>(v, shared + (size_t)token * ld + n, left);
        for (int i = 0; i < 4; i++) sum[i] += v[i];
    }
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
