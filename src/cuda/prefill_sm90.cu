/* The products of a layer at the speed of the tensor cores, for many slots per expert (sm_90): one persistent kernel.
 *
 *   Weights are wgmma's A, decoded from packed NVFP4 into registers while the wgmma before run; activations are B, up to 256 slots of an
 *   expert in shared memory. Tickets 0 .. G-1 are gate/up items (128 rows x the slots of a tile), the next are down items, which wait
 *   until their tile's h is there. An expert's items are neighbours, so that its weights and rows meet in L2.
 *
 *   2 to 4 warpgroups  consume, 64 rows each
 *   a warp             draws tickets and fills a ring of stages with packed weights and activations by bulk copies
 *   three warps        look up what the end of an item needs: rows, slots, factors
 *
 * Activations stand in memory as wgmma wants them in shared memory (prefill.cuh): prefill_gather.cu puts x so, gate/up puts h so. */
#include "launch.cuh"
#include "prefill.cuh"
#include "product.cuh"
#include "wgmma.cuh"

#define N_ITEMS 3
#define MAX_STAGES 8
#define LOADERS 128
#define CONSUMERS_BARRIER 1

/* A kernel: its consuming warpgroups, each with 64 rows of an item, and the columns that an item may have. wgmma with A in registers takes
 * 64 cycles whatever its columns, up to 128: with few columns more rows help, with many the registers end. */
template <int GROUPS, int COLUMNS> struct prefill_shape {
    static constexpr int groups = GROUPS, columns = COLUMNS, threads = GROUPS * 128 + LOADERS;
    static constexpr int b_bytes = COLUMNS * 128,
                         w_bytes = GROUPS * 2 * MOE4_UNIT_BYTES; /* of a stage: 64 k of all columns, or 128 k of half */
    static constexpr int n_fit = 214 * 1024 / (b_bytes + w_bytes), n_stages = n_fit < MAX_STAGES ? n_fit : MAX_STAGES;
    static constexpr int shared_bytes = 1024 + n_stages * (b_bytes + w_bytes);
    static constexpr int buffers = GROUPS == 2 ? 3 : 2; /* of fragments: three keep a unit's wgmma under way past its end */
    static constexpr int consumer_registers = GROUPS == 2 ? 224 : GROUPS == 3 ? 152 : 104, loader_registers = 56;
    /* Units of 64 k in a stage of n columns. */
    static __device__ __forceinline__ int units(int n) { return 2 * n <= COLUMNS ? 2 : 1; }
    static __host__ __device__ constexpr int items(int row_tiles) { return (row_tiles + GROUPS - 1) / GROUPS; }
};

struct prefill_item {
    moe4_tile tile;
    int phase;    /* 0: no more work */
    int index;    /* of the tile */
    int row_tile; /* first of the item's */
    int n_tiles;  /* row tiles */
    int units;    /* of k */
    int nt;       /* columns, rounded up */
};

struct column {
    int row; /* of h, or the slot whose o it is */
    float factor;
};

template <class S> struct prefill_shared {
    uint64_t full[MAX_STAGES], empty[MAX_STAGES], item_full[N_ITEMS], item_empty[N_ITEMS];
    uint64_t columns_full[N_ITEMS];
    prefill_item item[N_ITEMS];
    column columns[N_ITEMS][S::columns];
};

/* ---- the loading warps ---- */

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
    item.row_tile = local / head.n_tiles * S::groups;
    item.index = head.head + local % head.n_tiles;
    item.tile = run.prefill_tiles[item.index];
    bool down = item.phase == MOE4_PHASE_DOWN;
    item.units = down ? run.w.intermediate_units : run.w.hidden_units;
    item.n_tiles = min(S::groups, (down ? run.w.down_tiles : run.w.gate_up_tiles) - item.row_tile);
    item.nt = prefill_columns(item.tile.n);
    return item;
}

