/* The products on any GPU from sm_80 on: the layout of the packed weights lets a warp load its fragments straight into registers, so
 * there is no staging at all. A block takes work items (a column tile of one expert x 64 rows) in a grid-stride loop.
 *
 *   gate_up_kernel   x -> h (W4A16) or h_wide and row maxima
 *   down_kernel      h -> o
 *
 * The order of summation is product.cuh's, so the bits are those of the sm_90 kernels. */
#include "product.cuh"

#define THREADS (MOE4_WARPS * 32)

/* acc[m][j] = this warp's share of k: units warp, warp + 8, ... of one row tile against columns whose rows start at b[j]. */
template <int NT>
static __device__ __forceinline__ void warp_product(float acc[4][NT][4], const uint8_t *row_tile, int units,
                                                    const __nv_bfloat16 *const b_row[NT]) {
    int warp = threadIdx.x >> 5, lane = threadIdx.x & 31;
#pragma unroll
    for (int m = 0; m < 4; m++)
#pragma unroll
        for (int j = 0; j < NT; j++) acc[m][j][0] = acc[m][j][1] = acc[m][j][2] = acc[m][j][3] = 0.f;
    for (int u = warp; u < units; u += MOE4_WARPS) {
        const uint8_t *unit = row_tile + (size_t)u * MOE4_UNIT_BYTES;
        uint4 words[4], b[NT][2];
#pragma unroll
        for (int m = 0; m < 4; m++) words[m] = __ldg((const uint4 *)(unit + 512 * m) + lane);
        uint2 scales = __ldg((const uint2 *)(unit + MOE4_UNIT_CODE_BYTES) + lane);
#pragma unroll
        for (int j = 0; j < NT; j++)
#pragma unroll
            for (int i = 0; i < 2; i++)
                b[j][i] = b_row[j] ? *((const uint4 *)(b_row[j] + u * MOE4_UNIT_K + 16 * (lane & 3)) + i) : make_uint4(0, 0, 0, 0);
#pragma unroll
        for (int m = 0; m < 4; m++) {
            uint32_t scale_g, scale_g8;
            unit_scales(&scale_g, &scale_g8, scales, m);
            unit_tile_product<NT>(acc[m], words[m], scale_g, scale_g8, b);
        }
    }
}

template <int NT> static __device__ void gate_up_item(const moe4_layer_run &run, const moe4_tile &tile, int row_tile, float *partials) {
    int warp = threadIdx.x >> 5, lane = threadIdx.x & 31;
    size_t ld = (size_t)run.w.hidden_units * MOE4_UNIT_K;
    const __nv_bfloat16 *b_row[NT];
#pragma unroll
    for (int j = 0; j < NT; j++) {
        int column = 8 * j + (lane >> 2);
        b_row[j] = column < tile.n ? run.x + (size_t)x_row(run, run.slots[tile.first + column]) * ld : NULL;
    }
    float acc[4][NT][4];
    const uint8_t *w =
        run.w.gate_up + (size_t)tile.expert * run.w.gate_up_bytes + (size_t)row_tile * (size_t)run.w.hidden_units * MOE4_UNIT_BYTES;
    warp_product<NT>(acc, w, run.w.hidden_units, b_row);
    float gate_alpha = run.w.alpha_gate[tile.expert], up_alpha = run.w.alpha_up[tile.expert];
#pragma unroll
    for (int j = 0; j < NT; j++) {
        __syncthreads();
        store_partials<NT, 4>(partials, warp, lane, acc, j);
        __syncthreads();
        if (8 * j + warp < tile.n) {
            int row = tile.first + 8 * j + warp;
            float factor = run.x_factor ? run.x_factor[x_row(run, run.slots[row])] : 1.f;
            store_h<4>(run, 0xFFFFFFFFu, row, row_tile * 32 + lane, sum_partials<NT, 4>(partials, warp, lane), gate_alpha * factor,
                       up_alpha * factor);
        }
    }
}

template <int NT> static __device__ void down_item(const moe4_layer_run &run, const moe4_tile &tile, int row_tile, float *partials) {
    int warp = threadIdx.x >> 5, lane = threadIdx.x & 31;
    size_t ld = (size_t)run.w.intermediate_units * MOE4_UNIT_K;
    const __nv_bfloat16 *b_row[NT];
#pragma unroll
    for (int j = 0; j < NT; j++) {
        int column = 8 * j + (lane >> 2);
        b_row[j] = column < tile.n ? run.h + (size_t)(tile.first + column) * ld : NULL;
    }
    float acc[4][NT][4];
    const uint8_t *w =
        run.w.down + (size_t)tile.expert * run.w.down_bytes + (size_t)row_tile * (size_t)run.w.intermediate_units * MOE4_UNIT_BYTES;
    warp_product<NT>(acc, w, run.w.intermediate_units, b_row);
    float alpha = run.w.alpha_down[tile.expert];
#pragma unroll
    for (int j = 0; j < NT; j++) {
        __syncthreads();
        store_partials<NT, 4>(partials, warp, lane, acc, j);
        __syncthreads();
        if (8 * j + warp < tile.n) {
            int row = tile.first + 8 * j + warp;
            float factor = run.h_factor ? run.h_factor[row] : 1.f;
            store_o(run, run.slots[row], row_tile * MOE4_UNIT_ROWS + (lane >> 3) * 16 + (lane & 7),
                    sum_partials<NT, 4>(partials, warp, lane), alpha * factor);
        }
    }
}

static __global__ void __launch_bounds__(THREADS) gate_up_kernel(const __grid_constant__ moe4_layer_run run) {
    __shared__ float partials[partial_shape<1, 4>::floats];
    int n_items = run.state->n_tiles * run.w.gate_up_tiles;
    for (int i = blockIdx.x; i < n_items; i += gridDim.x) {
        moe4_tile tile;
        int index, row_tile;
        item_place(run, i, run.w.gate_up_tiles, &tile, &index, &row_tile);
        if (tile.n <= 8)
            gate_up_item<1>(run, tile, row_tile, partials);
        else if (tile.n <= 16)
            gate_up_item<2>(run, tile, row_tile, partials);
        else
            gate_up_item<4>(run, tile, row_tile, partials);
    }
}

static __global__ void __launch_bounds__(THREADS) down_kernel(const __grid_constant__ moe4_layer_run run) {
    __shared__ float partials[partial_shape<1, 4>::floats];
    int n_items = run.state->n_tiles * run.w.down_tiles;
    for (int i = blockIdx.x; i < n_items; i += gridDim.x) {
        moe4_tile tile;
        int index, row_tile;
        item_place(run, i, run.w.down_tiles, &tile, &index, &row_tile);
        if (tile.n <= 8)
            down_item<1>(run, tile, row_tile, partials);
        else if (tile.n <= 16)
            down_item<2>(run, tile, row_tile, partials);
        else
            down_item<4>(run, tile, row_tile, partials);
    }
}

static unsigned grid_blocks(const moe4_layer_run *run, int row_tiles) {
    long long items = (long long)run->max_tiles * row_tiles;
    return (unsigned)(items < 4096 ? items : 4096);
}

cudaError_t moe4_cuda_gate_up(const moe4_layer_run *run, cudaStream_t stream) {
    gate_up_kernel<<<grid_blocks(run, run->w.gate_up_tiles), THREADS, 0, stream>>>(*run);
    return cudaGetLastError();
}

cudaError_t moe4_cuda_down(const moe4_layer_run *run, cudaStream_t stream) {
    down_kernel<<<grid_blocks(run, run->w.down_tiles), THREADS, 0, stream>>>(*run);
    return cudaGetLastError();
}
