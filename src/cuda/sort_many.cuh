/* Many slots sorted by expert: each sorting block counts all of them for itself and places its own. */
#ifndef MOE4_CUDA_SORT_MANY_CUH
#define MOE4_CUDA_SORT_MANY_CUH

#include "sort_slots.cuh"

/* Of each expert, in shared memory. */
struct expert_places {
    uint4 *by_warp; /* slots that each warp of this block places, a byte each */
    int *n;         /* slots */
    int *first;     /* of its sorted slots */
    int *next;      /* where its first slot of this block goes */
    int *head[2];   /* first tile of decode's and of prefill's, also for experts that have none; [n]: all */
};

static __host__ __device__ __forceinline__ size_t expert_places_bytes(int n) {
    return (size_t)n * sizeof(uint4) + (size_t)(5 * n + 2) * sizeof(int);
}

static __device__ expert_places carve_places(uint4 *memory, int n) {
    int *numbers = (int *)(memory + n);
    return {memory, numbers, numbers + n, numbers + 2 * n, {numbers + 3 * n, numbers + 4 * n + 1}};
}
static_assert(SORT_WARPS == sizeof(uint4), "a byte for each warp");

/* counts[e] += slots begin .. end - 1 of expert e, by the block; `after` gets those from `middle` on. AT_ONCE loads of a thread are under
 * way together; all warps issue them, whether slots are there or not. */
template <int AT_ONCE>
static __device__ void count_slots(const moe4_layer_run &run, int *counts, int begin, int middle, int end, int *after) {
    int e[AT_ONCE];
    for (int s0 = begin + (int)threadIdx.x; s0 < end; s0 += SORT_THREADS * AT_ONCE) {
#pragma unroll
        for (int i = 0; i < AT_ONCE; i++) {
            int s = s0 + i * SORT_THREADS;
            e[i] = s < end ? local_expert(run, s) : -1;
        }
#pragma unroll
        for (int i = 0; i < AT_ONCE; i++)
            if (e[i] >= 0) atomicAdd((s0 + i * SORT_THREADS < middle ? counts : after) + e[i], 1);
    }
}

static __device__ void count_slots(const moe4_layer_run &run, int *counts, int begin, int middle, int end, int *after) {
    if (end - begin <= SORT_THREADS)
        count_slots<1>(run, counts, begin, middle, end, after);
    else if (end - begin <= 4 * SORT_THREADS)
        count_slots<4>(run, counts, begin, middle, end, after);
    else
        count_slots<8>(run, counts, begin, middle, end, after);
}

/* Where there are very many slots, other blocks have counted shares of them before. */
static __global__ void __launch_bounds__(SORT_THREADS) count_kernel(const __grid_constant__ moe4_layer_run run) {
    extern __shared__ int memory[];
#if __CUDA_ARCH__ == 900
    dependency_wait();
    dependency_launch();
#endif
    int share = moe4_cuda_share_slots(&run), begin = (int)blockIdx.x * share, n = run.n_tokens * run.top_k;
    for (int e = threadIdx.x; e < run.w.n; e += SORT_THREADS) memory[e] = 0;
    __syncthreads();
    count_slots(run, memory, begin, n, min(n, begin + share), memory);
    __syncthreads();
    for (int e = threadIdx.x; e < run.w.n; e += SORT_THREADS) run.share_counts[(size_t)blockIdx.x * (size_t)run.w.n + e] = memory[e];
}

/* p.n = all slots of each expert, p.next = those before `begin`. */
static __device__ void count_all(const moe4_layer_run &run, const expert_places &p, int begin) {
    int n = run.n_tokens * run.top_k, share = moe4_cuda_share_slots(&run), n_shares = share ? (n + share - 1) / share : 0;
    int before = share ? begin / share : 0;
    for (int e = threadIdx.x; e < run.w.n; e += SORT_THREADS) {
        int all = 0, next = 0;
#pragma unroll 8
        for (int i = 0; i < n_shares; i++) {
            int c = run.share_counts[(size_t)i * (size_t)run.w.n + e];
            all += c;
            next += i < before ? c : 0;
        }
        p.n[e] = all;
        p.next[e] = next;
        p.by_warp[e] = make_uint4(0, 0, 0, 0);
    }
    __syncthreads();
    count_slots(run, p.next, before * share, begin, share ? begin : n, p.n);
    __syncthreads();
    if (share) return;
    for (int e = threadIdx.x; e < run.w.n; e += SORT_THREADS) p.n[e] += p.next[e];
}