/* One thread: tickets, weights, activations. */
template <class S>
static __device__ __forceinline__ void load_items(const moe4_layer_run &run, int phases, prefill_shared<S> *s, uint32_t stages) {
    prefill_ring stage = {0, 0}, at = {0, 0};
    uint64_t once = policy_evict_first();
    int next = atomicAdd(&run.state->prefill_ticket, 1);
    for (;;) {
        prefill_item item = place_item<S>(run, phases, next);
        mbarrier_wait(smem_address(&s->item_empty[at.i]), at.parity ^ 1);
        s->item[at.i] = item;
        mbarrier_arrive(smem_address(&s->item_full[at.i]));
        at.next(N_ITEMS);
        if (!item.phase) return;
        next = atomicAdd(&run.state->prefill_ticket, 1); /* its latency passes while the stages load */
        bool down = item.phase == MOE4_PHASE_DOWN;
        if (down && phases & MOE4_PHASE_GATE_UP) {
            while (load_acquire(run.prefill_done + item.index) < S::items(run.w.gate_up_tiles)) __nanosleep(32);
            fence_proxy_async();
        }
        int step = S::units(item.nt);
        uint32_t unit_bytes = (uint32_t)item.nt * 128;
        const uint8_t *rows = (const uint8_t *)prefill_tile(down ? run.h_tiles : run.x_tiles, item.tile, item.index, item.units);
        const uint8_t *weights = (down ? run.w.down + (size_t)item.tile.expert * run.w.down_bytes
                                       : run.w.gate_up + (size_t)item.tile.expert * run.w.gate_up_bytes) +
                                 (size_t)item.row_tile * (size_t)item.units * MOE4_UNIT_BYTES;
        for (int u = 0; u < item.units; u += step) {
            uint32_t n = (uint32_t)min(step, item.units - u), full = smem_address(&s->full[stage.i]);
            uint32_t w = stages + (uint32_t)(S::n_stages * S::b_bytes + stage.i * S::w_bytes);
            mbarrier_wait(smem_address(&s->empty[stage.i]), stage.parity ^ 1);
            mbarrier_arrive_expect(full, n * ((uint32_t)item.n_tiles * MOE4_UNIT_BYTES + unit_bytes));
            bulk_load(stages + (uint32_t)(stage.i * S::b_bytes), rows, n * unit_bytes, full);
            rows += n * unit_bytes;
#pragma unroll
            for (int r = 0; r < S::groups; r++) {
                if (r >= item.n_tiles) break;
                bulk_load_streaming(w + (uint32_t)r * 2 * MOE4_UNIT_BYTES,
                                    weights + ((size_t)r * (size_t)item.units + (size_t)u) * MOE4_UNIT_BYTES, n * MOE4_UNIT_BYTES, full,
                                    once);
            }
            stage.next(S::n_stages);
        }
    }
}

/* Three warps: where the columns of an item go, and their factors. */
template <class S> static __device__ __forceinline__ void look_up_columns(const moe4_layer_run &run, prefill_shared<S> *s, int t) {
    prefill_ring at = {0, 0};
    for (;;) {
        mbarrier_wait(smem_address(&s->item_full[at.i]), at.parity);
        const prefill_item &item = s->item[at.i];
        if (!item.phase) return;
        bool down = item.phase == MOE4_PHASE_DOWN;
        for (int c = t; c < item.tile.n; c += LOADERS - 32) {
            int r = item.tile.first + c, slot = run.slots[r];
            float factor = run.act == MOE4_ACT_W4A16 ? 1.f : down ? run.h_factor[r] : run.x_factor[x_row(run, slot)];
            s->columns[at.i][c] = {down ? slot : r, factor};
        }
        __syncwarp();
        if ((t & 31) == 0) mbarrier_arrive(smem_address(&s->columns_full[at.i]));
        at.next(N_ITEMS);
    }
}

/* ---- the consuming warpgroups ---- */

template <class S> struct consumer {
    prefill_shared<S> *s;
    uint32_t b, w; /* the rings of activations and of weights; w is this lane's place */
    int group, warp, lane;
    prefill_ring stage;
};

/* A lane's part of a unit: the words of four A fragments, one for each 16 k, and the scales of its two rows. */
struct unit_words {
    uint4 w;
    uint32_t scale_g, scale_g8;
};

static __device__ __forceinline__ uint32_t load_shared_2(uint32_t address) {
    uint16_t v;
    asm volatile("ld.shared.u16 %0, [%1];" : "=h"(v) : "r"(address));
    return v;
}

/* Where a unit stands: its stage, and its place there. */
struct unit_place {
    prefill_ring stage;
    int in_stage;
    __device__ __forceinline__ void next(int n_in_stage, int n_stages) {
        if (++in_stage < n_in_stage) return;
        in_stage = 0;
        stage.next(n_stages);
    }
};

