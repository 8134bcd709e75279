/* Which local expert a slot goes to, and which row of x it reads. */
#ifndef MOE4_CUDA_SLOTS_CUH
#define MOE4_CUDA_SLOTS_CUH

#include "kernels.h"

/* By id; -1: another rank's, or none. */
static __device__ __forceinline__ int local_expert(const moe4_layer_run &run, int slot) {
    if (!run.ids) return 0;
    int64_t id = run.ids_are_64bit ? ((const int64_t *)run.ids)[slot] : ((const int32_t *)run.ids)[slot];
    return id >= run.first_expert && id < run.first_expert + run.w.n ? (int)(id - run.first_expert) : -1;
}

/* Of any kind, once the slots are listed. */
static __device__ __forceinline__ int slot_expert(const moe4_layer_run &run, int slot) {
    switch (run.slots_are) {
    case MOE4_SLOTS_DIAGONAL: return slot % run.top_k;
    case MOE4_SLOTS_BATCHED: return slot % run.max_rows < run.expert_slots[slot / run.max_rows] ? slot / run.max_rows : -1;
    case MOE4_SLOTS_SORTED: {
        if (slot < run.row_start[0] || slot >= run.row_start[run.w.n]) return -1;
        int first = 0, end = run.w.n; /* row_start[first] <= slot < row_start[end] */
        while (end - first > 1) {
            int middle = (first + end) / 2;
            if (run.row_start[middle] <= slot)
                first = middle;
            else
                end = middle;
        }
        return first;
    }
    default: return local_expert(run, slot);
    }
}

static __device__ __forceinline__ bool x_is_by_slot(const moe4_layer_run &run) {
    return run.act == MOE4_ACT_STATIC || run.x_by_slot;
}

/* The row of x that a slot reads. */
static __device__ __forceinline__ int x_row(const moe4_layer_run &run, int slot) {
    return x_is_by_slot(run) ? slot : slot / run.top_k;
}

/* The prefill kernel's counters, by all of n_threads. */
static __device__ __forceinline__ void begin_prefill(const moe4_layer_run &run, int thread, int n_threads, int n_tiles, int n_slots) {
    for (int i = thread; i < n_tiles; i += n_threads) run.prefill_done[i] = 0;
    if (run.prefill_rounds)
        for (int i = thread; i < (int)moe4_prefill_parts((size_t)n_slots, (size_t)n_tiles); i += n_threads) run.prefill_rounds[i] = 0;
}

#define DECODE_STEP 1 /* tiles are split evenly in steps of so many columns */
#define PREFILL_STEP 16

/* Tile i of an expert's: the first ones have a step more than the others, the last what is left. */
template <int STEP> static __device__ moe4_tile split_tile(int expert, int first, int n, int head, int n_tiles, int i) {
    if (n_tiles == 1) return {expert, first, n, head, 1}; /* mostly, and divisions take long */
    int steps = (n + STEP - 1) / STEP, base = steps / n_tiles, rest = steps % n_tiles;
    int at = (i * base + min(i, rest)) * STEP, columns = min((base + (i < rest)) * STEP, n - at);
    return {expert, first + at, columns, head, n_tiles};
}

#endif
