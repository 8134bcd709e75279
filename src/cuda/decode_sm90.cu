/* The products of a layer at the speed of memory, for few slots per expert (sm_90): one persistent kernel.
 *
 *   tickets 0 .. G-1        gate/up items (column tile of an expert x R row tiles of 64): x -> h
 *   tickets G .. G+D-1      down items: h -> o; an item waits until its expert's h is ready, while its weights already stream
 *
 *   consumers  R groups of eight warps, a row tile each: warp w takes unit w of the stage (64 rows x 64 k), decodes it in registers,
 *              mma; partial sums meet in shared memory once an item. The group that finishes a column tile's last gate/up row tile
 *              rounds h to NVFP4 where the mode asks.
 *   one warp   draws tickets, fills a ring of stages with packed weights by bulk copies: 512 k of R row tiles a stage
 *   one warp   fills the same stages with the activation rows of the item's columns, gathered by index
 *
 * A ticket is drawn before its item runs and a gate/up item waits for nothing, so whoever waits for h waits for a block that is already
 * running: there is no deadlock, whatever else holds the GPU's multiprocessors. */
#include "launch.cuh"
#include "product.cuh"

#define STAGE_K (MOE4_WARPS * MOE4_UNIT_K)
#define STAGE_TILE_BYTES (MOE4_WARPS * MOE4_UNIT_BYTES)
#define X_ROW_BYTES (STAGE_K * 2 + 16) /* 16 more against bank conflicts */
#define N_ITEMS 4
#define GROUP_THREADS (MOE4_WARPS * 32)
#define MAX_STAGES 8

struct work_item {
    moe4_tile tile;
    int phase; /* MOE4_PHASE_…; 0: no more work */
    int index; /* of the column tile */
    int row_tile;
};

/* NT: columns / 8 that a stage has room for; R: row tiles of 64 in an item; B: blocks that share a multiprocessor. */
template <int NT, int R, int B> struct shape {
    static constexpr int threads = R * GROUP_THREADS + 64;
    static constexpr int weight_bytes = R * STAGE_TILE_BYTES, stage_bytes = weight_bytes + 8 * NT * X_ROW_BYTES;
    static constexpr int partial_bytes = R * MOE4_PARTIAL_FLOATS * 4;
    static constexpr int n_fit = (227 * 1024 / B - 2048 - partial_bytes) / stage_bytes, n_stages = n_fit < MAX_STAGES ? n_fit : MAX_STAGES;
    static constexpr int shared_bytes = partial_bytes + n_stages * stage_bytes;
};

struct block_shared {
    uint64_t full[MAX_STAGES], empty[MAX_STAGES], item_full[N_ITEMS], item_empty[N_ITEMS];
    work_item item[N_ITEMS];
    int is_last[2]; /* of each group */
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
    int units;
};

static __device__ operands item_operands(const moe4_layer_run &run, const work_item &item) {
    bool down = item.phase == MOE4_PHASE_DOWN;
    operands o;
    o.units = down ? run.w.intermediate_units : run.w.hidden_units;
    o.weights =
        (down ? run.w.down + (size_t)item.tile.expert * run.w.down_bytes : run.w.gate_up + (size_t)item.tile.expert * run.w.gate_up_bytes) +
        (size_t)item.row_tile * (size_t)o.units * MOE4_UNIT_BYTES;
    o.rows = down ? run.h : run.x;
    return o;
}

/* ---- warp 8: tickets and weights ---- */

