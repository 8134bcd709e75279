/* The end of a prefill item: the gated unit, whose h is the next product's tiles, or o, or y. Lanes whose rows are neighbours trade sums,
 * so that each stores two numbers of one column. The columns' places are read 32 at a time, and stores are predicated: with a branch for
 * each column its loads would wait for the branch before. */
#ifndef MOE4_CUDA_PREFILL_STORE_CUH
#define MOE4_CUDA_PREFILL_STORE_CUH

#include "prefill_items.cuh"
#include "result.cuh"

#define PREFILL_AT_ONCE 32 /* columns */

/* A thread's place in the row tile of its warpgroup: rows g and g + 8 of its warp's 16, columns 2c and 2c + 1 of each eight. */
struct prefill_thread {
    int row_tile, warp, g, c;
    __device__ __forceinline__ int odd(void) const { return g & 1; }
};

struct __align__(16) column_pair {
    column of[2];
};

/* Sums of one row tile: those of row g, or g + 8, in column 2c + i of the j-th eight. */
template <int NT> static __device__ __forceinline__ float sum_of(const float (&acc)[NT / 2], int j, int i, bool high) {
    return acc[4 * j + i + (high ? 2 : 0)];
}

/* Of two neighbours in g the even one gets both a, the odd one both b; the even one's first. */
static __device__ __forceinline__ float2 trade(float a, float b, int odd) {
    float other = __shfl_xor_sync(0xFFFFFFFFu, odd ? a : b, 4);
    return odd ? make_float2(other, b) : make_float2(a, other);
}

/* f(j, pair): columns in eights, all loads of 32 columns before any of their f. */
template <int NT, class F> static __device__ __forceinline__ void for_columns(const column *columns, int n, int c, F f) {
#pragma unroll
    for (int first = 0; first < NT; first += PREFILL_AT_ONCE) {
        if (first >= n) break;
        column_pair pair[PREFILL_AT_ONCE / 8];
#pragma unroll
        for (int j = 0; j < PREFILL_AT_ONCE / 8 && first + 8 * j < NT; j++)
            pair[j] = *(const column_pair *)(columns + first + 8 * j + 2 * c);
        f(first / 8, pair);
    }
}

/* Rows g and g + 8 are gate and up of one feature. */
template <int NT>
static __device__ __forceinline__ void store_gated(const moe4_layer_run &run, const float (&acc)[NT / 2], const prefill_item &item,
                                                   const column *columns, const prefill_thread &self) {
    const moe4_tile &tile = item.tile;
    int mine = 2 * self.c + self.odd(), even_feature = self.row_tile * (MOE4_UNIT_ROWS / 2) + 8 * self.warp + (self.g & ~1);
    size_t ld = (size_t)run.w.intermediate_units * MOE4_UNIT_K;
    float gate_alpha = item.alpha[0], up_alpha = item.alpha[1];
    bool wide = run.act != MOE4_ACT_W4A16;
    char *h = (char *)prefill_tile(run.h_tiles, tile, run.w.intermediate_units) + (size_t)(even_feature >> 6) * (size_t)item.nt * 128;
    h += prefill_offset(mine, prefill_pair(even_feature));
    float *h_wide = run.h_wide + (size_t)(tile.first + mine) * ld + even_feature;
    for_columns<NT>(columns, tile.n, self.c, [&](int first, const column_pair *pair) {
        float2 v[PREFILL_AT_ONCE / 8];
#pragma unroll
        for (int j = 0; j < PREFILL_AT_ONCE / 8 && 8 * (first + j) < NT; j++) {
            float unit[2];
#pragma unroll
            for (int i = 0; i < 2; i++) {
                float f = pair[j].of[i].factor;
                unit[i] = fast_gated_unit(run, sum_of<NT>(acc, first + j, i, false) * (gate_alpha * f),
                                          sum_of<NT>(acc, first + j, i, true) * (up_alpha * f));
            }
            v[j] = trade(unit[0], unit[1], self.odd());
        }
#pragma unroll
        for (int j = 0; j < PREFILL_AT_ONCE / 8 && 8 * (first + j) < NT; j++) {
            int column = 8 * (first + j);
            bool here = column + mine < tile.n;
            __nv_bfloat162 narrow = __floats2bfloat162_rn(v[j].x, v[j].y);
            store_8_if(here && wide, h_wide + (size_t)column * ld, v[j]);
            store_4_if(here && !wide, h + column * 128, *(uint32_t *)&narrow);
        }
    });
}

