/* What the passes over 16-column tiles share on x86-64: how they are made for each number of rows, and prefetching. */
#ifndef MOE4_CPU_TILE16_X86_H
#define MOE4_CPU_TILE16_X86_H

#include <immintrin.h>

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

/* Tile i of n_chunks is w: asks for weights some tiles ahead, into the second-level cache; from `next` on after the last. Distances were
 * measured on Zen 4. One row runs at the speed of memory and of the hardware's own prefetch: a line in the next page is all the help it
 * takes, more is in the way, but where a new stream starts. From two rows on, arithmetic leaves time to ask for all. */
static inline __attribute__((always_inline)) void moe4_tile16_prefetch(const struct moe4_tile16 *w, size_t i, size_t n_chunks,
                                                                       const struct moe4_tile16 *next, const int n_rows) {
    const size_t ahead = n_rows == 1 ? 7 : 12, left = n_chunks > ahead ? n_chunks - ahead : 0;
    const char *at = (const char *)(i < left ? w + ahead : next + (i - left));
    if (n_rows == 1 && i < left) {
        _mm_prefetch(at, _MM_HINT_T1);
        return;
    }
#pragma GCC unroll 16
    for (size_t line = 0; line < sizeof *w; line += 64) _mm_prefetch(at + line, _MM_HINT_T1);
}

#endif
