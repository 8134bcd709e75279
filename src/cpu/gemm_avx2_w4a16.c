/* w4a16 on AVX2: y = x @ W^T, weights NVFP4, activations bf16 held as fp32, sums fp32.
 *
 * Lanes are columns, two to each: one for the first four of eight k, one for the others. e2m1 is exact in bf16, and two byte shuffles and
 * two unpackings make bf16 of 32 nibbles; as pairs of bf16 lie in a lane, a shift or a mask makes them fp32.
 *
 *   per 8 columns x 16 k:   weights decoded                     8 shuffles, 8 unpackings, 16 shifts and masks, 6 for nibbles
 *   and row:                t = 16 products, two vectors        16 multiplies or FMAs, 8 broadcasts of two activations
 *                           acc += t * sw                       2 FMAs
 *
 * The order of a sum is fixed: the lanes' eight k of a block in a chain, blocks in order of k, the two lanes of a column at the end. */
#include "pack.h"
#include "rows.h"

#if defined(__x86_64__)
#include <immintrin.h>
#include <stdbool.h>
#include <string.h>

#include "tile16_x86.h"

#define TARGET __attribute__((target("avx2,fma")))
#define INLINE TARGET static inline __attribute__((always_inline))

enum {
    DIRECT_ROWS = 4, /* of a pass that multiplies what it decodes */
    MANY_ROWS = 9,   /* from here on weights are decoded once, into a panel in the first-level cache */
    PANEL_BLOCKS = 16,
    PANEL_ROWS = 96
};

/* Columns 0, 1, 4, 5 and 2, 3, 6, 7 of eight, two lanes to each. */
struct cols {
    __m256 v[2];
};

/* A byte for each code. */
INLINE __m256i lookup(__m256i codes, const __m128i table) {
    return _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(table), codes);
}

/* Keeps the compiler from computing it earlier than it stands, or again. */
INLINE __m256i here(__m256i x) {
    __asm__("" : "+x"(x));
    return x;
}

/* The block scales of eight columns, block b: pack.h's scale byte at bits 20..27 of a float lacks 117 in the exponent. */
INLINE struct cols scales(const struct moe4_tile16 *w, const int b, const int half) {
    const __m256i bytes = _mm256_load_si256((const __m256i *)(const void *)w->scale[8 * half]);
    const __m256i shifted = b < 3 ? _mm256_slli_epi32(bytes, 20 - 8 * b) : _mm256_srli_epi32(bytes, 4);
    const __m256i bits = _mm256_and_si256(shifted, _mm256_set1_epi32(0xff << 20));
    const __m256 s = _mm256_castsi256_ps(_mm256_add_epi32(bits, _mm256_set1_epi32(117 << 23)));
    return (struct cols){{_mm256_unpacklo_ps(s, s), _mm256_unpackhi_ps(s, s)}};
}

/* Two of eight k for eight columns, step 0 .. 3: in the nibbles of a column's four bytes lie k 0 and 1, 2 and 3 and so on, so the low ones
 * looked up are k 0 2 4 6 of a column in pairs of bytes, of which a lane has two: k 0 and 4, 2 and 6, then 1 and 5, 3 and 7. */
INLINE struct cols two(const __m256i pairs[2], const int step) {
    const __m256i upper = _mm256_set1_epi32((int)0xffff0000);
    struct cols w;
#pragma GCC unroll 2
    for (int v = 0; v < 2; v++)
        w.v[v] = _mm256_castsi256_ps(here(step % 2 ? _mm256_and_si256(pairs[v], upper) : _mm256_slli_epi32(pairs[v], 16)));
    return w;
}

/* What steps 0 and 1, or 2 and 3, take their weights from. */
INLINE void decode(__m256i pairs[2], __m256i x, const int step) {
    const __m128i low = _mm_setr_epi8(0, 0, -128, -64, 0, 64, -128, -64, 0, 0, -128, -64, 0, 64, -128, -64);
    const __m128i high = _mm_setr_epi8(0, 63, 63, 63, 64, 64, 64, 64, -128, -65, -65, -65, -64, -64, -64, -64);
    const __m256i code = _mm256_and_si256(step ? _mm256_srli_epi16(x, 4) : x, _mm256_set1_epi8(15));
    const __m256i l = lookup(code, low), h = lookup(code, high);
    pairs[0] = here(_mm256_unpacklo_epi8(l, h));
    pairs[1] = here(_mm256_unpackhi_epi8(l, h));
}

/* t += w times two activations, or = for the first of a block. */
INLINE void multiply(struct cols *t, struct cols w, const float *a, const bool first) {
    const __m256 two_a = _mm256_castpd_ps(_mm256_broadcast_sd((const double *)(const void *)a));
#pragma GCC unroll 2
    for (int v = 0; v < 2; v++) t->v[v] = first ? _mm256_mul_ps(w.v[v], two_a) : _mm256_fmadd_ps(w.v[v], two_a, t->v[v]);
}