template <int NT, int R, int B>
static __device__ void load_weights(const moe4_layer_run &run, int phases, block_shared *s, uint32_t stages) {
    using S = shape<NT, R, B>;
    uint64_t policy = policy_evict_first();
    int n_tiles = run.state->n_tiles;
    int n_gate_up = phases & MOE4_PHASE_GATE_UP ? n_tiles * (run.w.gate_up_tiles / R) : 0;
    int n_down = phases & MOE4_PHASE_DOWN ? n_tiles * (run.w.down_tiles / R) : 0;
    ring stage = {0, 0}, at = {0, 0};
    int next = atomicAdd(&run.state->ticket, 1);
    for (;;) {
        int ticket = next;
        work_item item;
        item.phase = ticket < n_gate_up ? MOE4_PHASE_GATE_UP : ticket < n_gate_up + n_down ? MOE4_PHASE_DOWN : 0;
        if (item.phase) {
            bool down = item.phase == MOE4_PHASE_DOWN;
            item_place(run, down ? ticket - n_gate_up : ticket, (down ? run.w.down_tiles : run.w.gate_up_tiles) / R, &item.tile,
                       &item.index, &item.row_tile);
            item.row_tile *= R;
        }
        mbarrier_wait(smem_address(&s->item_empty[at.i]), at.parity ^ 1);
        s->item[at.i] = item;
        mbarrier_arrive(smem_address(&s->item_full[at.i]));
        at.next(N_ITEMS);
        if (!item.phase) return;
        next = atomicAdd(&run.state->ticket, 1); /* its latency passes while the stages load */
        operands o = item_operands(run, item);
        for (int u = 0; u < o.units; u += MOE4_WARPS) {
            uint32_t bytes = (uint32_t)min(MOE4_WARPS, o.units - u) * MOE4_UNIT_BYTES, full = smem_address(&s->full[stage.i]);
            mbarrier_wait(smem_address(&s->empty[stage.i]), stage.parity ^ 1);
            mbarrier_arrive_expect(full, R * bytes);
#pragma unroll
            for (int r = 0; r < R; r++)
                bulk_load_streaming(stages + (uint32_t)(stage.i * S::stage_bytes + r * STAGE_TILE_BYTES),
                                    o.weights + ((size_t)r * (size_t)o.units + (size_t)u) * MOE4_UNIT_BYTES, bytes, full, policy);
            stage.next(S::n_stages);
        }
    }
}

/* ---- warp 9: activations ---- */

template <int NT, int R, int B>
static __device__ void load_activations(const moe4_layer_run &run, int phases, block_shared *s, uint32_t stages) {
    using S = shape<NT, R, B>;
    int lane = threadIdx.x & 31;
    ring stage = {0, 0}, at = {0, 0};
    for (;;) {
        mbarrier_wait(smem_address(&s->item_full[at.i]), at.parity);
        work_item item = s->item[at.i];
        __syncwarp();
        if (lane == 0) mbarrier_arrive(smem_address(&s->item_empty[at.i]));
        at.next(N_ITEMS);
        if (!item.phase) return;
        operands o = item_operands(run, item);
        const __nv_bfloat16 *row = NULL;
        if (lane < item.tile.n) {
            int r = item.tile.first + lane;
            if (item.phase == MOE4_PHASE_GATE_UP) r = x_row(run, run.slots[r]);
            row = o.rows + (size_t)r * (size_t)(o.units * MOE4_UNIT_K);
        }
        if (item.phase == MOE4_PHASE_DOWN && phases & MOE4_PHASE_GATE_UP) {
            if (lane == 0)
                while (!load_acquire(run.ready + item.index)) __nanosleep(64);
            __syncwarp();
            fence_proxy_async();
        }
        for (int u = 0; u < o.units; u += MOE4_WARPS) {
            uint32_t bytes = (uint32_t)min(MOE4_WARPS, o.units - u) * MOE4_UNIT_K * 2, full = smem_address(&s->full[stage.i]);
            mbarrier_wait(smem_address(&s->empty[stage.i]), stage.parity ^ 1);
            if (lane == 0) mbarrier_arrive_expect(full, (uint32_t)item.tile.n * bytes);
            __syncwarp();
            if (row)
                bulk_load(stages + (uint32_t)(stage.i * S::stage_bytes + S::weight_bytes + lane * X_ROW_BYTES), row + u * MOE4_UNIT_K,
                          bytes, full);
            stage.next(S::n_stages);
        }
    }
}

/* ---- the groups of consumers ---- */

struct group {
    int r, warp, lane, thread; /* group number; within the group */
    float *partials;
    int *is_last;
    __device__ void sync() const { barrier_sync(1 + r, GROUP_THREADS); }
};

/* A group has stored its gate/up row tile. The last one of a column tile rounds its rows of h where the mode asks, then says that they
 * may be read. */
static __device__ void finish_gate_up(const moe4_layer_run &run, const work_item &item, const group &self) {
    bool rounds = run.act == MOE4_ACT_TOKEN || run.act == MOE4_ACT_STATIC;
    fence_proxy_async(); /* h will be read by bulk copies */
    self.sync();
    if (self.thread == 0) {
        *self.is_last = add_acq_rel(run.done + item.index, 1) == run.w.gate_up_tiles - 1;
        if (*self.is_last && !rounds) store_release(run.ready + item.index, 1);
    }
    if (!rounds) return;
    self.sync();
    if (!*self.is_last) return;
    int blocks = run.w.intermediate_units * 4;
    for (int i = self.thread; i < item.tile.n * blocks; i += GROUP_THREADS) {
        int row = item.tile.first + i / blocks;
        if (round_h_block(run, row, i % blocks, item.tile.expert, __ldcg(run.h_amax + row))) atomicAdd(run.h_saturated + row, 1);
    }
    fence_proxy_async();
    self.sync();
    if (self.thread == 0) {
        __threadfence();
        store_release(run.ready + item.index, 1);
    }
}

