/* The products of a layer at the speed of memory, for few slots per expert (sm_90): one persistent kernel.
 *
 *   tickets 0 .. G-1        gate/up items (column tile of an expert x 128 rows): x -> h
 *   tickets G .. G+D-1      down items: h -> o; an item waits until its expert's h is ready, while its weights already stream
 *
 *   round items             between them in the modes that round h to NVFP4: a column tile's rows of h, once its gate/up is done
 *
 *   16 warps  consume, in four groups of four that have 32 rows each. In a group, warp w takes units w and w+4 of a stage, decodes them
 *             in registers and multiplies; partial sums meet in shared memory once an item
 *   a warp    draws tickets, fills a ring of stages with packed weights by bulk copies: 512 k of an item's rows a stage
 *   a warp    fills the same stages with the activation rows of the item's columns, gathered by index
 *   a warp    tells the other blocks of gate/up items that are done, so that no consumer waits for a fence
 *
 * A ticket is drawn before its item runs, gate/up items wait for nothing, round items for gate/up and down items for both: whoever waits,
 * waits for a block that is already running. There is no deadlock, whatever else holds the GPU's multiprocessors. */
#include "launch.cuh"
#include "product.cuh"

#define STAGE_UNITS 8
#define STAGE_K (STAGE_UNITS * MOE4_UNIT_K)
#define STAGE_TILE_BYTES (STAGE_UNITS * MOE4_UNIT_BYTES)
#define ITEM_TILES 2 /* row tiles of 64; the last item of an odd number has one */
#define WEIGHT_BYTES (ITEM_TILES * STAGE_TILE_BYTES)
#define X_ROW_BYTES (STAGE_K * 2 + 16) /* 16 more against bank conflicts */
#define N_ITEMS 4
#define GROUPS 4
#define GROUP_THREADS (MOE4_SLICES * 32)
#define CONSUMER_WARPS (GROUPS * MOE4_SLICES)
#define THREADS ((CONSUMER_WARPS + 3) * 32)
#define MAX_STAGES 8
#define PHASE_ROUND 4 /* beside MOE4_PHASE_… */

struct work_item {
    moe4_tile tile;
    int phase; /* 0: no more work */
    int index; /* of the column tile */
    int row_tile;
};

/* NT: columns / 8 that a stage has room for. */
template <int NT> struct shape {
    static constexpr int stage_bytes = WEIGHT_BYTES + 8 * NT * X_ROW_BYTES;
    static constexpr int partial_bytes = GROUPS * partial_shape<NT>::floats * 4;
    static constexpr int n_fit = (225 * 1024 - partial_bytes) / stage_bytes, n_stages = n_fit < MAX_STAGES ? n_fit : MAX_STAGES;
    static constexpr int shared_bytes = partial_bytes + n_stages * stage_bytes;
};

static __host__ __device__ constexpr int items_of(int row_tiles) {
    return (row_tiles + ITEM_TILES - 1) / ITEM_TILES;
}

