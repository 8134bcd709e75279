/* The product of one work item, shared by the kernels so that they give the same bits: rows of packed weights times up to 8 * NT
 * columns. The order of a sum depends on K alone: k is split over eight slices (slice s takes units s, s+8, ...), slices s and s+4 are
 * added, then those four sums in order; then the gated unit (gate/up) or the alpha (down). A warp has 32 rows, two 16-row tiles of a unit.
 *
 *   acc[m][j][4]: fragment of rows 16m + {g, g+8}, columns 8j + {2c, 2c+1}; lane = 4g + c
 *   partial sums in shared memory, eight columns at a time: [warp][m][lane], fragments as they are. Whoever adds them up has both sums of a
 *   gated unit and, with the lanes 4, 8 and 16 apart, all rows of its columns */
#ifndef MOE4_CUDA_PRODUCT_CUH
#define MOE4_CUDA_PRODUCT_CUH

#include "gate.cuh"
#include "ptx.cuh"
#include "slots.cuh"

#define MOE4_SLICES 8      /* of k */
#define MOE4_GROUP_WARPS 4 /* the warps of a group have the same rows */
#define MOE4_GROUP_ROWS 32
#define MOE4_ROW_TILES 2                           /* of 16, in a group */
#define MOE4_WARP_FLOATS (MOE4_ROW_TILES * 32 * 4) /* partial sums of eight columns */
#define MOE4_GROUP_FLOATS (MOE4_GROUP_WARPS * MOE4_WARP_FLOATS)

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
    uint32_t both = m ? scale_multipliers<2>(scales) : scale_multipliers<0>(scales);
    *scale_g = both_halves<0>(both);
    *scale_g8 = both_halves<1>(both);
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

/* A warp's sums of column tile j, into its place: a fragment's two columns one after the other. */
template <int NT>
static __device__ __forceinline__ void store_partials(float *partials, int lane, const float acc[MOE4_ROW_TILES][NT][4], int j) {
#pragma unroll
    for (int m = 0; m < MOE4_ROW_TILES; m++)
        ((float4 *)partials)[32 * m + lane] = make_float4(acc[m][j][0], acc[m][j][2], acc[m][j][1], acc[m][j][3]);
}

/* Rows g and g+8 of column 2c + i of a lane's fragment m, summed over the four warps of a group, in their order. `second`, where it is not
 * 0: how far on the warps with slices 4 .. 7 stand. */
static __device__ __forceinline__ float2 sum_partials(const float *partials, int lane, int m, int i, int second) {
    float2 sum;
#pragma unroll
    for (int w = 0; w < MOE4_GROUP_WARPS; w++) {
        const float *at = partials + w * MOE4_WARP_FLOATS + 4 * (32 * m + lane) + 2 * i;
        float2 v = *(const float2 *)at;
        if (second) {
            float2 other = *(const float2 *)(at + second);
            v = make_float2(v.x + other.x, v.y + other.y);
        }
        sum = w ? make_float2(sum.x + v.x, sum.y + v.y) : v;
    }
    return sum;
}

/* One value of h; its bits without the sign, where the row's largest is wanted. h_wide is never MOE4_MARK. */
static __device__ __forceinline__ uint32_t store_h(const moe4_layer_run &run, int row, int feature, float gate, float up) {
    float h = gated_unit(run, gate, up);
    size_t at = (size_t)row * (size_t)(run.w.intermediate_units * MOE4_UNIT_K) + (size_t)feature;
    if (run.act == MOE4_ACT_W4A16) {
        run.h[at] = __float2bfloat16_rn(h);
        return 0;
    }
    uint32_t bits = __float_as_uint(h), amax = bits & 0x7FFFFFFFu;
    store_relaxed_4(run.h_wide + at, bits == MOE4_MARK ? amax : bits);
    return amax;
}

/* The largest |h| of a column that lanes 4, 8 and 16 apart share; all lanes call. */
static __device__ __forceinline__ void add_h_amax(const moe4_layer_run &run, int row, uint32_t amax, bool here) {
#pragma unroll
    for (int d = 4; d < 32; d *= 2) amax = max(amax, __shfl_xor_sync(0xFFFFFFFFu, amax, d));
    if ((threadIdx.x & 31) < 4 && here) atomicMax(run.h_amax + row, amax);
}

/* Two values of o for a slot, eight rows apart. */
static __device__ __forceinline__ void store_o(const moe4_layer_run &run, int slot, int n, float2 sum, float alpha) {
    float *o = run.o + (size_t)slot * (size_t)run.w.hidden;
    if (n < run.w.hidden) o[n] = sum.x * alpha;
    if (n + 8 < run.w.hidden) o[n + 8] = sum.y * alpha;
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