/* One item of up to 8 * NT columns; S is the layout of the stages. */
template <int NT, class S>
static __device__ __forceinline__ void consume_item(const moe4_layer_run &run, const work_item &item, const group &self, block_shared *s,
                                                    uint32_t stages, ring *stage) {
    bool down = item.phase == MOE4_PHASE_DOWN, wide = run.act != MOE4_ACT_W4A16;
    int units = down ? run.w.intermediate_units : run.w.hidden_units, e = item.tile.expert;
    uint32_t x_offset = S::weight_bytes + (self.lane >> 2) * X_ROW_BYTES + self.warp * (MOE4_UNIT_K * 2) + (self.lane & 3) * 32;
    uint32_t unit_offset = self.r * STAGE_TILE_BYTES + self.warp * MOE4_UNIT_BYTES;

    /* What the end needs is asked for now; lane j has that of column 8j + warp. */
    float alpha = down ? run.w.alpha_down[e] : run.w.alpha_gate[e], up_alpha = down ? 0.f : run.w.alpha_up[e], my_factor = 1.f;
    int my_column = 8 * self.lane + self.warp, my_slot = 0;
    if (self.lane < NT && my_column < item.tile.n) {
        my_slot = run.slots[item.tile.first + my_column];
        if (wide && !down) my_factor = run.x_factor[x_row(run, my_slot)];
    }
    float acc[4][NT][4];
#pragma unroll
    for (int i = 0; i < 4 * NT * 4; i++) ((float *)acc)[i] = 0.f;

    for (int u = 0; u < units; u += MOE4_WARPS) {
        mbarrier_wait(smem_address(&s->full[stage->i]), stage->parity);
        uint32_t base = stages + (uint32_t)(stage->i * S::stage_bytes);
        if (u + self.warp < units) {
            uint4 b[NT][2];
#pragma unroll
            for (int j = 0; j < NT; j++) {
                b[j][0] = load_shared_16(base + x_offset + j * 8 * X_ROW_BYTES);
                b[j][1] = load_shared_16(base + x_offset + j * 8 * X_ROW_BYTES + 16);
            }
            uint2 scales = load_shared_8(base + unit_offset + MOE4_UNIT_CODE_BYTES + 8 * self.lane);
#pragma unroll
            for (int m = 0; m < 4; m++) {
                uint32_t scale_g, scale_g8;
                unit_scales(&scale_g, &scale_g8, scales, m);
                unit_tile_product<NT>(acc[m], load_shared_16(base + unit_offset + 512 * m + 16 * self.lane), scale_g, scale_g8, b);
            }
        }
        __syncwarp();
        if (self.lane == 0) mbarrier_arrive(smem_address(&s->empty[stage->i]));
        stage->next(S::n_stages);
        if (u == 0 && wide && down && self.lane < NT && my_column < item.tile.n) /* the rows have come, so their factors are there too */
            my_factor = __ldcg(run.h_factor + item.tile.first + my_column);
    }

#pragma unroll
    for (int j = 0; j < NT; j++) {
        int column = 8 * j + self.warp;
        self.sync(); /* the partial sums before these have been read */
#pragma unroll
        for (int m = 0; m < 4; m++) store_partials(self.partials + 8 * m, self.warp, self.lane, acc[m][j]);
        self.sync();
        float factor = __shfl_sync(0xFFFFFFFFu, my_factor, j);
        int slot = __shfl_sync(0xFFFFFFFFu, my_slot, j);
        if (column >= item.tile.n) continue;
        float2 sum = sum_partials(self.partials, self.warp, self.lane);
        if (down)
            store_o(run, slot, item.row_tile + self.r, self.lane, sum, alpha * factor);
        else
            store_h(run, item.tile.first + column, item.row_tile + self.r, self.lane, sum, alpha * factor, up_alpha * factor);
    }
    if (!down) finish_gate_up(run, item, self);
}