template <class S> static __device__ __forceinline__ unit_words load_unit(const consumer<S> *self, const unit_place &at) {
    if (!at.in_stage) mbarrier_wait(smem_address(&self->s->full[at.stage.i]), at.stage.parity);
    uint32_t w = self->w + (uint32_t)(at.stage.i * S::w_bytes + at.in_stage * MOE4_UNIT_BYTES);
    unit_words u;
    u.w = load_shared_16(w + 512 * self->warp + 16 * self->lane);
    uint32_t scales = load_shared_2(w + MOE4_UNIT_CODE_BYTES + 8 * self->lane + 2 * self->warp);
    u.scale_g = scale_multiplier<0>(scales);
    u.scale_g8 = scale_multiplier<1>(scales);
    return u;
}

/* A unit of 64 k by the fragments in `a`, and between its steps the next unit decoded into `b`: a warp waits at each wgmma until the one
 * before it has begun, which is the time to decode in. */
template <int NT, class S>
static __device__ __forceinline__ void multiply_unit(float (&acc)[S::columns / 2], const uint32_t (&a)[16], uint32_t (&b)[16],
                                                     uint64_t operand, int accumulate, const unit_words &next) {
    wgmma_fence();
    wgmma<NT>::add(acc, a, operand, accumulate);
    decode_word(b, next.w.x, next.scale_g, next.scale_g8);
    wgmma<NT>::add(acc, a + 4, operand + 2, 1);
    decode_word(b + 4, next.w.y, next.scale_g, next.scale_g8);
    wgmma<NT>::add(acc, a + 8, operand + 4, 1);
    decode_word(b + 8, next.w.z, next.scale_g, next.scale_g8);
    wgmma<NT>::add(acc, a + 12, operand + 6, 1);
    decode_word(b + 12, next.w.w, next.scale_g, next.scale_g8);
}

/* Unit u: `next` are the words of unit u + 1, and then those of unit u + 2. Only the switch knows the number of columns: with a loop for
 * each, the compiler would give each its own registers. */
template <class S>
static __device__ __forceinline__ void product_step(float (&acc)[S::columns / 2], const uint32_t (&a)[16], uint32_t (&b)[16],
                                                    unit_words *next, const consumer<S> *self, unit_place *at, unit_place *ahead, int nt,
                                                    int u, int units, int *held) {
    uint64_t operand = wgmma_operand(self->b + (uint32_t)(at->stage.i * S::b_bytes + at->in_stage * nt * 128));
    switch (nt / 16) {
#define CASE(i)                                                                                     \
    case i:                                                                                         \
        if constexpr (16 * i <= S::columns) multiply_unit<16 * i, S>(acc, a, b, operand, u, *next); \
        break
        CASE(1);
        CASE(2);
        CASE(3);
        CASE(4);
        CASE(5);
        CASE(6);
        CASE(7);
        CASE(8);
        CASE(9);
        CASE(10);
        CASE(11);
        CASE(12);
        CASE(13);
        CASE(14);
        CASE(15);
        CASE(16);
#undef CASE
    }
    wgmma_commit();
    if (u + 2 < units) {
        ahead->next(S::units(nt), S::n_stages);
        *next = load_unit(self, *ahead);
    }
    int stage = at->stage.i;
    at->next(u + 1 < units ? S::units(nt) : 1, S::n_stages);
    if constexpr (S::buffers == 3) {
        wgmma_wait<1>();
        if (*held >= 0 && self->lane == 0) mbarrier_arrive(smem_address(&self->s->empty[*held]));
        *held = at->in_stage ? -1 : stage;
    } else {
        wgmma_wait<0>();
        if (!at->in_stage && self->lane == 0) mbarrier_arrive(smem_address(&self->s->empty[stage]));
    }
}

template <class S> static __device__ __forceinline__ void product(float (&acc)[S::columns / 2], consumer<S> *self, int nt, int units) {
    uint32_t a[16], b[16], c[16];
    int held = -1; /* the stage that the wgmma under way were the last to read; or none */
    unit_place at = {self->stage, 0}, ahead = at;
    unit_words next = load_unit(self, ahead);
    decode_word(a, next.w.x, next.scale_g, next.scale_g8);
    decode_word(a + 4, next.w.y, next.scale_g, next.scale_g8);
    decode_word(a + 8, next.w.z, next.scale_g, next.scale_g8);
    decode_word(a + 12, next.w.w, next.scale_g, next.scale_g8);
    if (units > 1) {
        ahead.next(S::units(nt), S::n_stages);
        next = load_unit(self, ahead);
    }
    if constexpr (S::buffers == 3) {
#pragma unroll 1
        for (int u = 0; u < units; u += 3) {
            product_step<S>(acc, a, b, &next, self, &at, &ahead, nt, u, units, &held);
            if (u + 1 >= units) break;
            product_step<S>(acc, b, c, &next, self, &at, &ahead, nt, u + 1, units, &held);
            if (u + 2 >= units) break;
            product_step<S>(acc, c, a, &next, self, &at, &ahead, nt, u + 2, units, &held);
        }
    } else {
#pragma unroll 1
        for (int u = 0; u < units; u += 2) {
            product_step<S>(acc, a, b, &next, self, &at, &ahead, nt, u, units, &held);
            if (u + 1 < units) product_step<S>(acc, b, a, &next, self, &at, &ahead, nt, u + 1, units, &held);
        }
    }
    wgmma_wait<0>();
    if (held >= 0 && self->lane == 0) mbarrier_arrive(smem_address(&self->s->empty[held]));
    self->stage = at.stage;
}

