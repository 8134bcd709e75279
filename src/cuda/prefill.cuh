/* Activations as the prefill kernel reads them: tile by tile of prefill_tiles, [k / 64][column][64 k], 128 bytes a row, columns rounded up
 * to 16. Within 64 k, pair 8c + 2q + h of neighbours stands at pair 8q + 4h + c, so that step q of wgmma meets what the packed weights
 * give it (nvfp4.cuh); its 16-byte chunks are swizzled by column % 8, so that a unit can be copied to shared memory as it is. */
#ifndef MOE4_CUDA_PREFILL_CUH
#define MOE4_CUDA_PREFILL_CUH

#include "kernels.h"
#include "nvfp4.cuh"

static __host__ __device__ __forceinline__ int prefill_columns(int n) {
    return (n + 15) & ~15;
}

/* The tiles' places need no sum over those before: tiles stand in the order of their slots, an expert's begin at multiples of 16 of its
 * slots, and 15 more columns are enough for each expert. */
static __device__ __forceinline__ int prefill_tile_column(const moe4_tile &tile) {
    return (tile.first + 15 * tile.expert + 15) & ~15;
}
static __device__ __forceinline__ __nv_bfloat16 *prefill_tile(__nv_bfloat16 *base, const moe4_tile &tile, int units) {
    return base + (size_t)prefill_tile_column(tile) * (size_t)(units * MOE4_UNIT_K);
}

/* Within a unit: chunk and byte of an even k. */
struct prefill_place {
    uint32_t chunk, byte;
};
static __device__ __forceinline__ prefill_place prefill_pair(int k) {
    uint32_t pair = (uint32_t)(k & 63) >> 1;
    return {pair & 7, (pair >> 3) * 4};
}
static __device__ __forceinline__ uint32_t prefill_offset(int column, prefill_place p) {
    return (uint32_t)column * 128 + ((p.chunk ^ ((uint32_t)column & 7)) << 4) + p.byte;
}

/* w of four neighbouring lanes, as rows of a square, to its columns; by a whole warp, as lanes with masks of their own would go on alone.
 */
static __device__ __forceinline__ void transpose_4(uint32_t *w, int lane) {
#pragma unroll
    for (int step = 1; step < 4; step *= 2)
#pragma unroll
        for (int i = 0; i < 4; i++) {
            if (i & step) continue;
            bool upper = lane & step;
            uint32_t v = __shfl_xor_sync(0xFFFFFFFFu, upper ? w[i] : w[i + step], step);
            if (upper)
                w[i] = v;
            else
                w[i + step] = v;
        }
}

/* A chunk of each of two units from their eight blocks of 16 bf16, one in each of eight neighbouring lanes: chunk[i] is chunk lane % 8 of
 * unit i, so that eight lanes store a whole line. Lane % 8 is b % 8, and all of the warp is here. */
static __device__ __forceinline__ void prefill_chunks(uint4 chunk[2], const uint32_t block[8]) {
    int lane = threadIdx.x & 31;
    uint32_t w[8];
#pragma unroll
    for (int i = 0; i < 8; i++) w[i] = block[i];
    transpose_4(w, lane);
    transpose_4(w + 4, lane);
#pragma unroll
    for (int i = 0; i < 4; i++) {
        uint32_t other = __shfl_xor_sync(0xFFFFFFFFu, lane & 4 ? w[i] : w[i + 4], 4);
        if (lane & 4)
            w[i] = other;
        else
            w[i + 4] = other;
    }
    chunk[0] = make_uint4(w[0], w[1], w[2], w[3]);
    chunk[1] = make_uint4(w[4], w[5], w[6], w[7]);
}

/* The units of block b (k = 16b .. 16b+15) of a column of a tile whose rows have `units`. */
static __device__ __forceinline__ void prefill_store_chunks(__nv_bfloat16 *tile, int nt, int column, int b, int units,
                                                            const uint4 chunk[2]) {
    int u = b >> 3 << 1;
    char *to = (char *)tile + ((size_t)u * (size_t)nt + (size_t)column) * 128 + (((b ^ column) & 7) << 4);
    if (u < units) *(uint4 *)to = chunk[0];
    if (u + 1 < units) *(uint4 *)(to + nt * 128) = chunk[1];
}

/* Position in a ring: index and phase parity. */
struct prefill_ring {
    int i;
    uint32_t parity;
    __device__ __forceinline__ void next(int n) {
        if (++i == n) {
            i = 0;
            parity ^= 1;
        }
    }
};

#endif
