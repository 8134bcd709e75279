/* The decode kernel's work items and its rings of stages (decode_sm90.cu has the whole picture). */
#ifndef MOE4_CUDA_DECODE_ITEMS_CUH
#define MOE4_CUDA_DECODE_ITEMS_CUH

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

#endif
