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
#define FEW 128 /* slots, at most THREADS */

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

/* An even split in steps of `step` columns: the first tiles have one more, the last what is left. */
static __device__ void write_tiles(moe4_tile *tiles, int expert, int first, int n, int head, int n_tiles, int step) {
    int steps = (n + step - 1) / step, at = 0;
    for (int i = 0; i < n_tiles; i++) {
        int columns = min((steps / n_tiles + (i < steps % n_tiles)) * step, n - at);
        tiles[head + i] = {expert, first + at, columns, head, n_tiles};
        at += columns;
    }
}

/* n_tiles, n_slots, experts hit */
static __device__ int3 sort_many(const moe4_layer_run &run) {
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
    int hit = 0, prefill_base = 0;
    for (int e0 = 0; e0 < n_experts; e0 += THREADS) {
        int e = e0 + threadIdx.x, sum = 0;
        if (e < n_experts)
            for (int w = 0; w < WARPS; w++) sum += counts[w * n_experts + e];
        bool prefill = run.prefill_from && sum >= run.prefill_from;
        int2 mine = {sum, prefill ? 0 : (sum + run.tile_columns - 1) / run.tile_columns}, total;
        int2 at = scan_block(mine, &total, scratch);
        if (e < n_experts) {
            run.expert_slots[e] = sum;
            int place = base.x + at.x;
            if (mine.y) write_tiles(run.tiles, e, place, sum, base.y + at.y, mine.y, 1);
            for (int w = 0; w < WARPS; w++) {
                int c = counts[w * n_experts + e];
                counts[w * n_experts + e] = place;
                place += c;
            }
        }
        if (run.prefill_from) {
            int2 columns = {0, prefill ? (sum + run.prefill_columns - 1) / run.prefill_columns : 0}, all;
            int head = prefill_base + scan_block(columns, &all, scratch).y;
            if (prefill) write_tiles(run.prefill_tiles, e, base.x + at.x, sum, head, columns.y, 16);
            prefill_base += all.y;
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
    if (run.prefill_from) {
        for (int i = threadIdx.x; i < prefill_base; i += THREADS) run.prefill_done[i] = 0;
        if (threadIdx.x == 0) {
            run.state->n_prefill_tiles = prefill_base;
            run.state->prefill_ticket = 0;
        }
    }
    return make_int3(base.y, base.x, hit);
}

/* The same for few slots: every thread compares its slot with all others, so that nothing waits but for two barriers. */
static __device__ int3 sort_few(const moe4_layer_run &run) {
    __shared__ int expert[FEW], tiles[FEW];
    int n = run.n_tokens * run.top_k, s = threadIdx.x, e = s < n ? local_expert(run, s) : -1;
    for (int i = s; i < run.w.n; i += THREADS) run.expert_slots[i] = 0;
    if (s < n) expert[s] = e;
    __syncthreads();
    int before = 0, same = 0, same_before = 0;
    for (int i = 0; e >= 0 && i < n; i++) {
        int other = expert[i];
        before += other >= 0 && other < e;
        same += other == e;
        same_before += other == e && i < s;
    }
    bool first = e >= 0 && same_before == 0;
    int mine = first ? (same + run.tile_columns - 1) / run.tile_columns : 0;
    if (s < n) tiles[s] = mine;
    if (e >= 0) run.slots[before + same_before] = s;
    if (first) run.expert_slots[e] = same;
    int n_slots = __syncthreads_count(e >= 0), hit = __syncthreads_count(first), head = 0, n_tiles = 0;
    for (int i = 0; i < n; i++) {
        head += expert[i] < e ? tiles[i] : 0;
        n_tiles += tiles[i];
    }
    if (first) write_tiles(run.tiles, e, before, same, head, mine, 1);
    return make_int3(n_tiles, n_slots, hit);
}

static __device__ void dispatch(const moe4_layer_run &run) {
    int3 n = run.n_tokens * run.top_k <= FEW && !run.prefill_from ? sort_few(run) : sort_many(run);
    for (int i = threadIdx.x; i < n.x; i += THREADS) run.done[i] = run.ready[i] = 0;
    if (run.h_amax)
        for (int i = threadIdx.x; i < n.y; i += THREADS) {
            run.h_amax[i] = 0;
            run.h_saturated[i] = 0;
        }
    if (threadIdx.x == 0) { /* all but the ticket, which may be moving already */
        run.state->owner = run.owner;
        run.state->n_tokens = run.n_tokens;
        run.state->n_tiles = n.x;
        run.state->n_slots = n.y;
        run.state->n_experts_hit = n.z;
        run.state->by_rows = run.state->n_summed = 0;
    }
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

/* The largest |x| of a row; v = the thread's first block of it. */
static __device__ uint32_t x_row_amax(const moe4_layer_run &run, int token, float v[16]) {
    uint32_t amax = 0;
    fill_16(v, 0.f);
    if (threadIdx.x < run.w.hidden / 16) load_16(v, x_at(run, token, 16 * threadIdx.x), run.x_dtype);
    amax = amax_bits_16(v);
    for (int b = threadIdx.x + THREADS; b < run.w.hidden / 16; b += THREADS) {
        float other[16];
        load_16(other, x_at(run, token, 16 * b), run.x_dtype);
        amax = max(amax, amax_bits_16(other));
    }
    return block_max(amax);
}

static __device__ void round_x_row(const moe4_layer_run &run, int row) {
    int token = row, expert = 0;
    if (run.act == MOE4_ACT_STATIC) { /* a row for each slot: experts have their own input scales */
        token = row / run.top_k;
        expert = local_expert(run, row);
    }
    float v[16];
    uint32_t amax = x_row_amax(run, token, v);
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
            if (b0) {
                fill_16(v, 0.f);
                if (b < run.w.hidden / 16) load_16(v, x_at(run, token, 16 * b), run.x_dtype);
            }
            if (bad)
                fill_16(v, __uint_as_float(0x7FFFFFFFu));
            else if (run.act != MOE4_ACT_W4A16)
                over = round_16(v, S);
            store_bf16_16(out + 16 * b, v);
        }
        saturated += __syncthreads_count(over);
    }
    if (threadIdx.x == 0) {
        run.x_saturated[row] = saturated;
        if (run.x_factor) run.x_factor[row] = decode;
    }
}

/* This block's share of the marks (kernels.h); block 0, which sorts, has none unless it is alone. */
static __device__ void mark_h(const moe4_layer_run &run) {
    if (!moe4_cuda_marks_h(&run) || (gridDim.x > 1 && blockIdx.x == 0)) return;
    size_t n = (size_t)run.n_tokens * (size_t)run.top_k * (size_t)run.w.intermediate_units * MOE4_UNIT_K / 4;
    size_t blocks = gridDim.x > 1 ? gridDim.x - 1 : 1, block = gridDim.x > 1 ? (size_t)blockIdx.x - 1 : 0;
    for (size_t i = block * THREADS + threadIdx.x; i < n; i += blocks * THREADS)
        ((uint4 *)run.h_wide)[i] = {MOE4_MARK, MOE4_MARK, MOE4_MARK, MOE4_MARK};
}

static __global__ void __launch_bounds__(THREADS) prepare_kernel(const __grid_constant__ moe4_layer_run run) {
#if __CUDA_ARCH__ == 900
    dependency_wait();
#endif
    if (blockIdx.x == 0) {
        if (threadIdx.x == 0) run.state->ticket = 0;
        __threadfence();
        __syncthreads();
    }
#if __CUDA_ARCH__ == 900
    dependency_launch(); /* who starts by this may read the call's inputs and draw tickets, nothing else before it waits */
#endif
    mark_h(run);
    if (blockIdx.x == 0)
        dispatch(run);
    else
        round_x_row(run, (int)blockIdx.x - 1);
}

static __global__ void __launch_bounds__(THREADS) amax_kernel(const __grid_constant__ moe4_layer_run run) {
    float v[16];
    uint32_t amax = x_row_amax(run, (int)blockIdx.x, v);
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
