/* x of the prefill kernel's tiles, from the rows that prepare rounded: gathered by slot, in the layout of prefill.cuh. A warp has 16 units
 * of a column; eight lanes have a unit, each a chunk. */
#include "launch.cuh"
#include "prefill.cuh"
#include "product.cuh"

#define THREADS 256
#define WARPS (THREADS / 32)

static __global__ void __launch_bounds__(THREADS) gather_kernel(const __grid_constant__ moe4_layer_run run, int units) {
#if __CUDA_ARCH__ == 900
    dependency_launch();
    dependency_wait();
#endif
    int lane = threadIdx.x & 31, chunk = lane & 7, n_tiles = run.state->n_prefill_tiles;
    for (int t = blockIdx.x; t < n_tiles; t += gridDim.x) {
        moe4_tile tile = run.prefill_tiles[t];
        int nt = prefill_columns(tile.n);
        char *to = (char *)prefill_tile(run.x_tiles, tile, units);
        for (int c = (int)(blockIdx.y * WARPS + (threadIdx.x >> 5)); c < nt; c += (int)gridDim.y * WARPS) {
            int row = x_row(run, run.slots[tile.first + min(c, tile.n - 1)]); /* columns past the last repeat it */
            const uint32_t *from = (const uint32_t *)(run.x + (size_t)row * (size_t)(units * MOE4_UNIT_K)) + chunk;
            char *column = to + c * 128 + ((chunk ^ (c & 7)) << 4);
            for (int u0 = (int)blockIdx.z * 16; u0 < units; u0 += (int)gridDim.z * 16) {
                uint4 v[4];
#pragma unroll
                for (int i = 0; i < 4; i++) {
                    int u = u0 + 4 * i + (lane >> 3);
                    if (u < units) v[i] = {from[u * 32], from[u * 32 + 8], from[u * 32 + 16], from[u * 32 + 24]};
                }
#pragma unroll
                for (int i = 0; i < 4; i++) {
                    int u = u0 + 4 * i + (lane >> 3);
                    if (u < units) *(uint4 *)(column + (size_t)u * (size_t)nt * 128) = v[i];
                }
            }
        }
    }
}

cudaError_t moe4_cuda_prefill_gather(const moe4_layer_run *run, int units, cudaStream_t stream) {
    unsigned tiles = (unsigned)(run->max_prefill_tiles < 512 ? run->max_prefill_tiles : 512);
    return moe4_cuda_launch_early(gather_kernel, dim3(tiles, 4, (unsigned)(units + 15) / 16), THREADS, 0, stream, *run, units);
}
