/* From the experts' outputs to y where combine.cu does not serve: down has biases, rows keep their places, or a dispatcher says whose they
 * are. A token's rows are added in the order in which they stand, from lists that are made here without a sum that depends on timing. */
#include "result.cuh"
#include "slots.cuh"

#define THREADS 128
#define COLUMNS (4 * THREADS) /* of a block */
#define LIST_THREADS 256
#define LIST_WARPS (LIST_THREADS / 32)
#define LIST_TOKENS 4 /* of a warp */
#define SCAN_THREADS 1024
#define MOST_BLOCKS 4096

/* ---- row for row ---- */

static __global__ void __launch_bounds__(THREADS)
    rows_kernel(const __grid_constant__ moe4_combine c, const __grid_constant__ moe4_layer_run run) {
    int first = blockIdx.y * COLUMNS, last = min(run.w.hidden, first + COLUMNS);
    for (int p = blockIdx.x, n = run.state->n_slots; p < n; p += gridDim.x) {
        int slot = run.slots[p], e = run.w.bias_down || run.result.y ? slot_expert(run, slot) : 0;
        if (run.result.y && run.expert_slots[e] >= run.prefill_from) continue; /* the prefill kernel did */
        const float *o = run.o + (size_t)slot * (size_t)run.w.hidden, *bias = run.w.bias_down;
        if (bias) bias += (size_t)e * (size_t)run.w.hidden;
        float weight = c.weights ? c.weights[slot] : 1.f;
        size_t at = (size_t)(slot / run.top_k) * c.y_ld + (size_t)(slot % run.top_k) * (size_t)run.w.hidden;
        for (int j = first + threadIdx.x; j < last; j += THREADS)
            store_y(c.y, c.y_dtype, at + (size_t)j, weighted_result(o[j], bias, bias ? bias[j] : 0.f, weight));
    }
}

cudaError_t moe4_cuda_combine_rows(const moe4_combine *c, cudaStream_t stream) {
    long long rows = (long long)c->run->n_tokens * c->run->top_k;
    if (!rows) return cudaSuccess;
    int columns = (c->run->w.hidden + COLUMNS - 1) / COLUMNS, most = MOST_BLOCKS / columns + 1; /* of max_rows, few may be there */
    dim3 grid((unsigned)(rows < most ? rows : most), (unsigned)columns);
    rows_kernel<<<grid, THREADS, 0, stream>>>(*c, *c->run);
    return cudaGetLastError();
}

/* ---- whose rows they are ---- */

static __device__ int token_of(const moe4_combine &c, int row) {
    int t = c.row_token[row];
    return t >= 0 && t < c.n_tokens ? t : -1;
}

static __global__ void __launch_bounds__(LIST_THREADS)
    count_kernel(const __grid_constant__ moe4_combine c, const __grid_constant__ moe4_layer_run run) {
    for (int p = blockIdx.x * LIST_THREADS + threadIdx.x, n = run.state->n_slots; p < n; p += gridDim.x * LIST_THREADS) {
        int t = token_of(c, run.slots[p]);
        if (t >= 0) atomicAdd(c.token_start + t + 1, 1);
    }
}

/* token_start[t] = rows of the tokens before t; one block. */
static __global__ void __launch_bounds__(SCAN_THREADS) scan_kernel(int *token_start, int n) {
    __shared__ int warp_sum[SCAN_THREADS / 32];
    int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, before = 0;
    for (int i0 = 0; i0 < n; i0 += SCAN_THREADS) {
        int i = i0 + threadIdx.x, v = i < n ? token_start[i] : 0;
        for (int d = 1; d < 32; d *= 2) {
            int other = __shfl_up_sync(0xFFFFFFFFu, v, d);
            if (lane >= d) v += other;
        }
        if (lane == 31) warp_sum[warp] = v;
        __syncthreads();
        for (int w = 0; w < SCAN_THREADS / 32; w++) {
            if (w < warp) v += warp_sum[w];
        }
        v += before;
        for (int w = 0; w < SCAN_THREADS / 32; w++) before += warp_sum[w];
        if (i < n) token_start[i] = v;
        __syncthreads();
    }
}

