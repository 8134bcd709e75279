/* The products of a layer at the speed of memory, for few slots per expert (sm_90): one persistent kernel.
 *
 *   tickets 0 .. G-1        gate/up items (column tile of an expert x 64 or 128 rows): x -> h
 *   tickets G .. G+D-1      down items: h -> o; an item waits until its expert's h is ready, while its weights already stream
 *   round items             between them in the modes that round h to NVFP4: a column tile's rows, once its gate/up is done
 *
 *   16 warps  consume, in four groups of four that have 32 rows each. A warp takes two units of a stage, decodes them in registers and
 *             multiplies; at an item's end it leaves its partial sums in shared memory and goes on
 *   2 warps   finish: add the partial sums of eight columns at a time, store h or o, and tell the other blocks what is done
 *   a warp    draws tickets, fills a ring of stages with packed weights by bulk copies
 *   a warp    fills the same stages with the activation rows of the item's columns, gathered by index
 *
 * The kernel starts while `prepare` still works: what it does before it waits for that reads the call's inputs alone.
 *
 * A ticket is drawn before its item runs, gate/up items wait for nothing, round items for gate/up and down items for both: whoever waits,
 * waits for a block that is already running. There is no deadlock, whatever else holds the GPU's multiprocessors. */
#include "decode_activations.cuh"
#include "decode_weights.cuh"

/* ---- the warps that consume ---- */

/* Where a lane's first unit of the first stage stands; the second is half a stage's k further. */
struct consumer {
    uint32_t codes, scales, x;
};

template <class S> static __device__ int first_unit(void) {
    int warp = threadIdx.x >> 5, r = warp / MOE4_GROUP_WARPS;
    return warp % MOE4_GROUP_WARPS + (S::item_tiles == 1 ? r >> 1 : 0) * MOE4_GROUP_WARPS;
}

template <class S> static __device__ consumer make_consumer(uint32_t stages) {
    int r = threadIdx.x / (32 * MOE4_GROUP_WARPS), lane = threadIdx.x & 31, half = r & 1, tile = S::item_tiles == 1 ? 0 : r >> 1;
    uint32_t unit = stages + (uint32_t)((tile * S::units + first_unit<S>()) * MOE4_UNIT_BYTES);
    consumer c;
    c.codes = unit + (uint32_t)(half * MOE4_ROW_TILES * 512 + 16 * lane);
    c.scales = unit + (uint32_t)(MOE4_UNIT_CODE_BYTES + 8 * lane + 4 * half);
    c.x = stages + (uint32_t)(WEIGHT_BYTES + (lane >> 2) * S::x_row_bytes + first_unit<S>() * (MOE4_UNIT_K * 2) + (lane & 3) * 32);
    barriers::keep(&c.codes);
    barriers::keep(&c.scales);
    barriers::keep(&c.x);
    return c;
}

/* A warp's unit: packed weights of its 32 rows. */
struct unit_words {
    uint4 word[MOE4_ROW_TILES];
    uint32_t scales;
};

static __device__ __forceinline__ unit_words load_unit(uint32_t codes, uint32_t scales) {
    unit_words w;
    w.scales = load_shared_4(scales);
#pragma unroll
    for (int m = 0; m < MOE4_ROW_TILES; m++) w.word[m] = load_shared_16(codes + 512 * m);
    return w;
}

template <int NT, class S>
static __device__ __forceinline__ void multiply_unit(float acc[MOE4_ROW_TILES][NT][4], const unit_words &w, uint32_t x) {
    uint32_t scale_g[MOE4_ROW_TILES], scale_g8[MOE4_ROW_TILES];
#pragma unroll
    for (int m = 0; m < MOE4_ROW_TILES; m++) unit_scales(&scale_g[m], &scale_g8[m], w.scales, m);
#pragma unroll
    for (int p = 0; p < 2; p++) {
        uint4 b[NT];
#pragma unroll
        for (int j = 0; j < NT; j++) b[j] = load_shared_16(x + j * 8 * S::x_row_bytes + 16 * p);
#pragma unroll
        for (int m = 0; m < MOE4_ROW_TILES; m++)
            half_unit_product<NT>(acc[m], p ? w.word[m].z : w.word[m].x, p ? w.word[m].w : w.word[m].y, scale_g[m], scale_g8[m], b);
    }
}

/* An item of up to 8 * NT columns; S is the layout of the stages. With items of one row tile both units of a stage belong to one slice
 * of k, with two row tiles to two. */
