/* The products on AVX2 and FMA, in fp32. Eight columns of W are decoded once per 512 k into a panel that stays in L1, and every row of
 * x then meets the panel in tiles of 3 rows x 4 columns: 12 accumulators, 3 loads of x, the panel as memory operands. Up to 3 rows need no
 * panel: what is decoded is multiplied at once. One element's sum: eight lanes over k of a chunk, the lanes pairwise, the chunks in
 * order; the same for any tile, so results depend on K alone. */
#include "kernels.h"
#include "rows.h"

#if defined(__x86_64__)
#include <immintrin.h>
#include <string.h>

#define AVX2 __attribute__((target("avx2,fma,f16c")))
#define INLINE static inline __attribute__((always_inline)) AVX2

enum { CHUNK = 512, COLS = 8, TILE_ROWS = 3, TILE_COLS = 4 };

/* ---- weights into the panel ---- */

/* Sixteen codes of one block -> fp32 * scale: a code's three low bits choose from a table of the block's eight sizes, its fourth is the
 * sign. */
INLINE void decode_block(__m256 out[2], const uint8_t *codes, float scale) {
    const __m256 e2m1 = _mm256_setr_ps(0.f, 0.5f, 1.f, 1.5f, 2.f, 3.f, 4.f, 6.f);
    const __m256i to_low = _mm256_setr_epi32(0, 4, 8, 12, 16, 20, 24, 28), to_high = _mm256_setr_epi32(28, 24, 20, 16, 12, 8, 4, 0);
    const __m256 sign = _mm256_set1_ps(-0.f), table = _mm256_mul_ps(e2m1, _mm256_set1_ps(scale));
#pragma GCC unroll 2
    for (int i = 0; i < 2; i++) {
        int32_t eight;
        memcpy(&eight, codes + 4 * i, sizeof eight);
        __m256i word = _mm256_set1_epi32(eight);
        __m256 size = _mm256_permutevar8x32_ps(table, _mm256_srlv_epi32(word, to_low));
        out[i] = _mm256_xor_ps(size, _mm256_and_ps(_mm256_castsi256_ps(_mm256_sllv_epi32(word, to_high)), sign));
    }
}

/* Eight block scales: the byte's exponent and mantissa dropped into fp32's, then 2^120, the biases' difference. */
INLINE __m256 block_scales(const uint8_t *scale, size_t n) {
    uint64_t bytes = 0;
    if (n == 8)
        memcpy(&bytes, scale, 8); /* a load, where the other is a call */
    else
        memcpy(&bytes, scale, n);
    __m256i wide = _mm256_cvtepu8_epi32(_mm_cvtsi64_si128((long long)bytes));
    return _mm256_mul_ps(_mm256_castsi256_ps(_mm256_slli_epi32(wide, 20)), _mm256_set1_ps(0x1p120f));
}

AVX2 static void decode_column(float *out, const moe4_weight *w, size_t col, size_t k0, size_t n) {
    const uint8_t *codes = (const uint8_t *)w->data + (col * w->cols + k0) / 2;
    const uint8_t *scale = w->scale + (col * w->cols + k0) / MOE4_BLOCK;
    for (size_t b = 0; b < n / MOE4_BLOCK; b += 8) {
        size_t n_b = n / MOE4_BLOCK - b < 8 ? n / MOE4_BLOCK - b : 8;
        _Alignas(32) float scales[8];
        _mm256_store_ps(scales, block_scales(scale + b, n_b));
        for (size_t i = 0; i < n_b; i++) {
            __m256 v[2];
            decode_block(v, codes + (b + i) * MOE4_BLOCK / 2, scales[i]);
            _mm256_store_ps(out + (b + i) * MOE4_BLOCK, v[0]);
            _mm256_store_ps(out + (b + i) * MOE4_BLOCK + 8, v[1]);
        }
    }
}

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

/* ---- few rows ---- */