/* A warp looks through all rows for its tokens'; the block reads them together. */
static __global__ void __launch_bounds__(LIST_THREADS)
    list_kernel(const __grid_constant__ moe4_combine c, const __grid_constant__ moe4_layer_run run) {
    __shared__ int token[LIST_THREADS], row[LIST_THREADS];
    int lane = threadIdx.x & 31, t0 = (blockIdx.x * LIST_WARPS + (threadIdx.x >> 5)) * LIST_TOKENS, at[LIST_TOKENS];
    for (int i = 0; i < LIST_TOKENS; i++) at[i] = t0 + i < c.n_tokens ? c.token_start[t0 + i] : 0;
    for (int p0 = 0, n = run.state->n_slots; p0 < n; p0 += LIST_THREADS) {
        __syncthreads();
        int p = p0 + threadIdx.x;
        row[threadIdx.x] = p < n ? run.slots[p] : 0;
        token[threadIdx.x] = p < n ? token_of(c, row[threadIdx.x]) : -1;
        __syncthreads();
        for (int j = 0; j < LIST_THREADS; j += 32)
#pragma unroll
            for (int i = 0; i < LIST_TOKENS; i++) {
                bool mine = token[j + lane] == t0 + i;
                uint32_t all = __ballot_sync(0xFFFFFFFFu, mine);
                if (mine) c.token_rows[at[i] + __popc(all & ((1u << lane) - 1))] = row[j + lane];
                at[i] += __popc(all);
            }
    }
}

cudaError_t moe4_cuda_list_rows(const moe4_combine *c, cudaStream_t stream) {
    cudaError_t error = cudaMemsetAsync(c->token_start, 0, ((size_t)c->n_tokens + 1) * sizeof *c->token_start, stream);
    int rows = c->run->n_tokens, per_block = LIST_WARPS * LIST_TOKENS;
    if (error != cudaSuccess || !rows || !c->n_tokens) return error;
    int blocks = (rows + LIST_THREADS - 1) / LIST_THREADS;
    count_kernel<<<(unsigned)(blocks < MOST_BLOCKS ? blocks : MOST_BLOCKS), LIST_THREADS, 0, stream>>>(*c, *c->run);
    scan_kernel<<<1, SCAN_THREADS, 0, stream>>>(c->token_start, c->n_tokens + 1);
    list_kernel<<<(unsigned)((c->n_tokens + per_block - 1) / per_block), LIST_THREADS, 0, stream>>>(*c, *c->run);
    return cudaGetLastError();
}

/* ---- summed by token ---- */

static __global__ void __launch_bounds__(THREADS)
    tokens_kernel(const __grid_constant__ moe4_combine c, const __grid_constant__ moe4_layer_run run) {
    int t = blockIdx.x, first = blockIdx.y * COLUMNS, last = min(run.w.hidden, first + COLUMNS);
    int begin = c.row_token ? c.token_start[t] : t * run.top_k, end = c.row_token ? c.token_start[t + 1] : begin + run.top_k;
    float sum[COLUMNS / THREADS] = {0.f};
    for (int i = begin; i < end; i++) {
        int slot = c.row_token ? c.token_rows[i] : i, e = slot_expert(run, slot);
        if (e < 0) continue;
        const float *o = run.o + (size_t)slot * (size_t)run.w.hidden, *bias = run.w.bias_down;
        if (bias) bias += (size_t)e * (size_t)run.w.hidden;
        float weight = c.weights ? c.weights[slot] : 1.f;
#pragma unroll
        for (int k = 0; k < COLUMNS / THREADS; k++) {
            int j = first + threadIdx.x + k * THREADS;
            if (j < last) sum[k] += weight * (bias ? o[j] + bias[j] : o[j]);
        }
    }
#pragma unroll
    for (int k = 0; k < COLUMNS / THREADS; k++) {
        int j = first + threadIdx.x + k * THREADS;
        if (j >= last) continue;
        if (c.shared) sum[k] += c.shared[(size_t)t * (size_t)run.w.hidden + (size_t)j] + (c.shared_bias ? c.shared_bias[j] : 0.f);
        store_y(c.y, c.y_dtype, (size_t)t * c.y_ld + (size_t)j, sum[k]);
    }
}

cudaError_t moe4_cuda_combine_tokens(const moe4_combine *c, cudaStream_t stream) {
    if (!c->n_tokens) return cudaSuccess;
    dim3 grid((unsigned)c->n_tokens, (unsigned)((c->run->w.hidden + COLUMNS - 1) / COLUMNS));
    tokens_kernel<<<grid, THREADS, 0, stream>>>(*c, *c->run);
    return cudaGetLastError();
}
