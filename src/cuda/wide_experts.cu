/* Experts of unquantized weights: fp32 products of fp32 rows with weights as they are stored. A block has 32 rows of a matrix (of gate and
 * of up together) against the columns of a tile. A lane has a row and reads 64 bytes of it at a time, straight into registers, the next
 * already on their way; the eight warps take such chunks of k in turn, and their sums are added in the order of the warps. So
 * the order of a sum depends on K alone, and nobody waits for anybody before the end. */
#include "gate.cuh"
#include "product.cuh"

#define THREADS 256
#define WARPS (THREADS / 32) /* slices of k */
#define ROWS 32
#define CHUNK_BYTES 64 /* of a row of weights: 32 k, in fp32 16 */
#define CHUNK_LOADS (CHUNK_BYTES / 16)
#define MOST_COLUMNS 16 /* at once */
#define ROUND 8         /* columns whose sums meet at once: one for each warp */

struct block_shared {
    const float *x[MOST_COLUMNS]; /* the row that each column multiplies */
    float sums[WARPS][2][ROUND][ROWS + 1];
};

/* w[i] from the 16 bytes of a row: 8 of them, in fp32 4. */
static __device__ __forceinline__ void widen_16_bytes(float w[8], uint4 raw, moe4_dtype dtype) {
    const uint32_t words[4] = {raw.x, raw.y, raw.z, raw.w};
    if (dtype == MOE4_F32) {
#pragma unroll
        for (int i = 0; i < 4; i++) w[i] = __uint_as_float(words[i]);
    } else if (dtype == MOE4_BF16) {
#pragma unroll
        for (int i = 0; i < 8; i++) w[i] = __uint_as_float(i & 1 ? words[i / 2] & 0xFFFF0000u : words[i / 2] << 16);
    } else {
#pragma unroll
        for (int i = 0; i < 8; i++) w[i] = __half2float(__ushort_as_half((uint16_t)(words[i / 2] >> 16 * (i & 1))));
    }
}

template <int MATRICES>
static __device__ __forceinline__ void load_chunk(uint4 raw[MATRICES][CHUNK_LOADS], const char *const w[2], size_t at) {
#pragma unroll
    for (int m = 0; m < MATRICES; m++)
#pragma unroll
        for (int i = 0; i < CHUNK_LOADS; i++) raw[m][i] = __ldcs((const uint4 *)(w[m] + at) + i);
}

/* sum[matrix][column] += 4 k of w times the columns' x at k. */
template <int MATRICES, int C>
static __device__ __forceinline__ void add_products(float sum[MATRICES][C], const float w[MATRICES][8], int first, const block_shared *s,
                                                    int k) {
#pragma unroll
    for (int c = 0; c < C; c++) {
        float4 x = *(const float4 *)(s->x[c] + k);
#pragma unroll
        for (int m = 0; m < MATRICES; m++) {
            float a = sum[m][c];
            a = fmaf(w[m][first], x.x, a);
            a = fmaf(w[m][first + 1], x.y, a);
            a = fmaf(w[m][first + 2], x.z, a);
            sum[m][c] = fmaf(w[m][first + 3], x.w, a);
        }
    }
}