static __device__ bool takes_prefill(const moe4_layer_run &run, int n_slots) {
    return run.prefill_from && n_slots >= run.prefill_from;
}

/* Where each expert's slots and tiles begin. */
static __device__ sums place_experts(const moe4_layer_run &run, const expert_places &p) {
    __shared__ sums scratch[SORT_WARPS];
    sums all = {0, 0, 0, 0};
    for (int e0 = 0; e0 < run.w.n; e0 += SORT_THREADS) {
        int e = e0 + threadIdx.x, n = e < run.w.n ? p.n[e] : 0, width = run.tile_columns;
        bool prefill = takes_prefill(run, n);
        if (prefill) width = run.prefill_columns;
        int tiles = (n + width - 1) / width;
        sums before = scan_block({n, prefill ? 0 : tiles, prefill ? tiles : 0, n > 0}, run.w.n - e0, &all, scratch);
        if (e < run.w.n) {
            p.first[e] = before.slots;
            p.next[e] += before.slots;
            p.head[0][e] = before.tiles;
            p.head[1][e] = before.prefill_tiles;
        }
        __syncthreads(); /* scratch has been read */
    }
    if (threadIdx.x == 0) {
        p.head[0][run.w.n] = all.tiles;
        p.head[1][run.w.n] = all.prefill_tiles;
    }
    __syncthreads();
    return all;
}

/* Which column of which prefill tile slot `at` of expert e's is. */
static __device__ moe4_prefill_place find_place(const moe4_layer_run &run, const expert_places &p, int e, int at) {
    int n_tiles = p.head[1][e + 1] - p.head[1][e];
    if (!n_tiles) return {-1, 0, 0, 0};
    int i = tile_of<PREFILL_STEP>(p.n[e], n_tiles, at);
    moe4_tile tile = split_tile<PREFILL_STEP>(e, p.first[e], p.n[e], p.head[1][e], n_tiles, i);
    return {prefill_tile_column(tile), (uint8_t)(p.first[e] + at - tile.first), (uint8_t)(prefill_columns(tile.n) / 16),
            (uint16_t)(run.n_windows ? tile.first / run.window_slots : 0)};
}

/* Of what warps count, a byte each, those before `warp`. */
static __device__ int sum_before(uint4 by_warp, int warp) {
    uint32_t word[4] = {by_warp.x, by_warp.y, by_warp.z, by_warp.w}, sum = 0;
#pragma unroll
    for (int i = 0; i < 4; i++) {
        int n = min(max(warp - 4 * i, 0), 4);
        sum = __dp4a(n == 4 ? word[i] : word[i] & ((1u << 8 * n) - 1), 0x01010101u, sum);
    }
    return (int)sum;
}

/* The block's own slots, one a thread. */
static __device__ void place_slots(const moe4_layer_run &run, const expert_places &p, int begin, int end) {
    int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, s = begin + (int)threadIdx.x, e = s < end ? local_expert(run, s) : -1, at = 0;
    uint32_t peers = __match_any_sync(0xFFFFFFFFu, e);
    int rank = __popc(peers & ((1u << lane) - 1));
    if (e >= 0 && rank == 0) ((uint8_t *)(p.by_warp + e))[warp] = (uint8_t)__popc(peers);
    __syncthreads();
    if (e >= 0) {
        at = p.next[e] + sum_before(p.by_warp[e], warp) + rank;
        run.slots[at] = s;
    }
    if (run.prefill_from && s < end) run.x_places[s] = e < 0 ? moe4_prefill_place{-1, 0, 0, 0} : find_place(run, p, e, at - p.first[e]);
}

/* The expert whose tile `i` of a list is, or whose sorted slot. */
static __device__ int tile_expert(const int *head, int n, int i) {
    int first = 0, end = n; /* head[first] <= i, and i is before the end */
    while (end - first > 1) {
        int middle = (first + end) / 2;
        if (head[middle] <= i)
            first = middle;
        else
            end = middle;
    }
    return first;
}