INLINE void add_scaled(struct cols *acc, struct cols t, struct cols scale) {
#pragma GCC unroll 2
    for (int v = 0; v < 2; v++) acc->v[v] = _mm256_fmadd_ps(t.v[v], scale.v[v], acc->v[v]);
}

/* acc[m] += block b of rows m < n_rows against eight columns of one tile. */
INLINE void block(struct cols *acc, const void *const *rows, size_t i, const struct moe4_tile16 *w, const int b, const int half,
                  const int n_rows) {
    struct cols t[DIRECT_ROWS];
#pragma GCC unroll 2
    for (int h = 0; h < 2; h++) {
        const __m256i x = _mm256_load_si256((const __m256i *)(const void *)(w->code[b][h] + 32 * half));
        __m256i pairs[2];
#pragma GCC unroll 4
        for (int step = 0; step < 4; step++) {
            if (step % 2 == 0) decode(pairs, x, step);
            const struct cols v = two(pairs, step);
#pragma GCC unroll 4
            for (int m = 0; m < n_rows; m++) multiply(&t[m], v, (const float *)rows[m] + 64 * i + 16 * b + 8 * h + 2 * step, h + step == 0);
        }
    }
    const struct cols s = scales(w, b, half);
#pragma GCC unroll 4
    for (int m = 0; m < n_rows; m++) add_scaled(&acc[m], t[m], s);
    __asm__ volatile("" ::: "memory"); /* or activations of these columns stay in registers, for the next, and sums do not */
}

INLINE __m256 finish(struct cols acc) {
    return _mm256_hadd_ps(acc.v[0], acc.v[1]);
}

/* y[m][0..16) = rows m < n_rows, all of K, against one tile. */
INLINE void tile_pass(MOE4_TILE16_PARAMETERS, const int n_rows) {
    const size_t n_cols = (size_t)__builtin_popcount(cols);
    struct cols acc[2][DIRECT_ROWS];
#pragma GCC unroll 4
    for (int m = 0; m < n_rows; m++) acc[0][m] = acc[1][m] = (struct cols){{_mm256_setzero_ps(), _mm256_setzero_ps()}};
    for (size_t i = 0; i < n_chunks; i++, w++)
#pragma GCC unroll 4
        for (int b = 0; b < 4; b++) {
            moe4_tile16_prefetch(w, i, n_chunks, next, b, true);
            block(acc[0], rows, i, w, b, 0, n_rows);
            block(acc[1], rows, i, w, b, 1, n_rows);
        }
#pragma GCC unroll 4
    for (int m = 0; m < n_rows; m++)
        for (size_t half = 0; half < 2 && n_cols > 8 * half; half++)
            moe4_store8(y + (size_t)m * y_ld + 8 * half, finish(acc[half][m]), n_cols - 8 * half);
}

MOE4_TILE16_PASS(TARGET, 1)
MOE4_TILE16_PASS(TARGET, 2)
MOE4_TILE16_PASS(TARGET, 3)
MOE4_TILE16_PASS(TARGET, 4)
static const moe4_tile16_pass passes[DIRECT_ROWS + 1] = {NULL, pass_1, pass_2, pass_3, pass_4};

/* ---- many rows ---- */

/* A block of eight columns decoded. */
struct cols8 {
    struct cols w[8], scale;
};

/* gemm's scratch */
struct panel {
    struct cols8 block[PANEL_BLOCKS];
    struct cols acc[PANEL_ROWS];
};
_Static_assert(sizeof(struct panel) % 64 == 0, "scratch of a call");

TARGET static void decode_panel(struct cols8 *out, const struct moe4_tile16 *w, size_t n_chunks, int half) {
    for (size_t i = 0; i < n_chunks; i++, w++)
#pragma GCC unroll 4
        for (int b = 0; b < 4; b++, out++) {
#pragma GCC unroll 2
            for (int h = 0; h < 2; h++) {
                const __m256i x = _mm256_load_si256((const __m256i *)(const void *)(w->code[b][h] + 32 * half));
                __m256i pairs[2];
#pragma GCC unroll 4
                for (int step = 0; step < 4; step++) {
                    if (step % 2 == 0) decode(pairs, x, step);
                    out->w[4 * h + step] = two(pairs, step);
                }
            }
            out->scale = scales(w, b, half);
        }
}

/* acc[m] += rows m < n_rows, from k0 on, against n_blocks blocks. */
INLINE void panel_pass(struct cols *acc, const void *const *rows, size_t k0, const struct cols8 *w, size_t n_blocks, const int n_rows) {
    const float *row[DIRECT_ROWS];
    struct cols sum[DIRECT_ROWS];
#pragma GCC unroll 4
    for (int m = 0; m < n_rows; m++) {
        row[m] = (const float *)rows[m] + k0;
        sum[m] = acc[m];
    }
    for (size_t b = 0; b < n_blocks; b++, w++) {
        struct cols t[DIRECT_ROWS];
#pragma GCC unroll 8
        for (int step = 0; step < 8; step++)
#pragma GCC unroll 4
            for (int m = 0; m < n_rows; m++) multiply(&t[m], w->w[step], row[m] + 16 * b + 2 * step, step == 0);
#pragma GCC unroll 4
        for (int m = 0; m < n_rows; m++) add_scaled(&sum[m], t[m], w->scale);
    }
#pragma GCC unroll 4
    for (int m = 0; m < n_rows; m++) acc[m] = sum[m];
}

