/* The products on any GPU from sm_80 on: the layout of the packed weights lets a warp load its fragments straight into registers, so
 * there is no staging at all. A block takes work items (a column tile of one expert x 64 rows) in a grid-stride loop.
 *
 *   gate_up_kernel   x -> h (W4A16) or h_wide and row maxima; any_gate_up_kernel with options that no other kernel has
 *   down_kernel      h -> o
 *
 * The order of summation is product.cuh's, so the bits are those of the sm_90 kernels. */
#include "product.cuh"

#define THREADS (2 * MOE4_GROUP_WARPS * 32) /* two groups have the 64 rows of an item */

/* acc[i][m][j] = slice warp + 4i of k for the group's half of a row tile, against columns whose rows start at b_row[j]. */
template <int NT>
static __device__ __forceinline__ void warp_product(float acc[2][MOE4_ROW_TILES][NT][4], const uint8_t *row_tile, int units,
                                                    const __nv_bfloat16 *const b_row[NT]) {
    int warp = threadIdx.x >> 5, lane = threadIdx.x & 31, half = warp / MOE4_GROUP_WARPS;
#pragma unroll
    for (int i = 0; i < 2 * MOE4_ROW_TILES * NT * 4; i++) ((float *)acc)[i] = 0.f;
    for (int u0 = warp % MOE4_GROUP_WARPS; u0 < units; u0 += MOE4_SLICES)
#pragma unroll
        for (int i = 0; i < 2; i++) {
            int u = u0 + i * MOE4_GROUP_WARPS;
            if (u >= units) break;
            const uint8_t *unit = row_tile + (size_t)u * MOE4_UNIT_BYTES;
            uint4 words[MOE4_ROW_TILES], b[2][NT];
#pragma unroll
            for (int m = 0; m < MOE4_ROW_TILES; m++) words[m] = __ldg((const uint4 *)(unit + 512 * (MOE4_ROW_TILES * half + m)) + lane);
            uint32_t scales = __ldg((const uint32_t *)(unit + MOE4_UNIT_CODE_BYTES) + 2 * lane + half);
#pragma unroll
            for (int j = 0; j < NT; j++)
#pragma unroll
                for (int p = 0; p < 2; p++)
                    b[p][j] = b_row[j] ? *((const uint4 *)(b_row[j] + u * MOE4_UNIT_K + 16 * (lane & 3)) + p) : make_uint4(0, 0, 0, 0);
#pragma unroll
            for (int m = 0; m < MOE4_ROW_TILES; m++) {
                uint32_t scale_g, scale_g8;
                unit_scales(&scale_g, &scale_g8, scales, m);
                half_unit_product<NT>(acc[i][m], words[m].x, words[m].y, scale_g, scale_g8, b[0]);
                half_unit_product<NT>(acc[i][m], words[m].z, words[m].w, scale_g, scale_g8, b[1]);
            }
        }
    add_slices<NT>(acc[0], acc[1]);
}

/* h from two sums: gate and up of one feature, or two features eight apart where there is no gate. The largest |h|. */
static __device__ __forceinline__ uint32_t store_features(const moe4_layer_run &run, int expert, int slot, int row, int n, float2 sum,
                                                          float gate_alpha, float up_alpha) {
    if (run.activation == MOE4_RELU2) {
        uint32_t amax = store_any_h(run, row, n, any_unit(run, expert, slot, n, 0.f, sum.x * up_alpha));
        return max(amax, store_any_h(run, row, n + 8, any_unit(run, expert, slot, n + 8, 0.f, sum.y * up_alpha)));
    }
    int feature = n / 16 * 8 + n % 8;
    return store_any_h(run, row, feature, any_unit(run, expert, slot, feature, sum.x * gate_alpha, sum.y * up_alpha));
}

