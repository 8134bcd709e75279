/* The products on NEON, in fp32. Eight columns of W are decoded once per 256 k into a panel that stays in L1, and every row of x then
 * meets the panel in tiles of 4 rows x 4 columns: 16 accumulators, 4 vectors of x, one of the panel. One element's sum: four lanes over k
 * of a chunk, the lanes pairwise, the chunks in order; the same for any tile, so results depend on K alone. */
#include "kernels.h"
#include "rows.h"

#if defined(__aarch64__)
#include <arm_neon.h>
#include <string.h>

#define INLINE static inline __attribute__((always_inline))

enum { CHUNK = 256, COLS = 8, TILE_ROWS = 4, TILE_COLS = 4 };

/* ---- weights into the panel ---- */

/* Four int8 of 2 * e2m1 in the low half or the high one -> fp32, exact. */
INLINE void store_values(float *out, int16x8_t value, float half_scale) {
    vst1q_f32(out, vmulq_n_f32(vcvtq_f32_s32(vmovl_s16(vget_low_s16(value))), half_scale));
    vst1q_f32(out + 4, vmulq_n_f32(vcvtq_f32_s32(vmovl_s16(vget_high_s16(value))), half_scale));
}

static void decode_column(float *out, const moe4_weight *w, size_t col, size_t k0, size_t n) {
    static const int8_t twice[16] = {0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12};
    const int8x16_t table = vld1q_s8(twice);
    const uint8_t *codes = (const uint8_t *)w->data + (col * w->cols + k0) / 2;
    const uint8_t *scale = w->scale + (col * w->cols + k0) / MOE4_BLOCK;
    for (size_t b = 0; b < n / MOE4_BLOCK; b++, codes += MOE4_BLOCK / 2, out += MOE4_BLOCK) {
        /* half of the block scale: its exponent and mantissa dropped into fp32's, then 2^120 (the biases' difference) / 2 */
        const float half_scale = vget_lane_f32(vreinterpret_f32_u32(vdup_n_u32((uint32_t)scale[b] << 20)), 0) * 0x1p119f;
        const uint8x8_t pairs = vld1_u8(codes), even = vand_u8(pairs, vdup_n_u8(15)), odd = vshr_n_u8(pairs, 4);
        store_values(out, vmovl_s8(vqtbl1_s8(table, vzip1_u8(even, odd))), half_scale);
        store_values(out + 8, vmovl_s8(vqtbl1_s8(table, vzip2_u8(even, odd))), half_scale);
    }
}

/* Unquantized weights, zeros up to a multiple of 4. */
static void widen_column(float *out, const moe4_weight *w, size_t col, size_t k0, size_t n) {
    const size_t size = moe4_dtype_bytes(w->dtype);
    const char *src = (const char *)w->data + (col * w->cols + k0) * size;
    for (size_t k = 0; k < n; k += 4) {
        char tail[16] = {0};
        const char *at = src + k * size;
        if (n - k < 4) at = memcpy(tail, at, (n - k) * size);
        if (w->dtype == MOE4_F32) {
            memcpy(out + k, at, 16);
        } else {
            const uint16x4_t half = vreinterpret_u16_u8(vld1_u8((const uint8_t *)at));
            vst1q_f32(out + k,
                      w->dtype == MOE4_F16 ? vcvt_f32_f16(vreinterpret_f16_u16(half)) : vreinterpretq_f32_u32(vshll_n_u16(half, 16)));
        }
    }
}

/* ---- panel times rows ---- */

/* y[m][0..4) = (first ? 0 : y) + x[m] . panel columns, over n k; n_rows is a constant at each call. */
INLINE void tile(float *y, size_t y_ld, const float *const *x, const int n_rows, const float (*panel)[CHUNK], size_t n_cols, size_t n,
                 bool first) {
    float32x4_t acc[TILE_ROWS][TILE_COLS];
#pragma GCC unroll 4
    for (int m = 0; m < n_rows; m++)
#pragma GCC unroll 4
        for (int j = 0; j < TILE_COLS; j++) acc[m][j] = vdupq_n_f32(0);
    for (size_t k = 0; k < n; k += 4) {
        float32x4_t a[TILE_ROWS];
#pragma GCC unroll 4
        for (int m = 0; m < n_rows; m++) a[m] = vld1q_f32(x[m] + k);
#pragma GCC unroll 4
        for (int j = 0; j < TILE_COLS; j++) {
            const float32x4_t b = vld1q_f32(panel[j] + k);
#pragma GCC unroll 4
            for (int m = 0; m < n_rows; m++) acc[m][j] = vfmaq_f32(acc[m][j], a[m], b);
        }
    }
#pragma GCC unroll 4
    for (int m = 0; m < n_rows; m++) {
        float *out = y + (size_t)m * y_ld, sum[TILE_COLS];
        vst1q_f32(sum, vpaddq_f32(vpaddq_f32(acc[m][0], acc[m][1]), vpaddq_f32(acc[m][2], acc[m][3])));
        for (size_t j = 0; j < n_cols; j++) out[j] = first ? sum[j] : out[j] + sum[j];
    }
}

