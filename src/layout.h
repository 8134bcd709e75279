/* Where scales and gate/up rows lie: what other files need of it beside moe4.h. */
#ifndef MOE4_LAYOUT_H
#define MOE4_LAYOUT_H

#include "internal.h"

#ifdef __CUDACC__
#define MOE4_ANYWHERE __host__ __device__ /* kernels lay out by the same formulas */
#else
#define MOE4_ANYWHERE
#endif

/* Of a matrix [rows, 16 * n_blocks], the byte where the scales of a row's blocks 4 * quad .. 4 * quad + 3 begin. */
MOE4_ANYWHERE static inline size_t moe4_scales_at(moe4_scale_layout layout, size_t rows, size_t n_blocks, size_t row, size_t quad) {
    size_t n_quads = n_blocks / 4 + (n_blocks % 4 != 0);
    if (layout == MOE4_SCALES_LINEAR) return row * n_blocks + 4 * quad;
    if (layout == MOE4_SCALES_WORDS) return 4 * (quad * rows + row);
    return 512 * (row / 128 * n_quads + quad) + row % 32 * 16 + row % 128 / 32 * 4;
}

/* Bytes of one matrix; false when they do not fit. */
bool moe4_scales_size(size_t *bytes_ret, moe4_scale_layout layout, size_t rows, size_t n_blocks);

/* A row's n scales from block `first`, a multiple of 4, on: to linear bytes, and from them. Put zeroes the end of the last quad. */
void moe4_scales_get(uint8_t *dst, const uint8_t *src, moe4_scale_layout layout, size_t rows, size_t n_blocks, size_t row, size_t first,
                     size_t n);
void moe4_scales_put(uint8_t *dst, const uint8_t *src, moe4_scale_layout layout, size_t rows, size_t n_blocks, size_t row, size_t first,
                     size_t n);
/* Zeroes the rows that pad a matrix in the layout. */
void moe4_scales_pad(uint8_t *dst, moe4_scale_layout layout, size_t rows, size_t n_blocks);

/* Row of [gate; up] halves -> where it lies among 2 * half rows interleaved in groups of n. */
MOE4_ANYWHERE static inline size_t moe4_interleaved_row(size_t row, size_t half, size_t n) {
    size_t up = row >= half, i = up ? row - half : row;
    return i / n * 2 * n + up * n + i % n;
}

#endif
