/* w4a4 on AVX2: the exact integer block dots of gemm_avx512.c through vpmaddubsw, eight columns at a time.
 *
 *   per 8 columns x 16 k and row:   words = dot2(2w + 12, 2a), four times, added      4 vpmaddubsw, 3 adds
 *                                   s = pairs of words + start                        vpmaddwd by ones, add
 *                                   acc += float(s) * (sw * sa)                       convert, multiply, FMA
 *
 * No sum of words overflows: 8 * 24 * 12 = 2304. The order of a sum is over blocks in order of k.
 *
 * Few rows decode a tile for each pass. For many, what limits Zen 4 is not the multiplications but the count of vector instructions, four
 * a clock with broadcasts among them: so a panel of weights is decoded once for all rows, and rows are spread over all lanes once for
 * all columns of a panel. Each instruction of the step above then takes one operand from the first-level cache. */
#include "rows.h"

#if defined(__x86_64__)
#include <immintrin.h>
#include <stdbool.h>
#include <string.h>

#include "tile16_x86.h"

#define TARGET __attribute__((target("avx2,fma")))
#define INLINE TARGET static inline __attribute__((always_inline))

enum { MAX_ROWS = 6 /* rows of one pass: accumulators, four decoded weights, scales and temporaries fill the 16 registers */ };

/* 64 k of an activation row; k in the order 0 2 4 6 1 3 5 7 8 10 12 14 9 11 13 15, as the packed nibbles come out. */
struct chunk {
    int8_t a[4][16];
    int32_t start[4]; /* -12 * sum of a[b] */
    float scale[4];
};
_Static_assert(sizeof(struct chunk) == 96, "packed activation chunk");

/* pack.h's scale byte at bits 20..27 of a float is (8 + mantissa) * 2^(exponent - 130). With 96 more in the exponent it is normal and 2^21
 * short of the block scale; both codes were doubled. */
#define SCALE_BIAS 96
#define LAST_FACTOR 0x1p19f

/* Pairs of products of unsigned bytes w and signed bytes a. */
INLINE __m256i dot2(__m256i w, const int8_t a[32]) {
    return _mm256_maddubs_epi16(w, _mm256_load_si256((const __m256i *)(const void *)a));
}

/* The same with four bytes a, repeated. */
INLINE __m256i dot2_repeated(__m256i w, const int8_t *a) {
    int32_t four;
    memcpy(&four, a, sizeof four);
    return _mm256_maddubs_epi16(w, _mm256_set1_epi32(four));
}

/* acc += (pairs of words + start) * scale */
INLINE __m256 add_block(__m256 acc, __m256i words, __m256i start, __m256 sw, __m256 sa, __m256i ones) {
    const __m256i s = _mm256_add_epi32(_mm256_madd_epi16(words, ones), start);
    return _mm256_fmadd_ps(_mm256_mul_ps(sw, sa), _mm256_cvtepi32_ps(s), acc);
}

/* v[j] = bytes 2w + 12 of eight columns of block b, k 4j .. 4j + 3 in chunk's order. Returns the scales, SCALE_BIAS aside. */
INLINE __m256 decode_block(__m256i v[4], const struct moe4_tile16 *w, const int b, const int half) {
    const __m256i table = _mm256_broadcastsi128_si256(_mm_setr_epi8(12, 13, 14, 15, 16, 18, 20, 24, 12, 11, 10, 9, 8, 6, 4, 0));
    const __m256i nibble = _mm256_set1_epi8(15);
    const __m256i x = _mm256_load_si256((const __m256i *)(const void *)(w->code[b][0] + 32 * half));
    const __m256i z = _mm256_load_si256((const __m256i *)(const void *)(w->code[b][1] + 32 * half));
    v[0] = _mm256_shuffle_epi8(table, _mm256_and_si256(x, nibble));
    v[1] = _mm256_shuffle_epi8(table, _mm256_and_si256(_mm256_srli_epi16(x, 4), nibble));
    v[2] = _mm256_shuffle_epi8(table, _mm256_and_si256(z, nibble));
    v[3] = _mm256_shuffle_epi8(table, _mm256_and_si256(_mm256_srli_epi16(z, 4), nibble));
    const __m256i scales = _mm256_load_si256((const __m256i *)(const void *)w->scale[8 * half]);
    const __m256i shifted = b < 3 ? _mm256_slli_epi32(scales, 20 - 8 * b) : _mm256_srli_epi32(scales, 4);
    const __m256i bits = _mm256_and_si256(shifted, _mm256_set1_epi32(0xff << 20));
    return _mm256_castsi256_ps(_mm256_or_si256(bits, _mm256_set1_epi32(SCALE_BIAS << 23)));
}