/* This warp's share of k for the lane's row of each matrix, whose bytes begin at w. */
template <int MATRICES, int C>
static __device__ __forceinline__ void product(float sum[MATRICES][C], const char *const w[2], size_t row_bytes, moe4_dtype dtype,
                                               const block_shared *s) {
    const int per_load = dtype == MOE4_F32 ? 4 : 8;
    uint4 next[MATRICES][CHUNK_LOADS];
    size_t at = (size_t)(threadIdx.x >> 5) * CHUNK_BYTES;
#pragma unroll
    for (int i = 0; i < MATRICES * C; i++) ((float *)sum)[i] = 0.f;
    if (at < row_bytes) load_chunk<MATRICES>(next, w, at);
    for (; at < row_bytes; at += WARPS * CHUNK_BYTES) {
        uint4 raw[MATRICES][CHUNK_LOADS];
#pragma unroll
        for (int i = 0; i < MATRICES * CHUNK_LOADS; i++) ((uint4 *)raw)[i] = ((uint4 *)next)[i];
        if (at + WARPS * CHUNK_BYTES < row_bytes) load_chunk<MATRICES>(next, w, at + WARPS * CHUNK_BYTES);
        int k = (int)(at / 16) * per_load;
#pragma unroll
        for (int i = 0; i < CHUNK_LOADS; i++, k += per_load) {
            float v[MATRICES][8];
#pragma unroll
            for (int m = 0; m < MATRICES; m++) widen_16_bytes(v[m], raw[m][i], dtype);
            add_products<MATRICES, C>(sum, v, 0, s, k);
            if (dtype != MOE4_F32) add_products<MATRICES, C>(sum, v, 4, s, k + 4);
        }
    }
}

struct item {
    moe4_tile tile;
    int row0; /* of the matrix */
};

/* What the whole block brings together: for each round of columns, out(column, row, sums of the matrices). */
template <int MATRICES, int C, class Out>
static __device__ __forceinline__ void finish(const float sum[MATRICES][C], int n, block_shared *s, Out out) {
    int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
#pragma unroll
    for (int c0 = 0; c0 < C; c0 += ROUND) {
        __syncthreads();
#pragma unroll
        for (int m = 0; m < MATRICES; m++)
#pragma unroll
            for (int c = 0; c < ROUND && c0 + c < C; c++) s->sums[warp][m][c][lane] = sum[m][c0 + c];
        __syncthreads();
        if (c0 + warp >= n) continue;
        float total[2] = {0.f, 0.f};
        for (int w = 0; w < WARPS; w++)
#pragma unroll
            for (int m = 0; m < MATRICES; m++) total[m] += s->sums[w][m][warp][lane];
        out(c0 + warp, total[0], total[MATRICES - 1]);
    }
}

/* The rows that the tile's columns multiply; columns that are not there repeat the first. */
static __device__ void point_at_rows(const moe4_layer_run &run, const moe4_tile &tile, bool down, int k, block_shared *s) {
    __syncthreads();
    if (threadIdx.x < MOST_COLUMNS) {
        int row = tile.first + ((int)threadIdx.x < tile.n ? threadIdx.x : 0);
        s->x[threadIdx.x] = down ? run.h_wide + (size_t)row * (size_t)k : run.x_wide + (size_t)x_row(run, run.slots[row]) * (size_t)k;
    }
    __syncthreads();
}

template <int MATRICES, int C> static __device__ void gate_up_item(const moe4_layer_run &run, const item &item, block_shared *s) {
    int lane = threadIdx.x & 31, k = run.w.hidden_units * MOE4_UNIT_K, feature = item.row0 + lane;
    size_t row_bytes = (size_t)k * (run.w.up_dtype == MOE4_F32 ? 4 : 2),
           matrix = (size_t)(run.w.intermediate_units * MOE4_UNIT_K) * row_bytes;
    const char *first = (const char *)run.w.gate_up + (size_t)item.tile.expert * run.w.gate_up_bytes + (size_t)feature * row_bytes;
    const char *const w[2] = {first, first + matrix};
    float sum[MATRICES][C];
    product<MATRICES, C>(sum, w, row_bytes, run.w.up_dtype, s);
    finish<MATRICES, C>(sum, item.tile.n, s, [&](int column, float g, float u) {
        int row = item.tile.first + column, slot = run.slots[row];
        float factor = run.x_factor ? run.x_factor[x_row(run, slot)] : 1.f;
        uint32_t amax = store_any_h(run, row, feature, any_unit(run, item.tile.expert, slot, feature, g * factor, u * factor));
        amax = __reduce_max_sync(0xFFFFFFFFu, amax);
        if (run.h_amax && lane == 0) atomicMax(run.h_amax + row, amax);
    });
}

