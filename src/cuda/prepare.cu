/* Before the products: the slots sorted by expert, and the rows of x rounded to what the products read.
 *
 *   few_kernel     block 0: ids[T,k] -> slots sorted by expert, tiles, counters; block 1+r: row r of x
 *   many_kernel    the same, by several blocks, or each block a token
 *   rows_kernel    rows of x for the prefill kernel's tiles: loaded and rounded while many_kernel sorts
 *   amax_kernel    TENSOR: the largest finite |x| of the batch, first
 *   quantize_h     TENSOR: the same for h between the products */
#include "launch.cuh"
#include "round_x.cuh"
#include "sort_many.cuh"

#define THREADS SORT_THREADS
#define ROW_THREADS 128 /* for a row of x, where there are many */
#define TOGETHER 256    /* tokens up to which w4a16 sorts and puts rows in one kernel */

/* This block's share of the marks (kernels.h); block 0, which sorts or begins the run, has none unless it is alone. */
static __device__ void mark_h(const moe4_layer_run &run) {
    if (!moe4_cuda_marks_h(&run) || (gridDim.x > 1 && blockIdx.x == 0)) return;
    size_t n = (size_t)run.n_tokens * (size_t)run.top_k * (size_t)run.w.intermediate_units * MOE4_UNIT_K / 4;
    size_t blocks = gridDim.x > 1 ? gridDim.x - 1 : 1, block = gridDim.x > 1 ? (size_t)blockIdx.x - 1 : 0;
    for (size_t i = block * THREADS + threadIdx.x; i < n; i += blocks * THREADS)
        ((uint4 *)run.h_wide)[i] = {MOE4_MARK, MOE4_MARK, MOE4_MARK, MOE4_MARK};
}

/* Who starts by this may read the call's inputs and draw tickets, nothing else before it waits; so may whoever starts by those. */
static __device__ void begin(const moe4_layer_run &run) {
#if __CUDA_ARCH__ == 900
    dependency_wait();
#endif
    if (blockIdx.x == 0) {
        if (threadIdx.x == 0) run.state->ticket = 0;
        __threadfence();
        __syncthreads();
    }
#if __CUDA_ARCH__ == 900
    dependency_launch();
#endif
}

static __global__ void __launch_bounds__(THREADS) few_kernel(const __grid_constant__ moe4_layer_run run) {
    begin(run);
    mark_h(run);
    if (blockIdx.x == 0)
        sort_few(run);
    else
        put_x_row<false, THREADS>(run, (int)blockIdx.x - 1);
}

/* The first `sorters` blocks sort; block b has row b - first_row of x, if there is one. */
static __global__ void __launch_bounds__(THREADS, 2) many_kernel(const __grid_constant__ moe4_layer_run run, int sorters, int first_row) {
    begin(run);
    mark_h(run);
    int block = (int)blockIdx.x, row = block - first_row;
    if (block < sorters) {
        if (row >= 0) x_row_fetch(run, row);
        sort_many(run, block, sorters);
        __syncthreads();
    }
    if (row >= 0) put_x_row<false, THREADS>(run, row);
}

static __global__ void __launch_bounds__(ROW_THREADS) rows_kernel(const __grid_constant__ moe4_layer_run run) {
#if __CUDA_ARCH__ == 900
    dependency_launch();
#endif
    put_x_row<true, ROW_THREADS>(run, (int)blockIdx.x);
}

static __global__ void __launch_bounds__(THREADS) amax_kernel(const __grid_constant__ moe4_layer_run run) {
    uint32_t amax = 0;
    for (int b = threadIdx.x; b < run.w.hidden / 16; b += THREADS) {
        x_blocks<THREADS, 1> x;
        x.load(run, (int)blockIdx.x, b);
        amax = max(amax, x.amax());
    }
    amax = reduce_row<THREADS, 1, true>(amax);
    if (threadIdx.x == 0 && amax < MOE4_INF_BITS) atomicMax(run.x_amax, amax);
}

static int rows_of(const moe4_layer_run *run) {
    return run->x_is_ready ? 0 : run->act == MOE4_ACT_STATIC ? run->n_tokens * run->top_k : run->n_tokens;
}