template <int NT, int R, int B>
static __device__ void consume(const moe4_layer_run &run, block_shared *s, uint32_t stages, float *partials) {
    using S = shape<NT, R, B>;
    int warp = threadIdx.x >> 5, r = warp / MOE4_WARPS;
    group self = {r,
                  warp % MOE4_WARPS,
                  (int)(threadIdx.x & 31),
                  (int)(threadIdx.x % GROUP_THREADS),
                  partials + r * MOE4_PARTIAL_FLOATS,
                  s->is_last + r};
    ring stage = {0, 0}, at = {0, 0};
    for (;;) {
        mbarrier_wait(smem_address(&s->item_full[at.i]), at.parity);
        const work_item &item = s->item[at.i];
        if (!item.phase) return;
        if (NT == 1 || item.tile.n <= 8)
            consume_item<1, S>(run, item, self, s, stages, &stage);
        else if (NT == 2 || item.tile.n <= 16)
            consume_item < NT<2 ? NT : 2, S>(run, item, self, s, stages, &stage);
        else
            consume_item<NT, S>(run, item, self, s, stages, &stage);
        __syncwarp();
        if (self.lane == 0) mbarrier_arrive(smem_address(&s->item_empty[at.i]));
        at.next(N_ITEMS);
    }
}

template <int NT, int R, int B>
static __global__ void __launch_bounds__(shape<NT, R, B>::threads, B)
    decode_kernel(const __grid_constant__ moe4_layer_run run, int phases) {
#if __CUDA_ARCH__ >= 900
    extern __shared__ __align__(128) uint8_t memory[];
    __shared__ __align__(8) block_shared s;
    using S = shape<NT, R, B>;
    float *partials = (float *)memory;
    uint32_t stages = smem_address(memory) + S::partial_bytes;
    int warp = threadIdx.x >> 5;
    if (threadIdx.x == 0) {
        for (int i = 0; i < S::n_stages; i++) {
            mbarrier_init(smem_address(&s.full[i]), 2);
            mbarrier_init(smem_address(&s.empty[i]), R * MOE4_WARPS);
        }
        for (int i = 0; i < N_ITEMS; i++) {
            mbarrier_init(smem_address(&s.item_full[i]), 1);
            mbarrier_init(smem_address(&s.item_empty[i]), R * MOE4_WARPS + 1);
        }
        mbarrier_init_fence();
    }
    __syncthreads();
    dependency_launch();
    dependency_wait();
    if (warp < R * MOE4_WARPS)
        consume<NT, R, B>(run, &s, stages, partials);
    else if (warp == R * MOE4_WARPS) {
        if ((threadIdx.x & 31) == 0) load_weights<NT, R, B>(run, phases, &s, stages);
    } else {
        load_activations<NT, R, B>(run, phases, &s, stages);
    }
#endif
}

typedef void (*decode_fn)(moe4_layer_run, int);

cudaError_t moe4_cuda_decode_sm90(const moe4_layer_run *run, int phases, int n_sms, cudaStream_t stream) {
    static const struct {
        int columns, row_tiles, blocks, threads, shared_bytes;
        decode_fn kernel;
    } kernels[] = {
#define KERNEL(nt, r, b) {8 * nt, r, b, shape<nt, r, b>::threads, shape<nt, r, b>::shared_bytes, decode_kernel<nt, r, b>}
        KERNEL(1, 1, 1), KERNEL(1, 1, 2), KERNEL(1, 2, 1), KERNEL(2, 1, 1),
        KERNEL(2, 1, 2), KERNEL(2, 2, 1), KERNEL(4, 1, 1)
#undef KERNEL
    };
    if (!(phases & MOE4_PHASE_GATE_UP)) { /* the tickets start again */
        cudaError_t error = cudaMemsetAsync(&run->state->ticket, 0, sizeof run->state->ticket, stream);
        if (error != cudaSuccess) return error;
    }
    for (const auto &k : kernels) {
        if (k.columns != run->tile_columns || k.row_tiles != run->row_tiles_per_item || k.blocks != run->blocks_per_sm) continue;
        cudaError_t error = cudaFuncSetAttribute(k.kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, k.shared_bytes);
        if (error != cudaSuccess) return error;
        return moe4_cuda_launch_early(k.kernel, dim3((unsigned)(n_sms * k.blocks)), k.threads, (size_t)k.shared_bytes, stream, *run,
                                      phases);
    }
    return cudaErrorInvalidValue;
}
