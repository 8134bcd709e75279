/* How a block of the prefill kernel comes by its items, and tells the others what it has ended. */
#ifndef MOE4_CUDA_PREFILL_QUEUE_CUH
#define MOE4_CUDA_PREFILL_QUEUE_CUH

#include "prefill_items.cuh"

/* Rounding: who ends the last gate/up item of a tile posts its rows, so many at a time, and whoever draws next takes them before anything
 * else; nothing waits for them but down. A tile may be read when its count is all of gate/up and all of those parts. */
template <class S> static __device__ __forceinline__ int round_parts(const moe4_tile &tile) {
    return (tile.n + S::round_rows - 1) / S::round_rows;
}

template <class S> static __device__ __forceinline__ void post_rounds(const moe4_layer_run &run, int tile_index, int parts) {
    int *to = run.prefill_rounds + atomicAdd(&run.state->rounds_posted, parts);
    for (int i = 0; i < parts; i++) store_release(to + i, 1 + tile_index * MOE4_MOST_ROUND_PARTS + i);
}

template <class S> static __device__ __forceinline__ bool take_round(const moe4_layer_run &run, prefill_item *item) {
    int taken = load_relaxed_4(&run.state->rounds_taken), part;
    if (taken >= load_relaxed_4(&run.state->rounds_posted)) return false;
    if (atomicCAS(&run.state->rounds_taken, taken, taken + 1) != taken) return false; /* the next time */
    while ((part = load_acquire(run.prefill_rounds + taken)) == 0) {
    }
    item->phase = PREFILL_ROUND;
    item->index = (part - 1) / MOE4_MOST_ROUND_PARTS;
    item->tile = run.prefill_tiles[item->index];
    item->row_tile = (part - 1) % MOE4_MOST_ROUND_PARTS * S::round_rows; /* the first of its rows */
    return true;
}

/* The items that a block has been given and has not ended. */
template <class S> struct item_queue {
    prefill_ring at, end; /* the next to be placed, and to end */
    int n;

    __device__ __forceinline__ bool has_ended(prefill_shared<S> *s) const {
        return n && mbarrier_test(smem_address(&s->item_empty[end.i]), end.parity);
    }
    /* Waits for the first one's end; the other blocks learn what they may read. */
    __device__ __forceinline__ void finish(const moe4_layer_run &run, prefill_shared<S> *s) {
        mbarrier_wait(smem_address(&s->item_empty[end.i]), end.parity);
        const prefill_item &item = s->item[end.i];
        int phase = item.phase, n_tiles = item.n_tiles, index = item.index, parts = round_parts<S>(item.tile);
        end.next(PREFILL_ITEMS);
        n--;
        if (phase == MOE4_PHASE_DOWN) return;
        fence_proxy_async(); /* h will be read by bulk copies */
        if (phase == PREFILL_ROUND)
            add_release(run.prefill_done + index, 1);
        else if (!S::rounds)
            add_release(run.prefill_done + index, n_tiles);
        else if (add_acq_rel(run.prefill_done + index, n_tiles) + n_tiles == run.w.gate_up_tiles)
            post_rounds<S>(run, index, parts);
    }
    /* Waits afterwards until there is room for the next: so what the item before has made is told as soon as it ends. */
    __device__ __forceinline__ void place(const moe4_layer_run &run, prefill_shared<S> *s, const prefill_item &item) {
        s->item[at.i] = item;
        mbarrier_arrive(smem_address(&s->item_full[at.i]));
        at.next(PREFILL_ITEMS);
        n++;
        while (n == PREFILL_ITEMS) finish(run, s);
    }
    /* The consumers end. */
    __device__ __forceinline__ void place_last(const moe4_layer_run &run, prefill_shared<S> *s) {
        s->item[at.i].phase = 0;
        mbarrier_arrive(smem_address(&s->item_full[at.i]));
        while (n) finish(run, s);
    }
};

/* One thread: draws tickets, one when it is wanted, so that what it looks up and waits for is there when the item before ends. It also
 * tells when gate/up is done, so that no warpgroup waits until its stores have arrived; while it waits for others, others may wait for
 * that. */
template <class S> static __device__ __forceinline__ void draw_items(const moe4_layer_run &run, int phases, prefill_shared<S> *s) {
    item_queue<S> queue = {{0, 0}, {0, 0}, 0};
    for (uint32_t parity = 0;; parity ^= 1) {
        prefill_item item, part;
        mbarrier_wait(smem_address(&s->wanted), parity);
        while (S::rounds && take_round<S>(run, &part)) queue.place(run, s, part);
        item = place_item<S>(run, phases, atomicAdd(&run.state->prefill_ticket, 1));
        if (item.phase == MOE4_PHASE_DOWN && phases & MOE4_PHASE_GATE_UP) {
            int all = run.w.gate_up_tiles + (S::rounds ? round_parts<S>(item.tile) : 0);
            while (load_acquire(run.prefill_done + item.index) < all) {
                if (queue.has_ended(s))
                    queue.finish(run, s);
                else if (S::rounds && take_round<S>(run, &part))
                    queue.place(run, s, part);
                else
                    __nanosleep(32);
            }
        }
        if (!item.phase) break;
        queue.place(run, s, item);
    }
    queue.place_last(run, s);
}

#endif
