/* The slots of a batch sorted by expert, stable, and the tiles that the products take: few slots by one block here, many by several in
 * sort_many.cuh. Nothing depends on timing, and blocks wait for none. */
#ifndef MOE4_CUDA_SORT_SLOTS_CUH
#define MOE4_CUDA_SORT_SLOTS_CUH

#include "prefill.cuh"
#include "slots.cuh"

#define SORT_THREADS 512
#define SORT_WARPS (SORT_THREADS / 32)
#define SORT_FEW 128 /* slots, at most SORT_THREADS */

/* Of experts: slots, tiles of decode and of prefill, experts hit. */
struct sums {
    int slots, tiles, prefill_tiles, hit;
    __device__ __forceinline__ void add(const sums &s) {
        slots += s.slots;
        tiles += s.tiles;
        prefill_tiles += s.prefill_tiles;
        hit += s.hit;
    }
};

/* What comes before this thread's v in the block and before the block; *total += all of it. The first n threads have something. */
static __device__ sums scan_block(sums v, int n, sums *total, sums *scratch) {
    int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
    sums before = *total, own = v;
    for (int d = 1; d < 32; d *= 2) {
        sums x = {__shfl_up_sync(0xFFFFFFFFu, v.slots, d), __shfl_up_sync(0xFFFFFFFFu, v.tiles, d),
                  __shfl_up_sync(0xFFFFFFFFu, v.prefill_tiles, d), __shfl_up_sync(0xFFFFFFFFu, v.hit, d)};
        if (lane >= d) v.add(x);
    }
    if (lane == 31) scratch[warp] = v;
    __syncthreads();
#pragma unroll 1
    for (int w = 0; w < SORT_WARPS && 32 * w < n; w++) {
        if (w < warp) before.add(scratch[w]);
        total->add(scratch[w]);
    }
    before.add({v.slots - own.slots, v.tiles - own.tiles, v.prefill_tiles - own.prefill_tiles, 0});
    return before;
}

/* The tile of column `at`. */
template <int STEP> static __device__ int tile_of(int n, int n_tiles, int at) {
    if (n_tiles == 1) return 0;
    int steps = (n + STEP - 1) / STEP, base = steps / n_tiles, rest = steps % n_tiles, step = at / STEP;
    return step < rest * (base + 1) ? step / (base + 1) : rest + (step - rest * (base + 1)) / base;
}

/* What is the run's rather than an expert's, and all counters that the products begin with; by all of `n_threads`. Thread 0 has the numbers
 * of tiles and of experts, all have that of slots. */
static __device__ void begin_run(const moe4_layer_run &run, int thread, int n_threads, int n_tiles, int n_slots, int n_hit) {
    for (int i = thread; i < run.max_tiles; i += n_threads) run.done[i] = run.ready[i] = 0;
    if (run.h_amax)
        for (int i = thread; i < n_slots; i += n_threads) {
            run.h_amax[i] = 0;
            run.h_saturated[i] = 0;
        }
    if (thread == 0) { /* all but the ticket, which may be moving already */
        run.state->owner = run.owner;
        run.state->n_tokens = run.n_tokens;
        run.state->n_tiles = n_tiles;
        run.state->n_slots = n_slots;
        run.state->n_experts_hit = n_hit;
        run.state->by_rows = run.state->n_summed = 0;
    }
}

/* ---- few slots: one block, where every thread compares its slot with all others, so that nothing waits but for two barriers ---- */

static __device__ void sort_few(const moe4_layer_run &run) {
    __shared__ int expert[SORT_FEW], tiles[SORT_FEW];
    int n = run.n_tokens * run.top_k, s = threadIdx.x, e = s < n ? local_expert(run, s) : -1;
    for (int i = s; i < run.w.n; i += SORT_THREADS) run.expert_slots[i] = 0;
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
    if (first || s == 0) /* who needs them: the other warps have no instructions here */
        for (int i = 0; i < n; i++) {
            head += expert[i] < e ? tiles[i] : 0;
            n_tiles += tiles[i];
        }
    for (int i = 0; i < mine; i++) run.tiles[head + i] = split_tile<DECODE_STEP>(e, before, same, head, mine, i);
    begin_run(run, (int)threadIdx.x, SORT_THREADS, n_tiles, n_slots, hit);
}

#endif
