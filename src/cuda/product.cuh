/* The product of one work item, shared by the kernels so that they give the same bits: rows of packed weights times up to 8 * NT
 * columns. The order of a sum depends on K alone: k is split over eight slices (slice s takes units s, s+8, ...), slices s and s+4 are
 * added, then those four sums in order; then the gated unit (gate/up) or the alpha (down). A warp has 32 rows, two 16-row tiles of a unit.
 *
 *   acc[m][j][4]: fragment of rows 16m + {g, g+8}, columns 8j + {2c, 2c+1}; lane = 4g + c
 *   partials in shared memory: [warp][column of a round][pair p = 8m + g: row g of all pairs, then row g+8], rows of 32 + 4 floats against
 *   bank conflicts; two column tiles a round, where there are two */
#ifndef MOE4_CUDA_PRODUCT_CUH
#define MOE4_CUDA_PRODUCT_CUH

#include "gate.cuh"
#include "ptx.cuh"
#include "slots.cuh"

#define MOE4_SLICES 8      /* of k */
#define MOE4_GROUP_WARPS 4 /* the warps of a group have the same rows */
#define MOE4_GROUP_ROWS 32
#define MOE4_ROW_TILES 2 /* of 16, in a group */
#define MOE4_PAIRS 16
#define MOE4_COLUMN_FLOATS (2 * MOE4_PAIRS + 4)

template <int NT> struct partial_shape {
    static constexpr int tiles = NT < 2 ? 1 : 2; /* of eight columns, in a round */
    static constexpr int warp_floats = 8 * tiles * MOE4_COLUMN_FLOATS, floats = MOE4_GROUP_WARPS * warp_floats;
};

/* acc += half a unit: two of the lane's packed words, b[j] its 8 activations of column 8j + g that go with them. */
template <int NT>
static __device__ __forceinline__ void half_unit_product(float acc[NT][4], uint32_t w0, uint32_t w1, uint32_t scale_g, uint32_t scale_g8,
                                                         const uint4 b[NT]) {
    uint32_t a[4];
    decode_word(a, w0, scale_g, scale_g8);
#pragma unroll
    for (int j = 0; j < NT; j++) mma_bf16_16x8x16(acc[j], a, b[j].x, b[j].y);
    decode_word(a, w1, scale_g, scale_g8);
#pragma unroll
    for (int j = 0; j < NT; j++) mma_bf16_16x8x16(acc[j], a, b[j].z, b[j].w);
}

/* The two multipliers of row tile m (compile-time) from the lane's scale bytes of both. */
static __device__ __forceinline__ void unit_scales(uint32_t *scale_g, uint32_t *scale_g8, uint32_t scales, int m) {
    *scale_g = m ? scale_multiplier<2>(scales) : scale_multiplier<0>(scales);
    *scale_g8 = m ? scale_multiplier<3>(scales) : scale_multiplier<1>(scales);
}

/* Slices s and s+4, where a warp has both. */
template <int NT>
static __device__ __forceinline__ void add_slices(float acc[MOE4_ROW_TILES][NT][4], const float other[MOE4_ROW_TILES][NT][4]) {
#pragma unroll
    for (int m = 0; m < MOE4_ROW_TILES; m++)
#pragma unroll
        for (int j = 0; j < NT; j++)
#pragma unroll
            for (int i = 0; i < 4; i++) acc[m][j][i] += other[m][j][i];
}

/* A warp's sums of column tiles j0 .. j0 + tiles - 1, into its place. */
template <int NT>
static __device__ __forceinline__ void store_partials(float *partials, int lane, const float acc[MOE4_ROW_TILES][NT][4], int j0) {
    using P = partial_shape<NT>;
    float *at = partials + 2 * (lane & 3) * MOE4_COLUMN_FLOATS + (lane >> 2);
#pragma unroll
    for (int j = 0; j < P::tiles && j0 + j < NT; j++)
#pragma unroll
        for (int m = 0; m < MOE4_ROW_TILES; m++) {
            float *to = at + 8 * j * MOE4_COLUMN_FLOATS + 8 * m;
            to[0] = acc[m][j0 + j][0];
            to[MOE4_COLUMN_FLOATS] = acc[m][j0 + j][1];
            to[MOE4_PAIRS] = acc[m][j0 + j][2];
            to[MOE4_COLUMN_FLOATS + MOE4_PAIRS] = acc[m][j0 + j][3];
        }
}

/* Sums of a pair of one of the round's columns over the four warps of a group, in their order. `second`, where it is not 0: how far on the
 * warps with slices 4 .. 7 stand. */
template <int NT> static __device__ __forceinline__ float2 sum_partials(const float *partials, int column, int pair, int second) {
    using P = partial_shape<NT>;
    const float *at = partials + column * MOE4_COLUMN_FLOATS + pair;
    float2 sum;
#pragma unroll
    for (int w = 0; w < MOE4_GROUP_WARPS; w++) {
        float2 v = {at[w * P::warp_floats], at[w * P::warp_floats + MOE4_PAIRS]};
        if (second) {
            v.x += at[second + w * P::warp_floats];
            v.y += at[second + w * P::warp_floats + MOE4_PAIRS];
        }
        sum.x = w ? sum.x + v.x : v.x;
        sum.y = w ? sum.y + v.y : v.y;
    }
    return sum;
}

/* One value of h; the 16 lanes of its half warp have its neighbours. `mask`: the lanes that are here. h_wide is never MOE4_MARK. */
static __device__ __forceinline__ void store_h(const moe4_layer_run &run, uint32_t mask, int row, int feature, float2 sum, float gate_alpha,
                                               float up_alpha) {
    float h = gated_unit(run, sum.x * gate_alpha, sum.y * up_alpha);
    size_t at = (size_t)row * (size_t)(run.w.intermediate_units * MOE4_UNIT_K) + (size_t)feature;
    if (run.act == MOE4_ACT_W4A16) {
        run.h[at] = __float2bfloat16_rn(h);
        return;
    }
    uint32_t bits = __float_as_uint(h), amax = bits & 0x7FFFFFFFu;
    store_relaxed_4(run.h_wide + at, bits == MOE4_MARK ? amax : bits);
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

/* An item of a phase -> its tile and row tile: an expert's items go row tile by row tile, so that its column tiles meet in L2. `t` is tile
 * item / n_row_tiles, which is one of the expert's. */
static __device__ __forceinline__ void tile_place(const moe4_layer_run &run, const moe4_tile &t, int item, int n_row_tiles, moe4_tile *tile,
                                                  int *tile_index, int *row_tile) {
    int local = item - t.head * n_row_tiles;
    *row_tile = local / t.n_tiles;
    *tile_index = t.head + local % t.n_tiles;
    *tile = t.n_tiles == 1 ? t : run.tiles[*tile_index];
}

static __device__ __forceinline__ void item_place(const moe4_layer_run &run, int item, int n_row_tiles, moe4_tile *tile, int *tile_index,
                                                  int *row_tile) {
    tile_place(run, run.tiles[item / n_row_tiles], item, n_row_tiles, tile, tile_index, row_tile);
}

#endif