/* Either product of an item: h from x, or o from h. ANY: with every option of h; the common case needs fewer registers. */
template <int NT, bool ANY>
static __device__ __forceinline__ void product_item(const moe4_layer_run &run, bool down, const moe4_tile &tile, int row_tile,
                                                    float *partials) {
    int warp = threadIdx.x >> 5, lane = threadIdx.x & 31, half = warp / MOE4_GROUP_WARPS, slice = warp % MOE4_GROUP_WARPS, e = tile.expert;
    int units = down ? run.w.intermediate_units : run.w.hidden_units;
    const __nv_bfloat16 *b_row[NT], *rows = down ? run.h : run.x;
#pragma unroll
    for (int j = 0; j < NT; j++) {
        int column = 8 * j + (lane >> 2), r = tile.first + column;
        if (column < tile.n && !down) r = x_row(run, run.slots[r]);
        b_row[j] = column < tile.n ? rows + (size_t)r * (size_t)(units * MOE4_UNIT_K) : NULL;
    }
    const uint8_t *weights = down ? run.w.down + (size_t)e * run.w.down_bytes : run.w.gate_up + (size_t)e * run.w.gate_up_bytes;
    float acc[2][MOE4_ROW_TILES][NT][4];
    warp_product<NT>(acc, weights + (size_t)row_tile * (size_t)units * MOE4_UNIT_BYTES, units, b_row);

    float alpha = down ? run.w.alpha_down[e] : run.w.alpha_gate[e], up_alpha = down ? 0.f : run.w.alpha_up[e];
    partials += half * 2 * MOE4_GROUP_FLOATS;
#pragma unroll
    for (int j0 = 0; j0 < NT; j0 += 2) { /* sixteen columns at a time: a warp adds up one of two fragments of eight of them */
        int m = slice & 1, j = j0 + (slice >> 1), n = row_tile * MOE4_UNIT_ROWS + half * MOE4_GROUP_ROWS + 16 * m + (lane >> 2);
        __syncthreads();
#pragma unroll
        for (int i = 0; i < 2 && j0 + i < NT; i++)
            store_partials<NT>(partials + i * MOE4_GROUP_FLOATS + slice * MOE4_WARP_FLOATS, lane, acc[0], j0 + i);
        __syncthreads();
        if (j >= NT) continue;
#pragma unroll
        for (int i = 0; i < 2; i++) {
            int column = 8 * j + 2 * (lane & 3) + i, row = tile.first + column;
            bool here = column < tile.n;
            uint32_t amax = 0;
            if (here) {
                int slot = run.slots[row];
                float2 sum = sum_partials(partials + (j - j0) * MOE4_GROUP_FLOATS, lane, m, i, 0);
                float factor = 1.f;
                if (down ? run.h_factor : run.x_factor) factor = down ? run.h_factor[row] : run.x_factor[x_row(run, slot)];
                if (down)
                    store_o(run, slot, n, sum, alpha * factor);
                else if (ANY)
                    amax = store_features(run, e, slot, row, n, sum, alpha * factor, up_alpha * factor);
                else
                    amax = store_h(run, row, n / 16 * 8 + n % 8, sum.x * (alpha * factor), sum.y * (up_alpha * factor));
            }
            if (!down && run.h_amax) add_h_amax(run, row, amax, here);
        }
    }
}

template <bool ANY> static __device__ __forceinline__ void run_items(const moe4_layer_run &run, bool down) {
    __shared__ __align__(16) float partials[2 * 2 * MOE4_GROUP_FLOATS];
    int row_tiles = down ? run.w.down_tiles : run.w.gate_up_tiles, n_items = run.state->n_tiles * row_tiles;
    for (int i = blockIdx.x; i < n_items; i += gridDim.x) {
        moe4_tile tile;
        int index, row_tile;
        item_place(run, i, row_tiles, &tile, &index, &row_tile);
        if (tile.n <= 8)
            product_item<1, ANY>(run, down, tile, row_tile, partials);
        else if (tile.n <= 16)
            product_item<2, ANY>(run, down, tile, row_tile, partials);
        else if (tile.n <= 24)
            product_item<3, ANY>(run, down, tile, row_tile, partials);
        else
            product_item<4, ANY>(run, down, tile, row_tile, partials);
    }
}

static __global__ void __launch_bounds__(THREADS) gate_up_kernel(const __grid_constant__ moe4_layer_run run) {
    run_items<false>(run, false);
}

static __global__ void __launch_bounds__(THREADS, 1) any_gate_up_kernel(const __grid_constant__ moe4_layer_run run) {
    run_items<true>(run, false);
}

static __global__ void __launch_bounds__(THREADS) down_kernel(const __grid_constant__ moe4_layer_run run) {
    run_items<false>(run, true);
}

static unsigned grid_blocks(const moe4_layer_run *run, int row_tiles) {
    long long items = (long long)run->max_tiles * row_tiles;
    return (unsigned)(items < 4096 ? items : 4096);
}

cudaError_t moe4_cuda_gate_up(const moe4_layer_run *run, cudaStream_t stream) {
    auto kernel = moe4_cuda_has_options(run) ? any_gate_up_kernel : gate_up_kernel;
    kernel<<<grid_blocks(run, run->w.gate_up_tiles), THREADS, 0, stream>>>(*run);
    return cudaGetLastError();
}

cudaError_t moe4_cuda_down(const moe4_layer_run *run, cudaStream_t stream) {
    down_kernel<<<grid_blocks(run, run->w.down_tiles), THREADS, 0, stream>>>(*run);
    return cudaGetLastError();
}
