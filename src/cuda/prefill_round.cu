/* The rounding of h to NVFP4 for the rows whose products are the prefill kernel's: a block takes a row of h_wide, finds its largest value,
 * and writes it where the prefill kernel reads it. In TENSOR the largest value of all rows is found between two such passes. */
#include "activation.cuh"
#include "launch.cuh"
#include "prefill.cuh"
#include "ptx.cuh"

#define THREADS 256
#define ROWS_AT_ONCE 64 /* of a tile */

static __device__ uint32_t row_max(const float *row, int blocks) {
    __shared__ uint32_t warp_max[THREADS / 32];
    uint32_t amax = 0;
    for (int b = threadIdx.x; b < blocks; b += THREADS) {
        float v[16];
        load_16(v, row + 16 * b, MOE4_F32);
        amax = max(amax, amax_bits_16(v));
    }
    amax = __reduce_max_sync(0xFFFFFFFFu, amax);
    __syncthreads();
    if ((threadIdx.x & 31) == 0) warp_max[threadIdx.x >> 5] = amax;
    __syncthreads();
    for (int w = 0; w < THREADS / 32; w++) amax = max(amax, warp_max[w]);
    return amax;
}

static __device__ void round_row(const moe4_layer_run &run, const moe4_tile &tile, int index, int column, const float *in, int blocks,
                                 uint32_t amax) {
    int row = tile.first + column, nt = prefill_columns(tile.n);
    __nv_bfloat16 *to = prefill_tile(run.h_tiles, tile, index, run.w.intermediate_units);
    bool bad = amax >= MOE4_INF_BITS;
    float S = 1.f, decode = 1.f;
    if (!bad)
        S = encode_scale(run.act, run.act == MOE4_ACT_TENSOR ? run.h_amax[run.n_tokens * run.top_k] : amax, run.w.scale_h, tile.expert,
                         &decode);
    int saturated = 0;
    for (int b0 = 0; b0 < blocks; b0 += THREADS) {
        int b = b0 + threadIdx.x, over = 0;
        if ((b & ~31) < blocks) { /* a whole warp */
            float v[16];
            uint4 chunk[2];
            if (b >= blocks) {
                fill_16(v, 0.f);
            } else if (bad) {
                fill_16(v, __uint_as_float(0x7FFFFFFFu));
            } else {
                load_16(v, in + 16 * b, MOE4_F32);
                over = round_16(v, S);
            }
            prefill_chunks(chunk, v);
            if (b < blocks) prefill_store_chunks(to, nt, column, b, chunk);
        }
        saturated += __syncthreads_count(over);
    }
    if (threadIdx.x == 0) {
        run.h_factor[row] = decode;
        run.h_saturated[row] = saturated;
    }
}

template <bool AMAX_ONLY> static __global__ void __launch_bounds__(THREADS) rows_kernel(const __grid_constant__ moe4_layer_run run) {
#if __CUDA_ARCH__ == 900
    dependency_launch();
    dependency_wait();
#endif
    int blocks = run.w.intermediate_units * 4, n_tiles = run.state->n_prefill_tiles;
    for (int t = blockIdx.x; t < n_tiles; t += gridDim.x) {
        moe4_tile tile = run.prefill_tiles[t];
        for (int c = blockIdx.y; c < tile.n; c += gridDim.y) {
            int row = tile.first + c;
            const float *in = run.h_wide + (size_t)row * (size_t)(blocks * 16);
            uint32_t amax = row_max(in, blocks);
            if (AMAX_ONLY) {
                if (threadIdx.x == 0) run.h_amax[row] = amax;
            } else {
                round_row(run, tile, t, c, in, blocks, amax);
            }
        }
    }
}

static cudaError_t launch_rows(void (*kernel)(moe4_layer_run), const moe4_layer_run *run, cudaStream_t stream) {
    unsigned tiles = (unsigned)(run->max_prefill_tiles < 256 ? run->max_prefill_tiles : 256);
    return moe4_cuda_launch_early(kernel, dim3(tiles, ROWS_AT_ONCE), THREADS, 0, stream, *run);
}

cudaError_t moe4_cuda_prefill_h_amax(const moe4_layer_run *run, cudaStream_t stream) {
    return run->act == MOE4_ACT_TENSOR ? launch_rows(rows_kernel<true>, run, stream) : cudaSuccess;
}

cudaError_t moe4_cuda_prefill_quantize_h(const moe4_layer_run *run, cudaStream_t stream) {
    return run->act == MOE4_ACT_W4A16 ? cudaSuccess : launch_rows(rows_kernel<false>, run, stream);
}