/* The first of the two rows that a lane has after a trade. */
static __device__ __forceinline__ int traded_row(const prefill_thread &self) {
    return self.row_tile * MOE4_UNIT_ROWS + 16 * self.warp + (self.g & ~1) + 8 * self.odd();
}

template <int NT>
static __device__ __forceinline__ float2 scaled_pair(const float (&acc)[NT / 2], int j, int i, float f, const prefill_thread &self) {
    float2 o = trade(sum_of<NT>(acc, j, i, false), sum_of<NT>(acc, j, i, true), self.odd());
    return {__fmul_rn(o.x, f), __fmul_rn(o.y, f)};
}

template <int NT>
static __device__ __forceinline__ void store_outputs(const moe4_layer_run &run, const float (&acc)[NT / 2], const prefill_item &item,
                                                     const column *columns, const prefill_thread &self) {
    int n = traded_row(self), here = n < run.w.hidden ? item.tile.n - 2 * self.c : 0; /* columns from the lane's first on */
    float *o = run.o + n;
    for_columns<NT>(columns, item.tile.n, self.c, [&](int first, const column_pair *pair) {
#pragma unroll
        for (int j = 0; j < PREFILL_AT_ONCE / 8 && 8 * (first + j) < NT; j++)
#pragma unroll
            for (int i = 0; i < 2; i++) {
                const column &to = pair[j].of[i];
                float2 v = scaled_pair<NT>(acc, first + j, i, item.alpha[0] * to.factor, self);
                store_8_if(8 * (first + j) + i < here, o + (size_t)to.row * (size_t)run.w.hidden, v);
            }
    });
}

/* The same where a row is y at once, of any length. */
template <int NT>
static __device__ __forceinline__ void store_result(const moe4_layer_run &run, const float (&acc)[NT / 2], const prefill_item &item,
                                                    const column *columns, const prefill_thread &self) {
    int n = traded_row(self), here = n < run.w.hidden ? item.tile.n - 2 * self.c : 0;
    size_t of_expert = (size_t)item.tile.expert * (size_t)run.w.hidden + (size_t)n;
    const float *bias = run.w.bias_down && here > 0 ? run.w.bias_down + of_expert : NULL;
    bool both = n + 1 < run.w.hidden;
    float2 b = bias ? make_float2(bias[0], both ? bias[1] : 0.f) : make_float2(0.f, 0.f);
    size_t y = run.slots_are == MOE4_SLOTS_DIAGONAL ? of_expert : (size_t)n;
    for_columns<NT>(columns, item.tile.n, self.c, [&](int first, const column_pair *pair) {
#pragma unroll
        for (int j = 0; j < PREFILL_AT_ONCE / 8 && 8 * (first + j) < NT; j++)
#pragma unroll
            for (int i = 0; i < 2; i++) {
                const column &to = pair[j].of[i];
                float2 v = scaled_pair<NT>(acc, first + j, i, item.alpha[0] * to.factor, self);
                if (8 * (first + j) + i >= here) continue;
                float weight = run.result.weights ? run.result.weights[to.row] : 1.f;
                v.x = weighted_result(v.x, bias, b.x, weight);
                v.y = weighted_result(v.y, bias, b.y, weight);
                size_t at = (size_t)to.row * run.result.ld + y;
                if (both)
                    store_y_2(run.result.y, run.result.dtype, at, v);
                else
                    store_y(run.result.y, run.result.dtype, at, v.x);
            }
    });
}

#endif