struct block_shared {
    uint64_t full[MAX_STAGES], empty[MAX_STAGES], item_full[N_ITEMS], item_empty[N_ITEMS];
    uint64_t stored[N_ITEMS]; /* a gate/up item's h has been stored */
    work_item item[N_ITEMS];
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

struct operands {
    const uint8_t *weights; /* of the item's first row tile */
    const __nv_bfloat16 *rows;
    int units, tiles; /* of k; of rows */
};

static __device__ operands item_operands(const moe4_layer_run &run, const work_item &item) {
    bool down = item.phase == MOE4_PHASE_DOWN;
    operands o;
    o.units = down ? run.w.intermediate_units : run.w.hidden_units;
    o.weights =
        (down ? run.w.down + (size_t)item.tile.expert * run.w.down_bytes : run.w.gate_up + (size_t)item.tile.expert * run.w.gate_up_bytes) +
        (size_t)item.row_tile * (size_t)o.units * MOE4_UNIT_BYTES;
    o.rows = down ? run.h : run.x;
    o.tiles = min(ITEM_TILES, (down ? run.w.down_tiles : run.w.gate_up_tiles) - item.row_tile);
    return o;
}

/* ---- a warp: tickets and weights ---- */

template <int NT> static __device__ void load_weights(const moe4_layer_run &run, int phases, block_shared *s, uint32_t stages) {
    using S = shape<NT>;
    uint64_t policy = policy_evict_first();
    int n_tiles = run.state->n_tiles;
    int n_gate_up = phases & MOE4_PHASE_GATE_UP ? n_tiles * items_of(run.w.gate_up_tiles) : 0;
    int n_round = phases == (MOE4_PHASE_GATE_UP | MOE4_PHASE_DOWN) && run.act != MOE4_ACT_W4A16 ? n_tiles : 0;
    int n_down = phases & MOE4_PHASE_DOWN ? n_tiles * items_of(run.w.down_tiles) : 0;
    ring stage = {0, 0}, at = {0, 0};
    int next = atomicAdd(&run.state->ticket, 1);
    for (;;) {
        int ticket = next;
        work_item item;
        item.phase = 0;
        if (ticket < n_gate_up) {
            item.phase = MOE4_PHASE_GATE_UP;
            item_place(run, ticket, items_of(run.w.gate_up_tiles), &item.tile, &item.index, &item.row_tile);
        } else if ((ticket -= n_gate_up) < n_round) {
            item.phase = PHASE_ROUND;
            item.tile = run.tiles[ticket];
            item.index = ticket;
        } else if ((ticket -= n_round) < n_down) {
            item.phase = MOE4_PHASE_DOWN;
            item_place(run, ticket, items_of(run.w.down_tiles), &item.tile, &item.index, &item.row_tile);
        }
        item.row_tile *= ITEM_TILES;
        mbarrier_wait(smem_address(&s->item_empty[at.i]), at.parity ^ 1);
        s->item[at.i] = item;
        mbarrier_arrive(smem_address(&s->item_full[at.i]));
        at.next(N_ITEMS);
        if (!item.phase) return;
        next = atomicAdd(&run.state->ticket, 1); /* its latency passes while the stages load */
        if (item.phase == PHASE_ROUND) continue;
        operands o = item_operands(run, item);
        for (int u = 0; u < o.units; u += STAGE_UNITS) {
            uint32_t bytes = (uint32_t)min(STAGE_UNITS, o.units - u) * MOE4_UNIT_BYTES, full = smem_address(&s->full[stage.i]);
            mbarrier_wait(smem_address(&s->empty[stage.i]), stage.parity ^ 1);
            mbarrier_arrive_expect(full, (uint32_t)o.tiles * bytes);
            for (int r = 0; r < o.tiles; r++)
                bulk_load_streaming(stages + (uint32_t)(stage.i * S::stage_bytes + r * STAGE_TILE_BYTES),
                                    o.weights + ((size_t)r * (size_t)o.units + (size_t)u) * MOE4_UNIT_BYTES, bytes, full, policy);
            stage.next(S::n_stages);
        }
    }
}

/* ---- a warp: activations ---- */

template <int NT> static __device__ void load_activations(const moe4_layer_run &run, int phases, block_shared *s, uint32_t stages) {
    using S = shape<NT>;
    int lane = threadIdx.x & 31;
    ring stage = {0, 0}, at = {0, 0};
    for (;;) {
        mbarrier_wait(smem_address(&s->item_full[at.i]), at.parity);
        work_item item = s->item[at.i];
        __syncwarp();
        if (lane == 0) mbarrier_arrive(smem_address(&s->item_empty[at.i]));
        at.next(N_ITEMS);
        if (!item.phase) return;
        if (item.phase == PHASE_ROUND) continue;
        operands o = item_operands(run, item);
        const __nv_bfloat16 *row = NULL;
        if (lane < item.tile.n) {
            int r = item.tile.first + lane;
            if (item.phase == MOE4_PHASE_GATE_UP) r = x_row(run, run.slots[r]);
            row = o.rows + (size_t)r * (size_t)(o.units * MOE4_UNIT_K);
        }
        if (item.phase == MOE4_PHASE_DOWN && phases & MOE4_PHASE_GATE_UP) {
            const int *flag = run.act == MOE4_ACT_W4A16 ? run.done + item.index : run.ready + item.index;
            int wanted = run.act == MOE4_ACT_W4A16 ? items_of(run.w.gate_up_tiles) : 1;
            if (lane == 0)
                while (load_acquire(flag) < wanted) __nanosleep(32);
            __syncwarp();
            fence_proxy_async();
        }
        for (int u = 0; u < o.units; u += STAGE_UNITS) {
            uint32_t bytes = (uint32_t)min(STAGE_UNITS, o.units - u) * MOE4_UNIT_K * 2, full = smem_address(&s->full[stage.i]);
            mbarrier_wait(smem_address(&s->empty[stage.i]), stage.parity ^ 1);
            if (lane == 0) mbarrier_arrive_expect(full, (uint32_t)item.tile.n * bytes);
            __syncwarp();
            if (row)
                bulk_load(stages + (uint32_t)(stage.i * S::stage_bytes + WEIGHT_BYTES + lane * X_ROW_BYTES), row + u * MOE4_UNIT_K, bytes,
                          full);
            stage.next(S::n_stages);
        }
    }
}

/* ---- a warp: what is done ---- */

static __device__ void tell_done(const moe4_layer_run &run, block_shared *s) {
    ring at = {0, 0};
    for (;;) {
        mbarrier_wait(smem_address(&s->item_full[at.i]), at.parity);
        int phase = s->item[at.i].phase, index = s->item[at.i].index;
        if (!phase) return;
        if (phase == MOE4_PHASE_GATE_UP) {
            mbarrier_wait(smem_address(&s->stored[at.i]), at.parity);
            fence_proxy_async(); /* h may be read by bulk copies */
            add_release(run.done + index, 1);
        } else {
            mbarrier_wait(smem_address(&s->stored[at.i]), at.parity); /* keeps the barriers' phases together */
        }
        mbarrier_arrive(smem_address(&s->item_empty[at.i]));
        at.next(N_ITEMS);
    }
}

/* ---- the groups of consumers ---- */

struct group {
    int r, slice, lane; /* group number; share of k */
    float *partials;
    __device__ void sync() const { barrier_sync(1 + r, GROUP_THREADS); }
};

/* A column tile's rows of h, rounded by all consumers once gate/up is done with them. */
static __device__ void round_item(const moe4_layer_run &run, const work_item &item) {
    if (threadIdx.x == 0)
        while (load_acquire(run.done + item.index) < items_of(run.w.gate_up_tiles)) __nanosleep(32);
    barrier_sync(1 + GROUPS, CONSUMER_WARPS * 32);
    int blocks = run.w.intermediate_units * 4, n = item.tile.n * blocks;
    for (int i = threadIdx.x; i < n; i += CONSUMER_WARPS * 32) {
        int row = item.tile.first + i / blocks;
        if (round_h_block(run, row, i % blocks, item.tile.expert, __ldcg(run.h_amax + row))) atomicAdd(run.h_saturated + row, 1);
    }
    barrier_sync(1 + GROUPS, CONSUMER_WARPS * 32);
    if (threadIdx.x == 0) {
        fence_proxy_async(); /* h will be read by bulk copies */
        __threadfence();
        store_release(run.ready + item.index, 1);
    }
}

/* A gate/up or down item of up to 8 * NT columns; S is the layout of the stages. */
template <int NT, class S>
static __device__ __forceinline__ void consume_item(const moe4_layer_run &run, const work_item &item, const group &self, block_shared *s,
                                                    uint32_t stages, ring *stage) {
    using P = partial_shape<NT>;
    bool down = item.phase == MOE4_PHASE_DOWN, wide = (down ? run.h_factor : run.x_factor) != NULL;
    int units = down ? run.w.intermediate_units : run.w.hidden_units, e = item.tile.expert, half = self.r & 1;
    uint32_t x_at = WEIGHT_BYTES + (self.lane >> 2) * X_ROW_BYTES + self.slice * (MOE4_UNIT_K * 2) + (self.lane & 3) * 32;
    uint32_t unit_at = (self.r >> 1) * STAGE_TILE_BYTES + self.slice * MOE4_UNIT_BYTES;
    uint32_t code_at = unit_at + half * (MOE4_ROW_TILES * 512) + 16 * self.lane,
             scale_at = unit_at + MOE4_UNIT_CODE_BYTES + 8 * self.lane + 4 * half;

    /* What the end needs is asked for now; lane i has that of the warp's i-th column pair's columns. */
    float alpha = down ? run.w.alpha_down[e] : run.w.alpha_gate[e], up_alpha = down ? 0.f : run.w.alpha_up[e], my_factor = 1.f;
    int my_column = (self.lane >> 1) * 8 + 2 * self.slice + (self.lane & 1), my_slot = 0;
    bool mine = self.lane < 2 * NT && my_column < item.tile.n;
    if (mine) {
        my_slot = run.slots[item.tile.first + my_column];
        if (wide && !down) my_factor = run.x_factor[x_row(run, my_slot)];
    }
    float acc[MOE4_ROW_TILES][NT][4];
#pragma unroll
    for (int i = 0; i < MOE4_ROW_TILES * NT * 4; i++) ((float *)acc)[i] = 0.f;

    for (int u = 0; u < units; u += STAGE_UNITS) {
        mbarrier_wait(smem_address(&s->full[stage->i]), stage->parity);
        uint32_t base = stages + (uint32_t)(stage->i * S::stage_bytes);
#pragma unroll
        for (int i = 0; i < STAGE_UNITS / MOE4_SLICES; i++) {
            if (u + i * MOE4_SLICES + self.slice >= units) break;
            uint32_t codes = base + code_at + i * (MOE4_SLICES * MOE4_UNIT_BYTES), x = base + x_at + i * (MOE4_SLICES * MOE4_UNIT_K * 2);
            uint4 words[MOE4_ROW_TILES], b[NT][2];
            uint32_t scales = load_shared_4(base + scale_at + i * (MOE4_SLICES * MOE4_UNIT_BYTES));
#pragma unroll
            for (int m = 0; m < MOE4_ROW_TILES; m++) words[m] = load_shared_16(codes + 512 * m);
#pragma unroll
            for (int j = 0; j < NT; j++) {
                b[j][0] = load_shared_16(x + j * 8 * X_ROW_BYTES);
                b[j][1] = load_shared_16(x + j * 8 * X_ROW_BYTES + 16);
            }
#pragma unroll
            for (int m = 0; m < MOE4_ROW_TILES; m++) {
                uint32_t scale_g, scale_g8;
                unit_scales(&scale_g, &scale_g8, scales, m);
                unit_tile_product<NT>(acc[m], words[m], scale_g, scale_g8, b);
            }
        }
        mbarrier_arrive(smem_address(&s->empty[stage->i]));
        stage->next(S::n_stages);
        if (u == 0 && wide && down && mine) my_factor = __ldcg(run.h_factor + item.tile.first + my_column); /* it came with the rows */
    }

    int pair = self.lane % MOE4_PAIRS, row0 = item.row_tile * MOE4_UNIT_ROWS + self.r * MOE4_GROUP_ROWS;
#pragma unroll
    for (int j0 = 0; j0 < NT; j0 += P::tiles) {
        self.sync(); /* the partial sums before these have been read */
        store_partials<NT>(self.partials, self.slice, self.lane, acc, j0);
        self.sync();
#pragma unroll
        for (int i = 0; i < P::tiles; i++) {
            int column = 8 * i + 2 * self.slice + self.lane / MOE4_PAIRS, c = 8 * j0 + column, from = 2 * (j0 + i) + self.lane / MOE4_PAIRS;
            float factor = __shfl_sync(0xFFFFFFFFu, my_factor, from);
            int slot = __shfl_sync(0xFFFFFFFFu, my_slot, from);
            bool here = c < item.tile.n;
            uint32_t mask = __ballot_sync(0xFFFFFFFFu, here);
            if (here) {
                float2 sum = sum_partials<NT>(self.partials, column, pair);
                if (down)
                    store_o(run, slot, pair_row(row0, pair), sum, alpha * factor);
                else
                    store_h(run, mask, item.tile.first + c, row0 / 2 + pair, sum, alpha * factor, up_alpha * factor);
            }
            __syncwarp();
        }
    }
}

template <int NT> static __device__ void consume(const moe4_layer_run &run, block_shared *s, uint32_t stages, float *partials) {
    using S = shape<NT>;
    int warp = threadIdx.x >> 5, r = warp / MOE4_SLICES;
    group self = {r, warp % MOE4_SLICES, (int)(threadIdx.x & 31), partials + r * partial_shape<NT>::floats};
    ring stage = {0, 0}, at = {0, 0};
    for (;;) {
        mbarrier_wait(smem_address(&s->item_full[at.i]), at.parity);
        const work_item &item = s->item[at.i];
        if (!item.phase) return;
        if (item.phase == PHASE_ROUND)
            round_item(run, item);
        else if (NT == 1 || item.tile.n <= 8)
            consume_item<1, S>(run, item, self, s, stages, &stage);
        else if (NT == 2 || item.tile.n <= 16)
            consume_item<(NT < 2 ? NT : 2), S>(run, item, self, s, stages, &stage);
        else
            consume_item<NT, S>(run, item, self, s, stages, &stage);
        __syncwarp();
        if (self.lane == 0) {
            mbarrier_arrive(smem_address(&s->stored[at.i]));
            mbarrier_arrive(smem_address(&s->item_empty[at.i]));
        }
        at.next(N_ITEMS);
    }
}

template <int NT>
static __global__ void __launch_bounds__(THREADS, 1) decode_kernel(const __grid_constant__ moe4_layer_run run, int phases) {
#if __CUDA_ARCH__ >= 900
    extern __shared__ __align__(128) uint8_t memory[];
    __shared__ __align__(8) block_shared s;
    using S = shape<NT>;
    float *partials = (float *)memory;
    uint32_t stages = smem_address(memory) + S::partial_bytes;
    int warp = threadIdx.x >> 5, lane = threadIdx.x & 31;
    if (threadIdx.x == 0) {
        for (int i = 0; i < S::n_stages; i++) {
            mbarrier_init(smem_address(&s.full[i]), 2);
            mbarrier_init(smem_address(&s.empty[i]), CONSUMER_WARPS * 32);
        }
        for (int i = 0; i < N_ITEMS; i++) {
            mbarrier_init(smem_address(&s.item_full[i]), 1);
            mbarrier_init(smem_address(&s.item_empty[i]), CONSUMER_WARPS + 2);
            mbarrier_init(smem_address(&s.stored[i]), CONSUMER_WARPS);
        }
        mbarrier_init_fence();
    }
    __syncthreads();
    dependency_launch();
    dependency_wait();
    if (warp < CONSUMER_WARPS) {
        consume<NT>(run, &s, stages, partials);
    } else if (warp == CONSUMER_WARPS) {
        if (lane == 0) load_weights<NT>(run, phases, &s, stages);
    } else if (warp == CONSUMER_WARPS + 1) {
        load_activations<NT>(run, phases, &s, stages);
    } else {
        if (lane == 0) tell_done(run, &s);
    }
#endif
}

typedef void (*decode_fn)(moe4_layer_run, int);

cudaError_t moe4_cuda_decode_sm90(const moe4_layer_run *run, int phases, int n_sms, cudaStream_t stream) {
    static const struct {
        int columns, shared_bytes;
        decode_fn kernel;
    } kernels[] = {{8, shape<1>::shared_bytes, decode_kernel<1>},
                   {16, shape<2>::shared_bytes, decode_kernel<2>},
                   {32, shape<4>::shared_bytes, decode_kernel<4>}};
    if (!(phases & MOE4_PHASE_GATE_UP)) { /* the tickets start again */
        cudaError_t error = cudaMemsetAsync(&run->state->ticket, 0, sizeof run->state->ticket, stream);
        if (error != cudaSuccess) return error;
    }
    for (const auto &k : kernels) {
        if (k.columns != run->tile_columns) continue;
        cudaError_t error = cudaFuncSetAttribute(k.kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, k.shared_bytes);
        if (error != cudaSuccess) return error;
        return moe4_cuda_launch_early(k.kernel, dim3((unsigned)n_sms), THREADS, (size_t)k.shared_bytes, stream, *run, phases);
    }
    return cudaErrorInvalidValue;
}