template <int NT, class S>
static __device__ __forceinline__ void consume_item(int units, const consumer &self, const barriers &bar, float *partials, ring *stage,
                                                    round_ring *round) {
    constexpr int step = S::units / 2, n_slices = S::item_tiles;
    constexpr uint32_t unit_step = step * MOE4_UNIT_BYTES, x_step = step * MOE4_UNIT_K * 2;
    float acc[n_slices][MOE4_ROW_TILES][NT][4];
#pragma unroll
    for (int i = 0; i < n_slices * MOE4_ROW_TILES * NT * 4; i++) ((float *)acc)[i] = 0.f;
    for (int u = 0; u < units; u += S::units) {
        uint32_t at = (uint32_t)(stage->i * S::stage_bytes), codes = at + self.codes, scales = at + self.scales, x = at + self.x;
        mbarrier_wait(bar.full(stage->i), stage->parity);
        if (u + S::units <= units) {
            unit_words w = load_unit(codes, scales), next;
            if (NT < 3) next = load_unit(codes + unit_step, scales + unit_step); /* early, where registers allow */
            multiply_unit<NT, S>(acc[0], w, x);
            if (NT >= 3) next = load_unit(codes + unit_step, scales + unit_step);
            multiply_unit<NT, S>(acc[n_slices - 1], next, x + x_step);
        } else {
#pragma unroll
            for (int i = 0; i < 2; i++)
                if (u + first_unit<S>() + i * step < units)
                    multiply_unit<NT, S>(acc[i * (n_slices - 1)], load_unit(codes + i * unit_step, scales + i * unit_step), x + i * x_step);
        }
        mbarrier_arrive(bar.empty(stage->i));
        stage->next(S::n_stages);
    }
    if (n_slices == 2) add_slices<NT>(acc[0], acc[n_slices - 1]);
#pragma unroll
    for (int j = 0; j < NT; j++) {
        mbarrier_wait(bar.partial_empty(round->i()), round->parity());
        store_partials<NT>(partials + round->i() * ROUND_FLOATS + (threadIdx.x >> 5) * MOE4_WARP_FLOATS, threadIdx.x & 31, acc[0], j);
        mbarrier_arrive(bar.partial_full(round->i()));
        round->n++;
    }
}

/* ---- and that round h in between ---- */

static __device__ void consumer_sync(void) {
    barrier_sync(2, CONSUMER_WARPS * 32);
}

/* The half block of a row, once it has no mark left. */
static __device__ void load_marked(half_block *b, const moe4_layer_run &run) {
    const uint32_t *from = (const uint32_t *)(run.h_wide + half_block_at(b, run));
    uint4 v[2];
    do {
        v[0] = load_relaxed_16(from);
        v[1] = load_relaxed_16(from + 4);
    } while (v[0].x == MOE4_MARK || v[0].y == MOE4_MARK || v[0].z == MOE4_MARK || v[0].w == MOE4_MARK || v[1].x == MOE4_MARK ||
             v[1].y == MOE4_MARK || v[1].z == MOE4_MARK || v[1].w == MOE4_MARK);
    memcpy(b->v, v, sizeof v);
}

/* A row whose largest |h| nobody has summed up yet: a half block a thread at a time. */
static __device__ void round_marked_row(const moe4_layer_run &run, int row, int expert, block_shared *s) {
    int halves = run.w.intermediate_units * 8;
    half_block b = {row, (int)threadIdx.x, 0, {0.f}};
    for (int i = threadIdx.x; i < halves; i += CONSUMER_WARPS * 32) {
        half_block other = {row, i, 0, {0.f}};
        load_marked(&other, run);
        b.row_amax = max(b.row_amax, amax_bits_8(other.v));
        if (i == (int)threadIdx.x) memcpy(b.v, other.v, sizeof b.v);
    }
    b.row_amax = __reduce_max_sync(0xFFFFFFFFu, b.row_amax);
    if ((threadIdx.x & 31) == 0) s->amax[threadIdx.x >> 5] = b.row_amax;
    consumer_sync();
    for (int w = 0; w < CONSUMER_WARPS; w++) b.row_amax = max(b.row_amax, s->amax[w]);
    consumer_sync();
    for (; (b.i & ~31) < halves; b.i += CONSUMER_WARPS * 32) {
        uint32_t lanes = __ballot_sync(0xFFFFFFFFu, b.i < halves);
        if (b.i >= halves) continue;
        if (b.i != (int)threadIdx.x) load_marked(&b, run);
        round_half_block(&b, run, expert, NULL, lanes);
    }
}

/* A column tile's rows of h, by all consumers, once gate/up is done with them. */
template <class S> static __device__ void round_item(const moe4_layer_run &run, const moe4_tile &tile, int index, block_shared *s) {
    if (h_is_marked<S>(run)) {
        for (int row = tile.first; row < tile.first + tile.n; row++) round_marked_row(run, row, tile.expert, s);
        return;
    }
    if (threadIdx.x == 0)
        while (load_acquire(run.done + index) < FINISH_WARPS * items_of<S>(run.w.gate_up_tiles)) __nanosleep(32);
    consumer_sync();
    round_h_rows(run, tile, (int)threadIdx.x, CONSUMER_WARPS * 32, NULL);
}