/* acc[m] += block b of rows m < n_rows against eight columns of one tile. */
INLINE void block(__m256 *acc, const void *const *rows, size_t i, const struct moe4_tile16 *w, const int b, const int half,
                  const int n_rows) {
    const __m256i ones = _mm256_set1_epi16(1);
    __m256i v[4];
    const __m256 sw = decode_block(v, w, b, half);
#pragma GCC unroll 8
    for (int m = 0; m < n_rows; m++) {
        const struct chunk *a = (const struct chunk *)rows[m] + i;
        const __m256i s01 = _mm256_add_epi16(dot2_repeated(v[0], a->a[b]), dot2_repeated(v[1], a->a[b] + 4));
        const __m256i s23 = _mm256_add_epi16(dot2_repeated(v[2], a->a[b] + 8), dot2_repeated(v[3], a->a[b] + 12));
        acc[m] = add_block(acc[m], _mm256_add_epi16(s01, s23), _mm256_set1_epi32(a->start[b]), sw, _mm256_set1_ps(a->scale[b]), ones);
    }
}

INLINE __m256 finish(__m256 acc) {
    return _mm256_mul_ps(acc, _mm256_set1_ps(LAST_FACTOR));
}

/* y[m][0..16) = rows m < n_rows, all of K, against one tile: both halves of its columns in one go for few rows, in turn for many. */
INLINE void tile_pass(MOE4_TILE16_PARAMETERS, const int n_rows) {
    const int together = n_rows <= MAX_ROWS / 2 ? 2 : 1;
    const size_t n_cols = (size_t)__builtin_popcount(cols);
    for (int half = 0; half < 2; half += together) {
        __m256 acc[2][MAX_ROWS];
#pragma GCC unroll 8
        for (int m = 0; m < n_rows; m++) acc[0][m] = acc[1][m] = _mm256_setzero_ps();
        for (size_t i = 0; i < n_chunks; i++) {
#pragma GCC unroll 4
            for (int b = 0; b < 4; b++) {
                if (half == 0) moe4_tile16_prefetch(w + i, i, n_chunks, next, b, true);
                block(acc[0], rows, i, w + i, b, together == 2 ? 0 : half, n_rows);
                if (together == 2) block(acc[1], rows, i, w + i, b, 1, n_rows);
            }
        }
#pragma GCC unroll 2
        for (int h = 0; h < together; h++)
#pragma GCC unroll 8
            for (int m = 0; m < n_rows; m++)
                if (n_cols > (size_t)(8 * (half + h)))
                    moe4_store8(y + m * y_ld + 8 * (half + h), finish(acc[h][m]), n_cols - (size_t)(8 * (half + h)));
    }
}

MOE4_TILE16_PASS(TARGET, 1)
MOE4_TILE16_PASS(TARGET, 2)
MOE4_TILE16_PASS(TARGET, 3)
MOE4_TILE16_PASS(TARGET, 4)
MOE4_TILE16_PASS(TARGET, 5)
MOE4_TILE16_PASS(TARGET, 6)
static const moe4_tile16_pass passes[MAX_ROWS + 1] = {NULL, pass_1, pass_2, pass_3, pass_4, pass_5, pass_6};

/* ---- many rows ---- */

enum { MANY_ROWS = 13, PANEL_COLS = 256, PANEL_CHUNKS = 4, PANEL_BLOCKS = 4 * PANEL_CHUNKS };

/* A block of weights decoded, 8 columns x 16 k. */
struct cols8 {
    uint8_t w[4][32];
    float scale[8];
};

/* A block of a row, each part repeated over the lanes. */
struct spread {
    int8_t a[4][32];
    int32_t start[8];
    float scale[8];
};

/* out[half][block] = columns 8 * half .. of n_chunks tiles. */
TARGET static void decode_tiles(struct cols8 (*out)[PANEL_BLOCKS], const struct moe4_tile16 *w, size_t n_chunks) {
    for (size_t i = 0; i < n_chunks; i++, w++) {
#pragma GCC unroll 16
        for (size_t line = 0; line < sizeof *w; line += 64) _mm_prefetch((const char *)(w + PANEL_CHUNKS) + line, _MM_HINT_T1);
#pragma GCC unroll 8
        for (int n = 0; n < 8; n++) {
            struct cols8 *block = &out[n / 4][4 * i + (size_t)n % 4];
            __m256i v[4];
            _mm256_store_ps(block->scale, decode_block(v, w, n % 4, n / 4));
            for (int j = 0; j < 4; j++) _mm256_store_si256((__m256i *)(void *)block->w[j], v[j]);
        }
    }
}

