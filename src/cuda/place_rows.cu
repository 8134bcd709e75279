/* Rows that stand with their experts, as a dispatcher brings them: what the sort is for slots by id. One block; offsets and counts are the
 * device's and may change between replays of a graph, so that whatever they hold must do no harm. */
#include "nvfp4_layout.h"
#include "slots.cuh"

#define THREADS 512
#define WARPS (THREADS / 32)

struct sum {
    static __device__ int of(int a, int b) { return a + b; }
};
struct most {
    static __device__ int of(int a, int b) { return max(a, b); }
};

/* Inclusive scan of numbers from 0 on over the block; the last to all. */
template <class Op> static __device__ int scan_block(int v, int *last) {
    __shared__ int warp_last[WARPS];
    int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, before = 0;
    for (int d = 1; d < 32; d *= 2) {
        int other = __shfl_up_sync(0xFFFFFFFFu, v, d);
        if (lane >= d) v = Op::of(v, other);
    }
    __syncthreads();
    if (lane == 31) warp_last[warp] = v;
    __syncthreads();
    for (int w = 0; w < warp; w++) before = Op::of(before, warp_last[w]);
    *last = before;
    for (int w = warp; w < WARPS; w++) *last = Op::of(*last, warp_last[w]);
    return Op::of(v, before);
}

/* row_start[0 .. n] = the offsets from 0 on, none before its predecessor, none past the rows. */
static __device__ void settle_offsets(const moe4_layer_run &run) {
    int reached = 0;
    for (int e0 = 0; e0 <= run.w.n; e0 += THREADS) {
        int e = e0 + threadIdx.x, last;
        int start = max(reached, scan_block<most>(e && e <= run.w.n ? min(max(run.given[e], 0), run.n_tokens) : 0, &last));
        if (e <= run.w.n) run.row_start[e] = start;
        reached = max(reached, last);
    }
    __syncthreads();
}

static __device__ int count_rows(const moe4_layer_run &run, int e) {
    if (run.slots_are == MOE4_SLOTS_SORTED) return run.row_start[e + 1] - run.row_start[e];
    if (run.slots_are == MOE4_SLOTS_BATCHED) return min(max(run.given[e], 0), run.max_rows);
    return run.n_tokens; /* DIAGONAL; or by id, where one expert has all */
}

static __device__ int slot_of(const moe4_layer_run &run, int e, int i) {
    if (run.slots_are == MOE4_SLOTS_SORTED) return run.row_start[e] + i;
    if (run.slots_are == MOE4_SLOTS_BATCHED) return e * run.max_rows + i;
    return i * run.top_k + e;
}

template <int STEP> static __device__ void list_tiles(moe4_tile *tiles, int e, int first, int n, int head, int n_tiles) {
    for (int i = 0; i < n_tiles; i++) tiles[head + i] = split_tile<STEP>(e, first, n, head, n_tiles, i);
}

static __global__ void __launch_bounds__(THREADS) place_kernel(const __grid_constant__ moe4_layer_run run) {
    __shared__ int first[MOE4_MAX_DEVICE_EXPERTS];
    int n_slots = 0, n_tiles = 0, n_prefill_tiles = 0, hit = 0, lane = threadIdx.x & 31;
    if (run.slots_are == MOE4_SLOTS_SORTED) settle_offsets(run);
    for (int e0 = 0; e0 < run.w.n; e0 += THREADS) {
        int e = e0 + threadIdx.x, slots, tiles;
        int n = e < run.w.n ? count_rows(run, e) : 0;
        bool prefill = run.prefill_from && n >= run.prefill_from;
        int mine = prefill ? 0 : (n + run.tile_columns - 1) / run.tile_columns;
        int at = n_slots + scan_block<sum>(n, &slots) - n, head = n_tiles + scan_block<sum>(mine, &tiles) - mine;
        if (e < run.w.n) {
            run.expert_slots[e] = n;
            first[e] = at;
            list_tiles<DECODE_STEP>(run.tiles, e, at, n, head, mine);
        }
        n_slots += slots;
        n_tiles += tiles;
        if (run.prefill_from) {
            mine = prefill ? (n + run.prefill_columns - 1) / run.prefill_columns : 0;
            head = n_prefill_tiles + scan_block<sum>(mine, &tiles) - mine;
            list_tiles<PREFILL_STEP>(run.prefill_tiles, e, at, n, head, mine);
            n_prefill_tiles += tiles;
        }
        hit += __syncthreads_count(n > 0);
    }
    for (int e = threadIdx.x >> 5; e < run.w.n; e += WARPS) {
        int n = run.expert_slots[e];
        for (int i = lane; i < n; i += 32) run.slots[first[e] + i] = slot_of(run, e, i);
    }
    for (int i = threadIdx.x; i < n_tiles; i += THREADS) run.done[i] = run.ready[i] = 0;
    if (run.prefill_from) begin_prefill(run, (int)threadIdx.x, THREADS, n_prefill_tiles, n_slots);
    if (run.h_amax)
        for (int i = threadIdx.x; i < n_slots; i += THREADS) {
            run.h_amax[i] = 0;
            run.h_saturated[i] = 0;
        }
    if (threadIdx.x == 0) {
        int by_rows = run.slots_are != MOE4_SLOTS_BY_ID;
        *run.state = {run.owner, run.n_tokens, n_tiles, n_slots, hit, 0, by_rows, run.n_summed, n_prefill_tiles, 0, 0, 0};
    }
}

cudaError_t moe4_cuda_place_rows(const moe4_layer_run *run, cudaStream_t stream) {
    place_kernel<<<1, THREADS, 0, stream>>>(*run);
    return cudaGetLastError();
}