template <int NT> static __device__ void consume(const moe4_layer_run &run, block_shared *s, uint32_t stages, float *partials) {
    using S = shape<NT>;
    barriers bar(s);
    if (run.act != MOE4_ACT_W4A16) dependency_wait(); /* round items read what `prepare` cleared */
    consumer self = make_consumer<S>(stages);
    ring stage = {0, 0};
    item_ring at = {0};
    round_ring round = {0};
    for (;;) {
        mbarrier_wait(bar.item_full(at.i()), at.parity());
        int phase = s->item[at.i()].phase, n = s->item[at.i()].tile.n;
        if (phase == PHASE_ROUND) {
            int index = s->item[at.i()].index;
            round_item<S>(run, s->item[at.i()].tile, index, s);
            consumer_sync();
            if (threadIdx.x == 0) store_release(run.ready + index, 1);
        }
        __syncwarp();
        if ((threadIdx.x & 31) == 0) mbarrier_arrive(bar.item_empty(at.i()));
        at.n++;
        if (!phase) return;
        if (phase == PHASE_ROUND) continue;
        int units = phase == MOE4_PHASE_DOWN ? run.w.intermediate_units : run.w.hidden_units;
        if (NT == 1 || n <= 8)
            consume_item<1, S>(units, self, bar, partials, &stage, &round);
        else if (NT == 2 || n <= 16)
            consume_item<(NT < 2 ? NT : 2), S>(units, self, bar, partials, &stage, &round);
        else
            consume_item<NT, S>(units, self, bar, partials, &stage, &round);
    }
}

/* ---- the warps that finish: each has its share of the rows ---- */

/* Eight columns from 8j on: a lane has two of them, and of its half of the item's rows those that its fragments have. Lane i brings slot
 * and factor of the item's column i. */
template <class S>
static __device__ __forceinline__ void finish_round(const moe4_layer_run &run, const work_item &item, const float *partials, int j, int me,
                                                    int my_slot, float my_factor, float alpha, float up_alpha) {
    constexpr int second = S::row_groups < GROUPS ? S::row_groups * MOE4_GROUP_FLOATS : 0;
    int lane = threadIdx.x & 31, g = lane >> 2;
#pragma unroll 1
    for (int i = 0; i < 2; i++) {
        int column = 8 * j + 2 * (lane & 3) + i, row = item.tile.first + column, slot = __shfl_sync(0xFFFFFFFFu, my_slot, column);
        float factor = __shfl_sync(0xFFFFFFFFu, my_factor, column);
        bool here = column < item.tile.n;
        uint32_t amax = 0;
#pragma unroll 1
        for (int q = me; q < S::row_groups; q += FINISH_WARPS) {
            int row0 = item.row_tile * MOE4_UNIT_ROWS + q * MOE4_GROUP_ROWS;
            float2 sum[MOE4_ROW_TILES]; /* both before the first is used: loads take long while others work in shared memory */
#pragma unroll
            for (int m = 0; m < MOE4_ROW_TILES; m++) sum[m] = sum_partials(partials + q * MOE4_GROUP_FLOATS, lane, m, i, second);
#pragma unroll
            for (int m = 0; m < MOE4_ROW_TILES; m++) {
                if (!here) continue;
                if (item.phase == MOE4_PHASE_DOWN)
                    store_o(run, slot, row0 + 16 * m + g, sum[m], alpha * factor);
                else
                    amax = max(amax, store_h(run, row, row0 / 2 + 8 * m + g, sum[m].x * (alpha * factor), sum[m].y * (up_alpha * factor)));
            }
        }
        if (item.phase == MOE4_PHASE_GATE_UP && run.h_amax) add_h_amax(run, row, amax, here);
    }
}

