/* The end of a prefill item: the gated unit, whose h is the next product's tiles, or o, or y. */
#ifndef MOE4_CUDA_PREFILL_STORE_CUH
#define MOE4_CUDA_PREFILL_STORE_CUH

#include "prefill_items.cuh"
#include "result.cuh"

#define PREFILL_AT_ONCE 32 /* columns whose gated units are computed before the first is stored: one hides what another waits for */

/* A thread's place in the row tile of its warpgroup: rows g and g + 8 of its warp's 16, columns 2c and 2c + 1 of each eight. */
struct prefill_thread {
    int row_tile, warp, g, c;
};

/* The gated unit, thread by thread; neighbours in g exchange halves, so that a lane stores two features of one slot. */
template <int NT>
static __device__ __forceinline__ void store_gated(const moe4_layer_run &run, const float (&acc)[NT / 2], const prefill_item &item,
                                                   const column *columns, const prefill_thread &self) {
    const moe4_tile &tile = item.tile;
    int c = self.c, odd = self.g & 1, even_feature = self.row_tile * (MOE4_UNIT_ROWS / 2) + 8 * self.warp + (self.g & ~1);
    size_t ld = (size_t)run.w.intermediate_units * MOE4_UNIT_K;
    float gate_alpha = run.w.alpha_gate[tile.expert], up_alpha = run.w.alpha_up[tile.expert];
    bool wide = run.act != MOE4_ACT_W4A16;
    char *h = (char *)prefill_tile(run.h_tiles, tile, run.w.intermediate_units) + (size_t)(even_feature >> 6) * (size_t)item.nt * 128;
    h += prefill_offset(2 * c + odd, prefill_pair(even_feature));
    float *h_wide = run.h_wide + (size_t)tile.first * ld + even_feature;
#pragma unroll
    for (int first = 0; first < NT; first += PREFILL_AT_ONCE) {
        if (first >= tile.n) break;
        float both[PREFILL_AT_ONCE / 4];
#pragma unroll
        for (int i = 0; i < PREFILL_AT_ONCE / 4 && first + 4 * i < NT; i++) {
            int j = first / 8 + i / 2, column = 8 * j + 2 * self.c + i % 2;
            float f = columns[column].factor;
            both[i] = fast_gated_unit(run, acc[4 * j + i % 2] * (gate_alpha * f), acc[4 * j + 2 + i % 2] * (up_alpha * f));
        }
#pragma unroll
        for (int i = 0; i < PREFILL_AT_ONCE / 4 && first + 4 * i < NT; i += 2) {
            float other = __shfl_xor_sync(0xFFFFFFFFu, odd ? both[i] : both[i + 1], 4);
            float lo = odd ? other : both[i], hi = odd ? both[i + 1] : other;
            int row = first + 4 * i + 2 * c + odd;
            if (row >= tile.n) continue;
            if (wide) {
                *(float2 *)(h_wide + (size_t)row * ld) = make_float2(lo, hi);
            } else {
                *(__nv_bfloat162 *)(h + (first + 4 * i) * 128) = __floats2bfloat162_rn(lo, hi);
            }
        }
    }
}

/* Two sums of a column, times its factor. */
static __device__ __forceinline__ float2 scaled_pair(const float *acc, float f) {
    return {__fmul_rn(acc[0], f), __fmul_rn(acc[2], f)};
}

template <int NT>
static __device__ __forceinline__ void store_outputs(const moe4_layer_run &run, const float (&acc)[NT / 2], const prefill_item &item,
                                                     const column *columns, const prefill_thread &self) {
    float alpha = run.w.alpha_down[item.tile.expert];
    int n = self.row_tile * MOE4_UNIT_ROWS + 16 * self.warp + self.g;
    bool low = n < run.w.hidden, high = n + 8 < run.w.hidden;
#pragma unroll
    for (int j = 0; j < NT / 8; j++) {
        if (8 * j >= item.tile.n) break;
#pragma unroll
        for (int i = 0; i < 2; i++) {
            int at = 8 * j + 2 * self.c + i;
            if (at >= item.tile.n) continue;
            float2 o = scaled_pair(acc + 4 * j + i, alpha * columns[at].factor);
            float *to = run.o + (size_t)columns[at].row * (size_t)run.w.hidden + n;
            if (low) to[0] = o.x;
            if (high) to[8] = o.y;
        }
    }
}

/* The same where a row is y at once. */
template <int NT>
static __device__ __forceinline__ void store_result(const moe4_layer_run &run, const float (&acc)[NT / 2], const prefill_item &item,
                                                    const column *columns, const prefill_thread &self) {
    float alpha = run.w.alpha_down[item.tile.expert];
    int n = self.row_tile * MOE4_UNIT_ROWS + 16 * self.warp + self.g;
    bool low = n < run.w.hidden, high = n + 8 < run.w.hidden;
    size_t of_expert = (size_t)item.tile.expert * (size_t)run.w.hidden + (size_t)n;
    const float *bias = run.w.bias_down ? run.w.bias_down + of_expert : NULL;
    size_t first = run.slots_are == MOE4_SLOTS_DIAGONAL ? of_expert : (size_t)n;
#pragma unroll
    for (int j = 0; j < NT / 8; j++) {
        if (8 * j >= item.tile.n) break;
#pragma unroll
        for (int i = 0; i < 2; i++) {
            int at = 8 * j + 2 * self.c + i;
            if (at >= item.tile.n) continue;
            int row = columns[at].row;
            float2 o = scaled_pair(acc + 4 * j + i, alpha * columns[at].factor);
            float weight = run.result.weights ? run.result.weights[row] : 1.f;
            size_t to = (size_t)row * run.result.ld + first;
            if (low) store_y(run.result.y, run.result.dtype, to, weighted_result(o.x, bias, weight));
            if (high) store_y(run.result.y, run.result.dtype, to + 8, weighted_result(o.y, bias ? bias + 8 : NULL, weight));
        }
    }
}

#endif