template <int STEP>
static __device__ void list_tiles(const int *head, moe4_tile *tiles, const moe4_layer_run &run, const expert_places &p, int thread,
                                  int n_threads) {
    for (int i = thread; i < head[run.w.n]; i += n_threads) {
        int e = tile_expert(head, run.w.n, i);
        tiles[i] = split_tile<STEP>(e, p.first[e], p.n[e], head[e], head[e + 1] - head[e], i - head[e]);
    }
}

/* The first prefill tile whose first slot is at `slot` of the sorted ones or later. */
static __device__ int first_tile_from(const moe4_layer_run &run, const expert_places &p, int slot, int n_slots) {
    if (slot >= n_slots) return p.head[1][run.w.n];
    int e = tile_expert(p.first, run.w.n, slot), head = p.head[1][e], n_tiles = p.head[1][e + 1] - head;
    if (!n_tiles) return head;
    int i = tile_of<PREFILL_STEP>(p.n[e], n_tiles, slot - p.first[e]);
    return head + i + (split_tile<PREFILL_STEP>(e, p.first[e], p.n[e], head, n_tiles, i).first < slot);
}

/* The prefill tiles again, window by window: an expert's in one window are neighbours there. */
static __device__ void list_windows(const moe4_layer_run &run, const expert_places &p, int n_slots, int thread, int n_threads) {
    __shared__ int begin[MOE4_MAX_WINDOWS + 1];
    if ((int)threadIdx.x <= run.n_windows)
        begin[threadIdx.x] =
            (int)threadIdx.x < run.n_windows ? first_tile_from(run, p, (int)threadIdx.x * run.window_slots, n_slots) : p.head[1][run.w.n];
    __syncthreads();
    for (int i = thread; i < p.head[1][run.w.n]; i += n_threads) {
        int e = tile_expert(p.head[1], run.w.n, i), head = p.head[1][e], end = p.head[1][e + 1];
        moe4_tile tile = split_tile<PREFILL_STEP>(e, p.first[e], p.n[e], head, end - head, i - head);
        int w = tile.first / run.window_slots, first = max(head, begin[w]);
        tile.head = first - begin[w];
        tile.n_tiles = min(end, begin[w + 1]) - first;
        run.window_tiles[(size_t)w * (size_t)run.max_prefill_tiles + (size_t)(i - begin[w])] = tile;
    }
    if (thread < run.n_windows) {
        run.window_state[thread].n_prefill_tiles = begin[thread + 1] - begin[thread];
        run.window_state[thread].prefill_ticket = 0;
    }
}

/* A block's share of the slots, and of what is everybody's. */
static __device__ void sort_many(const moe4_layer_run &run, int block, int blocks) {
    extern __shared__ uint4 places[];
    expert_places p = carve_places(places, run.w.n);
    int thread = block * SORT_THREADS + (int)threadIdx.x, n_threads = blocks * SORT_THREADS;
    int other = (thread + n_threads / 2) % n_threads; /* so that both lists are made at the same time */
    int64_t n = (int64_t)run.n_tokens * run.top_k;
    int begin = (int)(n * block / blocks), end = (int)(n * (block + 1) / blocks);
    count_all(run, p, begin);
    sums all = place_experts(run, p);
    place_slots(run, p, begin, end);
    list_tiles<DECODE_STEP>(p.head[0], run.tiles, run, p, thread, n_threads);
    begin_run(run, thread, n_threads, all.tiles, all.slots, all.hit);
    for (int e = thread; e < run.w.n; e += n_threads) run.expert_slots[e] = p.n[e];
    if (!run.prefill_from) return;
    list_tiles<PREFILL_STEP>(p.head[1], run.prefill_tiles, run, p, other, n_threads);
    if (run.n_windows) list_windows(run, p, all.slots, thread, n_threads);
    begin_prefill(run, thread, n_threads, all.prefill_tiles, all.slots);
    if (thread == 0) {
        run.state->n_prefill_tiles = all.prefill_tiles;
        run.state->prefill_ticket = run.state->rounds_posted = run.state->rounds_taken = 0;
    }
}

#endif