template <int NT> static __device__ void finish(const moe4_layer_run &run, const block_shared *s, const float *partials) {
    using S = shape<NT>;
    barriers bar(s);
    int lane = threadIdx.x & 31, me = (int)(threadIdx.x >> 5) - CONSUMER_WARPS;
    item_ring at = {0};
    round_ring round = {0};
    dependency_wait();
    for (;;) {
        mbarrier_wait(bar.item_full(at.i()), at.parity());
        work_item item = s->item[at.i()];
        __syncwarp();
        if (lane == 0) mbarrier_arrive(bar.item_empty(at.i()));
        at.n++;
        if (!item.phase) return;
        if (item.phase == PHASE_ROUND) continue;

        /* What the end needs is asked for now; lane i has that of column i. */
        bool down = item.phase == MOE4_PHASE_DOWN, mine = lane < item.tile.n, wide = (down ? run.h_factor : run.x_factor) != NULL;
        int e = item.tile.expert, my_slot = mine ? run.slots[item.tile.first + lane] : 0;
        float alpha = down ? run.w.alpha_down[e] : run.w.alpha_gate[e], up_alpha = down ? 0.f : run.w.alpha_up[e], my_factor = 1.f;
        if (mine && wide && !down) my_factor = run.x_factor[x_row(run, my_slot)];
        for (int j = 0; 8 * j < item.tile.n; j++) {
            mbarrier_wait(bar.partial_full(round.i()), round.parity());
            if (mine && wide && down && !j) my_factor = __ldcg(run.h_factor + item.tile.first + lane); /* it came with the rows */
            finish_round<S>(run, item, partials + round.i() * ROUND_FLOATS, j, me, my_slot, my_factor, alpha, up_alpha);
            mbarrier_arrive(bar.partial_empty(round.i()));
            round.n++;
        }
        if (down || h_is_marked<S>(run)) continue;
        __syncwarp();
        if (lane == 0) add_release(run.done + item.index, 1);
    }
}

/* ---- the kernel ---- */

template <int NT>
static __global__ void __launch_bounds__(THREADS, 1) decode_kernel(const __grid_constant__ moe4_layer_run run, int phases, bool early) {
#if __CUDA_ARCH__ >= 900
    extern __shared__ __align__(128) uint8_t memory[];
    __shared__ __align__(8) block_shared s;
    using S = shape<NT>;
    float *partials = (float *)memory;
    int *counts = (int *)memory; /* until the first item ends */
    uint32_t stages = smem_address(memory) + PARTIAL_BYTES;
    int warp = threadIdx.x >> 5;
    dependency_launch();
    if (threadIdx.x == 0) {
        for (int i = 0; i < S::n_stages; i++) {
            mbarrier_init(smem_address(&s.full[i]), 1 + 32); /* the weights' warp, and each lane of the activations' */
            mbarrier_init(smem_address(&s.empty[i]), CONSUMER_WARPS * 32);
        }
        for (int i = 0; i < N_ITEMS; i++) {
            mbarrier_init(smem_address(&s.item_full[i]), 1);
            mbarrier_init(smem_address(&s.item_empty[i]), CONSUMER_WARPS + FINISH_WARPS + 1);
        }
        for (int i = 0; i < N_ROUNDS; i++) {
            mbarrier_init(smem_address(&s.partial_full[i]), CONSUMER_WARPS * 32);
            mbarrier_init(smem_address(&s.partial_empty[i]), FINISH_WARPS * 32); /* at first the warp that looked at the counts */
        }
        mbarrier_init_fence();
    }
    if (early)
        count_slots(run, counts);
    else
        __syncthreads();
    if (warp < CONSUMER_WARPS) {
        if (NT > 2) registers_take<CONSUMER_REGISTERS>();
        consume<NT>(run, &s, stages, partials);
    } else {
        if (NT > 2) registers_give<OTHER_REGISTERS>();
        if (warp < WEIGHT_WARP)
            finish<NT>(run, &s, partials);
        else if (warp == WEIGHT_WARP)
            load_weights<NT>(run, phases, &s, stages, early ? counts : NULL);
        else
            load_activations<NT>(run, phases, &s, stages);
    }
#endif
}

typedef void (*decode_fn)(moe4_layer_run, int, bool);

template <int NT> static cudaError_t launch(const moe4_layer_run *run, int phases, int n_sms, cudaStream_t stream) {
    using S = shape<NT>;
    decode_fn kernel = decode_kernel<NT>;
    bool early = run->slots_are == MOE4_SLOTS_BY_ID && !run->prefill_from && run->w.n * (int)sizeof(int) <= PARTIAL_BYTES &&
                 (long long)run->n_tokens * run->top_k <= 4 * THREADS;
    cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, S::shared_bytes);
    if (error != cudaSuccess) return error;
    return moe4_cuda_launch_early(kernel, dim3((unsigned)n_sms), THREADS, (size_t)S::shared_bytes, stream, *run, phases, early);
}

cudaError_t moe4_cuda_decode_sm90(const moe4_layer_run *run, int phases, int n_sms, cudaStream_t stream) {
    if (!(phases & MOE4_PHASE_GATE_UP)) { /* the tickets start again */
        cudaError_t error = cudaMemsetAsync(&run->state->ticket, 0, sizeof run->state->ticket, stream);
        if (error != cudaSuccess) return error;
    }
    switch (run->tile_columns) {
    case 8: return launch<1>(run, phases, n_sms, stream);
    case 16: return launch<2>(run, phases, n_sms, stream);
    case 24: return launch<3>(run, phases, n_sms, stream);
    default: return cudaErrorInvalidValue;
    }
}
