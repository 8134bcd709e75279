/* Experts of unquantized weights: fp32 products of fp32 rows with weights as they are stored. A block of 8 warps has 64 rows of a matrix
 * (of gate and of up together) against the up to 32 columns of a tile; lane l sums rows l and l + 32 for its warp's columns, k after k, so
 * that the order of a sum depends on nothing else. Both sides pass through shared memory, 32 k at a time, the next already on its way. */
#include "gate.cuh"
#include "product.cuh"

#define THREADS 256
#define WARPS (THREADS / 32)
#define ROWS 64
#define STEP 32
#define PITCH (STEP + 4) /* floats of a row in shared memory: 16-byte reads of eight lanes meet no bank twice */

struct shared_tiles {
    float w[2][ROWS * PITCH], x[32 * PITCH];
};

/* A thread's part of a step on its way to shared memory: 8 k of one row of each matrix, 4 k of one column. */
template <int MATRICES> struct step_part { float w[MATRICES][8], x[4]; };

struct operands {
    const char *w[2];   /* row 0 of the item's rows, of each matrix */
    const float *x_row; /* of this thread's column, or NULL */
    int k;              /* a multiple of 64 */
};

template <int MATRICES, int NT>
static __device__ __forceinline__ void load_part(step_part<MATRICES> *p, const operands &o, moe4_dtype dtype, int k0) {
    size_t at = (size_t)(threadIdx.x / 4) * (size_t)o.k + (size_t)(k0 + 8 * (threadIdx.x % 4));
#pragma unroll
    for (int i = 0; i < MATRICES; i++) {
        if (dtype == MOE4_F32) {
            *(float4 *)p->w[i] = __ldg((const float4 *)(o.w[i] + 4 * at));
            *(float4 *)(p->w[i] + 4) = __ldg((const float4 *)(o.w[i] + 4 * at) + 1);
        } else {
            uint4 raw = __ldg((const uint4 *)(o.w[i] + 2 * at));
            const uint32_t words[4] = {raw.x, raw.y, raw.z, raw.w};
#pragma unroll
            for (int j = 0; j < 4; j++) {
                p->w[i][2 * j] = dtype == MOE4_BF16 ? __uint_as_float(words[j] << 16) : __half2float(__ushort_as_half((uint16_t)words[j]));
                p->w[i][2 * j + 1] = dtype == MOE4_BF16 ? __uint_as_float(words[j] & 0xFFFF0000u)
                                                        : __half2float(__ushort_as_half((uint16_t)(words[j] >> 16)));
            }
        }
    }
    if (threadIdx.x < 64 * NT) /* 8 NT columns of 32 k */
        *(float4 *)p->x = o.x_row ? *(const float4 *)(o.x_row + k0 + 4 * (threadIdx.x % 8)) : make_float4(0.f, 0.f, 0.f, 0.f);
}

template <int MATRICES, int NT> static __device__ __forceinline__ void store_part(shared_tiles *s, const step_part<MATRICES> &p) {
    int at = threadIdx.x / 4 * PITCH + 8 * (threadIdx.x % 4);
#pragma unroll
    for (int i = 0; i < MATRICES; i++)
#pragma unroll
        for (int j = 0; j < 8; j += 4) *(float4 *)(s->w[i] + at + j) = *(const float4 *)(p.w[i] + j);
    if (threadIdx.x < 64 * NT) *(float4 *)(s->x + threadIdx.x / 8 * PITCH + 4 * (threadIdx.x % 8)) = *(const float4 *)p.x;
}

/* acc[matrix][row l, l + 32][column warp + 8 j] over all k. */
template <int MATRICES, int NT>
static __device__ __forceinline__ void product(float acc[MATRICES][2][NT], const operands &o, moe4_dtype dtype, shared_tiles *s) {
    int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
    step_part<MATRICES> part;
#pragma unroll
    for (int i = 0; i < MATRICES * 2 * NT; i++) ((float *)acc)[i] = 0.f;
    load_part<MATRICES, NT>(&part, o, dtype, 0);
    for (int k0 = 0; k0 < o.k; k0 += STEP) {
        __syncthreads();
        store_part<MATRICES, NT>(s, part);
        __syncthreads();
        if (k0 + STEP < o.k) load_part<MATRICES, NT>(&part, o, dtype, k0 + STEP);
#pragma unroll 2
        for (int k = 0; k < STEP; k += 4) {
            float4 w[MATRICES][2], x[NT];
#pragma unroll
            for (int i = 0; i < MATRICES; i++)
#pragma unroll
                for (int r = 0; r < 2; r++) w[i][r] = *(const float4 *)(s->w[i] + (lane + 32 * r) * PITCH + k);
#pragma unroll
            for (int j = 0; j < NT; j++) x[j] = *(const float4 *)(s->x + (warp + WARPS * j) * PITCH + k);
#pragma unroll
            for (int i = 0; i < MATRICES; i++)
#pragma unroll
                for (int r = 0; r < 2; r++)
#pragma unroll
                    for (int j = 0; j < NT; j++) {
                        float a = acc[i][r][j];
                        a = fmaf(w[i][r].x, x[j].x, a);
                        a = fmaf(w[i][r].y, x[j].y, a);
                        a = fmaf(w[i][r].z, x[j].z, a);
                        acc[i][r][j] = fmaf(w[i][r].w, x[j].w, a);
                    }
        }
    }
}

