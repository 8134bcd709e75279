/* Before the products: the slots sorted by expert, and the rows of x rounded to what the products read.
 *
 *   prepare_kernel    block 0: ids[T,k] -> slots sorted by expert (stable counting sort), tiles, counters
 *                     block 1+r: row r of x -> bf16 (W4A16) or exact NVFP4 values and a factor
 *   amax_kernel       TENSOR: the largest finite |x| of the batch, first
 *   quantize_h        TENSOR: the same for h between the products
 *
 * The sort: each of 16 warps counts its contiguous share of the slots, a scan over (expert, warp) gives every warp its place in every
 * expert, and the second walk ranks 32 slots at a time. Nothing depends on timing. */
#include "activation.cuh"
#include "launch.cuh"
#include "ptx.cuh"
#include "slots.cuh"

#define THREADS 512
#define WARPS (THREADS / 32)

/* ---- dispatch ---- */

/* Exclusive sums of a and b over the block; totals to all. */
static __device__ int2 scan_block(int2 v, int2 *total, int2 *scratch) {
    int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
    int2 s = v;
    for (int d = 1; d < 32; d *= 2) {
        int x = __shfl_up_sync(0xFFFFFFFFu, s.x, d), y = __shfl_up_sync(0xFFFFFFFFu, s.y, d);
        if (lane >= d) s = make_int2(s.x + x, s.y + y);
    }
    __syncthreads();
    if (lane == 31) scratch[warp] = s;
    __syncthreads();
    int2 before = {0, 0};
    *total = make_int2(0, 0);
    for (int w = 0; w < WARPS; w++) {
        if (w == warp) before = *total;
        *total = make_int2(total->x + scratch[w].x, total->y + scratch[w].y);
    }
    return make_int2(before.x + s.x - v.x, before.y + s.y - v.y);
}

static __device__ void write_tiles(const moe4_layer_run &run, int expert, int first, int n, int head, int n_tiles) {
    for (int i = 0; i < n_tiles; i++) { /* an even split: n/n_tiles each, the first n%n_tiles one more */
        int base = n / n_tiles, rest = n % n_tiles;
        run.tiles[head + i] = {expert, first + i * base + min(i, rest), base + (i < rest), head, n_tiles};
    }
}

static __device__ void dispatch(const moe4_layer_run &run) {
    extern __shared__ int counts[]; /* [warp][expert] */
    __shared__ int2 scratch[WARPS];
    int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, n_experts = run.w.n;
    int n = run.n_tokens * run.top_k, share = (n + WARPS * 32 - 1) / (WARPS * 32) * 32;
    int begin = min(n, warp * share), end = min(n, begin + share);

    for (int i = threadIdx.x; i < WARPS * n_experts; i += THREADS) counts[i] = 0;
    __syncthreads();
    for (int s = begin + lane; s < end; s += 32) {
        int e = local_expert(run, s);
        if (e >= 0) atomicAdd(&counts[warp * n_experts + e], 1);
    }
    __syncthreads();

    int2 base = {0, 0}; /* slots and tiles before this round of experts */
    int hit = 0;
    for (int e0 = 0; e0 < n_experts; e0 += THREADS) {
        int e = e0 + threadIdx.x, sum = 0;
        if (e < n_experts)
            for (int w = 0; w < WARPS; w++) sum += counts[w * n_experts + e];
        int2 mine = {sum, (sum + run.tile_columns - 1) / run.tile_columns}, total;
        int2 at = scan_block(mine, &total, scratch);
        if (e < n_experts) {
            run.expert_slots[e] = sum;
            int place = base.x + at.x;
            if (sum) write_tiles(run, e, place, sum, base.y + at.y, mine.y);
            for (int w = 0; w < WARPS; w++) {
                int c = counts[w * n_experts + e];
                counts[w * n_experts + e] = place;
                place += c;
            }
        }
        base = make_int2(base.x + total.x, base.y + total.y);
        hit += __syncthreads_count(sum > 0);
    }

    for (int s0 = begin; s0 < end; s0 += 32) {
        int s = s0 + lane, e = s < end ? local_expert(run, s) : -1;
        uint32_t peers = __match_any_sync(0xFFFFFFFFu, e);
        int rank = __popc(peers & ((1u << lane) - 1));
        if (e >= 0) run.slots[counts[warp * n_experts + e] + rank] = s;
        __syncwarp();
        if (e >= 0 && rank == 0) counts[warp * n_experts + e] += __popc(peers);
        __syncwarp();
    }

    for (int i = threadIdx.x; i < base.y; i += THREADS) run.done[i] = run.ready[i] = 0;
    if (run.h_amax)
        for (int i = threadIdx.x; i < base.x; i += THREADS) {
            run.h_amax[i] = 0;
            run.h_saturated[i] = 0;
        }
    if (threadIdx.x == 0) *run.state = {run.owner, run.n_tokens, base.y, base.x, hit, 0, 0, 0};
}

/* ---- rows of x ---- */

static __device__ uint32_t block_max(uint32_t v) {
    __shared__ uint32_t warp_max[WARPS];
    v = __reduce_max_sync(0xFFFFFFFFu, v);
    if ((threadIdx.x & 31) == 0) warp_max[threadIdx.x >> 5] = v;
    __syncthreads();
    for (int w = 0; w < WARPS; w++) v = max(v, warp_max[w]);
    return v;
}

static __device__ const void *x_at(const moe4_layer_run &run, int token, int k) {
    size_t i = (size_t)token * run.x_in_ld + (size_t)k;
    return (const char *)run.x_in + i * (run.x_dtype == MOE4_F32 ? 4 : 2);
}

