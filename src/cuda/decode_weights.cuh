/* The warp of the decode kernel that draws tickets and fills its stages with weights. */
#ifndef MOE4_CUDA_DECODE_WEIGHTS_CUH
#define MOE4_CUDA_DECODE_WEIGHTS_CUH

#include "decode_items.cuh"

/* ---- a first look at the routing, so that weights stream while `prepare` still sorts and rounds ---- */

/* counts[expert] from the ids, by the whole block. */
static __device__ void count_slots(const moe4_layer_run &run, int *counts) {
    for (int i = threadIdx.x; i < run.w.n; i += THREADS) counts[i] = 0;
    __syncthreads();
    for (int s = threadIdx.x; s < run.n_tokens * run.top_k; s += THREADS) {
        int e = local_expert(run, s);
        if (e >= 0) atomicAdd(&counts[e], 1);
    }
    __syncthreads();
}

/* The first column tile of the expert that has tile `index`, by a warp; right in `n` where it is the only one. Expert -1 past the last. */
static __device__ moe4_tile find_tile(const moe4_layer_run &run, const int *counts, int index) {
    int lane = threadIdx.x & 31, tiles_before = 0, slots_before = 0;
    for (int e0 = 0; e0 < run.w.n; e0 += 32) {
        int n = e0 + lane < run.w.n ? counts[e0 + lane] : 0, n_tiles = (n + run.tile_columns - 1) / run.tile_columns;
        int tiles = n_tiles, slots = n;
        for (int d = 1; d < 32; d *= 2) {
            int t = __shfl_up_sync(0xFFFFFFFFu, tiles, d), s = __shfl_up_sync(0xFFFFFFFFu, slots, d);
            if (lane >= d) tiles += t, slots += s;
        }
        uint32_t there = __ballot_sync(0xFFFFFFFFu, tiles_before + tiles > index);
        if (there) {
            int at = __ffs(there) - 1;
            n = __shfl_sync(0xFFFFFFFFu, n, at);
            n_tiles = __shfl_sync(0xFFFFFFFFu, n_tiles, at);
            return {e0 + at, slots_before + __shfl_sync(0xFFFFFFFFu, slots, at) - n, n,
                    tiles_before + __shfl_sync(0xFFFFFFFFu, tiles, at) - n_tiles, n_tiles};
        }
        tiles_before += __shfl_sync(0xFFFFFFFFu, tiles, 31);
        slots_before += __shfl_sync(0xFFFFFFFFu, slots, 31);
    }
    return {-1, 0, 0, 0, 0};
}

/* ---- a warp: tickets and weights ---- */

template <int NT>
static __device__ __forceinline__ void load_stage(const operands &o, int u, uint32_t stage, uint32_t full, uint64_t policy) {
    using S = shape<NT>;
    uint32_t bytes = (uint32_t)min(S::units, o.units - u) * MOE4_UNIT_BYTES;
    mbarrier_arrive_expect(full, (uint32_t)o.tiles * bytes);
#pragma unroll 1
    for (int r = 0; r < o.tiles; r++)
        bulk_load_streaming(stage + (uint32_t)(r * S::units * MOE4_UNIT_BYTES),
                            o.weights + ((size_t)r * (size_t)o.units + (size_t)u) * MOE4_UNIT_BYTES, bytes, full, policy);
}

/* A ticket on its way to a work item: the load of its expert's first tile passes while stages load. */
struct drawn {
    int phase, local, items; /* within the phase; items of a column tile */
    moe4_tile head;
};

/* The tickets of a call. */
template <class S> struct ticket_plan {
    int n_gate_up, n_round, n_down; /* items; n_gate_up -1: not known yet */

    __device__ void read(const moe4_layer_run &run, int phases) {
        dependency_wait();
        int n_tiles = run.state->n_tiles;
        n_gate_up = phases & MOE4_PHASE_GATE_UP ? n_tiles * items_of<S>(run.w.gate_up_tiles) : 0;
        n_round = phases == (MOE4_PHASE_GATE_UP | MOE4_PHASE_DOWN) && run.act != MOE4_ACT_W4A16 ? n_tiles : 0;
        n_down = phases & MOE4_PHASE_DOWN ? n_tiles * items_of<S>(run.w.down_tiles) : 0;
    }

    __device__ drawn look_up(const moe4_layer_run &run, int ticket) const {
        drawn d = {0, ticket, 1, {}};
        if (ticket < n_gate_up) {
            d.phase = MOE4_PHASE_GATE_UP;
            d.items = items_of<S>(run.w.gate_up_tiles);
        } else if ((d.local -= n_gate_up) < n_round) {
            d.phase = PHASE_ROUND;
        } else if ((d.local -= n_round) < n_down) {
            d.phase = MOE4_PHASE_DOWN;
            d.items = items_of<S>(run.w.down_tiles);
        }
        if (d.phase) d.head = run.tiles[d.local / d.items];
        return d;
    }
};

