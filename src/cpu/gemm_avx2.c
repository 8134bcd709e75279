/* Products of unquantized weights on AVX2 and FMA, in fp32. Eight columns of W are widened once per 512 k into a panel that stays in L1,
 * and every row of x then meets the panel in tiles of 3 rows x 4 columns: 12 accumulators, 3 loads of x, the panel as memory operands. One
 * element's sum: eight lanes over k of a chunk, the lanes pairwise, the chunks in order; the same for any tile, so results depend on K
 * alone. */
#include "kernels.h"
#include "rows.h"

#if defined(__x86_64__)
#include <immintrin.h>
#include <string.h>

#define AVX2 __attribute__((target("avx2,fma,f16c")))
#define INLINE static inline __attribute__((always_inline)) AVX2

enum { CHUNK = 512, COLS = 8, TILE_ROWS = 3, TILE_COLS = 4 };

/* ---- weights into the panel ---- */

/* Unquantized weights, zeros up to a multiple of 8. */
AVX2 static void widen_column(float *out, const moe4_weight *w, size_t col, size_t k0, size_t n) {
    size_t size = moe4_dtype_bytes(w->dtype);
    const char *src = (const char *)w->data + (col * w->cols + k0) * size;
    for (size_t k = 0; k < n; k += 8) {
        char tail[32] = {0};
        const char *at = src + k * size;
        if (n - k < 8) at = memcpy(tail, at, (n - k) * size);
        __m256 v;
        if (w->dtype == MOE4_F32) {
            v = _mm256_loadu_ps((const float *)at);
        } else {
            __m128i half = _mm_loadu_si128((const __m128i *)at);
            v = w->dtype == MOE4_F16 ? _mm256_cvtph_ps(half) : _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16));
        }
        _mm256_store_ps(out + k, v);
    }
}

/* ---- panel times rows ---- */

/* Four vectors -> their four sums, lanes added pairwise. */
INLINE __m128 sum4(const __m256 v[TILE_COLS]) {
    __m256 t = _mm256_hadd_ps(_mm256_hadd_ps(v[0], v[1]), _mm256_hadd_ps(v[2], v[3]));
    return _mm_add_ps(_mm256_castps256_ps128(t), _mm256_extractf128_ps(t, 1));
}

INLINE void add_sums(float *y, size_t y_ld, __m256 acc[][TILE_COLS], int n_rows, size_t n_cols, bool first) {
#pragma GCC unroll 4
    for (int m = 0; m < n_rows; m++) {
        float *out = y + (size_t)m * y_ld, sum[TILE_COLS];
        _mm_storeu_ps(sum, sum4(acc[m]));
        for (size_t j = 0; j < n_cols; j++) out[j] = first ? sum[j] : out[j] + sum[j];
    }
}

/* y[m][0..4) = (first ? 0 : y) + x[m] . panel columns, over n k; n_rows is a constant at each call. */
INLINE void tile(float *y, size_t y_ld, const float *const *x, int n_rows, const float (*panel)[CHUNK], size_t n_cols, size_t n,
                 bool first) {
    __m256 acc[TILE_ROWS][TILE_COLS];
#pragma GCC unroll 4
    for (int m = 0; m < n_rows; m++)
#pragma GCC unroll 4
        for (int j = 0; j < TILE_COLS; j++) acc[m][j] = _mm256_setzero_ps();
    for (size_t k = 0; k < n; k += 8) {
        __m256 a[TILE_ROWS];
#pragma GCC unroll 4
        for (int m = 0; m < n_rows; m++) a[m] = _mm256_loadu_ps(x[m] + k);
#pragma GCC unroll 4
        for (int j = 0; j < TILE_COLS; j++) {
            __m256 b = _mm256_load_ps(panel[j] + k);
#pragma GCC unroll 4
            for (int m = 0; m < n_rows; m++) acc[m][j] = _mm256_fmadd_ps(a[m], b, acc[m][j]);
        }
    }
    add_sums(y, y_ld, acc, n_rows, n_cols, first);
}

