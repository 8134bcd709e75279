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

static __global__ void unpack_kernel(__nv_bfloat16 *values, const uint8_t *packed, int rows, int cols, int interleave, int units,
                                     long long n) {
    long long i = (long long)blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= n) return;
    place p = thread_place(i, units);
    int g = p.lane >> 2, block = p.unit * 4 + (p.lane & 3);
    if (block >= cols / 16) return;
    const uint8_t *unit = packed + ((size_t)p.tile * (size_t)units + (size_t)p.unit) * MOE4_UNIT_BYTES;
    const uint32_t *words = (const uint32_t *)(unit + 512 * p.m + 16 * p.lane);
    const uint8_t *s = unit + MOE4_UNIT_CODE_BYTES + 8 * p.lane + 2 * p.m;
    uint32_t multipliers = scale_multipliers<0>(*(const uint16_t *)s);
    for (int q = 0; q < 4; q++) {
        uint32_t a[4];
        decode_word(a, words[q], both_halves<0>(multipliers), both_halves<1>(multipliers));
        for (int pair = 0; pair < 4; pair++) {
            int row = source_row(p.tile * MOE4_UNIT_ROWS + 16 * p.m + g + 8 * (pair & 1), interleave);
            if (row < 0 || row >= rows) continue;
            __nv_bfloat16 *to = values + (size_t)row * (size_t)cols + (size_t)block * 16 + 4 * q + 2 * (pair >> 1);
            for (int h = 0; h < 2; h++) {
                __nv_bfloat16_raw bits;
                bits.x = (uint16_t)(a[pair] >> 16 * h);
                to[h] = __nv_bfloat16(__bfloat162float(__nv_bfloat16(bits)) * MOE4_DECODE_FACTOR);
            }
        }
    }
}

/* Threads for the row tiles that hold any of this matrix' rows. */
static long long n_threads(int rows, int units, int interleave) {
    long long packed_rows = interleave ? 2LL * ((rows + 7) / 8 * 8) : rows;
    return (packed_rows + MOE4_UNIT_ROWS - 1) / MOE4_UNIT_ROWS * units * 128;
}

cudaError_t moe4_cuda_pack(uint8_t *packed, const uint8_t *codes, const uint8_t *scales, int rows, int cols, int interleave,
                           cudaStream_t stream) {
    int units = (cols + MOE4_UNIT_K - 1) / MOE4_UNIT_K;
    long long n = n_threads(rows, units, interleave);
    if (n) pack_kernel<<<(unsigned)((n + 255) / 256), 256, 0, stream>>>(packed, codes, scales, rows, cols, interleave, units, n);
    return cudaGetLastError();
}

cudaError_t moe4_cuda_unpack(__nv_bfloat16 *values, const uint8_t *packed, int rows, int cols, int interleave, cudaStream_t stream) {
    int units = (cols + MOE4_UNIT_K - 1) / MOE4_UNIT_K;
    long long n = n_threads(rows, units, interleave);
    if (n) unpack_kernel<<<(unsigned)((n + 255) / 256), 256, 0, stream>>>(values, packed, rows, cols, interleave, units, n);
    return cudaGetLastError();
}