static __device__ uint32_t x_row_amax(const moe4_layer_run &run, int token) {
    uint32_t amax = 0;
    for (int b = threadIdx.x; b < run.w.hidden / 16; b += THREADS) {
        float v[16];
        load_16(v, x_at(run, token, 16 * b), run.x_dtype);
        amax = max(amax, amax_bits_16(v));
    }
    return block_max(amax);
}

static __device__ void round_x_row(const moe4_layer_run &run, int row) {
    int token = row, expert = 0;
    if (run.act == MOE4_ACT_STATIC) { /* a row for each slot: experts have their own input scales */
        token = row / run.top_k;
        expert = local_expert(run, row);
    }
    uint32_t amax = x_row_amax(run, token);
    bool bad = amax >= MOE4_INF_BITS;
    if (threadIdx.x == 0 && (run.act != MOE4_ACT_STATIC || row % run.top_k == 0)) run.x_bad[token] = bad;
    if (expert < 0) {
        if (threadIdx.x == 0) run.x_saturated[row] = 0;
        return;
    }
    float S = 1.f, decode = 1.f;
    if (run.act != MOE4_ACT_W4A16 && !bad)
        S = encode_scale(run.act, run.act == MOE4_ACT_TENSOR ? *run.x_amax : amax, run.w.scale_x, expert, &decode);
    __nv_bfloat16 *out = run.x + (size_t)row * (size_t)(run.w.hidden_units * MOE4_UNIT_K);
    int saturated = 0;
    for (int b0 = 0; b0 < run.w.hidden_units * 4; b0 += THREADS) {
        int b = b0 + threadIdx.x, over = 0;
        if (b < run.w.hidden_units * 4) {
            float v[16];
            fill_16(v, bad ? __uint_as_float(0x7FFFFFFFu) : 0.f);
            if (b < run.w.hidden / 16 && !bad) {
                load_16(v, x_at(run, token, 16 * b), run.x_dtype);
                if (run.act != MOE4_ACT_W4A16) over = round_16(v, S);
            }
            store_bf16_16(out + 16 * b, v);
        }
        saturated += __syncthreads_count(over);
    }
    if (threadIdx.x == 0) {
        run.x_saturated[row] = saturated;
        if (run.x_factor) run.x_factor[row] = decode;
    }
}

static __global__ void __launch_bounds__(THREADS) prepare_kernel(const __grid_constant__ moe4_layer_run run) {
#if __CUDA_ARCH__ == 900
    dependency_launch();
    dependency_wait();
#endif
    if (blockIdx.x == 0)
        dispatch(run);
    else
        round_x_row(run, (int)blockIdx.x - 1);
}

static __global__ void __launch_bounds__(THREADS) amax_kernel(const __grid_constant__ moe4_layer_run run) {
    uint32_t amax = x_row_amax(run, (int)blockIdx.x);
    if (threadIdx.x == 0 && amax < MOE4_INF_BITS) atomicMax(run.x_amax, amax);
}

cudaError_t moe4_cuda_prepare(const moe4_layer_run *run, cudaStream_t stream) {
    int rows = run->x_is_ready ? 0 : run->act == MOE4_ACT_STATIC ? run->n_tokens * run->top_k : run->n_tokens;
    if (run->act == MOE4_ACT_TENSOR && rows) {
        cudaError_t error = cudaMemsetAsync(run->x_amax, 0, sizeof *run->x_amax, stream);
        if (error != cudaSuccess) return error;
        amax_kernel<<<run->n_tokens, THREADS, 0, stream>>>(*run);
    }
    size_t shared_bytes = (size_t)WARPS * (size_t)run->w.n * sizeof(int);
    if (shared_bytes > 40000) {
        cudaError_t error = cudaFuncSetAttribute(prepare_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)shared_bytes);
        if (error != cudaSuccess) return error;
    }
    return moe4_cuda_launch_early(prepare_kernel, dim3((unsigned)(1 + rows)), THREADS, shared_bytes, stream, *run);
}

/* ---- h, as a step of its own ---- */

/* h_amax[n_rows] -> the largest finite one, behind them. */
static __global__ void __launch_bounds__(THREADS) h_amax_kernel(const __grid_constant__ moe4_layer_run run) {
    uint32_t amax = 0;
    for (int i = threadIdx.x; i < run.state->n_slots; i += THREADS)
        if (run.h_amax[i] < MOE4_INF_BITS) amax = max(amax, run.h_amax[i]);
    amax = block_max(amax);
    if (threadIdx.x == 0) run.h_amax[run.n_tokens * run.top_k] = amax;
}

static __global__ void __launch_bounds__(128) round_h_kernel(const __grid_constant__ moe4_layer_run run) {
    int n_tiles = run.state->n_tiles;
    for (int t = blockIdx.x; t < n_tiles; t += gridDim.x) {
        moe4_tile tile = run.tiles[t];
        int blocks = run.w.intermediate_units * 4;
        for (int i = blockIdx.y * 128 + threadIdx.x; i < tile.n * blocks; i += gridDim.y * 128) {
            int row = tile.first + i / blocks;
            uint32_t bits = run.h_amax[run.act == MOE4_ACT_TENSOR ? run.n_tokens * run.top_k : row];
            if (round_h_block(run, row, i % blocks, tile.expert, bits)) atomicAdd(run.h_saturated + row, 1);
        }
    }
}

cudaError_t moe4_cuda_quantize_h(const moe4_layer_run *run, cudaStream_t stream) {
    if (run->act == MOE4_ACT_W4A16) return cudaSuccess;
    if (run->act == MOE4_ACT_TENSOR) h_amax_kernel<<<1, THREADS, 0, stream>>>(*run);
    dim3 grid((unsigned)(run->max_tiles < 512 ? run->max_tiles : 512), 8);
    round_h_kernel<<<grid, 128, 0, stream>>>(*run);
    return cudaGetLastError();
}
