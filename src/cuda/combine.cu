/* y[T, hidden] = sum over a token's slots, in slot order, of weight * o, then the shared expert's output; fp32, rounded once.
 * A thread owns four neighbouring columns of one token. Each warp finds the token's slots for itself, 32 at a time, before it waits for
 * the products: then only the latency of o is left. */
#include "activation.cuh"
#include "launch.cuh"
#include "ptx.cuh"
#include "slots.cuh"

#define THREADS 128
#define AT_ONCE 8 /* slots whose loads are under way together */
#define MOST_BLOCKS 4096

/* V: columns a thread loads at once, 4 where hidden is a multiple of it. */
template <int V> static __device__ __forceinline__ void load_4(float v[4], const float *o, int n) {
    if (V == 4) {
        *(float4 *)v = __ldcs((const float4 *)o); /* read once */
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

/* y[at .. at + 3], or as many of them as are left. */
static __device__ __forceinline__ void store_y(void *y, moe4_dtype dtype, size_t at, const float v[4], int left) {
    if (dtype == MOE4_F32) {
        float *to = (float *)y + at;
        if (left >= 4 && ((uintptr_t)to & 15) == 0)
            *(float4 *)to = make_float4(v[0], v[1], v[2], v[3]);
        else
            for (int i = 0; i < 4 && i < left; i++) to[i] = v[i];
        return;
    }
    __nv_bfloat16 *to = (__nv_bfloat16 *)y + at;
    if (left >= 4 && ((uintptr_t)to & 7) == 0) {
        __nv_bfloat162 pairs[2] = {__floats2bfloat162_rn(v[0], v[1]), __floats2bfloat162_rn(v[2], v[3])};
        *(uint2 *)to = *(uint2 *)pairs;
    } else {
        for (int i = 0; i < 4 && i < left; i++) to[i] = __float2bfloat16_rn(v[i]);
    }
}

template <int V>
static __global__ void __launch_bounds__(THREADS) combine_kernel(const __grid_constant__ moe4_layer_run run, void *y, moe4_dtype y_dtype,
                                                                 size_t y_ld, const float *weights, const float *shared, size_t shared_ld) {
    int token = blockIdx.x, lane = threadIdx.x & 31, first = token * run.top_k;
    size_t ld = (size_t)run.w.hidden;
#if __CUDA_ARCH__ == 900
    dependency_launch();
#endif
    int slot = first + lane; /* its first 32 slots stay at hand */
    bool here = lane < run.top_k && local_expert(run, slot) >= 0;
    float weight = here && weights ? weights[slot] : 1.f;
    uint32_t local = __ballot_sync(0xFFFFFFFFu, here);
#if __CUDA_ARCH__ == 900
    dependency_wait();
#endif
    for (int n0 = 4 * (int)(blockIdx.y * THREADS); n0 < run.w.hidden; n0 += 4 * THREADS * (int)gridDim.y) {
        int n = n0 + 4 * (int)threadIdx.x, left = run.w.hidden - n;
        float sum[4] = {0.f, 0.f, 0.f, 0.f};
        add_slots<V>(sum, run.o + (size_t)first * ld + n, ld, min(32, run.top_k), left, local, weight);
        for (int k0 = 32; k0 < run.top_k; k0 += 32) {
            bool other = k0 + lane < run.top_k && local_expert(run, slot + k0) >= 0;
            float other_weight = other && weights ? weights[slot + k0] : 1.f;
            uint32_t others = __ballot_sync(0xFFFFFFFFu, other);
            add_slots<V>(sum, run.o + (size_t)(first + k0) * ld + n, ld, min(32, run.top_k - k0), left, others, other_weight);
        }
        if (left <= 0) continue;
        if (shared) {
            float v[4];
            load_4<V>(v, shared + (size_t)token * shared_ld + n, left);
            for (int i = 0; i < 4; i++) sum[i] += v[i];
        }
        store_y(y, y_dtype, (size_t)token * y_ld + (size_t)n, sum, left);
    }
}

/* A block for each 4 * THREADS columns hides the latency of a few tokens; with many tokens fewer blocks begin fewer times. */
cudaError_t moe4_cuda_combine(const moe4_layer_run *run, void *y, moe4_dtype y_dtype, size_t y_ld, const float *weights,
                              const float *shared, size_t shared_ld, cudaStream_t stream) {
    int columns = (run->w.hidden + 4 * THREADS - 1) / (4 * THREADS), wanted = MOST_BLOCKS / run->n_tokens + 1;
    dim3 grid((unsigned)run->n_tokens, (unsigned)(columns < wanted ? columns : wanted));
    auto kernel = run->w.hidden % 4 || (shared && shared_ld % 4) ? combine_kernel<1> : combine_kernel<4>;
    return moe4_cuda_launch_early(kernel, grid, THREADS, 0, stream, *run, y, y_dtype, y_ld, weights, shared, shared_ld);
}