/* The row that a thread brings of the tile's columns, of `rows` fp32 rows of k. */
static __device__ const float *my_row(const moe4_layer_run &run, const moe4_tile &tile, bool down, int k) {
    int column = threadIdx.x / 8;
    if (column >= tile.n) return NULL;
    int row = tile.first + column;
    return down ? run.h_wide + (size_t)row * (size_t)k : run.x_wide + (size_t)x_row(run, run.slots[row]) * (size_t)k;
}

template <int MATRICES, int NT>
static __device__ void gate_up_item(const moe4_layer_run &run, const moe4_tile &tile, int row_tile, shared_tiles *s) {
    int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, k = run.w.hidden_units * MOE4_UNIT_K;
    size_t row_bytes = (size_t)k * (run.w.up_dtype == MOE4_F32 ? 4 : 2),
           matrix = (size_t)(run.w.intermediate_units * MOE4_UNIT_K) * row_bytes;
    const char *w = (const char *)run.w.gate_up + (size_t)tile.expert * run.w.gate_up_bytes + (size_t)(row_tile * ROWS) * row_bytes;
    operands o = {{w, w + matrix}, my_row(run, tile, false, k), k};
    float acc[MATRICES][2][NT];
    product<MATRICES, NT>(acc, o, run.w.up_dtype, s);
#pragma unroll
    for (int j = 0; j < NT; j++) {
        int column = warp + WARPS * j, row = tile.first + column;
        if (column >= tile.n) continue;
        int slot = run.slots[row];
        float factor = run.x_factor ? run.x_factor[x_row(run, slot)] : 1.f;
        uint32_t amax = 0;
#pragma unroll
        for (int r = 0; r < 2; r++) {
            int feature = row_tile * ROWS + lane + 32 * r;
            float h = any_unit(run, tile.expert, slot, feature, acc[0][r][j] * factor, acc[MATRICES - 1][r][j] * factor);
            amax = max(amax, store_any_h(run, row, feature, h));
        }
        amax = __reduce_max_sync(0xFFFFFFFFu, amax);
        if (run.h_amax && lane == 0) atomicMax(run.h_amax + row, amax);
    }
}

template <int NT> static __device__ void down_item(const moe4_layer_run &run, const moe4_tile &tile, int row_tile, shared_tiles *s) {
    int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, k = run.w.intermediate_units * MOE4_UNIT_K;
    size_t row_bytes = (size_t)k * (run.w.down_dtype == MOE4_F32 ? 4 : 2);
    const char *w = (const char *)run.w.down + (size_t)tile.expert * run.w.down_bytes + (size_t)(row_tile * ROWS) * row_bytes;
    operands o = {{w, w}, my_row(run, tile, true, k), k};
    float acc[1][2][NT];
    product<1, NT>(acc, o, run.w.down_dtype, s);
#pragma unroll
    for (int j = 0; j < NT; j++) {
        int column = warp + WARPS * j, row = tile.first + column;
        if (column >= tile.n) continue;
        float *to = run.o + (size_t)run.slots[row] * (size_t)run.w.hidden, factor = run.h_factor ? run.h_factor[row] : 1.f;
#pragma unroll
        for (int r = 0; r < 2; r++) {
            int n = row_tile * ROWS + lane + 32 * r;
            if (n < run.w.hidden) to[n] = acc[0][r][j] * factor;
        }
    }
}

/* PHASE 0: gate and up; 1: up alone; 2: down. */
template <int PHASE> static __global__ void __launch_bounds__(THREADS, 1) wide_kernel(const __grid_constant__ moe4_layer_run run) {
    __shared__ __align__(16) shared_tiles s;
    constexpr int matrices = PHASE == 0 ? 2 : 1;
    int row_tiles = PHASE == 2 ? run.w.hidden_units : run.w.intermediate_units, n_items = run.state->n_tiles * row_tiles;
    for (int i = blockIdx.x; i < n_items; i += gridDim.x) {
        moe4_tile tile;
        int index, row_tile;
        item_place(run, i, row_tiles, &tile, &index, &row_tile);
        int nt = tile.n <= 8 ? 1 : tile.n <= 16 ? 2 : 4;
        if (PHASE == 2) {
            if (nt == 1)
                down_item<1>(run, tile, row_tile, &s);
            else if (nt == 2)
                down_item<2>(run, tile, row_tile, &s);
            else
                down_item<4>(run, tile, row_tile, &s);
        } else {
            if (nt == 1)
                gate_up_item<matrices, 1>(run, tile, row_tile, &s);
            else if (nt == 2)
                gate_up_item<matrices, 2>(run, tile, row_tile, &s);
            else
                gate_up_item<matrices, 4>(run, tile, row_tile, &s);
        }
    }
}

static unsigned grid_blocks(const moe4_layer_run *run, int row_tiles) {
    long long items = (long long)run->max_tiles * row_tiles;
    return (unsigned)(items < 4096 ? items : 4096);
}

cudaError_t moe4_cuda_gate_up_wide(const moe4_layer_run *run, cudaStream_t stream) {
    unsigned blocks = grid_blocks(run, run->w.intermediate_units);
    if (run->activation == MOE4_RELU2)
        wide_kernel<1><<<blocks, THREADS, 0, stream>>>(*run);
    else
        wide_kernel<0><<<blocks, THREADS, 0, stream>>>(*run);
    return cudaGetLastError();
}

cudaError_t moe4_cuda_down_wide(const moe4_layer_run *run, cudaStream_t stream) {
    wide_kernel<2><<<grid_blocks(run, run->w.hidden_units), THREADS, 0, stream>>>(*run);
    return cudaGetLastError();
}