static void panel_times_rows(float *y, size_t y_ld, const void *const *rows, size_t n_rows, const float (*panel)[CHUNK], size_t n_cols,
                             size_t k0, size_t n) {
    for (size_t m = 0; m < n_rows; m += TILE_ROWS) {
        const size_t n_m = n_rows - m < TILE_ROWS ? n_rows - m : TILE_ROWS;
        const float *x[TILE_ROWS];
        for (size_t i = 0; i < n_m; i++) x[i] = (const float *)rows[m + i] + k0;
        for (size_t j = 0; j < n_cols; j += TILE_COLS) {
            const size_t n_j = n_cols - j < TILE_COLS ? n_cols - j : TILE_COLS;
            float *out = y + m * y_ld + j;
            switch (n_m) {
            case 4: tile(out, y_ld, x, 4, panel + j, n_j, n, k0 == 0); break;
            case 3: tile(out, y_ld, x, 3, panel + j, n_j, n, k0 == 0); break;
            case 2: tile(out, y_ld, x, 2, panel + j, n_j, n, k0 == 0); break;
            default: tile(out, y_ld, x, 1, panel + j, n_j, n, k0 == 0);
            }
        }
    }
}

static void gemm(float *y, size_t y_ld, const void *const *rows, size_t n_rows, const struct moe4_matrix *w, size_t col0, size_t n_cols,
                 const void *next, void *scratch) {
    (void)scratch;
    (void)next;
    _Alignas(16) float panel[COLS][CHUNK];
    const size_t K = w->w.cols;
    for (size_t c = 0; c < n_cols; c += COLS) {
        const size_t n_c = n_cols - c < COLS ? n_cols - c : COLS;
        for (size_t k0 = 0; k0 < K; k0 += CHUNK) {
            const size_t n = K - k0 < CHUNK ? K - k0 : CHUNK;
            const size_t fill = (n_c + TILE_COLS - 1) / TILE_COLS * TILE_COLS; /* a tile reads four columns: repeat the last */
            for (size_t j = 0; j < fill; j++) {
                const size_t col = col0 + c + (j < n_c ? j : n_c - 1);
                (w->w.dtype == MOE4_NVFP4 ? decode_column : widen_column)(panel[j], &w->w, col, k0, n);
            }
            panel_times_rows(y + c, y_ld, rows, n_rows, (const float(*)[CHUNK])panel, n_c, k0, n);
        }
    }
}

/* ---- rows of results ---- */

static void add_scaled_row(float *y, const float *x, float weight, size_t n) {
    size_t i = 0;
    for (; i + 4 <= n; i += 4) vst1q_f32(y + i, vaddq_f32(vld1q_f32(y + i), vmulq_n_f32(vld1q_f32(x + i), weight)));
    for (; i < n; i++) y[i] += weight * x[i];
}

static void scale_row(float *y, float a, float b, size_t n) {
    size_t i = 0;
    for (; i + 4 <= n; i += 4) vst1q_f32(y + i, vmulq_n_f32(vmulq_n_f32(vld1q_f32(y + i), a), b));
    for (; i < n; i++) y[i] = y[i] * a * b;
}

static const struct moe4_gemm neon = {
    .name = "fp32, NEON",
    .tile_cols = COLS,
    .packed_bytes = moe4_in_place,
    .row_bytes = moe4_fp32_row_bytes,
    .pack_row = moe4_fp32_pack_row,
    .pack_codes = moe4_fp32_pack_codes,
    .gemm = gemm,
};

void moe4_kernels_gemm_neon(struct moe4_kernels *k) {
    k->add_scaled_row = add_scaled_row;
    k->scale_row = scale_row;
    k->w4a4 = k->w4a16 = k->wide = &neon;
}
#else
typedef int moe4_no_neon; /* a translation unit may not be empty */
#endif
