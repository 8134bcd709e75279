/* The work items of the prefill kernel, and the warps that feed its consumers: one copies activations into a ring of stages, two copy
 * weights and look up what the end of an item needs. prefill_queue.cuh has the one that draws the items. */
#ifndef MOE4_CUDA_PREFILL_ITEMS_CUH
#define MOE4_CUDA_PREFILL_ITEMS_CUH

#include "prefill.cuh"
#include "product.cuh"

#define PREFILL_ITEMS 2 /* the one that is consumed and the next */
#define PREFILL_LOADERS 128
#define WEIGHT_WARPS 2 /* of the loaders */

#define PREFILL_FEWEST 16 /* columns of a product: fewer take as long */

#define PREFILL_ROUND (MOE4_PHASE_GATE_UP | MOE4_PHASE_DOWN) /* phase of an item: some of a tile's rows of h are rounded */

/* A kernel: its consuming warpgroups, the row tiles of 64 that each has of an item, the columns that an item may have, and the units of k
 * in a stage. A stage is the activations of the columns, the weights of the row tiles, two barriers; a row tile's units are one copy. */
template <int GROUPS, int TILES, int COLUMNS, int UNITS, bool ROUNDS> struct prefill_shape {
    static constexpr int groups = GROUPS, tiles = TILES, columns = COLUMNS, units = UNITS;
    static constexpr int threads = GROUPS * 128 + PREFILL_LOADERS;
    static constexpr int row_tiles = GROUPS * TILES, tile_bytes = UNITS * MOE4_UNIT_BYTES; /* of an item; of a row tile in a stage */
    static constexpr int weights = UNITS * COLUMNS * 128, full = weights + row_tiles * tile_bytes, empty = full + 8; /* within a stage */
    static constexpr int stage_bytes = (empty + 8 + 1023) & ~1023;                     /* wgmma's swizzle asks for multiples of 1024 */
    static constexpr int left = 227 * 1024 - 1024 - PREFILL_ITEMS * COLUMNS * 8 - 512; /* beside what prefill_shared takes */
    static constexpr int n_fit = left / stage_bytes, n_stages = n_fit < 12 ? n_fit : 12;
    static constexpr int shared_bytes = 1024 + n_stages * stage_bytes;
    static constexpr bool rounds = ROUNDS;                               /* h to NVFP4 between gate/up and down */
    static constexpr int round_rows = GROUPS * 4 * (TILES == 2 ? 2 : 4); /* of h that an item rounds: more are fewer items, less even */
    static constexpr int ahead = ROUNDS ? 20 : 6; /* units of an item that are still to be loaded when the next is drawn */
    static constexpr int launch_registers = 512 / (GROUPS + 1) & ~7; /* of a thread, before loaders give some to consumers */
    static constexpr int consumer_registers = GROUPS == 2 ? 224 : 152;
    static constexpr int loader_registers = (GROUPS + 1) * launch_registers - GROUPS * consumer_registers;
    static __host__ __device__ constexpr int items(int all_row_tiles) { return (all_row_tiles + row_tiles - 1) / row_tiles; }
};

struct prefill_item {
    moe4_tile tile;
    int phase;      /* of the run, or PREFILL_ROUND; 0: no more work */
    int index;      /* of the tile */
    int row_tile;   /* first of the item's; PREFILL_ROUND: first row of h */
    int n_tiles;    /* row tiles */
    int units;      /* of k */
    int nt;         /* columns, rounded up */
    float alpha[2]; /* of gate and up; of down */
};

struct column {
    int row; /* of h; of o, which is its slot, or of y */
    float factor;
};

template <class S> struct prefill_shared {
    uint64_t item_full[PREFILL_ITEMS], item_empty[PREFILL_ITEMS], columns_full[PREFILL_ITEMS], wanted;
    prefill_item item[PREFILL_ITEMS];
    __align__(16) column columns[PREFILL_ITEMS][S::columns];
};

template <class S> static __device__ __forceinline__ prefill_item place_item(const moe4_layer_run &run, int phases, int ticket) {
    prefill_item item;
    int n_tiles = run.state->n_prefill_tiles;
    int gate_up_items = S::items(run.w.gate_up_tiles), down_items = S::items(run.w.down_tiles);
    int n_gate_up = phases & MOE4_PHASE_GATE_UP ? n_tiles * gate_up_items : 0, n_down = phases & MOE4_PHASE_DOWN ? n_tiles * down_items : 0;
    int items = 1;
    item.phase = 0;
    if (ticket < n_gate_up) {
        item.phase = MOE4_PHASE_GATE_UP;
        items = gate_up_items;
    } else if ((ticket -= n_gate_up) < n_down) {
        item.phase = MOE4_PHASE_DOWN;
        items = down_items;
    }
    if (!item.phase) return item;
    moe4_tile head = run.prefill_tiles[ticket / items]; /* an expert's items go row tile by row tile, so that its tiles meet in L2 */
    int local = ticket - head.head * items;
    item.row_tile = local / head.n_tiles * S::row_tiles;
    item.index = head.head + local % head.n_tiles;
    item.tile = run.prefill_tiles[item.index];
    bool down = item.phase == MOE4_PHASE_DOWN;
    item.units = down ? run.w.intermediate_units : run.w.hidden_units;
    item.n_tiles = min(S::row_tiles, (down ? run.w.down_tiles : run.w.gate_up_tiles) - item.row_tile);
    item.nt = prefill_columns(item.tile.n);
    item.alpha[0] = (down ? run.w.alpha_down : run.w.alpha_gate)[item.tile.expert];
    item.alpha[1] = down ? 0.f : run.w.alpha_up[item.tile.expert];
    return item;
}

