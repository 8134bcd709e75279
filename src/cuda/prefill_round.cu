/* The rounding of h to NVFP4 for the rows whose products are the prefill kernel's, where that kernel does not do it itself: ROW_THREADS
 * take a row of h_wide, find its largest value, and write it where the prefill kernel reads it. In TENSOR the largest value of all rows is
 * found between two such passes. */
#include "launch.cuh"
#include "round_x.cuh"

#define THREADS 256
#define ROW_THREADS 128
#define ROWS_AT_ONCE 64 /* of a tile */

/* v = the thread's first block of the row. */
static __device__ uint32_t row_max(float v[16], const float *row, int blocks) {
    int t = (int)threadIdx.x % ROW_THREADS;
    fill_16(v, 0.f);
    if (t < blocks) load_16(v, row + 16 * t, MOE4_F32);
    uint32_t amax = amax_bits_16(v);
    for (int b = t + ROW_THREADS; b < blocks; b += ROW_THREADS) {
        float other[16];
        load_16(other, row + 16 * b, MOE4_F32);
        amax = max(amax, amax_bits_16(other));
    }
    return reduce_row<ROW_THREADS, THREADS / ROW_THREADS, true>(amax);
}

static __device__ void round_row(const moe4_layer_run &run, const moe4_tile &tile, int column, const float *in, int blocks, float v[16],
                                 uint32_t amax) {
    int row = tile.first + column, nt = prefill_columns(tile.n);
    __nv_bfloat16 *to = prefill_tile(run.h_tiles, tile, run.w.intermediate_units);
    bool bad = amax >= MOE4_INF_BITS;
    float S = 1.f, decode = 1.f;
    if (!bad)
        S = encode_scale(run.act, run.act == MOE4_ACT_TENSOR ? run.h_amax[run.n_tokens * run.top_k] : amax, run.w.scale_h, tile.expert,
                         &decode);
    uint32_t saturated = 0;
    int t = (int)threadIdx.x % ROW_THREADS;
    for (int b = t; (b & ~31) < blocks; b += ROW_THREADS) {
        uint4 chunk[2];
        uint32_t w[8];
        bool here = b < blocks;
        if (here && b != t) load_16(v, in + 16 * b, MOE4_F32);
        if (bad)
            fill_16(v, __uint_as_float(0x7FFFFFFFu));
        else if (here)
            saturated += (uint32_t)round_16(v, S);
        pack_bf16_16(w, v);
        prefill_chunks(chunk, w);
        prefill_store_chunks(to, nt, column, b, run.w.intermediate_units, chunk);
    }
    saturated = reduce_row<ROW_THREADS, THREADS / ROW_THREADS, false>(saturated);
    if (t == 0) {
        run.h_factor[row] = decode;
        run.h_saturated[row] = (int)saturated;
    }
}

template <bool AMAX_ONLY> static __global__ void __launch_bounds__(THREADS) rows_kernel(const __grid_constant__ moe4_layer_run run) {
#if __CUDA_ARCH__ == 900
    dependency_launch();
    dependency_wait();
#endif
    int blocks = run.w.intermediate_units * 4, n_tiles = run.state->n_prefill_tiles, group = (int)threadIdx.x / ROW_THREADS;
    int first = (int)blockIdx.y * (THREADS / ROW_THREADS) + group;
    for (int t = blockIdx.x; t < n_tiles; t += gridDim.x) {
        moe4_tile tile = run.prefill_tiles[t];
        for (int c = first; c < tile.n; c += ROWS_AT_ONCE) {
            const float *in = run.h_wide + (size_t)(tile.first + c) * (size_t)(blocks * 16);
            float v[16];
            uint32_t amax = row_max(v, in, blocks);
            if (!AMAX_ONLY)
                round_row(run, tile, c, in, blocks, v, amax);
            else if (threadIdx.x % ROW_THREADS == 0)
                run.h_amax[tile.first + c] = amax;
        }
    }
}

static cudaError_t launch_rows(void (*kernel)(moe4_layer_run), const moe4_layer_run *run, cudaStream_t stream) {
    unsigned tiles = (unsigned)(run->max_prefill_tiles < 256 ? run->max_prefill_tiles : 256);
    return moe4_cuda_launch_early(kernel, dim3(tiles, ROWS_AT_ONCE * ROW_THREADS / THREADS), THREADS, 0, stream, *run);
}

cudaError_t moe4_cuda_prefill_h_amax(const moe4_layer_run *run, cudaStream_t stream) {
    return run->act == MOE4_ACT_TENSOR ? launch_rows(rows_kernel<true>, run, stream) : cudaSuccess;
}

cudaError_t moe4_cuda_prefill_quantize_h(const moe4_layer_run *run, cudaStream_t stream) {
    return run->act == MOE4_ACT_W4A16 ? cudaSuccess : launch_rows(rows_kernel<false>, run, stream);
}
