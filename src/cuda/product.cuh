/* The product of one work item, shared by the kernels so that they give the same bits: rows of packed weights times up to 8 * NT
 * columns. A group of four warps has 32 rows, two 16-row tiles of a unit; k is split over the four (warp w takes units w, w+4, ...),
 * partial sums are added in warp order through shared memory, then the gated unit (gate/up) or the alpha (down).
 *
 *   acc[m][j][4]: fragment of rows 16m + {g, g+8}, columns 8j + {2c, 2c+1}; lane = 4g + c
 *   partials in shared memory: [warp][column of a round][pair p = 8m + g: row g of all pairs, then row g+8], rows of 32 + 4 floats against
 *   bank conflicts; two column tiles a round, where there are two */
#ifndef MOE4_CUDA_PRODUCT_CUH
#define MOE4_CUDA_PRODUCT_CUH

#include "gate.cuh"
#include "ptx.cuh"
#include "slots.cuh"

#define MOE4_SLICES 4 /* of k: the warps of a group */
#define MOE4_GROUP_ROWS 32
#define MOE4_ROW_TILES 2 /* of 16, in a group */
#define MOE4_PAIRS 16
#define MOE4_COLUMN_FLOATS (2 * MOE4_PAIRS + 4)

template <int NT> struct partial_shape {
    static constexpr int tiles = NT < 2 ? 1 : 2; /* of eight columns, in a round */
    static constexpr int warp_floats = 8 * tiles * MOE4_COLUMN_FLOATS, floats = MOE4_SLICES * warp_floats;
};

/* acc += one unit: w4[m] and scales as the lane's packed words, b[j] its 16 consecutive activations of column 8j + g. */
template <int NT>
static __device__ __forceinline__ void unit_tile_product(float acc[NT][4], uint4 words, uint32_t scale_g, uint32_t scale_g8,
                                                         const uint4 b[NT][2]) {
    const uint32_t w[4] = {words.x, words.y, words.z, words.w};
#pragma unroll
    for (int q = 0; q < 4; q++) {
        uint32_t a[4];
        decode_word(a, w[q], scale_g, scale_g8);
#pragma unroll
        for (int j = 0; j < NT; j++) {
            const uint4 &x = b[j][q >> 1];
            mma_bf16_16x8x16(acc[j], a, q & 1 ? x.z : x.x, q & 1 ? x.w : x.y);
        }
    }
}

/* The two multipliers of row tile m (compile-time) from the lane's scale bytes of both. */
static __device__ __forceinline__ void unit_scales(uint32_t *scale_g, uint32_t *scale_g8, uint32_t scales, int m) {
    *scale_g = m ? scale_multiplier<2>(scales) : scale_multiplier<0>(scales);
    *scale_g8 = m ? scale_multiplier<3>(scales) : scale_multiplier<1>(scales);
}

/* A warp's sums of column tiles j0 .. j0 + tiles - 1. */
template <int NT>
static __device__ __forceinline__ void store_partials(float *partials, int slice, int lane, const float acc[MOE4_ROW_TILES][NT][4],
                                                      int j0) {
    using P = partial_shape<NT>;
    float *at = partials + slice * P::warp_floats + 2 * (lane & 3) * MOE4_COLUMN_FLOATS + (lane >> 2);
#pragma unroll
    for (int j = 0; j < P::tiles; j++)
#pragma unroll
        for (int m = 0; m < MOE4_ROW_TILES; m++) {
            float *to = at + 8 * j * MOE4_COLUMN_FLOATS + 8 * m;
            to[0] = acc[m][j0 + j][0];
            to[MOE4_COLUMN_FLOATS] = acc[m][j0 + j][1];
            to[MOE4_PAIRS] = acc[m][j0 + j][2];
            to[MOE4_COLUMN_FLOATS + MOE4_PAIRS] = acc[m][j0 + j][3];
        }
}

/* Sums of a pair of one of the round's columns over the warps, in their order. */
template <int NT> static __device__ __forceinline__ float2 sum_partials(const float *partials, int column, int pair) {
    using P = partial_shape<NT>;
    const float *at = partials + column * MOE4_COLUMN_FLOATS + pair;
    float2 sum = {at[0], at[MOE4_PAIRS]};
#pragma unroll
    for (int w = 1; w < MOE4_SLICES; w++) {
        sum.x += at[w * P::warp_floats];
        sum.y += at[w * P::warp_floats + MOE4_PAIRS];
    }
    return sum;
}

/* One value of h; the 16 lanes of its half warp have its neighbours. `mask`: the lanes that are here. */
static __device__ __forceinline__ void store_h(const moe4_layer_run &run, uint32_t mask, int row, int feature, float2 sum, float gate_alpha,
                                               float up_alpha) {
    float h = gated_unit(run, sum.x * gate_alpha, sum.y * up_alpha);
    size_t at = (size_t)row * (size_t)(run.w.intermediate_units * MOE4_UNIT_K) + (size_t)feature;
    if (run.act == MOE4_ACT_W4A16) {
        run.h[at] = __float2bfloat16_rn(h);
        return;
    }
    run.h_wide[at] = h;
    uint32_t amax = __float_as_uint(h) & 0x7FFFFFFFu;
#pragma unroll
    for (int d = MOE4_PAIRS / 2; d; d /= 2) amax = max(amax, __shfl_xor_sync(mask, amax, d));
    if (feature % MOE4_PAIRS == 0) atomicMax(run.h_amax + row, amax);
}

/* Two values of o for a slot, eight rows apart. */
static __device__ __forceinline__ void store_o(const moe4_layer_run &run, int slot, int n, float2 sum, float alpha) {
    float *o = run.o + (size_t)slot * (size_t)run.w.hidden;
    if (n < run.w.hidden) o[n] = sum.x * alpha;
    if (n + 8 < run.w.hidden) o[n + 8] = sum.y * alpha;
}

/* First of a pair's two output rows, from the first row of its group. */
static __device__ __forceinline__ int pair_row(int group_row, int pair) {
    return group_row + (pair >> 3) * 16 + (pair & 7);
}

/* A ticket of a phase -> its tile and row tile: an expert's items go row tile by row tile, so that its column tiles meet in L2. */
static __device__ __forceinline__ void item_place(const moe4_layer_run &run, int item, int n_row_tiles, moe4_tile *tile, int *tile_index,
                                                  int *row_tile) {
    moe4_tile t = run.tiles[item / n_row_tiles];
    int local = item - t.head * n_row_tiles;
    *row_tile = local / t.n_tiles;
    *tile_index = t.head + local % t.n_tiles;
    *tile = t.n_tiles == 1 ? t : run.tiles[*tile_index];
}

#endif
