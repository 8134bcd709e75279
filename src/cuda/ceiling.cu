/* Kernels that set ceilings: plain reads of memory, and data for a product that is neither zeros nor all alike. */
#include "kernels.h"

#define THREADS 512
#define LOADS 8 /* of 16 bytes under way in a thread */

static __global__ void __launch_bounds__(THREADS) read_kernel(const uint4 *p, size_t n, uint32_t *out) {
    uint32_t x = 0;
    for (size_t i = (size_t)blockIdx.x * THREADS * LOADS + threadIdx.x; i + (LOADS - 1) * THREADS < n;
         i += (size_t)gridDim.x * THREADS * LOADS) {
        uint4 v[LOADS];
#pragma unroll
        for (int j = 0; j < LOADS; j++) v[j] = __ldcs(p + i + j * THREADS);
#pragma unroll
        for (int j = 0; j < LOADS; j++) x ^= v[j].x ^ v[j].y ^ v[j].z ^ v[j].w;
    }
    if (x == 0x12345) *out = x; /* so that no load can be left out */
}

cudaError_t moe4_cuda_read(const void *data, size_t bytes, int n_blocks, uint32_t *out, cudaStream_t stream) {
    read_kernel<<<n_blocks, THREADS, 0, stream>>>((const uint4 *)data, bytes / sizeof(uint4), out);
    return cudaGetLastError();
}

/* About normal. */
static __global__ void fill_kernel(__nv_bfloat16 *p, size_t n) {
    for (size_t i = blockIdx.x * (size_t)blockDim.x + threadIdx.x; i < n; i += (size_t)gridDim.x * blockDim.x) {
        uint64_t r = (i + 1) * 0x9E3779B97F4A7C15u;
        r = (r ^ r >> 31) * 0xBF58476D1CE4E5B9u;
        r ^= r >> 29;
        float sum = -2.f;
        for (int j = 0; j < 4; j++) sum += (float)(r >> 16 * j & 0xFFFF) * 0x1p-16f;
        p[i] = __float2bfloat16_rn(sum);
    }
}

cudaError_t moe4_cuda_fill(moe4_bf16 *data, size_t n, cudaStream_t stream) {
    fill_kernel<<<1024, 256, 0, stream>>>(data, n);
    return cudaGetLastError();
}
