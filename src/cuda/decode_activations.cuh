/* The warp of the decode kernel that fills its stages with the rows of x or h that an item's columns are. */
#ifndef MOE4_CUDA_DECODE_ACTIVATIONS_CUH
#define MOE4_CUDA_DECODE_ACTIVATIONS_CUH

#include "decode_items.cuh"

/* Which of the 32 column tiles from `base` on have an h that may be read. Under load a look at memory takes microseconds, so one look is
 * for all of them, and none is taken twice. */
struct known_tiles {
    int base;
    uint32_t ready;
};

static __device__ void wait_for_h(const moe4_layer_run &run, known_tiles *known, int n_tiles, int index, int items) {
    const int *flags = run.act == MOE4_ACT_W4A16 ? run.done : run.ready;
    int wanted = run.act == MOE4_ACT_W4A16 ? items * FINISH_WARPS : 1;
    if (known->base == (index & ~31) && known->ready >> (index & 31) & 1) return;
    known->base = index & ~31;
    do {
        int i = known->base + (int)(threadIdx.x & 31);
        known->ready = __ballot_sync(0xFFFFFFFFu, i < n_tiles && load_acquire(flags + i) >= wanted);
    } while (!(known->ready >> (index & 31) & 1));
    __syncwarp();
}

/* 32 sorted slots from `base` on, one a lane. */
struct known_slots {
    int base, mine;
};

static __device__ int slot_of_column(const moe4_layer_run &run, known_slots *known, int n_slots, int first, int n) {
    int lane = threadIdx.x & 31;
    if (first < known->base || first + n > known->base + 32) {
        known->base = first;
        known->mine = first + lane < n_slots ? run.slots[first + lane] : 0;
    }
    return __shfl_sync(0xFFFFFFFFu, known->mine, first - known->base + lane & 31);
}

/* Four rows at a time, eight lanes a row and 128 bytes of it: a lane's rows of an item. */
template <int NT> struct lane_rows {
    const char *at[2 * NT]; /* NULL: no such column */

    /* Lane i's `row` is column i's. */
    __device__ void set(const __nv_bfloat16 *rows, int row, int units, int n) {
        int lane = threadIdx.x & 31;
#pragma unroll
        for (int i = 0; i < 2 * NT; i++) {
            int column = 4 * i + (lane >> 3), r = __shfl_sync(0xFFFFFFFFu, row, column);
            at[i] = column < n ? (const char *)(rows + (size_t)r * (size_t)(units * MOE4_UNIT_K)) + 16 * (lane & 7) : NULL;
        }
    }
};

template <int NT> static __device__ void load_activations(const moe4_layer_run &run, int phases, block_shared *s, uint32_t stages) {
    using S = shape<NT>;
    constexpr int unit_bytes = MOE4_UNIT_K * 2;
    barriers bar(s);
    int lane = threadIdx.x & 31;
    uint32_t first = stages + (uint32_t)(WEIGHT_BYTES + (lane >> 3) * S::x_row_bytes + 16 * (lane & 7));
    ring stage = {0, 0};
    item_ring at = {0};
    known_tiles tiles = {-1, 0};
    known_slots slots = {-32, 0};
    dependency_wait();
    int n_tiles = run.state->n_tiles, n_slots = run.state->n_slots;
    for (;;) {
        mbarrier_wait(bar.item_full(at.i()), at.parity());
        work_item item = s->item[at.i()];
        __syncwarp();
        if (lane == 0) mbarrier_arrive(bar.item_empty(at.i()));
        at.n++;
        if (!item.phase) return;
        if (item.phase == PHASE_ROUND) continue;
        operands o = item_operands<S>(run, item.phase, item.tile.expert, item.row_tile);
        int r = item.tile.first + lane;
        if (item.phase == MOE4_PHASE_GATE_UP)
            r = x_row(run, slot_of_column(run, &slots, n_slots, item.tile.first, item.tile.n));
        else if (phases & MOE4_PHASE_GATE_UP)
            wait_for_h(run, &tiles, n_tiles, item.index, items_of<S>(run.w.gate_up_tiles));
        lane_rows<NT> rows;
        rows.set(o.rows, r, o.units, item.tile.n);
#pragma unroll 1
        for (int u = 0; u < o.units; u += S::units) {
            uint32_t to = first + (uint32_t)(stage.i * S::stage_bytes);
            mbarrier_wait(bar.empty(stage.i), stage.parity ^ 1);
#pragma unroll
            for (int i = 0; i < 2 * NT; i++, to += 4 * S::x_row_bytes) {
                if (!rows.at[i]) continue;
                const char *from = rows.at[i] + u * unit_bytes;
                if (u + S::units <= o.units) {
#pragma unroll
                    for (int k = 0; k < S::units; k++) copy_16(to + k * unit_bytes, from + k * unit_bytes);
                } else {
                    for (int k = 0; k < o.units - u; k++) copy_16(to + k * unit_bytes, from + k * unit_bytes);
                }
            }
            mbarrier_arrive_copies(bar.full(stage.i));
            stage.next(S::n_stages);
        }
    }
}

#endif