template <int C> static __device__ void down_item(const moe4_layer_run &run, const item &item, block_shared *s) {
    int k = run.w.intermediate_units * MOE4_UNIT_K, n = item.row0 + (threadIdx.x & 31);
    size_t row_bytes = (size_t)k * (run.w.down_dtype == MOE4_F32 ? 4 : 2);
    const char *first = (const char *)run.w.down + (size_t)item.tile.expert * run.w.down_bytes + (size_t)n * row_bytes;
    const char *const w[2] = {first, first};
    float sum[1][C];
    product<1, C>(sum, w, row_bytes, run.w.down_dtype, s);
    finish<1, C>(sum, item.tile.n, s, [&](int column, float o, float) {
        int row = item.tile.first + column;
        if (n < run.w.hidden) run.o[(size_t)run.slots[row] * (size_t)run.w.hidden + (size_t)n] = run.h_factor ? o * run.h_factor[row] : o;
    });
}

/* MATRICES 2: gate and up; 1: up alone; 0: down. */
template <int MATRICES, int C>
static __device__ __forceinline__ void run_item(const moe4_layer_run &run, const item &item, block_shared *s) {
    if constexpr (MATRICES == 0)
        down_item<C>(run, item, s);
    else
        gate_up_item<MATRICES, C>(run, item, s);
}

/* MOST: columns at once, MOST_COLUMNS, or 8 where no tile has more: then two blocks of one matrix fit a multiprocessor. */
template <int MATRICES, int MOST>
static __global__ void __launch_bounds__(THREADS, MOST == 8 && MATRICES < 2 ? 2 : 1)
    wide_kernel(const __grid_constant__ moe4_layer_run run) {
    __shared__ block_shared s;
    bool down = MATRICES == 0;
    int units = down ? run.w.hidden_units : run.w.intermediate_units, row_tiles = units * (MOE4_UNIT_ROWS / ROWS);
    int n_items = run.state->n_tiles * row_tiles, k = (down ? run.w.intermediate_units : run.w.hidden_units) * MOE4_UNIT_K;
    for (int i = blockIdx.x; i < n_items; i += gridDim.x) {
        item item;
        int index, row_tile;
        moe4_tile tile;
        item_place(run, i, row_tiles, &tile, &index, &row_tile);
        item.row0 = row_tile * ROWS;
        for (int c = 0; c < tile.n; c += MOST) { /* more would not fit the registers; the weights come from L2 again */
            item.tile = tile;
            item.tile.first += c;
            item.tile.n = min(MOST, tile.n - c);
            point_at_rows(run, item.tile, down, k, &s);
            if (item.tile.n == 1)
                run_item<MATRICES, 1>(run, item, &s);
            else if (MOST == 8 || item.tile.n <= 8)
                run_item<MATRICES, 8>(run, item, &s);
            else
                run_item<MATRICES, MOST>(run, item, &s);
        }
    }
}

static unsigned grid_blocks(const moe4_layer_run *run, int units) {
    long long items = (long long)run->max_tiles * units * (MOE4_UNIT_ROWS / ROWS);
    return (unsigned)(items < 8192 ? items : 8192);
}

template <int MATRICES> static cudaError_t launch(const moe4_layer_run *run, int units, cudaStream_t stream) {
    auto kernel = run->tile_columns <= 8 ? wide_kernel<MATRICES, 8> : wide_kernel<MATRICES, MOST_COLUMNS>;
    kernel<<<grid_blocks(run, units), THREADS, 0, stream>>>(*run);
    return cudaGetLastError();
}

cudaError_t moe4_cuda_gate_up_wide(const moe4_layer_run *run, cudaStream_t stream) {
    int units = run->w.intermediate_units;
    return run->activation == MOE4_RELU2 ? launch<1>(run, units, stream) : launch<2>(run, units, stream);
}

cudaError_t moe4_cuda_down_wide(const moe4_layer_run *run, cudaStream_t stream) {
    return launch<0>(run, run->w.hidden_units, stream);
}
