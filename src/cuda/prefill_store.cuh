/* The end of a prefill item: the gated unit, whose h is the next product's tiles, or o, or y. */
#ifndef MOE4_CUDA_PREFILL_STORE_CUH
#define MOE4_CUDA_PREFILL_STORE_CUH

#include "prefill_items.cuh"
#include "result.cuh"

/* The gated unit, thread by thread; neighbours in g exchange halves, so that a lane stores two features of one slot. */
template <int NT>
static __device__ __forceinline__ void store_gated(const moe4_layer_run &run, const float (&acc)[NT / 2], const prefill_item &item,
                                                   const column *columns, int feature, int lane) {
    const moe4_tile &tile = item.tile;
    int c = lane & 3, odd = lane >> 2 & 1, even_feature = feature & ~1;
    size_t ld = (size_t)run.w.intermediate_units * MOE4_UNIT_K;
    float gate_alpha = run.w.alpha_gate[tile.expert], up_alpha = run.w.alpha_up[tile.expert];
    bool wide = run.act != MOE4_ACT_W4A16;
    char *h =
        (char *)prefill_tile(run.h_tiles, tile, item.index, run.w.intermediate_units) + (size_t)(even_feature >> 6) * (size_t)item.nt * 128;
    prefill_place place = prefill_pair(even_feature);
    float *h_wide = run.h_wide + (size_t)tile.first * ld + even_feature;
#pragma unroll
    for (int j = 0; j < NT / 8; j++) {
        int at = 8 * j + 2 * c;
        if (8 * j >= tile.n) break;
        float f0 = columns[at].factor, f1 = columns[at + 1].factor;
        float h0 = fast_gated_unit(run, acc[4 * j] * (gate_alpha * f0), acc[4 * j + 2] * (up_alpha * f0));
        float h1 = fast_gated_unit(run, acc[4 * j + 1] * (gate_alpha * f1), acc[4 * j + 3] * (up_alpha * f1));
        float other = __shfl_xor_sync(0xFFFFFFFFu, odd ? h0 : h1, 4);
        float lo = odd ? other : h0, hi = odd ? h1 : other;
        int row = at + odd;
        if (row >= tile.n) continue;
        if (wide) {
            *(float2 *)(h_wide + (size_t)row * ld) = make_float2(lo, hi);
        } else {
            *(__nv_bfloat162 *)(h + prefill_offset(row, place)) = __floats2bfloat162_rn(lo, hi);
        }
    }
}

/* `at`: of feature n; `low` and `high`: whether n and n + 8 are there. */
static __device__ __forceinline__ void store_pair(const moe4_layer_run &run, size_t at, const float *bias, float weight, float2 o, bool low,
                                                  bool high) {
    if (low) store_y(run.result.y, run.result.dtype, at, weighted_result(o.x, bias, weight));
    if (high) store_y(run.result.y, run.result.dtype, at + 8, weighted_result(o.y, bias ? bias + 8 : NULL, weight));
}

template <int NT>
static __device__ __forceinline__ void store_down(const moe4_layer_run &run, const float (&acc)[NT / 2], const moe4_tile &tile,
                                                  const column *columns, int n, int lane) {
    float alpha = run.w.alpha_down[tile.expert];
    bool low = n < run.w.hidden, high = n + 8 < run.w.hidden;
    const float *bias = run.w.bias_down ? run.w.bias_down + (size_t)tile.expert * (size_t)run.w.hidden + n : NULL;
    size_t first = (size_t)n + (run.slots_are == MOE4_SLOTS_DIAGONAL ? (size_t)tile.expert * (size_t)run.w.hidden : 0);
    float *o = run.o + n;
#pragma unroll
    for (int j = 0; j < NT / 8; j++) {
        if (8 * j >= tile.n) break;
#pragma unroll
        for (int i = 0; i < 2; i++) {
            int at = 8 * j + 2 * (lane & 3) + i;
            if (at >= tile.n) continue;
            column col = columns[at];
            float f = alpha * col.factor;
            float2 sum = {__fmul_rn(acc[4 * j + i], f), __fmul_rn(acc[4 * j + 2 + i], f)};
            if (run.result.y) {
                float weight = run.result.weights ? run.result.weights[col.row] : 1.f;
                store_pair(run, (size_t)col.row * run.result.ld + first, bias, weight, sum, low, high);
                continue;
            }
            float *to = o + (size_t)col.row * (size_t)run.w.hidden;
            if (low) to[0] = sum.x;
            if (high) to[8] = sum.y;
        }
    }
}

#endif