cudaError_t moe4_cuda_tile_rows(const moe4_layer_run *run, cudaStream_t stream) {
    return moe4_cuda_launch_early(rows_kernel, dim3((unsigned)rows_of(run)), ROW_THREADS, 0, stream, *run);
}

/* Rows that go to tiles wait for their places: each in the block that sorts its token's slots, or, where rounding takes longer than sorting
 * or there are many, in a kernel of their own that begins meanwhile. Other rows are put beside the sorting. */
static cudaError_t launch_many(const moe4_layer_run *run, int rows, cudaStream_t stream) {
    size_t counts_bytes = (size_t)run->w.n * sizeof(int), places_bytes = expert_places_bytes(run->w.n);
    long long slots = (long long)run->n_tokens * run->top_k, share = moe4_cuda_share_slots(run), sorters = slots / THREADS + 1;
    bool tiled = rows && moe4_cuda_tiles_x(run);
    bool together = tiled && run->act == MOE4_ACT_W4A16 && run->n_tokens <= TOGETHER && run->top_k <= THREADS && !run->n_windows;
    if (together) sorters = rows;
    long long first_row = together ? 0 : sorters, blocks = tiled ? sorters : sorters + rows;
    cudaError_t error = cudaFuncSetAttribute(many_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)places_bytes);
    if (error == cudaSuccess && share)
        error = moe4_cuda_launch_early(count_kernel, dim3((unsigned)((slots + share - 1) / share)), THREADS, counts_bytes, stream, *run);
    if (error == cudaSuccess)
        error =
            moe4_cuda_launch_early(many_kernel, dim3((unsigned)blocks), THREADS, places_bytes, stream, *run, (int)sorters, (int)first_row);
    return error == cudaSuccess && tiled && !together ? moe4_cuda_tile_rows(run, stream) : error;
}

cudaError_t moe4_cuda_prepare(const moe4_layer_run *run, cudaStream_t stream) {
    int rows = rows_of(run);
    if (run->act == MOE4_ACT_TENSOR && rows) {
        cudaError_t error = cudaMemsetAsync(run->x_amax, 0, sizeof *run->x_amax, stream);
        if (error != cudaSuccess) return error;
        amax_kernel<<<run->n_tokens, THREADS, 0, stream>>>(*run);
    }
    if ((long long)run->n_tokens * run->top_k > SORT_FEW || run->prefill_from) return launch_many(run, rows, stream);
    return moe4_cuda_launch_early(few_kernel, dim3((unsigned)(1 + rows)), THREADS, 0, stream, *run);
}

/* ---- h, as a step of its own ---- */

/* h_amax[n_rows] -> the largest finite one, behind them. */
static __global__ void __launch_bounds__(THREADS) h_amax_kernel(const __grid_constant__ moe4_layer_run run) {
    uint32_t amax = 0;
    for (int i = threadIdx.x; i < run.state->n_slots; i += THREADS)
        if (run.h_amax[i] < MOE4_INF_BITS) amax = max(amax, run.h_amax[i]);
    amax = reduce_row<THREADS, 1, true>(amax);
    if (threadIdx.x == 0) run.h_amax[run.n_tokens * run.top_k] = amax;
}

static __global__ void __launch_bounds__(128) round_h_kernel(const __grid_constant__ moe4_layer_run run) {
    const uint32_t *batch_amax = run.act == MOE4_ACT_TENSOR ? run.h_amax + run.n_tokens * run.top_k : NULL;
    int n_tiles = run.state->n_tiles;
    for (int t = blockIdx.x; t < n_tiles; t += gridDim.x)
        round_h_rows(run, run.tiles[t], (int)(blockIdx.y * 128 + threadIdx.x), (int)gridDim.y * 128, batch_amax);
}

cudaError_t moe4_cuda_quantize_h(const moe4_layer_run *run, cudaStream_t stream) {
    if (run->act == MOE4_ACT_W4A16) return cudaSuccess;
    if (run->act == MOE4_ACT_TENSOR) h_amax_kernel<<<1, THREADS, 0, stream>>>(*run);
    dim3 grid((unsigned)(run->max_tiles < 512 ? run->max_tiles : 512), 8);
    round_h_kernel<<<grid, 128, 0, stream>>>(*run);
    return cudaGetLastError();
}