/* Position in the ring of stages: where the stage stands in shared memory, its phase, and how many are left to the ring's end. */
template <class S> struct stage_ring {
    uint32_t at, parity;
    int left;
    __device__ __forceinline__ void next(void) {
        at += S::stage_bytes;
        if (--left == 0) {
            at -= S::n_stages * S::stage_bytes;
            left = S::n_stages;
            parity ^= 1;
        }
    }
};

/* One thread: activations. */
template <class S> static __device__ __forceinline__ void load_rows(const moe4_layer_run &run, prefill_shared<S> *s, uint32_t stages) {
    stage_ring<S> stage = {stages, 0, S::n_stages};
    prefill_ring at = {0, 0};
    mbarrier_arrive(smem_address(&s->wanted));
    for (;;) {
        mbarrier_wait(smem_address(&s->item_full[at.i]), at.parity);
        prefill_item item = s->item[at.i];
        if (!item.phase) return;
        if (S::rounds) mbarrier_arrive(smem_address(&s->columns_full[at.i]));
        at.next(PREFILL_ITEMS);
        if (S::rounds && item.phase == PREFILL_ROUND) continue; /* nobody wanted it */
        bool down = item.phase == MOE4_PHASE_DOWN;
        if (down) fence_proxy_async(); /* h came by ordinary stores */
        uint32_t unit_bytes = (uint32_t)item.nt * 128;
        const uint8_t *rows = (const uint8_t *)prefill_tile(down ? run.h_tiles : run.x_tiles, item.tile, item.units);
        bool wants = true;
        for (int u = 0; u < item.units; u += S::units) {
            if (wants && u + S::ahead >= item.units) {
                mbarrier_arrive(smem_address(&s->wanted));
                wants = false;
            }
            uint32_t units = (uint32_t)min(S::units, item.units - u);
            mbarrier_wait(stage.at + S::empty, stage.parity ^ 1);
            mbarrier_arrive_expect(stage.at + S::full, units * ((uint32_t)item.n_tiles * MOE4_UNIT_BYTES + unit_bytes));
            bulk_load(stage.at, rows, units * unit_bytes, stage.at + S::full);
            rows += units * unit_bytes;
            stage.next();
        }
    }
}

/* Every WEIGHT_WARPS-th row tile of an item from `first` on. A copy costs its thread some 170 cycles beside wgmma, so one thread for all of
 * them is too slow. The stage's bytes are expected by the thread that loads activations, before or after they come. */
template <class S>
static __device__ __forceinline__ void load_weights(const moe4_layer_run &run, const prefill_item &item, int first, stage_ring<S> *stage,
                                                    uint64_t policy) {
    bool down = item.phase == MOE4_PHASE_DOWN;
    const uint8_t *weights =
        (down ? run.w.down + (size_t)item.tile.expert * run.w.down_bytes : run.w.gate_up + (size_t)item.tile.expert * run.w.gate_up_bytes) +
        (size_t)(item.row_tile + first) * (size_t)item.units * MOE4_UNIT_BYTES;
    size_t row_tile_bytes = (size_t)item.units * MOE4_UNIT_BYTES;
    for (int u = 0; u < item.units; u += S::units) {
        uint32_t bytes = (uint32_t)min(S::units, item.units - u) * MOE4_UNIT_BYTES;
        mbarrier_wait(stage->at + S::empty, stage->parity ^ 1);
#pragma unroll
        for (int r = 0; r < S::row_tiles; r += WEIGHT_WARPS) {
            if (r + first >= item.n_tiles) break;
            bulk_load_streaming(stage->at + (uint32_t)(S::weights + (r + first) * S::tile_bytes), weights + (size_t)r * row_tile_bytes,
                                bytes, stage->at + S::full, policy);
        }
        weights += bytes;
        stage->next();
    }
}

/* Two warps: a thread of each loads weights; then all look up where the item's columns go, and their factors. */
template <class S>
static __device__ __forceinline__ void load_items(const moe4_layer_run &run, prefill_shared<S> *s, uint32_t stages, int t) {
    stage_ring<S> stage = {stages, 0, S::n_stages};
    prefill_ring at = {0, 0};
    uint64_t once = policy_evict_first();
    for (;;) {
        mbarrier_wait(smem_address(&s->item_full[at.i]), at.parity);
        prefill_item item = s->item[at.i];
        if (!item.phase) return;
        bool rounds = S::rounds && item.phase == PREFILL_ROUND; /* no weights, and no columns but h's */
        if (t % 32 == 0 && !rounds) load_weights<S>(run, item, t / 32, &stage, once);
        __syncwarp();
        bool down = item.phase == MOE4_PHASE_DOWN;
        for (int c = t; c < item.tile.n && !rounds; c += 32 * WEIGHT_WARPS) {
            int r = item.tile.first + c, slot = run.slots[r];
            const float *factor = down ? run.h_factor : run.x_factor; /* in w4a16 too, where rows come in NVFP4 */
            column *to = &s->columns[at.i][c];
            to->row = !down ? r : run.result.y ? slot / run.top_k : slot;
            to->factor = factor ? factor[down ? r : x_row(run, slot)] : 1.f;
        }
        mbarrier_arrive(smem_address(&s->columns_full[at.i])); /* every lane, so that racecheck follows */
        at.next(PREFILL_ITEMS);
    }
}

#endif