/* out[block][m] from chunks [chunk0, chunk0 + n_chunks) of rows m < n_rows. */
TARGET static void spread_rows(struct spread (*out)[MAX_ROWS], const void *const *rows, size_t n_rows, size_t chunk0, size_t n_chunks) {
    for (size_t m = 0; m < n_rows; m++)
        for (size_t b = 0; b < 4 * n_chunks; b++) {
            const struct chunk *a = (const struct chunk *)rows[m] + chunk0 + b / 4;
            if (b % 4 == 0) { /* for the next panel */
                _mm_prefetch((const char *)(a + PANEL_CHUNKS), _MM_HINT_T1);
                _mm_prefetch((const char *)(a + PANEL_CHUNKS) + 64, _MM_HINT_T1);
            }
            struct spread *to = &out[b][m];
            int32_t four[4];
            memcpy(four, a->a[b % 4], sizeof four);
            for (int j = 0; j < 4; j++) _mm256_store_si256((__m256i *)(void *)to->a[j], _mm256_set1_epi32(four[j]));
            _mm256_store_si256((__m256i *)(void *)to->start, _mm256_set1_epi32(a->start[b % 4]));
            _mm256_store_ps(to->scale, _mm256_set1_ps(a->scale[b % 4]));
        }
}

INLINE __m256 load(const float *y, size_t cols) {
    if (cols >= 8) return _mm256_loadu_ps(y);
    float in[8] = {0};
    memcpy(in, y, cols * sizeof *y);
    return _mm256_loadu_ps(in);
}

/* y[m][0..cols) += rows m < n_rows against n_blocks blocks of eight columns, or = for the first blocks of K; finished after the last. */
INLINE void panel_pass(float *y, size_t y_ld, const struct spread (*rows)[MAX_ROWS], const struct cols8 *w, size_t n_blocks, size_t cols,
                       bool first, bool last, const int n_rows) {
    const __m256i ones = _mm256_set1_epi16(1);
    __m256 acc[MAX_ROWS];
#pragma GCC unroll 8
    for (int m = 0; m < n_rows; m++) acc[m] = first ? _mm256_setzero_ps() : load(y + (size_t)m * y_ld, cols);
    for (size_t b = 0; b < n_blocks; b++, w++, rows++) {
        const __m256i w0 = _mm256_load_si256((const __m256i *)(const void *)w->w[0]);
        const __m256i w1 = _mm256_load_si256((const __m256i *)(const void *)w->w[1]);
        const __m256i w2 = _mm256_load_si256((const __m256i *)(const void *)w->w[2]);
        const __m256i w3 = _mm256_load_si256((const __m256i *)(const void *)w->w[3]);
        const __m256 sw = _mm256_load_ps(w->scale);
#pragma GCC unroll 8
        for (int m = 0; m < n_rows; m++) {
            const struct spread *a = &(*rows)[m];
            const __m256i s01 = _mm256_add_epi16(dot2(w0, a->a[0]), dot2(w1, a->a[1]));
            const __m256i s23 = _mm256_add_epi16(dot2(w2, a->a[2]), dot2(w3, a->a[3]));
            acc[m] = add_block(acc[m], _mm256_add_epi16(s01, s23), _mm256_load_si256((const __m256i *)(const void *)a->start), sw,
                               _mm256_load_ps(a->scale), ones);
        }
    }
#pragma GCC unroll 8
    for (int m = 0; m < n_rows; m++) moe4_store8(y + (size_t)m * y_ld, last ? finish(acc[m]) : acc[m], cols);
}

#define PANEL_PASS(n)                                                                                                                      \
    TARGET static void panel_pass_##n(float *y, size_t y_ld, const struct spread(*rows)[MAX_ROWS], const struct cols8 *w, size_t n_blocks, \
                                      size_t cols, bool first, bool last) {                                                                \
        panel_pass(y, y_ld, rows, w, n_blocks, cols, first, last, n);                                                                      \
    }
PANEL_PASS(1)
PANEL_PASS(2)
PANEL_PASS(3)
PANEL_PASS(4)
PANEL_PASS(5)
PANEL_PASS(6)
static void (*const panel_passes[MAX_ROWS + 1])(float *y, size_t y_ld, const struct spread (*rows)[MAX_ROWS], const struct cols8 *w,
                                                size_t n_blocks, size_t cols, bool first, bool last) = {
    NULL, panel_pass_1, panel_pass_2, panel_pass_3, panel_pass_4, panel_pass_5, panel_pass_6};

/* gemm's scratch */
struct panel {
    struct cols8 cols[PANEL_COLS / 8][PANEL_BLOCKS];
    struct spread rows[PANEL_BLOCKS][MAX_ROWS];
};
_Static_assert(sizeof(struct panel) % 64 == 0, "scratch of a call");