/* The same as tile, with the columns decoded on the way: codes[j] and scale[j] of n k. */
INLINE void decoded_tile(float *y, size_t y_ld, const float *const *x, const int n_rows, const uint8_t *const codes[TILE_COLS],
                         const uint8_t *const scale[TILE_COLS], size_t n_cols, size_t n, bool first) {
    __m256 acc[TILE_ROWS][TILE_COLS];
#pragma GCC unroll 4
    for (int m = 0; m < n_rows; m++)
#pragma GCC unroll 4
        for (int j = 0; j < TILE_COLS; j++) acc[m][j] = _mm256_setzero_ps();
    for (size_t b = 0; b < n / MOE4_BLOCK; b += 8) {
        size_t n_b = n / MOE4_BLOCK - b < 8 ? n / MOE4_BLOCK - b : 8;
        _Alignas(32) float scales[TILE_COLS][8];
#pragma GCC unroll 4
        for (int j = 0; j < TILE_COLS; j++) _mm256_store_ps(scales[j], block_scales(scale[j] + b, n_b));
        for (size_t i = 0; i < n_b; i++) {
#pragma GCC unroll 4
            for (int j = 0; j < TILE_COLS; j++) {
                __m256 w[2];
                decode_block(w, codes[j] + (b + i) * (MOE4_BLOCK / 2), scales[j][i]);
#pragma GCC unroll 4
                for (int m = 0; m < n_rows; m++) {
                    const float *at = x[m] + (b + i) * MOE4_BLOCK;
                    acc[m][j] = _mm256_fmadd_ps(_mm256_loadu_ps(at), w[0], acc[m][j]);
                    acc[m][j] = _mm256_fmadd_ps(_mm256_loadu_ps(at + 8), w[1], acc[m][j]);
                }
            }
        }
    }
    add_sums(y, y_ld, acc, n_rows, n_cols, first);
}

AVX2 static void few_rows(float *y, size_t y_ld, const void *const *rows, size_t n_rows, const moe4_weight *w, size_t col0, size_t n_cols) {
    size_t K = w->cols;
    for (size_t c = 0; c < n_cols; c += TILE_COLS) {
        size_t n_c = n_cols - c < TILE_COLS ? n_cols - c : TILE_COLS;
        for (size_t k0 = 0; k0 < K; k0 += CHUNK) {
            size_t n = K - k0 < CHUNK ? K - k0 : CHUNK;
            const float *x[TILE_ROWS];
            const uint8_t *codes[TILE_COLS], *scale[TILE_COLS];
            for (size_t m = 0; m < n_rows; m++) x[m] = (const float *)rows[m] + k0;
            for (size_t j = 0; j < TILE_COLS; j++) {
                size_t first = (col0 + c + (j < n_c ? j : n_c - 1)) * K + k0;
                codes[j] = (const uint8_t *)w->data + first / 2;
                scale[j] = w->scale + first / MOE4_BLOCK;
            }
            if (n_rows == 3) {
                decoded_tile(y + c, y_ld, x, 3, codes, scale, n_c, n, k0 == 0);
            } else if (n_rows == 2) {
                decoded_tile(y + c, y_ld, x, 2, codes, scale, n_c, n, k0 == 0);
            } else {
                decoded_tile(y + c, y_ld, x, 1, codes, scale, n_c, n, k0 == 0);
            }
        }
    }
}

AVX2 static void gemm(float *y, size_t y_ld, const void *const *rows, size_t n_rows, const struct moe4_matrix *w, size_t col0,
                      size_t n_cols, const void *next, void *scratch) {
    (void)scratch;
    (void)next;
    if (n_rows <= TILE_ROWS && w->w.dtype == MOE4_NVFP4) {
        few_rows(y, y_ld, rows, n_rows, &w->w, col0, n_cols);
        return;
    }
    _Alignas(32) float panel[COLS][CHUNK];
    size_t K = w->w.cols;
    for (size_t c = 0; c < n_cols; c += COLS) {
        size_t n_c = n_cols - c < COLS ? n_cols - c : COLS;
        for (size_t k0 = 0; k0 < K; k0 += CHUNK) {
            size_t n = K - k0 < CHUNK ? K - k0 : CHUNK;
            size_t fill = (n_c + TILE_COLS - 1) / TILE_COLS * TILE_COLS; /* a tile reads four columns: repeat the last */
            for (size_t j = 0; j < fill; j++) {
                size_t col = col0 + c + (j < n_c ? j : n_c - 1);
                if (w->w.dtype == MOE4_NVFP4) {
                    decode_column(panel[j], &w->w, col, k0, n);
                } else {
                    widen_column(panel[j], &w->w, col, k0, n);
                }
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
    .pack_codes = moe4_fp32_pack_codes,
    .gemm = gemm,
};

void moe4_kernels_gemm_avx2(struct moe4_kernels *k) {
    k->add_scaled_row = add_scaled_row;
    k->scale_row = scale_row;
    k->w4a4 = k->w4a16 = k->wide = &avx2;
}
#else
typedef int moe4_no_avx2; /* a translation unit may not be empty */
#endif
