/* The decode kernel's work items, its rings of stages, and the two warps that fill them (decode_sm90.cu has the whole picture). */
#ifndef MOE4_CUDA_DECODE_SM90_CUH
#define MOE4_CUDA_DECODE_SM90_CUH

#include <stddef.h>

#include "launch.cuh"
#include "product.cuh"

#define GROUPS 4
#define CONSUMER_WARPS (GROUPS * MOE4_GROUP_WARPS)
#define FINISH_WARPS 2
#define WEIGHT_WARP (CONSUMER_WARPS + FINISH_WARPS)
#define ACTIVATION_WARP (WEIGHT_WARP + 1)
#define THREADS ((ACTIVATION_WARP + 1) * 32)
#define CONSUMER_REGISTERS 104 /* of 96 that each is launched with */
#define OTHER_REGISTERS 64
#define STAGE_UNITS 16 /* of weights */
#define WEIGHT_BYTES (STAGE_UNITS * MOE4_UNIT_BYTES)
#define N_ITEMS 4
#define MAX_STAGES 8
#define ROUND_FLOATS (CONSUMER_WARPS * MOE4_WARP_FLOATS) /* partial sums of eight columns of an item */
#define N_ROUNDS 2                                       /* that may wait to be finished */
#define PARTIAL_BYTES (N_ROUNDS * ROUND_FLOATS * 4)
#define SHARED_BYTES (227 * 1024 - 512) /* for partial sums and stages, beside block_shared */

#define PHASE_ROUND 4 /* beside MOE4_PHASE_… */

struct work_item {
    moe4_tile tile;
    int phase; /* 0: no more work */
    int index; /* of the column tile */
    int row_tile;
};

/* NT: columns / 8 that a stage has room for. With few columns an item is one row tile of 64 and a stage 1024 k of it, so that one token's
 * work divides evenly among the multiprocessors; with more it is two row tiles and 512 k, which asks for half as many activations. */
template <int NT> struct shape {
    static constexpr int columns = 8 * NT;
    static constexpr int item_tiles = NT == 1 ? 1 : 2;
    static constexpr int units = STAGE_UNITS / item_tiles;           /* of k in a stage */
    static constexpr int x_row_bytes = units * MOE4_UNIT_K * 2 + 16; /* 16 more against bank conflicts */
    static constexpr int stage_bytes = WEIGHT_BYTES + 8 * NT * x_row_bytes;
    static constexpr int row_groups = item_tiles * MOE4_UNIT_ROWS / MOE4_GROUP_ROWS; /* of an item */
    static constexpr int n_fit = (SHARED_BYTES - PARTIAL_BYTES) / stage_bytes, n_stages = n_fit < MAX_STAGES ? n_fit : MAX_STAGES;
    static constexpr int shared_bytes = PARTIAL_BYTES + n_stages * stage_bytes;
};

/* Items that the rows of a column tile are divided into. */
template <class S> static __host__ __device__ constexpr int items_of(int row_tiles) {
    return (row_tiles + S::item_tiles - 1) / S::item_tiles;
}

template <class S> static __device__ bool h_is_marked(const moe4_layer_run &run) {
    return S::columns <= MOE4_MARKED_COLUMNS && moe4_cuda_marks_h(&run);
}

struct block_shared {
    uint64_t full[MAX_STAGES], empty[MAX_STAGES], item_full[N_ITEMS], item_empty[N_ITEMS];
    uint64_t partial_full[N_ROUNDS], partial_empty[N_ROUNDS];
    work_item item[N_ITEMS];
    uint32_t amax[CONSUMER_WARPS]; /* of a round item's row */
};
static_assert(sizeof(block_shared) <= 512, "fits beside SHARED_BYTES");

/* The same by addresses in shared memory. They are counted from one register that the compiler cannot see through: left to itself it works
 * every address out again each time. */
struct barriers {
    uint32_t block;
    __device__ explicit barriers(const block_shared *s) : block(smem_address(s)) { keep(&block); }
    static __device__ void keep(uint32_t *v) { asm volatile("" : "+r"(*v)); }
    __device__ uint32_t full(int i) const { return block + (uint32_t)(offsetof(block_shared, full) + 8 * i); }
    __device__ uint32_t empty(int i) const { return block + (uint32_t)(offsetof(block_shared, empty) + 8 * i); }
    __device__ uint32_t item_full(int i) const { return block + (uint32_t)(offsetof(block_shared, item_full) + 8 * i); }
    __device__ uint32_t item_empty(int i) const { return block + (uint32_t)(offsetof(block_shared, item_empty) + 8 * i); }
    __device__ uint32_t partial_full(int i) const { return block + (uint32_t)(offsetof(block_shared, partial_full) + 8 * i); }
    __device__ uint32_t partial_empty(int i) const { return block + (uint32_t)(offsetof(block_shared, partial_empty) + 8 * i); }
};

/* Position in a ring: index and phase parity. */
struct ring {
    int i;
    uint32_t parity;
    __device__ void next(int n) {
        if (++i == n) {
            i = 0;
            parity ^= 1;
        }
    }
};

/* The same for a length that is a power of two. */
template <int N> struct counted_ring {
    uint32_t n;
    __device__ int i() const { return (int)(n % N); }
    __device__ uint32_t parity() const { return n / N & 1; }
};
typedef counted_ring<N_ITEMS> item_ring;
typedef counted_ring<N_ROUNDS> round_ring;

struct operands {
    const uint8_t *weights; /* of the item's first row tile */
    const __nv_bfloat16 *rows;
    int units, tiles; /* of k; of rows */
};

template <class S> static __device__ operands item_operands(const moe4_layer_run &run, int phase, int expert, int row_tile) {
    bool down = phase == MOE4_PHASE_DOWN;
    operands o;
    o.units = down ? run.w.intermediate_units : run.w.hidden_units;
    o.weights = (down ? run.w.down + (size_t)expert * run.w.down_bytes : run.w.gate_up + (size_t)expert * run.w.gate_up_bytes) +
                (size_t)row_tile * (size_t)o.units * MOE4_UNIT_BYTES;
    o.rows = down ? run.h : run.x;
    o.tiles = min(S::item_tiles, (down ? run.w.down_tiles : run.w.gate_up_tiles) - row_tile);
    return o;
}

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

/* ---- a warp: activations ---- */

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
