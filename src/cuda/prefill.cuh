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

/* The tiles' places need no sum over those before: tiles stand in the order of their slots, and 15 more columns are enough for each. */
static __device__ __forceinline__ __nv_bfloat16 *prefill_tile(__nv_bfloat16 *base, const moe4_tile &tile, int index, int units) {
    size_t column = (size_t)((tile.first + 15 * index + 15) & ~15);
    return base + column * (size_t)(units * MOE4_UNIT_K);
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

/* Block b (k = 16b .. 16b+15) of a column of a tile. */
static __device__ __forceinline__ void prefill_store_16(__nv_bfloat16 *tile, int nt, int column, int b, const float v[16]) {
    char *unit = (char *)tile + (size_t)(b >> 2) * (size_t)nt * 128;
#pragma unroll
    for (int i = 0; i < 8; i++)
        *(__nv_bfloat162 *)(unit + prefill_offset(column, prefill_pair(16 * (b & 3) + 2 * i))) =
            __floats2bfloat162_rn(v[2 * i], v[2 * i + 1]);
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