template <class S> static __device__ work_item place_drawn(const moe4_layer_run &run, const drawn &d) {
    work_item item;
    item.phase = d.phase;
    if (!d.phase) return item;
    if (d.phase == PHASE_ROUND) {
        item.tile = d.head;
        item.index = d.local;
        return item;
    }
    tile_place(run, d.head, d.local, d.items, &item.tile, &item.index, &item.row_tile);
    item.row_tile *= S::item_tiles;
    return item;
}

/* Before anything of `prepare` may be read: the first stages of what the first ticket will turn out to be, if it is of the first phase.
 * Their number; *d is what the plan would find. */
template <int NT>
static __device__ int load_early(drawn *d, const moe4_layer_run &run, int phases, const barriers &bar, uint32_t stages, const int *counts,
                                 int ticket, uint64_t policy) {
    using S = shape<NT>;
    d->phase = phases & MOE4_PHASE_GATE_UP ? MOE4_PHASE_GATE_UP : MOE4_PHASE_DOWN;
    d->items = items_of<S>(d->phase == MOE4_PHASE_DOWN ? run.w.down_tiles : run.w.gate_up_tiles);
    d->local = ticket;
    d->head = find_tile(run, counts, ticket / d->items);
    if (d->head.expert < 0) return 0;
    int row_tile = (ticket - d->head.head * d->items) / d->head.n_tiles;
    operands o = item_operands<S>(run, d->phase, d->head.expert, row_tile * S::item_tiles);
    int n = min(S::n_stages, (o.units + S::units - 1) / S::units);
    if ((threadIdx.x & 31) == 0)
#pragma unroll 1
        for (int i = 0; i < n; i++) load_stage<NT>(o, i * S::units, stages + (uint32_t)(i * S::stage_bytes), bar.full(i), policy);
    return n;
}

template <int NT>
static __device__ void load_weights(const moe4_layer_run &run, int phases, block_shared *s, uint32_t stages, const int *counts) {
    using S = shape<NT>;
    barriers bar(s);
    int lane = threadIdx.x & 31, ticket = 0, loaded = 0; /* stages already under way */
    uint64_t policy = policy_evict_first();
    drawn next;
    if (lane == 0) ticket = atomicAdd(&run.state->ticket, 1);
    if (counts) loaded = load_early<NT>(&next, run, phases, bar, stages, counts, __shfl_sync(0xFFFFFFFFu, ticket, 0), policy);
    for (int i = 0; i < N_ROUNDS * FINISH_WARPS; i++) /* the counts have been read: partial sums may take their place */
        mbarrier_arrive(bar.partial_empty(i / FINISH_WARPS));
    if (lane) return;
    ticket_plan<S> plan = {-1, -1, -1};
    if (!loaded || next.head.n_tiles > 1) {
        plan.read(run, phases);
        next = plan.look_up(run, ticket);
    }
    ring stage = {0, 0};
    item_ring at = {0};
    for (;;) {
        work_item item = place_drawn<S>(run, next);
        mbarrier_wait(bar.item_empty(at.i()), at.parity() ^ 1);
        s->item[at.i()] = item;
        mbarrier_arrive(bar.item_full(at.i()));
        at.n++;
        if (!item.phase) return;
        ticket = atomicAdd(&run.state->ticket, 1);
        if (item.phase == PHASE_ROUND) {
            next = plan.look_up(run, ticket);
            continue;
        }
        operands o = item_operands<S>(run, item.phase, item.tile.expert, item.row_tile);
#pragma unroll 1
        for (int u = 0; u < o.units; u += S::units) {
            if (loaded) {
                loaded--;
            } else {
                mbarrier_wait(bar.empty(stage.i), stage.parity ^ 1);
                load_stage<NT>(o, u, stages + (uint32_t)(stage.i * S::stage_bytes), bar.full(stage.i), policy);
            }
            stage.next(S::n_stages);
            if (u) continue;
            if (plan.n_gate_up < 0) plan.read(run, phases);
            next = plan.look_up(run, ticket);
        }
    }
}

#endif