TARGET static void three_rows(struct cols *acc, const void *const *rows, size_t k0, const struct cols8 *w, size_t n_blocks) {
    panel_pass(acc, rows, k0, w, n_blocks, 3);
}

TARGET static void four_rows(struct cols *acc, const void *const *rows, size_t k0, const struct cols8 *w, size_t n_blocks) {
    panel_pass(acc, rows, k0, w, n_blocks, 4);
}

/* y[m][0..n_cols) = rows m < n_rows, MANY_ROWS to PANEL_ROWS of them, against eight columns of the tiles from w on. */
TARGET static void gemm_panel(float *y, size_t y_ld, const void *const *rows, size_t n_rows, const struct moe4_tile16 *w, size_t n_chunks,
                              int half, size_t n_cols, struct panel *panel) {
    const size_t n_passes = (n_rows + 3) / 4; /* of three or four rows */
    for (size_t m = 0; m < n_rows; m++) panel->acc[m] = (struct cols){{_mm256_setzero_ps(), _mm256_setzero_ps()}};
    for (size_t i = 0, n; i < n_chunks; i += n) {
        n = n_chunks - i < PANEL_BLOCKS / 4 ? n_chunks - i : PANEL_BLOCKS / 4;
        decode_panel(panel->block, w + i, n, half);
        for (size_t pass = 0; pass < n_passes; pass++) {
            const size_t m = n_rows * pass / n_passes;
            (n_rows * (pass + 1) / n_passes - m == 4 ? four_rows : three_rows)(panel->acc + m, rows + m, 64 * i, panel->block, 4 * n);
        }
    }
    for (size_t m = 0; m < n_rows; m++) moe4_store8(y + m * y_ld, finish(panel->acc[m]), n_cols);
}

static void gemm(float *y, size_t y_ld, const void *const *rows, size_t n_rows, const struct moe4_matrix *w, size_t col0, size_t n_cols,
                 const void *next, void *scratch) {
    if (n_rows < MANY_ROWS) {
        moe4_tile16_gemm(y, y_ld, rows, n_rows, w, col0, n_cols, next, passes, DIRECT_ROWS, DIRECT_ROWS);
        return;
    }
    const size_t n_chunks = (w->w.cols + 63) / 64, n_groups = (n_rows + PANEL_ROWS - 1) / PANEL_ROWS;
    for (size_t group = 0; group < n_groups; group++) {
        const size_t m = n_rows * group / n_groups, n = n_rows * (group + 1) / n_groups - m;
        for (size_t col = 0; col < n_cols; col += 8)
            gemm_panel(y + m * y_ld + col, y_ld, rows + m, n, moe4_tile16_at(w, col0 + col / 16 * 16), n_chunks, (int)(col / 8 % 2),
                       n_cols - col, scratch);
    }
}

/* fp32 rows with zeros up to a multiple of 64; each eight k in the order 0 4 2 6 1 5 3 7, as decode8 has them. */
static size_t row_bytes(size_t k) {
    return (k + 63) / 64 * 64 * sizeof(float);
}

TARGET static uint64_t pack_row(const struct moe4_kernels *kernels, void *row, float *factor_ret, const float *x, size_t k,
                                const struct moe4_rounding *rounding) {
    const size_t own = moe4_fp32_row_bytes(k);
    const __m256i order = _mm256_setr_epi32(0, 4, 2, 6, 1, 5, 3, 7);
    memset((char *)row + own, 0, row_bytes(k) - own);
    const uint64_t n_saturated = moe4_fp32_pack_row(kernels, row, factor_ret, x, k, rounding);
    for (float *at = row, *end = at + own / sizeof *at; at < end; at += 8)
        _mm256_storeu_ps(at, _mm256_permutevar8x32_ps(_mm256_loadu_ps(at), order));
    return n_saturated;
}

static const struct moe4_gemm w4a16 = {
    .name = "w4a16 fp32, AVX2",
    .tile_cols = 16,
    .many_cols = 64,
    .scratch_bytes = sizeof(struct panel),
    .layout = MOE4_TILE16_LAYOUT,
    .packed_bytes = moe4_tile16_bytes,
    .pack = moe4_tile16_pack_avx2,
    .row_bytes = row_bytes,
    .pack_row = pack_row,
    .gemm = gemm,
};

void moe4_kernels_gemm_avx2_w4a16(struct moe4_kernels *k) {
    k->w4a16 = &w4a16;
}
#endif
