/* The products of a layer at the speed of the tensor cores, for many slots per expert (sm_90): one persistent kernel.
 *
 *   Weights are wgmma's A, decoded from packed NVFP4 into registers while the wgmma before run; activations are B, up to 256 slots of an
 *   expert in shared memory. Tickets 0 .. G-1 are gate/up items (128 to 384 rows x the slots of a tile), the next are down items, which
 *   wait until their tile's h is there. An expert's items are neighbours, so that its weights and rows meet in L2. In the modes that round
 *   h, parts of a tile's rows are items too, as soon as its gate/up is done.
 *
 *   2 or 3 warpgroups  consume, a row tile of 64 each; two each where a tile has few columns; or round h, a warp a row
 *   a warp             draws tickets, and tells the other blocks when gate/up is done
 *   a warp             fills a ring of stages with activations by bulk copies
 *   two warps          fill the same stages with packed weights, and look up what the end of an item needs: rows, slots, factors
 *
 * Activations stand in memory as wgmma wants them in shared memory (prefill.cuh): prepare.cu and round_rows.cu put x so, gate/up h. */
#define MOE4_NO_CALLS
#include "launch.cuh"
#include "prefill_product.cuh"
#include "prefill_queue.cuh"
#include "prefill_rounds.cuh"
#include "prefill_store.cuh"

/* threadIdx.x, opaque: what depends on it cannot be computed ahead, in registers that the products need. */
static __device__ __forceinline__ int thread_again(void) {
    int t;
    asm volatile("mov.u32 %0, %%tid.x;" : "=r"(t));
    return t;
}

template <class S>
static __device__ __forceinline__ void consume_item(const moe4_layer_run &run, prefill_shared<S> *s, const prefill_ring &at,
                                                    consumer<S> *self) {
    const prefill_item &item = s->item[at.i];
    const column *columns = s->columns[at.i];
    float acc[S::tiles][S::columns / 2];
#pragma unroll
    for (int t = 0; t < S::tiles; t++)
#pragma unroll
        for (int i = 0; i < S::columns / 2; i++) acc[t][i] = 0.f;
    product<S, PREFILL_FEWEST / 8, S::columns / 8>(acc, self, max(item.tile.n + 7, PREFILL_FEWEST) / 8, item.units,
                                                   (uint32_t)item.nt * 128);
    mbarrier_wait(smem_address(&s->columns_full[at.i]), at.parity);
    int thread = thread_again(), group = thread / 128;
#pragma unroll
    for (int t = 0; t < S::tiles; t++) {
        int tile = group * S::tiles + t;
        prefill_thread place = {item.row_tile + tile, thread / 32 & 3, thread % 32 / 4, thread & 3};
        if (tile >= item.n_tiles) break;
        if (item.phase != MOE4_PHASE_DOWN)
            store_gated<S::columns>(run, acc[t], item, columns, place);
        else if (run.result.y)
            store_result<S::columns>(run, acc[t], item, columns, place);
        else
            store_outputs<S::columns>(run, acc[t], item, columns, place);
    }
}

template <class S> static __device__ __forceinline__ void consume_items(const moe4_layer_run &run, prefill_shared<S> *s, uint32_t stages) {
    int group = (int)threadIdx.x / 128, lane = threadIdx.x & 31, warp = (int)(threadIdx.x >> 5) & 3;
    uint32_t first = (uint32_t)(S::weights + group * S::tiles * S::tile_bytes);
    consumer<S> self = {{stages, 0, S::n_stages},
                        first + (uint32_t)(512 * warp + 16 * lane),
                        first + (uint32_t)(MOE4_UNIT_CODE_BYTES + 8 * lane + 2 * warp),
                        lane == 0};
    asm volatile("" : "+r"(self.codes), "+r"(self.scales)); /* or they are worked out again for every stage */
    prefill_ring at = {0, 0};
    for (;;) {
        mbarrier_wait(smem_address(&s->item_full[at.i]), at.parity);
        int phase = s->item[at.i].phase;
        if (!phase) return;
        if (S::rounds && phase == PREFILL_ROUND) {
            mbarrier_wait(smem_address(&s->columns_full[at.i]), at.parity); /* the loaders have read the item */
            round_rows<S>(run, s->item[at.i]);
        } else {
            consume_item<S>(run, s, at, &self);
        }
        __syncwarp();
        if (S::rounds || lane == 0) mbarrier_arrive(smem_address(&s->item_empty[at.i])); /* every lane, so that racecheck follows */
        at.next(PREFILL_ITEMS);
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
            mbarrier_init(stages + (uint32_t)(i * S::stage_bytes + S::full), 1);
            mbarrier_init(stages + (uint32_t)(i * S::stage_bytes + S::empty), S::groups * 4);
        }
        for (int i = 0; i < PREFILL_ITEMS; i++) {
            mbarrier_init(smem_address(&s.item_full[i]), 1);
            mbarrier_init(smem_address(&s.item_empty[i]), S::groups * (S::rounds ? 128 : 4));
            mbarrier_init(smem_address(&s.columns_full[i]), 32 * WEIGHT_WARPS + S::rounds);
        }
        mbarrier_init(smem_address(&s.wanted), 1);
        mbarrier_init_fence();
    }
    __syncthreads();
    dependency_launch();
    dependency_wait();
    if (threadIdx.x >= S::groups * 128) {
        registers_shrink<S::loader_registers>();
        int t = (int)threadIdx.x - S::groups * 128;
        if (t >= PREFILL_LOADERS - 32 * WEIGHT_WARPS)
            load_items<S>(run, &s, stages, t - (PREFILL_LOADERS - 32 * WEIGHT_WARPS));
        else if (t == 32)
            draw_items<S>(run, phases, &s);
        else if (t == 0)
            load_rows<S>(run, &s, stages);
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

template <bool ROUNDS> static cudaError_t launch_width(const moe4_layer_run *run, int phases, int n_sms, cudaStream_t stream) {
    switch (run->prefill_columns) {
    case 80: return launch<prefill_shape<3, 2, 80, 2, ROUNDS>>(run, phases, n_sms, stream);
    case 192: return launch<prefill_shape<3, 1, 192, 2, ROUNDS>>(run, phases, n_sms, stream);
    default: return launch<prefill_shape<2, 1, 256, 1, ROUNDS>>(run, phases, n_sms, stream);
    }
}

cudaError_t moe4_cuda_prefill_sm90(const moe4_layer_run *run, int phases, int n_sms, cudaStream_t stream) {
    if (!(phases & MOE4_PHASE_GATE_UP)) { /* the tickets start again */
        cudaError_t error = cudaMemsetAsync(&run->state->prefill_ticket, 0, sizeof run->state->prefill_ticket, stream);
        if (error != cudaSuccess) return error;
    }
    bool rounds = phases == (MOE4_PHASE_GATE_UP | MOE4_PHASE_DOWN) && run->act != MOE4_ACT_W4A16;
    return rounds ? launch_width<true>(run, phases, n_sms, stream) : launch_width<false>(run, phases, n_sms, stream);
}