AVX2 static void panel_times_rows(float *y, size_t y_ld, const void *const *rows, size_t n_rows, const float (*panel)[CHUNK], size_t n_cols,
                                  size_t k0, size_t n) {
    for (size_t m = 0; m < n_rows; m += TILE_ROWS) {
        size_t n_m = n_rows - m < TILE_ROWS ? n_rows - m : TILE_ROWS;
        const float *x[TILE_ROWS];
        for (size_t i = 0; i < n_m; i++) x[i] = (const float *)rows[m + i] + k0;
        for (size_t j = 0; j < n_cols; j += TILE_COLS) {
            size_t n_j = n_cols - j < TILE_COLS ? n_cols - j : TILE_COLS;
            float *out = y + m * y_ld + j;
            if (n_m == 3) {
                tile(out, y_ld, x, 3, panel + j, n_j, n, k0 == 0);
            } else if (n_m == 2) {
                tile(out, y_ld, x, 2, panel + j, n_j, n, k0 == 0);
            } else {
                tile(out, y_ld, x, 1, panel + j, n_j, n, k0 == 0);
            }
        }
    }
}

AVX2 static void gemm(float *y, size_t y_ld, const void *const *rows, size_t n_rows, const struct moe4_matrix *w, size_t col0,
                      size_t n_cols, const void *next, void *scratch) {
    (void)scratch;
    (void)next;
    _Alignas(32) float panel[COLS][CHUNK];
    size_t K = w->w.cols;
    for (size_t c = 0; c < n_cols; c += COLS) {
        size_t n_c = n_cols - c < COLS ? n_cols - c : COLS;
        for (size_t k0 = 0; k0 < K; k0 += CHUNK) {
            size_t n = K - k0 < CHUNK ? K - k0 : CHUNK;
            size_t fill = (n_c + TILE_COLS - 1) / TILE_COLS * TILE_COLS; /* a tile reads four columns: repeat the last */
            for (size_t j = 0; j < fill; j++) {
                widen_column(panel[j], &w->w, col0 + c + (j < n_c ? j : n_c - 1), k0, n);
            }
            panel_times_rows(y + c, y_ld, rows, n_rows, (const float(*)[CHUNK])panel, n_c, k0, n);
        }
    }
}

/* ---- rows of results ---- */

AVX2 static void add_scaled_row(float *y, const float *x, float weight, size_t n) {
    __m256 s = _mm256_set1_ps(weight);
    size_t i = 0;
    for (; i + 8 <= n; i += 8) _mm256_storeu_ps(y + i, _mm256_add_ps(_mm256_loadu_ps(y + i), _mm256_mul_ps(s, _mm256_loadu_ps(x + i))));
    for (; i < n; i++) y[i] += weight * x[i];
}

AVX2 static void scale_row(float *y, float a, float b, size_t n) {
    __m256 va = _mm256_set1_ps(a), vb = _mm256_set1_ps(b);
    size_t i = 0;
    for (; i + 8 <= n; i += 8) _mm256_storeu_ps(y + i, _mm256_mul_ps(_mm256_mul_ps(_mm256_loadu_ps(y + i), va), vb));
    for (; i < n; i++) y[i] = y[i] * a * b;
}

static const struct moe4_gemm avx2 = {
    .name = "fp32, AVX2",
    .tile_cols = COLS,
    .packed_bytes = moe4_in_place,
    .row_bytes = moe4_fp32_row_bytes,
    .pack_row = moe4_fp32_pack_row,
    .gemm = gemm,
};

void moe4_kernels_gemm_avx2(struct moe4_kernels *k) {
    k->add_scaled_row = add_scaled_row;
    k->scale_row = scale_row;
    k->wide = &avx2;
}
#else
typedef int moe4_no_avx2; /* a translation unit may not be empty */
#endif
