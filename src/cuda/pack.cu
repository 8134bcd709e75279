/* Packing: linear NVFP4 codes and scales -> the units of nvfp4.cuh, and back for tests. A thread owns one lane of one 16-row tile of
 * one unit: 16 codes and a scale of rows g and g+8. Rows past the matrix are never touched: the caller zeroes padding. */
#include "kernels.h"
#include "nvfp4.cuh"

/* Packed row of matrix row i (kernels.h), or its reverse; -1 where a packed row belongs to the other matrix of the pair. */
static __device__ int source_row(int packed_row, int interleave) {
    if (interleave == 0) return packed_row;
    int g = packed_row & 15, feature = packed_row / 16 * 8 + (g & 7);
    return (g >= 8) == (interleave == 2) ? feature : -1;
}

#define DECODE_FACTORS 0x43804380u /* MOE4_DECODE_FACTOR, 2^8, in two bf16 */

struct place {
    int tile, unit, m, lane;
};

static __device__ place thread_place(long long i, int units) {
    place p;
    p.lane = (int)(i & 31);
    p.m = (int)(i >> 5 & 3);
    long long u = i >> 7;
    p.unit = (int)(u % units);
    p.tile = (int)(u / units);
    return p;
}

/* The 16 codes of a block with its scale: scale zero -> codes zero; a signed scale -> codes of the other sign. */
static __device__ void read_block(uint8_t code[16], uint8_t *scale, const uint8_t *codes, const uint8_t *scales, int row, int block,
                                  int cols) {
    uint2 raw = *(const uint2 *)(codes + (size_t)row * (size_t)(cols / 2) + (size_t)block * 8);
    uint8_t s = scales[(size_t)row * (size_t)(cols / 16) + (size_t)block];
    uint32_t flip = s & 0x80 ? 0x88888888u : 0;
    bool zero = (s & 0x7F) == 0;
    raw.x = zero ? 0 : raw.x ^ flip;
    raw.y = zero ? 0 : raw.y ^ flip;
    for (int k = 0; k < 8; k++) {
        code[k] = raw.x >> 4 * k & 15;
        code[k + 8] = raw.y >> 4 * k & 15;
    }
    *scale = zero ? 0 : pack_scale(s & 0x7F);
}

static __global__ void pack_kernel(uint8_t *packed, const uint8_t *codes, const uint8_t *scales, int rows, int cols, int interleave,
                                   int units, long long n) {
    long long i = (long long)blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= n) return;
    place p = thread_place(i, units);
    int g = p.lane >> 2, block = p.unit * 4 + (p.lane & 3);
    if (block >= cols / 16) return;
    uint8_t *unit = packed + ((size_t)p.tile * (size_t)units + (size_t)p.unit) * MOE4_UNIT_BYTES;
    uint32_t *words = (uint32_t *)(unit + 512 * p.m + 16 * p.lane);
    for (int half = 0; half < 2; half++) { /* rows g and g+8: the pairs 0 2 and 1 3 of each word */
        int row = source_row(p.tile * MOE4_UNIT_ROWS + 16 * p.m + g + 8 * half, interleave);
        if (row < 0 || row >= rows) continue;
        uint8_t code[16], scale;
        read_block(code, &scale, codes, scales, row, block, cols);
        unit[MOE4_UNIT_CODE_BYTES + 8 * p.lane + 2 * p.m + half] = scale;
        for (int q = 0; q < 4; q++) {
            uint8_t v[4][2] = {{0}};
            for (int h = 0; h < 2; h++) {
                v[half][h] = code[4 * q + h];
                v[half + 2][h] = code[4 * q + 2 + h];
            }
            uint8_t all[4][2] = {{0}};
            for (int h = 0; h < 2; h++) all[half][h] = all[half + 2][h] = 15;
            words[q] = (words[q] & ~pack_word(all)) | pack_word(v);
        }
    }
}

#define UNPACK_UNITS 2   /* that a block of threads takes side by side, */
#define UNPACK_AT_ONCE 4 /* and one after the other, all loads first */

