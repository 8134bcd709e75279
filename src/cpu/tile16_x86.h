/* What the passes over 16-column tiles share on x86-64: how they are made for each number of rows, and prefetching. */
#ifndef MOE4_CPU_TILE16_X86_H
#define MOE4_CPU_TILE16_X86_H

#include <immintrin.h>
#include <string.h>

#include "pack.h"

/* pass_<n>, for n rows: tile_pass with n as a constant. */
#define MOE4_TILE16_PASS(target, n)                             \
    target static void pass_##n(MOE4_TILE16_PARAMETERS) {       \
        tile_pass(y, y_ld, rows, w, n_chunks, cols, next, (n)); \
    }

/* Keeps a loaded register from being loaded again at each use. */
__attribute__((target("avx512f"), always_inline)) static inline __m512i moe4_once(__m512i x) {
    __asm__("" : "+v"(x));
    return x;
}

/* y[0 .. cols), of the eight at most. */
__attribute__((target("avx2"), always_inline)) static inline void moe4_store8(float *y, __m256 x, size_t cols) {
    if (cols >= 8) {
        _mm256_storeu_ps(y, x);
    } else {
        float out[8];
        _mm256_storeu_ps(out, x);
        memcpy(y, out, cols * sizeof *y);
    }
}

/* Prefetching weights into the second-level cache, some tiles ahead of tile i of n_chunks, which is w: from `next` on after the last.
 * Distances were measured on Zen 4. Where arithmetic leaves time, all lines are asked for, a few at a time, so that they do not hold up the
 * loads of a block. Otherwise (one row, AVX-512) reading runs at the speed of memory and of the hardware's own prefetch: a line in a page
 * to come is all the help it takes, more is in the way, but where reading jumps. */
enum { MOE4_TILE16_AHEAD = 20 };

static inline __attribute__((always_inline)) void moe4_prefetch_lines(const void *at, const int from, const int to) {
#pragma GCC unroll 16
    for (int line = from; line < to; line++) _mm_prefetch((const char *)at + 64 * line, _MM_HINT_T1);
}

/* Before block b of tile w: its share of the tile ahead. */
static inline __attribute__((always_inline)) void moe4_tile16_prefetch(const struct moe4_tile16 *w, size_t i, size_t n_chunks,
                                                                       const struct moe4_tile16 *next, int b, const bool all) {
    const size_t ahead = n_chunks < MOE4_TILE16_AHEAD ? n_chunks : MOE4_TILE16_AHEAD;
    const struct moe4_tile16 *at = i < n_chunks - ahead ? w + ahead : next + (i - (n_chunks - ahead));
    if (all) {
        moe4_prefetch_lines(at, 2 * b, b == 3 ? 9 : 2 * b + 2);
    } else if (b == 0) {
        moe4_prefetch_lines(at, 0, 1);
        if (at != w + ahead) moe4_prefetch_lines(at, 1, 9);
    }
}

#endif