/* The gated unit, thread by thread; neighbours in g exchange halves, so that a lane stores two features of one slot. */
template <class S>
static __device__ __forceinline__ void store_gated(const moe4_layer_run &run, const float (&acc)[S::columns / 2], const prefill_item &item,
                                                   const column *columns, int feature, int lane) {
    const moe4_tile &tile = item.tile;
    int c = lane & 3, odd = lane >> 2 & 1, even_feature = feature & ~1;
    size_t ld = (size_t)run.w.intermediate_units * MOE4_UNIT_K;
    float gate_alpha = run.w.alpha_gate[tile.expert], up_alpha = run.w.alpha_up[tile.expert];
    bool wide = run.act != MOE4_ACT_W4A16;
    char *h =
        (char *)prefill_tile(run.h_tiles, tile, item.index, run.w.intermediate_units) + (size_t)(even_feature >> 6) * (size_t)item.nt * 128;
    prefill_place place = prefill_pair(even_feature);
    float *h_wide = run.h_wide + (size_t)tile.first * ld + even_feature;
#pragma unroll
    for (int j = 0; j < S::columns / 8; j++) {
        int at = 8 * j + 2 * c;
        if (8 * j >= tile.n) break;
        float f0 = wide ? columns[at].factor : 1.f, f1 = wide ? columns[at + 1].factor : 1.f;
        float h0 = fast_gated_unit(run, acc[4 * j] * (gate_alpha * f0), acc[4 * j + 2] * (up_alpha * f0));
        float h1 = fast_gated_unit(run, acc[4 * j + 1] * (gate_alpha * f1), acc[4 * j + 3] * (up_alpha * f1));
        float other = __shfl_xor_sync(0xFFFFFFFFu, odd ? h0 : h1, 4);
        float lo = odd ? other : h0, hi = odd ? h1 : other;
        int row = at + odd;
        if (row >= tile.n) continue;
        if (wide) {
            *(float2 *)(h_wide + (size_t)row * ld) = make_float2(lo, hi);
        } else {
            *(__nv_bfloat162 *)(h + prefill_offset(row, place)) = __floats2bfloat162_rn(lo, hi);
        }
    }
}

template <class S>
static __device__ __forceinline__ void store_down(const moe4_layer_run &run, const float (&acc)[S::columns / 2], const moe4_tile &tile,
                                                  const column *columns, int n, int lane) {
    float alpha = run.w.alpha_down[tile.expert];
    bool wide = run.act != MOE4_ACT_W4A16, low = n < run.w.hidden, high = n + 8 < run.w.hidden;
    float *o = run.o + n;
#pragma unroll
    for (int j = 0; j < S::columns / 8; j++) {
        if (8 * j >= tile.n) break;
#pragma unroll
        for (int i = 0; i < 2; i++) {
            int at = 8 * j + 2 * (lane & 3) + i;
            if (at >= tile.n) continue;
            column col = columns[at];
            float *to = o + (size_t)col.row * (size_t)run.w.hidden, f = wide ? alpha * col.factor : alpha;
            if (low) to[0] = acc[4 * j + i] * f;
            if (high) to[8] = acc[4 * j + 2 + i] * f;
        }
    }
}

template <class S>
static __device__ __forceinline__ void consume_item(const moe4_layer_run &run, const prefill_item &item, const column *columns,
                                                    const prefill_ring &at, consumer<S> *self) {
    bool down = item.phase == MOE4_PHASE_DOWN;
    float acc[S::columns / 2];
    product<S>(acc, self, item.nt, item.units);
    mbarrier_wait(smem_address(&self->s->columns_full[at.i]), at.parity);
    int row = (item.row_tile + self->group) * MOE4_UNIT_ROWS + 16 * self->warp;
    if (down)
        store_down<S>(run, acc, item.tile, columns, row + (self->lane >> 2), self->lane);
    else if (row < run.w.gate_up_tiles * MOE4_UNIT_ROWS)
        store_gated<S>(run, acc, item, columns, row / 2 + (self->lane >> 2), self->lane);
}