/* Two lanes have a block of rows g and g+8 together, the even one k 0 .. 7: so that four store 64 bytes of a row. */
static __global__ void __launch_bounds__(128 * UNPACK_UNITS)
    unpack_kernel(__nv_bfloat16 *values, const uint8_t *packed, int rows, int cols, int interleave, int units) {
    int tile = (int)blockIdx.x, m = threadIdx.x >> 5 & 3, lane = threadIdx.x & 31, odd = lane & 1;
    int first = (int)(blockIdx.y * UNPACK_UNITS * UNPACK_AT_ONCE + threadIdx.x / 128);
    const uint8_t *from = packed + ((size_t)tile * (size_t)units + (size_t)first) * MOE4_UNIT_BYTES;
    uint2 words[UNPACK_AT_ONCE][2];
    uint16_t scales[UNPACK_AT_ONCE][2];
#pragma unroll
    for (int j = 0; j < UNPACK_AT_ONCE; j++)
#pragma unroll
        for (int i = 0; i < 2 && first + j * UNPACK_UNITS < units; i++) {
            const uint8_t *unit = from + j * UNPACK_UNITS * MOE4_UNIT_BYTES;
            int of = (lane & ~3) + 2 * i + (lane >> 1 & 1);
            words[j][i] = *(const uint2 *)(unit + 512 * m + 16 * of + 8 * odd);
            scales[j][i] = *(const uint16_t *)(unit + MOE4_UNIT_CODE_BYTES + 8 * of + 2 * m);
        }
#pragma unroll
    for (int j = 0; j < UNPACK_AT_ONCE; j++)
#pragma unroll
        for (int i = 0; i < 2; i++) {
            int block = 4 * (first + j * UNPACK_UNITS) + 2 * i + (lane >> 1 & 1);
            if (block >= cols / 16) break;
            uint32_t a[8], both = scale_multipliers<0>(scales[j][i]);
            decode_word(a, words[j][i].x, both_halves<0>(both), both_halves<1>(both));
            decode_word(a + 4, words[j][i].y, both_halves<0>(both), both_halves<1>(both));
#pragma unroll
            for (int k = 0; k < 8; k++) a[k] = mul_bf16x2(a[k], DECODE_FACTORS);
#pragma unroll
            for (int half = 0; half < 2; half++) {
                int row = source_row(tile * MOE4_UNIT_ROWS + 16 * m + (lane >> 2) + 8 * half, interleave);
                if (row < 0 || row >= rows) continue;
                *(uint4 *)(values + (size_t)row * (size_t)cols + (size_t)(16 * block + 8 * odd)) =
                    make_uint4(a[half], a[half + 2], a[half + 4], a[half + 6]);
            }
        }
}

/* The row tiles that hold any of this matrix' rows. */
static long long n_row_tiles(int rows, int interleave) {
    long long packed_rows = interleave ? 2LL * ((rows + 7) / 8 * 8) : rows;
    return (packed_rows + MOE4_UNIT_ROWS - 1) / MOE4_UNIT_ROWS;
}

cudaError_t moe4_cuda_pack(uint8_t *packed, const uint8_t *codes, const uint8_t *scales, int rows, int cols, int interleave,
                           cudaStream_t stream) {
    int units = (cols + MOE4_UNIT_K - 1) / MOE4_UNIT_K;
    long long n = n_row_tiles(rows, interleave) * units * 128;
    if (n) pack_kernel<<<(unsigned)((n + 255) / 256), 256, 0, stream>>>(packed, codes, scales, rows, cols, interleave, units, n);
    return cudaGetLastError();
}

cudaError_t moe4_cuda_unpack(__nv_bfloat16 *values, const uint8_t *packed, int rows, int cols, int interleave, cudaStream_t stream) {
    const int at_once = UNPACK_UNITS * UNPACK_AT_ONCE;
    int units = (cols + MOE4_UNIT_K - 1) / MOE4_UNIT_K;
    dim3 grid((unsigned)n_row_tiles(rows, interleave), (unsigned)((units + at_once - 1) / at_once));
    if (grid.x && grid.y) unpack_kernel<<<grid, 128 * UNPACK_UNITS, 0, stream>>>(values, packed, rows, cols, interleave, units);
    return cudaGetLastError();
}