/* y[m][0..n_cols) = rows m < n_rows against n_cols <= PANEL_COLS columns from tile w on. */
static void gemm_panel(float *y, size_t y_ld, const void *const *rows, size_t n_rows, const struct moe4_tile16 *w, size_t chunks,
                       size_t n_cols, struct panel *panel) {
    const size_t n_passes = (n_rows + MAX_ROWS - 1) / MAX_ROWS;
    for (size_t chunk = 0, n; chunk < chunks; chunk += n) {
        n = chunks - chunk < PANEL_CHUNKS ? chunks - chunk : PANEL_CHUNKS;
        for (size_t col = 0; col < n_cols; col += 16) decode_tiles(panel->cols + col / 8, w + col / 16 * chunks + chunk, n);
        for (size_t pass = 0; pass < n_passes; pass++) {
            const size_t row0 = n_rows * pass / n_passes, n_m = n_rows * (pass + 1) / n_passes - row0;
            spread_rows(panel->rows, rows + row0, n_m, chunk, n);
            for (size_t col = 0; col < n_cols; col += 8)
                panel_passes[n_m](y + row0 * y_ld + col, y_ld, (const struct spread(*)[MAX_ROWS])panel->rows, panel->cols[col / 8], 4 * n,
                                  n_cols - col, chunk == 0, chunk + n == chunks);
        }
    }
}

static void gemm(float *y, size_t y_ld, const void *const *rows, size_t n_rows, const struct moe4_matrix *w, size_t col0, size_t n_cols,
                 const void *next, void *scratch) {
    if (n_rows < MANY_ROWS) {
        moe4_tile16_gemm(y, y_ld, rows, n_rows, w, col0, n_cols, next, passes, MAX_ROWS, MAX_ROWS);
        return;
    }
    const size_t chunks = (w->w.cols + 63) / 64;
    for (size_t col = 0; col < n_cols; col += PANEL_COLS)
        gemm_panel(y + col, y_ld, rows, n_rows, (const struct moe4_tile16 *)w->packed + (col0 + col) / 16 * chunks, chunks,
                   n_cols - col < PANEL_COLS ? n_cols - col : PANEL_COLS, scratch);
}

static size_t row_bytes(size_t k) {
    return ((k + 63) / 64 * sizeof(struct chunk) + 63) / 64 * 64;
}

/* One chunk from 32 bytes of codes and 4 scales. */
TARGET static void pack_chunk(void *chunk, const uint8_t codes[32], const uint8_t scales[4]) {
    struct chunk *a = chunk;
    const __m256i table = _mm256_broadcastsi128_si256(_mm_setr_epi8(0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12));
    const __m256i nibble = _mm256_set1_epi8(15), x = _mm256_loadu_si256((const __m256i *)(const void *)codes);
    const __m256i even = _mm256_shuffle_epi8(table, _mm256_and_si256(x, nibble));
    const __m256i odd = _mm256_shuffle_epi8(table, _mm256_and_si256(_mm256_srli_epi16(x, 4), nibble));
    const __m256i b02 = _mm256_unpacklo_epi32(even, odd), b13 = _mm256_unpackhi_epi32(even, odd);
    _mm_storeu_si128((__m128i *)(void *)a->a[0], _mm256_castsi256_si128(b02));
    _mm_storeu_si128((__m128i *)(void *)a->a[1], _mm256_castsi256_si128(b13));
    _mm_storeu_si128((__m128i *)(void *)a->a[2], _mm256_extracti128_si256(b02, 1));
    _mm_storeu_si128((__m128i *)(void *)a->a[3], _mm256_extracti128_si256(b13, 1));
    for (int b = 0; b < 4; b++) {
        int32_t sum = 0;
        for (int i = 0; i < 16; i++) sum += a->a[b][i];
        a->start[b] = -12 * sum;
        a->scale[b] = moe4_e4m3_to_float(scales[b]);
    }
}

static uint64_t pack_row(const struct moe4_kernels *kernels, void *row, float *factor_ret, const float *x, size_t k,
                         const struct moe4_rounding *rounding) {
    return moe4_chunks_pack_row(kernels, row, factor_ret, x, k, rounding, pack_chunk, sizeof(struct chunk));
}

static void pack_codes(const struct moe4_kernels *kernels, void *row, float *factor_ret, const uint8_t *codes, const uint8_t *scales,
                       size_t k) {
    (void)kernels;
    moe4_chunks_pack_codes(row, factor_ret, codes, scales, k, pack_chunk, sizeof(struct chunk));
}

static const struct moe4_gemm w4a4 = {
    .name = "w4a4 avx2",
    .tile_cols = 16,
    .many_cols = PANEL_COLS,
    .scratch_bytes = sizeof(struct panel),
    .layout = MOE4_TILE16_LAYOUT,
    .packed_bytes = moe4_tile16_bytes,
    .pack = moe4_tile16_pack_avx2,
    .row_bytes = row_bytes,
    .pack_row = pack_row,
    .pack_codes = pack_codes,
    .gemm = gemm,
};

void moe4_kernels_gemm_avx2_w4a4(struct moe4_kernels *k) {
    k->w4a4 = &w4a4;
}
#endif
