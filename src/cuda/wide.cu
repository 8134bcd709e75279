/* Products with unquantized weights, y = x @ w^T * factor + bias in fp32: router gates, mostly. A warp has one row of w and eight tokens;
 * lane l sums k = l, l + 32, ... and the lanes are added in a fixed tree, so a token's bits do not depend on its neighbours. */
#include "activation.cuh"

#include <math_constants.h>

#define WARPS 4
#define TOKENS 8

static __global__ void __launch_bounds__(WARPS * 32) wide_kernel(const __grid_constant__ moe4_wide_product p) {
    int lane = threadIdx.x & 31, n = blockIdx.x * WARPS + (threadIdx.x >> 5), t0 = blockIdx.y * TOKENS, n_tokens = min(TOKENS, p.T - t0);
    if (n >= p.N) return;
    float sum[TOKENS] = {0.f};
    uint32_t bad = 0; /* bit t: token t0 + t has a NaN or Inf */
    for (int k = lane; k < p.K; k += 32) {
        float w = load_1(p.w, p.w_dtype, (size_t)n * (size_t)p.K + (size_t)k);
#pragma unroll
        for (int t = 0; t < TOKENS; t++)
            if (t < n_tokens) {
                float x = load_1(p.x, p.x_dtype, (size_t)(t0 + t) * p.x_ld + (size_t)k);
                bad |= (uint32_t)!isfinite(x) << t;
                sum[t] = fmaf(x, w, sum[t]);
            }
    }
    bad = __reduce_or_sync(0xFFFFFFFFu, bad);
#pragma unroll
    for (int t = 0; t < TOKENS; t++) {
        for (int d = 16; d; d /= 2) sum[t] += __shfl_xor_sync(0xFFFFFFFFu, sum[t], d);
        if (lane || t >= n_tokens) continue;
        float y = bad >> t & 1 ? CUDART_NAN_F : sum[t];
        if (p.factor) y *= p.factor[t0 + t];
        if (p.bias) y += p.bias[n];
        size_t at = (size_t)(t0 + t) * (size_t)p.N + (size_t)n;
        if (p.y_dtype == MOE4_F32)
            ((float *)p.y)[at] = y;
        else
            ((__nv_bfloat16 *)p.y)[at] = __float2bfloat16_rn(y);
    }
}

cudaError_t moe4_cuda_wide(const moe4_wide_product *p, cudaStream_t stream) {
    const int most = 65535 * TOKENS; /* of gridDim.y */
    for (int t = 0; t < p->T; t += most) {
        moe4_wide_product part = *p;
        part.T = p->T - t < most ? p->T - t : most;
        part.factor = p->factor ? p->factor + t : NULL;
        part.x = (const char *)p->x + (size_t)t * p->x_ld * (p->x_dtype == MOE4_F32 ? 4 : 2);
        part.y = (char *)p->y + (size_t)t * (size_t)p->N * (p->y_dtype == MOE4_F32 ? 4 : 2);
        dim3 grid((unsigned)((p->N + WARPS - 1) / WARPS), (unsigned)((part.T + TOKENS - 1) / TOKENS));
        wide_kernel<<<grid, WARPS * 32, 0, stream>>>(part);
    }
    return cudaGetLastError();
}

/* ---- block scales ---- */

static __global__ void bad_scale_kernel(unsigned long long *first_bad, const uint8_t *scale, size_t n) {
    for (size_t i = blockIdx.x * (size_t)blockDim.x + threadIdx.x; i < n; i += (size_t)gridDim.x * blockDim.x)
        if (scale[i] > 0x7E) atomicMin(first_bad, (unsigned long long)i);
}

cudaError_t moe4_cuda_find_bad_scale(unsigned long long *first_bad, const uint8_t *scale, size_t n, cudaStream_t stream) {
    cudaError_t error = cudaMemsetAsync(first_bad, 0xFF, sizeof *first_bad, stream);
    if (error != cudaSuccess || !n) return error;
    size_t blocks = (n + 255) / 256;
    bad_scale_kernel<<<(unsigned)(blocks < 4096 ? blocks : 4096), 256, 0, stream>>>(first_bad, scale, n);
    return cudaGetLastError();
}
