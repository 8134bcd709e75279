/* The product of one work item, shared by the kernels so that they give the same bits: rows of packed weights times up to 8 * NT
 * columns, k split over eight warps (warp w takes units w, w+8, ...), partial sums added in warp order through shared memory, then the
 * gated unit (gate/up) or the alpha (down). RM is how many of a unit's four 16-row tiles these eight warps have: 4, or 2 where another
 * eight have the others.
 *
 *   acc[m][j][4]: fragment of rows 16m + {g, g+8}, columns 8j + {2c, 2c+1}; lane = 4g + c
 *   partials in shared memory: [warp][column][pair p = 8m + g: row g of all pairs, then row g+8], four floats more a column against bank
 *   conflicts. As many columns at once as 32 lanes have pairs for: 8 * 4 / RM, but no more than there are. */
#ifndef MOE4_CUDA_PRODUCT_CUH
#define MOE4_CUDA_PRODUCT_CUH

#include "activation.cuh"
#include "ptx.cuh"

#define MOE4_WARPS 8

template <int NT, int RM> struct partial_shape {
    static constexpr int pairs = 8 * RM, column_floats = 2 * pairs + 4;
    static constexpr int tiles = 4 / RM < NT ? 4 / RM : NT; /* of eight columns, at once */
    static constexpr int warp_floats = 8 * tiles * column_floats, floats = MOE4_WARPS * warp_floats;
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

/* The two multipliers of row tile m (compile-time) from the lane's eight scale bytes. */
static __device__ __forceinline__ void unit_scales(uint32_t *scale_g, uint32_t *scale_g8, uint2 scales, int m) {
    uint32_t s = m & 2 ? scales.y : scales.x;
    *scale_g = m & 1 ? scale_multiplier<2>(s) : scale_multiplier<0>(s);
    *scale_g8 = m & 1 ? scale_multiplier<3>(s) : scale_multiplier<1>(s);
}

/* A warp's sums of column tiles j0 .. j0 + tiles - 1. */
template <int NT, int RM>
static __device__ __forceinline__ void store_partials(float *partials, int warp, int lane, const float acc[RM][NT][4], int j0) {
    using P = partial_shape<NT, RM>;
    float *at = partials + warp * P::warp_floats + 2 * (lane & 3) * P::column_floats + (lane >> 2);
#pragma unroll
    for (int j = 0; j < P::tiles; j++)
#pragma unroll
        for (int m = 0; m < RM; m++) {
            float *to = at + 8 * j * P::column_floats + 8 * m;
            to[0] = acc[m][j0 + j][0];
            to[P::column_floats] = acc[m][j0 + j][1];
            to[P::pairs] = acc[m][j0 + j][2];
            to[P::column_floats + P::pairs] = acc[m][j0 + j][3];
        }
}

/* Sums of a pair of one of the columns over the warps, in their order. */
template <int NT, int RM> static __device__ __forceinline__ float2 sum_partials(const float *partials, int column, int pair) {
    using P = partial_shape<NT, RM>;
    const float *at = partials + column * P::column_floats + pair;
    float2 sum = {at[0], at[P::pairs]};
#pragma unroll
    for (int w = 1; w < MOE4_WARPS; w++) {
        sum.x += at[w * P::warp_floats];
        sum.y += at[w * P::warp_floats + P::pairs];
    }
    return sum;
}

/* SwiGLU and GELU in the CPU's order of operations. Comparisons rather than fminf: a NaN stays. */
static __device__ __forceinline__ float gated_unit(const moe4_layer_run &run, float g, float u) {
    if (run.limit > 0.f) {
        g = g > run.limit ? run.limit : g;
        u = u > run.limit ? run.limit : u < -run.limit ? -run.limit : u;
    }
    float s = run.alpha * g;
    if (run.activation == MOE4_GELU_TANH) s = 1.5957691216f * (g + 0.044715f * (g * g * g)); /* GELU(g) by tanh is g * sigmoid(2 z) */
    return g / (1.f + expf(-s)) * (u + run.beta);
}

/* One value of h; the 8 * RM lanes beside it have its neighbours. `mask`: the lanes that are here. */
template <int RM>
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
    for (int d = 4 * RM; d; d /= 2) amax = max(amax, __shfl_xor_sync(mask, amax, d));
    if (feature % (8 * RM) == 0) atomicMax(run.h_amax + row, amax);
}

/* Two values of o for a slot, eight rows apart. */
static __device__ __forceinline__ void store_o(const moe4_layer_run &run, int slot, int n, float2 sum, float alpha) {
    float *o = run.o + (size_t)slot * (size_t)run.w.hidden;
    if (n < run.w.hidden) o[n] = sum.x * alpha;
    if (n + 8 < run.w.hidden) o[n + 8] = sum.y * alpha;
}

/* The row of x that a slot reads. */
static __device__ __forceinline__ int x_row(const moe4_layer_run &run, int slot) {
    return run.act == MOE4_ACT_STATIC ? slot : slot / run.top_k;
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
