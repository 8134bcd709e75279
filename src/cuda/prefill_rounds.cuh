/* The rounding of h to NVFP4 between the two products of the prefill kernel: the consumers take rows of a tile whose gate/up is done, a
 * warp a row. prefill_round.cu has it as a kernel of its own, where h must wait for the whole batch. */
#ifndef MOE4_CUDA_PREFILL_ROUNDS_CUH
#define MOE4_CUDA_PREFILL_ROUNDS_CUH

#include "activation.cuh"
#include "prefill_items.cuh"

#define ROUND_AHEAD 4 /* blocks of a lane that are under way together; with them a row of 2048 is read once */

/* Row `column` of the tile, by a warp. */
static __device__ __forceinline__ void round_tile_row(const moe4_layer_run &run, const moe4_tile &tile, int column) {
    int lane = threadIdx.x & 31, blocks = run.w.intermediate_units * 4, row = tile.first + column;
    const float *in = run.h_wide + (size_t)row * (size_t)(blocks * 16);
    __nv_bfloat16 *to = prefill_tile(run.h_tiles, tile, run.w.intermediate_units);
    float v[ROUND_AHEAD][16];
    uint32_t amax = 0, saturated = 0;
#pragma unroll
    for (int i = 0; i < ROUND_AHEAD; i++) {
        fill_16(v[i], 0.f);
        if (lane + 32 * i < blocks) load_16(v[i], in + 16 * (lane + 32 * i), MOE4_F32);
    }
#pragma unroll
    for (int i = 0; i < ROUND_AHEAD; i++) amax = max(amax, amax_bits_16(v[i]));
#pragma unroll 2
    for (int b = lane + 32 * ROUND_AHEAD; b < blocks; b += 32) {
        float w[16];
        load_16(w, in + 16 * b, MOE4_F32);
        amax = max(amax, amax_bits_16(w));
    }
    amax = __reduce_max_sync(0xFFFFFFFFu, amax);
    bool bad = amax >= MOE4_INF_BITS;
    float S = 1.f, decode = 1.f;
    if (!bad) S = encode_scale(run.act, amax, run.w.scale_h, tile.expert, &decode);
#pragma unroll 1
    for (int b = lane; (b & ~31) < blocks; b += 32) {
        uint4 chunk[2];
        uint32_t w[8];
        if (bad)
            fill_16(v[0], __uint_as_float(0x7FFFFFFFu));
        else
            saturated += (uint32_t)round_16(v[0], S);
        pack_bf16_16(w, v[0]);
        prefill_chunks(chunk, w);
        prefill_store_chunks(to, prefill_columns(tile.n), column, b, run.w.intermediate_units, chunk);
#pragma unroll
        for (int i = 0; i + 1 < ROUND_AHEAD; i++)
#pragma unroll
            for (int j = 0; j < 16; j++) v[i][j] = v[i + 1][j];
        fill_16(v[ROUND_AHEAD - 1], 0.f);
        if (b + 32 * ROUND_AHEAD < blocks) load_16(v[ROUND_AHEAD - 1], in + 16 * (b + 32 * ROUND_AHEAD), MOE4_F32);
    }
    saturated = __reduce_add_sync(0xFFFFFFFFu, saturated);
    if (lane == 0) {
        run.h_factor[row] = decode;
        run.h_saturated[row] = (int)saturated;
    }
}

/* By all consumers. */
template <class S> static __device__ __forceinline__ void round_rows(const moe4_layer_run &run, const prefill_item &item) {
    int end = min(item.tile.n, item.row_tile + S::round_rows);
    for (int c = item.row_tile + (int)threadIdx.x / 32; c < end; c += S::groups * 4) round_tile_row(run, item.tile, c);
}

#endif
