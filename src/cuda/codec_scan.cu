/* Scans of whole matrices: amaxes, and what is wrong, when something is. */
#include "codec.cuh"

static __global__ void __launch_bounds__(THREADS) amax_kernel(const __grid_constant__ moe4_codec_call c, uint32_t *amax) {
    uint32_t in_row = tasks_in_row(c.cols), n = n_tasks(c);
    uint32_t most = 0;
    for (uint32_t task = warp_index(); task < n; task += n_warps()) {
        size_t row = task / in_row, col = (task % in_row * WARP_BLOCKS + threadIdx.x % 32) * MOE4_BLOCK, from = place(c, row, col);
        if (col + MOE4_BLOCK <= c.cols) {
            float v[16];
            load_16(v, at(c.x, c.dtype, from), c.dtype);
            most = max(most, amax_bits_16(v));
        } else {
            for (size_t i = col; i < c.cols; i++) {
                float x = load_one(at(c.x, c.dtype, from + i - col), c.dtype);
                most = max(most, __float_as_uint(x) & 0x7FFFFFFFu);
            }
        }
        if (c.o.per_row) {
            most = __reduce_max_sync(0xFFFFFFFFu, most);
            if (threadIdx.x % 32 == 0) atomicMax(amax + row, most);
            most = 0;
        }
    }
    if (c.o.per_row) return;
    most = __reduce_max_sync(0xFFFFFFFFu, most);
    if (threadIdx.x % 32 == 0 && most) atomicMax(amax, most);
}

cudaError_t moe4_cuda_codec_amax(const moe4_codec_call *c, uint32_t *amax, cudaStream_t stream) {
    cudaError_t error = cudaMemsetAsync(amax, 0, (c->o.per_row ? c->rows : 1) * sizeof *amax, stream);
    if (error != cudaSuccess || !c->rows || !c->cols) return error;
    amax_kernel<<<grid_for(n_tasks(*c)), THREADS, 0, stream>>>(*c, amax);
    return cudaGetLastError();
}

/* ---- the lowest index of what is wrong ---- */

static __global__ void __launch_bounds__(THREADS)
    nonfinite_kernel(const __grid_constant__ moe4_codec_call c, unsigned long long *first_bad) {
    size_t n = c.rows * c.cols;
    for (size_t i = (size_t)blockIdx.x * THREADS + threadIdx.x; i < n; i += (size_t)gridDim.x * THREADS) {
        float x = load_one(at(c.x, c.dtype, i / c.cols * c.ld + i % c.cols), c.dtype);
        if (!isfinite(x)) atomicMin(first_bad, (unsigned long long)i);
    }
}

static __global__ void __launch_bounds__(THREADS)
    bad_scale_kernel(const __grid_constant__ moe4_codec_call c, unsigned long long *first_bad) {
    size_t n_blocks = c.cols / MOE4_BLOCK, n = c.rows * n_blocks;
    for (size_t i = (size_t)blockIdx.x * THREADS + threadIdx.x; i < n; i += (size_t)gridDim.x * THREADS)
        if (*scale_of(c, i / n_blocks, i % n_blocks) > 0x7E) atomicMin(first_bad, (unsigned long long)i);
}

cudaError_t moe4_cuda_codec_find(const moe4_codec_call *c, int of_scales, unsigned long long *first_bad, cudaStream_t stream) {
    cudaError_t error = cudaMemsetAsync(first_bad, 0xFF, sizeof *first_bad, stream);
    if (error != cudaSuccess || !c->rows || !c->cols) return error;
    unsigned grid = grid_for(n_tasks(*c));
    if (of_scales)
        bad_scale_kernel<<<grid, THREADS, 0, stream>>>(*c, first_bad);
    else
        nonfinite_kernel<<<grid, THREADS, 0, stream>>>(*c, first_bad);
    return cudaGetLastError();
}