template <class S> static __device__ __forceinline__ void consume_items(const moe4_layer_run &run, prefill_shared<S> *s, uint32_t stages) {
    int group = (int)threadIdx.x / 128, lane = threadIdx.x & 31, warp = (int)(threadIdx.x >> 5) & 3;
    consumer<S> self = {s, stages, stages + (uint32_t)(S::n_stages * S::b_bytes + group * 2 * MOE4_UNIT_BYTES), group, warp, lane, {0, 0}};
    prefill_ring at = {0, 0};
    for (;;) {
        mbarrier_wait(smem_address(&s->item_full[at.i]), at.parity);
        const prefill_item &item = s->item[at.i];
        if (!item.phase) return;
        consume_item<S>(run, item, s->columns[at.i], at, &self);
        if (item.phase == MOE4_PHASE_GATE_UP) {
            barrier_sync(CONSUMERS_BARRIER, S::groups * 128);
            if (threadIdx.x == 0) {
                fence_proxy_async(); /* h will be read by bulk copies */
                add_release(run.prefill_done + item.index, 1);
            }
        }
        __syncwarp();
        if (lane == 0) mbarrier_arrive(smem_address(&s->item_empty[at.i]));
        at.next(N_ITEMS);
    }
}

template <class S>
static __global__ void __launch_bounds__(S::threads, 1) prefill_kernel(const __grid_constant__ moe4_layer_run run, int phases) {
#if __CUDA_ARCH__ >= 900
    extern __shared__ uint8_t memory[];
    __shared__ __align__(16) prefill_shared<S> s;
    uint32_t stages = (smem_address(memory) + 1023) & ~1023u;
    if (threadIdx.x == 0) {
        for (int i = 0; i < S::n_stages; i++) {
            mbarrier_init(smem_address(&s.full[i]), 1);
            mbarrier_init(smem_address(&s.empty[i]), S::groups * 4);
        }
        for (int i = 0; i < N_ITEMS; i++) {
            mbarrier_init(smem_address(&s.item_full[i]), 1);
            mbarrier_init(smem_address(&s.item_empty[i]), S::groups * 4);
            mbarrier_init(smem_address(&s.columns_full[i]), LOADERS / 32 - 1);
        }
        mbarrier_init_fence();
    }
    __syncthreads();
    dependency_launch();
    dependency_wait();
    if (threadIdx.x >= S::groups * 128) {
        registers_shrink<S::loader_registers>();
        int t = (int)threadIdx.x - S::groups * 128;
        if (t >= 32)
            look_up_columns<S>(run, &s, t - 32);
        else if (t == 0)
            load_items<S>(run, phases, &s, stages);
    } else {
        registers_grow<S::consumer_registers>();
        consume_items<S>(run, &s, stages);
    }
#endif
}

template <class S> static cudaError_t launch(const moe4_layer_run *run, int phases, int n_sms, cudaStream_t stream) {
    cudaError_t error = cudaFuncSetAttribute(prefill_kernel<S>, cudaFuncAttributeMaxDynamicSharedMemorySize, S::shared_bytes);
    if (error != cudaSuccess) return error;
    return moe4_cuda_launch_early(prefill_kernel<S>, dim3((unsigned)n_sms), S::threads, S::shared_bytes, stream, *run, phases);
}

cudaError_t moe4_cuda_prefill_sm90(const moe4_layer_run *run, int phases, int n_sms, cudaStream_t stream) {
    if (!(phases & MOE4_PHASE_GATE_UP)) { /* the tickets start again */
        cudaError_t error = cudaMemsetAsync(&run->state->prefill_ticket, 0, sizeof run->state->prefill_ticket, stream);
        if (error != cudaSuccess) return error;
    }
    switch (run->prefill_columns) {
    case 64: return launch<prefill_shape<4, 64>>(run, phases, n_sms, stream);
    case 80: return launch<prefill_shape<4, 80>>(run, phases, n_sms, stream);
    case 160: return launch<prefill_shape<3, 160>>(run, phases, n_sms, stream);
    default: return launch<prefill_shape<2, 256>>(run, phases, n_sms, stream);
    }
}
