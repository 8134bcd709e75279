/* Before the products: the slots sorted by expert, and the rows of x rounded to what the products read.
 *
 *   few_kernel     block 0: ids[T,k] -> slots sorted by expert, tiles, counters; block 1+r: row r of x
 *   many_kernel    each block has a share of the tokens: sorts their slots, then puts their rows where the products read them
 *   amax_kernel    TENSOR: the largest finite |x| of the batch, first
 *   quantize_h     TENSOR: the same for h between the products */
#include "launch.cuh"
#include "round_x.cuh"
#include "sort_slots.cuh"

#define THREADS SORT_THREADS
#define ROW_THREADS 128   /* for a row of x, where there are many */
#define MOST_BLOCKS 263   /* of many_kernel with rows, and one: two a multiprocessor */
#define APART 512         /* tokens from which rows are a kernel of their own */
#define ROWS_SHARED 45056 /* asked for so that five of its blocks run at a time: with more, copies do not meet in L2 */

/* This block's share of the marks (kernels.h); block 0, which sorts or begins the run, has none unless it is alone. */
static __device__ void mark_h(const moe4_layer_run &run) {
    if (!moe4_cuda_marks_h(&run) || (gridDim.x > 1 && blockIdx.x == 0)) return;
    size_t n = (size_t)run.n_tokens * (size_t)run.top_k * (size_t)run.w.intermediate_units * MOE4_UNIT_K / 4;
    size_t blocks = gridDim.x > 1 ? gridDim.x - 1 : 1, block = gridDim.x > 1 ? (size_t)blockIdx.x - 1 : 0;
    for (size_t i = block * THREADS + threadIdx.x; i < n; i += blocks * THREADS)
        ((uint4 *)run.h_wide)[i] = {MOE4_MARK, MOE4_MARK, MOE4_MARK, MOE4_MARK};
}

/* Who starts by this may read the call's inputs and draw tickets, nothing else before it waits. */
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

template <bool COPIES> static __global__ void __launch_bounds__(THREADS) few_kernel(const __grid_constant__ moe4_layer_run run) {
    begin(run);
    mark_h(run);
    if (blockIdx.x == 0)
        sort_few(run);
    else
        put_x_row<COPIES, THREADS, 1>(run, (int)blockIdx.x - 1);
}

/* A row of x for each G threads of the block; the places of their slots are there. */
template <bool COPIES, int G> static __device__ void put_x_rows(const moe4_layer_run &run, int first, int end) {
    for (int row = first + (int)threadIdx.x / G; row < end; row += THREADS / G) put_x_row<COPIES, G, THREADS / G>(run, row);
}

/* Block 0 has what is the run's, the others tokens. */
template <bool COPIES>
static __global__ void __launch_bounds__(THREADS, 2) many_kernel(const __grid_constant__ moe4_layer_run run, bool rounds) {
    begin(run);
    mark_h(run);
    int block = (int)blockIdx.x - 1, blocks = (int)gridDim.x - 1;
    int t0 = block < 0 ? 0 : (int)((int64_t)run.n_tokens * block / blocks), t1 = (int)((int64_t)run.n_tokens * (block + 1) / blocks);
    if (COPIES && rounds)
        for (int t = t0; t < t1; t++) x_row_fetch(run, t); /* while the slots are sorted */
    sort_many(run, t0 * run.top_k, t1 * run.top_k);
    if (!rounds) return;
    __syncthreads();
    int per_token = run.act == MOE4_ACT_STATIC ? run.top_k : 1;
    if ((t1 - t0) * per_token < THREADS / ROW_THREADS)
        put_x_rows<COPIES, THREADS>(run, t0 * per_token, t1 * per_token);
    else
        put_x_rows<COPIES, ROW_THREADS>(run, t0 * per_token, t1 * per_token);
}

template <bool COPIES> static __global__ void __launch_bounds__(ROW_THREADS) rows_kernel(const __grid_constant__ moe4_layer_run run) {
#if __CUDA_ARCH__ == 900
    dependency_wait();
    dependency_launch();
#endif
    put_x_row<COPIES, ROW_THREADS, 1>(run, (int)blockIdx.x);
}

static __global__ void __launch_bounds__(THREADS) amax_kernel(const __grid_constant__ moe4_layer_run run) {
    float v[16];
    uint32_t amax = x_row_amax<THREADS, 1>(run, (int)blockIdx.x, v);
    if (threadIdx.x == 0 && amax < MOE4_INF_BITS) atomicMax(run.x_amax, amax);
}

/* With many tokens rows are a kernel of their own: those under way are neighbours then, whose copies meet in L2. */
static cudaError_t launch_many(const moe4_layer_run *run, int rows, cudaStream_t stream) {
    size_t counts_bytes = (size_t)run->w.n * sizeof(int);
    long long slots = (long long)run->n_tokens * run->top_k, share = moe4_cuda_share_slots(run), blocks = slots / THREADS + 1;
    bool apart = run->n_tokens > APART || run->n_windows > 1;
    if (!apart && rows) blocks = MOST_BLOCKS;
    blocks = blocks < run->n_tokens ? blocks : run->n_tokens;
    cudaError_t error = cudaSuccess;
    if (share)
        error = moe4_cuda_launch_early(count_kernel, dim3((unsigned)((slots + share - 1) / share)), THREADS, counts_bytes, stream, *run);
    if (error == cudaSuccess)
        error = moe4_cuda_launch_early(copies_x(*run) ? many_kernel<true> : many_kernel<false>, dim3((unsigned)(blocks ? blocks : 1) + 1),
                                       THREADS, expert_places_bytes(run->w.n), stream, *run, rows && !apart);
    if (error != cudaSuccess || !rows || !apart) return error;
    return moe4_cuda_launch_early(copies_x(*run) ? rows_kernel<true> : rows_kernel<false>, dim3((unsigned)rows), ROW_THREADS, ROWS_SHARED,
                                  stream, *run);
}

cudaError_t moe4_cuda_tile_rows(const moe4_layer_run *run, cudaStream_t stream) {
    int rows = run->act == MOE4_ACT_STATIC ? run->n_tokens * run->top_k : run->n_tokens;
    return moe4_cuda_launch_early(copies_x(*run) ? rows_kernel<true> : rows_kernel<false>, dim3((unsigned)rows), ROW_THREADS, ROWS_SHARED,
                                  stream, *run);
}

cudaError_t moe4_cuda_prepare(const moe4_layer_run *run, cudaStream_t stream) {
    int rows = run->x_is_ready ? 0 : run->act == MOE4_ACT_STATIC ? run->n_tokens * run->top_k : run->n_tokens;
    if (run->act == MOE4_ACT_TENSOR && rows) {
        cudaError_t error = cudaMemsetAsync(run->x_amax, 0, sizeof *run->x_amax, stream);
        if (error != cudaSuccess) return error;
        amax_kernel<<<run->n_tokens, THREADS, 0, stream>>>(*run);
    }
    if ((long long)run->n_tokens * run->top_k > SORT_FEW || run->prefill_from) return launch_many(run, rows, stream);
    return moe4_cuda_launch_early(copies_x(*run) ? few_kernel<true> : few_kernel<false>, dim3((unsigned)(1 + rows)), THREADS, 0, stream,
                                  *run);
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
